"""The user's end of the pipeline: sends micro-batches in, takes outputs and gradients back, waits with a deadline.

One `Driver` per job. It knows stages, calls and micro-batches; `tensorlink/model.py` knows modules and autograd.
Everything that arrives is checked against what was asked for before it is stored, and every wait ends with a result,
an error, or a
`DeadlineError` that says what was waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from smartnodes_core.errors import (
    ConnectionLostError,
    DeadlineError,
    JobError,
    ProtocolError,
    SmartnodesError,
    WorkerLostError,
)
from smartnodes_core.jobs import Job, StageOfJob
from smartnodes_core.nodes.user import JobListener, UserNode
from smartnodes_core.records import Commitment, Verdict
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.rpc import Reply
from tensorlink.pipeline.frames import FrameTensor, dtype_name, tensor_bytes
from tensorlink.records import Cut

#: A wait ends after this many times the longest step seen so far (and never before `Driver.timeout_s`).
PATIENCE = 20.0
#: Progress of any kind (a frame, a loss) within this long shows that the pipeline is alive.
MAX_WAIT_S = 3600.0


@dataclass
class Call:
    """One forward through the pipeline and the backwards through it."""

    step: int
    index: int
    samples: list[int]
    outputs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    input_gradients: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    done: set[tuple[str, int, int]] = field(default_factory=set)  # (type, backward pass, stage)
    num_backwards: int = 0

    @property
    def num_micro_batches(self) -> int:
        return len(self.samples)


class Driver(JobListener):
    """Drives the stages of one job. `inputs` and `outputs` are the cuts at the two ends."""

    def __init__(self, user: UserNode, inputs: Cut, outputs: Cut, timeout_s: float):
        self.timeout_s = timeout_s
        self.verdicts: list[Verdict] = []
        self.commitments: dict[tuple[int, int], Commitment] = {}
        self.busy_s: dict[int, float] = {}
        self._user = user
        self._inputs, self._outputs = inputs, outputs
        self._stages: list[StageOfJob] = []
        self._ready = threading.Condition()
        self._calls: dict[tuple[int, int], Call] = {}
        self._error: SmartnodesError | None = None
        self._longest_s = 0.0
        self._last_progress = time.monotonic()
        self._pool = ThreadPoolExecutor(thread_name_prefix="driver")

    def attach(self, job: Job) -> None:
        """The job is open: these are its stages."""
        self._stages = [StageOfJob(job, stage, 0) for stage in range(job.record.num_stages)]

    def close(self) -> None:
        """Fail every wait and every later use: the job is closed."""
        self._fail(JobError("the job is closed: make a new DistributedModel"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    # -- calls to stages ----------------------------------------------------------------------------------------------

    def call(
        self, stage: int, method: str, params: dict[str, Any], body: Sequence[Any] = (), *, max_body_bytes: int = 0
    ) -> Reply:
        """Call one stage. What the connection's end hides, the loss of its worker, is raised instead."""
        self.check()
        try:
            return self._user.call(
                self._stages[stage], method, params, body, timeout_s=self.patience_s, max_body_bytes=max_body_bytes
            )
        except ConnectionLostError as error:
            raise WorkerLostError(f"the worker of stage {stage} is gone: {error}") from error

    def call_all(self, method: str, params: Callable[[int], dict[str, Any]], body: Sequence[Any] = ()) -> list[Reply]:
        """Call every stage at once; the answers by stage. The first error is raised when all have ended."""
        futures = self.start_all(method, params, body)
        return self.gather(futures)

    def start_all(
        self, method: str, params: Callable[[int], dict[str, Any]], body: Sequence[Any] = ()
    ) -> list[Future[Reply]]:
        """Begin a call to every stage; `gather` waits for the answers."""
        return [self._pool.submit(self.call, stage, method, params(stage), body) for stage in range(self.num_stages)]

    def gather(self, futures: list[Future[Reply]]) -> list[Reply]:
        """The answers of `start_all`, by stage."""
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            self.check()
            raise errors[0]
        return [future.result() for future in futures]

    def tell_all(self, method: str, params: dict[str, Any]) -> None:
        """A one-way message to every stage."""
        self.check()
        for stage in self._stages:
            try:
                self._user.notify(stage, method, params)
            except ConnectionLostError as error:
                raise WorkerLostError(f"the worker of stage {stage.stage} is gone: {error}") from error

    # -- one call through the pipeline --------------------------------------------------------------------------------

    def begin(self, call: Call, options: dict[str, Any]) -> None:
        """Announce a forward (or a whole training step) to every stage; `options` as in `compute.py`'s `begin`."""
        with self._ready:
            self._calls[(call.step, call.index)] = call
        self.tell_all(
            "begin",
            {
                "step": call.step,
                "call": call.index,
                "num_micro_batches": call.num_micro_batches,
                "samples": call.samples,
                **options,
            },
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
        data = tensor_bytes(tensor)
        try:
            self._user.stream(self._stages[stage], header, data, lambda keep=tensor: None)  # type: ignore[misc]
        except ConnectionLostError as error:
            raise WorkerLostError(f"the worker of stage {stage} is gone: {error}") from error

    def forget(self, call: Call) -> None:
        """Nothing more is expected for this call."""
        with self._ready:
            self._calls.pop((call.step, call.index), None)

    # -- waiting ------------------------------------------------------------------------------------------------------

    @property
    def patience_s(self) -> float:
        """How long a wait may see no progress: the configured time, or many times the longest step seen."""
        return min(MAX_WAIT_S, max(self.timeout_s, PATIENCE * self._longest_s))

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds. Raises what went wrong, or DeadlineError when nothing moves for
        `patience_s`.
        """
        began = self._last_progress = time.monotonic()
        with self._ready:
            while not condition():
                self._raise_error()
                left = self._last_progress + self.patience_s - time.monotonic()
                if left <= 0:
                    raise DeadlineError(
                        f"waited for {what}, and no stage has sent anything for {self.patience_s:.0f} s: raise timeout_s "
                        "if a single micro-batch takes longer than that"
                    )
                self._ready.wait(left)
        self._longest_s = max(self._longest_s, time.monotonic() - began)

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
            call = self._calls.get((params["step"], params["call"]))
            if call is None:
                return
            if event == "loss" and stage == self.num_stages - 1:
                call.losses[int(params["micro_batch"])] = float.fromhex(params["value"])
            elif event == "done":
                call.done.add((str(params["type"]), int(params["backward_pass"]), stage))
                self.busy_s[stage] = self.busy_s.get(stage, 0.0) + float.fromhex(params["busy_s"])
            self._progress()

    def allocate(self, stage: int, header: dict[str, Any], num_bytes: int) -> memoryview:
        output = header.get("type") == "output"
        cut = self._outputs if output else self._inputs
        if stage != (self.num_stages - 1 if output else 0) or not 0 <= int(header["slot"]) < len(cut.slots):
            raise ProtocolError(f"stage {stage} sent a tensor that nobody asked for")
        with self._ready:
            call = self._calls.get((header["step"], header["call"]))
        if call is None or not 0 <= int(header["micro_batch"]) < call.num_micro_batches:
            raise ProtocolError(f"stage {stage} sent a tensor of a call that is not under way")
        return FrameTensor.allocate(cut.slots[header["slot"]], header, num_bytes)

    def on_frame(self, stage: int, header: dict[str, Any], body: memoryview) -> None:
        tensor = FrameTensor.wrap(header, body)
        with self._ready:
            call = self._calls.get((header["step"], header["call"]))
            if call is None:
                return
            place = (int(header["micro_batch"]), int(header["slot"]))
            if header["type"] == "output":
                call.outputs.setdefault(place, tensor)
            else:
                call.input_gradients.setdefault((int(header["backward_pass"]), *place), tensor)
            self._progress()

    def on_commitment(self, commitment: Commitment) -> None:
        self.commitments[(commitment.stage, commitment.step)] = commitment

    def on_verdict(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def on_lost(self, stage: int, error: WorkerLostError) -> None:
        self._fail(error)

    def _progress(self) -> None:
        self._last_progress = time.monotonic()
        self._ready.notify_all()
