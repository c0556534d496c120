"""The votes of one round, pure: who may propose in which view, which proposal leads, who signed twice.

View 0 has one proposer. After each timeout the view rises and more may propose, while whatever already has votes goes
first: a validator signs only the proposal with the most of them (ties: the lowest hash), or, where it cannot justify
that one, another. Votes are only ever added, so that all who have seen the same votes agree, and a vote held back
changes the order once. A proposal that has not found its quorum in PATIENCE_VIEWS is set aside: some validators justify
it and others cannot, and a later one that all can justify must not wait behind it. What a signature covers is in
`chain/proposal.py`; `rounds.py` says what is justified.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from smartnodes_core.chain.proposal import Domain, Equivocation, Place, RoundProposal
from smartnodes_core.chain.signing import keccak, recover, word
from smartnodes_core.errors import RecordError
from smartnodes_core.records import Proposal
from smartnodes_core.rounds import in_view, quorum

#: Validators that may propose in one view at most.
MAX_PROPOSERS = 8
#: Proposals of one round that are kept at most, of one proposer; views in which one validator's votes are kept.
MAX_PROPOSALS_OF_ONE = 4
MAX_VIEWS = 256
#: Views in which a proposal is voted on, from the one in which it was made.
PATIENCE_VIEWS = 4
#: Signatures beyond a quorum that carry a round: some of their makers may leave the epoch meanwhile.
SPARE_SIGNATURES = 5
#: Where a proposal's encoding holds the view: behind the offset of the struct, network and round.
_VIEW_AT = 96


class Ballot(NamedTuple):
    """One signature: of the content with this hash, in this view."""

    view: int
    content: bytes
    signature: bytes


@dataclass(frozen=True)
class Motion:
    """A proposal whatever its view: the same content proposed again is the same motion. `id` is its hash in view 0."""

    id: bytes
    proposal: Proposal
    content: RoundProposal

    @classmethod
    def of(cls, proposal: Proposal, content: RoundProposal) -> Motion:
        return cls(keccak(in_view(content, 0).encode()), proposal, content)

    @cached_property
    def encoded(self) -> bytes:
        """The content in view 0."""
        return in_view(self.content, 0).encode()

    def hash_in(self, view: int) -> bytes:
        """The hash of the content in a view. Cheap, as whoever votes chooses views: only its word of the encoding
        differs.
        """
        return keccak(self.encoded[:_VIEW_AT] + word(view) + self.encoded[_VIEW_AT + 32 :])


@dataclass
class _Votes:
    """Of one motion: the hash of its content in each view that was asked for, and the signatures by view."""

    motion: Motion
    hashes: dict[int, bytes] = field(default_factory=dict)

    def hash_in(self, view: int) -> bytes:
        if view not in self.hashes:
            self.hashes[view] = self.motion.hash_in(view)
        return self.hashes[view]


def proposers_in(order: Sequence[bytes], view: int) -> list[bytes]:
    """Who may propose in a view, the leader first: one in view 0, twice as many after each timeout, up to
    MAX_PROPOSERS. The leader moves along the draw.
    """
    width = min(1 << min(view, MAX_PROPOSERS.bit_length() - 1), len(order))
    return [order[(view + place) % len(order)] for place in range(width)]


def carrying(order: Sequence[bytes], signatures: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Of the signatures of a proposal, by account, those that are sent to carry it: each costs gas, so no more than a
    quorum and SPARE_SIGNATURES. They are taken in the order of the round's draw, so that chance decides anew in each
    round who is left out; what was left out can be endorsed.
    """
    found = [account for account in order if account in signatures][: quorum(len(order)) + SPARE_SIGNATURES]
    return {account: signatures[account] for account in sorted(found)}


class BallotBox:
    """The proposals and votes of the round after one previous hash. Not thread-safe.

    Keeps one signature of each validator for each view, and a proof of whoever gives two.
    """

    def __init__(self, domain: Domain, network_id: int, number: int, previous_hash: bytes):
        self.network_id, self.number, self.previous_hash = network_id, number, previous_hash
        self._domain = domain
        self._motions: dict[bytes, _Votes] = {}
        self._ballots: dict[bytes, dict[int, Ballot]] = {}  # by signer, then by view
        self.equivocators: dict[bytes, Equivocation] = {}

    @property
    def motions(self) -> list[Motion]:
        return [votes.motion for votes in self._motions.values()]

    def place(self, view: int) -> Place:
        return Place(self.network_id, self.number, view, self.previous_hash)

    def digest(self, view: int, content: bytes) -> bytes:
        """What is signed for the content with this hash."""
        return self._domain.digest_of(self.place(view), content)

    def hash_of(self, motion: Motion, view: int) -> bytes:
        """The hash of the motion's content in a view."""
        known = self._motions.get(motion.id)
        return known.hash_in(view) if known else motion.hash_in(view)

    def add_motion(self, proposal: Proposal, content: RoundProposal) -> Motion:
        """Keep a proposal; over MAX_PROPOSALS_OF_ONE, the one of its proposer with the fewest votes goes.

        Raises RecordError for one of another round.
        """
        found = (content.network_id, content.round, content.previous_hash)
        if found != (self.network_id, self.number, self.previous_hash):
            raise RecordError(
                f"round {content.round} after previous_hash {content.previous_hash.hex()[:16]}: "
                f"the next is round {self.number} after {self.previous_hash.hex()[:16]}"
            )
        motion = Motion.of(proposal, content)
        known = self._motions.get(motion.id)
        if known is not None:
            return known.motion
        kept = [each.motion for each in self._motions.values() if each.motion.proposal.proposer == proposal.proposer]
        if len(kept) >= MAX_PROPOSALS_OF_ONE:
            self.drop_motion(min(kept, key=lambda each: len(self.ballots_for(each))))
        self._motions[motion.id] = _Votes(motion)
        return motion

    def keep_shown(self, motion: Motion) -> None:
        """Keep a motion with the records that were found behind it, whatever others had named before: the votes are for
        the content, which binds them all but does not say which are verdicts.
        """
        if motion.id in self._motions:
            self._motions[motion.id].motion = motion

    def drop_motion(self, motion: Motion) -> None:
        """Forget a proposal; its votes stay."""
        self._motions.pop(motion.id, None)

    def add_ballot(self, ballot: Ballot, members: Collection[bytes]) -> tuple[bytes, Equivocation | None]:
        """Keep a signature; the signer, and a proof where it has signed another content in this view.

        Raises RecordError for a signer that is none of `members`, SignatureError for what is no signature.
        """
        signer = recover(self.digest(ballot.view, ballot.content), ballot.signature)
        if signer not in members:
            raise RecordError(f"a vote of 0x{signer.hex()}, which is no validator")
        known = self._ballots.setdefault(signer, {})
        before = known.get(ballot.view)
        if before is None and len(known) < MAX_VIEWS:
            known[ballot.view] = ballot
        if before is None or before.content == ballot.content:
            return signer, None
        proof = Equivocation(
            self.place(ballot.view), (before.content, ballot.content), (before.signature, ballot.signature)
        )
        self.equivocators.setdefault(signer, proof)
        return signer, proof

    def ballots_for(self, motion: Motion) -> dict[bytes, list[Ballot]]:
        """The signatures of a motion, in whatever view, by signer; those of equivocators are left out."""
        found: dict[bytes, list[Ballot]] = {}
        for signer, known in self._ballots.items():
            if signer in self.equivocators:
                continue
            mine = [ballot for view, ballot in known.items() if ballot.content == self.hash_of(motion, view)]
            if mine:
                found[signer] = mine
        return found

    def is_signed_by(self, motion: Motion, signer: bytes) -> bool:
        """Whether this validator has signed it, in whatever view."""
        kept = self._ballots.get(signer, {})
        return any(ballot.content == self.hash_of(motion, view) for view, ballot in kept.items())

    def made_in(self, motion: Motion, order: Sequence[bytes]) -> int | None:
        """The first view in which its proposer signed it and might propose; None where it never did."""
        proposer = motion.proposal.proposer
        views = [
            view
            for view, ballot in self._ballots.get(proposer, {}).items()
            if ballot.content == self.hash_of(motion, view) and proposer in proposers_in(order, view)
        ]
        return min(views, default=None)

    def is_open(self, motion: Motion, order: Sequence[bytes], view: int) -> bool:
        """Whether it is voted on in a view: made by then (or in the next one: clocks differ), and not too long ago."""
        made_in = self.made_in(motion, order)
        return made_in is not None and view - PATIENCE_VIEWS < made_in <= view + 1

    def ranking(self, live: Collection[bytes]) -> list[Motion]:
        """Motions with at least one vote of `live` validators, those with most votes first, ties by the lowest id."""
        counted = [(len(set(live) & self.ballots_for(motion).keys()), motion) for motion in self.motions]
        ranked = sorted(counted, key=lambda pair: (-pair[0], pair[1].id))
        return [motion for votes, motion in ranked if votes]

    def carried(self, live: Collection[bytes], needed: int) -> tuple[Motion, int, dict[bytes, bytes]] | None:
        """A motion that `needed` live validators signed in one view, that view, and their signatures."""
        for motion in self.ranking(live):
            by_view: dict[int, dict[bytes, bytes]] = {}
            for signer, ballots in self.ballots_for(motion).items():
                for ballot in ballots:
                    if signer in live:
                        by_view.setdefault(ballot.view, {})[signer] = ballot.signature
            for view, signatures in sorted(by_view.items()):
                if len(signatures) >= needed:
                    return motion, view, signatures
        return None

    def signatures(self, motion: Motion, view: int) -> dict[bytes, bytes]:
        """By signer, of a motion in one view."""
        return self.signatures_over(view, self.hash_of(motion, view))

    def signatures_over(self, view: int, content: bytes) -> dict[bytes, bytes]:
        """By signer, of the content with this hash in one view; those of equivocators are left out."""
        found = {signer: known[view] for signer, known in self._ballots.items() if view in known}
        return {
            signer: ballot.signature
            for signer, ballot in found.items()
            if ballot.content == content and signer not in self.equivocators
        }
