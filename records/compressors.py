"""General compressors as baselines ("yardsticks"): their bits per byte on the text of a score.

xz and zstd see only this text. PPMd (7-zip's PPMd var. H), which predicts bytes from the longest
contexts that it has seen, is a stronger one. It is measured alone and primed, that is after reading
as much training text as it compresses into the bytes of the model's artifact: what a decompressor
would reach whose file holds compressed training text instead of weights. PPMd needs the optional
package pyppmd.
"""

from __future__ import annotations

import importlib
import itertools
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece
import zstandard

import train_gpt
from data.prepare import decode_pieces
from records.knobs import format_knob_value
from records.logs import METRICS, Json, RunLog, append_event
from train_gpt import Config, InputError

PPMD_ORDER, PPMD_MEMORY_BYTES = 16, 2**29
YARDSTICKS = {
    "xz_bpb": "xz -9e",
    "zstd_bpb": "zstd -22 --ultra",
    "ppmd_bpb": "PPMd",
    "ppmd_primed_bpb": "primed PPMd",
}
PRIME_PIECE_BYTES = 1024  # the prime is a multiple of it
TOKENS_AT_ONCE = 2**20

# --- Text ----------------------------------------------------------------------------------------


def decode_tokens(processor: sentencepiece.SentencePieceProcessor, ids: Iterable[int]) -> bytes:
    """Return the bytes of all tokens but the first, counted as the scorer counts them."""
    pieces = decode_pieces(processor)
    # Decoders drop the leading space of a piece that follows a control token.
    starts = [piece[1:] if piece[:1] == b" " else piece for piece in pieces]
    is_text = [not (processor.is_control(t) or processor.is_unknown(t)) for t in range(len(pieces))]
    return b"".join(
        (pieces if is_text[before] else starts)[token] for before, token in itertools.pairwise(ids)
    )


def validation_text(data: Config) -> bytes:
    """Return the validation text of a data set: val_text.bin if it is there, else from shards."""
    path = Path(data.data_path) / "val_text.bin"
    if path.is_file() and not data.val_tokens_limit:
        return path.read_bytes()
    processor, _ = train_gpt.load_tokenizer(data)
    data = replace(data, vocab_size=processor.get_piece_size())
    return decode_tokens(processor, train_gpt.load_validation(data, processor).ids.tolist())


def training_text(data: Config) -> Iterator[bytes]:
    """Yield the training text of a data set in pieces of PRIME_PIECE_BYTES."""
    processor, _ = train_gpt.load_tokenizer(data)
    shards = train_gpt.find_shards(data, "train")
    stream = train_gpt.TokenStream(shards, processor.get_piece_size())
    text = b""
    for start in range(0, stream.num_tokens - 1, TOKENS_AT_ONCE):
        # One token more than are decoded: the first one is only context.
        count = min(TOKENS_AT_ONCE + 1, stream.num_tokens - start)
        text += decode_tokens(processor, stream.read(start, count).tolist())
        whole = len(text) - len(text) % PRIME_PIECE_BYTES
        for place in range(0, whole, PRIME_PIECE_BYTES):
            yield text[place : place + PRIME_PIECE_BYTES]
        text = text[whole:]
    if text:
        yield text


# --- Compressors ---------------------------------------------------------------------------------


def find_ppmd() -> Any:
    """Return the module pyppmd, or None if it is not installed."""
    try:
        return importlib.import_module("pyppmd")
    except ImportError:
        return None


def measure_ppmd(text: bytes, pieces: Iterable[bytes] = (), num_bytes: int = 0) -> Json:
    """Return bits per byte of `text` under PPMd, alone and primed; empty without pyppmd.

    The prime is the beginning of the training text `pieces` that takes `num_bytes` compressed bytes
    at most; with `num_bytes` = 0 only the figure without prime is measured.
    """
    if (module := find_ppmd()) is None:
        return {}
    primed = prime_and_measure(module, text, pieces, num_bytes) if num_bytes else {}
    encoder = module.Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY_BYTES)
    size = len(encoder.encode(text)) + len(encoder.flush())
    return {"ppmd_bpb": round(8 * size / len(text), 6), **primed}


def prime_and_measure(module: Any, text: bytes, pieces: Iterable[bytes], num_bytes: int) -> Json:
    """Return bits per byte of `text` after a prime of at most `num_bytes` compressed bytes."""
    encoder, prime_bytes, size = module.Ppmd7Encoder(PPMD_ORDER, PPMD_MEMORY_BYTES), 0, 0
    for piece in pieces:
        # No piece grows to more than twice its bytes; the encoder holds back a few bytes.
        if size + 2 * PRIME_PIECE_BYTES > num_bytes:
            break
        size += len(encoder.encode(piece))
        prime_bytes += len(piece)
    text_size = len(encoder.encode(text)) + len(encoder.flush())
    return {"ppmd_primed_bpb": round(8 * text_size / len(text), 6), "prime_bytes": prime_bytes}


def measure_yardsticks(text: bytes) -> Json:
    """Return bits per byte of `text` under `xz -9e` and `zstd -22 --ultra`, with file headers."""
    if not text:
        raise InputError("the validation text is empty")
    packed = {
        "xz_bpb": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
        "zstd_bpb": zstandard.ZstdCompressor(level=22).compress(text),
    }
    bpb = {key: round(8 * len(payload) / len(text), 6) for key, payload in packed.items()}
    return {**bpb, "text_bytes": len(text)}


# --- Runs and data sets --------------------------------------------------------------------------


def data_of(log: RunLog) -> Config:
    """Return the configuration of the data set that a run was scored on."""
    names = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "VAL_TOKENS_LIMIT")
    knobs = {name: format_knob_value(log.knob(name)) for name in names}
    return train_gpt.config_from_env({**knobs, "MODE": "describe"})


def yardstick_run(folder: Path) -> Json:
    """Measure general compressors on the text of a run's score and append them to its log."""
    log = RunLog.read(folder / METRICS)
    data = data_of(log)
    text = validation_text(data)
    event = measure_yardsticks(text)
    scored = log.last("final_quantized").get("bytes", len(text))
    if scored != len(text):
        print(f"note: the text has {len(text):,} bytes, the scorer counted {scored:,}")
    try:
        artifact_bytes = log.need("size", "artifact_bytes")["artifact_bytes"]
        event |= measure_ppmd(text, training_text(data), artifact_bytes)
    except InputError as error:  # no training shards, or a run without an artifact
        print(f"note: PPMd is not primed: {error}")
        event |= measure_ppmd(text)
    if "ppmd_bpb" not in event:
        print("note: PPMd is not measured; it needs the package pyppmd")
    append_event(folder, "yardstick", **event)
    return event


def yardstick_command(path: Path) -> None:
    """Print the yardsticks of a run, appending them to its log, or of a data set."""
    if (path / METRICS).is_file():
        event = yardstick_run(path)
    else:
        text = validation_text(replace(Config(), data_path=str(path)))
        event = {**measure_yardsticks(text), **measure_ppmd(text)}
    print(train_gpt.format_event("yardstick", **event))


def list_yardsticks(event: Json) -> list[tuple[str, float]]:
    """Return name and bits per byte of every yardstick of an event, the best one first."""
    named = [(name, event[key]) for key, name in YARDSTICKS.items() if key in event]
    return sorted(named, key=lambda pair: pair[1])
