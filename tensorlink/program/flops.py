"""Work of a node in floating-point operations, from shapes alone: the basis of pay and of limits.

A multiplication and an addition count as two. Products, convolutions, attention and recurrent layers follow the
formulas of `torch.utils.flop_counter`; every other op counts one per element of its result or of its largest operand,
whichever is more, and views count nothing. Backward: a product costs its forward once for each of its two operands
that needs a gradient, anything else one per element where a gradient is needed. The figures depend on the program and
the batch, not on torch's version or the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

from torch import Tensor

from tensorlink.program.graph import Node
from tensorlink.program.guards import RECURRENT
from tensorlink.program.ops import ALLOWED, ATTENTION, PSEUDO

Args = list[Any]


def _linear(args: Args, result: Tensor) -> int:
    return int(2 * args[0].numel() * (args[1].shape[0] if args[1].dim() > 1 else 1))


def _product(first: int) -> Callable[[Args, Tensor], int]:
    return lambda args, result: int(2 * result.numel() * (args[first].shape[-1] if args[first].dim() else 1))


def _convolution(args: Args, result: Tensor) -> int:
    return int(2 * result.numel() * prod(args[1].shape[1:]))


def _transposed_convolution(args: Args, result: Tensor) -> int:
    return int(2 * args[0].numel() * prod(args[1].shape[1:]))


def _attention(args: Args, result: Tensor) -> int:
    query, key, value = args[:3]
    return int(2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent(args: Args, result: Tensor) -> int:
    steps = args[0].numel() // max(args[0].shape[-1], 1)
    return int(2 * steps * sum(weight.numel() for weight in args[2] if weight.dim() == 2))


def _einsum(args: Args, result: Tensor) -> int:
    terms = args[0].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, args[1], strict=False):
        labels = [*term.split("...")[0], *(["..."] if "..." in term else []), *(term.split("...")[1:] or [""])[0]]
        rest = operand.dim() - sum(label != "..." for label in labels)
        at = 0
        for label in labels:
            span = rest if label == "..." else 1
            sizes[label] = max(sizes.get(label, 1), prod(operand.shape[at : at + span]))
            at += span
    return 2 * prod(sizes.values())


PRODUCTS: dict[str, Callable[[Args, Any], int]] = {
    "aten.linear.default": _linear,
    "aten.matmul.default": _product(0),
    "aten.mm.default": _product(0),
    "aten.bmm.default": _product(0),
    "aten.mv.default": _product(0),
    "aten.dot.default": _product(0),
    "aten.inner.default": _product(0),
    "aten.addmm.default": _product(1),
    "aten.baddbmm.default": _product(1),
    "aten.addmv.default": _product(1),
    "aten.conv1d.default": _convolution,
    "aten.conv1d.padding": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.conv2d.padding": _convolution,
    "aten.conv3d.default": _convolution,
    "aten.conv3d.padding": _convolution,
    "aten.conv_transpose1d.default": _transposed_convolution,
    "aten.conv_transpose2d.input": _transposed_convolution,
    "aten.conv_transpose3d.input": _transposed_convolution,
    ATTENTION: _attention,
    "aten.einsum.default": _einsum,
    **dict.fromkeys(RECURRENT, _recurrent),
}
_LOOKUPS = frozenset(
    {
        "aten.embedding.default",
        "aten.index.Tensor",
        "aten.index_select.default",
        "aten.gather.default",
        "aten.take.default",
        "aten.take_along_dim.default",
    }
)
_FREE = frozenset(
    {"aten.reshape.default", "aten.reshape_as.default", "aten.flatten.using_ints", "aten.contiguous.default"}
)


def is_view(op: str) -> bool:
    """Whether the op does no work of its own: integers, list items, other shapes of the same memory."""
    if op in PSEUDO or op in _FREE:
        return True
    returns = ALLOWED[op]._schema.returns
    return bool(returns) and all(item.alias_info is not None for item in returns)


def tensors_in(item: Any) -> Iterable[Tensor]:
    """Every tensor in a nested argument or result."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for inner in item:
            yield from tensors_in(inner)


def count(node: Node, args: Args, result: Any) -> tuple[int, int]:
    """(forward, backward) operations of one call with these arguments and this result."""
    outputs = list(tensors_in(result))
    needs_gradient = any(output.requires_grad for output in outputs)
    formula = PRODUCTS.get(node.op)
    if formula is not None:
        forward = formula(args, result)
        operands = [
            tensor
            for tensor in tensors_in(args)
            if tensor.dim() > 1 or node.op in ("aten.dot.default", "aten.mv.default")
        ]
        wanted = sum(tensor.requires_grad for tensor in operands[:3] if tensor is not None)
        return forward, forward * min(wanted, 2) if needs_gradient else 0
    if is_view(node.op):
        return 0, 0
    elements = sum(output.numel() for output in outputs)
    if node.op not in _LOOKUPS:
        elements = max([elements, *(tensor.numel() for tensor in tensors_in(args))])
    return elements, elements if needs_gradient else 0
