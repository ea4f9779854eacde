"""Verification of record and recipe folders.

A record says nothing that its logs do not: submission.json and the Result table are computed again,
log and metrics must tell the same, and the source must be the one that every log names.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_gpt
from records.logs import FINAL_SCORES, Json, RunLog, run_settings
from records.markdown import replace_marked
from records.pages import HEADINGS, MAX_README_LINES, env_lines, format_result
from records.submission import (
    DATED_FOLDER,
    DESCRIBED,
    compute_submission,
    find_differences,
    find_overruns,
    find_previous,
    refuse_mixed_runs,
    shared_versions,
)
from train_gpt import InputError

RECORD_FILES = (
    "submission.json", "README.md", "run.env", "train_gpt.py", "requirements.txt", "plot.png",
)  # fmt: skip
RECIPE_HEADINGS = (
    "What the source claims", "What its logs show", "What this recipe does", "Legality",
    "Parameters", "Commands", "Missing",
)  # fmt: skip
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
    setting = env_lines((folder / "run.env").read_text(encoding="utf-8"))
    for log in logs:
        if shared_versions(log)[1] != digest:
            problems.append(f"train_gpt.py is not the source of {log.path.name}")
        if {f"{name}={value}" for name, value in run_settings(log).items()} != setting:
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
