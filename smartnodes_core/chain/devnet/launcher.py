"""Starts a devnet as a process of its own and ends it; the process also ends by itself when its starter dies."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from smartnodes_core.errors import ChainError, LocalError, PortInUseError

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0


class DevnetProcess:
    """A running devnet: `url` is where it listens. A context manager; `stop` is safe to call twice.

    Raises PortInUseError, or ChainError with what the process wrote, where it does not come up before the deadline.
    """

    def __init__(
        self,
        port: int = 0,
        journal: Path | None = None,
        deadline_s: float = START_DEADLINE_S,
        checkpoint_entries: int | None = None,
    ):
        command = [sys.executable, "-m", "smartnodes_core.chain.devnet", "--port", str(port), "--exit-with-parent"]
        if journal is not None:
            command += ["--journal", str(journal)]
        if checkpoint_entries is not None:
            command += ["--checkpoint-entries", str(checkpoint_entries)]
        reader, writer = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*command, "--ready-fd", str(writer)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(writer,),
                # Ctrl-C reaches the starter, which then ends its children in order.
                start_new_session=True,
            )
        finally:
            os.close(writer)
        with os.fdopen(reader) as pipe:
            ready, _, _ = select.select([pipe], [], [], deadline_s)
            self.url = pipe.readline().strip() if ready else ""
        if not self.url:
            raise self._failure(deadline_s)

    def stop(self) -> None:
        """Ends the process: politely, then not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> DevnetProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _failure(self, deadline_s: float) -> LocalError:
        deadline = time.monotonic() + 1.0
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = self.process.poll()
        if ended is None:
            self.process.kill()
            self.process.wait()
        said = self.process.stderr.read().decode(errors="replace").strip() if self.process.stderr else ""
        self.stop()
        if "port" in said and ("is in use" in said or "may not be opened" in said):
            return PortInUseError(said.removeprefix("devnet: "))
        what = f"ended with code {ended}" if ended is not None else f"was not ready within {deadline_s:g} s"
        return ChainError(f"the devnet {what}: {said or 'it said nothing'}")
