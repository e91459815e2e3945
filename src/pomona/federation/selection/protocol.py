"""What a selection rule is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from pomona.data.examples import Batch
from pomona.models.experts import ExpertSite


@runtime_checkable
class Selection(Protocol):
    """Chooses one resident expert per MoE layer from a client's own data."""

    def __call__(
        self, model: nn.Module, sites: Sequence[ExpertSite], batches: Sequence[Batch], seed: int
    ) -> list[int]:
        """Return the chosen expert's index for every site; the model is left as it was."""
        ...
