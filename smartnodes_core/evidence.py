"""Evidence of fraud as a file, and what must hold of it before anything is executed again.

The file: `u64 length of the record (big-endian) | Evidence record | opened bytes | signed Verdict or nothing`. Every
part is signed by whom it speaks for, so that an auditor cannot have made it up: the job record and the plan by the
author, the lists and preimages of the draw by validators, the commitments and the opening, with its body and the
author's order, by the worker, the verdict by its auditor. What is executed again, and how, is the `Auditor`'s.

Pure but for `mapped`. Neighbours: `nodes/evidence_shelf.py` keeps such files, `nodes/evidence.py` passes them on.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from blake3 import blake3

from smartnodes_core.audit import WHOLE_STEP, Case, Opened, check_challenge
from smartnodes_core.audit_grounds import grounds_of
from smartnodes_core.errors import AuthorityError, LocalError, PeerFault, RecordError
from smartnodes_core.identity import verify
from smartnodes_core.jobs import Job, spec_digest
from smartnodes_core.records import (
    MAX_RECORD_BYTES,
    Challenge,
    Commitment,
    Evidence,
    JobRecord,
    Opening,
    ReceivedList,
    Reveal,
    Signed,
    Verdict,
)

HEAD = struct.Struct(">Q")
#: Of all files on a shelf, and of the opened bytes in one.
MAX_EVIDENCE_BYTES = 8 << 30

ListOrReveal = TypeVar("ListOrReveal", ReceivedList, Reveal)


class EvidenceFile(NamedTuple):
    """A file's parts; `verdict` is empty where there is none."""

    evidence: Evidence
    body: memoryview
    verdict: bytes


def mapped(path: Path) -> memoryview:
    """A file's bytes, which are read as they are looked at. Raises LocalError where it cannot be opened."""
    try:
        with open(path, "rb") as file:  # a mapping: it may be large, and outlives the file's name
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        return memoryview(b"")  # nothing can be mapped of an empty file
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}") from None


def split(data: memoryview) -> EvidenceFile:
    """The parts of a file. Raises RecordError for one that is cut short, over a cap, or not of this form."""
    if len(data) < HEAD.size:
        raise RecordError(f"the file ends after {len(data)} bytes, within the length of its record ({HEAD.size} bytes)")
    (num_bytes,) = HEAD.unpack_from(data)
    if num_bytes > Evidence.max_bytes:
        raise RecordError(f"a record of {num_bytes} bytes: at most {Evidence.max_bytes} are read")
    begin = HEAD.size + num_bytes
    if begin > len(data):
        raise RecordError(f"the file ends after {len(data)} bytes, within its record, which ends at {begin}")
    evidence = Evidence.decode(data[HEAD.size : begin])
    if evidence.body_bytes > MAX_EVIDENCE_BYTES:
        raise RecordError(f"body_bytes is {evidence.body_bytes}: at most {MAX_EVIDENCE_BYTES} are read")
    end = begin + evidence.body_bytes
    if end > len(data):
        raise RecordError(f"the file ends after {len(data)} bytes; by body_bytes its opened bytes end at {end}")
    if len(data) - end > MAX_RECORD_BYTES:
        raise RecordError(f"{len(data) - end} bytes follow the body_bytes: a verdict has at most {MAX_RECORD_BYTES}")
    return EvidenceFile(evidence, data[begin:end], bytes(data[end:]))


def case_of(evidence: Evidence, body: memoryview) -> Case:
    """The case that evidence tells, every part held against what author and worker signed. Raises RecordError or
    SignatureError, naming the part."""
    with _part("job"):
        signed = Signed.decode(evidence.job)
        job = verify(signed, JobRecord)
        if signed.signer != job.author:
            raise RecordError("a job record is signed by its author")
    with _part("plan"):
        Job.open(evidence.job, evidence.plan)
    with _part("commitment"):
        signed = Signed.decode(evidence.commitment)
        commitment = verify(signed, Commitment)
        if signed.signer != commitment.worker:
            raise RecordError("it is not signed by the worker that it names")
        if commitment.job != job.digest():
            raise RecordError("it is of another job than the job record")
    with _part("spec"):
        if commitment.stage >= len(job.specs) or spec_digest(evidence.spec) != job.specs[commitment.stage]:
            raise RecordError("it is not the one that the job record names")
    with _part("challenge"):
        challenge = Challenge.decode(evidence.challenge)
        if (challenge.job, challenge.commitment) != (commitment.job, commitment.digest()):
            raise RecordError("it names another job or commitment")
        if (challenge.tier == 2) != (challenge.unit == WHOLE_STEP) or challenge.unit >= len(commitment.units):
            raise RecordError(f"it asks for tier {challenge.tier}, unit {challenge.unit} of {len(commitment.units)}")
    with _part("body_digest, body_bytes"):
        if (evidence.body_digest, evidence.body_bytes) != (blake3(body).digest(), len(body)):
            raise RecordError("the opened bytes are not those of the evidence")
    with _part("opening"):
        opening = opening_of(evidence.opening, commitment.worker, challenge.digest(), evidence.order, body)
    with _part("earlier"):
        earlier = chain_before(commitment, evidence.earlier)
    return Case(job, evidence.spec, commitment, challenge, evidence.order, opening.encode(), earlier)


def check_verdict(verdict: Verdict, evidence: Evidence, case: Case) -> None:
    """The verdict must be of fraud and about this case. Raises RecordError."""
    commitment, challenge = case.commitment, case.challenge
    told = {
        "job": commitment.job,
        "plan_version": commitment.plan_version,
        "replica": commitment.replica,
        "stage": commitment.stage,
        "step": commitment.step,
        "challenge": challenge.digest(),
        "commitment": commitment.digest(),
        "tier": challenge.tier,
        "unit": challenge.unit,
        "worker": commitment.worker,
        "auditor": challenge.auditor,
        "finding": "fraudulent",
        "evidence": evidence.digest(),
        "work_units": commitment.work_units,
    }
    wrong = [name for name, value in told.items() if getattr(verdict, name) != value]
    if wrong:
        raise RecordError(f"the verdict says something else than the evidence: {', '.join(wrong)}")


def signed_verdict(data: bytes) -> Verdict:
    """The verdict in a file, signed by its auditor. Raises RecordError or SignatureError."""
    with _part("verdict"):
        signed = Signed.decode(data)
        verdict = verify(signed, Verdict)
        if signed.signer != verdict.auditor:
            raise RecordError("it is not signed by the auditor that it names")
        return verdict


def check_draw(evidence: Evidence, case: Case) -> None:
    """The challenge must be what the preimages select that the job's assigned validators revealed; whether these lead
    to what was posted on chain is not in the evidence. Raises RecordError, SignatureError, AuthorityError, AuditError.
    """
    job = Job.open(evidence.job, evidence.plan)
    with _part("grounds"):
        grounds = grounds_of(evidence.grounds, job, case.commitment)
    assigned = grounds.assigned(job)
    with _part("lists"):
        lists = [from_validator(data, ReceivedList) for data in evidence.lists]
        if len(lists) > len(assigned):
            raise RecordError(f"there are {len(lists)} lists, the job has {len(assigned)} assigned validators")
    with _part("reveals"):
        reveals = [from_validator(data, Reveal) for data in evidence.reveals]
    with _part("draw (plan, challenge, lists, reveals)"):
        if sorted(reveal.digest() for reveal in reveals) != sorted(case.challenge.reveals):
            raise RecordError("the challenge names other reveals")
        check_challenge(
            case.challenge,
            case.commitment,
            job.record.audit,
            assigned,
            lists,
            reveals,
            None,
            grounds.excluded,
            grounds.forced,
        )


def chain_before(commitment: Commitment, signed: Sequence[bytes]) -> tuple[Commitment, ...]:
    """The commitments that precede one, oldest first, each signed by its worker and named by the next. Raises
    RecordError or SignatureError."""
    found: list[Commitment] = []
    following = commitment
    for data in reversed(signed):
        envelope = Signed.decode(data)
        earlier = verify(envelope, Commitment)
        if envelope.signer != commitment.worker or earlier.digest() != following.previous:
            raise RecordError(f"what was opened as the commitment before step {following.step} is not the one it names")
        found.append(earlier)
        following = earlier
    return tuple(reversed(found))


def opening_of(signed_opening: bytes, worker: bytes, challenge: bytes, order: bytes, body: memoryview) -> Opening:
    """The opening that `worker` signed for `challenge` over `order` and `body`. Raises RecordError or
    SignatureError."""
    signed = Signed.decode(signed_opening)
    opened = verify(signed, Opened)
    opening = Opening.decode(opened.opening)
    if signed.signer != worker or opening.challenge != challenge:
        raise RecordError("the opening is not the worker's, or answers another challenge")
    if opened.body_digest != blake3(body).digest():
        raise RecordError("the opening's body is not the one that the worker signed")
    if opened.order_digest != blake3(order).digest():
        raise RecordError("the order is not the one that the worker showed and signed")
    return opening


def from_validator(data: bytes, kind: type[ListOrReveal]) -> ListOrReveal:
    """The record in a `Signed`, which must be signed by the validator that it names. Raises AuthorityError."""
    signed = Signed.decode(data)
    record = verify(signed, kind)
    if signed.signer != record.validator:
        raise AuthorityError(f"a {kind.__name__} is signed by the validator it names")
    return record


@contextmanager
def _part(name: str) -> Iterator[None]:
    """A fault within is told with the part of the evidence that it is in."""
    try:
        yield
    except PeerFault as fault:
        raise type(fault)(f"{name} in the evidence: {fault}") from None
