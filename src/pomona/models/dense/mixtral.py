"""Mixtral as the container of a reconstructed model.

Routing is top-k, then softmax over the chosen logits: what DIVE uses (arXiv 2506.09351). Names on disk
are the hub's, so that plain transformers, vLLM and llama.cpp read them.
"""

from typing import Any

from transformers import CONFIG_MAPPING, MixtralConfig

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
    "attention_dropout",
    "sliding_window",
    "dtype",
)


def mixtral_config(dense: dict[str, Any], experts: int, active: int, width: int) -> dict[str, Any]:
    """Return a stock Mixtral config.json for a dense Llama-like config.

    What the dense config.json leaves out has its own family's default, written out here: Mixtral's
    defaults for rotary base, key-value heads, normalisation and sliding window are different ones.
    """
    full = CONFIG_MAPPING[dense["model_type"]](**dense).to_dict()
    kept = {key: full[key] for key in _KEPT if key in full}
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
