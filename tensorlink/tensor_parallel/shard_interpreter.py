"""Runs one rank's graph: an interpreter that also knows the collectives of a plan, and draws whole masks.

Neighbours: `plan.py` (makes the graphs), `group.py` (the collectives).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensorlink.program import dropout
from tensorlink.program.dropout import Seed
from tensorlink.program.graph import Node
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.ops import ATTENTION
from tensorlink.tensor_parallel.group import Enter, Gather, Group, Reduce, Take
from tensorlink.tensor_parallel.plan import ShardedGraph
from tensorlink.tensor_parallel.rewriting import Drawn
from tensorlink.tensor_parallel.split import Split


class ShardInterpreter(Interpreter):
    """As `Interpreter`, over one rank's parts of the parameters. No program that travels can name its collectives."""

    def __init__(
        self, sharded: ShardedGraph, parameters: dict[str, Tensor], buffers: dict[str, Tensor], group: Group
    ) -> None:
        self._sharded, self._group = sharded, group
        super().__init__(sharded.graph, parameters, buffers, device=group.device)

    def _check(self, node: Node) -> None:
        if node.op not in COLLECTIVES:
            super()._check(node)

    def _function(self, node: Node, places: list[int]) -> Callable[..., Any]:
        if node.op in COLLECTIVES:
            return partial(COLLECTIVES[node.op], self._group)
        drawn = self._sharded.drawn.get(node.id)
        if drawn is None:
            return super()._function(node, places)
        places[:0] = [0, self._place(node.id)]
        drop = partial(_dropout, self._group, drawn)
        return partial(dropout.attention, drop=drop) if node.op == ATTENTION else drop


def _dropout(group: Group, drawn: Drawn, seed_for: Seed, key: int, input: Tensor, p: float, train: bool) -> Tensor:
    """`dropout.dropout` of a part, with the part of the mask that the whole would have had."""
    if not 0 < p < 1 or not train or input.numel() == 0:
        return dropout.dropout(seed_for, key, input, p, train)
    shape = list(input.shape)
    shape[drawn.split.dim] *= group.size
    like = input.new_empty([shape[dim] for dim in drawn.order])
    like = like.permute([drawn.order.index(dim) for dim in range(len(shape))])
    return input * group.part(dropout.noise(like, p, seed_for(key)), drawn.split).div_(1 - p)


def _embedding(group: Group, rows: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """What this rank's rows contribute; zeros for what the others hold."""
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < num_rows):
        raise IndexError(f"an index is outside the {num_rows} rows of the table")
    local = indices - group.rank * rows.size(0)
    elsewhere = (local < 0) | (local >= rows.size(0))
    found = torch.embedding(rows, local.masked_fill(elsewhere, 0))
    return found.masked_fill(elsewhere.unsqueeze(-1), 0)


#: What stands in the graphs of a plan besides the ops that programs may name.
COLLECTIVES: dict[str, Callable[..., Tensor]] = {
    "tp.enter": lambda group, tensor: Enter.apply(tensor, group),
    "tp.reduce": lambda group, tensor: Reduce.apply(tensor, group),
    "tp.gather": lambda group, tensor, dim, blocks: Gather.apply(tensor, group, Split(dim, blocks)),
    "tp.take": lambda group, tensor, dim, blocks: Take.apply(tensor, group, Split(dim, blocks)),
    "tp.embedding": _embedding,
}
