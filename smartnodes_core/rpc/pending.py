"""Calls that wait for their replies."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from smartnodes_core.transport.base import Connection


class Reply(NamedTuple):
    """What a call returned."""

    params: dict[str, Any]
    body: memoryview


@dataclass(eq=False)
class PendingCall:
    """One call on its way. `settle` once, from any thread."""

    connection: Connection
    method: str
    max_body_bytes: int
    done: threading.Event = field(default_factory=threading.Event)
    reply: Reply | None = None
    error: Exception | None = None

    def settle(self, reply: Reply | None, error: Exception | None) -> None:
        """Ends the wait with a reply or an error."""
        self.reply, self.error = reply, error
        self.done.set()


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
