"""The auditor: re-executes what a worker opened and says whether it is what the worker committed to.

Order of suspicion: what was opened must be what was committed; then bits, which end the matter where they agree; then
distances, against the noise that this very unit shows here (`compare.py`). What cannot be computed here for want of
memory or a program is inconclusive, never fraud. Neighbours: `opened.py` reads the data, `steplog/replay.py`
computes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.errors import AuditError, PeerFault
from smartnodes_core.records import NO_DIGEST, Challenge, Commitment, Opening, Unit, digest_of
from tensorlink.audit.commitments import mode_digest
from tensorlink.audit.compare import Deviation, deviation, update_deviation, usable_exact
from tensorlink.audit.opened import OpenedData
from tensorlink.pipeline.backward import GradientSum
from tensorlink.pipeline.seeds import seed_for
from tensorlink.pipeline.stage import clipped
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.records import StepOrder
from tensorlink.stage_optimizer import StageOptimizer
from tensorlink.steplog.digests import digest, root
from tensorlink.steplog.replay import Replayer, UnitInputs, UnitResult, Variant

MAX_CACHED = 16
#: The worker's own norm is summed in another order than ours.
NORM_TOLERANCE = 1e-3

Results = Callable[[Variant], Mapping[str, Tensor]]


@dataclass
class Case:
    """What one examination works with."""

    replayer: Replayer
    data: OpenedData
    commitment: Commitment
    order: StepOrder
    seed: int
    deltas: dict[str, float] = field(default_factory=dict)


class Examiner:
    """Examines openings; programs are parsed once and kept by digest."""

    def __init__(self) -> None:
        self._programs: OrderedDict[bytes, StageProgram] = OrderedDict()
        self._losses: OrderedDict[bytes, LossProgram] = OrderedDict()

    def examine(self, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """`finding`, `reason` and `deltas` for what `params` and the opening's `body` hold.

        Raises only for what the auditor's own side got wrong or cannot do; what the worker got wrong is a finding.
        """
        commitment = Commitment.decode(params["commitment"])
        challenge = Challenge.decode(params["challenge"])
        order = StepOrder.decode(params["order"])
        program = _cached(self._programs, params["program"], StageProgram.from_json)
        deltas: dict[str, float] = {}
        try:
            loss = None
            if params["loss_program"]:
                loss = _cached(self._losses, params["loss_program"], LossProgram.from_json)
            if challenge.commitment != commitment.digest() or commitment.order != order.digest():
                raise AuditError("the challenge or the order belongs to another commitment")
            data = OpenedData(Opening.decode(params["opening"]).items, body)
            weights = data.checked("weights", commitment.roots, "weights_before")
            if set(weights) != set(program.parameters):
                raise AuditError("the weights that were opened are not those of the program")
            case = Case(Replayer(program, loss, weights), data, commitment, order, int(params["seed"]), deltas)
            found = _unit(case, challenge.unit) if challenge.tier == 1 else _step(case)
        except PeerFault as error:
            if "allocate memory" in str(error):
                return {"finding": "inconclusive", "reason": f"the replay ran out of memory: {error}", "deltas": deltas}
            return {"finding": "fraudulent", "reason": str(error)[:2000], "deltas": deltas}
        if found is not None:
            deltas[found.name] = found.distance
            return {"finding": "fraudulent", "reason": str(found), "deltas": deltas}
        return {"finding": "honest", "reason": "within what honest computation gives", "deltas": deltas}


def _cached(cache: OrderedDict[bytes, Any], data: bytes, parse: Callable[[bytes], Any]) -> Any:
    key = digest_of("program cache", data)
    if key not in cache:
        cache[key] = parse(data)
        while len(cache) > MAX_CACHED:
            cache.popitem(last=False)
    return cache[key]


# -- tier 1: one micro-batch -------------------------------------------------------------------------------------------


def _inputs(case: Case, index: int) -> tuple[Unit, UnitInputs]:
    """A unit and what it starts from, every part held against the commitment and the author's order."""
    if not 0 <= index < len(case.commitment.units):
        raise AuditError(f"unit {index} of {len(case.commitment.units)}")
    unit = case.commitment.units[index]
    prefix, data = f"unit/{index}", case.data
    mode = [int(flag) for flag in data.get(f"{prefix}/mode")]
    training, with_loss = mode == [1, 0] or mode == [1, 1], mode[1:] == [1]
    if unit.roots.get("mode") != mode_digest(training, "train_step" if with_loss else "forward"):
        raise AuditError(f"opened other data: {prefix}/mode")
    # a forward without a backward says nothing of the loss: evaluation between two steps
    if unit.backward_pass >= 0 and with_loss != (case.order.loss != NO_DIGEST):
        raise AuditError("the author's order names a loss and the unit was computed without one, or the reverse")
    program, loss = case.replayer.program, case.replayer.loss
    ends_here = with_loss and program.stage_index == program.num_stages - 1
    weight = None
    if ends_here:
        if loss is None or loss.digest != case.order.loss:
            raise AuditError("opened other data: the loss program is not the one that the author ordered")
        if unit.micro_batch >= len(case.order.loss_weights):
            raise AuditError(f"micro-batch {unit.micro_batch}: the author ordered {len(case.order.loss_weights)}")
        weight = float.fromhex(case.order.loss_weights[unit.micro_batch])
    place = (case.commitment.replica, case.commitment.step, unit.call, unit.micro_batch)
    gradients = [i for i, slot in enumerate(program.outputs.slots) if slot.requires_grad]
    num_targets = len(loss.inputs.slots) - loss.num_outputs if loss is not None and ends_here else 0
    return unit, UnitInputs(
        x=_slots(case, unit, prefix, "x", range(len(program.inputs.slots))),
        gy=_slots(case, unit, prefix, "gy", gradients if unit.backward_pass >= 0 and not ends_here else []),
        target=_slots(case, unit, prefix, "target", range(num_targets)),
        buffers=data.checked(f"{prefix}/buffers", unit.roots, "buffers"),
        training=training,
        loss_weight=weight,
        backward=unit.backward_pass >= 0,
        seeds=seed_for(case.seed, *place),
    )


def _slots(case: Case, unit: Unit, prefix: str, name: str, expected: Iterable[int]) -> dict[str, Tensor]:
    """A group of a unit, with exactly the slots that the program's cut has there."""
    group = case.data.checked(f"{prefix}/{name}", unit.roots, name)
    if set(group) != {str(slot) for slot in expected}:
        raise AuditError(f"{prefix}/{name} has slots {sorted(group)!r:.100}, the cut has {sorted(expected)!r:.100}")
    return group


def _unit(case: Case, index: int) -> Deviation | None:
    unit, inputs = _inputs(case, index)
    return _compare_unit(case, index, unit, inputs, case.replayer.unit(inputs))


def _compare_unit(case: Case, index: int, unit: Unit, inputs: UnitInputs, native: UnitResult) -> Deviation | None:
    """The outputs, the loss and the input gradients of one unit against what was committed to."""
    claimed: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    for name in ("y", "loss", "gx"):
        group = case.data.checked(f"unit/{index}/{name}", unit.roots, name)
        replayed: dict[str, Tensor] = getattr(native, name)
        if set(group) != set(replayed):
            raise AuditError(f"unit {index}: {name} has slots {sorted(group)}, computed were {sorted(replayed)}")
        claimed.update({f"{name}/{slot}": tensor for slot, tensor in group.items()})
        ours.update({f"{name}/{slot}": tensor for slot, tensor in replayed.items()})

    def results(variant: Variant) -> Mapping[str, Tensor]:
        again = case.replayer.unit(inputs, variant)
        groups = {"y": again.y, "loss": again.loss, "gx": again.gx}
        return {f"{name}/{slot}": tensor for name, group in groups.items() for slot, tensor in group.items()}

    return _compare(case, f"unit {index} ", claimed, ours, results, native.random)


def _compare(
    case: Case, prefix: str, claimed: Mapping[str, Tensor], native: Mapping[str, Tensor], results: Results, random: bool
) -> Deviation | None:
    """Bits first; only where they differ is the noise of this computation measured."""
    if all(digest("", claimed[name]) == digest("", native[name]) for name in claimed):
        return None
    other = 2 if torch.get_num_threads() == 1 else 1
    variants = [Variant("threads", num_threads=other), Variant("plain kernels", onednn=False)]
    replays = [native, *(results(variant) for variant in variants)]
    # in float64 dropout draws other masks: such a replay would measure the dropout, not the noise
    exact = None if random else results(Variant("float64", exact=True))
    if exact is not None and not usable_exact(exact, native):
        exact = None
    for name, tensor in claimed.items():
        found = deviation(
            prefix + name, tensor, [replay[name] for replay in replays], None if exact is None else exact[name]
        )
        if found is not None:
            return found
        if tensor.is_floating_point():
            case.deltas[prefix + name] = float(torch.linalg.vector_norm((tensor - native[name]).double()))
    return None


# -- tier 2: a whole step ----------------------------------------------------------------------------------------------


def _step(case: Case) -> Deviation | None:
    """Every unit, the chain of buffers, the accumulated gradient, clipping, and the optimizer's update."""
    units = [_inputs(case, index) for index in range(len(case.commitment.units))]
    _check_units(case, [unit for unit, _ in units])
    after: dict[tuple[int, int], tuple[UnitInputs, UnitResult]] = {}
    random, total = False, GradientSum()
    for index, (unit, inputs) in enumerate(units):
        native = case.replayer.unit(inputs)
        found = _compare_unit(case, index, unit, inputs, native)
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
    known: Mapping[str, Tensor] = case.data.checked("buffers_before", roots, "buffers_before")
    steps = [(inputs.buffers, result.buffers) for inputs, result in forwards]
    last = case.data.checked("buffers_after", roots, "buffers_after")
    for begins, ends in [*steps, (last, last)]:
        if set(begins) != set(known):
            raise AuditError("buffers were opened under other names than the program's")
        for name, tensor in begins.items():
            found = deviation(f"buffer {name}", tensor, [known[name]], None)
            if found is not None:
                return found
        known = ends
    return None


def _gradient(case: Case, units: Sequence[UnitInputs], native: Mapping[str, Tensor], random: bool) -> Deviation | None:
    claimed = case.data.checked("gradient", case.commitment.roots, "gradient")
    if set(claimed) != set(native):
        raise AuditError(f"gradients of {sorted(set(claimed) ^ set(native))[:5]} are missing or too many")
    named = {f"gradient {name}": tensor for name, tensor in native.items()}

    def results(variant: Variant) -> Mapping[str, Tensor]:
        return {f"gradient {name}": tensor for name, tensor in case.replayer.gradient(units, variant).items()}

    renamed = {f"gradient {name}": tensor for name, tensor in claimed.items()}
    found = _compare(case, "", renamed, named, results, random)
    return found or _norm(case, claimed)


def _norm(case: Case, gradient: Mapping[str, Tensor]) -> Deviation | None:
    """The norm that the worker reported, and a clip coefficient that the author's order allows."""
    squared = sum(float(tensor.double().square().sum()) for tensor in gradient.values())
    reported = float.fromhex(case.commitment.squared_norm)
    if not math.isclose(reported, squared, rel_tol=NORM_TOLERANCE, abs_tol=1e-30):
        return Deviation(
            "squared norm", abs(reported - squared), NORM_TOLERANCE * squared, "is not that of the gradient"
        )
    coefficient = float.fromhex(case.commitment.clip_coefficient)
    # other stages' norms are not known here: the global norm is at least this stage's
    most = 1.0 if not case.order.clip_norm else float.fromhex(case.order.clip_norm) / max(math.sqrt(squared), 1e-30)
    least = 0.0 if case.order.clip_norm else 1.0
    if not least <= coefficient <= min(1.0, most * (1 + NORM_TOLERANCE)):
        return Deviation(
            "clip coefficient", coefficient, min(1.0, most), "is not what the order and the gradient allow"
        )
    return None


def _update(case: Case) -> Deviation | None:
    """The optimizer, run again from the committed gradient with the author's options."""
    roots, data = case.commitment.roots, case.data
    before = case.replayer.weights
    optimizer_before = data.checked("optimizer", roots, "optimizer_before")
    claimed = data.checked("weights_after", roots, "weights_after")
    claimed_state = data.checked("optimizer_after", roots, "optimizer_after")
    program = case.replayer.program
    weights = {
        name: tensor.clone().requires_grad_(program.parameters[name].requires_grad) for name, tensor in before.items()
    }
    optimizer = StageOptimizer(case.order.optimizer, case.order.options, weights)
    if optimizer_before:
        _check_state(optimizer_before, before)
        optimizer.load_state_tensors(optimizer_before)
    gradient = data.checked("gradient", roots, "gradient")
    optimizer.step(clipped(gradient, float.fromhex(case.commitment.clip_coefficient)), case.order.options)
    replayed = {name: tensor.detach() for name, tensor in weights.items()}
    state = optimizer.state_tensors()
    if set(claimed) != set(replayed) or set(claimed_state) != set(state):
        raise AuditError("weights or optimizer state after the step have other names than they must")
    if root(replayed) == roots["weights_after"] and root(state) == roots["optimizer_after"]:
        return None
    pairs: list[tuple[str, Tensor | None, Tensor, Tensor]] = [
        (name, before[name], claimed[name], replayed[name]) for name in replayed
    ]
    pairs += [(name, optimizer_before.get(name), claimed_state[name], state[name]) for name in state]
    return next((found for pair in pairs if (found := update_deviation(*pair)) is not None), None)


def _check_state(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Optimizer state belongs to parameters, and each tensor of it has one element or the parameter's shape."""
    for name, tensor in state.items():
        parameter = weights.get(name.rpartition("/")[0])
        if parameter is None or (tensor.numel() != 1 and tensor.shape != parameter.shape):
            raise AuditError(f"optimizer state {name!r:.100} of shape {list(tensor.shape)} fits no parameter")
