"""submission.json as a function of the logs.

What only a person knows (author, date, name, previous record, GitHub name) is passed through. Every
other key is computed, so that `check` can compute it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from records.logs import SHARED_KNOBS, Json, RunLog, run_settings, shorten
from records.significance import mean_and_std
from train_gpt import InputError

DESCRIBED = ("author", "date", "name", "previous")
OPTIONAL = ("github_id",)  # a submission to the challenge needs it, a record here does not
DATED_FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_(.+)")
MAX_TEXT_CHARACTERS = 200

# --- Tracks --------------------------------------------------------------------------------------
# The limits and rules of train_gpt.py once more, because the checker does not rely on the script
# that it checks: a mistake there shows as a difference.


class TrackLimits(NamedTuple):
    """The largest budgets that a track allows."""

    training_s: float
    evaluation_s: float
    total_bytes: int  # of packed code and artifact


TRACK_LIMITS = {
    "track_10min_16mb": TrackLimits(600, 600, 16_000_000),
    "track_h200_10min_16mb": TrackLimits(600, 600, 16_000_000),
    "track_cpu_10min_1mb": TrackLimits(600, 600, 1_000_000),
}


def find_loose_budgets(track: str, budget: Json) -> list[str]:
    """Return the budgets that are looser than the track allows; a budget of 0 is no limit."""
    if not (limits := TRACK_LIMITS.get(track)):
        return []
    pairs = [
        ("training_budget_s", budget["time"]["training_budget_s"], limits.training_s),
        ("evaluation_budget_s", budget["time"]["evaluation_budget_s"], limits.evaluation_s),
        ("budget_bytes", budget["bytes"]["budget_bytes"], limits.total_bytes),
    ]
    return [
        f"{name} {value:,} is looser than the {limit:,} of {track}"
        for name, value, limit in pairs
        if not 0 < value <= limit
    ]


def find_overruns(budget: Json) -> list[str]:
    """Return the budgets that were exceeded; a budget of 0 is no limit."""
    time, sizes = budget["time"], budget["bytes"]
    pairs = [
        ("training_s", time["training_s"], time["training_budget_s"]),
        ("evaluation_s", time["evaluation_s"], time["evaluation_budget_s"]),
        ("total_bytes", sizes["total_bytes_max"], sizes["budget_bytes"]),
    ]
    return [
        f"{name} {used:,} exceeds its budget of {most:,}"
        for name, used, most in pairs
        if most and used > most
    ]


def find_violations(logs: Sequence[RunLog], track: str, budget: Json) -> list[str]:
    """Return why a record is not compliant; empty if it is."""
    reasons = []
    for log in logs:
        if log.score["partial"]:
            reasons.append(f"seed {log.seed}: the score covers only a part of the validation text")
        elif not log.score.get("compliant", True):
            reasons.append(f"seed {log.seed}: the run marks its score as not compliant")
    return [*reasons, *find_overruns(budget), *find_loose_budgets(track, budget)]


# --- Computation ---------------------------------------------------------------------------------


def seed_result(log: RunLog) -> Json:
    """Return the entry of one run under `seeds`."""
    score, end = log.score, log.last("train_end")
    return {
        "val_bpb": score["val_bpb"],
        "val_loss": score["val_loss"],
        "steps": end.get("steps", 0),
        "train_s": end.get("train_s", 0.0),
        "eval_s": log.need("ledger", "evaluation_s")["evaluation_s"],
        "artifact_bytes": log.need("size", "artifact_bytes")["artifact_bytes"],
        # Knobs that the run has changed to stay within EVAL_MAX_SECONDS.
        **({"adjusted": score["adjusted"]} if score.get("adjusted") else {}),
        # Passes that did not fit, and why.
        **({"skipped": skipped} if (skipped := log.last("final").get("notes")) else {}),
    }


def largest(logs: Sequence[RunLog], event: str, key: str) -> Any:
    """Return the largest value over the runs: every run must keep the budget."""
    return max(log.need(event, key)[key] for log in logs)


def largest_groups(logs: Sequence[RunLog]) -> Json:
    """Return the bytes of each part of the artifacts, if all runs have logged them."""
    parts = [log.last("bytes") for log in logs]
    keys = [key for key in parts[0] if key != "event" and all(key in part for part in parts)]
    return {"groups": {key: max(part[key] for part in parts) for key in keys}} if keys else {}


def shared_versions(log: RunLog) -> tuple[Json, str]:
    """Return the versions of a run's libraries, and the SHA-256 of its source."""
    versions = {k: v for k, v in log.need("versions", "source_sha256").items() if k != "event"}
    return versions, versions.pop("source_sha256")


def compute_budget(logs: Sequence[RunLog]) -> Json:
    """Return the seconds and bytes that were used at most, and their budgets."""
    times = ("training_s", "training_budget_s", "evaluation_s", "evaluation_budget_s")
    return {
        "time": {key: largest(logs, "ledger", key) for key in times},
        "bytes": {
            "total_bytes_max": largest(logs, "size", "total_bytes"),
            "budget_bytes": largest(logs, "size", "budget_bytes"),
            **largest_groups(logs),
        },
    }


def compute_submission(logs: Sequence[RunLog], described: Mapping[str, str]) -> Json:
    """Return the content of submission.json for runs that differ only in their seed."""
    seeds = {log.seed: seed_result(log) for log in sorted(logs, key=lambda log: int(log.seed))}
    mean, std = mean_and_std([seed["val_bpb"] for seed in seeds.values()])
    versions, source_sha256 = shared_versions(logs[0])
    track, budget = logs[0].knob("TRACK"), compute_budget(logs)
    return {
        "author": described["author"],
        **{key: described[key] for key in OPTIONAL if described.get(key)},
        "date": described["date"],
        "name": described["name"],
        "track": track,
        "val_bpb": mean,
        "val_bpb_std": std,
        "seeds": seeds,
        "artifact_bytes_max": largest(logs, "size", "artifact_bytes"),
        "code_bytes": largest(logs, "size", "code_bytes"),
        "source_sha256": source_sha256,
        "hardware": logs[0].need("hardware", "name")["name"],
        "versions": versions,
        "previous": described["previous"],
        "compliant": not find_violations(logs, track, budget),
        "budget": budget,
    }


def find_differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Return how `found` differs from `expected`: missing and unknown keys, other values."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        same = type(found) is type(expected) and found == expected
        return [] if same else [f"{where} is {shorten(found)}, the logs give {shorten(expected)}"]
    prefix = f"{where}." if where else ""
    problems = [f"{prefix}{key} is missing" for key in expected if key not in found]
    problems += [f"{prefix}{key} is an unknown key" for key in found if key not in expected]
    for key in expected:
        if key in found:
            problems += find_differences(found[key], expected[key], prefix + key)
    return problems


# --- Runs of one record --------------------------------------------------------------------------


def refuse_mixed_sessions(log: RunLog) -> None:
    """Raise InputError unless training and scoring had one source, machine and data set."""
    for event, keys in (("versions", None), ("hardware", ("name",))):
        stated = [{k: e.get(k) for k in keys or e} for e in log.all(event)]
        if any(one != stated[0] for one in stated):
            raise InputError(
                f"{log.path}: the sessions of the run differ in `{event}`: {stated[0]} and "
                f"{stated[-1]}; a record states one"
            )
    configs = [event["values"] for event in log.all("config")]
    for name in SHARED_KNOBS:
        if len(texts := {str(values.get(name)) for values in configs}) > 1:
            raise InputError(
                f"{log.path}: training and scoring differ in {name}: "
                f"{' and '.join(sorted(texts))}; score again with the knobs of the training"
            )
    if log.config["values"].get("MODE") == "eval":
        raise InputError(f"{log.path} has no training, only a MODE=eval; name the trained folder")


def refuse_mixed_runs(logs: Sequence[RunLog]) -> None:
    """Raise InputError unless the runs differ only in their seed."""
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"two runs have the same seed: {', '.join(seeds)}")
    for log in logs:
        refuse_mixed_sessions(log)
    for log in logs[1:]:
        for what, here, there in (
            ("knobs", run_settings(log), run_settings(logs[0])),
            ("source and versions", shared_versions(log), shared_versions(logs[0])),
            ("hardware", log.need("hardware")["name"], logs[0].need("hardware")["name"]),
        ):
            if here != there:
                raise InputError(
                    f"{log.path.parent} and {logs[0].path.parent} differ in {what}: "
                    f"{here} and {there}; the runs of a record differ only in their seed"
                )


# --- Reading submission.json ---------------------------------------------------------------------

TEXT_KEYS = (*DESCRIBED, "track", "hardware")
NUMBERS: dict[str, Any] = {
    "val_bpb": float, "val_bpb_std": float,
    "budget": {
        "time": {"training_s": float, "evaluation_s": float},
        "bytes": {"total_bytes_max": int},
    },
}  # fmt: skip


def is_one_line(text: Any) -> bool:
    """Return whether a value is text that fits one line of a table: printable, not too long."""
    return isinstance(text, str) and text.isprintable() and len(text) <= MAX_TEXT_CHARACTERS


def find_bad_numbers(content: Any, kinds: Any, where: str = "") -> list[str]:
    """Return what in `content` is not a number where `kinds` has one."""
    if not isinstance(kinds, dict):
        is_number = isinstance(content, int | float) and not isinstance(content, bool)
        good = is_number and -1e18 < content < 1e18 and (kinds is float or content == int(content))
        return [] if good else [f"{where} is {shorten(content)}, not a number"]
    if not isinstance(content, dict):
        return [f"{where or 'the content'} is {shorten(content)}, not an object"]
    prefix = f"{where}." if where else ""
    return [
        problem
        for key, kind in kinds.items()
        for problem in find_bad_numbers(content.get(key), kind, prefix + key)
    ]


def read_submission(path: Path) -> Json:
    """Read a submission.json; raise InputError unless all that tables show has its type."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    problems = find_bad_numbers(content, NUMBERS)
    if isinstance(content, dict):
        problems += [
            f"{key} is {shorten(content.get(key))}, not one line of text"
            for key in (*TEXT_KEYS, *(key for key in OPTIONAL if key in content))
            if not is_one_line(content.get(key))
        ]
        if not isinstance(content.get("compliant"), bool):
            problems.append("compliant is not true or false")
        seeds = content.get("seeds")
        if not (isinstance(seeds, dict) and seeds):
            problems.append("seeds is not an object of runs")
        else:
            for seed in seeds:
                problems += find_bad_numbers(
                    seeds[seed], {"val_bpb": float}, f"seeds.{shorten(seed)}"
                )
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    return dict(content)


def find_previous(previous: str, records: Path) -> Json | None:
    """Return the submission of the record `previous` (track_<name>/<folder>) under `records`."""
    if not previous:
        return None
    parts = Path(previous).parts
    path = records / previous / "submission.json"
    if len(parts) != 2 or ".." in parts or not path.is_file():
        raise InputError(
            f"the previous record {previous!r} has no submission.json under {records}; "
            "name it as track_<name>/<folder>"
        )
    return read_submission(path)
