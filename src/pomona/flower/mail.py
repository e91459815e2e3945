"""What is known of messages beside Flower, and holding a node's question until there is one for it."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from flwr.proto.message_pb2 import PushObjectRequest

_LONG_POLL = 5.0


@dataclass
class Mail:
    """What is known of messages beside Flower: how many every node was sent, and was told of.

    An answer of more than `largest` bytes is not taken, and its node remembered in `too_large`. Nodes wait in
    the server's event loop, and messages are counted from other threads.
    """

    largest: int = 0
    pushed: dict[str, int] = field(default_factory=dict[str, int])
    too_large: set[int] = field(default_factory=set[int])
    sent: dict[int, int] = field(default_factory=dict[int, int])
    told: dict[int, int] = field(default_factory=dict[int, int])
    _waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(
        default_factory=dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event]]
    )
    _over: bool = False

    def add(self, node: int) -> None:
        """Count a message to a node."""
        self.sent[node] = self.sent.get(node, 0) + 1
        self.too_large.discard(node)
        self._wake([node])

    def close(self) -> None:
        """Have nobody wait any more."""
        self._over = True
        self._wake(list(self._waiting))

    def _wake(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            if (waiting := self._waiting.get(node)) is not None:
                loop, news = waiting
                with suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(news.set)

    def takes(self, request: PushObjectRequest) -> bool:
        """Count a part of an answer, and tell whether it may be as large as it is by now."""
        size = self.pushed.get(request.session_id, 0) + len(request.object_content)
        self.pushed[request.session_id] = size
        if size > self.largest:
            self.too_large.add(request.node.node_id)
        return size <= self.largest

    async def wait(self, node: int) -> bool:
        """Return when there is a message to a node, or after a while; False where it asks anew by then."""
        self.drop(node)
        own = self._waiting[node] = (asyncio.get_running_loop(), asyncio.Event())
        with suppress(TimeoutError):
            if not self._news(node):  # what is counted from now on sets the event
                await asyncio.wait_for(own[1].wait(), _LONG_POLL)
        if self._waiting.get(node) is not own:
            return False
        del self._waiting[node]
        if self.sent.get(node, 0) > self.told.get(node, 0):
            self.told[node] = self.told.get(node, 0) + 1
        return True

    def drop(self, node: int) -> None:
        """Have whoever waits for a node's messages leave without any: the node is back, or asks anew."""
        if (waiting := self._waiting.pop(node, None)) is not None:
            with suppress(RuntimeError):
                waiting[0].call_soon_threadsafe(waiting[1].set)

    def _news(self, node: int) -> bool:
        return self._over or self.sent.get(node, 0) > self.told.get(node, 0)
