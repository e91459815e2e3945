"""How evenly experts are used."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ExpertLoad:
    """Share of the tokens per expert [L, E] and its entropy per layer [L], 1 when even."""

    share_LE: Tensor
    entropy_L: Tensor


def expert_load(counts_LE: Int[Tensor, "L E"]) -> ExpertLoad:
    """Return the load of counted tokens; entropy is divided by log E."""
    total_L1 = counts_LE.sum(1, keepdim=True).clamp_min(1)
    share_LE: Float[Tensor, "L E"] = counts_LE.double() / total_L1
    entropy_L = torch.special.entr(share_LE).sum(1) / math.log(max(counts_LE.shape[1], 2))
    return ExpertLoad(share_LE, entropy_L)
