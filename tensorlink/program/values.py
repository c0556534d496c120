"""What an argument of a node may be, and the closed tables of names that it may use.

A graph never holds an expression, a class or a callable: an argument is plain data, a reference, or one of the names
below. Neighbours: `graph.py` holds nodes made of these, `encode.py` writes them as JSON, `arguments.py` checks them
against an op's schema.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Value:
    """The result of an earlier node, or an input of the graph, by its id."""

    id: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the stage, by its canonical name in the wrapped module's state_dict."""

    name: str


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer or constant of the stage, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype by torch's name without the prefix, such as "float32"; always a key of DTYPES."""

    name: str


@dataclass(frozen=True, slots=True)
class MemoryFormat:
    """A memory format, always a key of MEMORY_FORMATS."""

    name: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor layout; only strided tensors are computed with."""

    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """The device on which the stage runs, whichever that is: a program never names one."""


Arg = (
    None
    | bool
    | int
    | float
    | str
    | Value
    | Parameter
    | Buffer
    | DType
    | MemoryFormat
    | Layout
    | Device
    | tuple["Arg", ...]
)

DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

#: What autocast can compute in.
AUTOCAST_DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

MEMORY_FORMATS: dict[str, torch.memory_format] = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
MEMORY_FORMAT_NAMES: dict[torch.memory_format, str] = {fmt: name for name, fmt in MEMORY_FORMATS.items()}

LAYOUTS: dict[str, torch.layout] = {"strided": torch.strided}


def references(arg: Arg) -> list[Value]:
    """Every `Value` inside `arg`, in order."""
    if isinstance(arg, Value):
        return [arg]
    if isinstance(arg, tuple):
        return [value for item in arg for value in references(item)]
    return []


def state_names(arg: Arg, kind: type[Parameter] | type[Buffer]) -> list[str]:
    """Names of every parameter (or buffer) inside `arg`, in order."""
    if isinstance(arg, Parameter | Buffer):
        return [arg.name] if isinstance(arg, kind) else []
    if isinstance(arg, tuple):
        return [name for item in arg for name in state_names(item, kind)]
    return []
