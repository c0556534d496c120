"""Job records are kept by several validators, found by the job's id, and handed over when a validator leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from smartnodes_core.dht.asking import NodeCalls
from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.node import DhtNode
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    ProtocolError,
    RecordError,
    SignatureError,
)
from smartnodes_core.nodes import job_keeping
from smartnodes_core.nodes.job_copies import JobCopy, fetch_job
from smartnodes_core.nodes.job_keeping import NUM_COPIES
from smartnodes_core.nodes.placement import closing_signature
from smartnodes_core.records import JobNotice
from smartnodes_core.rpc.pool import WorkerPool


class Kept:
    """Six validators in a DHT, of whom jobs name the first two; everything else as in `Net`."""

    def __init__(self, net: Any) -> None:
        self.net, self.pool = net, WorkerPool("dht", 8)
        for citizen in [*net.validators, net.user]:
            self.seat(citizen)
        self.validators = net.validators

    def seat(self, citizen: Any) -> None:
        listens = citizen.node._listener is not None
        citizen.dht = DhtNode(
            citizen.key,
            1,
            NodeCalls(citizen.node),
            self.pool.run,
            endpoints=lambda: [citizen.node.endpoint] if listens else [],
            role_of=citizen.membership.role_of,
        )
        citizen.node.serve(citizen.dht)
        first = self.net.validators[0]
        if citizen is not first:
            citizen.dht.join([Contact(first.key, (first.node.endpoint,))])

    def open(self, num_named: int = 2) -> Any:
        """A job of which the validators of its plan have said that they keep it, and no more."""
        record = self.net.record()
        named = [validator.key for validator in self.net.validators[:num_named]]
        job = self.net.open(record, self.net.plan(record, validators=named))
        for each in self.keepers(job.id):
            each.role.keeper._say(each.dht, each.role.keeper.copy_of(job.id))
        return job

    def keepers(self, job_id: bytes) -> list[Any]:
        return [each for each in self.net.validators if each.role.keeper.copy_of(job_id) is not None]

    def look_after(self, job_id: bytes) -> None:
        for each in self.keepers(job_id):
            each.role.keeper.look_after(job_id)

    def leave(self, validator: Any) -> None:
        validator.role.keeper.hand_over()
        validator.stop()
        self.net.validators.remove(validator)

    def find(self, job_id: bytes) -> JobCopy:
        return fetch_job(self.net.user.node, self.net.user.dht.find_job, job_id)


@pytest.fixture
def kept(make_net: Callable[..., Any]) -> Iterator[Kept]:
    net = make_net(num_validators=6)
    net.start()
    made = Kept(net)
    yield made
    net.stop()
    made.pool.stop(1.0)


def test_a_job_is_found_by_its_id_with_author_stages_workers_state_and_history(kept: Kept) -> None:
    job = kept.open()
    kept.look_after(job.id)
    found = kept.find(job.id)
    assert (found.job.record, found.job.plan) == (job.record, job.plan)
    assert found.job.record.author == kept.net.user.key
    assert [item.worker for item in found.job.plan.assignments] == [worker.key for worker in kept.net.workers[:2]]
    assert found.state == "open"
    assert [event for _, event in found.history] == ["plan 0: first"]
    with pytest.raises(JobError, match="not found: 0 validators"):
        kept.find(b"x" * 32)


def test_too_few_keepers_give_copies_to_the_validators_that_come_next(kept: Kept) -> None:
    job = kept.open(num_named=1)
    assert len(kept.keepers(job.id)) == 1
    kept.look_after(job.id)
    assert len(kept.keepers(job.id)) == NUM_COPIES
    kept.look_after(job.id)
    kept.look_after(job.id)
    assert len(kept.keepers(job.id)) == NUM_COPIES
    assert sum(job.id in validator.role.audits.jobs for validator in kept.validators) == 1  # no copy makes an auditor
    assert len(kept.net.user.dht.find_job(job.id)) == NUM_COPIES


def test_a_validator_that_leaves_hands_its_records_over(kept: Kept) -> None:
    job = kept.open(num_named=1)
    kept.leave(kept.validators[0])
    assert len(kept.keepers(job.id)) == NUM_COPIES
    kept.look_after(job.id)
    assert kept.find(job.id).job.plan == job.plan
    kept.leave(kept.keepers(job.id)[0])
    kept.leave(kept.keepers(job.id)[0])
    kept.look_after(job.id)
    assert len(kept.keepers(job.id)) >= NUM_COPIES
    assert kept.find(job.id).job.plan == job.plan


def test_a_job_is_found_when_all_but_one_of_its_keepers_vanished(kept: Kept) -> None:
    job = kept.open(num_named=1)
    kept.look_after(job.id)
    kept.look_after(job.id)
    for gone in kept.keepers(job.id)[:-1]:
        gone.stop()
        kept.validators.remove(gone)
    assert kept.find(job.id).job.id == job.id


def test_a_copy_hears_that_its_job_ended(kept: Kept, eventually: Any) -> None:
    job = kept.open(num_named=2)
    kept.look_after(job.id)
    (copyist,) = [each for each in kept.keepers(job.id) if each.key not in job.plan.validators]
    kept.net.user.role.close_job(job, "enough")
    eventually(lambda: all(v.role.jobs.entries[job.id].state == "closed" for v in kept.validators[:2]))
    kept.look_after(job.id)
    copyist.role.keeper.look_after(job.id)
    copy = copyist.role.keeper.copy_of(job.id)
    assert copy.state == "closed"
    assert copy.history[-1][1] == "closed: enough"
    assert kept.find(job.id).closing == closing_signature(kept.net.user.identity, job.id)


def test_a_copy_is_kept_while_its_job_is_said_to_be_open_and_a_day_longer(kept: Kept) -> None:
    job = kept.open(num_named=2)
    kept.look_after(job.id)
    (copyist,) = [each for each in kept.keepers(job.id) if each.key not in job.plan.validators]
    keeper, now_s = copyist.role.keeper, time.time()

    def days_pass(count: float) -> None:
        heard = {job_id: (copy, at_s - count * 24 * 3600) for job_id, (copy, at_s) in keeper._copies.items()}
        keeper._copies = heard

    for _ in range(2):
        days_pass(0.9)
        keeper.look_after(job.id)
        assert keeper.kept() == [job.id]
    assert keeper._copies[job.id][1] >= now_s
    for validator in kept.validators[:2]:
        validator.role.keeper.hand_over()
    days_pass(0.9)
    keeper.look_after(job.id)
    assert keeper.kept() == [job.id]
    days_pass(0.2)
    assert keeper.kept() == []


def test_a_validator_that_keeps_jobs_says_so_by_itself(kept: Kept, eventually: Any) -> None:
    for validator in kept.validators:
        validator.role.keeper.start()
    job = kept.open()
    eventually(lambda: len(kept.keepers(job.id)) == NUM_COPIES)
    eventually(lambda: len(kept.net.user.dht.find_job(job.id)) == NUM_COPIES)
    leaver = kept.validators[0]
    leaver.role.keeper.stop()
    leaver.role.keeper.stop()
    leaver.stop()
    kept.validators.remove(leaver)
    assert len(kept.keepers(job.id)) == NUM_COPIES


# -- attackers --------------------------------------------------------------------------------------------------------


def give(sender: Any, validator: Any, copy: JobCopy, **changes: Any) -> None:
    params, body = copy.encode()
    sender.node.call(validator.key, "keep_job", {**params, **changes}, body)


def test_only_validators_give_copies_and_only_of_jobs_that_users_signed(kept: Kept) -> None:
    net = kept.net
    record = net.record()
    copy = JobCopy(net.job(record, net.plan(record)), "open", b"", ())
    victim, sender = kept.validators[:2]
    with pytest.raises(AuthorityError, match="may not call"):
        give(net.user, victim, copy)
    foreign = net.record(network_id=9)
    with pytest.raises(JobError, match="network 9"):
        give(sender, victim, JobCopy(net.job(foreign, net.plan(foreign)), "open", b"", ()))
    own = net.record(author=sender.key)
    job = net.plan(own)
    forged = type(copy.job).open(sender.sign(own), sender.sign(job))
    with pytest.raises(AuthorityError, match="its author is none"):
        give(sender, victim, JobCopy(forged, "open", b"", ()))
    with pytest.raises(SignatureError):
        give(sender, victim, JobCopy(copy.job, "closed", bytes(64), ()))
    for changes in (
        {"record_bytes": 1 << 40},
        {"plan_bytes": -1},
        {"state": "king"},
        {"history": [[0, "x"]] * 100},
        {"history": [[0, "x" * 1000]]},
        {"history": [["x", 0]]},
        {"history": 7},
    ):
        with pytest.raises((ProtocolError, RecordError)):
            give(sender, victim, copy, **changes)
    assert victim.role.keeper.kept() == []


def test_copies_of_one_author_are_bounded(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_keeping, "MAX_OPEN_PER_AUTHOR", 2)
    net, (victim, sender) = kept.net, kept.validators[:2]
    for number in range(3):
        record = net.record()
        copy = JobCopy(net.job(record, net.plan(record)), "open", b"", ())
        if number < 2:
            give(sender, victim, copy)
        else:
            with pytest.raises(BusyError, match="2 of this author's"):
                give(sender, victim, copy)
    assert len(victim.role.keeper.kept()) == 2


def test_a_record_is_shown_to_whom_it_concerns(kept: Kept) -> None:
    net, job = kept.net, kept.open()
    stranger = net.citizen(22, "user")
    net.meet()
    asked = {"job": job.id}
    for who in (net.user, net.workers[0], kept.validators[4]):
        who.node.call(kept.validators[0].key, "job_copy", asked)
    for outsider in (stranger, net.workers[2]):
        with pytest.raises(AuthorityError, match="its author, its workers"):
            outsider.node.call(kept.validators[0].key, "job_copy", asked)


def test_a_keeper_that_shows_another_job_or_nothing_is_passed_over(kept: Kept) -> None:
    job, other = kept.open(), None
    kept.look_after(job.id)
    liar = kept.validators[0]
    record = kept.net.record(num_stages=1)
    other = JobCopy(kept.net.job(record, kept.net.plan(record)), "open", b"", ())
    liar.role.keeper.copy_of = lambda job_id: other
    assert kept.find(job.id).job.id == job.id
    notice = JobNotice(
        job=b"n" * 32,
        keeper=liar.key,
        network_id=1,
        plan_version=1 << 40,
        state="open",
        sequence=1,
        expires_at_s=int(time.time()) + 100,
    )
    liar.dht.put(liar.identity.sign(notice))
    with pytest.raises(JobError, match="1 validators say that they keep it, and none shows it"):
        kept.find(b"n" * 32)
