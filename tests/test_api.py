"""The pipelines as functions of the package."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import word_text

import pomona
from pomona.errors import PomonaError
from pomona.recipe import dump


def test_the_package_imports_nothing_heavy_until_it_is_asked():
    code = (
        "import sys, pomona; assert 'torch' not in sys.modules; "
        "pomona.federate; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'grow'"):
        _ = pomona.grow


def test_a_dense_model_becomes_a_mixture(dense_dir, tmp_path):
    domains = tmp_path / "domains"
    domains.mkdir()
    for seed, name in enumerate(("north", "south")):
        (domains / f"{name}.txt").write_text(word_text(seed, 600))
    settings = {"experts": 2, "active": 1, "keep": 0.5}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[settings]\nwindows = 2\nlength = 16\naffinity_windows = 2\n")
    made = pomona.reconstruct(dense_dir, domains, tmp_path / "mixture", recipe, **settings)
    assert made.sizes.experts == 2
    assert (tmp_path / "mixture/model.safetensors").is_file()
    with pytest.raises(PomonaError, match="exists"):
        pomona.reconstruct(dense_dir, domains, tmp_path / "mixture", recipe, **settings)


def test_a_federation_by_recipe_and_by_settings(settings, tmp_path, rows_dir):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump(settings), "utf-8")
    one = pomona.federate(recipe, tmp_path / "one", device="cpu")
    other = pomona.federate(settings, tmp_path / "other", device="cpu")
    assert one.results["personal"] == other.results["personal"]
    assert one.served == "personal"
    again = pomona.federate(recipe, tmp_path / "one", device="cpu")
    assert again.results == one.results
    seeded = pomona.federate(recipe, tmp_path / "seeded", seed=3, device="cpu")
    assert seeded.seed == 3
    assert seeded.results["personal"] != one.results["personal"]
    own = Path(tmp_path / "one/clients/pears/graft")
    rows = rows_dir / "test.jsonl"
    figures = [
        pomona.evaluate(
            settings.model, rows, adapter=adapter, graft=graft, new_tokens=0, length=96, limit=4
        )["test.jsonl"]["loss"]
        for adapter, graft in ((None, None), (tmp_path / "one/shared", own))
    ]
    assert figures[0] != figures[1]
    text = tmp_path / "text.txt"
    text.write_text(word_text(0, 200))
    assert pomona.evaluate(settings.model, text=text, lengths=[16])["mean"]["loss"] > 0
    with pytest.raises(TypeError, match="rows or text"):
        pomona.evaluate(settings.model)


def test_a_federation_that_cannot_begin_leaves_nothing(settings, tmp_path):
    from dataclasses import replace

    with pytest.raises(PomonaError, match='there is no client "cherries"'):
        pomona.federate(replace(settings, newcomers=("cherries",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
