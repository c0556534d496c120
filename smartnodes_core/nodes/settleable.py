"""Which records the next round may settle, of those that a validator holds, and what the rules make of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from smartnodes_core.chain.base import RoundState
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.auditing import AuditDesk
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.paying import Escrows
from smartnodes_core.records import Commitment, Verdict
from smartnodes_core.reputation import VerdictCounts
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

    def unsettled(self) -> tuple[dict[bytes, Verdict], dict[bytes, Commitment]]:
        """What the next proposal may name, capped: verdicts in the order of their digests, commitments in that of
        their steps."""
        held, payable = self.verdicts(), sorted(self.payable().items(), key=lambda item: (item[1].step, item[0]))
        settled = set(self._is_settled([*held, *(digest for digest, _ in payable)]))
        verdicts = {digest: verdict for digest, verdict in sorted(held.items()) if digest not in settled}
        commitments = {digest: commitment for digest, commitment in payable if digest not in settled}
        jobs = list(dict.fromkeys(commitment.job for commitment in commitments.values()))[:MAX_JOBS]
        commitments = {digest: c for digest, c in commitments.items() if c.job in jobs}
        return _first(verdicts), _first(commitments)

    def since(self) -> dict[bytes, float]:
        """What could be settled now, and since when it was seen to be so here (of `time.monotonic`). To be asked again
        and again: what nobody has looked at counts as new."""
        held = [*self.verdicts(), *self.payable()]
        settled, now_s = set(self._is_settled(held)), time.monotonic()
        with self._lock:
            self._since_s = {each: self._since_s.get(each, now_s) for each in held if each not in settled}
            return self._since_s

    def is_full(self, verdicts: Collection[Verdict], commitments: Collection[Commitment]) -> bool:
        """Whether a proposal names as many as it may: what is left out waits for the next round."""
        num_jobs = len({commitment.job for commitment in commitments})
        return max(len(verdicts), len(commitments)) >= MAX_NAMED or num_jobs >= MAX_JOBS

    def verdicts(self) -> dict[bytes, Verdict]:
        """Verdicts on units that the seeds select; of frauds, those that were found or re-run here."""
        with self._audits.lock:
            return {
                digest: verdict
                for audited in self._audits.jobs.values()
                for digest, (verdict, _) in audited.verdicts.items()
                if audited.is_selected(verdict) and (verdict.finding != "fraudulent" or digest in audited.confirmed)
            }

    def frauds_since(self, since_s: float) -> set[bytes]:
        """Fraudulent verdicts, not settled, that were confirmed here before `since_s` (of `time.monotonic`)."""
        with self._audits.lock:
            found = {
                digest
                for audited in self._audits.jobs.values()
                for digest, at_s in audited.confirmed.items()
                if at_s < since_s
                and audited.verdicts[digest][0].finding == "fraudulent"
                and audited.is_selected(audited.verdicts[digest][0])
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
        self, state: RoundState, verdicts: Mapping[bytes, Verdict], commitments: Mapping[bytes, Commitment]
    ) -> RoundEvidence:
        """The records as the rules take them: by account. Asks the chain for each job that is paid, and for a worker
        that is new. Raises RecordError for a job that is forgotten already."""
        workers = {verdict.worker for verdict in verdicts.values()}
        workers |= {commitment.worker for commitment in commitments.values()}
        accounts = {worker: self._membership.account_of(worker) for worker in workers}
        counts: dict[bytes, VerdictCounts] = {}
        for verdict in verdicts.values():
            account = accounts[verdict.worker]
            if account is not None:
                before = counts.get(account, VerdictCounts())
                counts[account] = replace(before, **{verdict.finding: getattr(before, verdict.finding) + 1})
        work: dict[bytes, dict[bytes, int]] = {}
        for commitment in commitments.values():
            account = accounts[commitment.worker]
            if account is not None:
                units = work.setdefault(commitment.job, {})
                units[account] = units.get(account, 0) + commitment.work_units
        return RoundEvidence(
            verdicts=counts,
            work=[self._escrows.work(self._job(job), units, state) for job, units in work.items()],
            jobs_disputed=sorted({v.job for v in verdicts.values() if v.finding == "fraudulent"}),
            digests=[*verdicts, *commitments],
        )

    def _job(self, job_id: bytes) -> Job:
        with self._audits.lock:
            return self._audits.books.job(job_id).job


def _first(records: Mapping[bytes, Any]) -> dict[bytes, Any]:
    return dict(list(records.items())[:MAX_NAMED])
