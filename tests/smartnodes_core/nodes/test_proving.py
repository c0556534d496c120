"""A worker that signs two versions of a step has proven its fraud itself: the proof travels, a round carries it."""

from __future__ import annotations

import contextlib

import pytest

from smartnodes_core.audit_proofs import name_of, two_versions
from smartnodes_core.errors import RecordError, SmartnodesError

NETWORK = 1


def _standing(net, citizen):
    return net.user.chain.member(NETWORK, citizen.account)


def test_two_commitments_for_one_step_blacklist_their_worker_and_take_its_stake(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    job, worker = net.open(num_stages=1), net.workers[0]
    one, other = (net.signed_commitment(job, 0, 0, wrong=wrong) for wrong in (False, True))
    net.validators[0].role.audits.take_commitment(one)
    with pytest.raises(RecordError, match="two commitments"):
        net.validators[0].role.audits.take_commitment(other)
    eventually(lambda: _standing(net, worker).reputation == 0)
    assert _standing(net, worker).stake_wei == 0
    assert all(_standing(net, each).reputation for each in net.workers[1:])
    executed = net.validators[0].role.rounds.executed
    eventually(lambda: any(job.id in content.jobs_disputed for content in list(executed)))


def test_validators_to_whom_the_versions_were_shown_one_each_find_out_and_hold_the_same_proof(net, eventually):
    job = net.open(num_stages=1)
    one, other = (net.signed_commitment(job, 0, 0, wrong=wrong) for wrong in (False, True))
    net.validators[0].role.audits.take_commitment(one)
    for validator in net.validators[1:]:
        with contextlib.suppress(RecordError):  # it may be faster to hear of the first
            validator.role.audits.take_commitment(other)
    eventually(lambda: all(net.audited(each, job).proofs for each in net.validators))
    assert len({name for each in net.validators for name in net.audited(each, job).proofs}) == 1


def test_a_proof_that_did_not_reach_a_validator_is_fetched_by_its_name(net):
    job = net.open(num_stages=1)
    holder, asker = net.validators[:2]
    proof = two_versions(*(net.signed_commitment(job, 0, 0, num_units=number) for number in (1, 2)), job.id)
    net.audited(holder, job).add_proof(proof)
    asker.role.audits.fetch_missing(holder.key, [], [name_of(proof)])
    assert name_of(proof) in net.audited(asker, job).proofs
    assert dict(asker.role.rounds.books.records.findings()).keys() == {name_of(proof)}


def test_what_proves_nothing_is_refused(net):
    job = net.open()
    one, same = net.signed_commitment(job, 0, 0), net.signed_commitment(job, 0, 0)
    step, stage = net.signed_commitment(job, 0, 1), net.signed_commitment(job, 1, 0)
    foreign = net.signed_commitment(job, 0, 0, signer=net.workers[2], worker=net.workers[0].key)
    for other in (same, step, stage, foreign, b"", one[:-1]):
        with pytest.raises(SmartnodesError):
            net.validators[0].role.audits.proofs.take(two_versions(one, other, job.id))
    with pytest.raises(SmartnodesError, match="does not know"):
        net.validators[0].role.audits.proofs.take(two_versions(one, step, bytes(32)))
    assert not net.audited(net.validators[0], job).proofs
