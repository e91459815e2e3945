"""What the partitions share: sorting rows by category, cutting them into shares, capping a client's."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from jaxtyping import Int
from numpy import ndarray

from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.seeds import numpy_generator

Dealt: TypeAlias = dict[str, list[Row]]
"""Every client's rows, by its name."""

Counts: TypeAlias = Int[ndarray, "C K"]
"""Rows of every category that a client gets."""


def by_category(rows: Sequence[Row]) -> Dealt:
    """Return the rows of every category, in the order of the names."""
    held: Dealt = {category: [] for category in sorted({row.category for row in rows})}
    for row in rows:
        held[row.category].append(row)
    return held


def cut(
    held: Mapping[str, Sequence[Row]], counts_CK: Counts, rule: str, seed: int, split: str
) -> Dealt:
    """Deal so many shuffled rows of each category to each client, in an order that mixes them.

    Whoever reads only a client's first rows, to calibrate or to measure, has to find its mixture.
    """
    names = client_names(len(counts_CK))
    dealt: Dealt = {name: [] for name in names}
    for k, (category, rows) in enumerate(held.items()):
        order = numpy_generator(seed, rule, category, split).permutation(len(rows))
        ends = counts_CK[:, k].cumsum()
        for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True):
            dealt[name] += [rows[i] for i in order[start:end]]
    return {name: shuffled(rows, seed, rule, split, name) for name, rows in dealt.items()}


def shuffled(rows: Sequence[Row], *key: str | int) -> list[Row]:
    """Return the rows in an order that the key decides."""
    return [rows[i] for i in numpy_generator(*key, "order").permutation(len(rows))]


def capped(dealt: Mapping[str, list[Row]], rows: int, seed: int) -> Dealt:
    """Keep at most `rows` of each client's, drawn at random and in their order; 0 keeps all."""
    kept: Dealt = {}
    for name, own in dealt.items():
        if 0 < rows < len(own):
            chosen = numpy_generator(seed, "rows", name).choice(len(own), rows, replace=False)
            own = [own[i] for i in sorted(chosen)]
        kept[name] = own
    return kept


def client_names(clients: int) -> list[str]:
    """Return client-0, client-1 and so on, with zeros so that they sort."""
    width = len(str(clients - 1))
    return [f"client-{number:0{width}d}" for number in range(clients)]


def check_sizes(clients: int, rows: int) -> None:
    """Raise `PomonaError` for fewer than one client or a negative cap."""
    if clients < 1:
        raise PomonaError(f"{clients} clients make no federation; use 1 or more")
    check_cap(rows)


def check_cap(rows: int) -> None:
    """Raise `PomonaError` for a negative cap."""
    if rows < 0:
        raise PomonaError(
            f"{rows} rows per client are negative; use 0 for all or a positive number"
        )


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
