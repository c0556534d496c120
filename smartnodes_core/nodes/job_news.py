"""Which jobs began and ended, as rounds tell the chain: each once, by its author's word, which is shown to voters."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from smartnodes_core.errors import AuthorityError, RecordError, SmartnodesError
from smartnodes_core.identity import verify_bytes
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import count_in, digest_in
from smartnodes_core.nodes.placement import CLOSE_DOMAIN
from smartnodes_core.records import MAX_RECORD_BYTES, NodeKey, Role
from smartnodes_core.rounds import RoundProposal
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Jobs of each kind that one round tells of at most; the rest waits for the next.
MAX_TOLD = 100
#: Jobs whose records are kept to be shown, and ids that are remembered as told.
MAX_PAPERS, MAX_REMEMBERED = 1024, 100_000
FETCH_TIMEOUT_S = 5.0


class JobNews:
    """Beginnings and ends of jobs that this validator has heard of. `role_of` gives a member's role on chain."""

    def __init__(self, node: Node, network_id: int, role_of: Callable[[NodeKey], Role | None]):
        self._node, self._network_id, self._role_of = node, network_id, role_of
        self._lock = threading.Lock()
        self._papers: dict[bytes, Job] = {}
        self._closings: dict[bytes, bytes] = {}
        self._told: dict[tuple[str, bytes], int] = {}
        node.serve(self)

    def opened(self, job: Job) -> None:
        """A job began."""
        with self._lock:
            self._papers[job.id] = job
            _trim(self._papers, MAX_PAPERS)

    def closed(self, job: Job, signature: bytes) -> None:
        """A job ended; `signature` is its author's word that it is done, empty where it was given up without."""
        if signature:
            with self._lock:
                self._closings[job.id] = signature
                _trim(self._closings, MAX_PAPERS)

    def propose(self) -> tuple[list[bytes], list[bytes]]:
        """Jobs that began, and jobs that ended, of which no round has told yet."""
        with self._lock:
            created = [job_id for job_id in self._papers if ("created", job_id) not in self._told]
            completed = [
                job_id
                for job_id in self._closings
                if job_id in self._papers and ("completed", job_id) not in self._told
            ]
        return sorted(created[:MAX_TOLD]), sorted(completed[:MAX_TOLD])

    def unproven(self, content: RoundProposal, sources: Sequence[NodeKey]) -> list[str]:
        """Why this validator cannot vouch for what a proposal tells of jobs, after asking `sources`."""
        if max(len(content.jobs_created), len(content.jobs_completed)) > MAX_TOLD:
            return [f"jobs: at most {MAX_TOLD} of each kind in one round"]
        reasons = []
        for job_id in content.jobs_created:
            if not self._may_tell("created", job_id) or not self._is_known(job_id, sources):
                reasons.append(f"jobs_created: {job_id.hex()[:16]} was told before, or nobody shows its record")
        for job_id in content.jobs_completed:
            if not self._may_tell("completed", job_id) or not self._is_closed(job_id, sources):
                reasons.append(f"jobs_completed: {job_id.hex()[:16]} was told before, or its author did not close it")
        return reasons

    def note(self, content: RoundProposal) -> None:
        """A round was executed."""
        with self._lock:
            for kind, told in (("created", content.jobs_created), ("completed", content.jobs_completed)):
                self._told.update(dict.fromkeys(((kind, job_id) for job_id in told), content.round))
            _trim(self._told, MAX_REMEMBERED)

    def undo_from(self, number: int) -> None:
        """Rounds from this one on are not on the chain any more."""
        with self._lock:
            self._told = {place: told_in for place, told_in in self._told.items() if told_in < number}

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_job_papers(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """A job's signed record, signed plan and its author's closing signature (empty: none), one after the other."""
        job_id = digest_in(params, "job")
        with self._lock:
            job, closing = self._papers.get(job_id), self._closings.get(job_id, b"")
        if job is None:
            raise RecordError("a job of which nothing is kept here")
        parts = (job.signed_record, job.signed_plan, closing)
        return {"record_bytes": len(parts[0]), "plan_bytes": len(parts[1])}, list(parts)

    def _may_tell(self, kind: str, job_id: bytes) -> bool:
        with self._lock:
            return (kind, job_id) not in self._told

    def _is_known(self, job_id: bytes, sources: Sequence[NodeKey]) -> bool:
        with self._lock:
            if job_id in self._papers:
                return True
        return any(self._fetch(job_id, source) for source in sources)

    def _is_closed(self, job_id: bytes, sources: Sequence[NodeKey]) -> bool:
        with self._lock:
            if job_id in self._closings:
                return True
        return any(self._fetch(job_id, source) and job_id in self._closings for source in sources)

    def _fetch(self, job_id: bytes, source: NodeKey) -> bool:
        """Whether `source` shows the job's record, signed by a user of this network; what it shows is kept."""
        try:
            reply = self._node.call(
                source, "job_papers", {"job": job_id}, timeout_s=FETCH_TIMEOUT_S, max_body_bytes=3 * MAX_RECORD_BYTES
            )
            first = count_in(reply.params, "record_bytes", len(reply.body))
            second = first + count_in(reply.params, "plan_bytes", len(reply.body) - first)
            job = Job.open(bytes(reply.body[:first]), bytes(reply.body[first:second]))
            if job.id != job_id or job.record.network_id != self._network_id:
                raise RecordError("not the job that was asked for")
            if self._role_of(job.record.author) != "user":
                raise AuthorityError("a job is a user's, and its author is none")
            self.opened(job)
            signature = bytes(reply.body[second:])
            if signature:
                verify_bytes(job.record.author, CLOSE_DOMAIN, job_id, signature)
                self.closed(job, signature)
            return True
        except SmartnodesError as error:
            logger.info("no papers of job %s from %s: %s", job_id.hex()[:8], source.hex()[:8], error)
            return False


def _trim(table: dict[Any, Any], most: int) -> None:
    for key in list(table)[: max(0, len(table) - most)]:
        del table[key]
