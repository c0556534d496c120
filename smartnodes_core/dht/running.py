"""A `DhtNode` on a node's connections, with the threads that it needs: what a station starts and closes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from smartnodes_core.dht.asking import NodeCalls
from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.node import DhtNode
from smartnodes_core.dht.upkeep import INTERVAL_S, Upkeep, leave
from smartnodes_core.errors import ConfigError, ConnectionLostError
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import NodeKey, Role
from smartnodes_core.rpc.pool import WorkerPool

logger = logging.getLogger(__name__)

MAX_THREADS = 16
FIND_TIMEOUT_S = 5.0
#: A connection that only the DHT has used is closed when it was not used for so long. Contacts are pinged every ten
#: minutes: keeping connections to all of them would take more than dialling those again.
IDLE_S = 120.0
#: So long somebody who was looked for is not looked for again, and so many are remembered.
MISSING_S, MAX_MISSING = 30.0, 1024


class RunningDht:
    """Joins through `contacts`, asked whenever nobody is known. Until `take_part` is called, the node only asks."""

    def __init__(
        self,
        node: Node,
        network_id: int,
        role_of: Callable[[NodeKey], Role | None],
        contacts: Callable[[], Sequence[Contact]],
    ) -> None:
        self._node = node
        self._endpoints: tuple[str, ...] = ()
        self._closed = False
        self._missing: dict[NodeKey, float] = {}
        self._pool = WorkerPool("dht", MAX_THREADS)
        self.dht = DhtNode(
            node.node_key,
            network_id,
            NodeCalls(node),
            self._run,
            endpoints=lambda: self._endpoints,
            role_of=role_of,
        )
        self._upkeep = Upkeep(self.dht, contacts, INTERVAL_S, self._close_idle)
        node.find_address = self.find_address

    def start(self) -> None:
        """Begins to join, on another thread."""
        self._upkeep.start()

    def wait_joined(self, timeout_s: float) -> bool:
        """Until the first attempt to join has ended; False when it has not in `timeout_s`."""
        return self._upkeep.joined.wait(timeout_s)

    def take_part(self, endpoints: Sequence[str]) -> None:
        """Serve the others, at these endpoints."""
        if not self._endpoints and endpoints:
            self._node.serve(self.dht)
        self._endpoints = tuple(endpoints)

    def find_address(self, node_key: NodeKey, timeout_s: float) -> None:
        """Looks up where a node is, and tells the address book; who is not found is not looked for again at once."""
        now_s = time.monotonic()
        if self._missing.get(node_key, now_s) > now_s:
            return
        self._missing[node_key] = now_s + MISSING_S
        while len(self._missing) > MAX_MISSING:
            self._missing.pop(next(iter(self._missing)), None)
        found = self.dht.find_node(node_key, min(timeout_s, FIND_TIMEOUT_S))
        for endpoint in reversed(found.endpoints if found is not None else []):
            try:
                self._node.add_address(node_key, endpoint)
            except ConfigError as error:
                logger.info("node %s announced a bad endpoint: %s", node_key.hex()[:8], error)

    def _close_idle(self) -> None:
        """Ends connections that only the DHT needed. A node that nobody can dial keeps those to validators, which
        introduce it.
        """
        num_closed = self._node.close_idle(IDLE_S, lambda peer: not self._endpoints and peer.role == "validator")
        if num_closed:
            logger.debug("%d connections were closed that the DHT used last", num_closed)

    def _run(self, job: Callable[[], None]) -> None:
        if self._closed:  # the pool would drop it, and whoever waits for it would do so until its deadline
            raise ConnectionLostError("this node is leaving the DHT")
        self._pool.run(job)

    def close(self) -> None:
        """Gives what is kept here to others, and ends the threads. Harmless when repeated."""
        self._node.find_address = None
        self._upkeep.stop()
        if self._endpoints:
            num_taken = leave(self.dht)
            logger.info("left the DHT: %d of %d records were taken over", num_taken, len(self.dht.values))
            self._endpoints = ()
        self._closed = True
        self._pool.stop(1.0)
