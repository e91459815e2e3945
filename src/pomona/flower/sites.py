"""Asking sites over a Flower Grid: that of the coordinator's own link, or any other."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError

from pomona.errors import PomonaError
from pomona.flower.link import Link
from pomona.flower.records import KIND, as_records, from_records
from pomona.parcel import Parcel, Refused
from pomona.progress import Tell, unheard

_POLL = 0.02
_LATE = 3600.0
_SLOWEST_POLL = 0.5
_LARGEST_ANSWER = 64 << 20  # bytes, and four times what was asked
_NAMED_WITHIN = 60.0  # seconds, then it is asked again
_NAMING = "name"
"""Asks a node for its name, where its key does not tell it."""


@runtime_checkable
class Post(Protocol):
    """Carries messages to nodes."""

    def online(self) -> Mapping[int, int]:
        """Return the nodes that are there, with how often each has come.

        One time more, and what it was asked before is lost.
        """
        ...

    def push(self, node: int, parcel: Parcel, seconds: float) -> str:
        """Send a parcel and return the message's id."""
        ...

    def pull(self, ids: set[str]) -> Iterable[tuple[str, Parcel | Refused | None]]:
        """Return what has been answered to messages, one at a time; None to one that is lost."""
        ...

    def forget(self, ids: set[str]) -> None:
        """Answers to these come too late."""
        ...


@dataclass(frozen=True)
class _Asked:
    """A message that waits for its answer: to whom, at which node and its how manieth coming, and what."""

    name: str
    at: tuple[int, int]
    parcel: Parcel


@dataclass
class FlowerSites:
    """Sites over a post. Names are those of the nodes' keys, or what nodes say their name is."""

    post: Post
    names: dict[int, str] = field(default_factory=dict[int, str])
    named_by_key: bool = False
    bytes_sent: dict[str, int] = field(default_factory=dict[str, int])
    bytes_received: dict[str, int] = field(default_factory=dict[str, int])
    note: Tell = field(default=unheard, repr=False)
    _unnamed: dict[str, int] = field(default_factory=dict[str, int], repr=False)

    def ask(
        self,
        parcels: Mapping[str, Parcel],
        seconds: float,
        enough: Callable[[Set[str]], bool] = lambda away: False,
    ) -> Iterator[tuple[str, Parcel | Refused]]:
        """Send every site its parcel and yield answers as they come, until all are there or time is up.

        A site that is away is waited for, and asked when it is back. Who has another parcel in `parcels` when
        the next answer is asked for is sent that too. `enough` is told now and then who is away, and ends it.
        """
        waiting, asked = set(parcels), dict[str, _Asked]()
        end, pause = time.monotonic() + seconds, _POLL
        try:
            while (waiting or asked) and time.monotonic() < end:
                found = False
                for id_, answer in self.post.pull(set(asked)) if asked else ():
                    one, found = asked.pop(id_), True
                    if answer is None:
                        waiting.add(one.name)
                        continue
                    self._count(one.name, answer)
                    yield one.name, answer
                    if parcels[one.name] is not one.parcel:
                        waiting.add(one.name)
                there = self._there()
                for id_, one in list(asked.items()):
                    if (
                        there.get(one.name) != one.at
                    ):  # it has gone without an answer, or was restarted
                        del asked[id_]
                        self.post.forget({id_})
                        waiting.add(one.name)
                for name in [name for name in waiting if name in there]:
                    waiting.discard(name)
                    asked |= self._asked(name, there[name], parcels[name], end)
                if enough(set(parcels) - set(there)):
                    break
                pause = _POLL if found else min(_SLOWEST_POLL, pause * 1.2)
                if waiting or asked:
                    time.sleep(max(0.0, min(pause, end - time.monotonic())))
        finally:
            self.post.forget(set(asked))

    def _there(self) -> dict[str, tuple[int, int]]:
        """Return the sites that are there: their node, and how often it has come."""
        online = self.post.online()
        if not self.named_by_key:
            self._hear_names(set(online))
        return {self.names[n]: (n, coming) for n, coming in online.items() if n in self.names}

    def _asked(
        self, name: str, at: tuple[int, int], parcel: Parcel, end: float
    ) -> dict[str, "_Asked"]:
        left = max(0.0, end - time.monotonic())
        id_ = self.post.push(at[0], parcel, left + _LATE)  # what comes later is nobody's answer
        self.bytes_sent[name] = self.bytes_sent.get(name, 0) + parcel.size
        self.note(f'to "{name}": {_described(parcel)}')
        return {id_: _Asked(name, at, parcel)}

    def _count(self, name: str, answer: Parcel | Refused) -> None:
        if isinstance(answer, Parcel):
            self.bytes_received[name] = self.bytes_received.get(name, 0) + answer.size
            self.note(f'from "{name}": {_described(answer)}')

    def _hear_names(self, online: Set[int]) -> None:
        """Ask nodes that no key names for theirs, and hear who has answered; the last to take one has it."""
        gone = {id_ for id_, node in self._unnamed.items() if node not in online}
        self.post.forget(gone)
        self._unnamed = {id_: n for id_, n in self._unnamed.items() if id_ not in gone}
        for node in online - set(self.names) - set(self._unnamed.values()):
            self._unnamed[self.post.push(node, Parcel(_NAMING), _NAMED_WITHIN)] = node
        for id_, answer in self.post.pull(set(self._unnamed)) if self._unnamed else ():
            node = self._unnamed.pop(id_)
            name = answer.told.get("name") if isinstance(answer, Parcel) else None
            if isinstance(name, str):
                for other in [n for n, taken in self.names.items() if taken == name]:
                    del self.names[other]
                self.names[node] = name


def _described(parcel: Parcel) -> str:
    round_ = parcel.told.get("round")
    of = f" of round {round_}" if isinstance(round_, int) else ""
    return f"{parcel.kind[:40]}{of}, {parcel.size:,} bytes"


def named(parcel: Parcel, name: str) -> Parcel | None:
    """Return a node's answer when it is asked for its name, None when it is asked for something else."""
    return Parcel("named", {"name": name}) if parcel.kind == _NAMING else None


@dataclass
class LinkPost:
    """The post of the coordinator's own link, without a network in between."""

    link: Link
    _coming: dict[str, Message] = field(default_factory=dict[str, Message])
    _node_of: dict[str, int] = field(default_factory=dict[str, int])

    def online(self) -> Mapping[int, int]:
        """Return the nodes that are there."""
        return self.link.online()

    def push(self, node: int, parcel: Parcel, seconds: float) -> str:
        """Put a message where its node pulls it; equal contents are kept once."""
        state = self.link.state
        # nobody can guess the id of a message to somebody else, and answer in its place
        group = secrets.token_hex(16)
        message = Message(as_records(parcel), node, KIND, ttl=seconds, group_id=group)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            session = state.start_session(self.link.run_id)
            tree = get_object_tree(message)
            bare = remove_content_from_message(message)
            stored, missing = state.store_message_and_object_tree(bare, tree, session)
            if not stored:
                raise PomonaError(f"Flower does not take a message to node {node}")
            objects = get_all_nested_objects(message)
            for id_ in missing:
                state.store_object(self.link.run_id, session, id_, objects[id_].deflate())
        mail = self.link.mail
        mail.largest = max(mail.largest, _LARGEST_ANSWER + 4 * parcel.size)
        mail.add(node)
        self._node_of[message.metadata.message_id] = node
        return message.metadata.message_id

    def pull(self, ids: set[str]) -> Iterator[tuple[str, Parcel | Refused | None]]:
        """Yield the answers whose every chunk has come; one is in memory at a time."""
        for reply in self._replies(ids - set(self._coming)):
            self._coming[reply.metadata.reply_to_message_id] = reply
        for id_ in ids & set(self._coming):
            answer = self._answer(self._coming[id_], self._node_of[id_])
            if isinstance(answer, _Coming):
                continue
            self.forget({id_})
            yield id_, answer
            del answer

    def _replies(self, ids: set[str]) -> list[Message]:
        try:
            return list(self.link.state.get_message_res(ids, self.link.run_id))
        except (
            KeyError
        ):  # one of them has outlived its time: Flower tells it of each, but not of all together
            known = [id_ for id_ in ids if id_ in self.link.state.message_ins_store]
            return list(self.link.state.get_message_res(set(known), self.link.run_id))

    def _answer(self, reply: Message, node: int) -> "Parcel | Refused | _Coming | None":
        if reply.has_error():
            return None
        if node in self.link.mail.too_large:
            self.link.mail.too_large.discard(node)
            return Refused("its answer is larger than any may be")
        try:
            contents = self._contents(reply.metadata.message_id)
        except (NoObjectInStoreError, KeyError):  # it came too slowly, and Flower has given it up
            return None
        return _Coming() if contents is None else _read(reply.metadata.message_id, contents)

    def forget(self, ids: set[str]) -> None:
        """Remove messages and what has come of their answers."""
        state = self.link.state
        for id_ in ids:
            reply = self._coming.pop(id_, None)
            self._node_of.pop(id_, None)
            if reply is not None and not reply.has_error():
                state.object_store.delete(reply.metadata.message_id)
            state.object_store.delete(id_)
        state.delete_messages(ids)

    def _contents(self, id_: str) -> dict[str, bytes] | None:
        """Return a message's objects, None while one is missing."""
        names = self.link.store.complete(id_)
        if names is None:
            return None
        return {name: self.link.store.get(name) or b"" for name in names}


class _Coming:
    """An answer of which a chunk is missing yet."""


def _read(id_: str, contents: dict[str, bytes]) -> Parcel | Refused:
    try:
        message = inflate_object_from_contents(id_, contents)
        return refused_or(from_records(message.content))  # pyright: ignore[reportAttributeAccessIssue]
    except (PomonaError, ValueError, TypeError, KeyError) as error:
        return Refused(f"its message cannot be read: {str(error)[:200]}")


def refused_or(parcel: Parcel) -> Parcel | Refused:
    """Return what a site says instead of an answer as what it is."""
    return Refused(str(parcel.told.get("reason"))) if parcel.kind == "refused" else parcel
