"""Train, compress and score a language model whose code and weights fit in 16,000,000 bytes.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # 8 GPUs, all defaults
    RECIPE=records/demo/cpu.env python train_gpt.py            # one GPU, or a CPU, to look around
    MODE=describe python train_gpt.py                          # shape, groups, bytes; needs no data
    MODE=eval ARTIFACT=logs/x/artifact.bin python train_gpt.py # score an artifact, fresh process

The environment is the only configuration: every knob is a field of Config, spelled in capitals.
RECIPE=path/to/run.env reads KEY=value lines as defaults below the real environment. A run trains
(at most MAX_WALLCLOCK_SECONDS), quantises, writes the artifact, reads it back from the file into a
fresh model, and scores that model in bits per byte. Everything it writes lies in RUN_DIR. A run
that was killed goes on from its last checkpoint when it is started again with the same RUN_DIR.

Sections: 1. Configuration  2. Run context  3. Data  4. Model  5. Optimization
          6. Training  7. Quantization  8. Artifact  9. Evaluation plans
          10. Scoring  11. Test-time training  12. N-gram mixers
Tensor suffixes: B sequences, T positions, D model width, H query heads, K key/value heads,
                 E width of a head, F MLP width, V vocabulary, O x I a weight's out x in,
                 N tokens, L equal matrices in a stack, R adapter rank.
"""

from __future__ import annotations

import ast
import base64
import bisect
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
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
import re
import resource
import shutil
import signal
import struct
import sys
import time
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import constriction  # type: ignore[import-untyped]
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
MODES = ("all", "train", "eval", "describe")
PRECISIONS = ("auto", "bf16", "fp32")
KERNEL_CHOICES = ("auto", "fa3", "fa2", "flex", "sdpa")
LOADER_CHOICES = ("stream", "shuffled", "coprime")
EMBED_INITS = ("normal", "overtone")
MIX_INITS = ("last", "phase")
MATRIX_INITS = ("default", "orthogonal", "orthogonal_scaled")
GATES = ("none", "head", "input", "window", "sparse")
SMEARS = ("none", "blend", "lambda")
HASHES = ("mixing", "polynomial")
VALUES = ("none", "resformer", "vrl", "x0")
LANES = ("none", "stream", "merge", "routed", "lanes")
COEFFICIENTS = ("classic", "polar")
AVERAGES = ("none", "ema", "swa", "tail")
GRIDS = ("uniform", "trellis")
SCALINGS = ("solved", "max", "percentile")
COMPRESSOR_CHOICES = ("ans", "zlib", "zstd", "lzma", "brotli", "brotli_shuffled")
TTT_METHODS = ("none", "pretrain", "chunk", "lora")
TTT_CONTEXTS = ("window", "text", "incremental")
MIXERS = ("none", "hedge", "hedge_entropy", "backoff")
MAX_ORDER = 63  # tokens of context of the longest n-grams


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every knob of the script; an environment variable has the field's name in capitals."""

    # Run
    mode: str = knob("all", "which stages to run; see the module docstring", choices=MODES)
    recipe: str = knob("", "file of KEY=value lines, used as defaults below the environment")
    run_id: str = knob("", "name of the run; empty = date, time and process number")
    run_dir: str = knob("", "folder for everything the run writes; empty = logs/RUN_ID")
    seed: int = knob(
        1337, "random seed of initialization and data order", low=0, high=2**31 - 1, shape=True
    )
    track: str = knob("track_10min_16mb", "competition track named in submission.json")
    submission_name: str = knob("", "name in submission.json; empty = RUN_ID")
    submission_author: str = knob("", "author in submission.json")
    resume: bool = knob(True, "continue from the checkpoint in RUN_DIR if there is one")
    checkpoint_every_seconds: float = knob(
        120.0, "time between checkpoints; 0 = only at the end", unit="s", low=0
    )
    precision: str = knob(
        "auto", "dtype of the forward pass; auto = bf16 where supported", choices=PRECISIONS
    )
    compile: bool = knob(True, "compile blocks and loss with torch.compile")
    attention: str = knob(
        "auto", "attention kernel; auto = the best one installed", choices=KERNEL_CHOICES
    )
    target_val_bpb: float = knob(
        0.0, "exit with status 1 if the final score is above this; 0 = no bound", unit="bpb", low=0
    )
    # Data
    data_path: str = knob(
        "./data/datasets/fineweb10B_sp8192", "folder with *_train_*.bin and *_val_*.bin shards"
    )
    tokenizer_path: str = knob("", "SentencePiece model; empty = DATA_PATH/tokenizer.model")
    loader: str = knob("stream", "order of training windows", choices=LOADER_CHOICES)
    isolate_documents: bool = knob(
        True, "attention does not cross document boundaries (BOS)", shape=True
    )
    train_seq_len: int = knob(
        2048, "training sequence length", unit="tokens", low=1, high=2**20, shape=True
    )
    train_batch_tokens: int = knob(
        786_432, "tokens per optimizer step, over all ranks", unit="tokens", low=1
    )
    train_seq_schedule: str = knob(
        "", "shorter sequences first: LEN@PROGRESS,... (until that progress), then TRAIN_SEQ_LEN"
    )
    train_batch_schedule: str = knob(
        "", "smaller batches first, in the same form; then TRAIN_BATCH_TOKENS"
    )
    micro_batch_tokens: int = knob(
        98_304, "maximum tokens in one forward pass of a rank", unit="tokens", low=1
    )
    # Model
    vocab_size: int = knob(8192, "number of tokenizer pieces", low=4, high=65_536, shape=True)
    num_layers: int = knob(11, "number of distinct blocks", low=1, high=256, shape=True)
    model_dim: int = knob(
        512, "width of the residual stream", unit="channels", low=2, high=16_384, shape=True
    )
    num_heads: int = knob(8, "query heads; divides MODEL_DIM", low=1, high=1024, shape=True)
    num_kv_heads: int = knob(4, "key/value heads; divides NUM_HEADS", low=1, high=1024, shape=True)
    mlp_mult: float = knob(4.0, "MLP width / MODEL_DIM", low=0.125, high=64, shape=True)
    leaky_slope: float = knob(
        0.5, "the MLP activation is leaky_relu(x, slope)^2; 0 = relu^2", low=0, high=1, shape=True
    )
    tie_embeddings: bool = knob(True, "the output head is the token embedding", shape=True)
    tied_embed_init_std: float = knob(
        0.005, "initial standard deviation of the token embedding if tied", low=0
    )
    embed_init: str = knob(
        "normal", "token embedding: normal, or singular values S_k ~ k^-1/2", choices=EMBED_INITS
    )
    resid_mix_init: str = knob(
        "last", "resid_mix starts as (1, 0), or early blocks prefer x0 (phase)", choices=MIX_INITS
    )
    init: str = knob("orthogonal", "initial matrices; see GPT.init_weights_", choices=MATRIX_INITS)
    logit_softcap: float = knob(30.0, "logits are cap * tanh(z / cap)", low=1e-3, shape=True)
    asym_logit_rescale: bool = knob(
        True, "separate trainable caps for positive and negative logits", shape=True
    )
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", low=1, shape=True)
    rope_scaling: str = knob(
        "ntk", "rotary base beyond TRAIN_SEQ_LEN: NTK-scaled, or unchanged", choices=("ntk", "none")
    )
    rope_dims: int = knob(
        16, "rotated channels per head; 0 = all", unit="channels", low=0, shape=True
    )
    qk_gain_init: float = knob(5.0, "initial gain of each query head", low=0)
    ln_scale: bool = knob(
        True, "scale the normalized input of block i by 1/sqrt(i + 1)", shape=True
    )
    skip_gates: bool = knob(True, "U-net skips are gated blends instead of sums", shape=True)
    xsa_last_n: int = knob(
        11, "exclusive self-attention (XSA) in the last n blocks", low=0, shape=True
    )
    xsa_layers: str = knob("", "XSA in these blocks as well, such as 0,2,5-7", shape=True)
    attn_gate: str = knob(
        "sparse", "gate of each attention head; see AttnOutputGate", choices=GATES, shape=True
    )
    gate_window: int = knob(
        12, "input channels of the small gates", unit="channels", low=1, shape=True
    )
    sparse_attn_gate_scale: float = knob(
        0.5, "factor inside the sigmoid of the sparse gate", low=0, shape=True
    )
    smear_gate: str = knob(
        "lambda", "mix the previous token into each; see SmearGate", choices=SMEARS, shape=True
    )
    bigram_vocab_size: int = knob(
        0, "rows of the hashed bigram table; 0 = no table", low=0, high=2**20, shape=True
    )
    bigram_dim: int = knob(128, "width of the bigram table", unit="channels", low=1, shape=True)
    trigram_vocab_size: int = knob(
        0, "rows of the hashed trigram table; 0 = no table", low=0, high=2**20, shape=True
    )
    trigram_dim: int = knob(32, "width of the trigram table", unit="channels", low=1, shape=True)
    trigram_hash: str = knob(
        "mixing", "hash of trigrams; polynomial (PR #430) collides", choices=HASHES, shape=True
    )
    value_residual: str = knob(
        "none", "block 0's values in later blocks, or x0 after each", choices=VALUES, shape=True
    )
    ve_layers: str = knob(
        "", "blocks that add the shared value embedding, such as 9,10", shape=True
    )
    ve_dim: int = knob(128, "width of the value embedding", unit="channels", low=1, shape=True)
    num_loops: int = knob(2, "extra passes through the looped blocks", low=0, high=16, shape=True)
    loop_start: int = knob(3, "first looped block", low=0, shape=True)
    loop_end: int = knob(5, "last looped block", low=0, shape=True)
    enable_looping_at: str = knob(
        "0.35", "training progress at which loops start: one value, or one for each loop"
    )
    parallel_residual: str = knob(
        "lanes", "parallel attention and MLP; see Block.forward", choices=LANES, shape=True
    )
    parallel_start_layer: int = knob(8, "first parallel block", low=0, shape=True)
    # Optimization
    embed_lr: float = knob(0.6, "Adam learning rate of an untied embedding", low=0)
    head_lr: float = knob(0.008, "Adam learning rate of an untied head", low=0)
    tied_embed_lr: float = knob(0.03, "Adam learning rate of a tied embedding", low=0)
    scalar_lr: float = knob(0.02, "Adam learning rate of vectors and scalars", low=0)
    adam_wd: float = knob(0.02, "weight decay of vectors and scalars (decoupled)", low=0)
    embed_wd: float = knob(0.085, "weight decay of embeddings, tables and head (decoupled)", low=0)
    beta1: float = knob(0.9, "Adam beta1", low=0, high=0.9999)
    beta2: float = knob(0.99, "Adam beta2", low=0, high=0.99999)
    adam_eps: float = knob(1e-8, "Adam epsilon", low=1e-20)
    matrix_lr: float = knob(0.028, "Muon learning rate of the block matrices", low=0)
    muon_momentum: float = knob(0.97, "Muon momentum after its warmup", low=0, high=0.9999)
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", low=0, high=0.9999)
    muon_momentum_warmup_steps: int = knob(
        1500, "length of the linear momentum warmup", unit="steps", low=0
    )
    muon_momentum_cooldown_frac: float = knob(
        0.0, "final fraction of training in which momentum returns to its start", low=0, high=1
    )
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = knob(
        "polar", "Newton-Schulz coefficients: classic, or Polar Express", choices=COEFFICIENTS
    )
    muon_row_norm: bool = knob(True, "normalize the update's rows before Newton-Schulz (MuonEq-R)")
    muon_wd: float = knob(0.095, "weight decay of Muon's matrices (decoupled)", low=0)
    grad_clip_norm: float = knob(0.3, "maximum global gradient norm; 0 = no clipping", low=0)
    # Schedule
    iterations: int = knob(20_000, "maximum number of optimizer steps", unit="steps", low=1)
    max_wallclock_seconds: float = knob(600.0, "training budget; 0 = none", unit="s", low=0)
    warmup_steps: int = knob(
        20, "steps that only trigger compilation; their effect is undone", unit="steps", low=0
    )
    warmdown_frac: float = knob(
        0.85, "final fraction of training with a falling learning rate", low=0, high=1
    )
    warmdown_iters: int = knob(
        0, "warmdown in steps at the measured pace; 0 = use WARMDOWN_FRAC", unit="steps", low=0
    )
    min_lr: float = knob(0.1, "final learning rate as a fraction of the peak", low=0, high=1)
    averaging: str = knob("ema", "weights to export: last or averaged", choices=AVERAGES)
    ema_decay: float = knob(0.9965, "EMA decay per step", low=0, high=0.999999)
    swa_start_lr: float = knob(
        0.4, "SWA collects while the learning rate multiplier is below this", low=0, high=1
    )
    tail_frac: float = knob(
        0.1, "final fraction of training whose steps AVERAGING=tail averages", low=0, high=1
    )
    swa_every: int = knob(50, "steps between weights collected by SWA", unit="steps", low=1)
    late_qat_threshold: float = knob(
        0.0, "fake quantization while the learning rate multiplier is below; 0 = off", low=0, high=1
    )
    train_log_every: int = knob(200, "steps between training log lines", unit="steps", low=1)
    val_loss_every: int = knob(1000, "steps between validations; 0 = none", unit="steps", low=0)
    # Quantization and artifact
    attn_bits: int = knob(8, "attention matrices: code width; 16 = fp16", unit="bits", choices=BITS)
    mlp_bits: int = knob(8, "MLP matrices: code width; 16 = fp16", unit="bits", choices=BITS)
    embed_bits: int = knob(
        8, "embedding and head: code width; 16 = fp16", unit="bits", choices=BITS
    )
    table_bits: int = knob(
        8, "hashed and value embeddings: code width; 16 = fp16", unit="bits", choices=BITS
    )
    gate_bits: int = knob(
        8, "gate weights, one scale per row; 16 = fp16", unit="bits", choices=(8, 16)
    )
    prune_frac: float = knob(
        0.0, "fraction of the smallest weights of each large matrix set to 0", low=0, high=0.99
    )
    quantizer: str = knob("gptq", "round to nearest, or GPTQ", choices=("rtn", "gptq"))
    quant_grid: str = knob(
        "trellis", "levels of the codes: uniform, or trellis-coded", choices=GRIDS
    )
    row_steps: str = knob(
        "solved",
        "quantization scales; see optimal_scales and heuristic_row_scales",
        choices=SCALINGS,
    )
    clip_sigmas: str = knob(
        "", "clipping range in row deviations: one number, or attn:13,mlp:11.5,embed:14,table:12.85"
    )
    gptq_calibration_batches: int = knob(
        16, "maximum number of calibration batches of TRAIN_BATCH_TOKENS", low=1
    )
    gptq_reserve_seconds: float = knob(
        12.0, "part of the training budget for calibration, at most a tenth", unit="s", low=0
    )
    compressor: str = knob("ans", "entropy coder of the artifact", choices=COMPRESSOR_CHOICES)
    artifact_budget_bytes: int = knob(
        16_000_000, "limit for packed code plus artifact", unit="bytes", low=1
    )
    artifact: str = knob("", "artifact for MODE=eval; empty = RUN_DIR/artifact.bin")
    # Evaluation
    eval_seq_len: int = knob(0, "evaluation context; 0 = TRAIN_SEQ_LEN", unit="tokens", low=0)
    eval_stride: int = knob(
        64, "targets scored per sliding window; 0 = no sliding pass", unit="tokens", low=0
    )
    val_batch_size: int = knob(
        524_288, "tokens per evaluation step, over all ranks", unit="tokens", low=1
    )
    val_tokens_limit: int = knob(
        0, "score only the first tokens (marked partial); 0 = all", unit="tokens", low=0
    )
    eval_max_seconds: float = knob(
        600.0, "evaluation budget; 0 = none; adaptation stops first", unit="s", low=0
    )
    ttt_method: str = knob(
        "lora", "test-time training: weights per chunk, or a LoRA per document", choices=TTT_METHODS
    )
    ttt_lr: float = knob(0.005, "peak learning rate of weight training, cosine decay", low=0)
    ttt_optimizer: str = knob("sgd", "optimizer of weight training", choices=("sgd", "adamw"))
    ttt_momentum: float = knob(0.9, "its momentum, or AdamW's beta1", low=0, high=0.9999)
    ttt_grad_clip: float = knob(1.0, "its maximum gradient norm; 0 = no clipping", low=0)
    ttt_epochs: int = knob(3, "epochs over each scored chunk", low=1, high=1000)
    ttt_chunk_tokens: int = knob(
        32_768, "tokens scored before the weights are trained on them", unit="tokens", low=1
    )
    ttt_batch_seqs: int = knob(
        32, "maximum sequences per training step of a rank", unit="rows", low=1
    )
    ttt_freeze_blocks: int = knob(0, "number of first blocks that stay frozen", low=0)
    ttt_train: str = knob(
        "all", "trained parameters: all, or unfrozen blocks and vectors", choices=("all", "blocks")
    )
    ttt_ramp: float = knob(
        1.0, "factor that the learning rate gains over the first 30 % of the text", low=0
    )
    ttt_polyak: float = knob(
        0.0, "decay of the averaged weights used for scoring; 0 = off", low=0, high=0.99999
    )
    ttt_byte_weighted: bool = knob(False, "weight the training loss by each target's bytes")
    eval_hash_rows: int = knob(
        0, "rows of a bigram table created for the pass; 0 = no table", low=0, high=2**20
    )
    eval_hash_lr_mult: float = knob(10.0, "learning rate of that table / TTT_LR", low=0)
    ttt_context: str = knob(
        "incremental", "context of a chunk: see EvalPlanner.batch", choices=TTT_CONTEXTS
    )
    ttt_chunk_size: int = knob(
        24, "targets of a document between two adapter steps", unit="tokens", low=1
    )
    ttt_short_chunks: str = knob(
        "", "smaller chunks at the start of a document: SIZE@UNTIL,..., then TTT_CHUNK_SIZE"
    )
    ttt_batch_size: int = knob(64, "documents adapted side by side", low=1)
    ttt_lora_rank: int = knob(32, "LoRA rank", low=1, high=4096)
    ttt_lora_alpha: float = knob(32.0, "LoRA alpha; the output is scaled by alpha / rank", low=0)
    ttt_lora_targets: str = knob("q,k,v,o,mlp,head", "modules with a LoRA; see lora_modules")
    ttt_lora_lr: float = knob(0.003, "learning rate of the LoRA (AdamW)", low=0)
    ttt_lora_wd: float = knob(0.0, "weight decay of the LoRA", low=0)
    ttt_beta1: float = knob(0.0, "beta1 of the LoRA's AdamW", low=0, high=0.9999)
    ttt_beta2: float = knob(0.99, "beta2 of the LoRA's AdamW", low=0, high=0.99999)
    ttt_grad_steps: int = knob(1, "optimizer steps per chunk", low=1, high=100)
    ttt_warm_start_a: bool = knob(
        False, "LoRA A starts from the previous batch's mean; documents keep their order"
    )
    ttt_phases: str = knob(
        "", "document counts, such as 833,1666, after which all weights train on scored text"
    )
    allow_noncompliant: bool = knob(
        False, "allow methods that the rules forbid; every score is marked"
    )
    adaptive_temperature: float = knob(
        1.0, "temperature at zero entropy, 1 at maximum entropy; 1 = off", low=0.9, high=1.05
    )
    mixer: str = knob("none", "n-gram mixture over scored text; see section 12", choices=MIXERS)
    mixer_orders: str = knob(
        "", "context lengths of the mixed n-grams; empty = 0-2 (Hedge) or 2-6,8 (back-off)"
    )
    hedge_eta: float = knob(0.1, "Hedge: step size of the log weights per nat", low=0)
    hedge_min_tokens: int = knob(
        10_000, "Hedge: scored tokens before the mixture is used", unit="tokens", low=0
    )
    ngram_tilt: float = knob(
        0.0, "logit bonus of the most frequent continuation; 0 = off", unit="nats", low=0, high=20
    )
    ngram_tilt_orders: str = knob(
        "15", "context lengths of the n-gram bias; the longest match wins"
    )
    ngram_tilt_share: float = knob(
        0.8, "minimum relative frequency of that continuation", low=0, high=1
    )
    ngram_tilt_min_count: int = knob(1, "minimum count of that continuation", low=1)
    ngram_table_bits: int = knob(
        22, "log2 of the rows of the n-gram table (24 bytes each)", unit="bits", low=10, high=32
    )

    def __post_init__(self) -> None:
        problems = [p for f in fields(self) if (p := out_of_range(f, getattr(self, f.name)))]
        with contextlib.suppress(ZeroDivisionError):  # of a 0 that is among the problems already
            problems += check_combinations(self) + (check_eval_context(self) if self.trains else [])
        require(not problems, "\n  ".join(["invalid configuration:", *problems]))

    @property
    def trains(self) -> bool:
        """Whether the model is this run's own, not one that an artifact describes."""
        return self.mode != "eval"

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
    def adapts(self) -> bool:
        """Whether an adaptive pass follows the plain ones."""
        return self.ttt_method != "none" or self.needs_mixer

    @property
    def mixer_contexts(self) -> list[int]:
        """Lengths of the contexts whose n-grams are mixed in."""
        usual = {"none": "", "backoff": "2-6,8"}.get(self.mixer, "0-2")
        return parse_int_list(self.mixer_orders or usual) if usual else []

    @property
    def tilt_contexts(self) -> list[int]:
        return parse_int_list(self.ngram_tilt_orders) if self.ngram_tilt else []

    @property
    def needs_mixer(self) -> bool:
        """Whether a Mixer stands between the logits and the score."""
        return (self.mixer, self.ngram_tilt, self.adaptive_temperature) != ("none", 0, 1)

    @property
    def xsa_blocks(self) -> set[int]:
        last = range(self.num_layers - self.xsa_last_n, self.num_layers)
        return {*last, *parse_int_list(self.xsa_layers)}

    @property
    def bits(self) -> dict[str, int]:
        """Bits of a stored weight by group of tensors."""
        return {
            "attn": self.attn_bits,
            "mlp": self.mlp_bits,
            "embed": self.embed_bits,
            "table": self.table_bits,
            "gate": self.gate_bits,
            "control": PLAIN_BITS,
        }

    @property
    def sigmas(self) -> dict[str, float]:
        """CLIP_SIGMAS by group of tensors; empty if it is not set."""
        pairs = [part.rpartition(":") for part in self.clip_sigmas.split(",") if part]
        groups = self.bits.keys() - {"gate", "control"}
        return {g: float(k) for group, _, k in pairs for g in ([group] if group else groups)}

    @property
    def solves_scales(self) -> bool:
        return self.row_steps == "solved" and not self.clip_sigmas

    @property
    def train_seconds(self) -> float:
        """Seconds of the training loop, 0 = no limit; the rest is kept for calibration."""
        reserve_s = self.gptq_reserve_seconds if self.quantizer == "gptq" else 0.0
        return max(self.max_wallclock_seconds - reserve_s, 0.9 * self.max_wallclock_seconds)


MAX_LIST_LEN = 4096  # entries of a list knob; checked before a range is expanded


def parse_int_list(text: str) -> list[int]:
    """The integers of a list such as 0,2,5-7; ValueError if malformed or too long."""
    parts = [part.split("-") if "-" in part else (part, part) for part in text.split(",") if text]
    spans = [(int(first), int(last)) for first, last in parts]
    if sum(last - first + 1 for first, last in spans if last >= first) > MAX_LIST_LEN:
        raise ValueError(f"{text!r} has more than {MAX_LIST_LEN} entries")
    return [n for first, last in spans for n in range(first, last + 1)]


def parse_schedule(text: str) -> list[tuple[int, float]]:
    """(value, limit) pairs of VALUE@LIMIT,...: each value holds until its limit; or ValueError."""
    pairs = (part.split("@") for part in text.split(",") if text)
    return [(int(value), float(limit)) for value, limit in pairs]


def is_increasing_list(text: str, allowed: range) -> bool:
    """Whether `text` is empty or lists increasing integers of `allowed`."""
    numbers = parse_int_list(text)
    increasing = numbers == sorted({*numbers}) and all(number in allowed for number in numbers)
    return increasing and bool(numbers) == bool(text)


def is_increasing_schedule(text: str, limit: float) -> bool:
    """Whether `text` is VALUE@LIMIT,...: positive values, increasing limits below `limit`."""
    pairs = parse_schedule(text)
    limits = [until for value, until in pairs if value > 0 and 0 < until < limit]
    return limits == sorted(set(limits)) and len(limits) == len(pairs)


def is_loop_schedule(text: str, num_loops: int) -> bool:
    """Whether `text` is one progress value in [0, 1], or `num_loops` non-decreasing ones."""
    points = [0.0, *map(float, text.split(",")), 1.0]
    increasing = all(a <= b for a, b in itertools.pairwise(points))  # false for nan
    return len(points) - 2 in {1, num_loops} and increasing


ListRule = tuple[Callable[[str], bool], str]  # a test of the text, and the rule in words


def list_knob_rules(cfg: Config) -> dict[str, ListRule]:
    """The rule of each knob that holds a list; a test may raise ValueError for malformed text."""
    coded_groups = cfg.bits.keys() - {"gate", "control"}

    def has_all_sigmas(text: str) -> bool:
        in_range = all(0 < sigmas < math.inf for sigmas in cfg.sigmas.values())
        return not text or (cfg.sigmas.keys() == coded_groups and in_range)

    orders: ListRule = (
        lambda text: is_increasing_list(text, range(MAX_ORDER + 1)),
        f"list increasing lengths of at most {MAX_ORDER}, such as 0-2,16",
    )
    blocks: ListRule = (
        lambda text: is_increasing_list(text, range(cfg.num_layers)),
        f"list blocks below NUM_LAYERS={cfg.num_layers}, such as 0,2,5-7",
    )
    schedule: ListRule = (
        lambda text: is_increasing_schedule(text, 1.0),
        "be VALUE@PROGRESS,... with increasing values of progress below 1, "
        "such as 1024@0.1,2048@0.7",
    )
    return {
        "xsa_layers": blocks,
        "ve_layers": blocks,
        "mixer_orders": orders,
        "ngram_tilt_orders": orders,
        "train_seq_schedule": schedule,
        "train_batch_schedule": schedule,
        "enable_looping_at": (
            lambda text: is_loop_schedule(text, cfg.num_loops),
            "be one value of progress, or NUM_LOOPS non-decreasing ones",
        ),
        "ttt_short_chunks": (
            lambda text: is_increasing_schedule(text, math.inf),
            "be SIZE@UNTIL,... with increasing lengths, such as 8@256,24@2000",
        ),
        "ttt_phases": (
            lambda text: is_increasing_list(text, range(1, 2**31)),
            "be increasing numbers of documents, such as 833,1666",
        ),
        "ttt_lora_targets": (
            lambda text: set(text.split(",")) <= LORA_TARGETS,
            f"name modules of {', '.join(sorted(LORA_TARGETS))}",
        ),
        "clip_sigmas": (has_all_sigmas, "be a number, or one for each of attn, mlp, embed, table"),
    }


def check_list_knobs(cfg: Config) -> list[str]:
    """Messages about malformed list knobs; empty if there are none."""
    problems = []
    for name, (is_valid, rule) in list_knob_rules(cfg).items():
        text, valid = getattr(cfg, name), False
        with contextlib.suppress(ValueError):  # a part that is not a number
            valid = is_valid(text)
        problems += [] if valid else [f"{name.upper()}={text!r} must {rule}"]
    return problems


LORA_TARGETS = {"q", "k", "v", "o", "mlp", "head", "attn", "mlp_block"}


def check_combinations(cfg: Config) -> list[str]:
    """Messages about knobs that are in range but contradict each other; empty if none do."""
    problems = check_list_knobs(cfg)
    rules = [*shape_rules(cfg), *method_rules(cfg), *([] if problems else stage_rules(cfg))]
    return problems + [message for holds, message in rules if not holds]


Rule = tuple[bool, str]  # a condition that must hold, and the message if it does not


def shape_rules(cfg: Config) -> list[Rule]:
    """Rules about the shape of the model."""
    D, H, K, L = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.num_layers
    uses_window = bool({cfg.attn_gate, cfg.smear_gate} & {"window", "sparse", "lambda"})
    return [
        (D % H == 0, f"NUM_HEADS={H} must divide MODEL_DIM={D}"),
        (H % K == 0, f"NUM_KV_HEADS={K} must divide NUM_HEADS={H}"),
        (
            cfg.rotary_dims % 2 == 0 and cfg.rotary_dims <= cfg.head_dim,
            f"ROPE_DIMS={cfg.rope_dims} (0 = the head's width) must be even and at most "
            f"MODEL_DIM/NUM_HEADS={cfg.head_dim}",
        ),
        (cfg.xsa_last_n <= L, f"XSA_LAST_N={cfg.xsa_last_n} must be at most NUM_LAYERS={L}"),
        (
            cfg.num_loops == 0 or cfg.loop_start <= cfg.loop_end < L,
            f"LOOP_START={cfg.loop_start}, LOOP_END={cfg.loop_end} must be blocks in this order, "
            f"below NUM_LAYERS={L}",
        ),
        (
            cfg.parallel_residual == "none" or cfg.parallel_start_layer < L,
            f"PARALLEL_START_LAYER={cfg.parallel_start_layer} must be below NUM_LAYERS={L}",
        ),
        (
            cfg.gate_window <= D or not uses_window,
            f"GATE_WINDOW={cfg.gate_window} must be at most MODEL_DIM={D}",
        ),
        (
            1 not in (cfg.bigram_vocab_size, cfg.trigram_vocab_size),
            "BIGRAM_VOCAB_SIZE and TRIGRAM_VOCAB_SIZE must be 0 or at least 2",
        ),
        (
            cfg.trigram_hash == "mixing" or not cfg.isolate_documents,
            "TRIGRAM_HASH=polynomial reads across document boundaries; not with "
            "ISOLATE_DOCUMENTS=1",
        ),
        (
            cfg.value_residual != "x0" or cfg.parallel_residual in ("none", "stream"),
            "VALUE_RESIDUAL=x0 needs one stream: PARALLEL_RESIDUAL=none or stream",
        ),
    ]


def method_rules(cfg: Config) -> list[Rule]:
    """Rules about the optimizer, the quantizer and the evaluation."""
    max_steps, needs_hessian = len(NS_POLAR_EXPRESS), cfg.row_steps == "solved"
    return [
        (
            cfg.muon_coefficients != "polar" or cfg.muon_backend_steps <= max_steps,
            f"MUON_BACKEND_STEPS={cfg.muon_backend_steps} must be at most {max_steps} with "
            "MUON_COEFFICIENTS=polar",
        ),
        (
            cfg.mixer != "hedge_entropy" or cfg.allow_noncompliant,
            "MIXER=hedge_entropy has an expert that is not a distribution, so its score is not a "
            "code length; it needs ALLOW_NONCOMPLIANT=1",
        ),
        (
            cfg.quantizer == "gptq"
            or (cfg.quant_grid == "uniform" and (not needs_hessian or bool(cfg.clip_sigmas))),
            "QUANTIZER=rtn has no Hessians: not with QUANT_GRID=trellis, or ROW_STEPS=solved "
            "without CLIP_SIGMAS",
        ),
        (
            not cfg.clip_sigmas or cfg.row_steps == "solved",
            f"CLIP_SIGMAS and ROW_STEPS={cfg.row_steps} both set the quantization scales",
        ),
        (
            cfg.ttt_method != "pretrain" or cfg.allow_noncompliant,
            f"TTT_METHOD={cfg.ttt_method} breaks the rules; it needs ALLOW_NONCOMPLIANT=1",
        ),
    ]


def stage_rules(cfg: Config) -> list[Rule]:
    """Rules about the sequence length and batch size of every training stage."""
    longest, rules = cfg.train_seq_len, list[Rule]()
    for T, tokens, *_ in train_stages(cfg):
        rules += [
            (
                not cfg.trains or tokens % T == 0,
                f"TRAIN_BATCH_TOKENS={tokens} must be a multiple of TRAIN_SEQ_LEN={T}",
            ),
            (T <= longest, f"TRAIN_SEQ_SCHEDULE: {T} is above TRAIN_SEQ_LEN={longest}"),
        ]
    return list(dict.fromkeys(rules))


def check_eval_context(cfg: Config) -> list[str]:
    """Messages about knobs that do not fit the evaluation context, which an artifact may set."""
    context, sizes = cfg.score_seq_len, [cfg.ttt_chunk_size]
    with contextlib.suppress(ValueError):  # check_list_knobs reports malformed text
        sizes += [size for size, _ in parse_schedule(cfg.ttt_short_chunks)]
    uses_chunks = cfg.ttt_method == "chunk" or (cfg.ttt_method == "none" and cfg.needs_mixer)
    look_back = EMBEDDING_CONTEXT * (cfg.ttt_context == "incremental")
    rules: list[Rule] = [
        (
            cfg.eval_stride <= context,
            f"EVAL_STRIDE={cfg.eval_stride} must be at most the evaluation context {context} "
            "(EVAL_SEQ_LEN or TRAIN_SEQ_LEN)",
        ),
        (
            not uses_chunks or cfg.ttt_chunk_tokens % context == 0,
            f"TTT_CHUNK_TOKENS={cfg.ttt_chunk_tokens} must be a multiple of the evaluation "
            f"context {context}",
        ),
        (
            cfg.ttt_method != "lora" or max(sizes) + look_back <= context,
            f"TTT_CHUNK_SIZE={cfg.ttt_chunk_size} must be below the evaluation context {context}, "
            f"and {EMBEDDING_CONTEXT} less with TTT_CONTEXT=incremental",
        ),
    ]
    return [message for holds, message in rules if not holds]


BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
# Parts of a name that no foreign variable has: a name with one of them is a misspelt knob.
OUR_WORDS = {
    "TTT",
    "MUON",
    "GPTQ",
    "EMA",
    "SWA",
    "LORA",
    "WARMDOWN",
    "QAT",
    "XSA",
    "SOFTCAP",
    "ROPE",
    "BIGRAM",
    "TRIGRAM",
    "LQER",
    "STRIDE",
    "BPB",
    "MIXER",
    "HEDGE",
    "NGRAM",
}


def out_of_range(f: dataclasses.Field[Any], value: Any) -> str:
    """What is wrong with `value` for this knob, or an empty string."""
    meta, name = f.metadata, f.name.upper()
    if name == "MODE" and value == "audit":
        return "MODE=audit has moved: run python records/audit.py --artifact PATH"
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
            require(
                equals and name in known,
                f"{path}:{number}: {line!r} is not KNOB=value of a known knob",
            )
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
# Ranks and device, log, time ledger, files and signals of a run. Every file is written to a
# temporary name, synced and renamed, so that a kill at any moment leaves the old file or the new.


@dataclass(kw_only=True)
class Run:
    """Ranks, device, dtype, log and time ledger of one process of a run."""

    cfg: Config
    directory: Path
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    ledger: dict[str, float] = field(  # seconds by the budget that they count against
        default_factory=lambda: {"training": 0.0, "evaluation": 0.0, "other": 0.0}
    )
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # by log event
    signal_received: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def log(self, event: str, **values: Any) -> None:
        """Rank 0: write one line to stdout, to train.log and to metrics.jsonl."""
        if self.is_main:
            line = format_event(event, **values)
            print(line, flush=True)
            self.append("train.log", line)
            self.append("metrics.jsonl", json.dumps({"event": event, **values}))

    def append(self, name: str, line: str) -> None:
        """Rank 0: add a line to a file in RUN_DIR."""
        if self.is_main:
            path = self.directory / name
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

    @contextlib.contextmanager
    def stage(self, name: str, budget: str = "other") -> Generator[None]:
        """Time a stage of the run and add its seconds to `budget` in the ledger."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - start_s
            self.ledger[budget] += elapsed_s
            self.log("stage", name=name, elapsed_s=round(elapsed_s, 3), budget=budget)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank, sent as a pickle from one process of the run to others.

        No pickle is ever read from a file.
        """
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def run_on_rank0(self, function: Callable[[], Any]) -> Any:
        """The result of `function` on rank 0, on every rank; its exceptions are raised on all."""
        result = problem = None
        if self.is_main:
            try:
                result = function()
            except Exception as error:
                problem = error
        result, problem = self.broadcast_object((result, problem))
        if problem is not None:
            raise problem
        return result

    def on_signal(self, number: int, frame: Any) -> None:
        self.signal_received = True

    def check_signal(self) -> None:
        """Raise Interrupted if SIGTERM or SIGINT has been received."""
        if self.signal_received:
            raise Interrupted("stopped by a signal; start again with the same RUN_DIR to continue")

    def synchronize(self) -> None:
        """Wait for the device, so that timings include its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def start_run(cfg: Config, env: Mapping[str, str]) -> Generator[Run]:
    """Join the process group that torchrun's variables describe, and lock RUN_DIR.

    Inside, a signal only sets a flag: the run stops where its state can be saved.
    """
    rank, world_size, local_rank = parse_ranks(env)
    device, dtype = open_device(cfg, local_rank)
    run = Run(
        cfg=cfg, directory=Path(), rank=rank, world_size=world_size, device=device, dtype=dtype
    )
    if world_size > 1:
        join_process_group("nccl" if device.type == "cuda" else "gloo")
    with contextlib.ExitStack() as undo:
        now = f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{os.getpid()}"
        run_id = cfg.run_id or run.broadcast_object(now)
        run.directory = Path(cfg.run_dir or Path("logs") / run_id)
        run.run_on_rank0(lambda: undo.enter_context(lock_directory(run.directory)))
        for number in (signal.SIGTERM, signal.SIGINT):
            undo.callback(signal.signal, number, signal.signal(number, run.on_signal))
        yield run
        run.check_signal()
    if world_size > 1:  # not after an exception: it would wait for the other ranks
        dist.destroy_process_group()


def parse_ranks(env: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; InputError unless they describe a process group."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = {name: env[name] for name in names if env.get(name)}
    given = ", ".join(f"{name}={text}" for name, text in texts.items())
    remedy = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    is_valid = all(re.fullmatch("[0-9]{1,6}", text) for text in texts.values())
    require(is_valid, f"{given}: these variables must be integers from 0; {remedy}")
    rank, world_size = int(texts.get("RANK", 0)), int(texts.get("WORLD_SIZE", 1))
    require(rank < world_size, f"{given}: RANK must be below WORLD_SIZE ({world_size}); {remedy}")
    if world_size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
        require(not missing, f"{given}, but without {' and '.join(missing)}; {remedy}")
    return rank, world_size, int(texts.get("LOCAL_RANK", 0))


def open_device(cfg: Config, local_rank: int) -> tuple[torch.device, torch.dtype]:
    """The device of this rank, and the dtype: bf16 where the hardware computes with it."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        require(local_rank < count, f"LOCAL_RANK={local_rank}, but there are {count} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        device, flags = torch.device("cpu"), cpuinfo_field("flags").split()
        has_bf16 = "amx_bf16" in flags or "avx512_bf16" in flags
    if cfg.precision != "auto":
        has_bf16 = cfg.precision == "bf16"
    return device, torch.bfloat16 if has_bf16 else torch.float32


def join_process_group(backend: str) -> None:
    """Wait for all ranks; in a thread, because signals would not be handled during the wait."""
    if sys.platform == "linux" and dist.is_torchelastic_launched():
        pr_set_pdeathsig = 1  # SIGTERM when torchrun, the parent process, is killed
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
    timeout = datetime.timedelta(hours=1)  # covers what rank 0 does alone, such as export
    joining = ThreadPoolExecutor(1).submit(dist.init_process_group, backend, timeout=timeout)
    try:
        joining.result()
    except (RuntimeError, ValueError, OSError) as error:
        raise RunFailed(f"cannot join the process group: {error!s:.300}") from error


@contextlib.contextmanager
def lock_directory(directory: Path) -> Generator[None]:
    """Create and lock RUN_DIR; InputError that names the process if another one has locked it.

    Folders that were created here and are still empty at the end are removed.
    """
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.lock"
    try:
        with open_lock(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # a folder is not empty, and so its parents are not
            for folder in created:
                folder.rmdir()


def open_lock(path: Path) -> io.FileIO:
    """Open and lock a file that says which process has locked it, and since when."""
    while True:
        require_regular_file(path, "process ")
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = file.read(200).decode(errors="replace").strip()
            raise InputError(
                f"RUN_DIR={path.parent} is in use by {holder or 'another run'}; "
                "wait until it ends, or set another RUN_ID or RUN_DIR"
            ) from None
        except OSError as error:
            warn(f"{path.parent} cannot be locked ({error}); do not start a second run in it")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # removed by a run that has just ended
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {now}\n".encode())
    return file


def require_regular_file(path: Path, *starts: str) -> None:
    """Raise InputError if a run must not write `path`: it is a link, a folder or a foreign file.

    A run's own file is empty or begins with one of `starts`.
    """
    if not os.path.lexists(path):
        return
    remedy = "a run would overwrite it; move it away, or set another RUN_DIR"
    is_regular = path.is_file() and not path.is_symlink()
    require(is_regular, f"{path} is not a regular file; {remedy}")
    with open(path, "rb") as file:
        start = file.read(100)
    is_own = not start or start.startswith(tuple(text.encode() for text in starts))
    require(is_own, f"{path} was not written by a run; {remedy}")


def require(condition: object, message: str) -> None:
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def warn(text: str) -> None:
    """Print a warning to stderr, for what is noticed outside of a run's log."""
    print(format_event("warning", text=text), file=sys.stderr, flush=True)


def sync(descriptor: int) -> None:
    """fsync; a warning where the file system does not support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        warn(f"fsync is not supported here ({error}); a power cut can lose files")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
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
            sync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk has no name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, *pieces: bytes) -> None:
    """Write a file of these pieces so that it is never half-written."""
    with atomic_file(path) as file:
        file.writelines(pieces)


def format_event(event: str, **values: Any) -> str:
    """One log line `event key:value ...`; a key with a unit ends in it (_s, _ms, _bytes).

    A single pass is called legal: whether the run is compliant shows at its end.
    """
    if event.startswith("final_"):
        values = {("legal" if key == "compliant" else key): v for key, v in values.items()}
    return " ".join([event, *(f"{key}:{format_value(value)}" for key, value in values.items())])


def format_value(value: Any) -> str:
    """`value` as one word of a log line; JSON where spaces, quotes or line breaks need it."""
    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    is_word = text and text.isprintable() and not {" ", '"'} & {*text}
    return text if is_word else json.dumps(text)


def format_line(text: str) -> str:
    """`text`, or its JSON if it would not be one line."""
    return text if text.isprintable() else json.dumps(text)


def cpuinfo_field(key: str) -> str:
    """The value of `key` for the first processor in Linux's /proc/cpuinfo; else empty."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the CUDA allocator on a GPU, else the process's peak RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda or "none",
    "numpy": np.__version__,
    "sentencepiece": str(sentencepiece.__version__),
}  # the libraries that the results depend on


def describe_hardware(run: Run) -> str:
    """Number and name of the devices."""
    if run.device.type == "cuda":
        return f"{run.world_size} x {torch.cuda.get_device_name(run.device)}"
    return f"{os.cpu_count()} CPU cores, {cpuinfo_field('model name') or platform.machine()}"


def log_setup(run: Run) -> None:
    """Log the configuration (* = not the default), versions, hardware and the source."""
    cfg, changed, source = run.cfg, changed_knobs(run.cfg), script_source()
    values = {name.upper(): value for name, value in dataclasses.asdict(cfg).items()}
    for name, value in sorted(values.items()):
        mark = "*" if name in changed else " "
        run.append("train.log", f"config {mark} {name}:{format_line(str(value))}")
    config = {"event": "config", "values": values, "changed": changed}
    run.append("metrics.jsonl", json.dumps(config))
    run.log(
        "run",
        run_id=cfg.run_id or run.directory.name,
        mode=cfg.mode,
        seed=cfg.seed,
        ranks=run.world_size,
        device=run.device.type,
        precision=str(run.dtype).removeprefix("torch."),
        compile=cfg.compile,
        attention=choose_attention_backend(cfg, run.device, run.dtype).name,
        run_dir=str(run.directory),
    )
    run.log("versions", **VERSIONS, source_sha256=hashlib.sha256(source.encode()).hexdigest())
    run.log("hardware", name=describe_hardware(run))
    run.append("train.log", f"{'=' * 30} source {'=' * 30}\n{source}\n{'=' * 68}")
    if run.is_main:
        write_atomic(run.directory / "train_gpt_source.py", source.encode())


def data_identity(cfg: Config) -> dict[str, Any]:
    """SHA-256 of the tokenizer and of the validation shards: what a resumed run compares."""
    shards = [*find_shards(cfg, "val"), *find_shards(cfg, "val_bytes")]
    hashes = "".join(hash_bytes(path.read_bytes()) for path in shards)
    return {
        "tokenizer_sha256": load_tokenizer(cfg)[1],
        "val_sha256": hash_bytes(hashes.encode()),
    }


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
    require(
        (magic, version) == (SHARD_MAGIC, SHARD_VERSION),
        f"{path}: {size} bytes, magic {magic} version {version}, expected {SHARD_MAGIC} and "
        f"{SHARD_VERSION}: not a token shard; {remedy}",
    )
    expected = SHARD_HEADER_BYTES + 2 * (count or 0)
    require(
        size == expected,
        f"{path}: {size} bytes, but its header says {count} tokens = "
        f"{expected} bytes: damaged; {remedy}",
    )
    # A memory map cannot be empty.
    return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES) if count else np.zeros(0, dtype="<u2")


class ByteTable:
    """UTF-8 bytes that each target token stands for, given the token before it.
    A piece that begins with the space marker counts one byte for it unless a control token
    precedes (a decoder drops that space); byte pieces count 1, control pieces 0.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, vocab_size: int):
        ids = list(range(processor.get_piece_size()))
        require(
            len(ids) == vocab_size,
            f"VOCAB_SIZE={vocab_size} does not match the tokenizer's {len(ids)}; set it so",
        )
        require(
            processor.piece_to_id("\u2581") != processor.unk_id(),
            "the tokenizer has no piece for a single space, so spaces would count as three "
            "bytes; train it with data/prepare.py",
        )
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
    require(
        found,
        f"no tokenizer at {' or '.join(map(str, candidates))}; set TOKENIZER_PATH, or "
        "make the data set: python data/prepare.py --source stdlib --vocab-size "
        f"{cfg.vocab_size} --out {cfg.data_path}",
    )
    payload = found[0].read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=payload or b"empty")
    except RuntimeError as error:
        raise InputError(f"{found[0]} is not a SentencePiece model: {error}") from error
    return processor, hashlib.sha256(payload).hexdigest()


def find_shards(cfg: Config, part: str) -> list[Path]:
    """Sorted shards of `part` (train, val or val_bytes); InputError if a needed part is missing."""
    paths = sorted(Path(cfg.data_path).glob(f"*_{part}_[0-9]*.bin"))
    require(
        paths or part == "val_bytes",
        f"DATA_PATH={cfg.data_path} holds no *_{part}_*.bin shard; fetch the published ones "
        "with data/download.py, or make some: python data/prepare.py --source stdlib "
        f"--vocab-size {cfg.vocab_size} --out {cfg.data_path}",
    )
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
        require(
            largest < self.vocab_size,
            f"token id {largest} in {self.paths[0].parent} does not "
            f"fit VOCAB_SIZE={self.vocab_size}: the shards belong to another tokenizer",
        )
        return ids


class SequentialSampler:
    """Windows in the order of the data, from a document start that the seed chooses."""

    def __init__(self, stream: TokenStream, seq_len: int, cfg: Config):
        require(
            stream.num_tokens > seq_len,
            f"{stream.num_tokens} training tokens are fewer than TRAIN_SEQ_LEN={seq_len} + 1",
        )
        guess = int(np.random.default_rng(cfg.seed).integers(stream.num_tokens))
        ahead = np.flatnonzero(stream.read(guess, min(1 << 20, stream.num_tokens)) == BOS_ID)
        self.first = guess + (int(ahead[0]) if ahead.size else 0)

    def start(self, position: int) -> int:
        """Where in the stream the window begins that `position` tokens of training precede."""
        return self.first + position


class ShuffledSampler:
    """Every window of every shard once an epoch, in random order, from a random phase a shard."""

    def __init__(self, stream: TokenStream, seq_len: int, cfg: Config):
        self.stream, self.seq_len, self.seed = stream, seq_len, cfg.seed
        # One window is given up so that the count is the same at every phase.
        self.counts = [max(0, (size - seq_len) // seq_len) for size in stream.sizes]
        self.num_windows, self.epochs = sum(self.counts), dict[int, np.ndarray]()
        require(
            self.num_windows,
            f"no training shard holds two windows of TRAIN_SEQ_LEN={seq_len} "
            f"tokens, which LOADER={cfg.loader} needs",
        )

    def arrange(self, starts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The windows of all shards, whose starts are given in order, as they are visited."""
        # What drawing shards by their remaining windows and windows at random amounts to (#1394).
        return rng.permutation(np.concatenate(starts))

    def windows(self, shard: int, rng: np.random.Generator) -> np.ndarray:
        """Where the windows of a shard begin, in order, from a random phase on."""
        first = self.stream.starts[shard] + int(rng.integers(self.seq_len))
        return first + np.arange(self.counts[shard]) * self.seq_len

    def order(self, epoch: int) -> np.ndarray:
        """Start positions of all windows of an epoch, in the order they are visited."""
        if epoch not in self.epochs:
            rng = np.random.default_rng([self.seed, epoch])
            starts = [self.windows(i, rng) for i, count in enumerate(self.counts) if count]
            self.epochs = {epoch: self.arrange(starts, rng)}
        return self.epochs[epoch]

    def start(self, position: int) -> int:
        epoch, index = divmod(position // self.seq_len, self.num_windows)
        return int(self.order(epoch)[index])


def coprime_walk(windows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The windows of a shard by a random stride coprime to their number, from a random one on."""
    n, stride = len(windows), 1
    while n > 2 and math.gcd(stride := int(rng.integers(1, n)), n) > 1:
        pass
    return windows[(int(rng.integers(n)) + stride * np.arange(n)) % n]


class CoprimeSampler(ShuffledSampler):
    """Each shard is walked by a stride coprime to its number of windows (#1460, after #726)."""

    def arrange(self, starts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The turns of the shards are random, in proportion to what remains of each (#1060)."""
        order = rng.permutation(np.repeat(np.arange(len(starts)), [len(s) for s in starts]))
        walked = np.empty(len(order), dtype=np.int64)
        for shard, windows in enumerate(starts):
            walked[order == shard] = coprime_walk(windows, rng)
        return walked


SAMPLERS: dict[str, Any] = {
    "stream": SequentialSampler,
    "shuffled": ShuffledSampler,
    "coprime": CoprimeSampler,
}


class BatchLoader:
    """Batches of training windows for one rank; the next one is read while this one is used."""

    def __init__(self, cfg: Config, stream: TokenStream, *, rank: int, world_size: int):
        self.stream, self.rank, self.world_size = stream, rank, world_size
        for phase in train_stages(cfg):
            rows = phase.batch_tokens // phase.seq_len
            require(
                rows % world_size == 0,
                f"TRAIN_BATCH_TOKENS={phase.batch_tokens} / TRAIN_SEQ_LEN={phase.seq_len} = "
                f"{rows} rows do not divide over {world_size} ranks; use a multiple of "
                f"{phase.seq_len * world_size} tokens",
            )
        lengths = {phase.seq_len for phase in train_stages(cfg)}
        self.plans = {T: SAMPLERS[cfg.loader](stream, T, cfg) for T in lengths}
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.ahead: dict[tuple[int, int, int], Future[Tensor]] = {}

    def read(self, position: int, seq_len: int, batch_tokens: int) -> Tensor:
        """This rank's rows, (rows, T + 1) ids, of the batch that `position` tokens precede."""
        plan, share = self.plans[seq_len], batch_tokens // self.world_size
        starts = range(position + self.rank * share, position + (self.rank + 1) * share, seq_len)
        windows = [self.stream.read(plan.start(start), seq_len + 1) for start in starts]
        return torch.from_numpy(np.stack(windows))

    def batch(self, position: int, phase: TrainStage) -> Tensor:
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
        require(
            sidecar.num_tokens == total,
            f"{sidecars[0]}: {sidecar.num_tokens} byte counts for {total} validation tokens; "
            "sidecar and shards belong to different data sets",
        )
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
    if cfg.rope_scaling == "ntk" and num_positions > cfg.train_seq_len and dims > 2:
        # The slowest frequency covers the longer context as it covered TRAIN_SEQ_LEN.
        base *= (num_positions / cfg.train_seq_len) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angle_TE = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequency)
    return torch.stack([angle_TE.cos(), angle_TE.sin()])


def apply_rotary_emb(x_BTHE: Tensor, rotary_2TE: Tensor) -> Tensor:
    """Turn the first channels of each head, paired half and half; leave those beyond the table."""
    half = rotary_2TE.size(-1)
    cos, sin = rotary_2TE[:, :, None].to(x_BTHE.dtype)
    first, second, rest = torch.split(x_BTHE, [half, half, x_BTHE.size(-1) - 2 * half], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def document_index(ids_BT: Tensor) -> Tensor:
    """Which document of its row each position belongs to; BOS opens a new one."""
    return (ids_BT == BOS_ID).cumsum(dim=-1)


class AttentionBackend(NamedTuple):
    """A causal attention kernel. `prepare` turns ids into what `attend` needs to know of them.
    Keys may begin `past` positions before the queries: rows of a single document each, so far.
    """

    name: str
    prepare: Callable[..., Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def sdpa_mask(ids_BT: Tensor, isolate: bool, past: int = 0) -> Tensor | None:
    """Boolean mask (B, 1, T, T) of documents, or None for the plain causal one."""
    if past:
        T = ids_BT.size(1)
        return torch.ones(T, past + T, dtype=torch.bool, device=ids_BT.device).tril(past)
    doc_BT = document_index(ids_BT)
    return (doc_BT[:, None, :, None] == doc_BT[:, None, None, :]).tril() if isolate else None


def sdpa_attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled dot product attention: the reference for every other kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    if (
        mask is None
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.size(2) <= MAX_TILED_LEN
        and torch.is_grad_enabled()
    ):
        return TiledCausalAttention.apply(q, k, v).transpose(1, 2)  # type: ignore[no-untyped-call]
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The kernels for these have no grouped heads there; what replaces them takes T^2 memory.
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    ).transpose(1, 2)


MAX_TILED_LEN, TILE_LEN = 512, 64  # positions; beyond, PyTorch's backward is as fast


@torch.library.custom_op("golf::tiled_gradients", mutates_args=())
def tiled_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, less_2BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (B, heads, T, E) from g, that of causal attention's output, as in
    FlashAttention-2 (arXiv:2307.08691): a few large products for TILE queries at a time. Its lse
    and delta ride along in two channels each, bf16 halves of a float32: no pass of their own.
    """
    (B, H, T, E), K, scale = q.shape, k.size(1), q.size(-1) ** -0.5

    def with_channels(x: Tensor, *more_BHT: Tensor) -> Tensor:
        wide = torch.cat([x, *(channel[..., None].to(x.dtype) for channel in more_BHT)], dim=-1)
        return wide.view(B * K, -1, T, E + len(more_BHT))

    one_BKT, more_2BHT = torch.ones_like(k[..., 0]), -less_2BHT
    q, g = (
        with_channels(x, more_BHT, more_BHT - more_BHT.to(x.dtype))
        for x, more_BHT in zip((q * scale, g), more_2BHT, strict=True)
    )
    k, v = (with_channels(x, one_BKT, one_BKT)[:, 0] for x in (k, v))
    dq, dk, dv = q.new_empty(*q.shape[:3], E), k.new_zeros(B * K, T, E), v.new_zeros(B * K, T, E)
    for start in range(0, T, TILE_LEN):
        end = min(T, start + TILE_LEN)
        q_tile, g_tile = (x[:, :, start:end].flatten(1, 2) for x in (q, g))
        p = torch.bmm(q_tile, k[:, :end].mT).exp_()
        p.view(B * K, H // K, -1, end)[..., start:].tril_()
        dv[:, :end].baddbmm_(p.mT, g_tile[..., :E])
        ds = torch.bmm(g_tile, v[:, :end].mT).mul_(p)
        dk[:, :end].baddbmm_(ds.mT, q_tile[..., :E])
        dq[:, :, start:end] = (torch.bmm(ds, k[:, :end, :E]) * scale).view_as(dq[:, :, start:end])
    return dq.view(B, H, T, E), dk.view(B, K, T, E), dv.view(B, K, T, E)


@tiled_attention_backward.register_fake
def _(_g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


class TiledCausalAttention(torch.autograd.Function):
    """PyTorch's causal attention on a CPU, with tiled_gradients as its backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal=True
        )
        ctx.save_for_backward(q, k, v, y, lse_BHT)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        *qkv, y, lse_BHT = ctx.saved_tensors
        delta_BHT = (g.float() * y).sum(dim=-1)
        return tiled_attention_backward(g, *qkv, torch.stack([lse_BHT, delta_BHT]))


def flash_cu_seqlens(ids_BT: Tensor, isolate: bool, past: int = 0) -> Tensor | None:
    """Cumulative sequence lengths of the flattened rows cut at each BOS, or None."""
    if past or not isolate:  # the kernels align queries with the last keys
        return None
    starts = ids_BT == BOS_ID
    starts[:, 0] = True
    cuts = starts.flatten().nonzero().flatten().to(torch.int32)
    capacity = next(c for c in cu_seqlens_capacities(ids_BT.numel()) if c > len(cuts))
    return F.pad(cuts, (0, capacity - len(cuts)), value=ids_BT.numel())  # empty sequences


def cu_seqlens_capacities(num_tokens: int) -> Iterator[int]:
    """Lengths to which the cumulative sequence lengths of a batch are padded, in doubling steps.

    The blocks are compiled once for each length, so there must be few of them.
    """
    capacity = max(64, num_tokens // 256)
    while True:
        yield capacity
        capacity *= 2


def flash_attend(
    kernels: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, cuts: Tensor | None
) -> Tensor:
    """FlashAttention-2 or -3, whichever module `kernels` is (arXiv:2307.08691, 2407.08608)."""
    if cuts is None:
        y = kernels.flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)
    else:
        longest = q_BTHE.size(1)
        y = kernels.flash_attn_varlen_func(
            q_BTHE.flatten(0, 1),
            k_BTKE.flatten(0, 1),
            v_BTKE.flatten(0, 1),
            cu_seqlens_q=cuts,
            # A tensor of its own: torch 2.13 cannot trace one that is passed twice.
            cu_seqlens_k=cuts.detach(),
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
    y = y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp as well
    return y.view_as(q_BTHE)


def flex_block_mask(ids_BT: Tensor, isolate: bool, past: int = 0) -> Any:
    """Block mask of what each position sees; blocks that documents empty are skipped."""
    doc_BT, (B, T) = document_index(ids_BT) * isolate, ids_BT.shape
    sees = (
        (lambda b, h, q, k: k <= q + past)
        if past
        else lambda b, h, q, k: (k <= q) & (doc_BT[b, q] == doc_BT[b, k])
    )
    return flex_attention.create_block_mask(sees, B, None, T, past + T, device=str(ids_BT.device))


def flex_attend(kernel: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Any) -> Tensor:
    """PyTorch's flex attention: fused if it is compiled, else exact, with T^2 memory."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    y: Tensor = kernel(q, k, v, block_mask=mask, enable_gqa=True)
    return y.transpose(1, 2)


def flex_kernel() -> Any:
    """Compiled on a GPU, also for passes outside compiled blocks, as calibration's and LoRA's."""
    if not torch.cuda.is_available() or compile_unavailable_reason(torch.device("cuda")):
        return flex_attention.flex_attention
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def import_flash_attention(name: str) -> Any:
    """The FlashAttention module `name`; ImportError if it is missing or lacks its functions.

    With flash-attn-4 alone, `flash_attn` is a namespace package without them.
    """
    module = importlib.import_module(name)
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        if not hasattr(module, function):
            raise ImportError(f"module {name} has no {function}")
    return module


# Each is called when it is chosen: a flash kernel that is not installed raises ImportError.
ATTENTION_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "fa3": lambda: AttentionBackend(
        "fa3",
        flash_cu_seqlens,
        functools.partial(flash_attend, import_flash_attention("flash_attn_interface")),
    ),
    "fa2": lambda: AttentionBackend(
        "fa2",
        flash_cu_seqlens,
        functools.partial(flash_attend, import_flash_attention("flash_attn")),
    ),
    "flex": lambda: AttentionBackend(
        "flex", flex_block_mask, functools.partial(flex_attend, flex_kernel())
    ),
    "sdpa": lambda: AttentionBackend("sdpa", sdpa_mask, sdpa_attend),
}


def choose_attention_backend(
    cfg: Config, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The kernel that ATTENTION names, or the best that is installed and suits the device."""
    on_gpu, trains = device.type == "cuda", cfg.trains or cfg.ttt_method != "none"
    require(
        cfg.attention != "flex" or on_gpu or not trains,
        "ATTENTION=flex has no gradients on a CPU; use ATTENTION=sdpa",
    )
    if cfg.attention != "auto":
        try:
            return ATTENTION_BACKENDS[cfg.attention]()
        except ImportError as error:
            raise InputError(f"ATTENTION={cfg.attention} is not installed: {error}") from error
    if on_gpu and dtype == torch.bfloat16:
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        for name in ("fa3", "fa2") if hopper else ("fa2",):
            with contextlib.suppress(ImportError):
                return ATTENTION_BACKENDS[name]()
    # A dense document mask costs T^2 bytes and forbids the fast kernel; flex skips its blocks.
    return ATTENTION_BACKENDS[
        "flex" if on_gpu and cfg.isolate_documents and cfg.compile else "sdpa"
    ]()


def fake_quantize(weight_OI: Tensor, bits: int) -> Tensor:
    """The weight as the artifact will hold it, its gradient straight through (arXiv:1308.3432)."""
    if bits == 0:
        return weight_OI
    qmax, weight_OI = 2 ** (bits - 1) - 1, weight_OI.float()
    scale_O1 = row_scales(weight_OI.detach(), qmax).float()[:, None]
    grid_OI = (weight_OI.detach() / scale_O1).round().clamp(-qmax, qmax) * scale_O1
    return weight_OI + (grid_OI - weight_OI).detach()


class CastedLinear(nn.Linear):
    """float32 weight (O, I), cast to the input's dtype; an adapter adds its own output."""

    def __init__(self, in_features: int, out_features: int, *, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        # On the instance: the compiler takes a class attribute for a constant.
        self.adapter: nn.Module | None = None
        self.zero_init, self.qat_bits = zero_init, 0

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, fake_quantize(self.weight, self.qat_bits).to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)


class BatchedLoRA(nn.Module):
    """LoRA (arXiv:2106.09685), a pair of matrices a row: y_b = alpha / R * (x_b A_b^T) B_b^T.
    B is zero at first, and with it y; fewer rows than there are pairs take the first ones.
    """

    def __init__(self, down_RI: Tensor, num_rows: int, num_outputs: int, alpha: float):
        super().__init__()
        R, self.scale = len(down_RI), alpha / len(down_RI)
        self.down_BRI = nn.Parameter(down_RI.repeat(num_rows, 1, 1))
        self.up_BOR = nn.Parameter(down_RI.new_zeros(num_rows, num_outputs, R))

    def forward(self, x_BTI: Tensor) -> Tensor:
        down_BRI, up_BOR = (w[: len(x_BTI)].to(x_BTI.dtype) for w in (self.down_BRI, self.up_BOR))
        return x_BTI @ down_BRI.mT @ up_BOR.mT * self.scale


class Embedding(nn.Embedding):
    """float32 table (V, D), which is also the head if that is tied; the adapter is the head's."""

    def __init__(self, rows: int, dim: int):
        super().__init__(rows, dim)
        self.adapter: nn.Module | None = None


def shift_right(x_BT: Tensor, steps: int) -> Tensor:
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
        self.table, self.proj = Embedding(rows, dim), CastedLinear(dim, cfg.model_dim)
        nn.init.zeros_(self.table.weight)
        nn.init.orthogonal_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05)) if order == 2 else None

    def buckets(self, ids_BT: Tensor) -> Tensor:
        """Row of the table for each position; n-grams that lack a token share the last row."""
        rows, tokens = (
            self.table.num_embeddings,
            [shift_right(ids_BT, n) for n in range(self.order)],
        )
        if self.polynomial:
            tokens[2][:, 0] = ids_BT[:, 0]  # as a roll leaves it there
            return (961 * tokens[2] + 31 * tokens[1] + tokens[0]) % rows
        mixed, short = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        starts_BT = (ids_BT == BOS_ID) & self.isolate
        starts_BT[:, 0] = True
        for n, token_BT in enumerate(tokens):
            mixed ^= self.FACTORS[n] * token_BT
            short |= shift_right(starts_BT, n) & (n < self.order - 1)
        return torch.where(short, rows - 1, mixed % (rows - 1))

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        y_BTD = self.proj(self.table(self.buckets(ids_BT)).to(dtype))
        return y_BTD if self.scale is None else y_BTD * self.scale.to(dtype)


class EvalHashEmbedding(nn.Module):
    """Hashed bigrams in a table as wide as the model, zero at first, made for one pass (#1460)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.isolate = cfg.isolate_documents
        self.table = Embedding(cfg.eval_hash_rows, cfg.model_dim)
        nn.init.zeros_(self.table.weight)

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        alone_BT = (ids_BT == BOS_ID) & self.isolate
        alone_BT[:, 0] = True
        before_BT = torch.where(alone_BT, ids_BT, shift_right(ids_BT, 1))
        # In float32 it would promote the whole stream.
        return self.table((2039 * before_BT + ids_BT) % self.table.num_embeddings).to(dtype)


class SmearGate(nn.Module):
    """Mix the token before into each, but for the first of a document (#1851).
    blend: (1 - g) x + g x' with g = sigmoid(theta), a half at first (thwu1); lambda:
    x + lambda sigmoid(w x[:12]) x', the identity at first (#1667).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        blend = cfg.smear_gate == "blend"
        self.before_norm = not blend
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim if blend else cfg.gate_window))
        self.scale = None if blend else nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        before_BTD = shift_right(x_BTD, 1) * (ids_BT != BOS_ID)[..., None]
        gate = self.gate.to(x_BTD.dtype)
        if self.scale is None:
            return torch.lerp(x_BTD, before_BTD, torch.sigmoid(gate))
        gate_BT1 = torch.sigmoid((x_BTD[..., : len(gate)] * gate).sum(dim=-1, keepdim=True))
        return x_BTD + self.scale.to(x_BTD.dtype) * gate_BT1 * before_BTD


class AttnOutputGate(nn.Module):
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


def exclusive_self_attention(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """Drop the part of each head's output along its position's own value (arXiv:2603.09078)."""
    y_BTKGE = y_BTHE.view(*v_BTKE.shape[:3], -1, v_BTKE.size(3))
    unit_BTK1E = F.normalize(v_BTKE, dim=-1)[:, :, :, None]
    own = (y_BTKGE * unit_BTK1E).sum(dim=-1, keepdim=True)
    return (y_BTKGE - own * unit_BTK1E).view_as(y_BTHE)


# How far embeddings look back: the smeared token before, and the trigram that ends in it.
EMBEDDING_CONTEXT = 3


class LayerKVCache:
    """Keys (normed, not rotated) and values of one visit, of the positions before."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Old and new ones; gradients flow through the new ones only."""
        if self.pair is not None:
            old = (x[: len(k_BTKE)] for x in self.pair)
            k_BTKE, v_BTKE = (
                torch.cat(xs, dim=1) for xs in zip(old, (k_BTKE, v_BTKE), strict=True)
            )
        self.pair = k_BTKE.detach(), v_BTKE.detach()
        return k_BTKE, v_BTKE


class KVCache:
    """What a forward pass over the next tokens of each row needs to go on from those before."""

    def __init__(self, num_layer_calls: int, capacity: int):
        self.layers, self.capacity = [LayerKVCache() for _ in range(num_layer_calls)], capacity
        self.length, self.ids_BT = 0, torch.zeros(0, 0, dtype=torch.int64)

    def keep_positions(self, start: int, stop: int) -> None:
        """Forget all but the positions from `start` to `stop` of those that are kept."""
        for layer in self.layers:
            if layer.pair is not None:
                layer.pair = layer.pair[0][:, start:stop], layer.pair[1][:, start:stop]
        self.ids_BT, self.length = self.ids_BT[:, start:stop], stop - start

    def append_tokens(self, ids_BT: Tensor) -> Tensor:
        """The new ids behind the last ones before; the oldest beyond the capacity are forgotten."""
        T = ids_BT.size(1)
        self.keep_positions(max(0, self.length + T - self.capacity), self.length)
        old_BT = self.ids_BT[: len(ids_BT)] if self.length else ids_BT[:, :0]
        self.ids_BT = torch.cat([old_BT, ids_BT], dim=1)
        self.length = self.ids_BT.size(1)
        return self.ids_BT[:, -(T + EMBEDDING_CONTEXT) :]


class BlockInputs(NamedTuple):
    """What every block reads besides the stream."""

    x0_BTD: Tensor  # the normed embedding
    rotary_2TE: Tensor
    mask: Any  # what the attention kernel's `prepare` returned
    first_v_BTC: Tensor | None  # values of block 0, if later blocks mix them in
    shared_v_BTC: Tensor | None  # the shared value embedding
    kv_cache: LayerKVCache | None = None  # those of the positions before, at this visit


class BlockScalars(NamedTuple):
    """A block's rows of the small learned factors that GPT.mixing holds; None where not used."""

    value: Tensor | None = None  # of block 0's values, and of its own
    shared: Tensor | None = None  # of the shared value embedding
    x0: Tensor | None = None  # of x0 after the block
    write: Tensor | None = None  # (2, 2): of attention and MLP, to each lane
    carry: Tensor | None = None  # (2,): of the lanes


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normed queries and keys: norm, then rotary, then gain."""

    def __init__(self, cfg: Config, layer: int, attention: AttentionBackend):
        super().__init__()
        D, H, K, E = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.c_q, self.c_k, self.c_v = (CastedLinear(D, width * E) for width in (H, K, K))
        self.proj = CastedLinear(H * E, D, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((H,), cfg.qk_gain_init))
        self.gate = None if cfg.attn_gate == "none" else AttnOutputGate(cfg)
        self.head_dim, self.use_xsa, self.attend = E, layer in cfg.xsa_blocks, attention.attend
        self.adapter: nn.Module | None = None  # parallel to the whole module

    def values(self, n_BTD: Tensor, inputs: BlockInputs, mix: BlockScalars) -> Tensor:
        """Values (B, T, K E): own, block 0's (arXiv:2410.17897, VRL #457), shared ones (#414)."""
        v_BTC = self.c_v(n_BTD)
        if mix.value is not None and inputs.first_v_BTC is not None:
            first, *own = mix.value.to(v_BTC.dtype)
            v_BTC = (own[0] * v_BTC if own else v_BTC) + first * inputs.first_v_BTC
        if mix.shared is not None and inputs.shared_v_BTC is not None:
            v_BTC = v_BTC + mix.shared.to(v_BTC.dtype) * inputs.shared_v_BTC
        return v_BTC

    def forward(self, n_BTD: Tensor, inputs: BlockInputs, mix: BlockScalars) -> Tensor:
        """Attention's output (B, T, D) on the normed stream."""
        heads = (self.c_q(n_BTD), self.c_k(n_BTD), self.values(n_BTD, inputs, mix))
        q_BTHE, k_BTKE, v_BTKE = (x.unflatten(-1, (-1, self.head_dim)) for x in heads)
        q_BTHE, k_BTKE, all_v_BTKE = rms_norm(q_BTHE), rms_norm(k_BTKE), v_BTKE
        if inputs.kv_cache is not None:
            k_BTKE, all_v_BTKE = inputs.kv_cache.append(k_BTKE, v_BTKE)
        q_BTHE = apply_rotary_emb(q_BTHE, inputs.rotary_2TE[:, -q_BTHE.size(1) :])
        q_BTHE = q_BTHE * self.q_gain.to(n_BTD.dtype)[:, None]
        k_BTKE = apply_rotary_emb(k_BTKE, inputs.rotary_2TE)
        y_BTHE = self.attend(q_BTHE, k_BTKE, all_v_BTKE, inputs.mask)
        if self.use_xsa:
            y_BTHE = exclusive_self_attention(y_BTHE, v_BTKE)
        if self.gate is not None:
            y_BTHE = self.gate(y_BTHE, n_BTD)
        y_BTD = self.proj(y_BTHE.flatten(2))
        return y_BTD if self.adapter is None else y_BTD + self.adapter(n_BTD)


class MLP(nn.Module):
    """W2 (leaky_relu(W1 x, slope))^2; slope 0 is relu^2 (arXiv:2109.08668)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.fc = CastedLinear(cfg.model_dim, cfg.mlp_dim)
        self.proj = CastedLinear(cfg.mlp_dim, cfg.model_dim, zero_init=True)
        self.slope = cfg.leaky_slope
        self.adapter: nn.Module | None = None  # parallel to the whole module

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.fc(x_BTD)
        h_BTF = F.leaky_relu(h_BTF, self.slope) if self.slope else F.relu(h_BTF)
        y_BTD = self.proj(h_BTF.square())
        return y_BTD if self.adapter is None else y_BTD + self.adapter(x_BTD)


Lanes = tuple[Tensor, Tensor | None]  # what attention reads, and what the MLP reads once they part


class Block(nn.Module):
    """Mix in the embedding, then attention, then MLP, each with a learned scale a channel."""

    def __init__(self, cfg: Config, layer: int, attention: AttentionBackend):
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

    def mix_x0(self, x_BTD: Tensor, inputs: BlockInputs) -> Tensor:
        keep, inject = self.resid_mix.to(x_BTD.dtype)
        return keep * x_BTD + inject * inputs.x0_BTD

    def attn_update(self, x_BTD: Tensor, inputs: BlockInputs, mix: BlockScalars) -> Tensor:
        return self.attn_scale.to(x_BTD.dtype) * self.attn(self.norm(x_BTD), inputs, mix)

    def mlp_update(self, x_BTD: Tensor) -> Tensor:
        return self.mlp_scale.to(x_BTD.dtype) * self.mlp(self.norm(x_BTD))

    def forward(self, lanes: Lanes, inputs: BlockInputs, mix: BlockScalars) -> Lanes:
        """The stream after this block, or its two lanes."""
        x_BTD, side_BTD = lanes
        if side_BTD is not None and mix.write is not None:
            return self.route(x_BTD, side_BTD, inputs, mix)
        x_BTD = self.mix_x0(x_BTD, inputs)
        after_BTD = x_BTD + self.attn_update(x_BTD, inputs, mix)
        if side_BTD is not None:  # the lanes never meet before they merge (#1477)
            return after_BTD, side_BTD + self.mlp_update(side_BTD)
        # On one stream side by side, the MLP does not wait for attention (#1412, #1460).
        x_BTD = after_BTD + self.mlp_update(x_BTD if self.is_parallel else after_BTD)
        if mix.x0 is not None:
            x_BTD = x_BTD + mix.x0.to(x_BTD.dtype) * inputs.x0_BTD
        return x_BTD, None

    def route(
        self, x_BTD: Tensor, side_BTD: Tensor, inputs: BlockInputs, mix: BlockScalars
    ) -> Lanes:
        """Attention and MLP each write to both lanes, which are carried on with a factor."""
        assert mix.write is not None and mix.carry is not None, "lanes without factors"
        write, carry = mix.write.to(x_BTD.dtype), mix.carry.to(x_BTD.dtype)
        a_BTD = self.attn_update(self.mix_x0(x_BTD, inputs), inputs, mix)
        if self.parallel == "lanes":  # the MLP reads its lane at the same time (#1529)
            m_BTD = self.mlp_update(side_BTD)
            return (
                carry[0] * x_BTD + write[0, 0] * a_BTD + write[1, 0] * m_BTD,
                carry[1] * side_BTD + write[0, 1] * a_BTD + write[1, 1] * m_BTD,
            )
        x_BTD, side_BTD = (
            carry[0] * lane + write[0, i] * a_BTD for i, lane in enumerate((x_BTD, side_BTD))
        )
        # routed: the MLP reads its lane after attention wrote to it (#1204).
        m_BTD = self.mlp_update(self.mix_x0(side_BTD, inputs))
        return carry[1] * x_BTD + write[1, 0] * m_BTD, carry[1] * side_BTD + write[1, 1] * m_BTD


def run_block(block: nn.Module, *args: Any) -> Lanes:
    """Call `block`: the unit that is compiled, one graph for all blocks of a kind."""
    return block(*args)


class LayerCall(NamedTuple):
    """One step of the forward pass."""

    block: int  # whose weights run
    skip: int | None  # row of skip_weights with which the last saved output is added first
    save: bool  # whether the output is put on the stack of saved ones
    split_lanes: bool = False  # whether the stream is copied into two lanes before it


def layer_schedule(
    num_layers: int, loop: tuple[int, int] = (0, -1), passes: int = 1, lanes_from: int | None = None
) -> list[LayerCall]:
    """Order in which blocks run: a U-Net whose second half takes the first half's outputs back.
    Blocks loop[0] to loop[1] run `passes` times in all (#1394). The deepest saved output is used
    first. With lanes_from the stream parts at the first visit of the second half to such a block.
    """
    order, (first, last) = list(range(num_layers)), loop
    order[first : last + 1] = order[first : last + 1] * passes
    encoder, decoder = order[: len(order) // 2], order[len(order) // 2 :]
    part = next(
        (
            row
            for row, block in enumerate(decoder)
            if lanes_from is not None and block >= lanes_from
        ),
        None,
    )
    return [
        *(LayerCall(block, skip=None, save=True) for block in encoder),
        *(
            LayerCall(
                block, row if row < len(encoder) else None, save=False, split_lanes=row == part
            )
            for row, block in enumerate(decoder)
        ),
    ]


def layer_schedules(cfg: Config) -> list[list[LayerCall]]:
    """The plans with 0 to NUM_LOOPS extra passes; the last one is that of evaluation."""
    lanes = cfg.parallel_residual not in ("none", "stream")
    loop = (cfg.loop_start, cfg.loop_end) if cfg.num_loops else (0, -1)
    return [
        layer_schedule(cfg.num_layers, loop, passes, cfg.parallel_start_layer if lanes else None)
        for passes in range(1, cfg.num_loops + 2)
    ]


def init_block_scalars(cfg: Config) -> dict[str, Tensor]:
    """Initial values of the small learned factors of all blocks, a row a block (see Mix)."""
    L, shared = cfg.num_layers, parse_int_list(cfg.ve_layers)
    by_knob = {
        "resformer": {"value": torch.full((L - 1, 2), 0.5)},  # block 0 has none to mix in
        "vrl": {"value": torch.zeros(L - 1, 1)},
        "x0": {"x0": torch.zeros(L)},
        "routed": {"write": torch.ones(L, 2, 2), "carry": torch.full((L, 2), 1.1**0.5)},
        "lanes": {"write": torch.ones(L, 2, 2), "carry": torch.full((L, 2), 1.1)},
        "merge": {"merge": torch.tensor(0.5)},
    }  # of attention's lane, at the end
    return {
        **by_knob.get(cfg.value_residual, {}),
        **by_knob.get(cfg.parallel_residual, {}),
        **({"shared": torch.ones(len(shared))} if shared else {}),
    }


def softcap_logits(z_NV: Tensor, cap: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """cap * tanh(z / cap) and tanh(z / cap) in float32, and each logit's cap: one, or by sign."""
    z_NV = z_NV.float()
    cap = torch.where(z_NV > 0, cap[0], cap[1]) if isinstance(cap, Tensor) else cap
    tanh_NV = torch.tanh(z_NV / cap)
    return cap * tanh_NV, tanh_NV, cap


def softcapped_cross_entropy(
    z_NV: Tensor, target_N: Tensor, weight_N: Tensor | None, cap: float | Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Nats of each target under softmax(softcapped(z)), in float32.
    With weights also d(sum of weight * nats)/dz, in the dtype of z, and by the caps if they are
    two (AsymLogit, #1923).
    """
    logits_NV, tanh_NV, cap_NV = softcap_logits(z_NV, cap)
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
        by_cap_NV = grad_NV * (tanh_NV - z_NV.float() / cap_NV * slope_NV)
        # Sums over rows first: a sum over both dimensions at once would write out by_cap_NV.
        total_N = by_cap_NV.sum(dim=1)
        positive_N = torch.where(z_NV > 0, by_cap_NV, 0).sum(dim=1)
        by_sign_2N = torch.stack([positive_N, total_N - positive_N])
        grad_caps = (by_sign_2N * weight_N).sum(dim=1)
    return nll_N, (grad_NV * slope_NV * weight_N[:, None]).to(z_NV.dtype), grad_caps


# Logits of this many numbers exist at a time (64 MiB in float32): large enough for full speed.
MAX_LOGITS_PER_CHUNK = 2**24


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of softcapped cross-entropies; the logits exist for one chunk at a time.
    The gradient is computed together with the loss, while the chunk's logits are there, and is
    scaled by the incoming gradient in backward: one product of logits instead of two.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, cap: float | Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """Loss (scalar, float32) and the nats of each target (N, not differentiable)."""
        (target_N, weight_N, nll), head = rest, head_VD.to(x_ND.dtype)
        chunk = max(1, MAX_LOGITS_PER_CHUNK // len(head))
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


class MixerInputs(NamedTuple):
    """What makes nats of logits in the softmax's place, and what it goes by."""

    mixer: Any
    context_BTK: Tensor  # the tokens up to each input
    keep_BT: Tensor  # which targets are recorded


AdaptedModule = CastedLinear | Embedding | CausalSelfAttention | MLP  # those with an `adapter`


class GPT(nn.Module):
    """The language model: embedding, visits of blocks, norm, head, softcapped cross-entropy."""

    def __init__(self, cfg: Config, attention: AttentionBackend, dtype: torch.dtype):
        super().__init__()
        self.cfg, self.dtype, self.prepare, D = cfg, dtype, attention.prepare, cfg.model_dim
        self.tok_emb = Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(Block(cfg, i, attention) for i in range(cfg.num_layers))
        self.schedules = layer_schedules(cfg)
        self.schedule = self.schedules[-1]
        skips = (sum(call.skip is not None for call in self.schedule), D)
        self.skip_weights = nn.Parameter(torch.ones(skips))
        self.skip_gates = nn.Parameter(torch.zeros(skips)) if cfg.skip_gates else None
        self.lm_head = (
            None if cfg.tie_embeddings else CastedLinear(D, cfg.vocab_size, zero_init=True)
        )
        self.add_optional_modules()
        T, longest = cfg.train_seq_len, max(cfg.train_seq_len, cfg.score_seq_len)
        self.rotary = nn.Buffer(rotary_table(cfg, T), persistent=False)
        self.long_rotary = nn.Buffer(rotary_table(cfg, longest), persistent=False)
        self.run_block: Callable[..., Lanes] = run_block
        self.nll = softcapped_cross_entropy
        self.normalization_check: Callable[..., None] | None = (
            None  # sees what is scored, for an audit
        )
        # Adapters by visit, each with the matrix that it hangs on while the visit lasts.
        self.adapters: list[list[tuple[AdaptedModule, BatchedLoRA]]] = []
        self.init_weights_()

    def add_optional_modules(self) -> None:
        """The parts that knobs add; each is None or empty where its knob is off."""
        cfg = self.cfg
        hashes = [
            (2, cfg.bigram_vocab_size, cfg.bigram_dim),
            (3, cfg.trigram_vocab_size, cfg.trigram_dim),
        ]
        self.hashes = nn.ModuleList(HashEmbedding(cfg, *sizes) for sizes in hashes if sizes[1])
        self.smear = None if cfg.smear_gate == "none" else SmearGate(cfg)
        self.ve_layers = parse_int_list(cfg.ve_layers)
        self.ve_table = Embedding(cfg.vocab_size, cfg.ve_dim) if self.ve_layers else None
        kv_dim = cfg.num_kv_heads * cfg.head_dim
        self.ve_proj = CastedLinear(cfg.ve_dim, kv_dim) if self.ve_layers else None
        self.ve_scale = nn.Parameter(torch.tensor(0.1)) if self.ve_layers else None
        self.block_scalars = nn.ParameterDict(init_block_scalars(cfg))
        caps = torch.full((2,), cfg.logit_softcap)  # of positive and of negative logits
        self.caps = nn.Parameter(caps) if cfg.asym_logit_rescale else None

    @torch.no_grad()
    def init_weights_(self) -> None:
        """Draw the initial weights; output projections start at zero.

        INIT=default is PyTorch's uniform fan-in; orthogonal has orthogonal matrices where both
        sides are at least 64; orthogonal_scaled also divides the projections of hashed and value
        embeddings by sqrt(2 * NUM_LAYERS), as openai/parameter-golf#430 does.
        """
        cfg, table = self.cfg, self.tok_emb.weight
        if cfg.tie_embeddings:
            table.normal_(std=cfg.tied_embed_init_std)
        if cfg.embed_init == "overtone":
            u, s, v = torch.linalg.svd(table, full_matrices=False)
            table.copy_(u * (s[0] * torch.arange(1, len(s) + 1) ** -0.5) @ v)
        for module in (module for module in self.modules() if isinstance(module, CastedLinear)):
            if module.zero_init:
                module.weight.zero_()
            elif cfg.init != "default" and min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight)
        if self.ve_table is not None and self.ve_proj is not None:
            self.ve_table.weight.normal_(std=0.01)
            nn.init.orthogonal_(self.ve_proj.weight)
        if cfg.init == "orthogonal_scaled":
            projections = [m.proj for m in self.hashes if isinstance(m, HashEmbedding)]
            for projection in [*projections, *([self.ve_proj] if self.ve_proj else [])]:
                projection.weight.mul_((2 * cfg.num_layers) ** -0.5)

    @property
    def head(self) -> CastedLinear | Embedding:
        return self.tok_emb if self.lm_head is None else self.lm_head

    @property
    def head_VD(self) -> Tensor:
        return self.head.weight

    @property
    def cap(self) -> float | Tensor:
        return self.cfg.logit_softcap if self.caps is None else self.caps

    def compile_(self) -> None:
        """Replace block and loss by compiled ones; the weights and the formulas stay."""
        # Few shapes occur, but each with and without gradients, and for each kind of block.
        torch._dynamo.config.recompile_limit = 128
        # Late QAT must see the fp16 scales that are stored, not more exact ones.
        torch._inductor.config.emulate_precision_casts = self.cfg.late_qat_threshold > 0
        self.run_block = torch.compile(run_block, dynamic=False)
        self.nll = torch.compile(softcapped_cross_entropy, dynamic=False)

    def blend_skip(self, x_BTD: Tensor, saved_BTD: Tensor, row: int) -> Tensor:
        """Add a saved output to the stream, or blend the two by a gate a channel."""
        skip_BTD = self.skip_weights[row].to(x_BTD.dtype) * saved_BTD
        if self.skip_gates is None:
            return x_BTD + skip_BTD
        return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(self.skip_gates[row]).to(x_BTD.dtype))

    def set_adapters(self, adapters: list[list[tuple[AdaptedModule, BatchedLoRA]]]) -> None:
        """Take these adapters, by visit, in the place of those before."""
        for matrix, _ in itertools.chain(*self.adapters):
            matrix.adapter = None
        self.adapters = adapters

    def attach_adapters(self, index: int) -> None:
        """Hang the adapters of a visit on its matrices; without adapters nothing changes."""
        for matrix, adapter in self.adapters[index] if self.adapters else ():
            matrix.adapter = adapter

    def embed(self, ids_BT: Tensor) -> Tensor:
        """x0 (B, T, D): the sum of all embeddings, smeared and normalized.

        The lambda form of SmearGate acts before the norm (openai/parameter-golf#1667), the blend
        form after it.
        """
        hashed = (table(ids_BT, self.dtype) for table in self.hashes)
        x_BTD = sum(hashed, self.tok_emb(ids_BT).to(self.dtype))
        if self.smear is None:
            return rms_norm(x_BTD)
        if self.smear.before_norm:
            return rms_norm(self.smear(x_BTD, ids_BT))
        return self.smear(rms_norm(x_BTD), ids_BT)

    def block_inputs(
        self, ids_BT: Tensor, x0_BTD: Tensor, past: KVCache | None = None
    ) -> BlockInputs:
        """What the blocks read besides the stream."""
        T = ids_BT.size(1)
        length, capacity = (T, T) if past is None else (past.length, past.capacity)
        mask, shared_BTC = self.prepare(ids_BT, self.cfg.isolate_documents, length - T), None
        if self.ve_table is not None and self.ve_proj is not None and self.ve_scale is not None:
            scale, table_BTI = self.ve_scale.to(self.dtype), self.ve_table(ids_BT).to(self.dtype)
            shared_BTC = self.ve_proj(table_BTI) * scale
        # By the capacity, not the length so far: positions must not change their meaning.
        table_2PE = self.rotary if capacity <= self.cfg.train_seq_len else self.long_rotary
        assert capacity <= table_2PE.size(1), "longer than EVAL_SEQ_LEN"
        inputs = BlockInputs(x0_BTD, table_2PE[:, :length], mask, None, shared_BTC)
        if "value" in self.block_scalars:
            # Block 0 computes these values again: cheaper than a compiled graph of its own. They
            # are those of the model: adapters do not reach them (openai/parameter-golf#457).
            block: Any = self.blocks[0]
            n_BTD = block.norm(block.mix_x0(x0_BTD, inputs))
            adapter, block.attn.c_v.adapter = block.attn.c_v.adapter, None
            inputs = inputs._replace(first_v_BTC=block.attn.c_v(n_BTD))
            block.attn.c_v.adapter = adapter
        return inputs

    def block_scalars_of(self, layer: int) -> BlockScalars:
        """The rows of `mixing` that concern a block."""
        rows = {
            "value": layer - 1,
            "x0": layer,
            "write": layer,
            "carry": layer,
            "shared": self.ve_layers.index(layer) if layer in self.ve_layers else -1,
        }
        return BlockScalars(
            **{
                name: self.block_scalars[name][row]
                for name, row in rows.items()
                if name in self.block_scalars and row >= 0
            }
        )

    def forward(self, ids_BT: Tensor, past: KVCache | None = None) -> Tensor:
        """The normed stream before the head, (B, T, D), of tokens that go on from `past`."""
        lead_BT = ids_BT if past is None else past.append_tokens(ids_BT)
        x_BTD, side_BTD = self.embed(lead_BT)[:, -ids_BT.size(1) :], None
        saved: list[Tensor] = []
        inputs = self.block_inputs(ids_BT, x_BTD, past)
        form = self.cfg.parallel_residual
        for index, call in enumerate(self.schedule):
            if call.split_lanes and form != "merge":
                side_BTD = x_BTD
            if call.skip is not None:
                skip_BTD = saved.pop()
                x_BTD = self.blend_skip(x_BTD, skip_BTD, call.skip)
                if side_BTD is not None and form == "routed":
                    side_BTD = self.blend_skip(side_BTD, skip_BTD, call.skip)
            if call.split_lanes and form == "merge":  # both lanes start with the skip
                side_BTD = x_BTD
            block, mix = self.blocks[call.block], self.block_scalars_of(call.block)
            self.attach_adapters(index)
            if past is not None:
                inputs = inputs._replace(kv_cache=past.layers[index])
            x_BTD, side_BTD = self.run_block(block, (x_BTD, side_BTD), inputs, mix)
            if call.save:
                saved.append(x_BTD)
        if side_BTD is not None:
            share = (
                self.block_scalars["merge"].to(self.dtype) if "merge" in self.block_scalars else 0.5
            )
            x_BTD = share * x_BTD + (1 - share) * side_BTD
        return rms_norm(x_BTD)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Softcapped logits (B, T, V) in float32."""
        return softcap_logits(self(ids_BT) @ self.head_VD.to(self.dtype).T, self.cap)[0]

    def loss(self, ids_BT: Tensor, target_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """Sum of weight * nats over all targets, for training; weight None means the mean."""
        x_ND, target_N = self(ids_BT).flatten(0, 1), target_BT.flatten()
        weight_N = (
            torch.full_like(target_N, 1 / len(target_N), dtype=torch.float32)
            if weight_BT is None
            else weight_BT.flatten().float()
        )
        args = (x_ND, self.head_VD, self.cap, target_N, weight_N, self.nll)
        return ChunkedCrossEntropy.apply(*args)[0]  # type: ignore[no-untyped-call]

    def token_nll(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        first: int = 0,
        *,
        past: KVCache | None = None,
        mixed: MixerInputs | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Nats (B, T - first), float32, of the targets from position `first` on: differentiable
        ones of the softmax, and those to record, which a mixer may have made of the same logits.
        """
        x_BTD, adapter = self(ids_BT, past)[:, first:], self.head.adapter
        whole = [x_BTD, *(x[:, first:] for x in (target_BT, *(mixed[1:] if mixed else ())))]
        if adapter is None:  # only adapters tell rows apart
            whole = [x.flatten(0, 1)[None] for x in whole]
        head, pieces = self.head_VD.to(self.dtype), list[tuple[Tensor, Tensor]]()
        chunk = max(1, MAX_LOGITS_PER_CHUNK // (len(head) * len(whole[0])))
        for x, target, *more in zip(*(torch.split(w, chunk, dim=1) for w in whole), strict=True):
            z = x @ head.T
            z = (z if adapter is None else z + adapter(x)).flatten(0, 1)
            nll_N = scored_N = self.nll(z, target.flatten(), None, self.cap)[0]
            if mixed is not None:
                context, keep = (tensor.flatten(0, 1) for tensor in more)
                logits_NV, scored_N = softcap_logits(z[keep], self.cap)[0], nll_N.detach().clone()
                scored_N[keep] = mixed.mixer.nll(logits_NV, context[keep], target.flatten()[keep])
            if self.normalization_check is not None:
                self.normalization_check(
                    z, target.flatten(), scored_N, mixed and (mixed.mixer, *more)
                )
            pieces.append((nll_N.view(target.shape), scored_N.view(target.shape)))
        nll_BT, scored_BT = (
            torch.cat(both, dim=1).view(len(ids_BT), -1) for both in zip(*pieces, strict=True)
        )
        return nll_BT, scored_BT

    @torch.no_grad()
    def eval_nll(
        self, ids_BT: Tensor, target_BT: Tensor, first: int = 0, mixed: MixerInputs | None = None
    ) -> Tensor:
        """The nats to record that `nats` returns."""
        return self.token_nll(ids_BT, target_BT, first, mixed=mixed)[1]


class ParamRole(NamedTuple):
    """What a parameter is: its optimizer group and the group of tensors it is quantised with."""

    optim_group: str  # token, head, matrix, scalar or cap
    quant_group: str  # embed, attn, mlp, table, gate or control


def role_of(name: str, module: nn.Module) -> ParamRole:
    """The role of a parameter by its name and the module that owns it."""
    path = name.rpartition(".")[0]
    if isinstance(module, nn.Embedding):
        return ParamRole("token", "embed" if path == "tok_emb" else "table")
    if isinstance(module, CastedLinear):
        # The projections of hashed and value embeddings are quantized like attention matrices.
        group = "mlp" if ".mlp." in path else "attn"
        return ParamRole("head", "embed") if path == "lm_head" else ParamRole("matrix", group)
    if name == "caps":
        return ParamRole("cap", "control")
    return ParamRole("scalar", "gate" if isinstance(module, AttnOutputGate) else "control")


def parameter_roles(model: nn.Module) -> dict[str, ParamRole]:
    """The role of every parameter by name."""
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    assert not frozen, f"{frozen} would not be trained"
    return {
        name: role_of(name, model.get_submodule(name.rpartition(".")[0]))
        for name, _ in model.named_parameters()
    }


def build_model(run: Run) -> GPT:
    """A freshly initialised model on the run's device, compiled if COMPILE."""
    cfg, attention = run.cfg, choose_attention_backend(run.cfg, run.device, run.dtype)
    if run.device.type == "cuda" and attention.name not in ("fa2", "fa3", cfg.attention):
        run.log("warning", text=f"no FlashAttention for this: {attention.name}, exact but slower")
    torch.manual_seed(cfg.seed)  # on the CPU first: the same weights on every device
    model = GPT(cfg, attention, run.dtype).to(run.device)
    if cfg.compile and (reason := compile_unavailable_reason(run.device)):
        run.log("warning", text=f"compilation is off: {reason}; results stay, speed suffers")
    elif cfg.compile:
        model.compile_()
    return model


def compile_unavailable_reason(device: torch.device) -> str:
    """What torch.compile lacks on this machine, or an empty string."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    found = os.access("/usr/bin/g++", os.X_OK) or shutil.which("g++") or shutil.which("clang++")
    return "" if found else "no C++ compiler (g++) is installed"


def flops_per_token(cfg: Config) -> tuple[int, int]:
    """Floating point operations a token, forward and backward: matrices, and causal attention."""
    D, kv_dim, visits = (
        cfg.model_dim,
        cfg.num_kv_heads * cfg.head_dim,
        len(layer_schedules(cfg)[-1]),
    )
    matrices = visits * 2 * D * (D + kv_dim + cfg.mlp_dim) + cfg.vocab_size * D
    return 6 * matrices, 6 * visits * D * cfg.train_seq_len


def format_schedule(schedule: Sequence[LayerCall]) -> str:
    """Layer calls in order: 3> saves for a skip, 5(0) uses skip row 0, |8 splits into two lanes."""
    skips = ("" if call.skip is None else f"({call.skip})" for call in schedule)
    return " ".join(
        f"{'|' * call.split_lanes}{call.block}{skip}{'>' * call.save}"
        for call, skip in zip(schedule, skips, strict=True)
    )


# --- 5. Optimization -----------------------------------------------------------------------------
# Muon for the matrices of the blocks, AdamW for everything else. Schedules are functions of
# progress in [0, 1], so that one definition serves a limit in seconds and a limit in steps.

# Largest slope at 0; 5 steps take singular values to 0.7 to 1.2; kellerjordan.github.io/posts/muon
NS_CLASSIC = (3.4445, -4.7750, 2.0315)
# Polar Express (arXiv:2505.16932): the best cubic-quintic step for what the last one left.
NS_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz_coefficients(kind: str, num_steps: int) -> list[tuple[float, float, float]]:
    """The polynomial of each iteration: one for all, or Polar Express' own for each."""
    return list(NS_POLAR_EXPRESS[:num_steps]) if kind == "polar" else [NS_CLASSIC] * num_steps


def orthogonalize(
    g_LOI: Tensor, coefficients: Sequence[tuple[float, float, float]], dtype: torch.dtype
) -> Tensor:
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
        self.buffers = [
            torch.zeros(share * world_size, *stack[0].shape, device=stack[0].device)
            for share, stack in zip(self.shares, self.stacks, strict=True)
        ]
        self.coefficients = newton_schulz_coefficients(
            cfg.muon_coefficients, cfg.muon_backend_steps
        )
        self.pending: list[tuple[Tensor, Any]] = []

    def local_shard(self, stack_LOI: Tensor) -> Tensor:
        """This rank's share of a padded stack."""
        return stack_LOI.chunk(self.run.world_size)[self.run.rank]

    def start_reduce(self) -> None:
        """Begin to average the gradients over the ranks, each to the rank that will use it."""
        for stack, buffer in zip(self.stacks, self.buffers, strict=True):
            grad_LOI, work = torch.stack([grad_or_zeros(param) for param in stack]), None
            if self.run.world_size > 1:
                padding = (0, 0, 0, 0, 0, len(buffer) - len(stack))
                padded_LOI = F.pad(grad_LOI, padding).div_(self.run.world_size)
                grad_LOI = torch.empty_like(self.local_shard(padded_LOI))
                work = start_reduce_scatter(grad_LOI, padded_LOI)
            self.pending.append((grad_LOI, work))

    def reduced_gradients(self) -> list[Tensor]:
        """The averaged gradients of this rank's shares."""
        self.pending = [(wait_for(*pair), None) for pair in self.pending]
        return [grad_LOI for grad_LOI, _ in self.pending]

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Update every parameter in place; `start_reduce` came before."""
        updates = []
        for pair, buffer in zip(self.pending, self.buffers, strict=True):
            grad_LOI, buffer_LOI = wait_for(*pair), self.local_shard(buffer)
            buffer_LOI.mul_(momentum).add_(grad_LOI)
            update_LOI = grad_LOI.add_(buffer_LOI, alpha=momentum)  # Nesterov
            if self.run.cfg.muon_row_norm:  # MuonEq-R (arXiv:2603.28254): output units count alike
                update_LOI = F.normalize(update_LOI, dim=-1, eps=1e-7)
            update_LOI = orthogonalize(update_LOI, self.coefficients, self.run.dtype)
            updates.append(self.gather(update_LOI))
        for stack, pair in zip(self.stacks, updates, strict=True):
            update_LOI, (rows, columns) = wait_for(*pair)[: len(stack)], stack[0].shape
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
        return whole, start_all_gather(whole, own_LOI.contiguous())

    def gather_buffers(self) -> None:
        """Complete the momentum on every rank, for a checkpoint."""
        for buffer in self.buffers:
            buffer.copy_(wait_for(*self.gather(self.local_shard(buffer))))


def start_reduce_scatter(output: Tensor, tensor: Tensor) -> Any:
    """Start to sum `tensor` over the ranks, each rank's part into its `output`; returns the work.

    torch 2.13 renamed this collective and the next one; earlier versions have the old names only.
    """
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return function(output, tensor, async_op=True)


def start_all_gather(output: Tensor, tensor: Tensor) -> Any:
    """Start to concatenate all ranks' `tensor` into `output`; returns the work to wait for."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(output, tensor, async_op=True)


def wait_for(tensor: Tensor, work: Any) -> Tensor:
    """The tensor, once the communication that fills it is done; work None is none."""
    if work is not None:
        work.wait()
    return tensor


def grad_or_zeros(param: Tensor) -> Tensor:
    """The gradient of a parameter; 0 if the step did not use it."""
    return torch.zeros_like(param) if param.grad is None else param.grad


def all_reduce_gradients(run: Run, first: Tensor, params: Sequence[Tensor]) -> Tensor:
    """`first` and all gradients, summed over the ranks as one vector, whose views they become."""
    flat = run.all_reduce_sum(
        torch.cat([first.view(1), *(grad_or_zeros(param).flatten() for param in params)])
    )
    pieces = torch.split(flat[1:], [param.numel() for param in params])
    for param, piece in zip(params, pieces, strict=True):
        param.grad = piece.view_as(param)
    return flat


def make_optimizers(model: GPT, run: Run) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW and Muon over a partition of the model's parameters."""
    cfg, roles = run.cfg, parameter_roles(model)
    members: dict[str, list[nn.Parameter]] = {}
    for name, role in roles.items():
        members.setdefault(role.optim_group, []).append(model.get_parameter(name))
    rates = {
        "token": (cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr, cfg.embed_wd),
        "head": (cfg.head_lr, cfg.embed_wd),
        "scalar": (cfg.scalar_lr, cfg.adam_wd),
        "cap": (cfg.scalar_lr, 0.0),
    }
    groups = [
        {"params": members[group], "base_lr": lr, "weight_decay": decay}
        for group, (lr, decay) in rates.items()
        if group in members
    ]
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


class WeightAverager:
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
        collects = {
            "swa": scale < cfg.swa_start_lr and step % cfg.swa_every == 0,
            "tail": progress > 1 - cfg.tail_frac,
        }
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
        limit_s = cfg.train_seconds or math.inf
        return min(1.0, max(self.step / cfg.iterations, self.train_s / limit_s))

    def is_over(self, cfg: Config, extra_s: float = 0.0) -> bool:
        """Whether the steps are done, or one more, after `extra_s`, would pass the clock."""
        end_s = self.train_s + extra_s + 1.2 * self.train_s / max(1, self.step)  # vary by a fifth
        return self.step >= cfg.iterations or 0 < cfg.train_seconds < end_s

    def throughput(self) -> dict[str, float]:
        """Tokens and seconds so far, as they are logged."""
        return {
            "step_avg_ms": round(1e3 * self.train_s / max(1, self.step), 3),
            "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
            "train_s": round(self.train_s, 3),
            "tokens": self.tokens,
        }


class TrainStage(NamedTuple):
    """What may change during training, each combination with graphs of its own."""

    seq_len: int
    batch_tokens: int
    loops: int  # extra passes through the looped blocks
    qat: bool  # whether the forward pass sees quantised weights


def train_stage_at(cfg: Config, progress: float, scale: float) -> TrainStage:
    """The phase at `progress` in [0, 1], with learning rate multiplier `scale`."""
    stages = (
        (cfg.train_seq_schedule, cfg.train_seq_len),
        (cfg.train_batch_schedule, cfg.train_batch_tokens),
    )
    seq_len, batch = (
        next((v for v, until in parse_schedule(text) if progress < until), last)
        for text, last in stages
    )
    shares = [float(share) for share in cfg.enable_looping_at.split(",")] * cfg.num_loops
    return TrainStage(
        seq_len,
        batch,
        sum(progress >= share for share in shares[: cfg.num_loops]),
        scale < cfg.late_qat_threshold,
    )


def train_stages(cfg: Config) -> list[TrainStage]:
    """Every phase that training may come through, in order."""
    texts = (cfg.train_seq_schedule, cfg.train_batch_schedule)
    cuts = {until for text in texts for _, until in parse_schedule(text)}
    cuts |= {0.0, *map(float, cfg.enable_looping_at.split(","))}
    scales = (1.0, 0.0) if cfg.late_qat_threshold else (1.0,)
    return list(dict.fromkeys(train_stage_at(cfg, cut, s) for cut in sorted(cuts) for s in scales))


def num_micro_batches(rows: int, seq_len: int, max_tokens: int) -> int:
    """The smallest number of equal micro-batches of whole rows with at most `max_tokens` each."""
    max_rows = max(1, max_tokens // seq_len)
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= max_rows)


WARM_UP_MEAN_LEN = 64  # tokens; see Trainer.warm_up_capacities


def with_num_documents(window_BT: Tensor, num_documents: int) -> Tensor:
    """A copy of the windows (rows, T + 1) whose inputs hold `num_documents` >= rows documents.

    Every row begins one; evenly spaced BOS tokens begin the others.
    """
    window_BT = window_BT.masked_fill(window_BT == BOS_ID, BOS_ID + 1)
    inner_N, count = window_BT[:, 1:-1].flatten(), num_documents - len(window_BT)
    inner_N[torch.arange(count) * len(inner_N) // max(1, count)] = BOS_ID
    window_BT[:, 1:-1] = inner_N.view(len(window_BT), -1)
    return window_BT


class Trainer:
    """Model, optimizers and average, and what one step does to them."""

    def __init__(self, run: Run, model: GPT):
        self.run, self.model, self.params = run, model, list(model.parameters())
        self.adam, self.muon = make_optimizers(model, run)
        self.replicated = [p for group in self.adam.param_groups for p in group["params"]]
        self.averager = WeightAverager(run.cfg, self.params)
        self.progress, self.current_stage = Progress(), train_stages(run.cfg)[0]
        self.run_token = os.urandom(16).hex()  # marks the checkpoints that this run has written
        self.enter_stage(self.current_stage)

    def lr_scale(self) -> float:
        """Learning rate multiplier of the next step."""
        cfg, done = self.run.cfg, self.progress.fraction(self.run.cfg)
        by_pace = cfg.warmdown_iters * done / max(1, self.progress.step)  # measured so far
        warmdown = by_pace if cfg.warmdown_iters else cfg.warmdown_frac
        return lr_scale(done, warmdown_frac=warmdown, floor=cfg.min_lr)

    def next_stage(self) -> TrainStage:
        """Phase of the next step."""
        return train_stage_at(self.run.cfg, self.progress.fraction(self.run.cfg), self.lr_scale())

    def enter_stage(self, phase: TrainStage) -> None:
        """Let the model run with the phase's loops, and on quantised weights if it is time."""
        cfg, model = self.run.cfg, self.model
        model.schedule = model.schedules[phase.loops]  # evaluation in between has set another
        if phase.qat != self.current_stage.qat:
            for name, role in parameter_roles(model).items():
                module = model.get_submodule(name.rpartition(".")[0])
                if isinstance(module, CastedLinear) and role.quant_group in ("attn", "mlp"):
                    bits = cfg.bits[role.quant_group] if phase.qat else PLAIN_BITS
                    module.qat_bits = 0 if bits == PLAIN_BITS else bits
        self.current_stage = phase

    def accumulate_gradients(self, window_BT: Tensor) -> Tensor:
        """Gradient of the mean loss over this rank's windows (rows, T + 1); returns that loss."""
        rows, T = len(window_BT), window_BT.size(1) - 1
        num_micro = num_micro_batches(rows, T, self.run.cfg.micro_batch_tokens)
        total = torch.zeros((), device=self.run.device)
        for rows_BT in window_BT.to(self.run.device, non_blocking=True).chunk(num_micro):
            loss = self.model.loss(rows_BT[:, :-1], rows_BT[:, 1:]) / num_micro
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def clip_gradients(self) -> None:
        """Bound the norm of the whole averaged gradient, whose matrices lie on all ranks."""
        own, limit = self.muon.reduced_gradients(), self.run.cfg.grad_clip_norm
        grads = [param.grad for param in self.replicated if param.grad is not None]
        mine, common = (
            torch.stack([g.square().sum() for g in group]).sum() for group in (own, grads)
        )
        norm = (self.run.all_reduce_sum(mine) + common).sqrt()
        torch._foreach_mul_([*own, *grads], (limit / (norm + 1e-6)).clamp(max=1.0))

    def step(self, window_BT: Tensor) -> Tensor:
        """One optimizer step on this rank's share of a batch; the loss over all ranks."""
        cfg, scale = self.run.cfg, self.lr_scale()
        loss = self.accumulate_gradients(window_BT)
        self.muon.start_reduce()
        if self.run.world_size > 1:  # the average of the loss and of AdamW's gradients
            loss = all_reduce_gradients(self.run, loss, self.replicated).div_(self.run.world_size)[
                0
            ]
        if cfg.grad_clip_norm:
            self.clip_gradients()
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.adam.step()
        (step, train_s, tokens), done = self.progress, self.progress.fraction(cfg)
        self.muon.step(cfg.matrix_lr * scale, momentum_at(step, done, cfg), cfg.muon_wd)
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
            **{
                f"muon/{i}": buffer[: len(stack)]
                for i, (buffer, stack) in enumerate(  # not what pads it
                    zip(self.muon.buffers, self.muon.stacks, strict=True)
                )
            },
            **{f"average/{i}": average for i, average in enumerate(self.averager.average)},
            "average/count": self.averager.count,
        }

    def load(self, saved: Mapping[str, Tensor], progress: Progress) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.progress = progress

    def warm_up(self) -> None:
        """Run WARMUP_STEPS of each phase on random tokens to compile all; undo their effect."""
        cfg, generator = self.run.cfg, torch.Generator().manual_seed(0)
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        for phase in train_stages(cfg) if cfg.warmup_steps else []:
            rows = phase.batch_tokens // phase.seq_len // self.run.world_size
            self.enter_stage(phase)
            for number in range(cfg.warmup_steps):
                self.run.check_signal()
                shape = (rows, phase.seq_len + 1)
                window_BT = torch.randint(cfg.vocab_size, shape, generator=generator)
                self.step(window_BT)
                uses_cuts = cfg.isolate_documents and self.model.prepare is flash_cu_seqlens
                if number == 0 and uses_cuts:
                    self.warm_up_capacities(window_BT)
        self.load(before, Progress())
        self.run.synchronize()

    def warm_up_capacities(self, window_BT: Tensor) -> None:
        """Run a step for each length of `cu_seqlens` that the training data can need.

        That is down to a mean document length of WARM_UP_MEAN_LEN tokens in a micro-batch.
        """
        (rows, T), limit = window_BT[:, 1:].shape, self.run.cfg.micro_batch_tokens
        num_micro = num_micro_batches(rows, T, limit)
        rows //= num_micro
        max_documents = max(rows, rows * T // WARM_UP_MEAN_LEN - 1)
        for capacity in cu_seqlens_capacities(rows * T):
            num_documents = min(capacity - 1, max_documents)
            if num_documents >= rows:
                self.run.check_signal()
                micro_BT = with_num_documents(window_BT[:rows], num_documents)
                self.step(micro_BT.repeat(num_micro, 1))
            if capacity > max_documents:
                break


# Knobs that may change between a run and its continuation.
RESUME_IGNORED_KNOBS = {
    "mode",
    "recipe",
    "run_dir",
    "resume",
    "checkpoint_every_seconds",
    "compile",
    "attention",
    "target_val_bpb",
    "train_log_every",
    "val_loss_every",
    "artifact",
    "submission_name",
    "run_id",
    "submission_author",
    "artifact_budget_bytes",
    "eval_max_seconds",
    "data_path",
    "tokenizer_path",
}


CHECKPOINT_FILES = ("state.safetensors", "meta.json")  # in the order of their removal
MAX_META_BYTES = 2**20
MAX_DURATION_S = 1e9  # 32 years
# What reading a damaged file can raise; RecursionError is a RuntimeError, InputError a ValueError.
READ_ERRORS = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError,
)  # fmt: skip


def save_checkpoint(trainer: Trainer) -> None:
    """Rank 0: write the state of training as the folder RUN_DIR/checkpoint/step_*.

    The run's older checkpoints are removed afterwards; what others put there stays.
    """
    run, progress = trainer.run, trainer.progress
    if not run.is_main:
        return
    final = checkpoint_root(run) / f"step_{progress.step:09d}"
    if final.exists() and run_token_of(final) == trainer.run_token:
        return  # saved before the validation that a signal has interrupted
    require(not os.path.lexists(final), f"{final} is not of this run; remove it to go on")
    temporary = final.with_name(f"{final.name}.{trainer.run_token}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    payload = safetensors.torch.save(
        {name: tensor.cpu().contiguous() for name, tensor in trainer.tensors().items()}
    )
    meta = {
        "run_token": trainer.run_token,
        "progress": progress,
        "ledger": run.ledger,
        "config": dataclasses.asdict(run.cfg),
        "state_sha256": hashlib.sha256(payload).hexdigest(),
    }
    write_atomic(temporary / "state.safetensors", payload)
    write_atomic(temporary / "meta.json", json.dumps(meta, indent=1).encode())
    os.replace(temporary, final)
    sync_folder(final.parent)
    for folder in checkpoint_folders(run):
        if folder != final and run_token_of(folder) == trainer.run_token:
            remove_checkpoint(folder)
    remove_half_written(run)
    run.log("checkpoint", step=progress.step, train_s=round(progress.train_s, 3), path=str(final))


def load_checkpoint(trainer: Trainer) -> None:
    """Continue from the newest checkpoint in RUN_DIR if there is one; with RESUME=0 remove it."""
    run = trainer.run

    def read_newest() -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        folders = checkpoint_folders(run)
        if run.cfg.resume:
            return read_checkpoint(folders[-1], trainer) if folders else None
        discard_checkpoints(run)
        return None

    if (checkpoint := run.run_on_rank0(read_newest)) is not None:
        meta, state = checkpoint
        trainer.load(state, Progress(*meta["progress"]))
        trainer.run_token = meta["run_token"]
        run.ledger.update(meta["ledger"])
        run.log("resume", step=trainer.progress.step, train_s=round(trainer.progress.train_s, 3))


def checkpoint_root(run: Run) -> Path:
    """The folder of the run's checkpoints; InputError if it is a symbolic link."""
    root = run.directory / "checkpoint"
    require(not root.is_symlink(), f"{root} is a symbolic link; remove it or set another RUN_DIR")
    return root


def checkpoint_folders(run: Run) -> list[Path]:
    """The checkpoints in RUN_DIR by their names, oldest first."""
    folders = [
        path
        for path in checkpoint_root(run).glob("step_*")
        if re.fullmatch("step_[0-9]{9,}", path.name)
    ]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step_")))


def run_token_of(folder: Path) -> str:
    """The random token of the run that wrote a checkpoint; empty if there is none."""
    try:
        token = read_meta(folder)["run_token"]
    except READ_ERRORS:
        return ""
    return token if isinstance(token, str) else ""


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint's two files and its folder, which stays if it holds anything else."""
    with contextlib.suppress(OSError):
        for name in CHECKPOINT_FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def remove_half_written(run: Run) -> None:
    """Remove what killed runs left half-written; the form of its name is this script's own."""
    for path in checkpoint_root(run).glob("step_*.tmp"):
        if re.fullmatch(r"step_[0-9]{9,}\.[0-9a-f]{32}\.tmp", path.name):
            shutil.rmtree(path, ignore_errors=True)  # which does not follow symbolic links


def discard_checkpoints(run: Run) -> None:
    """Remove all checkpoints in RUN_DIR; InputError if a folder holds anything else."""
    folders = checkpoint_folders(run)
    for folder in folders:
        is_checkpoint = (
            folder.is_dir()
            and not folder.is_symlink()
            and {path.name for path in folder.iterdir()} <= {*CHECKPOINT_FILES}
        )
        require(
            is_checkpoint,
            f"RESUME=0 removes checkpoints, and {folder} is not one; move it away",
        )
    for folder in folders:
        remove_checkpoint(folder)
    remove_half_written(run)


def read_checkpoint(folder: Path, trainer: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a checkpoint, all of them checked against the trainer's.

    Raises InputError if it is damaged or of another run; nothing is changed before.
    """
    remedy = f"remove {folder} to go on without it, or set RESUME=0 or another RUN_ID"
    try:
        meta = read_meta(folder)
        config = meta["config"]
        require(isinstance(config, dict), "config in meta.json is not an object")
    except READ_ERRORS as error:
        raise InputError(f"{folder} is damaged ({error!s:.300}); {remedy}") from error
    check_same_run(config, trainer.run.cfg, folder)
    try:
        check_meta(meta, trainer)
        step = meta["progress"][0]
        require(folder.name == f"step_{step:09d}", f"meta.json is of step {step}")
        state = read_state(folder, meta["state_sha256"], trainer.tensors())
        check_counters(state, step)
    except READ_ERRORS as error:
        raise InputError(f"{folder} is damaged ({error!s:.300}); {remedy}") from error
    return meta, state


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Content of a file that is neither a link nor a device and has at most `max_bytes`."""
    is_regular = path.is_file() and not path.is_symlink() and not path.parent.is_symlink()
    require(is_regular, f"{path.name} is missing or not a regular file")
    size = path.stat().st_size
    require(size <= max_bytes, f"{path.name} has {size} bytes, more than {max_bytes}")
    return path.read_bytes()


def read_meta(folder: Path) -> dict[str, Any]:
    """The object in a checkpoint's meta.json, not checked any further."""
    meta = json.loads(read_regular_file(folder / "meta.json", MAX_META_BYTES))
    require(isinstance(meta, dict), "meta.json is not an object")
    return meta


def check_meta(meta: Mapping[str, Any], trainer: Trainer) -> None:
    """Raise InputError unless the entries of meta.json have the right types and ranges."""
    run, progress, ledger = trainer.run, meta["progress"], meta["ledger"]
    batches = [stage.batch_tokens for stage in train_stages(run.cfg)]
    require(isinstance(progress, list) and len(progress) == 3, "progress is not three numbers")
    step, train_s, tokens = progress
    require(
        type(step) is int and 1 <= step <= run.cfg.iterations,
        f"progress: step {step!r:.40} is not in [1, {run.cfg.iterations}]",
    )
    require(is_duration(train_s), f"progress: {train_s!r:.40} is not a number of seconds")
    min_tokens, max_tokens = step * min(batches), step * max(batches)
    require(
        type(tokens) is int and min_tokens <= tokens <= max_tokens,
        f"progress: tokens {tokens!r:.40} are not in [{min_tokens}, {max_tokens}]",
    )
    require(
        isinstance(ledger, dict)
        and ledger.keys() == run.ledger.keys()
        and all(map(is_duration, ledger.values())),
        f"ledger does not hold the seconds of {', '.join(run.ledger)}",
    )
    token = meta["run_token"]
    is_token = isinstance(token, str) and re.fullmatch("[0-9a-f]{32}", token)
    require(is_token, "run_token is not 32 hexadecimal digits")


def is_duration(value: Any) -> bool:
    """Whether `value` is a float of seconds that a run can have taken."""
    return type(value) is float and 0 <= value <= MAX_DURATION_S


def read_state(folder: Path, sha256: Any, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of state.safetensors, which have the names, shapes and dtypes of `expected`."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    payload = read_regular_file(folder / "state.safetensors", size + MAX_META_BYTES)
    matches = hashlib.sha256(payload).hexdigest() == sha256
    require(matches, "checksum of state.safetensors does not match")
    state = safetensors.torch.load(payload)
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    require(not missing, f"state.safetensors lacks {missing[:3]}")
    require(not extra, f"state.safetensors has unknown tensors {extra[:3]}")
    for name, like in expected.items():
        tensor = state[name]
        require(
            tensor.shape == like.shape and tensor.dtype == like.dtype,
            f"{name} is {describe_tensor(tensor)} instead of {describe_tensor(like)}",
        )
        is_finite = not name.startswith("model/") or bool(tensor.isfinite().all())
        require(is_finite, f"{name} has values that are not finite")
    return state


def describe_tensor(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_counters(state: Mapping[str, Tensor], step: int) -> None:
    """Raise InputError unless the counters among the tensors are possible after `step` steps."""
    for name, tensor in state.items():
        if name.startswith("adam/") and name.endswith("/step"):
            require(tensor.item() == step, f"{name} is {tensor.item():g} after {step} steps")
    count = state["average/count"].item()
    require(0 <= count <= step, f"average/count is {count} after {step} steps")


def check_same_run(saved: Mapping[str, Any], cfg: Config, path: Path) -> None:
    """Raise InputError if `path` was made with knobs that make it another run than `cfg`'s."""
    now = dataclasses.asdict(cfg)
    different = [
        f"{name.upper()}={now[name]} (there: {saved.get(name)!r:.80})"
        for name in sorted(now.keys() - RESUME_IGNORED_KNOBS)
        if now[name] != saved.get(name)
    ]
    require(
        not different,
        f"{path} is of another run: {', '.join(different)}; set these knobs as "
        "they were, remove it, or set another RUN_ID",
    )


def sync_step_state(
    trainer: Trainer, loss: float, elapsed_s: float, unsaved_s: float
) -> list[bool]:
    """Add the slowest rank's elapsed seconds to the clock; agree what any rank has found:
    a checkpoint is due, a signal has come, the loss is bad. The clock drives the learning rate, so
    that ranks with clocks of their own would drift apart.
    """
    run, progress = trainer.run, trainer.progress
    due = 0 < run.cfg.checkpoint_every_seconds <= unsaved_s
    votes = [progress.train_s + elapsed_s, due, run.signal_received, not math.isfinite(loss)]
    train_s, *flags = run.all_reduce_max(
        torch.tensor(votes, dtype=torch.float64, device=run.device)
    ).tolist()
    trainer.progress = progress._replace(train_s=train_s)
    return list(map(bool, flags))


def train_loop(trainer: Trainer, loader: BatchLoader, validate: Callable[[], Score]) -> None:
    """Step until the budget of steps or seconds is used, logging, validating and saving."""
    run, cfg = trainer.run, trainer.run.cfg
    resumed_step, last_good = trainer.progress.step, float("nan")
    clock_s = saved_s = time.perf_counter()
    save_s = 0.0  # how long the last checkpoint took, on the slowest rank
    while not trainer.progress.is_over(cfg):
        scale = trainer.lr_scale()
        trainer.enter_stage(phase := trainer.next_stage())
        loss = trainer.step(loader.batch(trainer.progress.tokens, phase)).item()
        now_s = time.perf_counter()
        due, interrupted, bad_loss = sync_step_state(
            trainer, loss, now_s - clock_s, now_s - saved_s
        )
        clock_s, step = now_s, trainer.progress.step
        over = trainer.progress.is_over(cfg)
        saves = (due and not trainer.progress.is_over(cfg, save_s)) or interrupted or over
        bad_update = saves and not all(bool(param.isfinite().all()) for param in trainer.params)
        if bad_loss or bad_update:
            what = f"the loss is {loss}" if bad_loss else "a weight is not finite"
            raise RunFailed(
                f"{what} at step {step} (last finite: {last_good:.4f} at step "
                f"{step - 1}); the checkpoint before it is kept; start again with "
                "lower learning rates and another RUN_ID"
            )
        last_good = loss
        if step % cfg.train_log_every == 0 or step <= resumed_step + 5 or over:
            run.log(
                "step",
                step=step,
                steps=cfg.iterations,
                train_loss=round(loss, 5),
                lr_scale=round(scale, 5),
                **trainer.progress.throughput(),
            )
        if saves:
            train_s = trainer.progress.train_s
            trainer.muon.gather_buffers()
            run.run_on_rank0(functools.partial(save_checkpoint, trainer))
            saved_s = time.perf_counter()
            if not over:  # saving is on the clock
                sync_step_state(trainer, loss, saved_s - clock_s, 0.0)
                clock_s, save_s = saved_s, trainer.progress.train_s - train_s
        if interrupted and not over:
            raise Interrupted(f"stopped by a signal after step {step}; start again to go on")
        if cfg.val_loss_every and step % cfg.val_loss_every == 0 and not over:
            validate_and_log(trainer, validate)
            clock_s = time.perf_counter()  # validation is not on the training clock


def validate_and_log(trainer: Trainer, validate: Callable[[], Score]) -> None:
    """Score the weights as they are; a signal meanwhile loses no step."""
    run, step = trainer.run, trainer.progress.step
    trainer.enter_stage(trainer.current_stage._replace(qat=False))
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
    # Lays out the epoch and reads the first batch before the clock runs.
    loader.batch(trainer.progress.tokens, trainer.next_stage())
    train_loop(trainer, loader, validate)
    progress, averaging = trainer.progress, cfg.averaging
    run.ledger["training"] = progress.train_s
    run.scores["train_end"] = {
        "steps": progress.step,
        **progress.throughput(),
        "peak_memory_mib": round(peak_memory_mib(run.device), 1),
    }
    run.log("train_end", **run.scores["train_end"])
    if averaging in ("swa", "tail") and not trainer.averager.count:
        run.log("warning", text=f"{averaging} averaged no weights; the last ones are exported")
    if averaging == "ema" and (share := cfg.ema_decay**progress.step) > 0.01:
        run.log("warning", text=f"{share:.1%} of the EMA is still the initial weights")
    trainer.averager.export_()
    trainer.enter_stage(trainer.current_stage._replace(qat=False))
    return trainer


# --- 7. Quantization -----------------------------------------------------------------------------
# Every matrix becomes integer codes, a step a row and, if steps are solved, a factor a column. What
# an error costs is measured once (Curvature); GPTQ then rounds column after column and lets later
# columns make up for earlier ones. parameter_roles decides which knobs a tensor listens to.

PLAIN_BITS, MAX_CODE = 16, 1023  # bits of what is not coded; largest magnitude that has a code
# Below the one fp16 loses precision and then is 0, above the other it is infinite.
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)
SCALE_RANGE = 240  # coded steps are 2^(n / 8), |n| <= 240
SCALES = np.array([2 ** (n / 8) for n in range(-SCALE_RANGE, SCALE_RANGE + 1)], np.float32)


class Quantized(NamedTuple):
    """A tensor as it is stored: integer codes with steps, or plain fp16 (bits 16)."""

    bits: int
    values: np.ndarray  # integer codes, or float16 values; shaped as the tensor
    scales: np.ndarray | None  # step of each row, float16 or powers of 2^(1/8); None if bits is 16
    columns: np.ndarray | None = None  # factor of the step for each column, stored alike
    trellis: bool = False  # codes count half-steps of a trellis

    def dequantized(self) -> Tensor:
        """The float32 tensor that a reader of the artifact gets."""
        if self.scales is None:
            return torch.tensor(self.values).float()
        levels = trellis_levels(self.values) / 2 if self.trellis else self.values
        steps_OI = self.scales[:, None] * np.float32(1)
        steps_OI = steps_OI if self.columns is None else steps_OI * self.columns
        return torch.tensor(levels.reshape(len(steps_OI), -1) * steps_OI).float().view(levels.shape)


def row_scales(weight_OI: Tensor, qmax: int) -> Tensor:
    """Step size of each row in fp16, as it is stored: the largest weight becomes qmax."""
    return (weight_OI.abs().amax(dim=1) / qmax).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()


def quantize_rows(weight: Tensor, bits: int) -> Quantized:
    """Round to nearest, symmetrically, with a scale a row (a vector: one)."""
    qmax, rows = 2 ** (bits - 1) - 1, weight.detach().float().cpu()
    rows_OI = rows.flatten(1) if rows.dim() > 1 else rows[None]
    scale_O = row_scales(rows_OI, qmax)  # in fp16, which is what a reader will multiply by
    codes_OI = (rows_OI / scale_O.float()[:, None]).round().clamp(-qmax, qmax)
    return Quantized(bits, codes_OI.to(torch.int8).numpy().reshape(rows.shape), scale_O.numpy())


class KroneckerHessian(NamedTuple):
    """What errors in a matrix cost: the loss grows by about half of the sum over rows o of
    outputs[o] * e_o inputs e_o^T, e_o the row's error (the Kronecker form of arXiv:1503.05671).
    """

    inputs_II: Tensor
    outputs_O: Tensor


class CalibrationStats:
    """Sums over calibration tokens, by matrix and kind, of second moments in one forward pass:
    of a matrix's inputs and of the loss gradient at its outputs; of a table's gradient, and how
    often each of its rows is read. The visits of a looped block add up.
    """

    def __init__(self, model: GPT):
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.model, self.num_tokens = model, 0

    def add(self, name: str, kind: str, x: Tensor) -> None:
        """Of outputs add squares, of inputs and gradients the products of columns, reads by row."""
        if kind == "reads":
            rows = len(self.model.get_parameter(name))
            value = torch.bincount(x.flatten(), minlength=rows).float()
        else:
            x_NI = x.detach().flatten(0, -2).float()
            value = x_NI.square().sum(dim=0) if kind == "outputs" else x_NI.T @ x_NI
        self.sums[name, kind] = self.sums.get((name, kind), 0) + value

    def record_module(self, name: str, module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        kinds = ("reads", "gradients") if isinstance(module, Embedding) else ("inputs", "outputs")
        self.add(name, kinds[0], args[0])
        y.register_hook(functools.partial(self.add, name, kinds[1]))  # type: ignore[no-untyped-call]

    def record_head(self, name: str, *args: Any) -> Any:
        """softcapped_nll of a chunk of logits, with a look at the gradient."""
        found = softcapped_cross_entropy(*args)
        if found[1] is not None:
            self.add(name, "outputs", found[1])
        return found

    def accumulate(self, window_BT: Tensor) -> None:
        """Add what the windows (rows, T + 1) show: the model runs uncompiled, with hooks."""
        model, ids_BT, target_BT = self.model, window_BT[:, :-1], window_BT[:, 1:]
        head = "tok_emb.weight" if model.lm_head is None else "lm_head.weight"
        hooks = [
            module.register_forward_hook(functools.partial(self.record_module, f"{path}.weight"))
            for path, module in model.named_modules()
            if isinstance(module, CastedLinear | Embedding) and path != "lm_head"
        ]
        hooks.append(
            model.register_forward_hook(lambda _, args, x_BTD: self.add(head, "inputs", x_BTD))
        )
        compiled = model.run_block, model.nll
        model.run_block, model.nll = run_block, functools.partial(self.record_head, head)
        try:
            model.loss(ids_BT, target_BT, torch.ones_like(target_BT)).backward()  # type: ignore[no-untyped-call]
        finally:
            model.run_block, model.nll = compiled
            for hook in hooks:
                hook.remove()
        model.zero_grad(set_to_none=True)
        self.num_tokens += target_BT.numel()

    def hessians(self, run: Run) -> dict[str, KroneckerHessian]:
        """The means over all ranks, by matrix. A tied embedding is a matrix and a table: it gets
        the Kronecker form that has the sum's trace, by rows and as a whole.
        """
        count = run.all_reduce_sum(torch.tensor(float(self.num_tokens), device=run.device))
        means = {key: run.all_reduce_sum(self.sums[key]) / count for key in sorted(self.sums)}
        found = {}
        for name in sorted({name for name, _ in means}):
            parts = [
                (means[name, a], means[name, b])
                for a, b in [("inputs", "outputs"), ("gradients", "reads")]
                if (name, a) in means
            ]
            inputs_II = sum((a * b.mean() for a, b in parts), torch.zeros_like(parts[0][0]))
            outputs_O = sum((a.trace() * b for a, b in parts), torch.zeros_like(parts[0][1]))
            found[name] = KroneckerHessian(
                inputs_II, outputs_O / inputs_II.trace().clamp_min(1e-30)
            )
        return found


def calibrate(
    run: Run, model: GPT, loader: BatchLoader, trained: Progress
) -> dict[str, KroneckerHessian]:
    """Curvature of every matrix, by text after what was trained on."""
    cfg, moments, started_s = run.cfg, CalibrationStats(model), time.perf_counter()
    model.schedule, limit_s = model.schedules[-1], cfg.max_wallclock_seconds or math.inf
    T, batch = cfg.train_seq_len, cfg.train_batch_tokens
    for i in range(cfg.gptq_calibration_batches):
        position = trained.tokens + i * batch
        window_BT = loader.read(position - position % T, T, batch).to(run.device)
        for rows_BT in torch.split(window_BT, max(1, cfg.micro_batch_tokens // T)):
            run.check_signal()
            moments.accumulate(rows_BT)
        run.synchronize()
        passed_s = torch.tensor(time.perf_counter() - started_s, device=run.device)
        if (
            trained.train_s + 1.5 * float(run.all_reduce_max(passed_s)) * (i + 2) / (i + 1)
            > limit_s
        ):
            break  # all ranks do: the next batch might end later than the training budget
    run.log("calibrated", tokens=moments.num_tokens * run.world_size)
    return moments.hessians(run)


RATE_LAMBDA = 0.08  # of a bit, in squared steps
GPTQ_DAMPING, GPTQ_BLOCK = 0.01, 128  # of the mean diagonal; columns whose updates are batched


class HessianFactor(NamedTuple):
    """What GPTQ needs of the Hessians: columns in order of rounding, and U of H^-1 = U^T U."""

    order_LI: Tensor  # int64, descending diagonal
    upper_LII: Tensor  # rows and columns in that order
    alive_LI: Tensor  # bool, in the weight's own order: False where no input was ever seen
    std_LI: Tensor  # U_jj, in that order, too: an error e in column j costs (e / U_jj)^2


def factor_hessians(hessian_LII: Tensor) -> HessianFactor:
    """Order and Cholesky factor for sums of x x^T over calibration inputs (arXiv:2210.17323)."""
    damped_LII = hessian_LII.float().clone()
    diagonal_LI = damped_LII.diagonal(dim1=1, dim2=2)
    alive_LI = diagonal_LI > 0
    # An input that was never seen gets the mean of the others: the damping must not depend on it.
    num_alive_L1 = alive_LI.sum(dim=1, keepdim=True).clamp_min(1)
    mean_L1 = (diagonal_LI.sum(dim=1, keepdim=True) / num_alive_L1).clamp_min(1e-30)
    diagonal_LI.copy_(torch.where(alive_LI, diagonal_LI, mean_L1))
    diagonal_LI.add_(GPTQ_DAMPING * diagonal_LI.mean(dim=1, keepdim=True))
    order_LI = diagonal_LI.argsort(dim=1, descending=True, stable=True)
    ordered_LII = damped_LII.take_along_dim(order_LI[:, :, None], 1)
    ordered_LII = ordered_LII.take_along_dim(order_LI[:, None], 2)
    inverse_LII = torch.cholesky_inverse(torch.linalg.cholesky(ordered_LII))
    upper_LII = torch.linalg.cholesky(inverse_LII, upper=True)
    std_LI = upper_LII.diagonal(dim1=1, dim2=2).gather(1, order_LI.argsort(dim=1))
    return HessianFactor(order_LI, upper_LII, alive_LI, std_LI)


def round_uniform(target_LO: Tensor, _column_L: Tensor, *, qmax: int) -> tuple[Tensor, Tensor]:
    """The nearest of the codes -qmax to qmax; each stands for itself."""
    code_LO = target_LO.round().clamp_(-qmax, qmax)
    return code_LO, code_LO


def gptq(
    weight_LOI: Tensor,
    factor: HessianFactor,
    step_LO: Tensor,
    step_LI: Tensor,
    round_column: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """int16 codes of L matrices, with each column's error pushed onto the columns still to come.
    The step of weight (o, i) is step_LO[o] * step_LI[i]. Columns are rounded from the most to the
    least excited one; those beyond the current block are updated once a block. round_column makes
    of a column in steps, and of each matrix's column number, codes and their values in steps.
    """
    order_LI, upper_LII = factor.order_LI, factor.upper_LII
    # Columns are the second dimension here, so that each lies in one piece.
    w_LIO = (weight_LOI.float() * factor.alive_LI[:, None]).mT.contiguous()
    w_LIO = w_LIO.take_along_dim(order_LI[:, :, None], 1)
    code_LIO, step_LI = torch.empty_like(w_LIO, dtype=torch.int16), step_LI.gather(1, order_LI)
    for start in range(0, w_LIO.size(1), GPTQ_BLOCK):
        block_LIO = w_LIO[:, start : start + GPTQ_BLOCK].clone()
        end = start + block_LIO.size(1)
        upper_block_LII = upper_LII[:, start:end, start:end]
        for i in range(end - start):
            step = step_LO * step_LI[:, start + i, None]
            target_LO = block_LIO[:, i]
            code_LO, value_LO = round_column(target_LO / step, order_LI[:, start + i])
            code_LIO[:, start + i] = code_LO
            error_LO = (target_LO - value_LO * step) / upper_block_LII[:, i, i, None]
            block_LIO[:, i] = error_LO  # no longer needed as a weight
            block_LIO[:, i + 1 :].baddbmm_(
                upper_block_LII[:, i, i + 1 :, None], error_LO[:, None], alpha=-1
            )
        w_LIO[:, end:].baddbmm_(upper_LII[:, start:end, end:].mT, block_LIO, alpha=-1)
    return code_LIO.take_along_dim(order_LI.argsort(dim=1)[:, :, None], 1).mT.contiguous()


# Trellis-coded grid: dependent quantisation as in video coding (ITU-T H.266, ISO/IEC 15938-17). A
# code k is read with Q0, the even numbers of half-steps (2k), in even states and with Q1, the odd
# ones (2k + 1), in odd states; its parity leads to the next state. Unlike there Q1 has no zero: at
# one bit a weight and more that costs rate. The trellis is Ungerboeck's (IEEE Trans. Inform. Theory
# 28(1), 1982) of 32 states, whose parity-check polynomials h0, h1 are octal 45 and 10.
TRELLIS_SEGMENT = 256  # rows from one state 0 to the next
NEXT_STATES = np.array(
    [
        (state >> 1) ^ (state & 1) * (0o45 >> 1) ^ parity * (0o10 >> 1)
        for state in range(32)
        for parity in (0, 1)
    ],
    np.int8,
)
SUBSET_OFFSETS = np.array([[0], [2], [1], [3]], np.float32)  # each fourth level: Q0 even, odd; Q1


def viterbi(cost_T4N: np.ndarray) -> np.ndarray:
    """Subset of each row on the cheapest path from state 0, for N segments at once (Viterbi)."""
    (num_rows, _, num_segments), num_states = cost_T4N.shape, len(NEXT_STATES) // 2
    # The two branches into each state: first one of every state, then the other.
    branches = NEXT_STATES.argsort(kind="stable").reshape(-1, 2).T.ravel()
    leaves, subsets = branches >> 1, 2 * (branches >> 1 & 1) + (branches & 1)
    total_SN = np.full((num_states, num_segments), np.inf, np.float32)
    total_SN[0] = 0
    total_BN = np.empty((2 * num_states, num_segments), np.float32)
    cost_BN, first_SN, second_SN = total_BN.copy(), *np.split(total_BN, 2)
    is_second_TSN = np.empty((num_rows, num_states, num_segments), bool)
    for cost_4N, is_second_SN in zip(cost_T4N, is_second_TSN, strict=True):
        cost_4N.take(subsets, axis=0, out=cost_BN, mode="clip")  # other modes copy `out`
        total_SN.take(leaves, axis=0, out=total_BN, mode="clip")
        np.add(total_BN, cost_BN, out=total_BN)
        np.less(second_SN, first_SN, out=is_second_SN)
        np.minimum(first_SN, second_SN, out=total_SN)
    # Back along the survivors: positions in an S x N array, branches in a 2S x N array, both flat.
    column_N, branch_TN = np.arange(num_segments), np.empty((num_rows, num_segments), np.int64)
    leaves_BN = (leaves[:, None] * num_segments + column_N).ravel()
    position_N = total_SN.argmin(axis=0) * num_segments + column_N
    for branch_N, is_second_SN in zip(branch_TN[::-1], is_second_TSN[::-1], strict=True):
        np.multiply(is_second_SN.take(position_N), is_second_SN.size, out=branch_N)
        branch_N += position_N
        position_N = leaves_BN.take(branch_N)
    return subsets[branch_TN // num_segments]


@functools.cache
def four_step_paths(device: torch.device) -> tuple[Tensor, Tensor]:
    """First state and four subsets of the paths of four branches, sixteen into each state: the
    first path of every state, then the second, and so on."""
    num_states = len(NEXT_STATES) // 2
    path_P = np.arange(16 * num_states)  # where it begins, and the parity of each of four codes
    state_P, subsets = path_P >> 4, []
    for i in range(4):
        parity_P = path_P >> (3 - i) & 1
        subsets.append(2 * (state_P & 1) + parity_P)
        state_P = NEXT_STATES[2 * state_P + parity_P]
    order_P = state_P.argsort(kind="stable").reshape(num_states, 16).T.ravel()
    leaf_P, subset_4P = (x[..., order_P] for x in (path_P >> 4, np.stack(subsets)))
    return torch.from_numpy(leaf_P).to(device), torch.from_numpy(subset_4P).to(device)


def viterbi_on_device(cost_T4N: Tensor) -> Tensor:
    """What best_path finds, on the device: four rows a step take a quarter of the launches."""
    device, num_states, num_segments = cost_T4N.device, len(NEXT_STATES) // 2, cost_T4N.size(2)
    leaf_P, subset_4P = four_step_paths(device)
    cost_R44N = cost_T4N.view(-1, 4, 4, num_segments)
    cost_RPN = cost_R44N[:, 0].index_select(1, subset_4P[0])
    for i in range(1, 4):
        cost_RPN += cost_R44N[:, i].index_select(1, subset_4P[i])
    total_SN = torch.full((num_states, num_segments), math.inf, device=device)
    total_SN[0] = 0
    choices, branches = [], list[Tensor]()
    for cost_PN in cost_RPN.unbind():
        cost_PN += total_SN.index_select(0, leaf_P)
        total_SN, choice_SN = cost_PN.view(16, num_states, num_segments).min(dim=0)
        choices.append(choice_SN)
    state_1N = total_SN.argmin(dim=0, keepdim=True)
    for choice_SN in reversed(choices):
        branches.append(choice_SN.gather(0, state_1N) * num_states + state_1N)
        state_1N = leaf_P[branches[-1]]
    return subset_4P[:, torch.cat(branches[::-1])].transpose(0, 1).flatten(0, 1)


def round_trellis(
    target_LO: Tensor, column_L: Tensor, *, bits_LIV: Tensor, multiplier: float
) -> tuple[Tensor, Tensor]:
    """The codes of least squared error (in steps) + multiplier * bits, over paths of the trellis.
    bits_LIV is what the coder pays for the levels +-V (in half-steps; V's parity is the quantiser)
    in each column; its last entry, odd, belongs to the largest code.
    """
    (num_matrices, num_rows), largest = target_LO.shape, bits_LIV.size(2) - 1
    padding, device = -num_rows % TRELLIS_SEGMENT, target_LO.device
    matrix_L = torch.arange(num_matrices, device=device)
    price_LV = bits_LIV[matrix_L, column_L] * (4 * multiplier)
    x_LO = F.pad(2 * target_LO.float(), (0, padding))  # half-steps
    x_T1N = x_LO.view(-1, TRELLIS_SEGMENT).T.contiguous()[:, None]
    # Levels are within 2 of what is rounded, and so the codes from -K to K, the largest.
    offset_41 = torch.from_numpy(SUBSET_OFFSETS).to(device)
    level_T4N = ((x_T1N.clamp(3 - largest, largest - 2) - offset_41) / 4).round() * 4 + offset_41
    first_N = (matrix_L * price_LV.size(1)).repeat_interleave(x_T1N.size(2) // num_matrices)
    cost_T4N = price_LV.take(level_T4N.abs().long() + first_N) + (level_T4N - x_T1N).square()
    # Rows that do not exist must not say where a path ends.
    cost_T4N.view(len(x_T1N), 4, num_matrices, -1)[len(x_T1N) - padding :, :, :, -1] = 0
    subset_TN = (
        torch.from_numpy(viterbi(cost_T4N.numpy()))
        if device.type == "cpu"
        else viterbi_on_device(cost_T4N)
    )
    level_TN = level_T4N.gather(1, subset_TN[:, None])[:, 0]
    value_LO = (level_TN.T.reshape(num_matrices, -1)[:, :num_rows] / 2).to(target_LO)
    return value_LO.floor(), value_LO


def gaussian_code_bits(std_LI: Tensor, largest_code: int) -> Tensor:
    """bits_LIV for columns that are normal with std_LI (in steps): what to begin with."""
    level_V = torch.arange(2 * largest_code + 2, device=std_LI.device)
    scale_LI1 = 8**0.5 * std_LI[:, :, None]  # sqrt(2) std in half-steps
    mass_LIV = torch.erf((level_V + 1) / scale_LI1) - torch.erf((level_V - 1) / scale_LI1)
    return -(mass_LIV / 2).clamp_min(1e-9).log2()


def trellis_levels(code_OI: np.ndarray) -> np.ndarray:
    """What each code stands for, as int16 multiples of half a step. The walk runs down rows."""
    padded_OI = np.pad(code_OI.astype(np.int16), [(0, -len(code_OI) % TRELLIS_SEGMENT), (0, 0)])
    code_NTI = padded_OI.reshape(-1, TRELLIS_SEGMENT, code_OI.shape[1])
    level_NTI, state_NI = 2 * code_NTI, np.zeros_like(code_NTI[:, 0], np.int8)
    for row in range(TRELLIS_SEGMENT):
        level_NTI[:, row] |= state_NI & 1  # odd: Q1
        state_NI = NEXT_STATES.take(2 * state_NI + (code_NTI[:, row] & 1))
    return level_NTI.reshape(padded_OI.shape)[: len(code_OI)]


def round_scales(cfg: Config, step: Tensor) -> Tensor:
    """Steps as the artifact will hold them: in fp16, or as the next power of 2^(1/8) to code."""
    if cfg.compressor != "ans":
        return step.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    index = (step.clamp_min(1e-30).log2() * 8 - 1e-3).ceil()  # which may be 2^(n/8) already
    place = index.clamp(-SCALE_RANGE, SCALE_RANGE).int() + SCALE_RANGE
    return torch.from_numpy(SCALES[place.cpu().numpy()]).to(step)


CLIP_PERCENTILE = 0.9999984  # of a row's magnitudes, as in the naive baseline


def heuristic_row_scales(cfg: Config, weight_OI: Tensor, group: str) -> Tensor:
    """Step of each row by the row's own weights: CLIP_SIGMAS, or ROW_STEPS but solved."""
    qmax, size_OI = 2 ** (cfg.bits[group] - 1) - 1, weight_OI.abs()
    if cfg.sigmas:  # SDClip (#1394): the same rate for every row
        return cfg.sigmas[group] / qmax * weight_OI.std(dim=1)
    share = {"max": 1.0, "percentile": CLIP_PERCENTILE}[cfg.row_steps]
    pieces = torch.split(size_OI, 512)  # torch.quantile takes 2^24 numbers at most
    return torch.cat([rows.quantile(share, dim=1) for rows in pieces]) / qmax


def optimal_scales(found: KroneckerHessian, column_I: Tensor) -> tuple[Tensor, Tensor]:
    """Relative steps of rows and columns at which a bit saves the same loss everywhere.
    Rounding costs about outputs[o] (step / U_jj)^2 / 24 a weight, and one bit more three quarters
    of that less: costs must be equal (reverse water-filling), as steps U_jj / sqrt(outputs[o]) make
    them. What calibration hardly saw is worth something, too: rows are damped, columns bounded.
    """
    mean, middle = found.outputs_O.mean().clamp_min(1e-30), column_I.log().mean().exp()
    row_O = (found.outputs_O / mean + 0.1).rsqrt() * mean.rsqrt()
    return row_O * middle, (column_I / middle).clamp(1 / 16, 16)


class MatrixGroup(NamedTuple):
    """Matrices of one shape that are quantised together, and what that takes."""

    names: list[str]
    weight_LOI: Tensor
    factor: HessianFactor | None  # None: round to nearest
    row_scale_LO: Tensor
    column_scale_LI: Tensor  # ones, unless steps are solved
    bits: int
    column_std_LI: Tensor  # standard deviation of a column in steps


def prune_smallest(weight_OI: Tensor, share: float) -> Tensor:
    """The weight without its smallest numbers, if it is large (thwu1)."""
    if not share or weight_OI.numel() <= 65_536:
        return weight_OI
    size_OI = weight_OI.abs()
    least = size_OI.flatten().kthvalue(max(1, int(share * size_OI.numel()))).values
    return torch.where(size_OI < least, 0, weight_OI)


def group_matrices(
    cfg: Config, model: nn.Module, found: Mapping[str, KroneckerHessian]
) -> list[MatrixGroup]:
    """All matrices to be stored as codes, by shape and bits, with steps (if solved: relative)."""
    members: dict[Any, list[str]] = {}
    roles = {name: role.quant_group for name, role in parameter_roles(model).items()}
    for name, group in roles.items():
        if group not in ("gate", "control") and cfg.bits[group] != PLAIN_BITS:
            key = model.get_parameter(name).shape, cfg.bits[group], name in found
            members.setdefault(key, []).append(name)
    stacks = []
    for (_, bits, known), names in members.items():
        weights = [
            prune_smallest(model.get_parameter(name).detach().float(), cfg.prune_frac)
            for name in names
        ]
        weight_LOI, inputs = torch.stack(weights), [found[n].inputs_II for n in names if known]
        factor = factor_hessians(torch.stack(inputs)) if known else None
        if cfg.solves_scales and factor is not None:
            pairs = [
                optimal_scales(found[name], std_I)
                for name, std_I in zip(names, factor.std_LI, strict=True)
            ]
            row_LO, column_LI = map(torch.stack, zip(*pairs, strict=True))
        else:
            row_LO = torch.stack(
                [
                    heuristic_row_scales(cfg, weight_OI, roles[name])
                    for name, weight_OI in zip(names, weights, strict=True)
                ]
            )
            column_LI = torch.ones_like(weight_LOI[:, 0])
        row_LO, column_LI = row_LO.clamp_min(1e-30), round_scales(cfg, column_LI)
        spread_LI = (weight_LOI / row_LO[:, :, None]).square().mean(dim=1).sqrt() / column_LI
        stacks.append(MatrixGroup(names, weight_LOI, factor, row_LO, column_LI, bits, spread_LI))
    return stacks


def quantize_group(cfg: Config, stack: MatrixGroup, multiplier: float) -> dict[str, Quantized]:
    """The matrices of a stack, with all steps multiplied, by name."""
    solved, trellis = cfg.solves_scales, cfg.quant_grid == "trellis" and stack.factor is not None
    row_LO, column_LI = round_scales(cfg, stack.row_scale_LO * multiplier), stack.column_scale_LI
    qmax = MAX_CODE if solved else 2 ** (stack.bits - 1) - 1
    largest_LI = (stack.weight_LOI.abs() / row_LO[:, :, None]).amax(dim=1)  # if columns are 1
    if solved:  # a column with a few huge weights gets coarser steps, not clipped codes
        column_LI = round_scales(cfg, torch.maximum(column_LI, largest_LI / (0.8 * qmax)))
    rounding = functools.partial(round_uniform, qmax=qmax)
    if trellis:
        spread_LI = (stack.column_std_LI / multiplier).clamp_min(0.05)
        reach = min(qmax, int(1.25 * (largest_LI / column_LI).max()) + 8)
        bits_LIV = gaussian_code_bits(spread_LI, reach)
        rounding = functools.partial(round_trellis, bits_LIV=bits_LIV, multiplier=RATE_LAMBDA)
    if stack.factor is None:
        step_LOI = row_LO[:, :, None] * column_LI[:, None]
        codes_LOI, _ = rounding(stack.weight_LOI / step_LOI, column_LI)
    else:
        codes_LOI = gptq(stack.weight_LOI, stack.factor, row_LO, column_LI, rounding)
    kind = np.float32 if cfg.compressor == "ans" else np.float16
    rows, columns = (x.cpu().numpy().astype(kind) for x in (row_LO, column_LI))
    codes = codes_LOI.cpu().numpy().astype(np.int16 if solved else np.int8)
    return {
        name: Quantized(stack.bits, codes[i], rows[i], columns[i] if solved else None, trellis)
        for i, name in enumerate(stack.names)
    }


def quantize_model(
    cfg: Config,
    model: nn.Module,
    stacks: Sequence[MatrixGroup] | None = None,
    multiplier: float = 1.0,
) -> dict[str, Quantized]:
    """Every parameter of the model by name, in the form in which it is stored."""
    stacks = group_matrices(cfg, model, {}) if stacks is None else stacks
    tensors = {
        name: tensor
        for stack in stacks
        for name, tensor in quantize_group(cfg, stack, multiplier).items()
    }
    for name, role in parameter_roles(model).items():
        weight, bits = model.get_parameter(name).detach(), cfg.bits[role.quant_group]
        if bits == PLAIN_BITS or weight.numel() <= 1:
            if weight.dim() == 2:
                weight = prune_smallest(weight, cfg.prune_frac)
            plain = weight.clamp(-LARGEST_SCALE, LARGEST_SCALE).half().cpu().numpy()
            tensors[name] = Quantized(PLAIN_BITS, plain, None)
        elif name not in tensors:
            tensors[name] = quantize_rows(weight, bits)
    return tensors


def code_statistics(tensors: Mapping[str, Quantized]) -> dict[str, float]:
    """How many weights are codes, and the entropy of a code given its tensor, in bits."""
    codes = [t.values for t in tensors.values() if t.scales is not None]
    counts = [np.unique(values, return_counts=True)[1] for values in codes]
    bits = sum(float((n * np.log2(n.sum() / n)).sum()) for n in counts)
    num_codes = sum(map(np.size, codes))
    return {"codes": num_codes, "entropy_bits": round(bits / max(1, num_codes), 4)}


MAX_BITS_PER_WEIGHT, MIN_BUDGET_FILL = (
    6.5,
    0.998,
)  # a weight: finer steps only cost bytes; of the budget: enough


def estimated_bits(stacks: Sequence[MatrixGroup], multiplier: float) -> float:
    """Entropy of all codes if weights were normal: log2 of 4.13 deviations, or nearly nothing."""
    return sum(
        stack.weight_LOI.size(1)
        * float(torch.log2(1 + 17.08 * (stack.column_std_LI / multiplier).square()).sum())
        / 2
        for stack in stacks
    )


def scale_factor_for(stacks: Sequence[MatrixGroup], bits: float) -> float:
    """The multiplier of all steps at which estimated_bits are `bits`."""
    low, high = -60.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if estimated_bits(stacks, 2**middle) > bits else (low, middle)
    return 2**high


def fill_budget(
    stacks: Sequence[MatrixGroup], encode: Callable[[float], bytes], budget_bytes: int
) -> bytes:
    """The artifact of the finest steps that `budget_bytes` allow, by one multiplier of them all."""
    finest = scale_factor_for(
        stacks, MAX_BITS_PER_WEIGHT * sum(s.weight_LOI.numel() for s in stacks)
    )
    target_bytes, tried = budget_bytes * (1 + MIN_BUDGET_FILL) / 2, dict[float, bytes]()
    multiplier = max(finest, scale_factor_for(stacks, 8 * target_bytes))
    while len(tried) < 8 and multiplier not in tried:
        tried[multiplier] = payload = encode(multiplier)
        fitting = {m: len(p) for m, p in tried.items() if len(p) <= budget_bytes}
        if MIN_BUDGET_FILL * budget_bytes <= len(payload) <= budget_bytes or finest in fitting:
            break
        # What normal weights would cost, corrected by what the artifact really takes.
        wanted = target_bytes / len(payload) * estimated_bits(stacks, multiplier)
        multiplier = max(finest, scale_factor_for(stacks, wanted))
        if fitting and len(fitting) < len(tried):  # between the nearest two, by logarithms
            fine, coarse = max(tried.keys() - fitting.keys()), min(fitting)
            share = math.log(target_bytes / fitting[coarse]) / math.log(
                len(tried[fine]) / fitting[coarse]
            )
            multiplier = coarse * (fine / coarse) ** share
    return max((p for p in tried.values() if len(p) <= budget_bytes), key=len, default=payload)


# --- 8. Artifact ---------------------------------------------------------------------------------
# One file: magic, version, length of the header; a compressed JSON header (model shape, tokenizer,
# tensors, streams); the compressed streams; SHA-256 of all before it. Reading checks the checksum
# first and every length before anything is allocated. Nothing is ever unpickled.

ARTIFACT_MAGIC, ARTIFACT_VERSION, CHECKSUM_BYTES = b"PGOLFART", 2, 32
ARTIFACT_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of the compressed header
MAX_HEADER_BYTES = 2**22  # uncompressed; a header lists a few hundred tensors
MAX_WEIGHTS = 2**28  # 16 MB hold no more codes than that at half a bit each


def decompress_brotli(module: Any, packed: bytes, limit: int) -> bytes:
    """At most `limit` bytes of a brotli stream, whose decoder gives them piece by piece."""
    decoder, raw = module.Decompressor(), b""
    while len(raw) < limit and (more := decoder.process(packed, output_buffer_limit=limit)):
        raw, packed = raw + more, b""
    return raw[:limit]


def unshuffle_bytes(raw: bytes) -> bytes:
    """The bytes of which `raw` holds those at even places before those at odd ones."""
    return np.frombuffer(raw + bytes(len(raw) % 2), "u1").reshape(2, -1).T.tobytes()[: len(raw)]


# Name: module, how it packs, how it unpacks at most so many bytes (at least 1).
ZLIB: Any = (
    "zlib",
    lambda m, raw: m.compress(raw, 9),
    lambda m, packed, limit: m.decompressobj().decompress(packed, limit),
)
COMPRESSORS: dict[str, tuple[str, Callable[..., bytes], Callable[..., bytes]]] = {
    "ans": ZLIB,
    "zlib": ZLIB,  # ans: for what is not coded by itself
    "lzma": (
        "lzma",
        lambda m, raw: m.compress(raw, preset=9 | m.PRESET_EXTREME),
        lambda m, packed, limit: m.LZMADecompressor(memlimit=2**28).decompress(packed, limit),
    ),
    "zstd": (
        "zstandard",
        lambda m, raw: m.ZstdCompressor(level=22).compress(raw),
        lambda m, packed, limit: (
            m.ZstdDecompressor(max_window_size=2**27).stream_reader(packed).read(limit)
        ),
    ),
    "brotli": ("brotli", lambda m, raw: m.compress(raw, quality=11, lgwin=24), decompress_brotli),
    "brotli_shuffled": (  # high and low bytes of fp16 part (#1394)
        "brotli",
        lambda m, raw: m.compress(raw[::2] + raw[1::2], quality=11, lgwin=24),
        lambda m, packed, limit: unshuffle_bytes(decompress_brotli(m, packed, limit)),
    ),
}


def find_compressor(name: str) -> Sequence[Callable[..., bytes]]:
    """How the coder packs and unpacks; InputError if its package is missing (never another)."""
    module_name, *functions = COMPRESSORS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"COMPRESSOR={name}: {error}; pip install -r requirements.txt, or choose another"
        ) from error
    return [functools.partial(function, module) for function in functions]


# Entropy coder of codes (asymmetric numeral systems, arXiv:1311.2540, by the library constriction).
# A code's class is how large it should be: its column's magnitude, learnt from earlier rows, times
# its row's gain, which is written; and its quantiser. How frequent each code is in a class is
# learnt, too. Contexts are integers, and floats see only + - * / and roots, so that every machine
# rebuilds the same models.
# Tensor suffixes: M matrices, C columns of all matrices, L lanes, N columns of all lanes,
#                  K classes, W symbols of the alphabet, O x I a matrix.

MAGNITUDE_ONE, FREQUENCY_ONE = 2**12, 1024  # 1.0 of magnitudes; 1.0 of frequency
PRIOR_ROWS, PRIOR_CODES, MEMORY_CODES = 32, 128, 2**16  # what a model's start is worth, and its end
MAGNITUDES = np.array(
    [round(MAGNITUDE_ONE * 2 ** (j / 8 - 7)) for j in range(128)]
)  # 1/8 octave apart
MAGNITUDE_EDGES = np.array([round(MAGNITUDE_ONE * 2 ** (j / 8 - 7 + 1 / 16)) for j in range(127)])
GAIN_CLASS, NUMBERS_PER_ROW = 64, 64  # gains are as large as in this class


class CodeGrid(NamedTuple):
    """Shape of a matrix of codes, and what its reader knows of them beforehand."""

    rows: int
    columns: int
    trellis: bool = False
    column_log_scale_I: np.ndarray | int = 0  # a column's codes are larger by so many 1/8 octaves


def code_symbols(
    coder: Any, all_KW: np.ndarray, kind_N: np.ndarray, symbol_N: np.ndarray
) -> np.ndarray:
    """Add symbols to a list of what is to be written, or read as many; and return them.
    Their frequencies, from -half to half - 1, are learnt by 128 * quantiser + magnitude. They are
    symmetric: about 0, or in the other quantiser, whose level is code + 1/2, about -1/2.
    """
    order, number_K, half = kind_N.argsort(kind="stable"), np.bincount(kind_N), len(all_KW[0]) // 2
    flat_N = symbol_N[order].astype(np.int32) + np.int32(half)
    kinds = number_K.nonzero()[0]
    for kind in kinds[all_KW[kinds, 0] == 0].tolist():  # a new one: two-sided geometric
        mean = MAGNITUDES[kind % 128] / MAGNITUDE_ONE
        power_W = np.full(half + 1, mean / (1 + math.sqrt(1 + mean * mean))).cumprod()
        weight_W = power_W[abs(2 * np.arange(-half, half) + kind // 128) // 2]
        weight_W *= PRIOR_CODES * FREQUENCY_ONE / math.fsum(weight_W)
        all_KW[kind] = weight_W.astype(np.int64) + 1
    counts_KW, number_K = all_KW[kinds], number_K[kinds]
    ends = number_K.cumsum().tolist()
    for counts_W, start, end in zip(counts_KW * 1.0, [0, *ends[:-1]], ends, strict=True):
        model = constriction.stream.model.Categorical(counts_W, perfect=False)  # wrong for float32
        if isinstance(coder, list):
            coder.append((flat_N[start:end], model))
        else:
            flat_N[start:end] = coder.decode(model, end - start)
    place_N = np.repeat(np.arange(len(kinds)) * 2 * half, number_K) + flat_N
    seen_KW = np.bincount(place_N, minlength=counts_KW.size).reshape(counts_KW.shape)
    mirrored_KW = seen_KW[:, ::-1].copy()
    mirrored_KW[kinds < 128] = np.roll(mirrored_KW[kinds < 128], 1, axis=1)
    counts_KW += (seen_KW + mirrored_KW) * (FREQUENCY_ONE // 2)
    counts_KW -= counts_KW // 2 * (counts_KW.sum(axis=1) > MEMORY_CODES * FREQUENCY_ONE)[:, None]
    all_KW[kinds] = counts_KW
    symbol_N = np.empty_like(flat_N)
    symbol_N[order] = flat_N - np.int32(half)
    return symbol_N


def code_lanes(
    coder: Any, codes: np.ndarray, peak: int, grids: Sequence[CodeGrid], means: bytes
) -> None:
    """Write the codes of all matrices, or read them into their array: a row of each lane at a time.
    Lanes are segments; the longest come first, so that those which have a row are the first ones.
    """
    lanes = sorted(
        (
            (min(TRELLIS_SEGMENT, grid.rows - first), matrix, first)
            for matrix, grid in enumerate(grids)
            if grid.columns
            for first in range(0, grid.rows, TRELLIS_SEGMENT)
        ),
        reverse=True,
    )
    rows_L, matrix_L, first_L = np.array(lanes, np.int64).reshape(-1, 3).T
    rows_M, columns_M, trellis_M = np.array([g[:3] for g in grids], np.int64).reshape(-1, 3).T
    end_L = columns_M[matrix_L].cumsum()
    start_L = end_L - columns_M[matrix_L]
    lane_N = np.arange(len(lanes)).repeat(columns_M[matrix_L])
    matrix_N, within_N = matrix_L[lane_N], np.arange(len(lane_N)) - start_L[lane_N]
    column_N = within_N + (columns_M.cumsum() - columns_M)[matrix_N]
    width_N, size_M = columns_M[matrix_N], rows_M * columns_M
    place_N = within_N + (size_M.cumsum() - size_M)[matrix_N] + first_L[lane_N] * width_N
    whole_5N = np.stack([lane_N, column_N, place_N, width_N, trellis_M[matrix_N]])
    class_C = np.concatenate(
        [
            [],
            *(
                np.zeros(grid.columns) + mean + grid.column_log_scale_I
                for grid, mean in zip(grids, means, strict=True)
            ),
        ]
    )
    sum_C = PRIOR_ROWS * MAGNITUDES[class_C.astype(np.int64).clip(0, 127)]
    seen_C, state_N = np.full(len(class_C), PRIOR_ROWS), np.zeros(len(lane_N), np.int8)
    codes_KW, gains_KW = np.zeros((256, 2 * peak + 2), np.int64), np.zeros((256, 34), np.int64)
    for step in range(rows_L.max(initial=0)):
        count = int((rows_L > step).sum())
        lane_N, column_N, place_N, width_N, trellis_N = whole_5N[:, : end_L[count - 1]]
        state_N = state_N[: end_L[count - 1]]
        codes_N, expected_C = codes[place_N], sum_C // seen_C
        # The writer's gains, in 1/4 octaves; a reader has zeros here, and ignores them.
        size_L, expected_L = (
            np.add.reduceat(x_N, start_L[:count])
            for x_N in (abs(codes_N) * float(MAGNITUDE_ONE), expected_C[column_N])
        )
        gain_L = np.rint(4 * np.log2((size_L + 1) / (expected_L + 1))).clip(-16, 16)
        gain_L = code_symbols(coder, gains_KW, np.full(count, GAIN_CLASS), gain_L)
        kind_N = MAGNITUDE_EDGES.searchsorted(expected_C)[column_N] + 2 * gain_L[lane_N]
        kind_N = kind_N.clip(0, 127).astype(np.uint8) | (state_N & 1) << np.uint8(7)
        codes_N = codes[place_N] = code_symbols(coder, codes_KW, kind_N, codes_N)
        state_N = NEXT_STATES[2 * state_N + (codes_N & trellis_N)]  # odd: the other quantiser
        size_N = abs(codes_N) * MAGNITUDES[56 - 2 * gain_L][lane_N]  # [56]: 1.0
        sum_C += np.bincount(column_N, size_N, len(sum_C)).astype(np.int64)
        seen_C += np.bincount(column_N, minlength=len(sum_C))
        place_N += width_N  # of whole_5N


def encode_codes(codes: Sequence[np.ndarray], grids: Sequence[CodeGrid]) -> bytes:
    """Matrices of integers of magnitude up to MAX_CODE, as bytes that depend on nothing else."""
    flat = np.concatenate([np.zeros(0, np.int32), *(c.ravel().astype(np.int32) for c in codes)])
    peak = int(abs(flat).max(initial=0))
    require(peak <= MAX_CODE, f"a code of magnitude {peak} exceeds {MAX_CODE}")
    sizes = (
        abs(c.reshape(grid[:2]) * 2.0 ** (-grid.column_log_scale_I / 8))
        for c, grid in zip(codes, grids, strict=True)
    )
    means = bytes(
        int(MAGNITUDE_EDGES.searchsorted(s.sum() / max(s.size, 1) * MAGNITUDE_ONE)) for s in sizes
    )
    coder, calls = constriction.stream.stack.AnsCoder(), list[tuple[np.ndarray, Any]]()
    code_lanes(calls, flat, peak, grids, means)
    for symbols, model in reversed(calls):  # a stack: what goes in last is read first
        coder.encode_reverse(symbols, model)
    return peak.to_bytes(2, "little") + means + coder.get_compressed().astype("<u4").tobytes()


def decode_codes(payload: bytes, grids: Sequence[CodeGrid]) -> list[np.ndarray]:
    """What encode_codes was given; ValueError if these bytes cannot be of its making."""
    peak, head = int.from_bytes(payload[:2], "little"), 2 + len(grids)
    require(len(payload) >= head and peak <= MAX_CODE, "damaged codes: wrong head")
    sizes = [grid.rows * grid.columns for grid in grids]
    flat = np.zeros(sum(sizes), np.int32)
    try:
        words = np.frombuffer(payload[head:], "<u4").astype(np.uint32)
        coder = constriction.stream.stack.AnsCoder(words)
        code_lanes(coder, flat, peak, grids, payload[2:head])
        require(coder.is_empty(), "more bytes than the codes need")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise ValueError(f"damaged codes: {error}") from error
    parts = np.split(flat.astype(np.int16), np.cumsum(sizes))
    return [part.reshape(grid[:2]) for part, grid in zip(parts, grids, strict=False)]


def number_grid(length: int) -> CodeGrid:
    rows = max(-(-length // NUMBERS_PER_ROW), 1)
    return CodeGrid(rows, -(-length // rows))


def encode_numbers(arrays: Sequence[np.ndarray]) -> bytes:
    """Vectors of integers within MAX_CODE of their median, coded as one matrix of differences."""
    centres = np.array([np.median(a) if a.size else 0 for a in arrays]).astype("<i2")
    differences = np.concatenate([*map(np.subtract, arrays, centres)])
    grid = number_grid(len(differences))
    return centres.tobytes() + encode_codes([np.resize(differences, grid[:2])], [grid])


def decode_numbers(payload: bytes, lengths: Sequence[int]) -> list[np.ndarray]:
    """What encode_numbers was given; ValueError if these bytes cannot be of its making."""
    head = 2 * len(lengths)
    (matrix_OI,) = decode_codes(payload[head:], [number_grid(sum(lengths))])
    parts = np.split(matrix_OI.ravel().astype(np.int64), np.cumsum(lengths))  # the last: padding
    return list(map(np.add, parts, np.frombuffer(payload[:head], "<i2")))


SHAPE_KNOBS = [f.name for f in fields(Config) if f.metadata["shape"]]


def storage_spec(tensor: Quantized) -> list[int]:
    """How a tensor is stored, as the header says it: bits, number of steps (0: plain fp16), flags
    (factors a column 1, trellis 2, two-byte codes 4, steps 2^(n/8) 8).
    """
    if tensor.scales is None:
        return [PLAIN_BITS, 0, 0]
    flags = [
        tensor.columns is not None,
        tensor.trellis,
        tensor.values.itemsize == 2,
        tensor.scales.itemsize == 4,
    ]
    return [tensor.bits, len(tensor.scales), sum(flag << i for i, flag in enumerate(flags))]


def empty_tensor(name: str, spec: Sequence[int], shape: Sequence[int], coder: str) -> Quantized:
    """A tensor stored so, of zeros that take no memory; refuses what none of this shape can be."""
    (bits, num_scales, flags), size = spec, math.prod(shape)
    sound = all(type(x) is int for x in spec) and (
        spec == [PLAIN_BITS, 0, 0]
        or (
            0 < num_scales <= size
            and size % num_scales == 0
            and bits in {*BITS} - {PLAIN_BITS}
            and 0 <= flags < (16 if coder == "ans" else 8)
            and (not flags & 3 or (len(shape) == 2 and num_scales == shape[0]))
        )
    )
    require(sound, f"{name} of shape {tuple(shape)} cannot be stored as {spec}")
    if not num_scales:
        return Quantized(bits, np.broadcast_to(np.float16(0), shape), None)
    codes = np.broadcast_to(np.zeros((), np.int16 if flags & 4 else np.int8), shape)
    steps = np.broadcast_to(np.zeros((), np.float32 if flags & 8 else np.float16), size)
    return Quantized(
        bits, codes, steps[:num_scales], steps[: shape[1]] if flags & 1 else None, bool(flags & 2)
    )


def model_layout(cfg: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and group of tensors of every parameter of a model, which is not made."""
    with torch.device("meta"):
        model = GPT(cfg, ATTENTION_BACKENDS["sdpa"](), torch.float32)
    return (
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        {name: role.quant_group for name, role in parameter_roles(model).items()},
    )


def group_names(names: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """The stored names by group, in order."""
    members: dict[str, list[str]] = {}
    for name in sorted(names):
        members.setdefault(groups[name], []).append(name)
    return dict(sorted(members.items()))


def stream_slots(stored: Sequence[Quantized]) -> dict[str, list[tuple[int, str]]]:
    """The tensor's number and field of every array in each stream of a group of tensors."""
    slots: dict[str, list[tuple[int, str]]] = {"half": [], "codes": [], "steps": []}
    for i, (_, _, scales, columns, _) in enumerate(stored):
        if scales is not None:
            steps = "half" if scales.itemsize == 2 else "steps"
            slots[steps] += [(i, "scales"), (i, "columns")][: 1 + (columns is not None)]
        slots["half" if scales is None else "codes"].append((i, "values"))
    return {kind: found for kind, found in slots.items() if found}


def code_grids(stored: Sequence[Quantized]) -> list[CodeGrid]:
    """What the coder of codes knows of a group of tensors."""
    rows = [(t, len(t.values if t.trellis else t.scales)) for t in stored if t.scales is not None]
    return [
        CodeGrid(
            n,
            t.values.size // n,
            t.trellis,
            0 if t.columns is None else SCALE_RANGE - SCALES.searchsorted(t.columns),
        )
        for t, n in rows
    ]


def pack_group(stored: Sequence[Quantized], coder: str) -> dict[str, bytes]:
    """The streams of a group of tensors: its fp16 numbers, its codes, its coarse steps."""
    packed, (pack, _) = dict[str, bytes](), find_compressor(coder)
    for kind, slots in stream_slots(stored).items():
        arrays = [getattr(stored[i], name) for i, name in slots]
        if kind == "steps":
            packed[kind] = encode_numbers([SCALES.searchsorted(a) - SCALE_RANGE for a in arrays])
        elif kind == "codes" and coder == "ans":
            packed[kind] = encode_codes(arrays, code_grids(stored))
        else:
            packed[kind] = pack(b"".join(array.tobytes() for array in arrays))
    return packed


def unpack_stream(
    kind: str, packed: bytes, arrays: Sequence[np.ndarray], coder: str, grids: Sequence[CodeGrid]
) -> Sequence[np.ndarray]:
    """What a stream holds for blank arrays; refuses what they cannot be."""
    if kind == "steps":
        steps = decode_numbers(packed, [a.size for a in arrays])
        require(all(abs(index).max() <= SCALE_RANGE for index in steps), "steps out of range")
        return [SCALES[index + SCALE_RANGE] for index in steps]
    if kind == "codes" and coder == "ans":
        return decode_codes(packed, grids)
    ends = [0, *itertools.accumulate(a.nbytes for a in arrays)]
    raw = find_compressor(coder)[1](packed, ends[-1] + 1)
    require(
        len(raw) == ends[-1],
        f"stream {kind} does not hold the {ends[-1]} bytes that its tensors need",
    )
    found = [np.frombuffer(raw, a.dtype, a.size, n) for a, n in zip(arrays, ends, strict=False)]
    require(all(np.isfinite(a).all() for a in found), "numbers that are not finite")
    return found


def unpack_group(packed: Mapping[str, bytes], stored: list[Quantized], coder: str) -> None:
    """Fill in the blank tensors of a group; refuses streams that cannot hold them."""
    streams = stream_slots(stored)
    for kind in packed:
        require(kind in streams, f"a stream {kind} that no tensor needs")
    for kind in sorted(streams, reverse=True):  # codes are last: their coder knows the columns
        blanks = [getattr(stored[i], name) for i, name in streams[kind]]
        found = unpack_stream(kind, packed[kind], blanks, coder, code_grids(stored))
        for (i, name), x, like in zip(streams[kind], found, blanks, strict=True):
            largest = MAX_CODE if like.itemsize == 2 else 2 ** (stored[i].bits - 1) - 1
            require(
                kind != "codes" or abs(x.astype(np.int32)).max() <= largest,
                f"codes beyond {stored[i].bits} bits",
            )
            filled: dict[str, Any] = {name: x.astype(like.dtype).reshape(like.shape)}
            stored[i] = stored[i]._replace(**filled)


def encode_artifact(cfg: Config, tensors: Mapping[str, Quantized], tokenizer_sha256: str) -> bytes:
    """The artifact file's content; a function of its arguments to the byte."""
    members = group_names(list(tensors), model_layout(cfg)[1])
    packed = {
        f"{kind}/{group}": stream
        for group, names in members.items()
        for kind, stream in pack_group([tensors[name] for name in names], cfg.compressor).items()
    }
    header = {
        "model": {name: getattr(cfg, name) for name in SHAPE_KNOBS},
        "tokenizer_sha256": tokenizer_sha256,
        "compressor": cfg.compressor,
        "tensors": [[name, *storage_spec(tensors[name])] for name in sorted(tensors)],
        "streams": [[kind, len(stream)] for kind, stream in packed.items()],
    }
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = b"".join(
        [ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head)), head, *packed.values()]
    )
    return body + hashlib.sha256(body).digest()


def decode_header(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams of an artifact whose checksum, magic and lengths are right."""
    require(
        len(payload) >= ARTIFACT_PREFIX.size + CHECKSUM_BYTES,
        f"{len(payload)} bytes are too few for an artifact",
    )
    body, checksum = payload[:-CHECKSUM_BYTES], payload[-CHECKSUM_BYTES:]
    magic, version, head_bytes = ARTIFACT_PREFIX.unpack_from(body)
    require(
        magic == ARTIFACT_MAGIC, f"it begins with {magic!r}, an artifact with {ARTIFACT_MAGIC!r}"
    )
    require(
        hashlib.sha256(body).digest() == checksum,
        "the checksum does not match: the file is truncated or was changed",
    )
    require(
        version == ARTIFACT_VERSION,
        f"format version {version}; this script reads {ARTIFACT_VERSION}",
    )
    head = body[ARTIFACT_PREFIX.size :][:head_bytes]
    header = json.loads(zlib.decompressobj().decompress(head, MAX_HEADER_BYTES))
    return header, body[ARTIFACT_PREFIX.size + head_bytes :]


def decode_tensors(
    header: Mapping[str, Any],
    body: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, str],
) -> dict[str, Quantized]:
    """The stored tensors by name; names and shapes must be exactly the model's."""
    specs, coder = {name: spec for name, *spec in header["tensors"]}, header["compressor"]
    require(
        specs.keys() == shapes.keys(),
        f"its tensors are not the model's: {sorted(specs.keys() ^ shapes.keys())}",
    )
    size = sum(math.prod(shape) for shape in shapes.values())
    require(size <= MAX_WEIGHTS, f"{size} weights; {MAX_WEIGHTS} are the most")
    packed: dict[str, dict[str, bytes]] = {}
    position = 0
    for key, num_bytes in header["streams"]:
        kind, _, group = key.partition("/")
        require(type(num_bytes) is int and num_bytes > 0, f"stream {key} of {num_bytes} bytes")
        packed.setdefault(group, {})[kind] = body[position : position + num_bytes]
        position += num_bytes
    require(position == len(body), f"{len(body)} bytes of streams, {position} declared")
    members, tensors = group_names(list(specs), groups), dict[str, Quantized]()
    require(packed.keys() == members.keys(), f"streams of {[*packed]} for {[*members]}")
    for group, names in members.items():
        blanks = [empty_tensor(name, specs[name], shapes[name], coder) for name in names]
        unpack_group(packed[group], blanks, coder)
        tensors |= zip(names, blanks, strict=True)
    return tensors


def dequantize_all(tensors: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """The weights by name."""
    return {name: tensor.dequantized() for name, tensor in tensors.items()}


def artifact_sizes(payload: bytes) -> dict[str, int]:
    """Bytes of an artifact by group of tensors, codes and steps apart, and what frames them."""
    header, body = decode_header(payload)
    sizes = {"_".join([*key.split("/")[::-1], "bytes"]): size for key, size in header["streams"]}
    return {**sizes, "frame_bytes": len(payload) - len(body)}


def read_artifact(path: Path, run: Run, tokenizer_sha256: str) -> GPT:
    """The model that a file holds, whose shape run.cfg takes on; InputError unless it is sound."""
    try:
        header, body = decode_header(run.run_on_rank0(path.read_bytes))
        require(
            header["tokenizer_sha256"] == tokenizer_sha256,
            "it was trained with another tokenizer than the data set's",
        )
        knobs, kinds = header["model"], get_type_hints(Config)
        strangers = sorted(knobs.keys() ^ set(SHAPE_KNOBS))
        require(not strangers, f"its knobs are not the model's: {strangers}")
        for name, value in knobs.items():
            finite = type(value) is not float or math.isfinite(value)
            require(
                type(value) is kinds[name] and finite,
                f"{name.upper()}={value!r} is not a valid {kinds[name].__name__}",
            )
        run.cfg = dataclasses.replace(run.cfg, **knobs)
        require(not (problems := check_eval_context(run.cfg)), "; ".join(problems))
        weights = dequantize_all(decode_tensors(header, body, *model_layout(run.cfg)))
    except Exception as error:  # of the coders, of JSON, of numpy: whatever strange bytes lead to
        raise InputError(f"cannot use the artifact {path}: {error}") from error
    model = build_model(run)
    model.load_state_dict(weights)
    return model


@functools.cache  # an edit during the run must not change what ran
def script_source() -> str:
    """The readable source of this script, also when it runs from its packed form."""
    return globals().get("PACKED_SOURCE") or Path(__file__).read_text(encoding="utf-8")


# The stub puts the unpacked source where tracebacks, inspect and Triton look for a file's lines.
PACKED_STUB = (
    "import base64,linecache,lzma\n"
    'PACKED_SOURCE=lzma.decompress(base64.b85decode("{payload}"),format=lzma.FORMAT_RAW,'
    'filters=[{{"id":lzma.FILTER_LZMA2,"preset":9}}]).decode()\n'
    'linecache.cache["<train_gpt>"]='
    '(len(PACKED_SOURCE),None,PACKED_SOURCE.splitlines(True),"<train_gpt>")\n'
    'exec(compile(PACKED_SOURCE,"<train_gpt>","exec"))\n'
)
# Parameters of LZMA for text: the position of a byte modulo 4 says nothing about it.
PACKING_FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0}


def pack_source(source: str) -> str:
    """A script that runs as `source` does, minified and compressed; idempotent.

    Only the standard library is used, so that the counted size depends on no installed package.
    """
    packed = lzma.compress(
        minify(source).encode(), format=lzma.FORMAT_RAW, filters=[PACKING_FILTER]
    )
    return PACKED_STUB.format(payload=base64.b85encode(packed).decode())


# Two such characters next to each other could become one token, or a warning of the compiler.
NEEDS_SPACE = re.compile(r"[\w.'\"]{2}")


def minify(source: str) -> str:
    """The source without comments, docstrings and optional whitespace: the same syntax tree.

    A statement takes one line, and each level of indentation one space. The text of a token is
    never changed. The result is the same for all versions of Python, unlike that of ast.unparse.
    """
    docstrings, output = docstring_positions(source), list[str]()
    statement, indent, first, previous_end = "", 0, (0, 0), (0, 0)
    for kind, text, start, end in source_tokens(source):
        if kind in ("INDENT", "DEDENT"):
            indent += 1 if kind == "INDENT" else -1
        elif kind == "NEWLINE":
            statement = docstrings.get(first, statement)
            output += [" " * indent, statement, "\n"] if statement else []
            statement = ""
        elif kind not in ("COMMENT", "NL", "ENDMARKER"):
            if not statement:
                first = start
            elif start != previous_end and NEEDS_SPACE.match(statement[-1] + text[0]):
                statement += " "
            statement, previous_end = statement + text, end
    return "".join(output)


Position = tuple[int, int]  # row, from 1, and column


def source_tokens(source: str) -> Iterator[tuple[str, str, Position, Position]]:
    """Kind, text, start and end of each token. An f-string is one token, as before Python 3.12."""
    lines, depth, f_string_start = list(io.StringIO(source)), 0, (0, 0)
    for token in tokenize.generate_tokens(iter(lines).__next__):
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            f_string_start = f_string_start if depth else token.start
            depth += 1
        elif kind.endswith("STRING_END"):
            depth -= 1
            if depth == 0:
                text = text_between(lines, f_string_start, token.end)
                yield "STRING", text, f_string_start, token.end
        elif depth == 0:
            yield kind, token.string, token.start, token.end


def text_between(lines: Sequence[str], start: Position, end: Position) -> str:
    """The text of a file's lines from `start` to `end`."""
    rows = [*lines[start[0] - 1 : end[0]]]
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "".join(rows)


def docstring_positions(source: str) -> dict[Position, str]:
    """Where docstrings start that are a line's only statement, and what must take their place."""
    positions = {}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, documented) or ast.get_docstring(node, clean=False) is None:
            continue
        docstring, *others = node.body
        if not others or others[0].lineno != docstring.end_lineno:
            needs_pass = not others and not isinstance(node, ast.Module)
            positions[docstring.lineno, docstring.col_offset] = "pass" if needs_pass else ""
    return positions


def check_sizes(run: Run, artifact: Path) -> dict[str, Any]:
    """Bytes on disk of the packed script and of the artifact; RunFailed if over the budget."""
    files = {"artifact_bytes": artifact, "code_bytes": run.directory / "train_gpt.py"}
    sizes = run.run_on_rank0(lambda: {k: p.stat().st_size for k, p in files.items()})
    total, budget = sum(sizes.values()), run.cfg.artifact_budget_bytes
    sizes |= {"total_bytes": total, "budget_bytes": budget}
    run.log("size", **sizes)
    if total > budget:
        raise RunFailed(
            f"code and artifact take {total} bytes of ARTIFACT_BUDGET_BYTES={budget}; "
            "lower *_BITS or the model's shape"
        )
    return sizes


# --- 9. Evaluation plans -------------------------------------------------------------------------
# A pass over the validation text is a list of steps for each rank, computed from integers alone
# before the pass starts: which windows to score, what to train on, and in which order. Every target
# is scored once, before anything is trained on it.

Span = tuple[int, int]  # of targets: the first, and one past the last


class Window(NamedTuple):
    """A stretch of inputs, of which the targets from `first` on are scored or learned."""

    start: int
    end: int
    first: int


class EvalStep(NamedTuple):
    """What one rank does at one tick of a pass. Ranks have equally many; some may be idle."""

    action: str  # score; adapt: score, then train each row's adapter; train: the weights; absorb
    windows: Sequence[Window] = ()
    resets: bool = False  # with new adapters, or a new optimizer of the weights
    num_learning_rows: int = 0  # adapt: how many of the rows, the first ones, have more to score
    width: int = 0  # adapt: least positions, so that no document's end tells in what is kept
    progress: float = 0.0  # train: from 0 at the first chunk to 1 at the last trained one
    chunk_frac: float = 0.0  # train: index of the chunk / number of chunks
    text: Span = (0, 0)  # train, absorb: what all ranks together learn from

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.windows), max([self.width, *(w.end - w.start for w in self.windows)])


def plan_windows(num_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Windows at 0, S, 2S, ... while there is something to score (w + T - S < N): the first scores
    all of its targets, each later one its last S. With S = T it is the plain evaluation.
    """
    context = seq_len - stride
    return [
        Window(w, min(w + seq_len, num_targets), w + context if w else 0)
        for w in range(0, max(1, num_targets - context), stride)
    ]


def rank_slice(items: Sequence[Any], rank: int, world_size: int) -> Sequence[Any]:
    """The contiguous share of `items` that `rank` works on; shares differ by at most one item."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


class EvalPlanner:
    """The steps of one rank, for each kind of pass."""

    def __init__(self, cfg: Config, rank: int, world_size: int):
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        self.seq_len, self.stride = cfg.score_seq_len, cfg.eval_stride or cfg.score_seq_len
        self.chunk_sizes = [*parse_schedule(cfg.ttt_short_chunks), (cfg.ttt_chunk_size, math.inf)]

    def split_over_ranks(self, step: EvalStep, windows: Sequence[Window]) -> list[EvalStep]:
        """Steps like `step` over this rank's share of the windows, as many as on every rank."""
        rows = (
            self.cfg.ttt_batch_seqs
            if step.action == "train"
            else max(1, self.cfg.val_batch_size // self.world_size // self.seq_len)
        )
        own = rank_slice(windows, self.rank, self.world_size)
        most = -(-len(windows) // self.world_size)
        return [step._replace(windows=own[i : i + rows]) for i in range(0, most, rows)]

    def score(self, num_targets: int, stride: int) -> list[EvalStep]:
        """A pass that only scores."""
        return self.split_over_ranks(
            EvalStep("score"), plan_windows(num_targets, self.seq_len, stride)
        )

    def train(self, span: Span, chunk: int, num_chunks: int, resets: bool) -> list[EvalStep]:
        """One epoch over the targets of `span`, chunk `chunk` of `num_chunks`, in full rows."""
        (first, stop), last = span, max(1, num_chunks - 1)
        rows = [Window(s, min(s + self.seq_len, stop), s) for s in range(first, stop, self.seq_len)]
        step = EvalStep("train", progress=chunk / last, chunk_frac=chunk / num_chunks, text=span)
        steps = self.split_over_ranks(step, rows)
        return [steps[0]._replace(resets=resets), *steps[1:]]

    def epochs(self, stop: int) -> list[EvalStep]:
        """All epochs over the text before `stop`, chunk by chunk: a global phase."""
        chunks = [*range(0, stop, self.cfg.ttt_chunk_tokens), stop]
        spans = [*itertools.pairwise(chunks)] * self.cfg.ttt_epochs
        return [
            step
            for i, span in enumerate(spans)
            for step in self.train(span, i, len(spans), resets=i == 0)
        ]

    def chunks(self, num_targets: int) -> list[EvalStep]:
        """Score each chunk by sliding windows, then train on it (#461, #1413); the last is not."""
        cfg, K, steps = self.cfg, self.cfg.ttt_chunk_tokens, list[EvalStep]()
        last, epochs = (num_targets - 1) // K, cfg.ttt_epochs if cfg.ttt_method == "chunk" else 0
        windows = plan_windows(num_targets, self.seq_len, self.stride)
        # A window belongs to the chunk of its first scored target.
        for chunk, own in itertools.groupby(windows, lambda w: w.first // K):
            steps += self.split_over_ranks(EvalStep("score"), [*own])
            span = chunk * K, (chunk + 1) * K
            if chunk == last:
                break
            for epoch in range(epochs):
                steps += self.train(span, chunk, last + 1, resets=chunk == epoch == 0)
            if cfg.needs_mixer:
                steps.append(EvalStep("update_ngrams", text=span))
        return steps

    def documents(self, bounds: Sequence[int]) -> list[EvalStep]:
        """Score each document in chunks and train its adapter on each but the last (#77, #1530);
        after as many documents as TTT_PHASES lists, train the weights on all that is scored.
        """
        documents, steps, K = (
            [*itertools.pairwise(bounds)],
            list[EvalStep](),
            self.cfg.ttt_chunk_tokens,
        )
        phase_ends = {n for n in parse_int_list(self.cfg.ttt_phases) if n < len(documents)}
        ends = {0, *phase_ends, len(documents)}
        if self.cfg.needs_mixer:  # whenever there is text enough for it
            ends |= {n for n, (a, b) in enumerate(documents, start=1) if b // K > a // K}
        for first, last in itertools.pairwise(sorted(ends)):
            shares = self.batches(documents[first:last])
            own = [step for batch in shares[self.rank] for step in self.batch(batch)]
            longest = max(sum(len(self.chunk_bounds(*d)) for d, *_ in share) for share in shares)
            steps += own + [EvalStep("score")] * (longest - len(own))
            if self.cfg.needs_mixer and last < len(documents):
                steps.append(EvalStep("update_ngrams", text=(bounds[first], bounds[last])))
            if last in phase_ends:
                steps += self.epochs(bounds[last])
        return steps

    def chunk_size(self, place: int) -> int:
        """Targets of a chunk by its place in the document, whose length would tell of its end."""
        return next(n for n, until in self.chunk_sizes if place < until)

    def chunk_bounds(self, first: int, stop: int) -> list[Span]:
        """The chunks of a document."""
        cuts = [first]
        while cuts[-1] < stop:
            cuts.append(min(cuts[-1] + self.chunk_size(cuts[-1] - first), stop))
        return [*itertools.pairwise(cuts)]

    def batches(self, documents: Sequence[Span]) -> list[list[Sequence[Span]]]:
        """The batches of documents of each rank: of like length, or in order if A is kept."""

        def longest_first(spans: Sequence[Span]) -> list[Span]:
            return sorted(spans, key=lambda span: span[0] - span[1])

        rows, order = self.cfg.ttt_batch_size, documents
        if not self.cfg.ttt_warm_start_a:  # else what a batch learns from must not tell of others
            rows = min(rows, -(-len(documents) // self.world_size))
            order = longest_first(documents)
        shares: list[list[Sequence[Span]]] = [[] for _ in range(self.world_size)]
        load = [0] * self.world_size
        for batch in (longest_first(order[i : i + rows]) for i in range(0, len(order), rows)):
            rank = load.index(min(load))  # with the least to do: steps, and rows in them
            shares[rank].append(batch)
            load[rank] += 16 * (batch[0][1] - batch[0][0]) + sum(b - a for a, b in batch)
        return shares

    def batch(self, documents: Sequence[Span]) -> list[EvalStep]:
        """The chunks of some documents, the longest first, side by side from their beginnings."""

        def window(document: Span, first: int, stop: int) -> Window:
            earliest = {"window": document[0], "text": 0, "incremental": first}
            full = first + self.chunk_size(first - document[0])  # `stop` may be the end
            return Window(max(earliest[self.cfg.ttt_context], full - self.seq_len), stop, first)

        rows = [
            [window(document, *chunk) for chunk in self.chunk_bounds(*document)]
            for document in documents
        ]
        steps, kept = list[EvalStep](), self.cfg.ttt_context == "incremental"
        for c, (_, _, first) in enumerate(rows[0]):
            steps.append(
                EvalStep(
                    "adapt",
                    [row[c] for row in rows if c < len(row)],
                    resets=c == 0,
                    num_learning_rows=sum(c + 1 < len(row) for row in rows),
                    width=kept * self.chunk_size(first - documents[0][0]),
                )
            )
        return steps


def document_bounds(ids: np.ndarray) -> list[int]:
    """The first target of each document, and the end; a document's last target is the next BOS."""
    return [0, *(1 + np.flatnonzero(ids[1:-1] == BOS_ID)).tolist(), len(ids) - 1]


def plan_adaptive(planner: EvalPlanner, ids: np.ndarray) -> list[EvalStep]:
    """The adaptive pass that TTT_METHOD names."""
    num_targets = len(ids) - 1
    if planner.cfg.ttt_method == "lora":
        return planner.documents(document_bounds(ids))
    if planner.cfg.ttt_method == "pretrain":
        return planner.epochs(num_targets) + planner.score(num_targets, planner.stride)
    return planner.chunks(num_targets)


# --- 10. Scoring ---------------------------------------------------------------------------------
# The score is in bits per byte: nats of all targets / (ln 2 * their bytes). EvalRunner runs the
# steps of a plan. Scorer adds up the losses and keeps the trace of the pass, which must show that
# every target was scored once and that no update read a target before it was scored.


class Score(NamedTuple):
    """Sums over the scored targets."""

    nats: float
    tokens: int
    num_bytes: int
    partial: bool
    eval_s: float
    problems: tuple[str, ...] = ()  # rules that the pass broke
    nll_T: np.ndarray = np.zeros(0)  # nats of the targets that this rank scored, 0 elsewhere

    def summary(self) -> dict[str, Any]:
        """Loss in nats a token, bits per byte, and what they were measured on."""
        return {
            "val_loss": round(self.nats / self.tokens, 8),
            "val_bpb": round(self.nats / math.log(2) / max(1, self.num_bytes), 8),
            "eval_s": round(self.eval_s, 3),
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "partial": self.partial,
        }


class StateUpdate(NamedTuple):
    """What an update read, and which targets it concerns if they are scored later."""

    step_index: int
    reads: Span
    affects: Span
    shared: bool  # with all ranks, or only with targets that the same rank scores


def rule_violations(
    updates: Sequence[StateUpdate], scored_at: np.ndarray, own_at: np.ndarray
) -> list[str]:
    """What a trace lacks of score-first in one pass: an update reads what was scored before it, and
    each stream of targets is scored with states that only ever get newer from left to right.
    """
    problems, streams = [], dict[tuple[Span, bool], list[int]]()
    for tick, (first, stop), feeds, shared in updates:
        if (latest := int(scored_at[first:stop].max(initial=0))) > tick:
            problems.append(
                f"the update at step {tick} read targets of {first} to {stop} that "
                f"were scored at step {latest}"
            )
        if not feeds[0] <= first <= stop <= feeds[1]:
            problems.append(f"targets {feeds} learned from {first} to {stop} of another stream")
        streams.setdefault((feeds, shared), []).append(tick)
    for ((first, stop), shared), ticks in streams.items():
        ticks_T = (scored_at if shared else own_at)[first:stop]
        if (np.diff(np.searchsorted(ticks, ticks_T[ticks_T > 0])) < 0).any():
            problems.append(f"targets {first} to {stop} were not scored from left to right")
    return problems


class Scorer:
    """Adds up nats and bytes in float64; every target must come exactly once, over all ranks."""

    def __init__(self, run: Run, validation: Validation):
        self.run, self.validation, self.step_index = run, validation, 1
        self.scored_at = np.zeros(validation.num_targets, dtype=np.int32)  # tick; 0 = not yet
        self.nll_T = np.zeros(validation.num_targets, dtype=np.float32)
        self.nats, self.num_bytes, self.updates = 0.0, 0, list[StateUpdate]()

    def record(self, first: int, nll: np.ndarray) -> None:
        """Take the nats of targets first, first + 1, ...; each must be new."""
        span = slice(first, first + len(nll))
        assert first >= 0 and span.stop <= len(self.scored_at), f"no targets {span}"
        assert not self.scored_at[span].any(), f"a target in {span} was scored before"
        self.scored_at[span], self.nll_T[span] = self.step_index, nll
        self.nats += float(nll.sum(dtype=np.float64))
        self.num_bytes += int(self.validation.target_bytes[span].sum())

    def finish(self, eval_s: float) -> Score:
        """The sums over all ranks; raises if a target was missed or scored by two ranks."""
        device, run = self.run.device, self.run
        sums = torch.tensor([self.nats, self.num_bytes], dtype=torch.float64, device=device)
        nats, num_bytes = run.all_reduce_sum(sums).tolist()
        both = torch.from_numpy(np.stack([self.scored_at, self.scored_at > 0])).to(device)
        scored_at, times = run.all_reduce_sum(both).cpu().numpy()
        assert (times == 1).all(), f"{(times != 1).sum()} targets not scored once"
        problems = rule_violations(self.updates, scored_at, self.scored_at)
        found = run.all_reduce_max(torch.tensor(float(bool(problems)), device=device))
        problems = problems or ["a rule was broken on another rank"] * int(found)
        return Score(
            nats,
            len(times),
            int(num_bytes),
            self.validation.partial,
            eval_s,
            tuple(problems),
            self.nll_T,
        )


class EvalBudget:
    """What a pass of limited time can still afford. Learning goes before scoring does."""

    def __init__(
        self, run: Run, plan: Sequence[EvalStep], limit_s: float, cost: tuple[float, float]
    ):
        self.run, self.limit_s, self.started_s = run, limit_s, time.perf_counter()
        self.cost, self.num_dropped = cost, 0
        scoring = [self.seconds(step) * (step.action != "train") for step in plan]
        self.to_score = [*np.cumsum(scoring[::-1])[::-1].tolist(), 0.0]
        # What calibration says counts as a tenth of the pass, until the pass says more.
        self.spent_s = self.work = 0.1 * self.to_score[0] + 1e-9

    def seconds(self, step: EvalStep) -> float:
        """What the step takes without learning, by calibration."""
        step_s, position_s = self.cost
        return step_s * (len(step.windows) > 0) + position_s * math.prod(step.shape)

    def drop_learning_if_late(self, step: EvalStep, tick: int) -> EvalStep:
        """The step, without its learning if there is no time for it and then to score the rest."""
        # A backward pass costs as much as two forward ones.
        share, steps = (
            step.num_learning_rows / max(1, len(step.windows)),
            self.run.cfg.ttt_grad_steps,
        )
        factor = 3.0 if step.action == "train" else share * (3 * steps - 1)
        learning, elapsed_s = factor * self.seconds(step), time.perf_counter() - self.started_s
        pace_s = (self.spent_s + elapsed_s) / self.work
        left_s = self.limit_s - elapsed_s - 1.1 * pace_s * (self.to_score[tick - 1] + learning)
        drop = left_s < 0 and (step.num_learning_rows > 0 or step.action == "train")
        if step.action == "train":  # ranks learn together or not at all
            drop = bool(self.run.all_reduce_max(torch.tensor(float(drop), device=self.run.device)))
        self.num_dropped += drop
        self.work += self.to_score[tick - 1] - self.to_score[tick] + (0.0 if drop else learning)
        idle = step._replace(num_learning_rows=0) if step.action == "adapt" else EvalStep("score")
        return idle if drop else step


class Batch(NamedTuple):
    """Windows as tensors, zeros to the right of each, where nothing attends to them."""

    ids_BT: Tensor
    target_BT: Tensor
    first: int  # the first scored position of any row
    mixed: MixerInputs | None
    weight_BT: Tensor  # of scored targets in training, 0 elsewhere


class EvalRunner:
    """Runs a plan: a model, what learns on the way, and the trace of it."""

    def __init__(
        self,
        run: Run,
        model: GPT,
        validation: Validation,
        plan: Sequence[EvalStep],
        *,
        adaptive: bool = False,
    ):
        self.run, self.model, self.validation, self.plan = run, model, validation, plan
        self.scorer, self.seq_len = Scorer(run, validation), run.cfg.score_seq_len
        self.mixer = Mixer(run) if adaptive and run.cfg.needs_mixer else None
        self.bounds, self.whole = document_bounds(validation.ids), (0, validation.num_targets)
        self.rows = max((len(step.windows) for step in plan if step.action == "score"), default=0)
        self.weights: WeightTrainer | None = None
        self.adapters: AdapterTrainer | None = None
        self.extents: list[Span] = []  # of the documents that the adapters belong to

    def run_steps(self, budget: EvalBudget | None = None) -> Score:
        """Every step in order; a budget may drop the learning of some."""
        started_s = time.perf_counter()
        for tick, planned in enumerate(self.plan, start=1):
            self.run.check_signal()
            self.scorer.step_index = tick
            step = budget.drop_learning_if_late(planned, tick) if budget else planned
            if planned.action == "train" and planned.resets:
                self.weights = None  # on every rank, even if there is no time for this step
            getattr(self, step.action)(step)
            if step.text[1]:
                self.scorer.updates.append(StateUpdate(tick, step.text, self.whole, True))
        self.run.synchronize()
        return self.scorer.finish(time.perf_counter() - started_s)

    def batch(self, windows: Sequence[Window], rows: int, seq_len: int) -> Batch:
        """The tensors of some windows, padded to rows x seq_len."""
        device, (ids, target_bytes, _), mixed = self.run.device, self.validation, None
        padded = [*windows, *[Window(0, -1, seq_len)] * (rows - len(windows))]
        start_B1, end_B1, first_B1 = np.array(padded).T[..., None]
        place_BT = start_B1 + np.arange(seq_len + 1)
        ids_BT = np.where(place_BT <= end_B1, ids.take(place_BT, mode="clip"), 0)
        keep_BT = ((place_BT >= first_B1) & (place_BT < end_B1))[:, :-1]
        weight_BT = keep_BT.astype(np.float32)
        if self.run.cfg.ttt_byte_weighted:
            weight_BT *= target_bytes.take(place_BT[:, :-1], mode="clip")
        if self.mixer is not None:  # the last tokens up to each input, zeros before the text
            past_BTK = place_BT[:, :-1, None] + np.arange(1 - self.mixer.num_context, 1)
            context_BTK = np.where(past_BTK < 0, 0, ids.take(past_BTK, mode="clip"))
            mixed = MixerInputs(
                self.mixer,
                torch.tensor(context_BTK, dtype=torch.int64, device=device),
                torch.tensor(keep_BT, device=device),
            )
        text_BT = torch.tensor(ids_BT, dtype=torch.int64, device=device)
        return Batch(
            text_BT[:, :-1],
            text_BT[:, 1:],
            int((first_B1 - start_B1).min()),
            mixed,
            torch.tensor(weight_BT, device=device),
        )

    def record(self, windows: Sequence[Window], nll_BT: Tensor, first: int) -> None:
        """Hand the nats of each row's scored targets to the scorer."""
        for window, nll_T in zip(windows, nll_BT.cpu().numpy(), strict=False):
            begin = window.start + first  # what the row's first number belongs to
            self.scorer.record(window.first, nll_T[window.first - begin : window.end - begin])

    def score(self, step: EvalStep) -> None:
        """Score windows; one shape for all, so that compiled code is compiled once."""
        if step.windows:
            batch = self.batch(step.windows, self.rows, self.seq_len)
            with self.weights.scoring() if self.weights else contextlib.nullcontext():
                self.record(step.windows, self.model.eval_nll(*batch[:4]), batch.first)

    def train(self, step: EvalStep) -> None:
        """Train the weights on the targets of all ranks' windows."""
        self.model.set_adapters([])
        if self.weights is None:
            self.weights = WeightTrainer(self.run, self.model)
        rows = len(step.windows)
        batch = self.batch(step.windows, rows, self.seq_len) if rows else None
        self.weights.step(batch, step.progress, step.chunk_frac)

    def adapt(self, step: EvalStep) -> None:
        """Score the next chunk of each document, then train its adapter on it."""
        updates, tick = self.scorer.updates, self.scorer.step_index
        if self.adapters is None or step.resets:
            starts = self.adapters.starts if self.adapters else []
            if self.adapters and self.run.cfg.ttt_warm_start_a:
                starts, reads = self.adapters.mean(), (min(self.extents)[0], max(self.extents)[1])
                updates.append(StateUpdate(tick - 1, reads, self.whole, False))
            self.extents = [
                (w.first, self.bounds[bisect.bisect_right(self.bounds, w.first)])
                for w in step.windows
            ]
            self.adapters = AdapterTrainer(self.run, self.model, len(step.windows), starts)
            self.weights = None  # their gradients are off now
        batch = self.batch(step.windows, *step.shape)
        self.record(step.windows, self.adapters.step(batch, step.num_learning_rows), batch.first)
        updates += [
            StateUpdate(tick, (window.first, window.end), extent, False)
            for window, extent in zip(
                step.windows[: step.num_learning_rows], self.extents, strict=False
            )
        ]

    def update_ngrams(self, step: EvalStep) -> None:
        """Show the mixer a text that is scored."""
        assert self.mixer is not None, "no mixer"
        first, stop = step.text  # the text's very first token is no target
        ids = self.validation.ids[first + (first > 0) : stop + 1]
        self.mixer.update(torch.tensor(ids, dtype=torch.int64, device=self.run.device))


@contextlib.contextmanager
def restore_model_after(cfg: Config, model: GPT) -> Generator[None]:
    """Let a pass change the model; in the end it is again what it was, to the bit."""
    before = [(param, param.detach().clone()) for param in model.parameters()]
    hashes, compiled = model.hashes, (model.run_block, model.nll)
    if cfg.ttt_method == "lora":  # chunks have too many lengths to compile for
        model.run_block, model.nll = run_block, softcapped_cross_entropy
    if cfg.eval_hash_rows:
        model.hashes = nn.ModuleList(
            [*hashes, EvalHashEmbedding(cfg).to(model.skip_weights.device)]
        )
    try:
        yield
    finally:
        model.set_adapters([])
        model.hashes, (model.run_block, model.nll) = hashes, compiled
        model.requires_grad_(True).zero_grad()
        for param, value in before:
            param.data.copy_(value)


def measure_step_cost(run: Run, model: GPT, plan: Sequence[EvalStep]) -> tuple[float, float]:
    """Seconds of a step without learning and of each position in it, on the slowest rank: measured
    on zeros in the longest steps of the plan, those of the fewest and of the most rows.
    """
    trained = [step.shape for step in plan if step.windows and step.action == "train"]
    if trained and model.run_block is not run_block:  # compiling is not what a step costs
        ids_BT = torch.zeros(max(trained), dtype=torch.int64, device=run.device)
        model.loss(ids_BT, ids_BT).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
    shapes = {step.shape for step in plan if step.windows and step.action != "train"}
    length = max((shape[1] for shape in shapes), default=1)
    rows = sorted(shape[0] for shape in shapes if shape[1] == length) or [0]
    measured = list[tuple[int, float]]()
    for size in (rows[0], rows[-1]):
        ids_BT, elapsed_s = torch.zeros(size, length, dtype=torch.int64, device=run.device), 0.0
        batch = Batch(ids_BT, ids_BT, 0, None, ids_BT.float())
        adapters = AdapterTrainer(run, model, size) if run.cfg.ttt_method == "lora" else None
        # Until all is compiled, and the past as long as it gets.
        for _ in range(2 + run.cfg.score_seq_len // length if size else 0):
            run.synchronize()
            started_s = time.perf_counter()
            adapters.step(batch, 0) if adapters else model.eval_nll(*batch[:2])
            run.synchronize()
            elapsed_s = time.perf_counter() - started_s
        measured.append((ids_BT.numel(), elapsed_s))
    model.set_adapters([])
    (few, few_s), (many, many_s) = measured
    position_s = max(0.0, many_s - few_s) / (many - few) if many > few else 0.0
    cost = torch.tensor([max(0.0, few_s - few * position_s), position_s], dtype=torch.float64)
    step_s, position_s = run.all_reduce_max(cost.to(run.device)).tolist()
    return step_s, position_s


USABLE_BUDGET_FRAC = (
    0.98  # share of EVAL_MAX_SECONDS to plan for: the trace is checked after the pass
)


def plan_within_budget(run: Run, model: GPT, ids: np.ndarray) -> tuple[list[EvalStep], EvalBudget]:
    """The adaptive pass; in longer chunks and strides if it could not even score in time."""
    cfg, end_s, cost = run.cfg, math.inf, (0.0, 1.0)
    if cfg.eval_max_seconds:
        left_s = USABLE_BUDGET_FRAC * cfg.eval_max_seconds - run.ledger["evaluation"]
        end_s = time.perf_counter() + run.broadcast_object(left_s)
    while True:
        plan = plan_adaptive(EvalPlanner(cfg, run.rank, run.world_size), ids)
        if cfg.eval_max_seconds:
            cost = measure_step_cost(run, model, plan)
        limit_s = run.broadcast_object(end_s - time.perf_counter())
        budget = EvalBudget(run, plan, limit_s, cost)
        most_s = float(run.all_reduce_max(torch.tensor(budget.to_score[0], device=run.device)))
        name = "ttt_chunk_size" if cfg.ttt_method == "lora" else "eval_stride"
        size = min(2 * (now := getattr(cfg, name)), (cfg.score_seq_len - EMBEDDING_CONTEXT) // 2)
        if 1.2 * most_s <= limit_s or size <= now:
            return plan, budget
        cfg = dataclasses.replace(cfg, **{name: size})


def evaluate(
    run: Run,
    model: GPT,
    validation: Validation,
    stride: int,
    *,
    adaptive: bool = False,
    learns: bool = True,
) -> Score:
    """Score every target once, by windows of `stride` or a pass that learns and leaves no trace."""
    model.schedule = model.schedules[-1]
    if not adaptive:
        plan = EvalPlanner(run.cfg, run.rank, run.world_size).score(validation.num_targets, stride)
        return EvalRunner(run, model, validation, plan).run_steps()
    with restore_model_after(run.cfg, model):
        plan, budget = plan_within_budget(run, model, validation.ids)
        budget.limit_s = budget.limit_s if learns else -math.inf
        score = EvalRunner(run, model, validation, plan, adaptive=True).run_steps(budget)
    if budget.num_dropped and learns:
        run.log(
            "warning",
            text=f"{budget.num_dropped} of {len(plan)} steps learned nothing, for "
            f"EVAL_MAX_SECONDS={run.cfg.eval_max_seconds}",
        )
    return score


def evaluate_and_log(run: Run, model: GPT, validation: Validation, kind: str) -> None:
    """Score as `kind` (prequant, quantized, sliding, ttt) says; log and keep it."""
    cfg = run.cfg
    stride = cfg.score_seq_len if kind in ("prequant", "quantized") else cfg.eval_stride
    with run.stage(f"evaluate_{kind}", "other" if kind == "prequant" else "evaluation"):
        score = evaluate(run, model, validation, stride, adaptive=kind == "ttt")
    if not math.isfinite(score.nats):
        raise RunFailed(f"final_{kind}: the loss is {score.nats}; lower the learning rates")
    if score.problems and not cfg.allow_noncompliant:
        raise RunFailed(f"final_{kind}: {score.problems[0]}")
    for problem in score.problems[:1]:
        run.log("warning", text=f"not compliant: {problem}")
    marks = {"compliant": not (score.partial or cfg.allow_noncompliant)}
    run.scores[f"final_{kind}"] = values = score.summary() | marks
    run.log(f"final_{kind}", **values)


# --- 11. Test-time training ----------------------------------------------------------------------
# What learns from scored text: WeightTrainer trains the weights of the model on chunks that all
# ranks have scored; AdapterTrainer trains one LoRA for each document and layer call, and leaves the
# weights as they are.

# Parameters with one row per block, which belong to that block.
ROW_PER_BLOCK = ("block_scalars.x0", "block_scalars.write", "block_scalars.carry")


def ttt_parameters(cfg: Config, model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that test-time training of the weights changes, by name.

    TTT_TRAIN=blocks selects the blocks that are not frozen, and every parameter whose name has
    norm, scale or lm_head in it (openai/parameter-golf#430); WeightTrainer masks the rows of
    ROW_PER_BLOCK that belong to frozen blocks.
    """
    frozen = tuple(f"blocks.{i}." for i in range(cfg.ttt_freeze_blocks))
    names = list(parameter_roles(model))
    if cfg.ttt_train == "all":
        chosen = [name for name in names if not name.startswith(frozen)]
    else:
        always = re.compile(r"lm_head|block_scalars\.shared|\b\w*(norm|scale)$")
        chosen = [
            name
            for name in names
            if always.search(name)
            or name in ROW_PER_BLOCK
            or (name.startswith("blocks.") and not name.startswith(frozen))
        ]
    return {name: model.get_parameter(name) for name in chosen}


class WeightTrainer:
    """Trains the model's own weights on scored text, data-parallel: the sum over all ranks."""

    def __init__(self, run: Run, model: GPT):
        self.run, self.model, cfg = run, model, run.cfg
        params, groups = ttt_parameters(cfg, model.requires_grad_(True)), dict[float, Any]()
        model.requires_grad_(False)
        # The hash table made for the pass has a learning rate of its own.
        table = f"hashes.{len(model.hashes) - 1}." if cfg.eval_hash_rows else "none"
        for name, param in params.items():
            lr = cfg.ttt_lr * (cfg.eval_hash_lr_mult if name.startswith(table) else 1.0)
            groups.setdefault(lr, []).append(param.requires_grad_(True))
        rows = [{"params": members, "base_lr": lr, "lr": lr} for lr, members in groups.items()]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(rows, momentum=cfg.ttt_momentum)
            if cfg.ttt_optimizer == "sgd"
            else torch.optim.AdamW(rows, betas=(cfg.ttt_momentum, 0.999), weight_decay=0.0)
        )
        self.params = [*params.values()]
        self.masked = [p for name, p in params.items() if name in ROW_PER_BLOCK]
        self.shadow = [p.detach().clone() for p in self.params if cfg.ttt_polyak]

    def step(self, batch: Batch | None, progress: float, chunk_frac: float) -> None:
        """One update on the mean loss over the rows of all ranks; None is a rank without rows.

        The learning rate follows a cosine of `progress`, times a ramp to TTT_RAMP over the first
        30 % of the chunks (`chunk_frac`).
        """
        cfg, params, total = self.run.cfg, self.params, torch.zeros(1, device=self.run.device)
        if batch is not None:
            loss = self.model.loss(batch.ids_BT, batch.target_BT, batch.weight_BT)
            loss.backward()  # type: ignore[no-untyped-call]
            total += batch.weight_BT.sum()
        flat = all_reduce_gradients(self.run, total, params)
        flat[1:] /= flat[0].clamp_min(1)
        if cfg.ttt_train == "blocks":
            for param in self.masked:
                assert param.grad is not None, "all_reduce_gradients sets every gradient"
                param.grad[: cfg.ttt_freeze_blocks] = 0
        if cfg.ttt_grad_clip:
            nn.utils.clip_grad_norm_(params, cfg.ttt_grad_clip)
        ramp = 1 + (cfg.ttt_ramp - 1) * min(1.0, chunk_frac / 0.3)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (0.5 * (1 + math.cos(math.pi * progress)) * ramp)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.shadow:
            torch._foreach_lerp_(self.shadow, [p.detach() for p in params], 1 - cfg.ttt_polyak)

    @contextlib.contextmanager
    def scoring(self) -> Generator[None]:
        """Within it the model holds the averaged weights, if there are any."""
        weights = [param.data for param in self.params]
        for param, average in zip(self.params, self.shadow, strict=False):
            param.data = average
        yield
        for param, weight in zip(self.params, weights, strict=True):
            param.data = weight


def lora_modules(model: GPT, index: int) -> list[AdaptedModule]:
    """The modules that get a LoRA at layer call `index`, in the order of TTT_LORA_TARGETS.

    q, k, v and o are attention's matrices, mlp both matrices of the MLP, head the output head (at
    the first call); attn and mlp_block have one LoRA parallel to the whole attention or MLP, from
    its normalized input to its output (openai/parameter-golf#1530).
    """
    block: Any = model.blocks[model.schedule[index].block]
    modules: dict[str, list[AdaptedModule]] = {
        "q": [block.attn.c_q],
        "k": [block.attn.c_k],
        "v": [block.attn.c_v],
        "o": [block.attn.proj],
        "attn": [block.attn],
        "mlp": [block.mlp.fc, block.mlp.proj],
        "mlp_block": [block.mlp],
        "head": [] if index else [model.head],
    }
    names = model.cfg.ttt_lora_targets.split(",")
    return [module for name in names for module in modules[name]]


def lora_sizes(module: AdaptedModule) -> tuple[int, int]:
    """Numbers of inputs and outputs of a LoRA on `module`."""
    if isinstance(module, CausalSelfAttention | MLP):
        matrix: Any = module.proj
        return len(matrix.weight), len(matrix.weight)
    return module.weight.size(1), len(module.weight)


class AdapterTrainer:
    """One adapter a document and visit, all documents of a batch at once; the weights stay."""

    def __init__(self, run: Run, model: GPT, rows: int = 1, starts: Sequence[Tensor] = ()):
        self.cfg, self.model, self.rows, self.num_documents = run.cfg, model, rows, rows
        cfg, generator = run.cfg, torch.Generator().manual_seed(run.cfg.seed)
        modules = [lora_modules(model, index) for index in range(len(model.schedule))]
        sizes = [lora_sizes(module) for module in itertools.chain(*modules)]
        # Every document starts with the same A, so that their order does not matter; B is zero.
        self.starts = [*starts] or [
            ((2 * torch.rand(cfg.ttt_lora_rank, width, generator=generator) - 1) * width**-0.5).to(
                run.device
            )
            for width, _ in sizes
        ]
        self.adapters = [
            BatchedLoRA(start_RI, rows, num_outputs, cfg.ttt_lora_alpha)
            for start_RI, (_, num_outputs) in zip(self.starts, sizes, strict=True)
        ]
        # Two calls of the same block have adapters of their own.
        adapters = iter(self.adapters)
        self.visits = [[(module, next(adapters)) for module in row] for row in modules]
        self.sums = [torch.zeros_like(start_RI) for start_RI in self.starts]
        self.params = [param for adapter in self.adapters for param in adapter.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=cfg.ttt_lora_lr,
            betas=(cfg.ttt_beta1, cfg.ttt_beta2),
            eps=1e-10,
            weight_decay=cfg.ttt_lora_wd,
        )
        self.past = (
            KVCache(len(model.schedule), cfg.score_seq_len)
            if cfg.ttt_context == "incremental"
            else None
        )
        model.requires_grad_(False)
        model.set_adapters(self.visits)

    def drop_finished_rows(self, rows: int) -> None:
        """Keep the first rows; the documents of the others have ended."""
        for adapter, sum_RI in zip(self.adapters, self.sums, strict=True):
            sum_RI += adapter.down_BRI.detach()[rows:].sum(dim=0)
        for param in self.params:
            param.data = param.data[:rows].clone()
            state = self.optimizer.state[param]
            state.update({k: x[:rows].clone() for k, x in state.items() if x.dim() == 3})
        self.rows = rows

    def mean(self) -> list[Tensor]:
        """The mean A of the documents, all of which have ended."""
        self.drop_finished_rows(0)
        return [sum_RI / self.num_documents for sum_RI in self.sums]

    def step(self, batch: Batch, learns: int) -> Tensor:
        """Nats of the batch before any update; then train the first `learns` rows on them."""
        if len(batch.ids_BT) <= 0.75 * self.rows:  # a copy of all has to pay
            self.drop_finished_rows(len(batch.ids_BT))
        weight_BT = batch.weight_BT[:learns, batch.first :]
        weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1)
        scored = list[Tensor]()
        for step in range(self.cfg.ttt_grad_steps if learns else 1):
            if step and self.past is not None:
                self.past.keep_positions(0, self.past.length - batch.ids_BT.size(1))  # once more
            with torch.set_grad_enabled(learns > 0):
                nll_BT, scored_BT = self.model.token_nll(
                    *batch[:3], past=self.past, mixed=None if step else batch.mixed
                )
            scored.append(scored_BT.detach())
            if learns:
                (nll_BT[:learns] * weight_BT).sum().backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                self.optimizer.zero_grad()
        return scored[0]


# --- 12. N-gram mixers ---------------------------------------------------------------------------
# A Mixer combines the model's next-token distribution with n-gram counts of the scored text. The
# result depends on the prefix alone and sums to 1 (except with MIXER=hedge_entropy). Counts and
# mixture weights change in `update` only, in the same way on every rank.


def mix_bits(bits: Tensor) -> Tensor:
    """A bijection of 64-bit integers that spreads every bit, by odd factors and shifts."""
    bits = bits * -7046029254386353131
    bits = (bits ^ ((bits >> 29) & (2**35 - 1))) * -4417276706812531889  # >> copies the sign bit
    return bits ^ ((bits >> 32) & (2**32 - 1))


class NgramCounts:
    """How often which token followed which context, for contexts of some lengths: a hash table of
    contexts and of contexts with their continuation. A row stores its 63-bit key, which tells it
    from others of the same slot. A table that becomes half full is emptied.
    """

    def __init__(self, orders: Sequence[int], vocab_size: int, bits: int, device: torch.device):
        self.orders, self.vocab_size, self.mask = orders, vocab_size, 2**bits - 1
        self.history_K = torch.zeros(max(1, *orders), dtype=torch.int64, device=device)
        self.num_tokens = self.most_keys = 0
        self.table = self.history_K.new_zeros(3, 2**bits)
        self.keys, self.counts, self.tops = self.table

    def find(self, key_N: Tensor, claim: bool = False) -> Tensor:
        """The row of each key, or the empty one where it belongs, which is then claimed for it."""
        row_N, todo = key_N & self.mask, torch.arange(len(key_N), device=key_N.device)
        while len(todo):
            row, key = row_N[todo], key_N[todo]
            held = self.keys[row]
            if claim:  # of several keys the largest gets the row, on any device
                self.keys.scatter_reduce_(0, row[held == 0], key[held == 0], "amax")
                held = self.keys[row]
            todo = todo[(held != 0) & (held != key)]
            row_N[todo] = (row_N[todo] + 1) & self.mask
        return row_N

    def hashes(self, context_NK: Tensor) -> Tensor:
        """A hash (N, O) of the last tokens, as many as each order says."""
        hashes = [torch.zeros_like(context_NK[:, 0])]
        for k in range(1, max(self.orders) + 1):
            hashes.append(mix_bits(hashes[-1] + context_NK[:, -k] + 1))
        return torch.stack([hashes[order] for order in self.orders], 1)

    def row_keys(self, hash_: Tensor, token: Tensor | None = None) -> Tensor:
        """Positive keys of contexts, or of their continuations by `token`."""
        mixed = hash_ if token is None else mix_bits(hash_ - token - 1)
        return (mixed & (2**63 - 1)).clamp_min(1)

    def update(self, ids_N: Tensor) -> None:
        """Count a stretch of text, which continues that of the last call."""
        for piece in torch.split(ids_N, min(16_384, len(self.keys) // (16 * len(self.orders)))):
            text = torch.cat([self.history_K, piece])
            window, self.history_K = text.unfold(0, len(self.history_K) + 1, 1), text[len(piece) :]
            hash_NO = self.hashes(window[:, :-1])
            token_NO = window[:, -1:].expand_as(hash_NO)
            key_M = torch.cat([self.row_keys(hash_NO), self.row_keys(hash_NO, token_NO)]).flatten()
            self.most_keys += len(key_M)
            if 2 * self.most_keys > len(self.keys):  # some were there before: count them
                self.most_keys = int(self.keys.count_nonzero()) + len(key_M)
                if 2 * self.most_keys > len(self.keys):  # old text says little of what comes
                    self.table.zero_()
                    self.most_keys = len(key_M)
            row_M = self.find(key_M, claim=True)
            self.counts.index_add_(0, row_M, torch.ones_like(row_M))
            context, pair = row_M.chunk(2)
            best = self.counts[pair] * self.vocab_size + token_NO.flatten()
            self.tops.scatter_reduce_(0, context, best, "amax")
            self.num_tokens += len(piece)

    def look_up(self, context_NK: Tensor) -> Tensor:
        """(4, N, O) of contexts: hash, count, and the most frequent next token's count and id."""
        hash_NO = self.hashes(context_NK)
        row_NO = self.find(self.row_keys(hash_NO).flatten()).view_as(hash_NO)
        top_NO, token_NO = self.tops[row_NO] // self.vocab_size, self.tops[row_NO] % self.vocab_size
        return torch.stack([hash_NO, self.counts[row_NO], top_NO, token_NO])

    def count(self, hash_NO: Tensor, token_NC: Tensor) -> Tensor:
        """How often each of the tokens followed each context, (N, C, O)."""
        key_NCO = self.row_keys(hash_NO[:, None], token_NC[..., None])
        return self.counts[self.find(key_NCO.flatten())].view_as(key_NCO)


# Evidence is added up in whole numbers of 2^-24: no order of the sum, and no split, changes it.
FIXED_POINT_ONE = 2**24


class Hedge:
    """One set of weights, which fall exponentially by each expert's mean loss. The experts are
    the model and an n-gram smoothed to (count + delta) / (total + delta * V) for each length.
    """

    def __init__(self, cfg: Config, device: torch.device):
        orders, self.cfg = cfg.mixer_contexts, cfg
        self.delta_O = torch.tensor([0.1 if order < 2 else 0.01 for order in orders], device=device)
        num_experts = 1 + (cfg.mixer == "hedge_entropy") + len(orders)
        self.log_weight_E = torch.zeros(num_experts, device=device)
        self.log_weight_E[0] = 2.0  # trust the model first
        self.evidence = torch.zeros(1 + num_experts, dtype=torch.int64, device=device)

    def mix(self, p_NCM: Tensor, count_NCO: Tensor, seen_4NO: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture (N, C); N and the sums over N of the experts' losses on the first token."""
        total_NO = seen_4NO[1] + self.delta_O * self.cfg.vocab_size
        p_NCE = torch.cat([p_NCM, (count_NCO + self.delta_O) / total_NO[:, None]], 2)
        loss_NE = (-p_NCE[:, 0].log() * FIXED_POINT_ONE).long()
        return p_NCE @ self.log_weight_E.softmax(0).double(), F.pad(loss_NE, (1, 0), value=1).sum(0)

    def step(self, evidence: Tensor) -> None:
        self.log_weight_E -= self.cfg.hedge_eta * (
            evidence[1:] / evidence[0].clamp_min(1) / FIXED_POINT_ONE
        )


class Backoff:
    """From short to long contexts, p <- (1 - share) * p + share * count / total where one was seen.
    The share, of a kind of context, is the mean posterior probability that the n-gram made the
    scored tokens (online EM). Kinds are lengths, by how often and how uniformly it was continued.
    """

    def __init__(self, cfg: Config, device: torch.device):
        size = 9 * len(cfg.mixer_contexts)
        self.sums_2S, self.evidence = torch.zeros(2, 2, size, dtype=torch.int64, device=device)
        self.step(self.evidence)

    def mix(self, p_NCM: Tensor, count_NCO: Tensor, seen_4NO: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture (N, C); sums over N, by kind, of the posteriors and the contexts seen."""
        p_NC, (_, total_NO, top_NO, _), posteriors = p_NCM[..., 0], seen_4NO, list[Tensor]()
        sure_NO = top_NO / total_NO.clamp_min(1).double()
        kind_NO = (sure_NO >= 0.6).long() + (sure_NO >= 0.95) + 3 * (total_NO >= 2)
        kind_NO += 3 * (total_NO >= 4) + 9 * torch.arange(total_NO.size(1), device=total_NO.device)
        share_NO = torch.where(total_NO > 0, self.share_S[kind_NO], 0.0)
        part_NCO = count_NCO * (share_NO / total_NO.clamp_min(1))[:, None]
        for part_NC, share_N in zip(part_NCO.unbind(2), share_NO.unbind(1), strict=True):
            p_NC = part_NC + (1 - share_N[:, None]) * p_NC
            posteriors.append(part_NC[:, 0] / p_NC[:, 0] * FIXED_POINT_ONE)
        sums = torch.stack([torch.stack(posteriors, 1).long(), (total_NO > 0).long()]).flatten(1)
        return p_NC, torch.zeros_like(self.sums_2S).index_add_(1, kind_NO.flatten(), sums)

    def step(self, evidence: Tensor) -> None:
        self.sums_2S += evidence
        posterior_S, number_S = self.sums_2S.double()
        self.share_S = (posterior_S / FIXED_POINT_ONE + 1) / (
            number_S + 21
        )  # at first 1 of 21 tokens


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, (N, 1)."""
    logp_NV = logits_NV.log_softmax(1)
    return -(logp_NV.exp() * logp_NV).sum(1, keepdim=True)


class Mixer:
    """The model's distribution after temperature, then tilt, then mixture, as the knobs say."""

    def __init__(self, run: Run):
        self.run, self.cfg, cfg = run, run.cfg, run.cfg
        orders = sorted({*cfg.mixer_contexts, *cfg.tilt_contexts})
        self.mixed = [orders.index(order) for order in cfg.mixer_contexts]
        self.tilting = [orders.index(order) for order in cfg.tilt_contexts]
        bits = cfg.ngram_table_bits if orders else 4
        self.counts = NgramCounts(orders or [0], cfg.vocab_size, bits, run.device)
        self.num_context = len(self.counts.history_K)
        self.weights: Hedge | Backoff | None = None
        if cfg.mixer != "none":
            self.weights = (Backoff if cfg.mixer == "backoff" else Hedge)(cfg, run.device)

    @torch.no_grad()
    def predict(
        self, logits_NV: Tensor, context_NK: Tensor, token_NC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p (N, C) in float64 of the tokens; the evidence of the first ones, if there is."""
        cfg, seen_4NO = self.cfg, self.counts.look_up(context_NK)
        if (coldest := cfg.adaptive_temperature) != 1:  # the surer (by entropy), the sharper
            doubt_N1 = entropy(logits_NV) / math.log(cfg.vocab_size)
            logits_NV = logits_NV / (1 - (1 - coldest) * (1 - doubt_N1))
        norm_N1 = logits_NV.logsumexp(1, keepdim=True)
        logp_NC = (logits_NV.gather(1, token_NC) - norm_N1).double()
        if self.tilting:
            _, total_NO, top_NO, token_NO = seen_4NO[..., self.tilting]
            fires_NO = top_NO >= cfg.ngram_tilt_share * total_NO.double() - 1e-9  # 0.8 * 5 is 4
            fires_NO &= total_NO >= cfg.ngram_tilt_min_count
            longest_N1 = fires_NO.cumsum(1).argmax(1, keepdim=True)  # of those that fire
            hint_N1 = token_NO.gather(1, longest_N1)
            tilt_N1 = cfg.ngram_tilt * fires_NO.any(1, keepdim=True).double()
            p_N1 = (logits_NV.gather(1, hint_N1) - norm_N1).double().exp()
            # p * exp(tilt * [token is the hint]) / Z, where Z = 1 + p(hint) * (exp(tilt) - 1)
            logp_NC += tilt_N1 * (token_NC == hint_N1) - torch.log1p(p_N1 * torch.expm1(tilt_N1))
        if self.weights is None:
            return logp_NC, logp_NC.new_zeros(0)
        p_NCM, seen_4NO = logp_NC.exp()[..., None], seen_4NO[..., self.mixed]
        if cfg.mixer == "hedge_entropy":  # one number for every token: this is no distribution
            guess_N1 = torch.exp(-entropy(logits_NV).double())
            p_NCM = torch.cat([p_NCM, guess_N1[..., None].expand_as(p_NCM)], 2)
        count_NCO = self.counts.count(seen_4NO[0], token_NC)
        p_NC, evidence = self.weights.mix(p_NCM, count_NCO, seen_4NO)
        is_early = cfg.mixer != "backoff" and self.counts.num_tokens < cfg.hedge_min_tokens
        return logp_NC if is_early else p_NC.log(), evidence

    def nll(self, logits_NV: Tensor, context_NK: Tensor, target_N: Tensor) -> Tensor:
        """Nats of the targets, float32; what they say of the weights waits for `update`."""
        logp_N1, evidence = self.predict(logits_NV, context_NK, target_N[:, None])
        if self.weights is not None:
            self.weights.evidence += evidence
        return -logp_N1[:, 0].float()

    def log_probs(self, logits_NV: Tensor, context_NK: Tensor) -> Tensor:
        """The logarithm of the whole distribution, (N, V) in float64."""
        every = torch.arange(logits_NV.size(1), device=logits_NV.device)
        return self.predict(logits_NV, context_NK, every.expand(len(logits_NV), -1))[0]

    def update(self, ids: Tensor) -> None:
        """Learn, on every rank, from the text that all together have scored since the last call."""
        if self.weights is not None:
            self.weights.step(self.run.all_reduce_sum(self.weights.evidence))
            self.weights.evidence.zero_()
        if self.mixed or self.tilting:
            self.counts.update(ids)


# --- main ----------------------------------------------------------------------------------------
# main() reports errors and chooses the exit status; execute() is a run from start to end.


def main() -> int:
    """Run as the environment says; 0, or 1 (failed), 2 (bad input), 143 (stopped by a signal).

    SIGTERM and SIGINT are ignored from its end on, so that the process ends with this status.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, raise_interrupted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be unable to encode a name
            stream.reconfigure(errors="backslashreplace")
    try:
        run_mode(os.environ)
        ignore_signals()
        return 0
    except Exception as error:
        expected = explain_error(error)
        if expected is None:
            raise
        ignore_signals()
        return report_error(expected)


def run_mode(env: Mapping[str, str]) -> None:
    """Print a description for MODE=describe; else start the run that the environment describes."""
    cfg = config_from_env(env)
    if cfg.mode == "describe":
        if env.get("RANK", "0") == "0":
            print(describe(cfg), flush=True)
        return
    with start_run(cfg, env) as run:
        execute(run)


def execute(run: Run) -> None:
    """Train and export unless the artifact exists; read the artifact back, score it, report."""
    cfg, trains = run.cfg, run.cfg.trains
    artifact = artifact_path(run)
    has_artifact = run.run_on_rank0(artifact.exists)
    require(trains or has_artifact, f"ARTIFACT={artifact} does not exist; MODE=train makes one")
    processor, tokenizer_sha256 = load_tokenizer(cfg)
    validation = load_validation(cfg, processor) if trains else None
    find_compressor(cfg.compressor)  # a missing package must not be found after the training
    prepare_directory(run, artifact)
    if validation is not None and not has_artifact:
        train_and_write(run, artifact, validation, tokenizer_sha256)
    sizes = check_sizes(run, artifact)
    if cfg.mode == "train":
        fail_over_budget(find_overruns(log_budget(run, sizes)))
        return
    with run.stage("read_artifact", "evaluation"):
        model = read_artifact(artifact, run, tokenizer_sha256)
    groups = run.run_on_rank0(lambda: artifact_sizes(artifact.read_bytes()))
    run.log("bytes", **groups)
    if validation is None:  # the artifact, not the environment, has the vocabulary's size
        validation = load_validation(run.cfg, processor)
    evaluate_and_log(run, model, validation, "quantized")
    if cfg.eval_stride:
        evaluate_and_log(run, model, validation, "sliding")
    if cfg.adapts:
        evaluate_and_log(run, model, validation, "ttt")
    finish(run, sizes, groups)


def artifact_path(run: Run) -> Path:
    """The artifact that the run writes and scores; MODE=eval can score any."""
    if run.cfg.artifact and not run.cfg.trains:
        return Path(run.cfg.artifact)
    return run.directory / "artifact.bin"


# --- RUN_DIR: what a run finds there, and what it records


def prepare_directory(run: Run, artifact: Path) -> None:
    """Restore what this run has done in RUN_DIR before, write the packed script, open the log.

    InputError if the folder holds a finished run, another run or files that no run has written.
    """
    state, identity = run.run_on_rank0(lambda: claim_directory(run, artifact))
    run.ledger.update(state.get("ledger", {}))
    run.scores.update(state.get("scores", {}))
    log_setup(run)
    run.log("data_identity", **identity["data"])


def claim_directory(run: Run, artifact: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank 0: check RUN_DIR and write the packed script; the earlier state and the identity."""
    cfg, directory = run.cfg, run.directory
    check_own_files(directory)
    require(
        not (cfg.trains and (directory / "submission.json").exists()),
        f"{directory} holds a finished run; set another RUN_ID or RUN_DIR",
    )
    code = pack_source(script_source()).encode()
    identity = {
        "config": dataclasses.asdict(cfg),
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "data": data_identity(cfg),
    }
    state = find_earlier_state(run, artifact, identity)
    write_atomic(directory / "train_gpt.py", code)
    if cfg.trains and "artifact_sha256" not in state:
        write_atomic(directory / "run_state.json", json.dumps(identity).encode())
    for path in (directory / "train.log", directory / "metrics.jsonl"):
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            run.append(path.name, "")  # end the line that a kill cut short
    return state, identity


def check_own_files(directory: Path) -> None:
    """Raise InputError if RUN_DIR holds foreign files under the names that a run writes."""
    require_regular_file(directory / "train_gpt.py", PACKED_STUB.partition("lzma.dec")[0])
    require_regular_file(directory / "train_gpt_source.py", '"""Train', "from __future__")
    require_regular_file(directory / "train.log", "config ")
    require_regular_file(directory / "metrics.jsonl", '{"event": ')
    require_regular_file(directory / "run_state.json", "{")
    submission, checkpoints = directory / "submission.json", directory / "checkpoint"
    require_regular_file(submission, "{")
    is_own = not submission.exists() or b'"source_sha256"' in submission.read_bytes()
    require(is_own, f"{submission} was not written by a run; move it away")
    if not os.path.lexists(checkpoints):
        return
    is_folder = checkpoints.is_dir() and not checkpoints.is_symlink()
    require(is_folder, f"{checkpoints} is not a folder; move it away, or set another RUN_DIR")
    for path in checkpoints.iterdir():
        has_name = re.fullmatch(r"step_[0-9]{9,}(\.[0-9a-f]{32}\.tmp)?", path.name)
        require(
            has_name and path.is_dir() and not path.is_symlink(),
            f"{path} is not a checkpoint of a run; move it away, or set another RUN_DIR",
        )


def find_earlier_state(run: Run, artifact: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Ledger and scores of the training that made RUN_DIR's artifact; empty if there is none.

    InputError if the artifact or the checkpoints there are of another run.
    """
    cfg, path = run.cfg, run.directory / "run_state.json"
    remedy = "set another RUN_ID or RUN_DIR"
    is_own = artifact.resolve().parent == run.directory.resolve()
    require(
        is_own or not (run.directory / "artifact.bin").exists(),
        f"{run.directory} holds another artifact than ARTIFACT={artifact}; {remedy}",
    )
    has_artifact = is_own and artifact.exists()
    if has_artifact and cfg.trains:
        require(cfg.resume, f"{artifact} exists; set RESUME=1 to score it, or another RUN_ID")
        require(path.exists(), f"{artifact} exists, but not {path}; {remedy}")
    is_continued = has_artifact or (cfg.resume and bool(checkpoint_folders(run)))
    if not path.exists() or not is_continued:
        return {}
    try:
        state = json.loads(read_regular_file(path, MAX_META_BYTES))
        check_same_inputs(state, identity)
        if has_artifact:
            check_state(state, run)
    except (*READ_ERRORS, AttributeError) as error:  # also of entries of other types
        raise InputError(f"{path} does not fit this run: {error!s:.300}; {remedy}") from error
    if not has_artifact:
        return {}
    if cfg.trains:
        check_same_run(state["config"], cfg, artifact)
    require(
        hash_bytes(artifact.read_bytes()) == state["artifact_sha256"],
        f"{artifact} is not the artifact that {path} records; {remedy}",
    )
    return state


def check_same_inputs(state: Any, identity: Mapping[str, Any]) -> None:
    """Raise InputError if an earlier state is of another script or another data set."""
    names = ("config", "code_sha256", "data")
    is_whole = isinstance(state, dict) and all(name in state for name in names)
    require(is_whole, f"it does not hold {', '.join(names)}")
    is_same = state["code_sha256"] == identity["code_sha256"]
    require(is_same, "it was written by another version of the script")
    earlier, data = state["data"], identity["data"]
    changed = [key for key in sorted(data.keys() & earlier.keys()) if data[key] != earlier[key]]
    require(not changed, f"DATA_PATH or TOKENIZER_PATH now holds other data ({', '.join(changed)})")


def check_state(state: Mapping[str, Any], run: Run) -> None:
    """Raise InputError unless the entries of run_state.json have the right types and ranges.

    The only score in it is that of the training: passes over the artifact are always run again.
    """
    names = ("ledger", "scores", "artifact_sha256")
    require(all(name in state for name in names), f"it does not hold {', '.join(names)}")
    ledger, scores = state["ledger"], state["scores"]
    require(
        ledger.keys() == run.ledger.keys() and all(map(is_duration, ledger.values())),
        f"ledger does not hold the seconds of {', '.join(run.ledger)}",
    )
    require(scores.keys() == {"train_end"}, "scores must be those of train_end alone")
    steps, train_s = scores["train_end"]["steps"], scores["train_end"]["train_s"]
    is_count = type(steps) is int and 0 < steps <= state["config"]["iterations"]
    require(is_count, f"steps {steps!r:.40} are not in [1, ITERATIONS]")
    require(
        is_duration(train_s) and train_s <= ledger["training"] + 1e-3,
        f"train_s {train_s!r:.40} is not within the training's {ledger['training']} s",
    )


def hash_bytes(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


# --- Training and export


def train_and_write(
    run: Run, artifact: Path, validation: Validation, tokenizer_sha256: str
) -> None:
    """Train a model, score its float weights, quantize it and write the artifact."""
    cfg = run.cfg
    stream = TokenStream(find_shards(cfg, "train"), cfg.vocab_size)
    loader = BatchLoader(cfg, stream, rank=run.rank, world_size=run.world_size)
    model = build_model(run)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    run.log("model", params=num_params, plan=format_schedule(model.schedule))
    run.log("data", train_tokens=stream.num_tokens, val_targets=validation.num_targets)
    trainer = train(run, model, loader, lambda: evaluate(run, model, validation, cfg.score_seq_len))
    evaluate_and_log(run, model, validation, "prequant")
    hessians = dict[str, KroneckerHessian]()
    if cfg.quantizer == "gptq":
        with run.stage("calibrate", "training"):
            hessians = calibrate(run, model, loader, trainer.progress)
    with run.stage("write_artifact"):
        run.run_on_rank0(lambda: write_artifact(run, artifact, model, hessians, tokenizer_sha256))


def write_artifact(
    run: Run,
    artifact: Path,
    model: GPT,
    hessians: Mapping[str, KroneckerHessian],
    tokenizer_sha256: str,
) -> None:
    """Rank 0: write the artifact, and before it the state that a restart then needs."""
    payload = quantize_and_encode(run, model, hessians, tokenizer_sha256)
    path = run.directory / "run_state.json"
    state = json.loads(path.read_bytes()) | {
        "ledger": run.ledger,
        "scores": {"train_end": run.scores["train_end"]},
        "artifact_sha256": hash_bytes(payload),
    }
    write_atomic(path, json.dumps(state).encode())
    write_atomic(artifact, payload)


def quantize_and_encode(
    run: Run, model: GPT, hessians: Mapping[str, KroneckerHessian], tokenizer_sha256: str
) -> bytes:
    """Rank 0: the bytes of the artifact; solved scales are set so that it fills the budget."""
    cfg, stacks = run.cfg, group_matrices(run.cfg, model, hessians)
    encode = functools.partial(encode_model, run, model, stacks, tokenizer_sha256)
    if not cfg.solves_scales or not stacks:
        return encode(1.0)
    code_bytes = (run.directory / "train_gpt.py").stat().st_size
    return fill_budget(stacks, encode, max(1, cfg.artifact_budget_bytes - code_bytes))


def encode_model(
    run: Run, model: GPT, stacks: Sequence[MatrixGroup], tokenizer_sha256: str, multiplier: float
) -> bytes:
    """The bytes of the artifact with all quantization scales times `multiplier`."""
    run.check_signal()
    tensors = quantize_model(run.cfg, model, stacks, multiplier)
    payload = encode_artifact(run.cfg, tensors, tokenizer_sha256)
    run.log(
        "quantized", multiplier=multiplier, artifact_bytes=len(payload), **code_statistics(tensors)
    )
    return payload


# --- Rules and results


class Track(NamedTuple):
    """The largest budgets that a competition track allows."""

    total_bytes: int  # packed script and artifact
    training_s: float
    evaluation_s: float


TRACKS = {  # a run under another name, such as demo, has only its own budgets
    "track_10min_16mb": Track(16_000_000, 600.0, 600.0),
    "track_h200_10min_16mb": Track(16_000_000, 600.0, 600.0),
    "track_cpu_10min_1mb": Track(1_000_000, 600.0, 600.0),
}
FINAL_SCORES = ("final_ttt", "final_sliding", "final_quantized")  # the first one is the result


class Verdict(NamedTuple):
    """What the rules say of a run."""

    final: str  # log event of the score that counts
    overruns: list[str]  # budgets that the run has exceeded: it fails
    reasons: list[str]  # why the run is not compliant; empty if it is


def judge(
    track: str, scores: Mapping[str, Mapping[str, Any]], budget: Mapping[str, Any]
) -> Verdict:
    """Choose the final score, and compare a run with its own budgets and with its track's.

    `scores` are the values of the log events final_*, `budget` is that of submission.json.
    """
    final = next(name for name in FINAL_SCORES if name in scores)
    score, overruns = scores[final], find_overruns(budget)
    reasons = [*overruns, *find_loose_budgets(track, budget)]
    if score["partial"]:
        reasons.append("the score covers only a part of the validation text")
    elif not score["compliant"]:
        reasons.append("the score is by a method that the rules forbid (ALLOW_NONCOMPLIANT=1)")
    return Verdict(final, overruns, reasons)


def find_overruns(budget: Mapping[str, Any]) -> list[str]:
    """The budgets that were exceeded; a budget of 0 is no limit."""
    times, sizes = budget["time"], budget["bytes"]
    amounts = {
        "training took": (times["training_s"], times["training_budget_s"], "s"),
        "evaluation took": (times["evaluation_s"], times["evaluation_budget_s"], "s"),
        "code and artifact take": (sizes["total_bytes_max"], sizes["budget_bytes"], "bytes"),
    }
    return [
        f"{name} {used:,} {unit} of {limit:,}"
        for name, (used, limit, unit) in amounts.items()
        if not 0 <= used <= (limit or math.inf)  # also for nan
    ]


def find_loose_budgets(track: str, budget: Mapping[str, Any]) -> list[str]:
    """The budgets that are looser than the track allows."""
    if track not in TRACKS:
        return []
    limits, times = TRACKS[track], budget["time"]
    amounts = {
        "ARTIFACT_BUDGET_BYTES": (budget["bytes"]["budget_bytes"], limits.total_bytes),
        "MAX_WALLCLOCK_SECONDS": (times["training_budget_s"], limits.training_s),
        "EVAL_MAX_SECONDS": (times["evaluation_budget_s"], limits.evaluation_s),
    }
    return [
        f"{name}={value:g} is looser than the {limit:,} of {track}"
        for name, (value, limit) in amounts.items()
        if not 0 < value <= limit
    ]


def log_budget(run: Run, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Log the seconds spent; the entry `budget` of submission.json."""
    spent = {name: round(elapsed_s, 3) for name, elapsed_s in run.ledger.items()}
    times = {
        "training_s": spent["training"],
        "evaluation_s": spent["evaluation"],
        "training_budget_s": run.cfg.max_wallclock_seconds,
        "evaluation_budget_s": run.cfg.eval_max_seconds,
    }
    run.log("ledger", **times, other_s=spent["other"])
    total = {"total_bytes_max": sizes["total_bytes"], "budget_bytes": sizes["budget_bytes"]}
    return {"time": times, "bytes": total}


def fail_over_budget(problems: Sequence[str]) -> None:
    if problems:
        raise RunFailed("; ".join(problems))


def finish(run: Run, sizes: Mapping[str, int], groups: Mapping[str, int]) -> None:
    """Write submission.json; RunFailed if a budget or TARGET_VAL_BPB was exceeded."""
    cfg, budget = run.cfg, log_budget(run, sizes)
    verdict = judge(cfg.track, run.scores, budget)
    budget["bytes"]["groups"] = groups
    score = run.scores[verdict.final]
    train_end = run.scores.get("train_end", {"steps": 0, "train_s": 0.0})
    result = {
        "val_bpb": score["val_bpb"],
        "val_loss": score["val_loss"],
        "steps": train_end["steps"],
        "train_s": train_end["train_s"],
        "eval_s": budget["time"]["evaluation_s"],
        "artifact_bytes": sizes["artifact_bytes"],
    }
    report = {
        "author": cfg.submission_author,
        "date": f"{datetime.date.today()}",
        "name": cfg.submission_name or run.directory.name,
        "track": cfg.track,
        "val_bpb": score["val_bpb"],
        "val_bpb_std": 0.0,
        "seeds": {str(cfg.seed): result},
        "artifact_bytes_max": sizes["artifact_bytes"],
        "code_bytes": sizes["code_bytes"],
        "source_sha256": hash_bytes(script_source().encode()),
        "hardware": describe_hardware(run),
        "versions": VERSIONS,
        "previous": "",
        "compliant": not verdict.reasons,
        "budget": budget,
    }
    text = json.dumps(report, indent=2).encode()
    run.run_on_rank0(lambda: write_atomic(run.directory / "submission.json", text))
    reasons = "; ".join(verdict.reasons) or "none"
    run.log("submission", compliant=not verdict.reasons, reasons=reasons)
    problems = verdict.overruns
    if 0 < cfg.target_val_bpb < score["val_bpb"]:
        problems.append(f"val_bpb {score['val_bpb']} is above TARGET_VAL_BPB={cfg.target_val_bpb}")
    fail_over_budget(problems)


def describe(cfg: Config) -> str:
    """Knobs, shape, layer schedule and sizes of the model that a run would train; needs no data."""
    with torch.device("meta"):
        model = GPT(cfg, ATTENTION_BACKENDS["sdpa"](), torch.float32)
    sizes, groups = Counter[str](), Counter[str]()
    for name, role in parameter_roles(model).items():
        count = model.get_parameter(name).numel()
        sizes[role.quant_group] += count
        groups[role.optim_group] += count
    matrices, attention = flops_per_token(cfg)
    changed, lines = changed_knobs(cfg), list[str]()
    for name, value in dataclasses.asdict(cfg).items():
        mark = "*" if name.upper() in changed else " "
        lines.append(f"{mark} {name.upper()}={format_line(str(value))}")
    lines += [
        "",
        format_event("model", params=sizes.total(), **sizes),
        format_event("groups", **groups),
        format_event("flops_per_token", matrices=matrices, attention=attention),
        "plan block(skip row)>: " + format_schedule(model.schedule),
        format_event("bytes_before_compression", **estimate_bytes(cfg, sizes)),
    ]
    return "\n".join(lines)


def estimate_bytes(cfg: Config, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of weights (by quantization group before compression) and code, and the budget."""
    code_bytes = len(pack_source(script_source()))
    bits: dict[str, float] = {**cfg.bits}
    for group in sizes.keys() - {"gate", "control"}:
        if cfg.solves_scales and cfg.bits[group] < PLAIN_BITS:
            bits[group] = MAX_BITS_PER_WEIGHT
    weight_bytes = int(sum(count * bits[group] for group, count in sizes.items()) / 8)
    if cfg.solves_scales:
        weight_bytes = min(weight_bytes, cfg.artifact_budget_bytes - code_bytes)
    return {
        "weights": weight_bytes,
        "code": code_bytes,
        "total": weight_bytes + code_bytes,
        "budget": cfg.artifact_budget_bytes,
    }


# --- Signals and errors


def raise_interrupted(number: int, frame: Any) -> None:
    """Signal handler outside of a run's loops, where nothing has to be saved."""
    ignore_signals()
    raise Interrupted("stopped by a signal")


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def explain_error(error: Exception) -> Exception | None:
    """The error to report without a traceback; None for an error of the program itself."""
    if isinstance(error, InputError | RunFailed | Interrupted | OSError):
        return error
    text = str(error).partition("\n")[0][:300]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return RunFailed(
            f"out of memory ({text}); lower MICRO_BATCH_TOKENS, VAL_BATCH_SIZE, TTT_BATCH_SIZE "
            "or the model's shape"
        )
    if dist.is_initialized() and re.search("gloo|NCCL|Connection (closed|reset)", str(error)):
        if posted(PEER_MET_BAD_INPUT):
            return InputError("another rank has met bad input, see its message")
        return RunFailed(f"the connection to another rank is lost ({text})")
    return None


def report_error(error: Exception) -> int:
    """Print an error once for all ranks that have it, and return the exit status.

    A rank above 0 waits, and prints its error if rank 0 has reported none.
    """
    status = {InputError: 2, Interrupted: 143}.get(type(error), 1)
    text, rank = f"{type(error).__name__}: {error}", os.environ.get("RANK") or "0"
    if rank == "0" or not (os.environ.get("WORLD_SIZE") or "").isdecimal():
        print(text, file=sys.stderr, flush=True)
        post(RANK0_REPORTED)
        wait_for_ranks()
    elif not rank0_reports(status):
        print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
        if status == 2:
            post(PEER_MET_BAD_INPUT)
    post(RANKS_ENDED)
    return status


# Counters in the store of the process group, which outlives a broken connection of two ranks.
RANK0_REPORTED, PEER_MET_BAD_INPUT, RANKS_ENDED = "rank0_reported", "bad_input", "ranks_ended"
REPORT_WAIT_S, LAST_RANKS_WAIT_S = 5.0, 1.0


def rank0_reports(status: int) -> bool:
    """Wait for rank 0's report. torchrun ends this process when rank 0 has ended with an error."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
    deadline_s = time.monotonic() + REPORT_WAIT_S
    reported = posted(RANK0_REPORTED)
    while not reported and time.monotonic() < deadline_s:
        time.sleep(0.1)
        reported = posted(RANK0_REPORTED)
    ignore_signals()
    return reported > 0


def wait_for_ranks() -> None:
    """Rank 0, which may hold the store: let the ranks end first that have the error as well."""
    deadline_s = time.monotonic() + LAST_RANKS_WAIT_S
    while dist.is_initialized() and time.monotonic() < deadline_s:
        if posted(RANKS_ENDED) >= dist.get_world_size() - 1:
            break
        time.sleep(0.02)


def post(key: str) -> None:
    """Tell the other ranks, if there is a process group, that `key` holds for this one."""
    count_posts(key, 1)


def posted(key: str) -> int:
    """How many ranks have posted `key`; 1 if rank 0, which may hold the store, has ended."""
    return count_posts(key, 0)


def count_posts(key: str, added: int) -> int:
    if not dist.is_initialized():
        return 0
    try:
        return int(dist.distributed_c10d._get_default_store().add(key, added))
    except RuntimeError:
        return 1


if __name__ == "__main__":
    os._exit(main())  # without the interpreter's teardown, which signals and gloo can abort
