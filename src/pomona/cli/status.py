"""`pomona status`, and the file it reads."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pomona.errors import PomonaError

STATUS = "status.json"
Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Run folder of pomona serve, or state folder of pomona join."
    ),
]


def status(folder: Folder) -> None:
    """Show a federation's sites, round, last error and bytes, or how a site fares."""
    from pomona.cli.console import console, print_table
    from pomona.files import read_object

    path = folder / STATUS
    if not path.is_file():
        raise PomonaError(f"{path} is missing; give the folder of a pomona serve or pomona join")
    told = read_object(path)
    sites = told.pop("sites", None)
    for key, value in told.items():
        console.print(f"{key}: {value}")
    if isinstance(sites, dict):
        rows = [
            [name, *(str(own.get(key, "")) for key in ("online", "sent", "received"))]
            for name, own in sites.items()
        ]
        print_table("sites", ["site", "online", "bytes sent", "bytes received"], rows)


def write_status(folder: Path, told: Mapping[str, Any]) -> None:
    """Write what `pomona status` shows; a disk that is full is told where it matters."""
    from pomona.files import write_json

    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    with suppress(PomonaError):
        write_json(folder / STATUS, {**told, "updated": now})
