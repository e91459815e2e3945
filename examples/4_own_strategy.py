"""A strategy of one's own: `python examples/4_own_strategy.py MIXTURE CLIENTS OUT`.

What the server does is one class; a recipe names it as `strategy = "my_package.my_module:Momentum"`. Here the
server goes half as far as the clients' mean says, and as much again along its last step.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import pomona
from pomona.federation.clients import ClientData
from pomona.federation.evaluation import Evaluation
from pomona.federation.local import LocalTraining
from pomona.federation.settings import FederateSettings
from pomona.federation.strategies import ServerState
from pomona.federation.strategies.fedavg import weighted_mean
from pomona.federation.update import Part, Update


@dataclass(frozen=True)
class Momentum:
    step: float = 0.5
    keep: float = 0.5

    @property
    def shares(self) -> Part:
        return "adapter"

    def init(self, shared: Mapping[str, Tensor]) -> ServerState:
        return ServerState(shared, {name: value * 0 for name, value in shared.items()})

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        last, shared = dict(state.memory), dict(state.shared)
        for name, mean in weighted_mean(updates).items():
            last[name] = self.keep * last[name] + self.step * (mean - shared[name])
            shared[name] = shared[name] + last[name]
        return ServerState(shared, last)


if __name__ == "__main__":
    mixture, clients, out = sys.argv[1:]
    settings = FederateSettings(
        model=mixture,
        data=ClientData(folder=Path(clients)),
        rounds=2,
        max_length=96,
        strategy=Momentum(),
        local=LocalTraining(steps=4, batch=4, learning_rate=1e-2),
        evaluation=Evaluation(every=2, rows=8, answers=0, new_tokens=8),
    )
    run = pomona.federate(settings, out)
    print({model: run.results[model]["mean"]["loss"] for model in ("base", "shared")})
