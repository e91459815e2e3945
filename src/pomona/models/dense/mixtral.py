"""Mixtral as the container of a reconstructed model.

Routing is top-k, then softmax over the chosen logits: what DIVE uses (arXiv 2506.09351). Names on disk
are the hub's, so that plain transformers, vLLM and llama.cpp read them.
"""

from typing import Any

from transformers import MixtralConfig

EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"
PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

_KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "attention_dropout",
    "sliding_window",
    "dtype",
    "torch_dtype",
)


def mixtral_config(dense: dict[str, Any], experts: int, active: int, width: int) -> dict[str, Any]:
    """Return a stock Mixtral config.json for a dense Llama-like config."""
    kept = {key: dense[key] for key in _KEPT if key in dense}
    kept.setdefault("tie_word_embeddings", False)
    kept.setdefault("sliding_window", None)
    config = MixtralConfig(
        **kept,
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=active,
        output_router_logits=False,
        router_jitter_noise=0.0,
        architectures=["MixtralForCausalLM"],
    )
    return config.to_dict()
