"""Compares bits per weight at a fixed size of the artifact: many coarse weights or few fine ones.

    python tests/bench_bits.py --seeds 1337 42    # train and quantize what is missing
    python tests/bench_bits.py --table            # rewrite tables and plot

Every shape is trained for the same CPU seconds of optimizer steps: the CPU time of a step is
measured once per shape, and sets the number of steps of all its runs. Each trained model is then
quantized to each size by several methods. Every result is a line of bits.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats

import train_gpt as tg
from records.logs import Json
from records.markdown import replace_marked, table_lines
from records.plots import FAINT, PALETTE, STYLE, save_figure
from records.results import append_result, read_results
from tests import bench_quant

ROOT = Path(__file__).parent.parent
TRACK = ROOT / "records" / "track_cpu_10min_64kb"
RESULTS, RECIPE, RUNS = TRACK / "bits.jsonl", TRACK / "tiny.env", ROOT / "logs" / "bench_bits"

# One rule: three blocks of two heads, width a multiple of 8, MLP closest to twice the width.
SHAPES = {  # width, width of the MLP
    "256k": (96, 215),
    "205k": (88, 171),
    "171k": (80, 150),
    "146k": (72, 145),
    "114k": (64, 115),
    "64k": (48, 65),
    "28k": (24, 76),
}
BUDGETS = {  # bytes of the artifact, and the shapes that are quantized to it
    64_000: ["256k", "205k", "171k", "146k", "114k"],
    32_000: ["114k", "64k"],
    16_000: ["64k", "28k"],
}
METHODS: dict[str, Json] = {
    "ours": {},
    "public": bench_quant.METHODS["reference"].knobs,
}
TITLES = {
    "ours": "optimal scales, trellis, ans",
    "public": "GPTQ, SDClip, uniform, brotli",
}
TIMED_STEPS = 16


def config(shape: str, **changed: str) -> tg.Config:
    """Return the configuration of a shape."""
    width, mlp_width = SHAPES[shape]
    given = {"RECIPE": str(RECIPE), "MODEL_DIM": str(width), "MAX_WALLCLOCK_SECONDS": "0"}
    given |= {"MLP_MULT": str((mlp_width + 0.5) / width), "CHECKPOINT_EVERY_SECONDS": "0"}
    return tg.config_from_env({**given, **changed})


def make_run(cfg: tg.Config, directory: Path) -> tg.Run:
    device, dtype = tg.open_device(cfg, 0)
    return tg.Run(cfg=cfg, directory=directory, rank=0, world_size=1, device=device, dtype=dtype)


def cpu_seconds_per_step(run: tg.Run, model: tg.GPT) -> float:
    """Return the median CPU seconds of a step; the weights are put back afterwards."""
    trainer, cfg = tg.Trainer(run, model), run.cfg
    trainer.warm_up()
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    window_BT = torch.randint(
        cfg.vocab_size, (cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len + 1)
    )
    clock_s = [time.process_time()]
    for _ in range(TIMED_STEPS):
        trainer.step(window_BT).item()
        clock_s.append(time.process_time())
    trainer.load(before, tg.Progress())
    return statistics.median(b - a for a, b in zip(clock_s, clock_s[1:], strict=False))


def train(shape: str, seed: int, seconds: float, results: Path) -> Path:
    """Train a model for `seconds` CPU seconds of steps; return its folder."""
    folder, cfg = RUNS / f"{shape}_{seed}", config(shape, SEED=str(seed))
    key, known = f"train {shape} {seed}", read_results(results)
    if key in known and list(folder.glob("checkpoint/step_*")):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = make_run(cfg, folder)
    model = tg.build_model(run)
    timed = known.get(f"time {shape}")
    if not timed:
        step_s = cpu_seconds_per_step(run, model)
        timed = {"key": f"time {shape}", "step_cpu_s": step_s, "seconds": seconds}
        append_result(results, timed)
    run.cfg = dataclasses.replace(cfg, iterations=round(seconds / timed["step_cpu_s"]))
    stream = tg.TokenStream(tg.find_shards(run.cfg, "train"), run.cfg.vocab_size)
    loader, started_s = tg.BatchLoader(run.cfg, stream, rank=0, world_size=1), time.process_time()
    trainer = tg.train(run, model, loader, lambda: None)  # type: ignore[arg-type, return-value]
    append_result(results, {
        "key": key, "steps": trainer.progress.step, "tokens": trainer.progress.tokens,
        "cpu_s": round(time.process_time() - started_s, 1),
        "params": sum(p.numel() for p in model.parameters()),
    })  # fmt: skip
    return folder


def quantized(
    subject: bench_quant.Subject, method: str, num_bytes: int
) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return the largest artifact within `num_bytes` that the search finds, and its weights."""
    cfg = dataclasses.replace(subject.run.cfg, **METHODS[method])
    subject.model.load_state_dict(subject.weights)
    groups = tg.group_matrices(cfg, subject.model, subject.hessians)
    encode = functools.partial(
        tg.encode_model, dataclasses.replace(subject.run, cfg=cfg, rank=1), subject.model, groups,
        subject.tokenizer_sha256,
    )  # fmt: skip
    payload = tg.fill_budget(groups, encode, num_bytes)
    decoded = tg.decode_tensors(*tg.decode_header(payload), *tg.model_layout(cfg))
    return payload, tg.dequantize_all(decoded)


def measure(shape: str, seed: int, folder: Path, results: Path) -> None:
    """Add the scores of a trained model before quantization and with every method and budget."""
    wanted = [
        (f"{method} {num_bytes} {shape} {seed}", method, num_bytes)
        for num_bytes, shapes in BUDGETS.items()
        for method in METHODS
        if shape in shapes
    ]
    known, about = read_results(results), f"model {shape} {seed}"
    if {about, *(key for key, _, _ in wanted)} <= known.keys():
        return
    subject = bench_quant.load_subject(folder, RUNS)
    bench_quant.calibrated(subject)
    if about not in known:
        append_result(results, {
            "key": about, "weights": subject.num_weights, "bpb": subject.bpb(subject.weights),
            "scored_bytes": int(subject.validation.target_bytes.sum()),
            "source_sha256": hashlib.sha256(Path(tg.__file__).read_bytes()).hexdigest(),
            "hardware": tg.describe_hardware(subject.run), "versions": tg.VERSIONS,
            "threads": torch.get_num_threads(),
        })  # fmt: skip
    for key, method, num_bytes in wanted:
        if key not in known:
            payload, weights = quantized(subject, method, num_bytes)
            row = {"key": key, "bytes": len(payload), "bpb": subject.bpb(weights)}
            append_result(results, row | {"ledger": tg.artifact_sizes(payload)})
            print(row, flush=True)


# --- Table ---------------------------------------------------------------------------------------


class Table:
    """The results, and what the table and the plot show of them."""

    def __init__(self, path: Path) -> None:
        self.rows = read_results(path)

    def seeds(self, num_bytes: int, *shapes: str) -> list[int]:
        """Return the seeds of which all methods of a budget are there for all these shapes."""
        keys = [f"{m} {num_bytes} {shape}" for m in METHODS for shape in shapes]
        seeds = dict.fromkeys(int(key.split()[-1]) for key in self.rows if key.startswith("model"))
        return [seed for seed in seeds if {f"{key} {seed}" for key in keys} <= self.rows.keys()]

    def shapes(self, num_bytes: int) -> list[str]:
        """Return the shapes of a budget that have results."""
        return [shape for shape in BUDGETS[num_bytes] if self.seeds(num_bytes, shape)]

    def model(self, num_bytes: int, shape: str) -> Json:
        """Return sizes and training of the first model of a shape."""
        seed = self.seeds(num_bytes, shape)[0]
        return self.rows[f"train {shape} {seed}"] | self.rows[f"model {shape} {seed}"]

    def bits(self, num_bytes: int, shape: str) -> float:
        """Return the bits of a full artifact per weight in matrices."""
        return float(8 * num_bytes / self.model(num_bytes, shape)["weights"])

    def bpb(self, method: str, num_bytes: int, shape: str, *with_shapes: str) -> list[float]:
        """Return the scores by seed, of seeds that these shapes have as well.

        Method "model": before quantization.
        """
        key = f"model {shape}" if method == "model" else f"{method} {num_bytes} {shape}"
        seeds = self.seeds(num_bytes, shape, *with_shapes)
        return [self.rows[f"{key} {seed}"]["bpb"] for seed in seeds]

    def lines(self, num_bytes: int) -> Iterator[str]:
        """Yield the table of a budget, and how the artifacts differ from the best one."""
        shapes = self.shapes(num_bytes)
        rows = []
        for shape in shapes:
            about = self.model(num_bytes, shape)
            scores = {m: self.bpb(m, num_bytes, shape) for m in ("model", *METHODS)}
            rows.append([
                f"{self.bits(num_bytes, shape):.2f}", f"{about['weights']:,}",
                *map(str, SHAPES[shape]), f"{about['steps']:,}",
                f"{about['tokens'] / about['params']:.1f}", str(len(scores["model"])),
                *map(mean_text, scores.values()), *difference(scores["public"], scores["ours"]),
            ])  # fmt: skip
        names = ["bits", "weights", "width", "MLP", "steps", "tokens a parameter", "seeds"]
        header = [*names, "before", "ours", "public", "public - ours", "p"]
        yield from table_lines(header, rows)
        best = min(shapes, key=lambda shape: statistics.fmean(self.bpb("ours", num_bytes, shape)))
        yield from ["", f"Mean differences to ours with {self.bits(num_bytes, best):.2f} bits:", ""]
        rows = []
        for method, shape in itertools.product(METHODS, shapes):
            base = self.bpb("ours", num_bytes, best, shape)
            if (method, shape) != ("ours", best) and base:
                gap = difference(self.bpb(method, num_bytes, shape, best), base)
                rows.append([method, f"{self.bits(num_bytes, shape):.2f}", str(len(base)), *gap])
        yield from table_lines(["method", "bits", "seeds", "difference", "p"], rows)


def mean_text(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ({statistics.stdev(values):.4f})" if len(values) > 1 else mean


def difference(scores: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """Return mean paired difference, and p-value of the two-sided paired t test."""
    gaps = [a - b for a, b in zip(scores, base, strict=True)]
    p = stats.ttest_1samp(gaps, 0).pvalue if len(gaps) > 1 else math.nan
    return f"{statistics.fmean(gaps):+.4f}", "-" if math.isnan(p) else f"{p:.2g}"


def draw_budget(axes: Axes, table: Table, num_bytes: int) -> None:
    """Draw the scores by bits per weight; far worse ones than all of ours are not in view."""
    shapes = table.shapes(num_bytes)
    bits = [table.bits(num_bytes, shape) for shape in shapes]
    titles = {"model": "before quantization", **TITLES}
    for (method, title), color in zip(titles.items(), (FAINT, *PALETTE), strict=False):
        scores = [table.bpb(method, num_bytes, shape) for shape in shapes]
        style = "--" if method == "model" else "o-"
        axes.plot(bits, [*map(statistics.fmean, scores)], style, color=color, ms=4, label=title)
        for x, values in zip(bits, scores, strict=True):
            axes.plot([x] * len(values), values, ".", color=color, ms=3, alpha=0.5)
    shown = [s for m in ("model", "ours") for x in shapes for s in table.bpb(m, num_bytes, x)]
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.8 * (high - low))
    axes.set_title(f"{num_bytes:,} bytes")
    axes.set_xlabel("bits per weight, whole artifact")


def draw_plot(table: Table, budgets: Sequence[int], path: Path) -> None:
    """Draw a panel for each size of the artifact."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(budgets), figsize=(3.4 * len(budgets) + 0.6, 4.2), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, num_bytes in zip(panels[0], budgets, strict=True):
            draw_budget(axes, table, num_bytes)
        panels[0][0].set_ylabel("bits per byte")
        figure.legend(
            *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2
        )
        save_figure(figure, path)


def write_table(results: Path) -> None:
    """Write the tables into README.md beside the results, and the plot."""
    table = Table(results)
    budgets = [num_bytes for num_bytes in BUDGETS if table.shapes(num_bytes)]
    if not budgets:
        return
    abouts = [row for key, row in table.rows.items() if key.startswith("model")]
    facts = {
        "Scored": [f"{row['scored_bytes']:,} bytes of validation text" for row in abouts],
        "Hardware": [f"{row['hardware']}, threads: {row['threads']}" for row in abouts],
        "Versions": [" ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in abouts],
        "SHA-256 of `train_gpt.py`": [row["source_sha256"] for row in abouts],
    }
    lines = [f"- {name}: {'; '.join(dict.fromkeys(values))}." for name, values in facts.items()]
    for num_bytes in budgets:
        lines += ["", f"### {num_bytes:,} bytes", "", *table.lines(num_bytes)]
    page = results.with_name("README.md")
    text = replace_marked(page.read_text(encoding="utf-8"), "results", "\n".join(lines))
    page.write_text(text, encoding="utf-8")
    draw_plot(table, budgets, results.with_suffix(".png"))


def main() -> None:
    """Measure what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 42, 7])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training")
    parser.add_argument("--table", action="store_true", help="only rewrite the table and the plot")
    args = parser.parse_args()
    os.chdir(ROOT)
    for seed in () if args.table else args.seeds:
        for shape in args.shapes:
            folder = train(shape, seed, args.seconds, RESULTS)
            measure(shape, seed, folder, RESULTS)
    write_table(RESULTS)


if __name__ == "__main__":
    main()
