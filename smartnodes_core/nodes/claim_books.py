"""What a validator holds of one job's commitments: each worker's claims, within a cap, and where they contradict each
other.

Part of the books (`books.py`), guarded by their lock.
"""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass, field

from smartnodes_core.audit import disagreeing_units, link_disagreements, sharing_disagreements
from smartnodes_core.audit_proofs import Proof, check_proof, name_of, two_versions
from smartnodes_core.errors import AuthorityError, BusyError, RecordError
from smartnodes_core.jobs import stage_key
from smartnodes_core.nodes.draw_books import DrawBook, Excluded
from smartnodes_core.records import Commitment, NodeKey, Signed, TwoVersions, Withholding

#: Signed commitments of one stage that wait to be settled.
MAX_STAGE_BYTES = 64 << 20
MAX_LINK_FAULTS = 256
#: How long after a job's end its workers are challenged: they hold its stages longer (`worker.RELEASE_TIMEOUT_S`).
CLOSED_GRACE_S = 20.0

Place = tuple[int, int, int, int]
StagePlace = tuple[int, int]


class SecondVersionError(RecordError):
    """Two signed commitments for one step, with the proof where both are at hand."""

    code = "second-version"
    proof: TwoVersions | None = None


@dataclass(eq=False)
class ClaimBook(DrawBook):
    """See the module. `came_at_s` and `confirmed` are of `time.monotonic`."""

    signed: dict[bytes, bytes] = field(default_factory=dict)
    by_place: dict[Place, bytes] = field(default_factory=dict)
    void: set[Place] = field(default_factory=set)  # two commitments were signed: neither is paid
    proofs: dict[bytes, Proof] = field(default_factory=dict)  # by the name under which a round carries them
    confirmed: dict[bytes, float] = field(default_factory=dict)  # frauds that were re-run or proven here, and when
    disputes: dict[bytes, set[bytes]] = field(default_factory=dict)  # commitments that contradict each other
    steps: dict[StagePlace, list[int]] = field(default_factory=dict)  # ascending
    settled_step: dict[StagePlace, int] = field(default_factory=dict)
    num_bytes: dict[StagePlace, int] = field(default_factory=dict)
    came_at_s: dict[bytes, float] = field(default_factory=dict)
    link_faults: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINK_FAULTS))
    active_at_s: float = field(default_factory=time.monotonic)  # when it was opened, or the last commitment came

    def of_stage(self, commitment: Commitment) -> str:
        """The name under which the worker keeps a stage (`StageOfJob.key`)."""
        return stage_key(self.job.id, commitment.plan_version, commitment.replica, commitment.stage)

    def take(self, commitment: Commitment, signer: NodeKey, data: bytes) -> bool:
        """Keep a commitment; False where it is held already.

        Raises AuthorityError for a stage that the signer does not run, SecondVersionError for another one of the same
        step, RecordError for a claim that the job does not allow, BusyError over the stage's cap.
        """
        digest = commitment.digest()
        if self.by_place.get(place_of(commitment)) == digest:
            return False
        self._check_claim(commitment, signer)
        stage = (commitment.stage, commitment.replica)
        if self._is_late(place_of(commitment)):
            raise RecordError(f"step {commitment.step} of stage {commitment.stage} was settled before")
        first = self.by_place.get(place_of(commitment), digest)
        if first != digest:
            error = SecondVersionError(f"two commitments for step {commitment.step} of stage {commitment.stage}")
            if first in self.signed:  # else its step was settled long since
                error.proof = two_versions(self.signed[first], data, self.job.id)
            raise error
        if self.closed and digest not in self.listed_by:
            raise RecordError("the job has ended, and no validator listed this commitment while it ran")
        num_bytes = self.num_bytes.get(stage, 0) + len(data)
        if num_bytes > MAX_STAGE_BYTES:
            raise BusyError(f"{num_bytes} bytes of commitments of stage {commitment.stage} wait to be settled")
        self.num_bytes[stage] = num_bytes
        self.by_place[place_of(commitment)] = digest
        self.commitments[digest], self.signed[digest] = commitment, data
        self.came_at_s[digest] = time.monotonic()
        insort(self.steps.setdefault(stage, []), commitment.step)
        self.unlisted.append(digest)
        self.active_at_s = time.monotonic()
        for listed in self.unknown.values():
            listed.discard(digest)
        return True

    def add_proof(self, proof: Proof) -> bool:
        """Keep a proof; False where one of the same is held. Raises RecordError or SignatureError for what proves
        nothing."""
        check_proof(proof, self.job)
        name = name_of(proof)
        if name in self.proofs:
            return False
        self.proofs[name] = proof
        self.confirmed[name] = time.monotonic()
        if isinstance(proof, TwoVersions):
            self.void.add(place_of(Commitment.decode(Signed.decode(proof.first).record)))
        else:
            self.exclude(proof.absent)
        return True

    def _check_claim(self, commitment: Commitment, signer: NodeKey) -> None:
        job = self.job
        if signer != commitment.worker or job.worker_of(commitment.stage, commitment.replica) != signer:
            raise AuthorityError(f"stage {commitment.stage} is not run by the signer of this commitment")
        if commitment.plan_version != job.plan.version:
            raise RecordError(f"work under plan {commitment.plan_version}, the plan in force is {job.plan.version}")
        units = {(unit.call, unit.micro_batch, unit.backward_pass) for unit in commitment.units}
        if len(units) != len(commitment.units):
            raise RecordError("a commitment names each of its units once")
        num_units = sum(backward_pass >= 0 for _, _, backward_pass in units)
        if commitment.work_units != job.record.work_units[commitment.stage] * num_units:
            raise RecordError("the work claimed is not the units times what the job says each is worth")

    def compare_links(self, commitment: Commitment) -> list[str]:
        """T0: where other stages say something else of the links between them and this one. Units in which they do are
        audited at both ends, and neither end is paid for the step until one of the two is convicted."""
        faults = []
        digest = commitment.digest()
        for stage in range(self.job.record.num_stages):
            place = (commitment.plan_version, commitment.replica, stage, commitment.step)
            other = self.commitments.get(self.by_place.get(place, b""))
            if other is None or stage == commitment.stage or not disagreeing_units(commitment, other):
                continue
            self.disputes.setdefault(digest, set()).add(other.digest())
            self.disputes.setdefault(other.digest(), set()).add(digest)
            first, second = sorted((commitment, other), key=lambda each: each.stage)
            faults += link_disagreements(first, second) if second.stage - first.stage == 1 else []
            faults += sharing_disagreements(commitment, other)
        self.link_faults.extend(f"step {commitment.step}: {fault}" for fault in faults)
        return faults

    def shut_out(self, excluded: Excluded) -> list[bytes]:
        """The papers that show why draws are made without these validators, one for each."""
        proofs = [proof for proof in self.proofs.values() if isinstance(proof, Withholding)]
        papers = {**self.departures, **{proof.absent: proof.encode() for proof in proofs}}
        return [papers[validator] for validator in excluded if validator in papers]

    @property
    def window_steps(self) -> int:
        """How many later steps a worker makes before it need not hold one any more."""
        return max(1, self.job.record.audit.window_steps)

    def num_later(self, commitment: Commitment) -> int:
        """How many later commitments of the same stage are held."""
        steps = self.steps.get((commitment.stage, commitment.replica), [])
        return len(steps) - bisect_right(steps, commitment.step)

    def is_past(self, commitment: Commitment) -> bool:
        """Whether its worker need not hold it any more: a window of steps followed, another plan is in force, or this
        validator has let the job's workers go."""
        is_over = self.closed and time.monotonic() - self.closed_at_s > CLOSED_GRACE_S
        is_replaced = commitment.plan_version != self.job.plan.version
        return is_over or is_replaced or self.num_later(commitment) >= self.window_steps

    def _is_late(self, place: Place) -> bool:
        _, replica, stage, step = place
        return step <= self.settled_step.get((stage, replica), -1)


def place_of(commitment: Commitment) -> Place:
    """What a worker may sign one commitment for."""
    return (commitment.plan_version, commitment.replica, commitment.stage, commitment.step)
