"""Fixed parameters and a fixed text: functions of names and indices, no random generator."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tests.oracles.primitives import BOS

# Two rows of 128 tokens. Documents begin at different places, one is a BOS alone.
BOS_POSITIONS = ((0, 37, 101), (0, 64, 65, 120))
NUM_POSITIONS = 128


def hashed(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), float64: an integer hash of the name's CRC-32 and the index.

    The hash is the finalizer of MurmurHash3 (32 bits).
    """
    bits = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1)
    bits += np.uint32(zlib.crc32(name.encode()))
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> np.uint32(13)
    bits *= np.uint32(0xC2B2AE35)
    bits ^= bits >> np.uint32(16)
    return bits / 2.0**31 - 1


def center_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Middle and half width of the interval that holds a parameter's numbers."""
    part = name.removesuffix(".weight").split(".")[-1]
    if part in ("tok_emb", "table", "ve_table"):
        return 0.0, 0.7
    if part == "skip_gates" or name == "smear.gate" or (part == "gate" and len(shape) == 2):
        return 0.0, 2.0  # before a sigmoid
    if len(shape) == 2 and name.endswith(".weight"):
        return 0.0, math.sqrt(3 / shape[1])  # variance 1 / fan_in
    if part == "caps":
        return 30.0, 5.0
    if part == "q_gain":
        return 1.5, 0.5
    return 0.7, 0.3  # scales, mixes and factors


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The parameter of this name and shape, float32."""
    center, spread = center_and_spread(name, shape)
    numbers = hashed(name, math.prod(shape))
    numbers *= spread
    numbers += center
    return torch.from_numpy(numbers.astype(np.float32)).reshape(shape)


def fill_all(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All parameters of a system by their names."""
    return {name: fill(name, shape) for name, shape in shapes.items()}


def fixed_text(vocab_size: int) -> Tensor:
    """Ids (2, 128): BOS at BOS_POSITIONS, a hash of the place elsewhere."""
    rows = []
    for row, positions in enumerate(BOS_POSITIONS):
        place = (hashed(f"text row {row}", NUM_POSITIONS) + 1) / 2
        ids = 2 + (place * (vocab_size - 2)).astype(np.int64)
        ids[list(positions)] = BOS
        rows.append(torch.from_numpy(ids))
    return torch.stack(rows)
