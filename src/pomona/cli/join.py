"""`pomona join`."""

import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from pomona.errors import PomonaError

Coordinator = Annotated[
    str, typer.Option("--coordinator", metavar="HOST:PORT", help="Where pomona serve listens.")
]
Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="This site's rows to train on.")]
Test = Annotated[
    Path | None,
    typer.Option("--test", metavar="FILE", help="Rows to test on; else some of --data are kept."),
]
HeldOut = Annotated[
    float, typer.Option("--held-out", help="Share of --data kept for testing where --test is none.")
]
Model = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="The base model, at this site.")
]
State = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="What this site keeps, new or to go on with.")
]
Keys = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="This site's folder of pomona keys (sites/NAME)."),
]
Name = Annotated[str | None, typer.Option("--name", help="This site's name; else its key's.")]
PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="TOML file: what may leave, and for whom."),
]
Devices = Annotated[
    str, typer.Option("--device", help="auto (all GPUs, if there are any), cpu, cuda or cuda:1.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without TLS and keys, to this machine only.")
]


def join(
    coordinator: Coordinator,
    data: Data,
    model: Model,
    state: State,
    test: Test = None,
    held_out: HeldOut = 0.1,
    keys: Keys = None,
    name: Name = None,
    policy: PolicyFile = None,
    device: Devices = "auto",
    insecure: Insecure = False,
) -> None:
    """Take part in a federation as a site, until it is over.

    The rows stay in FILE and what is private in the state folder; the shared adapter's updates and figures
    go to the coordinator. A site that was stopped goes on with the same command.
    """
    from pomona.cli.log import Log
    from pomona.cli.status import write_status
    from pomona.files import check_name, held_folder
    from pomona.flower.keys import own_key, site_keys
    from pomona.flower.node import Node
    from pomona.flower.sites import named
    from pomona.flower.warm import Worker, python_module
    from pomona.parcel import Parcel

    check_security(coordinator, keys, insecure, "join")
    with held_folder(state):
        if keys is None:
            if name is None:
                raise PomonaError("a site without keys needs a name; give --name")
            key, authority = own_key(state / "node.key"), None
        else:
            own = site_keys(keys)
            if name not in (None, own.name):
                raise PomonaError(f'{keys} holds the key of "{own.name}"; leave --name out')
            name, key, authority = own.name, own.key, own.authority
        check_name(name)
        log = Log(state / "site.log")
        first: dict[str, Any] = {
            "name": name,
            "data": str(data.absolute()),
            "test": test and str(test.absolute()),
            "held_out": held_out,
            "model": str(Path(model).resolve()) if Path(model).exists() else model,
            "state": str(state.absolute()),
            "policy": policy and str(policy.absolute()),
            "device": device,
        }
        worker = Worker(python_module("pomona.cli.worker"), Parcel("site", first), log.tell)

        def answer(parcel: Parcel) -> Parcel:
            own_name = named(parcel, name)
            if own_name is not None:
                return own_name
            if parcel.kind == "bye":
                log.tell("the federation is over")
                node.stopped.set()
                return Parcel("bye")
            found = worker.answer(parcel)
            round_ = parcel.told.get("round")
            log.tell(
                f"{parcel.kind}{'' if round_ is None else f' of round {round_}'}: {found.kind}, "
                f"{parcel.size:,} bytes in, {found.size:,} out"
            )
            write_status(
                state,
                {
                    "site": name,
                    "coordinator": coordinator,
                    "round": round_,
                    "last": log.last,
                    "worker": worker.pid,
                },
            )
            return found

        node = Node(coordinator, key, answer, log.tell, authority, registers=keys is None)
        interrupted: list[int] = []

        def stop(number: int, _frame: object) -> None:
            if interrupted:
                return  # it is stopping
            interrupted.append(number)
            node.stopped.set()
            worker.close()  # what it is at is not committed yet, and is done again
            raise _Stopped

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            worker.start()
            log.tell(f'site "{name}" is ready (process {os.getpid()}, worker {worker.pid})')
            node.run()
        except _Stopped:
            pass
        finally:
            worker.close()
        if interrupted:
            log.tell("stopped; the same command goes on")
            raise typer.Exit(0 if interrupted[-1] == signal.SIGTERM else 130)


class _Stopped(BaseException):
    """A signal has come while the network was waited for."""


def check_security(address: str, keys: Path | None, insecure: bool, command: str) -> None:
    """Raise `PomonaError` for a connection without TLS that was not asked for, or leaves this machine."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise PomonaError(
            f'"{address}" is no HOST:PORT; give for example coordinator.example.org:8443'
        )
    if keys is not None and insecure:
        raise PomonaError("--keys and --insecure exclude each other; leave one out")
    if keys is None and not insecure:
        raise PomonaError(
            f"pomona {command} needs --keys (made by pomona keys); on one machine alone --insecure does without"
        )
    if insecure and host not in ("127.0.0.1", "localhost", "::1", "[::1]"):
        raise PomonaError(
            f"--insecure is for this machine alone, and {host} is another; use --keys"
        )
