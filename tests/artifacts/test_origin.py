"""Adapters and grafts know the base they grew from and how their rows were asked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pomona.artifacts.origin import ORIGIN, prompt_for
from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.run import RunDirectory
from pomona.data.templates import Alpaca, Chat
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.models.experts import find_expert_sites
from pomona.models.fingerprint import base_fingerprint, experts_fingerprint
from pomona.models.loading import load_model
from pomona.models.lora import LoRA
from pomona.models.weights import read_tensors, write_tensors
from pomona.pipelines.evaluate import on_rows
from pomona.pipelines.federate import federate
from pomona.recipe import dump


@pytest.fixture(scope="module")
def settings(moe_dir, rows_dir):
    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=1,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=1, batch=2),
        evaluation=Evaluation(rows=2, answers=1, new_tokens=2),
    )


@pytest.fixture(scope="module")
def run_dir(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("origin") / "run"
    with RunDirectory.open(path, dump(settings), {"method": "m", "seed": 0}) as run:
        federate(settings, run)
    return path


@pytest.fixture
def parts(run_dir, tmp_path) -> dict[str, Path]:
    """Copies of the shared adapter and of one graft, by their option."""
    return {
        "adapter": shutil.copytree(run_dir / "shared", tmp_path / "shared"),
        "graft": shutil.copytree(run_dir / "clients/pears/graft", tmp_path / "graft"),
    }


def on(model, rows_dir, template=None, note=print, adapter=None, graft=None):
    rows = rows_dir / "test.jsonl"
    personal = PersonalModel(str(model), adapter, graft)
    return on_rows(personal, rows, template, 2, 96, 2, note=note)


def retell(folder: Path, **changes: object) -> None:
    told = json.loads((folder / ORIGIN).read_text()) | changes
    (folder / ORIGIN).write_text(json.dumps(told))


def test_what_a_run_writes_tells_its_base_prompt_length_and_dtype(run_dir, settings):
    shared = json.loads((run_dir / "shared" / ORIGIN).read_text())
    graft = json.loads((run_dir / "clients/pears/graft" / ORIGIN).read_text())
    assert shared["base"].keys() == {"embedding", "routers", "experts", "layers"}
    assert graft["base"].keys() - shared["base"].keys() == {"selected"}
    for told in (shared, graft):
        assert told["model"] == settings.model
        assert told["template"] == {"kind": "alpaca"}
        assert (told["max_length"], told["dtype"]) == (96, "float32")


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("embed_tokens", "embedding"),
        ("gate.weight", "routers"),
        ("q_proj", "layers"),
        ("down_proj", "experts"),
        ("norm", "layers"),
    ],
)
@pytest.mark.parametrize("kind", ["adapter", "graft"])
def test_a_part_of_another_base_is_refused(moe_dir, rows_dir, parts, tmp_path, pattern, part, kind):
    """One number of another base is enough; the sentence names folder, model and what differs."""
    other = shutil.copytree(moe_dir, tmp_path / "other")
    tensors = read_tensors(other / "model.safetensors")
    name = next(
        n for n in sorted(tensors) if pattern in n or (pattern == "down_proj" and ".w2." in n)
    )
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    write_tensors(other / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(PomonaError) as caught:
        on(other, rows_dir, **{kind: parts[kind]})
    assert str(caught.value) == (
        f"{parts[kind]} does not belong to {other}: it was trained on {moe_dir}, whose {part} had "
        "other weights; give the model it was trained on"
    )


def test_a_router_and_the_selected_experts_have_fingerprints_of_their_own(moe_dir, rows_dir, parts):
    model = load_model(moe_dir, "float32")
    sites = find_expert_sites(model)
    before = base_fingerprint(model, sites), experts_fingerprint(sites, [0, 1])
    assert experts_fingerprint(sites, [0, 2]) != before[1]
    with torch.no_grad():
        sites[0].router.weight[0, 0] += 1
    after = base_fingerprint(model, sites)
    assert {part for part in after if after[part] != before[0][part]} == {"routers"}
    assert experts_fingerprint(sites, [0, 1]) == before[1]
    told = json.loads((parts["graft"] / ORIGIN).read_text())
    told["base"]["selected"] = "0" * 64
    (parts["graft"] / ORIGIN).write_text(json.dumps(told))
    with pytest.raises(PomonaError, match="whose experts it grew from had other weights"):
        on(moe_dir, rows_dir, graft=parts["graft"])


def test_a_fingerprint_does_not_depend_on_place_or_dtype(moe_dir, rows_dir, parts, tmp_path):
    moved = shutil.copytree(moe_dir, tmp_path / "moved")
    assert on(moved, rows_dir, **parts) == on(moe_dir, rows_dir, **parts)
    wide, narrow = (load_model(moe_dir, dtype) for dtype in ("float32", "bfloat16"))
    assert base_fingerprint(wide, find_expert_sites(wide)) == base_fingerprint(
        narrow, find_expert_sites(narrow)
    )


def test_a_plain_peft_adapter_is_taken_on_any_base(moe_dir, rows_dir, parts, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(load_model(moe_dir), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / ORIGIN).exists()
    on(moe_dir, rows_dir, adapter=tmp_path / "plain")


def test_the_recorded_template_is_used_and_another_one_is_told(moe_dir, rows_dir, parts):
    told: list[str] = []
    given = on(moe_dir, rows_dir, "alpaca", told.append, **parts)
    assert on(moe_dir, rows_dir, None, told.append, **parts) == given
    assert told == []
    for folder in parts.values():
        retell(folder, template={"kind": "chat", "system": "Be brief."})
    with pytest.raises(PomonaError, match="has no chat template"):  # so it is what is asked with
        on(moe_dir, rows_dir, **parts)
    assert on(moe_dir, rows_dir, "alpaca", told.append, **parts) == given
    assert told == [
        f'{folder} was trained with the template "chat"; rows are asked with "alpaca"'
        for folder in parts.values()
    ]


def test_templates_of_adapter_and_graft(parts):
    adapter, graft = parts.values()
    told: list[str] = []
    assert prompt_for(None, [], told.append) == Alpaca()
    assert prompt_for("chat", [], told.append) == Chat()
    assert prompt_for(None, [adapter, graft], told.append) == Alpaca()
    retell(graft, template={"kind": "chat", "system": "Be brief."})
    assert prompt_for(None, [graft], told.append) == Chat("Be brief.")
    assert prompt_for("chat", [graft], told.append) == Chat("Be brief.")
    assert told == []
    with pytest.raises(PomonaError, match=r"were trained with different templates; say which"):
        prompt_for(None, [adapter, graft], told.append)
    assert prompt_for("chat", [adapter, graft], told.append) == Chat()
    assert told == [f'{adapter} was trained with the template "alpaca"; rows are asked with "chat"']
    retell(graft, template={"kind": "os:system"})
    with pytest.raises(PomonaError, match=r'template "os:system" is none of alpaca, chat; choose'):
        prompt_for(None, [graft], told.append)
    assert prompt_for("alpaca", [graft], told.append) == Alpaca()
    for wrong in ({}, {"kind": 3}, {"kind": "chat", "system": 3}):
        retell(graft, template=wrong)
        with pytest.raises(PomonaError, match=r"pomona\.json is damaged"):
            prompt_for(None, [graft], told.append)


def test_a_run_with_a_system_turn_records_it(settings, moe_dir, tmp_path):
    model = shutil.copytree(moe_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    asked = replace(settings, model=str(model), template=Chat("Be brief."), graft=None)
    with RunDirectory.open(tmp_path / "run", dump(asked), {"method": "m", "seed": 0}) as run:
        federate(asked, run)
    assert prompt_for(None, [tmp_path / "run/shared"], print) == Chat("Be brief.")
