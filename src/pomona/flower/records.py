"""A parcel as Flower's records, and back."""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from pomona.errors import PomonaError
from pomona.parcel import Parcel, dumped, loaded

KIND = "query.pomona"
"""The type of all our messages to Flower; what is asked is the parcel's own."""
_STYPE = "safetensors"
_SMALL = 1 << 20


def as_records(parcel: Parcel) -> RecordDict:
    """Return Flower's records of a parcel; tensors are bytes, of whatever type they are, bfloat16 included."""
    told = {"kind": parcel.kind, "told": dumped(parcel.told)}
    if len(parcel.tensors) < _SMALL:  # every part of a message is asked for by itself
        return RecordDict({"parcel": ConfigRecord({**told, "tensors": parcel.tensors})})
    array = Array("uint8", (len(parcel.tensors),), _STYPE, parcel.tensors)
    return RecordDict(
        {"parcel": ConfigRecord({**told, "tensors": b""}), "tensors": ArrayRecord({"all": array})}
    )


def from_records(records: RecordDict) -> Parcel:
    """Read a parcel back; raises `PomonaError` for records that are none."""
    try:
        config = records["parcel"]
        kind, told, data = (config[key] for key in ("kind", "told", "tensors"))  # pyright: ignore[reportCallIssue, reportArgumentType]
        if "tensors" in records:
            array = records["tensors"]["all"]
            stype, data = array.stype, array.data  # pyright: ignore[reportAttributeAccessIssue]
        else:
            stype = _STYPE
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PomonaError("a message is no message of Pomona's") from error
    if not (isinstance(kind, str) and isinstance(told, bytes) and isinstance(data, bytes)):
        raise PomonaError("a message is no message of Pomona's")
    if stype != _STYPE:
        raise PomonaError("a message is no message of Pomona's")
    return Parcel(kind, loaded(told), data)
