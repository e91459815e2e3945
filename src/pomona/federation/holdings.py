"""Who holds what: rows per client and category, and test rows that are trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pomona.data.duplicates import Duplicates, find_duplicates
from pomona.data.rows import Row
from pomona.federation.clients import ClientRows


@dataclass(frozen=True)
class Holdings:
    """Rows of every category per client, in train and test; `data` in results.json."""

    categories: list[str]
    train: dict[str, list[int]]
    test: dict[str, list[int]]
    duplicates: Duplicates

    def consistent(self) -> bool:
        """Tell whether every client has a count per category; a file may say otherwise."""
        counts = [*self.train.values(), *self.test.values()]
        return (
            bool(self.train)
            and self.train.keys() == self.test.keys() == self.duplicates.clients.keys()
            and all(len(own) == len(self.categories) > 0 for own in counts)
        )


def holdings_of(clients: Mapping[str, ClientRows]) -> Holdings:
    """Count every client's rows and look for test rows that anybody trains on."""
    train = {name: own.train for name, own in clients.items()}
    test = {name: own.test for name, own in clients.items()}
    every = [row for own in (*train.values(), *test.values()) for row in own]
    categories = sorted({row.category for row in every})

    def counts(rows: Sequence[Row]) -> list[int]:
        count = dict.fromkeys(categories, 0)
        for row in rows:
            count[row.category] += 1
        return list(count.values())

    return Holdings(
        categories,
        {name: counts(own) for name, own in train.items()},
        {name: counts(own) for name, own in test.items()},
        find_duplicates(train, test),
    )
