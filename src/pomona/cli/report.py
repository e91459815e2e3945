"""`pomona report`."""

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished run directories.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write.")]
Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="NAME",
        help="Test every method against this one, or base; all pairs if not given.",
    ),
]
Judged = Annotated[
    list[Path] | None,
    typer.Option("--judged", metavar="FILE", help="What pomona judge --json wrote; several times."),
]


def report(
    runs: Runs,
    out: Out = Path("report.html"),
    baseline: Baseline = None,
    judged: Judged = None,
) -> None:
    """Write one self-contained HTML page that compares finished runs."""
    from pomona.artifacts.report import write_report
    from pomona.cli.console import console

    write_report(runs, out, baseline, judged or ())
    console.print(str(out))
