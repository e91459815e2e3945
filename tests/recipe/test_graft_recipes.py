"""The graft's baselines differ from `recipes/flex.toml` in what they are about, and in nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from pomona.federation.graft import Graft
from pomona.federation.selection import Reconstruction
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import FedAvg, LocalOnly
from pomona.recipe import read_recipe


@pytest.fixture
def read(monkeypatch, tmp_path):
    monkeypatch.setenv("POMONA_DATA", str(tmp_path))
    return lambda name: read_recipe(ROOT / f"recipes/{name}.toml", FederateSettings)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lora-on-expert", {"gate": "resident"}),
        ("flex-no-gate", {"gate": "none"}),
        ("flex-reconstruction", {"selection": Reconstruction()}),
    ],
)
def test_a_variant_changes_one_thing(read, name, change):
    flex = read("flex")
    assert read(name) == replace(flex, name=name, graft=replace(flex.graft, **change))
    assert read(name) != flex


def test_flex_faithful_is_what_was_published(read):
    faithful, flex = read("flex-faithful"), read("flex")
    assert faithful.graft == Graft(Reconstruction(128), form="copy", rank=32, alpha=64)
    assert (faithful.adapter.rank, faithful.adapter.alpha) == (32, 64)
    assert set(faithful.adapter.targets) == {"q_proj", "k_proj", "v_proj"}
    assert faithful.local.router_loss == "model"
    assert (faithful.rounds, faithful.dtype, faithful.max_length) == (100, "bfloat16", 2048)
    local = faithful.local
    assert (local.steps, local.batch) == (5, 4)
    assert (local.learning_rate, local.final_learning_rate) == (4e-5, 1e-6)
    assert (faithful.evaluation.answers, faithful.evaluation.new_tokens) == (100, 256)
    assert (faithful.data, faithful.strategy, faithful.fraction) == (flex.data, FedAvg(), 1.0)
    assert Path(faithful.data.train).name == "train.jsonl"


def test_the_honest_opponents_have_everything_but_the_others_help(read):
    flex, twin, pooled = read("flex"), read("local-only-flex"), read("centralised")
    assert twin == replace(flex, name="local-only-flex", strategy=LocalOnly())
    steps = len(flex.data.partition.categories) * flex.local.steps  # as many rows in all
    assert pooled == replace(
        flex,
        name="centralised",
        strategy=FedAvg(),
        pooled=True,
        personal=None,  # one model needs one LoRA
        local=replace(flex.local, steps=steps),
    )
