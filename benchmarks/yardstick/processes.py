"""What processes have used, by the system's own count, and processes that answer a benchmark's questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

_CPU_CLOCK = 2  # CPUCLOCK_SCHED of Linux: what the scheduler counted, all threads together, those that ended included


def cpu_s(pids: Iterable[int]) -> float:
    """User and system seconds of processes, to the nanosecond; one that has ended counts no more. Linux only."""
    total_ns = 0
    for pid in pids:
        try:
            total_ns += time.clock_gettime_ns(~pid << 3 | _CPU_CLOCK)  # as clock_getcpuclockid(3) makes it
        except OSError:
            continue
    return total_ns / 1e9


class Answering:
    """A program of one thread that answers each line of JSON on its standard input with one on its standard output."""

    def __init__(self, command: Sequence[str]):
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=pipe, stdout=pipe, text=True, env={**os.environ, **threads}
        )

    def ask(self, question: dict[str, Any]) -> None:
        """Ask, and wait for nothing."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says to the oldest question without an answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with exit status {self._process.wait()}")
        return dict(json.loads(line))

    def close(self, patience_s: float = 0.0) -> None:
        """No more questions: it has `patience_s` to end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
