"""Turn text into a tokenizer and token shards: what train_gpt.py trains on and is scored by.

    python data/prepare.py --source stdlib --out data/demo          # offline, a few seconds
    python data/prepare.py --input 'texts/*.jsonl.zst' --out data/mine

Two passes over the documents, neither of which holds them. The first reads, checks and hashes:
which documents are validation, which are copies, and a sample to train the tokenizer on. The
second encodes batches of documents, in several processes, into OUT/.partial/, where a second call
after a kill finds them again. Then the batches are cut into shards, moved to OUT, and the manifest
is written, last: a folder with a manifest is complete. data/README.md has the formats to the byte.

Sections: 1. Lossless encoding  2. Reading documents  3. Split  4. Tokenizer  5. Encoding
          6. Shards and manifest  7. Command line
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import glob
import hashlib
import heapq
import importlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import pydoc_data.topics
import re
import shutil
import signal
import sys
import sysconfig
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece
import zstandard
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_gpt import (  # noqa: E402  (the path above makes the import possible)
    BOS_ID,
    InputError,
    atomic_file,
    read_shard,
    sync_folder,
    write_atomic,
    write_shard,
)

Processor = sentencepiece.SentencePieceProcessor


# --- 1. Lossless encoding ------------------------------------------------------------------------
# Tokenizers made here spell the original bytes: the bytes of a document's tokens, in order, are
# its UTF-8 text. SentencePiece alone does not give that, because it writes a space as U+2581 and
# cannot tell the two apart, and because a piece's leading space counts as nothing after BOS.

SPACE = "\u2581"  # SentencePiece's spelling of a space
MAX_TOKEN_ID = 65_535  # a shard holds uint16
# Text that every kind of normalisation would change: case, forms, widths, controls, white space.
PROBE = "  A  b \t\r\n\n \u00c5 A\u030a \ufb01 \uff21 \u3000 \u00ad \u200b \ufeff \x00\x7f 12 \n "
# Long texts are encoded in segments, which halves the time and bounds the memory. A cut lies before
# a run of spaces that follows another character, where no piece of a lossless tokenizer can cross.
SEGMENT = re.compile(f"{SPACE}|[^{SPACE}]{{1,4096}} *[^ {SPACE}]*")


@functools.lru_cache(maxsize=8)
def spell_pieces(processor: Processor) -> list[bytes]:
    """The bytes that each token id stands for; none for control pieces and the unknown piece."""
    spelled = []
    for token in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            spelled.append(bytes([int(piece[3:5], 16)]))
        elif processor.is_control(token) or processor.is_unknown(token):
            spelled.append(b"")
        else:
            spelled.append(piece.replace(SPACE, " ").encode("utf-8"))
    return spelled


def byte_ids(processor: Processor, text: str) -> list[int]:
    """Token ids that spell the UTF-8 bytes of `text` one by one."""
    return [processor.piece_to_id(f"<0x{value:02X}>") for value in text.encode("utf-8")]


@functools.lru_cache(maxsize=8)
def is_lossless(processor: Processor) -> bool:
    """Whether the tokenizer neither normalises nor merges across the start of a run of spaces."""
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
        return False
    return spell_ids(processor, processor.encode(PROBE)) == PROBE.encode("utf-8")


def spell_ids(processor: Processor, ids: Iterable[int]) -> bytes:
    """The bytes that a sequence of tokens stands for."""
    return b"".join(map(spell_pieces(processor).__getitem__, ids))


def encode_document(processor: Processor, text: str) -> list[int]:
    """Token ids of one document, without BOS.

    With a lossless tokenizer, decode_document gives back exactly `text`: a literal U+2581 becomes
    its three byte tokens, and the space that a document may begin with its one, since byte counting
    ignores a piece's leading space after BOS. Any other tokenizer is applied as it is, so that
    published data sets come out as published.
    """
    return list(itertools.chain.from_iterable(encode_segments(processor, text)))


def encode_segments(processor: Processor, text: str) -> Iterator[list[int]]:
    """The ids of encode_document in pieces of bounded length."""
    if not is_lossless(processor):
        yield processor.encode(text)
        return
    if text.startswith(" "):
        yield byte_ids(processor, " ")
    for match in SEGMENT.finditer(text, text.startswith(" ")):
        segment = match[0]
        yield byte_ids(processor, SPACE) if segment == SPACE else processor.encode(segment)


def decode_document(processor: Processor, ids: Iterable[int]) -> str:
    """The text of token ids; control tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
    return spell_ids(processor, ids).decode("utf-8", errors="replace")


def count_bytes(processor: Processor, text: str) -> list[int]:
    """Bytes of the original `text` that BOS and each of its tokens stand for; they sum to all.

    A tokenizer that normalises tells where in the text each token ends. What was left out before a
    token is counted with it, what was left out at the end with the last one, which is BOS (else 0)
    where nothing at all is left.
    """
    if is_lossless(processor):
        spelled = spell_pieces(processor)
        return [0, *(len(spelled[token]) for token in encode_document(processor, text))]
    raw = text.encode("utf-8")
    ends = [end for _, end in processor.encode(raw, return_type="offset_mapping")["offsets"]]
    ends = [0, 0, *ends]
    ends[-1] = len(raw)
    return [end - start for start, end in itertools.pairwise(ends)]


# --- 2. Reading documents ------------------------------------------------------------------------
# Each reader yields the texts of one file, one at a time, and stops at the first thing that is
# wrong with a message that says where. Nothing is repaired silently.

# Not the library's own text: test suites, packages from elsewhere, and what describes the machine
# that this Python was built on. The topics come as documents of their own, not as a module.
STDLIB_SKIPPED = re.compile(
    r"tests?|idle_test|(site|dist)-packages|__pycache__|config-.*|_sysconfigdata.*|pydoc_data"
)


def read_stdlib() -> list[str]:
    """The running Python's library modules and documentation topics, in the order of their hash.

    The order is as good as random, but the same everywhere: in the order of their names, training
    would see all character tables first and all XML last.
    """
    texts = list(pydoc_data.topics.topics.values())
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if not STDLIB_SKIPPED.fullmatch(name)]
        for name in files:
            if name.endswith(".py") and not STDLIB_SKIPPED.fullmatch(name):
                texts += read_txt(Path(folder, name))
    return sorted(texts, key=hash_text)


def decode_utf8(raw: bytes, where: str) -> str:
    """`raw` as text; InputError naming the place if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8 "
            f"({error.reason}); convert the text to UTF-8, for instance with iconv"
        ) from None


def read_txt(path: Path) -> Iterator[str]:
    """The whole file as one document."""
    yield decode_utf8(path.read_bytes(), str(path))


def read_jsonl(path: Path) -> Iterator[str]:
    """The `text` of each line; blank lines are skipped."""
    with path.open("rb") as file:
        yield from parse_records(path, file)


def read_jsonl_zst(path: Path) -> Iterator[str]:
    """As read_jsonl, through zstd."""
    try:
        with path.open("rb") as file:
            yield from parse_records(path, split_lines(decompress_chunks(file)))
    except (zstandard.ZstdError, EOFError) as error:
        raise InputError(f"{path}: not a whole zstd file ({error}); make it again") from None


def decompress_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The content of a zstd file of any number of frames; EOFError if it was cut short."""
    frame = None
    while chunk := file.read(1 << 20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("its last frame is cut short")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a byte stream, without their newline."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def parse_records(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    """The `text` of JSON lines; InputError with the line's number for anything else."""
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(decode_utf8(line, where))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); "
                'each line must be one object such as {"text": "..."}'
            ) from None
        yield check_text(record.get("text") if isinstance(record, dict) else record, where)


def check_text(text: object, where: str) -> str:
    """`text` if it is a string that UTF-8 can hold, else InputError."""
    if not isinstance(text, str):
        raise InputError(
            f"{where}: `text` is {'missing' if text is None else type(text).__name__}, it must be "
            "a string; rename the field that holds the document, or remove the record"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: `text` holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is no text; remove it"
        ) from None
    return text


def read_parquet(path: Path) -> Iterator[str]:
    """The `text` column, row by row."""
    try:  # imported here: only this format needs it, and it is not small
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise InputError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in (names := file.schema_arrow.names):
                raise InputError(f"{path}: no column `text` among {names}; rename the right one")
            batches = file.iter_batches(batch_size=256, columns=["text"])
            texts = itertools.chain.from_iterable(rows.column(0).to_pylist() for rows in batches)
            for number, text in enumerate(texts, start=1):
                yield check_text(text, f"{path} row {number}")
    except (arrow.ArrowInvalid, UnicodeDecodeError) as error:
        place = f"after row {number}" if number else "at its beginning"
        raise InputError(f"{path}: not valid parquet {place} ({error}); make it again") from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
}


def find_reader(path: Path) -> Callable[[Path], Iterator[str]]:
    """The reader for a file's name; InputError if there is none."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise InputError(f"{path}: unknown kind of file; the name must end in {', '.join(READERS)}")


def find_files(patterns: list[str]) -> list[Path]:
    """The files that paths and globs name, those of a glob sorted, each once."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [name for name in found if os.path.isfile(name)]
        if not found:
            raise InputError(f"{pattern}: no such file, and no file matches it as a glob")
        files |= dict.fromkeys(map(Path, found))
    for path in files:
        find_reader(path)
    return list(files)


# --- 3. Split ------------------------------------------------------------------------------------
# A document's role depends on its text and on the documents before it alone, so that the split is
# the same on every machine and survives the addition of files. 25 bytes are kept for each document.


class ParamRole(IntEnum):
    TRAIN = 0
    VAL = 1
    EMPTY = 2  # nothing but white space: left out
    COPY_OF_VAL = 3  # left out: training on it would be training on the validation text
    COPY_IN_TRAIN = 4  # left out with --dedup only


KEY_BYTES = 16  # of the SHA-256 of the text: enough to tell any two documents apart


def hash_text(text: str) -> bytes:
    """The document's key."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:KEY_BYTES]


class Split:
    """Assigns roles to documents in order, and keeps what was decided."""

    def __init__(self, val_frac: float | None):
        self.val_frac = val_frac  # None: validation documents are named, not drawn
        self.val_keys: set[bytes] = set()
        self.keys = bytearray()
        self.roles = bytearray()
        self.sizes = array("Q")
        self.num_copies_kept = 0

    def add(self, text: str, *, is_named_val: bool) -> tuple[ParamRole, bytes]:
        """Decide on the next document; returns its role and key."""
        key = hash_text(text)
        role = ParamRole.EMPTY if not text.strip() else self._choose(key, is_named_val)
        if role == ParamRole.VAL:
            self.val_keys.add(key)
        self.keys += key
        self.roles.append(role)
        self.sizes.append(len(text.encode("utf-8")))
        return role, key

    def _choose(self, key: bytes, is_named_val: bool) -> ParamRole:
        """The role of a document that is not empty."""
        if is_named_val:
            return ParamRole.VAL
        if key in self.val_keys:
            return ParamRole.COPY_OF_VAL
        if self.val_frac is None:
            return ParamRole.TRAIN
        is_drawn = int.from_bytes(key[:8], "big") < self.val_frac * 2**64
        return ParamRole.VAL if is_drawn else ParamRole.TRAIN

    def close(self, *, dedup: bool) -> None:
        """Find the second and later copies of training documents; drop them if `dedup`."""
        roles = np.frombuffer(self.roles, dtype=np.uint8)
        repeats = find_repeats(self.keys, np.flatnonzero(roles == ParamRole.TRAIN))
        if dedup:
            roles[repeats] = ParamRole.COPY_IN_TRAIN  # writes through to self.roles
        else:
            self.num_copies_kept = len(repeats)

    def key(self, index: int) -> bytes:
        """The key of document `index`."""
        return bytes(self.keys[index * KEY_BYTES : (index + 1) * KEY_BYTES])

    def total(self, role: ParamRole) -> tuple[int, int]:
        """Number of documents with this role, and their UTF-8 bytes."""
        chosen = np.frombuffer(self.roles, dtype=np.uint8) == role
        return int(chosen.sum()), int(np.frombuffer(self.sizes, dtype=np.uint64)[chosen].sum())


def find_repeats(keys: bytearray, indices: np.ndarray) -> np.ndarray:
    """Those of `indices` whose key occurs at an earlier one of them too."""
    high, low = np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)[indices].T
    order = np.lexsort((high, low))  # stable: within equal keys, the first comes first
    is_repeat = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    repeats: np.ndarray = indices[order[1:][is_repeat]]
    return repeats


class Sample:
    """The distinct documents with the smallest keys, up to a number of bytes.

    Keys are as good as random, so this is a fair sample; it needs one pass and bounded memory, and
    is independent of the order of documents.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._keys: set[bytes] = set()
        self._heap: list[tuple[int, bytes, bytes]] = []  # largest key on top

    def add(self, key: bytes, text: str) -> None:
        """Consider one document."""
        if key in self._keys or (self.num_bytes >= self.max_bytes and key > self._heap[0][1]):
            return
        raw = text[: self.max_bytes].encode("utf-8")
        heapq.heappush(self._heap, (-int.from_bytes(key, "big"), key, raw))
        self._keys.add(key)
        self.num_bytes += len(raw)
        while self.num_bytes - len(self._heap[0][2]) >= self.max_bytes:
            _, largest, raw = heapq.heappop(self._heap)
            self._keys.remove(largest)
            self.num_bytes -= len(raw)

    def texts(self) -> list[str]:
        """The sample, in the order of the keys; the last document is cut to fit."""
        ordered = [raw for _, _, raw in sorted(self._heap, reverse=True)]
        spare = self.max_bytes - self.num_bytes
        if ordered and spare < 0:
            ordered[-1] = ordered[-1][:spare]
        return [raw.decode("utf-8", errors="ignore") for raw in ordered]


# --- 4. Tokenizer --------------------------------------------------------------------------------
# A SentencePiece BPE that keeps every character. Newlines are ordinary characters, so that pieces
# such as ":\n" can form; runs of spaces may be pieces, which source code needs.

TOKENIZER_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.999,
    "required_chars": f"{SPACE}\n\t",  # pieces of their own, however rare
    "pad_id": 0,
    "bos_id": BOS_ID,
    "eos_id": 2,
    "unk_id": 3,
    "max_sentence_length": 1 << 20,  # above any sentence below, or they would be left out
    "num_threads": 4,  # stored in the model: must not follow the machine
    "minloglevel": 2,
}
MIN_VOCAB_SIZE = 4 + 256 + 3  # special pieces, byte pieces, required characters
# The trainer fails on words of more than 65,535 characters and leaves out sentences with NUL or
# U+2585, which it reserves; a literal U+2581 would be taken for a space.
SENTENCE = re.compile("[^\0\u2581\u2585]{1,4096}(?= )|[^\0\u2581\u2585]{1,4096}")


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces; the same bytes for the same texts."""
    model = io.BytesIO()
    sentences = (sentence for text in texts for sentence in SENTENCE.findall(text))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            **TOKENIZER_SETTINGS,
        )
    except RuntimeError as error:
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        raise InputError(explain_training_failure(str(error), num_bytes, vocab_size)) from None
    processor = Processor(model_proto=model.getvalue())
    assert is_lossless(processor), "the trained tokenizer does not give its text back"
    assert processor.piece_to_id(SPACE) != processor.unk_id(), "no piece for a single space"
    return model.getvalue()


def explain_training_failure(message: str, num_bytes: int, vocab_size: int) -> str:
    """SentencePiece's complaint in terms of this script's options."""
    if limit := re.search(r"value <= (\d+)", message):
        return (
            f"too little text for the vocabulary: {num_bytes:,} bytes of training text give at "
            f"most {limit[1]} pieces, --vocab-size is {vocab_size}; add text or lower --vocab-size"
        )
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: bytes and single characters of the training "
            f"text alone need {limit[1]} pieces; raise --vocab-size"
        )
    return f"the tokenizer could not be trained on {num_bytes:,} bytes of text: {message}"


def check_tokenizer(path: Path) -> Processor:
    """Load a tokenizer that shards can be made with; InputError if it is not one."""
    try:
        processor = Processor(model_proto=path.read_bytes())
    except RuntimeError:
        raise InputError(f"{path}: not a SentencePiece model; give a .model file") from None
    problems = []
    num_pieces = processor.get_piece_size()
    if num_pieces > MAX_TOKEN_ID + 1:
        problems.append(f"{num_pieces} pieces, shards hold ids up to {MAX_TOKEN_ID}")
    if processor.bos_id() != BOS_ID:
        problems.append(f"BOS has id {processor.bos_id()}, shards need {BOS_ID}")
    if not any(map(processor.is_byte, range(num_pieces))):
        problems.append("no byte pieces, so unknown characters would count as no bytes")
    if processor.piece_to_id(SPACE) == processor.unk_id():
        problems.append("no piece for a single space, which would count as three bytes")
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}; leave out --tokenizer to train one")
    return processor


# --- 5. Encoding ---------------------------------------------------------------------------------
# A batch is some documents of one split; its result is a small shard in .partial/ whose name holds
# a hash of all that it depends on. So a result that is there is right, whoever made it and when.


class Batch(NamedTuple):
    texts: list[str]
    path: Path
    bytes_path: Path | None  # the byte counts' small shard, for validation batches with a sidecar
    model_path: Path


@functools.lru_cache(maxsize=1)
def load_processor(model_path: Path) -> Processor:
    """The tokenizer, once for each process."""
    return Processor(model_file=str(model_path))


def encode_batch(batch: Batch) -> int:
    """Encode the documents of a batch into its small shards; returns their UTF-8 bytes."""
    processor = load_processor(batch.model_path)
    ids, counts = array("H"), array("Q")
    num_bytes = 0
    for text in batch.texts:
        document = array("H", [BOS_ID])
        for segment in encode_segments(processor, text):
            document.extend(segment)
        raw = text.encode("utf-8")
        if is_lossless(processor) and spell_ids(processor, document) != raw:
            raise InputError(
                f"the tokenizer {batch.model_path} does not give back a document that begins "
                f"{text[:40]!r}; leave out --tokenizer to train one that does"
            )
        ids += document
        if batch.bytes_path is not None:
            counts.extend(count_bytes(processor, text))
        num_bytes += len(raw)
    if batch.bytes_path is not None:
        if max(counts) > MAX_TOKEN_ID:
            raise InputError(f"one token stands for {max(counts)} bytes; a sidecar holds 65,535")
        assert len(counts) == len(ids), f"{len(counts)} byte counts for {len(ids)} tokens"
        write_shard(batch.bytes_path, np.array(counts))
    write_shard(batch.path, np.array(ids))  # last: a batch with this file is finished
    return num_bytes


def is_finished(path: Path) -> bool:
    """Whether a whole small shard is there."""
    try:
        return len(read_shard(path)) > 0
    except (OSError, ValueError):
        return False


def start_worker() -> None:
    """Set up a worker process: ignore Ctrl-C, which the parent handles, and die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "start_worker runs in a worker process"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent closes no queue, so the worker would wait for ever

    threading.Thread(target=watch, daemon=True).start()


def encode_batches(batches: Iterable[Batch], num_workers: int, bar: tqdm) -> None:
    """Encode what is not finished yet, holding at most two batches for each worker."""
    waiting: deque[Future[int]] = deque()
    with contextlib.ExitStack() as stack:
        pool = None
        if num_workers > 1:  # never fork: the parent has threads, which a fork would lose
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context(
                "forkserver" if "forkserver" in methods else "spawn"
            )
            pool = ProcessPoolExecutor(num_workers, context, initializer=start_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
        for batch in batches:
            if is_finished(batch.path):
                bar.update(sum(len(text.encode("utf-8")) for text in batch.texts))
            elif pool is None:
                bar.update(encode_batch(batch))
            else:
                waiting.append(pool.submit(encode_batch, batch))
            if len(waiting) >= 2 * num_workers:
                bar.update(waiting.popleft().result())
        for future in waiting:
            bar.update(future.result())


# --- 6. Shards and manifest ----------------------------------------------------------------------
# Everything is finished inside .partial/ and moved into place at the end; the manifest comes last.
# So OUT never holds half a shard, and a manifest there vouches for all the files that it names.

MANIFEST, PARTIAL = "manifest.json", ".partial"
TOKENIZER_FILE, VAL_TEXT_FILE = "tokenizer.model", "val_text.bin"
SERIAL_BYTES = 40_000_000  # one process encodes this in the time that starting several takes
INPUT_CHANGED = "an input file changed while it was read; run again when it is complete"
OTHER_OUT = "give another --out, or --force to replace what this script made there"
SPLIT_RULES = {
    "hash": "validation: the first 8 bytes of the SHA-256 of the UTF-8 text, as a big-endian "
    "integer, are below val_frac * 2**64; further copies of such a document are left out",
    "named": "validation: the files of --val-input; other copies of their documents are left out",
}


class Options(argparse.Namespace):
    """The command line, typed."""

    source: str | None
    input: list[str]
    val_input: list[str]
    val_frac: float
    tokenizer: Path | None
    vocab_size: int
    tokenizer_bytes: int
    shard_tokens: int
    name: str
    out: Path
    dedup: bool
    byte_sidecar: bool
    write_val_text: bool
    workers: int | None
    batch_bytes: int
    force: bool


class Plan(NamedTuple):
    """One call, its input files found and checked."""

    options: Options
    files: list[Path]  # empty: the standard library
    val_files: list[Path]

    @property
    def partial(self) -> Path:
        """Where unfinished work lies."""
        return self.options.out / PARTIAL

    def documents(self) -> Iterator[tuple[bool, str]]:
        """All documents in order, each with whether it comes from a file of --val-input."""
        for path in self.val_files:
            for text in find_reader(path)(path):
                yield True, text
        if self.options.source == "stdlib":
            for text in read_stdlib():
                yield False, text
        for path in self.files:
            for text in find_reader(path)(path):
                yield False, text

    def arguments(self) -> dict[str, Any]:
        """What the result depends on, for the manifest; names and sizes stand for input files."""
        options = self.options
        tokenizer = options.tokenizer
        is_stdlib = options.source == "stdlib"
        return {
            "source": f"stdlib of Python {platform.python_version()}" if is_stdlib else "files",
            "input": [[path.name, path.stat().st_size] for path in self.files],
            "val_input": [[path.name, path.stat().st_size] for path in self.val_files],
            "val_frac": None if self.val_files else options.val_frac,
            "tokenizer": hash_file(tokenizer) if tokenizer else None,
            "vocab_size": None if tokenizer else options.vocab_size,
            "tokenizer_bytes": None if tokenizer else options.tokenizer_bytes,
            "shard_tokens": options.shard_tokens,
            "name": options.name,
            "dedup": options.dedup,
            "byte_sidecar": options.byte_sidecar,
            "write_val_text": options.write_val_text,
        }


def scan_documents(plan: Plan) -> tuple[Split, Sample]:
    """First pass: read, check and hash every document; its role, and the tokenizer's sample."""
    options = plan.options
    split = Split(None if plan.val_files else options.val_frac)
    sample = Sample(0 if options.tokenizer else options.tokenizer_bytes)
    with show_progress("reading") as bar:
        for is_named_val, text in plan.documents():
            role, key = split.add(text, is_named_val=is_named_val)
            if role == ParamRole.TRAIN and options.tokenizer is None:
                sample.add(key, text)
            bar.update(split.sizes[-1])
    split.close(dedup=options.dedup)
    num_train, num_val, num_empty = (
        split.total(r)[0] for r in (ParamRole.TRAIN, ParamRole.VAL, ParamRole.EMPTY)
    )
    seen = f"{len(split.roles)} documents, {num_empty} of them empty"
    if num_train + num_val == 0:
        raise InputError(f"no text: {seen}; give files with text")
    if num_val == 0:
        remedy = "raise --val-frac or name validation files with --val-input"
        raise InputError(f"no validation document among {seen}; {remedy}")
    if num_train == 0:
        remedy = "lower --val-frac or add files that are not validation text"
        raise InputError(f"no training document among {seen}, {num_val} are validation; {remedy}")
    return split, sample


def provide_tokenizer(plan: Plan, sample: Sample) -> Path:
    """Train the tokenizer, or take the given one; its path in .partial/."""
    options = plan.options
    if options.tokenizer is not None:
        path = plan.partial / f"tokenizer_{hash_file(options.tokenizer)[:16]}.model"
        write_atomic(path, options.tokenizer.read_bytes())
        return path
    texts = sample.texts()
    settings = repr((TOKENIZER_SETTINGS, options.vocab_size, sentencepiece.__version__))
    digest = hashlib.sha256(settings.encode() + b"".join(map(hash_text, texts))).hexdigest()[:16]
    path = plan.partial / f"tokenizer_{digest}.model"
    if not path.exists():
        num_bytes = min(sample.num_bytes, sample.max_bytes)
        print(
            f"training a tokenizer of {options.vocab_size} pieces on {num_bytes:,} bytes of text, "
            f"about {num_bytes / 3e6 + 1:.0f} s",
            flush=True,
        )
        write_atomic(path, train_tokenizer(texts, options.vocab_size))
    return path


class BatchMaker:
    """Second pass: collects the documents of each split into batches, in order."""

    def __init__(self, plan: Plan, split: Split, model_path: Path):
        self.plan = plan
        self.split = split
        self.model_path = model_path
        self.paths: dict[ParamRole, list[Path]] = {ParamRole.TRAIN: [], ParamRole.VAL: []}
        self._texts: dict[ParamRole, list[str]] = {ParamRole.TRAIN: [], ParamRole.VAL: []}
        self._num_bytes = {ParamRole.TRAIN: 0, ParamRole.VAL: 0}

    def batches(self, val_text: BinaryIO | None) -> Iterator[Batch]:
        """Yield the batches; validation texts also go to `val_text`."""
        num_documents = 0
        for index, (_, text) in enumerate(self.plan.documents()):
            num_documents = index + 1
            if hash_text(text) != self.split.key(index):
                raise InputError(INPUT_CHANGED)
            role = ParamRole(self.split.roles[index])
            if role == ParamRole.VAL and val_text is not None:
                val_text.write(text.encode("utf-8"))
            if role in self.paths:
                self._texts[role].append(text)
                self._num_bytes[role] += self.split.sizes[index]
                if self._num_bytes[role] >= self.plan.options.batch_bytes:
                    yield self._close(role)
        if num_documents != len(self.split.roles):
            raise InputError(INPUT_CHANGED)
        yield from [self._close(role) for role in self.paths if self._texts[role]]

    def _close(self, role: ParamRole) -> Batch:
        """The texts held for one split, as a batch."""
        texts, self._texts[role], self._num_bytes[role] = self._texts[role], [], 0
        has_counts = role == ParamRole.VAL and self.plan.options.byte_sidecar
        parts = [self.model_path.name.encode(), bytes([has_counts]), *map(hash_text, texts)]
        digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        stem = f"{role.name.lower()}_{len(self.paths[role]):06d}_{digest}"
        path = self.plan.partial / f"{stem}.bin"
        self.paths[role].append(path)
        return Batch(texts, path, sidecar_of(path) if has_counts else None, self.model_path)


def sidecar_of(part: Path) -> Path:
    """The byte counts' small shard that belongs to a small shard of tokens."""
    return part.with_name(f"bytes_{part.name}")


def choose_workers(options: Options, num_bytes: int) -> int:
    """Processes to encode with: as asked for, else all cores unless one is done sooner."""
    if options.workers is not None:
        return options.workers
    return (os.cpu_count() or 1) if num_bytes > SERIAL_BYTES else 1


def cut_shards(parts: Iterable[Path], shard_tokens: int) -> Iterator[np.ndarray]:
    """Join small shards and cut them into pieces of `shard_tokens`; the last may be shorter.

    Documents go on in the next piece where one is full.
    """
    held: list[np.ndarray] = []
    room = shard_tokens
    for part in parts:
        ids = read_shard(part)
        while len(ids) >= room:
            yield np.concatenate([*held, ids[:room]])
            ids, held, room = ids[room:], [], shard_tokens
        if len(ids):
            held.append(np.array(ids))  # a copy: thousands of open maps would hit a system limit
            room -= len(ids)
    if held:
        yield np.concatenate(held)


def write_shards(parts: Iterable[Path], stem: Path, shard_tokens: int) -> dict[str, int]:
    """Write STEM_000000.bin, ... from small shards; the number of shards and tokens."""
    num_shards = num_tokens = 0
    for ids in cut_shards(parts, shard_tokens):
        write_shard(stem.with_name(f"{stem.name}_{num_shards:06d}.bin"), ids)
        num_shards += 1
        num_tokens += len(ids)
    return {"shards": num_shards, "tokens": num_tokens}


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_documents(plan: Plan, split: Split, model_path: Path, final: Path) -> BatchMaker:
    """Second pass: leaves every batch's small shards in .partial/, and the validation text."""
    options = plan.options
    maker = BatchMaker(plan, split, model_path)
    num_bytes = split.total(ParamRole.TRAIN)[1] + split.total(ParamRole.VAL)[1]
    with contextlib.ExitStack() as stack:
        wants_text = options.write_val_text
        val_text = stack.enter_context(atomic_file(final / VAL_TEXT_FILE)) if wants_text else None
        bar = stack.enter_context(show_progress("encoding", num_bytes))
        encode_batches(maker.batches(val_text), choose_workers(options, num_bytes), bar)
    return maker


def write_files(plan: Plan, maker: BatchMaker, final: Path) -> dict[str, Any]:
    """Write shards and tokenizer into the folder `final`; the manifest's entries on them."""
    options, split = plan.options, maker.split
    entries: dict[str, Any] = {"copies_kept": split.num_copies_kept}
    for role in (ParamRole.TRAIN, ParamRole.VAL):
        stem = final / f"{options.name}_{role.name.lower()}"
        num_documents, text_bytes = split.total(role)
        entries[role.name.lower()] = {
            "documents": num_documents,
            "text_bytes": text_bytes,
            **write_shards(maker.paths[role], stem, options.shard_tokens),
        }
    if options.byte_sidecar:
        stem = final / f"{options.name}_val_bytes"
        write_shards(map(sidecar_of, maker.paths[ParamRole.VAL]), stem, options.shard_tokens)
    write_atomic(final / TOKENIZER_FILE, maker.model_path.read_bytes())
    processor = load_processor(maker.model_path)
    entries["tokenizer"] = {
        "file": TOKENIZER_FILE,
        "sha256": hash_file(final / TOKENIZER_FILE),
        "vocab_size": processor.get_piece_size(),
        "is_lossless": is_lossless(processor),
    }
    return entries


def list_made_files(folder: Path, name: str) -> list[Path]:
    """Files in `folder` with the names that this script gives to the shards of data set `name`."""
    pattern = re.compile(rf"{name}_(train|val|val_bytes)_\d{{6}}\.bin")
    return [path for path in folder.glob("*.bin") if pattern.fullmatch(path.name)]


def make_data_set(plan: Plan) -> dict[str, Any]:
    """Both passes, then the files, then the manifest, which is returned."""
    out, final = plan.options.out, plan.partial / "final"
    plan.partial.mkdir(parents=True, exist_ok=True)
    for leftover in plan.partial.glob("*.tmp"):  # of a killed process
        leftover.unlink()
    shutil.rmtree(final, ignore_errors=True)
    split, sample = scan_documents(plan)
    model_path = provide_tokenizer(plan, sample)
    maker = encode_documents(plan, split, model_path, final)
    entries = write_files(plan, maker, final)
    manifest = {
        "format": 1,
        "name": plan.options.name,
        "arguments": plan.arguments(),
        "split_rule": SPLIT_RULES["named" if plan.val_files else "hash"],
        **entries,
        "left_out": {
            "empty": split.total(ParamRole.EMPTY)[0],
            "copies_of_validation": split.total(ParamRole.COPY_OF_VAL)[0],
            "copies_in_training": split.total(ParamRole.COPY_IN_TRAIN)[0],
        },
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(final.iterdir())
        },
    }
    publish(out, final, manifest)
    shutil.rmtree(plan.partial)
    return manifest


def publish(out: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Move finished files into place and write the manifest, which makes them a data set."""
    (out / MANIFEST).unlink(missing_ok=True)
    for stale in [*list_made_files(out, manifest["name"]), out / VAL_TEXT_FILE]:
        stale.unlink(missing_ok=True)
    for name in manifest["files"]:
        os.replace(final / name, out / name)
    sync_folder(out)
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    write_atomic(out / MANIFEST, f"{text}\n".encode())


def read_manifest(plan: Plan) -> dict[str, Any] | None:
    """The manifest of a data set that is complete and undamaged and is the one asked for.

    None if there is none yet, or if it must be made again; InputError if something else is there.
    """
    options, path = plan.options, plan.options.out / MANIFEST
    if not path.exists():
        if list_made_files(options.out, ".*") and not plan.partial.exists():
            raise InputError(f"{options.out} holds shards made elsewhere; give another --out")
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        made_with, files = manifest["arguments"], manifest["files"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not of this script; give another --out") from None
    if options.force:
        discard(options.out, files)
        return None
    asked = plan.arguments()
    if changes := [key for key in asked if asked[key] != made_with.get(key)]:
        listed = "; ".join(f"{key} {made_with.get(key)}, now {asked[key]}" for key in changes)
        raise InputError(f"{options.out} holds a data set made otherwise ({listed}); {OTHER_OUT}")
    for source in [*plan.files, *plan.val_files]:
        if source.stat().st_mtime > path.stat().st_mtime:
            raise InputError(f"{source} is newer than the data set in {options.out}; {OTHER_OUT}")
    if damaged := find_damage(options.out, files):
        print(f"{options.out / damaged} is missing or damaged: making the data set again")
        return None
    return manifest


def discard(out: Path, files: Iterable[str]) -> None:
    """Remove a data set, the manifest first."""
    (out / MANIFEST).unlink()
    for name in files:
        if Path(name).name == name:  # nothing outside `out`, whatever the manifest says
            (out / name).unlink(missing_ok=True)


def find_damage(out: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that is not as the manifest says, if any."""
    for name, entry in files.items():
        path = out / name
        has_size = path.is_file() and path.stat().st_size == entry["bytes"]
        if not has_size or hash_file(path) != entry["sha256"]:
            return name
    return None


# --- 7. Command line -----------------------------------------------------------------------------


def bounded(low: float, high: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high` for argparse."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def parse_name(text: str) -> str:
    """A data set's name; without _, which separates it from the rest of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} may have letters, digits and - only")
    return text


def parse_options(argv: list[str] | None) -> Options:
    """Parse the command line; exits with code 2 and a message if it is not usable."""
    parser = argparse.ArgumentParser(
        description="Turn text into a tokenizer and token shards.",
        epilog="data/README.md describes the files; a second call goes on after a kill.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--source", choices=["stdlib"], help="a built-in corpus, offline")
    kinds = " ".join(READERS)
    sources.add_argument("--input", nargs="+", default=[], metavar="FILE", help=f"files: {kinds}")
    add("--val-input", nargs="+", default=[], metavar="FILE", help="validation files")
    add("--val-frac", type=bounded(0, 1, float), default=0.06, help="share of documents drawn")
    add("--out", type=Path, required=True, help="folder for the result")
    add("--name", type=parse_name, help="first part of file names (default: demo, corpus)")
    tokenizers = parser.add_mutually_exclusive_group()
    tokenizers.add_argument("--tokenizer", type=Path, metavar="MODEL", help="use this one as it is")
    sizes = bounded(MIN_VOCAB_SIZE, MAX_TOKEN_ID + 1)
    tokenizers.add_argument("--vocab-size", type=sizes, default=1024, help="pieces to train")
    add("--tokenizer-bytes", type=bounded(1, 10**9), default=20_000_000, help="text to train it on")
    add("--shard-tokens", type=bounded(1, 2**31 - 1), default=100_000_000, help="at most, each")
    add("--dedup", action="store_true", help="drop copies inside the training documents too")
    add("--byte-sidecar", action="store_true", help="write each validation token's byte count")
    add("--write-val-text", action="store_true", help=f"write {VAL_TEXT_FILE}")
    add("--workers", type=bounded(1, 4096), help="processes (default: all cores, 1 if little text)")
    add("--batch-bytes", type=bounded(1, 10**9), default=4_000_000, help="text encoded at a time")
    add("--force", action="store_true", help="replace what another call made in --out")
    options = parser.parse_args(argv, namespace=Options())
    options.name = options.name or ("demo" if options.source else "corpus")
    return options


def show_progress(what: str, num_bytes: int | None = None) -> tqdm:
    """A progress bar over bytes of text, on a terminal."""
    return tqdm(desc=what, total=num_bytes, unit="B", unit_scale=True, disable=None)


def print_summary(out: Path, manifest: dict[str, Any]) -> None:
    """What the data set holds, for people."""
    for split in ("train", "val"):
        entry = manifest[split]
        print(
            f"{split}: {entry['documents']:,} documents, {entry['text_bytes']:,} bytes, "
            f"{entry['tokens']:,} tokens in {entry['shards']} shard(s)"
        )
    left_out = manifest["left_out"]
    print(
        f"left out: {left_out['empty']} empty, {left_out['copies_of_validation']} copies of "
        f"validation documents, {left_out['copies_in_training']} copies of training documents "
        f"(kept: {manifest['copies_kept']})"
    )
    tokenizer = manifest["tokenizer"]
    kind = "lossless" if tokenizer["is_lossless"] else "with its own normalisation"
    print(f"tokenizer: {tokenizer['vocab_size']} pieces, {kind}; all in {out}")


def run(options: Options) -> None:
    """Make the data set, unless it is there."""
    if options.tokenizer is not None:
        check_tokenizer(options.tokenizer)
    plan = Plan(options, find_files(options.input), find_files(options.val_input))
    manifest = read_manifest(plan)
    if manifest is None:
        manifest = make_data_set(plan)
    else:
        shutil.rmtree(plan.partial, ignore_errors=True)  # of a kill just after the manifest
        print(f"already complete: {options.out}")
    print_summary(options.out, manifest)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse_options(argv)
    again = f"finished parts are kept in {options.out / PARTIAL}, the same command goes on there"
    try:
        run(options)
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        remedy = f"; make room: {again}" if error.errno == errno.ENOSPC else ""
        place = error.filename or options.out  # a full disk comes without a name
        print(f"error: {place}: {error.strerror or error}{remedy}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print(
            f"error: a worker process was killed, perhaps for memory; use fewer --workers; {again}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
