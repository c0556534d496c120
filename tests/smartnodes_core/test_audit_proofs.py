"""Proofs that more than half of a job's validators make, and nobody else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartnodes_core.audit import WHOLE_STEP, assigned_validators
from smartnodes_core.audit_grounds import Grounds, grounds_of
from smartnodes_core.audit_proofs import (
    check_silence,
    check_withholding,
    decode_proof,
    majority,
    name_of,
    two_versions,
)
from smartnodes_core.errors import RecordError, SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import Job
from smartnodes_core.records import (
    NO_DIGEST,
    Absence,
    Assignment,
    AuditTerms,
    Commitment,
    JobRecord,
    Plan,
    Silence,
    Unanswered,
    Unit,
    Withholding,
)

AUTHOR, WORKER, STRANGER = (Identity.from_seed(bytes([number] * 32)) for number in (1, 2, 3))
VALIDATORS = [Identity.from_seed(bytes([number] * 32)) for number in range(11, 20)]
CHALLENGE = b"c" * 32


def job_of(num_validators: int) -> Job:
    audit = AuditTerms(unit_rate_ppm=0, step_rate_ppm=0, window_steps=4, window_s=60, auditors=[])
    record = JobRecord(
        network_id=1, job_type="t", author=AUTHOR.node_key, nonce=bytes(32), created_at_s=1, num_stages=1,
        num_replicas=1, specs=[NO_DIGEST], initial_roots=[NO_DIGEST], work_units=[1], audit=audit, terms={},
    )  # fmt: skip
    assignments = [Assignment(stage=0, replica=0, worker=WORKER.node_key, endpoint="10.0.0.1:1")]
    plan = Plan(
        job=record.digest(), version=0, assignments=assignments, spares=[], reason="",
        validators=[validator.node_key for validator in VALIDATORS[:num_validators]],
    )  # fmt: skip
    return Job.open(AUTHOR.sign(record).encode(), AUTHOR.sign(plan).encode())


def commitment_of(job: Job, step: int = 7) -> Commitment:
    units = [Unit(micro_batch=0, roots={})]
    return Commitment(
        job=job.id, plan_version=0, replica=0, stage=0, step=step, worker=WORKER.node_key, previous=job.id, units=units,
        work_units=1,
    )  # fmt: skip


def silence_of(of_job: Job, auditor: Identity, sayers: list[Identity], **changes: object) -> Silence:
    said = [Unanswered(job=of_job.id, challenge=CHALLENGE, validator=each.node_key) for each in sayers]
    fields: dict[str, object] = {
        "job": of_job.id, "replica": 0, "stage": 0, "step": 3, "commitment": bytes(32), "challenge": CHALLENGE,
        "worker": WORKER.node_key, "auditor": auditor.node_key, "forced_from": 5,
        "statements": [each.sign(one).encode() for each, one in zip(sayers, said, strict=True)],
    }  # fmt: skip
    return Silence(**{**fields, **changes})  # type: ignore[arg-type]


def withholding_of(job: Job, absent: Identity, sayers: list[Identity]) -> Withholding:
    said = [each.sign(Absence(job=job.id, absent=absent.node_key, validator=each.node_key)).encode() for each in sayers]
    return Withholding(job=job.id, absent=absent.node_key, statements=said)


@settings(max_examples=40, deadline=None)
@given(num_validators=st.integers(1, 9), data=st.data())
def test_a_silence_is_what_more_than_half_of_the_validators_say_the_auditor_among_them(
    num_validators: int, data: st.DataObject
) -> None:
    job, among = job_of(num_validators), VALIDATORS[:num_validators]
    sayers = data.draw(st.lists(st.sampled_from(among), max_size=num_validators))
    silence = silence_of(job, among[0], sayers)
    num_said = len({each.node_key for each in (*sayers, among[0])})
    if 2 * num_said > num_validators:
        check_silence(silence, among[0].node_key, job)
    else:
        with pytest.raises(RecordError, match="more than half"):
            check_silence(silence, among[0].node_key, job)


@settings(max_examples=40, deadline=None)
@given(num_validators=st.integers(2, 9), data=st.data())
def test_a_withholding_is_what_more_than_half_of_the_others_say(num_validators: int, data: st.DataObject) -> None:
    job, among = job_of(num_validators), VALIDATORS[:num_validators]
    sayers = data.draw(st.lists(st.sampled_from(among), max_size=num_validators))
    proof = withholding_of(job, among[0], sayers)
    num_said = len({each.node_key for each in sayers} - {among[0].node_key})
    if 2 * num_said > num_validators - 1:
        check_withholding(proof, job)
        assert decode_proof(proof.encode()) == proof
    else:
        with pytest.raises(RecordError, match="more than half"):
            check_withholding(proof, job)


def test_a_third_in_league_neither_makes_nor_stops_a_proof() -> None:
    for num_validators in range(3, 60):
        num_bad = (num_validators - 1) // 3
        assert num_bad < majority(num_validators) <= num_validators - num_bad
        assert num_bad < majority(num_validators - 1) <= num_validators - num_bad


@pytest.mark.parametrize(
    "changes", [{"forced_from": 3}, {"forced_from": 1 << 40}, {"job": bytes(32)}, {"challenge": bytes(32)}]
)
def test_a_silence_at_odds_with_what_was_said_is_refused(changes: dict[str, object]) -> None:
    job = job_of(3)
    silence = silence_of(job, VALIDATORS[0], VALIDATORS[1:3], **changes)
    with pytest.raises(RecordError):
        check_silence(silence, VALIDATORS[0].node_key, job)


def test_strangers_bear_out_nothing() -> None:
    job = job_of(3)
    with pytest.raises(RecordError, match="a validator of the job's plan"):
        check_silence(silence_of(job, STRANGER, VALIDATORS[:3]), STRANGER.node_key, job)
    with pytest.raises(RecordError, match="validator of the job's plan"):
        check_silence(silence_of(job, VALIDATORS[0], [STRANGER] * 2), VALIDATORS[0].node_key, job)
    with pytest.raises(RecordError, match="4 statements"):
        check_withholding(withholding_of(job, VALIDATORS[0], [STRANGER] * 4), job)
    with pytest.raises(RecordError, match="who withholds"):
        check_withholding(withholding_of(job, STRANGER, VALIDATORS[:3]), job)


def test_a_proof_has_one_name_whichever_signatures_prove_it() -> None:
    job = job_of(9)
    some, others = (withholding_of(job, VALIDATORS[0], VALIDATORS[at : at + 5]) for at in (1, 4))
    assert name_of(some) == name_of(others) != name_of(withholding_of(job, VALIDATORS[1], VALIDATORS[2:7]))
    versions = [WORKER.sign(commitment_of(job)).encode()] + [
        WORKER.sign(Commitment(**{**_fields(commitment_of(job)), "squared_norm": (n / 2).hex()})).encode()
        for n in (3, 4)
    ]
    first, second = (two_versions(versions[0], other, job.id) for other in versions[1:])
    assert name_of(first) == name_of(second) == name_of(two_versions(versions[1], versions[0], job.id))


def _fields(commitment: Commitment) -> dict[str, object]:
    return {name: getattr(commitment, name) for name in commitment.__struct_fields__}


def test_grounds_say_who_is_left_to_draw_and_what_is_forced() -> None:
    job = job_of(5)
    commitment = commitment_of(job, step=7)
    silence = VALIDATORS[0].sign(silence_of(job, VALIDATORS[0], VALIDATORS[1:4])).encode()
    withheld = withholding_of(job, VALIDATORS[2], [VALIDATORS[at] for at in (0, 1, 3)]).encode()
    found = grounds_of([withheld, silence], job, commitment)
    assert found == Grounds((VALIDATORS[2].node_key,), frozenset({WHOLE_STEP}))
    left = [each for each in job.plan.validators if each != VALIDATORS[2].node_key]
    assert found.assigned(job) == assigned_validators(job.id, left)
    for step in (4, 15):  # it forces ten steps from the fifth on
        with pytest.raises(RecordError, match="says nothing of the step"):
            grounds_of([silence], job, commitment_of(job, step=step))
    for papers in ([silence] * 17, [b""], [withheld[:-1]], [WORKER.sign(commitment).encode()]):
        with pytest.raises(SmartnodesError):
            grounds_of(papers, job, commitment)
