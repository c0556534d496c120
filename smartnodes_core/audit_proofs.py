"""What is proven by signatures alone: two versions of a step, a worker that opens nothing, a validator that keeps a
draw from being made.

The first needs no witness. The others are said by most of a job's validators, each after it asked for itself: one that
accuses alone makes nothing, nor do those in league while they are no majority; as few keep it from being proven. Pure.
Neighbours: `audit_grounds.py` draws on these proofs, `nodes/books.py` keeps them, rounds carry them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from smartnodes_core.errors import RecordError
from smartnodes_core.identity import verify
from smartnodes_core.jobs import Job
from smartnodes_core.records import (
    Absence,
    Commitment,
    NodeKey,
    Signed,
    Silence,
    TwoVersions,
    Unanswered,
    Withholding,
    digest_of,
)

#: With fewer validators than this, silence blacklists nobody and withholding costs no reputation: one or two are no
#: witnesses against a third.
MIN_WITNESSES = 3
#: How far behind its tip a worker may have been challenged: audits forced by a silence begin no farther on.
MAX_FORCED_AHEAD = 1 << 16

Proof = TwoVersions | Withholding
_Statement = TypeVar("_Statement", Unanswered, Absence)


def majority(num_validators: int) -> int:
    """How many of so many validators are more than half."""
    return num_validators // 2 + 1


# -- two versions of a step -------------------------------------------------------------------------------------------


def two_versions(first: bytes, second: bytes, job: bytes) -> TwoVersions:
    """The proof from two signed commitments, whichever came first."""
    return TwoVersions(job=job, first=min(first, second), second=max(first, second))


def check_two_versions(proof: TwoVersions, job: Job) -> Commitment:
    """The first of the two commitments. Raises RecordError or SignatureError for what proves nothing."""
    found = []
    for data in (proof.first, proof.second):
        signed = Signed.decode(data)
        commitment = verify(signed, Commitment)
        if signed.signer != commitment.worker or commitment.job != job.id or proof.job != job.id:
            raise RecordError(
                "two versions of a step are signed by the worker that they name, for the job of the proof"
            )
        found.append(commitment)
    if _place(found[0]) != _place(found[1]) or found[0] == found[1]:
        raise RecordError("two versions are different commitments for one step of one stage under one plan")
    return found[0]


def _place(commitment: Commitment) -> tuple[NodeKey, int, int, int, int]:
    each = commitment
    return each.worker, each.plan_version, each.replica, each.stage, each.step


# -- what most of the validators say ----------------------------------------------------------------------------------


def check_silence(silence: Silence, signer: NodeKey, job: Job) -> None:
    """It must be its auditor's, and borne out by more than half of the job's validators, the auditor among them. Raises
    RecordError or SignatureError."""
    validators = job.plan.validators
    if silence.job != job.id or signer != silence.auditor or signer not in validators:
        raise RecordError("a silence is signed by its auditor, a validator of the job's plan")
    if not silence.step < silence.forced_from <= silence.step + MAX_FORCED_AHEAD:
        raise RecordError(f"audits are forced from step {silence.forced_from} on after a silence in {silence.step}")
    said = _sayers(silence.statements, Unanswered, job)
    if any(statement.challenge != silence.challenge for statement in said.values()):
        raise RecordError("a statement in a silence is about another challenge")
    _check_enough({*said, signer}, validators)


def check_withholding(proof: Withholding, job: Job) -> None:
    """More than half of the others among the job's validators must say so. Raises RecordError or SignatureError."""
    if proof.job != job.id or proof.absent not in job.plan.validators:
        raise RecordError("who withholds is a validator of the job's plan")
    said = _sayers(proof.statements, Absence, job)
    if any(statement.absent != proof.absent for statement in said.values()):
        raise RecordError("a statement in a withholding is about another validator")
    _check_enough(said, [each for each in job.plan.validators if each != proof.absent])


def _sayers(statements: Sequence[bytes], kind: type[_Statement], job: Job) -> dict[NodeKey, _Statement]:
    """Statements by the validator of the plan that signed each."""
    if len(statements) > len(job.plan.validators):
        raise RecordError(f"{len(statements)} statements of {len(job.plan.validators)} validators")
    found: dict[NodeKey, _Statement] = {}
    for data in statements:
        signed = Signed.decode(data)
        statement = verify(signed, kind)
        if signed.signer != statement.validator or signed.signer not in job.plan.validators or statement.job != job.id:
            raise RecordError("a statement is signed by the validator of the job's plan that it names")
        found[statement.validator] = statement
    return found


def _check_enough(said: Iterable[NodeKey], among: Sequence[NodeKey]) -> None:
    num_said, needed = len(set(said) & set(among)), majority(len(among))
    if num_said < needed:
        raise RecordError(f"{num_said} of {len(among)} validators say so, more than half ({needed}) are needed")


# -- their names ------------------------------------------------------------------------------------------------------


def check_proof(proof: Proof, job: Job) -> None:
    """Raises RecordError or SignatureError for what proves nothing about this job."""
    if isinstance(proof, TwoVersions):
        check_two_versions(proof, job)
    else:
        check_withholding(proof, job)


def name_of(proof: Proof) -> bytes:
    """The digest by which rounds name a proof: of what it proves, whichever signatures prove it."""
    if isinstance(proof, TwoVersions):
        commitment = Commitment.decode(Signed.decode(proof.first).record)
        return digest_of("two versions", b"".join(_bytes_of(part) for part in (proof.job, *_place(commitment))))
    return digest_of("withholding", proof.job + proof.absent)


def decode_proof(data: bytes | memoryview) -> Proof:
    """Raises RecordError for what is neither kind of proof."""
    try:
        return Withholding.decode(data)
    except RecordError:
        return TwoVersions.decode(data)


def _bytes_of(part: bytes | int) -> bytes:
    return part if isinstance(part, bytes) else part.to_bytes(8, "big")
