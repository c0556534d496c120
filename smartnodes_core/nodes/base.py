"""A node: one identity on the network, with its connections, what it serves and whom it calls.

Roles (`user.py`, `worker.py`, `validator.py`) are objects that a node serves. Nothing here imports the chain's
client: the authority is given, and a node listens before web3 is loaded.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Unpack
from weakref import WeakKeyDictionary

from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    ConfigError,
    ConnectionLostError,
    PeerUnreachableError,
    SmartnodesError,
    Unavailable,
)
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.authority import Authority, WatchingAuthority
from smartnodes_core.nodes.bulk_links import ARRIVAL_S, BulkLinks
from smartnodes_core.nodes.links import AddressBook, Links
from smartnodes_core.records import SignedBinding
from smartnodes_core.rpc import CallOptions, PendingCall, Reply, Result, RpcEndpoint, Version, allow
from smartnodes_core.rpc.pace import MAX_DEADLINE_S
from smartnodes_core.transport.base import (
    SEND_TIMEOUT_S,
    Admit,
    Connection,
    DuplicateConnectionError,
    Listener,
    Peer,
    Transport,
)
from smartnodes_core.wire import Buffer

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0
_INBOUND_WAIT_S = 1.0
#: So long a peer is dialled before others are asked to introduce us.
DIRECT_S = 4.0


class Node:
    """A node of the network; `start` listens at `endpoint` (port 0: any free one; None: dial only).

    Beside a connection that it dials it has `num_bulk_connections` for tensors: several where losses hold one back.

    Methods taking a `node_key` dial by themselves when there is no connection, at the endpoints given to
    `add_address`. They raise PeerUnreachableError, AuthorityError, DeadlineError, ConnectionLostError, BusyError, or
    what the peer raised.
    """

    def __init__(
        self,
        identity: Identity,
        signed_binding: SignedBinding | None,
        transport: Transport,
        authority: Authority,
        endpoint: str | None = "127.0.0.1:0",
        num_bulk_connections: int = 1,
    ) -> None:
        self.identity, self.signed_binding = identity, signed_binding
        self.node_key = identity.node_key
        self._transport, self._authority, self._wanted_endpoint = transport, authority, endpoint
        self._addresses = AddressBook()
        self._links = Links(self.node_key)
        self._bulk = BulkLinks()
        self._num_bulk_connections = num_bulk_connections
        self._reasons: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()  # why we closed what is ending
        self._lost_callbacks: list[Callable[[bytes, str], None]] = []
        #: Looks up where a peer is of whom no address is known, in so many seconds, and calls `add_address`.
        self.find_address: Callable[[bytes, float], None] | None = None
        #: Asked for a connection to a peer that cannot be dialled, with the deadline and the failure; None: nobody is.
        self.on_unreachable: Callable[[bytes, float, SmartnodesError], Connection] | None = None
        self._rpc = RpcEndpoint(f"calls {self.node_key.hex()[:8]}", opened=self._opened, lost=self._lost)
        self._listener: Listener | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._rpc.serve(self)

    def __repr__(self) -> str:
        return (
            f"Node({self.node_key.hex()[:8]} at {self._listener.endpoint if self._listener else None}, {self._links!r})"
        )

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listens and begins to watch the chain. Raises PortInUseError, ConfigError."""
        with self._lock:
            if self._wanted_endpoint is not None and self._listener is None:
                self._listener = self._transport.listen(self._wanted_endpoint, self._rpc, self._admit_inbound)
        if isinstance(self._authority, WatchingAuthority):
            self._authority.start(self._check_live_peers)

    def stop(self) -> None:
        """Closes everything and waits for the threads; quiet, harmless when repeated."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        if self._listener is not None:
            self._listener.close()
        if isinstance(self._authority, WatchingAuthority):
            self._authority.stop()
        connections = [*self._links.all(), *self._bulk.all()]
        for connection in connections:
            connection.close("the node is stopping")
        for connection in connections:
            if not connection.join(3.0):
                logger.warning("%r did not end in time", connection)
        self._rpc.stop()

    def renew(self, signed_binding: SignedBinding) -> None:
        """Shows a new binding of this node's key to new connections. Peers drop the others when the one that they were
        shown expires, and are reached again.
        """
        self._transport.renew(signed_binding)
        self.signed_binding = signed_binding

    @property
    def endpoint(self) -> str:
        """Where this node listens. Raises ConfigError when it does not."""
        if self._listener is None:
            raise ConfigError("this node does not listen: start it with an endpoint")
        return self._listener.endpoint

    # -- what it serves -----------------------------------------------------------------------------------------------

    def serve(self, obj: object) -> None:
        """Lets peers call the methods of `obj` named `rpc_…`; see `rpc.allow`."""
        self._rpc.serve(obj)

    def declare(self, message: str, version: Version, oldest_major: int | None = None) -> None:
        """Says which version of a message this node speaks (of a stream: `stream_of(topic)`): see `rpc/versions.py`."""
        self._rpc.versions.declare(message, version, oldest_major)

    def on_stream(
        self,
        topic: str,
        allocate: Callable[[Peer, dict[str, Any], int], memoryview],
        receive: Callable[[Peer, dict[str, Any], memoryview], None],
    ) -> None:
        """Takes tensors of `topic` from peers, on the connections' threads; see `rpc.serving.StreamReceiver`."""
        self._rpc.on_stream(topic, allocate, receive)

    def on_peer_lost(self, callback: Callable[[bytes, str], None]) -> None:
        """Has `callback(node_key, reason)` called, on the connection's thread, when a peer's connection ends (not at
        `stop`).
        """
        self._lost_callbacks.append(callback)

    @allow(max_body_bytes=0)
    def rpc_binding(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """This node's own binding with both its signatures: validators ask for it before a round admits its account."""
        if self.signed_binding is None:
            raise ConfigError("this node has no account")
        return {}, [self.signed_binding.encode()]

    @allow(max_body_bytes=0)
    def rpc_open_bulk(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Dials a bulk connection to a peer that we dialled: it has tensors for us, and may not be able to reach us."""
        calls = self._links.get(caller.node_key)
        if calls is None or not calls.dialled:
            raise BusyError("the connection between us is just being replaced: ask again")
        self._open_bulk(calls, time.monotonic() + DIAL_TIMEOUT_S)
        return {}

    # -- whom it calls ------------------------------------------------------------------------------------------------

    def connect(self, endpoint: str, node_key: bytes | None = None, timeout_s: float = DIAL_TIMEOUT_S) -> Peer:
        """Connects to whoever is at `endpoint`, who must own `node_key` if that is given, and remembers the address."""
        if node_key is not None:
            self.add_address(node_key, endpoint)
            return self._connection(node_key, timeout_s).peer
        connection = self._dial_unknown(endpoint, time.monotonic() + timeout_s)
        self._rpc.used(connection, passing=False)
        self._addresses.add(connection.peer.node_key, endpoint)
        return connection.peer

    def reach(
        self,
        node_key: bytes,
        timeout_s: float = DIAL_TIMEOUT_S,
        *,
        hearsay: Sequence[str] = (),
        passing: bool = False,
    ) -> Peer:
        """Connects to a peer unless it is connected, so that it can call a node that does not listen.

        `hearsay` are endpoints that some third node named: they are tried last, and kept only if the peer is there.
        With `passing` the connection is for passing calls, and `close_idle` may close it.
        """
        return self._connection(node_key, timeout_s, hearsay, passing=passing).peer

    def add_address(self, node_key: bytes, endpoint: str) -> None:
        """Remembers where a peer is reached, from a signed announcement or the user's settings."""
        self._addresses.add(node_key, endpoint)

    def call(
        self,
        node_key: bytes,
        method: str,
        params: dict[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        *,
        bulk: bool = False,
        **options: Unpack[CallOptions],
    ) -> Reply:
        """Calls `method` of a peer; `timeout_s` covers dialling too. With `bulk` it goes over a bulk connection, which
        is better for bodies and replies of megabytes.
        """
        return self.begin_call(node_key, method, params, body, bulk=bulk, **options).result()

    def begin_call(
        self,
        node_key: bytes,
        method: str,
        params: dict[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        *,
        bulk: bool = False,
        **options: Unpack[CallOptions],
    ) -> PendingCall:
        """As `call`, but returns when the call is queued; see `RpcEndpoint.begin_call`."""
        timeout_s = options.get("timeout_s", MAX_DEADLINE_S)
        deadline_s = time.monotonic() + timeout_s
        connection = self._connection(node_key, timeout_s, passing=options.get("passing", False))
        COUNTERS.add("calls_made", method)
        if bulk:
            connection = self._open_bulk(connection, deadline_s)[0]
        if "timeout_s" in options:
            options["timeout_s"] = max(0.001, deadline_s - time.monotonic())
        return self._rpc.begin_call(connection, method, params, body, **options)

    def notify(
        self,
        node_key: bytes,
        method: str,
        params: dict[str, Any] | None = None,
        body: Sequence[Buffer] = (),
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Calls `method` of a peer without an answer; its notifications are handled in the order in which they were
        sent.
        """
        self._rpc.notify(self._connection(node_key, timeout_s), method, params, body, timeout_s=timeout_s)

    def stream(
        self,
        node_key: bytes,
        topic: str,
        header: dict[str, Any],
        body: Sequence[Buffer],
        on_sent: Callable[[], None] | None = None,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Sends a tensor, uncopied: `body` must not change until `on_sent` (see `Connection.send`).

        It goes over bulk connections, in no order with anything else: large ones in pieces over all that there are.
        """
        deadline_s = time.monotonic() + timeout_s
        connections = self._open_bulk(self._connection(node_key, timeout_s), deadline_s)
        self._rpc.stream(connections, topic, header, body, on_sent, timeout_s)

    def peers(self) -> list[Peer]:
        """Those connected now."""
        return [connection.peer for connection in self._links.all() if not connection.closed]

    def drop(self, node_key: bytes, reason: str) -> None:
        """Ends the connection to a peer, if there is one."""
        connection = self._links.get(node_key)
        if connection is not None:
            logger.info("dropping %s: %s", connection.peer, reason)
            self._close(connection, reason)

    def close_idle(self, idle_s: float, keep: Callable[[Peer], bool] = lambda peer: False) -> int:
        """Closes connections that this node dialled for passing calls and that were not used for `idle_s`, but those to
        peers that are to be kept; how many. Whoever is called again is dialled again.
        """
        dialled = [
            connection
            for connection in self._links.all()
            if connection.dialled and not getattr(connection, "introduced", False) and not keep(connection.peer)
        ]
        return self._rpc.close_idle(dialled, idle_s, lambda each: self._close(each, "nobody needs it now"))

    # -- connections --------------------------------------------------------------------------------------------------

    def _connection(
        self, node_key: bytes, timeout_s: float, hearsay: Sequence[str] = (), *, passing: bool = False
    ) -> Connection:
        connection = self._links.get(node_key)
        if connection is not None and self._rpc.used(connection, passing=passing):
            return connection
        if node_key == self.node_key:
            raise PeerUnreachableError("a node does not call itself over the network")
        deadline_s = time.monotonic() + min(timeout_s, DIAL_TIMEOUT_S)
        if self.find_address is not None and not hearsay and not self._addresses.knows(node_key):
            self.find_address(node_key, min(timeout_s, DIAL_TIMEOUT_S))
        found = self._links.begin_dialling(node_key, deadline_s)
        if found is None:
            try:
                found = self._dial_any(node_key, deadline_s, hearsay)
            finally:
                self._links.end_dialling(node_key)
        self._rpc.used(found, passing=passing)
        return found

    def _open_bulk(self, calls: Connection, deadline_s: float) -> list[Connection]:
        """The bulk connections beside `calls`, made by whoever dialled that one; beside one that came about by
        introduction there are none, and it carries tensors itself.
        """
        if getattr(calls, "introduced", False):
            return [calls]
        deadline_s = min(deadline_s, time.monotonic() + DIAL_TIMEOUT_S)

        def open_all() -> None:
            left_s = max(0.001, deadline_s - time.monotonic())
            peer, dial = calls.peer, self._transport.dial
            if not calls.dialled:
                self._rpc.call(calls, "open_bulk", timeout_s=left_s)
                return
            for _ in range(self._num_bulk_connections):
                dial(peer.endpoint, self._rpc, self._admit_dialled, peer.node_key, left_s, bulk=True)

        return self._bulk.get(calls, deadline_s, open_all)

    def _dial_any(self, node_key: bytes, deadline_s: float, hearsay: Sequence[str] = ()) -> Connection:
        failure: SmartnodesError | None = None
        others = self.on_unreachable is not None and any(peer.node_key != node_key for peer in self.peers())
        known: list[str] = []
        if self._addresses.knows(node_key) or not hearsay:
            try:
                known = self._addresses.of(node_key)
            except PeerUnreachableError as error:
                failure = error
        dial_by_s = min(deadline_s, time.monotonic() + DIRECT_S) if others else deadline_s
        for endpoint in dict.fromkeys([*known, *hearsay]):
            while time.monotonic() < dial_by_s:
                try:
                    connection = self._dial(endpoint, node_key, dial_by_s)
                    self._addresses.add(node_key, endpoint)
                    return connection
                except DuplicateConnectionError as error:
                    failure = error
                    wait_until_s = min(deadline_s, time.monotonic() + _INBOUND_WAIT_S)
                    found = self._links.wait_for(node_key, wait_until_s)
                    if found is not None:
                        return found
                except (Unavailable, AuthorityError) as error:
                    failure = error
                    break
        failure = failure or PeerUnreachableError(f"node {node_key.hex()[:16]} was not reached in time")
        if (
            self.on_unreachable is None
            or not others
            or hearsay
            or isinstance(failure, DuplicateConnectionError | AuthorityError)
        ):
            raise failure
        return self.on_unreachable(node_key, deadline_s, failure)

    def _dial_unknown(self, endpoint: str, deadline_s: float) -> Connection:
        """Dials an endpoint of which only the address is known; a connection to who answers there is used again."""
        seen: list[bytes] = []
        claimed: list[bytes] = []

        def admit(peer: Peer) -> None:
            self._admit_dialled(peer)
            seen.append(peer.node_key)
            self._links.claim(peer.node_key)
            claimed.append(peer.node_key)

        try:
            return self._dial(endpoint, None, deadline_s, admit)
        except DuplicateConnectionError:
            wait_until_s = min(deadline_s, time.monotonic() + _INBOUND_WAIT_S)
            found = self._links.wait_for(seen[0], wait_until_s) if seen else None
            if found is None:
                raise
            return found
        finally:
            for node_key in claimed:
                self._links.end_dialling(node_key)

    def _dial(self, endpoint: str, node_key: bytes | None, deadline_s: float, admit: Admit | None = None) -> Connection:
        if self._stopped:
            raise ConnectionLostError("this node is stopping")
        timeout_s = max(0.001, deadline_s - time.monotonic())
        connection = self._transport.dial(endpoint, self._rpc, admit or self._admit_dialled, node_key, timeout_s)
        self._links.wait_for(connection.peer.node_key, deadline_s)  # `_opened` runs on its own thread
        return connection

    def wait_connected(self, node_key: bytes, deadline_s: float) -> Connection | None:
        """The connection to a peer that is being made by others, or None if there is none by then."""
        return self._links.wait_for(node_key, deadline_s)

    def local_address_to(self, node_key: bytes) -> tuple[str, int] | None:
        """The address from which this node dialled a connected peer; None where the peer dialled, or there is none."""
        connection = self._links.get(node_key)
        if connection is None or not connection.dialled:
            return None
        found: tuple[str, int] | None = getattr(connection, "local_address", None)
        return found

    def adopt(
        self, tcp: socket.socket, node_key: bytes, endpoint: str, deadline_s: float, *, asked: bool
    ) -> Connection:
        """Makes a TCP connection with the owner of `node_key`, however it came about, one of this node's. `asked` says
        that this side wanted it. Of both sides the one with the smaller key begins the handshake. Raises as `call`.
        """
        adopt = getattr(self._transport, "adopt", None)
        if adopt is None:
            tcp.close()
            raise ConfigError("this transport makes its own connections only")
        connection: Connection = adopt(
            tcp,
            self._rpc,
            self._admit_dialled if asked else self._admit_inbound,
            node_key,
            dialled=self.node_key < node_key,
            endpoint=endpoint,
            deadline_s=deadline_s,
        )
        self._links.wait_for(node_key, deadline_s)
        return connection

    def _admit_dialled(self, peer: Peer) -> None:
        if peer.node_key == self.node_key:
            raise AuthorityError(f"{peer.endpoint} is this node itself")
        self._authority.admit(peer)

    def _admit_inbound(self, peer: Peer) -> None:
        if self._stopped:
            raise ConnectionLostError("this node is stopping")
        try:
            self._authority.admit(peer)
        except AuthorityError:
            COUNTERS.add("refused_peers", "at the door")
            raise
        if peer.bulk:
            self._bulk.check(peer, self._links.wait_for(peer.node_key, time.monotonic() + ARRIVAL_S))
        else:
            self._links.check_inbound(peer)

    def _opened(self, connection: Connection) -> None:
        if connection.peer.bulk:
            calls = self._links.get(connection.peer.node_key)
            if calls is None:
                connection.close("the connection for calls has ended")
                return
            self._bulk.add(connection, calls)
            self._rpc.used(calls, passing=False)
            if calls.closed:  # it may have ended before it knew of this one
                self._close_bulk(calls, "the connection for calls has ended")
        else:
            self._links.add(connection)
            COUNTERS.add("connections", connection.peer.role or "none")
        if self._stopped:
            connection.close("the node is stopping")

    def _close(self, connection: Connection, reason: str) -> None:
        self._reasons[connection] = reason
        connection.close(reason)

    def _lost(self, connection: Connection, error: Exception | None) -> None:
        reason = str(error) if error is not None else "closed by this node"
        if connection.peer.bulk:
            calls = self._bulk.remove(connection)
            if calls is not None and not calls.closed and not self._stopped:
                self._close(calls, f"its bulk connection ended: {reason}")
            return
        reason = self._reasons.pop(connection, reason)
        self._close_bulk(connection, reason)
        if not self._links.remove(connection) or self._stopped:
            return
        COUNTERS.add("lost_connections", connection.peer.role or "none")
        logger.info("lost %s: %s", connection.peer, reason)
        for callback in self._lost_callbacks:
            try:
                callback(connection.peer.node_key, reason)
            except Exception:
                logger.exception("a callback for lost peers failed")

    def _close_bulk(self, calls: Connection, reason: str) -> None:
        for bulk in self._bulk.take_beside(calls):
            bulk.close(reason)

    def _check_live_peers(self) -> None:
        if not isinstance(self._authority, WatchingAuthority):
            return
        for connection in self._links.all():
            try:
                self._authority.check(connection.peer)
            except AuthorityError as error:
                logger.warning("dropping %s: %s", connection.peer, error)
                COUNTERS.add("refused_peers", "while connected")
                self._close(connection, str(error))
