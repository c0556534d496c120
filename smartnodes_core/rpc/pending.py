"""Calls that wait for their replies."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from smartnodes_core.errors import CancelledError, DeadlineError
from smartnodes_core.transport.base import Connection


class Reply(NamedTuple):
    """What a call returned."""

    params: dict[str, Any]
    body: memoryview


@dataclass(eq=False)
class PendingCall:
    """One call on its way. `settle` once, from any thread; `result` once, on the thread that made it."""

    connection: Connection
    method: str
    max_body_bytes: int
    timeout_s: float
    forget: Callable[[], None] = lambda: None
    give_up: Callable[[], None] = lambda: None  # tells the peer that nobody waits
    answered: Callable[[float], None] = lambda took_s: None
    missed: Callable[[], None] = lambda: None
    ended_s: float = 0.0  # when it was settled or given up, on the monotonic clock
    _began_s: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: threading.Event = field(default_factory=threading.Event)
    _reply: Reply | None = None
    _error: Exception | None = None

    def settle(self, reply: Reply | None, error: Exception | None) -> None:
        """Ends the wait with a reply or an error; what comes after the first is dropped."""
        with self._lock:
            if self._done.is_set():
                return
            self._reply, self._error, self.ended_s = reply, error, time.monotonic()
            self._done.set()
        if reply is not None:
            self.answered(self.ended_s - self._began_s)

    def cancel(self) -> None:
        """Gives the call up: `result` raises CancelledError, and the peer is told, so that it may stop. Harmless when
        it has ended.
        """
        if not self._done.is_set():
            self.settle(None, CancelledError(f"{self.method} of {self.connection.peer} was cancelled here"))
            self.give_up()

    def result(self) -> Reply:
        """Waits for the reply, until `timeout_s` after the call began. Raises as `RpcEndpoint.call`."""
        try:
            if not self._done.wait(max(0.0, self._began_s + self.timeout_s - time.monotonic())):
                self.settle(
                    None,
                    DeadlineError(f"{self.connection.peer} did not answer {self.method} in {self.timeout_s:.3g} s"),
                )
                if isinstance(self._error, DeadlineError):
                    self.missed()
                    self.give_up()
        finally:
            self.forget()
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply


class PendingCalls:
    """All calls of an endpoint, by id. An id is only honoured on the connection on which the call went out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._calls: dict[int, PendingCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: PendingCall) -> int:
        """Registers `call`; returns its id."""
        with self._lock:
            call_id = next(self._ids)
            self._calls[call_id] = call
            return call_id

    def get(self, connection: Connection, call_id: object) -> PendingCall | None:
        """The call that a reply from `connection` answers; None when nobody waits for it any more."""
        with self._lock:
            call = self._calls.get(call_id) if isinstance(call_id, int) else None
        return call if call is not None and call.connection is connection else None

    def remove(self, call_id: int) -> None:
        """Forgets a call; a reply that comes later is dropped."""
        with self._lock:
            self._calls.pop(call_id, None)

    def of(self, connection: Connection) -> list[PendingCall]:
        """The calls on one connection."""
        with self._lock:
            return [call for call in self._calls.values() if call.connection is connection]
