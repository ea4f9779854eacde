"""Stand-ins for the FlashAttention modules: their signatures, demands and results, without numbers.

The signatures are those of flash-attn 2.8 (`flash_attn`), of FlashAttention-3
(`flash_attn_interface`) and of flash-attn-4 (`flash_attn.cute`). As in the first two, the kernels
are custom operators behind an autograd function, so that torch.compile can trace them.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def check_call(q: Tensor, k: Tensor, v: Tensor, *cu_seqlens: Tensor) -> None:
    """AssertionError unless the kernels accept these tensors."""
    for x in (q, k, v):
        assert x.dtype in (torch.bfloat16, torch.float16), f"FlashAttention got {x.dtype}"
        assert x.stride(-1) == 1, "the last dimension is not contiguous"
        assert x.device == q.device, f"{x.device} and {q.device}"
    assert k.shape == v.shape and q.size(-1) == k.size(-1) and q.size(-1) % 8 == 0, "head size"
    assert q.size(-2) % k.size(-2) == 0, "number of heads"
    assert q.dim() == (3 if cu_seqlens else 4)
    for cuts in cu_seqlens:
        assert cuts.dtype == torch.int32 and cuts.is_contiguous() and cuts.dim() == 1
        assert cuts.device == q.device, f"lengths on {cuts.device}"


@torch.library.custom_op("flash_stub::forward", mutates_args=())
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the numbers are those of q."""
    return q.clone(memory_format=torch.contiguous_format), lse_of(q)


@flash_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Any:
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse_of(q)


def lse_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("flash_stub::backward", mutates_args=())
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    return grad.clone(), torch.zeros_like(k), torch.zeros_like(v)


@flash_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Flash(torch.autograd.Function):
    """The autograd function; both tensors of lengths are inputs, as in the real ones."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = flash_forward(q, k, v, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        q, k, v, out, lse, *_ = ctx.saved_tensors
        return *flash_backward(grad.contiguous(), q, k, v, out, lse), None, None


def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Any = None, cu_k: Any = None) -> Any:
    check_call(q, k, v, *(() if cu_q is None else (cu_q, cu_k)))
    return Flash.apply(q, k, v, cu_q, cu_k)


def fa2_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return flash(q, k, v)[0]


def fa2_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k)[0]


def fa3_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    return flash(q, k, v)[0]


def fa3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k)[0]


def fa4_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):  # fmt: skip
    return flash(q, k, v)


def fa4_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, return_lse=False,
):  # fmt: skip
    return flash(q, k, v, cu_seqlens_q, cu_seqlens_k)


FUNCTIONS = {
    "flash_attn": (fa2_func, fa2_varlen_func),
    "flash_attn_interface": (fa3_func, fa3_varlen_func),
    "flash_attn.cute": (fa4_func, fa4_varlen_func),
}


def flash_module(name: str) -> types.ModuleType:
    """A module with the two functions of the FlashAttention module `name`."""
    module: Any = types.ModuleType(name)
    module.flash_attn_func, module.flash_attn_varlen_func = FUNCTIONS[name]
    return module
