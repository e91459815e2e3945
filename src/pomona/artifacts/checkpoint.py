"""The last committed round of a run: what the server has, what clients have trained.

A round is committed by replacing one small file, `state.json`. Whatever a killed process left beside it is not
referred to and is overwritten or removed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies import ServerState
from pomona.federation.update import ClientState
from pomona.files import damaged, read_as, write_json
from pomona.models.weights import read_tensors, write_tensors

_STATE, _EXPERTS = "state.json", "experts.json"


@dataclass(frozen=True)
class Snapshot:
    """The last committed round.

    `experts` [sites][grafts] are what every client's grafts grow from, `clients` the files of those who have
    trained: the others are as they are born, and cost nothing but their choice. `metrics_bytes` is how long
    the run's metrics.jsonl was.
    """

    round: int
    server: ServerState
    experts: Mapping[str, Sequence[Sequence[int]]] = field(repr=False)
    clients: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    metrics_bytes: int = 0


@dataclass(frozen=True)
class _State:
    """state.json: the files of the last committed round."""

    round: int
    metrics_bytes: int
    server: str
    clients: dict[str, str]


@dataclass(frozen=True)
class _Choice:
    """experts.json: written once, before the first round."""

    experts: dict[str, list[list[int]]]


@dataclass(frozen=True)
class Checkpoint:
    """The folder `checkpoint` of a run; it is there from the first round to the end of the run."""

    folder: Path

    @property
    def begun(self) -> bool:
        """Whether a round is committed."""
        return (self.folder / _STATE).is_file()

    @property
    def round(self) -> int | None:
        """The last committed round, None before the first and after the end."""
        return read_as(self.folder / _STATE, _State).round if self.begun else None

    def read(self, clients: Collection[str]) -> Snapshot:
        """Return the last committed round.

        Raises `PomonaError` when what is there is damaged, or does not tell of every one of `clients`.
        """
        path = self.folder / _STATE
        state = read_as(path, _State)
        if state.server != _server_file(state.round):
            raise damaged(path, f"round {state.round} has no file {state.server}")
        tensors = read_tensors(self.folder / state.server)
        server = ServerState(_part(tensors, "shared"), _part(tensors, "memory"))
        experts = self._experts({*clients, *state.clients})
        return Snapshot(state.round, server, experts, state.clients, state.metrics_bytes)

    def client(self, snapshot: Snapshot, name: str) -> ClientState | None:
        """Return a client's private state as of a snapshot, or None if it has not trained yet."""
        if name not in snapshot.clients:
            return None
        tensors = read_tensors(self.folder / snapshot.clients[name])
        return ClientState(*(_part(tensors, part.name) for part in fields(ClientState)))

    def choose(self, experts: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Write what clients' grafts will grow from, before the first round."""
        chosen = {name: [list(own) for own in sites] for name, sites in experts.items()}
        write_json(self.folder / _EXPERTS, asdict(_Choice(chosen)))

    def commit(
        self,
        previous: Snapshot,
        round_: int,
        server: ServerState,
        clients: Mapping[str, ClientState],
        metrics_bytes: int,
    ) -> Snapshot:
        """Make a round final: new files first, then the one rename that makes them count."""
        files = dict(previous.clients)
        for name, state in clients.items():
            files[name] = f"{quote(name, safe='')}.{round_}.safetensors"
            tensors: dict[str, Tensor] = {}
            for part in fields(ClientState):
                tensors |= _named(part.name, getattr(state, part.name))
            write_tensors(self.folder / files[name], tensors, {"round": str(round_)})
        server_file = _server_file(round_)
        held = _named("shared", server.shared) | _named("memory", server.memory)
        write_tensors(self.folder / server_file, held, {"round": str(round_)})
        state = _State(round_, metrics_bytes, server_file, files)
        write_json(self.folder / _STATE, asdict(state))
        kept = {*files.values(), server_file, _EXPERTS, _STATE}
        for stale in self.folder.iterdir():
            if stale.name not in kept:
                stale.unlink()
        return Snapshot(round_, server, previous.experts, files, metrics_bytes)

    def _experts(self, clients: Collection[str]) -> Mapping[str, Sequence[Sequence[int]]]:
        path = self.folder / _EXPERTS
        if not path.is_file():
            raise PomonaError(
                f"{path} is missing, without which the run cannot go on; restore it or choose a new folder"
            )
        experts = read_as(path, _Choice).experts
        missing = sorted(set(clients) - experts.keys())
        if missing:
            raise damaged(path, f'it lacks the client "{missing[0]}"')
        return experts


def _server_file(round_: int) -> str:
    return f"server.{round_}.server.safetensors"


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for name, value in tensors.items()}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
