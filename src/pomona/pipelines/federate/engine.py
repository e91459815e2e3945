"""Where the clients of a round are: in this process, or at sites of their own. The rounds are the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pomona.artifacts.checkpoint import Snapshot
from pomona.artifacts.run import RunDirectory
from pomona.federation.settings import FederateSettings, Finish
from pomona.federation.update import ClientState, Update
from pomona.progress import Progress, Tell


@dataclass(frozen=True)
class Answer:
    """What came of one client's training in a round.

    `update` is what it sends, None if nothing; `private` what it keeps, where that is kept here; `losses`
    are nats per answer token at every step, `epsilon` what its noised steps have cost its rows so far,
    `tokens` how many it trained on, 0 where that is not told.
    """

    client: str
    losses: Sequence[float]
    update: Update | None = None
    private: ClientState | None = field(default=None, repr=False)
    epsilon: float | None = None
    tokens: int = 0


@runtime_checkable
class Engine(Protocol):
    """The clients of one run, wherever they are."""

    @property
    def settings(self) -> FederateSettings:
        """The federation, whole."""
        ...

    @property
    def run(self) -> RunDirectory:
        """Where the server's state and what was measured are kept."""
        ...

    @property
    def progress(self) -> Progress:
        """Hears how far a stage is."""
        ...

    @property
    def tell(self) -> Tell:
        """Hears what a user should know at once."""
        ...

    @property
    def clients(self) -> Sequence[str]:
        """Who may train, in the order of their names."""
        ...

    def sends(self, client: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what travels of an adapter to a client: no more than its rank."""
        ...

    def train(
        self, snapshot: Snapshot, names: Sequence[str], round_: int, finish: Finish | None = None
    ) -> Iterator[Answer]:
        """Train clients from a snapshot and yield what came of each, in the order of `names`.

        With `finish` after the last round: nothing is sent. Who does not answer is left out.
        """
        ...

    def evaluate(
        self,
        snapshot: Snapshot,
        private: Mapping[str, ClientState],
        shared: Mapping[str, Tensor],
        round_: int,
    ) -> list[dict[str, Any]]:
        """Return the losses of every client's models on its test rows, line by line.

        `private` is what clients keep and the snapshot does not know yet.
        """
        ...

    def held_back(
        self,
        snapshot: Snapshot,
        private: Mapping[str, ClientState],
        shared: Mapping[str, Tensor],
        round_: int,
    ) -> list[dict[str, Any]]:
        """Return the losses on the rows that clients hold back, when it is time to look."""
        ...
