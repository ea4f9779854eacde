"""General compressors as yardsticks: their bits per byte on the text that a model was scored on.

They need no model file but see only this text. A useful language model must be below them.
"""

from __future__ import annotations

import itertools
import lzma
from dataclasses import replace
from pathlib import Path

import zstandard

import train_gpt
from data.prepare import spell_pieces
from records.knobs import format_knob_value
from records.logs import METRICS, Json, RunLog, append_event
from train_gpt import Config, InputError

YARDSTICKS = {"xz_bpb": "xz -9e", "zstd_bpb": "zstd -22 --ultra"}


def spell_tokens(data: Config) -> bytes:
    """Return the bytes of the scored validation tokens, counted as the scorer counts them."""
    processor, _ = train_gpt.load_tokenizer(data)
    data = replace(data, vocab_size=processor.get_piece_size())
    ids = train_gpt.load_validation(data, processor).ids.tolist()
    pieces = spell_pieces(processor)
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
    return spell_tokens(data)


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


def yardstick_run(folder: Path) -> Json:
    """Measure the yardsticks on the text that a run was scored on and append them to its log."""
    log = RunLog.read(folder / METRICS)
    names = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "VAL_TOKENS_LIMIT")
    knobs = {name: format_knob_value(log.knob(name)) for name in names}
    data = train_gpt.config_from_env({**knobs, "MODE": "describe"})
    event = measure_yardsticks(validation_text(data))
    scored = log.last("final_quantized").get("bytes", event["text_bytes"])
    if scored != event["text_bytes"]:
        print(f"note: the text has {event['text_bytes']:,} bytes, the scorer counted {scored:,}")
    append_event(folder, "yardstick", **event)
    return event


def yardstick_command(path: Path) -> None:
    """Print the yardsticks of a run, appending them to its log, or of a data set."""
    if (path / METRICS).is_file():
        event = yardstick_run(path)
    else:
        event = measure_yardsticks(validation_text(replace(Config(), data_path=str(path))))
    print(train_gpt.format_event("yardstick", **event))
