"""What this process spends on what the network adds to computing: CPU time and bytes, by name, since it started.

    with USAGE.timed("hashing"):
        ...

One `Usage` for the process, `USAGE`. CPU time is the calling thread's own: neither waiting nor other threads count.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType


class Usage:
    """Counters, added to from any thread. Names of times end in `_ns`, of amounts in `_bytes`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def timed(self, name: str) -> Timed:
        """A context whose CPU time counts as `{name}_ns`; contexts of one name must not be nested."""
        return Timed(self, f"{name}_ns")

    def add(self, name: str, amount: int) -> None:
        """Counts `amount` more."""
        with self._lock:
            self._counts[name] += amount

    def read(self) -> dict[str, int]:
        """All counters, and the CPU time of the whole process as `process_ns`."""
        with self._lock:
            return {**self._counts, "process_ns": time.process_time_ns()}


class Timed:
    """See `Usage.timed`."""

    __slots__ = ("_began_ns", "_name", "_usage")

    def __init__(self, usage: Usage, name: str) -> None:
        self._usage, self._name = usage, name
        self._began_ns = 0

    def __enter__(self) -> None:
        self._began_ns = time.thread_time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._usage.add(self._name, time.thread_time_ns() - self._began_ns)


USAGE = Usage()
