"""What the stages of a cut model need: the profile's seconds and the graph's bytes, added up for each program."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tensorlink.program.graph import StageProgram
from tensorlink.program.limits import Estimate, check
from tensorlink.program.values import DTYPES
from tensorlink.records import Cut
from tensorlink.sharding.memory import StageNeed
from tensorlink.sharding.profile import Profile

#: Caps under which the user's side estimates a stage; a worker checks it again under its own.
MAX_STAGE_BYTES = 1 << 40
MAX_STAGE_FLOPS = 1 << 60


def estimate(program: StageProgram, samples: int) -> Estimate:
    """The cost of a micro-batch of `samples`. Raises ProgramError for a stage beyond any rig."""
    return check(program, batch=samples, max_bytes=MAX_STAGE_BYTES, max_flops=MAX_STAGE_FLOPS)


def needs_of(programs: Sequence[StageProgram], profile: Profile, samples: int) -> list[StageNeed]:
    """What each stage needs for micro-batches of `samples`."""
    return [_need(program, estimate(program, samples), profile, samples) for program in programs]


def _need(program: StageProgram, found: Estimate, profile: Profile, samples: int) -> StageNeed:
    share = samples / profile.batch
    ids = [node.id for node in program.train.nodes]
    sizes = {name: prod(spec.shape) * DTYPES[spec.dtype].itemsize for name, spec in program.parameters.items()}
    entering, leaving = _cut_bytes(program.inputs, samples), _cut_bytes(program.outputs, samples)
    back = _cut_bytes(program.inputs, samples, True) + _cut_bytes(program.outputs, samples, True)
    return StageNeed(
        forward_s=share * sum(profile.forward_s.get(node, 0.0) for node in ids),
        backward_s=share * sum(profile.backward_s.get(node, 0.0) for node in ids),
        flops=found.work_units,
        weight_bytes=found.parameter_bytes,
        parameter_bytes=sum(sizes.values()),
        trainable_bytes=sum(sizes[name] for name, spec in program.parameters.items() if spec.requires_grad),
        saved_bytes=found.saved_bytes,
        workspace_bytes=found.peak_activation_bytes - found.saved_bytes,
        crossing_bytes=leaving,
        logged_bytes=entering + leaving + back,
    )


def _cut_bytes(cut: Cut, samples: int, gradients_only: bool = False) -> int:
    return sum(
        prod(samples if size == -1 else size for size in slot.shape) * DTYPES[slot.dtype].itemsize
        for slot in cut.slots
        if slot.type == "tensor" and (slot.requires_grad or not gradients_only)
    )
