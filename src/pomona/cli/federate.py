"""`pomona federate`."""

import sys
from math import inf
from pathlib import Path
from typing import Annotated

import typer

from pomona.cli.options import Changes, JsonLines, Quiet, Trackers
from pomona.errors import PomonaError

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the federation.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN", help="Run folder, new or to go on; --dry-run needs none."),
]
Model = Annotated[
    str | None, typer.Option("--model", help="Use this model, not the recipe's.", metavar="MODEL")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only tell what it would send, keep and cost.")
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--tflops",
        metavar="RATE",
        help="With --dry-run: the TFLOP/s a machine sustains; else this one's are timed.",
    ),
]
Devices = Annotated[
    str, typer.Option("--device", help="auto (all GPUs, if there are any), cpu, cuda or cuda:1.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Use this seed, not the recipe's.")]


def federate(
    recipe: Recipe,
    out: Out = None,
    model: Model = None,
    seed: Seed = None,
    changes: Changes = None,
    dry_run: DryRun = False,
    tflops: Rate = None,
    device: Devices = "auto",
    log: Trackers = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Tune a model across clients that share a small adapter and no rows.

    RECIPE names the model, the clients' rows, what is shared and what is private. RUN gets metrics, answers
    and results, the shared part as a PEFT adapter and one graft folder per client; a graft never leaves
    its client. An interrupted run goes on with the same command. --dry-run reads the rows and the model's
    config.json, and writes nothing.
    """
    _check_options(out, dry_run, tflops)
    from pomona.artifacts.run import RunDirectory
    from pomona.artifacts.tracking import tracked
    from pomona.cli.console import console
    from pomona.cli.screen import Screen
    from pomona.federation.settings import FederateSettings
    from pomona.pipelines.federate import federate as run_federation
    from pomona.recipe import dump, read_recipe, table_of

    screen = Screen(quiet, json)
    absolute = str(Path(model).resolve()) if model and Path(model).exists() else model
    settings = read_recipe(
        recipe, FederateSettings, {"model": absolute, "seed": seed}, changes or ()
    )
    if dry_run:
        from pomona.pipelines.federate.preview import preview

        told = preview(settings, None if tflops is None else 1e12 * tflops, device)
        console.print(str(told))
        return
    assert out is not None
    about = {"command": ["pomona", *sys.argv[1:]], "method": settings.name, "seed": settings.seed}
    with (
        RunDirectory.open(out, dump(settings), about) as run,
        tracked(log or (), out, table_of(settings), screen.tell) as tracker,
        screen.progress(tracker) as progress,
    ):
        run_federation(settings, run, progress, screen.tell, device)
    screen.finished([out])
    screen.tell(f"results in {out}; as a page: pomona report {out} --out report.html")


def _check_options(out: Path | None, dry_run: bool, tflops: float | None) -> None:
    if out is None and not dry_run:
        raise typer.BadParameter("it names the run folder", param_hint="--out")
    if tflops is not None and not dry_run:
        raise PomonaError("--tflops goes with --dry-run; give both or neither")
    if tflops is not None and not 0 < tflops < inf:
        raise PomonaError(f"--tflops {tflops} is no rate; give a positive number")
