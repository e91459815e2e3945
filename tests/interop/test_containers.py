"""What we write is what others read: plain transformers, llama.cpp's converter, names on disk."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from conftest import save_model, word_text
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pomona.models.loading import load_model
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.planners import TopChannels

DOMAINS = {name: [word_text(i * 50 + j, 40) for j in range(20)] for i, name in enumerate("abcd")}
SMALL = {"windows": 8, "length": 32, "affinity_windows": 4}
SHARED = {"active": 1, "keep": 0.25, "planner": TopChannels(shared=0.25)}
CASES = {
    "Mixtral of Llama": ("Llama", {}, {}),
    "Mixtral of Mistral": ("Mistral", {"sliding_window": None}, {}),
    "Granite-MoE-Shared of Llama": ("Llama", {}, SHARED),
    "Qwen2-MoE of Qwen2": ("Qwen2", {}, {}),
    "Qwen2-MoE with shared channels": ("Qwen2", {}, SHARED),
    "Qwen3-MoE of Qwen3": ("Qwen3", {"head_dim": 8}, {}),
    "pruned Llama": ("Llama", {}, {"experts": 1, "active": 1}),
}


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """A reconstructed checkpoint of every container; its dense kind and experts beside it."""
    made = {}
    for case, (kind, config, settings) in CASES.items():
        folder = tmp_path_factory.mktemp("container")
        dense = save_model(folder / "dense", kind, intermediate_size=64, **config)
        how = ReconstructSettings(**{"experts": 4, "keep": 0.25, **SMALL, **settings})
        made[case] = reconstruct(dense, DOMAINS, folder / "out", how).out, kind, how.experts
    return made


@pytest.fixture(params=CASES)
def made(request, containers, tmp_path):
    """A copy of one of them."""
    out, kind, experts = containers[request.param]
    return shutil.copytree(out, tmp_path / "out"), kind, experts


@pytest.fixture(scope="module")
def logits_elsewhere(containers, tmp_path_factory):
    """What every container answers in a process that cannot import Pomona."""
    answers = tmp_path_factory.mktemp("logits") / "logits"
    script = f"""
import sys; sys.modules["pomona"] = None
import torch; from transformers import AutoModelForCausalLM
tokens = torch.arange(60).view(2, 30) + 3
found = {{}}
for case, out in {[(case, str(out)) for case, (out, _, _) in containers.items()]!r}:
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found[case] = model(tokens).logits
torch.save(found, {str(answers)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return torch.load(answers)


def test_names_and_shapes_on_disk_are_those_that_transformers_writes(made, tmp_path):
    """vLLM and llama.cpp look for these names."""
    out, _, _ = made
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fields = [json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "again")]
    known = AutoConfig.from_pretrained(out).__class__().to_dict().keys() | {
        "architectures",
        "head_dim",
    }
    assert fields[0].keys() <= known | fields[1].keys()


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_pomona_gives_the_same_logits(containers, logits_elsewhere, case):
    out, _, _ = containers[case]
    with torch.no_grad():
        logits = load_model(out, "float32")(torch.arange(60).view(2, 30) + 3).logits
    torch.testing.assert_close(logits_elsewhere[case], logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> bytes:
    """A tokenizer as Llama's first ones, which llama.cpp's Llama classes look for."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("\n".join(word_text(i, 30) for i in range(200)))
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=120, hard_vocab_limit=False
    )
    return prefix.with_suffix(".model").read_bytes()


@pytest.mark.interop
def test_the_converter_takes_every_weight(gguf_of, sentencepiece_model, made, tmp_path):
    out, kind, experts = made
    if not kind.startswith("Qwen"):
        (out / "tokenizer.json").unlink()
        (out / "tokenizer.model").write_bytes(sentencepiece_model)
    found = gguf_of(out, tmp_path / "model.gguf")
    weights = load_file(out / "model.safetensors")
    expected = ffn_weights(weights, experts)
    assert len(expected) >= 6
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name].reshape(weight.shape), weight.numpy())
    assert sum(array.size for array in found.values()) == sum(w.numel() for w in weights.values())


def ffn_weights(weights: Mapping[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """What llama.cpp calls the FFN weights that we wrote, under any of our containers' names."""
    named: dict[str, torch.Tensor] = {}
    for layer in range(2):
        block, prefix = f"blk.{layer}", f"model.layers.{layer}"
        if f"{prefix}.block_sparse_moe.input_linear.weight" in weights:
            gate, up = weights[f"{prefix}.block_sparse_moe.input_linear.weight"].chunk(2, dim=1)
            named[f"{block}.ffn_gate_exps.weight"], named[f"{block}.ffn_up_exps.weight"] = gate, up
            down = weights[f"{prefix}.block_sparse_moe.output_linear.weight"]
            named[f"{block}.ffn_down_exps.weight"] = down
            router = weights[f"{prefix}.block_sparse_moe.router.layer.weight"]
            named[f"{block}.ffn_gate_inp.weight"] = router
            continue
        mixtral = f"{prefix}.block_sparse_moe.gate.weight" in weights
        ffn = f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp"
        parts = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        if mixtral:
            parts = {"gate": "w1", "up": "w3", "down": "w2"}
        for ours, theirs in parts.items():
            if f"{ffn}.gate.weight" not in weights:  # dense
                named[f"{block}.ffn_{ours}.weight"] = weights[f"{ffn}.{theirs}.weight"]
                continue
            stacked = [weights[f"{ffn}.experts.{e}.{theirs}.weight"] for e in range(experts)]
            named[f"{block}.ffn_{ours}_exps.weight"] = torch.stack(stacked)
            named[f"{block}.ffn_gate_inp.weight"] = weights[f"{ffn}.gate.weight"]
    return named
