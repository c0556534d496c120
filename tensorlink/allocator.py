"""The computing process's memory allocator: what is freed is kept for the next micro-batch, and fits it.

A training step allocates and frees the same sizes over and over. By default glibc returns large blocks to the kernel
and faults them in again, zeroed, which costs about 5 % of a step of the yardstick; and it looks for 96 bytes more than
an aligned tensor takes (its bug 14581), so that a hole between two tensors in use is never used again: a stage then
takes up to twice the memory of its activations. oneTBB's allocator, which a process can be started with, does neither.
Where it is missing, glibc's is told to keep what is freed. Neighbour: `lasting.py`, on what stays.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
from pathlib import Path

# from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
#: The largest that glibc takes; larger blocks are mapped and returned one by one.
MMAP_THRESHOLD_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = (1 << 31) - 1
TOP_PAD_BYTES = 64 << 20

#: In this order: the second is linked against the first, which it would look for among the system's.
_LIBRARIES = ("libtbbmalloc.so.2", "libtbbmalloc_proxy.so.2")
#: From oneTBB's scalable_allocator.h.
_CLEAN_ALL_BUFFERS = 0


def environment() -> dict[str, str]:
    """What a computing process is started with for the sake of its allocator."""
    huge_pages = {  # 2 to 4 % of a step of the yardstick; glibc asks for them, or torch for what takes 2 MB and more
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    libraries = _libraries()
    return {**huge_pages, "LD_PRELOAD": ":".join(map(str, libraries))} if libraries else huge_pages


@functools.cache
def _libraries() -> list[Path]:
    """oneTBB's allocator and what puts it in the place of the C library's; none where the package is not installed."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = {file.name: Path(str(file.locate())).resolve() for file in files if file.name in _LIBRARIES}
    there = [found[name] for name in _LIBRARIES if name in found and found[name].is_file()]
    return there if len(there) == len(_LIBRARIES) else []


def keep_freed_memory() -> bool:
    """Have freed memory stay with this process; True where it does."""
    if _of_libc("scalable_allocation_command") is not None:
        return True  # oneTBB's keeps it by itself
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
    clean = _of_libc("scalable_allocation_command")
    trim = _of_libc("malloc_trim")
    if clean is not None:
        clean(_CLEAN_ALL_BUFFERS, None)
    elif trim is not None:
        trim(0)


def _of_libc(name: str) -> ctypes._NamedFuncPointer | None:
    """A function of the C library or of what was loaded before it."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
