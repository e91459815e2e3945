"""Which channels go to which expert."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertPlan:
    """The kept channels of every layer and expert, [L, E, W] ascending, and each expert's domains.

    `shared_LS` are channels hoisted into one expert that serves every token, [L, S], S may be 0; no
    expert keeps them too. `gain` multiplies every expert's output: experts that divide the channels
    among themselves add up, and their routing weights sum to one. `active` experts serve a token.
    """

    keep_LEW: Tensor = field(repr=False)
    groups: tuple[tuple[str, ...], ...]
    channels: int
    shared_LS: Tensor = field(repr=False)
    gain: float = 1.0
    active: int = 1

    def gone_F(self, layer: int, expert: int) -> Tensor:
        """Return what neither an expert nor the shared one keeps in a layer, [F] booleans."""
        gone_F = torch.ones(self.channels, dtype=torch.bool)
        gone_F[self.keep_LEW[layer, expert]] = False
        gone_F[self.shared_LS[layer]] = False
        return gone_F

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON one can read: the channels of every layer and expert."""
        layers, experts, width = self.keep_LEW.shape
        return {
            "layers": layers,
            "experts": experts,
            "width": width,
            "dense_width": self.channels,
            "gain": self.gain,
            "active": self.active,
            "domains": [list(group) for group in self.groups],
            "shared_channels": self.shared_LS.tolist(),
            "channels": self.keep_LEW.tolist(),
        }

    @classmethod
    def from_json(cls, plan: Mapping[str, Any]) -> Self:
        """Return the plan that `to_json` described."""
        return cls(
            torch.tensor(plan["channels"]),
            tuple(tuple(group) for group in plan["domains"]),
            int(plan["dense_width"]),
            torch.tensor(plan["shared_channels"], dtype=torch.int64),
            float(plan["gain"]),
            int(plan["active"]),
        )


def no_channels(layers: int) -> Tensor:
    """Return the shared channels of a plan without a shared expert, [L, 0]."""
    return torch.zeros(layers, 0, dtype=torch.int64)
