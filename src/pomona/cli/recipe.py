"""`pomona recipe`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pomona.errors import PomonaError

Action = Annotated[
    Literal["list", "show", "new"],
    typer.Argument(metavar="ACTION", help="list, show NAME, or new NAME for your own files."),
]
Name = Annotated[
    str | None, typer.Argument(metavar="NAME", help="A recipe of the list; new: flex if none.")
]
Model = Annotated[str, typer.Option("--model", help="New: folder or Hub id of the model.")]
Clients = Annotated[
    str,
    typer.Option(
        "--data", metavar="DIR", help="New: folder of NAME.train.jsonl files, or of domains."
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="New: file to write, else the screen.")
]


def recipe(
    action: Action,
    name: Name = None,
    model: Model = "mixture",
    data: Clients = "clients",
    out: Out = None,
) -> None:
    """List the recipes that come with Pomona, show one, or begin one's own."""
    from pomona.cli.console import console
    from pomona.files import write_text
    from pomona.recipe.library import new_recipe, recipe_text, recipes

    if action == "list":
        known = recipes()
        width = max(map(len, known))
        for own, about in known.items():
            console.print(f"{own:<{width}}  {about}")
        return
    if action == "show":
        if name is None:
            raise PomonaError("show needs a name; pomona recipe list has them")
        console.print(recipe_text(name), end="")
        return
    text = new_recipe(name or "flex", model, data)
    if out is None:
        console.print(text, end="")
    elif out.exists():
        raise PomonaError(f"{out} exists; give another file")
    else:
        write_text(out, text)
        console.print(f"written to {out}; try: pomona federate {out} --dry-run")
