from __future__ import annotations

import pytest

from smartnodes_core.errors import (
    AuthorityError,
    JobError,
    NoWorkersError,
    ProtocolError,
    RecordError,
    Unavailable,
)
from smartnodes_core.jobs import StageOfJob
from smartnodes_core.records import Signed, Verdict


def test_a_job_is_opened_by_the_first_validator_of_the_plan(net):
    job = net.open()
    assert net.user.role.nonce() != net.user.role.nonce()
    for validator in net.validators:
        assert validator.role.jobs.entries[job.id].opened_by == {net.validators[0].key}


def test_when_a_validator_is_down_the_next_one_opens_the_job(net):
    net.validators[0].node.stop()
    job = net.open()
    assert net.validators[1].role.jobs.entries[job.id].state == "open"
    assert len(net.workers[0].handler.stages) == 1


def test_when_all_are_down_the_last_error_says_so(net):
    for validator in net.validators:
        validator.node.stop()
    with pytest.raises(Unavailable):
        net.open()
    assert net.user.role._jobs == {}


def test_too_few_workers_end_the_attempt_and_free_those_that_took_a_stage(net, eventually):
    net.workers[1].role._num_slots = 0
    with pytest.raises(NoWorkersError, match="slots are free"):
        net.open()
    eventually(lambda: net.workers[0].role.num_free_slots == 1)
    assert all(next(iter(v.role.jobs.entries.values())).state == "closed" for v in net.validators)


def test_a_refusal_is_not_asked_of_the_next_validator(net):
    record = net.record(network_id=9)
    with pytest.raises(JobError, match="network 9"):
        net.open(record)
    assert all(not validator.role.jobs.entries for validator in net.validators)


def test_the_author_hears_of_its_job_and_of_nobody_elses(net, eventually):
    job = net.open()
    net.work(job, range(1))
    eventually(lambda: len(net.heard.commitments) == 2)
    eventually(lambda: len(net.heard.verdicts) == 4)
    stage = StageOfJob(job, 0, 0)
    net.workers[0].role.tell_author(stage, "loss", {"value": 1})
    net.workers[1].role.tell_author(stage, "loss", {"value": 2})  # not its stage
    eventually(lambda: net.heard.events)
    assert net.heard.events == [(0, "loss", {"value": 1})]


def test_a_commitment_for_a_stage_that_is_not_its_senders_is_refused(net):
    job = net.open()
    data = net.signed_commitment(job, 0, 0, signer=net.workers[2])
    with pytest.raises(AuthorityError, match="not run by who commits"):
        _from_worker(net, net.workers[2], "commitment", {}, [data])
    with pytest.raises(AuthorityError, match="not run by who commits"):
        _from_worker(net, net.workers[1], "commitment", {}, [net.signed_commitment(job, 0, 0)])
    assert net.heard.commitments == []


def test_a_verdict_of_a_validator_outside_the_plan_is_not_heard(net):
    record = net.record(num_stages=1)
    outsider = net.validators[3]
    job = net.open(record, net.plan(record, validators=[v.key for v in net.validators[:3]]))
    verdict = Verdict(
        job=job.id,
        plan_version=0,
        replica=0,
        stage=0,
        step=0,
        challenge=bytes(32),
        commitment=bytes(32),
        tier=1,
        unit=0,
        worker=net.workers[0].key,
        auditor=outsider.key,
        finding="fraudulent",
        reason="",
        evidence=bytes(32),
        work_units=1,
        decided_at_s=1,
    )
    net.user.node.reach(outsider.key)
    outsider.node.call(net.user.key, "verdict", {"verdict": outsider.sign(verdict)})
    assert net.heard.verdicts == []


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"key": "zz" * 40, "event": 1, "params": {}},
        {"key": 5, "event": "e", "params": {}},
        {"key": "k", "event": "e", "params": []},
        {"key": "k" * 500, "event": "e", "params": {}},
    ],
)
def test_an_event_out_of_shape_is_a_protocol_error(net, params):
    net.open()
    with pytest.raises(ProtocolError):
        _from_worker(net, net.workers[0], "job_event", params)


def test_an_event_of_a_stage_that_is_none_is_ignored(net):
    job = net.open()
    for key in ("", "zz" * 40, job.id.hex(), job.id.hex() + "/0/7", "é" * 70):
        _from_worker(net, net.workers[0], "job_event", {"key": key, "event": "e", "params": {}})
    assert net.heard.events == []


@pytest.mark.parametrize("value", [None, 1 << 40, "x"])
def test_a_verdict_out_of_shape_is_a_protocol_error(net, value):
    net.open()
    with pytest.raises(ProtocolError):
        net.validators[0].node.call(net.user.key, "verdict", {"verdict": value})
    with pytest.raises(RecordError):
        net.validators[0].node.call(net.user.key, "verdict", {"verdict": b"x"})


def _from_worker(net, worker, method, params, body=()):
    net.user.node.reach(worker.key)
    return worker.node.call(net.user.key, method, params, body)


def test_a_worker_that_is_lost_is_reported_with_its_stages(net, eventually):
    net.open()
    net.user.node.reach(net.workers[1].key)
    net.hub.cut(net.workers[1].key)
    eventually(lambda: net.heard.lost == [1])


def test_frames_reach_the_listener_of_their_job(net, eventually):
    job = net.open()
    got = []
    net.heard.allocate = lambda stage, header, num_bytes: memoryview(bytearray(num_bytes))
    net.heard.on_frame = lambda stage, header, body: got.append((stage, bytes(body)))
    stage = StageOfJob(job, 1, 0)
    net.user.node.reach(net.workers[1].key)
    net.workers[1].role.stream(net.user.key, {"key": stage.key}, b"loss", lambda: None)
    net.workers[1].role.stream(net.user.key, {"key": "none"}, b"lost", lambda: None)
    eventually(lambda: got == [(1, b"loss")])


def test_a_closed_job_is_heard_no_more_but_for_its_last_verdicts(net, eventually):
    job = net.open(num_stages=1)
    net.work(job, range(1))
    net.user.role.close_job(job)
    eventually(lambda: len(net.heard.verdicts) == 2)
    assert Signed.decode(job.signed_plan).signer == net.user.key
    assert net.user.role._jobs == {}
