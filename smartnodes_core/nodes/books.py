"""What a validator holds of the jobs it audits: commitments, lists, reveals, draws and verdicts, each within a cap.

No message is moved here. `auditing.py`, `drawing.py` and `challenging.py` fill these books, rounds read them
(`round_books.py`) and have them forgotten when they are settled.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from smartnodes_core.audit import CHAIN_LENGTH, Selection, link_disagreements, sharing_disagreements
from smartnodes_core.errors import AuthorityError, BusyError, RecordError
from smartnodes_core.jobs import Job, stage_key
from smartnodes_core.records import Commitment, NodeKey, ReceivedList, Reveal, Verdict

#: Commitments in one list: three lists and their preimages fit the header of a challenge.
MAX_LIST = 256
#: Of one validator and job: lists that wait for their preimage, and listed digests of which nobody has the commitment.
MAX_UNREVEALED, MAX_UNKNOWN = 1024, 1024
#: Signed commitments of one stage that wait to be settled.
MAX_STAGE_BYTES = 64 << 20
MAX_LINK_FAULTS = 256
#: How long a settled commitment waits for verdicts that a validator withholds.
KEEP_SETTLED_S = 3600.0
#: How many steps behind a settled one a commitment may still come in late and be paid.
LATE_STEPS = 1024
#: Plans of a job that are remembered after they were replaced: audits of what was done under them end soon.
MAX_EARLIER_PLANS = 16

Place = tuple[int, int, int, int]
StagePlace = tuple[int, int]


class SecondVersionError(RecordError):
    """Two signed commitments for one step, or two lists for one preimage: a proof of equivocation by themselves."""

    code = "second-version"


@dataclass(eq=False)
class AuditedJob:
    """One job's audits. Guarded by the lock of its `AuditBooks`."""

    job: Job
    assigned: list[NodeKey]
    earlier: dict[int, Job] = field(default_factory=dict)  # with the plans before, by their versions
    commitments: dict[bytes, Commitment] = field(default_factory=dict)
    signed: dict[bytes, bytes] = field(default_factory=dict)
    by_place: dict[Place, bytes] = field(default_factory=dict)
    void: set[Place] = field(default_factory=set)  # two commitments were signed: neither is paid
    steps: dict[StagePlace, list[int]] = field(default_factory=dict)  # ascending
    settled_step: dict[StagePlace, int] = field(default_factory=dict)
    num_bytes: dict[StagePlace, int] = field(default_factory=dict)
    unlisted: list[bytes] = field(default_factory=list)
    lists: dict[tuple[NodeKey, int], tuple[ReceivedList, bytes]] = field(default_factory=dict)
    listed_by: dict[bytes, dict[NodeKey, int]] = field(default_factory=dict)
    unknown: dict[NodeKey, set[bytes]] = field(default_factory=dict)  # listed, but of no commitment that is held
    reveals: dict[tuple[NodeKey, int], tuple[Reveal, bytes]] = field(default_factory=dict)
    pending: list[tuple[int, float]] = field(default_factory=list)  # own lists not revealed, and when they were fixed
    drawn: dict[bytes, list[Selection]] = field(default_factory=dict)
    specs: dict[int, bytes] = field(default_factory=dict)
    verdicts: dict[bytes, tuple[Verdict, bytes]] = field(default_factory=dict)
    by_unit: dict[tuple[bytes, int, int], bytes] = field(default_factory=dict)
    confirmed: dict[bytes, float] = field(default_factory=dict)  # frauds that were re-run here, and when
    came_at_s: dict[bytes, float] = field(default_factory=dict)
    settled_at_s: dict[bytes, float] = field(default_factory=dict)
    link_faults: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINK_FAULTS))
    active_at_s: float = field(default_factory=time.monotonic)  # when it was opened, or the last commitment came
    num_open: int = 0  # cases that wait for this validator's verdict
    closed: bool = False

    @property
    def is_drawn(self) -> bool:
        """Whether every commitment has been drawn for."""
        return len(self.drawn) == len(self.commitments)

    def of_stage(self, commitment: Commitment) -> str:
        """The name under which the worker keeps a stage (`StageOfJob.key`)."""
        return stage_key(self.job.id, commitment.plan_version, commitment.replica, commitment.stage)

    def go_on_with(self, job: Job, assigned: list[NodeKey]) -> None:
        """A newer plan is in force."""
        self.earlier[self.job.plan.version] = self.job
        while len(self.earlier) > MAX_EARLIER_PLANS:
            del self.earlier[min(self.earlier)]
        self.job, self.assigned = job, assigned

    def under(self, plan_version: int) -> Job:
        """The job with the plan of this version. Raises RecordError for one that is not remembered."""
        job = self.job if plan_version == self.job.plan.version else self.earlier.get(plan_version)
        if job is None:
            raise RecordError(f"plan {plan_version} was replaced long ago by plan {self.job.plan.version}")
        return job

    # -- commitments --------------------------------------------------------------------------------------------------

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
        if self.by_place.get(place_of(commitment), digest) != digest:
            raise SecondVersionError(f"two commitments for step {commitment.step} of stage {commitment.stage}")
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
        """T0: where other stages say something else of the links between them and this one."""

        def of(stage: int) -> Commitment | None:
            place = (commitment.plan_version, commitment.replica, stage, commitment.step)
            return self.commitments.get(self.by_place.get(place, b""))

        before, after = of(commitment.stage - 1), of(commitment.stage + 1)
        faults = link_disagreements(before, commitment) if before else []
        faults += link_disagreements(commitment, after) if after else []
        for stage in range(self.job.record.num_stages):
            other = of(stage) if stage != commitment.stage else None
            faults += sharing_disagreements(commitment, other) if other else []
        self.link_faults.extend(f"step {commitment.step}: {fault}" for fault in faults)
        return faults

    def window_closed(self, commitment: Commitment) -> bool:
        """Whether nothing of it will be challenged any more: the job has ended, or a window of later ones is held, and
        what was drawn of it has been examined; who withholds a draw or a verdict delays that for `window_s` at most.

        Held ones are counted, not step numbers: a worker that names a far step closes no window. One that shows many
        steps at once, just before a round, closes it no sooner than they are examined.
        """
        if place_of(commitment) in self.void or self._is_late(place_of(commitment)):
            return False
        if self.closed:
            return True
        steps, terms = self.steps.get((commitment.stage, commitment.replica), []), self.job.record.audit
        if len(steps) - bisect_right(steps, commitment.step) < terms.window_steps:
            return False
        digest = self.by_place.get(place_of(commitment), b"")
        waited_s = time.monotonic() - self.came_at_s.get(digest, 0.0)
        return waited_s > terms.window_s or self._is_examined(digest)

    def _is_examined(self, digest: bytes) -> bool:
        """Whether it was drawn for, and every unit that fell out has a verdict; frauds those that were re-run here."""
        if digest not in self.drawn:
            return False
        found = [self.by_unit.get((digest, each.tier, each.unit), b"") for each in self.drawn[digest]]
        return all(
            verdict in self.verdicts
            and (self.verdicts[verdict][0].finding != "fraudulent" or verdict in self.confirmed)
            for verdict in found
        )

    # -- lists and reveals --------------------------------------------------------------------------------------------

    def store_list(self, received: ReceivedList, data: bytes) -> None:
        """Keep the list behind a validator's preimage. Raises SecondVersionError, RecordError, BusyError."""
        validator, digests = received.validator, received.commitments
        before = self.lists.get((validator, received.reveal))
        if before is not None:
            if before[0] != received:
                raise SecondVersionError(f"two lists for preimage {received.reveal} of one validator")
            return
        if not 0 < len(set(digests)) == len(digests) <= MAX_LIST or not 0 < received.reveal <= CHAIN_LENGTH:
            raise RecordError(f"a list names 1 to {MAX_LIST} commitments, each once, and a preimage of the chain")
        if self.closed:
            raise RecordError("the job has ended")
        unrevealed = sum(key == validator and (key, index) not in self.reveals for key, index in self.lists)
        unknown = self.unknown.get(validator, set()).union(d for d in digests if d not in self.commitments)
        if unrevealed >= MAX_UNREVEALED or len(unknown) > MAX_UNKNOWN:
            raise BusyError(f"{unrevealed} lists wait for their preimages, {len(unknown)} commitments are not known")
        self.unknown[validator] = unknown
        self.lists[(validator, received.reveal)] = (received, data)
        for digest in digests:
            listed = self.listed_by.setdefault(digest, {})
            listed[validator] = min(received.reveal, listed.get(validator, received.reveal))

    def reveals_for(self, digest: bytes) -> dict[NodeKey, tuple[Reveal, bytes]]:
        """By validator, the preimage it spent on its first list that holds `digest`."""
        listed = self.listed_by.get(digest, {})
        found = {key: self.reveals.get((key, index)) for key, index in listed.items()}
        return {key: reveal for key, reveal in found.items() if reveal is not None}

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def store_verdict(self, verdict: Verdict, data: bytes) -> bool:
        """Keep a verdict; False where it is held already. Raises RecordError for one that speaks of another
        commitment than it names, of one that is not held, or differs from an earlier one of the same unit."""
        digest = verdict.digest()
        if digest in self.verdicts:
            return False
        commitment = self.commitments.get(verdict.commitment)
        if commitment is None:
            raise RecordError("a verdict about a commitment that is not held here")
        names = ("plan_version", "replica", "stage", "step", "worker", "work_units")
        wrong = [name for name in names if getattr(verdict, name) != getattr(commitment, name)]
        if wrong or (verdict.tier == 2) != (verdict.unit == -1) or verdict.unit >= len(commitment.units):
            raise RecordError(f"a verdict that does not fit its commitment: {', '.join(wrong) or 'tier and unit'}")
        if self.by_unit.setdefault((verdict.commitment, verdict.tier, verdict.unit), digest) != digest:
            raise SecondVersionError("two verdicts about one unit")
        self.verdicts[digest] = (verdict, data)
        return True

    def is_selected(self, verdict: Verdict) -> bool:
        """Whether the seed selects the unit, and its auditor: only then does a verdict count."""
        selection = Selection(verdict.tier, verdict.unit, verdict.auditor)
        return selection in self.drawn.get(verdict.commitment, [])

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def forget(self, settled: Collection[bytes]) -> None:
        """Drop commitments among `settled` (digests of commitments and verdicts) for which nothing is awaited."""
        now_s = time.monotonic()
        for digest, commitment in list(self.commitments.items()):
            place = place_of(commitment)
            late = self._is_late(place) or (self.closed and place in self.void)
            if digest in settled or late:
                at_s = self.settled_at_s.setdefault(digest, now_s)
                units = [(digest, selection.tier, selection.unit) for selection in self.drawn.get(digest, [])]
                complete = digest in self.drawn and all(self.by_unit.get(unit) in settled for unit in units)
                if complete or late or now_s - at_s > KEEP_SETTLED_S:
                    self._drop(digest)
        for spent, (received, _) in list(self.lists.items()):
            known = self.unknown.get(spent[0], set())
            if spent in self.reveals and not any(d in self.commitments or d in known for d in received.commitments):
                del self.lists[spent], self.reveals[spent]
        for place in [place for place in self.by_place if self._is_late(place)]:
            del self.by_place[place]
            self.void.discard(place)

    def _is_late(self, place: Place) -> bool:
        _, replica, stage, step = place
        return step <= self.settled_step.get((stage, replica), -1)

    def _drop(self, digest: bytes) -> None:
        """Forget a commitment; that its step was settled is remembered (`by_place`, then `settled_step`)."""
        commitment = self.commitments.pop(digest)
        stage = (commitment.stage, commitment.replica)
        self.num_bytes[stage] -= len(self.signed.pop(digest))
        self.settled_step[stage] = max(commitment.step - LATE_STEPS, self.settled_step.get(stage, -1))
        self.steps[stage].remove(commitment.step)
        self.settled_at_s.pop(digest, None)
        self.came_at_s.pop(digest, None)
        self.listed_by.pop(digest, None)
        for selection in self.drawn.pop(digest, []):
            verdict = self.by_unit.pop((digest, selection.tier, selection.unit), b"")
            self.verdicts.pop(verdict, None)
            self.confirmed.pop(verdict, None)


class AuditBooks:
    """All jobs that a validator audits, under one lock; `changed` tells of draws and verdicts."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.jobs: dict[bytes, AuditedJob] = {}

    def job(self, job_id: bytes) -> AuditedJob:
        """The job. Raises RecordError for one that this validator does not audit."""
        audited = self.jobs.get(job_id)
        if audited is None:
            raise RecordError("a job this validator does not know")
        return audited

    def forget(self, settled: Collection[bytes]) -> None:
        """Drop what rounds have settled, and jobs that ended and of which nothing is left."""
        with self.lock:
            for job_id, audited in list(self.jobs.items()):
                audited.forget(settled)
                if audited.closed and not audited.commitments and not audited.num_open:
                    del self.jobs[job_id]


def place_of(commitment: Commitment) -> Place:
    """What a worker may sign one commitment for."""
    return (commitment.plan_version, commitment.replica, commitment.stage, commitment.step)
