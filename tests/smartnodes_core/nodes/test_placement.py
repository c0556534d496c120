from __future__ import annotations

import time

import pytest

from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    PeerFault,
    ProtocolError,
    RecordError,
    SignatureError,
)
from smartnodes_core.nodes import placement


def submit(net, job, validator=None, sender=None):
    params = {"job": job.signed_record, "plan": job.signed_plan}
    return (sender or net.user).node.call((validator or net.validators[0]).key, "open_job", params)


def job_of(net, record=None, **plan):
    record = record or net.record()
    return net.job(record, net.plan(record, **plan))


def test_a_job_is_replicated_to_every_validator_and_its_workers_are_assigned(net):
    job = net.open()
    for validator in net.validators:
        entry = validator.role.jobs.entries[job.id]
        assert entry.state == "open"
        assert entry.job.plan == job.plan
        assert [event for _, event in entry.history] == ["plan 0: first"]
        assert job.id in validator.role.audits.jobs
    assert [len(worker.handler.stages) for worker in net.workers] == [1, 1, 0]


def test_a_job_that_its_author_closes_is_closed_everywhere_and_its_workers_are_freed(net, eventually):
    job = net.open()
    net.user.role.close_job(job, "enough")
    for validator in net.validators:
        eventually(lambda v=validator: v.role.jobs.entries[job.id].state == "closed")
        assert validator.role.jobs.entries[job.id].history[-1][1] == "closed: enough"
    eventually(lambda: [worker.role.num_free_slots for worker in net.workers] == [1, 1, 1])


def test_a_newer_plan_goes_to_all_validators_and_workers_and_to_who_has_no_stage_any_more(net, eventually):
    job = net.open()
    plan = net.plan(job.record, version=1, reason="one is lost", workers=[net.workers[2], net.workers[1]])
    again = net.user.role.replan(job, plan)
    assert again.id == job.id
    for validator in net.validators:
        entry = validator.role.jobs.entries[job.id]
        assert entry.job.plan == plan
        assert [event for _, event in entry.history] == ["plan 0: first", "plan 1: one is lost"]
        assert validator.role.audits.jobs[job.id].job.plan == plan
        assert validator.role.audits.jobs[job.id].under(0).plan == job.plan
    assert [len(worker.handler.stages) for worker in net.workers] == [1, 2, 1]
    eventually(lambda: len(net.workers[0].role._held.superseded) == 1)


def test_a_newer_plan_that_a_worker_refuses_leaves_the_job_open_for_another(net):
    job = net.open()
    net.workers[2].handler.refuse_stage = 0
    with pytest.raises(PeerFault, match="not that stage"):
        net.user.role.replan(job, net.plan(job.record, version=1, workers=[net.workers[2], net.workers[1]]))
    assert net.validators[0].role.jobs.entries[job.id].state == "open"
    net.user.role.replan(job, net.plan(job.record, version=2))
    net.user.role.close_job(job)


def test_a_closed_job_cannot_be_opened_again(net, eventually):
    job = net.open()
    net.user.role.close_job(job)
    eventually(lambda: all(v.role.jobs.entries[job.id].state == "closed" for v in net.validators))
    for validator in net.validators[:2]:
        with pytest.raises(JobError, match="has ended"):
            submit(net, job, validator)
    newer = net.job(job.record, net.plan(job.record, version=5))
    with pytest.raises(JobError, match="has ended"):
        submit(net, newer)
    eventually(lambda: [worker.role.num_free_slots for worker in net.workers] == [1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"workers": "outsider"}, "is not registered"),
        ({"workers": "validator"}, "is a validator"),
        ({"validators": "fake"}, "is not registered"),
        ({"validators": "worker"}, "is a worker"),
        ({"validators": "without"}, "does not name this validator"),
    ],
)
def test_a_plan_names_members_in_their_roles(net, changes, complaint):
    outsider = net.citizen(15, "worker", register=False)
    record = net.record(num_stages=1)
    validators = [validator.key for validator in net.validators]
    options = {
        "outsider": {"workers": [outsider]},
        "validator": {"workers": [net.validators[1]]},
        "fake": {"validators": [validators[0], b"f" * 32]},
        "worker": {"validators": [validators[0], net.workers[2].key]},
        "without": {"validators": validators[1:]},
    }[next(iter(changes.values()))]
    with pytest.raises((JobError, RecordError), match=complaint):
        submit(net, net.job(record, net.plan(record, **options)))
    assert net.validators[0].role.jobs.entries == {}


def test_a_blacklisted_worker_is_not_planned_with(net):
    member = net.user.chain.member(1, net.workers[0].account)
    net.model.peek(1).update(member.index, reputation=0)
    for validator in net.validators:
        validator.membership.members(0.0)
    with pytest.raises(JobError, match="blacklisted"):
        submit(net, job_of(net))


def test_a_job_is_opened_by_its_author_only(net):
    stranger = net.citizen(22, "user")
    stranger.node.add_address(net.validators[0].key, net.validators[0].node.endpoint)
    with pytest.raises(AuthorityError, match="opened by its author"):
        submit(net, job_of(net), sender=stranger)
    with pytest.raises(AuthorityError, match="may not call"):
        submit(net, job_of(net), sender=net.workers[0])


def test_record_and_plan_are_checked(net):
    job = job_of(net)
    key = net.validators[0].key
    for params in (
        {"job": job.signed_record, "plan": job.signed_record},
        {"job": job.signed_plan, "plan": job.signed_plan},
        {"job": b"", "plan": b""},
    ):
        with pytest.raises(RecordError):
            net.user.node.call(key, "open_job", params)
    forged = bytearray(job.signed_plan)
    forged[-1] ^= 1
    with pytest.raises(SignatureError):
        net.user.node.call(key, "open_job", {"job": job.signed_record, "plan": bytes(forged)})
    for params in ({}, {"job": 1 << 40, "plan": 1}, {"job": "x", "plan": None}):
        with pytest.raises(ProtocolError):
            net.user.node.call(key, "open_job", params)


def test_a_job_is_opened_while_it_is_fresh(net):
    now = int(time.time())
    for created_at_s in (now - 2 * placement.MAX_AGE_S, now + 2 * placement.MAX_AHEAD_S, 0):
        with pytest.raises(JobError, match="with a clock that is right"):
            submit(net, job_of(net, net.record(created_at_s=created_at_s)))


def test_an_author_has_so_many_jobs_and_no_more(net, monkeypatch):
    monkeypatch.setattr(placement, "MAX_OPEN_PER_AUTHOR", 1)
    submit(net, job_of(net, net.record(num_stages=1)))
    with pytest.raises(BusyError, match="1 of your jobs are open"):
        submit(net, job_of(net, net.record(num_stages=1), workers=net.workers[1:]))


def test_plans_only_rise_and_each_version_is_one_plan(net):
    record = net.record(num_stages=1)
    submit(net, net.job(record, net.plan(record, version=2)))
    with pytest.raises(RecordError, match="plan 1 was replaced by plan 2"):
        submit(net, net.job(record, net.plan(record, version=1)))
    with pytest.raises(RecordError, match="two plans of version 2"):
        submit(net, net.job(record, net.plan(record, version=2, reason="another")))


def test_closing_takes_the_authors_word(net):
    job = net.open()
    validator = net.validators[1]
    for sender in (net.validators[2], net.validators[3]):
        with pytest.raises(AuthorityError, match="closed by its author"):
            sender.node.call(validator.key, "close_job", {"job": job.id, "reason": "", "signature": b""})
        with pytest.raises(SignatureError):
            sender.node.call(validator.key, "close_job", {"job": job.id, "reason": "", "signature": bytes(64)})
    assert validator.role.jobs.entries[job.id].state == "open"
    stranger = net.citizen(22, "user")
    stranger.node.add_address(validator.key, validator.node.endpoint)
    with pytest.raises(AuthorityError, match="closed by its author"):
        stranger.node.call(validator.key, "close_job", {"job": job.id, "signature": b""})
    with pytest.raises(JobError, match="does not know"):
        net.user.node.call(validator.key, "close_job", {"job": bytes(32), "signature": b""})
    for params in ({}, {"job": 1 << 40}, {"job": job.id, "reason": 5, "signature": b""}, {"job": job.id}):
        with pytest.raises(ProtocolError):
            net.user.node.call(validator.key, "close_job", params)


def test_any_validator_may_close_a_job_that_is_idle_for_long(net, monkeypatch):
    job = net.open()
    net.validators[0].role.jobs._idle_s = lambda job_id: 1000.0
    net.validators[2].node.call(net.validators[0].key, "close_job", {"job": job.id, "reason": "idle", "signature": b""})
    assert net.validators[0].role.jobs.entries[job.id].state == "closed"


def test_a_job_whose_author_is_gone_is_closed_when_no_more_work_comes(net, monkeypatch, eventually):
    monkeypatch.setattr(placement, "AUTHOR_TIMEOUT_S", 0.05)
    job = net.open()
    net.user.node.stop()
    first = net.validators[0].role.jobs
    eventually(lambda: first._timers)
    assert first.entries[job.id].state == "open"  # work may still come
    for validator in net.validators:
        validator.role.jobs._idle_s = lambda job_id: 1000.0
    for validator in net.validators:
        eventually(lambda v=validator: v.role.jobs.entries[job.id].state == "closed")


def test_a_replica_comes_from_a_validator_of_the_plan(net):
    record = net.record()
    job = net.job(record, net.plan(record, validators=[v.key for v in net.validators[:3]]))
    params = {"job": job.signed_record, "plan": job.signed_plan}
    with pytest.raises(AuthorityError, match="validator of its plan"):
        net.validators[3].node.call(net.validators[0].key, "replicate_job", params)
    with pytest.raises(RecordError, match="does not name this validator"):
        net.validators[0].node.call(net.validators[3].key, "replicate_job", params)
    with pytest.raises(AuthorityError, match="may not call"):
        net.user.node.call(net.validators[0].key, "replicate_job", params)


def test_a_replica_that_refuses_does_not_end_the_job(net):
    refused = net.validators[2].role.jobs
    refused._role_of = lambda key: None
    job = net.open()
    assert job.id not in refused.entries
    assert net.validators[3].role.jobs.entries[job.id].state == "open"


def test_closed_records_are_kept_within_a_cap_and_their_ids_longer(net, monkeypatch, eventually):
    monkeypatch.setattr(placement, "MAX_CLOSED", 1)
    jobs = []
    for _ in range(3):
        jobs.append(net.open(num_stages=1))
        net.user.role.close_job(jobs[-1])
        eventually(lambda: net.workers[0].role.num_free_slots == 1)
    desk = net.validators[0].role.jobs
    assert list(desk.entries) == [jobs[2].id]
    with pytest.raises(JobError, match="has ended"):
        submit(net, jobs[0])
