"""Sums of updates in integers, where masks that add up to nothing leave no trace.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017. A client's
change, times its rows, is written in units of 2⁻³² as 64-bit integers, whose sum wraps around; what adds up
to nothing there changes not a bit of the sum. `masks` makes the masks; without any, as in a simulation, the
sum is the same.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.update import Update

_UNIT = 2.0**32
_LARGEST = 2.0**53
_MOST_CLIENTS = 1 << 10
FEWEST = 3
"""With fewer clients a sum tells each of them what the other has sent."""


def in_integers(sent: Mapping[str, Tensor], update: Update) -> dict[str, Tensor]:
    """Return rows · change of an update as int64, small enough for 1,024 clients to be added up.

    Raises `PomonaError` for a change that is not finite or too large.
    """
    encoded: dict[str, Tensor] = {}
    for name, value in update.shared.items():
        units = (value.double() - sent[name].double()) * (update.rows * _UNIT)
        largest = float(units.abs().max()) if units.numel() else 0.0
        if not largest < _LARGEST:  # not a number is not less either
            raise PomonaError(
                f'the change of client "{update.client}" is not finite or too large to be added up in {name}; '
                "lower local.learning_rate"
            )
        encoded[name] = units.round().to(torch.int64)
    return encoded


def summed(sent: Mapping[str, Tensor], updates: Iterable[Update]) -> Iterator[Update]:
    """Yield the mean of updates in integers, weighted by rows, as one update; none of none.

    One is held at a time.
    """
    total: dict[str, Tensor] = {}
    rows = clients = 0
    for update in updates:
        rows, clients = rows + update.rows, clients + 1
        for name, value in update.shared.items():
            total[name] = total[name] + value if name in total else value
        del update
    if clients > _MOST_CLIENTS:
        raise PomonaError(
            f"{clients} clients are more than {_MOST_CLIENTS}, which a sum of integers holds; lower fraction"
        )
    if clients:
        mean = {
            name: (sent[name].double() + value.double() / (rows * _UNIT)).to(sent[name].dtype)
            for name, value in total.items()
        }
        yield Update(f"mean of {clients} clients", rows, mean)
