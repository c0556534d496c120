"""Peers' calls being served: quotas, order of notifications, and the replies."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from smartnodes_core.errors import BusyError, ConnectionLostError, RemoteError, SmartnodesError
from smartnodes_core.remote_errors import to_wire
from smartnodes_core.rpc.pool import WorkerPool
from smartnodes_core.rpc.serving import Method, Result
from smartnodes_core.rpc.versions import FIRST, Version, Versions
from smartnodes_core.transport.base import Connection
from smartnodes_core.wire import Header

logger = logging.getLogger(__name__)

MAX_CALLS_PER_PEER = 16
MAX_WAITING_CALLS_PER_PEER = 64
ID_WINDOW = 4096  # how far behind the highest id of its connection a call may come
MAX_NOTIFICATIONS = 4096
MAX_NOTIFICATION_BYTES = 256 << 20
_NOTIFICATIONS_IN_A_ROW = 16  # then the next peer has its turn


@dataclass(frozen=True, eq=False)
class _Inbound:
    connection: Connection
    method: Method
    header: Header
    body: memoryview
    arrived_s: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)


_current: ContextVar[_Inbound] = ContextVar("call being served")


def is_cancelled() -> bool:
    """For a handler that works long: whether its caller has given up, or is gone, so that it may as well stop."""
    inbound = _current.get(None)
    return inbound is not None and (inbound.cancelled.is_set() or inbound.connection.closed)


def called_version() -> Version:
    """For a handler that understands several: the version in which it is called."""
    inbound = _current.get(None)
    return FIRST if inbound is None else Version(*inbound.header.get("version", FIRST))


class _SeenIds:
    """Which ids a connection's calls had: each is run once. Ids rise, but for calls that overtake each other."""

    def __init__(self) -> None:
        self._highest = 0
        self._seen: set[int] = set()

    def is_new(self, call_id: int) -> bool:
        """False for an id that was there before, or is too old to tell."""
        if call_id in self._seen or call_id <= self._highest - ID_WINDOW:
            return False
        self._seen.add(call_id)
        self._highest = max(self._highest, call_id)
        if len(self._seen) > 2 * ID_WINDOW:
            self._seen = {each for each in self._seen if each > self._highest - ID_WINDOW}
        return True


@dataclass
class _Load:
    """What one peer has given us to do."""

    num_calls: int = 0
    arriving: dict[Connection, tuple[bool, int]] = field(default_factory=dict)  # bodies being read: a call?, its size
    running: list[_Inbound] = field(default_factory=list)
    waiting: deque[_Inbound] = field(default_factory=deque)
    notifications: deque[_Inbound] = field(default_factory=deque)
    num_notifications: int = 0
    notification_bytes: int = 0
    draining: bool = False


class InboundCalls:
    """Runs what `RpcEndpoint` lets in on the pool, at most MAX_CALLS_PER_PEER at once for each peer."""

    def __init__(self, pool: WorkerPool, versions: Versions) -> None:
        self._pool, self._versions = pool, versions
        self._lock = threading.Lock()
        self._loads: dict[bytes, _Load] = {}
        self._seen: dict[Connection, _SeenIds] = {}

    def is_new(self, connection: Connection, call_id: int) -> bool:
        """Whether a call has not come before on its connection."""
        with self._lock:
            return self._seen.setdefault(connection, _SeenIds()).is_new(call_id)

    def reserve(self, connection: Connection, *, is_call: bool, num_bytes: int) -> None:
        """Counts a frame whose body is about to be read. Raises BusyError when the peer has too much waiting here.

        A peer that overruns its queue of notifications loses the connection: dropping some would break their order.
        """
        with self._lock:
            load = self._loads.setdefault(connection.peer.node_key, _Load())
            if is_call:
                if load.num_calls >= MAX_CALLS_PER_PEER + MAX_WAITING_CALLS_PER_PEER:
                    raise BusyError(
                        f"{load.num_calls} of your calls are running or waiting here: wait for some of them"
                    )
                load.num_calls += 1
                load.arriving[connection] = (True, num_bytes)
                return
            full = load.num_notifications >= MAX_NOTIFICATIONS or (
                load.num_notifications and load.notification_bytes + num_bytes > MAX_NOTIFICATION_BYTES
            )
            if not full:
                load.num_notifications += 1
                load.notification_bytes += num_bytes
                load.arriving[connection] = (False, num_bytes)
                return
        connection.close("too many notifications are waiting to be handled")
        raise BusyError(f"{load.num_notifications} notifications of {connection.peer} are waiting")

    def take(self, connection: Connection, method: Method, header: Header, body: memoryview) -> None:
        """Runs a frame that was reserved."""
        inbound = _Inbound(connection, method, header, body)
        with self._lock:
            load = self._loads[connection.peer.node_key]
            del load.arriving[connection]
            if header["kind"] == "notify":
                load.notifications.append(inbound)
                if load.draining:
                    return
                load.draining = True
            elif len(load.running) >= MAX_CALLS_PER_PEER:
                load.waiting.append(inbound)
                return
            else:
                load.running.append(inbound)
        if header["kind"] == "notify":
            self._pool.run(lambda: self._drain(load))
        else:
            self._pool.run(lambda: self._serve(load, inbound))

    def cancel(self, connection: Connection, call_id: int) -> None:
        """The caller waits no more: a call that has not begun is not, one that runs is told and not answered."""
        with self._lock:
            load = self._loads.get(connection.peer.node_key, _Load())
            for inbound in [*load.waiting, *load.running]:
                if inbound.connection is connection and inbound.header["id"] == call_id:
                    inbound.cancelled.set()
            self._drop_waiting(load, lambda inbound: inbound.cancelled.is_set())

    def forget(self, connection: Connection) -> None:
        """The connection ended: nobody waits for what has not begun. Notifications that arrived are still handled."""
        with self._lock:
            self._seen.pop(connection, None)
            load = self._loads.get(connection.peer.node_key)
            if load is None:
                return
            self._drop_waiting(load, lambda inbound: inbound.connection is connection)
            is_call, num_bytes = load.arriving.pop(connection, (None, 0))
            if is_call is not None:  # a body that will never be whole
                load.num_calls -= is_call
                load.num_notifications -= not is_call
                load.notification_bytes -= 0 if is_call else num_bytes
            self._drop_idle(connection.peer.node_key, load)

    def _drop_idle(self, node_key: bytes, load: _Load) -> None:
        if not load.num_calls and not load.num_notifications and self._loads.get(node_key) is load:
            del self._loads[node_key]

    def _drop_waiting(self, load: _Load, dropped: Callable[[_Inbound], bool]) -> None:
        left = deque(inbound for inbound in load.waiting if not dropped(inbound))
        load.num_calls -= len(load.waiting) - len(left)
        load.waiting = left

    def _serve(self, load: _Load, inbound: _Inbound) -> None:
        _current.set(inbound)
        try:
            self._answer(inbound)
        finally:
            with self._lock:
                load.num_calls -= 1
                load.running.remove(inbound)
                following = load.waiting.popleft() if load.waiting else None
                if following is not None:
                    load.running.append(following)
                self._drop_idle(inbound.connection.peer.node_key, load)
            if following is not None:
                self._pool.run(lambda: self._serve(load, following))

    def _answer(self, inbound: _Inbound) -> None:
        connection, name, call_id = inbound.connection, inbound.method.name, inbound.header["id"]
        timeout_ms = inbound.header.get("timeout_ms")
        if isinstance(timeout_ms, int) and (time.monotonic() - inbound.arrived_s) * 1000 > timeout_ms:
            logger.info("%s of %s waited past its deadline and was not begun", name, connection.peer)
            return
        try:
            result = inbound.method.handler(connection.peer, inbound.header["params"], inbound.body)
            reply = _reply_of(result, call_id, self._versions.answering(name, called_version()))
            if not inbound.cancelled.is_set():
                connection.send(*reply)
        except ConnectionLostError as error:
            if connection.closed:
                logger.debug("%s of %s: nobody waits for the answer", name, connection.peer)
            else:
                self.reply_error(connection, call_id, name, error)
        except Exception as error:
            self.reply_error(connection, call_id, name, error)

    def reply_error(self, connection: Connection, call_id: int, name: str, error: Exception) -> None:
        """Tells the caller what went wrong: our own errors as they are, the rest only that it is ours."""
        if not isinstance(error, SmartnodesError):
            logger.error("internal error in %s, called by %s", name, connection.peer, exc_info=error)
            error = RemoteError(f"internal error in {name}")
        try:
            connection.send({"kind": "error", "id": call_id, **to_wire(error)})
        except SmartnodesError as failed:
            logger.debug("the error of %s could not be sent to %s: %s", name, connection.peer, failed)

    def _drain(self, load: _Load) -> None:
        for _ in range(_NOTIFICATIONS_IN_A_ROW):
            with self._lock:
                if not load.notifications:
                    load.draining = False
                    return
                inbound = load.notifications.popleft()
            connection = inbound.connection
            _current.set(inbound)
            try:
                inbound.method.handler(connection.peer, inbound.header["params"], inbound.body)
            except SmartnodesError as error:
                logger.warning("notification %s from %s: %s", inbound.method.name, connection.peer, error)
            except Exception:
                logger.exception("internal error in notification %s from %s", inbound.method.name, connection.peer)
            with self._lock:
                load.num_notifications -= 1
                load.notification_bytes -= inbound.body.nbytes
                self._drop_idle(connection.peer.node_key, load)
        self._pool.run(lambda: self._drain(load))


def _reply_of(result: Result, call_id: int, version: Version) -> tuple[Header, list[memoryview]]:
    params, body = result if isinstance(result, tuple) else (result, ())
    if params is not None and not isinstance(params, dict):
        raise TypeError(f"a handler returns a dict, a dict and a body, or None, not {type(params).__name__}")
    parts = [body] if isinstance(body, bytes | bytearray | memoryview) else body
    header = {"kind": "reply", "version": version, "id": call_id, "params": params or {}}
    return header, [memoryview(part) for part in parts]
