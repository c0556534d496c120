"""A validator's rounds: gather what was verified, propose it or check another's proposal, sign, execute.

The rules are pure and live in `smartnodes_core/rounds.py`. A proposal names the verdicts and commitments behind it;
whoever votes looks each of them up among its own, fetches what it lacks, recomputes the proposal and signs only what
comes out the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from smartnodes_core.chain.base import Chain, RoundState
from smartnodes_core.chain.signing import address_of, recover, sign_digest
from smartnodes_core.errors import AuthorityError, RecordError, SmartnodesError, Unavailable
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.auditing import AuditDesk, AuditedJob
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.rewards import fetch_reward_totals, reward_root
from smartnodes_core.records import MAX_RECORD_BYTES, Commitment, NodeKey, Proposal, Verdict, Vote, canonical
from smartnodes_core.reputation import VerdictCounts
from smartnodes_core.rounds import (
    RoundContext,
    RoundEvidence,
    RoundProposal,
    Standing,
    draw_proposers,
    justify,
    propose,
    quorum,
)
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

VOTE_TIMEOUT_S = 20.0
#: How long a proposer with a quorum waits for those who have not signed yet: every signer is paid.
LATE_VOTE_S = 1.0
#: Records one proposal names at most; the rest waits for the next round.
MAX_NAMED = 20_000
#: Roots whose leaves are kept: as many as the contract keeps.
MAX_PUBLISHED = 64


class RoundDesk:
    """Carries what this validator and its peers verified on chain, one round after the other.

    `poll_s` is how often the chain is looked at, `proposer_timeout_s` after how long the next in the draw takes over.
    """

    def __init__(
        self,
        node: Node,
        chain: Chain,
        account_key: bytes,
        network_id: int,
        audits: AuditDesk,
        membership: Membership,
        journal: Journal,
        learn_validators: Callable[[], None] = lambda: None,
        poll_s: float = 1.0,
        proposer_timeout_s: float = 10.0,
    ):
        self.executed: list[RoundProposal] = []
        self._node = node
        self._chain = chain
        self._key = account_key
        self._account = address_of(account_key)
        self._network_id = network_id
        self._audits = audits
        self._account_of, self._node_key_of = membership.account_of, membership.node_key_of
        self._journal = journal
        self._learn_validators = learn_validators
        self._poll_s, self._proposer_timeout_s = poll_s, proposer_timeout_s
        self._settled: set[bytes] = set()
        self._seen: dict[bytes, tuple[Proposal, RoundProposal, dict[bytes, int]]] = {}
        self._totals_wei: dict[bytes, int] = {}
        self._published: dict[bytes, dict[bytes, int]] = {}
        self._signers: tuple[bytes, ...] = ()
        self._number = -1
        self._due_since: float | None = None
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        node.serve(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    # -- proposing ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(self._poll_s):
            try:
                self._tick()
            except SmartnodesError as error:
                logger.warning("round: %s", error)
            except Exception:
                logger.exception("round")

    def _tick(self) -> None:
        state = self._chain.round_state(self._network_id)
        self._follow(state)
        if state.chain_time_s < state.earliest_at_s:
            self._due_since = None
            return
        if self._due_since is None:
            self._due_since = time.monotonic()
        self._learn_validators()
        order = self._proposers(state)
        if self._account not in order or not self._knows_totals(state):
            return
        rank = order.index(self._account)
        if time.monotonic() - self._due_since >= rank * self._proposer_timeout_s:
            self._propose(state, rank)
            self._due_since = time.monotonic()

    def _proposers(self, state: RoundState) -> list[bytes]:
        return draw_proposers(self._chain.validators(self._network_id), state.previous_hash, state.number + 1)

    def _follow(self, state: RoundState) -> None:
        """Take note of the round that was executed last: its evidence is settled, its rewards are the base of the
        next.
        """
        with self._lock:
            if state.number == self._number:
                return
            known = self._seen.get(state.previous_hash)
            if known is not None:
                proposal, content, totals = known
                self._settled.update(proposal.verdicts, proposal.settled)
                self._totals_wei = totals
                self._publish(totals)
                self.executed.append(content)
            executed = self._chain.executed_round(self._network_id, state.number)
            self._signers = executed.signers if executed else ()
            self._number = state.number
            self._seen.clear()

    def _publish(self, totals: dict[bytes, int]) -> None:
        """Keep the leaves of the newest roots, for those that claim."""
        self._published[reward_root(self._chain, self._network_id, totals)] = totals
        while len(self._published) > MAX_PUBLISHED:
            del self._published[next(iter(self._published))]

    def _knows_totals(self, state: RoundState) -> bool:
        """Whether the cumulative rewards under the last root are known here; else asks the other validators for them."""
        if reward_root(self._chain, self._network_id, self._totals_wei) == state.latest_root:
            return True
        keys = [self._node_key_of(account) for account in self._chain.validators(self._network_id)]
        others = [key for key in keys if key is not None and key != self._node.node_key]
        try:
            totals = fetch_reward_totals(self._node, self._chain, self._network_id, others, state.latest_root)
        except Unavailable as error:
            logger.warning("%s", error)
            return False
        with self._lock:
            self._totals_wei = totals
        return True

    @allow(max_body_bytes=0)
    def rpc_reward_totals(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The cumulative rewards under a root on chain: anybody may check them against it and build a claim."""
        with self._lock:
            totals = self._published.get(bytes(params["root"]), self._totals_wei)
            return {}, [canonical({account.hex(): str(wei) for account, wei in totals.items()})]

    def _propose(self, state: RoundState, view: int) -> None:
        proposal, content, digest = self._own_proposal(state, view) or self._make_proposal(state, view)
        signatures = {self._account: self._sign(content, digest)}
        needed = quorum(len(self._chain.validators(self._network_id)))
        self._collect(proposal, digest, signatures, needed)
        if len(signatures) < needed:
            logger.warning("round %s: %d of %d signatures", content.round, len(signatures), needed)
            return
        self._chain.execute_round(content, [signatures[account] for account in sorted(signatures)])
        logger.info(
            "round %s executed: %d signatures, %d verdicts, %d commitments settled",
            content.round,
            len(signatures),
            len(proposal.verdicts),
            len(proposal.settled),
        )

    def _own_proposal(self, state: RoundState, view: int) -> tuple[Proposal, RoundProposal, bytes] | None:
        """What this validator proposed before in this view: a second, different proposal would be equivocation."""
        with self._lock:
            for digest, (proposal, content, _) in self._seen.items():
                if (content.round, content.view, proposal.proposer) == (state.number + 1, view, self._account):
                    return proposal, content, digest
        return None

    def _make_proposal(self, state: RoundState, view: int) -> tuple[Proposal, RoundProposal, bytes]:
        verdicts, commitments = self._unsettled()
        evidence = self._evidence(verdicts, commitments)
        content, totals = propose(self._context(state, view, int(time.time())), evidence)
        proposal = Proposal(
            network_id=self._network_id,
            round=content.round,
            view=view,
            previous=state.previous_hash,
            proposer=self._account,
            content=content.encode(),
            verdicts=sorted(verdicts),
            settled=sorted(commitments),
        )
        digest = self._chain.proposal_digest(content)
        with self._lock:
            self._seen[digest] = (proposal, content, totals)
        return proposal, content, digest

    def _collect(self, proposal: Proposal, digest: bytes, signatures: dict[bytes, bytes], needed: int) -> None:
        """Ask all other validators at once. Returns when all have answered, or soon after `needed` of them have signed."""
        others = [account for account in self._chain.validators(self._network_id) if account != self._account]
        answered = threading.Semaphore(0)

        def ask(account: bytes) -> None:
            try:
                self._ask(account, proposal, digest, signatures)
            finally:
                answered.release()

        for account in others:
            threading.Thread(target=ask, args=(account,), daemon=True).start()
        deadline = time.monotonic() + VOTE_TIMEOUT_S
        for _ in others:
            if len(signatures) >= needed:
                deadline = min(deadline, time.monotonic() + LATE_VOTE_S)
            if not answered.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return

    def _ask(self, account: bytes, proposal: Proposal, digest: bytes, signatures: dict[bytes, bytes]) -> None:
        validator = self._node_key_of(account)
        if validator is None:
            logger.info("round %s: validator 0x%s was never met", proposal.round, account.hex()[:8])
            return
        try:
            reply = self._node.call(validator, "propose", {}, [proposal.encode()], timeout_s=VOTE_TIMEOUT_S)
            vote = Vote.decode(reply.body)
            if not vote.signature:
                logger.info(
                    "round %s: %s does not sign: %s", proposal.round, validator.hex()[:8], "; ".join(vote.reasons)
                )
            elif vote.validator == account and recover(digest, vote.signature) == account:
                signatures[account] = vote.signature
        except SmartnodesError as error:
            logger.info("round %s: no vote of %s: %s", proposal.round, validator.hex()[:8], error)

    # -- voting -------------------------------------------------------------------------------------------------------

    @allow(roles=("validator",), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_propose(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Sign a proposal that this validator's own evidence justifies; else answer with the reasons why not."""
        proposal = Proposal.decode(body)
        if self._account_of(caller.node_key) != proposal.proposer:
            raise AuthorityError("a proposal comes from its proposer")
        state = self._chain.round_state(self._network_id)
        self._follow(state)
        content = RoundProposal.decode(proposal.content)
        digest = self._chain.proposal_digest(content)
        reasons = self._check(state, proposal, content, caller.node_key)
        signature = b"" if reasons else self._sign(content, digest)
        vote = Vote(proposal=digest, validator=self._account, signature=signature, reasons=reasons[:64])
        return {}, [vote.encode()]

    def _check(self, state: RoundState, proposal: Proposal, content: RoundProposal, proposer: NodeKey) -> list[str]:
        """Why this validator cannot sign; empty when it can."""
        order = self._proposers(state)
        if proposal.view >= len(order) or order[proposal.view] != proposal.proposer:
            return [f"view {proposal.view} is not this proposer's"]
        if content.until_s > time.time() + 5:
            return [f"until_s {content.until_s} is in the future"]
        if not self._knows_totals(state):
            return ["the rewards under the last root are not known here"]
        try:
            verdicts, commitments = self._look_up(proposal, proposer)
        except RecordError as error:
            return [str(error)]
        reasons = self._left_out(verdicts)
        evidence = self._evidence(verdicts, commitments)
        recomputed, totals = propose(self._context(state, proposal.view, content.until_s), evidence)
        reasons += justify(content, recomputed) or []
        if not reasons:
            with self._lock:
                self._seen[self._chain.proposal_digest(content)] = (proposal, content, totals)
        return reasons

    def _look_up(self, proposal: Proposal, proposer: NodeKey) -> tuple[dict[bytes, Verdict], dict[bytes, Commitment]]:
        """The records that a proposal names, from this validator's own books. Raises RecordError for what may not be
        settled.
        """
        with self._lock:
            again = self._settled.intersection([*proposal.verdicts, *proposal.settled])
        if again:
            raise RecordError(f"{len(again)} records were settled in a round before")
        verdicts = self._all_verdicts()
        unknown = [digest for digest in proposal.verdicts if digest not in verdicts]
        if unknown:
            raise RecordError(f"{len(unknown)} verdicts are not known here")
        payable = self._payable()
        missing = [digest for digest in proposal.settled if digest not in payable]
        if missing:
            for audited in list(self._audits.jobs.values()):
                self._audits.fetch(audited, proposer, [d for d in missing if d not in audited.commitments])
            payable = self._payable()
        missing = [digest for digest in proposal.settled if digest not in payable]
        if missing:
            raise RecordError(f"{len(missing)} commitments are not known here, or their audit window is open")
        return (
            {digest: verdicts[digest] for digest in proposal.verdicts},
            {digest: payable[digest] for digest in proposal.settled},
        )

    def _left_out(self, verdicts: Mapping[bytes, Verdict]) -> list[str]:
        """Frauds that this validator has known for a while and the proposal does not name."""
        old = time.time() - self._proposer_timeout_s
        return [
            f"the fraudulent verdict {digest.hex()[:16]} is left out"
            for digest, verdict in self._all_verdicts().items()
            if verdict.finding == "fraudulent"
            and digest not in verdicts
            and digest not in self._settled
            and verdict.decided_at_s < old
        ]

    def _sign(self, content: RoundProposal, digest: bytes) -> bytes:
        """Sign once per (round, view, previous hash), durably before it leaves. Raises EquivocationError for a second
        one.
        """
        scope = f"round/{content.network_id}/{content.round}/{content.view}/{content.previous_hash.hex()}"
        self._journal.once(scope, digest)
        return sign_digest(self._key, digest)

    # -- evidence -----------------------------------------------------------------------------------------------------

    def _unsettled(self) -> tuple[dict[bytes, Verdict], dict[bytes, Commitment]]:
        with self._lock:
            settled = set(self._settled)
        verdicts = {d: v for d, v in self._all_verdicts().items() if d not in settled}
        commitments = {d: c for d, c in self._payable().items() if d not in settled}
        return _first(verdicts), _first(commitments)

    def _all_verdicts(self) -> dict[bytes, Verdict]:
        with self._audits.lock:
            return {
                digest: verdict
                for audited in self._audits.jobs.values()
                for digest, (verdict, _) in audited.verdicts.items()
                if verdict.finding != "fraudulent" or digest in audited.confirmed
            }

    def _payable(self) -> dict[bytes, Commitment]:
        """Commitments whose audit window has closed (or whose job has) without a fraud of their worker."""
        with self._audits.lock:
            return {
                digest: commitment
                for audited in self._audits.jobs.values()
                for digest, commitment in audited.commitments.items()
                if self._window_closed(audited, commitment)
            }

    @staticmethod
    def _window_closed(audited: AuditedJob, commitment: Commitment) -> bool:
        latest = audited.latest_step[(commitment.stage, commitment.replica)]
        return audited.closed or commitment.step + audited.job.record.audit.window_steps <= latest

    def _evidence(self, verdicts: Mapping[bytes, Verdict], commitments: Mapping[bytes, Commitment]) -> RoundEvidence:
        counts: dict[bytes, VerdictCounts] = {}
        for verdict in verdicts.values():
            account = self._account_of(verdict.worker)
            if account is not None:
                before = counts.get(account, VerdictCounts())
                counts[account] = replace(before, **{verdict.finding: getattr(before, verdict.finding) + 1})
        work: dict[bytes, int] = {}
        for commitment in commitments.values():
            account = self._account_of(commitment.worker)
            if account is not None:
                work[account] = work.get(account, 0) + commitment.work_units
        return RoundEvidence(verdicts=counts, work_units=work, digests=[*verdicts, *commitments])

    def _context(self, state: RoundState, view: int, until_s: int) -> RoundContext:
        members = self._chain.members(self._network_id)
        return RoundContext(
            domain=self._chain.domain,
            network_id=self._network_id,
            round=state.number + 1,
            view=view,
            previous_hash=state.previous_hash,
            until_s=until_s,
            emission_wei=self._chain.emission_wei(self._network_id, until_s),
            num_validators=len(self._chain.validators(self._network_id)),
            signers=self._signers,
            standings={m.account: Standing(m.index, m.reputation, m.stake_wei) for m in members},
            totals_wei=self._totals_wei,
        )


def _first(records: Mapping[bytes, Any]) -> dict[bytes, Any]:
    return {digest: records[digest] for digest in sorted(records)[:MAX_NAMED]}
