"""The worker role: take stages of jobs, serve their authors and neighbours, commit to the work, open what is
challenged.

Everything a peer may call is named `rpc_…`; each checks in its first lines who calls and what the job allows. The
work itself is done by a `JobHandler`, which knows what a stage is; this module knows only bytes, hashes and signatures.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from smartnodes_core.audit import TipTracker, assigned_validators, check_challenge
from smartnodes_core.errors import (
    AuditError,
    AuthorityError,
    BusyError,
    JobError,
    ProtocolError,
    SmartnodesError,
    WorkerLostError,
)
from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import Buffer, Job, JobHandler, StageOfJob
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Challenge, Commitment, NodeKey, Opening, ReceivedList, Reveal, Signed, Unit, Verdict
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

STREAM = "job"
MAX_STATE_BYTES = 8 << 30
#: Commitments kept beyond the audit window, for challenges that are under way.
SPARE_COMMITMENTS = 16
#: How long a stage of a job that ended is kept for audits that some validator still has.
RELEASE_TIMEOUT_S = 30.0


class WorkerNode:
    """Runs stages for jobs whose plan names this node.

    `tip` gives a validator's hash-chain tip as posted on chain; `num_slots` is how many stages this rig runs at once.
    """

    def __init__(
        self,
        node: Node,
        identity: Identity,
        handler: JobHandler,
        tip: Callable[[NodeKey], bytes | None],
        journal: Journal,
        num_slots: int = 1,
        learn_addresses: Callable[[], None] = lambda: None,
    ):
        self.node = node
        self.handler = handler
        self._identity = identity
        self._tip = tip
        self._trackers: dict[tuple[NodeKey, bytes], TipTracker] = {}
        self._journal = journal
        self._num_slots = num_slots
        self._learn_addresses = learn_addresses
        self._lock = threading.RLock()
        self._stages: dict[str, StageOfJob] = {}
        self._ledgers: dict[str, _Ledger] = {}
        self.verdicts: list[Verdict] = []
        self.on_slots_changed: Callable[[], None] = lambda: None
        handler.attach(self)
        node.serve(self)
        node.on_stream(STREAM, self._allocate, self._receive)

    @property
    def num_free_slots(self) -> int:
        with self._lock:
            return self._num_slots - len(self._stages)

    # -- placement ----------------------------------------------------------------------------------------------------

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_assign(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """A validator hands this rig its stages of a job. Refused when no slot is free."""
        job = Job.open(params["job"], params["plan"])
        if caller.node_key not in job.plan.validators:
            raise AuthorityError("only a validator of the job's plan assigns its stages")
        stages = job.stages_of(self.node.node_key)
        if not stages:
            raise JobError("the plan gives this worker no stage")
        with self._lock:
            fresh = [stage for stage in stages if stage.key not in self._stages]
            if len(fresh) > self.num_free_slots:
                raise BusyError(
                    f"{len(fresh)} stages asked for, {self.num_free_slots} of {self._num_slots} slots are free"
                )
            for stage in fresh:
                self.handler.assign(stage)
                self._stages[stage.key] = stage
                self._ledgers[stage.key] = _Ledger(stage)
        self._learn_addresses()  # of the validators, which get commitments
        for item in job.plan.assignments:
            if item.worker != self.node.node_key:
                self.node.add_address(item.worker, item.endpoint)
        self.on_slots_changed()
        return {"stages": [stage.stage for stage in stages]}

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_release(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """The job ended and this validator has no more audits of it. The stage goes when all its validators said so."""
        reason = str(params.get("reason", ""))[:200]
        for stage in self._stages_of(bytes(params["job"])):
            self._only_validators_of(stage, caller)
            with self._lock:
                ledger = self._ledgers.get(stage.key)
                if ledger is None:
                    continue
                ledger.released_by.add(caller.node_key)
                complete = ledger.released_by >= set(stage.job.plan.validators)
            if complete:
                self._drop(stage, reason)
            else:
                self._retire(stage, reason)
        return {}

    def release_jobs_of(self, author: NodeKey, reason: str) -> None:
        """The author is gone: its stages are freed, since nobody else may drive them, when their audits are through."""
        with self._lock:
            stages = [stage for stage in self._stages.values() if stage.author == author]
        for stage in stages:
            self._retire(stage, reason)

    def _retire(self, stage: StageOfJob, reason: str) -> None:
        """Drop the stage after a while, whatever its validators say."""
        with self._lock:
            ledger = self._ledgers.get(stage.key)
            if ledger is None or ledger.timer is not None:
                return
            ledger.timer = threading.Timer(RELEASE_TIMEOUT_S, self._drop, (stage, reason))
            ledger.timer.daemon = True
            ledger.timer.start()

    def drain(self, reason: str) -> None:
        """Give up every stage, telling their authors why."""
        with self._lock:
            stages = list(self._stages.values())
        for stage in stages:
            self.fail(stage, WorkerLostError(f"the worker of stage {stage.stage} leaves: {reason}"))
            self._drop(stage, reason)

    def _drop(self, stage: StageOfJob, reason: str) -> None:
        with self._lock:
            if self._stages.pop(stage.key, None) is None:
                return
            ledger = self._ledgers.pop(stage.key)
        if ledger.timer is not None:
            ledger.timer.cancel()
        self.handler.release(stage, reason)
        self.on_slots_changed()
        logger.info("released stage %s: %s", stage.stage, reason)

    # -- the author's calls, the neighbours' tensors ------------------------------------------------------------------

    @allow(roles=("user",), max_body_bytes=MAX_STATE_BYTES)
    def rpc_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], Any]:
        """A call of the job's author to one of its stages: `method` and `params` are the handler's."""
        stage = self._stage(str(params["key"]))
        if caller.node_key != stage.author:
            raise AuthorityError("only the author of a job drives its stages")
        return self.handler.call(stage, str(params["method"]), dict(params["params"]), body)

    def _allocate(self, peer: Peer, header: dict[str, Any], num_bytes: int) -> memoryview:
        stage = self._stage_for_frame(peer, header)
        return self.handler.allocate(stage, peer.node_key, header, num_bytes)

    def _receive(self, peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        self.handler.receive(self._stage_for_frame(peer, header), peer.node_key, header, body)

    def _stage_for_frame(self, peer: Peer, header: dict[str, Any]) -> StageOfJob:
        stage = self._stage(str(header.get("key")))
        if peer.node_key not in (stage.author, stage.previous, stage.next):
            raise ProtocolError(f"stage {stage.stage} takes frames from its author and its neighbours only")
        return stage

    def stream(self, to: NodeKey, header: dict[str, Any], body: Buffer, on_sent: Callable[[], None]) -> None:
        """`WorkerPort`: a frame to the author or a neighbour."""
        self.node.stream(to, STREAM, header, [body], on_sent)

    def tell_author(self, stage: StageOfJob, event: str, params: dict[str, Any]) -> None:
        """`WorkerPort`: a one-way message to the author."""
        self.node.notify(stage.author, "job_event", {"key": stage.key, "event": event, "params": params})

    def fail(self, stage: StageOfJob, error: Exception) -> None:
        """`WorkerPort`: the stage cannot go on."""
        code = error.code if isinstance(error, SmartnodesError) else "internal"
        try:
            self.tell_author(stage, "failed", {"code": code, "message": str(error)[:2000]})
        except SmartnodesError as lost:
            logger.warning("stage %s failed and its author cannot be told: %s (%s)", stage.stage, error, lost)

    # -- commitments and challenges -----------------------------------------------------------------------------------

    def commit(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        """`WorkerPort`: chain, sign (durably) and publish the commitment of one step."""
        with self._lock:
            ledger = self._ledgers.get(stage.key)
            if ledger is None:
                return
            commitment = ledger.chain(self.node.node_key, content)
        scope = f"commitment/{stage.key}/{stage.job.plan.version}/{commitment.step}"
        self._journal.once(scope, commitment.digest())
        signed = self._identity.sign(commitment).encode()
        with self._lock:
            ledger.keep(commitment)
        for peer in (*stage.job.plan.validators, stage.author):
            try:
                self.node.notify(peer, "commitment", {}, [signed])
            except SmartnodesError as error:
                logger.warning("commitment of step %s did not reach a peer: %s", commitment.step, error)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_spec(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[bytes]]:
        """What a stage runs, for the validators that audit it."""
        stage = self._stage(str(params["key"]))
        self._only_validators_of(stage, caller)
        return {}, [self.handler.spec(stage)]

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_challenge(
        self, caller: Peer, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Open a committed unit, provided that the seed selects it; otherwise AuditError, without penalty."""
        signed = Signed.decode(params["challenge"])
        challenge = verify(signed, Challenge)
        stage = self._stage(str(params["key"]))
        self._only_validators_of(stage, caller)
        if signed.signer != challenge.auditor or challenge.auditor != caller.node_key:
            raise AuthorityError("a challenge is signed and sent by its auditor")
        with self._lock:
            commitment = self._ledgers[stage.key].commitments.get(challenge.commitment)
        if commitment is None:
            raise AuditError("no such commitment is held: its audit window has passed, or it was never made")
        self._check_draw(stage, challenge, commitment, params)
        opened = self.handler.open(stage, commitment, challenge.tier, challenge.unit)
        opening = Opening(challenge=challenge.digest(), commitment=challenge.commitment, items=opened.items)
        signed_opening = self._identity.sign(opening).encode()
        sizes = {"opening_bytes": len(signed_opening), "order_bytes": len(opened.order)}
        return sizes, [signed_opening, opened.order, opened.body]

    def _check_draw(
        self, stage: StageOfJob, challenge: Challenge, commitment: Commitment, params: dict[str, Any]
    ) -> None:
        lists = [_from_signer(item, ReceivedList) for item in params["lists"]]
        reveals = [_from_signer(item, Reveal) for item in params["reveals"]]
        assigned = assigned_validators(stage.job.id, stage.job.plan.validators)
        tips = {key: tip for key in assigned if (tip := self._tip(key)) is not None}
        trackers = {key: self._trackers.setdefault((key, tip), TipTracker(tip)) for key, tip in tips.items()}
        check_challenge(challenge, commitment, stage.job.record.audit, assigned, lists, reveals, trackers)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """An auditor tells the worker what it found."""
        verdict: Verdict = _from_signer(params["verdict"], Verdict)
        if verdict.worker == self.node.node_key:
            self.verdicts.append(verdict)
            if verdict.finding != "honest":
                logger.warning("audit of step %s: %s (%s)", verdict.step, verdict.finding, verdict.reason)

    # -- small parts --------------------------------------------------------------------------------------------------

    def _stage(self, key: str) -> StageOfJob:
        with self._lock:
            stage = self._stages.get(key)
        if stage is None:
            raise JobError("this worker does not run that stage: the job ended, or was never assigned here")
        return stage

    def _stages_of(self, job_id: bytes) -> list[StageOfJob]:
        with self._lock:
            return [stage for stage in self._stages.values() if stage.job.id == job_id]

    def _only_validators_of(self, stage: StageOfJob, caller: Peer) -> None:
        if caller.node_key not in stage.job.plan.validators:
            raise AuthorityError("only a validator of the job's plan audits its stages")


class _Ledger:
    """The commitments of one stage: each names the one before, and the newest are kept for challenges."""

    def __init__(self, stage: StageOfJob):
        self._stage = stage
        self._tip = stage.job.id
        self._limit = stage.job.record.audit.window_steps + SPARE_COMMITMENTS
        self.commitments: dict[bytes, Commitment] = {}
        self.released_by: set[NodeKey] = set()
        self.timer: threading.Timer | None = None

    def chain(self, worker: NodeKey, content: dict[str, Any]) -> Commitment:
        stage = self._stage
        commitment = Commitment(
            job=stage.job.id,
            plan_version=stage.job.plan.version,
            replica=stage.replica,
            stage=stage.stage,
            worker=worker,
            previous=self._tip,
            **{**content, "units": [Unit(**unit) for unit in content["units"]]},
        )
        self._tip = commitment.digest()
        return commitment

    def keep(self, commitment: Commitment) -> None:
        self.commitments[commitment.digest()] = commitment
        while len(self.commitments) > self._limit:
            del self.commitments[next(iter(self.commitments))]


def _from_signer(data: bytes, kind: Any) -> Any:
    """The record in a `Signed`, which must be signed by the validator or auditor it names. Raises AuthorityError."""
    signed = Signed.decode(data)
    record = verify(signed, kind)
    named = record.auditor if kind is Verdict else record.validator
    if signed.signer != named:
        raise AuthorityError(f"a {kind.__name__} is signed by the node it names")
    return record
