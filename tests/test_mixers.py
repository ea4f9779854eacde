"""Mixers: distributions over the vocabulary, from scored text alone, by counts that are right."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import MakeRun
from tests.plain_backoff import PlainBackoff
from train_gpt import BOS_ID, Backoff, Config, Hedge, Mixer, NgramCounts, Run

V, NUM_TOKENS = 12, 700
HEDGE = {"mixer": "hedge", "hedge_min_tokens": 50}
ENTROPY = {"mixer": "hedge_entropy", "hedge_min_tokens": 50, "allow_noncompliant": True}
BACKOFF = {"mixer": "backoff", "mixer_orders": "0-3,5"}
TILT = {"ngram_tilt": 2.625, "ngram_tilt_orders": "2,4", "ngram_tilt_min_frac": 0.6}
COLD = {"adaptive_temperature": 0.9}
METHODS: dict[str, dict[str, Any]] = {
    "hedge": HEDGE, "backoff": BACKOFF, "tilt": TILT, "temperature": COLD,
    "hedge+tilt": {**HEDGE, **TILT}, "hedge+temperature": {**HEDGE, **COLD},
    "backoff+tilt": {**BACKOFF, **TILT}, "backoff+temperature": {**BACKOFF, **COLD},
    "tilt+temperature": {**TILT, **COLD}, "all": {**BACKOFF, **TILT, **COLD},
}  # fmt: skip
LEARNING = [name for name in METHODS if name != "temperature"]
methods = pytest.mark.parametrize("method", METHODS)


class Text(NamedTuple):
    """Token ids that often repeat themselves, and logits of a model that half knows them."""

    ids: Tensor
    logits_NV: Tensor  # row i predicts ids[i + 1]

    def context(self, width: int) -> Tensor:
        """The number of each token's document, then the last tokens up to it."""
        padded = torch.cat([torch.zeros(width - 2, dtype=torch.int64), self.ids])
        document = V + (self.ids == BOS_ID).cumsum(0)
        return torch.cat([document[:, None], padded.unfold(0, width - 1, 1)], 1)


def make_text(num_tokens: int = NUM_TOKENS, seed: int = 0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    phrases = [torch.randint(V, (7,), generator=generator) for _ in range(6)]
    order = torch.randint(6, (num_tokens // 7 + 1,), generator=generator).tolist()
    ids = torch.cat([phrases[i] for i in order])[:num_tokens]
    noise = torch.rand(num_tokens, generator=generator) < 0.1
    ids = torch.where(noise, torch.randint(V, (num_tokens,), generator=generator), ids)
    logits = 2 * torch.randn(num_tokens - 1, V, generator=generator)
    return Text(ids, logits.scatter_add(1, ids[1:, None], torch.ones(num_tokens - 1, 1)))


def make_mixer(make_run: MakeRun, **knobs: Any) -> Mixer:
    run = make_run(**{"vocab_size": V, "ngram_table_bits": 16, **knobs})
    return Mixer(run)


def score(
    mixer: Mixer,
    text: Text,
    span: range,
    logits_NV: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """Nats of targets span.start + 1 ... span.stop."""
    rows = slice(span.start, span.stop)
    logits = text.logits_NV if logits_NV is None else logits_NV
    text = text if ids is None else text._replace(ids=ids)
    context = text.context(mixer.num_context)[rows]
    return mixer.nll(logits[rows], context, text.ids[span.start + 1 : span.stop + 1])


def stream(mixer: Mixer, text: Text, stop: int, chunk: int = 50) -> Tensor:
    """Score, then learn, chunk by chunk up to target `stop`."""
    mixer.update(text.ids[:1])
    nll = []
    for start in range(0, stop, chunk):
        span = range(start, min(start + chunk, stop))
        nll.append(score(mixer, text, span))
        mixer.update(text.ids[span.start + 1 : span.stop + 1])
    return torch.cat(nll)


# --- Distributions -------------------------------------------------------------------------------


@methods
def test_probabilities_sum_to_one_and_nats_are_those_of_the_target(make_run: MakeRun, method):
    text, mixer = make_text(), make_mixer(make_run, **METHODS[method])
    for stop in (0, 300, 600):
        if stop:
            stream(mixer := make_mixer(make_run, **METHODS[method]), text, stop)
        context = text.context(mixer.num_context)[stop : stop + 90]
        logits, target = text.logits_NV[stop : stop + 90], text.ids[stop + 1 : stop + 91]
        logp_NV = mixer.log_probs(logits, context)
        assert (logp_NV.exp().sum(1) - 1).abs().max() < 1e-5
        nll = mixer.nll(logits, context, target)
        assert nll.dtype == torch.float32
        torch.testing.assert_close(
            nll.double(), -logp_NV.gather(1, target[:, None])[:, 0], rtol=0, atol=1e-6
        )


@methods
def test_every_method_changes_the_model_s_distribution(make_run: MakeRun, method):
    # Otherwise the other tests would prove nothing.
    text, mixer = make_text(), make_mixer(make_run, **METHODS[method])
    nll = stream(mixer, text, 600)
    plain = -text.logits_NV.log_softmax(1).gather(1, text.ids[1:, None])[:600, 0]
    assert (nll - plain).abs().max() > 0.01
    if method in ("backoff", "backoff+tilt", "all"):
        assert nll[300:].mean() < plain[300:].mean() - 0.5


def test_without_methods_the_mixer_is_log_softmax(make_run: MakeRun):
    text, mixer = make_text(), make_mixer(make_run)
    assert not mixer.cfg.needs_mixer
    plain = -text.logits_NV.log_softmax(1).gather(1, text.ids[1:, None])[:600, 0]
    torch.testing.assert_close(stream(mixer, text, 600), plain)


@pytest.mark.parametrize("method", METHODS.values())
def test_a_config_says_whether_it_needs_a_mixer(method):
    assert Config(**method).needs_mixer


def test_the_entropy_expert_is_no_distribution(make_run: MakeRun):
    text, mixer = make_text(), make_mixer(make_run, **ENTROPY)
    stream(mixer, text, 300)
    context = text.context(mixer.num_context)[300:400]
    total_N = mixer.log_probs(text.logits_NV[300:400], context).exp().sum(1)
    # Sum over V of w * exp(-H) is w * V * exp(-H), and H is below log V.
    logp = text.logits_NV[300:400].log_softmax(1)
    entropy_N = -(logp.exp() * logp).sum(1)
    assert isinstance(mixer.weights, Hedge)
    share = mixer.weights.log_weight_E.softmax(0)[1]
    torch.testing.assert_close(
        total_N, (1 - share + share * V * (-entropy_N).exp()).double(), rtol=1e-5, atol=1e-5
    )
    assert total_N.min() > 1.01


def test_the_entropy_expert_is_refused_unless_asked_for():
    with pytest.raises(ValueError, match="it needs ALLOW_NONCOMPLIANT=1"):
        Config(mixer="hedge_entropy")
    assert Config(mixer="hedge_entropy", allow_noncompliant=True).needs_mixer


@pytest.mark.parametrize("orders", ["2,1", "1,1", "64", "x", "-1"])
@pytest.mark.parametrize("knob", ["mixer_orders", "ngram_tilt_orders"])
def test_orders_must_be_a_rising_list(knob, orders):
    with pytest.raises(ValueError, match=f"{knob.upper()}='{orders}' must list increasing lengths"):
        Config(**{knob: orders})


# --- Score before update -------------------------------------------------------------------------


@methods
def test_scoring_changes_nothing_that_a_score_reads(make_run: MakeRun, method):
    text, mixer = make_text(), make_mixer(make_run, **METHODS[method])
    stream(mixer, text, 400)
    first = score(mixer, text, range(400, 500))
    score(mixer, text, range(500, 600))
    assert torch.equal(first, score(mixer, text, range(400, 500)))


@pytest.mark.parametrize("method", LEARNING)
def test_an_update_changes_later_scores(make_run: MakeRun, method):
    text, mixer = make_text(), make_mixer(make_run, **METHODS[method])
    stream(mixer, text, 300)
    before = score(mixer, text, range(500, 600))
    mixer.update(text.ids[301:501])
    assert not torch.equal(before, score(mixer, text, range(500, 600)))


@methods
def test_scores_before_a_changed_token_are_the_same_bits(make_run: MakeRun, method):
    text = make_text()
    for changed in (333, 350, 351):
        ids, logits = text.ids.clone(), text.logits_NV.clone()
        ids[changed:] = (ids[changed:] + 5) % V
        logits[changed:] += torch.randn_like(logits[changed:])
        mixers = [make_mixer(make_run, **METHODS[method]) for _ in range(2)]
        before, after = stream(mixers[0], text, 400), stream(mixers[1], Text(ids, logits), 400)
        assert torch.equal(before[: changed - 1], after[: changed - 1])
        assert not torch.equal(before[changed - 1 :], after[changed - 1 :])


# --- Counts --------------------------------------------------------------------------------------


def reference_counts(ids: list[int], order: int) -> dict[tuple[int, ...], Counter[int]]:
    """Continuations of each context, by a loop; zeros stand before the text."""
    padded, counts = [0] * order + ids, dict[tuple[int, ...], Counter[int]]()
    for i, token in enumerate(ids):
        counts.setdefault(tuple(padded[i : i + order]), Counter())[token] += 1
    return counts


def check_counts(counts: NgramCounts, ids: list[int], text: Text) -> None:
    seen_6NO = counts.look_up(context_NK := text.context(len(counts.history_K) + 1))
    _, total_NO, top_NO, token_NO, last_NO, age_NO = seen_6NO
    every = torch.arange(V).expand(len(context_NK), -1)
    count_NCO, is_last_NCO = counts.count(seen_6NO, every)
    plain = PlainBackoff([*counts.orders], max(ids, text.ids.tolist(), key=len))
    for place in range(len(ids)):
        plain.count(place)
    for row, column in itertools.product(range(len(context_NK)), range(len(counts.orders))):
        followers = plain.followers[plain.context(counts.orders[column], row + 1)]
        expected = Counter(token for _, token in followers)
        assert count_NCO[row, :, column].tolist() == [expected[token] for token in range(V)]
        assert total_NO[row, column] == expected.total()
        if expected:  # of the most frequent ones, the largest token
            top, token = max((count, token) for token, count in expected.items())
            assert (int(top_NO[row, column]), int(token_NO[row, column])) == (top, token)
            place, last = followers[-1]
            assert (int(age_NO[row, column]), int(last_NO[row, column])) == (len(ids) - place, last)
            assert is_last_NCO[row, :, column].nonzero().tolist() == [[last]]


def some_counts(bits: int = 16, orders: tuple[int, ...] = (-3, -1, 0, 1, 2, 5)) -> NgramCounts:
    return NgramCounts(orders, V, bits, torch.device("cpu"))


def test_a_small_table_of_many_orders_is_filled_token_by_token():
    counts = some_counts(bits=10, orders=tuple(range(67)))
    counts.update(torch.arange(3, 9))
    assert counts.history_K[-6:].tolist() == [*range(3, 9)]


def test_counts_are_those_of_a_loop():
    text, counts = make_text(), some_counts()
    counts.update(text.ids[:500])
    check_counts(counts, text.ids[:500].tolist(), text)


@pytest.mark.parametrize("cuts", [(1,), (499,), (1, 2, 3), (100, 250, 251)])
def test_counts_do_not_depend_on_how_the_text_is_cut(cuts):
    text, counts = make_text(), some_counts()
    for start, stop in zip((0, *cuts), (*cuts, 500), strict=True):
        counts.update(text.ids[start:stop])
    check_counts(counts, text.ids[:500].tolist(), text)
    assert counts.num_tokens == 500


def test_an_update_longer_than_the_table_has_room_for_is_split():
    text, counts = make_text(), some_counts(bits=16)
    counts.update(text.ids.repeat(8))  # 44,800 keys, most of them equal
    check_counts(counts, text.ids.repeat(8).tolist(), text)


def test_a_table_that_fills_up_begins_anew(make_run: MakeRun):
    text, counts, starts = make_text(3000), some_counts(bits=10), [0]
    for start in range(0, 3000, 20):
        before = int(counts.keys.count_nonzero())
        counts.update(text.ids[start : start + 20])
        starts += [start] if int(counts.keys.count_nonzero()) < before else []
        assert int(counts.keys.count_nonzero()) <= 512
    assert len(starts) > 1
    seen_6NO = counts.look_up(text.context(6))
    total = counts.count(seen_6NO, torch.arange(V).expand(3000, -1))[0].sum(1)
    assert torch.equal(total, seen_6NO[1])
    assert int(seen_6NO[1, 0, counts.orders.index(0)]) == 3000 - starts[-1]
    mixer = make_mixer(make_run, **METHODS["all"], ngram_table_bits=10)
    stream(mixer, text, 2900, chunk=20)
    logp = mixer.log_probs(text.logits_NV[2900:], text.context(mixer.num_context)[2900:2999])
    assert (logp.exp().sum(1) - 1).abs().max() < 1e-5


def test_keys_that_share_a_slot_are_told_apart():
    counts = some_counts()
    slots = counts.mask + 1
    keys = torch.tensor([5, 5 + slots, 5 + 2 * slots, 6, 5 + slots])
    rows = counts.find(keys, claim=True)
    assert len(set(rows.tolist())) == 4
    assert rows[1] == rows[4]
    assert torch.equal(counts.find(keys), rows)
    assert counts.keys[counts.find(torch.tensor([5 + 3 * slots]))] == 0


class WaitCounter(TorchDispatchMode):
    """Counts the operations for which a GPU would be waited for: indexing by booleans."""

    num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            self.num_waits += any(i is not None and i.dtype == torch.bool for i in args[1])
        self.num_waits += func in (torch.ops.aten.nonzero.default, torch.ops.aten.item.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_keys", [1, 2, 30, 200])
@pytest.mark.parametrize("claim", [True, False])
def test_a_search_waits_for_a_gpu_once_per_doubling_of_the_probes(num_keys: int, claim: bool):
    counts = some_counts()
    keys = 5 + (counts.mask + 1) * torch.arange(num_keys)  # all belong in the same row
    if not claim:
        counts.find(keys, claim=True)
    with WaitCounter() as counter:
        rows = counts.find(keys, claim=claim)
    assert sorted(rows.tolist()) == [*range(5, 5 + num_keys)]
    assert counter.num_waits == num_keys.bit_length()


# --- Methods against plain loops -----------------------------------------------------------------


def plain_probabilities(text: Text) -> Tensor:
    return text.logits_NV.double().softmax(1)


def test_hedge_is_the_published_mixture(make_run: MakeRun):
    text, mixer = make_text(), make_mixer(make_run, **HEDGE, hedge_eta=0.7)
    chunk, p_NV = 100, plain_probabilities(text)
    nll = stream(mixer, text, 400, chunk)
    log_weights = [2.0, 0.0, 0.0, 0.0]
    for start in range(0, 400, chunk):
        scored, losses = text.ids[: start + 1].tolist(), [0.0] * 4
        by_order = [reference_counts(scored, order) for order in range(3)]
        weights = torch.tensor(log_weights, dtype=torch.float64).softmax(0)
        for i in range(start, start + chunk):
            target, experts = int(text.ids[i + 1]), [float(p_NV[i, text.ids[i + 1]])]
            for order, delta in ((0, 0.1), (1, 0.1), (2, 0.01)):
                context = tuple(([0, 0] + text.ids[: i + 1].tolist())[-order:] if order else ())
                counts = by_order[order].get(context, Counter())
                experts.append((counts[target] + delta) / (counts.total() + delta * V))
            mixed = float(weights @ torch.tensor(experts, dtype=torch.float64))
            expected = -math.log(mixed if start + 1 >= 50 else experts[0])
            assert float(nll[i]) == pytest.approx(expected, abs=1e-5)
            losses = [total - math.log(p) for total, p in zip(losses, experts, strict=True)]
        log_weights = [w - 0.7 * x / chunk for w, x in zip(log_weights, losses, strict=True)]
    assert isinstance(mixer.weights, Hedge)
    learned = mixer.weights.log_weight_E
    torch.testing.assert_close(learned, torch.tensor(log_weights), rtol=0, atol=1e-5)


def test_backoff_is_a_chain_of_two_way_mixtures(make_run: MakeRun, monkeypatch):
    monkeypatch.setattr(Backoff, "AGES", (20, 60))
    text, mixer, chunk = make_text(), make_mixer(make_run, **BACKOFF), 100
    nll, p_NV = stream(mixer, text, 500, chunk), plain_probabilities(text)
    plain = PlainBackoff([-3, -2, -1, 0, 1, 2, 3, 5], text.ids.tolist())
    for i in range(500):
        if i % chunk == 0:  # tables and weights are those of the last update
            for place in range(max(0, i - chunk + 1), i + 1):
                plain.count(place)
            plain.update()
            counted = i + 1
        p = plain.mix(float(p_NV[i, text.ids[i + 1]]), i + 1, counted, 0.0)
        assert float(nll[i]) == pytest.approx(-math.log(p), abs=1e-5)
    assert len(plain.sums) > 60


@pytest.mark.parametrize("share, min_count", [(0.6, 1), (0.8, 3), (1.0, 2)])
def test_tilt_boosts_the_longest_sure_context_with_its_exact_normaliser(
    make_run: MakeRun, share, min_count
):
    knobs = {**TILT, "ngram_tilt_min_frac": share, "ngram_tilt_min_count": min_count}
    text, mixer = make_text(), make_mixer(make_run, **knobs)
    stream(mixer, text, 500)
    span = slice(500, 600)
    logp_NV = mixer.log_probs(text.logits_NV[span], text.context(mixer.num_context)[span])
    by_order = {n: reference_counts(text.ids[:501].tolist(), n) for n in (2, 4)}
    fired = 0
    for i in range(500, 600):
        p_V, hint = plain_probabilities(text)[i].clone(), None
        for order, contexts in by_order.items():
            counts = contexts.get(tuple(text.ids[i + 1 - order : i + 1].tolist()), Counter())
            if counts and counts.total() >= min_count:
                top, token = max((count, token) for token, count in counts.items())
                hint = token if top >= share * counts.total() - 1e-9 else hint
        if hint is not None:
            fired += 1
            p_V[hint] *= math.exp(2.625)
        torch.testing.assert_close(logp_NV[i - 500], (p_V / p_V.sum()).log(), atol=1e-5, rtol=0)
    assert 10 < fired < 100


def test_temperature_is_a_function_of_the_entropy(make_run: MakeRun):
    text, mixer = make_text(), make_mixer(make_run, adaptive_temperature=0.98)
    logits = text.logits_NV[:50].double()
    p_NV = logits.softmax(1)
    entropy_N1 = -(p_NV * p_NV.log()).sum(1, keepdim=True)
    temperature_N1 = (1 - (1 - 0.98) * (1 - entropy_N1 / math.log(V))).clamp(0.9, 1.05)
    logp_NV = mixer.log_probs(text.logits_NV[:50], text.context(mixer.num_context)[:50])
    torch.testing.assert_close(logp_NV, (logits / temperature_N1).log_softmax(1), rtol=0, atol=2e-6)


# --- Ranks ---------------------------------------------------------------------------------------


class Ranks:
    """Sums over mixers of several ranks that take their turns within this process."""

    def __init__(self, make_run: MakeRun, knobs: dict[str, Any], world_size: int):
        self.mixers = [make_mixer(make_run, **knobs) for _ in range(world_size)]
        for mixer in self.mixers:
            mixer.run.all_reduce_sum = self.all_reduce_sum  # type: ignore[method-assign]
        self.total = torch.zeros(0)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return self.total

    def update(self, ids: Tensor) -> None:
        weights = [mixer.weights for mixer in self.mixers if mixer.weights is not None]
        self.total = sum((w.statistics for w in weights), torch.zeros(1, dtype=torch.int64))
        for mixer in self.mixers:
            mixer.update(ids)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_score_what_one_does_to_the_bit(make_run: MakeRun, method):
    text, ranks = make_text(), Ranks(make_run, METHODS[method], 2)
    ranks.update(text.ids[:1])
    nll = []
    for start in range(0, 400, 50):
        nll += [
            score(mixer, text, range(start + 25 * rank, start + 25 * rank + 25))
            for rank, mixer in enumerate(ranks.mixers)
        ]
        ranks.update(text.ids[start + 1 : start + 51])
    one = stream(make_mixer(make_run, **METHODS[method]), text, 400)
    assert torch.equal(torch.cat(nll), one)


def test_a_rank_that_scored_nothing_learns_the_same(make_run: MakeRun):
    text, ranks = make_text(), Ranks(make_run, METHODS["hedge"], 2)
    ranks.update(text.ids[:1])
    score(ranks.mixers[0], text, range(0, 100))
    ranks.update(text.ids[1:101])
    first, second = (score(mixer, text, range(100, 200)) for mixer in ranks.mixers)
    assert torch.equal(first, second)


def test_update_sums_over_ranks_as_often_on_each(make_run: MakeRun):
    calls = []

    def sum_(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor

    text, mixer = make_text(), make_mixer(make_run, **HEDGE)
    run: Run = mixer.run
    run.all_reduce_sum = sum_  # type: ignore[method-assign]
    stream(mixer, text, 100, chunk=10)
    mixer.update(text.ids[101:111])  # nothing was scored since
    assert len(calls) == 12
