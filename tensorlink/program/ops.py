"""What a node may call: the ATen allowlist, integer arithmetic on sizes, and how each is to be treated.

`ALLOWED` maps wire names to overloads; `PSEUDO` holds the few names that are not ATen ops. Resolution is a dictionary
lookup, never an attribute lookup on a name that a peer sent. Neighbours: `allowlist.py`, `dropout.py`,
`arguments.py`, `interpreter.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from tensorlink.program.allowlist import ATEN

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

RECURRENT = frozenset({"aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"})
MAX_PIECES = 4096
MAX_TIME_STEPS = 1 << 14


def _pieces(tensor: torch.Tensor, size: int, dim: int) -> int:
    return -(-tensor.shape[dim] // max(size, 1))


def _guard_split(tensor: torch.Tensor, size: int, dim: int = 0) -> None:
    _few_pieces(_pieces(tensor, size, dim))


def _guard_sections(tensor: torch.Tensor, sections: int | list[int], dim: int = 0) -> None:
    _few_pieces(sections if isinstance(sections, int) else len(sections))


def _guard_unbind(tensor: torch.Tensor, dim: int = 0) -> None:
    _few_pieces(tensor.shape[dim])


def _guard_steps(input: torch.Tensor, *rest: Any) -> None:
    steps = input.shape[1 if rest[-1] is True and input.dim() > 1 else 0]
    if steps > MAX_TIME_STEPS:
        raise ValueError(f"a recurrent layer over {steps} time steps: at most {MAX_TIME_STEPS}")


def _few_pieces(count: int) -> None:
    if count > MAX_PIECES:
        raise ValueError(f"{count} pieces: at most {MAX_PIECES}")


#: Ops that make a tensor of nothing: where no device is named, they are to make it on the stage's.
FACTORIES = frozenset(
    name
    for name, op in ALLOWED.items()
    if any(argument.name == "device" for argument in op._schema.arguments)
    and not any("Tensor" in str(argument.type) for argument in op._schema.arguments)
)

#: Checks of what costs time or memory even without data: lists of results, loops over time.
GUARDS: dict[str, Callable[..., None]] = {
    "aten.split.Tensor": _guard_split,
    "aten.unsafe_split.Tensor": _guard_split,
    "aten.chunk.default": _guard_sections,
    "aten.unsafe_chunk.default": _guard_sections,
    "aten.tensor_split.sections": _guard_sections,
    "aten.unbind.int": _guard_unbind,
    **dict.fromkeys(RECURRENT, _guard_steps),
}


def guarded(guard: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` after `guard` has seen its arguments."""

    def call(*args: Any) -> Any:
        guard(*args)
        return function(*args)

    return call


ATTENTION = "aten.scaled_dot_product_attention.default"


def is_random(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a call with these literal positional arguments draws random numbers."""
    if op in NOISE:
        return True
    if op == "aten.rrelu.default":
        return len(args) > 3 and args[3] is True
    if op in RANDOM:
        return len(args) > 2 and args[2] is True and args[1] != 0
    if op == ATTENTION:
        return len(args) > 4 and args[4] != 0
    return op in RECURRENT and args[-4] != 0 and args[-3] is True
