"""Shared memory between a node and the process that computes for it.

An `Arena` is one mapping that both processes see; exactly one side, its owner, allocates and frees. What lies in a
slice is never copied through the pipe: a message names its offset. Neighbour: `sandbox.py`, which creates a pair of
arenas (inbound, outbound), passes them to the child as inherited file descriptors, and carries the words `released`
and `sent` back.

Memory is taken only where it is written: a large nominal size costs address space, not memory.
"""

from __future__ import annotations

import bisect
import mmap
import os
import tempfile
import threading
from dataclasses import dataclass
from time import monotonic

from smartnodes_core.errors import BusyError, ProtocolError

ALIGNMENT_BYTES = 64

#: Freed slices of at least this size give their pages back to the system; smaller ones are soon written again.
TRIM_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of an arena: `view` is writable memory of exactly the size asked for, at a 64-byte aligned `offset`."""

    offset: int
    view: memoryview


class FirstFit:
    """Pure bookkeeping of offsets: lowest free space first, neighbours that become free are joined."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)] if self.num_bytes else []
        self._taken: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes not taken, in however many pieces."""
        return sum(size for _, size in self._free)

    @property
    def largest_free_bytes(self) -> int:
        """The largest request that would be granted now."""
        return max((size for _, size in self._free), default=0)

    def take(self, num_bytes: int) -> int | None:
        """The offset of a free piece of `num_bytes` (rounded up to the alignment), or None. An empty request takes
        one unit, so that every slice in use has an offset of its own."""
        needed = max(1, -(-num_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
        for index, (offset, size) in enumerate(self._free):
            if size >= needed:
                if size == needed:
                    del self._free[index]
                else:
                    self._free[index] = (offset + needed, size - needed)
                self._taken[offset] = needed
                return offset
        return None

    def give_back(self, offset: int) -> int:
        """Frees the piece taken at `offset`; its size. Raises KeyError where none was."""
        size = self._taken.pop(offset)
        index = bisect.bisect_left(self._free, (offset, 0))
        start, end = offset, offset + size
        if index < len(self._free) and self._free[index][0] == end:
            end += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end - start))
        return size


class Arena:
    """One shared mapping. Make it with `create` in the parent and `attach` in the child; only the owner allocates."""

    def __init__(self, fd: int, num_bytes: int, name: str) -> None:
        self.fd = fd
        self.num_bytes = num_bytes
        self.name = name
        self._memory = mmap.mmap(fd, num_bytes)
        self._view = memoryview(self._memory)
        self._changed = threading.Condition()
        self._pieces = FirstFit(num_bytes)
        self._closed = False

    @classmethod
    def create(cls, num_bytes: int, name: str) -> Arena:
        """A fresh arena of `num_bytes` (at least one page), zeroed. `name` is how messages call the setting of its
        size."""
        num_bytes = max(mmap.PAGESIZE, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        return cls(_anonymous_file(num_bytes), num_bytes, name)

    @classmethod
    def attach(cls, fd: int, num_bytes: int, name: str) -> Arena:
        """The other process's view of the arena behind an inherited descriptor."""
        return cls(fd, num_bytes, name)

    def __repr__(self) -> str:
        return f"<Arena {self.name}: {self._pieces.free_bytes} of {self.num_bytes} bytes free>"

    def allocate(self, num_bytes: int, timeout_s: float) -> Slice:
        """A free slice, waiting up to `timeout_s` for the other side to give some back.

        Raises BusyError with the bytes needed and free; at once where the request could never fit.
        """
        deadline_s = monotonic() + timeout_s
        with self._changed:
            while True:
                offset = self._pieces.take(num_bytes) if not self._closed else None
                if offset is not None:
                    return Slice(offset, self._view[offset : offset + num_bytes])
                left_s = deadline_s - monotonic()
                if self._closed or num_bytes > self._pieces.num_bytes or left_s <= 0:
                    raise BusyError(
                        f"{num_bytes} bytes needed in the {self.name} arena, {self._pieces.largest_free_bytes} in one "
                        f"piece and {self._pieces.free_bytes} of {self.num_bytes} bytes free after waiting "
                        f"{timeout_s:.3g} s: raise {self.name}_bytes, or keep fewer micro-batches in flight"
                    )
                self._changed.wait(left_s)

    def free(self, offset: int) -> None:
        """Gives the slice at `offset` back. Raises ProtocolError where no slice begins there: it may have been freed
        twice."""
        with self._changed:
            try:
                size = self._pieces.give_back(offset)
            except KeyError:
                raise ProtocolError(f"no slice of the {self.name} arena begins at {offset}") from None
            if size >= TRIM_BYTES and hasattr(mmap, "MADV_REMOVE"):
                start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
                self._memory.madvise(mmap.MADV_REMOVE, start, end - start)
            self._changed.notify_all()

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """The memory that the other side named. Raises ProtocolError unless it lies inside and is aligned."""
        if offset < 0 or num_bytes < 0 or offset % ALIGNMENT_BYTES or offset + num_bytes > self.num_bytes:
            raise ProtocolError(
                f"{num_bytes} bytes at {offset} do not lie aligned in the {self.name} arena of {self.num_bytes}"
            )
        return self._view[offset : offset + num_bytes]

    def close(self) -> None:
        """Ends all waiting and lets go of the memory once the last view of it is gone."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        os.close(self.fd)


def _anonymous_file(num_bytes: int) -> int:
    """A descriptor of zeroed shared memory that no path names."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        _seal_size(fd)
        return fd
    with tempfile.TemporaryFile() as file:
        file.truncate(num_bytes)
        return os.dup(file.fileno())


def _seal_size(fd: int) -> None:
    """Fixes the size: a child that shrank the file would end the parent with SIGBUS at its next access."""
    import fcntl  # not on every platform, as memfd_create is not

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
