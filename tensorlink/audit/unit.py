"""Tier 1: one micro-batch executed again, forwards and backwards, and what makes two results the same.

Neighbours: `opened.py` gives the data, `compare.py` the tolerance, `step.py` goes on to whole steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smartnodes_core.errors import AuditError
from smartnodes_core.records import NO_DIGEST, Commitment, Unit
from tensorlink.audit.commitments import mode_digest
from tensorlink.audit.compare import HALF_FLOORS, Deviation, Room, deviation, projection, room, stray, usable_exact
from tensorlink.audit.interval import Start
from tensorlink.audit.nudge import VARIANTS, nudged
from tensorlink.audit.opened import OpenedData
from tensorlink.audit.residual import Residuals
from tensorlink.pipeline.seeds import seed_for
from tensorlink.records import StepOrder
from tensorlink.steplog.digests import digest
from tensorlink.steplog.replay import Replayer, UnitInputs, UnitResult, Variant

#: Tensors as a replayer computes them from units.
Results = Callable[[Replayer, Sequence[UnitInputs], Variant], Mapping[str, Tensor]]


@dataclass
class Case:
    """What one examination works with."""

    replayer: Replayer
    data: OpenedData
    commitment: Commitment
    order: StepOrder
    start: Start
    seed: int
    deltas: dict[str, float] = field(default_factory=dict)
    residuals: Residuals = field(default_factory=lambda: Residuals(b""))


def unit_inputs(case: Case, index: int) -> tuple[Unit, UnitInputs]:
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


def examine_unit(case: Case, index: int) -> Deviation | None:
    unit, inputs = unit_inputs(case, index)
    return compare_unit(case, index, unit, inputs, case.replayer.unit(inputs))


def compare_unit(case: Case, index: int, unit: Unit, inputs: UnitInputs, native: UnitResult) -> Deviation | None:
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

    def results(replayer: Replayer, units: Sequence[UnitInputs], variant: Variant) -> Mapping[str, Tensor]:
        again = replayer.unit(units[0], variant)
        groups = {"y": again.y, "loss": again.loss, "gx": again.gx}
        return {f"{name}/{slot}": tensor for name, group in groups.items() for slot, tensor in group.items()}

    return compare(case, f"unit {index} ", claimed, ours, [inputs], results, native.random)


def compare(
    case: Case,
    prefix: str,
    claimed: Mapping[str, Tensor],
    native: Mapping[str, Tensor],
    units: Sequence[UnitInputs],
    results: Results,
    random: bool,
) -> Deviation | None:
    """Bits first; only where they differ is the noise of this computation measured, by `results` of `units`."""
    if all(digest("", claimed[name]) == digest("", native[name]) for name in claimed):
        for name in claimed:
            case.residuals.equal(name)
        return None
    other = 2 if torch.get_num_threads() == 1 else 1
    variants = [Variant("threads", num_threads=other), Variant("plain kernels", onednn=False)]
    replays = [native, *(results(case.replayer, units, variant) for variant in variants)]
    # where dropout draws other masks in float64, such a replay would measure the dropout, not the noise
    exact: Mapping[str, Tensor] | None = results(case.replayer, units, Variant("float64", exact=True))
    if exact is not None and not usable_exact(exact, native, random):
        exact = None
    for name, tensor in claimed.items():
        each, precise = [replay[name] for replay in replays], None if exact is None else exact[name]
        honest = room(each, precise) if native[name].is_floating_point() else None
        found = deviation(prefix + name, tensor, each, precise, honest)
        if found is not None:
            return found
        if honest is not None:
            zeros = [*each, honest.centre]
            for draw, variant in enumerate(VARIANTS):
                found = stray(prefix + name, tensor, zeros)
                if found is None:
                    break
                zeros.append(results(*nudged(case.replayer, units, draw), variant)[name])
            else:
                return found
            case.deltas[prefix + name] = float(torch.linalg.vector_norm((tensor - native[name]).double()))
            _keep(case.residuals, name, tensor, native[name], honest)
    return None


def _keep(residuals: Residuals, name: str, claimed: Tensor, native: Tensor, honest: Room) -> None:
    """The residual of an accepted tensor. In half precision honest ones of other kernels come nearer to what is
    allowed: they count half, and their scale, a single number that walks at random, a quarter."""
    share = 2.0 if claimed.dtype in HALF_FLOORS else 1.0
    residuals.add(name, claimed, native, share * honest.allowed)
    if honest.projection:
        residuals.add_scale(name, projection(claimed, native) / (4.0 * honest.projection))
