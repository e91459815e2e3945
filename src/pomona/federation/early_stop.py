"""Early stop: no more rounds once rows that nobody trains on are no longer answered better.

Prechelt, "Early Stopping - But When?", 1998: what decides is held back from training, and is not what the
result is tested on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pomona.data.examples import Example
from pomona.data.views import Picked
from pomona.errors import PomonaError
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class EarlyStop:
    """Ends the rounds when rows that clients hold back are no longer answered better.

    The models that serve the clients are measured on those rows; a client tells its loss and no more. Test
    rows decide nothing. The last state is kept, not the best one.

    Attributes:
        patience: Measurements in a row without a new best.
        share: Of every client's train rows, held back; at least one.
        every: Rounds between two measurements.
    """

    patience: int = 3
    share: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("patience", "every"):
            if getattr(self, name) < 1:
                raise PomonaError(
                    f"early_stop {name} {getattr(self, name)} is not positive; use 1 or more"
                )
        if not 0 < self.share < 1:
            raise PomonaError(
                f"early_stop share {self.share} is not between 0 and 1; use for example 0.1"
            )

    def hold_back(
        self, seed: int, client: str, examples: Sequence[Example]
    ) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return a client's (rows to train on, rows held back), the same for the same seed.

        Raises `PomonaError` when nothing would be left to train on.
        """
        count = max(1, round(self.share * len(examples)))
        if count >= len(examples):
            raise PomonaError(
                f'client "{client}" has {len(examples)} train rows, of which early_stop holds back {count}; '
                "make share smaller, or leave early_stop out"
            )
        order = numpy_generator(seed, "held back", client).permutation(len(examples))
        kept = set(order[:count].tolist())
        train = [i for i in range(len(examples)) if i not in kept]
        return Picked(examples, train), Picked(examples, sorted(kept))

    def reached(self, losses: Sequence[float]) -> bool:
        """Whether the last `patience` of the losses measured so far are none of them the lowest."""
        return len(losses) > self.patience and min(losses[: -self.patience]) <= min(
            losses[-self.patience :]
        )
