"""Several processes: equal to one within rounding, replicas equal to the bit, no rank left behind.

Two ranks add the gradients of their halves of a batch, one process adds all rows in one go: float32
sums in another order differ in their last bits, and Adam's first steps, lr * sign(gradient), turn a
rounding of a gradient near zero into a whole step of that weight. So one process and two are
compared within a tolerance, and replicas of one run to the bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch

import train_gpt
from tests.conftest import MakeRun, TinyData, environment, tiny_config, write_raw_shard
from tests.processes import (
    SCRIPT,
    Result,
    log_events,
    losses,
    metrics,
    run_ranks,
    run_script,
    start,
    start_ranks,
    submission,
    wait_for_ranks,
    wait_until,
)

RUN: dict[str, Any] = {
    "run_dir": "run", "num_layers": 2, "iterations": 6, "train_log_every": 1, "val_loss_every": 4,
    "warmup_steps": 1, "eval_stride": 16, "averaging": "ema", "ema_decay": 0.5,
}  # fmt: skip
TORCHRUN_TIMEOUT_S = 120.0  # three interpreters that import torch, on a busy machine

# Runs the script; each rank leaves the state of its training beside the run. HOOK: `nan` spoils the
# loss of the last rank at step 3, `slow` makes the steps of rank 1 longer, `signal` lets the rank
# hear one when it begins to validate.
WORKER = f"""
import os, sys, time
import safetensors.torch
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt

rank, world_size = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
hook = os.environ.pop("HOOK", "")
train, step, loss = train_gpt.train, train_gpt.Trainer.step, train_gpt.GPT.loss
evaluate = train_gpt.evaluate

def train_and_keep(run, *args):
    trainer = train(run, *args)
    safetensors.torch.save_file(trainer.tensors(), f"rank_{{rank}}.safetensors")
    return trainer

def slow_step(self, window):
    time.sleep(0.03)
    return step(self, window)

def bad_loss(self, *args, **options):
    bad_loss.calls += 1
    return loss(self, *args, **options) * (float("nan") if bad_loss.calls == 3 else 1)

def hear_and_evaluate(run, *args):
    run.signal_received = True
    return evaluate(run, *args)

train_gpt.train, bad_loss.calls = train_and_keep, 0
if hook == "signal":
    train_gpt.evaluate = hear_and_evaluate
if rank == 1 and hook == "slow":
    train_gpt.Trainer.step = slow_step
if rank == world_size - 1 and hook == "nan":
    train_gpt.GPT.loss = bad_loss
sys.exit(train_gpt.main())
"""

DIE = """
def die(step):
    if bad_loss.calls == step:
        os.kill(os.getpid(), 9)
    return 1

"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder to run in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of WORKER."""
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return path


def run_environment(data: TinyData, **changes: Any) -> dict[str, str]:
    return environment(tiny_config(**{**RUN, "data_path": str(data.folder), **changes}))


# --- torchrun ------------------------------------------------------------------------------------


class Torchrun:
    """`torchrun --standalone --nproc_per_node=2 SCRIPT` in a session of its own."""

    def __init__(self, script: Path, env: dict[str, str], work: Path):
        self.out = work.parent / "torchrun_out"
        self.err = work.parent / "torchrun_err"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, "--nproc_per_node=2", str(script)],
                env=env,
                cwd=work,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_for_output(self, text: str) -> None:
        def printed() -> bool:
            return text in self.out.read_text() or self.process.poll() is not None

        wait_until(printed, TORCHRUN_TIMEOUT_S, f"torchrun has not printed {text!r}")

    def wait(self) -> Result:
        status = self.process.wait(TORCHRUN_TIMEOUT_S)
        return Result(status, self.out.read_text(), self.err.read_text())

    def kill_all(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def torchrun(script: Path, env: dict[str, str], work: Path) -> Iterator[Torchrun]:
    """Start it; whatever happens, none of its processes survives the test."""
    started = Torchrun(script, env, work)
    try:
        yield started
    finally:
        started.kill_all()


class Pair(NamedTuple):
    """One run by one process and the same by two."""

    one: Path
    two: Path
    result: Result


@pytest.fixture(scope="module")
def pair(data: TinyData, worker: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """MODE=all, alone and under torchrun."""
    folder = tmp_path_factory.mktemp("pair")
    one, two = folder / "one", folder / "two" / "work"
    one.mkdir()
    two.mkdir(parents=True)
    env = run_environment(data)
    alone = run_script(env, one, worker)
    assert alone.status == 0, alone.err
    with torchrun(worker, env, two) as started:
        result = started.wait()
    assert result.status == 0, result.err
    return Pair(one, two, result)


@pytest.mark.slow
def test_torchrun_with_two_processes_logs_each_event_once(pair: Pair):
    events = log_events(pair.result.out)
    assert dict(events)["run"]["ranks"] == "2"
    one = [r["event"] for r in all_metrics(pair.one / "run")]
    assert ["config", *(event for event, _ in events)] == one


def all_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_losses_of_two_processes_are_those_of_one_within_rounding(pair: Pair):
    one, two = losses(pair.one / "run"), losses(pair.two / "run")
    assert two[1] == pytest.approx(one[1], abs=2e-5)  # before any step: the sum's order alone
    assert two == pytest.approx(one, rel=2e-3)


def state_of(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"rank_{rank}.safetensors")


@pytest.mark.slow
def test_weights_of_two_processes_are_those_of_one_within_a_few_steps_of_few_weights(pair: Pair):
    assert_weights_are_near(state_of(pair.two, 0), state_of(pair.one, 0))


def assert_weights_are_near(two: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    """On average, and all but a few of each tensor."""
    assert one.keys() == two.keys()
    for name in (name for name in one if name.startswith("model/")):
        off = (one[name] - two[name]).abs()
        assert float(off.mean()) < 1e-3, name  # a step of Adam is 0.05 here
        assert float((off > 1e-3).float().mean()) < 0.02, name


@pytest.mark.slow
def test_replicas_are_equal_to_the_bit(pair: Pair):
    first, second = state_of(pair.two, 0), state_of(pair.two, 1)
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_score_of_the_same_artifact_by_two_processes_is_that_of_one(pair: Pair, data: TinyData):
    artifact = str((pair.one / "run" / "artifact.bin").resolve())
    env = run_environment(data, mode="eval", artifact=artifact, run_dir="again")
    results = run_ranks([env, env], pair.one)
    assert [r.status for r in results] == [0, 0], results[0].err
    for event in ("final_quantized", "final_sliding"):
        one, two = metrics(pair.one / "run", event)[0], metrics(pair.one / "again", event)[0]
        assert (one["tokens"], one["bytes"]) == (two["tokens"], two["bytes"])
        # Batches of other shapes: rounding of single nats, of either sign.
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6)


@pytest.mark.slow
def test_final_scores_of_two_processes_are_those_of_one_within_rounding(pair: Pair):
    one, two = submission(pair.one / "run"), submission(pair.two / "run")
    assert two["val_bpb"] == pytest.approx(one["val_bpb"], rel=2e-3)
    assert two["hardware"] == one["hardware"] or "2" in two["hardware"]


@pytest.mark.slow
def test_bad_environment_under_torchrun_is_said_once_and_ends(data: TinyData, work: Path):
    env = {**run_environment(data), "NUM_LAYER": "3", "MATRIX_LR": "fast"}
    with torchrun(SCRIPT, env, work) as started:
        result = started.wait()
    assert result.status != 0
    assert result.err.count("InputError: invalid environment:") == 1
    assert result.err.count("NUM_LAYER is not a knob; did you mean NUM_LAYERS?") == 1
    assert "MATRIX_LR='fast' is not a valid float" in result.err
    assert 'train_gpt.py", line' not in result.err  # no traceback of the script
    assert result.out == "" and list(work.iterdir()) == []


def said(result: Result) -> str:
    """What a rank wrote on stderr, less the warnings of torch."""
    lines = iter(result.err.splitlines(keepends=True))
    return "".join(line for line in lines if "Warning: " not in line or not next(lines, None))


def steps_of(result: Result) -> list[int]:
    return [int(values["step"]) for event, values in log_events(result.out) if event == "step"]


def checkpoints(folder: Path) -> list[int]:
    return [int(p.name.removeprefix("step_")) for p in (folder / "run" / "checkpoint").iterdir()]


def long_environment(data: TinyData) -> dict[str, str]:
    """A run that is not over when it is stopped at step 10, with HOOK=slow on any machine."""
    return run_environment(data, mode="train", iterations=80, train_log_every=5, val_loss_every=0)


def assert_stopped_with_a_checkpoint(result: Result, work: Path) -> int:
    """One clear line, no traceback of the script, one checkpoint; its step."""
    assert result.status != 0
    assert result.err.count("Interrupted: stopped by a signal after step") == 1, result.err
    assert 'train_gpt.py", line' not in result.err
    saved = checkpoints(work)
    assert len(saved) == 1 and 10 <= saved[0] < 80
    return saved[0]


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint_that_one_process_goes_on_from(
    data: TinyData, work: Path, worker: Path
):
    env = long_environment(data)
    with torchrun(worker, {**env, "HOOK": "slow"}, work) as started:
        started.wait_for_output("step step:10 ")
        started.process.terminate()
        result = started.wait()
    step = assert_stopped_with_a_checkpoint(result, work)
    resumed = run_script(env, work)
    assert resumed.status == 0, resumed.err
    assert metrics(work / "run", "resume")[0]["step"] == step
    assert steps_of(resumed)[-1] == 80


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes_of_torchrun_leaves_a_checkpoint(
    data: TinyData, work: Path, worker: Path, number: int
):
    # Ctrl-C in a terminal and job schedulers reach the workers themselves, and torchrun passes the
    # signal on: each worker hears it twice.
    with torchrun(worker, {**long_environment(data), "HOOK": "slow"}, work) as started:
        started.wait_for_output("step step:10 ")
        os.killpg(started.process.pid, number)
        result = started.wait()
    assert_stopped_with_a_checkpoint(result, work)


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_a_checkpoint_when_torchrun_is_killed(
    data: TinyData, work: Path, worker: Path
):
    env = run_environment(data, mode="train", iterations=10**5, val_loss_every=0)
    with torchrun(worker, {**env, "HOOK": "slow"}, work) as started:
        started.wait_for_output("step step:10 ")
        pid = started.process.pid
        workers = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        beside = run_script(env, work)
        started.process.kill()
        wait_until(lambda: not any(map(is_running, workers)), TORCHRUN_TIMEOUT_S, "workers go on")
    assert len(workers) == 2
    assert beside.status == 2 and f"RUN_DIR=run is in use by process {workers[0]}" in beside.err
    (step,) = checkpoints(work)
    resumed = start(env, work)
    resumed.wait_for_output("resume ")
    resumed.send(signal.SIGTERM)
    assert resumed.wait().status == 143
    assert metrics(work / "run", "resume")[0]["step"] == step >= 10


# --- Ranks started by hand -----------------------------------------------------------------------


# 5 layers: stacks of 10 and of 5 equal matrices, which neither 2 nor 3 ranks can share evenly.
UNEVEN: dict[str, Any] = {"mode": "train", "num_layers": 5, "train_batch_tokens": 192}
CLIP_NORMS = (0.0, 0.05)  # none, and one that every step's gradient is above


def run_kept(env: dict[str, str], num_ranks: int, folder: Path, worker: Path) -> Path:
    """The folder of a whole run whose ranks left their states."""
    folder.mkdir()
    results = run_ranks([env] * num_ranks, folder, worker)
    assert [r.status for r in results] == [0] * num_ranks, results[0].err
    assert all(r.out == "" for r in results[1:]), "rank 0 alone speaks"
    return folder


@pytest.fixture(scope="module")
def alone(data: TinyData, worker: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The runs of UNEVEN by one process, for each of CLIP_NORMS."""
    folder = tmp_path_factory.mktemp("alone")
    envs = [run_environment(data, **UNEVEN, grad_clip_norm=norm) for norm in CLIP_NORMS]
    return [run_kept(env, 1, folder / str(i), worker) for i, env in enumerate(envs)]


def momenta(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("muon/")}


def test_the_clip_of_these_runs_is_felt(alone: list[Path]):
    norms = [
        math.hypot(*(float(m.norm()) for m in momenta(state_of(f, 0)).values())) for f in alone
    ]
    assert norms[1] < 6 * CLIP_NORMS[1] < norms[0]  # sums of 6 gradients


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "clip", [pytest.param(0, marks=pytest.mark.slow, id="free"), pytest.param(1, id="clipped")]
)
def test_processes_with_uneven_shares_give_what_one_gives(
    data: TinyData, work: Path, worker: Path, alone: list[Path], *, clip: int, num_ranks: int
):
    env = run_environment(data, **UNEVEN, grad_clip_norm=CLIP_NORMS[clip])
    folder = run_kept(env, num_ranks, work / "several", worker)
    found, expected = losses(folder / "run"), losses(alone[clip] / "run")
    assert found[1] == pytest.approx(expected[1], abs=2e-5)
    assert found == pytest.approx(expected, rel=2e-3)
    one, states = state_of(alone[clip], 0), [state_of(folder, rank) for rank in range(num_ranks)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    assert_weights_are_near(states[0], one)
    for name, momentum in momenta(one).items():
        several = states[0][name]
        assert len(several) >= len(momentum) and not several[len(momentum) :].any()
        for matrix, other in zip(momentum, several, strict=False):
            # Gradients of weights that are a little apart, in the same direction.
            assert float((matrix - other).norm()) < 0.05 * float(matrix.norm()), name


def test_more_ranks_than_windows_score_all(data: TinyData, work: Path):
    env = run_environment(data, val_tokens_limit=5, iterations=1, val_loss_every=0)
    results = run_ranks([env, env], work)
    assert [r.status for r in results] == [0, 0], results[0].err
    assert metrics(work / "run", "final_sliding")[0]["tokens"] == 5


@pytest.mark.parametrize("heard_by", [pytest.param([0, 1], marks=pytest.mark.slow), [1]])
def test_sigterm_leaves_a_checkpoint_that_one_process_goes_on_from(
    data: TinyData, work: Path, worker: Path, heard_by
):
    env = long_environment(data)
    ranks = start_ranks([{**env, "HOOK": "slow"}] * 2, work, worker)
    ranks[0].wait_for_output("step step:10 ")
    for rank in heard_by:
        ranks[rank].send(signal.SIGTERM)
    results = wait_for_ranks(ranks)
    assert [r.status for r in results] == [143, 143]
    step = assert_stopped_with_a_checkpoint(results[0], work)
    assert said(results[1]) == ""
    if heard_by == [0, 1]:
        resumed = run_script(env, work)
        assert resumed.status == 0, resumed.err
        assert metrics(work / "run", "resume")[0]["step"] == step
        assert steps_of(resumed)[-1] == 80


def test_batch_that_does_not_divide_is_refused_once_with_the_numbers(data: TinyData, work: Path):
    results = run_ranks([run_environment(data)] * 3, work)
    assert [r.status for r in results] == [2, 2, 2]
    assert results[0].err.startswith("InputError: TRAIN_BATCH_TOKENS=256 / TRAIN_SEQ_LEN=32")
    assert "8 rows" in results[0].err and "3 ranks" in results[0].err
    assert said(results[1]) == said(results[2]) == ""


@pytest.mark.parametrize("change", [{"SEED": "8"}, {"AVERAGING": "none"}, {"MATRIX_LR": "0.1"}])
def test_ranks_with_other_knobs_than_rank_0_are_refused(data: TinyData, work: Path, change):
    env = run_environment(data)
    results = run_ranks([env, {**env, **change, "DATA_PATH": f"{data.folder}/."}], work)
    assert [r.status for r in results] == [2, 2], results[0].err
    (name,) = change
    assert results[0].err.startswith(f"InputError: rank 1 has other values of {name} than rank 0;")
    assert said(results[1]) == "" and not (work / "run").exists()


def edit_shard(folder: Path, pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (shard,) = folder.glob(pattern)
    write_raw_shard(shard, change(np.fromfile(shard, dtype="<u2")[512:]))


def without_last_document(ids: np.ndarray) -> np.ndarray:
    return ids[: np.flatnonzero(ids == train_gpt.BOS_ID)[-1]]


DATA_OF_ONE_NODE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "another validation text": (
        "*_val_*", lambda ids: np.where(ids == ids.max(), ids.max() - 1, ids), "VAL_SHA256",
    ),
    "a shorter one": ("*_val_*", without_last_document, "VAL_TOKENS, VAL_SHA256"),
    "less training text": (
        "*_train_000001*", without_last_document, "TRAIN_TOKENS, TRAIN_SAMPLE_SHA256",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in DATA_OF_ONE_NODE for m in ("all", "eval") if "train" not in n or m == "all"],
)
def test_ranks_with_other_data_than_rank_0_are_refused(
    data: TinyData, work: Path, name: str, mode: str
):
    pattern, change, keys = DATA_OF_ONE_NODE[name]
    other = Path(shutil.copytree(data.folder, work / "other"))
    edit_shard(other, pattern, change)
    if mode == "eval":
        (work / "artifact.bin").write_bytes(b"not read")
    env = run_environment(data, mode=mode, artifact="artifact.bin" if mode == "eval" else "")
    results = run_ranks([env, {**env, "DATA_PATH": str(other)}], work)
    assert [r.status for r in results] == [2, 2], results[0].err
    assert results[0].err.startswith(f"InputError: rank 1 has other values of {keys} than rank 0;")


def test_a_rank_with_another_script_or_precision_is_refused(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = make_run()
    run.world_size = 2

    def gather(boxes: list[Any], values: dict[str, Any]) -> None:
        boxes[:] = [values, {**values, **changed}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    values = {"script": "a", "dtype": torch.bfloat16, "device": "cpu", "seed": 3}
    changed: dict[str, Any]
    for changed in ({"script": "b"}, {"dtype": torch.float32}, {"device": "cuda", "seed": 4}):
        names = ", ".join(changed).upper()
        with pytest.raises(
            train_gpt.InputError, match=f"^rank 1 has other values of {names} than rank 0; "
        ):
            train_gpt.check_same_on_ranks(run, **values)
    changed = {}
    train_gpt.check_same_on_ranks(run, **values)


def test_what_the_ranks_compare(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    compared: dict[str, Any] = {}
    monkeypatch.setattr(
        train_gpt, "check_same_on_ranks", lambda _, **values: compared.update(values)
    )
    cfg = make_run(seed=5).cfg
    with train_gpt.start_run(cfg, {}) as run:
        script = train_gpt.hash_bytes(train_gpt.script_source().encode())
        assert compared["seed"] == 5 and compared["script"] == script
        assert (compared["dtype"], compared["device"]) == (run.dtype, "cpu")
        assert not compared.keys() & {*train_gpt.KNOBS_OF_ONE_NODE}


@pytest.mark.parametrize("reason", ["no compiler", ""])
def test_the_ranks_compare_whether_they_can_compile(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, reason: str
):
    compared: dict[str, Any] = {}
    monkeypatch.setattr(
        train_gpt, "check_same_on_ranks", lambda _, **values: compared.update(values)
    )
    monkeypatch.setattr(train_gpt, "join_process_group", lambda backend: None)
    monkeypatch.setattr(train_gpt, "compile_unavailable_reason", lambda _: reason)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(train_gpt.Run, "broadcast_object", lambda self, value: value)
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with train_gpt.start_run(make_run(compile=True).cfg, env):
        assert compared["compiler"] == (not reason)


def test_ranks_may_name_other_folders(data: TinyData, work: Path):
    env = run_environment(data, mode="train", iterations=1)
    (work / "data").symlink_to(data.folder)
    other = {"DATA_PATH": "data", "RUN_ID": "other", "RUN_DIR": "elsewhere", "ARTIFACT": "x"}
    results = run_ranks([env, env | other], work)
    assert [r.status for r in results] == [0, 0], results[0].err
    assert (work / "run" / "artifact.bin").exists() and not (work / "elsewhere").exists()


def test_bad_loss_of_one_rank_stops_both_at_its_step(data: TinyData, work: Path, worker: Path):
    env = run_environment(data, warmup_steps=0, checkpoint_every_seconds=1e-6)
    results = run_ranks([{**env, "HOOK": "nan"}] * 2, work, worker)
    assert [r.status for r in results] == [1, 1], results[1].err
    assert said(results[0]).startswith("RunFailed: the loss is nan at step 3 (last finite: ")
    assert said(results[1]) == ""
    assert checkpoints(work) == [2]


def test_clock_stops_all_ranks_after_the_same_step(data: TinyData, work: Path, worker: Path):
    env = run_environment(
        data, mode="train", iterations=10**6, max_wallclock_seconds=1.0, train_log_every=10**6
    )
    results = run_ranks([{**env, "HOOK": "slow"}] * 2, work, worker)
    assert [r.status for r in results] == [0, 0], results[0].err
    first, second = state_of(work, 0), state_of(work, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    end = metrics(work / "run", "train_end")[0]
    assert 1 < end["steps"] < 1.0 / 0.03  # at the pace of the slow one


@pytest.mark.parametrize(
    "knobs",
    [{}, {"num_layers": 3, "grad_clip_norm": 0.1}],
)
@pytest.mark.slow
def test_two_ranks_that_were_killed_go_on_to_the_same_bits(
    data: TinyData, work: Path, worker: Path, knobs: dict[str, Any]
):
    # With 3 layers each rank keeps another number of momenta than there are matrices.
    env = run_environment(
        data, mode="train", iterations=12, checkpoint_every_seconds=1e-6, val_loss_every=0, **knobs
    )
    for name in ("whole", "killed"):
        (work / name).mkdir()
    whole = run_ranks([env, env], work / "whole", worker)
    assert [r.status for r in whole] == [0, 0], whole[0].err
    # Rank 1 dies at step 5; rank 0 then cannot go on either, and must not wait forever.
    killer = work / "killer.py"
    killer.write_text(WORKER.replace('float("nan") if bad_loss.calls == 3 else 1', "die(5)"))
    killer.write_text(killer.read_text().replace("def bad_loss", DIE + "def bad_loss"))
    killed = run_ranks([{**env, "HOOK": "nan"}] * 2, work / "killed", killer)
    assert killed[1].status == -signal.SIGKILL and killed[0].status != 0
    resumed = run_ranks([env, env], work / "killed", worker)
    assert [r.status for r in resumed] == [0, 0], resumed[0].err
    assert metrics(work / "killed" / "run", "resume")[0]["step"] >= 3
    artifacts = [(work / n / "run" / "artifact.bin").read_bytes() for n in ("whole", "killed")]
    assert artifacts[0] == artifacts[1]
    assert losses(work / "killed" / "run") == losses(work / "whole" / "run")
    for rank in (0, 1):
        first, second = (state_of(work / name, rank) for name in ("whole", "killed"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), rank


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 2), (3, 2)))],
)
def test_checkpoint_is_gone_on_from_by_another_number_of_ranks(
    data: TinyData, work: Path, worker: Path, alone: list[Path], *, before: int, after: int
):
    env = run_environment(data, **UNEVEN, warmup_steps=0, checkpoint_every_seconds=1e-6)
    stopped = run_ranks([{**env, "HOOK": "nan"}] * before, work, worker)
    assert [r.status for r in stopped] == [1] * before and checkpoints(work) == [2]
    resumed = run_ranks([env] * after, work, worker)
    assert [r.status for r in resumed] == [0] * after, resumed[0].err
    assert metrics(work / "run", "resume")[0]["step"] == 2
    assert losses(work / "run") == pytest.approx(losses(alone[0] / "run"), rel=2e-3)


@pytest.mark.parametrize(
    "heard_by",
    [
        [0, 1],
        [0],
        [1],
    ],
)
def test_signal_during_validation_loses_no_step(
    data: TinyData, work: Path, worker: Path, heard_by: list[int]
):
    # A signal finds the ranks at different places: one may have scored its share already.
    env = run_environment(data, mode="train")  # validates after step 4
    envs = [{**env, "HOOK": "signal" if rank in heard_by else ""} for rank in (0, 1)]
    results = wait_for_ranks(start_ranks(envs, work, worker), timeout_s=30)
    first = results[heard_by[0]]
    assert first.status == 143 and all(result.status for result in results), first.err
    assert first.err.count("Interrupted: stopped by a signal") == 1
    assert checkpoints(work) == [4]


def test_what_rank_0_refuses_ends_all_ranks(data: TinyData, work: Path):
    env = run_environment(data, mode="train", iterations=2)
    assert run_script(env, work).status == 0
    (work / "run" / "run_state.json").write_bytes(b"{")
    problem = "run/run_state.json does not fit this run"
    assert_refused(run_ranks([env, env], work), problem)
    for name in ("artifact.bin", "run_state.json"):
        (work / "run" / name).unlink()
    (work / "run" / "checkpoint" / "step_000000002" / "state.safetensors").write_bytes(b"")
    assert_refused(run_ranks([env, env], work), "step_000000002 is damaged")


def assert_refused(results: list[Result], problem: str) -> None:
    """Both ranks ended of themselves as bad input, and the first one said why."""
    assert [result.status for result in results] == [2, 2]
    assert problem in results[0].err and "InputError" not in results[1].err


BAD_INPUT_OF_RANK_1 = {
    "missing data set": ({"DATA_PATH": "nowhere"}, "no tokenizer at nowhere/tokenizer.model"),
    "missing tokenizer": ({"TOKENIZER_PATH": "t.model"}, "no tokenizer at t.model"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (i > 0))
        for i, name in enumerate(BAD_INPUT_OF_RANK_1)
    ],
)
def test_bad_input_of_one_rank_is_named_by_that_rank(data: TinyData, work: Path, name: str):
    knobs, problem = BAD_INPUT_OF_RANK_1[name]
    env = run_environment(data)
    results = run_ranks([env, {**env, **knobs}], work)
    assert [result.status for result in results] == [2, 2], results[0].err
    assert f"rank 1: InputError: {problem}" in said(results[1])
    assert "InputError: another rank has met bad input" in said(results[0])
    assert "Traceback" not in results[0].err + results[1].err


WRONG_RANKS = [
    {"RANK": "abc", "WORLD_SIZE": "2"},
    {"RANK": "1"},
    {"RANK": "0", "WORLD_SIZE": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"},
]


@pytest.mark.parametrize("ranks", WRONG_RANKS)
def test_rank_variables_that_describe_no_group_are_refused(ranks: dict[str, str]):
    with pytest.raises(train_gpt.InputError, match="start with torchrun, or unset RANK"):
        train_gpt.parse_ranks(ranks)


def test_ranks_on_gpus_need_the_number_of_their_gpu(monkeypatch: pytest.MonkeyPatch):
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert train_gpt.parse_ranks(ranks) == (1, 2, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(train_gpt.InputError, match="but without LOCAL_RANK; start with torchrun"):
        train_gpt.parse_ranks(ranks)
    assert train_gpt.parse_ranks({**ranks, "LOCAL_RANK": "1"}) == (1, 2, 1)


@pytest.mark.parametrize(
    "ranks", [{}, {"RANK": "0"}, {"WORLD_SIZE": "", "RANK": ""}, {"RANK": "0", "WORLD_SIZE": "1"}]
)
def test_rank_variables_of_a_single_process_need_no_address(ranks: dict[str, str]):
    assert train_gpt.parse_ranks(ranks) == (0, 1, 0)


def test_leftover_rank_variables_end_with_2_and_one_line(data: TinyData, work: Path):
    result = run_script({**run_environment(data), "RANK": "1"}, work)
    assert result.status == 2 and len(result.err.splitlines()) == 1, result.err
    assert "RANK=1: RANK must be below WORLD_SIZE (1)" in result.err
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 EiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 99 bytes"),
    ],
)  # fmt: skip
def test_out_of_memory_is_one_message_of_a_failed_run(error: Exception):
    reported = train_gpt.explain_error(error)
    assert isinstance(reported, train_gpt.RunFailed)
    assert "out of memory" in str(reported) and "MICRO_BATCH_TOKENS" in str(reported)
    assert train_gpt.explain_error(RuntimeError("shapes differ")) is None


def test_describe_speaks_once(work: Path):
    results = run_ranks([{**environment(tiny_config()), "MODE": "describe"}] * 2, work)
    assert [r.status for r in results] == [0, 0]
    assert "NUM_LAYERS=3" in results[0].out and results[1].out == ""
