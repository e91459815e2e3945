"""One site of a federation: a client that trains on its own rows and keeps what is its own.

A site is a federation of one, in a run folder of its own: what the coordinator asks is done by the same code
as in a simulation. Only `Update`s and figures leave; a round that was answered is answered again with the same
bytes, never trained twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pomona.artifacts.about import read_about
from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.holdings import write_holdings
from pomona.artifacts.inputs import Inputs, difference, inputs_of
from pomona.artifacts.run import RunDirectory
from pomona.artifacts.sent import Sent
from pomona.errors import PomonaError
from pomona.federation.clients import ClientRows
from pomona.federation.holdings import holdings_of
from pomona.federation.measure import communication, message_bytes
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import ServerState
from pomona.models.loading import Load, load_model
from pomona.models.lora import widened
from pomona.models.placement import find_devices
from pomona.models.received import decoded, encoded
from pomona.parcel import Parcel
from pomona.pipelines.federate.birth import begin
from pomona.pipelines.federate.finish import finish
from pomona.pipelines.federate.in_process import InProcess
from pomona.pipelines.federate.pace import paced
from pomona.pipelines.federate.policy import Policy
from pomona.pipelines.federate.prepare import prepare
from pomona.pipelines.federate.site_masks import SiteMasks
from pomona.progress import Progress, Tell, silent, unheard

_PRIVATE_LINES = ("counts", "openness")  # what routing and gates tell of rows stays at the site
_OF_A_ROW = ("model", "nats", "tokens", "rouge_l", "exact_match")  # no text of it


@dataclass(frozen=True)
class Site:
    """What a site is, before any coordinator has asked it anything.

    `read` makes settings of a recipe's text (`pomona.recipe`), with the site's model in the place of the
    coordinator's; `load` loads that.
    """

    name: str
    rows: ClientRows
    model: str
    state: Path
    read: Callable[[str, str], FederateSettings] = field(repr=False)
    policy: Policy = field(default_factory=Policy)
    device: str = "auto"
    load: Load = field(default=load_model, repr=False)
    progress: Progress = field(default=silent, repr=False)
    tell: Tell = field(default=unheard, repr=False)


class Member:
    """A site with its model loaded, in one federation: answers what the coordinator asks."""

    def __init__(self, site: Site):
        self.site = site
        self._joined: _Joined | None = None

    def answer(self, asked: Parcel) -> Parcel:
        """Return the answer; raises `PomonaError` where the site refuses or cannot."""
        self.site.policy.check_size("comes in", asked.size)
        if asked.kind == "hello":
            answer = self._hello(asked)
        elif not self._goes_on(asked.told.get("federation")):
            return Parcel("unknown")
        else:
            assert self._joined is not None
            work = {
                "train": self._joined.train,
                "evaluate": self._joined.evaluate,
                "held back": self._joined.held_back,
                "finish": self._joined.finish,
                "mask keys": self._joined.masks.keys,
                "mask shares": self._joined.masks.shares,
                "open masks": self._joined.open_masks,
            }.get(asked.kind)
            if work is None:
                raise PomonaError(
                    f'the coordinator asks for "{asked.kind[:40]}", which is not known here'
                )
            answer = work(asked)
        self.site.policy.check_size("goes out", answer.size)
        return answer

    def close(self) -> None:
        """Let the state folder go."""
        if self._joined is not None:
            self._joined.engine.run.close()
            self._joined = None

    def _hello(self, asked: Parcel) -> Parcel:
        told = asked.told
        if self._joined is None or self._joined.federation_id != told["federation"]:
            self.close()
            self._joined = _joined(self.site, asked)
            Sent(self.site.state / "run").keep(0, asked, asked)
        return self._joined.presented()

    def _goes_on(self, federation: object) -> bool:
        """Whether this site is in a federation; one that was restarted goes on as it was told before."""
        if self._joined is None:
            told = Sent(self.site.state / "run").asked(0)
            if told is not None and told.told.get("federation") == federation:
                self._joined = _joined(self.site, told)
        return self._joined is not None and self._joined.federation_id == federation


@dataclass
class _Joined:
    """A site in a federation, with the last round it has committed."""

    site: Site
    federation_id: str
    engine: InProcess
    inputs: Inputs
    snapshot: Snapshot

    def presented(self) -> Parcel:
        """Return who this is: how many rows stand behind it, its base, where it is."""
        federation, name = self.engine.federation, self.site.name
        lines = [line for line in self.engine.run.metrics() if line["model"] == "base"]
        return Parcel(
            "here",
            {
                "site": name,
                "train": len(federation.train[name]),
                "test": len(federation.test[name]),
                "model": self.inputs.model,
                "round": self.snapshot.round,
                "lines": _public(lines),
            },
        )

    @property
    def masks(self) -> SiteMasks:
        """What hides this site's part of a sum."""
        return SiteMasks(self.site.name, self.federation_id, self.site.state)

    def train(self, asked: Parcel) -> Parcel:
        """Train a round, or send again what was sent of it; under masks where only sums are to be seen."""
        answer = self._trained(asked)
        hidden = self.engine.settings.secure_aggregation and answer.tensors
        return self.masks.hide(answer, asked) if hidden else answer

    def open_masks(self, asked: Parcel) -> Parcel:
        """Open the sum of the round that was finished last."""
        return self.masks.open(asked, self.snapshot.round)

    def _trained(self, asked: Parcel) -> Parcel:
        federation, run, name = self.engine.federation, self.engine.run, self.site.name
        round_, settings = _round_of(asked), federation.settings
        again = self._again(asked, round_)
        if again is not None:
            return again
        server = self._server(asked)
        finish = settings.finishing if round_ > settings.rounds else None
        (answer,) = self.engine.train(replace(self.snapshot, server=server), [name], round_, finish)
        update = answer.update
        self.site.policy.check_tensors(update.shared if update else {})
        tensors = {} if update is None else update.tensors
        parcel = Parcel(
            "update",
            {
                "federation": self.federation_id,
                "round": round_,
                "rows": 0 if update is None else update.rows,
                "losses": list(answer.losses),
                "loss": None if update is None else update.loss,
                "epsilon": answer.epsilon,
            },
            encoded(tensors),
        )
        self.site.policy.check_size("goes out", parcel.size)
        Sent(run.path).keep(round_, asked, parcel)
        received = {name: message_bytes(update.message)} if update else {}
        down = {name: len(asked.tensors)}
        lines = [
            {"round": round_, "model": "training", "client": name, "losses": list(answer.losses)},
            communication(round_, down, received),
        ]
        assert answer.private is not None
        self.snapshot = run.commit(self.snapshot, round_, server, {name: answer.private}, lines)
        Sent(run.path).forget_before(round_)
        return parcel

    def evaluate(self, asked: Parcel) -> Parcel:
        """Measure the shared model and the site's own on its test rows."""
        server, round_ = self._server(asked), _round_of(asked)
        lines = self.engine.evaluate(self.snapshot, {}, server.shared, round_)
        known = {(line["round"], line["model"]) for line in self.engine.run.metrics()}
        fresh = [line for line in lines if (line["round"], line["model"]) not in known]
        self.engine.run.add_metrics(fresh)
        return Parcel("figures", {"round": round_, "lines": _public(lines)})

    def held_back(self, asked: Parcel) -> Parcel:
        """Measure the site's model on the rows that it holds back."""
        server, round_ = self._server(asked), _round_of(asked)
        lines = self.engine.held_back(self.snapshot, {}, server.shared, round_)
        return Parcel("figures", {"round": round_, "lines": _public(lines)})

    def finish(self, asked: Parcel) -> Parcel:
        """Publish the site's own parts beside its report, and tell its figures."""
        run, name = self.engine.run, self.site.name
        if not run.finished:
            server = self._server(asked)
            finish(self.engine.federation, replace(self.snapshot, server=server))
        rows = [[row[key] for key in _OF_A_ROW] for row in run.answers()]
        return Parcel("finished", {"site": name, "rows": rows})

    def _again(self, asked: Parcel, round_: int) -> Parcel | None:
        """Return what was sent of a round that is finished here, None for one that is not.

        Raises `PomonaError` when the coordinator is behind, or asks for the same round otherwise.
        """
        if round_ > self.snapshot.round:
            return None
        if round_ < self.snapshot.round:
            raise PomonaError(
                f'site "{self.site.name}" has finished round {self.snapshot.round}, but the coordinator asks '
                f"for round {round_}; restore the coordinator's run folder, or start anew with new --state"
            )
        return Sent(self.engine.run.path).of(round_, asked)

    def _server(self, asked: Parcel) -> ServerState:
        """Return what the coordinator holds: what it sent, and what cannot have changed."""
        tensors = {n: v.to(self._device) for n, v in decoded(asked.tensors).items()}
        memory = set(asked.told.get("memory", ()))
        first = self.engine.federation.server_first
        shared = {n: v for n, v in tensors.items() if n not in memory}
        if self.engine.settings.ranks:
            shared = widened(shared, first)  # as a simulation has it, to the last bit
        return ServerState(
            {**first, **shared},
            {n: v for n, v in tensors.items() if n in memory},
        )

    @property
    def _device(self) -> torch.device:
        return self.engine.federation.base.device


def _joined(site: Site, asked: Parcel) -> _Joined:
    """Open the site's run folder, load the model, go on where it was."""
    text, federation_id = str(asked.told["recipe"]), str(asked.told["federation"])
    site.policy.check_recipe(text)
    settings = site.read(text, site.model)
    site.policy.check_sums(settings.secure_aggregation or settings.strategy.shares == "nothing")
    rows = {site.name: site.rows}
    inputs = inputs_of(site.model, rows, site.progress)
    other = difference(Inputs(dict(asked.told["model"]), inputs.clients), inputs)
    if other is not None:
        raise PomonaError(
            f'site "{site.name}" has another base model than the coordinator: {other}; give both the same'
        )
    site.policy.check_model(inputs.model)
    about = {"method": settings.name, "seed": settings.seed, "federation": federation_id}
    run = RunDirectory.open(site.state / "run", text, about)
    try:
        began = read_about(run.path / "run.json").get("federation")
        if began != federation_id:
            raise PomonaError(
                f"{run.path} is the state of another federation ({began}); give a new --state, or have the "
                "coordinator go on with its own run folder"
            )
        run.claim(inputs)
        holdings = holdings_of(rows)
        devices = find_devices(site.device)
        telling = (site.progress, site.tell)
        prepared = prepare(settings, run, rows, *telling, holdings, devices, site.load)
        federation = paced(prepared, inputs)
        if asked.tensors:
            first = {n: v.to(federation.base.device) for n, v in decoded(asked.tensors).items()}
            federation = replace(federation, server_first={**federation.server_first, **first})
        write_holdings(run.path, holdings)
        if run.finished:
            last = ServerState(federation.server_first)
            snapshot = Snapshot(settings.last_round, last, {site.name: []})
        else:
            snapshot = run.snapshot([site.name]) or begin(federation)
    except BaseException:
        run.close()
        raise
    return _Joined(site, federation_id, InProcess(federation), inputs, snapshot)


def _round_of(asked: Parcel) -> int:
    round_ = asked.told.get("round")
    if not isinstance(round_, int) or round_ < 1:
        raise PomonaError("the coordinator names no round")
    return round_


def _public(lines: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    return [{k: v for k, v in line.items() if k not in _PRIVATE_LINES} for line in lines]
