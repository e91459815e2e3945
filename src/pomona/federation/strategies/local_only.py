"""Every client alone: the opponent that federating has to beat."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Shares, Update
from pomona.shapes import PerClient


@dataclass(frozen=True)
class LocalOnly:
    """Shares nothing; every client keeps an adapter of its own."""

    @property
    def shares(self) -> Shares:
        """Nothing."""
        return "nothing"

    def penalty(
        self, adapter: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
    ) -> PerClient | None:
        """No penalty."""
        return None

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state unchanged; updates are empty."""
        return state
