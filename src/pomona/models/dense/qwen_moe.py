"""Qwen2-MoE and Qwen3-MoE: the containers of the dense Qwen2 (biases) and Qwen3 (q/k norms).

With `norm_topk_prob` their routing is Mixtral's: the softmax over the chosen logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.models.dense.configs import full_config, mixture_config
from pomona.models.dense.family import Container, GatedFFN, MixtureLayer, MixtureSizes

_EMPTY = 8  # channels of the shared expert that Qwen2-MoE always has, all zero where there is none


@dataclass(frozen=True)
class _Qwen:
    kind: str
    architecture: str
    shares: bool

    def config(self, dense: dict[str, Any], sizes: MixtureSizes) -> dict[str, Any]:
        shared = {"shared_expert_intermediate_size": sizes.shared or _EMPTY}
        own = shared if self.shares else _one_window(dense)
        return mixture_config(
            dense,
            self.kind,
            intermediate_size=sizes.width,
            moe_intermediate_size=sizes.width,
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.active,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            architectures=[self.architecture],
            **own,
        )

    def tensors(self, number: int, layer: MixtureLayer) -> Iterator[tuple[str, Tensor]]:
        block = f"model.layers.{number}.mlp"
        yield f"{block}.gate.weight", layer.router_ED
        for e, expert in enumerate(layer.experts):
            yield from _ffn(f"{block}.experts.{e}", expert)
        if self.shares:
            yield from _halved(block, layer)


def _one_window(dense: dict[str, Any]) -> dict[str, Any]:
    """Return Qwen3-MoE's settings of the sliding window, which all of its layers have or none.

    Raises `PomonaError` for a dense model with a window in some layers only.
    """
    full = full_config(dense)
    kinds = set(full["layer_types"]) if full["use_sliding_window"] else set[str]()
    if len(kinds) > 1:
        raise PomonaError(
            "Qwen3-MoE, which would hold the result, has a sliding window in all layers or none, and the "
            "dense model has one in some (use_sliding_window, layer_types); only pruning, with experts 1, "
            "keeps that"
        )
    return {"use_sliding_window": False} if kinds == {"full_attention"} else {}


def _ffn(prefix: str, ffn: GatedFFN) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}.gate_proj.weight", ffn.gate_WD
    yield f"{prefix}.up_proj.weight", ffn.up_WD
    yield f"{prefix}.down_proj.weight", ffn.down_DW


def _halved(block: str, layer: MixtureLayer) -> Iterator[tuple[str, Tensor]]:
    """Yield Qwen2-MoE's shared expert: its gate is σ(0) = ½ of everything, so twice the weights."""
    like = layer.router_ED
    shared = layer.shared
    if shared is None:
        zero_WD = like.new_zeros(_EMPTY, like.shape[1])
        shared = GatedFFN(zero_WD, zero_WD.clone(), zero_WD.T.contiguous())
    double = GatedFFN(shared.gate_WD, shared.up_WD, 2 * shared.down_DW)
    yield from _ffn(f"{block}.shared_expert", double)
    yield f"{block}.shared_expert_gate.weight", torch.zeros_like(like[:1])


_QWEN2 = _Qwen("qwen2_moe", "Qwen2MoeForCausalLM", shares=True)
_QWEN3 = _Qwen("qwen3_moe", "Qwen3MoeForCausalLM", shares=False)
QWEN2_MOE = Container("Qwen2-MoE", _QWEN2.config, _QWEN2.tensors)
QWEN3_MOE = Container("Qwen3-MoE", _QWEN3.config, _QWEN3.tensors)
