"""`pomona serve-model`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pomona.cli.options import Device, Model, TemplateName
from pomona.errors import PomonaError

Run = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Serve every client of a finished federation."),
]
Grafts = Annotated[
    list[str] | None,
    typer.Option("--graft", metavar="NAME=DIR", help="A client's graft; repeat it."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="[NAME=]DIR", help="A PEFT adapter: of one client, or of all."
    ),
]
Personals = Annotated[
    list[str] | None,
    typer.Option("--personal", metavar="NAME=DIR", help="A client's private LoRA; repeat it."),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", help="Port to listen on.")]
Batch = Annotated[int, typer.Option("--batch", help="Answers that are decoded together, at most.")]


def serve_model(
    model: Model,
    run: Run = None,
    graft: Grafts = None,
    adapter: Adapters = None,
    personal: Personals = None,
    template: TemplateName = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    batch: Batch = 16,
    device: Device = "auto",
) -> None:
    """Serve personal models behind an OpenAI-compatible endpoint: the model's name picks the client.

    One base answers for all of them, in one batch. `base` is the model without any part. There is no key and no
    TLS: it listens to this machine unless --host says otherwise.
    """
    if batch < 1:
        raise PomonaError(f"--batch {batch} is no number of answers; use 1 or more")
    import uvicorn

    from pomona.artifacts.personal import PersonalModel, clients_of_run
    from pomona.cli.console import console, quiet_libraries
    from pomona.serving.answering import Answering
    from pomona.serving.models import BASE, load_served
    from pomona.serving.openai import endpoint

    quiet_libraries()
    base = PersonalModel(model, device=device)
    named: dict[str, Any] = {} if run is None else clients_of_run(run, base)
    for name, parts in _parts(graft, adapter, personal).items():
        named[name] = PersonalModel(model, **parts, device=device)
    if BASE in named:
        raise PomonaError(
            f'a client is called "{BASE}", which is the base itself; name it otherwise'
        )
    served, tokenizer = load_served({BASE: base, **named}, template, console.print)
    console.print(f"serving {', '.join(served)} at http://{host}:{port}/v1")
    with Answering(served, tokenizer, batch) as answering:
        uvicorn.run(endpoint(answering), host=host, port=port, log_level="warning")


def _parts(
    grafts: list[str] | None, adapters: list[str] | None, personals: list[str] | None
) -> dict[str, dict[str, Path]]:
    """Return the folders of every client's parts by what they are."""
    found: dict[str, dict[str, Path]] = {}
    for_all: Path | None = None
    for kind, given in (("graft", grafts), ("adapter", adapters), ("personal", personals)):
        for word in given or []:
            name, equals, folder = word.partition("=")
            if kind == "adapter" and not equals:
                if for_all is not None:
                    raise PomonaError("--adapter is given twice for all clients; name one NAME=DIR")
                for_all = Path(word)
                continue
            if not equals or not name or not folder:
                raise PomonaError(f'--{kind} "{word}" names no client; write --{kind} NAME=DIR')
            if kind in found.setdefault(name, {}):
                raise PomonaError(f'--{kind} is given twice for "{name}"; give it once')
            found[name][kind] = Path(folder)
    if for_all is not None:
        for parts in (found or {"shared": {}}).values():
            parts.setdefault("adapter", for_all)
        if not found:
            found["shared"] = {"adapter": for_all}
    return found
