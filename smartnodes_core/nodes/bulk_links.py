"""A node's bulk connections, which carry tensors. Each stands beside the connection for calls to the same peer.

They live and end together: a bulk connection is taken only from a peer that has a connection for calls, the end of that
one ends it, and when it breaks alone, so does the other, for tensors may have been lost that nobody will send again.
Whoever dialled the connection for calls dials these too, since the other side may not be reachable; it asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from smartnodes_core.config import MAX_BULK_CONNECTIONS
from smartnodes_core.errors import BusyError, ConnectionLostError, DeadlineError
from smartnodes_core.transport.base import Connection, Peer

ARRIVAL_S = 2.0


class BulkLinks:
    """The table of live bulk connections, by the connection for calls beside which they stand."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._beside: dict[Connection, list[Connection]] = {}
        self._opening: set[Connection] = set()

    def __repr__(self) -> str:
        return f"BulkLinks({len(self.all())} connections of {len(self._beside)} peers)"

    def all(self) -> list[Connection]:
        """Every bulk connection that has not ended."""
        with self._changed:
            return [bulk for beside in self._beside.values() for bulk in beside]

    def check(self, peer: Peer, calls: Connection | None) -> None:
        """Raises ConnectionLostError or BusyError when `peer`, whose connection for calls is `calls`, may not have one
        more.
        """
        if calls is None:
            raise ConnectionLostError(f"{peer} has no connection for calls, beside which a bulk one could stand")
        with self._changed:
            if len(self._beside.get(calls, ())) >= MAX_BULK_CONNECTIONS:
                raise BusyError(f"{peer} has {MAX_BULK_CONNECTIONS} bulk connections already: use those")

    def add(self, bulk: Connection, calls: Connection) -> None:
        """Takes an open bulk connection in."""
        with self._changed:
            self._beside.setdefault(calls, []).append(bulk)
            self._changed.notify_all()

    def remove(self, bulk: Connection) -> Connection | None:
        """Takes an ended one out; the connection beside which it stood, None when that had ended before."""
        with self._changed:
            for calls, beside in self._beside.items():
                if bulk in beside:
                    beside.remove(bulk)
                    return calls
        return None

    def take_beside(self, calls: Connection) -> list[Connection]:
        """Takes out those beside a connection for calls that has ended."""
        with self._changed:
            taken = self._beside.pop(calls, [])
            self._changed.notify_all()
        return taken

    def get(self, calls: Connection, deadline_s: float, open_all: Callable[[], None]) -> list[Connection]:
        """The live ones beside `calls`. Where there is none, one caller runs `open_all`, and the others wait for it.

        Raises what `open_all` raises, DeadlineError when none is there by `deadline_s` (of the monotonic clock),
        ConnectionLostError when `calls` has ended before.
        """
        while True:
            with self._changed:
                found = self._live(calls)
                if found and calls not in self._opening:
                    return found
                ours = calls not in self._opening
                if ours:
                    self._opening.add(calls)
                else:
                    self._wait_for_change(calls, deadline_s)
                    continue
            try:
                open_all()
                return self._wait(calls, min(deadline_s, time.monotonic() + ARRIVAL_S))
            finally:
                with self._changed:
                    self._opening.discard(calls)
                    self._changed.notify_all()

    def _wait(self, calls: Connection, deadline_s: float) -> list[Connection]:
        """`add` runs on a thread of the connection's own."""
        with self._changed:
            while not (found := self._live(calls)):
                self._wait_for_change(calls, deadline_s)
            return found

    def _wait_for_change(self, calls: Connection, deadline_s: float) -> None:
        if calls.closed:
            raise ConnectionLostError(f"the connection to {calls.peer} ended before a bulk one stood beside it")
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineError(f"no bulk connection to {calls.peer} was made in time")
        self._changed.wait(left_s)

    def _live(self, calls: Connection) -> list[Connection]:
        return [bulk for bulk in self._beside.get(calls, ()) if not bulk.closed]
