"""On what a draw stands beside its seed: papers that come with a challenge, so that the worker, and anyone later, sees
why it is drawn so.

- A `Withholding`, or the validator's own `Departure`: the draw was made without that validator; the next in rank takes
  its place among the assigned.
- A signed `Silence` of the same stage: its next ten steps are audited as a whole.
- A signed commitment of another stage that contradicts this one about what crossed between them: who lies cannot be
  told from that, so the unit is audited at both ends.

Pure. Neighbours: `audit.py` selects by what is found here, `audit_proofs.py` checks the proofs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smartnodes_core.audit import WHOLE_STEP, assigned_validators, disagreeing_units
from smartnodes_core.audit_proofs import check_silence, check_withholding
from smartnodes_core.audit_silence import is_forced
from smartnodes_core.errors import RecordError
from smartnodes_core.identity import verify
from smartnodes_core.jobs import Job
from smartnodes_core.records import Commitment, Departure, NodeKey, Signed, Silence, Withholding

#: Papers that come with one challenge, and their bytes.
MAX_GROUNDS = 16
MAX_GROUNDS_BYTES = 16 << 20


@dataclass(frozen=True)
class Grounds:
    """The validators without whom the draw was made, sorted, and the units (or WHOLE_STEP) that are audited whatever
    the seed says."""

    excluded: tuple[NodeKey, ...] = ()
    forced: frozenset[int] = frozenset()

    def assigned(self, job: Job) -> list[NodeKey]:
        """The validators that draw and audit."""
        return assigned_without(job, self.excluded)


def assigned_without(job: Job, excluded: Sequence[NodeKey]) -> list[NodeKey]:
    """The validators that draw and audit when these do not take part: whoever is next in rank takes their place."""
    return assigned_validators(job.id, [each for each in job.plan.validators if each not in excluded])


def grounds_of(papers: Sequence[bytes], job: Job, commitment: Commitment) -> Grounds:
    """What papers come to for a commitment, each checked. Raises RecordError or SignatureError for one that does not
    hold, or says nothing about this commitment."""
    if len(papers) > MAX_GROUNDS or sum(map(len, papers)) > MAX_GROUNDS_BYTES:
        raise RecordError(f"{len(papers)} papers, {sum(map(len, papers))} bytes: too many grounds for one challenge")
    excluded: set[NodeKey] = set()
    forced: set[int] = set()
    for data in papers:
        try:
            signed = Signed.decode(data)
        except RecordError:
            proof = Withholding.decode(data)
            check_withholding(proof, job)
            excluded.add(proof.absent)
            continue
        departed = departed_in(signed, job)
        if departed is not None:
            excluded.add(departed)
            continue
        found = units_forced(signed, job, commitment)
        if not found:
            raise RecordError("a paper says nothing of the step that is challenged")
        forced.update(found)
    if len(excluded) >= len(job.plan.validators):
        raise RecordError("all validators of the job are shut out of its draws")
    return Grounds(tuple(sorted(excluded)), frozenset(forced))


def departed_in(signed: Signed, job: Job) -> NodeKey | None:
    """The validator that leaves a job, by its own word; None for another record. Raises RecordError or SignatureError
    for a word that is not its own."""
    try:
        departure = verify(signed, Departure)
    except RecordError:
        return None
    if departure.job != job.id or not signed.signer == departure.validator in job.plan.validators:
        raise RecordError("a departure is signed by the validator of the job's plan that leaves")
    return departure.validator


def units_forced(signed: Signed, job: Job, commitment: Commitment) -> list[int]:
    """The units of a commitment (or WHOLE_STEP) that a signed silence or a neighbour's commitment has audited. Raises
    as `grounds_of`."""
    try:
        silence = verify(signed, Silence)
    except RecordError:
        return _contradicted(verify(signed, Commitment), signed.signer, job, commitment)
    check_silence(silence, signed.signer, job)
    same = (silence.replica, silence.stage, silence.worker) == (
        commitment.replica,
        commitment.stage,
        commitment.worker,
    )
    return [WHOLE_STEP] if same and is_forced(commitment.step, silence.forced_from) else []


def _contradicted(other: Commitment, signer: NodeKey, job: Job, commitment: Commitment) -> list[int]:
    """The first unit in which another stage's commitment for the same step contradicts this one."""
    if (other.job, other.plan_version, other.replica, other.step) != (
        job.id,
        commitment.plan_version,
        commitment.replica,
        commitment.step,
    ):
        raise RecordError("a neighbour's commitment is for the same step under the same plan")
    if signer != other.worker or job.worker_of(other.stage, other.replica) != signer:
        raise RecordError("a neighbour's commitment is signed by who runs that stage")
    return disagreeing_units(commitment, other)[:1]
