"""Training: gradients, clocks, averages, checkpoints; runs that are stopped, killed and resumed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import train_gpt
from tests.conftest import MakeRun, TinyData, environment, tiny_config, write_raw_shard
from tests.processes import (
    SCRIPT,
    Result,
    log_events,
    losses,
    metrics,
    run_script,
    start,
    submission,
)
from train_gpt import (
    GPT,
    BatchLoader,
    Config,
    InputError,
    Interrupted,
    Progress,
    Run,
    RunFailed,
    Trainer,
)

# --- Training in this process --------------------------------------------------------------------


@pytest.fixture
def new_run(make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """make_run with 2 layers, and a folder of its own for each run."""
    numbers = itertools.count()

    def make(**changes: Any) -> Run:
        run_dir = str(tmp_path / f"run_{next(numbers)}")
        return make_run(**{"num_layers": 2, **changes, "run_dir": run_dir})

    return make


def no_validation() -> train_gpt.Score:
    raise AssertionError("not asked for")


def open_loader(run: Run) -> BatchLoader:
    stream = train_gpt.TokenStream(train_gpt.find_shards(run.cfg, "train"), run.cfg.vocab_size)
    return BatchLoader(run.cfg, stream, rank=0, world_size=1)


def open_trainer(run: Run) -> tuple[Trainer, BatchLoader]:
    loader = open_loader(run)
    return Trainer(run, train_gpt.build_model(run)), loader


def first_batch(loader: BatchLoader, cfg: Config) -> torch.Tensor:
    """The windows of the first step."""
    return loader.batch(0, train_gpt.train_stage_at(cfg, 0.0, 1.0))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_weights(
    run: Run, validate: Callable[[], train_gpt.Score] = no_validation
) -> dict[str, torch.Tensor]:
    """The exported weights of a whole training."""
    model = train_gpt.build_model(run)
    train_gpt.train(run, model, open_loader(run), validate)
    return weights(model)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loss_falls_from_that_of_a_guess_to_near_zero_on_a_repeating_text(
    new_run: MakeRun, tmp_path: Path
):
    folder = tmp_path / "cycle"
    folder.mkdir()
    write_raw_shard(folder / "x_train_000000.bin", np.tile(np.arange(10, 50), 200))
    run = new_run(data_path=str(folder), iterations=25, train_log_every=1)
    train_weights(run)
    curve = losses(run.directory)
    assert curve[1] == pytest.approx(math.log(run.cfg.vocab_size), abs=0.05)
    assert curve[25] < 0.5  # each id tells the next one


def test_same_seed_gives_the_same_bits_and_another_seed_others(new_run: MakeRun):
    first, again, other = (train_weights(new_run(seed=seed, iterations=4)) for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in ("tok_emb.weight",))


@pytest.mark.parametrize("loader", sorted(train_gpt.SAMPLERS))
def test_another_seed_reads_other_windows(new_run: MakeRun, loader):
    runs = [new_run(seed=seed, loader=loader) for seed in (1, 1, 2)]
    batches = [first_batch(open_loader(run), run.cfg) for run in runs]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_gradient_is_that_of_the_mean_cross_entropy_of_the_whole_batch(
    new_run: MakeRun, data: TinyData
):
    window_BT = torch.from_numpy(data.train[0][: 8 * 33]).view(8, 33)
    model = train_gpt.build_model(new_run())
    logits_NV = model.logits(window_BT[:, :-1]).flatten(0, 1)
    expected_loss = F.cross_entropy(logits_NV, window_BT[:, 1:].flatten())
    expected_loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for micro_batch_tokens in (32, 64, 128, 256, 10_000):  # 8, 4, 2, 1, 1 passes
        trainer, _ = open_trainer(new_run(micro_batch_tokens=micro_batch_tokens))
        loss = trainer.accumulate_gradients(window_BT)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=0)
        found = {name: p.grad for name, p in trainer.model.named_parameters()}
        # Sums over 256 targets in another order: float32 rounding of the largest terms.
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_gradient_accumulation_trains_as_one_big_batch_does(new_run: MakeRun):
    curves = []
    for micro_batch_tokens in (32, 256):
        run = new_run(
            micro_batch_tokens=micro_batch_tokens,
            train_log_every=1,
        )
        train_weights(run)
        curves.append(losses(run.directory))
    # Adam's first steps are lr * sign(gradient): rounding of a tiny gradient moves a weight by lr.
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


@pytest.mark.parametrize("rows, micro_rows, passes", [(8, 8, 1), (8, 3, 4), (6, 4, 2), (7, 4, 7)])
@pytest.mark.parametrize("seq_len", [32, 16])  # the limit is in tokens, whatever the context is
def test_micro_batches_are_equal_and_within_the_limit(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, *, rows, micro_rows, passes, seq_len
):
    trainer, _ = open_trainer(new_run(micro_batch_tokens=micro_rows * seq_len, num_layers=1))
    loss, shapes = GPT.loss, []

    def noted(self: GPT, *args: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(tuple(args[0].shape))
        return loss(self, *args, **options)

    monkeypatch.setattr(GPT, "loss", noted)
    trainer.accumulate_gradients(torch.randint(320, (rows, seq_len + 1)))
    assert shapes == [(rows // passes, seq_len)] * passes
    assert rows % passes == 0 and rows // passes <= micro_rows


def gradients_at_update(trainer: Trainer, window_BT: torch.Tensor) -> torch.Tensor:
    """All gradients as the optimizers see them, in one vector."""
    seen: list[torch.Tensor] = []
    step = trainer.adam.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        # AdamW reads the gradients of the parameters, Muon its own copies of the matrices'.
        grads = [p.grad for p in trainer.adam_params] + trainer.muon.reduced_gradients()
        seen.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
        assert len(seen[-1]) == sum(p.numel() for p in trainer.params)
        return step(*args, **kwargs)

    trainer.adam.step = spy  # type: ignore[method-assign]
    trainer.step(window_BT)
    return seen[0].double()


def test_clip_bounds_the_global_norm_and_keeps_the_direction(new_run: MakeRun):
    trainer, loader = open_trainer(new_run())
    window_BT = first_batch(loader, trainer.run.cfg)
    free = gradients_at_update(trainer, window_BT)
    bound = float(free.norm()) / 3
    trainer, loader = open_trainer(new_run(grad_clip_norm=bound))
    clipped = gradients_at_update(trainer, window_BT)
    assert float(clipped.norm()) == pytest.approx(bound, rel=1e-4)
    torch.testing.assert_close(clipped, free / 3, rtol=1e-3, atol=1e-8)


def test_clip_above_the_norm_changes_nothing(new_run: MakeRun):
    runs = [new_run(iterations=3, grad_clip_norm=bound) for bound in (0.0, 1e9)]
    assert same_bits(*map(train_weights, runs))


@pytest.mark.parametrize("averaging", ["none", "ema", "swa"])
def test_warm_up_leaves_no_trace(new_run: MakeRun, averaging):
    knobs = dict(averaging=averaging, iterations=5, swa_every=1, swa_start_lr=0.9, adam_wd=0.1)
    cold = train_weights(new_run(warmup_steps=0, **knobs))
    warm = train_weights(new_run(warmup_steps=2, **knobs))
    assert same_bits(cold, warm)


class Backend:
    """A compiler for torch.compile whose graphs multiply what a block returns, or raise."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        if not self.factor:
            raise ValueError("no such kernel")
        return lambda *args: tuple(
            x if x is None else self.factor * x for x in graph.forward(*args)
        )


def compiled_trainer(run: train_gpt.Run, whole: float, blocks: float) -> Trainer:
    """A trainer whose compiled forms compute with these factors; compiled steps take no time."""
    trainer = Trainer(run, train_gpt.build_model(run))
    model, measured = trainer.model, trainer.loss_and_gradient

    def timed(window_BT: torch.Tensor, max_tokens: int) -> Any:
        is_eager = max_tokens < run.cfg.micro_batch_tokens
        return measured(window_BT, max_tokens)[0], float(is_eager)

    trainer.loss_and_gradient = timed  # type: ignore[method-assign]
    model.run_block = torch.compile(train_gpt.run_block, backend=Backend(blocks))
    forward = torch.compile(train_gpt.GPT.forward, backend=Backend(whole))
    model.train_forward = functools.partial(forward, model)
    return trainer


@pytest.mark.parametrize(
    "whole, blocks, is_kept",
    [pytest.param(1, 1, True, marks=pytest.mark.slow), (1.1, 0, False)],
)
def test_a_compiled_form_that_is_wrong_or_fails_is_dropped(
    new_run: MakeRun, whole: float, blocks: float, is_kept: bool
):
    torch._dynamo.reset()
    run = new_run(train_batch_tokens=256, micro_batch_tokens=128)
    trainer = compiled_trainer(run, whole, blocks)
    trainer.check_compiled(torch.randint(run.cfg.vocab_size, (16, 17)))
    model = trainer.model
    assert is_kept == (model.train_forward is not None)
    assert is_kept == (model.run_block is not train_gpt.run_block)
    shown = {
        x["form"]: (x["loss_error"], x["grad_error"]) for x in metrics(run.directory, "kernels")
    }
    assert [*shown] == ["whole"] and (max(shown["whole"]) < 1e-5) == is_kept
    warnings = [w["text"] for w in metrics(run.directory, "warning")]
    assert ["no such kernel" in text for text in warnings] == ([] if is_kept else [False, True])
    assert all(x.grad is None for x in trainer.params)


def test_a_compiled_form_that_is_slower_is_dropped(new_run: MakeRun):
    torch._dynamo.reset()
    run = new_run()
    trainer = compiled_trainer(run, 1, 1)
    values = (torch.ones(()), torch.ones(3))
    seconds = iter([1.0, 2.0, 0.5])
    trainer.loss_and_gradient = lambda *_: (values, next(seconds))  # type: ignore[method-assign]
    trainer.check_compiled(torch.zeros(4, 17, dtype=torch.int64))
    assert trainer.model.train_forward is None
    assert trainer.model.run_block is not train_gpt.run_block
    shown = metrics(run.directory, "kernels")
    assert [(x["form"], x["ms"]) for x in shown] == [("whole", 2000), ("blocks", 500)]


def test_validation_during_training_does_not_change_the_result(new_run: MakeRun, data: TinyData):
    quiet = train_weights(new_run(iterations=6, val_loss_every=0))
    run = new_run(iterations=6, val_loss_every=2)
    model = train_gpt.build_model(run)
    validation = train_gpt.load_validation(run.cfg, data.tokenizer)
    scores: list[train_gpt.Score] = []

    def validate() -> train_gpt.Score:
        scores.append(train_gpt.evaluate(run, model, validation, 8))
        return scores[-1]

    train_gpt.train(run, model, open_loader(run), validate)
    assert same_bits(quiet, weights(model))
    records = metrics(run.directory, "val")
    assert [r["step"] for r in records] == [2, 4]  # the end has its own evaluation
    assert [r["val_loss"] for r in records] == [s.summary()["val_loss"] for s in scores]


def test_batch_that_does_not_divide_over_the_ranks_is_refused_with_the_numbers(new_run: MakeRun):
    run = new_run()
    stream = train_gpt.TokenStream(train_gpt.find_shards(run.cfg, "train"), run.cfg.vocab_size)
    with pytest.raises(InputError) as caught:
        BatchLoader(run.cfg, stream, rank=0, world_size=3)
    for number in ("TRAIN_BATCH_TOKENS=256", "TRAIN_SEQ_LEN=32", " 8 rows", "3 ranks", "96 tokens"):
        assert number in str(caught.value)


def test_batch_that_is_no_multiple_of_the_length_is_refused_with_the_numbers():
    with pytest.raises(InputError, match="TRAIN_BATCH_TOKENS=250 .* multiple of TRAIN_SEQ_LEN=32"):
        tiny_config(train_batch_tokens=250)


# --- Averages ------------------------------------------------------------------------------------


@pytest.fixture
def trajectory(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Weights in float64 at the start and after each of 10 steps whose rate falls to zero."""
    found: list[dict[str, Any]] = []
    step = Trainer.step

    def spy(self: Trainer, window_BT: torch.Tensor) -> torch.Tensor:
        if not found:
            found.append({k: w.double() for k, w in weights(self.model).items()})
        loss = step(self, window_BT)
        found.append({k: w.double() for k, w in weights(self.model).items()})
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", spy)
        train_weights(new_run(warmdown_frac=1.0))
    return found


# float32 sums of a few terms
AVERAGE_TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def test_ema_exports_the_moving_average_of_all_steps_and_the_start(
    new_run: MakeRun, trajectory: list[dict[str, Any]]
):
    exported = train_weights(new_run(warmdown_frac=1.0, averaging="ema", ema_decay=0.7))
    share = [0.7**10, *(0.3 * 0.7 ** (10 - step) for step in range(1, 11))]
    assert sum(share) == pytest.approx(1)
    for name, weight in exported.items():
        expected = sum(s * w[name] for s, w in zip(share, trajectory, strict=True))
        torch.testing.assert_close(weight.double(), expected, **AVERAGE_TOLERANCE)


def test_swa_exports_the_mean_of_the_steps_in_the_tail_of_the_schedule(
    new_run: MakeRun, trajectory: list[dict[str, Any]]
):
    knobs = dict(warmdown_frac=1.0, averaging="swa", swa_start_lr=0.45, swa_every=2)
    exported = train_weights(new_run(**knobs))
    # Step n of 10 ran at the rate 1 - (n - 1) / 10, which is below 0.45 from step 7 on.
    for name, weight in exported.items():
        expected = (trajectory[8][name] + trajectory[10][name]) / 2
        torch.testing.assert_close(weight.double(), expected, **AVERAGE_TOLERANCE)


def test_without_averaging_the_last_weights_are_exported(
    new_run: MakeRun, trajectory: list[dict[str, Any]]
):
    exported = train_weights(new_run(warmdown_frac=1.0))
    assert all(torch.equal(exported[name].double(), trajectory[10][name]) for name in exported)


@pytest.mark.parametrize("begins, is_warned", [("0.95", True), ("0.5", False), ("0.5,0.95", True)])
def test_loops_that_were_never_trained_are_announced(
    new_run: MakeRun, begins: str, is_warned: bool
):
    run = new_run(num_loops=2, loop_start=0, loop_end=1, enable_looping_at=begins)
    train_weights(run)
    texts = [event["text"] for event in metrics(run.directory, "warning")]
    expected = f"ENABLE_LOOPING_AT={begins} is after the last step"
    assert any(text.startswith(expected) for text in texts) == is_warned, texts


@pytest.mark.parametrize(
    "knobs, is_warned",
    [
        ({"row_steps": "solved"}, True),
        ({"row_steps": "solved", "qat_grid": "artifact"}, False),
        ({"row_steps": "max"}, False),
        ({"row_steps": "solved", "late_qat_threshold": 0.0}, False),
    ],
)
def test_late_qat_to_scales_that_are_not_stored_is_announced(
    new_run: MakeRun, knobs: dict[str, Any], is_warned: bool
):
    run = new_run(**{"warmdown_frac": 1.0, "late_qat_threshold": 0.1, "quantizer": "gptq", **knobs})
    (run.directory / "train_gpt.py").write_bytes(b"the packed script")  # whose size is read
    train_weights(run)
    texts = [event["text"] for event in metrics(run.directory, "warning")]
    assert any("QAT_GRID=rows" in text for text in texts) == is_warned, texts


def test_averages_that_are_of_no_use_are_announced(new_run: MakeRun, trajectory):
    run = new_run(averaging="swa", swa_every=100, warmdown_frac=1.0)
    exported = train_weights(run)
    assert "swa averaged no weights" in metrics(run.directory, "warning")[-1]["text"]
    assert all(torch.equal(exported[name].double(), trajectory[10][name]) for name in exported)
    run = new_run(averaging="ema", ema_decay=0.999)
    train_weights(run)
    text = metrics(run.directory, "warning")[-1]["text"]
    assert text.startswith(f"{0.999**10:.1%} of the EMA is still the initial weights")


@pytest.mark.parametrize("finished_before", [False, True])
def test_score_before_quantization_is_that_of_the_weights_as_they_are(
    new_run: MakeRun, data: TinyData, finished_before
):
    knobs = dict(late_qat_threshold=0.9, attn_bits=4, mlp_bits=4, warmup_steps=1, iterations=4)
    run = new_run(**knobs)
    model, other = train_gpt.build_model(run), train_gpt.build_model(run)
    train_gpt.train(run, model, open_loader(run), no_validation)
    if finished_before:  # the checkpoint after the last step is all that is left
        model = train_gpt.build_model(run)
        train_gpt.train(run, model, open_loader(run), no_validation)
    other.load_state_dict(model.state_dict())
    validation = train_gpt.load_validation(run.cfg, data.tokenizer)
    found, expected = (train_gpt.evaluate(run, m, validation, 32) for m in (model, other))
    assert found.nats == expected.nats


@pytest.mark.parametrize("averaging", ["ema", pytest.param("swa", marks=pytest.mark.slow)])
def test_artifact_holds_the_average_of_the_weights(
    new_run: MakeRun, data: TinyData, tmp_path: Path, averaging
):
    cfg = tiny_config(
        mode="train", data_path=str(data.folder), run_dir="run", iterations=6, warmdown_frac=1.0,
        averaging=averaging, ema_decay=0.5, swa_every=1,
    )  # fmt: skip
    (tmp_path / "work").mkdir()
    result = run_script(environment(cfg), tmp_path / "work")
    assert result.status == 0, result.err
    expected = train_weights(new_run(**{**vars_of(cfg), "mode": "all"}))
    last = train_weights(new_run(**{**vars_of(cfg), "averaging": "none"}))
    _, tokenizer_sha = train_gpt.load_tokenizer(cfg)
    path = tmp_path / "work" / "run" / "artifact.bin"
    stored = weights(train_gpt.read_artifact(path, new_run(), tokenizer_sha))
    for name, weight in expected.items():
        if weight.dim() == 2 and "scale" not in name and "mix" not in name:
            step = weight.abs().amax(dim=1, keepdim=True) / 127  # int8 codes, one scale a row
            assert ((stored[name] - weight).abs() <= 0.51 * step + 1e-7).all(), name
        else:
            torch.testing.assert_close(stored[name], weight, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(stored["tok_emb.weight"], last["tok_emb.weight"], atol=1e-3)


def vars_of(cfg: Config) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}


# --- The clock -----------------------------------------------------------------------------------


class ClockedTrainer(Trainer):
    """A trainer whose steps do nothing but take the next of `durations` seconds."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        super().__init__(run, train_gpt.build_model(run))
        self.now_s = 0.0
        self.durations: Iterator[float] = iter(())
        clock = SimpleNamespace(perf_counter=lambda: self.now_s)
        monkeypatch.setattr(train_gpt, "time", clock)

    def step(self, window_BT: torch.Tensor) -> torch.Tensor:
        self.now_s += next(self.durations)
        self.progress = self.progress._replace(step=self.progress.step + 1)
        return torch.tensor(1.0)

    def run_for(self, durations: Iterator[float], start: Progress | None = None) -> Progress:
        """Progress after a training with steps of these durations."""
        self.durations, self.progress = durations, start or Progress()
        loader: Any = SimpleNamespace(batch=lambda position, phase: None)
        train_gpt.train_loop(self, loader, no_validation)
        return self.progress


class LateLoss:
    """The loss of a step that a device computes; reading it waits for the end of the step."""

    def __init__(self, trainer: QueueingTrainer, end_s: float):
        self.trainer, self.end_s, self.step = trainer, end_s, trainer.progress.step

    def item(self) -> float:
        self.trainer.now_s = max(self.trainer.now_s, self.end_s)
        self.trainer.reads.append((self.trainer.progress.step, self.step))
        return self.trainer.losses.get(self.step, float(self.step))


class QueueingTrainer(ClockedTrainer):
    """Its device takes `durations` for the steps that it is given, one after the other."""

    HOST_S = 0.03  # what the host needs to prepare a step

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        super().__init__(run, monkeypatch)
        self.free_s, self.reads, self.losses = 0.0, list[tuple[int, int]](), dict[int, float]()
        monkeypatch.setattr(Run, "is_asynchronous", True)
        monkeypatch.setattr(Run, "start_reading", lambda _, loss: loss.item)

    def step(self, window_BT: torch.Tensor) -> Any:
        self.now_s += self.HOST_S
        self.free_s = max(self.free_s, self.now_s) + next(self.durations)
        self.progress = self.progress._replace(step=self.progress.step + 1)
        return LateLoss(self, self.free_s)


def test_a_device_never_waits_for_the_host_between_steps(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(iterations=50, num_layers=1, train_log_every=10**6)
    trainer = QueueingTrainer(run, monkeypatch)
    first = train_gpt.FIRST_LOGGED_STEPS  # each of them is waited for, because it is logged
    assert trainer.run_for(forever(1.0)).train_s == pytest.approx(50 + trainer.HOST_S * (first + 1))
    late = [(step, step - 1) for step in range(first + 2, 51)]
    assert trainer.reads == [*((step, step) for step in range(1, first + 1)), *late, (50, 50)]


def test_training_that_the_clock_ended_takes_no_further_step_on_any_device(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    for kind in (ClockedTrainer, QueueingTrainer):
        for budget_s in np.linspace(20, 29, 31):
            run = clocked_run(new_run, budget_s)
            durations = itertools.chain([1.0] * 10, forever(3.0))
            ended = kind(run, monkeypatch).run_for(durations)
            again = kind(run, monkeypatch).run_for(durations, start=ended)
            assert again == ended


@pytest.mark.parametrize("kind", [ClockedTrainer, QueueingTrainer])
def test_steps_that_become_longer_do_not_exceed_the_budget(
    kind: type[ClockedTrainer], new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    for budget_s in np.linspace(60, 64, 21):  # longer than 1.2 times the mean
        trainer = kind(clocked_run(new_run, budget_s), monkeypatch)
        durations = itertools.chain(itertools.repeat(1.0, 40), forever(4.0))
        assert budget_s - 9 < trainer.run_for(durations).train_s <= budget_s


def test_training_goes_on_after_a_single_long_step(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    trainer = ClockedTrainer(clocked_run(new_run, 60.0), monkeypatch)
    assert trainer.run_for(itertools.chain([1.0] * 20, [15.0], forever(1.0))).train_s > 57


def test_losses_in_the_log_are_those_of_their_steps_on_any_device(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(iterations=20, train_log_every=7, val_loss_every=4, checkpoint_every_seconds=2.5)
    trainer = QueueingTrainer(run, monkeypatch)
    trainer.durations = forever(1.0)
    loader: Any = SimpleNamespace(batch=lambda position, phase: None)
    score = train_gpt.Score(1.0, 1, 1, False, 0.0)
    train_gpt.train_loop(trainer, loader, lambda: score)
    logged = {r["step"]: r["train_loss"] for r in metrics(run.directory, "step")}
    assert logged == {step: step for step in (1, 2, 3, 4, 5, 7, 14, 20)}
    # What validates or saves waits for the step, so that no time is lost or counted elsewhere.
    waited = {step for step, read in trainer.reads if step == read}
    assert waited >= {4, 8, 12, 16, 20, *(r["step"] for r in metrics(run.directory, "checkpoint"))}
    assert trainer.progress.train_s == pytest.approx(trainer.now_s)


def test_training_on_a_device_that_runs_ahead_stays_within_the_budget(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    spent = []
    for budget_s in np.linspace(20, 23, 31):
        trainer = QueueingTrainer(clocked_run(new_run, budget_s), monkeypatch)
        end = trainer.run_for(itertools.cycle([0.9, 1.0, 1.1]))
        assert end.train_s == pytest.approx(trainer.free_s, abs=1.0)
        assert trainer.free_s <= budget_s
        spent.append(end.train_s / budget_s)
    assert 0.85 < min(spent) and max(spent) <= 1


def test_a_loss_that_is_not_finite_is_named_with_its_step_on_any_device(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    # 3 is logged, 13 comes before a logged step, 15 before a checkpoint, 16 and 17 as one is due.
    for step in (3, 9, 12, 13, 14, 15, 16, 17, 20):
        run = new_run(iterations=20, num_layers=1, train_log_every=7, checkpoint_every_seconds=16.5)
        trainer = QueueingTrainer(run, monkeypatch)
        trainer.losses[step] = math.nan
        text = (
            rf"the loss is nan at step {step} \(last finite: {step - 1}.0000 at step {step - 1}\)"
        )
        with pytest.raises(RunFailed, match=text):
            trainer.run_for(forever(1.0))
        assert all(int(f.name[-9:]) < step for f in train_gpt.checkpoint_folders(run))


def test_training_stays_within_the_budget_though_its_steps_become_longer(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    for budget_s in np.linspace(40, 43, 16):
        trainer = QueueingTrainer(clocked_run(new_run, budget_s), monkeypatch)
        trainer.run_for(itertools.chain([1.0] * 20, forever(1.15)))
        assert 0.85 * budget_s < trainer.free_s <= budget_s


def forever(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def clocked_run(new_run: MakeRun, budget_s: float, **changes: Any) -> Run:
    knobs = dict(iterations=10**6, num_layers=1, train_log_every=10**6, **changes)
    return new_run(max_wallclock_seconds=budget_s, **knobs)


@pytest.mark.parametrize("budget_s, steps", [(10.5, 10), (10.999, 10), (1.5, 1), (100.25, 100)])
def test_clock_stops_the_training_before_the_step_that_would_pass_the_budget(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, budget_s, steps
):
    trainer = ClockedTrainer(clocked_run(new_run, budget_s), monkeypatch)
    assert trainer.run_for(forever(1.0))[:2] == (steps, steps)


def test_training_with_steps_of_unequal_length_stays_within_the_budget(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    spent = []
    for budget_s in np.linspace(10, 13, 31):
        trainer = ClockedTrainer(clocked_run(new_run, budget_s), monkeypatch)
        spent.append(trainer.run_for(itertools.cycle([0.9, 1.0, 1.1])).train_s / budget_s)
    assert max(spent) <= 1
    assert min(spent) > 0.8  # and is used


def test_checkpoint_near_the_end_does_not_pass_the_budget(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    save, spent = train_gpt.save_checkpoint, []
    for budget_s in np.linspace(20, 27, 29):
        run = clocked_run(new_run, budget_s, checkpoint_every_seconds=9.5)
        trainer = ClockedTrainer(run, monkeypatch)

        def slow_save(*args: Any, trainer: ClockedTrainer = trainer) -> None:
            trainer.now_s += 3.0
            save(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "save_checkpoint", slow_save)
            spent.append(trainer.run_for(forever(1.0)).train_s / budget_s)
    assert max(spent) <= 1


def test_the_last_step_is_logged_if_a_checkpoint_uses_up_the_time(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = clocked_run(new_run, 13.5, checkpoint_every_seconds=9.5)
    trainer, save = ClockedTrainer(run, monkeypatch), train_gpt.save_checkpoint

    def slow_save(*args: Any) -> None:
        trainer.now_s += 3.0
        save(*args)

    monkeypatch.setattr(train_gpt, "save_checkpoint", slow_save)
    assert trainer.run_for(forever(1.0))[:2] == (10, 13.0)
    last = metrics(run.directory, "step")[-1]
    assert (last["step"], last["train_s"]) == (10, 13.0)


def test_training_that_the_clock_ended_takes_no_further_step_when_it_is_resumed(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    trainer = ClockedTrainer(clocked_run(new_run, 10.5), monkeypatch)
    ended = trainer.run_for(forever(1.0))
    assert trainer.run_for(forever(1.0), start=ended) == ended


def test_learning_rate_reaches_the_end_of_its_schedule_by_the_clock(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    trainer = ClockedTrainer(clocked_run(new_run, 100.0), monkeypatch)
    scales: list[float] = []

    def step(window_BT: torch.Tensor) -> torch.Tensor:
        scales.append(trainer.lr_scale())
        return ClockedTrainer.step(trainer, window_BT)

    monkeypatch.setattr(trainer, "step", step)
    trainer.run_for(forever(1.0))
    # WARMDOWN_FRAC 0.5: 1 until half of the budget, then a line to 0 at its end.
    expected = [min(1.0, (100 - second) / 50) for second in range(len(scales))]
    assert scales == pytest.approx(expected)
    assert len(scales) >= 99


def test_validation_is_not_on_the_training_clock(new_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    run = new_run(iterations=6, val_loss_every=2)
    trainer = ClockedTrainer(run, monkeypatch)
    trainer.durations = forever(1.0)

    def validate() -> train_gpt.Score:
        trainer.now_s += 1000
        return train_gpt.Score(1.0, 1, 1, False, 1000.0)

    train_gpt.train_loop(trainer, SimpleNamespace(batch=lambda position, phase: None), validate)  # type: ignore[arg-type]
    assert trainer.progress[:2] == (6, 6.0)


def test_checkpoint_is_on_the_training_clock_also_before_a_validation(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(iterations=6, val_loss_every=2, checkpoint_every_seconds=1.5)
    trainer = ClockedTrainer(run, monkeypatch)
    trainer.durations = forever(1.0)
    save = train_gpt.save_checkpoint

    def save_in_10_s(*args: Any) -> None:
        trainer.now_s += 10
        save(*args)

    monkeypatch.setattr(train_gpt, "save_checkpoint", save_in_10_s)
    train_gpt.train_loop(
        trainer,
        SimpleNamespace(batch=lambda position, phase: None),  # type: ignore[arg-type]
        lambda: train_gpt.Score(1.0, 1, 1, False, 0.0),
    )
    saved = [r["step"] for r in metrics(run.directory, "checkpoint")]
    assert saved == [2, 4, 6]
    assert trainer.progress[:2] == (6, 6.0 + 2 * 10)  # the last is after the end


def test_checkpoints_are_written_at_the_interval_and_at_the_end(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(iterations=10, checkpoint_every_seconds=3.5)
    ClockedTrainer(run, monkeypatch).run_for(forever(1.0))
    assert [r["step"] for r in metrics(run.directory, "checkpoint")] == [4, 8, 10]
    assert [f.name for f in train_gpt.checkpoint_folders(run)] == ["step_000000010"]


def test_real_run_stops_at_about_its_seconds(new_run: MakeRun):
    run = new_run(max_wallclock_seconds=1.0, iterations=10**6)
    train_weights(run)
    end = metrics(run.directory, "train_end")[0]
    assert 0.3 < end["train_s"] < 1.5  # the exact bound: the clocked tests above


# --- Losses that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_loss_fails_with_the_step_and_keeps_the_last_checkpoint(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, bad
):
    run = new_run(checkpoint_every_seconds=1e-9, train_log_every=1)
    loss, calls = GPT.loss, iter(range(1, 100))

    def break_step_4(self: GPT, *args: torch.Tensor, **options: Any) -> torch.Tensor:
        value = loss(self, *args, **options)
        return value * bad if next(calls) == 4 else value

    monkeypatch.setattr(GPT, "loss", break_step_4)
    with pytest.raises(RunFailed) as caught:
        train_weights(run)
    last = losses(run.directory)[3]
    assert f"loss is {bad} at step 4 (last finite: {last:.4f} at step 3)" in str(caught.value)
    assert [f.name for f in train_gpt.checkpoint_folders(run)] == ["step_000000003"]
    monkeypatch.setattr(GPT, "loss", loss)
    assert same_bits(train_weights(run), train_weights(new_run()))


def test_weights_that_are_not_finite_are_never_saved(
    new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = new_run(checkpoint_every_seconds=1e-9, train_log_every=1)
    step, calls = train_gpt.Muon.step, iter(range(1, 100))

    def spoil_step_4(self: train_gpt.Muon, *args: float) -> None:
        step(self, *args)
        if next(calls) == 4:
            self.stacks[0][0].data.fill_(math.nan)

    monkeypatch.setattr(train_gpt.Muon, "step", spoil_step_4)
    with pytest.raises(RunFailed, match="a weight is not finite at step 4 .* another RUN_ID"):
        train_weights(run)
    assert [f.name for f in train_gpt.checkpoint_folders(run)] == ["step_000000003"]


def test_a_run_with_a_parameter_that_never_has_a_gradient_can_be_resumed(new_run: MakeRun):
    run = new_run(num_layers=1, iterations=3)  # skip weights of no rows
    weights = train_weights(run)
    resumed = new_run(num_layers=1, iterations=3, run_dir=str(run.directory))
    assert same_bits(weights, train_weights(resumed))


# --- Signals -------------------------------------------------------------------------------------


def test_signal_during_validation_does_not_lose_the_steps_before_it(
    new_run: MakeRun, data: TinyData, tmp_path: Path
):
    cfg = new_run(val_loss_every=3).cfg
    with pytest.raises(Interrupted), train_gpt.start_run(cfg, {}) as run:
        model = train_gpt.build_model(run)
        validation = train_gpt.load_validation(cfg, data.tokenizer)

        def validate() -> train_gpt.Score:
            os.kill(os.getpid(), signal.SIGTERM)
            return train_gpt.evaluate(run, model, validation, 32)

        train_gpt.train(run, model, open_loader(run), validate)
    assert [f.name for f in train_gpt.checkpoint_folders(run)] == ["step_000000003"]


def test_handlers_of_signals_are_as_before_when_the_run_is_over(new_run: MakeRun, tmp_path: Path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    with train_gpt.start_run(new_run().cfg, {}):
        assert [signal.getsignal(n) for n in numbers] != before
    assert [signal.getsignal(n) for n in numbers] == before


# --- Checkpoints in this process -----------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_folder(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN_DIR of a run that was stopped by a signal after 4 of 10 steps."""
    run = Run(
        cfg=tiny_config(data_path=str(data.folder), num_layers=2),
        directory=tmp_path_factory.mktemp("stopped"),
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    step = Trainer.step

    def stop_at_4(self: Trainer, window_BT: torch.Tensor) -> torch.Tensor:
        self.run.signal_received = self.progress.step == 3
        return step(self, window_BT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="step 4"):
        patch.setattr(Trainer, "step", stop_at_4)
        train_weights(run)
    assert [f.name for f in train_gpt.checkpoint_folders(run)] == ["step_000000004"]
    return run.directory


class Resume(NamedTuple):
    """A copy of the stopped run's folder, and what makes a run in it."""

    directory: Path
    checkpoint: Path
    run: MakeRun


@pytest.fixture
def stopped(stopped_folder: Path, make_run: MakeRun, tmp_path: Path) -> Resume:
    """The stopped run, to be gone on with by stopped.run(**knobs)."""
    directory = tmp_path / "stopped"
    shutil.copytree(stopped_folder, directory)
    make = functools.partial(make_run, num_layers=2, run_dir=str(directory))
    return Resume(directory, directory / "checkpoint" / "step_000000004", make)


def test_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(
    new_run: MakeRun, stopped: Resume
):
    resumed = train_weights(stopped.run())
    assert metrics(stopped.directory, "resume")[0]["step"] == 4
    assert same_bits(resumed, train_weights(new_run()))


def test_the_warm_up_of_a_resumed_run_changes_its_seconds_alone(new_run: MakeRun, stopped: Resume):
    def edit(meta: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        meta["config"]["warmup_steps"] = 2
        meta["ledger"]["other"] = 1000.0

    change_checkpoint(stopped.checkpoint, edit)
    run = stopped.run(warmup_steps=2)
    assert same_bits(train_weights(run), train_weights(new_run()))
    warm_up_s = metrics(stopped.directory, "stage")[-1]["elapsed_s"]
    assert run.ledger["other"] >= 1000 + warm_up_s - 1e-3 > 1000.001


def test_resume_0_starts_anew(new_run: MakeRun, stopped: Resume):
    anew = train_weights(stopped.run(resume=False, train_log_every=1))
    assert not metrics(stopped.directory, "resume")
    assert sorted(losses(stopped.directory)) == list(range(1, 11))
    assert same_bits(anew, train_weights(new_run()))


def test_newest_of_two_checkpoints_is_the_one_that_counts(new_run: MakeRun, stopped: Resume):
    # A kill between the renaming of the new one and the removal of the old one leaves both.
    newest = stopped.checkpoint
    older = newest.with_name("step_000000002")
    shutil.copytree(newest, older)
    (older / "meta.json").unlink()  # and of the old one perhaps only a part
    train_weights(stopped.run())
    assert metrics(stopped.directory, "resume")[0]["step"] == 4


def test_half_written_checkpoints_are_not_used_and_not_kept(new_run: MakeRun, stopped: Resume):
    newest = stopped.checkpoint
    for step in (4, 5):
        half = newest.with_name(f"step_{step:09d}.{step:032x}.tmp")
        half.mkdir()
        payload = (newest / "state.safetensors").read_bytes()
        (half / "state.safetensors").write_bytes(payload[: len(payload) // 2])
    train_weights(stopped.run())
    assert metrics(stopped.directory, "resume")[0]["step"] == 4
    assert [p.name for p in (stopped.directory / "checkpoint").iterdir()] == ["step_000000010"]


def flip_a_bit(path: Path) -> None:
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_list(path: Path) -> None:
    path.write_text("[1, 2]")


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "state changed": ("state.safetensors", flip_a_bit),
    "state truncated": ("state.safetensors", cut_in_half),
    "state missing": ("state.safetensors", Path.unlink),
    "meta truncated": ("meta.json", cut_in_half),
    "meta missing": ("meta.json", Path.unlink),
    "meta empty": ("meta.json", lambda path: path.write_text("{}")),  # type: ignore[dict-item]
    "meta of another form": ("meta.json", replace_by_a_list),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_with_its_name_and_the_remedy(stopped: Resume, damage):
    folder = stopped.checkpoint
    name, apply = DAMAGES[damage]
    apply(folder / name)
    with pytest.raises(InputError) as caught:
        train_weights(stopped.run())
    assert str(caught.value).startswith(f"{folder} is damaged")
    assert f"remove {folder}" in str(caught.value) and "RESUME=0" in str(caught.value)


CheckpointChange = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
WEIGHT = "model/blocks.0.attn_scale"  # (32,) in float32


def nested_list(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# What is wrong, how to make it so, and what the message says.
WRONG_CHECKPOINTS: dict[str, tuple[CheckpointChange, str]] = {
    "step 0": (lambda meta, _: meta["progress"].__setitem__(0, 0), "step 0 is not in [1, 10]"),
    "step < 0": (lambda meta, _: meta["progress"].__setitem__(0, -4), "step -4 is not"),
    "step 4.5": (lambda meta, _: meta["progress"].__setitem__(0, 4.5), "step 4.5 is not"),
    "step true": (lambda meta, _: meta["progress"].__setitem__(0, True), "step True is not"),
    "step 11": (lambda meta, _: meta["progress"].__setitem__(0, 11), "step 11 is not"),
    "step 5": (lambda meta, _: meta.update(progress=[5, 1.0, 1280, 0.0, 0.0]), "is of step 5"),
    "clock < 0": (lambda meta, _: meta["progress"].__setitem__(1, -1.0), "-1.0 is not a number"),
    "clock nan": (lambda meta, _: meta["progress"].__setitem__(1, math.nan), "nan is not"),
    "last step nan": (lambda meta, _: meta["progress"].__setitem__(4, math.nan), "nan is not"),
    "clock text": (lambda meta, _: meta["progress"].__setitem__(1, "1"), "'1' is not a number"),
    "tokens": (lambda meta, _: meta["progress"].__setitem__(2, 10**12), "tokens 1000000000000"),
    "progress": (lambda meta, _: meta.update(progress=[4, 1.0]), "five numbers"),
    "ledger": (lambda meta, _: meta["ledger"].update(training=-1.0), "ledger"),
    "ledger keys": (lambda meta, _: meta["ledger"].pop("other"), "ledger"),
    "token": (lambda meta, _: meta.update(run_token="../x"), "run_token"),
    "config": (lambda meta, _: meta.update(config=[1]), "config"),
    "deep": (lambda meta, _: meta.update(config=nested_list(900)), "config"),
    "sha": (lambda meta, _: meta.update(state_sha256=7), "checksum"),
    "shape ()": (lambda _, state: state.update({WEIGHT: torch.tensor(1.0)}), "float32 ()"),
    "shape (1,)": (lambda _, state: state.update({WEIGHT: torch.ones(1)}), "float32 (1,)"),
    "shape (1, 1)": (lambda _, state: state.update({WEIGHT: torch.ones(1, 1)}), "(1, 1)"),
    "dtype": (lambda _, state: state.update({WEIGHT: state[WEIGHT].half()}), "float16 (32,)"),
    "nan": (lambda _, state: state[WEIGHT].fill_(math.nan), "not finite"),
    "missing": (lambda _, state: state.pop(WEIGHT), "lacks ['model/blocks.0.attn_scale']"),
    "extra": (lambda _, state: state.update(x=torch.ones(1)), "unknown tensors ['x']"),
    "adam step": (lambda _, state: state["adam/0/step"].fill_(3), "adam/0/step is 3 after 4"),
    "count": (lambda _, state: state["average/count"].fill_(-1), "average/count is -1"),
}


def change_checkpoint(folder: Path, change: CheckpointChange) -> None:
    """Apply `change` to the metadata and tensors of a checkpoint; its checksum stays right."""
    meta = json.loads((folder / "meta.json").read_text())
    state = safetensors.torch.load((folder / "state.safetensors").read_bytes())
    digest = meta["state_sha256"]
    change(meta, state)
    payload = safetensors.torch.save(state)
    if meta["state_sha256"] == digest:
        meta["state_sha256"] = hashlib.sha256(payload).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "state.safetensors").write_bytes(payload)


@pytest.mark.parametrize("name", WRONG_CHECKPOINTS)
def test_checkpoint_with_wrong_content_is_refused_before_anything_is_changed(
    stopped: Resume, name: str
):
    change, text = WRONG_CHECKPOINTS[name]
    change_checkpoint(stopped.checkpoint, change)
    trainer, _ = open_trainer(stopped.run())
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    with pytest.raises(InputError) as caught:
        train_gpt.load_checkpoint(trainer)
    message = str(caught.value)
    assert message.startswith(f"{stopped.checkpoint} is damaged (") and text in message
    assert same_bits(before, trainer.tensors()) and trainer.progress == Progress()


def test_checkpoint_whose_json_is_too_deep_is_refused(stopped: Resume):
    (stopped.checkpoint / "meta.json").write_text("[" * 100_000 + "]" * 100_000)
    trainer, _ = open_trainer(stopped.run())
    with pytest.raises(InputError, match="is damaged"):
        train_gpt.load_checkpoint(trainer)


def test_folders_that_the_run_did_not_write_are_kept(new_run: MakeRun, stopped: Resume):
    root = stopped.checkpoint.parent
    foreign = [root / "bert-base", root / "step_000000002", root / "step_000000001.tmp"]
    for folder in foreign:
        folder.mkdir()
        (folder / "weights").write_text("x")
    other = root / "step_000000003"  # a checkpoint of another run
    shutil.copytree(stopped.checkpoint, other)
    change_checkpoint(other, lambda meta, _: meta.update(run_token="0" * 32))
    elsewhere = stopped.directory / "elsewhere"
    shutil.copytree(stopped.checkpoint, elsewhere)
    (root / "step_000000001").symlink_to(elsewhere)
    train_weights(stopped.run())
    assert all((folder / "weights").exists() for folder in foreign)
    assert (other / "state.safetensors").exists() and (elsewhere / "state.safetensors").exists()
    assert not stopped.checkpoint.exists()  # its own older checkpoint is gone


def test_checkpoints_are_not_written_through_a_link(new_run: MakeRun, tmp_path: Path):
    run = new_run()
    (tmp_path / "elsewhere").mkdir()
    (run.directory / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="checkpoint is a symbolic link; remove it"):
        train_weights(run)
    assert not [*(tmp_path / "elsewhere").iterdir()]


def test_resume_0_refuses_to_remove_a_folder_that_is_no_checkpoint(stopped: Resume):
    notes = stopped.checkpoint / "notes.txt"
    notes.write_text("x")
    with pytest.raises(InputError, match="RESUME=0 removes checkpoints, and .* is not one"):
        train_weights(stopped.run(resume=False))
    assert notes.exists() and (stopped.checkpoint / "state.safetensors").exists()


def test_checkpoint_of_another_configuration_is_refused_with_both_values(
    new_run: MakeRun, stopped: Resume
):
    with pytest.raises(InputError) as caught:
        train_weights(stopped.run(seed=7, matrix_lr=0.5))
    assert len(metrics(stopped.directory, "stage")) == 1  # refused before another warm-up
    message = str(caught.value)
    assert message.startswith(f"{stopped.checkpoint} is from another run: ")
    assert re.search(r"MATRIX_LR=0.5 \(\w+: 0.04\)", message)
    assert re.search(r"SEED=7 \(\w+: 1337\)", message)
    assert "NUM_LAYERS" not in message and "RUN_ID" in message


def test_knobs_that_do_not_concern_the_weights_may_change_on_resumption(stopped: Resume):
    changes: dict[str, Any] = {
        "train_log_every": 3, "val_loss_every": 0, "checkpoint_every_seconds": 9.0,
        "target_val_bpb": 9.0, "run_id": "other", "submission_author": "A B",
        "micro_batch_tokens": 64, "val_batch_size": 64, "ttt_batch_size": 3,
    }  # fmt: skip
    trainer, _ = open_trainer(stopped.run(**changes))
    train_gpt.load_checkpoint(trainer)
    assert trainer.progress.step == 4


# --- Runs as processes: killed and resumed -------------------------------------------------------

RUN: dict[str, Any] = {
    "mode": "train", "run_dir": "run", "num_layers": 2, "iterations": 30, "averaging": "ema",
    "loader": "shuffled", "train_log_every": 1, "val_loss_every": 6, "val_tokens_limit": 300,
    "eval_stride": 32,
}  # fmt: skip


def run_config(data: TinyData, **changes: Any) -> Config:
    return tiny_config(**{**RUN, "data_path": str(data.folder), **changes})


class Whole(NamedTuple):
    """What a run that nobody interrupted left."""

    folder: Path
    artifact: bytes
    losses: dict[int, float]
    result: Result


def uninterrupted(cfg: Config, folder: Path) -> Whole:
    folder.mkdir()
    result = run_script(environment(cfg), folder)
    assert result.status == 0, result.err
    run_folder = folder / "run"
    artifact = (run_folder / "artifact.bin").read_bytes()
    return Whole(run_folder, artifact, losses(run_folder), result)


@pytest.fixture(scope="module")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run of RUN."""
    return uninterrupted(run_config(data), tmp_path_factory.mktemp("whole") / "work")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder to run in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def assert_same_run(folder: Path, expected: Whole) -> None:
    """The artifact is the same to the bit, and so is every logged loss."""
    assert losses(folder) == expected.losses
    assert (folder / "artifact.bin").read_bytes() == expected.artifact


def steps_of(result: Result) -> list[int]:
    return [int(v["step"].split("/")[0]) for e, v in log_events(result.out) if e == "step"]


# Runs the script, which stops before step HOLD_AT, and before each checkpoint if HOLD_SAVING is,
# until the file go_on_NAME exists: however fast the machine, it cannot get ahead of the test.
HELD_SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt

hold_at, hold_saving = int(os.environ.pop("HOLD_AT")), os.environ.pop("HOLD_SAVING", "")
step, save_checkpoint = train_gpt.Trainer.step, train_gpt.save_checkpoint

def hold(name):
    print("held", name, flush=True)
    while not os.path.exists("go_on_" + name):
        time.sleep(0.002)

def held_step(self, *args):
    if self.progress.step + 1 == hold_at:
        hold("step")
    return step(self, *args)

def held_save(*args):
    if hold_saving:
        hold("saving")
    save_checkpoint(*args)

train_gpt.Trainer.step, train_gpt.save_checkpoint = held_step, held_save
sys.exit(train_gpt.main())
"""


@pytest.fixture(scope="module")
def held_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of HELD_SCRIPT."""
    path = tmp_path_factory.mktemp("held") / "held.py"
    path.write_text(HELD_SCRIPT)
    return path


def steps_said(result: Result) -> Result:
    """The result without the lines that HELD_SCRIPT printed."""
    lines = result.out.splitlines(keepends=True)
    return result._replace(out="".join(line for line in lines if not line.startswith("held ")))


def test_sigterm_writes_a_checkpoint_and_ends_with_143_and_one_line(
    data: TinyData, work: Path, whole: Whole, held_script: Path
):
    env = environment(run_config(data))
    process = start({**env, "HOLD_AT": "8"}, work, held_script)
    process.wait_for_output("step step:4 ")
    process.send(signal.SIGTERM)
    (work / "go_on_step").touch()
    result = steps_said(process.wait())
    assert result.status == 143
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("Interrupted: stopped by a signal")
    last = steps_of(result)[-1]
    assert 4 <= last < 30
    saved = [p.name for p in (work / "run" / "checkpoint").iterdir()]
    assert len(saved) == 1 and last <= int(saved[0].removeprefix("step_")) <= last + 1
    resumed = run_script(env, work)
    assert resumed.status == 0, resumed.err
    assert steps_of(resumed)[0] == int(saved[0].removeprefix("step_")) + 1
    assert_same_run(work / "run", whole)


FULL_SCRIPT = f"""
import errno, os, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt

fsync, full = os.fsync, os.environ.pop("FULL")

def refuse(number):
    if full in os.readlink(f"/proc/self/fd/{{number}}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(number)

os.fsync = refuse
sys.exit(train_gpt.main())
"""


@pytest.mark.parametrize(
    "file", [pytest.param(n, marks=pytest.mark.slow) for n in ("state.safetensors", "artifact.bin")]
)
def test_full_disk_ends_the_run_with_one_line_and_can_be_gone_on_from(
    data: TinyData, work: Path, whole: Whole, file: str
):
    env = environment(run_config(data))
    (work / "full.py").write_text(FULL_SCRIPT)
    result = run_script({**env, "FULL": file}, work, work / "full.py")
    assert result.status == 1
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("OSError: [Errno 28] No space left on device: ")
    assert file in result.err and not [*work.rglob("*.safetensors.*.tmp")]
    resumed = run_script(env, work)
    assert resumed.status == 0, resumed.err
    assert_same_run(work / "run", whole)


@pytest.mark.parametrize("moment", ["step", "saving"])
def test_signal_that_arrives_twice_in_a_moment_still_writes_a_checkpoint(
    data: TinyData, work: Path, held_script: Path, moment
):
    # timeout(1) and torchrun pass a signal on to a process that has just had it from the terminal.
    env = environment(run_config(data, iterations=200))
    process = start({**env, "HOLD_AT": "3", "HOLD_SAVING": "1"}, work, held_script)
    process.wait_for_output("held step")
    process.send(signal.SIGTERM)
    if moment == "step":  # both are there before the step that hears of them
        process.send(signal.SIGTERM)
    (work / "go_on_step").touch()
    process.wait_for_output("held saving")
    if moment == "saving":
        process.send(signal.SIGTERM)
    (work / "go_on_saving").touch()
    assert process.wait().status == 143
    assert [p.name for p in (work / "run" / "checkpoint").iterdir()] == ["step_000000003"]


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    data: TinyData, work: Path, whole: Whole, held_script: Path
):
    env = environment(run_config(data, checkpoint_every_seconds=1e-6))
    rng = np.random.default_rng(0)
    for kill in range(3):
        first = 3 * kill + 3
        # Killed between the checkpoints of step `first` and of the two after it, or when it waits.
        process = start({**env, "HOLD_AT": str(first + 3)}, work, held_script)
        process.wait_for_output(f"checkpoint step:{first} ")
        time.sleep(float(rng.uniform(0, 0.06)))
        process.send(signal.SIGKILL)
        assert process.wait().status == -signal.SIGKILL
    result = run_script(env, work)
    assert result.status == 0, result.err
    assert 9 <= metrics(work / "run", "resume")[-1]["step"] <= 11
    assert_same_run(work / "run", whole)


# Runs the script and kills it before the file operation number KILL_AT on anything under run/.
# With KILL_AT=0 it only counts them.
CRASHING_SCRIPT = f"""
import os, runpy, signal, sys
count, kill_at, main_pid = 0, int(os.environ.pop("KILL_AT")), os.getpid()
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

def hook(event, args):
    global count
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes or event in CHANGES) and "run/" in str(args[0]):
        count += 1
        if count == kill_at:
            os.kill(main_pid, signal.SIGKILL)

sys.addaudithook(hook)
leave = os._exit

def write_count_and_leave(status):
    if os.getpid() == main_pid:
        with open("file_operations", "w") as file:
            file.write(str(count))
    leave(status)

os._exit = write_count_and_leave  # the script ends by it
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


class Crash(NamedTuple):
    """A script that kills itself, the run it makes, and how many places it can be killed at."""

    cfg: Config
    script: Path
    whole: Whole
    score: float
    operations: int


@pytest.fixture(scope="module")
def crash(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Crash:
    """A whole run (MODE=all) of 3 steps with a checkpoint after each, never killed."""
    folder = tmp_path_factory.mktemp("crash")
    script = folder / "crash.py"
    script.write_text(CRASHING_SCRIPT)
    cfg = run_config(data, mode="all", iterations=3, checkpoint_every_seconds=1e-6)
    (folder / "work").mkdir()
    result = run_script({**environment(cfg), "KILL_AT": "0"}, folder / "work", script)
    assert result.status == 0, result.err
    run_folder = folder / "work" / "run"
    artifact = (run_folder / "artifact.bin").read_bytes()
    return Crash(
        cfg=cfg,
        script=script,
        whole=Whole(run_folder, artifact, losses(run_folder), result),
        score=submission(run_folder)["val_bpb"],
        operations=int((folder / "work" / "file_operations").read_text()),
    )


def crash_and_resume(crash: Crash, work: Path, kill_at: int) -> None:
    """Kill a run before its file operation `kill_at`, spoil what it was writing, run it again."""
    env = environment(crash.cfg)
    result = run_script({**env, "KILL_AT": str(kill_at)}, work, crash.script)
    assert result.status == -signal.SIGKILL, result.err
    for half in (work / "run").rglob("*.tmp"):
        if half.is_file():
            cut_in_half(half)
    is_over = (work / "run" / "submission.json").exists()  # nothing of value comes after it
    result = run_script(env, work)
    assert result.status == (2 if is_over else 0), f"killed before {kill_at}: {result.err}"
    assert_same_run(work / "run", crash.whole)
    assert submission(work / "run")["val_bpb"] == crash.score


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=[pytest.mark.slow] * (part < 0.8))
        for part in (0.25, 0.45, 0.65, 0.85)
    ],
)
def test_run_killed_at_a_file_operation_goes_on_to_the_same_bits(crash: Crash, work: Path, part):
    crash_and_resume(crash, work, round(part * crash.operations))


@pytest.mark.slow
def test_run_killed_at_any_file_operation_goes_on_to_the_same_bits(crash: Crash, tmp_path: Path):
    problems = []
    for kill_at in range(1, crash.operations + 1):
        work = tmp_path / str(kill_at) / "work"
        work.mkdir(parents=True)
        try:
            crash_and_resume(crash, work, kill_at)
        except AssertionError as error:
            problems.append(f"{kill_at}: {error}")
    assert not problems, "\n".join(problems)


# --- Runs as processes: what is found in RUN_DIR -------------------------------------------------


def copy_of(whole: Whole, work: Path, *without: str) -> Path:
    """The folder of the finished run in `work`, less some of its files."""
    folder = work / "run"
    shutil.copytree(whole.folder, folder)
    for name in without:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def test_run_killed_in_the_evaluation_goes_on_from_the_artifact(crash: Crash, work: Path):
    folder = copy_of(crash.whole, work, "submission.json", "checkpoint")
    before = submission(crash.whole.folder)
    result = run_script(environment(crash.cfg), work)
    assert result.status == 0, result.err
    assert steps_of(result) == []  # no training, and no checkpoint to train from
    assert (folder / "artifact.bin").read_bytes() == crash.whole.artifact
    after = submission(folder)
    for seed in (before["seeds"]["1337"], after["seeds"]["1337"]):
        seed.pop("eval_s")
    assert after["seeds"] == before["seeds"]  # steps and seconds of the training included
    assert after["val_bpb"] == crash.score


def test_artifact_without_the_record_of_its_training_is_refused(crash: Crash, work: Path):
    copy_of(crash.whole, work, "submission.json", "run_state.json")
    result = run_script(environment(crash.cfg), work)
    assert result.status == 2
    assert "run_state.json" in result.err and "Traceback" not in result.err


def test_line_that_a_kill_cut_short_does_not_spoil_the_next(crash: Crash, work: Path):
    folder = copy_of(crash.whole, work, "submission.json")
    for name in ("metrics.jsonl", "train.log"):
        os.truncate(folder / name, (folder / name).stat().st_size - 7)
    size = (folder / "metrics.jsonl").stat().st_size
    result = run_script(environment(crash.cfg), work)
    assert result.status == 0, result.err
    added = (folder / "metrics.jsonl").read_bytes()[size:].decode().strip().splitlines()
    assert [json.loads(line)["event"] for line in added][-1] == "submission"
    log = (folder / "train.log").read_text()
    assert "\n" + result.out.splitlines()[-1] + "\n" in log
    assert log.count("\nconfig ") == 2 * len(Config.__dataclass_fields__) - 1  # one opens the log


def test_run_killed_before_the_artifact_repeats_no_step(crash: Crash, work: Path):
    folder = copy_of(crash.whole, work, "submission.json", "run_state.json", "artifact.bin")
    result = run_script(environment(crash.cfg), work)
    assert result.status == 0, result.err
    assert steps_of(result) == []
    assert_same_run(folder, crash.whole)


def test_artifact_of_another_configuration_is_not_scored_as_this_one(crash: Crash, work: Path):
    copy_of(crash.whole, work, "submission.json")
    result = run_script({**environment(crash.cfg), "SEED": "7"}, work)
    assert result.status == 2, result.out
    assert "SEED=7" in result.err and "1337" in result.err


def test_finished_folder_is_refused_and_stays_as_it_is(crash: Crash, work: Path):
    folder = copy_of(crash.whole, work)
    before = (folder / "submission.json").read_bytes()
    result = run_script(environment(crash.cfg), work)
    assert result.status == 2
    assert result.err.splitlines() == [
        "InputError: run holds a finished run; set another RUN_ID or RUN_DIR"
    ]
    assert (folder / "submission.json").read_bytes() == before
    assert (folder / "train.log").read_bytes() == (crash.whole.folder / "train.log").read_bytes()


def test_scoring_a_finished_run_again_keeps_the_record_of_its_training(crash: Crash, work: Path):
    folder = copy_of(crash.whole, work)
    before = submission(folder)
    result = run_script({**environment(crash.cfg), "MODE": "eval"}, work)
    assert result.status == 0, result.err
    after = submission(folder)
    assert after["val_bpb"] == before["val_bpb"]
    for key in ("steps", "train_s"):
        assert after["seeds"]["1337"][key] == before["seeds"]["1337"][key]


def test_score_of_another_artifact_does_not_get_the_training_of_this_folder(
    crash: Crash, whole: Whole, work: Path
):
    copy_of(crash.whole, work)  # 3 steps; the other artifact had 30
    env = {**environment(crash.cfg), "MODE": "eval", "ARTIFACT": str(whole.folder / "artifact.bin")}
    result = run_script(env, work)
    refused = result.status == 2 and "Traceback" not in result.err
    assert refused or submission(work / "run")["seeds"]["1337"]["steps"] != 3


def test_score_is_reported_under_the_seed_that_the_model_was_trained_with(crash: Crash, work: Path):
    copy_of(crash.whole, work)
    result = run_script({**environment(crash.cfg), "MODE": "eval", "SEED": "7"}, work)
    assert result.status == 0, result.err
    assert list(submission(work / "run")["seeds"]) == ["1337"]


def test_resume_0_refuses_a_folder_that_holds_an_artifact(crash: Crash, work: Path):
    copy_of(crash.whole, work, "submission.json")
    result = run_script({**environment(crash.cfg), "RESUME": "0"}, work)
    assert result.status == 2
    assert "artifact.bin exists" in result.err


def test_damaged_checkpoint_ends_the_run_with_2_and_one_line(crash: Crash, work: Path):
    folder = copy_of(crash.whole, work, "submission.json", "run_state.json", "artifact.bin")
    flip_a_bit(folder / "checkpoint" / "step_000000003" / "state.safetensors")
    result = run_script(environment(crash.cfg), work)
    assert result.status == 2
    assert len(result.err.splitlines()) == 1
    assert "step_000000003 is damaged (checksum" in result.err


def test_run_whose_weights_are_ruined_by_the_last_step_fails(data: TinyData, work: Path):
    cfg = run_config(data, mode="all", iterations=1, averaging="none", target_val_bpb=100.0)
    result = run_script({**environment(cfg), "TIED_EMBED_LR": "1e38"}, work)
    assert result.status == 1, result.out
    assert result.err.startswith("RunFailed: ") and len(result.err.splitlines()) == 1
    assert not (work / "run" / "submission.json").exists()


def test_natural_divergence_fails_with_status_1_and_the_step(data: TinyData, work: Path):
    result = run_script({**environment(run_config(data)), "SCALAR_LR": "1e25"}, work)
    assert result.status == 1
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("RunFailed: the loss is nan at step 2 (last finite: 5.7")
