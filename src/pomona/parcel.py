"""What travels between a coordinator and a site: a kind, JSON that is told, tensors as bytes.

It imports nothing heavy, since the process that talks to the network holds no model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from socket import socket
from typing import Any, cast

from pomona.errors import PomonaError

_LENGTHS = 4 + 4 + 8
_MOST_TOLD = 64 << 20


@dataclass(frozen=True)
class Parcel:
    """One message: `kind` says what is asked or answered, `told` is JSON, `tensors` is safetensors or empty."""

    kind: str
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> int:
        """How many bytes it takes on the wire, the transport's own left out."""
        return len(self.kind.encode()) + len(dumped(self.told)) + len(self.tensors)


@dataclass(frozen=True)
class Refused:
    """What a site says instead of an answer."""

    reason: str


def dumped(told: Mapping[str, Any]) -> bytes:
    """Return JSON without spaces; a number that is none has no place in it."""
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def loaded(text: bytes | str) -> dict[str, Any]:
    """Read a JSON object back; raises `PomonaError` for anything else."""
    if len(text) > _MOST_TOLD:
        raise PomonaError(f"a message tells {len(text)} bytes of JSON, which is no message of ours")
    try:
        told = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise PomonaError(f"a message tells no JSON: {str(error)[:80]}") from error
    if not isinstance(told, dict):
        raise PomonaError("a message tells JSON that is no object")
    return cast(dict[str, Any], told)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def send(link: socket, parcel: Parcel) -> None:
    """Write a parcel to a socket: three lengths, then what they are the lengths of."""
    kind, told = parcel.kind.encode(), dumped(parcel.told)
    lengths = len(kind).to_bytes(4) + len(told).to_bytes(4) + len(parcel.tensors).to_bytes(8)
    link.sendall(lengths + kind + told)
    link.sendall(parcel.tensors)


def receive(link: socket) -> Parcel | None:
    """Read the next parcel from a socket, or None when the other end is gone."""
    lengths = _exactly(link, _LENGTHS)
    if lengths is None:
        return None
    parts = [
        _exactly(link, int.from_bytes(lengths[a:b])) for a, b in ((0, 4), (4, 8), (8, _LENGTHS))
    ]
    if any(part is None for part in parts):
        return None
    kind, told, tensors = cast(list[bytes], parts)
    return Parcel(kind.decode(), loaded(told), tensors)


def _exactly(link: socket, count: int) -> bytes | None:
    data = bytearray(count)
    view, have = memoryview(data), 0
    while have < count:
        got = link.recv_into(view[have:])
        if not got:
            return None
        have += got
    return bytes(data)
