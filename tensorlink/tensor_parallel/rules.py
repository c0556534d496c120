"""What an op makes of split arguments: per op a rule that rewrites its node, or says that it cannot.

A rule returns True when it has emitted the node, False when the values are to be gathered first. Products of matrices
start and end what is split; everything else carries it on. Neighbours: `rewriting.py` (calls them), `reshapes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tensorlink.program.graph import Node
from tensorlink.program.ops import ATTENTION, is_random
from tensorlink.program.values import Arg, Buffer, DType, Parameter, Value
from tensorlink.tensor_parallel.reshapes import carried
from tensorlink.tensor_parallel.shapes import Seen
from tensorlink.tensor_parallel.split import Split

if TYPE_CHECKING:
    from tensorlink.tensor_parallel.rewriting import Rewriting

Rule = Callable[["Rewriting", Node], bool]

#: One matrix makes at most this many things at once: query, key and value, or a gate and what it gates.
MAX_BLOCKS = 4


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


# -- products of matrices ----------------------------------------------------------------------------------------------


def _linear(rewriting: Rewriting, node: Node) -> bool:
    """x W^T + b; W is [outputs, inputs]."""
    bias = node.args[2] if len(node.args) > 2 else None
    return _product(rewriting, node, node.args[0], node.args[1], bias, (0, 1))


def _addmm(rewriting: Rewriting, node: Node) -> bool:
    """b + x W; W is [inputs, outputs]."""
    return not node.kwargs and _product(rewriting, node, node.args[1], node.args[2], node.args[0], (1, 0))


def _matmul(rewriting: Rewriting, node: Node) -> bool:
    """x W with a matrix, or a product of each pair in a batch of matrices whose batch is split."""
    left, right = node.args
    weight = rewriting.seen(right)
    if isinstance(right, Parameter) and weight is not None and len(weight.shape) == 2:
        return _product(rewriting, node, left, right, None, (1, 0))
    split, seen = rewriting.split(left), rewriting.seen(left)
    if split is None or seen is None or weight is None or split != rewriting.split(right):
        return False
    if len(seen.shape) != len(weight.shape) or split.dim >= len(seen.shape) - 2:
        return False
    return rewriting.emit(node, node.args, split)


def _product(rewriting: Rewriting, node: Node, x: Arg, weight: Arg, bias: Arg, dims: tuple[int, int]) -> bool:
    """`dims`: which dimension of the matrix counts outputs, and which inputs."""
    seen, split, (outputs, inputs) = rewriting.seen(x), rewriting.split(x), dims
    if not isinstance(weight, Parameter) or seen is None or not seen.shape:
        return False
    last = len(seen.shape) - 1
    if split is None:
        return _by_outputs(rewriting, node, x, weight, bias, outputs, last)
    wanted = Split(inputs, split.blocks)
    if split.dim != last or not rewriting.can_split(weight, wanted):
        return False
    rewriting.assign(weight, wanted)
    product = rewriting.add("aten.linear.default" if outputs == 0 else "aten.matmul.default", (x, weight), node)
    if bias is None:
        return rewriting.emit(node, (product,), None, "tp.reduce")
    total = rewriting.add("tp.reduce", (product,), node)
    bias_whole = rewriting.whole(bias)
    if isinstance(bias, Parameter):
        rewriting.used_whole(bias)
    if node.autocast:  # which casts what a product takes, and not what a sum takes
        bias_whole = rewriting.add("aten.to.dtype", (bias_whole, DType(node.autocast)), node)
    return rewriting.emit(node, (total, bias_whole), None, "aten.add.Tensor")


def _by_outputs(
    rewriting: Rewriting, node: Node, x: Arg, weight: Parameter, bias: Arg, outputs: int, last: int
) -> bool:
    blocks, seen = rewriting.blocks_for(node, weight, outputs), rewriting.seen(bias)
    if blocks is None or (seen is not None and len(seen.shape) != 1):
        return False
    if bias is not None and not rewriting.can_split(bias, Split(0, blocks)):
        return False
    rewriting.assign(weight, Split(outputs, blocks))
    rewriting.assign(bias, Split(0, blocks))
    entered = rewriting.entered(x)
    return rewriting.emit(node, tuple(entered if arg == x else arg for arg in node.args), Split(last, blocks))


def block_counts(rewriting: Rewriting, node: Node) -> list[int]:
    """In how many blocks it may pay to split a matrix: one, or as many as its product is then taken apart into."""
    counts, waiting = [1], [node]
    while waiting:
        at = waiting.pop()
        for user in rewriting.users(at.id):
            result = rewriting.result(user)
            if isinstance(result, tuple):
                counts.append(len(result))
            elif user.op in _VIEWS and isinstance(result, Seen):
                counts += [math.prod(result.shape[at:to]) for to in range(len(result.shape)) for at in range(to)]
                waiting.append(user)
            elif user.op in _POINTWISE:
                waiting.append(user)
    return sorted({count for count in counts if 1 <= count <= MAX_BLOCKS})


def _embedding(rewriting: Rewriting, node: Node) -> bool:
    """By rows where they divide, each device adding what it holds; otherwise by columns."""
    weight, indices, *options = node.args
    seen = rewriting.seen(weight)
    if not isinstance(weight, Parameter) or seen is None or rewriting.layout(indices) is not None or node.kwargs:
        return False
    is_plain = all(option is False or option == -1 for option in options)  # no padding, no scaling by frequency
    if is_plain and rewriting.can_split(weight, Split(0)):
        rewriting.assign(weight, Split(0))
        found = rewriting.add("tp.embedding", (weight, indices, seen.shape[0]), node)
        return rewriting.emit(node, (found,), None, "tp.reduce")
    result = rewriting.result(node)
    if not isinstance(result, Seen) or not rewriting.can_split(weight, Split(1)):
        return False
    rewriting.assign(weight, Split(1))
    columns = rewriting.add(node.op, node.args, node)
    return rewriting.emit(node, (columns, len(result.shape) - 1, 1), None, "tp.gather")


# -- what carries a split on -------------------------------------------------------------------------------------------


def _pointwise(rewriting: Rewriting, node: Node) -> bool:
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


def _view(rewriting: Rewriting, node: Node) -> bool:
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


def _expand(rewriting: Rewriting, node: Node) -> bool:
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


def _permute(rewriting: Rewriting, node: Node) -> bool:
    only, order = _only(rewriting, node), node.args[1]
    if only is None or not isinstance(order, tuple) or not all(isinstance(dim, int) for dim in order):
        return False
    seen, split = only
    dims = [int(dim) % len(seen.shape) for dim in order if isinstance(dim, int)]
    return rewriting.emit(node, node.args, split.at(dims.index(split.dim)))


def _transpose(rewriting: Rewriting, node: Node) -> bool:
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


def _unsqueeze(rewriting: Rewriting, node: Node) -> bool:
    only = _only(rewriting, node)
    at = None if only is None else _dim(node, 1, len(only[0].shape) + 1)
    if only is None or at is None:
        return False
    return rewriting.emit(node, node.args, only[1].at(only[1].dim + (at <= only[1].dim)))


def _along_another(rewriting: Rewriting, node: Node) -> bool:
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


def _pieces(rewriting: Rewriting, node: Node) -> bool:
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


def _item(rewriting: Rewriting, node: Node) -> bool:
    layout, at = rewriting.layout(node.args[0]), node.args[1]
    if not isinstance(layout, tuple) or not isinstance(at, int):
        return False
    return rewriting.emit(node, node.args, layout[at])


def _cat(rewriting: Rewriting, node: Node) -> bool:
    items = node.args[0]
    if not isinstance(items, tuple) or not items or node.kwargs:
        return False
    splits, seen = {rewriting.split(item) for item in items}, rewriting.seen(items[0])
    split = splits.pop()
    at = None if seen is None else _dim(node, 1, len(seen.shape))
    if splits or split is None or at is None or at == split.dim:
        return False
    return rewriting.emit(node, node.args, split)


def _norm(rewriting: Rewriting, node: Node) -> bool:
    """Normalised over trailing dimensions, none of them split; what scales them is the same on every rank."""
    x, over, *rest = node.args
    seen, split = rewriting.seen(x), rewriting.split(x)
    if seen is None or split is None or not isinstance(over, tuple) or split.dim >= len(seen.shape) - len(over):
        return False
    if node.kwargs or any(rewriting.layout(arg) is not None for arg in rest):
        return False
    return rewriting.emit(node, (x, over, *(rewriting.entered(arg) for arg in rest)), split)


def _attention(rewriting: Rewriting, node: Node) -> bool:
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


def _size(rewriting: Rewriting, node: Node) -> bool:
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
_POINTWISE = (
    {f"aten.{name}.default" for name in _UNARY}
    | {f"aten.{name}.{kind}" for name in _ARITHMETIC for kind in ("Tensor", "Scalar")}
    | {"aten.multiply.Tensor", "aten.true_divide.Tensor", "aten.pow.Tensor_Scalar", "aten.to.dtype", "aten.where.self"}
    | {"aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor"}
)
_VIEWS = {f"aten.{name}" for name in ("view.default", "reshape.default", "_unsafe_view.default", "unflatten.int")} | {
    "aten.flatten.using_ints"
}

#: Ops at which a split can begin: they are looked at even where nothing is split yet.
STARTING = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.embedding.default": _embedding,
}
RULES: dict[str, Rule] = {
    **STARTING,
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(("aten.transpose.int", "aten.t.default", "aten.swapaxes.default"), _transpose),
    **dict.fromkeys(("aten.layer_norm.default", "aten.rms_norm.default"), _norm),
    **{f"aten.{name}": _along_another for name in ("softmax.int", "slice.Tensor", "select.int", "unbind.int")},
    **{f"aten.{name}": _pieces for name in ("split.Tensor", "split.sizes", "unsafe_split.Tensor")},
    **{f"aten.{name}": _pieces for name in ("split_with_sizes.default", "chunk.default", "unsafe_chunk.default")},
    "aten.bmm.default": _matmul,
    "aten.permute.default": _permute,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.expand.default": _expand,
    "aten.cat.default": _cat,
    ATTENTION: _attention,
    "getitem": _item,
    "sym_size": _size,
}
