"""The state with which a step began: as it was committed to, or as it follows from there over the steps between.

A worker binds weights and optimizer state where an interval of steps begins and where it ends. Of each step between,
its commitment binds the accumulated gradient and the author's order the update, so that the state is computed again, at
the cost of an optimizer's steps. And the state with which an interval began must be the one in which the last ended,
or the one that the job record (under a later plan: that plan) names, unless the author says in the order that it was
replaced.

Neighbours: `opening.py` gives what is needed, `unit.py` and `step.py` go on from the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from smartnodes_core.errors import AuditError
from smartnodes_core.records import Commitment
from tensorlink.audit.opened import OpenedData
from tensorlink.errors import OptimizerError
from tensorlink.pipeline.state import clipped
from tensorlink.program.graph import StageProgram
from tensorlink.records import StepOrder, set_root, state_root
from tensorlink.stage_optimizer import StageOptimizer

_BOUND = ("weights", "optimizer")
_ALWAYS = ("gradient", "buffers_before", "buffers_after")


class UnknownPastError(Exception):
    """The commitments at hand do not reach back to where the state was committed to: says nothing of the worker."""


@dataclass(frozen=True)
class Past:
    """What came before a step. `commitments` are the stage's earlier ones, chained, oldest first; `orders` the author's
    for the last of them, as many as were opened. `initial_root` is the job record's for the stage, `state_root` the
    plan's, where it is not the first."""

    commitments: Sequence[Commitment]
    orders: Sequence[StepOrder]
    interval_steps: int
    initial_root: bytes
    state_root: bytes | None = None


@dataclass
class Start:
    """Where a step began. The optimizer, where there is one, steps `weights`; `num_steps` were computed again to come
    here."""

    weights: dict[str, Tensor]
    optimizer: StageOptimizer | None
    num_steps: int


def start_of(
    data: OpenedData,
    program: StageProgram,
    commitment: Commitment,
    order: StepOrder,
    past: Past,
    with_optimizer: bool,
) -> Start:
    """The state before the step of `commitment`. Raises AuditError where what was opened is not what was committed to
    or the state changed on its own, UnknownPastError where `past` does not reach back far enough."""
    chain = [*past.commitments, commitment]
    begin = max((at for at, one in enumerate(chain) if "weights_before" in one.roots), default=None)
    if begin is None:
        raise UnknownPastError(f"the last {len(chain)} commitments do not bind the weights with which they began")
    base, earlier = chain[begin], chain[begin:-1]
    if len(past.orders) != len(earlier):
        raise AuditError(f"orders of {len(past.orders)} steps were opened, the interval began {len(earlier)} before")
    for one, signed in zip(earlier, past.orders, strict=True):
        if signed.digest() != one.order:
            raise AuditError(f"opened other data: the order of step {one.step} is not the one that was committed to")
    _check_bound(chain[max(begin - 1, 0) :], len(earlier), past.interval_steps)
    _check_unchanged(chain[max(begin - 1, 0) :], [*past.orders, order], past)
    weights = data.checked("weights", base.roots, "weights_before")
    if set(weights) != set(program.parameters):
        raise AuditError("the weights that were opened are not those of the program")
    if not earlier and not with_optimizer:
        return Start(weights, None, 0)
    weights = {n: tensor.clone().requires_grad_(program.parameters[n].requires_grad) for n, tensor in weights.items()}
    optimizer = _optimizer(data, weights, base, [*past.orders, order][0])
    for at, (one, signed) in enumerate(zip(earlier, past.orders, strict=True)):
        gradient = data.checked(f"earlier/{at}/gradient", one.roots, "gradient")
        optimizer.step(clipped(gradient, number_in(one, "clip_coefficient")), signed.options)
    return Start(weights, optimizer, len(earlier))


def _optimizer(data: OpenedData, weights: dict[str, Tensor], base: Commitment, order: StepOrder) -> StageOptimizer:
    """The optimizer as it was when the interval began; it steps `weights`."""
    optimizer = StageOptimizer(order.optimizer, order.options, weights)
    try:
        optimizer.load_state_tensors(data.checked("optimizer", base.roots, "optimizer_before"))
    except OptimizerError as error:
        raise AuditError(f"optimizer state before step {base.step}: {error}") from None
    return optimizer


def number_in(commitment: Commitment, field: str) -> float:
    """A number that a worker committed to as `float.hex()` text. Raises AuditError for other text."""
    try:
        return float.fromhex(getattr(commitment, field))
    except (ValueError, OverflowError):
        raise AuditError(f"the {field} of step {commitment.step} is no number") from None


def _check_bound(chain: Sequence[Commitment], num_earlier: int, interval_steps: int) -> None:
    """Each commitment binds what it must; an interval is no longer than the job says, and where it ends the state is
    bound."""
    for one in chain:
        if any(name not in one.roots for name in _ALWAYS):
            raise AuditError(f"the commitment of step {one.step} has no root of {', '.join(_ALWAYS)}")
    commitment, roots = chain[-1], chain[-1].roots
    if num_earlier >= interval_steps:
        raise AuditError(f"the state was not committed to for {num_earlier} steps, the job says {interval_steps}")
    if num_earlier == interval_steps - 1 and any(f"{part}_after" not in roots for part in _BOUND):
        raise AuditError(f"step {commitment.step} ends an interval, and the state after it was not committed to")


def _check_unchanged(chain: Sequence[Commitment], orders: Sequence[StepOrder], past: Past) -> None:
    """Nothing changed between steps but what the author replaced. `chain` begins with the commitment before the
    interval, where there is one; `orders` are those of the interval's steps."""
    first = chain[len(chain) - len(orders)]
    if len(chain) == len(orders):
        _check_initial(first, orders[0], past)
    for (before, after), order in zip(pairwise(chain), orders[len(orders) - len(chain) + 1 :], strict=True):
        if "buffers" not in order.replaced and before.roots["buffers_after"] != after.roots["buffers_before"]:
            raise AuditError(f"the buffers changed between steps {before.step} and {after.step}")
        if after is not first:
            continue
        ended = all(f"{part}_after" in before.roots for part in _BOUND)
        if not ended and not set(_BOUND) & set(order.replaced):
            raise AuditError(f"an interval began at step {after.step} before the last had ended")
        for part in _BOUND:
            same = before.roots.get(f"{part}_after") == after.roots.get(f"{part}_before")
            if ended and not same and part not in order.replaced:
                raise AuditError(f"the {part} changed between steps {before.step} and {after.step}")


def _check_initial(first: Commitment, order: StepOrder, past: Past) -> None:
    """A stage begins in the state that the job record names, optimizer aside; under a later plan, in the one that the
    plan names."""
    if first.previous != first.job:
        raise UnknownPastError(f"the commitment before step {first.step}, where its interval began, is not at hand")
    begun = {part: first.roots[f"{part}_before"] for part in ("weights", "buffers")}
    if first.plan_version == 0:
        if not begun.keys() & set(order.replaced) and set_root(begun) != past.initial_root:
            raise AuditError(f"step {first.step} began with other weights or buffers than the job record names")
        return
    begun["optimizer"] = first.roots["optimizer_before"]
    if not begun.keys() & set(order.replaced) and state_root(begun) != past.state_root:
        raise AuditError(f"step {first.step} began in another state than plan {first.plan_version} names")
