"""Rules for products of matrices, at which a split begins or ends, and for embeddings.

Neighbours: `rules.py` (the table), `carrying.py` (what is between two products), `rewriting.py` (calls them).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tensorlink.program.graph import Node
from tensorlink.program.values import Arg, DType, Parameter
from tensorlink.tensor_parallel.carrying import POINTWISE, VIEWS
from tensorlink.tensor_parallel.shapes import Seen
from tensorlink.tensor_parallel.split import Split

if TYPE_CHECKING:
    from tensorlink.tensor_parallel.rewriting import Rewriting

#: One matrix makes at most this many things at once: query, key and value, or a gate and what it gates.
MAX_BLOCKS = 4


def linear(rewriting: Rewriting, node: Node) -> bool:
    """x W^T + b; W is [outputs, inputs]."""
    bias = node.args[2] if len(node.args) > 2 else None
    return _product(rewriting, node, node.args[0], node.args[1], bias, (0, 1))


def addmm(rewriting: Rewriting, node: Node) -> bool:
    """b + x W; W is [inputs, outputs]."""
    return not node.kwargs and _product(rewriting, node, node.args[1], node.args[2], node.args[0], (1, 0))


def matmul(rewriting: Rewriting, node: Node) -> bool:
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
            elif user.op in VIEWS and isinstance(result, Seen):
                counts += [math.prod(result.shape[at:to]) for to in range(len(result.shape)) for at in range(to)]
                waiting.append(user)
            elif user.op in POINTWISE:
                waiting.append(user)
    return sorted({count for count in counts if 1 <= count <= MAX_BLOCKS})


def embedding(rewriting: Rewriting, node: Node) -> bool:
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
