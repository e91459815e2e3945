"""Federated algorithms, both halves of each in one file."""

from pomona.federation.strategies.fedavg import FedAvg
from pomona.federation.strategies.fedprox import FedProx
from pomona.federation.strategies.fedsa_lora import FedSALoRA
from pomona.federation.strategies.ffa_lora import FFALoRA
from pomona.federation.strategies.flora import FLoRA
from pomona.federation.strategies.local_only import LocalOnly, SharedFixed
from pomona.federation.strategies.protocol import (
    Corrects,
    Freezes,
    ServerState,
    Strategy,
    frozen_part,
)
from pomona.federation.strategies.scaffold import Scaffold

STRATEGIES: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "ffa-lora": FFALoRA,
    "fedsa-lora": FedSALoRA,
    "flora": FLoRA,
    "local-only": LocalOnly,
}

__all__ = [
    "STRATEGIES",
    "Corrects",
    "FFALoRA",
    "FLoRA",
    "FedAvg",
    "FedProx",
    "FedSALoRA",
    "Freezes",
    "LocalOnly",
    "Scaffold",
    "ServerState",
    "SharedFixed",
    "Strategy",
    "frozen_part",
]
