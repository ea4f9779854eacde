"""The time budget of the evaluation: what is planned, dropped, skipped or abandoned on any machine.

A simulated machine replaces the forward and backward passes: they advance a clock and score zeros.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import train_gpt
from tests.conftest import MakeRun, TinyData, random_model, tiny_config
from tests.test_ttt import CHUNK, LORA, METHODS, T, nats_of, plan_of, text_of, validation_of
from train_gpt import (
    GPT,
    USABLE_BUDGET_FRAC,
    EvalBudget,
    EvalStep,
    PassAbandoned,
    Run,
    RunFailed,
    StepCost,
    TimeLimit,
    evaluate_artifact,
)

INCREMENTAL: dict[str, Any] = {**LORA, "ttt_context": "incremental"}
STEP_S, POSITION_S, COMPILE_S = 2e-3, 1e-5, 0.05


class Machine:
    """A clock, and the seconds that scoring and training take on a machine of a changing speed."""

    def __init__(self, patch: pytest.MonkeyPatch, slowdown: Callable[[float], float]):
        self.now, self.slowdown, self.is_compiled, self.num_trained = 0.0, slowdown, False, 0
        patch.setattr("train_gpt.time.perf_counter", lambda: self.now)
        patch.setattr(train_gpt.GPT, "eval_nll", self.score)
        patch.setattr(train_gpt.AdapterTrainer, "step", lambda *args: self.adapt(*args))
        patch.setattr(train_gpt.TextMixer, "nll", lambda *args: self.mix(*args))
        patch.setattr(train_gpt.WeightTrainer, "step", self.train)

    def work(self, num_positions: int, num_passes: float = 1.0) -> None:
        seconds = (STEP_S + POSITION_S * num_positions) * num_passes
        self.now += seconds * self.slowdown(self.now)

    def score(self, ids_BT: torch.Tensor, *more: Any) -> torch.Tensor:
        self.now += 0.0 if self.is_compiled else COMPILE_S * self.slowdown(self.now)
        self.is_compiled = True
        self.work(ids_BT.numel())
        first = more[1] if len(more) > 1 else 0
        return torch.zeros(ids_BT[:, first:].shape)

    def adapt(
        self, trainer: train_gpt.AdapterTrainer, batch: train_gpt.Batch, learns: int
    ) -> torch.Tensor:
        self.num_trained += learns > 0
        num_lrs = len(trainer.lrs)
        self.work(num_lrs * batch.ids_BT.numel(), 1 + 2 * learns / len(batch.ids_BT))
        return torch.zeros(batch.ids_BT[:, batch.first_column :].shape).repeat(num_lrs, 1)

    def mix(
        self, mixer: train_gpt.TextMixer, rows: slice, nll_N: torch.Tensor, first: int
    ) -> torch.Tensor:
        self.work(len(nll_N))
        return nll_N

    def train(self, batch: train_gpt.Batch | None, progress: float, chunk_frac: float) -> None:
        self.num_trained += 1
        self.work(0 if batch is None else batch.ids_BT.numel(), 3.0)


def slower_after(start_s: float, factor: float) -> Callable[[float], float]:
    return lambda now: factor if now > start_s else 1.0


class Outcome(NamedTuple):
    """An evaluation on a simulated machine."""

    run: Run
    machine: Machine
    events: list[dict[str, Any]]

    def last(self, event: str) -> dict[str, Any]:
        return [e for e in self.events if e["event"] == event][-1]


def simulate(
    run: Run, patch: pytest.MonkeyPatch, ids: np.ndarray, slowdown: Callable[[float], float]
) -> Outcome:
    """Evaluate an artifact on a machine of this speed."""
    machine, model = Machine(patch, slowdown), random_model(run.cfg)
    evaluate_artifact(run, model, validation_of(ids))
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return Outcome(run, machine, [json.loads(line) for line in lines])


def long_text(data: TinyData) -> np.ndarray:
    return np.tile(text_of(data), 10)


# At a constant speed, disjoint windows take 0.11 s (0.05 of them compilation), sliding windows
# 0.24 s, the adaptive pass of INCREMENTAL 0.67 s, a third of which is scoring.
SPEEDS = {
    "constant": lambda now: 1.0,
    "ten times slower from the middle on": slower_after(0.5, 10.0),
    "slow at first": lambda now: 5.0 if now < 0.5 else 1.0,
    "slow for a while": lambda now: 10.0 if 0.3 < now < 0.6 else 1.0,
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("limit_s", [0.3, 0.6, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("method", ["incremental", "chunk", "phases", "choice", "mixer"])
def test_no_evaluation_takes_longer_than_its_budget(
    make_run: MakeRun, data: TinyData, monkeypatch, tmp_path, method, limit_s, speed
):
    knobs = {
        "incremental": INCREMENTAL,
        "chunk": CHUNK,
        "phases": METHODS["lora_phases"],
        "choice": METHODS["lora_choice"],
        "mixer": METHODS["lora_mixer"],
    }[method]
    run = make_run(**knobs, eval_max_seconds=limit_s)
    ids = long_text(data)
    try:
        outcome = simulate(run, monkeypatch, ids, SPEEDS[speed])
    except RunFailed as error:
        assert "too short for disjoint windows" in str(error) and limit_s < 0.5
        assert "final_quantized" not in run.scores
        return
    assert outcome.machine.now <= limit_s
    assert sum(run.ledger.values()) == pytest.approx(outcome.machine.now)
    final = outcome.last("final")
    scored = [kind for kind in ("quantized", "sliding", "ttt") if f"final_{kind}" in run.scores]
    assert final["score"] == scored[-1]
    assert len(scored) + len(final["notes"].split("; ")) == 3 + (final["notes"] == "")
    for kind in scored:
        assert run.scores[f"final_{kind}"]["tokens"] == len(ids) - 1


def test_with_enough_time_all_passes_run_as_configured(make_run: MakeRun, data, monkeypatch):
    run = make_run(**INCREMENTAL, eval_max_seconds=100.0)
    outcome = simulate(run, monkeypatch, long_text(data), SPEEDS["constant"])
    assert outcome.last("final") == {"event": "final", "score": "ttt", "notes": ""}
    for kind in ("quantized", "sliding", "ttt"):
        score = run.scores[f"final_{kind}"]
        assert "adjusted" not in score and "untrained" not in score
        # The estimate is of the longest steps with a full cache, the smallest rows are cheaper.
        assert score["eval_s"] == pytest.approx(score["estimated_s"], rel=0.1)
    assert [e["name"] for e in outcome.events if e["event"] == "pass"] == ["sliding", "ttt"]


def test_an_adaptive_pass_without_time_for_training_is_skipped(make_run, data, monkeypatch):
    knobs = {**INCREMENTAL, "ttt_chunk_size": 14, "ttt_grad_steps": 4}
    run = make_run(**knobs, eval_max_seconds=0.8)
    outcome = simulate(run, monkeypatch, long_text(data), SPEEDS["constant"])
    assert outcome.last("final")["score"] == "sliding" and outcome.machine.num_trained == 0
    assert outcome.last("final")["notes"].startswith("test-time training skipped: needs")
    assert run.ledger["other"] > 0


def test_a_pass_that_fits_only_in_longer_chunks_is_marked(make_run: MakeRun, data, monkeypatch):
    run = make_run(**{**INCREMENTAL, "ttt_chunk_size": 2}, eval_max_seconds=1.5)
    outcome = simulate(run, monkeypatch, long_text(data), SPEEDS["constant"])
    assert outcome.last("final_ttt")["adjusted"] == "ttt_chunk_size 2 -> 4"
    assert outcome.last("pass")["adjusted"] == "ttt_chunk_size 2 -> 4"
    assert run.cfg.ttt_chunk_size == 2


def test_the_learning_rate_is_chosen_only_if_there_is_time(make_run: MakeRun, data, monkeypatch):
    for limit_s, is_chosen in ((100.0, True), (1.2, False)):
        with monkeypatch.context() as patch:
            run = make_run(**METHODS["lora_choice"], ttt_num_lrs=1, eval_max_seconds=limit_s)
            outcome = simulate(run, patch, long_text(data), SPEEDS["constant"])
        score = outcome.last("final_ttt")
        assert score.get("adjusted") == (None if is_chosen else "ttt_lora_lr -1 -> 0.001")
    assert [e["event"] for e in outcome.events].count("ttt_lora_lrs") == 1  # of both runs


@pytest.mark.parametrize(
    ("limit_s", "adjusted"),
    [
        (100.0, None),
        (2.0, "ttt_num_lrs 3 -> 1"),
        (1.2, "ttt_num_lrs 3 -> 1, ttt_lora_lr -1 -> 0.001"),
    ],
)
def test_learning_rates_are_mixed_only_if_there_is_time(
    make_run: MakeRun, data, monkeypatch, limit_s: float, adjusted: str | None
):
    monkeypatch.setattr(train_gpt, "PILOT_TARGETS", 100)
    run = make_run(**METHODS["lora_choice"], eval_max_seconds=limit_s)
    outcome = simulate(run, monkeypatch, long_text(data), SPEEDS["constant"])
    assert outcome.last("final_ttt").get("adjusted") == adjusted
    if limit_s == 100.0:
        chosen = outcome.last("ttt_lora_lrs")["chosen"]
        assert len({*chosen.split(",")}) == 3


def test_rates_that_a_method_does_not_have_are_not_adjusted(make_run: MakeRun, data, monkeypatch):
    run = make_run(**METHODS["chunk"], ttt_num_lrs=3, eval_max_seconds=1.0)
    outcome = simulate(run, monkeypatch, long_text(data), SPEEDS["constant"])
    assert not any("ttt_num_lrs" in str(event) for event in outcome.events)


def test_the_seconds_of_mixing_ngrams_are_part_of_the_plan(make_run: MakeRun, data, monkeypatch):
    run = make_run(**METHODS["lora_mixer"], eval_max_seconds=100.0)
    outcome = simulate(run, monkeypatch, long_text(data), SPEEDS["constant"])
    score = outcome.last("final_ttt")
    assert score["eval_s"] == pytest.approx(score["estimated_s"], rel=0.1)
    num_chunks = -(-(len(long_text(data)) - 1) // run.cfg.ttt_chunk_tokens)
    assert score["eval_s"] > num_chunks * STEP_S


def test_sliding_windows_that_do_not_fit_take_a_longer_stride_or_are_skipped(
    make_run: MakeRun, data, monkeypatch
):
    for limit_s, score in ((0.8, "sliding"), (0.25, "quantized")):
        with monkeypatch.context() as patch:
            run = make_run(**{**METHODS["sliding"], "eval_stride": 2}, eval_max_seconds=limit_s)
            outcome = simulate(run, patch, long_text(data), SPEEDS["constant"])
        assert outcome.last("final")["score"] == score
        if score == "sliding":
            assert outcome.last("final_sliding")["adjusted"] == "eval_stride 2 -> 4"
        else:
            assert outcome.last("final")["notes"].startswith("sliding windows skipped: needs")


def test_a_machine_that_becomes_slow_stops_training_and_still_scores(make_run, data, monkeypatch):
    run = make_run(**INCREMENTAL, eval_max_seconds=1.6)
    outcome = simulate(run, monkeypatch, long_text(data), slower_after(0.5, 4.0))
    final = outcome.last("final_ttt")
    num_dropped, _, num_steps, _ = final["untrained"].split()
    assert 0 < int(num_dropped) < int(num_steps) and outcome.machine.num_trained > 0
    assert outcome.machine.now <= 1.6


@pytest.mark.parametrize(("start_s", "factor"), [(0.9, 1.2), (0.9, 1.5), (0.95, 1.5), (0.95, 2.0)])
def test_a_pass_is_completed_even_if_its_last_steps_are_slower(
    start_s: float, factor: float, make_run: MakeRun, data, monkeypatch
):
    run = make_run(**INCREMENTAL, eval_max_seconds=1.0)
    outcome = simulate(run, monkeypatch, long_text(data), slower_after(start_s, factor))
    assert "untrained" in outcome.last("final_ttt") and outcome.machine.num_trained > 0
    assert outcome.machine.now <= 1.0


def test_a_pass_that_cannot_be_finished_is_abandoned_for_the_one_before(
    make_run: MakeRun, data, monkeypatch
):
    run = make_run(**INCREMENTAL, eval_max_seconds=2.5)
    outcome = simulate(run, monkeypatch, long_text(data), slower_after(0.6, 50.0))
    final = outcome.last("final")
    assert final["score"] == "sliding" and "final_ttt" not in run.scores
    assert final["notes"].startswith("test-time training abandoned after ")
    assert run.ledger["evaluation"] < 1.0 < run.ledger["other"] < outcome.machine.now <= 2.5


def test_disjoint_windows_that_do_not_fit_fail_with_the_seconds_that_they_need(
    make_run: MakeRun, data, monkeypatch
):
    run = make_run(**METHODS["sliding"], eval_max_seconds=0.5)
    needed = r"EVAL_MAX_SECONDS=0.5 is too short .* needs 1.1 s, 0.5 s left; raise it"
    with pytest.raises(RunFailed, match=needed):
        simulate(run, monkeypatch, long_text(data), lambda now: 10.0)


def test_a_pass_whose_last_step_ends_too_late_does_not_count(make_run, data, monkeypatch):
    run = make_run(**METHODS["sliding"], eval_max_seconds=1.0)
    calls = itertools.count(1)  # compilation, 1 disjoint step, 4 measured ones, 3 sliding ones

    def stop_in_the_last_step(now: float) -> float:
        return 1000.0 if next(calls) == 9 else 1.0

    outcome = simulate(run, monkeypatch, text_of(data, 100), stop_in_the_last_step)
    assert next(calls) == 10
    final = outcome.last("final")
    assert final["score"] == "quantized" and "final_sliding" not in run.scores
    assert final["notes"].startswith("sliding windows complete too late: after 3.")
    assert run.ledger["evaluation"] < 1.0


def test_a_step_costs_time_by_itself_and_by_its_positions(make_run: MakeRun, data, monkeypatch):
    run, ids = make_run(**INCREMENTAL), long_text(data)
    plan = plan_of(ids, 0, 1, **INCREMENTAL)
    model = random_model(run.cfg)
    machine = Machine(monkeypatch, SPEEDS["constant"])
    cost = train_gpt.measure_step_cost(run, model, plan, adaptive=True)
    assert cost == pytest.approx((STEP_S, POSITION_S, 0.0, 0.0))
    budget, started_s = EvalBudget(run, plan, 100.0, cost), machine.now
    runner = train_gpt.EvalRunner(run, model, validation_of(ids), plan, adaptive=True)
    runner.run_steps(budget)
    assert budget.estimated_s == pytest.approx(machine.now - started_s)


def test_the_measurement_has_a_full_cache_and_the_mixer(make_run: MakeRun, data, monkeypatch):
    run, ids = make_run(**METHODS["lora_tilt"]), text_of(data)
    seen: list[tuple[int, bool]] = []
    step = train_gpt.AdapterTrainer.step

    def spy(self: train_gpt.AdapterTrainer, batch: train_gpt.Batch, learns: int) -> torch.Tensor:
        nll_BT = step(self, batch, learns)
        assert self.past is not None
        seen.append((self.past.length, batch.mixer_inputs is not None))
        return nll_BT

    monkeypatch.setattr(train_gpt.AdapterTrainer, "step", spy)
    plan = plan_of(ids, 0, 1, **METHODS["lora_tilt"])
    step_s, position_s, *_ = train_gpt.measure_step_cost(
        run, random_model(run.cfg), plan, adaptive=True
    )
    assert step_s >= 0 and position_s >= 0 and step_s + position_s > 0
    assert seen == [(T, True)] * 8


def test_a_slow_moment_does_not_change_the_measurement(make_run: MakeRun, data, monkeypatch):
    run, slow_times = make_run(**INCREMENTAL), iter([1.0, 5.0, 1.0, 1.0] * 2)
    Machine(monkeypatch, lambda now: next(slow_times))
    plan = plan_of(long_text(data), 0, 1, **INCREMENTAL)
    cost = train_gpt.measure_step_cost(run, random_model(run.cfg), plan, adaptive=True)
    assert cost == pytest.approx((STEP_S, POSITION_S, 0.0, 0.0))


def test_the_measurement_compiles_the_training_steps_of_the_pass(
    make_run: MakeRun, data, monkeypatch
):
    # Of one row each, and with frozen weights.
    knobs = {**CHUNK, "ttt_freeze_blocks": 1, "ttt_batch_seqs": 2, "micro_batch_tokens": T}
    run, ids, loss = make_run(**knobs), text_of(data), GPT.loss
    plan, model, seen = plan_of(ids, 0, 1, **knobs), random_model(run.cfg), list[Any]()

    def recorded_loss(model: GPT, ids_BT: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append((ids_BT.shape, [x.requires_grad for x in model.parameters()]))
        return loss(model, ids_BT, *more)

    monkeypatch.setattr(GPT, "loss", recorded_loss)
    model.run_block = functools.partial(train_gpt.run_block)  # as if it were compiled
    train_gpt.measure_step_cost(run, model, plan, adaptive=True)
    (measured,) = seen
    train_gpt.EvalRunner(run, model, validation_of(ids), plan, adaptive=True).run_steps()
    assert measured[0] == (1, T) and not all(measured[1])
    assert len(seen) > 2 and all(other == measured for other in seen)


@pytest.mark.parametrize(("batch_rows", "cost"), [(1, 6.0), (6, 1.0)])
def test_training_a_chunk_is_expected_to_take_time_by_its_rows(
    make_run: MakeRun, data, batch_rows: int, cost: float
):
    # Two rows are trained at a time, and scored `batch_rows` at a time.
    knobs = {**CHUNK, "val_batch_size": batch_rows * T, "ttt_batch_seqs": 2}
    run, ids = make_run(**knobs), text_of(data)
    plan = plan_of(ids, 0, 1, **knobs)
    measured = train_gpt.measure_step_cost(run, random_model(run.cfg), plan, adaptive=True)
    assert measured.positions == batch_rows * T
    budget = EvalBudget(run, plan, math.inf, measured._replace(step_s=1.0))
    trained = [s for s in plan if s.action == "train" and s.shape == (2, T)]
    assert trained
    assert {budget.training_seconds(step) for step in trained} == {cost}


@pytest.mark.parametrize("name", ["chunk", "lora_incremental", "lora_phases"])
def test_a_pass_whose_training_is_dropped_scores_as_with_learning_rate_zero(
    make_run: MakeRun, data, monkeypatch, name
):
    run, ids = make_run(**METHODS[name]), text_of(data)
    idle = make_run(**{**METHODS[name], "ttt_lr": 0.0, "ttt_lora_lr": 0.0})
    model = random_model(run.cfg)
    plan = plan_of(ids, 0, 1, **METHODS[name])
    # There is time to score, by this cost, but for no training; the real clock stands still.
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: 0.0)
    budget = EvalBudget(run, plan, math.inf, StepCost())
    budget.limit_s = 1.2 * budget.to_score[0]
    with train_gpt.restore_model_after(run.cfg, model):
        runner = train_gpt.EvalRunner(run, model, validation_of(ids), plan, adaptive=True)
        drop = EvalBudget.fit_step
        monkeypatch.setattr(
            EvalBudget, "fit_step", lambda self, step, index: step.without_training()
        )
        nll_T = runner.run_steps(budget).nll_T
        monkeypatch.setattr(EvalBudget, "fit_step", drop)
    np.testing.assert_array_equal(nll_T, nats_of(idle, model, ids).astype(np.float32))


def test_a_phase_whose_first_step_was_dropped_learns_with_the_next(make_run: MakeRun, data):
    run, ids = make_run(**METHODS["lora_phases"]), text_of(data)
    plan = plan_of(ids, 0, 1, **METHODS["lora_phases"])
    first = next(i for i, step in enumerate(plan) if step.action == "train" and step.resets)

    class DropsFirst(EvalBudget):
        def fit_step(self, step: EvalStep, step_index: int) -> EvalStep | None:
            return step.without_training() if step_index == first + 1 else step

    nll = []
    for kind in (EvalBudget, DropsFirst):
        model, budget = random_model(run.cfg), kind(run, plan, math.inf)
        runner = train_gpt.EvalRunner(run, model, validation_of(ids), plan, adaptive=True)
        nll.append(runner.run_steps(budget).nll_T)
    whole, partly = nll
    assert (partly[:90] == whole[:90]).all() and (partly != whole).any()


def test_an_optimizer_begins_anew_even_if_its_first_step_was_dropped(make_run: MakeRun, data):
    run, ids = make_run(**CHUNK, ttt_momentum=0.9), text_of(data)
    plan = plan_of(ids, 0, 1, **CHUNK)
    trained = [i for i, step in enumerate(plan) if step.action == "train"]
    first = next(i for i in trained[2:] if i + 1 in trained)
    plan[first] = plan[first]._replace(resets=True)
    without = [*plan[:first], plan[first + 1]._replace(resets=True), *plan[first + 2 :]]

    class DropsOne(EvalBudget):
        def fit_step(self, step: EvalStep, step_index: int) -> EvalStep | None:
            return step.without_training() if step_index == first + 1 else step

    dropping = DropsOne(run, plan, math.inf)
    nll = []
    for steps, budget in ((plan, None), (plan, dropping), (without, None)):
        model = random_model(run.cfg)
        done = train_gpt.EvalRunner(run, model, validation_of(ids), steps, adaptive=True)
        nll.append(done.run_steps(budget).nll_T)
    whole, dropped, other = nll
    assert (dropped == other).all() and (dropped != whole).any()


def test_training_stops_when_the_rest_of_the_time_is_needed_to_score(
    make_run: MakeRun, data, monkeypatch
):
    knobs = {**INCREMENTAL, "ttt_batch_size": 1}
    run, plan, clock = make_run(**knobs), plan_of(text_of(data), 0, 1, **knobs), [0.0]
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: clock[0])
    total = sum(math.prod(step.shape) for step in plan)
    budget = EvalBudget(
        run, plan, limit_s=2.0 * total, cost=StepCost(0.0, 1.0)
    )  # all of it takes 3
    learned = []
    for step_index, step in enumerate(plan, start=1):
        done = budget.fit_step(step, step_index)
        assert done is not None
        learned.append(done.num_learning_rows)
        clock[0] += math.prod(step.shape) * (3.0 if done.num_learning_rows else 1.0)
    assert clock[0] <= 2.0 * total
    assert 0.2 < np.mean(np.array(learned) > 0) < 0.6 and budget.num_dropped > 0
    assert learned[0] > 0 and learned[-2] == 0


class Peers:
    """A maximum over ranks, some of which have values that this rank does not know."""

    def __init__(self, run: Run, values: list[float]):
        self.values = itertools.chain(values, itertools.repeat(0.0))
        run.all_reduce_max = self.all_reduce_max  # type: ignore[method-assign]

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clamp_min(next(self.values))


def test_the_table_of_noncanonical_tokens_counts_as_evaluation(make_run: MakeRun, data: TinyData):
    run = make_run(**CHUNK)
    evaluate_artifact(
        run, random_model(run.cfg), validation_of(text_of(data))._replace(table_s=1e6)
    )
    assert 1e6 < run.ledger["evaluation"] < 2e6


def test_a_pass_that_another_rank_abandons_is_abandoned_here(make_run: MakeRun, data):
    run, ids = make_run(**CHUNK), text_of(data)
    plan = plan_of(ids, 0, 1, **CHUNK)
    shared = sum(step.is_collective for step in plan)
    for place in (0, shared - 1):  # the other rank gives up before the first, or the last update
        Peers(run, [*[0.0] * (2 * place), 77.0])
        budget = EvalBudget(run, plan, 1e9, StepCost(1e-9))
        model = random_model(run.cfg)
        runner = train_gpt.EvalRunner(run, model, validation_of(ids), plan, adaptive=True)
        with pytest.raises(PassAbandoned, match="needs 77.0 s"):
            runner.run_steps(budget)


def test_the_time_that_other_ranks_take_is_not_the_pace_of_this_one(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run, clock = make_run(), [0.0]
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: clock[0])

    def wait(tensor: torch.Tensor) -> torch.Tensor:
        clock[0] += 9.0
        return tensor

    monkeypatch.setattr(run, "all_reduce_max", wait)
    plan = [EvalStep("mix", text=(i, i + 1)) for i in range(4)]  # 1 s each, without documents
    budget = EvalBudget(run, plan, 60.0, StepCost())
    for step_index, step in enumerate(plan, start=1):
        assert budget.fit_step(step, step_index) is step
        clock[0] += 1.0
    assert budget.measure_pace(len(plan) + 1) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("cost", [None, StepCost(step_s=1.0, position_s=0.1)])
def test_a_rank_that_scores_nothing_drops_no_training(make_run: MakeRun, data, monkeypatch, cost):
    knobs = {**LORA, "ttt_phases": "1"}
    run, clock = make_run(**knobs), [0.0]
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: clock[0])
    plan = plan_of(text_of(data)[:145], 4, 5, **knobs)  # four documents
    plan = [step if step.action == "train" else EvalStep("score") for step in plan]
    budget = EvalBudget(run, plan, 100.0, cost)
    assert budget.to_train > 0
    for step_index, step in enumerate(plan, start=1):
        clock[0] += 0.1
        assert budget.fit_step(step, step_index) is step
    assert budget.num_dropped == 0


def test_dropped_training_is_marked_with_that_of_all_ranks(make_run: MakeRun, data, monkeypatch):
    run, ids = make_run(**CHUNK, eval_max_seconds=100.0), text_of(data)

    def of_two_ranks(tensor: torch.Tensor) -> torch.Tensor:  # the other one dropped 3 of 9
        return tensor.add_(torch.tensor([3, 9])) if tensor.dtype == torch.int64 else tensor

    monkeypatch.setattr(run, "all_reduce_sum", of_two_ranks)
    score, _, marks = train_gpt.run_pass(
        run, random_model(run.cfg), validation_of(ids), "ttt", TimeLimit(math.inf)
    )
    assert score.tokens == 230
    assert marks["untrained"] == f"3 of {9 + len(plan_of(ids, 0, 1, **CHUNK))} steps"


def test_a_time_limit_counts_what_a_pass_needs_at_least(make_run: MakeRun, monkeypatch):
    monkeypatch.setattr("train_gpt.time.perf_counter", lambda: 10.0)
    run = make_run()
    assert TimeLimit(15.0).check(run, 5.0) == 5.0
    with pytest.raises(PassAbandoned, match="skipped: needs 6.0 s, 5.0 s left"):
        TimeLimit(15.0).check(run, 6.0)
    assert TimeLimit().check(run, 1e9) == math.inf
    assert tiny_config().eval_max_seconds * USABLE_BUDGET_FRAC < 600


def test_the_score_before_quantization_is_on_no_budget(make_run: MakeRun, data: TinyData):
    run = make_run(eval_max_seconds=1e-9)
    model = random_model(run.cfg)
    train_gpt.evaluate_and_log(run, model, validation_of(text_of(data)), "prequant")
    assert run.scores["final_prequant"]["tokens"] == 230


@pytest.mark.parametrize("cost", [None, StepCost(step_s=1.0, position_s=0.1)])
def test_a_rank_without_rows_in_a_global_phase_has_a_budget(make_run: MakeRun, data, cost):
    run = make_run(**INCREMENTAL, ttt_phases="1")
    knobs = {**INCREMENTAL, "ttt_phases": "1"}
    plans = [plan_of(text_of(data), rank, 8, **knobs) for rank in range(8)]
    empty = [[x for x in plan if x.action == "train" and not x.windows] for plan in plans]
    assert any(empty) and not all(empty)
    for plan in plans:
        budget = EvalBudget(run, plan, 100.0, cost)
        assert 0 <= budget.to_train < math.inf
        assert all(budget.training_seconds(step) == 0 for step in empty[0])
