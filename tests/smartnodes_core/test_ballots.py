"""The votes of one round: who may propose, which proposal leads, who signed twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.ballots import (
    MAX_PROPOSALS_OF_ONE,
    MAX_PROPOSERS,
    SPARE_SIGNATURES,
    Ballot,
    BallotBox,
    Motion,
    carrying,
    proposers_in,
)
from smartnodes_core.chain.proposal import Domain, Equivocation, RoundProposal
from smartnodes_core.chain.signing import address_of, keccak, sign_digest
from smartnodes_core.errors import RecordError, SignatureError
from smartnodes_core.records import Proposal
from smartnodes_core.rounds import draw_proposers, in_view, quorum

KEYS = {address_of(bytes([number] * 32)): bytes([number] * 32) for number in range(1, 8)}
VALIDATORS = sorted(KEYS)
DOMAIN, PREVIOUS = Domain(31337, b"r" * 20), b"p" * 32


def content(until_s: int, view: int = 0) -> RoundProposal:
    return RoundProposal(1, 5, view, PREVIOUS, until_s)


def record(of: RoundProposal, proposer: bytes = VALIDATORS[0]) -> Proposal:
    return Proposal(
        network_id=1,
        round=of.round,
        view=of.view,
        previous=of.previous_hash,
        proposer=proposer,
        content=of.encode(),
        verdicts=[],
        settled=[],
    )


@pytest.fixture
def box() -> BallotBox:
    return BallotBox(DOMAIN, 1, 5, PREVIOUS)


def vote(box: BallotBox, motion: Motion, view: int, *signers: bytes) -> list[Equivocation]:
    """These validators sign a motion in a view; the proofs that come of it."""
    digest = DOMAIN.digest(in_view(motion.content, view))
    proofs = []
    for signer in signers:
        ballot = Ballot(view, box.hash_of(motion, view), sign_digest(KEYS[signer], digest))
        found, proof = box.add_ballot(ballot, KEYS)
        assert found == signer
        proofs += [proof] if proof else []
    return proofs


@given(st.integers(1, 60), st.integers(0, 200))
def test_each_view_lets_the_next_in_the_draw_lead_and_more_propose(num_validators: int, view: int) -> None:
    order = [bytes([number]) for number in range(num_validators)]
    found = proposers_in(order, view)
    assert found[0] == order[view % num_validators]
    assert len(set(found)) == len(found) == min(2**view, MAX_PROPOSERS, num_validators)
    leaders = [proposers_in(order, each)[0] for each in range(num_validators)]
    assert leaders == order  # a silent one leads once in as many views as there are validators


def test_the_proposal_with_most_votes_leads_whatever_view_they_were_given_in(box: BallotBox) -> None:
    first, second = (box.add_motion(record(content(until)), content(until)) for until in (100, 200))
    vote(box, first, 0, *VALIDATORS[:3])
    vote(box, second, 0, *VALIDATORS[3:7])
    assert [motion.id for motion in box.ranking(VALIDATORS)] == [second.id, first.id]
    vote(box, first, 1, *VALIDATORS[3:5])
    assert [motion.id for motion in box.ranking(VALIDATORS)] == [first.id, second.id]
    assert box.add_motion(record(content(100, 3)), content(100, 3)).id == first.id


def test_the_hash_in_a_view_is_that_of_the_content_in_it() -> None:
    changed = replace(content(100), reputations=bytes(39), jobs_created=(bytes(32),))
    motion = Motion.of(record(changed), changed)
    for view in (0, 1, 77, (1 << 32) - 1):
        assert motion.hash_in(view) == keccak(in_view(changed, view).encode())


def test_of_as_many_votes_the_lowest_hash_leads(box: BallotBox) -> None:
    motions = [box.add_motion(record(content(until)), content(until)) for until in (100, 200)]
    vote(box, motions[0], 0, *VALIDATORS[:3])
    vote(box, motions[1], 0, *VALIDATORS[3:6])
    assert box.ranking(VALIDATORS)[0].id == min(motion.id for motion in motions)


def test_votes_of_those_who_left_the_epoch_do_not_count(box: BallotBox) -> None:
    motion = box.add_motion(record(content(100)), content(100))
    vote(box, motion, 0, *VALIDATORS[:5])
    assert box.carried(VALIDATORS, 5) is not None
    assert box.carried(VALIDATORS[1:], 5) is None
    assert box.ranking(VALIDATORS[5:]) == []


def test_a_quorum_is_of_one_view(box: BallotBox) -> None:
    motion = box.add_motion(record(content(100)), content(100))
    vote(box, motion, 0, *VALIDATORS[:3])
    vote(box, motion, 1, *VALIDATORS[2:6])
    needed = quorum(len(VALIDATORS))
    assert box.carried(VALIDATORS, needed) is None
    vote(box, motion, 1, VALIDATORS[0])
    found = box.carried(VALIDATORS, needed)
    assert found is not None
    assert (found[0].id, found[1], len(found[2])) == (motion.id, 1, needed)


@given(st.data())
def test_split_votes_are_one_view_from_unity(data: st.DataObject) -> None:
    """However views 0 to k were split: once all have seen the same votes, all sign the same, and it has its quorum."""
    box = BallotBox(DOMAIN, 1, 5, PREVIOUS)
    motions = [
        box.add_motion(record(content(until), VALIDATORS[until]), content(until))
        for until in range(data.draw(st.integers(1, 4)))
    ]
    for view in range(data.draw(st.integers(1, 2))):
        for validator in VALIDATORS:
            vote(box, data.draw(st.sampled_from(motions)), view, validator)
    leading = box.ranking(VALIDATORS)[0]
    vote(box, leading, 7, *VALIDATORS[:5])
    assert box.carried(VALIDATORS, 5) is not None
    assert box.ranking(VALIDATORS)[0].id == leading.id


def test_who_signs_two_contents_in_one_view_is_proven_and_counts_no_more(box: BallotBox) -> None:
    first, second = (box.add_motion(record(content(until)), content(until)) for until in (100, 200))
    assert vote(box, first, 0, *VALIDATORS[:2]) == []
    assert vote(box, first, 0, VALIDATORS[0]) == []  # the same again
    assert vote(box, second, 1, VALIDATORS[0]) == []  # another view
    (proof,) = vote(box, second, 0, VALIDATORS[0])
    assert DOMAIN.equivocator(proof) == VALIDATORS[0]
    assert set(box.equivocators) == {VALIDATORS[0]}
    assert set(box.ballots_for(first)) == {VALIDATORS[1]}
    assert Equivocation.decode(proof.encode()) == proof
    with pytest.raises(RecordError, match="242 bytes"):
        Equivocation.decode(proof.encode()[:-1])


def test_two_signatures_of_one_content_or_of_two_signers_prove_nothing(box: BallotBox) -> None:
    first, second = (box.add_motion(record(content(until)), content(until)) for until in (100, 200))
    vote(box, first, 0, VALIDATORS[0])
    (proof,) = vote(box, second, 0, VALIDATORS[0])
    same = replace(proof, contents=(proof.contents[0],) * 2, signatures=(proof.signatures[0],) * 2)
    other = sign_digest(KEYS[VALIDATORS[1]], DOMAIN.digest_of(proof.place, proof.contents[1]))
    for nothing in (same, replace(proof, signatures=(proof.signatures[0], other))):
        with pytest.raises(RecordError, match="no equivocation"):
            DOMAIN.equivocator(nothing)


def test_a_proposal_counts_that_its_proposer_signed_where_it_might_propose(box: BallotBox) -> None:
    motion = box.add_motion(record(content(100), VALIDATORS[1]), content(100))
    vote(box, motion, 0, VALIDATORS[1], VALIDATORS[0])
    assert box.made_in(motion, VALIDATORS) is None  # view 0 is the first one's
    vote(box, motion, 2, VALIDATORS[1])
    assert box.made_in(motion, VALIDATORS) is None  # and view 2 that of the third and the three behind it
    vote(box, motion, 1, VALIDATORS[1])
    assert box.made_in(motion, VALIDATORS) == 1
    assert box.is_open(motion, VALIDATORS, 0)  # whose clock is a little behind
    assert [box.is_open(motion, VALIDATORS, view) for view in (4, 5)] == [True, False]
    vote(box, motion, 9, *VALIDATORS)
    assert not box.is_open(motion, VALIDATORS, 9)


def test_strangers_and_bad_signatures_are_no_votes(box: BallotBox) -> None:
    motion = box.add_motion(record(content(100)), content(100))
    hashed = box.hash_of(motion, 0)
    with pytest.raises(RecordError, match="no validator"):
        box.add_ballot(Ballot(0, hashed, sign_digest(bytes([9] * 32), box.digest(0, hashed))), KEYS)
    with pytest.raises(SignatureError):
        box.add_ballot(Ballot(0, hashed, bytes(65)), KEYS)
    assert box.ranking(VALIDATORS) == []


def test_a_box_takes_proposals_of_its_round_and_few_of_each_proposer(box: BallotBox) -> None:
    for wrong in (replace(content(1), round=6), replace(content(1), previous_hash=bytes(32))):
        with pytest.raises(RecordError, match="the next is round 5"):
            box.add_motion(record(wrong), wrong)
    kept = box.add_motion(record(content(1)), content(1))
    vote(box, kept, 0, *VALIDATORS[:3])
    for until in range(2, 20):
        box.add_motion(record(content(until)), content(until))
    assert len(box.motions) == MAX_PROPOSALS_OF_ONE
    assert kept in box.motions  # those with the fewest votes go


@given(st.integers(1, 60), st.data())
def test_no_more_signatures_are_sent_than_a_quorum_and_a_few_and_no_quorum_is_lost(n: int, data: st.DataObject) -> None:
    order = draw_proposers([bytes([number] * 20) for number in range(n)], 1)
    signed = data.draw(st.sets(st.sampled_from(order)))
    signatures = {account: account * 3 for account in signed}
    sent = carrying(order, signatures)
    assert len(sent) == min(len(signed), quorum(n) + SPARE_SIGNATURES)
    assert list(sent) == sorted(sent)
    assert all(signatures[account] == signature for account, signature in sent.items())


def test_chance_decides_in_each_round_who_is_left_out() -> None:
    validators, rounds = [bytes([number] * 20) for number in range(50)], 400
    left_out = dict.fromkeys(validators, 0)
    for number in range(rounds):
        sent = carrying(draw_proposers(validators, number), dict.fromkeys(validators, b"s"))
        for account in set(validators) - sent.keys():
            left_out[account] += 1
    share = 1 - (quorum(50) + SPARE_SIGNATURES) / 50
    assert all(0.6 * share < times / rounds < 1.4 * share for times in left_out.values())


def test_signatures_over_a_content_are_those_of_its_view_without_equivocators(box: BallotBox) -> None:
    motion = box.add_motion(record(content(1)), content(1))
    rival = box.add_motion(record(content(2), VALIDATORS[1]), content(2))
    vote(box, motion, 0, *VALIDATORS[:4])
    vote(box, motion, 1, VALIDATORS[4])
    vote(box, rival, 0, VALIDATORS[3], VALIDATORS[5])
    assert set(box.signatures_over(0, keccak(content(1).encode()))) == set(VALIDATORS[:3])
    assert set(box.signatures_over(1, box.hash_of(motion, 1))) == {VALIDATORS[4]}
