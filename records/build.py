"""Makes a record folder from finished runs.

The folder holds all that is needed to check and to repeat the runs. It is built under another name,
checked and renamed, so that a folder that exists is a complete one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import train_gpt
from records import ROOT
from records.check import check_record, packed_size, read_logs
from records.knobs import config_defaults, knob_docs
from records.logs import LOG, METRICS, PACKED, SOURCE, Json, RunLog, run_settings
from records.markdown import replace_marked
from records.pages import (
    format_changes,
    format_commands,
    format_readme,
    format_requirements,
    format_result,
    format_run_env,
)
from records.plots import draw_plot
from records.submission import (
    DATED_FOLDER,
    DESCRIBED,
    OPTIONAL,
    compute_submission,
    find_differences,
    find_overruns,
    find_previous,
    is_one_line,
    read_submission,
    refuse_mixed_runs,
)
from train_gpt import InputError


def read_finished_run(folder: Path) -> tuple[RunLog, Json]:
    """Return a run's log and its own submission.json, which must follow from the log."""
    path = folder / "submission.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: the run did not finish")
    log, own = RunLog.read(folder / METRICS), read_submission(path)
    for name in (LOG, PACKED, SOURCE):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: not the whole folder of a run")
    refuse_mixed_runs([log])
    computed = compute_submission([log], {k: own.get(k, "") for k in (*DESCRIBED, *OPTIONAL)})
    if problems := find_differences(own, computed):
        raise InputError(f"{path} does not follow from its log: {'; '.join(problems)}")
    if problems := find_overruns(own["budget"]):
        raise InputError(f"{folder}: {'; '.join(problems)}")
    return log, own


def refuse_foreign_artifact(folder: Path, log: RunLog) -> None:
    """Raise InputError if the run's score is of an artifact outside its own folder."""
    artifact = log.all("config")[-1]["values"].get("ARTIFACT")
    own = folder / "artifact.bin"
    if artifact and os.path.abspath(artifact) != os.path.abspath(own):
        raise InputError(f"{folder}: the score is of ARTIFACT={artifact}, not of {own}")


def describe_record(out: Path, given: Mapping[str, str], own: Sequence[Json]) -> dict[str, str]:
    """Return what no log has: as `given`, else from the folder's name, else from the runs."""
    dated = DATED_FOLDER.fullmatch(out.name)
    described = {
        "author": given.get("author") or own[0]["author"],
        "github_id": given.get("github_id") or own[0].get("github_id", ""),
        "date": given.get("date") or (dated[1] if dated else max(r["date"] for r in own)),
        "name": given.get("name") or (dated[2] if dated else own[0]["name"]),
        "previous": given.get("previous", ""),
    }
    for key, text in described.items():
        if not is_one_line(text):
            option = key.replace("_", "-")
            raise InputError(
                f"{key} is {text!r}, not one line of printable text of at most 200 characters; "
                f"set --{option}"
            )
    return described


def path_from_root(path: Path) -> str:
    """Return a path as seen from the root of the repository, absolute if it is outside."""
    path = path.absolute()
    text = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    if not text.isprintable():
        raise InputError(f"{ascii(text)} is not printable text: README.md cannot name the folder")
    return text


def write_record(folder: Path, logs: Sequence[RunLog], texts: Mapping[str, str]) -> None:
    """Write the files of a record into the empty folder `folder`."""
    for log in logs:
        shutil.copyfile(log.path, folder / f"metrics_seed{log.seed}.jsonl")
        shutil.copyfile(log.path.parent / LOG, folder / f"train_seed{log.seed}.log")
    for name in (PACKED, SOURCE):
        shutil.copyfile(logs[0].path.parent / name, folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    check_run_env(folder / "run.env", run_settings(logs[0]))
    draw_plot(logs, folder / "plot.png")


def check_run_env(path: Path, settings: Mapping[str, str]) -> None:
    """Raise InputError if the script reads another value from run.env than the run had."""
    if not settings.keys() <= knob_docs().keys():
        return  # knobs of another version of the script, whose parser is not at hand
    read = train_gpt.read_recipe(path)
    for name, value in settings.items():
        if read.get(name) != value:
            raise InputError(
                f"{name}={value!r} cannot be written to run.env: a recipe file reads it as "
                f"{read.get(name)!r}; run again with another value"
            )


def build_record(
    out: Path,
    runs: Sequence[Path],
    *,
    records: Path = ROOT / "records",
    given: Mapping[str, str] | None = None,
    data_command: str = "",
    with_artifacts: bool = False,
) -> None:
    """Make the record folder `out` from finished runs that differ in their seed, and check it.

    `records` is the folder of all tracks. `given` may hold author, date, name, previous record and
    GitHub name. `data_command` is the command that makes the data set; the README shows it.
    `with_artifacts` adds the artifacts, so that `check --rescore` can score them.
    """
    if out.exists():
        raise InputError(f"{out} exists; remove it or name another folder")
    logs, own = zip(*map(read_finished_run, runs), strict=True)
    refuse_mixed_runs(logs)
    for folder, log in zip(runs, logs, strict=True):
        refuse_foreign_artifact(folder, log)
    submission = compute_submission(logs, describe_record(out, given or {}, own))
    previous = find_previous(submission["previous"], records)
    settings = run_settings(logs[0])
    source = (logs[0].path.parent / SOURCE).read_text(encoding="utf-8", errors="replace")
    packed_size(source)  # refuses a file that is not a Python source before anything is written
    texts = {
        "run.env": format_run_env(settings),
        "requirements.txt": format_requirements(submission),
        "submission.json": json.dumps(submission, indent=2) + "\n",
        "README.md": format_readme(
            submission,
            result=format_result(logs, submission, previous),
            changes=format_changes(settings, config_defaults(source)),
            commands=format_commands(logs[0], path_from_root(out), data_command),
        ),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_record(partial, logs, texts)
        if problems := check_record(partial, records, name=out.name).problems:
            raise InputError("the runs make no valid record:\n  " + "\n  ".join(problems))
        if with_artifacts:
            copy_artifacts(partial, logs)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {len(logs)} run(s), val_bpb {submission['val_bpb']}")


def copy_artifacts(folder: Path, logs: Sequence[RunLog]) -> None:
    """Copy the artifact of each run into the record; raise InputError if its size is another."""
    for log in logs:
        artifact, size = log.path.parent / "artifact.bin", log.need("size")["artifact_bytes"]
        if not artifact.is_file() or artifact.stat().st_size != size:
            raise InputError(f"{artifact} is not the artifact of {size:,} bytes that was scored")
        shutil.copyfile(artifact, folder / f"artifact_seed{log.seed}.bin")


def refresh_record(folder: Path, records: Path) -> None:
    """Compute the Result section of a record's README and its plot again from its logs."""
    page = folder / "README.md"
    logs, submission = read_logs(folder), read_submission(folder / "submission.json")
    result = format_result(logs, submission, find_previous(submission["previous"], records))
    text = replace_marked(page.read_text(encoding="utf-8"), "result", result)
    draw_plot(logs, folder / "plot.png")
    train_gpt.write_atomic(page, text.encode())
