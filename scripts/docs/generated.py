"""What pages of docs/ have made of the code: settings from the dataclasses, commands from the command line.

`<!-- generated: NAME -->` in a page stands for the text of that name, which
`python scripts/docs/generated.py NAME` prints.
"""

import html
import re
import sys
from collections.abc import Callable

import click
import typer
from settings_tables import settings_tables
from typer.cli import get_docs_for_click

from pomona.cli.app import app
from pomona.federation.settings import FederateSettings
from pomona.pipelines.federate.policy import Policy
from pomona.recipe.library import recipes
from pomona.recipe.reconstruct import ReconstructRecipe


def commands() -> str:
    """Return every command with its arguments and options, as its `--help` tells them."""
    command = typer.main.get_command(app)
    context = click.Context(command, info_name="pomona")
    text = html.unescape(get_docs_for_click(obj=command, ctx=context, name="pomona"))
    return text.partition("\n")[2]  # the page has a title


def recipe_list() -> str:
    """Return the recipes that come with Pomona, each with its first sentence."""
    rows = "".join(f"| `{name}` | {about} |\n" for name, about in recipes().items())
    return f"| recipe | what it is |\n|---|---|\n{rows}"


TEXTS: dict[str, Callable[[], str]] = {
    "settings of federate": lambda: settings_tables(FederateSettings),
    "settings of reconstruct": lambda: settings_tables(ReconstructRecipe),
    "settings of policy": lambda: settings_tables(Policy),
    "recipes": recipe_list,
    "commands": commands,
}


def filled(markdown: str) -> str:
    """Return a page with what is generated in its place."""
    return re.sub(r"<!-- generated: (.+?) -->", lambda found: TEXTS[found[1]](), markdown)


if __name__ == "__main__":
    sys.stdout.write(TEXTS[sys.argv[1]]())
