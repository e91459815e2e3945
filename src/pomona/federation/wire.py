"""The form in which an update travels: as it is, in eight bits, or in integers to be summed."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pomona.federation.compression import compress, compressed_form, error_of, restore, with_error
from pomona.federation.secure_sum import in_integers
from pomona.federation.settings import FederateSettings
from pomona.federation.update import Update


def to_wire(
    settings: FederateSettings,
    sent: Mapping[str, Tensor],
    update: Update,
    memory: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> tuple[Update, Mapping[str, Tensor]]:
    """Return an update as it travels, and what its client remembers with what that has lost.

    `sent` is what the client began with, `before` what it remembered then.
    """
    if settings.secure_aggregation:
        return replace(update, shared=in_integers(sent, update)), memory
    if settings.compression == "none":
        return update, memory
    compressed = compress(sent, update.shared, error_of(before))
    update = replace(update, shared=compressed.shared, wire=compressed.wire)
    return update, with_error(memory, compressed.error)


def wire_form(
    settings: FederateSettings, sent: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return stand-ins of what travels of an update's tensors: names, types and shapes."""
    if settings.secure_aggregation:
        return {
            n: torch.empty(v.shape, dtype=torch.int64, device="meta") for n, v in tensors.items()
        }
    return compressed_form(sent, tensors) if settings.compression == "int8" else dict(tensors)


def from_wire(
    settings: FederateSettings, sent: Mapping[str, Tensor], wire: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return an update's tensors from what has travelled; those that are to be summed as they are."""
    return restore(sent, wire) if settings.compression == "int8" else dict(wire)
