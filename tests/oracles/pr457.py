"""openai/parameter-golf#457 as described: 11 layers, VRL, SmearGate, XSA in the last 4 layers."""

from __future__ import annotations

from torch import Tensor

from tests.oracles.primitives import (
    Params,
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

SHAPES = block_shapes(11, kv_dim=256, mlp_dim=1024) | {
    "tok_emb.weight": (1024, 512),
    "smear.gate": (512,),
    "block_scalars.value": (10, 1),  # lambda of layers 1 to 10
    "skip_weights": (5, 512),
}


def first_values(p: Params, x0_BTD: Tensor) -> Tensor:
    """The values of layer 0, (B, T, 256), which later layers add to their own."""
    keep, renew = p["blocks.0.resid_mix"]
    return rms(keep * x0_BTD + renew * x0_BTD) @ p["blocks.0.attn.c_v.weight"].T


def attention(p: Params, layer: int, n_BTD: Tensor, first_BTV: Tensor) -> Tensor:
    """Output of a layer's attention: 8 query heads, 4 key/value heads of 64 channels."""
    name = f"blocks.{layer}.attn"
    q = rms(heads(n_BTD @ p[f"{name}.c_q.weight"].T, 8))
    k = rms(heads(n_BTD @ p[f"{name}.c_k.weight"].T, 4))
    v = n_BTD @ p[f"{name}.c_v.weight"].T
    if layer >= 1:
        v = v + p["block_scalars.value"][layer - 1] * first_BTV
    v = heads(v, 4)
    q = rope(q, base=10_000, dims=64) * p[f"{name}.q_gain"][:, None]
    k = rope(k, base=10_000, dims=64)
    y = causal_attention(q, k, v)
    if layer in (7, 8, 9, 10):
        y = remove_self_value(y, v)
    return y.flatten(2) @ p[f"{name}.proj.weight"].T


def mlp(p: Params, layer: int, n_BTD: Tensor) -> Tensor:
    """Output of a layer's MLP of 1024 channels."""
    name = f"blocks.{layer}.mlp"
    return relu_squared(n_BTD @ p[f"{name}.fc.weight"].T) @ p[f"{name}.proj.weight"].T


def logits(params: Params, ids_BT: Tensor) -> Tensor:
    """Logits (B, T, 1024)."""
    p = params
    x0 = blend_with_token_before(rms(p["tok_emb.weight"][ids_BT]), p["smear.gate"], ids_BT)
    first_BTV = first_values(p, x0)

    def block(layer: int, x: Tensor) -> Tensor:
        name = f"blocks.{layer}"
        keep, renew = p[f"{name}.resid_mix"]
        x = keep * x + renew * x0
        x = x + p[f"{name}.attn_scale"] * attention(p, layer, rms(x), first_BTV)
        return x + p[f"{name}.mlp_scale"] * mlp(p, layer, rms(x))

    x, saved = x0, []
    for layer in (0, 1, 2, 3, 4):
        x = block(layer, x)
        saved.append(x)
    for row, layer in enumerate((5, 6, 7, 8, 9)):
        x = block(layer, x + p["skip_weights"][row] * saved.pop())
    x = block(10, x)
    return softcap(rms(x) @ p["tok_emb.weight"].T, 30)
