"""The coordinator as a ServerApp of Flower's: for `flwr run`, where Flower starts and ends everything.

Its run configuration says `recipe`, `out`, `states` and `deadline`; the clients are those of the recipe's
`[data]`, one for each of the simulation's nodes, in the order of their names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from pomona.artifacts.run import RunDirectory
from pomona.federation.settings import FederateSettings
from pomona.flower.records import KIND, as_records, from_records
from pomona.flower.sites import FlowerSites, refused_or
from pomona.parcel import Parcel, Refused
from pomona.pipelines.federate.asking import Patience
from pomona.pipelines.federate.coordinate import coordinate
from pomona.recipe import dump, read_recipe
from pomona.recipe.remote import for_sites

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Coordinate the recipe's federation among the nodes of a run."""
    config = context.run_config
    settings = read_recipe(Path(str(config["recipe"])), FederateSettings)
    names = list(settings.load())
    own = replace(settings, data=None)
    about: dict[str, Any] = {
        "command": ["flwr", "run"],
        "method": own.name,
        "seed": own.seed,
        "federation": f"flwr {context.run_id}",
    }
    patience = Patience(deadline=float(cast(float, config["deadline"])))
    with RunDirectory.open(Path(str(config["out"])), dump(own), about) as run:
        sites = FlowerSites(GridPost(grid))
        coordinate(own, run, for_sites(own), names, sites, patience, tell=_tell)


@dataclass
class GridPost:
    """The post of any Grid of Flower's; that a node has been restarted it does not tell."""

    grid: Grid

    def online(self) -> Mapping[int, int]:
        """Return the nodes that are there."""
        return dict.fromkeys(self.grid.get_node_ids(), 1)

    def push(self, node: int, parcel: Parcel, seconds: float) -> str:
        """Send a parcel and return the message's id."""
        (id_,) = self.grid.push_messages([Message(as_records(parcel), node, KIND, ttl=seconds)])
        return id_

    def pull(self, ids: set[str]) -> list[tuple[str, Parcel | Refused | None]]:
        """Return what has been answered; an error of Flower's is a message that is lost."""
        return [
            (
                reply.metadata.reply_to_message_id,
                None if reply.has_error() else refused_or(from_records(reply.content)),
            )
            for reply in self.grid.pull_messages(ids)
        ]

    def forget(self, ids: set[str]) -> None:
        """Flower forgets messages that are too old by itself."""


def _tell(sentence: str) -> None:
    print(sentence, flush=True)  # noqa: T201 - Flower's log of the run
