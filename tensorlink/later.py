"""Hashing that waits while its process computes: beside small tensors it would only contend for the interpreter's lock,
beside large ones for the core.

Neighbours: `pipeline/stage.py` and `compute_stages.py` submit, `compute.py` says when the process has time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

#: No more than this waits: a process that always has something to do hashes beside it.
MAX_WAITING = 64
#: What the thread gives way by, as of `nice`: beside a busy thread it gets about a tenth of a core.
NICE = 10


class Later(Executor):
    """One thread that does what was submitted, in order and in the time that others leave on the cores: from `begin`
    on, or once somebody asks for a result."""

    def __init__(self, thread_name_prefix: str = "") -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=thread_name_prefix, initializer=_give_way)
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []

    @property
    def waits(self) -> bool:
        """Whether something was submitted that has not begun."""
        return bool(self._waiting)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `Executor.submit`, but see the class."""
        future = _LaterFuture(self.begin)

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._waiting.append(run)
        if len(self._waiting) > MAX_WAITING:
            self.begin()
        return future

    def begin(self) -> None:
        """What was submitted runs now."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            for run in waiting:
                self._pool.submit(run)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `Executor.shutdown`; what waits is done first."""
        self.begin()
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)


class _LaterFuture(Future[Any]):
    def __init__(self, begin: Callable[[], None]) -> None:
        super().__init__()
        self._begin = begin

    def result(self, timeout: float | None = None) -> Any:
        """As `Future.result`; begins what it waits for."""
        if not self.done():
            self._begin()
        return super().result(timeout)


def _give_way() -> None:
    if not sys.platform.startswith("linux"):
        return  # elsewhere a priority is the whole process's
    with contextlib.suppress(OSError):  # an owner whose limits allow less loses speed and nothing else
        os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE))
