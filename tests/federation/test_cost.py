"""Costs against torch's own counter of FLOPs and the bytes that really lie in files."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import word_text
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.cohort import FrozenBase
from pomona.federation.cost import base_flops, cost_of, lora_everywhere
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.measure import communication, message_bytes, speed_of
from pomona.federation.settings import FederateSettings
from pomona.federation.update import ClientState
from pomona.models.experts import find_expert_sites
from pomona.models.loading import load_model, load_tokenizer
from pomona.models.lora import LoRA, find_projections
from pomona.pipelines.federate import federate
from pomona.recipe import dump

TOKENS = 20


@pytest.fixture(scope="module")
def base(moe_dir):
    model = load_model(moe_dir, "float32").eval()
    model.set_experts_implementation("eager")  # torch does not count grouped products
    return FrozenBase(
        model, LoRA(2, 4.0), Graft(rank=3, bias=True), tuple(find_expert_sites(model))
    )


def state_of(base, graft=True):
    made = base.init_graft(0, "c", [[1], [2]]) if graft else {}
    return ClientState(base.init_adapter(0), made)


def counted(base, state) -> int:
    """What torch counts in one forward pass, attention's own products left out."""
    tokens = torch.randint(3, 300, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with base.attach_one(state), torch.no_grad(), FlopCounterMode(display=False) as counter:
        base.model(input_ids=tokens, use_cache=False)
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for name, n in by_operation.items() if "attention" not in str(name))


def test_flops_are_those_torch_counts(base):
    routed = [{"counts": [[TOKENS, TOKENS, 0, 0]] * 2, "tokens": TOKENS}]
    cost = cost_of(base, [state_of(base)], routed)["flops_per_token"]
    untuned = counted(base, ClientState())
    assert cost["base"] * TOKENS == untuned
    assert cost["adapter"] * TOKENS == counted(base, state_of(base, graft=False)) - untuned
    both = counted(base, state_of(base)) - untuned
    assert (cost["adapter"] + cost["graft"]) * TOKENS == both
    assert cost["graft"] > cost["adapter"] > 0


def test_experts_per_token_are_those_that_were_counted(base):
    one = base_flops(base.model, base.sites, [1.0, 1.0])
    two = base_flops(base.model, base.sites, [2.0, 1.5])
    assert two - one == 1.5 * 6 * 32 * 32


def test_bytes_of_everything_are_those_of_the_tensors(base, tmp_path):
    cost = cost_of(base, [ClientState()], [{"counts": [[4, 0, 0, 0]] * 2, "tokens": 2}])
    weights = {name: value.clone() for name, value in base.model.named_parameters()}
    assert cost["bytes"]["all_parameters"] == sum(v.numel() * 4 for v in weights.values())
    by_hand = sum(
        2 * (linear.weight.shape[0] + linear.weight.shape[1])
        for linear in find_projections(base.model, base.lora).values()
    )
    for site in base.sites:
        for _ in range(site.num_experts):
            by_hand += 2 * sum(
                sum(part.shape) for part in vars(site.expert(0)).values() if part is not None
            )
    assert lora_everywhere(base) == by_hand
    assert cost["bytes"]["lora_everywhere"] == 4 * by_hand


def test_a_message_is_as_long_as_its_file(base, tmp_path):
    shared = base.init_adapter(0)
    save_file(shared, tmp_path / "message.safetensors")
    size = (tmp_path / "message.safetensors").stat().st_size
    assert message_bytes(shared) == size > sum(t.nbytes for t in shared.values())
    half = {name: value[:1] for name, value in shared.items()}
    line = communication(3, dict.fromkeys("abc", size), {"c": message_bytes(half), "a": size})
    assert line["sent"] == {"a": size, "b": size, "c": size}
    assert line["received"] == {"a": size, "b": 0, "c": message_bytes(half)}
    assert line["sent_bytes"] == 3 * size
    assert line["received_bytes"] == size + message_bytes(half)
    assert message_bytes({}) == 0


def test_speed_times_the_base_and_the_client_in_turn(base, monkeypatch):
    worn: list[bool] = []
    hooked = base.sites[0].experts
    handle = base.model.register_forward_pre_hook(
        lambda *_: worn.append(len(hooked._forward_hooks) > 0)
    )
    speeds = speed_of(base, state_of(base), 6, 2, repeats=2)
    handle.remove()
    assert list(speeds) == ["base", "client"]
    assert worn[::3] == [True, False, False, True, True, False]
    assert all(len(own.decode_seconds) == 2 for own in speeds.values())


@pytest.fixture
def settings(moe_dir, rows_dir, tmp_path):
    for name, seed in (("alpha", 1), ("beta", 2)):
        text = "\n\n".join(word_text(100 * seed + i, 60) for i in range(8))
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=1,
        max_length=48,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=3, batch=2, learning_rate=0.05),
        evaluation=Evaluation(
            rows=2, answers=1, new_tokens=2, forgetting=tmp_path / "text", windows=3, speed=True
        ),
    )


def run(settings, path):
    with RunDirectory.open(path, dump(settings), {"method": "m", "seed": 0}) as directory:
        return federate(settings, directory)


def test_forgetting_is_the_loss_of_the_personal_model_on_the_same_text(settings, tmp_path):
    from pomona.artifacts.personal import PersonalModel
    from pomona.pipelines.evaluate import on_text

    results = run(settings, tmp_path / "run")
    lines = [
        json.loads(x) for x in (tmp_path / "run/forgetting.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(lines) == 2 * 3 * (1 + 1 + 3)
    assert "forgetting.jsonl" in results["files"]
    shared, grafts = tmp_path / "run/shared", tmp_path / "run/clients"
    for model, client, parts in (
        ("base", None, {}),
        ("shared", None, {"adapter": shared}),
        ("personal", "pears", {"adapter": shared, "graft": grafts / "pears/graft"}),
    ):
        own = [x for x in lines if (x["model"], x["client"]) == (model, client)]
        found = on_text(
            PersonalModel(settings.model, **parts), str(tmp_path / "text"), [48], limit=3
        )[48].figures
        for domain in ("alpha", "beta"):
            windows = [x for x in own if x["domain"] == domain]
            assert [x["window"] for x in windows] == [0, 1, 2]
            loss = sum(x["nats"] for x in windows) / sum(x["tokens"] for x in windows)
            assert loss == pytest.approx(found[domain]["loss"], abs=1e-5)
    losses = {x["nats"] for x in lines if (x["domain"], x["window"]) == ("alpha", 0)}
    assert len(losses) == 5, "every model forgets in its own way"
    assert json.loads((tmp_path / "run/speed.json").read_text())["client"] == "apples"


def test_held_out_files_alone_are_read_where_there_are_any(settings, tmp_path):
    text = tmp_path / "text"
    (text / "gamma.valid.txt").write_text(word_text(9, 100), encoding="utf-8")
    source = load_tokenizer(settings.model)
    from pomona.federation.forgetting import held_out_windows

    assert list(held_out_windows(text, source, 16, 2)) == ["gamma"]
    assert held_out_windows(text, source, 16, 2)["gamma"].shape == (2, 16)
    assert len(held_out_windows(text, source, 16, 0)["gamma"]) > 2


def test_text_that_is_wrong_is_told_before_anything_is_trained(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        evaluation = replace(settings.evaluation, forgetting=source)
        with pytest.raises(PomonaError, match=source.name):
            run(replace(settings, evaluation=evaluation), tmp_path / f"run-{source.name}")
        assert not (tmp_path / f"run-{source.name}" / "checkpoint").exists()


@pytest.mark.parametrize(("windows", "says"), [(-1, "evaluation windows -1 is negative")])
def test_a_number_that_does_not_fit_is_told(windows, says):
    with pytest.raises(PomonaError, match=says):
        Evaluation(windows=windows)
