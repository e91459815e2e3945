"""The experts that together come closest to the routed output of their layer, chosen one by one.

Forward selection with least-squares weights (Hastie, Tibshirani & Friedman, "The Elements of
Statistical Learning", 2009, section 3.3.2): having chosen S, take the expert e that makes
min_a Σ_x ‖F(x) − Σ_{i ∈ S ∪ {e}} a_i E_i(x)‖² smallest. All of it follows from
G_ij = Σ_x ⟨E_i(x), E_j(x)⟩ and b_i = Σ_x ⟨F(x), E_i(x)⟩: the weights solve G_SS a = b_S, and the error
is Σ_x ‖F(x)‖² − b_Sᵀ a. So E² numbers per layer and one forward pass suffice.

The weights decide which experts are chosen and nothing else: a graft's own gate is what weighs it, and in
the delta form its birth is silent anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.federation.selection.passes import Seen, check_rows, watch
from pomona.models.experts import ExpertSite
from pomona.shapes import Hidden

_BLOCK = 1 << 25  # numbers of all experts' outputs that are held at once


@dataclass(frozen=True)
class Moments:
    """One layer's inner products, summed over tokens: G [E, E], b [E] and Σ ‖F(x)‖², float64."""

    gram_EE: Float[Tensor, "E E"] = field(repr=False)
    cross_E: Float[Tensor, " E"] = field(repr=False)
    square: Float[Tensor, ""]


@dataclass(frozen=True)
class Greedy:
    """Forward selection of experts.

    A single expert is the one with the best multiple of its output: unlike `reconstruction` its size does
    not matter, only its direction.

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
        """Return the chosen experts of every site, in the order in which they were."""
        moments = self.moments(model, sites, clients)
        return [[forward_selection(m, count)[0] for m in own] for own in moments]

    def moments(
        self, model: nn.Module, sites: Sequence[ExpertSite], clients: Sequence[Sequence[Batch]]
    ) -> list[list[Moments]]:
        """Return every client's and site's inner products over the client's tokens."""
        sums = [[_no_moments(site.num_experts) for site in sites] for _ in clients]

        def see(client: int, place: int, seen: Seen) -> None:
            site = sites[place]
            tokens = max(1, _BLOCK // (site.num_experts * site.hidden_size))
            pairs = zip(seen.x_ND.split(tokens), seen.routed_ND.split(tokens), strict=True)
            for x_ND, routed_ND in pairs:
                _accumulate(sums[client][place], site, x_ND, routed_ND)

        watch(model, sites, clients, self.rows, see)
        return sums


def _no_moments(experts: int) -> Moments:
    zeros = torch.zeros(experts + 1, experts, dtype=torch.float64)
    return Moments(zeros[:experts], zeros[experts], torch.zeros((), dtype=torch.float64))


def _accumulate(sums: Moments, site: ExpertSite, x_ND: Hidden, routed_ND: Hidden) -> None:
    outputs = [site.apply(x_ND, expert).flatten() for expert in range(site.num_experts)]
    own_EX, routed_X = torch.stack(outputs).double(), routed_ND.flatten().double()
    sums.gram_EE.add_((own_EX @ own_EX.T).to(sums.gram_EE.device))
    sums.cross_E.add_((own_EX @ routed_X).to(sums.cross_E.device))
    sums.square.add_(routed_X.dot(routed_X).to(sums.square.device))


def forward_selection(moments: Moments, count: int) -> tuple[list[int], Float[Tensor, " G"]]:
    """Return `count` experts and the least-squares weights of all of them together."""
    chosen: list[int] = []
    for _ in range(count):
        left = [e for e in range(len(moments.cross_E)) if e not in chosen]
        explained = [_least_squares(moments, [*chosen, e])[1] for e in left]
        chosen.append(left[int(torch.tensor(explained).argmax())])
    return chosen, _least_squares(moments, chosen)[0]


def _least_squares(moments: Moments, experts: Sequence[int]) -> tuple[Tensor, float]:
    """Return the weights of some experts and how much of Σ ‖F(x)‖² they explain.

    The solution of smallest norm, since experts may be copies of one another.
    """
    gram_GG, cross_G = moments.gram_EE[experts][:, experts], moments.cross_E[experts]
    weight_G = torch.linalg.lstsq(gram_GG, cross_G.unsqueeze(1), driver="gelsd").solution[:, 0]
    return weight_G, float(weight_G @ cross_G)
