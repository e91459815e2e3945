"""Who holds which rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.seeds import numpy_generator


@runtime_checkable
class Partition(Protocol):
    """Deals rows to clients; train and test rows are dealt by the same rule."""

    def __call__(self, rows: Sequence[Row], seed: int, split: str) -> dict[str, list[Row]]:
        """Return each client's rows; `split` ("train", "test") keeps the draws apart."""
        ...


@dataclass(frozen=True)
class ByCategory:
    """One category per client, the client named after it.

    `categories` chooses and orders the clients; empty means every category of the rows. `rows` keeps
    so many of each client's rows, drawn at random (0 keeps all).
    """

    categories: tuple[str, ...] = ()
    rows: int = 0

    def __call__(self, rows: Sequence[Row], seed: int, split: str) -> dict[str, list[Row]]:
        """Return one client per category."""
        present = sorted({row.category for row in rows})
        for category in self.categories:
            if category not in present:
                raise PomonaError(
                    f'client "{category}" has no {split} rows: no row has that category; '
                    f"the rows have {', '.join(present)}"
                )
        dealt = {
            category: [row for row in rows if row.category == category]
            for category in self.categories or present
        }
        return {name: _some(held, self.rows, seed, split, name) for name, held in dealt.items()}


@dataclass(frozen=True)
class IID:
    """`clients` equal shares of the shuffled rows."""

    clients: int = 4

    def __post_init__(self) -> None:
        _at_least_one(self.clients)

    def __call__(self, rows: Sequence[Row], seed: int, split: str) -> dict[str, list[Row]]:
        """Return the shares; sizes differ by at most one row."""
        order = numpy_generator(seed, "iid", split).permutation(len(rows))
        names = _client_names(self.clients)
        return {
            name: [rows[i] for i in sorted(order[k :: self.clients])]
            for k, name in enumerate(names)
        }


@dataclass(frozen=True)
class Dirichlet:
    """Every category is dealt to the clients in proportions drawn from Dirichlet(alpha).

    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019. Train and test rows follow the same proportions, so a client is tested on
    the mixture it trains on. Small `alpha`: one category per client; large: all alike.
    """

    clients: int = 10
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _at_least_one(self.clients)
        if not self.alpha > 0:
            raise PomonaError(f"Dirichlet alpha {self.alpha} is not positive; use for example 0.5")

    def __call__(self, rows: Sequence[Row], seed: int, split: str) -> dict[str, list[Row]]:
        """Return the shares; a client may end up with no rows when alpha is small."""
        names = _client_names(self.clients)
        dealt: dict[str, list[Row]] = {name: [] for name in names}
        for category in sorted({row.category for row in rows}):
            share_C = numpy_generator(seed, "dirichlet", category).dirichlet(
                [self.alpha] * self.clients
            )
            held = [row for row in rows if row.category == category]
            order = numpy_generator(seed, "dirichlet", category, split).permutation(len(held))
            bounds = (share_C.cumsum() * len(held)).round().astype(int)
            for name, start, end in zip(names, [0, *bounds[:-1]], bounds, strict=True):
                dealt[name] += [held[i] for i in order[start:end]]
        return dealt


PARTITIONS: dict[str, type[ByCategory] | type[IID] | type[Dirichlet]] = {
    "category": ByCategory,
    "iid": IID,
    "dirichlet": Dirichlet,
}


def check_clients(train: Mapping[str, Sequence[Row]], test: Mapping[str, Sequence[Row]]) -> None:
    """Raise `PomonaError` naming the first client that lacks train or test rows."""
    if not train:
        raise PomonaError("the federation has no clients; check the partition and its files")
    for name in train:
        for split, rows in (("train", train[name]), ("test", test.get(name, ()))):
            if not rows:
                raise PomonaError(
                    f'client "{name}" has no {split} rows; give it some, leave it out, '
                    "or choose another partition or seed"
                )


def _some(rows: list[Row], count: int, seed: int, split: str, name: str) -> list[Row]:
    if count <= 0 or count >= len(rows) or split != "train":
        return rows
    chosen = numpy_generator(seed, "rows", name).choice(len(rows), count, replace=False)
    return [rows[i] for i in sorted(chosen)]


def _client_names(clients: int) -> list[str]:
    width = len(str(clients - 1))
    return [f"client-{number:0{width}d}" for number in range(clients)]


def _at_least_one(clients: int) -> None:
    if clients < 1:
        raise PomonaError(f"{clients} clients make no federation; use 1 or more")
