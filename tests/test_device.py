"""A federation computes the same wherever the model lies, and keeps its states in memory."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.dp_sgd import DPSGD
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.selection.chance import RandomExpert
from pomona.federation.selection.gradient import Gradient
from pomona.federation.selection.greedy import Greedy
from pomona.federation.settings import FederateSettings
from pomona.federation.shared_expert import SharedGraft
from pomona.federation.strategies import FedProx, Scaffold
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.recipe import dump

PROGRAM = Path(__file__).with_name("another_device.py")


def variants(settings: FederateSettings) -> dict[str, FederateSettings]:
    every = replace(
        settings,
        rounds=1,
        adapter=LoRA(2, 4.0, experts=True),
        personal=LoRA(2, 4.0),
        shared_expert=SharedGraft(rank=2),
        strategy=FedProx(),
        evaluation=Evaluation(rows=3, answers=2, new_tokens=4, speed=True),
        local=replace(settings.local, router_loss=0.01),
    )
    grafts = {
        "greedy": Graft(selection=Greedy(), count=2, weights="full", bias=True),
        "gradient": Graft(selection=Gradient(), gate="resident", form="copy"),
    }
    made = {name: replace(every, graft=graft) for name, graft in grafts.items()}
    keep = replace(settings.local, keep_optimiser=True)
    made["corrected"] = replace(settings, rounds=2, strategy=Scaffold(), local=keep)
    noised = replace(settings.local, dp_sgd=DPSGD(1.0, 1.0))
    made["noised"] = replace(settings, graft=Graft(selection=RandomExpert(), rank=2), local=noised)
    return made


def losses(path: Path) -> list[float]:
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_federation_computes_the_same_on_another_device(settings, tmp_path):
    compare(tmp_path, {"greedy": variants(settings)["greedy"]})


@pytest.mark.slow
def test_every_kind_of_training_computes_the_same_on_another_device(settings, tmp_path):
    compare(tmp_path, variants(settings))


def compare(folder: Path, runs: Mapping[str, FederateSettings]) -> None:
    recipes = [folder / f"{name}.toml" for name in runs]
    for recipe, one in zip(recipes, runs.values(), strict=True):
        recipe.write_text(dump(one), encoding="utf-8")
    program = [sys.executable, str(PROGRAM), *map(str, recipes)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for recipe in recipes:
        here, there = (losses(recipe.with_suffix(f".{device}")) for device in ("cpu", "yonder"))
        assert len(here) >= 9
        assert there == pytest.approx(here, abs=1e-5), recipe.stem


def test_a_device_that_is_not_there(settings, tmp_path):
    with (
        RunDirectory.open(tmp_path / "run", dump(settings), {"method": "m", "seed": 0}) as run,
        pytest.raises(PomonaError, match='device "cuda:99" is not there; use auto, cpu or cuda'),
    ):
        federate(settings, run, device="cuda:99")
