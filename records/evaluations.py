"""What each way of evaluating is worth: artifacts times settings, scored, tabulated and drawn.

    python records/evaluations.py run PLAN.toml --jobs 2    # what PLAN.jsonl does not have yet
    python records/evaluations.py table PLAN.toml           # write PLAN.md and PLAN.png from it

A plan names artifacts by model (one a seed), settings of all evaluations, and methods:

    settings = "DATA_PATH=data/x VAL_TOKENS_LIMIT=65536"
    data = "python data/prepare.py --input x.jsonl --out data/x"   # named in the table, never run
    train = "RECIPE=... SEED=... MODE=train python train_gpt.py"   # likewise
    [models]
    small = ["logs/small_1/artifact.bin", "logs/small_2/artifact.bin"]
    [methods]
    lora = "TTT_METHOD=lora"

Every evaluation is a process of its own and, when it has ended, a line of PLAN.jsonl. Besides the
methods, the plain windows and the sliding window of each artifact are in the table.

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
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# As a script, its own folder is first on the path and would hide the package `records`.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "records")]

from matplotlib import pyplot as plt  # noqa: E402  (the path above makes the imports possible)

from records.logs import Json  # noqa: E402
from records.markdown import table_lines  # noqa: E402
from records.plots import SEED_COLORS, STYLE  # noqa: E402
from records.results import append_result, parse_settings, read_results  # noqa: E402
from records.significance import mean_and_std, paired_p  # noqa: E402
from train_gpt import InputError  # noqa: E402

# --- 1. Plan -------------------------------------------------------------------------------------
# Which evaluations there are, as data. A line of results is known by all that it was set to.


@dataclass(frozen=True)
class Evaluation:
    """One artifact, scored with one method's settings."""

    model: str
    artifact: str
    method: str
    settings: dict[str, str]

    @property
    def key(self) -> str:
        parts = [self.model, self.artifact, self.method, sorted(self.settings.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_plan(path: Path) -> tuple[dict[str, Any], list[Evaluation]]:
    """The plan's content, and its evaluations in the order in which they run."""
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
        common, models, methods = plan["settings"], plan["models"], plan["methods"]
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"{path} is not a plan of evaluations: {error!r}") from error
    evaluations = [
        Evaluation(
            model,
            artifact,
            method,
            {**parse_settings(common, "settings"), **parse_settings(changes, f"methods.{method}")},
        )
        for seed in range(max(map(len, models.values())))  # a seed of every model first
        for model, artifacts in models.items()
        for artifact in artifacts[seed : seed + 1]
        for method, changes in methods.items()
    ]
    return plan, evaluations


# --- 2. Running ----------------------------------------------------------------------------------
# MODE=eval in a folder of its own, from which only the scores are kept.


def evaluate(evaluation: Evaluation, script: Path) -> Json:
    """Run one evaluation; its scores, or what it said when it failed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RECIPE", "RUN_DIR")}
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
        )
        result: Json = {
            "key": evaluation.key,
            **{name: getattr(evaluation, name) for name in ("model", "artifact", "method")},
            "settings": evaluation.settings,
            "elapsed_s": round(time.perf_counter() - started_s, 1),
            "status": done.returncode,
        }
        metrics = run_dir / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        for event in map(json.loads, lines):
            if event["event"].startswith("final_"):
                result[event["event"]] = {k: event[k] for k in ("val_bpb", "eval_s", "compliant")}
                result |= {"tokens": event["tokens"], "bytes": event["bytes"]}
            if event["event"] in ("versions", "hardware"):
                result |= {k: v for k, v in event.items() if k != "event"}
    return result if done.returncode == 0 else {**result, "error": done.stderr[-500:]}


def run(plan_path: Path, jobs: int, hours: float, script: Path) -> int:
    """Run what is missing, `jobs` side by side, until `hours` are over; 1 if any failed."""
    _, evaluations = read_plan(plan_path)
    results_path, deadline_s = plan_path.with_suffix(".jsonl"), time.perf_counter() + 3600 * hours
    done = read_results(results_path)
    missing = [e for e in evaluations if done.get(e.key, {"status": 1})["status"] != 0]

    def one(evaluation: Evaluation) -> Json | None:
        return evaluate(evaluation, script) if time.perf_counter() < deadline_s else None

    failed = 0
    with ThreadPoolExecutor(jobs) as executor:
        for result in executor.map(one, missing):
            if result is None:
                continue
            failed |= result["status"] != 0
            append_result(results_path, result)
            score = result.get("final_ttt") or result.get("final_sliding") or result.get("error")
            print(result["model"], result["artifact"], result["method"], score, flush=True)
    return failed


# --- 3. Table ------------------------------------------------------------------------------------
# Differences are paired by artifact: the same model scored in two ways.

Scores = dict[str, list[tuple[float, float]]]  # method: bpb and seconds of each artifact


def scores_by_method(results: Sequence[Json], artifacts: Sequence[str]) -> Scores:
    """Scores of one model by method, for the artifacts in order; a method that lacks one is out."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for result in results:
        events = {"plain": "final_quantized", "sliding": "final_sliding"}
        for method, event in {**events, result["method"]: "final_ttt"}.items():
            if event in result:
                pair = result[event]["val_bpb"], result[event]["eval_s"]
                found.setdefault(method, {})[result["artifact"]] = pair
    return {
        method: [scores[artifact] for artifact in artifacts]
        for method, scores in found.items()
        if set(artifacts) <= scores.keys()
    }


def method_rows(scores: Scores, methods: dict[str, str]) -> list[list[str]]:
    """A row a method, the lowest bpb first."""
    rows = []
    for method, pairs in sorted(scores.items(), key=lambda item: mean_and_std(
        [bpb for bpb, _ in item[1]]
    )[0]):  # fmt: skip
        bpb, seconds = ([pair[i] for pair in pairs] for i in (0, 1))
        gains = [base - own for (base, _), own in zip(scores["sliding"], bpb, strict=True)]
        mean, std = mean_and_std(bpb)
        p = paired_p(gains)
        rows.append(
            [
                method,
                f"{mean:.4f}",
                f"{std:.4f}" if len(bpb) > 1 else "-",
                f"{-statistics.fmean(gains):+.4f}",
                "-" if p is None else f"{p:.4f}",
                f"{statistics.fmean(seconds):.0f}",
                methods.get(method, ""),
            ]
        )
    return rows


def write_table(plan_path: Path) -> None:
    """PLAN.md and PLAN.png from the results."""
    plan, evaluations = read_plan(plan_path)
    done = read_results(plan_path.with_suffix(".jsonl"))
    results = [done[e.key] for e in evaluations if done.get(e.key, {"status": 1})["status"] == 0]
    if not results:
        raise InputError(f"{plan_path.with_suffix('.jsonl')} holds no result of this plan")
    name = plan_path.as_posix()
    lines = [
        "# Evaluation",
        "",
        f"Made by `python records/evaluations.py table {name}`: do not edit.",
        "",
        "Bits per byte of the same artifacts, scored in different ways: mean and standard",
        "deviation over the seeds; difference to the sliding window, and p that the gain is by",
        "chance (one-sided, paired by artifact). Seconds are the pass's own, on a machine that ran",
        "several at once: they say which is dearer, not more.",
        "",
        f"- {len(results)} of {len(evaluations)} evaluations are done.",
        f"- Runs: `python records/evaluations.py run {name}`; all: `{plan['settings']}`.",
        f"- Data: `{plan.get('data', '')}`.",
        f"- Models: `{plan.get('train', '')}`",
        f"- Scored: {results[-1]['tokens']:,} targets, {results[-1]['bytes']:,} bytes.",
        f"- Hardware: {results[-1].get('name', '')}; torch {results[-1].get('torch', '')}.",
        f"- Script: SHA-256 {', '.join(sorted({r['source_sha256'][:12] for r in results}))}.",
    ]
    header = ["method", "bpb", "std", "to sliding", "p", "seconds", "settings"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2))
        for color, (model, artifacts) in zip(SEED_COLORS, plan["models"].items(), strict=False):
            own = [r for r in results if r["model"] == model]
            have = [a for a in artifacts if any(r["artifact"] == a for r in own)]
            scores = scores_by_method(own, have)
            lines += ["", f"## {model} (seeds: {len(have)})", ""]
            lines += table_lines(header, method_rows(scores, plan["methods"]))
            draw(axes, scores, color, model)
        axes.set_xlabel("seconds of the pass")
        axes.set_ylabel("bits per byte")
        axes.set_xscale("log")
        axes.legend()
        figure.tight_layout()
        figure.savefig(plan_path.with_suffix(".png"), dpi=150)
        plt.close(figure)
    plan_path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- 4. Plot -------------------------------------------------------------------------------------
# Bits per byte against seconds, a point a method.


def draw(axes: Any, scores: Scores, color: str, model: str) -> None:
    """The methods of one model as named points."""
    for i, (method, pairs) in enumerate(scores.items()):
        x, y = (statistics.fmean(pair[j] for pair in pairs) for j in (1, 0))
        axes.scatter(x, y, color=color, s=24, label=None if i else model)
        axes.annotate(method, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)


# --- 5. Command line -----------------------------------------------------------------------------
# Exit status: 0, or 1 if an evaluation failed, or 2 on bad input.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or tabulate a plan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "table"):
        own = commands.add_parser(command)
        own.add_argument("plan", type=Path, metavar="PLAN.toml")
        if command == "run":
            own.add_argument("--jobs", type=int, default=2, help="evaluations side by side")
            own.add_argument("--hours", type=float, default=24.0, help="start none after that")
            own.add_argument("--script", type=Path, default=ROOT / "train_gpt.py")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return run(options.plan, options.jobs, options.hours, options.script)
        write_table(options.plan)
    except InputError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
