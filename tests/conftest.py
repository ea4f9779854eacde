"""What the tests share: a tiny configuration, a tiny data set made on the fly, a run on the CPU.

Plain functions are imported (`from tests.conftest import tiny_config`); what needs a folder is a
fixture. Everything is deterministic, and nothing is written outside of pytest's own folders.
"""

from __future__ import annotations

import functools
import io
import os
import signal

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # peers that leave are warned of at length
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import settings

import train_gpt
from train_gpt import GPT, Config, Run

# A shell starts background jobs with SIGINT ignored; processes of the tests must not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Packing the script takes a second, and every run does it.

VOCAB_SIZE = 320
MakeRun = Callable[..., Run]

# The same examples in every run, no time limits that a busy machine breaks, no files left behind.
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start every test from the same random numbers; one thread, so that sums keep their order."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


# --- Configuration -------------------------------------------------------------------------------

TRACK = Path(train_gpt.__file__).parent / "records/track_10min_16mb"
NAIVE = TRACK / "2026-03-17_NaiveBaseline/run.env"
# What that recipe says of its data, its clock, its artifact and its score.
OF_THE_RECIPE = {
    "data_path", "warmdown_iters", "quantizer", "quant_grid", "row_steps", "compressor",
    "eval_stride", "ttt_method",
}  # fmt: skip
# Knobs that concern nothing in it.
PLAIN: dict[str, Any] = {
    "warmdown_frac": 0.5,
    "ema_decay": 0.997,
    "enable_looping_at": "0.5",
    "sparse_attn_gate_scale": 1.0,
    "parallel_start_layer": 7,
}


@functools.cache
def naive_knobs() -> dict[str, Any]:
    """What the recipe of the naive baseline says of model and training."""
    lines = train_gpt.read_recipe(NAIVE)
    naive = asdict(train_gpt.config_from_env({**lines, "MODE": "describe"}))
    return {name: naive[name] for name in map(str.lower, lines) if name not in OF_THE_RECIPE}


def plain_config(**changes: Any) -> Config:
    """The naive baseline's model and training: what a technique is tested on by itself."""
    return Config(**{**naive_knobs(), **PLAIN, **changes})


TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_layers": 3,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "train_seq_len": 32,
    "train_batch_tokens": 256,
    "micro_batch_tokens": 256,
    "val_batch_size": 512,
    "eval_stride": 8,
    "iterations": 10,
    "max_wallclock_seconds": 0.0,
    "warmup_steps": 0,
    "checkpoint_every_seconds": 0.0,
    "precision": "fp32",
    "compile": False,
    "quantizer": "rtn",
    "quant_grid": "uniform",
    "row_steps": "max",
    "gate_bits": 16,
    "compressor": "zlib",
    "ttt_method": "none",
    "ttt_context": "window",
    "ttt_chunk_size": 48,
    "ttt_lora_lr": 1e-3,
}


def tiny_config(**changes: Any) -> Config:
    """A model of 3 layers x 32 channels in float32, not compiled, trained for 10 steps, rounded."""
    return plain_config(**{**TINY, **changes})


def environment(cfg: Config, **more: str) -> dict[str, str]:
    """Variables for a child process that runs the script with `cfg`, on the CPU, on one thread."""
    names = {name.lower() for name in train_gpt.changed_knobs(cfg)}
    knobs = {k.upper(): str(v) for k, v in asdict(cfg).items() if k in names}
    inherited = {k: v for k in ("PATH", "HOME", "TMPDIR", "LANG") if (v := os.environ.get(k))}
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {**inherited, **fixed, **knobs, **more}


# --- Data ----------------------------------------------------------------------------------------

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who will "
    "no more if out so up said what its about than into them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after also"
).split()
RARE = ("naïve", "Größe", "日本", "😀", "7 408", "x  =  1", "f(x)\n\treturn", "—")  # bytes, spaces


def make_documents(count: int, seed: int) -> list[str]:
    """Texts of 1 to 12 sentences: few words, often in the same order, some rare characters."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        sentences = []
        for _ in range(int(rng.integers(1, 13))):
            first = int(rng.integers(len(WORDS)))
            run = [WORDS[(first + i) % len(WORDS)] for i in range(int(rng.integers(3, 12)))]
            if rng.random() < 0.2:
                run.insert(int(rng.integers(len(run))), RARE[int(rng.integers(len(RARE)))])
            sentences.append(" ".join(run) + ".")
        documents.append("\n".join(sentences))
    return documents


def train_tiny_tokenizer(texts: list[str], **changes: Any) -> bytes:
    """A SentencePiece BPE model of VOCAB_SIZE pieces with the settings of data/prepare.py."""
    model = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": VOCAB_SIZE,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99,
        "required_chars": "\u2581\n\t",
        "pad_id": 0,
        "bos_id": train_gpt.BOS_ID,
        "eos_id": 2,
        "unk_id": 3,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**options, **changes}
    )
    return model.getvalue()


@dataclass(frozen=True, kw_only=True)
class TinyData:
    """A data set in a folder, and what it was made from."""

    folder: Path
    tokenizer: sentencepiece.SentencePieceProcessor
    train: list[np.ndarray]  # ids of each training shard
    val: np.ndarray
    val_documents: list[str]

    def encode(self, documents: list[str]) -> np.ndarray:
        """Ids of the documents, each behind a BOS."""
        ids = [[train_gpt.BOS_ID, *self.tokenizer.encode(text)] for text in documents]
        return np.array([i for document in ids for i in document], dtype=np.int64)


def write_raw_shard(path: Path, ids: np.ndarray) -> None:
    """A token shard written from its published description, not by the code under test."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Two training shards, one validation shard, a tokenizer. Shared: tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny_data")
    documents, val_documents = make_documents(300, seed=0), make_documents(31, seed=1)
    model = train_tiny_tokenizer(documents)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    half = TinyData(folder=folder, tokenizer=tokenizer, train=[], val=np.zeros(0), val_documents=[])
    train = [half.encode(documents[:180]), half.encode(documents[180:])]
    val = half.encode(val_documents)
    for number, ids in enumerate(train):
        write_raw_shard(folder / f"tiny_train_{number:06d}.bin", ids)
    write_raw_shard(folder / "tiny_val_000000.bin", val)
    return TinyData(
        folder=folder, tokenizer=tokenizer, train=train, val=val, val_documents=val_documents
    )


# --- Runs and models -----------------------------------------------------------------------------


@pytest.fixture
def make_run(data: TinyData, tmp_path: Path) -> MakeRun:
    """make_run(**knobs): one process on the CPU, no process group, files under tmp_path/run."""

    def make(**changes: Any) -> Run:
        cfg = tiny_config(**{"data_path": str(data.folder), **changes})
        directory = Path(cfg.run_dir or tmp_path / "run")
        directory.mkdir(parents=True, exist_ok=True)
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        return Run(
            cfg=cfg,
            directory=directory,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            dtype=dtype,
        )

    return make


@torch.no_grad()
def randomize_(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, so that no branch is switched off by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
            else:  # gains, scales, mixes, gates
                parameter.copy_(0.7 + 0.3 * noise)


def random_model(cfg: Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """A model on the CPU with random parameters: each prediction depends on all of its context."""
    attention = train_gpt.choose_attention_backend(cfg, torch.device("cpu"), dtype)
    model = GPT(cfg, attention, dtype)
    randomize_(model, seed)
    return model
