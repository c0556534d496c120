"""The computing process of a rig as its node sees it: messages and shared memory in, events out, its death survived.

Frames are received straight into shared memory and sent from it. The thread that reads from the process never waits:
what is sent, and what is committed to, each go through an ordered thread of their own. Neighbour: `worker.py`, which
knows what authors may ask for.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorlink.errors  # noqa: F401 - the computing process's errors find their classes among those that are loaded
from smartnodes_core.errors import BusyError, JobError, SandboxError, SmartnodesError, WorkerLostError
from smartnodes_core.jobs import StageOfJob, WorkerPort
from smartnodes_core.records import NodeKey
from smartnodes_core.remote_errors import from_wire
from smartnodes_core.sandbox import Limits, Sandbox
from tensorlink import allocator
from tensorlink.footprint import limit_of
from tensorlink.inflight import ARENA_TIMEOUT_S, LEAST_LIMIT_BYTES, Inflight, Reserved
from tensorlink.ordered import Ordered

logger = logging.getLogger(__name__)

COMPUTE = (sys.executable, "-m", "tensorlink.compute")
ARENA_BYTES = 16 << 30
#: Of what a commitment's opening holds: it is copied between two actions of training.
OPENED_AT_ONCE_BYTES = 8 << 20
#: The scratch file takes at most this share of what is free on the disk when the rig starts.
DISK_SHARE = 2
CALL_TIMEOUT_S = 600.0
#: What a single action may take: a program that a stranger wrote to be slow ends with its process.
MAX_ACTION_S = 600.0
STOP_TIMEOUT_S = 1.0
#: A computing process that died is not started again sooner: one that dies at once must not keep the machine busy.
RESTART_AFTER_S = 5.0


class StageCompute:
    """One computing process with all stages of the rig, and a fresh one when it dies.

    `port` gives the way to the network. Stages are known from `add` to `remove`. Steps of long audit windows may be
    kept on disk in the folder `scratch`, if one is given.
    """

    def __init__(
        self,
        memory_bytes: int,
        num_threads: int,
        command: Sequence[str],
        port: Callable[[], WorkerPort],
        scratch: Path | None = None,
        num_devices: int = 1,
        device: str = "cpu",
    ):
        self.measured: dict[str, Any] = {}
        self.inflight = Inflight()
        self.check_commitment: Callable[[StageOfJob, dict[str, Any]], None] = lambda stage, content: None
        self._port = port
        self._lock = threading.Lock()
        self._stages: dict[str, StageOfJob] = {}
        self._dead: dict[str, str] = {}  # stages whose process died, and of what
        self._sending = Ordered("stage-sending")
        self._committing = Ordered("stage-commitments")
        self._stopping = threading.Event()
        self._sandbox = Sandbox(
            list(command),
            limits=Limits(
                memory_bytes=limit_of(memory_bytes),
                num_threads=num_threads,
                action_s=MAX_ACTION_S,
                device=device,
                num_devices=num_devices,
                file_bytes=0 if scratch is None else shutil.disk_usage(scratch).free // DISK_SHARE,
            ),
            inbound_bytes=ARENA_BYTES,
            outbound_bytes=ARENA_BYTES,
            on_event=self._on_event,
            on_exit=self._on_exit,
            scratch=scratch,
            environment=allocator.environment(),
        )

    def start(self) -> None:
        """Start the computing process and measure the rig."""
        self._sandbox.start()
        self.measured = self._sandbox.call("measure", {}, timeout_s=60.0)
        logger.info("the computing process: %s", "; ".join(self.measured["confinement"]))
        for what in self.measured["unconfined"]:
            logger.warning("the computing process is not confined in full: %s", what)
        self.inflight.limit_bytes = max(LEAST_LIMIT_BYTES, int(self.measured["memory_bytes"]))

    def stop(self) -> None:
        """End the computing process."""
        self._stopping.set()
        self._sandbox.stop()
        self._sending.stop(STOP_TIMEOUT_S)
        self._committing.stop(STOP_TIMEOUT_S)

    # -- stages -------------------------------------------------------------------------------------------------------

    def add(self, stage: StageOfJob) -> None:
        """Events of this stage go to its job from now on."""
        with self._lock:
            self._stages[stage.key] = stage

    def remove(self, stage: StageOfJob) -> None:
        """The stage is gone: its memory is freed."""
        with self._lock:
            self._stages.pop(stage.key, None)
            if self._dead.pop(stage.key, None) is not None:
                return
        try:
            self.call(stage, "unload", {})
        except SmartnodesError as error:
            logger.debug("unload: %s", error)

    def check_alive(self, stage: StageOfJob) -> None:
        """Raises WorkerLostError where the stage died with its process."""
        with self._lock:
            reason = self._dead.get(stage.key)
        if reason is not None:
            raise _death(stage, reason)

    def fail(self, stage: StageOfJob, error: SmartnodesError) -> None:
        """Tell the stage's author, without waiting, that it cannot go on."""
        self._sending.put(lambda: self._port().fail(stage, error))

    # -- messages and memory ------------------------------------------------------------------------------------------

    def call(self, stage: StageOfJob, method: str, params: dict[str, Any], wait_s: float = 0.0) -> dict[str, Any]:
        """Call the process about a stage and wait, `wait_s` longer where others are waited for.

        Raises what it raised, or SandboxError.
        """
        return self._sandbox.call(method, {**params, "key": stage.key}, timeout_s=CALL_TIMEOUT_S + wait_s)

    def post(self, stage: StageOfJob, method: str, params: dict[str, Any]) -> None:
        """Tell the process something about a stage."""
        self._sandbox.post(method, {**params, "key": stage.key})

    def reserve(self, stage: StageOfJob, num_bytes: int) -> tuple[Reserved, memoryview]:
        """Shared memory for a tensor that arrives. Raises BusyError, and tells the author, where there is too much."""
        self.check_alive(stage)
        try:
            return self.inflight.reserve(self._sandbox.inbound, stage.key, num_bytes)
        except BusyError as error:
            self.fail(stage, BusyError(f"stage {stage.stage}: {error}"))
            raise

    def put(self, data: memoryview) -> dict[str, int]:
        """Copy a call's body into shared memory; the computing process gives it back."""
        piece = self._sandbox.inbound.allocate(max(1, len(data)), ARENA_TIMEOUT_S)
        piece.view[: len(data)] = data
        return {"offset": piece.offset, "num_bytes": len(data)}

    def take(self, reply: dict[str, Any]) -> bytes:
        """Copy what the computing process answered with out of shared memory, and give that back."""
        view = self._sandbox.outbound.view(reply["offset"], reply["num_bytes"])
        try:
            return bytes(view)
        finally:
            view.release()
            self._sandbox.post("sent", {"offset": reply["offset"]})

    def take_opening(self, stage: StageOfJob, reply: dict[str, Any], room: int = 0) -> bytearray:
        """The body of what `open` answered with, with `room` more bytes behind it. Raises AuditError where the
        computing process gave it up meanwhile."""
        num_bytes = int(reply["num_bytes"])
        if not 0 <= num_bytes <= ARENA_BYTES:
            raise SandboxError(f"an opening of {num_bytes} bytes, at most {ARENA_BYTES} can be sent")
        body = bytearray(num_bytes + room)
        for at in range(0, num_bytes, OPENED_AT_ONCE_BYTES):
            asked = {"opening": reply["opening"], "at": at, "num_bytes": min(OPENED_AT_ONCE_BYTES, num_bytes - at)}
            part = self.call(stage, "open_part", asked)
            view = self._sandbox.outbound.view(part["offset"], part["num_bytes"])
            try:
                body[at : at + len(view)] = view
            finally:
                view.release()
                self._sandbox.post("sent", {"offset": part["offset"]})
        return body

    # -- events -------------------------------------------------------------------------------------------------------

    def _on_event(self, name: str, params: dict[str, Any]) -> None:
        """On the thread that reads from the computing process: nothing here waits."""
        if name == "released":
            self.inflight.released(params["offset"])
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
            self.fail(stage, from_wire(content, "computing process", b""))
        elif name in ("loss", "done"):
            self._sending.put(lambda: self._port().tell_author(stage, name, content))

    def _commit(self, stage: StageOfJob, content: dict[str, Any]) -> None:
        try:
            self.check_commitment(stage, content)
            self._port().commit(stage, {**content, "numeric_class": self.measured["numeric_class"]})
        except SmartnodesError as error:
            self.fail(stage, JobError(f"stage {stage.stage} cannot commit to its work: {error}"))

    def _send(self, stage: StageOfJob, params: dict[str, Any]) -> None:
        """A tensor leaves: to another stage (under that stage's key) or to the author, from shared memory."""
        to, offset, num_bytes = params.pop("to"), params.pop("offset"), params.pop("num_bytes")
        target, there = _destination(stage, to)
        view = self._sandbox.outbound.view(offset, num_bytes)

        def sent() -> None:
            view.release()
            self._sandbox.post("sent", {"offset": offset})

        try:
            self._port().stream(target, {**params, "key": there.key}, view, sent)
        except SmartnodesError as error:
            sent()
            logger.warning("stage %s could not send to %s: %s", stage.stage, to, error)
            if target != stage.author:
                message = f"the worker of stage {there.stage} cannot be reached by that of stage {stage.stage}: {error}"
                self._port().fail(stage, WorkerLostError(message))

    def _on_exit(self, reason: str) -> None:
        """The computing process died: every stage it held is lost, the node lives on with a fresh one."""
        with self._lock:
            lost = [stage for key, stage in self._stages.items() if key not in self._dead]
            self._dead.update({stage.key: reason for stage in lost})
        self.inflight.clear()
        logger.error("the computing process died, %d stages are lost: %s", len(lost), reason)
        for stage in lost:
            self.fail(stage, _death(stage, reason))
        threading.Thread(target=self._restart, name="stage-restart", daemon=True).start()

    def _restart(self) -> None:
        if not self._stopping.wait(RESTART_AFTER_S):
            try:
                self._sandbox.start()
            except SandboxError as error:
                logger.error("the computing process could not be started again: %s", error)


def _destination(stage: StageOfJob, to: str | int) -> tuple[NodeKey, StageOfJob]:
    """Who gets what goes `to` "next", "previous", a stage's number, or (else) the author; and the stage it is for.

    The first stage's "previous" and the last one's "next" are the author too.
    """
    number = to if isinstance(to, int) else stage.stage + {"next": 1, "previous": -1}.get(to, 0)
    if number == stage.stage or not 0 <= number < stage.job.record.num_stages:
        return stage.author, stage
    return stage.job.worker_of(number, stage.replica), StageOfJob(stage.job, number, stage.replica)


def _death(stage: StageOfJob, reason: str) -> WorkerLostError:
    return WorkerLostError(f"the worker of stage {stage.stage} lost the stage: {reason}")
