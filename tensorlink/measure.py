"""What this machine can compute: measured in a fraction of a second, announced by its node."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from tensorlink.footprint import RUNTIME_BYTES

_SIZE = 512
_MEASURE_S = 0.2


def flops_per_s(device: torch.device | None = None) -> int:
    """Floating-point operations per second of a float32 matrix product, on the CPU with the threads torch uses now.

    That of the quickest of many: what other programs took meanwhile says nothing of the machine.
    """
    a = torch.rand(_SIZE, _SIZE, device=device)
    wait = torch.cuda.synchronize if a.is_cuda else _nothing
    torch.mm(a, a)  # the first call starts threads and picks kernels
    wait()
    began, quickest_s = time.perf_counter(), float("inf")
    while (started := time.perf_counter()) - began < _MEASURE_S:
        torch.mm(a, a)
        wait()
        quickest_s = min(quickest_s, time.perf_counter() - started)
    return int(2 * _SIZE**3 / quickest_s)


def _nothing() -> None:
    """A CPU is done when the call returns."""


def memory_bytes(limit_bytes: int) -> int:
    """Memory that a job may use: what is left under the limit that this process runs under, or half of what the
    machine has available.
    """
    if limit_bytes:
        return max(0, limit_bytes - RUNTIME_BYTES)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def numeric_class() -> str:
    """What decides the last bits: torch's build, the instruction set its kernels use, the number of threads."""
    isa = torch.backends.cpu.get_cpu_capability()
    onednn = "onednn" if torch.backends.mkldnn.is_available() else "plain"
    return f"torch {torch.__version__} cpu {isa} {onednn} threads {torch.get_num_threads()}"
