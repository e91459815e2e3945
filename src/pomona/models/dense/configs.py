"""What a mixture's config.json takes over from the dense one."""

from typing import Any

from transformers import CONFIG_MAPPING

_SAME = (
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
    "attention_bias",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "dtype",
)


def full_config(dense: dict[str, Any]) -> dict[str, Any]:
    """Return a dense config with its own family's defaults written out.

    What a config.json leaves out means its own family's default, and the mixture's defaults for rotary
    base, key-value heads, normalisation and sliding window are different ones.
    """
    return CONFIG_MAPPING[dense["model_type"]](**dense).to_dict()


def mixture_config(dense: dict[str, Any], kind: str, **own: Any) -> dict[str, Any]:
    """Return the config.json of a stock mixture of `model_type` `kind` for a dense config."""
    full = full_config(dense)
    config_class = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), "head_dim"}
    kept = {key: full[key] for key in _SAME if key in full and key in known}
    settings: dict[str, Any] = {**kept, **own, "output_router_logits": False}
    return config_class(**settings).to_dict()
