"""Buffers that are in no weights file, of a module built on the meta device: computed by the model's own initialiser.

Llama's `inv_freq` is a buffer of this kind: its constructor computes it, and on the meta device that leaves no values.
A constructor cannot be run again, for nobody knows its arguments; but models of transformers compute such buffers in
`_init_weights` too, which transformers itself calls for them when it loads a model. That also draws random numbers and
may leave a buffer alone, so it is called twice, from other values and another seed: what comes out equal is a result.
Of other libraries nothing is believed.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def initialised(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The values of those of the meta buffers `names` that a transformers model in the module computes.

    The module is not changed: the initialiser works on a copy of the submodule, whose parameters have no storage.
    """
    found: dict[str, Tensor] = {}
    for prefix in sorted({name.rpartition(".")[0] for name in names}):
        wanted = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == prefix]
        owner, initialise = module.get_submodule(prefix), _initialiser(module, prefix)
        if initialise is None:
            continue
        one, other = (_run(initialise, owner, wanted, start) for start in (0, 1))
        for name in one.keys() & other.keys():
            if _form(one[name]) == _form(owner._buffers[name]) and torch.equal(one[name], other[name]):
                found[f"{prefix}.{name}" if prefix else name] = one[name]
    return found


def _initialiser(module: nn.Module, prefix: str) -> Callable[[nn.Module], Any] | None:
    """`_init_weights` of the innermost transformers model that holds the submodule."""
    library = sys.modules.get("transformers.modeling_utils")  # where it is not loaded, no module is of it
    path = prefix.split(".") if prefix else []
    for length in range(len(path), -1, -1):
        holder = module.get_submodule(".".join(path[:length]))
        if library is not None and isinstance(holder, library.PreTrainedModel):
            found: Callable[[nn.Module], Any] = holder._init_weights
            return found
    return None


def _run(
    initialise: Callable[[nn.Module], Any], owner: nn.Module, wanted: Sequence[str], start: int
) -> dict[str, Tensor]:
    """The wanted buffers after the initialiser, which began from `start` in every element; none if it raises."""
    stand_ins: dict[int, Any] = {}
    for parameter in owner.parameters():
        empty = torch.empty_like(parameter, device="meta")
        stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for name, buffer in owner.named_buffers():
        stand_ins[id(buffer)] = (
            torch.full(buffer.shape, start, dtype=buffer.dtype) if name in wanted else buffer.clone()
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(start)
        try:
            made = copy.deepcopy(owner, stand_ins)
            initialise(made)
        except Exception:  # the user's code, on a module without storage
            logger.info("%s._init_weights gives no values", type(owner).__name__, exc_info=True)
            return {}
    buffers = {name: made._buffers[name] for name in wanted}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None and not buffer.is_meta}


def _form(tensor: Tensor | None) -> object:
    return None if tensor is None else (tensor.dtype, tensor.shape)
