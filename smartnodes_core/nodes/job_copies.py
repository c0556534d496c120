"""A copy of a job's record: what its author signed, its state, and its history as the keeper heard it. And how to find
one by the job's id, through the DHT.

Record, plan and closing are the author's own words and are checked; state and history are the keeper's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from smartnodes_core.errors import JobError, RecordError, SmartnodesError
from smartnodes_core.identity import verify_bytes
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import count_in
from smartnodes_core.nodes.placement import CLOSE_DOMAIN, MAX_HISTORY
from smartnodes_core.records import MAX_RECORD_BYTES, JobNotice

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 10.0
MAX_COPY_BYTES = 2 * MAX_RECORD_BYTES + 64
MAX_EVENT_CHARS = 256


@dataclass(frozen=True)
class JobCopy:
    """`closing` is the author's signature that the job is done, empty while it is not; `history` holds Unix seconds and
    what happened."""

    job: Job
    state: str
    closing: bytes
    history: tuple[tuple[int, str], ...]

    @property
    def num_bytes(self) -> int:
        return len(self.job.signed_record) + len(self.job.signed_plan)

    def encode(self) -> tuple[dict[str, Any], list[bytes]]:
        """Parameters and body, as they travel."""
        parts = [self.job.signed_record, self.job.signed_plan, self.closing]
        history = [[at_s, event[:MAX_EVENT_CHARS]] for at_s, event in self.history[-MAX_HISTORY:]]
        params = {"record_bytes": len(parts[0]), "plan_bytes": len(parts[1]), "state": self.state, "history": history}
        return params, parts

    @classmethod
    def decode(cls, params: dict[str, Any], body: memoryview) -> JobCopy:
        """Raises ProtocolError, RecordError or SignatureError for anything but a job's copy."""
        first = count_in(params, "record_bytes", len(body))
        second = first + count_in(params, "plan_bytes", len(body) - first)
        state, history = params.get("state"), params.get("history")
        if state not in ("open", "closed") or not isinstance(history, list) or len(history) > MAX_HISTORY:
            raise RecordError(f"a job is open or closed, with a history of at most {MAX_HISTORY} events")
        for item in history:
            fits = isinstance(item, list) and len(item) == 2 and type(item[0]) is int and isinstance(item[1], str)
            if not fits or len(item[1]) > MAX_EVENT_CHARS:
                raise RecordError(f"an event is Unix seconds and at most {MAX_EVENT_CHARS} characters")
        job = Job.open(bytes(body[:first]), bytes(body[first:second]))
        closing = bytes(body[second:])
        if closing:
            verify_bytes(job.record.author, CLOSE_DOMAIN, job.id, closing)
            state = "closed"
        return cls(job, state, closing, tuple((at_s, event) for at_s, event in history))

    def summary(self) -> dict[str, Any]:
        """What the copy says, as plain data for people: keys and digests as hexadecimal. State and history are the
        keeper's words, their text is what a stranger chose.
        """
        record, plan = self.job.record, self.job.plan
        return {
            "job": self.job.id.hex(),
            "job_type": record.job_type,
            "author": record.author.hex(),
            "created_at_s": record.created_at_s,
            "state": self.state,
            "plan_version": plan.version,
            "stages": [
                {"replica": item.replica, "stage": item.stage, "worker": item.worker.hex(), "endpoint": item.endpoint}
                for item in sorted(plan.assignments, key=lambda item: (item.replica, item.stage))
            ],
            "validators": [validator.hex() for validator in plan.validators],
            "history": [{"at_s": at_s, "event": event} for at_s, event in self.history],
        }

    def is_newer_than(self, other: JobCopy) -> bool:
        """A later plan, or the end."""
        return (self.job.plan.version, bool(self.closing)) > (other.job.plan.version, bool(other.closing))


def fetch_job(node: Node, find_job: Callable[[bytes], Sequence[JobNotice]], job_id: bytes) -> JobCopy:
    """The newest copy of a job's record that its keepers show. Raises JobError when none is found."""
    found = [notice for notice in find_job(job_id) if notice.state != "gone"]
    notices = sorted(found, key=lambda notice: (notice.plan_version, notice.state), reverse=True)
    newest: JobCopy | None = None
    for notice in notices:
        if notice.keeper == node.node_key or (newest and notice.plan_version < newest.job.plan.version):
            continue
        try:
            copy = ask_for_copy(node, notice.keeper, job_id)
        except SmartnodesError as error:
            logger.info("no record of job %s from %s: %s", job_id.hex()[:8], notice.keeper.hex()[:8], error)
            continue
        if newest is None or copy.is_newer_than(newest):
            newest = copy
    if newest is None:
        raise JobError(
            f"the record of job {job_id.hex()[:16]} is not found: {len(notices)} validators say that they keep it, and "
            "none shows it"
        )
    return newest


def ask_for_copy(node: Node, keeper: bytes, job_id: bytes) -> JobCopy:
    """A keeper's copy. Raises a SmartnodesError, also for the copy of another job."""
    reply = node.call(keeper, "job_copy", {"job": job_id}, timeout_s=FETCH_TIMEOUT_S, max_body_bytes=MAX_COPY_BYTES)
    copy = JobCopy.decode(reply.params, reply.body)
    if copy.job.id != job_id:
        raise RecordError("a copy of another job than the one that was asked for")
    return copy
