"""What a node may call: the ATen allowlist, integer arithmetic on sizes, and how each is to be treated.

`ALLOWED` maps wire names to overloads; `PSEUDO` holds the few names that are not ATen ops. Resolution is a dictionary
lookup, never an attribute lookup on a name that a peer sent. Neighbours: `allowlist.py`, `dropout.py`,
`guards.py`, `arguments.py`, `interpreter.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from tensorlink.program.allowlist import ATEN
from tensorlink.program.guards import RECURRENT

_INT64 = range(-(1 << 63), 1 << 63)


class BufferWrite(NamedTuple):
    """Which positional arguments an op updates in place, and the position of the flag that says whether it does."""

    buffers: tuple[int, ...]
    flag: int


#: The reviewed exception to "nothing is written in place": running statistics. The interpreter hands these ops copies.
MUTABLE_BUFFERS: dict[str, BufferWrite] = {
    "aten.batch_norm.default": BufferWrite(buffers=(3, 4), flag=5),
    "aten.instance_norm.default": BufferWrite(buffers=(3, 4), flag=5),
}

#: Nothing but random numbers, whatever the arguments.
NOISE: dict[str, OpOverload] = {
    "aten.rand.default": torch.ops.aten.rand.default,
    "aten.randn.default": torch.ops.aten.randn.default,
    "aten.rand_like.default": torch.ops.aten.rand_like.default,
    "aten.randn_like.default": torch.ops.aten.randn_like.default,
    "aten.randint.default": torch.ops.aten.randint.default,
    "aten.randint.low": torch.ops.aten.randint.low,
    "aten.normal.float_float": torch.ops.aten.normal.float_float,
    "aten.bernoulli.default": torch.ops.aten.bernoulli.default,
    "aten.bernoulli.p": torch.ops.aten.bernoulli.p,
    "aten.exponential.default": torch.ops.aten.exponential.default,
    "aten.uniform.default": torch.ops.aten.uniform.default,
    "aten.normal_functional.default": torch.ops.aten.normal_functional.default,
}

#: Computed by `dropout.py` and `drawing.py` from a generator that the caller seeds, never from torch's own.
RANDOM: dict[str, OpOverload] = {
    "aten.dropout.default": torch.ops.aten.dropout.default,
    "aten.feature_dropout.default": torch.ops.aten.feature_dropout.default,
    "aten.alpha_dropout.default": torch.ops.aten.alpha_dropout.default,
    "aten.feature_alpha_dropout.default": torch.ops.aten.feature_alpha_dropout.default,
    "aten.rrelu.default": torch.ops.aten.rrelu.default,
    **NOISE,
}

ALLOWED: dict[str, OpOverload] = {**ATEN, **RANDOM}

#: Ops that make a tensor out of numbers alone: on the stage's device, whatever the program says or leaves out.
FACTORIES = frozenset(
    name
    for name, op in ALLOWED.items()
    if any(argument.name == "device" for argument in op._schema.arguments)
    and not any("Tensor" in str(argument.real_type) for argument in op._schema.arguments)
)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes stay 64-bit integers: repeated multiplication must not grow without bound."""

    def call(*args: Any) -> Any:
        if not all(isinstance(arg, int | float) for arg in args):
            raise TypeError(f"sizes are numbers, found {[type(arg).__name__ for arg in args]}")
        result = function(*args)
        if isinstance(result, int) and result not in _INT64:
            raise OverflowError("a size that does not fit 64 bits")
        return result

    return call


#: Arithmetic on sizes. Each takes and returns Python numbers.
SYMBOLIC: dict[str, Callable[..., Any]] = {
    "sym.add": _bounded(operator.add),
    "sym.sub": _bounded(operator.sub),
    "sym.mul": _bounded(operator.mul),
    "sym.floordiv": _bounded(operator.floordiv),
    "sym.truediv": _bounded(operator.truediv),
    "sym.mod": _bounded(operator.mod),
    "sym.neg": _bounded(operator.neg),
    "sym.eq": _bounded(operator.eq),
    "sym.ne": _bounded(operator.ne),
    "sym.lt": _bounded(operator.lt),
    "sym.le": _bounded(operator.le),
    "sym.gt": _bounded(operator.gt),
    "sym.ge": _bounded(operator.ge),
    "sym.min": _bounded(min),
    "sym.max": _bounded(max),
    "sym.int": _bounded(int),
    "sym.float": _bounded(float),
}
SYMBOLIC_ARITY: dict[str, int] = {name: 1 if name in ("sym.neg", "sym.int", "sym.float") else 2 for name in SYMBOLIC}


def size_of(tensor: torch.Tensor, dim: int) -> int:
    """The size of one dimension."""
    return tensor.shape[dim]


def item_of(values: Any, index: int) -> Any:
    """One of several results of an op."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"only lists of results are indexed, found {type(values).__name__}")
    return values[index]


#: A predicate and a list of operands; the node's branches say what is computed (`branches.py`).
COND = "cond"

#: Everything that is not an ATen op, with the number of its arguments.
PSEUDO: dict[str, int] = {"sym_size": 2, "getitem": 2, COND: 2, **SYMBOLIC_ARITY}

ATTENTION = "aten.scaled_dot_product_attention.default"


def is_random(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a call with these literal positional arguments draws random numbers.

    A recurrent layer that leaves arguments to keywords is taken to: torch's exporter never does.
    """
    if op in NOISE:
        return True
    if op == "aten.rrelu.default":
        return len(args) > 3 and args[3] is True
    if op in RANDOM:
        return len(args) > 2 and args[2] is True and args[1] != 0
    if op == ATTENTION:
        return len(args) > 4 and args[4] != 0
    return op in RECURRENT and (len(args) < 9 or (args[-4] != 0 and args[-3] is not False))
