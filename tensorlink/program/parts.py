"""The state of a stage as numbered parts of one length: how weights cross without anybody holding all of them.

A program declares names, dtypes and shapes. Its tensors, sorted by name and laid one after the other, are one row of
bytes; part `i` is bytes `i * PART_BYTES` to `(i + 1) * PART_BYTES` of it, the last one shorter. Sender and receiver
derive the row from the program alone, so that a part needs no other label than its number. Neighbours:
`weight_sending.py` sends parts, `stage_loading.py` takes them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tensorlink.errors import TensorError
from tensorlink.lasting import lasting
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import Expected, writable_bytes
from tensorlink.records import PART_BYTES


class Piece(NamedTuple):
    """Bytes `begin` to `end` of the tensor `name`."""

    name: str
    begin: int
    end: int


class Parts:
    """Where each tensor of `expected` (names to dtype and shape) lies in the row."""

    def __init__(self, expected: Expected):
        self._names = sorted(name for name in expected if tensor_bytes_of(*expected[name]))
        self._ends: list[int] = []
        at = 0
        for name in self._names:
            at += tensor_bytes_of(*expected[name])
            self._ends.append(at)
        self.num_bytes = at

    def __len__(self) -> int:
        return -(-self.num_bytes // PART_BYTES)

    def pieces(self, part: int) -> Iterator[Piece]:
        """What a part consists of, in order; a tensor without elements is in none. Raises TensorError for a number
        that no part has."""
        if not 0 <= part < len(self):
            raise TensorError(f"part {part} of a state of {len(self)} parts of {PART_BYTES} bytes, counted from 0")
        at, end = part * PART_BYTES, min((part + 1) * PART_BYTES, self.num_bytes)
        index = bisect_right(self._ends, at)
        while at < end:
            start = self._ends[index - 1] if index else 0
            upto = min(end, self._ends[index])
            yield Piece(self._names[index], at - start, upto - start)
            at, index = upto, index + 1


def tensor_bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor of this dtype and shape."""
    return prod(shape) * DTYPES[dtype].itemsize


class Assembly:
    """Memory for the tensors that a program declares, filled by parts in any order.

    Allocated as a whole when this is made (after the program was checked against the rig's limits), contiguous and
    64-byte aligned; no part makes it grow.
    """

    def __init__(self, expected: Expected):
        self._parts = Parts(expected)
        self._tensors = lasting(
            {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, (dtype, shape) in expected.items()}
        )
        self._views = {name: writable_bytes(tensor) for name, tensor in self._tensors.items()}
        self._missing = {name: len(view) for name, view in self._views.items()}
        self._taken = bytearray(len(self._parts))

    def put(self, part: int, data: memoryview) -> dict[str, Tensor]:
        """Take a part; returns the tensors that it completed. One that came before, sent again because its answer was
        lost, changes nothing. Raises TensorError, naming the tensor, for a part that there is not, that came before
        with other content, or of another length.
        """
        pieces = list(self._parts.pieces(part))
        what = f"part {part} ({_names(pieces)})"
        needed = sum(piece.end - piece.begin for piece in pieces)
        if len(data) != needed:
            raise TensorError(f"{what} has {len(data)} bytes, needed {needed}")
        if self._taken[part]:
            if b"".join(self._views[name][begin:end] for name, begin, end in pieces) != data:
                raise TensorError(f"{what} came twice with different content")
            return {}
        self._taken[part] = True
        at, completed = 0, {}
        for name, begin, end in pieces:
            self._views[name][begin:end] = data[at : at + end - begin]
            at += end - begin
            self._missing[name] -= end - begin
            if not self._missing[name]:
                completed[name] = self._tensors[name]
        return completed

    def empty(self) -> dict[str, Tensor]:
        """The tensors without elements, which are complete from the beginning."""
        return {name: tensor for name, tensor in self._tensors.items() if not tensor.numel()}

    def finish(self) -> dict[str, Tensor]:
        """All tensors by name. Raises TensorError naming those that are not complete."""
        missing = {name: num_bytes for name, num_bytes in self._missing.items() if num_bytes}
        if missing:
            some = ", ".join(f"{num_bytes} bytes of {name!r:.80}" for name, num_bytes in sorted(missing.items())[:5])
            raise TensorError(f"{len(missing)} tensors are not complete, missing are {some}: send every part once")
        return self._tensors


def _names(pieces: list[Piece]) -> str:
    first, last = pieces[0].name, pieces[-1].name
    return f"{first!r:.80}" if first == last else f"{first!r:.80} to {last!r:.80}"
