"""A validator's votes: recompute another's proposal from its own books, sign only what comes out the same, and of
several only the one that has the most votes.

A proposal names the verdicts and commitments behind it; whoever votes looks each of them up among its own and fetches
what it lacks. The rules are pure and live in `smartnodes_core/rounds.py` (what is justified) and `ballots.py` (which
proposal leads).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from smartnodes_core.ballots import BallotBox, Motion
from smartnodes_core.chain.base import RoundState
from smartnodes_core.chain.proposal import CORRECT, NO_RULING
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.errors import RecordError
from smartnodes_core.journal import EquivocationError, Journal
from smartnodes_core.nodes.balloting import MAX_BALLOTS, BallotDesk
from smartnodes_core.nodes.finding import Found
from smartnodes_core.nodes.params import bytes_list_in
from smartnodes_core.nodes.round_books import Candidate, RoundBooks
from smartnodes_core.nodes.views import ViewClock
from smartnodes_core.records import MAX_RECORD_BYTES, Commitment, NodeKey, Proposal, Vote
from smartnodes_core.rounds import RoundProposal, in_view, justify, left_out, propose, undecided
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

MAX_REASONS = 64
MAX_REASON_CHARS = 1000
#: How far a proposer's clock may be ahead of ours.
CLOCK_SKEW_S = 5
#: Opinions about proposals that are remembered, of one round.
MAX_OPINIONS = 256


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

    def __init__(self, books: RoundBooks, signer: Signer, ballots: BallotDesk, proposer_timeout_s: float):
        self._books, self._signer, self._ballots = books, signer, ballots
        self._clock = ViewClock(proposer_timeout_s)
        self._patience_s = proposer_timeout_s
        self._lock = threading.Lock()
        self._opinions: dict[tuple[int, bytes, bytes, int], list[str]] = {}  # (round, previous, motion, view): why not
        books.look_up = self._look_up
        books.node.serve(self)

    @allow(roles=("validator",), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_propose(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Sign a proposal that leads and that this validator's own evidence justifies; else answer with the reasons why
        not. `ballots` are votes that it has, its proposer's among them: whoever passes it on shows them.
        """
        proposal = Proposal.decode(body)
        content = RoundProposal.decode(proposal.content)
        signed = bytes_list_in(params, "ballots", MAX_BALLOTS)
        books = self._books
        digest = books.chain.proposal_digest(content)
        state = books.chain.round_state(books.network_id)
        books.follow(state)
        signature = b""
        try:
            signature, reasons = self._vote(state, proposal, content, signed, caller.node_key)
        except EquivocationError:
            reasons = [f"another proposal of round {content.round}, view {content.view} was signed before"]
        except RecordError as error:
            reasons = [str(error)]
        kept = [reason[:MAX_REASON_CHARS] for reason in reasons[:MAX_REASONS]]
        return {}, [Vote(proposal=digest, validator=books.account, signature=signature, reasons=kept).encode()]

    def _vote(
        self, state: RoundState, proposal: Proposal, content: RoundProposal, signed: list[bytes], caller: NodeKey
    ) -> tuple[bytes, list[str]]:
        due, view = self._clock.at(state), proposal.view
        if (proposal.network_id, proposal.round, view) != (content.network_id, content.round, content.view):
            return b"", [f"round {proposal.round}, view {view} are not those of the proposal's content"]
        if due is None or view > due.number + 1:  # the next one already: clocks differ a little
            return b"", [f"view {view} is not due"]
        order = self._books.proposers(state)
        box = self._ballots.box(state)
        motion, _ = self._ballots.take(box, proposal, content, signed)
        motion = replace(motion, proposal=proposal, content=content)  # what others named for it may be wrong
        with self._ballots.lock:
            made_in = box.made_in(motion, order)
            if made_in is None:
                box.drop_motion(motion)
            is_open = box.is_open(motion, order, due.number)
        if made_in is None:
            return b"", [f"view {view} is not this proposer's, or its own vote is not among those shown"]
        if not is_open:
            return b"", [f"a proposal made in view {made_in} is not voted on in view {due.number}"]
        for other in self.ranking(box, order, due.number):
            if other.id == motion.id:
                break
            if not self._opinion(state, box, other, view, order):
                return b"", [f"another proposal ({other.id.hex()[:16]}) has more votes and is justified"]
        candidate, reasons = self._form_opinion(state, box, motion, view, order, caller)
        if candidate is None:
            return b"", reasons
        with self._ballots.lock:
            box.keep_shown(motion)
        return self.sign(box, motion, view, candidate), []

    def ranking(self, box: BallotBox, order: list[bytes], due: int) -> list[Motion]:
        """The proposals of a round with the votes of the validators in `order`, the leading one first."""
        with self._ballots.lock:
            found = box.ranking(frozenset(order))
            return [motion for motion in found if box.is_open(motion, order, due)]

    def sign(self, box: BallotBox, motion: Motion, view: int, candidate: Candidate) -> bytes:
        """Sign a proposal that this validator justified, and tell everybody. Raises EquivocationError."""
        digest = self._books.chain.proposal_digest(candidate.content)
        signature = self._signer.sign(candidate.content, digest)
        self._books.remember(digest, candidate)
        self._ballots.cast(box, motion, view, signature)
        return signature

    # -- opinions -----------------------------------------------------------------------------------------------------

    def leading(self, state: RoundState, box: BallotBox, view: int, order: list[bytes]) -> Motion | None:
        """Of the proposals that have votes and that this validator finds justified in `view`, the one with the most."""
        for motion in self.ranking(box, order, view):
            if not self._opinion(state, box, motion, view, order):
                return motion
        return None

    def candidate(
        self, state: RoundState, box: BallotBox, motion: Motion, view: int, order: list[bytes]
    ) -> Candidate | None:
        """What this validator signs for a motion in a view, if it can justify it now."""
        return self._form_opinion(state, box, motion, view, order)[0]

    def reject(self, box: BallotBox, motion: Motion, reason: str) -> None:
        """The chain does not take this proposal, whatever view it is signed in."""
        self._keep_opinion(box, motion, -1, [reason])

    def _opinion(self, state: RoundState, box: BallotBox, motion: Motion, view: int, order: list[bytes]) -> list[str]:
        """Why this validator does not sign a motion in a view, as it was found before or is found now."""
        with self._lock:
            for place in (self._key(box, motion, -1), self._key(box, motion, view)):
                if place in self._opinions:
                    return self._opinions[place]
        return self._form_opinion(state, box, motion, view, order)[1]

    def _form_opinion(
        self,
        state: RoundState,
        box: BallotBox,
        motion: Motion,
        view: int,
        order: list[bytes],
        caller: NodeKey | None = None,
    ) -> tuple[Candidate | None, list[str]]:
        """`caller` may hold what the proposer, that may have vanished, does not show any more."""
        with self._lock:
            refused = self._opinions.get(self._key(box, motion, -1))
        if refused:
            return None, refused
        sources = self._sources(motion.proposal, caller)
        candidate, reasons = self._check(state, motion, view, len(order), sources)
        self._keep_opinion(box, motion, view, reasons)
        return candidate, reasons

    def _sources(self, proposal: Proposal, caller: NodeKey | None) -> list[NodeKey]:
        """Who may hold the records behind a proposal."""
        return list(dict.fromkeys([*self._books.proposer_of(proposal), *([caller] if caller else [])]))

    def _keep_opinion(self, box: BallotBox, motion: Motion, view: int, reasons: list[str]) -> None:
        with self._lock:
            self._opinions[self._key(box, motion, view)] = reasons
            for place in list(self._opinions)[: max(0, len(self._opinions) - MAX_OPINIONS)]:
                del self._opinions[place]

    @staticmethod
    def _key(box: BallotBox, motion: Motion, view: int) -> tuple[int, bytes, bytes, int]:
        return box.number, box.previous_hash, motion.id, view

    def _check(
        self, state: RoundState, motion: Motion, view: int, num_validators: int, sources: Sequence[NodeKey]
    ) -> tuple[Candidate | None, list[str]]:
        """What this validator can sign, or why it cannot. `sources` are asked for records that it lacks."""
        books, content = self._books, in_view(motion.content, view)
        proposal = proposed_in(motion.proposal, content)
        if content.until_s > time.time() + CLOCK_SKEW_S or content.until_s < state.emitted_until_s:
            return None, [f"until_s {content.until_s} is in the future, or before the last round's"]
        if content.until_s < min(state.earliest_at_s, int(time.time())) - CLOCK_SKEW_S:
            return None, [f"until_s {content.until_s} is before the round was due: its work would earn less"]
        if not (books.knows_rewards(state) if content.ruling == CORRECT else books.rewards.knows(state)):
            return None, ["the rewards under the last root are not known here"]
        again = books.is_settled([*proposal.verdicts, *proposal.settled])
        if again:
            return None, [f"{len(again)} records were settled in a round before"]
        try:
            verdicts, commitments = self._look_up(proposal, sources)
            evidence = books.records.evidence(state, verdicts, commitments)
        except RecordError as error:
            return None, [str(error)]
        reasons = self._left_out(state, view, verdicts, commitments)
        reasons += books.admissions.unproven(content.admissions, sources)
        reasons += books.news.unproven(content, sources)
        wanted = books.wanted if content.parameters else None
        evidence = replace(
            evidence,
            admissions=content.admissions,
            jobs_created=content.jobs_created,
            jobs_completed=content.jobs_completed,
            parameters=wanted,
        )
        context = undecided(books.context(state, view, content.until_s, num_validators), content)
        if content.ruling != NO_RULING and not context.is_judged:
            reasons.append(f"the roots frozen from round {state.frozen_from} on: {books.roots.why_not(state)}")
        recomputed, totals_wei = propose(context, evidence)
        reasons += justify(content, recomputed) or []
        return (None, reasons) if reasons else (Candidate.of(proposal, content, context, totals_wei), [])

    def _left_out(
        self, state: RoundState, view: int, verdicts: Mapping[bytes, Found], commitments: Mapping[bytes, Commitment]
    ) -> list[str]:
        """Reasons against a proposal that names these records: what else it had to name."""
        records, now_s = self._books.records, time.monotonic()
        frauds = [each for each in records.frauds_since(now_s - self._patience_s) if each not in verdicts]
        missing: list[bytes] = []
        if not records.is_full(verdicts.values(), commitments.values()):
            named = verdicts.keys() | commitments.keys()
            missing = left_out(records.since(), named, now_s, state.interval_s, view)
        return [
            *(f"the fraud {digest.hex()[:16]} is left out" for digest in frauds),
            *(f"{digest.hex()[:16]} is left out: it could be settled an interval ago" for digest in missing),
        ]

    def _look_up(
        self, proposal: Proposal, sources: Sequence[NodeKey]
    ) -> tuple[dict[bytes, Found], dict[bytes, Commitment]]:
        """The records that a proposal names, from this validator's own books, asking `sources` for what they lack.

        Raises RecordError for what may not be settled, whether a round has settled it or not.
        """
        verdicts, payable, unknown, missing = self._held(proposal)
        for source in sources:
            if not unknown and not missing:
                break
            self._books.audits.fetch_missing(source, missing, unknown)
            self._books.audits.confirm_again(unknown)
            verdicts, payable, unknown, missing = self._held(proposal)
        if unknown:
            raise RecordError(f"{len(unknown)} verdicts or proofs are not known here, not drawn, or not yet re-run")
        if missing:
            raise RecordError(f"{len(missing)} commitments are not known here, or their audit window is open")
        return (
            {digest: verdicts[digest] for digest in proposal.verdicts},
            {digest: payable[digest] for digest in proposal.settled},
        )

    def _held(self, proposal: Proposal) -> tuple[dict[bytes, Found], dict[bytes, Commitment], list[bytes], list[bytes]]:
        """Verdicts and commitments that may be settled, and those of the proposal that are not among them."""
        verdicts, payable = self._books.records.findings(), self._books.records.payable()
        unknown = [digest for digest in proposal.verdicts if digest not in verdicts]
        missing = [digest for digest in proposal.settled if digest not in payable]
        return verdicts, payable, unknown, missing


def proposed_in(proposal: Proposal, content: RoundProposal) -> Proposal:
    """The record of a proposal whose content is proposed again in another view."""
    return msgspec.structs.replace(proposal, view=content.view, content=content.encode())
