"""The text files of a record: run.env, README.md and requirements.txt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from records import ROOT
from records.logs import FINAL_SCORES, Json, RunLog, format_knob_value, run_settings
from records.markdown import table_lines
from records.significance import welch_p
from records.submission import seed_result
from train_gpt import Config, InputError

HEADINGS = (
    "Result", "What changed", "What was removed", "What did not help", "Reproduce", "Rules",
    "Limits", "Credits",
)  # fmt: skip
MAX_README_LINES = 120
RULES = """\
- Causal: a prediction reads nothing right of its position (`Attention`; `evaluate` pads only
  right of what is scored).
- Normalised: the probabilities are a softmax over the whole vocabulary (`softcapped_nll`).
- Score before update: a target is scored before anything is learned from it (`evaluate`).
- Single pass: each target is scored exactly once (`plan_windows`, `Scorer`)."""


def knob_docs() -> dict[str, tuple[str, str]]:
    """Return meaning and default of every knob of the script."""
    return {
        f.name.upper(): (f.metadata["doc"], format_knob_value(f.default)) for f in fields(Config)
    }


def format_run_env(setting: Mapping[str, str]) -> str:
    """Return the content of run.env: a comment and a KEY=value line for each knob."""
    docs = knob_docs()
    lines = []
    for name, value in sorted(setting.items()):
        if any(character.isspace() for character in value):
            raise InputError(f"{name}={value!r}: run.env cannot carry a value with a space")
        lines += [f"# {docs[name][0]}" if name in docs else "#", f"{name}={value}"]
    return "\n".join(["# Every knob that differs from its default.", *lines, ""])


def env_lines(text: str) -> set[str]:
    """Return the lines of a run.env without comments and empty lines."""
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def format_result(logs: Sequence[RunLog], submission: Json, previous: Json | None) -> str:
    """Return the Result section of a record's README: a row a seed, statistics, yardsticks."""
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


def format_readme(
    logs: Sequence[RunLog], submission: Json, previous: Json | None, data_command: str
) -> str:
    """Return a record's README: what the logs tell, and headings for what only the author knows."""
    config, setting, docs = logs[0].config, run_settings(logs[0]), knob_docs()
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


def format_requirements(submission: Json) -> str:
    """Return requirements.txt of a record: the pinned packages, and the machine in a comment."""
    versions = ", ".join(f"{name} {version}" for name, version in submission["versions"].items())
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return f"# Run on {submission['hardware']} with {versions}.\n{pinned}"
