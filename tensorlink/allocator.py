"""The computing process's memory allocator: what is freed is kept for the next micro-batch, not given back at once.

A training step allocates and frees the same sizes over and over. By default glibc returns large blocks to the kernel
and faults them in again, zeroed, which costs about 5 % of a step of the yardstick.
"""

from __future__ import annotations

import ctypes
import sys

# from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
#: The largest that glibc takes; larger blocks are mapped and returned one by one.
MMAP_THRESHOLD_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = (1 << 31) - 1
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Have freed memory stay with this process; True where the C library could be told so."""
    mallopt = _of_libc("mallopt")
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (_M_TOP_PAD, TOP_PAD_BYTES),
    )
    return all([mallopt(name, value) == 1 for name, value in settings])


def give_back_freed_memory() -> None:
    """Return what is free to the kernel: a stage was unloaded, and the next may be long in coming."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
