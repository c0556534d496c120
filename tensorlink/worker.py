"""What a rig does with a stage, on the Node side: no torch here, no tensors, only frames, offsets and records.

`StageHandler` stands between the network (`smartnodes_core/nodes/worker.py`) and the computing process
(`tensorlink/compute.py`). Frames are received straight into shared memory and the computing process is told where
they lie; what it computes is sent from shared memory. The thread that reads from the computing process never waits:
what is sent, and what is committed to, each go through an ordered thread of their own.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any

import tensorlink.errors  # noqa: F401 - the computing process's errors find their classes among those that are loaded
from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    ProtocolError,
    RecordError,
    SandboxError,
    SmartnodesError,
    WorkerLostError,
)
from smartnodes_core.identity import verify
from smartnodes_core.jobs import Buffer, OpenedUnit, StageOfJob, WorkerPort, spec_digest
from smartnodes_core.records import Commitment, NodeKey, OpeningItem, Signed
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.sandbox import Limits, Sandbox
from tensorlink.inflight import ARENA_TIMEOUT_S, LEAST_LIMIT_BYTES, Inflight
from tensorlink.ordered import Ordered
from tensorlink.pipeline.headers import MAX_TENSOR_BYTES, field_of, num_tensor_bytes
from tensorlink.records import Decide, Prepare, StepOrder
from tensorlink.stage_papers import StagePapers

logger = logging.getLogger(__name__)

JOB_TYPE = "tensorlink/1"
COMPUTE = (sys.executable, "-m", "tensorlink.compute")
ARENA_BYTES = 16 << 30
CALL_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 1.0
#: A computing process that lived shorter than this is not started again at once.
LEAST_LIFE_S = 5.0

#: What the author may tell a stage one-way; everything else is a call.
_POSTS = frozenset({"begin", "backward", "drop_call"})
_COUNTS = ("step", "call", "micro_batch", "slot", "backward_pass")
_TENSOR_FIELDS = (*_COUNTS, "type", "dtype", "shape")
_FROM = {"activation": "previous", "activation_gradient": "next", "target": "author"}
_TERMS = ("seed", "samples")


class StageHandler:
    """A `JobHandler` for training stages; one computing process serves all stages of the rig.

    `memory_bytes` is what the rig offers (0: what the computing process measures), `num_threads` how many threads
    compute. When the computing process dies, its stages are lost and a fresh one is started.
    """

    job_type = JOB_TYPE

    def __init__(self, memory_bytes: int = 0, num_threads: int = 1, command: Sequence[str] = COMPUTE):
        self._lock = threading.RLock()
        self._stages: dict[str, StageOfJob] = {}
        self._papers: dict[str, StagePapers] = {}
        self._dead: dict[str, str] = {}  # stages whose computing process died, and of what
        self._port: WorkerPort | None = None
        self._sending = Ordered("stage-sending")
        self._committing = Ordered("stage-commitments")
        self._inflight = Inflight()
        self._stopping = threading.Event()
        self._sandbox = Sandbox(
            list(command),
            limits=Limits(memory_bytes=memory_bytes, num_threads=num_threads),
            inbound_bytes=ARENA_BYTES,
            outbound_bytes=ARENA_BYTES,
            on_event=self._on_event,
            on_exit=self._on_exit,
        )
        self._measured: dict[str, Any] = {}

    def start(self) -> None:
        """Start the computing process and measure the rig."""
        self._sandbox.start()
        self._measured = self._sandbox.call("measure", {}, timeout_s=60.0)
        self._inflight.limit_bytes = max(LEAST_LIMIT_BYTES, int(self._measured["memory_bytes"]))

    def stop(self) -> None:
        """End the computing process."""
        self._stopping.set()
        self._sandbox.stop()
        self._sending.stop(STOP_TIMEOUT_S)
        self._committing.stop(STOP_TIMEOUT_S)

    # -- JobHandler ---------------------------------------------------------------------------------------------------

    def attach(self, port: WorkerPort) -> None:
        self._port = port

    @property
    def port(self) -> WorkerPort:
        if self._port is None:
            raise JobError("the handler is not attached to a worker node")
        return self._port

    def offers(self) -> dict[str, int | str]:
        """`flops_per_s` and `memory_bytes` as measured, `numeric_class` and `num_threads`."""
        return {key: self._measured[key] for key in ("flops_per_s", "memory_bytes", "numeric_class", "num_threads")}

    def assign(self, stage: StageOfJob) -> None:
        record = stage.job.record
        if record.job_type != JOB_TYPE:
            raise JobError(f"found a job of type {record.job_type!r:.40}, this rig runs {JOB_TYPE!r}")
        if not all(isinstance(record.terms.get(name), int) for name in _TERMS):
            raise JobError(f"the terms of a {JOB_TYPE} job are {', '.join(_TERMS)}, each a number")
        with self._lock:
            self._stages[stage.key] = stage
            self._papers.setdefault(stage.key, StagePapers(record.audit.window_steps))

    def release(self, stage: StageOfJob, reason: str) -> None:
        with self._lock:
            self._stages.pop(stage.key, None)
            self._papers.pop(stage.key, None)
            if self._dead.pop(stage.key, None) is not None:
                return
        try:
            self._sandbox.call("unload", {"key": stage.key}, timeout_s=CALL_TIMEOUT_S)
        except SmartnodesError as error:
            logger.debug("unload: %s", error)

    def call(
        self, stage: StageOfJob, method: str, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], Sequence[Buffer]]:
        self._check_alive(stage)
        if method in _POSTS:
            self._sandbox.post(method, {**params, "key": stage.key})
            return {}, []
        serve = {
            "load": self._load,
            "set_loss": self._set_loss,
            "set_optimizer": self._set_optimizer,
            "zero_grad": self._zero_grad,
            "prepare": self._prepare,
            "decide": self._decide,
            "state": self._state,
            "set_state": self._set_state,
        }.get(method)
        if serve is None:
            raise ProtocolError(f"stages have no method {method!r:.40}")
        return serve(stage, params, body)

    def allocate(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], num_bytes: int) -> memoryview:
        """Shared memory for a tensor, provided it comes from where tensors of its type come from.

        Raises ProtocolError for a header that is malformed or belies the body, JobError while the stage is not loaded,
        BusyError for more than a stage may have waiting, of which the author is told.
        """
        source = _FROM.get(str(header.get("type")))
        expected = {
            "previous": stage.previous or stage.author,
            "next": stage.next or stage.author,
            "author": stage.author,
        }
        if source is None or sender != expected[source]:
            raise ProtocolError(f"stage {stage.stage} takes no {header.get('type')!r:.40} from this peer")
        for name in _COUNTS:
            field_of(header, name)
        if num_tensor_bytes(header) != num_bytes or num_bytes > MAX_TENSOR_BYTES:
            raise ProtocolError(
                f"{num_bytes} bytes are not {header['dtype']} {header['shape']}, or over {MAX_TENSOR_BYTES}"
            )
        self._papers_of(stage).the_program()
        self._check_alive(stage)
        try:
            header["reserved"], view = self._inflight.reserve(self._sandbox.inbound, stage.key, num_bytes)
        except BusyError as error:
            self._fail(stage, BusyError(f"stage {stage.stage}: {error}"))
            raise
        return view

    def receive(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], body: memoryview) -> None:
        message = {name: header[name] for name in _TENSOR_FIELDS}
        offset = header.pop("reserved").keep()
        self._sandbox.post("tensor", {**message, "key": stage.key, "offset": offset, "num_bytes": len(body)})

    def spec(self, stage: StageOfJob) -> bytes:
        return self._papers_of(stage).the_program()

    def open(self, stage: StageOfJob, commitment: Commitment, tier: int, unit: int) -> OpenedUnit:
        """What an auditor needs to re-execute, the loss program of that step included."""
        order, loss = self._papers_of(stage).of_step(commitment.step)
        reply = self._compute(stage, "open", {"step": commitment.step, "unit": unit, "tier": tier})
        items = [OpeningItem(**item) for item in reply["items"]]
        items.append(OpeningItem(label="loss_program", meta=b"", num_bytes=len(loss)))
        return OpenedUnit(items, self._take(reply) + loss, order)

    # -- calls of the author ------------------------------------------------------------------------------------------

    def _load(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[Buffer]]:
        """The body holds the program and then the weights; the program must be the one that the job record names."""
        program = bytes(body[: field_of(params, "program_bytes")])
        record = stage.job.record
        if spec_digest(program) != record.specs[stage.stage]:
            raise RecordError("the program is not the one that the job record names for this stage")
        content = {
            "job": stage.job.id,
            "plan_version": stage.job.plan.version,
            "replica": stage.replica,
            "stage": stage.stage,
            "num_stages": record.num_stages,
            "program": program,
            "loss_program": b"",
            "weights": self._put(body[len(program) :]),
            "optimizer": {},
            "seed": record.terms["seed"],
            "window_steps": record.audit.window_steps,
            "limits": {"batch": record.terms["samples"]},
        }
        reply = self._compute(stage, "load", content)
        if bytes(reply["initial_root"]) != record.initial_roots[stage.stage]:
            raise RecordError("the weights are not those that the job record names for this stage")
        self._papers_of(stage).program = program
        return reply, []

    def _set_loss(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        loss = bytes(body)
        reply = self._compute(stage, "set_loss", {"loss_program": loss})
        self._papers_of(stage).add_loss(loss)
        return reply, []

    def _set_optimizer(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        try:
            optimizer = json.loads(bytes(body))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"an optimizer is described in JSON: {str(error)[:100]}") from None
        return self._compute(stage, "set_optimizer", {"optimizer": optimizer}), []

    def _zero_grad(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        return self._compute(stage, "zero_grad", {"step": field_of(params, "step")}), []

    def _prepare(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        prepare = Prepare.decode(_record(params, "prepare"))
        self._check_plan(stage, prepare)
        return self._compute(stage, "prepare", {"step": prepare.step, "num_units": prepare.num_units}), []

    def _decide(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        """Commit or abort as the author's signed order says: its options, nothing of this rig's own."""
        decide = Decide.decode(_record(params, "decide"))
        self._check_plan(stage, decide)
        signed = Signed.decode(body)
        order = verify(signed, StepOrder)
        if signed.signer != stage.author or order.digest() != decide.order or order.step != decide.step:
            raise AuthorityError("a step is decided by the author's signed order for that step")
        self._papers_of(stage).add_order(decide.step, bytes(body), order.loss)
        content = {
            "step": decide.step,
            "decision": decide.decision,
            "clip_coefficient": decide.clip_coefficient,
            "options": order.options,
            "order": decide.order,
        }
        return self._compute(stage, "decide", content), []

    def _state(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        return {}, [self._take(self._compute(stage, "state", {}))]

    def _set_state(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        return self._compute(stage, "set_state", {"weights": self._put(body)}), []

    def _check_plan(self, stage: StageOfJob, record: Prepare | Decide) -> None:
        if record.job != stage.job.id or record.plan_version != stage.job.plan.version:
            raise RecordError("a message of another job or plan version")

    def _check_alive(self, stage: StageOfJob) -> None:
        with self._lock:
            reason = self._dead.get(stage.key)
        if reason is not None:
            raise self._death(stage, reason)

    def _papers_of(self, stage: StageOfJob) -> StagePapers:
        with self._lock:
            papers = self._papers.get(stage.key)
        if papers is None:
            raise JobError("this rig does not run that stage (any more)")
        return papers

    # -- the computing process ----------------------------------------------------------------------------------------

    def _put(self, data: memoryview) -> dict[str, int]:
        """Copy a call's body into shared memory; the computing process gives it back."""
        piece = self._sandbox.inbound.allocate(max(1, len(data)), ARENA_TIMEOUT_S)
        piece.view[: len(data)] = data
        return {"offset": piece.offset, "num_bytes": len(data)}

    def _take(self, reply: dict[str, Any]) -> bytes:
        """Copy what the computing process answered with out of shared memory, and give that back."""
        view = self._sandbox.outbound.view(reply["offset"], reply["num_bytes"])
        try:
            return bytes(view)
        finally:
            view.release()
            self._sandbox.post("sent", {"offset": reply["offset"]})

    def _compute(self, stage: StageOfJob, method: str, params: dict[str, Any]) -> dict[str, Any]:
        return self._sandbox.call(method, {**params, "key": stage.key}, timeout_s=CALL_TIMEOUT_S)

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        """On the thread that reads from the computing process: nothing here waits."""
        if name == "released":
            self._inflight.released(params["offset"])
            self._sandbox.inbound.free(params["offset"])
            return
        with self._lock:
            stage = self._stages.get(str(params.get("key")))
        if stage is None:
            if name == "send":
                self._sandbox.post("sent", {"offset": params["offset"]})
            return
        content = {key: value for key, value in params.items() if key != "key"}
        if name == "commitment":
            self._committing.put(lambda: self._commit(stage, content))
        elif name == "send":
            self._sending.put(lambda: self._send(stage, content))
        elif name == "failed":
            self._fail(stage, from_wire(content, "computing process", b""))
        elif name in ("loss", "done"):
            self._sending.put(lambda: self.port.tell_author(stage, name, content))

    def _commit(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        try:
            self.port.commit(stage, {**content, "numeric_class": self._measured["numeric_class"]})
        except SmartnodesError as error:
            self._fail(stage, JobError(f"stage {stage.stage} cannot commit to its work: {error}"))

    def _fail(self, stage: StageOfJob, error: SmartnodesError) -> None:
        self._sending.put(lambda: self.port.fail(stage, error))

    def _send(self, stage: StageOfJob, params: dict[str, Any]) -> None:
        """A tensor leaves: to a neighbour (under its stage's key) or to the author, from shared memory."""
        to, offset, num_bytes = params.pop("to"), params.pop("offset"), params.pop("num_bytes")
        neighbour = {"next": (stage.next, 1), "previous": (stage.previous, -1)}.get(to, (None, 0))
        target = neighbour[0] or stage.author
        there = StageOfJob(stage.job, stage.stage + neighbour[1], stage.replica) if neighbour[0] else stage
        view = self._sandbox.outbound.view(offset, num_bytes)

        def sent() -> None:
            view.release()
            self._sandbox.post("sent", {"offset": offset})

        try:
            self.port.stream(target, {**params, "key": there.key}, view, sent)
        except SmartnodesError as error:
            sent()
            logger.warning("stage %s could not send to %s: %s", stage.stage, to, error)
            if target != stage.author:
                message = f"the worker of stage {there.stage} cannot be reached by that of stage {stage.stage}: {error}"
                self.port.fail(stage, WorkerLostError(message))

    def _on_exit(self, reason: str) -> None:
        """The computing process died: every stage it held is lost, the node lives on with a fresh one."""
        with self._lock:
            lost = [stage for key, stage in self._stages.items() if key not in self._dead]
            self._dead.update({stage.key: reason for stage in lost})
        self._inflight.clear()
        logger.error("the computing process died, %d stages are lost: %s", len(lost), reason)
        for stage in lost:
            self._fail(stage, self._death(stage, reason))
        threading.Thread(target=self._restart, name="stage-restart", daemon=True).start()

    @staticmethod
    def _death(stage: StageOfJob, reason: str) -> WorkerLostError:
        return WorkerLostError(f"the worker of stage {stage.stage} lost the stage: {reason}")

    def _restart(self) -> None:
        # a process that dies as soon as it starts must not keep the machine busy
        if not self._stopping.wait(LEAST_LIFE_S):
            try:
                self._sandbox.start()
            except SandboxError as error:
                logger.error("the computing process could not be started again: %s", error)


def _record(params: dict[str, Any], name: str) -> bytes:
    value = params.get(name)
    if not isinstance(value, bytes):
        raise ProtocolError(f"the parameter {name!r} holds a record's bytes")
    return value
