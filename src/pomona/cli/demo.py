"""`pomona demo`."""

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything it makes.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of rows, draws and births.")]


def demo(out: Out = Path("runs/demo"), seed: Seed = 0) -> None:
    """Show the whole story on a small built-in model, without network.

    A dense model of under a million parameters becomes a mixture of experts; four houses whose
    answers conflict tune it alone, with FedAvg and with FLEx. Takes a few minutes on two cores.
    """
    from pomona.cli.console import console, print_comparison, progress_bars
    from pomona.demo.story import tell

    with progress_bars() as progress:
        runs, page = tell(out, seed, progress)
    print_comparison(runs)
    console.print(f"report: {page}")
