"""The expert that alone comes closest to the routed output of its layer.

Lu et al., "Not All Experts are Equal", ACL 2024 (section 3); FLEx (arXiv 2506.00965) uses it for the
graft: e* = argmin_e Σ_batches ‖F(X) − E_e(X)‖_F, layers independent, F without the shared expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.federation.selection.passes import Seen, best, check_rows, no_sums, watch
from pomona.models.experts import ExpertSite


@dataclass(frozen=True)
class Reconstruction:
    """One forward pass of the unmodified model; nothing but E sums per layer is kept.

    Several experts are those that come closest one by one; `greedy` looks at them together.

    Attributes:
        rows: At most so many calibration rows of a client; FLEx uses 128.
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
        """Return the indices of the best experts of every site."""
        losses = self.losses(model, sites, clients)
        return [[best(-loss_E, count) for loss_E in own] for own in losses]

    def losses(
        self, model: nn.Module, sites: Sequence[ExpertSite], clients: Sequence[Sequence[Batch]]
    ) -> list[list[Tensor]]:
        """Return Σ_batches ‖F(X) − E_e(X)‖_F of every client for every site, [E] each, in float64."""
        sums = no_sums(sites, clients)

        def see(client: int, place: int, seen: Seen) -> None:
            for expert in range(sites[place].num_experts):
                apart_ND = seen.routed_ND - sites[place].apply(seen.x_ND, expert)
                sums[client][place][expert] += (
                    torch.linalg.vector_norm(apart_ND.float()).double().cpu()
                )

        watch(model, sites, clients, self.rows, see)
        return sums
