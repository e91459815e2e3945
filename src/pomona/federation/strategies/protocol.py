"""What a strategy is, and what a server remembers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from pomona.federation.update import Part, Update
from pomona.shapes import PerClient


@dataclass(frozen=True)
class ServerState:
    """The shared tensors (no client dimension) and whatever a strategy remembers between rounds."""

    shared: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@runtime_checkable
class Strategy(Protocol):
    """A federated algorithm: what is sent, and how the server aggregates it.

    The client's half, where there is one, is a protocol of its own: `Penalises`, `Freezes`, `Corrects` or
    `Hears`.
    """

    @property
    def shares(self) -> Part:
        """Which part of a client's adapter is sent; the rest of it is the client's own."""
        ...

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Return the server's state before the first round."""
        ...

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state after a round; updates stream through, one at a time."""
        ...


@runtime_checkable
class Penalises(Protocol):
    """A strategy whose clients add something to their loss."""

    def penalty(self, adapter: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> PerClient:
        """Return what each client adds to its loss [C].

        `adapter` holds the clients' shared tensors [C, …], `anchor` what the server sent them.
        """
        ...


@runtime_checkable
class Hears(Protocol):
    """A strategy whose clients tell the server what their rows cost them: `Update.loss`."""

    def told(self, losses: Sequence[float]) -> float:
        """Return what a client tells of its losses at the steps of a round."""
        ...


@runtime_checkable
class Freezes(Protocol):
    """A strategy whose clients leave a part of the adapter as it was born, the same for everybody."""

    @property
    def freezes(self) -> Part:
        """Which part of the adapter is not trained, and therefore not sent either."""
        ...


@runtime_checkable
class Corrects(Protocol):
    """A strategy whose clients add a correction to their gradients and remember something for it."""

    def birth(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a client's memory before its first round."""
        ...

    def correction(
        self, server: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what is added to the gradient of each shared tensor.

        `server` is the memory of the server, which is sent along, `own` that of the client.
        """
        ...

    def report(
        self, own: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the client's new memory and what it sends beside the shared tensors.

        `gradient` is the mean over the round's steps, without the correction.
        """
        ...


def frozen_part(strategy: Strategy) -> Part:
    """Return the part of the adapter that a strategy's clients do not train."""
    return strategy.freezes if isinstance(strategy, Freezes) else "nothing"
