"""An opening as an auditor reads it: labelled bytes back into tensors, each held against the root that was committed
to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from smartnodes_core.errors import AuditError
from smartnodes_core.records import OpeningItem
from tensorlink.program.values import DTYPES
from tensorlink.stage_papers import LOSS_PROGRAM, earlier_order
from tensorlink.steplog.digests import root


class OpenedData:
    """The tensors of an opening by label. Raises AuditError for items that do not fit the body, as do the methods."""

    def __init__(self, items: list[OpeningItem], body: memoryview, num_earlier: int = 0) -> None:
        papers = {LOSS_PROGRAM, *map(earlier_order, range(num_earlier))}  # the auditor's node has read them
        self._tensors: dict[str, Tensor] = {}
        in_order: list[Tensor] = []
        at = 0
        for item in items:
            end = at + item.num_bytes
            if end > len(body):
                raise AuditError(f"item {item.label[:80]!r} ends after the opening's {len(body)} bytes")
            if item.label in papers:
                at = end
                continue
            tensor = _tensor(item, body[at:end], in_order)
            in_order.append(tensor)
            if item.label in self._tensors:
                raise AuditError(f"item {item.label[:80]!r} was opened twice")
            self._tensors[item.label] = tensor
            at = end

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under `prefix/`, by the rest of their label."""
        start = prefix + "/"
        return {label[len(start) :]: tensor for label, tensor in self._tensors.items() if label.startswith(start)}

    def checked(self, prefix: str, roots: Mapping[str, bytes], name: str) -> dict[str, Tensor]:
        """A group whose root is the one committed to under `name`; empty where neither was opened nor committed."""
        group = self.group(prefix)
        if name not in roots:
            if group:
                raise AuditError(f"{prefix} was opened, and the commitment has no {name}")
            return {}
        if root(group) != roots[name]:
            raise AuditError(f"opened other data: {prefix} is not the {name} that was committed to")
        return group

    def get(self, label: str) -> Tensor:
        """One tensor."""
        if label not in self._tensors:
            raise AuditError(f"{label[:80]!r} was not opened")
        return self._tensors[label]


def _tensor(item: OpeningItem, data: memoryview, earlier: list[Tensor]) -> Tensor:
    try:
        meta: Any = msgspec.msgpack.decode(item.meta)
        if set(meta) == {"same_as"} and item.num_bytes == 0:
            return earlier[meta["same_as"]] if meta["same_as"] >= 0 else earlier[len(earlier)]
        dtype, shape = DTYPES[meta["dtype"]], [int(size) for size in meta["shape"]]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise AuditError(f"item {item.label[:80]!r} is malformed: {error}") from None
    if len(shape) > 32 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise AuditError(f"item {item.label[:80]!r}: {len(data)} bytes are not {meta['dtype']} {shape!r:.80}")
    tensor = torch.empty(shape, dtype=dtype)
    if len(data):
        tensor.reshape(-1).view(torch.uint8).numpy().data[:] = (
            data  # a copy, so that it starts at a multiple of 64 bytes
        )
    return tensor
