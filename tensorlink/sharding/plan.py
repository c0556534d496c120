"""Which rigs run which part of a model, under which schedule: what the simulator says is fastest and memory allows.

A pure function of what rigs announced and of a way to cut the model. For each schedule and choice of rigs the model is
cut in proportion to the rigs' speeds; a stage that is too large for its rig's memory is made smaller at the others'
cost; the simulator predicts the step. The plan prints as a table. Neighbours: `rigs.py`, `memory.py`, `needs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from smartnodes_core.errors import NoWorkersError
from smartnodes_core.records import Announcement
from tensorlink.errors import PartitionError
from tensorlink.pipeline.schedule import GENERATORS, Kind, Schedule, Timetable, generate, max_held, simulate
from tensorlink.sharding.memory import Memory, StageNeed, Training
from tensorlink.sharding.rigs import Rig, free_slots

#: How much longer a backward takes in two parts. Measured: at most 1.24, a few percent for a transformer.
SPLIT_COST = 1.05
#: Of plans that are this much slower at most, the one that needs least memory is taken.
SLACK = 0.01
#: How often a cut is shifted away from rigs whose memory it overfills.
REPAIRS = 6
#: Stages on each worker that are tried.
STAGES_PER_WORKER = {"interleaved": (2, 3), "zbv": (2,)}

#: The model cut into as many stages as there are figures, in proportion to them. Raises PartitionError.
CutModel = Callable[[tuple[float, ...]], Sequence[StageNeed]]


@dataclass(frozen=True)
class Placed:
    """One stage on one rig. `held`: micro-batches between forward and backward at most; seconds of a micro-batch."""

    stage: int
    worker: Announcement
    need: StageNeed
    held: int
    memory: Memory
    forward_s: float
    backward_s: float

    @property
    def micro_batch_s(self) -> float:
        """Forward and backward of a micro-batch."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class PlacementPlan:
    """Every stage placed, the rigs that are left over, and how a step is expected to go.

    `shares` are the figures by which the model was cut.
    """

    stages: list[Placed]
    spares: list[Announcement]
    schedule: Schedule
    timetable: Timetable
    shares: tuple[float, ...]
    rigs: tuple[Rig, ...]

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step's forwards and backwards."""
        return self.timetable.makespan

    @cached_property
    def memory(self) -> list[Memory]:
        """What each rig has to hold, all its stages together."""
        return [
            sum((self.stages[stage].memory for stage in self.schedule.stages_of(worker)), Memory())
            for worker in range(len(self.rigs))
        ]

    @property
    def overfull(self) -> list[float]:
        """Needed by offered memory, per rig."""
        pairs = zip(self.memory, self.rigs, strict=True)
        return [memory.total / max(1, rig.memory_bytes) for memory, rig in pairs]

    def table(self) -> str:
        """The plan in lines of text."""
        rows = ["stage  worker    needs MB  of MB    forward + backward ms"]
        for placed in self.stages:
            rig = self.rigs[self.schedule.placement[placed.stage]]
            rows.append(
                f"{placed.stage:5d}  {rig.name}  {placed.memory.total / 1e6:8.1f}  {rig.memory_bytes / 1e6:7.0f}"
                f"  {placed.forward_s * 1e3:.1f} + {placed.backward_s * 1e3:.1f}"
            )
        rows.append(
            f"schedule {self.schedule.name}, {self.schedule.num_micro_batches} micro-batches, predicted step "
            f"{self.step_s * 1e3:.0f} ms, {self.timetable.bubble:.0%} idle, spares: {len(self.spares)}"
        )
        return "\n".join(rows)


def plan(
    cut: CutModel,
    workers: Sequence[Announcement],
    training: Training,
    *,
    flops_per_s: int,
    num_workers: int | None = None,
    schedule: str = "auto",
) -> PlacementPlan:
    """The best plan on `num_workers` of the rigs; None takes all that are free, but for those too slow to be of use.

    `flops_per_s` is the speed of the machine that the seconds of stages are from. Raises NoWorkersError with the
    numbers where rigs or their memory do not suffice, PartitionError for a schedule or number of stages that cannot be.
    """
    free = [Rig.of(worker, flops_per_s) for worker in workers if free_slots(worker) > 0]
    if len(free) < (num_workers or 1):
        raise NoWorkersError(
            f"found {len(free)} free workers ({len(workers)} announced), needed {num_workers or 1}: start more with "
            "tensorlink-worker, or ask for fewer stages"
        )
    cut = cache(cut)  # schedules share cuts
    free.sort(key=lambda rig: (-rig.flops_per_s, rig.worker.node_key))
    found: list[PlacementPlan] = []
    refused: list[PartitionError] = []
    for rigs in _choices(free, num_workers):
        for name, num_stages in _forms(schedule, len(rigs)):
            try:
                order = generate(name, len(rigs), training.num_micro_batches, num_stages)
                found.append(_fitted(cut, order, rigs, free, training, flops_per_s))
            except PartitionError as error:
                refused.append(error)
    fitting = [one for one in found if max(one.overfull) <= 1]
    if fitting:
        quickest = min(one.step_s for one in fitting)
        quick = [one for one in fitting if one.step_s <= quickest * (1 + SLACK)]
        return min(quick, key=lambda one: sum(memory.total for memory in one.memory))
    if not found:
        raise refused[0]
    raise _too_large(min(found, key=lambda one: max(one.overfull)))


def check_schedule(name: str) -> None:
    """Raises PartitionError for a schedule that is not run."""
    if name not in ("auto", *GENERATORS):
        raise PartitionError(f"found schedule={name!r:.40}, needed 'auto' or one of {', '.join(GENERATORS)}")


def _forms(schedule: str, num_workers: int) -> Iterator[tuple[str, int]]:
    """Schedules to try, each with a number of stages."""
    for name in GENERATORS if schedule == "auto" else (schedule,):
        for stages_per_worker in STAGES_PER_WORKER.get(name, (1,)):
            yield name, stages_per_worker * num_workers


def _choices(free: Sequence[Rig], num_workers: int | None) -> Iterator[tuple[Rig, ...]]:
    """Rigs in the order of the pipeline. `free` is sorted, the fastest first."""
    counts = [num_workers] if num_workers else [n for n in range(1, len(free) + 1) if _slows_down(free, n)]
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for count in counts:
        fastest = free[:count]
        # early stages hold more activations: where memory is short, the rigs with most of it come first
        largest = sorted(free, key=lambda rig: -rig.memory_bytes)[:count]
        by_memory = sorted(fastest, key=lambda rig: -rig.memory_bytes)
        for rigs in (tuple(fastest), tuple(reversed(fastest)), tuple(by_memory), tuple(largest)):
            figures = tuple(rig.figures for rig in rigs)
            if figures not in seen:
                seen.add(figures)
                yield rigs


def _slows_down(free: Sequence[Rig], count: int) -> bool:
    """Whether the next rig after `count` is slower: a place to stop. There always is one behind the last."""
    return count == len(free) or free[count].flops_per_s < free[count - 1].flops_per_s


def _fitted(
    cut: CutModel,
    schedule: Schedule,
    rigs: Sequence[Rig],
    free: Sequence[Rig],
    training: Training,
    flops_per_s: int,
) -> PlacementPlan:
    """The model cut to the rigs' speeds, and then away from those that it does not fit on."""
    shares = [float(rigs[worker].flops_per_s) for worker in schedule.placement]
    best: PlacementPlan | None = None
    for _ in range(REPAIRS):
        made = _made(cut(tuple(shares)), schedule, rigs, free, training, flops_per_s, tuple(shares))
        if best is None or max(made.overfull) < max(best.overfull):
            best = made
        if max(made.overfull) <= 1:
            break
        for stage, worker in enumerate(schedule.placement):
            shares[stage] /= max(1.0, 1.1 * made.overfull[worker])
    assert best is not None
    return best


def _made(
    needs: Sequence[StageNeed],
    schedule: Schedule,
    rigs: Sequence[Rig],
    free: Sequence[Rig],
    training: Training,
    flops_per_s: int,
    shares: tuple[float, ...],
) -> PlacementPlan:
    stages, costs = [], []
    for stage, (need, worker) in enumerate(zip(needs, schedule.placement, strict=True)):
        rig, held = rigs[worker], max_held(schedule.of_stage(stage))
        slower = flops_per_s / rig.flops_per_s
        forward_s, backward_s = need.forward_s * slower, need.backward_s * slower
        stages.append(Placed(stage, rig.worker, need, held, need.memory(held, training), forward_s, backward_s))
        part_s = backward_s * SPLIT_COST / 2
        cost: dict[Kind, float] = {"F": forward_s, "B": backward_s, "I": part_s, "W": part_s}
        costs.append(cost)
    crossing = [
        rigs[here].seconds_to(rigs[there], need.crossing_bytes)
        for need, here, there in zip(needs, schedule.placement, schedule.placement[1:], strict=False)
    ]
    spares = [rig.worker for rig in free if rig not in rigs]
    return PlacementPlan(stages, spares, schedule, simulate(schedule, costs, crossing), shares, tuple(rigs))


def _too_large(closest: PlacementPlan) -> NoWorkersError:
    overfull = closest.overfull
    worker = overfull.index(max(overfull))
    stages = ", ".join(map(str, closest.schedule.stages_of(worker)))
    rig = closest.rigs[worker]
    return NoWorkersError(
        f"no plan fits the memory of the free workers. The closest, {closest.schedule.name} on {len(closest.rigs)} "
        f"workers, needs {closest.memory[worker]} for stage {stages} on worker {rig.name}, which offers "
        f"{rig.memory_bytes / 1e6:.1f} MB: use more workers, smaller micro-batches, or a shorter audit window"
    )
