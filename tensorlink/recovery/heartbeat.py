"""Whether rigs are alive: each is asked again and again, and one that does not answer in time is given up.

A rig that dies closes its connections; one that hangs, sleeps or is cut off does not. Its computing process answers
between two actions, so that patience goes by the longest answer so far, and by what an action is predicted to take.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from smartnodes_core.errors import DeadlineError, SmartnodesError
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc import PendingCall

logger = logging.getLogger(__name__)

#: A rig may take this many times its longest answer so far, or an action's predicted time; at least LEAST_S.
PATIENCE, LEAST_S = 10.0, 5.0

#: Asks a worker something that its computing process answers, within so many seconds.
Ask = Callable[[NodeKey, float], PendingCall]


class Heartbeat:
    """Asks the `workers()` of a job; `on_silent` hears of one that does not answer. Ends with `stop`."""

    def __init__(
        self,
        workers: Callable[[], Sequence[NodeKey]],
        ask: Ask,
        on_silent: Callable[[NodeKey, str], None],
        action_s: float,
        period_s: float,
    ) -> None:
        self._workers, self._ask, self._on_silent, self._period_s = workers, ask, on_silent, period_s
        self._least_s = max(LEAST_S, PATIENCE * action_s)
        self._longest_s: dict[NodeKey, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends within an answer's time; nobody waits for that."""
        self._stopping.set()

    def patience_s(self, worker: NodeKey) -> float:
        """How long this worker may take to answer."""
        return max(self._least_s, PATIENCE * self._longest_s.get(worker, 0.0))

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            self.beat()

    def beat(self) -> None:
        """Ask everybody once, and wait for the answers."""
        asked: list[tuple[NodeKey, float, float, PendingCall]] = []
        for worker in dict.fromkeys(self._workers()):
            patience_s = self.patience_s(worker)
            try:
                asked.append((worker, patience_s, time.monotonic(), self._ask(worker, patience_s)))
            except SmartnodesError as error:
                logger.debug("worker %s cannot be asked: %s", worker.hex()[:8], error)  # its connection's end tells
        for worker, patience_s, began_s, call in asked:
            try:
                call.result()
            except DeadlineError:
                if not self._stopping.is_set():
                    self._on_silent(worker, f"it has not answered for {patience_s:.1f} s")
                continue
            except SmartnodesError as error:
                logger.debug("worker %s answered: %s", worker.hex()[:8], error)  # it is alive enough to say so
            took_s = call.ended_s - began_s
            self._longest_s[worker] = max(took_s, self._longest_s.get(worker, 0.0))
