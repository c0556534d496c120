"""A validator that leaves hands its audits over to the next in rank, whose challenges workers open; it costs nobody."""

from __future__ import annotations

import pytest

from smartnodes_core.audit import assigned_validators
from smartnodes_core.audit_grounds import assigned_without, grounds_of
from smartnodes_core.errors import RecordError
from smartnodes_core.evidence import case_of, check_draw
from smartnodes_core.identity import verify
from smartnodes_core.nodes import validator as module
from smartnodes_core.records import Challenge, Departure, Evidence, Signed


def _job_of(net, num_validators=None):
    """A job of one stage, and the first of the validators that are assigned to it."""
    record = net.record(num_stages=1, audit={"window_steps": 64})
    named = net.validators[:num_validators]
    key = assigned_validators(record.digest(), [v.key for v in named])[0]
    job = net.open(record, net.plan(record, validators=[v.key for v in named]))
    return job, next(v for v in named if v.key == key)


def _others(net, leaver):
    return [v for v in net.validators if v is not leaver]


def test_the_next_in_rank_audits_in_place_of_one_that_leaves_and_workers_open_to_it(net, eventually):
    job, leaver = _job_of(net)
    net.work(job, range(3), num_units=1)
    eventually(lambda: net.everyone_has(3, job))
    others = _others(net, leaver)
    [successor] = set(assigned_without(job, [leaver.key])) - set(assigned_validators(job.id, job.plan.validators))
    leaver.role.leave()
    for validator in others:
        audited = eventually(
            lambda validator=validator: net.audited(validator, job).excluded and net.audited(validator, job)
        )
        assert audited.excluded == (leaver.key,)
        assert audited.assigned == assigned_without(job, [leaver.key])
        assert audited.proofs == {}  # nothing that a round would hold against it
    leaver.role.stop()
    leaver.node.stop()
    net.work(job, range(3, 27), num_units=1)
    judge = net.audited(others[0], job)
    eventually(lambda: len(judge.verdicts) == 27)
    by_successor = [verdict for verdict, _ in judge.verdicts.values() if verdict.auditor == successor]
    assert by_successor
    assert {verdict.finding for verdict in by_successor} == {"honest"}
    assert all(verdict.auditor != leaver.key for verdict, _ in judge.verdicts.values() if verdict.step >= 3)


def test_evidence_of_a_fraud_that_the_successor_found_holds_offline(net, eventually):
    job, leaver = _job_of(net)
    leaver.role.leave()
    others = _others(net, leaver)
    eventually(lambda: all(net.audited(v, job).excluded for v in others))
    net.workers[0].handler.wrong = set(range(40))
    net.work(job, range(12), num_units=1)
    judge = net.audited(others[0], job)
    [successor] = set(judge.assigned) - set(assigned_validators(job.id, job.plan.validators))
    verdict = eventually(
        lambda: next(
            (v for v, _ in judge.verdicts.values() if (v.auditor, v.finding) == (successor, "fraudulent")), None
        )
    )
    auditor = next(v for v in others if v.key == successor)
    record, body = auditor.role.evidence._shelf.get(verdict.evidence)
    evidence = Evidence.decode(record)
    assert verify(Signed.decode(evidence.grounds[0]), Departure).validator == leaver.key
    assert Challenge.decode(evidence.challenge).auditor == successor
    check_draw(evidence, case_of(evidence, body))


def test_who_has_listed_leaves_when_it_has_revealed_so_that_nobody_picks_its_draw(net, eventually):
    job, leaver = _job_of(net)
    draws = leaver.role.audits._draws
    reveal, draws._reveal_ready = draws._reveal_ready, lambda: None
    net.work(job, range(1), num_units=1)
    others = _others(net, leaver)
    eventually(lambda: all(net.audited(v, job).owes(leaver.key) for v in others))
    word = leaver.sign(Departure(job=job.id, validator=leaver.key))
    for validator in others:
        validator.role.audits.proofs.take_departure(word)
        assert net.audited(validator, job).excluded == ()
    draws._reveal_ready = reveal
    draws.wake()
    eventually(lambda: all(net.audited(v, job).excluded == (leaver.key,) for v in others))
    eventually(lambda: all(len(net.audited(v, job).verdicts) == 1 for v in others))


def test_nobody_is_sent_away_by_another_and_the_last_does_not_leave(net, eventually):
    job, leaver = _job_of(net, num_validators=2)
    other = next(v for v in net.validators[:2] if v is not leaver)
    audited = net.audited(other, job)
    commitment = net.user.role  # never looked at before a paper is refused
    for signer, names in ((leaver, other), (net.validators[3], net.validators[3])):
        word = signer.sign(Departure(job=job.id, validator=names.key))
        with pytest.raises(RecordError, match="signed by the validator of the job's plan that leaves"):
            audited.add_departure(word)
        with pytest.raises(RecordError, match="signed by the validator of the job's plan that leaves"):
            grounds_of([word], job, commitment)
    leaver.role.leave()
    eventually(lambda: audited.excluded == (leaver.key,))
    other.role.leave()
    assert audited.excluded == (leaver.key,)
    assert audited.assigned == [other.key]


def test_a_validator_that_leaves_finishes_within_its_time(net, monkeypatch):
    monkeypatch.setattr(module, "LEAVE_TIMEOUT_S", 0.3)
    job, leaver = _job_of(net)
    leaver.role.audits._draws._reveal_ready = lambda: None
    net.work(job, range(1), num_units=1)
    leaver.role.leave()  # what it owes is never revealed: it goes all the same
    assert leaver.key in net.audited(leaver, job).departures
