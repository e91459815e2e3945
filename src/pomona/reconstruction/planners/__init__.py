"""How channels are dealt to experts: one planner per file."""

from pomona.reconstruction.planners.activation_clusters import ActivationClusters
from pomona.reconstruction.planners.protocol import Calibration, Planner
from pomona.reconstruction.planners.random_split import RandomSplit
from pomona.reconstruction.planners.top_channels import TopChannels

PLANNERS: dict[str, type[Planner]] = {
    "top-channels": TopChannels,
    "random-split": RandomSplit,
    "activation-clusters": ActivationClusters,
}

__all__ = [
    "PLANNERS",
    "ActivationClusters",
    "Calibration",
    "Planner",
    "RandomSplit",
    "TopChannels",
]
