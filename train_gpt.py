"""Train, compress and score a language model whose code and weights fit in 16,000,000 bytes.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # 8 GPUs, all defaults
    RECIPE=records/demo/cpu.env python train_gpt.py            # a small model, on data/demo
    MODE=describe python train_gpt.py                          # shape, groups, bytes; needs no data
    MODE=eval ARTIFACT=logs/x/artifact.bin python train_gpt.py # score an artifact, fresh process
    MODE=generate PROMPT="def " ARTIFACT=logs/x/artifact.bin python train_gpt.py # write text

The environment is the only configuration: every knob is a field of Config, spelled in capitals.
RECIPE=path/to/run.env reads KEY=value lines as defaults below the real environment. A run trains
(at most MAX_WALLCLOCK_SECONDS), quantizes, writes the artifact, reads it back from the file into a
fresh model, and scores that model in bits per byte. Everything it writes lies in RUN_DIR. A run
that was killed continues from its last checkpoint when it is restarted with the same RUN_DIR.

Sections: 1. Configuration  2. Run context  3. Data  4. Model  5. Optimization
          6. Training  7. Quantization  8. Artifact  9. Evaluation plans
          10. Scoring  11. Test-time training  12. N-gram mixers  13. Generation
Tensor suffixes: B sequences, T positions, D model width, H query heads, K key/value heads,
                 E width of a head, F MLP width, V vocabulary, O x I a weight's out x in,
                 N tokens, L equal matrices in a stack, R adapter rank. Other letters are
                 explained where they are used.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":

    def end_interrupted(*_: object) -> None:
        """Signal handler during the imports, which take seconds."""
        os.write(2, b"Interrupted: stopped by a signal\n")
        os._exit(143)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_interrupted)
    # OpenMP threads sleep while they wait for each other: spinning makes a run several times slower
    # as soon as other programs use the cores. The variable is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ast
import bisect
import builtins
import bz2
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
import keyword
import math
import platform
import re
import resource
import shutil
import stat
import string
import struct
import subprocess
import time
import tokenize
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
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
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import flex_attention

# What tools use, or users see, of a packed script, in which other names are short.
__all__ = [
    *("BOS_ID", "Config", "InputError", "Interrupted", "RunFailed", "StepCost", "check_sizes"),
    *("config_from_env", "evaluate", "load_tokenizer", "load_validation", "prepare_directory"),
    *("read_artifact", "require", "start_run"),
]

# --- 1. Configuration ----------------------------------------------------------------------------
# One frozen dataclass, one line per knob. config_from_env refuses values out of range,
# contradictions, and names that look like a misspelled knob, all in one message; errors in the
# lines of a recipe are reported before the rest. Derived values are properties, never fields.


class InputError(ValueError):
    """Something that a user gave is wrong: a knob, a file, a data set."""


class RunFailed(RuntimeError):
    """The run itself failed: a budget was exceeded, the loss is not finite."""


class Interrupted(RuntimeError):
    """A signal stopped the run, which can be resumed from its last checkpoint."""


def knob(default: Any, doc: str = "", **meta: Any) -> Any:
    """Declare a knob; `low` and `high` are inclusive. The packed script has no `doc` and `unit`.

    `stored` marks the knobs that the artifact stores and that override the environment in
    MODE=eval: the shape of the model, and SEED, from which the evaluation draws the LoRA's A.
    """
    unset = {"unit": "", "low": None, "high": None, "choices": (), "stored": False}
    assert meta.keys() <= unset.keys(), f"unknown: {meta.keys() - unset.keys()}"
    return field(default=default, metadata={"doc": doc, **unset, **meta})


BITS = (4, 5, 6, 7, 8, 16)
MODES = ("all", "train", "eval", "describe", "generate")
PRECISIONS = ("auto", "bf16", "fp32")
KERNEL_CHOICES = ("auto", "fa4", "fa3", "fa2", "flex", "sdpa")
LOADER_CHOICES = ("stream", "shuffled", "coprime")
DATA_CHECKS = ("quick", "full")
METRICS_CHOICES = ("none", "tensorboard", "wandb")
EMBED_INITS = ("normal", "overtone")
MIX_INITS = ("last", "phase")
MATRIX_INITS = ("default", "orthogonal", "orthogonal_scaled")
QAT_GRIDS = ("rows", "artifact")
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
MAX_DURATION_S = 10**9  # 32 years


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every knob of the script; an environment variable has the field's name in capitals."""

    # Run
    mode: str = knob(
        "all",
        "all = train and score; train = stop after the artifact; eval = score ARTIFACT; "
        "describe = print the configuration; generate = write text from ARTIFACT",
        choices=MODES,
    )
    recipe: str = knob("", "file of KEY=value lines, used as defaults below the environment")
    run_id: str = knob("", "name of the run; empty = date, time and process number")
    run_dir: str = knob("", "folder for everything the run writes; empty = logs/RUN_ID")
    seed: int = knob(
        1337, "random seed of initialization and data order", low=0, high=2**31 - 1, stored=True
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
    compile_forward: bool = knob(
        True, "on a GPU, compile the whole forward pass of training: faster steps, longer warm-up"
    )
    kernels: str = knob(
        "auto",
        "auto = on a GPU, use fused products, CUDA graphs and quack where right and faster",
        choices=("auto", "off"),
    )
    attention: str = knob(
        "auto", "attention kernel; auto = the best one installed", choices=KERNEL_CHOICES
    )
    metrics: str = knob(
        "none", "also send metrics.jsonl's numbers to this package", choices=METRICS_CHOICES
    )
    target_val_bpb: float = knob(
        0.0, "exit with status 1 if the final score is above this; 0 = no bound", unit="bpb", low=0
    )
    # Data
    data_path: str = knob(
        "./data/datasets/fineweb10B_sp8192", "folder with *_train_*.bin and *_val_*.bin shards"
    )
    tokenizer_path: str = knob("", "SentencePiece model; empty = that of DATA_PATH")
    check_data: str = knob(
        "quick",
        "compare SHA-256 with manifest.json: quick = of validation files, full = of all",
        choices=DATA_CHECKS,
    )
    loader: str = knob("stream", "order of training windows", choices=LOADER_CHOICES)
    isolate_documents: bool = knob(
        True, "attention does not cross document boundaries (BOS)", stored=True
    )
    train_seq_len: int = knob(
        2048, "training sequence length", unit="tokens", low=1, high=2**20, stored=True
    )
    train_batch_tokens: int = knob(
        786_432, "tokens per optimizer step, over all ranks", unit="tokens", low=1, high=2**30
    )
    train_seq_schedule: str = knob(
        "", "shorter sequences first: LEN@PROGRESS,... (until that progress), then TRAIN_SEQ_LEN"
    )
    train_batch_schedule: str = knob(
        "", "smaller batches first, in the same form; then TRAIN_BATCH_TOKENS"
    )
    micro_batch_tokens: int = knob(
        98_304, "maximum tokens in one forward pass of a rank", unit="tokens", low=1, high=2**30
    )
    # Model
    vocab_size: int = knob(8192, "number of tokenizer pieces", low=4, high=65_536, stored=True)
    num_layers: int = knob(11, "number of distinct blocks", low=1, high=256, stored=True)
    model_dim: int = knob(
        512, "width of the residual stream", unit="channels", low=2, high=16_384, stored=True
    )
    num_heads: int = knob(8, "query heads; divides MODEL_DIM", low=1, high=1024, stored=True)
    num_kv_heads: int = knob(4, "key/value heads; divides NUM_HEADS", low=1, high=1024, stored=True)
    mlp_mult: float = knob(4.0, "MLP width / MODEL_DIM", low=0.125, high=64, stored=True)
    leaky_slope: float = knob(
        0.5, "the MLP activation is leaky_relu(x, slope)^2; 0 = relu^2", low=0, high=1, stored=True
    )
    tie_embeddings: bool = knob(True, "the output head is the token embedding", stored=True)
    tied_embed_init_std: float = knob(
        0.005, "initial standard deviation of the token embedding if tied", low=0
    )
    embed_init: str = knob(
        "normal", "token embedding: normal, or singular values S_k ~ k^-1/2", choices=EMBED_INITS
    )
    resid_mix_init: str = knob(
        "last",
        "resid_mix starts as (1, 0), the identity (last), or early blocks prefer x0 (phase)",
        choices=MIX_INITS,
    )
    init: str = knob("orthogonal", "initial matrices; see GPT.init_weights_", choices=MATRIX_INITS)
    logit_softcap: float = knob(30.0, "logits are cap * tanh(z / cap)", low=1e-3, stored=True)
    asym_logit_rescale: bool = knob(
        True, "separate trainable caps for positive and negative logits", stored=True
    )
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", low=1, stored=True)
    rope_scaling: str = knob(
        "ntk", "rotary base beyond TRAIN_SEQ_LEN: NTK-scaled, or unchanged", choices=("ntk", "none")
    )
    rope_dims: int = knob(
        16, "rotated channels per head; 0 = all", unit="channels", low=0, stored=True
    )
    qk_gain_init: float = knob(5.0, "initial gain of each query head", low=0)
    ln_scale: bool = knob(
        True, "scale the normalized input of block i by 1/sqrt(i + 1)", stored=True
    )
    skip_gates: bool = knob(True, "U-net skips are gated blends instead of sums", stored=True)
    xsa_last_n: int = knob(
        11, "exclusive self-attention (XSA) in the last n blocks", low=0, stored=True
    )
    xsa_layers: str = knob("", "XSA in these blocks as well, such as 0,2,5-7", stored=True)
    attn_gate: str = knob(
        "sparse", "gate of each attention head; see AttnOutputGate", choices=GATES, stored=True
    )
    gate_window: int = knob(
        12, "input channels of the small gates", unit="channels", low=1, stored=True
    )
    sparse_attn_gate_scale: float = knob(
        0.5, "factor inside the sigmoid of the sparse gate", low=0, stored=True
    )
    smear_gate: str = knob(
        "lambda", "mix the previous token into each; see SmearGate", choices=SMEARS, stored=True
    )
    bigram_vocab_size: int = knob(
        0, "rows of the hashed bigram table; 0 = no table", low=0, high=2**20, stored=True
    )
    bigram_dim: int = knob(
        128, "width of the bigram table", unit="channels", low=2, high=2**14, stored=True
    )
    trigram_vocab_size: int = knob(
        0, "rows of the hashed trigram table; 0 = no table", low=0, high=2**20, stored=True
    )
    trigram_dim: int = knob(
        32, "width of the trigram table", unit="channels", low=2, high=2**14, stored=True
    )
    trigram_hash: str = knob(
        "mixing", "hash of trigrams; polynomial (PR #430) collides", choices=HASHES, stored=True
    )
    value_residual: str = knob(
        "none",
        "values of block 0 added in later blocks (resformer: with factors for both; vrl: with "
        "one), or, without values, x0 added after each block (x0)",
        choices=VALUES,
        stored=True,
    )
    ve_layers: str = knob(
        "", "blocks that add the shared value embedding, such as 9,10", stored=True
    )
    ve_dim: int = knob(
        128, "width of the value embedding", unit="channels", low=2, high=2**14, stored=True
    )
    num_loops: int = knob(2, "extra passes through the looped blocks", low=0, high=16, stored=True)
    loop_start: int = knob(3, "first looped block", low=0, stored=True)
    loop_end: int = knob(5, "last looped block", low=0, stored=True)
    enable_looping_at: str = knob(
        "0.35", "training progress at which loops start: one value, or one for each loop"
    )
    parallel_residual: str = knob(
        "lanes", "parallel attention and MLP; see Block.forward", choices=LANES, stored=True
    )
    parallel_start_layer: int = knob(8, "first parallel block", low=0, stored=True)
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
    muon_fast_weight: float = knob(
        0.0,
        "share of a second, faster momentum in Muon's update; 0 = one momentum",
        low=0,
        high=0.99,
    )
    muon_fast_momentum: float = knob(0.85, "the faster momentum", low=0, high=0.9999)
    muon_beta2: float = knob(
        0.0, "NorMuon: decay of the mean squares of an update's rows; 0 = off", low=0, high=0.9999
    )
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = knob(
        "polar", "Newton-Schulz coefficients: classic, or Polar Express", choices=COEFFICIENTS
    )
    muon_row_norm: bool = knob(True, "normalize the update's rows before Newton-Schulz (MuonEq-R)")
    muon_wd: float = knob(0.095, "weight decay of Muon's matrices (decoupled)", low=0)
    muon_cautious_wd: bool = knob(False, "MUON_WD only where the update also shrinks the weight")
    grad_clip_norm: float = knob(0.3, "maximum global gradient norm; 0 = no clipping", low=0)
    # Schedule
    iterations: int = knob(
        20_000, "maximum number of optimizer steps", unit="steps", low=1, high=2**31
    )
    max_wallclock_seconds: float = knob(
        600.0, "training budget; 0 = none", unit="s", low=0, high=MAX_DURATION_S
    )
    warmup_steps: int = knob(
        20, "steps that only trigger compilation; their effect is undone", unit="steps", low=0
    )
    warmdown_frac: float = knob(
        0.85, "final fraction of training with a falling learning rate", low=0, high=1
    )
    warmdown_iters: int = knob(
        0, "warmdown in steps at the measured pace; 0 = use WARMDOWN_FRAC", unit="steps", low=0
    )
    warmdown_power: float = knob(
        1.0, "exponent of the warmdown; 1 = linear, 2 = quadratic", low=0.01, high=100
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
    deep_supervision: float = knob(
        0.0,
        "weight of a second loss, of the stream after half of the layer calls; part of train_loss",
        low=0,
    )
    deep_supervision_frac: float = knob(
        0.5, "initial fraction of training with that loss", low=0, high=1
    )
    late_qat_threshold: float = knob(
        0.0,
        "fake quantization while the learning rate multiplier is below this; 0 = off",
        low=0,
        high=1,
    )
    qat_grid: str = knob(
        "rows", "late QAT: a scale per row, or the artifact's scales", choices=QAT_GRIDS
    )
    train_log_every: int = knob(200, "steps between training log lines", unit="steps", low=1)
    val_loss_every: int = knob(1000, "steps between validations; 0 = none", unit="steps", low=0)
    val_sample_tokens: int = knob(
        0, "these validations score only the first tokens; 0 = all", unit="tokens", low=0
    )
    # Quantization and artifact
    # The codes of solved scales have no width: the entropy coder decides what they take.
    attn_bits: int = knob(
        8, "attention: code width (not for solved scales); 16 = fp16", unit="bits", choices=BITS
    )
    mlp_bits: int = knob(
        8, "MLP: code width (not for solved scales); 16 = fp16", unit="bits", choices=BITS
    )
    embed_bits: int = knob(
        8,
        "embedding and head: code width (not for solved scales); 16 = fp16",
        unit="bits",
        choices=BITS,
    )
    table_bits: int = knob(
        8,
        "hashed and value embeddings: code width (not for solved scales); 16 = fp16",
        unit="bits",
        choices=BITS,
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
        "quantization scales: solved = equal marginal loss per bit, filling the byte budget; "
        "max, percentile = from the weights of each row",
        choices=SCALINGS,
    )
    clip_sigmas: str = knob(
        "", "clipping range in row deviations: one number, or attn:13,mlp:11.5,embed:14,table:12.85"
    )
    gptq_calibration_batches: int = knob(
        16, "maximum number of calibration batches of TRAIN_BATCH_TOKENS", low=1, high=2**20
    )
    gptq_reserve_seconds: float = knob(
        12.0, "part of the training budget for calibration, at most a tenth", unit="s", low=0
    )
    compressor: str = knob("ans", "entropy coder of the artifact", choices=COMPRESSOR_CHOICES)
    artifact_budget_bytes: int = knob(
        16_000_000, "limit for packed code plus artifact", unit="bytes", low=1
    )
    artifact: str = knob("", "artifact for MODE=eval and generate; empty = RUN_DIR/artifact.bin")
    # Evaluation
    eval_seq_len: int = knob(0, "evaluation context; 0 = TRAIN_SEQ_LEN", unit="tokens", low=0)
    eval_stride: int = knob(
        64, "targets scored per sliding window; 0 = no sliding pass", unit="tokens", low=0
    )
    val_batch_size: int = knob(
        524_288,
        "tokens per evaluation step, over all ranks; each takes at most 4 * MICRO_BATCH_TOKENS",
        unit="tokens",
        low=1,
        high=2**30,
    )
    val_tokens_limit: int = knob(
        0, "score only the first tokens (marked partial); 0 = all", unit="tokens", low=0
    )
    eval_max_seconds: float = knob(
        600.0,
        "evaluation budget; 0 = none; adaptation stops first",
        unit="s",
        low=0,
        high=MAX_DURATION_S,
    )
    ttt_method: str = knob(
        "lora",
        "test-time training: chunk = weights per text chunk, lora = a LoRA per document, "
        "pretrain = weights before scoring (not compliant)",
        choices=TTT_METHODS,
    )
    ttt_lr: float = knob(0.005, "peak learning rate of weight training, cosine decay", low=0)
    ttt_optimizer: str = knob("sgd", "optimizer of weight training", choices=("sgd", "adamw"))
    ttt_momentum: float = knob(
        0.9, "momentum of weight training, or AdamW's beta1", low=0, high=0.9999
    )
    ttt_grad_clip: float = knob(
        1.0, "maximum gradient norm of weight training; 0 = no clipping", low=0
    )
    ttt_epochs: int = knob(3, "epochs over each text chunk", low=1, high=1000)
    ttt_chunk_tokens: int = knob(
        32_768,
        "size of a text chunk, for the training of all weights and for n-gram counts",
        unit="tokens",
        low=1,
        high=2**40,
    )
    ttt_batch_seqs: int = knob(
        32, "maximum sequences per training step of a rank", unit="rows", low=1, high=2**16
    )
    ttt_freeze_blocks: int = knob(0, "number of first blocks that stay frozen", low=0)
    ttt_train: str = knob(
        "all", "trained parameters: all, or unfrozen blocks and vectors", choices=("all", "blocks")
    )
    ttt_ramp: float = knob(
        1.0, "learning rate factor reached, from 1, after 30% of the text chunks", low=0
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
        "incremental",
        "context of a document chunk: see EvalPlanner.plan_document_batch",
        choices=TTT_CONTEXTS,
    )
    ttt_chunk_size: int = knob(
        24, "size of a document chunk: targets between two adapter steps", unit="tokens", low=1
    )
    ttt_batch_size: int = knob(64, "adapters trained side by side", low=1, high=2**16)
    ttt_lora_rank: int = knob(32, "LoRA rank", low=1, high=4096)
    ttt_lora_alpha: float = knob(32.0, "LoRA alpha; the output is scaled by alpha / rank", low=0)
    ttt_lora_targets: str = knob("q,k,v,o,mlp,head", "modules with a LoRA; see lora_modules")
    ttt_lora_lr: float = knob(
        -1.0, "LoRA learning rate (AdamW); -1 = chosen by the first documents, or 0.001", low=-1
    )
    ttt_num_lrs: int = knob(
        0,
        "learning rates tried side by side by each document; their probabilities are mixed; "
        "0 = 3 if the first documents choose them, else 1",
        low=0, high=8,
    )  # fmt: skip
    ttt_lora_wd: float = knob(0.0, "weight decay of the LoRA", low=0)
    ttt_beta1: float = knob(0.0, "beta1 of the LoRA's AdamW", low=0, high=0.9999)
    ttt_beta2: float = knob(0.99, "beta2 of the LoRA's AdamW", low=0, high=0.99999)
    ttt_grad_steps: int = knob(1, "optimizer steps per document chunk", low=1, high=100)
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
    noncanonical_factor: float = knob(
        1.0,
        "factor of the probability of tokens that a BPE tokenizer never emits after the one before",
        low=1e-12,
        high=1,
    )
    mixer: str = knob("none", "n-gram mixture over scored text; see section 12", choices=MIXERS)
    mixer_orders: str = knob(
        "",
        "context lengths of the mixed n-grams; empty = 0-2 (Hedge), 1-6,8,12,16 (back-off after "
        "LoRA) or 2-6,8 (other back-off); back-off adds 1-3 within the document",
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
    ngram_tilt_min_frac: float = knob(
        0.8, "minimum relative frequency of that continuation", low=0, high=1
    )
    ngram_tilt_min_count: int = knob(1, "minimum count of that continuation", low=1)
    ngram_table_bits: int = knob(
        22, "log2 of the rows of the n-gram table (32 bytes each)", unit="bits", low=10, high=30
    )
    # Generation
    prompt: str = knob("", "MODE=generate: the text to continue")
    temperature: float = knob(0.8, "temperature of sampling; 0 = always the likeliest token", low=0)
    top_k: int = knob(50, "sample among the k likeliest tokens; 0 = among all", low=0)
    max_new_tokens: int = knob(
        200, "length of the continuation at most", unit="tokens", low=0, high=2**20
    )

    def __post_init__(self) -> None:
        """Raise one InputError with every value out of range and every contradiction."""
        ranges = {f.name: out_of_range(f, getattr(self, f.name)) for f in fields(self)}
        # Rules may expand lists or divide, so values out of range are replaced by defaults first.
        checked = object.__new__(Config)
        for f in fields(self):
            value = f.default if ranges[f.name] else getattr(self, f.name)
            object.__setattr__(checked, f.name, value)
        problems = [problem for problem in ranges.values() if problem]
        problems += check_combinations(checked)
        problems += check_eval_context(checked) if checked.trains else []
        require(not problems, "\n  ".join(["invalid configuration:", *problems]))

    @property
    def trains(self) -> bool:
        """Whether this configuration describes the model, or else an artifact does."""
        return self.mode not in ("eval", "generate")

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
    def rotary_bytes(self) -> int:
        """Memory of the two float32 rotary tables, for training and for the longest context."""
        longest = max(self.train_seq_len, self.score_seq_len)
        return 6 * self.rotary_dims * (self.train_seq_len + longest)

    @property
    def score_seq_len(self) -> int:
        return self.eval_seq_len or self.train_seq_len

    @property
    def adapts(self) -> bool:
        """Whether an adaptive pass follows the plain ones."""
        return self.ttt_method != "none" or self.needs_mixer

    @property
    def mixer_contexts(self) -> list[int]:
        """Lengths of the contexts whose n-grams are mixed in; negative: within the document."""
        backoff = "1-6,8,12,16" if self.mixes_afterwards else "2-6,8"
        usual = {"none": "", "backoff": backoff}.get(self.mixer, "0-2")
        within_document = [*range(-3, 0)] if self.mixer == "backoff" else []
        return within_document + parse_int_list(self.mixer_orders or usual) if usual else []

    @property
    def tilt_contexts(self) -> list[int]:
        return parse_int_list(self.ngram_tilt_orders) if self.ngram_tilt else []

    @property
    def needs_mixer(self) -> bool:
        """Whether a Mixer stands between the logits and the score."""
        return (self.mixer, self.ngram_tilt, self.adaptive_temperature) != ("none", 0, 1)

    @property
    def knows_one_lr(self) -> bool:
        """Whether a mixer that is applied at once, or LoRA over documents, need a single rate."""
        return (self.needs_mixer and not self.mixes_afterwards) or self.ttt_warm_start_a

    @property
    def chooses_lrs(self) -> bool:
        """Whether the first documents choose the learning rates of LoRA."""
        return self.ttt_lora_lr < 0 and self.ttt_method == "lora" and not self.knows_one_lr

    @property
    def lora_lrs(self) -> Sequence[float]:
        """The learning rates of LoRA where they are not chosen: the first one, its third, ..."""
        first_lr = LORA_LRS[0] if self.ttt_lora_lr < 0 else self.ttt_lora_lr
        return [first_lr / 3**i for i in range(self.num_lrs)]

    @property
    def num_lrs(self) -> int:
        """How many learning rates of LoRA a document has; see TTT_NUM_LRS."""
        return self.ttt_num_lrs or (3 if self.chooses_lrs else 1)

    @property
    def mixes_afterwards(self) -> bool:
        """Whether n-grams are mixed in after the pass: LoRA then trains all documents at once.

        Possible if the mixture needs nothing from the model but the probability of each target.
        """
        only_target = (self.ngram_tilt, self.adaptive_temperature) == (0, 1)
        return self.ttt_method == "lora" and only_target and self.mixer in ("backoff", "hedge")

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
    def trains_on_grid(self) -> bool:
        """Whether late QAT rounds to the scales that the artifact then stores."""
        return self.late_qat_threshold > 0 and self.qat_grid == "artifact"

    @property
    def train_seconds(self) -> float:
        """Seconds of the training loop, 0 = no limit; the rest is kept for calibration."""
        reserve_s = self.gptq_reserve_seconds if self.quantizer == "gptq" else 0.0
        return max(self.max_wallclock_seconds - reserve_s, 0.9 * self.max_wallclock_seconds)


MAX_ROTARY_BYTES = 2**30
MAX_LIST_LEN = 4096  # entries of a list knob; checked before a range is expanded


def parse_int_list(text: str) -> list[int]:
    """The integers of a list such as 0,2,5-7; ValueError for a bad, empty or long range."""
    parts = [part.split("-") if "-" in part else (part, part) for part in text.split(",") if text]
    spans = [(int(first), int(last)) for first, last in parts]
    sizes = [last - first + 1 for first, last in spans]
    if min(sizes, default=1) < 1 or sum(sizes) > MAX_LIST_LEN:
        raise ValueError(f"{text!r} has an empty range, or more than {MAX_LIST_LEN} entries")
    return [n for first, last in spans for n in range(first, last + 1)]


def parse_schedule(text: str) -> list[tuple[int, float]]:
    """(value, limit) pairs of VALUE@LIMIT,...: each value holds until its limit; or ValueError."""
    pairs = (part.split("@") for part in text.split(",") if text)
    return [(int(value), float(limit)) for value, limit in pairs]


def is_increasing_list(text: str, allowed: range) -> bool:
    """Whether `text` is empty or lists increasing integers of `allowed`."""
    numbers = parse_int_list(text)
    return numbers == sorted({*numbers}) and all(number in allowed for number in numbers)


def is_increasing_schedule(text: str) -> bool:
    """Whether `text` is VALUE@LIMIT,...: positive values, increasing limits below 1."""
    pairs = parse_schedule(text)
    limits = [until for value, until in pairs if value > 0 and 0 < until < 1]
    return limits == sorted(set(limits)) and len(limits) == len(pairs)


def is_loop_schedule(text: str, num_loops: int) -> bool:
    """Whether `text` is one progress value in [0, 1), or `num_loops` non-decreasing ones."""
    points = [0.0, *map(float, text.split(","))]
    increasing = all(a <= b for a, b in itertools.pairwise(points))  # false for nan
    return len(points) - 1 in {1, num_loops} and increasing and points[-1] < 1


ListRule = tuple[Callable[[str], bool], str]  # a test of the text, and the rule in words


def list_knob_rules(cfg: Config) -> dict[str, ListRule]:
    """The rule of each knob that holds a list; a test may raise ValueError for malformed text."""
    coded_groups = cfg.bits.keys() - {"gate", "control"}

    def has_all_sigmas(text: str) -> bool:
        groups = sorted(part[: part.rfind(":") + 1] for part in text.split(","))
        in_range = all(0 < sigmas < math.inf for sigmas in cfg.sigmas.values())
        return not text or (groups in ([""], sorted(f"{g}:" for g in coded_groups)) and in_range)

    orders: ListRule = (
        lambda text: is_increasing_list(text, range(MAX_ORDER + 1)),
        f"list increasing lengths of at most {MAX_ORDER}, such as 0-2,16",
    )
    blocks: ListRule = (
        lambda text: is_increasing_list(text, range(cfg.num_layers)),
        f"list blocks below NUM_LAYERS={cfg.num_layers}, such as 0,2,5-7",
    )
    schedule: ListRule = (
        is_increasing_schedule,
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
            "be one value of progress below 1, or NUM_LOOPS non-decreasing ones",
        ),
        "ttt_phases": (
            lambda text: is_increasing_list(text, range(1, 2**31)),
            "be increasing numbers of documents, such as 833,1666",
        ),
        "ttt_lora_targets": (
            lambda text: len(text.split(",")) == len(LORA_TARGETS & {*text.split(",")}),
            f"name modules of {', '.join(sorted(LORA_TARGETS))}, each once",
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


MAX_MODEL_WEIGHTS = 2**28  # parameters of a model; 16 MB hold no more at half a bit each


def shape_rules(cfg: Config) -> list[Rule]:
    """Rules about the shape of the model."""
    D, H, K, L = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.num_layers
    weights = L * D * (2 * D + 2 * K * (D // H) + 2 * cfg.mlp_dim) + cfg.vocab_size * D
    uses_window = bool({cfg.attn_gate, cfg.smear_gate} & {"window", "sparse", "lambda"})
    return [
        (
            weights <= MAX_MODEL_WEIGHTS,
            f"NUM_LAYERS={L}, MODEL_DIM={D}, MLP_MULT={cfg.mlp_mult} and VOCAB_SIZE="
            f"{cfg.vocab_size} are about {weights:,} weights; "
            f"at most {MAX_MODEL_WEIGHTS:,} are allowed",
        ),
        (cfg.mlp_dim > 0, f"MLP_MULT={cfg.mlp_mult} times MODEL_DIM={D} must be at least 1"),
        (D % H == 0, f"NUM_HEADS={H} must divide MODEL_DIM={D}"),
        (H % K == 0, f"NUM_KV_HEADS={K} must divide NUM_HEADS={H}"),
        (
            cfg.rotary_dims % 2 == 0 and cfg.rotary_dims <= cfg.head_dim,
            f"ROPE_DIMS={cfg.rope_dims} (0 = the head's width) must be even and at most "
            f"MODEL_DIM/NUM_HEADS={cfg.head_dim}",
        ),
        (
            cfg.rotary_bytes <= MAX_ROTARY_BYTES,
            f"the rotary tables of ROPE_DIMS={cfg.rotary_dims} channels for contexts of "
            f"TRAIN_SEQ_LEN={cfg.train_seq_len} and {cfg.score_seq_len} (evaluation) take "
            f"{cfg.rotary_bytes} bytes; at most {MAX_ROTARY_BYTES} are allowed",
        ),
        (
            cfg.xsa_last_n <= L,
            f"XSA_LAST_N={cfg.xsa_last_n} must be at most NUM_LAYERS={L}",
        ),
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
    max_steps = len(NS_POLAR_EXPRESS)
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
            cfg.quantizer == "gptq" or (cfg.quant_grid == "uniform" and not cfg.solves_scales),
            "QUANTIZER=rtn has no Hessians: not with QUANT_GRID=trellis, or ROW_STEPS=solved "
            "without CLIP_SIGMAS",
        ),
        (
            not cfg.ngram_tilt or bool(cfg.ngram_tilt_orders),
            f"NGRAM_TILT={cfg.ngram_tilt:g} needs NGRAM_TILT_ORDERS",
        ),
        (
            not cfg.clip_sigmas or cfg.row_steps == "solved",
            f"CLIP_SIGMAS and ROW_STEPS={cfg.row_steps} both set the quantization scales",
        ),
        (
            not cfg.trains_on_grid
            or (cfg.solves_scales and cfg.averaging == "none" and not cfg.prune_frac),
            "QAT_GRID=artifact needs AVERAGING=none PRUNE_FRAC=0 ROW_STEPS=solved CLIP_SIGMAS=",
        ),
        (
            cfg.ttt_method != "lora" or not cfg.eval_hash_rows or bool(cfg.ttt_phases),
            f"EVAL_HASH_ROWS={cfg.eval_hash_rows}: TTT_METHOD=lora trains this table in TTT_PHASES "
            "alone; set them, or EVAL_HASH_ROWS=0",
        ),
        (
            cfg.ttt_method != "lora" or not cfg.ttt_polyak,
            f"TTT_POLYAK={cfg.ttt_polyak:g}: TTT_METHOD=lora averages no weights; set it to 0",
        ),
        (
            cfg.ttt_num_lrs <= 1 or cfg.ttt_method != "lora" or not cfg.knows_one_lr,
            f"TTT_NUM_LRS={cfg.ttt_num_lrs} must be 1 with TTT_WARM_START_A, NGRAM_TILT, "
            "ADAPTIVE_TEMPERATURE or MIXER=hedge_entropy",
        ),
        (
            cfg.ttt_lora_lr >= 0 or cfg.ttt_lora_lr == -1,
            f"TTT_LORA_LR={cfg.ttt_lora_lr:g} must be -1 (chosen by the first documents) or at "
            "least 0",
        ),
        (
            cfg.ttt_method != "pretrain"
            or (cfg.allow_noncompliant and cfg.mixer == "none" and not cfg.ngram_tilt),
            "TTT_METHOD=pretrain is illegal: set ALLOW_NONCOMPLIANT=1 MIXER=none NGRAM_TILT=0",
        ),
    ]


def stage_rules(cfg: Config) -> list[Rule]:
    """Rules about what begins during the warmdown, and about every training stage."""
    has_average = cfg.averaging != "tail" or cfg.tail_frac > 0
    rules: list[Rule] = [(has_average, "TAIL_FRAC=0 must be above 0 with AVERAGING=tail")]
    longest = cfg.train_seq_len
    for name, lr, is_used in (
        ("LATE_QAT_THRESHOLD", cfg.late_qat_threshold, cfg.late_qat_threshold > 0),
        ("SWA_START_LR", cfg.swa_start_lr, cfg.averaging == "swa"),
    ):
        begins = lr > cfg.min_lr and cfg.warmdown_frac + cfg.warmdown_iters > 0
        remedy = "with WARMDOWN_FRAC or WARMDOWN_ITERS; otherwise it never begins"
        text = f"{name}={lr:g} must be above MIN_LR={cfg.min_lr:g}, {remedy}"
        rules.append((not is_used or begins, text))
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
    context = cfg.score_seq_len
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
            cfg.ttt_method != "lora" or cfg.ttt_chunk_size + look_back <= context,
            f"TTT_CHUNK_SIZE={cfg.ttt_chunk_size} must be below the evaluation context {context}, "
            f"and {EMBEDDING_CONTEXT} less with TTT_CONTEXT=incremental",
        ),
    ]
    return [message for holds, message in rules if not holds]


BOOLEANS = {"1": True, "true": True, "0": False, "false": False}

# Names in other scripts and in earlier versions of this one, with the knobs to use instead; `-`
# means that there is none.
PUBLISHED_NAMES = """
LR=MATRIX_LR,TIED_EMBED_LR,SCALAR_LR LEARNING_RATE=MATRIX_LR,TIED_EMBED_LR,SCALAR_LR
MAX_LR=MATRIX_LR,TIED_EMBED_LR,SCALAR_LR MUON_LR=MATRIX_LR EMBEDDING_LR=TIED_EMBED_LR
BATCH_SIZE=TRAIN_BATCH_TOKENS TOTAL_BATCH_SIZE=TRAIN_BATCH_TOKENS
DEVICE_BATCH_SIZE=MICRO_BATCH_TOKENS GRAD_ACCUM_STEPS=MICRO_BATCH_TOKENS
GRADIENT_ACCUMULATION_STEPS=MICRO_BATCH_TOKENS NUM_ITERATIONS=ITERATIONS MAX_STEPS=ITERATIONS
MAX_ITERS=ITERATIONS NUM_STEPS=ITERATIONS NUM_EPOCHS=ITERATIONS,MAX_WALLCLOCK_SECONDS
MAX_SECONDS=MAX_WALLCLOCK_SECONDS SEQ_LEN=TRAIN_SEQ_LEN BLOCK_SIZE=TRAIN_SEQ_LEN
CONTEXT_LENGTH=TRAIN_SEQ_LEN ROPE_TRAIN_SEQ_LEN=TRAIN_SEQ_LEN ROPE_YARN=ROPE_SCALING
N_LAYER=NUM_LAYERS N_HEAD=NUM_HEADS N_EMBD=MODEL_DIM WEIGHT_DECAY=MUON_WD,ADAM_WD,EMBED_WD
GRAD_CLIP=GRAD_CLIP_NORM MIN_LR_FRAC=MIN_LR DROPOUT=- CROWN_Q_LAMBDA=-
CASEOPS_ENABLED=DATA_PATH VAL_BATCH_TOKENS=VAL_BATCH_SIZE MATRIX_BITS=ATTN_BITS,MLP_BITS
MATRIX_CLIP_SIGMAS=CLIP_SIGMAS ATTN_CLIP_SIGMAS=CLIP_SIGMAS MLP_CLIP_SIGMAS=CLIP_SIGMAS
EMBED_CLIP_SIGMAS=CLIP_SIGMAS ROW_SCALES=ROW_STEPS GATED_ATTN_ENABLED=ATTN_GATE
SPARSE_ATTN_GATE_ENABLED=ATTN_GATE ATTN_OUT_GATE_ENABLED=ATTN_GATE EMA_ENABLED=AVERAGING
SWA_ENABLED=AVERAGING VE_ENABLED=VE_LAYERS TTT_ENABLED=TTT_METHOD TTT_LORA_ENABLED=TTT_METHOD
PHASED_TTT_ENABLED=TTT_PHASES PHASED_TTT_PREFIX_DOCS=TTT_PHASES GLOBAL_TTT_LR=TTT_LR
GLOBAL_TTT_EPOCHS=TTT_EPOCHS SLIDING_WINDOW_ENABLED=EVAL_STRIDE WD_TAPER_START_FRAC=-
WD_TAPER_FINAL_MULT=- SWA_START_FRAC=SWA_START_LR QAT_GROUPS=LATE_QAT_THRESHOLD LQER_RANK=-
LQER_TOP_K=- LQER_GROUP=- HESSIAN_CLIP_LAMBDA=- CONTROL_BITS=- CLIP_PERCENTILE=ROW_STEPS
CALIBRATION=- TTT_LORA_SHARED=- TTT_ASYM_CAPS=ASYM_LOGIT_RESCALE TTT_WD=-
NGRAM_TILT_SHARE=NGRAM_TILT_MIN_FRAC
"""
# Parts of a name that no other program's variables have.
OUR_WORDS = set(
    "TTT MUON GPTQ EMA SWA LORA WARMDOWN QAT XSA SOFTCAP ROPE BIGRAM TRIGRAM LQER STRIDE BPB "
    "MIXER HEDGE NGRAM".split()
)
# Variables of other programs that would look like ours.
FOREIGN_NAMES = set(
    "ARTIFACTS MODEL MODEL_DIR MODELS COMPILER LORA_PATH LORA_DIR TRACKER NUM_THREADS".split()
)
FOREIGN_PREFIXES = tuple(
    "GITHUB_ CI_ NCCL_ CUDA_ HF_ SLURM_ KUBERNETES_ TORCH_ TORCHINDUCTOR_ TORCHELASTIC_ PYTORCH_ "
    "TRITON_ WANDB_ MLFLOW_ AWS_ AZURE_ GOOGLE_ OMP_ MKL_ OPENBLAS_ PIP_ XDG_ LC_ SSH_ CONDA_ "
    "PYTHON PYTEST_ VSCODE_ JUPYTER_".split()
)


def explain_misspelled_knob(name: str, knobs: Collection[str]) -> str:
    """What to say about a variable that is not a knob but was probably meant as one, or nothing.

    A variable is refused if it is a knob in lower case, a name in PUBLISHED_NAMES or similar to one
    (ratio of 0.92), the beginning, the end or a longer form of a knob (by at least two whole
    words), similar to a knob (ratio of 0.85), or contains a word of OUR_WORDS. Variables of other
    programs (FOREIGN_NAMES and FOREIGN_PREFIXES) always pass.
    """
    if name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES):
        return ""
    if name.upper() in knobs:
        return f"{name} must be spelled in capitals: {name.upper()}"
    published = dict(pair.split("=") for pair in PUBLISHED_NAMES.split())
    if theirs := difflib.get_close_matches(name.upper(), published, n=1, cutoff=0.92):
        instead = published[theirs[0]]
        use = f"use {instead.replace(',', ', ')}" if instead != "-" else "there is no such setting"
        return f"{name} is not a knob; {use}"
    words = name.split("_")
    parts = [
        knob
        for knob in knobs
        if len(words) > 1 and (knob.startswith(name + "_") or knob.endswith("_" + name))
    ]
    longer = [knob for knob in knobs if "_" in knob and name.startswith(knob + "_")]
    near = difflib.get_close_matches(name, knobs, n=1, cutoff=0.85)
    if candidates := near or sorted(parts) or longer:
        return f"{name} is not a knob; did you mean {' or '.join(candidates[:3])}?"
    return f"{name} is not a knob of this script" if OUR_WORDS & set(words) else ""


def out_of_range(f: dataclasses.Field[Any], value: Any) -> str:
    """Why `value` is not allowed for this knob, or an empty string."""
    meta, name = f.metadata, f.name.upper()
    if name == "MODE" and value == "audit":
        return "MODE=audit has moved: run python records/audit.py --artifact PATH"
    if meta["choices"] and value not in meta["choices"]:
        return f"{name}={value!r} must be one of {', '.join(map(str, meta['choices']))}"
    low, high = meta["low"], meta["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        return f"{name}={value} must be {bounds}" + (meta["doc"] and f" ({meta['doc']})")
    return ""


def parse_value(text: str, kind: type) -> Any:
    """`text` as a bool, int, finite float or str; ValueError if it is not one."""
    value = BOOLEANS.get(text.lower()) if kind is bool else kind(text)
    if value is None or (kind is float and not math.isfinite(value)):
        raise ValueError(text)
    return value


MAX_RECIPE_BYTES = 2**20


def parse_setting(line: str) -> tuple[str, str] | None:
    """(name, value) of a line of a recipe, None for an empty line or a comment; or ValueError.

    As in an env file: `export` is ignored, quotes around the value are removed, and a comment may
    follow the value after a space.
    """
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    name, equals, text = line.removeprefix("export ").partition("=")
    value = text.strip()
    if value[:1] in ("'", '"'):
        value, closed, comment = value[1:].partition(value[0])
        if not closed or (comment.strip() and not comment.lstrip().startswith("#")):
            raise ValueError("a quote that is not closed, or text after it")
    else:
        value = re.split(r"(?:^|\s)#", value)[0].strip()
    if not equals:
        raise ValueError("not KNOB=value")
    return name.strip(), value


def read_recipe(path: Path) -> dict[str, str]:
    """The settings of a recipe: KEY=value lines of an env file; InputError if it is not one."""
    try:
        size = path.stat().st_size
        require(
            path.is_file() and size <= MAX_RECIPE_BYTES,
            f"RECIPE={path} must be a regular file of at most {MAX_RECIPE_BYTES} bytes",
        )
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"RECIPE={path} cannot be read: {error}") from error
    known, settings = {f.name.upper() for f in fields(Config)} - {"RECIPE"}, dict[str, str]()
    for number, line in enumerate(lines, start=1):
        try:
            setting = parse_setting(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: {line.strip()!r}: {error}") from error
        if setting is not None:
            require(
                setting[0] in known,
                f"{path}:{number}: {line.strip()!r} is not KNOB=value of a knob (RECIPE is not "
                "allowed in a recipe)",
            )
            settings[setting[0]] = setting[1]
    return settings


def config_from_env(env: Mapping[str, str]) -> Config:
    """The Config of the environment `env` over its RECIPE; one InputError lists all problems."""
    settings = {**read_recipe(Path(env["RECIPE"])), **env} if env.get("RECIPE") else env
    kinds = {name.upper(): kind for name, kind in get_type_hints(Config).items()}
    values, problems = dict[str, Any](), list[str]()
    for name, text in settings.items():
        if name in kinds:
            try:
                values[name.lower()] = parse_value(text, kinds[name])
            except ValueError:
                problems.append(f"{name}={text!r} is not a valid {kinds[name].__name__}")
        elif problem := explain_misspelled_knob(name, kinds):
            problems.append(problem)
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
    # METRICS: gets numbers by name, and the step; what is to be closed at the end of the run.
    send_metrics: Callable[[dict[str, float], int], None] | None = None
    step: int = 0  # the last one that was logged
    at_exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def show(self, text: str) -> None:
        """Rank 0: replace the last line of a terminal; elsewhere nothing is shown."""
        if self.is_rank0 and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1  # a longer line could not be replaced
            print(f"\r\x1b[K{text:.{width}}", end="", flush=True)

    def log(self, event: str, **values: Any) -> None:
        """Rank 0: write one line to stdout, to train.log and to metrics.jsonl."""
        if self.is_rank0:
            line = format_event(event, **values)
            self.show("")
            print(line, flush=True)
            self.append("train.log", line)
            self.append("metrics.jsonl", json.dumps({"event": event, **values}))
            self.step = values.get("step", self.step)
            if self.send_metrics:
                kinds = (int, float)  # without bool
                numbers = {f"{event}/{k}": v for k, v in values.items() if type(v) in kinds}
                try:
                    self.send_metrics(numbers, self.step)
                except Exception as error:  # the numbers are in metrics.jsonl, too
                    self.send_metrics = None
                    text = f"METRICS={self.cfg.metrics} has stopped: {error!s:.300}"
                    self.log("warning", text=format_line(text))

    def append(self, name: str, line: str) -> None:
        """Rank 0: add a line to a file in RUN_DIR."""
        if self.is_rank0:
            path = self.directory / name
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")

    @contextlib.contextmanager
    def stage(self, name: str, budget: str = "other", **expected: float) -> Generator[None]:
        """Time a stage of the run and add its seconds to `budget` in the ledger.

        `expected` is logged at its start: limit_s or estimated_s, where one is known.
        """
        self.log("begin", name=name, **expected)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - start_s
            self.ledger[budget] += elapsed_s
            self.log("stage", name=name, elapsed_s=round(elapsed_s, 3), budget=budget)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its maximum over the ranks in place."""
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
        if self.is_rank0:
            try:
                result = function()
            except Exception as error:
                problem = error
        result, problem = self.broadcast_object((result, problem))
        if problem is not None:
            raise problem
        return result

    def on_signal(self, number: int, frame: Any) -> None:
        """Signal handler during a run: sets a flag that the loops read where they can stop."""
        self.signal_received = True

    def check_signal(self) -> None:
        """Raise Interrupted if SIGTERM or SIGINT has been received."""
        if self.signal_received:
            raise Interrupted("stopped by a signal; start again with the same RUN_DIR to continue")

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device works on while Python goes on."""
        return self.device.type == "cuda"

    def start_reading(self, number: Tensor) -> Callable[[], float]:
        """A function that returns a number on the device, and waits for no work queued from now on.

        Tensor.item would wait for all work that is queued when it is called.
        """
        if not self.is_asynchronous:
            return number.item
        copy = number.to("cpu", non_blocking=True)
        is_copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        is_copied.record()

        def read() -> float:
            is_copied.synchronize()
            return copy.item()

        return read

    def to_device(self, x: Tensor) -> Tensor:
        """A copy of x, made in the order of the device's work; Python goes on at once."""
        return (x.pin_memory() if self.is_asynchronous else x).to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for the device, so that timings include its work."""
        if self.is_asynchronous:
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
        join_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with run.at_exit as undo:
        now = f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{os.getpid()}"
        run_id = run.broadcast_object(cfg.run_id or now)
        knobs = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in KNOBS_OF_ONE_NODE}
        script = hash_bytes(script_source().encode())
        knobs |= {"script": script, "dtype": dtype, "device": device.type}
        if world_size > 1 and cfg.compile:
            knobs["compiler"] = not compile_unavailable_reason(device)
        check_same_on_ranks(run, **knobs)
        run.directory = Path(cfg.run_dir or Path("logs") / run_id)
        run.run_on_rank0(lambda: undo.enter_context(lock_directory(run.directory)))
        for number in (signal.SIGTERM, signal.SIGINT):
            undo.callback(signal.signal, number, signal.signal(number, run.on_signal))
        yield run
        run.check_signal()
    if world_size > 1:  # not after an exception: it would wait for the other ranks
        dist.destroy_process_group()


# Where a node finds its data, and what rank 0 alone uses.
KNOBS_OF_ONE_NODE = ("data_path", "tokenizer_path", "recipe", "run_id", "run_dir", "artifact")


def check_same_on_ranks(run: Run, **values: Any) -> None:
    """Raise InputError on all ranks if one of them has other values than rank 0."""
    if run.world_size > 1:
        all_values: list[Any] = [None] * run.world_size
        dist.all_gather_object(all_values, values)
        for rank, values in enumerate(all_values):
            changed = [k.upper() for k, value in values.items() if value != all_values[0][k]]
            require(
                not changed,
                f"rank {rank} has other values of {', '.join(changed)} than rank 0; all nodes need "
                "the same script, knobs, data and kind of machine",
            )


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
        needed = ["RANK", "MASTER_ADDR", "MASTER_PORT"]
        needed += ["LOCAL_RANK"] if torch.cuda.is_available() else []
        missing = [name for name in needed if not env.get(name)]
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
    """Raise InputError if a run must not write `path`: it is a link, a folder or not a run's file.

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


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning to stderr, once per text and on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


# Errors of file systems that cannot sync, or do not let a folder be opened for it.
UNSYNCABLE = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def allow_unsyncable(folder: Path) -> Generator[None]:
    """Only warn if syncing `folder` or a file in it fails because the file system cannot do it."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
        warn_once(f"{folder} cannot be synced ({error.strerror}): a power cut may lose files")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    with allow_unsyncable(folder):
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
            with allow_unsyncable(path.parent):
                os.fsync(file.fileno())
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

    A pass is only called legal, because the compliance of the run is known at its end.
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
    run.log("versions", **VERSIONS, source_sha256=hash_bytes(source.encode()))
    run.log("hardware", name=describe_hardware(run))
    run.append("train.log", f"{'=' * 30} source {'=' * 30}\n{source}\n{'=' * 68}")
    if run.is_rank0:
        write_atomic(run.directory / "train_gpt_source.py", source.encode())


def open_metrics(run: Run) -> None:
    """Rank 0: let `log` send its numbers to the package that METRICS names."""
    cfg = run.cfg
    try:
        if cfg.metrics == "wandb":
            wandb = importlib.import_module("wandb")
            name, config = cfg.run_id or run.directory.name, dataclasses.asdict(cfg)
            wandb.init(project="parameter-golf", name=name, dir=str(run.directory), config=config)
            run.at_exit.callback(close_metrics, wandb.finish)
            run.send_metrics = lambda numbers, step: wandb.log(numbers, step=step)
        elif cfg.metrics == "tensorboard":
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            writer = tensorboard.SummaryWriter(str(run.directory))
            run.at_exit.callback(close_metrics, writer.close)

            def send(numbers: dict[str, float], step: int) -> None:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)

            run.send_metrics = send
    except Exception as error:  # of the package: no account, no network, another version
        raise InputError(f"METRICS={cfg.metrics} cannot be used: {error!s:.300}") from error


def close_metrics(close: Callable[[], Any]) -> None:
    """Call `close`; a run that has done its work does not fail because a package cannot end."""
    with contextlib.suppress(Exception):
        close()


# --- 3. Data -------------------------------------------------------------------------------------
# Token shards in the format of the published FineWeb sets, the training batches made from them,
# and the validation text with its byte counts. Which tokens a batch holds is a pure function of
# the seed and the number of tokens before it, so a resumed run sees the batches of an
# uninterrupted one. The files are checked before training: against manifest.json where there is
# one, otherwise against the rules that every data set follows.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES, BOS_ID = 20240520, 1, 1024, 1
# data/case_markers.py: its markers, and its forms by their names in manifests and artifacts
CASE_MARKERS = "\ue001\ue002\ue003\ue004"
TRANSFORMS = ["none", "case-markers-1", "lossless_caps_caseops_v1"]
REMEDY = "rebuild it with data/prepare.py or data/download.py"
FOREIGN_SIDECAR = f"sidecar and shards belong to different data sets; {REMEDY}"


# Only data/*.py reads and writes shards through these two; a packed script leaves them out.
# packing
def write_shard(path: Path, ids: np.ndarray) -> None:
    """Write token ids (any integer type, values below 65,536) as one shard, atomically."""
    header = np.zeros(SHARD_HEADER_BYTES // 4, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(ids)
    write_atomic(path, header.tobytes(), np.ascontiguousarray(ids, dtype="<u2").tobytes())


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the token ids of a shard (uint16); InputError if it is not a valid shard."""
    if count_shard_tokens(path) == 0:  # a memory map cannot be empty
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)


# end of packing


def count_shard_tokens(path: Path) -> int:
    """The number of tokens in a shard; InputError if it is not a valid shard."""
    size = regular_file_size(path)
    header = np.fromfile(path, dtype="<i4", count=3).tolist()
    magic, version, count = [*header, None, None, None][:3]
    num_tokens = int(count or 0)
    require(
        (magic, version) == (SHARD_MAGIC, SHARD_VERSION),
        f"{path}: {size} bytes, magic {magic} version {version}, expected {SHARD_MAGIC} and "
        f"{SHARD_VERSION}: not a token shard; {REMEDY}",
    )
    expected = SHARD_HEADER_BYTES + 2 * num_tokens
    require(
        size == expected,
        f"{path}: {size} bytes, but its header says {count} tokens = {expected} bytes: damaged; "
        f"{REMEDY}",
    )
    return num_tokens


def regular_file_size(path: Path) -> int:
    """Size of a file in bytes; InputError if there is none or it is a folder, pipe or device."""
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {REMEDY}") from error
    require(stat.S_ISREG(status.st_mode), f"{path} is not a regular file; {REMEDY}")
    return status.st_size


class BatchLoader:
    """Training batches of one rank. A thread reads the next batch while this one is used."""

    def __init__(self, cfg: Config, stream: TokenStream, *, rank: int, world_size: int):
        self.stream, self.rank, self.world_size = stream, rank, world_size
        stages = train_stages(cfg)
        for stage in stages:
            rows = stage.batch_tokens // stage.seq_len
            require(
                rows % world_size == 0,
                f"TRAIN_BATCH_TOKENS={stage.batch_tokens} / TRAIN_SEQ_LEN={stage.seq_len} = "
                f"{rows} rows do not divide over {world_size} ranks; use a multiple of "
                f"{stage.seq_len * world_size} tokens",
            )
        sampler = SAMPLERS[cfg.loader]
        self.samplers = {T: sampler(stream, T, cfg) for T in {stage.seq_len for stage in stages}}
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.prefetched: dict[tuple[int, int, int], Future[Tensor]] = {}

    def batch(self, position: int, stage: TrainStage) -> Tensor:
        """This rank's batch (see `read`); prefetches the next one, of the same stage."""
        key = (position, stage.seq_len, stage.batch_tokens)
        pending = self.prefetched.pop(key, None) or self.executor.submit(self.read, *key)
        next_key = (position + stage.batch_tokens, stage.seq_len, stage.batch_tokens)
        self.prefetched = {next_key: self.executor.submit(self.read, *next_key)}
        return pending.result()

    def read(self, position: int, seq_len: int, batch_tokens: int) -> Tensor:
        """This rank's rows, (rows, T + 1) ids, of the batch after `position` trained tokens."""
        sampler = self.samplers[seq_len]
        rank_tokens = batch_tokens // self.world_size
        first = position + self.rank * rank_tokens
        positions = range(first, first + rank_tokens, seq_len)
        windows = [self.stream.read(sampler.start(p), seq_len + 1) for p in positions]
        return torch.from_numpy(np.stack(windows))


class SequentialSampler:
    """Consecutive windows in data order, from a document start that the seed chooses."""

    def __init__(self, stream: TokenStream, seq_len: int, cfg: Config):
        require(
            stream.num_tokens > seq_len,
            f"{stream.num_tokens} training tokens are fewer than TRAIN_SEQ_LEN={seq_len} + 1",
        )
        offset = int(np.random.default_rng(cfg.seed).integers(stream.num_tokens))
        searched = stream.read(offset, min(1 << 20, stream.num_tokens))
        document_starts = np.flatnonzero(searched == BOS_ID)
        self.first = offset + (int(document_starts[0]) if document_starts.size else 0)

    def start(self, position: int) -> int:
        """Stream position of the window after `position` trained tokens."""
        return self.first + position


class ShuffledSampler:
    """Every window of every shard once per epoch, in random order.

    The windows of a shard do not overlap; the first one starts at a random offset below T, drawn
    for each shard and epoch.
    """

    def __init__(self, stream: TokenStream, seq_len: int, cfg: Config):
        self.stream, self.seq_len, self.seed = stream, seq_len, cfg.seed
        # One window less than fits, so that the count is the same at every offset.
        self.counts = [max(0, (size - seq_len) // seq_len) for size in stream.sizes]
        self.num_windows = sum(self.counts)
        self.orders = dict[int, np.ndarray]()  # of the current epoch only
        require(
            self.num_windows,
            f"no training shard holds two windows of TRAIN_SEQ_LEN={seq_len} tokens, which "
            f"LOADER={cfg.loader} needs",
        )

    def start(self, position: int) -> int:
        """Stream position of the window after `position` trained tokens."""
        epoch, index = divmod(position // self.seq_len, self.num_windows)
        return int(self.order(epoch)[index])

    def order(self, epoch: int) -> np.ndarray:
        """Stream positions of all windows of an epoch, in training order."""
        if epoch not in self.orders:
            rng = np.random.default_rng([self.seed, epoch])
            starts = [self.shard_windows(i, rng) for i, count in enumerate(self.counts) if count]
            self.orders = {epoch: self.shuffle(starts, rng)}
        return self.orders[epoch]

    def shard_windows(self, shard: int, rng: np.random.Generator) -> np.ndarray:
        """Stream positions of a shard's windows in data order, from a random offset on."""
        first = self.stream.starts[shard] + int(rng.integers(self.seq_len))
        return first + np.arange(self.counts[shard]) * self.seq_len

    def shuffle(self, starts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The windows of all shards (positions by shard) in training order."""
        # Same distribution as drawing a shard in proportion to its remaining windows, and then
        # one of these at random (openai/parameter-golf#1394).
        return rng.permutation(np.concatenate(starts))


class CoprimeSampler(ShuffledSampler):
    """Walks each shard with a stride coprime to its number of windows.

    Sources: openai/parameter-golf#726, openai/parameter-golf#1060, openai/parameter-golf#1460.
    """

    def shuffle(self, starts: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """The windows in order; each shard drawn in proportion to its remaining windows."""
        shard_of_window = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        shard_of_window = rng.permutation(shard_of_window)
        order = np.empty(len(shard_of_window), dtype=np.int64)
        for shard, windows in enumerate(starts):
            order[shard_of_window == shard] = coprime_walk(windows, rng)
        return order


def coprime_walk(windows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All `windows`, from a random one on, with a random stride coprime to their number."""
    n, stride = len(windows), 1
    while n > 2:
        stride = int(rng.integers(1, n))
        if math.gcd(stride, n) == 1:
            break
    return windows[(int(rng.integers(n)) + stride * np.arange(n)) % n]


SAMPLERS: dict[str, Any] = {
    "stream": SequentialSampler,
    "shuffled": ShuffledSampler,
    "coprime": CoprimeSampler,
}


class TokenStream:
    """The shards of one split as one sequence of token ids.

    No file stays open between reads: a data set may have more shards than a process may have open
    files, and Python's memory maps keep their files open.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.sizes = [count_shard_tokens(path) for path in paths]
        self.starts = [0, *itertools.accumulate(self.sizes)]
        self.num_tokens = self.starts[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start` on (int64); wraps around at the end of the data."""
        pieces: list[np.ndarray] = []
        while count > 0:
            start %= self.num_tokens
            shard = bisect.bisect_right(self.starts, start) - 1
            piece = self.read_from_shard(shard, start - self.starts[shard], count)
            pieces.append(piece.astype(np.int64))
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def read_all(self) -> np.ndarray:
        """Every id of every shard (uint16)."""
        shards = range(len(self.paths))
        return np.concatenate([self.read_from_shard(i, 0, self.sizes[i]) for i in shards])

    def read_from_shard(self, shard: int, first: int, count: int) -> np.ndarray:
        """Up to `count` ids of one shard (uint16); InputError for one outside the vocabulary."""
        path, count = self.paths[shard], min(count, self.sizes[shard] - first)
        ids = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_BYTES + 2 * first)
        require(len(ids) == count, f"{path} was truncated after it was opened; {REMEDY}")
        if ids.max(initial=0) >= self.vocab_size:
            index = int(np.argmax(ids >= self.vocab_size))
            raise InputError(
                f"{path}: token id {ids[index]} at position {first + index} does not fit "
                f"VOCAB_SIZE={self.vocab_size}: the shards belong to another tokenizer, or the "
                f"file is damaged; set VOCAB_SIZE, or {REMEDY}"
            )
        return ids


class Validation(NamedTuple):
    """The validation text: token ids, the bytes of each target (ids[1:]), whether it was cut."""

    ids: np.ndarray
    target_bytes: np.ndarray
    partial: bool
    banned_VV: np.ndarray | None = None  # see noncanonical_pairs; None: not used
    table_s: float = 0.0  # seconds that this table took, which count as evaluation

    @property
    def num_targets(self) -> int:
        return len(self.ids) - 1

    def head(self, num_targets: int) -> Validation:
        """The beginning of the text, of `num_targets`; all of it for 0."""
        if not 0 < num_targets < self.num_targets:
            return self
        ids, target_bytes = self.ids[: num_targets + 1], self.target_bytes[:num_targets]
        return self._replace(ids=ids.copy(), target_bytes=target_bytes.copy(), partial=True)


def load_validation(cfg: Config, processor: sentencepiece.SentencePieceProcessor) -> Validation:
    """Read and check the validation shards; with CHECK_DATA=full, hash the training shards too.

    Byte counts come from the sidecar if there is one, else from the pieces. The whole text is
    checked, even if VAL_TOKENS_LIMIT cuts it.
    """
    table = ByteTable(processor, cfg.vocab_size)
    paths, sidecars = find_shards(cfg, "val"), find_shards(cfg, "val_bytes")
    check_hashes(cfg, [*paths, *sidecars])
    if cfg.trains and cfg.check_data == "full":
        check_hashes(cfg, find_shards(cfg, "train"), need_all=True)
    ids = TokenStream(paths, cfg.vocab_size).read_all()
    total = len(ids)
    require(
        total > 1, f"DATA_PATH={cfg.data_path}: {total} validation tokens, at least 2 are needed"
    )
    require(
        ids[0] == BOS_ID,
        f"{paths[0]} begins with token {ids[0]}, but a data set begins with a document and thus "
        f"with BOS (id {BOS_ID}): the first shard is missing, or the shards belong to another "
        f"tokenizer; {REMEDY}",
    )
    counts = table.count_text(ids)
    manifest = read_manifest(cfg)
    has_markers = processor.unk_id() not in processor.piece_to_id(list(CASE_MARKERS))
    require(
        sidecars or not has_markers and manifest.transform == "none",
        f"DATA_PATH={cfg.data_path}: the text has case markers, which stand for no text, but "
        f"no *_val_bytes_*.bin gives the bytes of the original text; {REMEDY}",
    )
    if sidecars:
        counts = read_sidecar(cfg, sidecars, ids, table)
    check_totals(cfg, ids, counts)
    if manifest.transform != "none" and manifest.is_lossless:
        check_document_bytes(sidecars[0], processor, ids, counts)
    began_s = time.perf_counter()
    banned_VV = noncanonical_pairs(processor) if cfg.noncanonical_factor < 1 else None
    table_s = time.perf_counter() - began_s
    whole = Validation(ids, counts[1:].astype(np.int64), False, banned_VV, table_s)
    return whole.head(cfg.val_tokens_limit)


def noncanonical_pairs(processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """(V, V) bool: [a, b] is True if the BPE tokenizer never emits piece b right after piece a.

    That is so if it encodes their concatenation otherwise: in a longer text the same merges would
    happen between them. Candidates are pairs between which a merge is possible. InputError if the
    tokenizer is not BPE, changes the text of its own pieces, or has too many of them.
    """
    size = processor.get_piece_size()
    require(
        size <= MAX_CANONICAL_VOCAB,
        f"NONCANONICAL_FACTOR: a table of pairs of {size} pieces is too large, the maximum is "
        f"{MAX_CANONICAL_VOCAB}; set it to 1",
    )
    kinds = (processor.is_byte, processor.is_control, processor.is_unknown, processor.is_unused)
    plain = [token for token in range(size) if not any(is_kind(token) for is_kind in kinds)]
    pieces = [processor.id_to_piece(token) for token in range(size)]
    texts = [piece.replace("\u2581", " ") for piece in pieces]
    ranks = {
        pieces[token]: -processor.get_score(token) for token in plain if len(pieces[token]) > 1
    }
    begins, ends = dict[str, list[tuple[int, float]]](), dict[str, list[tuple[int, float]]]()
    for token in plain:
        for table, side in zip((begins, ends), merge_sides(pieces[token], ranks), strict=True):
            for symbol, until in side:
                table.setdefault(symbol, []).append((token, until))
    is_candidate_VV = np.zeros((size, size), dtype=bool)
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = (
                [token for token, until in table.get(symbol, []) if until >= rank]
                for table, symbol in ((ends, piece[:cut]), (begins, piece[cut:]))
            )
            is_candidate_VV[np.ix_(left, right)] = True
    is_bpe = all(rank.is_integer() for rank in ranks.values())
    changed = [
        token
        for token in plain
        if pieces[token] in ends and processor.encode(texts[token]) != [token]
    ]
    require(
        is_bpe and not changed,
        "NONCANONICAL_FACTOR: the tokenizer is not BPE, or normalizes its own pieces; set it to 1",
    )
    banned_VV = np.zeros_like(is_candidate_VV)
    candidates = np.argwhere(is_candidate_VV)
    for start in range(0, len(candidates), PAIRS_AT_ONCE):
        pairs = candidates[start : start + PAIRS_AT_ONCE].tolist()
        encoded = processor.encode([texts[a] + texts[b] for a, b in pairs], num_threads=1)
        for pair, ids in zip(pairs, encoded, strict=True):
            banned_VV[pair[0], pair[1]] = ids != pair
    return banned_VV


MAX_CANONICAL_VOCAB = 16_384  # pieces: a table of 268 MB
PAIRS_AT_ONCE = 2**16  # encoded in one call, which bounds the memory


def merge_sides(piece: str, ranks: Mapping[str, float]) -> tuple[list[Any], list[Any]]:
    """The symbols at the left and at the right end of a piece while BPE makes it from characters.

    Each with the rank of the merge that ends it. Empty if BPE does not make this piece.
    """
    symbols, now, left, right = list(piece), 0.0, list[Any](), list[Any]()
    while len(symbols) > 1:
        pairs = enumerate(map("".join, itertools.pairwise(symbols)))
        merges = [(ranks[pair], place) for place, pair in pairs if pair in ranks]
        if not merges:
            return [], []
        rank, place = min(merges)
        now = max(now, rank)
        if place == 0:
            left.append((symbols[0], now))
        if place == len(symbols) - 2:
            right.append((symbols[-1], now))
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return [*left, (piece, math.inf)], [*right, (piece, math.inf)]


class ByteTable:
    """UTF-8 bytes that each target token stands for, given the token before it.

    Byte pieces count 1, control pieces 0. A piece that begins with the space marker counts one
    byte for it unless a control token precedes, because a decoder drops that space.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, vocab_size: int):
        check_tokenizer(processor, vocab_size)
        ids = list(range(vocab_size))
        self.is_byte = np.array(processor.is_byte(ids))
        kinds = processor.is_control(ids), processor.is_unknown(ids), processor.is_unused(ids)
        self.boundary = np.any(kinds, axis=0)
        self.base_bytes = np.zeros(vocab_size, dtype=np.int64)
        self.leading_space = np.zeros(vocab_size, dtype=bool)
        self.private_bytes = np.zeros(vocab_size, dtype=np.int64)  # of private-use characters
        for token in np.flatnonzero(~self.boundary).tolist():
            piece = processor.id_to_piece(token)
            self.leading_space[token] = piece.startswith("\u2581")
            # Only the marker at the front is conditional; any others are ordinary spaces.
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            self.base_bytes[token] = 1 if self.is_byte[token] else len(text.encode())
            self.private_bytes[token] = 3 * sum("\ue000" <= c <= "\uf8ff" for c in text)

    def count(self, targets: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Bytes of each target (int64), given the token before each."""
        return self.base_bytes[targets] + (self.leading_space[targets] & ~self.boundary[previous])

    def count_text(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of each token of a text (uint16); 0 for the first one, which is not a target."""
        counts = np.zeros(len(ids), dtype=np.uint16)
        chunk = 1 << 22  # tokens; bounds the memory of the int64 intermediate results
        for start in range(1, len(ids), chunk):
            targets = ids[start : start + chunk]
            previous = ids[start - 1 : start - 1 + len(targets)]
            counts[start : start + chunk] = self.count(targets, previous)
        return counts


def check_tokenizer(
    processor: sentencepiece.SentencePieceProcessor, vocab_size: int, name: str = "the tokenizer"
) -> None:
    """Raise InputError if documents or bytes would be miscounted with this tokenizer.

    Documents begin at BOS, so BOS must have id 1 and be a control piece, which no text encodes to
    (SentencePiece reports a BOS of another type as id -1). Every byte of a text must belong to a
    token that counts it, so a piece for the space and all 256 byte pieces are needed.
    """
    num_pieces = processor.get_piece_size()
    require(
        num_pieces == vocab_size,
        f"VOCAB_SIZE={vocab_size} does not match the tokenizer's {num_pieces}; set it to "
        f"{num_pieces}, or use another tokenizer",
    )
    try:
        for token in range(num_pieces):
            processor.id_to_piece(token)
    except UnicodeDecodeError:
        raise InputError(f"{name}: piece {token} is not UTF-8; the file is damaged") from None
    num_bytes = sum(processor.is_byte(list(range(num_pieces))))
    rules = [
        (num_pieces <= 65_536, f"{num_pieces} pieces, but a shard holds ids up to 65,535"),
        (
            processor.bos_id() == BOS_ID,
            f"BOS has id {processor.bos_id()}, but documents begin with id {BOS_ID}",
        ),
        (
            num_bytes == 256,
            f"{num_bytes} of 256 byte pieces, so some characters would count no bytes",
        ),
        (
            num_bytes < 256 or processor.unk_id() not in processor.encode("\U000f1234\U0010fffd"),
            "byte fallback is off, so unknown characters would count no bytes",
        ),
        (
            processor.piece_to_id("\u2581") != processor.unk_id(),
            "no piece for a single space, so a space would count three bytes",
        ),
    ]
    problems = [message for holds, message in rules if not holds]
    require(
        not problems,
        f"{name} cannot be used: {'; '.join(problems)}; use another one, or let data/prepare.py "
        "train one (leave out --tokenizer)",
    )


MAX_EXCEEDING_FRAC = 0.25  # tokens whose sidecar count is above their piece's bytes
MAX_TOTAL_ERROR = 0.05  # of a sidecar's sum, relative to the bytes of the pieces


def read_sidecar(
    cfg: Config, paths: Sequence[Path], ids: np.ndarray, table: ByteTable
) -> np.ndarray:
    """Byte counts of the validation tokens (uint16); InputError if they cannot belong to `ids`."""
    stream, path = TokenStream(paths, 65_536), paths[0]
    require(
        stream.num_tokens == len(ids),
        f"{path}: {stream.num_tokens} byte counts for {len(ids)} validation tokens; "
        f"{FOREIGN_SIDECAR}",
    )
    counts = stream.read_all()
    # BOS stands for no text. data/prepare.py lets it count the bytes of a document whose text the
    # tokenizer drops completely: then BOS is the document's only token.
    is_bos = ids == BOS_ID
    is_alone = is_bos & np.append(is_bos[1:], True)
    wrong = np.flatnonzero(is_bos & ~is_alone & (counts > 0))
    if wrong.size:
        raise InputError(
            f"{path}: byte count {counts[wrong[0]]} at token {wrong[0]}, which is BOS and stands "
            f"for no text ({wrong.size} such counts); {FOREIGN_SIDECAR}"
        )
    if read_manifest(cfg).text_bytes is None:  # else check_totals compares the sum
        check_plausible_counts(path, ids, counts, table)
    return counts


def check_plausible_counts(
    path: Path, ids: np.ndarray, counts: np.ndarray, table: ByteTable
) -> None:
    """Raise InputError if byte counts are far from those of the pieces' text.

    They need not be equal. Case markers (private-use characters) stand for no text. Bytes that a
    normalizing tokenizer removes count with the next token, those of a normalized character with
    the last of its byte pieces.
    """
    max_bytes = (table.base_bytes + table.leading_space).astype(np.uint16)
    exceeding = (counts > max_bytes[ids]) & ~table.is_byte[ids]
    frac = exceeding.mean()
    require(
        frac <= MAX_EXCEEDING_FRAC,
        f"{path}: {frac:.0%} of the byte counts are above what their pieces spell, at most "
        f"{MAX_EXCEEDING_FRAC:.0%} may be; {FOREIGN_SIDECAR}",
    )
    tokens = np.bincount(ids, minlength=len(max_bytes))
    high = int(table.count_text(ids).sum(dtype=np.int64))
    low = high - int(tokens @ table.private_bytes)
    total = int(counts.sum(dtype=np.int64))
    require(
        (1 - MAX_TOTAL_ERROR) * low <= total <= (1 + MAX_TOTAL_ERROR) * high,
        f"{path}: the byte counts sum to {total}, but the pieces spell {low} to {high} bytes "
        f"(tolerance {MAX_TOTAL_ERROR:.0%}); {FOREIGN_SIDECAR}",
    )


def check_document_bytes(
    path: Path,
    processor: sentencepiece.SentencePieceProcessor,
    ids: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Raise InputError unless the counts of each document sum to the bytes of its original text.

    Case markers do not change the bytes of the other characters, so the original text has those of
    the decoded one without its markers. An escape precedes a character that only looks like one.
    Of n * 2^23 tokens or more, one document in n + 1 is checked, which takes 4 s at most.
    """
    edges = [*np.flatnonzero(ids == BOS_ID), len(ids)]
    for start, end in [*itertools.pairwise(edges)][:: 1 + (len(ids) >> 23)]:
        text = processor.decode(ids[start:end].tolist())
        text = re.sub("(?s)\ue004(.)|[\ue001-\ue004]", r"\1", text)
        total, count = counts[start:end].sum(), len(text.encode())
        require(
            total == count,
            f"{path}: the byte counts of a document sum to {total}, but its text has "
            f"{count} bytes; {FOREIGN_SIDECAR}",
        )


def load_tokenizer(cfg: Config) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer and the SHA-256 of its file.

    InputError if it is missing, unreadable or not the one that the manifest names.
    """
    candidates = tokenizer_candidates(cfg)
    existing = [path for path in candidates if path.exists()]
    require(
        existing,
        f"no tokenizer at {' or '.join(map(str, candidates))}; set TOKENIZER_PATH, or "
        + ways_to_data(cfg),
    )
    path = existing[0]
    regular_file_size(path)
    payload = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=payload or b"empty")
    except (RuntimeError, ValueError) as error:  # the message itself may not be UTF-8
        raise InputError(f"{path} is not a SentencePiece model: {error}") from error
    sha256 = hash_bytes(payload)
    require_listed(cfg, f"SHA-256 of {path}", sha256, read_manifest(cfg).tokenizer_sha256)
    return processor, sha256


def ways_to_data(cfg: Config) -> str:
    """How to get the data set that DATA_PATH names, and how to go on without it."""
    name = Path(os.path.abspath(cfg.data_path)).name
    source, demo = "--input FILE_OR_FOLDER", "; for a first look without a download: make run"
    if published := re.fullmatch(r"fineweb10B_(sp(?:1024|4096|8192))(.*)", name):
        variant = published[1] + "-caseops" * bool(published[2])
        return f"fetch the published shards: python data/download.py --variant {variant}{demo}"
    if name == "demo":
        source, demo = "--source stdlib --write-val-text", ", or let `make run` do all"
    command = f"python data/prepare.py {source} --vocab-size {cfg.vocab_size} --out {cfg.data_path}"
    return f"make it: {command}{demo}"


def tokenizer_candidates(cfg: Config) -> list[Path]:
    """Where the tokenizer is looked for: beside the shards, or in the published layout.

    The published layout is datasets/fineweb10B_sp8192VARIANT with
    tokenizers/fineweb_8192_bpeVARIANT.model; other folders below datasets/ use VOCAB_SIZE.
    """
    if cfg.tokenizer_path:
        return [Path(cfg.tokenizer_path)]
    folder = Path(os.path.abspath(cfg.data_path))
    published = re.fullmatch(r"fineweb10B_sp(\d+)(.*)", folder.name)
    size, variant = published.groups() if published else (cfg.vocab_size, "")
    name = f"fineweb_{size}_bpe{variant}.model"
    return [Path(cfg.data_path) / "tokenizer.model", folder.parent.parent / "tokenizers" / name]


SHARD_NAME = re.compile(r"(.+)_(train|val|val_bytes)_[0-9].*\.bin")


def find_shards(cfg: Config, part: str) -> list[Path]:
    """Shards of a split (train, val or val_bytes) in order.

    InputError if they are missing (a sidecar, val_bytes, may be), not numbered from 000000
    without gaps, not as the manifest says, or if the folder holds two data sets.
    """
    folder = Path(cfg.data_path)
    shards = [m for p in folder.glob("[!.]*.bin") if (m := SHARD_NAME.fullmatch(p.name))]
    prefixes = sorted({match[1] for match in shards})
    require(
        len(prefixes) < 2,
        f"DATA_PATH={folder} holds shards of {len(prefixes)} data sets: "
        f"{', '.join(prefixes[:4])}; keep one data set in a folder and move the others elsewhere",
    )
    names = sorted(match[0] for match in shards if match[2] == part)
    for number, name in enumerate(names):
        expected = f"{prefixes[0]}_{part}_{number:06d}.bin"
        require(
            name == expected,
            f"{folder / name}: expected {expected} next, because shards are numbered from 000000 "
            "without gaps; remove this file if it is a copy, otherwise add the missing shard",
        )
    check_listed(cfg, part, names)
    require(
        names or part == "val_bytes",
        f"DATA_PATH={folder} holds no *_{part}_*.bin shard; " + ways_to_data(cfg),
    )
    return [folder / name for name in names]


class Manifest(NamedTuple):
    """What manifest.json says of a data set; None or empty where it says nothing."""

    files: dict[str, dict[str, Any]]  # name: bytes and sha256
    val_tokens: int | None = None
    val_documents: int | None = None
    text_bytes: int | None = None  # of the original validation text
    tokenizer_sha256: str | None = None
    is_lossless: bool | None = None  # the tokenizer gives back the text that it encoded
    transform: str = "none"  # one of TRANSFORMS, which the text went through before


def read_manifest(cfg: Config) -> Manifest:
    """The manifest of the data set in DATA_PATH, empty if there is none.

    InputError if it is malformed.
    """
    path = Path(cfg.data_path) / "manifest.json"
    if not path.exists():
        unfinished = path.with_name(".partial").exists()
        require(not unfinished, f"{path.parent} is unfinished; run data/prepare.py again")
        return Manifest({})
    regular_file_size(path)
    try:
        content = json.loads(path.read_bytes())
        val, tokenizer = (content.get(key) or {} for key in ("val", "tokenizer"))
        manifest = Manifest(
            files=content.get("files") or {},
            val_tokens=val.get("tokens"),
            val_documents=val.get("documents"),
            text_bytes=val.get("text_bytes"),
            tokenizer_sha256=tokenizer.get("sha256"),
            is_lossless=tokenizer.get("is_lossless"),
            transform=content.get("transform") or "none",
        )
        numbers = [manifest.val_tokens, manifest.val_documents, manifest.text_bytes]
        numbers += [entry.get("bytes") for entry in manifest.files.values()]
        hashes = [entry.get("sha256") for entry in manifest.files.values()]
        valid = all(number is None or type(number) is int for number in numbers)
        valid &= all(isinstance(h, str | None) for h in [*hashes, manifest.tokenizer_sha256])
        valid &= manifest.transform in TRANSFORMS
    except (ValueError, AttributeError, RecursionError):
        valid = False
    require(valid, f"{path} is not a manifest of data/prepare.py or data/download.py; rebuild it")
    return manifest


def check_listed(cfg: Config, part: str, names: Sequence[str]) -> None:
    """Raise InputError if shards of a split are not the files, or sizes, that the manifest lists.

    Training shards that it does not list are used, with a warning.
    """
    manifest = read_manifest(cfg)
    if not manifest.files:
        return
    folder = Path(cfg.data_path)
    source = folder / "manifest.json"
    matches = {name: SHARD_NAME.fullmatch(name) for name in manifest.files}
    listed = [name for name, match in matches.items() if match and match[2] == part]
    for name in listed:
        path = folder / name
        require(name in names, f"{path} is missing, but {source} lists it; {REMEDY}")
        require_listed(
            cfg, f"size of {path}", regular_file_size(path), manifest.files[name].get("bytes")
        )
    if unlisted := [name for name in names if name not in matches]:
        rule = f"{folder / unlisted[0]} is not listed in {source}"
        require(part == "train", f"{rule}, so it is of another data set; remove it")
        warn_once(f"{rule}; training uses {len(unlisted)} such shards")


def check_hashes(cfg: Config, paths: Sequence[Path], *, need_all: bool = False) -> None:
    """Raise InputError if a file's SHA-256 is not the one in the manifest.

    Files without one are skipped, or refused if `need_all`.
    """
    manifest = read_manifest(cfg)
    expected = {p: manifest.files.get(p.name, {}).get("sha256") for p in paths}
    known = [path for path in paths if expected[path]]
    for path in paths:
        require(
            expected[path] or not need_all,
            f"CHECK_DATA=full: {cfg.data_path}/manifest.json has no SHA-256 of {path}; set "
            f"CHECK_DATA=quick, or {REMEDY}",
        )
    with ThreadPoolExecutor() as executor:  # hashing releases the interpreter lock
        for path, sha256 in zip(known, executor.map(hash_file, known), strict=True):
            require_listed(cfg, f"SHA-256 of {path}", sha256, expected[path])


def require_listed(cfg: Config, name: str, value: Any, expected: Any) -> None:
    """Raise InputError if `value` differs from what the manifest says; None: it does not say."""
    require(
        expected in (None, value),
        f"{name} is {value}, but {cfg.data_path}/manifest.json says {expected}: damaged or of "
        f"another data set; {REMEDY}",
    )


def hash_file(path: Path, max_bytes: int | None = None) -> str:
    """The SHA-256 of a regular file, or of its first `max_bytes`, in hex."""
    regular_file_size(path)
    with open(path, "rb") as file:
        if max_bytes is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hash_bytes(file.read(max_bytes))


# Published validation targets by folder name, as public logs show them: without an incomplete last
# window of up to 2,048 tokens. All are the same text; see openai/parameter-golf#2014 for CaseOps.
PUBLISHED_TARGETS = {
    "fineweb10B_sp1024": 62_021_632,
    "fineweb10B_sp8192": 40_540_160,
    "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved": 47_851_520,
}
PUBLISHED_WINDOW, PUBLISHED_BYTES, PUBLISHED_BYTES_ERROR = 2048, 151_078_222, 0.001


def check_totals(cfg: Config, ids: np.ndarray, counts: np.ndarray) -> None:
    """Raise InputError if the validation text's totals are not those of manifest or publication.

    The totals are tokens, documents and UTF-8 bytes of the original text.
    """
    folder = Path(cfg.data_path)
    num_bytes = int(counts.sum(dtype=np.int64))
    manifest = read_manifest(cfg)
    totals = [
        ("tokens", len(ids), manifest.val_tokens),
        ("documents (BOS tokens)", int((ids == BOS_ID).sum()), manifest.val_documents),
        (
            "bytes (a tokenizer that changes the text needs --byte-sidecar)",
            num_bytes,
            manifest.text_bytes,
        ),
    ]
    for name, value, expected in totals:
        require_listed(cfg, f"{folder}: number of validation {name}", value, expected)
    targets = PUBLISHED_TARGETS.get(Path(os.path.abspath(folder)).name)
    if targets is None:
        return
    require(
        targets <= len(ids) - 1 < targets + PUBLISHED_WINDOW
        and abs(num_bytes / PUBLISHED_BYTES - 1) < PUBLISHED_BYTES_ERROR,
        f"{folder}: {len(ids)} validation tokens for {num_bytes} bytes, but the published data set "
        f"of this name has about {targets} for {PUBLISHED_BYTES}; fetch it again with "
        "data/download.py, or rename the folder if it is another data set",
    )


def data_identity(cfg: Config) -> dict[str, Any]:
    """What identifies the data of a run: totals and SHA-256 of tokenizer, validation, training.

    Flat, of JSON values, and independent of CHECK_DATA and file names, so that a resumed run can
    compare it. Of training shards only the first 64 KiB are hashed; modes that do not train leave
    them out.
    """
    val = find_shards(cfg, "val")
    identity: dict[str, Any] = {
        "tokenizer_sha256": load_tokenizer(cfg)[1],
        "val_tokens": sum(map(count_shard_tokens, val)),
        "val_sha256": combine_hashes([*val, *find_shards(cfg, "val_bytes")]),
    }
    if cfg.trains:
        train = find_shards(cfg, "train")
        identity["train_tokens"] = sum(map(count_shard_tokens, train))
        identity["train_sample_sha256"] = combine_hashes(train, 1 << 16)
    return identity


def combine_hashes(paths: Iterable[Path], max_bytes: int | None = None) -> str:
    """One SHA-256 for several files, or for the first `max_bytes` of each."""
    hashes = "".join(hash_file(path, max_bytes) for path in paths)
    return hash_bytes(hashes.encode())


# --- 4. Model ------------------------------------------------------------------------------------
# One forward pass serves training, calibration, evaluation and test-time training: GPT.forward runs
# the layer calls that layer_schedule lists. Parameters are float32; CastedLinear casts them to the
# dtype of the residual stream. Optional modules are None if their knob is off. The modules come
# first, from small to large, then the model, its loss, and the attention kernels.


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without a learned weight: x / sqrt(mean(x^2) + eps), arXiv:1910.07467."""
    if is_compiled_for_gpu(x):
        return RmsNorm.apply(x)  # type: ignore[no-untyped-call]
    return F.rms_norm(x, (x.size(-1),))


def rms_factor(x: Tensor) -> Tensor:
    """The factor of rms_norm, float32 (..., 1)."""
    mean_square = x.float().square().mean(dim=-1, keepdim=True)
    return torch.rsqrt(mean_square + torch.finfo(torch.float32).eps)


def norm_gradient(grad: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """The gradient by x of rms_norm(x), where `grad` is that by x if the factor is a constant."""
    # Products in the dtype of x: Inductor would write out a gradient in float32.
    along = (grad * x).sum(dim=-1, keepdim=True, dtype=torch.float32) / x.size(-1)
    return (grad - along * factor.square() * x).to(x.dtype)


class RmsNorm(torch.autograd.Function):
    """`rms_norm` for a compiled graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * rms_factor(x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        factor = rms_factor(x)  # norm_gradient is linear in the gradient
        return (factor * norm_gradient(grad, x, factor)).to(x.dtype)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient (O, I) by W of y = W x, from that by y (..., O) and x (..., I)."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class NormProduct(torch.autograd.Function):
    """Products of rms_norm(x) with two matrices, for a compiled graph.

    The norm's factor multiplies the products, so that neither the normalized x nor a gradient by it
    is written to memory. (The parameters have names: without gradients Dynamo mistakes a variable
    number of them.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1_OI: Tensor, w2_OI: Tensor) -> tuple[Tensor, ...]:
        """W rms_norm(x) for both W (O, I) and x (..., I)."""
        factor, weight_OI = rms_factor(x), torch.cat([w1_OI, w2_OI])
        ctx.save_for_backward(x, weight_OI, factor)
        y = (F.linear(x, weight_OI) * factor).to(x.dtype)
        return torch.split(y, [len(w1_OI), len(w2_OI)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight_OI, factor = ctx.saved_tensors
        # Scaled before they are joined: otherwise Inductor writes them twice.
        grad = torch.cat([(grad * factor).to(x.dtype) for grad in grads], dim=-1)
        by_x = norm_gradient(grad @ weight_OI, x, factor)
        sizes = [grad.size(-1) for grad in grads]
        return by_x, *torch.split(weight_gradient(grad, x), sizes)


class NormMLP(torch.autograd.Function):
    """W2 leaky_relu(W1 rms_norm(x), slope)^2, for a compiled graph; see NormProduct.

    The norm's gradient needs the mean of u x, with u as in norm_gradient. As the activation has
    degree 2, that is twice the mean of the output times its gradient. Known before u, it lets u be
    corrected in the epilogue of the product that computes it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, w1_FD: Tensor, w2_DF: Tensor) -> Tensor:
        """The MLP's output (..., D) for x (..., D) and the matrices W1 (F, D) and W2 (D, F)."""
        ctx.slope, factor = slope, rms_factor(x)
        h = (F.linear(x, w1_FD) * factor).to(x.dtype)
        y = F.linear(F.leaky_relu(h, slope).square(), w2_DF)
        ctx.save_for_backward(x, w1_FD, w2_DF, factor, h, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients by x and the matrices."""
        x, w1_FD, w2_DF, factor, h, y = ctx.saved_tensors
        mean = 2 * (grad * y).sum(dim=-1, keepdim=True, dtype=torch.float32) / x.size(-1)
        by_h = (grad @ w2_DF) * 2 * F.leaky_relu(h, ctx.slope**2)
        by_h = (by_h * factor).to(x.dtype)
        by_x = (by_h @ w1_FD - mean * factor.square() * x).to(x.dtype)
        active = F.leaky_relu(h, ctx.slope).square()
        return by_x, None, weight_gradient(by_h, x), weight_gradient(grad, active)


def rotary_table(cfg: Config, num_positions: int, span: Span | None = None) -> Tensor:
    """Cosines, sines and negative sines of RoPE, float32 (arXiv:2104.09864).

    The shape is (3, num_positions, ROPE_DIMS / 2).

    With `span`, those of the positions from span[0] to span[1], which may lie beyond the table.
    """
    dims, base = cfg.rotary_dims, cfg.rope_base
    if cfg.rope_scaling == "ntk" and num_positions > cfg.train_seq_len and dims > 2:
        # NTK scaling: over the longer context, the lowest frequency turns by the same angle.
        base *= (num_positions / cfg.train_seq_len) ** (dims / (dims - 2))
    # On the CPU also for a model whose weights are on the meta device; see build_model.
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims)
    # In float32 the angles of late positions would be inaccurate.
    dtype = torch.float64 if span else torch.float32
    position_T = torch.arange(*span or (0, num_positions), dtype=dtype, device="cpu")
    angle_TE = torch.outer(position_T, frequency.to(dtype))
    return torch.stack([angle_TE.cos(), angle_TE.sin(), -angle_TE.sin()]).float()


def apply_rotary_emb(x_BTHE: Tensor, rotary_3TE: Tensor) -> Tensor:
    """Rotate the first R = ROPE_DIMS channels of each head; channel i is paired with i + R / 2.

    rotary_3TE is that of rotary_table, with E = R / 2.
    """
    half = rotary_3TE.size(-1)
    rotary_3T1E = rotary_3TE[:, :, None].to(x_BTHE.dtype)
    parts = [half, half, x_BTHE.size(-1) - 2 * half]
    if is_eager_on_gpu(x_BTHE):  # the same numbers
        turned, rest = torch.split(x_BTHE, [2 * half, parts[2]], dim=-1)
        pair_BTH2E = torch.unflatten(turned, -1, (2, half))
        sin_T12E = rotary_3T1E[1:].permute(1, 2, 0, 3)
        pair_BTH2E = pair_BTH2E * rotary_3T1E[0, :, None] + pair_BTH2E.flip(-2) * sin_T12E
        return torch.cat([pair_BTH2E.flatten(-2), rest], dim=-1)
    first, second, rest = torch.split(x_BTHE, parts, dim=-1)
    cos, sin, _ = rotary_3T1E
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)


def fake_quantize(weight_OI: Tensor, bits: int, grid: Grid | None = None) -> Tensor:
    """Weight rounded to the artifact's codes and scales; straight-through gradient.

    Scales are those of `grid`, or else one per row. With bits = 0 the weight is returned unchanged.
    The straight-through estimator is that of arXiv:1308.3432.
    """
    if bits == 0:
        return weight_OI
    weight_OI = weight_OI.float()
    if grid is None:
        qmax = 2 ** (bits - 1) - 1
        scale_OI = row_scales(weight_OI.detach(), qmax).float()[:, None]
    else:
        qmax, scale_OI = MAX_CODE, grid[0][:, None] * grid[1]
    rounded_OI = (weight_OI.detach() / scale_OI).round().clamp(-qmax, qmax) * scale_OI
    return weight_OI + (rounded_OI - weight_OI).detach()


Grid = tuple[Tensor, Tensor]  # scales of the rows (O) and of the columns (I)
# Rows of a grid before its scales are known: a step of 1/64. No scale of an artifact is negative.
UNKNOWN_SCALE = -1 / 64


class CastedLinear(nn.Linear):
    """Linear layer without bias whose float32 weight (O, I) is cast to the input's dtype.

    The output of `adapter`, if one is attached, is added. `qat_bits` > 0 turns on fake
    quantization of the weight.
    """

    def __init__(self, in_features: int, out_features: int, *, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        # An instance attribute: torch.compile treats class attributes as constants.
        self.adapter: nn.Module | None = None
        self.zero_init, self.qat_bits = zero_init, 0
        self.grid: Grid | None = None  # of late QAT, if QAT_GRID=artifact

    def used_weight(self) -> Tensor:
        """The weight, or with late QAT the rounded one."""
        return fake_quantize(self.weight, self.qat_bits, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """W x, and the adapter's output."""
        weight_OI = self.used_weight().to(x.dtype)
        if self.adapter is None:
            return F.linear(x, weight_OI)
        if is_eager_on_gpu(x) and isinstance(self.adapter, BatchedLoRA):
            return self.adapter(x, None, weight_OI)
        return self.adapter(x, F.linear(x, weight_OI))


def is_compiled_for_gpu(x: Tensor) -> bool:
    """Whether this is compiled for a GPU, where formulas that move less memory are taken.

    Without compilation, hooks of calibration and adapters see every matrix by itself.
    """
    return torch.compiler.is_compiling() and x.is_cuda


def is_eager_on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU without compilation, where few launches of kernels matter."""
    return x.is_cuda and not torch.compiler.is_compiling()


class FusedUpdate(NamedTuple):
    """A block's update for the stream x where it is compiled for a GPU.

    The norm, with a factor, and the scale of each channel become parts of the products before and
    after attention or the MLP, so that less memory is moved.
    """

    x_BTD: Tensor
    norm_scale: Tensor | None
    scale_D: Tensor

    def norm_weight(self, *linears: CastedLinear) -> Tensor:
        """The weights of layers that follow the norm, below each other, times the norm's factor."""
        weight_OI = torch.cat([self.weight_of(linear) for linear in linears])
        if self.norm_scale is not None:  # rounded, as in Block.norm
            weight_OI = self.norm_scale.to(self.x_BTD.dtype) * weight_OI
        return weight_OI.to(self.x_BTD.dtype)

    def scaled_weight(self, linear: CastedLinear) -> Tensor:
        """The weight of the last layer, with its rows scaled."""
        return (self.scale_D[:, None] * self.weight_of(linear)).to(self.x_BTD.dtype)

    @staticmethod
    def weight_of(linear: CastedLinear) -> Tensor:
        assert linear.adapter is None, "adapters in a compiled graph"
        return linear.used_weight()

    def columns(self, count: int) -> Tensor:
        """The first channels of the norm of x, with its factor."""
        x_BTI = self.x_BTD[..., :count] * rms_factor(self.x_BTD)
        if self.norm_scale is not None:
            x_BTI = x_BTI * self.norm_scale.to(self.x_BTD.dtype)
        return x_BTI.to(self.x_BTD.dtype)


class BatchedLoRA(nn.Module):
    """LoRA with its own matrices A, B for each batch row: y_b + alpha / R * x_b A_b^T B_b^T.

    B starts at zero. The transposes are stored, because autograd computes their gradients without
    copies. Rows of a batch use the pairs from `first_row` on. Both have the dtype of x: see
    AdapterTrainer. Source: arXiv:2106.09685.
    """

    first_row = 0

    def __init__(self, down_RI: Tensor, num_rows: int, num_outputs: int, alpha: float):
        super().__init__()
        R, self.scale = len(down_RI), alpha / len(down_RI)
        self.down_BIR = nn.Parameter(down_RI.T.repeat(num_rows, 1, 1))
        self.up_BRO = nn.Parameter(down_RI.new_zeros(num_rows, R, num_outputs))

    def forward(
        self, x_BTI: Tensor, y_BTO: Tensor | None, weight_OI: Tensor | None = None
    ) -> Tensor:
        """The adapted y, or the adapted product of the frozen weight and x."""
        weights: list[Tensor] = [self.down_BIR, self.up_BRO]
        if len(x_BTI) < len(self.down_BIR):  # the gradient of a slice is a copy of the whole
            weights = [w[self.first_row : self.first_row + len(x_BTI)] for w in weights]
        if y_BTO is None:
            args = (x_BTI, weight_OI, *weights, self.scale)
            return AdaptedProduct.apply(*args)  # type: ignore[no-untyped-call]
        down_BIR, up_BRO = weights
        return torch.baddbmm(y_BTO, torch.bmm(x_BTI, down_BIR), up_BRO, alpha=self.scale)


class AdaptedProduct(torch.autograd.Function):
    """A frozen linear layer with LoRA; its backward pass adds gradients up inside of products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, *lora: Any) -> Tensor:
        down, up, ctx.scale = lora
        h_BTR = torch.bmm(x, down)
        ctx.save_for_backward(x, weight_OI, down, up, h_BTR)
        return torch.baddbmm(F.linear(x, weight_OI), h_BTR, up, alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight_OI, down, up, h_BTR = ctx.saved_tensors
        product = functools.partial(torch.baddbmm, alpha=ctx.scale)
        grad_h_BTR = torch.bmm(grad, up.mT)
        grad_x = product(grad @ weight_OI, grad_h_BTR, down.mT)
        grad_down = product(down, x.mT, grad_h_BTR, beta=0)
        return grad_x, None, grad_down, product(up, h_BTR.mT, grad, beta=0), None


class Embedding(nn.Embedding):
    """float32 embedding table (V, D); if it is also the tied head, `adapter` is the head's LoRA."""

    def __init__(self, rows: int, dim: int):
        super().__init__(rows, dim)
        self.adapter: nn.Module | None = None


def shift_right(x_BT: Tensor, offset: int) -> Tensor:
    """x (B, T, ...) moved right by `offset` positions along T; zeros enter from the left."""
    pad_trailing_dims = [0, 0] * (x_BT.dim() - 2)
    return F.pad(x_BT, (*pad_trailing_dims, offset, 0))[:, : x_BT.size(1)]


class HashEmbedding(nn.Module):
    """Embedding of the n-gram that ends at each token: a hashed table, projected to width D.

    The table starts at zero and the projection does not, because with both at zero neither would
    get a gradient. Bigrams are thwu1's BigramHash; trigrams are from openai/parameter-golf#430,
    where the table was in no optimizer group.
    """

    FACTORS = (36313, 27191, 51497)  # of the mixing hash, one for each token of the n-gram

    def __init__(self, cfg: Config, order: int, rows: int, dim: int):
        super().__init__()
        self.order, self.isolate = order, cfg.isolate_documents
        self.polynomial = order == 3 and cfg.trigram_hash == "polynomial"
        self.table, self.proj = Embedding(rows, dim), CastedLinear(dim, cfg.model_dim)
        nn.init.zeros_(self.table.weight)
        nn.init.orthogonal_(self.proj.weight)
        self.scale = nn.Parameter(torch.tensor(0.05)) if order == 2 else None

    def buckets(self, ids_BT: Tensor) -> Tensor:
        """Table row of each position (B, T); n-grams cut by a document's start share the last row.

        The polynomial hash (openai/parameter-golf#430) reads across document starts.
        """
        num_rows = self.table.num_embeddings
        tokens = [shift_right(ids_BT, n) for n in range(self.order)]
        if self.polynomial:
            tokens[2][:, 0] = ids_BT[:, 0]  # the source used torch.roll, which leaves it there
            return (961 * tokens[2] + 31 * tokens[1] + tokens[0]) % num_rows
        starts_BT = (ids_BT == BOS_ID) & self.isolate
        starts_BT[:, 0] = True
        hash_BT = torch.zeros_like(ids_BT)
        is_cut_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for n, token_BT in enumerate(tokens):
            hash_BT ^= self.FACTORS[n] * token_BT
            if n < self.order - 1:
                is_cut_BT |= shift_right(starts_BT, n)
        return torch.where(is_cut_BT, num_rows - 1, hash_BT % (num_rows - 1))

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        y_BTD = self.proj(self.table(self.buckets(ids_BT)).to(dtype))
        return y_BTD if self.scale is None else y_BTD * self.scale.to(dtype)


class EvalHashEmbedding(nn.Module):
    """Hashed bigram table of width D for one evaluation pass; starts at zero.

    Source: openai/parameter-golf#1460.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.isolate = cfg.isolate_documents
        self.table = Embedding(cfg.eval_hash_rows, cfg.model_dim)
        nn.init.zeros_(self.table.weight)

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        starts_BT = (ids_BT == BOS_ID) & self.isolate
        starts_BT[:, 0] = True
        previous_BT = torch.where(starts_BT, ids_BT, shift_right(ids_BT, 1))
        row_BT = (2039 * previous_BT + ids_BT) % self.table.num_embeddings
        return self.table(row_BT).to(dtype)


class SmearGate(nn.Module):
    """Mix the previous token's embedding x' into each x, except at the start of a document.

    - blend (thwu1): (1 - g) x + g x' with g = sigmoid(theta), initially 1/2.
    - lambda (openai/parameter-golf#1667): x + lambda * sigmoid(w x[:GATE_WINDOW]) * x',
      initially x.

    The mask at document starts is from openai/parameter-golf#1851.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        blend = cfg.smear_gate == "blend"
        self.before_norm = not blend
        self.gate = nn.Parameter(torch.zeros(cfg.model_dim if blend else cfg.gate_window))
        self.scale = None if blend else nn.Parameter(torch.zeros(()))

    def forward(self, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        previous_BTD = shift_right(x_BTD, 1) * (ids_BT != BOS_ID)[..., None]
        gate = self.gate.to(x_BTD.dtype)
        if self.scale is None:
            return torch.lerp(x_BTD, previous_BTD, torch.sigmoid(gate))
        gate_BT1 = torch.sigmoid((x_BTD[..., : len(gate)] * gate).sum(dim=-1, keepdim=True))
        return x_BTD + self.scale.to(x_BTD.dtype) * gate_BT1 * previous_BTD


class AttnOutputGate(nn.Module):
    """Factor for each head's output, computed from attention's normalized input n.

    - head (openai/parameter-golf#430): a learned number, initially 1.
    - input (openai/parameter-golf#413): sigmoid(W n + 4).
    - window (openai/parameter-golf#1667): 2 sigmoid(W n[:GATE_WINDOW]), initially 1.
    - sparse (openai/parameter-golf#1787): sigmoid(s W n[:GATE_WINDOW]), initially 1/2.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.form, self.sharpness, H = cfg.attn_gate, cfg.sparse_attn_gate_scale, cfg.num_heads
        width = cfg.model_dim if self.form == "input" else cfg.gate_window
        self.weight = nn.Parameter(torch.ones(H) if self.form == "head" else torch.zeros(H, width))
        self.bias = nn.Parameter(torch.full((H,), 4.0)) if self.form == "input" else None

    def forward(self, n_BTD: Tensor) -> Tensor:
        """The factors (B, T, H), or (H,), from the normalized stream or its first channels."""
        weight = self.weight.to(n_BTD.dtype)
        if self.form == "head":
            return weight
        logit_BTH = F.linear(n_BTD[..., : weight.size(1)], weight)
        if self.bias is not None:
            logit_BTH = logit_BTH + self.bias.to(weight.dtype)
        if self.form == "sparse":
            logit_BTH = logit_BTH * self.sharpness
        gate_BTH = torch.sigmoid(logit_BTH)
        return 2 * gate_BTH if self.form == "window" else gate_BTH


def exclusive_self_attention(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """XSA: remove the component of each head's output along the position's own value vector.

    Source: arXiv:2603.09078. With grouped queries, all G heads of a group share that vector.
    """
    y_BTKGE, v_BTK1E = y_BTHE.view(*v_BTKE.shape[:3], -1, v_BTKE.size(3)), v_BTKE[:, :, :, None]
    if is_eager_on_gpu(y_BTHE):
        rest_BTKGE = Rejection.apply(y_BTKGE, v_BTK1E)  # type: ignore[no-untyped-call]
    else:
        rest_BTKGE, *_ = reject(y_BTKGE, v_BTK1E)
    return rest_BTKGE.view_as(y_BTHE)


def reject(y: Tensor, v: Tensor, square: Tensor | None = None) -> tuple[Tensor, ...]:
    """y without its component along v, that component, its factor of v, and |v|^2."""
    product = (y * v).sum(dim=-1, keepdim=True, dtype=torch.float32)
    if square is None:
        square = v.square().sum(dim=-1, keepdim=True, dtype=torch.float32).clamp(min=1e-24)
    factor = (product / square).to(y.dtype)
    along = factor * v
    return y - along, along, factor, square


class Rejection(torch.autograd.Function):
    """`reject` with a backward pass of half as many operations, for a GPU without compilation."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor) -> Tensor:
        rest, *parts = reject(y, v)
        ctx.save_for_backward(v, rest, *parts)
        return rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        v, rest, along, factor, square = ctx.saved_tensors
        grad_y, _, grad_factor, _ = reject(grad, v, square)
        by_v = torch.addcmul(grad_factor * (along - rest), factor, grad, value=-1)
        return grad_y, by_v.sum(dim=-2, keepdim=True)


class GatedRejection(torch.autograd.Function):
    """XSA and gate of y (B, T, K, G, E), v (B, T, K, E) and gate (B, T, K, G), for compiled graphs.

    The G heads that share a value are kept apart, so that Inductor computes all gradients, with
    the sum of those by the value, in one pass that reads only y, v and the incoming gradient.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, v, gate)
        heads = zip(y.unbind(3), gate[..., None].unbind(3), strict=True)
        return torch.stack([reject(y, v)[0] * gate for y, gate in heads], dim=3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients by y, v and gate."""
        y, v, gate = ctx.saved_tensors
        square = v.square().sum(dim=-1, keepdim=True, dtype=torch.float32).clamp(min=1e-24)
        heads = zip(y.unbind(3), gate[..., None].unbind(3), grad.unbind(3), strict=True)
        by_y, by_v, by_gate = [], [], []
        for y, gate, grad in heads:
            y, grad = y.float(), grad.float()
            y_factor, grad_factor = [(x * v).sum(-1, keepdim=True) / square for x in (y, grad)]
            by_gate.append((grad * y).sum(-1) - (y_factor * grad_factor * square)[..., 0])
            grad, grad_factor = grad * gate, grad_factor * gate
            by_y.append((grad - grad_factor * v).to(v.dtype))
            part = 2 * y_factor * grad_factor * v - y_factor * grad - grad_factor * y
            by_v.append(part.to(v.dtype))  # not float32, which Inductor would write out
        return torch.stack(by_y, dim=3), sum(by_v), torch.stack(by_gate, dim=3).to(v.dtype)


# Tokens before a position that its embedding depends on: SmearGate reads the previous token's
# embedding, which depends on the trigram that ends there.
EMBEDDING_CONTEXT = 3


class LayerKVCache:
    """KV cache of one layer call; keys are stored after RoPE by their positions in the document."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, old and new; gradients flow through the new ones only."""
        if self.pair is not None:
            old_k, old_v = self.pair
            B = len(k_BTKE)
            k_BTKE = torch.cat([old_k[:B], k_BTKE], dim=1)
            v_BTKE = torch.cat([old_v[:B], v_BTKE], dim=1)
        self.pair = k_BTKE.detach(), v_BTKE.detach()
        return k_BTKE, v_BTKE


class KVCache:
    """State with which a forward pass continues each row: KV caches and the previous token ids."""

    def __init__(self, num_layer_calls: int, capacity: int):
        self.layers, self.capacity = [LayerKVCache() for _ in range(num_layer_calls)], capacity
        self.length, self.ids_BT = 0, torch.zeros(0, 0, dtype=torch.int64)
        self.num_dropped = 0  # positions before the oldest one that is cached

    def keep_positions(self, start: int, stop: int) -> None:
        """Keep only the cached positions from `start` to `stop`."""
        for layer in self.layers:
            if layer.pair is not None:
                layer.pair = layer.pair[0][:, start:stop], layer.pair[1][:, start:stop]
        self.ids_BT, self.length = self.ids_BT[:, start:stop], stop - start
        self.num_dropped += start

    def append_tokens(self, ids_BT: Tensor) -> Tensor:
        """Append token ids; drop the oldest positions beyond the capacity.

        Returns the new ids with the EMBEDDING_CONTEXT ids before them (fewer at the beginning).
        """
        T = ids_BT.size(1)
        self.keep_positions(max(0, self.length + T - self.capacity), self.length)
        old_BT = self.ids_BT[: len(ids_BT)] if self.length else ids_BT[:, :0]
        self.ids_BT = torch.cat([old_BT, ids_BT], dim=1)
        self.length = self.ids_BT.size(1)
        return self.ids_BT[:, -(T + EMBEDDING_CONTEXT) :]


class BlockInputs(NamedTuple):
    """Inputs of a block besides the residual stream; C = K * E."""

    x0_BTD: Tensor  # normalized embedding
    rotary_3TE: Tensor
    mask: Any  # result of the attention backend's `prepare`
    # Values of block 0, for VALUE_RESIDUAL=resformer or vrl.
    first_block_v_BTC: Tensor | None = None
    shared_v_BTC: Tensor | None = None  # shared value embedding
    kv_cache: LayerKVCache | None = None


class BlockScalars(NamedTuple):
    """One block's rows of GPT.block_scalars: learned factors, each None if it is not used."""

    value: Tensor | None = None  # (2,) or (1,): of block 0's values, then of the block's own
    shared: Tensor | None = None  # (): of the shared value embedding
    x0: Tensor | None = None  # (): of x0, added after the block
    write: Tensor | None = None  # (2, 2): of the attention (0) and MLP (1) update, in each lane
    carry: Tensor | None = None  # (2,): of the lanes themselves


class CausalSelfAttention(nn.Module):
    """Causal grouped-query attention; queries and keys: RMSNorm, then RoPE, then query gain."""

    def __init__(self, cfg: Config, layer: int, attention: AttentionBackend):
        super().__init__()
        D, H, K, E = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.c_q, self.c_k, self.c_v = (CastedLinear(D, width * E) for width in (H, K, K))
        self.proj = CastedLinear(H * E, D, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((H,), cfg.qk_gain_init))
        self.gate = None if cfg.attn_gate == "none" else AttnOutputGate(cfg)
        self.head_dim, self.use_xsa, self.attend = E, layer in cfg.xsa_blocks, attention.attend
        self.adapter: nn.Module | None = None  # parallel to the whole module

    def forward(self, n_BTD: Tensor, inputs: BlockInputs, scalars: BlockScalars) -> Tensor:
        """Attention output (B, T, D) for the normalized stream n."""
        q_BTD, k_BTC, v_BTC = self.c_q(n_BTD), self.c_k(n_BTD), self.c_v(n_BTD)
        v_BTC, heads = self.values(v_BTC, inputs, scalars), (-1, self.head_dim)
        q_BTHE, k_BTKE, v_BTKE = [torch.unflatten(x, -1, heads) for x in (q_BTD, k_BTC, v_BTC)]
        qk, sizes = [q_BTHE, k_BTKE], [q_BTHE.size(2), k_BTKE.size(2)]
        if is_eager_on_gpu(n_BTD):  # half as many launches
            qk = [torch.cat(qk, dim=2)]
        qk = [apply_rotary_emb(rms_norm(x), inputs.rotary_3TE) for x in qk]
        q_BTHE, k_BTKE = qk if len(qk) == 2 else torch.split(qk[0], sizes, dim=2)
        q_BTHE = q_BTHE * self.q_gain.to(n_BTD.dtype)[:, None]
        y_BTHE = self.attend_cached(q_BTHE, k_BTKE, v_BTKE, inputs)
        if self.use_xsa:
            y_BTHE = exclusive_self_attention(y_BTHE, v_BTKE)
        if self.gate is not None:
            y_BTHE = y_BTHE * self.gate(n_BTD)[..., None]
        y_BTD = self.proj(y_BTHE.flatten(2))
        return y_BTD if self.adapter is None else self.adapter(n_BTD, y_BTD)

    def fused_forward(
        self, fused: FusedUpdate, inputs: BlockInputs, scalars: BlockScalars
    ) -> Tensor:
        """`forward` for a graph compiled for a GPU: fewer passes over memory; see FusedUpdate."""
        weights = fused.norm_weight(self.c_q, self.c_k), fused.norm_weight(self.c_v)
        qk_BTC, v_BTC = NormProduct.apply(fused.x_BTD, *weights)  # type: ignore[no-untyped-call]
        v_BTC, heads = self.values(v_BTC, inputs, scalars), (-1, self.head_dim)
        qk_BTHE, v_BTKE = [torch.unflatten(x, -1, heads) for x in (qk_BTC, v_BTC)]
        H, by_group = len(self.q_gain), (*v_BTKE.shape[:3], -1)
        gain_H1 = F.pad(self.q_gain.to(qk_BTC.dtype), (0, v_BTKE.size(2)), value=1.0)[:, None]
        # The gradient of an expanded gain is summed by rows first.
        qk_BTHE = rms_norm(qk_BTHE) * gain_H1.expand(*qk_BTHE.shape[:2], -1, 1)
        qk_BTHE = apply_rotary_emb(qk_BTHE, inputs.rotary_3TE)
        y_BTHE = self.attend_cached(qk_BTHE[:, :, :H], qk_BTHE[:, :, H:], v_BTKE, inputs)
        gate = y_BTHE.new_ones(())
        if self.gate is not None:
            gate = self.gate(fused.columns(self.gate.weight.size(-1)))
        if self.use_xsa:
            gate_BTKG = gate.expand(y_BTHE.shape[:3]).reshape(by_group)
            args = y_BTHE.view(*by_group, self.head_dim), v_BTKE, gate_BTKG
            y_BTHE = GatedRejection.apply(*args)  # type: ignore[no-untyped-call]
        elif self.gate is not None:
            y_BTHE = y_BTHE * gate[..., None]
        return F.linear(y_BTHE.flatten(2), fused.scaled_weight(self.proj))

    def attend_cached(
        self, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, inputs: BlockInputs
    ) -> Tensor:
        """Head outputs (B, T, H, E), over the cached keys and values as well if there are any."""
        if inputs.kv_cache is not None:
            k_BTKE, v_BTKE = inputs.kv_cache.append(k_BTKE, v_BTKE)
        return self.attend(q_BTHE, k_BTKE, v_BTKE, inputs.mask)

    def values(self, v_BTC: Tensor, inputs: BlockInputs, scalars: BlockScalars) -> Tensor:
        """Values (B, T, K * E) with the value residual and the shared value embedding added.

        The value residual comes first: own * v + first * (values of block 0), by ResFormer
        (arXiv:2410.17897); VRL (openai/parameter-golf#457) has no factor `own`. Then the shared
        value embedding (openai/parameter-golf#414) is added with its own factor.
        """
        if scalars.value is not None and inputs.first_block_v_BTC is not None:
            factor = scalars.value.to(v_BTC.dtype)
            if len(factor) == 2:
                v_BTC = factor[1] * v_BTC
            v_BTC = v_BTC + factor[0] * inputs.first_block_v_BTC
        if scalars.shared is not None and inputs.shared_v_BTC is not None:
            v_BTC = v_BTC + scalars.shared.to(v_BTC.dtype) * inputs.shared_v_BTC
        return v_BTC


class MLP(nn.Module):
    """W2 leaky_relu(W1 x, LEAKY_SLOPE)^2; with slope 0 it is relu^2 (arXiv:2109.08668)."""

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
        return y_BTD if self.adapter is None else self.adapter(x_BTD, y_BTD)

    def fused_forward(self, fused: FusedUpdate) -> Tensor:
        """`forward` for a graph compiled for a GPU; see FusedUpdate."""
        weights = fused.norm_weight(self.fc), fused.scaled_weight(self.proj)
        args = fused.x_BTD, self.slope, *weights
        return NormMLP.apply(*args)  # type: ignore[no-untyped-call]


# The stream that attention reads, and the MLP's lane once the stream is split into two.
Lanes = tuple[Tensor, Tensor | None]


class Block(nn.Module):
    """Transformer block: mix in x0, add attention, add MLP, each with a learned channel scale."""

    def __init__(self, cfg: Config, layer: int, attention: AttentionBackend):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(cfg, layer, attention), MLP(cfg)
        D, self.form = cfg.model_dim, cfg.parallel_residual
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        keep = 1.0
        if cfg.resid_mix_init == "phase":  # a sigmoid of depth: early blocks prefer x0
            keep = 1 / (1 + math.exp(-3 * (layer / max(1, cfg.num_layers - 1) - 0.5)))
        self.resid_mix = nn.Parameter(torch.tensor([[keep], [1 - keep]]).repeat(1, D))
        self.shares_input = self.form == "stream" and layer >= cfg.parallel_start_layer
        # A tensor, because a Python number would give every depth a compiled graph of its own.
        scale = torch.tensor((layer + 1) ** -0.5, device="cpu")
        self.norm_scale = nn.Buffer(scale, persistent=False) if cfg.ln_scale else None

    def forward(self, lanes: Lanes, inputs: BlockInputs, scalars: BlockScalars) -> Lanes:
        """The residual stream after this block, or its two lanes.

        PARALLEL_RESIDUAL decides what happens from block PARALLEL_START_LAYER on. Where the
        stream is split into lanes, GPT.forward says on which lanes the U-Net skips act.

        - none: attention, then the MLP, on one stream.
        - stream (openai/parameter-golf#1412, #1460): one stream; attention and MLP read the same
          input.
        - merge (openai/parameter-golf#1477): attention reads and writes lane 0, the MLP lane 1;
          a learned weight merges the lanes after the last block. The split comes after the skip.
        - routed (openai/parameter-golf#1204): both write to both lanes with learned factors; the
          MLP reads lane 1 after attention wrote to it. The split comes before the skip, which
          acts on both lanes; the mean of the lanes is the output.
        - lanes (openai/parameter-golf#1529): as routed, but the MLP reads lane 1 before attention
          writes to it, and the skip acts on lane 0 only.
        """
        x_BTD, side_BTD = lanes
        if side_BTD is not None and scalars.write is not None:
            return self.route(x_BTD, side_BTD, inputs, scalars)
        x_BTD = self.mix_x0(x_BTD, inputs)
        after_BTD = self.update(self.attn, x_BTD, x_BTD, inputs, scalars)
        if side_BTD is not None:
            return after_BTD, self.update(self.mlp, side_BTD, side_BTD)
        x_BTD = self.update(self.mlp, x_BTD if self.shares_input else after_BTD, after_BTD)
        if scalars.x0 is not None:
            x_BTD = x_BTD + scalars.x0.to(x_BTD.dtype) * inputs.x0_BTD
        return x_BTD, None

    def route(
        self, x_BTD: Tensor, side_BTD: Tensor, inputs: BlockInputs, scalars: BlockScalars
    ) -> Lanes:
        """The two lanes after this block in the forms `lanes` and `routed`; see forward."""
        assert scalars.write is not None and scalars.carry is not None, "lanes without factors"
        write, carry = scalars.write.to(x_BTD.dtype), scalars.carry.to(x_BTD.dtype)
        a_BTD = self.update(self.attn, self.mix_x0(x_BTD, inputs), None, inputs, scalars)
        if self.form == "lanes":
            m_BTD = self.update(self.mlp, side_BTD, None)
            x_BTD = carry[0] * x_BTD + write[0, 0] * a_BTD + write[1, 0] * m_BTD
            side_BTD = carry[1] * side_BTD + write[0, 1] * a_BTD + write[1, 1] * m_BTD
            return x_BTD, side_BTD
        x_BTD = carry[0] * x_BTD + write[0, 0] * a_BTD
        side_BTD = carry[0] * side_BTD + write[0, 1] * a_BTD
        m_BTD = self.update(self.mlp, self.mix_x0(side_BTD, inputs), None)
        return carry[1] * x_BTD + write[1, 0] * m_BTD, carry[1] * side_BTD + write[1, 1] * m_BTD

    def norm(self, x_BTD: Tensor) -> Tensor:
        """Input of attention and MLP: RMSNorm, scaled by 1/sqrt(layer + 1) with LN_SCALE."""
        n_BTD = rms_norm(x_BTD)
        return n_BTD if self.norm_scale is None else n_BTD * self.norm_scale.to(n_BTD.dtype)

    def mix_x0(self, x_BTD: Tensor, inputs: BlockInputs) -> Tensor:
        keep, inject = self.resid_mix.to(x_BTD.dtype)
        return keep * x_BTD + inject * inputs.x0_BTD

    def update(self, module: Any, x_BTD: Tensor, residual: Tensor | None, *inputs: Any) -> Tensor:
        """The update of attention or the MLP for the stream x, added to the residual if any."""
        scale_D = self.attn_scale if module is self.attn else self.mlp_scale
        if is_compiled_for_gpu(x_BTD):
            assert module.adapter is None, "adapters in a compiled graph"
            fused = FusedUpdate(x_BTD, self.norm_scale, scale_D)
            y_BTD: Tensor = module.fused_forward(fused, *inputs)
        else:
            y_BTD = scale_D.to(x_BTD.dtype) * module(self.norm(x_BTD), *inputs)
        return y_BTD if residual is None else residual + y_BTD


def run_block(block: nn.Module, *args: Any) -> Lanes:
    """Call `block`; compiled as one graph for all blocks of the same structure."""
    return block(*args)


def blend_skip(x_BTD: Tensor, saved_BTD: Tensor, weight_D: Tensor, gate_D: Tensor | None) -> Tensor:
    """U-Net skip: add a saved output to the stream, or blend both by a gate per channel."""
    skip_BTD = weight_D.to(x_BTD.dtype) * saved_BTD
    if gate_D is None:
        return x_BTD + skip_BTD
    return torch.lerp(skip_BTD, x_BTD, torch.sigmoid(gate_D).to(x_BTD.dtype))


class LayerCall(NamedTuple):
    """One call of a block in the forward pass; looped blocks are called several times."""

    block: int  # index of the block
    skip: int | None  # row of skip_weights if a saved output is added before the block
    save: bool  # whether the output is saved for a skip
    split_lanes: bool = False  # whether the stream is copied into two lanes before


def layer_schedule(
    num_layers: int, loop: tuple[int, int] = (0, -1), passes: int = 1, lanes_from: int | None = None
) -> list[LayerCall]:
    """Layer calls of the forward pass, in order: a U-Net over the calls.

    Blocks loop[0] to loop[1] are called `passes` times (openai/parameter-golf#1394). The first
    half of the calls saves its outputs; the second half adds them back, the last saved one first.
    With `lanes_from`, the stream is split into lanes before the first call of the second half
    whose block is at least `lanes_from`.
    """
    order, (first, last) = list(range(num_layers)), loop
    order[first : last + 1] = order[first : last + 1] * passes
    num_saved = len(order) // 2
    calls, is_split = [], False
    for position, block in enumerate(order):
        row = position - num_saved  # of skip_weights
        split = row >= 0 and not is_split and lanes_from is not None and block >= lanes_from
        skip = row if 0 <= row < num_saved else None
        calls.append(LayerCall(block, skip, save=row < 0, split_lanes=split))
        is_split = is_split or split
    return calls


def layer_schedules(cfg: Config) -> list[list[LayerCall]]:
    """Schedules with 0 to NUM_LOOPS extra passes through the loop; the last is the full model."""
    has_lanes = cfg.parallel_residual not in ("none", "stream")
    lanes_from = cfg.parallel_start_layer if has_lanes else None
    loop = cfg.loop_start, cfg.loop_end
    return [
        layer_schedule(cfg.num_layers, loop, passes, lanes_from)
        for passes in range(1, cfg.num_loops + 2)
    ]


def init_block_scalars(cfg: Config) -> dict[str, Tensor]:
    """Initial values of GPT.block_scalars, one row for each block; see BlockScalars.

    Rows of `value` begin with block 1, rows of `shared` belong to the blocks of VE_LAYERS. `merge`
    is the weight of lane 0 in the final merge, one number for the whole model.
    """
    num_layers, num_shared = cfg.num_layers, len(parse_int_list(cfg.ve_layers))
    by_value_residual = {
        "resformer": {"value": torch.full((num_layers - 1, 2), 0.5)},
        "vrl": {"value": torch.zeros(num_layers - 1, 1)},
        "x0": {"x0": torch.zeros(num_layers)},
    }
    write = torch.ones(num_layers, 2, 2)
    by_parallel_residual = {
        "routed": {"write": write, "carry": torch.full((num_layers, 2), 1.1**0.5)},
        "lanes": {"write": write, "carry": torch.full((num_layers, 2), 1.1)},
        "merge": {"merge": torch.tensor(0.5)},
    }
    scalars = by_value_residual.get(cfg.value_residual, {})
    scalars |= by_parallel_residual.get(cfg.parallel_residual, {})
    if num_shared:
        scalars["shared"] = torch.ones(num_shared)
    return scalars


def softcap_logits(z_NV: Tensor, cap: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """cap * tanh(z / cap), tanh(z / cap), both in float32, and the cap of each logit.

    `cap` is a number, or two caps: of positive and of negative logits.
    """
    z_NV = z_NV.float()
    cap = torch.where(z_NV > 0, cap[0], cap[1]) if isinstance(cap, Tensor) else cap
    tanh_NV = torch.tanh(z_NV / cap)
    return cap * tanh_NV, tanh_NV, cap


def softcapped_cross_entropy(
    z_NV: Tensor, target_N: Tensor, weight_N: Tensor | None, cap: float | Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross-entropy in nats of each target under softmax(softcap(z)), in float32.

    With weights, also the gradients of sum(weight * nll): by z, in the dtype of z, and by the caps
    if there are two (AsymLogit, openai/parameter-golf#1923).
    """
    logits_NV, tanh_NV, cap_NV = softcap_logits(z_NV, cap)
    lse_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    is_target_NV = torch.arange(z_NV.size(1), device=z_NV.device) == target_N[:, None]
    nll_N = lse_N1[:, 0] - torch.where(is_target_NV, logits_NV, 0).sum(dim=1)
    if weight_N is None:
        return nll_N, None, None
    softmax_NV = (logits_NV - lse_N1).exp()
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


# Logits that exist at a time: 64 MiB in float32 on a CPU, where more is not faster; on a GPU
# 256 MiB, because small products do not fill it. The training loss has them in bf16 and passes over
# them several times: on a CPU they stay in the caches.
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**26}
MAX_LOSS_LOGITS = {"cpu": 2**20, "cuda": 2**27}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of softcapped cross-entropies, computed in chunks of rows to save memory.

    The gradient is computed in the forward pass, while a chunk's logits exist, and scaled by the
    incoming gradient in the backward pass. This avoids computing the logits twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, cap: float | Tensor, *constants: Any
    ) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and the nll of each target (N, not differentiable), both in float32.

        The constants are targets (N), weights (N) and the function, softcapped_cross_entropy or
        its compiled form.
        """
        (target_N, weight_N, nll_function), head = constants, head_VD.to(x_ND.dtype)
        chunk = max(1, MAX_LOSS_LOGITS[x_ND.device.type] // len(head))
        nll_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        grad_x_ND, grad_head_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD)
        grad_cap = torch.zeros_like(cap) if isinstance(cap, Tensor) else None
        for n in range(0, len(x_ND), chunk):
            rows = slice(n, n + chunk)
            z_NV = x_ND[rows] @ head.T
            nll_N[rows], grad_NV, cap_part = nll_function(z_NV, target_N[rows], weight_N[rows], cap)
            torch.mm(grad_NV, head, out=grad_x_ND[rows])
            grad_head_VD += grad_NV.T @ x_ND[rows]
            if grad_cap is not None:
                grad_cap += cap_part
        ctx.save_for_backward(grad_x_ND, grad_head_VD, grad_cap)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> Any:
        grad_x_ND, grad_head_VD, grad_cap = ctx.saved_tensors
        grad_x_ND = grad_x_ND * scale.to(grad_x_ND.dtype)
        grad_cap = None if grad_cap is None else grad_cap * scale
        return grad_x_ND, grad_head_VD * scale, grad_cap, None, None, None


class MixerInputs(NamedTuple):
    """The n-gram mixer that replaces the softmax, and its inputs."""

    mixer: Any
    context_BTK: Tensor  # the K tokens up to each input
    keep_BT: Tensor  # which targets are recorded; the others keep the softmax's nll

    def at(self, positions: slice) -> MixerInputs:
        """The inputs of these positions."""
        return MixerInputs(self.mixer, self.context_BTK[:, positions], self.keep_BT[:, positions])

    def rows(self, rows: slice) -> MixerInputs:
        """The inputs of these rows."""
        return MixerInputs(self.mixer, self.context_BTK[rows], self.keep_BT[rows])

    def as_one_row(self) -> MixerInputs:
        """The inputs with all batch rows in one row."""
        context, keep = self.context_BTK.flatten(0, 1), self.keep_BT.flatten()
        return MixerInputs(self.mixer, context[None], keep[None])


MIN_ORTHOGONAL_SIDE = 64  # of a weight matrix; see GPT.init_weights_
AdaptedModule = CastedLinear | Embedding | CausalSelfAttention | MLP  # modules with an `adapter`


# Inductor measures Triton's products, with the operations that it can fuse into them, against the
# library's, and takes the faster. It would print a table for each.
AUTOTUNE_OPTIONS: dict[str, Any] = {
    "max_autotune_gemm": True,
    "epilogue_fusion_first": True,
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}


class GPT(nn.Module):
    """The language model: embedding, layer calls, norm, head, softcapped cross-entropy."""

    def __init__(self, cfg: Config, attention: AttentionBackend, dtype: torch.dtype):
        super().__init__()
        self.cfg, self.dtype, self.prepare_mask, D = cfg, dtype, attention.prepare, cfg.model_dim
        self.tok_emb = Embedding(cfg.vocab_size, D)
        self.blocks = nn.ModuleList(Block(cfg, i, attention) for i in range(cfg.num_layers))
        self.schedules = layer_schedules(cfg)
        self.use_final_schedule()
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
        self.blend_skip, self.nll = blend_skip, softcapped_cross_entropy
        self.train_forward: Callable[..., Tensor] | None = None  # compiled
        # Pairs of tokens whose logits get a penalty in scores, and the penalty.
        self.banned: tuple[Tensor, float] | None = None
        # Called with logits, targets, scores and mixer of each chunk, for an audit.
        self.normalization_check: Callable[..., None] | None = None
        # Adapters of each layer call, each with the module that it is attached to.
        self.adapters: list[list[tuple[AdaptedModule, BatchedLoRA]]] = []
        self.init_weights_()

    def add_optional_modules(self) -> None:
        """Make the modules and parameters that are None or empty if their knobs are off."""
        cfg = self.cfg
        self.hashes = nn.ModuleList()
        if cfg.bigram_vocab_size:
            self.hashes.append(HashEmbedding(cfg, 2, cfg.bigram_vocab_size, cfg.bigram_dim))
        if cfg.trigram_vocab_size:
            self.hashes.append(HashEmbedding(cfg, 3, cfg.trigram_vocab_size, cfg.trigram_dim))
        self.smear = None if cfg.smear_gate == "none" else SmearGate(cfg)
        self.ve_layers = parse_int_list(cfg.ve_layers)
        # The shared value embedding.
        self.ve_table: Embedding | None = None
        self.ve_proj: CastedLinear | None = None
        self.ve_scale: nn.Parameter | None = None
        if self.ve_layers:
            self.ve_table = Embedding(cfg.vocab_size, cfg.ve_dim)
            self.ve_proj = CastedLinear(cfg.ve_dim, cfg.num_kv_heads * cfg.head_dim)
            self.ve_scale = nn.Parameter(torch.tensor(0.1))
        self.block_scalars = nn.ParameterDict(init_block_scalars(cfg))
        self.caps: nn.Parameter | None = None  # of positive and of negative logits
        if cfg.asym_logit_rescale:
            self.caps = nn.Parameter(torch.full((2,), cfg.logit_softcap))

    @torch.no_grad()
    def init_weights_(self) -> None:
        """Draw the initial weights; output projections start at zero.

        INIT=default is PyTorch's uniform fan-in; orthogonal has orthogonal matrices where both
        sides are at least MIN_ORTHOGONAL_SIDE; orthogonal_scaled also divides the projections of
        hashed and value embeddings by sqrt(2 * NUM_LAYERS), as openai/parameter-golf#430 does.
        """
        cfg, table = self.cfg, self.tok_emb.weight
        if cfg.tie_embeddings:
            table.normal_(std=cfg.tied_embed_init_std)
        if cfg.embed_init == "overtone":
            u, s, v = torch.linalg.svd(table, full_matrices=False)
            table.copy_(u * (s[0] * torch.arange(1, len(s) + 1) ** -0.5) @ v)
        linears = [module for module in self.modules() if isinstance(module, CastedLinear)]
        for linear in linears:
            if linear.zero_init:
                linear.weight.zero_()
            elif cfg.init != "default" and min(linear.weight.shape) >= MIN_ORTHOGONAL_SIDE:
                nn.init.orthogonal_(linear.weight)
        if self.ve_table is not None and self.ve_proj is not None:
            self.ve_table.weight.normal_(std=0.01)
            nn.init.orthogonal_(self.ve_proj.weight)
        if cfg.init == "orthogonal_scaled":
            projections = [m.proj for m in self.hashes if isinstance(m, HashEmbedding)]
            if self.ve_proj is not None:
                projections.append(self.ve_proj)
            for projection in projections:
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
        """Compile the blocks, the skips and the loss; on a GPU, also the forward pass as a whole.

        One graph has no eager operations between blocks, and fuses across them. Training uses it;
        evaluation has other shapes, for which compiling blocks takes less time.
        """
        # Graphs: structures of blocks x shapes x with and without gradients.
        torch._dynamo.config.recompile_limit = 128
        # Late QAT needs scales rounded to fp16 as stored; Inductor would keep them in float32.
        torch._inductor.config.emulate_precision_casts = self.cfg.late_qat_threshold > 0
        self.run_block = torch.compile(run_block, dynamic=False)
        self.blend_skip = torch.compile(blend_skip, dynamic=False)
        self.nll = torch.compile(softcapped_cross_entropy, dynamic=False)
        if self.cfg.compile_forward and self.skip_weights.is_cuda:
            # Otherwise some streams are saved for the backward pass in float32.
            functorch_config: Any = importlib.import_module("torch._functorch.config")
            functorch_config.ban_recompute_long_fusible_chains = False
            options = AUTOTUNE_OPTIONS if self.cfg.kernels == "auto" else None
            whole = torch.compile(GPT.forward, dynamic=False, options=options)
            self.train_forward = functools.partial(whole, self)

    def compile_less(self) -> None:
        """Drop the graph of the whole forward pass, or all graphs if there is none."""
        if self.train_forward is None:
            self.run_block, self.blend_skip = run_block, blend_skip
            self.nll = softcapped_cross_entropy
        self.train_forward = None

    def set_adapters(self, adapters: list[list[tuple[AdaptedModule, BatchedLoRA]]]) -> None:
        """Replace the adapters of all layer calls; an empty list removes them."""
        for module, _ in itertools.chain(*self.adapters):
            module.adapter = None
        self.adapters = adapters

    def attach_adapters(self, call_index: int) -> None:
        """Attach the adapters of a layer call to its modules."""
        if self.adapters:
            for module, adapter in self.adapters[call_index]:
                module.adapter = adapter

    def forward(self, ids_BT: Tensor, past: KVCache | None = None, mask: Any = None) -> Tensor:
        """Final residual stream after the norm (B, T, D), of tokens that continue `past`.

        `mask` is what the attention backend prepared for these tokens, if it is known already.
        With deep supervision, further B rows are the stream after half of the layer calls.

        Order of skip and lane split, see Block.forward for the lanes themselves: with
        PARALLEL_RESIDUAL=merge the skip is applied first and the stream split afterwards, so that
        both lanes contain it; later skips act on lane 0. With lanes and routed the stream is split
        first; then the skip acts on lane 0 (lanes) or on both (routed).
        """
        context_BT = ids_BT if past is None else past.append_tokens(ids_BT)
        x_BTD, side_BTD = self.embed(context_BT)[:, -ids_BT.size(1) :], None
        inputs = self.block_inputs(ids_BT, x_BTD, past, mask)
        form = self.cfg.parallel_residual
        saved: list[Tensor] = []
        for index, call in enumerate(self.schedule):
            if index == len(self.schedule) // 2:
                middle_BTD = x_BTD
            if call.split_lanes and form != "merge":
                side_BTD = x_BTD
            if call.skip is not None:
                gate_D = None if self.skip_gates is None else self.skip_gates[call.skip]
                skip = saved.pop(), self.skip_weights[call.skip], gate_D
                x_BTD = self.blend(x_BTD, *skip)
                if side_BTD is not None and form == "routed":
                    side_BTD = self.blend(side_BTD, *skip)
            if call.split_lanes and form == "merge":
                side_BTD = x_BTD
            self.attach_adapters(index)
            if past is not None:
                inputs = inputs._replace(kv_cache=past.layers[index])
            block, scalars = self.blocks[call.block], self.block_scalars_of(call.block)
            x_BTD, side_BTD = self.run_block(block, (x_BTD, side_BTD), inputs, scalars)
            if call.save:
                saved.append(x_BTD)
        x_BTD = x_BTD if side_BTD is None else self.merge_lanes(x_BTD, side_BTD)
        return rms_norm(torch.cat([x_BTD, middle_BTD]) if self.deep_supervision else x_BTD)

    def blend(self, x_BTD: Tensor, *skip: Any) -> Tensor:
        """`blend_skip`; compiled for a GPU, computed again for the backward pass, not saved."""
        if is_compiled_for_gpu(x_BTD):
            again: Any = torch.utils.checkpoint.checkpoint
            return again(blend_skip, x_BTD, *skip, use_reentrant=False, preserve_rng_state=False)
        return self.blend_skip(x_BTD, *skip)

    def use_final_schedule(self) -> None:
        """Run as the training ends: all loops, and no loss in the middle."""
        self.schedule, self.deep_supervision = self.schedules[-1], 0.0

    def merge_lanes(self, x_BTD: Tensor, side_BTD: Tensor) -> Tensor:
        """Weighted mean of the lanes: by the learned weight of `merge`, otherwise 1/2."""
        weight: float | Tensor = 0.5
        if "merge" in self.block_scalars:
            weight = self.block_scalars["merge"].to(self.dtype)
        return weight * x_BTD + (1 - weight) * side_BTD

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
        self, ids_BT: Tensor, x0_BTD: Tensor, past: KVCache | None = None, mask: Any = None
    ) -> BlockInputs:
        """The inputs of the blocks besides the residual stream; see BlockInputs."""
        T = ids_BT.size(1)
        length, capacity, dropped = T, T, 0
        if past is not None:
            length, capacity, dropped = past.length, past.capacity, past.num_dropped
        # The capacity chooses the table of P positions: angles must not change as the cache grows.
        table_3PE = self.rotary if capacity <= self.cfg.train_seq_len else self.long_rotary
        assert capacity <= table_3PE.size(1), "longer than EVAL_SEQ_LEN"
        if mask is None:
            mask = self.prepare_mask(ids_BT, self.cfg.isolate_documents, length - T)
        stop, size = dropped + length, table_3PE.size(1)
        rotary_3TE = table_3PE[:, stop - T : stop]
        if stop > size:
            rotary_3TE = rotary_table(self.cfg, size, (stop - T, stop)).to(table_3PE)
        shared_v_BTC = self.shared_values(ids_BT)
        inputs = BlockInputs(x0_BTD, rotary_3TE, mask, shared_v_BTC=shared_v_BTC)
        if "value" in self.block_scalars:
            inputs = inputs._replace(first_block_v_BTC=self.first_block_values(inputs))
        return inputs

    def shared_values(self, ids_BT: Tensor) -> Tensor | None:
        """The shared value embedding (B, T, K * E), if VE_LAYERS is set."""
        if self.ve_table is None or self.ve_proj is None or self.ve_scale is None:
            return None
        table_BTI = self.ve_table(ids_BT).to(self.dtype)
        return self.ve_proj(table_BTI) * self.ve_scale.to(self.dtype)

    def first_block_values(self, inputs: BlockInputs) -> Tensor:
        """Values of block 0 (B, T, K * E) without its adapter, as in openai/parameter-golf#457.

        Block 0 computes them again in its own call, which costs less than a second compiled graph
        that returns them.
        """
        block: Any = self.blocks[0]
        n_BTD = block.norm(block.mix_x0(inputs.x0_BTD, inputs))
        adapter, block.attn.c_v.adapter = block.attn.c_v.adapter, None
        v_BTC = block.attn.c_v(n_BTD)
        block.attn.c_v.adapter = adapter
        return v_BTC

    def block_scalars_of(self, layer: int) -> BlockScalars:
        """The rows of block_scalars that belong to a block."""
        row_of = {"x0": layer, "write": layer, "carry": layer}
        if layer > 0:
            row_of["value"] = layer - 1
        if layer in self.ve_layers:
            row_of["shared"] = self.ve_layers.index(layer)
        scalars = self.block_scalars
        rows = {name: scalars[name][row] for name, row in row_of.items() if name in scalars}
        return BlockScalars(**rows)

    def logits(self, ids_BT: Tensor, past: KVCache | None = None) -> Tensor:
        """Softcapped logits (B, T, V) in float32, of tokens that continue `past`."""
        return softcap_logits(self(ids_BT, past) @ self.head_VD.to(self.dtype).T, self.cap)[0]

    def loss(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        weight_BT: Tensor | None = None,
        *,
        mask: Any = None,
        forward: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Training loss: the sum of weight * nll over all targets, or the mean nll.

        `forward` is called in place of this model, if it is given.
        """
        x_ND = (forward or self)(ids_BT, mask=mask).flatten(0, 1)
        target_N = target_BT.flatten()
        if weight_BT is None:
            weight_N = torch.full_like(target_N, 1 / len(target_N), dtype=torch.float32)
        else:
            weight_N = weight_BT.flatten().float()
        if deep := self.deep_supervision:
            target_N, weight_N = target_N.repeat(2), torch.cat([weight_N, deep * weight_N])
        args = (x_ND, self.head_VD, self.cap, target_N, weight_N, self.nll)
        return ChunkedCrossEntropy.apply(*args)[0]  # type: ignore[no-untyped-call]

    def token_nll(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        first: int = 0,
        *,
        past: KVCache | None = None,
        mixer_inputs: MixerInputs | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods in nats of the targets from position `first` on.

        Returns two float32 tensors (B, T - first): the softmax's, which are differentiable, and
        those to record, which differ from them where an n-gram mixer replaces the softmax.
        """
        B, head = len(ids_BT), self.head_VD.to(self.dtype)
        x_BTD, target_BT = self(ids_BT, past)[:, first:], target_BT[:, first:]
        ids_BT = ids_BT[:, first:]
        if mixer_inputs is not None:
            mixer_inputs = mixer_inputs.at(slice(first, None))
        if self.head.adapter is None:  # without one, rows need not be kept apart
            x_BTD, target_BT = x_BTD.flatten(0, 1)[None], target_BT.flatten()[None]
            ids_BT = ids_BT.flatten()[None]
            if mixer_inputs is not None:
                mixer_inputs = mixer_inputs.as_one_row()
        num_rows, T = target_BT.shape
        chunk_len = max(1, MAX_LOGITS[x_BTD.device.type] // (len(head) * num_rows))
        nll_parts, recorded_parts = [], []
        for start in range(0, max(1, T), chunk_len):
            positions = slice(start, start + chunk_len)
            mixer_chunk = None if mixer_inputs is None else mixer_inputs.at(positions)
            chunk = (x_BTD[:, positions], ids_BT[:, positions], target_BT[:, positions])
            nll_BT, recorded_BT = self.chunk_nll(head, *chunk, mixer_chunk)
            nll_parts.append(nll_BT)
            recorded_parts.append(recorded_BT)
        return torch.cat(nll_parts, dim=1).view(B, -1), torch.cat(recorded_parts, dim=1).view(B, -1)

    def chunk_nll(
        self,
        head_VD: Tensor,
        x_BTD: Tensor,
        ids_BT: Tensor,
        target_BT: Tensor,
        mixer_inputs: MixerInputs | None,
    ) -> tuple[Tensor, Tensor]:
        """What token_nll returns, for one chunk whose logits exist at the same time."""
        z_BTV = x_BTD @ head_VD.T
        if self.head.adapter is not None:
            z_BTV = self.head.adapter(x_BTD, z_BTV)
        z_NV, ids_N, target_N = z_BTV.flatten(0, 1), ids_BT.flatten(), target_BT.flatten()
        nll_N = recorded_N = self.nll(z_NV, target_N, None, self.cap)[0]
        if mixer_inputs is not None:
            recorded_N = self.mixed_nll(z_NV, ids_N, target_N, nll_N, mixer_inputs)
        elif self.banned is not None:
            logits_NV = self.scored_logits(z_NV.detach(), ids_N)
            recorded_N = F.cross_entropy(logits_NV, target_N, reduction="none")
        if self.normalization_check is not None:
            logits_NV = self.scored_logits(z_NV, ids_N)
            self.normalization_check(logits_NV, target_N, recorded_N, mixer_inputs)
        return nll_N.view(target_BT.shape), recorded_N.view(target_BT.shape)

    def scored_logits(self, z_NV: Tensor, ids_N: Tensor) -> Tensor:
        """Logits (N, V) in float32 that scores come from, of tokens after `ids_N`."""
        logits_NV = softcap_logits(z_NV, self.cap)[0]
        if self.banned is None:
            return logits_NV
        banned_VV, penalty = self.banned
        return torch.where(banned_VV[ids_N], logits_NV + penalty, logits_NV)

    def mixed_nll(
        self,
        z_NV: Tensor,
        ids_N: Tensor,
        target_N: Tensor,
        nll_N: Tensor,
        mixer_inputs: MixerInputs,
    ) -> Tensor:
        """The mixer's nll of the targets that are recorded, the softmax's of the others."""
        keep_N, context_NK = mixer_inputs.keep_BT.flatten(), mixer_inputs.context_BTK.flatten(0, 1)
        logits_NV = self.scored_logits(z_NV[keep_N], ids_N[keep_N])
        recorded_N = nll_N.detach().clone()
        recorded_N[keep_N] = mixer_inputs.mixer.nll(logits_NV, context_NK[keep_N], target_N[keep_N])
        return recorded_N

    @torch.no_grad()
    def eval_nll(
        self,
        ids_BT: Tensor,
        target_BT: Tensor,
        first: int = 0,
        mixer_inputs: MixerInputs | None = None,
    ) -> Tensor:
        """The nll to record (B, T - first) of token_nll, without gradients."""
        return self.token_nll(ids_BT, target_BT, first, mixer_inputs=mixer_inputs)[1]


class ParamRole(NamedTuple):
    """Optimizer group and quantization group of a parameter."""

    optim_group: str  # token, head, matrix, scalar or cap
    quant_group: str  # embed, attn, mlp, table, gate or control


def role_of(name: str, module: nn.Module) -> ParamRole:
    """The role of a parameter, from its name and the module that owns it."""
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
    assert not frozen, f"these parameters need no gradient and would not be trained: {frozen}"
    return {
        name: role_of(name, model.get_submodule(name.rpartition(".")[0]))
        for name, _ in model.named_parameters()
    }


def build_model(run: Run, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The model on the run's device, compiled if COMPILE=1: with `weights`, or initialized."""
    cfg, attention = run.cfg, choose_attention_backend(run.cfg, run.device, run.dtype)
    if attention.reason:
        text = f"the attention kernel is {attention.name}, which is slower: {attention.reason}"
        run.log("warning", text=format_line(text)[:500])
    if weights is None:
        torch.manual_seed(cfg.seed)  # weights are drawn on the CPU: the same on every device
        model = GPT(cfg, attention, run.dtype)
    else:
        with torch.device("meta"):  # no memory and no random numbers for initial weights
            model = GPT(cfg, attention, run.dtype)
        model.load_state_dict(weights, assign=True)
    model = model.to(run.device)
    if cfg.compile and (reason := compile_unavailable_reason(run.device)):
        run.log("warning", text=f"the model is not compiled: {reason}; training will be slower")
    elif cfg.compile:
        model.compile_()
    return model


def compile_unavailable_reason(device: torch.device) -> str:
    """Why torch.compile cannot work on this machine, or an empty string."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    inductor = importlib.import_module("torch._inductor.config")
    compiler = inductor.cpp.cxx[-1] or "g++"  # CXX if it is set
    command, assembly = [compiler, "-x", "c++", "-S", "-o", "-", "-"], b""
    with contextlib.suppress(OSError, ValueError):
        assembly = subprocess.run(
            command, input=b"#include <vector>\nint f() { return 1; }", capture_output=True
        ).stdout
    works = b"_Z1fv" in assembly
    return "" if works else f"no working C++ compiler ({compiler}); install g++ or set CXX"


class AttentionBackend(NamedTuple):
    """A causal attention kernel.

    `prepare(ids_BT, isolate, past)` makes what `attend(q, k, v, mask)` takes as its mask: documents
    are isolated if `isolate`; `past` is the number of keys before the first query, which is only
    used for rows of a single document. Queries are (B, T, H, E), keys and values (B, T, K, E).
    """

    name: str
    prepare: Callable[..., Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    reason: str = ""  # why it is not a better one


def choose_attention_backend(
    cfg: Config, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The backend that ATTENTION names; for auto, the fastest that works on the device."""
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
    flash, reason = None, ""
    if on_gpu and dtype == torch.bfloat16:
        flash, reason = find_flash_attention(cfg, device)
    # Flex skips masked blocks; a dense document mask takes T^2 bytes and rules out fast kernels.
    use_flex = on_gpu and cfg.isolate_documents and cfg.compile
    use_flex = use_flex and not compile_unavailable_reason(device)
    backend = flash or ATTENTION_BACKENDS["flex" if use_flex else "sdpa"]()
    return backend._replace(reason=reason)


@functools.cache
def find_flash_attention(cfg: Config, device: torch.device) -> tuple[AttentionBackend | None, str]:
    """The fastest FlashAttention that works on the device, and why it is not a faster one."""
    problems = list[str]()
    newest = {9: ["fa3"], 10: ["fa4"]}.get(torch.cuda.get_device_capability(device)[0], [])
    for name in [*newest, "fa2"]:
        try:
            backend = ATTENTION_BACKENDS[name]()
            difference = attention_error(backend, cfg, device)
            if difference < MAX_ATTENTION_ERROR:
                return backend, "; ".join(problems)
            problems.append(f"{name} differs from SDPA by {difference:.3g}")
        except Exception as error:  # not installed, not for this GPU, or it cannot be traced
            problems.append(f"{name}: {error}")
    return None, "; ".join(problems)


MAX_ATTENTION_ERROR = 0.02  # several times that of bf16's rounding


def attention_error(backend: AttentionBackend, cfg: Config, device: torch.device) -> float:
    """Largest relative error, by norms, of output and gradients against SDPA in float32.

    An error of the compiler if COMPILE=1 and torch.compile cannot trace the kernel.
    """
    B, T, E, generator = 2, 256, cfg.head_dim, torch.Generator().manual_seed(0)
    shapes = [(B, T, heads, E) for heads in (cfg.num_heads, *2 * [cfg.num_kv_heads])]
    qkv = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
    ids_BT = torch.randint(BOS_ID, 64, (B, T), generator=generator).to(device)
    attend, results = backend.attend, []
    if cfg.compile:
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    tested = backend._replace(attend=attend)
    for kernel, dtype in ((sdpa_backend(), torch.float32), (tested, torch.bfloat16)):
        q, k, v = inputs = [x.to(dtype).requires_grad_() for x in qkv]
        y_BTHE = kernel.attend(q, k, v, kernel.prepare(ids_BT, cfg.isolate_documents))
        gradients = torch.autograd.grad((y_BTHE * q.detach()).sum(), inputs)
        results.append([x.detach().float() for x in (y_BTHE, *gradients)])
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))


def document_index(ids_BT: Tensor) -> Tensor:
    """Index of each position's document within its row (B, T); a BOS token starts a document."""
    return (ids_BT == BOS_ID).cumsum(dim=-1)


def sdpa_backend() -> AttentionBackend:
    """PyTorch's scaled dot product attention, the reference for the other backends."""
    return AttentionBackend("sdpa", sdpa_mask, sdpa_attend)


def sdpa_mask(ids_BT: Tensor, isolate: bool, past: int = 0) -> Tensor | None:
    """Boolean mask: (B, 1, T, T) with documents, (T, past + T) with past keys; None = causal."""
    if past:
        T = ids_BT.size(1)
        return torch.ones(T, past + T, dtype=torch.bool, device=ids_BT.device).tril(past)
    if not isolate:
        return None
    doc_BT = document_index(ids_BT)
    return (doc_BT[:, None, :, None] == doc_BT[:, None, None, :]).tril()


def sdpa_attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, T, H, E) by PyTorch, or by TiledCausalAttention where that is faster.

    Which one does not depend on whether there are gradients: a score must not, either.
    """
    q, k, v = [x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE)]
    on_bf16_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if on_bf16_cpu and mask is None and q.size(2) <= MAX_TILED_LEN:
        y = TiledCausalAttention.apply(q, k, v, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return y.transpose(1, 2)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The memory-efficient kernel, used for these on a GPU, does not support grouped queries.
        k, v = [x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v)]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    ).transpose(1, 2)


def flash_backend(name: str, *modules: str) -> AttentionBackend:
    """FlashAttention from the first of `modules` that is there; ImportError if none is."""
    attend = functools.partial(flash_attend, import_flash_attention(modules))
    return AttentionBackend(name, flash_cu_seqlens, attend)


def import_flash_attention(names: Sequence[str]) -> Any:
    """The first of these modules that has FlashAttention's functions, or ImportError.

    With flash-attn-4 alone, `flash_attn` is a namespace package without them. A name with a slash
    is a repository of the hub of the package `kernels`, which may need a network at first.
    """
    problems = []
    for name in names:
        try:
            if "/" in name:
                module = importlib.import_module("kernels").get_kernel(name, version=1)
            else:
                module = importlib.import_module(name)
            if module.flash_attn_func and module.flash_attn_varlen_func:
                return module
        except Exception as error:  # of the network, too
            problems.append(f"{name}: {error}")
    raise ImportError("; ".join(problems))


def flash_cu_seqlens(ids_BT: Tensor, isolate: bool, past: int = 0) -> Any:
    """Cumulative sequence lengths (int32) of the documents in the flattened rows, or None.

    None means causal attention within rows; with past keys, the kernels align the last query with
    the last key, so that no lengths are needed.
    """
    if past or not isolate:
        return None
    starts = ids_BT == BOS_ID
    starts[:, 0] = True
    cuts = starts.flatten().nonzero().flatten().to(torch.int32)
    capacity = next(c for c in cu_seqlens_capacities(ids_BT.numel()) if c > len(cuts))
    return F.pad(cuts, (0, capacity - len(cuts)), value=ids_BT.numel())  # empty sequences


def cu_seqlens_capacities(num_tokens: int) -> Iterator[int]:
    """Lengths to which the cumulative sequence lengths of a batch are padded, in doubling steps.

    Kernels that read the length are compiled once for each, so there must be few of them.
    """
    capacity = max(64, num_tokens // 256)
    while True:
        yield capacity
        capacity *= 2


def flash_attend(
    kernels: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, cuts: Tensor | None
) -> Tensor:
    """FlashAttention of the module `kernels` (arXiv:2307.08691, arXiv:2407.08608)."""
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


def flex_backend() -> AttentionBackend:
    """PyTorch's flex attention, compiled on a GPU, also outside of compiled blocks."""
    kernel: Any = flex_attention.flex_attention
    if torch.cuda.is_available() and not compile_unavailable_reason(torch.device("cuda")):
        kernel = torch.compile(kernel, dynamic=False)
    return AttentionBackend("flex", flex_block_mask, functools.partial(flex_attend, kernel))


def flex_block_mask(ids_BT: Tensor, isolate: bool, past: int = 0) -> Any:
    """Block mask of documents and causality; flex attention skips its empty blocks."""
    doc_BT, (B, T) = document_index(ids_BT) * isolate, ids_BT.shape

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + past if past else (k <= q) & (doc_BT[b, q] == doc_BT[b, k])

    device = str(ids_BT.device)
    return flex_attention.create_block_mask(is_visible, B, None, T, past + T, device=device)


def flex_attend(kernel: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Any) -> Tensor:
    """Attention (B, T, H, E) by flex attention; if not compiled, it takes T^2 memory.

    A mask of SDPA is for SDPA, see uncompiled.
    """
    if mask is None or isinstance(mask, Tensor):
        return sdpa_attend(q_BTHE, k_BTKE, v_BTKE, mask)
    q, k, v = [x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE)]
    y: Tensor = kernel(q, k, v, block_mask=mask, enable_gqa=True)
    return y.transpose(1, 2)


# Made only when chosen, because FlashAttention may not be installed.
ATTENTION_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "fa4": functools.partial(flash_backend, "fa4", "flash_attn.cute"),
    "fa3": functools.partial(
        flash_backend, "fa3", "flash_attn_interface", "kernels-community/flash-attn3"
    ),
    "fa2": functools.partial(flash_backend, "fa2", "flash_attn"),
    "flex": flex_backend,
    "sdpa": sdpa_backend,
}


MAX_TILED_LEN = 1024  # positions; for longer sequences it takes too much memory
TILE_LEN = 64  # queries
TILE_WEIGHTS = 2**21  # more do not stay in the cache of a core


class TiledCausalAttention(torch.autograd.Function):
    """Causal attention of q (B, H, T, E) to k and v (B, K, T, E) in bf16 on a CPU, tile by tile.

    Faster than PyTorch's, as it skips the blocks above the diagonal and keeps the exponentials for
    the backward pass: 2 bytes for each head, query, and position that it sees. What can be done
    outside the two operators is done here, where the compiler fuses it with other operations.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, has_gradients: bool) -> Tensor:
        q = F.pad(q * q.size(-1) ** -0.5, (0, 1))
        k, v = F.pad(k, (0, 1), value=1.0), F.pad(v, (0, 2), value=1.0)
        y, sum_BHT1, weights = tiled_attention(q, k, v, has_gradients)
        ctx.save_for_backward(q, k, v, y, sum_BHT1, weights)
        return (y / sum_BHT1).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, y, sum_BHT1, weights = ctx.saved_tensors
        grad = (grad / sum_BHT1).to(q.dtype)
        delta_BHT1 = (grad * (y / sum_BHT1)).sum(dim=-1, keepdim=True)
        high = delta_BHT1.to(q.dtype)
        grad = torch.cat([grad, -high, (high - delta_BHT1).to(q.dtype)], dim=-1)
        dq, dk, dv = tiled_attention_gradients(grad, q, k, v, weights)
        return dq * dq.size(-1) ** -0.5, dk, dv, None


def attention_tiles(weights: Tensor, q: Tensor) -> Iterator[tuple[slice, int, int, Tensor]]:
    """Sequences, first query, end and weights of each tile of q (N, G, T, ...).

    The weights are (sequences, G * queries, end), as a tile's queries see the keys before its end:
    a part of `weights`, or a new tensor if that is empty.
    """
    N, G, T = q.shape[:3]
    num_rows = max(1, TILE_WEIGHTS // (G * TILE_LEN * max(1, T)))
    for first, start in itertools.product(range(0, N, num_rows), range(0, T, TILE_LEN)):
        rows, end = slice(first, min(N, first + num_rows)), min(T, start + TILE_LEN)
        shape = rows.stop - first, G * (end - start), end
        part = weights[: math.prod(shape)] if len(weights) else weights.new_empty(shape)
        yield rows, start, end, part.view(shape)
        weights = weights[math.prod(shape) :]


def num_attention_weights(T: int) -> int:
    """Length of the tiles' weights for one head."""
    num_full = T // TILE_LEN
    return TILE_LEN**2 * num_full * (num_full + 1) // 2 + T % TILE_LEN * T


# The module's name is part of the operators': a second import of this file must not replace them.
@torch.library.custom_op(f"{__name__.replace('.', '_')}::tiled_attention", mutates_args=())
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, keep_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of q (B, H, T, E + 1), scaled, to k (B, K, T, E + 1), v (B, K, T, E + 2).

    Returns the output (B, H, T, E) times the sum of each query's exponentials; that sum
    (B, H, T, 1) in float32; and the exponentials of all tiles, one after the other, if they are to
    be kept.

    Large scores are too coarse in bf16. So each product of q and k is computed twice: once for the
    largest score of each query, then with minus that score as the last channel of q, against ones
    in k.
    """
    (B, H, T, _), K, E = q.shape, k.size(1), q.size(-1) - 1
    q, k, v = q.view(B * K, H // K, T, E + 1), k.view(B * K, T, E + 1), v.view(B * K, T, E + 2)
    y, sum_BHT1 = q.new_empty(*q.shape[:3], E), q.new_empty(B, H, T, 1, dtype=torch.float32)
    weights = q.new_empty(B * H * num_attention_weights(T) if keep_weights else 0)
    sums = sum_BHT1.view(*q.shape[:3], 1)
    for rows, start, end, p in attention_tiles(weights, q):
        q_tile, k_tile = q[rows, :, start:end].clone().flatten(1, 2), k[rows, :end].contiguous().mT
        torch.bmm(q_tile, k_tile, out=p)
        diagonal = p.view(len(p), H // K, -1, end)[..., start:]
        future = torch.ones(diagonal.shape[-2:], dtype=torch.bool).triu_(1)
        diagonal.masked_fill_(future, -torch.inf)
        q_tile[..., E] = -p.amax(dim=-1)
        torch.bmm(q_tile, k_tile, out=p).exp_()
        diagonal.tril_()
        sum_tile = p.sum(dim=-1, keepdim=True, dtype=torch.float32)
        y[rows, :, start:end] = torch.bmm(p, v[rows, :end, :E]).view(len(p), H // K, -1, E)
        sums[rows, :, start:end] = sum_tile.view(len(p), H // K, -1, 1)
    return y.view(B, H, T, E), sum_BHT1, weights


@tiled_attention.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, keep_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, wide = q.shape
    y, sum_BHT1 = q.new_empty(B, H, T, wide - 1), q.new_empty(B, H, T, 1, dtype=torch.float32)
    return y, sum_BHT1, q.new_empty(B * H * num_attention_weights(T) if keep_weights else 0)


@torch.library.custom_op(f"{__name__.replace('.', '_')}::tiled_gradients", mutates_args=())
def tiled_attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (B, H, T, E), k and v (B, K, T, E), as in FlashAttention-2 (arXiv:2307.08691).

    `grad` (B, H, T, E + 2) is that of the output over the sum of the exponentials `weights`. Its
    last channels are the high and low bf16 halves of minus delta, its product with the output.
    Against ones in v, they make the subtraction of delta part of the product of grad and v.
    """
    (B, H, T, _), K, E = q.shape, k.size(1), q.size(-1) - 1
    q, grad = q.view(B * K, H // K, T, E + 1), grad.view(B * K, H // K, T, E + 2)
    k, v = k.view(B * K, T, E + 1), v.view(B * K, T, E + 2)
    dq, dk, dv = q.new_empty(*q.shape[:3], E), k.new_zeros(B * K, T, E), k.new_zeros(B * K, T, E)
    for rows, start, end, p in attention_tiles(weights, q):
        q_tile, grad_tile = [x[rows, :, start:end].flatten(1, 2) for x in (q, grad)]
        dv[rows, :end].baddbmm_(p.mT, grad_tile[..., :E])
        ds = torch.bmm(grad_tile, v[rows, :end].mT).mul_(p)
        dk[rows, :end].baddbmm_(ds.mT, q_tile[..., :E])
        dq[rows, :, start:end] = torch.bmm(ds, k[rows, :end, :E]).view(len(p), H // K, -1, E)
    return dq.view(B, H, T, E), dk.view(B, K, T, E), dv.view(B, K, T, E)


@tiled_attention_gradients.register_fake
def _(_grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    q, k, v, _ = inputs
    return tuple(x.new_empty(*x.shape[:3], q.size(-1) - 1) for x in (q, k, v))


def flops_per_token(cfg: Config) -> tuple[int, int]:
    """Floating-point operations per token, forward and backward: matrices and causal attention."""
    D, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
    num_calls = len(layer_schedules(cfg)[-1])
    num_weights = num_calls * 2 * D * (D + kv_dim + cfg.mlp_dim) + cfg.vocab_size * D
    return 6 * num_weights, 6 * num_calls * D * cfg.train_seq_len


def format_schedule(schedule: Sequence[LayerCall]) -> str:
    """Layer calls in order: 3> saves for a skip, 5(0) uses skip row 0, |8 splits into two lanes."""
    words = []
    for call in schedule:
        split, save = "|" * call.split_lanes, ">" * call.save
        skip = "" if call.skip is None else f"({call.skip})"
        words.append(f"{split}{call.block}{skip}{save}")
    return " ".join(words)


# --- 5. Optimization -----------------------------------------------------------------------------
# Muon for the weight matrices, AdamW for all other parameters. Schedules are functions of training
# progress in [0, 1], so that they work both with a time limit and with a limit on steps.


class Muon:
    """Muon: Nesterov momentum, orthogonalized updates, decoupled weight decay.

    Source: kellerjordan.github.io/posts/muon. Matrices of equal shape form a stack. Parallel Muon
    (openai/parameter-golf#399): a stack's gradients are summed and scattered over the ranks, each
    rank orthogonalizes its shard, and the updates are gathered, so that the replicas stay
    identical to the bit. The computation of one stack overlaps with the communication of others.
    Momentum buffers are float32; openai/parameter-golf#2135 keeps them in bf16.
    """

    def __init__(self, params: Sequence[nn.Parameter], run: Run):
        self.run, cfg, world_size = run, run.cfg, run.world_size
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(tuple(param.shape), []).append(param)
        self.stacks = sorted(by_shape.values(), key=lambda stack: -len(stack) * stack[0].numel())
        # Momentum of each stack, padded to a multiple of the ranks; after them, if used, the fast
        # momentum of each and the mean squares of the rows of each. A rank updates its shard only;
        # `gather_buffers` fills in the others.
        self.buffers = []
        kinds = [False] + [False] * (cfg.muon_fast_weight > 0) + [True] * (cfg.muon_beta2 > 0)
        for is_of_rows, stack in itertools.product(kinds, self.stacks):
            padded_len, (rows, columns) = math.ceil(len(stack) / world_size), stack[0].shape
            shape = (padded_len * world_size, rows, 1 if is_of_rows else columns)
            self.buffers.append(torch.zeros(shape, device=stack[0].device))
        self.coefficients = newton_schulz_coefficients(
            cfg.muon_coefficients, cfg.muon_backend_steps
        )
        self.product = dense_product
        # This rank's shard of each stack's gradient, and the communication that fills it.
        self.pending: list[tuple[Tensor, Any]] = []

    def local_shard(self, stack_LOI: Tensor) -> Tensor:
        """This rank's part of a padded stack."""
        return stack_LOI.chunk(self.run.world_size)[self.run.rank]

    def start_reduce(self) -> None:
        """Start to sum the gradients over the ranks; each rank receives its shard."""
        for stack, buffer in zip(self.stacks, self.buffers, strict=False):
            padding = [torch.zeros_like(stack[0]) for _ in range(len(stack), len(buffer))]
            grad_LOI = torch.stack([*map(grad_or_zeros, stack), *padding])
            work = None
            if self.run.world_size > 1:
                all_LOI, grad_LOI = grad_LOI, torch.empty_like(self.local_shard(grad_LOI))
                work = start_reduce_scatter(grad_LOI, all_LOI)
            self.pending.append((grad_LOI, work))

    def reduced_gradients(self) -> list[Tensor]:
        """The gradients of this rank's shards; waits until they are there."""
        self.pending = [(wait_for(*pair), None) for pair in self.pending]
        return [grad_LOI for grad_LOI, _ in self.pending]

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Update every parameter in place, after `start_reduce`."""
        cfg, updates = self.run.cfg, []
        for i, pair in enumerate(self.pending):
            grad_LOI = wait_for(*pair)
            buffer_LOI, *more = map(self.local_shard, self.buffers[i :: len(self.stacks)])
            buffer_LOI.mul_(momentum).add_(grad_LOI)
            if cfg.muon_fast_weight:
                add_fast_momentum(grad_LOI, more[0], cfg, momentum)
            update_LOI = grad_LOI.add_(buffer_LOI, alpha=momentum)  # Nesterov
            if cfg.muon_row_norm:  # MuonEq-R (arXiv:2603.28254)
                update_LOI = F.normalize(update_LOI, dim=-1, eps=1e-7)
            update_LOI = self.orthogonalize(update_LOI, self.product)
            if cfg.muon_beta2:
                update_LOI = normalize_rows(update_LOI, more[-1], cfg.muon_beta2)
            updates.append(self.gather(update_LOI))
        for stack, pair in zip(self.stacks, updates, strict=True):
            update_LOI, (rows, columns) = wait_for(*pair)[: len(stack)], stack[0].shape
            # Entries of a tall orthogonal matrix are smaller; this keeps the update's RMS equal.
            update_factor = -lr * max(1.0, rows / columns) ** 0.5
            shrink: Any = 1 - lr * weight_decay
            if cfg.muon_cautious_wd:  # arXiv:2510.12402
                pairs = zip(stack, update_LOI, strict=True)
                shrink = [1 - lr * weight_decay * (p_OI * u_OI > 0) for p_OI, u_OI in pairs]
            torch._foreach_mul_(stack, shrink)
            torch._foreach_add_(stack, list(update_LOI.float()), alpha=update_factor)
        self.pending = []

    def orthogonalize(self, update_LOI: Tensor, product: Callable[..., Tensor]) -> Tensor:
        """Newton-Schulz with the run's coefficients and dtype."""
        return orthogonalize(update_LOI, self.coefficients, self.run.dtype, product)

    def try_symmetric_products(self) -> None:
        """Use quack's products with a symmetric result if installed, right and faster here."""
        generator, stacks = torch.Generator().manual_seed(0), list[Tensor]()
        for buffer in map(self.local_shard, self.buffers[: len(self.stacks)]):
            stacks.append(torch.randn(buffer.shape, generator=generator).to(buffer))

        def all_updates(product: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
            """The norm, which a wrong scale changes, and all values."""
            updates = [self.orthogonalize(x_LOI, product).flatten() for x_LOI in stacks]
            x = torch.cat(updates).float()
            return x.norm(), x

        try:
            product = importlib.import_module("quack.gemm_interface").gemm_symmetric
            dense, symmetric = (
                second_time(self.run, functools.partial(all_updates, form))
                for form in (dense_product, product)
            )
        except Exception as error:  # of a compiler, or it is not installed
            self.run.log("kernels", form="symmetric", reason=format_line(f"{error}")[:300])
        else:
            if is_right_and_faster(self.run, "symmetric", symmetric, dense):
                self.product = product

    def gather(self, shard_LOI: Tensor) -> tuple[Tensor, Any]:
        """The stack of all ranks' shards, complete once the returned work is done."""
        if self.run.world_size == 1:
            return shard_LOI, None
        stack_LOI = shard_LOI.new_empty(self.run.world_size * len(shard_LOI), *shard_LOI.shape[1:])
        return stack_LOI, start_all_gather(stack_LOI, shard_LOI.contiguous())

    def gather_buffers(self) -> None:
        """Fill the momentum buffers on every rank, for a checkpoint."""
        for buffer in self.buffers:
            buffer.copy_(wait_for(*self.gather(self.local_shard(buffer))))


def add_fast_momentum(grad_LOI: Tensor, fast_LOI: Tensor, cfg: Config, momentum: float) -> None:
    """Update the fast momentum and add its part of a Nesterov update to the gradient, in place.

    The update is the weighted sum of two exponential averages that look one step ahead
    (KellerJordan/modded-nanogpt#340): (1 - m) (g + m B) for the rate m, the gradient g and the
    momentum B. The scale of the sum does not matter, so it is divided by the factor of the slow
    average, which the caller adds.
    """
    fast, weight = cfg.muon_fast_momentum, cfg.muon_fast_weight
    ratio = weight / (1 - weight) * (1 - fast) / (1 - momentum)
    fast_LOI.mul_(fast).add_(grad_LOI)
    grad_LOI.mul_(1 + ratio).add_(fast_LOI, alpha=ratio * fast)


def normalize_rows(update_LOI: Tensor, square_LO1: Tensor, beta2: float) -> Tensor:
    """NorMuon (arXiv:2510.05491): rows by their root mean square over time; the norm stays."""
    square_LO1.lerp_(update_LOI.float().square().mean(dim=-1, keepdim=True), 1 - beta2)
    norm_L11 = update_LOI.norm(dim=(-2, -1), keepdim=True)
    scaled_LOI = update_LOI / (square_LO1.sqrt() + 1e-10)
    return (F.normalize(scaled_LOI.flatten(1)).view_as(scaled_LOI) * norm_L11).to(update_LOI.dtype)


# Coefficients (a, b, c) of the iteration X -> a X + (b X X^T + c (X X^T)^2) X.
# Muon's own, with the largest slope at 0: 5 iterations bring singular values to [0.7, 1.2].
NS_CLASSIC = (3.4445, -4.7750, 2.0315)
# Polar Express (arXiv:2505.16932): the optimal polynomial for the result of the one before.
NS_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def newton_schulz_coefficients(name: str, num_iterations: int) -> list[tuple[float, float, float]]:
    """Coefficients of each Newton-Schulz iteration, by MUON_COEFFICIENTS."""
    if name == "polar":
        return list(NS_POLAR_EXPRESS[:num_iterations])
    return [NS_CLASSIC] * num_iterations


def dense_product(
    A: Tensor, B: Tensor, C: Tensor | None = None, *, alpha: float = 1, beta: float = 1
) -> Tensor:
    """alpha A B + beta C for stacks of matrices; in place of quack's gemm_symmetric."""
    return A @ B if C is None else torch.baddbmm(C, A, B, alpha=alpha, beta=beta)


def orthogonalize(
    g_LOI: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
    symmetric_product: Callable[..., Tensor] = dense_product,
) -> Tensor:
    """Newton-Schulz: approximately the nearest semi-orthogonal matrix of each in the stack."""
    x = g_LOI.to(dtype)
    # The iteration diverges if the spectral norm is above 1; the Frobenius norm is an upper bound.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x  # iterate with the smaller Gram matrix
    for a, b, c in coefficients:
        gram = symmetric_product(x, x.mT)
        polynomial = symmetric_product(gram, gram, C=gram, alpha=c, beta=b)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


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
    """The tensor, after the communication that fills it; None means there is none."""
    if work is not None:
        work.wait()
    return tensor


def grad_or_zeros(param: Tensor) -> Tensor:
    """The gradient of a parameter, or zeros if the step did not use it."""
    return torch.zeros_like(param) if param.grad is None else param.grad


def all_reduce_gradients(run: Run, last: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Sum all gradients and `last` (a scalar) over the ranks, as one flat vector.

    Returns that vector; the gradients become views of it. The scalar comes last, because the
    optimizer's kernels are slower on views that do not start at a multiple of 16 bytes.
    """
    flat_grads = [grad_or_zeros(param).flatten() for param in params]
    flat = run.all_reduce_sum(torch.cat([*flat_grads, last.view(1)]))
    pieces = torch.split(flat[:-1], [param.numel() for param in params])
    for param, piece in zip(params, pieces, strict=True):
        param.grad = piece.view_as(param)
    return flat


def make_optimizers(model: GPT, run: Run) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW and Muon; each parameter belongs to one of them, by its optimizer group."""
    cfg, roles = run.cfg, parameter_roles(model)
    members: dict[str, list[nn.Parameter]] = {}
    for name, role in roles.items():
        members.setdefault(role.optim_group, []).append(model.get_parameter(name))
    lr_and_decay = {
        "token": (cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr, cfg.embed_wd),
        "head": (cfg.head_lr, cfg.embed_wd),
        "scalar": (cfg.scalar_lr, cfg.adam_wd),
        "cap": (cfg.scalar_lr, 0.0),
    }
    groups = [
        {"params": members[group], "base_lr": lr, "weight_decay": decay}
        for group, (lr, decay) in lr_and_decay.items()
        if group in members
    ]
    adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
    # The state is made here and not by the first step, because checkpoints and warm-up copy it.
    for param in itertools.chain(*(group["params"] for group in adam.param_groups)):
        moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
        adam.state[param] = {"step": torch.zeros((), device=param.device), **moments}
    return adam, Muon(members["matrix"], run)


def lr_scale(
    progress: float, *, warmdown_frac: float, floor: float = 0.0, power: float = 1.0
) -> float:
    """Learning rate multiplier at `progress` in [0, 1]: 1, then down to 0, at least `floor`."""
    if warmdown_frac == 0 or progress < 1 - warmdown_frac:
        return 1.0
    return max(((1 - progress) / warmdown_frac) ** power, floor)


def momentum_at(step: int, progress: float, cfg: Config) -> float:
    """Muon's momentum: linear warmup in steps, linear cooldown in progress to the same start."""
    warmup, cooldown = cfg.muon_momentum_warmup_steps, cfg.muon_momentum_cooldown_frac
    by_warmup = step / warmup if warmup else 1.0
    by_cooldown = (1 - progress) / cooldown if cooldown else 1.0
    fraction = min(by_warmup, by_cooldown)
    start, end = cfg.muon_momentum_warmup_start, cfg.muon_momentum
    return end if fraction >= 1 else start + fraction * (end - start)


class WeightAverager:
    """The exported weights: the last ones, their EMA, or a mean of late ones.

    AVERAGING=swa takes every SWA_EVERY-th step of the low learning rates (arXiv:1803.05407), tail
    every step of the last TAIL_FRAC. Averages are float32 even if the weights are bf16.
    """

    def __init__(self, cfg: Config, params: Sequence[nn.Parameter]):
        self.cfg, self.count = cfg, torch.zeros((), dtype=torch.int64)
        self.params: list[Tensor] = list(params)
        # An EMA starts from the initial weights, whose weight after n steps is decay^n.
        averaged = [] if cfg.averaging == "none" else params
        self.average = [param.detach().float().clone() for param in averaged]

    @torch.no_grad()
    def update(self, step: int, scale: float, progress: float) -> None:
        """Add the weights after step `step` (from 1), whose learning rate multiplier was `scale`.

        SWA starts at a multiplier, since a time limit may end training before a given step.
        """
        cfg, weights = self.cfg, [param.float() for param in self.params]
        if cfg.averaging == "ema":
            torch._foreach_lerp_(self.average, weights, 1 - cfg.ema_decay)
            return
        if cfg.averaging == "swa":
            takes_step = scale < cfg.swa_start_lr and step % cfg.swa_every == 0
        else:
            takes_step = cfg.averaging == "tail" and progress > 1 - cfg.tail_frac
        if takes_step:
            self.count += 1
            torch._foreach_lerp_(self.average, weights, 1 / int(self.count))

    @torch.no_grad()
    def export_(self) -> None:
        """Copy the average into the model, unless there is none."""
        if self.cfg.averaging == "ema" or self.count:
            torch._foreach_copy_(self.params, self.average)


# --- 6. Training ---------------------------------------------------------------------------------
# `train` is the entry point. The training clock drives the schedules. Once per step all ranks agree
# on the clock, on checkpoints, signals and losses that are not finite, so that no rank waits in a
# collective for a rank that has stopped.


def train(run: Run, model: GPT, loader: BatchLoader, validate: Callable[[], Score]) -> Trainer:
    """Train `model` in place; at the end it holds the weights that AVERAGING selects."""
    trainer, cfg = Trainer(run, model), run.cfg
    load_checkpoint(trainer)
    first_step = trainer.progress.step
    if cfg.late_qat_threshold and cfg.solves_scales and not cfg.trains_on_grid:
        text = "late QAT rounds to the scales of QAT_GRID=rows, and the artifact stores others"
        run.log("warning", text=f"{text}; set QAT_GRID=artifact, or ROW_STEPS=max")
    with run.stage("warm_up"):
        trainer.warm_up()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    # Reads the first batch, and with it the order of the epoch, before the clock starts.
    loader.batch(trainer.progress.tokens, trainer.next_stage())
    limit_s = cfg.train_seconds
    run.log("begin", name="train", **({"limit_s": limit_s} if limit_s else {}))
    train_loop(trainer, loader, validate)
    trainer.stop_graphs()
    progress = trainer.progress
    run.ledger["training"] = progress.train_s
    run.scores["train_end"] = {
        "steps": progress.step,
        **progress.throughput(),
        "peak_memory_mib": round(peak_memory_mib(run.device), 1),
    }
    run.log("train_end", **run.scores["train_end"])
    if trainer.progress.step > first_step and trainer.current_stage.loops < cfg.num_loops:
        text = "is after the last step: the model is scored with loops that were never trained"
        run.log("warning", text=f"ENABLE_LOOPING_AT={cfg.enable_looping_at} {text}")
    warn_about_average(trainer)
    trainer.averager.export_()
    trainer.round_to_grid()
    trainer.enter_stage(trainer.current_stage._replace(qat=False, deep=0.0))
    return trainer


def train_loop(trainer: Trainer, loader: BatchLoader, validate: Callable[[], Score]) -> None:
    """Run optimizer steps until the budget is used; log, save checkpoints and validate."""
    run, cfg, losses = trainer.run, trainer.run.cfg, LossQueue(trainer)
    last_first_step = trainer.progress.step + FIRST_LOGGED_STEPS
    clock, saved_s, save_s = TrainingClock(trainer), time.perf_counter(), 0.0

    while not trainer.progress.is_over(cfg):
        scale = trainer.lr_scale()
        stage = trainer.next_stage()
        if stage.qat and not trainer.has_grid:
            losses.read()
            losses.check(losses.is_bad, check_weights=True)
            if trainer.solve_grid(loader):
                clock.advance()  # it took time: look at the clock again
                trainer.drop_unused_grid()
                continue
        trainer.enter_stage(stage)
        losses.add(trainer.step(loader.batch(trainer.progress.tokens, stage)))
        step = trainer.progress.step
        validates = cfg.val_loss_every > 0 and step % cfg.val_loss_every == 0
        is_logged = step % cfg.train_log_every == 0 or step <= last_first_step
        # A GPU computes this step while the loss of the one before is read, and so never waits for
        # the host. Where the loss of this step is needed, it has to.
        num_queued = int(run.is_asynchronous and not (validates or is_logged))
        losses.read(num_queued)
        checkpoint_due = 0 < cfg.checkpoint_every_seconds <= time.perf_counter() - saved_s
        flags = clock.end_step(checkpoint_due, run.signal_received, losses.is_bad)
        ends = trainer.progress.is_over(cfg, steps=1 + num_queued)
        has_time_to_save = not trainer.progress.is_over(cfg, save_s, steps=1 + num_queued)
        saves = (flags.checkpoint_due and has_time_to_save) or flags.interrupted or ends
        if saves and num_queued:  # look again, as nothing is queued now
            losses.read()
            flags = clock.end_step(*flags[:2], flags.bad_loss or losses.is_bad)
            ends = trainer.progress.is_over(cfg)
            saves = (flags.checkpoint_due and has_time_to_save) or flags.interrupted or ends
        losses.check(flags.bad_loss, check_weights=saves or validates)
        log_step(trainer, losses.newest, scale, is_logged or ends)
        if saves:
            before_s = trainer.progress.train_s
            trainer.save()
            saved_s = time.perf_counter()
            if ends:
                return
            clock.advance()  # saving counts as training time
            save_s = trainer.progress.train_s - before_s  # on the slowest rank
        if flags.interrupted:
            raise Interrupted(
                f"stopped by a signal after step {step}; start again with RUN_DIR={run.directory}"
            )
        if validates:
            validate_and_log(trainer, validate)
            clock.started_s = time.perf_counter()  # validation does not count as training time
    # What followed the last step has used up the time; or nothing was left to do.
    log_step(trainer, losses.newest, trainer.lr_scale(), trainer.progress.step > losses.first_step)


class LossQueue:
    """The losses of steps, in order; a device may still compute some of them."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.queued = trainer, deque[tuple[int, Callable[[], float]]]()
        self.first_step = trainer.progress.step
        # The last two steps whose loss was read, with the losses; all but the last are finite.
        self.steps, self.losses = (self.first_step, self.first_step), (math.nan, math.nan)

    @property
    def newest(self) -> float:
        return self.losses[1]

    @property
    def is_bad(self) -> bool:
        return self.steps[1] > self.first_step and not math.isfinite(self.newest)

    def add(self, loss: Tensor) -> None:
        """Queue the loss of the step that was just given to the device."""
        self.queued.append((self.trainer.progress.step, self.trainer.run.start_reading(loss)))

    def read(self, num_queued: int = 0) -> None:
        """Read all but the newest `num_queued` losses, up to one that is not finite."""
        while len(self.queued) > num_queued and not self.is_bad:
            step, read = self.queued.popleft()
            self.steps, self.losses = (self.steps[1], step), (self.newest, read())

    def check(self, bad_loss: bool, *, check_weights: bool) -> None:
        """Raise RunFailed after a bad loss or, with `check_weights`, if a weight is not finite."""
        problem = ""
        if bad_loss:
            problem = f"the loss is {self.newest}"
        elif check_weights and not all(bool(x.isfinite().all()) for x in self.trainer.params):
            problem = "a weight is not finite"
        if problem:
            raise RunFailed(
                f"{problem} at step {self.steps[1]} (last finite: {self.losses[0]:.4f} at step "
                f"{self.steps[0]}); a checkpoint before it is kept; start again with lower "
                "learning rates and another RUN_ID"
            )


FIRST_LOGGED_STEPS = 5  # steps after the start or a resumption that are always logged


class StepFlags(NamedTuple):
    """Conditions of a step that hold for all ranks if they hold on any of them."""

    checkpoint_due: bool = False
    interrupted: bool = False  # a signal has arrived
    bad_loss: bool = False  # the loss is not finite


class TrainingClock:
    """Advances the clock in `trainer.progress` by the time that the slowest rank takes."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.started_s = trainer, time.perf_counter()  # of the step

    def advance(self, *flags: bool) -> StepFlags:
        """Advance the clock by the slowest rank's seconds since the last call; all ranks' flags.

        The clock determines the learning rate, so it must be the same on all ranks.
        """
        run, progress = self.trainer.run, self.trainer.progress
        before_s, self.started_s = self.started_s, time.perf_counter()
        values = [progress.train_s + self.started_s - before_s, *map(float, StepFlags(*flags))]
        # On the host, which so does not wait for a GPU.
        reduced = run.all_reduce_max(torch.tensor(values, dtype=torch.float64))
        train_s, *any_rank = reduced.tolist()
        self.trainer.progress = progress._replace(train_s=train_s)
        return StepFlags(*map(bool, any_rank))

    def end_step(self, *flags: bool) -> StepFlags:
        """`advance` after a step, whose seconds are kept."""
        before, all_flags = self.trainer.progress, self.advance(*flags)
        last_s = self.trainer.progress.train_s - before.train_s
        self.trainer.progress = self.trainer.progress._replace(
            last_s=last_s, before_last_s=before.last_s
        )
        return all_flags


def log_step(trainer: Trainer, loss: float, scale: float, is_logged: bool) -> None:
    """Log a training step, or only show it in the last line of a terminal."""
    run, progress = trainer.run, trainer.progress
    done = progress.fraction(run.cfg)
    values = {
        "step": progress.step,
        "progress": round(done, 4),
        "eta_s": round(progress.train_s / done - progress.train_s, 1),
        "train_loss": round(loss, 5),
        "lr_scale": round(scale, 5),
        **progress.throughput(),
    }
    if is_logged:
        run.log("step", **values)
    else:
        run.show(format_event("step", **values))


def validate_and_log(trainer: Trainer, validate: Callable[[], Score]) -> None:
    """Score the current weights and log it."""
    with pass_between_steps(trainer):
        score = validate()
    trainer.run.log("val", step=trainer.progress.step, **score.summary())


PASS_BYTES = 8e9  # free memory that is enough to score: see gpu_report.md


@contextlib.contextmanager
def pass_between_steps(trainer: Trainer) -> Generator[None]:
    """Use the weights without QAT; save a checkpoint if a signal stops this rank or another."""
    trainer.enter_stage(trainer.current_stage._replace(qat=False, deep=0.0))
    if trainer.graphs and torch.cuda.mem_get_info()[0] < PASS_BYTES:
        trainer.graphs = {}  # they are captured again
    # A collective, so before the pass: an interrupted rank would not join it when saving.
    trainer.muon.gather_buffers()
    try:
        yield
    except RuntimeError:  # Interrupted, or a collective that another rank has left
        if trainer.progress.step:
            save_checkpoint(trainer)
        raise


MAX_INITIAL_EMA_WEIGHT = 0.01  # of the initial weights in the exported EMA, without a warning


def warn_about_average(trainer: Trainer) -> None:
    """Log a warning if the average is empty or still close to the initial weights."""
    run, averaging = trainer.run, trainer.run.cfg.averaging
    if averaging in ("swa", "tail") and not trainer.averager.count:
        run.log("warning", text=f"{averaging} averaged no weights; the last ones are exported")
    if averaging == "ema":
        initial_weight = run.cfg.ema_decay**trainer.progress.step
        if initial_weight > MAX_INITIAL_EMA_WEIGHT:
            text = f"{initial_weight:.1%} of the EMA is still the initial weights"
            run.log("warning", text=text)


# The next step is assumed to take this multiple of the mean step time, which a larger batch raises,
# or of the longer of the last two steps, if that is more: loops and long sequences come late.
SLOW_STEP = 1.2


class Progress(NamedTuple):
    """Steps, seconds and tokens of training so far."""

    step: int = 0  # finished optimizer steps
    train_s: float = 0.0  # training clock in seconds; validation does not count
    tokens: int = 0  # training tokens
    # Seconds of the last two steps. With a queue, one that follows a step waited for takes none.
    last_s: float = 0.0
    before_last_s: float = 0.0

    def fraction(self, cfg: Config) -> float:
        """Fraction of the budget in [0, 1]: of steps or of seconds, whichever is larger."""
        limit_s = cfg.train_seconds or math.inf
        return min(1.0, max(self.step / cfg.iterations, self.train_s / limit_s))

    def is_over(self, cfg: Config, extra_s: float = 0.0, steps: int = 1) -> bool:
        """Whether all steps are done, or `extra_s` and more `steps` would exceed the time."""
        done, schedule = self.fraction(cfg), cfg.train_batch_schedule
        tokens = scheduled_value(schedule, done, cfg.train_batch_tokens)
        growth = max(1.0, tokens * self.step / self.tokens) if self.tokens else 1.0
        mean_s = growth * self.train_s / max(1, self.step)
        next_step_s = SLOW_STEP * max(mean_s, self.last_s, self.before_last_s)
        end_s = self.train_s + extra_s + steps * next_step_s
        return self.step >= cfg.iterations or 0 < cfg.train_seconds < end_s

    def throughput(self) -> dict[str, float]:
        """Step time, tokens per second, and totals, as they are logged."""
        return {
            "step_avg_ms": round(1e3 * self.train_s / max(1, self.step), 3),
            "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
            "train_s": round(self.train_s, 3),
            "tokens": self.tokens,
        }


class TrainStage(NamedTuple):
    """Settings that change during training; each combination is compiled separately."""

    seq_len: int
    batch_tokens: int
    loops: int  # extra passes through the looped blocks
    qat: bool  # whether weights are fake-quantized
    deep: float = 0.0  # weight of the loss after half of the layer calls


def train_stage_at(cfg: Config, progress: float, scale: float) -> TrainStage:
    """The stage at `progress` in [0, 1] with the learning rate multiplier `scale`."""
    loop_starts = [float(start) for start in cfg.enable_looping_at.split(",")]
    if len(loop_starts) == 1:
        loop_starts *= cfg.num_loops
    return TrainStage(
        seq_len=scheduled_value(cfg.train_seq_schedule, progress, cfg.train_seq_len),
        batch_tokens=scheduled_value(cfg.train_batch_schedule, progress, cfg.train_batch_tokens),
        loops=sum(progress >= start for start in loop_starts[: cfg.num_loops]),
        qat=scale < cfg.late_qat_threshold,
        deep=cfg.deep_supervision * (progress < cfg.deep_supervision_frac),
    )


def scheduled_value(schedule: str, progress: float, final: int) -> int:
    """The value of a VALUE@PROGRESS,... schedule at `progress`; `final` after its last limit."""
    return next((value for value, until in parse_schedule(schedule) if progress < until), final)


def train_stages(cfg: Config) -> list[TrainStage]:
    """Every stage that training can go through, in order."""
    boundaries = {0.0, cfg.deep_supervision_frac, *map(float, cfg.enable_looping_at.split(","))}
    for schedule in (cfg.train_seq_schedule, cfg.train_batch_schedule):
        boundaries |= {until for _, until in parse_schedule(schedule)}
    lr_scales = (1.0, 0.0) if cfg.late_qat_threshold else (1.0,)
    stages = [train_stage_at(cfg, x, scale) for x in sorted(boundaries) for scale in lr_scales]
    return list(dict.fromkeys(stages))


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


def late_qat_modules(cfg: Config, model: nn.Module) -> dict[str, CastedLinear]:
    """The modules that late QAT rounds, by the name of their weight: those of attention and MLP.

    The projections of hashed and value embeddings are among them.
    """
    modules = dict[str, CastedLinear]()
    for name, role in parameter_roles(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        is_coded = cfg.bits[role.quant_group] != PLAIN_BITS
        if is_coded and isinstance(module, CastedLinear) and role.quant_group in ("attn", "mlp"):
            modules[name] = module
    return modules


# Relative differences of loss and gradient, by norms, that bf16's rounding explains.
MAX_LOSS_ERROR, MAX_GRAD_ERROR = 2e-3, 0.05


Timed = tuple[tuple[Tensor, ...], float]  # results, seconds


def second_time(run: Run, function: Callable[[], Any], times: int = 1) -> tuple[Any, float]:
    """Result and seconds of a function; the first time, it may compile or load kernels.

    Of several more times, the least seconds: other work on the machine must not change a plan.
    """
    elapsed_s = list[float]()
    for _ in range(1 + times):
        run.synchronize()
        started_s = time.perf_counter()
        result = function()
        run.synchronize()
        elapsed_s.append(time.perf_counter() - started_s)
    return result, min(elapsed_s[1:])


def is_right_and_faster(run: Run, form: str, new: Timed, plain: Timed) -> bool:
    """Whether loss and gradient are nearly those of the plain form and took less time; logs it."""
    loss_error, grad_error = (
        ((a - b).norm() / b.norm()).item() for a, b in zip(new[0], plain[0], strict=True)
    )
    run.log(
        "kernels", form=form, loss_error=loss_error, grad_error=grad_error,
        ms=1e3 * new[1], plain_ms=1e3 * plain[1],
    )  # fmt: skip
    is_right = loss_error <= MAX_LOSS_ERROR and grad_error <= MAX_GRAD_ERROR
    return is_right and new[1] < plain[1]


class Trainer:
    """Model, optimizers and weight average; `step` updates them all."""

    def __init__(self, run: Run, model: GPT):
        self.run, self.model, self.params = run, model, list(model.parameters())
        self.adam, self.muon = make_optimizers(model, run)
        self.adam_params = [p for group in self.adam.param_groups for p in group["params"]]
        self.averager = WeightAverager(run.cfg, self.params)
        self.late_modules, self.has_grid = late_qat_modules(run.cfg, model), False
        for module in self.late_modules.values() if run.cfg.trains_on_grid else []:
            rows_O, columns_I = module.weight.detach()[:, 0], module.weight.detach()[0]
            module.grid = torch.full_like(rows_O, UNKNOWN_SCALE), torch.ones_like(columns_I)
        self.uses_cu_seqlens = run.cfg.isolate_documents and model.prepare_mask is flash_cu_seqlens
        # By stage and shapes: a CUDA graph of `micro_step`, its inputs, its loss. None: not used.
        self.graphs: dict[Any, tuple[Any, list[Tensor], Tensor]] | None = None
        self.graph_grads: list[Tensor] = []  # the gradients that the graphs add to
        self.progress, self.current_stage = Progress(), train_stages(run.cfg)[0]
        self.run_token = os.urandom(16).hex()  # marks the checkpoints that this run has written
        self.enter_stage(self.current_stage)

    def lr_scale(self) -> float:
        """Learning rate multiplier of the next step."""
        cfg, done = self.run.cfg, self.progress.fraction(self.run.cfg)
        warmdown_frac = cfg.warmdown_frac
        if cfg.warmdown_iters:  # in steps, at the progress per step so far
            warmdown_frac = cfg.warmdown_iters * done / max(1, self.progress.step)
        power, floor = cfg.warmdown_power, cfg.min_lr
        return lr_scale(done, warmdown_frac=warmdown_frac, floor=floor, power=power)

    def next_stage(self) -> TrainStage:
        """Stage of the next step."""
        return train_stage_at(self.run.cfg, self.progress.fraction(self.run.cfg), self.lr_scale())

    def enter_stage(self, stage: TrainStage) -> None:
        """Set the model's layer schedule, and switch late QAT of its matrices on or off."""
        cfg, model = self.run.cfg, self.model
        model.schedule = model.schedules[stage.loops]  # always, because evaluation changes it
        model.deep_supervision = stage.deep
        if stage.qat != self.current_stage.qat:
            roles = parameter_roles(model)
            for name, module in self.late_modules.items():
                module.qat_bits = cfg.bits[roles[name].quant_group] if stage.qat else 0
        self.current_stage = stage

    def accumulate_gradients(self, window_BT: Tensor, max_tokens: int = 0) -> Tensor:
        """Add this rank's part of the gradient of the mean loss; returns its part of that loss.

        The mean is over the windows (rows, T + 1) of all ranks. A forward pass has
        MICRO_BATCH_TOKENS at most, or `max_tokens`.
        """
        rows, T = len(window_BT), window_BT.size(1) - 1
        num_micro = num_micro_batches(rows, T, max_tokens or self.run.cfg.micro_batch_tokens)
        total = torch.zeros((), device=self.run.device)
        if self.graphs is not None:
            torch._foreach_zero_(self.graph_grads)
            for param, grad in zip(self.params, self.graph_grads, strict=True):
                param.grad = grad
        for rows_BT in window_BT.chunk(num_micro):
            inputs = [rows_BT]
            if self.uses_cu_seqlens:  # counted on the host, which need not wait for the GPU
                inputs.append(flash_cu_seqlens(rows_BT[:, :-1], True))
            weight = 1 / (rows_BT[:, 1:].numel() * num_micro * self.run.world_size)
            run_micro_step = self.micro_step if self.graphs is None else self.replay
            total += run_micro_step(weight, *map(self.run.to_device, inputs))
        return total

    def micro_step(self, weight: float, rows_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add the gradient of the loss of windows, summed and times `weight`; returns that loss."""
        ids_BT, target_BT, forward = rows_BT[:, :-1], rows_BT[:, 1:], self.model.train_forward
        if mask is not None:
            torch._dynamo.maybe_mark_dynamic(mask, 0)  # one graph for all lengths
        weight_BT = torch.full_like(target_BT, weight, dtype=torch.float32)
        loss = self.model.loss(ids_BT, target_BT, weight_BT, mask=mask, forward=forward)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def replay(self, weight: float, *inputs: Tensor) -> Tensor:
        """`micro_step` as a CUDA graph: one launch. It is captured where its shapes first occur."""
        key = self.current_stage, weight, *(x.shape for x in inputs)
        if self.graphs is not None and key not in self.graphs:
            self.capture(key, weight, *inputs)
        if self.graphs is None:
            return self.micro_step(weight, *inputs)
        graph, copies, loss = self.graphs[key]
        torch._foreach_copy_(copies, list(inputs))
        graph.replay()
        return loss

    def capture(self, key: Any, weight: float, *inputs: Tensor) -> None:
        """Add a graph of `micro_step`, with copies of `inputs`; use none at all if that fails."""
        graphs, copies, pool = self.graphs or {}, [x.clone() for x in inputs], None
        for other, _, _ in graphs.values():
            pool = other.pool()  # memory that all use, one after the other
        try:
            graph: Any = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture leaves its own
                # Other threads, as that which watches collectives, may go on to use the GPU.
                torch.cuda.graph(graph, pool, capture_error_mode="thread_local"),
            ):
                loss = self.micro_step(weight, *copies)
            self.graphs = {**graphs, key: (graph, copies, loss)}
        except Exception as error:  # of CUDA, or of a compiler
            reason = format_line(f"{error.__context__ or error}")[:300]
            self.run.log("warning", text=f"training uses no CUDA graphs: {reason}")
            self.graphs = None  # never only one: others may use memory that it would free

    def clip_gradients(self) -> None:
        """Clip the global norm of the gradient averaged over the ranks.

        Muon's part of it is sharded over the ranks, AdamW's is replicated. Note that
        openai/parameter-golf#2135 clips each rank's gradient before averaging.
        """
        muon_grads, max_norm = self.muon.reduced_gradients(), self.run.cfg.grad_clip_norm
        adam_grads = [param.grad for param in self.adam_params if param.grad is not None]
        muon_sq = torch.stack(torch._foreach_norm(muon_grads)).square().sum()
        adam_sq = torch.stack(torch._foreach_norm(adam_grads)).square().sum()
        norm = (self.run.all_reduce_sum(muon_sq) + adam_sq).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([*muon_grads, *adam_grads], factor)

    def step(self, window_BT: Tensor) -> Tensor:
        """One optimizer step on this rank's windows (rows, T + 1); returns the mean loss of all."""
        cfg, scale = self.run.cfg, self.lr_scale()
        loss = self.accumulate_gradients(window_BT)
        self.muon.start_reduce()
        if self.run.world_size > 1:  # sum the loss and the gradients that AdamW uses
            loss = all_reduce_gradients(self.run, loss, self.adam_params)[-1]
        if cfg.grad_clip_norm:
            self.clip_gradients()
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        # Without a gradient AdamW would not count the step, and the checkpoint would be refused.
        for param in self.adam_params:
            param.grad = grad_or_zeros(param)
        self.adam.step()
        (step, _, tokens, *_), done = self.progress, self.progress.fraction(cfg)
        self.muon.step(cfg.matrix_lr * scale, momentum_at(step, done, cfg), cfg.muon_wd)
        self.model.zero_grad(set_to_none=True)
        tokens += window_BT[:, 1:].numel() * self.run.world_size
        self.progress = self.progress._replace(step=step + 1, tokens=tokens)
        self.averager.update(step + 1, scale, self.progress.fraction(cfg))
        return loss

    def solve_grid(self, loader: BatchLoader) -> bool:
        """Set the grid of late QAT, unless it is known: the scales of an artifact made now.

        Returns whether it had to be made.
        """
        run, model = self.run, self.model
        self.has_grid = True  # so that the steps after this one need not wait for the device
        unknown = {k: m for k, m in self.late_modules.items() if m.grid and m.grid[0][0] < 0}
        if not unknown:  # they came from a checkpoint
            return False
        if self.graphs:  # calibration needs their memory; they are captured again
            self.graphs = {}
        with pass_between_steps(self), run.stage("solve_grid"):
            hessians = calibrate(run, model, loader, self.progress)

            def scales() -> dict[str, list[Tensor]]:
                payload = quantize_and_encode(run, model, hessians, "")
                tensors = decode_tensors(*decode_header(payload), *model_layout(run.cfg))
                found = {k: (tensors[k].row_scales, tensors[k].column_scales) for k in unknown}
                return {k: [torch.tensor(x) for x in pair] for k, pair in found.items()}

            for name, pair in run.run_on_rank0(scales).items():
                torch._foreach_copy_([*(unknown[name].grid or ())], pair)
        return True

    def drop_unused_grid(self) -> None:
        """If no step is left that could train on the grid, forget it and save the final state."""
        if self.progress.is_over(self.run.cfg):
            for rows_O, _ in filter(None, (m.grid for m in self.late_modules.values())):
                rows_O.fill_(UNKNOWN_SCALE)
            self.save()

    @torch.no_grad()
    def round_to_grid(self) -> None:
        """Round the matrices that were trained on the artifact's grid to it."""
        self.enter_stage(self.current_stage._replace(qat=True))
        for module in self.late_modules.values():
            if module.grid and module.grid[0][0] > 0:
                module.weight.copy_(module.used_weight())

    def save(self) -> None:
        """Let rank 0 write a checkpoint; all ranks must call this."""
        self.muon.gather_buffers()
        self.run.run_on_rank0(functools.partial(save_checkpoint, self))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the training state by name; the tensors themselves, not copies."""
        tensors = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        for i, param in enumerate(self.adam_params):
            for key, tensor in self.adam.state[param].items():
                tensors[f"adam/{i}/{key}"] = tensor
        buffers, stacks = self.muon.buffers, itertools.cycle(self.muon.stacks)
        for i, (buffer, stack) in enumerate(zip(buffers, stacks, strict=False)):
            tensors[f"muon/{i}"] = buffer[: len(stack)]  # without the padding
        for name, module in self.late_modules.items():
            for i, scales in enumerate(module.grid or ()):
                tensors[f"grid/{i}/{name}"] = scales
        for i, average in enumerate(self.averager.average):
            tensors[f"average/{i}"] = average
        tensors["average/count"] = self.averager.count
        return tensors

    def load(self, state: Mapping[str, Tensor], progress: Progress) -> None:
        """Copy a saved state into the tensors."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        self.progress = progress

    def warm_up(self) -> None:
        """Compile everything: run WARMUP_STEPS of each stage on random tokens, then undo them."""
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        progress, cfg = self.progress, self.run.cfg
        form, stages = None, train_stages(cfg)
        checks_kernels = cfg.kernels == "auto" and cfg.compile and self.run.is_asynchronous
        # Again if a later stage has led to less being compiled.
        while form != (form := (self.model.train_forward, self.model.run_block)):
            for stage in stages if cfg.warmup_steps else []:
                self.enter_stage(stage)
                if checks_kernels:
                    self.check_compiled(self.random_windows(stage))
                self.warm_up_stage(stage)
        if checks_kernels and cfg.warmup_steps:
            self.try_graphs(self.random_windows(stages[-1]))
            self.muon.try_symmetric_products()
        for stage in stages if self.graphs is not None else []:  # capture before the clock starts
            self.enter_stage(stage)
            self.warm_up_stage(stage)
        self.load(before, progress)
        self.run.synchronize()

    def random_windows(self, stage: TrainStage) -> Tensor:
        """Windows of random tokens, as many as a rank's part of a step of the stage."""
        rows = stage.batch_tokens // stage.seq_len // self.run.world_size
        generator = torch.Generator().manual_seed(0)
        shape = rows, stage.seq_len + 1
        return torch.randint(self.run.cfg.vocab_size, shape, generator=generator)

    def warm_up_stage(self, stage: TrainStage) -> None:
        """Run WARMUP_STEPS of the current stage on random tokens."""
        for _ in range(self.run.cfg.warmup_steps):
            self.run.check_signal()
            self.step(self.random_windows(stage))
        if self.uses_cu_seqlens:
            self.warm_up_capacities(self.random_windows(stage))

    def one_micro_batch(self, window_BT: Tensor) -> Tensor:
        """The first of the micro-batches that a step makes of windows."""
        (rows, T), limit = window_BT[:, 1:].shape, self.run.cfg.micro_batch_tokens
        return window_BT.chunk(num_micro_batches(rows, T, limit))[0]

    def check_compiled(self, window_BT: Tensor) -> None:
        """Compile less until loss and gradient are those without compilation, and sooner known.

        So a kernel that is wrong on this machine costs time, not the run. All ranks decide alike.
        The weights change: at first many are zero, which would hide errors.
        """
        run, model, limit = self.run, self.model, self.run.cfg.micro_batch_tokens
        window_BT = self.one_micro_batch(window_BT)
        generator = torch.Generator().manual_seed(1)
        for param in self.params:
            param.data += 0.02 * torch.randn(param.shape, generator=generator).to(param)
        with torch.compiler.set_stance("force_eager"):  # an eighth at a time: it takes more memory
            eager = self.loss_and_gradient(window_BT, limit // 8)
        while model.run_block is not run_block:
            form, reason, is_good = "whole" if model.train_forward else "blocks", "", False
            try:
                compiled = self.loss_and_gradient(window_BT, limit)
                is_good = is_right_and_faster(run, form, compiled, eager)
            except (Interrupted, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of a compiler
                reason = format_line(f"{type(error).__name__}: {error}")[:300]
            if not max_over_ranks(run, not is_good):
                return
            text = f"the compiled model ({form}) is wrong, slow or does not compile on some GPU"
            run.log("warning", text=f"{text}; training compiles less and is slower. {reason}")
            model.compile_less()

    def start_graphs(self) -> None:
        """Replay micro-batches as CUDA graphs from now on."""
        self.graphs, self.graph_grads = {}, [torch.zeros_like(param) for param in self.params]

    def stop_graphs(self) -> None:
        """Use no CUDA graphs, and free their memory."""
        self.graphs, self.graph_grads = None, []

    def try_graphs(self, window_BT: Tensor) -> None:
        """Use CUDA graphs from now on if all ranks get the same loss and gradient sooner."""
        window_BT, limit = self.one_micro_batch(window_BT), self.run.cfg.micro_batch_tokens
        direct = self.loss_and_gradient(window_BT, limit)
        self.start_graphs()
        replayed = self.loss_and_gradient(window_BT, limit)
        is_good = self.graphs is not None
        is_good = is_good and is_right_and_faster(self.run, "graph", replayed, direct)
        if max_over_ranks(self.run, not is_good):  # the steps that capture have collectives
            self.stop_graphs()
        else:
            self.graphs = {}  # a step of several micro-batches needs others

    def loss_and_gradient(
        self, window_BT: Tensor, max_tokens: int
    ) -> tuple[tuple[Tensor, Tensor], float]:
        """This rank's parts of the mean loss and the gradient, and the seconds of a second time."""

        def measured() -> tuple[Tensor, Tensor]:
            self.model.zero_grad(set_to_none=True)
            loss = self.accumulate_gradients(window_BT, max_tokens)
            gradient = [grad_or_zeros(param).flatten().float() for param in self.params]
            return loss, torch.cat(gradient)

        result = second_time(self.run, measured)
        self.model.zero_grad(set_to_none=True)
        return result

    def warm_up_capacities(self, window_BT: Tensor) -> None:
        """Run a step for each length of `cu_seqlens` that the training data can need.

        These are the lengths for micro-batches with a mean document length above WARM_UP_MEAN_LEN.
        """
        micro_BT = self.one_micro_batch(window_BT)
        rows, T = micro_BT[:, 1:].shape
        max_documents = max(rows, rows * T // WARM_UP_MEAN_LEN - 1)
        for capacity in cu_seqlens_capacities(rows * T):
            num_documents = min(capacity - 1, max_documents)
            if num_documents >= rows:
                self.run.check_signal()
                many_BT = with_num_documents(micro_BT, num_documents)
                self.step(many_BT.repeat(len(window_BT) // rows, 1))
            if capacity > max_documents:
                break


# Knobs that may differ between a run and its continuation from a checkpoint.
RESUME_IGNORED_KNOBS = (
    "mode recipe run_dir resume checkpoint_every_seconds compile compile_forward kernels "
    "attention micro_batch_tokens val_batch_size ttt_batch_size target_val_bpb train_log_every "
    "val_loss_every val_sample_tokens artifact submission_name run_id submission_author "
    "artifact_budget_bytes eval_max_seconds data_path tokenizer_path check_data metrics prompt "
    "temperature top_k max_new_tokens"
).split()


# Knobs that only the export reads, unless there is late QAT.
EXPORT_KNOBS = (
    "attn_bits mlp_bits embed_bits table_bits gate_bits prune_frac quant_grid row_steps "
    "clip_sigmas compressor"
).split()


CHECKPOINT_FILES = ("state.safetensors", "meta.json")  # in the order of their removal
MAX_META_BYTES = 2**20
# What reading a damaged file can raise; RecursionError is a RuntimeError, InputError a ValueError.
READ_ERRORS = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError,
)  # fmt: skip


def save_checkpoint(trainer: Trainer) -> None:
    """Rank 0: write the state of training as the folder RUN_DIR/checkpoint/step_*.

    The run's older checkpoints are removed afterwards; what others put there stays.
    """
    run, progress = trainer.run, trainer.progress
    if not run.is_rank0:
        return
    final = checkpoint_root(run) / f"step_{progress.step:09d}"
    if run_token_of(final) == trainer.run_token:  # of this step: only the clock has gone on
        meta = read_meta(final) | {"progress": progress, "ledger": run.ledger}
        write_atomic(final / "meta.json", json.dumps(meta, indent=1).encode())
        return
    require(
        not os.path.lexists(final), f"{final} was not written by this run; remove it to continue"
    )
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
        "state_sha256": hash_bytes(payload),
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
    checkpoint = run.run_on_rank0(functools.partial(read_newest_checkpoint, trainer))
    if checkpoint is not None:
        meta, state = checkpoint
        trainer.load(state, Progress(*meta["progress"]))
        trainer.run_token = meta["run_token"]
        run.ledger.update(meta["ledger"])
        run.log("resume", step=trainer.progress.step, train_s=round(trainer.progress.train_s, 3))


def read_newest_checkpoint(
    trainer: Trainer,
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The newest checkpoint if there is one; with RESUME=0 all are removed instead."""
    run = trainer.run
    folders = checkpoint_folders(run)
    if run.cfg.resume:
        return read_checkpoint(folders[-1], trainer) if folders else None
    discard_checkpoints(run)
    return None


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
        return str(read_meta(folder)["run_token"])
    except READ_ERRORS:
        return ""


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

    Raises InputError if it is damaged or from another run; nothing is changed before.
    """
    remedy = f"remove {folder} to continue without it, or set RESUME=0 or another RUN_ID"
    try:
        meta = read_meta(folder)
        config = meta["config"]
        require(isinstance(config, dict), "config in meta.json is not an object")
    except READ_ERRORS as error:
        raise InputError(f"{folder} is damaged ({error!s:.300}); {remedy}") from error
    can_export = not trainer.run.cfg.late_qat_threshold
    check_same_run(config, trainer.run.cfg, folder, EXPORT_KNOBS if can_export else ())
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
    require(isinstance(progress, list) and len(progress) == 5, "progress is not five numbers")
    step, _, tokens, *_ = progress
    require(
        type(step) is int and 1 <= step <= run.cfg.iterations,
        f"progress: step {step!r:.40} is not in [1, {run.cfg.iterations}]",
    )
    for value in progress[1], *progress[3:]:
        require(is_duration(value), f"progress: {value!r:.40} is not a number of seconds")
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
    matches = hash_bytes(payload) == sha256
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


def check_same_run(
    saved: Mapping[str, Any], cfg: Config, path: Path, free: Sequence[str] = ()
) -> None:
    """Raise InputError if `path` was written with other knobs than now, `free` ones aside."""
    now = dataclasses.asdict(cfg)
    different = [
        f"{name.upper()}={now[name]} (there: {saved.get(name)!r:.80})"
        for name in sorted(now.keys() - {*RESUME_IGNORED_KNOBS, *free})
        if now[name] != saved.get(name)
    ]
    require(
        not different,
        f"{path} is from another run: {', '.join(different)}; set these knobs as they were or "
        "another RUN_ID; MODE=eval scores an artifact with other settings",
    )


# --- 7. Quantization -----------------------------------------------------------------------------
# A matrix is stored as integer codes, a scale per row and, with ROW_STEPS=solved, one per column.
# calibrate estimates a Hessian for each matrix; group_matrices turns them into relative scales;
# fill_budget finds the common scale factor at which the artifact fills its byte budget; GPTQ rounds
# the weights, to the nearest code or along a trellis.

PLAIN_BITS, MAX_CODE = 16, 1023  # bits of an fp16 tensor; largest magnitude of a code
# fp16 scales below the smallest normal number lose precision; above the largest they overflow.
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)
# COMPRESSOR=ans stores a scale as n of 2^(n / 8).
SCALE_STEPS_PER_OCTAVE, MAX_SCALE_INDEX = 8, 240
SCALES = np.array(
    [2 ** (n / SCALE_STEPS_PER_OCTAVE) for n in range(-MAX_SCALE_INDEX, MAX_SCALE_INDEX + 1)],
    np.float32,
)


class Quantized(NamedTuple):
    """A tensor in the form in which it is stored: codes with scales, or plain fp16 values."""

    bits: int  # PLAIN_BITS: no codes
    values: np.ndarray  # int8 or int16 codes, or float16 values; in the tensor's shape
    row_scales: np.ndarray | None  # float16, or float32 entries of SCALES
    column_scales: np.ndarray | None = None  # in the same format
    trellis: bool = False  # the codes are those of the trellis-coded grid

    def dequantized(self) -> Tensor:
        """The float32 tensor that a reader of the artifact gets."""
        if self.row_scales is None:
            return torch.tensor(self.values).float()
        levels = trellis_levels(self.values) / 2 if self.trellis else self.values
        scale_OI = self.row_scales[:, None] * np.float32(1)
        if self.column_scales is not None:
            scale_OI = scale_OI * self.column_scales
        weight_OI = levels.reshape(len(scale_OI), -1) * scale_OI
        return torch.tensor(weight_OI).float().view(levels.shape)


class KroneckerHessian(NamedTuple):
    """Approximate Hessian of the loss in a matrix, as a Kronecker product (arXiv:1503.05671).

    An error e_o in row o raises the loss by about outputs_O[o] * (e_o inputs_II e_o^T) / 2.
    """

    inputs_II: Tensor
    outputs_O: Tensor


def second_moments(x: Tensor) -> Tensor:
    """Sums of products x_i x_j over all dimensions but the last, (I, I), float32."""
    x_NI = x.detach().flatten(0, -2)
    if x.is_cuda and x.dtype == torch.bfloat16:  # on tensor cores
        return torch.mm(x_NI.T, x_NI, out_dtype=torch.float32)
    return x_NI.float().T @ x_NI.float()


class CalibrationStats:
    """Sums of second moments over calibration tokens, by parameter and kind of moment.

    A matrix has `inputs` (x x^T, I x I) and `outputs` (squared gradient of each output, O); an
    embedding table has `gradients` (g g^T of its output, I x I) and `reads` (how often each row is
    read, O). All calls of a looped block add to the same sums.
    """

    def __init__(self, model: GPT):
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.model, self.num_tokens = model, 0
        self.last_product: tuple[Tensor | None, Tensor | None] = None, None  # x, and its moments

    def accumulate(self, window_BT: Tensor) -> None:
        """Run the model on windows (rows, T + 1), forward and backward, uncompiled, with hooks."""
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
        with uncompiled(model):
            model.nll = functools.partial(self.record_head, head)
            try:
                model.loss(ids_BT, target_BT, torch.ones_like(target_BT)).backward()  # type: ignore[no-untyped-call]
            finally:
                self.last_product = None, None
                for hook in hooks:
                    hook.remove()
        model.zero_grad(set_to_none=True)
        self.num_tokens += target_BT.numel()

    def record_module(self, name: str, module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        """Forward hook: add the module's input now, and the gradient of its output later."""
        is_table = isinstance(module, Embedding)
        self.add(name, "reads" if is_table else "inputs", args[0])
        gradient_kind = "gradients" if is_table else "outputs"
        y.register_hook(functools.partial(self.add, name, gradient_kind))  # type: ignore[no-untyped-call]

    def record_head(self, name: str, *args: Any) -> Any:
        """softcapped_cross_entropy that also adds the gradient of the logits."""
        result: Any = softcapped_cross_entropy(*args)
        self.add(name, "outputs", result[1])
        return result

    def add(self, name: str, kind: str, x: Tensor) -> None:
        """Add the moments of a batch: counts of ids, sums of squares, or products of columns."""
        if kind == "reads":
            num_rows = len(self.model.get_parameter(name))
            value = torch.bincount(x.flatten(), minlength=num_rows).float()
        elif kind == "outputs":
            value = x.detach().flatten(0, -2).float().square().sum(dim=0)
        else:  # queries, keys and values have the same input
            last_x, last_value = self.last_product
            value = second_moments(x) if x is not last_x or last_value is None else last_value
            self.last_product = x, value
        self.sums[name, kind] = self.sums.get((name, kind), 0) + value

    def hessians(self, run: Run) -> dict[str, KroneckerHessian]:
        """The Hessians by matrix, averaged over the tokens of all ranks.

        A tied embedding is a matrix (A1, b1) and a table (A2, b2): it gets A = sum of Ai * mean(bi)
        and b = sum of trace(Ai) * bi / trace(A). So each row has the trace of the sum of both.
        """
        count = run.all_reduce_sum(torch.tensor(float(self.num_tokens), device=run.device))
        means = {key: run.all_reduce_sum(self.sums[key]) / count for key in sorted(self.sums)}
        hessians = {}
        for name in sorted({name for name, _ in means}):
            factors = [
                (means[name, square], means[name, vector])
                for square, vector in [("inputs", "outputs"), ("gradients", "reads")]
                if (name, square) in means
            ]
            inputs_II: Any = sum(square_II * vector_O.mean() for square_II, vector_O in factors)
            outputs_O: Any = sum(square_II.trace() * vector_O for square_II, vector_O in factors)
            outputs_O = outputs_O / inputs_II.trace().clamp_min(1e-30)
            hessians[name] = KroneckerHessian(inputs_II, outputs_O)
        return hessians


CALIBRATION_TIME_MARGIN = 1.5  # of the measured time of a piece, when the next one is planned
# A token of calibration may take this many times as long as one of training: it is not compiled.
CALIBRATION_COST = 4.0


def calibration_rows(run: Run, loader: BatchLoader, trained: Progress) -> Iterator[Tensor]:
    """This rank's windows of calibration text (rows, T + 1), in pieces for one pass.

    A piece is a batch of training or a micro-batch (on a GPU half of one, because this pass is not
    compiled), but on a slow machine no more rows than are expected to take half of the time left,
    by the pace of training.
    """
    cfg, T = run.cfg, run.cfg.train_seq_len
    token_s = CALIBRATION_COST * run.world_size * trained.train_s / max(1, trained.tokens)
    num_rows = max(1, cfg.micro_batch_tokens // T >> (run.device.type == "cuda"))
    if cfg.max_wallclock_seconds and token_s:
        left_s = max(0.0, cfg.max_wallclock_seconds - trained.train_s)
        num_rows = int(min(num_rows, max(1, left_s / (2 * token_s * T))))
    for batch in range(cfg.gptq_calibration_batches):
        position = trained.tokens + batch * cfg.train_batch_tokens
        window_BT = loader.read(position - position % T, T, cfg.train_batch_tokens)
        yield from torch.split(window_BT.to(run.device), num_rows)


def calibrate(
    run: Run, model: GPT, loader: BatchLoader, trained: Progress
) -> dict[str, KroneckerHessian]:
    """The Hessian of every matrix, from the training text that follows the tokens trained on.

    Stops early where another piece might end after MAX_WALLCLOCK_SECONDS.
    """
    stats, started_s = CalibrationStats(model), time.perf_counter()
    limit_s = run.cfg.max_wallclock_seconds or math.inf
    model.use_final_schedule()
    for number, rows_BT in enumerate(calibration_rows(run, loader, trained), start=1):
        run.check_signal()
        stats.accumulate(rows_BT)
        run.synchronize()
        # The same decision on all ranks.
        elapsed_s = max_over_ranks(run, time.perf_counter() - started_s)
        next_end_s = CALIBRATION_TIME_MARGIN * elapsed_s * (number + 1) / number
        if trained.train_s + next_end_s > limit_s:
            break
    run.log("calibrated", tokens=stats.num_tokens * run.world_size)
    return stats.hessians(run)


def quantize_model(
    cfg: Config,
    model: nn.Module,
    groups: Sequence[MatrixGroup] | None = None,
    scale_factor: float = 1.0,
) -> dict[str, Quantized]:
    """Every parameter of the model by name, in the form in which it is stored.

    `groups` come from group_matrices (by default without Hessians); all scales are multiplied by
    `scale_factor`.
    """
    tensors: dict[str, Quantized] = {}
    for group in group_matrices(cfg, model, {}) if groups is None else groups:
        tensors |= quantize_group(cfg, group, scale_factor)
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


def quantize_rows(weight: Tensor, bits: int) -> Quantized:
    """Round to nearest on a symmetric grid, with a scale per row; a vector is one row."""
    qmax, rows = 2 ** (bits - 1) - 1, weight.detach().float().cpu()
    rows_OI = rows.flatten(1) if rows.dim() > 1 else rows[None]
    scale_O = row_scales(rows_OI, qmax)
    codes_OI = (rows_OI / scale_O.float()[:, None]).round().clamp(-qmax, qmax)
    return Quantized(bits, codes_OI.to(torch.int8).numpy().reshape(rows.shape), scale_O.numpy())


def row_scales(weight_OI: Tensor, qmax: int) -> Tensor:
    """fp16 scales that map the largest weight of each row to the code qmax."""
    return (weight_OI.abs().amax(dim=1) / qmax).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()


class MatrixGroup(NamedTuple):
    """Matrices of one shape and bit width, which are quantized together."""

    names: list[str]
    weight_LOI: Tensor
    hessian_factor: HessianFactor | None  # None: round to nearest
    row_scale_LO: Tensor
    column_scale_LI: Tensor  # ones unless ROW_STEPS=solved
    bits: int
    column_std_LI: Tensor  # standard deviation of each column, in units of its scales
    late: bool = False  # trained by late QAT with QAT_GRID=artifact: never on the trellis
    fixed: bool = False  # whether it was already, so that its scales are final


def group_matrices(
    cfg: Config, model: nn.Module, hessians: Mapping[str, KroneckerHessian]
) -> list[MatrixGroup]:
    """All matrices that are stored as codes, by shape and bits, with relative scales."""
    roles = {name: role.quant_group for name, role in parameter_roles(model).items()}
    members: dict[Any, list[str]] = {}
    late = late_qat_modules(cfg, model) if cfg.trains_on_grid else {}
    grids = {k: m.grid for k, m in late.items() if m.grid and m.grid[0][0] > 0}
    for name, role in roles.items():
        if role not in ("gate", "control") and cfg.bits[role] != PLAIN_BITS:
            is_in = name in hessians and name not in grids, name in late, name in grids
            key = model.get_parameter(name).shape, cfg.bits[role], is_in
            members.setdefault(key, []).append(name)
    groups = []
    for (_, bits, (has_hessian, is_late, is_fixed)), names in members.items():
        parameters = [model.get_parameter(name).detach().float() for name in names]
        weight_LOI = torch.stack([prune_smallest(weight, cfg.prune_frac) for weight in parameters])
        factor = None
        if has_hessian:
            factor = factor_hessians(torch.stack([hessians[name].inputs_II for name in names]))
        if cfg.solves_scales and factor is not None:
            outputs_LO = torch.stack([hessians[name].outputs_O for name in names])
            row_LO, column_LI = optimal_scales(outputs_LO, factor.upper_diagonal_LI)
        elif is_fixed:
            row_LO, column_LI = (torch.stack([grids[name][i] for name in names]) for i in (0, 1))
        else:
            row_LO = torch.stack(
                [
                    heuristic_row_scales(cfg, weight_OI, roles[name])
                    for name, weight_OI in zip(names, weight_LOI, strict=True)
                ]
            )
            column_LI = torch.ones_like(weight_LOI[:, 0])
        row_LO, column_LI = row_LO.clamp_min(1e-30), round_scales(cfg, column_LI)
        std_LI = (weight_LOI / row_LO[:, :, None]).square().mean(dim=1).sqrt() / column_LI
        groups.append(
            MatrixGroup(
                names, weight_LOI, factor, row_LO, column_LI, bits, std_LI, is_late, is_fixed
            )
        )
    return groups


MIN_PRUNED_SIZE = 65_536  # matrices of at most so many weights are not pruned


def prune_smallest(weight_OI: Tensor, fraction: float) -> Tensor:
    """A large weight with the smallest `fraction` of its values set to zero (PRUNE_FRAC)."""
    if not fraction or weight_OI.numel() <= MIN_PRUNED_SIZE:
        return weight_OI
    size_OI = weight_OI.abs()
    threshold = size_OI.flatten().kthvalue(max(1, int(fraction * size_OI.numel()))).values
    return torch.where(size_OI < threshold, 0, weight_OI)


CLIP_PERCENTILE = 0.9999984  # of a row's magnitudes, as in the naive baseline


def heuristic_row_scales(cfg: Config, weight_OI: Tensor, group: str) -> Tensor:
    """Scale of each row from its weights alone, by CLIP_SIGMAS, or else by ROW_STEPS."""
    qmax = 2 ** (cfg.bits[group] - 1) - 1
    if cfg.sigmas:  # SDClip (openai/parameter-golf#1394): every row costs the same bits per weight
        return cfg.sigmas[group] / qmax * weight_OI.std(dim=1)
    quantile = {"max": 1.0, "percentile": CLIP_PERCENTILE}[cfg.row_steps]
    pieces = torch.split(weight_OI.abs(), 512)  # torch.quantile takes at most 2^24 numbers
    return torch.cat([rows.quantile(quantile, dim=1) for rows in pieces]) / qmax


ROW_DAMPING, MAX_COLUMN_RATIO = 0.1, 16  # for rows and columns that calibration rarely reaches


def optimal_scales(outputs_LO: Tensor, upper_diagonal_LI: Tensor) -> tuple[Tensor, Tensor]:
    """Relative scales of rows and columns that equalize the marginal loss per bit.

    A rounding error in column j costs about outputs_O[o] * (scale / U_jj)^2 / 24 per weight, with
    U_jj from factor_hessians. One more bit halves the scale and removes 3/4 of that cost, so that
    all costs are equal at the optimum (reverse water-filling): scales U_jj / sqrt(outputs_O[o]).
    """
    rows, columns = [], []
    for outputs_O, diagonal_I in zip(outputs_LO, upper_diagonal_LI, strict=True):
        mean, geometric_mean = outputs_O.mean().clamp_min(1e-30), diagonal_I.log().mean().exp()
        rows.append((outputs_O / mean + ROW_DAMPING).rsqrt() * mean.rsqrt() * geometric_mean)
        columns.append((diagonal_I / geometric_mean).clamp(1 / MAX_COLUMN_RATIO, MAX_COLUMN_RATIO))
    return torch.stack(rows), torch.stack(columns)


def round_scales(cfg: Config, scale: Tensor) -> Tensor:
    """Scales as the artifact stores them: in fp16, or rounded up to an entry of SCALES."""
    if cfg.compressor != "ans":
        return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    # The small offset keeps a scale that is an entry already.
    exponent = (scale.clamp_min(1e-30).log2() * SCALE_STEPS_PER_OCTAVE - 1e-3).ceil()
    index = exponent.clamp(-MAX_SCALE_INDEX, MAX_SCALE_INDEX).int() + MAX_SCALE_INDEX
    return torch.from_numpy(SCALES[index.cpu().numpy()]).to(scale)


MAX_BITS_PER_WEIGHT = 6.5  # finer scales cost bytes and no longer improve the score
MIN_BUDGET_FILL, MAX_BUDGET_TRIES = 0.998, 8  # fraction of the budget that ends the search


def fill_budget(
    groups: Sequence[MatrixGroup], encode: Callable[[float], bytes], budget_bytes: int
) -> bytes:
    """The largest of at most MAX_BUDGET_TRIES artifacts within `budget_bytes`.

    They differ in one factor of all scales; `encode` makes the artifact for a scale factor. If none
    fits, the one tried last is returned; it is too large, and `check_sizes` then fails the run.
    """
    num_weights = sum(group.weight_LOI.numel() for group in groups)
    finest = scale_factor_for(groups, MAX_BITS_PER_WEIGHT * num_weights)
    target_bytes = budget_bytes * (1 + MIN_BUDGET_FILL) / 2
    scale_factor = max(finest, scale_factor_for(groups, 8 * target_bytes))
    tried = dict[float, bytes]()
    while len(tried) < MAX_BUDGET_TRIES and scale_factor not in tried:
        tried[scale_factor] = payload = encode(scale_factor)
        fitting = {f: len(p) for f, p in tried.items() if len(p) <= budget_bytes}
        if MIN_BUDGET_FILL * budget_bytes <= len(payload) <= budget_bytes or finest in fitting:
            break
        if fitting and len(fitting) < len(tried):
            # Interpolate between the nearest two, in logarithms of size and of scale factor.
            too_fine, coarse = max(tried.keys() - fitting.keys()), min(fitting)
            ratio = math.log(len(tried[too_fine]) / fitting[coarse])
            weight = math.log(target_bytes / fitting[coarse]) / ratio
            scale_factor = coarse * (too_fine / coarse) ** weight
        else:
            # The estimate for normal weights, corrected by the size of the last artifact.
            bits = target_bytes / len(payload) * estimated_bits(groups, scale_factor)
            scale_factor = max(finest, scale_factor_for(groups, bits))
    return max((tried[f] for f in fitting), key=len, default=payload)


def scale_factor_for(groups: Sequence[MatrixGroup], bits: float) -> float:
    """The factor of all scales at which estimated_bits are `bits`, by bisection of its log2."""
    low, high = -60.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if estimated_bits(groups, 2**middle) > bits else (low, middle)
    return 2**high


NORMAL_VARIANCE_FACTOR = 17.08  # 2 pi e: entropy of a normal variable is log2(17.08 variance) / 2


def estimated_bits(groups: Sequence[MatrixGroup], scale_factor: float) -> float:
    """Entropy of all codes in bits if the weights of each column were normal."""
    bits = 0.0
    for group in groups:
        variance_LI = (group.column_std_LI / (1.0 if group.fixed else scale_factor)).square()
        log2_sum = float(torch.log2(1 + NORMAL_VARIANCE_FACTOR * variance_LI).sum())
        bits += group.weight_LOI.size(1) * log2_sum / 2
    return bits


def code_statistics(tensors: Mapping[str, Quantized]) -> dict[str, float]:
    """The number of codes, and their entropy in bits per code with a table for each tensor."""
    codes = [tensor.values for tensor in tensors.values() if tensor.row_scales is not None]
    bits = 0.0
    for values in codes:
        counts = np.unique(values, return_counts=True)[1]
        bits += float((counts * np.log2(counts.sum() / counts)).sum())
    num_codes = sum(map(np.size, codes))
    return {"codes": num_codes, "entropy_bits": round(bits / max(1, num_codes), 4)}


CLIP_HEADROOM = 0.8  # of the largest code: what the largest weight of a column may reach
MIN_COLUMN_STD = 0.05  # in scales, for the estimated prices of codes
RATE_LAMBDA = 0.08  # price of a bit in the trellis search, in squared scales


def quantize_group(cfg: Config, group: MatrixGroup, scale_factor: float) -> dict[str, Quantized]:
    """The quantized matrices of a group by name, with all scales multiplied by `scale_factor`."""
    solved = cfg.solves_scales
    qmax = MAX_CODE if solved else 2 ** (group.bits - 1) - 1
    scale_factor = 1.0 if group.fixed else scale_factor
    row_LO = round_scales(cfg, group.row_scale_LO * scale_factor)
    column_LI = group.column_scale_LI
    largest_LI = (group.weight_LOI.abs() / row_LO[:, :, None]).amax(dim=1)
    # A column with a few huge weights gets a coarser scale instead of clipped codes.
    if solved and not group.fixed:
        smallest_LI = largest_LI / (CLIP_HEADROOM * qmax)
        column_LI = round_scales(cfg, torch.maximum(column_LI, smallest_LI))
    trellis = cfg.quant_grid == "trellis" and group.hessian_factor is not None and not group.late
    if trellis:
        std_LI = (group.column_std_LI / scale_factor).clamp_min(MIN_COLUMN_STD)
        largest_code = min(qmax, int(1.25 * (largest_LI / column_LI).max()) + 8)
        bits_LIV = gaussian_code_bits(std_LI, largest_code)
        rounding = as_cuda_graph(
            functools.partial(round_trellis, bits_LIV=bits_LIV, rate_lambda=RATE_LAMBDA),
            row_LO.clone(),
            torch.zeros_like(row_LO[:, 0], dtype=torch.int64),
        )
    else:
        rounding = functools.partial(round_uniform, qmax=qmax)
    if group.hessian_factor is None:
        scale_LOI = row_LO[:, :, None] * column_LI[:, None]
        codes_LOI, _ = rounding(group.weight_LOI / scale_LOI, column_LI)
    else:
        codes_LOI = gptq(group.weight_LOI, group.hessian_factor, row_LO, column_LI, rounding)
    scale_type = np.float32 if cfg.compressor == "ans" else np.float16
    rows, columns = (x.cpu().numpy().astype(scale_type) for x in (row_LO, column_LI))
    codes = codes_LOI.cpu().numpy().astype(np.int16 if solved else np.int8)
    return {
        name: Quantized(group.bits, codes[i], rows[i], columns[i] if solved else None, trellis)
        for i, name in enumerate(group.names)
    }


# Relative damping of the Hessian's diagonal; columns whose updates are applied together.
GPTQ_DAMPING, GPTQ_BLOCK = 0.01, 128


class HessianFactor(NamedTuple):
    """What GPTQ needs of L Hessians: the order of columns, and U with H^-1 = U^T U."""

    order_LI: Tensor  # int64: columns by descending diagonal
    upper_LII: Tensor  # U; rows and columns in that order
    alive_LI: Tensor  # bool, in the weight's order: False where the input was always zero
    # U_jj in the weight's order: an error e in column j costs (e / U_jj)^2.
    upper_diagonal_LI: Tensor


def factor_hessians(hessian_LII: Tensor) -> HessianFactor:
    """Order and Cholesky factor of damped Hessians x x^T (GPTQ, arXiv:2210.17323)."""
    damped_LII = hessian_LII.float().clone()
    diagonal_LI = damped_LII.diagonal(dim1=1, dim2=2)
    alive_LI = diagonal_LI > 0
    # Dead inputs get the mean of the others, so that the damping does not depend on them.
    num_alive_L1 = alive_LI.sum(dim=1, keepdim=True).clamp_min(1)
    mean_L1 = (diagonal_LI.sum(dim=1, keepdim=True) / num_alive_L1).clamp_min(1e-30)
    diagonal_LI.copy_(torch.where(alive_LI, diagonal_LI, mean_L1))
    diagonal_LI.add_(GPTQ_DAMPING * diagonal_LI.mean(dim=1, keepdim=True))
    order_LI = diagonal_LI.argsort(dim=1, descending=True, stable=True)
    ordered_LII = damped_LII.take_along_dim(order_LI[:, :, None], 1)
    ordered_LII = ordered_LII.take_along_dim(order_LI[:, None], 2)
    inverse_LII = torch.cholesky_inverse(torch.linalg.cholesky(ordered_LII))
    upper_LII = torch.linalg.cholesky(inverse_LII, upper=True)
    upper_diagonal_LI = upper_LII.diagonal(dim1=1, dim2=2).gather(1, order_LI.argsort(dim=1))
    return HessianFactor(order_LI, upper_LII, alive_LI, upper_diagonal_LI)


def gptq(
    weight_LOI: Tensor,
    factor: HessianFactor,
    row_scale_LO: Tensor,
    column_scale_LI: Tensor,
    round_column: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """int16 codes of L matrices by GPTQ: the error of each column is moved to later columns.

    The scale of weight (o, i) is row_scale_LO[o] * column_scale_LI[i]. Columns are rounded by
    descending diagonal of the Hessian; columns beyond the current block are updated once per block.
    round_column takes a column divided by its scales (L x O) and its index in each matrix (L); it
    returns the codes and the values that they stand for, in the same units.
    """
    order_LI, upper_LII = factor.order_LI, factor.upper_LII
    # Columns are the second dimension here, so that each is contiguous in memory.
    w_LIO = (weight_LOI.float() * factor.alive_LI[:, None]).mT.contiguous()
    w_LIO = w_LIO.take_along_dim(order_LI[:, :, None], 1)
    code_LIO = torch.empty_like(w_LIO, dtype=torch.int16)
    column_scale_LI = column_scale_LI.gather(1, order_LI)
    for start in range(0, w_LIO.size(1), GPTQ_BLOCK):
        block_LIO = w_LIO[:, start : start + GPTQ_BLOCK].clone()
        end = start + block_LIO.size(1)
        upper_block_LII = upper_LII[:, start:end, start:end]
        for i in range(end - start):
            scale_LO = row_scale_LO * column_scale_LI[:, start + i, None]
            target_LO = block_LIO[:, i]
            code_LO, value_LO = round_column(target_LO / scale_LO, order_LI[:, start + i])
            code_LIO[:, start + i] = code_LO
            # The error replaces the weight, which is no longer needed.
            error_LO, diagonal_L1 = target_LO - value_LO * scale_LO, upper_block_LII[:, i, i, None]
            torch.div(error_LO, diagonal_L1, out=target_LO)
            block_LIO[:, i + 1 :].baddbmm_(
                upper_block_LII[:, i, i + 1 :, None], target_LO[:, None], alpha=-1
            )
        w_LIO[:, end:].baddbmm_(upper_LII[:, start:end, end:].mT, block_LIO, alpha=-1)
    return code_LIO.take_along_dim(order_LI.argsort(dim=1)[:, :, None], 1).mT.contiguous()


def round_uniform(target_LO: Tensor, _column_L: Tensor, *, qmax: int) -> tuple[Tensor, Tensor]:
    """The nearest integers in [-qmax, qmax], as codes and as values."""
    code_LO = target_LO.round().clamp_(-qmax, qmax)
    return code_LO, code_LO


# Trellis-coded quantization, as dependent quantization in video coding (ITU-T H.266, ISO/IEC
# 15938-17). Code k stands for level 2k in even states (sub-quantizer Q0), 2k + 1 in odd ones (Q1);
# levels count half scales, and the parity of k leads to the next state. Unlike in H.266, Q1 has no
# zero, which would cost rate at one bit per weight and more. The trellis is Ungerboeck's (IEEE
# Trans. Inform. Theory 28(1), 1982) of 32 states, with parity-check polynomials 45 and 10 (octal).
TRELLIS_SEGMENT = 256  # rows; each segment starts in state 0
NEXT_STATES = np.array(  # at 2 * state + parity of the code
    [
        (state >> 1) ^ (state & 1) * (0o45 >> 1) ^ parity * (0o10 >> 1)
        for state in range(32)
        for parity in (0, 1)
    ],
    np.int8,
)
# Every fourth level belongs to the same subset, numbered 2 * sub-quantizer + parity of the code.
SUBSET_OFFSETS = np.array([[0], [2], [1], [3]], np.float32)


def trellis_levels(code_OI: np.ndarray) -> np.ndarray:
    """The level of each code as int16, in half scales; the states run down each column."""
    padded_OI = np.pad(code_OI.astype(np.int16), [(0, -len(code_OI) % TRELLIS_SEGMENT), (0, 0)])
    code_NTI = padded_OI.reshape(-1, TRELLIS_SEGMENT, code_OI.shape[1])
    level_NTI, state_NI = 2 * code_NTI, np.zeros_like(code_NTI[:, 0], np.int8)
    for row in range(TRELLIS_SEGMENT):
        level_NTI[:, row] |= state_NI & 1
        state_NI = NEXT_STATES.take(2 * state_NI + (code_NTI[:, row] & 1))
    return level_NTI.reshape(padded_OI.shape)[: len(code_OI)]


def round_trellis(
    target_LO: Tensor, column_L: Tensor, *, bits_LIV: Tensor, rate_lambda: float
) -> tuple[Tensor, Tensor]:
    """Codes that minimize squared error (in scales) + rate_lambda * bits over all trellis paths.

    bits_LIV[l, i, v] is the price in bits of the levels v and -v in column i; even v belong to Q0,
    odd v to Q1. The last v, an odd one, belongs to the largest code.
    """
    (num_matrices, num_rows), largest = target_LO.shape, bits_LIV.size(2) - 1
    padding, device = -num_rows % TRELLIS_SEGMENT, target_LO.device
    matrix_L = torch.arange(num_matrices, device=device)
    price_LV = bits_LIV[matrix_L, column_L] * (4 * rate_lambda)
    x_LO = F.pad(2 * target_LO.float(), (0, padding))  # in half scales
    x_T1N = x_LO.view(-1, TRELLIS_SEGMENT).T.contiguous()[:, None]
    # A level is within 2 of the number that it rounds, so the codes are within the largest one.
    offset_41 = trellis_tables(device)[0]
    level_T4N = ((x_T1N.clamp(3 - largest, largest - 2) - offset_41) / 4).round() * 4 + offset_41
    first_N = (matrix_L * price_LV.size(1)).repeat_interleave(x_T1N.size(2) // num_matrices)
    cost_T4N = price_LV.take(level_T4N.abs().long() + first_N) + (level_T4N - x_T1N).square()
    # Padding rows cost nothing.
    cost_T4N.view(len(x_T1N), 4, num_matrices, -1)[len(x_T1N) - padding :, :, :, -1].zero_()
    if device.type == "cpu":
        subset_TN = torch.from_numpy(viterbi(cost_T4N.numpy()))
    else:
        subset_TN = viterbi_on_device(cost_T4N)
    level_TN = level_T4N.gather(1, subset_TN[:, None])[:, 0]
    value_LO = (level_TN.T.reshape(num_matrices, -1)[:, :num_rows] / 2).to(target_LO)
    return value_LO.floor(), value_LO


def as_cuda_graph(function: Callable[..., Any], *buffers: Tensor) -> Callable[..., Any]:
    """On a GPU, `function` as a CUDA graph, which is one launch; itself where that fails.

    Each call copies its arguments to `buffers` and overwrites the results of the last one. Tensors
    that `function` holds must live as long as the graph.
    """
    if buffers[0].is_cuda:
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own
                return torch.cuda.make_graphed_callables(function, buffers)
        except RuntimeError as error:
            warn_once(f"no CUDA graphs, so quantization is slower: {error}")
    return function


def gaussian_code_bits(std_LI: Tensor, largest_code: int) -> Tensor:
    """Bits of each level for columns of normal codes: L x I x V, std_LI in scales."""
    level_V = torch.arange(2 * largest_code + 2, device=std_LI.device)
    scale_LI1 = 8**0.5 * std_LI[:, :, None]  # sqrt(2) standard deviations in half scales
    mass_LIV = torch.erf((level_V + 1) / scale_LI1) - torch.erf((level_V - 1) / scale_LI1)
    return -(mass_LIV / 2).clamp_min(1e-9).log2()


# Two implementations: on the CPU viterbi_on_device takes 20 times as long as this one (39 and 1.8 s
# for a matrix of 2048 x 512 on one core), and on a GPU this one would launch hundreds of kernels.
def viterbi(cost_T4N: np.ndarray) -> np.ndarray:
    """Subset of each row on the cheapest path from state 0, for N segments (Viterbi), on the CPU.

    cost_T4N[t, s, n] is the cost of the level of subset s in row t of segment n. Suffixes: S
    states, B branches.
    """
    (num_rows, _, num_segments), num_states = cost_T4N.shape, len(NEXT_STATES) // 2
    # Two branches enter each state: first one of every state, then the other of every state.
    branches = NEXT_STATES.argsort(kind="stable").reshape(-1, 2).T.ravel()
    sources, subsets = branches >> 1, 2 * (branches >> 1 & 1) + (branches & 1)
    total_SN = np.full((num_states, num_segments), np.inf, np.float32)
    total_SN[0] = 0
    total_BN = np.empty((2 * num_states, num_segments), np.float32)
    cost_BN, first_SN, second_SN = total_BN.copy(), *np.split(total_BN, 2)
    is_second_TSN = np.empty((num_rows, num_states, num_segments), bool)
    for cost_4N, is_second_SN in zip(cost_T4N, is_second_TSN, strict=True):
        cost_4N.take(subsets, axis=0, out=cost_BN, mode="clip")  # other modes copy `out`
        total_SN.take(sources, axis=0, out=total_BN, mode="clip")
        np.add(total_BN, cost_BN, out=total_BN)
        np.less(second_SN, first_SN, out=is_second_SN)
        np.minimum(first_SN, second_SN, out=total_SN)
    # Trace the surviving path back, with flat positions in S x N and in 2S x N arrays.
    column_N, branch_TN = np.arange(num_segments), np.empty((num_rows, num_segments), np.int64)
    sources_BN = (sources[:, None] * num_segments + column_N).ravel()
    position_N = total_SN.argmin(axis=0) * num_segments + column_N
    for branch_N, is_second_SN in zip(branch_TN[::-1], is_second_TSN[::-1], strict=True):
        np.multiply(is_second_SN.take(position_N), is_second_SN.size, out=branch_N)
        branch_N += position_N
        position_N = sources_BN.take(branch_N)
    return subsets[branch_TN // num_segments]


def viterbi_on_device(cost_T4N: Tensor) -> Tensor:
    """The result of `viterbi`, on a GPU: a tree of min-plus products instead of a loop over rows.

    Sums are rounded in another order, so that paths of equal cost may differ. Suffixes: G groups of
    rows; S states, before a group and after it; P pairs of them.
    """
    num_states, num_segments = len(NEXT_STATES) // 2, cost_T4N.size(2)
    _, place_4P, barrier_P1 = trellis_tables(cost_T4N.device)
    cost_GXN = cost_T4N.view(-1, 16, num_segments).index_select(1, place_4P.flatten())
    cost_GPN = cost_GXN.view(len(cost_GXN), *place_4P.shape, -1).sum(1) + barrier_P1
    # The cheapest paths from state to state through 4 rows, through 8, ... and through the segment.
    tree = [cost_GPN.view(-1, num_states, num_states, num_segments)]
    while len(tree[-1]) > 1:
        first_GSSN, second_GSSN = tree[-1][::2], tree[-1][1::2]
        tree.append((first_GSSN[:, :, :, None] + second_GSSN[:, None]).amin(2))
    end_1N = tree.pop()[:, 0].argmin(1)
    start_1N = torch.zeros_like(end_1N)
    state_G2N = torch.stack([start_1N, end_1N], 1)
    for cost_GSSN in reversed(tree):
        start_GN, end_GN = state_G2N.unbind(1)
        to_G1SN = start_GN[:, None, None].expand(-1, 1, num_states, -1)
        from_GS1N = end_GN[:, None, None].expand(-1, num_states, 1, -1)
        first_GSN = cost_GSSN[::2].gather(1, to_G1SN)[:, 0]
        second_GSN = cost_GSSN[1::2].gather(2, from_GS1N)[:, :, 0]
        middle_GN = (first_GSN + second_GSN).argmin(1)
        states = torch.stack([start_GN, middle_GN, middle_GN, end_GN], 1)
        state_G2N = states.view(-1, 2, num_segments)
    pair_GN = num_states * state_G2N[:, 0] + state_G2N[:, 1]
    return (place_4P[:, pair_GN] % 4).transpose(0, 1).flatten(0, 1)


@functools.cache
def trellis_tables(device: torch.device) -> tuple[Tensor, ...]:
    """SUBSET_OFFSETS; the paths through four rows; and infinity where none joins two states.

    A path has a pair P of states, and in each row a place in the 4 x 4 costs of rows and subsets.
    """
    num_states = len(NEXT_STATES) // 2
    path_X = np.arange(16 * num_states)  # first state, and the parities of four codes
    state_X, places = path_X >> 4, []
    for row in range(4):
        parity_X = path_X >> row & 1
        places.append(4 * row + 2 * (state_X & 1) + parity_X)
        state_X = NEXT_STATES[2 * state_X + parity_X]
    pair_X = (path_X >> 4) * num_states + state_X
    place_4P = np.zeros((4, num_states**2), np.int64)
    barrier_P1 = np.full((num_states**2, 1), np.inf, np.float32)
    place_4P[:, pair_X], barrier_P1[pair_X] = places, 0
    tables = SUBSET_OFFSETS, place_4P, barrier_P1
    return tuple(torch.from_numpy(table).to(device) for table in tables)


# --- 8. Artifact ---------------------------------------------------------------------------------
# One file: magic, version and header length; a zlib-compressed JSON header (model shape, tokenizer,
# tensors, streams); the compressed streams; the SHA-256 of everything before it. Reading checks the
# checksum first, and every size before memory is allocated. No pickle is read.

ARTIFACT_MAGIC, ARTIFACT_VERSION, CHECKSUM_BYTES = b"PGOLFART", 2, 32
ARTIFACT_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of the compressed header
MAX_HEADER_BYTES = 2**22  # uncompressed; a header lists a few hundred tensors
# Bound of the memory that reading takes, about 12 bytes per weight at its peak: a model that is not
# small has at least an eighth of a bit per weight.
MAX_WEIGHTS, SMALL_MODEL_WEIGHTS, MAX_WEIGHTS_PER_BYTE = MAX_MODEL_WEIGHTS, 2**24, 64
STORED_KNOBS = [f.name for f in fields(Config) if f.metadata["stored"]]


def encode_artifact(cfg: Config, tensors: Mapping[str, Quantized], tokenizer_sha256: str) -> bytes:
    """The bytes of the artifact file; equal arguments give equal bytes."""
    streams: dict[str, bytes] = {}
    for group, names in group_names(list(tensors), model_layout(cfg)[1]).items():
        packed = pack_group([tensors[name] for name in names], cfg.compressor)
        streams |= {f"{kind}/{group}": stream for kind, stream in packed.items()}
    header = {
        "model": {name: getattr(cfg, name) for name in STORED_KNOBS},
        "tokenizer_sha256": tokenizer_sha256,
        "transform": read_manifest(cfg).transform,
        "compressor": cfg.compressor,
        "tensors": [[name, *storage_spec(tensors[name])] for name in sorted(tensors)],
        "streams": [[key, len(stream)] for key, stream in streams.items()],
    }
    packed_header = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    prefix = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(packed_header))
    body = b"".join([prefix, packed_header, *streams.values()])
    return body + hashlib.sha256(body).digest()


def read_artifact(path: Path, run: Run, tokenizer_sha256: str) -> GPT:
    """The model stored in a file, on the run's device; run.cfg takes the shape of that model.

    Raises InputError if the file is damaged, belongs to other data or is too large.
    """
    try:
        header, body = decode_header(run.run_on_rank0(path.read_bytes))
        require(
            header["tokenizer_sha256"] == tokenizer_sha256,
            "it was trained with another tokenizer than the data set's",
        )
        transform, allowed = header.get("transform", "none"), [read_manifest(run.cfg).transform]
        remedy = "set DATA_PATH to data with the same case markers as the text it was trained on"
        if run.cfg.mode == "generate":
            allowed, remedy = TRANSFORMS, "use the script that wrote it"
        require(
            transform in allowed,
            f"its text has transform {transform!r:.40}, not {allowed}; {remedy}",
        )
        check_shape_knobs(header["model"])
        ignored = [k for k in changed_knobs(run.cfg) if k.lower() in header["model"]]
        ignored = [k for k in ignored if header["model"][k.lower()] != getattr(run.cfg, k.lower())]
        if ignored and run.cfg.mode == "eval":
            run.log("warning", text=f"the artifact's values of {', '.join(ignored)} are used")
        run.cfg = dataclasses.replace(run.cfg, **header["model"])
        problems = check_eval_context(run.cfg)
        require(run.cfg.mode == "generate" or not problems, "; ".join(problems))
        weights = dequantize_all(decode_tensors(header, body, *model_layout(run.cfg)))
    except Exception as error:  # strange bytes raise errors of all kinds: of numpy, JSON, coders
        raise InputError(f"cannot use the artifact {path}: {error}") from error
    return build_model(run, weights)


def check_shape_knobs(knobs: Mapping[str, Any]) -> None:
    """Raise InputError unless a header has exactly STORED_KNOBS, each of its type."""
    types = get_type_hints(Config)
    differences = sorted(knobs.keys() ^ set(STORED_KNOBS))
    require(not differences, f"its knobs are not the model's: {differences}")
    for name, value in knobs.items():
        is_finite = type(value) is not float or math.isfinite(value)
        require(
            type(value) is types[name] and is_finite,
            f"{name.upper()}={value!r} is not a valid {types[name].__name__}",
        )


def decode_header(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams of an artifact; InputError if checksum, magic or version is wrong."""
    require(
        len(payload) >= ARTIFACT_PREFIX.size + CHECKSUM_BYTES,
        f"{len(payload)} bytes are too few for an artifact",
    )
    body, checksum = payload[:-CHECKSUM_BYTES], payload[-CHECKSUM_BYTES:]
    magic, version, header_bytes = ARTIFACT_PREFIX.unpack_from(body)
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
    packed_header = body[ARTIFACT_PREFIX.size :][:header_bytes]
    header = json.loads(zlib.decompressobj().decompress(packed_header, MAX_HEADER_BYTES))
    return header, body[ARTIFACT_PREFIX.size + header_bytes :]


def decode_tensors(
    header: Mapping[str, Any],
    body: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, str],
) -> dict[str, Quantized]:
    """The stored tensors by name; InputError unless they are exactly those of the model."""
    specs, coder = {name: spec for name, *spec in header["tensors"]}, header["compressor"]
    require(
        specs.keys() == shapes.keys(),
        f"its tensors are not the model's: {sorted(specs.keys() ^ shapes.keys())}",
    )
    size = sum(math.prod(shape) for shape in shapes.values())
    limit = min(MAX_WEIGHTS, max(SMALL_MODEL_WEIGHTS, MAX_WEIGHTS_PER_BYTE * len(body)))
    require(size <= limit, f"{size} weights; {len(body)} bytes may hold at most {limit}")
    packed = split_streams(header["streams"], body)
    members, tensors = group_names(list(specs), groups), dict[str, Quantized]()
    require(packed.keys() == members.keys(), f"streams of {[*packed]} for {[*members]}")
    for group, names in members.items():
        stored = [empty_tensor(name, specs[name], shapes[name], coder) for name in names]
        unpack_group(packed[group], stored, coder)
        tensors |= zip(names, stored, strict=True)
    return tensors


def split_streams(entries: Sequence[Any], body: bytes) -> dict[str, dict[str, bytes]]:
    """The streams by group and kind, for entries [kind/group, number of bytes]."""
    packed: dict[str, dict[str, bytes]] = {}
    position = 0
    for key, num_bytes in entries:
        kind, _, group = key.partition("/")
        require(type(num_bytes) is int and num_bytes > 0, f"stream {key} of {num_bytes} bytes")
        packed.setdefault(group, {})[kind] = body[position : position + num_bytes]
        position += num_bytes
    require(position == len(body), f"{len(body)} bytes of streams, {position} declared")
    return packed


def dequantize_all(tensors: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """The weights by name, in float32."""
    return {name: tensor.dequantized() for name, tensor in tensors.items()}


def artifact_sizes(payload: bytes) -> dict[str, int]:
    """Bytes of an artifact by tensor group and kind of stream, and those of header and checksum."""
    header, body = decode_header(payload)
    sizes = {"frame_bytes": len(payload) - len(body)}
    streams = {"_".join([*key.split("/")[::-1], "bytes"]): size for key, size in header["streams"]}
    return {**streams, **sizes}


def model_layout(cfg: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and quantization group of every parameter of a model, without allocating it."""
    with torch.device("meta"):
        model = GPT(cfg, ATTENTION_BACKENDS["sdpa"](), torch.float32)
    return (
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        {name: role.quant_group for name, role in parameter_roles(model).items()},
    )


def group_names(names: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """The stored names by quantization group; both are sorted."""
    members: dict[str, list[str]] = {}
    for name in sorted(names):
        members.setdefault(groups[name], []).append(name)
    return dict(sorted(members.items()))


# Flags of a stored tensor: it has column scales, is on the trellis grid, has int16 codes, and has
# scales from SCALES instead of fp16.
COLUMN_SCALES, TRELLIS_GRID, INT16_CODES, INDEXED_SCALES = 1, 2, 4, 8


def storage_spec(tensor: Quantized) -> list[int]:
    """How the header describes a tensor: bits, number of row scales (0: plain fp16), flags."""
    if tensor.row_scales is None:
        return [PLAIN_BITS, 0, 0]
    flags = (
        COLUMN_SCALES * (tensor.column_scales is not None)
        + TRELLIS_GRID * tensor.trellis
        + INT16_CODES * (tensor.values.itemsize == 2)
        + INDEXED_SCALES * (tensor.row_scales.itemsize == 4)
    )
    return [tensor.bits, len(tensor.row_scales), flags]


def empty_tensor(name: str, spec: Sequence[int], shape: Sequence[int], coder: str) -> Quantized:
    """A placeholder of the described storage, which takes no memory; InputError if impossible."""
    is_possible = is_storage_spec(spec, shape, coder)
    require(is_possible, f"{name} of shape {tuple(shape)} cannot be stored as {spec}")
    bits, num_scales, flags = spec
    if not num_scales:
        return Quantized(bits, np.broadcast_to(np.float16(0), shape), None)
    code_type = np.int16 if flags & INT16_CODES else np.int8
    scale_type = np.float32 if flags & INDEXED_SCALES else np.float16
    scales = np.broadcast_to(np.zeros((), scale_type), math.prod(shape))
    return Quantized(
        bits,
        np.broadcast_to(np.zeros((), code_type), shape),
        scales[:num_scales],
        scales[: shape[1]] if flags & COLUMN_SCALES else None,
        bool(flags & TRELLIS_GRID),
    )


def is_storage_spec(spec: Sequence[Any], shape: Sequence[int], coder: str) -> bool:
    """Whether a tensor of this shape can be stored as [bits, number of scales, flags]."""
    bits, num_scales, flags = spec
    if not all(type(x) is int for x in spec):
        return False
    if bits == PLAIN_BITS:
        return num_scales == 0 and flags == 0
    size, num_flags = math.prod(shape), 16 if coder == "ans" else 8
    fits = 0 < size and num_scales == (shape[0] if len(shape) > 1 else 1)
    is_matrix = len(shape) == 2
    needs_matrix = bool(flags & (COLUMN_SCALES | TRELLIS_GRID))
    return bits in BITS and fits and 0 <= flags < num_flags and (is_matrix or not needs_matrix)


def stream_slots(stored: Sequence[Quantized]) -> dict[str, list[tuple[int, str]]]:
    """The arrays of each stream of a group: (index of the tensor, field of Quantized).

    Streams: half (fp16 values and scales), codes, steps (scales from SCALES).
    """
    slots: dict[str, list[tuple[int, str]]] = {"half": [], "codes": [], "steps": []}
    for i, tensor in enumerate(stored):
        if tensor.row_scales is None:
            slots["half"].append((i, "values"))
            continue
        scale_slots = slots["half" if tensor.row_scales.itemsize == 2 else "steps"]
        scale_slots.append((i, "row_scales"))
        if tensor.column_scales is not None:
            scale_slots.append((i, "column_scales"))
        slots["codes"].append((i, "values"))
    return {kind: arrays for kind, arrays in slots.items() if arrays}


def pack_group(stored: Sequence[Quantized], coder: str) -> dict[str, bytes]:
    """The compressed streams of a group of tensors, by kind."""
    packed, (compress, _) = dict[str, bytes](), find_compressor(coder)
    for kind, slots in stream_slots(stored).items():
        arrays = [getattr(stored[i], name) for i, name in slots]
        if kind == "steps":
            packed[kind] = encode_numbers(
                [SCALES.searchsorted(scales) - MAX_SCALE_INDEX for scales in arrays]
            )
        elif kind == "codes" and coder == "ans":
            packed[kind] = CodeCodec(code_grids(stored)).encode(arrays)
        else:
            packed[kind] = compress(b"".join(array.tobytes() for array in arrays))
    return packed


def unpack_group(packed: Mapping[str, bytes], stored: list[Quantized], coder: str) -> None:
    """Replace the empty arrays of a group of tensors by those of its streams."""
    streams = stream_slots(stored)
    for kind in packed:
        require(kind in streams, f"a stream {kind} that no tensor needs")
    # Codes come last: their contexts need the columns.
    for kind in [kind for kind in ("steps", "half", "codes") if kind in streams]:
        empty = [getattr(stored[i], name) for i, name in streams[kind]]
        arrays = unpack_stream(kind, packed[kind], empty, coder, code_grids(stored))
        for (i, name), x, like in zip(streams[kind], arrays, empty, strict=True):
            largest = MAX_CODE if like.itemsize == 2 else 2 ** (stored[i].bits - 1) - 1
            require(
                kind != "codes" or abs(x.astype(np.int32)).max() <= largest,
                f"codes beyond {stored[i].bits} bits",
            )
            filled: dict[str, Any] = {name: x.astype(like.dtype).reshape(like.shape)}
            stored[i] = stored[i]._replace(**filled)


def unpack_stream(
    kind: str, packed: bytes, empty: Sequence[np.ndarray], coder: str, grids: Sequence[CodeGrid]
) -> Sequence[np.ndarray]:
    """The arrays of a stream, of the sizes and types of `empty`; raises ValueError on damage."""
    if kind == "steps":
        indices = decode_numbers(packed, [array.size for array in empty])
        in_range = all(abs(index).max() <= MAX_SCALE_INDEX for index in indices)
        require(in_range, "scales out of range")
        return [SCALES[index + MAX_SCALE_INDEX] for index in indices]
    if kind == "codes" and coder == "ans":
        return CodeCodec(grids).decode(packed)
    offsets = [0, *itertools.accumulate(array.nbytes for array in empty)]
    num_bytes = offsets.pop()
    _, decompress = find_compressor(coder)
    raw = decompress(packed, num_bytes + 1)
    require(
        len(raw) == num_bytes,
        f"stream {kind} does not hold the {num_bytes} bytes that its tensors need",
    )
    arrays = [
        np.frombuffer(raw, array.dtype, array.size, offset)
        for array, offset in zip(empty, offsets, strict=True)
    ]
    require(all(np.isfinite(array).all() for array in arrays), "numbers that are not finite")
    return arrays


def find_compressor(name: str) -> Sequence[Callable[..., bytes]]:
    """compress(raw) and decompress(packed, max_bytes); InputError if the package is missing."""
    module_name, *functions = COMPRESSORS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"COMPRESSOR={name}: {error}; pip install -r requirements.txt, or choose another"
        ) from error
    return [functools.partial(function, module) for function in functions]


def decompress_brotli(module: Any, packed: bytes, limit: int) -> bytes:
    """At most `limit` bytes of a brotli stream."""
    decoder, raw = module.Decompressor(), b""
    while len(raw) < limit:
        piece = decoder.process(packed, output_buffer_limit=limit)
        if not piece:
            break
        raw, packed = raw + piece, b""
    return raw[:limit]


def unshuffle_bytes(raw: bytes) -> bytes:
    """Undo raw[::2] + raw[1::2]: the first half of `raw` holds the bytes at even positions."""
    return np.frombuffer(raw + bytes(len(raw) % 2), "u1").reshape(2, -1).T.tobytes()[: len(raw)]


# Module, compress(module, raw), decompress(module, packed, max_bytes).
ZLIB: Any = (
    "zlib",
    lambda m, raw: m.compress(raw, 9),
    lambda m, packed, limit: m.decompressobj().decompress(packed, limit),
)
COMPRESSORS: dict[str, tuple[str, Callable[..., bytes], Callable[..., bytes]]] = {
    "ans": ZLIB,  # for fp16 numbers; codes and indexed scales have a coder of their own
    "zlib": ZLIB,
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
    "brotli_shuffled": (  # separates the bytes of fp16 numbers (openai/parameter-golf#1394)
        "brotli",
        lambda m, raw: m.compress(raw[::2] + raw[1::2], quality=11, lgwin=24),
        lambda m, packed, limit: unshuffle_bytes(decompress_brotli(m, packed, limit)),
    ),
}

# Entropy coder of codes: asymmetric numeral systems (arXiv:1311.2540) of the library constriction,
# with adaptive frequencies. The context of a code is its expected magnitude and its sub-quantizer.
# The expected magnitude is the mean magnitude of its column so far, times a gain of its
# row segment, which is stored. Contexts are integers, and floats see only + - * / and square roots,
# so that every machine computes the same models.
# Tensor suffixes: M matrices, C columns of all matrices, L segments (up to TRELLIS_SEGMENT rows of
#                  a matrix), N columns of all segments, K contexts, W symbols, O x I a matrix.
MAGNITUDE_ONE, FREQUENCY_ONE = 2**12, 1024  # fixed-point 1.0 of magnitudes and of frequencies
PRIOR_ROWS, PRIOR_CODES = 32, 128  # weight of the initial column means and frequencies
MEMORY_CODES = 2**16  # frequencies are halved beyond so many codes
NUM_MAGNITUDES, UNIT_MAGNITUDE = 128, 56  # magnitude classes, 1/8 octave apart; the class of 1.0
MAGNITUDES = np.array(
    [round(MAGNITUDE_ONE * 2 ** ((j - UNIT_MAGNITUDE) / 8)) for j in range(NUM_MAGNITUDES)]
)
MAGNITUDE_EDGES = np.array(
    [
        round(MAGNITUDE_ONE * 2 ** ((j - UNIT_MAGNITUDE) / 8 + 1 / 16))
        for j in range(NUM_MAGNITUDES - 1)
    ]
)
MAX_GAIN, GAIN_CONTEXT = 16, 64  # gains in 1/4 octaves; they are coded like codes of this context
NUMBERS_PER_ROW = 64  # of the matrix that encode_numbers makes


class CodeGrid(NamedTuple):
    """Shape of a matrix of codes, and what its reader knows before decoding."""

    rows: int
    columns: int
    trellis: bool = False
    column_log_scale_I: np.ndarray | int = 0  # expected magnitude of columns, in 1/8 octaves


def code_grids(stored: Sequence[Quantized]) -> list[CodeGrid]:
    """The grids of the coded tensors of a group."""
    grids = []
    for tensor in stored:
        if tensor.row_scales is None:
            continue
        rows = len(tensor.values if tensor.trellis else tensor.row_scales)
        log_scale_I: np.ndarray | int = 0
        if tensor.column_scales is not None:
            log_scale_I = MAX_SCALE_INDEX - SCALES.searchsorted(tensor.column_scales)
        grids.append(CodeGrid(rows, tensor.values.size // rows, tensor.trellis, log_scale_I))
    return grids


class CodeCodec:
    """Encoder and decoder of matrices of integers up to MAX_CODE, over one model of contexts.

    The bytes are: the largest magnitude (2), the class of each matrix's mean magnitude (1 each),
    the words of the ANS coder.
    """

    def __init__(self, grids: Sequence[CodeGrid]):
        self.grids = grids

    def encode(self, codes: Sequence[np.ndarray]) -> bytes:
        """The bytes of the matrices; equal matrices give equal bytes on every machine."""
        flat = np.concatenate([np.zeros(0, np.int32), *(c.ravel().astype(np.int32) for c in codes)])
        largest = int(abs(flat).max(initial=0))
        require(largest <= MAX_CODE, f"a code of magnitude {largest} exceeds {MAX_CODE}")
        means = bytes(map(mean_magnitude_class, codes, self.grids))
        model, messages = CodeModel(self.grids, largest, means), list[tuple[np.ndarray, Any]]()
        for row in model.rows():
            codes_N = flat[row.position_N]
            gain_L = row.best_gains(codes_N)
            messages += model.gains.encode(row.gain_context_L, gain_L)
            messages += model.codes.encode(row.code_contexts(gain_L), codes_N)
            model.update(row, gain_L, codes_N)
        coder = constriction.stream.stack.AnsCoder()
        for symbols, frequencies in reversed(messages):  # a stack: the last one in is read first
            coder.encode_reverse(symbols, frequencies)
        words = coder.get_compressed().astype("<u4")
        return largest.to_bytes(2, "little") + means + words.tobytes()

    def decode(self, payload: bytes) -> list[np.ndarray]:
        """The int16 matrices that were encoded; ValueError if the bytes are damaged."""
        largest, start = int.from_bytes(payload[:2], "little"), 2 + len(self.grids)
        require(len(payload) >= start and largest <= MAX_CODE, "damaged codes: wrong head")
        sizes = [grid.rows * grid.columns for grid in self.grids]
        try:
            flat = self.decode_flat(payload[2:start], payload[start:], largest, sum(sizes))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the library is not an Exception
            raise ValueError(f"damaged codes: {error}") from error
        parts = np.split(flat.astype(np.int16), np.cumsum(sizes))
        return [part.reshape(g[:2]) for part, g in zip(parts, self.grids, strict=False)]

    def decode_flat(self, means: bytes, words: bytes, largest: int, size: int) -> np.ndarray:
        """All codes in one array."""
        coder = constriction.stream.stack.AnsCoder(np.frombuffer(words, "<u4").astype(np.uint32))
        model, flat = CodeModel(self.grids, largest, means), np.zeros(size, np.int32)
        for row in model.rows():
            gain_L = model.gains.decode(row.gain_context_L, coder)
            codes_N = model.codes.decode(row.code_contexts(gain_L), coder)
            flat[row.position_N] = codes_N
            model.update(row, gain_L, codes_N)
        require(coder.is_empty(), "more bytes than the codes need")
        return flat


def mean_magnitude_class(codes: np.ndarray, grid: CodeGrid) -> int:
    """Class of a matrix's mean magnitude, relative to the known magnitudes of its columns."""
    size_OI = abs(codes.reshape(grid[:2]) * 2.0 ** (-grid.column_log_scale_I / 8))
    mean = size_OI.sum() / max(size_OI.size, 1) * MAGNITUDE_ONE
    return int(MAGNITUDE_EDGES.searchsorted(mean))


class CodeRow(NamedTuple):
    """One row of every segment that has it, and what the model expects of its codes."""

    first_L: np.ndarray  # index of each segment's first code in arrays over N
    segment_N: np.ndarray
    column_N: np.ndarray
    position_N: np.ndarray  # in the array of all codes
    state_N: np.ndarray  # of the trellis
    expected_C: np.ndarray  # mean magnitude of each column, in fixed point

    @property
    def gain_context_L(self) -> np.ndarray:
        return np.full(len(self.first_L), GAIN_CONTEXT)

    def best_gains(self, codes_N: np.ndarray) -> np.ndarray:
        """The gain of each segment, in 1/4 octaves, which makes its expected magnitudes right."""
        size_L = np.add.reduceat(abs(codes_N) * float(MAGNITUDE_ONE), self.first_L)
        expected_L = np.add.reduceat(self.expected_C[self.column_N], self.first_L)
        gain_L = np.rint(4 * np.log2((size_L + 1) / (expected_L + 1)))
        return gain_L.clip(-MAX_GAIN, MAX_GAIN).astype(np.int32)

    def code_contexts(self, gain_L: np.ndarray) -> np.ndarray:
        """Context of each code: 128 * sub-quantizer + class of its expected magnitude."""
        class_N = MAGNITUDE_EDGES.searchsorted(self.expected_C)[self.column_N]
        class_N = (class_N + 2 * gain_L[self.segment_N]).clip(0, NUM_MAGNITUDES - 1)
        return class_N.astype(np.uint8) | (self.state_N & 1) << np.uint8(7)


class CodeModel:
    """Contexts and frequencies, which encoder and decoder update with the same codes."""

    def __init__(self, grids: Sequence[CodeGrid], largest: int, means: bytes):
        # Longer segments come first, so that the segments that have a row are the first ones.
        segments = sorted(
            (
                (min(TRELLIS_SEGMENT, grid.rows - first_row), matrix, first_row)
                for matrix, grid in enumerate(grids)
                if grid.columns
                for first_row in range(0, grid.rows, TRELLIS_SEGMENT)
            ),
            reverse=True,
        )
        self.rows_L, matrix_L, first_row_L = np.array(segments, np.int64).reshape(-1, 3).T
        rows_M, columns_M, trellis_M = np.array([g[:3] for g in grids], np.int64).reshape(-1, 3).T
        self.end_L = columns_M[matrix_L].cumsum()
        self.first_L = self.end_L - columns_M[matrix_L]
        self.segment_N = np.arange(len(segments)).repeat(columns_M[matrix_L])
        matrix_N = matrix_L[self.segment_N]
        within_N = np.arange(len(matrix_N)) - self.first_L[self.segment_N]
        self.column_N = within_N + (columns_M.cumsum() - columns_M)[matrix_N]
        self.width_N, self.trellis_N = columns_M[matrix_N], trellis_M[matrix_N]
        first_code_M = (rows_M * columns_M).cumsum() - rows_M * columns_M
        row_start_N = first_row_L[self.segment_N] * self.width_N
        self.position_N = within_N + first_code_M[matrix_N] + row_start_N
        self.state_N = np.zeros(len(matrix_N), np.int8)
        class_C = initial_classes(grids, means)
        self.sum_C, self.count_C = (
            PRIOR_ROWS * MAGNITUDES[class_C],
            np.full(len(class_C), PRIOR_ROWS),
        )
        self.codes, self.gains = FrequencyTables(largest + 1), FrequencyTables(MAX_GAIN + 1)

    def rows(self) -> Iterator[CodeRow]:
        """The rows in coding order; `update` must be called before the next one is taken."""
        for row in range(self.rows_L.max(initial=0)):
            num_segments = int((self.rows_L > row).sum())
            end = self.end_L[num_segments - 1]
            yield CodeRow(
                self.first_L[:num_segments],
                self.segment_N[:end],
                self.column_N[:end],
                self.position_N[:end] + row * self.width_N[:end],
                self.state_N[:end],
                self.sum_C // self.count_C,
            )

    def update(self, row: CodeRow, gain_L: np.ndarray, codes_N: np.ndarray) -> None:
        """Advance trellis states and column means by a row of codes."""
        parity_N = codes_N & self.trellis_N[: len(codes_N)]  # 0 on a uniform grid
        self.state_N = NEXT_STATES[2 * row.state_N + parity_N]
        unit_N = MAGNITUDES[UNIT_MAGNITUDE - 2 * gain_L][row.segment_N]
        size_C = np.bincount(row.column_N, abs(codes_N) * unit_N, len(self.sum_C))
        self.sum_C += size_C.astype(np.int64)
        self.count_C += np.bincount(row.column_N, minlength=len(self.sum_C))


def initial_classes(grids: Sequence[CodeGrid], means: bytes) -> np.ndarray:
    """Class of the expected magnitude of every column of all matrices, before any code."""
    classes = [np.zeros(0)]
    for grid, mean in zip(grids, means, strict=True):
        classes.append(np.zeros(grid.columns) + mean + grid.column_log_scale_I)
    return np.concatenate(classes).astype(np.int64).clip(0, NUM_MAGNITUDES - 1)


class FrequencyTables:
    """Adaptive frequencies of the symbols -half to half - 1, by context.

    They are symmetric about 0; in contexts of the sub-quantizer Q1, where a code k stands for
    k + 1/2, about k = -1/2.
    """

    def __init__(self, half: int):
        self.half, self.counts_KW = half, np.zeros((2 * NUM_MAGNITUDES, 2 * half), np.int64)

    def encode(self, context_N: np.ndarray, symbol_N: np.ndarray) -> list[tuple[np.ndarray, Any]]:
        """Symbols and entropy model of each context, in the order in which they are decoded."""
        order_N, contexts_K, number_K = sort_contexts(context_N)
        index_N = symbol_N[order_N].astype(np.int32) + np.int32(self.half)
        messages = zip(
            np.split(index_N, number_K.cumsum()[:-1]), self.entropy_models(contexts_K), strict=True
        )
        self.update(contexts_K, number_K, index_N)
        return list(messages)

    def decode(self, context_N: np.ndarray, coder: Any) -> np.ndarray:
        """The symbols that the coder holds for these contexts."""
        order_N, contexts_K, number_K = sort_contexts(context_N)
        models = self.entropy_models(contexts_K)
        index_N = np.concatenate(
            [coder.decode(model, n) for model, n in zip(models, number_K.tolist(), strict=True)]
        )
        self.update(contexts_K, number_K, index_N)
        symbol_N = np.empty_like(index_N)
        symbol_N[order_N] = index_N - np.int32(self.half)
        return symbol_N

    def entropy_models(self, contexts_K: np.ndarray) -> list[Any]:
        """The current distribution of each context."""
        is_new_K = self.counts_KW[contexts_K, 0] == 0
        for context in contexts_K[is_new_K].tolist():
            self.counts_KW[context] = self.initial_counts(context)
        return [
            constriction.stream.model.Categorical(counts_W, perfect=False)
            for counts_W in self.counts_KW[contexts_K].astype(np.float64)  # float32 is rounded
        ]

    def initial_counts(self, context: int) -> np.ndarray:
        """A two-sided geometric distribution with the mean magnitude of the context."""
        sub_quantizer, magnitude_class = divmod(context, NUM_MAGNITUDES)
        mean = MAGNITUDES[magnitude_class] / MAGNITUDE_ONE
        power_W = np.full(self.half + 1, mean / (1 + math.sqrt(1 + mean * mean))).cumprod()
        weight_W = power_W[abs(2 * np.arange(-self.half, self.half) + sub_quantizer) // 2]
        weight_W *= PRIOR_CODES * FREQUENCY_ONE / math.fsum(weight_W)
        return weight_W.astype(np.int64) + 1

    def update(self, contexts_K: np.ndarray, number_K: np.ndarray, index_N: np.ndarray) -> None:
        """Count symbols, sorted by context, and their mirror images."""
        counts_KW, width = self.counts_KW[contexts_K], 2 * self.half
        cell_N = np.repeat(np.arange(len(contexts_K)) * width, number_K) + index_N
        seen_KW = np.bincount(cell_N, minlength=counts_KW.size).reshape(counts_KW.shape)
        mirrored_KW = seen_KW[:, ::-1].copy()
        is_q0_K = contexts_K < NUM_MAGNITUDES
        mirrored_KW[is_q0_K] = np.roll(mirrored_KW[is_q0_K], 1, axis=1)
        counts_KW += (seen_KW + mirrored_KW) * (FREQUENCY_ONE // 2)
        is_full_K1 = counts_KW.sum(axis=1, keepdims=True) > MEMORY_CODES * FREQUENCY_ONE
        self.counts_KW[contexts_K] = counts_KW - counts_KW // 2 * is_full_K1


def sort_contexts(context_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stable order by context, the contexts that occur, and how often each one does."""
    number_K = np.bincount(context_N)
    contexts_K = number_K.nonzero()[0]
    return context_N.argsort(kind="stable"), contexts_K, number_K[contexts_K]


def number_grid(length: int) -> CodeGrid:
    rows = max(-(-length // NUMBERS_PER_ROW), 1)
    return CodeGrid(rows, -(-length // rows))


def encode_numbers(arrays: Sequence[np.ndarray]) -> bytes:
    """Vectors of integers within MAX_CODE of their median, coded as one matrix of differences."""
    medians = np.array([np.median(a) if a.size else 0 for a in arrays]).astype("<i2")
    differences = np.concatenate([a - median for a, median in zip(arrays, medians, strict=True)])
    grid = number_grid(len(differences))
    matrix_OI = np.resize(differences, grid[:2])  # padded by repeating
    return medians.tobytes() + CodeCodec([grid]).encode([matrix_OI])


def decode_numbers(payload: bytes, lengths: Sequence[int]) -> list[np.ndarray]:
    """The vectors that encode_numbers was given; ValueError if the bytes are damaged."""
    start = 2 * len(lengths)
    (matrix_OI,) = CodeCodec([number_grid(sum(lengths))]).decode(payload[start:])
    parts = np.split(matrix_OI.ravel().astype(np.int64), np.cumsum(lengths))  # the last: padding
    medians = np.frombuffer(payload[:start], "<i2")
    return [part + median for part, median in zip(parts, medians, strict=False)]


@functools.cache  # an edit during the run must not change what ran
def script_source() -> str:
    """The readable source of this script, also when it runs from its packed form."""
    return globals().get("PACKED_SOURCE") or Path(__file__).read_text(encoding="utf-8")


# How a packed script starts.
PACKED_START = "# coding:latin-1\nimport "


@functools.cache
def packed_script() -> bytes:
    """The file of this script in its packed form: the own file if that is what runs."""
    if "PACKED_SOURCE" in globals():
        return Path(__file__).read_bytes()
    return pack_source(script_source())


# A packed script need not pack: it leaves out what follows, up to the line "# end of packing".
# packing
# The packed script holds the compressed source as a string of Latin-1 characters, one per byte: a
# fifth shorter than base85. The stub puts the unpacked source where tracebacks, inspect and Triton
# look for a file's lines.
PACKED_STUB = (
    PACKED_START + "bz2,linecache\n"
    'PACKED_SOURCE=bz2.decompress("""{payload}""".encode("latin-1")).decode()\n'
    'linecache.cache["<train_gpt>"]='
    '(len(PACKED_SOURCE),None,PACKED_SOURCE.splitlines(True),"<train_gpt>")\n'
    'exec(compile(PACKED_SOURCE,"<train_gpt>","exec"))\n'
)
# Characters that cannot stand in a string of triple quotes as they are, besides its end and NUL.
PAYLOAD_ESCAPES = str.maketrans({"\r": "\\r", "\\": "\\\\"})
PACKING_CODE = re.compile(r"^# packing\n.*?^# end of packing\n", re.MULTILINE | re.DOTALL)


@functools.cache
def pack_source(source: str) -> bytes:
    """The file of a script that runs as `source` does, minified and compressed.

    Only the standard library is used, so that the counted size depends on no installed package.
    """
    source = shorten_locals(minify(PACKING_CODE.sub("", source)))
    source = shorten_globals(shorten_own_names(source))
    packed = bz2.compress(source.encode())  # smaller than LZMA's
    payload = packed.decode("latin-1").translate(PAYLOAD_ESCAPES)
    # A digit after it would be part of the escape of a null byte.
    payload = re.sub("\0(?=[0-7])", r"\\x00", payload).replace("\0", r"\0")
    payload = re.sub(r'"(?=""|\Z)', r'\\"', payload)
    return PACKED_STUB.format(payload=payload).encode("latin-1")


# Two such characters next to each other could become one token, or a warning of the compiler.
NEEDS_SPACE = re.compile(r"[\w.'\"]{2}")


def minify(source: str) -> str:
    """The source without comments, documentation, annotations and optional whitespace.

    Each level of indentation takes one space. The text of a token is never changed. The result is
    the same for all versions of Python, unlike that of ast.unparse.
    """
    tree, offset = ast.parse(source), character_offsets(source)
    spans = sorted(
        annotation_spans(source, tree, offset) + documentation_spans(source, tree, offset)
    )
    edges = [0, *itertools.chain(*spans), len(source)]
    source = "".join(source[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2))
    docstrings, statements = docstring_positions(source), list[tuple[int, str]]()
    statement, indent, first, previous_end = "", 0, (0, 0), (0, 0)
    for kind, text, start, end in needed_tokens(source):
        if kind in ("INDENT", "DEDENT"):
            indent += 1 if kind == "INDENT" else -1
        elif kind == "NEWLINE":
            statement = docstrings.get(first, statement)
            statements += [(indent, statement)] if statement else []
            statement = ""
        elif kind != "ENDMARKER":
            if not statement:
                first = start
            elif start != previous_end and NEEDS_SPACE.match(statement[-1] + text[0]):
                statement += " "
            statement, previous_end = statement + text, end
    return join_statements(statements)


# How a statement begins that cannot share a line with the one before; `match` may also be a name.
COMPOUND = re.compile(
    r"@|(async|case|class|def|elif|else|except|finally|for|if|match|try|while|with)\b"
)


def join_statements(statements: Sequence[tuple[int, str]]) -> str:
    """The lines of a script from its statements and their levels of indentation.

    Simple statements after each other share a line, which is that of the header of their block if
    nothing else is in it.
    """
    lines = list[tuple[int, bool, str]]()
    for (level, is_simple), members in itertools.groupby(
        statements, lambda item: (item[0], not COMPOUND.match(item[1]))
    ):
        texts = [text.rstrip(";") for _, text in members]
        texts = [";".join(texts)] if is_simple else texts
        lines += [(level, is_simple, text) for text in texts]
    output = ""
    for i, (level, is_simple, text) in enumerate(lines):
        next_level = lines[i + 1][0] if i + 1 < len(lines) else 0
        is_block = is_simple and i > 0 and lines[i - 1][0] < level > next_level
        output += text if is_block else "\n" + " " * level + text
    return output[1:] + "\n" * bool(output)


Position = tuple[int, int]  # row, from 1, and column


def needed_tokens(source: str) -> Iterator[tuple[str, str, Position, Position]]:
    """The tokens without comments and without the comma after the last of several items."""
    comma, num_commas = None, [0]
    for token in source_tokens(source):
        kind, text, *_ = token
        if kind in ("COMMENT", "NL"):
            continue
        if comma and not (text in CLOSING_BRACKETS and num_commas[-1] > 1):
            yield comma
        comma = None
        if text == ",":
            comma = token
            num_commas[-1] += 1
            continue
        if text in ("(", "[", "{"):
            num_commas.append(0)
        elif text == "lambda":  # its arguments are no items
            num_commas[-1] -= 99
        elif text in CLOSING_BRACKETS:
            num_commas.pop()
        yield token


CLOSING_BRACKETS = (")", "]", "}")


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


Offset = Callable[[int, int], int]


def character_offsets(source: str) -> Offset:
    """A function that returns the index of the character at a row and a byte of it, as in ast."""
    lines = list(io.StringIO(source))
    line_starts = [0, *itertools.accumulate(map(len, lines))]
    return lambda row, num_bytes: (
        line_starts[row - 1] + len(lines[row - 1].encode()[:num_bytes].decode())
    )


def documentation_spans(source: str, tree: ast.Module, offset: Offset) -> list[Span]:
    """Spans of the documentation and the unit of each knob."""
    spans = list[Span]()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "knob"):
            continue
        if node.args:
            units = [pair.value for pair in node.keywords[:1] if pair.arg == "unit"]
            ends: Any = [node.args[0], [*node.args, *units][-1]]
            start, end = (offset(x.end_lineno, x.end_col_offset) for x in ends)
            if re.match(r',(\s|#.*)*"', source[start : start + 999]):  # not in parentheses
                spans.append((start, end))
    return spans


def annotation_spans(source: str, tree: ast.Module, offset: Offset) -> list[Span]:
    """Spans of characters that hold annotations without effect.

    They are those of arguments and results of functions, and of what is assigned in them. A
    decorator may read those of its function, and a class needs its own.
    """
    spans = list[Span]()

    def add(x: Any) -> None:
        if x is not None:
            start, end = offset(x.lineno, x.col_offset), offset(x.end_lineno, x.end_col_offset)
            sign = re.search(r"\s*(:|->)\s*$", source[max(0, start - 99) : start])
            if sign:  # not in parentheses
                spans.append((start - len(sign[0]), end))

    def visit(node: Any, in_function: bool) -> None:
        """Add the spans of a node and of what it contains."""
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.AnnAssign) and in_function and node.value:
            add(node.annotation)
        if is_function and not node.decorator_list:
            add(node.returns)
            for child in ast.walk(node.args):
                add(getattr(child, "annotation", None))
        in_function = is_function or (in_function and not isinstance(node, ast.ClassDef))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(tree, False)
    return spans


def shorten_locals(source: str) -> str:
    """The source with short names for the local variables and arguments of its functions.

    Arguments keep their names if a call passes one of that name by keyword, if only a keyword can
    pass them, or if the function has a decorator or takes any keyword. So do variables that an
    f-string mentions, because the positions of its names are not exact before Python 3.12, and
    those that share a name with anything else in the function or with a name outside of functions.
    """
    tree, outside, renamed = ast.parse(source), list[ast.AST](), list[tuple[Any, str]]()
    functions: list[Any] = list(outermost_functions(tree, outside))
    keywords = {str(x.arg) for x in ast.walk(tree) if isinstance(x, ast.keyword)} | {"self", "cls"}
    reserved = {node.id for node in outside if isinstance(node, ast.Name)}
    reserved |= bound_names(outside) | {*dir(builtins)}
    for function in functions:
        nodes = list(ast.walk(function))
        arguments = [node for node in nodes if isinstance(node, ast.arg)]
        is_fixed = function.decorator_list or any(getattr(x, "kwarg", None) for x in nodes)
        free = {x.arg for x in arguments if not is_fixed} - keywords
        free -= {x.arg for node in nodes for x in getattr(node, "kwonlyargs", ())}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        local = {x.id for x in names if isinstance(x.ctx, ast.Store)} | free
        bound = bound_names(x for x in nodes if not isinstance(x, ast.arg))
        bound |= {x.arg for x in arguments} - free
        local -= mentioned_names(nodes, ast.JoinedStr | ast.ClassDef) | bound | reserved
        taken = bound | {node.id for node in names} - local
        if taken.isdisjoint(("locals", "vars", "eval", "exec")):
            short = (f"{x}{n}" for n in ("", *range(99)) for x in string.ascii_letters)
            unused = (x for x in short if x not in taken | keywords | reserved)
            is_local = [x for x in [*names, *arguments] if name_of(x) in local]
            renamed += give_names(is_local, unused)
    return replace_names(source, renamed)


def shorten_globals(source: str) -> str:
    """The source with names of two letters for its functions, classes and global variables.

    Those keep their names that a string may mean, as in __all__, and those that share it with
    anything else.
    """
    tree = ast.parse(source)
    nodes, definitions = list(ast.walk(tree)), ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = {x for x in tree.body if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    texts = [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    taken = {word for text in texts for word in re.findall(r"\w+", text)}
    taken |= bound_names(x for x in nodes if x not in defined)
    taken |= mentioned_names(nodes, ast.JoinedStr) | {*keyword.kwlist}
    assigned: tuple[set[str], set[str]] = {x.name for x in defined}, set()
    for statement in tree.body:
        names = [x for x in ast.walk(statement) if isinstance(x, ast.Name)]
        stored = {x.id for x in names if isinstance(x.ctx, ast.Store)}
        assigned[isinstance(statement, definitions)].update(stored)
    free = {x for x in assigned[0] - assigned[1] - taken if len(x) > 2 and x[:2] != "__"}
    named = [*defined, *(x for x in nodes if isinstance(x, ast.Name))]
    taken |= {name_of(x) for x in named} - free
    pairs = map("".join, itertools.product(string.ascii_letters, repeat=2))
    is_free = [x for x in named if name_of(x) in free]
    return replace_names(source, give_names(is_free, (x for x in pairs if x not in taken)))


SHAPED_NAME = re.compile(r"[a-z]\w*_\d*[A-Z][A-Z0-9]*")
# Own names that a packed script keeps: records/*.py read them, or a library has them too.
READ_BY_TOOLS = {
    "all_reduce_sum", "eval_nll", "evaluation_s", "log_probs", "nll_T", "num_tokens",
    "score_seq_len", "total_bytes",
}  # fmt: skip
ALSO_IN_LIBRARIES = {"is_byte", "to_device"}


def own_attributes(nodes: Iterable[Any]) -> set[str]:
    """Names of the script's methods, and of attributes that only its own kinds of objects have.

    These are the fields of a NamedTuple and what methods of classes without a library's base store
    in `self`. Names of one word, with a leading underscore, or that an argument or a variable has
    as well are left out.
    """
    nodes, own, foreign, plain = list(nodes), set[str](), set[str](), {"NamedTuple"}
    fields = list[Any]()
    for node in [x for x in nodes if isinstance(x, ast.ClassDef)]:
        stores: list[Any] = [x for x in ast.walk(node) if is_stored_attribute(x)]
        methods = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
        if plain.issuperset(map(name_of, node.bases)) and not node.decorator_list:
            plain.add(node.name)
            fields += [x.target for x in node.body if isinstance(x, ast.AnnAssign)]
            methods |= {x.attr for x in stores if name_of(x.value) == "self"}
        else:
            foreign |= {x.attr for x in stores}
        own |= methods
    own |= set(map(name_of, fields))
    kinds = ast.Name | ast.arg | ast.keyword
    foreign |= {name_of(x) for x in nodes if isinstance(x, kinds) and x not in fields}
    foreign |= {x.attr for x in nodes if is_stored_attribute(x) and name_of(x.value) != "self"}
    return {name for name in own - foreign if re.fullmatch("[a-z][a-z0-9]*_[a-z0-9_]+", name)}


def is_stored_attribute(node: Any) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)


def shorten_own_names(source: str) -> str:
    """The source with names of two letters for own attributes and for those that end with a shape.

    Names that a string contains stay. Libraries have no such attributes or arguments, or they stay
    too.
    """
    nodes, kinds = list(ast.walk(ast.parse(source))), ast.Name | ast.arg | ast.keyword
    kinds = kinds | ast.Attribute | ast.FunctionDef
    texts = [x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)]
    in_f_strings = [x for node in nodes if isinstance(node, ast.JoinedStr) for x in ast.walk(node)]
    kept = READ_BY_TOOLS | ALSO_IN_LIBRARIES
    kept |= {word for text in texts for word in re.findall(r"\w+", text)}
    kept |= {name_of(x) for x in in_f_strings if isinstance(x, kinds)}
    kept |= bound_names(x for x in nodes if not isinstance(x, kinds))
    named = [x for x in nodes if isinstance(x, kinds) and name_of(x) not in kept]
    attributes = own_attributes(nodes)
    own = [x for x in named if name_of(x) in attributes or SHAPED_NAME.fullmatch(name_of(x))]
    words, pairs = {*re.findall(r"\w+", source)}, itertools.product(string.ascii_letters, repeat=2)
    names = (name for name in map("".join, pairs) if name not in words | {*keyword.kwlist})
    return replace_names(source, give_names(own, names))


def name_of(node: Any) -> str:
    """The name of a variable, an argument, an attribute, a function or a class."""
    fields = "id", "arg", "attr", "name"
    return str(next((getattr(node, x) for x in fields if hasattr(node, x)), ""))


def name_position(node: Any) -> tuple[int, int]:
    """Row and column where the name of a node starts; that of an attribute ends the node."""
    if isinstance(node, ast.Attribute):
        return node.end_lineno or 0, (node.end_col_offset or 0) - len(node.attr)
    before = {ast.FunctionDef: len("def "), ast.ClassDef: len("class ")}.get(type(node), 0)
    return node.lineno, node.col_offset + before


def mentioned_names(nodes: Iterable[ast.AST], kinds: Any) -> set[str]:
    """Names of variables in those of `nodes` that are of these kinds."""
    hidden = [node for node in nodes if isinstance(node, kinds)]
    return {x.id for node in hidden for x in ast.walk(node) if isinstance(x, ast.Name)}


def give_names(nodes: Iterable[Any], names: Iterator[str]) -> list[tuple[Any, str]]:
    """Nodes in the order of the source, each with a new name; equal old names, equal new names."""
    ordered, new = sorted(nodes, key=name_position), dict[str, str]()
    for node in ordered:
        if name_of(node) not in new:
            new[name_of(node)] = next(names)
    return [(node, new[name_of(node)]) for node in ordered]


def replace_names(source: str, renamed: Iterable[tuple[Any, str]]) -> str:
    """The source with the new names of `renamed`."""
    offset, output, end = character_offsets(source), list[str](), 0
    for node, name in renamed:
        start = offset(*name_position(node))
        output += [source[end:start], name]
        end = start + len(name_of(node))
    return "".join(output) + source[end:]


def outermost_functions(tree: ast.AST, outside: list[ast.AST]) -> Iterator[ast.AST]:
    """The functions that are in no other function; all other nodes go to `outside`."""
    for node in ast.iter_child_nodes(tree):
        outside.append(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        else:
            yield from outermost_functions(node, outside)


def bound_names(nodes: Iterable[ast.AST]) -> set[str]:
    """What `nodes` call arguments, functions, classes, modules, caught errors and the like."""
    named = [x for x in nodes if not NAMING_FIELDS.isdisjoint(x._fields)]
    named = [x for x in named if not isinstance(x, ast.keyword)]
    values = [getattr(node, field, None) for node in named for field in NAMING_FIELDS]
    texts = itertools.chain(*(value if isinstance(value, list) else [value] for value in values))
    return {text.split(".")[0] for text in texts if isinstance(text, str)}


# Fields of syntax nodes that hold names.
NAMING_FIELDS = {"name", "names", "asname", "arg", "rest"}
# end of packing


def check_sizes(run: Run, artifact: Path) -> dict[str, Any]:
    """Bytes on disk of the packed script and of the artifact; RunFailed if over the budget."""
    files = {"artifact_bytes": artifact, "code_bytes": run.directory / "train_gpt.py"}
    sizes = run.run_on_rank0(lambda: {k: p.stat().st_size for k, p in files.items()})
    total, budget = sum(sizes.values()), run.cfg.artifact_budget_bytes
    sizes |= {"total_bytes": total, "budget_bytes": budget}
    run.log("size", **sizes)
    if total > budget:
        remedy = "raise it, or score another artifact"
        if run.cfg.trains:
            remedy = f"remove {artifact} and start again with lower *_BITS, or change the shape"
        text = f"code and artifact take {total} bytes of ARTIFACT_BUDGET_BYTES={budget}"
        raise RunFailed(f"{text}; {remedy}")
    return sizes


# --- 9. Evaluation plans -------------------------------------------------------------------------
# A pass over the validation text is a list of steps for each rank, computed from integers alone
# before the pass starts: what to score and to train on, in which order. Every target is scored
# once, before anything is trained on it. All ranks have the same number of steps, and the steps
# with collectives (EvalStep.is_collective: training of the weights, n-gram counts) have the same
# index on every rank; no other step has any. So no rank waits in vain for the others.

Span = tuple[int, int]  # targets: the first, and one past the last


# Learning rates of LoRA to choose from. The first one is used where there is no choice, or no time.
LORA_LRS = (1e-3, 3e-3, 1e-2, 3e-4, 1e-4, 3e-5, 1e-5, 0.0)
# The documents that begin before this target try all of them.
PILOT_TARGETS = 16_384
# Weights of learning rates in a document: see mix_lrs.
LR_EVIDENCE, LR_SHARE = 0.1, 0.2
MAX_NATS = 99.0  # of a target in a mixture


class Window(NamedTuple):
    """Inputs `start` to `end` of the text; the targets from `first` on are scored or trained on."""

    start: int
    end: int
    first: int


class EvalStep(NamedTuple):
    """One step of a pass on one rank; every rank has the same number of steps, some empty."""

    # score: score the windows. adapt: score them, then train each row's adapter on them.
    # train: train the weights on them. update_ngrams: count the n-grams of `text`.
    # mix: mix n-grams into the scores of the targets `text`, then learn the mixture's weights.
    # choose_lrs: choose the learning rates of LoRA by the scores of `text`.
    action: str
    windows: Sequence[Window] = ()
    resets: bool = False  # start with new adapters, or with a new optimizer of the weights
    num_learning_rows: int = 0  # adapt: the first rows are trained, as their documents continue
    # adapt: each document has as many adapters, of different learning rates; choose_lrs: so many
    num_lrs: int = 1
    width: int = 0  # adapt: minimum padded length, so that the KV cache hides document ends
    # train: 0 at the first chunk, 1 at the last one of the plan, which `plan_chunks` only scores
    progress: float = 0.0
    chunk_frac: float = 0.0  # train: index of the chunk / number of chunks
    text: Span = (0, 0)  # train, update_ngrams, mix: what all ranks together learn from

    @property
    def is_collective(self) -> bool:
        """Whether all ranks run the step together or not at all: it has collectives."""
        return self.text[1] > 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions of the padded batch."""
        length = max([self.width, *(w.end - w.start for w in self.windows)])
        return self.num_lrs * len(self.windows), length

    def without_training(self) -> EvalStep:
        """The step that scores the same targets and trains nothing."""
        if self.action == "train":
            return EvalStep("score")
        return self._replace(num_learning_rows=0)


def plan_windows(num_targets: int, seq_len: int, stride: int) -> list[Window]:
    """Sliding windows that score each target exactly once, including the tail.

    With stride S, context T and N targets, windows start at 0, S, 2S, ... as long as
    start + T - S < N. The first one scores all of its targets, each later one its last S. With
    S = T the windows are disjoint.
    """
    context = seq_len - stride
    return [
        Window(w, min(w + seq_len, num_targets), w + context if w else 0)
        for w in range(0, max(1, num_targets - context), stride)
    ]


def rank_slice(items: Sequence[Any], rank: int, world_size: int) -> Sequence[Any]:
    """The contiguous slice of `items` for `rank`; the lengths of slices differ by at most one."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


class EvalPlanner:
    """Plans the steps of one rank for each kind of pass; pure functions of integers."""

    def __init__(self, cfg: Config, rank: int, world_size: int):
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        self.seq_len, self.stride = cfg.score_seq_len, cfg.eval_stride or cfg.score_seq_len

    def split_over_ranks(self, step: EvalStep, windows: Sequence[Window]) -> list[EvalStep]:
        """Copies of `step` over this rank's windows; every rank gets the same number of steps."""
        # Without gradients, a token takes a twentieth of the memory that it takes in training.
        limit = 4 * self.cfg.micro_batch_tokens
        tokens = min(self.cfg.val_batch_size // self.world_size, limit)
        rows = max(1, tokens // self.seq_len)
        if step.action == "train":
            rows = self.cfg.ttt_batch_seqs
        local_windows = rank_slice(windows, self.rank, self.world_size)
        max_windows = -(-len(windows) // self.world_size)
        return [
            step._replace(windows=local_windows[i : i + rows]) for i in range(0, max_windows, rows)
        ]

    def plan_scoring(self, num_targets: int, stride: int) -> list[EvalStep]:
        """A pass without adaptation, by windows of `stride`."""
        windows = plan_windows(num_targets, self.seq_len, stride)
        return self.split_over_ranks(EvalStep("score"), windows)

    def plan_training(
        self, span: Span, chunk: int, num_chunks: int, resets: bool
    ) -> list[EvalStep]:
        """One epoch over the targets of `span`, chunk `chunk` of `num_chunks`, in full rows."""
        (first, stop), last = span, max(1, num_chunks - 1)
        rows = [Window(s, min(s + self.seq_len, stop), s) for s in range(first, stop, self.seq_len)]
        step = EvalStep("train", progress=chunk / last, chunk_frac=chunk / num_chunks, text=span)
        steps = self.split_over_ranks(step, rows)
        return [steps[0]._replace(resets=resets), *steps[1:]]

    def plan_global_phase(self, stop: int) -> list[EvalStep]:
        """A global phase: TTT_EPOCHS of weight training on all text before `stop`, by chunks."""
        chunks = [*range(0, stop, self.cfg.ttt_chunk_tokens), stop]
        spans = [*itertools.pairwise(chunks)] * self.cfg.ttt_epochs
        return [
            step
            for i, span in enumerate(spans)
            for step in self.plan_training(span, i, len(spans), resets=i == 0)
        ]

    def plan_chunks(self, num_targets: int) -> list[EvalStep]:
        """Score each chunk with sliding windows, then train the weights on it, but for the last.

        Score-first training by chunks is from openai/parameter-golf#461 and #1413.
        """
        cfg, chunk_tokens, steps = self.cfg, self.cfg.ttt_chunk_tokens, list[EvalStep]()
        last_chunk = (num_targets - 1) // chunk_tokens
        num_epochs = cfg.ttt_epochs if cfg.ttt_method == "chunk" else 0
        windows = plan_windows(num_targets, self.seq_len, self.stride)
        # A window belongs to the chunk of its first scored target. TTT_CHUNK_TOKENS is a multiple
        # of the context, so that no window of a later chunk scores targets of this one.
        for chunk, chunk_windows in itertools.groupby(windows, lambda w: w.first // chunk_tokens):
            steps += self.split_over_ranks(EvalStep("score"), [*chunk_windows])
            span = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
            if chunk == last_chunk:
                break
            for epoch in range(num_epochs):
                steps += self.plan_training(span, chunk, last_chunk + 1, resets=chunk == epoch == 0)
            if cfg.needs_mixer:
                steps.append(EvalStep("update_ngrams", text=span))
        return steps

    def plan_documents(self, bounds: Sequence[int]) -> list[EvalStep]:
        """Score each document in chunks and train its adapter on each chunk but the last.

        After the numbers of documents in TTT_PHASES, all weights are trained on all text scored so
        far. Per-document LoRA is from openai/parameter-golf#77 and #1530, phases from #1610.

        Compliance: a group is all documents up to the next point at which something is learned that
        other documents see (n-grams, weights); all ranks finish it before. Where n-grams are mixed
        in afterwards, that is done in the order of the text, with the n-grams of the text before.
        The learning rate is chosen by the first documents of the text, for those after them.
        """
        mixes_at_once = self.cfg.needs_mixer and not self.cfg.mixes_afterwards
        documents, steps = [*itertools.pairwise(bounds)], list[EvalStep]()
        phase_ends = {n for n in parse_int_list(self.cfg.ttt_phases) if n < len(documents)}
        group_ends = {0, *phase_ends, len(documents)}
        if mixes_at_once:  # n-grams are counted whenever a chunk of text is complete
            size, ends = self.cfg.ttt_chunk_tokens, enumerate(documents, start=1)
            group_ends |= {n for n, (first, stop) in ends if stop // size > first // size}
        num_pilots = 0
        if self.cfg.chooses_lrs:
            num_pilots = bisect.bisect_left(bounds[:-1], PILOT_TARGETS)
            group_ends.add(num_pilots)
        for first, last in itertools.pairwise(sorted(group_ends)):
            lrs = len(LORA_LRS) if last <= num_pilots else self.cfg.num_lrs
            by_rank = self.batches_by_rank(documents[first:last], lrs)
            rank_steps = [
                step._replace(num_lrs=lrs)
                for batch in by_rank[self.rank]
                for step in self.plan_document_batch(batch)
            ]
            # A batch has as many steps as its longest document, the first one, has chunks.
            max_steps = max(
                sum(len(self.chunk_bounds(*batch[0])) for batch in batches) for batches in by_rank
            )
            steps += rank_steps + [EvalStep("score")] * (max_steps - len(rank_steps))
            if last == num_pilots:
                text = 0, bounds[last]
                steps.append(EvalStep("choose_lrs", text=text, num_lrs=self.cfg.num_lrs))
            if mixes_at_once and last < len(documents):
                steps.append(EvalStep("update_ngrams", text=(bounds[first], bounds[last])))
            if last in phase_ends:
                steps += self.plan_global_phase(bounds[last])
        if self.cfg.mixes_afterwards:
            chunks = [*range(0, bounds[-1], self.cfg.ttt_chunk_tokens), bounds[-1]]
            steps += [EvalStep("mix", text=span) for span in itertools.pairwise(chunks)]
        return steps

    def chunk_bounds(self, first: int, stop: int) -> list[Span]:
        """The chunks of a document, of TTT_CHUNK_SIZE targets each but the last."""
        return [*itertools.pairwise([*range(first, stop, self.cfg.ttt_chunk_size), stop])]

    def batches_by_rank(
        self, documents: Sequence[Span], num_lrs: int = 1
    ) -> list[list[Sequence[Span]]]:
        """Batches of documents for each rank, the longest document of a batch first.

        Documents are independent, so that their order is free: similar lengths go together. With
        TTT_WARM_START_A a batch's adapters depend on the batch before; for compliance, batches then
        keep the order of the text, and their size does not depend on later documents.
        """
        rows, order = max(1, self.cfg.ttt_batch_size // num_lrs), documents
        if not self.cfg.ttt_warm_start_a:
            rows = min(rows, -(-len(documents) // self.world_size))
            order = longest_first(documents)
        by_rank: list[list[Sequence[Span]]] = [[] for _ in range(self.world_size)]
        load = [0] * self.world_size
        for start in range(0, len(order), rows):
            batch = longest_first(order[start : start + rows])
            rank = load.index(min(load))
            by_rank[rank].append(batch)
            # The longest document decides the number of steps, so its tokens count 16 times more.
            load[rank] += 16 * (batch[0][1] - batch[0][0]) + sum(b - a for a, b in batch)
        return by_rank

    def plan_document_batch(self, documents: Sequence[Span]) -> list[EvalStep]:
        """Steps over the chunks of some documents side by side, the longest document first.

        TTT_CONTEXT decides what a chunk reads: `window`, up to EVAL_SEQ_LEN tokens of its document;
        `text`, the same, also from earlier documents; `incremental`, itself and the KV cache.

        Compliance: a window starts where it would if its chunk were full, so that its context does
        not depend on where the document ends.
        """
        is_incremental = self.cfg.ttt_context == "incremental"

        def window(document: Span, first: int, stop: int) -> Window:
            earliest = {"window": document[0], "text": 0, "incremental": first}
            full_stop = first + self.cfg.ttt_chunk_size
            start = max(earliest[self.cfg.ttt_context], full_stop - self.seq_len)
            return Window(start, stop, first)

        rows = [
            [window(document, *chunk) for chunk in self.chunk_bounds(*document)]
            for document in documents
        ]
        return [
            EvalStep(
                "adapt",
                [row[index] for row in rows if index < len(row)],
                resets=index == 0,
                num_learning_rows=sum(index + 1 < len(row) for row in rows),
                width=self.cfg.ttt_chunk_size if is_incremental else 0,
            )
            for index in range(len(rows[0]))
        ]


def longest_first(spans: Sequence[Span]) -> list[Span]:
    """The spans by falling length; equal ones keep their order."""
    return sorted(spans, key=lambda span: span[0] - span[1])


def document_bounds(ids: np.ndarray) -> list[int]:
    """The first target of each document, and the end of the text.

    A document's last target is the BOS of the next one.
    """
    return [0, *(1 + np.flatnonzero(ids[1:-1] == BOS_ID)).tolist(), len(ids) - 1]


def plan_adaptive(planner: EvalPlanner, ids: np.ndarray) -> list[EvalStep]:
    """The steps of the adaptive pass of TTT_METHOD."""
    num_targets = len(ids) - 1
    if planner.cfg.ttt_method == "lora":
        return planner.plan_documents(document_bounds(ids))
    if planner.cfg.ttt_method == "pretrain":
        return planner.plan_global_phase(num_targets) + planner.plan_scoring(
            num_targets, planner.stride
        )
    return planner.plan_chunks(num_targets)


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
        """Loss in nats per token, bits per byte, and the amounts they were measured on."""
        return {
            "val_loss": round(self.nats / self.tokens, 8),
            "val_bpb": round(self.nats / math.log(2) / max(1, self.num_bytes), 8),
            "eval_s": round(self.eval_s, 3),
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "partial": self.partial,
        }


class StateUpdate(NamedTuple):
    """An update of adapters, weights or n-gram counts, for the trace of a pass."""

    step_index: int
    reads: Span  # targets that it learned from
    affects: Span  # targets whose scores it changes if they are scored later
    shared: bool  # it changes scores on all ranks, or only on its own


def rule_violations(
    updates: Sequence[StateUpdate], scored_at: np.ndarray, own_at: np.ndarray
) -> list[str]:
    """Messages about violations of score-first in the trace of a pass; empty if compliant.

    An update must only read targets that were scored at its step or before, and the targets that an
    update affects must be scored from left to right. `scored_at` has the step at which any rank
    scored each target, `own_at` the same for this rank, 0 where it did not.
    """
    problems, update_steps = [], dict[tuple[Span, bool], list[int]]()
    for step_index, (first, stop), affects, shared in updates:
        last_scored = int(scored_at[first:stop].max(initial=0))
        if last_scored > step_index:
            problems.append(
                f"the update at step {step_index} read targets {first} to {stop}, which "
                f"were scored at step {last_scored}"
            )
        if not affects[0] <= first <= stop <= affects[1]:
            problems.append(f"targets {affects} learned from targets {first} to {stop} outside")
        update_steps.setdefault((affects, shared), []).append(step_index)
    for ((first, stop), shared), steps in update_steps.items():
        scored_T = (scored_at if shared else own_at)[first:stop]
        num_updates_before_T = np.searchsorted(steps, scored_T[scored_T > 0])
        if (np.diff(num_updates_before_T) < 0).any():
            problems.append(f"targets {first} to {stop} were not scored from left to right")
    return problems


class Scorer:
    """Sums nats and bytes in float64; each target must be recorded once over all ranks."""

    def __init__(self, run: Run, validation: Validation):
        self.run, self.validation, self.step_index = run, validation, 1
        self.scored_at = np.zeros(validation.num_targets, dtype=np.int32)  # step; 0 = not yet
        self.nll_T = np.zeros(validation.num_targets, dtype=np.float32)
        self.mixed_at = np.zeros_like(self.scored_at)  # if n-grams are mixed in afterwards
        self.nats, self.num_bytes, self.updates = 0.0, 0, list[StateUpdate]()
        self.ngram_updates = list[StateUpdate]()

    def record(self, first: int, nll: np.ndarray) -> None:
        """Add the nats of targets first, first + 1, ..., none of which was recorded before."""
        span = slice(first, first + len(nll))
        assert first >= 0 and span.stop <= len(self.scored_at), f"no targets {span}"
        assert not self.scored_at[span].any(), f"a target in {span} was scored before"
        self.scored_at[span], self.nll_T[span] = self.step_index, nll
        self.nats += float(nll.sum(dtype=np.float64))
        self.num_bytes += int(self.validation.target_bytes[span].sum())

    def replace(self, text: Span, mix: Callable[[np.ndarray], np.ndarray]) -> None:
        """Let `mix` replace the nats of the targets of `text` that this rank has scored."""
        span = slice(*text)
        assert not self.mixed_at[span].any(), f"a target in {text} was mixed before"
        self.mixed_at[span] = self.step_index
        own_N = text[0] + np.flatnonzero(self.scored_at[span])
        nll_N = mix(self.nll_T[own_N])
        self.nats += float((nll_N.astype(np.float64) - self.nll_T[own_N]).sum())
        self.nll_T[own_N] = nll_N
        update = StateUpdate(self.step_index, text, (0, len(self.scored_at)), True)
        self.ngram_updates.append(update)

    def finish(self, eval_s: float) -> Score:
        """The sums over all ranks; AssertionError if a target was missed or scored twice."""
        device, run = self.run.device, self.run
        sums = torch.tensor([self.nats, self.num_bytes], dtype=torch.float64, device=device)
        nats, num_bytes = run.all_reduce_sum(sums).tolist()
        num_tokens, num_wrong = len(self.scored_at), 0
        scored_at = np.empty_like(self.scored_at)
        for start in range(0, num_tokens, REDUCED_TARGETS):  # in pieces: the text may be long
            piece = self.scored_at[start : start + REDUCED_TARGETS]
            both = torch.from_numpy(np.stack([piece, piece > 0])).to(device)
            scored_at[start : start + len(piece)], times = run.all_reduce_sum(both).cpu().numpy()
            num_wrong += int((times != 1).sum())
        assert num_wrong == 0, f"{num_wrong} targets not scored once"
        problems = rule_violations(self.updates, scored_at, self.scored_at)
        if self.ngram_updates:
            assert (self.mixed_at > scored_at).all(), "mixed before it was scored"
            problems += rule_violations(self.ngram_updates, self.mixed_at, self.mixed_at)
        if max_over_ranks(run, bool(problems)) and not problems:
            problems = ["a rule was broken on another rank"]
        partial = self.validation.partial
        return Score(nats, num_tokens, int(num_bytes), partial, eval_s, tuple(problems), self.nll_T)


REDUCED_TARGETS = 2**22  # whose steps are summed over the ranks at once


class PassAbandoned(RuntimeError):
    """A pass was skipped, stopped, complete too late, or not finite; the message says why."""


def max_over_ranks(run: Run, value: float) -> float:
    """The largest value of any rank."""
    return float(run.all_reduce_max(torch.tensor(float(value), device=run.device)))


# Seconds are estimated from a measurement before the pass. Until the pass itself has shown its
# pace, the measurement counts like this part of the pass.
PRIOR_FRAC = 0.1
# The pace of the last steps is an exponential average with this decay per step.
PACE_DECAY = 0.8
# Remaining scoring is assumed to take this much longer than estimated.
SAFETY_FACTOR = 1.1
# Part of the limit that training leaves to scoring, because the last steps, of few rows, may be
# slower than estimated: a pass that is not complete is worth nothing.
SCORING_RESERVE = 0.05
# A training step costs as much as three forward passes: its backward pass costs two.
TRAIN_COST = 3.0


class StepCost(NamedTuple):
    """Seconds of parts of an evaluation step; the default counts steps alike."""

    step_s: float = 1.0  # of a step that scores
    position_s: float = 0.0  # of each position in it
    mix_s: float = 1.0  # of a step that mixes n-grams in
    positions: float = 0.0  # in each step that scores, if all are padded to one shape


class EvalBudget:
    """Decides before each step of a pass what the time left is enough for.

    Training is dropped if the rest could not be scored after it. The pass is abandoned if the rest
    cannot be scored even without training, first on the rank that finds it; the others learn of it
    at the next collective step, or in check_complete.

    `cost` is what was measured before the pass. Without it, steps count alike, and the pass is
    measured by its own steps from the second one on: the first one compiles the model.
    """

    def __init__(
        self,
        run: Run,
        plan: Sequence[EvalStep],
        limit_s: float,
        cost: StepCost | None = None,
    ):
        self.run, self.limit_s, self.started_s = run, limit_s, time.perf_counter()
        self.is_measured, self.cost = cost is not None, cost or StepCost()
        scoring_s = [self.seconds(step) * (step.action != "train") for step in plan]
        # Estimated seconds to score everything from each step on, and to train all steps.
        self.to_score = [*np.cumsum(scoring_s[::-1])[::-1].tolist(), 0.0]
        self.to_train = sum(map(self.training_seconds, plan))
        self.estimated_s = self.to_score[0] + self.to_train if self.is_measured else 0.0
        # Actual and estimated seconds so far: of the whole pass, and of the last steps.
        prior_s = PRIOR_FRAC * self.to_score[0] if self.is_measured else 0.0
        self.spent, self.recent = np.full(2, prior_s), np.full(2, prior_s)
        self.checked_s, self.step_work = self.started_s, 0.0
        self.num_dropped, self.needed_s = 0, 0.0

    def seconds(self, step: EvalStep) -> float:
        """Estimated seconds of the step without training."""
        step_s, position_s, mix_s, _ = self.cost
        if step.action == "mix":
            return mix_s
        return step_s * (len(step.windows) > 0) + position_s * math.prod(step.shape)

    def training_seconds(self, step: EvalStep) -> float:
        """Estimated seconds that training adds to the step."""
        if step.action == "train":  # a small one is bound by launches
            size = self.cost.positions or max(1, math.prod(step.shape))
            return max(1.0, TRAIN_COST * math.prod(step.shape) / size) * self.seconds(step)
        learning_frac = step.num_learning_rows / max(1, len(step.windows))
        num_steps = self.run.cfg.ttt_grad_steps  # the first one reuses the scoring forward pass
        return learning_frac * (TRAIN_COST * num_steps - 1) * self.seconds(step)

    def measure_pace(self, step_index: int) -> tuple[float, float]:
        """Actual seconds per estimated second, a low and a high value; 0 before the first ones."""
        now_s = time.perf_counter()
        last_step = np.array([now_s - self.checked_s, self.step_work])
        self.checked_s = now_s
        if self.is_measured or step_index > 2:
            self.spent = self.spent + last_step
            if self.step_work:
                self.recent = PACE_DECAY * self.recent + last_step
        paces = [actual / work if work else 0.0 for actual, work in (self.spent, self.recent)]
        return min(paces), max(paces)

    def fit_step(self, step: EvalStep, step_index: int) -> EvalStep | None:
        """The step, without its training if that does not fit; None if the pass is abandoned."""
        if self.limit_s == math.inf:
            return step
        low, high = self.measure_pace(step_index)
        elapsed_s = self.checked_s - self.started_s
        left_s, rest_s = self.limit_s - elapsed_s, self.to_score[step_index - 1]
        scoring_s, training_s = rest_s - self.to_score[step_index], self.training_seconds(step)
        if not self.estimated_s and high:
            self.estimated_s = elapsed_s + high * rest_s
        # A pass may be slow for a while: it is hopeless if it does not fit at the lower pace.
        if high and (low * rest_s > SAFETY_FACTOR * left_s or high * scoring_s > left_s):
            self.needed_s = max(self.needed_s, elapsed_s + high * rest_s)
        if step.is_collective:
            self.needed_s = max_over_ranks(self.run, self.needed_s)
            self.checked_s = time.perf_counter()  # waiting for another rank is not this one's pace
        if self.needed_s:
            self.step_work = 0.0
            return None
        left_s = self.limit_s - (self.checked_s - self.started_s)
        spare_s = left_s - SCORING_RESERVE * self.limit_s
        drop = training_s > 0 and SAFETY_FACTOR * high * (rest_s + training_s) > spare_s
        if step.action == "train":
            drop = max_over_ranks(self.run, drop) > 0
        self.step_work = scoring_s + (0.0 if drop else training_s)
        self.num_dropped += drop
        return step.without_training() if drop else step

    def check_complete(self) -> None:
        """Raise PassAbandoned on all ranks if one of them has abandoned the pass."""
        needed_s = max_over_ranks(self.run, self.needed_s)
        if needed_s:
            text = f"needs {needed_s:.1f} s, {self.limit_s:.1f} s left"
            raise PassAbandoned(f"abandoned after {self.checked_s - self.started_s:.1f} s: {text}")


class Batch(NamedTuple):
    """Windows as tensors, padded with zeros on the right, where no real position attends."""

    ids_BT: Tensor
    target_BT: Tensor
    first_column: int  # the first scored position of any row
    mixer_inputs: MixerInputs | None
    weight_BT: Tensor  # of scored targets in training, 0 elsewhere

    def repeated(self, times: int) -> Batch:
        """The batch with each row so many times, one after the other; without a mixer."""
        ids_BT, target_BT, weight_BT = (
            x.repeat_interleave(times, 0) for x in (self.ids_BT, self.target_BT, self.weight_BT)
        )
        return Batch(ids_BT, target_BT, self.first_column, None, weight_BT)


def mix_lrs(log_weight_BG: Tensor, nll_BGT: Tensor, is_scored_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Nats (B, T) of mixtures of G predictions of a chunk, and log-weights for the next chunk.

    A document's weights begin equal and are multiplied by the chunk's probabilities to the power
    LR_EVIDENCE; then all share a part LR_SHARE equally ("fixed share", Herbster and Warmuth 1998).
    """
    nll_BGT = nll_BGT.nan_to_num(MAX_NATS).clamp(max=MAX_NATS)  # of a rate that diverges
    log_weight_BG = log_weight_BG.log_softmax(1)
    mixed_BT = -(log_weight_BG[..., None] - nll_BGT).logsumexp(1)
    nats_BG = (nll_BGT * is_scored_BT[:, None]).sum(2)
    weight_BG = (log_weight_BG - LR_EVIDENCE * nats_BG).softmax(1)
    return mixed_BT, ((1 - LR_SHARE) * weight_BG + LR_SHARE / weight_BG.size(1)).log()


class EvalRunner:
    """Runs the steps of a plan, with the model, adapters or optimizer, mixer, and the trace."""

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
        self.mixer: Mixer | None = None
        if adaptive and run.cfg.needs_mixer and not run.cfg.mixes_afterwards:
            self.mixer = Mixer(run)
        self.text_mixer: TextMixer | None = None
        model.banned = None
        if validation.banned_VV is not None:
            banned_VV = torch.from_numpy(validation.banned_VV).to(run.device)
            model.banned = banned_VV, math.log(run.cfg.noncanonical_factor)
        self.bounds = document_bounds(validation.ids)
        self.document_T = run.cfg.vocab_size + np.cumsum(validation.ids == BOS_ID)
        self.all_targets = (0, validation.num_targets)
        self.rows = max((len(step.windows) for step in plan if step.action == "score"), default=0)
        self.weights: WeightTrainer | None = None
        self.adapters: AdapterTrainer | None = None
        self.extents: list[Span] = []  # of the documents that the adapters belong to
        # The first documents try all learning rates, if they choose those of the others.
        chooses = any(step.action == "choose_lrs" for step in plan)
        self.lrs: Sequence[float] = LORA_LRS if chooses else run.cfg.lora_lrs
        self.log_weight_BG = torch.zeros(0)  # of the rates of each document
        # First targets of chunks by document, with the nats (G, T) by learning rate.
        self.pilot_nll: dict[int, list[tuple[int, Tensor]]] | None = {} if chooses else None

    def run_steps(self, budget: EvalBudget | None = None) -> Score:
        """Run all steps in order; `budget` may drop the training of some of them.

        Raises PassAbandoned if the budget ends before everything is scored.
        """
        started_s = time.perf_counter()
        actions: dict[str, Callable[[EvalStep], None]] = {
            "score": self.score,
            "adapt": self.adapt,
            "train": self.train,
            "update_ngrams": self.update_ngrams,
            "mix": self.mix,
            "choose_lrs": self.choose_lrs,
        }
        for step_index, planned in enumerate(self.plan, start=1):
            self.run.check_signal()
            self.scorer.step_index = step_index
            shown = {"step": step_index, "elapsed_s": round(time.perf_counter() - started_s)}
            self.run.show(format_event("evaluate", steps=len(self.plan), **shown))
            step = budget.fit_step(planned, step_index) if budget else planned
            if step is None:
                continue
            if planned.action == "train" and planned.resets:
                self.weights = None  # on every rank, also if this step is dropped
            actions[step.action](step)
            if step.is_collective and step.action != "mix":
                self.scorer.updates.append(
                    StateUpdate(step_index, step.text, self.all_targets, True)
                )
        self.run.synchronize()
        if budget:
            budget.check_complete()
        return self.scorer.finish(time.perf_counter() - started_s)

    def batch(self, windows: Sequence[Window], rows: int, seq_len: int) -> Batch:
        """The windows as tensors of `rows` x `seq_len`."""
        device, (ids, target_bytes, *_), mixer_inputs = self.run.device, self.validation, None
        padded = [*windows, *[Window(0, -1, seq_len)] * (rows - len(windows))]
        start_B1, end_B1, first_B1 = np.array(padded).T[..., None]
        position_BT = start_B1 + np.arange(seq_len + 1)
        ids_BT = np.where(position_BT <= end_B1, ids.take(position_BT, mode="clip"), 0)
        keep_BT = ((position_BT >= first_B1) & (position_BT < end_B1))[:, :-1]
        weight_BT = keep_BT.astype(np.float32)
        if self.run.cfg.ttt_byte_weighted:
            weight_BT *= target_bytes.take(position_BT[:, :-1], mode="clip")
        if self.mixer is not None:  # the last tokens up to each input, zeros before the text
            past_BTK = position_BT[:, :-1, None] + np.arange(1 - self.mixer.num_context, 1)
            context_BTK = np.where(past_BTK < 0, 0, ids.take(past_BTK, mode="clip"))
            context_BTK = context_BTK.astype(np.int64)
            context_BTK[..., 0] = self.document_T.take(past_BTK[..., -1], mode="clip")
            mixer_inputs = MixerInputs(
                self.mixer,
                torch.from_numpy(context_BTK).to(device),
                torch.tensor(keep_BT, device=device),
            )
        text_BT = torch.tensor(ids_BT, dtype=torch.int64, device=device)
        return Batch(
            text_BT[:, :-1],
            text_BT[:, 1:],
            int((first_B1 - start_B1).min()),
            mixer_inputs,
            torch.tensor(weight_BT, device=device),
        )

    def record(self, windows: Sequence[Window], nll_BT: Tensor, first: int) -> None:
        """Record the nats of each row's scored targets; column 0 is position `first` of a row."""
        for window, nll_T in zip(windows, nll_BT.cpu().numpy(), strict=False):
            offset = window.start + first
            self.scorer.record(window.first, nll_T[window.first - offset : window.end - offset])

    def score(self, step: EvalStep) -> None:
        """Score windows, in batches of one shape, so that the model is compiled once."""
        if step.windows:
            batch = self.batch(step.windows, self.rows, self.seq_len)
            with self.weights.scoring() if self.weights else contextlib.nullcontext():
                self.record(step.windows, self.model.eval_nll(*batch[:4]), batch.first_column)

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
        updates, step_index = self.scorer.updates, self.scorer.step_index
        if self.adapters is None or step.resets:
            initial_a = self.adapters.initial_a if self.adapters else []
            if self.adapters and self.run.cfg.ttt_warm_start_a:
                initial_a = self.adapters.take_mean_a()
                reads = min(self.extents)[0], max(self.extents)[1]
                updates.append(StateUpdate(step_index - 1, reads, self.all_targets, False))
            self.extents = [
                (w.first, self.bounds[bisect.bisect_right(self.bounds, w.first)])
                for w in step.windows
            ]
            lrs = self.lrs[: step.num_lrs]
            self.adapters = AdapterTrainer(self.run, self.model, len(step.windows), initial_a, lrs)
            self.log_weight_BG = torch.zeros(len(step.windows), len(lrs), device=self.run.device)
            self.weights = None  # new adapters turn off the gradients of the weights
        batch, rows = self.batch(step.windows, len(step.windows), step.shape[1]), len(step.windows)
        nll_BT = self.adapters.step(batch, step.num_learning_rows)
        if step.num_lrs > 1:
            nll_BGT = nll_BT.view(rows, step.num_lrs, -1)
            nll_BT = self.mix_predictions(step.windows, nll_BGT, batch.first_column)
        self.record(step.windows, nll_BT, batch.first_column)
        updates += [
            StateUpdate(step_index, (window.first, window.end), extent, False)
            for window, extent in zip(
                step.windows[: rows if step.num_lrs > 1 else step.num_learning_rows],
                self.extents,
                strict=False,
            )
        ]

    def mix_predictions(self, windows: Sequence[Window], nll_BGT: Tensor, first: int) -> Tensor:
        """Nats (B, T) of mixtures of learning rates; column 0 is position `first` of a row.

        Those of all rates are kept while the first documents choose.
        """
        is_scored_BT = torch.zeros(nll_BGT[:, 0].shape, dtype=torch.bool)
        for window, is_scored_T in zip(windows, is_scored_BT, strict=True):
            offset = window.start + first
            is_scored_T[window.first - offset : window.end - offset] = True
        if self.pilot_nll is not None:
            chunks = zip(windows, nll_BGT.cpu(), is_scored_BT, strict=True)
            for window, nll_GT, is_scored_T in chunks:
                document = bisect.bisect_right(self.bounds, window.first)
                chunk = window.first, nll_GT[:, is_scored_T]
                self.pilot_nll.setdefault(document, []).append(chunk)
        mixed_BT, self.log_weight_BG = mix_lrs(
            self.log_weight_BG[: len(windows)], nll_BGT, is_scored_BT.to(self.run.device)
        )
        return mixed_BT

    def choose_lrs(self, step: EvalStep) -> None:
        """Choose the learning rates of LoRA with the fewest nats in the documents of `step.text`.

        The first one is best alone, each other one best in a mixture with those before it.
        """
        chosen, num_lrs = list[int](), len(LORA_LRS)
        for _ in range(step.num_lrs):
            nats_G = [
                math.inf if i in chosen else self.pilot_nats(step.text, [*chosen, i])
                for i in range(num_lrs)
            ]
            chosen.append(nats_G.index(min(nats_G)))
            if len(chosen) == 1:
                nats = ",".join(f"{nats / step.text[1]:.5f}" for nats in nats_G)
        self.lrs, self.pilot_nll = [LORA_LRS[i] for i in chosen], None
        self.text_mixer = None  # of the first documents alone
        tried, lrs = (",".join(f"{lr:g}" for lr in x) for x in (LORA_LRS, self.lrs))
        mixed_nats = round(nats_G[chosen[-1]] / step.text[1], 5)
        self.run.log(
            "ttt_lora_lrs", chosen=lrs, tried=tried, nats_per_token=nats, mixed=mixed_nats,
            targets=step.text[1],
        )  # fmt: skip

    def pilot_nats(self, text: Span, chosen: Sequence[int]) -> float:
        """Nats of the first documents with a mixture of these learning rates, and with n-grams."""
        nll_N = np.zeros(text[1], dtype=np.float32)
        is_own_N = np.zeros(text[1], dtype=bool)
        assert self.pilot_nll is not None, "the learning rates are known"
        for chunks in self.pilot_nll.values():
            log_weight_1G = torch.zeros(1, len(chosen))
            for first, nll_GT in chunks:
                span = slice(first, first + nll_GT.size(1))
                nll_1GT, is_scored_1T = nll_GT[None, chosen], torch.ones(1, nll_GT.size(1))
                nll_1T, log_weight_1G = mix_lrs(log_weight_1G, nll_1GT, is_scored_1T)
                nll_N[span], is_own_N[span] = nll_1T[0].numpy(), True
        own_N = np.flatnonzero(is_own_N)
        nats = float(nll_N.sum(dtype=np.float64))
        if self.run.cfg.mixes_afterwards:
            if self.text_mixer is None:
                self.text_mixer = TextMixer(self.run, self.validation.ids[: text[1] + 1], own_N)
            mixer, nats = self.text_mixer, 0.0
            mixer.reset()
            for start in range(0, text[1], self.run.cfg.ttt_chunk_tokens):
                rows = mixer.rows_of((start, start + self.run.cfg.ttt_chunk_tokens))
                part_N = torch.from_numpy(nll_N[own_N[rows]]).to(self.run.device)
                nats += float(mixer.nll(rows, part_N, start).sum(dtype=torch.float64))
                mixer.update_weights()
        total = torch.tensor(nats, dtype=torch.float64, device=self.run.device)
        return float(self.run.all_reduce_sum(total))

    def update_ngrams(self, step: EvalStep) -> None:
        """Let the mixer count the n-grams of scored text."""
        assert self.mixer is not None, "no mixer"
        first, stop = step.text  # the first token of the text is not a target
        ids = self.validation.ids[first + (first > 0) : stop + 1]
        self.mixer.update(torch.tensor(ids, dtype=torch.int64, device=self.run.device))

    def mix(self, step: EvalStep) -> None:
        """Mix n-grams of the text before into the scores of targets; then learn the weights."""
        if self.text_mixer is None:
            scored_N = np.flatnonzero(self.scorer.scored_at)
            self.text_mixer = TextMixer(self.run, self.validation.ids, scored_N)
        mixer, device = self.text_mixer, self.run.device
        rows = mixer.rows_of(step.text)

        def mixed(nll_N: np.ndarray) -> np.ndarray:
            mixed_N = mixer.nll(rows, torch.from_numpy(nll_N).to(device), step.text[0])
            if self.model.normalization_check is not None:
                self.model.normalization_check(*mixer.example(rows, nll_N, mixed_N))
            result: np.ndarray = mixed_N.cpu().numpy()
            return result

        self.scorer.replace(step.text, mixed)
        mixer.update_weights()


@contextlib.contextmanager
def uncompiled(model: GPT) -> Generator[None]:
    """Context without compilation, also of flex attention, which is compiled separately."""
    compiled = (model.run_block, model.blend_skip, model.nll, model.prepare_mask)
    model.run_block, model.blend_skip, model.nll = run_block, blend_skip, softcapped_cross_entropy
    if model.prepare_mask is flex_block_mask:
        model.prepare_mask = sdpa_mask
    try:
        yield
    finally:
        model.run_block, model.blend_skip, model.nll, model.prepare_mask = compiled


@contextlib.contextmanager
def restore_model_after(cfg: Config, model: GPT) -> Generator[None]:
    """Context in which a pass may change the model; afterwards it is restored to the bit.

    LoRA without global phases leaves the weights as they are: they are cast once and not at each
    use. Caps and gates are used in float32.
    """
    before = [(x, x.data) for x in (*model.parameters(), *model.buffers())]
    casts = cfg.ttt_method == "lora" and not cfg.ttt_phases
    for x, value in before:
        narrow = casts and x is not model.caps and x is not model.skip_gates
        x.data = value.to(model.dtype if narrow else x.dtype, copy=True)
    if cfg.ttt_method == "lora" and cfg.score_seq_len > cfg.train_seq_len:
        # Else the end of a document, which the length of its batch shows, would choose the angles.
        model.rotary.data = model.long_rotary.data
    hashes = model.hashes
    if cfg.eval_hash_rows:
        model.hashes = nn.ModuleList(
            [*hashes, EvalHashEmbedding(cfg).to(model.skip_weights.device)]
        )
    try:
        # The chunks of LoRA have too many different lengths for compilation.
        with uncompiled(model) if cfg.ttt_method == "lora" else contextlib.nullcontext():
            yield
    finally:
        model.set_adapters([])
        model.hashes = hashes
        model.requires_grad_(True).zero_grad()
        for x, value in before:
            x.data = value


def fill_cache(model: GPT, cache: KVCache, rows: int) -> None:
    """Fill a KV cache to its capacity with zeros."""
    cfg, T = model.cfg, cache.capacity
    device = model.skip_weights.device
    kv_BTKE = torch.zeros(rows, T, cfg.num_kv_heads, cfg.head_dim, dtype=model.dtype, device=device)
    for layer in cache.layers:
        layer.pair = kv_BTKE, kv_BTKE
    cache.ids_BT, cache.length = torch.zeros(rows, T, dtype=torch.int64, device=device), T


def measure_scoring(
    run: Run, model: GPT, shape: tuple[int, int], first: int, *, adaptive: bool
) -> float:
    """Seconds of scoring zeros of a shape from position `first` on, without compilation."""
    cfg, (rows, length), mixer_inputs = run.cfg, shape, None
    ids_BT = torch.zeros(rows, length, dtype=torch.int64, device=run.device)
    if adaptive and cfg.needs_mixer and not cfg.mixes_afterwards:
        mixer = Mixer(run)
        keep_BT = (torch.arange(length, device=run.device) >= first).expand(rows, -1)
        mixer_inputs = MixerInputs(
            mixer, ids_BT[..., None].expand(-1, -1, mixer.num_context), keep_BT
        )
    batch = Batch(ids_BT, ids_BT, first, mixer_inputs, ids_BT.float())
    step = functools.partial(model.eval_nll, *batch[:4])
    if adaptive and cfg.ttt_method == "lora":
        trainer = AdapterTrainer(run, model, rows)
        if trainer.past is not None:
            fill_cache(model, trainer.past, rows)
        step = functools.partial(trainer.step, batch, 0)
    _, elapsed_s = second_time(run, step, times=3)
    model.set_adapters([])
    return elapsed_s


def measure_mixing(run: Run, num_targets: int, chunk: int) -> float:
    """Seconds of a step that mixes n-grams into `chunk` of `num_targets` targets."""
    size = min(num_targets, MEASURED_TARGETS)
    ids = np.random.default_rng(0).integers(run.cfg.vocab_size, size=size + 1)
    mixer, count_s = second_time(run, lambda: TextMixer(run, ids, np.arange(size)))

    def mix() -> None:
        mixer.nll(slice(0, chunk), torch.ones(min(size, chunk), device=run.device), 0)
        mixer.update_weights()

    return count_s * chunk / size + second_time(run, mix)[1]


MEASURED_TARGETS = 2**18  # at most, in the measurement of n-gram mixing


def measure_step_cost(
    run: Run, model: GPT, plan: Sequence[EvalStep], *, adaptive: bool
) -> StepCost:
    """The costs of a step on the slowest rank.

    With LoRA, the longest steps are measured, with the fewest and with the most rows. Otherwise
    all steps are padded to one shape.
    """
    trained = [step.shape for step in plan if step.windows and step.action == "train"]
    if trained and model.run_block is not run_block:  # compile now, not during the pass
        WeightTrainer(run, model)  # turns off the gradients of frozen weights, as it will then
        num_rows, T = max(trained)
        num_rows //= num_micro_batches(num_rows, T, run.cfg.micro_batch_tokens)
        ids_BT = torch.zeros(num_rows, T, dtype=torch.int64, device=run.device)
        model.loss(ids_BT, ids_BT).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
    steps = [step for step in plan if step.windows and step.action != "train"]
    length, step_s = max((step.shape[1] for step in steps), default=0), 0.0
    position_s = positions = 0.0
    if steps:
        longest = [step for step in steps if step.shape[1] == length]
        rows = sorted(step.shape[0] for step in longest)
        first = min(w.first - w.start for w in longest[-1].windows)
        few, many = rows[0], rows[-1]
        if not (adaptive and run.cfg.ttt_method == "lora"):
            few, length = many, run.cfg.score_seq_len
            positions = many * length
        step_s = measure_scoring(run, model, (few, length), first, adaptive=adaptive)
        if many > few:
            many_s = measure_scoring(run, model, (many, length), first, adaptive=adaptive)
            position_s = max(0.0, many_s - step_s) / ((many - few) * length)
            step_s = max(0.0, step_s - few * length * position_s)
    texts, mix_s = [step.text for step in plan if step.action == "mix"], 0.0
    if texts:
        mix_s = measure_mixing(run, texts[-1][1], texts[0][1])
    costs = [step_s, position_s, mix_s, positions]
    cost = torch.tensor(costs, dtype=torch.float64, device=run.device)
    return StepCost(*run.all_reduce_max(cost).tolist())


# Fraction of EVAL_MAX_SECONDS to plan for: the trace is checked after the pass.
USABLE_BUDGET_FRAC = 0.98
# A plan fits if its estimated seconds times this are left.
PLANNING_FACTOR = 1.2
# An adaptive pass must have time for this part of its training, or scoring by windows is as good.
MIN_TRAINED_FRAC = 0.5
# Sliding windows get this part of the time left if an adaptive pass follows.
SLIDING_FRAC = 0.35
# A later pass is only tried if this many times the seconds of the disjoint windows are left.
MIN_PASS_COST = 2.0


class TimeLimit(NamedTuple):
    """Time for a pass over the artifact; the default is no limit."""

    end_s: float = math.inf  # by time.perf_counter() of rank 0
    min_s: float = 0.0  # the pass is known to need at least this

    def check(self, run: Run, needed_s: float) -> float:
        """Seconds left, on rank 0's clock; PassAbandoned on all ranks if they are too few."""
        left_s = float(run.broadcast_object(self.end_s - time.perf_counter()))
        if needed_s > left_s:
            raise PassAbandoned(f"skipped: needs {needed_s:.1f} s, {left_s:.1f} s left")
        return left_s


def plan_pass(
    run: Run, model: GPT, validation: Validation, kind: str, limit: TimeLimit
) -> tuple[Sequence[EvalStep], EvalBudget, str]:
    """The steps of a pass, its budget, and what was adjusted (`ttt_chunk_size 24 -> 48`) or "".

    A plan fits if there is time for scoring and for a part of the training, as measured. Until it
    does, TTT_CHUNK_SIZE (with LoRA) or EVAL_STRIDE is doubled; PassAbandoned if it never does. If
    there is no time for all of the training, LoRA first gets a single learning rate, then a fixed
    one.
    """
    cfg: Any = run.cfg  # fields are replaced by name
    adaptive, cost, notes = kind == "ttt", None, dict[str, str]()
    name, size = "eval_stride", cfg.eval_stride or cfg.score_seq_len
    if adaptive and cfg.ttt_method == "lora":
        name, size = "ttt_chunk_size", cfg.ttt_chunk_size
    old_size, max_size = size, (cfg.score_seq_len - EMBEDDING_CONTEXT) // 2
    while True:
        planner = EvalPlanner(cfg, run.rank, run.world_size)
        stride = planner.stride if kind == "sliding" else cfg.score_seq_len
        steps = planner.plan_scoring(validation.num_targets, stride)
        if adaptive:
            steps = plan_adaptive(planner, validation.ids)
        if kind == "quantized" or limit.end_s == math.inf:
            return steps, EvalBudget(run, steps, limit.check(run, -math.inf)), ""
        if cost is None:
            limit.check(run, max_over_ranks(run, limit.min_s))
            cost = measure_step_cost(run, model, steps, adaptive=adaptive)
        budget = EvalBudget(run, steps, limit.check(run, -math.inf), cost)
        all_s = PLANNING_FACTOR * max_over_ranks(run, budget.to_score[0] + budget.to_train)
        if name == "ttt_chunk_size" and all_s > budget.limit_s and cfg.num_lrs > 1:
            cfg = dataclasses.replace(cfg, ttt_num_lrs=1)
            notes["ttt_num_lrs"] = f"{run.cfg.num_lrs} -> 1"
            continue
        if adaptive and all_s > budget.limit_s and cfg.chooses_lrs:
            cfg = dataclasses.replace(cfg, ttt_lora_lr=LORA_LRS[0])
            notes["ttt_lora_lr"] = f"-1 -> {LORA_LRS[0]:g}"
            continue
        needed_s = budget.to_score[0] + MIN_TRAINED_FRAC * budget.to_train
        needed_s = PLANNING_FACTOR * max_over_ranks(run, needed_s)
        if needed_s <= budget.limit_s or size >= max_size:
            limit.check(run, needed_s)
            return steps, budget, ", ".join(f"{name} {note}" for name, note in notes.items())
        size = min(2 * size, max_size)
        cfg = dataclasses.replace(cfg, **{name: size})
        notes[name] = f"{old_size} -> {size}"


def evaluate(
    run: Run,
    model: GPT,
    validation: Validation,
    stride: int,
    *,
    adaptive: bool = False,
    learns: bool = True,
) -> Score:
    """Score every target once, with windows of `stride`, or adaptively.

    Without a time limit, for validation during training and for audits; see run_pass for scores.
    The adaptive pass restores the model afterwards; with learns=False it trains nothing.
    """
    model.use_final_schedule()
    planner = EvalPlanner(run.cfg, run.rank, run.world_size)
    if not adaptive:
        plan = planner.plan_scoring(validation.num_targets, stride)
        return EvalRunner(run, model, validation, plan).run_steps()
    plan = plan_adaptive(planner, validation.ids)
    if not learns:
        plan = [step.without_training() for step in plan]
    with restore_model_after(run.cfg, model):
        return EvalRunner(run, model, validation, plan, adaptive=True).run_steps()


def run_pass(
    run: Run, model: GPT, validation: Validation, kind: str, limit: TimeLimit
) -> tuple[Score, EvalBudget, dict[str, Any]]:
    """Plan and run a pass: its score, its budget, and what to log with the score.

    Raises PassAbandoned if the pass does not fit.
    """
    started_s, cfg, adaptive = time.perf_counter(), run.cfg, kind == "ttt"
    marks = dict[str, Any]()
    model.use_final_schedule()
    with restore_model_after(cfg, model) if adaptive else contextlib.nullcontext():
        steps, budget, adjusted = plan_pass(run, model, validation, kind, limit)
        if adjusted:
            marks["adjusted"] = adjusted
        if budget.estimated_s:
            run.log("pass", name=kind, estimated_s=round(budget.estimated_s, 3), **marks)
        runner = EvalRunner(run, model, validation, steps, adaptive=adaptive)
        score = runner.run_steps(budget)
    counts = run.all_reduce_sum(torch.tensor([budget.num_dropped, len(steps)], device=run.device))
    if counts[0]:
        marks["untrained"] = "{} of {} steps".format(*counts.tolist())
    if budget.estimated_s:
        marks["estimated_s"] = round(budget.estimated_s, 3)
    spent_s = run.ledger["evaluation"] + time.perf_counter() - started_s
    is_optional = kind in PASS_NAMES  # prequant is on no budget, quantized has to be complete
    if is_optional and 0 < cfg.eval_max_seconds < max_over_ranks(run, spent_s):
        raise PassAbandoned(f"complete too late: after {spent_s:.1f} s of evaluation")
    return score, budget, marks


def evaluate_and_log(
    run: Run, model: GPT, validation: Validation, kind: str, limit: TimeLimit | None = None
) -> float:
    """Run the pass `kind` (prequant, quantized, sliding, ttt); log and keep its score.

    Returns its seconds without compilation. Raises PassAbandoned if it does not fit, or if the
    adaptive pass diverges.
    """
    limit, expected = limit or TimeLimit(), dict[str, float]()
    if kind in ("prequant", "quantized") and "train_end" in run.scores:
        tokens_per_s = max(1, run.scores["train_end"]["tokens_per_s"])
        expected["estimated_s"] = round(validation.num_targets / TRAIN_COST / tokens_per_s, 1)
    budget_name = "other" if kind == "prequant" else "evaluation"
    with run.stage(f"evaluate_{kind}", budget_name, **expected):
        score, budget, marks = run_pass(run, model, validation, kind, limit)
    if not math.isfinite(score.nats):
        error = PassAbandoned if kind == "ttt" else RunFailed
        raise error(f"final_{kind}: the loss is {score.nats}; lower the learning rates")
    if score.problems and not run.cfg.allow_noncompliant:
        raise RunFailed(f"final_{kind}: {score.problems[0]}")
    for problem in score.problems[:1]:
        run.log("warning", text=f"not compliant: {problem}")
    marks["compliant"] = not (score.partial or run.cfg.allow_noncompliant)
    run.scores[f"final_{kind}"] = values = score.summary() | marks
    run.log(f"final_{kind}", **values)
    spent_s, work = budget.spent
    return spent_s / work * budget.to_score[0] if work else score.eval_s


PASS_NAMES = {"sliding": "sliding windows", "ttt": "test-time training"}


def evaluate_artifact(run: Run, model: GPT, validation: Validation) -> None:
    """Score with disjoint windows, sliding windows and the adaptive pass, as far as time allows.

    The last complete pass is the final score. The seconds of a pass that was skipped or abandoned,
    or of an adaptive pass whose loss is not finite, are counted as `other`. RunFailed if not even
    the disjoint windows fit.
    """
    cfg, notes, end_s = run.cfg, list[str](), math.inf
    run.ledger["evaluation"] += validation.table_s
    if cfg.eval_max_seconds:
        usable_s = USABLE_BUDGET_FRAC * cfg.eval_max_seconds - run.ledger["evaluation"]
        end_s = time.perf_counter() + usable_s
    try:
        pass_s = evaluate_and_log(run, model, validation, "quantized", TimeLimit(end_s))
    except PassAbandoned as error:
        raise RunFailed(
            f"EVAL_MAX_SECONDS={cfg.eval_max_seconds} is too short for disjoint windows: {error}; "
            "raise it, or set or lower VAL_TOKENS_LIMIT"
        ) from error
    for kind in ["sliding"] * (cfg.eval_stride > 0) + ["ttt"] * cfg.adapts:
        limit_s, spent_s = end_s, run.ledger["evaluation"]
        if kind == "sliding" and cfg.adapts and end_s < math.inf:
            now_s = time.perf_counter()
            limit_s = now_s + SLIDING_FRAC * (end_s - now_s)
        try:
            limit = TimeLimit(limit_s, MIN_PASS_COST * pass_s)
            evaluate_and_log(run, model, validation, kind, limit)
        except PassAbandoned as error:
            notes.append(f"{PASS_NAMES[kind]} {error}")
            run.ledger["other"] += run.ledger["evaluation"] - spent_s
            run.ledger["evaluation"] = spent_s
    score = final_score(run.scores).removeprefix("final_")
    run.scores["final"] = {"score": score, "notes": "; ".join(notes)}
    run.log("final", **run.scores["final"])


# --- 11. Test-time training ----------------------------------------------------------------------
# What learns from scored text: WeightTrainer trains the weights of the model on chunks that all
# ranks have scored; AdapterTrainer trains one LoRA for each document and layer call, and leaves the
# weights as they are.

# Parameters with one row per block, which belong to that block.
ROW_PER_BLOCK = ("block_scalars.x0", "block_scalars.write", "block_scalars.carry")


def ttt_parameters(cfg: Config, model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that test-time training of the weights changes, by name.

    TTT_TRAIN=blocks selects the blocks that are not frozen, the table of EVAL_HASH_ROWS, and every
    parameter whose name has norm, scale or lm_head in it (openai/parameter-golf#430);
    WeightTrainer masks the rows of ROW_PER_BLOCK that belong to frozen blocks.
    """
    frozen = tuple(f"blocks.{i}." for i in range(cfg.ttt_freeze_blocks))
    names = list(parameter_roles(model))
    if cfg.ttt_train == "all":
        chosen = [name for name in names if not name.startswith(frozen)]
    else:
        table = f"|hashes.{len(model.hashes) - 1}" if cfg.eval_hash_rows else ""
        always = re.compile(rf"lm_head|block_scalars\.shared|\b\w*(norm|scale)${table}")
        chosen = [
            name
            for name in names
            if always.search(name)
            or name in ROW_PER_BLOCK
            or (name.startswith("blocks.") and not name.startswith(frozen))
        ]
    return {name: model.get_parameter(name) for name in chosen}


class WeightTrainer:
    """Trains the model's weights on scored text, data-parallel over all ranks."""

    def __init__(self, run: Run, model: GPT):
        self.run, self.model, cfg = run, model, run.cfg
        params, groups = ttt_parameters(cfg, model.requires_grad_(True)), dict[float, Any]()
        model.requires_grad_(False)
        # The hash table created for this pass has its own learning rate.
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
        30% of the chunks (`chunk_frac`).
        """
        cfg, params, total = self.run.cfg, self.params, torch.zeros(1, device=self.run.device)
        if batch is not None:
            tensors = batch.ids_BT, batch.target_BT, batch.weight_BT
            rows, T = batch.ids_BT.shape
            num_micro = num_micro_batches(rows, T, cfg.micro_batch_tokens)
            for part in zip(*(tensor.chunk(num_micro) for tensor in tensors), strict=True):
                self.model.loss(*part).backward()  # type: ignore[no-untyped-call]
            total += batch.weight_BT.sum()
        flat = all_reduce_gradients(self.run, total, params)
        flat[:-1] /= flat[-1].clamp_min(1)
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
        """Context in which the model holds the Polyak average of its weights, if TTT_POLYAK."""
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
    """Trains one LoRA per document and layer call, for all documents of a batch at once.

    With G learning rates each document has G adapters, in adjacent rows. The weights of the model
    do not change.
    """

    def __init__(
        self,
        run: Run,
        model: GPT,
        rows: int = 1,
        initial_a: Sequence[Tensor] = (),
        lrs: Sequence[float] = (),
    ):
        self.cfg, self.model, self.lrs = run.cfg, model, lrs or run.cfg.lora_lrs[:1]
        # Learning rate of each row, over the largest one.
        self.lr_frac_B11 = torch.tensor(self.lrs).repeat(rows)[:, None, None].to(run.device)
        self.lr_frac_B11 /= max(self.lrs) or 1.0
        rows *= len(self.lrs)
        self.rows = self.num_documents = rows
        cfg, generator = run.cfg, torch.Generator().manual_seed(run.cfg.seed)
        modules = [lora_modules(model, index) for index in range(len(model.schedule))]
        sizes = [lora_sizes(module) for module in itertools.chain(*modules)]
        # Every document starts with the same A, so that their order does not matter; B is zero.
        self.initial_a = [*initial_a] or [
            ((2 * torch.rand(cfg.ttt_lora_rank, width, generator=generator) - 1) * width**-0.5).to(
                run.device
            )
            for width, _ in sizes
        ]
        self.adapters = [
            BatchedLoRA(start_RI, rows, num_outputs, cfg.ttt_lora_alpha)
            for start_RI, (_, num_outputs) in zip(self.initial_a, sizes, strict=True)
        ]
        # Two calls of the same block have adapters of their own.
        adapters = iter(self.adapters)
        # The (module, adapter) pairs of each layer call.
        self.call_adapters = [[(module, next(adapters)) for module in row] for row in modules]
        self.finished_a_sums = [torch.zeros_like(start_RI) for start_RI in self.initial_a]
        # The float32 parameters are A and B in turn. The model computes with copies in its own
        # dtype; in float32 these are the parameters themselves.
        both = nn.ModuleList(self.adapters)
        self.params = [param.detach() for param in both.parameters()]
        self.copies = [*both.to(model.dtype).parameters()]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=max(self.lrs),
            betas=(cfg.ttt_beta1, cfg.ttt_beta2),
            eps=1e-10,
            weight_decay=cfg.ttt_lora_wd,
            fused=True,
        )
        self.past = (
            KVCache(len(model.schedule), cfg.score_seq_len)
            if cfg.ttt_context == "incremental"
            else None
        )
        model.requires_grad_(False)
        model.set_adapters(self.call_adapters)

    def drop_finished_rows(self, rows: int) -> None:
        """Keep the first rows of adapters and optimizer; the other documents have ended."""
        for down_BIR, sum_RI in zip(self.params[::2], self.finished_a_sums, strict=True):
            sum_RI += down_BIR[rows:].sum(dim=0).T
        for param, copy in zip(self.params, self.copies, strict=True):
            param.data, copy.data = param[:rows], copy.data[:rows]
            state = self.optimizer.state[param]
            state.update({k: x[:rows] for k, x in state.items() if x.dim() == 3})
        self.rows = rows

    def take_mean_a(self) -> list[Tensor]:
        """Drop all adapters; returns the mean A of the documents of the batch, which have ended."""
        self.drop_finished_rows(0)
        return [sum_RI / self.num_documents for sum_RI in self.finished_a_sums]

    def update(self) -> None:
        """An optimizer step; a row's update is proportional to its learning rate."""
        before = list[Tensor]()
        if len(self.lrs) > 1:
            before = [torch.empty_like(param) for param in self.params]
            torch._foreach_copy_(before, self.params)
        grads: list[Any] = [copy.grad for copy in self.copies]
        if mixed := self.model.dtype != torch.float32:
            narrow, grads = grads, [torch.empty_like(param) for param in self.params]
            torch._foreach_copy_(grads, narrow)
        for param, copy, grad in zip(self.params, self.copies, grads, strict=True):
            param.grad, copy.grad = grad, None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for param, old in zip(self.params, before, strict=False):
            torch.lerp(old, param, self.lr_frac_B11[: self.rows], out=param)
        if mixed:
            torch._foreach_copy_([copy.detach() for copy in self.copies], self.params)

    def step(self, batch: Batch, num_learning_rows: int) -> Tensor:
        """Nats of the batch before any update (B * G, T - first), then train the first rows.

        Rows are independent: windows pass in micro-batches of at most MICRO_BATCH_TOKENS.
        """
        if len(self.lrs) > 1:
            batch = batch.repeated(len(self.lrs))
            num_learning_rows *= len(self.lrs)
        if len(batch.ids_BT) < self.rows:
            self.drop_finished_rows(len(batch.ids_BT))
        weight_BT = batch.weight_BT[:num_learning_rows, batch.first_column :]
        weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True).clamp_min(1)
        scored, (num_rows, T) = list[Tensor](), batch.ids_BT.shape
        micro_rows = num_rows if self.past else max(1, self.cfg.micro_batch_tokens // T)
        for step in range(self.cfg.ttt_grad_steps if num_learning_rows else 1):
            if step and self.past is not None:
                self.past.keep_positions(0, self.past.length - T)  # once more
            for start in range(0, num_rows, micro_rows):
                rows = slice(start, start + micro_rows)
                for adapter in self.adapters:
                    adapter.first_row = start
                mixer_inputs = batch.mixer_inputs and batch.mixer_inputs.rows(rows)
                with torch.set_grad_enabled(start < num_learning_rows):
                    nll_BT, scored_BT = self.model.token_nll(
                        batch.ids_BT[rows],
                        batch.target_BT[rows],
                        batch.first_column,
                        past=self.past,
                        mixer_inputs=None if step else mixer_inputs,
                    )
                scored.append(scored_BT.detach())
                weights_BT = weight_BT[rows]
                if len(weights_BT):
                    (nll_BT[: len(weights_BT)] * weights_BT).sum().backward()  # type: ignore[no-untyped-call]
            if num_learning_rows:
                self.update()
        return torch.cat(scored[: -(-num_rows // micro_rows)])


# --- 12. N-gram mixers ---------------------------------------------------------------------------
# A Mixer combines the model's next-token distribution with n-gram counts of the scored text. The
# result depends on the prefix alone and sums to 1 (except with MIXER=hedge_entropy). Counts and
# mixture weights change in `update` only, in the same way on every rank. TextMixer does the same to
# a whole text after the model has scored it. Further suffixes: O n-gram orders, C candidate tokens,
# K context tokens; and in Hedge, E experts, M those that it is given.


def mix_bits(bits: Tensor) -> Tensor:
    """Hash finalizer: a bijection of int64 in which every input bit affects all output bits."""
    bits = bits * -7046029254386353131
    bits = (bits ^ ((bits >> 29) & (2**35 - 1))) * -4417276706812531889  # >> copies the sign bit
    return bits ^ ((bits >> 32) & (2**32 - 1))


class NgramCounts:
    """Counts of n-grams: how often each token followed each context of the lengths `orders`.

    The n-grams of a negative order are counted in each document by itself: their contexts begin
    with the number of the document, which is larger than any token.

    An open-addressing hash table holds contexts, and contexts with their continuation. A row stores
    its full 63-bit key, so that two n-grams are never confused. A table that is half full is
    emptied.
    """

    def __init__(self, orders: Sequence[int], vocab_size: int, bits: int, device: torch.device):
        self.orders, self.vocab_size, self.mask = orders, vocab_size, 2**bits - 1
        longest = max(1, *map(abs, orders))
        self.history_K = torch.zeros(longest, dtype=torch.int64, device=device)
        self.num_tokens, self.document = 0, self.history_K.new_tensor(vocab_size)
        self.max_keys_used = 0  # upper bound of the rows in use
        self.table = self.history_K.new_zeros(4, 2**bits)
        # A successor is count or position * vocab_size + token; the maximum is kept: the most
        # frequent one, and the last one.
        self.keys, self.counts, self.best_successors, self.last_successors = self.table

    def find(self, key_N: Tensor, claim: bool = False) -> Tensor:
        """The row of each key, or the empty row where it belongs; claim=True inserts it."""
        row_N, todo, probes = key_N & self.mask, torch.arange(len(key_N), device=key_N.device), 1
        while len(todo):  # a GPU is waited for once a round, and each round probes twice as often
            row, key = row_N[todo], key_N[todo]
            for _ in range(probes):
                held = self.keys[row]
                if claim:  # of several keys the largest gets the row, on any device
                    claimed = torch.where(held == 0, key, 0)
                    self.keys.scatter_reduce_(0, row, claimed, "amax")
                    held = self.keys[row]
                is_found = (held == 0) | (held == key)
                row = torch.where(is_found, row, (row + 1) & self.mask)
            row_N[todo] = row
            todo, probes = todo[~is_found], 2 * probes
        return row_N

    def hashes(self, context_NK: Tensor) -> Tensor:
        """Hashes (N, O) of the last tokens of each context, for each order."""
        hashes = [torch.zeros_like(context_NK[:, 0])]
        for k in range(1, len(self.history_K) + 1):
            hashes.append(mix_bits(hashes[-1] + context_NK[:, -k] + 1))
        document_N = context_NK[:, 0] + 1
        return torch.stack(
            [hashes[n] if n >= 0 else mix_bits(hashes[-n] + document_N) for n in self.orders], 1
        )

    def row_keys(self, hash_: Tensor, token: Tensor | None = None) -> Tensor:
        """Keys (positive int64) of contexts, or of contexts followed by `token`."""
        mixed = hash_ if token is None else mix_bits(hash_ - token - 1)
        return (mixed & (2**63 - 1)).clamp_min(1)

    def update(self, ids_N: Tensor) -> None:
        """Count the n-grams of text that continues the text of the last call."""
        piece_len = max(1, min(16_384, len(self.keys) // (16 * len(self.orders))))
        for piece in torch.split(ids_N, piece_len):
            text = torch.cat([self.history_K, piece])
            window, self.history_K = text.unfold(0, len(self.history_K) + 1, 1), text[len(piece) :]
            document_M = self.document + F.pad((piece == BOS_ID).cumsum(0), (1, 0))
            self.document = document_M[-1]
            hash_NO = self.hashes(torch.cat([document_M[:-1, None], window[:, :-1]], 1))
            token_NO = window[:, -1:].expand_as(hash_NO)
            key_M = torch.cat([self.row_keys(hash_NO), self.row_keys(hash_NO, token_NO)]).flatten()
            self.max_keys_used += len(key_M)
            if 2 * self.max_keys_used > len(self.keys):  # some keys are repeated: count the rows
                self.max_keys_used = int(self.keys.count_nonzero()) + len(key_M)
                # Still too full: recent text says more about what follows than old text.
                if 2 * self.max_keys_used > len(self.keys):
                    self.table.zero_()
                    self.max_keys_used = len(key_M)
            row_M = self.find(key_M, claim=True)
            self.counts.index_add_(0, row_M, torch.ones_like(row_M))
            context, pair = row_M.chunk(2)
            best = self.counts[pair] * self.vocab_size + token_NO.flatten()
            self.best_successors.scatter_reduce_(0, context, best, "amax")
            position_N = self.num_tokens + torch.arange(len(piece), device=piece.device)
            last_NO = (position_N * self.vocab_size)[:, None] + token_NO
            self.last_successors.scatter_reduce_(0, context, last_NO.flatten(), "amax")
            self.num_tokens += len(piece)

    def look_up(self, context_NK: Tensor) -> Tensor:
        """What is known of contexts: hash, count, and their successors, (6, N, O).

        Count and id of the most frequent one; id and age, in tokens, of the last one.
        """
        hash_NO = self.hashes(context_NK)
        row_NO = self.find(self.row_keys(hash_NO).flatten()).view_as(hash_NO)
        top_NO, last_NO = self.best_successors[row_NO], self.last_successors[row_NO]
        size, age_NO = self.vocab_size, self.num_tokens - last_NO // self.vocab_size
        return torch.stack(
            [hash_NO, self.counts[row_NO], top_NO // size, top_NO % size, last_NO % size, age_NO]
        )

    def count(self, seen_6NO: Tensor, token_NC: Tensor) -> Tensor:
        """Counts (2, N, C, O) of each candidate after each context: all, and of the last token."""
        key_NCO = self.row_keys(seen_6NO[0][:, None], token_NC[..., None])
        count_NCO = self.counts[self.find(key_NCO.flatten())].view_as(key_NCO)
        return torch.stack([count_NCO, (token_NC[..., None] == seen_6NO[4][:, None]).long()])


# Sums over tokens are integers in units of 2^-24, so that they do not depend on the order of
# summation or on the number of ranks.
FIXED_POINT_ONE = 2**24


class Hedge:
    """Mixture with one weight per expert, updated by Hedge (exponential weights).

    The experts are the model and, for each order, an n-gram with additive smoothing:
    (count + delta) / (total + delta * V) (openai/parameter-golf#688).
    """

    def __init__(self, cfg: Config, device: torch.device):
        orders, self.cfg = cfg.mixer_contexts, cfg
        self.delta_O = torch.tensor([0.1 if order < 2 else 0.01 for order in orders], device=device)
        num_experts = 1 + (cfg.mixer == "hedge_entropy") + len(orders)
        self.log_weight_E = torch.zeros(num_experts, device=device)
        self.log_weight_E[0] = 2.0  # the model's weight is e^2 times that of an n-gram at first
        self.statistics = torch.zeros(1 + num_experts, dtype=torch.int64, device=device)

    def mix(
        self, p_NCM: Tensor, count_2NCO: Tensor, seen_3NO: Tensor, _before_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mixed probabilities (N, C); statistics (1 + E): tokens, and each expert's loss on them.

        The loss is that of candidate 0, the target.
        """
        total_NO = seen_3NO[0] + self.delta_O * self.cfg.vocab_size
        p_NCE = torch.cat([p_NCM, (count_2NCO[0] + self.delta_O) / total_NO[:, None]], 2)
        loss_NE = (-p_NCE[:, 0].log() * FIXED_POINT_ONE).long()
        return p_NCE @ self.log_weight_E.softmax(0).double(), F.pad(loss_NE, (1, 0), value=1).sum(0)

    def update_weights(self, statistics: Tensor) -> None:
        self.log_weight_E -= self.cfg.hedge_eta * (
            statistics[1:] / statistics[0].clamp_min(1) / FIXED_POINT_ONE
        )


class Backoff:
    """Interpolated back-off: for each order, p <- (1 - w) * p + w * q if its context was seen.

    In q, the share of each continuation, the last one counts twice. The weight w depends on what is
    known before the target: on the class of the context, which is its order, how long ago it was
    seen, whether more than once, and how deterministic its continuation is; and on the model's nats
    of the target before. A class has weights for G values of these nats, between which w is
    interpolated. They are mean posterior probabilities that the n-gram produced the scored tokens
    (online EM), as if PRIOR_TOKENS tokens with the mean `prior_weights` had been scored before.
    Suffix S: classes.
    """

    # Classes of one order: by the share of the most frequent continuation, by age, by count.
    SHARES, AGES, CLASSES = (0.25, 0.5, 0.75, 0.95), (128, 1024), 30
    GATE_NATS = 3.0  # from one of the G values to the next; the first is 0
    PRIOR_TOKENS = 10

    def __init__(self, cfg: Config, device: torch.device):
        shape = 2, 2, 3, self.CLASSES * len(cfg.mixer_contexts)
        self.sums_2GS, self.statistics = torch.zeros(shape, dtype=torch.int64, device=device)
        self.prior_GS = self.prior_weights(cfg.mixer_contexts).to(device)
        self.num_updates = 0
        self.update_weights(self.statistics)

    @staticmethod
    def prior_weights(orders: Sequence[int]) -> Tensor:
        """Weights (G, S) before any text, a logistic function of gate, order and class.

        Its coefficients were fitted to training text that a model of 3 M parameters scored.
        """
        axes = range(3), orders, range(2), range(3), range(5)
        gate, order, is_repeated, age, share = torch.meshgrid(
            *(torch.tensor(axis, dtype=torch.float64) for axis in axes), indexing="ij"
        )
        logit = 0.65 * gate + 1.32 * order.abs().clamp_min(1).log() + 1.76 * (order < 0).double()
        logit += 1.27 * is_repeated - 0.18 * age + 0.47 * share - 7.23
        return logit.sigmoid().flatten(1)

    def mix(
        self, p_NCM: Tensor, count_2NCO: Tensor, seen_3NO: Tensor, before_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mixed probabilities (N, C); statistics (2, G, S): posteriors and contexts seen."""
        p_NC, (total_NO, top_NO, age_NO), steps = p_NCM[..., 0], seen_3NO, list[Tensor]()
        share_NO = top_NO / total_NO.clamp_min(1).double()
        class_NO = 15 * (total_NO > 1) + 5 * sum(age_NO > age for age in self.AGES)
        class_NO += sum(share_NO > share for share in self.SHARES)
        class_NO += self.CLASSES * torch.arange(total_NO.size(1), device=total_NO.device)
        ngram_NCO = count_2NCO.sum(0) / (total_NO + 1).double()[:, None]
        gate_N = (before_N / self.GATE_NATS).clamp_max(2)
        near_GN = torch.stack([1 - (gate_N - gate).abs() for gate in range(3)]).clamp_min(0)
        near_GNO = near_GN[..., None] * (total_NO > 0)
        gated_GNO = self.ngram_weight_GS[:, class_NO] * near_GNO
        for weight_N, ngram_NC in zip(gated_GNO.sum(0).unbind(1), ngram_NCO.unbind(2), strict=True):
            mixed_NC = torch.lerp(p_NC, ngram_NC, weight_N[:, None])
            steps.append(torch.stack([p_NC[:, 0], mixed_NC[:, 0]]))
            p_NC = mixed_NC
        before_NO, after_NO = torch.stack(steps, 2)
        posterior_GNO = gated_GNO * ngram_NCO[:, 0] / after_NO
        seen_GNO = posterior_GNO + (near_GNO - gated_GNO) * before_NO / after_NO
        sums = (torch.stack([posterior_GNO, seen_GNO]) * FIXED_POINT_ONE).long().flatten(2)
        return p_NC, torch.zeros_like(self.statistics).index_add_(2, class_NO.flatten(), sums)

    def update_weights(self, statistics: Tensor) -> None:
        self.num_updates += 1
        decay = (1 - 1 / self.num_updates) ** 4  # later posteriors come from better weights
        self.sums_2GS = decay * self.sums_2GS + statistics.double() / FIXED_POINT_ONE
        posterior_GS, number_GS = self.sums_2GS
        prior_GS, tokens = self.prior_GS, self.PRIOR_TOKENS
        self.ngram_weight_GS = (posterior_GS + tokens * prior_GS) / (number_GS + tokens)


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy of softmax(logits_NV) in nats, (N, 1)."""
    logp_NV = logits_NV.log_softmax(1)
    return -(logp_NV.exp() * logp_NV).sum(1, keepdim=True)


class Mixer:
    """Applies the adaptive temperature, then the n-gram bias, then the n-gram mixture."""

    def __init__(self, run: Run):
        self.run, self.cfg, cfg = run, run.cfg, run.cfg
        orders = sorted({*cfg.mixer_contexts, *cfg.tilt_contexts})
        self.mixed = [orders.index(order) for order in cfg.mixer_contexts]
        self.tilting = [orders.index(order) for order in cfg.tilt_contexts]
        bits = cfg.ngram_table_bits if orders else 4
        self.counts = NgramCounts(orders or [0], cfg.vocab_size, bits, run.device)
        self.num_context = 1 + len(self.counts.history_K)
        self.weights: Hedge | Backoff | None = None
        if cfg.mixer != "none":
            self.weights = (Backoff if cfg.mixer == "backoff" else Hedge)(cfg, run.device)

    @torch.no_grad()
    def predict(
        self, logits_NV: Tensor, context_NK: Tensor, token_NC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p (N, C) of candidates, float64, and the mixture's statistics on candidate 0."""
        cfg, seen_6NO = self.cfg, self.counts.look_up(context_NK)
        if (temperature := cfg.adaptive_temperature) != 1:  # it acts fully at zero entropy
            relative_entropy_N1 = entropy(logits_NV) / math.log(cfg.vocab_size)
            logits_NV = logits_NV / (1 - (1 - temperature) * (1 - relative_entropy_N1))
        norm_N1 = logits_NV.logsumexp(1, keepdim=True)
        logp_NC = (logits_NV.gather(1, token_NC) - norm_N1).double()
        if self.tilting:
            _, total_NO, top_NO, token_NO, *_ = seen_6NO[..., self.tilting]
            # The offset because of rounding: 0.8 * 5 is 4.
            is_active_NO = top_NO >= cfg.ngram_tilt_min_frac * total_NO.double() - 1e-9
            is_active_NO &= total_NO >= cfg.ngram_tilt_min_count
            longest_N1 = is_active_NO.cumsum(1).argmax(1, keepdim=True)  # of the active ones
            hint_N1 = token_NO.gather(1, longest_N1)
            tilt_N1 = cfg.ngram_tilt * is_active_NO.any(1, keepdim=True).double()
            p_N1 = (logits_NV.gather(1, hint_N1) - norm_N1).double().exp()
            # p * exp(tilt * [token is the hint]) / Z, where Z = 1 + p(hint) * (exp(tilt) - 1)
            logp_NC += tilt_N1 * (token_NC == hint_N1) - torch.log1p(p_N1 * torch.expm1(tilt_N1))
        if self.weights is None:
            return logp_NC, logp_NC.new_zeros(0)
        p_NCM = logp_NC.exp()[..., None]
        if cfg.mixer == "hedge_entropy":  # one number for every token: not a distribution
            entropy_expert_N1 = torch.exp(-entropy(logits_NV).double())
            p_NCM = torch.cat([p_NCM, entropy_expert_N1[..., None].expand_as(p_NCM)], 2)
        seen_6NO = seen_6NO[..., self.mixed]
        count_2NCO = self.counts.count(seen_6NO, token_NC)
        unknown_N = torch.zeros_like(p_NCM[:, 0, 0])  # the target before may be in no row
        p_NC, statistics = self.weights.mix(p_NCM, count_2NCO, seen_6NO[[1, 2, 5]], unknown_N)
        is_early = cfg.mixer != "backoff" and self.counts.num_tokens < cfg.hedge_min_tokens
        return logp_NC if is_early else p_NC.log(), statistics

    def nll(self, logits_NV: Tensor, context_NK: Tensor, target_N: Tensor) -> Tensor:
        """Nats of the targets, float32. The next `update` uses their statistics."""
        logp_N1, statistics = self.predict(logits_NV, context_NK, target_N[:, None])
        if self.weights is not None:
            self.weights.statistics += statistics
        return -logp_N1[:, 0].float()

    def log_probs(self, logits_NV: Tensor, context_NK: Tensor) -> Tensor:
        """Log-probabilities of the whole vocabulary, (N, V), float64."""
        every = torch.arange(logits_NV.size(1), device=logits_NV.device)
        return self.predict(logits_NV, context_NK, every.expand(len(logits_NV), -1))[0]

    def update(self, ids: Tensor) -> None:
        """Learn from the text that all ranks have scored since the last call."""
        if self.weights is not None:
            self.weights.update_weights(self.run.all_reduce_sum(self.weights.statistics))
            self.weights.statistics.zero_()
        if self.mixed or self.tilting:
            self.counts.update(ids)


def earlier_equals(key_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How often each key occurred before; the order that sorts them by key, then by position.

    The third result has, for each place in that order, the place where its key begins.
    """
    sorted_N, order_N = key_N.sort(stable=True)
    place_N = torch.arange(len(key_N), device=key_N.device)
    begins_N = F.pad(sorted_N[1:] != sorted_N[:-1], (1, 0), value=True)
    first_N = torch.where(begins_N, place_N, 0).cummax(0).values
    return torch.empty_like(place_N).index_put_((order_N,), place_N - first_N), order_N, first_N


def count_earlier(context_N: Tensor, token_N: Tensor) -> Tensor:
    """Counts (5, N) of what came before each position, 0 where its context, a hash, is new.

    How often its context did; the context with the token that followed it most often; how long ago
    the context last did; the context with its own token; and whether that one followed it last.
    """
    total_N, order_N, first_N = earlier_equals(context_N)
    count_N = earlier_equals(mix_bits(context_N - token_N - 1))[0]
    # Sorted by context, then by position: the largest count so far, within each context.
    best_N = (first_N << 32 | count_N[order_N] + 1).cummax(0).values & (2**32 - 1)
    top_N, last_N = (
        torch.empty_like(total_N).index_put_((order_N,), F.pad(x, (1, -1)))
        for x in (best_N, order_N)
    )
    age_N = torch.arange(len(last_N), device=last_N.device) - last_N
    is_last_N = (token_N[last_N] == token_N).long()
    return torch.stack([total_N, top_N, age_N, count_N, is_last_N]) * (total_N > 0)


class TextMixer:
    """Mixes n-grams into the nats that the model gave to the targets `index_N` of a text.

    Each target is mixed with the counts of all targets before it, which sorting finds for the whole
    text at once: exact, and without a table. The weights of the mixture are learned chunk by chunk.
    """

    def __init__(self, run: Run, ids: np.ndarray, index_N: np.ndarray):
        self.run, self.cfg, self.index_N = run, run.cfg, index_N
        self.ids = torch.from_numpy(ids.astype(np.int64)).to(run.device)
        rows, target_N = torch.from_numpy(index_N).to(run.device), self.ids[1:]
        counts = {
            order: count_earlier(hash_N, target_N)[:, rows].int()
            for order, hash_N in self.context_hashes()
        }
        self.seen_5NO = torch.stack([counts[order] for order in self.cfg.mixer_contexts], 2)
        # The model's nats of the row before each row; it counts within the document.
        self.before_M = torch.zeros(len(rows) + 1, dtype=torch.float64, device=run.device)
        self.has_before_N = self.ids[rows] != BOS_ID
        self.reset()

    def reset(self) -> None:
        """Begin again with initial weights."""
        cfg, device = self.cfg, self.run.device
        self.weights: Any = (Backoff if cfg.mixer == "backoff" else Hedge)(cfg, device)

    def context_hashes(self) -> Iterator[tuple[int, Tensor]]:
        """Hashes (N,) of the tokens before each target, for each order; zeros before the text."""
        hash_N, orders = torch.zeros_like(self.ids[1:]), self.cfg.mixer_contexts
        document_N = self.cfg.vocab_size + (self.ids[:-1] == BOS_ID).cumsum(0)
        for length in range(max(map(abs, orders)) + 1):
            if length:
                past_N = F.pad(self.ids, (length - 1, 0))[: len(hash_N)]
                hash_N = mix_bits(hash_N + past_N + 1)
            if length in orders:
                yield length, hash_N
            if length and -length in orders:
                yield -length, mix_bits(hash_N + document_N + 1)

    def rows_of(self, text: Span) -> slice:
        """The rows of `index_N` whose targets are in `text`."""
        return slice(*np.searchsorted(self.index_N, text))

    def mix(
        self, p_NC: Tensor, count_2NCO: Tensor, seen_3NO: Tensor, rows: Any, first: int
    ) -> tuple[Tensor, Tensor]:
        """Mixed probabilities (N, C) and statistics of candidates that the model gives `p_NC`."""
        before_N = self.before_M[:-1][rows] * self.has_before_N[rows]
        mixed_NC, statistics = self.weights.mix(p_NC[..., None], count_2NCO, seen_3NO, before_N)
        if self.cfg.mixer == "hedge" and first < self.cfg.hedge_min_tokens:
            return p_NC, statistics
        return mixed_NC, statistics

    def nll(self, rows: slice, nll_N: Tensor, first: int) -> Tensor:
        """Mixed nats, float32, from the model's; the text chunk begins at target `first`."""
        self.before_M[1:][rows] = nll_N.double()
        p_N1, seen_5NO = (-nll_N.double()).exp()[:, None], self.seen_5NO[:, rows].long()
        p_N1, statistics = self.mix(p_N1, seen_5NO[3:, :, None], seen_5NO[:3], rows, first)
        self.weights.statistics += statistics
        return -p_N1[:, 0].log().float()

    def update_weights(self) -> None:
        """Learn from the targets that all ranks have mixed since the last call."""
        self.weights.update_weights(self.run.all_reduce_sum(self.weights.statistics))
        self.weights.statistics.zero_()

    def example(self, rows: slice, nll_N: np.ndarray, mixed_N: Tensor) -> tuple[Any, ...]:
        """Arguments of GPT.normalization_check: a distribution with the model's nats of targets.

        The other tokens share the rest, because the score does not depend on them.
        """
        target_N = self.ids[1 + torch.from_numpy(self.index_N[rows])].to(mixed_N.device)
        p_N1 = torch.from_numpy(nll_N).neg().exp()[:, None].to(mixed_N.device)
        rest_N1 = (1 - p_N1) / (self.cfg.vocab_size - 1)
        p_NV = rest_N1.expand(-1, self.cfg.vocab_size).scatter(1, target_N[:, None], p_N1)
        index_1N1 = torch.from_numpy(self.index_N[rows])[None, :, None]
        keep_1N = torch.ones(1, len(nll_N), dtype=torch.bool, device=mixed_N.device)
        return p_NV.log(), target_N, mixed_N, MixerInputs(self, index_1N1, keep_1N)

    def log_probs(self, logits_NV: Tensor, index_N1: Tensor) -> Tensor:
        """Log-probabilities (N, V) of all tokens as targets of these indices, by plain counting."""
        hashes, (N, V), counts, ages = dict(self.context_hashes()), logits_NV.shape, [], []
        for index, order in itertools.product(index_N1[:, 0].tolist(), self.cfg.mixer_contexts):
            place_M = (hashes[order][:index] == hashes[order][index]).nonzero()[:, 0]
            token_M = self.ids[1 + place_M]
            counts += [torch.bincount(x, minlength=V) for x in (token_M, token_M[-1:])]
            ages.append((index - place_M[-1:]).sum())
        count_2NVO = torch.stack(counts).view(N, -1, 2, V).permute(2, 0, 3, 1)
        total_NO, top_NO = count_2NVO[0].sum(1), count_2NVO[0].amax(1)
        seen_3NO = torch.stack([total_NO, top_NO, torch.stack(ages).view_as(total_NO)])
        rows = np.searchsorted(self.index_N, index_N1[:, 0].cpu().numpy())
        p_NV, first = logits_NV.double().softmax(1), int(index_N1.min())
        return self.mix(p_NV, count_2NVO, seen_3NO, rows, first)[0].log()


# --- 13. Generation ------------------------------------------------------------------------------
# MODE=generate prints PROMPT and what the model of an artifact continues it with, token by token
# with a KV cache. It leaves no files.


def generate(
    run: Run,
    artifact: Path,
    processor: sentencepiece.SentencePieceProcessor,
    tokenizer_sha256: str,
) -> None:
    """Print PROMPT with its continuation by the artifact's model."""
    cfg = run.cfg  # with its own SEED; read_artifact takes that of the training
    # Every token has another context length, and would be compiled on its own.
    run.cfg = dataclasses.replace(cfg, attention="sdpa", compile=False)
    model = read_artifact(artifact, run, tokenizer_sha256)
    header, _ = decode_header(run.run_on_rank0(artifact.read_bytes))
    encode, decode = find_transform(header.get("transform", "none"))
    prompt = os.fsencode(cfg.prompt).decode(errors="replace")
    ids, context = [BOS_ID, *processor.encode(encode(prompt))], run.cfg.score_seq_len
    if len(ids) > context:
        warn_once(f"PROMPT has {len(ids)} tokens; the model reads only the last {context}")
    ids += sample_tokens(run, model, ids[-context:], cfg.seed)
    if run.is_rank0:
        print(decode(processor.decode(ids)), flush=True)


def find_transform(name: str) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """The functions that apply and invert the transform of an artifact's text.

    Training and scoring need neither, so they are in a file of the repository and not in this one.
    """
    if name == "none":
        return str, str
    try:
        markers = importlib.import_module("data.case_markers").TRANSFORMS[name]
    except ImportError:
        raise InputError(
            f"text with transform {name} needs data/case_markers.py beside the script"
        ) from None
    return markers.encode, markers.decode


@torch.no_grad()
def sample_tokens(run: Run, model: GPT, ids: Sequence[int], seed: int) -> list[int]:
    """Tokens that continue `ids`, until the document ends or MAX_NEW_TOKENS.

    Beyond the context, the KV cache drops its oldest positions.
    """
    cfg, generator, tokens = run.cfg, torch.Generator().manual_seed(seed), list[int]()
    model.use_final_schedule()
    past = KVCache(len(model.schedule), cfg.score_seq_len)
    while len(tokens) < cfg.max_new_tokens:
        run.check_signal()
        ids_BT = torch.tensor([ids], device=run.device)
        logits_V = model.logits(ids_BT, past)[0, -1].cpu().double()
        if not logits_V.isfinite().all():
            raise RunFailed("the logits are not finite; make another artifact")
        count = min(cfg.top_k or len(logits_V), len(logits_V)) if cfg.temperature else 1
        top_K, id_K = logits_V.topk(count)
        p_K = ((top_K - top_K[0]) / (cfg.temperature or 1)).softmax(0)
        token = int(id_K[torch.multinomial(p_K, 1, generator=generator)])
        if token == BOS_ID:
            break
        tokens.append(token)
        ids = [token]
    return tokens


# --- main ----------------------------------------------------------------------------------------
# main() reports errors and chooses the exit status; execute() is a run from start to end.


def main() -> int:
    """Run as the environment says; 0, or 1 (failed), 2 (bad input), 143 (stopped by a signal).

    Signals are ignored once the status is known, so that the process exits with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, raise_interrupted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be unable to encode a name
            stream.reconfigure(errors="backslashreplace")
    env, arguments = os.environ, sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(usage(), flush=True)
        return 0
    try:
        require(
            not arguments,
            f"the argument {' '.join(arguments[:1])!r} is not read: settings are environment "
            "variables, such as ITERATIONS=100; see --help",
        )
        run_mode(env)
        ignore_signals()
        return 0
    except Exception as error:
        expected = explain_error(error)
        if expected is None:
            raise
        ignore_signals()
        return report_error(expected, env)


MAIN_KNOBS = (
    "recipe data_path vocab_size num_layers model_dim train_seq_len train_batch_tokens "
    "micro_batch_tokens matrix_lr iterations max_wallclock_seconds artifact_budget_bytes "
    "eval_stride ttt_method seed run_dir"
).split()


def usage() -> str:
    """The text of --help: how to run, and the knobs that are changed most."""
    knobs = [
        f"  {f.name.upper()}={f.default}  {f.metadata['doc']}"
        for f in fields(Config)
        if f.name in MAIN_KNOBS
    ]
    return "\n".join(
        [
            (__doc__ or "").partition("\n\nSections")[0],
            "",
            "The knobs that are changed most, with their defaults:",
            *knobs,
            "All knobs: KNOBS.md, and with their values MODE=describe. First steps: README.md.",
        ]
    )


def run_mode(env: Mapping[str, str]) -> None:
    """Print a description for MODE=describe; else start the run that the environment describes."""
    cfg = config_from_env(env)
    if cfg.mode == "describe":
        if (env.get("RANK") or "0") == "0":
            print(describe(cfg), flush=True)
        return
    with start_run(cfg, env) as run:
        execute(run)


def execute(run: Run) -> None:
    """Train and export unless the artifact exists; read the artifact back, score it, report.

    MODE=generate only reads the artifact and writes text.
    """
    cfg, trains = run.cfg, run.cfg.trains
    artifact = artifact_path(run)
    has_artifact = run.run_on_rank0(artifact.exists)
    require(trains or has_artifact, f"ARTIFACT={artifact} does not exist; MODE=train makes one")
    processor, tokenizer_sha256 = load_tokenizer(cfg)
    if cfg.mode == "generate":
        generate(run, artifact, processor, tokenizer_sha256)
        return
    validation = load_validation(cfg, processor) if trains else None
    find_compressor(cfg.compressor)  # a missing package must not be found after the training
    require(
        cfg.metrics == "none" or importlib.util.find_spec(cfg.metrics),
        f"METRICS={cfg.metrics} needs a package that is not installed: pip install {cfg.metrics}, "
        "or leave it out; metrics.jsonl has the same numbers",
    )
    prepare_directory(run, artifact)
    run.run_on_rank0(lambda: open_metrics(run))
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
    evaluate_artifact(run, model, validation)
    write_submission(run, sizes, groups)


def artifact_path(run: Run) -> Path:
    """The artifact that the run writes and scores; MODE=eval can score any."""
    if run.cfg.artifact and not run.cfg.trains:
        return Path(run.cfg.artifact)
    return run.directory / "artifact.bin"


# RUN_DIR: what a run finds there, and what it records.


def prepare_directory(run: Run, artifact: Path) -> None:
    """Restore what this run has done in RUN_DIR before, write the packed script, open the log.

    InputError if the folder holds a finished run, another run or files that no run has written.
    """
    data = data_identity(run.cfg)
    check_same_on_ranks(run, **data)
    state, identity = run.run_on_rank0(lambda: claim_directory(run, artifact, data))
    if state:
        run.ledger.update(state["ledger"])
        run.scores.update(state["scores"])
        budget_s = state["config"]["max_wallclock_seconds"]  # which the training had
        run.cfg = dataclasses.replace(run.cfg, max_wallclock_seconds=budget_s)
    log_setup(run)
    run.log("data_identity", **identity["data"])


def claim_directory(
    run: Run, artifact: Path, data: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank 0: check RUN_DIR and write the packed script; the earlier state and the identity."""
    cfg, directory = run.cfg, run.directory
    check_own_files(directory)
    require(
        not (cfg.trains and (directory / "submission.json").exists()),
        f"{directory} holds a finished run; set another RUN_ID or RUN_DIR",
    )
    code = packed_script()
    require(
        not cfg.trains or len(code) < cfg.artifact_budget_bytes,
        f"ARTIFACT_BUDGET_BYTES={cfg.artifact_budget_bytes} must be above the {len(code)} bytes of "
        "the packed script",
    )
    identity = {
        "config": dataclasses.asdict(cfg),
        "code_sha256": hash_bytes(code),
        "data": data,
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
    """Raise InputError if RUN_DIR holds files of other programs under names that a run writes."""
    require_regular_file(directory / "train_gpt.py", PACKED_START)
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

    InputError if the artifact or the checkpoints there are from another run.
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
        budget = state["config"]["artifact_budget_bytes"]
        require(
            cfg.artifact_budget_bytes <= budget,
            f"{artifact} was made for ARTIFACT_BUDGET_BYTES={budget}; remove it for a larger one",
        )
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
    names = ("steps", "train_s", "tokens_per_s")
    steps, train_s, tokens_per_s = map(scores["train_end"].__getitem__, names)
    budget_s = state["config"]["max_wallclock_seconds"]
    require(is_duration(budget_s), f"max_wallclock_seconds {budget_s!r:.40} is not a duration")
    is_speed = type(tokens_per_s) is int and tokens_per_s >= 0
    require(is_speed, f"tokens_per_s {tokens_per_s!r:.40} is not a number of tokens")
    is_count = type(steps) is int and 0 < steps <= state["config"]["iterations"]
    require(is_count, f"steps {steps!r:.40} are not in [1, ITERATIONS]")
    require(
        is_duration(train_s) and train_s <= ledger["training"] + 1e-3,
        f"train_s {train_s!r:.40} is not within the training's {ledger['training']} s",
    )


def hash_bytes(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


# Training and export.


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
    sample = validation.head(cfg.val_sample_tokens)
    trainer = train(run, model, loader, lambda: evaluate(run, model, sample, cfg.score_seq_len))
    evaluate_and_log(run, model, validation, "prequant")
    hessians = dict[str, KroneckerHessian]()
    if cfg.quantizer == "gptq":
        limit_s = cfg.max_wallclock_seconds - cfg.train_seconds
        with run.stage("calibrate", "training", **({"limit_s": limit_s} if limit_s else {})):
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


MAX_COARSENING = 2  # of the matrices without late QAT by what its codes take; 1 bit a weight


def quantize_and_encode(
    run: Run, model: GPT, hessians: Mapping[str, KroneckerHessian], tokenizer_sha256: str
) -> bytes:
    """Rank 0: the bytes of the artifact; solved scales are set so that it fills the budget."""
    cfg, groups = run.cfg, group_matrices(run.cfg, model, hessians)
    encode = functools.partial(encode_model, run, model, tokenizer_sha256)
    if not cfg.solves_scales or not groups:
        return encode(groups, 1.0)
    code_bytes = (run.directory / "train_gpt.py").stat().st_size
    budget_bytes = max(1, cfg.artifact_budget_bytes - code_bytes)
    is_trained = any(group.fixed for group in groups)
    # The call that finds the grid has no tokenizer.
    if any(group.late for group in groups) and (is_trained or tokenizer_sha256):
        fresh = group_matrices(dataclasses.replace(cfg, late_qat_threshold=0.0), model, hessians)
        factor, fresh_factor = (scale_factor_for(x, 8.0 * budget_bytes) for x in (groups, fresh))
        if not is_trained:
            run.log("warning", text="late QAT has not begun; the artifact is as without it")
            groups = fresh
        elif factor > MAX_COARSENING * fresh_factor:
            # The codes that late QAT trained take so many bytes that too few are left for others.
            run.log("warning", text="the codes of late QAT take too many bytes; new scales")
            groups = fresh
    return fill_budget(groups, functools.partial(encode, groups), budget_bytes)


def encode_model(
    run: Run, model: GPT, tokenizer_sha256: str, groups: Sequence[MatrixGroup], scale_factor: float
) -> bytes:
    """The bytes of the artifact with all quantization scales times `scale_factor`."""
    run.check_signal()
    tensors = quantize_model(run.cfg, model, groups, scale_factor)
    payload = encode_artifact(run.cfg, tensors, tokenizer_sha256)
    run.log(
        "quantized",
        multiplier=scale_factor,
        artifact_bytes=len(payload),
        **code_statistics(tensors),
    )
    return payload


# Rules and results.


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
# Scores of the artifact, in the order in which a run computes them; the last one is the result.
FINAL_SCORES = ("final_quantized", "final_sliding", "final_ttt")


def final_score(scores: Collection[str]) -> str:
    """The log event of the last complete pass over the artifact, whose score is the result."""
    return [name for name in FINAL_SCORES if name in scores][-1]


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
    final = final_score(scores)
    score, overruns = scores[final], find_overruns(budget)
    reasons = [*overruns, *find_loose_budgets(track, budget)]
    if score["partial"]:
        reasons.append("the score covers only a part of the validation text")
    elif not score["compliant"]:
        reasons.append("ALLOW_NONCOMPLIANT=1 allows a method that the rules forbid")
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
    """Raise RunFailed if there are any problems."""
    if problems:
        raise RunFailed("; ".join(problems))


def write_submission(run: Run, sizes: Mapping[str, int], groups: Mapping[str, int]) -> None:
    """Write submission.json; RunFailed if a budget or TARGET_VAL_BPB was exceeded."""
    cfg, budget = run.cfg, log_budget(run, sizes)
    verdict = judge(cfg.track, run.scores, budget)
    budget["bytes"]["groups"] = groups
    score = run.scores[verdict.final]
    train_end = run.scores.get("train_end", {"steps": 0, "train_s": 0.0})
    if "train_end" not in run.scores:
        verdict.reasons.append("RUN_DIR does not hold the training of the artifact")
    result = {
        "val_bpb": score["val_bpb"],
        "val_loss": score["val_loss"],
        "steps": train_end["steps"],
        "train_s": train_end["train_s"],
        "eval_s": budget["time"]["evaluation_s"],
        "artifact_bytes": sizes["artifact_bytes"],
        **({"adjusted": score["adjusted"]} if score.get("adjusted") else {}),
        **({"skipped": skipped} if (skipped := run.scores["final"]["notes"]) else {}),
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


def estimate_bytes(cfg: Config, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes of weights (by quantization group before compression) and code, and the budget.

    With solved scales the artifact fills the budget, which gives the bits of a weight.
    """
    code_bytes = len(packed_script())
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
        "bits_per_weight": round(8 * weight_bytes / sum(sizes.values()), 3),
    }


# Signals and errors.


def raise_interrupted(number: int, frame: Any) -> None:
    """Signal handler outside of a run's loops, where nothing has to be saved."""
    ignore_signals()
    raise Interrupted("stopped by a signal")


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT from now on."""
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


def report_error(error: Exception, env: Mapping[str, str]) -> int:
    """Print an error once for all ranks that have it, and return the exit status.

    A rank above 0 waits, and prints its error if rank 0 has reported none.
    """
    status = {InputError: 2, Interrupted: 143}.get(type(error), 1)
    text, rank = f"{type(error).__name__}: {error}", env.get("RANK") or "0"
    if rank == "0" or not (env.get("WORLD_SIZE") or "").isdecimal():
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
    """Count this rank under `key` in the process group's store, if there is one."""
    count_posts(key, 1)


def posted(key: str) -> int:
    """How many ranks have posted `key`; 1 if rank 0, which may hold the store, has ended."""
    return count_posts(key, 0)


def count_posts(key: str, added: int) -> int:
    """Add to the counter `key` in the store and return it; 0 without a process group."""
    if not dist.is_initialized():
        return 0
    try:
        return int(dist.distributed_c10d._get_default_store().add(key, added))
    except RuntimeError:
        return 1


if __name__ == "__main__":
    os._exit(main())  # without the interpreter's teardown, which signals and gloo can abort
