"""Krum: the update that has its neighbours closest, or the mean of several such.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS
2017, section 4. Distances are taken over all shared tensors together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pomona.errors import PomonaError
from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.strategies.protocol import ServerState
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class Krum:
    """Keeps the updates with the lowest scores and averages them, each counting the same.

    With n updates, `malicious` (f) of which may be wrong, a score is the sum of the squared distances to
    the n − f − 2 nearest others. The proof needs n ≥ 2f + 3; fewer updates in a round are refused.

    Attributes:
        malicious: f: updates that may be wrong.
        chosen: Updates that are kept: 1 is Krum, more is multi-Krum.
    """

    malicious: int = 0
    chosen: int = 1

    def __post_init__(self) -> None:
        if self.malicious < 0:
            raise PomonaError(f"Krum malicious {self.malicious} is negative; use 0 or more")
        if self.chosen < 1:
            raise PomonaError(f"Krum chosen {self.chosen} is not positive; use 1 or more")

    @property
    def shares(self) -> Part:
        """The whole adapter."""
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        """There is nothing to remember."""
        return ServerState(shared)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the chosen update or the mean of the chosen; without updates the state as it was.

        Raises `PomonaError` when there are too few updates for `malicious` or `chosen`.
        """
        # By name, so that equal scores are told apart the same way in whatever order they arrive.
        sent = sorted(updates, key=lambda update: update.client)
        if not sent:
            return state
        self.check(len(sent))
        score_C = _scores(squared_distances(sent), len(sent) - self.malicious - 2)
        best = score_C.argsort(stable=True)[: self.chosen].tolist()
        if self.chosen == 1:
            return ServerState(dict(sent[best[0]].shared))
        return ServerState(weighted_mean(Update(sent[i].client, 1, sent[i].shared) for i in best))

    def check(self, clients: int) -> None:
        """Raise `PomonaError` when a round has too few updates for `malicious` or `chosen`."""
        if clients < 2 * self.malicious + 3:
            raise PomonaError(
                f"Krum got {clients} updates in a round, but malicious = {self.malicious} needs at least "
                f"{2 * self.malicious + 3} (2 · malicious + 3); sample more clients, let fewer drop out or "
                "lower malicious"
            )
        if self.chosen > clients - self.malicious:
            raise PomonaError(
                f"Krum got {clients} updates in a round, so with malicious = {self.malicious} at most "
                f"{clients - self.malicious} can be chosen, not {self.chosen}; lower chosen"
            )


def squared_distances(updates: Sequence[Update]) -> Float[Tensor, "C C"]:
    """Return the squared Euclidean distance of every two updates over all their tensors, float64.

    A distance to an update with a value that is no number is infinite.
    """
    total_CC = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in sorted(updates[0].shared):
        values_C = torch.stack([update.shared[name].flatten() for update in updates]).double()
        for i, value in enumerate(values_C):
            total_CC[i] += (values_C - value).square().sum(1).cpu()
    return total_CC.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _scores(distance_CC: Tensor, nearest: int) -> Tensor:
    """Return each update's sum over its nearest others; its distance to itself is left out."""
    others_CC = distance_CC.clone().fill_diagonal_(-1).sort(dim=1).values[:, 1:]
    return others_CC[:, :nearest].sum(1)
