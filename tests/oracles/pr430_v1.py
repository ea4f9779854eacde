"""openai/parameter-golf#430, first version: 10 layers, bigram and trigram tables.

XSA in the last 4 layers. Two hashes of trigrams: `mixing`, and the polynomial of the source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.primitives import (
    Params,
    bigram_rows,
    blend_with_token_before,
    block_shapes,
    causal_attention,
    heads,
    relu_squared,
    remove_self_value,
    rms,
    rope,
    softcap,
)

SHAPES = block_shapes(10, kv_dim=256, mlp_dim=1536) | {
    "tok_emb.weight": (1024, 512),
    "hashes.0.table.weight": (4096, 128),  # bigrams
    "hashes.0.proj.weight": (512, 128),
    "hashes.0.scale": (),
    "hashes.1.table.weight": (20_480, 32),  # trigrams
    "hashes.1.proj.weight": (512, 32),
    "smear.gate": (512,),
    "skip_weights": (5, 512),
}


def mixing_rows(ids_BT: Tensor) -> Tensor:
    """Row of the trigram table; the first two positions have the last row."""
    rows_BT = torch.full_like(ids_BT, 20_479)
    token, before, before_that = ids_BT[:, 2:], ids_BT[:, 1:-1], ids_BT[:, :-2]
    rows_BT[:, 2:] = ((36313 * token) ^ (27191 * before) ^ (51497 * before_that)) % 20_479
    return rows_BT


def polynomial_rows(ids_BT: Tensor) -> Tensor:
    """Row of the trigram table in the source.

    The token before the first one is 0. The token before that, at the first position, is the
    first token itself, and at the second position the 0.
    """
    zero, first = torch.zeros_like(ids_BT[:, :1]), ids_BT[:, :1]
    before = torch.cat([zero, ids_BT[:, :-1]], dim=1)
    before_that = torch.cat([first, before[:, :-1]], dim=1)
    return (961 * before_that + 31 * before + ids_BT) % 20_480


def embedding(p: Params, ids_BT: Tensor, trigram_rows_BT: Tensor) -> Tensor:
    """x0: tokens, bigrams and trigrams, normed, then blended with the token before."""
    x = p["tok_emb.weight"][ids_BT]
    bigrams = p["hashes.0.table.weight"][bigram_rows(ids_BT, 4096)]
    x = x + p["hashes.0.scale"] * (bigrams @ p["hashes.0.proj.weight"].T)
    trigrams = p["hashes.1.table.weight"][trigram_rows_BT]
    x = x + trigrams @ p["hashes.1.proj.weight"].T
    return blend_with_token_before(rms(x), p["smear.gate"], ids_BT)


def attention(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's attention: 8 query heads, 4 key/value heads of 64 channels."""
    name = f"blocks.{layer}.attn"
    q = rms(heads(n_BTD @ p[f"{name}.c_q.weight"].T, 8))
    k = rms(heads(n_BTD @ p[f"{name}.c_k.weight"].T, 4))
    v = heads(n_BTD @ p[f"{name}.c_v.weight"].T, 4)
    q = rope(q, base=10_000, dims=64) * p[f"{name}.q_gain"][:, None]
    k = rope(k, base=10_000, dims=64)
    y = causal_attention(q, k, v)
    if layer in (6, 7, 8, 9):
        y = remove_self_value(y, v)
    return y.flatten(2) @ p[f"{name}.proj.weight"].T


def mlp(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's MLP of 1536 channels."""
    name = f"blocks.{layer}.mlp"
    return relu_squared(n_BTD @ p[f"{name}.fc.weight"].T) @ p[f"{name}.proj.weight"].T


def block(p: Params, layer: int, x: Tensor, x0: Tensor) -> Tensor:
    """The stream after a layer."""
    name = f"blocks.{layer}"
    keep, renew = p[f"{name}.resid_mix"]
    x = keep * x + renew * x0
    x = x + p[f"{name}.attn_scale"] * attention(p, layer, rms(x))
    return x + p[f"{name}.mlp_scale"] * mlp(p, layer, rms(x))


def logits(params: Params, ids_BT: Tensor, *, polynomial: bool = False) -> Tensor:
    """Logits (B, T, 1024)."""
    p = params
    rows_BT = polynomial_rows(ids_BT) if polynomial else mixing_rows(ids_BT)
    x0 = embedding(p, ids_BT, rows_BT)
    x, saved = x0, []
    for layer in (0, 1, 2, 3, 4):
        x = block(p, layer, x, x0)
        saved.append(x)
    for row, layer in enumerate((5, 6, 7, 8, 9)):
        x = x + p["skip_weights"][row] * saved.pop()
        x = block(p, layer, x, x0)
    return softcap(rms(x) @ p["tok_emb.weight"].T, 30)
