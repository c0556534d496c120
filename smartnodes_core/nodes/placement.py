"""A validator's job desk: open jobs that users submit, introduce their workers, keep the record, close them.

The record (author, stages, workers, state, history) is replicated to every validator of the plan. A job is closed by
its author, whose signature the validators pass on; by who opened it, if a worker does not take its stage; or when its
author is gone and no more work comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    NoWorkersError,
    RecordError,
    SmartnodesError,
    Unavailable,
)
from smartnodes_core.identity import Identity, verify_bytes
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import bytes_in, digest_in, text_in
from smartnodes_core.records import NodeKey, Role
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

ASSIGN_TIMEOUT_S = 30.0
MAX_OPEN_PER_AUTHOR = 64
MAX_CLOSED, MAX_ENDED = 1024, 100_000
MAX_HISTORY = 64
#: A job is opened soon after it was signed, so that the ids of ended ones need not be kept for ever.
MAX_AGE_S, MAX_AHEAD_S = 24 * 3600, 3600
#: How long after opening a job a validator may give it up because its workers do not take their stages.
GIVE_UP_S = 120.0
#: How long an author must be gone, and no commitment have come, for its job to be closed.
AUTHOR_TIMEOUT_S, IDLE_S = 60.0, 120.0
CLOSE_DOMAIN = "close job"


def closing_signature(identity: Identity, job_id: bytes) -> bytes:
    """The author's word that a job is done, which validators pass on to each other."""
    return identity.sign_bytes(CLOSE_DOMAIN, job_id)


@dataclass
class JobEntry:
    """A job in this validator's books."""

    job: Job
    opened_at_s: float
    opened_by: set[NodeKey] = field(default_factory=set)
    state: str = "open"
    closing: bytes = b""  # the author's signature, once it has closed it
    history: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_HISTORY))

    def note(self, event: str) -> None:
        self.history.append((time.time(), event))


class JobDesk:
    """Opens, replicates and closes jobs.

    `role_of` gives a member's role on chain (None: not registered, left or blacklisted), `idle_s` for how long no work
    of a job has been heard of. `on_new` is told of each job that begins, `on_open` and `on_close` of each once, or of
    each newer plan; `check_payment` raises for a job that nothing was deposited for.
    """

    def __init__(
        self,
        node: Node,
        network_id: int,
        role_of: Callable[[NodeKey], Role | None],
        idle_s: Callable[[bytes], float] = lambda job_id: 0.0,
    ):
        self.entries: dict[bytes, JobEntry] = {}
        self.on_new: Callable[[Job], None] = lambda job: None
        self.on_open: Callable[[Job], None] = lambda job: None
        self.on_close: Callable[[Job], None] = lambda job: None
        self.check_payment: Callable[[Job], None] = lambda job: None
        self._node, self._network_id = node, network_id
        self._role_of, self._idle_s = role_of, idle_s
        self._ended: dict[bytes, None] = {}
        self._timers: dict[NodeKey, threading.Timer] = {}
        self._stopped = False
        self._lock = threading.RLock()
        node.serve(self)
        node.on_peer_lost(lambda peer, reason: self._watch_for(peer))

    def stop(self) -> None:
        """Ends waiting for authors that are gone."""
        with self._lock:
            self._stopped = True
            timers = list(self._timers.values())
        for timer in timers:
            timer.cancel()

    # -- opening ------------------------------------------------------------------------------------------------------

    @allow(roles=("user",), max_body_bytes=0)
    def rpc_open_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Check a user's job and plan, tell the other validators, hand every worker its stages; all workers or none."""
        job = Job.open(bytes_in(params, "job"), bytes_in(params, "plan"))
        if job.record.author != caller.node_key:
            raise AuthorityError("a job is opened by its author")
        self._check(job)
        self._check_payment(job)
        before = self._enter(job, self._node.node_key)
        self._replicate(job)
        self._assign(job, before)
        return {"job": job.id}

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_replicate_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Another validator passes on a job that it opened."""
        job = Job.open(bytes_in(params, "job"), bytes_in(params, "plan"))
        if caller.node_key not in job.plan.validators:
            raise AuthorityError("a job is passed on by a validator of its plan")
        self._check(job)
        self._check_payment(job)
        self._enter(job, caller.node_key)
        return {}

    def _check(self, job: Job) -> None:
        """What record and plan cannot say of themselves. Raises JobError, RecordError."""
        if job.record.network_id != self._network_id:
            raise JobError(f"the job is for network {job.record.network_id}, this validator serves {self._network_id}")
        if self._node.node_key not in job.plan.validators:
            raise RecordError("the plan does not name this validator")
        for item in job.plan.assignments:
            self._check_role(item.worker, "worker", f"the worker planned for stage {item.stage}")
        for validator in job.plan.validators:
            self._check_role(validator, "validator", f"validator {validator.hex()[:8]} of the plan")

    def _check_payment(self, job: Job) -> None:
        if job.id not in self.entries:
            self.check_payment(job)

    def _check_role(self, key: NodeKey, wanted: Role, who: str) -> None:
        """An author that could name keys of its own as validators would have nobody audit its workers."""
        role = self._role_of(key)
        if role != wanted:
            found = "is not registered, or blacklisted" if role is None else f"is a {role}"
            raise JobError(f"{who} {found}: plan with another")

    def _enter(self, job: Job, opener: NodeKey) -> Job | None:
        """Take a job or a newer plan into the books; the job under the plan before, where there is one. Raises JobError
        for one that ended, RecordError, BusyError."""
        with self._lock:
            entry = self.entries.get(job.id)
            if job.id in self._ended or (entry is not None and entry.state != "open"):
                raise JobError("this job has ended: open a new one")
            before = None if entry is None else entry.job
            if entry is None:
                self._check_room(job)
                entry = self.entries[job.id] = JobEntry(job, time.time())
            elif job.plan.version < entry.job.plan.version:
                raise RecordError(f"plan {job.plan.version} was replaced by plan {entry.job.plan.version}")
            elif job.plan.version == entry.job.plan.version:
                if job.plan != entry.job.plan:
                    raise RecordError(f"two plans of version {job.plan.version}")
                entry.opened_by.add(opener)
                return None
            entry.job = job
            entry.opened_by.add(opener)
            entry.note(f"plan {job.plan.version}: {job.plan.reason[:200]}")
        if before is None:
            COUNTERS.add("jobs", "opened")
            self.on_new(job)
        self.on_open(job)
        return before

    def open_jobs(self) -> list[Job]:
        """The jobs that are open here."""
        with self._lock:
            return [entry.job for entry in self.entries.values() if entry.state == "open"]

    def ids(self, ended_after_s: float) -> list[bytes]:
        """The jobs that are open here, and those that ended after this Unix time."""
        with self._lock:
            return [
                job_id
                for job_id, entry in self.entries.items()
                if entry.state == "open" or (entry.history and entry.history[-1][0] > ended_after_s)
            ]

    def snapshot(self, job_id: bytes) -> JobEntry | None:
        """A job as it is now, which does not change any more; None for one that is not in the books."""
        with self._lock:
            entry = self.entries.get(job_id)
            return None if entry is None else replace(entry, history=entry.history.copy())

    def take_up(self, job: Job) -> bool:
        """Go on with a job that others keep and this validator has forgotten; False where it knows of it.

        Raises JobError, RecordError.
        """
        self._check(job)
        with self._lock:
            if job.id in self.entries or job.id in self._ended:
                return False
            entry = self.entries[job.id] = JobEntry(job, time.time())
            entry.note("taken up again")
        COUNTERS.add("jobs", "taken up")
        self.on_open(job)
        return True

    def _check_room(self, job: Job) -> None:
        age_s = time.time() - job.record.created_at_s
        if not -MAX_AHEAD_S < age_s < MAX_AGE_S:
            raise JobError(f"the job was signed {age_s:.0f} s ago: open it within a day, with a clock that is right")
        author = job.record.author
        num_open = sum(e.state == "open" and e.job.record.author == author for e in self.entries.values())
        if num_open >= MAX_OPEN_PER_AUTHOR:
            raise BusyError(f"{num_open} of your jobs are open: close some of them")

    def _replicate(self, job: Job) -> None:
        params = {"job": job.signed_record, "plan": job.signed_plan}
        for validator in job.plan.validators:
            if validator != self._node.node_key:
                try:
                    self._node.call(validator, "replicate_job", params, timeout_s=ASSIGN_TIMEOUT_S)
                except SmartnodesError as error:
                    logger.warning("a validator could not be told of the job: %s", error)

    def _assign(self, job: Job, before: Job | None) -> None:
        """All workers take their stages, or the job is closed; under a newer plan it stays open, for another try.

        Workers of the plan before that have no stage any more are told so.
        """
        for item in job.plan.assignments:
            self._node.add_address(item.worker, item.endpoint)
        params = {"job": job.signed_record, "plan": job.signed_plan}
        for worker in dict.fromkeys(item.worker for item in job.plan.assignments):
            try:
                self._node.call(worker, "assign", params, timeout_s=ASSIGN_TIMEOUT_S)
            except SmartnodesError as error:
                if job.plan.version == 0:
                    self.close(job, "a worker did not take its stage")
                if isinstance(error, Unavailable):
                    raise NoWorkersError(f"worker {worker.hex()[:8]} does not take its stage: {error}") from None
                raise
        kept = {item.worker for item in job.plan.assignments}
        for worker in {item.worker for item in before.plan.assignments} - kept if before is not None else ():
            self._quietly(worker, "assign", params)

    # -- closing ------------------------------------------------------------------------------------------------------

    @allow(roles=("user", "validator"), max_body_bytes=0)
    def rpc_close_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """The author is done (or a validator passes that on): workers are released, the record stays."""
        job_id, reason = digest_in(params, "job"), text_in(params, "reason", "completed")
        signature = bytes_in(params, "signature", 64)
        with self._lock:
            entry = self.entries.get(job_id)
        if entry is None:
            raise JobError("a job this validator does not know")
        job = entry.job
        if signature:
            verify_bytes(job.record.author, CLOSE_DOMAIN, job_id, signature)
        elif not self._may_give_up(entry, caller):
            raise AuthorityError("a job is closed by its author")
        if caller.node_key == job.record.author:
            self.close(job, reason, signature)
        else:
            self._finish(job, reason, signature)
        return {}

    def _may_give_up(self, entry: JobEntry, caller: Peer) -> bool:
        """Without the author's word: who opened it, soon after; any validator of the plan when no more work comes."""
        if caller.node_key in entry.opened_by and time.time() - entry.opened_at_s < GIVE_UP_S:
            return True
        return caller.node_key in entry.job.plan.validators and self._idle_s(entry.job.id) > IDLE_S

    def close(self, job: Job, reason: str, signature: bytes = b"") -> None:
        """Close a job here and at the other validators; each releases the workers when its audits are through."""
        self._finish(job, reason, signature)
        for validator in job.plan.validators:
            self._quietly(validator, "close_job", {"job": job.id, "reason": reason, "signature": signature})

    def release_workers(self, job: Job, reason: str) -> None:
        """Tell the job's workers that this validator needs their stages no more."""
        for worker in dict.fromkeys(item.worker for item in job.plan.assignments):
            self._quietly(worker, "release", {"job": job.id, "reason": reason})

    def _finish(self, job: Job, reason: str, signature: bytes) -> None:
        with self._lock:
            entry = self.entries.get(job.id)
            if entry is None or entry.state != "open":
                return
            entry.state, entry.closing = "closed", signature
            entry.note(f"closed: {reason}")
            self._ended[job.id] = None
            closed = [job_id for job_id in self._ended if job_id in self.entries]
            for job_id in closed[: max(0, len(closed) - MAX_CLOSED)]:
                del self.entries[job_id]
            for job_id in list(self._ended)[: max(0, len(self._ended) - MAX_ENDED)]:
                del self._ended[job_id]
        COUNTERS.add("jobs", "closed")
        self.on_close(job)

    def _quietly(self, peer: NodeKey, method: str, params: dict[str, Any]) -> None:
        if peer == self._node.node_key:
            return
        try:
            self._node.notify(peer, method, params)
        except SmartnodesError as error:
            logger.debug("%s did not reach a peer: %s", method, error)

    # -- authors that vanish ------------------------------------------------------------------------------------------

    def _jobs_of(self, author: NodeKey) -> list[Job]:
        with self._lock:
            entries = list(self.entries.values())
        return [entry.job for entry in entries if entry.state == "open" and entry.job.record.author == author]

    def _watch_for(self, author: NodeKey) -> None:
        """A peer is lost: if it has jobs here, look again after a while."""
        with self._lock:
            if self._stopped or author in self._timers or not self._jobs_of(author):
                return
            timer = threading.Timer(AUTHOR_TIMEOUT_S, self._look_for, (author,))
            timer.daemon = True
            self._timers[author] = timer
            timer.start()

    def _look_for(self, author: NodeKey) -> None:
        with self._lock:
            self._timers.pop(author, None)
        if any(peer.node_key == author for peer in self._node.peers()):
            return
        for job in self._jobs_of(author):
            if self._idle_s(job.id) > IDLE_S:
                self.close(job, "its author is gone")
        self._watch_for(author)  # those that are still worked on
