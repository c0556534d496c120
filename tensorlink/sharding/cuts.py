"""Where a graph can be cut, and what would cross there. Policy only; nothing is run.

The graph's order is kept: a cut at p separates the first p nodes from the rest. What a later stage can make for
itself is never sent: sizes (from any tensor that enters it) and everything computed from constants and unchanging
buffers alone, such as masks, positions and rotary tables. Neighbours: `matching.py` (the same cut in both modes),
`partition.py` (chooses).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorlink.program.graph import Graph, Node
from tensorlink.program.lowering import Lowered, ValueInfo
from tensorlink.program.ops import SYMBOLIC, is_random
from tensorlink.program.validate import written_buffers


@dataclass
class CutMap:
    """A graph's cut positions. `crossing(p)` are the values to send at p, in the order of their definition.

    `sizes` are nodes that follow from the batch size, `constants` those that follow from constants; both are computed
    wherever needed.
    """

    lowered: Lowered
    gradients: frozenset[int]
    written: frozenset[str]
    sizes: frozenset[int] = frozenset()
    constants: frozenset[int] = frozenset()
    _last_use: dict[int, int] = field(default_factory=dict)
    _defined: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.graph
        sizes: set[int] = set()
        constants: set[int] = set()
        for node in graph.nodes:
            if self._is_size(node, sizes):
                sizes.add(node.id)
            elif self._is_constant(node, sizes, constants):
                constants.add(node.id)
        self.sizes, self.constants = frozenset(sizes), frozenset(constants)
        self._defined = {value: -1 for value in graph.inputs}
        self._last_use = {}
        for index, node in enumerate(graph.nodes):
            self._defined[node.id] = index
            if not self.is_free(node.id):
                for value in node.values():
                    self._last_use[value] = index
        for value in graph.outputs:
            self._last_use[value] = len(graph.nodes)

    @property
    def graph(self) -> Graph:
        """The graph that is cut."""
        return self.lowered.graph

    def info(self, value: int) -> ValueInfo:
        """What the trace knows of a value."""
        return self.lowered.info[value]

    def is_free(self, value: int) -> bool:
        """Whether every stage can compute the value for itself."""
        return value in self.sizes or value in self.constants

    def crossing(self, position: int) -> list[int]:
        """Values defined before `position` and needed at or after it, model outputs among them, in order of
        definition."""
        return [
            value
            for value, last in sorted(self._last_use.items(), key=lambda item: (self._defined[item[0]], item[0]))
            if self._defined[value] < position <= last and not self.is_free(value)
        ]

    def defined_before(self, value: int, position: int) -> bool:
        """Whether the value exists at a cut at `position`."""
        return self._defined[value] < position

    def refusal(self, position: int) -> str:
        """Why no cut can be at `position`; "" if one can."""
        values = self.crossing(position)
        for value in values:
            reason = _uncrossable(self.info(value))
            if reason:
                return reason
        if not any(self.info(value).batch_dims for value in values):
            return "nothing with a batch dimension crosses"
        for name, (first, last) in self._written_spans.items():
            if first < position <= last:
                return f"buffer {name!r} is updated on both sides"
        return ""

    @property
    def _written_spans(self) -> dict[str, tuple[int, int]]:
        if not hasattr(self, "_spans"):
            spans: dict[str, tuple[int, int]] = {}
            for index, node in enumerate(self.graph.nodes):
                for name in node.buffers():
                    if name in self.written:
                        spans[name] = (spans.get(name, (index, index))[0], index)
            for name, value in self.graph.mutations:
                index = self._defined[value]
                first, last = spans.get(name, (index, index))
                spans[name] = (min(first, index), max(last, index))
            self._spans = spans
        return self._spans

    def _is_size(self, node: Node, sizes: set[int]) -> bool:
        if node.op == "sym_size":
            return self.info(node.id).is_batch
        return node.op in SYMBOLIC and all(value in sizes for value in node.values())

    def _is_constant(self, node: Node, sizes: set[int], constants: set[int]) -> bool:
        if any(True for _ in node.parameters()) or node.id in self.gradients or is_random(node.op, node.args):
            return False
        if any(name in self.written for name in node.buffers()):
            return False
        return all(value in sizes or value in constants for value in node.values())


def _uncrossable(info: ValueInfo) -> str:
    if info.type != "tensor":
        return f"a {info.type} would cross"
    if len(info.batch_dims) != sum(size == -1 for size in info.shape):
        return "a tensor would cross whose size follows the batch without being it"
    if info.permutation is None:
        return "a tensor with gaps in memory would cross"
    return ""


def cut_map(lowered: Lowered, gradients: frozenset[int], also_written: frozenset[str] = frozenset()) -> CutMap:
    """The cut map of one mode; `also_written` are buffers that the other mode changes."""
    return CutMap(lowered, gradients, frozenset(written_buffers(lowered.graph)) | also_written)
