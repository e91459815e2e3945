"""`pomona export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pomona.cli.options import Adapter, Client, Device, Graft, Model, Personal, Run
from pomona.cli.personal import personal_of
from pomona.errors import PomonaError

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the checkpoint.")]
Merge = Annotated[
    bool, typer.Option("--merge/--no-merge", help="Add LoRA to the weights, or put it beside.")
]
Kind = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option("--dtype", help="Of the weights; auto is the base's."),
]


def export(
    model: Model,
    out: Out,
    run: Run = None,
    client: Client = None,
    adapter: Adapter = None,
    graft: Graft = None,
    personal: Personal = None,
    merge: Merge = True,
    dtype: Kind = "auto",
    device: Device = "auto",
) -> None:
    """Write a client's personal model as one checkpoint that transformers opens without Pomona.

    A mixture like Mixtral with a private expert becomes a stock Qwen2-MoE; without private experts the family
    stays as it is. Everything else keeps its family with a little code beside it (`trust_remote_code=True`).
    """
    from pomona.artifacts.export import export_personal
    from pomona.artifacts.personal_card import personal_card
    from pomona.cli.console import console, quiet_libraries

    quiet_libraries()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PomonaError(f"{out} exists and is not empty; give a new folder")
    own = personal_of(model, run, client, adapter, graft, personal, device)
    card = personal_card(own, run, client, merge)
    made = export_personal(own, out, merge, dtype, card)
    how = {
        "stock": "the base's own family",
        "qwen2-moe": "a stock Qwen2-MoE",
        "code": "load it with trust_remote_code=True",
    }[made.kind]
    console.print(f"{made.architecture}, {made.parameters:,} parameters: {how}")
    for name in made.beside:
        console.print(f"beside it, for PEFT: {out / name}")
    console.print(f"written to {out}")
