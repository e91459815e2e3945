"""Dense families that can be reconstructed, by `model_type`: one file each."""

from pomona.errors import PomonaError
from pomona.models.dense.family import DenseFamily
from pomona.models.dense.llama import LLAMA
from pomona.models.dense.mistral import MISTRAL
from pomona.models.weights import Checkpoint

DENSE_FAMILIES: dict[str, DenseFamily] = {"llama": LLAMA, "mistral": MISTRAL}

__all__ = ["DENSE_FAMILIES", "DenseFamily", "dense_family"]


def dense_family(checkpoint: Checkpoint) -> DenseFamily:
    """Return the family of a dense checkpoint; raises `PomonaError` listing those that work."""
    kind = checkpoint.config.get("model_type")
    known = ", ".join(DENSE_FAMILIES)
    if kind in DENSE_FAMILIES:
        DENSE_FAMILIES[kind].check(checkpoint)
        return DENSE_FAMILIES[kind]
    experts = any(
        key in checkpoint.config for key in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    reason = "is a mixture of experts already, not dense" if experts else "is not supported"
    raise PomonaError(
        f'{checkpoint.folder}: model type "{kind}" {reason}; reconstruct works on {known}'
    )
