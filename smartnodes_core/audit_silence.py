"""What follows from a worker's silence, over the steps of one of its stages: pure, the same for whoever computes it.

A silence takes no reputation by itself: rigs crash. But it must not pay. The work back to the last step whose audit was
passed is not paid, the next ten steps are audited as a whole, and the third silence within 1,000 steps blacklists.
Silences within one audit window are one: all that a rig was asked for when it went down.
"""

from __future__ import annotations

from collections.abc import Collection

#: Steps that are audited whatever the seed says, from the one that the `Silence` names on.
FORCED_STEPS = 10
#: How many strikes within so many steps blacklist.
MAX_STRIKES = 3
SPAN_STEPS = 1000


def is_forced(step: int, forced_from: int) -> bool:
    """Whether a step is among those that a silence has audited."""
    return forced_from <= step < forced_from + FORCED_STEPS


def is_unpaid(step: int, silent_steps: Collection[int], passed_steps: Collection[int]) -> bool:
    """Whether a step's work is not paid: a silence is in it or follows, with no passed audit between the two; or it
    came after a silence, and none was passed since then."""
    if any(step <= silent and not any(step <= passed < silent for passed in passed_steps) for silent in silent_steps):
        return True
    last = max(silent_steps, default=step)
    return last < step and not any(last < passed for passed in passed_steps)


def strikes(step: int, silent_steps: Collection[int], window_steps: int) -> int:
    """How many silences count when that in `step` is judged: those up to it, of the last 1,000 steps, that lie a window
    apart."""
    found, last = 0, None
    for silent in sorted(each for each in silent_steps if step - SPAN_STEPS < each <= step):
        if last is None or silent - last >= max(1, window_steps):
            found, last = found + 1, silent
    return found
