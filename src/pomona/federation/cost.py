"""What a method costs, counted from shapes: bytes it could have sent, multiplications per token.

Two multiply-adds are two FLOPs, as everywhere. What depends on the length of the context (attention's
scores), convolutions, recurrences and whatever is elementwise are left out: they are the same with and
without a client's parts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState
from pomona.models.experts import ExpertSite
from pomona.models.lora import find_projections


def cost_of(
    base: FrozenBase, states: Iterable[ClientState], routing: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the cost of the base and of the costliest of the clients' states on it.

    `routing` are the base's lines of the final evaluation: `counts` [L, E] of `tokens` tokens say how
    many experts a token has. `bytes`: all parameters of the model as they lie in memory, and LoRA of
    the same rank (float32) on the shared projections and every expert: what aggregating everything
    would send. `flops_per_token`: of the base's products, and what adapter (with a shared expert and
    a private LoRA) and graft add.
    """
    active_L = _active(routing)
    mean = sum(active_L) / len(active_L) if active_L else 0.0
    added = [
        (_products({**s.adapter, **_renamed(s.personal)}, mean), _graft_flops(base.sites, s.graft))
        for s in states
    ]
    adapter, graft = max(added, key=sum)
    if base.shared_expert is not None:
        adapter += _resident_flops(base.sites, base.shared_expert.indices(base.sites))
    return {
        "bytes": {
            "all_parameters": sum(p.nbytes for p in base.model.parameters()),
            "lora_everywhere": 4 * lora_everywhere(base),
        },
        "flops_per_token": {
            "base": base_flops(base.model, base.sites, active_L),
            "adapter": adapter,
            "graft": graft,
        },
    }


def lora_everywhere(base: FrozenBase) -> int:
    """Return the parameters of LoRA at the adapter's rank on its projections and on all experts."""
    rank = base.lora.rank
    projections = find_projections(base.model, base.lora).values()
    attention = sum(rank * (linear.in_features + linear.out_features) for linear in projections)
    experts = sum(
        site.num_experts * 3 * rank * (site.hidden_size + site.width) for site in base.sites
    )
    return attention + experts


def base_flops(model: nn.Module, sites: Sequence[ExpertSite], active_L: Sequence[float]) -> float:
    """Return FLOPs per token of all linear layers, routers and the experts a token is sent to."""
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    routers = sum(2 * weight.numel() for site in sites if (weight := _matrix(site)) is not None)
    experts = sum(
        active * 6 * site.hidden_size * site.width
        for site, active in zip(sites, active_L, strict=True)
    )
    return linear + routers + experts


def _matrix(site: ExpertSite) -> Tensor | None:
    """Return the weights of a router that is no linear layer, which would be counted already."""
    weight = getattr(site.router, "weight", None)
    is_linear = isinstance(site.router, nn.Linear)
    return None if is_linear or weight is None or weight.ndim != 2 else cast(Tensor, weight)


def _active(routing: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the experts per token [L], as they were counted."""
    if not routing:
        return []
    counts_CLE = torch.tensor([line["counts"] for line in routing])
    tokens = sum(line["tokens"] for line in routing)
    return (counts_CLE.sum((0, 2)).double() / tokens).tolist()


def _products(tensors: Mapping[str, Tensor], active: float = 0.0) -> float:
    """Return 2 per weight: every matrix and every gate vector meets every token once.

    LoRA on experts [E, …] meets it in `active` of them.
    """
    flat = sum(2 * t.numel() for t in tensors.values() if t.is_floating_point() and 0 < t.ndim < 3)
    experts = [t for t in tensors.values() if t.ndim == 3]
    return flat + sum(2 * t[0].numel() * active for t in experts)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A private LoRA sits on the same projections as the adapter."""
    return {f"personal/{name}": value for name, value in tensors.items()}


def _graft_flops(sites: Sequence[ExpertSite], tensors: Mapping[str, Tensor]) -> float:
    """Return what a graft adds: the resident experts it goes through, its low rank and its gates."""
    return _resident_flops(sites, tensors) + _products(tensors)


def _resident_flops(sites: Sequence[ExpertSite], names: Iterable[str]) -> float:
    """Return what the experts cost that grafts with these tensors go through."""
    return sum(
        6 * site.hidden_size * site.width
        for site in sites
        for name in names
        if name.startswith(f"{site.name}.") and name.endswith(".expert")
    )
