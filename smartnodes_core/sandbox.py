"""The process that computes for a node: started, limited, watched and restarted from here.

The node holds keys and sockets; the child holds neither. It is a fresh interpreter (never a fork), its environment is
a short list of names, its descriptors are one socket pair and two arenas. Commands go through `pipe.py`, data through
`arena.py`. What the child gives up by itself is in `sandbox_child.py`. Whatever the child does, the node lives on:
its death fails every pending call at once with a SandboxError.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smartnodes_core.arena import Arena
from smartnodes_core.errors import ProtocolError, SandboxError, SmartnodesError
from smartnodes_core.pipe import Message, Pipe

logger = logging.getLogger(__name__)

#: The name of the environment variable through which the child learns its descriptors and limits.
SETUP_VARIABLE = "SMARTNODES_SANDBOX"
#: A child that does not take a message within this time is stuck and is killed.
SEND_TIMEOUT_S = 30
STOP_TIMEOUT_S = 3.0
START_TIMEOUT_S = 30.0
NUM_STDERR_LINES = 30
MAX_LINE_CHARS = 500

#: What the child sees of our environment; everything else, secrets among it, stays here.
_PASSED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "CUDA_VISIBLE_DEVICES",
    "TZ",
)
_PASSED_PREFIXES = ("COVERAGE_", "SYSTEMROOT")


@dataclass(frozen=True)
class Limits:
    """What the child may use. `memory_bytes` bounds its private memory (0: no bound), arenas not counted.

    With `num_devices` over 1 the child may connect to itself before it seals itself (`ChildChannel.seal`).
    `action_s` is the longest that one action may take (0: no bound) before the child is ended, `device` ("cpu" or
    "cuda") says which device files stay open to it. `file_bytes` is how much it may write to its scratch file (0: it
    has none).
    """

    memory_bytes: int = 0
    num_threads: int = 1
    num_files: int = 256
    file_bytes: int = 0
    nice: int = 0
    action_s: float = 0.0
    device: str = "cpu"
    num_devices: int = 1


class Sandbox:
    """One computing process.

    `on_event(name, params)` is called on the reading thread: it may `post`, it must not `call` and not wait.
    `on_exit(reason)` is called when the child ends without having been stopped. `inbound` is allocated by us,
    `outbound` by the child; both are new after each `start`. `scratch` is the folder for the child's scratch file,
    which no path names: disk space that goes back when the child ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        limits: Limits,
        inbound_bytes: int,
        outbound_bytes: int,
        on_event: Callable[[str, dict[str, Any]], None],
        on_exit: Callable[[str], None],
        scratch: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.limits = limits
        self._scratch = scratch
        self._environment = dict(environment or {})
        self._command = list(command)
        self._arena_bytes = (inbound_bytes, outbound_bytes)
        self._on_event = on_event
        self._on_exit = on_exit
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __repr__(self) -> str:
        child = self._child
        return f"<Sandbox {'not started' if child is None else child}>"

    @property
    def inbound(self) -> Arena:
        """Shared memory that we fill. Raises SandboxError before `start`."""
        return self._running().inbound

    @property
    def outbound(self) -> Arena:
        """Shared memory that the child fills. Raises SandboxError before `start`."""
        return self._running().outbound

    @property
    def pid(self) -> int:
        """The child's process id. Raises SandboxError before `start`."""
        return self._running().process.pid

    def start(self) -> None:
        """Starts the child. Raises SandboxError when it cannot be started or one is running."""
        with self._lock:
            if self._child is not None and self._child.reason is None:
                raise SandboxError(f"a computing process is running already: {self._child}")
            self._child = _Child(
                self._command,
                self.limits,
                self._arena_bytes,
                self._on_event,
                self._on_exit,
                self._scratch,
                self._environment,
            )
            self._child.start()

    def restart(self) -> None:
        """Ends the child, if any, and starts a fresh one with empty arenas."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Ends the child: asks by closing its pipe, kills after a deadline. Idempotent; pending calls fail."""
        child = self._child
        if child is not None:
            child.stop()

    def call(self, method: str, params: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Calls the child and waits. Raises the child's error as the class of its code, or SandboxError."""
        child = self._running()
        if threading.current_thread() is child.reader:
            raise SandboxError(f"{method}: a call from on_event would wait for itself; use post")
        call_id = next(self._ids)
        pending = child.expect(call_id)
        try:
            child.send(Message("call", call_id, method, params))
            return pending.result(timeout_s)
        except FutureTimeout:
            raise SandboxError(f"the computing process did not answer {method} within {timeout_s:.3g} s") from None
        finally:
            child.forget(call_id)

    def post(self, method: str, params: dict[str, Any]) -> None:
        """Sends a one-way message. Raises SandboxError when the child is gone."""
        self._running().send(Message("post", 0, method, params))

    def _running(self) -> _Child:
        if self._child is None:
            raise SandboxError("the computing process was not started")
        return self._child


class _Child:
    """One life of the computing process: from `start` to its end, never used again after."""

    def __init__(
        self,
        command: list[str],
        limits: Limits,
        arena_bytes: tuple[int, int],
        on_event: Callable[[str, dict[str, Any]], None],
        on_exit: Callable[[str], None],
        scratch: Path | None,
        environment: Mapping[str, str],
    ) -> None:
        self.process: subprocess.Popen[bytes]
        self._scratch, self._environment = scratch, environment
        self.inbound = Arena.create(arena_bytes[0], "inbound")
        self.outbound = Arena.create(arena_bytes[1], "outbound")
        self.reason: str | None = None
        self.reader = threading.Thread(target=self._run, name="sandbox-reader", daemon=True)
        self._command, self._limits = command, limits
        self._on_event, self._on_exit = on_event, on_exit
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._stderr: deque[str] = deque(maxlen=NUM_STDERR_LINES)
        ours, self._theirs = socket.socketpair()
        # only sending gets a timeout: a stopped child must not hold our threads forever
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
        self._pipe = Pipe(ours)
        self._started: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def __repr__(self) -> str:
        state = "running" if self.reason is None else self.reason
        return f"{self._command[-1]} {state}, {len(self._pending)} calls pending, {self.inbound!r}, {self.outbound!r}"

    def start(self) -> None:
        self.reader.start()
        failure = self._started.get(timeout=START_TIMEOUT_S)
        if failure is not None:
            raise SandboxError(f"the computing process could not be started: {failure}") from failure

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        self._pipe.close()
        if threading.current_thread() is not self.reader:
            self.reader.join(2 * STOP_TIMEOUT_S)

    def expect(self, call_id: int) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self.reason is not None:
                raise SandboxError(self.reason)
            self._pending[call_id] = future
        return future

    def forget(self, call_id: int) -> None:
        with self._lock:
            self._pending.pop(call_id, None)

    def send(self, message: Message) -> None:
        if self.reason is not None:
            raise SandboxError(self.reason)
        try:
            self._pipe.send(message)
        except OSError as error:
            self.process.kill()  # it is dead or stuck, and the stream may be torn in the middle of a message
            raise SandboxError(f"the computing process takes no messages: {self.reason or error}") from None

    def _run(self) -> None:
        """Starts the child and reads from it until it ends.

        The child is started on this thread because PR_SET_PDEATHSIG follows the thread, not the process, that started
        it.
        """
        try:
            self.process = self._spawn()
        except OSError as error:
            self.reason = f"the computing process could not be started: {error}"
            self._close()
            self._started.put(error)
            return
        finally:
            self._theirs.close()
        listener = threading.Thread(target=self._read_stderr, name="sandbox-stderr", daemon=True)
        listener.start()
        self._started.put(None)
        fault = ""
        try:
            while (message := self._pipe.receive()) is not None:
                self._dispatch(message)
        except ProtocolError as error:
            fault = f"; it broke the protocol: {error}"
            self.process.kill()
        self._end(listener, fault)

    def _spawn(self) -> subprocess.Popen[bytes]:
        fds = [self._theirs.fileno(), self.inbound.fd, self.outbound.fd]
        with contextlib.ExitStack() as stack:
            if self._limits.file_bytes:
                fds.append(stack.enter_context(tempfile.TemporaryFile(dir=self._scratch)).fileno())
            return self._spawn_with(fds)

    def _spawn_with(self, fds: list[int]) -> subprocess.Popen[bytes]:
        setup = {
            "pipe": fds[0],
            "inbound": [fds[1], self.inbound.num_bytes],
            "outbound": [fds[2], self.outbound.num_bytes],
            "scratch": fds[3] if len(fds) > 3 else -1,
            "parent": os.getpid(),
            "limits": asdict(self._limits),
        }
        return subprocess.Popen(
            self._command,
            env={**_environment(self._limits), **self._environment, SETUP_VARIABLE: json.dumps(setup)},
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the node, which then ends its child in order
        )

    def _dispatch(self, message: Message) -> None:
        if message.type == "event":
            try:
                self._on_event(message.name, message.params)
            except Exception:
                # a fault in the node's own handler must not silence the child for good
                logger.exception("handling event %s of the computing process", message.name)
            return
        with self._lock:
            future = self._pending.pop(message.id, None)
        if future is None:
            # too late: what it answered with must not stay allocated
            offset = message.params.get("offset")
            if isinstance(offset, int):
                with contextlib.suppress(SandboxError):
                    self.send(Message("post", 0, "sent", {"offset": offset}))
            return
        with contextlib.suppress(InvalidStateError):
            if message.type == "error":
                future.set_exception(error_from(message.params))
            else:
                future.set_result(message.params)

    def _end(self, listener: threading.Thread, fault: str) -> None:
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        listener.join(STOP_TIMEOUT_S)
        lines = [] if self._stopping else list(self._stderr)[-5:]
        reason = f"the computing process {_describe(code, self._limits)}{fault}" + "".join(
            f"\n  {line}" for line in lines
        )
        with self._lock:
            self.reason = reason
            pending, self._pending = self._pending, {}
        self._close()
        for future in pending.values():
            with contextlib.suppress(InvalidStateError):
                future.set_exception(SandboxError(reason))
        if not self._stopping:
            self._on_exit(reason)

    def _close(self) -> None:
        self._pipe.close()
        self.inbound.close()
        self.outbound.close()

    def _read_stderr(self) -> None:
        stream = self.process.stderr
        if stream is None:
            return
        with stream:
            for line in iter(lambda: stream.readline(MAX_LINE_CHARS), b""):
                text = line.decode("utf-8", "replace").rstrip()
                if text:
                    self._stderr.append(text)
                    logger.debug("computing process: %s", text)


def error_from(params: dict[str, Any]) -> SmartnodesError:
    """The child's error as our class of that code; SandboxError where we have none."""
    code, message = str(params.get("code", "")), str(params.get("message", ""))[:4096]
    waiting: list[type[SmartnodesError]] = [SmartnodesError]
    while waiting:
        found = waiting.pop()
        if found.__dict__.get("code") == code:
            return found(message)
        waiting.extend(found.__subclasses__())
    return SandboxError(f"{code}: {message}")


def _environment(limits: Limits) -> dict[str, str]:
    threads = str(limits.num_threads)
    passed = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith(_PASSED_PREFIXES)}
    return {
        **passed,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # threads that spin while they wait can make two processes on one machine several times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }


def _describe(code: int, limits: Limits) -> str:
    if code == -signal.SIGALRM:
        return f"took longer than {limits.action_s:g} s for one action and was ended"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
