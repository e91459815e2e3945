"""Robust strategies: what a fifth of the clients can do to the others, by strategy and attack.

    python benchmarks/attacks.py [--quick] [--out DIR] [--json PATH]

`rootstock-3m` made into eight experts, two active; Dolly dealt to ten clients with Dirichlet mixtures (1.0),
of whom all take part in every round: LoRA on the attention, ten rounds of two steps of four rows, three seeds.
Two of the ten send something else than what they have trained: their change with its sign flipped, five times
that, or ten times their change. Losses are those of the shared model on the eight others' test rows; a strategy
holds them where the mean is at most 0.05 nats above what it is without an attack, in every seed.
Interrupted, it goes on
where it was.
`--quick`: one seed, two rounds. Material is found through POMONA_DATA and POMONA_MODELS.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from federated_runs import LENGTH
from record import ROOT, at_most, record
from subjects import find_material, rootstock

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.inputs import inputs_of
from pomona.artifacts.run import RunDirectory
from pomona.cli.console import console, print_table, progress_bars
from pomona.federation.holdings import holdings_of
from pomona.federation.partition import Dirichlet
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.strategies import FedAvg, Krum, Median, Strategy, TrimmedMean
from pomona.pipelines.federate.birth import begin
from pomona.pipelines.federate.engine import Answer
from pomona.pipelines.federate.finish import finish
from pomona.pipelines.federate.in_process import InProcess
from pomona.pipelines.federate.prepare import prepare
from pomona.pipelines.federate.rounds import through_rounds
from pomona.progress import titled
from pomona.recipe import dump, read_recipe

CLIENTS, ATTACKERS = 10, 2
HELD = 0.05
NO_ATTACK = "none"
ATTACKS = {NO_ATTACK: 1.0, "sign flipped": -1.0, "sign flipped, × 5": -5.0, "scaled × 10": 10.0}
"""What the change of an attacker is multiplied with."""
STRATEGIES: dict[str, Strategy] = {
    "fedavg": FedAvg(),
    "median": Median(),
    "trimmed-mean 0.2": TrimmedMean(0.2),
    "krum, 5 chosen": Krum(ATTACKERS, 5),
}
ROBUST = ("median", "trimmed-mean 0.2", "krum, 5 chosen")


@dataclass(frozen=True)
class Attacked(InProcess):
    """Clients some of whom send `factor` times their change in the place of it."""

    attackers: frozenset[str]
    factor: float

    def train(
        self, snapshot: Snapshot, names: Sequence[str], round_: int, finish: Finish | None = None
    ) -> Iterator[Answer]:
        """Train all of them honestly, and change what the attackers send."""
        sent = snapshot.server.shared
        for answer in super().train(snapshot, names, round_, finish):
            update = answer.update
            if update is None or answer.client not in self.attackers:
                yield answer
                continue
            tensors = {n: sent[n] + self.factor * (v - sent[n]) for n, v in update.shared.items()}
            yield replace(answer, update=replace(update, shared=tensors))


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    find_material()
    model = rootstock(options.out)
    seeds, rounds = ((0,), 2) if options.quick else ((0, 1, 2), 10)
    rows = [
        _row(options.out, model, strategy, attack, seeds, rounds)
        for strategy in STRATEGIES
        for attack in ATTACKS
    ]
    print_table("shared model, nats", ["strategy", *ATTACKS], list(_table(rows)))
    record(options.json, rows, list(_bars(rows)), seeds=list(seeds), rounds=rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/attacks")
    parser.add_argument("--json", type=Path, help="default: results/attacks.json beside this file")
    options = parser.parse_args()
    results = ROOT / "benchmarks/results"
    options.json = options.json or (options.out if options.quick else results) / "attacks.json"
    return options


def _row(
    out: Path, model: Path, strategy: str, attack: str, seeds: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Return the honest clients' mean losses, seed by seed."""
    losses: dict[str, list[float]] = {"base": [], "shared": []}
    for seed in seeds:
        settings = _settings(model, strategy, seed, rounds)
        attackers = _attackers(settings)
        results = _run(out, settings, strategy, attack, attackers)
        for part, found in losses.items():
            own = results[part]["clients"]
            found.append(mean(own[name]["loss"] for name in own if name not in attackers))
    return {"strategy": strategy, "attack": attack, "losses": losses}


def _settings(model: Path, strategy: str, seed: int, rounds: int) -> FederateSettings:
    given = {"model": str(model.resolve()), "seed": seed, "rounds": rounds}
    recipe = read_recipe(ROOT / "recipes/fedavg.toml", FederateSettings, given)
    assert recipe.data is not None
    return replace(
        recipe,
        data=replace(recipe.data, partition=Dirichlet(CLIENTS, 1.0)),
        evaluation=replace(recipe.evaluation, every=rounds, rows=24, answers=0, forgetting=None),
        local=replace(recipe.local, steps=2),
        max_length=LENGTH,
        strategy=STRATEGIES[strategy],
    )


def _attackers(settings: FederateSettings) -> frozenset[str]:
    names = sorted(settings.load())
    return frozenset(random.Random(f"attackers {settings.seed}").sample(names, ATTACKERS))


def _run(
    out: Path, settings: FederateSettings, strategy: str, attack: str, attackers: frozenset[str]
) -> dict[str, Any]:
    key = hashlib.sha256(f"{dump(settings)}{attack}".encode()).hexdigest()[:12]
    path = out / "runs" / f"{key}-{settings.seed}"
    if (path / "results.json").is_file():
        return json.loads((path / "results.json").read_text("utf-8"))
    about = {
        "command": ["python", *sys.argv],
        "method": f"{strategy}, {attack}",
        "seed": settings.seed,
    }
    rows = settings.load()
    with (
        RunDirectory.open(path, dump(settings), about) as run,
        progress_bars() as progress,
    ):
        run.claim(inputs_of(settings.model, rows, progress))
        told = (titled(path.name, progress), console.print)
        cpu = [torch.device("cpu")]
        federation = prepare(settings, run, rows, *told, holdings_of(rows), cpu)
        snapshot = run.snapshot(federation.train) or begin(federation)
        engine = Attacked(federation, attackers, ATTACKS[attack])
        return finish(federation, through_rounds(engine, snapshot))


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    untuned = mean(rows[0]["losses"]["base"])
    yield ["base (untuned)", *[f"{untuned:.3f}"] * len(ATTACKS)]
    for strategy in STRATEGIES:
        own = [row["losses"]["shared"] for row in rows if row["strategy"] == strategy]
        yield [strategy, *(f"{mean(losses):.3f}" for losses in own)]


def _bars(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield for every robust strategy and attack how much the loss rises, the worst of seeds."""
    by_kind = {(row["strategy"], row["attack"]): row["losses"] for row in rows}
    for strategy in ROBUST:
        for attack in ATTACKS:
            if attack != NO_ATTACK:
                before, after = (by_kind[strategy, kind]["shared"] for kind in (NO_ATTACK, attack))
                rise = max(b - a for a, b in zip(before, after, strict=True))
                yield at_most(f"{strategy}, {attack}: the loss rises", rise, HELD)


if __name__ == "__main__":
    main()
