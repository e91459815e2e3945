"""The same experts for every client, whatever its data: is there anything personal in the choice?"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pomona.data.examples import Batch
from pomona.errors import PomonaError
from pomona.federation.selection.chance import draw_experts
from pomona.models.experts import ExpertSite
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class SameExpert:
    """Takes the same experts for every client.

    Its settings are constants of the recipe: nothing of any client and not its seed decides. With several
    grafts the ones after `expert` follow, the first after the last.

    Attributes:
        expert: The expert of every layer; without it experts are drawn per layer by `draw`.
        draw: Seed of the draw.
    """

    expert: int | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        if self.expert is not None and self.expert < 0:
            raise PomonaError(f"selection expert {self.expert} is negative; experts count from 0")

    def __call__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        clients: Sequence[Sequence[Batch]],
        seeds: Sequence[int],
        count: int,
    ) -> list[list[list[int]]]:
        """Return the same indices for every client.

        Raises `PomonaError` when a layer does not have the expert.
        """
        return [self._experts(sites, count) for _ in seeds]

    def _experts(self, sites: Sequence[ExpertSite], count: int) -> list[list[int]]:
        if self.expert is None:
            return draw_experts(sites, count, numpy_generator(self.draw, "same expert"))
        for site in sites:
            if self.expert >= site.num_experts:
                raise PomonaError(
                    f"selection expert {self.expert} is none of the {site.num_experts} of "
                    f"{site.name}; use at most {site.num_experts - 1}"
                )
        return [[(self.expert + i) % site.num_experts for i in range(count)] for site in sites]
