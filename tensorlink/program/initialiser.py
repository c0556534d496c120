"""Buffers that are in no weights file, of a module built on the meta device: computed by the model's own initialiser.

Llama's `inv_freq` is a buffer of this kind: its constructor computes it, and on the meta device that leaves no values.
A constructor cannot be run again, for nobody knows its arguments; but models of transformers compute such buffers in
`_init_weights` too, which transformers itself calls when it loads a model. It also draws random numbers and may leave
a buffer alone, so it is called twice, from other values and another seed: what comes out equal is a result.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def initialised(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The values of those of the meta buffers `names` that an `_init_weights` of the module computes.

    The module is not changed: the initialiser works on a copy of the submodule, whose parameters have no storage.
    """
    found: dict[str, Tensor] = {}
    for prefix in sorted({name.rpartition(".")[0] for name in names}):
        wanted = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == prefix]
        for initialise in _initialisers(module, prefix):
            results = [_run(initialise, module.get_submodule(prefix), wanted, start) for start in (0, 1)]
            for name in wanted:
                one, other = (result.get(name) for result in results)
                needed = module.get_buffer(f"{prefix}.{name}" if prefix else name)
                if one is not None and other is not None and _same(one, other) and _fits(one, needed):
                    found[f"{prefix}.{name}" if prefix else name] = one
            break
    return found


def _initialisers(module: nn.Module, prefix: str) -> Iterator[Callable[[nn.Module], Any]]:
    """`_init_weights` of the submodule itself and of those around it, the innermost first."""
    path = prefix.split(".") if prefix else []
    for length in range(len(path), -1, -1):
        initialise = getattr(module.get_submodule(".".join(path[:length])), "_init_weights", None)
        if callable(initialise):
            yield initialise


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
    return {name: made._buffers[name] for name in wanted if made._buffers[name] is not None}  # type: ignore[misc]


def _same(one: Tensor, other: Tensor) -> bool:
    return not one.is_meta and one.dtype == other.dtype and torch.equal(one, other)


def _fits(found: Tensor, needed: Tensor) -> bool:
    return (found.dtype, found.shape) == (needed.dtype, needed.shape)
