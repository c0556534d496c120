"""Programs as canonical JSON.

An argument is written as itself (null, true, integer, text) or as a list that begins with a tag: `["f", "0x1.8p+1"]`
a float by `float.hex` (or "inf", "-inf", "nan"), `["l", …]` a list, `["v", 7]` a value, `["p", name]` a parameter,
`["b", name]` a buffer, `["d", "float32"]` a dtype, `["m", …]` a memory format, `["y", …]` a layout, `["c"]` the
stage's device. Neighbours: `graph.py` (the data), `decode.py` (the way back).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from tensorlink.program.graph import Graph, LossProgram, Node, StageProgram
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
from tensorlink.records import Cut

#: Tag of each kind of named argument, and the names that exist.
NAMED: dict[str, tuple[type[DType] | type[MemoryFormat] | type[Layout], Mapping[str, Any]]] = {
    "d": (DType, DTYPES),
    "m": (MemoryFormat, MEMORY_FORMATS),
    "y": (Layout, LAYOUTS),
}


def encode_stage(program: StageProgram) -> bytes:
    """Canonical bytes of a stage program."""
    return _dump(
        {
            "kind": "stage",
            "version": program.version,
            "stage_index": program.stage_index,
            "num_stages": program.num_stages,
            "train": _graph_out(program.train),
            "eval": _graph_out(program.eval),
            "parameters": {
                name: [spec.dtype, list(spec.shape), spec.requires_grad, list(spec.holders)]
                for name, spec in program.parameters.items()
            },
            "buffers": {
                name: [spec.dtype, list(spec.shape), spec.persistent, spec.constant]
                for name, spec in program.buffers.items()
            },
            "inputs": _cut_out(program.inputs),
            "outputs": _cut_out(program.outputs),
        }
    )


def encode_loss(program: LossProgram) -> bytes:
    """Canonical bytes of a loss program."""
    return _dump(
        {
            "kind": "loss",
            "version": program.version,
            "graph": _graph_out(program.graph),
            "constants": {
                name: [constant.dtype, list(constant.shape), base64.b64encode(constant.data).decode()]
                for name, constant in program.constants.items()
            },
            "inputs": _cut_out(program.inputs),
            "outputs": _cut_out(program.outputs),
            "num_outputs": program.num_outputs,
            "rows": list(program.rows),
        }
    )


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _graph_out(graph: Graph) -> dict[str, Any]:
    return {
        "inputs": list(graph.inputs),
        "nodes": [_node_out(node) for node in graph.nodes],
        "outputs": list(graph.outputs),
        "mutations": [list(pair) for pair in graph.mutations],
    }


def _node_out(node: Node) -> list[Any]:
    """[op, args, kwargs, id, grad], and an object of what most nodes have not."""
    fields = [
        node.op,
        [_arg_out(arg) for arg in node.args],
        {name: _arg_out(arg) for name, arg in node.kwargs},
        node.id,
        node.grad,
    ]
    more: dict[str, Any] = {}
    if node.autocast:
        more["autocast"] = node.autocast
    if node.branches:
        more["branches"] = [_graph_out(branch) for branch in node.branches]
    return [*fields, more] if more else fields


def _cut_out(cut: Cut) -> list[list[Any]]:
    return [[slot.name, slot.type, slot.dtype, slot.shape, slot.requires_grad] for slot in cut.slots]


def _arg_out(arg: Arg) -> Any:
    if arg is None or isinstance(arg, bool | int | str):
        return arg
    if isinstance(arg, float):
        return ["f", arg.hex() if math.isfinite(arg) else repr(arg)]
    if isinstance(arg, tuple):
        return ["l", *(_arg_out(item) for item in arg)]
    if isinstance(arg, Value):
        return ["v", arg.id]
    if isinstance(arg, Parameter | Buffer):
        return ["p" if isinstance(arg, Parameter) else "b", arg.name]
    if isinstance(arg, Device):
        return ["c"]
    tag = next(tag for tag, (kind, _) in NAMED.items() if isinstance(arg, kind))
    return [tag, arg.name]
