"""A federated shared expert: one more expert in every MoE layer that everybody trains together.

Where all pretrained experts are frozen and only attention is shared, clients cannot add to the model's
FFNs together; this is the answer. It is a graft in all but ownership: it grows from the same resident
experts at everybody, and what is trained of it belongs to the adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pomona.errors import PomonaError
from pomona.federation.graft import (
    Graft,
    GraftGate,
    GraftWeights,
    attach_graft,
    choose_experts,
    expert_indices,
    init_graft,
)
from pomona.federation.selection.same import SameExpert
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.split import Present

_PREFIX = "shared_expert."


@dataclass(frozen=True)
class SharedGraft:
    """What a recipe says of the shared expert. It is born silent, the same at every client.

    Attributes:
        expert: The pretrained expert it grows from, in every layer; without it one is drawn per layer.
        gate: As a graft's.
        bias: As a graft's.
        weights: As a graft's.
        rank: As a graft's.
        alpha: As a graft's.
    """

    expert: int | None = None
    gate: GraftGate = "none"
    bias: bool = False
    weights: GraftWeights = "lora"
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        try:
            _ = self.graft
        except PomonaError as error:
            raise PomonaError(f"shared_expert: {error}") from error

    @property
    def graft(self) -> Graft:
        """The graft that it is in all but ownership."""
        return Graft(
            selection=SameExpert(self.expert),
            gate=self.gate,
            bias=self.bias,
            weights=self.weights,
            rank=self.rank,
            alpha=self.alpha,
        )

    def on(self, model: nn.Module, sites: Sequence[ExpertSite]) -> "SharedExpert":
        """Choose the experts; raises `PomonaError` when a layer does not have the expert."""
        (chosen,) = choose_experts(model, sites, self.graft, [()], [0])
        return SharedExpert(self.graft, tuple(map(tuple, chosen)))


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of one model: how it is trained, and which experts of each site it grows from."""

    graft: Graft
    experts: tuple[tuple[int, ...], ...] = field(repr=False)

    def init(self, sites: Sequence[ExpertSite], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the newborn's tensors, under names that are no LoRA's of the adapter."""
        born = init_graft(sites, self.graft, self.experts, generator)
        return {f"{_PREFIX}{n}": v for n, v in born.items() if not n.endswith(".expert")}

    def attach(
        self, sites: Sequence[ExpertSite], adapter: Mapping[str, Tensor], present: Present
    ) -> Attachment:
        """Hook the part of a stacked adapter [C, …] that is the shared expert onto its sites."""
        own = expert_part(adapter)
        clients = len(next(iter(own.values())))
        indices = {n: v.expand(clients) for n, v in self.indices(sites).items()}
        return attach_graft(sites, self.graft, {**own, **indices}, present)

    def as_graft(
        self, sites: Sequence[ExpertSite], adapter: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return one adapter's shared expert as a graft has it: with the experts it grew from."""
        return {**expert_part(adapter), **self.indices(sites)}

    def indices(self, sites: Sequence[ExpertSite]) -> dict[str, Tensor]:
        """Return the experts it grows from as tensors of a graft [], by name."""
        return expert_indices(sites, self.graft, self.experts)


def lora_part(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter without its shared expert: what PEFT knows."""
    return {n: v for n, v in adapter.items() if not n.startswith(_PREFIX)}


def expert_part(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the shared expert of an adapter, named as a graft; empty where there is none."""
    return {n.removeprefix(_PREFIX): v for n, v in adapter.items() if n.startswith(_PREFIX)}


def as_adapter(graft: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a graft is trained, as the part of an adapter that it is."""
    return {f"{_PREFIX}{n}": v for n, v in graft.items() if not n.endswith(".expert")}
