"""Read documents from text files: .txt, .jsonl, .jsonl.zst and .parquet.

Each reader yields the documents of one file, one at a time, each with its place for messages, and
stops with an InputError at the first thing that is wrong. Nothing is repaired silently.
"""

from __future__ import annotations

import collections
import glob
import hashlib
import importlib
import itertools
import json
import os
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.files import (  # noqa: E402  (the path above makes the import possible)
    Progress,
    open_regular,
)
from train_gpt import InputError  # noqa: E402

# Standard-library files that are left out: test suites, installed packages, and descriptions of the
# machine that this Python was built on. The documentation topics come as documents of their own.
STDLIB_SKIPPED = re.compile(
    r"tests?|idle_test|(site|dist)-packages|__pycache__|config-.*|_sysconfigdata.*|pydoc_data"
)
KEY_BYTES = 16  # enough to tell any two documents apart
READ_BYTES = 1 << 17  # compressed input at a time: bounds the memory that a batch of it expands to
MAX_WINDOW_BYTES = 1 << 31  # of a zstd frame: what `zstd --long=31` writes


class Document(NamedTuple):
    text: str
    place: str  # file and line, for messages


def read_stdlib() -> list[Document]:
    """The running Python's library modules and documentation topics, sorted by their hash.

    The order is as good as random, but the same everywhere. Sorted by name, training would see all
    character tables first and all XML modules last.
    """
    topics = pydoc_data.topics.topics
    documents = [Document(text, f"topic {name}") for name, text in topics.items()]
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if not STDLIB_SKIPPED.fullmatch(name)]
        for name in files:
            if name.endswith(".py") and not STDLIB_SKIPPED.fullmatch(name):
                documents += read_documents(Path(folder, name), read_txt)
    return sorted(documents, key=lambda document: hash_text(document.text))


def hash_text(text: str) -> bytes:
    """The key of a document: the first 16 bytes of the SHA-256 of its UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).digest()[:KEY_BYTES]


def read_documents(
    path: Path, reader: Reader | None = None, bar: Progress | None = None
) -> Iterator[Document]:
    """The documents of one file, by the reader for its name unless one is given."""
    with open_regular(path, bar) as file:
        yield from (reader or find_reader(path))(file, str(path))


# --- Formats -------------------------------------------------------------------------------------


def decode_utf8(raw: bytes, place: str) -> str:
    """`raw` as text; InputError naming the place if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8 "
            f"({error.reason}); convert the text to UTF-8, for instance with iconv"
        ) from None


def read_txt(file: BinaryIO, name: str) -> Iterator[Document]:
    """The whole file as one document."""
    raw = b"".join(iter(lambda: file.read(1 << 20), b""))  # in parts, for the progress bar
    yield Document(decode_utf8(raw, name), name)


def read_jsonl(file: BinaryIO, name: str) -> Iterator[Document]:
    """The `text` field of each line; blank lines are skipped."""
    return parse_records(file, name)


def read_jsonl_zst(file: BinaryIO, name: str) -> Iterator[Document]:
    """The `text` field of each line of a file that zstd compressed."""
    try:
        yield from parse_records(split_lines(decompress_chunks(file)), name)
    except EOFError:
        raise InputError(f"{name}: the zstd data is cut short; copy or compress it again") from None
    except zstandard.ZstdError as error:
        raise InputError(
            f"{name}: cannot be decompressed ({error}); test it with `zstd -t --long=31`"
        ) from None


def decompress_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The content of a zstd file of any number of frames; EOFError if it was cut short."""
    frame = None
    while chunk := file.read(READ_BYTES):
        while chunk:
            if frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a byte stream, without their newline."""
    line: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        line.append(first)
        if others:
            yield b"".join(line)
            yield from others[:-1]
            line = [others[-1]]
    if any(line):
        yield b"".join(line)


def parse_records(lines: Iterable[bytes], name: str) -> Iterator[Document]:
    """The `text` field of JSON lines; InputError with the line's number for anything else."""
    for number, line in enumerate(lines, start=1):
        place = f"{name}:{number}"
        if line.strip():
            record = parse_json(decode_utf8(line, place), place)
            text = record.get("text") if isinstance(record, dict) else record
            yield Document(check_text(text, place), place)


def parse_json(line: str, place: str) -> object:
    """One JSON value. Integers become 0: none is used, and Python limits their length."""
    try:
        value: object = json.loads(line, parse_int=lambda digits: 0)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place}: not JSON ({error.msg} at column {error.colno}); "
            'each line must be one object such as {"text": "..."}'
        ) from None
    except RecursionError:
        raise InputError(
            f"{place}: lists or objects are nested too deeply to be parsed; remove the field "
            "that holds them"
        ) from None
    return value


def check_text(text: object, place: str) -> str:
    """`text` if it is a string that UTF-8 can hold, else InputError."""
    if not isinstance(text, str):
        raise InputError(
            f"{place}: `text` is {'missing' if text is None else type(text).__name__}, it must be "
            "a string; rename the field that holds the document, or remove the record"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: `text` holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot hold; remove it"
        ) from None
    return text


def read_parquet(file: BinaryIO, name: str) -> Iterator[Document]:
    """The `text` column, row by row."""
    try:  # imported here: only this format needs it, and it is not small
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        raise InputError(f"{name}: reading parquet needs `pip install pyarrow`") from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            if "text" not in (names := table.schema_arrow.names):
                raise InputError(
                    f"{name}: no column `text` among {names}; rename the column that holds it"
                )
            batches = table.iter_batches(batch_size=256, columns=["text"])
            texts = itertools.chain.from_iterable(rows.column(0).to_pylist() for rows in batches)
            for number, text in enumerate(texts, start=1):
                place = f"{name} row {number}"
                yield Document(check_text(text, place), place)
    except (arrow.ArrowException, UnicodeDecodeError, OSError) as error:
        place = f"after row {number}" if number else "at its beginning"
        raise InputError(
            f"{name}: not valid parquet {place} ({error}); copy or write it again"
        ) from None


Reader = Callable[[BinaryIO, str], Iterator[Document]]
READERS: dict[str, Reader] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.zst": read_jsonl_zst,
    ".parquet": read_parquet,
}


def find_reader(path: Path) -> Reader:
    """The reader for a file's name; InputError if there is none."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise InputError(f"{path}: unknown kind of file; the name must end in {', '.join(READERS)}")


# --- Finding files -------------------------------------------------------------------------------


def find_files(patterns: list[str], out: Path) -> list[Path]:
    """The files that paths, folders and globs name, those of a folder or glob sorted, each once.

    Folders are searched recursively, but not `out`, which holds the result.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        for path in match_files(pattern, out):
            open_regular(path).close()  # refuses a FIFO or a device before any work is done
            find_reader(path)
            status = path.stat()
            files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())


def match_files(pattern: str, out: Path) -> list[Path]:
    """The files that one argument names; InputError if there is none."""
    if os.path.isdir(pattern):
        return list_folder(Path(pattern), out)
    if os.path.lexists(pattern):
        return [Path(pattern)]
    matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in matches if not path.is_dir()]
    if not files:
        raise InputError(f"{pattern}: no such file or folder, and no file matches it as a glob")
    return files


def raise_error(error: OSError) -> None:
    """For os.walk, which otherwise leaves out a folder that it cannot read."""
    raise error


def list_folder(folder: Path, out: Path) -> list[Path]:
    """Files in `folder` and its subfolders that a reader can read, sorted by their path.

    Hidden files and folders are left out; the number of other files that are left out is printed.
    """
    if os.path.realpath(folder) == os.path.realpath(out):
        raise InputError(f"{folder} is also --out, where no text is looked for; give another --out")
    files: list[Path] = []
    ignored: collections.Counter[str] = collections.Counter()
    visited = {os.path.realpath(out)}
    for parent, folders, names in os.walk(folder, onerror=raise_error, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # `out`, or a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.endswith(tuple(READERS)) and not name.startswith("."):
                files.append(Path(parent, name))
            else:
                ignored[Path(name).suffix or name] += 1
    if ignored:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in ignored.most_common(5))
        print(f"{folder}: {ignored.total()} other files are left out, most of them {kinds}")
    if not files:
        raise InputError(f"{folder}: no file in it has a name that ends in {', '.join(READERS)}")
    return sorted(files)
