"""A node's connections, one for each peer, and where peers are reached.

When both sides dial at once, the connection dialled by the smaller node key stays: the owner of that key refuses the
other during its handshake, before anything was sent on it, and the other side waits for the one that is coming.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from smartnodes_core.errors import ConfigError, PeerUnreachableError
from smartnodes_core.transport.base import Connection, DuplicateConnectionError, Peer, split_endpoint

FRESH_S = 2.0
ARRIVAL_S = 1.0
MAX_ENDPOINTS_PER_PEER = 4
MAX_ADDRESSES = 10_000


class AddressBook:
    """Endpoints of peers, the newest first; the peers unheard of for longest are forgotten over MAX_ADDRESSES."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endpoints: OrderedDict[bytes, list[str]] = OrderedDict()

    def add(self, node_key: bytes, endpoint: str) -> None:
        """Raises ConfigError for what is no endpoint."""
        split_endpoint(endpoint)
        if len(node_key) != 32:
            raise ConfigError(f"a node key has 32 bytes, not {len(node_key)}")
        with self._lock:
            known = [each for each in self._endpoints.get(node_key, []) if each != endpoint]
            self._endpoints[node_key] = [endpoint, *known][:MAX_ENDPOINTS_PER_PEER]
            self._endpoints.move_to_end(node_key)
            while len(self._endpoints) > MAX_ADDRESSES:
                self._endpoints.popitem(last=False)

    def knows(self, node_key: bytes) -> bool:
        """Whether any endpoint of a peer is known."""
        with self._lock:
            return bool(self._endpoints.get(node_key))

    def of(self, node_key: bytes) -> list[str]:
        """Raises PeerUnreachableError when nothing is known."""
        with self._lock:
            endpoints = list(self._endpoints.get(node_key, []))
        if not endpoints:
            raise PeerUnreachableError(
                f"no address is known of node {node_key.hex()[:16]}: find it in the directory first"
            )
        return endpoints


class Links:
    """The table of live connections, and who is being dialled. Knows nothing of frames."""

    def __init__(self, own_key: bytes) -> None:
        self._own_key = own_key
        self._changed = threading.Condition()
        self._live: dict[bytes, tuple[Connection, float]] = {}
        self._every: set[Connection] = set()  # with those replaced and not yet ended
        self._dialling: set[bytes] = set()
        self._arriving: dict[bytes, float] = {}  # admitted by us, until when they are waited for

    def __repr__(self) -> str:
        return f"Links({len(self._live)} peers, {len(self._dialling)} being dialled)"

    def get(self, node_key: bytes) -> Connection | None:
        """The live connection to a peer."""
        with self._changed:
            found = self._live.get(node_key)
        return None if found is None or found[0].closed else found[0]

    def all(self) -> list[Connection]:
        """Every connection that has not ended."""
        with self._changed:
            return list(self._every)

    def add(self, connection: Connection) -> None:
        """Takes an open connection in; an older one to the same peer is closed."""
        with self._changed:
            older = self._live.get(connection.peer.node_key)
            self._live[connection.peer.node_key] = (connection, time.monotonic())
            self._every.add(connection)
            self._arriving.pop(connection.peer.node_key, None)
            self._changed.notify_all()
        if older is not None and older[0] is not connection:
            older[0].close("replaced by a newer connection")

    def remove(self, connection: Connection) -> bool:
        """Takes an ended connection out; True when it was the one in use, so that the peer is lost."""
        with self._changed:
            self._every.discard(connection)
            found = self._live.get(connection.peer.node_key)
            current = found is not None and found[0] is connection
            if current:
                del self._live[connection.peer.node_key]
            self._changed.notify_all()
        return current

    def check_inbound(self, peer: Peer) -> None:
        """Raises DuplicateConnectionError when the connection that is being opened to us is the one to give up."""
        if peer.node_key == self._own_key:
            raise DuplicateConnectionError("this is the node itself")
        now_s = time.monotonic()
        with self._changed:
            found = self._live.get(peer.node_key)
            fresh = found is not None and not found[0].closed and now_s - found[1] < FRESH_S
            ours_first = peer.node_key in self._dialling and self._own_key < peer.node_key
            if fresh or ours_first or self._is_arriving(peer.node_key, now_s):
                raise DuplicateConnectionError("a connection between us exists or is just being made")
            # from here until it is open, nobody here dials this peer
            self._arriving[peer.node_key] = now_s + ARRIVAL_S

    def claim(self, node_key: bytes) -> None:
        """As `begin_dialling` for a peer whose key was learned while dialling; the caller must call `end_dialling`.

        Raises DuplicateConnectionError when there is a connection, or one is being made.
        """
        with self._changed:
            found = self._live.get(node_key)
            alive = found is not None and not found[0].closed
            if alive or node_key in self._dialling or self._is_arriving(node_key, time.monotonic()):
                raise DuplicateConnectionError("a connection to this peer exists or is just being made")
            self._dialling.add(node_key)

    def begin_dialling(self, node_key: bytes, deadline_s: float) -> Connection | None:
        """Waits until nobody else dials this peer: the connection that they made, or None, and the caller dials and
        must call `end_dialling`. Raises PeerUnreachableError at the deadline."""
        with self._changed:
            while True:
                found = self._live.get(node_key)
                if found is not None and not found[0].closed:
                    return found[0]
                now_s = time.monotonic()
                arriving = self._is_arriving(node_key, now_s)
                if node_key not in self._dialling and not arriving:
                    self._dialling.add(node_key)
                    return None
                if now_s >= deadline_s:
                    raise PeerUnreachableError(
                        f"node {node_key.hex()[:16]} is being dialled and did not answer in time"
                    )
                self._changed.wait(min(deadline_s, self._arriving[node_key] if arriving else deadline_s) - now_s)

    def end_dialling(self, node_key: bytes) -> None:
        """The counterpart of `begin_dialling`."""
        with self._changed:
            self._dialling.discard(node_key)
            self._changed.notify_all()

    def wait_for(self, node_key: bytes, deadline_s: float) -> Connection | None:
        """The connection that the peer is opening to us, or None if none came by then."""
        with self._changed:
            while True:
                found = self._live.get(node_key)
                if found is not None and not found[0].closed:
                    return found[0]
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)

    def _is_arriving(self, node_key: bytes, now_s: float) -> bool:
        until_s = self._arriving.get(node_key)
        if until_s is not None and until_s <= now_s:
            del self._arriving[node_key]  # admitted, and never came
            return False
        return until_s is not None
