"""What a partition is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pomona.data.rows import Row
from pomona.federation.partition.dealing import Dealt


@runtime_checkable
class Partition(Protocol):
    """Deals train and test rows to clients by one rule: a client is tested on what it trains on."""

    def __call__(self, train: Sequence[Row], test: Sequence[Row], seed: int) -> tuple[Dealt, Dealt]:
        """Return each client's train and test rows.

        `test` is empty where all clients share one test set. No row is dealt twice, and the draw
        depends on the rows and the seed alone.
        """
        ...
