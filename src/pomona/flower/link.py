"""Flower's SuperLink inside the coordinator: of its routes only those of the fleet exist.

Sites pull their messages and push their answers over Flower's protocol. There is no Control or Runtime API, so
that nobody can hand in code, start or stop a run over the network, and no app that is handed out.
"""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI, HTTPException
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pomona.errors import PomonaError
from pomona.flower.store import DiskStore

_LARGE = ("/push-object", "/pull-object")
_AT_ONCE = 8  # chunks of messages that are in memory at the same time, either way
_LARGEST_REQUEST = 16 << 20  # Flower's own chunks have 5 MB
_BEAT = 20.0
_LONG_POLL = 5.0
_SLOWEST, _LONGEST_CHUNK = (
    60.0,
    300.0,
)  # seconds between two parts of a request, and for all of a chunk
for _name in ("flwr", "uvicorn"):  # what matters is told in our own words
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Certificate:
    """The coordinator's certificate and key, as files."""

    chain: Path
    key: Path


class State(InMemoryLinkState):
    """Flower's state of nodes and messages, which lets a site that was restarted come back at once."""

    def __init__(self, federation: NoOpFederationManager, store: DiskStore, mail: "Mail"):
        super().__init__(federation, store)
        self.mail = mail
        self.activations: dict[int, int] = {}

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Activate a node; one that counts as online has died without a word, for it has the same key."""
        with self.lock:
            self.deactivate_node(node_id)
            self.mail.drop(node_id)
            self.activations[node_id] = self.activations.get(node_id, 0) + 1
            return super().activate_node(node_id, heartbeat_interval)


@dataclass
class Link:
    """A running SuperLink, with its messages in `folder` while they wait.

    `keys` are the public keys of the sites that may join, by name; None admits all.
    """

    host: str
    port: int
    folder: Path
    certificate: Certificate | None = None
    keys: Mapping[str, bytes] | None = None
    state: State = field(init=False, repr=False)
    store: DiskStore = field(init=False, repr=False)
    run_id: int = field(init=False, default=0)
    mail: "Mail" = field(init=False, repr=False)

    def __enter__(self) -> Self:
        self.mail = Mail()
        self.store = DiskStore(self.folder)
        federation, stores = NoOpFederationManager(), ObjectStoreFactory()
        factory = LinkStateFactory(":flwr-in-memory:", federation, stores)
        self.state = factory.state_instance = State(federation, self.store, self.mail)
        self.names: dict[int, str] = {}
        for name, key in (self.keys or {}).items():
            node = self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=name)
            self.names[node] = name
        self._begin_run()
        self._app = _app(factory, self.keys is not None, self.mail)
        gc.freeze()  # what is there now stays: collecting what requests leave is then quick
        try:
            self._serve(self._app)
        except BaseException:
            self._over.set()
            self.store.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.mail.close()
        self._over.set()
        self._server.should_exit = True
        self._thread.join(timeout=10)
        gc.unfreeze()
        self.store.close()

    @property
    def routes(self) -> list[str]:
        """The paths that exist."""
        return list(self._app.openapi()["paths"])

    def online(self) -> dict[int, int]:
        """Return the nodes that are online, with how many times each has come."""
        nodes = self.state.get_node_info(statuses=[NodeStatus.ONLINE])
        return {node.node_id: self.state.activations[node.node_id] for node in nodes}

    def _begin_run(self) -> None:
        """Flower carries messages only between a run and its nodes: this is the run, and nobody's task."""
        state = self.state
        self.run_id = state.create_run(
            "pomona", "1", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task_id = state.get_run_info(run_ids=[self.run_id])[0].primary_task_id
        assert task_id is not None
        state.claim_task(task_id)
        state.activate_task(task_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, self.run_id, 1
        self._over = threading.Event()

        def beat() -> None:
            while not self._over.wait(_BEAT):
                state.acknowledge_task_heartbeat(task_id)

        threading.Thread(target=beat, daemon=True).start()

    def _serve(self, app: FastAPI) -> None:
        certificate = self.certificate
        config = uvicorn.Config(
            _Bounded(app),
            host=self.host,
            port=self.port,
            log_config=None,
            access_log=False,
            server_header=False,
            ssl_certfile=certificate and str(certificate.chain),
            ssl_keyfile=certificate and str(certificate.key),
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
        failed: list[BaseException] = []

        def serve() -> None:
            try:
                self._server.run()
            except BaseException as error:
                failed.append(error)

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise PomonaError(
                    f"cannot listen on {self.host}:{self.port}; it is taken, or no address of this machine: "
                    "choose another with --host and --port"
                )
            time.sleep(0.01)


def _app(factory: LinkStateFactory, authenticated: bool, mail: "Mail") -> FastAPI:
    """Return Flower's fleet routes and what they need, in Flower's order."""
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(_OwnAnswers),
            Middleware(_LongPolls),
        ],
    )
    app.state.linkstate_factory = factory
    app.state.mail = mail
    app.state.enable_supernode_auth = authenticated
    app.include_router(router)
    return app


class _OwnAnswers(BaseHTTPMiddleware):
    """Refuses an answer in the name of another node than the one that signed the request, or a huge one."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Compare the sender of every message with the node that sends it, and count what it pushes."""
        asked = getattr(request.state, "protobuf_request", None)
        if isinstance(asked, PushMessagesRequest):
            senders = {message.metadata.src_node_id for message in asked.messages_list}
            if senders != {asked.node.node_id}:
                raise HTTPException(403, "an answer of another node")
        if isinstance(asked, PushObjectRequest) and not request.app.state.mail.takes(asked):
            raise HTTPException(413, "larger than any answer may be")
        return await call_next(request)


class _LongPolls(BaseHTTPMiddleware):
    """Holds a node that asks for messages until there is one, so that nodes need not ask all the time."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Wait for a message to the node that asks, for a few seconds at most."""
        asked = getattr(request.state, "protobuf_request", None)
        if isinstance(asked, PullMessagesRequest) and not await request.app.state.mail.wait(
            asked.node.node_id
        ):
            return Response(status_code=503)  # its node asks anew, and nobody listens here
        return await call_next(request)


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


class _Bounded:
    """Holds a coordinator's memory: few large parts come or go at once, none larger than a chunk can be."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.slots = {path: asyncio.Semaphore(_AT_ONCE) for path in _LARGE}
        self.read = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        slots = next((own for end, own in self.slots.items() if path.endswith(end)), None)
        if scope["type"] != "http" or slots is None:
            await self.app(scope, _limited(receive), send)
            return
        async with slots, asyncio.timeout(_LONGEST_CHUNK):
            await self.app(scope, _limited(receive), send)
        self.read += 1
        if self.read % _AT_ONCE == 0:
            gc.collect()  # a request that was read stays behind in a circle of references


def _limited(receive: Receive) -> Receive:
    """Return what reads a request, and breaks off where it is larger than any of ours, or does not come."""
    read, expected = 0, True

    async def limited() -> object:
        nonlocal read, expected
        try:
            message = await asyncio.wait_for(receive(), _SLOWEST if expected else None)
        except TimeoutError as error:
            raise ConnectionError("a request has begun and does not go on") from error
        expected = bool(message.get("more_body"))
        read += len(message.get("body", b""))
        if read > _LARGEST_REQUEST:
            raise ConnectionError("a request is larger than any message of a site")
        return message

    return limited  # pyright: ignore[reportReturnType]
