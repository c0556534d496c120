from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.chain.packing import pack_reputations, unpack_reputations
from smartnodes_core.chain.proposal import CORRECT, NO_RULING, UNCAPPED, UPHOLD, Admission, Parameters, Payment
from smartnodes_core.errors import RecordError
from smartnodes_core.payments import Price
from smartnodes_core.reputation import VerdictCounts
from smartnodes_core.rounds import (
    COMPLETE_VIEWS,
    Correction,
    Domain,
    JobWork,
    RoundContext,
    RoundEvidence,
    RoundProposal,
    Settlement,
    Slash,
    Standing,
    allot,
    draw_proposers,
    evidence_root,
    in_view,
    justify,
    left_out,
    propose,
    quorum,
    undecided,
)

SNO = 10**18
WORKERS = [bytes([i] * 20) for i in range(1, 5)]
VALIDATORS = [bytes([100 + i] * 20) for i in range(4)]
CONTEXT = RoundContext(
    domain=Domain(31337, b"r" * 20),
    network_id=1,
    round=5,
    view=0,
    previous_hash=b"p" * 32,
    until_s=1000,
    parameters=Parameters(500, UNCAPPED),
    emission_wei=1000 * SNO,
    num_validators=4,
    signers=tuple(VALIDATORS[:3]),
    standings={account: Standing(i, 10, 100) for i, account in enumerate(WORKERS)},
    totals_wei={WORKERS[0]: 7},
)
EVIDENCE = RoundEvidence(
    verdicts={WORKERS[0]: VerdictCounts(honest=2), WORKERS[1]: VerdictCounts(honest=3, fraudulent=1)},
    work=(JobWork(b"j" * 32, {WORKERS[0]: 10, WORKERS[1]: 99, WORKERS[2]: 30, b"s" * 20: 5}),),
    jobs_created=(b"j" * 32,),
    digests=(b"a" * 32, b"b" * 32),
)


@given(st.integers(1, 10_000))
def test_a_quorum_is_more_than_two_thirds_and_no_more_than_needed(n: int) -> None:
    assert 3 * quorum(n) > 2 * n
    assert 3 * (quorum(n) - 1) <= 2 * n
    assert quorum(n) <= n


@given(st.integers(1, 10_000))
def test_two_quorums_share_more_than_a_third(n: int) -> None:
    assert 3 * (2 * quorum(n) - n) > n


work = st.dictionaries(st.binary(min_size=20, max_size=20), st.integers(0, 10**18), max_size=30)
accounts = st.lists(st.binary(min_size=20, max_size=20), max_size=10)


@given(work, accounts, st.integers(0, 10**25), st.none() | st.integers(0, 10**25))
def test_no_more_is_allotted_than_is_emitted(
    work_units: dict[bytes, int], signers: list[bytes], emission_wei: int, cap_wei: int | None
) -> None:
    rewards = allot([(work_units, cap_wei)], signers, emission_wei)
    assert sum(rewards.values()) <= emission_wei
    assert all(wei > 0 for wei in rewards.values())
    if cap_wei is not None:
        assert sum(allot([(work_units, cap_wei)], [], emission_wei).values()) <= cap_wei


@given(work, st.integers(1, 10**25))
def test_equal_work_earns_equal_pay(work_units: dict[bytes, int], emission_wei: int) -> None:
    rewards = allot([(work_units, None)], [], emission_wei)
    paid: dict[int, set[int]] = {}
    for account, units in work_units.items():
        paid.setdefault(units, set()).add(rewards.get(account, 0))
    assert all(len(amounts) == 1 for amounts in paid.values())


@given(st.integers(2, 10**6), st.integers(1, 10**25), st.data())
def test_splitting_an_identity_gains_nothing(units: int, emission_wei: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(1, units - 1))
    whole = allot([({b"w" * 20: units, b"o" * 20: 1000}, None)], [], emission_wei)
    split = allot([({b"w" * 20: part, b"x" * 20: units - part, b"o" * 20: 1000}, None)], [], emission_wei)
    assert split.get(b"w" * 20, 0) + split.get(b"x" * 20, 0) <= whole.get(b"w" * 20, 0)


def test_workers_share_85_percent_by_work_and_signers_15_in_equal_parts() -> None:
    rewards = allot([({WORKERS[0]: 1, WORKERS[1]: 3}, None)], VALIDATORS[:3], 1000)
    assert rewards == {WORKERS[0]: 212, WORKERS[1]: 637, **dict.fromkeys(VALIDATORS[:3], 50)}
    assert allot([], VALIDATORS[:1], 1000) == {VALIDATORS[0]: 150}
    assert allot([({WORKERS[0]: 5}, 10)], [], 1000) == {WORKERS[0]: 10}


def test_proposers_are_drawn_anew_each_round_and_everybody_draws_the_same() -> None:
    order = draw_proposers(VALIDATORS, 7)
    assert sorted(order) == sorted(VALIDATORS)
    assert order == draw_proposers(reversed(VALIDATORS), 7)
    firsts = [draw_proposers(VALIDATORS, number)[0] for number in range(400)]
    assert all(firsts.count(validator) > 60 for validator in VALIDATORS)
    without_one = [draw_proposers(VALIDATORS[1:], number)[0] for number in range(400)]
    assert firsts != without_one


def test_a_proposal_scores_slashes_and_pays_by_the_evidence() -> None:
    proposal, totals = propose(CONTEXT, EVIDENCE)
    scores = unpack_reputations(proposal.reputations)
    assert set(scores) == {0, 1}
    assert scores[0] > 10
    assert scores[1] == 0
    assert proposal.slashes == (Slash(1, 100),)
    assert WORKERS[1] not in totals
    assert b"s" * 20 not in totals
    assert totals[WORKERS[2]] == 850 * SNO * 30 // 40
    assert totals[WORKERS[0]] == 7 + 850 * SNO * 10 // 40
    assert proposal.allotment_wei == sum(totals.values()) - 7
    assert proposal.evidence_root == evidence_root([b"b" * 32, b"a" * 32])


def test_who_withheld_a_draw_shares_in_no_pay_of_the_round() -> None:
    withheld = replace(EVIDENCE, verdicts={VALIDATORS[0]: VerdictCounts(withheld=1)})
    _, totals = propose(CONTEXT, withheld)
    assert VALIDATORS[0] not in totals
    assert totals[VALIDATORS[1]] == totals[VALIDATORS[2]] == 75 * SNO
    everybody = dict.fromkeys(CONTEXT.signers, VerdictCounts(withheld=1))
    assert propose(CONTEXT, replace(EVIDENCE, verdicts=everybody))[1][VALIDATORS[0]] == 50 * SNO


def test_the_third_silence_takes_reputation_and_pay_but_no_stake() -> None:
    for strikes, earns in ((2, True), (3, False)):
        silent = {WORKERS[0]: VerdictCounts(silent=1, strikes=strikes)}
        proposal, totals = propose(CONTEXT, replace(EVIDENCE, verdicts=silent))
        assert (totals.get(WORKERS[0], 0) > 7) == earns
        assert unpack_reputations(proposal.reputations) == ({} if earns else {0: 0})
        assert proposal.slashes == ()


def test_a_network_scores_by_its_own_rule() -> None:
    context = replace(
        CONTEXT, reputation_rule=lambda reputation, counts: reputation + counts.honest - counts.fraudulent
    )
    proposal, _ = propose(context, EVIDENCE)
    assert unpack_reputations(proposal.reputations) == {0: 12, 1: 12}


def test_few_validators_lower_reputation_only() -> None:
    proposal, _ = propose(replace(CONTEXT, num_validators=2), EVIDENCE)
    assert proposal.slashes == ()
    assert unpack_reputations(proposal.reputations)[1] == 0


def test_the_order_of_evidence_does_not_matter() -> None:
    shuffled = RoundEvidence(
        verdicts=dict(reversed(EVIDENCE.verdicts.items())),
        work=tuple(replace(job, units=dict(reversed(job.units.items()))) for job in EVIDENCE.work),
        jobs_created=EVIDENCE.jobs_created,
        digests=tuple(reversed(EVIDENCE.digests)),
    )
    assert propose(CONTEXT, shuffled) == propose(CONTEXT, EVIDENCE)


def test_what_was_recomputed_is_justified() -> None:
    proposal, _ = propose(CONTEXT, EVIDENCE)
    assert justify(proposal, propose(CONTEXT, EVIDENCE)[0]) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"allotment_wei": 1}, "allotment_wei: proposed 1, recomputed"),
        ({"reputations": pack_reputations({2: 255})}, "member 2 proposed 255, recomputed unchanged"),
        ({"reputations": b"\x00"}, "a multiple of 39"),
        ({"slashes": ()}, "is missing"),
        ({"slashes": (Slash(1, 100), Slash(1, 100))}, "order or repetition"),
        ({"jobs_created": (b"x" * 32,)}, "is not justified"),
        ({"settlements": (Settlement(b"e" * 32, 0, (Payment(b"t" * 20, 9),)),)}, "is not justified"),
        ({"rewards_root": b"x" * 32}, "rewards_root: proposed 7878"),
        ({"previous_hash": b"x" * 32}, "previous_hash"),
    ],
)
def test_every_item_that_cannot_be_justified_is_named(changes: dict[str, object], reason: str) -> None:
    proposal, _ = propose(CONTEXT, EVIDENCE)
    reasons = justify(replace(proposal, **changes), proposal)  # type: ignore[arg-type]
    assert reasons is not None
    assert any(reason in item for item in reasons), reasons


def test_no_field_escapes_the_digest() -> None:
    proposal, _ = propose(CONTEXT, EVIDENCE)
    seen = {CONTEXT.domain.digest(proposal)}
    for item in fields(RoundProposal):
        value = getattr(proposal, item.name)
        other = value + 1 if isinstance(value, int) else (b"z" * 32 if len(value) == 32 else type(value)())
        other = {
            "jobs_completed": (b"z" * 32,),
            "jobs_disputed": (b"z" * 32,),
            "admissions": (Admission(1),),
            "settlements": (Settlement(b"e" * 32, 2, ()),),
            "parameters": (Parameters(1, 2),),
        }.get(item.name, other)
        seen.add(CONTEXT.domain.digest(replace(proposal, **{item.name: other})))
    assert len(seen) == 1 + len(fields(RoundProposal))
    assert CONTEXT.domain.digest(in_view(proposal, 3)) != CONTEXT.domain.digest(proposal)


@given(st.binary(max_size=900))
def test_hostile_bytes_are_no_proposal(data: bytes) -> None:
    with pytest.raises(RecordError):
        RoundProposal.decode(data)


def test_a_proposal_with_bytes_behind_it_is_refused() -> None:
    proposal, _ = propose(CONTEXT, EVIDENCE)
    assert RoundProposal.decode(proposal.encode()) == proposal
    with pytest.raises(RecordError, match="canonical"):
        RoundProposal.decode(proposal.encode() + bytes(32))


def test_a_frozen_root_is_upheld_by_those_who_signed_it() -> None:
    proposal, _ = propose(replace(CONTEXT, frozen_from=4), EVIDENCE)
    assert (proposal.ruling, proposal.ruled_round) == (UPHOLD, 4)


def paid_job(name: bytes, units: dict[bytes, int], **changes: object) -> JobWork:
    """A job that pays 1 SNO for each unit of work, out of a full escrow."""
    fields = {"price": Price(SNO, 1), "escrow_id": name * 32, "available_wei": 10**6 * SNO, **changes}
    return JobWork(name * 32, units, **fields)  # type: ignore[arg-type]


CAPPED = replace(CONTEXT, parameters=Parameters(500, 10_000), totals_wei={})


def test_a_root_found_wrong_is_corrected_and_what_it_allotted_is_allotted_anew() -> None:
    before, earned = {WORKERS[0]: 7}, {WORKERS[0]: 30, WORKERS[2]: 10}
    wrong = {WORKERS[3]: 10**30}
    for released_wei, corrected in ((100, {WORKERS[0]: 37, WORKERS[2]: 10}), (20, {WORKERS[0]: 22, WORKERS[2]: 5})):
        correction = Correction(before, earned, released_wei)
        assert correction.totals_wei == corrected
        assert correction.allotment_wei == min(40, released_wei)
        context = replace(CONTEXT, frozen_from=4, correction=correction, totals_wei=wrong)
        proposal, totals = propose(context, replace(EVIDENCE, work=(), verdicts={}))
        assert (proposal.ruling, proposal.ruled_round) == (CORRECT, 4)
        assert {account: wei for account, wei in totals.items() if account in WORKERS} == corrected
        signers_wei = sum(totals.values()) - sum(corrected.values())
        assert proposal.allotment_wei == signers_wei + correction.allotment_wei
        thawed, totals = propose(replace(context, frozen_from=0), replace(EVIDENCE, work=(), verdicts={}))
        assert thawed.ruling == NO_RULING
        assert totals[WORKERS[3]] == 10**30


def test_workers_share_no_more_than_what_their_own_job_burned() -> None:
    work = (
        paid_job(b"a", {WORKERS[0]: 100}),
        paid_job(b"b", {WORKERS[2]: 40}),
        JobWork(b"f" * 32, {WORKERS[3]: 10**6}),
    )
    proposal, totals = propose(CAPPED, replace(EVIDENCE, work=work, verdicts={}))
    assert {account: totals.get(account, 0) for account in WORKERS} == {
        WORKERS[0]: 5 * SNO,  # 5 % of 100 SNO were burned
        WORKERS[1]: 0,
        WORKERS[2]: 2 * SNO,
        WORKERS[3]: 0,  # free work, however much of it, earns nothing and takes nothing
    }
    assert [settlement.escrow_id for settlement in proposal.settlements] == [b"a" * 32, b"b" * 32]
    assert sum(totals.values()) == proposal.allotment_wei


def test_a_coin_job_earns_no_emission_and_its_fee_goes_to_the_signers() -> None:
    work = (paid_job(b"c", {WORKERS[0]: 100, VALIDATORS[0]: 0}, in_coin=True),)
    proposal, totals = propose(replace(CAPPED, parameters=Parameters(300, UNCAPPED)), replace(EVIDENCE, work=work))
    assert WORKERS[0] not in totals
    (settlement,) = proposal.settlements
    assert settlement.payments == (
        Payment(WORKERS[0], 100 * SNO),
        *(Payment(account, SNO) for account in VALIDATORS[:3]),
    )


def test_a_fraud_is_not_paid_from_the_escrow_either() -> None:
    work = (paid_job(b"a", {WORKERS[0]: 1, WORKERS[1]: 1}),)  # the second one's verdict is fraudulent
    proposal, _ = propose(CONTEXT, replace(EVIDENCE, work=work))
    assert proposal.settlements[0].payments == (Payment(WORKERS[0], SNO),)


def test_parameters_are_proposed_where_they_differ_from_those_in_force() -> None:
    wanted = Parameters(100, 20_000)
    assert propose(CONTEXT, replace(EVIDENCE, parameters=wanted))[0].parameters == (wanted,)
    assert propose(CONTEXT, replace(EVIDENCE, parameters=CONTEXT.parameters))[0].parameters == ()


INTERVAL_S = 600.0
known = st.dictionaries(st.binary(min_size=1, max_size=2), st.floats(0, 10_000), max_size=30)
now = st.floats(0, 12_000)


@given(known, now, st.integers(0, 10))
def test_a_proposer_that_knows_what_others_knew_an_interval_ago_is_never_refused(
    since_s: dict[bytes, float], now_s: float, view: int
) -> None:
    named = {record for record, from_s in since_s.items() if from_s <= now_s - INTERVAL_S}
    assert left_out(since_s, named, now_s, INTERVAL_S, view) == []


@given(known, now, st.data())
def test_nothing_that_could_be_settled_an_interval_ago_is_passed_over(
    since_s: dict[bytes, float], now_s: float, data: st.DataObject
) -> None:
    named = data.draw(st.sets(st.sampled_from(sorted(since_s)))) if since_s else set()
    missing = left_out(since_s, named, now_s, INTERVAL_S, 0)
    for record, from_s in since_s.items():
        assert (record in missing) == (from_s <= now_s - INTERVAL_S and record not in named)
    assert left_out(since_s, named | set(missing), now_s, INTERVAL_S, 0) == []


@given(known, now, st.integers(COMPLETE_VIEWS, 100))
def test_a_round_does_not_wait_for_what_only_some_see(since_s: dict[bytes, float], now_s: float, view: int) -> None:
    assert left_out(since_s, (), now_s, INTERVAL_S, view) == []


def test_who_cannot_judge_a_frozen_root_does_not_rule_on_it() -> None:
    context = replace(CONTEXT, frozen_from=4, is_judged=False)
    proposal, totals = propose(context, EVIDENCE)
    assert (proposal.ruling, proposal.ruled_round) == (NO_RULING, 0)
    assert totals[WORKERS[0]] > CONTEXT.totals_wei[WORKERS[0]]
    for ruling in (UPHOLD, CORRECT):
        reasons = justify(replace(proposal, ruling=ruling, ruled_round=4), proposal)
        assert reasons is not None
        assert "ruling" in reasons[0]


def test_an_undecided_proposal_is_signed_by_those_who_can_rule_in_later_views_only() -> None:
    correction = Correction({}, {WORKERS[0]: 30}, 30)
    for frozen in (replace(CONTEXT, frozen_from=4), replace(CONTEXT, frozen_from=4, correction=correction)):
        for view in (0, COMPLETE_VIEWS - 1, COMPLETE_VIEWS, 9):
            own = replace(frozen, view=view)
            proposed, _ = propose(replace(own, is_judged=False), EVIDENCE)
            recomputed, _ = propose(undecided(own, proposed), EVIDENCE)
            assert (justify(proposed, recomputed) is None) == (view >= COMPLETE_VIEWS)
            ruled, _ = propose(own, EVIDENCE)
            assert justify(ruled, propose(undecided(own, ruled), EVIDENCE)[0]) is None
