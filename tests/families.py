"""One tiny random model per MoE family of transformers: the same sizes, every layout and router.

Weights are larger than a fresh initialisation's, biases included, so that experts differ, routers
decide and clamps bite; seeds are fixed.
"""

from collections.abc import Callable, Mapping

import torch
import transformers
from transformers import PreTrainedModel

HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS, VOCABULARY = 32, 16, 4, 2, 2, 64

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {  # the compressed attention of DeepSeek
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LOCAL = {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}
MULTIPLIERS = {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5}

_CONFIGS: dict[str, tuple[str, Mapping[str, object]]] = {
    "mixtral": ("Mixtral", LOCAL),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": 24,
            "intermediate_size": 48,
            "mlp_only_layers": [],
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "head_dim": 8,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS, "intermediate_size": WIDTH}),
    "flex_olmo": ("FlexOlmo", {"num_experts": EXPERTS, "intermediate_size": WIDTH}),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | ROUTED | {"routed_scaling_factor": 1.5, "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | ROUTED | {"n_group": 2, "topk_group": 2}),
    "gpt_oss": (
        "GptOss",
        LOCAL | {"head_dim": 8, "swiglu_limit": 1.0, "rope_parameters": {"rope_type": "default"}},
    ),
    "granitemoe": ("GraniteMoe", LOCAL | MULTIPLIERS),
    "granitemoeshared": (
        "GraniteMoeShared",
        LOCAL | MULTIPLIERS | {"shared_intermediate_size": 24},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "intermediate_size": 48,
            "moe_k": TOP_K,
            "num_hidden_layers": 3,
            "moe_num_shared_experts": 1,
        },
    ),
    "phimoe": ("Phimoe", LOCAL),
    "glm4_moe": ("Glm4Moe", ROUTED | {"head_dim": 8}),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "jamba": (
        "Jamba",
        {
            "num_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        LOCAL
        | {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        {"num_experts": EXPERTS, "intermediate_size": WIDTH, "moe_topk": TOP_K, "head_dim": 8},
    ),
}

# The numbers of the MoE layers where not every layer is one.
SPARSE_LAYERS = {
    "qwen3_moe": [0, 2],
    "deepseek_v2": [1, 2],
    "deepseek_v3": [1, 2],
    "glm4_moe": [1, 2],
    "ernie4_5_moe": [1, 2],
    "lfm2_moe": [1, 2],
    "jamba": [1, 3],
}


def build(prefix: str, settings: Mapping[str, object], suffix: str = "") -> PreTrainedModel:
    """Return a random float32 model of one architecture in evaluation mode."""
    config = getattr(transformers, f"{prefix}{suffix}Config")(**(COMMON | dict(settings)))
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 or "bias" in name else 0.0
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def _family(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: build(*_CONFIGS[name])


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: _family(name) for name in _CONFIGS}


def double(name: str) -> PreTrainedModel:
    """Return a family's model in float64, which only the eager experts compute."""
    model = FAMILIES[name]().double()
    model.set_experts_implementation("eager")
    return model


def llama() -> PreTrainedModel:
    """Return a dense model: no expert anywhere."""
    return build("Llama", {"intermediate_size": 48})


def llama4() -> PreTrainedModel:
    """Return the family whose experts are called in another way."""
    settings = LOCAL | {"intermediate_size_mlp": 48, "head_dim": 8, "num_experts_per_tok": 1}
    return build("Llama4", settings, suffix="Text")
