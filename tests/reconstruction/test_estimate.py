"""The estimate against what is then made."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import save_model
from laws.test_reconstruction_laws import ADDED, DOMAINS, SMALL
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pomona.errors import PomonaError
from pomona.models.experts import enable_checkpointing, find_expert_sites, freeze
from pomona.models.placement import Placement
from pomona.pipelines.reconstruct import preview, reconstruct
from pomona.reconstruction.compensate import Bias
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.retraining import Retraining
from pomona.reconstruction.retraining.memory import StudentShapes, retraining_bytes
from pomona.reconstruction.retraining.settings import ExpertStage, Objective, RouterStage
from pomona.reconstruction.retraining.trainable import train_experts, trained
from pomona.reconstruction.router import Centroids, Fitted, RandomRouter
from pomona.reconstruction.specialise import Specialise

CASES = {
    "mixture": {},
    "shared": {"active": 1, "keep": 0.25, "planner": TopChannels(shared=0.25)},
    "pruned": {"experts": 1, "active": 1},
    "flap": {"experts": 1, "active": 1, "compensation": Bias()},
    "odd widths": {"keep": 0.3, "active": 1},
    "split": {"planner": RandomSplit()} | ADDED,
    "clusters": {"keep": 0.25, "planner": ActivationClusters(shared=0.5)} | ADDED,
}


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_what_is_made(tmp_path, case, kind):
    """Whatever a container adds: Qwen2-MoE always has a shared expert and its gate, FLAP has biases."""
    if (case in ("shared", "clusters") and kind == "Qwen3") or (case == "flap" and kind != "Llama"):
        pytest.skip(f"{kind} has no home for it")
    window = {"sliding_window": None} if kind == "Mistral" else {}
    dense_dir = save_model(tmp_path / "dense", kind, intermediate_size=64, **window)
    settings = replace(SMALL, affinity="scores", **CASES[case])
    told = preview(dense_dir, list(DOMAINS), settings)
    made = reconstruct(dense_dir, DOMAINS, tmp_path / "out", settings)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert told.total == sum(parameter.numel() for parameter in opened.parameters())
    assert (told.container, told.sizes) == (made.container, made.sizes)
    assert (told.total, told.active, told.dense) == (
        made.total_parameters,
        made.active_parameters,
        made.dense_parameters,
    )
    assert told.flops - told.dense_flops == 2 * (told.active - told.dense)
    assert f"{made.total_parameters:,} parameters" in str(told)


def test_retraining_and_affinity_cost_what_they_say(dense_dir):
    plain = preview(dense_dir, list(DOMAINS), SMALL)
    scores = preview(dense_dir, list(DOMAINS), replace(SMALL, affinity="scores"))
    windows = 16 * SMALL.affinity_windows * SMALL.length
    assert plain.work_flops - scores.work_flops == windows * plain.dense_flops
    how = Retraining(length=32)
    more = preview(dense_dir, list(DOMAINS), replace(SMALL, retrain=how))
    per_token = 3 * plain.flops + plain.dense_flops
    assert more.work_flops - plain.work_flops == how.experts.tokens * per_token
    assert more.peak_bytes >= plain.peak_bytes
    with pytest.raises(PomonaError, match="cannot make 5 experts"):
        preview(dense_dir, list(DOMAINS), replace(SMALL, experts=5))


PASSES = {
    "as usual": {},
    "split": {"experts": 8, "grouping": "affinity", "split_domains": True},
    "few split": {"experts": 6, "grouping": "affinity", "split_domains": True, "windows": 12},
    "one": {"experts": 1, "active": 1},
    "all": {"grouping": "all", "experts": 3},
    "nothing seen": ADDED | {"router": RandomRouter()},
    "centroids": {"router": Centroids(), "specialise": Specialise(rounds=0)},
    "a sample": {"router": Fitted(tokens=64), "specialise": Specialise(rounds=1, tokens=192)},
}


@pytest.mark.parametrize("at_once", [0, 1, 2])
@pytest.mark.parametrize("case", PASSES)
def test_work_is_what_passes_through_the_layers(tmp_path, monkeypatch, case, at_once):
    """Every token of every decoder layer of the dense model is counted while the mixture is made."""
    change = {"grouping": "random", "affinity": "scores"} | PASSES[case]
    settings, placement = replace(SMALL, **change), Placement("cpu", layers=at_once)
    dense = save_model(tmp_path / "dense", "Llama", intermediate_size=64)
    told = preview(dense, list(DOMAINS), settings, placement)
    seen, forward = [], LlamaDecoderLayer.forward

    def counted(self, hidden_states, *args, **kwargs):
        parameters = sum(p.numel() for p in self.parameters())
        seen.append(2 * parameters * hidden_states.shape[0] * hidden_states.shape[1])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    reconstruct(dense, DOMAINS, tmp_path / "out", settings, placement=placement)
    assert told.work_flops == sum(seen)


def test_stages_of_retraining_cost_what_passes_through_them(dense_dir):
    how = Retraining(length=32, router=RouterStage(tokens=4096))
    plain = preview(dense_dir, list(DOMAINS), SMALL)
    every = preview(dense_dir, list(DOMAINS), replace(SMALL, active=SMALL.experts)).flops
    for own, again in ((how, 0), (replace(how, checkpointing=True), 1)):
        told = preview(dense_dir, list(DOMAINS), replace(SMALL, retrain=own))
        first = 4096 * ((2 + again) * every + plain.dense_flops)
        second = how.experts.tokens * ((3 + again) * plain.flops + plain.dense_flops)
        assert told.work_flops - plain.work_flops == first + second
    one = replace(SMALL, experts=1, active=1)
    alone = [preview(dense_dir, list(DOMAINS), replace(one, retrain=r)) for r in (None, how)]
    per_token = 3 * alone[0].flops + plain.dense_flops
    assert alone[1].work_flops - alone[0].work_flops == how.experts.tokens * per_token


@pytest.mark.parametrize("experts", ["lora", "full", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_retraining_is_what_autograd_keeps(tmp_path, experts, dtype):
    """Weights, what learns four times in float32, and the merged copies that a forward pass leaves."""
    sizes = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = save_model(tmp_path / "mixture", "Mixtral", **sizes)
    stage = ExpertStage(experts=experts, rank=3)
    how = Retraining(experts=stage, objective=Objective("cross-entropy"), dtype=dtype)
    kept = {}
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        weights = sum(p.nbytes for p in model.parameters())
        total = sum(p.numel() for p in model.parameters())
        freeze(model)
        sites = find_expert_sites(model)
        if checkpointing:
            enable_checkpointing(model)
        train_experts(model, sites, stage, torch.Generator())
        learning = 16 * sum(p.numel() for p in trained(model).values())
        kept[checkpointing] = _merged_copies(model)
    norms = 32 * (2 * 2 + 1)
    shapes = StudentShapes(0, total, 2, 3 * 32 * 4 * 64, 4 * (2 * 32 + 3 * 64), 4 * 32, norms)
    norm = kept[True]  # the one after the last layer
    assert norm == 32 * (2 if dtype == "bfloat16" else 4)
    everything = kept[False] + norm  # the first norm's copy is not kept: no gradient goes further
    assert retraining_bytes(how, shapes) == weights + learning + everything
    layer_by_layer = retraining_bytes(replace(how, checkpointing=True), shapes)
    assert layer_by_layer == weights + learning + (everything - 5 * norm) // 2


def _merged_copies(model):
    """The bytes of what a forward pass keeps that is a copy of a weight with what was learned."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    merged, kept = {}, {}
    for module in model.modules():
        for learned in getattr(module, "parametrizations", {}).values():
            learned.register_forward_hook(
                lambda _m, _a, out: merged.setdefault(out.untyped_storage().data_ptr(), out)
            )

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    input_ids = torch.arange(6).view(1, 6)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=input_ids, labels=input_ids, use_cache=False)
    return sum(size for where, (size, _) in kept.items() if where in merged)


def test_checkpointing_is_proposed_where_it_helps(tmp_path, dense_dir):
    wide_dir = save_model(tmp_path / "wide", "Llama", intermediate_size=512)
    how = Retraining(length=32)
    settings = replace(SMALL, experts=8, grouping="all", specialise=Specialise(rounds=0))
    told, again = (
        preview(wide_dir, list(DOMAINS), replace(settings, retrain=r))
        for r in (how, replace(how, checkpointing=True))
    )
    assert again.peak_bytes < 0.9 * told.peak_bytes
    (line,) = told.remarks
    assert f"checkpointing = true {again.peak_bytes / 2**30:.2f} GiB" in line
    assert line in str(told)
    assert again.remarks == preview(dense_dir, list(DOMAINS), SMALL).remarks == ()


def test_parts_of_domains_are_compared_by_scores_and_charged_so(dense_dir):
    split = replace(SMALL, experts=8, split_domains=True)
    told = preview(dense_dir, list(DOMAINS), split)
    scores = preview(dense_dir, list(DOMAINS), replace(split, affinity="scores"))
    assert told.work_flops == scores.work_flops
    assert "compared by scores, not by perplexity" in str(told)
    for other in (scores, preview(dense_dir, list(DOMAINS), replace(SMALL, grouping="all"))):
        assert other.remarks == ()
    one = {"experts": 1, "active": 1}
    costs = [
        preview(dense_dir, list(DOMAINS), replace(SMALL, affinity=kind, **one)).work_flops
        for kind in ("scores", "perplexity")
    ]
    assert costs[0] == costs[1]


def test_the_device_that_is_asked_for_is_timed(dense_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pomona.reconstruction.estimate.matmul_speed",
        lambda device, dtype: asked.append((str(device), dtype)) or 1e9,
    )
    told = preview(dense_dir, list(DOMAINS), SMALL, Placement("meta"))
    assert asked == [("meta", torch.float32)]
    assert told.seconds == told.work_flops / 1e9
    mixed = replace(SMALL, dtype="bfloat16", retrain=Retraining(length=32))
    preview(dense_dir, list(DOMAINS), mixed, Placement("cpu"))
    assert asked[1:] == [("cpu", torch.bfloat16), ("cpu", torch.float32)]


def test_of_a_hub_id_the_config_alone_is_fetched(dense_dir, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetched(name, allow_patterns, **_):
        asked.append((name, *allow_patterns))
        return tmp_path

    shutil.copy(dense_dir / "config.json", tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    told = preview("org/name", list(DOMAINS), SMALL)
    assert set(asked) == {("org/name", "config.json")}
    here = preview(dense_dir, list(DOMAINS), SMALL)
    assert replace(told, seconds=0) == replace(here, seconds=0)


def test_a_dry_run_refuses_what_the_run_would(dense_dir):
    with pytest.raises(PomonaError, match="longer than the context"):
        preview(dense_dir, list(DOMAINS), replace(SMALL, length=512))
    with pytest.raises(PomonaError, match="longer than the context"):
        preview(dense_dir, list(DOMAINS), replace(SMALL, retrain=Retraining(length=512)))


def test_the_command_tells_and_makes_nothing(dense_dir, tmp_path, monkeypatch, capsys):
    from pomona.cli.app import main

    for name, texts in DOMAINS.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    given = ["reconstruct", dense_dir, "--domains", tmp_path, "--experts", 4, "--dry-run"]
    command = ["pomona", *map(str, given), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "FLOPs per token" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experts", [2, 6])
def test_the_command_says_when_domains_are_compared_by_scores(
    dense_dir, tmp_path, monkeypatch, capsys, experts
):
    from pomona.cli.app import main

    (tmp_path / "texts").mkdir()
    for name, texts in DOMAINS.items():
        (tmp_path / f"texts/{name}.txt").write_text("\n\n".join(texts))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("settings = {windows = 6, length = 16, affinity_windows = 2}")
    given = ["reconstruct", dense_dir, "--recipe", recipe, "--domains", tmp_path / "texts"]
    given += ["--out", tmp_path / "out", "--experts", experts, "--split-domains"]
    for more in (["--dry-run"], []):
        monkeypatch.setattr("sys.argv", ["pomona", *map(str, given + more)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        told = " ".join(capsys.readouterr().out.split())
        assert ("4 domains are split to make 6 experts" in told) == (experts == 6)
    kind = json.loads((tmp_path / "out/reconstruction/affinity.json").read_text())["perplexity"]
    assert (kind is None) == (experts == 6)
