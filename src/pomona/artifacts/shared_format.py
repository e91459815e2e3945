"""An adapter as a folder: what PEFT knows, and in `expert/` the federated shared expert, if there is one.

PEFT loads the folder and passes over `expert/`, which is a graft folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pomona.artifacts.graft_format import read_graft, write_graft
from pomona.artifacts.origin import ORIGIN, Origin, origin_of_graft
from pomona.federation.cohort import FrozenBase
from pomona.federation.graft import Graft
from pomona.federation.shared_expert import as_adapter, lora_part
from pomona.models.lora import LoRA
from pomona.models.peft_format import read_adapter, write_adapter

EXPERT = "expert"


def write_shared(
    folder: Path, base: FrozenBase, adapter: Mapping[str, Tensor], origin: Origin
) -> None:
    """Write one adapter (no client dimension), its shared expert included."""
    beside = {ORIGIN: origin.to_json()}
    write_adapter(folder, base.lora, lora_part(adapter), origin.model, beside)
    if base.shared_expert is not None:
        grown = base.shared_expert.as_graft(base.sites, adapter)
        of_expert = origin_of_graft(origin, base, grown)
        write_graft(folder / EXPERT, base.shared_expert.graft, grown, of_expert)


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter's folder holds: LoRA with its tensors, and a shared expert as a graft has it."""

    lora: LoRA = field(default_factory=LoRA)
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    expert: Graft | None = None
    grown: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    @property
    def adapter(self) -> dict[str, Tensor]:
        """All of it, named as in a client's state."""
        return {**self.tensors, **as_adapter(self.grown)}


def read_shared(folder: Path) -> AdapterFolder:
    """Read the folder back; raises `PomonaError` when it is no adapter or a file of it is damaged."""
    lora, tensors = read_adapter(folder)
    if not (folder / EXPERT).is_dir():
        return AdapterFolder(lora, tensors)
    return AdapterFolder(lora, tensors, *read_graft(folder / EXPERT))
