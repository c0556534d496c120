"""The computing process's own end of a sandbox: gives up what it does not need, then takes messages one by one.

It holds no descriptor but its pipe, its arenas and stderr, its environment has no secrets, and it ends when the node
ends, even in the middle of a kernel. What else it gives up, system by system, is in `confinement/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from smartnodes_core.arena import Arena
from smartnodes_core.confinement import Confinement, confine, seal
from smartnodes_core.errors import LocalError, ProtocolError, SandboxError, SmartnodesError
from smartnodes_core.pipe import Message, Pipe
from smartnodes_core.sandbox import SETUP_VARIABLE, Limits

#: Words of the arenas' bookkeeping, handled as they arrive: the main thread may be waiting for exactly this space.
_SENT = "sent"
#: While actions follow each other, what is held goes out after the first that ends this long after the last time.
HOLD_S = 0.005


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message to serve. `call_id` is 0 for a post, which has no answer."""

    call_id: int
    method: str
    params: dict[str, Any]


class ChildChannel:
    """Made once, by `open`, in the child's main thread. `scratch` is the descriptor of a file of its own, of at most
    `limits.file_bytes`; -1 where it has none.
    """

    def __init__(
        self, pipe: Pipe, inbound: Arena, outbound: Arena, limits: Limits, confinement: Confinement, scratch: int = -1
    ) -> None:
        self.scratch = scratch
        self.inbound = inbound
        self.outbound = outbound
        self.limits = limits
        self.confinement = confinement
        self._pipe = pipe
        self._written_s = 0.0  # when the main thread last waited, or wrote what was held
        # both queues are reentrant: `release` runs wherever the garbage collector happens to run
        self._inbox: queue.SimpleQueue[Incoming | None] = queue.SimpleQueue()
        self._released: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="sandbox-pipe", daemon=True).start()

    @classmethod
    def open(cls) -> ChildChannel:
        """Takes over the inherited descriptors and gives up privileges.

        Raises LocalError outside a sandbox, SandboxError where the process could outlive its node.
        """
        text = os.environ.pop(SETUP_VARIABLE, "")
        if not text:
            raise LocalError("this program is started by a node's sandbox, not by hand")
        setup = json.loads(text)
        limits = Limits(**setup["limits"])
        if limits.nice:
            os.nice(limits.nice)
        try:
            confinement = confine(limits, setup["inbound"][1] + setup["outbound"][1], int(setup["parent"]))
        except OSError as error:
            raise SandboxError(f"the computing process cannot be tied to its node: {error}") from None
        end = socket.socket(fileno=int(setup["pipe"]))
        inbound = Arena.attach(setup["inbound"][0], setup["inbound"][1], "inbound")
        outbound = Arena.attach(setup["outbound"][0], setup["outbound"][1], "outbound")
        scratch = int(setup["scratch"])
        for fd in (end.fileno(), inbound.fd, outbound.fd, *([scratch] if scratch >= 0 else [])):
            os.set_inheritable(fd, False)
        return cls(Pipe(end), inbound, outbound, limits, confinement, scratch)

    def seal(self) -> None:
        """Ends what only a rig of several devices may do: its ranks have connected to each other."""
        seal(self.limits, self.confinement)

    def receive(self, timeout_s: float | None = None) -> Incoming | None:
        """The next message, or None when none came in `timeout_s` (0: at once, None: for ever) or slices were
        released.

        What `event` held goes out before this waits, and where nothing has for HOLD_S."""
        self.flush()
        with contextlib.suppress(queue.Empty):
            return self._inbox.get_nowait()
        if timeout_s != 0 or time.monotonic() - self._written_s > HOLD_S:
            self._write_held()
        if timeout_s == 0:
            return None
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            message = None
        self._written_s = time.monotonic()
        self.flush()
        return message

    @contextlib.contextmanager
    def deadline(self) -> Iterator[None]:
        """One action: should it take longer than `limits.action_s`, the kernel ends this process.

        A timer of the system's, not a thread: whatever computes may hold the interpreter's lock.
        """
        if not self.limits.action_s:
            yield
            return
        signal.setitimer(signal.ITIMER_REAL, self.limits.action_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def wake(self) -> None:
        """Makes a waiting `receive` return, from any thread."""
        self._inbox.put(None)

    def reply(self, call_id: int, result: dict[str, Any]) -> None:
        """Answers a call; nothing to do for a post."""
        if call_id:
            self._send(Message("result", call_id, "", result))

    def fail(self, call_id: int, error: SmartnodesError) -> None:
        """Answers a call with an error, which arrives as the class of its code."""
        if call_id:
            self._send(Message("error", call_id, "", {"code": error.code, "message": str(error)[:4096]}))

    def event(self, name: str, params: dict[str, Any], *, hold: bool = False) -> None:
        """Tells the node something, unasked; with `hold` not before something else goes out, or `receive` waits.

        A node that is woken while this process computes on may have to wait for its processor.
        """
        self._send(Message("event", 0, name, params), hold=hold)

    def release(self, offset: int) -> None:
        """Says that the inbound slice at `offset` is no longer read. Safe in finalizers: it takes no lock."""
        self._released.put(offset)
        self._inbox.put(None)

    def flush(self) -> None:
        """Tells the node which slices were released."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._send(Message("event", 0, "released", {"offset": self._released.get_nowait()}), hold=True)

    def _send(self, message: Message, *, hold: bool = False) -> None:
        try:
            self._pipe.send(message, hold=hold)
        except OSError:
            os._exit(0)  # the node is gone: nobody is left to compute for

    def _write_held(self) -> None:
        try:
            self._pipe.flush()
        except OSError:
            os._exit(0)
        self._written_s = time.monotonic()

    def _read(self) -> None:
        try:
            while (message := self._pipe.receive()) is not None:
                if message.name == _SENT:
                    self.outbound.free(int(message.params["offset"]))
                else:
                    self._inbox.put(Incoming(message.id, message.name, message.params))
        except (ProtocolError, KeyError, ValueError) as error:
            sys.stderr.write(f"the pipe from the node is broken: {error}\n")
            os._exit(1)
        os._exit(0)  # not sys.exit: this thread has to end a main thread that may be deep in a kernel
