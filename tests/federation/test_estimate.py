"""What a dry run tells of a federation, against the federation itself."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from families import (
    _CONFIGS,
    COMMON,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    SPARSE_LAYERS,
    TOP_K,
    WIDTH,
)
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from safetensors.torch import save
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from pomona.artifacts.run import RunDirectory
from pomona.cli.app import main
from pomona.federation.cohort import FrozenBase
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.estimate import active_parameters
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.measure import message_bytes
from pomona.federation.outline import id_of, outlined_step
from pomona.federation.rehearsal import Rehearsal
from pomona.federation.settings import Finish
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.strategies import STRATEGIES, FFALoRA, FlexLoRA, FLoRA
from pomona.federation.update import ClientState, stack
from pomona.models.experts import enable_checkpointing, find_expert_sites, freeze
from pomona.models.loading import load_model, outline_model
from pomona.models.lora import LoRA
from pomona.models.weights import serialized_bytes
from pomona.pipelines.federate import federate
from pomona.pipelines.federate.preview import preview
from pomona.recipe import dump
from pomona.training.loss import completion_losses

QUICK = Evaluation(every=9, rows=1, answers=1, new_tokens=2)


def ran(settings, path):
    with RunDirectory.open(path, dump(settings), {"method": "m", "seed": 0}) as run:
        results = federate(settings, run)
    metrics = [json.loads(x) for x in (path / "metrics.jsonl").read_text("utf-8").splitlines()]
    return results, [m for m in metrics if m["model"] == "communication"]


@pytest.fixture
def quick(settings):
    """Two rounds of one step."""
    local = LocalTraining(steps=1, batch=2)
    return replace(settings, rounds=2, local=local, evaluation=QUICK)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_messages_are_those_of_a_run(quick, tmp_path, kind):
    made = replace(quick, strategy=STRATEGIES[kind]())
    told = preview(made, 1.0).traffic
    _, lines = ran(made, tmp_path / "run")
    assert len(lines) == 2
    assert told.sent == sum(line["sent_bytes"] for line in lines)
    assert told.received == sum(line["received_bytes"] for line in lines)
    for line in lines:
        assert told.to_client == max(line["sent"].values())
        assert told.from_client == max(line["received"].values())
    assert (told.sent > 0) == (kind != "local-only")


CHANGES = {
    "ranks": {"ranks": {"pears": 1}, "strategy": FlexLoRA()},
    "flora": {"ranks": {"plums": 1}, "strategy": FLoRA()},
    "some": {"rounds": 4, "fraction": 0.6, "dropout": 0.4, "joins": {"plums": 3}},
    "newcomers": {
        "newcomers": ("plums",),
        "finish": Finish(rounds=2, training=LocalTraining(epochs=1, batch=3)),
    },
    "int8": {"compression": "int8", "ranks": {"pears": 1}, "strategy": FlexLoRA()},
    "sums": {"secure_aggregation": True},
    "pooled": {"pooled": True},
    "experts": {"adapter": LoRA(2, 4.0, experts=True), "graft": None},
    "layers": {"adapter": LoRA(3, 4.0, layers=(1,)), "personal": LoRA(2, 4.0)},
    "shared expert": {"shared_expert": SharedGraft(rank=3, gate="router")},
    "several": {"graft": Graft(count=2, rank=2, gate="resident")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_takes_part_messages_and_flops_are_those_of_a_run(quick, tmp_path, change):
    made = replace(quick, **CHANGES[change])
    told = preview(made, 1.0)
    results, lines = ran(made, tmp_path / "run")
    assert told.traffic.sent == sum(line["sent_bytes"] for line in lines)
    assert told.traffic.received == sum(line["received_bytes"] for line in lines)
    cost = results["cost"]
    assert told.everything == cost["bytes"]
    assert told.flops == pytest.approx(cost["flops_per_token"], rel=1e-12)


def test_a_federation_that_is_over_sends_all_that_is_shared_once(quick, tmp_path):
    """What it froze as well: nobody here has drawn it."""
    made = replace(quick, strategy=FFALoRA())
    _, lines = ran(made, tmp_path / "first")
    warm = tmp_path / "first/shared"
    finish = Finish(rounds=2, training=made.local)
    over = replace(made, rounds=0, warm_start=warm, finish=finish)
    told = preview(over, 1.0).traffic
    _, (line,) = ran(over, tmp_path / "over")
    assert told.sent == line["sent_bytes"] == sum(line["sent"].values())
    assert line["sent"]["pears"] > lines[0]["sent"]["pears"]
    assert line["received_bytes"] == told.received == 0


def test_parameters_are_those_of_the_files(quick, tmp_path, moe_dir):
    made = replace(quick, personal=LoRA(3, 4.0))
    told = preview(made, 1.0)
    ran(made, tmp_path / "run")
    model = load_model(moe_dir)
    assert told.total == model.num_parameters()
    expert = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters()) // 4
    assert told.active == told.total - 2 * 2 * expert
    from safetensors.torch import load_file

    for part, name in (("graft", "graft.safetensors"), ("personal", "adapter_model.safetensors")):
        (path,) = (tmp_path / "run/clients/pears" / part).glob("*.safetensors")
        own = sum(v.numel() for v in load_file(path).values() if v.is_floating_point())
        assert told.private[part] == own, name
    shared = load_file(tmp_path / "run/shared/adapter_model.safetensors")
    assert told.shared == sum(v.numel() for v in shared.values())
    assert told.private["adapter"] == 0
    alone = preview(replace(made, strategy=STRATEGIES["fedsa-lora"]()), 1.0)
    assert 0 < alone.private["adapter"] < told.shared


def test_tokens_and_work_are_rounds_times_steps_times_rows(quick):
    told = preview(quick, 2e9)
    assert told.tokens == 2 * 3 * 1 * 2 * quick.max_length
    added = told.flops["adapter"] + told.flops["graft"]
    assert told.work == told.tokens * (2 * told.flops["base"] + 3 * added)
    assert told.seconds == told.work / 2e9
    epochs = replace(quick, local=LocalTraining(epochs=2, batch=4))  # ten rows: 4 + 4 + 2
    assert preview(epochs, 1.0).tokens == 2 * 3 * (2 * 10) * quick.max_length


def test_what_is_rehearsed_is_counted(quick):
    said = replace(quick, rehearsal=Rehearsal(rows=3, length=16))
    assert preview(said, 1.0).tokens == preview(quick, 1.0).tokens + 2 * 3 * 1 * 3 * 16


def test_dp_sgd_holds_every_rows_own_values_and_gradients(quick):
    """Beside value, gradient and two moments of a client: two of each row of its batch."""
    plain = replace(quick, graft=None, local=LocalTraining(batch=3))
    noised = replace(plain, local=replace(plain.local, dp_sgd=DPSGD(1.0, 1.0)))
    held = [preview(one, 1e12).memory.trained for one in (plain, noised)]
    assert held[1] * 4 == held[0] * (4 + 2 * 3)


def test_checkpointing_changes_no_result_and_takes_another_forward_pass(quick, tmp_path):
    again = replace(quick, checkpointing=True)
    plain, other = ran(quick, tmp_path / "a")[0], ran(again, tmp_path / "b")[0]
    for name, own in plain["personal"]["clients"].items():
        assert other["personal"]["clients"][name]["loss"] == pytest.approx(own["loss"], rel=1e-5)
    told, more = preview(quick, 1.0), preview(again, 1.0)
    assert more.work - told.work == told.tokens * sum(told.flops.values())
    assert more.memory == told.memory
    assert told.memory.peak(False) - told.memory.peak(True) == (
        told.memory.activations - told.memory.checkpointed
    )


def test_checkpointing_computes_experts_again(quick, tmp_path, monkeypatch):
    """Experts run once more for each step's backward pass, and for nothing else."""
    calls = []
    own = MixtralExperts.forward

    def counting(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return own(self, *args, **kwargs)

    monkeypatch.setattr(MixtralExperts, "forward", counting)
    counts = []
    for name, checkpointing in (("a", False), ("b", True)):
        ran(replace(quick, checkpointing=checkpointing), tmp_path / name)
        counts.append((sum(calls), len(calls) - sum(calls)))
        calls.clear()
    (once, measured), (twice, measured_again) = counts
    assert twice == 2 * once > 0
    assert measured == measured_again


def kept_by(base, state, ids_BT):
    """What autograd keeps of a real step on the CPU, each storage once."""
    parts = (base.model.parameters(), base.model.buffers(), *map(dict.values, vars(state).values()))
    known = {id_of(v) for part in parts for v in part}
    held = {}

    def see(value):
        if id_of(value) not in known:
            held[id_of(value)] = value
        return value

    labels_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    labels_BT[:, 0] = False
    with base.attach(state), saved_tensors_hooks(see, lambda value: value):
        completion_losses(base.model, ids_BT, torch.ones_like(ids_BT), labels_BT, 2)
    return sum(value.untyped_storage().nbytes() for value in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "granitemoeshared"])
@pytest.mark.parametrize("parts", ["graft", "experts"])
def test_activations_are_those_that_autograd_keeps(family, parts, dtype):
    model = FAMILIES[family]().to(dtype)
    lora = LoRA(2, 4.0, experts=parts == "experts")
    graft = Graft(rank=2) if parts == "graft" else None
    freeze(model)
    base = FrozenBase(model, lora, graft, tuple(find_expert_sites(model)))
    state = of_two(base)
    ids_BT = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(1))
    real = kept_by(base, state, ids_BT)
    told = outlined_step(outlined(family, dtype, lora, graft), on_meta(state), 4, 32)
    # The stand-in for experts is not their code: within a tenth, and with grafts much nearer.
    assert told.kept_bytes == pytest.approx(real, rel=0.1 if parts == "experts" else 0.05)
    enable_checkpointing(model)
    assert told.waiting_bytes == pytest.approx(kept_by(base, state, ids_BT), rel=0.05)
    assert told.kept_bytes / 3 < told.layer_bytes < told.kept_bytes - told.waiting_bytes


def of_two(base) -> ClientState:
    made = [
        ClientState(
            base.init_adapter(c),
            base.init_graft(c, "c", [[c]] * len(base.sites) if base.graft else []),
        )
        for c in range(2)
    ]
    stacked = stack(made)
    for part in (stacked.adapter, stacked.graft):
        for value in part.values():
            if value.is_floating_point():
                value.requires_grad_()
    return stacked


def on_meta(state) -> ClientState:
    def moved(tensors):
        return {
            n: v.detach().to("meta").requires_grad_() if v.is_floating_point() else v
            for n, v in tensors.items()
        }

    return ClientState(moved(state.adapter), moved(state.graft))


def outlined(family, dtype, lora, graft) -> FrozenBase:
    prefix, own = _CONFIGS[family]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | dict(own)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    freeze(model)
    return FrozenBase(model, lora, graft, tuple(find_expert_sites(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_outlined(family):
    """Experts per token are those that its own router chooses; its active parameters are fewer."""
    base = outlined(family, torch.bfloat16, LoRA(), None)
    step = outlined_step(base, ClientState(), 2, 16)
    assert step.active == (TOP_K,) * len(SPARSE_LAYERS.get(family, [0, 1]))
    unused = sum((EXPERTS - TOP_K) * 3 * HIDDEN * WIDTH for _ in base.sites)
    total = sum(p.numel() for p in base.model.parameters())
    biases = (EXPERTS - TOP_K) * (2 * WIDTH + HIDDEN) * len(base.sites)
    assert total - active_parameters(base, step) == unused + (biases if family == "gpt_oss" else 0)


@limits(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("ab.é_0", min_size=1, max_size=30),
        st.tuples(
            st.lists(st.integers(0, 12), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        ),
        min_size=1,
    )
)
def test_serialised_bytes_are_those_that_are_written(shapes):
    tensors = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
    assert serialized_bytes(tensors) == message_bytes(tensors) == len(save(tensors))


def says(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["pomona", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def recipe_of(folder, settings):
    path = folder / "recipe.toml"
    path.write_text(dump(settings), encoding="utf-8")
    return path


def test_the_command_needs_config_json_alone_and_writes_nothing(
    quick, moe_dir, tmp_path, monkeypatch, capsys
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((moe_dir / "config.json").read_text())
    recipe = recipe_of(tmp_path, quick)
    before = sorted(tmp_path.rglob("*"))
    given = ("federate", recipe, "--model", tmp_path / "model", "--dry-run", "--tflops", 2)
    code, out, err = says(monkeypatch, capsys, *given)
    assert (code, err) == (0, "")
    told = preview(replace(quick, model=str(tmp_path / "model")), 2e12)
    assert out.splitlines() == str(told).splitlines()
    assert f"{told.total:,} parameters, {told.active:,} active" in out
    assert f"{told.tokens:,} tokens" in out
    assert "2 TFLOP/s (the rate given)" in out
    assert says(monkeypatch, capsys, *given[:-2], "--out", tmp_path / "run")[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_dry_run_is_refused_for(quick, dense_dir, tmp_path, monkeypatch, capsys):
    def refused(made, *more):
        given = ("federate", recipe_of(tmp_path, made), *more)
        code, out, err = says(monkeypatch, capsys, *given)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        return err

    broken = tmp_path / "broken"
    broken.mkdir()
    assert "it holds no config.json" in refused(replace(quick, model=str(broken)), "--dry-run")
    (broken / "config.json").write_text('{"model_type": "mixtrel"}')
    wrong = {
        "org/none is not a folder, and as a Hub id it cannot be fetched": {"model": "org/none"},
        "model type `mixtrel`": {"model": str(broken)},
        "max_length 1000 is longer": {"max_length": 1000},
        "no mixture-of-experts layer": {"model": str(dense_dir)},
        "wqkv": {"adapter": LoRA(targets=("wqkv",))},
        "graft count 9 is more than the 4 experts": {"graft": Graft(count=9)},
        "none.jsonl": {"data": replace(quick.data, train=tmp_path / "none.jsonl")},
        'there is no client "figs"': {"newcomers": ("figs",)},
    }
    for told, change in wrong.items():
        assert told in refused(replace(quick, **change), "--dry-run")
    assert "--tflops goes with --dry-run" in refused(quick, "--tflops", 1, "--out", tmp_path / "r")
    assert "--tflops 0.0 is no rate" in refused(quick, "--dry-run", "--tflops", 0)
    (broken / "config.json").write_text('{"model_type": "mixtral", "hidden_size": "wide"}')
    assert "config.json is wrong" in refused(replace(quick, model=str(broken)), "--dry-run")
    assert not (tmp_path / "r").exists()
    code, _, err = says(monkeypatch, capsys, "federate", recipe_of(tmp_path, quick))
    assert code == 2
    assert "--out" in err


def test_a_dense_model_is_outlined_too(quick, dense_dir):
    told = preview(replace(quick, model=str(dense_dir), graft=None), 1.0)
    assert told.total == told.active == load_model(dense_dir).num_parameters()
    assert outline_model(dense_dir).dtype == torch.float32
