"""Granite-MoE-Shared: experts beside one ungated shared expert; for Llama with shared channels.

Its multipliers are set to what Llama computes: attention is scaled by 1/√head_dim, the rest by one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.models.dense.configs import full_config, mixture_config
from pomona.models.dense.family import Container, GatedFFN, MixtureLayer, MixtureSizes


def _config(dense: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    full = full_config(dense)
    if full.get("sliding_window"):
        raise PomonaError(
            "Granite-MoE-Shared, which would hold the shared channels, has no sliding window and the "
            "dense model has one; use shared 0"
        )
    head = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    return mixture_config(
        dense,
        "granitemoeshared",
        intermediate_size=sizes.width,
        shared_intermediate_size=sizes.shared,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.active,
        attention_multiplier=head**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        architectures=["GraniteMoeSharedForCausalLM"],
    )


def _tensors(number: int, layer: MixtureLayer) -> Iterator[tuple[str, Tensor]]:
    block = f"model.layers.{number}.block_sparse_moe"
    yield f"{block}.router.layer.weight", layer.router_ED
    yield f"{block}.input_linear.weight", torch.stack([_inward(e) for e in layer.experts])
    yield f"{block}.output_linear.weight", torch.stack([e.down_DW for e in layer.experts])
    if layer.shared is not None:
        shared = f"model.layers.{number}.shared_mlp"
        yield f"{shared}.input_linear.weight", _inward(layer.shared)
        yield f"{shared}.output_linear.weight", layer.shared.down_DW


def _inward(ffn: GatedFFN) -> Tensor:
    return torch.cat([ffn.gate_WD, ffn.up_WD])


GRANITE_SHARED = Container("Granite-MoE-Shared", _config, _tensors)
