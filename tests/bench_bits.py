"""Compares bits per weight at a fixed size of the artifact: many coarse weights or few fine ones.

    python tests/bench_bits.py                    # train and quantize what is missing
    python tests/bench_bits.py --table            # rewrite tables and plot
    python tests/bench_bits.py --long [--table]   # 600 instead of 120 seconds of training

Every shape is trained for the same CPU seconds of optimizer steps. The CPU time of a step is
measured first, of all shapes in turn, and sets the number of steps of all their runs. Each trained
model is then quantized to each size by several methods. Every result is a line of bits.jsonl or
bits_long.jsonl. Several processes may work on the same results if each has its own seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
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
RECIPE, RUNS = TRACK / "tiny.env", ROOT / "logs" / "bench_bits"


# One rule: blocks of two heads, width a multiple of 8, MLP closest to twice the width. Names of
# other depths end with the number of blocks.
SHAPES = {  # blocks, width, width of the MLP
    "256k": (3, 96, 215),
    "205k": (3, 88, 171),
    "205k-2": (2, 104, 209),
    "205k-4": (4, 80, 136),
    "171k": (3, 80, 150),
    "146k": (3, 72, 145),
    "146k-2": (2, 88, 155),
    "146k-4": (4, 64, 125),
    "114k": (3, 64, 115),
    "114k-2": (2, 72, 159),
    "114k-4": (4, 56, 106),
    "93k": (3, 56, 108),
    "64k": (3, 48, 65),
    "28k": (3, 24, 76),
}
MAIN_DEPTH = 3  # the plot joins the shapes of this depth by lines
OTHER_DEPTHS = {2: "v", 4: "^"}  # and their markers


class Setting(NamedTuple):
    """A comparison: the CPU seconds of a training, and what is quantized to which size."""

    results: str
    seconds: float
    budgets: dict[int, list[str]]  # bytes of the artifact, and the shapes
    finished: dict[int, list[str]]  # the same for a quantization-aware finish

    @property
    def shapes(self) -> list[str]:
        return [*dict.fromkeys(itertools.chain(*self.budgets.values()))]

    def finished_sizes(self, shape: str) -> list[int]:
        return [size for size, shapes in self.finished.items() if shape in shapes]


SHORT = Setting(
    "bits.jsonl", 120, {
        64_000: ["256k", "205k", "171k", "146k", "114k"],
        32_000: ["114k", "64k"],
        16_000: ["64k", "28k"],
    }, {},
)  # fmt: skip
LONG = Setting(
    "bits_long.jsonl", 600, {
        64_000: [*SHORT.budgets[64_000], "93k", *(name for name in SHAPES if "-" in name)]
    }, {64_000: ["256k", "205k", "171k", "146k", "146k-2", "146k-4", "114k"]},
)  # fmt: skip
METHODS: dict[str, Json] = {
    "ours": {},
    "public": bench_quant.METHODS["reference"].knobs,
}
QAT = {  # of the last tenth of the steps, which have 1/6 of the learning rate or less
    "LATE_QAT_THRESHOLD": "0.167",
    "QAT_GRID": "artifact",
}
TITLES = {
    "ours": "ours: solved scales, trellis, ANS",
    "public": "public: GPTQ, SDClip, uniform, brotli",
    "qat": "qat: ours after a quantization-aware finish",
}
TIMED_STEPS, TIMED_ROUNDS = 8, 6
FINISH_FROM = 0.9  # the share of the steps after which a checkpoint is kept, to end otherwise


def config(shape: str, **changed: str) -> tg.Config:
    """Return the configuration of a shape."""
    num_layers, width, mlp_width = SHAPES[shape]
    given = {"RECIPE": str(RECIPE), "NUM_LAYERS": str(num_layers), "MODEL_DIM": str(width)}
    given |= {"MLP_MULT": str((mlp_width + 0.5) / width), "LATE_QAT_THRESHOLD": "0"}
    given |= {"MAX_WALLCLOCK_SECONDS": "0"}
    return tg.config_from_env({**given, **changed})


def make_run(cfg: tg.Config, directory: Path) -> tg.Run:
    device, dtype = tg.open_device(cfg, 0)
    return tg.Run(cfg=cfg, directory=directory, rank=0, world_size=1, device=device, dtype=dtype)


def time_steps(setting: Setting, results: Path) -> None:
    """Measure the CPU seconds of a step of all shapes in turn, unless they are known.

    If some are known, those of the others are in proportion to one of them.
    """
    rows = {shape: read_results(results).get(f"time {shape}") for shape in setting.shapes}
    known_s = {shape: row["step_cpu_s"] for shape, row in rows.items() if row}
    missing = [shape for shape, row in rows.items() if not row]
    if not missing:
        return
    shapes = [*missing, *list(known_s)[-1:]]
    trainers = {}
    for shape in shapes:
        run = make_run(config(shape), RUNS)
        trainers[shape] = tg.Trainer(run, tg.build_model(run))
        trainers[shape].warm_up()
    taken_s = {shape: list[float]() for shape in trainers}
    for shape, trainer in [*trainers.items()] * TIMED_ROUNDS:
        cfg = trainer.run.cfg
        window_BT = torch.randint(
            cfg.vocab_size, (cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len + 1)
        )
        taken_s[shape] += cpu_seconds(trainer, window_BT)
    median_s = {shape: statistics.median(values) for shape, values in taken_s.items()}
    for shape in missing:
        factor = known_s[shapes[-1]] / median_s[shapes[-1]] if known_s else 1.0
        append_result(results, {
            "key": f"time {shape}", "step_cpu_s": factor * median_s[shape],
            "seconds": setting.seconds,
        })  # fmt: skip


def cpu_seconds(trainer: tg.Trainer, window_BT: torch.Tensor) -> list[float]:
    """Return the CPU seconds of each of some steps."""
    clock_s = [time.process_time()]
    for _ in range(TIMED_STEPS):
        trainer.step(window_BT).item()
        clock_s.append(time.process_time())
    return [b - a for a, b in itertools.pairwise(clock_s)]


class Loader(tg.BatchLoader):
    """Batches of training text; asks the run to stop at a number of tokens."""

    def __init__(self, run: tg.Run, stop_at: int = -1) -> None:
        stream = tg.TokenStream(tg.find_shards(run.cfg, "train"), run.cfg.vocab_size)
        super().__init__(run.cfg, stream, rank=0, world_size=1)
        self.run, self.stop_at = run, stop_at

    def batch(self, position: int, stage: tg.TrainStage) -> torch.Tensor:
        self.run.signal_received |= position == self.stop_at
        return super().batch(position, stage)


def train(shape: str, seed: int, setting: Setting, results: Path) -> Path:
    """Train a model, which may continue from a checkpoint; return its folder."""
    folder = RUNS / results.stem / f"{shape}_{seed}"
    key, known = f"train {shape} {seed}", read_results(results)
    if key in known and list(folder.glob("checkpoint/step_*")):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, to_finish = folder / "checkpoint", folder / "to_finish"
    steps = round(setting.seconds / known[f"time {shape}"]["step_cpu_s"])
    cfg = config(shape, SEED=str(seed), ITERATIONS=str(steps))
    stop_at = round(FINISH_FROM * steps) * cfg.train_batch_tokens
    while True:
        run = make_run(cfg, folder)
        try:
            trainer = tg.train(run, tg.build_model(run), Loader(run, stop_at), lambda: None)  # type: ignore[arg-type, return-value]
            break
        except tg.Interrupted:
            copy = shutil.copytree(checkpoints, folder / "to_finish.tmp", dirs_exist_ok=True)
            copy.rename(to_finish)
    append_result(results, {
        "key": key, "steps": trainer.progress.step, "tokens": trainer.progress.tokens,
        "train_s": round(trainer.progress.train_s, 1),
        "params": sum(p.numel() for p in trainer.params),
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
        tg.encode_model, dataclasses.replace(subject.run, cfg=cfg, rank=1), subject.model,
        subject.tokenizer_sha256, groups,
    )  # fmt: skip
    payload = tg.fill_budget(groups, encode, num_bytes)
    return payload, read_back(cfg, payload)


def read_back(cfg: tg.Config, payload: bytes) -> dict[str, torch.Tensor]:
    tensors = tg.decode_tensors(*tg.decode_header(payload), *tg.model_layout(cfg))
    return tg.dequantize_all(tensors)


def measure(shape: str, seed: int, setting: Setting, results: Path) -> None:
    """Add the scores of a trained model before quantization and with every method and budget."""
    wanted = [
        (f"{method} {num_bytes} {shape} {seed}", method, num_bytes)
        for num_bytes, shapes in setting.budgets.items()
        for method in METHODS
        if shape in shapes
    ]
    known, about = read_results(results), f"model {shape} {seed}"
    if {about, *(key for key, _, _ in wanted)} <= known.keys():
        return
    subject = bench_quant.load_subject(train(shape, seed, setting, results), RUNS)
    bench_quant.calibrated(subject)
    if about not in known:
        append_result(results, {
            "key": about, "weights": subject.num_weights, "bpb": subject.bpb(subject.weights),
            "scored_bytes": int(subject.validation.target_bytes.sum()),
            "source_sha256": bench_quant.source_sha256(),
            "hardware": tg.describe_hardware(subject.run), "versions": tg.VERSIONS,
            "threads": torch.get_num_threads(),
        })  # fmt: skip
    for key, method, num_bytes in wanted:
        if key not in known:
            payload, weights = quantized(subject, method, num_bytes)
            row = {"key": key, "bytes": len(payload), "bpb": subject.bpb(weights)}
            append_result(results, row | {"ledger": tg.artifact_sizes(payload)})
            print(row, flush=True)


# --- Quantization-aware finish -------------------------------------------------------------------


def finish_run(shape: str, seed: int, num_bytes: int, results: Path, **changed: str) -> tg.Run:
    """Return a run that continues from the checkpoint before the last steps with late QAT."""
    source = RUNS / results.stem / f"{shape}_{seed}" / "to_finish"
    folder = RUNS / results.stem / f"{shape}_{seed}_{num_bytes}_qat"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder / "checkpoint")
    (folder / "train_gpt.py").touch()  # the code, of no bytes: num_bytes are for the rest
    knobs = {**QAT, "SEED": str(seed), "ARTIFACT_BUDGET_BYTES": str(num_bytes), **changed}
    run = make_run(config(shape, **knobs), folder)
    (checkpoint,) = folder.glob("checkpoint/step_*")
    state = safetensors.torch.load_file(checkpoint / "state.safetensors")
    tensors = tg.Trainer(run, tg.build_model(run)).tensors()
    unknown = {name: tensor for name, tensor in tensors.items() if name.startswith("grid/")}
    payload = safetensors.torch.save(state | unknown)
    (checkpoint / "state.safetensors").write_bytes(payload)
    meta = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    meta["state_sha256"] = hashlib.sha256(payload).hexdigest()
    meta["config"] = dataclasses.asdict(run.cfg)
    (checkpoint / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return run


def time_qat(shape: str, seed: int, num_bytes: int, results: Path) -> Json:
    """Measure the CPU seconds of the search for the grid, and of steps with and without QAT."""
    key = f"time_qat {num_bytes} {shape}"
    if known := read_results(results).get(key):
        return known
    run = finish_run(shape, seed, num_bytes, results)
    trainer, loader = tg.Trainer(run, tg.build_model(run)), Loader(run)
    trainer.warm_up()
    tg.load_checkpoint(trainer)
    started_s = time.process_time()
    trainer.solve_grid(loader)
    row: Json = {"key": key, "solve_cpu_s": time.process_time() - started_s}
    window_BT = loader.batch(trainer.progress.tokens, trainer.current_stage)
    taken_s: dict[bool, list[float]] = {False: [], True: []}
    for qat in [False, True] * TIMED_ROUNDS:
        trainer.enter_stage(trainer.current_stage._replace(qat=qat))
        taken_s[qat] += cpu_seconds(trainer, window_BT)
    without_s, with_s = (statistics.median(taken_s[qat]) for qat in (False, True))
    row |= {"step_cpu_s": without_s, "qat_step_cpu_s": with_s}
    append_result(results, row)
    return row


def finish(shape: str, seed: int, num_bytes: int, results: Path) -> None:
    """Add the score of a model whose last steps were trained on the final grid.

    These steps, and the search for the grid, take as much CPU time as the steps without.
    """
    key, known = f"qat {num_bytes} {shape} {seed}", read_results(results)
    if key in known:
        return
    timed = time_qat(shape, seed, num_bytes, results)
    steps = known[f"train {shape} {seed}"]["steps"]
    done = round(FINISH_FROM * steps) + 1
    left_s = (steps - done) * timed["step_cpu_s"] - timed["solve_cpu_s"]
    last = done + round(left_s / timed["qat_step_cpu_s"])
    run = finish_run(shape, seed, num_bytes, results, ITERATIONS=str(last))
    trainer = tg.train(run, tg.build_model(run), Loader(run), lambda: None)  # type: ignore[arg-type, return-value]
    subject = bench_quant.load_subject(run.directory, RUNS)
    cfg = dataclasses.replace(run.cfg, compile=False)
    subject.run = dataclasses.replace(run, cfg=cfg)
    subject.model = tg.build_model(subject.run)
    subject.model.load_state_dict(trainer.model.state_dict())
    for name, module in tg.late_qat_modules(cfg, subject.model).items():
        module.grid = trainer.late_modules[name].grid
    bench_quant.calibrated(subject)
    payload = tg.quantize_and_encode(subject.run, subject.model, subject.hessians, "")
    row = {
        "key": key,
        "steps": last,
        "bytes": len(payload),
        "source_sha256": bench_quant.source_sha256(),
    }
    row |= {"bpb": subject.bpb(read_back(cfg, payload)), "ledger": tg.artifact_sizes(payload)}
    append_result(results, row)
    print(row, flush=True)


# --- Table ---------------------------------------------------------------------------------------


class Table:
    """The results, and what the table and the plot show of them."""

    def __init__(self, setting: Setting, path: Path) -> None:
        self.setting, self.rows = setting, read_results(path)

    def methods(self, num_bytes: int, shape: str) -> list[str]:
        """Return the methods that a shape is measured with."""
        is_finished = num_bytes in self.setting.finished_sizes(shape)
        return [*METHODS, *(["qat"] if is_finished else [])]

    def seeds(self, num_bytes: int, *shapes: str) -> list[int]:
        """Return the seeds of which all methods of a budget are there for all these shapes."""
        keys = [
            f"{m} {num_bytes} {shape}" for shape in shapes for m in self.methods(num_bytes, shape)
        ]
        seeds = dict.fromkeys(int(key.split()[-1]) for key in self.rows if key.startswith("model"))
        return [seed for seed in seeds if {f"{key} {seed}" for key in keys} <= self.rows.keys()]

    def shapes(self, num_bytes: int) -> list[str]:
        """Return the shapes of a budget that have results."""
        return [shape for shape in self.setting.budgets[num_bytes] if self.seeds(num_bytes, shape)]

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

    def pairs(self, num_bytes: int) -> list[tuple[str, str]]:
        """Return all pairs of a method and a shape that are measured, by method."""
        shapes = self.shapes(num_bytes)
        pairs = [(m, shape) for shape in shapes for m in self.methods(num_bytes, shape)]
        return sorted(pairs, key=lambda pair: [*TITLES].index(pair[0]))

    def lines(self, num_bytes: int) -> Iterator[str]:
        """Yield the table of a budget, and how the artifacts differ from the best one."""
        names = [*METHODS, *(["qat"] if num_bytes in self.setting.finished else [])]
        rows = []
        for shape in self.shapes(num_bytes):
            about, methods = self.model(num_bytes, shape), self.methods(num_bytes, shape)
            scores = {m: self.bpb(m, num_bytes, shape) for m in ("model", *methods)}
            gaps = [(m, "ours") for m in names if m != "ours"]
            rows.append([
                f"{self.bits(num_bytes, shape):.2f}", f"{about['weights']:,}",
                *map(str, SHAPES[shape]), f"{about['steps']:,}",
                f"{about['tokens'] / about['params']:.1f}", str(len(scores["model"])),
                *(mean_text(scores.get(m, [])) for m in ("model", *names)),
                *itertools.chain(*(difference(scores.get(a, []), scores[b]) for a, b in gaps)),
            ])  # fmt: skip
        header = ["bits", "weights", "blocks", "width", "MLP", "steps", "tokens a parameter"]
        header += ["seeds", "before", *names]
        header += itertools.chain(*((f"{m} - ours", "p") for m in names if m != "ours"))
        yield from table_lines(header, rows)
        pairs = self.pairs(num_bytes)
        method, best = min(pairs, key=lambda x: statistics.fmean(self.bpb(x[0], num_bytes, x[1])))
        bits, num_layers = self.bits(num_bytes, best), SHAPES[best][0]
        yield from ["", f"Mean differences to {method}, {bits:.2f} bits, {num_layers} blocks:", ""]
        rows = []
        for other, shape in pairs:
            base = self.bpb(method, num_bytes, best, shape)
            if (other, shape) != (method, best) and base:
                gap = difference(self.bpb(other, num_bytes, shape, best), base)
                bits = self.bits(num_bytes, shape)
                row = [other, f"{bits:.2f}", str(SHAPES[shape][0]), str(len(base))]
                rows.append([*row, *gap])
        yield from table_lines(["method", "bits", "blocks", "seeds", "difference", "p"], rows)


def mean_text(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ({statistics.stdev(values):.4f})" if len(values) > 1 else mean


def difference(scores: Sequence[float], base: Sequence[float]) -> tuple[str, str]:
    """Return mean paired difference, and p-value of the two-sided paired t test."""
    if not scores:
        return "-", "-"
    gaps = [a - b for a, b in zip(scores, base, strict=True)]
    p = stats.ttest_1samp(gaps, 0).pvalue if len(gaps) > 1 else math.nan
    return f"{statistics.fmean(gaps):+.4f}", "-" if math.isnan(p) else f"{p:.2g}"


def draw_budget(axes: Axes, table: Table, num_bytes: int) -> None:
    """Draw the scores by bits per weight; far worse ones than all of ours are not in view."""
    titles = {"model": "before quantization", **TITLES}
    shown: list[float] = []
    pairs = [("model", shape) for shape in table.shapes(num_bytes)] + table.pairs(num_bytes)
    for (method, title), color in zip(titles.items(), (FAINT, *PALETTE), strict=False):
        scores = {shape: table.bpb(method, num_bytes, shape) for m, shape in pairs if m == method}
        if not scores:
            continue
        styles = {MAIN_DEPTH: "--" if method == "model" else "o-", **OTHER_DEPTHS}
        for num_layers, style in styles.items():
            means = {
                table.bits(num_bytes, shape): statistics.fmean(values)
                for shape, values in scores.items()
                if SHAPES[shape][0] == num_layers
            }
            label = title if num_layers == MAIN_DEPTH else None
            axes.plot([*means], [*means.values()], style, color=color, ms=4, label=label)
        for shape, values in scores.items():
            x = [table.bits(num_bytes, shape)] * len(values)
            axes.plot(x, values, ".", color=color, ms=3, alpha=0.5)
        if method != "public":
            shown += itertools.chain(*scores.values())
    for num_layers in {SHAPES[shape][0] for _, shape in pairs} - {MAIN_DEPTH}:
        title = f"{num_layers} blocks, not {MAIN_DEPTH}"
        axes.plot([], [], OTHER_DEPTHS[num_layers], color=FAINT, ms=4, label=title)
    low, high = min(shown), max(shown)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.8 * (high - low))
    axes.set_title(f"{num_bytes:,} bytes")
    axes.set_xlabel("bits per weight, whole artifact")


def draw_plot(table: Table, budgets: Sequence[int], path: Path) -> None:
    """Draw a panel for each size of the artifact."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(budgets), figsize=(max(5.2, 3.4 * len(budgets) + 0.6), 4.6), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, num_bytes in zip(panels[0], budgets, strict=True):
            draw_budget(axes, table, num_bytes)
        panels[0][0].set_ylabel("bits per byte")
        figure.legend(
            *panels[0][0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=min(2, len(budgets)),
        )
        save_figure(figure, path)


def write_table(setting: Setting, results: Path) -> None:
    """Write the tables into README.md beside the results, and the plot."""
    table = Table(setting, results)
    budgets = [num_bytes for num_bytes in setting.budgets if table.shapes(num_bytes)]
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
    text = replace_marked(page.read_text(encoding="utf-8"), results.stem, "\n".join(lines))
    page.write_text(text, encoding="utf-8")
    draw_plot(table, budgets, results.with_suffix(".png"))


def main() -> None:
    """Measure what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 42, 7])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all of the setting")
    parser.add_argument("--long", action="store_true", help="600 CPU seconds of training, not 120")
    parser.add_argument("--table", action="store_true", help="only rewrite the table and the plot")
    args = parser.parse_args()
    os.chdir(ROOT)
    setting = LONG if args.long else SHORT
    results = TRACK / setting.results
    if not args.table:
        time_steps(setting, results)
        for seed, shape in itertools.product(args.seeds, args.shapes or setting.shapes):
            measure(shape, seed, setting, results)
            for num_bytes in setting.finished_sizes(shape):
                finish(shape, seed, num_bytes, results)
    write_table(setting, results)


if __name__ == "__main__":
    main()
