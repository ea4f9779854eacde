"""Artifact: exact round trips, every kind of damage refused by name, and the packed script."""

from __future__ import annotations

import ast
import bz2
import contextlib
import dis
import functools
import hashlib
import inspect
import io
import itertools
import json
import lzma
import resource
import struct
import sys
import tokenize
import tracemalloc
import types
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
import zstandard

import train_gpt
from tests.conftest import MakeRun, random_model, tiny_config
from train_gpt import (
    GPT,
    Config,
    InputError,
    Quantized,
    Run,
    RunFailed,
    artifact_sizes,
    check_sizes,
    choose_attention_backend,
    decode_header,
    decode_tensors,
    encode_artifact,
    find_compressor,
    minify,
    model_layout,
    pack_source,
    parameter_roles,
    quantize_model,
    read_artifact,
    shorten_globals,
    shorten_locals,
    source_tokens,
)

COMPRESSORS = ["zlib", "zstd", "lzma", "brotli"]  # one whole-stream coder each; see GENERAL
GENERAL = [*COMPRESSORS, "brotli_shuffled"]
ALL_COMPRESSORS = [*GENERAL, "ans"]
SHA = hashlib.sha256(b"the tokenizer").hexdigest()
SHAPE: dict[str, Any] = {
    "vocab_size": 40, "num_layers": 3, "model_dim": 16, "tie_embeddings": False,
    "skip_gates": True, "attn_bits": 6, "mlp_bits": 5, "embed_bits": 8,
}  # fmt: skip
PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of the compressed header


def make_artifact(compressor: str = "zlib", **changes: Any) -> bytes:
    """The artifact of a small random model."""
    cfg = tiny_config(**{**SHAPE, "compressor": compressor, **changes})
    return encode_artifact(cfg, quantize_model(cfg, random_model(cfg)), SHA)


@pytest.fixture(scope="module")
def artifacts() -> dict[str, bytes]:
    """One artifact for each compressor, of the same weights."""
    return {name: make_artifact(name) for name in ALL_COMPRESSORS}


@pytest.fixture
def read(make_run: MakeRun, tmp_path: Path) -> Callable[..., GPT]:
    """read(payload): write it to a file and read that with a run whose own shape is another."""

    def read_payload(payload: bytes, sha256: str = SHA, **knobs: Any) -> GPT:
        path = tmp_path / "model.bin"
        path.write_bytes(payload)
        return read_artifact(path, make_run(**knobs), sha256)

    return read_payload


def refusal_of(read: Callable[..., GPT], payload: bytes, **options: Any) -> str:
    """The reason for which `payload` is refused, after the part that names the file."""
    with pytest.raises(InputError) as refusal:
        read(payload, **options)
    start, _, reason = str(refusal.value).partition("model.bin: ")
    assert start.startswith("cannot use the artifact /") and reason
    return reason


class Parts:
    """An artifact taken apart by the description of the format, to be edited and sealed again."""

    def __init__(self, payload: bytes):
        self.magic, self.version, head_bytes = PREFIX.unpack_from(payload)
        self.head = payload[PREFIX.size :][:head_bytes]
        self.body = payload[PREFIX.size + head_bytes : -32]
        self.header = json.loads(zlib.decompress(self.head))
        assert hashlib.sha256(payload[:-32]).digest() == payload[-32:]

    def seal(self, *, head: bytes | None = None, head_bytes: int | None = None) -> bytes:
        """The file with a right checksum; `head` and `head_bytes` override the header's."""
        if head is None:
            head = zlib.compress(json.dumps(self.header).encode())
        head_bytes = len(head) if head_bytes is None else head_bytes
        whole = PREFIX.pack(self.magic, self.version, head_bytes) + head + self.body
        return whole + hashlib.sha256(whole).digest()

    def streams(self) -> dict[str, bytes]:
        """The packed streams by kind and group of tensors."""
        streams, position = {}, 0
        for kind, packed_bytes in self.header["streams"]:
            streams[kind] = self.body[position : position + packed_bytes]
            position += packed_bytes
        return streams

    def replace_stream(self, kind: str, packed: bytes) -> None:
        """Put `packed` in the place of a stream, its length declared."""
        streams = {**self.streams(), kind: packed}
        assert streams.keys() == self.streams().keys()
        self.header["streams"] = [[k, len(v)] for k, v in streams.items()]
        self.body = b"".join(streams.values())


# --- Round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ALL_COMPRESSORS)
def test_a_model_read_back_is_the_stored_codes_times_their_scales(
    compressor: str, read: Callable[..., GPT]
):
    cfg = tiny_config(**SHAPE, compressor=compressor)
    tensors = quantize_model(cfg, random_model(cfg))
    model = read(encode_artifact(cfg, tensors, SHA))
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, stored in tensors.items():
        expected = stored.values.astype(np.float32)
        if stored.row_scales is not None:
            expected = expected * stored.row_scales.astype(np.float32)[:, None]
        assert parameters[name].dtype == torch.float32 and parameters[name].requires_grad
        assert np.array_equal(parameters[name].detach().numpy(), expected), name


def test_the_shape_comes_from_the_artifact_and_all_else_from_the_run(
    make_run: MakeRun, tmp_path: Path
):
    knobs = dict(SHAPE, rope_dims=2, leaky_slope=0.25, xsa_last_n=1, logit_softcap=7.0)
    path = tmp_path / "a.bin"
    path.write_bytes(make_artifact(**knobs))
    run = make_run(num_layers=1, model_dim=64, eval_stride=4, run_id="mine")
    model = read_artifact(path, run, SHA)
    wanted = tiny_config(**knobs)
    for f in fields(Config):
        expected = getattr(wanted if f.metadata["stored"] else run.cfg, f.name)
        assert getattr(model.cfg, f.name) == expected, f.name
    assert (run.cfg.eval_stride, run.cfg.run_id, run.cfg.num_layers) == (4, "mine", 3)
    ids = torch.randint(40, (1, 9))
    expected_model = random_model(wanted)
    stored = quantize_model(wanted, expected_model)
    expected_model.load_state_dict({k: v.dequantized() for k, v in stored.items()})
    assert torch.equal(model.logits(ids), expected_model.logits(ids))


@pytest.mark.parametrize("compressor", ALL_COMPRESSORS)
def test_bytes_to_tensors_to_bytes_gives_the_same_bytes(
    compressor: str, artifacts: dict[str, bytes]
):
    cfg = tiny_config(**SHAPE, compressor=compressor)
    header, body = decode_header(artifacts[compressor])
    shapes = {name: tuple(p.shape) for name, p in random_model(cfg).named_parameters()}
    groups = {name: role.quant_group for name, role in parameter_roles(random_model(cfg)).items()}
    assert model_layout(cfg) == (shapes, groups)
    tensors = decode_tensors(header, body, shapes, groups)
    shuffled = dict(sorted(tensors.items(), reverse=True))
    assert encode_artifact(cfg, shuffled, SHA) == artifacts[compressor]


def test_the_same_weights_give_the_same_bytes_and_others_do_not(artifacts: dict[str, bytes]):
    for name in ALL_COMPRESSORS:
        assert make_artifact(name) == artifacts[name]
    cfg = tiny_config(**SHAPE)
    model = random_model(cfg)
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[2, 3] += 0.5  # type: ignore[union-attr, operator, index]
    assert encode_artifact(cfg, quantize_model(cfg, model), SHA) != artifacts["zlib"]


def test_a_matrix_may_be_stored_in_plain_fp16(read: Callable[..., GPT]):
    cfg = tiny_config(**SHAPE)
    model = random_model(cfg)
    tensors = quantize_model(cfg, model)
    exact = model.tok_emb.weight.detach().half()
    tensors["tok_emb.weight"] = Quantized(16, exact.numpy(), None)
    assert torch.equal(read(encode_artifact(cfg, tensors, SHA)).tok_emb.weight, exact.float())


# --- Compressors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("kind", ["noise", "odd noise", "zeros", "text", "one", "two"])
def test_a_compressor_gives_back_what_it_was_given(name: str, kind: str):
    rng = np.random.default_rng(0)
    raw = {
        "noise": rng.integers(0, 256, 300_000, dtype=np.uint8).tobytes(),
        "odd noise": rng.integers(0, 256, 99_999, dtype=np.uint8).tobytes(),
        "zeros": bytes(3_000_000),
        "text": b"the of and to in a is that for it as was " * 20_000,
        "one": b"\x07",
        "two": b"\x07\x09",
    }[kind]
    pack, unpack = find_compressor(name)
    packed = pack(raw)
    assert unpack(packed, len(raw)) == raw
    assert pack(raw) == packed
    if kind in ("zeros", "text"):
        assert len(packed) < len(raw) / 100


def test_each_compressor_writes_its_own_format():
    raw = b"the of and " * 1000
    readers = {
        "zlib": zlib.decompress,
        "zstd": zstandard.ZstdDecompressor().decompress,
        "lzma": lzma.decompress,
        "brotli": brotli.decompress,
    }
    for name, reader in readers.items():
        assert reader(find_compressor(name)[0](raw)) == raw
    even, odd = raw[0::2], raw[1::2]
    assert brotli.decompress(find_compressor("brotli_shuffled")[0](raw)) == even + odd
    # Level 22 is stated in the frame by nothing; its result is.
    noise = np.random.default_rng(0).integers(0, 16, 200_000, dtype=np.uint8).tobytes()
    expected = zstandard.ZstdCompressor(level=22).compress(noise)
    assert find_compressor("zstd")[0](noise) == expected


@pytest.mark.parametrize(
    ("name", "package"),
    [("zstd", "zstandard"), ("brotli", "brotli"), ("brotli_shuffled", "brotli")],
)
def test_a_missing_package_is_refused_with_the_remedy_not_replaced(
    name: str,
    package: str,
    artifacts: dict[str, bytes],
    read: Callable[..., GPT],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(InputError) as refusal:
        make_artifact(name)
    message = str(refusal.value)
    assert message.startswith(f"COMPRESSOR={name}") and package in message
    assert "pip install -r requirements.txt" in message
    reason = refusal_of(read, artifacts[name])
    assert f"COMPRESSOR={name}" in reason and "pip install -r requirements.txt" in reason
    assert len(make_artifact("zlib")) > 0  # the others go on


# --- Damage --------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder_are_refused_by_name(make_run: MakeRun, tmp_path: Path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(InputError) as refusal:
            read_artifact(path, make_run(), SHA)
        assert str(refusal.value).startswith(f"cannot use the artifact {path}: ")


def boundaries(payload: bytes) -> list[int]:
    """Where the parts of an artifact end."""
    parts = Parts(payload)
    ends = [0, 8, 10, PREFIX.size, PREFIX.size + len(parts.head)]
    for packed in parts.streams().values():
        ends.append(ends[-1] + len(packed))
    assert ends[-1] == len(payload) - 32
    return [*ends, len(payload)]


@pytest.mark.parametrize("compressor", ALL_COMPRESSORS)
def test_a_file_cut_at_or_near_the_end_of_any_part_is_refused(
    compressor: str, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    payload = artifacts[compressor]
    cuts = {end + d for end in boundaries(payload) for d in (-2, -1, 0, 1, 31, 32)}
    for cut in sorted(c for c in cuts if 0 <= c < len(payload)):
        reason = refusal_of(read, payload[:cut])
        if cut < PREFIX.size + 32:
            assert reason == f"{cut} bytes are too few for an artifact"
        else:
            text = "the checksum does not match: the file is truncated or was changed"
            assert reason == text
    for more in (b"\0", payload, payload[-32:]):
        assert "checksum" in refusal_of(read, payload + more)


def test_a_file_of_another_kind_is_refused(read: Callable[..., GPT]):
    payload = b"PK\3\4" + bytes(100)
    assert refusal_of(read, payload) == (
        "it begins with b'PK\\x03\\x04\\x00\\x00\\x00\\x00', an artifact with b'PGOLFART'"
    )


def test_any_flipped_bit_is_refused(artifacts: dict[str, bytes], read: Callable[..., GPT]):
    payload, rng = artifacts["zlib"], np.random.default_rng(0)
    places = [*range(PREFIX.size + 8), *rng.integers(0, len(payload), 300), len(payload) - 1]
    for place in places:
        edited = bytearray(payload)
        edited[place] ^= 1 << int(rng.integers(8))
        refusal_of(read, bytes(edited))


@pytest.mark.parametrize(
    "compressor",
    [pytest.param(c, marks=[pytest.mark.slow] * (c != "ans")) for c in ALL_COMPRESSORS],
)
def test_a_flipped_bit_under_a_right_checksum_gives_a_refusal_or_a_whole_model(
    compressor: str, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    # Nobody can tell edited weights from others; but nothing else may happen.
    payload, rng = artifacts[compressor][:-32], np.random.default_rng(1)
    shapes = {n: p.shape for n, p in random_model(tiny_config(**SHAPE)).named_parameters()}
    ends = boundaries(artifacts[compressor])
    near_the_start_of_a_part = [end + d for end in ends[3:-2] for d in range(12)]
    places = [*near_the_start_of_a_part, *rng.integers(0, len(payload), 40)]
    refused = 0
    for place in places[:: 4 if compressor == "ans" else 1]:  # which takes longer to decode
        edited = bytearray(payload)
        edited[place] ^= 1 << int(rng.integers(8))
        try:
            model = read(bytes(edited) + hashlib.sha256(edited).digest())
        except InputError as error:
            assert "model.bin: " in str(error)
            refused += 1
        else:
            assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert refused > (5 if compressor == "ans" else 20)


# --- Edited headers under a right checksum -------------------------------------------------------

Edit = Callable[[dict[str, Any]], Any]


ODD_VALUES: list[Any] = [None, 7, "zlob", [], {}, [1, 2], [["a"]]]
KEYS = ("model", "tokenizer_sha256", "compressor", "tensors", "streams")


def remove_key(key: str) -> Edit:
    """An edit that leaves out a part of the header."""
    return lambda header: header.pop(key)


def set_key(key: str, value: Any) -> Edit:
    """An edit that puts something else in the place of a part of the header."""
    return lambda header: header.update({key: value})


def set_model(**values: Any) -> Edit:
    """An edit of the model's shape; None removes the knob."""

    def edit(header: dict[str, Any]) -> None:
        for name, value in values.items():
            if value is None:
                del header["model"][name]
            else:
                header["model"][name] = value

    return edit


def set_stream(kind: str, place: int, change: Callable[[Any], Any]) -> Edit:
    """An edit of a stream's entry: [kind/group, packed bytes]."""

    def edit(header: dict[str, Any]) -> None:
        entry = next(e for e in header["streams"] if e[0] == kind)
        entry[place] = change(entry[place])

    return edit


def set_bits(name: str, bits: Any) -> Edit:
    """An edit of a tensor's bits."""

    def edit(header: dict[str, Any]) -> None:
        next(e for e in header["tensors"] if e[0] == name)[1] = bits

    return edit


def set_scales(name: str, change: Callable[[Any], Any]) -> Edit:
    """An edit of a tensor's number of scales."""

    def edit(header: dict[str, Any]) -> None:
        entry = next(e for e in header["tensors"] if e[0] == name)
        entry[2] = change(entry[2])

    return edit


def set_flags(name: str, flags: Any) -> Edit:
    """An edit of a tensor's flags."""

    def edit(header: dict[str, Any]) -> None:
        next(e for e in header["tensors"] if e[0] == name)[3] = flags

    return edit


MATRIX, VECTOR = "blocks.0.attn.c_q.weight", "blocks.0.attn_scale"
REFUSED_EDITS: dict[str, Edit] = {
    **{f"no {key}": remove_key(key) for key in KEYS},
    **{f"{key} is {v!r}": set_key(key, v) for key in KEYS
       for v in ODD_VALUES},
    "unknown knob": set_model(num_layer=3),
    "more layers": set_model(num_layers=4),
    "fewer layers": set_model(num_layers=2),
    "wider": set_model(model_dim=32),
    "other heads": set_model(num_kv_heads=4),
    "larger vocabulary": set_model(vocab_size=41),
    "tied after all": set_model(tie_embeddings=True),
    "without gates": set_model(skip_gates=False),
    "huge width": set_model(model_dim=16_384),
    "huge everything": set_model(model_dim=16_384, num_layers=256, mlp_mult=64.0),
    "astronomic width": set_model(model_dim=10**30),
    "negative layers": set_model(num_layers=-1),
    **{f"{k} of zero": set_model(**{k: 0}) for k in ("num_heads", "num_kv_heads", "train_seq_len")},
    "layers as 3.0": set_model(num_layers=3.0),
    "no width": set_model(model_dim=0),
    "odd width": set_model(model_dim=17),
    "layers as text": set_model(num_layers="3"),
    "layers as a fraction": set_model(num_layers=3.5),
    "layers as a list": set_model(num_layers=[3]),
    "softcap as text": set_model(logit_softcap="30"),
    "width nan": set_model(mlp_mult=float("nan")),
    "unknown tensor": lambda h: h["tensors"].append(["blocks.9.attn_scale", 16, 0, 0]),
    "missing tensor": lambda h: h["tensors"].pop(),
    "renamed tensor": lambda h: h["tensors"][0].__setitem__(0, "x" + h["tensors"][0][0]),
    "tensor name is a number": lambda h: h["tensors"][0].__setitem__(0, 5),
    "tensor without bits": lambda h: h["tensors"][0].pop(),
    "matrix called plain": set_bits(MATRIX, 16),
    "vector called coded": set_bits(VECTOR, 8),
    "another compressor": lambda h: h.update(compressor="lzma"),
    "unknown stream": set_stream("codes/attn", 0, lambda _: "code/attn"),
    "stream of an unknown group": set_stream("codes/attn", 0, lambda _: "codes/heads"),
    "stream kind is a list": set_stream("codes/attn", 0, lambda _: []),
    "stream missing": lambda h: h["streams"].pop(),
    "streams swapped": lambda h: h["streams"].reverse(),
    **{f"packed {name}": set_stream("codes/attn", 1, change) for name, change in {
        "too short": lambda n: n - 1, "too long": lambda n: n + 1, "zero": lambda n: 0,
        "negative": lambda n: -n, "minus one": lambda n: -1, "astronomic": lambda n: 10**30,
        "text": lambda n: str(n), "fraction": lambda n: n + 0.5, "nothing": lambda n: None,
    }.items()},
    **{f"{what} scales": set_scales(MATRIX, change) for what, change in {
        "too few": lambda n: n - 1, "too many": lambda n: n + 1, "half the": lambda n: n // 2,
        "no": lambda n: 0, "negative": lambda n: -n, "astronomic": lambda n: 10**30,
        "text for": lambda n: str(n), "fractional": lambda n: n + 0.5, "null for": lambda n: None,
        "true for": lambda n: True,
    }.items()},
    **{f"{name} flags {flags!r}": set_flags(name, flags) for name in (MATRIX, VECTOR)
       for flags in (16, -1, 10**30, 1.0, "0", None, True)},
    "coarse steps for zlib": set_flags(MATRIX, 8),
    "a factor for each column of a vector": set_flags(VECTOR, 1),
    "a low-rank correction, which older scripts wrote": lambda h: h["tensors"].extend(
        [[f"{MATRIX}@0", 4, 16, 0], [f"{MATRIX}@1", 4, 3, 0]]),
    "a stream too many": lambda h: h["streams"].append(["more/mlp", 0]),
}  # fmt: skip


HUGE_SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "a list of 10^11 blocks": ({"xsa_layers": "0-99999999999"}, "XSA_LAYERS='0-99999999999'"),
    "another list": ({"ve_layers": "0,1-2000000000"}, "VE_LAYERS="),
    "10^9 loops": ({"num_loops": 1_500_000_000}, "NUM_LOOPS=1500000000 must be in [0, 16]"),
    "rotary tables of 12 GiB": (
        {"train_seq_len": 2**20, "model_dim": 2048, "num_heads": 2, "num_kv_heads": 2,
         "rope_dims": 1024},
        "take 12884901888 bytes; at most 1073741824 are allowed",
    ),
    "a context of 10^12": ({"train_seq_len": 10**12}, "TRAIN_SEQ_LEN=1000000000000 must be in"),
}  # fmt: skip


@pytest.mark.parametrize("what", HUGE_SHAPES)
def test_a_shape_that_takes_too_much_memory_is_refused_before_anything_is_allocated(
    what: str, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    changes, message = HUGE_SHAPES[what]
    parts = Parts(artifacts["zlib"])
    parts.header["model"] |= changes
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refusal_of(read, parts.seal())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 64 * 1024


def test_a_few_bytes_may_not_hold_very_many_weights(
    artifacts: dict[str, bytes], read: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
):
    weights = sum(p.numel() for p in random_model(tiny_config(**SHAPE)).parameters())
    monkeypatch.setattr(train_gpt, "SMALL_MODEL_WEIGHTS", weights - 1)
    monkeypatch.setattr(train_gpt, "MAX_WEIGHTS_PER_BYTE", 1)
    body = Parts(artifacts["zlib"]).body
    assert len(body) < weights
    assert refusal_of(read, artifacts["zlib"]) == (
        f"{weights} weights; {len(body)} bytes may hold at most {weights - 1}"
    )
    monkeypatch.setattr(train_gpt, "MAX_WEIGHTS_PER_BYTE", weights)
    read(artifacts["zlib"])


def test_reading_an_artifact_draws_no_random_numbers(
    artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    before = torch.get_rng_state()
    model = read(artifacts["zlib"])
    assert torch.equal(torch.get_rng_state(), before)
    built = random_model(model.cfg)
    for name, buffer in built.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize("what", REFUSED_EDITS)
def test_an_edited_header_is_refused(
    what: str, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    REFUSED_EDITS[what](parts.header)
    refusal_of(read, parts.seal())


def test_an_artifact_sealed_again_without_an_edit_is_read(
    artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    # Without this the tests around it could pass because sealing is wrong.
    for payload in artifacts.values():
        assert isinstance(read(Parts(payload).seal()), GPT)


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.metadata["stored"]])
def test_a_header_that_leaves_out_a_knob_of_the_shape_is_refused(
    name: str, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    del parts.header["model"][name]
    default = tiny_config(**SHAPE)
    # The run's own value fits, so that nothing else is wrong.
    shape = {f.name: getattr(default, f.name) for f in fields(Config) if f.metadata["stored"]}
    refusal_of(read, parts.seal(), **shape)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_dir", "/tmp/x"),
        ("eval_stride", 1),
        ("artifact_budget_bytes", 10**12),
        ("val_tokens_limit", 9),
    ],
)
def test_a_header_cannot_set_what_is_not_the_model_s_shape(
    name: str, value: Any, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    parts.header["model"][name] = value
    refusal_of(read, parts.seal())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_softcap", float("nan")),
        ("logit_softcap", float("inf")),
        ("rope_base", float("inf")),
        ("leaky_slope", float("nan")),
        ("tie_embeddings", 0),
        ("skip_gates", "false"),
        ("xsa_last_n", True),
    ],
)
def test_a_header_s_knob_of_another_type_or_not_finite_is_refused(
    name: str, value: Any, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    parts.header["model"][name] = value
    refusal_of(read, parts.seal())


@pytest.mark.parametrize("bits", [0, 3, 9, 99, -8, "8", None, 8.0, [8]])
def test_bits_that_no_tensor_can_have_are_refused(
    bits: Any, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    set_bits(MATRIX, bits)(parts.header)
    refusal_of(read, parts.seal())


def test_codes_beyond_their_bits_are_refused(artifacts: dict[str, bytes], read: Callable[..., GPT]):
    parts = Parts(artifacts["zlib"])
    set_bits(MATRIX, 4)(parts.header)  # it was stored with 6
    refusal_of(read, parts.seal())


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"not zlib",
        zlib.compress(b""),
        zlib.compress(b"{"),
        zlib.compress(b"\xff\xfe\xff"),
        zlib.compress(b"[]"),
        zlib.compress(b"7"),
        zlib.compress(b"null"),
        zlib.compress(b'"text"'),
        zlib.compress(b"{}"),
        zlib.compress(json.dumps({"model": {}}).encode())[:-4],
        zlib.compress(b"[" * 200_000),
    ],
    ids=range(12),
)
def test_a_header_that_is_no_json_object_is_refused(
    head: bytes, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    refusal_of(read, Parts(artifacts["zlib"]).seal(head=head))


@pytest.mark.parametrize("change", [-(10**9), -1, 1, 20, 10**6, 10**9])
def test_a_wrong_length_of_the_header_is_refused(
    change: int, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    head_bytes = max(0, len(parts.head) + change)
    refusal_of(read, parts.seal(head=parts.head, head_bytes=head_bytes))


def test_bytes_that_no_stream_declares_are_refused(
    artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    parts.body += b"\0"
    refusal_of(read, parts.seal())
    parts.body = b"\0" + artifacts["zlib"][PREFIX.size + len(parts.head) : -32]
    refusal_of(read, parts.seal())


@pytest.mark.parametrize("version", [0, 1, 3, 65_535])
def test_another_version_is_refused(
    version: int, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zlib"])
    parts.version = version
    assert refusal_of(read, parts.seal()) == f"format version {version}; this script reads 2"


def test_an_artifact_of_another_tokenizer_is_refused(
    artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    reason = "it was trained with another tokenizer than the data set's"
    assert refusal_of(read, artifacts["zlib"], sha256=SHA[::-1]) == reason


def test_knobs_of_training_do_not_matter_to_reading(read: Callable[..., GPT]):
    payload = make_artifact(train_seq_len=48, train_batch_tokens=96)
    assert read(payload, train_batch_tokens=256, mode="eval").cfg.train_seq_len == 48


@pytest.mark.parametrize(
    ("mode", "knobs", "named"),
    [
        ("eval", {"seed": 7, "train_seq_len": 48}, "SEED"),
        ("eval", {"seed": 7, "num_layers": 4, "ttt_lora_lr": 0.1}, "NUM_LAYERS, SEED"),
        ("eval", {}, ""),
        ("generate", {"seed": 7}, ""),
    ],
)
def test_knobs_of_the_artifact_that_were_set_to_other_values_are_named(
    read: Callable[..., GPT], tmp_path: Path, mode: str, knobs: dict[str, Any], named: str
):
    payload = make_artifact(train_seq_len=48, train_batch_tokens=96)
    cfg = read(payload, **{**SHAPE, "train_seq_len": 48, "mode": mode, **knobs}).cfg
    assert cfg.seed == tiny_config().seed
    log = tmp_path / "run/train.log"
    text = log.read_text() if log.exists() else ""
    assert text.count("warning") == bool(named)
    assert f"the artifact's values of {named} are used" in text or not named


# --- Edited numbers under a right checksum -------------------------------------------------------


def edited_tensors(name: str, change: Callable[[Quantized], Quantized]) -> bytes:
    """An artifact in which one tensor is stored differently."""
    cfg = tiny_config(**SHAPE)
    tensors = quantize_model(cfg, random_model(cfg))
    tensors[name] = change(tensors[name])
    return encode_artifact(cfg, tensors, SHA)


def test_a_vector_with_factors_for_columns_is_refused(read: Callable[..., GPT]):
    def change(stored: Quantized) -> Quantized:
        n = len(stored.values)
        scales = np.ones(n, dtype=np.float16)
        return Quantized(8, np.ones(n, dtype=np.int8), scales, np.ones(n, dtype=np.float32))

    refusal_of(read, edited_tensors(VECTOR, change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [MATRIX, VECTOR])
def test_weights_that_are_not_finite_are_refused(name: str, value: float, read: Callable[..., GPT]):
    def change(stored: Quantized) -> Quantized:
        numbers = stored.values if stored.row_scales is None else stored.row_scales
        numbers = numbers.copy()
        numbers[1] = value
        if stored.row_scales is None:
            return stored._replace(values=numbers)
        return stored._replace(row_scales=numbers)

    refusal_of(read, edited_tensors(name, change))


def test_steps_and_factors_whose_product_is_not_finite_are_refused(read: Callable[..., GPT]):
    cfg = tiny_config(**SHAPE, compressor="ans")
    tensors = quantize_model(cfg, random_model(cfg))
    huge = np.full(16, 2.0**100, dtype=np.float32)
    codes = tensors[MATRIX].values.astype(np.int16)
    assert (codes == 0).any()  # times infinity: nan
    tensors[MATRIX] = Quantized(6, codes, huge, huge)
    refusal_of(read, encode_artifact(cfg, tensors, SHA))


# --- Bombs ---------------------------------------------------------------------------------------

MIB = 2**20
# What is held besides the numbers: the artifact itself, and 64 MiB that LZMA's highest preset needs
# for its window, whatever the length of the text.
ALLOWED_MIB = {"zlib": 20, "zstd": 20, "lzma": 90, "brotli": 20, "ans": 20}


def compress_zeros(name: str, num_mib: int) -> bytes:
    """So many MiB of zeros in the compressor's format, made without holding them."""
    if name == "brotli":
        made: Any = brotli.Compressor(quality=1)
        return b"".join([*(made.process(bytes(MIB)) for _ in range(num_mib)), made.finish()])
    made = {
        "zlib": lambda: zlib.compressobj(9),
        "lzma": lambda: lzma.LZMACompressor(preset=0),
        "zstd": lambda: zstandard.ZstdCompressor(level=1).compressobj(),
    }[name]()
    return b"".join([*(made.compress(bytes(MIB)) for _ in range(num_mib)), made.flush()])


@pytest.fixture
def peak_mib() -> Iterator[Callable[[], float]]:
    """Most memory that Python objects took since the test began, in MiB."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


def test_a_header_that_unpacks_to_very_much_is_refused_in_little_memory(
    artifacts: dict[str, bytes], read: Callable[..., GPT], peak_mib: Callable[[], float]
):
    bomb = Parts(artifacts["zlib"]).seal(head=compress_zeros("zlib", 64))
    tracemalloc.reset_peak()
    refusal_of(read, bomb)
    assert peak_mib() < 20  # the header's own limit is 4 MiB, held once as bytes and once as text


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_stream_that_unpacks_to_more_than_declared_is_refused(
    compressor: str, artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts[compressor])
    parts.replace_stream("codes/attn", compress_zeros(compressor, 2))
    refusal_of(read, parts.seal())


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_stream_that_unpacks_to_very_much_takes_little_memory(
    compressor: str, artifacts: dict[str, bytes], read: Callable[..., GPT],
    peak_mib: Callable[[], float],
):  # fmt: skip
    parts = Parts(artifacts[compressor])
    parts.replace_stream("codes/attn", compress_zeros(compressor, 64))
    payload = parts.seal()
    tracemalloc.reset_peak()
    with contextlib.suppress(InputError):
        read(payload)
    assert peak_mib() < ALLOWED_MIB[compressor]


@pytest.mark.parametrize(
    "compressor",
    [
        "zlib",
        "lzma",
        "brotli",
        "zstd",
    ],
)
def test_a_huge_shape_over_short_streams_is_refused_in_little_memory(
    compressor: str, artifacts: dict[str, bytes], read: Callable[..., GPT],
    peak_mib: Callable[[], float],
):  # fmt: skip
    huge = dict(model_dim=2048, mlp_mult=8.0, num_heads=16, num_kv_heads=16)  # just allowed
    parts = Parts(artifacts[compressor])
    parts.header["model"] |= huge
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(train_gpt, "MAX_MODEL_WEIGHTS", 2**40)  # an artifact may name any shape
        cfg = tiny_config(**{**SHAPE, **huge})
        model = GPT(
            cfg, choose_attention_backend(cfg, torch.device("cpu"), torch.float32), torch.float32
        )
    sizes = {name: p.shape for name, p in model.named_parameters()}
    for entry in parts.header["tensors"]:
        entry[2] = sizes[entry[0]][0] if entry[2] else 0
    coded = {name for name, _, num_scales, _ in parts.header["tensors"] if num_scales}
    assert sum(sizes[name].numel() for name in coded) > 0.9 * train_gpt.MAX_WEIGHTS
    payload = parts.seal()
    tracemalloc.reset_peak()
    refusal_of(read, payload)
    assert peak_mib() < ALLOWED_MIB[compressor]


@pytest.mark.parametrize(
    ("shape", "num_scales", "fits"),
    [
        ((6, 4), 6, True), ((6, 4), 1, False), ((6, 4), 2, False), ((6, 4), 24, False),
        ((12,), 1, True), ((12,), 12, False), ((0, 4), 0, False),
    ],
)  # fmt: skip
def test_codes_have_one_scale_for_each_row_as_they_are_written(
    shape: tuple[int, ...], num_scales: int, fits: bool
):
    # A matrix of one scale would be decoded as one row, which takes a hundred bytes for a weight.
    for coder in ("ans", "zlib"):
        assert train_gpt.is_storage_spec([8, num_scales, 0], shape, coder) == fits


@pytest.mark.parametrize("compressor", ["brotli", "ans"])
def test_tensors_that_are_too_large_together_are_refused(
    compressor: str, artifacts: dict[str, bytes], read: Callable[..., GPT],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    # The bound is some hundred million; here one that every tensor meets and all of them do not.
    weights = sum(p.numel() for p in random_model(tiny_config(**SHAPE)).parameters())
    monkeypatch.setattr(train_gpt, "MAX_WEIGHTS", weights)
    read(artifacts[compressor])
    monkeypatch.setattr(train_gpt, "MAX_WEIGHTS", weights - 1)
    assert refusal_of(read, artifacts[compressor]).startswith(f"{weights} weights")


def test_a_stream_that_asks_for_a_huge_window_is_refused(
    artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["lzma"])
    properties = b"\x5d" + struct.pack("<IQ", 2**30, 2**64 - 1)  # a dictionary of 1 GiB
    parts.replace_stream("codes/attn", properties + bytes(64))
    assert "emory" in refusal_of(read, parts.seal())


def test_a_zstd_frame_that_asks_for_a_huge_window_is_refused(
    artifacts: dict[str, bytes], read: Callable[..., GPT]
):
    parts = Parts(artifacts["zstd"])
    window_log = 30
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3)
    parts.replace_stream("codes/attn", frame + bytes(64))
    assert "emory" in refusal_of(read, parts.seal())


# --- Sizes ---------------------------------------------------------------------------------------


def write_files(run: Run, code_bytes: int, artifact: bytes) -> Path:
    """A packed script of this length and an artifact in the run's folder."""
    (run.directory / "train_gpt.py").write_bytes(bytes(code_bytes))
    (run.directory / "artifact.bin").write_bytes(artifact)
    return run.directory / "artifact.bin"


def test_the_counted_size_is_that_of_both_files_on_disk(
    make_run: MakeRun, artifacts: dict[str, bytes]
):
    artifact_bytes = len(artifacts["zlib"])
    run = make_run(artifact_budget_bytes=artifact_bytes + 300)
    sizes = check_sizes(run, write_files(run, 300, artifacts["zlib"]))
    assert sizes == {
        "artifact_bytes": artifact_bytes, "code_bytes": 300,
        "total_bytes": artifact_bytes + 300, "budget_bytes": artifact_bytes + 300,
    }  # fmt: skip


def test_a_byte_over_the_budget_fails_the_run(make_run: MakeRun, artifacts: dict[str, bytes]):
    budget = len(artifacts["zlib"]) + 300
    run = make_run(artifact_budget_bytes=budget)
    artifact = write_files(run, 301, artifacts["zlib"])
    with pytest.raises(RunFailed) as failure:
        check_sizes(run, artifact)
    assert str(failure.value) == (
        f"code and artifact take {budget + 1} bytes of ARTIFACT_BUDGET_BYTES={budget}; remove "
        f"{artifact} and start again with lower *_BITS, or change the shape"
    )


@pytest.mark.parametrize("compressor", ALL_COMPRESSORS)
def test_the_byte_ledger_adds_up_to_the_file(compressor: str, artifacts: dict[str, bytes]):
    payload = artifacts[compressor]
    ledger, parts = artifact_sizes(payload), Parts(payload)
    assert sum(ledger.values()) == len(payload)
    assert ledger["frame_bytes"] == PREFIX.size + len(parts.head) + 32
    streams = parts.streams()
    for key, stream in streams.items():
        kind, group = key.split("/")
        assert ledger[f"{group}_{kind}_bytes"] == len(stream)
    assert {key.split("/")[1] for key in streams} == {"attn", "mlp", "embed", "control"}


# --- The packed script ---------------------------------------------------------------------------

SOURCE = Path(train_gpt.__file__).read_text(encoding="utf-8")


def unpack(packed: bytes) -> str:
    """The source inside a packed script, by running all of it but its last line."""
    *setting, last, end = packed.rsplit(b"\n", 2)
    assert last.startswith(b"exec(") and end == b""
    namespace: dict[str, Any] = {}
    exec(b"\n".join(setting), namespace)
    return str(namespace["PACKED_SOURCE"])


class Plain(ast.NodeTransformer):
    """Removes docstrings, annotations of and in functions that no decorator can read, and the
    documentation and unit of knobs."""

    in_function = False

    def remove_annotations(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        node.returns = None
        for child in ast.walk(node.args):
            if isinstance(child, ast.arg):
                child.annotation = None

    def remove_docstring(self, node: Any) -> None:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                del node.body[0]
        if not node.body and not isinstance(node, ast.Module):
            node.body.append(ast.Pass())

    def visit(self, node: ast.AST) -> ast.AST:
        outer, is_function = self.in_function, isinstance(node, FUNCTIONS)
        if isinstance(node, ast.AnnAssign) and outer and node.value:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "knob":
            del node.args[1:]
            node.keywords = [pair for pair in node.keywords if pair.arg != "unit"]
        if isinstance(node, FUNCTIONS) and not node.decorator_list:
            self.remove_annotations(node)
        self.in_function = is_function or (outer and not isinstance(node, ast.ClassDef))
        self.generic_visit(node)
        self.in_function = outer
        if is_function or isinstance(node, ast.Module | ast.ClassDef):
            self.remove_docstring(node)
        return node


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

ODD_SOURCES = {
    "empty": "",
    "docstrings everywhere": (
        '"""m"""\nfrom __future__ import annotations\n\n\ndef f():\n    """f"""\n\n\n'
        'async def g():\n    "g"\n\n\nclass C:\n    """c"""\n\n    def h(self):\n'
        '        """h"""  # a comment\n        return "not a docstring"\n\n    x: int = 1\n'
    ),
    "strings": (
        "a = 'it\\'s \"{x}\" \\\\n \\x00 é 日本 😀'\n"
        "x = 3\nb = f'{x!r:>{x}} {{}} {\"q\"}'\nc = b'\\xff\\x00'\nd = r'\\d'\n"
    ),
    "a string that is not first": "def f():\n    x = 1\n    'no docstring'\n    return x\n",
    "multi-line strings": (
        "def f(x):\n    if x:\n        return (  # a comment\n"
        "            '''a\n  # b  \n\n  c = 1\n'''\n"
        '            f"""  {x  +  1}\n      {x!r}  # no comment\n"""\n        )\n    return x\n'
    ),
    "spaces that matter": (
        "a = 1 if 2 else .5\nb = not - - a\nc = 1 .real\n"
        "d = 'x' 'y' if a in (b'z', 'w') else f'{a}' 'v'\n"
        "e = lambda *x, **y: - a ** - b\nf = a \\\n    or b\ng = [i for i in 'ab' if i < 'b']\n"
        "h = 1. if a else 2\ni = {'k': -1, **{}}; j = a if 'b'else 'c'\nk = 0x1f or 1\n"
        "l = a[1 :: 2] if [a] else ...\n"
    ),
    "statements on one line": (
        "class A: y = 0; x = 1\nclass B: pass\ndef f(): return\n"
        "def h():\n    'two' 'parts'\n@staticmethod\ndef i(): return 1\nif 1: x = 2; y = 3\n"
        "else: pass\n"
    ),
    "tabs, form feeds and deep blocks": (
        "\x0cif 1:\n\tif 2:\n\t\tx = '\t\x0c'\n\telse:\n\t\tx = 2\n# end\n\n"
        "match x:\n  case 1:\n        y = 1\n  case _:\n        y = 2\n"
    ),
    "annotations": (
        "def f(a: int, /, b: dict[str, int] = {}, *c: 'é', d: int = 1, **e: int) -> list[\n"
        "    int\n]:\n    x: int = (\n        1\n    )\n    y: int\n    e.z: int = 2\n"
        "    g: Callable[[int], int] = lambda i, j=1: i\n    class C:\n        k: int = 0\n"
        "        def h(self, n: int) -> int:\n            m: int = n\n            return m\n"
        "    return x\n\n@read\ndef i(a: int) -> int:\n    n: int = a\n    return n\n"
        "l: int = 3\n"
    ),
    "knobs": (
        'class C:\n    a: int = knob(1, "doc", unit="s", low=0)\n    b: int = knob(2, "d" "oc")\n'
        '    c: str = knob(\n        "x",  # why\n        "doc (a, b)",\n        choices=("x",),\n'
        '    )\n    d: int = knob(3)\n    e: int = knob(4, low=1)\n    f: str = knob("é", "doc")\n'
        "x = other(1, 'doc', unit='s')\n"
    ),
    "the script": SOURCE,
}


def test_a_docstring_that_shares_its_line_stays():
    source = "class A:'doc';x=1\ndef f():'doc'\ndef g():\n 'doc';return 1\n"
    assert unpack(pack_source(source)) == source.replace("\n ", "")


def test_statements_share_a_line_only_where_python_allows_it():
    source = """
a=1
match=2
match.real
if a:
 b=2
 c=3
else:d=4
@x
def f():
 for i in a:
  b=i
  c=b
 return b
class C:
 x=1
 def g(self):return 2
 y=x;z=y
if b:
 if c:
  d=1
if b:
 if c:d=1
e=2;
f=3;
"""
    short = """a=1
match=2
match.real
if a:b=2;c=3
else:d=4
@x
def f():
 for i in a:b=i;c=b
 return b
class C:
 x=1
 def g(self):return 2
 y=x;z=y
if b:
 if c:d=1
if b:
 if c:d=1
e=2;f=3
"""
    assert minify(source) == minify(short) == short
    assert ast.dump(ast.parse(short)) == ast.dump(ast.parse(source))


COMMAS = """
f(a,b,);f(a,);f(*a,);x[1,];x[1,2,];[1,];[1,2,];{1:2,3:4,};{1,2,}
a=(1,);b=(1,2,);c=(1,(2,),);d=(lambda x,y:x,);e=f(lambda x,y:x,z,);g=(1,[2,3,],)
def h(a,*,b,):pass
def i(a,/,):pass
class A(B,C,):pass
from os import (path,sep,)
j=f"{(1,)}{(1,2,)}"
k=(
 1,  # a comment
 2,  # another

)
"""


def test_the_comma_after_the_last_of_several_items_goes():
    short = minify(COMMAS)
    assert ast.dump(ast.parse(short)) == ast.dump(ast.parse(COMMAS))
    for kept in (
        "f(a,)",
        "f(*a,)",
        "x[1,]",
        "[1,]",
        "(1,)",
        "(2,))",
        "x,y:x,)",
        "f(lambda x,y:x,z,)",
    ):
        assert kept in short
    for shortened in (
        "f(a,b)",
        "x[1,2]",
        "[1,2]",
        "3:4}",
        "{1,2}",
        "(1,2)",
        "[2,3])",
        "C)",
        "sep)",
        "k=(1,2)",
    ):
        assert shortened in short
    assert minify(short) == short


def test_an_annotation_in_parentheses_stays():
    source = "def f(a:(int),b)->(int):return a\n"
    assert unpack(pack_source(source)) == source


packed = functools.cache(pack_source)  # packing the script takes seconds
minified = functools.cache(minify)


@pytest.mark.parametrize("name", ODD_SOURCES)
def test_the_minified_source_is_the_source_without_comments_docstrings_and_annotations(name: str):
    source = ODD_SOURCES[name]
    short = minified(source)
    expected = Plain().visit(ast.parse(source))
    assert ast.dump(ast.parse(short)) == ast.dump(expected)
    tokens = tokenize.generate_tokens(io.StringIO(short).readline)
    assert [token.string for token in tokens if token.type == tokenize.COMMENT] == []


def renamed_variables(old: types.CodeType, new: types.CodeType) -> list[dict[str, str]]:
    """Old and new names of the variables of each function, if all else in the code is the same."""
    # Instructions that depend on the alphabetical order of names, or on the length of others.
    skipped = ("EXTENDED_ARG", "MAKE_CELL", "COPY_FREE_VARS", "LOAD_CLOSURE")
    instructions = [
        [step for step in dis.get_instructions(code) if step.opname not in skipped]
        for code in (old, new)
    ]
    names, inner = dict[str, str](), list[dict[str, str]]()
    assert len(instructions[0]) == len(instructions[1]) and old.co_name == new.co_name
    for before, after in zip(*instructions, strict=True):
        assert before.opname == after.opname
        if isinstance(before.argval, types.CodeType):
            inner += renamed_variables(before.argval, after.argval)
        elif before.opcode in {*dis.haslocal, *dis.hasfree}:
            assert names.setdefault(before.argval, after.argval) == after.argval
        elif before.opcode not in dis.hasjrel:
            assert before.argval == after.argval
    assert len({*names.values()}) == len(names), names
    assert old.co_argcount == new.co_argcount and old.co_kwonlyargcount == new.co_kwonlyargcount
    return [names, *inner]


LOCALS = """
import os as first
second = total = 1
def f(a, *b, key=2, **c):
    long, (other, *rest), total2 = a, b, 0
    def inner(x=key):
        nonlocal long
        global third
        long = third = x + other
        return [long + each for each in rest if (kept := each)], lambda a: a + total2
    for index, first in enumerate(rest): total2 += index
    try: second
    except ValueError as error: shown = f"{error}{rest!r}"
    with open(key) as file: match = file
    max = 3
    class Inner: field = total2
    return inner(key=other), shown, kept2 if (kept2 := index) else match, max
class C:
    attribute = 3
    def g(self): attribute = self.attribute; attribute += 1; return attribute
def h(value): result = value; return locals()
def i(positional, named): return lambda inner_argument: positional + named + inner_argument
i(1, named=2)(3)
@wraps
def j(decorated): return decorated
def k(mentioned): return f"{mentioned}"
"""


@pytest.mark.parametrize("name", ["all kinds", "the script"])
def test_short_names_of_local_variables_change_nothing_else(name: str):
    source = LOCALS if name == "all kinds" else minified(SOURCE)
    shortened = shorten_locals(source)
    pairs = renamed_variables(compile(source, "x", "exec"), compile(shortened, "x", "exec"))
    changed = {old for names in pairs for old, new in names.items() if old != new}
    assert changed and len(shortened) < len(source)
    assert shorten_locals(shortened) == shortened
    if source == LOCALS:
        local = "other index match kept kept2 each file shown"
        assert changed == {*f"{local} positional inner_argument".split()}


GLOBALS = """
LIMIT, NAMED, field = 3, 4, 5
SHARED: int = 6
for number in range(LIMIT): pass
class C:
    field = SHARED
    def g(self, number): return LIMIT + self.field
def f(): SHOWN = globals()["NAMED"]; return f"{SHARED}"
SHOWN = [LIMIT, NAMED]
@wraps
def scale(g): return scale(g) + g.scale
def public(): return f() + public()
def mentioned(): return f"{mentioned()}"
class Shape(Base):
    kind: Shape | None = None
    def g(self): return Shape(Kept).Shape
class Kept(Exception): pass
class Method:
    def Method(self): return Method
__all__ = ["public", "Kept"]
"""


def test_short_names_of_global_variables_change_nothing_else():
    shortened = shorten_globals(GLOBALS)
    expected = GLOBALS.replace("LIMIT", "aa").replace("scale(", "ab(")
    for word, short in [("class Shape", "class ac"), (": Shape", ": ac"), ("Shape(K", "ac(K")]:
        expected = expected.replace(word, short)
    assert shortened == expected
    assert shorten_globals(shortened) == shortened
    source = minified(SOURCE)
    old, new = (list(source_tokens(x)) for x in (source, shorten_globals(source)))
    pairs = {(x[1], y[1]) for x, y in zip(old, new, strict=True) if x[1] != y[1]}
    changed, names = {x for x, _ in pairs}, {y for _, y in pairs}
    not_attributes = {y[1] for x, y in itertools.pairwise(old) if x[1] != "."}
    assert len(pairs) == len(changed) == len(names) and names.isdisjoint(not_attributes)
    assert {"MAX_WEIGHTS", "PACKED_STUB", "shorten_globals"} <= changed
    assert changed.isdisjoint(train_gpt.__all__)


SHAPED = """
class C(NamedTuple):
    x_BTD: int
    keep_BT: int
    @property
    def w_VD(self): return self.w_VD
    def g(self, y_BT=1): return self.x_BTD.abs().z_2TE[y_BT].T + (self
        .x_BTD)
    def own_name(self): self.own_name(self.own_value, 1).also_named()
    def also_named(self, also_named=1): self._hidden_name(), self.plain()
    def _hidden_name(self): self.said_name("said_name")
    def said_name(self): pass
    def plain(self): pass
    def to_device(self): pass
C(x_BTD=1, keep_BT=2).g(y_BT=3)
class Plain:
    def g(self):
        self.own_field, self.named_field, x.set_elsewhere = 1, 2, self.set_elsewhere
        self.set_elsewhere = self.in_module = self.own_field
class Pair(NamedTuple):
    first_part: int
    second_part: int
    is_byte: int = 0
Pair(second_part=1).first_part
class Module(nn.Module):
    def own_step(self):
        self.in_module = self.own_step
class Derived(Plain):
    def g(self):
        self.more_fields = 1
import numpy as np_N; np_N.w_VD
"named_BT\\nx_AB", getattr(x, "named_BT"), x.named_BT
getattr(x, "named_field")
f"{c.keep_BT} {shown_N:>{width_N}}", c.keep_BT, width_N, c.LIMIT_BT, c.cu_seqlens, aa
"""


def test_short_names_of_own_attributes_and_shaped_ones_change_nothing_else():
    shortened = train_gpt.shorten_own_names(SHAPED)
    names = {"x_BTD": "ab", "w_VD": "ac", "y_BT": "ad", "z_2TE": "ae", "own_name": "af"}
    names |= {"own_field": "ag", "first_part": "ah", "own_step": "ai", "more_fields": "aj"}
    expected = SHAPED
    for name, short in names.items():
        expected = expected.replace(name, short)
    assert shortened == expected
    assert train_gpt.shorten_own_names(shortened) == shortened


def test_attributes_that_tools_read_from_a_packed_script_keep_their_names():
    trees = [
        ast.parse(path.read_text())
        for path in (Path(train_gpt.__file__).parent / "records").glob("*.py")
    ]
    read = {
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }
    read |= {
        x.arg for tree in trees for x in ast.walk(tree) if isinstance(x, ast.keyword) and x.arg
    }
    attributes = attributes_of_the_script()
    own = {name for name in read if name in attributes or train_gpt.SHAPED_NAME.fullmatch(name)}
    assert own == train_gpt.READ_BY_TOOLS
    assert train_gpt.shorten_own_names("x.nll_T, x.nll_BT") == "x.nll_T, x.aa"


def attributes_of_the_script() -> set[str]:
    source = train_gpt.PACKING_CODE.sub("", train_gpt.script_source())
    return train_gpt.own_attributes(ast.walk(ast.parse(train_gpt.shorten_locals(source))))


def test_no_public_attribute_of_a_library_has_the_name_of_an_own_one():
    own, found = attributes_of_the_script(), set[str]()
    libraries = {"torch", "numpy", "sentencepiece", "constriction", "safetensors"}
    libraries |= {name for name in sys.stdlib_module_names if name != "__main__"}
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] in libraries and "._" not in f".{name}":
            values = [x for x in vars(module).values() if issubclass(type(x), type)]
            found |= own & {*vars(module), *itertools.chain(*map(vars, values))}
    assert found == train_gpt.ALSO_IN_LIBRARIES and len(own) > 100


@pytest.mark.parametrize(
    "name",
    [n if n != "the script" else pytest.param(n, marks=pytest.mark.slow) for n in ODD_SOURCES],
)
def test_packing_what_was_unpacked_gives_the_same_bytes(name: str):
    assert pack_source(unpack(packed(ODD_SOURCES[name]))) == packed(ODD_SOURCES[name])


def test_comments_cost_nothing_in_the_packed_script():
    source = ODD_SOURCES["docstrings everywhere"]
    commented = source.replace("\ndef ", "\n# A comment of some length.\ndef ")
    assert commented != source and pack_source(commented) == packed(source)
    assert len(packed(SOURCE)) < len(SOURCE) / 3


def test_a_source_of_a_docstring_alone_packs_to_one_that_does_nothing():
    namespace: dict[str, Any] = {}
    exec(pack_source('"""only this"""\n'), namespace)
    assert namespace["PACKED_SOURCE"] in ("", "pass")


@pytest.mark.parametrize("seed", range(5))
def test_the_payload_survives_every_byte(seed: int):
    rng = np.random.default_rng(seed)
    text = "".join(map(chr, rng.integers(32, 127, 3000)))  # compresses to nearly random bytes
    source = f"x = {text!r}\n"
    packed = pack_source(source)
    assert {0, 13} & set(packed) == set()
    assert ast.literal_eval(ast.parse(unpack(packed)).body[0].value) == text  # type: ignore[attr-defined]
    assert compile(packed, "packed.py", "exec")


@pytest.mark.parametrize("end", ["", '"', '""', '"""', "\\", '\\"', "\n", "\0", "\r"])
@pytest.mark.parametrize("start", ["", '"', '"""""""', "\n\n", "\0001", "\r\n", '\\"""'])
def test_any_payload_is_one_string(start: str, end: str, monkeypatch: pytest.MonkeyPatch):
    raw = f"{start}x{end}".encode()
    monkeypatch.setattr(bz2, "compress", lambda *_: raw)
    packed = pack_source.__wrapped__("pass")
    tree = ast.parse(packed)
    texts = [x.value for x in ast.walk(tree) if isinstance(x, ast.Constant)]
    assert raw.decode() in texts and {0, 13} & set(packed) == set()


def test_a_packed_script_leaves_out_what_packs():
    for call in ("tokenize.generate_tokens(", "ast.get_docstring(", "np.memmap("):
        assert call in SOURCE and call not in unpack(packed(SOURCE))
    source = "a=1\n# packing\nb=2\n# end of packing\nc=3\n"
    assert unpack(pack_source(source)) == "a=1;c=3\n"
    assert unpack(pack_source("a=1\n# packing\nb=2\n")) == "a=1;b=2\n"


@pytest.fixture(scope="module")
def packed_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The packed script as a module."""
    module = types.ModuleType("packed_train_gpt")
    file = tmp_path_factory.mktemp("packed") / "packed.py"
    file.write_bytes(packed(SOURCE))
    module.__file__ = str(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(packed(SOURCE), "packed.py", "exec"), module.__dict__)
        yield module


def test_the_packed_script_runs_as_the_source_does(packed_module: types.ModuleType):
    env = {"MODE": "describe", "NUM_LAYERS": "12", "XSA_LAST_N": "1"}
    described = packed_module.describe(packed_module.config_from_env(env))
    assert described == train_gpt.describe(train_gpt.config_from_env(env))
    functions = [f for f in map(inspect.unwrap, vars(packed_module).values())
                 if inspect.isfunction(f)]  # fmt: skip
    own_source, own_file = (f for f in functions if "PACKED_SOURCE" in f.__code__.co_consts)
    assert own_source() == unpack(packed(SOURCE)) and own_file() == packed(SOURCE)


def test_tracebacks_and_inspect_find_the_lines_of_the_packed_script(
    packed_module: types.ModuleType,
):
    source = inspect.getsource(packed_module.require)
    assert source.startswith("def require(a,b):\n")
    with pytest.raises(packed_module.InputError) as refusal:
        packed_module.config_from_env({"SEED": "x"})
    assert "raise InputError(" in str(refusal.traceback[-1].statement)
