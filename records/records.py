"""Plot, compare, pack and check finished runs of train_gpt.py.

    python records/records.py plot RUN_DIR                 # draw RUN_DIR/plot.png
    python records/records.py yardstick RUN_DIR            # xz and zstd on the validation text
    python records/records.py build OUT_DIR RUN_DIR...     # a record folder from one run a seed
    python records/records.py check DIR...                 # recompute records from their logs
    python records/records.py table                        # write records/README.md
    python records/records.py knobs                        # write the table of knobs in README.md
    python records/records.py demo                         # the whole job: what `make run` does

A record is a folder records/track_<name>/<date>_<Name>/. Every number in its submission.json and in
the table of its README is computed from the logs beside it, by `build` and again by `check`. A
recipe is such a folder with run.env and README.md alone: a published system, not run here.

Sections: 1. Run logs  2. Plot  3. Yardstick  4. Submission  5. Record folder  6. Check
          7. Tables  8. Demo  9. Command line
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import inspect
import itertools
import json
import lzma
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import zstandard

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402  (the path above makes the import possible)
from data.prepare import spell_pieces  # noqa: E402
from train_gpt import Config, InputError  # noqa: E402

Json = dict[str, Any]

# --- 1. Run logs ---------------------------------------------------------------------------------
# A run that was killed and resumed logs some events twice: the last one counts. A kill can also
# leave a line cut short, with the next event right behind it. What compares runs keeps a line of
# results for each, which is added whole or not at all.

METRICS, LOG, SOURCE = "metrics.jsonl", "train.log", "train_gpt_source.py"
# Scores of the artifact in the order of the run; the last one that a run has is its result.
FINAL_SCORES = ("final_quantized", "final_sliding", "final_ttt")


def parse_event(line: str) -> Json | None:
    """The event of one line of metrics.jsonl; None if it was cut short."""
    try:
        event = json.loads(line[max(0, line.rfind('{"event"')) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


@dataclass(frozen=True)
class RunLog:
    """The events of one run, in order."""

    path: Path
    events: list[Json]

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a metrics.jsonl; InputError if there is none or it holds no event."""
        if not path.is_file():
            raise InputError(f"{path} is missing: not the folder of a run of train_gpt.py")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        events = [event for event in map(parse_event, lines) if event]
        if not events:
            raise InputError(f"{path} holds no event")
        return cls(path, events)

    def last(self, name: str) -> Json:
        """The last event of that name, or an empty dict."""
        found = [event for event in self.events if event["event"] == name]
        return found[-1] if found else {}

    def need(self, name: str) -> Json:
        """The last event of that name; InputError if the run did not get that far."""
        if not (event := self.last(name)):
            raise InputError(f"{self.path} has no `{name}` event: the run is not finished")
        return event

    def by_step(self, name: str) -> list[Json]:
        """The events of that name in the order of their steps, the last of each."""
        steps = {event["step"]: event for event in self.events if event["event"] == name}
        return [steps[step] for step in sorted(steps)]

    @property
    def config(self) -> Json:
        """The configuration of the training; that of a MODE=eval only if there is no other."""
        found = [event for event in self.events if event["event"] == "config"]
        trained = [event for event in found if event["values"].get("MODE") != "eval"]
        if not found:
            raise InputError(f"{self.path} has no `config` event")
        return (trained or found)[-1]

    @property
    def seed(self) -> str:
        """The run's seed, as the key that submission.json uses."""
        return str(self.config["values"]["SEED"])

    @property
    def score(self) -> Json:
        """The final score that the run reports."""
        names = [name for name in FINAL_SCORES if self.last(name)]
        return self.need(names[-1] if names else FINAL_SCORES[0])


def read_results(path: Path) -> dict[str, Json]:
    """The lines of a file of results by their key; none if the file does not exist."""
    results = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            result = json.loads(line)
            results[result["key"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number} is no result: {error!r}") from error
    return results


def append_result(path: Path, result: Json) -> None:
    """Add a line to the results, atomically."""
    before = path.read_bytes() if path.exists() else b""
    train_gpt.write_atomic(path, before + json.dumps(result).encode() + b"\n")


def parse_settings(text: Any, where: str) -> dict[str, str]:
    """The settings in `KEY=value KEY=value ...`, a value with spaces quoted as in a shell."""
    words = shlex.split(text) if isinstance(text, str) else [repr(text)]
    pairs = [word.partition("=") for word in words]
    bad = [f"{where}: {name + sep + value!r} is not KEY=value" for name, sep, value in pairs
           if not (sep and name.isidentifier() and name.isupper())]  # fmt: skip
    if bad:
        raise InputError("; ".join(bad))
    return {name: value for name, _, value in pairs}


# --- 2. Plot -------------------------------------------------------------------------------------
# Left the loss over the training, right the bits per byte of every stage of the run beside what
# general compressors reach on the same text. Several runs (seeds) share one plot.

STAGES = {
    "final_prequant": "before\nquantization",
    "final_quantized": "quantized",
    "final_sliding": "sliding\nwindow",
    "final_ttt": "test-time\ntraining",
}
YARDSTICKS = {"xz_bpb": "xz -9e", "zstd_bpb": "zstd -22 --ultra"}
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


# --- 3. Yardstick --------------------------------------------------------------------------------
# What general compressors make of the very bytes that the model was scored on. They need no model
# file but see only this text; a language model of use must be below them.


def spell_tokens(data: Config) -> bytes:
    """The bytes that the scored validation tokens stand for, counted as the scorer counts them."""
    processor, _ = train_gpt.load_tokenizer(data)
    data = replace(data, vocab_size=processor.get_piece_size())
    ids = train_gpt.load_validation(data, processor).ids.tolist()
    pieces = spell_pieces(processor)
    # After a control token a piece's leading space stands for nothing: decoders drop it.
    starts = [piece[1:] if piece[:1] == b" " else piece for piece in pieces]
    is_text = [not (processor.is_control(t) or processor.is_unknown(t)) for t in range(len(pieces))]
    return b"".join(
        (pieces if is_text[before] else starts)[token] for before, token in itertools.pairwise(ids)
    )


def validation_text(data: Config) -> bytes:
    """The validation text of a data set: val_text.bin where it has one, else from its shards."""
    path = Path(data.data_path) / "val_text.bin"
    if path.is_file() and not data.val_tokens_limit:
        return path.read_bytes()
    return spell_tokens(data)


def measure_yardsticks(text: bytes) -> Json:
    """Bits per byte of `text` under `xz -9e` and `zstd -22 --ultra`, file headers included."""
    if not text:
        raise InputError("the validation text is empty")
    packed = {
        "xz_bpb": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
        "zstd_bpb": zstandard.ZstdCompressor(level=22).compress(text),
    }
    bpb = {key: round(8 * len(payload) / len(text), 6) for key, payload in packed.items()}
    return {**bpb, "text_bytes": len(text)}


def append_event(folder: Path, event: str, **values: Any) -> None:
    """Add an event to the log and the metrics of a finished run, as the run itself would."""
    lines = {LOG: train_gpt.format_event(event, **values)}
    lines[METRICS] = json.dumps({"event": event, **values})
    for name, line in lines.items():
        text = (folder / name).read_bytes() if (folder / name).exists() else b""
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write("\n" * (text[-1:] not in (b"", b"\n")) + line + "\n")


def yardstick_run(folder: Path) -> Json:
    """Measure the yardsticks on what the run was scored on and add them to its log."""
    log = RunLog.read(folder / METRICS)
    values = log.config["values"]
    known = {f.name: values[f.name.upper()] for f in fields(Config) if f.name.upper() in values}
    names = ("data_path", "tokenizer_path", "vocab_size", "val_tokens_limit")
    event = measure_yardsticks(validation_text(replace(Config(), **{n: known[n] for n in names})))
    scored = log.last("final_quantized").get("bytes", event["text_bytes"])
    if scored != event["text_bytes"]:
        print(f"note: the text has {event['text_bytes']:,} bytes, the scorer counted {scored:,}")
    append_event(folder, "yardstick", **event)
    return event


# --- 4. Submission -------------------------------------------------------------------------------
# submission.json as a function of the logs. What only a person knows (author, date, name, previous
# record) is passed through; every other key is computed, so that `check` can compute it again.

DESCRIBED = ("author", "date", "name", "previous")


def seed_result(log: RunLog) -> Json:
    """The entry of one run under `seeds`."""
    score, end = log.score, log.last("train_end")
    return {
        "val_bpb": score["val_bpb"],
        "val_loss": score["val_loss"],
        "steps": end.get("steps", 0),
        "train_s": end.get("train_s", 0.0),
        "eval_s": log.need("ledger")["evaluation_s"],
        "artifact_bytes": log.need("size")["artifact_bytes"],
    }


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value), to the 8 digits of the logs."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 8), round(std, 8)


def largest(logs: Sequence[RunLog], event: str, key: str) -> Any:
    """The largest value over the runs: a budget binds the worst of them."""
    return max(log.need(event)[key] for log in logs)


def largest_groups(logs: Sequence[RunLog]) -> Json:
    """Bytes of each part of the artifacts, if the runs have logged them: older ones have not."""
    parts = [log.last("bytes") for log in logs]
    keys = [key for key in parts[0] if key != "event" and all(key in part for part in parts)]
    return {"groups": {key: max(part[key] for part in parts) for key in keys}} if keys else {}


def shared_versions(log: RunLog) -> tuple[Json, str]:
    """Versions of a run's libraries, and the SHA-256 of its source."""
    versions = {k: v for k, v in log.need("versions").items() if k != "event"}
    return versions, versions.pop("source_sha256")


def compute_submission(logs: Sequence[RunLog], described: Mapping[str, str]) -> Json:
    """The content of submission.json for runs that differ in nothing but their seed."""
    seeds = {log.seed: seed_result(log) for log in sorted(logs, key=lambda log: int(log.seed))}
    mean, std = mean_and_std([seed["val_bpb"] for seed in seeds.values()])
    versions, source_sha256 = shared_versions(logs[0])
    return {
        "author": described["author"],
        "date": described["date"],
        "name": described["name"],
        "track": logs[0].config["values"]["TRACK"],
        "val_bpb": mean,
        "val_bpb_std": std,
        "seeds": seeds,
        "artifact_bytes_max": largest(logs, "size", "artifact_bytes"),
        "code_bytes": largest(logs, "size", "code_bytes"),
        "source_sha256": source_sha256,
        "hardware": logs[0].need("hardware")["name"],
        "versions": versions,
        "previous": described["previous"],
        "compliant": all(log.score["compliant"] for log in logs),
        "budget": {
            "time": {
                "training_s": largest(logs, "ledger", "training_s"),
                "training_budget_s": largest(logs, "ledger", "training_budget_s"),
                "evaluation_s": largest(logs, "ledger", "evaluation_s"),
                "evaluation_budget_s": largest(logs, "ledger", "evaluation_budget_s"),
            },
            "bytes": {
                "total_bytes_max": largest(logs, "size", "total_bytes"),
                "budget_bytes": largest(logs, "size", "budget_bytes"),
                **largest_groups(logs),
            },
        },
    }


def find_differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """How `found` differs from `expected`, key by key: missing, unknown or another value."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        same = type(found) is type(expected) and found == expected
        return [] if same else [f"{where} is {found!r}, the logs give {expected!r}"]
    prefix = f"{where}." if where else ""
    problems = [f"{prefix}{key} is missing" for key in expected if key not in found]
    problems += [f"{prefix}{key} is an unknown key" for key in found if key not in expected]
    for key in expected:
        if key in found:
            problems += find_differences(found[key], expected[key], prefix + key)
    return problems


def find_overruns(submission: Json) -> list[str]:
    """Which budgets were passed; a budget of 0 is none."""
    budget = submission["budget"]
    pairs = [
        ("training_s", budget["time"]["training_s"], budget["time"]["training_budget_s"]),
        ("evaluation_s", budget["time"]["evaluation_s"], budget["time"]["evaluation_budget_s"]),
        ("total_bytes", budget["bytes"]["total_bytes_max"], budget["bytes"]["budget_bytes"]),
    ]
    return [f"{name} {used:,} passes its budget of {most:,}" for name, used, most in pairs
            if most and used > most]  # fmt: skip


def student_above(t: float, freedom: float) -> float:
    """The share of Student's distribution with `freedom` degrees of freedom that is above `t`."""
    # With t = sqrt(freedom) * tan(angle), the density becomes cos(angle)^(freedom - 1).
    edges = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    density = np.cos(middles) ** (freedom - 1)
    above = middles >= math.atan(t / math.sqrt(freedom))
    return float(density[above].sum() / density.sum())


def welch_p(scores: Sequence[float], previous: Sequence[float]) -> float | None:
    """One-sided Welch test: p that `scores` are not lower than `previous`; None if undefined."""
    if min(len(scores), len(previous)) < 2:
        return None
    shares = [statistics.variance(x) / len(x) for x in (scores, previous)]
    if sum(shares) == 0:
        return None
    t = (statistics.fmean(previous) - statistics.fmean(scores)) / math.sqrt(sum(shares))
    sizes = (len(scores), len(previous))
    freedom = sum(shares) ** 2 / sum(s**2 / (n - 1) for s, n in zip(shares, sizes, strict=True))
    return student_above(t, freedom)


def paired_p(gains: Sequence[float]) -> float | None:
    """One-sided paired t test: p of such a mean gain if there is none; None if undefined."""
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return student_above(statistics.fmean(gains) / error, len(gains) - 1) if error else None


# --- 5. Record folder ----------------------------------------------------------------------------
# Runs become a folder that holds all that is needed to check and to repeat them. It is built under
# another name and renamed, so that a folder that exists is a whole one.

# Knobs that belong to one run or one person, not to the setting that a record publishes.
RUN_KNOBS = {
    "ARTIFACT", "MODE", "RECIPE", "RESUME", "RUN_DIR", "RUN_ID", "SEED", "SUBMISSION_AUTHOR",
    "SUBMISSION_NAME",
}  # fmt: skip
HEADINGS = (
    "Result", "What changed", "What was removed", "What did not help", "Reproduce", "Rules",
    "Limits", "Credits",
)  # fmt: skip
MAX_README_LINES = 120
RECORD_FILES = (
    "submission.json", "README.md", "run.env", "train_gpt.py", "requirements.txt", "plot.png",
)  # fmt: skip
RECIPE_HEADINGS = (
    "What the source claims", "What its logs show", "What this recipe does", "Legality",
    "Parameters", "Commands", "Missing",
)  # fmt: skip
DATED_FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_(.+)")


def spell_value(value: Any) -> str:
    """A knob's value as the environment spells it."""
    return str(int(value)) if isinstance(value, bool) else str(value).removesuffix(".0")


def setting_of(log: RunLog) -> dict[str, str]:
    """The knobs that differ from the defaults, as run.env spells them."""
    config = log.config
    names = [name for name in config["changed"] if name not in RUN_KNOBS]
    return {name: spell_value(config["values"][name]) for name in names}


def knob_docs() -> dict[str, tuple[str, str]]:
    """Meaning and default of every knob of the script."""
    return {f.name.upper(): (f.metadata["doc"], spell_value(f.default)) for f in fields(Config)}


def format_setting(setting: Mapping[str, str]) -> str:
    """The content of run.env."""
    docs = knob_docs()
    lines = []
    for name, value in sorted(setting.items()):
        if any(character.isspace() for character in value):
            raise InputError(f"{name}={value!r}: run.env cannot carry a value with a space")
        lines += [f"# {docs[name][0]}" if name in docs else "#", f"{name}={value}"]
    return "\n".join(["# Every knob that differs from its default.", *lines, ""])


def parse_setting(text: str) -> dict[str, str]:
    """The knobs in the content of a run.env."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def refuse_mixed_runs(logs: Sequence[RunLog]) -> None:
    """InputError unless the runs differ in their seed and in nothing else that is recorded."""
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"two runs have the same seed: {', '.join(seeds)}")
    for log in logs[1:]:
        for what, here, there in (
            ("knobs", setting_of(log), setting_of(logs[0])),
            ("source and versions", shared_versions(log), shared_versions(logs[0])),
            ("hardware", log.need("hardware")["name"], logs[0].need("hardware")["name"]),
        ):
            if here != there:
                raise InputError(
                    f"{log.path.parent} and {logs[0].path.parent} differ in {what}: "
                    f"{here} and {there}; a record takes runs that differ in their seed alone"
                )


def read_finished_run(folder: Path) -> tuple[RunLog, Json]:
    """A run's log and its own submission.json, which must follow from the log."""
    path = folder / "submission.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: the run did not finish")
    log, own = RunLog.read(folder / METRICS), json.loads(path.read_bytes())
    computed = compute_submission([log], {key: own.get(key, "") for key in DESCRIBED})
    if problems := find_differences(own, computed):
        raise InputError(f"{path} does not follow from its log: {'; '.join(problems)}")
    if problems := find_overruns(own):
        raise InputError(f"{folder}: {'; '.join(problems)}")
    return log, own


def format_result(logs: Sequence[RunLog], submission: Json, previous: Json | None) -> str:
    """The Result table of a record's README: a row a seed, mean and deviation, p, yardsticks."""
    names = ("final_prequant", *FINAL_SCORES)
    rows = []
    for log in sorted(logs, key=lambda log: int(log.seed)):
        seed, end = seed_result(log), log.last("train_end")
        scores = [f"{log.last(n)['val_bpb']:.5f}" if log.last(n) else "-" for n in names]
        step_ms = f"{end['step_avg_ms']:.1f}" if end else "-"
        cells = [log.seed, f"{seed['steps']:,}", step_ms, *scores, f"{seed['artifact_bytes']:,}"]
        rows.append([*cells, f"{seed['train_s']:.1f}", f"{seed['eval_s']:.1f}"])
    header = ["seed", "steps", "step ms", "raw bpb", "quantized bpb", "sliding bpb", "TTT bpb"]
    lines = [*table_lines([*header, "artifact bytes", "train s", "eval s"], rows), ""]
    lines.append(
        f"- Validation bpb: mean {submission['val_bpb']:.5f}, standard deviation "
        f"{submission['val_bpb_std']:.5f}, n = {len(logs)}."
    )
    lines.append(
        "- Counted bytes (code and artifact): at most "
        f"{submission['budget']['bytes']['total_bytes_max']:,} of "
        f"{submission['budget']['bytes']['budget_bytes']:,}."
    )
    if not submission["compliant"]:
        lines.append("- **Not compliant**: the score is partial or breaks a rule.")
    if previous:
        p = welch_p(*([s["val_bpb"] for s in x["seeds"].values()] for x in (submission, previous)))
        lines.append(
            f"- Previous record: {previous['val_bpb']:.5f} ({submission['previous']}); one-sided "
            f"Welch test: p = {'undefined' if p is None else f'{p:.2g}'}."
        )
    if mark := next((y for log in logs if (y := log.last("yardstick"))), None):
        lines.append(
            f"- The same {mark['text_bytes']:,} bytes of text: `xz -9e` {mark['xz_bpb']:.4f} bpb, "
            f"`zstd -22 --ultra` {mark['zstd_bpb']:.4f} bpb."
        )
    return "\n".join(lines)


# Marks in Markdown files between which a table is generated.
def replace_marked(text: str, mark: str, content: str) -> str:
    """`text` with what stands between <!-- mark --> and <!-- /mark --> replaced by `content`."""
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, found, rest = text.partition(opening)
    _, closed, tail = rest.partition(closing)
    if not (found and closed):
        raise InputError(f"the marks {opening} and {closing} are missing")
    return f"{head}{opening}\n{content}\n{closing}{tail}"


RULES = """\
- Causal: a prediction reads nothing right of its position (`Attention`; `evaluate` pads only
  right of what is scored).
- Normalised: the probabilities are a softmax over the whole vocabulary (`softcapped_nll`).
- Score before update: a target is scored before anything is learned from it (`evaluate`).
- Single pass: each target is scored exactly once (`plan_windows`, `Scorer`)."""


def format_readme(
    logs: Sequence[RunLog], submission: Json, previous: Json | None, data_command: str
) -> str:
    """A record's README: all that the logs can tell, and headings for what only its author can."""
    config, setting, docs = logs[0].config, setting_of(logs[0]), knob_docs()
    rows = [
        [f"`{name}`", docs.get(name, ("", "?"))[1] or "empty", value, "not measured", "-"]
        for name, value in sorted(setting.items())
    ]
    changes = table_lines(["knob", "from", "to", "effect", "source"], rows)
    ranks = logs[0].need("run")["ranks"]
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    command = f"env $(grep -v '^#' run.env) SEED={logs[0].seed} {launch} train_gpt.py"
    data = data_command or f"# the data set of DATA_PATH={config['values']['DATA_PATH']}"
    bodies = {
        "Result": f"<!-- result -->\n{format_result(logs, submission, previous)}\n<!-- /result -->"
        "\n\n![Loss and bits per byte](plot.png)",
        "What changed": "\n".join(["Against the defaults of `train_gpt.py`:", "", *changes])
        if rows
        else "Nothing: the defaults of `train_gpt.py`.",
        "What was removed": "Nothing.",
        "What did not help": "Not recorded.",
        "Reproduce": f"```bash\npip install -r requirements.txt\n{data}\n{command}\n```",
        "Rules": RULES,
        "Limits": f"Run on {submission['hardware']}.",
        "Credits": f"{submission['author'] or 'Not named'}.",
    }
    sections = [f"## {heading}\n\n{bodies[heading]}\n" for heading in HEADINGS]
    return "\n".join([f"# {submission['name']}\n", *sections])


def describe_record(options: argparse.Namespace, own: Sequence[Json]) -> dict[str, str]:
    """What no log gives: from the command line, else the folder's name, else the runs."""
    dated = DATED_FOLDER.fullmatch(options.out.name)
    return {
        "author": options.author or own[0]["author"],
        "date": options.date or (dated[1] if dated else max(report["date"] for report in own)),
        "name": options.name or (dated[2] if dated else own[0]["name"]),
        "previous": options.previous,
    }


def find_previous(previous: str, records: Path) -> Json | None:
    """The submission of the record `previous` (track_<name>/<folder>) under `records`."""
    if not previous:
        return None
    path = records / previous / "submission.json"
    if not path.is_file():
        raise InputError(f"the previous record {previous} has no {path}")
    content: Json = json.loads(path.read_bytes())
    return content


def format_requirements(submission: Json) -> str:
    """requirements.txt of a record: the pinned packages, and the machine in a comment."""
    versions = ", ".join(f"{name} {version}" for name, version in submission["versions"].items())
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return f"# Run on {submission['hardware']} with {versions}.\n{pinned}"


def write_record(folder: Path, logs: Sequence[RunLog], texts: Mapping[str, str]) -> None:
    """Write the files of a record into the empty folder `folder`."""
    for log in logs:
        shutil.copyfile(log.path, folder / f"metrics_seed{log.seed}.jsonl")
        shutil.copyfile(log.path.parent / LOG, folder / f"train_seed{log.seed}.log")
    shutil.copyfile(logs[0].path.parent / SOURCE, folder / "train_gpt.py")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    draw_plot(logs, folder / "plot.png")


def build_record(options: argparse.Namespace) -> None:
    """Make the record folder options.out from the finished runs options.runs, and check it."""
    out: Path = options.out
    if out.exists():
        raise InputError(f"{out} exists; remove it or name another folder")
    logs, own = zip(*map(read_finished_run, options.runs), strict=True)
    refuse_mixed_runs(logs)
    submission = compute_submission(logs, describe_record(options, own))
    previous = find_previous(submission["previous"], options.records)
    texts = {
        "run.env": format_setting(setting_of(logs[0])),
        "submission.json": json.dumps(submission, indent=2) + "\n",
        "requirements.txt": format_requirements(submission),
        "README.md": format_readme(logs, submission, previous, options.data_command),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_record(partial, logs, texts)
        if problems := check_record(partial, options.records, name=out.name):
            raise InputError("the runs make no valid record:\n  " + "\n  ".join(problems))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {len(logs)} run(s), val_bpb {submission['val_bpb']}")


# --- 6. Check ------------------------------------------------------------------------------------
# A record says nothing that its logs do not: submission.json and the Result table are computed
# again, log and metrics must tell the same, and the source must be the one that every log names.


TOKEN = re.compile(r'(\w+):("(?:[^"\\]|\\.)*"|\S*)')


def normalise(value: Any) -> str:
    """A logged value as text that is the same for a float and for what a log shows of it."""
    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    try:
        return text if text.lstrip("-").isdigit() else f"{float(text):.6g}"
    except ValueError:
        return text


def normalise_line(line: str) -> tuple[str, ...]:
    """A line of train.log as a tuple that can be compared with normalise_event."""
    name, _, rest = line.partition(" ")
    pairs = [(k, json.loads(v) if v[:1] == '"' else v) for k, v in TOKEN.findall(rest)]
    return (name, *sorted(f"{key}:{normalise(value)}" for key, value in pairs))


def normalise_event(event: Json) -> tuple[str, ...]:
    """An event of metrics.jsonl as a tuple."""
    pairs = [f"{key}:{normalise(value)}" for key, value in event.items() if key != "event"]
    return (event["event"], *sorted(pairs))


def check_logs(folder: Path, logs: Sequence[RunLog]) -> list[str]:
    """Events that metrics have and the text log has not; for final scores also the other way."""
    problems = []
    for log in logs:
        path = folder / f"train_seed{log.seed}.log"
        text = path.read_text(encoding="utf-8", errors="replace")
        expected = {normalise_event(e) for e in log.events if e["event"] != "config"}
        names = {event[0] for event in expected}
        found = {normalise_line(x) for x in text.splitlines() if x.partition(" ")[0] in names}
        finals = {line for line in found if line[0] in FINAL_SCORES}
        for where, lines in ((path.name, expected - found), (log.path.name, finals - expected)):
            problems += [f"{where} has nothing like `{' '.join(line)}`" for line in sorted(lines)]
    return problems


def check_sources(folder: Path, logs: Sequence[RunLog], submission: Json) -> list[str]:
    """Whether train_gpt.py is what ran and run.env is how it was set, in every run."""
    digest = hashlib.sha256((folder / "train_gpt.py").read_bytes()).hexdigest()
    problems = []
    if digest != submission["source_sha256"]:
        problems.append("train_gpt.py is not the source that submission.json names")
    setting = parse_setting((folder / "run.env").read_text(encoding="utf-8"))
    for log in logs:
        if shared_versions(log)[1] != digest:
            problems.append(f"train_gpt.py is not the source of {log.path.name}")
        if setting_of(log) != setting:
            problems.append(f"run.env is not the setting of {log.path.name}")
    return problems


def check_page(text: str, headings: Sequence[str]) -> list[str]:
    """Whether a README has the fixed headings and no more lines than it may."""
    problems = []
    found = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    if found != [*headings]:
        problems.append(f"README.md has the headings {found}, the fixed ones are {[*headings]}")
    if text.count("\n") > MAX_README_LINES:
        problems.append(f"README.md has more than {MAX_README_LINES} lines")
    return problems


def check_readme(text: str, result: str) -> list[str]:
    """Whether a record's README has its form and the computed result."""
    problems = check_page(text, HEADINGS)
    try:
        if replace_marked(text, "result", result) != text:
            problems.append("README.md has another Result than the logs give")
    except InputError as error:
        problems.append(f"README.md: {error}")
    return problems


def check_description(folder: Path, name: str, submission: Json) -> list[str]:
    """Whether author, date, name, previous and track have their form and fit the folder."""
    problems = [f"{key} is not text" for key in DESCRIBED if not isinstance(submission[key], str)]
    try:
        datetime.date.fromisoformat(submission["date"])
    except (ValueError, TypeError):
        problems.append(f"date is {submission['date']!r}, not YYYY-MM-DD")
    if (dated := DATED_FOLDER.fullmatch(name)) and dated.groups() != (
        submission["date"],
        submission["name"],
    ):
        problems.append(f"the folder {name} is not named after date and name")
    if (track := folder.parent.name).startswith("track_") and track != submission["track"]:
        problems.append(f"track is {submission['track']!r}, the folder stands in {track}")
    return problems


def check_record(folder: Path, records: Path, name: str = "") -> list[str]:
    """Everything that is wrong with the record in `folder`; `name`: that of the folder to be."""
    paths = sorted(folder.glob("metrics_seed*.jsonl"))
    needed = [*RECORD_FILES, *(f"train_{p.stem.removeprefix('metrics_')}.log" for p in paths)]
    problems = [f"{file} is missing" for file in needed if not (folder / file).is_file()]
    if not paths:
        problems.append("metrics_seed*.jsonl is missing")
    if problems:
        return problems
    try:
        submission = json.loads((folder / "submission.json").read_bytes())
        logs = [RunLog.read(path) for path in paths]
        refuse_mixed_runs(logs)
        computed = compute_submission(logs, {key: submission.get(key, "") for key in DESCRIBED})
        problems = find_differences(submission, computed)
        previous = find_previous(computed["previous"], records)
        result = format_result(logs, computed, previous)
    except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [*problems, f"unusable: {error!r}"]
    if problems:
        return problems
    problems += find_overruns(submission)
    problems += check_description(folder, name or folder.name, submission)
    problems += check_sources(folder, logs, submission)
    problems += check_logs(folder, logs)
    problems += check_readme((folder / "README.md").read_text(encoding="utf-8"), result)
    return problems


def is_recipe(folder: Path) -> bool:
    """Whether `folder` is a recipe: a setting without anything that a run leaves."""
    left = [*folder.glob("submission.json"), *folder.glob("metrics_seed*.jsonl")]
    return (folder / "run.env").is_file() and not left and not folder.name.startswith(".")


def stated_parameters(text: str) -> str:
    """The number of parameters that a recipe's README states in bold, or an empty string."""
    found = re.search(r"^\*\*([\d,]+) parameters\*\*", text, flags=re.MULTILINE)
    return found[1] if found else ""


def check_recipe(folder: Path) -> list[str]:
    """Everything that is wrong with the recipe in `folder`."""
    path = folder / "run.env"
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        cfg = train_gpt.config_from_env({"RECIPE": str(path), "MODE": "describe"})
    except (InputError, OSError) as error:
        return [f"unusable: {error}"]
    same = sorted(train_gpt.read_recipe(path).keys() - set(train_gpt.changed_knobs(cfg)))
    problems = [f"run.env sets {name} to its default" for name in same]
    problems += check_page(text, RECIPE_HEADINGS)
    if not (found := re.search(r"params:(\d+)", train_gpt.describe(cfg))):
        return [*problems, "MODE=describe says no number of parameters"]
    if (stated := stated_parameters(text)) != (num_params := f"{int(found[1]):,}"):
        problems.append(f"README.md states {stated or 'no'} parameters, the model has {num_params}")
    return problems


# --- 7. Tables -----------------------------------------------------------------------------------
# Markdown that is generated: the list of all records, and the knobs in the project's README.


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; numbers stand right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    is_number = [
        all(re.fullmatch(r"-|[-+\d.,]+", row[column]) for row in rows)
        and any(row[column] != "-" for row in rows)
        for column in range(len(header))
    ]
    rule = ["---:" if number else "---" for number in is_number]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def record_row(folder: Path, records: Path) -> list[str]:
    """The row of one record in the table of its track."""
    record = json.loads((folder / "submission.json").read_bytes())
    used = record["budget"]["time"]
    return [
        f"{record['val_bpb']:.5f}",
        f"{record['val_bpb_std']:.5f}",
        str(len(record["seeds"])),
        f"[{record['name']}]({folder.relative_to(records).as_posix()}/README.md)",
        record["author"] or "-",
        record["date"],
        f"{record['budget']['bytes']['total_bytes_max']:,}",
        f"{used['training_s']:.0f} + {used['evaluation_s']:.0f}",
        record["hardware"],
        "yes" if record["compliant"] else "no",
    ]


def find_records(records: Path) -> list[Path]:
    """All record folders, sorted."""
    return sorted(path.parent for path in records.glob("track_*/*/submission.json"))


def find_recipes(records: Path) -> list[Path]:
    """All recipe folders, sorted."""
    return sorted(
        path.parent for path in records.glob("track_*/*/run.env") if is_recipe(path.parent)
    )


def recipe_row(folder: Path, records: Path) -> list[str]:
    """The row of one recipe: its name, the number of parameters and the title of its README."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    link = f"[{folder.name}]({folder.relative_to(records).as_posix()}/README.md)"
    return [link, stated_parameters(text), text.partition("\n")[0].removeprefix("# ")]


RECORDS_HEAD = """\
# Records

Made by `python records/records.py table`: do not edit. Each row comes from a `submission.json`, and
that from the logs beside it; `python records/records.py check records/track_*/*/` computes all of
them again. In every track the lowest bits per byte stand first."""


RECIPES_HEAD = """\
Recipes of published systems: settings that nobody has run here, so they have no score. Each README
sets what its source claims against what its logs show, and says what is missing."""


RECORDS_TAIL = """\
## Ablations

What each technique is worth at a track's scale stands in its `ablations.md`, where there is one: a
grid of changed knobs times seeds, each run a fixed number of steps. The grid is `ablations.toml`
beside it (how to write one: the head of `records/ablations.py`), every run a line of
`ablations.jsonl`, table and plot are made from that. What a step takes is measured by itself, each
variant next to its reference, into `ablations_time.jsonl`.

```bash
grid=records/track_cpu_10min_1mb/ablations.toml
python records/ablations.py run $grid --hours 0             # check the grid, run nothing
python records/ablations.py run $grid --jobs 2 --hours 4    # what is missing; killed, it goes on
python records/ablations.py run $grid --retry               # the failed runs, too
python records/ablations.py time $grid --jobs 2             # what a step takes; nothing else runs
python records/ablations.py table $grid                     # ablations.md and ablations.png
```"""


def format_records(records: Path) -> str:
    """The content of records/README.md."""
    lines = [RECORDS_HEAD]
    header = ["val bpb", "std", "n", "record", "author", "date", "bytes", "train + eval s"]
    header += ["hardware", "compliant"]
    folders, recipes = find_records(records), find_recipes(records)
    for track in sorted({folder.parent.name for folder in [*folders, *recipes]}):
        rows = [record_row(f, records) for f in folders if f.parent.name == track]
        rows.sort(key=lambda row: (row[-1] == "no", float(row[0])))
        lines += ["", f"## {track}"]
        lines += ["", *table_lines(header, rows)] if rows else []
        rows = [recipe_row(f, records) for f in recipes if f.parent.name == track]
        shown = table_lines(["recipe", "parameters", "system"], rows)
        lines += ["", RECIPES_HEAD, "", *shown] if rows else []
    if not folders:
        lines += ["", "There is no record yet."]
    return "\n".join([*lines, "", RECORDS_TAIL, ""])


def knob_groups() -> dict[str, str]:
    """The group of every knob: the one-line comment above it in the source of Config."""
    groups, group = {}, ""
    for line in inspect.getsource(Config).splitlines():
        if found := re.fullmatch(r"    # (\w[\w ]*)", line):
            group = found[1]
        elif found := re.match(r"    (\w+): \w+ = knob\(", line):
            groups[found[1].upper()] = group
    return groups


def knob_range(metadata: Mapping[str, Any], kind: str) -> str:
    """Allowed values of a knob, in words."""
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    low, high = metadata["low"], metadata["high"]
    if low is None:
        return {"bool": "`0`, `1`", "str": "text"}.get(kind, kind)
    unit = f" {metadata['unit']}" if metadata["unit"] else ""
    return (f"{low:,g} or more" if high is None else f"{low:,g} to {high:,.8g}") + unit


def knob_table() -> str:
    """The table of all knobs, in the order of Config."""
    groups, rows = knob_groups(), []
    for group, members in itertools.groupby(fields(Config), lambda f: groups[f.name.upper()]):
        rows.append([f"**{group}**", "", "", ""])
        for f in members:
            shown = f"`{spell_value(f.default)}`" if f.default != "" else "empty"
            values = knob_range(f.metadata, type(f.default).__name__)
            rows.append([f"`{f.name.upper()}`", shown, values, f.metadata["doc"]])
    return "\n".join(table_lines(["knob", "default", "values", "meaning"], rows))


def write_knobs(readme: Path) -> None:
    """Write the table of knobs into the project's README."""
    text = readme.read_text(encoding="utf-8")
    train_gpt.write_atomic(readme, replace_marked(text, "knobs", knob_table()).encode())


# --- 8. Demo -------------------------------------------------------------------------------------
# The whole job in the order of the data: corpus, training and scoring, yardstick, plot, record. A
# stage says what it does and about how long that takes; the first that fails ends the demo.

DEMO_DATA = "data/demo"
DEMO_COMMAND = (
    f"python data/prepare.py --source stdlib --out {DEMO_DATA} --vocab-size 1024 --write-val-text"
)
NUM_DEMO_STAGES = 5
STOP_PATIENCE_S = 60  # a run that is told to stop finishes its step and saves a checkpoint


class StageFailed(RuntimeError):
    """A stage of the demo ended with another exit status than 0."""

    def __init__(self, what: str, status: int):
        super().__init__(f"{what} ended with exit status {status}")
        self.status = status if status > 0 else 128 - status


def announce(number: int, text: str) -> None:
    """The progress line of a stage."""
    print(f"\n[{number}/{NUM_DEMO_STAGES}] {text}", flush=True)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Ask `process` to stop, wait for it, then end all that it started."""
    process.terminate()
    try:
        process.wait(STOP_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        print("still running; ending it now", file=sys.stderr)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left of the group
    process.wait()


def run_command(command: Sequence[str], what: str, env: Mapping[str, str]) -> None:
    """Run a stage as a process of its own, its output passing through; StageFailed if it fails."""
    # A session of its own: Ctrl-C reaches this process alone, which then stops the stage in order.
    process = subprocess.Popen(command, cwd=ROOT, env=dict(env), start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        stop_group(process)
        raise
    if status:
        raise StageFailed(what, status)


def print_summary(folder: Path, elapsed_s: float) -> None:
    """The table at the end of the demo."""
    log = RunLog.read(folder / METRICS)
    end, size, mark = log.need("train_end"), log.need("size"), log.need("yardstick")
    rows = {
        "parameters": f"{log.need('model')['params']:,}",
        "steps": f"{end['steps']:,}",
        "tokens/s": f"{end['tokens_per_s']:,.0f}",
        **{f"bpb, {STAGES[n].replace(chr(10), ' ')}": f"{log.last(n)['val_bpb']:.4f}"
           for n in STAGES if log.last(n)},
        **{f"bpb, {name}": f"{mark[key]:.4f}" for key, name in YARDSTICKS.items()},
        "artifact bytes": f"{size['artifact_bytes']:,}",
        "counted bytes (with code)": f"{size['total_bytes']:,} of {size['budget_bytes']:,}",
    }  # fmt: skip
    files = {"log": LOG, "submission": "submission.json", "plot": "plot.png", "record": "record/"}
    rows |= {name: f"{folder}/{file}" for name, file in files.items()}
    rows["seconds in total"] = f"{elapsed_s:.0f}"
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
    best, bpb = min(mark["xz_bpb"], mark["zstd_bpb"]), log.score["val_bpb"]
    print(f"The model {'beats' if bpb < best else 'does not beat'} both compressors.", flush=True)


def demo_stages(folder: Path, env: Mapping[str, str], cfg: Config) -> None:
    """Corpus, run, yardstick, plot and record of the demo run in `folder`."""
    python, uses_demo = sys.executable, Path(cfg.data_path) == Path(DEMO_DATA)
    if uses_demo:
        announce(1, f"corpus and tokenizer in {DEMO_DATA} (about a minute, the first time only)")
        run_command([python, *shlex.split(DEMO_COMMAND)[1:]], "data/prepare.py", env)
    else:
        announce(1, f"the data set is DATA_PATH={cfg.data_path}")
    most = f"at most {cfg.max_wallclock_seconds:.0f} s" if cfg.max_wallclock_seconds else "no limit"
    announce(2, f"train, write the artifact, read it back, score it; recipe {env['RECIPE']}")
    print(f"      training takes {most}, the rest about half as long", flush=True)
    run_command([python, "train_gpt.py"], "train_gpt.py", env)
    announce(3, "compress the same text by xz and zstd (seconds)")
    mark = yardstick_run(folder)
    print(" ".join(f"{key}:{value}" for key, value in mark.items()))
    announce(4, f"plot {folder}/plot.png (seconds)")
    draw_plot([RunLog.read(folder / METRICS)], folder / "plot.png")
    announce(5, f"record folder {folder}/record (seconds)")
    command = ["build", f"{folder}/record", f"{folder}"]
    if uses_demo:
        command += ["--data-command", DEMO_COMMAND]
    build_record(parse_options(command))


def run_demo() -> None:
    """`make run`: the whole job on the embedded corpus, on the hardware that is there."""
    started_s = time.perf_counter()
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the same orderly end as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    recipe = f"records/demo/{'gpu' if torch.cuda.is_available() else 'cpu'}.env"
    folder = Path("logs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    env = {"RECIPE": recipe, "RUN_DIR": str(folder), **os.environ}
    folder = Path(env["RUN_DIR"])
    cfg = train_gpt.config_from_env(env)
    try:
        demo_stages(folder, env, cfg)
    except KeyboardInterrupt:
        if (folder / "checkpoint").exists():
            print(f"\nTo go on: RECIPE={env['RECIPE']} RUN_DIR={folder} make run", file=sys.stderr)
        raise
    print_summary(folder, time.perf_counter() - started_s)


# --- 9. Command line -----------------------------------------------------------------------------
# Exit status: 0, 1 if a check fails, 2 for unusable input, 130 for Ctrl-C, else the failed stage's.


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is not usable."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="records.py", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plot = commands.add_parser("plot", help="draw RUN_DIR/plot.png from RUN_DIR/metrics.jsonl")
    plot.add_argument("runs", nargs=1, type=Path, metavar="RUN_DIR")
    mark = commands.add_parser("yardstick", help="xz and zstd on the validation text")
    mark.add_argument("path", type=Path, metavar="RUN_DIR_OR_DATA_PATH")
    build = commands.add_parser("build", help="make a record folder from one finished run a seed")
    build.add_argument("out", type=Path, metavar="OUT_DIR")
    build.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    build.add_argument("--author", default="", help="default: SUBMISSION_AUTHOR of the first run")
    build.add_argument("--name", default="", help="default: from OUT_DIR, else the first run's")
    build.add_argument("--date", default="", help="default: from OUT_DIR, else the latest run's")
    build.add_argument("--previous", default="", help="track_<name>/<folder> of the record before")
    build.add_argument("--data-command", default="", help="what makes the data set, for the README")
    check = commands.add_parser("check", help="compute records again from their logs")
    check.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    table = commands.add_parser("table", help="write records/README.md")
    for command in (build, check, table):
        command.add_argument("--records", type=Path, default=ROOT / "records", help="of all tracks")
    commands.add_parser("knobs", help="write the table of knobs in README.md")
    commands.add_parser("demo", help="the whole job on the embedded corpus")
    return parser.parse_args(argv)


def yardstick_command(path: Path) -> None:
    """Print the yardsticks of a run, adding them to its log, or of a data set."""
    if (path / METRICS).is_file():
        event = yardstick_run(path)
    else:
        event = measure_yardsticks(validation_text(replace(Config(), data_path=str(path))))
    print(train_gpt.format_event("yardstick", **event))


def check_command(folders: Sequence[Path], records: Path) -> int:
    """Check each record and say what is wrong; 1 if anything is."""
    failed = 0
    for folder in folders:
        problems = check_recipe(folder) if is_recipe(folder) else check_record(folder, records)
        failed |= bool(problems)
        print(f"{folder}: {'REFUSED' if problems else 'ok'}")
        print("".join(f"  {problem}\n" for problem in problems), end="")
    return failed


def run_options(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit status."""
    match options.command:
        case "plot":
            draw_plot([RunLog.read(options.runs[0] / METRICS)], options.runs[0] / "plot.png")
        case "yardstick":
            yardstick_command(options.path)
        case "build":
            build_record(options)
        case "check":
            return check_command(options.folders, options.records)
        case "table":
            content = format_records(options.records).encode()
            train_gpt.write_atomic(options.records / "README.md", content)
        case "knobs":
            write_knobs(ROOT / "README.md")
        case "demo":
            run_demo()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        return run_options(parse_options(argv))
    except StageFailed as error:
        print(f"records.py: {error}", file=sys.stderr)
        return error.status
    except (InputError, OSError) as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("records.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
