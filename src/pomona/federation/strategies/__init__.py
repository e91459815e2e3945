"""Federated algorithms, both halves of each in one file."""

from pomona.federation.strategies.fedavg import FedAvg
from pomona.federation.strategies.fedprox import FedProx
from pomona.federation.strategies.local_only import LocalOnly
from pomona.federation.strategies.protocol import ServerState, Strategy

STRATEGIES: dict[str, type[FedAvg] | type[FedProx] | type[LocalOnly]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "local-only": LocalOnly,
}

__all__ = ["STRATEGIES", "FedAvg", "FedProx", "LocalOnly", "ServerState", "Strategy"]
