"""Views of a round: who may propose when, until a proposal finds its quorum."""

from __future__ import annotations

import time

from smartnodes_core.chain.base import RoundState


class ViewClock:
    """Which view of the next round is due: view v after v timeouts, by the chain's clock or by ours since it was due,
    whichever says more (a chain without traffic may make no blocks)."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._due = (-1, 0.0)  # a round, and when it was first seen to be due

    def view(self, state: RoundState) -> int | None:
        """The view that is due now; None while the round is not."""
        if state.chain_time_s < state.earliest_at_s:
            return None
        number, since_s = self._due
        if number != state.number:
            number, since_s = self._due = (state.number, time.monotonic())
        elapsed_s = max(state.chain_time_s - state.earliest_at_s, time.monotonic() - since_s)
        return int(elapsed_s / self.timeout_s)
