"""The recipes that are shipped say what their names say."""

from pathlib import Path

import pytest
from conftest import ROOT

from pomona.federation.settings import FederateSettings
from pomona.recipe import dump, read_recipe
from pomona.recipe.reconstruct import read_reconstruct_recipe

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
