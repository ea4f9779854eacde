"""What each technique is worth: a grid of changed knobs times seeds, run, tabulated and drawn.

    python records/ablations.py run GRID.toml --jobs 2      # what GRID.jsonl does not have yet
    python records/ablations.py table GRID.toml             # write GRID.md and GRID.png from it

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
grid that was changed, only what changed is run.

Sections: 1. Grid  2. Results  3. Running  4. Statistics  5. Table  6. Plot  7. Command line
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
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
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Of a script, the own folder comes first on the path: records.py would hide the folder records.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "records")]

from matplotlib import pyplot as plt  # noqa: E402  (the path above makes the imports possible)
from matplotlib.axes import Axes  # noqa: E402

import train_gpt  # noqa: E402
from records.records import (  # noqa: E402
    FAINT,
    METRICS,
    SEED_COLORS,
    STYLE,
    Json,
    RunLog,
    append_result,
    mean_and_std,
    paired_p,
    parse_settings,
    read_results,
    setting_of,
    table_lines,
    welch_p,
)
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
class Stack:
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
    stacks: list[Stack]

    @property
    def results(self) -> Path:
        return self.path.with_suffix(".jsonl")


@dataclass(frozen=True)
class Job:
    """One run of a grid."""

    stack: Stack
    variant: Variant
    seed: int

    @property
    def settings(self) -> dict[str, str]:
        """Every knob that the run is given, but for where it writes."""
        own = {"ITERATIONS": str(self.stack.steps), "SEED": str(self.seed)}
        return {**self.stack.base, **self.variant.overrides, **own}

    @property
    def key(self) -> str:
        """What identifies the run in the results."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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


def parse_stack(name: str, table: Mapping[str, Any], shared: Mapping[str, Any]) -> Stack:
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
    return Stack(
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


def list_jobs(grid: Grid) -> list[Job]:
    """All runs, each once: the first seed of everything, then the second, and so on."""
    jobs = [
        (place, Job(stack, variant, seed))
        for stack in grid.stacks
        for variant in stack.variants
        for place, seed in enumerate(stack.seeds)
    ]
    jobs.sort(key=lambda pair: pair[0])  # stable: within a seed, the order of the file
    once: dict[str, Job] = {}
    for _, job in jobs:
        once.setdefault(job.key, job)
    return list(once.values())


# --- 2. Results ----------------------------------------------------------------------------------
# One line a finished run, good or failed; of lines with the same key the last counts. The file is
# replaced as a whole, so that a kill at any moment leaves it with or without a line, never half.


def last_losses(log: RunLog) -> float:
    """Mean training loss over the last tenth of the logged steps."""
    losses = [event["train_loss"] for event in log.by_step("step")]
    return round(statistics.fmean(losses[-max(1, len(losses) // 10) :]), 6)


def collect_result(folder: Path) -> Json:
    """What a finished run measured, from its metrics."""
    log = RunLog.read(folder / METRICS)
    end, score = log.need("train_end"), log.need("final_quantized")
    versions = {k: v for k, v in log.need("versions").items() if k != "event"}
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
        "source_sha256": versions.pop("source_sha256"),
        "hardware": log.need("hardware")["name"],
        "versions": versions,
        "setting": setting_of(log),
    }


MAX_ERROR_CHARACTERS = 2_000


def describe_end(status: int, folder: Path) -> Json:
    """The measurements of a run that ended with `status`, or an `error` that says why not."""
    console = (folder / "console").read_text(encoding="utf-8", errors="replace")
    ending = f"exit status {status}: {console[-MAX_ERROR_CHARACTERS:].strip()}"
    if status:
        return {"error": ending}
    try:
        return collect_result(folder)
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
        """Write down a run that has ended."""
        job, started_s = self.active[process]
        elapsed_s = time.monotonic() - started_s
        end = describe_end(process.returncode, self.folder(job))
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
        del self.active[process]
        self.finished_s.append(elapsed_s)
        self.failures_in_a_row = self.failures_in_a_row + 1 if "error" in end else 0
        if "error" not in end:
            shutil.rmtree(self.folder(job))
        self.report(job, end)

    def report(self, job: Job, end: Json) -> None:
        """The progress line of a finished run."""
        left = len(self.queue) + len(self.active)
        left_s = statistics.fmean(self.finished_s) * left / self.side_by_side
        shown = {"variant": job.name, "seed": job.seed}
        shown |= {"error": end["error"].splitlines()[-1]} if "error" in end else {
            "val_bpb": end["bpb_quantized"], "step_avg_ms": end["step_avg_ms"],
        }  # fmt: skip
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


def run_grid(options: argparse.Namespace) -> int:
    """Run what the results do not have; 1 if a run of the grid has failed."""
    grid = read_grid(options.grid)
    jobs, work = list_jobs(grid), options.work.resolve()
    with hold_lock(work):
        results = read_results(grid.results)
        script = copy_script(options.script, work)
        module = load_script(script)
        refuse_bad_variants(grid, module)
        queue = [job for job in jobs if is_due(results.get(job.key), options.retry)]
        print(f"{len(jobs)} runs, {len(queue)} to do; the script is {script}", flush=True)
        runner = Runner(
            results=grid.results,
            work=work,
            script=script,
            knobs={f.name.upper() for f in fields(module.Config)},
            side_by_side=options.jobs,
            threads=options.threads,
            queue=queue,
        )
        runner.work_off(time.monotonic() + 3600 * options.hours)
    results = read_results(grid.results)
    failed = [job for job in jobs if "error" in results.get(job.key, {})]
    done = sum(job.key in results for job in jobs)
    print(f"{done} of {len(jobs)} runs done, {len(failed)} of them failed", flush=True)
    return int(bool(failed))


# --- 4. Statistics -------------------------------------------------------------------------------
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


def finished_runs(stack: Stack, variant: Variant, results: Mapping[str, Json]) -> dict[int, Json]:
    """The runs of a variant that did not fail, by their seed."""
    found = {seed: results.get(Job(stack, variant, seed).key) for seed in stack.seeds}
    return {seed: result for seed, result in found.items() if result and "error" not in result}


def paired(runs: Mapping[int, Json], references: Mapping[int, Json], key: str) -> list[float]:
    """Differences `runs` - `references` in `key`, of the seeds that both have."""
    return [runs[seed][key] - references[seed][key] for seed in runs if seed in references]


def compare(stack: Stack, mode: str, results: Mapping[str, Json]) -> list[Comparison]:
    """The variants of one mode, the most useful technique first, what was not run yet last."""
    references = finished_runs(stack, stack.variants[0], results)
    found = []
    for variant in stack.variants:
        if variant.mode == mode:
            runs = finished_runs(stack, variant, results)
            differences = paired(runs, references, "bpb_quantized")
            found.append(Comparison(variant, runs, references, differences))
    return sorted(found, key=lambda c: -statistics.fmean(c.gains) if c.gains else math.inf)


# --- 5. Table ------------------------------------------------------------------------------------

HEADER = [
    "variant", "changed", "params", "bpb", "std", "n", "difference", "std of it", "p (paired)",
    "p (Welch)", "before quantization", "step time", "artifact bytes",
]  # fmt: skip
NO_COMPARISON = ["-"] * 7
MODE_TITLES = {"add": "Added, one at a time", "leave_out": "Left out, one at a time"}
EXPLANATION = """\
bpb: bits per byte of the artifact on the validation text that is scored (its bytes are below), in
windows of the training context without overlap; mean and standard deviation over n seeds.
Difference: variant minus reference, mean over the seeds that both have, and its standard deviation;
the same before quantization. p: that the technique gains as much by chance, one-sided, from the
differences of the seeds (paired) and from the scores as if the seeds had nothing in common (Welch);
the seed also decides the order of the data, so that the former sees smaller effects. Step time: the
variant's over the reference's, compilation not counted; it means little where other work ran beside
the runs. Artifact bytes: variant minus reference. Sorted by what the technique gains. The runs are
short: what pays only late in a long training shows less here."""


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
    step_time = mean_of(runs, "step_avg_ms") / mean_of(references, "step_avg_ms")
    return [
        f"{mean:+.5f}",
        f"{std:.5f}" if len(differences) > 1 else "-",
        *("-" if p is None else f"{p:.4f}" for p in (compared.paired, compared.welch)),
        f"{before:+.5f}",
        f"{step_time:.3f}",
        f"{statistics.fmean(paired(runs, references, 'artifact_bytes')):+,.0f}",
    ]


def format_stack(stack: Stack, results: Mapping[str, Json]) -> list[str]:
    """The tables of one stack, the reference at the head of each."""
    references = finished_runs(stack, stack.variants[0], results)
    setting = f"`{stack.recipe}`" if stack.recipe else "the defaults of `train_gpt.py`"
    if stack.settings:
        setting += f" with `{spell_overrides(stack.settings)}`"
    seeds = ", ".join(map(str, stack.seeds))
    lines = ["", f"## {stack.name}", "", f"Reference: {setting}."]
    trained = f"{stack.steps:,} steps"
    if references:
        trained += f" ({mean_of(references, 'tokens'):,.0f} tokens)"
    lines += [f"Every run: {trained}; seeds {seeds}."]
    for mode, title in MODE_TITLES.items():
        if not (compared := compare(stack, mode, results)):
            continue
        rows = [[REFERENCE, "-", *score_cells(references), *NO_COMPARISON]]
        for c in compared:
            change = f"`{spell_overrides(c.variant.overrides)}`"
            rows.append([c.variant.name, change, *score_cells(c.runs), *comparison_cells(c)])
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
    side_by_side = ", ".join(distinct(done, "side_by_side"))
    threads = ", ".join(distinct(done, "threads"))
    return [
        *lines,
        f"- Scored: {', '.join(distinct(done, 'scored_bytes'))} bytes of validation text.",
        f"- Hardware: {'; '.join(distinct(done, 'hardware'))}. Runs side by side: {side_by_side}; "
        f"threads of each: {threads}.",
        f"- Versions: {'; '.join(distinct(done, 'versions'))}.",
        f"- SHA-256 of `train_gpt.py`: {'; '.join(distinct(done, 'source_sha256'))}.",
    ]


def format_failures(jobs: Sequence[Job], results: Mapping[str, Json]) -> list[str]:
    """The runs that failed, with the last line of what they said."""
    lines = [
        f"- {job.name}, seed {job.seed}: {error.splitlines()[-1]}"
        for job in jobs
        if (error := results.get(job.key, {}).get("error"))
    ]
    return ["", "## Failed runs", "", *lines] if lines else []


def format_ablations(grid: Grid, results: Mapping[str, Json]) -> str:
    """The content of GRID.md."""
    jobs = list_jobs(grid)
    done = [results[job.key] for job in jobs if "error" not in results.get(job.key, {"error": ""})]
    compared = [c for stack in grid.stacks for mode in MODES for c in compare(stack, mode, results)]
    num_tests = sum(c.paired is not None for c in compared)
    command = f"python records/ablations.py table {shown_path(grid.path)}"
    lines = ["# Ablations", "", f"Made by `{command}`: do not edit.", "", *EXPLANATION.splitlines()]
    if num_tests:
        lines.append(
            f"Of {num_tests} tests of a kind, {num_tests / 20:.1f} are below 0.05 by chance alone."
        )
    lines += ["", f"- {len(done)} of {len(jobs)} runs are done.", *format_origin(grid, done)]
    lines += ["", f"![What each technique gains]({grid.path.stem}.png)"]
    for stack in grid.stacks:
        lines += format_stack(stack, results)
    return "\n".join([*lines, *format_failures(jobs, results), ""])


# --- 6. Plot -------------------------------------------------------------------------------------
# One panel a stack: what each technique gains, a small dot a seed, and the standard error of the
# mean where there are two seeds or more.

MODE_COLORS = dict(zip(MODES, SEED_COLORS, strict=False))
ROW_INCHES, PANEL_INCHES = 0.26, 1.3


def drawn(stack: Stack, results: Mapping[str, Json]) -> list[Comparison]:
    """The comparisons of a stack that have a run, the best technique last: it is drawn on top."""
    found = [c for mode in MODES for c in compare(stack, mode, results) if c.gains]
    return sorted(found, key=lambda c: statistics.fmean(c.gains))


def draw_stack(axes: Axes, stack: Stack, compared: Sequence[Comparison]) -> None:
    """The panel of one stack."""
    labelled: set[str] = set()
    for place, c in enumerate(compared):
        mode, gains = c.variant.mode, c.gains
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
        axes.plot(gains, [place] * len(gains), "o", color=FAINT, ms=3, alpha=0.7, zorder=2)
        axes.errorbar(
            statistics.fmean(gains), place, xerr=error, fmt="o", ms=6, color=MODE_COLORS[mode],
            mec="white", capsize=3, zorder=3,
            label=None if mode in labelled else MODE_TITLES[mode].lower(),
        )  # fmt: skip
        labelled.add(mode)
    axes.axvline(0, color=FAINT, lw=1)
    axes.set_yticks(range(len(compared)), [c.variant.name for c in compared])
    axes.set_ylim(-0.8, max(len(compared), 1) - 0.2)
    axes.set_title(stack.name)
    axes.set_xlabel("bits per byte that the technique gains (right of 0: it helps)")
    if labelled:
        axes.legend(loc="lower right")


def draw_ablations(grid: Grid, results: Mapping[str, Json], path: Path) -> None:
    """Draw all stacks into the PNG file `path`, atomically."""
    panels = [(stack, drawn(stack, results)) for stack in grid.stacks]
    heights = [PANEL_INCHES + ROW_INCHES * len(compared) for _, compared in panels]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(9, sum(heights)), dpi=144, squeeze=False,
            height_ratios=heights, layout="constrained",
        )  # fmt: skip
        for (stack, compared), panel in zip(panels, axes[:, 0], strict=True):
            draw_stack(panel, stack, compared)
        with train_gpt.atomic_file(path) as file:
            figure.savefig(file, format="png")
        plt.close(figure)


def write_table(options: argparse.Namespace) -> int:
    """Write the table and the plot beside the results."""
    grid = read_grid(options.grid)
    results = read_results(grid.results)
    train_gpt.write_atomic(grid.path.with_suffix(".md"), format_ablations(grid, results).encode())
    draw_ablations(grid, results, grid.path.with_suffix(".png"))
    return 0


# --- 7. Command line -----------------------------------------------------------------------------
# Exit status: 0, 1 if a run failed, 2 for unusable input, 130 for Ctrl-C.


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and a message if it is not usable."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="ablations.py", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run what the results do not have yet")
    run.add_argument("--jobs", type=int, default=2, help="runs side by side (default 2)")
    run.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
    run.add_argument(
        "--hours", type=float, default=math.inf, help="start no run after that; 0: only check"
    )
    run.add_argument("--retry", action="store_true", help="the failed runs, too")
    run.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="what to run")
    run.add_argument(
        "--work", type=Path, default=ROOT / "logs/ablations", help="runs in progress, compiled code"
    )
    table = commands.add_parser("table", help="write GRID.md and GRID.png from the results")
    for command in (run, table):
        command.add_argument("grid", type=Path, metavar="GRID.toml")
    options = parser.parse_args(argv)
    if options.command == "run" and min(options.jobs, options.threads) < 1:
        parser.error("--jobs and --threads are at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        options = parse_options(argv)
        return run_grid(options) if options.command == "run" else write_table(options)
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
