"""A federation across sites over HTTP: the same as in one process, whatever is federated and how."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback import run_across, sites_of
from safetensors.torch import load, load_file

from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.early_stop import EarlyStop
from pomona.federation.local import LocalTraining
from pomona.federation.privacy import Privacy
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.strategies import (
    FedAvg,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    LocalOnly,
    Median,
    Scaffold,
    Tilted,
)
from pomona.models.lora import LoRA
from pomona.parcel import Parcel
from pomona.pipelines.federate import federate
from pomona.pipelines.federate.asking import Patience
from pomona.recipe import dump

SHARED = "shared/adapter_model.safetensors"


def in_process(settings: FederateSettings, path: Path) -> dict:
    """The same federation with every client alone in its batch, as a site is."""
    alone = replace(settings, cohort=1)
    with RunDirectory.open(path, dump(alone), {"method": "x", "seed": settings.seed}) as run:
        return federate(alone, run, device="cpu")


def without_bytes(path: Path) -> Counter[str]:
    """The lines of metrics, without what stays at sites and what counts messages."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in line.items() if k not in ("counts", "openness", "rows", "tokens")}
        for line in lines
    ]
    return Counter(json.dumps(line, sort_keys=True) for line in kept)


def assert_same(one: Path, other: Path, states: Path, names: list[str]) -> None:
    """Shared weights, metrics and every client's own folders are the same bytes."""
    if (one / SHARED).is_file():
        assert (one / SHARED).read_bytes() == (other / SHARED).read_bytes()
    assert without_bytes(one) == without_bytes(other)
    for name in names:
        for path in (one / "clients" / name).rglob("*.safetensors"):
            own = states / name / "run/clients" / name / path.relative_to(one / "clients" / name)
            assert path.read_bytes() == own.read_bytes(), path


VARIANTS = {
    "flex": {"strategy": Tilted(), "shared_expert": SharedGraft(rank=2), "personal": LoRA(2, 4.0)},
    "scaffold": {"strategy": Scaffold()},
    "flora": {"strategy": FLoRA(), "graft": None},
    "flexlora, ranks": {"strategy": FlexLoRA(), "ranks": {"pears": 1}},
    "ffa": {"strategy": FFALoRA()},
    "fedsa": {"strategy": FedSALoRA()},
    "local only": {"strategy": LocalOnly()},
    "median": {"strategy": Median()},
    "central privacy": {"privacy": Privacy(1.0, 0.5)},
    "local privacy": {"privacy": Privacy(1.0, 0.5, "local")},
    "dp-sgd": {"local": LocalTraining(steps=2, batch=2, dp_sgd=DPSGD(1.0, 0.5)), "graft": None},
    "a late one, a new one": {"joins": {"plums": 2}, "newcomers": ("apples",), "finish": Finish(2)},
    "early stop": {"early_stop": EarlyStop(every=1, patience=1)},
    "some lost": {"dropout": 0.4, "fraction": 0.7},
    "int8": {"compression": "int8", "strategy": Tilted()},
    "int8, ranks": {"compression": "int8", "strategy": FlexLoRA(), "ranks": {"pears": 1}},
    "sums": {"secure_aggregation": True, "privacy": Privacy(1.0, 0.5, "local")},
    "sums of B, then alone": {
        "secure_aggregation": True,
        "strategy": FFALoRA(),
        "finish": Finish(1, newcomers_only=False),
    },
}
OFTEN = ("flex", "a late one, a new one", "local privacy", "int8", "sums")


@pytest.mark.parametrize(
    "variant",
    [v if v in OFTEN else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)
def test_sites_end_with_the_bytes_of_a_simulation(settings, variant, tmp_path):
    settings = replace(settings, **VARIANTS[variant])
    ours = in_process(settings, tmp_path / "alone")
    with sites_of(settings, tmp_path / "sites") as (sites, _):
        found = run_across(settings, tmp_path, sites)
    names = list(settings.load())
    assert_same(tmp_path / "alone", tmp_path / "run", tmp_path / "sites", names)
    for model in ("base", "shared", "personal"):
        assert found[model] == ours[model]


def test_a_cohort_of_all_agrees_but_for_the_last_bits(settings, tmp_path):
    with RunDirectory.open(tmp_path / "all", dump(settings), {"method": "x", "seed": 0}) as run:
        federate(settings, run, device="cpu")
    in_process(settings, tmp_path / "alone")
    one, other = (load_file(tmp_path / path / SHARED) for path in ("all", "alone"))
    for name, value in one.items():
        assert value.allclose(other[name], atol=1e-6), name


def test_a_coordinator_that_stops_goes_on_where_it_was(settings, tmp_path):
    in_process(settings, tmp_path / "alone")
    with sites_of(settings, tmp_path / "sites") as (sites, threads):
        stopping = replace(settings, rounds=3)
        commit = RunDirectory.commit

        def once(self, previous, round_, *rest):
            if round_ == 2 and self.path == tmp_path / "run":
                raise KeyboardInterrupt
            return commit(self, previous, round_, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunDirectory, "commit", once)
            with pytest.raises(KeyboardInterrupt):
                run_across(stopping, tmp_path, sites)
        run_across(stopping, tmp_path, sites)
        trained = [p.told["round"] for p in threads["pears"].asked if p.kind == "train"]
        sent = [p.tensors for p in threads["pears"].sent if p.kind == "update"]
    assert trained == [1, 2, 2, 3]
    assert sent[1] == sent[2]
    assert_same(tmp_path / "alone", tmp_path / "run", tmp_path / "sites", list(settings.load()))


def test_a_site_that_has_gone_on_refuses_a_coordinator_that_is_behind(settings, tmp_path):
    short = replace(settings, rounds=2, evaluation=replace(settings.evaluation, every=9))
    told: list[str] = []
    with sites_of(settings, tmp_path / "sites") as (sites, _):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pomona.pipelines.federate.coordinate._finished", lambda *_: {})
            run_across(short, tmp_path, sites)
        for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        with pytest.raises(PomonaError, match="round 1: 0 of 3 sites have answered"):
            run_across(short, tmp_path, sites, Patience(deadline=20, retries=0), told)
    refusals = [sentence for sentence in told if "does not count" in sentence]
    assert len(refusals) == 3
    assert "has finished round 2, but the coordinator asks for round 1" in refusals[0]


def test_what_cannot_go_across_sites_is_refused(settings, tmp_path):
    with sites_of(settings, tmp_path / "sites") as (sites, _):
        with pytest.raises(PomonaError, match="pooled needs everybody's rows in one place"):
            run_across(replace(settings, pooled=True), tmp_path, sites)
        with pytest.raises(PomonaError, match='there is no client "cherries"'):
            run_across(replace(settings, newcomers=("cherries",)), tmp_path / "other", sites)


def test_results_of_sites_make_a_report(settings, tmp_path):
    from pomona.artifacts.report import write_report

    settings = replace(settings, strategy=FedAvg())
    with sites_of(settings, tmp_path / "sites") as (sites, _):
        run_across(settings, tmp_path, sites)
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(name in page for name in settings.load())
    own = tmp_path / "sites/pears/run"
    write_report([own], tmp_path / "own.html")


def test_a_site_that_is_away_is_not_waited_for_until_the_deadline(settings, tmp_path):
    """Of three sites one leaves after the first round; the others end, and the deadline is an hour."""
    patience = Patience(deadline=3600, absence=0.5)
    with sites_of(settings, tmp_path / "sites") as (sites, threads):
        leaving = threads["plums"]

        def once(asked, answer):
            if asked.kind == "train":
                leaving.node.stopped.set()
            return answer

        leaving.twist = once
        found = run_across(settings, tmp_path, sites, patience)
    assert list(found["personal"]["clients"]) == ["apples", "pears"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = Counter(line["client"] for line in lines if line["model"] == "training")
    assert trained == {"apples": 3, "pears": 3, "plums": 1}


ORCHARD = ("apples", "pears", "plums", "quinces", "medlars")


def with_rows(settings: FederateSettings, rows: list[dict], folder: Path) -> FederateSettings:
    folder.mkdir()
    lines = "\n".join(map(json.dumps, rows))
    for kind in ("train", "test"):
        (folder / f"{kind}.jsonl").write_text(lines)
    data = replace(settings.data, train=folder / "train.jsonl", test=folder / "test.jsonl")
    return replace(settings, data=data)


def rows_of(settings: FederateSettings) -> list[dict]:
    return [json.loads(line) for line in Path(settings.data.train).read_text().splitlines()]


@pytest.fixture
def orchard(settings, tmp_path):
    """The small federation with five clients, whose updates are summed under masks."""
    summed = replace(settings, rounds=2, secure_aggregation=True, strategy=FedAvg())
    rows = rows_of(settings)
    dealt = [{**row, "category": name} for i, name in enumerate(ORCHARD) for row in rows[i : i + 6]]
    return with_rows(summed, dealt, tmp_path / "rows")


def leaving(kind: str, threads, name: str):
    """Have a site go when it is asked something, without an answer."""

    def go(asked: Parcel, answer: Parcel) -> Parcel:
        if asked.kind == kind:
            threads[name].node.stopped.set()
            raise PomonaError("gone")
        return answer

    return go


@pytest.mark.parametrize("kind", ["mask shares", "train", "open masks"])
def test_a_sum_is_right_whoever_is_lost_on_the_way(orchard, tmp_path, kind):
    """One of five goes when it is asked for shares, an update, or to open masks: the others make the sum."""
    without = replace(orchard, rounds=1)
    told: list[str] = []
    with sites_of(without, tmp_path / "sites") as (sites, threads):
        threads["plums"].twist = leaving(kind, threads, "plums")
        run_across(without, tmp_path, sites, Patience(deadline=60, absence=0.5), told)
        updates = {
            name: load(thread.sent_of("update").tensors)
            for name, thread in threads.items()
            if thread.sent_of("update")
        }
    gone = kind != "open masks"
    names = [name for name in ORCHARD if not (gone and name == "plums")]
    assert sorted(updates) == sorted(names)
    plain = replace(without, secure_aggregation=False)
    theirs = [row for row in rows_of(plain) if row["category"] in names]
    in_process(with_rows(plain, theirs, tmp_path / "others"), tmp_path / "alone")
    ours, theirs = (load_file(tmp_path / path / SHARED) for path in ("alone", "run"))
    apart = max(float((theirs[name] - value).abs().max()) for name, value in ours.items())
    assert apart <= 1e-7
    first = next(iter(updates.values()))
    assert all(value.dtype == torch.int64 for value in first.values())
    biggest = max(float(v.double().abs().max()) for u in updates.values() for v in u.values())
    assert biggest > 2**60  # what travels is anything


def test_a_round_that_was_opened_is_opened_for_the_same_sites_alone(orchard, tmp_path):
    """A coordinator that stops after a sum was opened ends with the same; another sum is refused."""
    in_process(orchard, tmp_path / "alone")
    with sites_of(orchard, tmp_path / "sites") as (sites, threads):
        commit = RunDirectory.commit

        def once(self, previous, round_, *rest):
            if round_ == 2 and self.path == tmp_path / "run":
                raise KeyboardInterrupt
            return commit(self, previous, round_, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunDirectory, "commit", once)
            with pytest.raises(KeyboardInterrupt):
                run_across(orchard, tmp_path, sites)
        opening = json.loads((tmp_path / "run/opening.json").read_text())
        assert (opening["round"], opening["answered"]) == (2, sorted(ORCHARD))
        threads["medlars"].node.stopped.set()  # it never comes back, and its part is in the sum
        member = threads["pears"].member
        asked = next(p for p in reversed(threads["pears"].asked) if p.kind == "open masks")
        fewer = {**asked.told, "answered": sorted(ORCHARD)[1:]}
        with pytest.raises(PomonaError, match="round 2 was opened as the sum of other sites"):
            member.answer(replace(asked, told=fewer))
        before = {**asked.told, "round": 1}
        with pytest.raises(PomonaError, match="in the round that was finished last"):
            member.answer(replace(asked, told=before))
        two = {**asked.told, "answered": ["pears", "plums"]}
        with pytest.raises(PomonaError, match="opened for 3 or more"):
            member.answer(replace(asked, told=two))
        few = {**asked.told, "keys": {n: asked.told["keys"][n] for n in ("pears", "plums")}}
        with pytest.raises(PomonaError, match="a sum of 2 sites"):
            member.answer(replace(asked, kind="mask shares", told=few))
        asked = [p for p in threads["pears"].asked if p.kind == "open masks"]
        run_across(orchard, tmp_path, sites, Patience(deadline=60, absence=0.5))
        again = [p for p in threads["pears"].asked if p.kind == "open masks"][len(asked) :]
    assert [p.told["session"] for p in again] == [opening["session"]]
    assert not any((tmp_path / "run" / name).exists() for name in ("arrived", "opening.json"))
    ours, theirs = ((tmp_path / kind / SHARED).read_bytes() for kind in ("alone", "run"))
    assert ours == theirs


def test_a_sum_of_too_few_is_not_made(orchard, tmp_path):
    told: list[str] = []
    with sites_of(orchard, tmp_path / "sites") as (sites, threads):
        for name in ORCHARD[:3]:
            threads[name].twist = leaving("mask keys", threads, name)
        with pytest.raises(PomonaError, match="masks of round 1: 2 of 5 sites have answered and 3"):
            run_across(orchard, tmp_path, sites, Patience(4, 0.5, 0.2, 0), told)
        assert not any(thread.sent_of("update") for thread in threads.values())
