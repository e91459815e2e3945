"""What a model is worth on text and rows, against transformers itself; base, adapter and graft."""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import word_text
from safetensors.torch import load_file, save_file
from torch.nn import functional as fn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.models.lora import LoRA
from pomona.pipelines.evaluate import Figures, on_rows, on_tasks, on_text, speed
from pomona.pipelines.federate import federate
from pomona.recipe import dump

LENGTH = 96


@pytest.fixture(scope="module")
def settings(moe_dir: Path, rows_dir: Path) -> FederateSettings:
    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=1,
        max_length=LENGTH,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=2, batch=2, learning_rate=0.05),
        evaluation=Evaluation(rows=4, answers=4, new_tokens=4),
    )


@pytest.fixture(scope="module")
def run_dir(settings: FederateSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose parts have visibly moved."""
    path = tmp_path_factory.mktemp("evaluate") / "run"
    with RunDirectory.open(path, dump(settings), {"method": "m", "seed": 0}) as run:
        federate(settings, run)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(("a", "b")):
        (folder / f"{name}.jsonl").write_text(
            json.dumps({"text": word_text(number, 60)}) + "\n", encoding="utf-8"
        )
        (folder / f"{name}.valid.txt").write_text(word_text(10 + number, 90), encoding="utf-8")
    return folder


def on(
    model: Path | str,
    *,
    text: Path | None = None,
    rows: Path | None = None,
    adapter: Path | None = None,
    graft: Path | None = None,
    template: str = "alpaca",
    limit: int = 64,
    length: int | None = LENGTH,
    new_tokens: int = 4,
) -> Figures:
    personal = PersonalModel(str(model), adapter, graft)
    if rows is not None:
        return on_rows(personal, rows, template, limit, length, new_tokens)
    (measured,) = on_text(personal, str(text), [] if length is None else [length], limit).values()
    return measured.figures


def test_text_is_measured_as_transformers_would(moe_dir, texts):
    figures = on(moe_dir, text=texts, length=32)
    assert list(figures) == ["a", "b", "mean"]
    model = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(moe_dir)
    for number, name in enumerate(("a", "b")):
        tokens = tokenizer(word_text(10 + number, 90), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer.bos_token_id, *tokens])
        windows = ids[: len(ids) // 32 * 32].view(-1, 32)
        assert len(windows) >= 2
        with torch.no_grad():
            logits = model(windows).logits[:, :-1]
        nats = float(fn.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
        assert figures[name]["loss"] == pytest.approx(nats, abs=1e-5)
        assert figures[name]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    mean = (figures["a"]["loss"] + figures["b"]["loss"]) / 2
    assert figures["mean"]["loss"] == pytest.approx(mean)
    assert figures["mean"]["perplexity"] == pytest.approx(math.exp(mean))


def test_text_of_one_file_and_of_a_folder_without_held_out_files(moe_dir, texts, tmp_path):
    both = on(moe_dir, text=texts, length=32)
    single = on(moe_dir, text=texts / "a.valid.txt", length=32)
    assert single["a.valid.txt"] == both["a"]
    (tmp_path / "a.jsonl").write_bytes((texts / "a.jsonl").read_bytes())
    trained = on(moe_dir, text=tmp_path, length=32)
    assert list(trained) == ["a", "mean"]
    assert trained["a"]["loss"] != both["a"]["loss"]


def test_a_broken_held_out_file_is_named_and_not_passed_over(moe_dir, texts, tmp_path):
    (tmp_path / "a.jsonl").write_bytes((texts / "a.jsonl").read_bytes())
    (tmp_path / "a.valid.jsonl").write_text("{\n")
    with pytest.raises(PomonaError, match=r"a\.valid\.jsonl:1"):
        on(moe_dir, text=tmp_path)


def test_a_limit_takes_the_first_windows_and_0_takes_all(moe_dir, texts):
    def losses(limit: int) -> float:
        return on(moe_dir, text=texts, length=16, limit=limit)["a"]["loss"]

    assert losses(0) == losses(1000)
    assert losses(1) != losses(0)


def test_rows_are_measured_as_the_run_measured_them(settings, run_dir, rows_dir, tmp_path):
    """Base, shared and personal: the same figures as the run's own answers.jsonl."""
    answers = [json.loads(x) for x in (run_dir / "answers.jsonl").read_text().splitlines()]
    lines = (rows_dir / "test.jsonl").read_text().splitlines()
    rows = tmp_path / "pears.jsonl"
    rows.write_text("\n".join(x for x in lines if json.loads(x)["category"] == "pears"))
    shared, graft = run_dir / "shared", run_dir / "clients/pears/graft"
    parts = {
        "base": {},
        "shared": {"adapter": shared},
        "personal": {"adapter": shared, "graft": graft},
    }
    found: dict[str, float] = {}
    for kind, given in parts.items():
        own = [a for a in answers if (a["client"], a["model"]) == ("pears", kind)]
        figures = on(settings.model, rows=rows, **given)[rows.name]
        assert figures["rows"] == len(own) == 4
        assert figures["tokens"] == sum(a["tokens"] for a in own)
        nats = sum(a["nats"] for a in own) / figures["tokens"]
        assert figures["loss"] == pytest.approx(nats, abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
        rouge = sum(a["rouge_l"] for a in own) / len(own)
        assert figures["rouge_l"] == pytest.approx(rouge, abs=1e-9)
        exact = sum(a["exact_match"] for a in own) / len(own)
        assert figures["exact_match"] == pytest.approx(exact, abs=1e-9)
        found[kind] = figures["loss"]
    assert len(set(found.values())) == 3


def test_text_under_adapter_and_graft_differs_from_the_base(settings, run_dir, texts):
    parts = (
        {},
        {"adapter": run_dir / "shared"},
        {"graft": run_dir / "clients/pears/graft"},
        {"adapter": run_dir / "shared", "graft": run_dir / "clients/pears/graft"},
    )
    losses = [on(settings.model, text=texts, length=32, **given)["a"]["loss"] for given in parts]
    assert len(set(losses)) == 4


def test_without_new_tokens_nothing_is_answered(moe_dir, rows_dir):
    figures = on(moe_dir, rows=rows_dir / "test.jsonl", new_tokens=0, limit=5)["test.jsonl"]
    assert figures["rows"] == 5
    assert "rouge_l" not in figures
    assert "exact_match" not in figures


def test_progress_ends_complete(moe_dir, rows_dir, texts):
    told: list[tuple[str, int, int]] = []
    personal = PersonalModel(str(moe_dir))
    on_text(personal, str(texts), [32, 16], 0, progress=lambda *now: told.append(now))
    assert told[0] == ("evaluating", 0, told[-1][2])
    assert told[-1][1] == told[-1][2] > 2
    on_rows(
        personal,
        rows_dir / "test.jsonl",
        "alpaca",
        0,
        32,
        2,
        progress=lambda *now: told.append(now),
    )
    assert told[-1] == ("evaluating", 12, 12)
    assert ("evaluating", 0, 12) in told


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rows": True, "template": "other"}, 'template "other"; there are alpaca, chat'),
        ({"text": True, "length": 1}, "length 1 is too small; use 2"),
        ({"text": True, "length": 257}, "length 257 is longer than the context"),
        ({"rows": True, "limit": -1}, "limit -1 is too small"),
        ({"rows": True, "new_tokens": -1}, "new tokens -1"),
        ({"rows": True, "new_tokens": 96}, "leave no room for a prompt"),
        ({"rows": True, "new_tokens": 256, "length": None}, "no room for a prompt in length 256"),
        ({"rows": True, "template": "chat"}, "no chat template"),
    ],
)
def test_what_cannot_be_measured_is_said(moe_dir, rows_dir, texts, given, says):
    source = dict(given)
    text = texts if source.pop("text", False) else None
    rows = rows_dir / "test.jsonl" if source.pop("rows", False) else None
    with pytest.raises(PomonaError, match=says):
        on(moe_dir, text=text, rows=rows, **source)


def test_text_of_a_single_token_is_named(moe_dir, tmp_path):
    (tmp_path / "tiny.txt").write_text("")
    with pytest.raises(PomonaError, match=r"tiny\.txt is empty"):
        on(moe_dir, text=tmp_path)


def test_parts_of_another_model_are_refused(settings, run_dir, texts, dense_dir, tmp_path):
    with pytest.raises(PomonaError, match="mixture-of-experts"):
        on(dense_dir, text=texts, graft=run_dir / "clients/pears/graft")
    for part, file in (("shared", "adapter_model"), ("clients/pears/graft", "graft")):
        folder = tmp_path / file
        folder.mkdir()
        for path in (run_dir / part).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / f"{file}.safetensors")
        name = next(n for n in sorted(tensors) if "lora_A" in n)
        save_file(tensors | {name: tensors[name][:, 1:].clone()}, folder / f"{file}.safetensors")
        given = {"adapter": folder} if part == "shared" else {"graft": folder}
        with pytest.raises(PomonaError, match="does not belong to") as caught:
            on(settings.model, text=texts, **given)
        assert str(folder) in str(caught.value)
    with pytest.raises(PomonaError, match=r"holds no adapter_config\.json"):
        on(settings.model, text=texts, adapter=tmp_path)
    with pytest.raises(PomonaError, match=r"holds no graft_config\.json"):
        on(settings.model, text=texts, graft=tmp_path)


def test_an_adapter_of_other_projections_is_refused(settings, run_dir, texts, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (run_dir / "shared").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["wqkv"]}))
    with pytest.raises(PomonaError, match="wqkv"):
        on(settings.model, text=texts, adapter=folder)


def test_a_graft_form_is_read_from_its_folder(settings, run_dir, texts, tmp_path):
    """The same tensors as a copy give another model than as a delta."""
    delta = run_dir / "clients/pears/graft"
    copied = tmp_path / "graft"
    copied.mkdir()
    for path in delta.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    config = json.loads((copied / "graft_config.json").read_text())
    assert config["form"] == settings.graft.form == "delta"
    (copied / "graft_config.json").write_text(json.dumps({**config, "form": "copy"}))
    a, b = (on(settings.model, text=texts, length=32, graft=g)["a"] for g in (delta, copied))
    assert a["loss"] != b["loss"]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("graft_config.json", "{nope", "graft_config.json is damaged or cut off"),
        ("graft_config.json", "[]", "graft_config.json is damaged or cut off"),
        ("graft_config.json", {"rank": None}, "graft_config.json is damaged"),
        ("graft_config.json", {"form": "leaf"}, 'graft form "leaf" is unknown; use one of delta'),
        ("graft.safetensors", "short", "graft.safetensors is damaged or cut off"),
    ],
)
def test_a_damaged_graft_is_told(run_dir, moe_dir, rows_dir, tmp_path, file, change, says):
    shutil.copytree(run_dir / "clients/pears/graft", tmp_path / "graft")
    path = tmp_path / "graft" / file
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    with pytest.raises(PomonaError, match=says):
        on(moe_dir, rows=rows_dir / "test.jsonl", graft=tmp_path / "graft")


def test_a_graft_config_without_a_field_is_told(run_dir, moe_dir, rows_dir, tmp_path):
    shutil.copytree(run_dir / "clients/pears/graft", tmp_path / "graft")
    (tmp_path / "graft/graft_config.json").write_text("{}")
    with pytest.raises(PomonaError, match="form: Field required"):
        on(moe_dir, rows=rows_dir / "test.jsonl", graft=tmp_path / "graft")


def test_a_graft_of_an_expert_the_model_lacks_is_told(run_dir, moe_dir, rows_dir, tmp_path):
    shutil.copytree(run_dir / "clients/pears/graft", tmp_path / "graft")
    path = tmp_path / "graft/graft.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".expert"))
    save_file(tensors | {name: torch.tensor(9)}, path)
    with pytest.raises(PomonaError, match=r"it grew from expert 9 of .*, which has 4"):
        on(moe_dir, rows=rows_dir / "test.jsonl", graft=tmp_path / "graft")


@pytest.mark.parametrize("content", ["{nope", "[]", "{}"])
def test_a_damaged_adapter_is_told(run_dir, moe_dir, rows_dir, tmp_path, content):
    shutil.copytree(run_dir / "shared", tmp_path / "shared")
    (tmp_path / "shared/adapter_config.json").write_text(content)
    with pytest.raises(PomonaError, match=r"adapter_config.json is damaged|is no plain LoRA"):
        on(moe_dir, rows=rows_dir / "test.jsonl", adapter=tmp_path / "shared")


def test_without_a_length_the_context_is_the_limit(moe_dir, rows_dir):
    rows = rows_dir / "test.jsonl"
    assert on(moe_dir, rows=rows, length=None) == on(moe_dir, rows=rows, length=256)


def test_several_lengths_are_each_what_one_alone_is(moe_dir, texts):
    personal = PersonalModel(str(moe_dir))
    both = on_text(personal, str(texts), [32, 16, 32])
    assert list(both) == [32, 16]
    for length in both:
        assert both[length].figures == on(moe_dir, text=texts, length=length)
        own = both[length].figures["a"]
        assert own["tokens"] == own["windows"] * (length - 1)


def test_routing_is_counted_on_the_same_windows(moe_dir, texts):
    """Load, entropy and variation against a loop over the routers' own choices."""
    personal = PersonalModel(str(moe_dir))
    plain = on_text(personal, str(texts), [32])[32]
    found = on_text(personal, str(texts), [32], routing=True)[32]
    assert found.figures == plain.figures
    assert plain.routing == {}
    assert list(found.routing) == ["a", "b"]
    model = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(moe_dir)
    tokens = tokenizer(word_text(10, 90), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([tokenizer.bos_token_id, *tokens])
    with torch.no_grad():
        logits = model(ids[: len(ids) // 32 * 32].view(-1, 32), output_router_logits=True)
    for layer, router in enumerate(logits.router_logits):
        chosen = router.topk(2).indices.flatten().tolist()
        share = [chosen.count(expert) / len(chosen) for expert in range(4)]
        load = found.routing["a"]
        assert load.layer(layer) == pytest.approx(share)
        entropy = -sum(p * math.log(p) for p in share if p) / math.log(4)
        assert float(load.entropy_L[layer]) == pytest.approx(entropy)
        variation = statistics.pstdev(share) / 0.25
        assert float(load.variation_L[layer]) == pytest.approx(variation)


def test_a_dense_model_has_no_routing(dense_dir, texts):
    with pytest.raises(PomonaError, match="no mixture-of-experts layer"):
        on_text(PersonalModel(str(dense_dir)), str(texts), routing=True)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".tokens", ""])
def test_plain_text_may_have_any_suffix(moe_dir, tmp_path, suffix):
    path = tmp_path / f"own{suffix}"
    path.write_text(word_text(3, 90), encoding="utf-8")
    assert on(moe_dir, text=path, length=32)[path.name]["windows"] > 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.json", b'{"text": "x"}', r"own\.json is \.json data and no plain text; save it as"),
        ("own.CSV", b"a,b\n", r"own\.CSV is \.CSV data"),
        ("own.parquet", b"PAR1", r"own\.parquet is \.parquet data"),
        ("own.dat", b"red\0plum", r"own\.dat holds zero bytes"),
        ("own.raw", b"\xff\xfe", r"own\.raw is not UTF-8"),
    ],
)
def test_what_is_no_plain_text_is_refused(moe_dir, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PomonaError, match=says):
        on(moe_dir, text=tmp_path / name)


def test_speed_is_measured_side_by_side(moe_dir, dense_dir):
    told: list[tuple[str, int, int]] = []
    found = speed(
        PersonalModel(str(moe_dir)), str(dense_dir), 24, 4, 3, lambda *now: told.append(now)
    )
    assert list(found) == ["model", "dense"]
    for own in found.values():
        assert (own.prompt, own.new_tokens) == (20, 4)
        assert len(own.prefill_seconds) == len(own.decode_seconds) == 3
        assert own.prefill == 20 / statistics.median(own.prefill_seconds)
        assert own.decode == 4 / statistics.median(own.decode_seconds)
    assert told[-1] == ("generating", 4, 4)
    assert list(speed(PersonalModel(str(moe_dir)), None, 8, 4, 1)) == ["model"]


def test_speed_runs_the_greedy_generation_of_transformers(moe_dir, monkeypatch):
    """Every model in its turn; the tokens fed are those that `generate` chooses."""
    from pomona.evaluation.speed import generation_speeds

    model = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32).eval()
    prompt = torch.randint(3, 200, (1, 7), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[str, torch.Tensor]] = []

    class Watched(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, **given):
            seen.append((self.name, given["input_ids"]))
            return model(**given)

    generation_speeds({"x": Watched("x"), "y": Watched("y")}, prompt, 3, 2)
    turns = [name for name, ids in seen if ids.shape[1] > 1]
    assert turns == ["y", "x", "x", "y", "y", "x"]
    model.generation_config.eos_token_id = None
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 7:]
    fed = torch.cat([ids[0] for name, ids in seen[:4] if ids.shape[1] == 1])
    assert torch.equal(fed, expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"length": 257}, "length 257 is longer than the context"),
        ({"length": 64}, "new tokens 64 leave no room"),
        ({"new_tokens": 0}, "new tokens 0 is too small; use 1"),
        ({"repeats": 0}, "repeats 0 is too small"),
        ({"dense": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_a_speed_that_cannot_be_measured_is_said(moe_dir, given, says):
    with pytest.raises(PomonaError, match=says):
        speed(PersonalModel(str(moe_dir)), **given)


def test_tasks_need_the_extra(moe_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "pomona.evaluation.harness", raising=False)
    monkeypatch.delattr("pomona.evaluation.harness", raising=False)  # where the package keeps it
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(PomonaError, match=r"pip install 'pomona\[eval\]'"):
        on_tasks(PersonalModel(str(moe_dir)), ["mmlu"])
