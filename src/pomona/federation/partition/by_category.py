"""Clients that hold one category, or a few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pomona.data.rows import Row
from pomona.errors import PomonaError
from pomona.federation.partition.dealing import (
    Counts,
    Dealt,
    by_category,
    capped,
    check_cap,
    check_sizes,
    cut,
)
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class ByCategory:
    """One category per client, the client named after it.

    Attributes:
        categories: Chooses and orders the clients; empty means every category of the rows.
        rows: Train rows of a client, drawn at random; 0: all.
    """

    categories: tuple[str, ...] = ()
    rows: int = 0

    def __post_init__(self) -> None:
        check_cap(self.rows)

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return one client per category; raises `PomonaError` for one that no row has."""
        own, held_out = by_category(train), by_category(test)
        for split, present in (("train", own), ("test", held_out)):
            for category in self.categories if present else ():
                if category not in present:
                    raise PomonaError(
                        f'client "{category}" has no {split} rows: no row has that category; '
                        f"the rows have {', '.join(present)}"
                    )
        names = self.categories or tuple({**own, **held_out})
        kept = capped({name: own.get(name, []) for name in names}, self.rows, seed)
        return kept, {name: held_out.get(name, []) for name in names}


@dataclass(frozen=True)
class SomeCategories:
    """`categories_per_client` categories per client: the pathological split.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, section 3. Their shards of sorted rows give most clients two digits, some one or
    three; here every client has exactly as many as asked. Categories are dealt as from shuffled
    decks, so that as many clients as can be hold each, and its holders share its rows evenly.

    Attributes:
        clients: How many.
        categories_per_client: How many categories each holds.
        rows: At most so many train rows of a client; 0: all.
    """

    clients: int = 10
    categories_per_client: int = 2
    rows: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.clients, self.rows)
        if self.categories_per_client < 1:
            raise PomonaError(
                f"categories_per_client {self.categories_per_client} leaves clients without rows; "
                "use 1 or more"
            )

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return the shares; raises `PomonaError` when some category would be nobody's."""
        own, held_out = by_category(train), by_category(test)
        hands = self._hands(sorted({*own, *held_out}), seed)
        counts_CK, held_out_CK = _shared_evenly(own, hands), _shared_evenly(held_out, hands)
        dealt = cut(own, counts_CK, "some-categories", seed, "train")
        return capped(dealt, self.rows, seed), cut(
            held_out, held_out_CK, "some-categories", seed, "test"
        )

    def _hands(self, categories: Sequence[str], seed: int) -> list[set[str]]:
        """Deal deck after deck; a card that a client already has is left for the next one."""
        wanted = self.categories_per_client
        if wanted > len(categories) or self.clients * wanted < len(categories):
            raise PomonaError(
                f"{self.clients} clients of categories_per_client {wanted} cannot hold the "
                f"{len(categories)} categories of the rows; change one of the two"
            )
        generator = numpy_generator(seed, "some-categories")
        deck: list[str] = []
        hands: list[set[str]] = []
        for _ in range(self.clients):
            hand: set[str] = set()
            while len(hand) < wanted:
                if not deck:
                    deck = [str(c) for c in generator.permutation(list(categories))]
                card = next(card for card in deck if card not in hand)
                deck.remove(card)
                hand.add(card)
            hands.append(hand)
        return hands


def _shared_evenly(held: Mapping[str, Sequence[Row]], hands: Sequence[set[str]]) -> Counts:
    counts_CK = np.zeros((len(hands), len(held)), dtype=np.int64)
    for k, (category, rows) in enumerate(held.items()):
        holders = [c for c, hand in enumerate(hands) if category in hand]
        for place, client in enumerate(holders):
            counts_CK[client, k] = len(rows[place :: len(holders)])
    return counts_CK
