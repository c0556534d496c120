"""In-place writes as values: what `x.relu_()` or `x[:, 0] = 0` leaves behind is a new value that later readers see.

A write through a view becomes the view's scatter into its base (`slice_scatter` for a slice), from the written view
up to the tensor that owns the memory; other views of that tensor are taken anew when they are next read. A write to a
buffer becomes the buffer's value at the end of the run. Neighbour: `lowering.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx

from tensorlink.errors import TraceError
from tensorlink.program.ops import ALLOWED
from tensorlink.program.sources import line_of
from tensorlink.program.values import DTYPE_NAMES, Arg, Buffer, DType, Parameter, Value

Kwargs = tuple[tuple[str, Arg], ...]


class View(NamedTuple):
    """How a value was taken from its base: the op and its arguments after the first."""

    base: Arg
    op: str
    args: tuple[Arg, ...]
    kwargs: Kwargs
    node: fx.Node


_SCATTERS = {
    "aten.slice.Tensor": "aten.slice_scatter.default",
    "aten.select.int": "aten.select_scatter.default",
    "aten.diagonal.default": "aten.diagonal_scatter.default",
}
_SAME_BACK = frozenset({"aten.transpose.int", "aten.t.default", "aten.swapaxes.default"})
_RESHAPES = frozenset(
    {
        "aten.view.default",
        "aten.reshape.default",
        "aten._unsafe_view.default",
        "aten.squeeze.default",
        "aten.squeeze.dim",
        "aten.unsqueeze.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
    }
)
#: Ops with `out=` that torch.nn uses, and what they compute.
_INTO = {"aten.div.out": "aten.div.Tensor", "aten.mul.out": "aten.mul.Tensor", "aten.add.out": "aten.add.Tensor"}
#: Random numbers into a tensor, whose functional forms have other names.
_DRAWS = {"aten.bernoulli_.float": "aten.bernoulli.p", "aten.normal_.default": "aten.normal_functional.default"}
_NOTHING = frozenset({"aten.alias.default", "aten.contiguous.default", "aten.to.dtype", "aten.to.dtype_layout"})


class Mutations:
    """Keeps track of which value stands for a tensor now."""

    def __init__(self, emit: Callable[..., Value]) -> None:
        self._emit = emit
        self._views: dict[int, View] = {}
        self._current: dict[Arg, Arg] = {}
        self._retaken: dict[tuple[int, Arg], Value] = {}

    def buffers(self) -> dict[str, Arg]:
        """Buffers that were written, with what they hold in the end."""
        return {root.name: self.latest(root) for root in self._current if isinstance(root, Buffer)}

    def latest(self, arg: Any) -> Any:
        """What stands for `arg` after all writes so far."""
        if isinstance(arg, Value) and arg.id in self._views:
            view = self._views[arg.id]
            base = self.latest(view.base)
            if base == view.base:
                return arg
            if (arg.id, base) not in self._retaken:
                again = self._emit(view.op, (base, *view.args), view.kwargs, view.node)
                self._views[again.id] = view._replace(base=base)
                self._retaken[arg.id, base] = again
            return self.latest(self._retaken[arg.id, base])
        if isinstance(arg, Value | Buffer) and arg in self._current:
            return self.latest(self._current[arg])
        return arg

    def note_view(self, result: Value, op: str, args: tuple[Arg, ...], kwargs: Kwargs, node: fx.Node) -> None:
        """Remembers that `result` shares memory with its first argument, if it does."""
        if not args or not isinstance(args[0], Value | Buffer | Parameter) or op == "getitem":
            return
        source = node.args[0]
        if isinstance(source, fx.Node) and _share_memory(source.meta.get("val"), node.meta.get("val")):
            self._views[result.id] = View(args[0], op, args[1:], kwargs, node)

    def write(self, name: str, args: tuple[Arg, ...], kwargs: Kwargs, node: fx.Node) -> Arg:
        """The value of the tensor after the in-place op `name`, such as "aten.add_.Tensor"."""
        namespace, packet, overload = name.split(".")
        functional = f"{namespace}.{packet.removesuffix('_')}.{overload}"
        if functional == "aten.detach.default":
            return self._emit(functional, args, kwargs, node)
        if functional == "aten.copy.default":
            new = self._copied(args[0], args[1], node)
        elif functional == "aten.zero.default":
            new = self._emit("aten.zeros_like.default", args, (), node)
        elif name in _INTO:
            into = dict(kwargs)
            args = (into.pop("out"), *args)
            new = self._emit(_INTO[name], args[1:], tuple(into.items()), node)
        elif name in _DRAWS:
            new = self._emit(_DRAWS[name], args, kwargs, node)
        elif name == "aten.embedding_renorm_.default":
            raise TraceError(
                f"the model writes into the weight of an embedding with max_norm at {line_of(node)}; clip the rows "
                "that were looked up instead, as x * (max_norm / x.norm(dim=-1, keepdim=True)).clamp(max=1)"
            )
        elif packet.endswith("_") and functional in ALLOWED:
            new = self._emit(functional, args, kwargs, node)
        else:
            raise TraceError(
                f"the model needs the in-place op {name} at {line_of(node)}; use the form without underscore"
            )
        self._store(args[0], new, node)
        current: Arg = self.latest(args[0])
        return current

    def _copied(self, target: Arg, source: Arg, node: fx.Node) -> Value:
        """What `target.copy_(source)` leaves: the source in the shape and dtype of the target. `aten.copy` has no
        derivative."""
        spread = self._emit("aten.expand_as.default", (source, target), (), node)
        like = node.meta["val"]
        return self._emit("aten._to_copy.default", (spread,), (("dtype", DType(DTYPE_NAMES[like.dtype])),), node)

    def _store(self, target: Arg, new: Value, node: fx.Node) -> None:
        if isinstance(target, Parameter):
            raise TraceError(
                f"the model writes into its parameter {target.name!r} at {line_of(node)}; make it a buffer, or "
                "compute without writing"
            )
        if isinstance(target, Value) and target.id in self._views:
            view = self._views[target.id]
            self._store(view.base, self._scatter(view, new, node), node)
            return
        if isinstance(target, Value | Buffer) and target != new:
            self._current[target] = new

    def _scatter(self, view: View, new: Value, node: fx.Node) -> Value:
        base = self.latest(view.base)
        like = view.node.args[0].meta.get("val") if isinstance(view.node.args[0], fx.Node) else None
        if view.op in _SCATTERS:
            return self._emit(_SCATTERS[view.op], (base, new, *view.args), view.kwargs, node, like)
        if view.op in _SAME_BACK:
            return self._emit(view.op, (new, *view.args), view.kwargs, node, like)
        if view.op in _RESHAPES:
            return self._emit("aten.reshape_as.default", (new, base), (), node, like)
        if view.op in _NOTHING:
            return new
        raise TraceError(
            f"the model writes in place through {view.op} at {line_of(node)}; compute a new tensor instead, or "
            "write to a slice"
        )


def _share_memory(source: Any, result: Any) -> bool:
    if not isinstance(source, Tensor) or not isinstance(result, Tensor):
        return False
    return bool(source.untyped_storage()._cdata == result.untyped_storage()._cdata)
