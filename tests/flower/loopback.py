"""A federation over real HTTP on loopback, its coordinator and sites as threads of one process."""

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from pomona.artifacts.run import RunDirectory
from pomona.federation.settings import FederateSettings
from pomona.flower.link import Link
from pomona.flower.node import Node
from pomona.flower.sites import FlowerSites, LinkPost, named
from pomona.parcel import Parcel
from pomona.pipelines.federate.asking import Patience
from pomona.pipelines.federate.coordinate import coordinate
from pomona.pipelines.federate.policy import Policy
from pomona.pipelines.federate.site import Member, Site
from pomona.recipe import dump
from pomona.recipe.remote import at_site, for_sites

_ONE_AT_A_TIME = threading.Lock()


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def site_of(
    settings: FederateSettings, name: str, state: Path, policy: Policy | None = None
) -> Site:
    rows = settings.load()[name]
    return Site(name, rows, settings.model, state / name, at_site, policy or Policy(), "cpu")


class Thread:
    """A site that answers in a thread of its own; `twist` changes what it answers."""

    def __init__(
        self, site: Site, port: int, twist: Callable[[Parcel, Parcel], Parcel] | None = None
    ):
        self.site, self.member, self.twist = site, Member(site), twist
        self.asked: list[Parcel] = []
        self.sent: list[Parcel] = []
        self.told: list[str] = []
        key = ec.generate_private_key(ec.SECP384R1())
        address = f"127.0.0.1:{port}"
        self.node = Node(address, key, self.answer, self.told.append, registers=True)
        self.thread = threading.Thread(target=self.node.run, daemon=True)
        self.thread.start()

    def answer(self, asked: Parcel) -> Parcel:
        own = named(asked, self.site.name)
        if own is not None:
            return own
        if asked.kind == "bye":
            return Parcel("bye")
        self.asked.append(asked)
        with (
            _ONE_AT_A_TIME
        ):  # threads that compute side by side wait for Python's lock most of the time
            answer = self.member.answer(asked)
        if self.twist is not None:
            answer = self.twist(asked, answer)
        self.sent.append(answer)
        return answer

    def sent_of(self, kind: str) -> Parcel | None:
        """The last answer of a kind."""
        return next((parcel for parcel in reversed(self.sent) if parcel.kind == kind), None)

    def stop(self) -> None:
        self.node.stopped.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.member.close()


@contextmanager
def sites_of(
    settings: FederateSettings,
    folder: Path,
    twists: Mapping[str, Callable[[Parcel, Parcel], Parcel]] | None = None,
    policies: Mapping[str, Policy] | None = None,
) -> Generator[tuple[FlowerSites, dict[str, Thread]]]:
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with Link("127.0.0.1", port, folder / "messages") as link:
        threads = {
            name: Thread(
                site_of(settings, name, folder, (policies or {}).get(name)),
                port,
                (twists or {}).get(name),
            )
            for name in settings.load()
        }
        try:
            yield FlowerSites(LinkPost(link)), threads
        finally:
            for thread in threads.values():
                thread.node.stopped.set()
            link.mail.close()  # nobody waits for messages any more
            for thread in threads.values():
                thread.stop()


def run_across(
    settings: FederateSettings,
    folder: Path,
    sites: FlowerSites,
    patience: Patience | None = None,
    told: list[str] | None = None,
) -> dict[str, Any]:
    """Coordinate in `folder`/run, or go on there."""
    names = list(settings.load())
    own = replace(settings, data=None)
    about = {"method": settings.name, "seed": settings.seed, "federation": "loopback"}
    with RunDirectory.open(folder / "run", dump(own), about) as run:
        return coordinate(
            own,
            run,
            for_sites(own),
            names,
            sites,
            patience or Patience(deadline=60),
            tell=(told if told is not None else []).append,
            device="cpu",
        )
