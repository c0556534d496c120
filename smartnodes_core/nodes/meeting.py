"""How this node meets a peer when neither can dial the other: introduced by whom both are connected to.

They are told the address under which the other is seen, and both connect at once (`transport/tcp.py`); where their
routers do not let that through, they connect to a relay that joins the two (`transport/relay.py`). Either way the two
then shake hands with each other as on any connection, each expecting the other's key: who introduces them sees
ciphertext at most. The other side of these calls is `introducing.py`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    DeadlineError,
    PeerUnreachableError,
    ProtocolError,
    SmartnodesError,
)
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import bytes_in, count_in, digest_in, text_in
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Connection, DuplicateConnectionError, Peer, join_endpoint, split_endpoint
from smartnodes_core.transport.relay import TOKEN_BYTES, join_circuit
from smartnodes_core.transport.tcp import open_from_both_sides

logger = logging.getLogger(__name__)

#: So long both sides try to meet: SYNs are repeated after one second, then after two.
MEET_S = 3.5
HANDSHAKE_S = 10.0
ASK_TIMEOUT_S = 6.0
MAX_INTRODUCERS = 4
#: Meetings under way that were asked for by others.
MAX_MEETINGS = 16


@dataclass(frozen=True)
class Route:
    """How a peer is reached, and why so: "direct", "punched" or "relayed"."""

    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


class MeetingDesk:
    """Has `node` introduced when it cannot reach somebody, and meets those that are introduced to it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._routes: dict[NodeKey, Route] = {}
        self._reaching: set[NodeKey] = set()  # by our wish
        self._meeting: set[NodeKey] = set()  # by theirs
        node.serve(self)
        node.on_unreachable = self.reach
        node.on_peer_lost(lambda peer, reason: self._forget(peer))

    def route_to(self, node_key: NodeKey) -> Route:
        """How a connected peer is reached."""
        with self._lock:
            return self._routes.get(node_key, Route("direct", "one of us could dial the other"))

    # -- by our wish --------------------------------------------------------------------------------------------------

    def reach(self, node_key: NodeKey, deadline_s: float, failure: SmartnodesError) -> Connection:
        """A connection to a peer that could not be dialled. Raises PeerUnreachableError that says what was tried.

        When both want each other at once, the one with the smaller key has itself introduced, and the other waits.
        """
        with self._lock:
            is_met = node_key in self._meeting
            self._reaching.add(node_key)
        try:
            found = self._node.wait_connected(node_key, _wait_until(deadline_s)) if is_met else None
            return found or self._reach(node_key, deadline_s, [str(failure)])
        finally:
            with self._lock:
                self._reaching.discard(node_key)

    def _reach(self, node_key: NodeKey, deadline_s: float, tried: list[str]) -> Connection:
        introducers = self._introducers(node_key)
        for means in ("punch", "circuit"):
            for introducer in introducers:
                if time.monotonic() >= deadline_s:
                    break
                try:
                    connection = self._reach_by(means, introducer, node_key, deadline_s)
                except AuthorityError:
                    raise
                except SmartnodesError as error:
                    if isinstance(error, DuplicateConnectionError):
                        found = self._node.wait_connected(node_key, _wait_until(deadline_s))
                        if found is not None:
                            return found
                    tried.append(f"{means} through {introducer}: {error}")
                    logger.info("%s is not reached by %s through %s: %s", node_key.hex()[:8], means, introducer, error)
                    if isinstance(error, DeadlineError):  # another introducer would see the same routers
                        break
                    continue
                self._took(node_key, "punched" if means == "punch" else "relayed", introducer, tried)
                return connection
        if not introducers:
            tried.append("no node that we are connected to introduces peers")
        raise PeerUnreachableError(f"node {node_key.hex()[:16]} is not reached: {'; '.join(tried)}") from None

    def _introducers(self, node_key: NodeKey) -> list[Peer]:
        peers = [peer for peer in self._node.peers() if peer.node_key != node_key]
        return sorted(peers, key=lambda peer: (not _may_have_meet(peer), peer.node_key))[:MAX_INTRODUCERS]

    def _reach_by(self, means: str, introducer: Peer, node_key: NodeKey, deadline_s: float) -> Connection:
        try:
            connect = self._punch if means == "punch" else self._join
            tcp, endpoint = connect(introducer, node_key, deadline_s)
        except AuthorityError as error:  # the introducer's, not the peer's
            raise PeerUnreachableError(str(error)) from None
        return self._node.adopt(tcp, node_key, endpoint, deadline_s, asked=True)

    def _punch(self, introducer: Peer, node_key: NodeKey, deadline_s: float) -> tuple[socket.socket, str]:
        if not _may_have_meet(introducer):
            raise PeerUnreachableError("it is no validator")
        port = self._port_seen_by(introducer)
        endpoint = text_in(self._ask(introducer, "punch", node_key, deadline_s), "endpoint")
        return open_from_both_sides(port, endpoint, min(deadline_s, time.monotonic() + MEET_S)), endpoint

    def _join(self, introducer: Peer, node_key: NodeKey, deadline_s: float) -> tuple[socket.socket, str]:
        told = self._ask(introducer, "circuit", node_key, deadline_s)
        endpoint = _beside(introducer, count_in(told, "port", 65535))
        token = bytes_in(told, "token", TOKEN_BYTES)
        return join_circuit(endpoint, token, max(0.001, deadline_s - time.monotonic())), endpoint

    def _ask(self, introducer: Peer, method: str, node_key: NodeKey, deadline_s: float) -> dict[str, Any]:
        timeout_s = max(0.001, min(ASK_TIMEOUT_S, deadline_s - time.monotonic()))
        return self._node.call(introducer.node_key, method, {"node": node_key}, timeout_s=timeout_s).params

    def _port_seen_by(self, introducer: Peer) -> int:
        """Our port whose outside port it sees."""
        address = self._node.local_address_to(introducer.node_key)
        if address is None:
            raise PeerUnreachableError(f"{introducer} dialled us, so that it knows no port from which we go out")
        return address[1]

    def _took(self, node_key: NodeKey, kind: str, introducer: Peer, tried: list[str]) -> None:
        route = Route(kind, f"through {introducer}, because: {'; '.join(tried)}")
        COUNTERS.add("introductions", kind)
        with self._lock:
            self._routes[node_key] = route
        logger.info("%s is reached %s", node_key.hex()[:8], route)

    def _forget(self, node_key: NodeKey) -> None:
        with self._lock:
            self._routes.pop(node_key, None)

    # -- by theirs ----------------------------------------------------------------------------------------------------

    @allow(max_body_bytes=0)
    def rpc_meet(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Somebody wants to connect: do so from the port that the caller knows, at once. Any address may be named, so
        that only a validator is heard."""
        if not _may_have_meet(caller):
            raise AuthorityError("only validators have nodes meet")
        node_key, endpoint = digest_in(params, "node"), text_in(params, "endpoint")
        port = self._port_seen_by(caller)
        split_endpoint(endpoint)
        self._meet(
            node_key,
            "punched",
            caller,
            endpoint,
            lambda: open_from_both_sides(port, endpoint, time.monotonic() + MEET_S),
        )

    @allow(max_body_bytes=0)
    def rpc_join_circuit(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Somebody wants to connect through the caller's relay, which is on the caller's own machine."""
        node_key, token = digest_in(params, "node"), bytes_in(params, "token", TOKEN_BYTES)
        endpoint = _beside(caller, count_in(params, "port", 65535))
        self._meet(node_key, "relayed", caller, endpoint, lambda: join_circuit(endpoint, token, HANDSHAKE_S))

    def _meet(self, node_key: NodeKey, kind: str, caller: Peer, endpoint: str, connect: Callable[[], Any]) -> None:
        with self._lock:
            if node_key in self._meeting or (node_key in self._reaching and self._node.node_key < node_key):
                raise DuplicateConnectionError("a connection between us is just being made")
            if len(self._meeting) >= MAX_MEETINGS:
                raise BusyError(f"{MAX_MEETINGS} nodes are being met here: ask again in a moment")
            self._meeting.add(node_key)

        def run() -> None:
            try:
                self._node.adopt(connect(), node_key, endpoint, time.monotonic() + HANDSHAKE_S, asked=False)
                self._took(node_key, kind, caller, ["it asked for it"])
            except SmartnodesError as error:
                logger.info("%s was not met: %s", node_key.hex()[:8], error)
            finally:
                with self._lock:
                    self._meeting.discard(node_key)

        threading.Thread(target=run, name="meet", daemon=True).start()


def _may_have_meet(peer: Peer) -> bool:
    """Whether it may name addresses to be dialled: validators may, and where there is no chain everybody."""
    return peer.role in (None, "validator")


def _wait_until(deadline_s: float) -> float:
    """So long the other side's introduction may take before another is tried."""
    return min(deadline_s, time.monotonic() + MEET_S + 1.0)


def _beside(peer: Peer, port: int) -> str:
    """Another port of a connected peer's machine."""
    if not port:
        raise ProtocolError("a relay's port is 1 to 65535")
    return join_endpoint(split_endpoint(peer.endpoint)[0], port)
