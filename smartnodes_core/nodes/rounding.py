"""A validator's rounds: propose when it is its turn, collect the others' votes, execute.

What goes into a proposal is in `round_books.py`, votes on others' proposals are in `voting.py`, the rules are pure and
live in `smartnodes_core/rounds.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from smartnodes_core.chain.base import Chain, RoundState
from smartnodes_core.chain.signing import address_of, recover
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.round_books import Candidate, RoundBooks
from smartnodes_core.nodes.views import ViewClock
from smartnodes_core.nodes.voting import Signer, VoteDesk
from smartnodes_core.records import Proposal, Vote
from smartnodes_core.rounds import propose, quorum

logger = logging.getLogger(__name__)

VOTE_TIMEOUT_S = 20.0
MAX_VOTE_BYTES = 1 << 20
#: How long a proposer with a quorum waits for those who have not signed yet: every signer is paid.
LATE_VOTE_S = 1.0
#: The longest that the chain is not looked at while no round can be due.
MAX_SLEEP_S = 60.0


class RoundDesk:
    """Carries what this validator and its peers verified on chain, one round after the other.

    `poll_s` is how often the chain is looked at while a round is due, `proposer_timeout_s` after how long the next in
    the draw takes over, again and again round the draw until a proposal finds its quorum.
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
        self._node, self._chain, self._network_id = node, chain, network_id
        self._account = address_of(account_key)
        self._membership, self._learn_validators = membership, learn_validators
        self.books = RoundBooks(node, chain, network_id, self._account, audits, membership)
        self.executed = self.books.executed
        self._signer = Signer(account_key, journal)
        self._votes = VoteDesk(self.books, self._signer, proposer_timeout_s)
        self._clock = ViewClock(proposer_timeout_s)
        self._poll_s = poll_s
        self._order: list[bytes] = []
        self._order_of: tuple[int, int] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    # -- taking turns -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = self._poll_s
        while not self._stopping.wait(wait_s):
            wait_s = self._poll_s
            try:
                wait_s = self._tick()
            except SmartnodesError as error:
                logger.warning("round: %s", error)
            except Exception:
                logger.exception("round")

    def _tick(self) -> float:
        """Look at the chain once, propose if it is this validator's turn; the seconds until the next look."""
        state = self._chain.round_state(self._network_id)
        self.books.follow(state)
        left_out = self.books.take_left_out()
        if left_out is not None and state.chain_time_s < state.earliest_at_s:
            signature = self._signer.sign(left_out, self._chain.proposal_digest(left_out))
            self._chain.endorse_round(self._network_id, [signature])
        view = self._clock.view(state)
        if view is None:  # nothing can be executed before, by anybody
            return min(MAX_SLEEP_S, max(self._poll_s, state.earliest_at_s - state.chain_time_s))
        if self._order_of != (state.number, view):
            self._order, self._order_of = self.books.proposers(state), (state.number, view)
            if any(self._membership.node_key_of(account) is None for account in self._order):
                self._learn_validators()
        order = self._order
        if order and order[view % len(order)] == self._account and self.books.rewards.knows(state):
            self._propose(state, view, order)
        return self._poll_s

    # -- proposing ----------------------------------------------------------------------------------------------------

    def _propose(self, state: RoundState, view: int, order: list[bytes]) -> None:
        digest, candidate = self.books.own_candidate(state, view) or self._make(state, view, len(order))
        content, proposal = candidate.content, candidate.proposal
        own = self._signer.sign(content, digest)
        self.books.remember(digest, candidate)
        needed = quorum(len(order))
        signatures = {self._account: own, **self._collect(proposal, digest, order, needed)}
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

    def _make(self, state: RoundState, view: int, num_validators: int) -> tuple[bytes, Candidate]:
        verdicts, commitments = self.books.unsettled()
        evidence = replace(self.books.evidence(verdicts, commitments), admissions=self.books.admissions.propose())
        until_s = max(state.emitted_until_s, min(int(time.time()), state.chain_time_s))
        content, totals_wei = propose(self.books.context(state, view, until_s, num_validators), evidence)
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
        return self._chain.proposal_digest(content), Candidate(proposal, content, totals_wei)

    def _collect(self, proposal: Proposal, digest: bytes, order: list[bytes], needed: int) -> dict[bytes, bytes]:
        """The other validators' signatures, all asked at once. Returns when all have answered, or soon after `needed`
        signatures are there, this validator's own included.
        """
        others = [account for account in order if account != self._account]
        answered = threading.Condition()
        signatures: dict[bytes, bytes] = {}
        num_answers = 0

        def ask(account: bytes) -> None:
            nonlocal num_answers
            signature = self._ask(account, proposal, digest)
            with answered:
                num_answers += 1
                if signature:
                    signatures[account] = signature
                answered.notify_all()

        for account in others:
            threading.Thread(target=ask, args=(account,), name="ask-vote", daemon=True).start()
        with answered:
            answered.wait_for(lambda: num_answers == len(others) or len(signatures) + 1 >= needed, VOTE_TIMEOUT_S)
            if len(signatures) + 1 >= needed:
                answered.wait_for(lambda: num_answers == len(others), LATE_VOTE_S)
            return dict(signatures)

    def _ask(self, account: bytes, proposal: Proposal, digest: bytes) -> bytes:
        """One validator's signature, empty where it does not sign."""
        validator = self._membership.node_key_of(account)
        if validator is None:
            logger.info("round %s: validator 0x%s was never met", proposal.round, account.hex()[:8])
            return b""
        name = validator.hex()[:8]
        try:
            reply = self._node.call(
                validator,
                "propose",
                {},
                [proposal.encode()],
                timeout_s=VOTE_TIMEOUT_S,
                max_body_bytes=MAX_VOTE_BYTES,
            )
            vote = Vote.decode(reply.body)
            if vote.signature and recover(digest, vote.signature) == account:
                return vote.signature
            logger.info("round %s: %s does not sign: %s", proposal.round, name, "; ".join(vote.reasons))
        except SmartnodesError as error:
            logger.info("round %s: no vote of %s: %s", proposal.round, name, error)
        except Exception:
            logger.exception("round %s: the vote of %s", proposal.round, name)
        return b""
