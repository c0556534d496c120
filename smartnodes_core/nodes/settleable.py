"""Which records the next round may settle, of those that a validator holds, and what the rules make of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from smartnodes_core.chain.base import RoundState
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.finding import Found, is_fraud, tally
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.paying import Escrows
from smartnodes_core.records import Commitment, Verdict
from smartnodes_core.rounds import RoundEvidence

#: Records one proposal names at most, of each kind; the rest waits for the next round.
MAX_NAMED = 20_000
#: Jobs whose work one proposal settles at most.
MAX_JOBS = 100


class Settleable:
    """See the module. `is_settled` gives those of some digests that a round carried already."""

    def __init__(
        self,
        audits: AuditDesk,
        membership: Membership,
        escrows: Escrows,
        is_settled: Callable[[Iterable[bytes]], list[bytes]],
    ):
        self._audits, self._membership, self._escrows, self._is_settled = audits, membership, escrows, is_settled
        self._lock = threading.Lock()
        self._since_s: dict[bytes, float] = {}

    def unsettled(self) -> tuple[dict[bytes, Found], dict[bytes, Commitment]]:
        """What the next proposal may name, capped: findings in the order of their digests, commitments in that of
        their steps."""
        held, payable = self.findings(), sorted(self.payable().items(), key=lambda item: (item[1].step, item[0]))
        settled = set(self._is_settled([*held, *(digest for digest, _ in payable)]))
        found = {digest: each for digest, each in sorted(held.items()) if digest not in settled}
        commitments = {digest: commitment for digest, commitment in payable if digest not in settled}
        jobs = list(dict.fromkeys(commitment.job for commitment in commitments.values()))[:MAX_JOBS]
        commitments = {digest: c for digest, c in commitments.items() if c.job in jobs}
        return _first(found), _first(commitments)

    def since(self) -> dict[bytes, float]:
        """What could be settled now, and since when it was seen to be so here (of `time.monotonic`). To be asked again
        and again: what nobody has looked at counts as new."""
        held = [*self.findings(), *self.payable()]
        settled, now_s = set(self._is_settled(held)), time.monotonic()
        with self._lock:
            self._since_s = {each: self._since_s.get(each, now_s) for each in held if each not in settled}
            return self._since_s

    def is_full(self, found: Collection[Found], commitments: Collection[Commitment]) -> bool:
        """Whether a proposal names as many as it may: what is left out waits for the next round."""
        num_jobs = len({commitment.job for commitment in commitments})
        return max(len(found), len(commitments)) >= MAX_NAMED or num_jobs >= MAX_JOBS

    def findings(self) -> dict[bytes, Found]:
        """What rounds may carry, by the digest that names it: verdicts on units that were drawn (of frauds, those that
        were found or re-run here) and proofs."""
        with self._audits.lock:
            return {digest: found for audited in self._audits.jobs.values() for digest, found in audited.findings()}

    def frauds_since(self, since_s: float) -> set[bytes]:
        """Frauds, not settled, that were confirmed or proven here before `since_s` (of `time.monotonic`)."""
        with self._audits.lock:
            found = {
                digest
                for audited in self._audits.jobs.values()
                for digest, each in audited.findings()
                if is_fraud(each) and audited.confirmed[digest] < since_s
            }
        return found.difference(self._is_settled(found))

    def payable(self) -> dict[bytes, Commitment]:
        """Commitments whose audit window has closed, or whose job has; those of a key that several accounts ask for
        wait until a round has said whose it is."""
        with self._audits.lock:
            closed = {
                digest: commitment
                for audited in self._audits.jobs.values()
                for digest, commitment in audited.commitments.items()
                if audited.window_closed(commitment)
            }
        contested = {worker for worker in {c.worker for c in closed.values()} if self._membership.is_contested(worker)}
        return {digest: commitment for digest, commitment in closed.items() if commitment.worker not in contested}

    def evidence(
        self, state: RoundState, found: Mapping[bytes, Found], commitments: Mapping[bytes, Commitment]
    ) -> RoundEvidence:
        """The records as the rules take them: by account. Asks the chain for each job that is paid, and for a member
        that is new. Raises RecordError for a job that is forgotten already."""
        work: dict[bytes, dict[bytes, int]] = {}
        for commitment in commitments.values():
            account = self._membership.account_of(commitment.worker)
            if account is not None:
                units = work.setdefault(commitment.job, {})
                units[account] = units.get(account, 0) + commitment.work_units
        return RoundEvidence(
            verdicts=tally(found.values(), self._membership.account_of, lambda verdict: self._strikes(verdict, found)),
            work=[self._escrows.work(self._job(job), units, state) for job, units in work.items()],
            jobs_disputed=sorted({each.job for each in found.values() if is_fraud(each)}),
            digests=[*found, *commitments],
        )

    def _strikes(self, verdict: Verdict, named: Mapping[bytes, Found]) -> int:
        """The silences that count against a worker with this one, of those that rounds have carried, or this does."""
        with self._audits.lock:
            audited = self._audits.books.job(verdict.job)
            silent = audited.silent_verdicts(verdict)
            told = {*named, *self._is_settled(silent)}
            return audited.strikes(verdict, [each.step for digest, each in silent.items() if digest in told])

    def _job(self, job_id: bytes) -> Job:
        with self._audits.lock:
            return self._audits.books.job(job_id).job


def _first(records: Mapping[bytes, Any]) -> dict[bytes, Any]:
    return dict(list(records.items())[:MAX_NAMED])
