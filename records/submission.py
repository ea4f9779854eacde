"""submission.json as a function of the logs.

What only a person knows (author, date, name, previous record) is passed through. Every other key is
computed, so that `check` can compute it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records.logs import Json, RunLog, run_settings
from records.significance import mean_and_std
from train_gpt import InputError

DESCRIBED = ("author", "date", "name", "previous")
DATED_FOLDER = re.compile(r"(\d{4}-\d{2}-\d{2})_(.+)")


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


def refuse_mixed_runs(logs: Sequence[RunLog]) -> None:
    """InputError unless the runs differ in their seed and in nothing else that is recorded."""
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"two runs have the same seed: {', '.join(seeds)}")
    for log in logs[1:]:
        for what, here, there in (
            ("knobs", run_settings(log), run_settings(logs[0])),
            ("source and versions", shared_versions(log), shared_versions(logs[0])),
            ("hardware", log.need("hardware")["name"], logs[0].need("hardware")["name"]),
        ):
            if here != there:
                raise InputError(
                    f"{log.path.parent} and {logs[0].path.parent} differ in {what}: "
                    f"{here} and {there}; a record takes runs that differ in their seed alone"
                )


def find_previous(previous: str, records: Path) -> Json | None:
    """The submission of the record `previous` (track_<name>/<folder>) under `records`."""
    if not previous:
        return None
    path = records / previous / "submission.json"
    if not path.is_file():
        raise InputError(f"the previous record {previous} has no {path}")
    content: Json = json.loads(path.read_bytes())
    return content
