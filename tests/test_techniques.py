"""Every architecture technique: its parameters, its formula, what it must not read.

One table lists the techniques and their combinations; each test runs over all of it. The reference
below is written from the published descriptions, in float64, one row of ids at a time, with
Python integers for the hashes and explicit loops for blocks, heads and lanes; nothing of it is
shared with the script. Float32 differs from it by rounding, about 1e-6 of nats of size 10.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import train_gpt
from tests.conftest import MakeRun, random_model, randomize_, tiny_config
from train_gpt import (
    BOS_ID,
    GPT,
    CastedLinear,
    Config,
    InputError,
    Trainer,
    build_model,
    choose_attention_backend,
    encode_artifact,
    exclusive_self_attention,
    layer_schedule,
    quantize_model,
    read_artifact,
    train_stages,
)

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "num_layers": 5, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2,
    "train_seq_len": 16, "train_batch_tokens": 32,
}  # fmt: skip
V, L, D, H, KV = 64, 5, 32, 4, 16  # KV: channels of all values
Added = dict[str, tuple[tuple[int, ...], float | None]]


class Technique(NamedTuple):
    """Knobs, the parameters they add with shape and constant initial value, and what that means."""

    knobs: dict[str, Any]
    added: Added = {}
    identity: bool = False  # whether the initial values change nothing, to the bit
    unused: dict[str, int] = {}  # rows of a parameter that no visit uses, from the first one on


def each_block(name: str, shape: tuple[int, ...], value: float) -> Added:
    """The same parameter in every block."""
    return {f"blocks.{i}.{name}": (shape, value) for i in range(L)}


def hashed(place: int, rows: int, dim: int) -> Added:
    """Table and projection of a hashed embedding."""
    table, proj = f"hashes.{place}.table.weight", f"hashes.{place}.proj.weight"
    return {table: ((rows, dim), 0.0), proj: ((D, dim), None)}


def lanes(carry: float) -> Added:
    """Factors of two lanes that are fully routed."""
    return {"block_scalars.write": ((L, 2, 2), 1.0), "block_scalars.carry": ((L, 2), carry)}


BIGRAM = {"bigram_vocab_size": 50, "bigram_dim": 8}
TRIGRAM = {"trigram_vocab_size": 70, "trigram_dim": 8}
VALUES = {"ve_layers": "1,4", "ve_dim": 8}
LOOPS = {"num_loops": 2, "loop_start": 1, "loop_end": 2}
SPARSE = {"attn_gate": "sparse", "sparse_attn_gate_scale": 0.5}
SINGLE: dict[str, Technique] = {
    "smear_blend": Technique({"smear_gate": "blend"}, {"smear.gate": ((D,), 0.0)}),
    "smear_lambda": Technique(
        {"smear_gate": "lambda"}, {"smear.gate": ((12,), 0.0), "smear.scale": ((), 0.0)}, True),
    "bigram": Technique(BIGRAM, {**hashed(0, 50, 8), "hashes.0.scale": ((), 0.05)}, True),
    "trigram": Technique(TRIGRAM, hashed(0, 70, 8), True),
    "trigram_polynomial": Technique(
        {**TRIGRAM, "trigram_hash": "polynomial"}, hashed(0, 70, 8), True),
    "xsa_last": Technique({"xsa_last_n": 2}),
    "xsa_some": Technique({"xsa_layers": "0,2"}),
    "xsa_both": Technique({"xsa_layers": "0-1,3", "xsa_last_n": 1}),
    "xsa_everywhere": Technique({"xsa_last_n": 5, "num_kv_heads": 1}),
    "gate_head": Technique(
        {"attn_gate": "head"}, each_block("attn.gate.weight", (H,), 1.0), True),
    "gate_input": Technique(
        {"attn_gate": "input"}, {**each_block("attn.gate.weight", (H, D), 0.0),
                                 **each_block("attn.gate.bias", (H,), 4.0)}),
    "gate_window": Technique(
        {"attn_gate": "window"}, each_block("attn.gate.weight", (H, 12), 0.0), True),
    "gate_sparse": Technique(SPARSE, each_block("attn.gate.weight", (H, 12), 0.0)),
    "resformer": Technique(
        {"value_residual": "resformer"}, {"block_scalars.value": ((L - 1, 2), 0.5)}),
    "vrl": Technique({"value_residual": "vrl"}, {"block_scalars.value": ((L - 1, 1), 0.0)}, True),
    "x0": Technique({"value_residual": "x0"}, {"block_scalars.x0": ((L,), 0.0)}, True),
    "value_embedding": Technique(
        VALUES, {"ve_table.weight": ((V, 8), None), "ve_scale": ((), 0.1),
                 "ve_proj.weight": ((KV, 8), None), "block_scalars.shared": ((2,), 1.0)}),
    "skip_gates": Technique({"skip_gates": True}, {"skip_gates": ((2, D), 0.0)}),
    "phase": Technique({"resid_mix_init": "phase"}),
    "overtone": Technique({"embed_init": "overtone"}),
    "loops": Technique(LOOPS, {"skip_weights": ((4, D), 1.0)}),
    "loops_gated": Technique(
        {**LOOPS, "skip_gates": True},
        {"skip_weights": ((4, D), 1.0), "skip_gates": ((4, D), 0.0)}),
    "stream": Technique({"parallel_residual": "stream", "parallel_start_layer": 3}),
    "merge": Technique(
        {"parallel_residual": "merge", "parallel_start_layer": 3},
        {"block_scalars.merge": ((), 0.5)}),
    "routed": Technique(
        {"parallel_residual": "routed", "parallel_start_layer": 3}, lanes(math.sqrt(1.1)),
        unused={"block_scalars.write": 3, "block_scalars.carry": 3}),
    "lanes": Technique(
        {"parallel_residual": "lanes", "parallel_start_layer": 3}, lanes(1.1),
        unused={"block_scalars.write": 3, "block_scalars.carry": 3}),
    "asym": Technique({"asym_logit_rescale": True}, {"caps": ((2,), 30.0)}, True),
}  # fmt: skip
COMMON: dict[str, Any] = {"ln_scale": True, "leaky_slope": 0.5, "rope_dims": 4, "xsa_last_n": 5}
UNUSED_2 = {"block_scalars.write": 2, "block_scalars.carry": 2}
COMBINED: dict[str, Technique] = {
    "frontier": Technique(
        {**COMMON, **SPARSE, "smear_gate": "lambda", "asym_logit_rescale": True, "num_loops": 2,
         "loop_start": 1, "loop_end": 2, "skip_gates": True, "parallel_residual": "lanes",
         "parallel_start_layer": 3},
        unused={"block_scalars.write": 3, "block_scalars.carry": 3}),
    "seed_000": Technique(
        {**BIGRAM, **TRIGRAM, "trigram_hash": "polynomial", "xsa_last_n": 4, "mlp_mult": 3.0,
         "smear_gate": "blend"}),
    "seed_001": Technique(
        {**COMMON, **BIGRAM, **VALUES, "xsa_last_n": 3, "num_kv_heads": 4, "mlp_mult": 3.5,
         "attn_gate": "head", "value_residual": "x0", "smear_gate": "blend"}),
    "seed_002": Technique(
        {**COMMON, **LOOPS, "skip_gates": True, "parallel_residual": "stream",
         "parallel_start_layer": 3}),
    "seed_003": Technique(
        {"xsa_last_n": 4, "value_residual": "vrl", "smear_gate": "blend", "embed_init": "overtone",
         "resid_mix_init": "phase"}),
    "everything_merge": Technique(
        {**COMMON, **BIGRAM, **TRIGRAM, **VALUES, **LOOPS, "smear_gate": "blend",
         "value_residual": "vrl", "attn_gate": "input", "skip_gates": True,
         "asym_logit_rescale": True, "parallel_residual": "merge", "parallel_start_layer": 2}),
    "everything_routed": Technique(
        {**COMMON, **BIGRAM, **TRIGRAM, **VALUES, **LOOPS, "smear_gate": "lambda",
         "value_residual": "resformer", "attn_gate": "window", "skip_gates": True,
         "asym_logit_rescale": True, "parallel_residual": "routed", "parallel_start_layer": 3,
         "tie_embeddings": False},
        unused={"block_scalars.write": 3, "block_scalars.carry": 3}),
}  # fmt: skip
TECHNIQUES = {**SINGLE, **COMBINED}
each_technique = pytest.mark.parametrize("name", TECHNIQUES)
slow = pytest.mark.slow


def slow_unless_combined(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: combinations of techniques, and slow ones of single techniques."""
    return [pytest.param(name, marks=[slow] * (name not in COMBINED), id=name) for name in names]


each_combination = pytest.mark.parametrize("name", slow_unless_combined(TECHNIQUES))


def config_of(name: str, **changes: Any) -> Config:
    """A configuration of 5 layers x 32 channels with the technique."""
    return tiny_config(**{**SHAPE, **TECHNIQUES[name].knobs, **changes})


def new_model(cfg: Config) -> GPT:
    """A model with the initial weights of the seed that is set."""
    return GPT(cfg, choose_attention_backend(cfg, CPU, torch.float32), torch.float32)


def scrambled(cfg: Config, seed: int = 0) -> GPT:
    """A model with all parameters random: projections of zero would hide what is before."""
    model = random_model(cfg, seed=seed)
    if model.caps is not None:
        model.caps.data = torch.tensor([9.0, 5.0])  # a cap near 1 would flatten all
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids (rows, length) in which about every fifth is BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.2, BOS_ID, ids)


def nats(model: GPT, ids_BT: Tensor) -> Tensor:
    """Nats (B, T - 1) of every token but the first."""
    return model.eval_nll(ids_BT[:, :-1], ids_BT[:, 1:])


# --- The reference -------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    """Unit mean square over the last dimension."""
    return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


class Reference:
    """The model on one row of ids, in float64, from the specification."""

    def __init__(self, model: GPT, ids: list[int], loops: int | None = None):
        self.cfg, self.ids, self.T = model.cfg, ids, len(ids)
        self.loops = self.cfg.num_loops if loops is None else loops
        self.w = {name: p.detach().double() for name, p in model.named_parameters()}
        isolate = self.cfg.isolate_documents
        self.start = [
            max((s for s in range(t + 1) if isolate and ids[s] == BOS_ID), default=0)
            for t in range(self.T)]  # fmt: skip
        self.x0 = self.embedded()
        # Values of block 0 from the smeared embedding (11.3: the same as block 0's own).
        m0, m1 = self.w["blocks.0.resid_mix"]
        n = self.normed(0, m0 * self.x0 + m1 * self.x0)
        self.first_v = n @ self.w["blocks.0.attn.c_v.weight"].T

    def bigram_row(self, t: int, rows: int) -> int:
        if t - self.start[t] < 1:
            return rows - 1
        return ((36313 * self.ids[t]) ^ (27191 * self.ids[t - 1])) % (rows - 1)

    def trigram_row(self, t: int, rows: int) -> int:
        now, back, back2 = (self.ids[s] if s >= 0 else 0 for s in (t, t - 1, t - 2))
        if self.cfg.trigram_hash == "polynomial":
            back2 = now if t == 0 else back2  # what torch.roll leaves at the row's beginning
            return (961 * back2 + 31 * back + now) % rows
        if t - self.start[t] < 2:
            return rows - 1
        return ((36313 * now) ^ (27191 * back) ^ (51497 * back2)) % (rows - 1)

    def embedded(self) -> Tensor:
        """x0 (T, D)."""
        cfg, w = self.cfg, self.w
        x = torch.stack([w["tok_emb.weight"][i] for i in self.ids])
        place = 0
        if rows := cfg.bigram_vocab_size:
            table = w["hashes.0.table.weight"]
            e = torch.stack([table[self.bigram_row(t, rows)] for t in range(self.T)])
            x = x + w["hashes.0.scale"] * (e @ w["hashes.0.proj.weight"].T)
            place = 1
        if rows := cfg.trigram_vocab_size:
            table = w[f"hashes.{place}.table.weight"]
            e = torch.stack([table[self.trigram_row(t, rows)] for t in range(self.T)])
            x = x + e @ w[f"hashes.{place}.proj.weight"].T
        if cfg.smear_gate == "lambda":
            return rms(self.smeared(x))
        return rms(x) if cfg.smear_gate == "none" else self.smeared(rms(x))

    def smeared(self, x: Tensor) -> Tensor:
        gate, rows = self.w["smear.gate"], []
        for t in range(self.T):
            takes = t > 0 and self.ids[t] != BOS_ID
            before = x[t - 1] if takes else torch.zeros_like(x[t])
            if self.cfg.smear_gate == "blend":
                g = torch.sigmoid(gate)
                rows.append((1 - g) * x[t] + g * before)
            else:
                g = torch.sigmoid(gate @ x[t, :12])
                rows.append(x[t] + self.w["smear.scale"] * g * before)
        return torch.stack(rows)

    def normed(self, layer: int, u: Tensor) -> Tensor:
        return rms(u) / math.sqrt(layer + 1) if self.cfg.ln_scale else rms(u)

    def rotated(self, x: Tensor) -> Tensor:
        """Pairs (j, j + R/2) of (T, E), turned by t * base^(-2j/R)."""
        R = self.cfg.rope_dims or x.shape[1]
        y = x.clone()
        for j in range(R // 2):
            angle = torch.arange(self.T).double() * self.cfg.rope_base ** (-2 * j / R)
            a, b = x[:, j], x[:, j + R // 2]
            y[:, j] = a * angle.cos() + b * angle.sin()
            y[:, j + R // 2] = b * angle.cos() - a * angle.sin()
        return y

    def values(self, layer: int, n: Tensor) -> Tensor:
        """Final values (T, heads * E)."""
        cfg, w = self.cfg, self.w
        v = n @ w[f"blocks.{layer}.attn.c_v.weight"].T
        if cfg.value_residual == "resformer" and layer > 0:
            of_first, of_own = w["block_scalars.value"][layer - 1]
            v = of_first * self.first_v + of_own * v
        if cfg.value_residual == "vrl" and layer > 0:
            v = v + w["block_scalars.value"][layer - 1, 0] * self.first_v
        chosen = [int(number) for number in cfg.ve_layers.split(",") if number]
        if layer in chosen:
            e = torch.stack([w["ve_table.weight"][i] for i in self.ids])
            e = w["ve_scale"] * (e @ w["ve_proj.weight"].T)
            v = v + w["block_scalars.shared"][chosen.index(layer)] * e
        return v

    def gated(self, layer: int, y: Tensor, n: Tensor) -> Tensor:
        """Head outputs (T, H, E) times their gates."""
        kind, p = self.cfg.attn_gate, f"blocks.{layer}.attn.gate."
        if kind == "none":
            return y
        weight = self.w[p + "weight"]
        if kind == "head":
            return y * weight[None, :, None]
        if kind == "input":
            gate = torch.sigmoid(n @ weight.T + self.w[p + "bias"])
        elif kind == "window":
            gate = 2 * torch.sigmoid(n[:, :12] @ weight.T)
        else:
            gate = torch.sigmoid(self.cfg.sparse_attn_gate_scale * (n[:, :12] @ weight.T))
        return y * gate[:, :, None]

    def has_xsa(self, layer: int) -> bool:
        listed = {"": [], "0,2": [0, 2], "0-1,3": [0, 1, 3]}[self.cfg.xsa_layers]
        return layer in listed or layer >= self.cfg.num_layers - self.cfg.xsa_last_n

    def attention(self, layer: int, u: Tensor) -> Tensor:
        """a * Attn(norm(u)), (T, D)."""
        cfg, w, p = self.cfg, self.w, f"blocks.{layer}.attn."
        n, E, group = self.normed(layer, u), D // H, H // cfg.num_kv_heads
        q, k = ((n @ w[p + f"c_{c}.weight"].T).view(self.T, -1, E) for c in "qk")
        v = self.values(layer, n).view(self.T, -1, E)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # one for each query head
        heads = []
        for h in range(H):
            q_h = self.rotated(rms(q[:, h])) * w[p + "q_gain"][h]
            score = q_h @ self.rotated(rms(k[:, h])).T / math.sqrt(E)
            for t in range(self.T):
                score[t, t + 1 :] = score[t, : self.start[t]] = -math.inf
            y = score.softmax(dim=1) @ v[:, h]
            if self.has_xsa(layer):
                unit = v[:, h] / v[:, h].norm(dim=1, keepdim=True).clamp_min(1e-12)
                y = y - (y * unit).sum(dim=1, keepdim=True) * unit
            heads.append(y)
        y = self.gated(layer, torch.stack(heads, dim=1), n).reshape(self.T, -1)
        return w[f"blocks.{layer}.attn_scale"] * (y @ w[p + "proj.weight"].T)

    def thought(self, layer: int, u: Tensor) -> Tensor:
        """b * MLP(norm(u)), (T, D)."""
        w, p = self.w, f"blocks.{layer}.mlp"
        h = self.normed(layer, u) @ w[p + ".fc.weight"].T
        h = torch.where(h > 0, h, self.cfg.leaky_slope * h).square()
        return w[p + "_scale"] * (h @ w[p + ".proj.weight"].T)

    def mix_x0(self, layer: int, x: Tensor) -> Tensor:
        m0, m1 = self.w[f"blocks.{layer}.resid_mix"]
        return m0 * x + m1 * self.x0

    def one_stream(self, layer: int, x: Tensor) -> Tensor:
        u = self.mix_x0(layer, x)
        x = u + self.attention(layer, u)
        side_by_side = self.cfg.parallel_residual == "stream"
        if side_by_side and layer >= self.cfg.parallel_start_layer:
            x = x + self.thought(layer, u)
        else:
            x = x + self.thought(layer, x)
        if self.cfg.value_residual == "x0":
            x = x + self.w["block_scalars.x0"][layer] * self.x0
        return x

    def two_lanes(self, layer: int, X0: Tensor, X1: Tensor) -> tuple[Tensor, Tensor]:
        """One block of each of the forms (b), (c) and A2's."""
        kind = self.cfg.parallel_residual
        if kind == "merge":
            u = self.mix_x0(layer, X0)
            return u + self.attention(layer, u), X1 + self.thought(layer, X1)
        P, rho = self.w["block_scalars.write"][layer], self.w["block_scalars.carry"][layer]
        o = self.attention(layer, self.mix_x0(layer, X0))
        if kind == "lanes":
            m = self.thought(layer, X1)
            return (rho[0] * X0 + P[0, 0] * o + P[1, 0] * m,
                    rho[1] * X1 + P[0, 1] * o + P[1, 1] * m)  # fmt: skip
        X0, X1 = rho[0] * X0 + P[0, 0] * o, rho[0] * X1 + P[0, 1] * o
        m = self.thought(layer, self.mix_x0(layer, X1))
        return rho[1] * X0 + P[1, 0] * m, rho[1] * X1 + P[1, 1] * m

    def skipped(self, row: int, x: Tensor, saved: Tensor) -> Tensor:
        u = self.w["skip_weights"][row] * saved
        if not self.cfg.skip_gates:
            return x + u
        gate = torch.sigmoid(self.w["skip_gates"][row])
        return (1 - gate) * u + gate * x

    def order(self) -> list[int]:
        """Blocks in the order in which they run."""
        cfg, order = self.cfg, []
        for layer in range(cfg.num_layers):
            order.append(layer)
            if self.loops and layer == cfg.loop_end:
                for _ in range(self.loops):
                    order += list(range(cfg.loop_start, cfg.loop_end + 1))
        return order

    def stream(self) -> Tensor:
        """What the head reads, (T, D)."""
        cfg, order = self.cfg, self.order()
        x, stack, half = self.x0, [], len(order) // 2
        for layer in order[:half]:
            x = self.one_stream(layer, x)
            stack.append(x)
        other: Tensor | None = None
        for row, layer in enumerate(order[half:]):
            has_lanes = cfg.parallel_residual in ("merge", "routed", "lanes")
            splits = has_lanes and other is None and layer >= cfg.parallel_start_layer
            if splits and cfg.parallel_residual == "lanes":
                other = x  # before the skip, which reaches lane 0 only
            if stack:
                saved = stack.pop()
                x = self.skipped(row, x, saved)
                if other is not None and cfg.parallel_residual == "routed":
                    other = self.skipped(row, other, saved)
            if splits and cfg.parallel_residual != "lanes":
                other = x
            if other is None:
                x = self.one_stream(layer, x)
            else:
                x, other = self.two_lanes(layer, x, other)
        if other is not None:
            mu = self.w.get("block_scalars.merge", torch.tensor(0.5).double())
            x = mu * x + (1 - mu) * other
        return rms(x)

    def nats(self) -> Tensor:
        """Nats (T - 1) of every token but the first."""
        head = self.w["tok_emb.weight" if self.cfg.tie_embeddings else "lm_head.weight"]
        z = self.stream() @ head.T
        up, down = self.w["caps"] if self.cfg.asym_logit_rescale else [self.cfg.logit_softcap] * 2
        z = torch.where(z > 0, up * torch.tanh(z / up), down * torch.tanh(z / down))
        p = z.softmax(dim=1)
        return torch.stack([-p[t, self.ids[t + 1]].log() for t in range(self.T - 1)])


# The polynomial hash knows no documents: see the test of isolation.
AS_SPECIFIED = [
    pytest.param(name, isolate, marks=[slow] * (isolate and name in SINGLE), id=f"{name}-{isolate}")
    for name in TECHNIQUES
    for isolate in (False, True)
    if not isolate or "polynomial" not in TECHNIQUES[name].knobs.values()
]


@pytest.mark.parametrize(("name", "isolate"), AS_SPECIFIED)
def test_nats_are_those_of_a_plain_forward_written_from_the_specification(name: str, isolate: bool):
    model = scrambled(config_of(name, isolate_documents=isolate))
    ids = random_ids(2, 14)
    expected = torch.stack([Reference(model, row.tolist()).nats() for row in ids])
    assert expected.std() > 1  # they do depend on the tokens
    torch.testing.assert_close(nats(model, ids).double(), expected, rtol=0, atol=1e-4)


@each_technique
def test_at_initialization_too_nats_are_those_of_the_plain_forward(name: str):
    # The added parameters keep their initial values, while all others are random.
    model = scrambled(config_of(name))
    fresh = new_model(model.cfg).state_dict()
    added = TECHNIQUES[name].added.keys()
    model.load_state_dict({k: v for k, v in fresh.items() if k in added}, strict=False)
    ids = random_ids(1, 14)
    expected = Reference(model, ids[0].tolist()).nats()
    torch.testing.assert_close(nats(model, ids)[0].double(), expected, rtol=0, atol=1e-4)


def test_every_technique_changes_the_nats_by_more_than_rounding():
    # Otherwise the tests above could pass with a knob that does nothing on both sides.
    ids, found = random_ids(2, 14), {}
    for name in (set(SINGLE) - {"phase", "overtone"}) | {"none"}:
        cfg = tiny_config(**SHAPE) if name == "none" else config_of(name)
        model = scrambled(cfg)
        donor = scrambled(tiny_config(**{**SHAPE, "num_kv_heads": cfg.num_kv_heads}))
        shared = {k: v for k, v in donor.state_dict().items() if k != "skip_weights"}
        model.load_state_dict(shared, strict=False)
        found[name] = nats(model, ids)
    for name, own in found.items():
        near = {k for k in found if (found[k] - own).abs().max() < 1e-2}
        assert near == {name}


@each_combination
def test_in_bf16_nats_are_those_of_float32_to_bf16_precision(name: str):
    cfg = config_of(name)
    full, half = scrambled(cfg), scrambled(cfg)
    half.dtype = torch.bfloat16
    ids = random_ids(2, 17)
    assert half(ids[:, :-1]).dtype == torch.bfloat16  # no part raises the stream to float32
    expected = nats(full, ids)
    # 0.4 % a rounding, some dozens of them; random sharp gates and caps of 5 to 30 enlarge it.
    assert ((nats(half, ids) - expected).norm() / expected.norm()).item() < 0.06
    half.loss(ids[:, :-1], ids[:, 1:]).backward()
    for key, parameter in half.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.dtype == torch.float32 and grad.isfinite().all(), key


# --- Parameters and initial values ---------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_a_technique_adds_the_parameters_of_its_description_at_their_initial_values(name: str):
    cfg = config_of(name)
    model = new_model(cfg)
    off = new_model(tiny_config(**{**SHAPE, "num_kv_heads": cfg.num_kv_heads}))
    before = {k: p.shape for k, p in off.named_parameters()}
    changed = {k: p for k, p in model.named_parameters() if before.get(k) != p.shape}
    assert before.keys() <= dict(model.named_parameters()).keys()
    added = SINGLE[name].added
    assert {k: tuple(p.shape) for k, p in changed.items()} == {k: v[0] for k, v in added.items()}
    for key, (_, value) in added.items():
        if value is not None:
            assert (changed[key] == torch.tensor(value)).all(), key


def test_of_a_hashed_and_of_a_value_embedding_exactly_the_named_factors_are_zero():
    model = new_model(config_of("everything_merge"))
    assert len(model.hashes) == 2
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for place in range(2):
        assert (weights[f"hashes.{place}.table.weight"] == 0).all()
    for name in ("hashes.0.proj", "hashes.1.proj", "ve_proj"):  # orthonormal columns
        proj = weights[f"{name}.weight"]
        torch.testing.assert_close(proj.T @ proj, torch.eye(8), rtol=0, atol=1e-5)
    table = weights["ve_table.weight"]
    assert table.std().item() == pytest.approx(0.01, rel=0.15)  # 512 numbers: 3 % a deviation


@pytest.mark.parametrize("name", [name for name in SINGLE if SINGLE[name].identity])
def test_a_technique_that_starts_as_the_identity_changes_no_bit_at_first(name: str):
    off = scrambled(tiny_config(**SHAPE))
    on = new_model(config_of(name))
    on.load_state_dict(off.state_dict(), strict=False)
    ids = random_ids(2, 17)
    assert torch.equal(nats(on, ids), nats(off, ids))
    for key in SINGLE[name].added:  # while other values of what it added do change something
        randomize_(nn.ParameterList([on.get_parameter(key)]))
    assert not torch.equal(nats(on, ids), nats(off, ids))


def test_the_blend_smear_is_an_even_blend_at_first_except_at_a_document_s_start():
    on, off = (new_model(tiny_config(**SHAPE, smear_gate=kind)) for kind in ("blend", "none"))
    on.load_state_dict(off.state_dict(), strict=False)
    ids = torch.tensor([[5, 6, 7, BOS_ID, 9, 10]])
    x, smeared = off.embed(ids)[0], on.embed(ids)[0]
    for t, before in enumerate([None, 0, 1, None, 3, 4]):
        expected = 0.5 * x[t] + (0 if before is None else 0.5 * x[before])
        torch.testing.assert_close(smeared[t], expected)


@pytest.mark.parametrize(
    ("name", "factor"), [("gate_sparse", 0.5), ("gate_input", 1 / (1 + math.exp(-4)))]
)
def test_gates_that_start_below_1_shrink_every_head_alike(name: str, factor: float):
    off, on = scrambled(tiny_config(**SHAPE)), new_model(config_of(name))
    on.load_state_dict(off.state_dict(), strict=False)
    for i in range(L):
        off.get_parameter(f"blocks.{i}.attn.proj.weight").data *= factor
    ids = random_ids(2, 17)
    torch.testing.assert_close(nats(on, ids), nats(off, ids), rtol=0, atol=1e-4)
    assert factor in (0.5, pytest.approx(0.982, abs=1e-3))


def test_overtone_gives_the_embedding_the_spectrum_of_overtones():
    torch.manual_seed(3)
    plain = new_model(tiny_config(**SHAPE))
    torch.manual_seed(3)
    model = new_model(config_of("overtone"))
    u, s, vh = torch.linalg.svd(plain.tok_emb.weight.detach().double(), full_matrices=False)
    k = torch.arange(1, D + 1).double()
    expected = u @ (s[0] * k**-0.5).diag() @ vh
    torch.testing.assert_close(model.tok_emb.weight.detach().double(), expected, rtol=0, atol=1e-6)
    found = torch.linalg.svdvals(model.tok_emb.weight.detach().double())
    torch.testing.assert_close(found, s[0] * k**-0.5, rtol=1e-4, atol=0)


def test_phase_lets_early_blocks_lean_on_the_embedding():
    model = new_model(config_of("phase"))
    for i in range(L):
        phase = 1 / (1 + math.exp(-3 * (i / (L - 1) - 0.5)))
        expected = torch.tensor([[phase], [1 - phase]]).expand(2, D)
        mix = model.get_parameter(f"blocks.{i}.resid_mix").detach()
        torch.testing.assert_close(mix, expected)
    plain = new_model(tiny_config(**SHAPE)).get_parameter("blocks.0.resid_mix")
    assert (plain[0] == 1).all() and (plain[1] == 0).all()


def test_the_two_caps_start_at_the_softcap():
    model = new_model(config_of("asym", logit_softcap=17.0))
    assert model.caps is not None and model.caps.tolist() == [17.0, 17.0]


BASE: dict[str, Any] = {
    "vocab_size": 1024, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "num_layers": 9,
    "train_seq_len": 1024, "train_batch_tokens": 1024,
}  # fmt: skip
SEED_001: dict[str, Any] = {
    "num_layers": 11, "num_kv_heads": 8, "mlp_mult": 3.5, "smear_gate": "blend",
    "ve_layers": "9,10", "rope_dims": 16, "ln_scale": True, "leaky_slope": 0.5,
}  # fmt: skip
SEED_002: dict[str, Any] = {
    "vocab_size": 8192, "num_layers": 11, "mlp_mult": 4.0, "skip_gates": True, "num_loops": 2,
    "loop_start": 4, "loop_end": 5, "xsa_last_n": 11, "parallel_residual": "stream",
}  # fmt: skip
FRONTIER: dict[str, Any] = {
    **SEED_002, "loop_start": 3, "smear_gate": "lambda", "attn_gate": "sparse",
    "parallel_residual": "lanes", "parallel_start_layer": 8,
}  # fmt: skip
GATED = {"attn_gate": "head", "value_residual": "x0"}
FULL_SIZE = {
    "baseline": ({}, 17_059_912),
    "457": ({"smear_gate": "blend", "value_residual": "vrl", "xsa_last_n": 4}, 17_060_432),
    "thwu1": ({"num_layers": 10, "mlp_mult": 3.0, "smear_gate": "blend",
               "bigram_vocab_size": 10_240}, 25_517_137),
    # 4 bigram buckets in 10 less, and a trigram of 20,480 x 32 with its projection
    "seed_000": ({"num_layers": 10, "mlp_mult": 3.0, "smear_gate": "blend", "xsa_last_n": 4,
                  "bigram_vocab_size": 4096, "trigram_vocab_size": 20_480},
                 25_517_137 - 6144 * 128 + 20_480 * 32 + 32 * 512),
    "720": ({**SEED_001, "bigram_vocab_size": 4096, "xsa_last_n": 6}, 33_055_836),
    "700": ({**SEED_001, "bigram_vocab_size": 6144, "xsa_last_n": 11}, 33_317_980),
    "seed_001": ({**SEED_001, **GATED, "bigram_vocab_size": 4096}, 33_055_935),
    "seed_001_as_run": ({**SEED_001, **GATED, "bigram_vocab_size": 6144}, 33_318_079),
    "1460": (SEED_002, 35_943_512),
    "1855": (FRONTIER, 35_945_671),
    "2135": ({**FRONTIER, "asym_logit_rescale": True}, 35_945_673),
    # 8 gates a head and a scalar of 9 layers; ResFormer's two scalars of 8
    "gate_input": ({"attn_gate": "input"}, 17_059_912 + 9 * 4104),
    "resformer": ({"value_residual": "resformer"}, 17_059_912 + 2 * 8),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_have_the_published_numbers_of_parameters(name: str):
    knobs, expected = FULL_SIZE[name]
    cfg = tiny_config(**{**BASE, **knobs})
    with torch.device("meta"):
        model = GPT(cfg, train_gpt.ATTENTION_BACKENDS["sdpa"](), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == expected


# --- Parts, each alone ---------------------------------------------------------------------------


def buckets_of(cfg: Config) -> list[Any]:
    """The function from ids to rows of each hashed table."""
    hashes: Any = new_model(cfg).hashes
    return [table.buckets for table in hashes]


@pytest.mark.parametrize("isolate", [False, True])
def test_buckets_are_those_of_python_s_integers_up_to_the_largest_ids(isolate: bool):
    knobs = {"bigram_vocab_size": 4096, "trigram_vocab_size": 20_480, "trigram_hash": "mixing"}
    cfg = tiny_config(
        vocab_size=8192, num_layers=1, isolate_documents=isolate, bigram_dim=2, trigram_dim=2,
        **knobs)  # fmt: skip
    ids = torch.randint(2, 8192, (1, 300))
    ids[0, ::7], ids[0, 20:25], ids[0, 30:33] = BOS_ID, 8191, 0
    ids[0, 0] = 17
    reference = Reference(random_model(cfg), ids[0].tolist())
    bigram, trigram = buckets_of(cfg)
    for t in range(300):
        assert bigram(ids)[0, t] == reference.bigram_row(t, 4096), t
        assert trigram(ids)[0, t] == reference.trigram_row(t, 20_480), t
    # Ordinary n-grams never share the bucket of those that lack a token.
    own = [bigram(ids)[0] == 4095, trigram(ids)[0] == 20_479]
    starts = 1 + isolate * int((ids == BOS_ID).sum())
    assert own[0].sum() == starts and starts < own[1].sum() <= 2 * starts


def test_the_polynomial_hash_collides_where_its_description_says_and_mixing_does_not():
    shape = {**SHAPE, "trigram_vocab_size": 20_480}
    polynomial, mixing = (
        buckets_of(tiny_config(**shape, trigram_hash=kind))[0] for kind in ("polynomial", "mixing")
    )
    a, b = torch.tensor([[20, 30, 50]]), torch.tensor([[20, 31, 19]])  # (a, b, c), (a, b+1, c-31)
    assert polynomial(a)[0, 2] == polynomial(b)[0, 2]
    assert mixing(a)[0, 2] != mixing(b)[0, 2]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_xsa_is_the_projection_off_the_repeated_values(num_kv_heads: int):
    y, v = torch.randn(2, 8, 8, 8), torch.randn(2, 8, num_kv_heads, 8)  # T = H = E hides mix-ups
    repeated = v.repeat_interleave(8 // num_kv_heads, dim=2)
    unit = repeated / repeated.norm(dim=-1, keepdim=True)
    expected = y - (y * unit).sum(dim=-1, keepdim=True) * unit
    found = exclusive_self_attention(y, v)
    torch.testing.assert_close(found, expected)
    assert (found * unit).sum(dim=-1).abs().max() < 1e-5


def test_gradients_of_the_two_caps_are_those_of_autograd():
    z = (8 * torch.randn(7, 20)).requires_grad_()
    caps = torch.tensor([9.0, 5.0], requires_grad=True)
    target, weight = torch.randint(20, (7,)), torch.rand(7)
    up, down = (cap * torch.tanh(z / cap) for cap in caps)
    capped = torch.where(z > 0, up, down)
    loss = (nn.functional.cross_entropy(capped, target, reduction="none") * weight).sum()
    loss.backward()
    args = (target, weight, caps.detach())
    nll, grad_z, grad_caps = train_gpt.softcapped_cross_entropy(z.detach(), *args)
    torch.testing.assert_close((nll * weight).sum(), loss.detach())
    torch.testing.assert_close(grad_z, z.grad)
    torch.testing.assert_close(grad_caps, caps.grad)


@pytest.mark.parametrize("chunk_rows", [3, 32])
def test_gradients_of_all_parameters_are_those_of_the_plain_loss(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(train_gpt.MAX_LOSS_LOGITS, "cpu", chunk_rows * V)
    model = scrambled(config_of("everything_merge"))
    ids = random_ids(2, 17)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(ids[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


# --- Order of the blocks -------------------------------------------------------------------------


def unrolled(cfg: Config, loops: int) -> tuple[list[int], list[int]]:
    """Blocks of both halves of the plan with so many extra passes."""
    plan = train_gpt.layer_schedules(cfg)[loops]
    return ([v.block for v in plan if v.save], [v.block for v in plan if not v.save])


def test_the_plans_are_those_of_the_published_systems():
    shape = {"num_layers": 11, "num_loops": 2}
    loop45 = tiny_config(**shape, loop_start=4, loop_end=5)
    assert unrolled(loop45, 2) == ([0, 1, 2, 3, 4, 5, 4], [5, 4, 5, 6, 7, 8, 9, 10])
    assert unrolled(loop45, 1) == ([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10])
    assert unrolled(loop45, 0) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    knobs = {"loop_start": 3, "loop_end": 5, "parallel_start_layer": 8}
    frontier = tiny_config(**shape, **knobs, parallel_residual="lanes")
    assert unrolled(frontier, 2) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    for plan in train_gpt.layer_schedules(frontier):
        rows = [v.skip for v in plan if not v.save]
        half = len(plan) // 2
        assert rows == [*range(half), *[None] * (len(rows) - half)]
        assert [v.block for v in plan if v.split_lanes] == [8]  # and once
    assert train_gpt.layer_schedules(frontier)[0] == layer_schedule(11, lanes_from=8)


@pytest.mark.parametrize("name", ["loops", "frontier", "everything_merge", "everything_routed"])
def test_with_fewer_passes_nats_are_those_of_the_shorter_plan(name: str):
    model = scrambled(config_of(name))
    ids = random_ids(1, 14)
    found = []
    for loops in range(3):
        model.schedule = model.schedules[loops]
        expected = Reference(model, ids[0].tolist(), loops).nats()
        found.append(nats(model, ids)[0].double())
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-4)
    assert all((found[a] - found[b]).abs().max() > 0.1 for a, b in ((0, 1), (1, 2)))


def test_before_its_loops_begin_a_model_is_the_one_without_loops():
    looped, plain = scrambled(config_of("loops_gated")), scrambled(config_of("skip_gates"))
    state = dict(looped.state_dict())
    for key in ("skip_weights", "skip_gates"):
        state[key] = state[key][:2]  # only the first rows are used
    plain.load_state_dict(state)
    looped.schedule = looped.schedules[0]
    ids = random_ids(2, 17)
    assert torch.equal(nats(looped, ids), nats(plain, ids))


@pytest.mark.parametrize("kind", ["merge", "routed", "lanes"])
def test_once_the_stream_has_parted_every_later_block_works_on_two_lanes(kind: str):
    # 0 1 2 3 1 | 2 3 1 2 3 4: it parts at 2, and 1, below PARALLEL_START_LAYER, comes after that.
    model = scrambled(tiny_config(**SHAPE, num_loops=2, loop_start=1, loop_end=3,
                                  parallel_residual=kind, parallel_start_layer=2))  # fmt: skip
    ids = random_ids(1, 14)
    expected = Reference(model, ids[0].tolist()).nats()
    torch.testing.assert_close(nats(model, ids)[0].double(), expected, rtol=0, atol=1e-4)


def test_a_layer_that_does_not_exist_is_refused():
    wrong: list[dict[str, Any]] = [{"xsa_layers": "0,5"}, {"ve_layers": "7"}, {"xsa_layers": "x"}]
    for knobs in wrong:
        with pytest.raises(InputError, match=r"must list blocks below NUM_LAYERS=5"):
            tiny_config(**{**SHAPE, **knobs})
    beyond: list[dict[str, Any]] = [LOOPS, {"parallel_residual": "lanes"}]
    for knobs in beyond:
        with pytest.raises(InputError, match=r"NUM_LAYERS=2"):
            tiny_config(**{**SHAPE, **knobs, "num_layers": 2})


@pytest.mark.parametrize(
    "knobs", [{"xsa_layers": "2-0"}, {"xsa_layers": "0-1-3"}, {"ve_layers": "1,1"}]
)
def test_a_list_of_layers_that_is_surely_a_slip_is_refused(knobs: dict[str, Any]):
    with pytest.raises(InputError):
        tiny_config(**{**SHAPE, **knobs})


def test_the_gate_s_window_matters_only_to_a_model_with_a_gate():
    tiny_config(**{**SHAPE, "model_dim": 8})


# --- Causality and documents ---------------------------------------------------------------------


# The polynomial hash reads the document before, and is refused together with isolation.
ISOLATED = [name for name in TECHNIQUES if "polynomial" not in TECHNIQUES[name].knobs.values()]


@each_combination
@pytest.mark.parametrize("isolate", [False, True])
def test_no_score_depends_on_a_later_token(name: str, isolate: bool):
    isolate = isolate and name in ISOLATED
    model = scrambled(config_of(name, isolate_documents=isolate), seed=1)
    ids = random_ids(1, 15, seed=2)
    before, moved = nats(model, ids)[0], torch.zeros(14, dtype=torch.bool)
    for j in range(1, 15, 2):
        changed = ids.clone()
        changed[0, j] = 2 + (ids[0, j] + 1) % (V - 2)
        after = nats(model, changed)[0]
        assert torch.equal(after[: j - 1], before[: j - 1]), j  # of the tokens before j
        moved |= after != before
    assert moved.sum() > 7  # while what comes later does read it


@pytest.mark.parametrize("name", slow_unless_combined(ISOLATED))
def test_with_isolation_a_document_is_scored_as_it_is_alone(name: str):
    model = scrambled(config_of(name, isolate_documents=True))
    documents = [random_ids(1, n, seed=n).clamp_min(2) for n in (5, 7, 2, 3)]
    for document in documents:
        document[:, 0] = BOS_ID
    packed = nats(model, torch.cat(documents, dim=1))
    first = 0
    for document in documents:
        length = document.size(1)
        own = packed[:, first : first + length - 1]
        # Rotary positions are relative, so that it may stand anywhere in the row.
        torch.testing.assert_close(own, nats(model, document), rtol=0, atol=3e-5)
        first += length


# --- Training ------------------------------------------------------------------------------------


@each_combination
def test_after_two_steps_the_gradient_reaches_every_parameter(name: str, make_run: MakeRun):
    # Zero output projections hold back what lies before them for one step.
    run = make_run(**{**SHAPE, **TECHNIQUES[name].knobs})
    trainer = Trainer(run, build_model(run))
    window = random_ids(2, 17)
    trainer.enter_stage(train_stages(run.cfg)[-1])  # with all its loops
    for _ in range(2):
        trainer.step(window)
    trainer.model.loss(window[:, :-1], window[:, 1:]).backward()
    for key, parameter in trainer.model.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all() and grad.norm() > 1e-9, key
        if key.startswith(("block_scalars.", "skip_")) and grad.dim():
            rows = grad.flatten(1).norm(dim=1) if grad.dim() > 1 else grad.abs()
            idle = TECHNIQUES[name].unused.get(key, 0)  # blocks before the lanes have no use for it
            assert (rows[idle:] > 1e-9).all() and (rows[:idle] == 0).all(), key


@pytest.mark.parametrize("kind", ["merge", "routed", "lanes"])
def test_x0_after_each_block_is_refused_on_two_lanes(kind: str):
    with pytest.raises(InputError, match="VALUE_RESIDUAL=x0 needs one stream"):
        tiny_config(**SHAPE, value_residual="x0", parallel_residual=kind, parallel_start_layer=3)


def test_the_polynomial_hash_is_refused_where_documents_are_isolated():
    with pytest.raises(InputError, match="TRIGRAM_HASH=polynomial"):
        tiny_config(**SHAPE, trigram_hash="polynomial", isolate_documents=True)


@each_technique
def test_every_parameter_is_in_exactly_one_optimizer_group(name: str, make_run: MakeRun):
    trainer = Trainer(run := make_run(**{**SHAPE, **TECHNIQUES[name].knobs}), build_model(run))
    groups = [group["params"] for group in trainer.adam.param_groups]
    members = [id(p) for group in [*groups, *trainer.muon.stacks] for p in group]
    assert sorted(members) == sorted(id(p) for p in trainer.model.parameters())


def test_tables_learn_as_the_embedding_does_and_their_projections_by_muon(make_run: MakeRun):
    run = make_run(**{**SHAPE, **TECHNIQUES["everything_merge"].knobs})
    model = build_model(run)
    trainer = Trainer(run, model)
    token, scalar, cap = (set(map(id, group["params"])) for group in trainer.adam.param_groups)
    assert [group["base_lr"] for group in trainer.adam.param_groups] == [
        run.cfg.tied_embed_lr,
        run.cfg.scalar_lr,
        run.cfg.scalar_lr,
    ]
    assert trainer.adam.param_groups[2]["weight_decay"] == 0  # decay would move a cap from 30 to 0
    matrix = {id(p) for stack in trainer.muon.stacks for p in stack}
    kinds: dict[str, set[int]] = {
        "hashes.0.table.weight": token, "hashes.1.table.weight": token,
        "ve_table.weight": token, "tok_emb.weight": token,
        "hashes.0.proj.weight": matrix, "hashes.1.proj.weight": matrix,
        "ve_proj.weight": matrix,
        "hashes.0.scale": scalar, "ve_scale": scalar, "smear.gate": scalar, "caps": cap,
        "block_scalars.value": scalar, "block_scalars.merge": scalar,
        "block_scalars.shared": scalar,
        "blocks.0.attn.gate.weight": scalar, "blocks.0.attn.gate.bias": scalar,
        "skip_gates": scalar, "skip_weights": scalar, "blocks.0.resid_mix": scalar,
    }  # fmt: skip
    for key, group in kinds.items():
        assert id(model.get_parameter(key)) in group, key


# --- Artifact ------------------------------------------------------------------------------------

SHA = hashlib.sha256(b"the tokenizer").hexdigest()


@each_combination
def test_a_model_survives_quantization_and_is_read_back(
    name: str, make_run: MakeRun, tmp_path: Path
):
    bits = {"attn_bits": 6, "mlp_bits": 5, "embed_bits": 8, "table_bits": 6}
    model = scrambled(config_of(name, **bits))
    tensors = quantize_model(model.cfg, model)
    path = tmp_path / "model.bin"
    path.write_bytes(encode_artifact(model.cfg, tensors, SHA))
    found = read_artifact(path, make_run(), SHA)  # a run whose own shape is another
    plain = copy.deepcopy(model)
    for key, parameter in plain.named_parameters():
        parameter.data = tensors[key].dequantized()
    ids = random_ids(2, 17)
    assert torch.equal(nats(found, ids), nats(plain, ids))
    assert not torch.equal(nats(found, ids), nats(model, ids))  # codes are coarser
    assert {k: t.bits for k, t in tensors.items() if "table" in k or "ve_proj" in k} == {
        key: 6 for key in tensors if "table" in key or "ve_proj" in key
    }


# --- Adapters ------------------------------------------------------------------------------------


class BatchedLoRA(nn.Module):
    """A random adapter of rank 2, like those that test-time training hangs on."""

    def __init__(self, linear: nn.Linear, size: float):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, linear.in_features))
        self.up = nn.Parameter(size * torch.randn(linear.out_features, 2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x @ self.down.T @ self.up.T


def linears_of(model: GPT) -> dict[str, CastedLinear]:
    """Every place where an adapter can hang."""
    return {
        k: m for k, m in model.named_modules() if isinstance(m, CastedLinear) and k != "lm_head"
    }


@each_combination
def test_adapters_of_zeros_change_nothing_and_others_do(name: str):
    model = scrambled(config_of(name))
    ids = random_ids(2, 17)
    without = nats(model, ids)
    for linear in linears_of(model).values():
        linear.adapter = BatchedLoRA(linear, size=0.0)
    assert torch.equal(nats(model, ids), without)
    for linear in linears_of(model).values():
        linear.adapter = BatchedLoRA(linear, size=0.1)
    adapted = nats(model, ids)
    assert (adapted - without).abs().max() > 1e-2
    base_v = linears_of(model)["blocks.0.attn.c_v"].weight.detach().clone().double()
    for linear in linears_of(model).values():  # the same as adding the product to the weight
        lora = linear.adapter
        assert isinstance(lora, BatchedLoRA)
        linear.weight.data += lora.up.data @ lora.down.data
        linear.adapter = None
    for row, adapted_T in zip(ids, adapted, strict=True):
        reference = Reference(model, row.tolist())
        # Later blocks mix in the values of block 0 without its adapter.
        keep, inject = reference.w["blocks.0.resid_mix"]
        n = reference.normed(0, keep * reference.x0 + inject * reference.x0)
        reference.first_v = n @ base_v.T
        torch.testing.assert_close(adapted_T.double(), reference.nats(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param("everything_merge", marks=slow), "everything_routed"]
)
def test_an_adapter_on_any_matrix_alone_changes_the_scores_and_learns(name: str):
    model = scrambled(config_of(name))
    ids = random_ids(2, 17)
    without = nats(model, ids)
    for key, linear in linears_of(model).items():
        linear.adapter = BatchedLoRA(linear, size=1.0)
        assert not torch.allclose(nats(model, ids), without, rtol=0, atol=1e-4), key
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in linear.adapter.parameters())
        linear.adapter = None


def test_an_adapter_on_the_untied_head_changes_the_scores():
    model = scrambled(tiny_config(**SHAPE, tie_embeddings=False))
    ids = random_ids(2, 17)
    without = nats(model, ids)
    assert model.lm_head is not None
    model.lm_head.adapter = BatchedLoRA(model.lm_head, size=1.0)
    assert not torch.equal(nats(model, ids), without)


# --- Compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param("aot_eager", "everything_merge", marks=pytest.mark.slow),  # traced
        pytest.param("inductor", "everything_routed", marks=pytest.mark.slow),  # machine code
        pytest.param("inductor", "frontier", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager_with_everything_on(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    if backend == "inductor" and (reason := train_gpt.compile_unavailable_reason(CPU)):
        pytest.skip(reason)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    # As few kinds of blocks as a loop, a value embedding and lanes leave: each is a graph.
    layers = 2 if backend == "aot_eager" else 3
    few = {"num_layers": layers, "xsa_last_n": layers, "parallel_start_layer": layers - 1}
    loop = {"num_loops": 1, "loop_start": 1, "loop_end": 1}
    lists = {"ve_layers": "1"} if "everything" in name else {}
    cfg = config_of(name, **few, **loop, **lists)
    eager, compiled = scrambled(cfg), scrambled(cfg)
    compiled.compile_()
    ids = random_ids(2, 17)
    for loops in (1,) if backend == "aot_eager" else (0, 1):
        for model in (eager, compiled):
            model.schedule = model.schedules[loops]
            model.zero_grad()
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
        torch.testing.assert_close(nats(compiled, ids), nats(eager, ids), rtol=0, atol=1e-4)
        for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=key)
    counters = torch._dynamo.utils.counters["frames"]
    assert counters["ok"] > 0 and counters["ok"] == counters["total"]  # all of it was compiled
