"""Schedules of a pipeline as data: who computes what, in which order, and what that costs.

A schedule is one list of actions per stage. The generators are pure functions; `simulate` plays a schedule against
given costs, refuses one that is wrong or cannot finish, and gives a timetable that prints as a grid. At run time the
executor takes from a schedule only how many forwards a stage may hold (`max_in_flight`): order follows what is ready.

Sources: GPipe (Huang et al., 2019, arXiv:1811.06965), 1F1B (Narayanan et al., 2021, arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tensorlink.errors import PartitionError

#: F forward, B whole backward; I (input gradient) and W (weight gradient) are a backward in two parts, for zero-bubble.
Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One piece of work; prints as `2F0`: stage 2, forward, micro-batch 0."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Schedule = Sequence[Sequence[Action]]
Costs = Mapping[Kind, float]

UNIT_COSTS: Costs = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def gpipe(num_stages: int, num_micro_batches: int) -> list[list[Action]]:
    """All forwards, then all backwards: what the drop-in loop needs, for its loss comes after every output."""
    _check(num_stages, num_micro_batches)
    batches = range(num_micro_batches)
    return [[Action(s, "F", m) for m in batches] + [Action(s, "B", m) for m in batches] for s in range(num_stages)]


def one_forward_one_backward(num_stages: int, num_micro_batches: int) -> list[list[Action]]:
    """1F1B: stage s warms up with `num_stages - s - 1` forwards, then alternates; it never holds more than
    `num_stages - s`."""
    _check(num_stages, num_micro_batches)
    schedule = []
    for stage in range(num_stages):
        warm = min(num_stages - stage - 1, num_micro_batches)
        actions = [Action(stage, "F", m) for m in range(warm)]
        for m in range(num_micro_batches - warm):
            actions += [Action(stage, "F", warm + m), Action(stage, "B", m)]
        actions += [Action(stage, "B", m) for m in range(num_micro_batches - warm, num_micro_batches)]
        schedule.append(actions)
    return schedule


GENERATORS: dict[str, Callable[[int, int], list[list[Action]]]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def max_in_flight(actions: Sequence[Action]) -> int:
    """The most forwards that one stage's list holds at once before their backwards (B, or I where it is split)."""
    held = most = 0
    for action in actions:
        held += {"F": 1, "B": -1, "I": -1, "W": 0}[action.kind]
        most = max(most, held)
    return most


@dataclass(frozen=True)
class Timetable:
    """When each action runs. `makespan` in the unit of the costs; `busy` per stage as a fraction of it."""

    start: Mapping[Action, float]
    end: Mapping[Action, float]
    num_stages: int

    @property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max(self.end.values())

    @property
    def busy(self) -> list[float]:
        """Share of the makespan in which each stage computes."""
        used = [0.0] * self.num_stages
        for action in self.start:
            used[action.stage] += self.end[action] - self.start[action]
        return [seconds / self.makespan for seconds in used]

    def __str__(self) -> str:
        """A grid: a row per stage, a column per moment at which something starts."""
        moments = sorted(set(self.start.values()))
        width = max(len(str(action)) for action in self.start) + 1
        rows = []
        for stage in range(self.num_stages):
            at = {self.start[action]: str(action) for action in self.start if action.stage == stage}
            rows.append("".join(at.get(moment, ".").ljust(width) for moment in moments).rstrip())
        return "\n".join(rows)


def simulate(schedule: Schedule, costs: Costs = UNIT_COSTS, transfer: float = 0.0) -> Timetable:
    """The timetable of `schedule` where an action takes `costs[kind]` and a tensor `transfer` to the next stage.

    Raises PartitionError, naming the action, for one that is missing, doubled, out of order, or waits for ever.
    """
    _check_actions(schedule)
    end: dict[Action, float] = {}
    start: dict[Action, float] = {}
    position = [0] * len(schedule)
    free_at = [0.0] * len(schedule)
    while any(position[s] < len(schedule[s]) for s in range(len(schedule))):
        moved = False
        for stage, actions in enumerate(schedule):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                needs = _needs(action, len(schedule))
                if any(need not in end for need in needs):
                    break
                ready = max((end[n] + (transfer if n.stage != stage else 0.0) for n in needs), default=0.0)
                start[action] = max(ready, free_at[stage])
                end[action] = free_at[stage] = start[action] + costs[action.kind]
                position[stage] += 1
                moved = True
        if not moved:
            stuck = [str(actions[at]) for actions, at in zip(schedule, position, strict=True) if at < len(actions)]
            raise PartitionError(f"the schedule deadlocks: {', '.join(stuck)} wait for what only comes after them")
    return Timetable(start, end, len(schedule))


def _needs(action: Action, num_stages: int) -> list[Action]:
    stage, m = action.stage, action.micro_batch
    if action.kind == "F":
        return [Action(stage - 1, "F", m)] if stage else []
    if action.kind == "W":
        return [Action(stage, "I", m)]
    # the next stage may have split its backward: its input gradient is what is needed
    later = [Action(stage + 1, "B" if action.kind == "B" else "I", m)] if stage + 1 < num_stages else []
    return [Action(stage, "F", m), *later]


def _check(num_stages: int, num_micro_batches: int) -> None:
    if num_stages < 1 or num_micro_batches < 1:
        raise PartitionError(
            f"{num_stages} stages and {num_micro_batches} micro-batches: at least one of each is needed"
        )


def _check_actions(schedule: Schedule) -> None:
    for stage, actions in enumerate(schedule):
        seen: set[Action] = set()
        for action in actions:
            if action in seen or action.stage != stage:
                raise PartitionError(f"{action} stands twice, or on stage {stage} where it does not belong")
            seen.add(action)
        forwards = {action.micro_batch for action in actions if action.kind == "F"}
        backwards = {action.micro_batch for action in actions if action.kind in "BW"}
        if forwards != backwards:
            odd = sorted(forwards ^ backwards)
            raise PartitionError(
                f"stage {stage}: micro-batches {odd} have a forward without a backward, or the reverse"
            )
