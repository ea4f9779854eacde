"""Compares evaluation settings: scores trained artifacts with each of them, tabulates and draws.

    python records/evaluations.py run PLAN.toml --jobs 2    # run what PLAN.jsonl does not have yet
    python records/evaluations.py table PLAN.toml           # write PLAN.md and PLAN.png from it

A plan names the artifacts of each model (one per seed), settings of all evaluations, and methods:

    settings = "DATA_PATH=data/x VAL_TOKENS_LIMIT=65536"
    data = "python data/prepare.py --input x.jsonl --out data/x"   # shown in the table, never run
    train = "RECIPE=... SEED=... MODE=train python train_gpt.py"   # the same
    base = "lora"       # what the others are compared with; without this line, the sliding window
    [models]
    small = ["logs/small_1/artifact.bin", "logs/small_2/artifact.bin"]
    [methods]
    lora = "TTT_METHOD=lora"

Every evaluation is a process of its own; its result is a line of PLAN.jsonl. The table also has the
scores of disjoint windows and of the sliding window, which every evaluation computes first, unless
EVAL_STRIDE=0 leaves the latter out.

Sections: 1. Plan  2. Running  3. Table  4. Plot  5. Command line
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# As a script, its own folder is first on the path and would hide the package `records`.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "records")]

from matplotlib import pyplot as plt  # noqa: E402  (the path above makes the imports possible)
from matplotlib.axes import Axes  # noqa: E402

import train_gpt  # noqa: E402
from records.logs import METRICS, Json, RunLog  # noqa: E402
from records.markdown import table_lines  # noqa: E402
from records.plots import (  # noqa: E402
    FAINT,
    INK,
    LABEL_BOX,
    PALETTE,
    STYLE,
    display_name,
    make_room_for_labels,
    save_figure,
)
from records.results import append_result, parse_settings, read_results  # noqa: E402
from records.significance import mean_and_std, paired_p  # noqa: E402
from train_gpt import InputError  # noqa: E402

# --- 1. Plan -------------------------------------------------------------------------------------
# A line of results is found again by the hash of all settings of its evaluation.


@dataclass(frozen=True)
class Evaluation:
    """One artifact, scored with the settings of one method."""

    model: str
    artifact: str
    method: str
    settings: dict[str, str]

    @property
    def key(self) -> str:
        """What identifies the evaluation in the results."""
        parts = [self.model, self.artifact, self.method, sorted(self.settings.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


SLIDING = "sliding"  # the name of the sliding window among the methods


class Plan(NamedTuple):
    """The content of a plan file."""

    path: Path
    settings: str
    data: str
    train: str
    base: str  # the method that the others are compared with
    models: dict[str, list[str]]  # artifacts of each model
    methods: dict[str, str]  # settings of each method

    @property
    def results(self) -> Path:
        """The file of results."""
        return self.path.with_suffix(".jsonl")


def read_plan(path: Path) -> Plan:
    """Read a plan; raise InputError if it is not one."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a plan of evaluations: {error}") from error
    texts = {key: table.get(key, "") for key in ("settings", "data", "train")}
    texts["base"] = table.get("base", SLIDING)
    models, methods = table.get("models"), table.get("methods")
    problems = [f"{key} is not text" for key, text in texts.items() if not isinstance(text, str)]
    if not (isinstance(models, dict) and models and all(map(is_list_of_text, models.values()))):
        problems.append("[models] must have lists of artifacts")
    if not (isinstance(methods, dict) and is_list_of_text([*methods.values()])):
        problems.append("[methods] must have settings as text")
    elif texts["base"] not in (SLIDING, *methods):
        problems.append(f"base is {texts['base']!r}, which is not in [methods]")
    if problems:
        raise InputError(f"{path} is not a plan of evaluations: {'; '.join(problems)}")
    return Plan(path, **texts, models=table["models"], methods=table["methods"])


def is_list_of_text(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


def list_evaluations(plan: Plan) -> list[Evaluation]:
    """Return the evaluations in the order in which they run: a seed of every model first."""
    common = parse_settings(plan.settings, "settings")
    return [
        Evaluation(
            model, artifact, method, {**common, **parse_settings(changes, f"methods.{method}")}
        )
        for seed in range(max(map(len, plan.models.values())))
        for model, artifacts in plan.models.items()
        for artifact in artifacts[seed : seed + 1]
        for method, changes in plan.methods.items()
    ]


# --- 2. Running ----------------------------------------------------------------------------------
# MODE=eval in a temporary folder, of which only the scores are kept.

MAX_ERROR_CHARACTERS = 500


def read_scores(folder: Path) -> Json:
    """Return scores, text and origin of a finished evaluation from its metrics."""
    log, found = RunLog.read(folder / METRICS), Json()
    for event in log.events:
        if event["event"].startswith("final_"):
            found[event["event"]] = {k: event.get(k) for k in ("val_bpb", "eval_s", "compliant")}
            found |= {"tokens": event["tokens"], "bytes": event["bytes"]}
        if event["event"] in ("versions", "hardware"):
            found |= {k: v for k, v in event.items() if k != "event"}
    return found


def evaluate(evaluation: Evaluation, script: Path) -> Json:
    """Run one evaluation; return its scores, or its last output if it failed."""
    knobs = {"RECIPE", *(field.name.upper() for field in fields(train_gpt.Config))}
    environment = {name: value for name, value in os.environ.items() if name not in knobs}
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        own = {"MODE": "eval", "ARTIFACT": evaluation.artifact, "RUN_DIR": str(run_dir)}
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**environment, **evaluation.settings, **own},
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
        )
        result: Json = {
            "key": evaluation.key,
            **{name: getattr(evaluation, name) for name in ("model", "artifact", "method")},
            "settings": evaluation.settings,
            "elapsed_s": round(time.perf_counter() - started_s, 1),
            "status": done.returncode,
        }
        if done.returncode == 0:
            return {**result, **read_scores(run_dir)}
    return {**result, "error": done.stderr[-MAX_ERROR_CHARACTERS:]}


def finished(results: Mapping[str, Json], evaluations: Sequence[Evaluation]) -> list[Json]:
    """Return the results of the evaluations that did not fail, in their order."""
    return [results[e.key] for e in evaluations if results.get(e.key, {}).get("status") == 0]


def run(plan: Plan, jobs: int, hours: float, script: Path) -> int:
    """Run what is missing, `jobs` side by side, and start none after `hours`; 1 if any failed."""
    evaluations, deadline_s = list_evaluations(plan), time.perf_counter() + 3600 * hours
    done = {result["key"] for result in finished(read_results(plan.results), evaluations)}
    missing = [evaluation for evaluation in evaluations if evaluation.key not in done]

    def run_one(evaluation: Evaluation) -> Json | None:
        return evaluate(evaluation, script) if time.perf_counter() < deadline_s else None

    failed = 0
    with ThreadPoolExecutor(jobs) as executor:
        futures = [executor.submit(run_one, evaluation) for evaluation in missing]
        try:
            for result in filter(None, (future.result() for future in as_completed(futures))):
                append_result(plan.results, result)
                failed |= result["status"] != 0
                score = result.get("final_ttt") or result.get("final_sliding")
                shown = score or result.get("error")
                print(result["model"], result["artifact"], result["method"], shown, flush=True)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
    return failed


# --- 3. Table ------------------------------------------------------------------------------------
# Differences are paired by artifact: the same model scored in two ways.

Scores = dict[str, list[tuple[float, float]]]  # method: bpb and seconds of each artifact
EXPLANATION = """\
Bits per byte of the same artifacts, scored in different ways: mean and standard deviation over the
seeds; difference to {base}; p-value {test} t test, paired by artifact). The seconds are those of
the pass, on a machine that ran several at once: they order the methods by cost and say no more."""


def scores_by_method(results: Sequence[Json], artifacts: Sequence[str]) -> Scores:
    """Return the scores of one model by method, without methods that lack an artifact."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for result in results:
        events = {"disjoint": "final_quantized", SLIDING: "final_sliding"}
        for method, event in {**events, result["method"]: "final_ttt"}.items():
            if event in result:
                pair = result[event]["val_bpb"], result[event]["eval_s"]
                found.setdefault(method, {})[result["artifact"]] = pair
    return {
        method: [scores[artifact] for artifact in artifacts]
        for method, scores in found.items()
        if set(artifacts) <= scores.keys()
    }


def mean_bpb(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.fmean(bpb for bpb, _ in pairs)


def by_score(scores: Scores) -> list[str]:
    """Return the methods, the lowest bpb first."""
    return sorted(scores, key=lambda method: mean_bpb(scores[method]))


def method_rows(scores: Scores, plan: Plan) -> list[list[str]]:
    """Return a row per method, the lowest bpb first."""
    rows = []
    for method in by_score(scores):
        bpb, seconds = ([pair[i] for pair in scores[method]] for i in (0, 1))
        mean, std = mean_and_std(bpb)
        row = [method, f"{mean:.4f}", f"{std:.4f}" if len(bpb) > 1 else "-", "-", "-"]
        if plan.base in scores and method != plan.base:
            gains = [base - own for (base, _), own in zip(scores[plan.base], bpb, strict=True)]
            p = paired_p(gains)
            if p is not None and plan.base != SLIDING:
                p = 2 * min(p, 1 - p)
            row[3:] = [f"{-statistics.fmean(gains):+.4f}", "-" if p is None else f"{p:.4f}"]
        rows.append([*row, f"{statistics.fmean(seconds):.0f}", plan.methods.get(method, "")])
    return rows


def format_head(plan: Plan, results: Sequence[Json], num_evaluations: int) -> list[str]:
    """Return what stands above the tables: what was measured, with which commands and versions."""
    name, last = plan.path.as_posix(), results[-1]
    sources = sorted({str(r.get("source_sha256", ""))[:12] for r in results})
    base, test = f"`{plan.base}`", "of the difference (two-sided"
    if plan.base == SLIDING:
        base, test = "the sliding window", "of the gain (one-sided"
    return [
        "# Evaluation",
        "",
        f"Generated by `python records/evaluations.py table {name}`; do not edit.",
        "",
        *textwrap.wrap(EXPLANATION.format(base=base, test=test), 100),
        "",
        f"- {len(results)} of {num_evaluations} evaluations are done.",
        f"- Runs: `python records/evaluations.py run {name}`; settings of all: `{plan.settings}`.",
        f"- Data: `{plan.data}`.",
        f"- Models: `{plan.train}`",
        f"- Scored: {last['tokens']:,} targets, {last['bytes']:,} bytes.",
        f"- Hardware: {last.get('name', '')}; torch {last.get('torch', '')}.",
        f"- Script: SHA-256 {', '.join(sources)}.",
    ]


def write_table(plan: Plan) -> None:
    """Write PLAN.md and PLAN.png from the results."""
    evaluations = list_evaluations(plan)
    results = finished(read_results(plan.results), evaluations)
    if not results:
        raise InputError(f"{plan.results} holds no result of this plan")
    lines, panels = format_head(plan, results, len(evaluations)), []
    try:
        for model, artifacts in plan.models.items():
            own = [r for r in results if r["model"] == model]
            have = [a for a in artifacts if any(r["artifact"] == a for r in own)]
            scores = scores_by_method(own, have)
            panels.append(Panel(model, scores, plan.base))
            lines += ["", f"## {model} (seeds: {len(have)})", ""]
            header = ["method", "bpb", "std", f"to {plan.base}", "p", "seconds", "settings"]
            lines += table_lines(header, method_rows(scores, plan))
    except (KeyError, TypeError) as error:
        raise InputError(f"{plan.results} has a result of wrong types: {error!r}") from error
    train_gpt.write_atomic(plan.path.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    draw_evaluations(panels, plan.path.with_suffix(".png"))


# --- 4. Plot -------------------------------------------------------------------------------------
# One panel per model, one row per method in the order of the scores; the seconds stand right of the
# name.

ROW_INCHES, MARGIN_INCHES, PANEL_INCHES = 0.24, 1.0, 5.2


class Panel(NamedTuple):
    """The scores of one model."""

    model: str
    scores: Scores
    base: str


def draw_panel(axes: Axes, panel: Panel, color: str) -> None:
    """Draw the methods of one model: mean as a dot with its value, artifacts as small dots."""
    methods = by_score(panel.scores)
    for place, method in enumerate(methods):
        bpb = [score for score, _ in panel.scores[method]]
        mean = statistics.fmean(bpb)
        if len(bpb) > 1:
            axes.plot(bpb, [place] * len(bpb), "o", color=FAINT, ms=3, alpha=0.7, zorder=3)
        axes.plot(mean, place, "o", color=color, ms=6, mec="white", zorder=4)
        axes.annotate(
            f"{mean:.4f}", (max(bpb), place), xytext=(7, 0), textcoords="offset points",
            va="center", color=INK, fontsize=8, bbox=LABEL_BOX,
        )  # fmt: skip
    if panel.base in panel.scores:
        axes.axvline(
            mean_bpb(panel.scores[panel.base]), color=FAINT, lw=1, ls=(0, (4, 3)), zorder=1
        )
    seconds = [statistics.fmean(s for _, s in panel.scores[method]) for method in methods]
    labels = [f"{display_name(m)}  ({s:,.0f} s)" for m, s in zip(methods, seconds, strict=True)]
    axes.set_yticks(range(len(methods)), labels)
    axes.set_ylim(max(len(methods), 1) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    make_room_for_labels(axes, [bpb for scores in panel.scores.values() for bpb, _ in scores])
    axes.set_title(display_name(panel.model))
    base = "sliding window" if panel.base == SLIDING else display_name(panel.base)
    axes.set_xlabel(f"bits per byte (dashed: {base})")


def draw_evaluations(panels: Sequence[Panel], path: Path) -> None:
    """Draw all models into the PNG file `path`, atomically."""
    rows = max(len(panel.scores) for panel in panels)
    size = (PANEL_INCHES * len(panels) + 0.6, max(2.5, MARGIN_INCHES + ROW_INCHES * rows))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=size, squeeze=False, layout="constrained"
        )
        for place, (panel, one) in enumerate(zip(panels, axes[0], strict=True)):
            draw_panel(one, panel, PALETTE[place % len(PALETTE)])
        save_figure(figure, path)


# --- 5. Command line -----------------------------------------------------------------------------
# Exit status: 0; 1 if an evaluation failed; 2 for unusable input; 130 for Ctrl-C.


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and a message if it is not usable."""
    parser = argparse.ArgumentParser(
        prog="evaluations.py", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    running = commands.add_parser("run", help="run what the results do not have yet")
    running.add_argument("--jobs", type=int, default=2, help="evaluations side by side (default 2)")
    running.add_argument("--hours", type=float, default=24.0, help="start none after that (24)")
    running.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="what to run")
    table = commands.add_parser("table", help="write PLAN.md and PLAN.png from the results")
    for command in (running, table):
        command.add_argument("plan", type=Path, metavar="PLAN.toml")
    options = parser.parse_args(argv)
    if options.command == "run" and options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parse_options(argv)
    try:
        plan = read_plan(options.plan)
        if options.command == "run":
            return run(plan, options.jobs, options.hours, options.script)
        write_table(plan)
    except (InputError, OSError) as error:
        print(f"evaluations.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluations.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
