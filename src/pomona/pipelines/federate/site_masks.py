"""What a site does so that the coordinator sees nothing of it but its part of a sum."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pomona.errors import PomonaError
from pomona.federation.masks import Keys, Masks, session_of
from pomona.federation.secure_sum import FEWEST
from pomona.files import atomic_file, cannot_read, read_as, write_json
from pomona.models.received import decoded, encoded
from pomona.parcel import Parcel
from pomona.pipelines.federate.heard import peers_of, shares_of, whole_of


@dataclass(frozen=True)
class _Opened:
    """opened.json: for whom this site has opened masks, once and for all of a round."""

    round: int
    answered: list[str]


@dataclass(frozen=True)
class SiteMasks:
    """The masks of the site `name`, drawn of a secret in its state folder."""

    name: str
    federation: str
    folder: Path

    def keys(self, asked: Parcel) -> Parcel:
        """Tell what the others need for masks that go with this site's."""
        return Parcel("mask keys", {"keys": told_keys(self._masks(asked).keys)})

    def shares(self, asked: Parcel) -> Parcel:
        """Tell every other site its share of what this site's masks are drawn of, sealed for it."""
        peers = self._peers(asked)
        sealed = self._masks(asked).shares(peers, whole_of("threshold", asked.told))
        return Parcel("mask shares", {"shares": {name: s.hex() for name, s in sealed.items()}})

    def hide(self, answer: Parcel, asked: Parcel) -> Parcel:
        """Return an update under masks."""
        values = self._masks(asked).masked(decoded(answer.tensors), self._peers(asked))
        return Parcel(answer.kind, answer.told, encoded(values))

    def open(self, asked: Parcel, finished: int) -> Parcel:
        """Open shares of the masks that stand between the coordinator and the sum of a round.

        Only of the round that was `finished` last, for one set of sites.
        """
        peers, round_ = self._peers(asked), whole_of("round", asked.told)
        answered = sorted(str(name) for name in asked.told.get("answered") or ())
        if round_ != finished or not len(answered) >= FEWEST or not set(answered) <= set(peers):
            raise PomonaError(
                f"the coordinator asks to open the masks of {len(answered)} sites in round {round_}; they are "
                f"opened for {FEWEST} or more, in the round that was finished last"
            )
        sealed = shares_of(asked.told.get("shares"), peers)
        opened = self._masks(asked).opened(sealed, peers, answered)
        self._note(round_, answered)
        return Parcel("masks opened", {"shares": {name: s.hex() for name, s in opened.items()}})

    def _note(self, round_: int, answered: list[str]) -> None:
        """Raise `PomonaError` if other sums of the same round were opened: their difference tells more."""
        path = self.folder / "opened.json"
        if path.is_file():
            before = read_as(path, _Opened)
            if before.round == round_ and before.answered != answered:
                raise PomonaError(
                    f"round {round_} was opened as the sum of other sites: {', '.join(before.answered)}; two "
                    "sums would tell the coordinator what one site has sent"
                )
        write_json(path, asdict(_Opened(round_, answered)))

    def _peers(self, asked: Parcel) -> dict[str, Keys]:
        peers = peers_of(asked.told)
        if len(peers) < FEWEST:
            raise PomonaError(
                f"the coordinator asks for a sum of {len(peers)} sites, and of fewer than {FEWEST} it would "
                "tell what one of them has sent"
            )
        return peers

    def _masks(self, asked: Parcel) -> Masks:
        told = asked.told
        session = session_of(self.federation, whole_of("round", told), str(told.get("session")))
        return Masks(self.name, session, self._secret())

    def _secret(self) -> bytes:
        """Return the site's secret, drawn when it is first asked for."""
        path = self.folder / "masks.key"
        if not path.exists():
            with atomic_file(path) as partial:
                os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
                partial.chmod(0o600)
                partial.write_bytes(secrets.token_bytes(32))
        try:
            return path.read_bytes()
        except OSError as error:
            raise cannot_read(path, error) from error


def told_keys(keys: Keys) -> Mapping[str, str]:
    """Return keys as JSON."""
    return {kind: value.hex() for kind, value in asdict(keys).items()}
