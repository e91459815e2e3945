"""`pomona report`."""

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run directories.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write.")]


def report(runs: Runs, out: Out = Path("report.html")) -> None:
    """Write one self-contained HTML page that compares finished runs."""
    from pomona.artifacts.report import write_report
    from pomona.cli.console import console

    write_report(runs, out)
    console.print(str(out))
