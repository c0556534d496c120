"""How long to wait for a pipeline that says nothing: longer than its longest silence so far, never for ever.

Policy only: the clock is given, and nobody waits here. Neighbour: `driver.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: A wait ends after this many times the longest silence that ended well.
PATIENCE = 20.0
#: No wait is longer, whatever was measured: a machine that slept must not make the next failure take days.
MAX_WAIT_S = 3600.0
#: The slowest link that a transfer's deadline allows for, in bytes per second.
SLOWEST_BYTES_PER_S = 250_000.0


class Progress:
    """Remembers when something last arrived. `timeout_s` is the least patience."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic):
        self.timeout_s = timeout_s
        self._clock = clock
        self._longest_s = 0.0
        self._last = clock()
        self._waiting = False

    @property
    def patience_s(self) -> float:
        """How long a silence may last before it is an error."""
        return max(self.timeout_s, min(MAX_WAIT_S, PATIENCE * self._longest_s))

    def begin(self) -> None:
        """A wait begins: only silence from here on counts."""
        self._last = self._clock()
        self._waiting = True

    def moved(self) -> None:
        """Something arrived."""
        now = self._clock()
        if self._waiting:
            self._longest_s = max(self._longest_s, now - self._last)
        self._last = now

    def end(self) -> None:
        """The wait ended well."""
        self.moved()
        self._waiting = False

    @property
    def left_s(self) -> float:
        """Seconds until the silence has lasted too long."""
        return self._last + self.patience_s - self._clock()

    def transfer_s(self, num_bytes: int) -> float:
        """The deadline of a call that carries `num_bytes`."""
        return self.patience_s + num_bytes / SLOWEST_BYTES_PER_S
