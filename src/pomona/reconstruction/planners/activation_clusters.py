"""Channels that fire together form an expert, those that always fire are shared: the CMoE baseline.

Pei et al., "CMoE: Converting Mixture-of-Experts from Dense to Accelerate LLM Inference", 2025. A
channel's marker says on which tokens it is among the most active; the most frequent are shared, the
others are clustered into experts of equal size by balanced k-means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.errors import PomonaError
from pomona.reconstruction.balance import balanced_clusters
from pomona.reconstruction.ffn import observe
from pomona.reconstruction.plan import ExpertPlan
from pomona.reconstruction.planners.protocol import Calibration
from pomona.reconstruction.planners.random_split import check_divides
from pomona.reconstruction.scores import Score


@dataclass(frozen=True)
class ActivationClusters:
    """Shares the channels that are active for most tokens and clusters the others by their markers.

    A marker is one where a channel's |activation| is among the largest of its layer.

    Attributes:
        shared: Share of the channels that serve every token.
        tokens: Tokens that calibrate.
        active_share: Share of a layer's channels that a token marks.
        iterations: Of the clustering.
    """

    shared: float = 0.25
    tokens: int = 2048
    active_share: float = 0.1
    iterations: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.shared < 1:
            raise PomonaError(f"shared {self.shared} is not a share; use 0 or for example 0.25")
        if not 0 < self.active_share <= 1:
            raise PomonaError(
                f"active_share {self.active_share} is not a share above 0; use for example 0.1"
            )
        for name in ("tokens", "iterations"):
            if getattr(self, name) < 1:
                raise PomonaError(f"{name} {getattr(self, name)} is not positive; use 1 or more")

    @property
    def divides(self) -> bool:
        """Every channel has exactly one expert or is shared."""
        return True

    def shared_channels(self, channels: int, experts: int, width: int) -> int:
        """Return the share; raises `PomonaError` where the experts do not divide the others."""
        size = round(self.shared * channels)
        check_divides(channels - size, experts, width)
        return size

    def __call__(
        self,
        calibration: Calibration,
        groups: Sequence[Sequence[str]],
        score: Score,
        width: int,
        active: int,
        seed: int,
    ) -> ExpertPlan:
        """Return the clusters; the score is not used."""
        channels = calibration.dense.channels
        size = self.shared_channels(channels, len(groups), width)
        kept: list[Tensor] = []
        shared: list[Tensor] = []
        for marker_NF in self.markers(calibration):
            often_F = marker_NF.sum(0)
            order_F = often_F.argsort(descending=True, stable=True)
            shared.append(order_F[:size].sort().values)
            own = order_F[size : size + len(groups) * width].sort().values
            label = balanced_clusters(
                marker_NF[:, own].T.double().numpy(), len(groups), width, self.iterations
            )
            kept.append(
                torch.stack([own[torch.from_numpy(label == e)] for e in range(len(groups))])
            )
        return ExpertPlan(
            torch.stack(kept),
            tuple(map(tuple, groups)),
            channels,
            torch.stack(shared),
            gain=float(active),
            active=active,
        )

    def markers(self, calibration: Calibration) -> list[Tensor]:
        """Return every layer's markers [N, F], booleans, over an equal share of every domain."""
        dense = calibration.dense
        found: list[list[Tensor]] = [[] for _ in dense.ffns]
        most = max(1, round(self.active_share * dense.channels))

        def see(layer: int, _x_ND: Tensor, activation_NF: Tensor, _y_ND: Tensor) -> None:
            best_NK = activation_NF.abs().topk(most, dim=1).indices
            mark_NF = torch.zeros_like(activation_NF, dtype=torch.bool)
            found[layer].append(mark_NF.scatter_(1, best_NK, value=True).cpu())

        each = self.tokens // len(calibration.windows)
        for windows_BT in calibration.windows.values():
            observe(dense, windows_BT[: max(1, each // windows_BT.shape[1])], see)
        return [torch.cat(layer) for layer in found]
