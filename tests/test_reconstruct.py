"""Reconstruction end to end: a stock checkpoint, readable records, and nothing half-made."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import now_and_then, save_model
from laws.test_reconstruction_laws import DOMAINS, SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.reconstruction_records import read_records
from pomona.data.texts import encode_texts, read_domains, sample_windows
from pomona.errors import PomonaError
from pomona.pipelines.evaluate import on_text
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
from pomona.reconstruction.compensate import NoCompensation
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.router import Centroids, Fitted, RandomRouter
from pomona.reconstruction.specialise import Specialise

NONE = NoCompensation()


@pytest.mark.parametrize(
    "case",
    now_and_then([("Llama", True), ("Mistral", False)], [("Llama", False), ("Mistral", True)]),
    ids=str,
)
def test_out_comes_a_stock_mixtral_that_opens_without_pomona(tmp_path, case):
    kind, tied = case
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

    reconstruct(
        dense_dir,
        DOMAINS,
        tmp_path / "out",
        replace(SMALL, compensation=NoCompensation(), specialise=Specialise(rounds=0)),
    )
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
    made = reconstruct(dense_dir, DOMAINS, tmp_path / "out", replace(SMALL, affinity=affinity))
    folder = tmp_path / "out/reconstruction"
    again = read_records(folder, tmp_path / "out")
    assert str(again) == str(made)
    assert torch.equal(again.plan.keep_LEW, made.plan.keep_LEW)
    assert torch.equal(again.affinity.correlation_MM, made.affinity.correlation_MM)
    assert (folder / "affinity.svg").read_text().startswith("<svg")
    read = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert read.keys() == {"plan", "affinity", "clusters", "settings", "result"}
    assert read["settings"]["affinity"] == affinity
    assert read["settings"]["router"] == {"kind": "fitted", **vars(Fitted())}
    assert read["settings"].keys() == vars(SMALL).keys()
    assert read["affinity"]["domains"] == list("abcd")
    assert (read["affinity"]["perplexity"] is None) == (affinity == "scores")
    assert (read["affinity"]["correlation_by_scores"] is None) == (affinity == "scores")
    assert sorted(d for group in read["clusters"]["experts"] for d in group) == list("abcd")
    assert read["plan"]["domains"] == read["clusters"]["experts"]


def test_real_model_and_domains(models_dir, data_dir, tmp_path):
    """On real text a fitted router beats a random one, and the mixture stays near the dense model."""
    dense = models_dir / "rootstock-3m"
    domains = read_domains(data_dir / "calibration")
    assert len(domains) == 10
    held = {k: v[:20] for k, v in read_domains(data_dir / "calibration", "valid").items()}
    losses = {}
    small = ReconstructSettings(
        experts=4, keep=0.5, windows=4, length=128, affinity="scores", seed=1
    )
    some = {name: texts[:150] for name, texts in domains.items()}
    random = replace(small, router=RandomRouter(), specialise=Specialise(rounds=0))
    for name, settings in (("fitted", small), ("random", random)):
        reconstruct(dense, some, tmp_path / name, settings)
    for name, text in held.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
    for model in (dense, tmp_path / "fitted", tmp_path / "random"):
        figures = on_text(PersonalModel(str(model)), str(tmp_path / "*.jsonl"), [128], 4)[
            128
        ].figures
        losses[model.name] = figures["mean"]["loss"]
    assert losses["rootstock-3m"] < losses["fitted"] < losses["random"]
    assert losses["fitted"] < losses["rootstock-3m"] + 0.4


@pytest.mark.parametrize("shared", [0.0, 0.25])
def test_affinity_prunes_to_all_channels_of_an_expert(dense_dir, tmp_path, shared):
    """Its own and the shared ones: WIFV by hand, columns of `down_proj` set to zero, mean cross-entropy."""
    settings = replace(SMALL, keep=0.25, planner=TopChannels(shared=shared))
    made = reconstruct(dense_dir, DOMAINS, tmp_path / "out", settings)
    tokenizer = AutoTokenizer.from_pretrained(dense_dir)
    first, second = (encode_texts(DOMAINS[name], tokenizer) for name in "ac")
    model = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
    seen = {}
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: seen.__setitem__(module, args[0].flatten(0, 1).double())
        )
    with torch.no_grad():
        model(sample_windows(first, SMALL.windows, SMALL.length, "0/calibration", "a"))
        for down, activation_NF in seen.items():
            score_F = activation_NF.var(0, correction=0) * down.weight.double().square().sum(0)
            gone = score_F.argsort(descending=True)[round((0.25 + shared) * 64) :]
            down.weight[:, gone] = 0
        held = sample_windows(second, SMALL.affinity_windows, SMALL.length, "0/affinity", "c")
        loss = model(input_ids=held, labels=held).loss
    assert float(made.affinity.perplexity_MM[0, 2]) == pytest.approx(float(loss.exp()), rel=1e-4)


def test_every_domain_is_encoded_once(dense_dir, tmp_path, monkeypatch):
    seen = []

    def told(texts, tokenizer):
        seen.append(list(texts))
        return encode_texts(texts, tokenizer)

    monkeypatch.setattr("pomona.reconstruction.windows.encode_texts", told)
    assert SMALL.affinity == "perplexity"
    reconstruct(dense_dir, DOMAINS, tmp_path / "out", SMALL)
    assert seen == list(DOMAINS.values())


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 0}, "experts 0 is not positive"),
        ({"active": 3}, "active 3 is not between 1 and experts 2"),
        ({"active": 0}, "active 0 is not between 1 and experts 2"),
        ({"keep": 0.0}, "keep 0.0 is not a share"),
        ({"keep": 1.5}, "keep 1.5 is not a share"),
        ({"windows": 1}, "windows 1 is too small"),
        ({"affinity": "score"}, 'affinity "score" is unknown; use one of perplexity, scores'),
        ({"linkage": "avrage"}, 'linkage "avrage" is unknown; use one of average, complete, ward'),
        ({"grouping": "none"}, 'grouping "none" is unknown; use one of affinity, random, all'),
    ],
)
def test_settings_that_make_no_sense_are_refused_where_they_are_made(change, message):
    with pytest.raises(PomonaError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("kind", ["random-split", "activation-clusters"])
@pytest.mark.parametrize("change", [{"specialise": Specialise(rounds=0)}, {"compensation": NONE}])
def test_what_is_divided_is_neither_refitted_nor_dealt_again(kind, change):
    planner = {"random-split": RandomSplit(), "activation-clusters": ActivationClusters(0.5)}[kind]
    with pytest.raises(
        PomonaError, match=f'planner {kind} .* compensation to "none" and specialise.rounds to 0'
    ):
        replace(SMALL, planner=planner, **change)
    plain = {"specialise": Specialise(rounds=0), "compensation": NONE}
    assert replace(SMALL, planner=planner, **plain).planner == planner
    assert replace(SMALL, planner=planner, experts=1, active=1).planner == planner


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationClusters(shared=1.0), "shared 1.0 is not a share"),
        (lambda: ActivationClusters(shared=-0.1), "shared -0.1 is not a share"),
        (lambda: ActivationClusters(active_share=0.0), "active_share 0.0 is not a share above 0"),
        (lambda: ActivationClusters(active_share=1.1), "active_share 1.1 is not a share above 0"),
        (lambda: ActivationClusters(tokens=0), "tokens 0 is not positive"),
        (lambda: ActivationClusters(iterations=0), "iterations 0 is not positive"),
        (lambda: Fitted(tokens=0), "tokens 0 is not positive"),
        (lambda: Fitted(iterations=0), "iterations 0 is not positive"),
        (lambda: Fitted(decay=-1e-3), "decay -0.001 is negative"),
        (lambda: Fitted(decay=float("nan")), "decay nan is negative"),
        (lambda: Centroids(scale=0.0), "scale 0.0 is not positive"),
        (lambda: RandomRouter(deviation=-1.0), "deviation -1.0 is negative"),
    ],
)
def test_planners_and_routers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(PomonaError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({}, r"or set split_domains \(--split-domains\) to split them"),
        (
            {"grouping": "random", "split_domains": True},
            'or set grouping to "all", or to "affinity"',
        ),
        ({"grouping": "random"}, 'or set grouping to "all", or to "affinity" with split_domains'),
    ],
)
def test_too_few_domains_are_told_with_what_helps(change, advice):
    settings = replace(SMALL, experts=8, **change)
    with pytest.raises(PomonaError, match=f"4 domains .* cannot make 8 experts; .* {advice}"):
        settings.check_domains(list(DOMAINS))
    replace(settings, grouping="all").check_domains(list(DOMAINS))
    replace(settings, grouping="affinity", split_domains=True).check_domains(list(DOMAINS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 999}, r"windows of 999 tokens are longer than the context of .*, 256 tokens"),
        ({"keep": 0.001}, "keep 0.001 of 64 channels leaves an expert none"),
        ({"experts": 5, "active": 1}, r"4 domains \(a, b, c, d\) cannot make 5 experts"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(dense_dir, tmp_path, change, message):
    with pytest.raises(PomonaError, match=message):
        reconstruct(dense_dir, DOMAINS, tmp_path / "out", replace(SMALL, **change))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_told_before_anything_is_made(dense_dir, tmp_path):
    import shutil

    from pomona.models.weights import read_tensors, write_tensors

    shutil.copytree(dense_dir, tmp_path / "m")
    tensors = read_tensors(tmp_path / "m/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    write_tensors(tmp_path / "m/model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(PomonaError, match=r"layer 1 of the dense model gives .* not finite"):
        reconstruct(tmp_path / "m", DOMAINS, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_file_size_limit_of_the_system_leaves_nothing(dense_dir, tmp_path):
    """The disk refuses for real, in the middle of the weights."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from laws.test_reconstruction_laws import DOMAINS, SMALL\n"
        "from pomona.errors import PomonaError; from pomona.pipelines.reconstruct import reconstruct\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        f"try: reconstruct({str(dense_dir)!r}, DOMAINS, Path({str(tmp_path / 'out')!r}), SMALL)\n"
        "except PomonaError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
    )
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []
