"""Silence does not pay, and nobody is made silent by one accuser or one broken path."""

from __future__ import annotations

import contextlib
import threading

import msgspec
import pytest

from smartnodes_core.audit import WHOLE_STEP
from smartnodes_core.audit_silence import FORCED_STEPS, MAX_STRIKES
from smartnodes_core.errors import AuditError, AuthorityError, RecordError, SmartnodesError
from smartnodes_core.identity import verify
from smartnodes_core.nodes import seconding
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.records import Commitment, Signed, Silence, Verdict

NETWORK = 1
IMPATIENT = ValidatorSettings(
    list_interval_s=0.01, reveal_timeout_s=60.0, challenge_timeout_s=1.0, poll_s=0.05, proposer_timeout_s=2.0
)


def _verdicts(net, job, validator=None):
    return [verdict for verdict, _ in net.audited(validator or net.validators[0], job).verdicts.values()]


def _findings(net, job):
    return {verdict.finding for verdict in _verdicts(net, job)}


def _payable(net, job, validator=None):
    records = (validator or net.validators[0]).role.rounds.books.records
    return sorted(commitment.step for commitment in records.payable().values() if commitment.job == job.id)


def _reputation(net, citizen):
    return net.user.chain.member(NETWORK, citizen.account).reputation


def _settled_steps(net, job):
    settled = net.validators[0].role.rounds.books.is_settled
    return {each.step for each in _verdicts(net, job) if settled([each.digest()])}


@pytest.fixture
def long_window():
    return {"window_steps": 30}


def test_a_worker_that_opens_to_nobody_is_silent_for_everybody(net, eventually):
    net.workers[0].handler.refuses = True
    job = net.open(num_stages=1)
    net.work(job, range(1))
    eventually(lambda: net.everyone_has(2, job))
    for validator in net.validators:
        assert {each.finding for each in _verdicts(net, job, validator)} == {"silent"}
        for silence, _ in net.audited(validator, job).silences.values():
            assert len(silence.statements) >= 2
    assert _payable(net, job) == []


def test_after_a_silence_the_next_ten_steps_are_audited_as_a_whole_and_opened(net, eventually, long_window):
    worker = net.workers[0]
    worker.handler.refuses = True
    job = net.open(num_stages=1, audit={"unit_rate_ppm": 1_000_000, **long_window})
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    worker.handler.refuses = False
    net.work(job, range(1, FORCED_STEPS + 3), num_units=1)
    eventually(lambda: net.everyone_has(FORCED_STEPS + 3, job))
    whole = sorted(each.step for each in _verdicts(net, job) if each.unit == WHOLE_STEP)
    assert whole == list(range(1, FORCED_STEPS + 1))
    assert {each.finding for each in _verdicts(net, job) if each.step} == {"honest"}


def test_work_back_to_the_last_passed_audit_stays_unpaid_and_what_follows_waits_for_one(net, eventually):
    worker = net.workers[0]
    opened = worker.handler.open

    def open_but(stage, commitment, tier, unit):
        if commitment.step == 2:
            raise AuditError("not that one")
        return opened(stage, commitment, tier, unit)

    worker.handler.open = open_but
    job = net.open(num_stages=1, audit={"unit_rate_ppm": 1_000_000, "window_steps": 3})
    for step in range(8):  # one after the other, so that none is asked for too late
        net.work(job, range(step, step + 1), num_units=1)
        eventually(lambda step=step: net.everyone_has(step + 1, job))
    assert {each.step for each in _verdicts(net, job) if each.finding == "silent"} == {2}
    assert _payable(net, job) == [0, 1, 3, 4]


def test_the_third_silence_blacklists_and_the_first_two_cost_no_reputation(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    worker = net.workers[0]
    worker.handler.refuses = True
    job = net.open(num_stages=1, audit={"unit_rate_ppm": 1_000_000, "window_steps": 1})
    for step in range(MAX_STRIKES):
        assert _reputation(net, worker) == 1
        net.work(job, range(step, step + 1), num_units=1)
        eventually(lambda step=step: step in _settled_steps(net, job))
    eventually(lambda: _reputation(net, worker) == 0)


def test_what_a_rig_was_asked_for_when_it_went_down_is_one_silence(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    worker, down = net.workers[0], threading.Event()
    worker.handler.open = lambda *args: down.wait(60) and worker.handler.gone()
    job = net.open(num_stages=1, audit={"unit_rate_ppm": 1_000_000, "window_steps": 30})
    net.work(job, range(4), num_units=1)
    audited = net.audited(net.validators[0], job)
    eventually(lambda: len(audited.drawn) == 4)
    worker.node.stop()
    down.set()
    eventually(lambda: net.everyone_has(4, job))
    eventually(lambda: len(_settled_steps(net, job)) == 4)
    assert _findings(net, job) == {"silent"}
    assert _reputation(net, worker) == 1


def test_a_broken_path_to_the_auditor_is_not_silence(net, eventually):
    worker = net.workers[0]
    method = worker.node._rpc._methods["challenge"]
    broken = set()

    def answer(caller, params, body):
        if caller.node_key in broken:
            raise AuditError("lost on the way")
        return method.handler(caller, params, body)

    worker.node._rpc._methods["challenge"] = type(method)("challenge", answer, method.rule)
    job = net.open(num_stages=1, audit={"window_steps": 30})
    broken.update(net.audited(net.validators[0], job).assigned)  # the fourth validator reaches it
    net.work(job, range(3), num_units=2)
    eventually(lambda: net.everyone_has(6, job))
    assert _findings(net, job) == {"honest"}
    assert all("opened through another validator" in each.reason for each in _verdicts(net, job))


def test_an_opening_that_comes_late_is_taken_from_who_gets_it(make_net, eventually):
    net = make_net(settings=IMPATIENT)
    net.start()
    worker, first, again = net.workers[0], threading.Event(), threading.Event()
    opened = worker.handler.open

    def slow_at_first(*args):
        (again if first.is_set() else first).set()
        again.wait(30)  # longer than the auditor does
        return opened(*args)

    worker.handler.open = slow_at_first
    job = net.open(num_stages=1)
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    assert _findings(net, job) == {"honest"}


def test_who_was_asked_after_its_window_is_not_silent(net, eventually):
    worker = net.workers[0]
    job = net.open(num_stages=1, audit={"window_steps": 2})
    worker.handler.refuses = True
    ledger = worker.role._held.ledgers
    data = [net.signed_commitment(job, 0, step, num_units=1) for step in range(4)]
    assert ledger
    for one in data[::-1]:  # the newest first: when the oldest is drawn, later ones are held
        for validator in net.validators:
            with contextlib.suppress(SmartnodesError):
                validator.role.audits.take_commitment(one)
    eventually(lambda: net.everyone_has(4, job))
    oldest = [each for each in _verdicts(net, job) if each.step == 0]
    assert [each.finding for each in oldest] == ["inconclusive"]
    assert "after its audit window" in oldest[0].reason


def test_too_few_earlier_commitments_are_no_answer(net, eventually):
    for validator in net.validators:
        validator.auditor.examine = lambda case, body: ("silent", "the state cannot be followed back")
    job = net.open(num_stages=1)
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    assert _findings(net, job) == {"silent"}


def test_an_accuser_alone_makes_no_silence(net):
    job = net.open(num_stages=1)
    accuser = next(v for v in net.validators if v.key in net.audited(v, job).assigned)
    judge = next(v for v in net.validators if v is not accuser)
    data = net.signed_commitment(job, 0, 0)
    commitment = verify(Signed.decode(data), Commitment)
    judge.role.audits.take_commitment(data)
    silence = Silence(
        job=job.id, replica=0, stage=0, step=0, commitment=commitment.digest(), challenge=bytes(32),
        worker=commitment.worker, auditor=accuser.key, forced_from=1, statements=[],
    )  # fmt: skip
    verdict = Verdict(
        job=job.id, plan_version=0, replica=0, stage=0, step=0, challenge=bytes(32), commitment=commitment.digest(),
        tier=1, unit=0, worker=commitment.worker, auditor=accuser.key, finding="silent", reason="",
        evidence=silence.digest(), work_units=commitment.work_units, decided_at_s=1,
    )  # fmt: skip
    with pytest.raises(RecordError, match="1 of 4 validators say so, more than half"):
        judge.role.audits.take_verdict(accuser.sign(verdict), accuser.sign(silence))
    with pytest.raises(RecordError):
        judge.role.audits.take_verdict(accuser.sign(verdict))
    assert not net.audited(judge, job).verdicts


def test_validators_bear_out_no_challenge_that_was_not_drawn_or_comes_too_late(net, eventually, monkeypatch):
    monkeypatch.setattr(seconding, "DRAW_WAIT_S", 0.05)
    job = net.open(num_stages=1, audit={"window_steps": 1})
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    case = next(case for v in net.validators for case in v.auditor.cases)
    auditor = next(v for v in net.validators if v.key == case.challenge.auditor)
    witness = next(v for v in net.validators if v is not auditor)

    def second(challenge, sender=auditor):
        params = {"challenge": auditor.sign(challenge), "complaint": b""}
        return sender.node.call(witness.key, "second", params)

    for _ in range(seconding.MAX_ASKED):
        assert second(case.challenge).body  # the worker opens
    with pytest.raises(AuditError, match="times already"):
        second(case.challenge)
    with pytest.raises(AuditError, match="does not follow"):
        second(msgspec.structs.replace(case.challenge, seed=bytes(32)))
    with pytest.raises(AuditError, match="does not follow"):
        second(msgspec.structs.replace(case.challenge, tier=2, unit=-1))
    with pytest.raises(AuthorityError, match="sent by its auditor"):
        second(case.challenge, next(v for v in net.validators if v not in (auditor, witness)))
    witness.role.audits._challenges._seconds._noticed.clear()
    net.work(job, range(1, 2), num_units=1)
    eventually(lambda: len(net.audited(witness, job).commitments) == 2)
    with pytest.raises(AuditError, match="hold the unit no more"):
        second(case.challenge)
