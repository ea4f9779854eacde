"""The challenge's naive baseline: 9 layers of width 512, SP1024, tied embedding."""

from __future__ import annotations

from torch import Tensor

from tests.oracles.primitives import (
    Params,
    block_shapes,
    causal_attention,
    heads,
    relu_squared,
    rms,
    rope,
    softcap,
)

SHAPES = block_shapes(9, kv_dim=256, mlp_dim=1024) | {
    "tok_emb.weight": (1024, 512),
    "skip_weights": (4, 512),
}


def attention(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's attention: 8 query heads, 4 key/value heads of 64 channels."""
    name = f"blocks.{layer}.attn"
    q = rms(heads(n_BTD @ p[f"{name}.c_q.weight"].T, 8))
    k = rms(heads(n_BTD @ p[f"{name}.c_k.weight"].T, 4))
    v = heads(n_BTD @ p[f"{name}.c_v.weight"].T, 4)
    q = rope(q, base=10_000, dims=64) * p[f"{name}.q_gain"][:, None]
    k = rope(k, base=10_000, dims=64)
    return causal_attention(q, k, v).flatten(2) @ p[f"{name}.proj.weight"].T


def mlp(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's MLP of 1024 channels."""
    name = f"blocks.{layer}.mlp"
    return relu_squared(n_BTD @ p[f"{name}.fc.weight"].T) @ p[f"{name}.proj.weight"].T


def block(p: Params, layer: int, x: Tensor, x0: Tensor) -> Tensor:
    """The stream after a layer."""
    name = f"blocks.{layer}"
    keep, renew = p[f"{name}.resid_mix"]
    x = keep * x + renew * x0
    x = x + p[f"{name}.attn_scale"] * attention(p, layer, rms(x))
    return x + p[f"{name}.mlp_scale"] * mlp(p, layer, rms(x))


def logits(params: Params, ids_BT: Tensor) -> Tensor:
    """Logits (B, T, 1024)."""
    p = params
    x0 = rms(p["tok_emb.weight"][ids_BT])
    x, saved = x0, []
    for layer in (0, 1, 2, 3):
        x = block(p, layer, x, x0)
        saved.append(x)
    for row, layer in enumerate((4, 5, 6, 7)):
        x = x + p["skip_weights"][row] * saved.pop()
        x = block(p, layer, x, x0)
    x = block(p, 8, x, x0)
    return softcap(rms(x) @ p["tok_emb.weight"].T, 30)
