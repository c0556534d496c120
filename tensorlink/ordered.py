"""One background thread that does what it is given in order: for whoever must not wait but may not get ahead either."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from smartnodes_core.errors import SmartnodesError

logger = logging.getLogger(__name__)


class Ordered:
    """Starts with the first `put`. What a piece of work raises is logged and stops nothing else."""

    def __init__(self, name: str):
        self._name = name
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def put(self, work: Callable[[], None]) -> None:
        """Do `work` after everything that was put before; nothing happens once this was stopped."""
        with self._lock:
            if self._stopped:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._work.put(work)

    def stop(self, timeout_s: float) -> None:
        """Finish what was put, for at most `timeout_s`."""
        with self._lock:
            self._stopped = True
            self._work.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except SmartnodesError as error:
                logger.warning("%s: %s", self._name, error)
            except Exception:
                logger.exception("%s: unexpected error", self._name)
