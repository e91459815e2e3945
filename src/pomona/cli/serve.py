"""`pomona serve`."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import typer

from pomona.cli.join import check_security
from pomona.cli.options import Changes, Trackers
from pomona.errors import PomonaError

_LAST_SECONDS = 20.0
_M_MMAP_THRESHOLD = -3  # of malloc.h
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the federation.")]
Out = Annotated[Path, typer.Option("--out", metavar="RUN", help="Run folder, new or to go on.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all of them.")]
Port = Annotated[int, typer.Option("--port", help="Port to listen on.")]
Keys = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="The coordinator's folder of pomona keys."),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--site", metavar="NAME", help="A site that takes part; repeat it. Else all with keys."
    ),
]
Deadline = Annotated[
    float, typer.Option("--deadline", help="Seconds that a round waits for answers.")
]
Absence = Annotated[
    float, typer.Option("--absence", help="Seconds that sites which are away are waited for.")
]
Quorum = Annotated[
    float, typer.Option("--quorum", help="Share of the sites asked that has to answer.")
]
Retries = Annotated[int, typer.Option("--retries", help="How often those missing are asked again.")]
Largest = Annotated[
    float,
    typer.Option(
        "--largest-change", help="Reject a change of more than so many times what was sent."
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", help="Use this model, not the recipe's.", metavar="MODEL")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Use this seed, not the recipe's.")]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:1.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without TLS and keys, for this machine only.")
]


def serve(
    recipe: Recipe,
    out: Out,
    host: Host = "127.0.0.1",
    port: Port = 8443,
    keys: Keys = None,
    site: Names = None,
    deadline: Deadline = 600.0,
    absence: Absence = 60.0,
    quorum: Quorum = 0.5,
    retries: Retries = 2,
    largest_change: Largest = 10.0,
    model: Model = None,
    seed: Seed = None,
    changes: Changes = None,
    device: Device = "auto",
    insecure: Insecure = False,
    track: Trackers = None,
) -> None:
    """Coordinate a federation of sites (pomona join): a simulation's recipe, with everybody's rows at home.

    RUN gets the shared adapter, figures and results; what is private never comes here. A coordinator that was
    stopped goes on with the same command.
    """
    check_security(f"{host}:{port}", keys, insecure, "serve")
    _give_back_what_is_freed()
    from pomona.artifacts.inputs import inputs_of
    from pomona.artifacts.run import RunDirectory
    from pomona.artifacts.tracking import tracked
    from pomona.cli.console import console, print_comparison, progress_bars
    from pomona.cli.log import Log
    from pomona.federation.settings import FederateSettings
    from pomona.flower.keys import coordinator_keys
    from pomona.flower.link import Link
    from pomona.flower.sites import FlowerSites, LinkPost
    from pomona.pipelines.federate.asking import Patience
    from pomona.pipelines.federate.coordinate import coordinate
    from pomona.pipelines.federate.policy import model_digest, recipe_digest
    from pomona.progress import to_all
    from pomona.recipe import dump, read_recipe, table_of
    from pomona.recipe.remote import for_sites

    absolute = str(Path(model).resolve()) if model and Path(model).exists() else model
    settings = read_recipe(
        recipe, FederateSettings, {"model": absolute, "seed": seed}, changes or ()
    )
    patience = Patience(deadline, absence, quorum, retries, largest_change)
    own = None if keys is None else coordinator_keys(keys)
    names = _names(site, None if own is None else list(own.sites))
    text = for_sites(settings)
    about: dict[str, Any] = {
        "command": ["pomona", *sys.argv[1:]],
        "method": settings.name,
        "seed": settings.seed,
        "federation": token_hex(8),
    }
    signal.signal(signal.SIGTERM, _interrupt)
    with (
        RunDirectory.open(out, dump(settings), about) as run,
        tracked(track or (), out, table_of(settings), console.print) as tracker,
        progress_bars() as bars,
    ):
        progress = to_all(bars, tracker)
        log = Log(out / "serve.log")
        digest = model_digest(inputs_of(settings.model, {}).model)
        log.tell(f"recipe {recipe_digest(text)}, base model {digest}")
        admitted = None if own is None else {name: own.sites[name] for name in names}
        link = Link(host, port, out / "messages", own and own.certificate, admitted)
        with _ends_when_interrupted(), link:
            sites = FlowerSites(LinkPost(link), dict(link.names), own is not None, note=log.note)
            log.tell(f"listening on {host}:{port} for {', '.join(names)}")
            with _told(out, sites, names, log, link):
                coordinate(settings, run, text, names, sites, patience, progress, log.tell, device)
    print_comparison([out])
    log.tell(f"results in {out}")


def _names(given: list[str] | None, keys: list[str] | None) -> list[str]:
    """Return the sites of the federation."""
    from pomona.files import check_name

    names = given or keys
    if not names:
        raise PomonaError("without keys the sites have to be named; give --site NAME for each")
    for name in names:
        check_name(name)
        if keys is not None and name not in keys:
            raise PomonaError(
                f'there is no key of site "{name}"; there are those of {", ".join(keys)}'
            )
    if len(set(names)) < len(names):
        raise PomonaError("a site is named twice; name each once")
    return sorted(names)


def _give_back_what_is_freed() -> None:
    """Have glibc map large buffers one by one: it would keep what many messages have freed, in every thread."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _ends_when_interrupted() -> Generator[None]:
    """End the process for good a while after Ctrl-C, also when a thread that answers a site does not end."""
    try:
        yield
    except KeyboardInterrupt:
        last = threading.Timer(_LAST_SECONDS, os._exit, [130])
        last.daemon = True
        last.start()
        raise


@contextmanager
def _told(out: Path, sites: Any, names: list[str], log: Any, link: Any) -> Generator[None]:
    """Keep the file of `pomona status` true while the federation runs."""
    from pomona.artifacts.checkpoint import Checkpoint
    from pomona.cli.status import write_status

    over = threading.Event()
    checkpoint = Checkpoint(out / "checkpoint")

    def write(state: str) -> None:
        online = {sites.names.get(node) for node in link.online()}
        write_status(
            out,
            {
                "state": state,
                "round": checkpoint.round,
                "last": log.last,
                "sites": {
                    name: {
                        "online": name in online,
                        "sent": sites.bytes_sent.get(name, 0),
                        "received": sites.bytes_received.get(name, 0),
                    }
                    for name in names
                },
            },
        )

    def keep() -> None:
        while not over.wait(1.0):
            write("running")

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        thread.join()
        write("stopped")
        raise
    over.set()
    thread.join()
    write("finished")
