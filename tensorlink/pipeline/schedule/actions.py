"""What a schedule is: one ordered list of actions for each worker, and where each stage lives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tensorlink.errors import PartitionError

#: F forward, B whole backward; I (input gradient) and W (weight gradient) are a backward in two parts.
Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One piece of work; prints as `2F0`: stage 2, forward, micro-batch 0."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """`placement[stage]` is the worker that holds a stage, `workers[w]` what worker w does, in order."""

    name: str
    placement: tuple[int, ...]
    workers: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    @cached_property
    def num_micro_batches(self) -> int:
        return 1 + max((action.micro_batch for actions in self.workers for action in actions), default=-1)

    def stages_of(self, worker: int) -> tuple[int, ...]:
        """The stages that a worker holds, in the order of the model."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == worker)

    def of_stage(self, stage: int) -> tuple[Action, ...]:
        """What is done on one stage, in order."""
        return tuple(action for action in self.workers[self.placement[stage]] if action.stage == stage)

    def check(self) -> None:
        """Raises PartitionError, naming an action, unless every stage has each micro-batch's forward and backward,
        whole or in two parts, exactly once, on the worker that holds the stage. Whether the order can finish only
        `simulate` tells.
        """
        if not set(self.placement) <= set(range(self.num_workers)):
            raise PartitionError(f"stages lie on workers {sorted(set(self.placement))} of {self.num_workers}")
        seen: set[Action] = set()
        for worker, actions in enumerate(self.workers):
            for action in actions:
                if action in seen:
                    raise PartitionError(f"{action} stands twice in the schedule")
                if not 0 <= action.stage < self.num_stages or self.placement[action.stage] != worker:
                    raise PartitionError(f"{action} is on worker {worker}, which does not hold stage {action.stage}")
                seen.add(action)
        for stage in range(self.num_stages):
            for micro_batch in range(self.num_micro_batches):
                kinds = {kind for kind in ("F", "B", "I", "W") if Action(stage, kind, micro_batch) in seen}
                if kinds not in ({"F", "B"}, {"F", "I", "W"}):
                    found = ", ".join(f"{stage}{kind}{micro_batch}" for kind in sorted(kinds)) or "nothing"
                    raise PartitionError(
                        f"stage {stage} does {found} with micro-batch {micro_batch}: needed are a forward F and either "
                        "a whole backward B or its parts I and W"
                    )


def max_in_flight(actions: Iterable[Action]) -> int:
    """The most forwards that wait at once for their backward (B, or I where it is split), on a stage or a worker."""
    return _most(actions, {"F": 1, "B": -1, "I": -1, "W": 0})


def max_held(actions: Iterable[Action]) -> int:
    """The most micro-batches of which something is held at once: from the forward to the end of the backward, which is
    W where it is split. This is what memory is needed for, on a stage or a worker.
    """
    return _most(actions, {"F": 1, "B": -1, "I": 0, "W": -1})


def _most(actions: Iterable[Action], change: dict[Kind, int]) -> int:
    held = most = 0
    for action in actions:
        held += change[action.kind]
        most = max(most, held)
    return most


def check_sizes(num_workers: int, num_micro_batches: int, stages_per_worker: int = 1) -> None:
    """Raises PartitionError where there is nothing to schedule."""
    if min(num_workers, num_micro_batches, stages_per_worker) < 1:
        raise PartitionError(
            f"{num_workers} workers, {stages_per_worker} stages on each and {num_micro_batches} micro-batches: at "
            "least one of each is needed"
        )
