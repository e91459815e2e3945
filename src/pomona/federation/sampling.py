"""Who takes part and on which rows: functions of (seed, round, client) and nothing else."""

import math
from collections.abc import Sequence

from pomona.seeds import numpy_generator


def participants(seed: int, round_: int, clients: Sequence[str], fraction: float) -> list[str]:
    """Return the clients of a round, in the order of their names; at least one."""
    names = sorted(clients)
    count = sample_size(len(names), fraction)
    chosen = numpy_generator(seed, "participants", round_).choice(len(names), count, replace=False)
    return [names[i] for i in sorted(chosen)]


def sample_size(clients: int, fraction: float) -> int:
    """Return how many of so many clients take part in a round; at least one."""
    return max(1, math.ceil(fraction * clients - 1e-9))


def survivors(seed: int, round_: int, chosen: Sequence[str], dropout: float) -> list[str]:
    """Return those who answer when each is lost with the probability `dropout`; it may be nobody."""
    return [
        name
        for name in chosen
        if numpy_generator(seed, "dropout", round_, name).random() >= dropout
    ]


def batches(
    seed: int | str, round_: int, client: str, rows: int, batch: int, steps: int
) -> list[list[int]]:
    """Return the row indices of a client's steps in a round.

    Rows are drawn without replacement until all are used, then shuffled anew; a client with fewer
    rows than `batch` uses all of them in every step.
    """
    generator = numpy_generator(seed, "batches", round_, client)
    size = min(batch, rows)
    order: list[int] = []
    while len(order) < size * steps:
        order += generator.permutation(rows).tolist()
    return [order[step * size : (step + 1) * size] for step in range(steps)]


def passes(
    seed: int | str, round_: int, client: str, rows: int, batch: int, epochs: int
) -> list[list[int]]:
    """Return the row indices of a client's steps in a round of `epochs` passes over all its rows.

    Every pass has an order of its own and ends with a smaller batch where `batch` does not divide the rows.
    """
    generator = numpy_generator(seed, "batches", round_, client)
    orders = [generator.permutation(rows).tolist() for _ in range(epochs)]
    return [order[start : start + batch] for order in orders for start in range(0, rows, batch)]


def samples(
    key: str, round_: int, client: str, rows: int, batch: int, steps: int
) -> list[list[int]]:
    """Return the row indices of a client's steps in a round where every step's are drawn anew.

    Each is `batch` rows without replacement, whatever the others are: what the accountant of DP-SGD
    assumes. A client with fewer rows than `batch` uses all of them in every step. Who does not know
    `key` does not know the rows.
    """
    generator = numpy_generator(key, "samples", round_, client)
    return [generator.choice(rows, min(batch, rows), replace=False).tolist() for _ in range(steps)]
