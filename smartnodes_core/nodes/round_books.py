"""What a validator knows of rounds: which records are settled, what may be settled next, what the chain says.

Proposing (`rounding.py`) and voting (`voting.py`) both read it, so that the same evidence gives the same bytes. A
round that this validator had no part in is fetched from the others: the evidence root that was executed binds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from smartnodes_core.chain.base import Chain, RoundState
from smartnodes_core.chain.proposal import NO_HASH, Parameters
from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import ChainError, RecordError, SmartnodesError
from smartnodes_core.nodes.admitting import AdmissionDesk
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.finding import Found
from smartnodes_core.nodes.job_news import JobNews
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.params import digest_in
from smartnodes_core.nodes.paying import Escrows
from smartnodes_core.nodes.polling import ask_all
from smartnodes_core.nodes.reward_books import MAX_PUBLISHED, RewardBooks, trim
from smartnodes_core.nodes.root_checks import RootChecks
from smartnodes_core.nodes.root_reviews import RootReview
from smartnodes_core.nodes.settleable import MAX_NAMED, Settleable
from smartnodes_core.records import MAX_RECORD_BYTES, Commitment, NodeKey, Proposal, Signed
from smartnodes_core.reputation import ReputationRule, next_reputation
from smartnodes_core.rounds import (
    RoundContext,
    RoundEvidence,
    RoundProposal,
    Standing,
    draw_proposers,
    evidence_root,
)
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Rounds that a validator catches up with when it was away.
MAX_MISSED = 8
#: Digests of settled records that are remembered; older ones are refused by step (`AuditedJob.settled_step`).
MAX_SETTLED = 16 * MAX_NAMED
FETCH_TIMEOUT_S = 10.0
#: How often a round of which nobody could tell is asked for again.
ASK_AGAIN_S = 5.0
#: Proposals signed in one round that are remembered: its views may be many while the chain is away.
MAX_CANDIDATES = 64


#: The records that a proposal names, asking these validators for what is lacking; raises RecordError for those that may
#: not be settled.
LookUp = Callable[[Proposal, Sequence[NodeKey]], tuple[dict[bytes, Found], dict[bytes, Commitment]]]


@dataclass(frozen=True)
class Candidate:
    """A proposal that this validator signed: by the digest that was signed it is found again when it is executed."""

    proposal: Proposal
    content: RoundProposal
    totals_wei: dict[bytes, int]
    earned_wei: Mapping[bytes, int]

    @classmethod
    def of(
        cls, proposal: Proposal, content: RoundProposal, context: RoundContext, totals_wei: dict[bytes, int]
    ) -> Candidate:
        """With what the round alone earns whom."""
        base_wei = context.base_wei
        earned = {account: wei - base_wei.get(account, 0) for account, wei in totals_wei.items()}
        return cls(proposal, content, totals_wei, {account: wei for account, wei in earned.items() if wei})


@dataclass(frozen=True)
class LeftOut:
    """An executed round that this validator signed, and those whose signatures it counted: this one's is not there."""

    content: RoundProposal
    signers: tuple[bytes, ...]


class RoundBooks:
    """See the module. Thread-safe; asks the chain only where its methods say so."""

    def __init__(
        self,
        node: Node,
        chain: Chain,
        network_id: int,
        account: bytes,
        audits: AuditDesk,
        membership: Membership,
        wanted: Parameters | None = None,
        announced: Callable[[NodeKey], Signed | None] = lambda node_key: None,
        reputation_rule: ReputationRule = next_reputation,
        rewards_path: Path | None = None,
    ):
        self._reputation_rule = reputation_rule
        self.node, self.chain, self.network_id, self.account = node, chain, network_id, account
        self.audits, self.membership, self.wanted = audits, membership, wanted
        self.executed: deque[RoundProposal] = deque(maxlen=MAX_PUBLISHED)
        self._lock = threading.RLock()
        self._following = threading.Lock()
        self._settled: dict[bytes, int] = {}  # and in which round
        self._unknown: dict[int, bytes] = {}  # of which no validator has told yet
        self._ask_again_at_s = 0.0
        self._rounds: dict[int, bytes] = {}  # digests of the rounds that were followed
        self._candidates: dict[bytes, Candidate] = {}
        self._kept: dict[bytes, Proposal] = {}
        self._left_out: LeftOut | None = None
        self._number = -1
        self.admissions = AdmissionDesk(node, chain, network_id, membership, announced)
        self.roots = RootChecks(chain, network_id, self._evidence_of, RootReview(self).before, self.others)
        self.look_up: LookUp = lambda proposal, sources: ({}, {})
        self._frozen_from = 0
        self.news = JobNews(node, network_id, membership.role_of)
        self.escrows = Escrows(chain, network_id, membership)
        self.records = Settleable(audits, membership, self.escrows, self.is_settled)
        self.rewards = RewardBooks(node, chain, network_id, self.others, self._signed_totals, rewards_path)
        node.serve(self)

    # -- following the chain ------------------------------------------------------------------------------------------

    def proposers(self, state: RoundState) -> list[bytes]:
        """The validators in the order in which they may propose the next round. Asks the chain once."""
        return draw_proposers(self.chain.validators(self.network_id), state.number + 1)

    def follow(self, state: RoundState) -> None:
        """Take note of rounds that were executed: their evidence is settled, their rewards are the base of the next.
        Rounds that a reorganisation of the chain has undone are forgotten: what they settled is open again.

        Asks the chain once for each, and the other validators for those that were not signed here.
        """
        with self._following:
            self._ask_again()
            if (state.number, state.previous_hash) == (self._number, self._rounds.get(self._number, NO_HASH)):
                return
            self._unwind(state)
            self._frozen_from = state.frozen_from
            first = max(self._number + 1, state.number - MAX_MISSED + 1, 1)
            for number in range(first, state.number + 1):
                executed = self.chain.executed_round(self.network_id, number)
                if executed is not None:
                    with self._lock:
                        signed = self._candidates.get(executed.digest)
                        is_left_out = signed is not None and self.account not in executed.signers
                        self._left_out = LeftOut(signed.content, executed.signers) if signed and is_left_out else None
                    self._note(number, executed.digest)
            with self._lock:
                self._number = state.number
                self._rounds.setdefault(0, NO_HASH)
                old = [digest for digest, each in self._candidates.items() if each.content.round < state.number]
                for digest in old:
                    del self._candidates[digest]

    def _unwind(self, state: RoundState) -> None:
        """Forget rounds that are not on the chain any more."""
        number = min(self._number, state.number)
        while number > 0 and number in self._rounds:
            on_chain = self.chain.executed_round(self.network_id, number)
            if on_chain is not None and on_chain.digest == self._rounds[number]:
                break
            number -= 1
        if number >= self._number:
            return
        logger.warning("rounds %d to %d were undone by the chain", number + 1, self._number)
        self.roots.undo_from(number + 1)
        self.news.undo_from(number + 1)
        with self._lock:
            for undone in [each for each in self._rounds if each > number]:
                del self._rounds[undone]
            for digest in [digest for digest, settled_in in self._settled.items() if settled_in > number]:
                del self._settled[digest]
            for content in [each for each in self.executed if each.round > number]:
                self.executed.remove(content)
            self._number = number

    @property
    def left_out(self) -> LeftOut | None:
        """The last executed round, if this validator signed it and was not among its signers when it was executed."""
        with self._lock:
            return self._left_out

    def _note(self, number: int, digest: bytes) -> None:
        with self._lock:
            if self._rounds.get(number) != digest:
                COUNTERS.add("rounds", "followed")
            self._rounds[number] = digest
            trim(self._rounds, MAX_PUBLISHED)
            known, kept = self._candidates.get(digest), self._kept.get(digest)
        if known is not None:
            proposal, content = known.proposal, known.content
            self.rewards.publish(known.totals_wei)
            self.roots.accept(content, known.totals_wei, known.earned_wei)
        elif kept is not None:  # executed again, after a reorganisation
            proposal, content = kept, RoundProposal.decode(kept.content)
        else:
            found = self._fetch_executed(digest)
            if found is None:
                if number not in self._unknown:
                    logger.warning("round %d was executed, and no validator tells what it settled: asked again", number)
                self._unknown[number] = digest
                return
            proposal, content = found
        self._unknown.pop(number, None)
        self.news.note(content)
        if known is None:
            totals_wei = self.roots.judge(proposal, content)
            if totals_wei is not None:
                self.rewards.publish(totals_wei)
        with self._lock:
            self._kept[digest] = proposal
            trim(self._kept, MAX_PUBLISHED)
            self._settled.update(dict.fromkeys([*proposal.verdicts, *proposal.settled], number))
            trim(self._settled, MAX_SETTLED)
            self.executed.append(content)
            # those of the last round may have to be settled again, those of frozen rounds have to be shown
            kept_from = min(number, self._frozen_from or number)
            self.audits.books.forget({digest for digest, settled_in in self._settled.items() if settled_in < kept_from})

    def _ask_again(self) -> None:
        """For the oldest round of which nobody could tell: validators come back, and are met after a start."""
        for number in [each for each in self._unknown if each <= self._number - MAX_MISSED or each not in self._rounds]:
            del self._unknown[number]
        if self._unknown and time.monotonic() >= self._ask_again_at_s:
            number = min(self._unknown)
            self._note(number, self._unknown[number])
            self._ask_again_at_s = time.monotonic() + ASK_AGAIN_S

    def executed_proposal(self, number: int) -> tuple[Proposal, RoundProposal]:
        """What a round has executed, from the other validators where it is not kept here. Raises RecordError."""
        executed = self.chain.executed_round(self.network_id, number)
        if executed is not None:
            with self._lock:
                kept = self._kept.get(executed.digest)
            found = (kept, RoundProposal.decode(kept.content)) if kept else self._fetch_executed(executed.digest)
            if found is not None:
                return found
        raise RecordError(f"no validator tells what round {number} has executed")

    def _fetch_executed(self, digest: bytes) -> tuple[Proposal, RoundProposal] | None:
        """From all others at once: some may hang."""

        def ask(validator: NodeKey) -> tuple[Proposal, RoundProposal] | None:
            try:
                reply = self.node.call(
                    validator,
                    "executed_proposal",
                    {"digest": digest},
                    timeout_s=FETCH_TIMEOUT_S,
                    max_body_bytes=MAX_RECORD_BYTES,
                )
                proposal = Proposal.decode(reply.body)
                content = RoundProposal.decode(proposal.content)
                root = evidence_root([*proposal.verdicts, *proposal.settled])
                if self.chain.proposal_digest(content) == digest and content.evidence_root == root:
                    return proposal, content
                logger.warning("%s gave another proposal than was executed", validator.hex()[:8])
            except SmartnodesError as error:
                logger.info("%s does not know the executed proposal: %s", validator.hex()[:8], error)
            except Exception:
                logger.exception("the executed proposal of %s", validator.hex()[:8])
            return None

        answers = ask_all(self.others(), ask, lambda found: any(found.values()), FETCH_TIMEOUT_S, 0.0)
        return next((found for found in answers.values() if found), None)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_executed_proposal(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The executed proposal with this digest, for a validator that was away."""
        digest = digest_in(params, "digest")
        with self._lock:
            found = self._kept.get(digest)
        if found is None:
            raise RecordError("no such round is kept here")
        return {}, [found.encode()]

    def others(self) -> list[NodeKey]:
        """The node keys of the other validators that this node has met, from what is known of the chain."""
        try:
            members = self.membership.members(max_age_s=self.membership.max_age_s)
        except ChainError as error:
            logger.info("the validators are not known: %s", error)
            return []
        keys = [self.membership.node_key_of(m.account) for m in members if m.role == "validator" and m.live]
        return [key for key in keys if key is not None and key != self.node.node_key]

    def knows_rewards(self, state: RoundState) -> bool:
        """Whether this validator knows on what the next round's rewards are added; else asks the others."""
        return self.roots.correction(state) is not None or self.rewards.knows(state)

    # -- candidates ---------------------------------------------------------------------------------------------------

    def remember(self, digest: bytes, candidate: Candidate) -> None:
        """Keep a proposal that this validator has signed, before it tells anybody."""
        self.rewards.keep(candidate.totals_wei)
        with self._lock:
            self._candidates[digest] = candidate
            trim(self._candidates, MAX_CANDIDATES)

    def _signed_totals(self, root: bytes) -> dict[bytes, int] | None:
        """The rewards under a root that was signed here, and may just have been executed."""
        with self._lock:
            found = [each for each in self._candidates.values() if each.content.rewards_root == root]
        return found[0].totals_wei if found else None

    # -- what may be settled ------------------------------------------------------------------------------------------

    def is_settled(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of `digests` that a round carried already."""
        with self._lock:
            return [digest for digest in digests if digest in self._settled]

    def proposer_of(self, proposal: Proposal) -> list[NodeKey]:
        """The node key of who made it, if it is known and not this validator's own."""
        known = self.membership.node_key_of(proposal.proposer)
        return [known] if known is not None and known != self.node.node_key else []

    def _evidence_of(self, state: RoundState, proposal: Proposal, others: Sequence[NodeKey] = ()) -> RoundEvidence:
        """What an executed proposal stood on; what rounds before it had settled does not count again. Raises
        RecordError where neither this validator nor its proposer nor `others` have the records."""
        number = proposal.round
        with self._lock:
            verdicts, settled = (
                [digest for digest in named if self._settled.get(digest, number) >= number]
                for named in (proposal.verdicts, proposal.settled)
            )
        shown = msgspec.structs.replace(proposal, verdicts=verdicts, settled=settled)
        return self.records.evidence(state, *self.look_up(shown, [*self.proposer_of(proposal), *others]))

    def context(self, state: RoundState, view: int, until_s: int, num_validators: int) -> RoundContext:
        """What the rules take from the chain, which is asked four times."""
        members = self.chain.members(self.network_id)
        last = self.chain.executed_round(self.network_id, state.number)  # no longer changes once the next is due
        return RoundContext(
            domain=self.chain.domain,
            network_id=self.network_id,
            round=state.number + 1,
            view=view,
            previous_hash=state.previous_hash,
            until_s=until_s,
            emission_wei=self.chain.emission_wei(self.network_id, until_s),
            num_validators=num_validators,
            parameters=self.chain.parameters(self.network_id),
            signers=last.signers if last else (),
            standings={m.account: Standing(m.index, m.reputation, m.stake_wei) for m in members},
            totals_wei=self.rewards.totals_wei,
            frozen_from=state.frozen_from,
            correction=self.roots.correction(state),
            reputation_rule=self._reputation_rule,
            is_judged=self.roots.is_judged(state),
        )
