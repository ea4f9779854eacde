"""Plots of runs: the loss over the training, and bits per byte after every stage of a run.

Several runs that differ in their seed share one plot. Dashed lines mark what general compressors
reach on the same text.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

import train_gpt  # noqa: E402
from records.compressors import YARDSTICKS  # noqa: E402
from records.logs import FINAL_SCORES, Json, RunLog  # noqa: E402

STAGES = {
    "final_prequant": "before\nquantization",
    "final_quantized": "quantized",
    "final_sliding": "sliding\nwindow",
    "final_ttt": "test-time\ntraining",
}
SEED_COLORS = ("#1f5fa8", "#d1702c", "#3a8f5c", "#8a559e", "#b0413e", "#60707f")
INK, FAINT = "#22303c", "#8b98a5"
PLOT_LAYOUT = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#b8c2cb",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7ecf0",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over windows centred on each value: 1/20 of all values, fewer towards the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), len(values) // 40)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def finite(events: Iterable[Json], key: str) -> list[Json]:
    """The events in which `key` is a finite number."""
    return [e for e in events if isinstance(e.get(key), int | float) and math.isfinite(e[key])]


def loss_top(losses: np.ndarray) -> float:
    """Upper end of the loss axis: the first tenth of the training may run out of it."""
    settled = losses[len(losses) // 10 :]
    return float(settled.max() + 0.05 * max(settled.max() - settled.min(), 0.1))


def draw_losses(axes: Axes, logs: Sequence[RunLog]) -> None:
    """Training loss of each run, raw and smoothed, and its validation losses."""
    top = 0.0
    for color, log in zip(itertools.cycle(SEED_COLORS), logs, strict=False):
        events = finite(log.by_step("step"), "train_loss")
        if not events:
            continue
        steps = [event["step"] for event in events]
        losses = smooth([event["train_loss"] for event in events])
        axes.plot(steps, [e["train_loss"] for e in events], color=color, alpha=0.3, lw=0.8)
        axes.plot(
            steps,
            losses,
            color=color,
            lw=1.8,
            label=f"training, seed {log.last('run').get('seed')}",
        )
        points = finite(log.by_step("val"), "val_loss")
        points += [{**log.last("final_prequant"), "step": steps[-1]}]
        points = finite(points, "val_loss")
        axes.plot(
            [p["step"] for p in points], [p["val_loss"] for p in points], "o", color=color,
            ms=4.5, mec="white", mew=0.8, zorder=3,
        )  # fmt: skip
        top = max(top, loss_top(losses), *(p["val_loss"] for p in points[-1:]))
    if top:
        axes.set_ylim(top=top)
        axes.plot([], [], "o", color=FAINT, ms=4.5, mec="white", label="validation")
        axes.legend(loc="upper right")


def label_loss_axes(axes: Axes, log: RunLog) -> None:
    """Steps and tokens, and below them seconds."""
    axes.set_title("Loss", pad=8)
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    end = (log.by_step("step") or [{}])[-1]
    steps, tokens, train_s = (end.get(key, 0) for key in ("step", "tokens", "train_s"))
    axes.set_xlabel(f"step of {tokens / steps:,.0f} tokens" if steps else "step")
    if steps and train_s:
        pace_s = train_s / steps
        seconds = axes.secondary_xaxis(-0.155, (lambda x: x * pace_s, lambda s: s / pace_s))
        seconds.set_xlabel("seconds of training", color=FAINT, fontsize=8.5)
        seconds.tick_params(colors=FAINT, labelsize=8.5)
        seconds.xaxis.set_major_formatter("{x:,.0f}")
        seconds.spines["bottom"].set_visible(False)


def draw_scores(axes: Axes, logs: Sequence[RunLog]) -> None:
    """Bits per byte after each stage; with several runs their mean, the runs as small dots."""
    stages = [name for name in STAGES if any(log.last(name) for log in logs)]
    means = []
    for place, name in enumerate(stages):
        scores = [log.last(name)["val_bpb"] for log in logs if log.last(name)]
        means.append(statistics.fmean(scores))
        if len(scores) > 1:
            axes.plot([place] * len(scores), scores, "o", color=FAINT, ms=4, alpha=0.8, zorder=3)
        axes.annotate(
            f"{means[-1]:.4f}", (place, max(scores)), xytext=(0, 8), textcoords="offset points",
            ha="center", weight="bold",
        )  # fmt: skip
    axes.plot(range(len(means)), means, color=SEED_COLORS[0], lw=1, alpha=0.4)
    axes.plot(range(len(means)), means, "o", color=SEED_COLORS[0], ms=8, mec="white", zorder=4)
    axes.set_xticks(range(len(stages)), [STAGES[name] for name in stages])
    axes.set_xlim(-0.6, max(len(stages), 2) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("bits per byte")
    axes.set_title("Validation, bits per byte", pad=8)
    draw_yardsticks(axes, next((y for log in logs if (y := log.last("yardstick"))), {}))
    axes.margins(y=0.16)


def draw_yardsticks(axes: Axes, event: Json) -> None:
    """One dashed line a compressor; the labels stay apart: above the upper, below the lower."""
    found = sorted((event[key], name) for key, name in YARDSTICKS.items() if key in event)
    for place, (bpb, name) in enumerate(found):
        above = place == len(found) - 1
        axes.axhline(bpb, color=FAINT, lw=1.2, ls=(0, (4, 3)))
        axes.annotate(
            f"{name}  {bpb:.4f}", (0.985, bpb), xycoords=("axes fraction", "data"),
            xytext=(0, 4 if above else -4), textcoords="offset points", color=FAINT,
            ha="right", va="bottom" if above else "top",
        )  # fmt: skip


def plot_title(logs: Sequence[RunLog]) -> str:
    """What ran, in one line."""
    log = logs[0]
    run_id = log.last("run").get("run_id", log.path.parent.name)
    parts = [run_id if len(logs) == 1 else f"{len(logs)} seeds"]
    if params := log.last("model").get("params"):
        parts.append(f"{params:,} parameters")
    if size := log.last("size"):
        parts.append(f"{size['total_bytes']:,} bytes")
    if hardware := log.last("hardware").get("name"):
        parts.append(hardware)
    if any(log.last(name).get("partial") for log in logs for name in STAGES):
        parts.append("PARTIAL VALIDATION")
    elif any(not log.last(n).get("compliant", True) for log in logs for n in FINAL_SCORES):
        parts.append("NOT COMPLIANT")
    return "   |   ".join(parts)


def draw_plot(logs: Sequence[RunLog], path: Path) -> None:
    """Draw the runs into the PNG file `path`, atomically."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12, 4.9), dpi=144, width_ratios=(1.45, 1), layout=PLOT_LAYOUT
        )
        draw_losses(left, logs)
        label_loss_axes(left, logs[0])
        draw_scores(right, logs)
        figure.suptitle(plot_title(logs), x=0.01, ha="left", fontsize=9.5, color=FAINT)
        with train_gpt.atomic_file(path) as file:
            figure.savefig(file, format="png")
        plt.close(figure)
