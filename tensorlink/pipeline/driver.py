"""The user's end of the pipeline: sends micro-batches in, takes outputs and gradients back, waits with a deadline.

One `Driver` per job. It knows stages, calls and micro-batches; `tensorlink/calls.py` knows autograd, `progress.py`
how long to be patient. Everything that arrives is checked against what was asked for before it is stored, and every
wait ends with a result, an error, or a `DeadlineError` that says what was waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from smartnodes_core.errors import (
    ConnectionLostError,
    DeadlineError,
    JobError,
    PeerUnreachableError,
    ProtocolError,
    SmartnodesError,
    WorkerLostError,
)
from smartnodes_core.jobs import Job, StageOfJob
from smartnodes_core.nodes.user import JobListener, UserNode
from smartnodes_core.records import Commitment, Verdict
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.rpc import PendingCall, Reply
from tensorlink.pipeline.backward import Norm
from tensorlink.pipeline.contradictions import Contradictions
from tensorlink.pipeline.executor import Timeline
from tensorlink.pipeline.frames import FrameTensor, dtype_name, tensor_bytes
from tensorlink.pipeline.headers import field_of
from tensorlink.pipeline.progress import Progress
from tensorlink.pipeline.tally import Tally
from tensorlink.records import Cut, Slot


@dataclass(eq=False)
class Call:
    """One forward through the pipeline and the backwards through it."""

    step: int
    index: int
    samples: list[int]
    outputs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    input_gradients: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    done: set[tuple[str, int, int]] = field(default_factory=set)  # (type, backward pass, stage)
    prepared: dict[int, Norm] = field(default_factory=dict)  # by stage, what it said of its gradient at its end
    timelines: dict[int, Timeline] = field(default_factory=dict)  # by stage, what ran when in what was done last
    shapes: list[list[torch.Size]] = field(default_factory=list)  # per output slot, of each micro-batch's piece
    num_backwards: int = 0
    freed: bool = False  # its graph is gone from the stages
    training: bool = True
    grad: bool = True

    @property
    def num_micro_batches(self) -> int:
        return len(self.samples)

    def is_done(self, type: str, backward_pass: int, num_stages: int) -> bool:
        """Whether every stage has finished this forward, backward or training step."""
        return all((type, backward_pass, stage) in self.done for stage in range(num_stages))


class Driver(JobListener):
    """Drives the stages of one job. `inputs` and `outputs` are the cuts at the two ends."""

    def __init__(self, user: UserNode, inputs: Cut, outputs: Cut, timeout_s: float):
        self.tally, self.contradictions = Tally(), Contradictions()
        self._progress = Progress(timeout_s)
        self._user = user
        self._inputs, self._outputs = inputs, outputs
        self._stages: list[StageOfJob] = []
        self._ready = threading.Condition()
        self._calls: dict[tuple[int, int], Call] = {}
        self._error: SmartnodesError | None = None

    def attach(self, job: Job) -> None:
        """The job is open: these are its stages."""
        self._stages = [StageOfJob(job, stage, 0) for stage in range(job.record.num_stages)]

    def close(self) -> None:
        """Fail every wait and every later use: the job is closed."""
        self._fail(JobError("the job is closed: make a new DistributedModel"))

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    @property
    def patience_s(self) -> float:
        """How long the pipeline may be silent before that is an error."""
        return self._progress.patience_s

    def transfer_s(self, num_bytes: int) -> float:
        """How long it may take until `num_bytes` have gone over a slow link."""
        return self._progress.transfer_s(num_bytes)

    # -- calls to stages ----------------------------------------------------------------------------------------------

    def call(
        self,
        stage: int,
        method: str,
        params: dict[str, Any],
        body: Sequence[Any] = (),
        *,
        max_body_bytes: int = 0,
        wait_s: float = 0.0,
    ) -> Reply:
        """Call one stage, which may take `wait_s` for other things than the call's and the reply's body.

        What the connection's end hides, the loss of its worker, is raised instead.
        """
        return self._result(stage, self._begin_call(stage, method, params, body, max_body_bytes, wait_s))

    def call_all(
        self,
        method: str,
        params: Callable[[int], dict[str, Any]],
        body: Callable[[int], Sequence[Any]] = lambda stage: (),
        max_body_bytes: Callable[[int], int] = lambda stage: 0,
        wait_s: float = 0.0,
    ) -> list[Reply]:
        """Call every stage at once; the answers by stage. The error that came first is raised when all have ended."""
        errors: list[tuple[float, Exception]] = []
        begun: list[tuple[int, PendingCall]] = []
        for stage in range(self.num_stages):
            try:
                size = max_body_bytes(stage)
                begun.append((stage, self._begin_call(stage, method, params(stage), body(stage), size, wait_s)))
            except Exception as error:
                errors.append((time.monotonic(), error))
        replies: list[Reply] = []
        for stage, call in begun:
            try:
                replies.append(self._result(stage, call))
            except Exception as error:
                errors.append((call.ended_s, error))
        if errors:
            self.check()
            raise min(errors, key=lambda ended: ended[0])[1]
        return replies

    def _begin_call(
        self, stage: int, method: str, params: dict[str, Any], body: Sequence[Any], max_body_bytes: int, wait_s: float
    ) -> PendingCall:
        """A call on its way; `_result` waits for its answer."""
        self.check()
        timeout_s = wait_s + self._progress.transfer_s(sum(len(part) for part in body) + max_body_bytes)
        try:
            return self._user.begin_call(
                self._stages[stage], method, params, body, timeout_s=timeout_s, max_body_bytes=max_body_bytes
            )
        except (ConnectionLostError, PeerUnreachableError) as error:
            raise self._lost(stage, error) from error

    def _result(self, stage: int, call: PendingCall) -> Reply:
        try:
            return call.result()
        except (ConnectionLostError, PeerUnreachableError) as error:
            raise self._lost(stage, error) from error

    def tell_all(self, method: str, params: dict[str, Any]) -> None:
        """A one-way message to every stage."""
        self.check()
        for stage in self._stages:
            try:
                self._user.notify(stage, method, params)
            except (ConnectionLostError, PeerUnreachableError) as error:
                raise self._lost(stage.stage, error) from error

    def _lost(self, stage: int, error: SmartnodesError) -> SmartnodesError:
        """What ended the job, where that is known; else that the worker of `stage` is gone."""
        lost = WorkerLostError(f"the worker of stage {stage} is gone: {error}")
        self._fail(lost)
        with self._ready:
            return self._error or lost

    def take_up(self) -> None:
        """A worker that was lost may be there again: calls try."""
        with self._ready:
            if isinstance(self._error, WorkerLostError):
                self._error = None

    # -- one call through the pipeline --------------------------------------------------------------------------------

    def begin(self, call: Call, options: dict[str, Any]) -> None:
        """Announce a forward (or a whole training step) to every stage; `options` as in `compute.py`'s `begin`."""
        with self._ready:
            self._calls[(call.step, call.index)] = call
        place = {"step": call.step, "call": call.index}
        self.tell_all(
            "begin", {**place, "num_micro_batches": call.num_micro_batches, "samples": call.samples, **options}
        )

    def send(self, stage: int, call: Call, micro_batch: int, slot: int, tensor: torch.Tensor, **place: Any) -> None:
        """Send one tensor to `stage`; returns when it is queued, and keeps it alive until it is sent."""
        tensor = tensor.detach().contiguous()
        header = {
            "step": call.step,
            "call": call.index,
            "micro_batch": micro_batch,
            "slot": slot,
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "backward_pass": 0,
            **place,
        }
        try:
            self._user.stream(
                self._stages[stage],
                header,
                tensor_bytes(tensor),
                lambda keep=tensor: None,  # type: ignore[misc]
            )
        except (ConnectionLostError, PeerUnreachableError) as error:
            raise self._lost(stage, error) from error

    def forget(self, call: Call) -> None:
        """Nothing more is expected for this call."""
        with self._ready:
            self._calls.pop((call.step, call.index), None)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds. Raises what ended the job, or DeadlineError when nothing moves for
        `patience_s`.
        """
        with self._ready:
            self._progress.begin()
            while not condition():
                self._raise_error()
                left = self._progress.left_s
                if left <= 0:
                    raise DeadlineError(
                        f"waited for {what}, and no stage has sent anything for {self.patience_s:.0f} s: raise "
                        "timeout_s if a single micro-batch takes longer than that"
                    )
                self._ready.wait(left)
            self._progress.end()

    def check(self) -> None:
        """Raise what ended the job, if anything did."""
        with self._ready:
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise type(self._error)(*self._error.args)

    def _fail(self, error: SmartnodesError) -> None:
        with self._ready:
            if self._error is None:
                self._error = error
            self._ready.notify_all()

    # -- JobListener --------------------------------------------------------------------------------------------------

    def on_event(self, stage: int, event: str, params: dict[str, Any]) -> None:
        if event == "failed":
            self._fail(from_wire(params, f"stage {stage}", self._stages[stage].job.worker_of(stage)))
            return
        with self._ready:
            call = self._calls.get((field_of(params, "step"), field_of(params, "call")))
            if call is None:
                return
            if event == "loss" and stage == self.num_stages - 1:
                call.losses[field_of(params, "micro_batch")] = _number(params, "value")
            elif event == "done":
                call.done.add((str(params.get("type")), field_of(params, "backward_pass"), stage))
                self.tally.busy(stage, _number(params, "busy_s"))
                call.timelines[stage] = _timeline(params)
                if "squared_norm" in params:
                    call.prepared[stage] = norm_of(params)
            self._moved()

    def allocate(self, stage: int, header: dict[str, Any], num_bytes: int) -> memoryview:
        slot = self._slot(stage, header)
        with self._ready:
            call = self._calls.get((field_of(header, "step"), field_of(header, "call")))
        if call is None or field_of(header, "micro_batch") >= call.num_micro_batches:
            # not the peer's fault: a call that was given up may still have tensors under way
            raise JobError(f"stage {stage} sent a tensor of a call that is not under way")
        return FrameTensor.allocate(slot, header, num_bytes)

    def _slot(self, stage: int, header: dict[str, Any]) -> Slot:
        output, slot = header.get("type") == "output", field_of(header, "slot")
        cut = self._outputs if output else self._inputs
        if not output and header.get("type") != "activation_gradient":
            raise ProtocolError(f"stage {stage} sent a tensor of type {header.get('type')!r:.40}")
        if stage != (self.num_stages - 1 if output else 0) or slot >= len(cut.slots):
            raise ProtocolError(f"stage {stage} sent a tensor that nobody asked for")
        return cut.slots[slot]

    def on_frame(self, stage: int, header: dict[str, Any], body: memoryview) -> None:
        tensor = FrameTensor.wrap(header, body)
        with self._ready:
            call = self._calls.get((header["step"], header["call"]))
            if call is None:
                return
            place = (header["micro_batch"], header["slot"])
            if header["type"] == "output":
                call.outputs.setdefault(place, tensor)
            elif (backward_pass := field_of(header, "backward_pass")) < call.num_backwards:
                call.input_gradients.setdefault((backward_pass, *place), tensor)
            self._moved()

    def on_commitment(self, commitment: Commitment) -> None:
        self.tally.commitment(commitment)
        self.contradictions.commitment(commitment, self.num_stages)

    def on_verdict(self, verdict: Verdict) -> None:
        self.tally.verdict(verdict)

    def on_lost(self, stage: int, error: WorkerLostError) -> None:
        self._fail(error)

    def _moved(self) -> None:
        self._progress.moved()
        self._ready.notify_all()


def _timeline(params: dict[str, Any]) -> Timeline:
    """What a stage says that it ran when."""
    found = params.get("timeline")
    if not isinstance(found, list) or not all(_is_run(run) for run in found):
        raise ProtocolError("a timeline lists kind, micro-batch, begin and end of each action")
    return [tuple(run) for run in found]


def _is_run(run: Any) -> bool:
    if not isinstance(run, list | tuple) or len(run) != 4:
        return False
    kind, *numbers = run
    return kind in ("F", "B", "W") and all(type(number) is int and number >= 0 for number in numbers)


def norm_of(params: dict[str, Any]) -> Norm:
    """What a stage says of its gradient. Raises ProtocolError where it is malformed."""
    name = params.get("non_finite")
    if not isinstance(name, str):
        raise ProtocolError("non_finite is the name of a parameter, or empty")
    return _number(params, "squared_norm"), name


def _number(params: dict[str, Any], name: str) -> float:
    try:
        return float.fromhex(params[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ProtocolError(f"{name} is not a number in float.hex() form") from None
