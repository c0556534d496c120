"""One-way messages that never hold up who writes them: in order for each peer, sent by a few threads of their own.

A peer that is down costs the writer nothing: what waits for it is dropped, and whoever lacks it asks for it later.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from smartnodes_core.errors import SmartnodesError
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc.pool import WorkerPool

logger = logging.getLogger(__name__)

MAX_WAITING = 4096
MAX_THREADS = 8


class _Message(NamedTuple):
    method: str
    params: dict[str, Any]
    body: bytes


class Mailer:
    """Posts notifications to peers; see the module."""

    def __init__(self, node: Node, name: str):
        self._node = node
        self._pool = WorkerPool(name, MAX_THREADS)
        self._changed = threading.Condition()
        self._waiting: dict[NodeKey, deque[_Message]] = {}  # a key is here while its messages are being sent

    def post(self, peers: Iterable[NodeKey], method: str, params: dict[str, Any], body: bytes = b"") -> None:
        """Send to each of `peers` but this node itself, soon. Returns at once."""
        message = _Message(method, params, body)
        for peer in peers:
            if peer == self._node.node_key:
                continue
            with self._changed:
                queue = self._waiting.get(peer)
                if queue is not None and len(queue) >= MAX_WAITING:
                    logger.warning("%s for %s is dropped: %d messages wait", method, peer.hex()[:8], len(queue))
                    continue
                self._waiting.setdefault(peer, deque()).append(message)
                if queue is None:
                    self._pool.run(lambda peer=peer: self._send_all(peer))  # type: ignore[misc]

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything posted is sent or given up; False when it is not by then."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def stop(self) -> None:
        """Drops what waits. Harmless when repeated."""
        self._pool.stop(1.0)

    def _send_all(self, peer: NodeKey) -> None:
        while True:
            with self._changed:
                queue = self._waiting[peer]
                if not queue:
                    del self._waiting[peer]
                    self._changed.notify_all()
                    return
                message = queue.popleft()
            try:
                self._node.notify(peer, message.method, message.params, [message.body] if message.body else ())
            except SmartnodesError as error:
                with self._changed:
                    num_lost = 1 + len(queue)
                    queue.clear()
                logger.info("%d messages (%s) did not reach %s: %s", num_lost, message.method, peer.hex()[:8], error)
