"""What a validator holds of the jobs it audits: commitments, verdicts, proofs and (`draw_books.py`) draws, each within
a cap.

No message is moved here. `auditing.py`, `drawing.py` and `challenging.py` fill these books, rounds read them
(`round_books.py`) and have them forgotten when they are settled.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from smartnodes_core.audit import Selection, disagreeing_units, link_disagreements, sharing_disagreements
from smartnodes_core.audit_grounds import departed_in, grounds_of
from smartnodes_core.audit_proofs import MIN_WITNESSES, Proof, check_proof, check_silence, name_of, two_versions
from smartnodes_core.audit_silence import is_forced, is_unpaid, strikes
from smartnodes_core.errors import AuthorityError, BusyError, RecordError
from smartnodes_core.identity import verify
from smartnodes_core.nodes.draw_books import DrawBook, Excluded
from smartnodes_core.records import Commitment, NodeKey, Reveal, Signed, Silence, TwoVersions, Verdict, Withholding

#: Signed commitments of one stage that wait to be settled.
MAX_STAGE_BYTES = 64 << 20
MAX_LINK_FAULTS = 256
#: How long a settled commitment waits for verdicts that a validator withholds.
KEEP_SETTLED_S = 3600.0
#: How many steps behind a settled one a commitment may still come in late and be paid.
LATE_STEPS = 1024

Place = tuple[int, int, int, int]
StagePlace = tuple[int, int]


class SecondVersionError(RecordError):
    """Two signed commitments for one step, with the proof where both are at hand."""

    code = "second-version"
    proof: TwoVersions | None = None


@dataclass(eq=False)
class AuditedJob(DrawBook):
    """One job's audits. Guarded by the lock of its `AuditBooks`."""

    signed: dict[bytes, bytes] = field(default_factory=dict)
    by_place: dict[Place, bytes] = field(default_factory=dict)
    void: set[Place] = field(default_factory=set)  # two commitments were signed: neither is paid
    proofs: dict[bytes, Proof] = field(default_factory=dict)  # by the name under which a round carries them
    departures: dict[NodeKey, bytes] = field(default_factory=dict)  # of validators that leave, as they signed it
    disputes: dict[bytes, set[bytes]] = field(default_factory=dict)  # commitments that contradict each other
    steps: dict[StagePlace, list[int]] = field(default_factory=dict)  # ascending
    settled_step: dict[StagePlace, int] = field(default_factory=dict)
    num_bytes: dict[StagePlace, int] = field(default_factory=dict)
    specs: dict[int, bytes] = field(default_factory=dict)
    verdicts: dict[bytes, tuple[Verdict, bytes]] = field(default_factory=dict)
    silences: dict[bytes, tuple[Silence, bytes]] = field(default_factory=dict)  # by the verdict that names each
    by_unit: dict[tuple[bytes, int, int], bytes] = field(default_factory=dict)
    confirmed: dict[bytes, float] = field(default_factory=dict)  # frauds that were re-run or proven here, and when
    came_at_s: dict[bytes, float] = field(default_factory=dict)
    settled_at_s: dict[bytes, float] = field(default_factory=dict)
    link_faults: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINK_FAULTS))
    active_at_s: float = field(default_factory=time.monotonic)  # when it was opened, or the last commitment came
    num_open: int = 0  # cases that wait for this validator's verdict

    def of_stage(self, stage: int, replica: int) -> str:
        """The name under which the worker keeps a stage (`StageOfJob.key`)."""
        return f"{self.job.id.hex()}/{replica}/{stage}"

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

    def add_departure(self, data: bytes) -> bool:
        """Keep a validator's signed word that it leaves; False where it is held. Raises RecordError, SignatureError."""
        validator = departed_in(Signed.decode(data), self.job)
        if validator is None:
            raise RecordError("this is no departure")
        if validator in self.departures:
            return False
        self.departures[validator] = data
        return True

    def honour_departures(self) -> bool:
        """Make draws without those who leave, once they have revealed what they owe: else one could leave when it sees
        what it would draw. Whether anybody left; the last one never does."""
        before = self.excluded
        for validator in sorted(self.departures):
            is_last = len(self.excluded) + 1 >= len(self.job.plan.validators)
            if not is_last and validator not in self.excluded and not self.owes(validator):
                self.exclude(validator)
        return self.excluded != before

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

    def grounds(self, digest: bytes) -> list[bytes]:
        """The papers on which a commitment is audited whatever its seed says (`audit_grounds.py`)."""
        commitment = self.commitments[digest]
        silences = [
            data
            for verdict, (silence, data) in self.silences.items()
            if (silence.replica, silence.stage, silence.worker)
            == (commitment.replica, commitment.stage, commitment.worker)
            and is_forced(commitment.step, silence.forced_from)
            and self.is_selected(self.verdicts[verdict][0])
        ]
        others = [self.signed[other] for other in sorted(self.disputes.get(digest, ())) if other in self.signed]
        return [*silences[:1], *others[:2]]

    def forced(self, digest: bytes) -> frozenset[int]:
        """The units of a commitment that are audited whatever its seed says."""
        return grounds_of(self.grounds(digest), self.job, self.commitments[digest]).forced

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
        """Whether its worker need not hold it any more."""
        return self.num_later(commitment) >= self.window_steps

    def draw(self, digest: bytes) -> list[Selection]:
        """Draw for a commitment whose preimages are all out; returns what is newly selected. Harmless when repeated:
        more may be drawn when a silence or a contradiction is known."""
        draws = self.draws(digest) if digest in self.commitments else []
        if not draws:
            return []
        forced = self.forced(digest)
        chosen = self.drawn.setdefault(digest, [])
        found = [each for one in draws for each in self.selections(digest, one, forced)]
        fresh = [each for each in dict.fromkeys(found) if each not in chosen]
        chosen.extend(fresh)
        return fresh

    # -- what is payable ----------------------------------------------------------------------------------------------

    def window_closed(self, commitment: Commitment) -> bool:
        """Whether it is payable: nothing of it will be challenged any more, and nothing speaks against it.

        It must have been drawn for. The job has ended, or a window of later ones is held, and what was drawn of it and
        of those has been examined; who withholds a verdict delays that for `window_s` at most. Held ones are counted,
        not step numbers: a worker that names a far step closes no window. One that shows many steps at once, just
        before a round, closes it no sooner than they are examined.
        """
        digest = self.by_place.get(place_of(commitment), b"")
        if place_of(commitment) in self.void or self._is_late(place_of(commitment)) or digest not in self.drawn:
            return False
        stage, terms = (commitment.stage, commitment.replica), self.job.record.audit
        steps = self.steps.get(stage, [])
        later = steps[bisect_right(steps, commitment.step) :][: terms.window_steps]
        if (len(later) < terms.window_steps and not self.closed) or self._is_silenced(commitment):
            return False
        if any(not self._is_convicted(other) for other in self.disputes.get(digest, ())):
            return False
        place = (commitment.plan_version, commitment.replica, commitment.stage)
        held = [digest, *(self.by_place.get((*place, step), b"") for step in later)]
        waited_s = time.monotonic() - self.came_at_s.get(digest, 0.0)
        return waited_s > terms.window_s or all(self._is_examined(each) for each in held)

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

    def _is_silenced(self, commitment: Commitment) -> bool:
        if not self.silences:
            return False
        found: dict[str, list[int]] = {"silent": [], "honest": []}
        for verdict, _ in self.verdicts.values():
            if _of(verdict) == _of(commitment) and verdict.finding in found and self.is_selected(verdict):
                found[verdict.finding].append(verdict.step)
        return is_unpaid(commitment.step, found["silent"], found["honest"])

    def _is_convicted(self, digest: bytes) -> bool:
        """Whether who signed a commitment signed two, cheated in it, or did not open it."""
        commitment = self.commitments.get(digest)
        if commitment is None:
            return False
        against = [
            name
            for name, (verdict, _) in self.verdicts.items()
            if verdict.commitment == digest and self.is_selected(verdict)
            if verdict.finding == "silent" or (verdict.finding == "fraudulent" and name in self.confirmed)
        ]
        return bool(against) or place_of(commitment) in self.void

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def store_verdict(self, verdict: Verdict, data: bytes, silence: bytes = b"") -> bool:
        """Keep a verdict, one of silence with the signed `Silence` that it names; False where it is held already.
        Raises RecordError for one that speaks of another commitment than it names, of one that is not held, differs
        from an earlier one of the same unit, or of silence without its proof."""
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
        found = self._check_silence(verdict, silence) if verdict.finding == "silent" else None
        if self.by_unit.setdefault((verdict.commitment, verdict.tier, verdict.unit), digest) != digest:
            raise SecondVersionError("two verdicts about one unit")
        self.verdicts[digest] = (verdict, data)
        if found is not None:
            self.silences[digest] = (found, silence)
        return True

    def _check_silence(self, verdict: Verdict, data: bytes) -> Silence:
        """Raises RecordError or SignatureError where the proof is not the one that the verdict names."""
        signed = Signed.decode(data)
        silence = verify(signed, Silence)
        check_silence(silence, signed.signer, self.job)
        names = ("job", "replica", "stage", "step", "commitment", "challenge", "worker", "auditor")
        if silence.digest() != verdict.evidence or any(getattr(silence, n) != getattr(verdict, n) for n in names):
            raise RecordError("a verdict of silence names the proof that comes with it")
        return silence

    def findings(self) -> Iterator[tuple[bytes, Verdict | Proof]]:
        """What rounds may carry, by the digest that names it: verdicts on what was drawn (of frauds, those that were
        found or re-run here) and proofs; that a validator withheld, only where there are witnesses enough."""
        for digest, (verdict, _) in self.verdicts.items():
            if self.is_selected(verdict) and (verdict.finding != "fraudulent" or digest in self.confirmed):
                yield digest, verdict
        for name, proof in self.proofs.items():
            if isinstance(proof, TwoVersions) or len(self.job.plan.validators) >= MIN_WITNESSES:
                yield name, proof

    def silent_verdicts(self, about: Verdict) -> dict[bytes, Verdict]:
        """The verdicts of silence, by digest, of the stage and worker that one is about."""
        held = {digest: self.verdicts[digest][0] for digest in self.silences}
        return {digest: each for digest, each in held.items() if _of(each) == _of(about) and self.is_selected(each)}

    def silence_of(self, digest: bytes) -> bytes:
        """The signed proof that a verdict of silence names; empty for others."""
        return self.silences[digest][1] if digest in self.silences else b""

    def followed_by(self, verdict: Verdict) -> list[bytes]:
        """The later commitments that are held of the stage that a verdict is about."""
        return [
            digest
            for digest, commitment in self.commitments.items()
            if _of(commitment) == _of(verdict) and commitment.step > verdict.step
        ]

    def strikes(self, verdict: Verdict, steps: Collection[int]) -> int:
        """How many silences count with this one, of those in `steps`; none where there are too few witnesses."""
        if len(self.job.plan.validators) < MIN_WITNESSES:
            return 0
        return strikes(verdict.step, steps, self.job.record.audit.window_steps)

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
            waited_s = now_s - self.came_at_s.get(digest, now_s)
            unpaid = self.closed and (place in self.void or waited_s > KEEP_SETTLED_S or self._is_over(digest, settled))
            late = self._is_late(place) or unpaid
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

    def _is_over(self, digest: bytes, settled: Collection[bytes]) -> bool:
        """Of a job that ended: whether it was examined and rounds carried all that was found, and it stays unpaid."""
        found = [self.by_unit.get((digest, each.tier, each.unit)) for each in self.drawn.get(digest, [])]
        examined = digest in self.drawn and all(each in settled for each in found)
        return examined and not self.window_closed(self.commitments[digest])

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
            self.silences.pop(verdict, None)
            self.confirmed.pop(verdict, None)
        for other in self.disputes.pop(digest, ()):
            self.disputes.get(other, set()).discard(digest)


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

    def note_reveal(self, reveal: Reveal, data: bytes) -> list[tuple[AuditedJob, list[bytes]]]:
        """A validator showed a preimage, and with it all before it, of whatever job: the commitments, by job, that it
        listed with one of those."""
        found = []
        for audited in self.jobs.values():
            before = audited.newest.get(reveal.validator)
            if before is None or before[0].reveal < reveal.reveal:
                audited.newest[reveal.validator] = (reveal, data)
            listed = [
                digest
                for (validator, index), (received, _) in audited.lists.items()
                if validator == reveal.validator and index <= reveal.reveal
                for digest in received.commitments
            ]
            found.append((audited, [digest for digest in listed if digest not in audited.drawn]))
        return found

    def forget(self, settled: Collection[bytes]) -> None:
        """Drop what rounds have settled, and jobs that ended and of which nothing is left."""
        with self.lock:
            for job_id, audited in list(self.jobs.items()):
                audited.forget(settled)
                told = all(name in settled for name, _ in audited.findings())
                if audited.closed and told and not audited.commitments and not audited.num_open:
                    del self.jobs[job_id]


def _of(each: Commitment | Verdict) -> tuple[int, int, NodeKey]:
    return each.stage, each.replica, each.worker


def place_of(commitment: Commitment) -> Place:
    """What a worker may sign one commitment for."""
    return (commitment.plan_version, commitment.replica, commitment.stage, commitment.step)
