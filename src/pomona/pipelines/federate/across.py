"""The engine of a deployment: every client is a site that is asked, and answers when it can.

The rounds are those of a simulation. A site's answer is looked at before it counts, and waits on disk until
all are there: the server holds one at a time, and takes them in the order of names.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pomona.artifacts.arrived import Arrived
from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.run import RunDirectory
from pomona.federation.cohort import FrozenBase
from pomona.federation.masks import Unmasking
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.strategies import Corrects, ServerState, frozen_part
from pomona.federation.update import ClientState, Update, split
from pomona.federation.wire import from_wire, wire_form
from pomona.models.lora import narrowed
from pomona.models.received import check_like, check_values, decoded, encoded
from pomona.parcel import Parcel
from pomona.pipelines.federate.asking import Asking
from pomona.pipelines.federate.engine import Answer
from pomona.pipelines.federate.heard import answers_of, check_told, lines_of, of_kind
from pomona.pipelines.federate.masked_round import MaskedRound
from pomona.pipelines.federate.rounds import sent_to_clients, sent_to_newcomers
from pomona.progress import Progress, Tell


@dataclass(frozen=True)
class Across:
    """The clients of a deployment: `clients` are the names of the sites."""

    settings: FederateSettings
    run: RunDirectory
    base: FrozenBase
    server_first: Mapping[str, Tensor]
    clients: Sequence[str]
    asking: Asking

    @property
    def progress(self) -> Progress:
        """Hears how far a stage is."""
        return self.asking.progress

    @property
    def tell(self) -> Tell:
        """Hears what a user should know at once."""
        return self.asking.tell

    def sends(self, client: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what travels of an adapter to a site: no more than its rank."""
        rank = self.settings.ranks.get(client)
        return tensors if rank is None else narrowed(tensors, rank)

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
            masked = MaskedRound(
                self.asking.gather, self.asking.hello.federation, round_, names, folder
            )
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
            self.asking.gather(parcels, keep, f"round {round_}", least)
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
        self.asking.gather(
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
        self.asking.gather(parcels, keep, f"evaluating round {round_}")
        return [line for name in names if name in lines for line in lines[name]]

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
        told = {"federation": self.asking.hello.federation, **told}
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
        check_told(answer, self.asking.hello.federation, round_, self.asking.present[name].train)
        began, wire = self.sends(name, server.shared), decoded(answer.tensors)
        wanted = self.sends(name, expected)
        check_like(wire, wire_form(self.settings, began, wanted))
        if self.settings.secure_aggregation:
            return  # what is under masks tells nothing
        tensors = from_wire(self.settings, began, wire)
        before = {n: v for n, v in began.items() if n in wanted}
        check_values(tensors, before, self.asking.patience.largest_change)

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
