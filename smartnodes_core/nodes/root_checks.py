"""A validator's own opinion of the rewards that rounds have set, also of those that it had no part in.

Before a round it keeps what the chain says; when the round is executed it computes the rewards from its own evidence.
Where the root on chain is another, it freezes it for a bond while nothing can be claimed under it, and signs only a
round that corrects it. What it cannot judge (it was not there, or nobody shows it the records) it takes as it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from smartnodes_core.chain.base import Chain, NoFundsError, RefusedError, RoundState
from smartnodes_core.chain.proposal import NO_HASH, UPHOLD, RoundProposal
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.nodes.rewards import reward_root
from smartnodes_core.records import Proposal
from smartnodes_core.rounds import Correction, RoundContext, RoundEvidence, rewards_of

logger = logging.getLogger(__name__)

#: Rounds of which an opinion is kept: as many roots as the contract keeps.
MAX_ROUNDS = 64
#: Rounds of which it is kept what the chain said before: a round is judged soon after it is executed.
MAX_BEFORE = 8

Totals = Mapping[bytes, int]


@dataclass(frozen=True)
class _Judged:
    """One executed round: the totals that should be under its root, what it earned whom, what it allotted, and whether
    its root says so."""

    totals_wei: Totals
    earned_wei: Totals
    allotment_wei: int
    is_right: bool


class RootChecks:
    """See the module. `evidence` gives the records that a proposal names as the rules take them; it may raise."""

    def __init__(self, chain: Chain, network_id: int, evidence: Callable[[RoundState, Proposal], RoundEvidence]):
        self._chain, self._network_id, self._evidence = chain, network_id, evidence
        self._lock = threading.Lock()
        self._before: dict[int, tuple[RoundState, RoundContext]] = {}
        self._judged: dict[int, _Judged] = {}
        self._tried: set[int] = set()

    def remember(self, state: RoundState, context: RoundContext) -> None:
        """What the chain says before the next round; the totals under the last root are known."""
        with self._lock:
            self._before[state.number + 1] = (state, context)
            base = self._judged.get(state.number)
            if base is None or (base.is_right and base.totals_wei != context.totals_wei):
                self._judged[state.number] = _Judged(context.totals_wei, {}, 0, is_right=True)
            _keep_newest(self._before, MAX_BEFORE)
            _keep_newest(self._judged, MAX_ROUNDS)

    def accept(self, content: RoundProposal, totals_wei: Totals) -> None:
        """A round was executed that this validator justified."""
        with self._lock:
            base = self._judged.get(content.round - 1)
            before_wei = base.totals_wei if base else totals_wei
            if content.ruled_round:
                self._forget_from(content.ruled_round)
            earned = {account: wei - before_wei.get(account, 0) for account, wei in totals_wei.items()}
            earned = {account: wei for account, wei in earned.items() if wei > 0}
            self._judged[content.round] = _Judged(totals_wei, earned, content.allotment_wei, is_right=True)

    def judge(self, proposal: Proposal, content: RoundProposal) -> dict[bytes, int] | None:
        """A round was executed that this validator did not sign: the totals that should be under its root, where they
        are; else None.
        """
        with self._lock:
            before, base = self._before.get(content.round), self._judged.get(content.round - 1)
        if content.ruling == UPHOLD:
            with self._lock:
                self._forget_from(content.ruled_round)
            return None  # a quorum has decided: `remember` takes what is on chain
        if before is None or base is None or before[0].previous_hash != content.previous_hash:
            return None
        state, context = before
        try:
            evidence = self._evidence(state, proposal)
            emission_wei = self._chain.emission_between_wei(self._network_id, state.emitted_until_s, content.until_s)
            context = replace(context, until_s=content.until_s, emission_wei=emission_wei)
            earned = rewards_of(context, evidence, content.settlements)
        except SmartnodesError as error:
            logger.warning("the rewards of round %d cannot be judged here: %s", content.round, error)
            return None
        totals = dict(base.totals_wei)
        for account, wei in earned.items():
            totals[account] = totals.get(account, 0) + wei
        root = reward_root(self._chain, self._network_id, totals)
        is_right = root == content.rewards_root and content.allotment_wei == sum(earned.values())
        with self._lock:
            self._judged[content.round] = _Judged(totals, earned, content.allotment_wei, is_right)
        if is_right:
            return totals
        logger.error(
            "round %d set the rewards root %s and allotted %d wei, recomputed are %s and %d wei",
            content.round,
            content.rewards_root.hex()[:16],
            content.allotment_wei,
            root.hex()[:16],
            sum(earned.values()),
        )
        return None

    def undo_from(self, number: int) -> None:
        """Rounds from this one on are not on the chain any more."""
        with self._lock:
            self._forget_from(number)

    def _forget_from(self, number: int) -> None:
        self._judged = {each: judged for each, judged in self._judged.items() if each < number}
        self._tried = {each for each in self._tried if each < number}

    @property
    def first_wrong(self) -> int:
        """The first round whose root this validator finds wrong; 0 where there is none."""
        with self._lock:
            return min((number for number, judged in self._judged.items() if not judged.is_right), default=0)

    def freeze(self, state: RoundState) -> None:
        """Stop what is wrong, unless somebody has; tried once for each. Raises ChainError when the chain is away."""
        wrong = self.first_wrong
        if not wrong or state.frozen_from or wrong in self._tried or state.latest_root == NO_HASH:
            return
        try:
            self._chain.freeze_root(self._network_id, wrong)
            logger.warning("the rewards root of round %d is frozen: a round has to correct it", wrong)
        except (RefusedError, NoFundsError) as error:
            logger.error("the wrong rewards root of round %d could not be frozen: %s", wrong, error)
        self._tried.add(wrong)

    def correction(self, state: RoundState) -> Correction | None:
        """What should be instead of the frozen roots, if this validator finds one of them wrong."""
        with self._lock:
            frozen = range(state.frozen_from, state.number + 1)
            if not state.frozen_from or not all(number in self._judged for number in (frozen.start - 1, *frozen)):
                return None
            if all(self._judged[number].is_right for number in frozen):
                return None
            earned: dict[bytes, int] = {}
            for number in frozen:
                for account, wei in self._judged[number].earned_wei.items():
                    earned[account] = earned.get(account, 0) + wei
            released_wei = sum(self._judged[number].allotment_wei for number in frozen)
            return Correction(self._judged[frozen.start - 1].totals_wei, earned, released_wei)


def _keep_newest(table: dict[int, Any], most: int) -> None:
    for number in sorted(table)[: max(0, len(table) - most)]:
        del table[number]
