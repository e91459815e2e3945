"""Test rows that are also trained on: what a model can know by heart, a test does not measure."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pomona.data.row import Row


@dataclass(frozen=True)
class Repeated:
    """Of `test` rows, how many have prompt and answer of a train row, and how many its prompt alone.

    `own` of the `same` ones are among the client's own train rows.
    """

    test: int
    same: int
    own: int
    prompt: int


@dataclass(frozen=True)
class Example:
    """A test row and the first train row it repeats: file and line, and whose it is."""

    test: str
    train: str
    client: str


@dataclass(frozen=True)
class Duplicates:
    """Test rows that some client trains on: of all clients together, per client, and one of them.

    In `total` a test row that several clients share counts once.
    """

    total: Repeated
    clients: dict[str, Repeated]
    example: Example | None


def find_duplicates(
    train: Mapping[str, Sequence[Row]], test: Mapping[str, Sequence[Row]]
) -> Duplicates:
    """Compare every client's test rows with the train rows of all clients.

    Prompts (history, instruction and context) and answers are compared after Unicode's NFKC, in one
    case and with single spaces.
    """
    first: dict[bytes, tuple[str, Row]] = {}
    prompts: set[bytes] = set()
    own: dict[str, set[bytes]] = {}
    for client, rows in train.items():
        own[client] = set()
        for row in rows:
            prompt, whole = _keys(row)
            prompts.add(prompt)
            first.setdefault(whole, (client, row))
            own[client].add(whole)
    clients: dict[str, Repeated] = {}
    seen: dict[int, tuple[bool, bool, bool]] = {}
    example: Example | None = None
    for client, rows in test.items():
        found: list[tuple[bool, bool, bool]] = []
        for row in rows:
            prompt, whole = _keys(row)
            same = whole in first
            found.append((same, whole in own[client], prompt in prompts and not same))
            before = seen.get(id(row), (False, False, False))
            seen[id(row)] = (same, before[1] or found[-1][1], found[-1][2])
            if same and example is None:
                holder, held = first[whole]
                example = Example(row.where, held.where, holder)
        clients[client] = _counted(found)
    return Duplicates(_counted(list(seen.values())), clients, example)


def told(duplicates: Duplicates, most: int = 8) -> str:
    """Return one sentence about the duplicates, naming at most so many clients."""
    total = duplicates.total
    if not total.same and not total.prompt:
        return (
            f"duplicates: none of {total.test} test rows is a train row, nor its prompt that of one"
        )
    parts = [
        f"{total.same} of {total.test} test rows are train rows too{_of(duplicates, 'same', most)}",
        f"by the prompt alone {total.prompt} more{_of(duplicates, 'prompt', most)}",
    ]
    example = duplicates.example
    if example is not None and example.test:
        parts.append(f"for example {example.test} is {example.train} of {example.client}")
    return f"duplicates: {'; '.join(parts)}"


def _of(duplicates: Duplicates, what: str, most: int) -> str:
    counts = {name: getattr(own, what) for name, own in duplicates.clients.items()}
    named = [f"{name} {count}" for name, count in counts.items() if count]
    more = [f"{len(named) - most} more clients"] if len(named) > most else []
    return f" ({', '.join(named[:most] + more)})" if named else ""


def _counted(found: Sequence[tuple[bool, bool, bool]]) -> Repeated:
    same, own, prompt = (sum(column) for column in zip(*found, strict=True))
    return Repeated(len(found), same, own, prompt)


def _keys(row: Row) -> tuple[bytes, bytes]:
    """Return digests of the prompt, and of the prompt with its answer."""
    asked = [text for turn in row.history for text in turn]
    prompt = _digest([*asked, row.instruction, row.context])
    return prompt, _digest([prompt.hex(), row.response])


def _digest(texts: Sequence[str]) -> bytes:
    plain = (" ".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in texts)
    return hashlib.blake2b("\x1f".join(plain).encode(), digest_size=16).digest()
