"""Federated algorithms, both halves of each in one file."""

from pomona.federation.strategies.coordinate_wise import Median, TrimmedMean
from pomona.federation.strategies.fedavg import FedAvg
from pomona.federation.strategies.fedprox import FedProx
from pomona.federation.strategies.fedsa_lora import FedSALoRA
from pomona.federation.strategies.ffa_lora import FFALoRA
from pomona.federation.strategies.flexlora import FlexLoRA
from pomona.federation.strategies.flora import FLoRA
from pomona.federation.strategies.krum import Krum
from pomona.federation.strategies.local_only import LocalOnly, SharedFixed
from pomona.federation.strategies.protocol import (
    Corrects,
    Freezes,
    Hears,
    Penalises,
    ServerState,
    Strategy,
    frozen_part,
)
from pomona.federation.strategies.scaffold import Scaffold
from pomona.federation.strategies.server_optimisers import FedAdagrad, FedAdam, FedAvgM, FedYogi
from pomona.federation.strategies.tilted import Tilted

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "scaffold": Scaffold,
    "tilted": Tilted,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "krum": Krum,
    "flexlora": FlexLoRA,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "flora": FLoRA,
    "local-only": LocalOnly,
}

AVERAGING: tuple[type[Strategy], ...] = (
    FedAvg,
    FedProx,
    FedAvgM,
    FedAdagrad,
    FedAdam,
    FedYogi,
    FFALoRA,
    FedSALoRA,
)
"""Strategies that need of all updates no more than their mean."""


def only_averages(strategy: Strategy) -> bool:
    """Whether the mean of a round's updates in the place of all of them changes nothing."""
    return isinstance(strategy, AVERAGING)


__all__ = [
    "AVERAGING",
    "STRATEGIES",
    "Corrects",
    "FFALoRA",
    "FLoRA",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedSALoRA",
    "FedYogi",
    "FlexLoRA",
    "Freezes",
    "Hears",
    "Krum",
    "LocalOnly",
    "Median",
    "Penalises",
    "Scaffold",
    "ServerState",
    "SharedFixed",
    "Strategy",
    "Tilted",
    "TrimmedMean",
    "frozen_part",
    "only_averages",
]
