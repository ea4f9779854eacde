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
import importlib
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
    """Declare one field set by the environment variable of its name.

    `meta` may give a unit, the inclusive bounds low and high, choices, and shape: whether the
    artifact's header carries the knob, as it does for the model's shape and the seed.
    """
    unset = {"unit": "", "low": None, "high": None, "choices": (), "shape": False}
    assert meta.keys() <= unset.keys(), f"unknown: {meta.keys() - unset.keys()}"
    return field(default=default, metadata={"doc": doc, **unset, **meta})


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every knob of the script; an environment variable has the field's name in capitals."""

    # fmt: off
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
    loader: str = knob("stream", "order of training windows", choices=("stream", "shuffled"))
    isolate_documents: bool = knob(False, "attention does not cross document starts (BOS)", shape=True)  # noqa: E501
    train_seq_len: int = knob(1024, "training context", unit="tokens", low=1, high=2**20, shape=True)  # noqa: E501
    train_batch_tokens: int = knob(524_288, "tokens of one optimizer step, over all ranks", unit="tokens", low=1)  # noqa: E501
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
    init: str = knob("default", "initial matrices: uniform fan-in or orthogonal; outputs are zero", choices=("default", "orthogonal"))  # noqa: E501
    logit_softcap: float = knob(30.0, "logits are cap * tanh(z / cap)", low=1e-3, shape=True)
    rope_base: float = knob(10_000.0, "base of the rotary frequencies", low=1, shape=True)
    rope_dims: int = knob(0, "rotated channels of a head; 0 = all", unit="channels", low=0, shape=True)  # noqa: E501
    qk_gain_init: float = knob(1.5, "initial gain of each query head", low=0)
    ln_scale: bool = knob(False, "normed inputs of block i are scaled by 1/sqrt(i + 1)", shape=True)
    skip_gates: bool = knob(False, "U-net skips are gated blends instead of sums", shape=True)
    xsa_last_n: int = knob(0, "last blocks whose attention drops its own value direction", low=0, shape=True)  # noqa: E501
    # Optimization
    embed_lr: float = knob(0.6, "Adam, embedding if untied", low=0)
    head_lr: float = knob(0.008, "Adam, head if untied", low=0)
    tied_embed_lr: float = knob(0.05, "Adam, embedding if tied", low=0)
    scalar_lr: float = knob(0.04, "Adam, vectors and scalars", low=0)
    adam_wd: float = knob(0.0, "decoupled weight decay of all Adam groups", low=0)
    beta1: float = knob(0.9, "Adam", low=0, high=0.9999)
    beta2: float = knob(0.95, "Adam", low=0, high=0.99999)
    adam_eps: float = knob(1e-8, "Adam", low=1e-20)
    matrix_lr: float = knob(0.04, "Muon, block matrices", low=0)
    muon_momentum: float = knob(0.95, "Muon, after its ramp", low=0, high=0.9999)
    muon_momentum_warmup_start: float = knob(0.85, "Muon momentum at step 0", low=0, high=0.9999)
    muon_momentum_warmup_steps: int = knob(500, "length of the momentum ramp", unit="steps", low=0)
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", low=1, high=20)
    muon_coefficients: str = knob("classic", "Newton-Schulz polynomial", choices=("classic", "polar"))  # noqa: E501
    muon_row_norm: bool = knob(False, "normalise the update's rows before Newton-Schulz")
    muon_wd: float = knob(0.0, "decoupled weight decay of Muon", low=0)
    grad_clip_norm: float = knob(0.0, "bound of the global gradient norm; 0 = none", low=0)
    # Schedule
    iterations: int = knob(20_000, "most optimizer steps", unit="steps", low=1)
    max_wallclock_seconds: float = knob(600.0, "training budget; 0 = none", unit="s", low=0)
    warmup_steps: int = knob(20, "steps that only trigger compilation; their effect is undone", unit="steps", low=0)  # noqa: E501
    warmdown_frac: float = knob(0.5, "share of training with falling learning rate", low=0, high=1)
    warmdown_iters: int = knob(0, "the same in steps of the measured pace; 0 = WARMDOWN_FRAC", unit="steps", low=0)  # noqa: E501
    min_lr: float = knob(0.0, "floor of the learning rate multiplier", low=0, high=1)
    averaging: str = knob("none", "weights that are exported", choices=("none", "ema", "swa"))
    ema_decay: float = knob(0.997, "decay of the moving average a step", low=0, high=0.999999)
    swa_start_lr: float = knob(0.4, "SWA collects while the multiplier is below", low=0, high=1)
    swa_every: int = knob(50, "steps between collected weights", unit="steps", low=1)
    train_log_every: int = knob(200, "steps between log lines", unit="steps", low=1)
    val_loss_every: int = knob(1000, "steps between validations; 0 = none", unit="steps", low=0)
    # Artifact
    attn_bits: int = knob(8, "bits of attention matrices", unit="bits", low=4, high=8)
    mlp_bits: int = knob(8, "bits of MLP matrices", unit="bits", low=4, high=8)
    embed_bits: int = knob(8, "bits of embedding and head", unit="bits", low=4, high=8)
    compressor: str = knob("zlib", "last stage of the artifact", choices=("zlib", "zstd", "lzma", "brotli"))  # noqa: E501
    artifact_budget_bytes: int = knob(16_000_000, "most bytes of packed code and artifact", unit="bytes", low=1)  # noqa: E501
    artifact: str = knob("", "artifact to score in MODE=eval; empty = RUN_DIR/artifact.bin")
    # Evaluation
    eval_seq_len: int = knob(0, "evaluation context; 0 = TRAIN_SEQ_LEN", unit="tokens", low=0)
    eval_stride: int = knob(64, "targets scored by each sliding window; 0 = no sliding pass", unit="tokens", low=0)  # noqa: E501
    val_batch_size: int = knob(524_288, "tokens of one evaluation step, over all ranks", unit="tokens", low=1)  # noqa: E501
    val_tokens_limit: int = knob(0, "score only the first tokens, marked partial; 0 = all", unit="tokens", low=0)  # noqa: E501
    eval_max_seconds: float = knob(600.0, "evaluation budget; 0 = none", unit="s", low=0)
    # fmt: on

    def __post_init__(self) -> None:
        problems = [p for f in fields(self) if (p := out_of_range(f, getattr(self, f.name)))]
        with contextlib.suppress(ZeroDivisionError):  # of a 0 that is among the problems already
            problems += contradictions(self)
        if problems:
            raise InputError("invalid configuration:\n  " + "\n  ".join(problems))

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


def contradictions(cfg: Config) -> list[str]:
    """What is wrong between knobs that are each in range."""
    heads, context = cfg.num_heads, cfg.score_seq_len
    rules = {
        f"NUM_HEADS={heads} must divide MODEL_DIM={cfg.model_dim}": cfg.model_dim % heads == 0,
        f"NUM_KV_HEADS={cfg.num_kv_heads} must divide NUM_HEADS={heads}": (
            heads % cfg.num_kv_heads == 0
        ),
        f"ROPE_DIMS={cfg.rope_dims} (0 = the head's width) must be even and at most MODEL_DIM/"
        f"NUM_HEADS={cfg.head_dim}": cfg.rotary_dims % 2 == 0 and cfg.rotary_dims <= cfg.head_dim,
        f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} must be a multiple of "
        f"TRAIN_SEQ_LEN={cfg.train_seq_len}": (
            cfg.mode == "eval" or cfg.train_batch_tokens % cfg.train_seq_len == 0
        ),
        f"EVAL_STRIDE={cfg.eval_stride} must be at most the evaluation context {context} "
        "(EVAL_SEQ_LEN or TRAIN_SEQ_LEN)": cfg.eval_stride <= context,
        f"MUON_BACKEND_STEPS={cfg.muon_backend_steps} must be at most {len(NS_POLAR_EXPRESS)} "
        "with MUON_COEFFICIENTS=polar": (
            cfg.muon_coefficients != "polar" or cfg.muon_backend_steps <= len(NS_POLAR_EXPRESS)
        ),
        f"XSA_LAST_N={cfg.xsa_last_n} must be at most NUM_LAYERS={cfg.num_layers}": (
            cfg.xsa_last_n <= cfg.num_layers
        ),
    }
    return [text for text, holds in rules.items() if not holds]


BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
# Parts of a name that no foreign variable has: a name with one of them is a misspelt knob.
OUR_WORDS = {
    "TTT", "MUON", "GPTQ", "EMA", "SWA", "LORA", "WARMDOWN", "QAT", "XSA", "SOFTCAP", "ROPE",
    "BIGRAM", "TRIGRAM", "LQER", "STRIDE", "BPB",
}  # fmt: skip


def out_of_range(f: dataclasses.Field[Any], value: Any) -> str:
    """What is wrong with `value` for this knob, or an empty string."""
    meta, name = f.metadata, f.name.upper()
    if meta["choices"] and value not in meta["choices"]:
        return f"{name}={value!r} must be one of {', '.join(meta['choices'])}"
    low, high = meta["low"], meta["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
        return f"{name}={value} must be {bounds} ({meta['doc']})"
    return ""


def parse_value(text: str, kind: type) -> Any:
    """`text` as a bool, int, finite float or str; ValueError if it is not one."""
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(text)
        return BOOLEANS[text.lower()]
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def read_recipe(path: Path) -> dict[str, str]:
    """The KEY=value lines of a recipe; empty lines and # comments are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"RECIPE={path} cannot be read: {error}") from error
    settings: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or name.strip() not in {f.name.upper() for f in fields(Config)}:
            raise InputError(f"{path}:{number}: {line!r} is not KNOB=value of a known knob")
        settings[name.strip()] = value.strip()
    return settings


def config_from_env(env: Mapping[str, str]) -> Config:
    """Build the Config from `env` over its RECIPE; one ValueError lists every bad variable."""
    settings = {**read_recipe(Path(env["RECIPE"])), **env} if env.get("RECIPE") else env
    kinds = {name.upper(): kind for name, kind in get_type_hints(Config).items()}
    values: dict[str, Any] = {}
    problems: list[str] = []
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
    if problems:
        raise InputError("invalid environment:\n  " + "\n  ".join(problems))
    return cfg


def changed_knobs(cfg: Config) -> list[str]:
    """Names of the knobs that differ from their defaults, in capitals, sorted."""
    return sorted(f.name.upper() for f in fields(cfg) if getattr(cfg, f.name) != f.default)


# --- 2. Run context ------------------------------------------------------------------------------
# Who computes where, what is written down, and where the seconds went. All files are written to a
# temporary name, synced and renamed, so that a kill at any moment leaves old or new, never half.


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[io.BufferedWriter]:
    """Open a temporary file beside `path` for writing; rename it to `path` on a clean exit."""
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


def write_atomic(path: Path, payload: bytes) -> None:
    with atomic_file(path) as file:
        file.write(payload)


def format_event(event: str, **values: Any) -> str:
    """`event key:value ...`, greppable; a key with a unit ends in it (_s, _ms, _bytes)."""
    shown = []
    for key, value in values.items():
        text = f"{value:.8g}" if isinstance(value, float) else str(value)
        shown.append(f"{key}:{json.dumps(text) if ' ' in text or not text else text}")
    return " ".join([event, *shown])


def read_cpuinfo() -> str:
    """What Linux says of the processor; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: on the GPU its allocator's peak, else the process's peak RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


BUDGETS = ("training", "evaluation", "other")


@dataclass(kw_only=True)
class Run:
    """Ranks, device, precision, log and time ledger of one process of a run."""

    cfg: Config
    directory: Path
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    ledger: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUDGETS, 0.0))
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    signal_received: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def log(self, event: str, **values: Any) -> None:
        """Rank 0: one line to the console, to train.log and to metrics.jsonl."""
        if not self.is_main:
            return
        line = format_event(event, **values)
        print(line, flush=True)
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
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def check_signal(self) -> None:
        if self.signal_received:
            raise Interrupted("stopped by a signal; start again with the same RUN_DIR to go on")

    def save_state(self) -> None:
        """Rank 0: write ledger and scores, for a continuation after the artifact exists."""
        if self.is_main:
            state = {"ledger": self.ledger, "scores": self.scores}
            state["config"] = dataclasses.asdict(self.cfg)
            write_atomic(self.directory / "run_state.json", json.dumps(state).encode())

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
        device = torch.device("cpu")
        has_units = any(flag in read_cpuinfo() for flag in ("amx_bf16", "avx512_bf16"))
    bf16 = has_units if cfg.precision == "auto" else cfg.precision == "bf16"
    return device, torch.bfloat16 if bf16 else torch.float32


@contextlib.contextmanager
def start_run(cfg: Config, env: Mapping[str, str]) -> Generator[Run]:
    """Join the process group that torchrun's variables describe; make the folder; hear signals."""
    device, dtype = open_device(cfg, env)
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run = Run(
        cfg=cfg, directory=Path(), rank=rank, world_size=world_size, device=device, dtype=dtype
    )
    run_id = cfg.run_id or run.share(f"{datetime.datetime.now():%Y-%m-%d_%H%M%S}_{os.getpid()}")
    run.directory = Path(cfg.run_dir or Path("logs") / run_id)

    def on_signal(number: int, frame: Any) -> None:
        run.signal_received = True

    previous = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        if run.is_main:
            run.directory.mkdir(parents=True, exist_ok=True)
        yield run
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if world_size > 1:
            dist.destroy_process_group()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "numpy": np.__version__,
        "sentencepiece": str(sentencepiece.__version__),
    }


def describe_hardware(run: Run) -> str:
    """One phrase: how many of which device."""
    if run.device.type == "cuda":
        return f"{run.world_size} x {torch.cuda.get_device_name(run.device)}"
    lines = [line for line in read_cpuinfo().splitlines() if line.startswith("model name")]
    name = lines[0].partition(":")[2].strip() if lines else platform.machine()
    return f"{os.cpu_count()} CPU cores, {name}"


def log_setup(run: Run) -> None:
    """Head of the log: configuration (* = not the default), versions, hardware, the source."""
    cfg, changed = run.cfg, set(changed_knobs(run.cfg))
    values = {name.upper(): value for name, value in dataclasses.asdict(cfg).items()}
    for name in sorted(values):
        run.append("train.log", f"config {'*' if name in changed else ' '} {name}:{values[name]}")
    event = {"event": "config", "values": values, "changed": sorted(changed)}
    run.append("metrics.jsonl", json.dumps(event))
    source = own_source()
    run.log(
        "run",
        run_id=cfg.run_id or run.directory.name,
        mode=cfg.mode,
        seed=cfg.seed,
        ranks=run.world_size,
        device=run.device.type,
        precision=str(run.dtype).removeprefix("torch."),
        compile=cfg.compile,
        attention=choose_attention(cfg, run.device, run.dtype).name,
        run_dir=str(run.directory),
    )
    run.log("versions", **versions(), source_sha256=hashlib.sha256(source.encode()).hexdigest())
    run.log("hardware", name=describe_hardware(run))
    run.append("train.log", f"{'=' * 30} source {'=' * 30}\n{source}\n{'=' * 68}")
    if run.is_main:
        write_atomic(run.directory / "train_gpt_source.py", source.encode())


# --- 3. Data -------------------------------------------------------------------------------------
# Shards of uint16 token ids as published for FineWeb. Which window holds which tokens is a pure
# function of (seed, window index), so that a resumed run sees what an uninterrupted one would.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_HEADER_BYTES = SHARD_HEADER_INTS * 4
BOS_ID = 1


def write_shard(path: Path, ids: np.ndarray) -> None:
    """Write token ids (any integer type, values below 65,536) as one shard, atomically."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(ids)
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(ids, dtype="<u2").tobytes())


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the token ids of a shard; ValueError if the file is not a whole, valid one."""
    size = path.stat().st_size
    header = [*np.fromfile(path, dtype="<i4", count=3).tolist(), None, None, None][:3]
    magic, version, count = header
    remedy = "make it again with data/prepare.py or data/download.py"
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise InputError(
            f"{path}: {size} bytes, magic {magic} version {version}, expected {SHARD_MAGIC} and "
            f"{SHARD_VERSION}: not a token shard; {remedy}"
        )
    if count is None or size != (expected := SHARD_HEADER_BYTES + 2 * count):
        raise InputError(
            f"{path}: {size} bytes, but its header says {count} tokens = {expected} bytes: "
            f"damaged; {remedy}"
        )
    if count == 0:
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


class ByteTable:
    """UTF-8 bytes that each target token stands for, given the token before it.

    A piece that begins with the space marker counts one byte for it unless a control token
    precedes (a decoder drops that space); byte pieces count 1, control pieces 0.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, vocab_size: int):
        pieces = processor.get_piece_size()
        if pieces != vocab_size:
            raise InputError(f"VOCAB_SIZE={vocab_size} does not match the tokenizer's {pieces}")
        if processor.piece_to_id("\u2581") == processor.unk_id():
            raise InputError(
                "the tokenizer has no piece for a single space, so spaces would count as three "
                "bytes; train it with data/prepare.py"
            )
        self.base_bytes = np.zeros(vocab_size, dtype=np.int64)
        self.leading_space = np.zeros(vocab_size, dtype=bool)
        self.boundary = np.ones(vocab_size, dtype=bool)
        for token in range(vocab_size):
            if processor.is_control(token) or processor.is_unknown(token):
                continue
            if processor.is_unused(token):
                continue
            self.boundary[token] = False
            piece = processor.id_to_piece(token)
            if processor.is_byte(token):
                self.base_bytes[token] = 1
                continue
            self.leading_space[token] = piece.startswith("\u2581")
            # Only the marker at the front is conditional; the rest are ordinary spaces.
            text = piece.removeprefix("\u2581").replace("\u2581", " ")
            self.base_bytes[token] = len(text.encode("utf-8"))

    def count(self, targets: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Bytes of each target (int64), given the token before each."""
        space = self.leading_space[targets] & ~self.boundary[previous]
        return self.base_bytes[targets] + space


def load_tokenizer(cfg: Config) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """The tokenizer and the SHA-256 of its file; ValueError if it is missing or unreadable."""
    beside = Path(cfg.data_path) / "tokenizer.model"
    published = Path(cfg.data_path).parent.parent / f"tokenizers/fineweb_{cfg.vocab_size}_bpe.model"
    candidates = [Path(cfg.tokenizer_path)] if cfg.tokenizer_path else [beside, published]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InputError(
            f"no tokenizer at {' or '.join(map(str, candidates))}; set TOKENIZER_PATH, or make "
            f"the data set: python data/prepare.py --source stdlib --out {cfg.data_path}"
        )
    payload = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=payload or b"empty")
    except RuntimeError as error:
        raise InputError(f"{path} is not a SentencePiece model: {error}") from error
    return processor, hashlib.sha256(payload).hexdigest()


def find_shards(cfg: Config, part: str) -> list[Path]:
    """Sorted shards of `part` (train, val or val_bytes); ValueError if a needed part is missing."""
    paths = sorted(Path(cfg.data_path).glob(f"*_{part}_[0-9]*.bin"))
    if not paths and part != "val_bytes":
        raise InputError(
            f"DATA_PATH={cfg.data_path} holds no *_{part}_*.bin shard; make one with\n"
            f"  python data/prepare.py --source stdlib --out {cfg.data_path}\n"
            "or fetch the published ones with data/download.py"
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
        start %= self.num_tokens
        while count > 0:
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            piece = self.shards[shard][start - self.starts[shard] :][:count]
            pieces.append(np.asarray(piece, dtype=np.int64))
            count -= len(piece)
            start = (start + len(piece)) % self.num_tokens
        ids = np.concatenate(pieces)
        if ids.size and ids.max() >= self.vocab_size:
            raise InputError(
                f"token id {ids.max()} in {self.paths[0].parent} does not fit "
                f"VOCAB_SIZE={self.vocab_size}: the shards belong to another tokenizer"
            )
        return ids


class StreamPlan:
    """Windows in the order of the data, from a document start that the seed chooses."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        if stream.num_tokens < seq_len + 1:
            raise InputError(
                f"{stream.num_tokens} training tokens are fewer than TRAIN_SEQ_LEN={seq_len} + 1"
            )
        self.seq_len = seq_len
        guess = int(np.random.default_rng(seed).integers(stream.num_tokens))
        ahead = np.flatnonzero(stream.read(guess, min(1 << 20, stream.num_tokens)) == BOS_ID)
        self.first = guess + (int(ahead[0]) if ahead.size else 0)

    def start(self, window: int) -> int:
        """Position in the stream of the first token of the n-th window of the run."""
        return self.first + window * self.seq_len


class ShuffledPlan:
    """Every window of every shard once an epoch, in random order, from a random phase a shard.

    A permutation of all windows is what drawing shards by their remaining windows and windows
    at random amounts to (techniques: ShuffledSequenceLoader, #1394); this one depends on SEED.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        self.stream, self.seq_len, self.seed = stream, seq_len, seed
        # One window is given up so that the count is the same at every phase.
        self.counts = [max(0, (size - seq_len) // seq_len) for size in stream.sizes]
        self.num_windows = sum(self.counts)
        if self.num_windows == 0:
            raise InputError(
                f"no training shard holds two windows of TRAIN_SEQ_LEN={seq_len} tokens, which "
                "LOADER=shuffled needs"
            )
        self.epochs: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """Start positions of all windows of an epoch, in the order they are visited."""
        if epoch not in self.epochs:
            rng = np.random.default_rng([self.seed, epoch])
            starts = [
                first + int(rng.integers(self.seq_len)) + np.arange(count) * self.seq_len
                for first, count in zip(self.stream.starts, self.counts, strict=False)
                if count
            ]
            self.epochs = {epoch: rng.permutation(np.concatenate(starts))}
        return self.epochs[epoch]

    def start(self, window: int) -> int:
        """Position in the stream of the first token of the n-th window of the run."""
        epoch, index = divmod(window, self.num_windows)
        return int(self.order(epoch)[index])


LOADERS: dict[str, Any] = {"stream": StreamPlan, "shuffled": ShuffledPlan}


class BatchLoader:
    """Batches of training windows for one rank; the next one is read while this one is used."""

    def __init__(self, cfg: Config, stream: TokenStream, *, rank: int, world_size: int):
        rows = cfg.train_batch_tokens // cfg.train_seq_len
        if rows % world_size:
            raise InputError(
                f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} / TRAIN_SEQ_LEN={cfg.train_seq_len} "
                f"= {rows} rows do not divide over {world_size} ranks; use a multiple of "
                f"{cfg.train_seq_len * world_size} tokens"
            )
        self.stream, self.seq_len = stream, cfg.train_seq_len
        self.rows, self.rank, self.world_size = rows // world_size, rank, world_size
        self.plan: StreamPlan | ShuffledPlan = LOADERS[cfg.loader](
            stream, cfg.train_seq_len, cfg.seed
        )
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.ahead: dict[int, Future[Tensor]] = {}

    def read(self, step: int) -> Tensor:
        """This rank's rows of batch `step`: (rows, T + 1) ids; a function of seed and step."""
        first = (step * self.world_size + self.rank) * self.rows
        starts = [self.plan.start(first + row) for row in range(self.rows)]
        windows = [self.stream.read(start, self.seq_len + 1) for start in starts]
        return torch.from_numpy(np.stack(windows))

    def batch(self, step: int) -> Tensor:
        """What `read` returns, prefetched if the batches are asked for in order."""
        pending = self.ahead.pop(step, None) or self.executor.submit(self.read, step)
        self.ahead = {step + 1: self.executor.submit(self.read, step + 1)}
        return pending.result()


@dataclass(kw_only=True)
class Validation:
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
    limit = stream.num_tokens
    if cfg.val_tokens_limit:
        limit = min(limit, cfg.val_tokens_limit + 1)
    if limit < 2:
        raise InputError(f"DATA_PATH={cfg.data_path}: {limit} validation tokens; 2 are the least")
    ids = stream.read(0, limit)
    table = ByteTable(processor, cfg.vocab_size)
    if sidecars := find_shards(cfg, "val_bytes"):
        sidecar = TokenStream(sidecars, 65_536)
        if sidecar.num_tokens != stream.num_tokens:
            raise InputError(
                f"{sidecars[0]}: {sidecar.num_tokens} byte counts for {stream.num_tokens} "
                "validation tokens; sidecar and shards belong to different data sets"
            )
        target_bytes = sidecar.read(0, limit)[1:]
    else:
        target_bytes = table.count(ids[1:], ids[:-1])
    return Validation(
        ids=ids.astype(np.uint16), target_bytes=target_bytes, partial=limit < stream.num_tokens
    )


# --- 4. Model ------------------------------------------------------------------------------------
# One forward pass serves training, calibration, evaluation and adaptation: GPT.forward walks the
# list of visits that plan_visits computes. Parameters are float32; Linear casts them to the dtype
# of the stream. Optional parts are None modules or sizes; none is a second path.


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension; no learned weight (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(cfg: Config, num_positions: int) -> Tensor:
    """cos and sin, (2, num_positions, ROPE_DIMS / 2) in float32 (RoFormer, arXiv:2104.09864).

    Beyond the training context the base grows (NTK scaling), so that the slowest frequency spans
    the longer text as it spanned the shorter.
    """
    dims, base = cfg.rotary_dims, cfg.rope_base
    if num_positions > cfg.train_seq_len and dims > 2:
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
    if not isolate:
        return None
    doc_BT = document_index(ids_BT)
    return (doc_BT[:, None, :, None] == doc_BT[:, None, None, :]).tril()


def sdpa_attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's scaled dot product attention: the reference for every other kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )
    return y.transpose(1, 2)


def flash_prepare(ids_BT: Tensor, isolate: bool) -> Tensor | None:
    """Cumulative sequence lengths of the flattened rows cut at each BOS, or None.

    The count is padded to a multiple of 64 by empty sequences, so that few shapes occur.
    """
    if not isolate:
        return None
    starts = ids_BT == BOS_ID
    starts[:, 0] = True
    cuts = starts.flatten().nonzero().flatten().to(torch.int32)
    padding = 64 - len(cuts) % 64
    return F.pad(cuts, (0, padding), value=ids_BT.numel())


def flash_attend(
    kernels: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, cuts: Tensor | None
) -> Tensor:
    """FlashAttention-2 or -3, whichever module `kernels` is (arXiv:2307.08691, 2407.08608)."""
    if cuts is None:
        y = kernels.flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True)
    else:
        flat = (x.flatten(0, 1) for x in (q_BTHE, k_BTKE, v_BTKE))
        longest = q_BTHE.size(1)
        y = kernels.flash_attn_varlen_func(
            *flat, cu_seqlens_q=cuts, cu_seqlens_k=cuts,
            max_seqlen_q=longest, max_seqlen_k=longest, causal=True,
        )  # fmt: skip
    y = y[0] if isinstance(y, tuple) else y  # some builds return the log-sum-exp as well
    return y.view_as(q_BTHE)


def make_flash(name: str, module_name: str) -> Attention:
    """The kernel of an installed FlashAttention package; ImportError if there is none."""
    kernels = importlib.import_module(module_name)
    return Attention(name, flash_prepare, functools.partial(flash_attend, kernels))


def flex_prepare(ids_BT: Tensor, isolate: bool) -> Any:
    """Block mask of what each position sees; blocks that documents empty are skipped."""
    doc_BT = document_index(ids_BT) if isolate else torch.zeros_like(ids_BT)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (doc_BT[b, q] == doc_BT[b, k])

    B, T = ids_BT.shape
    return flex_attention.create_block_mask(visible, B, None, T, T, device=str(ids_BT.device))


def flex_attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: Any) -> Tensor:
    """PyTorch's flex attention: a fused kernel inside a compiled block, slow but exact outside."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    y = flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    return y.transpose(1, 2)


ATTENTIONS: dict[str, Callable[[], Attention]] = {
    "fa3": lambda: make_flash("fa3", "flash_attn_interface"),
    "fa2": lambda: make_flash("fa2", "flash_attn"),
    "flex": lambda: Attention("flex", flex_prepare, flex_attend),
    "sdpa": lambda: Attention("sdpa", sdpa_prepare, sdpa_attend),
}


def choose_attention(cfg: Config, device: torch.device, dtype: torch.dtype) -> Attention:
    """The kernel that ATTENTION names, or the best that is installed and suits the device."""
    if cfg.attention == "flex" and device.type == "cpu" and cfg.mode in ("all", "train"):
        raise InputError("ATTENTION=flex has no gradients on a CPU; use ATTENTION=sdpa")
    if cfg.attention != "auto":
        try:
            return ATTENTIONS[cfg.attention]()
        except ImportError as error:
            raise InputError(f"ATTENTION={cfg.attention} is not installed: {error}") from error
    if device.type == "cuda" and dtype == torch.bfloat16:
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        for name in ("fa3", "fa2") if hopper else ("fa2",):
            with contextlib.suppress(ImportError):
                return ATTENTIONS[name]()
    # A dense document mask costs T^2 bytes and forbids the fast kernel; flex skips its blocks.
    use_flex = cfg.isolate_documents and device.type == "cuda" and cfg.compile
    return ATTENTIONS["flex" if use_flex else "sdpa"]()


class Linear(nn.Linear):
    """float32 weight (O, I), cast to the input's dtype; an adapter adds its own output."""

    def __init__(self, in_features: int, out_features: int, *, zero_init: bool = False):
        super().__init__(in_features, out_features, bias=False)
        self.zero_init = zero_init
        self.adapter: nn.Module | None = None  # on the instance: a class attribute would hide it

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)


def exclude_self(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """Drop the part of each head's output along its position's own value (arXiv:2603.09078)."""
    B, T, H, E = y_BTHE.shape
    K = v_BTKE.size(2)
    y_BTKGE = y_BTHE.view(B, T, K, H // K, E)
    unit_BTK1E = F.normalize(v_BTKE, dim=-1)[:, :, :, None]
    own = (y_BTKGE * unit_BTK1E).sum(dim=-1, keepdim=True)
    return (y_BTKGE - own * unit_BTK1E).view(B, T, H, E)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normed queries and keys: norm, then rotary, then gain."""

    def __init__(self, cfg: Config, layer: int, attention: Attention):
        super().__init__()
        D, H, K, E = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, E
        self.c_q = Linear(D, H * E)
        self.c_k = Linear(D, K * E)
        self.c_v = Linear(D, K * E)
        self.proj = Linear(H * E, D, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((H,), cfg.qk_gain_init))
        self.use_xsa = layer >= cfg.num_layers - cfg.xsa_last_n
        self.attend = attention.attend

    def forward(self, x_BTD: Tensor, rotary_2TE: Tensor, mask: Any) -> Tensor:
        """Attention's output (B, T, D); `mask` is what the kernel's `prepare` returned."""
        B, T, _ = x_BTD.shape
        q_BTHE = self.c_q(x_BTD).view(B, T, self.num_heads, self.head_dim)
        k_BTKE = self.c_k(x_BTD).view(B, T, self.num_kv_heads, self.head_dim)
        v_BTKE = self.c_v(x_BTD).view(B, T, self.num_kv_heads, self.head_dim)
        q_BTHE = rotate(rms_norm(q_BTHE), rotary_2TE) * self.q_gain.to(x_BTD.dtype)[:, None]
        k_BTKE = rotate(rms_norm(k_BTKE), rotary_2TE)
        y_BTHE = self.attend(q_BTHE, k_BTKE, v_BTKE, mask)
        if self.use_xsa:
            y_BTHE = exclude_self(y_BTHE, v_BTKE)
        return self.proj(y_BTHE.reshape(B, T, -1))


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


class Block(nn.Module):
    """Mix in the embedding, then attention, then MLP, each with a learned scale a channel."""

    def __init__(self, cfg: Config, layer: int, attention: Attention):
        super().__init__()
        D = cfg.model_dim
        self.attn = CausalSelfAttention(cfg, layer, attention)
        self.mlp = MLP(cfg)
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(D), torch.zeros(D)]))
        # A tensor, not a number: one compiled graph then serves the blocks of every depth.
        scale = torch.tensor((layer + 1) ** -0.5) if cfg.ln_scale else None
        self.norm_scale: Tensor | None
        self.register_buffer("norm_scale", scale, persistent=False)

    def norm(self, x_BTD: Tensor) -> Tensor:
        """Input of attention and of the MLP: normed, and scaled by depth if LN_SCALE."""
        n_BTD = rms_norm(x_BTD)
        return n_BTD if self.norm_scale is None else n_BTD * self.norm_scale.to(n_BTD.dtype)

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, rotary_2TE: Tensor, mask: Any) -> Tensor:
        """The stream after this block; x0 is the normed embedding."""
        keep, inject = self.resid_mix.to(x_BTD.dtype)
        x_BTD = keep * x_BTD + inject * x0_BTD
        attn_scale, mlp_scale = self.attn_scale.to(x_BTD.dtype), self.mlp_scale.to(x_BTD.dtype)
        x_BTD = x_BTD + attn_scale * self.attn(self.norm(x_BTD), rotary_2TE, mask)
        return x_BTD + mlp_scale * self.mlp(self.norm(x_BTD))


def run_block(block: nn.Module, *args: Any) -> Tensor:
    """Call `block`: the unit that is compiled, one graph for all blocks of a kind."""
    return block(*args)


class Visit(NamedTuple):
    """One step of the forward pass."""

    block: int  # whose weights run
    skip: int | None  # row of skip_weights with which the last saved output is added first
    save: bool  # whether the output is put on the stack of saved ones


def plan_visits(num_layers: int) -> list[Visit]:
    """Order in which blocks run: a U-Net whose second half takes the first half's outputs back.

    The deepest saved output is used first.
    """
    half = num_layers // 2
    encoder = [Visit(block, skip=None, save=True) for block in range(half)]
    decoder = [
        Visit(half + row, skip=row if row < half else None, save=False)
        for row in range(num_layers - half)
    ]
    return encoder + decoder


def softcapped_nll(
    z_NV: Tensor, target_N: Tensor, weight_N: Tensor | None, cap: float
) -> tuple[Tensor, Tensor | None]:
    """Nats of each target under softmax(cap * tanh(z / cap)), in float32.

    With weights also d(sum of weight * nats)/dz, in the dtype of z.
    """
    tanh_NV = torch.tanh(z_NV.float() / cap)
    logits_NV = cap * tanh_NV
    total_N1 = logits_NV.logsumexp(dim=1, keepdim=True)
    is_target_NV = torch.arange(z_NV.size(1), device=z_NV.device) == target_N[:, None]
    nll_N = total_N1[:, 0] - torch.where(is_target_NV, logits_NV, 0).sum(dim=1)
    if weight_N is None:
        return nll_N, None
    softmax_NV = (logits_NV - total_N1).exp()
    grad_NV = torch.where(is_target_NV, softmax_NV - 1, softmax_NV)
    grad_NV = grad_NV * (1 - tanh_NV.square()) * weight_N[:, None]
    return nll_N, grad_NV.to(z_NV.dtype)


# Logits of this many numbers exist at a time (64 MiB in float32): large enough for full speed.
LOSS_CHUNK_NUMBERS = 2**24


class ChunkedLoss(torch.autograd.Function):
    """Weighted sum of softcapped cross-entropies; the logits exist for one chunk at a time.

    The gradient is computed together with the loss, while the chunk's logits are there, and is
    scaled by the incoming gradient in backward: one product of logits instead of two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets: tuple[Tensor, Tensor],
        nll: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Loss (scalar, float32) and the nats of each target (N, not differentiable)."""
        (target_N, weight_N), head = targets, head_VD.to(x_ND.dtype)
        chunk = max(1, LOSS_CHUNK_NUMBERS // len(head))
        nll_N = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        grad_x_ND = torch.empty_like(x_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        for n in range(0, len(x_ND), chunk):
            rows = slice(n, n + chunk)
            z_NV = x_ND[rows] @ head.T
            nll_N[rows], grad_NV = nll(z_NV, target_N[rows], weight_N[rows])
            torch.mm(grad_NV, head, out=grad_x_ND[rows])
            grad_head_VD += grad_NV.T @ x_ND[rows]
        ctx.save_for_backward(grad_x_ND, grad_head_VD)
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weight_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        scale = grads[0]
        return grad_x_ND * scale.to(grad_x_ND.dtype), grad_head_VD * scale, None, None


class GPT(nn.Module):
    """The language model: embedding, visits of blocks, norm, head, softcapped cross-entropy."""

    def __init__(self, cfg: Config, attention: Attention, dtype: torch.dtype):
        super().__init__()
        self.cfg, self.dtype, self.prepare = cfg, dtype, attention.prepare
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.blocks = nn.ModuleList(Block(cfg, i, attention) for i in range(cfg.num_layers))
        self.plan = plan_visits(cfg.num_layers)
        num_skips = sum(visit.skip is not None for visit in self.plan)
        self.skip_weights = nn.Parameter(torch.ones(num_skips, cfg.model_dim))
        gates = nn.Parameter(torch.zeros(num_skips, cfg.model_dim)) if cfg.skip_gates else None
        self.register_parameter("skip_gates", gates)
        tied = cfg.tie_embeddings
        self.lm_head = None if tied else Linear(cfg.model_dim, cfg.vocab_size, zero_init=True)
        self.rotary: Tensor
        self.long_rotary: Tensor | None
        self.skip_gates: nn.Parameter | None
        self.register_buffer("rotary", rotary_table(cfg, cfg.train_seq_len), persistent=False)
        longer = cfg.score_seq_len > cfg.train_seq_len
        table = rotary_table(cfg, cfg.score_seq_len) if longer else None
        self.register_buffer("long_rotary", table, persistent=False)
        self.run_block: Callable[..., Tensor] = run_block
        self.nll = softcapped_nll
        self.init_weights_()

    @torch.no_grad()
    def init_weights_(self) -> None:
        """Draw the initial weights as the baseline does; output projections start at zero."""
        cfg = self.cfg
        if cfg.tie_embeddings:
            self.tok_emb.weight.normal_(std=cfg.tied_embed_init_std)
        for module in self.modules():
            if not isinstance(module, Linear):
                continue
            if module.zero_init:
                module.weight.zero_()
            elif cfg.init == "orthogonal" and min(module.weight.shape) >= 64:
                nn.init.orthogonal_(module.weight)

    @property
    def head_VD(self) -> Tensor:
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def compile_(self) -> None:
        """Replace block and loss by compiled ones; the weights and the formulas stay."""
        # Few shapes occur, but each with and without gradients, and for each kind of block.
        torch._dynamo.config.recompile_limit = 64
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
        assert table is not None and num_positions <= table.size(1), "longer than EVAL_SEQ_LEN"
        return table[:, :num_positions]

    def forward(self, ids_BT: Tensor) -> Tensor:
        """The normed stream before the head, (B, T, D)."""
        mask = self.prepare(ids_BT, self.cfg.isolate_documents)
        rotary_2TE = self.rotary_for(ids_BT.size(1))
        x_BTD = rms_norm(self.tok_emb(ids_BT).to(self.dtype))
        x0_BTD = x_BTD
        saved: list[Tensor] = []
        for visit in self.plan:
            if visit.skip is not None:
                x_BTD = self.mix_skip(x_BTD, saved.pop(), visit.skip)
            x_BTD = self.run_block(self.blocks[visit.block], x_BTD, x0_BTD, rotary_2TE, mask)
            if visit.save:
                saved.append(x_BTD)
        return rms_norm(x_BTD)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Softcapped logits (B, T, V) in float32."""
        cap = self.cfg.logit_softcap
        z_BTV = self(ids_BT) @ self.head_VD.to(self.dtype).T
        return cap * torch.tanh(z_BTV.float() / cap)

    def loss(self, ids_BT: Tensor, target_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """Sum of weight * nats over all targets, for training; weight None means the mean."""
        x_ND, target_N = self(ids_BT).flatten(0, 1), target_BT.flatten()
        if weight_BT is None:
            weight_N = torch.full_like(target_N, 1 / len(target_N), dtype=torch.float32)
        else:
            weight_N = weight_BT.flatten().float()
        nll = functools.partial(self.nll, cap=self.cfg.logit_softcap)
        loss, _ = ChunkedLoss.apply(x_ND, self.head_VD, (target_N, weight_N), nll)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def score(self, ids_BT: Tensor, target_BT: Tensor, first: int = 0) -> Tensor:
        """Nats (B, T - first), float32, of the targets from position `first` on."""
        x_ND = self(ids_BT)[:, first:].flatten(0, 1)
        target_N, head = target_BT[:, first:].flatten(), self.head_VD.to(self.dtype)
        chunk = max(1, LOSS_CHUNK_NUMBERS // len(head))
        pieces = zip(torch.split(x_ND, chunk), torch.split(target_N, chunk), strict=True)
        cap = self.cfg.logit_softcap
        nll = [self.nll(x @ head.T, target, None, cap)[0] for x, target in pieces]
        return torch.cat(nll).view(len(ids_BT), -1)


class Role(NamedTuple):
    """What a parameter is: its optimizer group and the group of tensors it is quantised with."""

    optimizer: str  # token, head, matrix or scalar
    tensors: str  # embed, attn, mlp or control


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by name, decided by the module that owns it.

    The assertion is the proof that no parameter is left untrained (pitfall: tables outside the
    blocks that no group picked up).
    """
    roles: dict[str, Role] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if isinstance(module, nn.Embedding):
                role = Role("token", "embed")
            elif path == "lm_head":
                role = Role("head", "embed")
            elif isinstance(module, Linear):
                role = Role("matrix", "attn" if ".attn." in name else "mlp")
            else:
                role = Role("scalar", "control")
            assert name not in roles and parameter.requires_grad, f"{name} has two owners"
            roles[name] = role
    names = [name for name, _ in model.named_parameters()]
    assert sorted(roles) == sorted(names), "every parameter has exactly one role"
    return roles


def build_model(run: Run) -> GPT:
    """A freshly initialised model on the run's device, compiled if COMPILE."""
    cfg = run.cfg
    attention = choose_attention(cfg, run.device, run.dtype)
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
    D, kv_dim, F_ = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.mlp_dim
    block = 2 * D * D + 2 * D * kv_dim + 2 * D * F_
    matrices = len(plan_visits(cfg.num_layers)) * block + cfg.vocab_size * D
    mean_context = cfg.train_seq_len / 2
    attention = len(plan_visits(cfg.num_layers)) * 2 * D * mean_context
    return 6 * matrices, int(6 * attention)


def format_plan(plan: Sequence[Visit]) -> str:
    """The visits in order: `3>` saves its output, `5(0)` first mixes in the last saved one."""
    shown = []
    for visit in plan:
        skip = "" if visit.skip is None else f"({visit.skip})"
        shown.append(f"{visit.block}{skip}{'>' if visit.save else ''}")
    return " ".join(shown)


# --- 5. Optimization -----------------------------------------------------------------------------
# Muon for the matrices of the blocks, AdamW for everything else. Schedules are functions of
# progress in [0, 1], so that one definition serves a limit in seconds and a limit in steps.

NS_CLASSIC = (3.4445, -4.7750, 2.0315)  # largest slope at 0; kellerjordan.github.io/posts/muon
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
    """Roughly the nearest semi-orthogonal matrix of each in the stack, in `dtype`.

    Five classic steps take singular values to about 0.7 to 1.2.
    """
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

    Each rank orthogonalises its share of a stack and all gather the results, so that the replicas
    stay equal to the bit.
    """

    def __init__(self, params: Sequence[nn.Parameter], run: Run):
        self.run, cfg = run, run.cfg
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault(tuple(param.shape), []).append(param)
        self.stacks = list(by_shape.values())
        self.buffers = [torch.zeros_like(torch.stack(stack)) for stack in self.stacks]
        self.coefficients = newton_schulz_coefficients(
            cfg.muon_coefficients, cfg.muon_backend_steps
        )

    def orthogonalize_sharded(self, update_LOI: Tensor) -> Tensor:
        """`orthogonalize` with the stack's matrices dealt to the ranks."""
        world_size, dtype = self.run.world_size, self.run.dtype
        if world_size == 1:
            return orthogonalize(update_LOI, self.coefficients, dtype)
        num_matrices = len(update_LOI)
        share = -(-num_matrices // world_size)
        padded = F.pad(update_LOI, (0, 0, 0, 0, 0, share * world_size - num_matrices))
        own = padded[self.run.rank * share :][:share]
        result = torch.empty_like(padded, dtype=dtype)
        own = orthogonalize(own, self.coefficients, dtype).contiguous()
        dist.all_gather(list(torch.split(result, share)), own)
        return result[:num_matrices]

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Update every parameter in place from its gradient."""
        cfg = self.run.cfg
        for stack, buffer_LOI in zip(self.stacks, self.buffers, strict=True):
            grad_LOI = torch.stack([param.grad for param in stack])  # type: ignore[misc]
            buffer_LOI.mul_(momentum).add_(grad_LOI)
            update_LOI = grad_LOI.add_(buffer_LOI, alpha=momentum)  # Nesterov
            if cfg.muon_row_norm:  # MuonEq-R (arXiv:2603.28254): every output unit counts alike
                update_LOI = F.normalize(update_LOI, dim=-1, eps=1e-7)
            update_LOI = self.orthogonalize_sharded(update_LOI)
            rows, columns = stack[0].shape
            # A tall orthogonal matrix has smaller entries; keep the RMS independent of shape.
            scale = -lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(stack, 1 - lr * cfg.muon_wd)
            torch._foreach_add_(stack, list(update_LOI.to(buffer_LOI.dtype)), alpha=scale)


def make_optimizers(model: GPT, run: Run) -> tuple[torch.optim.AdamW, Muon]:
    """AdamW and Muon over a partition of the model's parameters."""
    cfg, roles = run.cfg, parameter_roles(model)
    members: dict[str, list[nn.Parameter]] = {}
    for name, role in roles.items():
        members.setdefault(role.optimizer, []).append(model.get_parameter(name))
    token_lr = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
    rates = {"token": token_lr, "head": cfg.head_lr, "scalar": cfg.scalar_lr}
    groups = [{"params": members[k], "base_lr": lr} for k, lr in rates.items() if k in members]
    adam = torch.optim.AdamW(
        groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, weight_decay=cfg.adam_wd, fused=True
    )
    # Made here, not at the first step, so that every tensor of the state exists from the start.
    for param in (param for group in adam.param_groups for param in group["params"]):
        moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[param] = {"step": torch.zeros((), device=param.device), **moments}
    return adam, Muon(members["matrix"], run)


def lr_scale(progress: float, *, warmdown_frac: float, floor: float = 0.0) -> float:
    """Learning rate multiplier at `progress` in [0, 1]: 1, then linear to `floor` at the end."""
    if warmdown_frac == 0 or progress < 1 - warmdown_frac:
        return 1.0
    return max((1 - progress) / warmdown_frac, floor)


def momentum_at(step: int, cfg: Config) -> float:
    """Muon's momentum: a linear ramp over the first MUON_MOMENTUM_WARMUP_STEPS."""
    if step >= cfg.muon_momentum_warmup_steps:
        return cfg.muon_momentum
    share = step / cfg.muon_momentum_warmup_steps
    start = cfg.muon_momentum_warmup_start
    return start + share * (cfg.muon_momentum - start)


class Averager:
    """The weights that will be exported: the last ones, their EMA, or the mean of a tail (SWA).

    Sums are float32 whatever the weights are: a bf16 running sum loses its low bits.
    """

    def __init__(self, cfg: Config, params: Sequence[nn.Parameter]):
        self.cfg, self.count = cfg, torch.zeros((), dtype=torch.int64)
        self.params: list[Tensor] = list(params)
        # The EMA starts from the initial weights, whose share after n steps is decay^n.
        self.average = (
            [] if cfg.averaging == "none" else [p.detach().float().clone() for p in params]
        )

    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        """Take in the weights after optimizer step `step` (from 1), whose lr multiplier was scale.

        SWA is triggered by the multiplier, never by a nominal step count: a run that the clock
        stops must reach it too (arXiv:1803.05407).
        """
        cfg, weights = self.cfg, [param.float() for param in self.params]
        if cfg.averaging == "ema":
            torch._foreach_lerp_(self.average, weights, 1 - cfg.ema_decay)
        elif cfg.averaging == "swa" and scale < cfg.swa_start_lr and step % cfg.swa_every == 0:
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

    def fraction(self, cfg: Config) -> float:
        """Share of the budget used, by steps or by the clock, whichever is further."""
        by_steps = self.step / cfg.iterations
        by_clock = self.train_s / cfg.max_wallclock_seconds if cfg.max_wallclock_seconds else 0.0
        return min(1.0, max(by_steps, by_clock))

    def is_over(self, cfg: Config, extra_s: float = 0.0) -> bool:
        """Whether the steps are done, or one more, after `extra_s`, would pass the clock."""
        step_s = 1.2 * self.train_s / max(1, self.step)  # steps vary by a fifth
        end_s = self.train_s + extra_s + step_s
        return self.step >= cfg.iterations or 0 < cfg.max_wallclock_seconds < end_s

    def pace(self, cfg: Config) -> dict[str, float]:
        """Tokens and seconds so far, as they are logged."""
        tokens = self.step * cfg.train_batch_tokens
        return {
            "step_avg_ms": round(1e3 * self.train_s / max(1, self.step), 3),
            "tokens_per_s": round(tokens / max(self.train_s, 1e-9)),
            "train_s": round(self.train_s, 3),
            "tokens": tokens,
        }


def split_micro_batches(rows: int, cfg: Config) -> int:
    """Number of forward passes a step takes: the fewest equal ones within MICRO_BATCH_TOKENS."""
    most_rows = max(1, cfg.micro_batch_tokens // cfg.train_seq_len)
    return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= most_rows)


class Trainer:
    """Model, optimizers and average, and what one step does to them."""

    def __init__(self, run: Run, model: GPT, rows: int):
        self.run, self.model = run, model
        self.params = list(model.parameters())
        self.adam, self.muon = make_optimizers(model, run)
        self.averager = Averager(run.cfg, self.params)
        self.num_micro = split_micro_batches(rows, run.cfg)
        self.progress = Progress()

    def scale(self) -> float:
        """Learning rate multiplier of the next step."""
        cfg, done = self.run.cfg, self.progress.fraction(self.run.cfg)
        warmdown = cfg.warmdown_frac
        if cfg.warmdown_iters:  # the public scripts' unit, at the pace measured so far
            warmdown = cfg.warmdown_iters * done / max(1, self.progress.step)
        return lr_scale(done, warmdown_frac=warmdown, floor=cfg.min_lr)

    def accumulate_gradients(self, window_BT: Tensor) -> Tensor:
        """Gradient of the mean loss over all ranks' windows (rows, T + 1); returns that loss."""
        window_BT = window_BT.to(self.run.device, non_blocking=True)
        total = torch.zeros((), device=self.run.device)
        for rows_BT in window_BT.chunk(self.num_micro):
            loss = self.model.loss(rows_BT[:, :-1], rows_BT[:, 1:]) / self.num_micro
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.run.world_size > 1:
            flat = torch.cat([total[None], *(p.grad.flatten() for p in self.params)])  # type: ignore[union-attr]
            self.run.sum_(flat).div_(self.run.world_size)
            total = flat[0]
            pieces = torch.split(flat[1:], [p.numel() for p in self.params])
            for param, piece in zip(self.params, pieces, strict=True):
                param.grad = piece.view_as(param)
        return total

    def step(self, window_BT: Tensor) -> Tensor:
        """One optimizer step on this rank's share of a batch; the loss over all ranks."""
        cfg, scale = self.run.cfg, self.scale()
        loss = self.accumulate_gradients(window_BT)
        if cfg.grad_clip_norm:
            nn.utils.clip_grad_norm_(self.params, cfg.grad_clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * scale
        self.adam.step()
        self.muon.step(cfg.matrix_lr * scale, momentum_at(self.progress.step, cfg))
        self.model.zero_grad(set_to_none=True)
        self.progress = self.progress._replace(step=self.progress.step + 1)
        self.averager.update(self.progress.step, scale)
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training depends on, by name: the live ones, not copies."""
        adam = [self.adam.state[p] for group in self.adam.param_groups for p in group["params"]]
        return {
            **{f"model/{name}": param.detach() for name, param in self.model.named_parameters()},
            **{f"adam/{i}/{key}": entry[key] for i, entry in enumerate(adam) for key in entry},
            **{f"muon/{i}": buffer for i, buffer in enumerate(self.muon.buffers)},
            **{f"average/{i}": average for i, average in enumerate(self.averager.average)},
            "average/count": self.averager.count,
        }

    def load(self, saved: Mapping[str, Tensor], progress: Progress) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])
        self.progress = progress

    def warm_up(self) -> None:
        """Run WARMUP_STEPS on random tokens so that everything is compiled; undo their effect."""
        cfg = self.run.cfg
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        generator = torch.Generator().manual_seed(0)
        rows = cfg.train_batch_tokens // cfg.train_seq_len // self.run.world_size
        shape = (rows, cfg.train_seq_len + 1)
        for _ in range(cfg.warmup_steps):
            self.run.check_signal()
            self.step(torch.randint(cfg.vocab_size, shape, generator=generator))
        self.load(before, Progress())
        self.run.synchronize()


# Knobs that may change between a run and its continuation.
FREE_ON_RESUME = {
    "mode", "recipe", "run_dir", "resume", "checkpoint_every_seconds", "compile", "attention",
    "target_val_bpb", "train_log_every", "val_loss_every", "artifact", "submission_name",
    "submission_author", "artifact_budget_bytes", "eval_max_seconds", "run_id", "data_path",
    "tokenizer_path",
}  # fmt: skip


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
    tensors = {name: t.cpu().contiguous() for name, t in trainer.tensors().items()}
    payload = safetensors.torch.save(tensors)
    write_atomic(temporary / "state.safetensors", payload)
    meta = {
        "progress": progress,
        "ledger": run.ledger,
        "config": dataclasses.asdict(run.cfg),
        "state_sha256": hashlib.sha256(payload).hexdigest(),
    }
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
    run = trainer.run
    state: dict[str, Tensor] | None = None
    meta: dict[str, Any] = {}
    if run.is_main and not run.cfg.resume:
        shutil.rmtree(run.directory / "checkpoint", ignore_errors=True)
    elif run.is_main and (folders := checkpoint_folders(run)):
        meta, state = read_checkpoint(folders[-1], run.cfg)
    meta, state = run.share((meta, state))
    if state is not None:
        trainer.load(state, Progress(*meta["progress"]))
        run.ledger.update(meta["ledger"])
        run.log("resume", step=trainer.progress.step, train_s=round(trainer.progress.train_s, 3))


def read_checkpoint(folder: Path, cfg: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Meta data and tensors of a checkpoint; InputError if it is damaged or of another run."""
    remedy = f"remove {folder} to go on without it, or set RESUME=0 or another RUN_ID"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        payload = (folder / "state.safetensors").read_bytes()
        if hashlib.sha256(payload).hexdigest() != meta["state_sha256"]:
            raise InputError("checksum of state.safetensors does not match")
        state = safetensors.torch.load(payload)
        saved: dict[str, Any] = meta["config"]
        Progress(*meta["progress"])
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder} is damaged ({error}); {remedy}") from error
    refuse_other_run(saved, cfg, folder)
    return meta, state


def refuse_other_run(saved: Mapping[str, Any], cfg: Config, path: Path) -> None:
    """Raise InputError if `path` was made with knobs that make it another run than `cfg`'s."""
    now = dataclasses.asdict(cfg)
    different = [
        f"{name.upper()}={now[name]} (there: {saved.get(name)})"
        for name in sorted(now.keys() - FREE_ON_RESUME)
        if now[name] != saved.get(name)
    ]
    if different:
        raise InputError(
            f"{path} is of another run: {', '.join(different)}; set these knobs as they were, "
            "remove it, or set another RUN_ID"
        )


def decide(trainer: Trainer, loss: float, elapsed_s: float, unsaved_s: float) -> list[bool]:
    """Add the elapsed seconds to the clock, the slowest rank's, and agree what comes next:

    whether a checkpoint is due, a signal has come, the loss is bad; on any rank, for all of them.
    The clock drives the learning rate, so that ranks with clocks of their own would drift apart.
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
        scale = trainer.scale()
        loss = trainer.step(loader.batch(trainer.progress.step)).item()
        now_s = time.perf_counter()
        due, interrupted, bad_loss = decide(trainer, loss, now_s - clock_s, now_s - saved_s)
        clock_s, step = now_s, trainer.progress.step
        if bad_loss:
            raise RunFailed(
                f"the loss is {loss} at step {step} (last finite: {last_good:.4f} at step "
                f"{step - 1}); the checkpoint before it is kept; lower the learning rates"
            )
        last_good, over = loss, trainer.progress.is_over(cfg)
        if step % cfg.train_log_every == 0 or step <= resumed_step + 5 or over:
            values = {"train_loss": round(loss, 5), "lr_scale": round(scale, 5)}
            pace = trainer.progress.pace(cfg)
            run.log("step", step=step, steps=cfg.iterations, **values, **pace)
        if (due and not trainer.progress.is_over(cfg, save_s)) or interrupted or over:
            train_s = trainer.progress.train_s
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
    try:
        score = validate()
    except Interrupted:
        save_checkpoint(trainer)
        raise
    run.log("val", step=step, steps=run.cfg.iterations, **score.summary())


def train(run: Run, model: GPT, loader: BatchLoader, validate: Callable[[], Score]) -> Trainer:
    """Train `model` in place; at the end it holds the weights that AVERAGING chooses."""
    cfg = run.cfg
    trainer = Trainer(run, model, loader.rows)
    with run.stage("warm_up"):
        trainer.warm_up()
    load_checkpoint(trainer)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    train_loop(trainer, loader, validate)
    progress = trainer.progress
    run.ledger["training"] = progress.train_s
    memory_mib = round(peak_memory_mib(run.device), 1)
    end = {"steps": progress.step, **progress.pace(cfg), "peak_memory_mib": memory_mib}
    run.scores["train_end"] = end
    run.log("train_end", **end)
    if cfg.averaging == "swa" and not trainer.averager.count:
        run.log("warning", text="SWA collected no weights; the last ones are exported")
    if cfg.averaging == "ema" and cfg.ema_decay**progress.step > 0.01:
        share = cfg.ema_decay**progress.step
        run.log("warning", text=f"{share:.1%} of the EMA is still the initial weights")
    trainer.averager.export_()
    return trainer


# --- 7. Quantization -----------------------------------------------------------------------------
# Every matrix becomes integer codes and one scale a row; vectors are kept in fp16. The bits depend
# on the group of tensors a parameter belongs to, which parameter_roles decides.


class Quantized(NamedTuple):
    """A tensor as it is stored: integer codes with row scales, or plain fp16 (bits 16)."""

    bits: int
    values: np.ndarray  # int8 codes (O, I), or float16 values of any shape
    scales: np.ndarray | None  # float16 (O,), None if bits is 16

    def dequantized(self) -> Tensor:
        """The float32 tensor that a reader of the artifact gets."""
        values = torch.from_numpy(self.values.astype(np.float32))
        if self.scales is None:
            return values
        return values * torch.from_numpy(self.scales.astype(np.float32))[:, None]


CODE_BITS, PLAIN_BITS = range(4, 9), 16
# Below the one fp16 loses precision and then is 0, above the other it is infinite.
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float16).tiny), float(np.finfo(np.float16).max)


def quantize_rows(weight_OI: Tensor, bits: int) -> Quantized:
    """Round to nearest on a symmetric grid of 2^bits - 1 levels, one scale a row.

    The scale is rounded to fp16 first and the codes are made with what a reader will multiply by.
    """
    qmax = 2 ** (bits - 1) - 1
    weight_OI = weight_OI.detach().float().cpu()
    scale_O = (weight_OI.abs().amax(dim=1) / qmax).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
    codes_OI = (weight_OI / scale_O.float()[:, None]).round().clamp(-qmax, qmax)
    return Quantized(bits, codes_OI.to(torch.int8).numpy(), scale_O.numpy())


def quantize_model(cfg: Config, model: nn.Module) -> dict[str, Quantized]:
    """Every parameter of the model by name, in the form in which it is stored."""
    bits_of = {"attn": cfg.attn_bits, "mlp": cfg.mlp_bits, "embed": cfg.embed_bits}
    tensors: dict[str, Quantized] = {}
    for name, role in parameter_roles(model).items():
        weight = model.get_parameter(name).detach()
        if role.tensors == "control":
            plain = weight.clamp(-LARGEST_SCALE, LARGEST_SCALE).half().cpu().numpy()
            tensors[name] = Quantized(PLAIN_BITS, plain, None)
        else:
            tensors[name] = quantize_rows(weight, bits_of[role.tensors])
    return tensors


# --- 8. Artifact ---------------------------------------------------------------------------------
# One file: magic, version, length of the header; a compressed JSON header (model shape, tokenizer,
# tensors, streams); the compressed streams; SHA-256 of all before it. Reading checks the checksum
# first and every length before anything is allocated. Nothing is ever unpickled.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLFART", 1
ARTIFACT_PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of the compressed header
CHECKSUM_BYTES = 32
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
    "zlib": (
        "zlib",
        lambda m, raw: m.compress(raw, 9),
        lambda m, packed, limit: m.decompressobj().decompress(packed, limit),
    ),
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
    "brotli": ("brotli", lambda m, raw: m.compress(raw, quality=11, lgwin=24), unbrotli),
}


def find_compressor(name: str) -> Compressor:
    """The coder of that name; InputError if its package is missing (never another coder)."""
    module_name, pack, unpack = COMPRESSORS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"COMPRESSOR={name}: {error}; pip install -r requirements.txt, or choose another"
        ) from error
    return Compressor(functools.partial(pack, module), functools.partial(unpack, module))


def stream_bytes(tensors: Mapping[str, Quantized]) -> dict[str, bytes]:
    """The numbers of all tensors by kind, each kind in the order of the names."""
    ordered = [tensors[name] for name in sorted(tensors)]
    return {
        "codes": b"".join(t.values.tobytes() for t in ordered if t.scales is not None),
        "scales": b"".join(t.scales.tobytes() for t in ordered if t.scales is not None),
        "plain": b"".join(t.values.tobytes() for t in ordered if t.scales is None),
    }


def encode_artifact(cfg: Config, tensors: Mapping[str, Quantized], tokenizer_sha256: str) -> bytes:
    """The artifact file's content; a function of its arguments to the byte."""
    compressor = find_compressor(cfg.compressor)
    raw = stream_bytes(tensors)
    packed = {kind: compressor.pack(payload) for kind, payload in raw.items()}
    header = {
        "model": {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["shape"]},
        "tokenizer_sha256": tokenizer_sha256,
        "compressor": cfg.compressor,
        "tensors": [[name, tensors[name].bits] for name in sorted(tensors)],
        "streams": [[kind, len(packed[kind]), len(raw[kind])] for kind in raw],
    }
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = ARTIFACT_PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head)) + head
    body += b"".join(packed.values())
    return body + hashlib.sha256(body).digest()


def decode_header(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams of an artifact whose checksum, magic and lengths are right."""
    if len(payload) < ARTIFACT_PREFIX.size + CHECKSUM_BYTES:
        raise InputError(f"{len(payload)} bytes are too few for an artifact")
    body, checksum = payload[:-CHECKSUM_BYTES], payload[-CHECKSUM_BYTES:]
    magic, version, head_bytes = ARTIFACT_PREFIX.unpack_from(body)
    if magic != ARTIFACT_MAGIC:
        raise InputError(f"it begins with {magic!r}, an artifact with {ARTIFACT_MAGIC!r}")
    if hashlib.sha256(body).digest() != checksum:
        raise InputError("the checksum does not match: the file is truncated or was changed")
    if version != ARTIFACT_VERSION:
        raise InputError(f"format version {version}; this script reads {ARTIFACT_VERSION}")
    head = body[ARTIFACT_PREFIX.size :][:head_bytes]
    header = json.loads(zlib.decompressobj().decompress(head, MAX_HEADER_BYTES))
    return header, body[ARTIFACT_PREFIX.size + head_bytes :]


def unpack_streams(header: Mapping[str, Any], body: bytes, sizes: Mapping[str, int]) -> Any:
    """The streams as bytes, by kind; each must have the size that the tensors' shapes imply."""
    compressor = find_compressor(header["compressor"])
    streams, position = {}, 0
    for kind, packed_bytes, raw_bytes in header["streams"]:
        if raw_bytes != sizes[kind] or raw_bytes > MAX_STREAM_BYTES:
            raise InputError(f"stream {kind} says {raw_bytes} bytes, its tensors {sizes[kind]}")
        packed = body[position : position + packed_bytes]
        streams[kind] = compressor.unpack(packed, raw_bytes + 1)
        if len(streams[kind]) != raw_bytes:
            raise InputError(f"stream {kind} does not hold the {raw_bytes} bytes that it says")
        position += packed_bytes
    if position != len(body):
        raise InputError(f"{len(body)} bytes of streams, {position} declared")
    return streams


def decode_tensors(
    header: Mapping[str, Any], body: bytes, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Quantized]:
    """The stored tensors by name; names and shapes must be exactly the model's."""
    bits = dict(header["tensors"])
    if bits.keys() != shapes.keys():
        raise InputError(f"its tensors are not the model's: {sorted(bits.keys() ^ shapes.keys())}")
    for name, shape in shapes.items():
        allowed = (*CODE_BITS, PLAIN_BITS) if len(shape) == 2 else (PLAIN_BITS,)
        if type(bits[name]) is not int or bits[name] not in allowed:
            raise InputError(f"{name} of shape {shape} cannot have {bits[name]} bits")
    coded = {name: bits[name] != PLAIN_BITS for name in shapes}
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    sizes = {
        "codes": sum(numel[name] for name in shapes if coded[name]),
        "scales": sum(2 * shapes[name][0] for name in shapes if coded[name]),
        "plain": sum(2 * numel[name] for name in shapes if not coded[name]),
    }
    streams = {k: io.BytesIO(v) for k, v in unpack_streams(header, body, sizes).items()}

    def take(kind: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
        payload = streams[kind].read(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(payload, dtype=dtype).reshape(shape)

    tensors = {
        name: Quantized(bits[name], take("codes", "<i1", shape), take("scales", "<f2", shape[:1]))
        if coded[name]
        else Quantized(PLAIN_BITS, take("plain", "<f2", shape), None)
        for name, shape in sorted(shapes.items())
    }
    for name, tensor in tensors.items():
        numbers = tensor.values if tensor.scales is None else tensor.scales
        largest = int(np.abs(tensor.values.astype(np.int16)).max()) if coded[name] else 0
        if not np.isfinite(numbers).all() or largest >= 2 ** (bits[name] - 1):
            raise InputError(f"{name} holds numbers that no weight of {bits[name]} bits can have")
    return tensors


def check_shape_knobs(knobs: Mapping[str, Any]) -> None:
    """Raise InputError unless `knobs` are all knobs of the model's shape, each of its type."""
    kinds = get_type_hints(Config)
    expected = {f.name for f in fields(Config) if f.metadata["shape"]}
    if knobs.keys() != expected:
        raise InputError(f"its knobs are not the model's: {sorted(knobs.keys() ^ expected)}")
    for name, value in knobs.items():
        if type(value) is not kinds[name] or not math.isfinite(value):
            raise InputError(f"{name.upper()}={value!r} is not a valid {kinds[name].__name__}")


def read_artifact(path: Path, run: Run, tokenizer_sha256: str) -> GPT:
    """Build the model that the artifact describes and holds; run.cfg takes on its shape.

    Raises InputError, naming the file, for anything that is not a whole and consistent artifact.
    """
    try:
        payload = run.share(path.read_bytes() if run.is_main else b"")
        header, body = decode_header(payload)
        if header["tokenizer_sha256"] != tokenizer_sha256:
            raise InputError("it was trained with another tokenizer than the data set's")
        check_shape_knobs(header["model"])
        run.cfg = dataclasses.replace(run.cfg, **header["model"])
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


def strip_docstrings(tree: ast.Module) -> ast.Module:
    """Remove every docstring, in place; an emptied body becomes `pass`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return tree


# The unpacked source is put where tracebacks, inspect and so Triton look for a file's lines.
PACKED_STUB = """import base64,linecache,lzma
PACKED_SOURCE=lzma.decompress(base64.b85decode("{payload}"),format=lzma.FORMAT_RAW,filters=[{{"id":lzma.FILTER_LZMA2,"preset":9|lzma.PRESET_EXTREME}}]).decode()
linecache.cache["<train_gpt>"]=(len(PACKED_SOURCE),None,PACKED_SOURCE.splitlines(True),"<train_gpt>")
exec(compile(PACKED_SOURCE,"<train_gpt>","exec"))
"""  # noqa: E501


def pack_source(source: str) -> str:
    """A script that runs as `source` does, without its comments and docstrings, compressed.

    Only the standard library is used, so the counted size depends on no installed minifier;
    packing what was unpacked gives the same bytes again.
    """
    plain = ast.unparse(strip_docstrings(ast.parse(source)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = lzma.compress(plain.encode(), format=lzma.FORMAT_RAW, filters=filters)
    return PACKED_STUB.format(payload=base64.b85encode(packed).decode())


def account_sizes(run: Run, artifact: Path) -> dict[str, int]:
    """Bytes on disk of the packed script and of the artifact; RunFailed if over the budget."""
    files = {"artifact_bytes": artifact, "code_bytes": run.directory / "train_gpt.py"}
    sizes = run.share({k: p.stat().st_size for k, p in files.items()} if run.is_main else {})
    sizes |= {"total_bytes": sum(sizes.values()), "budget_bytes": run.cfg.artifact_budget_bytes}
    run.log("size", **sizes)
    if sizes["total_bytes"] > sizes["budget_bytes"]:
        raise RunFailed(
            f"code and artifact take {sizes['total_bytes']} bytes of "
            f"ARTIFACT_BUDGET_BYTES={sizes['budget_bytes']}; lower *_BITS or the model's shape"
        )
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
    bounds = [len(items) * r // world_size for r in (rank, rank + 1)]
    return items[bounds[0] : bounds[1]]


class Score(NamedTuple):
    """Sums over the scored targets."""

    nats: float
    tokens: int
    num_bytes: int
    partial: bool
    eval_s: float

    def summary(self) -> dict[str, Any]:
        """Loss in nats a token, bits per byte, and what they were measured on."""
        val_loss = self.nats / self.tokens
        return {
            "val_loss": round(val_loss, 8),
            "val_bpb": round(self.nats / math.log(2) / max(1, self.num_bytes), 8),
            "eval_s": round(self.eval_s, 3),
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "partial": self.partial,
        }


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
        run = self.run
        sums = torch.tensor([self.nats, float(self.num_bytes)], dtype=torch.float64)
        times = torch.from_numpy(self.is_scored.astype(np.int32))
        nats, num_bytes = run.sum_(sums.to(run.device)).tolist()
        times = run.sum_(times.to(run.device))
        assert bool((times == 1).all()), f"{int((times != 1).sum())} targets not scored once"
        return Score(nats, len(times), int(num_bytes), self.validation.partial, eval_s)


def window_batch(
    validation: Validation, windows: Sequence[Window], rows: int, seq_len: int
) -> Tensor:
    """Ids (rows, seq_len + 1) of the windows, padded to that fixed shape by zeros.

    Padding stands right of everything that is scored, where causal attention cannot see it.
    """
    ids = np.zeros((rows, seq_len + 1), dtype=np.int64)
    for row, window in enumerate(windows):
        piece = validation.ids[window.start : window.end + 1]
        ids[row, : len(piece)] = piece
    return torch.from_numpy(ids)


def evaluate(run: Run, model: GPT, validation: Validation, stride: int) -> Score:
    """Score every validation target once, by windows of the evaluation context and `stride`."""
    cfg, started_s = run.cfg, time.perf_counter()
    seq_len = cfg.score_seq_len
    rows = max(1, cfg.val_batch_size // run.world_size // seq_len)
    windows = share_of(
        plan_windows(validation.num_targets, seq_len, stride), run.rank, run.world_size
    )
    scorer = Scorer(run, validation)
    rows = max(1, min(rows, len(windows)))
    for i in range(0, len(windows), rows):
        run.check_signal()
        batch = windows[i : i + rows]
        ids = window_batch(validation, batch, rows, seq_len).to(run.device)
        first = min(window.score_from for window in batch)
        nll = model.score(ids[:, :-1], ids[:, 1:], first).cpu().numpy()
        for window, nll_T in zip(batch, nll, strict=False):
            scored = nll_T[window.score_from - first : window.end - window.start - first]
            scorer.record(window.start + window.score_from, scored)
    run.synchronize()
    return scorer.finish(time.perf_counter() - started_s)


def report_score(run: Run, event: str, score: Score) -> None:
    """Log a final score and keep it for submission.json."""
    values = {**score.summary(), "compliant": not score.partial}
    if not math.isfinite(score.nats):
        raise RunFailed(f"{event}: the loss is {score.nats}; lower the learning rates")
    run.scores[event] = values
    run.log(event, **values)


def evaluate_artifact(run: Run, model: GPT, validation: Validation) -> None:
    """The scores of the model that was read back: plain, then sliding if EVAL_STRIDE."""
    with run.stage("evaluate_quantized", "evaluation"):
        score = evaluate(run, model, validation, run.cfg.score_seq_len)
    report_score(run, "final_quantized", score)
    if run.cfg.eval_stride:
        with run.stage("evaluate_sliding", "evaluation"):
            score = evaluate(run, model, validation, run.cfg.eval_stride)
        report_score(run, "final_sliding", score)


# --- main ----------------------------------------------------------------------------------------


def describe(cfg: Config) -> str:
    """What a run with these knobs would train: shape, plan, groups and sizes; needs no data."""
    with torch.device("meta"):
        model = GPT(cfg, ATTENTIONS["sdpa"](), torch.float32)
    changed, knobs = set(changed_knobs(cfg)), dataclasses.asdict(cfg)
    lines = [f"{'*' if k.upper() in changed else ' '} {k.upper()}={knobs[k]}" for k in knobs]
    sizes, groups = Counter[str](), Counter[str]()
    bits = {"attn": cfg.attn_bits, "mlp": cfg.mlp_bits, "embed": cfg.embed_bits, "control": 16}
    weight_bits = 0
    for name, role in parameter_roles(model).items():
        count = model.get_parameter(name).numel()
        sizes[role.tensors] += count
        groups[role.optimizer] += count
        weight_bits += count * bits[role.tensors]
    matrices, attention = flops_per_token(cfg)
    lines += ["", format_event("model", params=sum(sizes.values()), **sizes)]
    lines += [format_event("groups", **groups)]
    lines += [format_event("flops_per_token", matrices=matrices, attention=attention)]
    lines += ["plan block(skip row)>: " + format_plan(model.plan)]
    sizes_bytes = {"weights": weight_bits // 8, "code": len(pack_source(own_source()))}
    sizes_bytes |= {"total": sum(sizes_bytes.values()), "budget": cfg.artifact_budget_bytes}
    lines += [format_event("bytes_before_compression", **sizes_bytes)]
    return "\n".join(lines)


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
    with run.stage("evaluate_prequant"):
        score = evaluate(run, model, validation, cfg.score_seq_len)
    report_score(run, "final_prequant", score)
    with run.stage("write_artifact"):
        payload = encode_artifact(cfg, quantize_model(cfg, model), tokenizer_sha)
        run.save_state()  # first: a continuation that finds the artifact needs it
        if run.is_main:
            write_atomic(artifact, payload)


def time_budgets(run: Run) -> dict[str, float]:
    """Seconds spent and allowed (0 = no bound) in training and in evaluation."""
    limits = {"training": run.cfg.max_wallclock_seconds, "evaluation": run.cfg.eval_max_seconds}
    spent = {f"{name}_s": round(run.ledger[name], 3) for name in limits}
    return spent | {f"{name}_budget_s": limit for name, limit in limits.items()}


def write_submission(run: Run, sizes: Mapping[str, int], *, in_budget: bool) -> dict[str, Any]:
    """Write submission.json for this one run; returns its content."""
    cfg, times = run.cfg, time_budgets(run)
    last = [event for event in ("final_quantized", "final_sliding") if event in run.scores][-1]
    score, train_end = run.scores[last], run.scores.get("train_end", {})
    result = {
        "val_bpb": score["val_bpb"],
        "val_loss": score["val_loss"],
        "steps": train_end.get("steps", 0),
        "train_s": train_end.get("train_s", 0.0),
        "eval_s": times["evaluation_s"],
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
        "source_sha256": hashlib.sha256(own_source().encode()).hexdigest(),
        "hardware": describe_hardware(run),
        "versions": versions(),
        "previous": "",
        "compliant": score["compliant"] and in_budget,
        "budget": {
            "time": times,
            "bytes": {
                "total_bytes_max": sizes["total_bytes"],
                "budget_bytes": sizes["budget_bytes"],
            },
        },
    }
    if run.is_main:
        write_atomic(run.directory / "submission.json", json.dumps(report, indent=2).encode())
    return report


def finish(run: Run, sizes: Mapping[str, int]) -> None:
    """Log the ledger, write submission.json, and raise RunFailed for every bound passed."""
    times, target = time_budgets(run), run.cfg.target_val_bpb
    run.log("ledger", **times, other_s=round(run.ledger["other"], 3))
    problems = [
        f"{name} took {times[f'{name}_s']:.1f} s of {limit:.1f}"
        for name in ("training", "evaluation")
        if 0 < (limit := times[f"{name}_budget_s"]) < times[f"{name}_s"]
    ]
    report = write_submission(run, sizes, in_budget=not problems)
    if target and report["val_bpb"] > target:
        problems.append(f"val_bpb {report['val_bpb']} is above TARGET_VAL_BPB={target}")
    if problems:
        raise RunFailed("; ".join(problems))


def prepare_directory(run: Run, artifact: Path) -> None:
    """Refuse a finished run's folder, write the packed script, open the log, recall the state."""
    cfg, folder, state_path = run.cfg, run.directory, run.directory / "run_state.json"
    trains, code = cfg.mode != "eval", folder / "train_gpt.py"
    if run.share((folder / "submission.json").exists()) and trains:
        raise InputError(f"{folder} holds a finished run; set another RUN_ID or RUN_DIR")
    own = artifact.resolve().parent == folder.resolve() and state_path.exists()
    if run.share(artifact.exists()) and (trains or run.share(own)):
        recall_state(run, artifact, state_path)
    if run.is_main:
        if code.exists() and code.samefile(__file__) and "PACKED_SOURCE" not in globals():
            raise InputError(f"RUN_DIR={folder} holds the running script; choose another folder")
        write_atomic(code, pack_source(own_source()).encode())
        for path in (folder / "train.log", folder / "metrics.jsonl"):
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                run.append(path.name, "")  # end the line that a kill cut short
    log_setup(run)


def recall_state(run: Run, artifact: Path, path: Path) -> None:
    """Take ledger and scores of the training that wrote the artifact in this folder."""
    if run.cfg.mode != "eval" and not run.cfg.resume:
        raise InputError(f"{artifact} exists; set RESUME=1 to score it, or another RUN_ID")
    try:
        state = run.share(json.loads(path.read_bytes()) if run.is_main else None)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{artifact} exists without {path}: {error}; set another RUN_ID"
        ) from error
    if run.cfg.mode != "eval":
        refuse_other_run(state["config"], run.cfg, artifact)
    run.ledger.update(state["ledger"])
    run.scores.update(state["scores"])


def execute(run: Run) -> None:
    """The run as a table of contents."""
    cfg = run.cfg
    trains = cfg.mode != "eval"
    artifact = Path(cfg.artifact) if cfg.artifact and not trains else run.directory / "artifact.bin"
    if not trains and not run.share(artifact.exists()):
        raise InputError(f"ARTIFACT={artifact} does not exist; MODE=train makes one")
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
    evaluate_artifact(run, model, validation)
    finish(run, sizes)


def main() -> int:
    """Run as the environment says; the exit status is 0, 1 (failed), 2 (bad input) or 143."""
    env = os.environ
    is_main = env.get("RANK", "0") == "0"
    try:
        cfg = config_from_env(env)
        if cfg.mode == "describe":
            if is_main:
                print(describe(cfg))
            return 0
        with start_run(cfg, env) as run:
            execute(run)
        return 0
    except (InputError, RunFailed, Interrupted) as error:
        if is_main:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {InputError: 2, RunFailed: 1, Interrupted: 143}[type(error)]


if __name__ == "__main__":
    sys.exit(main())
