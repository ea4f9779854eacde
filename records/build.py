"""Makes a record folder from finished runs.

The folder holds all that is needed to check and to repeat the runs. It is built under another name
and renamed, so that a folder that exists is a whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from records import ROOT
from records.check import check_record
from records.logs import LOG, METRICS, SOURCE, Json, RunLog, run_settings
from records.pages import format_readme, format_requirements, format_run_env
from records.plots import draw_plot
from records.submission import (
    DATED_FOLDER,
    DESCRIBED,
    compute_submission,
    find_differences,
    find_overruns,
    find_previous,
    refuse_mixed_runs,
)
from train_gpt import InputError


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


def describe_record(out: Path, given: Mapping[str, str], own: Sequence[Json]) -> dict[str, str]:
    """Return what no log has: as `given`, else from the folder's name, else from the runs."""
    dated = DATED_FOLDER.fullmatch(out.name)
    return {
        "author": given.get("author") or own[0]["author"],
        "date": given.get("date") or (dated[1] if dated else max(r["date"] for r in own)),
        "name": given.get("name") or (dated[2] if dated else own[0]["name"]),
        "previous": given.get("previous", ""),
    }


def write_record(folder: Path, logs: Sequence[RunLog], texts: Mapping[str, str]) -> None:
    """Write the files of a record into the empty folder `folder`."""
    for log in logs:
        shutil.copyfile(log.path, folder / f"metrics_seed{log.seed}.jsonl")
        shutil.copyfile(log.path.parent / LOG, folder / f"train_seed{log.seed}.log")
    shutil.copyfile(logs[0].path.parent / SOURCE, folder / "train_gpt.py")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    draw_plot(logs, folder / "plot.png")


def build_record(
    out: Path,
    runs: Sequence[Path],
    *,
    records: Path = ROOT / "records",
    given: Mapping[str, str] | None = None,
    data_command: str = "",
) -> None:
    """Make the record folder `out` from finished runs that differ in their seed, and check it.

    `records` is the folder of all tracks. `given` may hold author, date, name and previous record.
    `data_command` is the command that makes the data set; the README shows it.
    """
    if out.exists():
        raise InputError(f"{out} exists; remove it or name another folder")
    logs, own = zip(*map(read_finished_run, runs), strict=True)
    refuse_mixed_runs(logs)
    submission = compute_submission(logs, describe_record(out, given or {}, own))
    previous = find_previous(submission["previous"], records)
    texts = {
        "run.env": format_run_env(run_settings(logs[0])),
        "submission.json": json.dumps(submission, indent=2) + "\n",
        "requirements.txt": format_requirements(submission),
        "README.md": format_readme(logs, submission, previous, data_command),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_record(partial, logs, texts)
        if problems := check_record(partial, records, name=out.name):
            raise InputError("the runs make no valid record:\n  " + "\n  ".join(problems))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {len(logs)} run(s), val_bpb {submission['val_bpb']}")
