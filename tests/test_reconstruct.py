"""Reconstruction end to end: a stock checkpoint, readable records, and nothing half-made."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import save_model
from laws.test_reconstruction_laws import DOMAINS, SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from pomona.data.texts import read_domains
from pomona.errors import PomonaError
from pomona.evaluate import measure
from pomona.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.router import RandomRouter


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_out_comes_a_stock_mixtral_that_opens_without_pomona(tmp_path, kind, tied):
    dense = save_model(
        tmp_path / "dense", kind, intermediate_size=48, tie_word_embeddings=tied, rms_norm_eps=1e-5
    )
    made = reconstruct(dense, DOMAINS, tmp_path / "out", SMALL)
    script = (
        "import sys; sys.modules['pomona'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"tokens = AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})('red apple', return_tensors='pt')\n"
        "print(type(model).__name__, sum(p.numel() for p in model.parameters()))\n"
        "print(model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == f"MixtralForCausalLM {made.total_parameters}"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] == tied
    assert config["intermediate_size"] == 24
    experts = 2 * 2 * 3 * 24 * 32  # layers, experts, matrices
    assert made.active_parameters == made.total_parameters - experts // 2 * (2 - 2)
    assert (tmp_path / "out/README.md").is_file()


def test_experts_are_the_planned_channels(dense_dir, tmp_path):
    from pomona.models.experts import find_expert_sites
    from pomona.reconstruction.compensate import NoCompensation

    reconstruct(dense_dir, DOMAINS, tmp_path / "out", replace(SMALL, compensation=NoCompensation()))
    plan = json.loads((tmp_path / "out/reconstruction/plan.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    for layer, site in enumerate(
        find_expert_sites(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    ):
        ffn = dense.model.layers[layer].mlp
        for e in range(site.num_experts):
            keep, expert = plan["channels"][layer][e], site.expert(e)
            assert torch.equal(expert.gate, ffn.gate_proj.weight[keep])
            assert torch.equal(expert.up, ffn.up_proj.weight[keep])
            assert torch.equal(expert.down, ffn.down_proj.weight[:, keep])


@pytest.mark.parametrize("affinity", ["perplexity", "scores"])
def test_records_can_be_read(dense_dir, tmp_path, affinity):
    reconstruct(dense_dir, DOMAINS, tmp_path / "out", replace(SMALL, affinity=affinity))
    folder = tmp_path / "out/reconstruction"
    read = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert read.keys() == {"plan", "affinity", "clusters"}
    assert read["affinity"]["domains"] == list("abcd")
    assert (read["affinity"]["perplexity"] is None) == (affinity == "scores")
    assert sorted(d for group in read["clusters"]["experts"] for d in group) == list("abcd")
    assert read["plan"]["domains"] == read["clusters"]["experts"]


def test_real_model_and_domains(models_dir, data_dir, tmp_path):
    """On real text a fitted router beats a random one, and the mixture stays near the dense model."""
    dense = models_dir / "rootstock-3m"
    domains = read_domains(data_dir / "calibration")
    assert len(domains) == 10
    held = {k: v[:40] for k, v in read_domains(data_dir / "calibration", "valid").items()}
    losses = {}
    small = ReconstructSettings(
        experts=4, keep=0.5, windows=4, length=128, affinity="scores", seed=1
    )
    some = {name: texts[:150] for name, texts in domains.items()}
    for name, settings in (("fitted", small), ("random", replace(small, router=RandomRouter()))):
        reconstruct(dense, some, tmp_path / name, settings)
    for name, text in held.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
    for model in (dense, tmp_path / "fitted", tmp_path / "random"):
        figures = measure(
            str(model), str(tmp_path / "*.jsonl"), None, None, None, "alpaca", 4, 128, 0
        )
        losses[model.name] = figures["mean"]["loss"]
    assert losses["rootstock-3m"] < losses["fitted"] < losses["random"]
    assert losses["fitted"] < losses["rootstock-3m"] + 0.4


def test_an_output_that_is_not_empty_is_refused(dense_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PomonaError, match="not empty"):
        reconstruct(dense_dir, DOMAINS, tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_nothing(dense_dir, tmp_path, monkeypatch):
    from pomona.models import weights

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(PomonaError, match="No space left on device"):
        reconstruct(dense_dir, DOMAINS, tmp_path / "out", SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is true"),
        ({"model_type": "gemma"}, 'model type "gemma" is not supported; .* llama, mistral'),
        ({"model_type": "mixtral", "num_local_experts": 8}, "is a mixture of experts already"),
    ],
)
def test_models_that_do_not_fit_are_refused(dense_dir, tmp_path, change, message):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dense_dir, copy)
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(PomonaError, match=message):
        reconstruct(copy, DOMAINS, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_tokenizer_comes_along(dense_dir, tmp_path):
    reconstruct(dense_dir, DOMAINS, tmp_path / "out", SMALL)
    text = "red apple, green pear"
    ours, theirs = (AutoTokenizer.from_pretrained(p)(text) for p in (tmp_path / "out", dense_dir))
    assert ours["input_ids"] == theirs["input_ids"]
