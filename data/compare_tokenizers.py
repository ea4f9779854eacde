"""Compare tokenizers by the tokens that they need for a byte of a text.

    python data/compare_tokenizers.py --input train.jsonl.zst --val-input val.jsonl.zst

Trains each kind of tokenizer on a sample of the first text and encodes the second one, with a BOS
for each document. Tokens per byte of the original text: case markers are tokens, but no bytes.
A tokenizer that needs fewer tokens sees more text in the same time; whether it gives fewer bits
per byte, only training tells.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import case_markers, prepare  # noqa: E402  (the path above makes the import possible)
from data.readers import find_files, hash_text, read_documents  # noqa: E402
from train_gpt import InputError  # noqa: E402

KINDS: dict[str, list[str]] = {  # options of data/prepare.py
    "plain": [],
    "separate": ["--case-markers=separate"],
    "merge": ["--case-markers=merge"],
    "any script": ["--any-script"],
    "separate, any script": ["--case-markers=separate", "--any-script"],
    "group digits": ["--digits=group"],
    "unigram": ["--model=unigram"],
    "superwords": ["--superwords"],
    "merge, unigram": ["--case-markers=merge", "--model=unigram"],
    "merge, superwords": ["--case-markers=merge", "--superwords"],
}


VOCAB_SIZES = prepare.bounded(prepare.MIN_VOCAB_SIZE, prepare.MAX_TOKEN_ID + 1)


def read_texts(paths: list[str]) -> Iterable[str]:
    """The texts of all documents in files, folders and globs."""
    for path in find_files(paths, Path("/nonexistent")):
        for document in read_documents(path):
            yield document.text


def train(texts: list[str], kind: str, vocab_size: int) -> prepare.Processor:
    """A tokenizer of one kind."""
    options = prepare.parse_options(["--source", "stdlib", "--out", "unused", *KINDS[kind]])
    if options.case_markers:
        texts = list(map(case_markers.encode, texts))
    settings = prepare.tokenizer_settings(options)
    return prepare.Processor(model_proto=prepare.train_tokenizer(texts, vocab_size, settings))


def count_tokens(processor: prepare.Processor, texts: list[str], kind: str) -> int:
    """Tokens of all texts, with a BOS for each."""
    if any("case-markers" in option for option in KINDS[kind]):
        texts = list(map(case_markers.encode, texts))
    return sum(1 + len(prepare.encode_document(processor, text)) for text in texts)


def main(argv: list[str] | None = None) -> int:
    """Print a line for each tokenizer; the exit status is 0, 1 (failed), 2 (bad input) or 130."""
    parser = argparse.ArgumentParser(description="Compare tokenizers by tokens per byte.")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="training text")
    parser.add_argument(
        "--val-input", nargs="+", required=True, metavar="PATH", help="text to count"
    )
    parser.add_argument("--vocab-sizes", nargs="+", type=VOCAB_SIZES, default=[1024, 4096, 8192])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["plain", "separate", "merge"])
    parser.add_argument(
        "--tokenizer-bytes",
        type=prepare.bounded(1, 10**9),
        default=20_000_000,
        help="training text used",
    )
    options = parser.parse_args(argv)
    try:
        sample = prepare.Sample(options.tokenizer_bytes)
        for text in read_texts(options.input):
            sample.add(hash_text(text), text)
        train_texts, val_texts = sample.texts(), list(read_texts(options.val_input))
        num_bytes = sum(len(text.encode("utf-8")) for text in val_texts)
        print(f"{num_bytes:,} bytes in {len(val_texts)} documents", flush=True)
        if not num_bytes:
            raise InputError("--val-input holds no text; give a file with some")
        for kind, vocab_size in itertools.product(options.kinds, options.vocab_sizes):
            start = time.perf_counter()
            processor = train(train_texts, kind, vocab_size)
            seconds = time.perf_counter() - start
            num_tokens = count_tokens(processor, val_texts, kind)
            print(
                f"{kind:20} {vocab_size:6} pieces  {num_tokens:9,} tokens  "
                f"{num_tokens / num_bytes:.4f} tokens per byte  trained in {seconds:.0f} s",
                flush=True,
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
