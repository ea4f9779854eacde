"""Evaluation: which window scores which target, what the sums are, and what cannot change them."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from tests.conftest import MakeRun, TinyData, environment, random_model, tiny_config
from tests.processes import log_events, run_script, submission
from train_gpt import (
    GPT,
    EvalPlanner,
    EvalStep,
    Run,
    Scorer,
    Validation,
    Window,
    evaluate,
    plan_windows,
    rank_slice,
)

SEQ_LEN = 32


def reference_windows(num_targets: int, seq_len: int, stride: int) -> list[tuple[int, list[int]]]:
    """Start and scored targets of each window, by a loop over all starts 0, S, 2S, ...

    A start is kept if w + (T - S) < N; the first always is. The first window scores all of its
    targets, a later one those from T - S to its end.
    """
    windows = []
    for start in range(0, num_targets, stride):
        if start and not start + (seq_len - stride) < num_targets:
            continue
        end = min(start + seq_len, num_targets)
        windows.append((start, list(range(start + (seq_len - stride if start else 0), end))))
    return windows


lengths = st.integers(1, 300)
shapes = st.integers(1, 40).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


# --- The plan ------------------------------------------------------------------------------------


@given(lengths, shapes)
def test_windows_are_those_of_a_plain_loop_over_all_starts(num_targets, shape):
    planned = [(w.start, list(range(w.first, w.end))) for w in plan_windows(num_targets, *shape)]
    assert planned == reference_windows(num_targets, *shape)


@given(lengths, shapes)
def test_every_target_is_scored_exactly_once_and_in_order(num_targets, shape):
    windows = plan_windows(num_targets, *shape)
    scored = [t for w in windows for t in range(w.first, w.end)]
    assert scored == list(range(num_targets))


@pytest.mark.parametrize("seq_len, stride", [(8, 1), (8, 3), (8, 5), (8, 8), (1, 1)])
@pytest.mark.parametrize("num_targets", [1, 2, 7, 8, 9, 15, 16, 17, 24, 25])
def test_edges_of_the_text_are_scored_once(num_targets, seq_len, stride):
    counts = Counter[int]()
    for window in plan_windows(num_targets, seq_len, stride):
        counts.update(range(window.first, window.end))
    assert counts == Counter(range(num_targets))


@given(lengths, shapes)
def test_windows_fit_the_context_and_leave_none_that_scores_nothing(num_targets, shape):
    seq_len, stride = shape
    for window in plan_windows(num_targets, seq_len, stride):
        assert 0 < window.end - window.start <= seq_len
        assert window.start <= window.first < window.end
        assert window.end <= num_targets


@given(lengths, shapes)
def test_targets_after_the_first_window_have_at_least_length_less_stride_context(
    num_targets, shape
):
    seq_len, stride = shape
    for window in plan_windows(num_targets, seq_len, stride)[1:]:
        assert window.first - window.start >= seq_len - stride


@pytest.mark.parametrize(
    "num_targets, windows",
    [
        pytest.param(
            40_540_160, 633_409, marks=pytest.mark.slow
        ),  # SP8192: one start every 64 targets, less the last 31
        # SP1024; with the 31 tail windows that rescore it was 969,088
        pytest.param(62_021_632, 969_057, marks=pytest.mark.slow),
    ],
)
def test_published_validation_sets_have_the_published_number_of_windows(num_targets, windows):
    # Both counts belong to T = 2048: N / 64 starts, of which T / 64 - 1 = 31 have nothing to score.
    assert num_targets // 64 - windows == 2048 // 64 - 1
    assert len(plan_windows(num_targets, 2048, 64)) == windows


def test_plain_evaluation_of_the_published_set_drops_no_tail():
    windows = plan_windows(62_021_633, 1024, 1024)
    assert len(windows) == 62_021_632 // 1024 + 1
    assert windows[-1].end - windows[-1].start == 1


@given(st.integers(0, 60), st.integers(1, 12))
def test_ranks_share_the_windows_without_gap_overlap_or_imbalance(num_items, world_size):
    items = list(range(num_items))
    shares = [list(rank_slice(items, rank, world_size)) for rank in range(world_size)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- The scorer ----------------------------------------------------------------------------------


def some_validation(num_targets: int) -> Validation:
    """Targets 0, 1, ... of 1, 2, 3, 1, 2, 3 ... bytes."""
    ids = np.arange(num_targets + 1, dtype=np.uint16)
    return Validation(ids=ids, target_bytes=np.arange(num_targets) % 3 + 1, partial=False)


def ones(count: int) -> np.ndarray:
    return np.ones(count, dtype=np.float32)


def test_scorer_refuses_a_target_twice(make_run: MakeRun):
    scorer = Scorer(make_run(), some_validation(10))
    scorer.record(0, ones(6))
    with pytest.raises(AssertionError, match="scored before"):
        scorer.record(5, ones(1))


def test_scorer_refuses_to_finish_with_a_target_missing(make_run: MakeRun):
    scorer = Scorer(make_run(), some_validation(10))
    scorer.record(0, ones(4))
    scorer.record(5, ones(5))
    with pytest.raises(AssertionError, match="^1 targets not scored once"):
        scorer.finish(0.0)


@pytest.mark.parametrize("first, count", [(-1, 1), (9, 2), (10, 1)])
def test_scorer_refuses_targets_that_do_not_exist(make_run: MakeRun, first, count):
    scorer = Scorer(make_run(), some_validation(10))
    with pytest.raises(AssertionError, match="no targets"):
        scorer.record(first, ones(count))


def test_scorer_refuses_a_target_that_two_ranks_scored(make_run: MakeRun):
    run = make_run()
    run.all_reduce_sum = lambda tensor: tensor.mul_(2)  # type: ignore[method-assign]  # another rank, the same work
    scorer = Scorer(run, some_validation(10))
    scorer.record(0, ones(10))
    with pytest.raises(AssertionError, match="not scored once"):
        scorer.finish(0.0)


@pytest.mark.parametrize("size", [1, 3, 10, 11])
def test_the_record_of_all_ranks_is_reduced_in_pieces(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, size: int
):
    """Memory stays bounded for a validation text of any length."""
    monkeypatch.setattr(train_gpt, "REDUCED_TARGETS", size)
    run, sizes = make_run(), list[int]()

    def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.shape[-1])
        return tensor

    run.all_reduce_sum = all_reduce_sum  # type: ignore[method-assign]
    scorer = Scorer(run, some_validation(10))
    scorer.record(0, ones(7))
    with pytest.raises(AssertionError, match="^3 targets not scored once"):
        scorer.finish(0.0)
    scorer.record(7, ones(3))
    sizes.clear()
    assert scorer.finish(0.0).tokens == 10
    assert max(sizes[1:]) == min(size, 10) and sum(sizes[1:]) == 10


def test_sums_are_those_of_float64_in_any_order_of_windows(make_run: MakeRun):
    # Past 2^24 a float32 sum does not notice another 1.
    nll = np.array([2.0**24, *[1.0] * 999], dtype=np.float32)
    scorer = Scorer(make_run(), some_validation(1000))
    for first in range(900, -1, -100):
        scorer.record(first, nll[first : first + 100])
    score = scorer.finish(0.0)
    assert score.nats == 2**24 + 999
    assert score.num_bytes == sum(i % 3 + 1 for i in range(1000))
    assert score.tokens == 1000


def test_summary_is_nats_a_token_and_bits_a_byte():
    score = train_gpt.Score(
        nats=3000 * math.log(2), tokens=1000, num_bytes=2000, partial=True, eval_s=1.0
    )
    summary = score.summary()
    assert summary["val_loss"] == pytest.approx(3 * math.log(2), abs=1e-8)
    assert summary["val_bpb"] == pytest.approx(1.5, abs=1e-8)
    assert (summary["tokens"], summary["bytes"], summary["partial"]) == (1000, 2000, True)


# --- Scores of a model ---------------------------------------------------------------------------


def validation_of(data: TinyData, num_targets: int) -> Validation:
    """The first targets of the tiny validation text, all of one byte."""
    ids = data.val[: num_targets + 1]
    return Validation(ids=ids, target_bytes=np.ones(num_targets, dtype=np.int64), partial=False)


def nll_by_target(
    monkeypatch: pytest.MonkeyPatch, run: Run, model: GPT, validation: Validation, stride: int
) -> np.ndarray:
    """Nats of each target as the scorer was given them."""
    found = np.full(validation.num_targets, np.nan)
    record = Scorer.record

    def spy(self: Scorer, first: int, nll: np.ndarray) -> None:
        record(self, first, nll)
        found[first : first + len(nll)] = nll

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "record", spy)
        score = evaluate(run, model, validation, stride)
    assert score.nats == pytest.approx(math.fsum(found), rel=1e-12)
    return found


@torch.no_grad()
def reference_nll(model: GPT, ids: np.ndarray, seq_len: int, stride: int) -> np.ndarray:
    """Nats of each target, one window at a time, unpadded, by PyTorch's own cross-entropy."""
    nll = np.full(len(ids) - 1, np.nan)
    for start, scored in reference_windows(len(ids) - 1, seq_len, stride):
        window = torch.from_numpy(ids[start : start + seq_len + 1])
        logits_TV = model.logits(window[None, :-1])[0]
        each = F.cross_entropy(logits_TV.double(), window[1:], reduction="none")
        nll[scored] = each.numpy()[np.array(scored) - start]
    return nll


# float32 sums inside a product depend on the shapes of the batch: about 1e-6 of a logit of size 1.
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(
    "num_targets, stride",
    [(n, s) for n in (5, 31, 32, 33, 64, 100, 129) for s in (7, 8, 32)] + [(33, 1), (50, 1)],
)
def test_scores_equal_a_loop_over_unpadded_windows(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch, num_targets, stride
):
    run = make_run(val_batch_size=5 * SEQ_LEN, num_layers=2)
    model = random_model(run.cfg)
    validation = validation_of(data, num_targets)
    found = nll_by_target(monkeypatch, run, model, validation, stride)
    expected = reference_nll(model, validation.ids, SEQ_LEN, stride)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_sliding_equals_plain_when_the_stride_is_the_length(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch
):
    run = make_run()
    model, validation = random_model(run.cfg), validation_of(data, 500)
    found = nll_by_target(monkeypatch, run, model, validation, SEQ_LEN)
    with torch.no_grad():
        expected = [
            F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="none")
            for first in range(0, 500, SEQ_LEN)
            for ids in [torch.from_numpy(validation.ids[first : first + SEQ_LEN + 1])]
        ]
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), **TOLERANCE)


def test_sliding_gives_a_target_more_context_than_plain(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch
):
    run = make_run()
    model, validation = random_model(run.cfg), validation_of(data, 200)
    plain = nll_by_target(monkeypatch, run, model, validation, SEQ_LEN)
    sliding = nll_by_target(monkeypatch, run, model, validation, 8)
    np.testing.assert_allclose(sliding[:SEQ_LEN], plain[:SEQ_LEN], **TOLERANCE)  # the same window
    assert (np.abs(sliding[SEQ_LEN:] - plain[SEQ_LEN:]) > 1e-3).mean() > 0.5


@pytest.mark.parametrize("num_targets", [1, 9, 31])
def test_padding_of_a_short_window_does_not_change_its_scores(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch, num_targets
):
    run = make_run()
    model, validation = random_model(run.cfg), validation_of(data, num_targets)
    found = nll_by_target(monkeypatch, run, model, validation, 8)
    ids = torch.from_numpy(validation.ids)
    with torch.no_grad():
        expected = F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="none")
    np.testing.assert_allclose(found, expected.numpy(), **TOLERANCE)


@pytest.mark.parametrize("stride", [8, SEQ_LEN])
def test_batch_size_of_the_evaluation_does_not_change_the_score(
    make_run: MakeRun, data: TinyData, stride
):
    validation = validation_of(data, 500)
    scores = []
    for rows in (1, 3, 16, 1000):
        run = make_run(val_batch_size=rows * SEQ_LEN, num_layers=2)
        scores.append(evaluate(run, random_model(run.cfg), validation, stride).nats)
    # Each nat differs by float32 rounding (1e-6) of either sign; the sum by less.
    assert scores == pytest.approx([scores[0]] * 4, rel=1e-6)


def test_the_batch_of_the_evaluation_fits_where_a_micro_batch_fits(make_run: MakeRun):
    windows = [Window(SEQ_LEN * i, SEQ_LEN * (i + 1), SEQ_LEN * i) for i in range(30)]
    for micro_rows, world_size, rows in ((2, 1, 8), (3, 1, 10), (1, 2, 4), (0, 1, 2)):
        cfg = make_run(
            val_batch_size=10 * SEQ_LEN, micro_batch_tokens=max(SEQ_LEN // 2, micro_rows * SEQ_LEN)
        ).cfg
        steps = EvalPlanner(cfg, 0, world_size).split_over_ranks(EvalStep("score"), windows)
        assert max(len(step.windows) for step in steps) == rows


def test_a_batch_smaller_than_one_window_still_scores_all(make_run: MakeRun, data: TinyData):
    run = make_run(val_batch_size=1)
    assert evaluate(run, random_model(run.cfg), validation_of(data, 100), 8).tokens == 100


@pytest.mark.parametrize("stride", [8, SEQ_LEN])
def test_scores_before_a_changed_token_stay(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch, stride
):
    run = make_run()
    model, validation = random_model(run.cfg), validation_of(data, 120)
    before = nll_by_target(monkeypatch, run, model, validation, stride)
    position = 70  # of the changed id; as a target it is number 69
    changed_ids = validation.ids.copy()
    changed_ids[position] = (changed_ids[position] + 7) % run.cfg.vocab_size
    changed = Validation(ids=changed_ids, target_bytes=validation.target_bytes, partial=False)
    after = nll_by_target(monkeypatch, run, model, changed, stride)
    np.testing.assert_array_equal(after[: position - 1], before[: position - 1])
    assert (after[position - 1 : position + 2] != before[position - 1 : position + 2]).all()


def test_isolated_documents_do_not_see_the_one_before(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(isolate_documents=True)
    model, validation = random_model(run.cfg), validation_of(data, 120)
    ids = np.where(validation.ids == train_gpt.BOS_ID, 50, validation.ids)
    ids[70] = train_gpt.BOS_ID
    other = ids.copy()
    other[60:70] = 51  # the end of the first document
    nll = [
        nll_by_target(
            monkeypatch, run, model, Validation(ids=i, target_bytes=ids, partial=False), 8
        )
        for i in (ids, other)
    ]
    assert not np.array_equal(nll[0][60:69], nll[1][60:69])
    np.testing.assert_array_equal(nll[0][70:], nll[1][70:])  # target 70 is read from the BOS on


def test_probabilities_of_all_targets_at_a_position_sum_to_one(make_run: MakeRun, data: TinyData):
    run = make_run()
    model, vocab_size = random_model(run.cfg), run.cfg.vocab_size
    ids_T = torch.from_numpy(data.val[:SEQ_LEN])
    targets_VT = torch.arange(vocab_size)[:, None].expand(-1, SEQ_LEN)
    nll_VT = model.eval_nll(ids_T.expand(vocab_size, -1), targets_VT)
    total_T = (-nll_VT.double()).exp().sum(dim=0)
    np.testing.assert_allclose(total_T.numpy(), 1, rtol=1e-5)  # 320 float32 terms


def test_first_leaves_out_positions_without_changing_the_others(make_run: MakeRun, data: TinyData):
    run = make_run()
    model = random_model(run.cfg)
    window_BT = torch.from_numpy(data.val[: 4 * (SEQ_LEN + 1)]).view(4, -1)
    whole = model.eval_nll(window_BT[:, :-1], window_BT[:, 1:])
    tail = model.eval_nll(window_BT[:, :-1], window_BT[:, 1:], 24)
    assert tail.shape == (4, 8)
    torch.testing.assert_close(tail, whole[:, 24:], **TOLERANCE)


def test_scores_do_not_depend_on_the_size_of_the_loss_chunks(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch
):
    run = make_run()
    model, validation = random_model(run.cfg), validation_of(data, 300)
    whole = evaluate(run, model, validation, 8).nats
    monkeypatch.setitem(train_gpt.MAX_LOGITS, "cpu", 7 * run.cfg.vocab_size)
    assert evaluate(run, model, validation, 8).nats == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("stride", [8, SEQ_LEN])
def test_uniform_model_scores_log2_of_the_vocabulary_times_tokens_over_bytes(
    make_run: MakeRun, data: TinyData, stride
):
    run = make_run()
    model = random_model(run.cfg)
    torch.nn.init.zeros_(model.tok_emb.weight)  # tied: all logits are 0
    validation = train_gpt.load_validation(run.cfg, data.tokenizer)
    summary = evaluate(run, model, validation, stride).summary()
    # Documents begin without a space, so that each counts exactly its UTF-8 length.
    num_bytes = sum(len(text.encode()) for text in data.val_documents)
    num_tokens = len(data.val) - 1
    assert summary["val_loss"] == pytest.approx(math.log(run.cfg.vocab_size), rel=1e-6)
    expected = math.log2(run.cfg.vocab_size) * num_tokens / num_bytes
    assert summary["val_bpb"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("length, train_length", [(64, 32), (16, 32)])
def test_evaluation_context_may_differ_from_the_training_context(
    make_run: MakeRun, data: TinyData, monkeypatch: pytest.MonkeyPatch, length, train_length
):
    run = make_run(train_seq_len=train_length, eval_seq_len=length)
    model = random_model(run.cfg)
    # Windows of the full length only: a rotary table is chosen by the length it serves.
    validation = validation_of(data, length + 8 * 8)
    for stride in (8, length):
        if stride == length:
            validation = validation_of(data, 2 * length)
        found = nll_by_target(monkeypatch, run, model, validation, stride)
        expected = reference_nll(model, validation.ids, length, stride)
        np.testing.assert_allclose(found, expected, **TOLERANCE)


def test_a_stop_signal_ends_the_evaluation(make_run: MakeRun, data: TinyData):
    run = make_run()
    run.signal_received = True
    with pytest.raises(train_gpt.Interrupted):
        evaluate(run, random_model(run.cfg), validation_of(data, 100), 8)


# --- VAL_TOKENS_LIMIT ----------------------------------------------------------------------------


def test_limit_takes_the_first_targets_and_marks_them_partial(make_run: MakeRun, data: TinyData):
    validation = train_gpt.load_validation(make_run(val_tokens_limit=100).cfg, data.tokenizer)
    assert validation.partial and validation.num_targets == 100
    np.testing.assert_array_equal(validation.ids, data.val[:101])
    whole = train_gpt.load_validation(make_run().cfg, data.tokenizer)
    assert not whole.partial and whole.num_targets == len(data.val) - 1
    np.testing.assert_array_equal(validation.target_bytes, whole.target_bytes[:100])


@pytest.mark.parametrize("beyond", [0, 1, 10_000])
def test_limit_of_all_targets_or_more_is_not_partial(make_run: MakeRun, data: TinyData, beyond):
    limit = len(data.val) - 1 + beyond
    validation = train_gpt.load_validation(make_run(val_tokens_limit=limit).cfg, data.tokenizer)
    assert not validation.partial and validation.num_targets == len(data.val) - 1


def test_limited_run_is_marked_partial_in_every_line_and_file(data: TinyData, tmp_path):
    cfg = tiny_config(
        data_path=str(data.folder), run_dir="run", iterations=4, val_loss_every=2,
        val_tokens_limit=200,
    )  # fmt: skip
    (tmp_path / "work").mkdir()
    result = run_script(environment(cfg), tmp_path / "work")
    assert result.status == 0, result.err
    scored = [(event, v) for event, v in log_events(result.out) if {"val_loss", "val_bpb"} & set(v)]
    names = {"val", "final_prequant", "final_quantized", "final_sliding"}
    assert {event for event, _ in scored} == names
    for event, values in scored:
        assert values["partial"] == "True", event
        assert event == "val" or values["legal"] == "False", event
    folder = tmp_path / "work" / "run"
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    partial = {r["event"]: r["partial"] for r in records if "val_loss" in r}
    assert partial == dict.fromkeys(names, True)
    assert submission(folder)["compliant"] is False
