"""Scores the artifacts of a record again, with the record's own script, and compares.

This runs the record's readable script: use it on records whose source you have read, or in a
sandbox. The script packs itself; the result must be the record's packed train_gpt.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from records import ROOT
from records.check import Findings, read_logs
from records.logs import FINAL_SCORES, METRICS, PACKED, RunLog, run_settings, source_file
from train_gpt import InputError

DEFAULT_TOLERANCE_BPB = 0.001  # other hardware and precision add up in another order
MAX_ERROR_CHARACTERS = 500


class Inputs(NamedTuple):
    """What is needed to score one run of a record again."""

    artifact: Path
    data_path: Path


def find_inputs(folder: Path, log: RunLog, data_path: Path | None) -> Inputs:
    """Return artifact and data set of a run; raise InputError if one of them is not there.

    The artifact is artifact_seed<seed>.bin in the record, else that of the run's own folder.
    """
    run_dir = log.last("run").get("run_dir") or log.config["values"].get("RUN_DIR") or ""
    own, kept = ROOT / str(run_dir) / "artifact.bin", folder / f"artifact_seed{log.seed}.bin"
    artifact = kept if kept.is_file() else own
    data = data_path or ROOT / str(log.knob("DATA_PATH"))
    if not artifact.is_file():
        raise InputError(f"seed {log.seed}: neither {kept} nor {own} is there")
    if not data.is_dir():
        raise InputError(f"seed {log.seed}: the data set {data} is not there; set --data-path")
    size = log.need("size", "artifact_bytes")["artifact_bytes"]
    if artifact.stat().st_size != size:
        raise InputError(f"{artifact} has {artifact.stat().st_size:,} bytes, the record's {size:,}")
    return Inputs(artifact.absolute(), data.absolute())


def adjusted_knobs(log: RunLog) -> list[tuple[dict[str, str], tuple[str, ...]]]:
    """Return the runs that score a record again: their knobs, and the scores to take from each.

    The knobs are those that the run changed to fit its evaluation budget. EVAL_STRIDE is the one
    that two passes read; where each changed it in its own way, each is scored by a run of its own.
    """
    knobs = dict[str, dict[str, str]]()
    for name in FINAL_SCORES:
        text = log.last(name).get("adjusted", "")
        notes = [note.split() for note in text.split(", ")] if text else []
        knobs[name] = {note[0].upper(): note[-1] for note in notes}  # of "eval_stride 64 -> 128"
    *windows, last = FINAL_SCORES
    strides = {knobs[name].get("EVAL_STRIDE", "") for name in (windows[-1], last)}
    passes = [log.last(name) for name in (windows[-1], last)]
    if len(strides) == 1 or not all(passes) or log.knob("TTT_METHOD") == "lora":
        return [({k: v for own in knobs.values() for k, v in own.items()}, FINAL_SCORES)]
    return [(knobs[windows[-1]], tuple(windows)), (knobs[last], (last,))]


def score_again(folder: Path, log: RunLog, inputs: Inputs, adjusted: Mapping[str, str]) -> RunLog:
    """Run the record's script in MODE=eval; return its log, or raise InputError if it fails."""
    knobs = {*log.config["values"], "RECIPE"}
    environment = {name: value for name, value in os.environ.items() if name not in knobs}
    own = {
        "MODE": "eval",
        "ARTIFACT": str(inputs.artifact),
        "DATA_PATH": str(inputs.data_path),
        "SEED": log.seed,
        "EVAL_MAX_SECONDS": "0",  # a slower machine must not learn less
        **adjusted,
    }
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        done = subprocess.run(
            [sys.executable, str(source_file(folder).absolute())],
            env={**environment, **run_settings(log), **own, "RUN_DIR": str(run_dir)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            said = done.stdout.decode("utf-8", errors="replace")[-MAX_ERROR_CHARACTERS:].strip()
            raise InputError(f"seed {log.seed}: the script ended with {done.returncode}: {said}")
        packed, kept = ((place / PACKED).read_bytes() for place in (run_dir, folder))
        if source_file(folder) != folder / PACKED and packed != kept:
            raise InputError(f"{folder / PACKED} is not what its source packs itself into")
        return RunLog.read(run_dir / METRICS)


def compare_scores(
    log: RunLog, again: RunLog, tolerance_bpb: float, names: Sequence[str] = FINAL_SCORES
) -> Findings:
    """Return where the scores `names` or sizes differ, and a line for each score."""
    problems, notes = list[str](), list[str]()
    for name in names:
        logged, new = log.last(name), again.last(name)
        if not logged:
            if new:  # the run had no time for it
                notes.append(f"seed {log.seed}: {name} is not in the log, scored {new['val_bpb']}")
            continue
        if not new:
            problems.append(f"seed {log.seed}: {name} was not scored again")
            continue
        change = new["val_bpb"] - logged["val_bpb"]
        text = (
            f"seed {log.seed}: {name} {logged['val_bpb']}, scored again {new['val_bpb']} "
            f"({change:+.6f})"
        )
        is_same_text = all(logged[key] == new[key] for key in ("tokens", "bytes"))
        # Where the run left out training for want of time, it may learn more now.
        least = -math.inf if logged.get("untrained") else -tolerance_bpb
        within = least <= change <= tolerance_bpb
        (notes if is_same_text and within else problems).append(text)
        if not is_same_text:
            problems.append(f"seed {log.seed}: {name} was scored on another text")
    sizes = [run.need("size")["code_bytes"] for run in (log, again)]
    if sizes[0] != sizes[1]:
        problems.append(f"code_bytes is {sizes[0]:,}, the script packs itself into {sizes[1]:,}")
    return Findings(problems, notes)


def rescore_record(folder: Path, data_path: Path | None, tolerance_bpb: float) -> Findings:
    """Score every artifact of the record again; what cannot be scored is a problem."""
    verdict = Findings([], [])
    for log in read_logs(folder):
        try:
            inputs = find_inputs(folder, log, data_path)
            for adjusted, names in adjusted_knobs(log):
                again = score_again(folder, log, inputs, adjusted)
                found = compare_scores(log, again, tolerance_bpb, names)
                verdict.problems.extend(found.problems)
                verdict.notes.extend(found.notes)
        except InputError as error:
            verdict.problems.append(f"not scored again: {error}")
    return verdict
