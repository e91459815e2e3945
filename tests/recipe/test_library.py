"""`pomona recipe`, and single keys changed on the command line."""

from dataclasses import replace

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from pomona.cli.app import app
from pomona.errors import PomonaError
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import FedProx, Tilted
from pomona.recipe import read_recipe
from pomona.recipe.changes import changed
from pomona.recipe.library import new_recipe, recipe_text, recipes
from pomona.recipe.reconstruct import read_reconstruct_recipe

NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


def says(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_all_recipes_are_listed_with_what_they_say_of_themselves():
    assert list(recipes()) == NAMES
    assert len(NAMES) > 25
    assert all(recipes().values())
    code, out = says("recipe", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert says("recipe", "show", "flex") == (0, recipe_text("flex"))


@pytest.mark.parametrize("name", NAMES)
def test_a_new_recipe_is_the_same_with_ones_own_model_and_data(name, tmp_path, monkeypatch):
    monkeypatch.setenv("POMONA_DATA", str(tmp_path))
    monkeypatch.setenv("POMONA_MODELS", str(tmp_path))
    path = tmp_path / "own.toml"
    data = tmp_path / "data"
    data.mkdir()
    for domain in ("a", "b"):
        (data / f"{domain}.txt").write_text("text")
    path.write_text(new_recipe(name, "my-model", str(data)), "utf-8")
    if name in ("reconstruct", "dive"):
        found = read_reconstruct_recipe(path, {})
        theirs = read_reconstruct_recipe(
            ROOT / f"recipes/{name}.toml", {"model": "my-model", "domains": str(data)}
        )
        assert (found.model, found.settings) == ("my-model", theirs.settings)
        return
    found = read_recipe(path, FederateSettings)
    theirs = read_recipe(ROOT / f"recipes/{name}.toml", FederateSettings)
    assert found.data.folder == data
    assert replace(found, data=None, model="x") == replace(theirs, data=None, model="x")


def test_a_new_recipe_is_written_once(tmp_path):
    path = tmp_path / "own.toml"
    code, out = says("recipe", "new", "fedavg", "--model", "m", "--data", "c", "--out", str(path))
    assert code == 0 and "--dry-run" in out
    assert says("recipe", "new", "--model", "m", "--data", "c") == (0, new_recipe("flex", "m", "c"))
    code, out = says("recipe", "new", "fedavg", "--out", str(path))
    assert code == 2 and "exists; give another file" in out
    code, out = says("recipe", "show", "nothing")
    assert code == 2 and 'there is no recipe "nothing"; there are' in out
    code, out = says("recipe", "show")
    assert code == 2 and "show needs a name" in out


def test_changes_are_toml_or_words():
    table = {"rounds": 3, "local": {"steps": 1, "batch": 2}, "strategy": "fedprox"}
    found = changed(
        table,
        ["rounds=5", "local.steps = 10", "name=mine", "strategy.mu=0.5", "adapter.targets=['a']"],
    )
    assert found == {
        "rounds": 5,
        "local": {"steps": 10, "batch": 2},
        "strategy": {"kind": "fedprox", "mu": 0.5},
        "name": "mine",
        "adapter": {"targets": ["a"]},
    }
    assert table["local"]["steps"] == 1
    for wrong, complaint in (
        ("rounds", "is no change"),
        ("=3", "is no change"),
        ("a..b=3", "is no change"),
        ("rounds.x=3", "rounds is 3 in the recipe, and no table"),
    ):
        with pytest.raises(PomonaError, match=complaint):
            changed(table, [wrong])


def test_a_recipe_is_read_with_changes(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('model = "m"\n[strategy]\nkind = "tilted"\n')
    found = read_recipe(path, FederateSettings, {}, ["strategy.tilt=7", "local.steps=3"])
    assert (found.strategy, found.local.steps) == (Tilted(7), 3)
    assert isinstance(
        read_recipe(path, FederateSettings, {}, ["strategy=fedprox"]).strategy, FedProx
    )
    with pytest.raises(PomonaError, match='unknown key "steps"'):
        read_recipe(path, FederateSettings, {}, ["steps=3"])
    code, out = says("federate", str(path), "--dry-run", "--set", "rounds=none")
    assert code == 2 and "rounds" in out
