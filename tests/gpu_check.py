"""Checks of the script on a machine with a GPU, and measured figures beside the computed ones.

    make gpu-check                           # all parts, about 20 minutes
    python -m tests.gpu_check --parts step   # some of them: tests, step, run

- tests: the tests that are marked `gpu`.
- step: a training step of the default model in each stage, with one GPU's part of the batch of 8:
  milliseconds and peak memory, compiled as a whole with measured products and with the library's
  (KERNELS=off), and block by block, beside those of records/track_10min_16mb/gpu_report.md. The
  compiled loss and gradients must be those of the model without compilation, up to bf16's rounding.
- run: two minutes of training on all GPUs on Python's documentation, then quantization and
  evaluation within two more minutes. It must end with exit status 0 and a score.

Each part runs in a process of its own. The results are printed and written to logs/gpu_check.md;
the exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_gpt as t
from tests.bench import make_run

ROOT = Path(t.__file__).parent
REPORT = ROOT / "records/track_10min_16mb/gpu_report.md"
OUT = ROOT / "logs/gpu_check.md"
NUM_RANKS = 8  # whose part of the batch is measured
STEPS, WARM_UP_STEPS = 8, 3
RUN_S = 120  # of training, and again of evaluation
PARTS = ("tests", "step", "run")
# A model of the default's structure for machines without a GPU, to try the tool.
SMALL: dict[str, Any] = {
    "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 512, "train_seq_len": 64,
    "train_batch_tokens": 4096, "micro_batch_tokens": 512,
}  # fmt: skip


@dataclasses.dataclass
class StepTime:
    """A training step of one stage on one GPU."""

    stage: str
    form: str  # how the model is compiled
    ms: float
    peak_gb: float


GRAPHS = "as a whole, micro-batches as CUDA graphs"


def stage_name(stage: t.TrainStage) -> str:
    """The name of a stage in the computed report."""
    return f"loops {stage.loops}, {stage.seq_len} tokens a row"


def part_of_a_rank(cfg: t.Config) -> t.Config:
    """The configuration whose whole batch is one rank's part of `cfg`."""
    return dataclasses.replace(cfg, train_batch_tokens=cfg.train_batch_tokens // NUM_RANKS)


def random_windows(cfg: t.Config, stage: t.TrainStage) -> Tensor:
    """Windows of random tokens (rows, T + 1) with documents of about 1,000 tokens."""
    rows = cfg.train_batch_tokens // stage.seq_len
    window_BT = torch.randint(2, cfg.vocab_size, (rows, stage.seq_len + 1))
    window_BT[torch.rand(window_BT.shape) < 1e-3] = t.BOS_ID
    return window_BT


def measured_stages(cfg: t.Config) -> list[t.TrainStage]:
    """The last stage and the first one, without late QAT: those of the computed report."""
    stages = [stage for stage in t.train_stages(cfg) if not stage.qat]
    return list(dict.fromkeys([stages[-1], stages[0]]))


def measure_steps(cfg: t.Config, form: str) -> Iterator[StepTime]:
    """The median time of a step in each stage, after the steps that compile.

    Graphs are captured after a first step without them if that is the form.
    """
    run = make_run(cfg)
    trainer = t.Trainer(run, t.build_model(run))
    for stage in measured_stages(cfg):
        trainer.enter_stage(stage)
        trainer.graphs, times = None, []
        for step in range(WARM_UP_STEPS + STEPS):
            if step == 1 and form == GRAPHS:
                trainer.start_graphs()
            window_BT = random_windows(cfg, stage)
            if step == WARM_UP_STEPS and run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            run.synchronize()
            started_s = time.perf_counter()
            trainer.step(window_BT)
            run.synchronize()
            times.append(time.perf_counter() - started_s)
        if form == GRAPHS and trainer.graphs is None:
            form = "as a whole, as the capture failed"
        ms = 1e3 * statistics.median(times[WARM_UP_STEPS:])
        yield StepTime(stage_name(stage), form, ms, t.peak_memory_mib(run.device) * 2**20 / 1e9)


def gradients(cfg: t.Config, windows: int) -> dict[str, Tensor]:
    """Loss and gradients of the same weights on the same windows, in float32 on the CPU."""
    run = make_run(cfg)
    model = t.build_model(run)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():  # without the zeros that hide what comes before them
        noise = torch.randn(param.shape, generator=generator).to(param)
        param.data += 0.02 * noise
    trainer, stage = t.Trainer(run, model), measured_stages(cfg)[0]
    trainer.enter_stage(stage)
    torch.manual_seed(1)
    loss = trainer.accumulate_gradients(random_windows(cfg, stage)[:windows])
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.float().cpu(), **{name: g.float().cpu() for name, g in named.items()}}


def compare_with_eager(cfg: t.Config, windows: int = 8) -> tuple[float, float, str]:
    """Relative errors of the compiled loss and gradient, and the worst single gradient."""
    compiled = gradients(cfg, windows)
    eager = gradients(dataclasses.replace(cfg, compile=False), windows)
    errors = {name: (compiled[name] - x).norm().item() for name, x in eager.items()}
    norms = {name: max(x.norm().item(), 1e-12) for name, x in eager.items()}
    loss = errors.pop("loss") / norms.pop("loss")
    worst = max(errors, key=lambda name: errors[name] / norms[name])
    whole = math.hypot(*errors.values()) / math.hypot(*norms.values())
    return loss, whole, f"{worst}: {errors[worst] / norms[worst]:.1e}"


def computed_steps(text: str) -> dict[str, tuple[str, str]]:
    """Milliseconds and peak GB by stage, as the text of a computed report gives them."""
    pattern = r"## (loops .*?): ([\d.]+) ms, .*?\n\n.*?([\d.]+) GB at the peak"
    return {name: (ms, gb) for name, ms, gb in re.findall(pattern, text)}


def step_part(cfg: t.Config) -> list[str]:
    """The lines of the report on steps; AssertionError if compiled and eager differ."""
    forms = {
        "as a whole": cfg,
        GRAPHS: cfg,
        "as a whole, KERNELS=off": dataclasses.replace(cfg, kernels="off"),
        "block by block": dataclasses.replace(cfg, compile_forward=False),
    }
    loss_error, grad_error, worst = compare_with_eager(cfg)
    computed = computed_steps(REPORT.read_text(encoding="utf-8"))
    lines = [
        f"Relative differences of the compiled model from the eager one: loss {loss_error:.1e}, "
        f"gradient {grad_error:.1e}, worst single gradient {worst}.", "",
        "| stage | compiled | ms | computed ms | peak GB | computed GB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    is_close = loss_error <= t.MAX_LOSS_ERROR and grad_error <= t.MAX_GRAD_ERROR
    assert is_close, f"the compiled model differs from the eager one: {lines[0]}"
    for form, part in forms.items():
        for step in measure_steps(part, form):
            ms, gb = computed.get(step.stage, ("-", "-"))
            lines.append(
                f"| {step.stage} | {form} | {step.ms:.1f} | {ms} | {step.peak_gb:.1f} | {gb} |"
            )
            print(lines[-1], flush=True)
    return lines


def run_part(num_gpus: int, small: bool) -> list[str]:
    """Train for two minutes and evaluate; the lines of the log that say what came out."""
    python, knobs = sys.executable, SMALL if small else {}
    vocab_size = knobs.get("vocab_size", t.Config().vocab_size)
    data = f"data/gpu_check_{vocab_size}"
    if not (ROOT / data / "manifest.json").exists():
        prepare = [python, "data/prepare.py", "--source", "stdlib", "--out", data]
        subprocess.run([*prepare, "--vocab-size", str(vocab_size)], cwd=ROOT, check=True)
    seconds = str(RUN_S // 4 if small else RUN_S)
    knobs = {
        **{name.upper(): str(value) for name, value in knobs.items()},
        "DATA_PATH": data, "RUN_DIR": f"logs/gpu_check_{time.strftime('%Y%m%d_%H%M%S')}",
        "MAX_WALLCLOCK_SECONDS": seconds, "EVAL_MAX_SECONDS": seconds,
    }  # fmt: skip
    launch = [python, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc_per_node={num_gpus}", "train_gpt.py"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, **knobs})
    log = (ROOT / knobs["RUN_DIR"] / "train.log").read_text(encoding="utf-8")
    found = re.findall(
        r"^(?:train_end|final|final_\w+|ledger|run|stage|kernels|warning) .*",
        log,
        flags=re.MULTILINE,
    )
    assert any("val_bpb" in line for line in found), "the run has no score"
    return ["```", *found, "```"]


def tests_part() -> list[str]:
    """Run the tests marked `gpu`; CalledProcessError if one fails."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(output.stdout[-4000:], flush=True)
    output.check_returncode()
    return ["```", *output.stdout.strip().splitlines()[-8:], "```"]


def run_one_part(part: str, small: bool) -> list[str]:
    """The lines that a part adds to the report."""
    cfg = part_of_a_rank(t.Config(**(SMALL if small else {})))
    parts: dict[str, Callable[[], list[str]]] = {
        "tests": tests_part,
        "step": functools.partial(step_part, cfg),
        "run": functools.partial(run_part, max(1, torch.cuda.device_count()), small),
    }
    return parts[part]()


def in_a_process(part: str, small: bool) -> tuple[bool, list[str]]:
    """Run a part in a process of its own: whether it passed, and its lines."""
    command = [sys.executable, "-m", "tests.gpu_check", "--one", part, *["--small"] * small]
    last = ""  # of a part that passed: its lines as JSON; all lines before are shown at once
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "it was opened as a pipe"
        for line in process.stdout:
            print(last, end="", flush=True)
            last = line
    if process.returncode:
        print(last, end="", flush=True)
        return False, [f"Exit status {process.returncode}."]
    return True, json.loads(last)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the script on a machine with a GPU.")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--small", action="store_true", help="a small model, also without a GPU")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(run_one_part(args.one, args.small)))
        return 0
    names = args.parts.split(",")
    if unknown := set(names) - {*PARTS}:
        parser.error(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not (torch.cuda.is_available() or args.small):
        print("gpu-check: PyTorch finds no CUDA device; run it where there is one", file=sys.stderr)
        return 2
    device = t.describe_hardware(make_run(t.Config()))
    lines = ["# Checks on a GPU", "", f"{device}, torch {torch.__version__}.", ""]
    failed = []
    for name in names:
        print(f"--- {name}", flush=True)
        passed, found = in_a_process(name, args.small)
        lines += [f"## {name}: {'passed' if passed else 'FAILED'}", "", *found, ""]
        failed += [name] * (not passed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"{args.out}: " + (f"failed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
