"""What a site has sent of its last round: asked again, it sends the same bytes and trains nothing."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pomona.errors import PomonaError
from pomona.files import atomic_file, cannot_read, damaged, read_as, write_json
from pomona.parcel import Parcel


@dataclass(frozen=True)
class _Kept:
    """sent.ROUND.json, which is written after the tensors beside it."""

    asked: str
    sha256: str
    kind: str
    told: dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """The answers of the last rounds in a site's run folder; one is final when its round is committed.

    As round 0 it keeps what the site was told first.
    """

    folder: Path

    def keep(self, round_: int, asked: Parcel, answer: Parcel) -> None:
        """Write an answer, before the round that it belongs to is committed."""
        with atomic_file(self._tensors(round_)) as partial:
            partial.write_bytes(answer.tensors)
        digest = hashlib.sha256(answer.tensors).hexdigest()
        kept = _Kept(_digest(asked), digest, answer.kind, dict(answer.told))
        write_json(self._told(round_), asdict(kept))

    def asked(self, round_: int) -> Parcel | None:
        """Return what was kept as both question and answer, None where nothing was."""
        if not self._told(round_).is_file():
            return None
        kept = read_as(self._told(round_), _Kept)
        return Parcel(kept.kind, kept.told, self._read(round_, kept))

    def of(self, round_: int, asked: Parcel) -> Parcel:
        """Return the answer to a round; raises `PomonaError` when something else was asked then."""
        kept = read_as(self._told(round_), _Kept)
        if kept.asked != _digest(asked):
            raise PomonaError(
                f"round {round_} is finished here, and was trained from other shared tensors than the "
                "coordinator sends now; restore the coordinator's run folder, or start anew with new --state"
            )
        return Parcel(kept.kind, kept.told, self._read(round_, kept))

    def _read(self, round_: int, kept: _Kept) -> bytes:
        path = self._tensors(round_)
        try:
            tensors = path.read_bytes()
        except OSError as error:
            raise cannot_read(path, error) from error
        if hashlib.sha256(tensors).hexdigest() != kept.sha256:
            raise damaged(path, "its content is not what was sent")
        return tensors

    def forget_before(self, round_: int) -> None:
        """Remove the answers of earlier rounds."""
        for path in self.folder.glob("sent.*"):
            number = path.name.split(".")[1]
            if number.isdigit() and 0 < int(number) < round_:
                path.unlink(missing_ok=True)

    def _tensors(self, round_: int) -> Path:
        return self.folder / f"sent.{round_}.safetensors"

    def _told(self, round_: int) -> Path:
        return self.folder / f"sent.{round_}.json"


def _digest(asked: Parcel) -> str:
    """Tell what was asked by what decides the answer: the tensors."""
    return hashlib.sha256(asked.tensors).hexdigest()
