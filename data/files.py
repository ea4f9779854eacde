"""What the data tools share: opening, hashing and locking files, and messages about them."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import io
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import filelock
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_gpt import InputError  # noqa: E402  (the path above makes the import possible)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2
LOCK_FILE = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class Progress(Protocol):
    """What shows progress over bytes: a bar of tqdm, or lines."""

    def update(self, count: float, /) -> object:
        """Note that `count` more bytes are done."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: Any) -> None: ...


class FileReader(io.FileIO):
    """A file that reports the bytes read from it to a progress bar."""

    def __init__(self, descriptor: int, bar: Progress | None):
        super().__init__(descriptor)
        self.bar = bar

    def readinto(self, buffer: bytearray | memoryview) -> int | None:  # type: ignore[override]
        count = super().readinto(buffer)
        if self.bar is not None:
            self.bar.update(count or 0)
        return count


def open_regular(path: Path, bar: Progress | None = None) -> io.BufferedReader:
    """Open a regular file for reading; InputError for a FIFO, device, socket or folder.

    O_NONBLOCK: otherwise opening a FIFO waits until another process writes to it.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = KINDS.get(stat.S_IFMT(mode), "a special file")
        raise InputError(f"{path} is {kind}, not a regular file; give the name of a file")
    return io.BufferedReader(FileReader(descriptor, bar), buffer_size=1 << 20)


def read_small(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; InputError if it has more than `max_bytes`."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise InputError(f"{path} has more than {max_bytes:,} bytes; is it the right file?")
    return content


def hash_file(path: Path, bar: Progress | None = None) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path, bar) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(name: str | Path) -> str:
    r"""A file name as text that UTF-8 can hold; a byte that is not UTF-8 becomes \xNN."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


LINE_INTERVAL_S = 30.0


class LineProgress:
    """Progress over bytes as lines on stderr, for a log file: one every LINE_INTERVAL_S."""

    def __init__(self, what: str, num_bytes: int | None):
        self.what = what
        self.num_bytes = num_bytes
        self.done_bytes = 0
        self.started_s = self.printed_s = time.monotonic()

    def update(self, count: float) -> None:
        """Note that `count` more bytes are done; print a line if the last one is old."""
        self.done_bytes += int(count)
        now_s = time.monotonic()
        if now_s - self.printed_s >= LINE_INTERVAL_S:
            self.printed_s = now_s
            print(self.describe(now_s - self.started_s), file=sys.stderr, flush=True)

    def describe(self, elapsed_s: float) -> str:
        """What is done after `elapsed_s`, the rate, and the remaining time at this rate."""
        done, total = self.done_bytes, self.num_bytes
        rate = done / max(elapsed_s, 1e-9)
        line = f"{self.what}: {done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        if not (done and total):
            return line
        remaining = datetime.timedelta(seconds=round(max(total - done, 0) / rate))
        return f"{line}, {done / total:.0%} of {total / 1e6:,.0f} MB, {remaining} left"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


def show_progress(what: str, num_bytes: int | None = None) -> Progress:
    """Progress over bytes with the remaining time: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        bar: Progress = tqdm(desc=what, total=num_bytes, unit="B", unit_scale=True)
        return bar
    return LineProgress(what, num_bytes)


def make_output_safe() -> None:
    """Print characters that the output's encoding lacks as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; InputError naming the holder if another process has it.

    The operating system releases the lock when the process ends, however it ends.
    """
    path = folder / LOCK_FILE
    lock = filelock.FileLock(path, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"{folder} is in use by {read_holder(path)}; wait until it has ended, or give "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {folder} cannot be locked ({error.strerror}); run one process at a time")
        yield
        return
    try:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now}))
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held; a process that waits for it notices
        lock.release()


def read_holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        holder = json.loads(read_small(path, 10_000))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # InputError is a ValueError
        return "another process"
