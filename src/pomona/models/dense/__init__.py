"""Dense families that can be reconstructed, by `model_type`: one file each."""

from pomona.errors import PomonaError
from pomona.models.dense.family import (
    Container,
    DenseFamily,
    GatedFFN,
    MixtureLayer,
    MixtureSizes,
)
from pomona.models.dense.llama import LLAMA
from pomona.models.dense.mistral import MISTRAL
from pomona.models.dense.pruned import pruned_container
from pomona.models.dense.qwen2 import QWEN2
from pomona.models.dense.qwen3 import QWEN3
from pomona.models.weights import Checkpoint

DENSE_FAMILIES: dict[str, DenseFamily] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}

__all__ = [
    "DENSE_FAMILIES",
    "Container",
    "DenseFamily",
    "GatedFFN",
    "MixtureLayer",
    "MixtureSizes",
    "container_of",
    "dense_family",
]


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


def container_of(family: DenseFamily, sizes: MixtureSizes) -> Container:
    """Return the stock architecture for a result of these sizes; a single expert stays dense.

    Raises `PomonaError` where no architecture of the family holds a shared expert or a bias.
    """
    if sizes.experts == 1:
        return pruned_container(family.mlp)
    if sizes.biased:
        raise PomonaError(
            f"{family.mixture.name} has no home for a bias on an expert's down_proj; use the "
            "compensation ridge or none"
        )
    if not sizes.shared:
        return family.mixture
    if family.with_shared is None:
        raise PomonaError(f"{family.mixture.name} has no shared expert; use shared 0")
    return family.with_shared
