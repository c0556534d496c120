"""What a validator asks the others for in a round: their votes on a proposal, and votes that it has missed."""

from __future__ import annotations

import logging

from smartnodes_core.ballots import BallotBox, Motion
from smartnodes_core.chain.signing import recover
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.nodes.balloting import SYNC_TIMEOUT_S, BallotDesk
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.polling import ask_all
from smartnodes_core.nodes.voting import proposed_in
from smartnodes_core.records import Proposal, Vote
from smartnodes_core.rounds import in_view, quorum

logger = logging.getLogger(__name__)

VOTE_TIMEOUT_S = 20.0
MAX_VOTE_BYTES = 1 << 20
#: How long a proposer with a quorum waits for those who have not signed yet: every signer is paid.
LATE_VOTE_S = 1.0


class Collector:
    """Asks validators, all at once, on behalf of `account`'s; what they say goes into the ballot box."""

    def __init__(self, node: Node, account: bytes, membership: Membership, ballots: BallotDesk):
        self._node, self._account, self._membership, self._ballots = node, account, membership, ballots
        self._synced: tuple[int, bytes, int] | None = None

    def catch_up(self, box: BallotBox, view: int, order: list[bytes], leads: bool) -> None:
        """Ask the others for votes that did not come by themselves: after a start, and to lead a later view."""
        place = (box.number, box.previous_hash, view)
        if self._synced == place or (self._synced is not None and not (leads and view)):
            return
        self._synced = place

        def fetch(account: bytes) -> bool:
            validator = self._membership.node_key_of(account)
            try:
                if validator is not None:
                    self._ballots.fetch(box, validator)
                return validator is not None
            except SmartnodesError as error:
                logger.info("round %d: no votes from 0x%s: %s", box.number, account.hex()[:8], error)
            except Exception:
                logger.exception("round %d: votes from 0x%s", box.number, account.hex()[:8])
            return False

        others = [account for account in order if account != self._account]
        enough = quorum(len(order)) - 1
        ask_all(others, fetch, lambda found: sum(found.values()) >= enough, SYNC_TIMEOUT_S, LATE_VOTE_S)

    def collect(self, motion: Motion, view: int, order: list[bytes], box: BallotBox, needed: int) -> dict[bytes, bytes]:
        """The signatures of live validators, this one's included. Those that have not signed are asked at once; returns
        when all have answered, or soon after `needed` signatures are there.
        """
        live = set(order)

        def signed() -> dict[bytes, bytes]:
            with self._ballots.lock:
                found = box.signatures(motion, view)
            return {account: signature for account, signature in found.items() if account in live}

        content = in_view(motion.content, view)
        proposal = proposed_in(motion.proposal, content)
        with self._ballots.lock:
            digest = box.digest(view, box.hash_of(motion, view))
        ballots = self._ballots.packed(box, motion)
        others = [account for account in order if account not in signed()]
        ask_all(
            others,
            lambda account: self._ask(account, proposal, digest, ballots, box, motion),
            lambda _: len(signed()) >= needed,
            VOTE_TIMEOUT_S,
            LATE_VOTE_S,
        )
        return signed()

    def _ask(
        self,
        account: bytes,
        proposal: Proposal,
        digest: bytes,
        ballots: list[bytes],
        box: BallotBox,
        motion: Motion,
    ) -> None:
        """Get one validator's signature into the box, if it signs."""
        validator = self._membership.node_key_of(account)
        if validator is None:
            logger.info("round %s: validator 0x%s was never met", proposal.round, account.hex()[:8])
            return
        name = validator.hex()[:8]
        try:
            reply = self._node.call(
                validator,
                "propose",
                {"ballots": ballots},
                [proposal.encode()],
                timeout_s=VOTE_TIMEOUT_S,
                max_body_bytes=MAX_VOTE_BYTES,
            )
            vote = Vote.decode(reply.body)
            if vote.signature and recover(digest, vote.signature) == account:
                self._ballots.add_signature(box, motion, proposal.view, vote.signature)
                return
            logger.info("round %s: %s does not sign: %s", proposal.round, name, "; ".join(vote.reasons))
        except SmartnodesError as error:
            logger.info("round %s: no vote of %s: %s", proposal.round, name, error)
        except Exception:
            logger.exception("round %s: the vote of %s", proposal.round, name)
