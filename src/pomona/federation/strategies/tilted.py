"""Tilted averaging: the higher a client's loss, the more it counts.

Li, Beirami, Sanjabi & Smith, "Tilted Empirical Risk Minimization", ICLR 2021: the minimum of
(1/t) · log Σ_c p_c exp(t · L_c) has the gradient Σ_c w_c ∇L_c with w_c ∝ p_c exp(t · L_c). Between t = 0, the
mean over clients, and t → ∞, the worst client, it trades one for the other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.fedavg import mean_of
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update

_LOSS = "loss/"


@dataclass(frozen=True)
class Tilted:
    """Weighs clients by rows · exp(tilt · loss), so that who is served worst counts most.

    A client tells the mean loss of its steps, a number beside its tensors. Tilt 0 and learning rate 1 are
    FedAvg bit for bit.

    Attributes:
        tilt: Of the loss in the exponent.
        keep: Share of what was heard before that stays in a loss's mean over the rounds.
        learning_rate: So many times the step to the mean is taken.
    """

    tilt: float = 2.0
    keep: float = 0.8
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.tilt < math.inf:
            raise PomonaError(f"Tilted tilt {self.tilt} is not 0 or more; use for example 2")
        if not 0 <= self.keep < 1:
            raise PomonaError(
                f"Tilted keep {self.keep} is not a share below 1; use for example 0.8"
            )
        if not 0 < self.learning_rate < math.inf:
            raise PomonaError(
                f"Tilted learning_rate {self.learning_rate} is not positive; use for example 1.0"
            )

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def told(self, losses: Sequence[float]) -> float:
        """Return the mean loss of a client's steps."""
        return math.fsum(losses) / len(losses)

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """Nothing was heard yet."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Take one step; without updates the state stays as it was."""
        sent = list(updates)
        if not sent:
            return state
        heard = {update.client: self._heard(state, update) for update in sent}
        highest = max(heard.values())
        mean = mean_of(
            (u.rows * math.exp(self.tilt * (heard[u.client] - highest)), u.shared) for u in sent
        )
        shared = dict(state.shared)
        for name, value in mean.items():
            step = (self.learning_rate - 1) * (value.double() - state.shared[name].double())
            shared[name] = (value.double() + step).to(value.dtype)
        told = {_LOSS + n: torch.tensor(v, dtype=torch.float64) for n, v in heard.items()}
        return ServerState(shared, {**state.memory, **told})

    def _heard(self, state: ServerState, update: Update) -> float:
        """Return a client's mean loss over the rounds, this one included."""
        assert update.loss is not None, "clients of this strategy tell their loss"
        before = state.memory.get(_LOSS + update.client)
        if before is None:
            return update.loss
        return self.keep * float(before) + (1 - self.keep) * update.loss
