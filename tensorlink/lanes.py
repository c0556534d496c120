"""Work on a call's micro-batches that waits for what arrives: each kind in order, the kinds beside each other.

One thread runs all of it, the user's own: while workers compute micro-batch m, it computes m + 1 before them or m - 1
behind them. Neighbours: `calls.py` and `train_step.py` say what is run, `pipeline/driver.py` waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorlink.pipeline.driver import Driver


def at_once(micro_batch: int) -> bool:
    """The `ready` of a lane that waits for nothing."""
    return True


@dataclass
class Lane:
    """One kind of work: `run(m)` for m = 0, 1, …, each as soon as `ready(m)`. `next` is the first that has not run."""

    ready: Callable[[int], bool]
    run: Callable[[int], None]
    next: int = 0


def run_lanes(driver: Driver, num_micro_batches: int, lanes: list[Lane], what: str) -> None:
    """Run all lanes to their end; where several are ready, the first in `lanes` goes first.

    Raises what ended the job, or DeadlineError, which says that it waited for `what`.
    """
    while True:
        open_lanes = [lane for lane in lanes if lane.next < num_micro_batches]
        if not open_lanes:
            return
        ready: list[Lane] = []

        def look(ready: list[Lane] = ready, open_lanes: list[Lane] = open_lanes) -> bool:
            ready[:] = [lane for lane in open_lanes if lane.ready(lane.next)]
            return bool(ready)

        driver.wait_for(look, what)
        ready[0].run(ready[0].next)
        ready[0].next += 1
