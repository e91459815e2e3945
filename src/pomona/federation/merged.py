"""A client's parts as plain weights: LoRA added to what it changes, private experts as gated FFNs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft, private_experts
from pomona.federation.private_expert import PrivateExpert
from pomona.federation.shared_expert import lora_part
from pomona.federation.update import ClientState
from pomona.models.expert_lora import PARTS
from pomona.models.experts import ExpertSite
from pomona.models.lora import LoRA, find_projections, find_tuned_experts


@dataclass(frozen=True)
class GatedExpert:
    """σ(⟨w, x⟩ + b) · FFN(x): gate and up [W, D], down [D, W], w [D], b []; without `w` it weighs one."""

    gate: Float[Tensor, "W D"] = field(repr=False)
    up: Float[Tensor, "W D"] = field(repr=False)
    down: Float[Tensor, "D W"] = field(repr=False)
    w: Float[Tensor, " D"] | None = field(default=None, repr=False)
    b: Float[Tensor, ""] | None = field(default=None, repr=False)


@torch.no_grad()
def merge_lora(base: FrozenBase, state: ClientState) -> None:
    """Add a client's LoRA, the shared and the private one, to the base's weights, where they lie."""
    if state.adapter:
        _merge(base, base.lora, lora_part(state.adapter))
    if state.personal and base.personal is not None:
        _merge(base, base.personal, state.personal)


def _merge(base: FrozenBase, lora: LoRA, tensors: Mapping[str, Tensor]) -> None:
    for name, module in find_projections(base.model, lora).items():
        weight_OI = module.weight
        change_OI = _product(tensors, name, lora.scaling, weight_OI)
        if (residual_OI := tensors.get(f"{name}.residual")) is not None:
            change_OI = change_OI + lora.scaling * residual_OI.to(weight_OI)
        weight_OI.add_(change_OI)
    for site in find_tuned_experts(base.model, lora):
        for part in PARTS:
            own = {n: v for n, v in tensors.items() if n.startswith(f"{site.name}.{part}.")}
            for expert in range(site.num_experts):
                one = {name: value[expert] for name, value in own.items()}
                weight_OI = site.weight(part, expert)
                weight_OI.add_(_product(one, f"{site.name}.{part}", lora.scaling, weight_OI))


@torch.no_grad()
def grown_experts(base: FrozenBase, state: ClientState) -> dict[str, list[GatedExpert]]:
    """Return what a client's grafts and its shared expert add to every site, as gated FFNs.

    A graft under the router's own weight becomes part of the expert that it grew from, in the base's weights.
    Raises `PomonaError` for experts that are no plain SiLU-gated FFNs.
    """
    grown: dict[str, list[GatedExpert]] = {}
    parts: list[tuple[Graft, Mapping[str, Tensor]]] = []
    if state.adapter and base.shared_expert is not None:
        together = base.shared_expert
        parts.append((together.graft, together.as_graft(base.sites, state.adapter)))
    if state.graft and base.graft is not None:
        parts.append((base.graft, state.graft))
    tuned = [lora for lora in (base.lora if state.adapter else None, base.personal) if lora]
    changing = [graft for graft, _ in parts if graft.gate == "resident"]
    if len(changing) + sum(lora.experts for lora in tuned) > 1:
        raise PomonaError(
            "two parts (LoRA on the experts, grafts under the router's weight) each change an expert by "
            "itself, which is no expert of a checkpoint; they are used as they are, by pomona.load_personal"
        )
    for site in base.sites if parts else ():
        pairs = [
            (graft, private)
            for graft, tensors in parts
            for private in private_experts(
                site, graft, {n: v.to(_device(site))[None] for n, v in tensors.items()}
            )
        ]
        found = [
            _gated(site, graft, private) for graft, private in pairs if graft.gate != "resident"
        ]
        for graft, private in pairs:
            if graft.gate == "resident":
                _into_resident(site, graft, private)
        if found:
            grown[site.name] = found
    return grown


def _gated(site: ExpertSite, graft: Graft, private: PrivateExpert) -> GatedExpert:
    (resident,) = private.residents
    own, own_bias = _own(site, private)
    if not site.plain or own_bias:
        raise PomonaError(
            f"{site.name} has experts with biases or a gate that is no SiLU; a graft on them is used as it is, "
            "by pomona.load_personal, and has no place in another checkpoint"
        )
    gate_WD, up_WD, down_DW = own["gate"], own["up"], own["down"]
    if graft.form == "delta":
        expert = site.expert(resident)
        gate_WD, up_WD = torch.cat([gate_WD, expert.gate]), torch.cat([up_WD, expert.up])
        down_DW = torch.cat([down_DW, -expert.down], dim=1)
    if not graft.trains_gate:
        return GatedExpert(gate_WD, up_WD, down_DW)
    bias = private.tensors.get("gate_bias")
    gate_D = private.tensors["gate"][0]
    return GatedExpert(gate_WD, up_WD, down_DW, gate_D, None if bias is None else bias[0])


def _into_resident(site: ExpertSite, graft: Graft, private: PrivateExpert) -> None:
    if graft.form != "delta":
        raise PomonaError(
            'a graft of the form "copy" under the router\'s weight is no expert of a checkpoint; it is used as '
            "it is, by pomona.load_personal"
        )
    expert = site.expert(private.residents[0])
    own, biases = _own(site, private)
    for name, value in {**own, **{f"{name}_bias": value for name, value in biases.items()}}.items():
        getattr(expert, name).copy_(value)


def _own(site: ExpertSite, private: PrivateExpert) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a private expert's weights and biases: the resident's, and what was trained."""
    expert = site.expert(private.residents[0])
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    tensors = {name: value[0] for name, value in private.tensors.items()}
    for part in ("gate", "up", "down"):
        weight_OI = getattr(expert, part)
        change_OI = tensors.get(f"{part}.delta")
        if change_OI is None:
            change_OI = _product(tensors, part, private.scaling, weight_OI)
        weights[part] = weight_OI + change_OI.to(weight_OI)
        bias_O = getattr(expert, f"{part}_bias")
        if bias_O is not None:
            more_O = tensors.get(f"{part}.delta_bias", torch.zeros_like(bias_O))
            biases[part] = bias_O + more_O.to(bias_O)
    return weights, biases


def _product(tensors: Mapping[str, Tensor], name: str, scaling: float, like: Tensor) -> Tensor:
    a_RI, b_OR = (tensors[f"{name}.{factor}"].to(like.device) for factor in ("lora_A", "lora_B"))
    return (scaling * (b_OR.double() @ a_RI.double())).to(like.dtype)


def _device(site: ExpertSite) -> torch.device:
    return site.weight("down_proj", 0).device


def concatenated(experts: Sequence[GatedExpert]) -> GatedExpert | None:
    """Return several experts as one, where they are all weighed alike: by one, or there is just one."""
    if len(experts) == 1:
        return experts[0]
    if any(expert.w is not None for expert in experts):
        return None
    return GatedExpert(
        torch.cat([expert.gate for expert in experts]),
        torch.cat([expert.up for expert in experts]),
        torch.cat([expert.down for expert in experts], dim=1),
    )
