"""Checks a node's arguments against the schema of its op, before anything is called.

What a schema cannot know (shapes, what a value turns out to be) is found when `limits.py` runs the graph without data.
Neighbours: `values.py` (what an argument is), `ops.py` (what may be called), `interpreter.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from tensorlink.errors import ProgramError
from tensorlink.program.graph import Node
from tensorlink.program.ops import ALLOWED, COND, PSEUDO, SYMBOLIC
from tensorlink.program.values import (
    DTYPES,
    LAYOUTS,
    MEMORY_FORMATS,
    Arg,
    Buffer,
    Device,
    DType,
    Layout,
    MemoryFormat,
    Parameter,
    Value,
)

MAX_RANK = 32
MAX_LIST = 4096


def _is_tensor(arg: Arg) -> bool:
    """A reference, or a number: torch takes numbers for the tensors of its arithmetic, as in `x + 1`."""
    return isinstance(arg, Value | Parameter | Buffer | bool | int | float)


def _is_int(arg: Arg) -> bool:
    return isinstance(arg, Value) or (isinstance(arg, int) and not isinstance(arg, bool))


def _is_number(arg: Arg) -> bool:
    return isinstance(arg, Value | bool | int | float)


_SCALAR_CHECKS: dict[str, Callable[[Arg], bool]] = {
    "Tensor": _is_tensor,
    "int": _is_int,
    "SymInt": _is_int,
    "float": lambda arg: isinstance(arg, Value | float) or _is_int(arg),
    "number": _is_number,
    "number_or_Tensor": _is_tensor,
    "bool": lambda arg: isinstance(arg, bool),
    "str": lambda arg: isinstance(arg, str),
    "ScalarType": lambda arg: isinstance(arg, DType),
    "Layout": lambda arg: isinstance(arg, Layout),
    "MemoryFormat": lambda arg: isinstance(arg, MemoryFormat),
    "Device": lambda arg: isinstance(arg, Device),
}


def _matches(arg: Arg, kind: str) -> bool:
    if kind.startswith("Optional[") and kind.endswith("]"):
        return arg is None or _matches(arg, kind[len("Optional[") : -1])
    if kind.startswith("List[") and kind.endswith("]"):
        inner = kind[len("List[") : -1]
        if isinstance(arg, Value):  # the list of results of an earlier op, such as chunk
            return inner == "Tensor"
        if inner in ("int", "SymInt") and _is_int(arg):  # schemas such as int[2] take one number for all
            return True
        return isinstance(arg, tuple) and len(arg) <= MAX_LIST and all(_matches(item, inner) for item in arg)
    check = _SCALAR_CHECKS.get(kind)
    return check is not None and check(arg)


def check(node: Node) -> None:
    """Raises ProgramError, naming the node and argument, unless the call fits the op's schema."""
    if node.op in PSEUDO:
        _check_pseudo(node)
        return
    op = ALLOWED.get(node.op)
    if op is None:
        raise ProgramError(f"{node}: the op is not on the allowlist")
    given = _assign(node, op)
    for argument in op._schema.arguments:
        kind = str(argument.real_type)
        if argument.name not in given:
            if not argument.has_default_value():
                raise ProgramError(f"{node}: argument {argument.name!r} ({kind}) is missing")
            continue
        arg = given[argument.name]
        if not _matches(arg, kind):
            raise ProgramError(f"{node}: argument {argument.name!r} is to be {kind}, found {str(arg)[:80]}")
    _check_flags(node, given)


def _assign(node: Node, op: OpOverload) -> dict[str, Arg]:
    positional = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    if len(node.args) > len(positional):
        raise ProgramError(f"{node}: {len(node.args)} positional arguments, the op takes {len(positional)}")
    given = dict(zip(positional, node.args, strict=False))
    known = {argument.name for argument in op._schema.arguments}
    for name, arg in node.kwargs:
        if name in given or name not in known:
            raise ProgramError(f"{node}: argument {name!r:.60} is {'given twice' if name in given else 'unknown'}")
        given[name] = arg
    return given


def _check_flags(node: Node, given: dict[str, Arg]) -> None:
    if given.get("pin_memory"):
        raise ProgramError(f"{node}: pinned memory is not a program's to ask for")
    if given.get("sparse") or given.get("sparse_grad"):
        raise ProgramError(f"{node}: sparse gradients are not supported; leave them off")
    size = given.get("size")
    if isinstance(size, tuple) and len(size) > MAX_RANK:
        raise ProgramError(f"{node}: a tensor of {len(size)} dimensions, at most {MAX_RANK}")


def _check_pseudo(node: Node) -> None:
    if node.kwargs or len(node.args) != PSEUDO[node.op]:
        raise ProgramError(f"{node}: takes {PSEUDO[node.op]} positional arguments, found {len(node.args)}")
    if node.op == COND:
        valid = isinstance(node.args[0], Value | Buffer | bool) and _matches(node.args[1], "List[number_or_Tensor]")
    elif node.op in SYMBOLIC:
        valid = all(_is_number(arg) for arg in node.args)
    else:
        target, index = node.args
        valid = type(index) is int and (
            isinstance(target, Value | Parameter | Buffer) if node.op == "sym_size" else isinstance(target, Value)
        )
    if not valid:
        raise ProgramError(f"{node}: arguments {str(node.args)[:80]} do not fit")


def literal(arg: Arg, device: torch.device) -> Any:
    """The Python object that an argument without references stands for."""
    if isinstance(arg, tuple):
        return [literal(item, device) for item in arg]
    if isinstance(arg, DType):
        return DTYPES[arg.name]
    if isinstance(arg, MemoryFormat):
        return MEMORY_FORMATS[arg.name]
    if isinstance(arg, Layout):
        return LAYOUTS[arg.name]
    if isinstance(arg, Device):
        return device
    return arg


def is_static(arg: Arg) -> bool:
    """Whether the argument holds no reference to a value, parameter or buffer."""
    if isinstance(arg, tuple):
        return all(is_static(item) for item in arg)
    return not isinstance(arg, Value | Parameter | Buffer)
