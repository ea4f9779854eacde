"""Mean, standard deviation and one-sided t tests of scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (0 for one value), rounded to 8 digits."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 8), round(std, 8)


def welch_p(scores: Sequence[float], previous: Sequence[float]) -> float | None:
    """Return the p-value of Welch's one-sided test that `scores` are lower than `previous`.

    None if the test is undefined: fewer than two scores on a side, or no variance at all.
    """
    if min(len(scores), len(previous)) < 2:
        return None
    summaries = [(statistics.fmean(x), statistics.stdev(x), len(x)) for x in (previous, scores)]
    if not any(std for _, std, _ in summaries):
        return None
    (mean, std, num), (own_mean, own_std, own_num) = summaries
    test = stats.ttest_ind_from_stats(
        mean, std, num, own_mean, own_std, own_num, equal_var=False, alternative="greater"
    )
    return float(test.pvalue)


def paired_p(gains: Sequence[float]) -> float | None:
    """Return the p-value of the one-sided t test that the mean of `gains` is above 0.

    None if the test is undefined: fewer than two gains, or no variance.
    """
    if len(gains) < 2 or not (std := statistics.stdev(gains)):
        return None
    t = statistics.fmean(gains) / (std / math.sqrt(len(gains)))
    return float(stats.t.sf(t, df=len(gains) - 1))
