"""Clients whose mixtures of categories are drawn from a Dirichlet distribution, in two ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.federation.partition.dealing import (
    Counts,
    Dealt,
    by_category,
    capped,
    check_sizes,
    cut,
)
from pomona.federation.partition.iid import apportion
from pomona.seeds import numpy_generator

_DRAWS = 1000


@dataclass(frozen=True)
class Dirichlet:
    """Every category is dealt to the clients in proportions drawn from Dirichlet(alpha).

    Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022, after Yurochkin et al., ICML
    2019: mixtures and sizes differ. Train and test rows follow the same proportions, so a client is
    tested on the mixture it trains on.

    Proportions that leave some client fewer than `minimum` train rows or without a test row are
    drawn again, as is common: a draw that is kept is one of the distribution, while rows moved
    from one client to another would be of none.

    Attributes:
        clients: How many.
        alpha: Small: one category per client; large: all alike.
        minimum: Train rows that every client has at least.
        rows: At most so many train rows of a client, cut afterwards; 0: all.
    """

    clients: int = 10
    alpha: float = 0.5
    minimum: int = 1
    rows: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.clients, self.rows)
        _check_alpha(self.alpha)
        if self.minimum < 0 or 0 < self.rows < self.minimum:
            raise PomonaError(
                f"Dirichlet minimum {self.minimum} is not between 0 and the rows of a client "
                f"({self.rows or 'no limit'}); change one of them"
            )

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return the shares; raises `PomonaError` when no draw gives everybody the minimum."""
        own, held_out = by_category(train), by_category(test)
        counts_CK, held_out_CK = self._counts(own, held_out, seed)
        dealt = cut(own, counts_CK, "dirichlet", seed, "train")
        return capped(dealt, self.rows, seed), cut(held_out, held_out_CK, "dirichlet", seed, "test")

    def _counts(
        self, own: Mapping[str, Sequence[Row]], held_out: Mapping[str, Sequence[Row]], seed: int
    ) -> tuple[Counts, Int[ndarray, "C J"]]:
        for draw in range(_DRAWS):
            counts_CK = self._draw(own, seed, draw)
            held_out_CK = self._draw(held_out, seed, draw)
            least = counts_CK.sum(1).min()
            tested = not held_out or held_out_CK.sum(1).min() > 0
            if self.minimum == 0 or (least >= self.minimum and tested):
                return counts_CK, held_out_CK
        raise PomonaError(
            f"none of {_DRAWS} draws of Dirichlet({self.alpha}) gave each of {self.clients} clients "
            f"{self.minimum} train rows and a test row; use fewer clients, a larger alpha, a lower "
            "minimum or one central test set"
        )

    def _draw(self, held: Mapping[str, Sequence[Row]], seed: int, draw: int) -> Counts:
        """A category's proportions depend on its name, not on which others there are."""
        counts_CK = np.zeros((self.clients, len(held)), dtype=np.int64)
        for k, (category, rows) in enumerate(held.items()):
            key = (seed, "dirichlet", category, *([draw] if draw else []))
            share_C = numpy_generator(*key).dirichlet([self.alpha] * self.clients)
            ends_C = (share_C.cumsum() * len(rows)).round().astype(np.int64)
            counts_CK[:, k] = np.diff(ends_C, prepend=0)
        return counts_CK


@dataclass(frozen=True)
class EvenDirichlet:
    """Every client draws its own mixture of categories; all have the same number of rows.

    After Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019: client by client, without replacement, and the chances of a category
    that has run out go to the others. The mixtures' mean is the mixture of all rows, and their
    concentration `alpha` per category on average.

    Attributes:
        clients: How many.
        alpha: Concentration per category, on average; small: one category per client.
        rows: Train rows of every client; 0: all rows are dealt.
    """

    clients: int = 10
    alpha: float = 0.5
    rows: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.clients, self.rows)
        _check_alpha(self.alpha)

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return the shares; raises `PomonaError` when there are too few rows."""
        if self.clients * self.rows > len(train):
            raise PomonaError(
                f"{self.clients} clients of {self.rows} rows need more than the {len(train)} train "
                "rows there are; lower rows or clients"
            )
        own, held_out = by_category(train), by_category(test)
        both = by_category([*train, *test])
        prior_K = np.array([len(rows) for rows in both.values()], dtype=float)
        concentration_K = self.alpha * len(prior_K) * prior_K / prior_K.sum()
        mixture_CK = np.stack(
            [
                numpy_generator(seed, "dirichlet-even", client).dirichlet(concentration_K)
                for client in range(self.clients)
            ]
        )

        def dealt(rows: Mapping[str, Sequence[Row]], each: int, split: str) -> Dealt:
            supply_K = np.array([len(rows.get(category, ())) for category in both])
            sizes = [
                each or len(range(c, supply_K.sum(), self.clients)) for c in range(self.clients)
            ]
            counts_CK = _filled(mixture_CK, supply_K, sizes)
            every = {category: rows.get(category, ()) for category in both}
            return cut(every, counts_CK, "dirichlet-even", seed, split)

        return dealt(own, self.rows, "train"), dealt(held_out, 0, "test")


def _filled(
    mixture_CK: Float[ndarray, "C K"], supply_K: Int[ndarray, " K"], sizes: Sequence[int]
) -> Counts:
    """Give each client in turn its number of rows, by its mixture of what is left."""
    counts_CK = np.zeros(mixture_CK.shape, dtype=np.int64)
    left_K = supply_K.copy()
    for client, size in enumerate(sizes):
        while (wanted := size - int(counts_CK[client].sum())) > 0:
            chance_K = np.where(left_K > 0, mixture_CK[client], 0.0)
            if not chance_K.sum() > 0:  # all that it wants has run out
                chance_K = left_K.astype(float)
            taken_K = np.minimum(apportion(chance_K, wanted), left_K)
            counts_CK[client] += taken_K
            left_K = left_K - taken_K
    return counts_CK


def _check_alpha(alpha: float) -> None:
    if not alpha > 0:
        raise PomonaError(f"Dirichlet alpha {alpha} is not positive; use for example 0.5")
