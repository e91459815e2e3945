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
        batches: Sequence[Batch],
        seed: int,
        count: int,
    ) -> list[list[int]]:
        """Return `count` distinct experts for every site, the best first; the model stays as it was.

        `batches` and `seed` are the client's own, and nothing of other clients is to be had.
        """
        ...
