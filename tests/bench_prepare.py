"""Measure data/prepare.py: memory and rate for generated texts of several sizes.

    python tests/bench_prepare.py --megabytes 256 1024 [-- --case-markers]

Prints a row of a Markdown table for each size. The text is made of 50,000 words whose frequencies
follow Zipf's law; words begin sentences with a capital. Rates are per second of CPU time, so that
other processes of the machine change them little. The last column is SentencePiece alone: encoding
the same documents one by one in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
NUM_WORDS, SENTENCE_WORDS, DOCUMENT_SENTENCES = 50_000, 16, 40
TOKENIZER_SAMPLE_BYTES = 10_000_000
POLL_S = 0.2
COLUMNS = ["text", "tokens", "wall s", "CPU s", "MB / CPU s", "peak MB", "peak MB of a worker",
           "SentencePiece alone, MB / CPU s"]  # fmt: skip


def make_words(rng: np.random.Generator) -> np.ndarray:
    """Distinct words of 1 to 12 letters, the frequent ones shorter."""
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    frequency = 1 / np.arange(3, 3 + len(letters))
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        length = int(rng.integers(1, 4 + min(9, len(words) // 50)))
        words["".join(rng.choice(letters, length, p=frequency / frequency.sum()))] = None
    return np.array(list(words))


def make_documents(num_bytes: int) -> Iterator[str]:
    """Documents of about 4 kB, the same in every call."""
    rng = np.random.default_rng(0)
    words = make_words(rng)
    cumulative = (1 / np.arange(2, 2 + NUM_WORDS)).cumsum()
    while num_bytes > 0:
        drawn = rng.random((DOCUMENT_SENTENCES, SENTENCE_WORDS)) * cumulative[-1]
        lines = words[np.searchsorted(cumulative, drawn)]
        text = "\n".join(" ".join(line).capitalize() + "." for line in lines)
        num_bytes -= len(text)
        yield text


def write_text(path: Path, num_bytes: int) -> None:
    """A .jsonl file with that much text."""
    with open(path, "w", encoding="utf-8") as file:
        for text in make_documents(num_bytes):
            file.write(json.dumps({"text": text}) + "\n")


class ProcessTree:
    """Peak memory (bytes) and CPU time of a process and its children, from repeated looks."""

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.peak = self.worker_peak = 0
        self.cpu_s: dict[int, float] = {}

    def look(self) -> None:
        """Take the processes' present state into account."""
        memory = {}
        for member in [self.root, *self.root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                times, memory[member.pid] = member.cpu_times(), member.memory_info().rss
                self.cpu_s[member.pid] = times.user + times.system
        self.peak = max(self.peak, sum(memory.values()))
        memory.pop(self.root.pid, None)
        self.worker_peak = max([self.worker_peak, *memory.values()])


def measure(command: list[str]) -> tuple[float, float, float, float]:
    """Run a command: its wall and CPU time, and the peak memory of all and of a worker (MB)."""
    started_s = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        tree = ProcessTree(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                tree.look()
            time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}")
    elapsed_s = time.monotonic() - started_s
    return elapsed_s, sum(tree.cpu_s.values()), tree.peak / 1e6, tree.worker_peak / 1e6


def tokenizer_rate(model: Path) -> float:
    """MB per CPU second that SentencePiece encodes without anything around it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = list(make_documents(TOKENIZER_SAMPLE_BYTES))
    started_s = time.process_time()
    for text in texts:
        processor.encode(text)
    return sum(map(len, texts)) / 1e6 / (time.process_time() - started_s)


def measure_size(folder: Path, megabytes: int, options: list[str]) -> list[str]:
    """The cells of one row."""
    source, out = folder / f"{megabytes}.jsonl", folder / f"set-{megabytes}"
    write_text(source, megabytes * 10**6)
    command = [sys.executable, str(ROOT / "data/prepare.py"), "--input", str(source)]
    wall_s, cpu_s, peak, worker_peak = measure([*command, "--out", str(out), *options])
    manifest = json.loads((out / "manifest.json").read_bytes())
    num_tokens = sum(manifest[split]["tokens"] for split in ("train", "val"))
    num_bytes = sum(manifest[split]["text_bytes"] for split in ("train", "val"))
    alone = tokenizer_rate(out / "tokenizer.model")
    shutil.rmtree(out)
    source.unlink()
    return [
        f"{num_bytes / 1e6:,.0f} MB", f"{num_tokens / 1e6:,.0f} M", f"{wall_s:.0f}",
        f"{cpu_s:.0f}", f"{num_bytes / 1e6 / cpu_s:.1f}", f"{peak:.0f}", f"{worker_peak:.0f}",
        f"{alone:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Measure each size and print the table."""
    parser = argparse.ArgumentParser(description="Measure data/prepare.py on generated text.")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("options", nargs="*", help="options of prepare.py, after --")
    options = parser.parse_args()
    print("|", " | ".join(COLUMNS), "|")
    print("|", " | ".join("---" for _ in COLUMNS), "|")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in options.megabytes:
            cells = measure_size(Path(folder), megabytes, options.options)
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
