"""The folders that a user keeps of a run: what was shared, and what each client has of its own."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pomona.artifacts.graft_format import write_graft
from pomona.artifacts.origin import ORIGIN, Origin, origin_of_graft
from pomona.artifacts.shared_format import write_shared
from pomona.federation.cohort import FrozenBase
from pomona.federation.update import ClientState
from pomona.models.peft_format import write_adapter


def publish_shared(
    run: Path, base: FrozenBase, adapter: Mapping[str, Tensor], origin: Origin
) -> None:
    """Write the shared part as a PEFT adapter folder."""
    folder = _cleared(run / "shared")
    write_shared(folder, base, adapter, origin)


def publish_client(
    run: Path, client: str, base: FrozenBase, own: ClientState, origin: Origin
) -> None:
    """Write what one client has of its own, a folder for each part: adapter, personal, graft."""
    folder = run / "clients" / client
    if own.adapter:
        write_shared(_cleared(folder / "adapter"), base, own.adapter, origin)
    if base.personal is not None:
        beside = {ORIGIN: origin.to_json()}
        personal = _cleared(folder / "personal")
        write_adapter(personal, base.personal, own.personal, origin.model, beside)
    if base.graft is not None:
        grown = origin_of_graft(origin, base, own.graft)
        write_graft(_cleared(folder / "graft"), base.graft, own.graft, grown)


def _cleared(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
