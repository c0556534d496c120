"""The worker role: take stages of jobs, serve their authors and neighbours, commit to the work, open what is
challenged.

Everything a peer may call is named `rpc_…`; each checks in its first lines who calls and what the job allows. The
work itself is done by a `JobHandler`, which knows what a stage is; this module knows only bytes, hashes and signatures.
What auditors ask is answered in `opening.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from smartnodes_core.audit import NUM_ASSIGNED
from smartnodes_core.counters import COUNTERS
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    LocalError,
    ProtocolError,
    SmartnodesError,
    WorkerLostError,
)
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import Buffer, Job, JobHandler, StageOfJob
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.ledgers import HeldStages, Ledger, only_validators_of
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.opening import OpeningDesk
from smartnodes_core.nodes.params import bytes_in, digest_in, map_in, text_in
from smartnodes_core.payments import ASKED_UNITS, pays
from smartnodes_core.records import NodeKey, ReceivedList, Reveal
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

ListOrReveal = TypeVar("ListOrReveal", ReceivedList, Reveal)

STREAM = "job"
#: The body of an author's call: what a stage runs is the largest.
MAX_CALL_BYTES = 64 << 20
MAX_VERDICTS = 1000
#: Stages of one job on one rig: schedules use two or three.
MAX_STAGES_PER_JOB = 8
#: Lists and preimages that come with a challenge: of each assigned validator one.
MAX_PREIMAGES = NUM_ASSIGNED
#: How long a stage of a job that ended is kept for audits that some validator still has.
RELEASE_TIMEOUT_S = 150.0
#: How long what a stage did under an older plan can still be audited, and how many such stages are kept of a job.
SUPERSEDED_KEEP_S, MAX_SUPERSEDED = 60.0, 4
DRAIN_TIMEOUT_S = 2.0


class WorkerNode:
    """Runs stages for jobs whose plan names this node.

    `tip` gives a validator's hash-chain tip as posted on chain; `num_slots` is how many jobs this rig works on at once;
    of one job it may hold several stages. `asks_wei` is the least that it works for (`payments.py`).
    """

    def __init__(
        self,
        node: Node,
        identity: Identity,
        handler: JobHandler,
        tip: Callable[[NodeKey], bytes | None],
        journal: Journal,
        num_slots: int = 1,
        asks_wei: int = 0,
        learn_addresses: Callable[[], None] = lambda: None,
    ):
        self.node = node
        self.handler = handler
        self._identity = identity
        self._journal = journal
        self._num_slots, self._asks_wei = num_slots, asks_wei
        self._learn_addresses = learn_addresses
        self._held = HeldStages()
        self._lock = self._held.lock
        self._mailer = Mailer(node, "worker-mail")
        self._opening = OpeningDesk(node, identity, handler, tip, self._held)
        self.verdicts = self._opening.verdicts
        self.on_slots_changed: Callable[[], None] = lambda: None
        handler.attach(self)
        node.serve(self)
        node.on_stream(STREAM, self._allocate, self._receive)

    @property
    def num_free_slots(self) -> int:
        with self._lock:
            return self._num_slots - len({stage.job.id for stage in self._held.stages.values()})

    # -- placement ----------------------------------------------------------------------------------------------------

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_assign(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """A validator hands this rig its stages of a job, or of a newer plan. Refused when no slot is free.

        A newer plan that gives this rig no stage any more takes away those that it has.
        """
        job = Job.open(bytes_in(params, "job"), bytes_in(params, "plan"))
        if caller.node_key not in job.plan.validators:
            raise AuthorityError("only a validator of the job's plan assigns its stages")
        stages = job.stages_of(self.node.node_key)
        if not stages and not self._held.of_job(job.id):
            raise JobError("the plan gives this worker no stage")
        if not pays(job.record.terms, self._asks_wei):
            raise JobError(f"this rig asks {self._asks_wei} wei for {ASKED_UNITS} units of work, the job pays less")
        self._reserve(job, stages)
        self._supersede(job)
        self._learn_addresses()  # of the validators, which get commitments
        for item in job.plan.assignments:
            if item.worker != self.node.node_key:
                self.node.add_address(item.worker, item.endpoint)
        self.on_slots_changed()
        return {"stages": [stage.stage for stage in stages]}

    def _reserve(self, job: Job, stages: list[StageOfJob]) -> None:
        """All of the stages or none. Raises BusyError, JobError, or what the handler raises."""
        with self._lock:
            of_job = self._held.of_job(job.id)
            for held in of_job:
                found, asked = held.job.plan, job.plan
                if found.version > asked.version or (found.version == asked.version and found != asked):
                    raise JobError(f"plan {asked.version} was sent, and the job runs here under plan {found.version}")
            fresh = [stage for stage in stages if stage.key not in self._held.stages]
            if len(stages) > MAX_STAGES_PER_JOB:
                raise JobError(f"{len(stages)} stages of one job asked for, at most {MAX_STAGES_PER_JOB} are held")
            if fresh and not of_job and self.num_free_slots < 1:
                raise BusyError(f"no job more is taken: 0 of {self._num_slots} slots are free")
            taken: list[StageOfJob] = []
            try:
                for stage in fresh:
                    self.handler.assign(stage)
                    taken.append(stage)
            except SmartnodesError:
                for stage in taken:
                    self.handler.release(stage, "another stage of the job could not be taken")
                raise
            for stage in fresh:
                self._held.stages[stage.key] = stage
                self._held.ledgers[stage.key] = Ledger(stage)

    def _supersede(self, job: Job) -> None:
        """What runs here under an older plan of the job does so no more; what it did can be audited for a while."""
        with self._lock:
            older = [stage for stage in self._held.of_job(job.id) if stage.job.plan.version < job.plan.version]
            self._held.superseded.update(stage.key for stage in older)
        for stage in older:
            self._retire(stage, f"plan {job.plan.version} is in force", SUPERSEDED_KEEP_S)
        for stage in older[: max(0, len(older) - MAX_SUPERSEDED)]:
            self._drop(stage, "newer plans are in force")

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_release(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """The job ended and this validator has no more audits of it. The stage goes when all its validators said so."""
        job_id, reason = digest_in(params, "job"), text_in(params, "reason", "")
        for stage in self._held.of_job(job_id):
            only_validators_of(stage, caller)
            with self._lock:
                ledger = self._held.ledgers.get(stage.key)
                complete, credible = ledger.release(caller.node_key) if ledger else (False, False)
            if complete:
                self._drop(stage, reason)
            elif credible:
                self._retire(stage, reason, RELEASE_TIMEOUT_S)
        return {}

    def release_jobs_of(self, author: NodeKey, reason: str) -> None:
        """The author is gone: its stages are freed, since nobody else may drive them, when their audits are through;
        unless it calls them again before.
        """
        with self._lock:
            stages = [stage for stage in self._held.stages.values() if stage.author == author]
            for ledger in (self._held.ledgers[stage.key] for stage in stages):
                ledger.waits_for_author |= ledger.timer is None
        for stage in stages:
            self._retire(stage, reason, RELEASE_TIMEOUT_S)

    def _retire(self, stage: StageOfJob, reason: str, keep_s: float) -> None:
        """Drop the stage after a while, whatever its validators say."""
        with self._lock:
            ledger = self._held.ledgers.get(stage.key)
            if ledger is None or ledger.timer is not None:
                return
            ledger.timer = threading.Timer(keep_s, self._drop, (stage, reason))
            ledger.timer.daemon = True
            ledger.timer.start()

    def drain(self, reason: str) -> None:
        """Give up every stage, telling their authors why."""
        with self._lock:
            stages = list(self._held.stages.values())
        self._mailer.flush(DRAIN_TIMEOUT_S)  # commitments of work that is done are worth their pay
        for stage in stages:
            self.fail(stage, WorkerLostError(f"the worker of stage {stage.stage} leaves: {reason}"))
            self._drop(stage, reason)
        self._mailer.stop()

    def _drop(self, stage: StageOfJob, reason: str) -> None:
        with self._lock:
            if self._held.stages.pop(stage.key, None) is None:
                return
            self._held.superseded.discard(stage.key)
            ledger = self._held.ledgers.pop(stage.key)
        if ledger.timer is not None:
            ledger.timer.cancel()
        self.handler.release(stage, reason)
        self.on_slots_changed()
        logger.info("released stage %s: %s", stage.stage, reason)

    # -- the author's calls, the other stages' tensors ----------------------------------------------------------------

    @allow(roles=("user",), max_body_bytes=MAX_CALL_BYTES, check="_check_author")
    def rpc_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], Any]:
        """A call of the job's author to one of its stages: `method` and `params` are the handler's."""
        stage = self._held.in_force(text_in(params, "key"))
        return self.handler.call(stage, text_in(params, "method"), map_in(params, "params"), body)

    def _check_author(self, caller: Peer, params: dict[str, Any], num_body_bytes: int) -> None:
        """Nobody but the author gets memory for a call's body. One that was lost and calls again keeps its stage."""
        stage = self._held.stage(text_in(params, "key"))
        if caller.node_key != stage.author:
            raise AuthorityError("only the author of a job drives its stages")
        with self._lock:
            ledger = self._held.ledgers.get(stage.key)
            if ledger is not None and ledger.timer is not None and ledger.waits_for_author:
                ledger.timer.cancel()
                ledger.timer, ledger.waits_for_author = None, False

    def _allocate(self, peer: Peer, header: dict[str, Any], num_bytes: int) -> memoryview:
        stage = self._stage_for_frame(peer, header)
        return self.handler.allocate(stage, peer.node_key, header, num_bytes)

    def _receive(self, peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        self.handler.receive(self._stage_for_frame(peer, header), peer.node_key, header, body)

    def _stage_for_frame(self, peer: Peer, header: dict[str, Any]) -> StageOfJob:
        stage = self._held.in_force(text_in(header, "key"))
        if peer.node_key not in (stage.author, stage.previous, stage.next) and not stage.is_beside(peer.node_key):
            raise ProtocolError(f"stage {stage.stage} takes frames from its author and the job's other workers only")
        return stage

    def stream(self, to: NodeKey, header: dict[str, Any], body: Buffer, on_sent: Callable[[], None]) -> None:
        """`WorkerPort`: a frame to the author or another worker of the job, or to another stage of this one."""
        if to != self.node.node_key:
            self.node.stream(to, STREAM, header, [body], on_sent)
            return
        stage = self._held.in_force(text_in(header, "key"))
        view = self.handler.allocate(stage, to, header, len(body))
        view[:] = body
        self.handler.receive(stage, to, header, view)
        on_sent()

    def tell_author(self, stage: StageOfJob, event: str, params: dict[str, Any]) -> None:
        """`WorkerPort`: a one-way message to the author."""
        self.node.notify(stage.author, "job_event", {"key": stage.key, "event": event, "params": params})

    def fail(self, stage: StageOfJob, error: Exception) -> None:
        """`WorkerPort`: the stage cannot go on."""
        try:
            self.node.notify(stage.author, "job_event", _failure(stage, error))
        except SmartnodesError as lost:
            logger.warning("stage %s failed and its author cannot be told: %s (%s)", stage.stage, error, lost)

    # -- commitments --------------------------------------------------------------------------------------------------

    def commit(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        """`WorkerPort`: chain, sign (durably) and publish the commitment of one step."""
        with self._lock:
            ledger = self._held.ledgers.get(stage.key)
            if ledger is None:
                return
            commitment = ledger.next(self.node.node_key, content)
            scope = f"commitment/{stage.key}/{commitment.step}"
            try:
                self._journal.once(scope, commitment.digest())
            except LocalError as error:  # signed otherwise before, or the disk is full: this stage cannot go on
                logger.error("step %s of stage %s is not committed: %s", commitment.step, stage.stage, error)
                self._mailer.post([stage.author], "job_event", _failure(stage, error))
                return
            signed = self._identity.sign(commitment).encode()
            ledger.keep(commitment)
        COUNTERS.add("commitments", "made")
        self._mailer.post((*stage.job.plan.validators, stage.author), "commitment", {}, signed)


def _failure(stage: StageOfJob, error: Exception) -> dict[str, Any]:
    code = error.code if isinstance(error, SmartnodesError) else "internal"
    return {"key": stage.key, "event": "failed", "params": {"code": code, "message": str(error)[:2000]}}
