"""The dense architecture itself, narrower: what one "expert" makes (static pruning)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.models.dense.family import Container, MixtureLayer, MixtureSizes


def pruned_container(mlp: str) -> Container:
    """Return the container that keeps a dense family's own architecture; `mlp` as in `DenseFamily`."""

    def tensors(number: int, layer: MixtureLayer) -> Iterator[tuple[str, Tensor]]:
        prefix, (ffn,) = mlp.format(layer=number), layer.experts
        yield f"{prefix}.gate_proj.weight", ffn.gate_WD
        yield f"{prefix}.up_proj.weight", ffn.up_WD
        yield f"{prefix}.down_proj.weight", ffn.down_DW
        if ffn.bias_D is not None:
            yield f"{prefix}.gate_proj.bias", torch.zeros_like(ffn.gate_WD[:, 0])
            yield f"{prefix}.up_proj.bias", torch.zeros_like(ffn.up_WD[:, 0])
            yield f"{prefix}.down_proj.bias", ffn.bias_D

    return Container("the dense architecture itself", _config, tensors)


def _config(dense: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    narrow = dense | {"intermediate_size": sizes.width}
    if not sizes.biased:
        return narrow
    if dense["model_type"] != "llama":
        raise PomonaError(
            f"{dense['model_type']} has no home for a bias on down_proj; use the compensation ridge "
            "or none"
        )
    return narrow | {"mlp_bias": True}
