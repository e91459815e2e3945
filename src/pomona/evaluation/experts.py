"""How evenly experts are used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ExpertLoad:
    """What each expert of a layer is given of the layer's assignments: K per token.

    share_LE: the load [L, E], one in all per layer; zero beyond the experts a layer has.
    entropy_L: the load's entropy per layer [L] divided by log E: 1 when even, 0 when one has all.
    variation_L: the coefficient of variation per layer [L]: standard deviation over mean, 0 when even.
    num_experts: E of every layer.
    """

    share_LE: Tensor = field(repr=False)
    entropy_L: Tensor
    variation_L: Tensor
    num_experts: tuple[int, ...]

    def layer(self, index: int) -> list[float]:
        """Return the load of a layer's own experts [E], without what fills it up to the widest."""
        return self.share_LE[index, : self.num_experts[index]].tolist()


def expert_load(counts_LE: Int[Tensor, "L E"], num_experts: Sequence[int]) -> ExpertLoad:
    """Return the load of counted assignments; E per layer is what `num_experts` says.

    Layers may differ in E: counts of a narrower one are filled with zeros, which are no experts. A
    layer of one expert is even; one that was sent nothing has a load, entropy and variation of zero.
    """
    total_L1 = counts_LE.sum(1, keepdim=True).clamp_min(1)
    share_LE: Float[Tensor, "L E"] = counts_LE.double() / total_L1
    experts_L = torch.tensor(num_experts, dtype=torch.float64)
    most_L = torch.tensor([math.log(max(number, 2)) for number in num_experts]).double()
    entropy_L = torch.special.entr(share_LE).sum(1) / most_L
    entropy_L[(experts_L == 1) & (counts_LE.sum(1) > 0)] = 1.0
    # E · Σ share² is 1 + variation² for shares that sum to one.
    square_L = experts_L * share_LE.square().sum(1) - share_LE.sum(1)
    return ExpertLoad(share_LE, entropy_L, square_L.clamp_min(0).sqrt(), tuple(num_experts))


def load_drift(counts_LE: Int[Tensor, "L E"], base_LE: Int[Tensor, "L E"]) -> Float[Tensor, " L"]:
    """Return the total variation between two loads per layer: ½ Σ |p − q|, from 0 to 1.

    It is the least share of assignments that went to another expert: those that changed places with
    one another do not show.
    """
    shares = [
        n_LE.double() / n_LE.sum(1, keepdim=True).clamp_min(1) for n_LE in (counts_LE, base_LE)
    ]
    return (shares[0] - shares[1]).abs().sum(1) / 2
