"""Measures the effect of each technique: runs a grid of changed knobs times seeds.

    python records/ablations.py run GRID.toml --jobs 2      # run what GRID.jsonl does not have yet
    python records/ablations.py time GRID.toml --jobs 2     # measure step times: GRID_time.jsonl
    python records/ablations.py table GRID.toml             # write GRID.md and GRID.png from both

A grid has stacks: a recipe, settings that override it, and named variants. A variant changes some
knobs: it adds a technique to the stack (`add`) or removes one from it (`leave_out`):

    steps = 150                     # of every run, and seeds; a stack may set its own
    seeds = [1, 2, 3]
    settings = "DATA_PATH=data/x"   # of every stack, over its recipe
    data = "python data/prepare.py --input x.jsonl --out data/x"   # shown in the table, never run
    [stacks.baseline]
    recipe = "records/demo/cpu.env" # from the root of the repository; optional, as `settings` is
    settings = "XSA_LAST_N=0"
    [stacks.baseline.add]
    xsa = "XSA_LAST_N=4"
    [stacks.baseline.leave_out]
    leaky = "LEAKY_SLOPE=0"

Every run is a process of its own. When it ends it becomes a line of GRID.jsonl, under the hash of
all its settings. A runner that is killed loses only the runs in progress; started again, it
continues. After a change of the grid only the changed runs are made. Step times of runs that shared
the machine with other work mean nothing; `time` measures them separately and needs an idle machine.

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
# The runs as data. A run is identified by all its settings: two variants with equal settings share
# their runs, and any change of the settings makes it another run.

REFERENCE = "reference"  # the stack without a change
MODES = ("add", "leave_out")
# Settings between those of the recipe and those of the grid: only the number of steps limits a run.
RUN_SETTINGS = {
    "MODE": "all",
    "EVAL_STRIDE": "0",
    "MAX_WALLCLOCK_SECONDS": "0",
    "EVAL_MAX_SECONDS": "0",
    "CHECKPOINT_EVERY_SECONDS": "0",
    "VAL_LOSS_EVERY": "0",
    "RESUME": "0",
}
# Knobs that the runner sets for each run; a grid must not set them.
OWN_KNOBS = {"ITERATIONS", "SEED", "RECIPE", "RUN_DIR", "RUN_ID"}


@dataclass(frozen=True)
class Variant:
    """A change of knobs; the mode says whether it adds or removes the technique."""

    name: str
    mode: str  # "add", "leave_out", or REFERENCE
    overrides: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class GridStack:
    """A base configuration, and the variants that are compared with it."""

    name: str
    recipe: str
    settings: dict[str, str]  # over the recipe, as in the grid
    base: dict[str, str]  # recipe and settings: what all runs of the stack have in common
    steps: int
    seeds: list[int]
    variants: list[Variant]  # the reference first


@dataclass(frozen=True)
class Grid:
    """The content of a grid file."""

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
    """Return the hash that identifies a run in the results."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    stack: GridStack
    variant: Variant
    seed: int

    @property
    def settings(self) -> dict[str, str]:
        """All knobs of the run, without its output folder."""
        own = {"ITERATIONS": str(self.stack.steps), "SEED": str(self.seed)}
        return {**self.stack.base, **self.variant.overrides, **own}

    @property
    def key(self) -> str:
        return digest(self.settings)

    @property
    def name(self) -> str:
        return f"{self.stack.name}/{self.variant.name}"


def parse_overrides(text: Any, where: str) -> dict[str, str]:
    """Parse settings of a grid; raise InputError if they set a knob of the runner."""
    settings = parse_settings(text, where)
    if own := [f"{where}: {name} is set by the runner" for name in settings if name in OWN_KNOBS]:
        raise InputError("; ".join(own))
    return settings


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise InputError if `table` has an unknown key."""
    if unknown := sorted(table.keys() - set(known)):
        raise InputError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")


def parse_variants(table: Mapping[str, Any], where: str) -> list[Variant]:
    """Return the reference and the variants of a stack, in the order of the file."""
    variants = [Variant(REFERENCE, REFERENCE, {})]
    for mode in MODES:
        for name, text in table.get(mode, {}).items():
            variants.append(Variant(name, mode, parse_overrides(text, f"{where}.{mode}.{name}")))
    twice = [name for name, count in Counter(v.name for v in variants).items() if count > 1]
    if twice:
        raise InputError(f"{where}: {', '.join(twice)} is there twice or is a reserved name")
    return variants


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_stack(name: str, table: Mapping[str, Any], shared: Mapping[str, Any]) -> GridStack:
    """Parse one stack; `shared` is the grid's top level, with the values for all stacks."""
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
    """Read a grid file; raise InputError if it is not one."""
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
    """Return the first job of every key."""
    once: dict[str, AnyJob] = {}
    for job in jobs:
        once.setdefault(job.key, job)
    return list(once.values())


def jobs_by_seed(grid: Grid) -> list[Job]:
    """Return the runs of all stacks: the first seed of every variant, then the second, ..."""
    jobs = [
        (place, Job(stack, variant, seed))
        for stack in grid.stacks
        for variant in stack.variants
        for place, seed in enumerate(stack.seeds)
    ]
    jobs.sort(key=lambda pair: pair[0])  # stable: within a seed, the order of the file
    return [job for _, job in jobs]


def list_jobs(grid: Grid) -> list[Job]:
    """Return all runs, each once."""
    return each_once(jobs_by_seed(grid))


# --- 2. Results ----------------------------------------------------------------------------------
# One line for each finished run, also for failed ones; of lines with the same key the last counts.


def last_losses(log: RunLog) -> float:
    """Return the mean training loss over the last tenth of the logged steps."""
    losses = [event["train_loss"] for event in log.by_step("step")]
    return round(statistics.fmean(losses[-max(1, len(losses) // 10) :]), 6)


def origin_of(log: RunLog) -> Json:
    """Return hash of the source, hardware and versions of a run."""
    versions = {k: v for k, v in log.need("versions").items() if k != "event"}
    return {
        "source_sha256": versions.pop("source_sha256"),
        "hardware": log.need("hardware")["name"],
        "versions": versions,
    }


def collect_result(folder: Path) -> Json:
    """Return the measurements of a finished run from its metrics."""
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
    """Return the measurements of a run that ended with `status`, or its `error`."""
    console = (folder / "console").read_text(encoding="utf-8", errors="replace")
    ending = f"exit status {status}: {console[-MAX_ERROR_CHARACTERS:].strip()}"
    if status:
        return {"error": ending}
    try:
        return collect(folder)
    except (InputError, KeyError) as error:
        return {"error": f"{error!r}; {ending}"}


# --- 3. Running ----------------------------------------------------------------------------------
# Every run is a process that runs a copy of the script, so that the script may be edited meanwhile.
# The work folder keeps the files of a run until its line is written, of a failed run until a retry.

POLL_S = 0.05
MAX_FAILURES_IN_A_ROW = 5  # more of them have a common cause
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class TooManyFailures(RuntimeError):
    """Several runs in a row failed: the cause is common to all of them."""


@contextlib.contextmanager
def hold_lock(work: Path) -> Generator[None]:
    """Lock the work folder against other runners; the lock ends with this process."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another runner uses {work}; wait for it or set --work") from error
        yield


def copy_script(script: Path, work: Path) -> Path:
    """Copy the script into the work folder, under its hash; return the copy."""
    source = script.read_bytes()
    copy = work / "sources" / hashlib.sha256(source).hexdigest()[:12] / "train_gpt.py"
    train_gpt.write_atomic(copy, source)
    return copy


def load_script(path: Path) -> ModuleType:
    """Import a script as a module of its own."""
    spec = importlib.util.spec_from_file_location("ablated_script", path)
    assert spec and spec.loader, f"{path} cannot be imported"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks up its annotations
    spec.loader.exec_module(module)
    return module


def refuse_bad_variants(grid: Grid, script: ModuleType) -> None:
    """Raise InputError if the script refuses a variant, or if a variant changes nothing."""
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
    """Return the environment of a run: its knobs, threads, a shared cache of compiled code."""
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
    """Runs a queue of jobs, several side by side."""

    # What the progress line shows: its key there, and its key in the results.
    shown: ClassVar[Mapping[str, str]] = {"val_bpb": "bpb_quantized", "step_avg_ms": "step_avg_ms"}

    results: Path
    work: Path
    script: Path
    knobs: set[str]  # environment variables that a run must not inherit
    side_by_side: int
    threads: int
    queue: list[Job]
    active: dict[subprocess.Popen[bytes], tuple[Job, float]] = field(default_factory=dict)
    finished_s: list[float] = field(default_factory=list)
    failures_in_a_row: int = 0

    def folder(self, job: Job) -> Path:
        return self.work / "runs" / job.key

    def start(self, job: Job) -> None:
        """Start a run in an empty folder and in its own process group."""
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
                start_new_session=True,  # Ctrl-C reaches the runner, which then stops its runs
            )
        self.active[process] = job, time.monotonic()

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Record a run that has ended."""
        job, started_s = self.active.pop(process)
        end = describe_end(process.returncode, self.folder(job))
        self.record(job, time.monotonic() - started_s, end)

    def record(self, job: Job, elapsed_s: float, end: Json) -> None:
        """Append the line of a run; only a failed run keeps its folder."""
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
        """Print the progress line of a finished run."""
        left = len(self.queue) + len(self.active)
        left_s = statistics.fmean(self.finished_s) * left / self.side_by_side
        measured = {name: end[key] for name, key in self.shown.items() if key in end}
        error = {"error": end["error"].splitlines()[-1]} if "error" in end else {}
        shown = {"variant": job.name, "seed": job.seed, **measured, **error}
        shown |= {"elapsed_s": round(self.finished_s[-1], 1), "left": left}
        print(train_gpt.format_event("run", **shown, left_h=round(left_s / 3600, 2)), flush=True)

    def run_all(self, deadline_s: float) -> None:
        """Run the queue; start no run after `deadline_s` of the monotonic clock."""
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
    """Kill a run that is in progress and all processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended already
    process.wait()


def is_due(result: Json | None, retry: bool) -> bool:
    """Return whether a run with this result, or with none, must run."""
    return result is None or (retry and "error" in result)


def run_missing(
    options: argparse.Namespace, grid: Grid, list_runs: Callable[[ModuleType], Sequence[Job]],
    kind: type[Runner], path: Path,
) -> int:  # fmt: skip
    """Run what the results in `path` do not have; return 1 if a run of the grid has failed."""
    work = options.work.resolve()
    with hold_lock(work):
        script = copy_script(options.script, work)
        module = load_script(script)
        refuse_bad_variants(grid, module)
        jobs, results = list_runs(module), read_results(path)
        queue = [job for job in jobs if is_due(results.get(job.key), options.retry)]
        print(f"{len(jobs)} runs, {len(queue)} to do; script: {script}", flush=True)
        runner = kind(
            results=path,
            work=work,
            script=script,
            knobs={f.name.upper() for f in fields(module.Config)},
            side_by_side=options.jobs,
            threads=options.threads,
            queue=queue,
        )
        runner.run_all(time.monotonic() + 3600 * options.hours)
    results = read_results(path)
    failed = [job for job in jobs if "error" in results.get(job.key, {})]
    done = sum(job.key in results for job in jobs)
    print(f"{done} of {len(jobs)} runs done, {len(failed)} of them failed", flush=True)
    return int(bool(failed))


def run_grid(options: argparse.Namespace) -> int:
    """Run the command `run`; return the exit status."""
    grid = read_grid(options.grid)
    return run_missing(options, grid, lambda script: list_jobs(grid), Runner, grid.results)


# --- 4. Step times -------------------------------------------------------------------------------
# A measurement is two short runs, one directly after the other on the same core: first the stack,
# then the variant. A machine that is slower for a while slows both. Schedules are functions of
# progress, so a short run goes through all training stages. If the steps of the stages differ, the
# average step is the sum of their medians, weighted with their shares of the whole run.

# Parts that have nothing to do with a step are made short: validation, quantization, the artifact.
SHORT_SETTINGS = {
    "MODE": "train",
    "TRAIN_LOG_EVERY": "1",
    "VAL_TOKENS_LIMIT": "1",
    "QUANTIZER": "rtn",
    "QUANT_GRID": "uniform",
    "ROW_STEPS": "max",
    "CLIP_SIGMAS": "",
    "COMPRESSOR": "zlib",
}
DROPPED_STEPS = 2  # at the start, while caches and memory are being filled


@dataclass(frozen=True)
class ShortRun(Job):
    """A run of a few steps: one half of a measurement."""

    stage_of_step: tuple[int, ...]  # -1: a stage that the whole run does not have
    shares: tuple[float, ...]  # share of each stage in the steps of the whole run
    base: ShortRun | None = None  # the run of the stack before it
    then: ShortRun | None = None  # the run of the variant after it

    @property
    def settings(self) -> dict[str, str]:
        return {**super().settings, **SHORT_SETTINGS, "ITERATIONS": str(len(self.stage_of_step))}

    @property
    def key(self) -> str:
        parts = [self.settings, self.base and self.base.settings, self.then and self.then.key]
        return digest(parts)

    @property
    def whole(self) -> Job:
        """The whole run whose step time is measured."""
        return Job(self.stack, self.variant, self.seed)


def stages_by_step(script: ModuleType, settings: Mapping[str, str]) -> list[Any]:
    """Return the training stage of every step of a run that only its number of steps limits."""
    cfg, stages = script.config_from_env(settings), []
    for step in range(cfg.iterations):
        # The trainer's own learning rate, of which some stages are a function.
        state = SimpleNamespace(run=SimpleNamespace(cfg=cfg), progress=script.Progress(step))
        scale = script.Trainer.lr_scale(state)
        stages.append(script.train_stage_at(cfg, state.progress.fraction(cfg), scale))
    return stages


def counted_steps(stages: Sequence[Any]) -> list[int]:
    """Return the steps that are timed: neither the first ones nor the first of a later stage."""
    return [i for i in range(DROPPED_STEPS, len(stages)) if stages[i] == stages[i - 1]]


def shorten(script: ModuleType, job: Job, steps: int, base: ShortRun | None = None) -> ShortRun:
    """Return the short run of at least `steps` steps that times steps // 3 of every stage."""
    whole = stages_by_step(script, job.settings)
    shares = {stage: count / len(whole) for stage, count in Counter(whole).items()}
    for num_steps in range(steps, 100 * steps):
        short = {**job.settings, **SHORT_SETTINGS, "ITERATIONS": str(num_steps)}
        stages = stages_by_step(script, short)
        counted = Counter(stages[i] for i in counted_steps(stages))
        if all(counted[stage] >= steps // 3 for stage in shares):
            order = list(shares)
            stage_of_step = tuple(order.index(s) if s in shares else -1 for s in stages)
            own = job.stack, job.variant, job.seed
            return ShortRun(*own, stage_of_step, tuple(shares.values()), base)
    raise InputError(f"{job.name}: a stage of its schedule is too short to be timed")


def collect_steps(part: ShortRun, folder: Path) -> Json:
    """Return the step times of a short run, and the average step time of the whole run."""
    log = RunLog.read(folder / METRICS)
    log.need("train_end")
    train_s = [0.0, *(event["train_s"] for event in log.by_step("step"))]
    steps_ms = [round(1e3 * (train_s[i + 1] - train_s[i]), 1) for i in range(len(train_s) - 1)]
    if len(steps_ms) != len(part.stage_of_step):
        raise InputError(f"{log.path} has {len(steps_ms)} of {len(part.stage_of_step)} steps")
    counted = counted_steps(part.stage_of_step)
    medians_ms = [
        statistics.median(steps_ms[i] for i in counted if part.stage_of_step[i] == stage)
        for stage in range(len(part.shares))
    ]
    stages = [*zip(part.shares, medians_ms, strict=True)]
    return {
        "step_ms": round(sum(share * step_ms for share, step_ms in stages), 3),
        "phases": [{"share": round(share, 4), "step_ms": ms} for share, ms in stages],
        "steps_ms": steps_ms,
        **origin_of(log),
    }


def compare_steps(job: ShortRun, base: Json, end: Json) -> Json:
    """Return the measurements of a pair of short runs."""
    assert job.base, f"{job.name} has no base run"
    return {
        "run": job.whole.key,
        "base_run": job.base.whole.key,
        "ratio": round(end["step_ms"] / base["step_ms"], 5),
        **end,
        "base_step_ms": base["step_ms"],
        "base_steps_ms": base["steps_ms"],
    }


def split_cores(jobs: int, threads: int) -> list[set[int]]:
    """Return the cores of each of `jobs` side by side; none if processes cannot be pinned."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < jobs * threads:
        raise InputError(
            f"--jobs {jobs} with --threads {threads} needs {jobs * threads} cores; "
            f"{len(cores)} are available"
        )
    return [set(cores[i * threads : (i + 1) * threads]) for i in range(jobs)]


@contextlib.contextmanager
def pinned_to(cores: set[int]) -> Generator[None]:
    """Pin processes that are started within the block to these cores."""
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
    """Runs a queue of measurements, each on its own cores."""

    shown: ClassVar[Mapping[str, str]] = {
        "step_ms": "step_ms", "base_step_ms": "base_step_ms", "x_reference": "ratio",
    }  # fmt: skip

    free: list[set[int]] = field(init=False)
    cores: dict[str, set[int]] = field(default_factory=dict)  # of the measurements in progress
    bases: dict[str, tuple[Json, float]] = field(default_factory=dict)  # base results and starts

    def __post_init__(self) -> None:
        self.free = split_cores(self.side_by_side, self.threads)

    def start(self, job: Job) -> None:
        """Start the next half of a measurement: the base, or the variant after it."""
        assert isinstance(job, ShortRun) and job.base, f"{job.name} is not a measurement"
        is_second = job.key in self.bases
        if not is_second:
            self.cores[job.key] = self.free.pop()
        with pinned_to(self.cores[job.key]):
            super().start(job if is_second else replace(job.base, then=job))

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Record a short run; after the base, start the variant at once."""
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
        self.record(job, time.monotonic() - started_s, end)


def list_short_runs(grid: Grid, steps: int, num_seeds: int, script: ModuleType) -> list[ShortRun]:
    """Return all measurements on the first seeds of each stack; the reference is one of them."""
    found = []
    for job in jobs_by_seed(grid):
        if job.seed in job.stack.seeds[:num_seeds]:
            base = shorten(script, replace(job, variant=job.stack.variants[0]), steps)
            found.append(shorten(script, job, steps, base))
    return each_once(found)


def time_grid(options: argparse.Namespace) -> int:
    """Run the command `time`; return the exit status."""
    grid = read_grid(options.grid)
    list_runs = functools.partial(list_short_runs, grid, options.steps, options.seeds)
    return run_missing(options, grid, list_runs, Timer, grid.timings)


# --- 5. Statistics -------------------------------------------------------------------------------
# A variant and its stack are compared on the seeds that both have. The gain of a technique is the
# decrease in bits per byte that it causes: from the stack to the variant if it is added, from the
# variant to the stack if it is left out.

GAIN_SIGN = {"add": -1.0, "leave_out": 1.0}


class Comparison(NamedTuple):
    """A variant compared with its stack, by the score of the quantized model."""

    variant: Variant
    runs: dict[int, Json]  # the finished runs by their seed, as in `references`
    references: dict[int, Json]
    differences: list[float]  # variant minus reference, of the seeds that both have

    @property
    def gains(self) -> list[float]:
        """The gain of the technique for each seed."""
        return [GAIN_SIGN[self.variant.mode] * difference for difference in self.differences]

    @property
    def welch(self) -> float | None:
        """The p-value of Welch's one-sided test that the technique gains."""
        sides = (self.runs, self.references)[:: 1 if self.variant.mode == "add" else -1]
        return welch_p(*([run["bpb_quantized"] for run in runs.values()] for runs in sides))

    @property
    def paired(self) -> float | None:
        """The p-value of the one-sided t test, paired by seed; None if it is undefined."""
        return paired_p(self.gains)


def finished_runs(
    stack: GridStack, variant: Variant, results: Mapping[str, Json]
) -> dict[int, Json]:
    """Return the runs of a variant that did not fail, by seed."""
    found = {seed: results.get(Job(stack, variant, seed).key) for seed in stack.seeds}
    return {seed: result for seed, result in found.items() if result and "error" not in result}


def paired(runs: Mapping[int, Json], references: Mapping[int, Json], key: str) -> list[float]:
    """Return the differences `runs` - `references` in `key` for the seeds that both have."""
    return [runs[seed][key] - references[seed][key] for seed in runs if seed in references]


def compare(stack: GridStack, mode: str, results: Mapping[str, Json]) -> list[Comparison]:
    """Return the variants of one mode, sorted by gain; those that have not run yet come last."""
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
bpb: bits per byte of the artifact on the scored validation text (bytes below), in disjoint windows
of the training context; mean and standard deviation over n seeds. difference: variant minus
reference, mean over the seeds that both have, with its standard deviation; before quantization: the
same for the unquantized model. p: one-sided p-value of the gain, from the differences of the seeds
(paired) and from the scores as independent samples (Welch). The seed also sets the order of the
data, so the paired test detects smaller effects. artifact bytes: variant minus reference. Rows are
sorted by the gain of the technique. The runs are short: effects that appear late in a long training
are underestimated."""
TIME_EXPLANATION = """\
step ms: time of the average training step, without compilation. x reference: this time divided by
that of the reference, which ran directly before on the same core. Compare the ratios; the times of
two rows may have been measured hours apart. The row of the reference compares it with itself: its
distance from 1 is noise. A time is the median of a few steps, and of the seeds if there are
several. If the schedule changes the steps, it is the sum of the medians of the training stages,
weighted with their shares of the training. The median ignores work that fewer than half of the
steps do, such as the averaging of SWA and of the tail."""


def format_overrides(overrides: Mapping[str, str]) -> str:
    """Return settings as a grid writes them."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in overrides.items())


def mean_of(runs: Mapping[int, Json], key: str) -> float:
    return statistics.fmean(result[key] for result in runs.values())


def score_cells(runs: Mapping[int, Json]) -> list[str]:
    """Return the cells with parameters, mean, standard deviation and number of runs."""
    if not runs:
        return ["-", "-", "-", "0"]
    mean, std = mean_and_std([result["bpb_quantized"] for result in runs.values()])
    shown_std = f"{std:.5f}" if len(runs) > 1 else "-"
    return [f"{mean_of(runs, 'params'):,.0f}", f"{mean:.5f}", shown_std, f"{len(runs)}"]


def comparison_cells(compared: Comparison) -> list[str]:
    """Return the cells that compare a variant with the reference."""
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
    """Return the step times that were measured against this stack, by the key of the run."""
    bases = {Job(stack, stack.variants[0], seed).key for seed in stack.seeds}
    good = [line for line in timings if "error" not in line]
    return {line["run"]: line for line in good if line["base_run"] in bases}


def time_cells(measured: Mapping[int, Json]) -> list[str]:
    """Return the cells with the step time of a variant and its ratio to the reference."""
    if not measured:
        return ["-", "-"]
    step_ms, ratio = (
        statistics.median(line[key] for line in measured.values()) for key in ("step_ms", "ratio")
    )
    return [f"{step_ms:,.0f}", f"{ratio:.2f}"]


def format_timings(stack: GridStack, timings: Mapping[str, Json]) -> list[str]:
    """Return lines with the spread of the step times, and with the times of training stages."""
    if not timings:
        return []
    base_ms = [line["base_step_ms"] for line in timings.values()]
    lines = [
        f"Step time of the reference in {len(base_ms)} measurements: median "
        f"{statistics.median(base_ms):,.0f} ms, {min(base_ms):,.0f} to {max(base_ms):,.0f} ms."
    ]
    for variant in stack.variants:
        for line in [*finished_runs(stack, variant, timings).values()][:1]:
            stages = [f"{p['share']:.0%} at {p['step_ms']:,.0f} ms" for p in line["phases"]]
            if len(stages) > 1:
                lines.append(f"Steps of {variant.name}: {', '.join(stages)}.")
    return lines


def format_stack(
    stack: GridStack, results: Mapping[str, Json], timings: Iterable[Json]
) -> list[str]:
    """Return the tables of one stack; the first row of each is the reference."""
    timed = timings_of(stack, timings)
    references = finished_runs(stack, stack.variants[0], results)
    setting = f"`{stack.recipe}`" if stack.recipe else "the defaults of `train_gpt.py`"
    if stack.settings:
        setting += f" with `{format_overrides(stack.settings)}`"
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
            name, change = c.variant.name, f"`{format_overrides(c.variant.overrides)}`"
            rows.append([name, change, *score_cells(c.runs), *comparison_cells(c), *times[name]])
        lines += ["", f"### {title}", "", *table_lines(HEADER, rows)]
    return lines


def distinct(results: Sequence[Json], key: str) -> list[str]:
    """Return the values of `key`, with the number of runs of each if there are several."""
    counts = Counter(
        " ".join(f"{k} {v}" for k, v in r[key].items()) if isinstance(r[key], dict) else str(r[key])
        for r in results
    )
    return [f"{value} ({n} runs)" if len(counts) > 1 else value for value, n in counts.items()]


def shown_path(path: Path) -> str:
    """Return a path as seen from the root of the repository; outside of it, only the name."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def format_origin(grid: Grid, done: Sequence[Json]) -> list[str]:
    """Return commands, data, hardware, versions and sources of the runs that did not fail."""
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
    """Return the hardware, and how many runs shared it."""
    side_by_side, threads = (", ".join(distinct(done, key)) for key in ("side_by_side", "threads"))
    return (
        f"{'; '.join(distinct(done, 'hardware'))}. Runs side by side: {side_by_side}; "
        f"threads of each: {threads}."
    )


def format_time_origin(grid: Grid, timings: Sequence[Json]) -> list[str]:
    """Return command, hardware and sources of the step times in the table."""
    stacks = [timings_of(stack, timings) for stack in grid.stacks]
    if not (shown := [line for timed in stacks for line in timed.values()]):
        return []
    return [
        f"- Step times: `python records/ablations.py time {shown_path(grid.path)}`; both halves of "
        f"a ratio were measured together. {format_hardware(shown)}",
        f"- SHA-256 of `train_gpt.py` for step times: "
        f"{'; '.join(distinct(shown, 'source_sha256'))}.",
    ]


def format_failures(jobs: Sequence[Job], results: Mapping[str, Json]) -> list[str]:
    """Return the runs that failed, with the last line of their output."""
    lines = [
        f"- {job.name}, seed {job.seed}: {error.splitlines()[-1]}"
        for job in jobs
        if (error := results.get(job.key, {}).get("error"))
    ]
    return ["", "## Failed runs", "", *lines] if lines else []


def format_ablations(grid: Grid, results: Mapping[str, Json], timings: Sequence[Json] = ()) -> str:
    """Return the content of GRID.md."""
    jobs = list_jobs(grid)
    done = [results[job.key] for job in jobs if "error" not in results.get(job.key, {"error": ""})]
    compared = [c for stack in grid.stacks for mode in MODES for c in compare(stack, mode, results)]
    num_tests = sum(c.paired is not None for c in compared)
    command = f"python records/ablations.py table {shown_path(grid.path)}"
    origin = [*format_origin(grid, done), *(times := format_time_origin(grid, timings))]
    lines = [
        "# Ablations",
        "",
        f"Generated by `{command}`; do not edit.",
        "",
        *EXPLANATION.splitlines(),
    ]
    if num_tests:
        lines.append(
            f"Of {num_tests} tests, {num_tests / 20:.1f} are expected to be below 0.05 by chance."
        )
    lines += ["", *TIME_EXPLANATION.splitlines()] if times else []
    lines += ["", f"- {len(done)} of {len(jobs)} runs are done.", *origin]
    lines += ["", f"![Gain of each technique]({grid.path.stem}.png)"]
    for stack in grid.stacks:
        lines += format_stack(stack, results, timings)
    return "\n".join([*lines, *format_failures(jobs, results), ""])


# --- 7. Plot -------------------------------------------------------------------------------------
# One panel for each stack: the gain of each technique, a small dot for each seed, and the standard
# error of the mean if there are two seeds or more. The axis covers nearly all techniques; outliers
# are arrows at its edge, with their values.

MODE_COLORS = dict(zip(MODES, PALETTE, strict=False))
ROW_INCHES, MARGIN_INCHES, MIN_INCHES, WIDTH_INCHES = 0.175, 1.2, 3.0, 11.0
OUTLIER_FACTOR = 3.0  # times the 80th percentile of the absolute gains


def drawn(stack: GridStack, results: Mapping[str, Json]) -> list[Comparison]:
    """Return the comparisons of a stack that have a run, the best technique last: it is on top."""
    found = [c for mode in MODES for c in compare(stack, mode, results) if c.gains]
    return sorted(found, key=lambda c: statistics.fmean(c.gains))


def axis_limits(compared: Sequence[Comparison]) -> tuple[float, float]:
    """Return the range of the axis: all means that are not outliers, and 0."""
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
    """Write the table and the plot beside the results; return the exit status."""
    grid = read_grid(options.grid)
    results, timings = read_results(grid.results), [*read_results(grid.timings).values()]
    text = format_ablations(grid, results, timings)
    train_gpt.write_atomic(grid.path.with_suffix(".md"), text.encode())
    draw_ablations(grid, results, grid.path.with_suffix(".png"))
    return 0


# --- 8. Command line -----------------------------------------------------------------------------
# Exit status: 0; 1 if a run failed; 2 for unusable input; 130 for Ctrl-C.


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Add the options of the commands that run something."""
    command.add_argument("--jobs", type=int, default=2, help="runs side by side (default 2)")
    command.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
    command.add_argument(
        "--hours", type=float, default=math.inf, help="start no run after that; 0 = only check"
    )
    command.add_argument("--retry", action="store_true", help="run the failed ones again, too")
    command.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="what to run")
    command.add_argument(
        "--work", type=Path, default=ROOT / "logs/ablations", help="folder of runs in progress"
    )


COMMANDS = {"run": run_grid, "time": time_grid, "table": write_table}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and a message if it is not usable."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="ablations.py", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run what the results do not have yet")
    timed = commands.add_parser("time", help="measure step times that the results do not have yet")
    timed.add_argument("--steps", type=int, default=12, help="least steps of a short run (12)")
    timed.add_argument("--seeds", type=int, default=1, help="seeds of each stack (1)")
    for command in (run, timed):
        add_run_options(command)
    table = commands.add_parser("table", help="write GRID.md and GRID.png from the results")
    for command in (run, timed, table):
        command.add_argument("grid", type=Path, metavar="GRID.toml")
    options = parser.parse_args(argv)
    if options.command != "table" and min(options.jobs, options.threads) < 1:
        parser.error("--jobs and --threads must be at least 1")
    if options.command == "time" and (options.steps < 3 or options.seeds < 1):
        parser.error("--steps must be at least 3, --seeds at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    try:
        options = parse_options(argv)
        return COMMANDS[options.command](options)
    except (InputError, OSError) as error:
        print(f"ablations.py: {error}", file=sys.stderr)
        return 2
    except TooManyFailures as error:
        print(f"ablations.py: {error}; fix the cause and run with --retry", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ablations.py: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handle it as Ctrl-C
    sys.exit(main())
