"""Tensors that arrived for a stage and wait for their turn, each counted once.

A tensor may come before its call was announced, twice, or late. Identity decides: a duplicate with the same content
is ignored, one with other content is the sender's fault.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import Future
from typing import NamedTuple

from torch import Tensor

from smartnodes_core.errors import BusyError
from tensorlink.errors import TensorError
from tensorlink.steplog.digests import digest, tensor_view

#: More waiting tensors than any schedule needs: a sender that does not keep to one.
MAX_WAITING = 1 << 16


class Delivery(NamedTuple):
    """All tensors of one kind for one micro-batch; `slot` tells them apart. `type` as in `TensorId`."""

    step: int
    call: int
    micro_batch: int
    type: str
    backward_pass: int


class Inbox:
    """Arrived tensors by delivery and slot."""

    def __init__(self) -> None:
        self._waiting: dict[Delivery, dict[int, Tensor]] = {}
        self._taken: dict[Delivery, Future[dict[str, dict[str, bytes]]] | None] = {}
        self._groups: dict[Delivery, str] = {}
        self._num_waiting = 0

    def put(self, delivery: Delivery, slot: int, tensor: Tensor) -> bool:
        """Stores a tensor; False for a duplicate. Raises TensorError for a duplicate that differs, BusyError when
        full."""
        if delivery in self._taken:
            self._check_taken(delivery, slot, tensor)
            return False
        slots = self._waiting.setdefault(delivery, {})
        if slot in slots:
            if not _same(slots[slot], tensor):
                raise TensorError(f"{_describe(delivery, slot)} came twice with different content")
            return False
        if self._num_waiting >= MAX_WAITING:
            raise BusyError(f"{self._num_waiting} tensors wait at this stage: the sender keeps to no schedule")
        slots[slot] = tensor
        self._num_waiting += 1
        return True

    def has(self, delivery: Delivery, slots: Collection[int]) -> bool:
        """Whether every one of `slots` is there."""
        return not slots or self._waiting.get(delivery, {}).keys() >= set(slots)

    def take(self, delivery: Delivery) -> dict[int, Tensor]:
        """Removes and returns what came, by slot; what comes again from now on is a duplicate."""
        found = self._waiting.pop(delivery, {})
        self._num_waiting -= len(found)
        self._taken[delivery] = None
        return found

    def remember(self, delivery: Delivery, group: str, digests: Future[dict[str, dict[str, bytes]]]) -> None:
        """`digests` will hold, under `group`, the digests of what was taken: duplicates are held against them."""
        self._taken[delivery] = digests
        self._groups[delivery] = group

    def forget(self, step: int, call: int | None = None) -> None:
        """Drops everything of a call, or of all steps up to `step` where `call` is None."""

        def gone(table: Iterable[Delivery]) -> list[Delivery]:
            return [d for d in table if (d.step <= step if call is None else (d.step, d.call) == (step, call))]

        for delivery in gone(self._waiting):
            self._num_waiting -= len(self._waiting.pop(delivery))
        for delivery in gone(self._taken):
            del self._taken[delivery]
        for delivery in gone(self._groups):
            del self._groups[delivery]

    def _check_taken(self, delivery: Delivery, slot: int, tensor: Tensor) -> None:
        digests = self._taken[delivery]
        if digests is None:
            return  # evaluation keeps no log; the result was computed from what came first
        known = digests.result().get(self._groups[delivery], {}).get(str(slot))
        if known is not None and known != digest(str(slot), tensor):
            raise TensorError(f"{_describe(delivery, slot)} came again with different content")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and tensor_view(one) == tensor_view(other)


def _describe(delivery: Delivery, slot: int) -> str:
    return (
        f"{delivery.type} {slot} of step {delivery.step}, call {delivery.call}, micro-batch {delivery.micro_batch}, "
        f"pass {delivery.backward_pass}"
    )
