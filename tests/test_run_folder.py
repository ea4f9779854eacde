"""RUN_DIR belongs to one run: locks, foreign files, what a restart compares, and the rules."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from tests.conftest import TinyData, environment, tiny_config
from tests.processes import (
    SCRIPT,
    Result,
    metrics,
    parse_line,
    python_process,
    run_script,
    start,
    submission,
)
from train_gpt import InputError, format_event, format_line, judge, lock_directory

RUN: dict[str, Any] = {
    "run_dir": "run", "num_layers": 2, "iterations": 3, "warmup_steps": 0, "eval_stride": 0,
    "val_loss_every": 0, "track": "demo", "quantizer": "rtn",
}  # fmt: skip


def run_environment(data: TinyData, **changes: Any) -> dict[str, str]:
    return environment(tiny_config(**{**RUN, "data_path": str(data.folder), **changes}))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder to run in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def trained_folder(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN_DIR after MODE=train."""
    work = tmp_path_factory.mktemp("trained")
    result = run_script(run_environment(data, mode="train"), work)
    assert result.status == 0, result.err
    return work / "run"


@pytest.fixture
def trained(trained_folder: Path, work: Path) -> Path:
    """A copy of trained_folder as work/run."""
    return Path(shutil.copytree(trained_folder, work / "run"))


def assert_refused(result: Result, *texts: str) -> None:
    """Status 2 and one line without a traceback that has all of `texts`."""
    assert result.status == 2, result.out + result.err
    assert result.err.startswith("InputError: ") and len(result.err.splitlines()) == 1, result.err
    for text in texts:
        assert text in result.err


# --- The lock ------------------------------------------------------------------------------------


def try_lock(folder: str) -> str:
    """Lock a folder in another process: the problem, or an empty text."""
    try:
        with lock_directory(Path(folder)):
            return ""
    except InputError as error:
        return str(error)


def lock_elsewhere(folder: Path) -> str:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(try_lock, (str(folder),))


def test_locked_folder_is_refused_with_its_holder_and_free_afterwards(tmp_path: Path):
    folder = tmp_path / "a" / "run"
    with lock_directory(folder):
        (folder / "train.log").write_text("config ")
        problem = lock_elsewhere(folder)
        assert f"in use by process {os.getpid()} on " in problem
        assert re.search(r"since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", problem)
        assert (folder / "run.lock").exists()
    assert [path.name for path in folder.iterdir()] == ["train.log"]
    assert lock_elsewhere(folder) == ""


def test_lock_left_by_a_killed_run_does_not_bind(tmp_path: Path):
    (tmp_path / "run.lock").write_text("process 1 on a host since yesterday\n" * 3)
    with lock_directory(tmp_path):
        text = (tmp_path / "run.lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ") and text.count("\n") == 1


@pytest.mark.parametrize("kept", [".", "a", "a/b"])
def test_refused_run_leaves_no_folder_that_was_not_there(tmp_path: Path, kept: str):
    (tmp_path / kept).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="refused"), lock_directory(tmp_path / "a" / "b" / "c"):
        raise InputError("refused")
    assert sorted(tmp_path.rglob("*")) == before


def test_second_run_in_a_folder_is_refused_and_writes_nothing(data: TinyData, work: Path):
    env = run_environment(data, iterations=10**5, train_log_every=1)
    first = start(env, work)
    first.wait_for_output("step step:2 ")
    assert_refused(run_script(env, work), f"RUN_DIR=run is in use by process {first.pid} on ")
    first.send(signal.SIGTERM)
    assert first.wait().status == 143
    assert len(metrics(work / "run", "config")) == 1
    assert not (work / "run" / "run.lock").exists()


# --- Files of others -----------------------------------------------------------------------------


def write(name: str, content: str) -> Callable[[Path], None]:
    """Write a file into RUN_DIR."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return make


def link(name: str, content: str) -> Callable[[Path], None]:
    """Make a symbolic link in RUN_DIR to a file outside."""

    def make(folder: Path) -> None:
        target = folder.parent / "elsewhere"
        target.write_text(content)
        (folder / name).symlink_to(target)

    return make


FOREIGN: dict[str, Callable[[Path], None]] = {
    "train_gpt.py": write("train_gpt.py", "import torch\n"),
    "train_gpt_source.py": write("train_gpt_source.py", "import base64\n"),
    "submission.json": write("submission.json", '{"author": "B. Golfer", "val_bpb": 1.0}'),
    "train.log": write("train.log", "epoch 1\n"),
    "metrics.jsonl": write("metrics.jsonl", '{"loss": 1}\n'),
    "run.lock": write("run.lock", "mine"),
    "checkpoint/bert-base": write("checkpoint/bert-base/weights", "w"),
    "checkpoint/step_1": write("checkpoint/step_1/weights", "w"),
    "checkpoint": write("checkpoint", "a file"),
    "link train.log": link("train.log", "config "),
    "link metrics.jsonl": link("metrics.jsonl", ""),
    "link run_state.json": link("run_state.json", "{}"),
    "link train_gpt.py": link("train_gpt.py", "# coding:latin-1\nimport bz2,linecache\n"),
    "fifo train.log": lambda folder: os.mkfifo(folder / "train.log"),
    "folder train.log": lambda folder: (folder / "train.log").mkdir(),
}


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


@pytest.mark.parametrize("name", FOREIGN)
def test_folder_with_files_of_others_is_refused(tmp_path: Path, name: str):
    folder = tmp_path / "run"
    folder.mkdir()
    FOREIGN[name](folder)
    before = contents(tmp_path)
    file = name.split()[-1]
    with pytest.raises(InputError, match=re.escape(str(folder / file))), lock_directory(folder):
        train_gpt.check_own_files(folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["train_gpt.py", "checkpoint/bert-base", "link train.log"])
def test_run_in_a_folder_with_files_of_others_writes_nothing(data: TinyData, work: Path, name: str):
    folder = work / "run"
    folder.mkdir()
    FOREIGN[name](folder)
    before = contents(work)
    assert_refused(run_script(run_environment(data), work), f"run/{name.split()[-1]}")
    assert contents(work) == before


def test_files_of_a_run_are_its_own(trained: Path):
    train_gpt.check_own_files(trained)


# --- What a restart compares ---------------------------------------------------------------------


def edit_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change run_state.json."""
    path = folder / "run_state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "score": lambda s: s["scores"].update(final_ttt={"val_bpb": 0.1, "val_loss": 0.1}),
    "negative ledger": lambda s: s["ledger"].update(training=-1.0),
    "nan ledger": lambda s: s["ledger"].update(evaluation=math.nan),
    "infinite ledger": lambda s: s["ledger"].update(other=math.inf),
    "ledger key": lambda s: s["ledger"].pop("other"),
    "steps": lambda s: s["scores"]["train_end"].update(steps=-3),
    "more steps": lambda s: s["scores"]["train_end"].update(steps=10**9),
    "fractional steps": lambda s: s["scores"]["train_end"].update(steps=1.5),
    "seconds": lambda s: s["scores"]["train_end"].update(train_s=1e6),
    "no speed": lambda s: s["scores"]["train_end"].pop("tokens_per_s"),
    "speed": lambda s: s["scores"]["train_end"].update(tokens_per_s="x"),
    "training budget": lambda s: s["config"].update(max_wallclock_seconds=-1.0),
    "no training budget": lambda s: s["config"].pop("max_wallclock_seconds"),
    "no hash": lambda s: s.pop("artifact_sha256"),
    "other hash": lambda s: s.update(artifact_sha256="0" * 64),
    "source": lambda s: s.update(code_sha256="0" * 64),
    "text": lambda s: s["data"].update(val_sha256="0" * 64),
    "types": lambda s: s.update(ledger=[1, 2, 3]),
    "no data": lambda s: s.update(data=None),
}


@pytest.mark.parametrize("mode", ["all", "eval"])
@pytest.mark.parametrize("name", FORGED)
def test_state_that_does_not_fit_is_refused(
    data: TinyData, trained: Path, monkeypatch: pytest.MonkeyPatch, *, name: str, mode: str
):
    edit_state(trained, FORGED[name])
    cfg = tiny_config(**{**RUN, "data_path": str(data.folder), "mode": mode, "run_dir": trained})
    with train_gpt.start_run(cfg, {}) as run, pytest.raises(InputError, match=r"run_state\.json"):
        train_gpt.prepare_directory(run, trained / "artifact.bin")


def test_artifact_of_another_training_is_refused(data: TinyData, trained: Path):
    payload = bytearray((trained / "artifact.bin").read_bytes())
    payload[-1] ^= 1
    (trained / "artifact.bin").write_bytes(payload)
    for mode in ("all", "eval"):
        result = run_script(run_environment(data, mode=mode), trained.parent)
        assert_refused(result, "run/artifact.bin is not the artifact that run/run_state.json")


def prepare(data: TinyData, folder: Path, **changes: Any) -> None:
    """Prepare RUN_DIR for a run, as every mode does first."""
    cfg = tiny_config(**{**RUN, "data_path": str(data.folder), "run_dir": str(folder), **changes})
    with train_gpt.start_run(cfg, {}) as run:
        train_gpt.prepare_directory(run, folder / "artifact.bin")


def test_budget_that_the_script_fills_is_refused_before_anything_is_written(
    data: TinyData, tmp_path: Path
):
    size = len(train_gpt.packed_script())
    with pytest.raises(InputError, match=rf"BYTES={size} must be above the {size} bytes of the "):
        prepare(data, tmp_path / "run", mode="all", artifact_budget_bytes=size)
    assert not contents(tmp_path)
    prepare(data, tmp_path / "run", mode="all", artifact_budget_bytes=size + 1)


def test_artifact_for_a_smaller_budget_is_refused_with_the_remedy(data: TinyData, trained: Path):
    before = [*trained.glob("checkpoint/step_*/*")]
    with pytest.raises(InputError, match=r"artifact\.bin was made for ARTIFACT_BUDGET_BYTES=\d+; "):
        prepare(data, trained, mode="all", artifact_budget_bytes=10**8)
    prepare(data, trained, mode="all", artifact_budget_bytes=10**6)  # its size is checked later
    (trained / "artifact.bin").unlink()
    prepare(data, trained, mode="all", artifact_budget_bytes=10**8)
    assert before and [*trained.glob("checkpoint/step_*/*")] == before


def test_the_training_is_judged_by_the_budget_that_it_had(data: TinyData, trained: Path):
    edit_state(trained, lambda s: s["config"].update(max_wallclock_seconds=4800.0))
    edit_state(trained, lambda s: s["ledger"].update(training=4000.0))
    for budget_s in (600.0, 0.0):
        cfg = tiny_config(**{**RUN, "data_path": str(data.folder), "mode": "eval"})
        cfg = dataclasses.replace(cfg, run_dir=str(trained), max_wallclock_seconds=budget_s)
        with train_gpt.start_run(cfg, {}) as run:
            train_gpt.prepare_directory(run, trained / "artifact.bin")
            sizes = {"total_bytes": 1, "budget_bytes": 1}
            budget = train_gpt.log_budget(run, sizes)
        assert budget["time"]["training_budget_s"] == 4800.0
        assert train_gpt.find_overruns(budget) == []


def test_settings_that_only_limit_memory_may_change_for_a_finished_artifact(
    data: TinyData, trained: Path
):
    prepare(data, trained, mode="all", ttt_batch_size=3, micro_batch_tokens=64)
    with pytest.raises(InputError, match=r"TTT_CHUNK_SIZE=7 .*; MODE=eval scores an artifact"):
        prepare(data, trained, mode="all", ttt_chunk_size=7)


def test_restart_with_another_text_is_refused(data: TinyData, trained: Path):
    other = trained.parent / "data"
    shutil.copytree(data.folder, other)
    shard = next(other.glob("*_val_0*.bin"))
    payload = bytearray(shard.read_bytes())
    payload[-2:] = payload[-4:-2]
    shard.write_bytes(payload)
    before = (trained / "train.log").read_bytes()
    result = run_script(run_environment(data, data_path=str(other)), trained.parent)
    assert_refused(result, "DATA_PATH or TOKENIZER_PATH now holds other data (val_sha256)")
    assert (trained / "train.log").read_bytes() == before


def test_checkpoint_is_not_continued_with_another_script(data: TinyData, trained: Path):
    (trained / "artifact.bin").unlink()
    edit_state(trained, FORGED["source"])
    result = run_script(run_environment(data), trained.parent)
    assert_refused(result, "written by another version of the script")
    result = run_script(run_environment(data, resume=False), trained.parent)
    assert result.status == 0, result.err


def test_an_artifact_over_the_budget_is_made_again_with_fewer_bits(data: TinyData, work: Path):
    size = len(train_gpt.packed_script()) + 100
    env = run_environment(data, artifact_budget_bytes=size)
    result = run_script(env, work)
    artifact = work / "run" / "artifact.bin"
    assert result.status == 1 and "remove run/artifact.bin and start again" in result.err
    old, fewer = artifact.read_bytes(), {"ATTN_BITS": "4", "MLP_BITS": "4", "COMPRESSOR": "zstd"}
    assert_refused(run_script(env | fewer, work), "artifact.bin is from another run: ATTN_BITS=4")
    artifact.unlink()
    larger = {"ARTIFACT_BUDGET_BYTES": "1000000"}
    assert_refused(
        run_script(env | fewer | larger | {"MATRIX_LR": "0.07"}, work),
        "from another run: MATRIX_LR",
    )
    again = run_script(env | fewer | larger, work)
    assert again.status == 0, again.err
    assert len(artifact.read_bytes()) < len(old)
    assert submission(work / "run")["seeds"]["1337"]["steps"] == 3
    assert [e["step"] for e in metrics(work / "run", "resume")] == [3]


def test_own_artifact_is_scored_after_a_restart(data: TinyData, trained: Path):
    result = run_script(run_environment(data), trained.parent)
    assert result.status == 0, result.err
    report = submission(trained)
    assert report["seeds"]["1337"]["steps"] == 3 and report["compliant"] is True


# --- The rules -----------------------------------------------------------------------------------

SCORE = {"val_bpb": 1.0, "partial": False, "compliant": True}


def budget(**changes: float) -> dict[str, Any]:
    """The budget of a submission that keeps the rules of track_10min_16mb, less `changes`."""
    values: dict[str, float] = {
        "training_s": 599.0, "training_budget_s": 600.0, "evaluation_s": 60.0,
        "evaluation_budget_s": 600.0, "total_bytes_max": 15_999_999, "budget_bytes": 16_000_000,
        **changes,
    }  # fmt: skip
    times = {key: value for key, value in values.items() if key.endswith("_s")}
    return {"time": times, "bytes": {k: v for k, v in values.items() if k not in times}}


LOOSE = [
    ({"budget_bytes": 0}, "ARTIFACT_BUDGET_BYTES=0 is looser than the 16,000,000 of"),
    ({"budget_bytes": 10**12}, "ARTIFACT_BUDGET_BYTES=1e+12 is looser"),
    ({"training_budget_s": 0.0}, "MAX_WALLCLOCK_SECONDS=0 is looser than the 600"),
    ({"training_budget_s": 600.5}, "MAX_WALLCLOCK_SECONDS=600.5 is looser"),
    ({"evaluation_budget_s": 0.0}, "EVAL_MAX_SECONDS=0 is looser"),
    ({"evaluation_budget_s": 3600.0}, "EVAL_MAX_SECONDS=3600 is looser"),
]


@pytest.mark.parametrize("changes, reason", LOOSE)
def test_run_looser_than_its_track_is_not_compliant(changes: dict[str, float], reason: str):
    for track in ("track_10min_16mb", "track_h200_10min_16mb"):
        verdict = judge(track, {"final_quantized": SCORE}, budget(**changes))
        assert len(verdict.reasons) == 1 and verdict.reasons[0].startswith(reason)
        assert verdict.reasons[0].endswith(track) and verdict.overruns == []
    for track in ("demo", "track_of_my_own", ""):
        assert judge(track, {"final_quantized": SCORE}, budget(**changes)).reasons == []


def test_small_track_has_a_smaller_budget_of_bytes():
    used = budget(total_bytes_max=999_999)
    assert judge("track_cpu_10min_1mb", {"final_ttt": SCORE}, used).reasons == [
        "ARTIFACT_BUDGET_BYTES=1.6e+07 is looser than the 1,000,000 of track_cpu_10min_1mb"
    ]


EXCEEDED = [
    ({"training_s": 600.1}, "training took 600.1 s of 600.0"),
    ({"evaluation_s": 601.0}, "evaluation took 601.0 s of 600.0"),
    ({"total_bytes_max": 16_000_001}, "code and artifact take 16,000,001 bytes of 16,000,000"),
    ({"training_s": math.nan}, "training took nan s of 600.0"),
    ({"evaluation_s": -1.0}, "evaluation took -1.0 s of 600.0"),
]


@pytest.mark.parametrize("changes, problem", EXCEEDED)
def test_exceeded_budget_fails_the_run_on_any_track(changes: dict[str, float], problem: str):
    for track in ("track_10min_16mb", "demo"):
        verdict = judge(track, {"final_quantized": SCORE}, budget(**changes))
        assert verdict.overruns == [problem] and problem in verdict.reasons


@pytest.mark.parametrize(
    "names, final",
    [
        (["final_quantized"], "final_quantized"),
        (["final_quantized", "final_sliding"], "final_sliding"),
        (["final_prequant", "final_quantized", "final_ttt", "final_sliding"], "final_ttt"),
    ],
)
def test_last_pass_over_the_artifact_is_the_result(names: list[str], final: str):
    verdict = judge("demo", dict.fromkeys(names, SCORE), budget())
    assert (verdict.final, verdict.reasons) == (final, [])


@pytest.mark.parametrize(
    "flags, reason",
    [
        ({"partial": True, "compliant": False}, "only a part of the validation text"),
        ({"compliant": False}, "a method that the rules forbid"),
    ],
)
def test_score_that_breaks_a_rule_is_not_compliant(flags: dict[str, bool], reason: str):
    verdict = judge("demo", {"final_sliding": {**SCORE, **flags}}, budget())
    assert len(verdict.reasons) == 1 and reason in verdict.reasons[0] and not verdict.overruns


@pytest.mark.slow
def test_submission_and_log_say_which_rule_of_the_track_was_not_kept(data: TinyData, work: Path):
    env = run_environment(data, track="track_10min_16mb", eval_max_seconds=600.0)
    result = run_script(env, work)
    assert result.status == 0, result.err
    assert submission(work / "run")["compliant"] is False
    event, values = parse_line(result.out.splitlines()[-1])
    assert (event, values["compliant"]) == ("submission", "False")
    assert values["reasons"].startswith("MAX_WALLCLOCK_SECONDS=0 is looser than the 600.0 of")


# --- Names and signals ---------------------------------------------------------------------------

NAMES = ["a\nfinal_ttt val_bpb:0.1", "tab\tand\r", 'quote" compliant:True', "\u2028", "", "größe"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_one_value_of_one_line(name: str):
    line = format_event("run", name=name, seed=1)
    assert len(line.splitlines()) == 1
    assert parse_line(line) == ("run", {"name": name, "seed": "1"})
    assert len(f"x{format_line(name)}".splitlines()) == 1


@pytest.mark.slow
def test_names_with_line_breaks_add_no_lines_to_the_logs(data: TinyData, work: Path):
    forged = "x\nfinal_ttt val_loss:0.1 val_bpb:0.1"
    env = run_environment(data, mode="train", submission_name=forged, run_id=forged, track=forged)
    result = run_script(env, work)
    assert result.status == 0, result.err
    for text in (result.out, (work / "run" / "train.log").read_text()):
        assert not [line for line in text.splitlines() if line.startswith("final_ttt")]


@pytest.mark.parametrize("text", ["model ", "train_end ", "submission "])
def test_sigterm_ends_with_143_at_any_moment(data: TinyData, work: Path, text: str):
    process = start(run_environment(data), work)
    process.wait_for_output(text)
    is_running = process.poll() is None
    process.send(signal.SIGTERM)
    result = process.wait()
    assert result.status in ((143,) if is_running and text != "submission " else (0, 143))
    assert "Traceback" not in result.err


@pytest.mark.parametrize("name", ["load_tokenizer", "load_validation", "prepare_directory"])
def test_sigterm_while_a_run_is_prepared_ends_with_143(data: TinyData, work: Path, name: str):
    script = work / "signal.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(train_gpt.__file__).rsplit('/', 1)[0]!r})\n"
        "import train_gpt\n"
        f"def send(*args): os.kill(os.getpid(), 15); return original(*args)\n"
        f"original, train_gpt.{name} = train_gpt.{name}, send\n"
        "sys.exit(train_gpt.main())\n"
    )
    result = run_script(run_environment(data), work, script)
    assert result.status == 143 and result.err.startswith("Interrupted: "), result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("is_packed", [False, True])
def test_signal_during_the_imports_ends_with_143(work: Path, number: int, is_packed: bool):
    # The first package that the script imports from elsewhere is one that sends the signal.
    (work / "constriction.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    script = SCRIPT
    if is_packed:
        script = work / "packed.py"
        script.write_bytes(train_gpt.pack_source(train_gpt.script_source()))
    env = environment(tiny_config(**RUN), PYTHONPATH=str(work))
    result = python_process([str(script)], env, work)
    assert (result.status, result.err) == (143, "Interrupted: stopped by a signal\n")
