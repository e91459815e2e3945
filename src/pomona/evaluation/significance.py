"""What seeds say: intervals and tests over repeated runs, and a correction for many comparisons."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from pomona.evaluation.intervals import Comparison, Interval

LEAST_SEEDS = 3
"""Fewer repeated runs give no interval: their spread is hardly known."""


def seed_interval(figures: Sequence[float], level: float = 0.95) -> Interval | None:
    """Return the mean of one figure per seed with Student's interval; None for fewer than three.

    Student, "The Probable Error of a Mean", Biometrika 1908.
    """
    if len(figures) < LEAST_SEEDS:
        return None
    mean = float(np.mean(figures))
    error = float(np.std(figures, ddof=1)) / np.sqrt(len(figures))
    reach = float(stats.t.ppf((1 + level) / 2, len(figures) - 1)) * float(error)
    return Interval(mean, mean - reach, mean + reach)


def seed_comparison(a: Sequence[float], b: Sequence[float]) -> Comparison | None:
    """Compare two methods by their figures of the same seeds: Student's paired test.

    None for fewer than three seeds.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    interval = seed_interval(differences)
    if interval is None:
        return None
    if interval.low == interval.high:  # every seed says the same
        return Comparison(interval, 1.0 if interval.mean == 0 else 0.0)
    return Comparison(interval, float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being many, in the order given.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics
    1979: the probability that any true null hypothesis is rejected stays below the level.
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = least
    return corrected
