"""A validator's own opinion of the rewards that rounds have set, also of those that it had no part in.

Before a round it keeps what the chain says; when the round is executed it computes the rewards from its own evidence.
Where the root on chain is another, it freezes it for a bond while nothing can be claimed under it, and signs only a
round that corrects it. What it cannot judge (it was not there, or nobody shows it the records) it takes as it is, until
somebody freezes it: then it asks the others for the records, and rules on it only when it has judged it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from smartnodes_core.chain.base import Chain, NoFundsError, RefusedError, RoundState
from smartnodes_core.chain.proposal import NO_HASH, NO_RULING, UPHOLD, RoundProposal
from smartnodes_core.errors import ChainError, SmartnodesError
from smartnodes_core.nodes.rewards import reward_root
from smartnodes_core.records import NodeKey, Proposal
from smartnodes_core.rounds import Correction, RoundContext, RoundEvidence, add, rewards_of

logger = logging.getLogger(__name__)

#: Rounds of which an opinion is kept: as many roots as the contract keeps.
MAX_ROUNDS = 64
#: Rounds of which it is kept what the chain said before: a round is judged soon after it is executed.
MAX_BEFORE = 8

#: How often frozen roots that could not be judged are looked at again.
LOOK_AGAIN_S = 5.0
#: Validators besides its proposer that are asked for the records behind one root, at each look.
MAX_ASKED = 3
#: Rounds after which a frozen root that nobody has ruled on is taken from the quorum that signed it by those who cannot
#: judge it: where all records are lost, nothing could ever be claimed again.
MAX_FROZEN_ROUNDS = 8

Totals = Mapping[bytes, int]
#: What a round has executed and what the chain said before it; and the records that a proposal names as the rules take
#: them, with whom else to ask for them. Both raise SmartnodesError.
Review = Callable[[int], tuple[Proposal, RoundProposal, RoundContext]]
Evidence = Callable[[RoundState, Proposal, Sequence[NodeKey]], RoundEvidence]


@dataclass(frozen=True)
class _Judged:
    """One executed round: the totals that should be under its root, what it earned whom, what it allotted, whether its
    root says so, and whether this validator has recomputed that (else it takes it as it is)."""

    totals_wei: Totals
    earned_wei: Totals
    allotment_wei: int
    is_right: bool
    is_own: bool = True


class RootChecks:
    """See the module. `others` are the validators that may show records."""

    def __init__(
        self,
        chain: Chain,
        network_id: int,
        evidence: Evidence,
        review: Review,
        others: Callable[[], list[NodeKey]],
    ):
        self._chain, self._network_id = chain, network_id
        self._evidence, self._review, self._others = evidence, review, others
        self._lock = threading.Lock()
        self._before: dict[int, tuple[RoundState, RoundContext]] = {}
        self._judged: dict[int, _Judged] = {}
        self._tried: set[int] = set()
        self._why_not: dict[int, str] = {}
        self._num_looks, self._look_at_s = 0, 0.0

    def remember(self, state: RoundState, context: RoundContext) -> None:
        """What the chain says before the next round; the totals under the last root are known."""
        with self._lock:
            self._before[state.number + 1] = (state, context)
            base = self._judged.get(state.number)
            if base is None or (base.is_right and base.totals_wei != context.totals_wei):
                self._judged[state.number] = _Judged(context.totals_wei, {}, 0, is_right=True, is_own=False)
            _keep_newest(self._before, MAX_BEFORE)
            _keep_newest(self._judged, MAX_ROUNDS)

    def accept(self, content: RoundProposal, totals_wei: Totals, earned_wei: Totals) -> None:
        """A round was executed that this validator justified: the totals under its root, and what it earned whom."""
        with self._lock:
            base = self._judged.get(content.round - 1)
            if content.ruling != NO_RULING:
                self._forget_from(content.ruled_round)
                base = None
            right = add(base.totals_wei, earned_wei) if base else totals_wei  # it may stand on a root found wrong
            is_right = right == totals_wei
            self._judged[content.round] = _Judged(right, earned_wei, content.allotment_wei, is_right)

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
            evidence = self._evidence(state, proposal, ())
            emission_wei = self._chain.emission_between_wei(self._network_id, state.emitted_until_s, content.until_s)
            context = replace(context, until_s=content.until_s, emission_wei=emission_wei)
        except SmartnodesError as error:
            logger.warning("the rewards of round %d cannot be judged here: %s", content.round, error)
            return None
        return self._compare(content, context, evidence, base.totals_wei)

    def _compare(
        self, content: RoundProposal, context: RoundContext, evidence: RoundEvidence, base_wei: Totals
    ) -> dict[bytes, int] | None:
        """Keep what is found of a round that these records justify; its totals where its root is right."""
        earned = rewards_of(context, evidence, content.settlements)
        totals = add(base_wei, earned)
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

    # -- frozen roots -------------------------------------------------------------------------------------------------

    def look_again(self, state: RoundState) -> None:
        """Judge frozen roots of which this validator has no opinion: other validators are asked for the records behind
        them. Raises ChainError when the chain is away."""
        if not self._unjudged(state) or time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + LOOK_AGAIN_S
        others = self._others()
        first = self._num_looks * MAX_ASKED % max(1, len(others))
        self._num_looks += 1
        asked = [*others[first:], *others[:first]][:MAX_ASKED]
        for number in self._unjudged(state):
            try:
                proposal, content, context = self._review(number)
                evidence = self._evidence(state, proposal, asked)
            except ChainError:
                raise
            except SmartnodesError as error:
                logger.warning("the frozen root of round %d cannot be judged here: %s", number, error)
                self._why_not[number] = str(error)
                return
            taken = _Judged(context.totals_wei, {}, 0, is_right=True, is_own=False)
            with self._lock:
                base = self._judged.setdefault(number - 1, taken)
            self._compare(content, context, evidence, base.totals_wei if base.is_own else context.totals_wei)

    def _unjudged(self, state: RoundState) -> list[int]:
        if not state.frozen_from:
            return []
        with self._lock:
            own = {number for number, judged in self._judged.items() if judged.is_own}
        return [number for number in range(state.frozen_from, state.number + 1) if number not in own]

    def is_judged(self, state: RoundState) -> bool:
        """Whether this validator may rule on the frozen roots: it has judged them all, and knows what should be instead
        if one is wrong; or it has found none wrong, and they have been frozen for MAX_FROZEN_ROUNDS.
        """
        unjudged = self._unjudged(state)
        with self._lock:
            frozen = range(state.frozen_from, state.number + 1)
            is_any_wrong = any(number in self._judged and not self._judged[number].is_right for number in frozen)
            if is_any_wrong:
                return not unjudged and frozen.start - 1 in self._judged
        return not unjudged or len(frozen) > MAX_FROZEN_ROUNDS

    def why_not(self, state: RoundState) -> str:
        """Why this validator does not rule on the frozen roots."""
        told = [f"{each} ({self._why_not.get(each, 'not looked at yet')})" for each in self._unjudged(state)]
        return f"not judged here: round {', '.join(told)}" if told else "what was before them is not known here"

    def correction(self, state: RoundState) -> Correction | None:
        """What should be instead of the frozen roots, if this validator finds one of them wrong."""
        if not state.frozen_from or self._unjudged(state) or not self.is_judged(state):
            return None
        with self._lock:
            frozen = range(state.frozen_from, state.number + 1)
            if all(self._judged[number].is_right for number in frozen):
                return None
            earned: dict[bytes, int] = {}
            for number in frozen:
                earned = add(earned, self._judged[number].earned_wei)
            released_wei = sum(self._judged[number].allotment_wei for number in frozen)
            return Correction(self._judged[frozen.start - 1].totals_wei, earned, released_wei)


def _keep_newest(table: dict[int, Any], most: int) -> None:
    for number in sorted(table)[: max(0, len(table) - most)]:
        del table[number]
