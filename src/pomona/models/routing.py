"""Which experts tokens are sent to: seen, changed, or counted per layer and client."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.split import Present
from pomona.shapes import AttentionMask, Hidden, Routing, RoutingWeight, TokenMask

_NAMES = (
    ("hidden_states",),
    ("top_k_index", "router_indices"),
    ("top_k_weights", "routing_weights"),
)


Routed = tuple[Tensor, Tensor]  # logits [N, E], chosen experts [N, K]


@contextmanager
def routed_by(
    sites: Sequence[ExpertSite],
    route: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Generator[list[Routed]]:
    """Route as `route` says and collect (logits, chosen) of every layer; empty the list before a pass."""
    seen: list[Routed] = []

    def hook(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, weights, index = output
        seen.append((logits, index))
        if route is None:
            return output
        return (logits, *route(logits, weights, index))

    routers = [site.router for site in sites if site.router is not None]
    handles = tuple(router.register_forward_hook(hook) for router in routers)
    with Attachment(handles):
        yield seen


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
    present: Present | None = None,
) -> Generator[RoutingCounts]:
    """Count the forward passes of a block of code; rows are client-major, shared out as `present` tells.

    `mask_BT` (true or 1 = counted) leaves out padding; it must fit every forward pass inside. What
    activation checkpointing computes a second time is not counted. A forward pass whose tokens cannot
    be shared out among the clients raises `RuntimeError`.
    """
    widest = max((site.num_experts for site in sites), default=0)
    counts = RoutingCounts(torch.zeros(len(sites), num_clients, widest, dtype=torch.int64))
    keep_N = None if mask_BT is None else mask_BT.flatten().bool()
    hooks = [
        site.experts.register_forward_pre_hook(
            _counter(counts_CE, keep_N, present or Present()), with_kwargs=True
        )
        for site, counts_CE in zip(sites, counts.counts_LCE, strict=True)
    ]
    with Attachment(tuple(hooks)):
        yield counts


def _counter(counts_CE: Tensor, keep_N: Tensor | None, present: Present) -> Callable[..., None]:
    clients, experts = counts_CE.shape

    def count(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            return  # inside a backward pass: a checkpointed layer computed again
        _, index_NK, _ = experts_call(args, kwargs)
        client_N = present.of(index_NK, clients).client_N
        slot_NK = index_NK + experts * client_N.unsqueeze(1)
        chosen = slot_NK if keep_N is None else slot_NK[keep_N.to(slot_NK.device)]
        found = torch.bincount(chosen.flatten(), minlength=clients * experts)
        counts_CE.add_(found.view(clients, experts).to(counts_CE.device))

    return count


def experts_call(
    args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> tuple[Hidden, Routing, RoutingWeight]:
    """Return what a fused experts module was called with: hidden states, chosen experts, weights.

    The names are those of the common signature and of GPT-OSS, the order is the same in all.
    """
    named = [
        next(kwargs[name] for name in names if name in kwargs) for names in _NAMES[len(args) :]
    ]
    hidden_ND, index_NK, weight_NK = (*args, *named)
    return hidden_ND, index_NK, weight_NK
