"""The user role: find workers, have a validator open a job, drive its stages, hear what happens to it."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

from smartnodes_core.errors import (
    AuthorityError,
    JobError,
    NoWorkersError,
    SmartnodesError,
    Unavailable,
    WorkerLostError,
)
from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import Buffer, Job, StageOfJob
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import bytes_in, map_in, text_in
from smartnodes_core.nodes.placement import closing_signature
from smartnodes_core.nodes.worker import STREAM
from smartnodes_core.records import MAX_RECORD_BYTES, Commitment, JobRecord, NodeKey, Plan, Signed, Verdict
from smartnodes_core.rpc import PendingCall, allow
from smartnodes_core.rpc.pace import LARGE_BODY_BYTES
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Closed jobs whose last verdicts are still heard.
MAX_CLOSED = 16


class JobListener:
    """What a user hears of its job; subclass what you need. Methods run on network threads and must not wait."""

    def on_event(self, stage: int, event: str, params: dict[str, Any]) -> None:
        """A worker says something of its stage."""

    def allocate(self, stage: int, header: dict[str, Any], num_bytes: int) -> memoryview:
        """Where the body of a frame from a stage goes."""
        raise JobError("this job takes no frames")

    def on_frame(self, stage: int, header: dict[str, Any], body: memoryview) -> None:
        """A frame from a stage is in."""

    def on_commitment(self, commitment: Commitment) -> None:
        """A worker committed to a step."""

    def on_verdict(self, verdict: Verdict) -> None:
        """An auditor found something."""

    def on_lost(self, stage: int, error: WorkerLostError) -> None:
        """The worker of a stage is gone."""


class UserNode:
    """Drives jobs. One `JobListener` per job hears of it."""

    def __init__(self, node: Node, identity: Identity):
        self.node = node
        self._identity = identity
        self._lock = threading.Lock()
        self._jobs: dict[bytes, tuple[Job, JobListener]] = {}
        self._closed: dict[bytes, tuple[Job, JobListener]] = {}
        node.serve(self)
        node.on_stream(STREAM, self._allocate, self._receive)
        node.on_peer_lost(self._peer_lost)

    # -- opening and closing ------------------------------------------------------------------------------------------

    @staticmethod
    def nonce() -> bytes:
        """32 random bytes that make a job record unique."""
        return secrets.token_bytes(32)

    def open_job(self, record: JobRecord, plan: Plan, listener: JobListener, timeout_s: float = 60.0) -> Job:
        """Sign job and plan and have one of the plan's validators open it. Raises JobError, NoWorkersError,
        Unavailable.
        """
        job = Job.open(self._identity.sign(record).encode(), self._identity.sign(plan).encode())
        with self._lock:
            self._jobs[job.id] = (job, listener)
        try:
            self._have_opened(job, timeout_s)
        except SmartnodesError:
            self._forget(job)
            raise
        return job

    def replan(self, job: Job, plan: Plan, timeout_s: float = 60.0) -> Job:
        """Go on with an open job under a newer plan: what comes from stages of the older one is not heard any more.

        Raises as `open_job`; the job stays open, and another plan may be tried under another version.
        """
        newer = Job.open(job.signed_record, self._identity.sign(plan).encode())
        with self._lock:
            known = self._jobs.get(job.id)
            if known is None:
                raise JobError("the job is closed: open a new one")
            self._jobs[job.id] = (newer, known[1])
        self._have_opened(newer, timeout_s)
        return newer

    def _have_opened(self, job: Job, timeout_s: float) -> None:
        """One of the plan's validators hands the workers their stages; the others are reached."""
        for item in job.plan.assignments:
            self.node.add_address(item.worker, item.endpoint)
        params = {"job": job.signed_record, "plan": job.signed_plan}
        lost: SmartnodesError = NoWorkersError("the plan names no validator: is one running and registered?")
        for validator in job.plan.validators:
            try:
                self.node.call(validator, "open_job", params, timeout_s=timeout_s)
                self._reach_all(job.plan.validators)
                return
            except NoWorkersError:  # the validator did its part: another one would find no more
                raise
            except Unavailable as error:
                lost = error
        raise lost

    def _reach_all(self, validators: Sequence[NodeKey]) -> None:
        """Connect to all validators of a job: a user does not listen, and each of them has verdicts to tell."""
        for validator in validators:
            try:
                self.node.reach(validator)
            except SmartnodesError as error:
                logger.info("verdicts of a validator will not be heard: %s", error)

    def close_job(self, job: Job, reason: str = "completed", timeout_s: float = 10.0) -> None:
        """Tell a validator that the job is done; it releases the workers. Verdicts are heard on."""
        with self._lock:
            known = self._jobs.pop(job.id, None)
            if known is not None:
                self._closed[job.id] = known
                while len(self._closed) > MAX_CLOSED:
                    del self._closed[next(iter(self._closed))]
        signature = closing_signature(self._identity, job.id)
        params = {"job": job.id, "reason": reason[:200], "signature": signature}
        for validator in job.plan.validators:
            try:
                self.node.call(validator, "close_job", params, timeout_s=timeout_s)
                return
            except SmartnodesError as error:
                logger.info("a validator could not be told that the job is done: %s", error)

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)

    # -- driving stages -----------------------------------------------------------------------------------------------

    def begin_call(
        self,
        stage: StageOfJob,
        method: str,
        params: dict[str, Any],
        body: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        max_body_bytes: int = 0,
    ) -> PendingCall:
        """Call a stage's handler; `result` waits for its answer, and has to be called."""
        worker = stage.job.worker_of(stage.stage, stage.replica)
        message = {"key": stage.key, "method": method, "params": params}
        bulk = sum(len(part) for part in body) + max_body_bytes >= LARGE_BODY_BYTES
        return self.node.begin_call(
            worker, "job", message, body, bulk=bulk, timeout_s=timeout_s, max_body_bytes=max_body_bytes
        )

    def notify(self, stage: StageOfJob, method: str, params: dict[str, Any]) -> None:
        """Tell a stage's handler something; one-way, in order with other one-way messages."""
        worker = stage.job.worker_of(stage.stage, stage.replica)
        self.node.notify(worker, "job", {"key": stage.key, "method": method, "params": params})

    def stream(self, stage: StageOfJob, header: dict[str, Any], body: Buffer, on_sent: Callable[[], None]) -> None:
        """Send a frame to a stage."""
        worker = stage.job.worker_of(stage.stage, stage.replica)
        self.node.stream(worker, STREAM, {**header, "key": stage.key}, [body], on_sent)

    # -- hearing ------------------------------------------------------------------------------------------------------

    @allow(roles=("worker",), max_body_bytes=0)
    def rpc_job_event(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """A worker says something of its stage."""
        key, event, content = text_in(params, "key"), text_in(params, "event"), map_in(params, "params")
        found = self._stage_of(caller.node_key, key)
        if found is not None:
            stage, listener = found
            listener.on_event(stage, event, content)

    @allow(roles=("worker",), max_body_bytes=MAX_RECORD_BYTES)
    def rpc_commitment(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """A worker committed to a step."""
        signed = Signed.decode(body)
        commitment = verify(signed, Commitment)
        with self._lock:
            known = self._jobs.get(commitment.job) or self._closed.get(commitment.job)
        if known is None:
            return  # a job that is closed
        job, listener = known
        if commitment.plan_version != job.plan.version:
            return  # of a plan that was replaced
        worker = job.worker_of(commitment.stage, commitment.replica)
        if not signed.signer == commitment.worker == caller.node_key == worker:
            raise AuthorityError(f"stage {commitment.stage} is not run by who commits to it")
        listener.on_commitment(commitment)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """An auditor found something."""
        signed = Signed.decode(bytes_in(params, "verdict"))
        verdict = verify(signed, Verdict)
        with self._lock:
            known = self._jobs.get(verdict.job) or self._closed.get(verdict.job)
        if known is not None and signed.signer == verdict.auditor and signed.signer in known[0].plan.validators:
            known[1].on_verdict(verdict)

    def _allocate(self, peer: Peer, header: dict[str, Any], num_bytes: int) -> memoryview:
        found = self._stage_of(peer.node_key, text_in(header, "key"))
        if found is None:
            raise JobError("a frame for no job of ours")
        stage, listener = found
        return listener.allocate(stage, header, num_bytes)

    def _receive(self, peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        found = self._stage_of(peer.node_key, text_in(header, "key"))
        if found is not None:
            stage, listener = found
            listener.on_frame(stage, header, body)

    def _stage_of(self, worker: NodeKey, key: str) -> tuple[int, JobListener] | None:
        """The stage that `key` names, provided `worker` runs it."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job, listener in jobs:
            if key.startswith(job.id.hex()):
                for stage in job.stages_of(worker):
                    if stage.key == key:
                        return stage.stage, listener
        return None

    def _peer_lost(self, peer: NodeKey, reason: str) -> None:
        with self._lock:
            jobs = list(self._jobs.values())
        for job, listener in jobs:
            for stage in job.stages_of(peer):
                message = f"the worker of stage {stage.stage} ({peer.hex()[:8]}) is gone: {reason}"
                listener.on_lost(stage.stage, WorkerLostError(message))
