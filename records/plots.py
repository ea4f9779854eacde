"""Plots of runs: the loss over the training, and bits per byte after every stage of a run.

`draw_plot` shows the runs of one record, which differ only in their seed. `draw_comparison` lays
runs of different settings over each other, by tokens and by seconds. Gray rows are what general
compressors reach on the same text. The figures are about as wide as a page of README shows them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

import train_gpt  # noqa: E402
from records.compressors import list_yardsticks  # noqa: E402
from records.logs import FINAL_SCORES, METRICS, Json, RunLog  # noqa: E402
from train_gpt import InputError  # noqa: E402

STAGES = {
    "final_prequant": "before quantization",
    "final_quantized": "quantized",
    "final_sliding": "sliding window",
    "final_ttt": "test-time training",
}
PALETTE = ("#1f5fa8", "#d1702c", "#3a8f5c", "#8a559e", "#b0413e", "#60707f")
LINE_STYLES = ("-", "--", ":")  # one after another when the colors are used up
INK, FAINT = "#22303c", "#7b8894"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name may have dollar signs
    "axes.edgecolor": "#b8c2cb",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
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
    "figure.dpi": 180,
}
MAX_NAME_CHARACTERS = 48
MAX_LABELED_RUNS = 4  # of more runs the scores are not written beside their dots


class NamedRun(NamedTuple):
    """A run, and what it is called in a plot of several."""

    name: str
    log: RunLog


# --- Names ---------------------------------------------------------------------------------------


def display_name(text: str) -> str:
    """Return a name as it can be drawn: one line of printable characters, not too long."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= MAX_NAME_CHARACTERS else f"{shown[: MAX_NAME_CHARACTERS - 3]}..."


def run_name(log: RunLog) -> str:
    """Return SUBMISSION_NAME of a run, else its RUN_ID, else the name of its folder."""
    configs = log.all("config")
    given = configs[-1]["values"].get("SUBMISSION_NAME") if configs else ""
    return str(given or log.last("run").get("run_id") or log.path.parent.name)


def read_runs(folders: Iterable[Path]) -> list[NamedRun]:
    """Read the runs in run folders and in record folders; equal names get their folder's."""
    paths = []
    for folder in folders:
        found = sorted(folder.glob("metrics_seed*.jsonl"))
        paths += found if found and not (folder / METRICS).is_file() else [folder / METRICS]
    logs = [RunLog.read(path) for path in paths]
    counts = Counter(map(run_name, logs))
    runs = []
    for number, log in enumerate(logs, start=1):
        name = run_name(log)
        if counts[name] > 1:
            seed = log.last("run").get("seed", number)
            name = f"{name}, {log.path.parent.name}, seed {seed}"
        runs.append(NamedRun(display_name(name), log))
    return runs


def describe_runs(logs: Sequence[RunLog]) -> str:
    """Return the facts of runs that differ in their seed in one line, and any fault of scores."""
    log, parts = logs[0], [f"{len(logs)} seeds"] if len(logs) > 1 else []
    if params := log.last("model").get("params"):
        parts.append(f"{params:,} parameters")
    if sizes := [size for log in logs if (size := log.last("size").get("total_bytes"))]:
        bound = "at most " if len(set(sizes)) > 1 else ""
        parts.append(f"{bound}{max(sizes):,} bytes of code and artifact")
    if hardware := log.last("hardware").get("name"):
        parts.append(display_name(hardware))
    if any(log.last(name).get("partial") for log in logs for name in STAGES):
        parts.append("PARTIAL VALIDATION")
    elif any(not log.last(n).get("compliant", True) for log in logs for n in FINAL_SCORES):
        parts.append("NOT COMPLIANT")
    return "  |  ".join(parts)


def describe_steps(logs: Sequence[RunLog]) -> str:
    """Return how many steps the runs took, "" if none has ended."""
    steps = [count for log in logs if (count := log.last("train_end").get("steps"))]
    if not steps:
        return ""
    low, high = min(steps), max(steps)
    return f" ({high:,} steps)" if low == high else f" ({low:,} to {high:,} steps)"


# --- Loss ----------------------------------------------------------------------------------------


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return means over centered windows of 1/20 of all values, shorter toward the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), len(values) // 40)
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def finite(events: Iterable[Json], *keys: str) -> list[Json]:
    """Return the events in which all `keys` are finite numbers."""
    return [e for e in events if all(math.isfinite(e.get(key, math.nan)) for key in keys)]


def loss_top(losses: np.ndarray) -> float:
    """Return the upper end of the loss axis: the first tenth of the training may exceed it."""
    settled = losses[len(losses) // 10 :]
    return float(settled.max() + 0.05 * max(settled.max() - settled.min(), 0.1))


class Curve(NamedTuple):
    """The losses of one run over its training."""

    log: RunLog
    label: str
    color: str
    line: str


def style_curves(runs: Sequence[NamedRun]) -> list[Curve]:
    """Return the runs with a color each."""
    styles = [(color, line) for line in LINE_STYLES for color in PALETTE]
    return [
        Curve(run.log, run.name, *style)
        for run, style in zip(runs, itertools.cycle(styles), strict=False)
    ]


def draw_losses(axes: Axes, curves: Sequence[Curve], key: str, scale: float = 1.0) -> None:
    """Draw training and validation losses of runs over `key`: "tokens" or "train_s"."""
    top = end = 0.0
    has_points = False
    for curve in curves:
        events = finite(curve.log.by_step("step"), "train_loss", key)
        if not events:
            continue
        x = np.array([event[key] for event in events]) / scale
        losses = np.array([event["train_loss"] for event in events])
        smoothed = smooth(losses)
        axes.plot(x, losses, color=curve.color, alpha=0.25, lw=0.7)
        axes.plot(x, smoothed, curve.line, color=curve.color, lw=1.7, label=curve.label)
        points = validation_points(curve.log, events, key)
        axes.plot(
            [p / scale for p, _ in points], [loss for _, loss in points], "o",
            color=curve.color, ms=4.5, mec="white", mew=0.8, zorder=3,
        )  # fmt: skip
        has_points |= bool(points)
        top = max(top, loss_top(smoothed), *(loss for _, loss in points[-1:]))
        end = max(end, float(x[-1]))
    if top:
        axes.set_ylim(top=top)
        axes.set_xlim(0, 1.02 * end)
    if has_points:
        color = curves[0].color if len(curves) == 1 else FAINT
        axes.plot([], [], "o", color=color, ms=4.5, mec="white", label="validation")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_title("Training loss")
    axes.set_ylabel("nats per token")


def validation_points(log: RunLog, events: Sequence[Json], key: str) -> list[tuple[float, float]]:
    """Return validation losses at the place `key` of the step after which they were measured.

    The one after the training is left out if those before it are of a sample of the text.
    """
    places = {event["step"]: event[key] for event in events}
    steps = sorted(places)
    points = []
    for event in finite([*log.by_step("val")], "val_loss"):
        at = min(steps, key=lambda step: abs(step - event["step"]))
        points.append((places[at], event["val_loss"]))
    last = log.last("final_prequant")
    if all(event.get("partial") == last.get("partial") for event in log.all("val")):
        points += [(places[steps[-1]], event["val_loss"]) for event in finite([last], "val_loss")]
    return points


def add_seconds_axis(axes: Axes, log: RunLog, scale: float) -> None:
    """Add a second axis below that of the tokens: seconds of training."""
    events = finite(log.by_step("step"), "tokens", "train_s")
    tokens = np.array([0.0, *(e["tokens"] / scale for e in events)])
    seconds = np.array([0.0, *(e["train_s"] for e in events)])
    if len(events) < 2 or (np.diff(tokens) <= 0).any() or (np.diff(seconds) <= 0).any():
        return
    pace = tokens[-1] / seconds[-1]  # beyond the end of the training

    def to_seconds(x: Any) -> Any:
        return np.interp(x, tokens, seconds) + np.clip(x - tokens[-1], 0, None) / pace

    def to_tokens(x: Any) -> Any:
        return np.interp(x, seconds, tokens) + np.clip(x - seconds[-1], 0, None) * pace

    below = axes.secondary_xaxis(-0.2, (to_seconds, to_tokens))
    below.set_xlabel("seconds of training", color=FAINT)
    below.tick_params(colors=FAINT)
    below.xaxis.set_major_formatter("{x:,.10g}")
    below.spines["bottom"].set_visible(False)


# --- Scores --------------------------------------------------------------------------------------


def stage_scores(log: RunLog, name: str) -> list[float]:
    """Return the bits per byte of a stage; none if the run did not get there."""
    return [event["val_bpb"] for event in finite([log.last(name)], "val_bpb")]


def find_yardsticks(logs: Sequence[RunLog]) -> list[tuple[str, float]]:
    """Return the compressors that a run has measured, the worst one first."""
    marks = next((mark for log in logs if (mark := log.last("yardstick"))), {})
    return list_yardsticks(marks)[::-1]


# Behind the value beside a dot, so that no line of the grid runs through it.
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def make_room_for_labels(axes: Axes, scores: Sequence[float]) -> None:
    """Set the x axis so that all dots are in it, and the values to the right of them as well."""
    if scores:
        width = max(max(scores) - min(scores), 1e-3)
        axes.set_xlim(min(scores) - 0.06 * width, max(scores) + 0.22 * width)


def draw_row(axes: Axes, place: float, scores: Sequence[float], color: str, label: bool) -> None:
    """Draw a mean as a dot with its value, and the single scores as small dots."""
    mean = statistics.fmean(scores)
    if len(scores) > 1:
        axes.plot(scores, [place] * len(scores), "o", color=FAINT, ms=3.5, alpha=0.7, zorder=3)
    axes.plot(mean, place, "o", color=color, ms=7, mec="white", zorder=4)
    if label:
        axes.annotate(
            f"{mean:.4f}", (max(scores), place), xytext=(7, 0), textcoords="offset points",
            va="center", color=color if color != PALETTE[0] else INK, fontsize=8.5, bbox=LABEL_BOX,
        )  # fmt: skip


def draw_scores(axes: Axes, groups: Sequence[Sequence[RunLog]], colors: Sequence[str]) -> None:
    """Draw bits per byte by stage, a color for each group of runs, and the compressors in gray."""
    logs = [log for group in groups for log in group]
    stages = [name for name in STAGES if any(stage_scores(log, name) for log in logs)]
    marks = find_yardsticks(logs)
    rows = [STAGES[name] for name in stages] + [name for name, _ in marks]
    offsets = np.linspace(-0.28, 0.28, len(groups)) if len(groups) > 1 else np.zeros(1)
    for place, name in enumerate(stages):
        for group, color, offset in zip(groups, colors, offsets, strict=False):
            if scores := [score for log in group for score in stage_scores(log, name)]:
                draw_row(axes, place + offset, scores, color, len(groups) <= MAX_LABELED_RUNS)
    for place, (_, bpb) in enumerate(marks, start=len(stages)):
        draw_row(axes, place, [bpb], FAINT, label=True)
    if stages and marks:
        axes.axhline(len(stages) - 0.5, color="#b8c2cb", lw=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    means = [bpb for name in stages for log in logs for bpb in stage_scores(log, name)]
    make_room_for_labels(axes, [*means, *(bpb for _, bpb in marks)])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bits per byte")
    axes.set_title("Validation (lower is better)")


# --- Figures -------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure into the PNG file `path`, atomically, and close it."""
    try:
        with train_gpt.atomic_file(path) as file:
            figure.savefig(file, format="png")
    finally:
        plt.close(figure)


def draw_plot(logs: Sequence[RunLog], path: Path) -> None:
    """Draw runs that differ in their seed into the PNG file `path`, atomically."""
    names = [f"seed {log.last('run').get('seed', '?')}" for log in logs]
    curves = style_curves([NamedRun(*pair) for pair in zip(names, logs, strict=True)])
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 4.4), width_ratios=(1.25, 1), layout="constrained"
        )
        draw_losses(left, curves, "tokens", 1e6)
        left.set_xlabel("million tokens" + describe_steps(logs))
        if left.get_legend_handles_labels()[0]:
            left.legend(loc="upper right")
        add_seconds_axis(left, logs[0], 1e6)
        draw_scores(right, [logs], PALETTE)
        title = display_name(run_name(logs[0]))
        figure.suptitle(f"{title}:  {describe_runs(logs)}", x=0.01, ha="left", fontsize=9.5)
        save_figure(figure, path)


def draw_comparison(runs: Sequence[NamedRun], path: Path) -> None:
    """Draw several runs over each other into the PNG file `path`, atomically."""
    if not runs:
        raise InputError("no run to draw")
    curves = style_curves(runs)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
        draw_losses(panels[0], curves, "tokens", 1e6)
        panels[0].set_xlabel("million tokens")
        draw_losses(panels[1], curves, "train_s")
        panels[1].set_xlabel("seconds of training")
        panels[1].set_ylabel("")
        colors = [curve.color for curve in curves]
        draw_scores(panels[2], [[run.log] for run in runs], colors)
        handles = [
            Line2D([], [], color=c.color, ls=c.line, marker="o", mec="white", label=c.label)
            for c in curves
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=min(3, len(handles)))
        save_figure(figure, path)
