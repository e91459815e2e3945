"""`pomona inspect`."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(metavar="PATH", help="Any folder of models, parts or runs.")
]


def inspect(path: Folder) -> None:
    """Tell what a folder is: a checkpoint, an adapter, a graft, a run, a site's state."""
    from pomona.artifacts.inspect import inspect as inspected
    from pomona.cli.console import console, quiet_libraries

    quiet_libraries()
    told = inspected(path)
    width = max(map(len, told))
    for key, value in told.items():
        console.print(f"{key:<{width}}  {value}")
