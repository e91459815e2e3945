"""The recipes that are shipped say what their names say."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, save_model

from pomona.federation.settings import FederateSettings
from pomona.pipelines.reconstruct import ReconstructSettings, preview
from pomona.recipe import dump, read_recipe
from pomona.recipe.reconstruct import read_reconstruct_recipe
from pomona.reconstruction.compensate import Bias, NoCompensation
from pomona.reconstruction.planners import ActivationClusters, RandomSplit, TopChannels
from pomona.reconstruction.retraining import ExpertStage, Objective, Retraining, RouterStage
from pomona.reconstruction.router import RandomRouter
from pomona.reconstruction.scores import WIFV
from pomona.reconstruction.specialise import Specialise

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.toml"))}
RECONSTRUCT = {"dive", "reconstruct"}
OF_STRATEGY = ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "flexlora"]


def settings(path: Path, monkeypatch) -> FederateSettings:
    monkeypatch.setenv("POMONA_DATA", "/data")
    return read_recipe(path, FederateSettings)


def test_recipes_were_found():
    assert len(RECIPES) >= 12
    assert RECIPES.keys() > RECONSTRUCT | set(OF_STRATEGY)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_named_as_its_file(name, monkeypatch, tmp_path):
    monkeypatch.setenv("POMONA_DATA", "/data")
    if name in RECONSTRUCT:
        assert read_reconstruct_recipe(RECIPES[name], {"model": "org/dense", "domains": "/d"})
        return
    made = settings(RECIPES[name], monkeypatch)
    assert made.name == name
    copy = tmp_path / "copy.toml"
    copy.write_text(dump(made), encoding="utf-8")
    assert read_recipe(copy, FederateSettings) == made


@pytest.mark.parametrize("name", OF_STRATEGY)
def test_baselines_differ_in_their_strategy_alone(name, monkeypatch):
    """One loop, equal treatment: nothing else of a baseline is set differently."""
    import dataclasses

    plain, other = (settings(RECIPES[n], monkeypatch) for n in ("fedavg", name))
    differs = {
        f.name
        for f in dataclasses.fields(plain)
        if getattr(plain, f.name) != getattr(other, f.name)
    }
    assert differs == (set() if name == "fedavg" else {"name", "strategy"})
    assert type(other.strategy).__name__.lower() == name


def test_dive_is_what_was_published():
    """arXiv 2506.09351, sections 3 and 4.1; what a stock checkpoint cannot hold is said in the recipe."""
    router = RouterStage(
        tokens=500_000_000, learning_rate=1e-4, schedule="constant", warm_up=0.0, temperature=0.05
    )
    experts = ExpertStage(
        tokens=5_000_000_000,
        learning_rate=1e-4,
        schedule="cosine",
        warm_up=0.03,
        floor=0.1,
        experts="lora",
        rank=8,
        alpha=16.0,
        router="absolute",
        norms=True,
    )
    plain = Objective(loss="cross-entropy", balance=0.0, z=0.0, straight_through=False)
    found = read_reconstruct_recipe(RECIPES["dive"], {"model": "org/dense", "domains": "/d"})
    how = found.settings.retrain
    assert (how.router, how.experts, how.objective) == (router, experts, plain)
    assert how == Retraining(router, experts, plain, length=1024, batch=8, accumulate=8)
    assert found.settings == ReconstructSettings(
        experts=8,
        active=1,
        keep=0.5,
        windows=1024,
        length=256,
        score=WIFV(),
        grouping="affinity",
        split_domains=False,
        affinity="perplexity",
        linkage="average",
        planner=TopChannels(shared=0.0),
        compensation=NoCompensation(),
        router=RandomRouter(),
        specialise=Specialise(rounds=0),
        retrain=how,
    )


DEALT = {"grouping": "all", "compensation": NoCompensation(), "router": RandomRouter()} | {
    "specialise": Specialise(rounds=0)
}
BASELINES = {
    "static pruning (FLAP)": {"experts": 1, "active": 1, "keep": 0.5, "compensation": Bias()}
    | {"grouping": "all"},
    "random split (LLaMA-MoE)": DEALT | {"active": 4, "keep": 0.125, "planner": RandomSplit()},
    "activation clusters (CMoE)": DEALT
    | {"active": 3, "keep": 0.1, "planner": ActivationClusters(shared=0.2)},
    "copies of one pruned FFN": DEALT | {"active": 1, "keep": 0.5},
    "DIVE without affinity (random groups)": DEALT
    | {"active": 1, "keep": 0.5, "grouping": "random"},
}


def test_every_baseline_of_the_table_is_a_recipe(tmp_path):
    """The rows are read as they stand, mean what they are called and fit a model, half of it active."""
    dense = save_model(tmp_path / "dense", "Llama", intermediate_size=640)
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| `(settings = \{.*\})` \|$", text, re.MULTILINE))
    assert rows.keys() == BASELINES.keys()
    for name, line in rows.items():
        (tmp_path / "recipe.toml").write_text(line, encoding="utf-8")
        given = {"model": str(dense), "domains": str(tmp_path)}
        made = read_reconstruct_recipe(tmp_path / "recipe.toml", given).settings
        assert made == ReconstructSettings(**BASELINES[name]), name
        told = preview(dense, list("abcdefgh"), made)
        half = 0.5 * 2 * 3 * 32 * 640  # two layers of three matrices
        routers = 2 * 32 * made.experts if made.experts > 1 else 0
        active = told.active - routers - (told.dense - 2 * half)
        assert active == pytest.approx(half, rel=0.03), name  # FLAP has biases too
