"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or Hub id.")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="PEFT adapter folder to put on.", metavar="DIR")
]
Graft = Annotated[
    Path | None, typer.Option("--graft", help="A client's graft folder to put on.", metavar="DIR")
]
Personal = Annotated[
    Path | None,
    typer.Option("--personal", help="A client's private LoRA beside the adapter.", metavar="DIR"),
]
Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="A finished federation: the parts of --client."),
]
Client = Annotated[
    str | None, typer.Option("--client", metavar="NAME", help="Whose personal model; with --run.")
]
TemplateName = Annotated[
    str | None,
    typer.Option(
        "--template", help="Prompt: alpaca or chat; else what the parts were trained with."
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:1.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe, as local.steps=10; repeat it.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print progress and results as lines of JSON.")
]
Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="TRACKER",
        help="Tell figures to tensorboard, wandb or trackio, too; repeat it.",
    ),
]
