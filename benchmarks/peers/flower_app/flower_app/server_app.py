"""The server: FedAvg over all clients, with the seconds of every round."""

import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that keeps when rounds began and ended, and what the first of them gave."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.seconds: list[float] = []
        self.failed = 0
        self.first: dict[str, Any] = {}
        self._began = 0.0

    def configure_train(self, *given: Any, **named: Any):
        self._began = time.perf_counter()
        return super().configure_train(*given, **named)

    def aggregate_train(self, server_round: int, replies: Any):
        replies = list(replies)
        self.failed += sum(reply.has_error() for reply in replies)
        found = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self._began)
        if found[0] is not None and not self.first:
            told = [reply.content["metrics"] for reply in replies if not reply.has_error()]
            losses = [list(one["losses"]) for one in sorted(told, key=lambda one: one["client"])]
            self.first = {"mean": found[0].to_torch_state_dict(), "losses": losses}
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder, clients = Path(str(context.run_config["folder"])), int(context.run_config["clients"])
    everyone = {"min_train_nodes": clients, "min_available_nodes": clients}
    strategy = TimedFedAvg(fraction_train=1.0, fraction_evaluate=0.0, **everyone)
    shared = ArrayRecord(torch.load(folder / "shared.pt"))
    strategy.start(grid, shared, num_rounds=int(context.run_config["rounds"]))
    found = {"seconds": strategy.seconds, "failed": strategy.failed, **strategy.first}
    torch.save(found, folder / "found.pt")
