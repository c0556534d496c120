"""Freed memory stays with the process until it is given back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from tensorlink.allocator import give_back_freed_memory, keep_freed_memory
import resource, sys
import ctypes
assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 16 << 20
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
before = resident()
use()
kept = resident() - before
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
again = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
give_back_freed_memory()
print(kept >= size, again < 100, resident() - before < size // 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_used_again_without_page_faults_and_goes_back_when_asked():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["True", "True", "True"], found.stderr
