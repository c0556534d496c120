"""Verdicts of fraud about a job, each executed again on the user's own machine before anything follows from it: an
auditor that lies costs a run nothing but that.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable

from smartnodes_core.errors import SmartnodesError
from smartnodes_core.records import NodeKey, Verdict

logger = logging.getLogger(__name__)

#: So many wait to be judged at most; a cheat is convicted by its first.
MAX_WAITING = 64
#: An auditor whose accusations could not be judged so often is not heard again: it would only hold the run up.
MAX_FAILED = 2
#: A run waits so long for what is judged, and then goes on.
JUDGING_TIMEOUT_S = 120.0


class Accusations:
    """Judges in the background. `is_fraud` executes a verdict's evidence again, `on_fraud` hears of those that are."""

    def __init__(self, is_fraud: Callable[[Verdict], bool], on_fraud: Callable[[Verdict], None]) -> None:
        self._is_fraud, self._on_fraud = is_fraud, on_fraud
        self._waiting: queue.Queue[Verdict | None] = queue.Queue()
        self._convicted: dict[NodeKey, int] = {}  # workers, and the first step for which they were
        self._liars: set[NodeKey] = set()  # auditors whose word was not borne out
        self._failed: Counter[NodeKey] = Counter()  # auditors whose evidence did not come, or was none
        self._num_open = 0
        self._judged = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="accusations", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing is judged any more; nobody waits for what is being judged."""
        with self._judged:
            self._stopped = True
            self._judged.notify_all()
        self._waiting.put(None)

    def hear(self, verdict: Verdict) -> None:
        """An auditor found something. On a network's thread."""
        if verdict.finding != "fraudulent" or self._stopped or self._is_settled(verdict):
            return
        with self._judged:
            if self._num_open >= MAX_WAITING:
                logger.warning("an accusation is not judged: %d wait already", MAX_WAITING)
                return
            self._num_open += 1
        self._waiting.put(verdict)

    def wait(self) -> None:
        """Until nothing that was heard waits to be judged: nobody trains on with a cheat, or on what it left."""
        with self._judged:
            self._judged.wait_for(lambda: not self._num_open or self._stopped, JUDGING_TIMEOUT_S)

    def _is_settled(self, verdict: Verdict) -> bool:
        if verdict.auditor in self._liars or self._failed[verdict.auditor] >= MAX_FAILED:
            return True
        return self._convicted.get(verdict.worker, verdict.step + 1) <= verdict.step

    def _run(self) -> None:
        while (verdict := self._waiting.get()) is not None and not self._stopped:
            try:
                self._judge(verdict)
            except SmartnodesError as error:
                self._failed[verdict.auditor] += 1
                logger.warning("an accusation could not be judged, nothing follows from it here: %s", error)
            except Exception:
                logger.exception("judging an accusation")
            with self._judged:
                self._num_open -= 1
                self._judged.notify_all()

    def _judge(self, verdict: Verdict) -> None:
        if self._is_settled(verdict):
            return
        if self._is_fraud(verdict):
            self._convicted[verdict.worker] = verdict.step
            self._on_fraud(verdict)
        else:
            self._liars.add(verdict.auditor)
