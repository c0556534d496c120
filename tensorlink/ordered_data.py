"""What an author's signed order binds of a step's data: what enters the first stage, and the targets of the last.

One root over all micro-batches that went backwards, the same for the author that sends them, the worker that commits to
them and the auditor that compares the two. No torch here. A worker holds no order that names other data than it got,
or it would be blamed for the author's lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from smartnodes_core.records import NO_DIGEST, Unit
from tensorlink.records import StepOrder, set_root


class Place(NamedTuple):
    """A micro-batch of a step: the forward since the last step that it belongs to, and its number there."""

    call: int
    micro_batch: int


def step_root(roots: Mapping[Place, bytes]) -> bytes:
    """The root over the data of a step, from that of each micro-batch; NO_DIGEST where there is none."""
    named = {f"{call}.{micro_batch}": root for (call, micro_batch), root in roots.items()}
    return set_root(named) if named else NO_DIGEST


def committed_root(units: Iterable[Unit], name: str) -> bytes:
    """The same from a commitment's units: their roots of `name` ("x" or "target")."""
    return step_root(
        {
            Place(unit.call, unit.micro_batch): unit.roots[name]
            for unit in units
            if unit.backward_pass >= 0 and name in unit.roots
        }
    )


def other_data(order: StepOrder, units: Iterable[Unit], stage: int, num_stages: int) -> str:
    """Which of a stage's data are not what the order names, in words; empty where all are, or it binds none."""
    units = list(units)
    if stage == 0 and order.input_root not in (NO_DIGEST, committed_root(units, "x")):
        return f"the inputs of step {order.step} are not those that the author's order names"
    if stage == num_stages - 1 and order.target_root not in (NO_DIGEST, committed_root(units, "target")):
        return f"the targets of step {order.step} are not those that the author's order names"
    return ""
