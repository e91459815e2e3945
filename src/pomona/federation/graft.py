"""Private experts with a gate of their own, grafted into every MoE layer.

FLEx (arXiv 2506.00965, section 3): the layer's output gains σ(⟨w, x⟩ + b) · E_p(x), where the
private expert E_p starts as a selected pretrained expert. The copy costs no memory: only the resident
expert's index and what is trained (LoRA, or whole differences) are kept, and the hook computes the
copy through the resident weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.errors import PomonaError
from pomona.federation.private_expert import PrivateExpert
from pomona.federation.selection import Selection
from pomona.federation.selection.reconstruction import Reconstruction
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.lora import low_rank_pair
from pomona.models.routing import experts_call
from pomona.models.split import Present

GraftForm = Literal["delta", "copy"]
GraftGate = Literal["router", "zero", "none", "resident"]
GraftWeights = Literal["lora", "full"]
_CHOICES = (("form", GraftForm), ("gate", GraftGate), ("weights", GraftWeights))


@dataclass(frozen=True)
class Graft:
    """How private experts are born and trained.

    Attributes:
        selection: Which pretrained experts they grow from.
        count: Private experts per layer, each with a gate of its own.
        form: "delta" adds σ(g) · (E_p(x) − E_e(x)): the grafted model equals the base exactly until
            training moves it, and it exports as one gated expert of twice the width. "copy" adds σ(g) ·
            E_p(x) as published: the model jumps at birth.
        gate: Where the gate vector starts: the selected expert's "router" row (as published) or "zero".
            "none" weighs every token by one; "resident" by the router's own weight for the selected expert,
            zero where a token is not routed to it: in the delta form that is exactly training the selected
            expert itself.
        bias: Train a bias of the gate too; without it the gate is what Qwen2-MoE's shared expert has.
        weights: "lora" on gate, up and down, and on no bias; "full": a private copy of the whole expert,
            biases included, kept as its difference from the resident, so that weight decay pulls towards
            the resident.
        rank: Of the LoRA; without meaning with full weights.
        alpha: Of the LoRA; without meaning with full weights.
    """

    selection: Selection = field(default_factory=Reconstruction)
    count: int = 1
    form: GraftForm = "delta"
    gate: GraftGate = "router"
    bias: bool = False
    weights: GraftWeights = "lora"
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        for name in ("count", "rank"):
            if getattr(self, name) < 1:
                raise PomonaError(
                    f"graft {name} {getattr(self, name)} is not positive; use 1 or more"
                )
        if not isfinite(self.alpha):
            raise PomonaError(f"graft alpha {self.alpha} is not finite; use for example 16")
        for name, kinds in _CHOICES:
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise PomonaError(
                    f'graft {name} "{getattr(self, name)}" is unknown; use one of {known}'
                )
        if self.bias and not self.trains_gate:
            raise PomonaError(
                f'graft bias needs a gate that is trained, and gate "{self.gate}" is not; leave bias '
                'out, or use gate "router" or "zero"'
            )

    @property
    def scaling(self) -> float:
        """The factor alpha / rank in front of every B · A."""
        return self.alpha / self.rank

    @property
    def trains_gate(self) -> bool:
        """Whether a gate vector is part of the graft."""
        return self.gate in ("router", "zero")


def choose_experts(
    model: nn.Module,
    sites: Sequence[ExpertSite],
    graft: Graft,
    clients: Sequence[Sequence[Batch]],
    seeds: Sequence[int],
) -> list[list[list[int]]]:
    """Return the experts that every client's grafts grow from, `count` distinct ones per site `[C][L][count]`.

    `clients` holds the batches of each, `seeds` its own. Raises `PomonaError` when a layer has fewer experts,
    or a selection rule from outside gives others than it was asked for.
    """
    check_count(sites, graft)
    found = graft.selection(model, sites, clients, seeds, graft.count)
    chosen = [[[int(expert) for expert in own] for own in client] for client in found]
    for client in chosen:
        for site, own in zip(sites, client, strict=True):
            if len(set(own)) != graft.count or not all(0 <= e < site.num_experts for e in own):
                raise PomonaError(
                    f"{type(graft.selection).__name__} chose the experts {own} of {site.name}; a "
                    f"selection rule gives {graft.count} distinct ones of its {site.num_experts}"
                )
    return chosen


def check_count(sites: Sequence[ExpertSite], graft: Graft) -> None:
    """Raise `PomonaError` when a layer has fewer experts than there are to be grafts."""
    for site in sites:
        if graft.count > site.num_experts:
            raise PomonaError(
                f"graft count {graft.count} is more than the {site.num_experts} experts of "
                f"{site.name}; use at most that many"
            )


def init_graft(
    sites: Sequence[ExpertSite],
    graft: Graft,
    experts: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return one client's private tensors; `experts` holds the chosen experts of every site.

    Per site NAME (with several grafts NAME.0, NAME.1, …): `NAME.expert` (int64 scalar); with a trained
    gate `NAME.gate` [D] and, with a bias, `NAME.gate_bias` []; LoRA pairs
    `NAME.{gate,up,down}.lora_{A,B}`, or `NAME.{gate,up,down}.delta` [out, in] and, where the family's
    experts have biases, `.delta_bias` [out]; float32.
    """
    tensors: dict[str, Tensor] = {}
    for site, chosen in zip(sites, experts, strict=True):
        for prefix, expert in zip(_prefixes(site, graft.count), chosen, strict=True):
            own = _newborn(site, graft, expert, generator)
            tensors |= {f"{prefix}{name}": value for name, value in own.items()}
    return tensors


def expert_indices(
    sites: Sequence[ExpertSite], graft: Graft, experts: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return of a graft's tensors those that say which experts it grew from: `NAME.expert` []."""
    return {
        f"{prefix}expert": torch.tensor(expert)
        for site, chosen in zip(sites, experts, strict=True)
        for prefix, expert in zip(_prefixes(site, graft.count), chosen, strict=True)
    }


def _prefixes(site: ExpertSite, count: int) -> list[str]:
    """A single graft has no number, so that its folder is what it was before there were several."""
    return [f"{site.name}."] if count == 1 else [f"{site.name}.{i}." for i in range(count)]


def _newborn(
    site: ExpertSite, graft: Graft, expert: int, generator: torch.Generator
) -> dict[str, Tensor]:
    own = {"expert": torch.tensor(expert)}
    if graft.trains_gate:
        row_D = site.router_row(expert) if graft.gate == "router" else None
        known = row_D is not None
        own["gate"] = (
            row_D.detach().float().cpu().clone() if known else torch.zeros(site.hidden_size)
        )
    if graft.bias:
        own["gate_bias"] = torch.zeros(())
    biased = site.expert(expert).down_bias is not None
    for part, (size_in, size_out) in _sizes(site).items():
        if graft.weights == "lora":
            trained = low_rank_pair(size_in, size_out, graft.rank, generator)
        else:
            trained = {"delta": torch.zeros(size_out, size_in)}
            trained |= {"delta_bias": torch.zeros(size_out)} if biased else {}
        own |= {f"{part}.{name}": value for name, value in trained.items()}
    return own


def _sizes(site: ExpertSite) -> dict[str, tuple[int, int]]:
    inner, outer = site.width, site.hidden_size
    return {"gate": (outer, inner), "up": (outer, inner), "down": (inner, outer)}


def attach_graft(
    sites: Sequence[ExpertSite],
    graft: Graft,
    tensors: Mapping[str, Tensor],
    present: Present | None = None,
) -> Attachment:
    """Hook stacked grafts [C, …] onto their sites; tokens are client-major, as `present` tells.

    The hook sits on the fused experts module, whose signature is the same in every family, so that
    no parameter is renamed and `save_pretrained`, `generate` and activation checkpointing go on
    working.
    """
    handles = [
        site.experts.register_forward_hook(
            _adding(private_experts(site, graft, tensors), present or Present()), with_kwargs=True
        )
        for site in sites
    ]
    return Attachment(tuple(handles))


def private_experts(
    site: ExpertSite, graft: Graft, tensors: Mapping[str, Tensor]
) -> list[PrivateExpert]:
    """Return a site's private experts from stacked tensors [C, …]."""
    made: list[PrivateExpert] = []
    for prefix in _prefixes(site, graft.count):
        own = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        residents = tuple(int(index) for index in own["expert"])
        delta = graft.form == "delta"
        made.append(PrivateExpert(site, residents, own, graft.gate, delta, graft.scaling))
    return made


def _adding(grown: Sequence[PrivateExpert], present: Present) -> Callable[..., Tensor]:
    clients = len(grown[0].residents)

    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        call = experts_call(args, kwargs)
        split = present.of(call[0], clients)
        added_ND = reduce(torch.add, [expert(*call, split) for expert in grown])
        return output + added_ND.reshape(output.shape).to(output.dtype)

    return hook


def selected_experts(sites: Sequence[ExpertSite], tensors: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the resident experts that one client's grafts grew from, per site."""

    def names(site: ExpertSite) -> list[str]:
        numbered = [f"{site.name}.{i}.expert" for i in range(site.num_experts)]
        return [name for name in (f"{site.name}.expert", *numbered) if name in tensors]

    return [[int(tensors[name]) for name in names(site)] for site in sites]
