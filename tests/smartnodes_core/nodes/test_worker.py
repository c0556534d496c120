"""A worker does what its author and the draw say, and nothing that anybody else does."""

from __future__ import annotations

import threading

import msgspec
import pytest

from smartnodes_core.errors import (
    AuditError,
    AuthorityError,
    BusyError,
    JobError,
    NoWorkersError,
    PeerFault,
    ProtocolError,
    RecordError,
)
from smartnodes_core.jobs import StageOfJob
from smartnodes_core.journal import Journal
from smartnodes_core.nodes import worker as module
from smartnodes_core.nodes.ledgers import MAX_OPENINGS
from smartnodes_core.records import Commitment, Signed, Verdict


@pytest.fixture
def stage(bare):
    """A stage on the first worker, assigned by a validator that the test plays; and its job."""
    record = bare.record(num_stages=2)
    job = bare.job(record, bare.plan(record))
    assign(bare, job, bare.workers[0])
    return StageOfJob(job, 0, 0)


def assign(net, job, worker, validator=None):
    sender = validator or net.validators[0]
    return sender.node.call(worker.key, "assign", {"job": job.signed_record, "plan": job.signed_plan})


def listen(net, stage):
    """The author hears of the stage, as one that opened the job does."""
    net.user.role._jobs[stage.job.id] = (stage.job, net.heard)
    net.user.node.reach(net.workers[0].key)


def committed(net, stage, step=0) -> Commitment:
    net.workers[0].handler.work(stage, step)
    ledger = net.workers[0].role._held.ledgers[stage.key]
    return list(ledger.commitments.values())[-1]


# -- placement --------------------------------------------------------------------------------------------------------


def test_a_worker_takes_the_stages_of_its_plan_and_takes_them_once(bare, stage):
    worker = bare.workers[0]
    assert list(worker.handler.stages) == [stage.key]
    assert worker.role.num_free_slots == 0
    assert assign(bare, stage.job, worker, bare.validators[1]).params == {"stages": [0]}
    assert worker.role.num_free_slots == 0


def test_assigning_is_refused_when_no_slot_is_free(bare, stage):
    record = bare.record()
    with pytest.raises(BusyError, match="0 of 1 slots"):
        assign(bare, bare.job(record, bare.plan(record)), bare.workers[0])


def test_a_slot_holds_all_stages_of_a_job_and_a_job_has_so_many_at_most(bare):
    worker = bare.workers[0]
    record = bare.record(num_stages=3)
    job = bare.job(record, bare.plan(record, workers=[worker, bare.workers[1], worker]))
    assert assign(bare, job, worker).params == {"stages": [0, 2]}
    assert worker.role.num_free_slots == 0
    record = bare.record(num_stages=module.MAX_STAGES_PER_JOB + 1)
    with pytest.raises(JobError, match="9 stages of one job asked for, at most 8"):
        assign(bare, bare.job(record, bare.plan(record, workers=[worker] * record.num_stages)), worker)


def test_a_job_that_pays_less_than_the_rig_asks_is_refused(bare):
    bare.workers[0].role._asks_wei = 5
    record = bare.record()
    with pytest.raises(JobError, match="asks 5 wei for 1000000000000 units of work, the job pays less"):
        assign(bare, bare.job(record, bare.plan(record)), bare.workers[0])
    paying = bare.record(terms={"price_wei": 5, "price_per_units": 10**12})
    assert assign(bare, bare.job(paying, bare.plan(paying)), bare.workers[0]).params == {"stages": [0]}


def test_only_validators_of_the_plan_assign(bare):
    record = bare.record()
    job = bare.job(record, bare.plan(record, validators=[bare.validators[1].key]))
    with pytest.raises(AuthorityError, match="validator of the job's plan"):
        assign(bare, job, bare.workers[0])
    with pytest.raises(JobError, match="no stage"):
        assign(bare, job, bare.workers[2], bare.validators[1])
    with pytest.raises(AuthorityError, match="may not call"):
        bare.user.node.call(bare.workers[0].key, "assign", {})


def test_all_stages_of_a_worker_are_taken_or_none(bare):
    worker = bare.workers[0]
    worker.handler.refuse_stage = 1
    record = bare.record()
    job = bare.job(record, bare.plan(record, workers=[worker, worker]))
    with pytest.raises(PeerFault, match="not that stage"):
        assign(bare, job, worker)
    assert worker.handler.stages == {}
    assert worker.role.num_free_slots == 1


def test_two_plans_of_one_version_are_not_both_taken(bare, stage):
    other = bare.job(stage.job.record, bare.plan(stage.job.record, reason="another"))
    with pytest.raises(JobError, match="plan 0 was sent, and the job runs here under plan 0"):
        assign(bare, other, bare.workers[0])


def newer(net, stage, **changes):
    return net.job(stage.job.record, net.plan(stage.job.record, version=1, **changes))


def test_a_newer_plan_takes_no_slot_more_and_what_is_sent_under_the_older_one_is_refused(bare, stage):
    worker, job = bare.workers[0], newer(bare, stage)
    assert assign(bare, job, worker).params == {"stages": [0]}
    now = StageOfJob(job, 0, 0)
    assert sorted(worker.handler.stages) == sorted([stage.key, now.key])  # the older one can be audited still
    call = {"method": "anything", "params": {}}
    assert bare.user.node.call(worker.key, "job", {"key": now.key, **call}).params == {"method": "anything"}
    with pytest.raises(JobError, match="runs under a newer plan now"):
        bare.user.node.call(worker.key, "job", {"key": stage.key, **call})
    with pytest.raises(JobError, match="plan 0 was sent, and the job runs here under plan 1"):
        assign(bare, stage.job, worker)


def test_a_newer_plan_without_a_worker_takes_its_stage_away_once_it_was_audited(bare, stage, monkeypatch, eventually):
    monkeypatch.setattr(module, "SUPERSEDED_KEEP_S", 0.0)
    worker = bare.workers[0]
    job = newer(bare, stage, workers=[bare.workers[2], bare.workers[1]])
    assert assign(bare, job, worker).params == {"stages": []}
    eventually(lambda: worker.handler.released == [stage.key])
    assert worker.role.num_free_slots == 1


def test_of_many_newer_plans_the_stages_of_the_oldest_are_dropped_at_once(bare, stage, monkeypatch):
    monkeypatch.setattr(module, "MAX_SUPERSEDED", 2)
    record = stage.job.record
    for version in range(1, 5):
        assign(bare, bare.job(record, bare.plan(record, version=version)), bare.workers[0])
    versions = [int(key.split("/")[1]) for key in bare.workers[0].handler.stages]
    assert versions == [2, 3, 4]


# -- who drives a stage -----------------------------------------------------------------------------------------------


def test_only_the_author_drives_a_stage(bare, stage):
    stranger = bare.citizen(22, "user")
    stranger.node.add_address(bare.workers[0].key, bare.workers[0].node.endpoint)
    call = {"key": stage.key, "method": "anything", "params": {}}
    assert bare.user.node.call(bare.workers[0].key, "job", call).params == {"method": "anything"}
    with pytest.raises(AuthorityError, match="only the author"):
        stranger.node.call(bare.workers[0].key, "job", call)
    with pytest.raises(AuthorityError, match="may not call"):
        bare.validators[0].node.call(bare.workers[0].key, "job", call)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"key": 1, "method": "m", "params": {}},
        {"key": "k" * 300, "method": "m", "params": {}},
        {"key": None, "method": "m", "params": {}},
    ],
)
def test_a_call_out_of_shape_is_a_protocol_error(bare, stage, params):
    with pytest.raises(ProtocolError):
        bare.user.node.call(bare.workers[0].key, "job", params)


@pytest.mark.parametrize("changes", [{"method": 5}, {"params": []}, {"params": None}])
def test_a_call_of_the_author_is_checked_too(bare, stage, changes):
    with pytest.raises(ProtocolError):
        bare.user.node.call(bare.workers[0].key, "job", {"key": stage.key, "method": "m", "params": {}, **changes})


def test_frames_come_from_the_author_and_other_workers_of_the_job_only(bare, stage, eventually):
    worker, neighbour, stranger = bare.workers
    for sender in (bare.user, neighbour):
        sender.node.stream(worker.key, "job", {"key": stage.key}, [b"tensor"])
    eventually(lambda: worker.handler.frames == [b"tensor", b"tensor"])
    stranger.node.reach(worker.key)
    stranger.node.stream(worker.key, "job", {"key": stage.key}, [b"poison"])
    eventually(lambda: worker.key not in [peer.node_key for peer in stranger.node.peers()])
    assert len(worker.handler.frames) == 2


def test_a_frame_to_another_stage_of_the_same_worker_stays_on_it(bare):
    worker = bare.workers[0]
    record = bare.record(num_stages=2)
    job = bare.job(record, bare.plan(record, workers=[worker, worker]))
    assign(bare, job, worker)
    sent = []
    worker.role.stream(worker.key, {"key": StageOfJob(job, 1, 0).key}, memoryview(b"tensor"), lambda: sent.append(1))
    assert (worker.handler.frames, sent) == ([b"tensor"], [1])
    with pytest.raises(JobError, match="does not run that stage"):
        worker.role.stream(worker.key, {"key": "nothing"}, memoryview(b"tensor"), lambda: sent.append(2))
    assert sent == [1]


def test_a_frame_for_no_stage_is_skipped(bare, stage, eventually):
    bare.user.node.stream(bare.workers[0].key, "job", {"key": "nothing"}, [b"x"])
    eventually(lambda: bare.workers[0].node._rpc.num_refused_streams == 1)
    bare.user.node.stream(bare.workers[0].key, "job", {"key": stage.key}, [b"good"])
    eventually(lambda: bare.workers[0].handler.frames == [b"good"])


# -- commitments ------------------------------------------------------------------------------------------------------


def test_each_commitment_names_the_one_before(bare, stage):
    first, second = committed(bare, stage, 0), committed(bare, stage, 1)
    assert (first.previous, second.previous) == (stage.job.id, first.digest())


def test_a_worker_never_signs_a_second_version_of_a_step(bare, stage, eventually, tmp_path):
    worker = bare.workers[0]
    worker.role._journal = journal = Journal(tmp_path / "journal")
    listen(bare, stage)
    first = committed(bare, stage, 0)
    journal.close()
    worker.role._journal = Journal(tmp_path / "journal")
    worker.handler.wrong = {0}
    worker.handler.work(stage, 0)
    assert list(worker.role._held.ledgers[stage.key].commitments.values()) == [first]
    event = eventually(lambda: [each for each in bare.heard.events if each[1] == "failed"])[0]
    assert event[2]["code"] == "equivocation"


def test_a_validator_that_is_down_does_not_hold_up_the_worker(bare, stage, eventually):
    gate = threading.Event()
    worker = bare.workers[0]
    notify = worker.node.notify
    down = bare.validators[2].key

    def slow(peer, *args, **kwargs):
        if peer == down:
            gate.wait(60)
        return notify(peer, *args, **kwargs)

    worker.node.notify = slow
    listen(bare, stage)
    for step in range(3):
        committed(bare, stage, step)
    eventually(lambda: len(bare.heard.commitments) == 3)
    gate.set()


def test_commitments_beyond_the_window_are_forgotten(bare, stage):
    for step in range(40):
        bare.workers[0].handler.work(stage, step)
    assert len(bare.workers[0].role._held.ledgers[stage.key].commitments) == 2 + 16


# -- challenges -------------------------------------------------------------------------------------------------------


def ask(net, drawn, params=None, sender=None):
    return (sender or drawn.auditor).node.call(net.workers[0].key, "challenge", params or drawn.params())


def test_a_drawn_challenge_is_opened(bare, stage):
    drawn = bare.draw(stage.job, committed(bare, stage))
    reply = ask(bare, drawn)
    order_at = reply.params["opening_bytes"]
    assert bytes(reply.body[order_at : order_at + reply.params["order_bytes"]]) == b"the order"


def test_a_challenge_that_the_seed_does_not_select_is_refused_without_opening(bare, stage):
    drawn = bare.draw(stage.job, committed(bare, stage))
    other = next(v for v in bare.validators if v is not drawn.auditor)
    cases = [
        (drawn.params(drawn.challenge(unit=9)), drawn.auditor, "does not select"),
        (drawn.params(drawn.challenge(tier=2, unit=-1)), drawn.auditor, "does not select"),
        (drawn.params(drawn.challenge(seed=bytes(32))), drawn.auditor, "does not follow"),
        (drawn.params(drawn.challenge(auditor=other.key), signer=other), other, "does not select"),
        (drawn.params(drawn.challenge(commitment=bytes(32))), drawn.auditor, "no such commitment"),
        (drawn.params(reveals=[]), drawn.auditor, "0 preimages"),
        (drawn.params(lists=[]), drawn.auditor, "list that does not hold"),
    ]
    for params, sender, complaint in cases:
        with pytest.raises(AuditError, match=complaint):
            ask(bare, drawn, params, sender)
    assert bare.workers[0].handler.num_openings == 0


def test_preimages_and_lists_that_do_not_hold_are_refused(bare, stage):
    drawn = bare.draw(stage.job, committed(bare, stage))
    change = msgspec.structs.replace
    wrong = [change(drawn.reveals[0], preimage=bytes(32)), *drawn.reveals[1:]]
    signed = [v.sign(item) for v, item in zip(drawn.assigned, wrong, strict=True)]
    with pytest.raises(AuditError, match="does not lead to the tip"):
        ask(bare, drawn, drawn.params(reveals=signed))
    other = [change(drawn.lists[0], commitments=[bytes(32)]), *drawn.lists[1:]]
    signed = [v.sign(item) for v, item in zip(drawn.assigned, other, strict=True)]
    with pytest.raises(AuditError, match="list that does not hold"):
        ask(bare, drawn, drawn.params(lists=signed))
    forged = [drawn.auditor.sign(item) for item in drawn.lists]
    with pytest.raises(AuthorityError, match="signed by the validator it names"):
        ask(bare, drawn, drawn.params(lists=forged))


def test_a_challenge_is_signed_by_the_auditor_that_it_names_and_any_validator_of_the_plan_may_show_it(bare, stage):
    drawn = bare.draw(stage.job, committed(bare, stage))
    other = next(v for v in bare.validators if v is not drawn.auditor)
    ask(bare, drawn, sender=other)  # its auditor has another ask: its own way here may be broken
    with pytest.raises(AuthorityError, match="signed by its auditor"):
        ask(bare, drawn, drawn.params(signer=other), other)
    with pytest.raises(AuthorityError, match="may not call"):
        ask(bare, drawn, sender=bare.user)


def test_one_unit_is_not_opened_without_end(bare, stage):
    drawn = bare.draw(stage.job, committed(bare, stage))
    for _ in range(MAX_OPENINGS):
        ask(bare, drawn)
    with pytest.raises(AuditError, match="times already"):
        ask(bare, drawn)
    assert bare.workers[0].handler.num_openings == MAX_OPENINGS


@pytest.mark.parametrize(
    "changes",
    [
        {"challenge": None},
        {"challenge": 1 << 40},
        {"lists": None},
        {"lists": [1, 2]},
        {"lists": [b""] * 4},
        {"reveals": {}},
        {"key": b"bytes"},
    ],
)
def test_a_challenge_out_of_shape_is_a_protocol_error(bare, stage, changes):
    drawn = bare.draw(stage.job, committed(bare, stage))
    with pytest.raises(ProtocolError):
        ask(bare, drawn, drawn.params(**changes))


def test_bytes_that_are_no_records_are_a_record_error(bare, stage):
    drawn = bare.draw(stage.job, committed(bare, stage))
    for changes in ({"challenge": b"x"}, {"lists": [b"x"]}, {"reveals": [drawn.auditor.sign(drawn.lists[0])]}):
        with pytest.raises(RecordError):
            ask(bare, drawn, drawn.params(**changes))


@pytest.mark.parametrize("method", ["assign", "release", "spec", "verdict", "challenge"])
@pytest.mark.parametrize("value", [None, 1 << 40, [], "x" * 1000])
def test_parameters_of_the_wrong_type_are_a_protocol_error(bare, stage, method, value):
    names = ("job", "plan", "key", "verdict", "challenge", "reason", "lists", "reveals")
    with pytest.raises(ProtocolError):
        bare.validators[0].node.call(bare.workers[0].key, method, dict.fromkeys(names, value))


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_worker_hears_verdicts_about_itself_from_auditors_of_its_jobs(bare, stage):
    worker, auditor = bare.workers[0], bare.validators[0]
    verdict = Verdict(
        job=stage.job.id,
        plan_version=0,
        replica=0,
        stage=0,
        step=0,
        challenge=bytes(32),
        commitment=bytes(32),
        tier=1,
        unit=0,
        worker=worker.key,
        auditor=auditor.key,
        finding="honest",
        reason="",
        evidence=bytes(32),
        work_units=1,
        decided_at_s=1,
    )
    auditor.node.call(worker.key, "verdict", {"verdict": auditor.sign(verdict)})
    assert list(worker.role.verdicts) == [verdict]
    change = msgspec.structs.replace
    for told, signer in ((change(verdict, worker=bytes(32)), auditor), (verdict, bare.validators[1])):
        with pytest.raises(AuthorityError):
            auditor.node.call(worker.key, "verdict", {"verdict": signer.sign(told)})
    elsewhere = change(verdict, job=bytes(32))
    auditor.node.call(worker.key, "verdict", {"verdict": auditor.sign(elsewhere)})
    assert list(worker.role.verdicts) == [verdict]


# -- endings ----------------------------------------------------------------------------------------------------------


def release(net, stage, *validators):
    for validator in validators:
        validator.node.call(net.workers[0].key, "release", {"job": stage.job.id, "reason": "done"})


def test_a_stage_goes_when_all_its_validators_need_it_no_more(bare, stage):
    release(bare, stage, *bare.validators[:3])
    assert bare.workers[0].role.num_free_slots == 0
    release(bare, stage, bare.validators[3])
    assert bare.workers[0].role.num_free_slots == 1
    assert bare.workers[0].handler.released == [stage.key]


def test_one_validator_alone_cannot_end_a_stage(bare, stage, monkeypatch, eventually):
    monkeypatch.setattr(module, "RELEASE_TIMEOUT_S", 0.05)
    release(bare, stage, bare.validators[0], bare.validators[0])
    assert bare.workers[0].role._held.ledgers[stage.key].timer is None
    release(bare, stage, bare.validators[1])
    eventually(lambda: bare.workers[0].role.num_free_slots == 1)


def test_stages_of_an_author_that_is_gone_are_freed_after_a_while(bare, stage, monkeypatch, eventually):
    monkeypatch.setattr(module, "RELEASE_TIMEOUT_S", 0.1)
    bare.user.node.reach(bare.workers[0].key)
    bare.hub.cut(bare.user.key)
    eventually(lambda: bare.workers[0].role.num_free_slots == 1)


def test_an_author_that_is_back_in_time_keeps_its_stages(bare, stage, monkeypatch, eventually):
    monkeypatch.setattr(module, "RELEASE_TIMEOUT_S", 60.0)
    worker = bare.workers[0]
    ledger = worker.role._held.ledgers[stage.key]
    bare.user.role.begin_call(stage, "work", {"step": 0}, timeout_s=20).result()
    worker.node.drop(bare.user.key, "a test")
    timer = eventually(lambda: ledger.timer)
    bare.user.role.begin_call(stage, "work", {"step": 1}, timeout_s=20).result()
    assert (ledger.timer, timer.finished.is_set()) == (None, True)
    worker.node.drop(bare.user.key, "a test")
    eventually(lambda: ledger.timer)
    for validator in bare.validators[:2]:  # so many that one is honest: the job has ended
        validator.node.call(worker.key, "release", {"job": stage.job.id, "reason": "completed"})
    bare.user.role.begin_call(stage, "work", {"step": 2}, timeout_s=20).result()
    assert not ledger.timer.finished.is_set()
    worker.role._drop(stage, "the test ends")


def test_stages_of_an_author_that_is_gone_are_freed_at_once_when_their_audits_are_through(bare, stage, eventually):
    bare.user.node.reach(bare.workers[0].key)
    bare.hub.cut(bare.user.key)
    eventually(lambda: bare.workers[0].role._held.ledgers[stage.key].timer is not None)
    release(bare, stage, *bare.validators)
    assert bare.workers[0].role.num_free_slots == 1


def test_a_rig_that_drains_tells_its_authors(bare, stage, eventually):
    listen(bare, stage)
    bare.workers[0].role.drain("power cut")
    event = eventually(lambda: bare.heard.events)[0]
    assert event[:2] == (0, "failed")
    assert "power cut" in event[2]["message"]
    assert bare.workers[0].role.num_free_slots == 1


def test_only_validators_of_the_plan_see_specs_and_release(bare):
    record = bare.record()
    job = bare.job(record, bare.plan(record, validators=[bare.validators[1].key]))
    assign(bare, job, bare.workers[0], bare.validators[1])
    key = StageOfJob(job, 0, 0).key
    assert bytes(bare.validators[1].node.call(bare.workers[0].key, "spec", {"key": key}).body)
    for method, params in (("spec", {"key": key}), ("release", {"job": job.id})):
        with pytest.raises(AuthorityError, match="validator of the job's plan"):
            bare.validators[0].node.call(bare.workers[0].key, method, params)


def test_what_a_worker_cannot_take_reaches_the_user_as_no_workers(net):
    net.open()
    with pytest.raises(NoWorkersError, match="slots are free"):
        net.open()


def test_signed_commitments_name_their_worker(bare, stage, eventually):
    bare.start()
    for validator in bare.validators:
        validator.role.audits.open(stage.job)
    commitment = committed(bare, stage)
    digest = commitment.digest()
    eventually(lambda: all(digest in v.role.audits.jobs[stage.job.id].signed for v in bare.validators))
    signed = Signed.decode(bare.validators[0].role.audits.jobs[stage.job.id].signed[digest])
    assert signed.signer == bare.workers[0].key == commitment.worker
