"""The adaptive pass: what each method computes, and that no score depends on later tokens.

The rules are those of issue #1017 of openai/parameter-golf: C1 a score depends on earlier tokens
only; C2 it comes from a full normalized distribution; C3 it is fixed before anything is learned
from its target; C4 there is one pass from left to right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt
from records import audit
from tests.conftest import MakeRun, TinyData, environment, random_model, tiny_config
from tests.plain_backoff import PlainBackoff
from tests.processes import (
    SCRIPT,
    Result,
    log_events,
    python_process,
    run_ranks,
    run_script,
    submission,
)
from train_gpt import (
    BOS_ID,
    GPT,
    Backoff,
    EvalPlanner,
    EvalRunner,
    EvalStep,
    Run,
    Scorer,
    StateUpdate,
    TextMixer,
    Validation,
    Window,
    document_bounds,
    evaluate,
    plan_adaptive,
    rule_violations,
)

AUDIT = SCRIPT.parent / "records/audit.py"
T, C = 32, 8  # context, and targets between two updates of a document's adapter
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of other shapes
SMALL: dict[str, Any] = {"num_layers": 2, "val_batch_size": 4 * T}
CHUNK: dict[str, Any] = {
    **SMALL, "ttt_method": "chunk", "ttt_chunk_tokens": 2 * T, "ttt_epochs": 2, "ttt_lr": 0.05,
}  # fmt: skip
LORA: dict[str, Any] = {
    **SMALL, "ttt_method": "lora", "ttt_chunk_size": C, "ttt_lora_lr": 0.02, "ttt_batch_size": 3,
    "ttt_chunk_tokens": 2 * T, "ttt_epochs": 1, "ttt_lr": 0.05,
}  # fmt: skip
RICH: dict[str, Any] = {  # whatever moves information along the text
    "smear_gate": "blend", "bigram_vocab_size": 50, "trigram_vocab_size": 60,
    "value_residual": "vrl", "xsa_last_n": 1, "num_loops": 1, "loop_start": 0, "loop_end": 1,
    "ve_layers": "1", "ve_dim": 8,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "sliding": SMALL,
    "chunk": CHUNK,
    "chunk_adamw": {
        **CHUNK, "ttt_optimizer": "adamw", "ttt_lr": 0.01, "ttt_polyak": 0.5, "ttt_ramp": 3.0,
        "ttt_byte_weighted": True, "ttt_freeze_blocks": 1, "ttt_train": "blocks",
    },
    "chunk_hash": {**CHUNK, "eval_hash_rows": 64},
    "lora_window": {**LORA, "ttt_grad_steps": 2},
    "lora_text": {**LORA, "ttt_context": "text"},
    "lora_incremental": {**LORA, **RICH, "ttt_context": "incremental", "ttt_grad_steps": 2},
    "lora_warm": {**LORA, "ttt_warm_start_a": True, "ttt_lora_wd": 0.5},
    "mixer": {
        **SMALL, "mixer": "backoff", "mixer_orders": "0-2", "ngram_tilt": 1.0,
        "ngram_tilt_orders": "2", "ttt_chunk_tokens": 2 * T, "ngram_table_bits": 12,
    },
    "chunk_hedge": {
        **CHUNK, "mixer": "hedge", "hedge_min_tokens": 50, "ngram_table_bits": 12, "hedge_eta": 0.5,
    },
    "lora_mixer": {
        **LORA, "mixer": "backoff", "mixer_orders": "0-2", "ttt_context": "incremental",
        "ttt_chunk_tokens": T, "ngram_table_bits": 12,
    },
    "lora_tilt": {  # the tilt needs more of the model than the probability of the target
        **LORA, "mixer": "backoff", "mixer_orders": "0-2", "ttt_context": "incremental",
        "ngram_tilt": 1.0, "ngram_tilt_orders": "2", "ngram_table_bits": 12,
    },
    "lora_choice": {**LORA, "ttt_lora_lr": -1.0, "ttt_context": "incremental"},
    "lora_mixture": {**LORA, "ttt_lora_lr": 0.02, "ttt_num_lrs": 3, "ttt_context": "incremental"},
    "lora_phases": {**LORA, "ttt_phases": "2,4", "asym_logit_rescale": True,
                    "tie_embeddings": False},
}  # fmt: skip
PILOT_TARGETS = 120  # three documents of text_of begin before
LEARNING = [name for name in METHODS if name != "sliding"]
# The others differ from one of these in a detail, or combine two of them.
QUICK = ("sliding", "chunk_adamw", "lora_mixer", "chunk_hedge")


def slow_unless_quick(names: Iterable[str], *more: str) -> list[Any]:
    """Parameters of a test, one for each method; `make test` runs those of QUICK and `more`."""
    quick = QUICK + more
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in names]


@pytest.fixture(autouse=True)
def short_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some documents of text_of choose the learning rate, if there is a choice."""
    monkeypatch.setattr(train_gpt, "PILOT_TARGETS", PILOT_TARGETS)


each_method = pytest.mark.parametrize("name", slow_unless_quick(METHODS))
each_learner = pytest.mark.parametrize("name", slow_unless_quick(LEARNING))


def text_of(data: TinyData, num_targets: int = 230) -> np.ndarray:
    """The beginning of the validation text, cut into six documents of known bounds."""
    ids = data.val[: num_targets + 1].copy()
    ids[ids == BOS_ID] = 50
    ids[[place for place in (0, 90, 100, 141, 142, 200) if place < num_targets]] = BOS_ID
    return ids


def validation_of(ids: np.ndarray) -> Validation:
    return Validation(ids=ids, target_bytes=np.arange(len(ids) - 1) % 4 + 1, partial=False)


@contextlib.contextmanager
def recorded(found: dict[int, float]) -> Iterator[None]:
    """Within it, whatever a scorer is given is written down, by target; the last value counts."""
    record, replace = Scorer.record, Scorer.replace

    def spy(self: Scorer, first: int, nll: np.ndarray) -> None:
        record(self, first, nll)
        found.update(enumerate(nll.tolist(), start=first))

    def spy_replace(self: Scorer, text: tuple[int, int], mix: Any) -> None:
        replace(self, text, mix)
        found.update(enumerate(self.nll_T[slice(*text)].tolist(), start=text[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "record", spy)
        patch.setattr(Scorer, "replace", spy_replace)
        yield


def nats_of(run: Run, model: GPT, ids: np.ndarray) -> np.ndarray:
    """Nats of each target in the adaptive pass, or in sliding windows where nothing learns."""
    found: dict[int, float] = {}
    with recorded(found):
        score = evaluate(run, model, validation_of(ids), 8, adaptive=run.cfg.adapts)
    assert score.problems == ()
    assert score.nats == pytest.approx(math.fsum(found.values()), rel=1e-12)
    assert score.num_bytes == validation_of(ids).target_bytes.sum()
    assert sorted(found) == list(range(len(ids) - 1))
    return np.array([found[target] for target in range(len(ids) - 1)])


# --- C1: strict causal dependence ----------------------------------------------------------------


@pytest.mark.parametrize("name", slow_unless_quick(METHODS))
def test_a_changed_token_changes_no_score_before_it_by_a_bit(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name])
    model, ids = random_model(run.cfg), text_of(data)
    before = nats_of(run, model, ids)
    for place in (70, 150):  # an id; as a target it is one less
        changed = ids.copy()
        changed[place] = 60 + (changed[place] == 60)
        after = nats_of(run, model, changed)
        np.testing.assert_array_equal(after[: place - 1], before[: place - 1])
        assert after[place - 1] != before[place - 1]
        assert (after[place:] != before[place:]).any()


@each_method
def test_another_continuation_changes_no_score_before_it_by_a_bit(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name])
    model, ids, place = random_model(run.cfg), text_of(data), 121
    other = np.where(ids == BOS_ID, BOS_ID, np.roll(ids, 3) % 200 + 50)
    changed = np.concatenate([ids[:place], other[place:]])
    before, after = nats_of(run, model, ids), nats_of(run, model, changed)
    np.testing.assert_array_equal(after[: place - 1], before[: place - 1])
    assert (after[place:] != before[place:]).mean() > 0.9


@each_method
def test_where_later_documents_begin_and_end_does_not_matter(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name])
    model, ids, place = random_model(run.cfg), text_of(data), 125  # inside a document
    changed = ids.copy()
    changed[place:] = np.where(ids[place:] == BOS_ID, 70, ids[place:])
    changed[[130, 160, 222]] = BOS_ID
    before, after = nats_of(run, model, ids), nats_of(run, model, changed)
    # Other documents stand side by side: products of other shapes, so not the same to the bit.
    np.testing.assert_allclose(after[: place - 1], before[: place - 1], rtol=1e-4, atol=1e-4)


# --- C2: a full normalized distribution ----------------------------------------------------------


@each_method
def test_probabilities_of_all_tokens_sum_to_one_when_they_are_scored(
    make_run: MakeRun, data, monkeypatch: pytest.MonkeyPatch, name
):
    run = make_run(**METHODS[name])
    totals: list[torch.Tensor] = []
    nats = GPT.token_nll

    calls = itertools.count(1)

    def check_normalization(
        self: GPT, ids_BT: torch.Tensor, target_BT: torch.Tensor, first: int = 0, **more
    ):
        """What was asked for; on the way, every token in the place of each target."""
        past, every = more.pop("past", None), []
        # The first call scores with the model as it was, the ninth with what it has become.
        if next(calls) in (1, 9):
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                stream = self(ids_BT, None if past is None else copy_of(past))
                patch.setattr(GPT, "forward", lambda *args: stream)  # no target goes into it
                for token in range(self.cfg.vocab_size):
                    target = torch.full_like(target_BT, token)
                    every.append(nats(self, ids_BT, target, first, **more)[1])
        if every:
            probability = (-torch.stack(every).double()).exp()
            keep = (
                more["mixer_inputs"].keep_BT[:, first:] if more.get("mixer_inputs") else slice(None)
            )
            totals.append(probability.sum(dim=0)[keep])
        return nats(self, ids_BT, target_BT, first, past=past, **more)

    monkeypatch.setattr(GPT, "token_nll", check_normalization)
    evaluate(run, random_model(run.cfg), validation_of(text_of(data, 100)), 8,
             adaptive=run.cfg.adapts)  # fmt: skip
    total = torch.cat([total.flatten() for total in totals])
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def copy_of(past: train_gpt.KVCache) -> train_gpt.KVCache:
    """Another memory of the same tokens."""
    copy = train_gpt.KVCache(len(past.layers), past.capacity)
    copy.length, copy.ids_BT, copy.num_dropped = past.length, past.ids_BT, past.num_dropped
    for mine, theirs in zip(copy.layers, past.layers, strict=True):
        mine.pair = theirs.pair
    return copy


# --- C3: score before update ---------------------------------------------------------------------


@each_learner
def test_learning_rate_zero_is_no_adaptation_to_the_bit(make_run: MakeRun, data, name):
    off = {"ttt_lr": 0.0, "ttt_lora_lr": 0.0}
    run = make_run(**{**METHODS[name], **off})
    ids, model = text_of(data), random_model(run.cfg)
    found, expected = nats_of(run, model, ids), dict[int, float]()
    with recorded(expected), pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvalRunner, "train", lambda self, step: None)
        adapt = EvalRunner.adapt
        patch.setattr(
            EvalRunner, "adapt", lambda self, step: adapt(self, step._replace(num_learning_rows=0))
        )
        patch.setattr(GPT, "set_adapters", lambda self, adapters: None)  # no adapters at all
        evaluate(run, model, validation_of(ids), 8, adaptive=True)
    np.testing.assert_array_equal(found, [expected[t] for t in range(len(ids) - 1)])


@pytest.mark.parametrize("name", ["chunk", "chunk_hash"])
def test_chunks_at_learning_rate_zero_are_the_sliding_windows_to_the_bit(
    make_run: MakeRun, data, name
):
    # One row a batch, so that products have the same shapes in both passes.
    changes = {**METHODS[name], "ttt_lr": 0.0, "val_batch_size": T}
    run, found = make_run(**changes), dict[int, float]()
    model, ids = random_model(run.cfg), text_of(data)
    with recorded(found):
        evaluate(run, model, validation_of(ids), 8)
    adaptive = nats_of(run, model, ids)
    np.testing.assert_array_equal(adaptive, [found[target] for target in range(len(ids) - 1)])


@each_learner
def test_adaptation_changes_scores(make_run: MakeRun, data, name):
    ids = text_of(data)
    off = {"ttt_lr": 0.0, "ttt_lora_lr": 0.0, "mixer": "none", "ngram_tilt": 0.0}
    changed, same = (
        nats_of(run, random_model(run.cfg), ids)
        for knobs in ({}, off)
        for run in [make_run(**{**METHODS[name], **knobs})]
    )
    first = 1 if name == "lora_mixer" else 4  # n-grams count from the second target on
    np.testing.assert_allclose(changed[:first], same[:first], **TOLERANCE)
    assert (np.abs(changed - same) > 1e-4).mean() > 0.4


# --- C4: one pass, and the trace that proves it --------------------------------------------------


def plan_of(ids: np.ndarray, rank: int, world_size: int, **knobs: Any) -> list[EvalStep]:
    return plan_adaptive(EvalPlanner(tiny_config(**knobs), rank, world_size), ids)


@each_learner
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plans_of_all_ranks_score_each_target_once_and_keep_in_step(data, name, world_size):
    ids = text_of(data)
    plans = [plan_of(ids, rank, world_size, **METHODS[name]) for rank in range(world_size)]
    assert len({len(plan) for plan in plans}) == 1
    collective = ("train", "update_ngrams", "mix", "choose_lrs")
    shared = [[(i, s.text) for i, s in enumerate(p) if s.action in collective] for p in plans]
    assert all(row == shared[0] for row in shared)  # the same collectives at the same ticks
    scored = [t for plan in plans for step in plan if step.action in ("score", "adapt")
              for w in step.windows for t in range(w.first, w.end)]  # fmt: skip
    assert sorted(scored) == list(range(len(ids) - 1))


def trace(ticks: list[int], *updates: StateUpdate) -> list[str]:
    return rule_violations(updates, np.array(ticks), np.array(ticks))


def test_the_trace_accepts_score_first_and_names_what_is_not():
    whole, good = (0, 4), [1, 1, 3, 3]
    assert trace(good, StateUpdate(2, (0, 2), whole, True)) == []
    assert "were scored at step 3" in trace(good, StateUpdate(2, (0, 3), whole, True))[0]
    assert "from left to right" in trace([3, 1, 3, 3], StateUpdate(2, (1, 2), whole, True))[0]
    assert "outside" in trace(good, StateUpdate(3, (0, 2), (2, 4), False))[0]
    assert trace([3, 3, 1, 1], StateUpdate(1, (2, 3), (2, 4), False)) == []  # streams in any order


def test_ngrams_may_not_be_mixed_in_twice_or_before_the_model_has_scored(make_run: MakeRun):
    scorer = Scorer(make_run(), validation_of(np.arange(5)))
    scorer.record(0, np.ones(4, np.float32))
    scorer.step_index = 2
    scorer.replace((0, 2), np.zeros_like)
    assert scorer.nats == 2 and scorer.nll_T.tolist() == [0, 0, 1, 1]
    with pytest.raises(AssertionError, match="was mixed before"):
        scorer.replace((1, 3), np.zeros_like)
    with pytest.raises(AssertionError, match="mixed before it was scored"):
        scorer.finish(0.0)
    scorer.replace((2, 4), np.zeros_like)
    score = scorer.finish(0.0)
    assert score.nats == 0 and score.problems == ()
    scorer.ngram_updates[0] = scorer.ngram_updates[0]._replace(reads=(0, 4), step_index=1)
    assert "which were scored at step 2" in scorer.finish(0.0).problems[0]


def test_mixing_afterwards_scores_as_the_formula_does_in_the_order_of_the_text(
    make_run: MakeRun, data, monkeypatch
):
    monkeypatch.setattr(Backoff, "AGES", (10, 40))
    run, ids = make_run(**METHODS["lora_mixer"] | {"mixer_orders": "2"}), text_of(data)
    assert run.cfg.mixes_afterwards
    model = random_model(run.cfg)
    mixed = nats_of(run, model, ids)
    run.cfg = dataclasses.replace(run.cfg, mixer="none")
    model_T, expected = nats_of(run, model, ids), []
    plain = PlainBackoff([-3, -2, -1, 2], ids.tolist())
    for target in range(len(model_T)):
        if target and target % T == 0:
            plain.update()
        before = model_T[target - 1] if ids[target] != BOS_ID else 0.0
        p = plain.mix(math.exp(-model_T[target]), target + 1, target + 1, before)
        expected.append(-math.log(p))
        plain.count(target + 1)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    assert np.abs(mixed - model_T).max() > 0.01
    assert len(plain.sums) > 40


def text_mixers(make_run: MakeRun, ids: np.ndarray, world_size: int = 1) -> list[Any]:
    """A TextMixer for each rank, which has every so many of the documents of `ids`."""
    document_T = np.cumsum(ids[:-1] == BOS_ID)
    mixers = []
    for rank in range(world_size):
        run = make_run(**METHODS["lora_mixer"] | {"mixer_orders": "1-3,6"})
        mixers.append(TextMixer(run, ids, np.flatnonzero(document_T % world_size == rank)))
    return mixers


def mix_text(mixers: list[Any], model_T: np.ndarray) -> np.ndarray:
    """The mixed nats of a text from the model's, in chunks of T targets."""
    mixed_T = np.zeros_like(model_T)
    for first in range(0, len(model_T), T):
        for mixer in mixers:
            rows = mixer.rows_of((first, first + T))
            index_N = mixer.index_N[rows]
            mixed_T[index_N] = mixer.nll(rows, torch.from_numpy(model_T[index_N]), first)
        statistics = sum(mixer.weights.statistics for mixer in mixers)
        for mixer in mixers:
            mixer.weights.update_weights(statistics)
            mixer.weights.statistics = torch.zeros_like(statistics)
    return mixed_T


def repetitive_text(num_tokens: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Ids of documents that repeat themselves and each other, and nats of a model."""
    generator = np.random.default_rng(0)
    phrases = generator.integers(2, 30, size=(9, 8))
    ids = phrases[generator.integers(9, size=num_tokens // 8 + 1)].flatten()[: num_tokens + 1]
    ids[generator.random(num_tokens + 1) < 0.1] = 7
    ids[[0, 90, 500, 501, 800]] = BOS_ID
    return ids, (4 * generator.random(num_tokens)).astype(np.float32)


def test_mixing_afterwards_is_the_same_to_the_bit_on_any_number_of_ranks(make_run: MakeRun):
    ids, model_T = repetitive_text()
    one = mix_text(text_mixers(make_run, ids), model_T)
    assert one[700:].mean() < model_T[700:].mean() - 0.5
    for world_size in (2, 3):
        several = mix_text(text_mixers(make_run, ids, world_size), model_T)
        np.testing.assert_array_equal(several, one)


def test_the_mixed_distribution_depends_on_the_text_before_the_target_alone(make_run: MakeRun):
    ids, model_T = repetitive_text()
    index_N1 = torch.tensor([[5], [90], [600], [601], [1203]])
    logits_NV = torch.randn(5, tiny_config().vocab_size, generator=torch.Generator().manual_seed(1))
    (mixer,) = text_mixers(make_run, ids)
    mixed_T = mix_text([mixer], model_T)
    before_NV = mixer.log_probs(logits_NV, index_N1)
    assert (before_NV.exp().sum(1) - 1).abs().max() < 1e-12
    for row, index in enumerate(index_N1[:, 0].tolist()):
        (changed,) = text_mixers(make_run, np.r_[ids[: index + 1], ids[index + 1 :][::-1]])
        other_T = np.r_[model_T[:index], model_T[index:][::-1]]
        np.testing.assert_array_equal(mix_text([changed], other_T)[:index], mixed_T[:index])
        changed.weights = mixer.weights
        after_NV = changed.log_probs(logits_NV[row : row + 1], index_N1[row : row + 1])
        torch.testing.assert_close(after_NV[0], before_NV[row], rtol=0, atol=0)


BOUNDS = [0, 90, 100, 141, 142, 200, 230]  # of the documents of text_of; the pilots are 3 of them


def nats_by_lr(make_run: MakeRun, ids: np.ndarray, **knobs: Any) -> dict[float, np.ndarray]:
    """Nats of all targets with each learning rate alone."""
    found = {}
    for lr in train_gpt.LORA_LRS:
        run = make_run(**{**METHODS["lora_choice"], "ttt_lora_lr": lr, **knobs})
        found[lr] = nats_of(run, random_model(run.cfg), ids)
    return found


def mixture_of(nll_GN: Sequence[np.ndarray], bounds: Sequence[int]) -> np.ndarray:
    """Nats of a mixture, whose weights begin anew in each document, by its definition."""
    mixed, num = list[float](), len(nll_GN)
    for first, stop in itertools.pairwise(bounds):
        weight_G = np.full(num, 1 / num)
        for start in range(first, stop, C):
            nll_GT = np.stack([nll[start : min(start + C, stop)] for nll in nll_GN]).astype(float)
            mixed += (-np.log(weight_G @ np.exp(-nll_GT))).tolist()
            weight_G = weight_G * np.exp(-0.1 * nll_GT.sum(1))
            weight_G = 0.8 * weight_G / weight_G.sum() + 0.2 / num
    return np.array(mixed)


def choice_event(run: Run) -> dict[str, Any]:
    """What the run has logged about the choice of learning rates."""
    lines = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
    event: dict[str, Any] = next(e for e in lines if e["event"] == "ttt_lora_lrs")
    return event


@pytest.mark.parametrize("num_lrs", [1, 2, 3])
def test_the_first_documents_choose_the_learning_rates_of_the_others(
    make_run: MakeRun, data, num_lrs: int
):
    run, ids = make_run(**METHODS["lora_choice"], ttt_num_lrs=num_lrs), text_of(data)
    found = nats_of(run, random_model(run.cfg), ids)
    fixed = nats_by_lr(make_run, ids)
    np.testing.assert_allclose(found[:141], mixture_of([*fixed.values()], BOUNDS[:4]), **TOLERANCE)
    chosen = list[float]()
    for _ in range(num_lrs):  # what lowers the nats most, together with what is there
        nats = {lr: mixture_of([fixed[x] for x in [*chosen, lr]], BOUNDS[:4]).sum()
                for lr in fixed if lr not in chosen}  # fmt: skip
        chosen.append(min(nats, key=nats.__getitem__))
    expected = mixture_of([fixed[lr] for lr in chosen], BOUNDS)
    np.testing.assert_allclose(found[141:], expected[141:], **TOLERANCE)
    event = choice_event(run)
    assert event["chosen"] == ",".join(f"{lr:g}" for lr in chosen) and event["targets"] == 141
    assert event["tried"].split(",") == [f"{lr:g}" for lr in fixed]
    assert event["mixed"] == pytest.approx(min(nats.values()) / 141, abs=1e-4)
    means = [float(nats) for nats in event["nats_per_token"].split(",")]
    assert means == pytest.approx([nll[:141].mean() for nll in fixed.values()], abs=1e-4)
    assert np.ptp([nll.sum() for nll in fixed.values()]) > 0.1


def test_rates_are_chosen_by_the_score_with_the_n_grams_that_are_mixed_in(make_run: MakeRun, data):
    mixer = {"mixer": "backoff", "ttt_chunk_tokens": 48}
    run, ids = make_run(**{**METHODS["lora_choice"], **mixer}), text_of(data)
    nats_of(run, random_model(run.cfg), ids)
    fixed = nats_by_lr(make_run, ids, **mixer)
    means = [float(nats) for nats in choice_event(run)["nats_per_token"].split(",")]
    assert means == pytest.approx([nll[:141].mean() for nll in fixed.values()], abs=1e-4)
    plain = nats_by_lr(make_run, ids)
    assert np.abs(np.array(means) - [nll[:141].mean() for nll in plain.values()]).min() > 0.01


def test_a_fixed_learning_rate_is_mixed_with_parts_of_it(make_run: MakeRun, data):
    run, ids = make_run(**METHODS["lora_choice"]), text_of(data)
    nll = {}
    for lr, num_lrs in [(0.03, 3), (0.03, 1), (0.01, 1), (0.03 / 9, 1)]:
        run.cfg = tiny_config(
            **{**METHODS["lora_choice"], "ttt_lora_lr": lr, "ttt_num_lrs": num_lrs}
        )
        nll[lr, num_lrs] = nats_of(run, random_model(run.cfg), ids)
    mixed, *alone = nll.values()
    np.testing.assert_allclose(mixed, mixture_of(alone, BOUNDS), **TOLERANCE)
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def test_documents_too_short_to_learn_from_leave_the_default_rates(make_run: MakeRun, data):
    knobs = {**METHODS["lora_choice"], "ttt_num_lrs": 3}
    run, ids = make_run(**knobs), text_of(data)
    ids[range(0, 141, C)] = BOS_ID  # a document is as long as a chunk
    nats_of(run, random_model(run.cfg), ids)
    event = choice_event(run)
    assert len(set(event["nats_per_token"].split(","))) == 1
    assert event["chosen"] == ",".join(f"{lr:g}" for lr in train_gpt.LORA_LRS[:3])


def test_a_learning_rate_that_diverges_is_not_chosen(make_run: MakeRun, data, monkeypatch):
    monkeypatch.setattr(train_gpt, "LORA_LRS", (1e30, 0.02, 0.0))
    run, ids = make_run(**METHODS["lora_choice"], ttt_num_lrs=2), text_of(data)
    assert np.isfinite(nats_of(run, random_model(run.cfg), ids)).all()
    event = choice_event(run)
    diverged, *others = map(float, event["nats_per_token"].split(","))
    assert diverged > 2 * max(others) and event["chosen"] == "0.02,0"


def test_three_rates_are_mixed_where_they_are_chosen_and_otherwise_one():
    chosen = tiny_config(**METHODS["lora_choice"])
    assert chosen.num_lrs == 3 and len(chosen.lora_lrs) == 3
    for knobs in ({"ttt_lora_lr": 1e-4}, {"ttt_warm_start_a": True}, {"ttt_num_lrs": 1}):
        assert tiny_config(**{**METHODS["lora_choice"], **knobs}).num_lrs == 1


@pytest.mark.parametrize(
    "knobs", [{"mixer": "backoff", "ngram_tilt": 1.0}, {"ttt_warm_start_a": True}]
)
def test_there_is_no_choice_of_rates_where_documents_depend_on_each_other(knobs):
    cfg = tiny_config(**{**LORA, "ttt_lora_lr": -1.0, **knobs})
    assert not cfg.chooses_lrs and list(cfg.lora_lrs) == [train_gpt.LORA_LRS[0]]
    assert tiny_config(**LORA).lora_lrs == [0.02]
    with pytest.raises(ValueError, match="TTT_NUM_LRS=2 must be 1 with TTT_WARM_START_A"):
        tiny_config(**{**LORA, "ttt_num_lrs": 2, **knobs})


def test_the_trace_knows_only_a_rank_s_own_targets_where_nothing_is_shared():
    everywhere, own = np.array([2, 1, 2]), np.array([0, 1, 2])
    update = StateUpdate(1, (1, 2), (0, 3), False)
    assert rule_violations([update], everywhere, own) == []
    assert rule_violations([update._replace(shared=True)], everywhere, own) != []


def test_pretraining_is_caught_and_refused_and_marked(make_run: MakeRun, data):
    knobs = {**CHUNK, "ttt_method": "pretrain"}
    with pytest.raises(ValueError, match="ALLOW_NONCOMPLIANT=1"):
        tiny_config(**knobs)
    run = make_run(**knobs, allow_noncompliant=True)
    model, validation = random_model(run.cfg), validation_of(text_of(data))
    score = evaluate(run, model, validation, 8, adaptive=True)
    assert "were scored at step" in score.problems[0]
    train_gpt.evaluate_and_log(run, model, validation, "ttt")
    assert run.scores["final_ttt"]["compliant"] is False
    changed, found = text_of(data), [dict[int, float](), dict[int, float]()]
    changed[150] = 60
    for ids, nats in zip((text_of(data), changed), found, strict=True):
        with recorded(nats):
            evaluate(run, model, validation_of(ids), 8, adaptive=True)
    assert any(found[0][t] != found[1][t] for t in range(140))  # the flip test sees it, too


def test_a_pass_that_breaks_a_rule_fails_the_run(make_run: MakeRun, data, monkeypatch):
    run, ids = make_run(**CHUNK), text_of(data)

    def train_first(planner: EvalPlanner, ids: np.ndarray) -> list[EvalStep]:
        steps = plan_adaptive(planner, ids)
        return sorted(steps, key=lambda step: step.action != "train")

    monkeypatch.setattr(train_gpt, "plan_adaptive", train_first)
    with pytest.raises(train_gpt.RunFailed, match="were scored at step"):
        train_gpt.evaluate_and_log(run, random_model(run.cfg), validation_of(ids), "ttt")


# --- Independence --------------------------------------------------------------------------------


def permuted(ids: np.ndarray, order: list[int]) -> np.ndarray:
    bounds = document_bounds(ids)
    pieces = [ids[bounds[d] : bounds[d + 1]] for d in order]
    return np.concatenate([*pieces, [BOS_ID]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_window", "lora_incremental"])
def test_the_order_of_documents_does_not_matter_where_they_are_independent(
    make_run: MakeRun, data, name
):
    run = make_run(**METHODS[name])
    model, ids = random_model(run.cfg), text_of(data)
    ids[-1] = BOS_ID
    sums = [nats_of(run, model, permuted(ids, order)).sum()
            for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 4, 5, 0, 1, 3])]  # fmt: skip
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param("lora_window", marks=pytest.mark.slow), "lora_incremental"]
)
def test_a_document_knows_nothing_of_the_one_before(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name], isolate_documents=True)
    model, ids = random_model(run.cfg), text_of(data)
    changed = ids.copy()
    changed[10:89] = 77
    before, after = nats_of(run, model, ids), nats_of(run, model, changed)
    np.testing.assert_array_equal(before[90:], after[90:])  # target 90 is read from the BOS on


@pytest.mark.parametrize("name", ["lora_text", "lora_warm", "lora_phases", "chunk"])
def test_the_other_methods_carry_something_on(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name])
    model, ids = random_model(run.cfg), text_of(data)
    changed = ids.copy()
    changed[10:89] = 77
    before, after = nats_of(run, model, ids), nats_of(run, model, changed)
    assert (before[91:] != after[91:]).any()


# --- The weights afterwards ----------------------------------------------------------------------


@each_learner
def test_the_model_is_afterwards_what_it_was_to_the_bit(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name])
    model = random_model(run.cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(run, model, validation_of(text_of(data)), 8, adaptive=True)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    train_gpt.parameter_roles(model)  # every parameter has its role again


# --- What the methods compute --------------------------------------------------------------------


@torch.no_grad()
def plain_nats(model: GPT, ids: np.ndarray) -> np.ndarray:
    """Nats of a document by one forward pass over all of it, in the table of the full context."""
    window = torch.from_numpy(ids)[None]
    return model.eval_nll(window[:, :-1], window[:, 1:])[0].numpy()


@pytest.mark.parametrize("chunk", [pytest.param(2, marks=pytest.mark.slow), 5, 29])
@pytest.mark.parametrize(
    "rich",
    [
        {},
        pytest.param(RICH, marks=pytest.mark.slow),
        {**RICH, "isolate_documents": True},
    ],
)
def test_kept_keys_and_values_give_what_a_pass_over_the_whole_document_gives(
    make_run: MakeRun, data, rich, chunk
):
    knobs = {**LORA, **rich, "ttt_context": "incremental", "ttt_lora_lr": 0.0}
    run = make_run(**{**knobs, "ttt_chunk_size": chunk, "ttt_grad_steps": 2, "train_seq_len": 128,
                      "ttt_chunk_tokens": 128})  # fmt: skip
    model, ids = random_model(run.cfg), text_of(data)
    found = nats_of(run, model, ids)
    for first, stop in zip(document_bounds(ids)[:-1], document_bounds(ids)[1:], strict=True):
        whole = plain_nats(model, ids[first : stop + 1])
        np.testing.assert_allclose(found[first:stop], whole, rtol=1e-4, atol=1e-4)


def test_windows_at_learning_rate_zero_are_a_strided_evaluation_of_each_document(
    make_run: MakeRun, data
):
    run = make_run(**{**LORA, "ttt_lora_lr": 0.0})
    model, ids = random_model(run.cfg), text_of(data)
    found, expected = nats_of(run, model, ids), np.full(len(ids) - 1, np.nan)
    for first, stop in zip(document_bounds(ids)[:-1], document_bounds(ids)[1:], strict=True):
        for chunk in range(first, stop, C):
            end = min(chunk + C, stop)
            start = max(first, chunk + C - T)  # not `end`: it may tell of the document's
            expected[chunk:end] = plain_nats(model, ids[start : end + 1])[chunk - start :]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_learn_as_a_plain_loop_over_single_documents(make_run: MakeRun, data):
    run = make_run(**LORA, ttt_lora_targets="q,head", ttt_lora_rank=4, ttt_lora_alpha=6.0)
    model, ids = random_model(run.cfg), text_of(data)
    found = nats_of(run, model, ids)
    trainer = train_gpt.AdapterTrainer(run, model)
    matrices = [matrix for pairs in trainer.call_adapters for matrix, _ in pairs]
    expected = np.full(len(ids) - 1, np.nan)
    for first, stop in zip(document_bounds(ids)[:-1], document_bounds(ids)[1:], strict=True):
        downs = [start.clone().requires_grad_() for start in trainer.initial_a]
        ups = [torch.zeros(train_gpt.lora_sizes(m)[1], 4, requires_grad=True) for m in matrices]
        adam = torch.optim.AdamW([*downs, *ups], lr=0.02, betas=(0.0, 0.99), eps=1e-10,
                                 weight_decay=0.0)  # fmt: skip
        for chunk in range(first, stop, C):
            end = min(chunk + C, stop)
            start = max(first, chunk + C - T)  # not `end`: it may tell of the document's
            window = torch.from_numpy(ids[start : end + 1])[None]
            merged = {id(m): 6 / 4 * up @ down
                      for m, up, down in zip(matrices, ups, downs, strict=True)}  # fmt: skip
            z = logits_with(model, window[:, :-1], merged)[0, chunk - start :]
            nats = torch.nn.functional.cross_entropy(z, window[0, chunk - start + 1 :],
                                                     reduction="none")  # fmt: skip
            expected[chunk:end] = nats.detach().numpy()
            adam.zero_grad()
            nats.mean().backward()
            adam.step()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)  # Adam: signs of tiny sums


def logits_with(model: GPT, ids_BT: torch.Tensor, merged: dict[int, torch.Tensor]) -> torch.Tensor:
    """Softcapped logits with changed matrices: the adapters merged into the weights."""
    changed = {
        f"{name}.weight": module.weight + merged[id(module)]
        for name, module in model.named_modules() if id(module) in merged and name != "tok_emb"
    }  # fmt: skip
    x = torch.func.functional_call(model, changed, (ids_BT,))
    head = model.head_VD + merged.get(id(model.head), torch.zeros(()))
    return train_gpt.softcap_logits(x @ head.T, model.cap)[0]


@pytest.mark.parametrize("train", ["all", "blocks"])
def test_the_table_of_the_evaluation_is_always_trained(make_run: MakeRun, data, train: str):
    knobs = {**CHUNK, "ttt_train": train, "eval_hash_rows": 64, "eval_hash_lr_mult": 20.0}
    run, ids = make_run(**knobs), text_of(data)
    with_table = nats_of(run, random_model(run.cfg), ids)
    run = make_run(**{**knobs, "eval_hash_rows": 0})
    without = nats_of(run, random_model(run.cfg), ids)
    first_chunk = slice(0, run.cfg.ttt_chunk_tokens)
    np.testing.assert_array_equal(with_table[first_chunk], without[first_chunk])
    assert np.abs(with_table - without).max() > 1e-3


def test_chunks_learn_as_a_plain_loop_of_sgd(make_run: MakeRun, data):
    run = make_run(**{**CHUNK, "ttt_grad_clip": 0.5, "eval_stride": T, "train_seq_len": T})
    model, ids = random_model(run.cfg), text_of(data, 200)
    found, expected = nats_of(run, model, ids), np.full(200, np.nan)
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    num_chunks = math.ceil(200 / (2 * T))
    for chunk in range(num_chunks):
        first, stop = chunk * 2 * T, min((chunk + 1) * 2 * T, 200)
        rows = [torch.from_numpy(ids[s : min(s + T, stop) + 1])[None]
                for s in range(first, stop, T)]  # fmt: skip
        expected[first:stop] = np.concatenate([plain_nats(model, row[0].numpy()) for row in rows])
        for _ in range(2 if chunk + 1 < num_chunks else 0):
            sgd.zero_grad()
            for row in rows:
                model.loss(row[:, :-1], row[:, 1:], torch.full((1, T), 1 / (2 * T))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            sgd.param_groups[0]["lr"] = (
                0.05 * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
            )
            sgd.step()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_chunks_learn_in_micro_batches_as_at_once(make_run: MakeRun, data, monkeypatch):
    ids, loss, sizes = text_of(data), GPT.loss, list[int]()

    def recorded_loss(model: GPT, ids_BT: torch.Tensor, *more: Any) -> torch.Tensor:
        sizes.append(ids_BT.numel())
        return loss(model, ids_BT, *more)

    monkeypatch.setattr(GPT, "loss", recorded_loss)
    found = {}
    for limit in (2 * T, T):
        run = make_run(**CHUNK, micro_batch_tokens=limit)
        sizes.clear()
        found[limit] = nats_of(run, random_model(run.cfg), ids)
        assert max(sizes) == limit
    np.testing.assert_allclose(found[T], found[2 * T], **TOLERANCE)


def test_the_hash_table_has_its_own_learning_rate(make_run: MakeRun):
    run = make_run(**METHODS["chunk_hash"])
    model = random_model(run.cfg)
    with train_gpt.restore_model_after(run.cfg, model):
        trainer = train_gpt.WeightTrainer(run, model)
        groups = {g["base_lr"]: g["params"] for g in trainer.optimizer.param_groups}
        assert sorted(groups) == [0.05, 0.5]
        (table,) = groups[0.5]
        assert table.shape == (64, run.cfg.model_dim)
        ids = torch.tensor([[9, 5, 7]])
        row = train_gpt.EvalHashEmbedding.forward(model.hashes[-1], ids, torch.bfloat16)  # type: ignore[arg-type]
        assert row.dtype == torch.bfloat16
        with torch.no_grad():
            table.copy_(torch.arange(64.0)[:, None].expand_as(table))
        expected = [(2039 * a + b) % 64 for a, b in ((9, 9), (9, 5), (5, 7))]
        assert model.hashes[-1](ids, torch.float32)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("knobs", "frozen"),
    [
        ({}, []),
        ({"ttt_freeze_blocks": 1}, ["blocks.0."]),
        ({"ttt_freeze_blocks": 1, "ttt_train": "blocks"}, ["tok_emb", "blocks.0.attn.c_q"]),
    ],
)
def test_what_is_frozen_stays_and_all_else_is_trained(knobs, frozen):
    cfg = tiny_config(**CHUNK, **knobs)
    model = random_model(cfg)
    trained = train_gpt.ttt_parameters(cfg, model)
    names = [name for name, _ in model.named_parameters()]
    assert ("tok_emb.weight" in trained) == (cfg.ttt_train == "all")
    assert all(not any(name.startswith(f) for f in frozen) for name in trained)
    assert {n for n in names if "blocks.1." in n} <= trained.keys()
    if cfg.ttt_train == "blocks":
        assert "blocks.0.attn_scale" in trained and "skip_weights" not in trained


@pytest.mark.parametrize("trained", ["all", "blocks"])
def test_the_rows_of_frozen_blocks_stay(make_run: MakeRun, data: TinyData, trained: str):
    run = make_run(**CHUNK, ttt_freeze_blocks=1, ttt_train=trained, value_residual="x0")
    model = random_model(run.cfg)
    rows = {n: p for n, p in model.named_parameters() if n in train_gpt.ROW_PER_BLOCK}
    before = {name: param.detach().clone() for name, param in rows.items()}
    assert rows
    trainer = train_gpt.WeightTrainer(run, model)
    ids_BT = torch.from_numpy(text_of(data)[:33])[None]
    ones_BT = torch.ones(1, 32)
    trainer.step(train_gpt.Batch(ids_BT[:, :-1], ids_BT[:, 1:], 0, None, ones_BT), 0.0, 1.0)
    for name, param in rows.items():
        assert torch.equal(param[0], before[name][0]) and not torch.equal(param[1], before[name][1])


def test_every_call_of_a_looped_block_has_its_own_adapter(make_run: MakeRun):
    run = make_run(**LORA | {"num_layers": 3}, num_loops=1, loop_start=0, loop_end=2,
                   ttt_lora_targets="v")  # fmt: skip
    trainer = train_gpt.AdapterTrainer(run, random_model(run.cfg))
    assert (len(trainer.call_adapters), len(trainer.adapters)) == (6, 6)  # blocks 0 to 2 twice


def test_documents_end_at_the_next_bos():
    assert document_bounds(np.array([BOS_ID, 5, 6, BOS_ID, 7, BOS_ID])) == [0, 3, 5]
    assert document_bounds(np.array([5, 6, BOS_ID, 7])) == [0, 2, 3]


@pytest.mark.parametrize("context", ["window", "text", "incremental"])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        pytest.param({"ttt_chunk_size": 3}, marks=pytest.mark.slow),
        pytest.param({"ttt_batch_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_where_the_next_document_begins_does_not_show_before(make_run: MakeRun, context, knobs):
    run = make_run(**{**LORA, **knobs, "ttt_context": context})
    model, ids = random_model(run.cfg), np.full(131, 5, np.uint16)
    ids[:] = np.random.default_rng(1).integers(3, 60, len(ids))
    ids[[0, 90]] = BOS_ID
    base = nats_of(run, model, ids)
    for place in (84, 86, 87, 125, 128):  # within and at the ends of chunks beyond the context
        other = ids.copy()
        other[place] = BOS_ID
        found = nats_of(run, model, other)
        np.testing.assert_allclose(found[: place - 1], base[: place - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", ["window", "text"])
def test_where_a_document_ends_does_not_choose_the_angles_of_its_rotation(
    make_run: MakeRun, context: str
):
    # Windows grow beyond the training context, within a chunk; from there on the angles are others.
    knobs = {"ttt_context": context, "ttt_batch_size": 1, "ttt_chunk_size": 12}
    run = make_run(**{**LORA, **knobs, "eval_seq_len": 2 * T, "rope_dims": 0})
    model = random_model(run.cfg)
    ids = np.random.default_rng(1).integers(3, 60, 131).astype(np.uint16)
    ids[[0, 90]] = BOS_ID
    base = nats_of(run, model, ids)
    for place in range(T - 3, T + 9):
        other = ids.copy()
        other[place] = BOS_ID
        found = nats_of(run, model, other)
        np.testing.assert_allclose(found[: place - 1], base[: place - 1], rtol=1e-4, atol=1e-4)


def test_a_window_of_the_text_may_begin_before_its_document(data):
    ids = text_of(data)
    for context, starts in (("window", {90}), ("text", {66, 74}), ("incremental", {90, 98})):
        plan = plan_of(ids, 0, 1, **{**LORA, "ttt_context": context})
        windows = [w for step in plan for w in step.windows
                   if 90 <= w.first < 100]  # fmt: skip
        assert {w.start for w in windows} == starts
        assert all(isinstance(w, Window) and w.end - w.start <= T for w in windows)


# --- Audit ---------------------------------------------------------------------------------------


def verdicts_of(run: Run) -> dict[str, str]:
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    events = [event for line in lines if (event := json.loads(line))["event"] == "audit"]
    return {event["condition"][:2]: event["verdict"] for event in events}


@pytest.mark.parametrize(
    "name",
    [
        "sliding",
        "lora_mixture",
        pytest.param("lora_choice", marks=pytest.mark.slow),
        pytest.param("chunk_hedge", marks=pytest.mark.slow),
        pytest.param("lora_mixer", marks=pytest.mark.slow),
        pytest.param("lora_incremental", marks=pytest.mark.slow),
        pytest.param("lora_tilt", marks=pytest.mark.slow),
    ],
)
def test_an_audit_passes_what_is_legal(make_run: MakeRun, data, name):
    run = make_run(**METHODS[name])
    audit.audit(run, random_model(run.cfg), validation_of(text_of(data)))
    assert verdicts_of(run) == dict.fromkeys(["C1", "C2", "C3", "C4"], "pass")


def test_an_audit_reads_documents_before_and_after_the_choice_of_rates(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(train_gpt, "PILOT_TARGETS", 16_384)
    num_targets = audit.num_audited_targets(tiny_config(**LORA))
    places = [part * num_targets for part in audit.CHECKED_PLACES]
    assert places[0] < 15_000 and places[1] > 20_000
    weights = tiny_config(**CHUNK)
    assert audit.num_audited_targets(weights) == max(4096, 4 * weights.ttt_chunk_tokens)


@pytest.mark.parametrize(
    ("knobs", "broken"),
    [
        ({**CHUNK, "ttt_method": "pretrain"}, {"C1", "C3", "C4"}),
        (
            {**CHUNK, "mixer": "hedge_entropy", "hedge_min_tokens": 0, "ngram_table_bits": 12},
            {"C2"},
        ),
    ],
)
def test_an_audit_fails_what_is_not(make_run: MakeRun, data, knobs, broken):
    run = make_run(**knobs, allow_noncompliant=True)
    with pytest.raises(train_gpt.RunFailed, match="not legal"):
        audit.audit(run, random_model(run.cfg), validation_of(text_of(data)))
    assert {c for c, verdict in verdicts_of(run).items() if verdict == "fail"} <= broken
    assert min(broken) in {c for c, verdict in verdicts_of(run).items() if verdict == "fail"}


def test_an_audit_reports_what_other_ranks_find(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    def gather(boxes: list[Any], own: dict[str, list[str]]) -> None:
        boxes[:] = [own, {"C1": ["a", "b"], "C2": ["c"]}]

    run, own = make_run(), {"C1": ["b"], "C2": list[str]()}
    assert audit.gather_problems(run, own) == own
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    run.world_size = 2
    assert audit.gather_problems(run, own) == {"C1": ["b", "a"], "C2": ["c"]}


@pytest.mark.slow
def test_the_script_scores_an_artifact_as_it_learns_and_audits_it(data: TinyData, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    knobs = {**LORA, "data_path": str(data.folder), "iterations": 2, "val_tokens_limit": 300,
             "ttt_context": "incremental", "ttt_grad_steps": 1, "eval_stride": 0}  # fmt: skip
    done = run_script(environment(tiny_config(**knobs, run_dir="run")), work)
    assert done.status == 0, done.err
    ttt = dict(log_events(done.out))["final_ttt"]
    assert submission(work / "run")["val_bpb"] == pytest.approx(float(ttt["val_bpb"]))
    again = {**knobs, "artifact": "run/artifact.bin"}
    scored = run_script(environment(tiny_config(**again, mode="eval", run_dir="again")), work)
    assert dict(log_events(scored.out))["final_ttt"]["val_loss"] == ttt["val_loss"]
    packed = ["--script", "run/train_gpt.py"]
    audited = run_audit(work, environment(tiny_config(**knobs, run_dir="audit")), *packed)
    verdicts = [v["verdict"] for event, v in log_events(audited.out) if event == "audit"]
    assert (audited.status, verdicts) == (0, ["pass"] * 4), audited.err
    illegal = {**knobs, "ttt_method": "pretrain", "allow_noncompliant": True}
    caught = run_audit(work, environment(tiny_config(**illegal, run_dir="caught")))
    assert caught.status == 1 and "not legal" in caught.err


def run_audit(work: Path, env: dict[str, str], *options: str) -> Result:
    """Run records/audit.py on the artifact of the run in work/run."""
    arguments = [str(AUDIT), "--artifact", "run/artifact.bin", *options]
    return python_process(arguments, env, work)


def test_an_audit_refuses_what_it_cannot_audit(tmp_path, capsys):
    assert audit.main(["--artifact", "x", "--script", str(tmp_path / "none.py")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "other.py").write_text("def evaluate(): ...\n")
    assert audit.main(["--artifact", "x", "--script", str(tmp_path / "other.py")]) == 2
    assert "has no BOS_ID, Config, InputError" in capsys.readouterr().err
    assert audit.main(["--artifact", str(tmp_path / "none.bin")]) == 2
    assert "none.bin does not exist" in capsys.readouterr().err


def test_mode_audit_names_the_tool_that_replaced_it():
    with pytest.raises(ValueError, match="run python records/audit.py --artifact PATH"):
        tiny_config(mode="audit")


# --- Ranks ---------------------------------------------------------------------------------------

RANKS = f"""
import dataclasses, json, os, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import numpy as np
import torch
import train_gpt
from tests.conftest import random_model
train_gpt.PILOT_TARGETS = {PILOT_TARGETS}
torch.set_num_threads(1)
cfg, ids = train_gpt.config_from_env(os.environ), np.load("ids.npy")
text = train_gpt.Validation(ids, np.ones(len(ids) - 1, dtype=np.int64), False)
with train_gpt.start_run(cfg, os.environ) as run:
    for name, knobs in json.load(open("methods.json")).items():
        run.cfg = dataclasses.replace(cfg, **knobs)
        model = random_model(run.cfg)
        before = [p.clone() for p in model.parameters()]
        score = train_gpt.evaluate(run, model, text, 8, adaptive=True)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert score.problems == (), score.problems
        run.log(name, nats=score.nats, tokens=score.tokens)
"""


@pytest.mark.parametrize(
    # A warm A goes from batch to batch of a rank: other ranks, other batches, other adapters.
    "names",
    [
        ("chunk_hedge", "lora_mixer", "lora_choice"),
        pytest.param({*LEARNING} - {"lora_warm"}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_score_as_one_does(names: Iterable[str], data: TinyData, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    np.save(work / "ids.npy", text_of(data))
    (work / "methods.json").write_text(json.dumps({name: METHODS[name] for name in names}))
    (work / "ranks.py").write_text(RANKS)
    env = environment(tiny_config(run_dir="one", eval_max_seconds=1e6))
    alone = run_script(env, work, work / "ranks.py")
    assert alone.status == 0, alone.err
    results = run_ranks([{**env, "RUN_DIR": "two"}] * 2, work, work / "ranks.py")
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    one, two = (
        {event: float(values["nats"]) for event, values in log_events(out) if event in names}
        for out in (alone.out, results[0].out)
    )
    assert one.keys() == two.keys() == set(names)
    assert two == pytest.approx(one, rel=1e-4)
