"""What workers commit to, as their author sees it: held against each other and against what it ordered, at once.

Validators compare the ends of links too, and have the units audited; the author needs no audit to see that something is
wrong with a run. Called under the driver's network threads; bounded.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from typing import TypeVar

from smartnodes_core.audit import link_disagreements, sharing_disagreements
from smartnodes_core.records import Commitment
from tensorlink.ordered_data import other_data
from tensorlink.records import StepOrder

logger = logging.getLogger(__name__)

#: Steps of which commitments and orders are kept: stages commit within a few steps of each other.
MAX_STEPS = 64
#: The newest contradictions.
MAX_FOUND = 256

T = TypeVar("T")


class Contradictions:
    """Of one job. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[int, dict[int, Commitment]] = OrderedDict()
        self._orders: OrderedDict[int, StepOrder] = OrderedDict()
        self._found: deque[str] = deque(maxlen=MAX_FOUND)

    def found(self) -> list[str]:
        """The newest, oldest first, in words."""
        with self._lock:
            return list(self._found)

    def ordered(self, order: StepOrder) -> None:
        """A step was ordered so."""
        with self._lock:
            _keep(self._orders, order.step, order)

    def commitment(self, commitment: Commitment, num_stages: int) -> None:
        """One of `num_stages` stages committed to a step."""
        stage, step = commitment.stage, commitment.step
        with self._lock:
            held = self._held.get(step, {})
            held = {n: other for n, other in held.items() if other.plan_version == commitment.plan_version}
            faults = [
                fault
                for before, after in ((held.get(stage - 1), commitment), (commitment, held.get(stage + 1)))
                if before is not None and after is not None
                for fault in link_disagreements(before, after)
            ]
            faults += [fault for other in held.values() for fault in sharing_disagreements(commitment, other)]
            order = self._orders.get(step)
            if order is not None and (wrong := other_data(order, commitment.units, stage, num_stages)):
                faults.append(f"stage {stage}: {wrong}")
            _keep(self._held, step, {**held, stage: commitment})
            self._found.extend(f"step {step}: {fault}" for fault in faults)
        for fault in faults[:1]:
            logger.warning("commitments of step %d contradict each other or the order: %s", step, fault)


def _keep(kept: OrderedDict[int, T], step: int, value: T) -> None:
    kept[step] = value
    kept.move_to_end(step)
    while len(kept) > MAX_STEPS:
        kept.popitem(last=False)
