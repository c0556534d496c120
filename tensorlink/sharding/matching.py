"""Finds each cut of the training graph in the evaluation graph, where the same tensors must cross.

The two graphs come from one module and differ in a few nodes (statistics, dropout, fast paths). Nodes are matched by
op, submodule, parameters and shape in order; a cut corresponds if what crosses in one mode has its match crossing, or
at least present, in the other.
"""

from __future__ import annotations

from collections.abc import Hashable
from difflib import SequenceMatcher

from tensorlink.program.graph import Node
from tensorlink.program.lowering import Lowered
from tensorlink.sharding.cuts import CutMap


class Matching:
    """Which evaluation value stands for which training value."""

    def __init__(self, train: CutMap, evaluation: CutMap) -> None:
        self.train, self.evaluation = train, evaluation
        self.to_eval: dict[int, int] = dict(zip(train.graph.inputs, evaluation.graph.inputs, strict=True))
        self._index: list[int | None] = [None] * len(train.graph.nodes)
        left = [_key(node, train.lowered) for node in train.graph.nodes]
        right = [_key(node, evaluation.lowered) for node in evaluation.graph.nodes]
        for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            for offset in range(block.size):
                self._index[block.a + offset] = block.b + offset
                self.to_eval[train.graph.nodes[block.a + offset].id] = evaluation.graph.nodes[block.b + offset].id
        self.to_train = {other: value for value, other in self.to_eval.items()}

    def position(self, position: int) -> tuple[int, list[int]] | None:
        """The evaluation graph's position and the training values that cross in either mode; None if there is none."""
        before = [index for index in self._index[:position] if index is not None]
        after = [index for index in self._index[position:] if index is not None]
        earliest = before[-1] + 1 if before else 0
        latest = after[0] if after else len(self.evaluation.graph.nodes)
        needed = self.train.crossing(position)
        for candidate in range(earliest, latest + 1):
            found = self._joined(needed, position, candidate)
            if found is not None and not self.evaluation.refusal(candidate):
                return candidate, found
        return None

    def _joined(self, needed: list[int], position: int, candidate: int) -> list[int] | None:
        others = self.evaluation.crossing(candidate)
        if any(other not in self.to_train for other in others):
            return None
        wanted = {*needed, *(self.to_train[other] for other in others)}
        for value in wanted:
            other = self.to_eval.get(value)
            if other is None or not self.evaluation.defined_before(other, candidate):
                return None
            if not self.train.defined_before(value, position) or self.train.is_free(value):
                return None
            mine, theirs = self.train.info(value), self.evaluation.info(other)
            if (mine.dtype, mine.shape, mine.permutation) != (theirs.dtype, theirs.shape, theirs.permutation):
                return None
        return sorted(wanted)


def _key(node: Node, lowered: Lowered) -> Hashable:
    info = lowered.info[node.id]
    return node.op, info.module, tuple(node.parameters()), info.dtype, info.shape
