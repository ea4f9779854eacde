"""openai/parameter-golf#2135: SP8192, layers 3 to 5 three times, two lanes from layer 8.

Attention has sparse gates and does not cross documents. The logits have two caps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracles.primitives import (
    BOS,
    Params,
    before,
    block_shapes,
    causal_attention,
    heads,
    leaky_squared,
    remove_self_value,
    rms,
    rope,
)

SHAPES = block_shapes(11, kv_dim=256, mlp_dim=2048) | {
    "tok_emb.weight": (8192, 512),
    "smear.gate": (12,),
    "smear.scale": (),
    **{f"blocks.{layer}.attn.gate.weight": (8, 12) for layer in range(11)},
    "block_scalars.carry": (11, 2),  # of the lanes; layers 8 to 10 use theirs
    "block_scalars.write": (11, 2, 2),  # by attention and MLP, to lanes 0 and 1
    "skip_weights": (8, 512),
    "skip_gates": (8, 512),
    "caps": (2,),  # of positive and negative logits
}


def embedding(p: Params, ids_BT: Tensor) -> Tensor:
    """x0: tokens plus a gated share of the token before (none at BOS), then normed."""
    x = p["tok_emb.weight"][ids_BT]
    gate_BT1 = torch.sigmoid(x[:, :, :12] @ p["smear.gate"])[:, :, None]
    inside_BT1 = (ids_BT != BOS)[:, :, None]
    return rms(x + p["smear.scale"] * gate_BT1 * inside_BT1 * before(x))


def attention(p: Params, layer: int, x_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Scaled output of a layer's attention: 8 query heads, 4 key/value heads of 64 channels."""
    name = f"blocks.{layer}.attn"
    n = rms(x_BTD) / math.sqrt(layer + 1)
    q = rms(heads(n @ p[f"{name}.c_q.weight"].T, 8))
    k = rms(heads(n @ p[f"{name}.c_k.weight"].T, 4))
    v = heads(n @ p[f"{name}.c_v.weight"].T, 4)
    q = rope(q, base=10_000, dims=16) * p[f"{name}.q_gain"][:, None]
    k = rope(k, base=10_000, dims=16)
    y = remove_self_value(causal_attention(q, k, v, ids_BT), v)
    gate_BTH = torch.sigmoid(0.5 * (n[:, :, :12] @ p[f"{name}.gate.weight"].T))
    y = (y * gate_BTH[..., None]).flatten(2) @ p[f"{name}.proj.weight"].T
    return p[f"blocks.{layer}.attn_scale"] * y


def mlp(p: Params, layer: int, x_BTD: Tensor) -> Tensor:
    """Scaled output of a layer's MLP of 2048 channels."""
    name = f"blocks.{layer}.mlp"
    n = rms(x_BTD) / math.sqrt(layer + 1)
    y = leaky_squared(n @ p[f"{name}.fc.weight"].T) @ p[f"{name}.proj.weight"].T
    return p[f"blocks.{layer}.mlp_scale"] * y


def mix_with_x0(p: Params, layer: int, x: Tensor, x0: Tensor) -> Tensor:
    """What a layer's attention reads."""
    keep, renew = p[f"blocks.{layer}.resid_mix"]
    return keep * x + renew * x0


def blend_skip(p: Params, row: int, x: Tensor, skip: Tensor) -> Tensor:
    """The stream or lane, blended with the output of an encoder layer."""
    stay = torch.sigmoid(p["skip_gates"][row])
    return (1 - stay) * p["skip_weights"][row] * skip + stay * x


def logits(params: Params, ids_BT: Tensor, *, looped: bool = True) -> Tensor:
    """Logits (B, T, 8192); `looped` as in evaluation and after 35 % of training."""
    p = params
    if looped:
        encoder, decoder = [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7]
    else:
        encoder, decoder = [0, 1, 2, 3, 4], [5, 6, 7]
    x0 = embedding(p, ids_BT)
    x, saved = x0, []
    for layer in encoder:
        x = mix_with_x0(p, layer, x, x0)
        x = x + attention(p, layer, x, ids_BT)
        x = x + mlp(p, layer, x)
        saved.append(x)
    for row, layer in enumerate(decoder):
        x = mix_with_x0(p, layer, blend_skip(p, row, x, saved.pop()), x0)
        x = x + attention(p, layer, x, ids_BT)
        x = x + mlp(p, layer, x)

    lane0, lane1 = x, x  # they part before the skip, which lane 0 alone receives
    for row, layer in enumerate((8, 9, 10), start=len(decoder)):
        if saved:  # none is left for layer 10
            lane0 = blend_skip(p, row, lane0, saved.pop())
        a = attention(p, layer, mix_with_x0(p, layer, lane0, x0), ids_BT)
        m = mlp(p, layer, lane1)
        carry, write = p["block_scalars.carry"][layer], p["block_scalars.write"][layer]
        lane0 = carry[0] * lane0 + write[0, 0] * a + write[1, 0] * m
        lane1 = carry[1] * lane1 + write[0, 1] * a + write[1, 1] * m

    z = rms((lane0 + lane1) / 2) @ p["tok_emb.weight"].T
    cap = torch.where(z > 0, p["caps"][0], p["caps"][1])
    return cap * torch.tanh(z / cap)
