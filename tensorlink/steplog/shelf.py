"""A file for what the log keeps but seldom reads: states and tensors of committed steps, out of memory until asked for.

The node opens the file and passes its descriptor; this process only reads and writes it. Without a file, or where
everything fits into memory, nothing of this is used. A full disk is not an error: what cannot be written stays in
memory.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smartnodes_core.arena import FirstFit
from tensorlink.errors import TensorError
from tensorlink.steplog.digests import tensor_view

logger = logging.getLogger(__name__)


class Shelf:
    """Tensors in the file behind `fd`, of which `num_bytes` may be used. Thread-safe: the stages of a rig share it."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self._pieces = FirstFit(num_bytes)
        self._readers: Counter[int] = Counter()  # of a piece, by its offset
        self._unwanted: set[int] = set()  # given back while it has readers
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """What can still be put."""
        return self._pieces.free_bytes

    def put(self, tensor: Tensor) -> Shelved | None:
        """Writes a tensor; None where there is no room, of which the log is told once a time."""
        tensor = tensor.detach().contiguous()
        view = tensor_view(tensor)
        with self._lock:
            offset = self._pieces.take(len(view))
        if offset is None:
            logger.warning("the shelf is full: %d bytes stay in memory", len(view))
            return None
        try:
            self._write(offset, view)
        except OSError as error:
            self._give_back(offset)
            logger.warning("the shelf cannot be written, %d bytes stay in memory: %s", len(view), error)
            return None
        return Shelved(self, offset, tensor.dtype, tensor.shape)

    def _write(self, offset: int, view: memoryview) -> None:
        while view:
            written = os.pwrite(self._fd, view, offset)
            offset, view = offset + written, view[written:]

    def read(self, shelved: Shelved) -> Tensor:
        """The tensor again, in memory of its own. Raises TensorError where the file is shorter than it was."""
        tensor = torch.empty(shelved.shape, dtype=shelved.dtype)
        self.read_into(shelved, tensor_view(tensor))
        return tensor

    def read_into(self, shelved: Shelved, view: memoryview, skip: int = 0) -> None:
        """As `read`, as many bytes as there is room for, from the byte `skip` on."""
        offset = shelved.offset + skip
        while view:
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise TensorError(f"the shelf ends at {offset}, {len(view)} bytes before the end of a tensor")
            offset, view = offset + count, view[count:]

    def give_back(self, shelved: Shelved) -> None:
        """The tensor is not needed any more."""
        self._give_back(shelved.offset)

    def _give_back(self, offset: int) -> None:
        with self._lock:
            if self._readers[offset]:
                self._unwanted.add(offset)
            else:
                self._pieces.give_back(offset)

    def hold(self, shelved: Shelved) -> None:
        """The tensor stays as it is until `let_go`, whoever gives it back meanwhile."""
        with self._lock:
            self._readers[shelved.offset] += 1

    def let_go(self, shelved: Shelved) -> None:
        """The end of one `hold`."""
        with self._lock:
            self._readers[shelved.offset] -= 1
            if self._readers[shelved.offset]:
                return
            del self._readers[shelved.offset]
            if shelved.offset in self._unwanted:
                self._unwanted.discard(shelved.offset)
                self._pieces.give_back(shelved.offset)


@dataclass(frozen=True, eq=False)
class Shelved:
    """A tensor that lies on a shelf."""

    shelf: Shelf
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """As of a tensor."""
        return self.shape.numel() * self.dtype.itemsize


def onto(shelf: Shelf) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts tensors on the shelf, each once however often it stands in a record; what finds no room stays."""
    known: dict[int, Any] = {}

    def put(tensors: dict[str, Any]) -> dict[str, Any]:
        for tensor in tensors.values():
            if id(tensor) not in known:
                known[id(tensor)] = tensor if isinstance(tensor, Shelved) else shelf.put(tensor) or tensor
        return {name: known[id(tensor)] for name, tensor in tensors.items()}

    return put


def given_back() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Gives the shelf's room back, once for each tensor however often it stands in a record."""
    dropped: set[int] = set()

    def give_back(tensors: dict[str, Any]) -> dict[str, Any]:
        for kept in tensors.values():
            if isinstance(kept, Shelved) and id(kept) not in dropped:
                dropped.add(id(kept))
                kept.shelf.give_back(kept)
        return {}

    return give_back


def from_shelf(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors again, those on a shelf in memory of their own."""
    return {name: kept.shelf.read(kept) if isinstance(kept, Shelved) else kept for name, kept in tensors.items()}
