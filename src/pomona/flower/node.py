"""A site's side of Flower's fleet protocol: pulls what it is asked, pushes what it answers.

It does what Flower's SuperNode does, but for the app: nothing is fetched or run that the coordinator hands
out. The work is done by `answer`, whatever that is.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node as NodeId
from flwr.supercore.constant import MAX_TIMESTAMP_DIFF_SECONDS, MIN_TIMESTAMP_DIFF_SECONDS
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from pomona.errors import PomonaError
from pomona.flower.records import as_records, from_records
from pomona.parcel import Parcel
from pomona.progress import Tell

_POLL, _SLOWEST_POLL = 0.05, 0.5
_AGAIN = 2.0
_BEAT = float(HEARTBEAT_MIN_INTERVAL)
_DATE = 1.0  # seconds by which an HTTP date may be off


@dataclass
class Node:
    """A site's connection to a coordinator, kept up until it is told to stop.

    `authority` is the file of the certificate authority that the coordinator's certificate comes from; None is
    a connection without TLS. `answer` may raise `PomonaError`: the coordinator is told why.
    """

    coordinator: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    answer: Callable[[Parcel], Parcel] = field(repr=False)
    tell: Tell = field(repr=False)
    authority: Path | None = None
    registers: bool = False
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def run(self) -> None:
        """Serve until stopped; what the network does is waited out.

        Raises `PomonaError` when the coordinator does not know this site's key.
        """
        away = ""
        while not self.stopped.is_set():
            try:
                with self._client() as client, self._active(client) as node:
                    self.tell(f"connected to {self.coordinator}")
                    away = ""
                    self._serve(client, node)
            except (
                httpx.HTTPStatusError
            ) as error:  # a coordinator that was started anew, or is stopping
                away = self._told_away(away, f"it answers {error.response.status_code}")
            except (httpx.TransportError, OSError) as error:
                away = self._told_away(away, str(error) or type(error).__name__)
            self.stopped.wait(_AGAIN)

    def _told_away(self, before: str, reason: str) -> str:
        if reason != before:
            self.tell(f"cannot reach {self.coordinator} ({reason}); trying again")
        return reason

    def _unknown(self, response: httpx.Response) -> str:
        """Tell clocks that differ from a key that is not known, by the coordinator's own clock."""
        date = response.headers.get("date")
        if date is not None:
            ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
            if not -MAX_TIMESTAMP_DIFF_SECONDS < ahead < -MIN_TIMESTAMP_DIFF_SECONDS - _DATE:
                return (
                    f"the clocks of this site and of {self.coordinator} are {abs(ahead):.0f} seconds apart, so "
                    "that signatures are refused; set them right (NTP)"
                )
        return (
            f"{self.coordinator} does not know this site's key; have its public key put among those of the "
            "coordinator (pomona keys) and start both again"
        )

    @contextmanager
    def _client(self) -> Generator[FleetHttpClient]:
        interceptors = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(self.key, self.key.public_key()),
        ]
        authority = self.authority and self.authority.read_bytes()
        client = FleetHttpClient.from_server_address(
            self.coordinator, self.authority is None, authority, interceptors
        )
        with client:
            yield client

    @contextmanager
    def _active(self, client: FleetHttpClient) -> Generator[NodeId]:
        """Activate this node, and have its heart beat until it leaves."""
        public = public_key_to_bytes(self.key.public_key())
        if self.registers:
            _unless_known(lambda: client.RegisterNode(RegisterNodeFleetRequest(public_key=public)))
        try:
            asked = ActivateNodeRequest(public_key=public, heartbeat_interval=_BEAT)
            node = NodeId(node_id=client.ActivateNode(asked).node_id)
        except httpx.HTTPStatusError as error:
            if error.response.status_code // 100 == 4:  # no node has this key
                raise PomonaError(self._unknown(error.response)) from error
            raise
        over = threading.Event()

        def beat() -> None:
            asked = SendNodeHeartbeatRequest(node=node, heartbeat_interval=_BEAT)
            while not over.wait(_BEAT * 0.8):
                try:
                    client.SendNodeHeartbeat(asked)
                except (httpx.HTTPError, OSError, RuntimeError):
                    continue  # the loop that serves will notice what is wrong

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield node
        finally:
            over.set()
            with suppress(httpx.HTTPError, OSError, RuntimeError):
                client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))

    def _serve(self, client: FleetHttpClient, node: NodeId) -> None:
        pause = _POLL
        while not self.stopped.is_set():
            pulled = client.PullMessages(PullMessagesRequest(node=node))
            if not pulled.messages_list:
                self.stopped.wait(pause)
                pause = min(_SLOWEST_POLL, pause * 1.1)
                continue
            message = message_from_proto(pulled.messages_list[0])
            message = self._whole(client, node, message, pulled.message_object_trees[0])
            self._push(client, node, message, self._answered(message))
            pause = _POLL

    def _answered(self, message: Message) -> Parcel:
        try:
            return self.answer(from_records(message.content))
        except PomonaError as error:
            self.tell(f"refused: {error}")
            return Parcel("refused", {"reason": str(error)})

    def _whole(
        self, client: FleetHttpClient, node: NodeId, message: Message, tree: ObjectTree
    ) -> Message:
        """Pull what a message consists of."""
        run_id, id_ = message.metadata.run_id, message.metadata.message_id
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            asked = PullObjectRequest(node=node, run_id=run_id, object_id=part.object_id)
            while not (pulled := client.PullObject(asked)).object_available:
                if not pulled.object_found:
                    raise ConnectionError("a message was withdrawn while it came")
                time.sleep(_POLL)
            contents[part.object_id] = pulled.object_content
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=id_)
        )
        whole = cast(Message, inflate_object_from_contents(id_, contents))
        whole.metadata.__dict__["_message_id"] = id_
        return whole

    def _push(self, client: FleetHttpClient, node: NodeId, asked: Message, answer: Parcel) -> None:
        reply = Message(as_records(answer), reply_to=asked)
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            pushed = client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],
                )
            )
            objects = get_all_nested_objects(reply)
            for id_ in pushed.objects_to_push:
                client.PushObject(
                    PushObjectRequest(
                        node=node,
                        run_id=run_id,
                        session_id=pushed.session_id,
                        object_id=id_,
                        object_content=objects.pop(id_).deflate(),
                    )
                )


def _unless_known(register: Callable[[], object]) -> None:
    """Register a key; one that is known was registered before this site was restarted."""
    try:
        register()
    except httpx.HTTPStatusError as error:
        if error.response.status_code // 100 != 4:
            raise
