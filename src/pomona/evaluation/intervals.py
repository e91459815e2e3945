"""Bootstrap intervals over test rows, clients kept apart.

Efron & Tibshirani, "An Introduction to the Bootstrap", 1993. A figure is the mean over clients of a
ratio Σ numerator / Σ denominator (nats per token; or a plain mean, with denominators of one). Rows are
drawn with replacement inside each client, so that no client's weight changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**22
"""Rows that are drawn at a time: what is asked of thousands of rows need not be in memory whole."""

Ratio = tuple[NDArray[np.float64], NDArray[np.float64]]
Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The difference a − b of two methods on the same rows and its two-sided p-value."""

    difference: Interval
    p_value: float


def ratio_bootstrap(
    clients: Sequence[Ratio],
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
    transform: Transform | None = None,
) -> Interval:
    """Return the mean over clients of Σ numerator / Σ denominator with its percentile interval.

    `transform` is applied to every client's ratio: the exponential makes losses perplexities.
    """
    drawn = _draws(clients, seed, draws, transform)
    return _interval(_figure(clients, transform), drawn, level)


def paired_bootstrap(
    a: Sequence[Ratio],
    b: Sequence[Ratio],
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
    transform: Transform | None = None,
) -> Comparison:
    """Compare two methods measured on the same rows: every draw takes the same rows of both."""
    drawn = _draws(a, seed, draws, transform) - _draws(b, seed, draws, transform)
    tail = min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0)))
    difference = _interval(_figure(a, transform) - _figure(b, transform), drawn, level)
    return Comparison(difference, min(1.0, max(2 * tail, 1 / draws)))


def _figure(clients: Sequence[Ratio], transform: Transform | None) -> float:
    ratios = np.array([top.sum() / bottom.sum() for top, bottom in clients])
    return float(np.mean(ratios if transform is None else transform(ratios)))


def _draws(
    clients: Sequence[Ratio], seed: int, draws: int, transform: Transform | None
) -> NDArray[np.float64]:
    """Return the figure of every resample [draws]; equal seeds draw equal rows."""
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    for top, bottom in clients:
        for start in range(0, draws, block := max(1, _AT_ONCE // len(top))):
            some = slice(start, min(start + block, draws))
            chosen = generator.integers(len(top), size=(some.stop - start, len(top)))
            ratio = top[chosen].sum(1) / bottom[chosen].sum(1)
            total[some] += ratio if transform is None else transform(ratio)
    return total / len(clients)


def _interval(mean: float, drawn: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))
