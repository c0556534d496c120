"""What a rig does with a stage, on the Node side: no torch here, no tensors, only frames, offsets and records.

`StageHandler` stands between the network (`smartnodes_core/nodes/worker.py`) and the computing process
(`tensorlink/compute.py`). Frames are received straight into shared memory and the computing process is told where
they lie; what it computes is sent from shared memory.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any

from smartnodes_core.errors import AuthorityError, JobError, ProtocolError, RecordError, SandboxError, SmartnodesError
from smartnodes_core.identity import verify
from smartnodes_core.jobs import Buffer, OpenedUnit, StageOfJob, WorkerPort, spec_digest
from smartnodes_core.records import Commitment, NodeKey, OpeningItem, Signed
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.sandbox import Limits, Sandbox
from tensorlink.records import Decide, Prepare, StepOrder

logger = logging.getLogger(__name__)

JOB_TYPE = "tensorlink/1"
COMPUTE = (sys.executable, "-m", "tensorlink.compute")
ARENA_BYTES = 16 << 30
CALL_TIMEOUT_S = 600.0
ARENA_TIMEOUT_S = 60.0

#: What the author may tell a stage one-way; everything else is a call.
_POSTS = frozenset({"begin", "backward", "drop_call"})
#: Calls that pass through to the computing process as they are.
_CALLS = frozenset({"set_optimizer", "zero_grad"})
_TENSOR_FIELDS = ("step", "call", "micro_batch", "slot", "type", "backward_pass", "dtype", "shape")
_FROM = {"activation": "previous", "activation_gradient": "next", "target": "author"}


class StageHandler:
    """A `JobHandler` for training stages; one computing process serves all stages of the rig.

    `memory_bytes` is what the rig offers (0: what the computing process measures), `num_threads` how many threads
    compute.
    """

    job_type = JOB_TYPE

    def __init__(self, memory_bytes: int = 0, num_threads: int = 1, command: Sequence[str] = COMPUTE):
        self._lock = threading.RLock()
        self._stages: dict[str, StageOfJob] = {}
        self._programs: dict[str, bytes] = {}
        self._losses: dict[str, bytes] = {}
        self._orders: dict[tuple[str, int], bytes] = {}
        self._port: WorkerPort | None = None
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

    def stop(self) -> None:
        """End the computing process."""
        self._sandbox.stop()

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
        if stage.job.record.job_type != JOB_TYPE:
            raise JobError(f"found a job of type {stage.job.record.job_type!r}, this rig runs {JOB_TYPE!r}")
        with self._lock:
            self._stages[stage.key] = stage

    def release(self, stage: StageOfJob, reason: str) -> None:
        with self._lock:
            self._stages.pop(stage.key, None)
            self._programs.pop(stage.key, None)
            self._losses.pop(stage.key, None)
            self._orders = {place: order for place, order in self._orders.items() if place[0] != stage.key}
        try:
            self._sandbox.call("unload", {"key": stage.key}, timeout_s=CALL_TIMEOUT_S)
        except SmartnodesError as error:
            logger.debug("unload: %s", error)

    def call(
        self, stage: StageOfJob, method: str, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], Sequence[Buffer]]:
        if method in _POSTS:
            self._sandbox.post(method, {**params, "key": stage.key})
            return {}, []
        if method in _CALLS:
            return self._compute(stage, method, params), []
        serve = {
            "load": self._load,
            "set_loss": self._set_loss,
            "prepare": self._prepare,
            "decide": self._decide,
            "state": self._state,
            "set_state": self._set_state,
        }.get(method)
        if serve is None:
            raise ProtocolError(f"stages have no method {method!r}")
        return serve(stage, params, body)

    def allocate(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], num_bytes: int) -> memoryview:
        """Shared memory for a tensor, provided it comes from where tensors of its type come from."""
        source = _FROM.get(str(header.get("type")))
        expected = {
            "previous": stage.previous or stage.author,
            "next": stage.next or stage.author,
            "author": stage.author,
        }
        if source is None or sender != expected[source]:
            raise ProtocolError(f"stage {stage.stage} takes no {header.get('type')!r} from this peer")
        if not all(field in header for field in _TENSOR_FIELDS):
            raise ProtocolError(f"a tensor's header needs {', '.join(_TENSOR_FIELDS)}")
        piece = self._sandbox.inbound.allocate(max(1, num_bytes), ARENA_TIMEOUT_S)
        header["offset"] = piece.offset
        return piece.view[:num_bytes]

    def receive(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], body: memoryview) -> None:
        message = {field: header[field] for field in _TENSOR_FIELDS}
        self._sandbox.post("tensor", {**message, "key": stage.key, "offset": header["offset"], "num_bytes": len(body)})

    def spec(self, stage: StageOfJob) -> bytes:
        with self._lock:
            if stage.key not in self._programs:
                raise JobError("the stage is not loaded yet")
            return self._programs[stage.key]

    def open(self, stage: StageOfJob, commitment: Commitment, tier: int, unit: int) -> OpenedUnit:
        """What an auditor needs to re-execute, the loss program included."""
        with self._lock:
            order, loss = self._orders.get((stage.key, commitment.step), b""), self._losses.get(stage.key, b"")
        params = {"step": commitment.step, "unit": unit, "tier": tier}
        reply = self._compute(stage, "open", params)
        view = self._sandbox.outbound.view(reply["offset"], reply["num_bytes"])
        try:
            body = bytes(view) + loss
        finally:
            view.release()
            self._sandbox.post("sent", {"offset": reply["offset"]})
        items = [OpeningItem(**item) for item in reply["items"]]
        items.append(OpeningItem(label="loss_program", meta=b"", num_bytes=len(loss)))
        return OpenedUnit(items, body, order)

    # -- calls of the author ------------------------------------------------------------------------------------------

    def _load(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[Buffer]]:
        """The body holds the program and then the weights; the program must be the one that the job record names."""
        program = bytes(body[: int(params["program_bytes"])])
        record = stage.job.record
        if spec_digest(program) != record.specs[stage.stage]:
            raise RecordError("the program is not the one that the job record names for this stage")
        with self._lock:
            self._programs[stage.key] = program
        offset, num_bytes = self._put(body[len(program) :])
        reply = self._compute(
            stage,
            "load",
            {
                "job": stage.job.id,
                "plan_version": stage.job.plan.version,
                "replica": stage.replica,
                "stage": stage.stage,
                "num_stages": record.num_stages,
                "program": program,
                "loss_program": b"",
                "weights": {"offset": offset, "num_bytes": num_bytes},
                "optimizer": {},
                "seed": int(record.terms["seed"]),
                "window_steps": record.audit.window_steps,
                "limits": {"batch": int(record.terms["samples"])},
            },
        )
        if bytes(reply["initial_root"]) != record.initial_roots[stage.stage]:
            raise RecordError("the weights are not those that the job record names for this stage")
        return reply, []

    def _set_loss(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        loss = bytes(body)
        with self._lock:
            self._losses[stage.key] = loss
        return self._compute(stage, "set_loss", {"loss_program": loss}), []

    def _prepare(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        prepare = Prepare.decode(params["prepare"])
        self._check_plan(stage, prepare)
        return self._compute(stage, "prepare", {"step": prepare.step, "num_units": prepare.num_units}), []

    def _decide(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        """Commit or abort as the author's signed order says: its options, nothing of this rig's own."""
        decide = Decide.decode(params["decide"])
        self._check_plan(stage, decide)
        signed = Signed.decode(body)
        order = verify(signed, StepOrder)
        if signed.signer != stage.author or order.digest() != decide.order or order.step != decide.step:
            raise AuthorityError("a step is decided by the author's signed order for that step")
        with self._lock:
            self._orders[(stage.key, decide.step)] = bytes(body)
            oldest = decide.step - stage.job.record.audit.window_steps - 16
            self._orders.pop((stage.key, oldest), None)
        reply = self._compute(
            stage,
            "decide",
            {
                "step": decide.step,
                "decision": decide.decision,
                "clip_coefficient": decide.clip_coefficient,
                "options": order.options,
                "order": decide.order,
            },
        )
        return reply, []

    def _state(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        reply = self._compute(stage, "state", {})
        view = self._sandbox.outbound.view(reply["offset"], reply["num_bytes"])
        try:
            return {}, [bytes(view)]
        finally:
            view.release()
            self._sandbox.post("sent", {"offset": reply["offset"]})

    def _set_state(
        self, stage: StageOfJob, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], list[Buffer]]:
        offset, num_bytes = self._put(body)
        return self._compute(stage, "set_state", {"weights": {"offset": offset, "num_bytes": num_bytes}}), []

    def _check_plan(self, stage: StageOfJob, record: Prepare | Decide) -> None:
        if record.job != stage.job.id or record.plan_version != stage.job.plan.version:
            raise RecordError("a message of another job or plan version")

    def _put(self, data: memoryview) -> tuple[int, int]:
        """Copy a call's body into shared memory; the computing process gives it back."""
        piece = self._sandbox.inbound.allocate(max(1, len(data)), ARENA_TIMEOUT_S)
        piece.view[: len(data)] = data
        return piece.offset, len(data)

    def _compute(self, stage: StageOfJob, method: str, params: dict[str, Any]) -> dict[str, Any]:
        return self._sandbox.call(method, {**params, "key": stage.key}, timeout_s=CALL_TIMEOUT_S)

    # -- events of the computing process ------------------------------------------------------------------------------

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        if name == "released":
            self._sandbox.inbound.free(params["offset"])
            return
        with self._lock:
            stage = self._stages.get(str(params.get("key")))
        if stage is None:
            if name == "send":
                self._sandbox.post("sent", {"offset": params["offset"]})
            return
        content = {key: value for key, value in params.items() if key != "key"}
        if name == "send":
            self._send(stage, content)
        elif name == "commitment":
            self.port.commit(stage, {**content, "numeric_class": self._measured["numeric_class"]})
        elif name == "failed":
            self.port.fail(stage, from_wire(content, "computing process", b""))
        elif name in ("loss", "done"):
            self.port.tell_author(stage, name, content)

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
                self.port.fail(stage, JobError(f"stage {stage.stage} cannot reach its {to} stage: {error}"))

    def _on_exit(self, reason: str) -> None:
        """The computing process died: every stage it held is lost, the node lives on."""
        with self._lock:
            stages = list(self._stages.values())
        for stage in stages:
            self.port.fail(stage, SandboxError(f"the computing process of stage {stage.stage} died: {reason}"))
