"""What sites say, believed only as far as it can be checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, cast

from pomona.artifacts.inputs import Inputs, difference
from pomona.errors import PomonaError
from pomona.federation.masks import Keys
from pomona.parcel import Parcel, Refused

FIGURES = ("base", "shared", "personal")
_MOST_ROWS = 1 << 40


@dataclass(frozen=True)
class Presented:
    """What a site has said of itself: rows it trains and is tested on, the last round it has finished."""

    train: int
    test: int
    round: int
    lines: list[dict[str, Any]] = field(repr=False)


def presented(name: str, answer: Parcel, model: dict[str, str]) -> Presented:
    """Return what a site says of itself; raises `PomonaError` for another base than `model`, by its files."""
    of_kind(answer, "here")
    told = answer.told
    if told.get("site") != name:
        raise PomonaError("it calls itself otherwise")
    files = told.get("model")
    if not isinstance(files, dict):
        raise PomonaError("it does not tell its base model")
    other = difference(Inputs(model, {}), Inputs(cast(dict[str, str], files), {}))
    if other is not None:
        raise PomonaError(f"it has another base model: {other}")
    counts = [told.get(key) for key in ("train", "test", "round")]
    if not all(_whole(count) and 0 <= cast(int, count) <= _MOST_ROWS for count in counts):
        raise PomonaError("it does not tell how many rows it has")
    train, test, round_ = cast(list[int], counts)
    return Presented(train, test, round_, lines_of(name, told))


def check_told(answer: Parcel, federation: str, round_: int, rows: int) -> None:
    """Raise `PomonaError` for an update of another round, or whose figures are none.

    `rows` are those that the site has said it has.
    """
    of_kind(answer, "update")
    told = answer.told
    if told.get("federation") != federation or told.get("round") != round_:
        raise PomonaError(f"its answer is not one to round {round_} of this federation")
    if answer.tensors and told.get("rows") not in (1, rows):  # 1: noised, all count the same
        raise PomonaError(
            f"it says that {str(told.get('rows'))[:40]} rows stand behind its update, and before it were {rows}"
        )
    losses = told.get("losses")
    if not (isinstance(losses, list) and all(_number(v) for v in cast(list[Any], losses))):
        raise PomonaError("its losses are no numbers")
    for key in ("loss", "epsilon"):
        if told.get(key) is not None and not _number(told[key]):
            raise PomonaError(f"its {key} is no number")


def lines_of(name: str, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a site's lines of figures; raises `PomonaError` for what are none, or somebody else's."""
    lines = told.get("lines")
    if not isinstance(lines, list) or len(cast(list[Any], lines)) > 16:
        raise PomonaError("its figures are no lines")
    kept: list[dict[str, Any]] = []
    for line in cast(list[Any], lines):
        if not isinstance(line, dict) or cast(dict[str, Any], line).get("client") != name:
            raise PomonaError("its figures are not its own")
        own = cast(dict[str, Any], line)
        numbers = {k: own.get(k) for k in ("loss", "perplexity", "rows", "tokens")}
        if own.get("model") not in (*FIGURES, "held back") or not all(
            _number(value) for value in numbers.values()
        ):
            raise PomonaError("its figures are no losses")
        kept.append({"round": own.get("round"), "model": own["model"], "client": name, **numbers})
    if not all(_whole(line["round"]) for line in kept):
        raise PomonaError("its figures are of no round")
    return kept


def answers_of(name: str, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a site's figures of its test rows, as lines of answers.jsonl without a word of text.

    Raises `PomonaError` for what are none.
    """
    rows = told.get("rows")
    if told.get("site") != name or not isinstance(rows, list):
        raise PomonaError("its last figures are not its own")
    kept = [_answer(name, row) for row in cast(list[Any], rows)]
    if not any(row["model"] == "base" for row in kept):
        raise PomonaError("its last figures lack those of the base")
    counts: dict[str, int] = {}
    for row in kept:
        row["row"] = counts.get(row["model"], 0)
        counts[row["model"]] = row["row"] + 1
    return kept


def _answer(name: str, row: Any) -> dict[str, Any]:
    told = cast(list[Any], row) if isinstance(row, list) else []
    if len(told) != 5 or told[0] not in FIGURES:
        raise PomonaError("its last figures are of no model")
    model, nats, tokens, rouge_l, exact_match = told
    if not (_number(nats) and _whole(tokens) and 0 < tokens <= _MOST_ROWS):
        raise PomonaError(f"its last figures of the {model} model are no losses")
    if not all(value is None or _number(value) for value in (rouge_l, exact_match)):
        raise PomonaError(f"its last figures of the {model} model are no scores")
    figures = {"nats": nats, "tokens": tokens, "rouge_l": rouge_l, "exact_match": exact_match}
    return {"client": name, "model": model, "row": 0, **figures, "answer": None, "reference": None}


def not_refused(answer: Parcel | Refused) -> Parcel:
    """Return an answer; raises `PomonaError` with the site's reason where it is none."""
    if isinstance(answer, Refused):
        raise PomonaError(answer.reason[:400])
    return answer


def of_kind(answer: Parcel, kind: str) -> None:
    """Raise `PomonaError` for an answer to something else."""
    if answer.kind != kind:
        raise PomonaError(f'it answers "{answer.kind[:40]}" where "{kind}" was asked for')


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def whole_of(key: str, told: Mapping[str, Any]) -> int:
    """Return a number of a message; raises `PomonaError` for what is none."""
    if not _whole(told.get(key)):
        raise PomonaError(f"a message tells no {key}")
    return cast(int, told[key])


def keys_of(told: object) -> Keys:
    """Return the public keys of a site's masks; raises `PomonaError` for what are none."""
    if not isinstance(told, dict):
        raise PomonaError("it tells no keys of its masks")
    own = cast(dict[str, Any], told)
    return Keys(*(_bytes_of(own.get(key.name)) for key in fields(Keys)))


def peers_of(told: Mapping[str, Any]) -> dict[str, Keys]:
    """Return the keys of everybody whose masks go together."""
    keys = told.get("keys")
    if not isinstance(keys, dict):
        raise PomonaError("a message tells no keys of masks")
    return {name: keys_of(own) for name, own in cast(dict[str, Any], keys).items()}


def shares_of(told: object, peers: Mapping[str, Keys]) -> dict[str, bytes]:
    """Return shares, one for everybody whose masks go together; raises `PomonaError` for others."""
    if not isinstance(told, dict) or not peers.keys() <= cast(dict[str, Any], told).keys():
        raise PomonaError("it does not tell a share of every site's masks")
    own = cast(dict[str, Any], told)
    return {name: _bytes_of(own[name]) for name in peers}


def _bytes_of(value: object) -> bytes:
    try:
        return bytes.fromhex(cast(str, value))
    except (TypeError, ValueError) as error:
        raise PomonaError(
            "a key or a share of masks is not written in hexadecimal digits"
        ) from error
