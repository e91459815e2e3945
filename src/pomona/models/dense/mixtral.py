"""Mixtral: experts and nothing else; the container of Llama and Mistral.

Routing is top-k, then softmax over the chosen logits: what DIVE uses (arXiv 2506.09351). Names on disk
are the hub's, so that plain transformers, vLLM and llama.cpp read them.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pomona.models.dense.configs import mixture_config
from pomona.models.dense.family import Container, MixtureLayer, MixtureSizes


def _config(dense: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
    return mixture_config(
        dense,
        "mixtral",
        intermediate_size=sizes.width,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.active,
        router_jitter_noise=0.0,
        architectures=["MixtralForCausalLM"],
    )


def _tensors(number: int, layer: MixtureLayer) -> Iterator[tuple[str, Tensor]]:
    block = f"model.layers.{number}.block_sparse_moe"
    yield f"{block}.gate.weight", layer.router_ED
    for e, expert in enumerate(layer.experts):
        yield f"{block}.experts.{e}.w1.weight", expert.gate_WD
        yield f"{block}.experts.{e}.w2.weight", expert.down_DW
        yield f"{block}.experts.{e}.w3.weight", expert.up_WD


MIXTRAL = Container("Mixtral", _config, _tensors)
