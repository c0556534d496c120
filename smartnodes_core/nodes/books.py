"""What a validator holds of the jobs it audits, each within a cap: draws (`draw_books.py`), commitments
(`claim_books.py`), verdicts and proofs (`verdict_books.py`); here is what of it is payable, and forgotten.

No message is moved here. `auditing.py`, `drawing.py` and `challenging.py` fill these books, rounds read them
(`round_books.py`) and have them forgotten when they are settled.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field

from smartnodes_core.audit_silence import is_unpaid
from smartnodes_core.errors import RecordError
from smartnodes_core.nodes.claim_books import place_of
from smartnodes_core.nodes.verdict_books import VerdictBook, stage_of
from smartnodes_core.records import Commitment, Reveal

#: How long a settled commitment waits for verdicts that a validator withholds.
KEEP_SETTLED_S = 3600.0
#: How many steps behind a settled one a commitment may still come in late and be paid.
LATE_STEPS = 1024


@dataclass(eq=False)
class AuditedJob(VerdictBook):
    """One job's audits. Guarded by the lock of its `AuditBooks`."""

    specs: dict[int, bytes] = field(default_factory=dict)
    settled_at_s: dict[bytes, float] = field(default_factory=dict)
    num_open: int = 0  # cases that wait for this validator's verdict

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
            if stage_of(verdict) == stage_of(commitment) and verdict.finding in found and self.is_selected(verdict):
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
