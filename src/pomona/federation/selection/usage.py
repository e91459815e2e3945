"""The experts that contribute most to the routed output: usage = Σ_x w_e(x) · ‖E_e(x)‖.

Over a client's tokens that is routing frequency × mean of (router weight × norm of the expert's output)
where it is routed; the mean is the saliency of Lasby et al., "REAP the Experts" (arXiv 2510.13999), and the
frequency stays in because a client's own tokens are what a graft is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.federation.selection.passes import Seen, best, check_rows, no_sums, watch
from pomona.models.experts import ExpertSite


@dataclass(frozen=True)
class Usage:
    """One forward pass; an expert is computed only for the tokens that are routed to it.

    Attributes:
        rows: At most so many calibration rows of a client.
    """

    rows: int = 128

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def __call__(
        self,
        model: nn.Module,
        sites: Sequence[ExpertSite],
        clients: Sequence[Sequence[Batch]],
        seeds: Sequence[int],
        count: int,
    ) -> list[list[list[int]]]:
        """Return the most used experts of every site."""
        usage = self.usage(model, sites, clients)
        return [[best(usage_E, count) for usage_E in own] for own in usage]

    def usage(
        self, model: nn.Module, sites: Sequence[ExpertSite], clients: Sequence[Sequence[Batch]]
    ) -> list[list[Tensor]]:
        """Return Σ_x w_e(x) ‖E_e(x)‖ over a client's routed tokens for every site, [E] each, in float64."""
        sums = no_sums(sites, clients)

        def see(client: int, place: int, seen: Seen) -> None:
            for expert in range(sites[place].num_experts):
                token_n, weight_n = seen.sent_to(expert)
                own_nD = sites[place].apply(seen.x_ND[token_n], expert)
                norm_n = torch.linalg.vector_norm(own_nD.float(), dim=1)
                sums[client][place][expert] += (weight_n.double() * norm_n.double()).sum().cpu()

        watch(model, sites, clients, self.rows, see)
        return sums
