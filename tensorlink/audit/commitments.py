"""What a worker commits to, as roots over tensors; the same functions on the worker, the user and the auditor.

The content of a `Commitment` is built here from a step's log; the node adds what chains and signs it. Floats are
`float.hex()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smartnodes_core.audit import received_from, sent_to
from smartnodes_core.records import canonical, digest_of
from tensorlink.program.graph import StageProgram
from tensorlink.records import set_root
from tensorlink.steplog.digests import digest, digests, root, slots
from tensorlink.steplog.log import ForwardRecord, StepRecord, UnitRecord


def input_root(tensors: Mapping[int, Tensor]) -> bytes:
    """The root over what enters a stage for one micro-batch, by slot: equal to the `x` that the stage commits to."""
    return root(slots(tensors))


def initial_root(program: StageProgram, state: Mapping[str, Tensor]) -> bytes:
    """What a job record names as the state in which a stage begins: weights and buffers (constants among them)."""
    return initial_root_of(program, {name: digest(name, state[name]) for name in program.expected_state()})


def initial_root_of(program: StageProgram, digests: Mapping[str, bytes]) -> bytes:
    """The same from the tensors' digests, for those who do not hold all tensors at once."""
    weights = set_root({name: digests[name] for name in program.parameters})
    buffers = set_root({name: digests[name] for name in program.buffers})
    return set_root({"weights": weights, "buffers": buffers})


def mode_root(forward: ForwardRecord) -> bytes:
    """Binds how a micro-batch was computed: training or evaluation, with a loss in the last stage or without."""
    return mode_digest(forward.training, forward.type)


def mode_digest(training: bool, type: str) -> bytes:
    """See `mode_root`."""
    return digest_of("tensorlink mode", canonical({"training": training, "type": type}))


class Roots:
    """Roots of a stage's state from commitment to commitment: what is after one interval is before the next.

    Not thread-safe: used by the one thread that hashes.
    """

    def __init__(self) -> None:
        self._known: dict[str, bytes] = {}
        self._buffers: dict[str, tuple[Tensor, bytes]] = {}

    def forget(self) -> None:
        """The state was replaced from outside."""
        self._known.clear()

    def before(self, name: str, tensors: Mapping[str, Tensor]) -> bytes:
        """The root of a part of the state before an interval, computed only where none came before."""
        if name not in self._known:
            self._known[name] = root(tensors)
        return self._known[name]

    def after(self, name: str, tensors: Mapping[str, Tensor]) -> bytes:
        """The root after an interval."""
        self._known[name] = root(tensors)
        return self._known[name]

    def buffers(self, buffers: Mapping[str, Tensor]) -> bytes:
        """The root of buffers; those that are the same tensors as last time are not hashed again."""
        found = {}
        for name, tensor in buffers.items():
            known = self._buffers.get(name)
            if known is None or known[0] is not tensor:
                known = self._buffers[name] = (tensor, digest(name, tensor))
            found[name] = known[1]
        return set_root(found)


def build(
    record: StepRecord,
    gradient: bytes,
    roots: Roots,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    work_units: int,
) -> dict[str, Any]:
    """The content of a step's commitment; `weights` and `optimizer` are the state after it, not to be written
    meanwhile.

    `gradient` is the root of the record's, which may have left memory since; `work_units` is what one micro-batch,
    forwards and backwards, is worth. Weights and optimizer state are bound where an interval of steps begins and ends.
    """
    if not record.committed:
        raise ValueError(f"step {record.step} is not committed")
    units = [
        {
            "call": unit.forward.call,
            "backward_pass": unit.backward_pass,
            "micro_batch": unit.forward.micro_batch,
            "roots": unit_roots(unit, roots),
        }
        for unit in record.all_units()
    ]
    bound = {
        "buffers_before": roots.buffers(record.buffers_before),
        "buffers_after": roots.buffers(record.buffers_after),
        "gradient": gradient,
    }
    if record.before is not None:
        bound["weights_before"] = roots.before("weights", record.before.weights)
        bound["optimizer_before"] = roots.before("optimizer", record.before.optimizer)
    if record.ends_interval:
        bound["weights_after"] = roots.after("weights", weights)
        bound["optimizer_after"] = roots.after("optimizer", optimizer)
    return {
        "step": record.step,
        "roots": bound,
        "units": units,
        "shared_roots": shared_roots(record),
        "order": record.order,
        "squared_norm": record.squared_norm.hex(),
        "clip_coefficient": record.clip_coefficient.hex(),
        "work_units": work_units * len(record.units),
    }


def shared_roots(record: StepRecord) -> dict[str, bytes]:
    """Per other holder of tied parameters: the root over the sums that were sent to it, and over those it sent."""
    found = {received_from(stage): root(sums) for stage, sums in record.received_sums.items()}
    known: dict[str, bytes] = {}  # the same sum goes to every holder
    for stage, sums in record.sent_sums.items():
        known.update(digests({name: tensor for name, tensor in sums.items() if name not in known}))
        found[sent_to(stage)] = set_root({name: known[name] for name in sums})
    return found


def unit_roots(unit: UnitRecord, roots: Roots) -> dict[str, bytes]:
    """The roots of one unit: `x`, `y`, `buffers` (before its forward), `mode`; `gy`, `gx` of a backward; `target`,
    `loss`."""
    forward = unit.forward
    found = {"buffers": roots.buffers(forward.buffers), "mode": mode_root(forward)}
    groups = {}
    if forward.digests is not None:
        groups.update(forward.digests.result())
    if unit.digests is not None:
        groups.update(unit.digests.result())
    for name in ("x", "y", "target", "loss", "gy", "gx"):
        if groups.get(name) or name in ("x", "y") or (name in ("gy", "gx") and unit.backward_pass >= 0):
            found[name] = set_root(groups.get(name, {}))
    return found
