"""The third story of the architecture from one end to the other: a job, its audits, its round, the pay, the end."""

from __future__ import annotations

from smartnodes_core.nodes.rewards import claim


def test_a_job_from_opening_to_pay(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    job = net.open()
    assert sum(len(worker.handler.stages) for worker in net.workers) == 2
    net.work(job, range(5))
    eventually(lambda: net.everyone_has(20, job))
    assert not net.audited(net.validators[0], job).link_faults
    net.user.role.close_job(job)
    eventually(lambda: all(worker.role.num_free_slots == 1 for worker in net.workers))
    for validator in net.validators:
        eventually(lambda v=validator: job.id not in v.role.audits.jobs)  # all settled, all forgotten
    keys = [validator.key for validator in net.validators]
    paid = {each.key: claim(each.node, each.chain, 1, keys, each.account) for each in net.workers}
    assert paid[net.workers[0].key] == paid[net.workers[1].key] > 0
    assert paid[net.workers[2].key] == 0
    paid_signers = set()

    def three_are_paid():
        """Those that signed a round are paid in the next."""
        for each in net.validators:
            if claim(each.node, each.chain, 1, keys, each.account):
                paid_signers.add(each.key)
        return len(paid_signers) >= 3

    eventually(three_are_paid)
    assert all(net.user.chain.member(1, worker.account).reputation > 1 for worker in net.workers[:2])


def test_two_jobs_side_by_side_are_audited_apart(make_net, eventually):
    net = make_net(num_workers=2)
    net.start()
    jobs = [
        net.open(record, net.plan(record, workers=[worker]))
        for worker, record in ((worker, net.record(num_stages=1)) for worker in net.workers)
    ]
    for job in jobs:
        net.work(job, range(3))
    for job in jobs:
        eventually(lambda job=job: net.everyone_has(6, job))
        workers = {verdict.worker for verdict, _ in net.audited(net.validators[0], job).verdicts.values()}
        assert workers == {job.worker_of(0)}


def test_one_validator_alone_audits_and_settles(make_net, eventually):
    net = make_net(num_validators=1, num_workers=1)
    net.start(rounds=True)
    job = net.open(num_stages=1)
    net.work(job, range(4))
    eventually(lambda: net.everyone_has(8, job))
    eventually(lambda: net.user.chain.member(1, net.workers[0].account).reputation > 1)


def test_a_validator_that_stops_leaves_the_others_to_carry_rounds(make_net, eventually):
    net = make_net()
    net.start(rounds=True)
    eventually(lambda: net.user.chain.round_state(1).number >= 1)
    net.validators[0].stop()
    number = net.user.chain.round_state(1).number
    eventually(lambda: net.user.chain.round_state(1).number >= number + 2)
