from __future__ import annotations

import time
from typing import Any

import pytest

from smartnodes_core.errors import JobError, RecordError, SignatureError
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import MAX_WINDOW_STEPS, Job, StageOfJob
from smartnodes_core.records import NO_DIGEST, Assignment, AuditTerms, JobRecord, Plan

AUTHOR, OTHER = Identity.from_seed(b"a" * 32), Identity.from_seed(b"o" * 32)
WORKERS = [bytes([number] * 32) for number in (1, 2)]


def record_of(**changes: Any) -> JobRecord:
    audit = AuditTerms(unit_rate_ppm=0, step_rate_ppm=0, window_steps=4, window_s=1, auditors=[])
    fields: dict[str, Any] = {
        "network_id": 1,
        "job_type": "t",
        "author": AUTHOR.node_key,
        "nonce": bytes(32),
        "created_at_s": int(time.time()),
        "num_stages": 2,
        "num_replicas": 1,
        "specs": [NO_DIGEST] * 2,
        "initial_roots": [NO_DIGEST] * 2,
        "work_units": [1, 1],
        "audit": audit,
        "terms": {},
    }
    return JobRecord(**{**fields, **changes})


def assignment(stage: int, worker: int, replica: int = 0, endpoint: str = "10.0.0.1:1") -> Assignment:
    return Assignment(stage=stage, replica=replica, worker=WORKERS[worker], endpoint=endpoint)


def plan_of(record: JobRecord, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "job": record.digest(),
        "version": 0,
        "assignments": [assignment(0, 0), assignment(1, 1)],
        "spares": [],
        "validators": [b"v" * 32],
        "reason": "",
    }
    return Plan(**{**fields, **changes})


def open_job(record: JobRecord, plan: Plan, signers: tuple[Identity, Identity] = (AUTHOR, AUTHOR)) -> Job:
    return Job.open(signers[0].sign(record).encode(), signers[1].sign(plan).encode())


def test_a_job_knows_its_stages_their_workers_and_neighbours():
    record = record_of()
    job = open_job(record, plan_of(record))
    assert job.id == record.digest()
    first, second = (StageOfJob(job, stage, 0) for stage in (0, 1))
    assert (first.previous, first.next) == (None, WORKERS[1])
    assert (second.previous, second.next) == (WORKERS[0], None)
    assert job.stages_of(WORKERS[1]) == [second]
    assert first.key == f"{job.id.hex()}/0/0"
    assert first.author == AUTHOR.node_key
    with pytest.raises(JobError, match="no worker runs stage 5"):
        job.worker_of(5)


@pytest.mark.parametrize("signers", [(OTHER, AUTHOR), (AUTHOR, OTHER)])
def test_record_and_plan_are_signed_by_the_author(signers):
    record = record_of()
    with pytest.raises(RecordError, match="author"):
        open_job(record, plan_of(record), signers)


def test_a_forged_signature_is_refused():
    record = record_of()
    signed = bytearray(AUTHOR.sign(record).encode())
    signed[-1] ^= 1
    with pytest.raises(SignatureError):
        Job.open(bytes(signed), AUTHOR.sign(plan_of(record)).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"job": bytes(32)},
        {"assignments": []},
        {"assignments": [assignment(0, 0)]},
        {"assignments": [assignment(0, 0), assignment(0, 1)]},
        {"assignments": [assignment(0, 0), assignment(7, 1)]},
        {"assignments": [assignment(0, 0), assignment(1, 1, replica=1)]},
        {"assignments": [assignment(0, 0), assignment(1, 1), assignment(1, 0, replica=1)]},
        {"assignments": [assignment(0, 0), assignment(1, 1, endpoint="no endpoint")]},
        {"assignments": [assignment(0, 0), assignment(1, 1, endpoint="host:99999")]},
        {"validators": []},
        {"validators": [b"v" * 32, b"v" * 32]},
    ],
)
def test_a_plan_that_does_not_fit_its_job_is_refused(changes):
    record = record_of()
    with pytest.raises(RecordError):
        open_job(record, plan_of(record, **changes))


def test_a_job_is_audited_by_nobody_but_those_whom_its_author_named():
    named = AuditTerms(unit_rate_ppm=0, step_rate_ppm=0, window_steps=1, window_s=1, auditors=[b"v" * 32, b"w" * 32])
    record = record_of(audit=named)
    assert open_job(record, plan_of(record)).plan.validators == [b"v" * 32]
    with pytest.raises(RecordError, match="1 validators that the job's list of auditors lacks"):
        open_job(record, plan_of(record, validators=[b"v" * 32, b"x" * 32]))


@pytest.mark.parametrize(
    "changes",
    [
        {"specs": [NO_DIGEST]},
        {"initial_roots": []},
        {"work_units": [1, 2, 3]},
        {"num_stages": 1024, "num_replicas": 1024},
        {
            "audit": AuditTerms(
                unit_rate_ppm=0, step_rate_ppm=0, window_steps=MAX_WINDOW_STEPS + 1, window_s=1, auditors=[]
            )
        },
    ],
)
def test_a_record_at_odds_with_itself_is_refused(changes):
    record = record_of(**changes)
    started = time.monotonic()
    with pytest.raises(RecordError):
        open_job(record, plan_of(record))
    assert time.monotonic() - started < 0.2  # a million stages are not enumerated


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x80", b"x" * (5 << 20)])
def test_bytes_that_are_no_records_are_a_record_error(data):
    record = record_of()
    with pytest.raises(RecordError):
        Job.open(data, AUTHOR.sign(plan_of(record)).encode())
    with pytest.raises(RecordError):
        Job.open(AUTHOR.sign(record).encode(), data)
