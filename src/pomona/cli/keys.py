"""`pomona keys`."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the keys, new or to add to.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="HOST", help="Name or address of the coordinator; repeat it."),
]
Names = Annotated[
    list[str] | None, typer.Option("--site", metavar="NAME", help="A site; repeat it.")
]


def keys(folder: Folder, host: Hosts = None, site: Names = None) -> None:
    """Make a certificate authority, the coordinator's certificate and a key for every site.

    DIR/coordinator goes to the coordinator and DIR/sites/NAME to that site, over a way you trust; DIR/authority
    stays here. What is there already is kept, so that sites can be added later.
    """
    from pomona.cli.console import console
    from pomona.files import check_name
    from pomona.flower.keys import make_keys

    for name in site or []:
        check_name(name)
    made = make_keys(folder, host or [], site or [])
    console.print(f"made in {folder}: {', '.join(made)}" if made else f"{folder} has all of them")
