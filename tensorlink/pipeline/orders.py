"""A schedule as one stage sees it: the rank of each of its actions, and how much it may hold.

A worker runs, of what is ready, the action that stands first in its list (`schedule/`). As each kind of action keeps
the order of micro-batches on a stage, a rank per kind and micro-batch is all that has to be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tensorlink.pipeline.schedule import Action, generate, max_held


@dataclass(frozen=True)
class StageOrder:
    """`forward`, `backward` (whole, or the input gradient) and `weight` (the weight gradient) hold ranks by
    micro-batch; they compare among all stages of one worker. `held`: the most forwards that wait for the end of their
    backward; `deferred`: the most backwards that wait for their weight gradients.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    weight: tuple[int, ...]
    held: int
    deferred: int


@lru_cache(maxsize=64)
def stage_order(name: str, num_workers: int, num_stages: int, stage: int, num_micro_batches: int) -> StageOrder:
    """Raises PartitionError for a schedule that does not exist, or not for these numbers."""
    schedule = generate(name, num_workers, num_micro_batches, num_stages)
    ranks = {kind: [0] * num_micro_batches for kind in "FBW"}
    for position, action in enumerate(schedule.workers[schedule.placement[stage]]):
        if action.stage == stage:
            # twice the position leaves room for the second half of a whole backward
            ranks["B" if action.kind == "I" else action.kind][action.micro_batch] = 2 * position
            if action.kind == "B":
                ranks["W"][action.micro_batch] = 2 * position + 1
    own = schedule.of_stage(stage)
    return StageOrder(
        forward=tuple(ranks["F"]),
        backward=tuple(ranks["B"]),
        weight=tuple(ranks["W"]),
        held=max_held(own),
        deferred=max(1, _max_deferred(own)),
    )


def _max_deferred(actions: Sequence[Action]) -> int:
    """The most input gradients that are ahead of their weight gradients."""
    ahead = most = 0
    for action in actions:
        ahead += {"F": 0, "B": 0, "I": 1, "W": -1}[action.kind]
        most = max(most, ahead)
    return most
