"""Flower's SuperLink inside the coordinator: of its routes only those of the fleet exist.

Sites pull their messages and push their answers over Flower's protocol. There is no Control or Runtime API, so
that nobody can hand in code, start or stop a run over the network, and no app that is handed out.
"""

import gc
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from fastapi import FastAPI
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

from pomona.errors import PomonaError
from pomona.flower.fleet import Bounded, fleet_app
from pomona.flower.mail import Mail
from pomona.flower.store import DiskStore

_BEAT = 20.0
for _name in ("flwr", "uvicorn"):  # what matters is told in our own words
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Certificate:
    """The coordinator's certificate and key, as files."""

    chain: Path
    key: Path


class State(InMemoryLinkState):
    """Flower's state of nodes and messages, which lets a site that was restarted come back at once."""

    def __init__(self, federation: NoOpFederationManager, store: DiskStore, mail: Mail):
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
    mail: Mail = field(init=False, repr=False)

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
        self._app = fleet_app(factory, self.keys is not None, self.mail)
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
            Bounded(app),
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
