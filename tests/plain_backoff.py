"""Back-off by its formula: one target at a time, with dictionaries instead of tensors."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from typing import Any

from train_gpt import BOS_ID, Backoff


class PlainBackoff:
    """What Backoff computes, for the text `ids` of which a growing part has been counted.

    Of a negative order, the n-grams of one document are counted.
    """

    def __init__(self, orders: list[int], ids: list[int]):
        self.orders, self.ids, self.num_updates = orders, ids, 1
        self.documents = [0, *itertools.accumulate(token == BOS_ID for token in ids)]
        self.followers = defaultdict[Any, list[tuple[int, int]]](list)  # places and tokens
        self.sums, self.new = (defaultdict[Any, tuple[float, float]](lambda: (0, 0)) for _ in "ab")

    def context(self, order: int, target: int) -> tuple[int, ...]:
        """The order, the tokens before token `target`, and their document if it matters."""
        first = target - abs(order)
        before = [0] * -min(0, first) + self.ids[max(0, first) : target]
        return order, self.documents[target] if order < 0 else -1, *before

    def count(self, target: int) -> None:
        for order in self.orders:
            self.followers[self.context(order, target)].append((target, self.ids[target]))

    def weight(self, kind: Any) -> float:
        (order, is_repeated, age, share), gate = kind
        logit = 0.65 * gate + 1.32 * math.log(abs(order) or 1) + 1.76 * (order < 0)
        logit += 1.27 * is_repeated - 0.18 * age + 0.47 * share - 7.23
        posterior, number = self.sums[kind]
        return (posterior + 10 / (1 + math.exp(-logit))) / (number + 10)

    def mix(self, p: float, target: int, now: int, before: float) -> float:
        """Probability of token `target` from the model's, and posteriors by class for `update`."""
        near = [max(0.0, 1 - abs(min(before / 3, 2) - gate)) for gate in range(3)]
        for order in self.orders:
            if not (followers := self.followers[self.context(order, target)]):
                continue
            counts, (last_place, last) = Counter(token for _, token in followers), followers[-1]
            share, age = max(counts.values()) / counts.total(), now - last_place
            kind = (
                order,
                counts.total() > 1,
                sum(age > bound for bound in Backoff.AGES),
                sum(share > bound for bound in (0.25, 0.5, 0.75, 0.95)),
            )
            token = self.ids[target]
            q = (counts[token] + (last == token)) / (counts.total() + 1)
            w = [self.weight((kind, gate)) for gate in range(3)]
            mean_w = sum(x * y for x, y in zip(w, near, strict=True))
            mixed = (1 - mean_w) * p + mean_w * q
            for gate in range(3):
                from_ngram = near[gate] * w[gate] * q / mixed
                from_model = near[gate] * (1 - w[gate]) * p / mixed
                posterior, number = self.new[kind, gate]
                number += from_ngram + from_model
                self.new[kind, gate] = (posterior + from_ngram, number)
            p = mixed
        return p

    def update(self) -> None:
        self.num_updates += 1
        decay = (1 - 1 / self.num_updates) ** 4
        for kind in {*self.sums, *self.new}:
            old, new = self.sums[kind], self.new[kind]
            self.sums[kind] = (decay * old[0] + new[0], decay * old[1] + new[1])
        self.new.clear()
