"""Clients of one mixture: of equal sizes, or of sizes that differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.federation.partition.dealing import (
    Dealt,
    capped,
    check_sizes,
    client_names,
    cut,
)
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class IID:
    """Equal shares of the shuffled rows.

    Attributes:
        clients: How many.
        rows: At most so many train rows of a client; 0: all.
    """

    clients: int = 4
    rows: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.clients, self.rows)

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return the shares; sizes differ by at most one row."""
        own, held_out = (
            _evenly(rows, self.clients, seed, split)
            for split, rows in (("train", train), ("test", test))
        )
        return capped(own, self.rows, seed), held_out


@dataclass(frozen=True)
class SizeSkew:
    """Clients of one mixture and very different sizes.

    Test rows are dealt evenly: the skew is in what a client learns from, not in how exactly it is measured.

    Attributes:
        clients: How many.
        law: "log-normal": sizes in proportion to exp(`spread`·z) with standard normal z. "power": the k-th
            client's in proportion to k^-`spread` (Zipf), the same for every seed.
        spread: How much sizes differ.
        minimum: Train rows that every client has at least.
        rows: At most so many train rows of a client; 0: all.
    """

    clients: int = 10
    law: Literal["log-normal", "power"] = "log-normal"
    spread: float = 1.0
    minimum: int = 1
    rows: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.clients, self.rows)
        if not self.spread >= 0:
            raise PomonaError(f"size-skew spread {self.spread} is negative; use 0 for equal sizes")
        if self.minimum < 1 or 0 < self.rows < self.minimum:
            raise PomonaError(
                f"size-skew minimum {self.minimum} is not between 1 and the rows of a client "
                f"({self.rows or 'no limit'}); change one of them"
            )

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return the shares; raises `PomonaError` when the minimum takes more rows than there are."""
        if self.clients * self.minimum > len(train):
            raise PomonaError(
                f"{self.clients} clients of at least {self.minimum} rows need more than the "
                f"{len(train)} train rows there are; lower minimum or clients"
            )
        sizes_C = self.minimum + apportion(
            self._weights(seed), len(train) - self.clients * self.minimum
        )
        own = cut({"": train}, sizes_C[:, None], "size-skew", seed, "train")
        return capped(own, self.rows, seed), _evenly(test, self.clients, seed, "test")

    def _weights(self, seed: int) -> Float[ndarray, " C"]:
        if self.law == "power":
            return np.arange(1, self.clients + 1) ** -self.spread
        z_C = numpy_generator(seed, "size-skew").standard_normal(self.clients)
        return np.exp(self.spread * z_C)


def apportion(weights: Float[ndarray, " N"], total: int) -> Int[ndarray, " N"]:
    """Return whole numbers in proportion to the weights that add up to `total` (largest remainder)."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    rest = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def _evenly(rows: Sequence[Row], clients: int, seed: int, split: str) -> Dealt:
    order = numpy_generator(seed, "iid", split).permutation(len(rows))
    return {
        name: [rows[i] for i in order[k::clients]] for k, name in enumerate(client_names(clients))
    }
