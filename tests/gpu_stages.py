"""Memory of every stage of a run and time of those after training, computed without a GPU.

    python -m tests.gpu_stages [RECIPE] [--small] [--sections memory,calibration] [KNOB=value ...]

Prints sections for the report of `make gpu-report`: what a column of GPTQ launches and moves, what
the stages keep on the simulated GPU with the micro-batch of each card, the seconds of calibration
and of the adaptive pass, and what ranks send to each other. Nothing is measured.
"""

from __future__ import annotations  # noqa: I001

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import gpu_sim  # before torch, because of its guard

import numpy as np
import torch

import train_gpt as t
from tests import gpu_report

# A second micro-batch, which tells what grows with its tokens.
SMALL_MICRO_BATCH = 12_288
LAUNCH_S, GRAPH_KERNEL_S = 4.5e-6, 2e-6
FULL_DOCUMENTS = "adapters, documents longer than EVAL_SEQ_LEN"

# Launches from a fast and a slow host, for the adaptive pass.
PASS_LAUNCHES_S = (5e-6, 10e-6)
# A validation text: targets, documents, and sigma of their log-normal lengths.
TEXT, SMALL_TEXT = (47_800_000, 50_000, 1.0), (40_000, 400, 1.0)
# What a step of 64 documents with one learning rate once launched and moved, and how many steps of
# each rank were counted then.
EARLIER_LAUNCHES, EARLIER_BYTES, EARLIER_STEPS = 5_945, 61e9, 3_500
FLOAT32_FLOPS = 60e12  # per second, of products in float32 without tensor cores
LINK_BYTES_PER_S = 450e9  # of NVLink on an H100, in each direction
# Operations whose bytes would be those of a whole n-gram table, of which they read a few rows.
TABLE_READS = ("index find:", "index look_up:")
# How often each collective sends a share (W - 1) / W of the whole tensor, for W ranks in a ring.
ROUNDS = {"_reduce_scatter_base_": 1, "_allgather_base_": 1, "allreduce_": 2}


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
    """A step of the adapters on chunks of documents, whose KV cache is empty or full.

    A document has adapters of as many learning rates as after the first documents.
    """
    run, cfg, model = simulated.run, simulated.cfg, simulated.model
    rows, T = max(1, cfg.ttt_batch_size // cfg.num_lrs), cfg.ttt_chunk_size
    if cfg.ttt_context != "incremental":
        T = cfg.score_seq_len if is_full else T
    with t.restore_model_after(cfg, model):
        trainer = t.AdapterTrainer(run, model, rows, lrs=cfg.lora_lrs)
        ids_BT = torch.ones(rows, T, dtype=torch.int64, device=run.device)
        first = T - cfg.ttt_chunk_size
        batch = t.Batch(ids_BT, ids_BT.clone(), first, None, torch.ones_like(ids_BT).float())
        trainer.step(batch, rows)
        if trainer.past is not None and is_full:
            fill_cache(trainer.past, trainer.rows)
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
        f"{cfg.ttt_batch_size}; learning rates of a document: {cfg.num_lrs}.", "",
        "| stage | GB |", "| --- | ---: |",
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
        rows = max(1, cfg.ttt_batch_size // cfg.num_lrs) * cfg.num_lrs
        per_row = (peak - live) / rows
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


@contextlib.contextmanager
def built(cfg: t.Config) -> Iterator[gpu_sim.SimulatedRun]:
    """A run with a model, whose operations are counted by line."""
    with tempfile.TemporaryDirectory() as folder, gpu_sim.one_rank(by_line=True) as gpu:
        simulated = gpu_sim.SimulatedRun(cfg, gpu, Path(folder))
        simulated.build()
        yield simulated


@dataclasses.dataclass
class Count:
    """What the simulated GPU has done."""

    launches: int
    num_bytes: float
    flops: float  # of products; attention has none here
    seconds: float  # of each operation the time of its bytes or FLOPs, whichever is longer


def count_of(gpu: gpu_sim.SimulatedGpu, line: str = "") -> Count:
    """Sums since the last reset, of operations at lines of the script that contain `line`."""
    names = [name for name in gpu.launches_of if line in name]
    sizes = {x: 0 if x.startswith(TABLE_READS) else gpu.traffic[x] for x in names}
    seconds = (
        max(gpu.flops[x] / gpu_report.MATMUL_FLOPS, sizes[x] / gpu_sim.BYTES_PER_S) for x in names
    )
    return Count(
        sum(gpu.launches_of[x] for x in names), sum(sizes.values()),
        sum(gpu.flops[x] for x in names), sum(seconds),
    )  # fmt: skip


def calibration_section(recipe: str, knobs: dict[str, str], *, small: bool) -> list[str]:
    """Bytes, FLOPs and seconds of a batch; those of its second moments in float32, too."""
    cfg = gpu_sim.simulated_config(recipe, small, **knobs)
    if cfg.quantizer != "gptq":
        return []
    batches, T = cfg.gptq_calibration_batches, cfg.train_seq_len
    with built(dataclasses.replace(cfg, gptq_calibration_batches=1)) as simulated:
        simulated.gpu.reset()
        simulated.calibrate()
        whole, moments = (count_of(simulated.gpu, x) for x in ("", " second_moments:"))
        calls = len(simulated.model.schedule)
    tokens = cfg.train_batch_tokens // gpu_sim.WORLD_SIZE
    with gpu_sim.patched((gpu_report, "seq_len", T)):
        forward, backward = (
            calls * gpu_report.flash_flops(tokens, cfg.model_dim, x)
            for x in ("forward", "backward")
        )
    attention_s = forward / gpu_report.FLASH_FORWARD_FLOPS
    attention_s += backward / gpu_report.FLASH_BACKWARD_FLOPS
    batch_s = whole.seconds + attention_s
    rows = [
        ("products of second moments", moments.flops, moments.num_bytes, moments.seconds),
        ("all other operations", whole.flops - moments.flops,
         whole.num_bytes - moments.num_bytes, whole.seconds - moments.seconds),
        ("FLOPs of attention", forward + backward, 0.0, attention_s),
    ]  # fmt: skip
    float32_s = moments.flops / FLOAT32_FLOPS
    return [
        f"## Calibration: {batches * batch_s:.1f} s", "",
        f"Computed, not measured: GPTQ_CALIBRATION_BATCHES={batches} batches, of which a rank has "
        f"{tokens:,} tokens each, {batch_s:.2f} s a batch. Of each operation the longer time "
        f"counts: products {gpu_report.MATMUL_FLOPS / 1e12:.0f} TFLOP/s, memory "
        f"{gpu_sim.BYTES_PER_S / 1e12:.1f} TB/s, attention as in a training step. The host's "
        f"{whole.launches:,} launches a batch take {whole.launches * LAUNCH_S:.2f} s at "
        f"{1e6 * LAUNCH_S:.1f} us, beside that. Left out: reading the text, waits after each "
        "piece, adding up the sums of all ranks. Of a batch:", "",
        "| part | TFLOP | GB | s |", "| --- | ---: | ---: | ---: |",
        *[f"| {name} | {f / 1e12:.2f} | {b / 1e9:.1f} | {s:.3f} |" for name, f, b, s in rows], "",
        "In float32 without tensor cores "
        f"({FLOAT32_FLOPS / 1e12:.0f} TFLOP/s), as before, the products of second moments would "
        f"take {float32_s:.2f} s a batch in place of {moments.seconds:.2f}: "
        f"{batches * float32_s:.1f} s in all.", "",
    ]  # fmt: skip


def validation_ids(num_targets: int, num_documents: int, sigma: float) -> np.ndarray:
    """Ids of a text whose documents are as long as quantiles of a log-normal distribution.

    They stand in an order that is random and always the same. Tokens other than BOS are alike.
    """
    normal = statistics.NormalDist(0, sigma)
    places = (np.arange(num_documents) + 0.5) / num_documents
    lengths = np.exp([normal.inv_cdf(x) for x in places])
    ends = np.cumsum(np.random.default_rng(0).permutation(lengths))
    bounds = np.unique((ends[:-1] * (num_targets / ends[-1])).astype(np.int64))
    ids = np.full(num_targets + 1, t.BOS_ID + 1, np.uint16)
    ids[[0, *bounds[bounds > 0]]] = t.BOS_ID
    return ids


@dataclasses.dataclass
class AdapterSteps:
    """What steps of the adapters launch, and the GPU's seconds by rows and context."""

    rows: int  # adapters of the counted step
    second: Count  # the second chunk of all documents
    first_launches: int  # of the step that makes the adapters
    drop_launches: int  # more, where documents end
    fixed_s: float
    row_s: float
    token_s: float  # more for each row and token of context

    def launches(self, rows: int, rows_before: int) -> int:
        """Those of a step after one with other rows, or after none of its documents."""
        if not rows_before:
            return self.first_launches
        return self.second.launches + self.drop_launches * (rows < rows_before)

    def gpu_s(self, rows: int, context: int) -> float:
        return self.fixed_s + rows * (self.row_s + context * self.token_s)


def num_passes(cfg: t.Config, rows: int, context: int) -> int:
    """Micro-batches of a step; with a KV cache there is one."""
    if cfg.ttt_context == "incremental":
        return 1
    return -(-rows // max(1, cfg.micro_batch_tokens // context))


def count_steps(simulated: gpu_sim.SimulatedRun, cfg: t.Config, documents: int) -> list[Count]:
    """The first and second chunk, one with a full context, and one more, where a document ends."""
    simulated.run.cfg, gpu, counts = cfg, simulated.gpu, list[Count]()
    length = cfg.score_seq_len + 2 * cfg.ttt_chunk_size
    text = simulated.validation(documents * length, length)
    spans = [*itertools.pairwise(t.document_bounds(text.ids))]
    steps = [
        step._replace(num_lrs=cfg.num_lrs)
        for step in t.EvalPlanner(cfg, 0, 1).plan_document_batch(spans)
    ]
    full = steps[-2]
    fewer = full._replace(windows=full.windows[:-1], num_learning_rows=documents - 1)
    simulated.model.use_final_schedule()
    with t.restore_model_after(cfg, simulated.model):
        runner = t.EvalRunner(simulated.run, simulated.model, text, steps, adaptive=True)
        for step in (steps[0], steps[0], steps[1], full, fewer):  # the first one fills caches
            past = runner.adapters and runner.adapters.past
            if step is full and past:
                fill_cache(past, documents * cfg.num_lrs)
            runner.scorer.scored_at[:] = 0
            gpu.reset()
            runner.adapt(step)
            counts.append(count_of(gpu))
    return counts[1:]


def adapter_steps(simulated: gpu_sim.SimulatedRun, cfg: t.Config) -> AdapterSteps:
    """Counts of steps whose seconds are linear in rows, and in rows times context."""
    documents = max(2, cfg.ttt_batch_size // cfg.num_lrs)
    first, second, full, fewer = count_steps(simulated, cfg, documents)
    twice = count_steps(simulated, cfg, 2 * documents)[1]
    rows = documents * cfg.num_lrs
    context, longest = 2 * cfg.ttt_chunk_size, cfg.score_seq_len
    token_s = (full.seconds - second.seconds) / (rows * (longest - context))
    each_s = (twice.seconds - second.seconds) / rows
    return AdapterSteps(
        rows, second, first.launches, fewer.launches - full.launches,
        second.seconds - rows * each_s, each_s - context * token_s, token_s,
    )  # fmt: skip


def group_seconds(
    cfg: t.Config, steps: Sequence[t.EvalStep], cost: AdapterSteps
) -> tuple[int, list[float]]:
    """Steps of one rank between two that all ranks do together; their seconds by launch time."""
    seconds, index, rows, number = [0.0] * len(PASS_LAUNCHES_S), 0, 0, 0
    for step in steps:
        if not step.windows:
            continue
        if step.resets:
            index = rows = 0
        # Tokens that the chunk reads in each row, those in the KV cache included.
        context = min((index + 1) * cfg.ttt_chunk_size, cfg.score_seq_len)
        context = max(context, step.shape[1])
        launches = cost.launches(step.shape[0], rows) * num_passes(cfg, step.shape[0], context)
        gpu_s = cost.gpu_s(step.shape[0], context)
        index, rows, number = index + 1, step.shape[0], number + 1
        for i, launch_s in enumerate(PASS_LAUNCHES_S):
            seconds[i] += max(launches * launch_s, gpu_s)
    return number, seconds


def pass_seconds(
    cfg: t.Config, plans: Sequence[Sequence[t.EvalStep]], cost: AdapterSteps
) -> tuple[int, list[float]]:
    """Steps of adapters on the slowest rank and their seconds, for each time of a launch."""
    number, totals = 0, [0.0] * len(PASS_LAUNCHES_S)
    groups = [
        [[*steps] for together, steps in itertools.groupby(plan, is_collective) if not together]
        for plan in plans
    ]
    for of_ranks in zip(*groups, strict=True):
        numbers, seconds = zip(*(group_seconds(cfg, x, cost) for x in of_ranks), strict=True)
        number += max(numbers)
        totals = [a + max(b) for a, b in zip(totals, zip(*seconds, strict=True), strict=True)]
    return number, totals


def is_collective(step: t.EvalStep) -> bool:
    return step.is_collective


def adaptive_rows(
    simulated: gpu_sim.SimulatedRun, cfg: t.Config, ids: np.ndarray
) -> list[tuple[str, ...]]:
    """The rows of the table for each number of learning rates, one of which is the default's."""
    rows, number = list[tuple[str, ...]](), 0
    for lrs in dict.fromkeys((cfg.num_lrs, 1)):
        with_lrs = dataclasses.replace(cfg, ttt_num_lrs=lrs)
        cost = adapter_steps(simulated, with_lrs)
        plans = [
            t.plan_adaptive(t.EvalPlanner(with_lrs, rank, gpu_sim.WORLD_SIZE), ids)
            for rank in range(gpu_sim.WORLD_SIZE)
        ]
        number, seconds = pass_seconds(with_lrs, plans, cost)
        second = cost.second
        rows.append((
            f"{cost.rows // lrs} x {lrs}", f"{number:,}", f"{second.launches:,}",
            f"{second.num_bytes / 1e9:.1f}", f"{second.flops / 1e12:.2f}",
            f"{1e3 * second.seconds:.1f}", *(f"{x:,.0f}" for x in seconds),
        ))  # fmt: skip
    if cfg.chooses_lrs:
        earlier_s = EARLIER_BYTES / gpu_sim.BYTES_PER_S
        for steps, name in ((EARLIER_STEPS, "its own steps"), (number, "these steps")):
            seconds = [steps * max(EARLIER_LAUNCHES * x, earlier_s) for x in PASS_LAUNCHES_S]
            rows.append((
                f"64 x 1 in an earlier version, {name}", f"{steps:,}", f"{EARLIER_LAUNCHES:,}",
                f"{EARLIER_BYTES / 1e9:.0f}", "", f"{1e3 * earlier_s:.1f}",
                *(f"{x:,.0f}" for x in seconds),
            ))  # fmt: skip
    return rows


def adaptive_section(recipe: str, knobs: dict[str, str], *, small: bool) -> list[str]:
    """Steps and seconds of the adapters over a whole validation text."""
    cfg = gpu_sim.simulated_config(recipe, small, **knobs)
    if cfg.ttt_method != "lora":
        return []
    num_targets, num_documents, sigma = SMALL_TEXT if small else TEXT
    ids = validation_ids(num_targets, num_documents, sigma)
    lengths = np.diff(t.document_bounds(ids))
    with built(cfg) as simulated:
        simulated.trainer = None
        rows = adaptive_rows(simulated, cfg, ids)
    fast, slow = (f"{1e6 * x:.0f}" for x in PASS_LAUNCHES_S)
    trial = ", with the trial of all rates by the first documents" if cfg.chooses_lrs else ""
    return [
        f"## Adaptive pass: {rows[0][-2]} s at {fast} us a launch, {rows[0][-1]} s at {slow} us",
        "",
        f"Computed, not measured: {num_targets:,} targets in {num_documents:,} documents whose "
        f"lengths are log-normal (sigma {sigma}, mean {lengths.mean():.0f}, median "
        f"{np.median(lengths):.0f}, longest {lengths.max():,}), on {gpu_sim.WORLD_SIZE} ranks; the "
        f"steps are those that the script plans, of the rank that has most{trial}. The table shows "
        "a step on the second chunk of as many documents as there are side by side. The pass has "
        "for each step the time of its "
        "launches or that of the GPU's work, whichever is longer. At the start of documents and "
        "where some end there are more launches; the work grows with rows and context. Left out: "
        "FLOPs of attention, reads of n-gram tables, drawing the numbers that adapters start "
        "from, the wait for the losses of each step, steps of all ranks together (n-grams, "
        "training of all weights), and the passes without adapters.", "",
        "| documents x learning rates | steps a rank | launches | GB | TFLOP | GPU, ms | "
        f"pass at {fast} us, s | at {slow} us, s |",
        "| --- |" + " ---: |" * 7, *[f"| {' | '.join(row)} |" for row in rows], "",
    ]  # fmt: skip


def sent_bytes(collectives: Sequence[str]) -> dict[str, float]:
    """Bytes that a rank sends, and receives, by kind of collective."""
    sent = dict[str, float]()
    for line in collectives:
        kind, dtype, shapes = line.split(" ", 2)
        size = max(map(math.prod, ast.literal_eval(shapes))) * getattr(torch, dtype).itemsize
        share = (gpu_sim.WORLD_SIZE - 1) / gpu_sim.WORLD_SIZE
        sent[kind] = sent.get(kind, 0.0) + ROUNDS[kind] * share * size
    return sent


def communication_section(recipe: str, knobs: dict[str, str], *, small: bool) -> list[str]:
    """What a rank sends in a training step."""
    with built(gpu_sim.simulated_config(recipe, small, **knobs)) as simulated:
        simulated.gpu.reset()
        simulated.step()
        sent = sent_bytes(simulated.gpu.collectives)
    reduced, gathered, both = (sent.get(kind, 0.0) / 1e6 for kind in ROUNDS)
    total = sum(sent.values())
    ms = 1e3 * total / LINK_BYTES_PER_S
    return [
        f"## Communication: {ms:.2f} ms a training step", "",
        f"Computed, not measured: each of {gpu_sim.WORLD_SIZE} ranks sends {total / 1e6:.0f} MB in "
        f"a step and receives as much ({reduced:.0f} MB to reduce and scatter Muon's gradients, "
        f"{both:.0f} MB to add up those of AdamW, {gathered:.0f} MB to gather updates in bf16), in "
        f"{len(simulated.gpu.collectives)} collectives; {ms:.2f} ms at NVLink's "
        f"{LINK_BYTES_PER_S / 1e9:.0f} GB/s in each direction. This is not in the times of steps "
        "above, nor are the starts of collectives and waits for the slowest rank.", "",
    ]  # fmt: skip


SECTIONS = {
    "quantization": quantization_section, "memory": memory_section,
    "calibration": calibration_section, "adaptive": adaptive_section,
    "communication": communication_section,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Compute memory and time of a run's stages.")
    parser.add_argument("recipe", nargs="?", default="default", help="file, or part of a name")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    parser.add_argument("--small", action="store_true", help="a small shape, to try the tool")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, with commas")
    args = parser.parse_args()
    knobs = dict(pair.split("=", 1) for pair in args.knobs)
    for name in args.sections.split(","):
        lines = SECTIONS[name](args.recipe, knobs, small=args.small)
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
