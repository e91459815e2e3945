"""The routes of Flower's fleet, and what stands before them: who may answer, how much comes at once."""

import asyncio
import gc

from fastapi import FastAPI, HTTPException
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pomona.flower.mail import Mail

_LARGE = ("/push-object", "/pull-object")
_AT_ONCE = 8  # chunks of messages that are in memory at the same time, either way
_LARGEST_REQUEST = 16 << 20  # Flower's own chunks have 5 MB
_SLOWEST = 60.0  # seconds between two parts of a request
_LONGEST_CHUNK = 300.0  # seconds for all of one


def fleet_app(factory: LinkStateFactory, authenticated: bool, mail: Mail) -> FastAPI:
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


class Bounded:
    """Holds a coordinator's memory: few large parts come or go at once, none larger than a chunk can be."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.slots = {path: asyncio.Semaphore(_AT_ONCE) for path in _LARGE}
        self.read = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on when it may be read."""
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
