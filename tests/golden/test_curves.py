"""Golden curves: what both pipelines give today, so that a change that should alter nothing shows it.

A change that should alter them rewrites the file with `POMONA_GOLDEN=write` and its commit says why.
"""

import json
import os
from pathlib import Path

import pytest
from conftest import word_text

from pomona.artifacts.run import RunDirectory
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.graft import Graft
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import STRATEGIES
from pomona.models.lora import LoRA
from pomona.pipelines.federate import federate
from pomona.pipelines.reconstruct import ReconstructSettings, reconstruct
from pomona.recipe import dump

GOLDEN = Path(__file__).with_name("curves.json")


def compare(name: str, found: dict[str, float]) -> None:
    """Compare with the file, within what different processors may differ by."""
    known = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.is_file() else {}
    if os.environ.get("POMONA_GOLDEN") == "write":
        known[name] = found
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    assert found == pytest.approx(known[name], rel=1e-3)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_federation(kind, moe_dir, rows_dir, tmp_path):
    settings = FederateSettings(
        model=str(moe_dir),
        data=ClientData(train=rows_dir / "train.jsonl", test=rows_dir / "test.jsonl"),
        rounds=4,
        max_length=96,
        adapter=LoRA(2, 4.0),
        graft=Graft(rank=2),
        strategy=STRATEGIES[kind](),
        local=LocalTraining(steps=3, batch=2, learning_rate=0.02),
        evaluation=Evaluation(rows=4, answers=0, every=1),
    )
    with RunDirectory.open(tmp_path / "run", dump(settings), {"method": "m", "seed": 0}) as run:
        federate(settings, run)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines())
    curve: dict[str, float] = {}
    for line in lines:
        if "loss" in line:
            curve[f"{line['client']}, {line['model']}, round {line['round']}"] = line["loss"]
    assert len(curve) >= 3 * 5
    compare(f"federate {kind}", curve)


def test_reconstruction(dense_dir, tmp_path):
    domains = {n: [word_text(i * 50 + j, 40) for j in range(20)] for i, n in enumerate("abcd")}
    settings = ReconstructSettings(experts=2, keep=0.5, windows=8, length=32, affinity_windows=4)
    made = reconstruct(dense_dir, domains, tmp_path / "out", settings)
    matrix = made.affinity.perplexity_MM
    assert matrix is not None
    found = {
        f"perplexity of {b} when pruned for {a}": value
        for a, row in zip(domains, matrix.tolist(), strict=True)
        for b, value in zip(domains, row, strict=True)
    }
    for layer, experts in enumerate(made.plan.keep_LEW.double().mean(-1).tolist()):
        found |= {f"mean channel, layer {layer}, expert {e}": m for e, m in enumerate(experts)}
    compare("reconstruct", found)
