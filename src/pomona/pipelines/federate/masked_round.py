"""The coordinator's half of a sum under masks: it carries keys and shares, and takes away what is left over."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pomona.errors import PomonaError
from pomona.federation.masks import Keys, Unmasking, session_of
from pomona.federation.secure_sum import FEWEST
from pomona.files import read_as, write_json
from pomona.parcel import Parcel
from pomona.pipelines.federate.heard import keys_of, of_kind, shares_of
from pomona.pipelines.federate.site_masks import told_keys


class Gather(Protocol):
    """Asks sites until at least so many have answered."""

    def __call__(
        self,
        parcels: Mapping[str, Parcel],
        keep: Callable[[str, Parcel], None],
        what: str,
        least: int = 1,
    ) -> None:
        """Give what every site answers to `keep`, which raises `PomonaError` for what does not count."""
        ...


@dataclass(frozen=True)
class _Opening:
    """opening.json: a sum from before anybody is asked to open it, so that it can be asked for again."""

    round: int
    session: str
    threshold: int
    answered: list[str]
    keys: dict[str, dict[str, str]]
    sealed: dict[str, dict[str, str]]


class MaskedRound:
    """One attempt at one round: who is in it, and how what they send comes to be a sum.

    A sum that was begun to be opened is opened or nothing is: a coordinator that was started again asks for
    the same one (`answered`), since two sums of a round would tell their difference.
    """

    def __init__(
        self, gather: Gather, federation: str, round_: int, names: Sequence[str], folder: Path
    ):
        self._gather, self._federation, self._round = gather, federation, round_
        self._path, self.names = folder / "opening.json", list(names)
        self._session = secrets.token_hex(16)
        self._keys: dict[str, Keys] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}
        self.threshold = max(FEWEST, len(self.names) // 2 + 1)
        self.answered: list[str] | None = None
        before = read_as(self._path, _Opening) if self._path.is_file() else None
        if before is not None and before.round == round_:
            self._session, self.threshold = before.session, before.threshold
            self.answered = before.answered
            self._keys = {name: keys_of(own) for name, own in before.keys.items()}
            self._sealed = {n: shares_of(own, self._keys) for n, own in before.sealed.items()}

    def agree(self) -> None:
        """Have sites exchange the keys and the sealed shares of their masks; who does not is left out."""
        if len(self.names) < self.threshold:
            raise PomonaError(
                f"round {self._round}: secure aggregation needs {self.threshold} sites, and {len(self.names)} "
                "are asked; start more, or leave secure_aggregation out"
            )

        def keep_keys(name: str, answer: Parcel) -> None:
            of_kind(answer, "mask keys")
            keys[name] = keys_of(answer.told.get("keys"))

        def keep_shares(name: str, answer: Parcel) -> None:
            of_kind(answer, "mask shares")
            self._sealed[name] = shares_of(answer.told.get("shares"), keys)

        keys: dict[str, Keys] = {}
        ask = {name: Parcel("mask keys", self._about()) for name in self.names}
        self._gather(ask, keep_keys, f"masks of round {self._round}", self.threshold)
        self._keys = keys
        ask = {name: Parcel("mask shares", self.told()) for name in self._in_order(keys)}
        self._gather(ask, keep_shares, f"masks of round {self._round}", self.threshold)
        self._keys = {name: keys[name] for name in self._in_order(self._sealed)}

    @property
    def peers(self) -> list[str]:
        """Who is in it, in order."""
        return list(self._keys)

    def told(self) -> dict[str, Any]:
        """Return what goes along with a question about this sum."""
        keys = {name: told_keys(own) for name, own in self._keys.items()}
        return {**self._about(), "keys": keys, "threshold": self.threshold}

    def _about(self) -> dict[str, Any]:
        return {"federation": self._federation, "round": self._round, "session": self._session}

    def opened(self, answered: Sequence[str]) -> Unmasking:
        """Have the masks of those who have answered opened."""
        self._note(answered)
        opened: dict[str, Mapping[str, bytes]] = {}

        def keep(name: str, answer: Parcel) -> None:
            of_kind(answer, "masks opened")
            opened[name] = shares_of(answer.told.get("shares"), self._keys)

        ask = {name: Parcel("open masks", self._opens(name, answered)) for name in answered}
        self._gather(ask, keep, f"opening the sum of round {self._round}", self.threshold)
        session = session_of(self._federation, self._round, self._session)
        return Unmasking.of(session, self._keys, answered, opened, self.threshold)

    def _opens(self, name: str, answered: Sequence[str]) -> dict[str, Any]:
        shares = {sender: sealed[name].hex() for sender, sealed in self._sealed.items()}
        return {**self.told(), "answered": list(answered), "shares": shares}

    def _in_order(self, names: Mapping[str, object]) -> list[str]:
        return [name for name in self.names if name in names]

    def _note(self, answered: Sequence[str]) -> None:
        keys = {name: dict(told_keys(own)) for name, own in self._keys.items()}
        sealed = {
            sender: {name: share.hex() for name, share in own.items()}
            for sender, own in self._sealed.items()
        }
        about = (self._round, self._session, self.threshold, list(answered), keys, sealed)
        write_json(self._path, asdict(_Opening(*about)))
