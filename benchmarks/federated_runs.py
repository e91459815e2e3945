"""The federated runs that `federate.py` compares: settings, methods, and the recipe of each on this model."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from record import ROOT
from transformers import AutoConfig

from pomona.artifacts.finished import FinishedRun, load_runs
from pomona.artifacts.run import RunDirectory
from pomona.cli.console import progress_bars
from pomona.federation.partition import ByCategory, Dirichlet, Partition
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import Scaffold
from pomona.pipelines.federate import federate
from pomona.progress import titled
from pomona.recipe import dump, read_recipe

TASKS = ("closed_qa", "information_extraction", "classification", "summarization")
LENGTH = 128
OURS, CEILING = "flex", "centralised"
ALONE = ("local-only-graft", "local-only-flex")
VARIANTS = ("lora-on-expert", "flex-no-gate", "flex-reconstruction")  # of ours, one thing changed
CEILINGS = (CEILING, "centralised-attention")
METHODS = (
    OURS,
    "local-only",
    *ALONE,
    "fedavg",
    "feddpa",
    "fedavg-finetune",
    "fedavg-experts",
    "fedrep",
    "flex-faithful",
    *VARIANTS,
    *CEILINGS,
)
STRATEGIES = (
    "fedsa-lora",
    "flexlora",
    "flora",
    "ffa-lora",
    "fedprox",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "scaffold",
)
MAIN = ("local-only", *ALONE, "fedavg", OURS)
SETTINGS: dict[str, tuple[Partition, Sequence[str]]] = {
    "one task each": (ByCategory(TASKS), METHODS),
    "100 rows each": (ByCategory(TASKS, rows=100), METHODS),
    "100 rows each, strategies": (ByCategory(TASKS, rows=100), (OURS, "fedavg", *STRATEGIES)),
    "Dirichlet 0.5": (Dirichlet(10, 0.5), METHODS),
    "Dirichlet 1.0": (Dirichlet(10, 1.0), METHODS),
}


def finished_runs(
    out: Path,
    model: Path,
    partition: Partition,
    methods: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
) -> list[FinishedRun]:
    """Return the finished runs, made where they are not there yet."""
    paths = [
        _run(out, settings_of(model, method, partition, seed, rounds))
        for seed in seeds
        for method in methods
    ]
    return load_runs(paths)


def settings_of(
    model: Path, method: str, partition: Partition, seed: int, rounds: int
) -> FederateSettings:
    """Return a recipe on this model and these clients, evaluated alike."""
    given = {"model": str(model.resolve()), "seed": seed, "rounds": rounds}
    recipe = read_recipe(ROOT / "recipes" / f"{method}.toml", FederateSettings, given)
    if method == "flex-faithful":  # its form, gate and loss, at the sizes and rates of the others
        plain = read_recipe(ROOT / "recipes" / "fedavg.toml", FederateSettings, given)
        assert recipe.graft is not None
        graft = replace(recipe.graft, rank=plain.adapter.rank, alpha=plain.adapter.alpha)
        adapter = replace(plain.adapter, targets=recipe.adapter.targets)
        local = replace(plain.local, router_loss=recipe.local.router_loss)
        recipe = replace(plain, name=method, graft=graft, adapter=adapter, local=local)
    if method == "fedrep":  # the last two layers of this model, not of the recipe's
        depth = AutoConfig.from_pretrained(model).num_hidden_layers
        assert recipe.personal is not None
        recipe = replace(
            recipe,
            adapter=replace(recipe.adapter, layers=tuple(range(depth - 2))),
            personal=replace(recipe.personal, layers=(depth - 2, depth - 1)),
        )
    held_out = Path(os.environ["POMONA_DATA"]) / "calibration"
    evaluation = replace(recipe.evaluation, every=rounds, answers=0, forgetting=held_out, windows=4)
    local = recipe.local
    if isinstance(partition, Dirichlet) and recipe.pooled:
        # five clients' steps in a round, not four's
        local = replace(local, steps=local.steps * 5 // 4)
    data = replace(recipe.data, partition=partition)
    fraction = 0.5 if isinstance(partition, Dirichlet) and not recipe.pooled else 1.0
    strategy = recipe.strategy
    if isinstance(strategy, Scaffold):
        strategy = replace(strategy, fraction=fraction)
    finish = recipe.finish
    if (
        finish is not None
    ):  # everybody takes part in its rounds, which are among those of all methods
        finish = replace(finish, rounds=rounds // 4)
    return replace(
        recipe,
        data=data,
        evaluation=evaluation,
        local=local,
        max_length=LENGTH,
        fraction=fraction,
        strategy=strategy,
        finish=finish,
        rounds=rounds - (round(finish.rounds / fraction) if finish else 0),
    )


def _run(out: Path, settings: FederateSettings) -> Path:
    recipe = dump(settings)
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    path = out / "runs" / f"{settings.name}-{settings.seed}-{key}"
    about = {
        "command": ["python", *sys.argv],
        "method": settings.name,
        "seed": settings.seed,
    }
    if not (path / "results.json").is_file():
        with RunDirectory.open(path, recipe, about) as run, progress_bars() as progress:
            federate(settings, run, titled(path.name, progress))
    return path
