"""The `pomona` command and how a user's mistake ends."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

import pomona
from pomona.cli.chat import chat
from pomona.cli.demo import demo
from pomona.cli.evaluate import evaluate
from pomona.cli.export import export
from pomona.cli.federate import federate
from pomona.cli.inspect import inspect
from pomona.cli.join import join
from pomona.cli.judge import judge
from pomona.cli.keys import keys
from pomona.cli.recipe import recipe
from pomona.cli.reconstruct import reconstruct
from pomona.cli.report import report
from pomona.cli.serve import serve
from pomona.cli.serve_model import serve_model
from pomona.cli.status import status
from pomona.errors import PomonaError

app = typer.Typer(
    name="pomona",
    help="Turn one language model into many personal ones without moving anyone's data.",
    epilog="Exit codes: 0 done, 1 our bug, 2 a mistake in what was given, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _ending(command: Callable[..., None], interrupted: str) -> Callable[..., None]:
    """Turn a mistake and an interruption into one sentence; typer would only say "Aborted"."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PomonaError as error:
            typer.echo(f"error: {_printable(' '.join(str(error).splitlines()))}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo(interrupted, err=True)
            raise typer.Exit(130) from error

    return run


def _printable(text: str) -> str:
    """A sentence may quote half a character from a damaged file, which no terminal can show."""
    return text.encode(errors="backslashreplace").decode()


GO_ON = "interrupted; run the same command again to go on"
NOTHING_KEPT = "interrupted; nothing of it is kept"

for command, interrupted in {
    reconstruct: GO_ON,
    federate: GO_ON,
    evaluate: NOTHING_KEPT,
    judge: NOTHING_KEPT,
    report: NOTHING_KEPT,
    chat: "",
    serve_model: "",
    export: NOTHING_KEPT,
    inspect: NOTHING_KEPT,
    recipe: NOTHING_KEPT,
    demo: GO_ON,
    serve: GO_ON,
    join: GO_ON,
    keys: NOTHING_KEPT,
    status: NOTHING_KEPT,
}.items():
    app.command()(_ending(command, interrupted))


def _show_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"pomona {pomona.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


def main() -> None:
    """Run the command line; a `PomonaError` becomes one sentence and exit code 2."""
    # Idle OpenMP threads that spin steal the cores from the ones that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app(prog_name="pomona")
