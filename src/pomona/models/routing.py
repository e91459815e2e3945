"""Which experts tokens are sent to, counted per layer and client."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.shapes import AttentionMask, TokenMask


@dataclass(frozen=True)
class RoutingCounts:
    """Tokens sent to every expert, [L, C, E]; a token counts once for each of its K experts.

    Layers with fewer experts than the widest keep zeros at the end.
    """

    counts_LCE: Int[Tensor, "L C E"]


@contextmanager
def count_routing(
    sites: Sequence[ExpertSite],
    num_clients: int = 1,
    mask_BT: TokenMask | AttentionMask | None = None,
) -> Generator[RoutingCounts]:
    """Count the forward passes of a block of code; rows are client-major.

    `mask_BT` (true or 1 = counted) leaves out padding; it must fit every forward pass inside. What
    activation checkpointing computes a second time is not counted. A forward pass whose tokens do
    not split evenly among the clients raises `RuntimeError`.
    """
    widest = max((site.num_experts for site in sites), default=0)
    counts = RoutingCounts(torch.zeros(len(sites), num_clients, widest, dtype=torch.int64))
    keep_N = None if mask_BT is None else mask_BT.flatten().bool()
    hooks = [
        site.experts.register_forward_pre_hook(_counter(counts_CE, keep_N), with_kwargs=True)
        for site, counts_CE in zip(sites, counts.counts_LCE, strict=True)
    ]
    with Attachment(tuple(hooks)):
        yield counts


def _counter(counts_CE: Tensor, keep_N: Tensor | None) -> Callable[..., None]:
    clients, experts = counts_CE.shape

    def count(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            return  # inside a backward pass: a checkpointed layer computed again
        index_NK = args[1] if len(args) > 1 else _index(kwargs)
        # unflatten refuses tokens that cannot be split evenly among the clients
        index_CX = index_NK.flatten().unflatten(0, (clients, -1))
        offset_C1 = experts * torch.arange(clients, device=index_NK.device).unsqueeze(1)
        slot_NK = (index_CX + offset_C1).reshape(index_NK.shape)
        chosen = slot_NK if keep_N is None else slot_NK[keep_N.to(slot_NK.device)]
        found = torch.bincount(chosen.flatten(), minlength=clients * experts)
        counts_CE.add_(found.view(clients, experts).to(counts_CE.device))

    return count


def _index(kwargs: dict[str, Tensor]) -> Tensor:
    """GPT-OSS calls the same argument `router_indices`."""
    return kwargs["top_k_index"] if "top_k_index" in kwargs else kwargs["router_indices"]
