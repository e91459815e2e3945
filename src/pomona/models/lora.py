"""LoRA of C clients on the projections of one frozen model.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Every tensor carries the
client dimension first: A [C, R, in], B [C, out, R]; a real site is C = 1. Tokens are client-major, and a
`Split` tells where each client's begin. The fused experts of a mixture can have it too (`expert_lora`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pomona.errors import PomonaError
from pomona.models.attachment import Attachment, join_attachments
from pomona.models.expert_lora import attach_expert_lora, expert_sizes
from pomona.models.experts import ExpertSite, find_expert_sites
from pomona.models.split import Present, Split

ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates W + (alpha / rank) · B · A of the attention projections.

    The default is what FLEx shares: q, k and v (arXiv 2506.00965, section 3).

    Attributes:
        rank: Rows of A.
        alpha: The factor in front of B · A is this over `rank`.
        targets: Last components of module names, as in PEFT's `target_modules`.
        layers: Only these decoder layers (PEFT's `layers_to_transform`); none named: all.
        experts: LoRA on every pretrained expert of these layers too.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ATTENTION
    layers: tuple[int, ...] = ()
    experts: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PomonaError(f"LoRA rank {self.rank} is not positive; use 1 or more")
        if not math.isfinite(self.alpha):
            raise PomonaError(f"LoRA alpha {self.alpha} is not finite; use for example 16")
        if not self.targets:
            raise PomonaError('LoRA targets are empty; name projections such as "q_proj"')

    @property
    def scaling(self) -> float:
        """The factor alpha / rank in front of B · A."""
        return self.alpha / self.rank


def find_projections(model: nn.Module, lora: LoRA) -> dict[str, nn.Linear]:
    """Return the linear layers whose last name component is a target, by dotted name.

    Raises `PomonaError` naming a target or a layer that the model does not have, with those it does.
    """
    targets = lora.targets
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {name: module for name, module in linear.items() if name.rpartition(".")[2] in targets}
    missing = sorted(set(targets) - {name.rpartition(".")[2] for name in found})
    if missing:
        present = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise PomonaError(
            f'LoRA target "{missing[0]}" is no linear layer of this {type(model).__name__}; '
            f"its linear layers are called {present}"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    outer = next((name for name, module in found.items() if module is head), None)
    if outer is not None:
        raise PomonaError(
            f'LoRA target "{outer}" is the output embedding, which sees answer tokens only; name projections '
            "of the layers"
        )
    present = {_layer(name) for name in found}
    absent = sorted(set(lora.layers) - present)
    if absent:
        raise PomonaError(
            f"LoRA layer {absent[0]} has none of the targets; layers {min(present)} to {max(present)} do"
        )
    return {n: m for n, m in found.items() if not lora.layers or _layer(n) in lora.layers}


def _layer(name: str) -> int:
    """Return the number in a module's name, −1 without one."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[0] if numbers else -1


def find_tuned_experts(model: nn.Module, lora: LoRA) -> list[ExpertSite]:
    """Return the sites whose experts have LoRA too, none unless `experts` says so."""
    sites = find_expert_sites(model) if lora.experts else []
    return [site for site in sites if not lora.layers or site.layer in lora.layers]


def init_lora(model: nn.Module, lora: LoRA, generator: torch.Generator) -> dict[str, Tensor]:
    """Return one client's fresh LoRA: A [R, in] uniform as in PEFT, B [out, R] zero; float32.

    Of experts, [E, R, in] and [E, out, R].
    """
    tensors: dict[str, Tensor] = {}
    for name, module in find_projections(model, lora).items():
        pair = low_rank_pair(module.in_features, module.out_features, lora.rank, generator)
        tensors |= {f"{name}.{factor}": value for factor, value in pair.items()}
    for site in find_tuned_experts(model, lora):
        for part, (size_in, size_out) in expert_sizes(site).items():
            pairs = [
                low_rank_pair(size_in, size_out, lora.rank, generator)
                for _ in range(site.num_experts)
            ]
            for factor in ("lora_A", "lora_B"):
                tensors[f"{site.name}.{part}.{factor}"] = torch.stack([p[factor] for p in pairs])
    return tensors


def low_rank_pair(
    size_in: int, size_out: int, rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return `lora_A` [R, in] and `lora_B` [out, R] whose product is zero.

    A is uniform in ±1/√in: what `kaiming_uniform_(a=√5)` gives, the initialisation of PEFT.
    """
    bound = 1 / math.sqrt(size_in)
    a_RI = torch.empty(rank, size_in).uniform_(-bound, bound, generator=generator)
    return {"lora_A": a_RI, "lora_B": torch.zeros(size_out, rank)}


def narrowed(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return an adapter's first `rank` directions: rows of every A, columns of every B."""
    return {name: _first(name, value, rank) for name, value in tensors.items()}


def of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return an adapter of the same shape with zeros beyond its first `rank` directions.

    Where both factors are zero so are both gradients: training leaves them so, and clients of several ranks
    share a cohort.
    """
    cut: dict[str, Tensor] = {}
    for name, value in tensors.items():
        cut[name] = torch.zeros_like(value)
        _first(name, cut[name], rank).copy_(_first(name, value, rank))
    return cut


def widened(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `narrowed` has cut at its full rank again, zeros beyond; `like` has the shapes."""
    whole: dict[str, Tensor] = {}
    for name, value in tensors.items():
        whole[name] = value
        if name in like and like[name].shape != value.shape:
            whole[name] = torch.zeros_like(like[name])
            rank = value.shape[-2] if name.endswith("lora_A") else value.shape[-1]
            _first(name, whole[name], rank).copy_(value)
    return whole


def _first(name: str, value: Tensor, rank: int) -> Tensor:
    """Return a view of a factor's first directions; what is no factor is whole."""
    if not name.endswith(("lora_A", "lora_B")):
        return value
    place = value.ndim - (2 if name.endswith("lora_A") else 1)
    return value.narrow(place, 0, min(rank, value.shape[place]))


@dataclass(frozen=True)
class Factors:
    """The low-rank update of a projection: A [C, R, in], B [C, out, R], maybe one more product [C, out, in]."""

    a_CRI: Tensor = field(repr=False)
    b_COR: Tensor = field(repr=False)
    scaling: float
    residual_COI: Tensor | None = field(default=None, repr=False)

    def __call__(self, x_NI: Float[Tensor, "N I"], split: Split) -> Float[Tensor, "N O"]:
        """Return scaling · B · A · x of every token's own client, in the dtype of the factors."""
        x_NI = x_NI.to(self.a_CRI.dtype)
        update_NO = split.product(split.product(x_NI, self.a_CRI.mT), self.b_COR.mT)
        if self.residual_COI is not None:
            update_NO = update_NO + split.product(x_NI, self.residual_COI.mT)
        return update_NO if self.scaling == 1 else update_NO * self.scaling


def joined(several: Sequence[Factors]) -> Factors:
    """Return updates of one projection as one of all their directions: two products instead of two for each."""
    if len(several) == 1:
        return several[0]
    residuals = [f.residual_COI * f.scaling for f in several if f.residual_COI is not None]
    return Factors(
        torch.cat([f.a_CRI for f in several], dim=1),
        torch.cat([f.b_COR * f.scaling for f in several], dim=2),
        1.0,
        sum(residuals[1:], residuals[0]) if residuals else None,
    )


def attach_lora(
    model: nn.Module,
    lora: LoRA,
    tensors: Mapping[str, Tensor],
    present: Present | None = None,
) -> Attachment:
    """Hook stacked LoRA (`NAME.lora_A` [C, R, in], `NAME.lora_B` [C, out, R]) onto a model.

    A `NAME.residual` [C, out, in] counts as one more product B · A. The base keeps its parameters and
    their names; gradients flow to `tensors`.
    """
    return attach_loras(model, [(lora, tensors)], present or Present())


def attach_loras(
    model: nn.Module, adapters: Sequence[tuple[LoRA, Mapping[str, Tensor]]], present: Present
) -> Attachment:
    """Hook several stacked LoRAs onto a model: what meets in a projection is computed together."""
    updates: dict[nn.Module, list[Factors]] = {}
    experts: list[Attachment] = []
    for lora, tensors in adapters:
        for name, module in find_projections(model, lora).items():
            pair = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
            factors = Factors(*pair, lora.scaling, tensors.get(f"{name}.residual"))
            updates.setdefault(module, []).append(factors)
        tuned = find_tuned_experts(model, lora)
        experts.append(attach_expert_lora(tuned, lora.scaling, tensors, present))
    handles = [
        module.register_forward_hook(_adding(several, present))
        for module, several in updates.items()
    ]
    return join_attachments([Attachment(tuple(handles)), *experts])


def _adding(several: Sequence[Factors], present: Present):
    clients = len(several[0].a_CRI)

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_NI = args[0].flatten(0, -2)
        update_NO = joined(several)(x_NI, present.of(x_NI, clients))
        return output + update_NO.reshape(output.shape).to(output.dtype)

    return hook
