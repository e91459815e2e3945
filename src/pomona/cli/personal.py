"""Whose personal model a command is about: named by its folders, or by a finished run and a client."""

from pathlib import Path
from typing import TYPE_CHECKING

from pomona.errors import PomonaError

if TYPE_CHECKING:
    from pomona.artifacts.personal import PersonalModel


def personal_of(
    model: str,
    run: Path | None,
    client: str | None,
    adapter: Path | None,
    graft: Path | None,
    personal: Path | None,
    device: str,
) -> "PersonalModel":
    """Return a model with the parts that were given; raises `PomonaError` where they exclude each other.

    A run and a client name all parts that the client has: nobody forgets one of them so.
    """
    from pomona.artifacts.personal import PersonalModel, clients_of_run

    own = PersonalModel(model, adapter, graft, personal, device)
    if (run is None) != (client is None):
        raise PomonaError("--run and --client go together; give both or neither")
    if run is None or client is None:
        return own
    if own.parts:
        raise PomonaError(
            "--run has the parts; leave --adapter, --graft and --personal out, or --run"
        )
    every = clients_of_run(run, own)
    if client not in every:
        raise PomonaError(f'{run} has no client "{client}"; there are {", ".join(every)}')
    return every[client]
