"""Tier 2: a whole step executed again: every unit, buffers, the accumulated gradient, clipping, the optimizer's update.

Only this sees a worker that sends the right activation gradients and bends what no neighbour can see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from smartnodes_core.errors import AuditError
from smartnodes_core.records import NO_DIGEST, Unit
from tensorlink.audit.compare import Deviation, update_deviation
from tensorlink.audit.interval import number_in
from tensorlink.audit.sums import own_gradient
from tensorlink.audit.unit import Case, compare, compare_unit, unit_inputs
from tensorlink.pipeline.backward import GradientSum
from tensorlink.pipeline.state import NORM_TOLERANCE, clip_fits, clipped
from tensorlink.pipeline.tied import Ties
from tensorlink.steplog.digests import digest, root
from tensorlink.steplog.replay import Replayer, UnitInputs, UnitResult, Variant


def examine_step(case: Case) -> Deviation | None:
    """Every unit, the chain of buffers, the accumulated gradient, clipping, and the optimizer's update."""
    units = [unit_inputs(case, index) for index in range(len(case.commitment.units))]
    _check_units(case, [unit for unit, _ in units])
    after: dict[tuple[int, int], tuple[UnitInputs, UnitResult]] = {}
    random, total = False, GradientSum()
    for index, (unit, inputs) in enumerate(units):
        native = case.replayer.unit(inputs)
        found = compare_unit(case, index, unit, inputs, native)
        if found is not None:
            return found
        random = random or native.random
        total.add(native.gradient)
        native.y, native.gx, native.gradient = {}, {}, {}
        after.setdefault((unit.call, unit.micro_batch), (inputs, native))
    return (
        _buffers(case, [after[place] for place in sorted(after)])
        or _gradient(case, [inputs for _, inputs in units], total.take(), random)
        or _update(case)
    )


def _check_units(case: Case, units: Sequence[Unit]) -> None:
    names = [(unit.call, unit.backward_pass, unit.micro_batch) for unit in units]
    if len(set(names)) != len(names):
        raise AuditError("a unit stands twice in the commitment")
    if case.order.loss != NO_DIGEST and sorted(names) != [(0, 0, m) for m in range(len(case.order.loss_weights))]:
        raise AuditError(
            f"the author ordered {len(case.order.loss_weights)} micro-batches, committed were {names!r:.200}"
        )


def _buffers(case: Case, forwards: Sequence[tuple[UnitInputs, UnitResult]]) -> Deviation | None:
    """Each forward begins with the buffers that the one before left."""
    roots = case.commitment.roots
    first = case.data.checked("buffers_before", roots, "buffers_before")
    last = case.data.checked("buffers_after", roots, "buffers_after")
    begins = [*(inputs.buffers for inputs, _ in forwards), last]
    if any(set(buffers) != set(first) for buffers in begins):
        raise AuditError("buffers were opened under other names than the program's")
    found = next((name for name, tensor in begins[0].items() if digest("", tensor) != digest("", first[name])), None)
    if found is not None:
        return Deviation(f"buffer {found}", 1.0, 0.0, "is not what it was when the step began")

    def results(replayer: Replayer, units: Sequence[UnitInputs], variant: Variant) -> Mapping[str, Tensor]:
        return {f"buffer {name}": tensor for name, tensor in replayer.unit(units[0], variant).buffers.items()}

    for claimed, (inputs, native) in zip(begins[1:], forwards, strict=True):
        ours = {f"buffer {name}": tensor for name, tensor in native.buffers.items()}
        theirs = {f"buffer {name}": tensor for name, tensor in claimed.items()}
        wrong = compare(case, "", theirs, ours, [inputs], results, native.random)
        if wrong is not None:
            return wrong
    return None


def _gradient(case: Case, units: Sequence[UnitInputs], native: Mapping[str, Tensor], random: bool) -> Deviation | None:
    gradient = case.data.checked("gradient", case.commitment.roots, "gradient")
    ties = Ties(case.replayer.program)
    claimed, wrong = own_gradient(case, ties, gradient)
    if set(claimed) != set(native):
        raise AuditError(f"gradients of {sorted(set(claimed) ^ set(native))[:5]} are missing or too many")
    named = {f"gradient {name}": tensor for name, tensor in native.items()}

    def results(replayer: Replayer, units: Sequence[UnitInputs], variant: Variant) -> Mapping[str, Tensor]:
        return {f"gradient {name}": tensor for name, tensor in replayer.gradient(units, variant).items()}

    renamed = {f"gradient {name}": tensor for name, tensor in claimed.items()}
    found = compare(case, "", renamed, named, units, results, random)
    return found or wrong or _norm(case, {name: g for name, g in gradient.items() if ties.counts(name)})


def _norm(case: Case, gradient: Mapping[str, Tensor]) -> Deviation | None:
    """The norm over `gradient` that the worker reported, and a clip coefficient that the author's order allows."""
    squared = sum(float(tensor.double().square().sum()) for tensor in gradient.values())
    reported = number_in(case.commitment, "squared_norm")
    if not math.isclose(reported, squared, rel_tol=NORM_TOLERANCE, abs_tol=1e-30):
        return Deviation(
            "squared norm", abs(reported - squared), NORM_TOLERANCE * squared, "is not that of the gradient"
        )
    coefficient = number_in(case.commitment, "clip_coefficient")
    if not clip_fits(coefficient, case.order.clip_norm, squared, NORM_TOLERANCE):
        return Deviation("clip coefficient", coefficient, 1.0, "is not what the order and the gradient allow")
    return None


def _update(case: Case) -> Deviation | None:
    """The optimizer, run again from the committed gradient with the author's options, where the state after it is
    committed to: where an interval ends."""
    roots, data, optimizer = case.commitment.roots, case.data, case.start.optimizer
    claimed = data.checked("weights_after", roots, "weights_after")
    claimed_state = data.checked("optimizer_after", roots, "optimizer_after")
    gradient = data.checked("gradient", roots, "gradient")
    if optimizer is None or "weights_after" not in roots:
        return None
    replayed = {name: tensor.detach() for name, tensor in case.start.weights.items()}
    before = {name: tensor.clone() for name, tensor in (*replayed.items(), *optimizer.state_tensors().items())}
    optimizer.step(clipped(gradient, number_in(case.commitment, "clip_coefficient")), case.order.options)
    state = optimizer.state_tensors()
    if set(claimed) != set(replayed) or set(claimed_state) != set(state):
        raise AuditError("weights or optimizer state after the step have other names than they must")
    if root(replayed) == roots["weights_after"] and root(state) == roots["optimizer_after"]:
        return None
    pairs = [(name, claimed[name], replayed[name]) for name in replayed]
    pairs += [(name, claimed_state[name], state[name]) for name in state]
    num_steps = case.start.num_steps + 1
    found = (update_deviation(name, before.get(name), ours, theirs, num_steps) for name, ours, theirs in pairs)
    return next((deviation for deviation in found if deviation is not None), None)
