"""The known schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tensorlink.errors import PartitionError
from tensorlink.pipeline.schedule.actions import Schedule, check_sizes
from tensorlink.pipeline.schedule.generators import gpipe, interleaved, one_forward_one_backward
from tensorlink.pipeline.schedule.zero_bubble import zero_bubble, zero_bubble_v

#: Name to `(num_workers, num_micro_batches) -> Schedule`.
GENERATORS: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb": zero_bubble,
    "zbv": zero_bubble_v,
}


@lru_cache(maxsize=8)
def generate(name: str, num_workers: int, num_micro_batches: int, num_stages: int | None = None) -> Schedule:
    """The schedule of that name. `num_stages` is how many stages there are in all, where that is known.

    Raises PartitionError for an unknown name, and for a number of stages that the schedule cannot put on the workers.
    """
    if name not in GENERATORS:
        raise PartitionError(f"found schedule {name!r:.20}, needed one of {', '.join(GENERATORS)}")
    check_sizes(num_workers, num_micro_batches)
    if name == "interleaved" and num_stages is not None and num_stages > 0 and num_stages % num_workers == 0:
        return interleaved(num_workers, num_micro_batches, num_stages // num_workers)
    schedule = GENERATORS[name](num_workers, num_micro_batches)
    if num_stages not in (None, schedule.num_stages):
        needed = f"a multiple of {num_workers}" if name == "interleaved" else str(schedule.num_stages)
        raise PartitionError(f"schedule {name} on {num_workers} workers: found {num_stages} stages, needed {needed}")
    return schedule
