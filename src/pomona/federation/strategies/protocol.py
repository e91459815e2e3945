"""What a strategy is, and what a server remembers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from pomona.federation.update import Shares, Update
from pomona.shapes import PerClient


@dataclass(frozen=True)
class ServerState:
    """The shared tensors (no client dimension) and whatever a strategy remembers between rounds."""

    shared: Mapping[str, Tensor]
    memory: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@runtime_checkable
class Strategy(Protocol):
    """Both halves of a federated algorithm: the client's penalty and the server's aggregation."""

    @property
    def shares(self) -> Shares:
        """Which part of a client's adapter is sent; a graft never is."""
        ...

    def penalty(
        self, adapter: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
    ) -> PerClient | None:
        """Return what each client adds to its loss [C], or None.

        `adapter` holds the clients' shared tensors [C, …], `anchor` what the server sent them.
        """
        ...

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Return the server's state before the first round."""
        ...

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state after a round; updates stream through, one at a time."""
        ...
