"""Verification of record and recipe folders.

A record says nothing that its logs do not: submission.json and the Result table are computed again,
log and metrics must agree line by line, and the source must be the one that every log contains. The
logs themselves must not contradict each other (consistency.py). What cannot be proven from the
files of a record is listed in NOT_PROVEN.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt
from records.consistency import find_contradictions
from records.knobs import config_defaults
from records.logs import FINAL_SCORES, PACKED, SOURCE, Json, RunLog, run_settings, source_file
from records.markdown import replace_marked
from records.pages import HEADINGS, MAX_README_LINES, env_lines, format_result
from records.submission import (
    DATED_FOLDER,
    DESCRIBED,
    OPTIONAL,
    TRACK_LIMITS,
    compute_submission,
    find_differences,
    find_overruns,
    find_previous,
    read_submission,
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
# Another version of the packer may have packed a record's source: the size differs by so much.
PROVEN = (
    "computed again from the logs: bits per byte, statistics, budgets, flags, digests, tables; "
    "consistent: losses, sizes, seconds, rates, text log and metrics"
)
NOT_PROVEN = (
    "not proven: that the artifact has these scores and bytes (--rescore scores it again); "
    "seconds, steps, versions and hardware (as logged); plot.png (not compared)"
)

# --- The text log --------------------------------------------------------------------------------

TOKEN = re.compile(r'(\w+):("(?:[^"\\]|\\.)*"|\S*)')
CONFIG_LINE = re.compile(r"config ([ *]) (\w+):(.*)")
SOURCE_BLOCK = re.compile(r"^={30} source ={30}\n(.*?)\n={68}$", re.DOTALL | re.MULTILINE)

Line = tuple[str, ...]


def normalize(value: Any) -> str:
    """Return a logged value as text that is equal for a float and for what a log shows of it."""
    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    try:
        return text if text.lstrip("-").isdigit() else f"{float(text):.6g}"
    except ValueError:
        return text


def unquote(text: str) -> str:
    """Return a value of train.log without the quotes that one with spaces has."""
    try:
        return str(json.loads(text)) if text[:1] == '"' else text
    except ValueError:
        return text


def normalize_line(line: str) -> Line:
    """Return a line of train.log in the form of normalize_event.

    The line of a pass says `legal` where its event says `compliant`.
    """
    name, _, rest = line.partition(" ")
    pairs = [(key, unquote(value)) for key, value in TOKEN.findall(rest)]
    if name.startswith("final_"):
        pairs = [("compliant" if key == "legal" else key, value) for key, value in pairs]
    return (name, *sorted(f"{key}:{normalize(value)}" for key, value in pairs))


def normalize_event(event: Json) -> Line:
    """Return an event of metrics.jsonl as a tuple of its name and its sorted values."""
    pairs = [f"{key}:{normalize(value)}" for key, value in event.items() if key != "event"]
    return (event["event"], *sorted(pairs))


def config_lines(event: Json) -> set[str]:
    """Return the lines of train.log that a `config` event has."""
    changed = {*event["changed"]}
    return {
        f"config {' *'[name in changed]} {name}:{value}" for name, value in event["values"].items()
    }


def check_text_log(path: Path, log: RunLog, source: str) -> list[str]:
    """Return where a train.log and the metrics of the run differ.

    Every event of the metrics must be in the text log, and every final score of the text log in the
    metrics. The text log must contain the source and the configuration of each session.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    sources = {found.rstrip("\n") for found in SOURCE_BLOCK.findall(text)}
    rest = SOURCE_BLOCK.sub("", text).split("\n")
    expected = {normalize_event(e) for e in log.all_events if e["event"] != "config"}
    names = {event[0] for event in expected}
    logged = {normalize_line(line) for line in rest if line.partition(" ")[0] in names}
    finals = {line for line in logged if line[0] in FINAL_SCORES}
    problems = [
        f"{where} has nothing like `{' '.join(line)}`"
        for where, lines in ((path.name, expected - logged), (log.path.name, finals - expected))
        for line in sorted(lines)
    ]
    if source.rstrip("\n") not in sources:
        problems.append(f"{path.name} does not contain the source")
    for event in log.all("config"):
        for line in sorted(config_lines(event) - {*rest})[:3]:
            problems.append(f"{path.name} has no line `{line}`")
    return problems


# --- The source ----------------------------------------------------------------------------------


def check_sources(folder: Path, logs: Sequence[RunLog], submission: Json) -> list[str]:
    """Return problems: the readable script or run.env differ from those of a run."""
    path = source_file(folder)
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    problems = []
    if digest != submission["source_sha256"]:
        problems.append(f"{path.name} is not the source that submission.json names")
    settings = env_lines((folder / "run.env").read_text(encoding="utf-8"))
    source = raw.decode("utf-8", errors="replace")
    for log in logs:
        if shared_versions(log)[1] != digest:
            problems.append(f"{path.name} is not the source of {log.path.name}")
        if {f"{name}={value}" for name, value in run_settings(log).items()} != settings:
            problems.append(f"run.env is not the setting of {log.path.name}")
        problems += check_text_log(folder / f"train_seed{log.seed}.log", log, source)
        problems += check_changed_knobs(log, source)
    return problems


def check_changed_knobs(log: RunLog, source: str) -> list[str]:
    """Return the knobs whose mark as changed does not fit the defaults in the source."""
    try:
        defaults = config_defaults(source)
    except (ValueError, SyntaxError, RecursionError) as error:
        return [f"the source cannot be parsed: {error}"]
    values, problems = log.config["values"], []
    for name in sorted(defaults.keys() & values.keys()):
        is_default = type(values[name])(defaults[name]) == values[name]
        if is_default == (name in log.config["changed"]):
            word = "" if is_default else "not "
            problems.append(f"{log.path.name}: {name}={values[name]} is {word}the default")
    return problems


def packed_size(source: str) -> int:
    """Return the bytes of the packed script; raise InputError if it is not a Python source."""
    try:
        return len(train_gpt.pack_source(source))
    except Exception as error:  # whatever tokenize and ast raise for text that is not Python
        raise InputError(f"the source cannot be packed: {error}") from error


def packer_of(source: str) -> str:
    """Return the code of the functions that pack this source, empty if it has none."""
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = [name for name in ("pack_source",) if name in functions]
    for name in names:  # grows by the functions that these use
        used = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        names += sorted(used & functions.keys() - {*names})
    return "".join(ast.dump(functions[name]) for name in names)


def check_code_size(source: str, code_bytes: int) -> tuple[list[str], list[str]]:
    """Return problems and notes on the size of the packed source.

    A record is packed by its own script. If that packs as the current one does, sizes must agree;
    an older packer is not run here, so that only the order of magnitude is checked.
    """
    size = packed_size(source)
    if size == code_bytes:
        return [], []
    text = f"code_bytes is {code_bytes:,}, the source packs into {size:,} bytes"
    is_same_packer = packer_of(source) == packer_of(train_gpt.script_source())
    if is_same_packer or not size / 2 < code_bytes < 2 * size:
        return [text], []
    return [], [f"not proven: {text} with this version of the packer"]


def check_packed_script(folder: Path, source: str, code_bytes: int) -> tuple[list[str], list[str]]:
    """Return problems and notes: is train_gpt.py what submission.json counts, and this source?

    A record of an older version of this tool has the readable script alone.
    """
    path = folder / PACKED
    if source_file(folder) == path:
        return [], []
    packed, problems = path.read_bytes(), list[str]()
    if len(packed) != code_bytes:
        problems.append(f"{path.name} has {len(packed):,} bytes, submission.json {code_bytes:,}")
    if packed == train_gpt.pack_source(source):
        return problems, []
    text = f"{path.name} is {SOURCE}, packed"
    if packer_of(source) == packer_of(train_gpt.script_source()):
        return [*problems, f"not true: {text}"], []
    return problems, [f"not proven: {text}; --rescore lets it pack itself"]


# --- Pages and descriptions ----------------------------------------------------------------------


def check_page(text: str, headings: Sequence[str]) -> list[str]:
    """Return problems: a README lacks the fixed headings or has too many lines."""
    problems = []
    found = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    if found != [*headings]:
        problems.append(f"README.md has the headings {found}, the fixed ones are {[*headings]}")
    if text.count("\n") > MAX_README_LINES:
        problems.append(f"README.md has more than {MAX_README_LINES} lines")
    return problems


def check_readme(text: str, result: str) -> list[str]:
    """Return problems: a record's README lacks its form or the computed result."""
    problems = check_page(text, HEADINGS)
    try:
        if replace_marked(text, "result", result) != text:
            problems.append("README.md has another Result than the logs give")
    except InputError as error:
        problems.append(f"README.md: {error}")
    return problems


def check_description(folder: Path, name: str, submission: Json) -> list[str]:
    """Return problems: date, name or track do not fit their form or the folder."""
    problems = []
    try:
        datetime.date.fromisoformat(submission["date"])
    except ValueError:
        problems.append(f"date is {submission['date']!r}, not YYYY-MM-DD")
    if (dated := DATED_FOLDER.fullmatch(name)) and dated.groups() != (
        submission["date"],
        submission["name"],
    ):
        problems.append(f"the folder {ascii(name)} is not named after date and name")
    if (track := folder.parent.name).startswith("track_") and track != submission["track"]:
        problems.append(f"track is {submission['track']!r}, the folder stands in {track}")
    return problems


# --- Records -------------------------------------------------------------------------------------


def missing_files(folder: Path) -> list[str]:
    """Return the files that a record lacks."""
    paths = sorted(folder.glob("metrics_seed*.jsonl"))
    needed = [*RECORD_FILES, *(f"train_{p.stem.removeprefix('metrics_')}.log" for p in paths)]
    needed += [] if paths else ["metrics_seed*.jsonl"]
    needed += [SOURCE] if os.path.lexists(folder / SOURCE) else []
    return [f"{ascii(file)[1:-1]} is missing" for file in needed if not (folder / file).is_file()]


def read_logs(folder: Path) -> list[RunLog]:
    """Return the logs of a record; raise InputError if a file is not named after its seed."""
    logs = [RunLog.read(path) for path in sorted(folder.glob("metrics_seed*.jsonl"))]
    for log in logs:
        if log.path.name != (name := f"metrics_seed{log.seed}.jsonl"):
            raise InputError(f"{log.path} is the log of a run that belongs to {name}")
    return logs


class Findings(NamedTuple):
    """What is wrong with a record, and what could not be proven."""

    problems: list[str]
    notes: list[str]


def check_record(folder: Path, records: Path, name: str = "") -> Findings:
    """Check the record in `folder`.

    `records` is the folder of all tracks; `name` is the name that the folder will get.
    """
    if problems := missing_files(folder):
        return Findings(problems, [])
    try:
        submission, logs = read_submission(folder / "submission.json"), read_logs(folder)
        refuse_mixed_runs(logs)
        described = {key: submission.get(key, "") for key in (*DESCRIBED, *OPTIONAL)}
        computed = compute_submission(logs, described)
        if problems := find_differences(submission, computed):
            return Findings(problems, [])
        result = format_result(logs, computed, find_previous(computed["previous"], records))
        source = source_file(folder).read_text(encoding="utf-8")
        page = (folder / "README.md").read_text(encoding="utf-8")
        problems, notes = check_code_size(source, submission["code_bytes"])
        more = check_packed_script(folder, source, submission["code_bytes"])
        problems, notes = problems + more[0], notes + more[1]
        problems += find_overruns(submission["budget"])
        problems += check_description(folder, name or folder.name, submission)
        problems += [problem for log in logs for problem in find_contradictions(log)]
        problems += check_sources(folder, logs, submission)
    except (InputError, UnicodeDecodeError) as error:
        return Findings([f"unusable: {error}"], [])
    problems += check_readme(page, result)
    if submission["track"] not in TRACK_LIMITS:
        notes.append(f"not proven: budgets, since no limits of {submission['track']} are known")
    return Findings(problems, notes)


# --- Recipes -------------------------------------------------------------------------------------


def is_recipe(folder: Path) -> bool:
    """Return whether `folder` is a recipe: settings without anything that a run leaves."""
    left = [*folder.glob("submission.json"), *folder.glob("metrics_seed*.jsonl")]
    return (folder / "run.env").is_file() and not left and not folder.name.startswith(".")


def stated_parameters(text: str) -> str:
    """Return the number of parameters that a recipe's README states in bold, or an empty string."""
    found = re.search(r"^\*\*([\d,]+) parameters\*\*", text, flags=re.MULTILINE)
    return found[1] if found else ""


def check_recipe(folder: Path) -> list[str]:
    """Return everything that is wrong with the recipe in `folder`."""
    path = folder / "run.env"
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        cfg = train_gpt.config_from_env({"RECIPE": str(path), "MODE": "describe"})
        described = train_gpt.describe(cfg)
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        return [f"unusable: {error}"]
    same = sorted(train_gpt.read_recipe(path).keys() - set(train_gpt.changed_knobs(cfg)))
    problems = [f"run.env sets {name} to its default" for name in same]
    problems += check_page(text, RECIPE_HEADINGS)
    if not (found := re.search(r"params:(\d+)", described)):
        return [*problems, "MODE=describe says no number of parameters"]
    if (stated := stated_parameters(text)) != (num_params := f"{int(found[1]):,}"):
        problems.append(f"README.md states {stated or 'no'} parameters, the model has {num_params}")
    return problems
