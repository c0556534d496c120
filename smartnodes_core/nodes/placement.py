"""A validator's job desk: open jobs that users submit, introduce their workers, keep the record, close them.

The record (author, stages, workers, state, history) is replicated to every validator of the plan.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from smartnodes_core.errors import AuthorityError, JobError, RecordError, SmartnodesError, Unavailable
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

ASSIGN_TIMEOUT_S = 30.0


@dataclass
class JobEntry:
    """A job in this validator's books."""

    job: Job
    opened_at_s: float
    state: str = "open"
    history: list[tuple[float, str]] = field(default_factory=list)

    def note(self, event: str) -> None:
        self.history.append((time.time(), event))


class JobDesk:
    """Opens, replicates and closes jobs. `reputation` gives a node key's reputation on chain (None: not registered)."""

    def __init__(self, node: Node, network_id: int, reputation: Callable[[NodeKey], int | None]):
        self.entries: dict[bytes, JobEntry] = {}
        self.on_open: Callable[[Job], None] = lambda job: None
        self.on_close: Callable[[Job], None] = lambda job: None
        self._node = node
        self._network_id = network_id
        self._reputation = reputation
        self._lock = threading.RLock()
        node.serve(self)

    @allow(roles=("user",), max_body_bytes=0)
    def rpc_open_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Check a user's job and plan, tell the other validators, hand every worker its stages; all workers or none."""
        job = Job.open(params["job"], params["plan"])
        if job.record.author != caller.node_key:
            raise AuthorityError("a job is opened by its author")
        if self._node.node_key not in job.plan.validators:
            raise RecordError("the plan does not name this validator")
        self._check_workers(job)
        self._enter(job)
        self._replicate(job)
        self._assign(job)
        return {"job": job.id}

    def _check_workers(self, job: Job) -> None:
        if job.record.network_id != self._network_id:
            raise JobError(f"the job is for network {job.record.network_id}, this validator serves {self._network_id}")
        for item in job.plan.assignments:
            reputation = self._reputation(item.worker)
            if not reputation:
                what = "is not registered" if reputation is None else "is blacklisted"
                raise JobError(f"the worker planned for stage {item.stage} {what}: plan with another")

    def _enter(self, job: Job) -> None:
        with self._lock:
            known = self.entries.get(job.id)
            if known is not None and known.job.plan.version >= job.plan.version:
                return
            entry = self.entries.setdefault(job.id, JobEntry(job, time.time()))
            entry.job = job
            entry.note(f"plan {job.plan.version}: {job.plan.reason}")
        self.on_open(job)

    def _replicate(self, job: Job) -> None:
        for validator in job.plan.validators:
            if validator != self._node.node_key:
                try:
                    params = {"job": job.signed_record, "plan": job.signed_plan}
                    self._node.call(validator, "replicate_job", params, timeout_s=ASSIGN_TIMEOUT_S)
                except Unavailable as error:
                    logger.warning("a validator could not be told of the job: %s", error)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_replicate_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """Another validator passes on a job that it opened."""
        job = Job.open(params["job"], params["plan"])
        self._check_workers(job)
        self._enter(job)
        return {}

    def _assign(self, job: Job) -> None:
        for item in job.plan.assignments:
            self._node.add_address(item.worker, item.endpoint)
        params = {"job": job.signed_record, "plan": job.signed_plan}
        try:
            for worker in dict.fromkeys(item.worker for item in job.plan.assignments):
                self._node.call(worker, "assign", params, timeout_s=ASSIGN_TIMEOUT_S)
        except SmartnodesError:
            self.close(job, "a worker did not take its stage")
            raise

    @allow(roles=("user", "validator"), max_body_bytes=0)
    def rpc_close_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """The author is done (or a validator passes that on): workers are released, the record stays."""
        with self._lock:
            entry = self.entries.get(bytes(params["job"]))
        if entry is None:
            raise JobError("a job this validator does not know")
        job = entry.job
        if caller.node_key != job.record.author and caller.node_key not in job.plan.validators:
            raise AuthorityError("a job is closed by its author")
        if caller.role == "user":
            self.close(job, str(params.get("reason", "completed"))[:200])
        else:
            self._finish(job, str(params.get("reason", "completed"))[:200])
        return {}

    def close(self, job: Job, reason: str) -> None:
        """Close a job here and at the other validators; each releases the workers when its audits are through."""
        self._finish(job, reason)
        for validator in job.plan.validators:
            self._quietly(validator, "close_job", {"job": job.id, "reason": reason})

    def release_workers(self, job: Job, reason: str) -> None:
        """Tell the job's workers that this validator needs their stages no more."""
        for worker in dict.fromkeys(item.worker for item in job.plan.assignments):
            self._quietly(worker, "release", {"job": job.id, "reason": reason})

    def _finish(self, job: Job, reason: str) -> None:
        with self._lock:
            entry = self.entries[job.id]
            if entry.state != "open":
                return
            entry.state = "closed"
            entry.note(f"closed: {reason}")
        self.on_close(job)

    def _quietly(self, peer: NodeKey, method: str, params: dict[str, Any]) -> None:
        if peer == self._node.node_key:
            return
        try:
            self._node.notify(peer, method, params)
        except SmartnodesError as error:
            logger.debug("%s did not reach a peer: %s", method, error)
