"""What a job has come to so far, as its user heard it: work, busy seconds, verdicts. Of bounded size."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, deque

from smartnodes_core.records import Commitment, Finding, NodeKey, Verdict

#: Verdicts kept whole; counts go on for ever.
MAX_VERDICTS = 10_000
#: Steps whose time is remembered.
MAX_STEPS = 256


class Tally:
    """Filled by network threads, read by the user's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._verdicts: deque[Verdict] = deque(maxlen=MAX_VERDICTS)
        self._findings: Counter[tuple[NodeKey, Finding]] = Counter()
        self._work_units: Counter[int] = Counter()
        self._steps: dict[int, int] = {}
        self._busy_s: dict[int, float] = {}
        self._step_s: deque[float] = deque(maxlen=MAX_STEPS)

    def verdict(self, verdict: Verdict) -> None:
        """An auditor found something."""
        with self._lock:
            self._verdicts.append(verdict)
            self._findings[(verdict.worker, verdict.finding)] += 1

    def commitment(self, commitment: Commitment) -> None:
        """A stage committed to a step; a step counts once, for a stage's steps only go up."""
        with self._lock:
            if commitment.step > self._steps.get(commitment.stage, -1):
                self._steps[commitment.stage] = commitment.step
                self._work_units[commitment.stage] += commitment.work_units

    def busy(self, stage: int, seconds: float) -> None:
        """A stage computed for this long."""
        with self._lock:
            self._busy_s[stage] = self._busy_s.get(stage, 0.0) + seconds

    def step(self, seconds: float) -> None:
        """A whole training step took this long."""
        with self._lock:
            self._step_s.append(seconds)

    @property
    def step_s(self) -> float | None:
        """The median of the newest training steps, None before the first."""
        with self._lock:
            return statistics.median(self._step_s) if self._step_s else None

    def verdicts(self) -> list[Verdict]:
        """The newest verdicts, oldest first."""
        with self._lock:
            return list(self._verdicts)

    def findings(self, worker: NodeKey | None = None) -> dict[str, int]:
        """How many audits passed, failed, were inconclusive, and met with silence: of one worker, or of all."""
        with self._lock:
            counts = [(f, n) for (key, f), n in self._findings.items() if worker in (None, key)]
        names: dict[Finding, str] = {
            "honest": "passed",
            "fraudulent": "failed",
            "inconclusive": "inconclusive",
            "silent": "silent",
        }
        return {name: sum(n for f, n in counts if f == finding) for finding, name in names.items()}

    def work_units(self, stage: int) -> int:
        """FLOPs that the stage has committed to."""
        with self._lock:
            return self._work_units[stage]

    def busy_s(self, stage: int) -> float:
        """Seconds that the stage has computed."""
        with self._lock:
            return self._busy_s.get(stage, 0.0)
