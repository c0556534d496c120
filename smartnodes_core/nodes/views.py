"""Views of a round: how long it has been due, and so who may propose by now."""

from __future__ import annotations

import time
from typing import NamedTuple

from smartnodes_core.chain.base import RoundState


class View(NamedTuple):
    """The view that is due, and how much of its time has passed (0 to 1)."""

    number: int
    passed: float


class ViewClock:
    """Which view of the next round is due: view v after v timeouts, by the chain's clock or by ours since it was due,
    whichever says more (a chain without traffic may make no blocks)."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._due = (-1, b"", 0.0)  # a round, and when it was first seen to be due

    def at(self, state: RoundState) -> View | None:
        """The view that is due now; None while the round is not."""
        if state.chain_time_s < state.earliest_at_s:
            return None
        number, previous_hash, since_s = self._due
        if (number, previous_hash) != (state.number, state.previous_hash):
            since_s = time.monotonic()
            self._due = (state.number, state.previous_hash, since_s)
        elapsed_s = max(state.chain_time_s - state.earliest_at_s, time.monotonic() - since_s)
        view = int(elapsed_s / self.timeout_s)
        return View(view, elapsed_s / self.timeout_s - view)
