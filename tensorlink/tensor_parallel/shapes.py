"""What a run without data says of every value of a graph: its shape, whether it needs a gradient, how it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tensorlink.program.dryrun import Placeholders, dry_run
from tensorlink.program.graph import Graph, Node, StageProgram


@dataclass(frozen=True)
class Seen:
    """A tensor without its content. `order`: its dimensions from the one with the longest stride to the shortest."""

    shape: tuple[int, ...]
    needs_grad: bool
    order: tuple[int, ...]


#: A tensor, several of them, or None for a number.
Found = Seen | tuple["Found", ...] | None


def shapes_of(graph: Graph, program: StageProgram, batch: int) -> dict[int, Found]:
    """By value id, inputs included."""
    entering = Placeholders.of(program.parameters, program.buffers, program.inputs, batch, graph)
    found = {value: _seen(item) for value, item in zip(graph.inputs, entering.inputs, strict=True)}

    def observe(node: Node, result: Any) -> None:
        found[node.id] = _seen(result)

    dry_run(graph, entering, program.inputs, observe)
    return found


def _seen(result: Any) -> Found:
    if isinstance(result, Tensor):
        strides = result.stride()
        order = tuple(sorted(range(result.dim()), key=lambda dim: -strides[dim]))
        return Seen(tuple(result.shape), result.requires_grad, order)
    if isinstance(result, list | tuple):
        return tuple(_seen(item) for item in result)
    return None
