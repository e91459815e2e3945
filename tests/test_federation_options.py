"""What a recipe can say about rounds and parts, end to end: who trains when, what leaves, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import now_and_then
from safetensors.torch import load_file, save, save_file
from test_federate import WRITES, Stopped, files_of, run, stopped_after

from pomona.artifacts import run as run_module
from pomona.artifacts.graft_format import read_graft
from pomona.artifacts.personal import PersonalModel
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.early_stop import EarlyStop
from pomona.federation.local import LocalTraining
from pomona.federation.privacy import Privacy
from pomona.federation.rehearsal import Rehearsal
from pomona.federation.settings import Finish
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.strategies import (
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    Krum,
    LocalOnly,
    Scaffold,
)
from pomona.models.lora import LoRA
from pomona.models.peft_format import read_adapter
from pomona.models.weights import read_tensors, write_tensors
from pomona.pipelines.evaluate import on_rows


def metrics(path: Path, model: str) -> list[dict]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if line["model"] == model]


def trained(path: Path) -> list[tuple[int, str]]:
    return [(line["round"], line["client"]) for line in metrics(path, "training")]


def own_loss(path: Path, client: str) -> float:
    lines = map(json.loads, (path / "answers.jsonl").read_text("utf-8").splitlines())
    own = [a for a in lines if (a["client"], a["model"]) == (client, "personal")]
    return sum(a["nats"] for a in own) / sum(a["tokens"] for a in own)


def measured_again(settings, path: Path, client: str, rows: Path, **parts: str) -> float:
    """The loss of what lies on disk, as `pomona evaluate` measures it."""
    lines = Path(settings.data.test).read_text("utf-8").splitlines()
    rows.write_text("\n".join(x for x in lines if json.loads(x)["category"] == client))
    personal = PersonalModel(
        settings.model, **{name: path / where for name, where in parts.items()}
    )
    return on_rows(personal, rows, limit=3, length=96, new_tokens=4)[rows.name]["loss"]


def test_a_client_joins_late_and_a_newcomer_trains_when_it_is_over(settings, tmp_path):
    late = replace(
        settings,
        joins={"pears": 2},
        newcomers=("plums",),
        finish=Finish(rounds=2, training=LocalTraining(steps=1, batch=2)),
    )
    run(late, tmp_path / "run")
    assert trained(tmp_path / "run") == [
        (1, "apples"),
        (2, "apples"),
        (2, "pears"),
        (3, "apples"),
        (3, "pears"),
        (4, "plums"),
        (5, "plums"),
    ]
    lines = {m["round"]: m for m in metrics(tmp_path / "run", "communication")}
    assert list(lines) == [1, 2, 3, 4]
    assert lines[4]["sent"] == {"plums": lines[3]["sent"]["apples"]}, "the shared part, once"
    assert lines[4]["received"] == {"plums": 0}
    losses = {
        m["round"]: m["loss"]
        for m in metrics(tmp_path / "run", "personal")
        if m["client"] == "plums"
    }
    shared = {
        m["round"]: m["loss"] for m in metrics(tmp_path / "run", "shared") if m["client"] == "plums"
    }
    assert losses[2] == shared[2], "a newcomer's graft is silent until it trains"
    assert losses[5] != shared[5]
    found = measured_again(
        late,
        tmp_path / "run",
        "plums",
        tmp_path / "plums.jsonl",
        adapter="shared",
        graft="clients/plums/graft",
    )
    assert found == pytest.approx(own_loss(tmp_path / "run", "plums"), abs=1e-6)


def test_everybody_may_train_the_shared_adapter_further(settings, tmp_path):
    tuned = replace(
        settings,
        graft=None,
        finish=Finish(1, LocalTraining(steps=2, batch=2), adapter=True, newcomers_only=False),
    )
    run(tuned, tmp_path / "run")
    _, shared = read_adapter(tmp_path / "run/shared")
    for client in ("apples", "pears", "plums"):
        _, own = read_adapter(tmp_path / "run/clients" / client / "adapter")
        assert own.keys() == shared.keys()
        assert any(not torch.equal(own[n], shared[n]) for n in own)
    found = measured_again(
        tuned, tmp_path / "run", "pears", tmp_path / "p.jsonl", adapter="clients/pears/adapter"
    )
    assert found == pytest.approx(own_loss(tmp_path / "run", "pears"), abs=1e-6)


def test_lost_clients_neither_send_nor_change(settings, tmp_path):
    run(replace(settings, dropout=0.6, rounds=4), tmp_path / "run")
    done = trained(tmp_path / "run")
    assert 0 < len(done) < 12
    for line in metrics(tmp_path / "run", "communication"):
        answered = {client for round_, client in done if round_ == line["round"]}
        assert {c for c, size in line["received"].items() if size} == answered
        assert set(line["sent"]) == {"apples", "pears", "plums"}


def test_pooled_rows_train_one_model_that_serves_everybody(settings, tmp_path):
    results = run(replace(settings, pooled=True), tmp_path / "run")
    assert {client for _, client in trained(tmp_path / "run")} == {"everyone"}
    assert list(results["personal"]["clients"]) == ["apples", "pears", "plums"]
    grafts = [
        (tmp_path / "run/clients" / c / "graft/graft.safetensors").read_bytes()
        for c in ("apples", "pears", "plums")
    ]
    assert len(set(grafts)) == 1


def test_a_warm_start_begins_where_another_run_has_ended(settings, tmp_path):
    run(settings, tmp_path / "first")
    warm = replace(settings, warm_start=tmp_path / "first/shared")
    run(warm, tmp_path / "second")
    ended = [m["loss"] for m in metrics(tmp_path / "first", "shared") if m["round"] == 3]
    lazy = LocalTraining(steps=1, batch=1, learning_rate=0.0, final_learning_rate=0.0)
    run(replace(warm, local=lazy), tmp_path / "still")
    still = [m["loss"] for m in metrics(tmp_path / "still", "shared") if m["round"] == 3]
    assert still == pytest.approx(ended, abs=1e-6)
    with pytest.raises(PomonaError, match=r"warm_start .* is no adapter as the recipe has it"):
        run(replace(warm, adapter=LoRA(3, 6.0)), tmp_path / "other")


def test_a_run_goes_on_only_from_the_warm_start_it_began_with(settings, tmp_path, monkeypatch):
    """Clients that have not trained yet are born of it, whenever that is."""
    run(settings, tmp_path / "first")
    warm = replace(settings, warm_start=tmp_path / "first/shared")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "note_time", stop)
        with pytest.raises(KeyboardInterrupt):
            run(warm, tmp_path / "second")
    path = tmp_path / "first/shared/adapter_model.safetensors"
    whole = path.read_bytes()
    write_tensors(path, {n: 2 * v for n, v in read_tensors(path).items()}, {"format": "pt"})
    with pytest.raises(PomonaError, match=r"warm start's file adapter_model\S+ has changed since"):
        run(warm, tmp_path / "second")
    path.write_bytes(whole)
    run(warm, tmp_path / "second")


def test_new_clients_graft_onto_a_federation_that_is_over(settings, tmp_path):
    run(settings, tmp_path / "first")
    new = replace(
        settings,
        rounds=0,
        warm_start=tmp_path / "first/shared",
        finish=Finish(2, LocalTraining(steps=1, batch=2)),
    )
    run(new, tmp_path / "new")
    assert trained(tmp_path / "new") == [
        (round_, client) for round_ in (1, 2) for client in ("apples", "pears", "plums")
    ]
    (line,) = metrics(tmp_path / "new", "communication")
    size = {m["sent"]["pears"] for m in metrics(tmp_path / "first", "communication")}
    assert (line["round"], {*line["sent"].values()}, line["received_bytes"]) == (1, size, 0)
    _, before = read_adapter(tmp_path / "first/shared")
    _, after = read_adapter(tmp_path / "new/shared")
    assert all(torch.equal(after[n], v) for n, v in before.items())
    found = measured_again(
        new,
        tmp_path / "new",
        "plums",
        tmp_path / "plums.jsonl",
        adapter="shared",
        graft="clients/plums/graft",
    )
    assert found == pytest.approx(own_loss(tmp_path / "new", "plums"), abs=1e-6)
    with pytest.raises(PomonaError, match="rounds 0 is not positive"):
        replace(new, warm_start=None)


def test_a_personal_lora_stays_and_comes_back(settings, tmp_path):
    both = replace(settings, personal=LoRA(2, 4.0, ("o_proj",), layers=(1,)))
    run(both, tmp_path / "run")
    assert all(
        "o_proj" not in n for n in load_file(tmp_path / "run/shared/adapter_model.safetensors")
    )
    found = measured_again(
        both,
        tmp_path / "run",
        "pears",
        tmp_path / "p.jsonl",
        adapter="shared",
        graft="clients/pears/graft",
        personal="clients/pears/personal",
    )
    assert found == pytest.approx(own_loss(tmp_path / "run", "pears"), abs=1e-6)


@pytest.mark.parametrize("strategy", [FedSALoRA(), FFALoRA(), FLoRA(), Scaffold(), LocalOnly()])
def test_what_lies_on_disk_is_what_was_measured(settings, tmp_path, strategy):
    run(replace(settings, strategy=strategy), tmp_path / "run")
    whole = strategy.shares == "adapter"
    found = measured_again(
        settings,
        tmp_path / "run",
        "pears",
        tmp_path / "p.jsonl",
        adapter="shared" if whole else "clients/pears/adapter",
        graft="clients/pears/graft",
    )
    assert found == pytest.approx(own_loss(tmp_path / "run", "pears"), abs=2e-5)


@pytest.mark.parametrize("strategy", [FlexLoRA(), FLoRA(), LocalOnly()])
def test_clients_of_a_smaller_rank_hold_and_send_no_more(settings, tmp_path, strategy):
    mixed = replace(settings, strategy=strategy, ranks={"pears": 1}, graft=None)
    run(mixed, tmp_path / "run")
    _, small = read_adapter(tmp_path / "run/clients/pears/adapter")
    factors = {n: v for n, v in small.items() if n.endswith(("lora_A", "lora_B"))}
    if not isinstance(strategy, FLoRA):  # whose residual leaves as factors of full rank
        for name, value in factors.items():
            beyond = value[1:] if name.endswith("lora_A") else value[:, 1:]
            assert beyond.numel() and not beyond.any(), name
    for line in metrics(tmp_path / "run", "communication"):
        if strategy.shares == "adapter":
            assert 0 < line["received"]["pears"] < line["received"]["apples"]
            assert 0 < line["sent"]["pears"] < line["sent"]["apples"]
    found = measured_again(
        mixed, tmp_path / "run", "pears", tmp_path / "p.jsonl", adapter="clients/pears/adapter"
    )
    assert found == pytest.approx(own_loss(tmp_path / "run", "pears"), abs=2e-5)


def test_a_shared_expert_is_trained_together_and_comes_back(settings, tmp_path):
    together = replace(settings, shared_expert=SharedGraft(rank=2, expert=1))
    run(together, tmp_path / "run")
    folder = tmp_path / "run/shared"
    assert not (tmp_path / "run/clients/pears/adapter").exists()
    _, tensors = read_graft(folder / "expert")
    trained_ones = [v for n, v in tensors.items() if "lora_B" in n]
    assert trained_ones
    assert all(v.abs().max() > 0 for v in trained_ones)
    _, lora = read_adapter(folder)
    sent = {**lora, **{f"shared_expert.{n}": v for n, v in tensors.items() if v.ndim}}
    lines = metrics(tmp_path / "run", "communication")
    assert {n for line in lines for n in line["sent"].values()} == {len(save(sent))}
    parts = {"adapter": "shared", "graft": "clients/pears/graft"}
    found = measured_again(together, tmp_path / "run", "pears", tmp_path / "p.jsonl", **parts)
    assert found == pytest.approx(own_loss(tmp_path / "run", "pears"), abs=1e-6)
    new = replace(
        together,
        rounds=0,
        warm_start=folder,
        finish=Finish(1, LocalTraining(steps=1, batch=2), newcomers_only=False),
    )
    run(new, tmp_path / "new")
    again = read_graft(tmp_path / "new/shared/expert")[1]
    assert all(torch.equal(again[n], v) for n, v in tensors.items())
    for other in (None, SharedGraft(rank=2, expert=0), SharedGraft(rank=2, expert=1, alpha=3.0)):
        with pytest.raises(PomonaError, match="and one shared expert; give the same in"):
            run(replace(new, shared_expert=other), tmp_path / f"other {other and other.alpha}")


def test_a_damaged_shared_expert_is_told(settings, tmp_path):
    together = replace(settings, shared_expert=SharedGraft(rank=2))
    run(together, tmp_path / "run")
    folder = tmp_path / "run/shared/expert"
    path = folder / "graft.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith(".expert"))
    for broken in (
        {n: v for n, v in tensors.items() if n != name},
        {**tensors, name: torch.tensor(9)},
    ):
        save_file(broken, path)
        with pytest.raises(PomonaError, match=f"{folder} does not belong to"):
            measured_again(
                together, tmp_path / "run", "pears", tmp_path / "p.jsonl", adapter="shared"
            )


STILL = LocalTraining(steps=1, batch=2, learning_rate=0.0, final_learning_rate=0.0)


def stopping_early(settings):
    """A learning rate of zero never brings a new best: two measurements after the first are enough."""
    return replace(settings, rounds=9, local=STILL, early_stop=EarlyStop(2, share=0.4))


@pytest.mark.parametrize("finish", [None, Finish(2, STILL, newcomers_only=False)])
def test_rounds_end_when_held_back_rows_are_not_answered_better(settings, tmp_path, finish):
    told: list[str] = []
    run(replace(stopping_early(settings), finish=finish), tmp_path / "run", tell=told.append)
    finishing = [10, 11] if finish else []
    assert sorted({round_ for round_, _ in trained(tmp_path / "run")}) == [1, 2, 3, *finishing]
    held_back = metrics(tmp_path / "run", "held back")
    assert {(line["round"], line["client"]) for line in held_back} == {
        (round_, name) for round_ in (1, 2, 3) for name in ("apples", "pears", "plums")
    }
    assert sum("round 3: stopped early" in line for line in told) == 1
    last = [line["round"] for line in metrics(tmp_path / "run", "personal")]
    assert max(last) == (11 if finish else 3)
    assert last.count(max(last)) == 3, "the last round is measured once for every client"


def test_an_early_stop_survives_an_interruption(settings, tmp_path, monkeypatch):
    stopping = stopping_early(settings)
    run(stopping, tmp_path / "whole")

    def failing(*_args, **_kwargs):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(run_module.RunDirectory, "write_answers", failing)
        with pytest.raises(Stopped):
            run(stopping, tmp_path / "cut")
    run(stopping, tmp_path / "cut")
    whole, cut = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


@pytest.mark.parametrize("writes", now_and_then([17], [3, 7, 12]))
def test_memory_and_kept_optimisers_survive_an_interruption(
    settings, tmp_path, monkeypatch, writes
):
    rich = replace(
        settings,
        strategy=Scaffold(0.6),
        fraction=0.6,
        local=LocalTraining(epochs=1, batch=2, keep_optimiser=True),
        personal=LoRA(2, 4.0, ("o_proj",)),
        rehearsal=Rehearsal(texts=4, length=8, top=8),
        finish=Finish(2, LocalTraining(steps=1), newcomers_only=False),
    )
    run(rich, tmp_path / "whole")
    with stopped_after(writes, monkeypatch, WRITES[:2]):
        run(rich, tmp_path / "cut")
    run(rich, tmp_path / "cut")
    whole, cut = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


def test_what_is_rehearsed_is_the_same_with_checkpointing(settings, tmp_path):
    """Activations are computed again in training, and the base still says its texts with a cache."""
    said = replace(settings, rehearsal=Rehearsal(5.0, texts=4, length=8, top=8))
    losses = [
        run(replace(s, name=name), tmp_path / name)["personal"]["mean"]["loss"]
        for name, s in (
            ("plain", settings),
            ("said", said),
            ("again", replace(said, checkpointing=True)),
        )
    ]
    assert losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"joins": {"kiwis": 2}}, 'joins: there is no client "kiwis"'),
        ({"local": LocalTraining(rates={"kiwis": 2.0})}, 'local.rates: there is no client "kiwis"'),
        ({"newcomers": ("kiwis",)}, 'newcomers: there is no client "kiwis"'),
        ({"newcomers": ("apples", "pears", "plums")}, "all clients are newcomers"),
        ({"joins": {"pears": 9}}, 'client "pears" joins in round 9, but the rounds are 1 to 3'),
        ({"joins": {"apples": 2, "pears": 2, "plums": 3}}, "joins: nobody takes part in round 1"),
        (
            {"strategy": Krum(1)},
            "Krum got 3 updates in a round, but malicious = 1 needs at least 5",
        ),
        ({"strategy": Krum(), "fraction": 0.6}, "Krum got 2 updates in a round"),
        ({"strategy": Krum(), "dropout": 0.4}, "Krum got 2 updates in a round"),
        ({"strategy": Scaffold(0.5)}, "strategy fraction 0.5 of scaffold is not the recipe's"),
        ({"newcomers": ("plums",), "graft": None}, "has nothing of its own to train"),
        ({"graft": None, "finish": Finish(newcomers_only=False)}, "nothing of its own to train"),
        ({"ranks": {"pears": 1}}, "ranks: FedAvg needs the same rank of everybody"),
        ({"ranks": {"pears": 9}, "strategy": FLoRA()}, 'client "pears" has rank 9, which is not'),
        (
            {"shared_expert": SharedGraft(), "strategy": FLoRA()},
            "a shared expert has one rank and no residual",
        ),
        ({"dropout": 1.0}, "dropout 1.0 is not a share below 1"),
        ({"pooled": True, "newcomers": ("pears",)}, "leave out newcomers and joins"),
        ({"adapter": LoRA(layers=(7,))}, "LoRA layer 7 has none of the targets; layers 0 to 1 do"),
    ],
)
def test_what_cannot_be_is_told(settings, tmp_path, given, message):
    with pytest.raises(PomonaError, match=message):
        run(replace(settings, **given), tmp_path / "run")


def test_int8_learns_as_much_and_goes_on_with_what_it_has_lost(settings, tmp_path, monkeypatch):
    """A quarter of the bytes, nearly the same model; killed and resumed, the same bytes."""
    exact = replace(settings, adapter=LoRA(8, 16.0))
    int8 = replace(exact, compression="int8")
    run(exact, tmp_path / "exact")
    run(int8, tmp_path / "int8")
    sent = {
        kind: metrics(tmp_path / kind, "communication")[0]["received_bytes"]
        for kind in ("exact", "int8")
    }
    assert sent["int8"] < 0.5 * sent["exact"]  # of tensors so small a third is names
    one, other = (read_adapter(tmp_path / kind / "shared")[1] for kind in ("exact", "int8"))
    moved = max(float((one[n] - other[n]).abs().max()) for n in one)
    assert 0 < moved < 0.01
    for client in ("apples", "pears"):
        assert own_loss(tmp_path / "int8", client) == pytest.approx(
            own_loss(tmp_path / "exact", client), abs=0.01
        )
    with stopped_after(12, monkeypatch, WRITES):
        run(int8, tmp_path / "cut")
    run(int8, tmp_path / "cut")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "int8")


def test_sums_in_integers_are_those_of_floats(settings, tmp_path):
    run(settings, tmp_path / "plain")
    run(replace(settings, secure_aggregation=True), tmp_path / "sums")
    one, other = (read_adapter(tmp_path / kind / "shared")[1] for kind in ("plain", "sums"))
    assert all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"compression": "int8", "strategy": LocalOnly()}, "LocalOnly sends back no such thing"),
        ({"compression": "int8", "strategy": FLoRA()}, "FLoRA sends back no such thing"),
        (
            {"secure_aggregation": True, "strategy": Krum()},
            "Krum looks at every update, but secure_aggregation shows it only their sum",
        ),
        ({"secure_aggregation": True, "compression": "int8"}, "leave out compression"),
        ({"secure_aggregation": True, "pooled": True}, "leave out pooled"),
        (
            {"secure_aggregation": True, "privacy": Privacy(1.0, 1.0)},
            "clips every update at the server",
        ),
    ],
)
def test_messages_that_a_strategy_has_no_use_for_are_refused(settings, change, complaint):
    with pytest.raises(PomonaError, match=complaint):
        replace(settings, **change)


def test_a_sum_of_two_is_refused_before_anything_is_trained(settings, tmp_path):
    two = replace(settings, secure_aggregation=True, fraction=0.6)
    with pytest.raises(PomonaError, match="2 clients answer in round 1, and the sum of fewer than"):
        run(two, tmp_path / "run")
