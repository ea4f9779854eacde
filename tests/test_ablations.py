"""The ablation runner: grids, killed and failing runs, statistics, table and plot.

Most tests run a stand-in for the script, which starts at once and writes the files of a run. Its
score is 2 - QUALITY + seed / 100. It logs steps of STEP_MS, after the share CHANGE_AT of the run of
LATE_MS; the first two steps take ten times as long. One test runs the script itself.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from records import ablations
from records.ablations import Job, main, read_grid
from records.results import append_result, parse_settings, read_results
from tests.conftest import NAIVE, TinyData
from tests.processes import wait_until
from train_gpt import InputError

ROOT = Path(ablations.__file__).resolve().parent.parent
GRIDS = sorted(ROOT.glob("records/*/ablations.toml"))

STAND_IN = """
import dataclasses, hashlib, json, os, pathlib, sys, time, types

@dataclasses.dataclass
class Config:
    quality: str = "0"
    wait_for: str = ""

def config_from_env(env):
    if "MISSPELT" in env:
        raise ValueError("MISSPELT is not a knob")
    names = ("QUALITY", "FAIL", "OTHER", "WAIT_FOR", "STEP_MS", "LATE_MS")
    return types.SimpleNamespace(
        iterations=int(env["ITERATIONS"]), change_at=float(env.get("CHANGE_AT", 1)),
        **{name: env.get(name, "0") for name in names})

class Progress:
    def __init__(self, step):
        self.step = step

    def fraction(self, cfg):
        return self.step / cfg.iterations

class Trainer:
    def lr_scale(self):
        return 1.0

def train_stage_at(cfg, progress, scale):
    return "late" if progress >= cfg.change_at else "early"

def step_events(env):
    cfg, train_s = config_from_env(env), 0.0
    for n in range(cfg.iterations):
        is_late = train_stage_at(cfg, n / cfg.iterations, 1.0) == "late"
        step_ms = float(env.get("LATE_MS" if is_late else "STEP_MS", 250))
        train_s = round(train_s + (10 if n < 2 else 1) * step_ms / 1000, 3)
        yield {"event": "step", "step": n + 1, "train_loss": 5.0 - n, "train_s": train_s}

def note_start(env):
    with open(env["STARTS"], "a") as file:
        names = ("QUALITY", "MODE", "ITERATIONS", "SEED")
        cores = sorted(os.sched_getaffinity(0))
        print(json.dumps({"cores": cores, **{n: env.get(n, "") for n in names}}), file=file)

def run(env):
    folder, seed = pathlib.Path(env["RUN_DIR"]), int(env["SEED"])
    (folder / "pid").write_text(str(os.getpid()))
    if "STARTS" in env:
        note_start(env)
    while env.get("WAIT_FOR") and not os.path.exists(env["WAIT_FOR"]):
        time.sleep(0.01)
    if "FAIL" in env and not os.path.exists(env["FAIL"]):
        sys.exit("a traceback\\nRunFailed: no luck")
    bpb = round(2 - float(env.get("QUALITY", 0)) + seed / 100, 8)
    steps = int(env["ITERATIONS"])
    source = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    events = [
        {"event": "config", "values": dict(env), "changed": sorted(
            set(env) & {"QUALITY", "ITERATIONS", "SEED", "OMP_NUM_THREADS"})},
        {"event": "versions", "python": "3.11.7", "torch": "2.13.0", "source_sha256": source},
        {"event": "hardware", "name": "2 CPU cores, Imaginary 3000"},
        {"event": "model", "params": 1_000_000 + int(env.get("OTHER", 0))},
        *step_events(env),
        {"event": "train_end", "steps": steps, "step_avg_ms": 250.0, "tokens": steps * 4096,
         "train_s": steps / 4},
        {"event": "final_prequant", "val_bpb": round(bpb - 0.005, 8)},
        {"event": "size", "artifact_bytes": 900_000 + int(env.get("OTHER", 0))},
        {"event": "final_quantized", "val_bpb": bpb, "bytes": 10_000, "tokens": 4_000},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\\n" for e in events))

if __name__ == "__main__":
    run(os.environ)
"""

GRID = """
steps = 3
seeds = [1, 2]
settings = "OTHER=0"
data = "python data/prepare.py --input text.jsonl --out data/text"
[stacks.small]
[stacks.small.add]
better = "QUALITY=0.1"
worse = "QUALITY=-0.1"
[stacks.large]
settings = "QUALITY=0.3"
[stacks.large.leave_out]
better = "QUALITY=0.2"
"""
NUM_RUNS = 2 * (3 + 2)


def write_grid(folder: Path, text: str = GRID) -> Path:
    """Write a grid file and the stand-in for the script; return the grid file."""
    (folder / "script.py").write_text(STAND_IN)
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def command(grid: Path, *more: str, verb: str = "run") -> list[str]:
    """Return arguments that run a grid, or time its steps, with the stand-in."""
    folder = grid.parent
    return [verb, str(grid), "--script", f"{folder}/script.py", "--work", f"{folder}/work", *more]


def lines_of(grid: Path, ending: str = ".jsonl") -> list[dict[str, Any]]:
    """Return the results in the order in which they were written."""
    path = grid.with_name(grid.stem + ending)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Return stack, variant and seed of each result."""
    return [(line["stack"], line["variant"], line["seed"]) for line in lines]


# --- Grid ----------------------------------------------------------------------------------------


def test_the_first_seed_of_everything_comes_before_the_second_of_anything(tmp_path: Path) -> None:
    jobs = ablations.list_jobs(read_grid(write_grid(tmp_path)))
    assert [job.seed for job in jobs] == [1] * 5 + [2] * 5
    assert [job.name for job in jobs[:5]] == [
        "small/reference", "small/better", "small/worse", "large/reference", "large/better",
    ]  # fmt: skip


def test_a_run_is_identified_by_its_settings_alone(tmp_path: Path) -> None:
    def key(old: str = "", new: str = "") -> str:
        grid = read_grid(write_grid(tmp_path, GRID.replace(old, new)))
        return Job(grid.stacks[0], grid.stacks[0].variants[1], grid.stacks[0].seeds[0]).key

    assert key("QUALITY=0.1", "QUALITY=0.11") != key()
    assert key("steps = 3", "steps = 4") != key()
    assert key("seeds = [1, 2]", "seeds = [2]") != key()
    assert key('"OTHER=0"', '"OTHER=1"') != key()
    assert key("better = ", "renamed = ") == key("stacks.small", "stacks.tiny") == key()


def test_settings_override_the_recipe_and_variants_override_both(tmp_path: Path) -> None:
    recipe = tmp_path / "run.env"
    recipe.write_text("# comment\nNUM_LAYERS=2\nMODEL_DIM=64\nSEED=5\nMAX_WALLCLOCK_SECONDS=230\n")
    text = f"""
        steps = 3
        seeds = [1]
        settings = "MODEL_DIM=96"
        [stacks.a]
        recipe = "{recipe}"
        settings = "RUN_NOTE='two words'"
        add.wide = "MODEL_DIM=128 MLP_MULT=3"
    """
    (stack,) = read_grid(write_grid(tmp_path, text)).stacks
    expected = {"NUM_LAYERS": "2", "MODEL_DIM": "96", "RUN_NOTE": "two words"}
    expected |= {**ablations.RUN_SETTINGS, "ITERATIONS": "3", "SEED": "1"}
    reference, wide = (Job(stack, variant, 1).settings for variant in stack.variants)
    assert reference == expected and expected["MAX_WALLCLOCK_SECONDS"] == "0"
    assert wide == {**expected, "MODEL_DIM": "128", "MLP_MULT": "3"}


def test_variants_with_equal_settings_share_their_runs(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path, GRID.replace('"QUALITY=0.2"', '"QUALITY=0.1"')))
    jobs = ablations.list_jobs(grid)
    assert [job.name for job in jobs[:4]] == [
        "small/reference", "small/better", "small/worse", "large/reference",
    ]  # fmt: skip
    assert len(jobs) == NUM_RUNS - 2


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"QUALITY=0.1"', '"QUALITY"', "stacks.small.add.better: 'QUALITY' is not KEY=value"),
        ('"QUALITY=0.1"', "0.1", "stacks.small.add.better: '0.1' is not KEY=value"),
        ('"QUALITY=0.1"', '"SEED=3"', "SEED is set by the runner"),
        ("better =", "reference =", "reference is there twice or is a reserved name"),
        ("leave_out", "leave-out", "stacks.large: unknown leave-out; known are recipe"),
        ("seeds = [1, 2]", "seeds = []", r"seeds = \[\] is not a list of seeds"),
        ("seeds = [1, 2]", "seeds = [1, true]", "is not a list of seeds"),
        ("steps = 3", "", "steps = None is not a number of steps"),
        ("steps = 3", "steps = 3\nstep = 4", "the top level: unknown step"),
        ("steps = 3", "steps == 3", "line 2"),
        ("[stacks.large]", '[stacks.large]\nrecipe = "none.env"', "none.env cannot be read"),
        (GRID, "steps = 3", r"no \[stacks.NAME\]"),
        (GRID, "steps = 3\nstacks.a = 1", "grid.toml: "),
    ],
)  # fmt: skip
def test_an_invalid_grid_is_refused(old: str, new: str, problem: str, tmp_path: Path) -> None:
    assert old in GRID
    with pytest.raises(InputError, match=problem):
        read_grid(write_grid(tmp_path, GRID.replace(old, new)))


def test_the_script_checks_all_variants_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GRID.replace('"QUALITY=0.1"', '"MISSPELT=1"').replace('"QUALITY=0.2"', '"QUALITY=0.3"')
    grid = write_grid(tmp_path, text)
    assert main(command(grid)) == 2
    said = capsys.readouterr().err
    assert "small/better: MISSPELT is not a knob" in said
    assert "large/better: changes nothing of the stack" in said
    assert not lines_of(grid)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.parent.name)
def test_the_script_accepts_every_variant_of_the_grids_in_the_repository(path: Path) -> None:
    ablations.refuse_bad_variants(read_grid(path), train_gpt)


# --- Running -------------------------------------------------------------------------------------


def test_every_run_becomes_a_line_and_is_not_repeated(tmp_path: Path) -> None:
    grid = write_grid(tmp_path)
    assert main(command(grid, "--jobs", "3")) == 0
    lines = lines_of(grid)
    assert len(set(names(lines))) == len({line["key"] for line in lines}) == NUM_RUNS
    found = next(line for line in lines if names([line]) == [("large", "better", 2)])
    expected = {
        "mode": "leave_out", "overrides": {"QUALITY": "0.2"}, "bpb_quantized": 1.82,
        "bpb_prequant": 1.815, "train_loss": 3.0, "params": 1_000_000, "artifact_bytes": 900_000,
        "steps": 3, "tokens": 3 * 4096, "step_avg_ms": 250.0, "side_by_side": 3, "threads": 1,
        "setting": {"QUALITY": "0.2", "ITERATIONS": "3", "OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert list((tmp_path / "work/runs").iterdir()) == []
    assert main(command(grid)) == 0
    assert lines_of(grid) == lines


@pytest.mark.slow
def test_only_changed_runs_of_a_grid_are_run_again(tmp_path: Path) -> None:
    grid = write_grid(tmp_path)
    assert main(command(grid)) == 0
    write_grid(tmp_path, GRID.replace('worse = "QUALITY=-0.1"', 'worse = "QUALITY=-0.2"'))
    assert main(command(grid)) == 0
    assert sorted(names(lines_of(grid)[NUM_RUNS:])) == [
        ("small", "worse", 1),
        ("small", "worse", 2),
    ]


def test_no_run_is_started_after_the_hours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path)
    assert main(command(grid, "--hours", "0")) == 0
    assert not lines_of(grid)
    assert f"0 of {NUM_RUNS} runs done" in capsys.readouterr().out


def test_a_run_inherits_no_knob_and_runs_a_copy_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUALITY", "1")
    monkeypatch.setenv("WAIT_FOR", "/nowhere")
    grid = write_grid(tmp_path, GRID.partition("[stacks.large]")[0])
    before = ablations.Runner.start

    def edit_and_start(runner: ablations.Runner, job: Job) -> None:
        (tmp_path / "script.py").write_text("raise RuntimeError('half an edit')")
        before(runner, job)

    monkeypatch.setattr(ablations.Runner, "start", edit_and_start)
    assert main(command(grid)) == 0
    scores = {
        line["variant"]: line["bpb_quantized"] for line in lines_of(grid) if line["seed"] == 1
    }
    assert scores == {"reference": 2.01, "better": 1.91, "worse": 2.11}
    assert len({line["source_sha256"] for line in lines_of(grid)}) == 1


def start_runner(
    grid: Path, argv: Sequence[str] = (), is_ready: Callable[[], bool] | None = None
) -> subprocess.Popen[bytes]:
    """Start a runner process; return it when only the waiting runs of the grid are left."""
    program = [sys.executable, str(ROOT / "records/ablations.py")]
    process = subprocess.Popen([*program, *(argv or command(grid))], stderr=subprocess.PIPE)
    wait_until(
        is_ready or (lambda: len(lines_of(grid)) == 3 and len(waiting_pids(grid)) == 2),
        timeout_s=60,
        problem="the runner has not started the waiting runs",
    )
    return process


def waiting_pids(grid: Path) -> list[int]:
    """Return the processes in progress that have written their id and have not ended."""
    texts = [path.read_text() for path in tmp_runs(grid).glob("*/pid")]
    return [int(text) for text in texts if text and is_alive(int(text))]


def tmp_runs(grid: Path) -> Path:
    """Return the folder of the runs in progress."""
    return grid.parent / "work/runs"


def waiting_grid(folder: Path) -> Path:
    """Write a grid whose first stack runs; the other one waits for a file `go`."""
    text = GRID.replace('"QUALITY=0.3"', f'"QUALITY=0.3 WAIT_FOR={folder}/go"')
    return write_grid(folder, text)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_killed_runner_loses_only_the_runs_in_progress(tmp_path: Path) -> None:
    grid = waiting_grid(tmp_path)
    process = start_runner(grid)
    pids = waiting_pids(grid)
    process.kill()
    process.communicate()
    for pid in pids:  # the runner cannot end them any more
        os.kill(pid, signal.SIGKILL)
    before = lines_of(grid)
    (tmp_path / "go").touch()
    assert main(command(grid)) == 0
    assert lines_of(grid)[:3] == before
    assert len(lines_of(grid)) == len(set(names(lines_of(grid)))) == NUM_RUNS


@pytest.mark.slow
def test_a_runner_that_gets_sigterm_ends_its_runs(tmp_path: Path) -> None:
    grid = waiting_grid(tmp_path)
    process = start_runner(grid)
    pids = waiting_pids(grid)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"the same command continues" in said
    assert len(pids) == 2 and not any(map(is_alive, pids))
    assert len(lines_of(grid)) == 3


def test_a_failed_run_is_recorded_and_repeated_with_retry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path, GRID.replace('"QUALITY=0.1"', f'"QUALITY=0.1 FAIL={tmp_path}/go"'))
    assert main(command(grid)) == 1
    failed = [line for line in lines_of(grid) if "error" in line]
    assert sorted(names(failed)) == [("small", "better", 1), ("small", "better", 2)]
    assert failed[0]["error"] == "exit status 1: a traceback\nRunFailed: no luck"
    assert 'error:"RunFailed: no luck"' in capsys.readouterr().out
    assert {path.name for path in tmp_runs(grid).iterdir()} == {line["key"] for line in failed}
    (tmp_path / "go").touch()
    assert main(command(grid)) == 1
    assert len(lines_of(grid)) == NUM_RUNS
    assert main(command(grid, "--retry")) == 0
    assert sorted(names(lines_of(grid)[NUM_RUNS:])) == sorted(names(failed))
    assert len(read_results(grid.with_suffix(".jsonl"))) == NUM_RUNS
    assert list(tmp_runs(grid).iterdir()) == []


def test_a_run_that_ends_without_its_metrics_has_failed(tmp_path: Path) -> None:
    grid = write_grid(tmp_path, GRID.partition("[stacks.small.add]")[0])
    (tmp_path / "script.py").write_text(STAND_IN.replace('"final_quantized"', '"final_other"'))
    assert main(command(grid)) == 1
    assert all("has no `final_quantized` event" in line["error"] for line in lines_of(grid))


def test_files_of_an_earlier_runner_are_ignored(tmp_path: Path) -> None:
    grid = write_grid(tmp_path, GRID.partition("[stacks.small.add]")[0])
    assert main(command(grid)) == 0
    (result, _), (key, _) = lines_of(grid), read_results(grid.with_suffix(".jsonl"))
    stale = tmp_runs(grid) / key
    stale.mkdir()
    (stale / "metrics.jsonl").write_text(json.dumps({"event": "final_quantized", **result}))
    grid.with_suffix(".jsonl").unlink()
    (tmp_path / "script.py").write_text(STAND_IN.replace("run(os.environ)", "pass"))
    assert main(command(grid)) == 1
    assert "metrics.jsonl is missing" in lines_of(grid)[0]["error"]


def test_the_runner_stops_when_everything_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GRID.replace('"OTHER=0"', f'"OTHER=0 FAIL={tmp_path}/go"')
    grid = write_grid(tmp_path, text)
    assert main(command(grid, "--jobs", "1")) == 1
    assert len(lines_of(grid)) == ablations.MAX_FAILURES_IN_A_ROW < NUM_RUNS
    assert "5 runs in a row failed" in capsys.readouterr().err


def test_two_runners_cannot_use_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path)
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(grid)) == 2
    assert "another runner uses " in capsys.readouterr().err
    assert not lines_of(grid)


@pytest.mark.slow
def test_the_script_itself_can_be_ablated(tmp_path: Path, data: TinyData) -> None:
    text = f"""
        steps = 3
        seeds = [1]
        settings = \"\"\"
        DATA_PATH={data.folder} VOCAB_SIZE=320 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2
        TRAIN_SEQ_LEN=32 TRAIN_BATCH_TOKENS=256 VAL_BATCH_SIZE=512 WARMUP_STEPS=0 COMPILE=0
        TRAIN_LOG_EVERY=1 PRECISION=fp32
        \"\"\"
        [stacks.tiny]
        recipe = "{NAIVE.relative_to(ablations.ROOT)}"
        [stacks.tiny.add]
        xsa = "XSA_LAST_N=2"
    """
    grid = tmp_path / "grid.toml"
    grid.write_text(text)
    assert main(["run", str(grid), "--work", f"{tmp_path}/work"]) == 0
    reference, xsa = sorted(lines_of(grid), key=lambda line: line["variant"])
    assert reference["params"] == xsa["params"] > 0
    assert reference["tokens"] == xsa["tokens"] == 3 * 256
    assert reference["bpb_quantized"] != xsa["bpb_quantized"] > 1
    assert [line["setting"]["XSA_LAST_N"] for line in (reference, xsa)] == ["0", "2"]
    timing = ["time", str(grid), "--work", f"{tmp_path}/work", "--jobs", "1", "--steps", "3"]
    assert main(timing) == 0
    assert [len(line["steps_ms"]) for line in lines_of(grid, TIMES)] == [3, 3]
    assert main(["table", str(grid)]) == 0
    assert "| xsa | `XSA_LAST_N=2` |" in (text := grid.with_suffix(".md").read_text())
    assert "Step time of the reference in 2 measurements: " in text


# --- Step times ----------------------------------------------------------------------------------

TIMES = "_time.jsonl"
NUM_TIMINGS = 3 + 2


def timing_grid(folder: Path, better: str = "QUALITY=0.1 STEP_MS=300", base: str = "") -> Path:
    """Write GRID with runs of 20 steps that log their starts."""
    text = GRID.replace("steps = 3", "steps = 20").replace('"QUALITY=0.1"', f'"{better}"')
    return write_grid(folder, text.replace('"OTHER=0"', f'"OTHER=0 STARTS={folder}/starts {base}"'))


def time_command(grid: Path, *more: str) -> list[str]:
    """Return arguments that measure one step time after the other."""
    return command(grid, "--jobs", "1", "--steps", "6", *more, verb="time")


def starts_of(grid: Path) -> list[dict[str, Any]]:
    """Return what the runs of a timing grid have logged, in the order of their starts."""
    return [json.loads(line) for line in (grid.parent / "starts").read_text().splitlines()]


def test_a_step_is_timed_directly_after_that_of_its_stack_on_the_same_core(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    grid = timing_grid(tmp_path)
    assert main(time_command(grid)) == 0
    lines, starts = lines_of(grid, TIMES), starts_of(grid)
    assert names(lines) == [
        ("small", "reference", 1), ("small", "better", 1), ("small", "worse", 1),
        ("large", "reference", 1), ("large", "better", 1),
    ]  # fmt: skip
    assert [start["QUALITY"] for start in starts] == [
        "", "", "", "0.1", "", "-0.1", "0.3", "0.3", "0.3", "0.2",
    ]  # fmt: skip
    assert {(s["MODE"], s["ITERATIONS"], s["SEED"]) for s in starts} == {("train", "6", "1")}
    assert {len(start["cores"]) for start in starts} == {1}
    assert os.sched_getaffinity(0) == cores
    assert [line["ratio"] for line in lines] == [1.0, 1.2, 1.0, 1.0, 1.0]
    expected = {
        "step_ms": 300.0, "base_step_ms": 250.0, "phases": [{"share": 1.0, "step_ms": 300.0}],
        "steps_ms": [3000.0, 3000.0, 300.0, 300.0, 300.0, 300.0], "side_by_side": 1, "threads": 1,
        "overrides": {"QUALITY": "0.1", "STEP_MS": "300"}, "mode": "add",
    }  # fmt: skip
    assert {key: lines[1][key] for key in expected} == expected
    assert list(tmp_runs(grid).iterdir()) == [] == lines_of(grid)


@pytest.mark.slow
def test_a_measured_step_time_is_not_measured_again(tmp_path: Path) -> None:
    grid = timing_grid(tmp_path)
    assert main(time_command(grid)) == 0
    before = lines_of(grid, TIMES)
    assert main(time_command(grid)) == 0
    assert lines_of(grid, TIMES) == before
    timing_grid(tmp_path, "QUALITY=0.1 STEP_MS=275")
    assert main(time_command(grid)) == 0
    assert names(lines_of(grid, TIMES)[NUM_TIMINGS:]) == [("small", "better", 1)]
    assert main(time_command(grid, "--seeds", "2")) == 0
    assert {line["seed"] for line in lines_of(grid, TIMES)[NUM_TIMINGS + 1 :]} == {2}
    timing_grid(tmp_path, "QUALITY=0.1 STEP_MS=275", base="STEP_MS=260")
    assert main(time_command(grid)) == 0  # another base: everything is measured again
    assert len(lines_of(grid, TIMES)) == 3 * NUM_TIMINGS + 1
    assert main(time_command(grid, "--hours", "0")) == 0


def test_stages_are_weighted_with_their_share_of_the_whole_run(tmp_path: Path) -> None:
    grid = timing_grid(tmp_path, "QUALITY=0.1 CHANGE_AT=0.75 LATE_MS=450")
    assert main(time_command(grid)) == 0
    line = next(line for line in lines_of(grid, TIMES) if line["variant"] == "better")
    assert line["phases"] == [{"share": 0.75, "step_ms": 250.0}, {"share": 0.25, "step_ms": 450.0}]
    assert line["step_ms"] == 0.75 * 250 + 0.25 * 450
    # Two steps of each stage are timed, and its first is not: the last quarter has three.
    assert len(line["steps_ms"]) == 12 and len(line["base_steps_ms"]) == 6


def test_the_median_of_several_seeds_is_shown() -> None:
    measured = {seed: {"step_ms": 100.0 * seed, "ratio": 1 + seed / 4} for seed in (1, 2, 9)}
    assert ablations.time_cells(measured) == ["200", "1.50"]


def test_the_first_steps_and_the_first_after_a_change_are_not_timed() -> None:
    assert ablations.counted_steps("aaaabbbac") == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("warmdown", "share"),
    [("WARMDOWN_FRAC=0.4", 0.4), ("WARMDOWN_ITERS=7", 7 / 20), ("WARMDOWN_FRAC=0", 0)],
)
def test_the_schedule_of_a_run_is_the_one_that_the_trainer_follows(
    warmdown: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress and learning rate scale of all 20 steps: 1, then linear to MIN_LR."""
    stage_at: Any = lambda cfg, progress, scale: (1, 1, progress, scale)  # noqa: E731
    monkeypatch.setattr(train_gpt, "train_stage_at", stage_at)
    settings = {"ITERATIONS": "20", "MIN_LR": "0.1", "MAX_WALLCLOCK_SECONDS": "0"}
    stages = ablations.stages_by_step(train_gpt, {**settings, **parse_settings(warmdown, "")})
    for step, (_, _, progress, scale) in enumerate(stages):
        assert progress == step / 20
        expected = max(min(1.0, (1 - progress) / share), 0.1) if share else 1.0
        assert scale == pytest.approx(expected, rel=1e-12)
    assert len(stages) == 20


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.parent.name)
def test_every_variant_of_the_grids_in_the_repository_can_be_timed(path: Path) -> None:
    short_runs = ablations.list_short_runs(read_grid(path), 12, 1, train_gpt)
    changing = {run.name: run.shares for run in short_runs if len(run.shares) > 1}
    assert changing["stack/loop"] == (0.5, 0.5)
    assert changing["stack/late_qat"] == (99 / 120, 21 / 120)  # the last 0.3 of 0.6 of 120 steps
    assert all(12 <= len(run.stage_of_step) < 30 for run in short_runs)


def start_timer(grid: Path) -> subprocess.Popen[bytes]:
    """Start a runner; return it when it has timed the first stack and its variant waits."""

    def is_ready() -> bool:
        begun = (grid.parent / "starts").exists() and len(starts_of(grid)) == 4
        return begun and len(waiting_pids(grid)) == 1

    return start_runner(grid, time_command(grid), is_ready)


@pytest.mark.slow
def test_a_killed_measurement_starts_again_with_its_stack(tmp_path: Path) -> None:
    grid = timing_grid(tmp_path, f"QUALITY=0.1 WAIT_FOR={tmp_path}/go")
    process = start_timer(grid)
    (pid,) = waiting_pids(grid)
    process.kill()
    process.communicate()
    os.kill(pid, signal.SIGKILL)  # the runner cannot end it any more
    before = lines_of(grid, TIMES)
    assert [start["QUALITY"] for start in starts_of(grid)] == ["", "", "", "0.1"]
    (tmp_path / "go").touch()
    assert main(time_command(grid)) == 0
    assert [start["QUALITY"] for start in starts_of(grid)[4:6]] == ["", "0.1"]
    assert lines_of(grid, TIMES)[:1] == before
    assert len(lines_of(grid, TIMES)) == len(read_results(grid.with_name("grid" + TIMES))) == 5


@pytest.mark.slow
def test_a_measurement_that_gets_sigterm_ends_its_run(tmp_path: Path) -> None:
    grid = timing_grid(tmp_path, f"QUALITY=0.1 WAIT_FOR={tmp_path}/go")
    process = start_timer(grid)
    (pid,) = waiting_pids(grid)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"the same command continues" in said
    assert not is_alive(pid) and len(lines_of(grid, TIMES)) == 1


@pytest.mark.parametrize("where", ["variant", "base"])
@pytest.mark.slow
def test_a_failed_measurement_is_recorded_and_repeated_with_retry(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fail = f"FAIL={tmp_path}/go"
    grid = (
        timing_grid(tmp_path, f"QUALITY=0.1 {fail}")
        if where == "variant"
        else timing_grid(tmp_path, f"QUALITY=0.1 FAIL={ROOT}", base=fail)
    )
    assert main(time_command(grid)) == 1
    failed = [line for line in lines_of(grid, TIMES) if "error" in line]
    assert len(failed) == (1 if where == "variant" else NUM_TIMINGS)
    assert failed[0]["error"] == "exit status 1: a traceback\nRunFailed: no luck"
    assert 'error:"RunFailed: no luck"' in capsys.readouterr().out
    assert main(["table", str(grid)]) == 0
    (tmp_path / "go").touch()
    assert main(time_command(grid)) == 1
    assert len(lines_of(grid, TIMES)) == NUM_TIMINGS
    assert main(time_command(grid, "--retry")) == 0
    assert names(lines_of(grid, TIMES)[NUM_TIMINGS:]) == names(failed)
    assert list(tmp_runs(grid).iterdir()) == []


def test_a_run_that_logs_too_few_steps_gives_no_time(tmp_path: Path) -> None:
    grid = timing_grid(tmp_path)
    (tmp_path / "script.py").write_text(
        STAND_IN.replace("*step_events(env)", "*list(step_events(env))[1:]")
    )
    assert main(time_command(grid)) == 1
    assert all("has 5 of 6 steps" in line["error"] for line in lines_of(grid, TIMES))


def test_more_parallel_measurements_than_cores_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = timing_grid(tmp_path)
    assert main(command(grid, "--jobs", "9999", verb="time")) == 2
    assert "--jobs 9999 with --threads 1 needs 9999 cores" in capsys.readouterr().err
    assert not lines_of(grid, TIMES)


@pytest.mark.slow
def test_the_table_shows_the_ratio_to_the_stack_of_the_same_measurement(tmp_path: Path) -> None:
    grid = timing_grid(tmp_path, "QUALITY=0.1 CHANGE_AT=0.75 LATE_MS=450")
    assert main(command(grid)) == 0
    assert main(["table", str(grid)]) == 0
    before = grid.with_suffix(".md").read_text()
    assert all(row.endswith(" | - | - |") for row in before.splitlines() if "| 2 |" in row)
    assert "x reference:" not in before and "ablations.py time" not in before
    assert main(time_command(grid)) == 0
    assert main(["table", str(grid)]) == 0
    text = grid.with_suffix(".md").read_text()
    ends = [row.split(" | ")[-2:] for row in text.splitlines() if row.startswith("| better")]
    assert ends == [["300", "1.20 |"], ["250", "1.00 |"]]
    assert "\nStep time of the reference in 3 measurements: median 250 ms, 250 to 250 ms.\n" in text
    assert "\nSteps of better: 75% at 250 ms, 25% at 450 ms.\n" in text
    assert (
        "- Step times: `python records/ablations.py time grid.toml`; both halves of a ratio" in text
    )
    assert "x reference: this time divided by\nthat of the reference" in text


# --- Statistics ----------------------------------------------------------------------------------

TRIAL = """
steps = 3
seeds = [1, 2, 3]
[stacks.s]
recipe = ""
add.gate = "GATE=1"
add.late = "LATE=1"
add.worse = "WORSE=1"
leave_out.leaky = "LEAKY=0"
"""
SCORES = {
    "reference": [2.0, 2.1, 2.2],
    "gate": [1.9, 2.0, 2.1],
    "worse": [2.1, 2.23, 2.3],
    "leaky": [2.04, 2.16, 2.22],
}


def write_results(folder: Path, scores: dict[str, list[float]], **changes: Any) -> Path:
    """Write the grid TRIAL and results with these scores, one for each seed."""
    path = write_grid(folder, TRIAL)
    (stack,) = read_grid(path).stacks
    for variant in stack.variants:
        for seed, bpb in enumerate(scores.get(variant.name, []), start=1):
            is_gate = variant.name == "gate"
            result = {
                "key": Job(stack, variant, seed).key, "seed": seed, "bpb_quantized": bpb,
                "bpb_prequant": bpb - 0.01 - 0.02 * is_gate, "params": 1_000_000 + 24 * is_gate,
                "step_avg_ms": 200.0 + 10 * is_gate, "artifact_bytes": 900_000 + 1_500 * is_gate,
                "tokens": 12_288, "scored_bytes": 10_000, "side_by_side": 2, "threads": 1,
                "hardware": "2 CPU cores, Imaginary 3000", "versions": {"python": "3.11.7"},
                "source_sha256": "ab12", **changes,
            }  # fmt: skip
            append_result(path.with_suffix(".jsonl"), result)
    return path


def comparisons(path: Path, mode: str) -> dict[str, ablations.Comparison]:
    """Return the comparisons of the stack in TRIAL by the name of the variant."""
    grid = read_grid(path)
    found = ablations.compare(grid.stacks[0], mode, read_results(grid.results))
    return {c.variant.name: c for c in found}


def student_4(t: float) -> float:
    """Return the tail probability of Student's t with 4 degrees of freedom (closed form)."""
    share = 1 + t * t / 4
    return 0.5 - 3 / 8 * t / math.sqrt(share) * (1 - t * t / (12 * share))


def student_2(t: float) -> float:
    """Return the same with 2 degrees of freedom."""
    return 0.5 - t / (2 * math.sqrt(2 + t * t))


def test_the_gain_of_an_added_technique_is_the_decrease_of_the_score(tmp_path: Path) -> None:
    found = comparisons(write_results(tmp_path, SCORES), "add")
    assert list(found) == ["gate", "worse", "late"]  # best first, not run yet last
    gate, worse, late = found.values()
    assert gate.differences == pytest.approx([-0.1] * 3) and gate.gains == pytest.approx([0.1] * 3)
    # Both sides have the variance 0.01, so Welch's degrees of freedom are 2 * (3 - 1).
    assert gate.welch == pytest.approx(student_4(0.1 / math.sqrt(0.02 / 3)), abs=1e-9)
    assert worse.gains == pytest.approx([-0.1, -0.13, -0.1])
    assert late.gains == [] and late.welch is late.paired is None


def test_the_gain_of_a_technique_left_out_is_the_increase_of_the_score(tmp_path: Path) -> None:
    leaky = comparisons(write_results(tmp_path, SCORES), "leave_out")["leaky"]
    assert leaky.differences == leaky.gains == pytest.approx([0.04, 0.06, 0.02])
    # Mean 0.04, standard deviation 0.02, three seeds.
    assert leaky.paired == pytest.approx(student_2(0.04 / (0.02 / math.sqrt(3))), abs=1e-9)
    assert leaky.welch is not None and leaky.paired is not None
    assert leaky.paired < leaky.welch < 0.5


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    path = write_results(tmp_path, {"reference": [2.0, 2.1], "gate": [1.9, 2.04, 9.0]})
    gate = comparisons(path, "add")["gate"]
    assert gate.differences == pytest.approx([-0.1, -0.06])
    assert statistics.stdev(gate.differences) == pytest.approx(0.04 / math.sqrt(2))


def test_without_a_second_seed_there_is_no_test(tmp_path: Path) -> None:
    gate = comparisons(write_results(tmp_path, {"reference": [2.0], "gate": [1.9]}), "add")["gate"]
    assert gate.welch is gate.paired is None
    assert gate.gains == pytest.approx([0.1])


# --- Table and plot ------------------------------------------------------------------------------


def test_the_table_shows_the_gain_of_each_technique(tmp_path: Path) -> None:
    path = write_results(tmp_path, SCORES)
    assert main(["table", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "variant", "---", "reference", "gate", "worse", "late",
        "variant", "---", "reference", "leaky",
    ]  # fmt: skip
    assert rows[2] == rows[8]
    assert rows[2].startswith("| reference | - | 1,000,000 | 2.10000 | 0.10000 | 3 | - |")
    p = student_4(0.1 / math.sqrt(0.02 / 3))
    start = "| gate | `GATE=1` | 1,000,024 | 2.00000 | 0.10000 | 3 | -0.10000 | 0.00000 | "
    assert rows[3].startswith(start)
    assert rows[3].endswith(f" | {p:.4f} | -0.12000 | +1,500 | - | - |")
    assert rows[5] == "| late | `LATE=1` | - | - | - | 0 | - | - | - | - | - | - | - | - |"
    assert "12 of 15 runs are done." in text
    assert "Every run: 3 steps (12,288 tokens); seeds 1, 2, 3." in text
    assert "Generated by `python records/ablations.py table grid.toml`; do not edit." in text


def test_the_table_names_hardware_versions_text_and_sources(tmp_path: Path) -> None:
    path = write_results(tmp_path, {"reference": [2.0, 2.1]})
    write_results(tmp_path, {"gate": [1.9]}, source_sha256="cd34")
    text = ablations.format_ablations(read_grid(path), read_results(path.with_suffix(".jsonl")))
    assert "SHA-256 of `train_gpt.py`: ab12 (2 runs); cd34 (1 runs)." in text
    assert (
        "Hardware: 2 CPU cores, Imaginary 3000. Runs side by side: 2; threads of each: 1." in text
    )
    assert "Versions: python 3.11.7." in text
    assert "Scored: 10000 bytes of validation text." in text


def test_failed_runs_are_listed_and_not_counted(tmp_path: Path) -> None:
    path = write_results(tmp_path, SCORES)
    (stack,) = read_grid(path).stacks
    failed = {"key": Job(stack, stack.variants[1], 2).key, "error": "exit status 1: a\nno luck"}
    append_result(path.with_suffix(".jsonl"), failed)
    text = ablations.format_ablations(read_grid(path), read_results(path.with_suffix(".jsonl")))
    assert "11 of 15 runs are done." in text
    assert text.endswith("## Failed runs\n\n- s/gate, seed 2: no luck\n")
    assert "| gate | `GATE=1` | 1,000,024 | 2.00000 | 0.14142 | 2 |" in text


def test_table_and_plot_can_be_made_at_any_time(tmp_path: Path) -> None:
    for scores in ({}, {"reference": [2.0]}, {"gate": [2.0]}, SCORES):
        path = write_results(tmp_path, scores)
        assert main(["table", str(path)]) == 0
        assert path.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.with_suffix(".md").read_text().startswith("# Ablations\n")


def test_a_table_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "none.toml"), "--jobs", "0"])
