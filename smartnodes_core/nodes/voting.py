"""A validator's votes: recompute another's proposal from its own books, sign only what comes out the same.

A proposal names the verdicts and commitments behind it; whoever votes looks each of them up among its own and fetches
what it lacks. The rules are pure and live in `smartnodes_core/rounds.py`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from smartnodes_core.chain.base import RoundState
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.errors import AuthorityError, RecordError
from smartnodes_core.journal import EquivocationError, Journal
from smartnodes_core.nodes.round_books import Candidate, RoundBooks
from smartnodes_core.nodes.views import ViewClock
from smartnodes_core.records import MAX_RECORD_BYTES, Commitment, NodeKey, Proposal, Verdict, Vote
from smartnodes_core.rounds import RoundProposal, justify, propose
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

MAX_REASONS = 64
MAX_REASON_CHARS = 1000
#: How far a proposer's clock may be ahead of ours.
CLOCK_SKEW_S = 5


class Signer:
    """Signs a round's proposals for one account: once per (round, view, previous hash), durably before it leaves."""

    def __init__(self, account_key: bytes, journal: Journal):
        self._key, self._journal = account_key, journal

    def sign(self, content: RoundProposal, digest: bytes) -> bytes:
        """The EIP-712 signature. Raises EquivocationError for a second proposal in the same place."""
        scope = f"round/{content.network_id}/{content.round}/{content.view}/{content.previous_hash.hex()}"
        self._journal.once(scope, digest)
        return sign_digest(self._key, digest)


class VoteDesk:
    """Serves `rpc_propose`. A fraud that this validator has known for `patience_s` must be in a proposal."""

    def __init__(self, books: RoundBooks, signer: Signer, proposer_timeout_s: float):
        self._books, self._signer = books, signer
        self._clock = ViewClock(proposer_timeout_s)
        self._patience_s = proposer_timeout_s
        books.node.serve(self)

    @allow(roles=("validator",), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_propose(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Sign a proposal that this validator's own evidence justifies; else answer with the reasons why not."""
        proposal = Proposal.decode(body)
        content = RoundProposal.decode(proposal.content)
        books = self._books
        if books.membership.account_of(caller.node_key) != proposal.proposer:
            raise AuthorityError("a proposal comes from its proposer")
        digest = books.chain.proposal_digest(content)
        state = books.chain.round_state(books.network_id)
        books.follow(state)
        candidate, reasons = self._check(state, proposal, content, caller.node_key)
        signature = b""
        if candidate is not None:
            try:
                signature = self._signer.sign(content, digest)
                books.remember(digest, candidate)
            except EquivocationError:
                reasons = [f"another proposal of round {content.round}, view {content.view} was signed before"]
        kept = [reason[:MAX_REASON_CHARS] for reason in reasons[:MAX_REASONS]]
        return {}, [Vote(proposal=digest, validator=books.account, signature=signature, reasons=kept).encode()]

    def _check(
        self, state: RoundState, proposal: Proposal, content: RoundProposal, proposer: NodeKey
    ) -> tuple[Candidate | None, list[str]]:
        """What this validator can sign, or why it cannot."""
        order = self._books.proposers(state)
        due = self._clock.view(state)
        if order[proposal.view % len(order)] != proposal.proposer:
            return None, [f"view {proposal.view} is not this proposer's"]
        if due is None or proposal.view > due + 1:  # the next one already: clocks differ a little
            return None, [f"view {proposal.view} is not due"]
        if content.until_s > time.time() + CLOCK_SKEW_S or content.until_s < state.emitted_until_s:
            return None, [f"until_s {content.until_s} is in the future, or before the last round's"]
        if not self._books.rewards.knows(state):
            return None, ["the rewards under the last root are not known here"]
        try:
            verdicts, commitments = self._look_up(proposal, proposer)
        except RecordError as error:
            return None, [str(error)]
        reasons = [
            f"the fraudulent verdict {digest.hex()[:16]} is left out"
            for digest in self._books.frauds_since(time.monotonic() - self._patience_s)
            if digest not in verdicts
        ]
        reasons += self._books.admissions.unproven(content.admissions, proposer)
        evidence = replace(self._books.evidence(verdicts, commitments), admissions=content.admissions)
        context = self._books.context(state, proposal.view, content.until_s, len(order))
        recomputed, totals_wei = propose(context, evidence)
        reasons += justify(content, recomputed) or []
        return (None, reasons) if reasons else (Candidate(proposal, content, totals_wei), [])

    def _look_up(self, proposal: Proposal, proposer: NodeKey) -> tuple[dict[bytes, Verdict], dict[bytes, Commitment]]:
        """The records that a proposal names, from this validator's own books, asking the proposer for what they lack.

        Raises RecordError for what may not be settled.
        """
        again = self._books.is_settled([*proposal.verdicts, *proposal.settled])
        if again:
            raise RecordError(f"{len(again)} records were settled in a round before")
        verdicts, payable = self._books.verdicts(), self._books.payable()
        unknown = [digest for digest in proposal.verdicts if digest not in verdicts]
        missing = [digest for digest in proposal.settled if digest not in payable]
        if unknown or missing:
            audits = self._books.audits
            audits.fetch_missing(proposer, missing, unknown)
            audits.confirm_again(unknown)
            verdicts, payable = self._books.verdicts(), self._books.payable()
        unknown = [digest for digest in proposal.verdicts if digest not in verdicts]
        if unknown:
            raise RecordError(f"{len(unknown)} verdicts are not known here, not drawn, or not yet re-run")
        missing = [digest for digest in proposal.settled if digest not in payable]
        if missing:
            raise RecordError(f"{len(missing)} commitments are not known here, or their audit window is open")
        return (
            {digest: verdicts[digest] for digest in proposal.verdicts},
            {digest: payable[digest] for digest in proposal.settled},
        )
