"""Formulas that all systems share, each as its description states it.

Dimensions: B rows, T positions, D channels of the stream, H query heads, K key/value heads, E
channels of a head, R channels of a hashed table, V pieces of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Params = Mapping[str, Tensor]

BOS = 1


def block_shapes(num_layers: int, kv_dim: int, mlp_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what every block has: width 512, 8 query heads."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        shapes |= {
            f"blocks.{layer}.resid_mix": (2, 512),
            f"blocks.{layer}.attn_scale": (512,),
            f"blocks.{layer}.attn.c_q.weight": (512, 512),
            f"blocks.{layer}.attn.c_k.weight": (kv_dim, 512),
            f"blocks.{layer}.attn.c_v.weight": (kv_dim, 512),
            f"blocks.{layer}.attn.q_gain": (8,),
            f"blocks.{layer}.attn.proj.weight": (512, 512),
            f"blocks.{layer}.mlp_scale": (512,),
            f"blocks.{layer}.mlp.fc.weight": (mlp_dim, 512),
            f"blocks.{layer}.mlp.proj.weight": (512, mlp_dim),
        }
    return shapes


def rms(x: Tensor) -> Tensor:
    """x over the root mean square of its last dimension, without a learned weight."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def rope(x_BTHE: Tensor, base: float, dims: int) -> Tensor:
    """Rotary position embedding of the first `dims` channels of each head.

    Channel j is paired with channel j + dims / 2; pair k turns by t * base^(-2k / dims).
    """
    half = dims // 2
    inverse_frequency = base ** (-torch.arange(half, dtype=torch.float64) * 2 / dims)
    positions = torch.arange(x_BTHE.shape[1], dtype=torch.float64)
    angle = (positions[:, None] * inverse_frequency)[:, None, :]  # T, 1, half
    cos, sin = angle.cos().to(x_BTHE.dtype), angle.sin().to(x_BTHE.dtype)
    first, second = x_BTHE[..., :half], x_BTHE[..., half:dims]
    turned = [first * cos + second * sin, second * cos - first * sin, x_BTHE[..., dims:]]
    return torch.cat(turned, dim=-1)


def heads(x_BTN: Tensor, num_heads: int) -> Tensor:
    """The last dimension split into heads."""
    return x_BTN.unflatten(-1, (num_heads, -1))


def causal_attention(
    q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, ids_BT: Tensor | None = None
) -> Tensor:
    """Softmax attention to the same and earlier positions, (B, T, H, E).

    Query head h reads key/value head h // (H / K). With `ids_BT`, a position reads only its own
    document: nothing before the last BOS up to that position.
    """
    group = q_BTHE.shape[2] // k_BTKE.shape[2]
    k_BTHE, v_BTHE = k_BTKE.repeat_interleave(group, 2), v_BTKE.repeat_interleave(group, 2)
    scores_BHTT = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BTHE) / math.sqrt(q_BTHE.shape[3])
    position = torch.arange(q_BTHE.shape[1])
    visible_BTT = (position[:, None] >= position[None, :])[None]
    if ids_BT is not None:
        document_BT = (ids_BT == BOS).cumsum(1)
        visible_BTT = visible_BTT & (document_BT[:, :, None] == document_BT[:, None, :])
    scores_BHTT = scores_BHTT.masked_fill(~visible_BTT[:, None], -math.inf)
    return torch.einsum("bhts,bshe->bthe", scores_BHTT.softmax(-1), v_BTHE)


def remove_self_value(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """Exclusive self-attention: y without its part along the position's own value vector.

    Source: arXiv 2603.09078.
    """
    v_BTHE = v_BTKE.repeat_interleave(y_BTHE.shape[2] // v_BTKE.shape[2], 2)
    unit_BTHE = v_BTHE / v_BTHE.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return y_BTHE - (y_BTHE * unit_BTHE).sum(-1, keepdim=True) * unit_BTHE


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return x.clamp_min(0).square()


def leaky_squared(x: Tensor) -> Tensor:
    """x^2 where x is positive, (x / 2)^2 elsewhere."""
    return torch.where(x > 0, x, 0.5 * x).square()


def before(x_BTD: Tensor) -> Tensor:
    """The vector of the position before; zeros at the first position."""
    return torch.cat([torch.zeros_like(x_BTD[:, :1]), x_BTD[:, :-1]], dim=1)


def blend_with_token_before(x_BTD: Tensor, theta_D: Tensor, ids_BT: Tensor) -> Tensor:
    """SmearGate: (1 - g) x_t + g x_(t-1) with g = sigmoid(theta).

    x_(t-1) counts as zero at the first position, and where a document begins.
    """
    gate_D = torch.sigmoid(theta_D)
    inside_BT1 = (ids_BT != BOS)[:, :, None]
    return (1 - gate_D) * x_BTD + gate_D * inside_BT1 * before(x_BTD)


def bigram_rows(ids_BT: Tensor, num_rows: int) -> Tensor:
    """Row of the bigram table at each position; the first one has the last row to itself."""
    rows_BT = torch.full_like(ids_BT, num_rows - 1)
    current, previous = 36313 * ids_BT[:, 1:], 27191 * ids_BT[:, :-1]
    rows_BT[:, 1:] = (current ^ previous) % (num_rows - 1)
    return rows_BT


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap)."""
    return cap * torch.tanh(z / cap)
