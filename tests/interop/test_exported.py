"""A personal model exported as a stock checkpoint goes through llama.cpp's converter, every weight of it."""

import numpy as np
import pytest
from parts import Form, published
from safetensors.torch import load_file

from pomona.artifacts.export import export_personal

pytestmark = pytest.mark.interop


def test_a_personal_model_becomes_gguf(gguf_of, moe_dir, tmp_path):
    """The private expert is Qwen2-MoE's shared expert there, gate and all."""
    personal = published(moe_dir, tmp_path / "run", Form())["pears"]
    out = tmp_path / "out"
    assert export_personal(personal, out, dtype="float32").kind == "qwen2-moe"
    found = gguf_of(out, tmp_path / "model.gguf")
    weights = load_file(out / "model.safetensors")
    names = {
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        "mlp.gate": "ffn_gate_inp",
    }
    for layer in range(2):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            mine = found[f"blk.{layer}.{theirs}.weight"].reshape(weight.shape)
            np.testing.assert_array_equal(mine, weight.numpy())
    assert sum(array.size for array in found.values()) == sum(w.numel() for w in weights.values())
