"""The worker role: take stages of jobs, serve their authors and neighbours, commit to the work, open what is
challenged.

Everything a peer may call is named `rpc_…`; each checks in its first lines who calls and what the job allows. The
work itself is done by a `JobHandler`, which knows what a stage is; this module knows only bytes, hashes and signatures.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from blake3 import blake3

from smartnodes_core.audit import NUM_ASSIGNED, Opened, TipTracker, assigned_validators, check_challenge
from smartnodes_core.errors import (
    AuditError,
    AuthorityError,
    BusyError,
    JobError,
    LocalError,
    ProtocolError,
    SmartnodesError,
    WorkerLostError,
)
from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import Buffer, Job, JobHandler, StageOfJob
from smartnodes_core.journal import Journal
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.ledgers import Ledger
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in, bytes_list_in, digest_in, map_in, text_in
from smartnodes_core.records import Challenge, Commitment, NodeKey, Opening, ReceivedList, Reveal, Signed, Verdict
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

ListOrReveal = TypeVar("ListOrReveal", ReceivedList, Reveal)

STREAM = "job"
MAX_STATE_BYTES = 8 << 30
MAX_VERDICTS = 1000
#: Lists and preimages that come with a challenge: of each assigned validator one.
MAX_PREIMAGES = NUM_ASSIGNED
#: How long a stage of a job that ended is kept for audits that some validator still has.
RELEASE_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 2.0


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
        self._ledgers: dict[str, Ledger] = {}
        self._mailer = Mailer(node, "worker-mail")
        self.verdicts: deque[Verdict] = deque(maxlen=MAX_VERDICTS)
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
        job = Job.open(bytes_in(params, "job"), bytes_in(params, "plan"))
        if caller.node_key not in job.plan.validators:
            raise AuthorityError("only a validator of the job's plan assigns its stages")
        stages = job.stages_of(self.node.node_key)
        if not stages:
            raise JobError("the plan gives this worker no stage")
        self._reserve(stages)
        self._learn_addresses()  # of the validators, which get commitments
        for item in job.plan.assignments:
            if item.worker != self.node.node_key:
                self.node.add_address(item.worker, item.endpoint)
        self.on_slots_changed()
        return {"stages": [stage.stage for stage in stages]}

    def _reserve(self, stages: list[StageOfJob]) -> None:
        """All of the stages or none. Raises BusyError, JobError, or what the handler raises."""
        with self._lock:
            for stage in stages:
                held = self._stages.get(stage.key)
                if held is not None and held.job.plan != stage.job.plan:
                    raise JobError(
                        f"stage {stage.stage} runs here under plan {held.job.plan.version}: release it first"
                    )
            fresh = [stage for stage in stages if stage.key not in self._stages]
            if len(fresh) > self.num_free_slots:
                raise BusyError(
                    f"{len(fresh)} stages asked for, {self.num_free_slots} of {self._num_slots} slots are free"
                )
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
                self._stages[stage.key] = stage
                self._ledgers[stage.key] = Ledger(stage)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_release(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """The job ended and this validator has no more audits of it. The stage goes when all its validators said so."""
        job_id, reason = digest_in(params, "job"), text_in(params, "reason", "")
        for stage in self._stages_of(job_id):
            self._only_validators_of(stage, caller)
            with self._lock:
                ledger = self._ledgers.get(stage.key)
                complete, credible = ledger.release(caller.node_key) if ledger else (False, False)
            if complete:
                self._drop(stage, reason)
            elif credible:
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
        self._mailer.flush(DRAIN_TIMEOUT_S)  # commitments of work that is done are worth their pay
        for stage in stages:
            self.fail(stage, WorkerLostError(f"the worker of stage {stage.stage} leaves: {reason}"))
            self._drop(stage, reason)
        self._mailer.stop()

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
        stage = self._stage(text_in(params, "key"))
        if caller.node_key != stage.author:
            raise AuthorityError("only the author of a job drives its stages")
        return self.handler.call(stage, text_in(params, "method"), map_in(params, "params"), body)

    def _allocate(self, peer: Peer, header: dict[str, Any], num_bytes: int) -> memoryview:
        stage = self._stage_for_frame(peer, header)
        return self.handler.allocate(stage, peer.node_key, header, num_bytes)

    def _receive(self, peer: Peer, header: dict[str, Any], body: memoryview) -> None:
        self.handler.receive(self._stage_for_frame(peer, header), peer.node_key, header, body)

    def _stage_for_frame(self, peer: Peer, header: dict[str, Any]) -> StageOfJob:
        stage = self._stage(text_in(header, "key"))
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
        try:
            self.node.notify(stage.author, "job_event", _failure(stage, error))
        except SmartnodesError as lost:
            logger.warning("stage %s failed and its author cannot be told: %s (%s)", stage.stage, error, lost)

    # -- commitments and challenges -----------------------------------------------------------------------------------

    def commit(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        """`WorkerPort`: chain, sign (durably) and publish the commitment of one step."""
        with self._lock:
            ledger = self._ledgers.get(stage.key)
            if ledger is None:
                return
            commitment = ledger.next(self.node.node_key, content)
            scope = f"commitment/{stage.key}/{stage.job.plan.version}/{commitment.step}"
            try:
                self._journal.once(scope, commitment.digest())
            except LocalError as error:  # signed otherwise before, or the disk is full: this stage cannot go on
                logger.error("step %s of stage %s is not committed: %s", commitment.step, stage.stage, error)
                self._mailer.post([stage.author], "job_event", _failure(stage, error))
                return
            signed = self._identity.sign(commitment).encode()
            ledger.keep(commitment)
        self._mailer.post((*stage.job.plan.validators, stage.author), "commitment", {}, signed)

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_spec(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[bytes]]:
        """What a stage runs, for the validators that audit it."""
        stage = self._stage(text_in(params, "key"))
        self._only_validators_of(stage, caller)
        return {}, [self.handler.spec(stage)]

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_challenge(
        self, caller: Peer, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Open a committed unit, provided that the seed selects it; otherwise AuditError, without penalty."""
        signed = Signed.decode(bytes_in(params, "challenge"))
        lists, reveals = (bytes_list_in(params, name, MAX_PREIMAGES) for name in ("lists", "reveals"))
        challenge = verify(signed, Challenge)
        stage = self._stage(text_in(params, "key"))
        self._only_validators_of(stage, caller)
        if signed.signer != challenge.auditor or challenge.auditor != caller.node_key:
            raise AuthorityError("a challenge is signed and sent by its auditor")
        commitment = self._committed(stage, challenge)
        self._check_draw(stage, challenge, commitment, lists, reveals)
        with self._lock:
            ledger = self._ledgers.get(stage.key)
            if ledger is None:
                raise AuditError("the stage was given up")
            ledger.count_opening(challenge.commitment, challenge.unit)
        opened = self.handler.open(stage, commitment, challenge.tier, challenge.unit)
        opening = Opening(challenge=challenge.digest(), commitment=challenge.commitment, items=opened.items)
        signable = Opened(opening=opening.encode(), body_digest=blake3(opened.body).digest())
        signed_opening = self._identity.sign(signable).encode()
        sizes = {"opening_bytes": len(signed_opening), "order_bytes": len(opened.order)}
        return sizes, [signed_opening, opened.order, opened.body]

    def _committed(self, stage: StageOfJob, challenge: Challenge) -> Commitment:
        with self._lock:
            ledger = self._ledgers.get(stage.key)
            commitment = ledger.commitments.get(challenge.commitment) if ledger else None
        if commitment is None:
            raise AuditError("no such commitment is held: its audit window has passed, or it was never made")
        return commitment

    def _check_draw(
        self, stage: StageOfJob, challenge: Challenge, commitment: Commitment, lists: list[bytes], reveals: list[bytes]
    ) -> None:
        assigned = assigned_validators(stage.job.id, stage.job.plan.validators)
        tips = {key: tip for key in assigned if (tip := self._tip(key)) is not None}
        with self._lock:
            trackers = {key: self._trackers.setdefault((key, tip), TipTracker(tip)) for key, tip in tips.items()}
        check_challenge(
            challenge,
            commitment,
            stage.job.record.audit,
            assigned,
            [_from_validator(item, ReceivedList) for item in lists],
            [_from_validator(item, Reveal) for item in reveals],
            trackers,
        )

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_verdict(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """An auditor tells the worker what it found."""
        signed = Signed.decode(bytes_in(params, "verdict"))
        verdict = verify(signed, Verdict)
        stages = self._stages_of(verdict.job)
        if not signed.signer == verdict.auditor == caller.node_key or verdict.worker != self.node.node_key:
            raise AuthorityError("a verdict is signed and sent by its auditor, to the worker it is about")
        if not any(verdict.auditor in stage.job.plan.validators for stage in stages):
            return  # a job that has ended
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


def _failure(stage: StageOfJob, error: Exception) -> dict[str, Any]:
    code = error.code if isinstance(error, SmartnodesError) else "internal"
    return {"key": stage.key, "event": "failed", "params": {"code": code, "message": str(error)[:2000]}}


def _from_validator(data: bytes, kind: type[ListOrReveal]) -> ListOrReveal:
    """The record in a `Signed`, which must be signed by the validator that it names. Raises AuthorityError."""
    signed = Signed.decode(data)
    record = verify(signed, kind)
    if signed.signer != record.validator:
        raise AuthorityError(f"a {kind.__name__} is signed by the validator it names")
    return record
