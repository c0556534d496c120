"""Who withholds its part in a draw stops nobody's audits: it is shut out, and the draw is made without it."""

from __future__ import annotations

import threading

import pytest

from smartnodes_core.audit import assigned_validators
from smartnodes_core.audit_grounds import assigned_without
from smartnodes_core.chain.packing import unpack_reputations
from smartnodes_core.errors import AuthorityError, RecordError, SmartnodesError
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.records import Absence, ReceivedList, Reveal, Withholding

NETWORK = 1
HASTY = ValidatorSettings(
    list_interval_s=0.01,
    reveal_timeout_s=0.1,
    challenge_timeout_s=10.0,
    withhold_timeout_s=0.6,
    poll_s=0.05,
    proposer_timeout_s=2.0,
)


def _job_of(net, withholder_rank=1):
    """A job with one stage, and the validator that is to withhold."""
    record = net.record(num_stages=1, audit={"window_steps": 1})
    key = assigned_validators(record.digest(), [v.key for v in net.validators])[withholder_rank]
    return record, next(v for v in net.validators if v.key == key)


def _payable(net, job, validator):
    records = validator.role.rounds.books.records
    return sorted(each.step for each in records.payable().values() if each.job == job.id)


def _keeps_preimages(validator):
    """Lists like everybody, and reveals nothing any more."""
    validator.role.audits._draws._reveal_ready = lambda: None


def test_a_draw_without_somebodys_preimage_is_made_anew_without_it(make_net, eventually):
    net = make_net(settings=HASTY)
    record, bad = _job_of(net)
    net.start()
    _keeps_preimages(bad)
    job = net.open(record)
    good = [v for v in net.validators if v is not bad]
    net.work(job, range(2), num_units=1)
    for validator in good:
        eventually(lambda validator=validator: len(net.audited(validator, job).verdicts) == 2)
        audited = net.audited(validator, job)
        assert audited.excluded == (bad.key,)
        assert audited.assigned == assigned_without(job, [bad.key])
        assert len(audited.assigned) == 3
        for digest in audited.commitments:
            assert [sorted(draw.lists) for draw in audited.draws(digest)] == [audited.assigned]
    assert net.workers[0].handler.num_openings == 2
    net.work(job, range(2, 4), num_units=1)  # the next are drawn without it from the start
    eventually(lambda: len(net.audited(good[0], job).verdicts) == 4)


def test_work_is_not_payable_before_it_was_drawn_not_even_when_the_job_has_ended(make_net, eventually):
    net = make_net(settings=HASTY)
    record, bad = _job_of(net)
    net.start()
    _keeps_preimages(bad)
    may_say = threading.Event()
    good = [v for v in net.validators if v is not bad]
    for validator in good:
        desk = validator.role.audits._absences
        desk._look = lambda audited, look=desk._look: may_say.is_set() and look(audited)
    job = net.open(record)
    net.work(job, range(3), num_units=1)
    judge = good[0]
    eventually(lambda: len(net.audited(judge, job).commitments) == 3)
    net.audited(judge, job).came_at_s.update(dict.fromkeys(net.audited(judge, job).commitments, -1e9))
    assert _payable(net, job, judge) == []
    net.audited(judge, job).closed = True
    assert _payable(net, job, judge) == []
    net.audited(judge, job).closed = False
    may_say.set()
    eventually(lambda: _payable(net, job, judge) == [0, 1])


def test_withholding_costs_half_of_what_auditing_earned_in_reputation(make_net, eventually):
    net = make_net(settings=HASTY)
    record, bad = _job_of(net)
    net.start(rounds=True)
    job = net.open(record)

    def reputation():
        return net.user.chain.member(NETWORK, bad.account).reputation

    net.work(job, range(12), num_units=1)
    eventually(lambda: reputation() > 3)
    _keeps_preimages(bad)
    net.work(job, range(12, 14), num_units=1)
    told = net.validators[0].role.rounds.executed
    eventually(lambda: net.audited(net.validators[0], job).excluded)
    name = next(iter(net.audited(net.validators[0], job).proofs))
    eventually(lambda: net.validators[0].role.rounds.books.is_settled([name]))
    assert told
    best = 0
    for content in list(told):
        score = unpack_reputations(content.reputations).get(net.user.chain.member(NETWORK, bad.account).index)
        if score is not None and score < best:
            assert score == max(1, best // 2)
            return
        best = max(best, score or 0)
    raise AssertionError(f"the reputation rose to {best} and did not fall")


def test_a_preimage_that_is_revealed_later_gives_away_all_before_it(make_net, eventually):
    net = make_net(settings=HASTY)
    record, bad = _job_of(net)
    net.start()
    _keeps_preimages(bad)
    for validator in net.validators:
        validator.role.audits._absences._look = lambda audited: None
    job = net.open(record)
    net.work(job, range(1), num_units=1)
    listed = lambda index: (bad.key, index) in net.audited(net.validators[0], job).lists  # noqa: E731
    eventually(lambda: listed(1))
    net.work(job, range(1, 2), num_units=1)
    eventually(lambda: listed(2))
    audited = net.audited(bad, job)
    first, second = audited.pending
    audited.pending.remove(first)
    del bad.role.audits._draws._reveal_ready
    bad.role.audits._draws.wake()
    eventually(lambda: net.everyone_has(2, job))
    assert (bad.key, 1) not in net.audited(net.validators[0], job).reveals
    assert second[0] == 2
    assert not net.audited(net.validators[0], job).excluded


def test_a_preimage_that_got_lost_on_the_way_is_asked_for_and_nobody_is_accused(make_net, eventually):
    net = make_net(settings=HASTY)
    record, lost = _job_of(net)
    deaf = next(v for v in net.validators if v is not lost and v.key in assigned_validators(
        record.digest(), [each.key for each in net.validators]
    ))  # fmt: skip
    net.start()
    method = deaf.node._rpc._methods["reveal"]
    deaf.node._rpc._methods["reveal"] = type(method)("reveal", lambda *args: None, method.rule)
    job = net.open(record)
    net.work(job, range(2), num_units=1)
    eventually(lambda: net.everyone_has(2, job))
    assert not any(net.audited(validator, job).excluded for validator in net.validators)


def test_one_that_accuses_alone_shuts_nobody_out(make_net):
    net = make_net(settings=HASTY)
    net.start()
    job = net.open(num_stages=1)
    accuser, victim, judge = net.validators[:3]

    def said(by):
        return by.sign(Absence(job=job.id, absent=victim.key, validator=by.key))

    accuser.node.call(judge.key, "absence", {"absence": said(accuser)})
    with pytest.raises(AuthorityError, match="who misses somebody"):
        accuser.node.call(judge.key, "absence", {"absence": said(net.validators[3])})
    for statements in ([], [said(accuser)], [said(accuser)] * 2, [said(accuser), said(victim)]):
        with pytest.raises(RecordError, match="more than half"):
            judge.role.audits.proofs.take(Withholding(job=job.id, absent=victim.key, statements=statements))
    mixed = [said(accuser), judge.sign(Absence(job=job.id, absent=accuser.key, validator=judge.key))]
    with pytest.raises(RecordError, match="another validator"):
        judge.role.audits.proofs.take(Withholding(job=job.id, absent=victim.key, statements=mixed))
    assert not net.audited(judge, job).excluded
    listed = ReceivedList(job=job.id, validator=accuser.key, reveal=1, commitments=[bytes(32)], excluded=[victim.key])
    with pytest.raises(SmartnodesError):
        judge.role.audits.take_draw(accuser.sign(listed), b"")


def test_who_lists_a_commitment_again_when_the_draw_is_known_changes_nothing(make_net, eventually):
    net = make_net(settings=HASTY)
    record, bad = _job_of(net)
    net.start()
    bad.role.audits._draws._next_reveal = 5  # it keeps four preimages for later
    job = net.open(record)
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    others = [v for v in net.validators if v is not bad]
    before = {v.key: net.audited(v, job).draws(digest) for v in others for digest in net.audited(v, job).commitments}
    (digest,) = net.audited(bad, job).commitments
    again = ReceivedList(job=job.id, validator=bad.key, reveal=2, commitments=[digest])
    reveal = Reveal(
        job=job.id,
        validator=bad.key,
        reveal=2,
        received_list=again.digest(),
        preimage=bad.hash_chain.reveal(2),
    )
    for validator in others:
        validator.role.audits.take_draw(bad.sign(again), bad.sign(reveal))
        audited = net.audited(validator, job)
        assert audited.draws(digest) == before[validator.key]
        assert len(audited.drawn[digest]) == 1
