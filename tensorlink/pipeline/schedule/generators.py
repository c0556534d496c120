"""The schedules with a whole backward: GPipe, 1F1B, interleaved 1F1B. Pure functions of the sizes.

Sources: GPipe (Huang et al., 2019, arXiv:1811.06965); 1F1B and interleaved 1F1B (Narayanan et al., 2021,
arXiv:2104.04473, section 2.2). With p workers, m micro-batches, F = 1 and B = 2 per stage the first two take
3 (m + p - 1).
"""

from __future__ import annotations

from itertools import chain

from tensorlink.pipeline.schedule.actions import Action, Schedule, check_sizes


def gpipe(num_workers: int, num_micro_batches: int) -> Schedule:
    """All forwards, then all backwards: what the drop-in loop needs, for its loss comes after every output."""
    check_sizes(num_workers, num_micro_batches)
    batches = range(num_micro_batches)
    workers = (
        (*(Action(stage, "F", m) for m in batches), *(Action(stage, "B", m) for m in batches))
        for stage in range(num_workers)
    )
    return Schedule("gpipe", tuple(range(num_workers)), tuple(workers))


def one_forward_one_backward(num_workers: int, num_micro_batches: int) -> Schedule:
    """1F1B: stage s warms up with `num_workers - s - 1` forwards, then alternates; it never holds more than
    `num_workers - s`.
    """
    check_sizes(num_workers, num_micro_batches)
    batches = range(num_micro_batches)
    workers = (
        _alternating(
            [Action(stage, "F", m) for m in batches], [Action(stage, "B", m) for m in batches], num_workers - stage - 1
        )
        for stage in range(num_workers)
    )
    return Schedule("1f1b", tuple(range(num_workers)), tuple(workers))


def interleaved(num_workers: int, num_micro_batches: int, stages_per_worker: int = 2) -> Schedule:
    """Interleaved 1F1B: with p workers and v stages on each, worker w holds stages w, w + p, w + 2p, ...

    Micro-batches go through in groups of p. Takes 3 (v m + p - 1) where p divides m, in the time of one of the v
    smaller stages; other numbers of micro-batches leave gaps in the last group. Worker w holds
    (v - 1) p + 2 (p - w) - 1 of its stages' activations: the price of the smaller bubble.
    """
    check_sizes(num_workers, num_micro_batches, stages_per_worker)
    workers = []
    for worker in range(num_workers):
        stages = [worker + turn * num_workers for turn in range(stages_per_worker)]
        # a group that is not full is scheduled as if it were, and what is too much is left out: the order stays sound
        groups = [range(first, first + num_workers) for first in range(0, num_micro_batches, num_workers)]
        forwards = [Action(stage, "F", m) for group in groups for stage in stages for m in group]
        backwards = [Action(stage, "B", m) for group in groups for stage in reversed(stages) for m in group]
        warm = (stages_per_worker - 1) * num_workers + min(stages_per_worker, 2) * (num_workers - worker - 1)
        full = _alternating(forwards, backwards, warm)
        workers.append(tuple(action for action in full if action.micro_batch < num_micro_batches))
    return Schedule("interleaved", tuple(range(num_workers)) * stages_per_worker, tuple(workers))


def _alternating(forwards: list[Action], backwards: list[Action], warm: int) -> tuple[Action, ...]:
    """`warm` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warm = min(warm, len(forwards))
    turns = chain.from_iterable(zip(forwards[warm:], backwards, strict=False))
    return (*forwards[:warm], *turns, *backwards[len(forwards) - warm :])
