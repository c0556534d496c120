"""The story of an audit over a whole network: commitments, lists, reveals, draws, challenges, verdicts."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import msgspec
import pytest

from smartnodes_core.audit import assigned_validators, seed_of
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    ProtocolError,
    RecordError,
    SignatureError,
    SmartnodesError,
)
from smartnodes_core.identity import verify
from smartnodes_core.jobs import StageOfJob
from smartnodes_core.nodes import claim_books, draw_books
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.records import Commitment, ReceivedList, Signed, Verdict


def test_every_unit_is_drawn_opened_and_found_honest_and_all_validators_hold_the_same_verdicts(net, eventually):
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(2 * 3 * 2, job))
    held = [set(net.audited(validator, job).verdicts) for validator in net.validators]
    assert held[0] == held[1] == held[2] == held[3]
    findings = {verdict.finding for verdict, _ in net.audited(net.validators[0], job).verdicts.values()}
    assert findings == {"honest"}
    for worker in net.workers[:2]:
        eventually(lambda worker=worker: len(worker.role.verdicts) == 6)
    eventually(lambda: len(net.heard.verdicts) == 12 and len(net.heard.commitments) == 6)


def test_both_stages_of_a_worker_that_holds_two_are_audited(net, eventually):
    net.workers[0].handler.wrong = {1}
    record = net.record(num_stages=3)
    first, second, _ = net.workers
    job = net.open(record, net.plan(record, workers=[first, second, first]))
    net.work(job, range(2))
    eventually(lambda: net.everyone_has(3 * 2 * 2, job))
    verdicts = [verdict for verdict, _ in net.audited(net.validators[0], job).verdicts.values()]
    found = {(v.worker, v.stage, v.step) for v in verdicts if v.finding == "fraudulent"}
    assert found == {(first.key, 0, 1), (first.key, 2, 1)}


def test_the_seed_of_every_draw_follows_from_the_preimages_that_lead_to_the_tips(net, eventually):
    job = net.open()
    net.work(job, range(2))
    eventually(lambda: net.everyone_has(8, job))
    audited = net.audited(net.validators[0], job)
    for digest in audited.commitments:
        reveals = audited.reveals_for(digest)
        assert sorted(reveals) == audited.assigned
        seed = seed_of({key: reveal.preimage for key, (reveal, _) in reveals.items()}, digest)
        challenges = [case.challenge for v in net.validators for case in v.auditor.cases]
        assert {c.seed for c in challenges if c.commitment == digest} == {seed}


def test_whole_steps_are_audited_at_the_rate_of_the_job(net, eventually):
    job = net.open(audit={"unit_rate_ppm": 0, "step_rate_ppm": 1_000_000})
    net.work(job, range(2))
    eventually(lambda: net.everyone_has(4, job))
    assert {verdict.tier for verdict, _ in net.audited(net.validators[0], job).verdicts.values()} == {2}


def test_a_wrong_result_is_found_and_re_run_by_every_other_validator(net, eventually):
    net.workers[0].handler.wrong = {1}
    job = net.open()
    net.work(job, range(2))

    def frauds(validator):
        return [v for v, _ in net.audited(validator, job).verdicts.values() if v.finding == "fraudulent"]

    def has_confirmed(validator):  # both units of the step, each in its own time
        confirmed = net.audited(validator, job).confirmed
        return len(confirmed) >= 2 and all(v.digest() in confirmed for v in frauds(validator))

    eventually(lambda: all(has_confirmed(validator) for validator in net.validators))
    for validator in net.validators:
        assert {(v.worker, v.step) for v in frauds(validator)} == {(net.workers[0].key, 1)}


def test_a_worker_that_opens_other_data_is_found_out(net, eventually):
    net.workers[1].handler.opens_other = True
    job = net.open()
    net.work(job, range(1))
    eventually(lambda: net.everyone_has(4, job))
    found = {(v.worker, v.finding) for v, _ in net.audited(net.validators[2], job).verdicts.values()}
    assert found == {(net.workers[0].key, "honest"), (net.workers[1].key, "fraudulent")}


def test_a_worker_that_refuses_to_open_is_found_silent(net, eventually):
    net.workers[0].handler.refuses = True
    job = net.open(num_stages=1)
    net.work(job, range(1))
    eventually(lambda: net.everyone_has(2, job))
    verdicts = [v for v, _ in net.audited(net.validators[0], job).verdicts.values()]
    assert {v.finding for v in verdicts} == {"silent"}
    assert "no longer held" in verdicts[0].reason


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({}, "opening_bytes"),
        ({"opening_bytes": -4, "order_bytes": 0}, "opening_bytes"),
        ({"opening_bytes": 0, "order_bytes": 10**9}, "order_bytes"),
        ({"opening_bytes": 1, "order_bytes": 1}, "earlier_bytes"),
        ({"opening_bytes": 1, "order_bytes": 1, "earlier_bytes": [1] * 17}, "earlier_bytes"),
        ({"opening_bytes": 1, "order_bytes": 1, "earlier_bytes": [-1]}, "earlier_bytes"),
        ({"opening_bytes": 1, "order_bytes": 1, "earlier_bytes": []}, "Signed"),
    ],
)
def test_an_answer_out_of_shape_gets_a_verdict_too(bare, eventually, answer, complaint):
    method = bare.workers[0].node._rpc._methods["challenge"]
    bare.workers[0].node._rpc._methods["challenge"] = type(method)(
        "challenge", lambda caller, params, body: (answer, [b"xx"]), method.rule
    )
    bare.start()
    job = bare.open(num_stages=1)
    bare.work(job, range(1))
    eventually(lambda: bare.everyone_has(2, job))
    verdict = next(iter(bare.audited(bare.validators[0], job).verdicts.values()))[0]
    assert verdict.finding == "silent"
    assert complaint in verdict.reason


def test_the_commitments_before_the_one_that_is_opened_come_with_it_as_far_as_there_are_any(net, eventually):
    net.workers[0].handler.num_earlier = 2
    job = net.open(num_stages=1)
    net.work(job, range(4), num_units=1)
    eventually(lambda: net.everyone_has(4, job))
    cases = [case for validator in net.validators for case in validator.auditor.cases]
    assert len(cases) == 4
    for case in cases:
        assert [one.step for one in case.earlier] == list(range(max(0, case.commitment.step - 2), case.commitment.step))
        chain = [*case.earlier, case.commitment]
        assert [one.digest() for one in chain[:-1]] == [one.previous for one in chain[1:]]


def test_a_worker_that_opens_another_commitment_than_it_published_is_found_out(net, eventually):
    worker = net.workers[0]
    worker.handler.num_earlier = 1
    job = net.open(num_stages=1)
    ledger = worker.role._held.ledgers[StageOfJob(job, 0, 0).key]
    published = verify(Signed.decode(net.signed_commitment(job, 0, 0)), Commitment)
    other = verify(Signed.decode(net.signed_commitment(job, 0, 0, num_units=1)), Commitment)
    for validator in net.validators:
        validator.role.audits.take_commitment(worker.sign(published))
    ledger.keep(other)
    net.work(job, range(1, 2), num_units=1)  # its commitment names the one that nobody got
    digest = worker.role._held.ledgers[StageOfJob(job, 0, 0).key]._tip

    def found():
        verdicts = [verdict for verdict, _ in net.audited(net.validators[0], job).verdicts.values()]
        return [verdict for verdict in verdicts if verdict.commitment == digest]

    eventually(found)
    assert found()[0].finding == "inconclusive"
    assert "two commitments for step 0" in found()[0].reason
    eventually(lambda: all(net.audited(each, job).void for each in net.validators))


def test_a_missing_commitment_is_fetched_from_the_validator_that_lists_it(net, eventually):
    job = net.open(num_stages=1)
    data = net.signed_commitment(job, 0, 0)
    digest = Commitment.decode(Signed.decode(data).record).digest()
    first = next(v for v in net.validators if v.key in net.audited(v, job).assigned)
    first.role.audits.take_commitment(data)
    eventually(lambda: all(digest in net.audited(v, job).commitments for v in net.validators))
    eventually(lambda: all(digest in net.audited(v, job).drawn for v in net.validators))


def test_a_slow_worker_delays_nobody_else(net, eventually):
    gate = threading.Event()
    opened = net.workers[0].handler.open
    net.workers[0].handler.open = lambda *args: gate.wait(60) and opened(*args)
    job = net.open()
    net.work(job, range(2))
    others = net.workers[1].role.verdicts
    eventually(lambda: len(others) == 4)
    assert not net.workers[0].role.verdicts
    gate.set()
    eventually(lambda: net.everyone_has(8, job))


# -- what a worker may not commit to ----------------------------------------------------------------------------------


def test_a_commitment_by_somebody_who_does_not_run_the_stage_is_refused(net):
    job = net.open()
    with pytest.raises(AuthorityError, match="not run by the signer"):
        net.validators[0].role.audits.take_commitment(net.signed_commitment(job, 0, 0, signer=net.workers[2]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"work_units": 21}, "work claimed"),
        ({"plan_version": 1}, "plan in force"),
        ({"replica": 7}, "no worker runs"),
        ({"job": bytes(32)}, "does not know"),
    ],
)
def test_a_claim_that_the_job_does_not_allow_is_refused(net, changes, complaint):
    job = net.open()
    with pytest.raises(SmartnodesError, match=complaint):
        net.validators[0].role.audits.take_commitment(net.signed_commitment(job, 0, 0, **changes))


def test_units_named_twice_are_not_paid_twice(net):
    job = net.open()
    good = Commitment.decode(Signed.decode(net.signed_commitment(job, 0, 0)).record)
    doubled = net.signed_commitment(job, 0, 0, units=good.units * 2, work_units=40)
    with pytest.raises(RecordError, match="each of its units once"):
        net.validators[0].role.audits.take_commitment(doubled)


def test_a_forged_signature_is_refused(net):
    job = net.open()
    signed = Signed.decode(net.signed_commitment(job, 0, 0))
    forged = Signed(record=signed.record, signer=signed.signer, signature=bytes(64)).encode()
    with pytest.raises(SignatureError):
        net.validators[0].role.audits.take_commitment(forged)


def test_two_commitments_for_one_step_void_it_everywhere(net, eventually):
    job = net.open(num_stages=1, audit={"window_steps": 0})
    audits = net.validators[0].role.audits
    audits.take_commitment(net.signed_commitment(job, 0, 0))
    with pytest.raises(RecordError, match="two commitments"):
        audits.take_commitment(net.signed_commitment(job, 0, 0, wrong=True))
    for validator in net.validators:
        eventually(lambda validator=validator: net.audited(validator, job).void)
        audited = net.audited(validator, job)
        assert not any(audited.window_closed(commitment) for commitment in audited.commitments.values())


def test_a_far_step_closes_no_window(net):
    job = net.open(num_stages=1)
    audits = net.validators[0].role.audits
    audits.take_commitment(net.signed_commitment(job, 0, 0))
    audits.take_commitment(net.signed_commitment(job, 0, 60_000))
    audited = net.audited(net.validators[0], job)
    assert not any(audited.window_closed(commitment) for commitment in audited.commitments.values())


def test_commitments_after_the_end_of_a_job_are_refused(net):
    job = net.open(num_stages=1)
    audits = net.validators[0].role.audits
    audits.close(job.id, timeout_s=1)
    with pytest.raises(RecordError, match="has ended"):
        audits.take_commitment(net.signed_commitment(job, 0, 0))


def test_commitments_of_one_stage_are_kept_within_a_cap(net, monkeypatch):
    job = net.open()
    audits = net.validators[0].role.audits
    data = [net.signed_commitment(job, 0, step) for step in range(2)]
    monkeypatch.setattr(claim_books, "MAX_STAGE_BYTES", len(data[0]))
    audits.take_commitment(data[0])
    with pytest.raises(BusyError, match="wait to be settled"):
        audits.take_commitment(data[1])
    audits.take_commitment(net.signed_commitment(job, 1, 0))


# -- verdicts ---------------------------------------------------------------------------------------------------------


def _verdict(of_job, about: Commitment, signer, **changes):
    fields = {
        "job": of_job.id,
        "plan_version": 0,
        "replica": 0,
        "stage": about.stage,
        "step": about.step,
        "challenge": bytes(32),
        "commitment": about.digest(),
        "tier": 1,
        "unit": 0,
        "worker": about.worker,
        "auditor": signer.key,
        "finding": "honest",
        "reason": "",
        "evidence": bytes(32),
        "work_units": about.work_units,
        "decided_at_s": 1,
    }
    return signer.sign(Verdict(**{**fields, **changes}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"worker": bytes(32)}, "worker"),
        ({"stage": 1}, "stage"),
        ({"work_units": 99}, "work_units"),
        ({"unit": 7}, "tier and unit"),
        ({"tier": 2}, "tier and unit"),
        ({"commitment": bytes(32)}, "not held"),
        ({"job": bytes(32)}, "does not know"),
        ({"auditor": bytes(32)}, "assigned validator"),
    ],
)
def test_a_verdict_that_does_not_fit_its_commitment_is_refused(net, changes, complaint):
    job = net.open()
    validator = next(v for v in net.validators if v.key in net.audited(v, job).assigned)
    data = net.signed_commitment(job, 0, 0)
    validator.role.audits.take_commitment(data)
    commitment = Commitment.decode(Signed.decode(data).record)
    with pytest.raises(SmartnodesError, match=complaint):
        validator.role.audits.take_verdict(_verdict(job, commitment, validator, **changes))


def test_a_verdict_counts_only_if_the_seed_selects_its_unit_and_auditor(net, eventually):
    job = net.open(num_stages=1, audit={"unit_rate_ppm": 0})
    net.work(job, range(1))
    eventually(lambda: all(net.audited(v, job).drawn for v in net.validators))
    validator = next(v for v in net.validators if v.key in net.audited(v, job).assigned)
    commitment = next(iter(net.audited(validator, job).commitments.values()))
    validator.role.audits.take_verdict(_verdict(job, commitment, validator))
    assert validator.role.rounds.books.records.findings() == {}


def test_one_auditor_gives_one_verdict_about_a_unit(net):
    job = net.open(num_stages=1)
    validator = next(v for v in net.validators if v.key in net.audited(v, job).assigned)
    data = net.signed_commitment(job, 0, 0)
    commitment = Commitment.decode(Signed.decode(data).record)
    audited = net.audited(validator, job)
    audited.take(commitment, commitment.worker, data)
    first, second = (
        Verdict.decode(Signed.decode(_verdict(job, commitment, validator, decided_at_s=at)).record) for at in (1, 2)
    )
    assert audited.store_verdict(first, b"")
    assert not audited.store_verdict(first, b"")
    with pytest.raises(RecordError, match="two verdicts"):
        audited.store_verdict(second, b"")


# -- hostile calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["received_list", "reveal", "verdict", "fetch_commitment", "fetch_verdict"])
@pytest.mark.parametrize("value", [None, 10**12, -1, "text", [1], {}, True])
def test_parameters_of_the_wrong_type_are_a_protocol_error(net, method, value):
    name = {"received_list": "list", "fetch_commitment": "digest", "fetch_verdict": "digest"}.get(method, method)
    with pytest.raises(ProtocolError):
        net.validators[1].node.call(net.validators[0].key, method, {name: value})
    with pytest.raises(ProtocolError):
        net.validators[1].node.call(net.validators[0].key, method, {})


@pytest.mark.parametrize("method", ["received_list", "reveal", "verdict"])
def test_bytes_that_are_no_record_are_a_record_error(net, method):
    name = "list" if method == "received_list" else method
    for data in (b"", b"\xc1", b"\x80", net.validators[1].sign(net.record())):
        with pytest.raises(RecordError):
            net.validators[1].node.call(net.validators[0].key, method, {name: data})


def test_workers_and_users_have_no_say_in_the_draw(net):
    for citizen in (net.workers[0], net.user):
        for method in ("received_list", "reveal", "verdict", "propose"):
            with pytest.raises(AuthorityError, match="may not call"):
                citizen.node.call(net.validators[0].key, method, {})


def test_stages_beside_each_other_that_disagree_are_noted(net):
    job = net.open()
    audits = net.validators[0].role.audits
    audits.take_commitment(net.signed_commitment(job, 0, 0, num_units=3))
    audits.take_commitment(net.signed_commitment(job, 1, 0, num_units=2))
    faults = list(net.audited(net.validators[0], job).link_faults)
    assert faults == ["step 0: micro-batch 2 of call 0 is committed by stage 0 only"]


def test_stages_that_disagree_on_what_they_shared_are_noted_even_where_they_are_not_beside_each_other(net):
    job = net.open(num_stages=3)
    audits = net.validators[0].role.audits
    audits.take_commitment(net.signed_commitment(job, 0, 0, shared_roots={"to/2": bytes(32), "from/2": bytes(32)}))
    audits.take_commitment(net.signed_commitment(job, 1, 0))
    audits.take_commitment(net.signed_commitment(job, 2, 0, shared_roots={"to/0": bytes(32), "from/0": b"x" * 32}))
    faults = list(net.audited(net.validators[0], job).link_faults)
    assert faults == ["step 0: what stage 0 sent to stage 2 is not what 2 received"]


def test_what_is_settled_is_forgotten_and_cannot_come_back(net, eventually):
    job = net.open(num_stages=1)
    net.work(job, range(2))
    eventually(lambda: net.everyone_has(4, job))
    validator = net.validators[0]
    audited = net.audited(validator, job)
    first = next(digest for digest, c in audited.commitments.items() if c.step == 0)
    data = audited.signed[first]
    settled = {first, *(d for d, (v, _) in audited.verdicts.items() if v.commitment == first)}
    validator.role.audits.books.forget(settled)
    assert first not in audited.commitments
    assert len(audited.verdicts) == 2
    validator.role.audits.take_commitment(data)
    assert first not in audited.commitments
    with pytest.raises(RecordError, match="two commitments"):
        validator.role.audits.take_commitment(net.signed_commitment(job, 0, 0, wrong=True))


def test_a_settled_commitment_waits_for_verdicts_that_are_due(net, eventually):
    gate = threading.Event()
    opened = net.workers[0].handler.open
    net.workers[0].handler.open = lambda *args: gate.wait(60) and opened(*args)
    job = net.open(num_stages=1)
    net.work(job, range(1))
    audited = net.audited(net.validators[0], job)
    eventually(lambda: audited.drawn)
    net.validators[0].role.audits.books.forget(set(audited.commitments))
    assert audited.commitments
    gate.set()
    eventually(lambda: net.everyone_has(2, job))
    net.validators[0].role.audits.books.forget({*audited.commitments, *audited.verdicts})
    assert not audited.commitments
    assert not audited.lists


def test_a_closed_job_of_which_nothing_is_left_is_forgotten(net, eventually):
    job = net.open(num_stages=1)
    net.work(job, range(1))
    eventually(lambda: net.everyone_has(2, job))
    audits = net.validators[0].role.audits
    audited = audits.jobs[job.id]
    audits.close(job.id, timeout_s=1)
    audits.books.forget({*audited.commitments, *audited.verdicts})
    assert job.id not in audits.jobs


# -- lists and preimages ----------------------------------------------------------------------------------------------


def _listed(net, job, validator, reveal=1, commitments=None):
    return ReceivedList(
        job=job.id, validator=validator.key, reveal=reveal, commitments=commitments or [reveal.to_bytes(32)]
    )


def _assigned_and_other(net, job):
    assigned = net.audited(net.validators[0], job).assigned
    inside = [v for v in net.validators if v.key in assigned]
    outside = [v for v in net.validators if v.key not in assigned]
    return inside, outside


def test_two_lists_for_one_preimage_are_refused(net):
    job = net.open(num_stages=1)
    (first, second, *_), _ = _assigned_and_other(net, job)
    one, other = (_listed(net, job, first, 1, [bytes([n] * 32)]) for n in (1, 2))
    first.node.call(second.key, "received_list", {"list": first.sign(one)})
    with pytest.raises(RecordError, match="two lists"):
        first.node.call(second.key, "received_list", {"list": first.sign(other)})


def test_lists_of_validators_that_are_not_assigned_and_lists_out_of_bounds_are_refused(net):
    job = net.open(num_stages=1)
    (first, second, *_), (outsider, *_) = _assigned_and_other(net, job)

    def send(sender, received):
        sender.node.call(second.key, "received_list", {"list": sender.sign(received)})

    with pytest.raises(AuthorityError, match="assigned validator"):
        send(outsider, _listed(net, job, outsider))
    with pytest.raises(AuthorityError, match="assigned validator"):
        send(outsider, _listed(net, job, first))
    with pytest.raises(RecordError, match="1 to 256"):
        send(first, _listed(net, job, first, commitments=[bytes(32)] * 2))
    with pytest.raises(RecordError, match="1 to 256"):
        send(first, _listed(net, job, first, commitments=[bytes([n // 256, n % 256] * 16) for n in range(257)]))
    with pytest.raises(RecordError, match="1 to 256"):
        send(first, _listed(net, job, first, reveal=10**9))


def test_a_validator_cannot_list_without_end_what_nobody_has(net, monkeypatch):
    monkeypatch.setattr(draw_books, "MAX_UNKNOWN", 3)
    job = net.open(num_stages=1)
    (first, second, *_), _ = _assigned_and_other(net, job)
    lists = [first.sign(_listed(net, job, first, reveal)) for reveal in range(1, 5)]
    for data in lists[:3]:
        first.node.call(second.key, "received_list", {"list": data})
    with pytest.raises(BusyError, match="4 commitments are not known"):
        first.node.call(second.key, "received_list", {"list": lists[3]})


def test_a_preimage_is_taken_only_for_its_list_and_only_from_the_posted_chain(bare):
    job_validators = bare.validators
    bare.start(only=job_validators[:1])
    record = bare.record(num_stages=1)
    job = bare.job(record, bare.plan(record))
    judge = job_validators[0]
    judge.role.audits.open(job)
    data = bare.signed_commitment(job, 0, 0)
    drawn = bare.draw(job, Commitment.decode(Signed.decode(data).record))
    judge.role.audits.take_commitment(data)
    sender = next(v for v in drawn.assigned if v is not judge)
    place = drawn.assigned.index(sender)

    def reveal(record):
        sender.node.call(judge.key, "reveal", {"reveal": sender.sign(record)})

    good = drawn.reveals[place]
    with pytest.raises(RecordError, match="not fixed before"):
        reveal(good)
    sender.node.call(judge.key, "received_list", {"list": sender.sign(drawn.lists[place])})
    with pytest.raises(RecordError, match="does not lead to the tip"):
        reveal(msgspec.structs.replace(good, preimage=bytes(32)))
    with pytest.raises(RecordError, match="not fixed before"):
        reveal(msgspec.structs.replace(good, received_list=bytes(32)))
    reveal(good)
    reveal(good)
    assert (sender.key, 1) in judge.role.audits.jobs[job.id].reveals


def test_a_validator_that_never_lists_does_not_block_the_others_for_ever(make_net, eventually):
    net = make_net(settings=ValidatorSettings(list_interval_s=0.01, reveal_timeout_s=0.2, challenge_timeout_s=5))
    record = net.record(num_stages=1)
    assigned = assigned_validators(record.digest(), [v.key for v in net.validators])
    silent = next(v for v in net.validators if v.key == assigned[1])
    net.start(only=[v for v in net.validators if v is not silent])
    plan = net.plan(record)
    job = net.open(record, net.plan(record, validators=sorted(plan.validators, key=lambda key: key == silent.key)))
    net.work(job, range(1))
    awake = [v for v in net.validators if v.key in assigned and v is not silent]
    for validator in awake:
        eventually(lambda validator=validator: (validator.key, 1) in net.audited(validator, job).reveals)
    net.work(job, range(1, 2))
    for validator in awake:
        eventually(lambda validator=validator: (validator.key, 2) in net.audited(validator, job).reveals)
        assert not net.audited(validator, job).drawn
        indexes = [index for key, index in net.audited(validator, job).reveals if key == validator.key]
        assert indexes == sorted(indexes)


def test_closing_a_job_waits_for_its_audits(net, eventually):
    job = net.open(num_stages=1)
    net.work(job, range(4))
    net.user.role.close_job(job)
    eventually(lambda: all(net.audited(v, job).closed for v in net.validators))
    eventually(lambda: net.everyone_has(8, job))
    eventually(lambda: not net.workers[0].handler.stages)
    with pytest.raises(JobError):
        net.user.role.begin_call(StageOfJob(job, 0, 0), "work", {}, timeout_s=5).result()


def test_a_validator_whose_hash_chain_is_used_up_says_so_and_lists_no_more(net, eventually, caplog):
    job = net.open(num_stages=1)
    validator = next(v for v in net.validators if v.key in net.audited(v, job).assigned)
    validator.role.audits._draws._next_reveal = validator.hash_chain.length + 1
    net.work(job, range(1))
    eventually(lambda: "hash chain is used up" in caplog.text)
    assert not any(key == validator.key for key, _ in net.audited(validator, job).lists)


def test_a_validator_that_shows_what_it_named_too_slowly_is_given_up(net, monkeypatch):
    asker, slow = net.validators[:2]
    asked = []
    monkeypatch.setattr(asker.node, "call", lambda *args, **options: asked.append(args) or SimpleNamespace(body=b""))
    digests = [bytes([number]) * 32 for number in range(5)]
    asker.role.audits.fetch_missing(slow.key, digests, [])
    assert len(asked) == 5
    monkeypatch.setattr("smartnodes_core.nodes.auditing.MAX_FETCH_S", -1.0)  # it is over at once
    asker.role.audits.fetch_missing(slow.key, digests, [])
    assert len(asked) == 5


def test_steps_shown_all_at_once_are_not_payable_before_what_was_drawn_of_them_is_examined(net, eventually):
    worker, may_open = net.workers[0], threading.Event()
    opened = worker.handler.open
    worker.handler.open = lambda *args: may_open.wait(60) and opened(*args)
    job = net.open(num_stages=1)
    net.work(job, range(6))
    validator = net.validators[0]
    audited, records = net.audited(validator, job), validator.role.rounds.books.records
    eventually(lambda: len(audited.drawn) == 6)
    assert records.payable() == {}
    may_open.set()
    eventually(lambda: net.everyone_has(12, job))
    assert sorted(each.step for each in records.payable().values()) == [0, 1, 2, 3]


def test_who_withholds_a_verdict_delays_the_pay_for_the_seconds_of_the_window_at_most(net, eventually):
    worker, never = net.workers[0], threading.Event()
    worker.handler.open = lambda *args: never.wait(60)
    job = net.open(num_stages=1)
    net.work(job, range(3))
    validator = net.validators[0]
    audited, records = net.audited(validator, job), validator.role.rounds.books.records
    eventually(lambda: len(audited.drawn) == 3)
    assert records.payable() == {}
    [first] = [digest for digest, commitment in audited.commitments.items() if commitment.step == 0]
    audited.came_at_s[first] -= job.record.audit.window_s
    assert list(records.payable()) == [first]
    never.set()


# -- links that disagree ----------------------------------------------------------------------------------------------


def _bends_a_link(net, step):
    """The first worker says that it sent something else for one unit of a step than the second says it received."""
    handler = net.workers[0].handler
    commit = handler.port.commit

    def bent(stage, content):
        if content["step"] == step and stage.stage == 0:
            content["units"][1]["roots"]["y"] = bytes(32)
        commit(stage, content)

    handler.port = SimpleNamespace(commit=bent)


def _payable(net, job):
    records = net.validators[0].role.rounds.books.records
    return sorted((each.step, each.stage) for each in records.payable().values() if each.job == job.id)


def test_a_unit_over_which_two_ends_of_a_link_disagree_is_audited_at_both_and_paid_at_neither(net, eventually):
    _bends_a_link(net, 1)
    job = net.open(audit={"unit_rate_ppm": 0, "window_steps": 1})
    net.work(job, range(4))
    eventually(lambda: net.everyone_has(2, job))
    audited = net.audited(net.validators[0], job)
    verdicts = [verdict for verdict, _ in audited.verdicts.values()]
    assert {(v.step, v.stage, v.tier, v.unit) for v in verdicts} == {(1, 0, 1, 1), (1, 1, 1, 1)}
    assert {v.finding for v in verdicts} == {"honest"}
    eventually(lambda: _payable(net, job) == [(0, 0), (0, 1), (2, 0), (2, 1)])


def test_who_disagrees_with_a_convict_is_paid(net, eventually):
    _bends_a_link(net, 1)
    net.workers[0].handler.wrong = {1}
    job = net.open(audit={"unit_rate_ppm": 0, "window_steps": 1})
    net.work(job, range(4))
    eventually(lambda: (1, 1) in _payable(net, job))
    audited = net.audited(net.validators[0], job)
    found = {verdict.stage: verdict.finding for verdict, _ in audited.verdicts.values()}
    assert found == {0: "fraudulent", 1: "honest"}


def test_an_audit_that_the_seed_does_not_select_is_refused_without_the_papers_that_ask_for_it(net, eventually):
    _bends_a_link(net, 0)
    job = net.open(audit={"unit_rate_ppm": 0})
    net.work(job, range(1))
    eventually(lambda: net.everyone_has(2, job))
    case = next(case for v in net.validators for case in v.auditor.cases if case.commitment.stage == 1)
    auditor = next(v for v in net.validators if v.key == case.challenge.auditor)
    (draw,) = net.audited(auditor, job).draws(case.commitment.digest())
    params = {
        "key": StageOfJob(job, 1, 0).key,
        "challenge": auditor.sign(case.challenge),
        "lists": [data for _, data in draw.lists.values()],
        "reveals": [data for _, data in draw.reveals.values()],
    }

    def ask(*papers):
        return auditor.node.call(net.workers[1].key, "challenge", params, [msgspec.msgpack.encode(list(papers))])

    grounds = net.audited(auditor, job).grounds(case.commitment.digest())
    assert ask(*grounds).body
    agreeing = net.signed_commitment(job, 0, 0)
    later = net.signed_commitment(job, 0, 1)
    foreign = net.signed_commitment(job, 0, 0, signer=net.workers[2], num_units=1)
    own = net.signed_commitment(job, 1, 0, num_units=1)
    for papers in ((), (agreeing,), (later,), (foreign,), (own,), grounds * 17, (b"",), (case.challenge.encode(),)):
        with pytest.raises(SmartnodesError):
            ask(*papers)
    with pytest.raises(RecordError, match="list of papers"):
        auditor.node.call(net.workers[1].key, "challenge", params, [b"\xc1"])
