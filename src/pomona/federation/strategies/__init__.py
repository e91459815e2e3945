"""Federated algorithms, both halves of each in one file."""

from pomona.federation.strategies.coordinate_wise import Median, TrimmedMean
from pomona.federation.strategies.fedavg import FedAvg
from pomona.federation.strategies.fedprox import FedProx
from pomona.federation.strategies.flexlora import FlexLoRA
from pomona.federation.strategies.krum import Krum
from pomona.federation.strategies.local_only import LocalOnly
from pomona.federation.strategies.protocol import ServerState, Strategy
from pomona.federation.strategies.server_optimisers import FedAdagrad, FedAdam, FedAvgM, FedYogi

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "krum": Krum,
    "flexlora": FlexLoRA,
    "local-only": LocalOnly,
}

__all__ = [
    "STRATEGIES",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "FlexLoRA",
    "Krum",
    "LocalOnly",
    "Median",
    "ServerState",
    "Strategy",
    "TrimmedMean",
]
