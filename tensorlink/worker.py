"""What a rig does with a stage, on the Node side: no torch here, no tensors, only frames, offsets and records.

`StageHandler` stands between the network (`smartnodes_core/nodes/worker.py`) and the computing process
(`stage_compute.py`): it says who may send what, checks what authors ask for, and keeps what auditors need
(`stage_papers.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smartnodes_core.errors import AuthorityError, JobError, ProtocolError, RecordError
from smartnodes_core.identity import verify
from smartnodes_core.jobs import Buffer, OpenedUnit, StageOfJob, WorkerPort, spec_digest, stage_key
from smartnodes_core.nesting import bounded_json
from smartnodes_core.records import Commitment, NodeKey, OpeningItem, Signed, Unit, canonical
from smartnodes_core.usage import USAGE
from tensorlink.ordered_data import other_data
from tensorlink.pipeline.headers import MAX_TENSOR_BYTES, SHARED, counts_of, field_of, num_tensor_bytes
from tensorlink.records import PART_BYTES, Decide, Prepare, StepOrder
from tensorlink.stage_compute import COMPUTE, StageCompute
from tensorlink.stage_papers import LOSS_PROGRAM, StagePapers, earlier_order, state_interval_steps

JOB_TYPE = "tensorlink/1"

#: What the author may tell a stage one-way; everything else is a call.
_POSTS = frozenset({"begin", "backward", "drop_call"})
#: No prepare waits longer for what other stages send.
MAX_PREPARE_S = 3600
_FROM = {"activation": "previous", "activation_gradient": "next", "target": "author"}
_TERMS = ("seed", "samples")

Answer = tuple[dict[str, Any], list[Buffer]]


class StageHandler:
    """A `JobHandler` for training stages; one computing process serves all stages of the rig.

    `memory_bytes` is what the rig offers (0: what the computing process measures), `num_threads` how many threads
    compute. Over `num_devices` devices ("cpu" or "cuda") every stage is tensor-parallel, with as many threads on each.
    `scratch` is a folder for what is kept for audits and would fill the memory; without one it stays there.
    When the computing process dies, its stages are lost and a fresh one is started.
    """

    job_type = JOB_TYPE

    def __init__(
        self,
        memory_bytes: int = 0,
        num_threads: int = 1,
        command: Sequence[str] = COMPUTE,
        scratch: Path | None = None,
        num_devices: int = 1,
        device: str = "cpu",
    ):
        self._lock = threading.Lock()
        self._papers: dict[str, StagePapers] = {}
        self._port: WorkerPort | None = None
        self._compute = StageCompute(
            memory_bytes, num_threads, command, lambda: self.port, scratch, num_devices, device
        )

        self._compute.check_commitment = self._check_data

    def start(self) -> None:
        """Start the computing process and measure the rig."""
        self._compute.start()

    @property
    def confinement(self) -> list[str]:
        """What the computing process has given up, a line each."""
        return list(self._compute.measured.get("confinement", ()))

    def stop(self) -> None:
        """End the computing process."""
        self._compute.stop()

    # -- JobHandler ---------------------------------------------------------------------------------------------------

    def attach(self, port: WorkerPort) -> None:
        self._port = port

    @property
    def port(self) -> WorkerPort:
        if self._port is None:
            raise JobError("the handler is not attached to a worker node")
        return self._port

    def offers(self) -> dict[str, int | str]:
        """`flops_per_s` and `memory_bytes` as measured, `numeric_class`, `num_threads`; `capability` sums them up."""
        measured = self._compute.measured
        offers = {key: measured[key] for key in ("flops_per_s", "memory_bytes", "numeric_class", "num_threads")}
        return {**offers, "capability": capability_class(measured["flops_per_s"], measured["memory_bytes"])}

    def assign(self, stage: StageOfJob) -> None:
        record = stage.job.record
        if record.job_type != JOB_TYPE:
            raise JobError(f"found a job of type {record.job_type!r:.40}, this rig runs {JOB_TYPE!r}")
        if not all(isinstance(record.terms.get(name), int) for name in _TERMS):
            raise JobError(f"the terms of a {JOB_TYPE} job are {', '.join(_TERMS)}, each a number")
        state_interval_steps(record.terms)
        self._compute.add(stage)
        with self._lock:
            self._papers.setdefault(stage.key, StagePapers(record.audit.window_steps))

    def release(self, stage: StageOfJob, reason: str) -> None:
        with self._lock:
            self._papers.pop(stage.key, None)
        self._compute.remove(stage)

    def call(
        self, stage: StageOfJob, method: str, params: dict[str, Any], body: memoryview
    ) -> tuple[dict[str, Any], Sequence[Buffer]]:
        self._compute.check_alive(stage)
        if method in _POSTS:
            self._compute.post(stage, method, params)
            return {}, []
        serve = {
            "load": self._load,
            "load_part": self._load_part,
            "load_end": self._load_end,
            "set_loss": self._set_loss,
            "set_optimizer": self._set_optimizer,
            "zero_grad": self._zero_grad,
            "prepare": self._prepare,
            "decide": self._decide,
            "state": self._state,
            "set_state": self._set_state,
            "usage": self._usage,
            "optimizer_state": self._optimizer_state,
            "set_optimizer_state": self._set_optimizer_state,
            "snapshot": self._snapshot,
            "snapshot_part": self._snapshot_part,
            "restore": self._restore,
            "resume": self._resume,
        }.get(method)
        if serve is None:
            raise ProtocolError(f"stages have no method {method!r:.40}")
        return serve(stage, params, body)

    def allocate(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], num_bytes: int) -> memoryview:
        """Shared memory for a tensor, provided it comes from where tensors of its type come from.

        Raises ProtocolError for a header that is malformed or belies the body, JobError while the stage is not loaded,
        BusyError for more than a stage may have waiting, of which the author is told.
        """
        if sender != self._source(stage, header):
            raise ProtocolError(f"stage {stage.stage} takes no {header.get('type')!r:.40} from this peer")
        for name in counts_of(header):
            field_of(header, name)
        if num_tensor_bytes(header) != num_bytes or num_bytes > MAX_TENSOR_BYTES:
            raise ProtocolError(
                f"{num_bytes} bytes are not {header['dtype']} {header['shape']}, or over {MAX_TENSOR_BYTES}"
            )
        self._papers_of(stage).the_program()
        header["reserved"], view = self._compute.reserve(stage, num_bytes)
        return view

    def _source(self, stage: StageOfJob, header: dict[str, Any]) -> NodeKey | None:
        """Whom tensors with this header come from: a sum from a stage that holds a parameter tied to one here."""
        if header.get("type") == SHARED:
            number = field_of(header, "from_stage")
            tied = number in self._papers_of(stage).tied_with
            return stage.job.worker_of(number, stage.replica) if tied else None
        source = _FROM.get(str(header.get("type")))
        places = {"previous": stage.previous, "next": stage.next, "author": None}
        return None if source is None else places[source] or stage.author

    def receive(self, stage: StageOfJob, sender: NodeKey, header: dict[str, Any], body: memoryview) -> None:
        method = "shared" if header["type"] == SHARED else "tensor"
        message = {name: header[name] for name in (*counts_of(header), "type", "dtype", "shape")}
        offset = header.pop("reserved").keep()
        self._compute.post(stage, method, {**message, "offset": offset, "num_bytes": len(body)})

    def spec(self, stage: StageOfJob) -> bytes:
        return self._papers_of(stage).the_program()

    def open(self, stage: StageOfJob, commitment: Commitment, tier: int, unit: int) -> OpenedUnit:
        """What an auditor needs to re-execute: the author's orders of the steps from which its state follows and the
        loss program of the step included."""
        papers = self._papers_of(stage)
        order, loss = papers.of_step(commitment.step)
        reply = self._compute.call(stage, "open", {"step": commitment.step, "unit": unit, "tier": tier})
        extra = {earlier_order(at): papers.of_step(int(step))[0] for at, step in enumerate(reply["earlier_steps"])} | {
            LOSS_PROGRAM: loss
        }
        items = [OpeningItem(**item) for item in reply["items"]]
        items += [OpeningItem(label=label, meta=b"", num_bytes=len(data)) for label, data in extra.items()]
        tail = b"".join(extra.values())
        body = self._compute.take_opening(stage, reply, len(tail))
        body[len(body) - len(tail) :] = tail
        return OpenedUnit(items, memoryview(body), order, len(reply["earlier_steps"]) + 1)

    # -- calls of the author ------------------------------------------------------------------------------------------

    def _load(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """The body is the program, which must be the one that the job record names; its weights come in parts."""
        program = bytes(body)
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
            "optimizer": {},
            "seed": record.terms["seed"],
            "window_steps": record.audit.window_steps,
            "state_interval_steps": state_interval_steps(record.terms),
            "limits": {"batch": record.terms["samples"]},
        }
        reply = self._compute.call(stage, "load", content)
        self._papers_of(stage).loading = program
        return reply, []

    def _load_part(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """A part of what `load`, `set_state` or `set_optimizer_state` began, by its number in `program/parts.py`."""
        part = field_of(params, "part")
        if len(body) > PART_BYTES:
            raise ProtocolError(f"part {part} has {len(body)} bytes, at most {PART_BYTES} are taken")
        return self._compute.call(stage, "load_part", {"part": part, **self._compute.put(body)}), []

    def _load_end(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """All parts are there: a stage that was loaded begins in the state that the job record names, or not at all;
        under a later plan `resume` sees to that."""
        reply = self._compute.call(stage, "load_end", {})
        root = reply.get("initial_root")
        if root is not None:
            if self._begins_anew(stage) and bytes(root) != stage.job.record.initial_roots[stage.stage]:
                self._compute.call(stage, "unload", {})
                raise RecordError("the weights are not those that the job record names for this stage")
            self._loaded(stage, reply)
        return reply, []

    def _begins_anew(self, stage: StageOfJob) -> bool:
        return stage.job.state_root_of(stage.stage, stage.replica) is None

    def _loaded(self, stage: StageOfJob, reply: dict[str, Any]) -> None:
        papers = self._papers_of(stage)
        papers.tied_with = frozenset(int(number) for number in reply["tied_with"])
        if self._begins_anew(stage):
            papers.program = papers.loading

    def _snapshot(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """What the state before a committed step consists of, for `snapshot_part` to fetch; the items are in the
        body."""
        reply = self._compute.call(stage, "snapshot", {"step": field_of(params, "step")})
        items = canonical(reply.pop("items"))
        return reply, [items]

    def _snapshot_part(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        asked = {name: field_of(params, name) for name in ("opening", "at", "num_bytes")}
        if asked["num_bytes"] > PART_BYTES:
            raise ProtocolError(f"{asked['num_bytes']} bytes of a snapshot at once: at most {PART_BYTES} are given")
        return {}, [self._compute.take(self._compute.call(stage, "snapshot_part", asked))]

    def _restore(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """Instead of parts: the state that this stage began a step with here, under an older plan of the same job.
        `part` is "state", after `load`, or "optimizer", after `set_optimizer`."""
        version, part = field_of(params, "plan_version"), params.get("part")
        if part not in ("state", "optimizer"):
            raise ProtocolError(f"restored are 'state' and 'optimizer', found {part!r:.20}")
        source = stage_key(stage.job.id, version, stage.replica, stage.stage)
        content = {"source": source, "step": field_of(params, "step"), "part": part}
        reply = self._compute.call(stage, "restore", content)
        if part == "state":
            self._loaded(stage, reply)
        return {}, []

    def _resume(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """The stage is whole: it goes on in the state that the plan names, or not at all."""
        found = bytes(self._compute.call(stage, "state_root", {})["state_root"])
        if found != stage.job.state_root_of(stage.stage, stage.replica):
            raise RecordError(f"the state is not the one in which plan {stage.job.plan.version} has this stage go on")
        papers = self._papers_of(stage)
        papers.program = papers.loading
        return {}, []

    def _set_loss(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        loss = bytes(body)
        reply = self._compute.call(stage, "set_loss", {"loss_program": loss})
        self._papers_of(stage).add_loss(loss)
        return reply, []

    def _set_optimizer(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        return self._compute.call(stage, "set_optimizer", {"optimizer": _json(body, "an optimizer")}), []

    def _zero_grad(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        return self._compute.call(stage, "zero_grad", {"step": field_of(params, "step")}), []

    def _prepare(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        prepare = Prepare.decode(_record(params, "prepare"))
        self._check_plan(stage, prepare)
        wait_s = min(field_of(params, "wait_s"), MAX_PREPARE_S)
        content = {"step": prepare.step, "num_units": prepare.num_units, "wait_s": wait_s}
        return self._compute.call(stage, "prepare", content, wait_s), []

    def _decide(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
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
            "clip_norm": order.clip_norm,
            "optimizer": order.optimizer,
            "options": order.options,
            "order": decide.order,
        }
        return self._compute.call(stage, "decide", content), []

    def _state(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """Weights by name: those that the body lists, or all where it is empty."""
        return {}, [self._compute.take(self._compute.call(stage, "state", _wanted(body)))]

    def _optimizer_state(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """The optimizer's state of the parameters that the body lists, or of all where it is empty."""
        return {}, [self._compute.take(self._compute.call(stage, "optimizer_state", _wanted(body)))]

    def _set_state(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """Begins to take new values of what the body lists, or of all where it is empty; `load_end` ends it."""
        return self._compute.call(stage, "set_state", _wanted(body)), []

    def _usage(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """What this rig has spent since it started, all its jobs together; see `smartnodes_core/usage.py`."""
        return {"node": USAGE.read(), "compute": self._compute.call(stage, "usage", {})}, []

    def _set_optimizer_state(self, stage: StageOfJob, params: dict[str, Any], body: memoryview) -> Answer:
        """Begins to take the optimizer state that the body lists, by "parameter/state name"; `load_end` ends it."""
        return self._compute.call(stage, "set_optimizer_state", _wanted(body)), []

    def _check_data(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        """Nothing is committed to under an order that names other data than came: it would be this rig's fraud. Raises
        RecordError."""
        signed, _ = self._papers_of(stage).of_step(int(content["step"]))
        if signed:
            order = StepOrder.decode(Signed.decode(signed).record)
            units = [Unit(**unit) for unit in content["units"]]
            found = other_data(order, units, stage.stage, stage.job.record.num_stages)
            if found:
                raise RecordError(found)

    def _check_plan(self, stage: StageOfJob, record: Prepare | Decide) -> None:
        if record.job != stage.job.id or record.plan_version != stage.job.plan.version:
            raise RecordError("a message of another job or plan version")

    def _papers_of(self, stage: StageOfJob) -> StagePapers:
        with self._lock:
            papers = self._papers.get(stage.key)
        if papers is None:
            raise JobError("this rig does not run that stage (any more)")
        return papers


def _record(params: dict[str, Any], name: str) -> bytes:
    value = params.get(name)
    if not isinstance(value, bytes):
        raise ProtocolError(f"the parameter {name!r} holds a record's bytes")
    return value


def _json(body: memoryview, what: str) -> Any:
    try:
        return bounded_json(body)
    except ValueError as error:
        raise ProtocolError(f"{what} is described in JSON: {str(error)[:100]}") from None


def _wanted(body: memoryview) -> dict[str, Any]:
    return {"names": _json(body, "what is asked for")} if len(body) else {}


def capability_class(flops_per_s: int, memory_bytes: int) -> int:
    """A rig's class on chain: in the lower byte its memory, above it its speed, each in doublings of 1 GiB and of
    2^30 operations a second, plus one (0: less).
    """
    return min(255, (flops_per_s >> 30).bit_length()) << 8 | min(255, (memory_bytes >> 30).bit_length())
