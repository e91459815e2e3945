"""C clients on one frozen model: what is trained together and hooked on together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pomona.federation.graft import Graft, attach_graft, init_graft
from pomona.federation.rehearsal import Rehearsed
from pomona.federation.shared_expert import SharedExpert, lora_part
from pomona.federation.update import ClientState, stack
from pomona.models.attachment import Attachment, join_attachments
from pomona.models.experts import ExpertSite
from pomona.models.lora import LoRA, attach_loras, init_lora
from pomona.models.packing import follow
from pomona.models.placement import device_of
from pomona.models.split import Present
from pomona.seeds import torch_generator


@dataclass(frozen=True)
class FrozenBase:
    """The frozen base with the rules by which clients' parameters hang on it.

    With `packs` clients' rows are computed packed (`models.packing`), else padded side by side.
    """

    model: PreTrainedModel = field(repr=False)
    lora: LoRA
    graft: Graft | None = None
    sites: tuple[ExpertSite, ...] = field(default=(), repr=False)
    personal: LoRA | None = None
    shared_expert: SharedExpert | None = None
    rehearsed: Rehearsed | None = field(default=None, repr=False)
    packs: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model computes; clients' states lie in memory between their turns."""
        return device_of(self.model)

    def init_adapter(self, seed: int) -> dict[str, Tensor]:
        """Return a fresh adapter, the same for everybody who gives the same seed."""
        adapter = init_lora(self.model, self.lora, torch_generator(seed, "adapter"))
        if self.shared_expert is None:
            return adapter
        generator = torch_generator(seed, "shared expert")
        return adapter | self.shared_expert.init(self.sites, generator)

    def init_graft(
        self, seed: int, client: str, experts: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """Return a client's newborn grafts on each site's chosen experts, if anything is grafted."""
        if self.graft is None:
            return {}
        generator = torch_generator(seed, "graft", client)
        return init_graft(self.sites, self.graft, experts, generator)

    def init_personal(self, seed: int, client: str) -> dict[str, Tensor]:
        """Return a client's newborn private LoRA; empty when there is none."""
        if self.personal is None:
            return {}
        return init_lora(self.model, self.personal, torch_generator(seed, "personal", client))

    def attach(self, state: ClientState) -> Attachment:
        """Hook a cohort's stacked state [C, …] onto the model; any part may be empty."""
        state = state.to(self.device)
        present = Present()
        parts = [follow(self.model, present)]
        adapters: list[tuple[LoRA, Mapping[str, Tensor]]] = []
        if state.adapter:
            adapters.append((self.lora, lora_part(state.adapter)))
        if state.personal and self.personal is not None:
            adapters.append((self.personal, state.personal))
        parts.append(attach_loras(self.model, adapters, present))
        if state.adapter and self.shared_expert is not None:
            parts.append(self.shared_expert.attach(self.sites, state.adapter, present))
        if state.graft and self.graft is not None:
            parts.append(attach_graft(self.sites, self.graft, state.graft, present))
        return join_attachments(parts)

    def attach_one(self, state: ClientState) -> Attachment:
        """Hook one client's state: a cohort of one, whose batches may have any number of rows."""
        return self.attach(stack([state]))
