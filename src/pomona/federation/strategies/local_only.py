"""Nothing is sent: every client alone, the opponent that federating has to beat, and after the last round."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class LocalOnly:
    """Part nothing; every client keeps an adapter of its own."""

    @property
    def shares(self) -> Part:
        """Nothing."""
        return "nothing"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state unchanged; updates are empty."""
        return state


@dataclass(frozen=True)
class SharedFixed:
    """Trains what stays at a client on what is shared as it is: for after the last round.

    `part` is what the strategy of the rounds has shared. It is no strategy of a recipe.
    """

    part: Part

    @property
    def shares(self) -> Part:
        """What was shared; nothing of it is trained, so nothing is sent."""
        return self.part

    @property
    def freezes(self) -> Part:
        """What was shared."""
        return self.part

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state unchanged."""
        return state
