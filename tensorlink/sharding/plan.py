"""Who runs which stage: a pure function of what stages need and what rigs announced.

Stages are ordered by work, rigs by measured speed; the heaviest stage goes to the fastest rig whose memory holds it.
The plan prints as a table with the predicted time of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smartnodes_core.errors import NoWorkersError
from smartnodes_core.records import Announcement

#: Gradients, two moments of an Adam-like optimizer, and one retained copy of weights and moments, per byte of
#: parameters.
STATE_COPIES = 1 + 1 + 2 + 3


@dataclass(frozen=True)
class StageNeed:
    """What one stage needs: bytes of parameters and of the activations of the micro-batches in flight, FLOPs per
    micro-batch.
    """

    parameter_bytes: int
    activation_bytes: int
    flops: int

    @property
    def memory_bytes(self) -> int:
        """Weights, gradients, optimizer state, the copies kept for audits, and activations."""
        return self.parameter_bytes * STATE_COPIES + self.activation_bytes


@dataclass(frozen=True)
class Placed:
    """One stage on one rig, with the time one micro-batch is predicted to take there."""

    stage: int
    worker: Announcement
    need: StageNeed
    micro_batch_s: float


@dataclass(frozen=True)
class PlacementPlan:
    """Every stage placed, and the rigs that are left over."""

    stages: list[Placed]
    spares: list[Announcement]
    num_micro_batches: int

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step: the slowest stage paces the pipeline, filling and draining cost one pass of
        the others.
        """
        times = [placed.micro_batch_s for placed in self.stages]
        return max(times) * self.num_micro_batches + sum(times) - max(times)

    def table(self) -> str:
        """The plan in lines of text."""
        rows = ["stage  worker    memory MB  of MB    ms per micro-batch"]
        for placed in self.stages:
            rows.append(
                f"{placed.stage:5d}  {placed.worker.node_key.hex()[:8]}  {placed.need.memory_bytes / 1e6:9.1f}"
                f"  {memory_of(placed.worker) / 1e6:7.0f}  {placed.micro_batch_s * 1e3:.1f}"
            )
        rows.append(f"predicted step: {self.step_s * 1e3:.0f} ms, spares: {len(self.spares)}")
        return "\n".join(rows)


def memory_of(worker: Announcement) -> int:
    """Bytes that a rig offers for stages (0 where it did not say)."""
    return int(worker.offers.get("memory_bytes", 0))


def speed_of(worker: Announcement) -> float:
    """FLOPs per second that a rig measured of itself (1 where it did not say)."""
    return float(max(1, int(worker.offers.get("flops_per_s", 1))))


def plan(needs: Sequence[StageNeed], workers: Sequence[Announcement], num_micro_batches: int) -> PlacementPlan:
    """Place every stage on a rig of its own. Raises NoWorkersError with the numbers where stages do not fit."""
    free = [worker for worker in workers if int(worker.offers.get("free_slots", 1)) > 0]
    if len(free) < len(needs):
        raise NoWorkersError(
            f"found {len(free)} free workers ({len(workers)} announced), needed {len(needs)}, one for each stage: "
            "start more with tensorlink-worker, or ask for fewer stages"
        )
    placed: dict[int, Placed] = {}
    remaining = sorted(free, key=lambda worker: (-speed_of(worker), worker.node_key))
    for stage in sorted(range(len(needs)), key=lambda stage: (-needs[stage].flops, stage)):
        need = needs[stage]
        fitting = next((worker for worker in remaining if memory_of(worker) >= need.memory_bytes), None)
        if fitting is None:
            largest = max(memory_of(worker) for worker in remaining)
            raise NoWorkersError(
                f"stage {stage} needs {need.memory_bytes / 1e6:.1f} MB, the largest free worker offers "
                f"{largest / 1e6:.1f} MB: use more stages or smaller micro-batches"
            )
        remaining.remove(fitting)
        placed[stage] = Placed(stage, fitting, need, need.flops / speed_of(fitting))
    return PlacementPlan([placed[stage] for stage in range(len(needs))], remaining, num_micro_batches)
