"""The text files of a record: run.env, README.md and requirements.txt."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import train_gpt
from records import ROOT
from records.compressors import list_yardsticks
from records.knobs import format_knob_value, knob_docs
from records.logs import FINAL_SCORES, SOURCE, Json, RunLog
from records.markdown import table_lines
from records.significance import welch_p
from records.submission import find_violations, seed_result
from train_gpt import InputError

HEADINGS = (
    "Result", "What changed", "What was removed", "What did not help", "Reproduce", "Rules",
    "Limits", "Credits",
)  # fmt: skip
MAX_README_LINES = 120
RULES = f"""\
- Causal: a prediction reads only the tokens before it (`{train_gpt.CausalSelfAttention.__name__}`).
- Normalized: the probabilities of the whole vocabulary sum to 1
  (`{train_gpt.softcapped_cross_entropy.__name__}`, `{train_gpt.Mixer.__name__}`).
- Score before update: a target is scored before the model learns from it
  (`{train_gpt.rule_violations.__name__}`, `{train_gpt.Scorer.__name__}`).
- Single pass: every target is scored exactly once (`{train_gpt.plan_windows.__name__}`,
  `{train_gpt.Scorer.__name__}`)."""

# --- run.env -------------------------------------------------------------------------------------


def format_run_env(settings: Mapping[str, str]) -> str:
    """Return the content of run.env: a comment and a KEY=value line for each knob."""
    docs = knob_docs()
    lines = []
    for name, value in sorted(settings.items()):
        if not value.isprintable() or value != value.strip():
            raise InputError(
                f"{name}={value!r}: run.env takes one line of printable text without spaces at its "
                "ends; run again with such a value"
            )
        lines += [f"# {docs[name][0]}" if name in docs else "#", f"{name}={value}"]
    return "\n".join(["# Every knob that differs from its default.", *lines, ""])


def env_lines(text: str) -> set[str]:
    """Return the lines of a run.env without comments and empty lines."""
    return {line for line in text.splitlines() if line and not line.startswith("#")}


# --- README.md -----------------------------------------------------------------------------------


def format_score(logs: Sequence[RunLog], submission: Json) -> str:
    """Return the line with the mean score; one seed has no standard deviation."""
    if len(logs) == 1:
        return f"- Validation bpb: {submission['val_bpb']:.5f} (one seed)."
    return (
        f"- Validation bpb: mean {submission['val_bpb']:.5f}, standard deviation "
        f"{submission['val_bpb_std']:.5f}, n = {len(logs)}."
    )


def format_comparison(submission: Json, previous: Json) -> str:
    """Return the line that compares the score with that of the previous record."""
    sides = [[s["val_bpb"] for s in x["seeds"].values()] for x in (submission, previous)]
    change = submission["val_bpb"] - previous["val_bpb"]
    if (p := welch_p(*sides)) is not None:
        test = f"one-sided Welch test: p = {p:.2g}"
    else:
        test = "no test: it needs two seeds of each" if min(map(len, sides)) < 2 else "no test"
    return (
        f"- Previous record: {previous['val_bpb']:.5f} ({submission['previous']}), now "
        f"{abs(change):.5f} {'lower' if change < 0 else 'higher'}; {test}."
    )


def format_result(logs: Sequence[RunLog], submission: Json, previous: Json | None) -> str:
    """Return the Result section of a record's README: a row per seed, statistics, baselines."""
    names = ("final_prequant", *FINAL_SCORES)
    rows = []
    for log in sorted(logs, key=lambda log: int(log.seed)):
        seed, end = seed_result(log), log.last("train_end")
        scores = [log.last(name).get("val_bpb") for name in names]
        shown = ["-" if score is None else f"{score:.5f}" for score in scores]
        step_ms = f"{end['step_avg_ms']:.1f}" if "step_avg_ms" in end else "-"
        cells = [log.seed, f"{seed['steps']:,}", step_ms, *shown, f"{seed['artifact_bytes']:,}"]
        rows.append([*cells, f"{seed['train_s']:.1f}", f"{seed['eval_s']:.1f}"])
    header = ["seed", "steps", "step ms", "raw bpb", "quantized bpb", "sliding bpb", "TTT bpb"]
    size = submission["budget"]["bytes"]
    lines = [
        *table_lines([*header, "artifact bytes", "train s", "eval s"], rows),
        "",
        format_score(logs, submission),
        f"- Counted bytes (code and artifact): at most {size['total_bytes_max']:,} of "
        f"{size['budget_bytes']:,}.",
    ]
    reasons = find_violations(logs, submission["track"], submission["budget"])
    lines += [f"- **Not compliant**: {reason}." for reason in reasons]
    lines += [
        f"- **Adjusted** to the evaluation budget: seed {seed}: {result['adjusted']}."
        for seed, result in submission["seeds"].items()
        if "adjusted" in result
    ]
    lines += [
        f"- Seed {seed}: {result['skipped']}."
        for seed, result in submission["seeds"].items()
        if "skipped" in result
    ]
    lines += [format_comparison(submission, previous)] if previous else []
    return "\n".join([*lines, *format_yardsticks(logs)])


def format_yardsticks(logs: Sequence[RunLog]) -> list[str]:
    """Return the lines of the general compressors, if a run has measured them on its own text."""
    for log in logs:
        mark = log.last("yardstick")
        if mark and mark.get("text_bytes") == log.score["bytes"]:
            named = ", ".join(f"{name} {bpb:.4f}" for name, bpb in list_yardsticks(mark))
            lines = [f"- Compressors on the same {mark['text_bytes']:,} bytes, in bpb: {named}."]
            if "prime_bytes" in mark:
                lines.append(
                    f"- Primed: after {mark['prime_bytes']:,} bytes of training text; compressed, "
                    "they take the bytes of the artifact."
                )
            return lines
    return []


def format_changes(settings: Mapping[str, str], defaults: Mapping[str, Any]) -> str:
    """Return the table of the knobs that differ from the defaults of the script that ran."""
    if not settings:
        return "Nothing: the defaults of `train_gpt.py`."
    known = {name: format_knob_value(value) for name, value in defaults.items()}
    rows = [
        [f"`{name}`", known.get(name, "?") or "empty", value, "not measured", "-"]
        for name, value in sorted(settings.items())
    ]
    table = table_lines(["knob", "from", "to", "effect", "source"], rows)
    return "\n".join(["Against the defaults of `train_gpt.py`:", "", *table])


def format_commands(log: RunLog, place: str, data_command: str) -> str:
    """Return the commands that repeat a run with the record's own script.

    `place` is the folder of the record as seen from the root of the repository.
    """
    ranks, folder = log.need("run", "ranks")["ranks"], shlex.quote(place)
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    data = data_command or f"# the data set of DATA_PATH={log.knob('DATA_PATH')}"
    return "\n".join(
        [
            "From the root of the repository:",
            "",
            "```bash",
            f"pip install -r {folder}/requirements.txt",
            data,
            f"RECIPE={folder}/run.env SEED={log.seed} {launch} {folder}/{SOURCE}",
            "```",
        ]
    )


def format_readme(submission: Json, *, result: str, changes: str, commands: str) -> str:
    """Return a record's README: what the logs tell, and headings for what only the author knows."""
    plot = "![Loss and bits per byte](plot.png)"
    bodies = {
        "Result": f"<!-- result -->\n{result}\n<!-- /result -->\n\n{plot}",
        "What changed": changes,
        "What was removed": "Nothing.",
        "What did not help": "Not recorded.",
        "Reproduce": commands,
        "Rules": RULES,
        "Limits": f"Run on {submission['hardware']}.",
        "Credits": f"{submission['author'] or 'Not named'}.",
    }
    sections = [f"## {heading}\n\n{bodies[heading]}\n" for heading in HEADINGS]
    return "\n".join([f"# {submission['name']}\n", *sections])


def format_requirements(submission: Json) -> str:
    """Return requirements.txt of a record: the pinned packages, and the machine in a comment."""
    versions = ", ".join(f"{name} {version}" for name, version in submission["versions"].items())
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return f"# Run on {submission['hardware']} with {versions}.\n{pinned}"
