"""`pomona federate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML recipe of the federation.")]
Out = Annotated[Path, typer.Option("--out", metavar="RUN", help="Run directory, new or to go on.")]
Model = Annotated[
    str | None, typer.Option("--model", help="Use this model, not the recipe's.", metavar="MODEL")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Use this seed, not the recipe's.")]


def federate(recipe: Recipe, out: Out, model: Model = None, seed: Seed = None) -> None:
    """Tune a model across clients; only LoRA on the attention is shared.

    Everything lands in RUN: metrics.jsonl, results.json, the shared PEFT adapter and one graft
    folder per client. An interrupted run goes on with the same command.
    """
    from pomona.artifacts.run import RunDirectory
    from pomona.cli.console import console, print_comparison, progress_bars
    from pomona.federate import FederateSettings
    from pomona.federate import federate as run_federation
    from pomona.recipe import dump, read_recipe

    absolute = str(Path(model).resolve()) if model and Path(model).exists() else model
    settings = read_recipe(recipe, FederateSettings, {"model": absolute, "seed": seed})
    about = {"command": ["pomona", *sys.argv[1:]], "method": settings.name, "seed": settings.seed}
    with RunDirectory.open(out, dump(settings), about) as run, progress_bars() as progress:
        run_federation(settings, run, progress)
    print_comparison([out])
    console.print(f"results in {out}; as a page: pomona report {out} --out report.html")
