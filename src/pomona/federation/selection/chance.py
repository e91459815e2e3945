"""A random expert per layer: the control that says whether choosing matters."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pomona.data.examples import Batch
from pomona.models.experts import ExpertSite
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class RandomExpert:
    """Draws each layer's expert uniformly."""

    def __call__(
        self, model: nn.Module, sites: Sequence[ExpertSite], batches: Sequence[Batch], seed: int
    ) -> list[int]:
        """Return one index per site, a function of `seed`."""
        generator = numpy_generator(seed, "random expert")
        return [int(generator.integers(site.num_experts)) for site in sites]
