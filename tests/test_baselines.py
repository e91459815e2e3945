"""Every federated recipe that is shipped runs, on a tiny mixture and few rows."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT, now_and_then
from test_federate import run
from transformers import AutoConfig

from pomona.federation.evaluation import Evaluation
from pomona.federation.settings import FederateSettings
from pomona.recipe import read_recipe

OFTEN = ["flex", "fedrep", "flora"]
OTHERS = [
    path.stem
    for path in sorted((ROOT / "recipes").glob("*.toml"))
    if path.stem not in {*OFTEN, "dive", "reconstruct"}
]
QUICK = Evaluation(every=9, rows=2, answers=1, new_tokens=2)


def test_recipes_were_found():
    assert len(OTHERS) >= 24


@pytest.mark.parametrize("name", now_and_then(OFTEN, OTHERS))
def test_a_shipped_recipe_runs(name, settings, tmp_path, monkeypatch):
    """As it is but for the model, its number of layers, the rows and how long it takes."""
    monkeypatch.setenv("POMONA_DATA", str(tmp_path))
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml", FederateSettings)
    depth = AutoConfig.from_pretrained(settings.model).num_hidden_layers
    short = replace(recipe.local, steps=1, batch=2)
    tiny = replace(
        recipe,
        model=settings.model,
        data=settings.data,
        max_length=settings.max_length,
        rounds=2,
        dtype="float32",
        local=short,
        evaluation=QUICK,
        finish=recipe.finish and replace(recipe.finish, rounds=1, training=short),
    )
    if recipe.adapter.layers:
        assert tiny.personal is not None and tiny.personal.layers
        tiny = replace(
            tiny,
            adapter=replace(tiny.adapter, layers=tuple(range(depth - 1))),
            personal=replace(tiny.personal, layers=(depth - 1,)),
        )
    if tiny.rehearsal is not None:
        tiny = replace(tiny, rehearsal=replace(tiny.rehearsal, texts=4, length=8, top=8))
    found = run(tiny, tmp_path / "run")
    assert found["base"] is not None
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    trained = [line for line in lines if line["model"] == "training"]
    assert len(trained) >= (1 if tiny.pooled else 3) and all(line["losses"] for line in trained)
