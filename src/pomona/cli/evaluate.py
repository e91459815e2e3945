"""`pomona evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or Hub id.")]
Text = Annotated[
    str | None,
    typer.Option("--text", help="Text file, folder of domains or glob.", metavar="PATH"),
]
Rows = Annotated[
    Path | None, typer.Option("--rows", help="Instruction rows (.jsonl).", metavar="FILE")
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="PEFT adapter folder to put on.", metavar="DIR")
]
Graft = Annotated[
    Path | None, typer.Option("--graft", help="A client's graft folder to put on.", metavar="DIR")
]
Limit = Annotated[int, typer.Option("--limit", help="Rows, or windows per domain; 0: all.")]
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        help="Longest row or window, in tokens; 512 if not given, or the context if that is shorter.",
        show_default=False,
    ),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Longest answer; 0 skips answers.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures here.", metavar="FILE")
]
TemplateName = Annotated[str, typer.Option("--template", help="Prompt: alpaca or chat.")]


def evaluate(
    model: Model,
    text: Text = None,
    rows: Rows = None,
    adapter: Adapter = None,
    graft: Graft = None,
    template: TemplateName = "alpaca",
    limit: Limit = 64,
    length: Length = None,
    new_tokens: NewTokens = 64,
    json: Json = None,
) -> None:
    """Measure a model on text, or on instruction rows.

    MODEL is a folder or Hub id; with --adapter and --graft it is a client's personal model that is
    measured. Of a folder of domains the held-out files are read, where there are any.
    """
    from pomona.cli.console import print_table, progress_bars
    from pomona.evaluate import measure
    from pomona.files import write_json

    with progress_bars() as progress:
        figures = measure(
            model, text, rows, adapter, graft, template, limit, length, new_tokens, progress
        )
    columns = list(next(iter(figures.values())))
    table = [[name, *(_figure(own[column]) for column in columns)] for name, own in figures.items()]
    print_table(model, ["on", *columns], table)
    if json is not None:
        write_json(json, {"model": model, "figures": figures})


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"
