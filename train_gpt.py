"""Train, compress and score a language model whose code and weights fit in 16,000,000 bytes.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # 8 GPUs, all defaults
    MAX_WALLCLOCK_SECONDS=60 python train_gpt.py               # one GPU, or a CPU, to look around
    MODE=describe python train_gpt.py                          # shape, groups, bytes; needs no data
    MODE=eval ARTIFACT=logs/x/artifact.bin python train_gpt.py # score an artifact, fresh process

The environment is the only configuration: every knob is a field of Config, spelled in capitals.
RECIPE=path/to/run.env reads KEY=value lines as defaults below the real environment. A run trains
(at most MAX_WALLCLOCK_SECONDS), quantises, writes the artifact, reads it back from the file into a
fresh model, and scores that model in bits per byte. Everything it writes lies in RUN_DIR. A run
that was killed goes on from its last checkpoint when it is started again with the same RUN_DIR.

Sections: 1. Configuration  2. Run context  3. Data  4. Model  5. Optimization
          6. Training  7. Quantization  8. Artifact  9. Evaluation
Tensor suffixes: B sequences, T positions, D model width, H query heads, K key/value heads,
                 E width of a head, F MLP width, V vocabulary, O x I a weight's out x in,
                 N tokens, L equal matrices in a stack, R adapter rank.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import platform
import resource
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import safetensors.torch
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention

# --- 1. Configuration ----------------------------------------------------------------------------
# One frozen dataclass, one line a knob. config_from_env is pure; it refuses unknown names, bad
# values and contradictions, all in one message. Derived values are properties, never fields.

class InputError(ValueError):
    """Something that a user gave is wrong: a knob, a file, a data set."""

class RunFailed(RuntimeError):
    """The run went wrong by itself: a budget was passed, the loss is not finite."""

class Interrupted(RuntimeError):
    """A signal asked the run to stop; what it had is saved."""

def knob(default: Any, doc: str, **meta: Any) -> Any:
    """A field set by the variable of its name; bounds are inclusive; shape: artifacts carry it."""
    unset = {"unit": "", "low": None, "high": None, "choices": (), "shape": False}
    assert meta.keys() <= unset.keys(), f"unknown: {meta.keys() - unset.keys()}"
    return field(default=default, metadata={"doc": doc, **unset, **meta})

BITS = (4, 5, 6, 7, 8, 16)

@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every knob of the script; an environment variable has the field's name in capitals."""
    # Run
    mode: str = knob("all", "what to do: train and score, train only, score an artifact, describe", choices=("all", "train", "eval", "describe"))  # noqa: E501
    recipe: str = knob("", "file of KEY=value lines that serve as defaults")
    run_id: str = knob("", "name of the run; empty = date, time and process")
    run_dir: str = knob("", "folder of everything the run writes; empty = logs/RUN_ID")
    seed: int = knob(1337, "seeds initialisation and data order", low=0, high=2**31 - 1, shape=True)
    track: str = knob("track_10min_16mb", "competition track named in submission.json")
    submission_name: str = knob("", "name in submission.json; empty = RUN_ID")
    submission_author: str = knob("", "author in submission.json")
    resume: bool = knob(True, "go on from the checkpoint in RUN_DIR if there is one")
    checkpoint_every_seconds: float = knob(120.0, "time between checkpoints; 0 = none", unit="s", low=0)  # noqa: E501
    precision: str = knob("auto", "arithmetic of the forward pass; auto = bf16 where the hardware has it", choices=("auto", "bf16", "fp32"))  # noqa: E501
    compile: bool = knob(True, "compile the blocks and the loss with torch.compile")
    attention: str = knob("auto", "attention kernel; auto = the best one installed", choices=("auto", "fa3", "fa2", "flex", "sdpa"))  # noqa: E501
    target_val_bpb: float = knob(0.0, "fail if the final score is above; 0 = no bound", unit="bpb", low=0)  # noqa: E501
    # Data
    data_path: str = knob("./data/datasets/fineweb10B_sp1024", "folder with *_train_*.bin and *_val_*.bin")  # noqa: E501
    tokenizer_path: str = knob("", "SentencePiece model; empty = DATA_PATH/tokenizer.model")
    loader: str = knob("stream", "order of training windows", choices=("stream", "shuffled", "coprime"))  # noqa: E501
    isolate_documents: bool = knob(False, "attention does not cross document starts (BOS)", shape=True)  # noqa: E501
    train_seq_len: int = knob(1024, "training context", unit="tokens", low=1, high=2**20, shape=True)  # noqa: E501
    train_batch_tokens: int = knob(524_288, "tokens of one optimizer step, over all ranks", unit="tokens", low=1)  # noqa: E501
    train_seq_schedule: str = knob("", "shorter contexts at first: TOKENS@SHARE,... until these shares of progress, then TRAIN_SEQ_LEN")  # noqa: E501
    train_batch_schedule: str = knob("", "smaller batches at first, likewise; then TRAIN_BATCH_TOKENS")  # noqa: E501
    micro_batch_tokens: int = knob(65_536, "most tokens of one forward pass on one rank", unit="tokens", low=1)  # noqa: E501
    # Model
    vocab_size: int = knob(1024, "pieces of the tokenizer", low=4, high=65_536, shape=True)
    num_layers: int = knob(9, "distinct transformer blocks", low=1, high=256, shape=True)
    model_dim: int = knob(512, "width of the residual stream", unit="channels", low=2, high=16_384, shape=True)  # noqa: E501
    num_heads: int = knob(8, "query heads; divides MODEL_DIM", low=1, high=1024, shape=True)
    num_kv_heads: int = knob(4, "key/value heads; divides NUM_HEADS", low=1, high=1024, shape=True)
    mlp_mult: float = knob(2.0, "MLP width over MODEL_DIM", low=0.125, high=64, shape=True)
    leaky_slope: float = knob(0.0, "MLP is leaky_relu(x, slope)^2; 0 = relu^2", low=0, high=1, shape=True)  # noqa: E501
    tie_embeddings: bool = knob(True, "the head is the transposed embedding", shape=True)
    tied_embed_init_std: float = knob(0.005, "embedding's initial standard deviation if tied", low=0)  # noqa: E501
    embed_init: str = knob("normal", "embedding's initial spectrum; overtone = S_k ~ k^-1/2", choices=("normal", "overtone"))  # noqa: E501
    resid_mix_init: str = knob("last", "resid_mix: all stream, or early blocks lean on x0 (phase)", choices=("last", "phase"))  # noqa: E501
    init: str = knob("default", "initial matrices: uniform fan-in or orthogonal; outputs are zero", choices=("default", "orthogonal"))  # noqa: E501
    logit_softcap: float = knob(30.0, "logits are cap * tanh(z / cap)", low=1e-3, shape=True)
    asym_logit_rescale: bool = knob(False, "two trainable caps, for positive and negative logits", shape=True)  # noqa: E501
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", low=1, shape=True)
    rope_dims: int = knob(0, "rotated channels of a head; 0 = all", unit="channels", low=0, shape=True)  # noqa: E501
    qk_gain_init: float = knob(1.5, "initial gain of each query head", low=0)
    ln_scale: bool = knob(False, "normed inputs of block i are scaled by 1/sqrt(i + 1)", shape=True)
    skip_gates: bool = knob(False, "U-net skips are gated blends instead of sums", shape=True)
    xsa_last_n: int = knob(0, "last blocks whose attention drops its own value direction", low=0, shape=True)  # noqa: E501
    xsa_layers: str = knob("", "the same for any blocks, as 0,2,5-7", shape=True)
    attn_gate: str = knob("none", "gate of each head's output: static, from the whole input, or from its first GATE_WINDOW channels (2 sigmoid or sigmoid)", choices=("none", "head", "input", "window", "sparse"), shape=True)  # noqa: E501
    gate_window: int = knob(12, "input channels of small gates", unit="channels", low=1, shape=True)
    sparse_attn_gate_scale: float = knob(1.0, "factor in the sparse gate's sigmoid", low=0, shape=True)  # noqa: E501
    smear_gate: str = knob("none", "mix in the token before: blend (half at first) or lambda (nothing at first)", choices=("none", "blend", "lambda"), shape=True)  # noqa: E501
    bigram_vocab_size: int = knob(0, "rows of the hashed bigram table; 0 = none", low=0, high=2**20, shape=True)  # noqa: E501
    bigram_dim: int = knob(128, "its width", unit="channels", low=1, shape=True)
    trigram_vocab_size: int = knob(0, "rows of the hashed trigram table; 0 = none", low=0, high=2**20, shape=True)  # noqa: E501
    trigram_dim: int = knob(32, "its width", unit="channels", low=1, shape=True)
    trigram_hash: str = knob("mixing", "mixing, or PR #430's polynomial in 31, which collides", choices=("mixing", "polynomial"), shape=True)  # noqa: E501
    value_residual: str = knob("none", "first block's values in later ones (resformer, vrl), or x0 after each block", choices=("none", "resformer", "vrl", "x0"), shape=True)  # noqa: E501
    ve_layers: str = knob("", "blocks whose values take a shared value embedding, as 9,10", shape=True)  # noqa: E501
    ve_dim: int = knob(128, "its width", unit="channels", low=1, shape=True)
    num_loops: int = knob(0, "extra passes through the looped blocks", low=0, high=16, shape=True)
    loop_start: int = knob(3, "first looped block", low=0, shape=True)
    loop_end: int = knob(5, "last looped block", low=0, shape=True)
    enable_looping_at: str = knob("0.5", "share of progress at which loops begin; one number a loop = one after the other")  # noqa: E501
    parallel_residual: str = knob("none", "attention and MLP side by side: on one stream, on two lanes that merge at the end, or that each write to both (MLP after attention: routed; at once: lanes)", choices=("none", "stream", "merge", "routed", "lanes"), shape=True)  # noqa: E501
    parallel_start_layer: int = knob(7, "first block of it", low=0, shape=True)
    # Optimization
    embed_lr: float = knob(0.6, "Adam, embedding if untied", low=0)
    head_lr: float = knob(0.008, "Adam, head if untied", low=0)
    tied_embed_lr: float = knob(0.05, "Adam, embedding if tied", low=0)
    scalar_lr: float = knob(0.04, "Adam, vectors and scalars", low=0)
    adam_wd: float = knob(0.0, "decoupled weight decay of vectors and scalars", low=0)
    embed_wd: float = knob(0.0, "decoupled weight decay of embeddings, tables and head", low=0)
    beta1: float = knob(0.9, "Adam", low=0, high=0.9999)
    beta2: float = knob(0.95, "Adam", low=0, high=0.99999)
    adam_eps: float = knob(1e-8, "Adam", low=1e-20)
    matrix_lr: float = knob(0.04, "Muon, block matrices", low=0)
    muon_momentum: float = knob(0.95, "Muon, after its ramp", low=0, high=0.9999)
    muon_momentum_warmup_start: float = knob(0.85, "Muon momentum at step 0", low=0, high=0.9999)
    muon_momentum_warmup_steps: int = knob(500, "length of the momentum ramp", unit="steps", low=0)
    muon_momentum_cooldown_frac: float = knob(0.0, "share of training in which momentum falls back to its start", low=0, high=1)  # noqa: E501
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = knob("classic", "Newton-Schulz polynomial", choices=("classic", "polar"))  # noqa: E501
    muon_row_norm: bool = knob(False, "normalise the update's rows before Newton-Schulz")
    muon_wd: float = knob(0.0, "decoupled weight decay of Muon", low=0)
    wd_taper_start_frac: float = knob(1.0, "share of progress from which Muon's weight decay changes", low=0, high=1)  # noqa: E501
    wd_taper_final_mult: float = knob(1.0, "its factor at the end", low=0)
    grad_clip_norm: float = knob(0.0, "bound of the global gradient norm; 0 = none", low=0)
    # Schedule
    iterations: int = knob(20_000, "most optimizer steps", unit="steps", low=1)
    max_wallclock_seconds: float = knob(600.0, "training budget; 0 = none", unit="s", low=0)
    warmup_steps: int = knob(20, "steps that only trigger compilation; their effect is undone", unit="steps", low=0)  # noqa: E501
    warmdown_frac: float = knob(0.5, "share of training with falling learning rate", low=0, high=1)
    warmdown_iters: int = knob(0, "the same in steps of the measured pace; 0 = WARMDOWN_FRAC", unit="steps", low=0)  # noqa: E501
    min_lr: float = knob(0.0, "floor of the learning rate multiplier", low=0, high=1)
    averaging: str = knob("none", "weights that are exported", choices=("none", "ema", "swa", "tail"))  # noqa: E501
    ema_decay: float = knob(0.997, "decay of the moving average a step", low=0, high=0.999999)
    swa_start_lr: float = knob(0.4, "SWA collects while the multiplier is below", low=0, high=1)
    swa_start_frac: float = knob(0.0, "SWA collects from this share of progress; 0 = SWA_START_LR", low=0, high=1)  # noqa: E501
    tail_frac: float = knob(0.1, "share of training whose every step AVERAGING=tail averages", low=0, high=1)  # noqa: E501
    swa_every: int = knob(50, "steps between collected weights", unit="steps", low=1)
    late_qat_threshold: float = knob(0.0, "straight-through quantisation while the multiplier is below; 0 = never", low=0, high=1)  # noqa: E501
    qat_groups: str = knob("attn,mlp", "tensor groups that it quantises, of attn, mlp, embed, table")  # noqa: E501
    train_log_every: int = knob(200, "steps between log lines", unit="steps", low=1)
    val_loss_every: int = knob(1000, "steps between validations; 0 = none", unit="steps", low=0)
    # Artifact
    attn_bits: int = knob(8, "bits of attention matrices; 16 = float16", unit="bits", choices=BITS)
    mlp_bits: int = knob(8, "bits of MLP matrices", unit="bits", choices=BITS)
    embed_bits: int = knob(8, "bits of embedding and head", unit="bits", choices=BITS)
    table_bits: int = knob(8, "bits of hashed and value embeddings", unit="bits", choices=BITS)
    compressor: str = knob("zlib", "last stage of the artifact", choices=("zlib", "zstd", "lzma", "brotli"))  # noqa: E501
    artifact_budget_bytes: int = knob(16_000_000, "most bytes of packed code and artifact", unit="bytes", low=1)  # noqa: E501
    artifact: str = knob("", "artifact to score in MODE=eval; empty = RUN_DIR/artifact.bin")
    # Evaluation
    eval_seq_len: int = knob(0, "evaluation context; 0 = TRAIN_SEQ_LEN", unit="tokens", low=0)
    eval_stride: int = knob(64, "targets scored by each sliding window; 0 = no sliding pass", unit="tokens", low=0)  # noqa: E501
    val_batch_size: int = knob(524_288, "tokens of one evaluation step, over all ranks", unit="tokens", low=1)  # noqa: E501
    val_tokens_limit: int = knob(0, "score only the first tokens, marked partial; 0 = all", unit="tokens", low=0)  # noqa: E501
    eval_max_seconds: float = knob(600.0, "evaluation budget; 0 = none", unit="s", low=0)

    def __post_init__(self) -> None:
        problems = [p for f in fields(self) if (p := out_of_range(f, getattr(self, f.name)))]
        with contextlib.suppress(ZeroDivisionError):  # of a 0 that is among the problems already
            problems += contradictions(self)
        require(not problems, "\n  ".join(["invalid configuration:", *problems]))

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def rotary_dims(self) -> int:
        """Channels of each head that rotary positions turn."""
        return self.rope_dims or self.head_dim

    @property
    def score_seq_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def xsa_blocks(self) -> set[int]:
        last = range(self.num_layers - self.xsa_last_n, self.num_layers)
        return {*last, *parse_layers(self.xsa_layers)}

    @property
    def bits(self) -> dict[str, int]:
        """Bits of a stored weight by group of tensors."""
        return {"attn": self.attn_bits, "mlp": self.mlp_bits, "embed": self.embed_bits,
                "table": self.table_bits, "control": 16}

def parse_layers(text: str) -> list[int]:
    """The numbers of a list like 0,2,5-7; ValueError if it is not one."""
    spans = [part.split("-") if "-" in part else (part, part) for part in text.split(",") if text]
    return [n for first, last in spans for n in range(int(first), int(last) + 1)]

def parse_schedule(text: str, last: int) -> list[tuple[int, float]]:
    """(value, share of progress until which it holds) of VALUE@SHARE,...; `last` holds to 1."""
    pairs = (part.split("@") for part in text.split(",") if text)
    return [*((int(value), float(until)) for value, until in pairs), (last, 1.0)]

def malformed(cfg: Config) -> list[str]:
    """What is wrong with the knobs that hold lists."""
    def are_blocks(text: str) -> bool:
        layers = parse_layers(text)
        return bool(layers) == bool(text) and layers == sorted({*layers} & {*range(cfg.num_layers)})

    def rises(text: str) -> bool:
        values, shares = zip(*parse_schedule(text, 1), strict=True)
        return min(values) > 0 and 0 < shares[0] and list(shares) == sorted(set(shares))

    def are_loops(text: str) -> bool:
        shares = [0.0, *map(float, text.split(",")), 1.0]
        rising = all(a <= b for a, b in itertools.pairwise(shares))  # false for nan
        return len(shares) - 2 in {1, cfg.num_loops} and rising

    blocks = (are_blocks, f"list blocks below NUM_LAYERS={cfg.num_layers}, as 0,2,5-7")
    schedule = (rises, "be VALUE@SHARE,... with rising shares below 1, as 1024@0.1,2048@0.7")
    rules: dict[str, tuple[Callable[[str], bool], str]] = {
        "xsa_layers": blocks, "ve_layers": blocks,
        "train_seq_schedule": schedule, "train_batch_schedule": schedule,
        "enable_looping_at": (are_loops, "be one share of progress, or NUM_LOOPS rising ones"),
        "qat_groups": (lambda text: set(text.split(",")) <= cfg.bits.keys() - {"control"},
                       "name groups of attn, mlp, embed, table")}
    problems = []
    for name, (holds, rule) in rules.items():
        text, good = getattr(cfg, name), False
        with contextlib.suppress(ValueError):  # of a part that is no number: not good
            good = holds(text)
        problems += [] if good else [f"{name.upper()}={text!r} must {rule}"]
    return problems

def contradictions(cfg: Config) -> list[str]:
    """What is wrong between knobs that are each in range."""
    problems = malformed(cfg)
    D, H, K, L = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.num_layers
    window, context, polar = cfg.gate_window, cfg.score_seq_len, len(NS_POLAR_EXPRESS)
    rules = {
        f"NUM_HEADS={H} must divide MODEL_DIM={D}": D % H == 0,
        f"NUM_KV_HEADS={K} must divide NUM_HEADS={H}": H % K == 0,
        f"ROPE_DIMS={cfg.rope_dims} (0 = the head's width) must be even and at most MODEL_DIM/"
        f"NUM_HEADS={cfg.head_dim}": cfg.rotary_dims % 2 == 0 and cfg.rotary_dims <= cfg.head_dim,
        f"EVAL_STRIDE={cfg.eval_stride} must be at most the evaluation context {context} "
        "(EVAL_SEQ_LEN or TRAIN_SEQ_LEN)": cfg.eval_stride <= context,
        f"MUON_BACKEND_STEPS={cfg.muon_backend_steps} must be at most {polar} with MUON_"
        "COEFFICIENTS=polar": cfg.muon_coefficients != "polar" or cfg.muon_backend_steps <= polar,
        f"XSA_LAST_N={cfg.xsa_last_n} must be at most NUM_LAYERS={L}": cfg.xsa_last_n <= L,
        f"LOOP_START={cfg.loop_start}, LOOP_END={cfg.loop_end} must be blocks in this order, below "
        f"NUM_LAYERS={L}": cfg.num_loops == 0 or cfg.loop_start <= cfg.loop_end < L,
        f"PARALLEL_START_LAYER={cfg.parallel_start_layer} must be below NUM_LAYERS={L}":
            cfg.parallel_residual == "none" or cfg.parallel_start_layer < L,
        f"GATE_WINDOW={window} must be at most MODEL_DIM={D}":
            window <= D or not {cfg.attn_gate, cfg.smear_gate} & {"window", "sparse", "lambda"},
        "BIGRAM_VOCAB_SIZE and TRIGRAM_VOCAB_SIZE must be 0 or at least 2":
            1 not in (cfg.bigram_vocab_size, cfg.trigram_vocab_size),
        "TRIGRAM_HASH=polynomial reads over document starts; not with ISOLATE_DOCUMENTS=1":
            cfg.trigram_hash == "mixing" or not cfg.isolate_documents,
        "VALUE_RESIDUAL=x0 needs one stream: PARALLEL_RESIDUAL=none or stream":
            cfg.value_residual != "x0" or cfg.parallel_residual in ("none", "stream")}
    longest, trains = cfg.train_seq_len, cfg.mode != "eval"
    for T, tokens, *_ in [] if problems else phases(cfg):
        rules |= {
            f"TRAIN_BATCH_TOKENS={tokens} must be a multiple of TRAIN_SEQ_LEN={T}":
                not trains or tokens % T == 0,
            f"TRAIN_SEQ_SCHEDULE: {T} is above TRAIN_SEQ_LEN={longest}": T <= longest}
    return problems + [text for text, holds in rules.items() if not holds]

BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
# Parts of a name that no foreign variable has: a name with one of them is a misspelt knob.
OUR_WORDS = {"TTT", "MUON", "GPTQ", "EMA", "SWA", "LORA", "WARMDOWN", "QAT", "XSA", "SOFTCAP",
             "ROPE", "BIGRAM", "TRIGRAM", "LQER", "STRIDE", "BPB"}

def out_of_range(f: dataclasses.Field[Any], value: Any) -> str:
    """What is wrong with `value` for this knob, or an empty string."""
    meta, name = f.metadata, f.name.upper()
    if meta["choices"] and value not in meta["choices"]:
        return f"{name}={value!r} must be one of {', '.join(map(str, meta['choices']))}"
    low, high = meta["low"], meta["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        return f"{name}={value} must be {bounds} ({meta['doc']})"
    return ""

def parse_value(text: str, kind: type) -> Any:
    """`text` as a bool, int, finite float or str; ValueError if it is not one."""
    value = BOOLEANS.get(text.lower()) if kind is bool else kind(text)
    if value is None or (kind is float and not math.isfinite(value)):
        raise ValueError(text)
    return value

def read_recipe(path: Path) -> dict[str, str]:
    """The KEY=value lines of a recipe; empty lines and # comments are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"RECIPE={path} cannot be read: {error}") from error
    known, settings = {f.name.upper() for f in fields(Config)}, dict[str, str]()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            name, equals, value = map(str.strip, line.partition("="))
            require(equals and name in known,
                    f"{path}:{number}: {line!r} is not KNOB=value of a known knob")
            settings[name] = value
    return settings

def config_from_env(env: Mapping[str, str]) -> Config:
    """Build the Config from `env` over its RECIPE; one ValueError lists every bad variable."""
    settings = {**read_recipe(Path(env["RECIPE"])), **env} if env.get("RECIPE") else env
    kinds = {name.upper(): kind for name, kind in get_type_hints(Config).items()}
    values, problems = dict[str, Any](), list[str]()
    for name, text in settings.items():
        if name in kinds:
            try:
                values[name.lower()] = parse_value(text, kinds[name])
            except ValueError:
                problems.append(f"{name}={text!r} is not a valid {kinds[name].__name__}")
        elif near := difflib.get_close_matches(name, kinds, n=1, cutoff=0.85):
            problems.append(f"{name} is not a knob; did you mean {near[0]}?")
        elif OUR_WORDS & set(name.split("_")):
            problems.append(f"{name} is not a knob of this script")
    try:
        cfg = Config(**values)
    except ValueError as error:  # ranges and contradictions join the same message
        problems += str(error).split("\n  ")[1:]
    require(not problems, "\n  ".join(["invalid environment:", *problems]))
    return cfg

def changed_knobs(cfg: Config) -> list[str]:
    """Names of the knobs that differ from their defaults, in capitals, sorted."""
    return sorted(f.name.upper() for f in fields(cfg) if getattr(cfg, f.name) != f.default)

# --- 2. Run context ------------------------------------------------------------------------------
# Who computes where, what is written down, and where the seconds went. All files are written to a
# temporary name, synced and renamed, so that a kill at any moment leaves old or new, never half.

def require(holds: object, message: str) -> None:
    """Refuse what a user gave, unless the condition holds."""
    if not holds:
        raise InputError(message)

def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[io.BufferedWriter]:
    """Open a temporary file beside `path` for writing; sync and rename it on a clean exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)

def write_atomic(path: Path, *pieces: bytes) -> None:
    with atomic_file(path) as file:
        file.writelines(pieces)

def format_event(event: str, **values: Any) -> str:
    """`event key:value ...`, greppable; a key with a unit ends in it (_s, _ms, _bytes)."""
    texts = {k: f"{v:.8g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    shown = (f"{k}:{json.dumps(v) if ' ' in v or not v else v}" for k, v in texts.items())
    return " ".join([event, *shown])

def processor_fact(key: str) -> str:
    """What Linux says of the first processor under `key`; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")

def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: on the GPU its allocator's peak, else the process's peak RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux

@dataclass(kw_only=True)
class Run:
    """Ranks, device, precision, log and time ledger of one process of a run."""
    cfg: Config
    directory: Path
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    ledger: dict[str, float] = field(  # seconds by the budget that they count against
        default_factory=lambda: {"training": 0.0, "evaluation": 0.0, "other": 0.0})
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    signal_received: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def log(self, event: str, **values: Any) -> None:
        """Rank 0: one line to the console, to train.log and to metrics.jsonl."""
        if self.is_main:
            print(line := format_event(event, **values), flush=True)
            self.append("train.log", line)
            self.append("metrics.jsonl", json.dumps({"event": event, **values}))

    def append(self, name: str, line: str) -> None:
        if self.is_main:
            with open(self.directory / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    @contextlib.contextmanager
    def stage(self, name: str, budget: str = "other") -> Generator[None]:
        """Time a stage of the run and book its seconds under `budget` in the ledger."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - started_s
            self.ledger[budget] += elapsed_s
            self.log("stage", name=name, elapsed_s=round(elapsed_s, 3), budget=budget)

    def sum_(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank (objects of this program's own making only)."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def on_signal(self, number: int, frame: Any) -> None:
        self.signal_received = True

    def check_signal(self) -> None:
        if self.signal_received:
            raise Interrupted("stopped by a signal; start again with the same RUN_DIR to go on")

    def synchronize(self) -> None:
        """Wait until the device has done its work, so that clocks mean something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

def open_device(cfg: Config, env: Mapping[str, str]) -> tuple[torch.device, torch.dtype]:
    """The device of this rank, and the precision: bf16 where it is not emulated."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(env.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        has_units = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        device, flags = torch.device("cpu"), processor_fact("flags").split()
        has_units = "amx_bf16" in flags or "avx512_bf16" in flags
    bf16 = has_units if cfg.precision == "auto" else cfg.precision == "bf16"
    return device, torch.bfloat16 if bf16 else torch.float32

@contextlib.contextmanager
def start_run(cfg: Config, env: Mapping[str, str]) -> Generator[Run]:
    """Join the process group that torchrun's variables describe; make the folder; hear signals."""
    device, dtype = open_device(cfg, env)
    run = Run(cfg=cfg, directory=Path(), rank=int(env.get("RANK", 0)),
              world_size=int(env.get("WORLD_SIZE", 1)), device=device, dtype=dtype)
    with contextlib.ExitStack() as undo:
        if run.world_size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            undo.callback(dist.destroy_process_group)
        run_id = cfg.run_id or run.share(f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{os.getpid()}")
        run.directory = Path(cfg.run_dir or Path("logs") / run_id)
        for number in (signal.SIGTERM, signal.SIGINT):
            undo.callback(signal.signal, number, signal.signal(number, run.on_signal))
        if run.is_main:
            run.directory.mkdir(parents=True, exist_ok=True)
        yield run

VERSIONS = {"python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda or "none", "numpy": np.__version__,
            "sentencepiece": str(sentencepiece.__version__)}  # what the numbers depend on

def describe_hardware(run: Run) -> str:
    """One phrase: how many of which device."""
    if run.device.type == "cuda":
        return f"{run.world_size} x {torch.cuda.get_device_name(run.device)}"
    return f"{os.cpu_count()} CPU cores, {processor_fact('model name') or platform.machine()}"

def log_setup(run: Run) -> None:
    """Head of the log: configuration (* = not the default), versions, hardware, the source."""
    cfg, changed, source = run.cfg, changed_knobs(run.cfg), own_source()
    values = {name.upper(): value for name, value in dataclasses.asdict(cfg).items()}
    for name, value in sorted(values.items()):
        run.append("train.log", f"config {' *'[name in changed]} {name}:{value}")
    run.append("metrics.jsonl", json.dumps(dict(event="config", values=values, changed=changed)))
    run.log("run", run_id=cfg.run_id or run.directory.name, mode=cfg.mode, seed=cfg.seed,
            ranks=run.world_size, device=run.device.type,
            precision=str(run.dtype).removeprefix("torch."), compile=cfg.compile,
            attention=choose_attention(cfg, run.device, run.dtype).name, run_dir=str(run.directory))
    run.log("versions", **VERSIONS, source_sha256=hashlib.sha256(source.encode()).hexdigest())
    run.log("hardware", name=describe_hardware(run))
    run.append("train.log", f"{'=' * 30} source {'=' * 30}\n{source}\n{'=' * 68}")
    if run.is_main:
        write_atomic(run.directory / "train_gpt_source.py", source.encode())

# --- 3. Data -------------------------------------------------------------------------------------
# Shards of uint16 token ids as published for FineWeb. Which window holds which tokens is a pure
# function of (seed, window index), so that a resumed run sees what an uninterrupted one would.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES, BOS_ID = 20240520, 1, 1024, 1

def write_shard(path: Path, ids: np.ndarray) -> None:
    """Write token ids (any integer type, values below 65,536) as one shard, atomically."""
    header = np.zeros(SHARD_HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(ids)
    write_atomic(path, header.tobytes(), np.ascontiguousarray(ids, dtype="<u2").tobytes())

def read_shard(path: Path) -> np.ndarray:
    """Memory-map the token ids of a shard; InputError if the file is not a whole, valid one."""
    size, ints = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3).tolist()
    magic, version, count = [*ints, None, None, None][:3]
    remedy = "make it again with data/prepare.py or data/download.py"
    require((magic, version) == (SHARD_MAGIC, SHARD_VERSION),
            f"{path}: {size} bytes, magic {magic} version {version}, expected {SHARD_MAGIC} and "
            f"{SHARD_VERSION}: not a token shard; {remedy}")
    expected = SHARD_HEADER_BYTES + 2 * (count or 0)
    require(size == expected, f"{path}: {size} bytes, but its header says {count} tokens = "
            f"{expected} bytes: damaged; {remedy}")
    # A memory map cannot be empty.
    return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES) if count else np.zeros(0, dtype="<u2")

class ByteTable:
    """UTF-8 bytes that each target token stands for, given the token before it.
    A piece that begins with the space marker counts one byte for it unless a control token
    precedes (a decoder drops that space); byte pieces count 1, control pieces 0.
    """
    def __init__(self, processor: sentencepiece.SentencePieceProcessor, vocab_size: int):
        ids = list(range(processor.get_piece_size()))
        require(len(ids) == vocab_size,
                f"VOCAB_SIZE={vocab_size} does not match the tokenizer's {len(ids)}")
        require(processor.piece_to_id("\u2581") != processor.unk_id(),
                "the tokenizer has no piece for a single space, so spaces would count as three "
                "bytes; train it with data/prepare.py")
        kinds = (processor.is_control, processor.is_unknown, processor.is_unused)
        self.boundary = np.any([is_kind(ids) for is_kind in kinds], axis=0)
        self.base_bytes = np.zeros(vocab_size, dtype=np.int64)
        self.leading_space = np.zeros(vocab_size, dtype=bool)
        for token in np.flatnonzero(~self.boundary).tolist():
            piece = processor.id_to_piece(token)
            self.leading_space[token] = piece.startswith("\u2581")
            # Only the marker at the front is conditional; the rest are ordinary spaces.
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            self.base_bytes[token] = 1 if processor.is_byte(token) else len(text.encode())

    def count(self, targets: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Bytes of each target (int64), given the token before each."""
        return self.base_bytes[targets] + (self.leading_space[targets] & ~self.boundary[previous])

def load_tokenizer(cfg: Config) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer and the SHA-256 of its file; InputError if it is missing or unreadable."""
    data, published = Path(cfg.data_path), f"tokenizers/fineweb_{cfg.vocab_size}_bpe.model"
    usual = [data / "tokenizer.model", data.parent.parent / published]
    candidates = [Path(cfg.tokenizer_path)] if cfg.tokenizer_path else usual
    found = [path for path in candidates if path.is_file()]
    require(found, f"no tokenizer at {' or '.join(map(str, candidates))}; set TOKENIZER_PATH, or "
            f"make the data set: python data/prepare.py --source stdlib --out {cfg.data_path}")
    payload = found[0].read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=payload or b"empty")
    except RuntimeError as error:
        raise InputError(f"{found[0]} is not a SentencePiece model: {error}") from error
    return processor, hashlib.sha256(payload).hexdigest()

def find_shards(cfg: Config, part: str) -> list[Path]:
    """Sorted shards of `part` (train, val or val_bytes); InputError if a needed part is missing."""
    paths = sorted(Path(cfg.data_path).glob(f"*_{part}_[0-9]*.bin"))
    require(paths or part == "val_bytes",
            f"DATA_PATH={cfg.data_path} holds no *_{part}_*.bin shard; make one with\n"
            f"  python data/prepare.py --source stdlib --out {cfg.data_path}\n"
            "or fetch the published ones with data/download.py")
    return paths

class TokenStream:
    """All shards of a part as one sequence of token ids, memory-mapped."""
    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.shards = [read_shard(path) for path in paths]
        self.sizes = [len(shard) for shard in self.shards]
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.num_tokens = self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start` on (int64), going round at the end of the data."""
        pieces: list[np.ndarray] = []
        while count > 0:
            start %= self.num_tokens
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[shard][start - self.starts[shard] :][:count]
            pieces.append(np.asarray(piece, dtype=np.int64))
            start, count = start + len(piece), count - len(piece)
        ids = np.concatenate(pieces)
        largest = ids.max(initial=0)
        require(largest < self.vocab_size, f"token id {largest} in {self.paths[0].parent} does not "
                f"fit VOCAB_SIZE={self.vocab_size}: the shards belong to another tokenizer")
        return ids

class StreamPlan:
    """Windows in the order of the data, from a document start that the seed chooses."""
    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        require(stream.num_tokens > seq_len, f"{stream.num_tokens} training tokens are fewer than "
                f"TRAIN_SEQ_LEN={seq_len} + 1")
        guess = int(np.random.default_rng(seed).integers(stream.num_tokens))
        ahead = np.flatnonzero(stream.read(guess, min(1 << 20, stream.num_tokens)) == BOS_ID)
        self.first = guess + (int(ahead[0]) if ahead.size else 0)

    def start(self, position: int) -> int:
        """Where in the stream the window begins that `position` tokens of training precede."""
        return self.first + position

class ShuffledPlan:
    """Every window of every shard once an epoch, in random order, from a random phase a shard."""
    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        self.stream, self.seq_len, self.seed = stream, seq_len, seed
        # One window is given up so that the count is the same at every phase.
        self.counts = [max(0, (size - seq_len) // seq_len) for size in stream.sizes]
        self.num_windows, self.epochs = sum(self.counts), dict[int, np.ndarray]()
        require(self.num_windows, f"no training shard holds two windows of TRAIN_SEQ_LEN={seq_len} "
                "tokens, which LOADER=shuffled and coprime need")

    def arrange(self, starts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The windows of all shards, whose starts are given in order, as they are visited."""
        # What drawing shards by their remaining windows and windows at random amounts to (#1394).
        return rng.permutation(np.concatenate(starts))

    def order(self, epoch: int) -> np.ndarray:
        """Start positions of all windows of an epoch, in the order they are visited."""
        if epoch not in self.epochs:
            rng, shards = np.random.default_rng([self.seed, epoch]), self.stream.starts
            starts = [first + int(rng.integers(self.seq_len)) + np.arange(count) * self.seq_len
                      for first, count in zip(shards, self.counts, strict=False) if count]
            self.epochs = {epoch: self.arrange(starts, rng)}
        return self.epochs[epoch]

    def start(self, position: int) -> int:
        epoch, index = divmod(position // self.seq_len, self.num_windows)
        return int(self.order(epoch)[index])

class CoprimePlan(ShuffledPlan):
    """Each shard is walked by a stride coprime to its number of windows (#1460, after #726)."""
    def arrange(self, starts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The turns of the shards are random, in proportion to what remains of each (#1060)."""
        order = rng.permutation(np.repeat(np.arange(len(starts)), [len(s) for s in starts]))
        walked = np.empty(len(order), dtype=np.int64)
        for shard, windows in enumerate(starts):
            n, stride = len(windows), 1
            while n > 2 and math.gcd(stride := int(rng.integers(1, n)), n) > 1:
                pass
            walked[order == shard] = windows[(int(rng.integers(n)) + stride * np.arange(n)) % n]
        return walked

LOADERS: dict[str, Any] = {"stream": StreamPlan, "shuffled": ShuffledPlan, "coprime": CoprimePlan}

class BatchLoader:
    """Batches of training windows for one rank; the next one is read while this one is used."""
    def __init__(self, cfg: Config, stream: TokenStream, *, rank: int, world_size: int):
        self.stream, self.rank, self.world_size = stream, rank, world_size
        for phase in phases(cfg):
            rows = phase.batch_tokens // phase.seq_len
            require(rows % world_size == 0,
                    f"TRAIN_BATCH_TOKENS={phase.batch_tokens} / TRAIN_SEQ_LEN={phase.seq_len} = "
                    f"{rows} rows do not divide over {world_size} ranks; use a multiple of "
                    f"{phase.seq_len * world_size} tokens")
        lengths = {phase.seq_len for phase in phases(cfg)}
        self.plans = {T: LOADERS[cfg.loader](stream, T, cfg.seed) for T in lengths}
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.ahead: dict[tuple[int, int, int], Future[Tensor]] = {}

    def read(self, position: int, seq_len: int, batch_tokens: int) -> Tensor:
        """This rank's rows, (rows, T + 1) ids, of the batch that `position` tokens precede."""
        plan, share = self.plans[seq_len], batch_tokens // self.world_size
        starts = range(position + self.rank * share, position + (self.rank + 1) * share, seq_len)
        windows = [self.stream.read(plan.start(start), seq_len + 1) for start in starts]
        return torch.from_numpy(np.stack(windows))

    def batch(self, position: int, phase: Phase) -> Tensor:
        """What `read` returns, prefetched if the phase stays the same."""
        key = (position, phase.seq_len, phase.batch_tokens)
        pending = self.ahead.pop(key, None) or self.executor.submit(self.read, *key)
        key = (position + phase.batch_tokens, *key[1:])
        self.ahead = {key: self.executor.submit(self.read, *key)}
        return pending.result()

class Validation(NamedTuple):
    """The validation text: ids, the bytes of each target (ids[1:]), whether it was cut short."""
    ids: np.ndarray
    target_bytes: np.ndarray
    partial: bool

    @property
    def num_targets(self) -> int:
        return len(self.ids) - 1

def load_validation(cfg: Config, processor: sentencepiece.SentencePieceProcessor) -> Validation:
    """Read the validation shards; bytes from the sidecar if there is one, else from the table."""
    stream = TokenStream(find_shards(cfg, "val"), cfg.vocab_size)
    total = stream.num_tokens
    limit = min(total, (cfg.val_tokens_limit or total) + 1)
    require(limit > 1, f"DATA_PATH={cfg.data_path}: {limit} validation tokens; 2 are the least")
    ids = stream.read(0, limit)
    table = ByteTable(processor, cfg.vocab_size)
    if sidecars := find_shards(cfg, "val_bytes"):
        sidecar = TokenStream(sidecars, 65_536)
        require(sidecar.num_tokens == total,
                f"{sidecars[0]}: {sidecar.num_tokens} byte counts for {total} validation tokens; "
                "sidecar and shards belong to different data sets")
        target_bytes = sidecar.read(0, limit)[1:]
    else:
        target_bytes = table.count(ids[1:], ids[:-1])
    return Validation(ids=ids.astype(np.uint16), target_bytes=target_bytes, partial=limit < total)

# --- 4. Model ------------------------------------------------------------------------------------
# One forward pass serves training, calibration, evaluation and adaptation: GPT.forward walks the
# list of visits that plan_visits computes. Parameters are float32; Linear casts them to the dtype
# of the stream. Optional parts are None modules or sizes; none is a second path.

def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension; no learned weight (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))

def rotary_table(cfg: Config, num_positions: int) -> Tensor:
    """cos and sin, (2, num_positions, ROPE_DIMS / 2) in float32 (RoFormer, arXiv:2104.09864)."""
    dims, base = cfg.rotary_dims, cfg.rope_base
    if num_positions > cfg.train_seq_len and dims > 2:
        # NTK scaling: the slowest frequency spans the longer text as it spanned the shorter.
        base *= (num_positions / cfg.train_seq_len) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angle_TE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency)
    return torch.stack([angle_TE.cos(), angle_TE.sin()])

def rotate(x_BTHE: Tensor, rotary_2TE: Tensor) -> Tensor:
    """Turn the first channels of each head, paired half and half; leave those beyond the table."""
    half = rotary_2TE.size(-1)
    cos, sin = rotary_2TE[:, :, None].to(x_BTHE.dtype)
    first, second, rest = torch.split(x_BTHE, [half, half, x_BTHE.size(-1) - 2 * half], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)

def document_index(ids_BT: Tensor) -> Tensor:
    """Which document of its row each position belongs to; BOS opens a new one."""
    return (ids_BT == BOS_ID).cumsum(dim=-1)

class Attention(NamedTuple):
    """A causal attention kernel. `prepare` turns ids into what `attend` needs to know of them."""
    name: str
    prepare: Callable[[Tensor, bool], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]

def sdpa_prepare(ids_BT: Tensor, isolate: bool) -> Tensor | None:
    """Boolean mask (B, 1, T, T) of documents, or None for the plain causal one."""
    doc_BT = document_index(ids_BT)
    return (doc_BT[:, None, :, None] == doc_BT[:, None, None, :]).tril() if isolate else None

def sdpa_attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled dot product attention: the reference for every other kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)

def flash_prepare(ids_BT: Tensor, isolate: bool) -> Tensor | None:
    """Cumulative sequence lengths of the flattened rows cut at each BOS, or None."""
    if not isolate:
        return None
    starts = ids_BT == BOS_ID
    starts[:, 0] = True
    cuts = starts.flatten().nonzero().flatten().to(torch.int32)
    # Empty sequences pad the count to a multiple of 64, so that few shapes occur.
    return F.pad(cuts, (0, 64 - len(cuts) % 64), value=ids_BT.numel())

def flash_attend(kernels: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor,
                 cuts: Tensor | None) -> Tensor:
    """FlashAttention-2 or -3, whichever module `kernels` is (arXiv:2307.08691, 2407.08608)."""
    if cuts is None:
        y = kernels.flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)
    else:
        flat, longest = (x.flatten(0, 1) for x in (q_BTHE, k_BTKE, v_BTKE)), q_BTHE.size(1)
        y = kernels.flash_attn_varlen_func(*flat, cu_seqlens_q=cuts, cu_seqlens_k=cuts,
                                           max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
    y = y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp as well
    return y.view_as(q_BTHE)

def flex_prepare(ids_BT: Tensor, isolate: bool) -> Any:
    """Block mask of what each position sees; blocks that documents empty are skipped."""
    doc_BT, (B, T) = document_index(ids_BT) * isolate, ids_BT.shape
    return flex_attention.create_block_mask(
        lambda b, h, q, k: (k <= q) & (doc_BT[b, q] == doc_BT[b, k]), B, None, T, T,
        device=str(ids_BT.device))

def flex_attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Any) -> Tensor:
    """PyTorch's flex attention: a fused kernel inside a compiled block, slow but exact outside."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    return flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

# Each is called when it is chosen: a flash kernel that is not installed raises ImportError.
ATTENTIONS: dict[str, Callable[[], Attention]] = {
    "fa3": lambda: Attention("fa3", flash_prepare, functools.partial(
        flash_attend, importlib.import_module("flash_attn_interface"))),
    "fa2": lambda: Attention("fa2", flash_prepare, functools.partial(
        flash_attend, importlib.import_module("flash_attn"))),
    "flex": lambda: Attention("flex", flex_prepare, flex_attend),
    "sdpa": lambda: Attention("sdpa", sdpa_prepare, sdpa_attend)}

def choose_attention(cfg: Config, device: torch.device, dtype: torch.dtype) -> Attention:
    """The kernel that ATTENTION names, or the best that is installed and suits the device."""
    on_gpu, trains = device.type == "cuda", cfg.mode in ("all", "train")
    require(cfg.attention != "flex" or on_gpu or not trains,
            "ATTENTION=flex has no gradients on a CPU; use ATTENTION=sdpa")
    if cfg.attention != "auto":
        try:
            return ATTENTIONS[cfg.attention]()
        except ImportError as error:
            raise InputError(f"ATTENTION={cfg.attention} is not installed: {error}") from error
    if on_gpu and dtype == torch.bfloat16:
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        for name in ("fa3", "fa2") if hopper else ("fa2",):
            with contextlib.suppress(ImportError):
                return ATTENTIONS[name]()
    # A dense document mask costs T^2 bytes and forbids the fast kernel; flex skips its blocks.
    return ATTENTIONS["flex" if on_gpu and cfg.isolate_documents and cfg.compile else "sdpa"]()

def fake_quantize(weight_OI: Tensor, bits: int) -> Tensor:
    """The weight as the artifact will hold it, its gradient straight through (arXiv:1308.3432)."""
    if bits == 0:
        return weight_OI
    qmax, weight_OI = 2 ** (bits - 1) - 1, weight_OI.float()
    scale_O1 = row_scales(weight_OI.detach(), qmax).float()[:, None]
    grid_OI = (weight_OI.detach() / scale_O1).round().clamp(-qmax, qmax) * scale_O1
    return weight_OI + (grid_OI - weight_OI).detach()

class Linear(nn.Linear):
    """float32 weight (O, I), cast to the input's dtype; an adapter adds its own output."""
    def __init__(self, in_features: int, out_features: int, *, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        # On the instance: the compiler takes a class attribute for a constant.
        self.adapter: nn.Module | None = None
        self.zero_init, self.qat_bits = zero_init, 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, fake_quantize(self.weight, self.qat_bits).to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)

class Embedding(nn.Embedding):
    """float32 table (V, D), which is also the head if that is tied."""
    def __init__(self, rows: int, dim: int):
        super().__init__(rows, dim)
        self.qat_bits = 0

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, fake_quantize(self.weight, self.qat_bits))

def shift(x_BT: Tensor, steps: int) -> Tensor:
    """x of `steps` positions before (B, T, ...); 0 before the beginning."""
    return F.pad(x_BT, (*[0] * (2 * x_BT.dim() - 4), steps, 0))[:, : x_BT.size(1)]

class HashEmbedding(nn.Module):
    """Hashed n-grams that end in each token: rows of a table, projected to the model's width.
    The table is zero at first and the projection is not, or neither would ever learn. BigramHash
    is thwu1's, TrigramHash of PR #430 (there its table was in no optimizer group).
    """
    FACTORS = (36313, 27191, 51497)

    def __init__(self, cfg: Config, order: int, rows: int, dim: int):
        super().__init__()
        self.order, self.isolate = order, cfg.isolate_documents
        self.polynomial = order == 3 and cfg.trigram_hash == "polynomial"
        self.table, self.proj = Embedding(rows, dim), Linear(dim, cfg.model_dim)
        nn.init.zeros_(self.table.weight)
        nn.init.orthogonal_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05)) if order == 2 else None

    def buckets(self, ids_BT: Tensor) -> Tensor:
        """Row of the table for each position; n-grams that lack a token share the last row."""
        rows, tokens = self.table.num_embeddings, [shift(ids_BT, n) for n in range(self.order)]
        if self.polynomial:
            tokens[2][:, 0] = ids_BT[:, 0]  # as a roll leaves it there
            return (961 * tokens[2] + 31 * tokens[1] + tokens[0]) % rows
        mixed, short = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        starts_BT = (ids_BT == BOS_ID) & self.isolate
        starts_BT[:, 0] = True
        for n, token_BT in enumerate(tokens):
            mixed ^= self.FACTORS[n] * token_BT
            short |= shift(starts_BT, n) & (n < self.order - 1)
        return torch.where(short, rows - 1, mixed % (rows - 1))

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        y_BTD = self.proj(self.table(self.buckets(ids_BT)).to(dtype))
        return y_BTD if self.scale is None else y_BTD * self.scale.to(dtype)

class SmearGate(nn.Module):
    """Mix the token before into each, but for the first of a document (#1851).
    blend: (1 - g) x + g x' with g = sigmoid(theta), a half at first (thwu1); lambda:
    x + lambda sigmoid(w x[:12]) x', the identity at first (#1667).
    """
    def __init__(self, cfg: Config):
        super().__init__()
        blend = cfg.smear_gate == "blend"
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim if blend else cfg.gate_window))
        self.scale = None if blend else nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        before_BTD = shift(x_BTD, 1) * (ids_BT != BOS_ID)[..., None]
        gate = self.gate.to(x_BTD.dtype)
        if self.scale is None:
            return torch.lerp(x_BTD, before_BTD, torch.sigmoid(gate))
        gate_BT1 = torch.sigmoid((x_BTD[..., : len(gate)] * gate).sum(dim=-1, keepdim=True))
        return x_BTD + self.scale.to(x_BTD.dtype) * gate_BT1 * before_BTD

class OutputGate(nn.Module):
    """Factor of each head's output, by attention's input n; head and window start as the identity.
    A number (head, #430), sigmoid(W n + 4) (input, #413), 2 sigmoid(W n[:12]) (window, #1667) or
    sigmoid(s W n[:12]) (sparse, #1787).
    """
    def __init__(self, cfg: Config):
        super().__init__()
        self.kind, self.sharpness, H = cfg.attn_gate, cfg.sparse_attn_gate_scale, cfg.num_heads
        width = cfg.model_dim if self.kind == "input" else cfg.gate_window
        self.weight = nn.Parameter(torch.ones(H) if self.kind == "head" else torch.zeros(H, width))
        self.bias = nn.Parameter(torch.full((H,), 4.0)) if self.kind == "input" else None

    def forward(self, y_BTHE: Tensor, n_BTD: Tensor) -> Tensor:
        weight = self.weight.to(y_BTHE.dtype)
        if self.kind == "head":
            return y_BTHE * weight[:, None]
        logit_BTH = F.linear(n_BTD[..., : weight.size(1)], weight)
        logit_BTH = logit_BTH if self.bias is None else logit_BTH + self.bias.to(weight.dtype)
        gate_BTH = torch.sigmoid(logit_BTH * self.sharpness if self.kind == "sparse" else logit_BTH)
        return y_BTHE * (2 * gate_BTH if self.kind == "window" else gate_BTH)[..., None]

def exclude_self(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """Drop the part of each head's output along its position's own value (arXiv:2603.09078)."""
    y_BTKGE = y_BTHE.view(*v_BTKE.shape[:3], -1, v_BTKE.size(3))
    unit_BTK1E = F.normalize(v_BTKE, dim=-1)[:, :, :, None]
    own = (y_BTKGE * unit_BTK1E).sum(dim=-1, keepdim=True)
    return (y_BTKGE - own * unit_BTK1E).view_as(y_BTHE)

class Inputs(NamedTuple):
    """What every block reads besides the stream."""
    x0_BTD: Tensor  # the normed embedding
    rotary_2TE: Tensor
    mask: Any  # what the attention kernel's `prepare` returned
    first_BTC: Tensor | None  # values of block 0, if later blocks mix them in
    shared_BTC: Tensor | None  # the shared value embedding

class Mix(NamedTuple):
    """A block's rows of the small learned factors that GPT.mixing holds; None where not used."""
    value: Tensor | None = None  # of block 0's values, and of its own
    shared: Tensor | None = None  # of the shared value embedding
    x0: Tensor | None = None  # of x0 after the block
    write: Tensor | None = None  # (2, 2): of attention and MLP, to each lane
    carry: Tensor | None = None  # (2,): of the lanes

class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normed queries and keys: norm, then rotary, then gain."""
    def __init__(self, cfg: Config, layer: int, attention: Attention):
        super().__init__()
        D, H, K, E = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.c_q, self.c_k, self.c_v = (Linear(D, width * E) for width in (H, K, K))
        self.proj = Linear(H * E, D, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((H,), cfg.qk_gain_init))
        self.gate = None if cfg.attn_gate == "none" else OutputGate(cfg)
        self.head_dim, self.use_xsa, self.attend = E, layer in cfg.xsa_blocks, attention.attend

    def values(self, n_BTD: Tensor, inputs: Inputs, mix: Mix) -> Tensor:
        """Values (B, T, K E): own, block 0's (arXiv:2410.17897, VRL #457), shared ones (#414)."""
        v_BTC = self.c_v(n_BTD)
        if mix.value is not None and inputs.first_BTC is not None:
            first, *own = mix.value.to(v_BTC.dtype)
            v_BTC = (own[0] * v_BTC if own else v_BTC) + first * inputs.first_BTC
        if mix.shared is not None and inputs.shared_BTC is not None:
            v_BTC = v_BTC + mix.shared.to(v_BTC.dtype) * inputs.shared_BTC
        return v_BTC

    def forward(self, n_BTD: Tensor, inputs: Inputs, mix: Mix) -> Tensor:
        """Attention's output (B, T, D) on the normed stream."""
        heads = (self.c_q(n_BTD), self.c_k(n_BTD), self.values(n_BTD, inputs, mix))
        q_BTHE, k_BTKE, v_BTKE = (x.unflatten(-1, (-1, self.head_dim)) for x in heads)
        q_BTHE, k_BTKE = (rotate(rms_norm(x), inputs.rotary_2TE) for x in (q_BTHE, k_BTKE))
        q_BTHE = q_BTHE * self.q_gain.to(n_BTD.dtype)[:, None]
        y_BTHE = self.attend(q_BTHE, k_BTKE, v_BTKE, inputs.mask)
        if self.use_xsa:
            y_BTHE = exclude_self(y_BTHE, v_BTKE)
        if self.gate is not None:
            y_BTHE = self.gate(y_BTHE, n_BTD)
        return self.proj(y_BTHE.flatten(2))

class MLP(nn.Module):
    """W2 (leaky_relu(W1 x, slope))^2; slope 0 is relu^2 (arXiv:2109.08668)."""
    def __init__(self, cfg: Config):
        super().__init__()
        self.fc = Linear(cfg.model_dim, cfg.mlp_dim)
        self.proj = Linear(cfg.mlp_dim, cfg.model_dim, zero_init=True)
        self.slope = cfg.leaky_slope

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.fc(x_BTD)
        h_BTF = F.leaky_relu(h_BTF, self.slope) if self.slope else F.relu(h_BTF)
        return self.proj(h_BTF.square())

Lanes = tuple[Tensor, Tensor | None]  # what attention reads, and what the MLP reads once they part

class Block(nn.Module):
    """Mix in the embedding, then attention, then MLP, each with a learned scale a channel."""
    def __init__(self, cfg: Config, layer: int, attention: Attention):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(cfg, layer, attention), MLP(cfg)
        D, self.parallel = cfg.model_dim, cfg.parallel_residual
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(D)) for _ in range(2))
        phase = 1 / (1 + math.exp(-3 * (layer / max(1, cfg.num_layers - 1) - 0.5)))
        keep = phase if cfg.resid_mix_init == "phase" else 1.0
        self.resid_mix = nn.Parameter(torch.tensor([[keep], [1 - keep]]).repeat(1, D))
        self.is_parallel = self.parallel == "stream" and layer >= cfg.parallel_start_layer
        # A tensor, not a number: one compiled graph then serves the blocks of every depth.
        scale = torch.tensor((layer + 1) ** -0.5)
        self.norm_scale = nn.Buffer(scale, persistent=False) if cfg.ln_scale else None

    def norm(self, x_BTD: Tensor) -> Tensor:
        """Input of attention and of the MLP: normed, and scaled by depth if LN_SCALE."""
        n_BTD = rms_norm(x_BTD)
        return n_BTD if self.norm_scale is None else n_BTD * self.norm_scale.to(n_BTD.dtype)

    def with_x0(self, x_BTD: Tensor, inputs: Inputs) -> Tensor:
        keep, inject = self.resid_mix.to(x_BTD.dtype)
        return keep * x_BTD + inject * inputs.x0_BTD

    def attn_update(self, x_BTD: Tensor, inputs: Inputs, mix: Mix) -> Tensor:
        return self.attn_scale.to(x_BTD.dtype) * self.attn(self.norm(x_BTD), inputs, mix)

    def mlp_update(self, x_BTD: Tensor) -> Tensor:
        return self.mlp_scale.to(x_BTD.dtype) * self.mlp(self.norm(x_BTD))

    def forward(self, lanes: Lanes, inputs: Inputs, mix: Mix) -> Lanes:
        """The stream after this block, or its two lanes."""
        x_BTD, side_BTD = lanes
        if side_BTD is not None and mix.write is not None:
            return self.route(x_BTD, side_BTD, inputs, mix)
        x_BTD = self.with_x0(x_BTD, inputs)
        after_BTD = x_BTD + self.attn_update(x_BTD, inputs, mix)
        if side_BTD is not None:  # the lanes never meet before they merge (#1477)
            return after_BTD, side_BTD + self.mlp_update(side_BTD)
        # On one stream side by side, the MLP does not wait for attention (#1412, #1460).
        x_BTD = after_BTD + self.mlp_update(x_BTD if self.is_parallel else after_BTD)
        if mix.x0 is not None:
            x_BTD = x_BTD + mix.x0.to(x_BTD.dtype) * inputs.x0_BTD
        return x_BTD, None

    def route(self, x_BTD: Tensor, side_BTD: Tensor, inputs: Inputs, mix: Mix) -> Lanes:
        """Attention and MLP each write to both lanes, which are carried on with a factor."""
        assert mix.write is not None and mix.carry is not None, "lanes without factors"
        write, carry = mix.write.to(x_BTD.dtype), mix.carry.to(x_BTD.dtype)
        a_BTD = self.attn_update(self.with_x0(x_BTD, inputs), inputs, mix)
        if self.parallel == "lanes":  # the MLP reads its lane at the same time (#1529)
            m_BTD = self.mlp_update(side_BTD)
            return (carry[0] * x_BTD + write[0, 0] * a_BTD + write[1, 0] * m_BTD,
                    carry[1] * side_BTD + write[0, 1] * a_BTD + write[1, 1] * m_BTD)
        x_BTD, side_BTD = (carry[0] * lane + write[0, i] * a_BTD
                           for i, lane in enumerate((x_BTD, side_BTD)))
        # routed: the MLP reads its lane after attention wrote to it (#1204).
        m_BTD = self.mlp_update(self.with_x0(side_BTD, inputs))
        return carry[1] * x_BTD + write[1, 0] * m_BTD, carry[1] * side_BTD + write[1, 1] * m_BTD

def run_block(block: nn.Module, *args: Any) -> Lanes:
    """Call `block`: the unit that is compiled, one graph for all blocks of a kind."""
    return block(*args)

class Visit(NamedTuple):
    """One step of the forward pass."""
    block: int  # whose weights run
    skip: int | None  # row of skip_weights with which the last saved output is added first
    save: bool  # whether the output is put on the stack of saved ones
    part: bool = False  # whether the stream parts into two lanes before it

def plan_visits(num_layers: int, loop: tuple[int, int] = (0, -1), passes: int = 1,
                lanes_from: int | None = None) -> list[Visit]:
    """Order in which blocks run: a U-Net whose second half takes the first half's outputs back.
    Blocks loop[0] to loop[1] run `passes` times in all (#1394). The deepest saved output is used
    first. With lanes_from the stream parts at the first visit of the second half to such a block.
    """
    order, (first, last) = list(range(num_layers)), loop
    order[first : last + 1] = order[first : last + 1] * passes
    encoder, decoder = order[: len(order) // 2], order[len(order) // 2 :]
    part = next((row for row, block in enumerate(decoder)
                 if lanes_from is not None and block >= lanes_from), None)
    return [*(Visit(block, skip=None, save=True) for block in encoder),
            *(Visit(block, row if row < len(encoder) else None, save=False, part=row == part)
              for row, block in enumerate(decoder))]

def plans_of(cfg: Config) -> list[list[Visit]]:
    """The plans with 0 to NUM_LOOPS extra passes; the last one is that of evaluation."""
    lanes = cfg.parallel_residual not in ("none", "stream")
    loop = (cfg.loop_start, cfg.loop_end) if cfg.num_loops else (0, -1)
    return [plan_visits(cfg.num_layers, loop, passes, cfg.parallel_start_layer if lanes else None)
            for passes in range(1, cfg.num_loops + 2)]

def mixing_factors(cfg: Config) -> dict[str, Tensor]:
    """Initial values of the small learned factors of all blocks, a row a block (see Mix)."""
    L, shared = cfg.num_layers, parse_layers(cfg.ve_layers)
    by_knob = {"resformer": {"value": torch.full((L - 1, 2), 0.5)},  # block 0 has none to mix in
               "vrl": {"value": torch.zeros(L - 1, 1)}, "x0": {"x0": torch.zeros(L)},
               "routed": {"write": torch.ones(L, 2, 2), "carry": torch.full((L, 2), 1.1**0.5)},
               "lanes": {"write": torch.ones(L, 2, 2), "carry": torch.full((L, 2), 1.1)},
               "merge": {"merge": torch.tensor(0.5)}}  # of attention's lane, at the end
    return {**by_knob.get(cfg.value_residual, {}), **by_knob.get(cfg.parallel_residual, {}),
            **({"shared": torch.ones(len(shared))} if shared else {})}

def softcapped(z_NV: Tensor, cap: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """cap * tanh(z / cap) and tanh(z / cap) in float32, and each logit's cap: one, or by sign."""
    z_NV = z_NV.float()
    cap = torch.where(z_NV > 0, cap[0], cap[1]) if isinstance(cap, Tensor) else cap
    tanh_NV = torch.tanh(z_NV / cap)
    return cap * tanh_NV, tanh_NV, cap

def softcapped_nll(z_NV: Tensor, target_N: Tensor, weight_N: Tensor | None, cap: float | Tensor
                   ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Nats of each target under softmax(softcapped(z)), in float32.
    With weights also d(sum of weight * nats)/dz, in the dtype of z, and by the caps if they are
    two (AsymLogit, #1923).
    """
    logits_NV, tanh_NV, cap_NV = softcapped(z_NV, cap)
    total_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    is_target_NV = torch.arange(z_NV.size(1), device=z_NV.device) == target_N[:, None]
    nll_N = total_N1[:, 0] - torch.where(is_target_NV, logits_NV, 0).sum(dim=1)
    if weight_N is None:
        return nll_N, None, None
    softmax_NV = (logits_NV - total_N1).exp()
    grad_NV = torch.where(is_target_NV, softmax_NV - 1, softmax_NV)
    slope_NV = 1 - tanh_NV.square()
    grad_caps = None
    if isinstance(cap, Tensor):
        by_cap_NV = grad_NV * (tanh_NV - z_NV.float() / cap_NV * slope_NV) * weight_N[:, None]
        above = torch.where(z_NV > 0, by_cap_NV, 0).sum()
        grad_caps = torch.stack([above, by_cap_NV.sum() - above])
    return nll_N, (grad_NV * slope_NV * weight_N[:, None]).to(z_NV.dtype), grad_caps

# Logits of this many numbers exist at a time (64 MiB in float32): large enough for full speed.
LOSS_CHUNK_NUMBERS = 2**24

class ChunkedLoss(torch.autograd.Function):
    """Weighted sum of softcapped cross-entropies; the logits exist for one chunk at a time.
    The gradient is computed together with the loss, while the chunk's logits are there, and is
    scaled by the incoming gradient in backward: one product of logits instead of two.
    """
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, cap: float | Tensor,
                *rest: Any) -> tuple[Tensor, Tensor]:
        """Loss (scalar, float32) and the nats of each target (N, not differentiable)."""
        (target_N, weight_N, nll), head = rest, head_VD.to(x_ND.dtype)
        chunk = max(1, LOSS_CHUNK_NUMBERS // len(head))
        nll_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        grad_x_ND, grad_head_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD)
        grad_cap = torch.zeros_like(cap) if isinstance(cap, Tensor) else None
        for n in range(0, len(x_ND), chunk):
            rows = slice(n, n + chunk)
            z_NV = x_ND[rows] @ head.T
            nll_N[rows], grad_NV, grad_caps = nll(z_NV, target_N[rows], weight_N[rows], cap)
            torch.mm(grad_NV, head, out=grad_x_ND[rows])
            grad_head_VD += grad_NV.T @ x_ND[rows]
            if grad_cap is not None:
                grad_cap += grad_caps
        ctx.save_for_backward(grad_x_ND, grad_head_VD, grad_cap)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> Any:
        grad_x_ND, grad_head_VD, grad_cap = ctx.saved_tensors
        by_cap = None if grad_cap is None else grad_cap * scale
        return grad_x_ND * scale.to(grad_x_ND.dtype), grad_head_VD * scale, by_cap, None, None, None

class GPT(nn.Module):
    """The language model: embedding, visits of blocks, norm, head, softcapped cross-entropy."""
    def __init__(self, cfg: Config, attention: Attention, dtype: torch.dtype):
        super().__init__()
        self.cfg, self.dtype, self.prepare, D = cfg, dtype, attention.prepare, cfg.model_dim
        self.tok_emb = Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(Block(cfg, i, attention) for i in range(cfg.num_layers))
        self.plans = plans_of(cfg)
        self.plan = self.plans[-1]
        skips = (sum(visit.skip is not None for visit in self.plan), D)
        self.skip_weights = nn.Parameter(torch.ones(skips))
        self.skip_gates = nn.Parameter(torch.zeros(skips)) if cfg.skip_gates else None
        self.lm_head = None if cfg.tie_embeddings else Linear(D, cfg.vocab_size, zero_init=True)
        self.add_options()
        T, longest = cfg.train_seq_len, max(cfg.train_seq_len, cfg.score_seq_len)
        self.rotary = nn.Buffer(rotary_table(cfg, T), persistent=False)
        self.long_rotary = nn.Buffer(rotary_table(cfg, longest), persistent=False)
        self.run_block: Callable[..., Lanes] = run_block
        self.nll = softcapped_nll
        self.init_weights_()

    def add_options(self) -> None:
        """The parts that knobs add; each is None or empty where its knob is off."""
        cfg = self.cfg
        hashes = [(2, cfg.bigram_vocab_size, cfg.bigram_dim),
                  (3, cfg.trigram_vocab_size, cfg.trigram_dim)]
        self.hashes = nn.ModuleList(HashEmbedding(cfg, *sizes) for sizes in hashes if sizes[1])
        self.smear = None if cfg.smear_gate == "none" else SmearGate(cfg)
        self.ve_layers = parse_layers(cfg.ve_layers)
        self.ve_table = Embedding(cfg.vocab_size, cfg.ve_dim) if self.ve_layers else None
        kv_dim = cfg.num_kv_heads * cfg.head_dim
        self.ve_proj = Linear(cfg.ve_dim, kv_dim) if self.ve_layers else None
        self.ve_scale = nn.Parameter(torch.tensor(0.1)) if self.ve_layers else None
        self.mixing = nn.ParameterDict(mixing_factors(cfg))
        caps = torch.full((2,), cfg.logit_softcap)  # of positive and of negative logits
        self.caps = nn.Parameter(caps) if cfg.asym_logit_rescale else None

    @torch.no_grad()
    def init_weights_(self) -> None:
        """Draw the initial weights as the baseline does; output projections start at zero."""
        cfg, table = self.cfg, self.tok_emb.weight
        if cfg.tie_embeddings:
            table.normal_(std=cfg.tied_embed_init_std)
        if cfg.embed_init == "overtone":
            u, s, v = torch.linalg.svd(table, full_matrices=False)
            table.copy_(u * (s[0] * torch.arange(1, len(s) + 1) ** -0.5) @ v)
        for module in (module for module in self.modules() if isinstance(module, Linear)):
            if module.zero_init:
                module.weight.zero_()
            elif cfg.init == "orthogonal" and min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight)
        if self.ve_table is not None and self.ve_proj is not None:
            self.ve_table.weight.normal_(std=0.01)
            nn.init.orthogonal_(self.ve_proj.weight)

    @property
    def head_VD(self) -> Tensor:
        head = self.tok_emb if self.lm_head is None else self.lm_head
        return fake_quantize(head.weight, head.qat_bits)

    @property
    def cap(self) -> float | Tensor:
        return self.cfg.logit_softcap if self.caps is None else self.caps

    def compile_(self) -> None:
        """Replace block and loss by compiled ones; the weights and the formulas stay."""
        # Few shapes occur, but each with and without gradients, and for each kind of block.
        torch._dynamo.config.recompile_limit = 64
        # Late QAT must see the fp16 scales that are stored, not more exact ones.
        torch._inductor.config.emulate_precision_casts = self.cfg.late_qat_threshold > 0
        self.run_block = torch.compile(run_block, dynamic=False)
        self.nll = torch.compile(softcapped_nll, dynamic=False)

    def mix_skip(self, x_BTD: Tensor, saved_BTD: Tensor, row: int) -> Tensor:
        """Add a saved output to the stream, or blend the two by a gate a channel."""
        skip_BTD = self.skip_weights[row].to(x_BTD.dtype) * saved_BTD
        if self.skip_gates is None:
            return x_BTD + skip_BTD
        return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(self.skip_gates[row]).to(x_BTD.dtype))

    def rotary_for(self, num_positions: int) -> Tensor:
        """Rotary table of the training context, or the rescaled one for a longer context."""
        table = self.rotary if num_positions <= self.cfg.train_seq_len else self.long_rotary
        assert num_positions <= table.size(1), "longer than EVAL_SEQ_LEN"
        return table[:, :num_positions]

    def embed(self, ids_BT: Tensor) -> Tensor:
        """x0: the sum of all embeddings, normed, then smeared."""
        hashed = (hashed(ids_BT, self.dtype) for hashed in self.hashes)
        x_BTD = rms_norm(sum(hashed, self.tok_emb(ids_BT).to(self.dtype)))
        return x_BTD if self.smear is None else self.smear(x_BTD, ids_BT)

    def inputs(self, ids_BT: Tensor, x0_BTD: Tensor) -> Inputs:
        """What the blocks read besides the stream."""
        mask, shared_BTC = self.prepare(ids_BT, self.cfg.isolate_documents), None
        if self.ve_table is not None and self.ve_proj is not None and self.ve_scale is not None:
            scale, table_BTI = self.ve_scale.to(self.dtype), self.ve_table(ids_BT).to(self.dtype)
            shared_BTC = self.ve_proj(table_BTI) * scale
        inputs = Inputs(x0_BTD, self.rotary_for(ids_BT.size(1)), mask, None, shared_BTC)
        if "value" in self.mixing:  # once more what block 0 computes: cheaper than its own graph
            block: Any = self.blocks[0]
            n_BTD = block.norm(block.with_x0(x0_BTD, inputs))
            return inputs._replace(first_BTC=block.attn.c_v(n_BTD))
        return inputs

    def mix_of(self, layer: int) -> Mix:
        """The rows of `mixing` that concern a block."""
        rows = {"value": layer - 1, "x0": layer, "write": layer, "carry": layer,
                "shared": self.ve_layers.index(layer) if layer in self.ve_layers else -1}
        return Mix(**{name: self.mixing[name][row] for name, row in rows.items()
                      if name in self.mixing and row >= 0})

    def forward(self, ids_BT: Tensor) -> Tensor:
        """The normed stream before the head, (B, T, D)."""
        x_BTD, side_BTD, saved = self.embed(ids_BT), None, list[Tensor]()
        inputs = self.inputs(ids_BT, x_BTD)
        for visit in self.plan:
            if visit.skip is not None:
                skip_BTD = saved.pop()
                x_BTD = self.mix_skip(x_BTD, skip_BTD, visit.skip)
                if side_BTD is not None and self.cfg.parallel_residual == "routed":
                    side_BTD = self.mix_skip(side_BTD, skip_BTD, visit.skip)
            if visit.part:
                side_BTD = x_BTD
            block, mix = self.blocks[visit.block], self.mix_of(visit.block)
            x_BTD, side_BTD = self.run_block(block, (x_BTD, side_BTD), inputs, mix)
            if visit.save:
                saved.append(x_BTD)
        if side_BTD is not None:
            share = self.mixing["merge"].to(self.dtype) if "merge" in self.mixing else 0.5
            x_BTD = share * x_BTD + (1 - share) * side_BTD
        return rms_norm(x_BTD)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Softcapped logits (B, T, V) in float32."""
        return softcapped(self(ids_BT) @ self.head_VD.to(self.dtype).T, self.cap)[0]

    def loss(self, ids_BT: Tensor, target_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """Sum of weight * nats over all targets, for training; weight None means the mean."""
        x_ND, target_N = self(ids_BT).flatten(0, 1), target_BT.flatten()
        weight_N = (torch.full_like(target_N, 1 / len(target_N), dtype=torch.float32)
                    if weight_BT is None else weight_BT.flatten().float())
        args = (x_ND, self.head_VD, self.cap, target_N, weight_N, self.nll)
        return ChunkedLoss.apply(*args)[0]  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def score(self, ids_BT: Tensor, target_BT: Tensor, first: int = 0) -> Tensor:
        """Nats (B, T - first), float32, of the targets from position `first` on."""
        x_ND = self(ids_BT)[:, first:].flatten(0, 1)
        target_N, head = target_BT[:, first:].flatten(), self.head_VD.to(self.dtype)
        chunk = max(1, LOSS_CHUNK_NUMBERS // len(head))
        pieces = zip(torch.split(x_ND, chunk), torch.split(target_N, chunk), strict=True)
        nll = [self.nll(x @ head.T, target, None, self.cap)[0] for x, target in pieces]
        return torch.cat(nll).view(len(ids_BT), -1)

class Role(NamedTuple):
    """What a parameter is: its optimizer group and the group of tensors it is quantised with."""
    optimizer: str  # token, head, matrix, scalar or cap
    tensors: str  # embed, attn, mlp, table or control

def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by name, decided by the module that owns it."""
    roles: dict[str, Role] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            assert name not in roles and parameter.requires_grad, f"{name} has two owners"
            if isinstance(module, nn.Embedding):
                roles[name] = Role("token", "embed" if path == "tok_emb" else "table")
            elif path == "lm_head":
                roles[name] = Role("head", "embed")
            elif isinstance(module, Linear):
                group = "attn" if ".attn." in name else "mlp" if ".mlp." in name else "table"
                roles[name] = Role("matrix", group)
            else:
                roles[name] = Role("cap" if name == "caps" else "scalar", "control")
    # The proof that none is left untrained, as tables outside the blocks easily are.
    found = [name for name, _ in model.named_parameters()]
    assert sorted(roles) == sorted(found), "every parameter has exactly one role"
    return roles

def build_model(run: Run) -> GPT:
    """A freshly initialised model on the run's device, compiled if COMPILE."""
    cfg, attention = run.cfg, choose_attention(run.cfg, run.device, run.dtype)
    if run.device.type == "cuda" and attention.name not in ("fa2", "fa3", cfg.attention):
        run.log("warning", text=f"no FlashAttention for this: {attention.name}, exact but slower")
    torch.manual_seed(cfg.seed)  # on the CPU first: the same weights on every device
    model = GPT(cfg, attention, run.dtype).to(run.device)
    if cfg.compile and (reason := why_not_compile(run.device)):
        run.log("warning", text=f"compilation is off: {reason}; results stay, speed suffers")
    elif cfg.compile:
        model.compile_()
    return model

def why_not_compile(device: torch.device) -> str:
    """What torch.compile lacks on this machine, or an empty string."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    found = os.access("/usr/bin/g++", os.X_OK) or shutil.which("g++") or shutil.which("clang++")
    return "" if found else "no C++ compiler (g++) is installed"

def flops_per_token(cfg: Config) -> tuple[int, int]:
    """Floating point operations a token, forward and backward: matrices, and causal attention."""
    D, kv_dim, visits = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, len(plans_of(cfg)[-1])
    matrices = visits * 2 * D * (D + kv_dim + cfg.mlp_dim) + cfg.vocab_size * D
    return 6 * matrices, 6 * visits * D * cfg.train_seq_len

def format_plan(plan: Sequence[Visit]) -> str:
    """The visits in order: 3> saves, 5(0) mixes in the last saved by row 0, |8 parts the stream."""
    skips = ("" if visit.skip is None else f"({visit.skip})" for visit in plan)
    return " ".join(f"{'|' * visit.part}{visit.block}{skip}{'>' * visit.save}"
                    for visit, skip in zip(plan, skips, strict=True))

# --- 5. Optimization -----------------------------------------------------------------------------
# Muon for the matrices of the blocks, AdamW for everything else. Schedules are functions of
# progress in [0, 1], so that one definition serves a limit in seconds and a limit in steps.

# Largest slope at 0; 5 steps take singular values to 0.7 to 1.2; kellerjordan.github.io/posts/muon
NS_CLASSIC = (3.4445, -4.7750, 2.0315)
# Polar Express (arXiv:2505.16932): the best cubic-quintic step for what the last one left.
NS_POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def newton_schulz_coefficients(kind: str, num_steps: int) -> list[tuple[float, float, float]]:
    """The polynomial of each iteration: one for all, or Polar Express' own for each."""
    return list(NS_POLAR_EXPRESS[:num_steps]) if kind == "polar" else [NS_CLASSIC] * num_steps

def orthogonalize(g_LOI: Tensor, coefficients: Sequence[tuple[float, float, float]],
                  dtype: torch.dtype) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix of each in the stack, in `dtype`."""
    x = g_LOI.to(dtype)
    # The spectral norm must not exceed 1, or the iteration diverges; Frobenius bounds it.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # iterate on the smaller Gram matrix
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

class Muon:
    """Momentum, Nesterov, orthogonalisation, decoupled decay; equal shapes go together.
    Parallel Muon (#399): the gradients of a stack are reduced and scattered over the ranks, each
    orthogonalises its share, and all gather the updates, so that replicas stay equal to the bit.
    The work of one stack overlaps with the communication of the others.
    """
    def __init__(self, params: Sequence[nn.Parameter], run: Run):
        self.run, cfg, world_size = run, run.cfg, run.world_size
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(tuple(param.shape), []).append(param)
        self.stacks = sorted(by_shape.values(), key=lambda stack: -len(stack) * stack[0].numel())
        self.shares = [-(-len(stack) // world_size) for stack in self.stacks]
        # Each rank keeps up its own share of a buffer; `gather_buffers` completes it.
        self.buffers = [torch.zeros(share * world_size, *stack[0].shape, device=stack[0].device)
                        for share, stack in zip(self.shares, self.stacks, strict=True)]
        self.coefficients = newton_schulz_coefficients(
            cfg.muon_coefficients, cfg.muon_backend_steps)
        self.pending: list[tuple[Tensor, Any]] = []

    def own(self, stack_LOI: Tensor) -> Tensor:
        """This rank's share of a padded stack."""
        return stack_LOI.chunk(self.run.world_size)[self.run.rank]

    def start_reduce(self) -> None:
        """Begin to average the gradients over the ranks, each to the rank that will use it."""
        for stack, buffer in zip(self.stacks, self.buffers, strict=True):
            grad_LOI, work = torch.stack([gradient(param) for param in stack]), None
            if self.run.world_size > 1:
                padding = (0, 0, 0, 0, 0, len(buffer) - len(stack))
                padded_LOI = F.pad(grad_LOI, padding).div_(self.run.world_size)
                grad_LOI = torch.empty_like(self.own(padded_LOI))
                work = dist.reduce_scatter_tensor(grad_LOI, padded_LOI, async_op=True)
            self.pending.append((grad_LOI, work))

    def reduced(self) -> list[Tensor]:
        """The averaged gradients of this rank's shares."""
        self.pending = [(arrived(*pair), None) for pair in self.pending]
        return [grad_LOI for grad_LOI, _ in self.pending]

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Update every parameter in place; `start_reduce` came before."""
        updates = []
        for pair, buffer in zip(self.pending, self.buffers, strict=True):
            grad_LOI, buffer_LOI = arrived(*pair), self.own(buffer)
            buffer_LOI.mul_(momentum).add_(grad_LOI)
            update_LOI = grad_LOI.add_(buffer_LOI, alpha=momentum)  # Nesterov
            if self.run.cfg.muon_row_norm:  # MuonEq-R (arXiv:2603.28254): output units count alike
                update_LOI = F.normalize(update_LOI, dim=-1, eps=1e-7)
            update_LOI = orthogonalize(update_LOI, self.coefficients, self.run.dtype)
            updates.append(self.gather(update_LOI))
        for stack, pair in zip(self.stacks, updates, strict=True):
            update_LOI, (rows, columns) = arrived(*pair)[: len(stack)], stack[0].shape
            # A tall orthogonal matrix has smaller entries; keep the RMS independent of shape.
            scale = -lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(stack, 1 - lr * weight_decay)
            torch._foreach_add_(stack, list(update_LOI.float()), alpha=scale)
        self.pending = []

    def gather(self, own_LOI: Tensor) -> tuple[Tensor, Any]:
        """All ranks' shares as one stack, once the work beside it is done."""
        if self.run.world_size == 1:
            return own_LOI, None
        whole = own_LOI.new_empty(self.run.world_size * len(own_LOI), *own_LOI.shape[1:])
        return whole, dist.all_gather_into_tensor(whole, own_LOI.contiguous(), async_op=True)

    def momenta(self) -> list[Tensor]:
        """The momentum of every matrix, stack by stack, without what pads it for the ranks."""
        return [buffer[: len(s)] for buffer, s in zip(self.buffers, self.stacks, strict=True)]

    def gather_buffers(self) -> None:
        """Complete the momentum on every rank, for a checkpoint."""
        for buffer in self.buffers:
            buffer.copy_(arrived(*self.gather(self.own(buffer))))

def arrived(tensor: Tensor, work: Any) -> Tensor:
    """The tensor, once the communication that fills it is done; work None is none."""
    if work is not None:
        work.wait()
    return tensor

def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter; 0 if the step did not use it."""
    return torch.zeros_like(param) if param.grad is None else param.grad

def make_optimizers(model: GPT, run: Run) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW and Muon over a partition of the model's parameters."""
    cfg, roles = run.cfg, parameter_roles(model)
    members: dict[str, list[nn.Parameter]] = {}
    for name, role in roles.items():
        members.setdefault(role.optimizer, []).append(model.get_parameter(name))
    rates = {"token": (cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr, cfg.embed_wd),
             "head": (cfg.head_lr, cfg.embed_wd), "scalar": (cfg.scalar_lr, cfg.adam_wd),
             "cap": (cfg.scalar_lr, 0.0)}
    groups = [{"params": members[group], "base_lr": lr, "weight_decay": decay}
              for group, (lr, decay) in rates.items() if group in members]
    adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
    # Made here, not at the first step, so that every tensor of the state exists from the start.
    for param in itertools.chain(*(group["params"] for group in adam.param_groups)):
        moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
        adam.state[param] = {"step": torch.zeros((), device=param.device), **moments}
    return adam, Muon(members["matrix"], run)

def lr_scale(progress: float, *, warmdown_frac: float, floor: float = 0.0) -> float:
    """Learning rate multiplier at `progress` in [0, 1]: 1, then linear to `floor` at the end."""
    if warmdown_frac == 0 or progress < 1 - warmdown_frac:
        return 1.0
    return max((1 - progress) / warmdown_frac, floor)

def momentum_at(step: int, progress: float, cfg: Config) -> float:
    """Muon's momentum: a linear ramp in steps, and one back over the last share of progress."""
    steps, cooldown = cfg.muon_momentum_warmup_steps, cfg.muon_momentum_cooldown_frac
    share = min(step / steps if steps else 1.0, (1 - progress) / cooldown if cooldown else 1.0)
    start, end = cfg.muon_momentum_warmup_start, cfg.muon_momentum
    return end if share >= 1 else start + share * (end - start)

def weight_decay_at(progress: float, cfg: Config) -> float:
    """Muon's weight decay: constant, then linear to WD_TAPER_FINAL_MULT of it (#1729)."""
    start = cfg.wd_taper_start_frac
    share = (progress - start) / (1 - start) if progress > start else 0.0
    return cfg.muon_wd * (1 + share * (cfg.wd_taper_final_mult - 1))

class Averager:
    """The weights to export: the last, their EMA, or a mean of late ones (SWA, arXiv:1803.05407).
    Sums are float32 whatever the weights are: a bf16 running sum loses its low bits.
    """
    def __init__(self, cfg: Config, params: Sequence[nn.Parameter]):
        self.cfg, self.count = cfg, torch.zeros((), dtype=torch.int64)
        self.params: list[Tensor] = list(params)
        # The EMA starts from the initial weights, whose share after n steps is decay^n.
        starts = [] if cfg.averaging == "none" else params
        self.average = [param.detach().float().clone() for param in starts]

    @torch.no_grad()
    def update(self, step: int, scale: float, progress: float) -> None:
        """Take in the weights after step `step` (from 1), whose lr multiplier was `scale`."""
        cfg, weights = self.cfg, [param.float() for param in self.params]
        # Never by a nominal number of steps: a run that the clock stops reaches SWA, too.
        is_late = (progress >= cfg.swa_start_frac if cfg.swa_start_frac
                   else scale < cfg.swa_start_lr)
        collects = {"swa": is_late and step % cfg.swa_every == 0,
                    "tail": progress > 1 - cfg.tail_frac}
        if cfg.averaging == "ema":
            torch._foreach_lerp_(self.average, weights, 1 - cfg.ema_decay)
        elif collects.get(cfg.averaging):
            self.count += 1
            torch._foreach_lerp_(self.average, weights, 1 / int(self.count))

    @torch.no_grad()
    def export_(self) -> None:
        if self.cfg.averaging == "ema" or self.count:
            torch._foreach_copy_(self.params, self.average)

# --- 6. Training ---------------------------------------------------------------------------------
# A run is a function of its knobs and of the clock. All ranks decide together, once a step, on
# stopping, on checkpoints and on bad losses, so that no rank waits for another that has left.

class Progress(NamedTuple):
    """How far training is."""
    step: int = 0  # optimizer steps done
    train_s: float = 0.0  # seconds of the training clock; validation is not on it
    tokens: int = 0  # training tokens seen

    def fraction(self, cfg: Config) -> float:
        """Share of the budget used, by steps or by the clock, whichever is further."""
        limit_s = cfg.max_wallclock_seconds or math.inf
        return min(1.0, max(self.step / cfg.iterations, self.train_s / limit_s))

    def is_over(self, cfg: Config, extra_s: float = 0.0) -> bool:
        """Whether the steps are done, or one more, after `extra_s`, would pass the clock."""
        end_s = self.train_s + extra_s + 1.2 * self.train_s / max(1, self.step)  # vary by a fifth
        return self.step >= cfg.iterations or 0 < cfg.max_wallclock_seconds < end_s

    def pace(self) -> dict[str, float]:
        """Tokens and seconds so far, as they are logged."""
        return {"step_avg_ms": round(1e3 * self.train_s / max(1, self.step), 3),
                "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
                "train_s": round(self.train_s, 3), "tokens": self.tokens}

class Phase(NamedTuple):
    """What may change during training, each combination with graphs of its own."""
    seq_len: int
    batch_tokens: int
    loops: int  # extra passes through the looped blocks
    qat: bool  # whether the forward pass sees quantised weights

def phase_at(cfg: Config, progress: float, scale: float) -> Phase:
    """The phase at `progress` in [0, 1], with learning rate multiplier `scale`."""
    lengths = parse_schedule(cfg.train_seq_schedule, cfg.train_seq_len)
    batches = parse_schedule(cfg.train_batch_schedule, cfg.train_batch_tokens)
    seq_len, batch = (next((v for v, until in stages if progress < until), stages[-1][0])
                      for stages in (lengths, batches))
    shares = [float(share) for share in cfg.enable_looping_at.split(",")] * cfg.num_loops
    return Phase(seq_len, batch, sum(progress >= share for share in shares[: cfg.num_loops]),
                 scale < cfg.late_qat_threshold)

def phases(cfg: Config) -> list[Phase]:
    """Every phase that training may come through, in order."""
    texts = (cfg.train_seq_schedule, cfg.train_batch_schedule)
    cuts = {until for text in texts for _, until in parse_schedule(text, 0)}
    cuts |= {0.0, *map(float, cfg.enable_looping_at.split(","))}
    scales = (1.0, 0.0) if cfg.late_qat_threshold else (1.0,)
    return list(dict.fromkeys(phase_at(cfg, cut, s) for cut in sorted(cuts) for s in scales))

class Trainer:
    """Model, optimizers and average, and what one step does to them."""
    def __init__(self, run: Run, model: GPT):
        self.run, self.model, self.params = run, model, list(model.parameters())
        self.adam, self.muon = make_optimizers(model, run)
        self.replicated = [p for group in self.adam.param_groups for p in group["params"]]
        self.averager = Averager(run.cfg, self.params)
        self.progress, self.entered = Progress(), phases(run.cfg)[0]
        self.enter(self.entered)

    def scale(self) -> float:
        """Learning rate multiplier of the next step."""
        cfg, done = self.run.cfg, self.progress.fraction(self.run.cfg)
        by_pace = cfg.warmdown_iters * done / max(1, self.progress.step)  # measured so far
        warmdown = by_pace if cfg.warmdown_iters else cfg.warmdown_frac
        return lr_scale(done, warmdown_frac=warmdown, floor=cfg.min_lr)

    def phase(self) -> Phase:
        """The phase of the next step."""
        return phase_at(self.run.cfg, self.progress.fraction(self.run.cfg), self.scale())

    def enter(self, phase: Phase) -> None:
        """Let the model run with the phase's loops, and on quantised weights if it is time."""
        cfg, model = self.run.cfg, self.model
        model.plan = model.plans[phase.loops]  # evaluation in between has set another
        if phase.qat != self.entered.qat:
            groups = cfg.qat_groups.split(",") if phase.qat else []
            for name, role in parameter_roles(model).items():
                module = model.get_submodule(name.rpartition(".")[0])
                if isinstance(module, Linear | Embedding):
                    bits = cfg.bits[role.tensors] if role.tensors in groups else 0
                    module.qat_bits = 0 if bits == PLAIN_BITS else bits
        self.entered = phase

    def accumulate_gradients(self, window_BT: Tensor) -> Tensor:
        """Gradient of the mean loss over this rank's windows (rows, T + 1); returns that loss."""
        rows, T = len(window_BT), window_BT.size(1) - 1
        most_rows = max(1, self.run.cfg.micro_batch_tokens // T)
        # The fewest equal forward passes that keep within MICRO_BATCH_TOKENS.
        num_micro = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most_rows)
        total = torch.zeros((), device=self.run.device)
        for rows_BT in window_BT.to(self.run.device, non_blocking=True).chunk(num_micro):
            loss = self.model.loss(rows_BT[:, :-1], rows_BT[:, 1:]) / num_micro
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def average_gradients(self, loss: Tensor) -> Tensor:
        """Average the gradients of AdamW's parameters over the ranks, and the loss."""
        if self.run.world_size > 1:
            grads = [gradient(param) for param in self.replicated]
            flat = torch.cat([loss[None], *(grad.flatten() for grad in grads)])
            self.run.sum_(flat).div_(self.run.world_size)
            loss, pieces = flat[0], torch.split(flat[1:], [grad.numel() for grad in grads])
            for param, piece in zip(self.replicated, pieces, strict=True):
                param.grad = piece.view_as(param)
        return loss

    def clip_gradients(self) -> None:
        """Bound the norm of the whole averaged gradient, whose matrices lie on all ranks."""
        own, limit = self.muon.reduced(), self.run.cfg.grad_clip_norm
        grads = [param.grad for param in self.replicated if param.grad is not None]
        mine, common = (torch.stack([g.square().sum() for g in group]).sum()
                        for group in (own, grads))
        norm = (self.run.sum_(mine) + common).sqrt()
        torch._foreach_mul_([*own, *grads], (limit / (norm + 1e-6)).clamp(max=1.0))

    def step(self, window_BT: Tensor) -> Tensor:
        """One optimizer step on this rank's share of a batch; the loss over all ranks."""
        cfg, scale = self.run.cfg, self.scale()
        loss = self.accumulate_gradients(window_BT)
        self.muon.start_reduce()
        loss = self.average_gradients(loss)
        if cfg.grad_clip_norm:
            self.clip_gradients()
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.adam.step()
        (step, train_s, tokens), done = self.progress, self.progress.fraction(cfg)
        self.muon.step(cfg.matrix_lr * scale, momentum_at(step, done, cfg),
                       weight_decay_at(done, cfg))
        self.model.zero_grad(set_to_none=True)
        tokens += window_BT[:, 1:].numel() * self.run.world_size
        self.progress = Progress(step + 1, train_s, tokens)
        self.averager.update(step + 1, scale, self.progress.fraction(cfg))
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training depends on, by name: the live ones, not copies."""
        adam = [self.adam.state[param] for param in self.replicated]
        return {
            **{f"model/{name}": param.detach() for name, param in self.model.named_parameters()},
            **{f"adam/{i}/{key}": entry[key] for i, entry in enumerate(adam) for key in entry},
            **{f"muon/{i}": momentum for i, momentum in enumerate(self.muon.momenta())},
            **{f"average/{i}": average for i, average in enumerate(self.averager.average)},
            "average/count": self.averager.count}

    def load(self, saved: Mapping[str, Tensor], progress: Progress) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.progress = progress

    def warm_up(self) -> None:
        """Run WARMUP_STEPS of each phase on random tokens to compile all; undo their effect."""
        cfg, generator = self.run.cfg, torch.Generator().manual_seed(0)
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        for phase in phases(cfg) if cfg.warmup_steps else []:
            rows = phase.batch_tokens // phase.seq_len // self.run.world_size
            self.enter(phase)
            for _ in range(cfg.warmup_steps):
                self.run.check_signal()
                shape = (rows, phase.seq_len + 1)
                self.step(torch.randint(cfg.vocab_size, shape, generator=generator))
        self.load(before, Progress())
        self.run.synchronize()

# Knobs that may change between a run and its continuation.
FREE_ON_RESUME = {
    "mode", "recipe", "run_dir", "resume", "checkpoint_every_seconds", "compile", "attention",
    "target_val_bpb", "train_log_every", "val_loss_every", "artifact", "submission_name", "run_id",
    "submission_author", "artifact_budget_bytes", "eval_max_seconds", "data_path", "tokenizer_path"}

def checkpoint_folders(run: Run) -> list[Path]:
    return sorted((run.directory / "checkpoint").glob("step_[0-9]*[0-9]"))

def save_checkpoint(trainer: Trainer) -> None:
    """Rank 0: write weights, optimizers, averages and clocks; drop older checkpoints."""
    run, progress = trainer.run, trainer.progress
    if not run.is_main:
        return
    final = run.directory / "checkpoint" / f"step_{progress.step:09d}"
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    payload = safetensors.torch.save(
        {name: tensor.cpu().contiguous() for name, tensor in trainer.tensors().items()})
    write_atomic(temporary / "state.safetensors", payload)
    meta = {"progress": progress, "ledger": run.ledger, "config": dataclasses.asdict(run.cfg),
            "state_sha256": hashlib.sha256(payload).hexdigest()}
    write_atomic(temporary / "meta.json", json.dumps(meta, indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)  # of a run that was stopped at this very step
    os.replace(temporary, final)
    sync_folder(final.parent)
    for folder in final.parent.iterdir():  # older ones, and what a kill left half-written
        if folder != final:
            shutil.rmtree(folder)
    run.log("checkpoint", step=progress.step, train_s=round(progress.train_s, 3), path=str(final))

def load_checkpoint(trainer: Trainer) -> None:
    """Continue from the newest checkpoint of RUN_DIR, if there is one; without RESUME remove it."""
    run, found = trainer.run, None
    if run.is_main and not run.cfg.resume:
        shutil.rmtree(run.directory / "checkpoint", ignore_errors=True)
    elif run.is_main and (folders := checkpoint_folders(run)):
        found = read_checkpoint(folders[-1], run.cfg)
    if (found := run.share(found)) is not None:
        trainer.load(found[1], Progress(*found[0]["progress"]))
        run.ledger.update(found[0]["ledger"])
        run.log("resume", step=trainer.progress.step, train_s=round(trainer.progress.train_s, 3))

def read_checkpoint(folder: Path, cfg: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Meta data and tensors of a checkpoint; InputError if it is damaged or of another run."""
    remedy = f"remove {folder} to go on without it, or set RESUME=0 or another RUN_ID"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        payload = (folder / "state.safetensors").read_bytes()
        require(hashlib.sha256(payload).hexdigest() == meta["state_sha256"],
                "checksum of state.safetensors does not match")
        state, saved = safetensors.torch.load(payload), meta["config"]
        Progress(*meta["progress"])
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder} is damaged ({error}); {remedy}") from error
    refuse_other_run(saved, cfg, folder)
    return meta, state

def refuse_other_run(saved: Mapping[str, Any], cfg: Config, path: Path) -> None:
    """Raise InputError if `path` was made with knobs that make it another run than `cfg`'s."""
    now = dataclasses.asdict(cfg)
    different = [f"{name.upper()}={now[name]} (there: {saved.get(name)})"
                 for name in sorted(now.keys() - FREE_ON_RESUME) if now[name] != saved.get(name)]
    require(not different, f"{path} is of another run: {', '.join(different)}; set these knobs as "
            "they were, remove it, or set another RUN_ID")

def decide(trainer: Trainer, loss: float, elapsed_s: float, unsaved_s: float) -> list[bool]:
    """Add the slowest rank's elapsed seconds to the clock; agree what any rank has found:
    a checkpoint is due, a signal has come, the loss is bad. The clock drives the learning rate, so
    that ranks with clocks of their own would drift apart.
    """
    run, progress = trainer.run, trainer.progress
    due = 0 < run.cfg.checkpoint_every_seconds <= unsaved_s
    votes = [progress.train_s + elapsed_s, due, run.signal_received, not math.isfinite(loss)]
    train_s, *flags = run.max_(torch.tensor(votes, dtype=torch.float64, device=run.device)).tolist()
    trainer.progress = progress._replace(train_s=train_s)
    return list(map(bool, flags))

def train_loop(trainer: Trainer, loader: BatchLoader, validate: Callable[[], Score]) -> None:
    """Step until the budget of steps or seconds is used, logging, validating and saving."""
    run, cfg = trainer.run, trainer.run.cfg
    resumed_step, last_good = trainer.progress.step, float("nan")
    clock_s = saved_s = time.perf_counter()
    save_s = 0.0  # how long the last checkpoint took, on the slowest rank
    while not trainer.progress.is_over(cfg):
        scale, phase = trainer.scale(), trainer.phase()
        trainer.enter(phase)
        loss = trainer.step(loader.batch(trainer.progress.tokens, phase)).item()
        now_s = time.perf_counter()
        due, interrupted, bad_loss = decide(trainer, loss, now_s - clock_s, now_s - saved_s)
        clock_s, step = now_s, trainer.progress.step
        if bad_loss:
            raise RunFailed(f"the loss is {loss} at step {step} (last finite: {last_good:.4f} at "
                            f"step {step - 1}); the checkpoint before it is kept; lower the "
                            "learning rates")
        last_good, over = loss, trainer.progress.is_over(cfg)
        if step % cfg.train_log_every == 0 or step <= resumed_step + 5 or over:
            run.log("step", step=step, steps=cfg.iterations, train_loss=round(loss, 5),
                    lr_scale=round(scale, 5), **trainer.progress.pace())
        if (due and not trainer.progress.is_over(cfg, save_s)) or interrupted or over:
            train_s = trainer.progress.train_s
            trainer.muon.gather_buffers()
            save_checkpoint(trainer)
            saved_s = time.perf_counter()
            if not over:  # saving is on the clock
                decide(trainer, loss, saved_s - clock_s, 0.0)
                clock_s, save_s = saved_s, trainer.progress.train_s - train_s
        if interrupted and not over:
            raise Interrupted(f"stopped by a signal after step {step}; start again to go on")
        if cfg.val_loss_every and step % cfg.val_loss_every == 0 and not over:
            log_validation(trainer, validate)
            clock_s = time.perf_counter()  # validation is not on the training clock

def log_validation(trainer: Trainer, validate: Callable[[], Score]) -> None:
    """Score the weights as they are; a signal meanwhile loses no step."""
    run, step = trainer.run, trainer.progress.step
    trainer.enter(trainer.entered._replace(qat=False))
    trainer.muon.gather_buffers()  # now: a rank that is interrupted below cannot wait for others
    try:
        score = validate()
    except Interrupted:
        save_checkpoint(trainer)
        raise
    run.log("val", step=step, steps=run.cfg.iterations, **score.summary())

def train(run: Run, model: GPT, loader: BatchLoader, validate: Callable[[], Score]) -> Trainer:
    """Train `model` in place; at the end it holds the weights that AVERAGING chooses."""
    cfg, trainer = run.cfg, Trainer(run, model)
    with run.stage("warm_up"):
        trainer.warm_up()
    load_checkpoint(trainer)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    train_loop(trainer, loader, validate)
    progress, averaging = trainer.progress, cfg.averaging
    run.ledger["training"] = progress.train_s
    run.scores["train_end"] = {"steps": progress.step, **progress.pace(),
                               "peak_memory_mib": round(peak_memory_mib(run.device), 1)}
    run.log("train_end", **run.scores["train_end"])
    if averaging in ("swa", "tail") and not trainer.averager.count:
        run.log("warning", text=f"{averaging} averaged no weights; the last ones are exported")
    if averaging == "ema" and (share := cfg.ema_decay**progress.step) > 0.01:
        run.log("warning", text=f"{share:.1%} of the EMA is still the initial weights")
    trainer.averager.export_()
    trainer.enter(trainer.entered._replace(qat=False))
    return trainer

# --- 7. Quantization -----------------------------------------------------------------------------
# Every matrix becomes integer codes and one scale a row; vectors are kept in fp16. The bits depend
# on the group of tensors a parameter belongs to, which parameter_roles decides.

PLAIN_BITS = 16
# Below the one fp16 loses precision and then is 0, above the other it is infinite.
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)

class Quantized(NamedTuple):
    """A tensor as it is stored: integer codes with row scales, or plain fp16 (bits 16)."""
    bits: int
    values: np.ndarray  # int8 codes (O, I), or float16 values of any shape
    scales: np.ndarray | None  # float16 (O,), None if bits is 16

    def dequantized(self) -> Tensor:
        """The float32 tensor that a reader of the artifact gets."""
        values, scales = torch.tensor(self.values).float(), self.scales
        return values if scales is None else values * torch.tensor(scales).float()[:, None]

def row_scales(weight_OI: Tensor, qmax: int) -> Tensor:
    """Step size of each row in fp16, as it is stored: the largest weight becomes qmax."""
    return (weight_OI.abs().amax(dim=1) / qmax).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()

def quantize_rows(weight_OI: Tensor, bits: int) -> Quantized:
    """Round to nearest on a symmetric grid of 2^bits - 1 levels, one scale a row."""
    qmax, weight_OI = 2 ** (bits - 1) - 1, weight_OI.detach().float().cpu()
    scale_O = row_scales(weight_OI, qmax)  # in fp16, which is what a reader will multiply by
    codes_OI = (weight_OI / scale_O.float()[:, None]).round().clamp(-qmax, qmax)
    return Quantized(bits, codes_OI.to(torch.int8).numpy(), scale_O.numpy())

def quantize_model(cfg: Config, model: nn.Module) -> dict[str, Quantized]:
    """Every parameter of the model by name, in the form in which it is stored."""
    tensors: dict[str, Quantized] = {}
    for name, role in parameter_roles(model).items():
        weight, bits = model.get_parameter(name).detach(), cfg.bits[role.tensors]
        plain = weight.clamp(-LARGEST_SCALE, LARGEST_SCALE).half().cpu().numpy()
        tensors[name] = (Quantized(PLAIN_BITS, plain, None) if bits == PLAIN_BITS
                         else quantize_rows(weight, bits))
    return tensors

# --- 8. Artifact ---------------------------------------------------------------------------------
# One file: magic, version, length of the header; a compressed JSON header (model shape, tokenizer,
# tensors, streams); the compressed streams; SHA-256 of all before it. Reading checks the checksum
# first and every length before anything is allocated. Nothing is ever unpickled.

ARTIFACT_MAGIC, ARTIFACT_VERSION, CHECKSUM_BYTES = b"PGOLFART", 1, 32
ARTIFACT_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of the compressed header
MAX_HEADER_BYTES = 2**22  # uncompressed; a header lists a few hundred tensors
MAX_STREAM_BYTES = 2**28  # uncompressed; 16 MB hold no more codes than that at half a bit each

class Compressor(NamedTuple):
    """A lossless coder; `unpack` gives at most the stated bytes (at least 1) of what it holds."""
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]

def unbrotli(module: Any, packed: bytes, limit: int) -> bytes:
    """At most `limit` bytes of a brotli stream, whose decoder gives them piece by piece."""
    decoder = module.Decompressor()
    raw = decoder.process(packed, output_buffer_limit=limit)
    while len(raw) < limit and (more := decoder.process(b"", output_buffer_limit=limit)):
        raw += more
    return raw[:limit]

# Name: module, how it packs, how it unpacks at most so many bytes.
COMPRESSORS: dict[str, tuple[str, Callable[..., bytes], Callable[..., bytes]]] = {
    "zlib": ("zlib", lambda m, raw: m.compress(raw, 9),
             lambda m, packed, limit: m.decompressobj().decompress(packed, limit)),
    "lzma": ("lzma", lambda m, raw: m.compress(raw, preset=9 | m.PRESET_EXTREME),
             lambda m, packed, limit: m.LZMADecompressor(memlimit=2**28).decompress(packed, limit)),
    "zstd": ("zstandard", lambda m, raw: m.ZstdCompressor(level=22).compress(raw),
             lambda m, packed, limit: m.ZstdDecompressor(max_window_size=2**27).stream_reader(
                 packed).read(limit)),
    "brotli": ("brotli", lambda m, raw: m.compress(raw, quality=11, lgwin=24), unbrotli)}

def find_compressor(name: str) -> Compressor:
    """The coder of that name; InputError if its package is missing (never another coder)."""
    module_name, *functions = COMPRESSORS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"COMPRESSOR={name}: {error}; pip install -r requirements.txt, or choose "
                         "another") from error
    return Compressor(*(functools.partial(function, module) for function in functions))

SHAPE_KNOBS = [f.name for f in fields(Config) if f.metadata["shape"]]

def encode_artifact(cfg: Config, tensors: Mapping[str, Quantized], tokenizer_sha256: str) -> bytes:
    """The artifact file's content; a function of its arguments to the byte."""
    ordered = [tensors[name] for name in sorted(tensors)]
    raw = {"codes": b"".join(t.values.tobytes() for t in ordered if t.scales is not None),
           "scales": b"".join(t.scales.tobytes() for t in ordered if t.scales is not None),
           "plain": b"".join(t.values.tobytes() for t in ordered if t.scales is None)}
    compressor = find_compressor(cfg.compressor)
    packed = {kind: compressor.pack(payload) for kind, payload in raw.items()}
    header = {"model": {name: getattr(cfg, name) for name in SHAPE_KNOBS},
              "tokenizer_sha256": tokenizer_sha256, "compressor": cfg.compressor,
              "tensors": [[name, tensors[name].bits] for name in sorted(tensors)],
              "streams": [[kind, len(packed[kind]), len(raw[kind])] for kind in raw]}
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    prefix = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head))
    body = b"".join([prefix, head, *packed.values()])
    return body + hashlib.sha256(body).digest()

def decode_header(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams of an artifact whose checksum, magic and lengths are right."""
    require(len(payload) >= ARTIFACT_PREFIX.size + CHECKSUM_BYTES,
            f"{len(payload)} bytes are too few for an artifact")
    body, checksum = payload[:-CHECKSUM_BYTES], payload[-CHECKSUM_BYTES:]
    magic, version, head_bytes = ARTIFACT_PREFIX.unpack_from(body)
    require(magic == ARTIFACT_MAGIC,
            f"it begins with {magic!r}, an artifact with {ARTIFACT_MAGIC!r}")
    require(hashlib.sha256(body).digest() == checksum,
            "the checksum does not match: the file is truncated or was changed")
    require(version == ARTIFACT_VERSION,
            f"format version {version}; this script reads {ARTIFACT_VERSION}")
    head = body[ARTIFACT_PREFIX.size :][:head_bytes]
    header = json.loads(zlib.decompressobj().decompress(head, MAX_HEADER_BYTES))
    return header, body[ARTIFACT_PREFIX.size + head_bytes :]

def decode_tensors(header: Mapping[str, Any], body: bytes,
                   shapes: Mapping[str, Sequence[int]]) -> dict[str, Quantized]:
    """The stored tensors by name; names and shapes must be exactly the model's."""
    bits, sizes = dict(header["tensors"]), {"codes": 0, "scales": 0, "plain": 0}
    require(bits.keys() == shapes.keys(),
            f"its tensors are not the model's: {sorted(bits.keys() ^ shapes.keys())}")
    for name, shape in shapes.items():
        allowed = BITS if len(shape) == 2 else (PLAIN_BITS,)
        require(type(bits[name]) is int and bits[name] in allowed,
                f"{name} of shape {shape} cannot have {bits[name]} bits")
        if bits[name] == PLAIN_BITS:
            sizes["plain"] += 2 * math.prod(shape)
        else:
            sizes["codes"] += math.prod(shape)
            sizes["scales"] += 2 * shape[0]
    compressor, position = find_compressor(header["compressor"]), 0
    streams: dict[str, io.BytesIO] = {}
    for kind, packed_bytes, raw_bytes in header["streams"]:
        require(raw_bytes == sizes[kind] and raw_bytes <= MAX_STREAM_BYTES,
                f"stream {kind} says {raw_bytes} bytes, its tensors {sizes[kind]}")
        raw = compressor.unpack(body[position : position + packed_bytes], raw_bytes + 1)
        require(len(raw) == raw_bytes,
                f"stream {kind} does not hold the {raw_bytes} bytes that it says")
        streams[kind], position = io.BytesIO(raw), position + packed_bytes
    require(position == len(body), f"{len(body)} bytes of streams, {position} declared")

    def take(kind: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
        payload = streams[kind].read(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(payload, dtype=dtype).reshape(shape)

    tensors: dict[str, Quantized] = {}
    for name, shape in sorted(shapes.items()):
        if bits[name] == PLAIN_BITS:
            numbers, largest = take("plain", "<f2", shape), 0
            tensors[name] = Quantized(PLAIN_BITS, numbers, None)
        else:
            codes, numbers = take("codes", "<i1", shape), take("scales", "<f2", shape[:1])
            largest = int(np.abs(codes.astype(np.int16)).max())
            tensors[name] = Quantized(bits[name], codes, numbers)
        require(np.isfinite(numbers).all() and largest < 2 ** (bits[name] - 1),
                f"{name} holds numbers that no weight of {bits[name]} bits can have")
    return tensors

def read_artifact(path: Path, run: Run, tokenizer_sha256: str) -> GPT:
    """The model that a file holds, whose shape run.cfg takes on; InputError unless it is sound."""
    try:
        header, body = decode_header(run.share(path.read_bytes() if run.is_main else b""))
        require(header["tokenizer_sha256"] == tokenizer_sha256,
                "it was trained with another tokenizer than the data set's")
        knobs, kinds = header["model"], get_type_hints(Config)
        strangers = sorted(knobs.keys() ^ set(SHAPE_KNOBS))
        require(not strangers, f"its knobs are not the model's: {strangers}")
        for name, value in knobs.items():
            finite = type(value) is not float or math.isfinite(value)
            require(type(value) is kinds[name] and finite,
                    f"{name.upper()}={value!r} is not a valid {kinds[name].__name__}")
        run.cfg = dataclasses.replace(run.cfg, **knobs)
        with torch.device("meta"):
            blank = GPT(run.cfg, ATTENTIONS["sdpa"](), run.dtype)
        shapes = {name: tuple(p.shape) for name, p in blank.named_parameters()}
        tensors = decode_tensors(header, body, shapes)
    except Exception as error:  # of the coders, of JSON, of numpy: whatever strange bytes lead to
        raise InputError(f"cannot use the artifact {path}: {error}") from error
    model = build_model(run)
    model.load_state_dict({name: tensor.dequantized() for name, tensor in tensors.items()})
    return model

def own_source() -> str:
    """The readable source of this script, also when it runs from its packed form."""
    return globals().get("PACKED_SOURCE") or Path(__file__).read_text(encoding="utf-8")

# The unpacked source is put where tracebacks, inspect and so Triton look for a file's lines.
PACKED_STUB = """import base64,linecache,lzma
PACKED_SOURCE=lzma.decompress(base64.b85decode("{payload}"),format=lzma.FORMAT_RAW,filters=[{{"id":lzma.FILTER_LZMA2,"preset":9|lzma.PRESET_EXTREME}}]).decode()
linecache.cache["<train_gpt>"]=(len(PACKED_SOURCE),None,PACKED_SOURCE.splitlines(True),"<train_gpt>")
exec(compile(PACKED_SOURCE,"<train_gpt>","exec"))
"""  # noqa: E501

def pack_source(source: str) -> str:
    """A script that runs as `source` does, packed without comments and docstrings; idempotent."""
    # By the standard library alone, so that the counted size depends on no installed minifier.
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = lzma.compress(ast.unparse(tree).encode(), format=lzma.FORMAT_RAW, filters=filters)
    return PACKED_STUB.format(payload=base64.b85encode(packed).decode())

def account_sizes(run: Run, artifact: Path) -> dict[str, int]:
    """Bytes on disk of the packed script and of the artifact; RunFailed if over the budget."""
    files = {"artifact_bytes": artifact, "code_bytes": run.directory / "train_gpt.py"}
    sizes = run.share({k: p.stat().st_size for k, p in files.items()} if run.is_main else {})
    total, budget = sum(sizes.values()), run.cfg.artifact_budget_bytes
    sizes |= {"total_bytes": total, "budget_bytes": budget}
    run.log("size", **sizes)
    if total > budget:
        raise RunFailed(f"code and artifact take {total} bytes of ARTIFACT_BUDGET_BYTES={budget}; "
                        "lower *_BITS or the model's shape")
    return sizes

# --- 9. Evaluation -------------------------------------------------------------------------------
# The score is bits per byte: nats over all validation targets / (ln 2 * the bytes they stand for).
# Every target is scored exactly once: plan_windows decides where, the Scorer refuses anything else.

class Window(NamedTuple):
    """A stretch of inputs, and which of its predictions are scored."""
    start: int  # first input position
    end: int  # one past the last
    score_from: int  # first scored position, counted from start

def plan_windows(num_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows at 0, S, 2S, ...: the first scores all of its targets, each later one its last S.
    A window is kept while it has something to score (w + T - S < N); the last may be shorter.
    With stride = seq_len the windows are disjoint: the plain evaluation.
    """
    context = seq_len - stride
    starts = range(0, max(1, num_targets - context), stride)
    return [Window(w, min(w + seq_len, num_targets), context if w else 0) for w in starts]

def share_of(items: Sequence[Any], rank: int, world_size: int) -> Sequence[Any]:
    """The contiguous share of `items` that `rank` works on; shares differ by at most one item."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]

class Score(NamedTuple):
    """Sums over the scored targets."""
    nats: float
    tokens: int
    num_bytes: int
    partial: bool
    eval_s: float

    def summary(self) -> dict[str, Any]:
        """Loss in nats a token, bits per byte, and what they were measured on."""
        return {"val_loss": round(self.nats / self.tokens, 8),
                "val_bpb": round(self.nats / math.log(2) / max(1, self.num_bytes), 8),
                "eval_s": round(self.eval_s, 3), "tokens": self.tokens, "bytes": self.num_bytes,
                "partial": self.partial}

class Scorer:
    """Adds up nats and bytes in float64; every target must come exactly once, over all ranks."""
    def __init__(self, run: Run, validation: Validation):
        self.run, self.validation = run, validation
        self.is_scored = np.zeros(validation.num_targets, dtype=bool)
        self.nats, self.num_bytes = 0.0, 0

    def record(self, first: int, nll: np.ndarray) -> None:
        """Take the nats of targets first, first + 1, ...; each must be new."""
        span = slice(first, first + len(nll))
        assert first >= 0 and span.stop <= len(self.is_scored), f"no targets {span}"
        assert not self.is_scored[span].any(), f"a target in {span} was scored before"
        self.is_scored[span] = True
        self.nats += float(nll.sum(dtype=np.float64))
        self.num_bytes += int(self.validation.target_bytes[span].sum())

    def finish(self, eval_s: float) -> Score:
        """The sums over all ranks; raises if a target was missed or scored by two ranks."""
        sums = torch.tensor([self.nats, float(self.num_bytes)], dtype=torch.float64)
        nats, num_bytes = self.run.sum_(sums.to(self.run.device)).tolist()
        times = torch.tensor(self.is_scored, dtype=torch.int32, device=self.run.device)
        wrong = int((self.run.sum_(times) != 1).sum())
        assert not wrong, f"{wrong} targets not scored once"
        return Score(nats, len(times), int(num_bytes), self.validation.partial, eval_s)

def evaluate(run: Run, model: GPT, validation: Validation, stride: int) -> Score:
    """Score every validation target once, by windows of the evaluation context and `stride`."""
    started_s, model.plan, seq_len = time.perf_counter(), model.plans[-1], run.cfg.score_seq_len
    windows = share_of(plan_windows(validation.num_targets, seq_len, stride), run.rank,
                       run.world_size)
    rows = max(1, min(run.cfg.val_batch_size // run.world_size // seq_len, len(windows)))
    scorer = Scorer(run, validation)
    for i in range(0, len(windows), rows):
        run.check_signal()
        batch = windows[i : i + rows]
        # Zeros stand right of what is scored, where nothing attends to them: one shape for all.
        padded = np.zeros((rows, seq_len + 1), dtype=np.int64)
        for row, window in zip(padded, batch, strict=False):
            row[: window.end - window.start + 1] = validation.ids[window.start : window.end + 1]
        ids = torch.from_numpy(padded).to(run.device)
        first = min(window.score_from for window in batch)
        nll = model.score(ids[:, :-1], ids[:, 1:], first).cpu().numpy()
        for window, nll_T in zip(batch, nll, strict=False):
            scored = nll_T[window.score_from - first : window.end - window.start - first]
            scorer.record(window.start + window.score_from, scored)
    run.synchronize()
    return scorer.finish(time.perf_counter() - started_s)

def final_score(run: Run, model: GPT, validation: Validation, kind: str) -> None:
    """Score as `kind` (prequant, quantized, sliding) says; log it, keep it for submission.json."""
    stride = run.cfg.eval_stride if kind == "sliding" else run.cfg.score_seq_len
    with run.stage(f"evaluate_{kind}", "other" if kind == "prequant" else "evaluation"):
        score = evaluate(run, model, validation, stride)
    if not math.isfinite(score.nats):
        raise RunFailed(f"final_{kind}: the loss is {score.nats}; lower the learning rates")
    run.scores[f"final_{kind}"] = values = {**score.summary(), "compliant": not score.partial}
    run.log(f"final_{kind}", **values)

# --- main ----------------------------------------------------------------------------------------
def describe(cfg: Config) -> str:
    """What a run with these knobs would train: shape, plan, groups and sizes; needs no data."""
    with torch.device("meta"):
        model = GPT(cfg, ATTENTIONS["sdpa"](), torch.float32)
    changed, knobs = changed_knobs(cfg), dataclasses.asdict(cfg)
    sizes, groups = Counter[str](), Counter[str]()
    for name, role in parameter_roles(model).items():
        sizes[role.tensors] += (count := model.get_parameter(name).numel())
        groups[role.optimizer] += count
    weight_bits = sum(count * cfg.bits[group] for group, count in sizes.items())
    stored = {"weights": weight_bits // 8, "code": len(pack_source(own_source()))}
    stored |= {"total": sum(stored.values()), "budget": cfg.artifact_budget_bytes}
    matrices, attention = flops_per_token(cfg)
    return "\n".join([
        *(f"{' *'[k.upper() in changed]} {k.upper()}={value}" for k, value in knobs.items()), "",
        format_event("model", params=sizes.total(), **sizes), format_event("groups", **groups),
        format_event("flops_per_token", matrices=matrices, attention=attention),
        "plan block(skip row)>: " + format_plan(model.plan),
        format_event("bytes_before_compression", **stored)])

def train_and_write(run: Run, artifact: Path, validation: Validation, tokenizer_sha: str) -> None:
    """Train a model, score it as it is, quantise it and write the artifact."""
    cfg = run.cfg
    stream = TokenStream(find_shards(cfg, "train"), cfg.vocab_size)
    loader = BatchLoader(cfg, stream, rank=run.rank, world_size=run.world_size)
    model = build_model(run)
    num_params = sum(p.numel() for p in model.parameters())
    run.log("model", params=num_params, plan=format_plan(model.plan))
    run.log("data", train_tokens=stream.num_tokens, val_targets=validation.num_targets)
    train(run, model, loader, lambda: evaluate(run, model, validation, cfg.score_seq_len))
    final_score(run, model, validation, "prequant")
    with run.stage("write_artifact"):
        payload = encode_artifact(cfg, quantize_model(cfg, model), tokenizer_sha)
        state = {"ledger": run.ledger, "scores": run.scores, "config": dataclasses.asdict(cfg)}
        if run.is_main:  # the state first: a continuation that finds the artifact needs it
            write_atomic(run.directory / "run_state.json", json.dumps(state).encode())
            write_atomic(artifact, payload)

def finish(run: Run, sizes: Mapping[str, int]) -> None:
    """Log the ledger, write submission.json, and raise RunFailed for every bound passed."""
    cfg, spent = run.cfg, {name: round(elapsed_s, 3) for name, elapsed_s in run.ledger.items()}
    limits = {"training": cfg.max_wallclock_seconds, "evaluation": cfg.eval_max_seconds}  # 0 = none
    times = {**{f"{name}_s": spent[name] for name in limits},
             **{f"{name}_budget_s": limit for name, limit in limits.items()}}
    run.log("ledger", **times, other_s=spent["other"])
    problems = [f"{name} took {spent[name]:.1f} s of {limit:.1f}"
                for name, limit in limits.items() if 0 < limit < spent[name]]
    score = run.scores.get("final_sliding") or run.scores["final_quantized"]
    train_end = run.scores.get("train_end", {"steps": 0, "train_s": 0.0})
    result = {"val_bpb": score["val_bpb"], "val_loss": score["val_loss"],
              "steps": train_end["steps"], "train_s": train_end["train_s"],
              "eval_s": spent["evaluation"], "artifact_bytes": sizes["artifact_bytes"]}
    total = {"total_bytes_max": sizes["total_bytes"], "budget_bytes": sizes["budget_bytes"]}
    report = {
        "author": cfg.submission_author, "date": f"{datetime.date.today()}",
        "name": cfg.submission_name or run.directory.name, "track": cfg.track,
        "val_bpb": score["val_bpb"], "val_bpb_std": 0.0, "seeds": {str(cfg.seed): result},
        "artifact_bytes_max": sizes["artifact_bytes"], "code_bytes": sizes["code_bytes"],
        "source_sha256": hashlib.sha256(own_source().encode()).hexdigest(),
        "hardware": describe_hardware(run), "versions": VERSIONS, "previous": "",
        "compliant": score["compliant"] and not problems, "budget": {"time": times, "bytes": total}}
    if run.is_main:
        write_atomic(run.directory / "submission.json", json.dumps(report, indent=2).encode())
    if 0 < cfg.target_val_bpb < score["val_bpb"]:
        problems.append(
            f"val_bpb {score['val_bpb']} is above TARGET_VAL_BPB={cfg.target_val_bpb}")
    if problems:
        raise RunFailed("; ".join(problems))

def prepare_directory(run: Run, artifact: Path) -> None:
    """Refuse a finished run's folder, recall what a run cut short there has done, open the log."""
    cfg, folder, trains = run.cfg, run.directory, run.cfg.mode != "eval"
    code, state_path = folder / "train_gpt.py", folder / "run_state.json"
    require(not (run.share((folder / "submission.json").exists()) and trains),
            f"{folder} holds a finished run; set another RUN_ID or RUN_DIR")
    own = artifact.resolve().parent == folder.resolve() and state_path.exists()
    if run.share(artifact.exists()) and (trains or run.share(own)):
        require(cfg.resume or not trains,
                f"{artifact} exists; set RESUME=1 to score it, or another RUN_ID")
        try:
            state = run.share(json.loads(state_path.read_bytes()) if run.is_main else None)
        except (OSError, ValueError) as error:
            raise InputError(f"{artifact} exists without {state_path}: {error}; set another "
                             "RUN_ID") from error
        if trains:
            refuse_other_run(state["config"], cfg, artifact)
        run.ledger.update(state["ledger"])
        run.scores.update(state["scores"])
    if run.is_main:
        is_own = code.exists() and code.samefile(__file__) and "PACKED_SOURCE" not in globals()
        require(not is_own, f"RUN_DIR={folder} holds the running script; choose another folder")
        write_atomic(code, pack_source(own_source()).encode())
        for path in (folder / "train.log", folder / "metrics.jsonl"):
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                run.append(path.name, "")  # end the line that a kill cut short
    log_setup(run)

def execute(run: Run) -> None:
    """The run as a table of contents."""
    cfg, trains = run.cfg, run.cfg.mode != "eval"
    artifact = Path(cfg.artifact) if cfg.artifact and not trains else run.directory / "artifact.bin"
    require(trains or run.share(artifact.exists()),
            f"ARTIFACT={artifact} does not exist; MODE=train makes one")
    processor, tokenizer_sha = load_tokenizer(cfg)
    validation = load_validation(cfg, processor) if trains else None
    find_compressor(cfg.compressor)  # a missing package must not be found after the training
    prepare_directory(run, artifact)
    if validation is not None and not run.share(artifact.exists()):
        train_and_write(run, artifact, validation, tokenizer_sha)
    sizes = account_sizes(run, artifact)
    if cfg.mode == "train":
        return
    with run.stage("read_artifact", "evaluation"):
        model = read_artifact(artifact, run, tokenizer_sha)
    if validation is None:  # the artifact, not the environment, says which vocabulary it is
        validation = load_validation(run.cfg, processor)
    for kind in ("quantized", "sliding") if cfg.eval_stride else ("quantized",):
        final_score(run, model, validation, kind)
    finish(run, sizes)

def main() -> int:
    """Run as the environment says; the exit status is 0, 1 (failed), 2 (bad input) or 143."""
    env = os.environ
    is_main = env.get("RANK", "0") == "0"
    try:
        cfg = config_from_env(env)
        if cfg.mode != "describe":
            with start_run(cfg, env) as run:
                execute(run)
        elif is_main:
            print(describe(cfg))
        return 0
    except (InputError, RunFailed, Interrupted) as error:
        if is_main:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {InputError: 2, RunFailed: 1, Interrupted: 143}[type(error)]

if __name__ == "__main__":
    sys.exit(main())
