"""Exported personal models: transformers opens them without Pomona, and they say the same."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from parts import SELECTION, Form, published
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import pomona
from pomona.artifacts import modeling_personal
from pomona.artifacts.export import CODE, export_personal
from pomona.artifacts.inspect import inspect
from pomona.artifacts.personal import PersonalModel, open_personal
from pomona.errors import PomonaError
from pomona.federation.graft import Graft
from pomona.federation.shared_expert import SharedGraft
from pomona.models.lora import LoRA

FORMS = {
    "a router's gate": (Form(), "qwen2-moe"),
    "copied": (Form(graft=Graft(SELECTION, form="copy", rank=2)), "qwen2-moe"),
    "whole differences": (Form(graft=Graft(SELECTION, weights="full")), "qwen2-moe"),
    "no gate": (Form(graft=Graft(SELECTION, gate="none", rank=2)), "qwen2-moe"),
    "two without gates": (Form(graft=Graft(SELECTION, gate="none", count=2, rank=2)), "qwen2-moe"),
    "shared alone": (Form(graft=None, shared_expert=SharedGraft(1, rank=2)), "qwen2-moe"),
    "a bias": (Form(graft=Graft(SELECTION, bias=True, gate="zero", rank=2)), "code"),
    "two": (Form(graft=Graft(SELECTION, count=2, rank=2)), "code"),
    "all parts": (
        Form(
            LoRA(2, 4.0, experts=True), personal=LoRA(3, 6.0), shared_expert=SharedGraft(1, rank=2)
        ),
        "code",
    ),
    "the resident itself": (Form(graft=Graft(SELECTION, gate="resident", rank=2)), "stock"),
    "LoRA alone": (Form(LoRA(2, 4.0, experts=True), graft=None, personal=LoRA(2, 4.0)), "stock"),
}


def ids() -> torch.Tensor:
    return torch.arange(3, 43).view(2, 20)


def logits_of(personal: PersonalModel) -> torch.Tensor:
    base, state = open_personal(personal)
    with torch.no_grad(), base.attach_one(state):
        return base.model(ids()).logits


def opened(folder: Path, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_model_says_the_same(moe_dir, tmp_path, form):
    made, kind = FORMS[form]
    personal = published(moe_dir, tmp_path / "run", made)["pears"]
    done = export_personal(personal, tmp_path / "out", dtype="float32", card="# mine\n")
    assert done.kind == kind
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (tmp_path / "out" / CODE).is_file() == ("auto_map" in config) == (kind == "code")
    wanted = logits_of(personal)
    assert not torch.allclose(
        wanted, logits_of(PersonalModel(str(moe_dir), device="cpu")), atol=0.1
    )
    found = opened(tmp_path / "out", trust_remote_code=kind == "code")
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert (tmp_path / "out/README.md").read_text() == "# mine\n"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 10
    told = inspect(tmp_path / "out")
    assert told["what"] == "a checkpoint"
    assert ("code beside it" in told["architecture"]) == (kind == "code")
    assert told["parameters"] == f"{done.parameters:,}" or kind == "code"


def test_the_code_beside_a_checkpoint_needs_no_pomona(moe_dir, tmp_path):
    personal = published(moe_dir, tmp_path / "run", FORMS["all parts"][0])["pears"]
    export_personal(personal, tmp_path / "out", dtype="float32")
    text = (tmp_path / "out" / CODE).read_text("utf-8")
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"typing", "torch", "transformers"}
    script = (
        "import sys; sys.modules['pomona'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, "
        "trust_remote_code=True, dtype=torch.float32)\n"
        "ids = torch.arange(3, 43).view(2, 20)\n"
        "with torch.no_grad(): logits = model(ids).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
        "said = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)\n"
        "assert said.shape[1] > 5\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = logits_of(personal)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), wanted, atol=1e-4)
    assert Path(modeling_personal.__file__).read_text("utf-8").splitlines()[4] in text


def test_without_merging_lora_lies_beside(moe_dir, tmp_path):
    form = Form(personal=LoRA(2, 4.0))
    personal = published(moe_dir, tmp_path / "run", form)["pears"]
    done = export_personal(personal, tmp_path / "out", merge=False, dtype="float32")
    assert done.beside == ["adapter", "personal"]
    bare = logits_of(replace(personal, adapter=None, personal=None))
    assert torch.allclose(opened(tmp_path / "out"), bare, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    worn = PeftModel.from_pretrained(model, tmp_path / "out/adapter")
    with torch.no_grad():
        found = worn(ids()).logits
    assert torch.allclose(found, logits_of(replace(personal, personal=None)), atol=1e-5)


def test_weights_keep_the_bases_type(moe_dir, tmp_path):
    personal = published(moe_dir, tmp_path / "run", Form())["pears"]
    kinds = {}
    for dtype in ("auto", "bfloat16"):
        export_personal(personal, tmp_path / dtype, dtype=dtype)
        with safe_open(tmp_path / dtype / "model.safetensors", "pt") as file:
            kinds[dtype] = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {"auto": {torch.float32}, "bfloat16": {torch.bfloat16}}


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "deepseek_v3", "granitemoe"])
def test_other_families_get_code(family, moe_dir, tmp_path):
    folder = tmp_path / "base"
    FAMILIES[family]().save_pretrained(folder)
    AutoTokenizer.from_pretrained(moe_dir).save_pretrained(folder)
    lora = LoRA(2, 4.0, targets=("o_proj",))
    personal = published(folder, tmp_path / "run", Form(lora))["pears"]
    assert export_personal(personal, tmp_path / "out", dtype="float32").kind == "code"
    wanted, found = logits_of(personal), opened(tmp_path / "out", trust_remote_code=True)
    assert float((found - wanted).abs().max()) <= 3e-5 * float(wanted.abs().max())


def test_what_no_checkpoint_holds_is_told(moe_dir, tmp_path):
    copied = Form(graft=Graft(SELECTION, form="copy", gate="resident", rank=2))
    personal = published(moe_dir, tmp_path / "run", copied)["pears"]
    with pytest.raises(PomonaError, match=r"used as it is, by pomona\.load_personal"):
        export_personal(personal, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    both = Form(LoRA(2, 4.0, experts=True), Graft(SELECTION, gate="resident", rank=2))
    personal = published(moe_dir, tmp_path / "both", both)["pears"]
    with pytest.raises(PomonaError, match="each change an expert by itself"):
        export_personal(personal, tmp_path / "out")
    folder = tmp_path / "base"
    FAMILIES["gpt_oss"]().save_pretrained(folder)
    AutoTokenizer.from_pretrained(moe_dir).save_pretrained(folder)
    biased = published(folder, tmp_path / "other", Form())["pears"]
    with pytest.raises(PomonaError, match=r"experts with biases or a gate that is no SiLU"):
        export_personal(biased, tmp_path / "out")


@pytest.mark.parametrize("form", ["all parts", "a bias", "two"])
def test_a_loaded_model_generates_trains_and_saves_its_base(moe_dir, tmp_path, form):
    personal = published(moe_dir, tmp_path / "run", FORMS[form][0])["pears"]
    model = pomona.load_personal(
        moe_dir, personal.graft, personal.adapter, personal.personal, device="cpu"
    )
    with torch.no_grad():
        before = model(ids()).logits
    assert torch.allclose(before, logits_of(personal), atol=1e-6)
    said = model.generate(ids()[:, :4], max_new_tokens=3, do_sample=False)
    assert said.shape == (2, 7)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.personal_parts.values()}
    optimiser = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        assert not any("personal_parts" in name for name in file.keys())  # noqa: SIM118


def test_folders_are_told_apart(moe_dir, tmp_path):
    form = Form(personal=LoRA(2, 4.0), shared_expert=SharedGraft(1, rank=2))
    personal = published(moe_dir, tmp_path / "run", form)["pears"]
    assert inspect(personal.graft)["form"] == "1 per layer, delta, gate router, LoRA of rank 2"
    told = inspect(personal.adapter)
    assert told["what"] == "a PEFT adapter (LoRA)"
    assert told["shared expert"] == "rank 2, in expert/"
    assert told["base"] == str(moe_dir)
    assert inspect(moe_dir)["experts"].endswith("layers")
    for wrong, complaint in (
        (tmp_path, "is nothing that Pomona"),
        (tmp_path / "x", "is no folder"),
    ):
        with pytest.raises(PomonaError, match=complaint):
            inspect(wrong)
