"""What a run is computed from, as digests: a run goes on only from what it began with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pomona.data.rows import rows_digest
from pomona.federation.clients import ClientRows
from pomona.files import digest_of
from pomona.models.fingerprint import checkpoint_digests
from pomona.models.loading import checkpoint_folder
from pomona.progress import Progress, silent


@dataclass(frozen=True)
class Inputs:
    """SHA-256 per file of the checkpoint, per client of its train and test rows, per file of a warm start."""

    model: dict[str, str]
    clients: dict[str, dict[str, str]]
    warm_start: dict[str, str] = field(default_factory=dict[str, str])


def inputs_of(
    model: str | Path,
    rows: Mapping[str, ClientRows],
    progress: Progress = silent,
    warm_start: Path | None = None,
) -> Inputs:
    """Return the digests of a checkpoint, of every client's rows and of the folder of a warm start.

    Raises `PomonaError` naming a file of the checkpoint that is missing or damaged.
    """
    clients = {
        name: {"train": rows_digest(own.train), "test": rows_digest(own.test)}
        for name, own in rows.items()
    }
    began = {} if warm_start is None else _digests(warm_start)
    return Inputs(checkpoint_digests(checkpoint_folder(model), progress), clients, began)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest_of(path) for path in files}


def difference(began: Inputs, now: Inputs) -> str | None:
    """Say in half a sentence what differs first, or return None."""
    file = _first(began.model, now.model)
    if file is not None:
        return f"the model's file {file} {_how(file, began.model, now.model)}"
    file = _first(began.warm_start, now.warm_start)
    if file is not None:
        return f"the warm start's file {file} {_how(file, began.warm_start, now.warm_start)}"
    client = _first(began.clients, now.clients)
    if client is None:
        return None
    if client not in began.clients or client not in now.clients:
        return f'client "{client}" {_how(client, began.clients, now.clients)}'
    split = _first(began.clients[client], now.clients[client])
    return f'the {split} rows of client "{client}" have changed'


def _first(a: Mapping[str, object], b: Mapping[str, object]) -> str | None:
    return next((key for key in sorted({*a, *b}) if a.get(key) != b.get(key)), None)


def _how(key: str, began: Mapping[str, object], now: Mapping[str, object]) -> str:
    if key not in now:
        return "is gone"
    return "has changed" if key in began else "is new"
