"""Tracing models of transformers without padding as they run in eager.

In eager such a model looks whether the positions of its tokens are consecutive, and if so leaves the attention mask to
the kernel. Under a trace it may not look at values, and computes with a mask of its own, which rounds otherwise and
takes longer. Positions that follow from no input but from sizes are known all the same: they are computed here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node, map_arg
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import _disable_current_modes

_SIZE = torch.ops.aten.sym_size.int


@contextlib.contextmanager
def known_positions() -> Iterator[None]:
    """For the time of a trace transformers, where it is loaded, is told what it would find in eager."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    if masks is None or "find_packed_sequence_indices" not in vars(masks):
        yield
        return
    find = masks.find_packed_sequence_indices

    def find_known(position_ids: Tensor) -> Tensor | None:
        value = value_without_inputs(position_ids)
        if value is not None:
            with _disable_current_modes():
                if find(value) is None:
                    return None
        found: Tensor | None = find(position_ids)
        return found

    masks.find_packed_sequence_indices = find_known
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find


def value_without_inputs(tensor: Tensor) -> Tensor | None:
    """The value that a tensor of the trace has whatever the inputs hold, for the batch size of the example; None where
    it depends on an input, a parameter or a buffer."""
    mode = get_innermost_proxy_mode()
    if mode is None:
        return None
    slot: Any = get_proxy_slot(tensor, mode.tracer, None)
    if slot is None:
        return None
    values: dict[Node, Any] = {}
    with _disable_current_modes():
        return values[slot.proxy.node] if _computed(slot.proxy.node, values) else None


def _computed(node: Node, values: dict[Node, Any]) -> bool:
    """Puts the value of `node` among the known ones, if it depends on nothing but sizes."""
    if node in values:
        return True
    if node.target is _SIZE:
        values[node] = _hint(node.meta["val"])
        return True
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if not all(_computed(each, values) for each in node.all_input_nodes):
        return False
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    values[node] = target(*args, **kwargs)
    return True


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
