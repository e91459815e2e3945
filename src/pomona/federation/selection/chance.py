"""Experts by chance: what a selection rule has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from pomona.data.examples import Batch
from pomona.models.experts import ExpertSite
from pomona.seeds import numpy_generator


@dataclass(frozen=True)
class RandomExpert:
    """Draws each layer's experts uniformly, for every client anew."""

    def __call__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        clients: Sequence[Sequence[Batch]],
        seeds: Sequence[int],
        count: int,
    ) -> list[list[list[int]]]:
        """Return distinct indices per site, for every client a function of its seed."""
        return [
            draw_experts(sites, count, numpy_generator(seed, "random expert")) for seed in seeds
        ]


def draw_experts(
    sites: Sequence[ExpertSite], count: int, generator: np.random.Generator
) -> list[list[int]]:
    """Draw `count` distinct experts of every site.

    The first one of all sites is drawn before the second: it is the same for every `count`.
    """
    pools = [list(range(site.num_experts)) for site in sites]
    drawn = [[pool.pop(int(generator.integers(len(pool)))) for pool in pools] for _ in range(count)]
    return [list(own) for own in zip(*drawn, strict=True)]
