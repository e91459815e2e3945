"""How far the gates of grafts are open: weights of private experts, summed over what passes through a model."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pomona.federation.graft import Graft, private_experts
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.routing import experts_call
from pomona.models.split import Present
from pomona.shapes import AttentionMask, TokenMask


@dataclass(frozen=True)
class GateWeights:
    """Weights of private experts summed over tokens, and how many tokens these were; float64 [L, C] each.

    For a trained gate the weight of a token is its openness σ; several grafts of a layer are averaged.
    """

    sum_LC: Float[Tensor, "L C"]
    tokens_LC: Float[Tensor, "L C"]

    @property
    def mean_LC(self) -> Float[Tensor, "L C"]:
        """The mean weight per layer and client."""
        return self.sum_LC / self.tokens_LC


@contextmanager
def measure_gates(
    sites: Sequence[ExpertSite],
    graft: Graft,
    tensors: Mapping[str, Tensor],
    clients: int = 1,
    mask_BT: TokenMask | AttentionMask | None = None,
    present: Present | None = None,
) -> Generator[GateWeights]:
    """Sum up the weights of private experts over the forward passes of a block of code.

    Rows are client-major, shared out as `present` tells; `tensors` are every client's, stacked, or those of
    one for all. `mask_BT` (true or 1 = counted) leaves out padding; it must fit every forward pass inside.
    """
    told, zeros_LC = present or Present(), torch.zeros(len(sites), clients, dtype=torch.float64)
    found = GateWeights(zeros_LC, zeros_LC.clone())

    def hook_of(place: int, site: ExpertSite) -> Callable[..., None]:
        grown = private_experts(site, graft, tensors)

        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            call = experts_call(args, kwargs)
            split = told.of(call[0], len(grown[0].residents))
            client_N = told.of(call[0], clients).client_N.cpu()
            open_N = reduce(torch.add, [each.openness(*call, split) for each in grown]) / len(grown)
            real_N = torch.ones(len(client_N)) if mask_BT is None else mask_BT.flatten().cpu()
            found.sum_LC[place].index_add_(0, client_N, open_N.cpu().double() * real_N)
            found.tokens_LC[place].index_add_(0, client_N, real_N.double())

        return hook

    hooks = [
        site.experts.register_forward_pre_hook(hook_of(place, site), with_kwargs=True)
        for place, site in enumerate(sites)
    ]
    with Attachment(tuple(hooks)), torch.no_grad():
        yield found
