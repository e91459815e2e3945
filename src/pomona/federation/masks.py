"""Pairwise masks that hide what clients send and add up to nothing, though some of them be lost.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4,
without its signatures: the server is honest but curious (docs/security.md). Two clients that have agreed on a
key (X25519) draw the same mask of it (AES in counter mode), which one adds and the other takes away. Every
client adds one more mask of its own. The seeds of both lie with all others in shares (Shamir), sealed (AES-GCM)
from the server that carries them: of who has answered the own mask is opened, of who was lost its pairwise
ones, never both.

A session is one attempt at one round. What a client draws of its secret for a session is always the same, so
that it can be restarted in the midst of one.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from pomona.errors import PomonaError

SEED = 16
"""Bytes of a seed: one block of Shamir's scheme over GF(2¹²⁸)."""
_NONCE = 12
_INDEX = 2
_Integers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Keys:
    """What a client tells the others of itself: two public keys, and a digest of its own mask's seed."""

    seals: bytes
    masks: bytes
    own: bytes

    def __post_init__(self) -> None:
        if any(len(part) != 32 for part in (self.seals, self.masks, self.own)):
            raise PomonaError("the keys of its masks are not of 32 bytes each")


def session_of(federation: str, round_: int, attempt: str) -> str:
    """Return the name of a session, which no other has."""
    return json.dumps([federation, round_, attempt])


@dataclass(frozen=True)
class Masks:
    """A client in a session: `session` names it, `secret` is the client's alone and outlives it."""

    client: str
    session: str
    secret: bytes = field(repr=False)

    @property
    def keys(self) -> Keys:
        """What the others are told."""
        seals, masks = self._seals.public_key(), _pairwise(self._seed("pairwise")).public_key()
        digest = _digest(self._seed("own"))
        return Keys(seals.public_bytes_raw(), masks.public_bytes_raw(), digest)

    def shares(self, peers: Mapping[str, Keys], threshold: int) -> dict[str, bytes]:
        """Return the two seeds in shares, one of each sealed for every client of the session, itself included.

        So many as `threshold` of them tell a seed, fewer tell nothing.
        """
        self._check(peers)
        check_threshold(threshold, len(peers))
        own, pairwise = (
            Shamir.split(threshold, len(peers), self._seed(kind), False)
            for kind in ("own", "pairwise")
        )
        return {
            name: self._sealed(name, peers[name], _share(*one) + _share(*other))
            for name, one, other in zip(sorted(peers), own, pairwise, strict=True)
        }

    def masked(self, values: _Integers, peers: Mapping[str, Keys]) -> dict[str, Tensor]:
        """Return int64 tensors under this client's own mask and those it has with each of the others."""
        self._check(peers)
        hidden = _added(values, self._seed("own"), 1)
        for name in sorted(peers):
            if name != self.client:
                key = _agreed(self._seed("pairwise"), peers[name].masks, self.session)
                hidden = _added(hidden, key, _sign(self.client, name))
        return hidden

    def opened(
        self, sealed: Mapping[str, bytes], peers: Mapping[str, Keys], answered: Collection[str]
    ) -> dict[str, bytes]:
        """Return a share of every client: of its own mask if it has `answered`, else of its pairwise ones.

        `sealed` are the shares that the clients have sealed for this one. Raises `PomonaError` when it would
        have to open its own pairwise masks, or for what was not sealed by that client.
        """
        self._check(peers)
        if self.client not in answered:
            raise PomonaError(
                "the coordinator asks for the pairwise masks of this site as if it were lost"
            )
        return {name: self._opened(name, peers[name], sealed[name], answered) for name in peers}

    def _opened(self, name: str, keys: Keys, sealed: bytes, answered: Collection[str]) -> bytes:
        told = f"{self.session}|{name}|{self.client}".encode()
        key = _key(_exchanged(self._seals, keys.seals), f"seal {self.session}")
        try:
            both = AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], told)
        except (InvalidTag, ValueError) as error:
            raise PomonaError(
                f'the shares of "{name}" were not sealed by it for this site'
            ) from error
        half = len(both) // 2
        return both[:half] if name in answered else both[half:]

    def _sealed(self, name: str, keys: Keys, shares: bytes) -> bytes:
        told = f"{self.session}|{self.client}|{name}".encode()
        key = _key(_exchanged(self._seals, keys.seals), f"seal {self.session}")
        nonce = os.urandom(_NONCE)
        return nonce + AESGCM(key).encrypt(nonce, shares, told)

    @property
    def _seals(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(_key(self.secret, f"seals {self.session}"))

    def _seed(self, kind: str) -> bytes:
        return _key(self.secret, f"{kind} {self.session}", SEED)

    def _check(self, peers: Mapping[str, Keys]) -> None:
        if peers.get(self.client) != self.keys:
            raise PomonaError("the coordinator tells keys of this site that are not its own")


@dataclass(frozen=True)
class Unmasking:
    """What a server can take away once enough clients have opened their shares: the sum comes out bare.

    A single client's values stay under the masks that it has with the others who have answered.
    """

    session: str
    peers: Mapping[str, Keys]
    own: Mapping[str, bytes] = field(repr=False)
    lost: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def of(
        cls,
        session: str,
        peers: Mapping[str, Keys],
        answered: Collection[str],
        opened: Mapping[str, Mapping[str, bytes]],
        threshold: int,
    ) -> "Unmasking":
        """Put seeds together from what every client has opened, by who opened and whose it is.

        Raises `PomonaError` for fewer than `threshold`, or shares that do not give what was announced.
        """
        if len(opened) < threshold:
            raise PomonaError(
                f"{len(opened)} sites have opened their shares and {threshold} are needed"
            )
        seeds = {
            name: _combined(name, [shares[name] for shares in opened.values()][:threshold])
            for name in peers
        }
        for name, seed in seeds.items():
            told = (
                _digest(seed) == peers[name].own
                if name in answered
                else _pairwise(seed).public_key().public_bytes_raw() == peers[name].masks
            )
            if not told:
                raise PomonaError(
                    f'the shares of "{name}" do not give the seed that it has announced: one is wrong'
                )
        own = {name: seeds[name] for name in peers if name in answered}
        return cls(session, peers, own, {n: s for n, s in seeds.items() if n not in own})

    def bared(self, client: str, values: _Integers) -> dict[str, Tensor]:
        """Return a client's values without its own mask and those that it has with clients who were lost."""
        bare = _added(values, self.own[client], -1)
        for name, seed in self.lost.items():
            key = _agreed(seed, self.peers[client].masks, self.session)
            bare = _added(bare, key, -_sign(client, name))
        return bare


def check_threshold(threshold: int, clients: int) -> None:
    """Raise `PomonaError` where less than a majority could open masks, or nobody."""
    if not clients < 2 * threshold <= 2 * clients:
        raise PomonaError(
            f"masks of {clients} sites that {threshold} of them could open are not accepted; more than half of "
            "them are needed"
        )


def _added(values: _Integers, seed: bytes, sign: int) -> dict[str, Tensor]:
    """Add the mask of a seed, or take it away; sums wrap around. Names come in order: one stream for all."""
    stream = Cipher(algorithms.AES(_key(seed, "mask")), modes.CTR(bytes(16))).encryptor()
    masked: dict[str, Tensor] = {}
    for name in sorted(values):
        value = values[name]
        drawn = bytearray(stream.update(bytes(value.numel() * 8)))
        mask = torch.frombuffer(drawn, dtype=torch.int64) if drawn else torch.empty(0)
        masked[name] = value + sign * mask.view(value.shape).to(value)
    return masked


def _sign(client: str, other: str) -> int:
    return 1 if client < other else -1


def _pairwise(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_key(seed, "pairwise key"))


def _agreed(seed: bytes, public: bytes, session: str) -> bytes:
    return _key(_exchanged(_pairwise(seed), public), f"pairwise mask {session}")


def _exchanged(own: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PomonaError("the public key of a site's masks is none") from error


def _key(secret: bytes, purpose: str, length: int = 32) -> bytes:
    return HKDF(SHA256(), length, None, f"pomona {purpose}".encode()).derive(secret)


def _digest(seed: bytes) -> bytes:
    return hashlib.sha256(b"pomona own mask" + seed).digest()


def _share(index: int, value: bytes) -> bytes:
    return index.to_bytes(_INDEX) + value


def _combined(name: str, shares: Sequence[bytes]) -> bytes:
    parts = [(int.from_bytes(share[:_INDEX]), share[_INDEX:]) for share in shares]
    try:
        return Shamir.combine(parts, False)
    except ValueError as error:
        raise PomonaError(f'the shares of "{name}" do not fit together ({error})') from error
