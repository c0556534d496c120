"""What connections are used for: one that has carried passing calls alone, and none for a while, may be closed.

A call is passing when its caller says so (`CallOptions`) or its method is served so (`allow`): both ends of it
agree on what a connection was used for. Everything else makes it lasting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from smartnodes_core.transport.base import Connection


class Uses:
    """When each connection was used last, and whether it lasts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: WeakKeyDictionary[Connection, tuple[float, bool]] = WeakKeyDictionary()

    def used(self, connection: Connection, *, passing: bool) -> bool:
        """Takes note of a use; False for a connection that is closed, perhaps a moment ago by `close_idle`."""
        with self._lock:
            _, was_passing = self._used.get(connection, (0.0, True))
            self._used[connection] = (time.monotonic(), passing and was_passing)
            return not connection.closed

    def close_idle(
        self,
        connections: Iterable[Connection],
        idle_s: float,
        is_waiting: Callable[[Connection], bool],
        close: Callable[[Connection], None],
    ) -> int:
        """Has `close` close those that nothing lasting was sent over, and nothing at all for `idle_s`, unless an answer
        is waited for; how many. Who is about to use one has told `used`, or is told that it is closed.
        """
        num_closed = 0
        for connection in connections:
            with self._lock:
                used_s, passing = self._used.get(connection, (time.monotonic(), False))
                idle = time.monotonic() - used_s >= idle_s and not is_waiting(connection)
                if passing and idle and not connection.closed:
                    close(connection)
                    num_closed += 1
        return num_closed
