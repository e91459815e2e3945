"""Write DeepSeek-MoE (v1, remote code) as the stock Qwen2-MoE checkpoint that computes the same.

transformers has no architecture `deepseek`. It is Llama's attention without biases, a dense first layer, routed
experts weighed by an unnormalised softmax, and shared experts that count fully (arXiv 2401.06066, section 3).
Qwen2-MoE has all of that but one thing: its shared expert is weighed by a sigmoid gate. With a gate of
zeros that is one half for every token, so `down_proj` of the shared expert is doubled, which no floating-point
number is rounded by.

    python scripts/deepseek_moe.py FOLDER OUT
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.models.weights import Checkpoint, write_sharded

ALIKE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "initializer_range",
    "tie_word_embeddings",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "bos_token_id",
    "eos_token_id",
)
# What this script takes for granted of a checkpoint; the published ones say so.
EXPECTED = {
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "rope_scaling": None,
}
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "generation_config.json")


def config_of(deepseek: dict[str, Any]) -> dict[str, Any]:
    """Return Qwen2-MoE's config.json; raises `PomonaError` for what that architecture cannot hold."""
    for key, value in EXPECTED.items():
        if deepseek.get(key, value) != value:
            raise PomonaError(
                f"config.json says {key} = {deepseek[key]!r}, and Qwen2-MoE computes only {value!r}; "
                "take a checkpoint that has that"
            )
    config = {key: deepseek[key] for key in ALIKE if key in deepseek}
    return config | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "dtype": deepseek.get("torch_dtype", "bfloat16"),
        "num_experts": deepseek["n_routed_experts"],
        "shared_expert_intermediate_size": deepseek["moe_intermediate_size"]
        * deepseek["n_shared_experts"],
        "mlp_only_layers": list(range(deepseek["first_k_dense_replace"])),
        "decoder_sparse_step": 1,
        "qkv_bias": False,
        "use_sliding_window": False,
    }


def tensors_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield Qwen2-MoE's tensors one by one."""
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        if ".shared_experts." not in name:
            yield name, tensor
            continue
        name = name.replace(".shared_experts.", ".shared_expert.")
        if name.endswith(".down_proj.weight"):
            gate = name.replace(".shared_expert.down_proj.", ".shared_expert_gate.")
            yield gate, torch.zeros(1, len(tensor), dtype=tensor.dtype)
            tensor = 2 * tensor
        yield name, tensor


def convert(source: Path, out: Path) -> None:
    """Write the folder `out`, which must not exist."""
    checkpoint = Checkpoint.open(source)
    config = config_of(checkpoint.config)
    out.mkdir(parents=True)
    write_sharded(out, tensors_of(checkpoint))
    for pattern in TOKENIZER:
        for path in source.glob(pattern):
            shutil.copy(path, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
