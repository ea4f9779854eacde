"""Model: the forward pass against an independent one, causality, documents, loss, kernels, plan.

The reference forward below is written from the published description with plain loops in float64;
nothing of it is shared with the script. Float32 results differ from it by rounding: about 1e-6 of
logits of size 10, so that 1e-4 leaves room for another machine's sums, while every error of the
formulas that was tried moves logits by more than 1e-2.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from tests.conftest import MakeRun, plain_config, random_model, randomize_, tiny_config
from train_gpt import (
    BOS_ID,
    GPT,
    AttentionBackend,
    Config,
    InputError,
    LayerCall,
    Trainer,
    apply_rotary_emb,
    build_model,
    choose_attention_backend,
    exclusive_self_attention,
    flops_per_token,
    layer_schedule,
    parameter_roles,
    rms_norm,
    rotary_table,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:.*torch.jit.script_method"
)
CPU = torch.device("cpu")
assert_near = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-4)  # see above
# Every knob that changes the forward pass, one at a time and together.
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "untied": {"tie_embeddings": False},
    "skip_gates": {"skip_gates": True},
    "xsa": {"xsa_last_n": 2},
    "xsa_everywhere": {"xsa_last_n": 5},
    "partial_rope": {"rope_dims": 2},
    "ln_scale": {"ln_scale": True},
    "leaky": {"leaky_slope": 0.5},
    "documents": {"isolate_documents": True},
    "softcap": {"logit_softcap": 3.0},
    "one_kv_head": {"num_kv_heads": 1},
    "no_grouping": {"num_kv_heads": 4},
    "mlp": {"mlp_mult": 3.0},
    "one_layer": {"num_layers": 1},
    "two_layers": {"num_layers": 2},
    "all": {
        "tie_embeddings": False,
        "skip_gates": True,
        "xsa_last_n": 3,
        "rope_dims": 2,
        "ln_scale": True,
        "leaky_slope": 0.3,
        "isolate_documents": True,
        "rope_base": 100.0,
    },
}
SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "num_layers": 5,
    "model_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "train_seq_len": 16,
    "train_batch_tokens": 32,
}


def kernel(name: str) -> AttentionBackend:
    """The attention kernel of that name, for scoring on a CPU."""
    return choose_attention_backend(tiny_config(attention=name, mode="eval"), CPU, torch.float32)


def config_of(variant: str, **changes: Any) -> Config:
    """A configuration of 5 layers x 16 channels with the knobs of `variant`."""
    return tiny_config(**{**SHAPE, **VARIANTS[variant], **changes})


def random_ids(cfg: Config, B: int, T: int, seed: int = 0) -> Tensor:
    """Random ids (B, T) in which about every fifth is BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, cfg.vocab_size, (B, T), generator=generator)
    return torch.where(torch.rand(B, T, generator=generator) < 0.2, BOS_ID, ids)


# --- The forward pass ----------------------------------------------------------------------------


class Reference:
    """The baseline's model and its options for one sequence, in float64, position by position."""

    def __init__(self, model: GPT):
        self.cfg = model.cfg
        self.w = {k: v.detach().double().numpy() for k, v in model.named_parameters()}

    @staticmethod
    def rms(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + np.finfo(np.float32).eps)

    def rope(self, x: np.ndarray, position: int) -> np.ndarray:
        """Turn pairs (j, j + R/2) of the first R channels by position * base^(-2j/R)."""
        R = self.cfg.rope_dims or len(x)
        y = x.copy()
        for j in range(R // 2):
            angle = position * self.cfg.rope_base ** (-2 * j / R)
            a, b = x[j], x[j + R // 2]
            y[j] = a * math.cos(angle) + b * math.sin(angle)
            y[j + R // 2] = -a * math.sin(angle) + b * math.cos(angle)
        return y

    def attention(self, layer: int, n: np.ndarray, ids: list[int]) -> np.ndarray:
        """Attention's output for the normed inputs n (T, D)."""
        cfg, p = self.cfg, f"blocks.{layer}.attn."
        E, group = cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
        gain = self.w[p + "q_gain"]
        out = np.zeros_like(n)
        for h in range(cfg.num_heads):
            g = h // group
            q = [self.w[p + "c_q.weight"][h * E : (h + 1) * E] @ x for x in n]
            k = [self.w[p + "c_k.weight"][g * E : (g + 1) * E] @ x for x in n]
            v = [self.w[p + "c_v.weight"][g * E : (g + 1) * E] @ x for x in n]
            q = [gain[h] * self.rope(self.rms(x), t) for t, x in enumerate(q)]
            k = [self.rope(self.rms(x), t) for t, x in enumerate(k)]
            for t in range(len(n)):
                first = 0
                if cfg.isolate_documents:
                    first = max((s for s in range(t + 1) if ids[s] == BOS_ID), default=0)
                score = np.array([q[t] @ k[s] / math.sqrt(E) for s in range(first, t + 1)])
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                y = sum(w * x for w, x in zip(weight, v[first : t + 1], strict=True))
                if layer >= cfg.num_layers - cfg.xsa_last_n:
                    unit = v[t] / max(np.linalg.norm(v[t]), 1e-12)
                    y = y - (y @ unit) * unit
                out[t, h * E : (h + 1) * E] = y
        return out @ self.w[p + "proj.weight"].T

    def block(self, layer: int, x: np.ndarray, x0: np.ndarray, ids: list[int]) -> np.ndarray:
        cfg, p = self.cfg, f"blocks.{layer}."
        scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
        mix = self.w[p + "resid_mix"]
        x = mix[0] * x + mix[1] * x0
        n = np.stack([self.rms(row) * scale for row in x])
        x = x + self.w[p + "attn_scale"] * self.attention(layer, n, ids)
        n = np.stack([self.rms(row) * scale for row in x])
        u = n @ self.w[p + "mlp.fc.weight"].T
        f = np.where(u > 0, u, cfg.leaky_slope * u) ** 2
        return x + self.w[p + "mlp_scale"] * (f @ self.w[p + "mlp.proj.weight"].T)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Softcapped logits (T, V) of one sequence."""
        cfg = self.cfg
        x = x0 = np.stack([self.rms(self.w["tok_emb.weight"][i]) for i in ids])
        stack, half = [], cfg.num_layers // 2
        for layer in range(half):
            x = self.block(layer, x, x0, ids)
            stack.append(x)
        for row in range(cfg.num_layers - half):
            if stack:
                skip = self.w["skip_weights"][row] * stack.pop()
                if cfg.skip_gates:
                    gate = 1 / (1 + np.exp(-self.w["skip_gates"][row]))
                    x = (1 - gate) * skip + gate * x
                else:
                    x = x + skip
            x = self.block(half + row, x, x0, ids)
        head = self.w["tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"]
        z = np.stack([self.rms(row) for row in x]) @ head.T
        return cfg.logit_softcap * np.tanh(z / cfg.logit_softcap)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_a_plain_forward_written_from_the_description(variant: str):
    cfg = config_of(variant)
    model = random_model(cfg)
    ids = random_ids(cfg, B=2, T=13)
    logits = model.logits(ids)
    assert logits.dtype == torch.float32
    expected = np.stack([Reference(model).logits(row.tolist()) for row in ids])
    assert np.abs(expected).max() > 1  # neither is trivially zero
    assert_near(logits.double(), torch.from_numpy(expected))


def test_the_variants_differ_from_each_other():
    # Otherwise the test above could pass with a knob that does nothing on both sides.
    logits = {}
    for variant in (
        "baseline",
        "skip_gates",
        "xsa",
        "partial_rope",
        "ln_scale",
        "leaky",
        "documents",
        "softcap",
    ):
        cfg = config_of(variant)
        logits[variant] = random_model(cfg).logits(random_ids(cfg, B=2, T=13)).flatten().tolist()
    for variant in logits:
        near = [k for k in logits if np.abs(np.subtract(logits[k], logits[variant])).max() < 1e-2]
        assert near == [variant]


def test_bf16_logits_are_those_of_float32_to_bf16_precision():
    cfg = config_of("all")
    ids = random_ids(cfg, B=2, T=16)
    full, half = (random_model(cfg, d).logits(ids) for d in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    # bf16 keeps 8 bits: 0.4 % a rounding, some dozens of them in 5 layers.
    assert ((full - half).norm() / full.norm()).item() < 0.05


# --- Causality and documents ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_score_depends_on_a_later_token(variant: str):
    cfg = config_of(variant)
    model = random_model(cfg)
    ids = random_ids(cfg, B=1, T=17, seed=1)
    before = model.eval_nll(ids[:, :-1], ids[:, 1:])[0]
    moved = torch.zeros(16, dtype=torch.bool)
    for j in range(1, 17):
        changed = ids.clone()
        changed[0, j] = 2 + (ids[0, j] + 1) % (cfg.vocab_size - 2)
        after = model.eval_nll(changed[:, :-1], changed[:, 1:])[0]
        # Target j - 1 is token j itself; the bits of everything before stay.
        assert torch.equal(after[: j - 1], before[: j - 1]), j
        moved[j:] |= after[j:] != before[j:]
    assert moved[2:].all()  # while every later position does read earlier tokens


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_with_isolated_documents_no_score_depends_on_an_earlier_document(backend: str):
    cfg = config_of("all", attention=backend, mode="eval")
    model = random_model(cfg)
    ids = random_ids(cfg, B=3, T=17).clamp_min(2)
    ids[:, 0] = ids[1, 7] = ids[2, 5] = ids[2, 9] = BOS_ID  # rows of one, two and three documents
    before = model.eval_nll(ids[:, :-1], ids[:, 1:])
    for row, cut in ((1, 7), (2, 5), (2, 9)):
        changed = ids.clone()
        # All tokens of all earlier documents, also the one right before the boundary.
        others = torch.randint(2, cfg.vocab_size, (cut,))
        changed[row, :cut] = torch.where(ids[row, :cut] == BOS_ID, BOS_ID, others)
        after = model.eval_nll(changed[:, :-1], changed[:, 1:])
        assert torch.equal(after[row, cut:], before[row, cut:])
        assert not torch.equal(after[row, 1 : cut - 1], before[row, 1 : cut - 1])
        untouched = torch.arange(3) != row
        assert torch.equal(after[untouched], before[untouched])


def test_without_isolation_scores_do_depend_on_the_document_before():
    cfg = config_of("baseline")
    model = random_model(cfg)
    ids = random_ids(cfg, B=1, T=16).clamp_min(2)
    ids[0, 8] = BOS_ID
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % cfg.vocab_size
    assert ((model.logits(ids) - model.logits(changed))[0, 8:].abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_packed_document_is_scored_as_it_is_alone(backend: str):
    # Rotary positions are relative, so that a document may stand anywhere in a row.
    cfg = config_of("all", attention=backend, mode="eval")
    model = random_model(cfg)
    first, second = (random_ids(cfg, 1, T, seed=T).clamp_min(2) for T in (6, 9))
    first[:, 0] = second[:, 0] = BOS_ID
    with torch.no_grad():  # flex attention has no gradients on a CPU
        packed = model.logits(torch.cat([first, second], dim=1))
        assert_near(packed[:, :6], model.logits(first))
        assert_near(packed[:, 6:], model.logits(second))


# --- Rotary positions ----------------------------------------------------------------------------


@pytest.mark.parametrize("rope_dims", [0, 4])
def test_rotated_products_depend_on_the_distance_only(rope_dims: int):
    cfg = tiny_config(rope_dims=rope_dims, train_seq_len=64, train_batch_tokens=64)
    table = rotary_table(cfg, 64).double()
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def product(m: int, n: int) -> float:
        turned = [
            apply_rotary_emb(x.view(1, 1, 1, 8), table[:, p : p + 1]) for x, p in ((q, m), (k, n))
        ]
        return float((turned[0] * turned[1]).sum())

    for distance in range(20):
        products = [product(n + distance, n) for n in (0, 1, 17, 40)]
        # The table is float32: angles up to 60 are off by 4e-6.
        assert max(products) - min(products) < 1e-4
    assert abs(product(5, 0) - product(4, 0)) > 1e-2


def test_products_depend_on_the_distance_only_far_beyond_the_table():
    cfg = tiny_config(train_seq_len=64, train_batch_tokens=64)
    table = rotary_table(cfg, 64)
    torch.testing.assert_close(rotary_table(cfg, 64, (3, 20)), table[:, 3:20])
    q, k = torch.randn(2, 1, 20, 1, 8)

    def products(span: tuple[int, int]) -> Tensor:
        turned = [apply_rotary_emb(x, rotary_table(cfg, 64, span))[0, :, 0] for x in (q, k)]
        return turned[0] @ turned[1].T

    torch.testing.assert_close(
        products((1_000_000, 1_000_020)), products((7, 27)), rtol=1e-4, atol=1e-4
    )


def test_rotation_keeps_lengths_and_leaves_the_channels_beyond_rope_dims():
    cfg = tiny_config(model_dim=64, rope_dims=6)
    table = rotary_table(cfg, 32)
    x_BTHE = torch.randn(2, 32, 4, 16)
    y_BTHE = apply_rotary_emb(x_BTHE, table)
    assert torch.equal(y_BTHE[..., 6:], x_BTHE[..., 6:])
    assert torch.equal(y_BTHE[:, 0], x_BTHE[:, 0])  # position 0 turns nothing
    assert ((y_BTHE - x_BTHE)[:, 1:, :, :6].abs() > 1e-6).float().mean() > 0.95
    torch.testing.assert_close(y_BTHE.norm(dim=-1), x_BTHE.norm(dim=-1))
    for j in range(3):  # the pairs are (j, j + 3)
        lengths = [torch.hypot(z[..., j], z[..., j + 3]) for z in (x_BTHE, y_BTHE)]
        torch.testing.assert_close(*lengths)


def angles(table: Tensor) -> Tensor:
    """Angles of position 1, (rotary pairs)."""
    return torch.atan2(table[1, 1], table[0, 1])


def test_rotary_frequencies_fall_from_1_by_powers_of_the_base():
    cfg = tiny_config(model_dim=64, rope_dims=16, rope_base=500.0)
    expected = torch.tensor([500 ** (-2 * j / 16) for j in range(8)])
    torch.testing.assert_close(angles(rotary_table(cfg, 32)), expected)


def test_a_longer_context_slows_the_slowest_frequency_so_that_it_spans_the_text_as_before():
    cfg = tiny_config(model_dim=64, rope_dims=16)  # trained with 32 tokens
    short, long = rotary_table(cfg, 32), rotary_table(cfg, 128)
    assert long.shape == (3, 128, 8)
    assert torch.equal(rotary_table(cfg, 20), short[:, :20])  # no rescaling within the context
    assert angles(long)[0] == angles(short)[0]  # the fastest stays
    torch.testing.assert_close(4 * angles(long)[-1], angles(short)[-1])
    base = (angles(long)[1] ** (-16 / 2)).item()
    assert base == pytest.approx(10_000 * 4 ** (16 / 14), rel=1e-4)


def test_the_longer_table_is_used_only_beyond_the_training_context():
    cfg = config_of("baseline", eval_seq_len=32)
    longer, plain = random_model(cfg), random_model(config_of("baseline"))
    ids = random_ids(cfg, B=1, T=32)
    assert torch.equal(longer.logits(ids[:, :16]), plain.logits(ids[:, :16]))
    torch.testing.assert_close(longer.long_rotary, rotary_table(cfg, 32))
    beyond = random_model(config_of("baseline", train_seq_len=32))
    assert (longer.logits(ids) - beyond.logits(ids)).abs().max() > 1e-2
    with pytest.raises(AssertionError, match="longer than EVAL_SEQ_LEN"):
        longer.logits(random_ids(cfg, B=1, T=33))
    with pytest.raises(AssertionError, match="longer than EVAL_SEQ_LEN"):
        plain.logits(ids[:, :17])


# --- Exclusive self-attention, skips, scales -----------------------------------------------------


def test_xsa_leaves_nothing_along_a_position_s_own_value():
    y_BTHE, v_BTKE = torch.randn(2, 7, 6, 8), torch.randn(2, 7, 3, 8)
    out_BTHE = exclusive_self_attention(y_BTHE, v_BTKE)
    own_BTHE = v_BTKE.repeat_interleave(2, dim=2)  # heads of a group are neighbours
    assert (out_BTHE * own_BTHE).sum(dim=-1).abs().max() < 1e-5
    unit = own_BTHE / own_BTHE.norm(dim=-1, keepdim=True)
    expected = y_BTHE - (y_BTHE * unit).sum(dim=-1, keepdim=True) * unit
    torch.testing.assert_close(out_BTHE, expected)


def test_xsa_with_a_value_of_zero_changes_nothing():
    y_BTHE = torch.randn(1, 3, 4, 8)
    assert torch.equal(exclusive_self_attention(y_BTHE, torch.zeros(1, 3, 2, 8)), y_BTHE)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"xsa_last_n": 3, "attn_gate": "head", "ln_scale": True, "value_residual": "resformer"},
        {"value_residual": "vrl", "ve_layers": "1,2", "ve_dim": 8, "leaky_slope": 0.5},
        {"xsa_last_n": 2, "attn_gate": "window", "gate_window": 4, "num_kv_heads": 2},
        {"parallel_residual": "lanes", "parallel_start_layer": 1, "num_kv_heads": 4},
        {"parallel_residual": "routed", "parallel_start_layer": 1, "attn_gate": "sparse"},
        {"parallel_residual": "merge", "parallel_start_layer": 1, "attn_gate": "input"},
        {"parallel_residual": "stream", "parallel_start_layer": 1, "xsa_last_n": 3},
    ],
)
@pytest.mark.parametrize("bits", [0, 6])
def test_the_formulas_of_compiled_gpu_graphs_are_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any], bits: int
):
    model = random_model(tiny_config(**knobs))
    for name, module in model.named_modules():
        if isinstance(module, train_gpt.CastedLinear) and name.startswith("blocks."):
            module.qat_bits = bits
    ids_BT = torch.randint(2, model.cfg.vocab_size, (2, 16))
    results = []
    for is_gpu in (False, True):
        monkeypatch.setattr(train_gpt, "is_compiled_for_gpu", lambda x, is_gpu=is_gpu: is_gpu)
        model.zero_grad(set_to_none=True)
        loss = model.loss(ids_BT, ids_BT.roll(-1, 1))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (loss, grads), (gpu_loss, gpu_grads) = results
    torch.testing.assert_close(gpu_loss, loss)
    assert grads.keys() == gpu_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(gpu_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adapters_cannot_be_in_a_graph_of_one_product(monkeypatch: pytest.MonkeyPatch):
    model = random_model(tiny_config())
    monkeypatch.setattr(train_gpt, "is_compiled_for_gpu", lambda x: True)
    model.get_submodule("blocks.0.attn.c_q").adapter = torch.nn.Identity()
    ids_BT = torch.randint(2, model.cfg.vocab_size, (1, 4))
    with pytest.raises(AssertionError, match="adapters in a compiled graph"):
        model(ids_BT)


def test_under_xsa_the_first_position_of_a_document_gets_nothing_from_attention():
    cfg = config_of("all", xsa_last_n=2)  # layers 3 and 4
    model = random_model(cfg)
    ids = torch.tensor([[BOS_ID, 5, 6, BOS_ID, 7, 8]])
    inputs = model.block_inputs(ids, model.embed(ids))
    for layer, block in enumerate(model.blocks):
        stream = rms_norm(torch.randn(1, 6, 16))
        out = block.attn(stream, inputs, model.block_scalars_of(layer))[0]  # type: ignore[operator]
        alone = out[[0, 3]].abs().max()  # these see only themselves: y = v
        assert (alone < 1e-5) == (layer >= 3) and out[[1, 2, 4, 5]].abs().max() > 0.1


def test_skip_gates_blend_half_and_half_at_initialization():
    model = GPT(
        config_of("skip_gates"),
        choose_attention_backend(tiny_config(), CPU, torch.float32),
        torch.float32,
    )
    x, saved = torch.randn(2, 1, 3, 16)
    assert model.skip_gates is not None
    blended = model.blend_skip(x, saved, model.skip_weights[0], model.skip_gates[0])
    torch.testing.assert_close(blended, (x + saved) / 2)


def test_ln_scale_divides_the_normed_inputs_by_the_root_of_the_depth():
    model = random_model(config_of("ln_scale"))
    x = torch.randn(1, 3, 16)
    for layer, block in enumerate(model.blocks):
        n = block.norm(x)  # type: ignore[operator]
        rms = n.square().mean(dim=-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, (layer + 1) ** -0.5))


# --- Attention kernels ---------------------------------------------------------------------------


class BlockInputs(NamedTuple):
    """Queries of 4 heads, keys and values of 2."""

    q: Tensor
    k: Tensor
    v: Tensor


def attention_inputs(
    B: int, T: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> BlockInputs:
    """Random inputs of width 16, on a GPU 64, that want gradients."""
    E = 16 if device == "cpu" else 64
    shapes = [(B, T, heads, E) for heads in (4, 2, 2)]
    return BlockInputs(
        *(torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    )


def naive_attention(qkv: BlockInputs, ids: Tensor, isolate: bool) -> Tensor:
    """Attention by explicit loops over rows, heads and positions."""
    q, k, v = qkv
    B, T, H, E = q.shape
    group = H // k.shape[2]
    rows = []
    for b in range(B):
        for t in range(T):
            first = 0
            if isolate:
                first = max((s for s in range(t + 1) if ids[b, s] == BOS_ID), default=0)
            for h in range(H):
                score = k[b, first : t + 1, h // group] @ q[b, t, h] / math.sqrt(E)
                rows.append(score.softmax(dim=0) @ v[b, first : t + 1, h // group])
    return torch.stack(rows).view(B, T, H, E)


def packed_ids(B: int, T: int) -> Tensor:
    """Ids with document starts at the first, at the last and at neighbouring positions."""
    ids = torch.full((B, T), 5)
    ids[0, [0, 3, 4, T - 1]] = BOS_ID
    ids[1, T // 2] = BOS_ID  # a row that begins within a document
    return ids


def values_and_gradients(attention: AttentionBackend, qkv: BlockInputs, ids: Tensor, isolate: bool):
    """Output and gradients of a fixed random functional of it."""
    y = attention.attend(*qkv, attention.prepare(ids, isolate))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad((y * weight).sum(), qkv)]


@pytest.mark.parametrize("isolate", [False, True])
def test_sdpa_equals_attention_by_loops_in_value_and_gradient(isolate: bool):
    qkv, ids = attention_inputs(3, 11), packed_ids(3, 11)
    naive = AttentionBackend(
        "naive",
        lambda *_: None,
        lambda q, k, v, _: naive_attention(BlockInputs(q, k, v), ids, isolate),
    )
    sdpa = kernel("sdpa")
    for got, expected in zip(
        values_and_gradients(sdpa, qkv, ids, isolate),
        values_and_gradients(naive, qkv, ids, isolate),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [2, 63, 64, 200, 1024, 1025])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bf16_values_and_gradients_on_a_cpu_are_those_of_exact_attention(
    monkeypatch: pytest.MonkeyPatch, T: int, compiled: bool
):
    qkv = attention_inputs(2, T, dtype=torch.bfloat16)
    exact = BlockInputs(*(x.detach().double().requires_grad_() for x in qkv))
    attention, ids = kernel("sdpa"), torch.full((2, T), 5)
    tested = attention._replace(attend=torch.compile(attention.attend)) if compiled else attention
    values, *gradients = values_and_gradients(tested, qkv, ids, False)
    for got, expected in zip(
        [values, *gradients], values_and_gradients(attention, exact, ids, False), strict=True
    ):
        # Gradients of two positions are small differences, and compiled code rounds elsewhere.
        tolerance = 0.015 if compiled and T == 2 else 0.008
        assert (got.double() - expected).norm() <= tolerance * expected.norm()
    with torch.no_grad():
        assert compiled or torch.equal(attention.attend(*qkv, None), values)
        monkeypatch.setattr(train_gpt, "MAX_TILED_LEN", 0)
        pytorch = attention.attend(*qkv, None)  # it rounds in other places
    assert (values - pytorch).norm() <= 0.005 * pytorch.norm()
    assert torch.equal(values, pytorch) == (T == 1025)


def test_large_scores_neither_overflow_nor_lose_precision():
    q, k, v = attention_inputs(1, 130, dtype=torch.bfloat16)
    q, k = (60 * x.detach() for x in (q, k))
    q[:, 1::2] = k[:, 1::2].repeat_interleave(2, dim=2)  # what is masked would pass exp(88)
    qkv = BlockInputs(*(x.detach().requires_grad_() for x in (q, k, v)))
    exact = BlockInputs(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    ids = q[..., 0, 0]
    values, *gradients = values_and_gradients(kernel("sdpa"), qkv, ids, False)
    expected, *_ = values_and_gradients(kernel("sdpa"), exact, ids, False)
    assert (values.double() - expected).norm() <= 0.01 * expected.norm()
    assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.parametrize(("heads", "key_heads", "T"), [(3, 3, 100), (4, 2, 64)])
def test_the_operators_of_tiled_attention_are_what_the_compiler_takes_them_for(
    heads: int, key_heads: int, T: int
):
    q, k, v, grad = (
        torch.randn(2, num, T, width, generator=torch.Generator().manual_seed(1)).bfloat16()
        for num, width in ((heads, 9), (key_heads, 9), (key_heads, 10), (heads, 10))
    )
    checks = ("test_schema", "test_faketensor")
    for keeps in (False, True):
        torch.library.opcheck(train_gpt.tiled_attention, (q, k, v, keeps), test_utils=checks)
    weights = train_gpt.tiled_attention(q, k, v, True)[-1]
    gradients = train_gpt.tiled_attention_gradients
    torch.library.opcheck(gradients, (grad, q, k, v, weights), test_utils=checks)


@pytest.mark.parametrize("isolate", [False, True])
def test_flex_attention_equals_sdpa(isolate: bool):
    ids = packed_ids(2, 150)  # more than one block of 128
    qkv = BlockInputs(
        *(x.detach() for x in attention_inputs(2, 150))
    )  # it has no gradients on a CPU
    both = [kernel(name) for name in ("flex", "sdpa")]
    flex, sdpa = (a.attend(*qkv, a.prepare(ids, isolate)) for a in both)
    assert both[0].name == "flex" and both[1].name == "sdpa"
    torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["all", "train"])
def test_flex_attention_is_refused_for_training_on_a_cpu(mode: str):
    with pytest.raises(InputError) as refusal:
        choose_attention_backend(tiny_config(attention="flex", mode=mode), CPU, torch.float32)
    text = "ATTENTION=flex has no gradients on a CPU; use ATTENTION=sdpa"
    assert str(refusal.value) == text


@pytest.fixture
def fake_flash_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules with FlashAttention's two functions, written from their documentation."""

    def func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        assert causal
        return naive_attention(BlockInputs(q, k, v), torch.zeros(q.shape[:2]), False)

    def varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
    ) -> Tensor:
        assert causal and q.ndim == 3 and cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        assert cu_seqlens_q is not cu_seqlens_k  # which torch 2.13 could not trace
        cuts = cu_seqlens_q.tolist()
        assert cuts[0] == 0 and cuts[-1] == len(q) and cuts == sorted(cuts)
        assert max(np.diff(cuts)) <= max_seqlen_q
        pieces = [
            naive_attention(
                BlockInputs(*(x[a:b][None] for x in (q, k, v))), torch.zeros(1, b - a), False
            )[0]
            for a, b in zip(cuts, cuts[1:], strict=False)
            if b > a
        ]
        return torch.cat(pieces)

    for name in ("flash_attn", "flash_attn_interface"):
        module = types.ModuleType(name)
        # The third edition's builds differ in whether they return the log-sum-exp as well.
        returns_pair = name == "flash_attn_interface"
        module.flash_attn_func = (  # type: ignore[attr-defined]
            (lambda *a, **k: (func(*a, **k), None)) if returns_pair else func
        )
        module.flash_attn_varlen_func = varlen_func  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    yield


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_the_documents_are_cut_for_flash_attention_as_sdpa_masks_them(
    fake_flash_attention: None, name: str, isolate: bool
):
    qkv, ids = attention_inputs(3, 11), packed_ids(3, 11)
    flash, sdpa = kernel(name), kernel("sdpa")
    assert flash.name == name
    got = flash.attend(*qkv, flash.prepare(ids, isolate))
    expected = sdpa.attend(*qkv, sdpa.prepare(ids, isolate))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_documents", [1, 62, 63, 64, 65])
def test_the_cuts_are_padded_to_few_lengths_and_always_closed(num_documents: int):
    ids = torch.full((1, 200), 5)
    ids[0, torch.arange(num_documents) * 3] = BOS_ID
    cuts = train_gpt.flash_cu_seqlens(ids, True)
    assert cuts is not None and len(cuts) == (64 if num_documents < 64 else 128)
    expected = [3 * i for i in range(num_documents)]
    assert cuts.tolist() == expected + [200] * (len(cuts) - num_documents)


@pytest.mark.parametrize(
    ("mean_len", "expected"),
    [
        pytest.param(1, {64, 128, 256}, marks=pytest.mark.slow),
        pytest.param(2, {64, 128}, marks=pytest.mark.slow),
        pytest.param(64, {64}, marks=pytest.mark.slow),
    ],
)
def test_warm_up_compiles_every_length_of_cu_seqlens_that_documents_can_need(
    fake_flash_attention: None,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    *,
    mean_len: int,
    expected: set[int],
):
    monkeypatch.setattr(train_gpt, "WARM_UP_MEAN_LEN", mean_len)
    knobs = {"num_layers": 1, "warmup_steps": 2, "isolate_documents": True, "attention": "fa2"}
    run = make_run(**knobs, train_batch_tokens=512)  # two micro-batches of 256 tokens
    trainer, lengths = Trainer(run, random_model(run.cfg)), []
    forward, before = GPT.forward, copy.deepcopy(trainer.model.state_dict())

    def noted(self: GPT, ids_BT: Tensor, *, mask: Tensor) -> Tensor:
        lengths.append(len(mask))
        return forward(self, ids_BT, mask=mask)

    monkeypatch.setattr(GPT, "forward", noted)
    trainer.warm_up()
    assert set(lengths) == expected
    assert len(lengths) == 2 * (2 + len(expected))
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "T", "count"), [(1, 1, 1), (3, 8, 3), (3, 8, 5), (4, 16, 64)])
def test_windows_are_given_a_number_of_documents(rows: int, T: int, count: int):
    window_BT = train_gpt.with_num_documents(torch.randint(5, (rows, T + 1)), count)
    starts_BT = window_BT[:, :-1] == BOS_ID
    starts_BT[:, 0] = True
    assert int(starts_BT.sum()) == count


@pytest.mark.gpu
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("name", ["fa3", "fa2", "flex"])
def test_each_kernel_equals_sdpa_on_the_gpu(name: str, isolate: bool):
    try:
        tested = choose_attention_backend(
            tiny_config(attention=name), torch.device("cuda"), torch.bfloat16
        )
    except InputError as error:
        pytest.skip(str(error))
    if name == "fa3" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FlashAttention-3 needs a Hopper GPU")
    qkv = attention_inputs(2, 256, device="cuda", dtype=torch.bfloat16)
    ids = packed_ids(2, 256).cuda()
    sdpa = kernel("sdpa")
    exact = BlockInputs(*(x.detach().float().requires_grad_() for x in qkv))
    for got, expected in zip(
        values_and_gradients(tested, qkv, ids, isolate),
        values_and_gradients(sdpa, exact, ids, isolate),
        strict=True,
    ):
        # Inputs are equal bf16 numbers; the kernels round products and outputs to 8 bits.
        assert ((got.float() - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("reason, name", [("", "flex"), ("Triton is not installed", "sdpa")])
def test_flex_attention_is_not_chosen_where_it_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, reason: str, name: str
):
    monkeypatch.setattr(train_gpt, "find_flash_attention", lambda *_: (None, "none"))
    monkeypatch.setattr(train_gpt, "compile_unavailable_reason", lambda _: reason)
    cfg = tiny_config(isolate_documents=True, compile=True)
    assert choose_attention_backend(cfg, torch.device("cuda"), torch.bfloat16).name == name


def test_a_kernel_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # makes its import fail
    with pytest.raises(InputError, match="^ATTENTION=fa2 is not installed: .*flash_attn"):
        choose_attention_backend(tiny_config(attention="fa2"), CPU, torch.bfloat16)


def test_flash_attn_without_its_functions_counts_as_not_installed(monkeypatch: pytest.MonkeyPatch):
    # With flash-attn-4 alone, `import flash_attn` finds a namespace package.
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(
        InputError, match="^ATTENTION=fa2 is not installed: .*no attribute 'flash_attn_f"
    ):
        choose_attention_backend(tiny_config(attention="fa2"), CPU, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    cfg = tiny_config(attention="auto", compile=False)
    assert choose_attention_backend(cfg, torch.device("cuda"), torch.bfloat16).name == "sdpa"


def test_the_forward_pass_is_traced_without_a_graph_break():
    model = random_model(config_of("all"))
    ids = random_ids(model.cfg, B=2, T=16)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(ids), model(ids))


def test_flash_attention_is_traced_with_the_sequence_lengths_of_queries_and_keys(
    fake_flash_attention: None, monkeypatch: pytest.MonkeyPatch
):
    class Varlen(torch.autograd.Function):  # as flash-attn has one around its kernel
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor):
            return q + (cu_q + cu_k).sum() * (k + v).repeat_interleave(2, dim=1)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor):
            return grads[0], None, None, None, None

    def varlen_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return Varlen.apply(q, k, v, options["cu_seqlens_q"], options["cu_seqlens_k"])

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", varlen_func)
    qkv, flash = attention_inputs(2, 11), kernel("fa2")
    cuts = flash.prepare(packed_ids(2, 11), True)
    traced = torch.compile(flash.attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*qkv, cuts), flash.attend(*qkv, cuts))


@pytest.mark.parametrize(
    ("attention", "isolate", "chosen"),
    [
        ("auto", False, "sdpa"),
        ("auto", True, "sdpa"),
        ("flex", False, "flex"),
        ("sdpa", True, "sdpa"),
    ],
)
def test_on_a_cpu_sdpa_is_chosen_unless_another_is_named(
    attention: str, isolate: bool, chosen: str
):
    cfg = tiny_config(attention=attention, isolate_documents=isolate, mode="eval")
    assert choose_attention_backend(cfg, CPU, torch.bfloat16).name == chosen


@pytest.mark.parametrize(
    "case",
    [
        ((9, 0), {"fa3", "fa2"}, torch.bfloat16, False, "fa3"),
        ((9, 0), {"fa2"}, torch.bfloat16, True, "fa2"),
        ((8, 0), {"fa3", "fa2"}, torch.bfloat16, False, "fa2"),
        ((10, 0), {"fa4", "fa3", "fa2"}, torch.bfloat16, False, "fa4"),
        ((12, 0), {"fa4", "fa3", "fa2"}, torch.bfloat16, False, "fa2"),
        ((9, 0), {"fa3", "fa2"}, torch.float32, False, "sdpa"),  # they have no float32
        ((9, 0), set(), torch.bfloat16, False, "sdpa"),
        ((9, 0), set(), torch.bfloat16, True, "flex"),
    ],
)
def test_on_a_gpu_the_best_kernel_that_is_installed_is_chosen(
    monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...]
):
    capability, installed, dtype, isolate, chosen = case

    def make(name: str) -> AttentionBackend:
        if name.startswith("fa") and name not in installed:
            raise ImportError(name)
        return AttentionBackend(name, train_gpt.sdpa_mask, train_gpt.sdpa_attend)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(train_gpt, "attention_error", lambda *_: 0.0)
    monkeypatch.setattr(train_gpt, "compile_unavailable_reason", lambda _: "")
    train_gpt.find_flash_attention.cache_clear()
    for name in train_gpt.ATTENTION_BACKENDS:
        fake = functools.partial(make, name)
        monkeypatch.setitem(train_gpt.ATTENTION_BACKENDS, name, fake)
    cfg = tiny_config(isolate_documents=isolate, compile=True)
    found = choose_attention_backend(cfg, torch.device("cuda"), dtype)
    newest = {9: ["fa3"], 10: ["fa4"]}.get(capability[0], ["fa2"])
    assert found.name == chosen
    assert bool(found.reason) == (dtype == torch.bfloat16 and chosen not in newest)


@pytest.mark.parametrize(
    ("fault", "isolate"),
    [("trace", False), *itertools.product(["none", "numbers", "gradient", "crash"], [False, True])],
)
def test_a_kernel_that_computes_something_else_is_not_taken(
    fake_flash_attention: None, monkeypatch: pytest.MonkeyPatch, fault: str, isolate: bool
):
    error_of = train_gpt.attention_error
    name = "flash_attn_varlen_func" if isolate else "flash_attn_func"

    def right(q: Tensor, k: Tensor, v: Tensor, causal: bool, **lengths: Any) -> Tensor:
        attend = functools.partial(train_gpt.sdpa_attend, mask=None)
        if not isolate:
            return attend(q, k, v)
        cuts = lengths["cu_seqlens_q"].tolist()
        spans = [slice(a, b) for a, b in itertools.pairwise(cuts) if b > a]
        return torch.cat([attend(q[s][None], k[s][None], v[s][None])[0] for s in spans])

    def wrong(*args: Any, **options: Any) -> Any:
        if fault == "crash":
            raise RuntimeError("no kernel image")
        if fault == "trace":
            torch._dynamo.graph_break()
        y = right(*args, **options)
        half = y.detach() + 0.9 * (y - y.detach())  # of the right value
        return {"numbers": 1.05 * y, "gradient": half}.get(fault, y)

    fa3, fa2 = sys.modules["flash_attn_interface"], sys.modules["flash_attn"]
    monkeypatch.setattr(fa2, name, right)
    monkeypatch.setattr(fa3, name, wrong)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(train_gpt, "attention_error", lambda b, c, _: error_of(b, c, CPU))
    knobs = {"num_heads": 4, "num_kv_heads": 2, "compile": fault == "trace"}
    cfg = tiny_config(**knobs, isolate_documents=isolate)
    train_gpt.find_flash_attention.cache_clear()
    found = choose_attention_backend(cfg, torch.device("cuda"), torch.bfloat16)
    expected = {"none": "", "crash": "fa3: no kernel image", "trace": "fa3: "}.get(
        fault, "fa3 differs from SDPA by"
    )
    assert found.name == ("fa3" if fault == "none" else "fa2")
    assert found.reason.startswith(expected) and bool(found.reason) == (fault != "none")


def test_flash_attention_comes_from_a_hub_if_it_is_not_installed(
    fake_flash_attention: None, monkeypatch: pytest.MonkeyPatch
):
    asked, module = [], sys.modules["flash_attn_interface"]

    def get_kernel(repository: str, *, version: int) -> Any:
        asked.append((repository, version))
        if len(asked) > 1:
            raise OSError("401 Unauthorized")
        return module

    hub = types.ModuleType("kernels")
    hub.get_kernel = get_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", hub)
    assert kernel("fa3").name == "fa3" and asked == []
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    qkv, ids = attention_inputs(3, 11), packed_ids(3, 11)
    hub_kernel, sdpa = kernel("fa3"), kernel("sdpa")
    assert asked == [("kernels-community/flash-attn3", 1)]
    got = hub_kernel.attend(*qkv, hub_kernel.prepare(ids, True))
    expected = sdpa.attend(*qkv, sdpa.prepare(ids, True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="flash_attn_interface: .*flash-attn3: 401 Unauthorized"):
        choose_attention_backend(tiny_config(attention="fa3"), CPU, torch.bfloat16)


# --- Loss ----------------------------------------------------------------------------------------


def eager_loss(x_ND: Tensor, head_VD: Tensor, targets: Tensor, weights: Tensor, cap: float):
    """The plain formula in float64: all logits at once, torch's own cross-entropy."""
    logits = cap * torch.tanh(x_ND @ head_VD.T / cap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def head_of(model: GPT, cfg: Config) -> nn.Parameter:
    """The weight of the head, by name."""
    return model.get_parameter("tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight")


class StandIn(nn.Module):
    """Gives `x_BTD` in place of a model's forward pass, so that the loss stands alone."""

    def __init__(self, x_BTD: Tensor):
        super().__init__()
        self.x_BTD = x_BTD

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.x_BTD


def loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, x_BTD: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPT.loss on a given final stream: its value, d/dx, d/d(head), and the head."""
    cfg = config_of("untied", logit_softcap=5.0)
    model = random_model(cfg, x_BTD.dtype)
    x_BTD = x_BTD.clone().requires_grad_()
    monkeypatch.setattr(model, "forward", StandIn(x_BTD).forward)
    ids = torch.zeros(targets.shape, dtype=torch.int64)
    loss = model.loss(ids, targets) if weights is None else model.loss(ids, targets, weights)
    (3 * loss).backward()
    head = head_of(model, cfg)
    assert x_BTD.grad is not None and head.grad is not None
    return loss.detach(), x_BTD.grad / 3, head.grad / 3, head.detach()


@pytest.mark.parametrize("chunk_rows", [1, 5, 24, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_chunked_loss_equals_the_plain_formula_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, weighted: bool
):
    monkeypatch.setitem(train_gpt.MAX_LOSS_LOGITS, "cpu", chunk_rows * 40 + 7)  # V = 40
    x_BTD, targets = torch.randn(2, 12, 16), torch.randint(40, (2, 12))
    weights = torch.rand(2, 12) if weighted else None
    if weights is not None:
        weights[0, :5] = 0  # as for targets that are not to be learned from
    loss, grad_x, grad_head, head = loss_and_gradients(monkeypatch, x_BTD, targets, weights)
    exact_x = x_BTD.double().flatten(0, 1).requires_grad_()
    exact_head = head.double().requires_grad_()
    flat = torch.full((24,), 1 / 24) if weights is None else weights.flatten()
    exact = eager_loss(exact_x, exact_head, targets.flatten(), flat.double(), cap=5.0)
    gradients = torch.autograd.grad(exact, [exact_x, exact_head])
    assert loss.dtype == torch.float32 and grad_head.dtype == torch.float32
    # float32 against float64: 24 bits.
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_x.flatten(0, 1).double(), gradients[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_head.double(), gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_the_chunked_loss_in_bf16_is_the_plain_formula_to_bf16_precision(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int
):
    monkeypatch.setitem(train_gpt.MAX_LOSS_LOGITS, "cpu", chunk_rows * 40)
    # As many chunks as 512: a sum of their parts in bf16 would lose what the test asks for.
    x_BTD, targets = torch.randn(2, 256, 16).bfloat16(), torch.randint(40, (2, 256))
    loss, grad_x, grad_head, head = loss_and_gradients(monkeypatch, x_BTD, targets, None)
    exact_x = x_BTD.double().flatten(0, 1).requires_grad_()
    exact_head = head.bfloat16().double().requires_grad_()
    weights = torch.full((512,), 1 / 512, dtype=torch.float64)
    exact = eager_loss(exact_x, exact_head, targets.flatten(), weights, cap=5.0)
    gradients = torch.autograd.grad(exact, [exact_x, exact_head])
    assert grad_x.dtype == torch.bfloat16 and grad_head.dtype == torch.float32
    # A bf16 number is off by at most 2^-9 = 0.2 % of itself; logits and gradients are rounded once.
    assert abs(loss.item() / exact.item() - 1) < 0.002
    for got, wanted in ((grad_x.flatten(0, 1), gradients[0]), (grad_head, gradients[1])):
        assert ((got.double() - wanted).norm() / wanted.norm()).item() < 0.01


def test_the_gradient_of_the_loss_is_its_slope():
    # Central differences in float32: an error of about 1e-7 / 1e-3 in the value, 1e-6 in the step.
    model = random_model(config_of("all"))
    ids = random_ids(model.cfg, B=2, T=9)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        values = []
        for step in (5e-3, -5e-3):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(model.loss(ids[:, :-1], ids[:, 1:]).item())
                parameter.add_(-step * direction)
        slope, expected = (values[0] - values[1]) / 1e-2, parameter.grad.norm().item()
        assert slope == pytest.approx(expected, rel=0.03, abs=1e-3), name


def test_the_loss_is_the_mean_of_the_scores():
    model = random_model(config_of("all"))
    ids = random_ids(model.cfg, B=2, T=17)
    nll = model.eval_nll(ids[:, :-1], ids[:, 1:])
    assert nll.shape == (2, 16) and nll.dtype == torch.float32
    logits = model.logits(ids[:, :-1]).double()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]).detach(), nll.mean())


@pytest.mark.parametrize("chunk_rows", [3, 16, 1000])
def test_scores_from_a_position_on_are_the_last_ones_of_all_scores(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int
):
    model = random_model(config_of("all"))
    ids = random_ids(model.cfg, B=3, T=17)
    whole = model.eval_nll(ids[:, :-1], ids[:, 1:])
    monkeypatch.setitem(train_gpt.MAX_LOGITS, "cpu", chunk_rows * 40)
    for first in (0, 1, 15):
        part = model.eval_nll(ids[:, :-1], ids[:, 1:], first)
        torch.testing.assert_close(part, whole[:, first:], rtol=1e-6, atol=1e-6)


def test_the_probabilities_of_all_tokens_sum_to_1():
    model = random_model(config_of("all"))
    ids = random_ids(model.cfg, B=1, T=8)
    every = torch.arange(40)[:, None].expand(40, 8)
    total = model.eval_nll(ids.expand(40, 8), every).double().neg().exp().sum(dim=0)
    torch.testing.assert_close(total, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_for_more_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    cfg = tiny_config(vocab_size=1000, model_dim=8, num_heads=2, num_layers=1, gate_window=8)
    model = random_model(cfg, dtype)
    ids = random_ids(cfg, B=8, T=33)  # N = 256 targets: 256,000 logits; attention weights: 16,384
    for limits in (train_gpt.MAX_LOGITS, train_gpt.MAX_LOSS_LOGITS):
        monkeypatch.setitem(limits, "cpu", 18_000)
    with LargestTensor() as largest:
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        model.eval_nll(ids[:, :-1], ids[:, 1:])
    assert 17_000 <= largest.numel <= 18_000
    with LargestTensor() as largest:
        model.logits(ids[:, :-1])
    assert largest.numel == 256_000  # the counter sees what the loss avoids


# --- Compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    [  # traced; made machine code
        pytest.param(backend, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor")
    ],
)
def test_scores_agree_compiled_or_not_and_with_or_without_gradients(
    backend: str, monkeypatch: pytest.MonkeyPatch
):
    if backend == "inductor" and (reason := train_gpt.compile_unavailable_reason(CPU)):
        pytest.skip(reason)
    compile_with = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile_with)
    torch.compiler.reset()
    kinds = 2 if backend == "inductor" else 1  # of blocks: a graph each
    cfg = config_of("all", num_layers=3, xsa_last_n=3 if kinds == 1 else 1)
    eager, compiled = random_model(cfg), random_model(cfg)
    compiled.compile_()
    ids = random_ids(cfg, B=2, T=17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    expected = eager.eval_nll(inputs, targets)
    with torch.inference_mode():
        scores = {"eager, inference_mode": eager.eval_nll(inputs, targets)}
        scores["compiled, inference_mode"] = compiled.eval_nll(inputs, targets)
    scores["compiled, no_grad"] = compiled.eval_nll(inputs, targets)
    for name, nll in scores.items():
        torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5, msg=name)
    losses = []
    for model in (eager, compiled):
        loss = model.loss(inputs, targets)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)
    counters = torch._dynamo.utils.counters["frames"]
    assert counters["ok"] > 0 and counters["ok"] == counters["total"]  # all of it was compiled


@pytest.mark.parametrize("compiler", ["/opt/none/g++", "/bin/false", "/bin/true", "/tmp", "a\nb"])
def test_a_compiler_that_does_not_work_is_none(compiler: str):
    with torch._inductor.config.patch({"cpp.cxx": (None, compiler)}):
        reason = train_gpt.compile_unavailable_reason(CPU)
    assert f"no working C++ compiler ({compiler})" in reason


@pytest.mark.parametrize("script", ["echo g++ 12.2", 'exec g++ -nostdinc++ "$@"', "cat"])
def test_a_compiler_that_answers_without_compiling_is_none(tmp_path: Path, script: str):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        assert "no working C++ compiler" in train_gpt.compile_unavailable_reason(CPU)


def test_without_a_compiler_the_run_says_so_and_goes_on(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(train_gpt, "compile_unavailable_reason", lambda device: "no compiler")
    run = make_run(compile=True)
    model = build_model(run)
    text = '"the model is not compiled: no compiler; training will be slower"'
    assert capsys.readouterr().out == f"warning text:{text}\n"
    assert model.nll is train_gpt.softcapped_cross_entropy
    ids = random_ids(run.cfg, B=1, T=9)
    assert math.isfinite(model.loss(ids[:, :-1], ids[:, 1:]).item())


# --- Plan, parameters, initialization ------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "plan"),
    [
        (1, "0"),
        (2, "0> 1(0)"),
        (3, "0> 1(0) 2"),
        (9, "0> 1> 2> 3> 4(0) 5(1) 6(2) 7(3) 8"),
        (10, "0> 1> 2> 3> 4> 5(0) 6(1) 7(2) 8(3) 9(4)"),
        (11, "0> 1> 2> 3> 4> 5(0) 6(1) 7(2) 8(3) 9(4) 10"),
    ],
)
def test_the_visits_form_a_u_net(num_layers: int, plan: str):
    visits = layer_schedule(num_layers)
    assert train_gpt.format_schedule(visits) == plan
    assert visits[0] == LayerCall(block=0, skip=None, save=num_layers > 1)


def test_every_saved_output_is_used_once_and_the_last_saved_first():
    for num_layers in range(1, 30):
        visits = layer_schedule(num_layers)
        stack: list[int] = []
        used: list[tuple[int, int]] = []
        for visit in visits:
            if visit.skip is not None:
                used.append((visit.skip, stack.pop()))
            if visit.save:
                stack.append(visit.block)
        assert not stack and [visit.block for visit in visits] == list(range(num_layers))
        half = num_layers // 2
        assert used == [(row, half - 1 - row) for row in range(half)]


def count(cfg: Config) -> int:
    """Parameters of the model of `cfg`, without memory for them."""
    with torch.device("meta"):
        model = GPT(cfg, kernel("sdpa"), torch.float32)
    return sum(p.numel() for p in model.parameters())


def test_the_baseline_has_exactly_17_059_912_parameters():
    assert count(plain_config()) == 17_059_912


def test_each_option_adds_the_parameters_that_its_description_says():
    base, D, V, L = count(plain_config()), 512, 1024, 9
    assert count(plain_config(tie_embeddings=False)) - base == V * D
    assert count(plain_config(skip_gates=True)) - base == (L // 2) * D
    assert count(plain_config(xsa_last_n=9, rope_dims=16, ln_scale=True, leaky_slope=0.5)) == base
    assert count(plain_config(mlp_mult=3.0)) - base == L * 2 * D * D
    block = 2 * D * D + 2 * D * 256 + 2 * D * 1024 + 8 + 4 * D
    assert count(plain_config(num_layers=10)) - base == block + D  # one more skip as well
    assert count(plain_config(num_layers=11)) - base == 2 * block + D


def test_every_parameter_has_exactly_one_role():
    cfg = config_of("all")
    roles = parameter_roles(random_model(cfg))
    layers = [f"blocks.{i}." for i in range(5)]
    expected = {"tok_emb.weight": ("token", "embed"), "lm_head.weight": ("head", "embed")}
    for p in layers:
        attn = ("c_q.weight", "c_k.weight", "c_v.weight", "proj.weight")
        expected |= {f"{p}attn.{name}": ("matrix", "attn") for name in attn}
        expected |= {f"{p}mlp.{name}.weight": ("matrix", "mlp") for name in ("fc", "proj")}
        scalars = ("attn.q_gain", "attn_scale", "mlp_scale", "resid_mix")
        expected |= {f"{p}{name}": ("scalar", "control") for name in scalars}
    expected |= {name: ("scalar", "control") for name in ("skip_weights", "skip_gates")}
    assert {name: tuple(role) for name, role in roles.items()} == expected


def test_a_new_module_outside_the_blocks_gets_a_role_too():
    model = random_model(config_of("baseline"))
    model.table = nn.Embedding(8, 4)
    model.gate = nn.Parameter(torch.zeros(3))
    roles = parameter_roles(model)
    assert roles["table.weight"].optim_group == "token" and roles["gate"].optim_group == "scalar"


def test_a_parameter_that_would_not_be_trained_is_refused():
    model = random_model(config_of("baseline"))
    model.get_parameter("blocks.2.attn_scale").requires_grad_(False)
    with pytest.raises(AssertionError, match="attn_scale"):
        parameter_roles(model)


@pytest.mark.parametrize("variant", ["baseline", "all"])
def test_the_gradient_reaches_every_parameter_after_two_steps(variant: str, make_run: MakeRun):
    # Zero output projections hold back what lies before them for one step.
    run = make_run(**{**SHAPE, **VARIANTS[variant]})
    model = build_model(run)
    trainer = Trainer(run, model)
    window = random_ids(run.cfg, B=2, T=17)
    for _ in range(2):
        trainer.step(window)
    model.loss(window[:, :-1], window[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 1e-8, name


def test_initial_weights_are_those_of_the_baseline(make_run: MakeRun):
    cfg = dict(vocab_size=1000, model_dim=128, num_layers=4, qk_gain_init=4.0)
    model = build_model(make_run(**cfg, skip_gates=True))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    embedding = weights.pop("tok_emb.weight")
    # 128,000 draws: the standard deviation is known to 0.2 %, the mean to 0.3 % of it.
    assert embedding.std().item() == pytest.approx(0.005, rel=0.02)
    assert abs(embedding.mean().item()) < 0.02 * 0.005
    for name, weight in weights.items():
        if name.endswith("proj.weight") or name == "skip_gates":
            assert (weight == 0).all(), name
        elif name.endswith("resid_mix"):
            assert (weight[0] == 1).all() and (weight[1] == 0).all()
        elif name.endswith("q_gain"):
            assert (weight == 4.0).all()
        elif name.endswith("weight"):
            bound = weight.shape[1] ** -0.5  # uniform in +-1/sqrt(fan_in)
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
        else:
            assert (weight == 1).all(), name


def test_an_untied_head_starts_at_zero_so_that_the_first_loss_is_ln_v(make_run: MakeRun):
    model = build_model(make_run(tie_embeddings=False))
    assert (model.get_parameter("lm_head.weight") == 0).all()
    assert model.get_parameter("tok_emb.weight").std().item() == pytest.approx(1.0, rel=0.05)
    ids = random_ids(model.cfg, B=2, T=17)
    nll = model.eval_nll(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(nll, torch.full_like(nll, math.log(320)))


def test_orthogonal_init_makes_large_matrices_orthogonal_and_leaves_the_others(make_run: MakeRun):
    model = build_model(make_run(init="orthogonal", model_dim=128, num_layers=2))
    for name, weight in ((n, p.detach()) for n, p in model.named_parameters()):
        if name.endswith("proj.weight"):
            assert (weight == 0).all()
        elif name.startswith("blocks.") and name.endswith("weight"):  # all are 64 x 128 or larger
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    small = build_model(make_run(init="orthogonal")).get_parameter("blocks.0.attn.c_q.weight")
    assert (small @ small.T - torch.eye(32)).abs().max() > 0.1


def test_the_seed_decides_the_initial_weights(make_run: MakeRun):
    first, again, other = (
        torch.cat([p.flatten() for p in build_model(make_run(seed=seed)).parameters()])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("variant", ["baseline", "untied", "one_kv_head", "mlp", "two_layers"])
def test_the_matrix_flops_of_a_token_are_those_that_torch_counts(variant: str):
    cfg = config_of(variant)
    model = random_model(cfg)
    ids = random_ids(cfg, B=1, T=17)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.bmm))
    matrices, attention = flops_per_token(cfg)
    assert products == 16 * matrices
    # Two products of E channels with the mean context, forward once and backward twice.
    mean_context = sum(range(16)) / 16 + 0.5
    assert attention == 6 * cfg.num_layers * 2 * cfg.model_dim * mean_context


def test_randomized_weights_of_equal_seeds_are_equal():
    # The other tests compare models that are made twice.
    a, b = random_model(config_of("all"), seed=3), random_model(config_of("all"), seed=3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    randomize_(b, seed=4)
    assert not torch.equal(a.skip_weights, b.skip_weights)
