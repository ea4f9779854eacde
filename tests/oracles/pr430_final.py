"""openai/parameter-golf#430, final version as described: #720's model with two more scalars.

11 layers with 8 key/value heads; a bigram table; value embedding in layers 9 and 10; XSA in the
last 6 layers; a factor for each head's output; a share of x0 after each layer.
"""

from __future__ import annotations

import math

from torch import Tensor

from tests.oracles.primitives import (
    Params,
    bigram_rows,
    blend_with_token_before,
    block_shapes,
    causal_attention,
    heads,
    leaky_squared,
    remove_self_value,
    rms,
    rope,
    softcap,
)

SHAPES = block_shapes(11, kv_dim=512, mlp_dim=1792) | {
    "tok_emb.weight": (1024, 512),
    "hashes.0.table.weight": (4096, 128),  # bigrams
    "hashes.0.proj.weight": (512, 128),
    "hashes.0.scale": (),
    "smear.gate": (512,),
    **{f"blocks.{layer}.attn.gate.weight": (8,) for layer in range(11)},
    "ve_table.weight": (1024, 128),  # value embedding
    "ve_proj.weight": (512, 128),
    "ve_scale": (),
    "block_scalars.shared": (2,),  # of layers 9 and 10
    "block_scalars.x0": (11,),
    "skip_weights": (5, 512),
}

# Trained at 2048 with a rotary table for 1024: the base is scaled by (2048 / 1024)^(16 / 14).
ROPE_BASE = 10_000 * 2 ** (16 / 14)


def embedding(p: Params, ids_BT: Tensor) -> Tensor:
    """x0: tokens and bigrams, normed, then blended with the token before."""
    bigrams = p["hashes.0.table.weight"][bigram_rows(ids_BT, 4096)]
    x = p["tok_emb.weight"][ids_BT]
    x = x + p["hashes.0.scale"] * (bigrams @ p["hashes.0.proj.weight"].T)
    return blend_with_token_before(rms(x), p["smear.gate"], ids_BT)


def attention(p: Params, layer: int, n_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Output of a layer's attention: 8 query heads, 8 key/value heads of 64 channels."""
    name = f"blocks.{layer}.attn"
    q = rms(heads(n_BTD @ p[f"{name}.c_q.weight"].T, 8))
    k = rms(heads(n_BTD @ p[f"{name}.c_k.weight"].T, 8))
    v = n_BTD @ p[f"{name}.c_v.weight"].T
    if layer in (9, 10):
        shared = p["ve_scale"] * (p["ve_table.weight"][ids_BT] @ p["ve_proj.weight"].T)
        v = v + p["block_scalars.shared"][layer - 9] * shared
    v = heads(v, 8)
    q = rope(q, base=ROPE_BASE, dims=16) * p[f"{name}.q_gain"][:, None]
    k = rope(k, base=ROPE_BASE, dims=16)
    y = causal_attention(q, k, v)
    if layer in (5, 6, 7, 8, 9, 10):
        y = remove_self_value(y, v)
    y = y * p[f"{name}.gate.weight"][:, None]
    return y.flatten(2) @ p[f"{name}.proj.weight"].T


def mlp(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's MLP of 1792 channels."""
    name = f"blocks.{layer}.mlp"
    return leaky_squared(n_BTD @ p[f"{name}.fc.weight"].T) @ p[f"{name}.proj.weight"].T


def logits(params: Params, ids_BT: Tensor) -> Tensor:
    """Logits (B, T, 1024)."""
    p = params
    x0 = embedding(p, ids_BT)

    def block(layer: int, x: Tensor) -> Tensor:
        name, depth = f"blocks.{layer}", math.sqrt(layer + 1)
        keep, renew = p[f"{name}.resid_mix"]
        x = keep * x + renew * x0
        x = x + p[f"{name}.attn_scale"] * attention(p, layer, rms(x) / depth, ids_BT)
        x = x + p[f"{name}.mlp_scale"] * mlp(p, layer, rms(x) / depth)
        return x + p["block_scalars.x0"][layer] * x0

    x, saved = x0, []
    for layer in (0, 1, 2, 3, 4):
        x = block(layer, x)
        saved.append(x)
    for row, layer in enumerate((5, 6, 7, 8, 9)):
        x = block(layer, x + p["skip_weights"][row] * saved.pop())
    x = block(10, x)
    return softcap(rms(x) @ p["tok_emb.weight"].T, 30)
