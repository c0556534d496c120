"""Freed memory stays with the process until it is given back, and fits what comes next."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from tensorlink import allocator
from tensorlink.allocator import environment

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
for _ in range(4):
    use()
kept = resident() - before
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
again = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
give_back_freed_memory()
print(kept >= size * 9 // 10, again < 100, resident() - before < size // 2)
"""


CONFINED = """
import os
from smartnodes_core.confinement import confine; from smartnodes_core.sandbox import Limits
import tensorlink.allocator
confine(Limits(), 0, os.getppid())
"""


#: Every other of many aligned blocks is freed and asked for again, with small ones in between as autograd's are: in MB,
#: what is then held beyond the blocks themselves.
HOLES = """
from tensorlink.allocator import keep_freed_memory
import ctypes, resource
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
size, count = 1 << 20, 96
def block():
    found = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(found), 64, size) == 0
    ctypes.memset(found, 1, size)
    small = [libc.malloc(40 + 16 * i) for i in range(4)]
    return found.value
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
blocks = [block() for _ in range(count)]
for _ in range(4):
    for i in range(0, count, 2):
        libc.free(blocks[i])
    for i in range(0, count, 2):
        blocks[i] = block()
print((resident() - before) / (1 << 20) - count)
"""


def run(program, environment):
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return found.stdout, found.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
@pytest.mark.parametrize("before", ["", CONFINED], ids=["free", "confined"])
@pytest.mark.parametrize("environment", [{}, environment()], ids=["glibc", "as started"])
def test_freed_memory_is_used_again_without_page_faults_and_goes_back_when_asked(before, environment):
    out, error = run(before + PROGRAM, environment)
    assert out.split() == ["True", "True", "True"], error


@pytest.mark.skipif("LD_PRELOAD" not in environment(), reason="oneTBB's allocator is not installed")
def test_a_hole_between_tensors_takes_another_of_its_size():
    out, error = run(HOLES, environment())
    assert float(out) < 12, error


def test_without_the_package_a_process_starts_with_the_allocator_of_its_system(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    allocator._libraries.cache_clear()
    try:
        assert "LD_PRELOAD" not in allocator.environment()
    finally:
        allocator._libraries.cache_clear()
