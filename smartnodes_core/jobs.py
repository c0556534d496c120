"""A job as the nodes hold it: the signed record, the plan in force, and what a network's own code must provide.

`JobHandler` is what a worker runs for jobs of one type; it is implemented by the network built on this layer (for
Tensorlink by
`tensorlink.worker.StageHandler`). `WorkerPort` is what the worker node offers it in return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from smartnodes_core.errors import ConfigError, JobError, RecordError
from smartnodes_core.identity import verify
from smartnodes_core.records import Commitment, JobRecord, NodeKey, OpeningItem, Plan, Signed, digest_of
from smartnodes_core.transport.base import split_endpoint

Buffer = bytes | bytearray | memoryview

#: Workers and validators keep commitments this far back at most.
MAX_WINDOW_STEPS = 1 << 14


def spec_digest(spec: bytes) -> bytes:
    """The digest under which a job record names what a stage runs."""
    return digest_of("job spec", spec)


def stage_key(job_id: bytes, plan_version: int, replica: int, stage: int) -> str:
    """The name by which nodes tell each other of a stage under a plan."""
    return f"{job_id.hex()}/{plan_version}/{replica}/{stage}"


def job_named(name: str) -> bytes:
    """The id of a job from its 64 hexadecimal digits. Raises ConfigError."""
    try:
        job_id = bytes.fromhex(name)
    except ValueError:
        job_id = b""
    if len(job_id) != 32:
        raise ConfigError(f"found job {name!r:.80}, needed its id of 64 hexadecimal digits, as `job.id.hex()` has it")
    return job_id


@dataclass(frozen=True)
class Job:
    """A job record with the plan in force, both signed by the author and checked against each other."""

    id: bytes
    record: JobRecord
    plan: Plan
    signed_record: bytes
    signed_plan: bytes

    @classmethod
    def open(cls, signed_record: bytes, signed_plan: bytes) -> Job:
        """Verify both signatures and that record and plan belong together. Raises RecordError or SignatureError."""
        signed = Signed.decode(signed_record)
        record = verify(signed, JobRecord)
        if signed.signer != record.author:
            raise RecordError("a job record is signed by its author")
        signed = Signed.decode(signed_plan)
        plan = verify(signed, Plan)
        job = cls(record.digest(), record, plan, signed_record, signed_plan)
        job._check(signed.signer)
        return job

    def _check(self, plan_signer: NodeKey) -> None:
        """Sizes first: a plan's author decides how long each of these takes."""
        record, plan = self.record, self.plan
        if plan.job != self.id or plan_signer != record.author:
            raise RecordError("the plan is of another job, or not signed by the job's author")
        num_needed = record.num_replicas * record.num_stages
        if len(plan.assignments) != num_needed:
            raise RecordError(f"the plan assigns {len(plan.assignments)} stages, needed {num_needed}, each once")
        stages = {(item.replica, item.stage) for item in plan.assignments}
        if len(stages) != num_needed or any(
            item.replica >= record.num_replicas or item.stage >= record.num_stages for item in plan.assignments
        ):
            raise RecordError(f"the plan assigns {len(stages)} stages, needed {num_needed}, each once")
        if (plan.first_step or plan.state_roots) and not plan.version:
            raise RecordError("the first plan begins with step 0, in the states that the job record names")
        if len(plan.state_roots) not in (0, num_needed):
            raise RecordError(f"the plan has {len(plan.state_roots)} roots of states for {num_needed} stages")
        if not plan.validators or len(set(plan.validators)) != len(plan.validators):
            raise RecordError(f"the plan names {len(plan.validators)} validators: at least one, each once, is needed")
        strangers = set(plan.validators) - set(record.audit.auditors or plan.validators)
        if strangers:
            raise RecordError(f"the plan names {len(strangers)} validators that the job's list of auditors lacks")
        if record.audit.window_steps > MAX_WINDOW_STEPS:
            raise RecordError(f"an audit window of {record.audit.window_steps} steps: at most {MAX_WINDOW_STEPS}")
        if not len(record.specs) == len(record.initial_roots) == len(record.work_units) == record.num_stages:
            raise RecordError(f"specs, roots and work units of a job of {record.num_stages} stages must be that many")
        for item in plan.assignments:
            try:
                split_endpoint(item.endpoint)
            except ConfigError as error:  # ours to say of our settings, here it is the author's record
                raise RecordError(f"the plan's endpoint of stage {item.stage}: {error}") from None

    def worker_of(self, stage: int, replica: int = 0) -> NodeKey:
        """The worker that runs `stage`. Raises JobError where there is none."""
        for item in self.plan.assignments:
            if item.stage == stage and item.replica == replica:
                return item.worker
        raise JobError(f"no worker runs stage {stage} of replica {replica}")

    def state_root_of(self, stage: int, replica: int = 0) -> bytes | None:
        """The root of the state in which a stage begins under this plan; None under the first, and where stages have no
        state."""
        at = replica * self.record.num_stages + stage
        return self.plan.state_roots[at] if at < len(self.plan.state_roots) else None

    def stages_of(self, worker: NodeKey) -> list[StageOfJob]:
        """The stages that `worker` runs."""
        return [StageOfJob(self, item.stage, item.replica) for item in self.plan.assignments if item.worker == worker]


@dataclass(frozen=True)
class StageOfJob:
    """One stage of a job, as the worker that runs it sees it."""

    job: Job
    stage: int
    replica: int

    @property
    def key(self) -> str:
        """A short name unique on this rig, another under each plan: what is sent under an older plan finds no stage."""
        return stage_key(self.job.id, self.job.plan.version, self.replica, self.stage)

    @property
    def author(self) -> NodeKey:
        return self.job.record.author

    @property
    def previous(self) -> NodeKey | None:
        """The worker of the stage before, None for the first."""
        return self.job.worker_of(self.stage - 1, self.replica) if self.stage else None

    @property
    def next(self) -> NodeKey | None:
        """The worker of the stage after, None for the last."""
        last = self.stage == self.job.record.num_stages - 1
        return None if last else self.job.worker_of(self.stage + 1, self.replica)

    def is_beside(self, worker: NodeKey) -> bool:
        """Whether `worker` runs another stage of the same replica; who of them sends what is the handler's to know."""
        return any(
            item.worker == worker and item.replica == self.replica and item.stage != self.stage
            for item in self.job.plan.assignments
        )


class WorkerPort(Protocol):
    """What a worker node does for its handler."""

    def stream(self, to: NodeKey, header: dict[str, Any], body: Buffer, on_sent: Callable[[], None]) -> None:
        """Send a frame to the author or another stage; `on_sent` when `body` may be reused, sent or lost."""

    def tell_author(self, stage: StageOfJob, event: str, params: dict[str, Any]) -> None:
        """A one-way message to the job's author."""

    def commit(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        """Sign and publish the `Commitment` with this content (its fields but for job, plan, worker and previous)."""

    def fail(self, stage: StageOfJob, error: Exception) -> None:
        """The stage cannot go on: tell the author why."""


class JobHandler(Protocol):
    """What a worker does for jobs of one type. Methods may raise; what they raise crosses to the caller by class."""

    job_type: str

    def attach(self, port: WorkerPort) -> None:
        """Called once, before anything else."""

    def offers(self) -> dict[str, int | str]:
        """What this rig announces: for planners to read."""

    def assign(self, stage: StageOfJob) -> None:
        """Reserve the stage. Raises JobError or BusyError with what is missing."""

    def call(
        self, stage: StageOfJob, method: str, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], Sequence[Buffer]]:
        """Serve a call of the job's author."""

    def allocate(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], num_bytes: int) -> memoryview:
        """Where the body of a frame from `sender` goes; raises ProtocolError to refuse it before anything is
        allocated.
        """

    def receive(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], body: memoryview) -> None:
        """A frame is in. Runs on the connection's thread: must not wait."""

    def spec(self, stage: StageOfJob) -> bytes:
        """What the stage runs, for auditors: the bytes that the job record's `specs` names."""

    def open(self, stage: StageOfJob, commitment: Commitment, tier: int, unit: int) -> OpenedUnit:
        """The data behind a commitment. Raises AuditError when it is no longer held."""

    def release(self, stage: StageOfJob, reason: str) -> None:
        """The job ended, or the stage was taken away: free everything."""


#: Commitments before the challenged one that an opening may show.
MAX_EARLIER = 16


@dataclass(frozen=True)
class OpenedUnit:
    """What a worker opens: items, their bytes one after the other, and the author's signed order for the step.

    `num_earlier` is how many commitments before this one an auditor needs, at most MAX_EARLIER; fewer where there are
    fewer.
    """

    items: list[OpeningItem]
    body: bytes | memoryview
    order: bytes
    num_earlier: int = 0
