"""The engine of a deployment: every client is a site that is asked, and answers when it can.

The rounds are those of a simulation. A site's answer is looked at before it counts, and waits on disk until
all are there: the server holds one at a time, and takes them in the order of names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pomona.artifacts.arrived import Arrived
from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.inputs import Inputs
from pomona.artifacts.run import RunDirectory
from pomona.errors import PomonaError
from pomona.federation.cohort import FrozenBase
from pomona.federation.masks import Unmasking
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.strategies import Corrects, ServerState, frozen_part
from pomona.federation.update import ClientState, Update, split
from pomona.federation.wire import from_wire, wire_form
from pomona.models.lora import narrowed
from pomona.models.received import check_like, check_values, decoded, encoded
from pomona.parcel import Parcel, Refused
from pomona.pipelines.federate.engine import Answer
from pomona.pipelines.federate.heard import (
    Presented,
    answers_of,
    check_told,
    lines_of,
    not_refused,
    of_kind,
    presented,
)
from pomona.pipelines.federate.masked_round import MaskedRound
from pomona.pipelines.federate.rounds import sent_to_clients, sent_to_newcomers
from pomona.progress import Progress, Tell


@runtime_checkable
class Sites(Protocol):
    """Asks sites, and hears their answers; what carries the messages is its own affair."""

    def ask(
        self,
        parcels: Mapping[str, Parcel],
        seconds: float,
        enough: Callable[[Set[str]], bool] = lambda away: False,
    ) -> Iterator[tuple[str, Parcel | Refused]]:
        """Send every site its parcel and yield answers as they come, until all are there or time is up.

        A site that is away is waited for, and asked when it is back. Who has another parcel in `parcels` when
        the next answer is asked for is sent that too. `enough` is told now and then who is away, and ends it.
        """
        ...


@dataclass(frozen=True)
class Patience:
    """How long a round waits, and how many answers it needs to count.

    A round ends when everybody who was asked has answered, or after `deadline` seconds if at least the share
    `quorum` of them has; if all the others are away, after `absence` seconds more. Otherwise they are asked
    again, `retries` times. A change whose norm is more than `largest_change` times one plus that of what was
    sent is rejected.
    """

    deadline: float = 600.0
    absence: float = 60.0
    quorum: float = 0.5
    retries: int = 2
    largest_change: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.deadline < float("inf"):
            raise PomonaError(f"deadline {self.deadline} is no time; give seconds, for example 600")
        if not 0 <= self.absence < float("inf"):
            raise PomonaError(f"absence {self.absence} is no time; give seconds, for example 60")
        if not 0 < self.quorum <= 1:
            raise PomonaError(f"quorum {self.quorum} is no share of the sites; use for example 0.5")
        if self.retries < 0:
            raise PomonaError(f"retries {self.retries} is negative; use 0 or more")
        if not 0 < self.largest_change < float("inf"):
            raise PomonaError(
                f"largest_change {self.largest_change} is not positive; use for example 10"
            )

    def least(self, asked: int) -> int:
        """Return how many of those who were asked have to answer."""
        return max(1, ceil(self.quorum * asked - 1e-9))


@dataclass(frozen=True)
class Across:
    """The clients of a deployment: `clients` are the names of the sites."""

    settings: FederateSettings
    run: RunDirectory
    base: FrozenBase
    federation_id: str
    recipe: str
    inputs: Inputs
    server_first: Mapping[str, Tensor]
    clients: Sequence[str]
    sites: Sites
    patience: Patience
    progress: Progress
    tell: Tell
    present: dict[str, Presented] = field(default_factory=dict[str, Presented])

    def sends(self, client: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what travels of an adapter to a site: no more than its rank."""
        rank = self.settings.ranks.get(client)
        return tensors if rank is None else narrowed(tensors, rank)

    def greet(self) -> None:
        """Tell sites what the federation is, and hear who they are; who does not answer is left out."""
        waiting, here = dict.fromkeys(self.clients), set[str]()
        enough = self._enough(waiting, here, self.patience.least(len(waiting)))
        parcels = {name: self._hello(name) for name in waiting}
        for name, answer in self.sites.ask(parcels, self.patience.deadline, enough):
            waiting.pop(name, None)
            if self._heard(name, answer):
                here.add(name)

    def _hello(self, name: str) -> Parcel:
        told = {
            "federation": self.federation_id,
            "recipe": self.recipe,
            "model": self.inputs.model,
            "site": name,
        }
        return Parcel("hello", told, self._first)

    @cached_property
    def _first(self) -> bytes:
        return encoded(self.server_first) if self.settings.warm_start else b""

    def _heard(self, name: str, answer: Parcel | Refused) -> bool:
        """Note what a site says of itself, and tell whether it takes part."""
        try:
            self.present[name] = presented(name, not_refused(answer), self.inputs.model)
        except PomonaError as error:
            self.tell(f'site "{name}" does not take part: {error}')
        return name in self.present

    def train(
        self, snapshot: Snapshot, names: Sequence[str], round_: int, finish: Finish | None = None
    ) -> Iterator[Answer]:
        """Have sites train, and yield their answers in the order of names once enough of them are there."""
        server = snapshot.server
        expected = {} if finish else self._expected(server)
        told: dict[str, Any] = {"memory": sorted(self._memory(server)), "round": round_}
        sent = (
            sent_to_newcomers(self.settings, server)
            if finish
            else sent_to_clients(self.settings.strategy, server)
        )
        masked, least = None, 1
        if self.settings.secure_aggregation and names and not finish:
            folder = self.run.path
            masked = MaskedRound(self._gather, self.federation_id, round_, names, folder)
            if masked.answered is None:
                masked.agree()
                names, least, told = masked.peers, masked.threshold, {**told, **masked.told()}
        opening = masked is not None and masked.answered is not None
        arrived = Arrived(self.run.path / "arrived", again=opening)

        def keep(name: str, answer: Parcel) -> None:
            self._check(name, answer, round_, expected, server)
            arrived.keep(name, answer)

        if not opening:
            parcels = self._parcels("train", told, names, sent)
            self._gather(parcels, keep, f"round {round_}", least)
            del parcels
        answered = [name for name in names if name in arrived.told]
        masks = masked.opened(answered) if masked is not None else None
        for name in answered:
            yield self._answer(name, arrived.read(name), server, masks)
        if (
            masks is None
        ):  # a sum that was opened may have to be made again, until the round is committed
            arrived.clear()

    def evaluate(
        self,
        snapshot: Snapshot,
        private: Mapping[str, ClientState],
        shared: Mapping[str, Tensor],
        round_: int,
    ) -> list[dict[str, Any]]:
        """Have sites measure the shared model and their own."""
        return self._measured("evaluate", shared, self.clients, round_)

    def held_back(
        self,
        snapshot: Snapshot,
        private: Mapping[str, ClientState],
        shared: Mapping[str, Tensor],
        round_: int,
    ) -> list[dict[str, Any]]:
        """Have sites measure their models on the rows they hold back, when it is time to look."""
        stop = self.settings.early_stop
        if stop is None or round_ % stop.every or round_ > self.settings.rounds:
            return []
        looking = [name for name in self.clients if name not in self.settings.newcomers]
        return self._measured("held back", shared, looking, round_)

    def finish(self, server: ServerState, round_: int) -> dict[str, list[dict[str, Any]]]:
        """Have every site measure and publish what is its own; return the figures of its test rows."""
        found: dict[str, list[dict[str, Any]]] = {}

        def keep(name: str, answer: Parcel) -> None:
            of_kind(answer, "finished")
            found[name] = answers_of(name, answer.told)

        sent = sent_to_newcomers(self.settings, server)
        self._gather(
            self._parcels("finish", {"round": round_}, self.clients, sent), keep, "the end"
        )
        return {name: found[name] for name in self.clients if name in found}

    def _measured(
        self, kind: str, shared: Mapping[str, Tensor], names: Sequence[str], round_: int
    ) -> list[dict[str, Any]]:
        lines: dict[str, list[dict[str, Any]]] = {}

        def keep(name: str, answer: Parcel) -> None:
            of_kind(answer, "figures")
            lines[name] = lines_of(name, answer.told)

        sent = sent_to_newcomers(self.settings, ServerState(shared))
        parcels = self._parcels(kind, {"round": round_}, names, sent)
        self._gather(parcels, keep, f"evaluating round {round_}")
        return [line for name in names if name in lines for line in lines[name]]

    def _gather(
        self,
        parcels: Mapping[str, Parcel],
        keep: Callable[[str, Parcel], None],
        what: str,
        least: int = 1,
    ) -> None:
        """Ask until enough have answered; raises `PomonaError` when they do not."""
        least = max(least, self.patience.least(len(parcels)))
        waiting, answered = dict.fromkeys(parcels), set[str]()
        for attempt in range(self.patience.retries + 1):
            self._ask(parcels, keep, what, least, (waiting, answered))
            if not waiting or len(answered) >= least:
                break
            again = "; they are asked again" if attempt < self.patience.retries else ""
            self.tell(
                f"{what}: {len(answered)} of {len(parcels)} sites have answered and {least} are needed; "
                f"missing: {', '.join(waiting)}{again}"
            )
        if len(answered) < min(least, len(parcels)):
            raise PomonaError(
                f"{what}: {len(answered)} of {len(parcels)} sites have answered and {least} are needed; start "
                "the missing ones and run the same command again to go on with this round, or lower --quorum"
            )

    def _ask(
        self,
        asked: Mapping[str, Parcel],
        keep: Callable[[str, Parcel], None],
        what: str,
        least: int,
        progress: tuple[dict[str, None], set[str]],
    ) -> None:
        """Ask those who are waited for, once; a site that knows nothing yet is told first."""
        waiting, answered = progress
        work = {name: asked[name] for name in waiting}
        parcels = {name: work[name] if name in self.present else self._hello(name) for name in work}
        self.progress(what, len(answered), len(asked))
        enough = self._enough(waiting, answered, least)
        for name, answer in self.sites.ask(parcels, self.patience.deadline, enough):
            if parcels[name].kind == "hello":
                if self._heard(name, answer):
                    parcels[name] = work[name]
                else:
                    waiting.pop(name)
                continue
            if isinstance(answer, Parcel) and answer.kind == "unknown":
                parcels[name] = self._hello(name)  # its state is new
                continue
            waiting.pop(name, None)
            try:
                keep(name, not_refused(answer))
            except PomonaError as error:
                self.tell(f'{what}: site "{name}" does not count: {error}')
            else:
                answered.add(name)
            self.progress(what, len(answered), len(asked))

    def _enough(
        self, waiting: Mapping[str, None], answered: Set[str], least: int
    ) -> Callable[[Set[str]], bool]:
        """Return what tells that enough have answered and the others have been away for long."""
        since: list[float] = []

        def enough(away: Set[str]) -> bool:
            if len(answered) < least or not waiting.keys() <= away:
                since.clear()
                return False
            if not since:
                since.append(monotonic())
            return monotonic() - since[0] >= self.patience.absence

        return enough

    def _parcels(
        self,
        kind: str,
        told: Mapping[str, Any],
        names: Sequence[str],
        tensors: Mapping[str, Tensor],
    ) -> dict[str, Parcel]:
        """Return what every site is asked; those of the same rank share the bytes of its tensors.

        To train it gets no more than its rank; what everybody shares is measured whole.
        """
        ranks = self.settings.ranks if kind == "train" else {}
        by_rank: dict[int | None, bytes] = {}
        told = {"federation": self.federation_id, **told}
        for name in names:
            rank = ranks.get(name)
            if rank not in by_rank:
                by_rank[rank] = encoded(tensors if rank is None else self.sends(name, tensors))
        return {name: Parcel(kind, told, by_rank[ranks.get(name)]) for name in names}

    def _memory(self, server: ServerState) -> set[str]:
        return set(server.memory) if isinstance(self.settings.strategy, Corrects) else set()

    def _expected(self, server: ServerState) -> dict[str, Tensor]:
        """Return stand-ins of what a site of full rank sends back of a round."""
        strategy = self.settings.strategy
        born = {n: v for n, v in server.shared.items() if n in self.server_first}
        sent, _ = split(ClientState(born), strategy.shares, frozen_part(strategy))
        if isinstance(strategy, Corrects):
            sent |= {name: server.memory[name] for name in self._memory(server)}
        return sent

    def _check(
        self,
        name: str,
        answer: Parcel,
        round_: int,
        expected: Mapping[str, Tensor],
        server: ServerState,
    ) -> None:
        """Raise `PomonaError` for an answer that may not count."""
        check_told(answer, self.federation_id, round_, self.present[name].train)
        began, wire = self.sends(name, server.shared), decoded(answer.tensors)
        wanted = self.sends(name, expected)
        check_like(wire, wire_form(self.settings, began, wanted))
        if self.settings.secure_aggregation:
            return  # what is under masks tells nothing
        tensors = from_wire(self.settings, began, wire)
        before = {n: v for n, v in began.items() if n in wanted}
        check_values(tensors, before, self.patience.largest_change)

    def _answer(
        self, name: str, parcel: Parcel, server: ServerState, masks: Unmasking | None
    ) -> Answer:
        told, wire = parcel.told, decoded(parcel.tensors)
        update = None
        if wire:
            device = self.base.device
            wire = masks.bared(name, wire) if masks is not None else wire
            wire = {n: v.to(device) for n, v in wire.items()}
            tensors = from_wire(self.settings, self.sends(name, server.shared), wire)
            update = Update(name, told["rows"], tensors, told.get("loss"), wire)
        return Answer(name, told["losses"], update, None, told.get("epsilon"))
