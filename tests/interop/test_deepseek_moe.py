"""DeepSeek-MoE written as Qwen2-MoE, against its own definition in a few lines on Llama's layers."""

import importlib.util
import json

import pytest
import torch
from conftest import ROOT, save_tokenizer
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as fn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pomona.errors import PomonaError
from pomona.models.experts import find_expert_sites

EXPERTS, ACTIVE, WIDTH, SHARED = 5, 3, 16, 2


def script():
    spec = importlib.util.spec_from_file_location("deepseek_moe", ROOT / "scripts/deepseek_moe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Gated(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x):
        return self.down_proj(fn.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepseekMoE(nn.Module):
    """y = shared(x) + Σ over the best of softmax(W x) of that probability times the expert (section 3)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Gated(size, WIDTH) for _ in range(EXPERTS))
        self.gate = nn.Linear(size, EXPERTS, bias=False)
        self.shared_experts = Gated(size, SHARED * WIDTH)

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        least = share.topk(ACTIVE, dim=-1).values[..., -1:]
        kept = torch.where(share >= least, share, 0.0)
        routed = sum(kept[..., e, None] * own(x) for e, own in enumerate(self.experts))
        return self.shared_experts(x) + routed


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek")
    config = {
        "vocab_size": save_tokenizer(folder),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekMoE(32)
    own = {
        "model_type": "deepseek",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
        "rope_theta": 10000.0,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": SHARED,
        "num_experts_per_tok": ACTIVE,
        "moe_intermediate_size": WIDTH,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config | own))
    save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return folder, model


def test_the_stock_checkpoint_computes_the_same(published, tmp_path):
    folder, model = published
    script().convert(folder, tmp_path / "out")
    found, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=tokens).logits for m in (found, model))
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [site.layer for site in find_expert_sites(found)] == [1, 2]
    assert (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize("change", [{"scoring_func": "sigmoid"}, {"moe_layer_freq": 2}])
def test_what_it_cannot_hold_is_refused(published, tmp_path, change):
    folder, _ = published
    (key,) = change
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(PomonaError, match=key):
        script().config_of(config)
