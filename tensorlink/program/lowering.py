"""From the graph of `torch.export` to ours: names, arguments, regions without gradients, and no assertions.

Export gives undecomposed training IR as an `fx.Graph`. Every node becomes a node of the program or disappears:
assertions, `lift_fresh_copy` and whatever nobody reads; in-place writes become values (`mutation.py`). Neighbours:
`capture.py` (calls export), `trace.py` (joins the two modes), `values.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tensorlink.errors import TraceError
from tensorlink.program import autocast
from tensorlink.program.capture import NO_DATA, PREFIX, Captured
from tensorlink.program.graph import Graph, Node
from tensorlink.program.mutation import Mutations
from tensorlink.program.ops import ALLOWED, COND, MUTABLE_BUFFERS
from tensorlink.program.sources import line_of, module_of
from tensorlink.program.state import ModuleState
from tensorlink.program.values import (
    DTYPE_NAMES,
    MEMORY_FORMAT_NAMES,
    Arg,
    Buffer,
    Device,
    DType,
    Layout,
    MemoryFormat,
    Parameter,
    Value,
)

_SYMBOLIC: dict[Any, str] = {
    operator.add: "sym.add",
    operator.sub: "sym.sub",
    operator.mul: "sym.mul",
    operator.floordiv: "sym.floordiv",
    operator.truediv: "sym.truediv",
    operator.mod: "sym.mod",
    operator.neg: "sym.neg",
    operator.eq: "sym.eq",
    operator.ne: "sym.ne",
    operator.lt: "sym.lt",
    operator.le: "sym.le",
    operator.gt: "sym.gt",
    operator.ge: "sym.ge",
    torch.sym_min: "sym.min",
    torch.sym_max: "sym.max",
    torch.sym_int: "sym.int",
    torch.sym_float: "sym.float",
}
_ASSERTIONS = ("aten._assert", "aten.sym_constrain_range", "aten._functional_assert")
#: Whoever asks for memory that holds anything gets zeros.
_UNINITIALISED = {
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
}
_FRESH = frozenset({"aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.lift.default"})


@dataclass(frozen=True)
class ValueInfo:
    """What the trace knows of a value; stays with the user, for the cuts and their messages.

    `shape` has -1 where a size depends on the batch; `batch_dims` are the dimensions that are the batch itself.
    `permutation` orders the dimensions from outermost to innermost in memory, None where the tensor does not fill its
    memory without gaps.
    """

    type: str
    dtype: str
    shape: tuple[int, ...] = ()
    batch_dims: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None
    is_batch: bool = False
    module: str = ""
    line: str = ""


@dataclass
class Lowered:
    """One mode's graph with what is known of its values."""

    graph: Graph
    info: dict[int, ValueInfo]


@dataclass
class Lowering:
    """Walks an exported graph once. `names` maps placeholder names to the arguments they stand for; `autocast` is the
    dtype of the autocast around the whole graph, "" for none."""

    root: fx.GraphModule
    names: Mapping[str, Arg]
    next_id: int
    autocast: str = ""
    nodes: list[Node] = field(default_factory=list)
    info: dict[int, ValueInfo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grad = True
        self.region = self.autocast
        self.where: fx.Node | None = None
        self.mutations = Mutations(self._emit)

    def run(self) -> list[Arg]:
        """Lowers the whole graph; returns what it outputs."""
        return self._graph(self.root, [self.names[node.name] for node in self.root.graph.find_nodes(op="placeholder")])

    # -- graphs and nodes ------------------------------------------------------------------------------------------

    def _graph(self, module: fx.GraphModule, inputs: list[Arg]) -> list[Arg]:
        env: dict[fx.Node, Any] = {}
        remaining = iter(inputs)
        for node in module.graph.nodes:
            self.where = node
            if node.op == "placeholder":
                env[node] = next(remaining)
            elif node.op == "get_attr":
                env[node] = self._attribute(module, node)
            elif node.op == "output":
                outputs = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                return [self._arg(item, env) for item in outputs]
            else:
                env[node] = self._call(node, env, module)
        raise self.refused("a graph without an output")

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        target = operator.attrgetter(str(node.target))(module)
        if isinstance(target, fx.GraphModule):
            return target
        raise self.refused(f"the attribute {node.target} of type {type(target).__name__}")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], module: fx.GraphModule) -> Any:
        target = node.target
        if target is operator.getitem:
            return self._getitem(node, env)
        if target in _SYMBOLIC:
            return self._emit(_SYMBOLIC[target], tuple(self._arg(arg, env) for arg in node.args), (), node)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._cond(node, env) if str(target) == "cond" else self._region(node, env)
        if not isinstance(target, torch._ops.OpOverload):
            raise self.refused(f"a call of {target}")
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        if name.startswith(_ASSERTIONS):
            return None
        args = tuple(self._arg(arg, env) for arg in node.args)
        kwargs = tuple(sorted((key, self._arg(arg, env)) for key, arg in node.kwargs.items() if key != "generator"))
        if name == "aten.sym_size.int":
            return self._emit("sym_size", args, (), node)
        if name == "aten.sym_numel.default":
            return self._numel(node, env)
        if name in _UNINITIALISED:
            name, kwargs = _UNINITIALISED[name], tuple(item for item in kwargs if item[0] != "memory_format")
        if name in _FRESH:  # a tensor written into the code, as new at each run
            return self._emit("aten.clone.default", args, (), node)
        if target._schema.is_mutable:
            return self.mutations.write(name, args, kwargs, node)
        if free_unbacked_symbols(node.meta.get("val")):
            raise self.refused(f"{name}, whose result has a size that depends on the values of its data; {NO_DATA}")
        self._check_allowed(name)
        if name == "aten.lstm.input" and self.region:
            raise self.refused(
                "an LSTM under autocast, for which torch.export gives wrong dtypes; put `with torch.autocast('cpu', "
                "enabled=False):` around the layer and give it float32"
            )
        result = self._emit(name, args, kwargs, node)
        self.mutations.note_view(result, name, args, kwargs, node)
        return result

    def _numel(self, node: fx.Node, env: dict[fx.Node, Any]) -> Arg:
        """The number of elements, as the product of the sizes."""
        source, product = self._arg(node.args[0], env), None
        for dim, size in enumerate(node.args[0].meta["val"].shape):  # type: ignore[union-attr]
            factor: Arg = size if isinstance(size, int) else self._emit("sym_size", (source, dim), (), node, like=size)
            product = factor if product is None else self._emit("sym.mul", (product, factor), (), node)
        return 1 if product is None else product

    def _getitem(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        source, index = env[node.args[0]], node.args[1]  # type: ignore[index]
        if isinstance(source, list):  # the results of an inlined region
            return source[index]  # type: ignore[index]
        result = self._emit("getitem", (self.mutations.latest(source), index), (), node)  # type: ignore[arg-type]
        self.mutations.note_view(result, "getitem", (source,), (), node)
        return result

    def _region(self, node: fx.Node, env: dict[fx.Node, Any]) -> list[Arg]:
        """Inlines `with torch.no_grad()` and `with torch.autocast(...)`, which export keeps as nested graphs."""
        kind = str(node.target)
        outer = self.grad, self.region
        if "wrap_with_set_grad_enabled" in kind:
            enabled, graph, *inputs = node.args
            self.grad = self.grad and bool(enabled)
        elif "wrap_with_autocast" in kind:
            device, dtype, enabled, _, graph, *inputs = node.args
            if device == "cpu":  # another device's autocast leaves tensors here alone
                self.region = autocast.name_of(dtype) if enabled else ""  # type: ignore[arg-type]
        else:
            raise self.refused(
                f"{kind}, which a stage program cannot hold; write it as tensor operations, or branch with torch.cond"
            )
        results = self._graph(env[graph], [self._arg(item, env) for item in inputs])  # type: ignore[index]
        self.grad, self.region = outer
        return results

    def _cond(self, node: fx.Node, env: dict[fx.Node, Any]) -> Value:
        """`torch.cond`: each branch becomes a graph over its operands."""
        predicate, if_true, if_false, inputs = node.args
        operands = tuple(self._arg(item, env) for item in inputs)  # type: ignore[union-attr]
        branches = tuple(self._branch(env[graph], len(operands)) for graph in (if_true, if_false))  # type: ignore[index]
        self.where = node
        return self._emit(COND, (self._arg(predicate, env), operands), (), node, branches=branches)

    def _branch(self, module: fx.GraphModule, num_operands: int) -> Graph:
        """A branch with ids of its own; what it writes to, it made itself."""
        outer = self.nodes, self.mutations
        self.nodes, self.mutations = [], Mutations(self._emit)
        inputs = [Value(self.next_id + at) for at in range(num_operands)]
        self.next_id += num_operands
        placeholders = module.graph.find_nodes(op="placeholder")
        self.info.update({v.id: describe(p.meta.get("val"), p) for v, p in zip(inputs, placeholders, strict=True)})
        results = self._graph(module, list(inputs))
        if not all(isinstance(result, Value) for result in results):
            raise self.refused("a branch of torch.cond that returns something other than a tensor it computed")
        outputs = [result.id for result in results if isinstance(result, Value)]
        nodes = without_dead(self.nodes, outputs)
        self.nodes, self.mutations = outer
        return Graph(tuple(value.id for value in inputs), tuple(nodes), tuple(outputs))

    # -- arguments and emission ------------------------------------------------------------------------------------

    def _arg(self, item: Any, env: dict[fx.Node, Any]) -> Arg:
        if isinstance(item, fx.Node):
            current: Arg = self.mutations.latest(env[item])
            return current
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if isinstance(item, list | tuple):
            return tuple(self._arg(inner, env) for inner in item)
        if isinstance(item, torch.dtype) and item in DTYPE_NAMES:
            return DType(DTYPE_NAMES[item])
        if isinstance(item, torch.device):
            return Device()
        if isinstance(item, torch.memory_format):
            return MemoryFormat(MEMORY_FORMAT_NAMES[item])
        if item is torch.strided:
            return Layout("strided")
        raise self.refused(f"an argument of type {type(item).__name__} ({str(item)[:60]})")

    def _emit(
        self,
        op: str,
        args: tuple[Arg, ...],
        kwargs: tuple[tuple[str, Arg], ...],
        node: fx.Node,
        like: Any = None,
        branches: tuple[Graph, ...] = (),
    ) -> Value:
        value = Value(self.next_id)
        self.next_id += 1
        self.nodes.append(Node(op, args, kwargs, value.id, self.grad, self.region, branches))
        self.info[value.id] = describe(node.meta.get("val") if like is None else like, node)
        return value

    def _check_allowed(self, name: str) -> None:
        if name not in ALLOWED:
            raise self.refused(f"the op {name}, which is not on the allowlist of tensorlink.program.allowlist")

    def as_value(self, arg: Arg) -> int:
        """The id of a value; a parameter, buffer or number that is an output becomes one."""
        if isinstance(arg, Value):
            return arg.id
        assert self.where is not None
        if isinstance(arg, Parameter | Buffer):
            node = next(node for node in self.root.graph.find_nodes(op="placeholder") if self.names[node.name] == arg)
            return self._emit("aten.alias.default", (arg,), (), node).id
        raise self.refused(f"an output {arg!r:.60} that is no tensor")

    def refused(self, what: str) -> TraceError:
        """The error for something a program cannot hold, with the user's line."""
        place = line_of(self.where) if self.where is not None else ""
        return TraceError(f"the model needs {what}{f' at {place}' if place else ''}")


def describe(value: Any, node: fx.Node | None = None) -> ValueInfo:
    """What is known of a traced value (a fake tensor, a symbolic size, or a list of tensors)."""
    module, line = (module_of(node), line_of(node)) if node is not None else ("", "")
    if isinstance(value, Tensor):
        sizes = [size if isinstance(size, int) else -1 for size in value.shape]
        batch = tuple(dim for dim, size in enumerate(value.shape) if is_batch(size))
        dtype = DTYPE_NAMES.get(value.dtype, str(value.dtype))
        return ValueInfo("tensor", dtype, tuple(sizes), batch, permutation_of(value), module=module, line=line)
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return ValueInfo("symint", "int64", is_batch=is_batch(value), module=module, line=line)
    return ValueInfo("list", "", module=module, line=line)


def is_batch(size: Any) -> bool:
    """Whether a traced size is the batch size itself, rather than a number or something computed from it."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)


def permutation_of(value: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in memory from outermost to innermost; None unless the tensor is dense in that order."""
    if value.is_contiguous():
        return tuple(range(value.dim()))
    order = tuple(sorted(range(value.dim()), key=lambda dim: -int(_hint(value.stride(dim)))))
    return order if value.permute(order).is_contiguous() else None


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def lower(captured: Captured, state: ModuleState) -> Lowered:
    """The graph of one captured mode. Inputs have the ids 0, 1, …; constants found on the way are added to `state`."""
    exported = captured.exported
    names: dict[str, Arg] = {}
    inputs: list[Value] = []
    info: dict[int, ValueInfo] = {}
    placeholders = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    for spec in exported.graph_signature.input_specs:
        name, target = spec.arg.name, (spec.target or "").removeprefix(PREFIX)
        if spec.kind is InputKind.PARAMETER:
            names[name] = Parameter(state.canonical(target))
        elif spec.kind is InputKind.BUFFER:
            names[name] = Buffer(state.canonical(target))
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            names[name] = Buffer(state.constant(exported.constants[spec.target or ""]))
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(Value(len(inputs)))
            names[name] = inputs[-1]
            info[inputs[-1].id] = describe(placeholders[name].meta["val"])
        else:
            raise TraceError(
                f"the model takes {spec.kind.name.lower()} {spec.target!r}, which a stage program cannot hold"
            )
    lowering = Lowering(exported.graph_module, names, len(inputs), captured.autocast, info=info)
    outputs = lowering.run()
    mutations = lowering.mutations.buffers()
    written = sorted(set(mutations) & set(state.constants))
    if written:
        raise TraceError("the model writes into a tensor that is a plain attribute; register it with register_buffer")
    final = [lowering.as_value(arg) for arg in outputs]
    pairs = tuple((name, lowering.as_value(arg)) for name, arg in sorted(mutations.items()))
    nodes = without_dead(lowering.nodes, [*final, *(value for _, value in pairs)])
    graph = Graph(tuple(value.id for value in inputs), tuple(nodes), tuple(final), pairs)
    return Lowered(graph, lowering.info)


def without_dead(nodes: list[Node], outputs: list[int]) -> list[Node]:
    """The nodes that an output depends on, and those that update running statistics."""
    wanted = set(outputs)
    alive = []
    for node in reversed(nodes):
        write = MUTABLE_BUFFERS.get(node.op)
        if node.id in wanted or (write is not None and node.args[write.flag] is True):
            wanted.update(node.values())
            alive.append(node)
    return alive[::-1]
