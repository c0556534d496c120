"""The schedules with a backward in two parts: weight gradients, for which nobody waits, fill what were bubbles.

Sources: ZB-H1 (Qi et al., 2023, "Zero Bubble Pipeline Parallelism", arXiv:2401.10241, section 2.1); placement in a V
(Qi et al., 2024, "Pipeline Parallelism with Controllable Memory", arXiv:2405.15362).
"""

from __future__ import annotations

from tensorlink.pipeline.schedule.actions import Action, Kind, Schedule, check_sizes


def zero_bubble(num_workers: int, num_micro_batches: int) -> Schedule:
    """ZB-H1: 1F1B with split backwards, where stage s puts every weight gradient off by s micro-batches.

    With p workers, m >= p micro-batches and F = I = W = 1 it takes 3 m + p - 1, a third of the bubble of 1F1B; with
    fewer, 2 m + 2 p - 1, the least that can be. Every stage holds something of at most p micro-batches.
    """
    check_sizes(num_workers, num_micro_batches)
    batches = range(num_micro_batches)
    workers = []
    for stage in range(num_workers):
        warm = min(num_workers - stage - 1, num_micro_batches)
        actions = [Action(stage, "F", m) for m in batches[:warm]]
        for m in batches:
            actions += [Action(stage, "F", later) for later in batches[m + warm : m + warm + 1]]
            actions.append(Action(stage, "I", m))
            actions += [Action(stage, "W", m - stage)] if m >= stage else []
        actions += [Action(stage, "W", m) for m in batches[max(0, num_micro_batches - stage) :]]
        workers.append(tuple(actions))
    return Schedule("zb", tuple(range(num_workers)), tuple(workers))


#: What a worker of a V does first when it could do several things: (kind, whether on its later stage).
_FIRST_IN_A_V: tuple[tuple[Kind, bool], ...] = (
    ("F", True),
    ("I", False),
    ("F", False),
    ("W", False),
    ("I", True),
    ("W", True),
)


def zero_bubble_v(num_workers: int, num_micro_batches: int) -> Schedule:
    """Zero bubble on a V: of 2 p stages worker w holds stages w and 2 p - 1 - w, so the last is where the first is.

    With m >= p micro-batches and F = I = W = 1 on each of the 2 p stages it takes 6 m + p - 1, the bubble being half of
    ZB-H1's; with fewer, 3 (p - m) - 1 more. A worker holds something of at most 2 p micro-batches on a stage, each half
    as large as on an undivided stage: the memory of 1F1B.

    Packed greedily, moment by moment: a worker does the first of `_FIRST_IN_A_V` that is ready and for which it
    has memory. The paper's hand-made order needs 2 p - 1 micro-batches to reach the same time.
    """
    check_sizes(num_workers, num_micro_batches)
    last = 2 * num_workers - 1
    placement = (*range(num_workers), *reversed(range(num_workers)))
    ended: dict[Action, int] = {}
    following: dict[tuple[int, Kind], int] = {}
    lists: list[list[Action]] = [[] for _ in range(num_workers)]
    held = [0] * num_workers

    def ready(stage: int, kind: Kind, now: int) -> Action | None:
        micro_batch = following.get((stage, kind), 0)
        if micro_batch == num_micro_batches or (kind == "F" and held[placement[stage]] == 2 * num_workers):
            return None
        needs = {
            "F": [Action(stage - 1, "F", micro_batch)] if stage else [],
            "I": [Action(stage, "F", micro_batch)] + ([Action(stage + 1, "I", micro_batch)] if stage < last else []),
            "W": [Action(stage, "I", micro_batch)],
        }[kind]
        return Action(stage, kind, micro_batch) if all(ended.get(need, now + 1) <= now for need in needs) else None

    moment = 0
    while len(ended) < 3 * (last + 1) * num_micro_batches:
        for worker, actions in enumerate(lists):
            candidates = (ready(last - worker if later else worker, kind, moment) for kind, later in _FIRST_IN_A_V)
            action = next((found for found in candidates if found is not None), None)
            if action is not None:
                actions.append(action)
                ended[action] = moment + 1
                following[action.stage, action.kind] = action.micro_batch + 1
                held[worker] += {"F": 1, "I": 0, "W": -1}[action.kind]
        moment += 1
    return Schedule("zbv", placement, tuple(tuple(actions) for actions in lists))
