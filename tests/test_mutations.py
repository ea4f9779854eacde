"""Artifacts that strangers made: every mutation is refused, or a model of the right shapes.

Every kind of damage is done to a small model that uses all parts of the format: the entropy coder,
the trellis, factors for columns, gates in 8 bits. Most are
sealed with a right checksum, so that what lies behind it is reached.
"""

from __future__ import annotations

import hashlib
import json
import re
import resource
import struct
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import MakeRun, random_model, tiny_config
from train_gpt import (
    GPT,
    InputError,
    KroneckerHessian,
    Run,
    encode_artifact,
    group_matrices,
    model_layout,
    quantize_model,
    read_artifact,
)

PREFIX = struct.Struct("<8sHI")  # magic, version, bytes of the compressed header
SHA = hashlib.sha256(b"the tokenizer").hexdigest()
SHAPE: dict[str, Any] = {
    "vocab_size": 24, "num_layers": 2, "model_dim": 8, "num_heads": 2, "num_kv_heads": 1,
    "attn_gate": "head", "quantizer": "gptq", "quant_grid": "trellis", "row_steps": "solved",
    "gate_bits": 8, "compressor": "ans",
}  # fmt: skip
LIMIT_S = 20.0  # a whole one is read in a small fraction of a second; the machine may be busy
LIMIT_MIB = 64
ROTARY_MIB = 160  # a context of 2^20 positions is allowed: two tables and what making one takes


def unit_curvature(model: torch.nn.Module) -> dict[str, KroneckerHessian]:
    """A curvature for every matrix, of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            x_NI = torch.randn(4 * weight.shape[1], weight.shape[1], generator=generator)
            outputs_O = torch.rand(weight.shape[0], generator=generator) + 0.5
            found[name] = KroneckerHessian(x_NI.T @ x_NI / len(x_NI), outputs_O)
    return found


class Whole(NamedTuple):
    """A sound artifact, taken apart."""

    payload: bytes
    head: bytes
    body: bytes
    shapes: dict[str, torch.Size]

    @property
    def header(self) -> dict[str, Any]:
        """A fresh copy of the header."""
        return json.loads(zlib.decompress(self.head))


@pytest.fixture(scope="module")
def whole() -> Whole:
    cfg = tiny_config(**SHAPE)
    model = random_model(cfg)
    stacks = group_matrices(cfg, model, unit_curvature(model))
    spread = float(torch.cat([stack.column_std_LI.flatten() for stack in stacks]).median())
    payload = encode_artifact(cfg, quantize_model(cfg, model, stacks, spread / 3), SHA)
    head_bytes = PREFIX.unpack_from(payload)[2]
    head, body = payload[PREFIX.size :][:head_bytes], payload[PREFIX.size + head_bytes : -32]
    return Whole(payload, head, body, {n: p.shape for n, p in model.named_parameters()})


def sealed(head: bytes, body: bytes, version: int = 2) -> bytes:
    """The file of these parts with a right checksum."""
    start = PREFIX.pack(b"PGOLFART", version, len(head)) + head + body
    return start + hashlib.sha256(start).digest()


def with_header(header: Any, body: bytes) -> bytes:
    return sealed(zlib.compress(json.dumps(header).encode()), body)


ODD: list[Any] = [
    0, 1, -1, 2, 3, 15, 16, 17, 64, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**63, 2**64,
    10**30, -(2**31), -(2**63), 0.5, 1e300, float("nan"), float("inf"), None, True, False, "", "16",
    "codes/mlp", [], [1], {}, {"a": 1}, "\0", "é" * 1000,
]  # fmt: skip


def places_of(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    inner = [pair for k in keys if isinstance(node[k], dict | list) for pair in places_of(node[k])]
    return [(node, k) for k in keys] + inner


def changed_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with bits flipped, bytes overwritten, cut, repeated, or spliced with itself."""
    kind, edited = int(rng.integers(6)), bytearray(data)
    a, b = sorted(int(n) for n in rng.integers(0, len(data) + 1, 2))
    if kind == 0:  # bits, more often near the start
        for _ in range(int(rng.integers(1, 4))):
            end = len(edited) if rng.random() < 0.6 else min(40, len(edited))
            edited[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # a stretch of noise, zeros or ones
        value = [rng.bytes(b - a), bytes(b - a), b"\xff" * (b - a)][int(rng.integers(3))]
        edited[a:b] = value
    elif kind == 2:  # a piece is missing
        del edited[a:b]
    elif kind == 3:  # a piece comes twice
        edited[b:b] = edited[a:b]
    elif kind == 4:  # a piece lies over another
        edited[: b - a] = edited[a:b]
    else:  # the end is missing
        del edited[a:]
    return bytes(edited)


def raw_file(whole: Whole, rng: np.random.Generator) -> bytes:
    """Damage that the checksum finds."""
    return changed_bytes(whole.payload, rng)


def resealed_file(whole: Whole, rng: np.random.Generator) -> bytes:
    """Damage anywhere before the checksum, which is made right."""
    start = changed_bytes(whole.payload[:-32], rng)
    return start + hashlib.sha256(start).digest()


def resealed_body(whole: Whole, rng: np.random.Generator) -> bytes:
    """Damage in the streams; often of equal length, so that the coders are reached."""
    body = changed_bytes(whole.body, rng)
    if rng.random() < 0.7:
        body = (body + whole.body)[: len(whole.body)]
    return sealed(whole.head, body)


def resealed_stream(whole: Whole, rng: np.random.Generator) -> bytes:
    """Damage in one stream, of which the header says the length; or two streams swapped."""
    header, pieces, position = whole.header, [], 0
    for _, size in header["streams"]:
        pieces.append(whole.body[position : position + size])
        position += size
    a, b = (int(n) for n in rng.integers(0, len(pieces), 2))
    if rng.random() < 0.2:
        pieces[a], pieces[b] = pieces[b], pieces[a]
    else:
        pieces[a] = changed_bytes(pieces[a], rng)
    for entry, piece in zip(header["streams"], pieces, strict=True):
        entry[1] = len(piece)
    return with_header(header, b"".join(pieces))


def edited_header(whole: Whole, rng: np.random.Generator) -> bytes:
    """Odd values, huge counts, missing, doubled and swapped entries of the header."""
    header = whole.header
    for _ in range(int(rng.integers(1, 3))):
        places = places_of(header)
        container, key = places[int(rng.integers(len(places)))]
        kind = rng.random()
        if kind < 0.7:
            container[key] = ODD[int(rng.integers(len(ODD)))]
        elif kind < 0.8:
            del container[key]
        elif isinstance(container, list):
            container.insert(int(rng.integers(len(container) + 1)), container[key])
        elif type(container[key]) is int:
            container[key] += int(rng.integers(-3, 4))
    return with_header(header, whole.body)


EXTREME: list[Any] = [
    0, 1, 16, 255, 256, 1024, 16_384, 65_536, 2**20, 2**31, 10**12, 0.125, 64.0, 1e308,
    "0-99999999999", "0-4095", "1,2,3", "",
]  # fmt: skip


def edited_shape(whole: Whole, rng: np.random.Generator) -> bytes:
    """Values at the bounds of the model's knobs and beyond them."""
    header = whole.header
    for name in rng.choice([*header["model"]], int(rng.integers(1, 4)), replace=False):
        same_type = [v for v in EXTREME if type(v) is type(header["model"][name])]
        values = same_type if same_type and rng.random() < 0.8 else EXTREME
        header["model"][str(name)] = values[int(rng.integers(len(values)))]
    return with_header(header, whole.body)


def edited_text(whole: Whole, rng: np.random.Generator) -> bytes:
    """Damage in the text of the header before it is compressed."""
    return sealed(zlib.compress(changed_bytes(zlib.decompress(whole.head), rng)), whole.body)


def other_version(whole: Whole, rng: np.random.Generator) -> bytes:
    return sealed(whole.head, whole.body, int(rng.choice([0, 1, 3, *rng.integers(3, 2**16, 5)])))


MUTATIONS = {
    raw_file: 0.15, resealed_file: 0.15, resealed_body: 0.2, resealed_stream: 0.2,
    edited_header: 0.12, edited_shape: 0.08, edited_text: 0.07, other_version: 0.03,
}  # fmt: skip


def outcome(path: Path, run: Run, whole: Whole, payload: bytes) -> str:
    """What reading these bytes leads to; an error of the test if it is none of the allowed."""
    path.write_bytes(payload)
    try:
        model = read_artifact(path, run, SHA)
    except InputError as error:
        assert str(error).startswith(f"cannot use the artifact {path}: ")
        return "refused"
    assert isinstance(model, GPT)
    found = {name: p.shape for name, p in model.named_parameters()}
    assert model.cfg.num_layers != 2 or model.cfg.model_dim != 8 or found == whole.shapes
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return "a model"


def check_mutations(count: int, seed: int, whole: Whole, make_run: MakeRun, path: Path) -> Counter:
    """`count` mutations by their outcome; none may raise, hang or take much memory."""
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    kinds, shares = list(MUTATIONS), list(MUTATIONS.values())
    cfg, run = make_run().cfg, make_run()
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for number in range(count):
        kind = kinds[int(rng.choice(len(kinds), p=shares))]
        payload = kind(whole, rng)
        while payload == whole.payload:  # a piece swapped with itself
            payload = kind(whole, rng)
        run.cfg, started_s = cfg, time.monotonic()  # reading an artifact gives a run its shape
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # arithmetic that overflows is no way to read a file
            try:
                found = outcome(path, run, whole, payload)
            except BaseException as error:  # a panic of the coder is no Exception
                kept = path.with_name(f"mutation_{seed}_{number}.bin")
                kept.write_bytes(payload)
                pytest.fail(f"{kind.__name__} {number} ({kept}): {type(error).__name__}: {error}")
        assert time.monotonic() - started_s < LIMIT_S, (kind.__name__, number)
        outcomes[f"{kind.__name__}: {found}"] += 1
    grown_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mib
    assert (
        grown_mib < LIMIT_MIB + ROTARY_MIB + count / 20
    )  # leaves of the interpreter's own are allowed
    return outcomes


def test_the_artifact_that_is_mutated_is_sound_and_uses_every_part(
    whole: Whole, make_run: MakeRun, tmp_path: Path
):
    assert outcome(tmp_path / "a.bin", make_run(), whole, whole.payload) == "a model"
    assert (
        outcome(tmp_path / "a.bin", make_run(), whole, sealed(whole.head, whole.body)) == "a model"
    )
    flags = {entry[3] for entry in whole.header["tensors"]}
    assert any(f & 1 for f in flags) and any(f & 2 for f in flags) and any(f & 8 for f in flags)
    kinds = {kind.partition("/")[0] for kind, _ in whole.header["streams"]}
    assert kinds == {"codes", "half", "steps"}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_mutated_artifacts_are_refused_or_models(
    seed: int, whole: Whole, make_run: MakeRun, tmp_path: Path
):
    outcomes = check_mutations(125, seed, whole, make_run, tmp_path / "a.bin")
    assert outcomes["raw_file: a model"] == outcomes["other_version: a model"] == 0
    assert outcomes["resealed_body: refused"] > 0 and outcomes["edited_header: refused"] > 5


@pytest.mark.slow
def test_ten_thousand_mutated_artifacts_are_refused_or_models(
    whole: Whole, make_run: MakeRun, tmp_path: Path
):
    outcomes = check_mutations(10_000, 99, whole, make_run, tmp_path / "a.bin")
    print(outcomes)
    assert outcomes.total() == 10_000
    assert outcomes["raw_file: a model"] == outcomes["other_version: a model"] == 0
    assert {key.partition(":")[0] for key in outcomes} == {kind.__name__ for kind in MUTATIONS}


def huge_header(whole: Whole, width: int, layers: int) -> bytes:
    """A header that says a huge model whose every tensor it lists, over the same streams."""
    shape = {**SHAPE, "model_dim": width, "num_layers": layers}
    header = whole.header
    header["model"] |= {k: v for k, v in shape.items() if k in header["model"]}
    like = {entry[0]: entry for entry in header["tensors"]}
    header["tensors"] = []
    for name, sizes in sorted(model_layout(tiny_config(**shape))[0].items()):
        _, bits, num_scales, flags = like[re.sub(r"blocks\.\d+\.", "blocks.1.", name)]
        rows = sizes[0] if len(sizes) == 2 else 1
        header["tensors"].append([name, bits, rows if num_scales else 0, flags])
    return with_header(header, whole.body)


@pytest.mark.parametrize(
    ("width", "layers"), [pytest.param(512, 128, marks=pytest.mark.slow), (4096, 2)]
)
def test_a_huge_model_over_few_bytes_is_refused_in_little_time_and_memory(
    width: int, layers: int, whole: Whole, make_run: MakeRun, tmp_path: Path
):
    payload = huge_header(whole, width, layers)
    started_s = time.monotonic()
    tracemalloc.start()
    try:
        assert outcome(tmp_path / "a.bin", make_run(), whole, payload) == "refused"
        assert tracemalloc.get_traced_memory()[1] < LIMIT_MIB * 2**20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started_s < LIMIT_S
