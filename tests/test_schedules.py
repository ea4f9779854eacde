"""Schedules, late quantization, averages, the coprime loader and the ranks' shares of Muon.

Oracles: tables worked out by hand, closed forms, one process for many, the stored quantiser for the
straight-through one, an uninterrupted run for a resumed one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from tests.conftest import (
    MakeRun,
    TinyData,
    random_model,
    tiny_config,
    write_raw_shard,
)
from train_gpt import (
    GPT,
    BatchLoader,
    Config,
    CoprimeSampler,
    InputError,
    Interrupted,
    Muon,
    Progress,
    Run,
    TokenStream,
    Trainer,
    TrainStage,
    WeightAverager,
    fake_quantize,
    momentum_at,
    quantize_model,
    quantize_rows,
    train_stage_at,
    train_stages,
)

SMALL: dict[str, Any] = {"num_layers": 3, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1}
LOOPS: dict[str, Any] = {"num_loops": 2, "loop_start": 1, "loop_end": 1}


# --- Phases as functions -------------------------------------------------------------------------


def phase_of(progress: float, scale: float, **knobs: Any) -> TrainStage:
    """The phase of a tiny run with 32 tokens of context and 256 a batch."""
    return train_stage_at(tiny_config(**knobs), progress, scale)


@pytest.mark.parametrize(
    ("progress", "seq_len", "batch"),
    [(0.0, 8, 64), (0.249, 8, 64), (0.25, 16, 64), (0.3, 16, 64), (0.31, 16, 256),
     (0.5, 32, 256), (0.99, 32, 256), (1.0, 32, 256)],
)  # fmt: skip
def test_lengths_and_batches_hold_until_their_shares(progress: float, seq_len: int, batch: int):
    knobs = {"train_seq_schedule": "8@0.25,16@0.5", "train_batch_schedule": "64@0.31"}
    assert phase_of(progress, 1.0, **knobs) == TrainStage(seq_len, batch, loops=0, qat=False)


@pytest.mark.parametrize(
    ("shares", "progress", "loops"),
    [("0.5", 0.49, 0), ("0.5", 0.5, 2), ("0.5", 1.0, 2), ("0", 0.0, 2), ("0.5,0.65", 0.49, 0),
     ("0.5,0.65", 0.5, 1), ("0.5,0.65", 0.64, 1), ("0.5,0.65", 0.65, 2)],
)  # fmt: skip
def test_loops_begin_at_their_share_together_or_one_by_one(
    shares: str, progress: float, loops: int
):
    assert phase_of(progress, 1.0, **LOOPS, enable_looping_at=shares).loops == loops
    assert phase_of(progress, 1.0, enable_looping_at="0.5").loops == 0  # NUM_LOOPS=0 has none


def test_qat_begins_when_the_multiplier_falls_below_the_threshold():
    for scale, active in ((1.0, False), (0.15, False), (0.1499, True), (0.0, True)):
        assert phase_of(0.9, scale, late_qat_threshold=0.15).qat == active
        assert not phase_of(0.9, scale).qat  # a threshold of 0 never lets it begin


def test_deep_supervision_ends_at_its_share():
    knobs = {"deep_supervision": 0.3, "deep_supervision_frac": 0.4}
    assert [phase_of(x, 1.0, **knobs).deep for x in (0, 0.39, 0.4, 1)] == [0.3, 0.3, 0, 0]
    assert phase_of(0, 1.0).deep == 0


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"deep_supervision": 0.3, "deep_supervision_frac": 0.2, "train_seq_schedule": "8@0.25"},
        {"late_qat_threshold": 0.2},
        {"train_seq_schedule": "8@0.25,16@0.5", "train_batch_schedule": "64@0.3,128@0.4"},
        {**LOOPS, "enable_looping_at": "0.35,0.7", "train_seq_schedule": "16@0.5"},
        {**LOOPS, "enable_looping_at": "0", "late_qat_threshold": 0.9,
         "train_batch_schedule": "32@0.123"},
    ],
)  # fmt: skip
def test_the_phases_that_are_compiled_are_those_that_any_training_comes_through(
    knobs: dict[str, Any],
):
    cfg = tiny_config(**knobs)
    scales = (1.0, 0.5, 0.01) if cfg.late_qat_threshold else (1.0,)
    grid = [n / 1000 for n in range(1001)]
    reached = {train_stage_at(cfg, progress, scale) for progress in grid for scale in scales}
    found = train_stages(cfg)
    assert len(found) == len(set(found)) and set(found) == reached
    assert [p.seq_len for p in found] == sorted(p.seq_len for p in found)  # in their order


@pytest.mark.parametrize(
    "knobs",
    [
        {"train_seq_schedule": "8@0.5,16@0.25"},
        {"train_seq_schedule": "8@0.5,16@0.5"},
        {"train_seq_schedule": "8@0"},
        {"train_seq_schedule": "8@1"},
        {"train_seq_schedule": "8"},
        {"train_seq_schedule": "0@0.5"},
        {"train_seq_schedule": "64@0.5"},  # above TRAIN_SEQ_LEN
        {**LOOPS, "enable_looping_at": "0.7,0.5"},
        {**LOOPS, "enable_looping_at": "0.1,0.2,0.3"},
        {**LOOPS, "enable_looping_at": "1.5"},
        {**LOOPS, "enable_looping_at": ""},
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_its_name(knobs: dict[str, Any]):
    with pytest.raises(InputError) as refusal:
        tiny_config(**knobs)
    assert any(name.upper() in str(refusal.value) for name in knobs if name not in LOOPS)


def test_a_length_that_does_not_divide_its_batch_is_refused_with_the_numbers():
    for knobs in ({"train_seq_schedule": "24@0.5"}, {"train_batch_schedule": "40@0.5"}):
        with pytest.raises(InputError, match=r"(256.*=24|40.*=32)"):
            tiny_config(**knobs)


@pytest.mark.parametrize(
    ("step", "progress", "expected"),
    [(0, 0.0, 0.85), (5, 0.1, 0.90), (10, 0.2, 0.95), (40, 0.79, 0.95), (40, 0.8, 0.95),
     (45, 0.9, 0.90), (50, 1.0, 0.85), (5, 0.95, 0.875)],
)  # fmt: skip
def test_momentum_ramps_up_by_steps_and_falls_back_by_progress(
    step: int, progress: float, expected: float
):
    cfg = tiny_config(
        muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=10,
        muon_momentum_cooldown_frac=0.2,
    )  # fmt: skip
    assert momentum_at(step, progress, cfg) == pytest.approx(expected)


def test_without_cooldown_and_ramp_momentum_is_constant():
    cfg = tiny_config(muon_momentum=0.97, muon_momentum_warmup_steps=0)
    assert {momentum_at(n, n / 10, cfg) for n in range(11)} == {0.97}
    cfg = tiny_config(muon_momentum_warmup_steps=2)
    assert [momentum_at(n, n / 4, cfg) for n in range(5)] == pytest.approx([0.85, 0.9] + 3 * [0.95])


# --- Training through phases ---------------------------------------------------------------------


def open_loader(run: Run) -> BatchLoader:
    stream = TokenStream(train_gpt.find_shards(run.cfg, "train"), run.cfg.vocab_size)
    return BatchLoader(run.cfg, stream, rank=run.rank, world_size=run.world_size)


def no_validation() -> train_gpt.Score:
    raise AssertionError("not asked for")


@pytest.fixture
def new_run(make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """make_run with a small model, and a folder of its own for each run unless one is named."""
    numbers = itertools.count()

    def make(**changes: Any) -> Run:
        run_dir = str(tmp_path / f"run_{next(numbers)}")
        return make_run(**{**SMALL, "run_dir": run_dir, **changes})

    return make


def train_all(run: Run) -> Trainer:
    return train_gpt.train(run, train_gpt.build_model(run), open_loader(run), no_validation)


Note = dict[str, Any]


@contextlib.contextmanager
def noted_steps(stop_after: int = 0) -> Iterator[list[Note]]:
    """Note what each optimizer step sees; let a signal come after one of them."""
    notes: list[Note] = []
    plain = Trainer.step

    def step(self: Trainer, window_BT: Tensor) -> Tensor:
        bits = {
            name: m.qat_bits for name, m in self.model.named_modules() if hasattr(m, "qat_bits")
        }
        note = {"window": window_BT.clone(), "visits": len(self.model.schedule), "bits": bits}
        note["deep"] = self.model.deep_supervision
        note |= {"state": copy.deepcopy(self.model.state_dict()), "scale": self.lr_scale()}
        notes.append(note)
        notes[-1]["loss"] = plain(self, window_BT)
        self.run.signal_received = self.progress.step == stop_after
        return notes[-1]["loss"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield notes


SCHEDULED: dict[str, Any] = {
    **LOOPS, "enable_looping_at": "0.3,0.6", "train_seq_schedule": "8@0.2,16@0.5",
    "train_batch_schedule": "64@0.4,128@0.7", "late_qat_threshold": 0.25, "warmdown_frac": 0.5,
    "attn_bits": 6, "mlp_bits": 4, "iterations": 10, "deep_supervision": 0.3,
    "deep_supervision_frac": 0.6, "muon_fast_weight": 0.4, "muon_beta2": 0.9,
    "muon_cautious_wd": True,
}  # fmt: skip


def test_training_runs_each_phase_with_its_shape_its_passes_and_its_bits(new_run: MakeRun):
    with noted_steps() as notes:
        trainer = train_all(new_run(**SCHEDULED))
    shapes = [(note["window"].size(1) - 1, note["window"][:, 1:].numel()) for note in notes]
    assert (
        shapes == [(8, 64)] * 2 + [(16, 64)] * 2 + [(16, 128)] + [(32, 128)] * 2 + [(32, 256)] * 3
    )
    assert [note["visits"] for note in notes] == [3] * 3 + [4] * 3 + [5] * 4
    assert trainer.progress.step == 10
    assert trainer.progress.tokens == 4 * 64 + 3 * 128 + 3 * 256
    assert [note["deep"] for note in notes] == [0.3] * 6 + [0.0] * 4
    # Multipliers 1 to step 5, then 1, .8, .6, .4, .2: below 0.25 at the last step only.
    for note in notes[:-1]:
        assert set(note["bits"].values()) == {0}
    last = notes[-1]["bits"]
    assert last["blocks.0.attn.c_q"] == last["blocks.2.attn.proj"] == 6
    assert last["blocks.1.mlp.fc"] == 4 and "tok_emb" not in last


def test_calibration_leaves_deep_supervision_out(new_run: MakeRun):
    """The grid of late QAT can be solved while training has it."""
    run = new_run(**SCHEDULED)
    trainer, loader = train_all(run), open_loader(run)
    found = []
    for trainer.model.deep_supervision in (0.3, 0.0):
        found.append(train_gpt.calibrate(run, trainer.model, loader, trainer.progress))
    for name, hessian in found[0].items():
        assert all(map(torch.equal, hessian, found[1][name])), name


def test_the_sequential_loader_reads_on_without_a_gap_or_a_repeat_when_shapes_change(
    new_run: MakeRun, data: TinyData
):
    run = new_run(**SCHEDULED)
    with noted_steps() as notes:
        train_all(run)
    read = np.concatenate([note["window"][:, :-1].flatten().numpy() for note in notes])
    targets = np.concatenate([note["window"][:, 1:].flatten().numpy() for note in notes])
    ids = np.concatenate(data.train)
    first = open_loader(run).samplers[8].start(0)
    assert np.array_equal(read, np.resize(np.roll(ids, -first), len(read)))
    assert np.array_equal(targets, np.resize(np.roll(ids, -first - 1), len(read)))


@pytest.mark.parametrize("loader", ["shuffled", "coprime"])
def test_the_other_loaders_repeat_no_window_of_a_length_within_an_epoch(
    loader: str, new_run: MakeRun, tmp_path: Path
):
    ids = np.arange(3000)  # each id tells its place
    write_raw_shard(tmp_path / "x_train_000000.bin", ids)
    run = new_run(**{**SCHEDULED, "vocab_size": 3000}, data_path=str(tmp_path), loader=loader)
    with noted_steps() as notes:
        train_all(run)
    for T in (8, 16, 32):
        rows = torch.cat([n["window"] for n in notes if n["window"].size(1) == T + 1])
        assert (rows.diff(dim=1) == 1).all()
        assert len(rows[:, 1:].unique()) == rows[:, 1:].numel()


def test_warm_up_runs_every_phase_and_leaves_no_trace(new_run: MakeRun):
    seen: list[tuple[int, int, int, bool, float]] = []
    warm = new_run(**SCHEDULED, warmup_steps=1)
    with noted_steps() as notes:
        trained = train_all(warm)
    for note in notes[: len(train_stages(warm.cfg))]:
        T = note["window"].size(1) - 1
        qat = any(note["bits"].values())
        batch_tokens, loops = note["window"][:, 1:].numel(), note["visits"] - 3
        seen.append((T, batch_tokens, loops, qat, note["deep"]))
    assert seen == [tuple(phase) for phase in train_stages(warm.cfg)]
    assert len(notes) == len(seen) + 10
    same_bits(trained, train_all(new_run(**SCHEDULED)))


def test_earlier_phases_are_warmed_up_again_if_a_later_one_compiles_less(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(**SCHEDULED, warmup_steps=1)
    trainer = Trainer(run, train_gpt.build_model(run))
    stages, seen = train_stages(run.cfg), list[Any]()

    def step(window_BT: torch.Tensor) -> torch.Tensor:
        seen.append(trainer.current_stage)
        if len(seen) == 2:  # the compiler fails here
            trainer.model.run_block = lambda *arguments: train_gpt.run_block(*arguments)
        return torch.tensor(0.0)

    monkeypatch.setattr(trainer, "step", step)
    trainer.warm_up()
    assert seen == [*stages, *stages] and len(stages) > 2


def same_bits(a: Trainer, b: Trainer) -> None:
    """Assert that two trainings are at the same point, in every bit of their state."""
    assert (a.progress.step, a.progress.tokens) == (b.progress.step, b.progress.tokens)
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("stop_after", [1, 4, 5, 9])  # in the first phase, between, before QAT
@pytest.mark.parametrize("loader", ["stream", "coprime"])
def test_a_run_stopped_in_the_middle_of_its_schedules_goes_on_to_the_same_bits(
    stop_after: int, loader: str, new_run: MakeRun
):
    averaging = {1: "ema", 4: "swa", 5: "tail", 9: "none"}[stop_after]
    knobs = {**SCHEDULED, "loader": loader, "averaging": averaging, "swa_every": 2,
             "swa_start_lr": 0.95, "tail_frac": 0.8}  # fmt: skip
    whole = train_all(new_run(**knobs))
    stopped = new_run(**knobs)
    with noted_steps(stop_after) as notes, pytest.raises(Interrupted):
        train_all(stopped)
    assert len(notes) == stop_after
    again = new_run(**knobs, run_dir=str(stopped.directory))
    with noted_steps() as notes:
        resumed = train_all(again)
    assert len(notes) == 10 - stop_after
    same_bits(resumed, whole)


def middle_and_final(model: GPT, ids_BT: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """The normed streams after `middle` layer calls and after all of them."""
    streams, run_block = [], model.run_block

    def noted(*args: Any) -> Any:
        lanes = run_block(*args)
        streams.append(lanes[0])
        return lanes

    model.run_block = noted
    final = model(ids_BT)
    model.run_block = run_block
    return F.rms_norm(streams[middle - 1], final.shape[-1:]), final


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_deep_supervision_is_that_of_the_middle_through_the_same_head(tied: bool):
    cfg = tiny_config(**LOOPS, tie_embeddings=tied)  # 5 layer calls
    model = random_model(cfg)
    ids_BT, target_BT = torch.randint(1, cfg.vocab_size, (2, 3, 32))

    def losses(x_BTD: Tensor) -> Tensor:
        z = x_BTD @ model.head_VD.T
        logits_BTV = cfg.logit_softcap * torch.tanh(z / cfg.logit_softcap)
        return F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none")

    middle, final = map(losses, middle_and_final(model, ids_BT, 2))
    plain = model.loss(ids_BT, target_BT)
    weight_BT = torch.rand(3, 32)
    model.deep_supervision = 0.3
    torch.testing.assert_close(plain, final.mean())
    found, weighted = model.loss(ids_BT, target_BT), model.loss(ids_BT, target_BT, weight_BT)
    torch.testing.assert_close(found, final.mean() + 0.3 * middle.mean())
    torch.testing.assert_close(weighted, (weight_BT.flatten() * (final + 0.3 * middle)).sum())
    gradients = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(
        (final + 0.3 * middle).mean(), list(model.parameters()), allow_unused=True
    )
    for g, e in zip(gradients, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_scores_and_the_trained_model_are_without_deep_supervision(new_run: MakeRun):
    run = new_run(deep_supervision=0.3, deep_supervision_frac=1, val_loss_every=2, iterations=4)
    model, seen = train_gpt.build_model(run), list[float]()

    def validate() -> Any:
        seen.append(model.deep_supervision)
        return train_gpt.Score(1.0, 1, 1, partial=False, eval_s=0.0)

    with noted_steps() as notes:
        train_gpt.train(run, model, open_loader(run), validate)
    assert [note["deep"] for note in notes] == [0.3] * 4
    assert seen == [0] and model.deep_supervision == 0


def test_a_step_takes_momentum_and_decay_of_its_own_progress(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(
        iterations=8, muon_momentum_warmup_steps=4, muon_momentum_cooldown_frac=0.25, muon_wd=0.2,
        warmdown_frac=0.5, matrix_lr=0.1,
    )  # fmt: skip
    found: list[tuple[float, ...]] = []

    def step(self: Muon, *args: float) -> None:
        found.append(args)
        self.pending.clear()

    monkeypatch.setattr(Muon, "step", step)
    train_all(run)
    lr = [0.1] * 5 + [0.075, 0.05, 0.025]
    momentum = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95, 0.9]
    decay = [0.2] * 8
    assert np.array(found).T.tolist() == [pytest.approx(row) for row in (lr, momentum, decay)]


# --- Averages ------------------------------------------------------------------------------------


def averaged(
    steps: int, scale: Callable[[int], float] = lambda step: 1.0, **knobs: Any
) -> tuple[float, int]:
    """The exported value of a weight that is n after step n, from 1000, and how many were taken."""
    weight = nn.Parameter(torch.tensor([1000.0]))
    averager = WeightAverager(tiny_config(**knobs), [weight])
    for step in range(1, steps + 1):
        weight.data.fill_(step)
        averager.update(step, scale(step), step / steps)
    averager.export_()
    return weight.item(), int(averager.count)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_the_initial_weights_share_of_the_ema_is_the_decay_to_the_number_of_steps(decay: float):
    # Weights n after step n: the sum of (1 - d) d^(N - n) n besides the share of the initial 1000.
    own = sum((1 - decay) * decay ** (20 - n) * n for n in range(1, 21))
    exported, _ = averaged(20, averaging="ema", ema_decay=decay)
    assert exported == pytest.approx(1000 * decay**20 + own, rel=1e-5)


@pytest.mark.parametrize(("frac", "first"), [(0.1, 19), (0.25, 16), (0.5, 11), (1.0, 1)])
def test_the_tail_average_is_the_plain_mean_of_the_last_weights(frac: float, first: int):
    exported, count = averaged(20, averaging="tail", tail_frac=frac)
    assert count == 21 - first
    assert exported == pytest.approx(np.mean(range(first, 21)), rel=1e-6)


def test_swa_collects_while_the_learning_rate_multiplier_is_low():
    knobs = {"averaging": "swa", "swa_start_lr": 0.4, "swa_every": 3}
    exported, count = averaged(20, lambda step: 1 - (step - 1) / 20, **knobs)
    assert count == 2 and exported == pytest.approx((15 + 18) / 2)  # below 0.4 from step 14 on
    assert averaged(20, averaging="swa", swa_every=5) == (20, 0)  # nothing collected: the last


def test_averages_are_kept_in_float32_whatever_the_weights_are():
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    averager = WeightAverager(tiny_config(averaging="tail", tail_frac=1.0), [weight])
    for step in range(1, 9):
        weight.data.fill_(1.0 if step % 2 else 1.0078125)  # one bf16 step above
        averager.update(step, 1.0, step / 8)
    assert averager.average[0].item() == pytest.approx(1.00390625, abs=1e-7)


@pytest.mark.parametrize("averaging", ["tail", "swa"])
def test_a_training_exports_the_mean_of_the_weights_of_its_end(new_run: MakeRun, averaging: str):
    # Both take in the weights after steps 7 to 10; a note holds those before its step.
    # Step 7 of 10 is the first whose multiplier, 0.8, is below 0.9.
    knobs = {"tail_frac": 0.35, "warmdown_frac": 0.5, "swa_start_lr": 0.9, "swa_every": 1}
    with noted_steps() as notes:
        exported = train_all(new_run(averaging=averaging, **knobs)).model.state_dict()
    last = train_all(new_run(warmdown_frac=0.5)).model.state_dict()
    taken = [*(note["state"] for note in notes[7:]), last]
    for name, weight in exported.items():
        mean = torch.stack([state[name].double() for state in taken]).mean(dim=0)
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-6)


# --- Late quantization ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_the_straight_through_grid_is_that_of_the_stored_weights_to_the_bit(bits: int):
    weight = torch.randn(20, 30) * torch.logspace(-9, 4, 20)[:, None]  # also below fp16's range
    weight[3], weight[4, 5] = 0.0, 100.0
    weight.requires_grad_()
    found = fake_quantize(weight, bits)
    expected = quantize_rows(weight.detach(), bits).dequantized()
    # w + (q - w) rounds once more than q: a bit of the larger of both.
    torch.testing.assert_close(found.detach(), expected, rtol=2e-7, atol=0)
    out = torch.randn(20, 30)
    (found * out).sum().backward()
    assert torch.equal(weight.grad, out)  # type: ignore[arg-type]


BITS = {"attn_bits": 6, "mlp_bits": 4, "embed_bits": 5, "table_bits": 7}
PARTS: dict[str, Any] = {
    **SMALL, **BITS, "bigram_vocab_size": 50, "bigram_dim": 8, "ve_layers": "1", "ve_dim": 8,
    "value_residual": "vrl", "train_batch_tokens": 64,
}  # fmt: skip


def with_qat(cfg: Config, make_run: MakeRun) -> GPT:
    """A random model after the switch, as the trainer makes it."""
    run = make_run(**{name: getattr(cfg, name) for name in cfg.__dataclass_fields__})
    trainer = Trainer(run, random_model(cfg))
    trainer.enter_stage(TrainStage(32, 64, loops=0, qat=True))
    return trainer.model


def stored(model: GPT, groups: str) -> GPT:
    """A copy whose matrices of these groups are the stored ones, straight from the quantiser."""
    plain = random_model(model.cfg)
    roles, tensors = train_gpt.parameter_roles(model), quantize_model(model.cfg, model)
    for name, parameter in plain.named_parameters():
        quantised = roles[name].quant_group in groups.split(",")
        source = tensors[name].dequantized() if quantised else model.get_parameter(name)
        parameter.data = source.detach().clone()
    return plain


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", ["attn", "mlp", "attn,mlp"])
def test_with_late_qat_the_loss_is_that_of_the_stored_attention_and_mlp_matrices(
    groups: str, tied: bool, make_run: MakeRun
):
    # A group of 16 bits is stored unquantized; embeddings and the head never take part.
    bits = {name: 16 for name in ("attn_bits", "mlp_bits") if name[:-5] not in groups}
    cfg = tiny_config(**{**PARTS, **bits, "tie_embeddings": tied})
    model = with_qat(cfg, make_run)
    plain, before = stored(model, groups), random_model(cfg)
    ids = torch.randint(2, cfg.vocab_size, (2, 33))
    losses = [m.loss(ids[:, :-1], ids[:, 1:]) for m in (model, plain, before)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert abs(losses[0] - losses[2]) > 5e-4  # several times the tolerance
    # The gradient is the one at the stored weights, passed straight through to the real ones.
    for loss in losses[:2]:
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_switch_can_be_turned_back_and_16_bits_mean_none(make_run: MakeRun):
    cfg = tiny_config(**{**PARTS, "attn_bits": 16, "mlp_bits": 16})
    model, before = with_qat(cfg, make_run), random_model(cfg)
    ids = torch.randint(2, cfg.vocab_size, (2, 33))
    assert torch.equal(model.loss(ids[:, :-1], ids[:, 1:]), before.loss(ids[:, :-1], ids[:, 1:]))
    run = make_run(**PARTS)
    trainer = Trainer(run, random_model(run.cfg))
    losses = []
    for qat in (False, True, False):
        trainer.enter_stage(TrainStage(32, 64, loops=0, qat=qat))
        losses.append(trainer.model.loss(ids[:, :-1], ids[:, 1:]).item())
    assert losses[0] == losses[2] != losses[1]


def test_in_a_training_the_loss_sees_the_grid_from_the_switch_on(new_run: MakeRun):
    run = new_run(iterations=6, warmdown_frac=1.0, late_qat_threshold=0.4, mlp_bits=4, attn_bits=4)
    with noted_steps() as notes:
        train_all(run)
    for step, note in enumerate(notes):
        model = random_model(run.cfg)
        model.load_state_dict(note["state"])
        grid = stored(model, "attn,mlp")
        window = note["window"]
        losses = [m.loss(window[:, :-1], window[:, 1:]).item() for m in (model, grid)]
        if step == 0:  # the outputs are zero, on any grid
            continue
        assert abs(losses[0] - losses[1]) > 1e-5  # so that the one is told from the other
        active = 1 - step / 6 < 0.4
        assert note["loss"].item() == pytest.approx(losses[active], rel=1e-6), step
    assert [any(note["bits"].values()) for note in notes] == [False] * 4 + [True] * 2


def test_after_training_the_model_scores_its_own_weights_not_those_of_the_grid(new_run: MakeRun):
    run = new_run(iterations=4, warmdown_frac=1.0, late_qat_threshold=0.9, mlp_bits=4, attn_bits=4)
    model = train_all(run).model
    plain = random_model(run.cfg)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(2, run.cfg.vocab_size, (2, 33))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    assert torch.equal(model.eval_nll(inputs, targets), plain.eval_nll(inputs, targets))


ON_GRID: dict[str, Any] = {
    "late_qat_threshold": 0.5, "warmdown_frac": 1.0, "iterations": 6, "qat_grid": "artifact",
    "quantizer": "gptq", "row_steps": "solved", "averaging": "none", "quant_grid": "trellis",
    "gptq_calibration_batches": 1, "artifact_budget_bytes": 9000, "bigram_vocab_size": 50,
    "bigram_dim": 8, "matrix_lr": 0.1,
}  # fmt: skip


def grid_run(new_run: MakeRun, **changes: Any) -> Run:
    """A run in a folder with a script of 1,000 bytes, which the budget counts."""
    run = new_run(**{**ON_GRID, **changes})
    run.directory.mkdir(exist_ok=True)
    (run.directory / "train_gpt.py").write_bytes(bytes(1000))
    return run


def scales_of(trainer: Trainer) -> dict[str, Tensor]:
    return {k: x.clone() for k, x in trainer.tensors().items() if k.startswith("grid/")}


def test_matrices_trained_on_the_grid_of_the_artifact_are_stored_as_they_are(new_run: MakeRun):
    run = grid_run(new_run)
    with noted_steps() as notes:
        trainer = train_all(run)
    model, late = trainer.model, trainer.late_modules
    assert {"blocks.0.attn.c_q.weight", "blocks.2.mlp.proj.weight"} <= late.keys()
    assert "tok_emb.weight" not in late and len(late) >= 18
    hessians = train_gpt.calibrate(run, model, open_loader(run), trainer.progress)
    payload = train_gpt.quantize_and_encode(run, model, hessians, "0" * 64)
    assert 7900 < len(payload) <= 8000
    header, body = train_gpt.decode_header(payload)
    tensors = train_gpt.decode_tensors(header, body, *train_gpt.model_layout(run.cfg))
    for number, note in enumerate(notes):  # the last two see the rounded matrices
        seen = random_model(run.cfg)
        seen.load_state_dict(note["state"])
        for name, module in late.items() if number >= 4 else []:
            steps = rows_columns(module)
            weight = seen.get_parameter(name).data
            weight.copy_((weight / steps).round() * steps)
        loss = seen.loss(note["window"][:, :-1], note["window"][:, 1:])
        assert note["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, module in late.items():
        assert not tensors[name].trellis and module.qat_bits == 0
        assert torch.equal(tensors[name].dequantized(), module.weight), name
    assert tensors["tok_emb.weight"].trellis
    # The last step saw other codes than the one before: training went on on the grid.
    codes = [
        torch.cat([(n["state"][k] / rows_columns(m)).round().flatten() for k, m in late.items()])
        for n in notes[-2:]
    ]
    assert 0 < (codes[0] != codes[1]).float().mean() < 0.5


def rows_columns(module: Any) -> Tensor:
    """The steps of a module's grid (O, I)."""
    rows_O, columns_I = module.grid
    return rows_O[:, None] * columns_I


def test_a_run_stopped_after_the_scales_are_known_goes_on_to_the_same_bits(new_run: MakeRun):
    knobs = {"quant_grid": "uniform", "bigram_vocab_size": 0}
    whole, stopped = train_all(grid_run(new_run, **knobs)), grid_run(new_run, **knobs)
    with noted_steps(5), pytest.raises(Interrupted):
        train_all(stopped)
    resumed = train_all(grid_run(new_run, **knobs, run_dir=str(stopped.directory)))
    same_bits(resumed, whole)
    again = train_all(grid_run(new_run, **knobs, run_dir=str(stopped.directory)))  # is over
    assert all(map(torch.equal, again.params, whole.params))
    times = (stopped.directory / "metrics.jsonl").read_text().count('"begin", "name": "solve_grid"')
    assert times == 1
    assert len(scales_of(whole)) == 2 * len(whole.late_modules)


def test_a_signal_while_the_scales_are_made_loses_no_step_and_changes_no_bit(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    knobs = {"quant_grid": "uniform", "bigram_vocab_size": 0, "warmup_steps": 1}
    whole, stopped = train_all(grid_run(new_run, **knobs)), grid_run(new_run, **knobs)
    calibrate = train_gpt.calibrate

    def signal_and_calibrate(run: Run, *args: Any) -> Any:
        run.signal_received = True
        return calibrate(run, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train_gpt, "calibrate", signal_and_calibrate)
        train_all(stopped)
    assert [f.name for f in train_gpt.checkpoint_folders(stopped)] == ["step_000000004"]
    resumed = train_all(grid_run(new_run, **knobs, run_dir=str(stopped.directory)))
    same_bits(resumed, whole)


def test_a_run_whose_time_is_over_once_the_scales_are_known_makes_no_further_step(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    is_over, solve_grid = train_gpt.Progress.is_over, train_gpt.Trainer.solve_grid

    def train_until_grid(run: train_gpt.Run) -> tuple[train_gpt.Trainer, dict[str, torch.Tensor]]:
        """Train; the time is over when the scales are known. The tensors of the checkpoint."""
        begun = []

        def noted_solve(*args: Any) -> bool:
            begun.append(True)
            return solve_grid(*args)

        def is_over_with_grid(self: train_gpt.Progress, *args: Any, **steps: Any) -> bool:
            return bool(begun) or is_over(self, *args, **steps)

        with monkeypatch.context() as patch:
            patch.setattr(train_gpt.Trainer, "solve_grid", noted_solve)
            patch.setattr(train_gpt.Progress, "is_over", is_over_with_grid)
            trainer = train_all(run)
        (final,) = train_gpt.checkpoint_folders(run)  # although no step was known to be the last
        assert begun and trainer.progress.step == 4 and final.name == "step_000000004"
        meta = train_gpt.read_meta(final)
        assert meta["progress"][1] == trainer.progress.train_s  # with the search
        saved = safetensors.torch.load_file(final / "state.safetensors")
        assert all((saved[name] < 0).all() for name in saved if name.startswith("grid/0/"))
        return trainer, saved

    knobs = {"quant_grid": "uniform", "bigram_vocab_size": 0}
    trainer, _ = train_until_grid(grid_run(new_run, **knobs))
    # Nothing was trained on the grid, so nothing is rounded to it.
    stopped = grid_run(new_run, **knobs, run_dir=str(trainer.run.directory / "x"))
    with noted_steps(4), pytest.raises(Interrupted):
        train_all(stopped)
    resumed, state = train_until_grid(grid_run(new_run, **knobs, run_dir=str(stopped.directory)))
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, state[f"model/{name}"]), name
    for end in (trainer, resumed):
        assert all(rows_columns(module).max() < 0 for module in end.late_modules.values())


def quantized_after(trainer: Trainer, **changes: Any) -> dict[str, Any]:
    """The tensors of the artifact of a trained model, made with changed knobs."""
    run = dataclasses.replace(
        trainer.run, cfg=dataclasses.replace(trainer.run.cfg, **changes)
    )  # fmt: skip
    hessians = train_gpt.calibrate(run, trainer.model, open_loader(run), trainer.progress)
    payload = train_gpt.quantize_and_encode(run, trainer.model, hessians, "0" * 64)
    header, body = train_gpt.decode_header(payload)
    return train_gpt.decode_tensors(header, body, *train_gpt.model_layout(run.cfg))


def test_trained_codes_that_leave_too_few_bytes_get_new_scales(new_run: MakeRun):
    trainer = train_all(grid_run(new_run))
    log = trainer.run.directory / "train.log"
    for budget, is_fresh in ((9000, False), (4500, True)):
        tensors = quantized_after(trainer, artifact_budget_bytes=budget)
        plain = quantized_after(trainer, artifact_budget_bytes=budget, late_qat_threshold=0.0)
        assert ("new scales" in log.read_text()) == is_fresh
        for name in ("tok_emb.weight", *trainer.late_modules):
            weight = tensors[name].dequantized()
            assert torch.equal(weight, plain[name].dequantized()) == is_fresh, name


@pytest.mark.parametrize(
    "knobs",
    [
        {"late_qat_threshold": 0.1, "min_lr": 0.1},
        {"late_qat_threshold": 0.05, "min_lr": 0.1},
        {"late_qat_threshold": 0.5, "warmdown_frac": 0.0},
    ],
)
def test_late_qat_that_would_never_begin_is_refused(knobs: dict[str, Any]):
    with pytest.raises(InputError, match="LATE_QAT_THRESHOLD=.* above MIN_LR=.* never begins"):
        tiny_config(**knobs)
    tiny_config(**{**knobs, "late_qat_threshold": 0})
    tiny_config(**{**knobs, "late_qat_threshold": 0.5, "warmdown_iters": 3})


@pytest.mark.parametrize(
    "knobs",
    [
        {"swa_start_lr": 0.1, "min_lr": 0.1},
        {"swa_start_lr": 0.0, "min_lr": 0.0},
        {"swa_start_lr": 0.4, "warmdown_frac": 0.0},
    ],
)
def test_averaging_that_would_never_begin_is_refused(knobs: dict[str, Any]):
    with pytest.raises(InputError, match="SWA_START_LR=.* above MIN_LR=.* never begins"):
        tiny_config(**knobs, averaging="swa")
    tiny_config(**knobs, averaging="ema")
    with pytest.raises(InputError, match="TAIL_FRAC=0"):
        tiny_config(averaging="tail", tail_frac=0.0)


@pytest.mark.parametrize("quant_grid", ["uniform", "trellis"])
def test_a_run_that_ends_before_the_grid_is_known_is_quantized_as_without(
    quant_grid: str, new_run: MakeRun
):
    payloads = []
    for grid in ("artifact", "rows"):
        run = grid_run(new_run, qat_grid=grid, late_qat_threshold=0.1, quant_grid=quant_grid)
        trainer = train_all(run)  # the last multiplier is 1/6
        hessians = train_gpt.calibrate(run, trainer.model, open_loader(run), trainer.progress)
        payloads.append(train_gpt.quantize_and_encode(run, trainer.model, hessians, "0" * 64))
        is_told = "late QAT has not begun" in (run.directory / "train.log").read_text()
        assert is_told == (grid == "artifact")
    assert payloads[0] == payloads[1]


@pytest.mark.parametrize(
    "knobs",
    [{"averaging": "ema"}, {"clip_sigmas": "13"}, {"row_steps": "max"}, {"prune_frac": 0.03}],
)
def test_the_grid_of_the_artifact_needs_solved_scales_of_the_last_weights(knobs: dict[str, Any]):
    if "row_steps" in knobs:
        knobs = {**knobs, "quant_grid": "uniform"}
    with pytest.raises(InputError, match="QAT_GRID=artifact needs AVERAGING=none"):
        tiny_config(**{**ON_GRID, **knobs})
    tiny_config(**{**ON_GRID, **knobs, "late_qat_threshold": 0})  # not used


@pytest.mark.parametrize(
    "backend",
    [  # traced; made machine code
        pytest.param(backend, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor")
    ],
)
def test_after_compilation_the_switch_is_really_active(
    backend: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    if backend == "inductor" and (
        reason := train_gpt.compile_unavailable_reason(torch.device("cpu"))
    ):
        pytest.skip(reason)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    # The groups of the blocks: all that is compiled.
    knobs = {**SMALL, **BITS, "num_layers": 1, "train_batch_tokens": 64}
    run = make_run(**knobs)
    trainers = [Trainer(run, random_model(run.cfg)) for _ in range(2)]
    trainers[1].model.compile_()
    ids = torch.randint(2, run.cfg.vocab_size, (2, 33))
    losses: list[list[float]] = []
    for qat in (False, True, False):
        losses.append([])
        for trainer in trainers:
            trainer.enter_stage(TrainStage(32, 64, loops=0, qat=qat))
            losses[-1].append(trainer.model.loss(ids[:, :-1], ids[:, 1:]).item())
    # Machine code may keep the scales in float32, see below: some codes then differ by one.
    rel = 1e-5 if backend == "aot_eager" else 2e-4
    for eager, compiled in losses:
        assert compiled == pytest.approx(eager, rel=rel)
    assert abs(losses[0][1] - losses[1][1]) > 1e-3 * losses[0][1]
    assert losses[2][1] == pytest.approx(losses[0][1], rel=1e-6)
    grid = stored(trainers[1].model, "attn,mlp")
    expected = grid.loss(ids[:, :-1], ids[:, 1:]).item()
    assert losses[1][1] == pytest.approx(expected, rel=rel)


@pytest.mark.slow
def test_compiled_too_the_straight_through_grid_is_that_of_the_stored_weights():
    if reason := train_gpt.compile_unavailable_reason(torch.device("cpu")):
        pytest.skip(reason)
    torch.compiler.reset()
    cfg = tiny_config(late_qat_threshold=0.5)
    weight = torch.randn(64, 64)
    with torch._inductor.config.patch(emulate_precision_casts=False):  # put back afterwards
        GPT(cfg, train_gpt.ATTENTION_BACKENDS["sdpa"](), torch.float32).compile_()
        found = torch.compile(fake_quantize, dynamic=False)(weight, 6)
    expected = quantize_rows(weight, 6).dequantized()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)


# --- The coprime loader --------------------------------------------------------------------------

T = 4


def make_stream(folder: Path, *sizes: int) -> TokenStream:
    """Shards of these sizes."""
    paths = [folder / f"x_train_{n:06d}.bin" for n in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        write_raw_shard(path, np.full(size, 5))
    return TokenStream(paths, 10)


def visits_of(plan: CoprimeSampler, sizes: tuple[int, ...], epoch: int) -> list[tuple[int, int]]:
    """Shard and place in the shard of each window of an epoch, in order."""
    firsts = np.cumsum([0, *sizes])
    starts = [plan.start((epoch * plan.num_windows + n) * T) for n in range(plan.num_windows)]
    shards = [int(np.searchsorted(firsts, start, side="right")) - 1 for start in starts]
    return [
        (shard, start - int(firsts[shard])) for shard, start in zip(shards, starts, strict=True)
    ]


@pytest.mark.parametrize("sizes", [(403, 205, 77), (8,), (16,), (13, 3, 31)])
def test_the_coprime_plan_visits_every_window_once_an_epoch_by_one_stride_a_shard(
    sizes: tuple[int, ...], tmp_path: Path
):
    plan = CoprimeSampler(make_stream(tmp_path, *sizes), T, tiny_config(seed=3))
    for epoch in range(8):
        visits = visits_of(plan, sizes, epoch)
        for shard, size in enumerate(sizes):
            places = [place for own, place in visits if own == shard]
            n = max(0, (size - T) // T)  # all windows with targets, less one for the phase
            assert len(places) == n
            if n == 0:
                continue
            phase = min(places)
            assert sorted(places) == [phase + i * T for i in range(n)] and 0 <= phase < T
            assert max(places) + T + 1 <= size
            order = [(place - phase) // T for place in places]
            strides = {(b - a) % n for a, b in itertools.pairwise(order)}
            assert len(strides) <= 1 and all(math.gcd(stride, n) == 1 for stride in strides)


def test_phase_beginning_and_stride_are_drawn_for_each_epoch_and_seed(tmp_path: Path):
    sizes = (4 * 101 + 3, 4 * 97 + 3)
    stream = make_stream(tmp_path, *sizes)
    walks = set()
    for seed, epoch in itertools.product(range(4), range(4)):
        visits = visits_of(CoprimeSampler(stream, T, tiny_config(seed=seed)), sizes, epoch)
        assert visits == visits_of(CoprimeSampler(stream, T, tiny_config(seed=seed)), sizes, epoch)
        for shard in range(2):
            own = [place for s, place in visits if s == shard]
            walks.add((shard, own[0], (own[1] - own[0]) // T % 100))
    assert len(walks) >= 30  # of 32: two are equal by chance once in about 100 * 400 / 16 pairs


def test_shards_take_turns_in_proportion_to_what_remains_of_them(tmp_path: Path):
    sizes = (4 * 301, 4 * 101)
    stream = make_stream(tmp_path, *sizes)
    for seed in range(3):
        shards = [
            shard
            for shard, _ in visits_of(CoprimeSampler(stream, T, tiny_config(seed=seed)), sizes, 0)
        ]
        for part in np.split(np.array(shards), 4):
            # 25 of 100 are expected of the smaller; hypergeometric, with a deviation of 3.75.
            assert 10 <= Counter(part.tolist())[1] <= 40
        changes = sum(a != b for a, b in itertools.pairwise(shards))
        assert 110 < changes < 190  # 2 * 400 * 3/16 = 150 in random order; 1 if one by one


def test_ranks_share_the_coprime_windows_without_overlap(data: TinyData):
    cfg = tiny_config(loader="coprime", data_path=str(data.folder))
    stream = TokenStream(train_gpt.find_shards(cfg, "train"), cfg.vocab_size)
    alone = BatchLoader(cfg, stream, rank=0, world_size=1)
    ranks = [BatchLoader(cfg, stream, rank=rank, world_size=4) for rank in range(4)]
    for step in (0, 1, 7):
        joined = torch.cat([loader.read(step * 256, 32, 256) for loader in ranks])
        assert torch.equal(joined, alone.read(step * 256, 32, 256))


# --- Muon over several ranks ---------------------------------------------------------------------


class Ranks:
    """The collectives among threads of this process, each of which plays a rank."""

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch):
        self.world_size, self.local_shard = world_size, threading.local()
        self.barrier = threading.Barrier(world_size, timeout=60)
        self.slots: list[Any] = [None] * world_size
        self.done = SimpleNamespace(wait=lambda: None)
        for name in ("reduce_scatter_single", "all_gather_single", "all_reduce"):
            monkeypatch.setattr(torch.distributed, name, getattr(self, name), raising=False)

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        """What all ranks have brought."""
        self.slots[self.local_shard.rank] = tensor.clone()
        self.barrier.wait()
        brought = list(self.slots)
        self.barrier.wait()
        return brought

    def reduce_scatter_single(self, out: Tensor, whole: Tensor, **options: Any) -> Any:
        total = torch.stack(self.exchange(whole)).sum(dim=0)
        out.copy_(total.chunk(self.world_size)[self.local_shard.rank])
        return self.done

    def all_gather_single(self, out: Tensor, own: Tensor, **options: Any) -> Any:
        out.copy_(torch.cat(self.exchange(own)))
        return self.done

    def all_reduce(self, tensor: Tensor, **options: Any) -> Any:
        tensor.copy_(torch.stack(self.exchange(tensor)).sum(dim=0))
        return self.done

    def play(self, work: Callable[[int], Any]) -> list[Any]:
        """work(rank) of all ranks at once."""

        def as_rank(rank: int) -> Any:
            self.local_shard.rank = rank
            torch.set_num_threads(1)
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(as_rank, range(self.world_size)))


def as_rank_of(run: Run, rank: int, world_size: int) -> Run:
    """The run as one of several processes has it."""
    run.rank, run.world_size = rank, world_size
    return run


MATRICES = [(8, 8), (16, 8), (8, 16), (8, 8), (16, 8), (8, 8), (8, 8), (8, 8)]


MORE_MUON = {"muon_fast_weight": 0.4, "muon_beta2": 0.9, "muon_cautious_wd": True}


@pytest.mark.parametrize("more", [{}, MORE_MUON], ids=["plain", "more"])
@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_parallel_muon_is_muon_on_the_averaged_gradients(
    world_size: int, more: dict[str, Any], make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    # Stacks of 5, 2 and 1 matrices: shares that are uneven, and ranks that have none.
    knobs = {"muon_wd": 0.1, "muon_row_norm": True, **more}
    initial = [torch.randn(shape) for shape in MATRICES]
    grads = torch.Generator().manual_seed(1)
    brought = [[[torch.randn(shape, generator=grads) for shape in MATRICES]
                for _ in range(world_size)] for _ in range(3)]  # fmt: skip
    alone = [nn.Parameter(weight.clone()) for weight in initial]
    single = Muon(alone, make_run(**knobs))
    for step in range(3):
        for i, param in enumerate(alone):
            param.grad = torch.stack([own[i] for own in brought[step]]).mean(dim=0)
        single.start_reduce()
        single.step(0.1, 0.9, 0.1)
    ranks = Ranks(world_size, monkeypatch)

    def work(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        params = [nn.Parameter(weight.clone()) for weight in initial]
        muon = Muon(params, as_rank_of(make_run(**knobs), rank, world_size))
        for step in range(3):
            for param, grad in zip(params, brought[step][rank], strict=True):
                param.grad = grad / world_size
            muon.start_reduce()
            muon.step(0.1, 0.9, 0.1)
            muon.gather_buffers()  # as for a checkpoint: training goes on from it
        return [param.detach() for param in params], muon.buffers

    results = ranks.play(work)
    for params, buffers in results:
        for found, first, expected in zip(params, results[0][0], alone, strict=True):
            assert torch.equal(found, first)  # replicas are equal to the bit
            # Sums in another order, which the iteration amplifies by some hundreds.
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-4)
        for buffer, whole in zip(buffers, single.buffers, strict=True):
            torch.testing.assert_close(buffer[: len(whole)], whole, rtol=0, atol=1e-5)
            assert (buffer[len(whole) :] == 0).all()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_steps_of_ranks_on_their_rows_are_those_of_one_process_on_all_rows(
    clip: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    knobs = {**PARTS, "train_batch_tokens": 128, "grad_clip_norm": clip, "scalar_lr": 0.001,
             "tied_embed_lr": 0.001, "adam_eps": 1e-4}  # fmt: skip
    windows = torch.randint(2, 320, (2, 4, 33))
    run = make_run(**knobs)
    alone = Trainer(run, random_model(run.cfg))
    expected = [alone.step(window).item() for window in windows]
    world_size = 2
    ranks = Ranks(world_size, monkeypatch)
    trainers = []
    for rank in range(world_size):
        run = as_rank_of(make_run(**knobs), rank, world_size)
        trainers.append(Trainer(run, random_model(run.cfg)))

    def work(rank: int) -> list[float]:
        return [trainers[rank].step(w.chunk(world_size)[rank]).item() for w in windows]

    for losses in ranks.play(work):
        assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in alone.model.named_parameters():
        found = [trainer.model.get_parameter(name) for trainer in trainers]
        assert torch.equal(found[0], found[1]), name
        torch.testing.assert_close(found[0], parameter, rtol=0, atol=5e-4, msg=name)
    assert trainers[0].progress == Progress(step=2, tokens=256)
