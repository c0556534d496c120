"""Plays a schedule against given costs: how long it takes, or why it cannot finish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensorlink.errors import PartitionError
from tensorlink.pipeline.schedule.actions import Action, Kind, Schedule
from tensorlink.pipeline.schedule.timetable import Run, Timetable

#: Time of an action by kind, in any unit: one map for all stages, or one for each.
Costs = Mapping[Kind, float] | Sequence[Mapping[Kind, float]]

UNIT_COSTS: Mapping[Kind, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def simulate(schedule: Schedule, costs: Costs = UNIT_COSTS, transfer: float | Sequence[float] = 0.0) -> Timetable:
    """The timetable of `schedule`: an action takes `costs[kind]`, or `costs[stage][kind]`, one at a time on a worker.

    What crosses from stage s to s + 1, or back, takes `transfer`, or `transfer[s]`, on the sender's line, one tensor
    after the other, while both ends compute; between stages on one worker it takes nothing.

    Raises PartitionError, naming the action, for one that is missing, doubled, on the wrong worker, or waits for ever.
    """
    schedule.check()
    of_stage = costs if isinstance(costs, Sequence) else [costs] * schedule.num_stages
    crossing = transfer if isinstance(transfer, Sequence) else [transfer] * (schedule.num_stages - 1)
    if len(of_stage) != schedule.num_stages or len(crossing) != schedule.num_stages - 1:
        raise PartitionError(
            f"costs of {len(of_stage)} stages and {len(crossing)} transfers for {schedule.num_stages} stages: one "
            "cost each and one transfer between two are needed"
        )
    whole = {action for actions in schedule.workers for action in actions if action.kind == "B"}
    runs: list[Run] = []
    ended: dict[Action, float] = {}
    arrived: dict[Action, float] = {}  # when what an action made is where the neighbouring stage can use it
    free_at, line_free_at = [0.0] * schedule.num_workers, [0.0] * schedule.num_workers
    position = [0] * schedule.num_workers
    while len(runs) < sum(map(len, schedule.workers)):
        before = len(runs)
        for worker, actions in enumerate(schedule.workers):
            while position[worker] < len(actions):
                action = actions[position[worker]]
                own, other = _needs(action, schedule.num_stages, whole)
                if (own is not None and own not in ended) or (other is not None and other not in arrived):
                    break
                ready = max(ended[own] if own else 0.0, arrived[other] if other else 0.0)
                start = max(ready, free_at[worker])
                end = free_at[worker] = start + of_stage[action.stage][action.kind]
                runs.append(Run(action, start, end))
                ended[action] = arrived[action] = end
                to = _receiver(action, schedule.num_stages)
                if to is not None and schedule.placement[to] != worker:
                    sent = max(end, line_free_at[worker]) + crossing[min(action.stage, to)]
                    arrived[action] = line_free_at[worker] = sent
                position[worker] += 1
        if len(runs) == before:
            stuck = [
                str(actions[at]) for actions, at in zip(schedule.workers, position, strict=True) if at < len(actions)
            ]
            raise PartitionError(f"the schedule deadlocks: {', '.join(stuck)} wait for what only comes after them")
    return Timetable(tuple(runs), schedule.placement)


def _needs(action: Action, num_stages: int, whole: set[Action]) -> tuple[Action | None, Action | None]:
    """What must have been done before on the same stage, and what on a neighbouring one."""
    stage, m = action.stage, action.micro_batch
    if action.kind == "F":
        return None, Action(stage - 1, "F", m) if stage else None
    if action.kind == "W":
        return Action(stage, "I", m), None
    if stage + 1 == num_stages:
        return Action(stage, "F", m), None
    later = Action(stage + 1, "B", m)
    return Action(stage, "F", m), later if later in whole else Action(stage + 1, "I", m)


def _receiver(action: Action, num_stages: int) -> int | None:
    """The stage that what an action makes is sent to."""
    if action.kind == "W":
        return None
    to = action.stage + (1 if action.kind == "F" else -1)
    return to if 0 <= to < num_stages else None
