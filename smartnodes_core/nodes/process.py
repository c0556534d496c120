"""One node's process on this machine: started, watched until it is ready, ended; and what the system says of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from smartnodes_core.errors import LocalError


class NodeProcess:
    """One node: its log goes to a file, its first line on standard output says that it is ready."""

    def __init__(self, name: str, command: Sequence[str], log: Path):
        self.name, self.log = name, log
        self.endpoint = ""
        with open(log, "ab") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches the starter, which then ends its children in order
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self, timeout_s: float) -> str:
        """The endpoint, once the node listens. Raises LocalError with the end of its log."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            line = ""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)  # its output ends a moment before it does
            code = self.process.poll()
            what = f"was not ready within {timeout_s:.0f} s" if code is None else f"ended with code {code}"
            raise LocalError(f"{self.name} {what}; the end of its log:\n{_tail(self.log)}")
        self.endpoint = str(json.loads(line)["endpoint"])
        return self.endpoint

    def terminate(self) -> None:
        """Ask it to end in order."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def finish(self, timeout_s: float) -> None:
        """Wait for the end, kill at the deadline."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """End it at once. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        stdout = self.process.stdout
        if stdout is not None:
            with contextlib.suppress(ValueError, OSError):
                self._lines.put(stdout.readline().decode(errors="replace").strip())


def _tail(path: Path, num_lines: int = 15) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
    except OSError as error:
        return f"(no log: {error})"


def resident_bytes(pid: int) -> int:
    """Resident memory, 0 where the system does not say (it is Linux that does)."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found
