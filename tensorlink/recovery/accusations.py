"""Verdicts of fraud about a job, each executed again on the user's own machine before anything follows from it: an
auditor that lies costs a run nothing but that.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from smartnodes_core.errors import SmartnodesError
from smartnodes_core.records import NodeKey, Verdict

logger = logging.getLogger(__name__)

#: So many wait to be judged at most; a cheat is convicted by its first.
MAX_WAITING = 64


class Accusations:
    """Judges in the background. `is_fraud` executes a verdict's evidence again, `on_fraud` hears of those that are."""

    def __init__(self, is_fraud: Callable[[Verdict], bool], on_fraud: Callable[[Verdict], None]) -> None:
        self._is_fraud, self._on_fraud = is_fraud, on_fraud
        self._waiting: queue.Queue[Verdict | None] = queue.Queue(MAX_WAITING)
        self._convicted: dict[NodeKey, int] = {}  # workers, and the first step for which they were
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="accusations", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing is judged any more; nobody waits for what is being judged."""
        self._stopped = True
        if self._waiting.empty():
            self._waiting.put(None)

    def hear(self, verdict: Verdict) -> None:
        """An auditor found something. On a network's thread."""
        known = self._convicted.get(verdict.worker, verdict.step + 1) <= verdict.step
        if verdict.finding == "fraudulent" and not known and not self._stopped:
            try:
                self._waiting.put_nowait(verdict)
            except queue.Full:
                logger.warning("an accusation is not judged: %d wait already", MAX_WAITING)

    def _run(self) -> None:
        while (verdict := self._waiting.get()) is not None and not self._stopped:
            try:
                if self._is_fraud(verdict):
                    self._convicted[verdict.worker] = verdict.step
                    self._on_fraud(verdict)
            except SmartnodesError as error:
                logger.warning("an accusation could not be judged, nothing follows from it here: %s", error)
            except Exception:
                logger.exception("judging an accusation")
