"""Privacy of the shared update: ε against closed forms, clipping and noise against their definitions."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from conftest import now_and_then
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm
from test_federate import WRITES, stopped_after

from pomona.artifacts.report import write_report
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.clients import ClientData
from pomona.federation.early_stop import EarlyStop
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.privacy import KEY, Privacy, clipped, epsilon, noise_key, protect
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.strategies import (
    STRATEGIES,
    Corrects,
    FedAvg,
    FedAvgM,
    FlexLoRA,
    Hears,
    Krum,
    LocalOnly,
    Median,
)
from pomona.federation.update import Update
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.progress import unheard
from pomona.recipe import dump, read_recipe

SENT = {"a": torch.randn(40, 50, generator=torch.Generator().manual_seed(1)), "b": torch.ones(30)}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


def updates(count: int, seed: int = 0, size: float = 1.0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(
            f"c{i}",
            10 * i + 1,
            {n: v + size * torch.randn(v.shape, generator=generator) for n, v in SENT.items()},
        )
        for i in range(count)
    ]


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensors[n].double().numpy().ravel() for n in sorted(SENT)])


def change(update: Update) -> np.ndarray:
    return flat(update.shared) - flat(SENT)


def gaussian_delta(eps: float, sigma: float) -> float:
    """Balle & Wang, ICML 2018, theorem 8: what δ a Gaussian of sensitivity 1 has at ε."""
    a, b = 1 / (2 * sigma), eps * sigma
    return norm.cdf(a - b) - math.exp(eps + norm.logcdf(-a - b))


@pytest.mark.parametrize("rounds", [1, 7, 100])
@pytest.mark.parametrize("noise", [0.8, 3.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_epsilon_of_composed_gaussians_is_the_closed_form(rounds, noise, delta):
    """k rounds of deviation σ are one of σ / √k; a local change may be replaced: twice as far."""

    def exact(sigma):
        return brentq(lambda e: gaussian_delta(e, sigma / math.sqrt(rounds)) - delta, 0, 600)

    assert epsilon(Privacy(2.0, noise, delta=delta), {(3, 9): rounds}) == pytest.approx(
        exact(noise)
    )
    local = Privacy(2.0, noise, "local", delta)
    assert epsilon(local, {(3, 9): rounds}) == pytest.approx(exact(noise / 2))


@pytest.mark.parametrize(
    ("clients", "sampled", "noise"), [(10, 1, 0.7), (10, 4, 1.0), (50, 5, 2.0)]
)
def test_one_poisson_round_is_the_integral_over_both_directions(clients, sampled, noise):
    q, delta = sampled / clients, 1e-4

    def with_client(x):
        return (1 - q) * norm.pdf(x, 0, noise) + q * norm.pdf(x, 1, noise)

    def without(x):
        return norm.pdf(x, 0, noise)

    def loss(eps, p, r):
        above = lambda x: max(p(x) - math.exp(eps) * r(x), 0.0)  # noqa: E731
        return quad(above, -12 * noise, 12 * noise + 1, limit=500, points=[0.0, 0.5, 1.0])[0]

    exact = brentq(
        lambda e: max(loss(e, with_client, without), loss(e, without, with_client)) - delta, 0, 50
    )
    found = epsilon(Privacy(1.0, noise, delta=delta, sampling="poisson"), {(sampled, clients): 1})
    assert found == pytest.approx(exact, rel=2e-3)
    assert found >= exact * (1 - 1e-4)  # rounded to the safe side


@pytest.mark.parametrize(
    ("clients", "sampled", "rounds"), [(100, 2, 30), (1000, 20, 100), (10, 9, 3)]
)
def test_epsilon_of_samples_is_the_librarys(clients, sampled, rounds):
    noise, delta = 4.0, 1e-5
    fixed = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    fixed.compose(
        dp_accounting.SampledWithoutReplacementDpEvent(
            clients, sampled, dp_accounting.GaussianDpEvent(noise / 2)
        ),
        rounds,
    )
    plain = dp_accounting.get_epsilon_gaussian(noise / 2 / math.sqrt(rounds), delta)
    found = epsilon(
        Privacy(1.0, noise, delta=delta, sampling="fixed"), {(sampled, clients): rounds}
    )
    assert found == min(fixed.get_epsilon(delta), plain)
    poisson = dp_accounting.rdp.RdpAccountant()
    poisson.compose(
        dp_accounting.PoissonSampledDpEvent(
            sampled / clients, dp_accounting.GaussianDpEvent(noise)
        ),
        rounds,
    )
    tight = epsilon(
        Privacy(1.0, noise, delta=delta, sampling="poisson"), {(sampled, clients): rounds}
    )
    assert 0.6 * poisson.get_epsilon(delta) < tight <= poisson.get_epsilon(delta)


def test_rounds_of_several_samples_add_up():
    """Where clients join late, every round is accounted for with those who could be in it."""
    noise, delta, rounds = 4.0, 1e-5, {(2, 10): 5, (4, 20): 7}
    fixed = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    poisson = dp_accounting.pld.PLDAccountant()
    for (sampled, of), times in rounds.items():
        half, whole = (dp_accounting.GaussianDpEvent(n) for n in (noise / 2, noise))
        fixed.compose(dp_accounting.SampledWithoutReplacementDpEvent(of, sampled, half), times)
        poisson.compose(dp_accounting.PoissonSampledDpEvent(sampled / of, whole), times)
    plain = dp_accounting.get_epsilon_gaussian(noise / 2 / math.sqrt(12), delta)
    found = epsilon(Privacy(1.0, noise, delta=delta, sampling="fixed"), rounds)
    assert found == pytest.approx(min(fixed.get_epsilon(delta), plain))
    found = epsilon(Privacy(1.0, noise, delta=delta, sampling="poisson"), rounds)
    assert found == pytest.approx(poisson.get_epsilon(delta), rel=1e-3)


def test_early_stop_would_tell_what_noise_hides(plain):
    with pytest.raises(PomonaError, match="early_stop tells the loss of rows without noise"):
        replace(plain, privacy=Privacy(0.5, 2.0), early_stop=EarlyStop())


def test_who_cannot_be_sampled_hides_nobody(plain, tmp_path):
    """Newcomers and those who join later are not among the clients that a round draws from."""
    private = replace(
        plain,
        rounds=2,
        fraction=0.5,
        newcomers=("plums",),
        joins={"pears": 2},
        graft=Graft(),
        finish=Finish(1, LocalTraining(steps=1, batch=2)),
        privacy=Privacy(0.5, 2.0, delta=1e-3, sampling="fixed"),
    )
    lines = metrics(run(private, tmp_path / "late"), "privacy")
    told = [epsilon(private.privacy, r) for r in ({(1, 1): 1}, {(1, 1): 1, (1, 2): 1})]
    assert [line["epsilon"] for line in lines] == told


def test_amplification_is_what_small_samples_gain():
    def spent(sampling, sampled):
        return epsilon(Privacy(1.0, 4.0, sampling=sampling), {(sampled, 1000): 100})

    for sampling in ("fixed", "poisson"):
        assert spent(sampling, 10) < spent("known", 10) / 3
        assert spent(sampling, 10) < spent(sampling, 100)
    assert spent("poisson", 1000) == spent("known", 1000)
    assert spent("fixed", 1000) == epsilon(Privacy(1.0, 2.0), {(1000, 1000): 100})


@given(
    noise=st.floats(0.3, 20),
    rounds=st.integers(1, 200),
    sampling=st.sampled_from(["known", "fixed", "poisson"]),
    sampled=st.integers(1, 40),
)
@settings(max_examples=10, deadline=None)
def test_more_rounds_cost_more_and_more_noise_less(noise, rounds, sampling, sampled):
    def spent(noise, rounds):
        return epsilon(Privacy(1.0, noise, sampling=sampling), {(sampled, 40): rounds})

    assert 0 <= spent(noise, rounds) <= spent(noise, rounds + 5) * (1 + 1e-3)
    assert spent(2 * noise, rounds) <= spent(noise, rounds)


@given(seed=st.integers(0, 99), size=st.floats(1e-4, 10), clip=st.floats(1e-3, 100))
@settings(max_examples=60, deadline=None)
def test_a_clipped_change_keeps_its_direction_and_at_most_its_norm(seed, size, clip):
    (update,) = updates(1, seed, size)
    before, after = change(update), flat(clipped(SENT, update, clip))
    length = np.linalg.norm(before)
    assert np.linalg.norm(after) <= clip * (1 + 1e-12)
    np.testing.assert_allclose(after, before * min(1, clip / length), rtol=1e-9, atol=1e-12)
    if length <= clip:
        assert np.array_equal(after, before)


def test_a_client_that_learnt_nothing_is_clipped_to_nothing():
    assert not flat(clipped(SENT, Update("c", 1, SENT), 0.5)).any()


def test_without_noise_to_speak_of_the_mean_is_of_clipped_changes_each_counting_the_same():
    sent = updates(4, size=3.0)
    (mean,) = protect(Privacy(1.5, 1e-9), SENT, sent, "k", 1)
    expected = np.mean([1.5 * change(u) / np.linalg.norm(change(u)) for u in sent], axis=0)
    np.testing.assert_allclose(change(mean), expected, atol=2e-7)
    assert mean.rows == 1
    local = list(protect(Privacy(1.5, 1e-9, "local"), SENT, sent, "k", 1))
    assert [u.client for u in local] == [u.client for u in sent]
    assert {u.rows for u in local} == {1}
    for was, now in zip(sent, local, strict=True):
        direction = change(was) / np.linalg.norm(change(was))
        np.testing.assert_allclose(change(now), 1.5 * direction, atol=3e-7)


@pytest.mark.parametrize(("where", "clients"), [("central", 5), ("local", 5)])
def test_noise_has_the_deviation_that_is_accounted_for(where, clients):
    """2,030 coordinates of 30 rounds: the deviation is known to 0.4 %, the mean to 0.01 of it."""
    privacy = Privacy(2.0, 1.5, where)
    still = [Update(f"c{i}", 1, SENT) for i in range(clients)]
    rounds = [list(protect(privacy, SENT, still, "k", r)) for r in range(30)]
    noise = np.stack([np.mean([change(u) for u in sent], axis=0) for sent in rounds])
    expected = 3.0 / (clients if where == "central" else math.sqrt(clients))
    assert noise.std() == pytest.approx(expected, rel=0.015)
    assert abs(noise.mean()) < 0.02 * expected
    assert abs(np.corrcoef(noise)[np.triu_indices(30, 1)]).max() < 0.12
    if where == "local":
        one = np.stack([change(sent[0]) for sent in rounds])
        other = np.stack([change(sent[1]) for sent in rounds])
        assert one.std() == pytest.approx(3.0, rel=0.015)
        assert abs((one * other).mean()) < 0.02 * 9


@pytest.mark.parametrize("where", ["central", "local"])
def test_noise_is_a_function_of_key_round_and_client(where):
    privacy, sent = Privacy(1.0, 1.0, where), updates(3)

    def noised(key="k", round_=4, order=(0, 1, 2)):
        found = protect(privacy, SENT, [sent[i] for i in order], key, round_)
        return np.stack([change(u) for u in sorted(found, key=lambda u: u.client)])

    assert np.array_equal(noised(), noised())
    assert np.array_equal(noised(), noised(order=(2, 0, 1)))
    for other in (noised(key="l"), noised(round_=5)):
        assert (noised() != other).mean() > 0.99


def test_nobody_sent_anything():
    assert list(protect(Privacy(1.0, 1.0), SENT, [], "k", 1)) == []
    assert list(protect(Privacy(1.0, 1.0, "local"), SENT, [], "k", 1)) == []


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (lambda: Privacy(0.0, 1.0), "privacy clip 0.0 is not positive"),
        (lambda: Privacy(1.0, -1.0), "privacy noise -1.0 is not positive"),
        (lambda: Privacy(1.0, float("nan")), "privacy noise nan is not positive"),
        (lambda: Privacy(float("inf"), 1.0), "privacy clip inf is not positive"),
        (lambda: Privacy(1.0, 1.0, delta=0.0), "privacy delta 0.0 is not between 0 and 1"),
        (lambda: Privacy(1.0, 1.0, delta=1.0), "privacy delta 1.0 is not between 0 and 1"),
        (
            lambda: Privacy(1.0, 1.0, "local", sampling="poisson"),
            'sampling "poisson" does not go with where = "local"',
        ),
        (lambda: Privacy(1.0, 1.0).check(LocalOnly()), "LocalOnly shares nothing"),
        (lambda: Privacy(1.0, 1.0).check(Median()), "Median looks at every update"),
        (lambda: Privacy(1.0, 1.0).check(Krum()), "Krum looks at every update"),
        (
            lambda: Privacy(1.0, 1.0).check(FlexLoRA()),
            'use privacy where = "local", or one of FedAvg,',
        ),
        (
            lambda: clipped(SENT, Update("pears", 1, {"c": torch.ones(2)}), 1.0),
            'client "pears" sent c unlike what it was sent',
        ),
        (
            lambda: clipped(SENT, Update("pears", 1, {"b": torch.ones(31)}), 1.0),
            'client "pears" sent b unlike what it was sent',
        ),
        (
            lambda: clipped(SENT, Update("pears", 1, {"b": torch.full((30,), math.nan)}), 1.0),
            'client "pears" sent values that are not finite',
        ),
    ],
)
def test_what_makes_no_sense_is_named(made, complaint):
    with pytest.raises(PomonaError, match=complaint):
        made()


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_strategy_is_private_locally_or_shares_nothing(kind):
    strategy = STRATEGIES[kind]()
    if strategy.shares == "nothing":
        return
    if isinstance(strategy, Corrects | Hears):
        with pytest.raises(PomonaError, match="sends more than its update"):
            Privacy(1.0, 1.0, "local").check(strategy)
        return
    Privacy(1.0, 1.0, "local").check(strategy)
    generator = torch.Generator().manual_seed(1)
    pair = {"q.lora_A": (2, 9), "q.lora_B": (7, 2)}
    sent = {n: torch.randn(shape, generator=generator) for n, shape in pair.items()}
    state = strategy.init(sent)
    told = protect(
        Privacy(1.0, 0.1, "local"), sent, [Update(f"c{i}", 1, sent) for i in range(5)], "k", 1
    )
    moved = strategy.aggregate(state, told).shared
    assert all(value.isfinite().all() for value in moved.values())
    assert any(not torch.equal(value, state.shared[name]) for name, value in moved.items())


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(PomonaError, match=r"pip install 'pomona\[privacy\]'"):
        Privacy(1.0, 1.0).check(FedAvg())


def test_the_key_is_the_recipes_seed_or_a_secret_long_enough(monkeypatch):
    assert noise_key(3) == ("seed 3", False)
    monkeypatch.setenv(KEY, "too short")
    with pytest.raises(PomonaError, match=f"{KEY} is too short") as caught:
        Privacy(1.0, 1.0).check(FedAvg())
    assert "too short to be" in str(caught.value)
    monkeypatch.setenv(KEY, "0123456789abcdef")
    (three, secret), (four, _) = noise_key(3), noise_key(4)
    assert secret
    assert three != four


@pytest.fixture
def plain(moe_dir: Path, rows_dir: Path) -> FederateSettings:
    return FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=2,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        local=LocalTraining(steps=2, batch=2),
        evaluation=Evaluation(every=2, rows=3, answers=1, new_tokens=2),
    )


def run(settings: FederateSettings, path: Path, tell=unheard) -> Path:
    about = {"command": ["pomona"], "method": settings.name, "seed": settings.seed}
    with RunDirectory.open(path, dump(settings), about) as directory:
        federate(settings, directory, tell=tell)
    return path


def metrics(path: Path, model: str) -> list[dict]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if line["model"] == model]


@pytest.mark.parametrize("where", ["central", "local"])
def test_noise_is_on_what_is_shared_and_a_graft_stays_bit_for_bit(plain, tmp_path, where):
    """After one round: what clients trained is the same, what the server has is not."""
    one = replace(plain, rounds=1)
    public = run(one, tmp_path / "public")
    private = run(replace(one, privacy=Privacy(0.5, 1.0, where)), tmp_path / "private")
    for name in ("apples", "pears", "plums"):
        file = f"clients/{name}/graft/graft.safetensors"
        assert (public / file).read_bytes() == (private / file).read_bytes()
    shared = [load_file(p / "shared/adapter_model.safetensors") for p in (public, private)]
    for name, value in shared[0].items():
        assert not torch.equal(value, shared[1][name])


def test_little_noise_and_a_wide_clip_are_plain_fedavg(plain, tmp_path):
    """The three clients have ten rows each, so that counting alike is counting by rows."""
    public = run(plain, tmp_path / "public")
    private = run(replace(plain, privacy=Privacy(100.0, 1e-9)), tmp_path / "private")
    file = "shared/adapter_model.safetensors"
    ours, theirs = load_file(public / file), load_file(private / file)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_epsilon_is_told_every_round_in_metrics_on_screen_and_in_the_report(plain, tmp_path):
    notes: list[str] = []

    private = replace(
        plain, name="private", privacy=Privacy(0.5, 2.0, delta=1e-3), strategy=FedAvgM()
    )
    path = run(private, tmp_path / "private", notes.append)
    lines = metrics(path, "privacy")
    spent = [epsilon(private.privacy, {(3, 3): r}) for r in (1, 2)]
    assert [line["epsilon"] for line in lines] == spent
    assert [line["round"] for line in lines] == [1, 2]
    assert {line["delta"] for line in lines} == {1e-3}
    assert not any(line["secret"] for line in lines)
    assert notes[1:] == [f"round {r}: ε = {spent[r - 1]:.4g} at δ = 0.001" for r in (1, 2)]
    (sent,) = {m["received_bytes"] for m in metrics(path, "communication")}
    public = run(plain, tmp_path / "public")
    assert {m["received_bytes"] for m in metrics(public, "communication")} == {sent}
    assert not metrics(public, "privacy")
    write_report([path, public], tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text("utf-8")
    assert "<h2>Differential privacy</h2>" in page
    assert f"<td>{spent[1]:.3g}</td><td>0.001</td>" in page
    assert "the recipe&#x27;s seed (simulation)" in page
    write_report([public], tmp_path / "public.html")
    assert "Differential privacy" not in (tmp_path / "public.html").read_text("utf-8")


@pytest.mark.parametrize("writes", now_and_then([9], [6, 11]))
def test_a_private_run_that_was_interrupted_ends_with_the_same_bytes(
    plain, tmp_path, monkeypatch, writes
):
    private = replace(plain, privacy=Privacy(0.5, 1.0, "local"))
    whole = run(private, tmp_path / "whole")
    with stopped_after(writes, monkeypatch, WRITES[:2]):
        run(private, tmp_path / "cut")
    cut = run(private, tmp_path / "cut")
    for file in ("metrics.jsonl", "answers.jsonl", "shared/adapter_model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_a_secret_key_changes_the_noise_and_is_written_nowhere(plain, tmp_path, monkeypatch):
    private = replace(plain, rounds=1, privacy=Privacy(0.5, 1.0))
    public = run(private, tmp_path / "seed")
    monkeypatch.setenv(KEY, "correct horse battery staple")
    path = run(private, tmp_path / "secret")
    assert all(line["secret"] for line in metrics(path, "privacy"))
    file = "shared/adapter_model.safetensors"
    assert (path / file).read_bytes() != (public / file).read_bytes()
    written = [f.read_bytes() for f in path.rglob("*") if f.is_file()]
    assert len(written) >= 10
    assert not any(b"battery" in content for content in written)


def test_a_recipe_says_it_in_a_table(plain, tmp_path):
    text = 'model = "org/name"\n[data]\ntrain = "t"\ntest = "t"\n[privacy]\n'
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text + 'clip = 1\nnoise = 0.5\nwhere = "local"\ndelta = 1e-6\n')
    made = read_recipe(recipe, FederateSettings)
    assert made.privacy == Privacy(1.0, 0.5, "local", 1e-6)
    recipe.write_text(dump(made), encoding="utf-8")
    assert read_recipe(recipe, FederateSettings) == made
    for table, complaint in (
        ("clip = 1.0\n", 'privacy: the key "noise" is missing'),
        ("clip = 1.0\nnoise = 0\n", "privacy noise 0.0 is not positive"),
        ('clip = 1.0\nnoise = 1.0\nwhere = "here"\n', "privacy: where is 'here'"),
        ("clip = 1.0\nnoise = 1.0\nepsilon = 3\n", 'unknown key "epsilon"; valid keys are clip'),
    ):
        recipe.write_text(text + table, encoding="utf-8")
        with pytest.raises(PomonaError, match=complaint):
            read_recipe(recipe, FederateSettings)
    recipe.write_text(
        'strategy = "median"\n' + text + "clip = 1.0\nnoise = 1.0\n", encoding="utf-8"
    )
    with pytest.raises(PomonaError, match="Median looks at every update"):
        read_recipe(recipe, FederateSettings)
