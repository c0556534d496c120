"""A validator's rounds: propose when it is its turn, collect the others' votes, execute.

What goes into a proposal is in `round_books.py`, votes on others' proposals are in `voting.py`, how they travel in
`balloting.py`; the rules are pure and live in `smartnodes_core/rounds.py` and `ballots.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from smartnodes_core.ballots import BallotBox, Motion, carrying, proposers_in
from smartnodes_core.chain.base import Chain, RefusedError, RoundState
from smartnodes_core.chain.proposal import Equivocation, Parameters
from smartnodes_core.chain.signing import address_of
from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import ChainError, SmartnodesError
from smartnodes_core.journal import EquivocationError, Journal
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.balloting import BallotDesk
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.collecting import Collector
from smartnodes_core.nodes.endorsing import Endorser
from smartnodes_core.nodes.equivocations import EquivocationDesk
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.round_books import Candidate, RoundBooks
from smartnodes_core.nodes.views import View, ViewClock
from smartnodes_core.nodes.voting import Signer, VoteDesk
from smartnodes_core.records import NodeKey, Proposal, Signed
from smartnodes_core.reputation import ReputationRule, next_reputation
from smartnodes_core.rounds import RoundProposal, in_view, propose, quorum

logger = logging.getLogger(__name__)

#: The longest that the chain is not looked at while no round can be due.
MAX_SLEEP_S = 60.0
#: What the contract says where another has executed the round, or the epoch has changed meanwhile: not the proposal's
#: fault.
PASSING = ("WrongRound", "WrongPrevious", "TooEarly", "QuorumMissing")


class RoundDesk:
    """Carries what this validator and its peers verified on chain, one round after the other.

    `poll_s` is how often the chain is looked at while a round is due, `proposer_timeout_s` after how long the view
    rises: the next in the draw leads, more may propose. `folder` keeps proofs of equivocation, a file beside it the
    last rewards (None: in memory only). `wanted` are parameters of the network that this validator proposes and signs
    for (None: those in force); `announced` gives what a node announced last, where its class is read;
    `reputation_rule` is the network's.
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
        folder: Path | None = None,
        wanted: Parameters | None = None,
        announced: Callable[[NodeKey], Signed | None] = lambda node_key: None,
        reputation_rule: ReputationRule = next_reputation,
    ):
        self._node, self._chain, self._network_id = node, chain, network_id
        self._account = address_of(account_key)
        self._membership, self._learn_validators = membership, learn_validators
        rewards = folder.with_name("rewards.json") if folder is not None else None
        self.books = RoundBooks(
            node, chain, network_id, self._account, audits, membership, wanted, announced, reputation_rule, rewards
        )
        self.executed = self.books.executed
        others = self.books.others
        self.proofs = EquivocationDesk(node, chain, network_id, self._account, folder, others, poll_s)
        self.ballots = BallotDesk(node, chain.domain, network_id, self._validators, others, self._report)
        self._signer = Signer(account_key, journal)
        self._votes = VoteDesk(self.books, self._signer, self.ballots, proposer_timeout_s)
        self._endorser = Endorser(chain, self.books, self.ballots, self._signer, proposer_timeout_s)
        self._collector = Collector(node, self._account, membership, self.ballots)
        self._clock = ViewClock(proposer_timeout_s)
        self._poll_s = poll_s
        self._remembered: tuple[int, bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)
        self.ballots.stop()
        self.proofs.stop()

    def _validators(self) -> set[bytes]:
        """All accounts that are registered as validators, whether they count now or not."""
        try:
            members = self._membership.members(max_age_s=self._membership.max_age_s)
        except ChainError as error:
            logger.info("the validators are not known: %s", error)
            return set()
        return {member.account for member in members if member.role == "validator"}

    def _report(self, proof: Equivocation) -> None:
        try:
            self.proofs.report(proof)
        except SmartnodesError as error:
            logger.error("a proof of equivocation: %s", error)

    # -- taking turns -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = self._poll_s
            try:
                wait_s = self._tick()
            except SmartnodesError as error:
                logger.warning("round: %s", error)
            except Exception:
                logger.exception("round")

    def _tick(self) -> float:
        """Look at the chain once, do what is this validator's turn; the seconds until the next look."""
        state = self._chain.round_state(self._network_id)
        self.meet()
        self.books.follow(state)
        self.books.records.since()
        self.books.roots.look_again(state)
        self.books.roots.freeze(state)
        self._endorser.endorse(state)
        view = self._clock.at(state)
        if self.proofs.is_waiting:
            self.proofs.submit(self._chain.validators(self._network_id))
        if view is None:  # nothing can be executed before, by anybody
            is_busy = self.proofs.is_waiting or self._endorser.is_waiting(state)
            most_s = self._poll_s if is_busy else MAX_SLEEP_S
            return min(most_s, max(self._poll_s, state.earliest_at_s - state.chain_time_s))
        order = self.books.proposers(state)
        box = self.ballots.box(state)
        for proof in list(box.equivocators.values()):
            self._report(proof)
        self._remember(state, order)
        if self._account in order:
            self._take_turn(state, view, order, box)
        return self._poll_s

    def meet(self) -> None:
        """Learn the node keys of validators that this one does not know yet: whom it asks, tells and follows. Who is
        connected says who it is; of others, the directory does.
        """
        known = self._membership.members(max_age_s=self._membership.max_age_s)
        live = [m.account for m in known if m.role == "validator" and m.live and m.account != self._account]
        if all(self._membership.node_key_of(account) is not None for account in live):
            return
        for peer in self._node.peers():
            if peer.role == "validator":
                self._membership.of(peer.node_key)
        if any(self._membership.node_key_of(account) is None for account in live):
            self._learn_validators()

    def _remember(self, state: RoundState, order: list[bytes]) -> None:
        """Keep what the chain says before a round, once for each: it is judged by that when it is executed."""
        if self._remembered != (state.number, state.previous_hash) and self.books.knows_rewards(state):
            context = self.books.context(state, 0, state.emitted_until_s, len(order))
            self.books.roots.remember(state, context)
            self._remembered = (state.number, state.previous_hash)

    def _take_turn(self, state: RoundState, view: View, order: list[bytes], box: BallotBox) -> None:
        """Execute what has its quorum, carry on what leads, or propose."""
        leads = order[view.number % len(order)] == self._account
        self._collector.catch_up(box, view.number, order, leads)
        if self._execute_for_others(view, order, box):
            return
        motion = self._votes.leading(state, box, view.number, order)
        if motion is None and self._may_propose(view, order) and self.books.knows_rewards(state):
            motion = self._make(state, box, view.number, len(order))
        if motion is not None and (leads or motion.proposal.proposer == self._account):
            self._carry(state, view.number, order, box, motion)

    def _may_propose(self, view: View, order: list[bytes]) -> bool:
        """The leader at once, the others that a view lets propose one after the other: one proposal is enough."""
        window = proposers_in(order, view.number)
        return self._account in window and view.passed * len(window) >= window.index(self._account)

    # -- executing ----------------------------------------------------------------------------------------------------

    def _execute_for_others(self, view: View, order: list[bytes], box: BallotBox) -> bool:
        """A proposal had its quorum in an earlier view: who collected it has vanished. One after the other tries."""
        with self.ballots.lock:
            found = box.carried(frozenset(order), quorum(len(order)))
        if found is None or found[1] >= view.number:
            return False
        place = (order.index(self._account) - view.number) % len(order)
        if view.passed * len(order) < place:
            return False
        motion, signed_in, signatures = found
        return self._execute(box, motion, in_view(motion.content, signed_in), carrying(order, signatures))

    def _execute(self, box: BallotBox, motion: Motion, content: RoundProposal, signatures: dict[bytes, bytes]) -> bool:
        """Whether the round is executed, by this validator or another."""
        try:
            self._chain.execute_round(content, list(signatures.values()))
        except RefusedError as error:
            if error.reason not in PASSING:
                self._votes.reject(box, motion, str(error))
                raise
            logger.info("round %s: %s", content.round, error)
            return error.reason in ("WrongRound", "WrongPrevious")
        COUNTERS.add("rounds", "executed")
        logger.info(
            "round %s executed: %d signatures, %d verdicts, %d commitments settled",
            content.round,
            len(signatures),
            len(motion.proposal.verdicts),
            len(motion.proposal.settled),
        )
        return True

    # -- proposing ----------------------------------------------------------------------------------------------------

    def _make(self, state: RoundState, box: BallotBox, view: int, num_validators: int) -> Motion | None:
        """A proposal of this validator's own, signed; None where it has signed another one in this view."""
        candidate = self._propose(state, view, num_validators)
        with self.ballots.lock:
            motion = box.add_motion(candidate.proposal, candidate.content)
        try:
            self._votes.sign(box, motion, view, candidate)
        except EquivocationError as error:
            logger.info("nothing more is proposed in this view: %s", error)
            with self.ballots.lock:
                box.drop_motion(motion)
            return None
        return motion

    def _propose(self, state: RoundState, view: int, num_validators: int) -> Candidate:
        """What this validator's evidence justifies now."""
        verdicts, commitments = self.books.records.unsettled()
        created, completed = self.books.news.propose()
        evidence = replace(
            self.books.records.evidence(state, verdicts, commitments),
            jobs_created=created,
            jobs_completed=completed,
            admissions=self.books.admissions.propose(),
            parameters=self.books.wanted,
        )
        until_s = max(state.emitted_until_s, min(int(time.time()), state.chain_time_s))
        context = self.books.context(state, view, until_s, num_validators)
        content, totals_wei = propose(context, evidence)
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
        return Candidate.of(proposal, content, context, totals_wei)

    def _carry(self, state: RoundState, view: int, order: list[bytes], box: BallotBox, motion: Motion) -> None:
        """Sign what leads, collect the others' signatures, execute."""
        if self._account not in box.signatures(motion, view):
            candidate = self._votes.candidate(state, box, motion, view, order)
            if candidate is None:
                return
            try:
                self._votes.sign(box, motion, view, candidate)
            except EquivocationError as error:
                logger.info("this view's vote is given: %s", error)
                return
        needed = quorum(len(order))
        signatures = self._collector.collect(motion, view, order, box, needed)
        if len(signatures) < needed:
            logger.warning("round %s, view %d: %d of %d signatures", box.number, view, len(signatures), needed)
            return
        self._execute(box, motion, in_view(motion.content, view), carrying(order, signatures))
