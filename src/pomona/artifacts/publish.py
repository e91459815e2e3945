"""The folders that a user keeps of a run: what was shared, and what each client has of its own."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pomona.artifacts.graft_format import write_graft
from pomona.artifacts.origin import ORIGIN, Origin
from pomona.federation.graft import Graft
from pomona.models.lora import LoRA
from pomona.models.peft_format import write_adapter


def publish_shared(run: Path, lora: LoRA, tensors: Mapping[str, Tensor], origin: Origin) -> None:
    """Write the shared part as a PEFT adapter folder."""
    _adapter(run / "shared", lora, tensors, origin)


def publish_adapter(
    run: Path, client: str, lora: LoRA, tensors: Mapping[str, Tensor], origin: Origin
) -> None:
    """Write the private adapter of one client."""
    _adapter(run / "clients" / client / "adapter", lora, tensors, origin)


def publish_personal(
    run: Path, client: str, lora: LoRA, tensors: Mapping[str, Tensor], origin: Origin
) -> None:
    """Write the private LoRA that one client has beside the adapter."""
    _adapter(run / "clients" / client / "personal", lora, tensors, origin)


def publish_graft(
    run: Path, client: str, graft: Graft, tensors: Mapping[str, Tensor], origin: Origin
) -> None:
    """Write the private expert of one client."""
    folder = run / "clients" / client / "graft"
    shutil.rmtree(folder, ignore_errors=True)
    write_graft(folder, graft, tensors, origin)


def _adapter(folder: Path, lora: LoRA, tensors: Mapping[str, Tensor], origin: Origin) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write_adapter(folder, lora, tensors, origin.model, {ORIGIN: origin.to_json()})
