"""Who holds what, and which test rows somebody trains on."""

from collections.abc import Sequence

from pydantic import TypeAdapter

from pomona.artifacts.finished import FinishedRun
from pomona.artifacts.holdings import holdings_map
from pomona.artifacts.page import figure, heading, matrix, note, table
from pomona.data.duplicates import told
from pomona.federation.holdings import Holdings

_HEADER = ["client", "train rows", "test rows", "trained on by anyone", "by itself", "prompt only"]


def holdings(runs: Sequence[FinishedRun]) -> str:
    """Return a map and a table per set of rows, once for all runs that have the same."""
    groups: list[tuple[Holdings, list[FinishedRun]]] = []
    for run in runs:
        held = TypeAdapter(Holdings).validate_python(run.results["data"])
        known = next((group for other, group in groups if other == held), None)
        if known is None:
            groups.append((held, [run]))
        else:
            known.append(run)
    parts = [_held(held, "" if len(groups) == 1 else _named(own)) for held, own in groups]
    return heading("who holds what") + "".join(parts)


def _held(held: Holdings, whose: str) -> str:
    found = held.duplicates
    body = [
        [name, *map(str, (sum(held.train[name]), own.test, own.same, own.own, own.prompt))]
        for name, own in found.clients.items()
    ]
    caption = f"Train rows per client and category{whose}. From results.json."
    sentence = told(found)
    return (
        figure(holdings_map(held), caption, matrix("client", held.train, held.categories))
        + table(_HEADER, body)
        + note(f"{sentence[:1].upper()}{sentence[1:]}.")
    )


def _named(runs: Sequence[FinishedRun]) -> str:
    return " (" + ", ".join(f"{run.method}, seed {run.seed}" for run in runs) + ")"
