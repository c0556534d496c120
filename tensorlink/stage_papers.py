"""What the node of a rig keeps of a stage: the program and what it says of others; for auditors, the losses and the
author's signed orders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smartnodes_core.errors import JobError
from smartnodes_core.jobs import MAX_EARLIER
from smartnodes_core.records import digest_of

#: The domain of `LossProgram.digest`, said again here because that module loads torch; a test holds them together.
LOSS_DOMAIN = "loss program 1"
#: Labels of what the node adds to an opening: papers, not tensors.
LOSS_PROGRAM = "loss_program"
#: Stages commit to weights and optimizer state every so many steps: hashing and copying them costs more than all else
#: that protects a step, and the steps between follow from gradients that are committed to anyway.
STATE_INTERVAL_STEPS = 4
_EARLIER_ORDER = "earlier/{}/order"
#: Losses of one stage that are kept; an order that names an older one cannot be audited any more.
MAX_LOSSES = 16
#: Orders kept beyond the audit window, for challenges that are under way.
SPARE_ORDERS = 16


def earlier_order(index: int) -> str:
    """The label of the author's signed order for a step of the interval before the one that is opened."""
    return _EARLIER_ORDER.format(index)


def state_interval_steps(terms: Mapping[str, Any]) -> int:
    """After how many steps the state of a stage is committed to again, by the job's terms (1 where they do not say).
    Raises JobError for more than an opening can show."""
    steps = terms.get("state_interval_steps", 1)
    if type(steps) is not int or not 1 <= steps <= MAX_EARLIER:
        raise JobError(f"found state_interval_steps {steps!r:.20}, needed a number from 1 to {MAX_EARLIER}")
    return steps


@dataclass
class StagePapers:
    """Of one stage. `window_steps` is the job's audit window; `loading` is the program whose weights are arriving."""

    window_steps: int
    program: bytes | None = None
    tied_with: frozenset[int] = frozenset()  # the stages that hold parameters which this one holds too
    loading: bytes | None = None
    _losses: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)
    _orders: OrderedDict[int, tuple[bytes, bytes]] = field(default_factory=OrderedDict)

    def the_program(self) -> bytes:
        """Raises JobError where none was loaded."""
        if self.program is None:
            raise JobError("the stage is not loaded yet")
        return self.program

    def add_loss(self, loss: bytes) -> None:
        """The author gave the stage this loss program."""
        digest = digest_of(LOSS_DOMAIN, loss)
        self._losses[digest] = loss
        self._losses.move_to_end(digest)
        while len(self._losses) > MAX_LOSSES:
            self._losses.popitem(last=False)

    def add_order(self, step: int, signed: bytes, loss: bytes) -> None:
        """The author ordered a step, whose loss has the digest `loss`."""
        self._orders[step] = (signed, loss)
        self._orders.move_to_end(step)
        while len(self._orders) > self.window_steps + SPARE_ORDERS:
            self._orders.popitem(last=False)

    def of_step(self, step: int) -> tuple[bytes, bytes]:
        """The signed order of a step and the loss program that it names; empty where they are not held."""
        signed, loss = self._orders.get(step, (b"", b""))
        return signed, self._losses.get(loss, b"")
