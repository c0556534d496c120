"""Threads on which handlers run: bounded, started when needed, never keeping the interpreter alive."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class WorkerPool:
    """Runs jobs on at most `max_threads` daemon threads, first come first served."""

    def __init__(self, name: str, max_threads: int) -> None:
        self._name, self._max_threads = name, max_threads
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._stopped = False

    def __repr__(self) -> str:
        return (
            f"WorkerPool({self._name}, {len(self._threads)} threads, {self._num_idle} idle, {len(self._jobs)} waiting)"
        )

    def run(self, job: Callable[[], None]) -> None:
        """Queues `job`; after `stop` it is dropped."""
        with self._changed:
            if self._stopped:
                return
            self._jobs.append(job)
            if self._num_idle < len(self._jobs) and len(self._threads) < self._max_threads:
                thread = threading.Thread(target=self._work, name=f"{self._name} {len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._changed.notify()

    def stop(self, timeout_s: float) -> None:
        """Drops waiting jobs and waits for running ones, at most `timeout_s`. Harmless when repeated."""
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify_all()
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in threads:
            thread.join(timeout_s / max(1, len(threads)))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._num_idle += 1
                while not self._jobs and not self._stopped:
                    self._changed.wait()
                self._num_idle -= 1
                if self._stopped:
                    return
                job = self._jobs.popleft()
            try:
                job()
            except Exception:
                logger.exception("a job on %s failed", self._name)
