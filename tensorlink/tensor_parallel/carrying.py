"""Rules for what carries a split on, from one product of matrices to the next.

Neighbours: `rules.py` (the table), `products.py` (where a split begins and ends), `reshapes.py` (views).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tensorlink.program.graph import Node
from tensorlink.program.ops import is_random
from tensorlink.program.values import Arg, Buffer, Parameter, Value
from tensorlink.tensor_parallel.reshapes import carried
from tensorlink.tensor_parallel.shapes import Seen
from tensorlink.tensor_parallel.split import Split

if TYPE_CHECKING:
    from tensorlink.tensor_parallel.rewriting import Rewriting


def _dim(node: Node, at: int, rank: int, default: int = 0) -> int | None:
    """An argument that names a dimension, counted from 0; None where it is not a plain number."""
    found = node.args[at] if len(node.args) > at else default
    if not isinstance(found, int) or isinstance(found, bool):
        return None
    return found + rank if found < 0 else found


def _only(rewriting: Rewriting, node: Node) -> tuple[Seen, Split] | None:
    """The first argument, where it is the one that is split."""
    seen, split = rewriting.seen(node.args[0]), rewriting.split(node.args[0])
    others = any(rewriting.layout(arg) is not None for arg in node.args[1:])
    return None if seen is None or split is None or others else (seen, split)


def pointwise(rewriting: Rewriting, node: Node) -> bool:
    """Element by element, with broadcasting."""
    result = rewriting.result(node)
    if not isinstance(result, Seen) or not all(_is_plain(arg) for _, arg in node.kwargs):
        return False
    rank = len(result.shape)
    tensors = {at: seen for at, arg in enumerate(node.args) if (seen := rewriting.seen(arg)) is not None}
    splits = {at: split for at in tensors if (split := rewriting.split(node.args[at])) is not None}
    found = {split.at(split.dim + rank - len(tensors[at].shape)) for at, split in splits.items()}
    if len(found) != 1:
        return False
    split = found.pop()
    if any(tensors[at].shape[split_at.dim] != result.shape[split.dim] for at, split_at in splits.items()):
        return False
    ways: dict[int, Callable[[], Arg]] = {}
    for at in tensors.keys() - splits.keys():
        way = _joining(rewriting, node.args[at], tensors[at], split.at(split.dim - rank + len(tensors[at].shape)))
        if way is None:
            return False
        ways[at] = way
    args = tuple(ways[at]() if at in ways else arg for at, arg in enumerate(node.args))
    if is_random(node.op, node.args):
        rewriting.draw(node, split, result.order)
    return rewriting.emit(node, args, split)


def _joining(rewriting: Rewriting, arg: Arg, seen: Seen, split: Split) -> Callable[[], Arg] | None:
    """How a whole argument joins one that is split, `split` being where that falls in it; None where it had better
    not."""
    if split.dim < 0 or seen.shape[split.dim] == 1:
        return lambda: rewriting.entered(arg)
    if rewriting.can_split(arg, split):

        def assigned() -> Arg:
            rewriting.assign(arg, split)
            return arg

        return assigned
    return None if seen.needs_grad else lambda: rewriting.taken(arg, split)


def _is_plain(arg: Arg) -> bool:
    return not isinstance(arg, Value | Parameter | Buffer | tuple)


def view(rewriting: Rewriting, node: Node) -> bool:
    only, result = _only(rewriting, node), rewriting.result(node)
    if only is None or not isinstance(result, Seen):
        return False
    seen, split = only
    after = carried(seen.shape, result.shape, split, rewriting.num_parts)
    if after is None:
        return False
    args = list(node.args)
    if node.op != "aten.flatten.using_ints":
        first = 0 if node.op != "aten.unflatten.int" else _dim(node, 1, len(seen.shape))
        sizes = node.args[-1]
        if first is None or not isinstance(sizes, tuple):
            return False
        at = after.dim - first
        if 0 <= at < len(sizes):
            local = _local(sizes[at], rewriting.num_parts)
            if local is None:
                return False
            args[-1] = (*sizes[:at], local, *sizes[at + 1 :])
    op = "aten.reshape.default" if node.op in ("aten.view.default", "aten._unsafe_view.default") else ""
    return rewriting.emit(node, tuple(args), after, op)


def expand(rewriting: Rewriting, node: Node) -> bool:
    only, sizes = _only(rewriting, node), node.args[1]
    if only is None or not isinstance(sizes, tuple) or node.kwargs:
        return False
    seen, split = only
    after = split.at(split.dim + len(sizes) - len(seen.shape))
    local = _local(sizes[after.dim], rewriting.num_parts)
    if local is None:
        return False
    return rewriting.emit(node, (node.args[0], (*sizes[: after.dim], local, *sizes[after.dim + 1 :])), after)


def _local(size: Arg, num_parts: int) -> int | None:
    """A size of the whole as a size of a part; -1 stands for what is left or what is there."""
    if not isinstance(size, int) or isinstance(size, bool):
        return None
    return size // num_parts if size >= 0 else size


def permute(rewriting: Rewriting, node: Node) -> bool:
    only, order = _only(rewriting, node), node.args[1]
    if only is None or not isinstance(order, tuple) or not all(isinstance(dim, int) for dim in order):
        return False
    seen, split = only
    dims = [int(dim) % len(seen.shape) for dim in order if isinstance(dim, int)]
    return rewriting.emit(node, node.args, split.at(dims.index(split.dim)))


def transpose(rewriting: Rewriting, node: Node) -> bool:
    only = _only(rewriting, node)
    if only is None:
        return False
    seen, split = only
    first, second = _dim(node, 1, len(seen.shape)), _dim(node, 2, len(seen.shape), 1)
    if node.op == "aten.t.default":
        first, second = 0, 1
    if first is None or second is None:
        return False
    return rewriting.emit(node, node.args, split.at({first: second, second: first}.get(split.dim, split.dim)))


def unsqueeze(rewriting: Rewriting, node: Node) -> bool:
    only = _only(rewriting, node)
    at = None if only is None else _dim(node, 1, len(only[0].shape) + 1)
    if only is None or at is None:
        return False
    return rewriting.emit(node, node.args, only[1].at(only[1].dim + (at <= only[1].dim)))


def along_another(rewriting: Rewriting, node: Node) -> bool:
    """Ops along a dimension that is not split: softmax, a slice, one of the rows, all rows one by one."""
    only, result = _only(rewriting, node), rewriting.result(node)
    at = None if only is None else _dim(node, 1, len(only[0].shape))
    if only is None or at is None or at == only[1].dim or not all(_is_plain(arg) for _, arg in node.kwargs):
        return False
    seen, split = only
    first = result[0] if isinstance(result, tuple) and result else result
    removed = isinstance(first, Seen) and len(first.shape) < len(seen.shape)
    after = split.at(split.dim - (removed and at < split.dim))
    return rewriting.emit(node, node.args, (after,) * len(result) if isinstance(result, tuple) else after)


def pieces(rewriting: Rewriting, node: Node) -> bool:
    """Taken apart along a dimension: another than the split one, or block by block."""
    only, result = _only(rewriting, node), rewriting.result(node)
    at = None if only is None else _dim(node, 2, len(only[0].shape))
    if only is None or at is None or not isinstance(result, tuple) or not result or node.kwargs:
        return False
    _, split = only
    if at != split.dim:
        return rewriting.emit(node, node.args, (split,) * len(result))
    sizes = {piece.shape[at] for piece in result if isinstance(piece, Seen)}
    if len(sizes) != 1 or split.blocks % len(result):
        return False
    given, parts = node.args[1], rewriting.num_parts
    if node.op in ("aten.split.Tensor", "aten.unsafe_split.Tensor"):
        given = sizes.pop() // parts
    elif isinstance(given, tuple):
        given = (sizes.pop() // parts,) * len(result)
    after = Split(at, split.blocks // len(result))
    return rewriting.emit(node, (node.args[0], given, at), (after,) * len(result))


def item(rewriting: Rewriting, node: Node) -> bool:
    layout, at = rewriting.layout(node.args[0]), node.args[1]
    if not isinstance(layout, tuple) or not isinstance(at, int):
        return False
    return rewriting.emit(node, node.args, layout[at])


def cat(rewriting: Rewriting, node: Node) -> bool:
    items = node.args[0]
    if not isinstance(items, tuple) or not items or node.kwargs:
        return False
    splits, seen = {rewriting.split(item) for item in items}, rewriting.seen(items[0])
    split = splits.pop()
    at = None if seen is None else _dim(node, 1, len(seen.shape))
    if splits or split is None or at is None or at == split.dim:
        return False
    return rewriting.emit(node, node.args, split)


def norm(rewriting: Rewriting, node: Node) -> bool:
    """Normalised over trailing dimensions, none of them split; what scales them is the same on every rank."""
    x, over, *rest = node.args
    seen, split = rewriting.seen(x), rewriting.split(x)
    if seen is None or split is None or not isinstance(over, tuple) or split.dim >= len(seen.shape) - len(over):
        return False
    if node.kwargs or any(rewriting.layout(arg) is not None for arg in rest):
        return False
    return rewriting.emit(node, (x, over, *(rewriting.entered(arg) for arg in rest)), split)


def attention(rewriting: Rewriting, node: Node) -> bool:
    """Each device has some of the heads."""
    seen, split = rewriting.seen(node.args[0]), rewriting.split(node.args[0])
    result = rewriting.result(node)
    if seen is None or split is None or not isinstance(result, Seen) or split != Split(len(seen.shape) - 3):
        return False
    if any(rewriting.split(arg) != split for arg in node.args[1:3]):
        return False
    args, mask = list(node.args), rewriting.seen(node.args[3]) if len(node.args) > 3 else None
    if mask is not None and rewriting.split(args[3]) != Split(len(mask.shape) - 3):
        if rewriting.split(args[3]) is not None:
            return False
        way = _joining(rewriting, args[3], mask, Split(len(mask.shape) - 3))
        if way is None:
            return False
        args[3] = way()
    if is_random(node.op, node.args):
        rewriting.draw(node, split, tuple(range(len(seen.shape))))  # of the matrix of weights, which is contiguous
    return rewriting.emit(node, tuple(args), split)


def size(rewriting: Rewriting, node: Node) -> bool:
    """The size of the whole, which later nodes reckon with."""
    only = _only(rewriting, node)
    at = None if only is None else _dim(node, 1, len(only[0].shape))
    if only is None or at is None:
        return False
    if at != only[1].dim:
        return rewriting.emit(node, node.args, None)
    part = rewriting.add("sym_size", node.args, node)
    return rewriting.emit(node, (part, rewriting.num_parts), None, "sym.mul")


# fmt: off
_UNARY = (
    "abs", "alias", "celu", "clone", "contiguous", "cos", "detach", "elu", "erf", "exp", "expm1", "gelu", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "log_sigmoid", "mish", "neg", "reciprocal", "relu", "relu6",
    "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus", "sqrt", "square", "tanh", "_to_copy", "clamp", "clamp_min",
    "clamp_max", "maximum", "minimum", "logical_and", "logical_not", "logical_or", "dropout",
)
_ARITHMETIC = ("add", "sub", "mul", "div", "rsub", "eq", "ne", "lt", "le", "gt", "ge")
# fmt: on
POINTWISE = (
    {f"aten.{name}.default" for name in _UNARY}
    | {f"aten.{name}.{kind}" for name in _ARITHMETIC for kind in ("Tensor", "Scalar")}
    | {"aten.multiply.Tensor", "aten.true_divide.Tensor", "aten.pow.Tensor_Scalar", "aten.to.dtype", "aten.where.self"}
    | {"aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor"}
)
VIEWS = {f"aten.{name}" for name in ("view.default", "reshape.default", "_unsafe_view.default", "unflatten.int")} | {
    "aten.flatten.using_ints"
}
