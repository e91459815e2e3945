"""What a selection rule is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from pomona.data.examples import Batch
from pomona.models.experts import ExpertSite


@runtime_checkable
class Selection(Protocol):
    """Chooses resident experts of every MoE layer from a client's own data."""

    def __call__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        clients: Sequence[Sequence[Batch]],
        seeds: Sequence[int],
        count: int,
    ) -> list[list[list[int]]]:
        """Return `count` distinct experts of every site for every client, the best first `[C][L][count]`.

        `clients` holds every client's own batches, `seeds` its own seed. They are many so that one pass of the
        base serves all; what one is given must not depend on the others, and the model stays as it was.
        """
        ...
