"""What each technique is worth: a grid of changed knobs times seeds, run, tabulated and drawn.

    python records/ablations.py run GRID.toml --jobs 2      # what GRID.jsonl does not have yet
    python records/ablations.py time GRID.toml --jobs 2     # what a step takes: GRID_time.jsonl
    python records/ablations.py table GRID.toml             # write GRID.md and GRID.png from both

A grid has stacks: a recipe, settings over it, and named variants of it, each a change of knobs that
is added to the stack (`add`) or takes something out of it (`leave_out`):

    steps = 150                     # of every run, and seeds; a stack may have its own
    seeds = [1, 2, 3]
    settings = "DATA_PATH=data/x"   # of every stack, over its recipe
    data = "python data/prepare.py --input x.jsonl --out data/x"   # named in the table, never run
    [stacks.baseline]
    recipe = "records/demo/cpu.env" # from the root of the repository; optional, as `settings` is
    settings = "XSA_LAST_N=0"
    [stacks.baseline.add]
    xsa = "XSA_LAST_N=4"
    [stacks.baseline.leave_out]
    leaky = "LEAKY_SLOPE=0"

A run is a fresh process; when it has ended it is a line of GRID.jsonl, under the hash of all that
it was set to. A runner that is killed loses the runs in progress and, started again, goes on; of a
grid that was changed, only what changed is run. Runs that other work ran beside say nothing about
the time of a step; `time` measures that, in the same way, and wants the machine for itself.

Sections: 1. Grid  2. Results  3. Running  4. Step times  5. Statistics  6. Table  7. Plot
8. Command line
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
# As a script, its own folder is first on the path and would hide the package `records`.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "records")]

from matplotlib import pyplot as plt  # noqa: E402  (the path above makes the imports possible)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

import train_gpt  # noqa: E402
from records.logs import METRICS, Json, RunLog, run_settings  # noqa: E402
from records.markdown import table_lines  # noqa: E402
from records.plots import FAINT, PALETTE, STYLE, display_name, save_figure  # noqa: E402
from records.results import append_result, parse_settings, read_results  # noqa: E402
from records.significance import mean_and_std, paired_p, welch_p  # noqa: E402
from train_gpt import InputError  # noqa: E402

# --- 1. Grid -------------------------------------------------------------------------------------
# What is to be run, as data. A run is known by all its settings, spelled out: two variants that
# come to the same settings share their runs, and a change anywhere makes another run of it.

REFERENCE = "reference"  # the stack itself
MODES = ("add", "leave_out")
# Over a recipe, under the grid's own settings: a number of steps is what limits a run.
RUN_SETTINGS = {
    "MODE": "all",
    "EVAL_STRIDE": "0",
    "MAX_WALLCLOCK_SECONDS": "0",
    "EVAL_MAX_SECONDS": "0",
    "CHECKPOINT_EVERY_SECONDS": "0",
    "VAL_LOSS_EVERY": "0",
    "RESUME": "0",
}
# What the runner decides for each run; a grid must not.
OWN_KNOBS = {"ITERATIONS", "SEED", "RECIPE", "RUN_DIR", "RUN_ID"}


@dataclass(frozen=True)
class Variant:
    """A stack with some knobs changed; the mode says which of the two has the technique."""

    name: str
    mode: str  # "add", "leave_out", or REFERENCE
    overrides: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class GridStack:
    """A setting, and the variants of it that are compared with it."""

    name: str
    recipe: str
    settings: dict[str, str]  # over the recipe, as the grid gives them
    base: dict[str, str]  # recipe and settings, all that every run of the stack is set to
    steps: int
    seeds: list[int]
    variants: list[Variant]  # the reference first


@dataclass(frozen=True)
class Grid:
    """All that a grid file asks for."""

    path: Path
    data: str  # the command that makes the data set
    stacks: list[GridStack]

    @property
    def results(self) -> Path:
        return self.path.with_suffix(".jsonl")

    @property
    def timings(self) -> Path:
        return self.path.with_name(f"{self.path.stem}_time.jsonl")


def digest(settings: Any) -> str:
    """What identifies a run in the results."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    stack: GridStack
    variant: Variant
    seed: int

    @property
    def settings(self) -> dict[str, str]:
        """Every knob that the run is given, but for where it writes."""
        own = {"ITERATIONS": str(self.stack.steps), "SEED": str(self.seed)}
        return {**self.stack.base, **self.variant.overrides, **own}

    @property
    def key(self) -> str:
        return digest(self.settings)

    @property
    def name(self) -> str:
        return f"{self.stack.name}/{self.variant.name}"


def parse_overrides(text: Any, where: str) -> dict[str, str]:
    """The settings of a grid, which leaves to the runner what is the runner's."""
    settings = parse_settings(text, where)
    if own := [f"{where}: {name} is set by the runner" for name in settings if name in OWN_KNOBS]:
        raise InputError("; ".join(own))
    return settings


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """InputError if `table` has a key that means nothing."""
    if unknown := sorted(table.keys() - set(known)):
        raise InputError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")


def parse_variants(table: Mapping[str, Any], where: str) -> list[Variant]:
    """The variants of a stack, in the order of the file, behind the stack itself."""
    variants = [Variant(REFERENCE, REFERENCE, {})]
    for mode in MODES:
        for name, text in table.get(mode, {}).items():
            variants.append(Variant(name, mode, parse_overrides(text, f"{where}.{mode}.{name}")))
    twice = [name for name, count in Counter(v.name for v in variants).items() if count > 1]
    if twice:
        raise InputError(f"{where}: {', '.join(twice)} stands there twice or is a reserved name")
    return variants


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_stack(name: str, table: Mapping[str, Any], shared: Mapping[str, Any]) -> GridStack:
    """One stack; `shared` is the grid's top level, for what the stack does not say itself."""
    where = f"stacks.{name}"
    refuse_unknown(table, ("recipe", "settings", "steps", "seeds", *MODES), where)
    steps, seeds = (table.get(key, shared.get(key)) for key in ("steps", "seeds"))
    if not is_count(steps) or not steps:
        raise InputError(f"{where}: steps = {steps!r} is not a number of steps")
    if not isinstance(seeds, list) or not all(map(is_count, seeds)) or not set(seeds):
        raise InputError(f"{where}: seeds = {seeds!r} is not a list of seeds")
    recipe = str(table.get("recipe", ""))
    lines = train_gpt.read_recipe(ROOT / recipe) if recipe else {}
    settings = {
        **parse_overrides(shared.get("settings", ""), "settings"),
        **parse_overrides(table.get("settings", ""), f"{where}.settings"),
    }
    base = {**lines, **RUN_SETTINGS, **settings}
    return GridStack(
        name=name,
        recipe=recipe,
        settings=settings,
        base={key: value for key, value in base.items() if key not in OWN_KNOBS},
        steps=steps,
        seeds=list(dict.fromkeys(seeds)),
        variants=parse_variants(table, where),
    )


def read_grid(path: Path) -> Grid:
    """Read a grid file; InputError if it is not one."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        refuse_unknown(table, ("data", "steps", "seeds", "settings", "stacks"), "the top level")
        stacks = [parse_stack(name, part, table) for name, part in table.get("stacks", {}).items()]
    except (ValueError, AttributeError) as error:  # AttributeError: a value where a table should be
        raise InputError(f"{path}: {error}") from error
    if not stacks:
        raise InputError(f"{path}: no [stacks.NAME]")
    return Grid(path, str(table.get("data", "")), stacks)


AnyJob = TypeVar("AnyJob", bound=Job)


def each_once(jobs: Iterable[AnyJob]) -> list[AnyJob]:
    """The first job of every key."""
    once: dict[str, AnyJob] = {}
    for job in jobs:
        once.setdefault(job.key, job)
    return list(once.values())


def jobs_by_seed(grid: Grid) -> list[Job]:
    """The runs of every stack: the first seed of everything, then the second, and so on."""
    jobs = [
        (place, Job(stack, variant, seed))
        for stack in grid.stacks
        for variant in stack.variants
        for place, seed in enumerate(stack.seeds)
    ]
    jobs.sort(key=lambda pair: pair[0])  # stable: within a seed, the order of the file
    return [job for _, job in jobs]


def list_jobs(grid: Grid) -> list[Job]:
    """All runs, each once."""
    return each_once(jobs_by_seed(grid))


# --- 2. Results ----------------------------------------------------------------------------------
# One line a finished run, good or failed; of lines with the same key the last counts. The file is
# replaced as a whole, so that a kill at any moment leaves it with or without a line, never half.


def last_losses(log: RunLog) -> float:
    """Mean training loss over the last tenth of the logged steps."""
    losses = [event["train_loss"] for event in log.by_step("step")]
    return round(statistics.fmean(losses[-max(1, len(losses) // 10) :]), 6)


def origin_of(log: RunLog) -> Json:
    """The source that ran, and on what."""
    versions = {k: v for k, v in log.need("versions").items() if k != "event"}
    return {
        "source_sha256": versions.pop("source_sha256"),
        "hardware": log.need("hardware")["name"],
        "versions": versions,
    }


def collect_result(folder: Path) -> Json:
    """What a finished run measured, from its metrics."""
    log = RunLog.read(folder / METRICS)
    end, score = log.need("train_end"), log.need("final_quantized")
    return {
        "bpb_prequant": log.need("final_prequant")["val_bpb"],
        "bpb_quantized": score["val_bpb"],
        "train_loss": last_losses(log),
        "params": log.need("model")["params"],
        "artifact_bytes": log.need("size")["artifact_bytes"],
        "step_avg_ms": end["step_avg_ms"],
        "steps": end["steps"],
        "tokens": end["tokens"],
        "train_s": end["train_s"],
        "scored_bytes": score["bytes"],
        "scored_tokens": score["tokens"],
        **origin_of(log),
        "setting": run_settings(log),
    }


MAX_ERROR_CHARACTERS = 2_000


def describe_end(
    status: int, folder: Path, collect: Callable[[Path], Json] = collect_result
) -> Json:
    """The measurements of a run that ended with `status`, or an `error` that says why not."""
    console = (folder / "console").read_text(encoding="utf-8", errors="replace")
    ending = f"exit status {status}: {console[-MAX_ERROR_CHARACTERS:].strip()}"
    if status:
        return {"error": ending}
    try:
        return collect(folder)
    except (InputError, KeyError) as error:
        return {"error": f"{error!r}; {ending}"}


# --- 3. Running ----------------------------------------------------------------------------------
# Every run is a process of its own on a copy of the script, which may be edited meanwhile. Its
# files lie in the work folder until its line is written, those of a failed run until it is retried.

POLL_S = 0.05
MAX_FAILURES_IN_A_ROW = 5  # more than that is no variant's own fault
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class TooManyFailures(RuntimeError):
    """Run after run fails: something is wrong with all of them."""


@contextlib.contextmanager
def hold_lock(work: Path) -> Generator[None]:
    """Keep other runners out of the work folder; the lock ends with this process."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another runner is at work in {work}") from error
        yield


def copy_script(script: Path, work: Path) -> Path:
    """A copy of the script under its hash, to run all of this call's runs from."""
    source = script.read_bytes()
    copy = work / "sources" / hashlib.sha256(source).hexdigest()[:12] / "train_gpt.py"
    train_gpt.write_atomic(copy, source)
    return copy


def load_script(path: Path) -> ModuleType:
    """The script as a module of its own, for its knobs."""
    spec = importlib.util.spec_from_file_location("ablated_script", path)
    assert spec and spec.loader, f"{path} cannot be imported"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks up its annotations
    spec.loader.exec_module(module)
    return module


def refuse_bad_variants(grid: Grid, script: ModuleType) -> None:
    """InputError that names every variant that the script refuses, or that changes nothing."""
    problems = []
    for stack in grid.stacks:
        reference = None
        for variant in stack.variants:
            job = Job(stack, variant, stack.seeds[0])
            try:
                config = script.config_from_env(job.settings)
            except ValueError as error:
                problems.append(f"{job.name}: {error}")
                continue
            if config == reference:
                problems.append(f"{job.name}: changes nothing of the stack")
            reference = config if variant.mode == REFERENCE else reference
    if problems:
        raise InputError(f"{grid.path}:\n" + "\n".join(problems))


def run_environment(job: Job, folder: Path, work: Path, threads: int) -> dict[str, str]:
    """Variables of a run, its knobs not among them: threads, compiled code shared by all runs."""
    return {
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        **job.settings,
        "RUN_DIR": str(folder),
        "RUN_ID": job.key,
    }


@dataclass(kw_only=True)
class Runner:
    """Works off a queue of runs, several side by side."""

    # What the progress line of a run shows, by its name in the results.
    shown: ClassVar[Mapping[str, str]] = {"val_bpb": "bpb_quantized", "step_avg_ms": "step_avg_ms"}

    results: Path
    work: Path
    script: Path
    knobs: set[str]  # names that a run must not inherit
    side_by_side: int
    threads: int
    queue: list[Job]
    active: dict[subprocess.Popen[bytes], tuple[Job, float]] = field(default_factory=dict)
    finished_s: list[float] = field(default_factory=list)
    failures_in_a_row: int = 0

    def folder(self, job: Job) -> Path:
        return self.work / "runs" / job.key

    def start(self, job: Job) -> None:
        """Start a run in an empty folder, in a process group of its own."""
        folder = self.folder(job)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        inherited = {name: v for name, v in os.environ.items() if name not in self.knobs}
        with open(folder / "console", "wb") as console:
            process = subprocess.Popen(
                [sys.executable, str(self.script)],
                cwd=ROOT,
                env={**inherited, **run_environment(job, folder, self.work, self.threads)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the runner, which then ends its runs
            )
        self.active[process] = job, time.monotonic()

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Take in a run that has ended."""
        job, started_s = self.active.pop(process)
        end = describe_end(process.returncode, self.folder(job))
        self.write_down(job, time.monotonic() - started_s, end)

    def write_down(self, job: Job, elapsed_s: float, end: Json) -> None:
        """Make a line of a run; only that of a failed one leaves a folder."""
        result = {
            "key": job.key,
            "stack": job.stack.name,
            "variant": job.variant.name,
            "mode": job.variant.mode,
            "seed": job.seed,
            "overrides": job.variant.overrides,
            "elapsed_s": round(elapsed_s, 1),
            "finished": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
            "side_by_side": self.side_by_side,
            "threads": self.threads,
            **end,
        }
        append_result(self.results, result)
        self.finished_s.append(elapsed_s)
        self.failures_in_a_row = self.failures_in_a_row + 1 if "error" in end else 0
        if "error" not in end:
            shutil.rmtree(self.folder(job))
        self.report(job, end)

    def report(self, job: Job, end: Json) -> None:
        """The progress line of a finished run."""
        left = len(self.queue) + len(self.active)
        left_s = statistics.fmean(self.finished_s) * left / self.side_by_side
        measured = {name: end[key] for name, key in self.shown.items() if key in end}
        error = {"error": end["error"].splitlines()[-1]} if "error" in end else {}
        shown = {"variant": job.name, "seed": job.seed, **measured, **error}
        shown |= {"elapsed_s": round(self.finished_s[-1], 1), "left": left}
        print(train_gpt.format_event("run", **shown, left_h=round(left_s / 3600, 2)), flush=True)

    def work_off(self, deadline_s: float) -> None:
        """Run the queue; none is started after `deadline_s` of the monotonic clock."""
        try:
            while self.active or (self.queue and time.monotonic() < deadline_s):
                while (
                    self.queue
                    and len(self.active) < self.side_by_side
                    and time.monotonic() < deadline_s
                ):
                    self.start(self.queue.pop(0))
                time.sleep(POLL_S)
                for process in [p for p in self.active if p.poll() is not None]:
                    self.finish(process)
                if self.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise TooManyFailures(f"{self.failures_in_a_row} runs in a row failed")
        finally:
            for process in self.active:
                end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a run that is in progress, and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended by itself
    process.wait()


def is_due(result: Json | None, retry: bool) -> bool:
    """Whether a run with this result, if any, is to be run."""
    return result is None or (retry and "error" in result)


def run_missing(
    options: argparse.Namespace, grid: Grid, list_runs: Callable[[ModuleType], Sequence[Job]],
    kind: type[Runner], path: Path,
) -> int:  # fmt: skip
    """Run what the results in `path` do not have; 1 if a run of the grid has failed."""
    work = options.work.resolve()
    with hold_lock(work):
        script = copy_script(options.script, work)
        module = load_script(script)
        refuse_bad_variants(grid, module)
        jobs, results = list_runs(module), read_results(path)
        queue = [job for job in jobs if is_due(results.get(job.key), options.retry)]
        print(f"{len(jobs)} runs, {len(queue)} to do; the script is {script}", flush=True)
        runner = kind(
            results=path,
            work=work,
            script=script,
            knobs={f.name.upper() for f in fields(module.Config)},
            side_by_side=options.jobs,
            threads=options.threads,
            queue=queue,
        )
        runner.work_off(time.monotonic() + 3600 * options.hours)
    results = read_results(path)
    failed = [job for job in jobs if "error" in results.get(job.key, {})]
    done = sum(job.key in results for job in jobs)
    print(f"{done} of {len(jobs)} runs done, {len(failed)} of them failed", flush=True)
    return int(bool(failed))


def run_grid(options: argparse.Namespace) -> int:
    """The command `run`."""
    grid = read_grid(options.grid)
    return run_missing(options, grid, lambda script: list_jobs(grid), Runner, grid.results)


# --- 4. Step times -------------------------------------------------------------------------------
# A measurement is two short runs, one right after the other on the same core: the stack's, then the
# variant's. A machine that is slower now than then slows both; other work beside them may slow one.
# A schedule is a function of progress, so that a short run comes through all of it; where the steps
# differ, the average one is put together from the medians of the phases and their shares of the
# whole run.

# What has nothing to do with a step is kept short: validation, quantisation, the artifact.
SHORT_SETTINGS = {
    "MODE": "train",
    "TRAIN_LOG_EVERY": "1",
    "VAL_TOKENS_LIMIT": "1",
    "QUANTIZER": "rtn",
    "QUANT_GRID": "uniform",
    "ROW_STEPS": "max",
    "CLIP_SIGMAS": "",
    "CALIBRATION": "train",
    "COMPRESSOR": "zlib",
}
DROPPED_STEPS = 2  # at the start: caches and memory are still being filled


@dataclass(frozen=True)
class ShortRun(Job):
    """A run of a few steps: one part of a measurement."""

    phase_of: tuple[int, ...]  # the phase of each step; -1: one that the whole run does not have
    shares: tuple[float, ...]  # of the steps of the whole run, by phase
    base: ShortRun | None = None  # what runs before it, the stack itself
    then: ShortRun | None = None  # what runs after it, the variant

    @property
    def settings(self) -> dict[str, str]:
        return {**super().settings, **SHORT_SETTINGS, "ITERATIONS": str(len(self.phase_of))}

    @property
    def key(self) -> str:
        parts = [self.settings, self.base and self.base.settings, self.then and self.then.key]
        return digest(parts)

    @property
    def whole(self) -> Job:
        """The run whose step it measures."""
        return Job(self.stack, self.variant, self.seed)


def phases_by_step(script: ModuleType, settings: Mapping[str, str]) -> list[Any]:
    """The phase of every step of a run that only its number of steps limits."""
    cfg, stages = script.config_from_env(settings), []
    for step in range(cfg.iterations):
        # The trainer's own learning rate, of which some stages are a function.
        state = SimpleNamespace(run=SimpleNamespace(cfg=cfg), progress=script.Progress(step))
        scale = script.Trainer.scale(state)
        stages.append(script.phase_at(cfg, state.progress.fraction(cfg), scale))
    return stages


def counted_steps(phases: Sequence[Any]) -> list[int]:
    """The steps that are timed: not the first ones, nor the first of a later phase."""
    return [i for i in range(DROPPED_STEPS, len(phases)) if phases[i] == phases[i - 1]]


def shorten(script: ModuleType, job: Job, steps: int, base: ShortRun | None = None) -> ShortRun:
    """The short run of at least `steps` that counts a third as many of every phase."""
    whole = phases_by_step(script, job.settings)
    shares = {phase: count / len(whole) for phase, count in Counter(whole).items()}
    for num_steps in range(steps, 100 * steps):
        short = {**job.settings, **SHORT_SETTINGS, "ITERATIONS": str(num_steps)}
        phases = phases_by_step(script, short)
        counted = Counter(phases[i] for i in counted_steps(phases))
        if all(counted[phase] >= steps // 3 for phase in shares):
            order = list(shares)
            phase_of = tuple(order.index(p) if p in shares else -1 for p in phases)
            own = job.stack, job.variant, job.seed
            return ShortRun(*own, phase_of, tuple(shares.values()), base)
    raise InputError(f"{job.name}: a phase of its schedule is too short to be timed")


def collect_steps(part: ShortRun, folder: Path) -> Json:
    """What the steps of a short run took, and the average step of the whole run."""
    log = RunLog.read(folder / METRICS)
    log.need("train_end")
    train_s = [0.0, *(event["train_s"] for event in log.by_step("step"))]
    steps_ms = [round(1e3 * (train_s[i + 1] - train_s[i]), 1) for i in range(len(train_s) - 1)]
    if len(steps_ms) != len(part.phase_of):
        raise InputError(f"{log.path} has {len(steps_ms)} of {len(part.phase_of)} steps")
    counted = counted_steps(part.phase_of)
    medians_ms = [
        statistics.median(steps_ms[i] for i in counted if part.phase_of[i] == phase)
        for phase in range(len(part.shares))
    ]
    phases = [*zip(part.shares, medians_ms, strict=True)]
    return {
        "step_ms": round(sum(share * step_ms for share, step_ms in phases), 3),
        "phases": [{"share": round(share, 4), "step_ms": ms} for share, ms in phases],
        "steps_ms": steps_ms,
        **origin_of(log),
    }


def compare_steps(job: ShortRun, base: Json, end: Json) -> Json:
    """The measurements of a pair of short runs."""
    assert job.base, f"{job.name} has nothing to be compared with"
    return {
        "run": job.whole.key,
        "base_run": job.base.whole.key,
        "ratio": round(end["step_ms"] / base["step_ms"], 5),
        **end,
        "base_step_ms": base["step_ms"],
        "base_steps_ms": base["steps_ms"],
    }


def split_cores(jobs: int, threads: int) -> list[set[int]]:
    """Cores for each of `jobs` side by side; none where a process cannot be held on them."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs * threads:
        raise InputError(
            f"--jobs {jobs} of {threads} threads need as many cores; {len(cores)} are here"
        )
    return [set(cores[i * threads : (i + 1) * threads]) for i in range(jobs)]


@contextlib.contextmanager
def held_on(cores: set[int]) -> Generator[None]:
    """What is started within stays on these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(kw_only=True)
class Timer(Runner):
    """Works off a queue of measurements, each on cores of its own."""

    shown: ClassVar[Mapping[str, str]] = {
        "step_ms": "step_ms", "base_step_ms": "base_step_ms", "x_reference": "ratio",
    }  # fmt: skip

    free: list[set[int]] = field(init=False)
    cores: dict[str, set[int]] = field(default_factory=dict)  # of the measurements in progress
    bases: dict[str, tuple[Json, float]] = field(default_factory=dict)  # theirs, and their starts

    def __post_init__(self) -> None:
        self.free = split_cores(self.side_by_side, self.threads)

    def start(self, job: Job) -> None:
        """Start what comes next of a measurement: the base, or after it the variant."""
        assert isinstance(job, ShortRun) and job.base, f"{job.name} is not a measurement"
        is_second = job.key in self.bases
        if not is_second:
            self.cores[job.key] = self.free.pop()
        with held_on(self.cores[job.key]):
            super().start(job if is_second else replace(job.base, then=job))

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Take in a short run; after the base goes on with the variant, in the same minute."""
        part, started_s = self.active.pop(process)
        assert isinstance(part, ShortRun), f"{part.name} is not a short run"
        job, folder = part.then or part, self.folder(part)
        end = describe_end(process.returncode, folder, functools.partial(collect_steps, part))
        if part.then and "error" not in end:
            shutil.rmtree(folder)
            self.bases[job.key] = end, started_s
            self.start(job)
            return
        self.free.append(self.cores.pop(job.key))
        base, started_s = self.bases.pop(job.key, ({}, started_s))
        end = end if "error" in end else compare_steps(job, base, end)
        self.write_down(job, time.monotonic() - started_s, end)


def list_short_runs(grid: Grid, steps: int, num_seeds: int, script: ModuleType) -> list[ShortRun]:
    """All measurements on the first seeds of each stack; the stack itself is measured, too."""
    found = []
    for job in jobs_by_seed(grid):
        if job.seed in job.stack.seeds[:num_seeds]:
            base = shorten(script, replace(job, variant=job.stack.variants[0]), steps)
            found.append(shorten(script, job, steps, base))
    return each_once(found)


def time_grid(options: argparse.Namespace) -> int:
    """The command `time`."""
    grid = read_grid(options.grid)
    list_runs = functools.partial(list_short_runs, grid, options.steps, options.seeds)
    return run_missing(options, grid, list_runs, Timer, grid.timings)


# --- 5. Statistics -------------------------------------------------------------------------------
# A variant and its stack are compared on the seeds that both have. What a technique gains is what
# the bits per byte fall by where it is: from the stack to the variant if it is added, from the
# variant to the stack if it is left out.

GAIN_SIGN = {"add": -1.0, "leave_out": 1.0}


class Comparison(NamedTuple):
    """A variant against its stack, on the quantised score where nothing else is said."""

    variant: Variant
    runs: dict[int, Json]  # the finished runs by their seed, as in `references`
    references: dict[int, Json]
    differences: list[float]  # variant minus reference, of the seeds that both have

    @property
    def gains(self) -> list[float]:
        """What the technique gains, seed by seed."""
        return [GAIN_SIGN[self.variant.mode] * difference for difference in self.differences]

    @property
    def welch(self) -> float | None:
        """One-sided Welch test: p of such a gain if the technique gains nothing."""
        sides = (self.runs, self.references)[:: 1 if self.variant.mode == "add" else -1]
        return welch_p(*([run["bpb_quantized"] for run in runs.values()] for runs in sides))

    @property
    def paired(self) -> float | None:
        """The same by a one-sided t test of the seeds' differences; None if it is undefined."""
        return paired_p(self.gains)


def finished_runs(
    stack: GridStack, variant: Variant, results: Mapping[str, Json]
) -> dict[int, Json]:
    """The runs of a variant that did not fail, by their seed."""
    found = {seed: results.get(Job(stack, variant, seed).key) for seed in stack.seeds}
    return {seed: result for seed, result in found.items() if result and "error" not in result}


def paired(runs: Mapping[int, Json], references: Mapping[int, Json], key: str) -> list[float]:
    """Differences `runs` - `references` in `key`, of the seeds that both have."""
    return [runs[seed][key] - references[seed][key] for seed in runs if seed in references]


def compare(stack: GridStack, mode: str, results: Mapping[str, Json]) -> list[Comparison]:
    """The variants of one mode, the most useful technique first, what was not run yet last."""
    references = finished_runs(stack, stack.variants[0], results)
    found = []
    for variant in stack.variants:
        if variant.mode == mode:
            runs = finished_runs(stack, variant, results)
            differences = paired(runs, references, "bpb_quantized")
            found.append(Comparison(variant, runs, references, differences))
    return sorted(found, key=lambda c: -statistics.fmean(c.gains) if c.gains else math.inf)


# --- 6. Table ------------------------------------------------------------------------------------

HEADER = [
    "variant", "changed", "params", "bpb", "std", "n", "difference", "std of it", "p (paired)",
    "p (Welch)", "before quantization", "artifact bytes", "step ms", "x reference",
]  # fmt: skip
NO_COMPARISON = ["-"] * 6
MODE_TITLES = {"add": "Added, one at a time", "leave_out": "Left out, one at a time"}
EXPLANATION = """\
bpb: bits per byte of the artifact on the validation text that is scored (its bytes are below), in
windows of the training context without overlap; mean and standard deviation over n seeds.
Difference: variant minus reference, mean over the seeds that both have, and its standard deviation;
the same before quantization. p: that the technique gains as much by chance, one-sided, from the
differences of the seeds (paired) and from the scores as if the seeds had nothing in common (Welch);
the seed also decides the order of the data, so that the former sees smaller effects. Artifact
bytes: variant minus reference. Sorted by what the technique gains. The runs are short: what pays
only late in a long training shows less here."""
TIME_EXPLANATION = """\
Step ms: what the average step of the training takes, without compilation; x reference: over what
the reference's takes, which ran right before it on the same core. Compare these ratios: the ms of
two rows may lie hours apart. The reference's row is a measurement of it against itself: it differs
from 1 by chance alone. A time is the median of a few steps, and of the seeds if there are several;
where the schedule changes the steps, it is put together from the medians of its phases by their
shares of the training. The median does not see what less than half of the steps do: the averaging
of SWA and of the tail."""


def spell_overrides(overrides: Mapping[str, str]) -> str:
    """Settings as one writes them in a grid."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in overrides.items())


def mean_of(runs: Mapping[int, Json], key: str) -> float:
    return statistics.fmean(result[key] for result in runs.values())


def score_cells(runs: Mapping[int, Json]) -> list[str]:
    """Parameters, mean, deviation and number of runs."""
    if not runs:
        return ["-", "-", "-", "0"]
    mean, std = mean_and_std([result["bpb_quantized"] for result in runs.values()])
    shown_std = f"{std:.5f}" if len(runs) > 1 else "-"
    return [f"{mean_of(runs, 'params'):,.0f}", f"{mean:.5f}", shown_std, f"{len(runs)}"]


def comparison_cells(compared: Comparison) -> list[str]:
    """What a variant has in place of the reference's dashes."""
    differences, runs, references = compared.differences, compared.runs, compared.references
    if not differences:
        return NO_COMPARISON
    mean, std = mean_and_std(differences)
    before = statistics.fmean(paired(runs, references, "bpb_prequant"))
    return [
        f"{mean:+.5f}",
        f"{std:.5f}" if len(differences) > 1 else "-",
        *("-" if p is None else f"{p:.4f}" for p in (compared.paired, compared.welch)),
        f"{before:+.5f}",
        f"{statistics.fmean(paired(runs, references, 'artifact_bytes')):+,.0f}",
    ]


def timings_of(stack: GridStack, timings: Iterable[Json]) -> dict[str, Json]:
    """The measurements against this stack, by the run whose step they measure."""
    bases = {Job(stack, stack.variants[0], seed).key for seed in stack.seeds}
    good = [line for line in timings if "error" not in line]
    return {line["run"]: line for line in good if line["base_run"] in bases}


def time_cells(measured: Mapping[int, Json]) -> list[str]:
    """The step time of a variant and its ratio to the reference's."""
    if not measured:
        return ["-", "-"]
    step_ms, ratio = (
        statistics.median(line[key] for line in measured.values()) for key in ("step_ms", "ratio")
    )
    return [f"{step_ms:,.0f}", f"{ratio:.2f}"]


def format_timings(stack: GridStack, timings: Mapping[str, Json]) -> list[str]:
    """What the columns of the step times do not say: their spread, and steps that change."""
    if not timings:
        return []
    base_ms = [line["base_step_ms"] for line in timings.values()]
    lines = [
        f"Step of the reference, of {len(base_ms)} measurements: median "
        f"{statistics.median(base_ms):,.0f} ms, {min(base_ms):,.0f} to {max(base_ms):,.0f} ms."
    ]
    for variant in stack.variants:
        for line in [*finished_runs(stack, variant, timings).values()][:1]:
            phases = [f"{p['share']:.0%} at {p['step_ms']:,.0f} ms" for p in line["phases"]]
            if len(phases) > 1:
                lines.append(f"Steps of {variant.name}: {', '.join(phases)}.")
    return lines


def format_stack(
    stack: GridStack, results: Mapping[str, Json], timings: Iterable[Json]
) -> list[str]:
    """The tables of one stack, the reference at the head of each."""
    timed = timings_of(stack, timings)
    references = finished_runs(stack, stack.variants[0], results)
    setting = f"`{stack.recipe}`" if stack.recipe else "the defaults of `train_gpt.py`"
    if stack.settings:
        setting += f" with `{spell_overrides(stack.settings)}`"
    seeds = ", ".join(map(str, stack.seeds))
    lines = ["", f"## {stack.name}", "", f"Reference: {setting}."]
    trained = f"{stack.steps:,} steps"
    if references:
        trained += f" ({mean_of(references, 'tokens'):,.0f} tokens)"
    lines += [f"Every run: {trained}; seeds {seeds}.", *format_timings(stack, timed)]
    times = {v.name: time_cells(finished_runs(stack, v, timed)) for v in stack.variants}
    for mode, title in MODE_TITLES.items():
        if not (compared := compare(stack, mode, results)):
            continue
        rows = [[REFERENCE, "-", *score_cells(references), *NO_COMPARISON, *times[REFERENCE]]]
        for c in compared:
            name, change = c.variant.name, f"`{spell_overrides(c.variant.overrides)}`"
            rows.append([name, change, *score_cells(c.runs), *comparison_cells(c), *times[name]])
        lines += ["", f"### {title}", "", *table_lines(HEADER, rows)]
    return lines


def distinct(results: Sequence[Json], key: str) -> list[str]:
    """The values of `key`, each with the number of its runs if there are several."""
    counts = Counter(
        " ".join(f"{k} {v}" for k, v in r[key].items()) if isinstance(r[key], dict) else str(r[key])
        for r in results
    )
    return [f"{value} ({n} runs)" if len(counts) > 1 else value for value, n in counts.items()]


def shown_path(path: Path) -> str:
    """A path as it is typed at the root of the repository; outside of it, the name alone."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def format_origin(grid: Grid, done: Sequence[Json]) -> list[str]:
    """Commands, data, hardware, versions and sources of the runs that did not fail."""
    name = shown_path(grid.path)
    lines = [f"- Runs: `python records/ablations.py run {name}`; this file: the same with `table`."]
    if grid.data:
        lines.append(f"- Data: `{grid.data}`.")
    if not done:
        return lines
    return [
        *lines,
        f"- Scored: {', '.join(distinct(done, 'scored_bytes'))} bytes of validation text.",
        f"- Hardware: {format_hardware(done)}",
        f"- Versions: {'; '.join(distinct(done, 'versions'))}.",
        f"- SHA-256 of `train_gpt.py`: {'; '.join(distinct(done, 'source_sha256'))}.",
    ]


def format_hardware(done: Sequence[Json]) -> str:
    """What ran them, and how many at a time."""
    side_by_side, threads = (", ".join(distinct(done, key)) for key in ("side_by_side", "threads"))
    return (
        f"{'; '.join(distinct(done, 'hardware'))}. Runs side by side: {side_by_side}; "
        f"threads of each: {threads}."
    )


def format_time_origin(grid: Grid, timings: Sequence[Json]) -> list[str]:
    """Command, hardware and sources of the step times that are shown."""
    stacks = [timings_of(stack, timings) for stack in grid.stacks]
    if not (shown := [line for timed in stacks for line in timed.values()]):
        return []
    return [
        f"- Step times: `python records/ablations.py time {shown_path(grid.path)}`, ratios within "
        f"one measurement. {format_hardware(shown)}",
        f"- SHA-256 of `train_gpt.py` there: {'; '.join(distinct(shown, 'source_sha256'))}.",
    ]


def format_failures(jobs: Sequence[Job], results: Mapping[str, Json]) -> list[str]:
    """The runs that failed, with the last line of what they said."""
    lines = [
        f"- {job.name}, seed {job.seed}: {error.splitlines()[-1]}"
        for job in jobs
        if (error := results.get(job.key, {}).get("error"))
    ]
    return ["", "## Failed runs", "", *lines] if lines else []


def format_ablations(grid: Grid, results: Mapping[str, Json], timings: Sequence[Json] = ()) -> str:
    """The content of GRID.md."""
    jobs = list_jobs(grid)
    done = [results[job.key] for job in jobs if "error" not in results.get(job.key, {"error": ""})]
    compared = [c for stack in grid.stacks for mode in MODES for c in compare(stack, mode, results)]
    num_tests = sum(c.paired is not None for c in compared)
    command = f"python records/ablations.py table {shown_path(grid.path)}"
    origin = [*format_origin(grid, done), *(times := format_time_origin(grid, timings))]
    lines = ["# Ablations", "", f"Made by `{command}`: do not edit.", "", *EXPLANATION.splitlines()]
    if num_tests:
        lines.append(
            f"Of {num_tests} tests of a kind, {num_tests / 20:.1f} are below 0.05 by chance alone."
        )
    lines += ["", *TIME_EXPLANATION.splitlines()] if times else []
    lines += ["", f"- {len(done)} of {len(jobs)} runs are done.", *origin]
    lines += ["", f"![What each technique gains]({grid.path.stem}.png)"]
    for stack in grid.stacks:
        lines += format_stack(stack, results, timings)
    return "\n".join([*lines, *format_failures(jobs, results), ""])


# --- 7. Plot -------------------------------------------------------------------------------------
# One panel a stack, side by side: what each technique gains, a small dot a seed, and the standard
# error of the mean where there are two seeds or more. The axis shows the range of nearly all
# techniques; an outlier is drawn at its edge, as an arrow with the value.

MODE_COLORS = dict(zip(MODES, PALETTE, strict=False))
ROW_INCHES, MARGIN_INCHES, MIN_INCHES, WIDTH_INCHES = 0.175, 1.2, 3.0, 11.0
OUTLIER_FACTOR = 3.0  # times the 80th percentile of the absolute gains


def drawn(stack: GridStack, results: Mapping[str, Json]) -> list[Comparison]:
    """Return the comparisons of a stack that have a run, the best technique last: it is on top."""
    found = [c for mode in MODES for c in compare(stack, mode, results) if c.gains]
    return sorted(found, key=lambda c: statistics.fmean(c.gains))


def axis_limits(compared: Sequence[Comparison]) -> tuple[float, float]:
    """Return the range of the axis: all means that are no outliers, and 0."""
    means = [statistics.fmean(c.gains) for c in compared] or [0.0]
    sizes = sorted(map(abs, means))
    bound = OUTLIER_FACTOR * max(sizes[int(0.8 * (len(sizes) - 1))], 1e-4)
    shown = [0.0, *(mean for mean in means if abs(mean) <= bound)]
    margin = 0.15 * max(max(shown) - min(shown), 1e-3)
    return min(shown) - margin, max(shown) + margin


def draw_gain(axes: Axes, place: int, c: Comparison, limits: tuple[float, float]) -> None:
    """Draw the row of one technique."""
    mean, color = statistics.fmean(c.gains), MODE_COLORS[c.variant.mode]
    if not limits[0] <= mean <= limits[1]:
        edge, side = (limits[1], 1) if mean > 0 else (limits[0], -1)
        axes.plot(edge, place, ">" if side > 0 else "<", color=color, ms=5, clip_on=False)
        axes.annotate(
            f"{mean:+.3f}", (edge, place), xytext=(-7 * side, 0), textcoords="offset points",
            ha="right" if side > 0 else "left", va="center", fontsize=7, color=color,
        )  # fmt: skip
        return
    error = statistics.stdev(c.gains) / math.sqrt(len(c.gains)) if len(c.gains) > 1 else 0.0
    axes.plot(c.gains, [place] * len(c.gains), "o", color=FAINT, ms=2.5, alpha=0.7, zorder=2)
    axes.errorbar(
        mean, place, xerr=error, fmt="o", ms=5, color=color, mec="white", capsize=2, zorder=3
    )


def draw_stack(axes: Axes, stack: GridStack, compared: Sequence[Comparison]) -> None:
    """Draw the panel of one stack."""
    limits = axis_limits(compared)
    for place, comparison in enumerate(compared):
        draw_gain(axes, place, comparison, limits)
    axes.axvline(0, color=FAINT, lw=1)
    axes.set_xlim(*limits)
    axes.set_yticks(range(len(compared)), [display_name(c.variant.name) for c in compared])
    axes.tick_params(axis="y", labelsize=7.5, length=0)
    axes.set_ylim(-0.8, max(len(compared), 1) - 0.2)
    axes.set_title(display_name(stack.name))
    axes.set_xlabel("gain in bits per byte (right of 0: it helps)")


def draw_ablations(grid: Grid, results: Mapping[str, Json], path: Path) -> None:
    """Draw all stacks into the PNG file `path`, atomically."""
    panels = [(stack, drawn(stack, results)) for stack in grid.stacks]
    rows = max(len(compared) for _, compared in panels)
    height = max(MIN_INCHES, MARGIN_INCHES + ROW_INCHES * rows)
    modes = [m for m in MODES if any(c.variant.mode == m for _, cs in panels for c in cs)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(WIDTH_INCHES, height), squeeze=False, layout="constrained"
        )
        for (stack, compared), panel in zip(panels, axes[0], strict=True):
            draw_stack(panel, stack, compared)
        handles = [
            Line2D([], [], color=MODE_COLORS[mode], marker="o", ls="", label=MODE_TITLES[mode])
            for mode in modes
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        save_figure(figure, path)


def write_table(options: argparse.Namespace) -> int:
    """Write the table and the plot beside the results."""
    grid = read_grid(options.grid)
    results, timings = read_results(grid.results), [*read_results(grid.timings).values()]
    text = format_ablations(grid, results, timings)
    train_gpt.write_atomic(grid.path.with_suffix(".md"), text.encode())
    draw_ablations(grid, results, grid.path.with_suffix(".png"))
    return 0


# --- 8. Command line -----------------------------------------------------------------------------
# Exit status: 0, 1 if a run failed, 2 for unusable input, 130 for Ctrl-C.


def add_run_options(command: argparse.ArgumentParser) -> None:
    """The options of the commands that run something."""
    command.add_argument("--jobs", type=int, default=2, help="runs side by side (default 2)")
    command.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
    command.add_argument(
        "--hours", type=float, default=math.inf, help="start no run after that; 0: only check"
    )
    command.add_argument("--retry", action="store_true", help="the failed runs, too")
    command.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="what to run")
    command.add_argument(
        "--work", type=Path, default=ROOT / "logs/ablations", help="runs in progress, compiled code"
    )


COMMANDS = {"run": run_grid, "time": time_grid, "table": write_table}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is not usable."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="ablations.py", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run what the results do not have yet")
    timed = commands.add_parser("time", help="measure the steps that were not measured yet")
    timed.add_argument("--steps", type=int, default=12, help="of a short run, at least (12)")
    timed.add_argument("--seeds", type=int, default=1, help="how many of each stack's (1)")
    for command in (run, timed):
        add_run_options(command)
    table = commands.add_parser("table", help="write GRID.md and GRID.png from the results")
    for command in (run, timed, table):
        command.add_argument("grid", type=Path, metavar="GRID.toml")
    options = parser.parse_args(argv)
    if options.command != "table" and min(options.jobs, options.threads) < 1:
        parser.error("--jobs and --threads are at least 1")
    if options.command == "time" and (options.steps < 3 or options.seeds < 1):
        parser.error("--steps is at least 3, --seeds at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = parse_options(argv)
        return COMMANDS[options.command](options)
    except (InputError, OSError) as error:
        print(f"ablations.py: {error}", file=sys.stderr)
        return 2
    except TooManyFailures as error:
        print(f"ablations.py: {error}; after the cause is mended: --retry", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ablations.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same end as Ctrl-C
    sys.exit(main())
