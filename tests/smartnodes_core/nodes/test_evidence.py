"""Fraud is confirmed only with what the accused worker itself signed."""

from __future__ import annotations

import msgspec
import pytest
from blake3 import blake3

from smartnodes_core.errors import AuthorityError, ProtocolError, RecordError, SignatureError
from smartnodes_core.evidence import case_of, check_draw, check_verdict, signed_verdict, split
from smartnodes_core.identity import verify
from smartnodes_core.records import Commitment, Evidence, JobRecord, Plan, Signed


@pytest.fixture
def fraud(net, eventually):
    """A fraud verdict with the evidence of its auditor: (verdict, evidence, body, auditor)."""
    net.workers[0].handler.wrong = {0}
    job = net.open(num_stages=1)
    net.work(job, range(1), num_units=1)
    eventually(lambda: net.everyone_has(1, job))
    eventually(lambda: all(net.audited(v, job).confirmed for v in net.validators))
    verdict = next(iter(net.audited(net.validators[0], job).verdicts.values()))[0]
    auditor = next(v for v in net.validators if v.key == verdict.auditor)
    record, body = auditor.role.evidence._shelf.get(verdict.evidence)
    return verdict, Evidence.decode(record), body, auditor


def judge(told, accused, body):
    """As a validator that is to sign for the verdict."""
    case = case_of(told, body)
    check_verdict(accused, told, case)
    return case


def test_evidence_tells_the_whole_case(fraud):
    verdict, kept, body, _ = fraud
    case = judge(kept, verdict, body)
    check_draw(kept, case)
    assert case.commitment.digest() == verdict.commitment
    assert case.challenge.digest() == verdict.challenge
    assert case.order == b"the order"


def test_evidence_is_shown_to_the_author_of_the_job_and_to_no_other_user_or_worker(net, fraud):
    verdict, kept, body, auditor = fraud
    found = net.user.node.call(
        auditor.key, "evidence", {"digest": verdict.evidence}, max_body_bytes=len(kept.encode()) + len(body)
    )
    assert found.body[: found.params["record_bytes"]] == kept.encode()
    for other in (net.citizen(22, "user"), net.workers[0]):
        other.node.add_address(auditor.key, auditor.node.endpoint)
        with pytest.raises(AuthorityError):
            other.node.call(auditor.key, "evidence", {"digest": verdict.evidence})


def test_the_verdict_lies_behind_its_evidence(fraud):
    verdict, _, _, auditor = fraud
    file = split(auditor.role.evidence._shelf._load(verdict.evidence))
    assert signed_verdict(file.verdict) == verdict


def test_no_part_of_it_can_be_the_auditors_own(net, fraud):
    verdict, kept, body, auditor = fraud
    change = msgspec.structs.replace
    own = auditor.identity.sign
    job = verify(Signed.decode(kept.job), JobRecord)
    plan = verify(Signed.decode(kept.plan), Plan)
    forged = own(_decode_opened(Signed.decode(kept.opening))).encode()
    other_body = memoryview(b"\1" * len(body))
    commitment = Commitment.decode(Signed.decode(kept.commitment).record)
    mine = own(change(job, author=auditor.key))
    cases = [
        (change(kept, job=own(job).encode()), verdict, body, "job .*by its author"),
        (change(kept, job=mine.encode()), verdict, body, "plan .*another job"),
        (change(kept, plan=own(plan).encode()), verdict, body, "plan .*not signed by the job's author"),
        (change(kept, spec=b"another"), verdict, body, "spec"),
        (change(kept, opening=forged), verdict, body, "not the worker's"),
        (change(kept, opening=b""), verdict, body, "opening .*not a Signed"),
        (change(kept, order=b"another"), verdict, body, "order is not the one that the worker showed"),
        (kept, verdict, other_body, "not those of the evidence"),
        (change(kept, body_digest=blake3(other_body).digest()), verdict, other_body, "not the one that the worker"),
        (change(kept, commitment=own(commitment).encode()), verdict, body, "not signed by the worker"),
        (kept, change(verdict, worker=auditor.key), body, "verdict .*: worker$"),
        (kept, change(verdict, unit=5), body, "verdict .*: unit$"),
        (kept, change(verdict, challenge=bytes(32)), body, "verdict .*: challenge$"),
        (kept, change(verdict, finding="honest"), body, "verdict .*: finding$"),
        (change(kept, lists=[]), verdict, body, "verdict .*: evidence$"),
    ]
    for told, accused, opened, complaint in cases:
        with pytest.raises((RecordError, SignatureError), match=complaint):
            judge(told, accused, opened)


def _decode_opened(signed):
    from smartnodes_core.audit import Opened

    return Opened.decode(signed.record)


def test_a_fraud_that_others_cannot_re_run_is_not_confirmed(net, fraud, eventually):
    verdict, _, _, auditor = fraud
    told = []
    judge = next(v for v in net.validators if v is not auditor)
    judge.role.evidence.on_confirmed = told.append
    honest = judge.auditor.examine
    judge.auditor.examine = lambda case, body: ("honest", "equal after all")
    judge.role.evidence.confirm(verdict)
    eventually(lambda: not judge.role.evidence._waiting)
    assert told == []
    judge.auditor.examine = honest
    judge.role.evidence.confirm(verdict)
    eventually(lambda: told == [verdict])


def test_evidence_that_its_auditor_does_not_give_confirms_nothing(net, fraud, eventually):
    verdict, _, _, auditor = fraud
    judge = next(v for v in net.validators if v is not auditor)
    told = []
    judge.role.evidence.on_confirmed = told.append
    auditor.role.evidence._shelf._drop(verdict.evidence)
    judge.role.evidence.confirm(verdict)
    eventually(lambda: not judge.role.evidence._waiting)
    assert told == []


@pytest.mark.parametrize("digest", [None, 10**13, b"", "x"])
def test_asking_for_evidence_takes_a_digest(net, digest):
    with pytest.raises(ProtocolError):
        net.validators[0].node.call(net.validators[1].key, "evidence", {"digest": digest})
    with pytest.raises(RecordError, match="no such evidence"):
        net.validators[0].node.call(net.validators[1].key, "evidence", {"digest": bytes(32)})
