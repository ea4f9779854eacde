"""Compares quantization methods on trained models: bytes, errors, scores, bytes of each coder.

    make bench-quant                                     # train three models, then measure them
                                                         # (and the seconds of the full shape)
    python tests/bench_quant.py --models RUN_DIR...      # measure runs that have a checkpoint
    python tests/bench_quant.py --table                  # rewrite the table and the plot

Every result is a line of quantization.jsonl; results for the same weights and the same train_gpt.py
are not measured again. Error: the sum of outputs[o] e_o H e_o^T over the rows of all matrices, that
is the weight errors weighted with the Hessian that train_gpt.calibrate measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import train_gpt as tg
from records.demo import DEMO_COMMAND, DEMO_DATA
from records.logs import Json
from records.plots import FAINT, PALETTE, STYLE, save_figure
from records.results import append_result

ROOT = Path(__file__).parent.parent

# --- What is measured ----------------------------------------------------------------------------

TRACK = ROOT / "records" / "track_cpu_10min_1mb"
RESULTS = TRACK / "quantization.jsonl"
RECIPE = TRACK / "gated.env"
FULL_RECIPE = ROOT / "records" / "track_10min_16mb" / "2026-05-01_Frontier" / "run.env"
VAL_TOKENS = 131_072
MODELS = {
    "gated_1337": "SEED=1337 ITERATIONS=600",
    "gated_42": "SEED=42 ITERATIONS=600",
    "wide": "NUM_LAYERS=6 MODEL_DIM=256 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=4.875 ITERATIONS=200 "
    "ARTIFACT_BUDGET_BYTES=8000000",
}
SIGMAS = "attn:13,mlp:11.5,embed:20,table:12.85"
SIX_BITS = {"attn_bits": 6, "mlp_bits": 6, "table_bits": 6, "embed_bits": 8}
SDCLIP = {**SIX_BITS, "clip_sigmas": SIGMAS}
ROUNDED = {"quantizer": "rtn", "quant_grid": "uniform"}


class Method(NamedTuple):
    """A quantization method."""

    title: str
    knobs: Json
    share: float = 0.0  # of the reference's bytes, to which it is fitted; 0 = not fitted
    is_removed: bool = False  # from the script: its rows stay, and cannot be measured again


METHODS = {
    "int8_zlib": Method(
        "int8, row scales by percentile, zlib",
        {**ROUNDED, "row_steps": "percentile", "compressor": "zlib"},
    ),
    "thwu1": Method(
        "int5 MLP, int6 rest, fp16 embedding, 3 % pruned, zstd",
        {**ROUNDED, "row_steps": "max", "mlp_bits": 5, "attn_bits": 6, "table_bits": 6}
        | {"embed_bits": 16, "prune_frac": 0.03, "compressor": "zstd"},
    ),
    "gptq_lite": Method(
        "GPTQ-lite: best of five percentiles, 6 bits, embedding 8, zstd",
        {},
        is_removed=True,
    ),
    "reference": Method(
        "GPTQ, SDClip, uniform, brotli (reference)",
        {**SDCLIP, "quant_grid": "uniform", "compressor": "brotli_shuffled"},
    ),
    "solved_trellis": Method("solved scales, trellis, ans (default)", {}, 1.0),
    "sdclip_uniform": Method("SDClip, uniform, ans", {**SDCLIP, "quant_grid": "uniform"}, 1.0),
    "solved_uniform": Method("solved scales, uniform, ans", {"quant_grid": "uniform"}, 1.0),
    "sdclip_trellis": Method("SDClip, trellis, ans", SDCLIP, 1.0),
    # LQER of rank 4 for the three matrices with the largest errors: openai/parameter-golf#2135.
    "sdclip_uniform_lqer": Method("SDClip, uniform, LQER, ans", {}, 1.0, is_removed=True),
    "solved_trellis_lqer": Method("solved scales, trellis, LQER, ans", {}, 1.0, is_removed=True),
}
# The same with fewer bytes, where the quantization loss is well above the noise.
for share in (85, 70):
    METHODS |= {
        f"{name}_{share}": method._replace(
            title=f"{method.title} at {share} %".replace(" (reference)", ""), share=share / 100
        )
        for name, method in METHODS.items()
        if name in ("reference", "solved_trellis")
    }
RIVALS = [  # default and reference with equal bytes
    ("solved_trellis", "reference"),
    ("solved_trellis_85", "reference_85"),
    ("solved_trellis_70", "reference_70"),
    ("solved_trellis", "sdclip_uniform"),
]
MEASURED = [name for name, method in METHODS.items() if not method.is_removed]
CODED = ("reference", "solved_trellis")  # methods whose codes are compressed with every coder
CURVES = ("sdclip_uniform", "solved_uniform", "solved_trellis")  # in the plot
FACTORS = (0.75, 1.35, 1.8, 2.4)  # times the scales that give the reference's bytes
FITTED = 1e-3  # relative tolerance of the bytes
PLAIN_CODERS = {"zlib-9": "zlib", "zstd-22": "zstd", "xz-9e": "lzma", "brotli-11": "brotli"}
CODERS = [*PLAIN_CODERS, "lrzip", "ans"]
CODERS += ["entropy by matrix", "conditional entropy", "classes"]  # bounds, in bytes
LRZIP = ["lrzip", "-z", "-L", "9", "-q", "-f", "-N", "0"]  # -N 0: not at low priority

# --- Models --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """A trained model with the data that the methods need."""

    name: str
    run: tg.Run
    model: tg.GPT
    weights: dict[str, torch.Tensor]
    validation: tg.Validation
    tokenizer_sha256: str
    trained: tg.Progress
    weights_sha256: str
    changed: str
    hessians: dict[str, tg.KroneckerHessian] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def matrices(self) -> list[str]:
        """The matrices: tensors that are quantized and whose errors count."""
        groups = tg.model_layout(self.run.cfg)[1]
        return [name for name in self.weights if groups[name] in ("attn", "mlp", "embed", "table")]

    @property
    def num_weights(self) -> int:
        return sum(self.weights[name].numel() for name in self.matrices)

    def errors(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the Hessian-weighted squared errors of the matrices by group."""
        groups, sums = tg.model_layout(self.run.cfg)[1], dict[str, float]()
        for name in self.matrices:
            e_OI, (inputs_II, outputs_O) = weights[name] - self.weights[name], self.hessians[name]
            error = float((outputs_O * ((e_OI @ inputs_II) * e_OI).sum(dim=1)).sum())
            sums[groups[name]] = sums.get(groups[name], 0.0) + error
        return sums

    def bpb(self, weights: Mapping[str, torch.Tensor]) -> float:
        """Return bits per byte of the validation text with these weights, in disjoint windows."""
        self.model.load_state_dict(dict(weights))
        score = tg.evaluate(self.run, self.model, self.validation, self.run.cfg.score_seq_len)
        return float(score.summary()["val_bpb"])


class FullShape(NamedTuple):
    """Random weights of a full competition model, only for timing: the speed of a coder per weight
    depends on how many matrices it codes together."""

    name: str = "full shape"
    weights_sha256: str = "normal weights, seed 0"
    num_bytes: int = 15_900_000


def train_models(folder: Path) -> list[Path]:
    """Return the run folders of MODELS; train those that are missing, on the corpus of the CPU
    track if it is there, else on that of the demo."""
    data = "data/corpus"
    if not (ROOT / data).exists():
        data = DEMO_DATA
        prepare = [sys.executable, *shlex.split(DEMO_COMMAND)[1:]]
        subprocess.run(prepare, check=True, cwd=ROOT)
    for name, settings in MODELS.items():
        if not (folder / name / "artifact.bin").exists():
            print(f"training {name} ({settings}) ...", flush=True)
            knobs = dict(pair.split("=") for pair in settings.split())
            knobs |= {"MODE": "train", "RECIPE": str(RECIPE), "RUN_DIR": str(folder / name)}
            knobs |= {"MAX_WALLCLOCK_SECONDS": "0", "DATA_PATH": data}
            script = [sys.executable, str(ROOT / "train_gpt.py")]
            subprocess.run(script, check=True, cwd=ROOT, env={**os.environ, **knobs})
    return [folder / name for name in MODELS]


def changed(config: Json) -> str:
    """Return the knobs of a training that differ from RECIPE."""
    recipe = dataclasses.asdict(tg.config_from_env(tg.read_recipe(RECIPE)))
    names = [*tg.STORED_KNOBS, "iterations", "max_wallclock_seconds", "data_path"]
    return " ".join(
        f"{name.upper()}={config[name]}"
        for name in names
        if name in config and config[name] != recipe[name]
    )


def load_subject(directory: Path, scratch: Path) -> Subject:
    """Load the model of the last checkpoint of a run."""
    folder = max(directory.glob("checkpoint/step_*"))
    meta = json.loads((folder / "meta.json").read_text())
    shape = {name: meta["config"][name] for name in tg.STORED_KNOBS if name in meta["config"]}
    kept = ("train_batch_tokens", "val_batch_size", "loader", "micro_batch_tokens")
    cfg = tg.Config(
        **shape, **{name: meta["config"][name] for name in kept},
        data_path=str(ROOT / meta["config"]["data_path"]), compile=False,
        max_wallclock_seconds=0.0, eval_stride=1, val_tokens_limit=VAL_TOKENS,
    )  # fmt: skip
    device, dtype = tg.open_device(cfg, 0)
    run = tg.Run(cfg=cfg, directory=scratch, rank=0, world_size=1, device=device, dtype=dtype)
    model = tg.build_model(run)
    state = safetensors.torch.load_file(folder / "state.safetensors")
    weights = {
        name.removeprefix("model/"): weight.float()
        for name, weight in state.items()
        if name.startswith("model/")
    }
    model.load_state_dict(weights)
    processor, tokenizer_sha256 = tg.load_tokenizer(cfg)
    return Subject(
        name=directory.name, run=run, model=model, weights=weights,
        validation=tg.load_validation(cfg, processor), tokenizer_sha256=tokenizer_sha256,
        trained=tg.Progress(*meta["progress"]), weights_sha256=meta["state_sha256"],
        changed=changed(meta["config"]),
    )  # fmt: skip


def calibrated(subject: Subject) -> float:
    """Measure the Hessians of a model; return the seconds."""
    cfg, started_s = subject.run.cfg, time.perf_counter()
    stream = tg.TokenStream(tg.find_shards(cfg, "train"), cfg.vocab_size)
    loader = tg.BatchLoader(cfg, stream, rank=0, world_size=1)
    subject.hessians = tg.calibrate(subject.run, subject.model, loader, subject.trained)
    return time.perf_counter() - started_s


# --- Results -------------------------------------------------------------------------------------


class Results:
    """The lines of the result file by kind, model and name."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, dict[tuple[str, str, str], Json]()
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self.rows[row["kind"], row["model"], row["name"]] = row

    def missing(self, subject: Subject | FullShape, kind: str, name: str) -> bool:
        row = self.rows.get((kind, subject.name, name), {})
        expected = subject.weights_sha256, source_sha256()
        return (row.get("weights_sha256"), row.get("source_sha256")) != expected

    def add(self, subject: Subject | FullShape, kind: str, name: str, **values: Any) -> None:
        row = {"kind": kind, "model": subject.name, "name": name, **values}
        row |= {"weights_sha256": subject.weights_sha256, "source_sha256": source_sha256()}
        self.rows[kind, subject.name, name] = row
        append_result(self.path, row)
        shown = {k: v for k, v in values.items() if isinstance(v, int | float)}
        print(tg.format_event(f"{kind} {subject.name} {name}", **shown), flush=True)

    def get(self, kind: str, model: str, name: str) -> Json:
        return self.rows.get((kind, model, name), {})

    def named(self, kind: str, model: str) -> dict[str, Json]:
        """Return the rows of one kind and model by name."""
        return {key[2]: row for key, row in self.rows.items() if key[:2] == (kind, model)}

    @property
    def models(self) -> list[str]:
        return [model for kind, model, _ in self.rows if kind == "model"]


@functools.cache
def source_sha256() -> str:
    return hashlib.sha256(Path(tg.__file__).read_bytes()).hexdigest()


# --- Measurements --------------------------------------------------------------------------------


def knobs_of(method: Method, cfg: tg.Config) -> tg.Config:
    return dataclasses.replace(cfg, **method.knobs)


class Made(NamedTuple):
    """An artifact, its tensors and the seconds that it took."""

    multiplier: float
    tensors: dict[str, tg.Quantized]
    payload: bytes
    quantize_s: float
    encode_s: float


def make(
    subject: Subject, cfg: tg.Config, stacks: Sequence[tg.MatrixGroup], multiplier: float
) -> Made:
    """Quantize and encode with all scales multiplied."""
    started_s = time.perf_counter()
    tensors = tg.quantize_model(cfg, subject.model, stacks, multiplier)
    quantized_s = time.perf_counter()
    payload = tg.encode_artifact(cfg, tensors, subject.tokenizer_sha256)
    encode_s = time.perf_counter() - quantized_s
    return Made(multiplier, tensors, payload, quantized_s - started_s, encode_s)


def fitted(
    subject: Subject, cfg: tg.Config, stacks: Sequence[tg.MatrixGroup], num_bytes: int
) -> Made:
    """Return an artifact of `num_bytes` bytes, by a secant search over the multiplier."""
    multiplier, tried = tg.scale_factor_for(stacks, 8.0 * num_bytes), list[tuple[float, int]]()
    for _ in range(7):
        made = make(subject, cfg, stacks, multiplier)
        tried.append((math.log2(multiplier), len(made.payload)))
        print(f"  multiplier {multiplier:.5g}: {len(made.payload)} of {num_bytes}", flush=True)
        if abs(len(made.payload) / num_bytes - 1) <= FITTED:
            break
        slope = -subject.num_weights / 8.0  # bytes per octave: one bit less for each weight
        if len(tried) > 1:
            (x0, y0), (x1, y1) = tried[-2:]
            slope = min((y1 - y0) / (x1 - x0), slope / 4)
        multiplier = 2 ** (tried[-1][0] + (num_bytes - tried[-1][1]) / slope)
    return made


def made_by(subject: Subject, name: str, results: Results, multiplier: float = 0.0) -> Made:
    """Return the artifact of a method, fitted to the reference's bytes or with a multiplier."""
    method = METHODS[name]
    cfg, started_s = knobs_of(method, subject.run.cfg), time.perf_counter()
    subject.model.load_state_dict(subject.weights)
    hessians = subject.hessians if cfg.quantizer == "gptq" else {}
    stacks = tg.group_matrices(cfg, subject.model, hessians)
    plan_s = time.perf_counter() - started_s
    if method.share and not multiplier:
        reference = results.get("method", subject.name, "reference")["bytes"]
        made = fitted(subject, cfg, stacks, round(method.share * reference))
    else:
        made = make(subject, cfg, stacks, multiplier or 1.0)
    return made._replace(quantize_s=plan_s + made.quantize_s)


def measure(subject: Subject, kind: str, name: str, made: Made, results: Results) -> None:
    """Add the row of an artifact that is read back; only rows of kind "method" are scored."""
    cfg, started_s = knobs_of(METHODS[name.partition("@")[0]], subject.run.cfg), time.perf_counter()
    decoded = tg.decode_tensors(*tg.decode_header(made.payload), *tg.model_layout(cfg))
    weights = tg.dequantize_all(decoded)
    decode_s = time.perf_counter() - started_s
    errors = subject.errors(weights)
    score = {"bpb": subject.bpb(weights)} if kind == "method" else {}
    results.add(
        subject, kind, name, bytes=len(made.payload), multiplier=made.multiplier,
        error=sum(errors.values()), errors=errors, quantize_s=round(made.quantize_s, 2),
        encode_s=round(made.encode_s, 2), decode_s=round(decode_s, 2),
        ledger=tg.artifact_sizes(made.payload), **tg.code_statistics(made.tensors), **score,
    )  # fmt: skip


def lrzip_bytes(raw: bytes) -> int | None:
    """Return the bytes after lrzip; None if it is not installed."""
    if not shutil.which(LRZIP[0]):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "codes"), Path(folder, "codes.lrz")
        source.write_bytes(raw)
        subprocess.run([*LRZIP, "-o", str(target), str(source)], check=True, capture_output=True)
        return target.stat().st_size


def label_bits(labels: np.ndarray) -> float:
    """Return the bits of labels under their own frequencies."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def conditional_bits(group: Sequence[tg.Quantized]) -> tuple[float, float]:
    """Return the conditional entropy of the codes of a group, and the entropy of the classes.

    The codes are conditioned on the class of their expected magnitude (product of the mean
    magnitudes of row and column, in quarter octaves) and on the quantizer of the trellis; with the
    Miller-Madow correction.
    """
    symbols, labels_bits = [], 0.0
    for tensor in group:
        codes_OI = tensor.values.reshape(tensor.values.shape[0], -1).astype(np.int64)
        size_OI = np.abs(codes_OI) + 1e-3
        column_I = np.rint(4 * np.log2(size_OI.mean(axis=0))).astype(np.int64)
        row_O = np.rint(4 * np.log2(size_OI.mean(axis=1) / size_OI.mean())).astype(np.int64)
        labels_bits += label_bits(column_I) + label_bits(row_O)
        state_OI = tg.trellis_levels(codes_OI) & 1 if tensor.trellis else np.zeros_like(codes_OI)
        context_OI = (row_O[:, None] + column_I + 512) * 2 + state_OI
        symbols.append((context_OI * 4096 + codes_OI + 2048).ravel())
    joint, counts = np.unique(np.concatenate(symbols), return_counts=True)
    context, place = np.unique(joint >> 12, return_inverse=True)
    total = np.bincount(place, counts)
    bits = float((counts * np.log2(total[place] / counts)).sum())
    return bits + (len(joint) - len(context)) / (2 * math.log(2)), labels_bits


def coder_bytes(group: Sequence[tg.Quantized]) -> Json:
    """Return the bytes of the codes of a group of tensors with every coder, and their entropies."""
    codes = np.concatenate([tensor.values.ravel().astype("<i2") for tensor in group])
    is_large = np.abs(codes.astype(np.int32)) > 127
    raw = np.where(is_large, -128, codes).astype(np.int8).tobytes() + codes[is_large].tobytes()
    sizes = [len(tg.find_compressor(module)[0](raw)) for module in PLAIN_CODERS.values()]
    ans = len(tg.pack_group(group, "ans")["codes"])
    entropy = sum(label_bits(tensor.values) for tensor in group)
    bits = [round(bits / 8) for bits in (entropy, *conditional_bits(group))]
    return dict(zip(CODERS, [*sizes, lrzip_bytes(raw), ans, *bits], strict=True))


def measure_coders(subject: Subject, name: str, made: Made, results: Results) -> None:
    """Add the bytes of the same codes with every coder, one stream for each group of tensors."""
    members = tg.group_names(list(made.tensors), tg.model_layout(subject.run.cfg)[1])
    by_group = dict[str, Json]()
    for group, names in members.items():
        coded = [t for t in map(made.tensors.__getitem__, names) if t.row_scales is not None]
        if coded:
            by_group[group] = coder_bytes(coded)
    values = {coder: [sizes[coder] for sizes in by_group.values()] for coder in CODERS}
    totals = {c: None if None in sizes else round(sum(sizes)) for c, sizes in values.items()}
    results.add(subject, "coders", name, **totals, by_group=by_group)


def gaussian_bound(subject: Subject) -> list[tuple[float, float]]:
    """Return points (bits per weight, error) of the rate-distortion bound of normal weights.

    Reverse water-filling over independent weights: weight (o, i) has the variance of its row times
    that of its column over the mean; its squared error has the weight outputs[o] / U_ii^2, as in
    GPTQ.
    """
    costs = []
    for name in subject.matrices:
        square_OI = subject.weights[name].square()
        variance_OI = square_OI.mean(dim=1, keepdim=True) * square_OI.mean(dim=0)
        variance_OI /= square_OI.mean().clamp_min(1e-30)
        inputs_II, outputs_O = subject.hessians[name]
        factor = tg.factor_hessians(inputs_II[None])
        per_column_I = factor.alive_LI[0] / factor.upper_diagonal_LI[0].square()
        costs.append((outputs_O[:, None] * variance_OI * per_column_I).flatten().double())
    cost_N = torch.cat(costs)
    points = []
    for rate in np.arange(1.0, 8.01, 0.125):
        low, high = -120.0, 60.0
        for _ in range(40):
            middle = (low + high) / 2
            bits = float((cost_N / 2**middle).clamp_min(1).log2().mean()) / 2
            low, high = (middle, high) if bits > rate else (low, middle)
        points.append((float(rate), float(cost_N.clamp_max(2**high).sum())))
    return points


def describe(subject: Subject, calibrate_s: float, results: Results) -> None:
    """Add the row of a model."""
    cfg, names = subject.run.cfg, ("constriction", "brotli", "zstandard")
    versions = {name: importlib.metadata.version(name) for name in names}
    results.add(
        subject, "model", "", params=sum(w.numel() for w in subject.weights.values()),
        weights=subject.num_weights, steps=subject.trained.step, tokens=subject.trained.tokens,
        changed=subject.changed, bpb=subject.bpb(subject.weights), bound=gaussian_bound(subject),
        scored_bytes=int(subject.validation.target_bytes.sum()),
        calibrate_s=round(calibrate_s, 2), calibration_tokens=cfg.gptq_calibration_batches
        * cfg.train_batch_tokens, date=f"{datetime.date.today()}",
        hardware=tg.describe_hardware(subject.run), threads=torch.get_num_threads(),
        versions={**tg.VERSIONS, **versions},
        precision=str(subject.run.dtype).removeprefix("torch."),
    )  # fmt: skip


def measure_full_shape(results: Results) -> None:
    """Measure the seconds of quantizer and coder at the full shape."""
    subject = FullShape()
    if not results.missing(subject, "seconds", ""):
        return
    torch.manual_seed(0)
    cfg = tg.config_from_env({"RECIPE": str(FULL_RECIPE), "COMPILE": "0"})
    model = tg.GPT(cfg, tg.ATTENTION_BACKENDS["sdpa"](), torch.float32)
    shapes, groups = tg.model_layout(cfg)
    names = [name for name, group in groups.items() if group in ("attn", "mlp", "embed", "table")]
    hessians, inputs = dict[str, tg.KroneckerHessian](), dict[int, torch.Tensor]()
    for name in names:
        rows, columns = shapes[name]
        model.get_parameter(name).data.normal_(std=0.02)
        if columns not in inputs:  # input variances follow a power law, as in a trained model
            x_NI = torch.randn(2 * columns, columns) * torch.arange(1, columns + 1) ** -0.5
            inputs[columns] = x_NI.T @ x_NI
        hessians[name] = tg.KroneckerHessian(inputs[columns], torch.rand(rows) + 0.1)
    clock = [(time.perf_counter(), time.process_time())]

    def tick() -> None:
        clock.append((time.perf_counter(), time.process_time()))

    stacks = tg.group_matrices(cfg, model, hessians)
    multiplier = tg.scale_factor_for(stacks, 8.0 * subject.num_bytes)
    tensors = tg.quantize_model(cfg, model, stacks, multiplier)
    tick()
    payload = tg.encode_artifact(cfg, tensors, "0" * 64)
    tick()
    decoded = tg.dequantize_all(tg.decode_tensors(*tg.decode_header(payload), shapes, groups))
    tick()
    assert decoded.keys() == shapes.keys()
    spent = [tuple(round(b - a, 1) for a, b in zip(*pair, strict=True))
             for pair in itertools.pairwise(clock)]  # fmt: skip
    steps = zip(("quantize", "encode", "decode"), spent, strict=True)
    results.add(
        subject, "seconds", "", weights=sum(math.prod(shapes[name]) for name in names),
        bytes=len(payload), threads=torch.get_num_threads(),
        **{f"{step}_{kind}": x for step, pair in steps
           for kind, x in zip(("s", "cpu_s"), pair, strict=True)},
    )  # fmt: skip


def measure_model(subject: Subject, results: Results, methods: Sequence[str], more: bool) -> None:
    """Measure what is missing for one model; `more`: also the coders and the curves of the plot."""
    calibrate_s = calibrated(subject)
    if results.missing(subject, "model", ""):
        describe(subject, calibrate_s, results)
    for name in methods:
        if results.missing(subject, "method", name):
            measure(subject, "method", name, made_by(subject, name, results), results)
    multipliers = {
        name: row["multiplier"] for name, row in results.named("method", subject.name).items()
    }
    for name in CODED if more else ():
        if name in multipliers and results.missing(subject, "coders", name):
            made = made_by(subject, name, results, multipliers[name])
            measure_coders(subject, name, made, results)
    for name, factor in itertools.product(CURVES, FACTORS) if more else ():
        key = f"{name}@{factor:g}"
        if name in multipliers and results.missing(subject, "rate", key):
            made = made_by(subject, name, results, factor * multipliers[name])
            measure(subject, "rate", key, made, results)


# --- Table ---------------------------------------------------------------------------------------


def decibels(row: Json, reference: Json) -> float:
    """Return the error of a row relative to the reference, in dB."""
    return 10 * math.log10(row["error"] / reference["error"])


def bits_per_weight(row: Json, model: Json) -> float:
    return float(8 * row["bytes"] / model["weights"])


def method_lines(results: Results, model: str) -> Iterator[str]:
    """Yield the lines of the table of methods of a model."""
    about, rows = results.get("model", model, ""), results.named("method", model)
    reference = rows["reference"]
    header = ["method", "bytes", "bits per weight", "error, dB", "bpb", "added bpb"]
    yield f"| {' | '.join([*header, 'quantize s', 'encode s', 'decode s'])} |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, row in rows.items():
        yield (
            f"| {METHODS[name].title} | {row['bytes']:,} | {bits_per_weight(row, about):.3f} | "
            f"{decibels(row, reference):+.2f} | {row['bpb']:.5f} | "
            f"{row['bpb'] - about['bpb']:+.5f} | {row['quantize_s']:.1f} | "
            f"{row['encode_s']:.1f} | {row['decode_s']:.1f} |"
        )


def coder_lines(results: Results) -> Iterator[str]:
    """Yield the lines of the table of coders, with a column for the codes of each model."""
    columns = [
        (model, name, row)
        for model in results.models
        for name, row in results.named("coders", model).items()
    ]
    titles = {"reference": "reference", "solved_trellis": "default"}
    heads = [f"{model}, {titles[name]}" for model, name, _ in columns]
    yield f"| bytes of the codes | {' | '.join(heads)} |"
    yield "| --- |" + " ---: |" * len(columns)
    labels = {"lrzip": " ".join(LRZIP[:4]), "classes": "entropy of the classes"}
    for coder in CODERS:
        cells = [coder_cell(row, coder) for *_, row in columns]
        yield f"| {labels.get(coder, coder)} | {' | '.join(cells)} |"


def coder_cell(row: Json, coder: str) -> str:
    """Return the bytes of a coder and their excess over ans."""
    if row[coder] is None:
        return "not installed"
    if coder == "classes":
        return f"{row[coder]:,.0f}"
    return f"{row[coder]:,.0f} ({100 * (row[coder] / row['ans'] - 1):+.2f} %)"


def group_lines(results: Results, model: str) -> Iterator[str]:
    """Yield lines with the errors of reference and default by group."""
    methods = results.named("method", model)
    for name in CODED:
        errors, total = methods.get(name, {}).get("errors"), methods["reference"]["error"]
        if errors:
            shares = ", ".join(f"{group} {e / total:.1%}" for group, e in sorted(errors.items()))
            title = METHODS[name].title
            yield f"\nError by group, relative to the error of the reference: {title}: {shares}."


class Goal(NamedTuple):
    """A bound on a measured quantity, and its values for the models."""

    text: str
    values: list[float]
    bound: float
    unit: str = " dB"
    at_most: bool = False

    def line(self) -> str:
        met = sum((v <= self.bound) if self.at_most else (v >= self.bound) for v in self.values)
        verdict = f"met {met} of {len(self.values)}" if self.values else "not measured"
        shown = ", ".join(f"{value:.2f}" for value in self.values)
        wanted = f"{'<=' if self.at_most else '>='} {self.bound:g}{self.unit}"
        return f"| {self.text} | {wanted} | {shown} | {verdict} |"


def pairs_of(results: Results, ours: str, theirs: str) -> list[tuple[Json, Json, Json]]:
    """Return for each model that has both methods its own row and those of the methods."""
    named = [(results.get("model", m, ""), results.named("method", m)) for m in results.models]
    return [(about, rows[ours], rows[theirs]) for about, rows in named if {ours, theirs} <= {*rows}]


def error_goals(results: Results) -> Iterator[Goal]:
    """Yield the goals for errors, and the gain of each part of the default (bound 0)."""
    wanted = [
        ("solved_trellis", "reference", 0.9),
        ("solved_trellis", "sdclip_uniform", 0.9),
        ("sdclip_trellis", "sdclip_uniform", 0.0),
        ("solved_uniform", "sdclip_uniform", 0.0),
        ("solved_trellis", "solved_uniform", 0.0),
        ("solved_trellis", "solved_trellis_lqer", 0.0),
        ("sdclip_uniform_lqer", "sdclip_uniform", 0.0),
    ]
    for ours, theirs, least in wanted:
        values = [-decibels(a, b) for _, a, b in pairs_of(results, ours, theirs)]
        yield Goal(
            f"error reduction of {METHODS[ours].title} from {METHODS[theirs].title}", values, least
        )


def tax_goals(results: Results) -> Iterator[Goal]:
    """Yield the goals for the added bpb with equal bytes."""
    for ours, theirs in RIVALS:
        taxes = [
            (a["bpb"] - about["bpb"], b["bpb"] - about["bpb"])
            for about, a, b in pairs_of(results, ours, theirs)
        ]
        values = [100 * (1 - tax / other) for tax, other in taxes]
        text = f"added bpb of {METHODS[ours].title}, below {METHODS[theirs].title}"
        yield Goal(text, values, 15, " %")


def coder_goals(results: Results) -> Iterator[Goal]:
    """Yield the goals for the bytes and the speed of the entropy coder."""
    for name in reversed(CODED):
        rows = [row for m in results.models if (row := results.get("coders", m, name))]
        codes = f"bytes of ans for the codes of {METHODS[name].title}"
        for coder, least in [("brotli-11", 2.0), ("lrzip", 1.0)]:
            values = [100 * (1 - row["ans"] / row[coder]) for row in rows if row[coder]]
            yield Goal(f"{codes}, below {coder}", values, least, " %")
        for parts in (["conditional entropy"], ["conditional entropy", "classes"]):
            values = [100 * (row["ans"] / sum(row[part] for part in parts) - 1) for row in rows]
            yield Goal(f"{codes}, above {' and '.join(parts)}", values, 0.5, " %", at_most=True)
    if full := results.get("seconds", FullShape().name, ""):
        for step, limit_s in [("quantize", 180), ("encode", 60), ("decode", 15)]:
            text = f"{step} {full['weights'] / 1e6:.1f} M weights, {full['threads']} threads"
            yield Goal(text, [full[f"{step}_s"]], limit_s, " s", at_most=True)
            yield Goal(f"{text}: CPU time", [full[f"{step}_cpu_s"]], limit_s, " s", at_most=True)


HEAD = """# Quantization

Generated by `python tests/bench_quant.py --table`; do not edit.

Every method makes an artifact from the same trained weights; all figures are of the weights that
are read back from it. Bits per weight: 8 times the bytes of the artifact divided by the number of
weights in matrices. Error: Hessian-weighted squared error of all matrices (sum of outputs[o] e_o H
e_o^T over their rows), relative to the reference. bpb: bits per byte of the first {tokens:,}
validation tokens in disjoint windows of the training context; added bpb: the increase by
quantization. The methods with `ans` are fitted to the bytes of the reference (or the given share of
them) by one common factor of all scales, within {fitted:g} %. GPTQ-lite and LQER were measured with
the script whose SHA-256 is below; today's script has neither of them.

- Commands: `make bench-quant`, or `python tests/bench_quant.py --models RUN_DIR...`; this file:
  the same with `--table`. Every number: `quantization.jsonl`.
"""
CODER_NOTE = """
The same codes, group by group, with each coder; in brackets: relative to `ans`. General compressors
get one byte per code, with larger codes appended as two bytes. Entropy by matrix: empirical entropy
of each matrix. Conditional entropy: given the class of the expected magnitude (the product of the
mean magnitudes of row and column, in quarter octaves; statistics pooled over a group) and the
quantizer of the trellis, with the Miller-Madow correction. It assumes that the decoder knows the
classes; the last line is what it would take to send them.
"""


def model_line(about: Json) -> str:
    """Return the line that describes a model."""
    recipe = f"`{RECIPE.relative_to(ROOT)}`" + (
        f" with `{about['changed']}`" * bool(about["changed"])
    )
    return (
        f"- {about['model']}: {recipe}; {about['params']:,} parameters, {about['weights']:,} "
        f"weights in matrices; checkpoint after {about['steps']:,} steps, {about['tokens']:,} "
        f"tokens; bpb before quantization {about['bpb']:.5f} ({about['precision']}). "
        f"calibration on {about['calibration_tokens']:,} tokens took {about['calibrate_s']:.1f} s; "
        f"{about['date']}."
    )


def write_table(results: Results) -> None:
    """Write the results as Markdown beside their file."""
    abouts = [results.get("model", model, "") for model in results.models]
    lines = [HEAD.format(tokens=VAL_TOKENS, fitted=100 * FITTED).rstrip()]
    for key in ("hardware", "threads", "source_sha256"):
        title = {"source_sha256": "SHA-256 of `train_gpt.py`"}.get(key, key.capitalize())
        values = dict.fromkeys(str(row[key]) for row in [*results.rows.values()] if key in row)
        lines.append(f"- {title}: {', '.join(values)}.")
    versions = dict.fromkeys(" ".join(f"{k} {v}" for k, v in a["versions"].items()) for a in abouts)
    lines.append(f"- Versions: {'; '.join(versions)}.")
    lines += [model_line(about) for about in abouts]
    lines += ["- The machine did other work at the same time; seconds are upper bounds.", ""]
    lines += ["![Error by bits per weight](quantization.png)", "", "## Goals", ""]
    lines += ["| goal | bound | reached | |", "| --- | --- | --- | --- |"]
    goals = [*error_goals(results), *tax_goals(results), *coder_goals(results)]
    lines += [goal.line() for goal in goals]
    for about in abouts:
        if "reference" in results.named("method", about["model"]):
            lines += ["", f"## {about['model']}", "", *method_lines(results, about["model"])]
            lines += group_lines(results, about["model"])
    lines += ["", "## Coders", CODER_NOTE, *coder_lines(results)]
    results.path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_curves(axes: Axes, results: Results, model: str) -> None:
    """Draw the error by bits per weight of one model."""
    about, methods = results.get("model", model, ""), results.named("method", model)
    rows, reference = {**methods, **results.named("rate", model)}, methods["reference"]
    spans: list[float] = []
    for color, name in zip(PALETTE, (*CURVES, "reference"), strict=False):
        points = sorted(
            (bits_per_weight(row, about), decibels(row, reference))
            for key, row in rows.items()
            if re.fullmatch(rf"{name}(_\d+|@.*)?", key)
        )
        spans += [x for x, _ in points]
        label = METHODS[name].title.removesuffix(" (default)").removesuffix(" (reference)")
        style = "s--" if name == "reference" else "o-"
        axes.plot(*zip(*points, strict=True), style, color=color, ms=4, lw=1.3, label=label)
    low, high = min(spans) - 0.2, max(spans) + 0.2
    bound = [
        (x, 10 * math.log10(error / reference["error"]))
        for x, error in about["bound"]
        if low <= x <= high
    ]
    axes.plot(
        *zip(*bound, strict=True),
        color=FAINT,
        lw=1.3,
        label="rate-distortion bound of normal weights",
    )
    axes.set_title(f"{model}: {about['weights'] / 1e6:.2f} M weights")
    axes.set_xlabel("bits per weight, whole artifact")


def draw_plot(results: Results) -> None:
    """Draw a panel for each model that has all curves."""
    wanted = {"reference", *CURVES}
    models = [m for m in results.models if wanted <= results.named("method", m).keys()]
    if not models:
        return
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(models), figsize=(3.6 * len(models) + 0.6, 4.2), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, model in zip(panels[0], models, strict=True):
            draw_curves(axes, results, model)
        panels[0][0].set_ylabel("weighted error relative to the reference, dB")
        handles = panels[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2)
        save_figure(figure, results.path.with_suffix(".png"))


def main() -> None:
    """Measure what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", type=Path, help="run folders, instead of MODELS")
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument("--only-methods", action="store_true", help="no coders, no curves")
    parser.add_argument("--results", type=Path, default=RESULTS, help="result file")
    parser.add_argument("--table", action="store_true", help="only rewrite the table and the plot")
    args = parser.parse_args()
    results = Results(args.results)
    if not args.table:
        scratch = ROOT / "logs" / "bench_quant"
        scratch.mkdir(parents=True, exist_ok=True)
        measure_full_shape(results)
        for directory in args.models or train_models(scratch):
            subject = load_subject(directory, scratch)
            measure_model(subject, results, args.methods, not args.only_methods)
    write_table(results)
    draw_plot(results)


if __name__ == "__main__":
    main()
