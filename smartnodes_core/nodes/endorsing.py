"""Signatures of the last round that its executor left out: added in one transaction, so that their signers share the
next round's part too.

Whoever carries a round sends a quorum and a few (`ballots.carrying`). Of the others, one after the other in the order
of the draw has a turn at adding all that are missing; the next one only where that has not happened.
"""

from __future__ import annotations

import logging
import time

from smartnodes_core.chain.base import Chain, NoFundsError, RefusedError, RoundState
from smartnodes_core.nodes.balloting import BallotDesk
from smartnodes_core.nodes.round_books import LeftOut, RoundBooks
from smartnodes_core.nodes.voting import Signer
from smartnodes_core.rounds import draw_proposers

logger = logging.getLogger(__name__)


class Endorser:
    """Adds what was left out, on behalf of `books.account`; `turn_s` is how long each waits for the one before."""

    def __init__(self, chain: Chain, books: RoundBooks, ballots: BallotDesk, signer: Signer, turn_s: float):
        self._chain, self._books, self._ballots, self._signer = chain, books, ballots, signer
        self._turn_s = turn_s
        self._waiting: LeftOut | None = None
        self._from_s = 0.0  # of `time.monotonic`: when it is this validator's turn
        self._done: LeftOut | None = None

    def is_waiting(self, state: RoundState) -> bool:
        """Whether this validator's signature may still have to be added to the last round."""
        found = self._books.left_out
        return found is not None and found is not self._done and found.content.round == state.number and _is_open(state)

    def endorse(self, state: RoundState) -> None:
        """Add what is missing when it is this validator's turn. Raises ChainError when the chain is away; what it
        refuses, or what cannot be paid for, is told."""
        found = self._books.left_out
        if found is None or not self.is_waiting(state):
            return
        if found is not self._waiting:
            self._waiting, self._from_s = found, time.monotonic() + self._wait_s(found, state)
        if time.monotonic() < self._from_s:
            return
        executed = self._chain.executed_round(self._books.network_id, found.content.round)
        if executed is not None and self._books.account not in executed.signers:
            late = self._missing(LeftOut(found.content, executed.signers))
            try:
                self._chain.endorse_round(self._books.network_id, list(late.values()))
            except NoFundsError as error:
                logger.error("round %d: signatures that were left out wait: %s", found.content.round, error)
                return
            except RefusedError as error:
                logger.error("round %d: signatures that were left out are not added: %s", found.content.round, error)
        self._done = found

    def _missing(self, found: LeftOut) -> dict[bytes, bytes]:
        """By account, this one's included."""
        signature = self._signer.sign(found.content, self._chain.proposal_digest(found.content))
        known = {**self._ballots.signatures_of(found.content), self._books.account: signature}
        live = self._chain.validators(self._books.network_id)
        return {account: known[account] for account in live if account in known and account not in found.signers}

    def _wait_s(self, found: LeftOut, state: RoundState) -> float:
        """Until this validator's turn; all who are left out have theirs within half of an interval."""
        order = draw_proposers(self._missing(found), found.content.round)
        if self._books.account not in order:
            return 0.0  # it has left the epoch: the contract counts it no more
        return order.index(self._books.account) * min(self._turn_s, state.interval_s / 2 / len(order))


def _is_open(state: RoundState) -> bool:
    return state.chain_time_s < state.earliest_at_s
