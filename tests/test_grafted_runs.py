"""Every kind of graft from the recipe to `pomona evaluate --graft` and the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.selection import Gradient, Greedy, RandomExpert, SameExpert, Usage
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA
from pomona.pipelines.evaluate import on_rows
from pomona.pipelines.federate import federate
from pomona.recipe import dump

KINDS = {
    "plain": Graft(rank=2),
    "bias": Graft(Usage(rows=4), rank=2, form="copy", gate="zero", bias=True),
    "three": Graft(Greedy(rows=4), count=3, rank=2),
    "no gate": Graft(RandomExpert(), gate="none", rank=2),
    "resident": Graft(Gradient(rows=4), gate="resident", rank=2),
    "full": Graft(SameExpert(1), weights="full"),
    "two full residents": Graft(SameExpert(), count=2, gate="resident", weights="full"),
}


@pytest.fixture(scope="module")
def runs(moe_dir, rows_dir, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("grafted")
    for kind, graft in KINDS.items():
        settings = FederateSettings(
            model=str(moe_dir),
            data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
            name=kind,
            rounds=2,
            max_length=96,
            adapter=LoRA(2, 4.0),
            graft=graft,
            local=LocalTraining(steps=2, batch=2, learning_rate=1e-2),
            evaluation=Evaluation(every=1, rows=3, answers=1, new_tokens=3),
        )
        about = {"command": ["pomona"], "method": kind, "seed": 0}
        with RunDirectory.open(out / kind, dump(settings), about) as run:
            federate(settings, run)
    return {kind: out / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_on_disk_is_the_personal_model_that_was_measured(
    kind, runs, moe_dir, rows_dir, tmp_path
):
    run, lines = runs[kind], (rows_dir / "test.jsonl").read_text().splitlines()
    rows = tmp_path / "pears.jsonl"
    rows.write_text("\n".join(x for x in lines if json.loads(x)["category"] == "pears"))
    personal = PersonalModel(str(moe_dir), run / "shared", run / "clients/pears/graft")
    measured = on_rows(personal, rows, limit=3, length=96, new_tokens=3)[rows.name]["loss"]
    figures = json.loads((run / "results.json").read_text())
    assert measured == pytest.approx(figures["personal"]["clients"]["pears"]["loss"], abs=1e-6)
    assert measured != figures["shared"]["clients"]["pears"]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_tells_what_computes_its_graft(kind, runs):
    """All but how it began: the selection rule and where a trained gate started."""
    wanted = KINDS[kind]
    graft, tensors = read_graft(runs[kind] / "clients/pears/graft")
    assert graft == replace(
        wanted,
        selection=graft.selection,
        gate="router" if wanted.trains_gate else wanted.gate,
    )
    trained = {n: v for n, v in tensors.items() if n.endswith(("lora_B", ".delta"))}
    assert len(trained) == 2 * 3 * wanted.count
    assert all(value.abs().max() > 0 for value in trained.values())
    if wanted.bias:
        assert all(tensors[n].abs() > 0 for n in tensors if n.endswith("gate_bias"))


def test_a_single_graft_writes_what_it_always_wrote(runs):
    config = json.loads((runs["plain"] / "clients/pears/graft/graft_config.json").read_text())
    assert list(config) == ["pomona", "base_model", "form", "rank", "alpha", "bias"]
    several = json.loads((runs["three"] / "clients/pears/graft/graft_config.json").read_text())
    assert {key: several[key] for key in several.keys() - config.keys()} == {"count": 3}
    full = runs["two full residents"] / "clients/pears/graft/graft_config.json"
    told = json.loads(full.read_text())
    assert (told["count"], told["gate"], told["weights"]) == (2, "resident", "full")


def test_results_tell_the_experts_and_their_weights(runs, tmp_path):
    for kind, run in runs.items():
        results = json.loads((run / "results.json").read_text())
        graft = KINDS[kind]
        for client, chosen in results["selection"].items():
            tensors = load_file(run / "clients" / client / "graft/graft.safetensors")
            known = [int(tensors[n]) for n in sorted(tensors) if n.endswith(".expert")]
            flat = [e for own in chosen for e in (own if isinstance(own, list) else [own])]
            assert flat == known
            assert len(chosen) == 2
            assert all(isinstance(own, list) == (graft.count > 1) for own in chosen)
        openness = torch.tensor(list(results["gate_openness"].values()))
        assert openness.shape == (3, 2)
        assert (openness == 1).all() == (graft.gate == "none")
        if graft.gate == "resident":
            assert ((openness > 0) & (openness < 1)).all()
    assert json.loads((runs["full"] / "results.json").read_text())["selection"] == {
        name: [1, 1] for name in ("apples", "pears", "plums")
    }
    write_report(list(runs.values()), tmp_path / "report.html")
    assert "mean gate" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("three", {"count": 5}, "graft count 5 is more than the 4 experts"),
        ("three", {"count": 2}, r'the tensor ".*\.2\.down\.lora_A" is of shape'),
        ("three", {"count": 1}, r'the tensor ".*" is of shape .* there and for the model absent'),
        ("three", {"count": "3"}, "graft_config.json is damaged"),
        ("resident", {"gate": "ajar"}, 'graft gate "ajar" is unknown'),
        ("resident", {"gate": "router"}, r'experts\.gate" is absent there'),
        ("full", {"weights": "lora"}, r'the tensor ".*down\.delta" is of shape'),
        ("full", {"weights": "most"}, 'graft weights "most" is unknown'),
    ],
)
def test_a_folder_that_does_not_tell_the_truth_is_refused(
    kind, change, says, runs, moe_dir, rows_dir, tmp_path
):
    folder = shutil.copytree(runs[kind] / "clients/pears/graft", tmp_path / "graft")
    config = json.loads((folder / "graft_config.json").read_text())
    (folder / "graft_config.json").write_text(json.dumps({**config, **change}))
    personal = PersonalModel(str(moe_dir), None, folder)
    with pytest.raises(PomonaError, match=says):
        on_rows(personal, rows_dir / "test.jsonl", limit=1, length=96, new_tokens=0)


def test_one_of_several_experts_of_another_base_is_refused(runs, moe_dir, rows_dir, tmp_path):
    folder = shutil.copytree(runs["three"] / "clients/pears/graft", tmp_path / "graft")
    told = json.loads((folder / "pomona.json").read_text())
    told["base"] = {"selected": told["base"]["selected"]}  # the only thing to go by
    (folder / "pomona.json").write_text(json.dumps(told))
    tensors = load_file(folder / "graft.safetensors")
    third = int(tensors["model.layers.1.mlp.experts.2.expert"])
    others = [int(tensors[f"model.layers.1.mlp.experts.{i}.expert"]) for i in range(2)]
    for expert, refused in ((third, True), (6 - third - sum(others), False)):
        other = shutil.copytree(moe_dir, tmp_path / f"other {refused}")
        weights = load_file(other / "model.safetensors")
        weights[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"][0, 0] += 1
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        personal = PersonalModel(str(other), None, folder)
        if refused:
            with pytest.raises(PomonaError, match="whose experts it grew from had other weights"):
                on_rows(personal, rows_dir / "test.jsonl", limit=1, length=96, new_tokens=0)
        else:
            on_rows(personal, rows_dir / "test.jsonl", limit=1, length=96, new_tokens=0)
