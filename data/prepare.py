"""Turn text into a tokenizer and token shards: the data that train_gpt.py trains on and scores.

    python data/prepare.py --source stdlib --out data/demo          # offline, a few seconds
    python data/prepare.py --input mytext.txt --out data/mine
    python data/prepare.py --input 'texts/*.jsonl.zst' --out data/mine

Two passes over the documents; neither holds them in memory. The first pass reads, checks and
hashes every document: which are validation, which are copies, and a sample to train the tokenizer
on. The second pass encodes batches of documents in several processes and writes each batch to
OUT/.partial/, where the same command finds it again after a kill. Then the batches are cut into
shards, the shards are moved to OUT, and the manifest is written last: a folder with a manifest is
complete. data/README.md describes the formats to the byte.

Sections: 1. Lossless encoding  2. Split  3. Tokenizer  4. Encoding  5. The plan  6. Shards
          7. Publishing  8. Command line
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import errno
import functools
import hashlib
import heapq
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import shutil
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import case_markers  # noqa: E402  (the path above makes the import possible)
from data.files import (  # noqa: E402
    MANIFEST,
    MANIFEST_FORMAT,
    Progress,
    hash_file,
    lock_folder,
    make_output_safe,
    printable,
    read_small,
    show_progress,
)
from data.readers import (  # noqa: E402
    KEY_BYTES,
    READERS,
    Document,
    find_files,
    hash_text,
    read_documents,
    read_stdlib,
)
from train_gpt import (  # noqa: E402
    BOS_ID,
    SHARD_HEADER_BYTES,
    SHARD_MAGIC,
    SHARD_VERSION,
    InputError,
    atomic_file,
    check_tokenizer,
    read_shard,
    sync_folder,
    write_atomic,
    write_shard,
)

Processor = sentencepiece.SentencePieceProcessor


# --- 1. Lossless encoding ------------------------------------------------------------------------
# Tokenizers made here are lossless: the bytes of a document's tokens, in order, are its UTF-8 text.
# SentencePiece alone does not give that: it writes a space as U+2581 and cannot tell the two apart,
# and decoders drop the leading space of a piece that follows BOS.

SPACE = "\u2581"  # how SentencePiece writes a space
MAX_TOKEN_ID = 65_535  # a shard holds uint16
MAX_TOKENIZER_BYTES = 1 << 26
# Text that common normalizations change: case, forms, widths, controls, whitespace.
PROBE = "  A  b \t\r\n\n \u00c5 A\u030a \ufb01 \uff21 \u3000 \u00ad \u200b \ufeff \x00\x7f 12 \n "
# Long texts are encoded in segments, which halves the time and bounds the memory. A cut lies before
# a run of spaces that follows another character, where most tokenizers have no piece that crosses.
SEGMENT = re.compile(f"{SPACE}|[^{SPACE}]{{1,4096}} *[^ {SPACE}]*")
STRETCH = re.compile(f"{SPACE}|[^{SPACE}]+")  # where pieces cross spaces


@functools.lru_cache(maxsize=8)
def decode_pieces(processor: Processor) -> list[bytes]:
    """The bytes that each token id stands for; none for control pieces and the unknown piece."""
    decoded = []
    for token in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            decoded.append(bytes([int(piece[3:5], 16)]))
        elif processor.is_control(token) or processor.is_unknown(token):
            decoded.append(b"")
        else:
            decoded.append(piece.replace(SPACE, " ").encode("utf-8"))
    return decoded


def byte_ids(processor: Processor, text: str) -> list[int]:
    """Token ids that stand for the UTF-8 bytes of `text` one by one."""
    return [processor.piece_to_id(f"<0x{value:02X}>") for value in text.encode("utf-8")]


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """A Protocol Buffers integer at `position` (7 bits a byte, low first), and where it ends."""
    value = shift = 0
    while message[position] > 127:
        value |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | message[position] << shift, position + 1


def parse_proto(message: bytes) -> dict[int, int | bytes]:
    """The fields of a Protocol Buffers message by number; of a repeated field, the last value."""
    fields: dict[int, int | bytes] = {}
    position = 0
    while position < len(message):
        tag, position = read_varint(message, position)
        number, wire_type = divmod(tag, 8)
        if wire_type == 0:
            fields[number], position = read_varint(message, position)
            continue
        if wire_type == 2:
            length, position = read_varint(message, position)
        else:
            length = {1: 8, 5: 4}[wire_type]
        fields[number] = message[position : position + length]
        position += length
    return fields


def has_no_normalization(processor: Processor) -> bool:
    """Whether the model's normalizer changes nothing but space to U+2581.

    Field numbers: sentencepiece_model.proto. 3: the normalizer, with 2: compiled rules; 3: add a
    space at the start, 4: remove extra spaces, 5: write spaces as U+2581 (all on unless set to 0).
    """
    normalizer = parse_proto(processor.serialized_model_proto()).get(3, b"")
    assert isinstance(normalizer, bytes), "field 3 of a SentencePiece model is a message"
    fields = parse_proto(normalizer)
    return not fields.get(2) and [fields.get(number, 1) for number in (3, 4, 5)] == [0, 0, 1]


@functools.lru_cache(maxsize=8)
def is_lossless(processor: Processor) -> bool:
    """Whether encode_document can keep every text exactly: the tokenizer must not normalize."""
    if not has_no_normalization(processor):
        return False
    return decode_ids(processor, processor.encode(PROBE)) == PROBE.encode("utf-8")


@functools.lru_cache(maxsize=8)
def crosses_spaces(processor: Processor) -> bool:
    """Whether a piece has a space after another character."""
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    return any(SPACE in piece.lstrip(SPACE) for piece in pieces)


def decode_ids(processor: Processor, ids: Iterable[int]) -> bytes:
    """The bytes that a sequence of tokens stands for."""
    return b"".join(map(decode_pieces(processor).__getitem__, ids))


def encode_document(processor: Processor, text: str) -> list[int]:
    """Token ids of one document, without BOS.

    With a lossless tokenizer, decode_document returns exactly `text`: a literal U+2581 becomes its
    three byte tokens, and a space at the very start becomes its byte token, since byte counting
    ignores the leading space of a piece after BOS. Any other tokenizer is applied as it is, so that
    its ids are those of the published data sets.
    """
    return list(itertools.chain.from_iterable(encode_segments(processor, text)))


def encode_segments(processor: Processor, text: str) -> Iterator[list[int]]:
    """The ids of encode_document in lists of bounded length."""
    if not is_lossless(processor):
        yield processor.encode(text)
        return
    if text.startswith(" "):
        yield byte_ids(processor, " ")
    pattern = STRETCH if crosses_spaces(processor) else SEGMENT
    for match in pattern.finditer(text, text.startswith(" ")):
        segment = match[0]
        yield byte_ids(processor, SPACE) if segment == SPACE else processor.encode(segment)


def decode_document(processor: Processor, ids: Iterable[int]) -> str:
    """The text of token ids; control tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
    return decode_ids(processor, ids).decode("utf-8", errors="replace")


def count_original_bytes(processor: Processor, marked: str) -> list[int]:
    """What count_bytes gives for a text with case markers, which stand for no bytes."""
    ends = np.cumsum(count_bytes(processor, marked))
    before = case_markers.original_bytes(marked.encode("utf-8"))[ends]
    counts: list[int] = np.diff(before, prepend=0).tolist()
    return counts


def count_bytes(processor: Processor, text: str) -> list[int]:
    """Bytes of the original `text` that BOS and each of its tokens stand for; they sum to all.

    With a normalizing tokenizer, SentencePiece reports where in the text each token ends. Bytes
    that normalization removed count with the next token, at the end with the last one. BOS counts
    0, unless no other token is left.
    """
    if is_lossless(processor):
        decoded = decode_pieces(processor)
        return [0, *(len(decoded[token]) for token in encode_document(processor, text))]
    raw = text.encode("utf-8")
    ends = [end for _, end in processor.encode(raw, return_type="offset_mapping")["offsets"]]
    ends = [0, 0, *ends]
    ends[-1] = len(raw)
    return [end - start for start, end in itertools.pairwise(ends)]


# --- 2. Split ------------------------------------------------------------------------------------
# A document's role depends only on its text and on the documents before it. So the split is the
# same on every machine and stays when files are added. 25 bytes are kept for each document.


class Role(IntEnum):
    TRAIN = 0
    VAL = 1
    EMPTY = 2  # whitespace only: left out
    COPY_OF_VAL = 3  # left out: training on it would be training on the validation text
    COPY_IN_TRAIN = 4  # left out with --dedup only


class Split:
    """Assigns a role to each document in order, and stores keys, roles and sizes."""

    def __init__(self, val_frac: float | None, val_keys: Iterable[bytes] = ()):
        self.val_frac = val_frac  # None: validation documents are named, not drawn
        self.val_keys = set(val_keys)
        self.keys = bytearray()
        self.roles = bytearray()
        self.sizes = array("Q")
        self.num_copies_kept = 0

    def add(self, text: str, *, is_named_val: bool) -> tuple[Role, bytes]:
        """Decide on the next document; returns its role and key."""
        raw = text.encode("utf-8")
        key = hashlib.sha256(raw).digest()[:KEY_BYTES]
        role = Role.EMPTY if not text.strip() else self._choose(key, is_named_val)
        if role == Role.VAL:
            self.val_keys.add(key)
        self.keys += key
        self.roles.append(role)
        self.sizes.append(len(raw))
        return role, key

    def _choose(self, key: bytes, is_named_val: bool) -> Role:
        """The role of a document that is not empty."""
        if is_named_val:
            return Role.VAL
        if key in self.val_keys:
            return Role.COPY_OF_VAL
        if self.val_frac is None:
            return Role.TRAIN
        is_drawn = int.from_bytes(key[:8], "big") < self.val_frac * 2**64
        return Role.VAL if is_drawn else Role.TRAIN

    def close(self, *, dedup: bool) -> None:
        """Find the second and later copies of training documents; drop them if `dedup`."""
        roles = np.frombuffer(self.roles, dtype=np.uint8)
        repeats = find_repeats(self.keys, np.flatnonzero(roles == Role.TRAIN))
        if dedup:
            roles[repeats] = Role.COPY_IN_TRAIN  # writes through to self.roles
        else:
            self.num_copies_kept = len(repeats)

    def key(self, index: int) -> bytes:
        """The key of document `index`."""
        return bytes(self.keys[index * KEY_BYTES : (index + 1) * KEY_BYTES])

    def total(self, role: Role) -> tuple[int, int]:
        """Number of documents with this role, and their UTF-8 bytes."""
        chosen = np.frombuffer(self.roles, dtype=np.uint8) == role
        return int(chosen.sum()), int(np.frombuffer(self.sizes, dtype=np.uint64)[chosen].sum())

    def longest(self) -> int:
        """Index of the longest document that is not empty, the first of equals."""
        is_empty = np.frombuffer(self.roles, dtype=np.uint8) == Role.EMPTY
        return int(np.where(is_empty, 0, np.frombuffer(self.sizes, dtype=np.uint64)).argmax())


def find_repeats(keys: bytearray, indices: np.ndarray) -> np.ndarray:
    """Those of `indices` whose key occurs at an earlier one of them too."""
    high, low = np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)[indices].T
    order = np.lexsort((high, low))  # stable: within equal keys, the first comes first
    is_repeat = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    repeats: np.ndarray = indices[order[1:][is_repeat]]
    return repeats


class Cut(NamedTuple):
    """Where one document is cut into a training part and a validation part."""

    key: bytes  # of the whole document
    place: str
    position: int  # in characters
    boundary: str

    @property
    def rule(self) -> str:
        """The split rule in words, for the manifest."""
        return (
            "validation: too few documents to draw some, so it is the last part of the longest "
            f"one ({self.place}), from character {self.position} on, which is {self.boundary}; "
            "copies of that document are left out"
        )


BOUNDARIES = {  # in the order of preference
    "a paragraph's start": re.compile(r"\n[^\S\n]*\n\s*"),
    "a line's start": re.compile(r"\n"),
    "a word's start": re.compile(r"\s+"),
}


def cut_position(text: str, share: float) -> tuple[int, str]:
    """Where the last `share` of `text` begins, in characters, and what kind of boundary that is.

    The best kind of boundary is taken that has one between half of `share` and twice `share`, and
    of these the one that is closest to `share`.
    """
    target = round(len(text) * (1 - share))
    low = max(1, round(len(text) * (1 - 2 * share)))
    high = min(len(text) - 1, round(len(text) * (1 - share / 2)))
    for name, pattern in BOUNDARIES.items():
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends := [end for end in ends if end <= high]:
            return min(ends, key=lambda end: abs(end - target)), name
    return min(max(target, 1), max(high, 1)), "inside a word"


class Sample:
    """The distinct documents with the smallest keys, up to a number of bytes.

    Keys are as good as random, so this is a fair sample. It needs one pass and bounded memory, and
    does not depend on the order of documents.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._keys: set[bytes] = set()
        self._heap: list[tuple[int, bytes, bytes]] = []  # the largest key on top

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
        """The sample in the order of the keys; the last document is cut to fit."""
        ordered = [raw for _, _, raw in sorted(self._heap, reverse=True)]
        spare = self.max_bytes - self.num_bytes
        if ordered and spare < 0:
            ordered[-1] = ordered[-1][:spare]
        return [raw.decode("utf-8", errors="ignore") for raw in ordered]


# --- 3. Tokenizer --------------------------------------------------------------------------------
# A SentencePiece BPE that keeps every character. A newline is an ordinary character, so that pieces
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
    "max_sentence_length": 1 << 20,  # longer sentences would be left out; SENTENCE has shorter ones
    "num_threads": 4,  # stored in the model, so it must not depend on the machine
    "minloglevel": 2,
}
MIN_VOCAB_SIZE = 4 + 256 + 3  # special pieces, byte pieces, required characters
# SentencePiece's trainer fails on words of more than 65,535 characters and leaves out sentences
# with NUL or U+2585, which it reserves; it would take a literal U+2581 for a space.
SENTENCE = re.compile("[^\0\u2581\u2585]{1,4096}(?= )|[^\0\u2581\u2585]{1,4096}")


def tokenizer_settings(options: Options) -> dict[str, Any]:
    """SentencePiece's settings for these options."""
    settings = {
        **TOKENIZER_SETTINGS,
        "model_type": options.model,
        "split_digits": options.digits != "group",
        "split_by_whitespace": not options.superwords,
        "split_by_unicode_script": not options.mixes_scripts,
    }
    if options.case_markers == "merge":
        settings["required_chars"] += case_markers.MARKERS
    elif options.case_markers == "separate":
        settings["user_defined_symbols"] = list(case_markers.MARKERS)
    return settings


def train_tokenizer(texts: list[str], vocab_size: int, settings: dict[str, Any]) -> bytes:
    """A SentencePiece model of `vocab_size` pieces; the same bytes for the same texts."""
    model = io.BytesIO()
    sentences = (sentence for text in texts for sentence in SENTENCE.findall(text))
    try:
        with default_interrupt():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=model,
                vocab_size=vocab_size,
                **settings,
            )
    except RuntimeError as error:
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        raise InputError(explain_training_failure(str(error), num_bytes, vocab_size)) from None
    processor = Processor(model_proto=model.getvalue())
    assert is_lossless(processor), "the trained tokenizer does not give its text back"
    check_tokenizer(processor, processor.get_piece_size(), "the trained tokenizer")
    return model.getvalue()


@contextlib.contextmanager
def default_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once; Python's own handler waits for the end of a C++ call."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def explain_training_failure(message: str, num_bytes: int, vocab_size: int) -> str:
    """SentencePiece's message in terms of this script's options."""
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


def parse_tokenizer(model: bytes, name: str) -> Processor:
    """The tokenizer in a SentencePiece file; InputError if it is none or is not usable."""
    try:
        processor = Processor(model_proto=model or b"empty")
    except (RuntimeError, UnicodeDecodeError):  # the latter of a message that names a piece
        raise InputError(f"{name}: not a SentencePiece model; give a .model file") from None
    check_tokenizer(processor, processor.get_piece_size(), name)
    return processor


@functools.lru_cache(maxsize=1)
def load_processor(path: Path) -> Processor:
    """The tokenizer in a file, loaded once in each process; InputError if it is not usable."""
    return parse_tokenizer(read_small(path, MAX_TOKENIZER_BYTES), str(path))


# --- 4. Encoding ---------------------------------------------------------------------------------
# A batch is some documents of one split. Its result is a small shard in .partial/ whose name holds
# a hash of everything that it depends on. So a small shard that exists is right, whoever made it.


class Batch(NamedTuple):
    documents: list[Document]
    path: Path
    bytes_path: Path | None  # the byte counts' small shard, for validation batches with a sidecar
    model_path: Path
    has_markers: bool  # of case_markers


def encode_batch(batch: Batch) -> int:
    """Encode the documents of a batch into its small shards; returns their UTF-8 bytes."""
    processor = load_processor(batch.model_path)
    ids, counts = array("H"), array("Q")
    num_bytes = 0
    for document in batch.documents:
        document_ids = array("H", [BOS_ID])
        text = case_markers.encode(document.text) if batch.has_markers else document.text
        for segment in encode_segments(processor, text):
            document_ids.extend(segment)
        if is_lossless(processor) and not is_kept(processor, document_ids, document, batch):
            raise InputError(
                f"{document.place}: the tokenizer does not give back this document, which begins "
                f"{document.text[:40]!r}; leave out --tokenizer to train one that does"
            )
        ids += document_ids
        num_document_bytes = len(document.text.encode("utf-8"))
        if batch.bytes_path is not None:
            count = count_original_bytes if batch.has_markers else count_bytes
            document_counts = check_counts(count(processor, text), document)
            assert sum(document_counts) == num_document_bytes, f"{document.place}: bytes"
            counts.extend(document_counts)
        num_bytes += num_document_bytes
    if batch.bytes_path is not None:
        assert len(counts) == len(ids), f"{len(counts)} byte counts for {len(ids)} tokens"
        write_shard(batch.bytes_path, np.array(counts))
    write_shard(batch.path, np.array(ids))  # last: a batch with this file is finished
    return num_bytes


def is_kept(processor: Processor, ids: Iterable[int], document: Document, batch: Batch) -> bool:
    """Whether the tokens give back the document's text."""
    raw = decode_ids(processor, ids)
    if batch.has_markers:
        return case_markers.decode(raw.decode("utf-8")) == document.text
    return raw == document.text.encode("utf-8")


def check_counts(counts: list[int], document: Document) -> list[int]:
    """`counts` if a sidecar can hold them, else InputError naming the document."""
    if max(counts) > MAX_TOKEN_ID:
        raise InputError(
            f"{document.place}: one token of this document stands for {max(counts):,} bytes, the "
            f"byte sidecar holds up to {MAX_TOKEN_ID:,}: the tokenizer removes a long run of "
            "characters; shorten that run, or leave out --tokenizer to train one that keeps it"
        )
    return counts


def is_finished(path: Path) -> bool:
    """Whether a whole small shard is there."""
    try:
        return len(read_shard(path)) > 0
    except (OSError, ValueError):
        return False


def start_worker() -> None:
    """Set up a worker process: ignore Ctrl-C, which the parent handles, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "start_worker runs in a worker process"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent closes no queue, so the worker would wait forever

    threading.Thread(target=watch, daemon=True).start()


def encode_batches(batches: Iterable[Batch], num_workers: int, bar: Progress) -> None:
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
                bar.update(sum(len(document.text.encode("utf-8")) for document in batch.documents))
            elif pool is None:
                bar.update(encode_batch(batch))
            else:
                waiting.append(pool.submit(encode_batch, batch))
            if len(waiting) >= 2 * num_workers:
                bar.update(waiting.popleft().result())
        for future in waiting:
            bar.update(future.result())


# --- 5. The plan ---------------------------------------------------------------------------------

TOKENIZER_FILE, VAL_TEXT_FILE = "tokenizer.model", "val_text.bin"
PARTIAL = ".partial"
SERIAL_BYTES = 40_000_000  # one process encodes this in the time that starting several takes
INPUT_CHANGED = "an input file changed while it was read; run again when it is complete"
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
    case_markers: str | None
    model: str
    digits: str
    superwords: bool
    any_script: bool
    write_val_text: bool
    workers: int | None
    batch_bytes: int
    force: bool

    @property
    def mixes_scripts(self) -> bool:
        """Whether a trained piece may hold characters of several scripts.

        Case markers are of another script than letters: without it, they merge with spaces and
        punctuation only.
        """
        return self.any_script or self.case_markers == "merge"


class InputFile(NamedTuple):
    """An input file and its content's hash when this call began."""

    path: Path
    num_bytes: int
    mtime_ns: int
    sha256: str

    def is_unchanged(self) -> bool:
        """Whether size and time of the file are still those of the content that was hashed."""
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.num_bytes, self.mtime_ns)

    def describe(self) -> dict[str, Any]:
        """The file's entry in the manifest."""
        name = printable(self.path.name)
        return {"name": name, "bytes": self.num_bytes, "sha256": self.sha256}


class Plan(NamedTuple):
    """One call: its options, its input files, and the cut document if there is one."""

    options: Options
    files: list[InputFile]  # empty: the standard library
    val_files: list[InputFile]
    stdlib_digest: str = ""  # of the library's texts, if that is the source
    is_normalizing: bool = False  # the given tokenizer does not keep the original bytes
    cut: Cut | None = None

    @property
    def partial(self) -> Path:
        """The folder for unfinished work."""
        return self.options.out / PARTIAL

    @property
    def has_sidecar(self) -> bool:
        """Whether the byte sidecar is written: if asked for, or if the bytes need it."""
        return self.options.byte_sidecar or self.is_normalizing or bool(self.options.case_markers)

    @property
    def split_rule(self) -> str:
        """How validation documents are chosen, in words."""
        return self.cut.rule if self.cut else SPLIT_RULES["named" if self.val_files else "hash"]

    def documents(self, bar: Progress | None = None) -> Iterator[tuple[bool, Document]]:
        """All documents in order, each with whether it is named as validation.

        `bar` is updated by the bytes that are read from files.
        """
        for file in self.val_files:
            for document in read_documents(file.path, bar=bar):
                yield True, document
        cut = self.cut
        for document in self._drawn_documents(bar):
            if cut is not None and hash_text(document.text) == cut.key:
                yield False, document._replace(text=document.text[: cut.position])
                yield True, document._replace(text=document.text[cut.position :])
                cut = None  # a copy of it is an ordinary document, which the split leaves out
            else:
                yield False, document
        if not all(file.is_unchanged() for file in (*self.val_files, *self.files)):
            raise InputError(INPUT_CHANGED)

    def _drawn_documents(self, bar: Progress | None) -> Iterator[Document]:
        """The documents that are not named as validation."""
        if self.options.source == "stdlib":
            yield from read_stdlib()
        for file in self.files:
            yield from read_documents(file.path, bar=bar)

    def arguments(self) -> dict[str, Any]:
        """What the result depends on, for the manifest; input files by name, size and SHA-256."""
        options = self.options
        tokenizer = options.tokenizer
        version = f"stdlib of Python {platform.python_version()}, {self.stdlib_digest}"
        return {
            "source": version if options.source else "files",
            "input": [file.describe() for file in self.files],
            "val_input": [file.describe() for file in self.val_files],
            "val_frac": None if self.val_files else options.val_frac,
            "tokenizer": hash_file(tokenizer) if tokenizer else None,
            "vocab_size": None if tokenizer else options.vocab_size,
            "tokenizer_bytes": None if tokenizer else options.tokenizer_bytes,
            "shard_tokens": options.shard_tokens,
            "name": options.name,
            "dedup": options.dedup,
            "byte_sidecar": self.has_sidecar,
            "write_val_text": options.write_val_text,
            # None where a data set of an earlier version has no such entry
            "case_markers": options.case_markers,
            "model": None if options.model == "bpe" else options.model,
            "digits": None if options.digits == "split" else options.digits,
            "superwords": options.superwords or None,
            "any_script": (tokenizer is None and options.mixes_scripts) or None,
        }


def make_plan(options: Options) -> Plan:
    """Find, check and hash the inputs; InputError if one is missing or not usable."""
    is_normalizing = False
    if options.tokenizer is not None:
        is_normalizing = not is_lossless(load_processor(options.tokenizer))
    paths = find_files(options.input, options.out)
    val_paths = find_files(options.val_input, options.out)
    inside = os.path.realpath(options.out / PARTIAL) + os.sep
    for path in [*paths, *val_paths, *filter(None, [options.tokenizer])]:
        if os.path.realpath(path).startswith(inside):
            raise InputError(f"{path} lies in the folder for unfinished work; move it elsewhere")
    num_bytes = sum(path.stat().st_size for path in (*paths, *val_paths))
    with show_progress("hashing", num_bytes) as bar:
        files = [describe_input(path, bar) for path in paths]
        val_files = [describe_input(path, bar) for path in val_paths]
    keys = b"".join(hash_text(text) for text, _ in (read_stdlib() if options.source else []))
    return Plan(options, files, val_files, hashlib.sha256(keys).hexdigest()[:16], is_normalizing)


def describe_input(path: Path, bar: Progress) -> InputFile:
    """Hash one input file."""
    status = path.stat()
    return InputFile(path, status.st_size, status.st_mtime_ns, hash_file(path, bar))


def scan_documents(plan: Plan) -> tuple[Plan, Split, Sample]:
    """First pass: read, check and hash every document; the split, and the tokenizer's sample.

    If all documents or none are drawn as validation, the plan that is returned cuts the longest.
    """
    split, sample = scan_once(plan)
    num_train, num_val, num_empty = (split.total(r)[0] for r in (Role.TRAIN, Role.VAL, Role.EMPTY))
    seen = f"{len(split.roles)} documents, {num_empty} of them empty"
    if num_train + num_val == 0:
        raise InputError(f"no text: {seen}; give files with text")
    if 0 in (num_train, num_val) and not plan.val_files and 0 < plan.options.val_frac < 1:
        plan = plan._replace(cut=choose_cut(plan, split))
        split, sample = scan_once(plan)
        num_val = split.total(Role.VAL)[0]
    if num_val == 0:
        remedy = "raise --val-frac or name validation files with --val-input"
        raise InputError(f"no validation document among {seen}; {remedy}")
    if split.total(Role.TRAIN)[0] == 0:
        remedy = "lower --val-frac or add files that are not validation text"
        raise InputError(f"no training document among {seen}, {num_val} are validation; {remedy}")
    return plan, split, sample


def scan_once(plan: Plan) -> tuple[Split, Sample]:
    """One pass over the documents: their roles, and the tokenizer's sample."""
    options = plan.options
    is_drawn = not plan.val_files and plan.cut is None
    split = Split(options.val_frac if is_drawn else None, [plan.cut.key] if plan.cut else [])
    sample = Sample(0 if options.tokenizer else options.tokenizer_bytes)
    num_bytes = sum(file.num_bytes for file in (*plan.files, *plan.val_files))
    with show_progress("reading", num_bytes or None) as bar:
        for is_named_val, document in plan.documents(bar):
            role, key = split.add(document.text, is_named_val=is_named_val)
            if role == Role.TRAIN and options.tokenizer is None:
                sample.add(key, document.text)
    split.close(dedup=options.dedup)
    return split, sample


def choose_cut(plan: Plan, split: Split) -> Cut:
    """Where the longest document is cut, so that its last part is validation."""
    index = split.longest()
    _, document = next(itertools.islice(plan.documents(), index, None), (False, None))
    if document is None or hash_text(document.text) != split.key(index):
        raise InputError(INPUT_CHANGED)
    position, boundary = cut_position(document.text, plan.options.val_frac)
    cut = Cut(split.key(index), printable(document.place), position, boundary)
    print(
        f"too few documents to draw some as validation: it is the last part of {document.place}, "
        f"from character {position:,} of {len(document.text):,} on ({boundary})"
    )
    return cut


def provide_tokenizer(plan: Plan, sample: Sample) -> Path:
    """Train the tokenizer, or take the given one; its path in .partial/."""
    options = plan.options
    if options.tokenizer is not None:
        path = plan.partial / f"tokenizer_{hash_file(options.tokenizer)[:16]}.model"
        write_atomic(path, read_small(options.tokenizer, MAX_TOKENIZER_BYTES))
        return path
    texts = sample.texts()
    if options.case_markers:
        texts = list(map(case_markers.encode, texts))
    settings = tokenizer_settings(options)
    key = repr((settings, options.vocab_size, sentencepiece.__version__)).encode()
    digest = hashlib.sha256(key + b"".join(map(hash_text, texts))).hexdigest()[:16]
    path = plan.partial / f"tokenizer_{digest}.model"
    if not path.exists():
        num_bytes = min(sample.num_bytes, sample.max_bytes)
        print(
            f"training a tokenizer of {options.vocab_size} pieces on {num_bytes:,} bytes of text, "
            f"about {num_bytes / 3e6 + 1:.0f} s",
            flush=True,
        )
        write_atomic(path, train_tokenizer(texts, options.vocab_size, settings))
    return path


class BatchMaker:
    """Second pass: collects the documents of each split into batches, in order."""

    def __init__(self, plan: Plan, split: Split, model_path: Path):
        self.plan = plan
        self.split = split
        self.model_path = model_path
        self.paths: dict[Role, list[Path]] = {Role.TRAIN: [], Role.VAL: []}
        self._documents: dict[Role, list[Document]] = {Role.TRAIN: [], Role.VAL: []}
        self._keys = {Role.TRAIN: b"", Role.VAL: b""}
        self._num_bytes = {Role.TRAIN: 0, Role.VAL: 0}

    def batches(self, val_text: BinaryIO | None) -> Iterator[Batch]:
        """Yield the batches; validation texts also go to `val_text`."""
        num_documents = 0
        for index, (_, document) in enumerate(self.plan.documents()):
            num_documents = index + 1
            key = hash_text(document.text)
            if key != self.split.key(index):
                raise InputError(INPUT_CHANGED)
            role = Role(self.split.roles[index])
            if role == Role.VAL and val_text is not None:
                val_text.write(document.text.encode("utf-8"))
            if role in self.paths:
                self._documents[role].append(document)
                self._keys[role] += key
                self._num_bytes[role] += self.split.sizes[index]
                if self._num_bytes[role] >= self.plan.options.batch_bytes:
                    yield self._close(role)
        if num_documents != len(self.split.roles):
            raise InputError(INPUT_CHANGED)
        yield from [self._close(role) for role in self.paths if self._documents[role]]

    def _close(self, role: Role) -> Batch:
        """The documents held for one split, as a batch."""
        documents, self._documents[role], self._num_bytes[role] = self._documents[role], [], 0
        has_counts = role == Role.VAL and self.plan.has_sidecar
        has_markers = self.plan.options.case_markers is not None
        flags = has_counts + 2 * has_markers
        parts = [self.model_path.name.encode(), bytes([flags]), self._keys[role]]
        self._keys[role] = b""
        digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        stem = f"{role.name.lower()}_{len(self.paths[role]):06d}_{digest}"
        path = self.plan.partial / f"{stem}.bin"
        self.paths[role].append(path)
        bytes_path = sidecar_of(path) if has_counts else None
        return Batch(documents, path, bytes_path, self.model_path, has_markers)


def sidecar_of(part: Path) -> Path:
    """The small shard of byte counts that belongs to a small shard of tokens."""
    return part.with_name(f"bytes_{part.name}")


def choose_workers(options: Options, num_bytes: int) -> int:
    """Processes to encode with: as asked for, else all cores unless one is done sooner."""
    if options.workers is not None:
        return options.workers
    return count_cores() if num_bytes > SERIAL_BYTES else 1


def count_cores() -> int:
    """CPU cores that this process may use, which a batch system or `taskset` may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- 6. Shards -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Tokens `start` to `end` of the small shard number `part`."""

    part: int
    start: int
    end: int


def plan_shards(sizes: Sequence[int], shard_tokens: int) -> list[list[Piece]]:
    """The pieces of small shards of these sizes that make up each shard.

    Every shard but the last gets `shard_tokens` tokens; documents continue in the next shard.
    """
    ends = list(itertools.accumulate(sizes))
    shards: list[list[Piece]] = []
    for first in range(0, ends[-1] if ends else 0, shard_tokens):
        last = min(first + shard_tokens, ends[-1])
        pieces = []
        for part in range(bisect.bisect_right(ends, first), bisect.bisect_left(ends, last) + 1):
            offset = ends[part] - sizes[part]
            start, end = max(first - offset, 0), min(last - offset, sizes[part])
            if start < end:
                pieces.append(Piece(part, start, end))
        shards.append(pieces)
    return shards


def write_shards(parts: Sequence[Path], stem: Path, shard_tokens: int) -> dict[str, int]:
    """Write STEM_000000.bin, ... from small shards; the number of shards and tokens."""
    sizes = [len(read_shard(part)) for part in parts]
    shards = plan_shards(sizes, shard_tokens)
    for number, pieces in enumerate(shards):
        header = np.zeros(SHARD_HEADER_BYTES // 4, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, sum(end - start for _, start, end in pieces)
        with atomic_file(stem.with_name(f"{stem.name}_{number:06d}.bin")) as file:
            file.write(header.tobytes())
            for part, start, end in pieces:
                file.write(read_shard(parts[part])[start:end].tobytes())
    return {"shards": len(shards), "tokens": sum(sizes)}


def encode_documents(plan: Plan, split: Split, model_path: Path, final: Path) -> BatchMaker:
    """Second pass: writes every batch's small shards to .partial/, and the validation text."""
    options = plan.options
    maker = BatchMaker(plan, split, model_path)
    num_bytes = split.total(Role.TRAIN)[1] + split.total(Role.VAL)[1]
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
    for role in (Role.TRAIN, Role.VAL):
        stem = final / f"{options.name}_{role.name.lower()}"
        num_documents, text_bytes = split.total(role)
        entries[role.name.lower()] = {
            "documents": num_documents,
            "text_bytes": text_bytes,
            **write_shards(maker.paths[role], stem, options.shard_tokens),
        }
    if plan.has_sidecar:
        stem = final / f"{options.name}_val_bytes"
        sidecars = [sidecar_of(path) for path in maker.paths[Role.VAL]]
        write_shards(sidecars, stem, options.shard_tokens)
    write_atomic(final / TOKENIZER_FILE, maker.model_path.read_bytes())
    processor = load_processor(maker.model_path)
    entries["tokenizer"] = {
        "file": TOKENIZER_FILE,
        "sha256": hash_file(final / TOKENIZER_FILE),
        "vocab_size": processor.get_piece_size(),
        "is_lossless": is_lossless(processor),
    }
    return entries


# --- 7. Publishing -------------------------------------------------------------------------------
# Everything is finished inside .partial/ and moved into place at the end; the manifest comes last.
# So OUT never holds half a shard. Only files that a manifest of this script names are replaced or
# removed; .partial/prepare.json names them too, since a kill may leave OUT without a manifest.

MARKER = "prepare.json"
OTHER_OUT = "give another --out, or --force to replace what this script made there"


def find_made_files(folder: Path) -> set[str]:
    """Names of the files in `folder` that are shards, or have a name that this script uses."""
    pattern = re.compile(r".+_(train|val|val_bytes)_[0-9].*\.bin")  # what train_gpt.py would read
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    fixed = {TOKENIZER_FILE, VAL_TEXT_FILE, MANIFEST}
    return {name for name in names if name in fixed or pattern.fullmatch(name)}


def read_owned(plan: Plan, manifest: dict[str, Any] | None) -> set[str]:
    """Names of the files in OUT that an earlier call made; InputError if there are others.

    `manifest`: the one in OUT, if there is one. The given tokenizer may lie in OUT.
    """
    out, partial = plan.options.out, plan.partial
    made = find_made_files(out)
    owned = {MANIFEST, *manifest["files"]} & made if manifest else set()
    if partial.is_symlink():
        raise InputError(f"{partial} is a symbolic link; remove it, the folder must be in {out}")
    if partial.exists():
        try:
            owned |= made & set(json.loads(read_small(partial / MARKER, 1 << 30))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{partial} exists, but this script did not make it; move or remove it"
            ) from None
    tokenizer = plan.options.tokenizer
    if tokenizer and TOKENIZER_FILE in made and os.path.samefile(tokenizer, out / TOKENIZER_FILE):
        made.remove(TOKENIZER_FILE)  # it will be replaced by itself
    if others := sorted(made - owned):
        raise InputError(
            f"{out / others[0]} was made elsewhere: no manifest here names it; move it, or give "
            "another --out"
        )
    return owned


def make_data_set(plan: Plan, owned: set[str]) -> None:
    """Both passes, then the files, then the manifest.

    `owned`: names of files in OUT that are replaced or removed.
    """
    final = plan.partial / "final"
    final.mkdir(parents=True, exist_ok=True)
    mark_owned(plan, owned)
    for leftover in itertools.chain(plan.partial.glob("*.tmp"), final.iterdir()):  # of a kill
        leftover.unlink()
    plan, split, sample = scan_documents(plan)
    model_path = provide_tokenizer(plan, sample)
    maker = encode_documents(plan, split, model_path, final)
    entries = write_files(plan, maker, final)
    manifest = {
        "format": MANIFEST_FORMAT,
        "name": plan.options.name,
        "arguments": plan.arguments(),
        "split_rule": plan.split_rule,
        "transform": case_markers.NAME if plan.options.case_markers else None,
        **entries,
        "left_out": {
            "empty": split.total(Role.EMPTY)[0],
            "copies_of_validation": split.total(Role.COPY_OF_VAL)[0],
            "copies_in_training": split.total(Role.COPY_IN_TRAIN)[0],
        },
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(final.iterdir())
        },
    }
    publish(plan, manifest, owned)


def mark_owned(plan: Plan, names: Iterable[str]) -> None:
    """Note in .partial/ which files in OUT this script may replace."""
    write_atomic(plan.partial / MARKER, json.dumps({"files": sorted(names)}).encode())


def publish(plan: Plan, manifest: dict[str, Any], owned: set[str]) -> None:
    """Move finished files into place and write the manifest, which makes them a data set."""
    out, final = plan.options.out, plan.partial / "final"
    mark_owned(plan, owned | set(manifest["files"]))
    (out / MANIFEST).unlink(missing_ok=True)
    for stale in owned - set(manifest["files"]):
        (out / stale).unlink(missing_ok=True)
    for name in manifest["files"]:
        os.replace(final / name, out / name)
    sync_folder(out)
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    write_atomic(out / MANIFEST, f"{text}\n".encode())


def read_manifest(
    out: Path,
    needed: tuple[str, ...] = ("arguments", "files"),
    remedy: str = "give another --out",
) -> dict[str, Any] | None:
    """The manifest in a folder; None if there is none, InputError if it is not of this script.

    `needed`: tables that it must have; a downloaded data set has no `arguments`.
    """
    path = out / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        manifest: dict[str, Any] = json.loads(read_small(path, 1 << 28))
        sound = all(isinstance(manifest[key], dict) for key in needed)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path} was not written by data/prepare.py; {remedy}")
    return manifest


def is_complete(plan: Plan) -> bool:
    """Whether OUT holds the data set asked for, undamaged; False if that is not clear.

    Needs no lock: a call that is changing OUT removes the manifest first and writes it last.
    """
    out = plan.options.out
    try:
        manifest = read_manifest(out)
        if manifest is None or plan.options.force:
            return False
        refuse_other(plan, manifest)
        return find_damage(out, manifest["files"]) is None
    except (InputError, OSError):
        return False


def refuse_other(plan: Plan, manifest: dict[str, Any]) -> None:
    """Raise InputError if the data set in OUT is not the one asked for and --force is not given."""
    out = plan.options.out
    if plan.options.force:
        return
    if manifest.get("format") != MANIFEST_FORMAT:
        raise InputError(
            f"{out} holds a data set of an earlier version of this script (format "
            f"{manifest.get('format')}), which did not hash its inputs; {OTHER_OUT}"
        )
    asked, made_with = plan.arguments(), manifest["arguments"]
    if changes := [key for key in asked if asked[key] != made_with.get(key)]:
        listed = "; ".join(explain_change(key, made_with.get(key), asked[key]) for key in changes)
        raise InputError(f"{out} holds a data set made otherwise ({listed}); {OTHER_OUT}")
    if damaged := find_damage(out, manifest["files"]):
        print(f"{out / damaged} is missing or damaged: making the data set again")


def explain_change(key: str, old: Any, new: Any) -> str:
    """A changed argument in words; of input files, the first that differs."""
    if key not in ("input", "val_input"):
        return f"{key} {old}, now {new}"
    for before, now in itertools.zip_longest(old if isinstance(old, list) else [], new):
        if before != now:
            return f"{key} {describe_entry(before)}, now {describe_entry(now)}"
    return f"{key} changed"


def describe_entry(entry: Any) -> str:
    """An input file's entry in the manifest, in words."""
    if not isinstance(entry, dict):
        return "no file" if entry is None else str(entry)
    return f"{entry.get('name')} (SHA-256 {str(entry.get('sha256'))[:12]}...)"


def find_damage(out: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that is not as the manifest says, if any."""
    for name, entry in files.items():
        path, known = out / name, entry if isinstance(entry, dict) else {}
        has_size = path.is_file() and path.stat().st_size == known.get("bytes")
        if not has_size or hash_file(path) != known.get("sha256"):
            return name
    return None


# --- 8. Command line -----------------------------------------------------------------------------


def bounded(low: float, high: float, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high` for argparse."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is not a number
    return parse


def parse_name(text: str) -> str:
    """A data set's name; without _, which separates it from the rest of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} may have letters, digits and - only")
    return text


TOKENIZER_BYTES = 20_000_000
TRAINING = ("bpe", "split", False, False, TOKENIZER_BYTES)  # --model, --digits, ... if not given


def parse_options(argv: list[str] | None) -> Options:
    """Parse the command line; exits with code 2 and a message if it is not usable."""
    parser = argparse.ArgumentParser(
        description="Turn text into a tokenizer and token shards.",
        epilog="data/README.md describes the files. The same command continues after a kill.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--source", choices=["stdlib"], help="a built-in corpus, offline")
    inputs = f"files ({' '.join(READERS)}), folders of such files, or quoted globs"
    sources.add_argument("--input", nargs="+", default=[], metavar="PATH", help=inputs)
    add("--val-input", nargs="+", default=[], metavar="PATH", help="validation files")
    add("--val-frac", type=bounded(0, 1, float), default=0.06, help="share drawn as validation")
    add("--out", type=Path, required=True, help="folder for the result")
    add("--name", type=parse_name, help="first part of file names (default: demo, corpus)")
    tokenizers = parser.add_mutually_exclusive_group()
    tokenizers.add_argument("--tokenizer", type=Path, metavar="MODEL", help="use this one as it is")
    sizes = bounded(MIN_VOCAB_SIZE, MAX_TOKEN_ID + 1)
    tokenizers.add_argument("--vocab-size", type=sizes, default=1024, help="pieces to train")
    sample = "bytes of text to train it on"
    add("--tokenizer-bytes", type=bounded(1, 10**9), default=TOKENIZER_BYTES, help=sample)
    add("--shard-tokens", type=bounded(1, 2**31 - 1), default=100_000_000, help="tokens a shard")
    add("--dedup", action="store_true", help="drop copies inside the training documents too")
    add("--byte-sidecar", action="store_true", help="write each validation token's byte count")
    forms = "lower-case letters with markers before them; markers may be parts of pieces, or not"
    kinds = ("merge", "separate")
    add("--case-markers", nargs="?", const="merge", choices=kinds, metavar="FORM", help=forms)
    add("--model", choices=("bpe", "unigram"), default="bpe", help="kind of tokenizer to train")
    add("--digits", choices=("split", "group"), default="split", help="may pieces have several?")
    add("--superwords", action="store_true", help="train pieces of several words")
    scripts = "train pieces of letters and punctuation; always with --case-markers=merge"
    add("--any-script", action="store_true", help=scripts)
    add("--write-val-text", action="store_true", help=f"write {VAL_TEXT_FILE}")
    add("--workers", type=bounded(1, 4096), help="processes (default: all cores, 1 if little text)")
    add("--batch-bytes", type=bounded(1, 10**9), default=4_000_000, help="text encoded at a time")
    add("--force", action="store_true", help="replace what another call made in --out")
    options = parser.parse_args(argv, namespace=Options())
    options.name = options.name or ("demo" if options.source else "corpus")
    kind = (options.model, options.digits, options.superwords, options.any_script)
    if options.tokenizer and (*kind, options.tokenizer_bytes) != TRAINING:
        names = "--model, --digits, --superwords, --any-script and --tokenizer-bytes"
        parser.error(f"{names} train a tokenizer, but --tokenizer is set")
    return options


def print_summary(out: Path, manifest: dict[str, Any]) -> None:
    """Print what the data set holds."""
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
    kind = "lossless" if tokenizer["is_lossless"] else "normalizing"
    print(f"tokenizer: {tokenizer['vocab_size']} pieces, {kind}; all in {out}")


def run(options: Options) -> None:
    """Make the data set, unless it is there."""
    plan = make_plan(options)
    if is_complete(plan):
        print(f"already complete: {options.out}")
        if (plan.partial / MARKER).exists():  # an earlier call ended while it removed them
            with lock_folder(options.out):
                remove_partial(plan)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        try:
            with lock_folder(options.out):
                make_in_folder(plan)
        finally:
            with contextlib.suppress(OSError):
                options.out.rmdir()  # if it is empty
    manifest = read_manifest(options.out)
    assert manifest is not None, "the manifest was there or has been written"
    print_summary(options.out, manifest)


def make_in_folder(plan: Plan) -> None:
    """Make the data set in OUT, whose lock this process holds."""
    existing = read_manifest(plan.options.out)
    if existing is not None:
        refuse_other(plan, existing)
    owned = read_owned(plan, existing)
    try:
        make_data_set(plan, owned)
    except InputError:
        remove_empty_partial(plan)
        raise
    remove_partial(plan)


def remove_partial(plan: Plan) -> None:
    """Remove the folder for unfinished work; last the file that shows that it is this script's."""
    for path in plan.partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    shutil.rmtree(plan.partial)


def remove_empty_partial(plan: Plan) -> None:
    """Remove the folder for unfinished work if nothing is in it that a later call could use."""
    final = plan.partial / "final"
    is_empty = set(plan.partial.iterdir()) == {plan.partial / MARKER, final}
    is_needed = find_made_files(plan.options.out) and read_manifest(plan.options.out) is None
    if is_empty and not is_needed and not any(final.iterdir()):
        shutil.rmtree(plan.partial)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C)."""
    make_output_safe()
    options = parse_options(argv)
    again = f"finished parts stay in {options.out / PARTIAL}; the same command continues from there"
    try:
        run(options)
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        remedy = f"; make room: {again}" if error.errno == errno.ENOSPC else ""
        place = error.filename or options.out  # a full disk comes without a name
        place = place.decode(errors="backslashreplace") if isinstance(place, bytes) else place
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
