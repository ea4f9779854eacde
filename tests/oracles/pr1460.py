"""openai/parameter-golf#1460: SP8192, layers 4 and 5 three times, XSA in all layers.

From layer 7 on, attention and MLP read the same input (parallel residuals on one stream).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracles.primitives import (
    Params,
    block_shapes,
    causal_attention,
    heads,
    leaky_squared,
    remove_self_value,
    rms,
    rope,
    softcap,
)

SHAPES = block_shapes(11, kv_dim=256, mlp_dim=2048) | {
    "tok_emb.weight": (8192, 512),
    "skip_weights": (7, 512),
    "skip_gates": (7, 512),
}


def attention(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's attention: 8 query heads, 4 key/value heads of 64 channels."""
    name = f"blocks.{layer}.attn"
    q = rms(heads(n_BTD @ p[f"{name}.c_q.weight"].T, 8))
    k = rms(heads(n_BTD @ p[f"{name}.c_k.weight"].T, 4))
    v = heads(n_BTD @ p[f"{name}.c_v.weight"].T, 4)
    q = rope(q, base=10_000, dims=16) * p[f"{name}.q_gain"][:, None]
    k = rope(k, base=10_000, dims=16)
    y = remove_self_value(causal_attention(q, k, v), v)
    return y.flatten(2) @ p[f"{name}.proj.weight"].T


def mlp(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's MLP of 2048 channels."""
    name = f"blocks.{layer}.mlp"
    return leaky_squared(n_BTD @ p[f"{name}.fc.weight"].T) @ p[f"{name}.proj.weight"].T


def block(p: Params, layer: int, x: Tensor, x0: Tensor) -> Tensor:
    """The stream after a layer."""
    name, depth = f"blocks.{layer}", math.sqrt(layer + 1)
    keep, renew = p[f"{name}.resid_mix"]
    x = keep * x + renew * x0
    attended = x + p[f"{name}.attn_scale"] * attention(p, layer, rms(x) / depth)
    read = x if layer >= 7 else attended
    return attended + p[f"{name}.mlp_scale"] * mlp(p, layer, rms(read) / depth)


def logits(params: Params, ids_BT: Tensor, *, looped: bool = True) -> Tensor:
    """Logits (B, T, 8192); `looped` as in evaluation and in the second half of training."""
    p = params
    if looped:
        encoder, decoder = [0, 1, 2, 3, 4, 5, 4], [5, 4, 5, 6, 7, 8, 9, 10]
    else:
        encoder, decoder = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]
    x0 = rms(p["tok_emb.weight"][ids_BT])
    x, saved = x0, []
    for layer in encoder:
        x = block(p, layer, x, x0)
        saved.append(x)
    for row, layer in enumerate(decoder):
        if saved:
            skip = p["skip_weights"][row] * saved.pop()
            stay = torch.sigmoid(p["skip_gates"][row])
            x = (1 - stay) * skip + stay * x
        x = block(p, layer, x, x0)
    return softcap(rms(x) @ p["tok_emb.weight"].T, 30)
