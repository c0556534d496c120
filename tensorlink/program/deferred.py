"""Weight gradients computed later than input gradients: what lets a pipeline fill its waits.

The neighbour before a stage waits for the gradient of the stage's inputs, nobody waits for that of its weights. Ops
whose weight gradient is a kernel of its own (a matrix product, a convolution, the scatter of an embedding) are run so
that the backward leaves that kernel for later. It is the very kernel that autograd would have run, on the same
operands, so that nothing changes but the order in time. Splitting by operator rather than by graph (zero-bubble, Qi et
al., 2023, arXiv:2401.10241) walks the graph once and computes nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tensorlink.errors import ProgramError
from tensorlink.program.graph import Graph
from tensorlink.program.values import Parameter

#: For each op the positions at which a parameter's gradient is worth deferring.
DEFERRABLE: dict[str, tuple[int, ...]] = {
    "aten.linear.default": (1, 2),
    "aten.addmm.default": (0, 2),
    "aten.mm.default": (1,),
    "aten.matmul.default": (1,),
    "aten.conv1d.default": (1, 2),
    "aten.conv2d.default": (1, 2),
    "aten.conv3d.default": (1, 2),
    "aten.embedding.default": (0,),
}


class _Pending(NamedTuple):
    """One op's weight gradients: `names` of the parameters that are `weights` of the op's own graph up to `output`."""

    names: tuple[str, ...]
    weights: list[Tensor]
    output: GradientEdge
    gradient: Tensor
    retain: bool


@contextmanager
def program_backward() -> Iterator[None]:
    """What goes wrong inside is the program's fault: a ProgramError, but for memory that runs out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ProgramError(f"the backward of the program: {type(error).__name__}: {str(error)[:300]}") from error


class Deferred:
    """The weight gradients that one micro-batch's backward has left for later."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, pending: _Pending) -> None:
        """Called by the backward of a deferring op."""
        self._pending.append(pending)

    def compute(self, add: Callable[[dict[str, Tensor]], None]) -> None:
        """Gives `add` all of them by parameter name, op by op; empties this, and frees what it held as it goes. Raises
        ProgramError."""
        self._pending.reverse()
        while self._pending:
            names, weights, output, gradient, retain = self._pending.pop()
            with program_backward():
                gradients = torch.autograd.grad([output], weights, [gradient], retain_graph=retain)
            add(dict(zip(names, gradients, strict=True)))


class _DeferringOp(torch.autograd.Function):
    """One op with an autograd graph of its own behind it; its backward computes the gradients of its inputs only.

    Of the output only the edge into that graph is kept: its memory lives no longer than it would without.
    """

    @staticmethod
    def forward(ctx: Any, sink: Deferred, weights_at: dict[int, str], function: Callable[..., Any], *args: Any) -> Any:
        with torch.enable_grad():
            own = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
            output = function(*own)
        ctx.sink, ctx.weights_at, ctx.own, ctx.output = sink, weights_at, own, get_gradient_edge(output)
        return output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        own: list[Any] = ctx.own
        needs = [at for at, arg in enumerate(own) if isinstance(arg, Tensor) and arg.requires_grad]
        inputs = [at for at in needs if at not in ctx.weights_at]
        later = [at for at in needs if at in ctx.weights_at]
        found: list[Tensor | None] = [None] * len(own)
        if inputs:
            gradients = torch.autograd.grad([ctx.output], [own[at] for at in inputs], [gradient], retain_graph=True)
            for at, of_input in zip(inputs, gradients, strict=True):
                found[at] = of_input
        names = tuple(ctx.weights_at[at] for at in later)
        ctx.sink.add(_Pending(names, [own[at] for at in later], ctx.output, gradient, retain))
        if not retain:
            del ctx.own, ctx.output
        return None, None, None, *found


def deferring(function: Callable[..., Any], weights_at: dict[int, str]) -> Callable[..., Any]:
    """`function` taking a `Deferred` (or None) before its arguments, with the weights at `weights_at` deferred to
    it."""

    def call(sink: Deferred | None, *args: Any) -> Any:
        if sink is None or not any(args[at].requires_grad for at in weights_at):
            return function(*args)
        return _DeferringOp.apply(sink, weights_at, function, *args)

    return call


def deferrable_weights(graph: Graph) -> dict[int, dict[int, str]]:
    """Which nodes may defer: by node id, parameter names by argument position.

    Only parameters that the graph uses once: the gradients of several uses are added in autograd's own order. Not under
    autocast, whose casts of weights live as long as the run.
    """
    uses = Counter(name for node in graph.nodes for name in node.parameters())
    found = {}
    for node in graph.nodes:
        positions = DEFERRABLE.get(node.op, ()) if node.grad and not node.kwargs and not node.autocast else ()
        weights = {
            at: arg.name
            for at in positions
            if at < len(node.args) and isinstance(arg := node.args[at], Parameter) and uses[arg.name] == 1
        }
        if weights:
            found[node.id] = weights
    return found
