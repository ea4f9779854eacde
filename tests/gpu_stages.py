"""Peak memory of every stage of a run, and the time of quantization, computed without a GPU.

    python -m tests.gpu_stages [RECIPE] [--small] [KNOB=value ...]

Prints sections for the report of `make gpu-report`: what the stages keep on the simulated GPU with
the micro-batch of each card, and what a column of GPTQ launches and moves. Nothing is measured.
"""

from __future__ import annotations  # noqa: I001

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import gpu_sim  # before torch, because of its guard

import torch

import train_gpt as t

# A second micro-batch, which tells what grows with its tokens.
SMALL_MICRO_BATCH = 12_288
LAUNCH_S, GRAPH_KERNEL_S = 4.5e-6, 2e-6
FULL_DOCUMENTS = "adapters, documents longer than EVAL_SEQ_LEN"


class Stages:
    """The stages of one rank's run, with what they need beyond what is live, in GB."""

    def __init__(self, simulated: gpu_sim.SimulatedRun):
        self.simulated = simulated
        self.peaks = dict[str, tuple[float, float]]()  # live before the stage, and its peak

    def measure(self, name: str, part: Callable[[], Any]) -> None:
        gpu, live = self.simulated.gpu, self.simulated.gpu.live
        gpu.reset()
        part()
        self.peaks[name] = live / 1e9, gpu.peak / 1e9
        print(f"{name}: {gpu.peak / 1e9:.2f} GB", file=sys.stderr, flush=True)

    def train(self) -> None:
        """A training step, and calibration."""
        self.simulated.build()
        self.simulated.trainer.step(self.simulated.windows(t.train_stages(self.simulated.cfg)[0]))
        self.measure("training, not compiled", self.simulated.step)
        self.measure("calibration", self.simulated.calibrate)

    def finish(self) -> None:
        """Quantize, read back and score, as a run does."""
        simulated, cfg = self.simulated, self.simulated.cfg
        for grid in t.GRIDS if simulated.hessians else ("uniform",):
            simulated.cfg = dataclasses.replace(cfg, quant_grid=grid)
            self.measure(f"quantization, {grid}, and reading back", simulated.quantize)
        simulated.cfg, simulated.trainer, simulated.hessians = cfg, None, {}
        self.measure("scoring, one of 8 GPUs", simulated.score)
        alone = dataclasses.replace(cfg, val_batch_size=gpu_sim.WORLD_SIZE * cfg.val_batch_size)
        simulated.cfg = simulated.run.cfg = alone
        self.measure("scoring, a GPU alone", simulated.score)
        simulated.cfg = simulated.run.cfg = cfg
        if cfg.ttt_method == "lora":
            for name, is_full in (("adapters, first chunks", False), (FULL_DOCUMENTS, True)):
                part = functools.partial(adapt_documents, simulated, is_full=is_full)
                self.measure(name, part)
        elif cfg.adapts:
            self.measure("test-time training", simulated.adapt)


def adapt_documents(simulated: gpu_sim.SimulatedRun, *, is_full: bool) -> None:
    """A step of the adapters on chunks of documents, whose KV cache is empty or full."""
    run, cfg, model = simulated.run, simulated.cfg, simulated.model
    rows, T = cfg.ttt_batch_size, cfg.ttt_chunk_size
    if cfg.ttt_context != "incremental":
        T = cfg.score_seq_len if is_full else T
    with t.restore_model_after(cfg, model):
        trainer = t.AdapterTrainer(run, model, rows)
        ids_BT = torch.ones(rows, T, dtype=torch.int64, device=run.device)
        first = T - cfg.ttt_chunk_size
        batch = t.Batch(ids_BT, ids_BT.clone(), first, None, torch.ones_like(ids_BT).float())
        trainer.step(batch, rows)
        if trainer.past is not None and is_full:
            fill_cache(trainer.past, rows)
        trainer.step(batch, rows)


def fill_cache(past: t.KVCache, rows: int) -> None:
    """As many positions as the cache may hold."""
    for layer in past.layers:
        assert layer.pair is not None
        k, v = layer.pair
        shape = rows, past.capacity, *k.shape[2:]
        layer.pair = k.new_empty(shape), v.new_empty(shape)
    past.ids_BT, past.length = past.ids_BT.new_zeros(rows, past.capacity), past.capacity


def peaks_of(cfg: t.Config, *, whole: bool) -> dict[str, tuple[float, float]]:
    """GB before and at the peak of each stage, or only of those that take micro-batches."""
    with tempfile.TemporaryDirectory() as folder, gpu_sim.one_rank() as gpu:
        stages = Stages(gpu_sim.SimulatedRun(cfg, gpu, Path(folder)))
        stages.train()
        if whole:
            stages.finish()
        return stages.peaks


def memory_section(recipe: str, knobs: dict[str, str], *, small: bool) -> list[str]:
    """The peak of each stage, and what fits in cards."""
    cfg = gpu_sim.simulated_config(recipe, small, GPTQ_CALIBRATION_BATCHES="1", **knobs)
    micro = 128 if small else SMALL_MICRO_BATCH
    fewer = {"micro_batch_tokens": micro, "train_batch_tokens": gpu_sim.WORLD_SIZE * micro}
    peaks = peaks_of(cfg, whole=True)
    low = peaks_of(dataclasses.replace(cfg, **fewer), whole=False)  # type: ignore[arg-type]
    lines = [
        "## Peak memory of all stages", "",
        "Computed by `python -m tests.gpu_stages`, not measured: all tensors of one rank of 8 with "
        f"FlashAttention-3, MICRO_BATCH_TOKENS={cfg.micro_batch_tokens} and TTT_BATCH_SIZE="
        f"{cfg.ttt_batch_size}.", "", "| stage | GB |", "| --- | ---: |",
        *[f"| {stage} | {peak:.1f} |" for stage, (_, peak) in peaks.items()], "",
        f"The largest settings that fit if {gpu_sim.RESERVED_GB:.0f} GB are kept free (those of "
        "compiled training: see above):", "",
        "| GPU memory, GiB | " + " | ".join(map(str, gpu_sim.CARDS_GIB)) + " |",
        "| --- |" + " ---: |" * len(gpu_sim.CARDS_GIB),
    ]  # fmt: skip
    for stage, (_, less) in low.items():
        per_token = (peaks[stage][1] - less) / (cfg.micro_batch_tokens - micro)
        fixed, T = less - micro * per_token, cfg.train_seq_len
        lines.append(row_of_cards(f"MICRO_BATCH_TOKENS, {stage}", fixed, per_token, T))
    if FULL_DOCUMENTS in peaks:
        live, peak = peaks[FULL_DOCUMENTS]
        per_row = (peak - live) / cfg.ttt_batch_size
        lines.append(row_of_cards(f"TTT_BATCH_SIZE, {FULL_DOCUMENTS}", live, per_row, 1))
    return [*lines, ""]


def row_of_cards(name: str, fixed: float, each: float, unit: int) -> str:
    """A row of the table of settings: the multiples of `unit` whose GB fit in each card."""
    counts = [
        int((card * 2**30 / 1e9 - gpu_sim.RESERVED_GB - fixed) / each) // unit * unit
        for card in gpu_sim.CARDS_GIB
    ]
    return f"| {name} | " + " | ".join(f"{max(0, count):,}" for count in counts) + " |"


def column_seconds(cost: gpu_sim.ColumnCost) -> float:
    """The time of the host's launches, or that of the kernels if that is longer."""
    memory_s = cost.num_bytes / gpu_sim.BYTES_PER_S
    return max(cost.launches * LAUNCH_S, memory_s + cost.graph_kernels * GRAPH_KERNEL_S)


def quantization_section(recipe: str, knobs: dict[str, str], *, small: bool) -> list[str]:
    """A table of groups, and the seconds of all columns."""
    cfg = gpu_sim.simulated_config(recipe, small, **knobs)
    with tempfile.TemporaryDirectory() as folder, gpu_sim.one_rank(by_line=True) as gpu:
        simulated = gpu_sim.SimulatedRun(cfg, gpu, Path(folder))
        simulated.build()
        costs = [*gpu_sim.column_costs(simulated)]
    seconds = sum(column_seconds(cost) * cost.shape[2] for cost in costs)
    lines = [
        f"## Quantization: {seconds:.1f} s a try", "",
        f"Computed: {1e6 * LAUNCH_S:.1f} us a launch from the host, or, where that is longer, "
        f"{1e6 * GRAPH_KERNEL_S:.0f} us for each kernel in a CUDA graph and "
        f"{gpu_sim.BYTES_PER_S / 1e12:.1f} TB/s. The search for scales takes up to "
        f"{t.MAX_BUDGET_TRIES} tries. Of each column:", "",
        "| matrices, rows, columns | launches | kernels in graphs | MB | ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for cost in costs:
        shape = " x ".join(map(str, cost.shape))
        lines.append(
            f"| {shape} | {cost.launches:.0f} | {cost.graph_kernels:.0f} | "
            f"{cost.num_bytes / 1e6:.0f} | {1e3 * column_seconds(cost):.2f} |"
        )
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compute the memory of all stages of a run.")
    parser.add_argument("recipe", nargs="?", default="default", help="default, or part of a name")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    parser.add_argument("--small", action="store_true", help="a small shape, to try the tool")
    args = parser.parse_args()
    knobs = dict(pair.split("=", 1) for pair in args.knobs)
    for section in (quantization_section, memory_section):
        print("\n".join(section(args.recipe, knobs, small=args.small)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
