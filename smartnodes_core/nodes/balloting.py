"""A validator's ballot boxes: every vote is passed on to all validators, and whoever missed some asks for them.

So any validator can tell which proposal leads, execute one that has its quorum although its proposer has vanished, and
see who signs twice. The rules are pure and live in `smartnodes_core/ballots.py`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from smartnodes_core.ballots import Ballot, BallotBox, Motion
from smartnodes_core.chain.base import RoundState
from smartnodes_core.chain.proposal import Domain, Equivocation, RoundProposal
from smartnodes_core.chain.signing import SIGNATURE_BYTES, keccak
from smartnodes_core.errors import ProtocolError, RecordError, SmartnodesError
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in, count_in, digest_in
from smartnodes_core.records import NodeKey, Proposal
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Rounds whose votes are kept: a second signature may come to light late.
MAX_BOXES = 8
#: Votes of one validator that came before this node knew of their round.
MAX_EARLY = 32
#: Votes that come with one proposal, and views that they may be of: each view costs an encoding.
MAX_BALLOTS, MAX_BALLOT_VIEWS = 512, 16
MAX_VIEW = (1 << 32) - 1
#: What one validator tells another of a round at most.
MAX_SYNC_BYTES, MAX_SYNC_MOTIONS = 8 << 20, 8
SYNC_TIMEOUT_S = 5.0
_VIEW_BYTES = 4

_pages = msgspec.msgpack.Decoder(list[tuple[bytes, list[bytes]]])


class _Early(NamedTuple):
    number: int
    previous_hash: bytes
    ballot: Ballot


class BallotDesk:
    """See the module. `members` are the accounts of all validators, `others` the node keys of the other live ones,
    `on_proof` is told of whoever signed twice. Thread-safe: `lock` guards the boxes.
    """

    def __init__(
        self,
        node: Node,
        domain: Domain,
        network_id: int,
        members: Callable[[], Collection[bytes]],
        others: Callable[[], list[NodeKey]],
        on_proof: Callable[[Equivocation], None],
    ):
        self.lock = threading.RLock()
        self._node, self._domain, self._network_id = node, domain, network_id
        self._members, self._others, self._on_proof = members, others, on_proof
        self._boxes: dict[tuple[int, bytes], BallotBox] = {}
        self._early: dict[NodeKey, deque[_Early]] = {}
        self._mailer = Mailer(node, "ballots")
        node.serve(self)

    def stop(self) -> None:
        self._mailer.stop()

    def box(self, state: RoundState) -> BallotBox:
        """The box of the round that is next in `state`."""
        number, previous_hash = state.number + 1, state.previous_hash
        with self.lock:
            box = self._boxes.get((number, previous_hash))
            if box is not None:
                return box
            box = BallotBox(self._domain, self._network_id, number, previous_hash)
            self._boxes[(number, previous_hash)] = box
            for place in list(self._boxes)[: max(0, len(self._boxes) - MAX_BOXES)]:
                del self._boxes[place]
            held = [each for of_one in self._early.values() for each in of_one]
            early = [each for each in held if (each.number, each.previous_hash) == (number, previous_hash)]
        self.add(box, [each.ballot for each in early])
        return box

    def add(self, box: BallotBox, ballots: Iterable[Ballot]) -> None:
        """Keep votes; those that are none are left out, and of two by one signer a proof is made."""
        members = self._members()
        for ballot in ballots:
            try:
                with self.lock:
                    signer, proof = box.add_ballot(ballot, members)
            except SmartnodesError as error:
                logger.info("round %d: not a vote: %s", box.number, error)
                continue
            if proof is not None:
                logger.warning("0x%s signed twice in round %d, view %d", signer.hex(), box.number, ballot.view)
                self._on_proof(proof)

    def take(
        self, box: BallotBox, proposal: Proposal, content: RoundProposal, signed: Sequence[bytes]
    ) -> tuple[Motion, list[Ballot]]:
        """Keep a proposal with the votes that came with it. Raises RecordError, ProtocolError."""
        with self.lock:
            motion = box.add_motion(proposal, content)
            ballots = self._unpack(box, motion, signed)
        self.add(box, ballots)
        return motion, ballots

    def cast(self, box: BallotBox, motion: Motion, view: int, signature: bytes) -> None:
        """This validator signed a motion: keep the vote, and tell the others. It is durable already (`Signer`)."""
        self.add_signature(box, motion, view, signature)
        with self.lock:
            content = box.hash_of(motion, view)
        place = {"round": box.number, "previous": box.previous_hash, "view": view}
        self._mailer.post(self._others(), "ballot", {**place, "content": content, "signature": signature})

    def add_signature(self, box: BallotBox, motion: Motion, view: int, signature: bytes) -> None:
        """Somebody answered with a signature of a motion in a view."""
        with self.lock:
            ballot = Ballot(view, box.hash_of(motion, view), signature)
        self.add(box, [ballot])

    def signatures_of(self, content: RoundProposal) -> dict[bytes, bytes]:
        """By signer, of a proposal in its view, as far as the votes of its round are still kept."""
        with self.lock:
            box = self._boxes.get((content.round, content.previous_hash))
            return box.signatures_over(content.view, keccak(content.encode())) if box is not None else {}

    def packed(self, box: BallotBox, motion: Motion) -> list[bytes]:
        """One vote of each signer of a motion, the proposer's first, as they go with it."""
        with self.lock:
            found = box.ballots_for(motion)
        first = found.pop(motion.proposal.proposer, [])[:1]
        views: set[int] = {ballot.view for ballot in first}
        for ballots in found.values():
            seen = next((ballot for ballot in ballots if ballot.view in views), ballots[-1])
            if len(first) < MAX_BALLOTS and (seen.view in views or len(views) < MAX_BALLOT_VIEWS):
                first.append(seen)
                views.add(seen.view)
        return [ballot.view.to_bytes(_VIEW_BYTES, "big") + ballot.signature for ballot in first]

    def _unpack(self, box: BallotBox, motion: Motion, signed: Sequence[bytes]) -> list[Ballot]:
        if len(signed) > MAX_BALLOTS or any(len(each) != _VIEW_BYTES + SIGNATURE_BYTES for each in signed):
            raise ProtocolError(f"votes are at most {MAX_BALLOTS} of {_VIEW_BYTES + SIGNATURE_BYTES} bytes each")
        views = {int.from_bytes(each[:_VIEW_BYTES], "big") for each in signed}
        if len(views) > MAX_BALLOT_VIEWS:
            raise ProtocolError(f"votes of {len(views)} views: at most {MAX_BALLOT_VIEWS} go with a proposal")
        hashes = {view: box.hash_of(motion, view) for view in views}
        split = [(int.from_bytes(each[:_VIEW_BYTES], "big"), each[_VIEW_BYTES:]) for each in signed]
        return [Ballot(view, hashes[view], signature) for view, signature in split]

    # -- among validators ---------------------------------------------------------------------------------------------

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_ballot(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Somebody signed a proposal."""
        number, previous_hash = count_in(params, "round", (1 << 62) - 1), digest_in(params, "previous")
        ballot = Ballot(
            count_in(params, "view", MAX_VIEW), digest_in(params, "content"), bytes_in(params, "signature", 65)
        )
        with self.lock:
            box = self._boxes.get((number, previous_hash))
            if box is None:
                of_one = self._early.setdefault(caller.node_key, deque(maxlen=MAX_EARLY))
                of_one.append(_Early(number, previous_hash, ballot))
                return
        self.add(box, [ballot])

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_ballots(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The proposals of a round that lead here, with their votes."""
        place = count_in(params, "round", (1 << 62) - 1), digest_in(params, "previous")
        members = frozenset(self._members())
        page: list[tuple[bytes, list[bytes]]] = []
        with self.lock:
            box = self._boxes.get(place)
            motions = box.ranking(members)[:MAX_SYNC_MOTIONS] if box else []
        num_bytes = 0
        for motion in motions:
            assert box is not None
            entry = (motion.proposal.encode(), self.packed(box, motion))
            num_bytes += len(entry[0]) + sum(len(each) + 5 for each in entry[1]) + 16
            if num_bytes > MAX_SYNC_BYTES:
                break
            page.append(entry)
        return {}, [msgspec.msgpack.encode(page)]

    def fetch(self, box: BallotBox, validator: NodeKey) -> None:
        """Take over what another validator knows of a round. Raises what the call raises."""
        reply = self._node.call(
            validator,
            "ballots",
            {"round": box.number, "previous": box.previous_hash},
            timeout_s=SYNC_TIMEOUT_S,
            max_body_bytes=MAX_SYNC_BYTES,
        )
        try:
            page = _pages.decode(reply.body)
        except msgspec.DecodeError as error:
            raise RecordError(f"not a page of proposals and votes: {error}") from None
        for encoded, signed in page[:MAX_SYNC_MOTIONS]:
            proposal = Proposal.decode(encoded)
            motion, _ = self.take(box, proposal, RoundProposal.decode(proposal.content), signed)
            with self.lock:
                if not box.is_signed_by(motion, proposal.proposer):
                    box.drop_motion(motion)
