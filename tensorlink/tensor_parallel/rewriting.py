"""A graph rewritten for one rank of several: node by node, with what is known of how each value is split.

Neighbours: `plan.py` (why), `rules.py` (per op). A rule looks first and changes nothing until it knows that it fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace

from tensorlink.program.graph import Graph, Node, StageProgram, defined_ids
from tensorlink.program.values import Arg, Buffer, Parameter, Value
from tensorlink.tensor_parallel import products, rules
from tensorlink.tensor_parallel.shapes import Found, Seen
from tensorlink.tensor_parallel.split import Split

#: How a value lies on the ranks: split, whole (None), or several of them.
Layout = Split | None | tuple["Layout", ...]
#: How far ways to split a matrix are compared before one is chosen: about the nodes of a transformer's block.
LOOK_AHEAD = 64


@dataclass(frozen=True)
class Drawn:
    """A random mask is drawn for the whole tensor, whose dimensions lie in `order`, and `split` like the value."""

    split: Split
    order: tuple[int, ...]


class Rewriting:
    """One walk over a graph. `weights` is added to; parameters in `decided` stay as `weights` has them, or whole."""

    def __init__(
        self,
        graph: Graph,
        program: StageProgram,
        found: Mapping[int, Found],
        num_parts: int,
        weights: dict[str, Split],
        decided: frozenset[str],
    ) -> None:
        self.graph, self.program, self.num_parts = graph, program, num_parts
        self.weights, self.drawn = weights, dict[int, Drawn]()
        self.gathered_elements = 0
        self._found, self._decided = found, decided
        self._layouts: dict[int, Layout] = {}
        self._nodes: list[Node] = []
        self._known: dict[tuple[str, Arg], Value] = {}
        self._used_whole: set[str] = set()
        self._next_id = max(defined_ids(graph), default=0) + 1
        self._at = 0
        self._chosen: int | None = None  # while ways to split are compared, the one that is tried

    def run(self) -> Graph:
        """The rewritten graph."""
        for at, node in enumerate(self.graph.nodes):
            self._at = at
            self._rewrite(node)
        outputs = tuple(self._whole_id(value) for value in self.graph.outputs)
        mutations = tuple((name, self._whole_id(value)) for name, value in self.graph.mutations)
        return Graph(self.graph.inputs, tuple(self._nodes), outputs, mutations)

    def _rewrite(self, node: Node) -> None:
        rule = rules.RULES.get(node.op)
        if rule is None or (node.op not in rules.STARTING and not self._is_touched(node)) or not rule(self, node):
            self._keep_whole(node)

    def _is_touched(self, node: Node) -> bool:
        return any(self._layouts.get(value) is not None for value in node.values()) or any(
            name in self.weights for name in node.parameters()
        )

    def _keep_whole(self, node: Node) -> None:
        args = tuple(self.whole(arg) for arg in node.args)
        kwargs = tuple((name, self.whole(arg)) for name, arg in node.kwargs)
        self._used_whole.update(name for name in node.parameters() if name not in self.weights)
        self._nodes.append(replace(node, args=args, kwargs=kwargs))

    # -- what rules ask -----------------------------------------------------------------------------------------------

    def seen(self, arg: Arg) -> Seen | None:
        """What is known of a tensor; None for what is none."""
        if isinstance(arg, Value):
            found = self._found.get(arg.id)
            return found if isinstance(found, Seen) else None
        if isinstance(arg, Parameter):
            spec = self.program.parameters[arg.name]
            return Seen(spec.shape, spec.requires_grad, tuple(range(len(spec.shape))))
        if isinstance(arg, Buffer):
            shape = self.program.buffers[arg.name].shape
            return Seen(shape, False, tuple(range(len(shape))))
        return None

    def result(self, node: Node) -> Found:
        """What is known of a node's result."""
        return self._found[node.id]

    def layout(self, arg: Arg) -> Layout:
        """How an argument lies on the ranks."""
        if isinstance(arg, Value):
            return self._layouts.get(arg.id)
        return self.weights.get(arg.name) if isinstance(arg, Parameter) else None

    def split(self, arg: Arg) -> Split | None:
        """The same of a single tensor."""
        layout = self.layout(arg)
        return layout if isinstance(layout, Split) else None

    def can_split(self, arg: Arg, split: Split) -> bool:
        """Whether a parameter is split so, or can be from its first use on."""
        if not isinstance(arg, Parameter):
            return False
        if arg.name in self.weights:
            return self.weights[arg.name] == split
        is_open = arg.name not in self._decided and arg.name not in self._used_whole
        return is_open and split.fits(self.program.parameters[arg.name].shape, self.num_parts)

    def blocks_for(self, node: Node, weight: Parameter, dim: int) -> int | None:
        """In how many blocks a matrix is split whose products nothing is known of yet; None where it cannot be."""
        if weight.name in self.weights:
            split = self.weights[weight.name]
            return split.blocks if split.dim == dim else None
        if self._chosen is not None:
            fitting = [self._chosen] if self.can_split(weight, Split(dim, self._chosen)) else []
            self._chosen = 1
        else:
            fitting = [b for b in products.block_counts(self, node) if self.can_split(weight, Split(dim, b))]
        if len(fitting) <= 1:
            return fitting[0] if fitting else None
        return min(fitting, key=self._elements_gathered_with)

    def _elements_gathered_with(self, blocks: int) -> int:
        """What is gathered within the next nodes where this one's matrix is split in `blocks`."""
        trial = copy(self)
        trial._chosen = blocks
        trial.weights, trial._nodes, trial._known = dict(self.weights), [], dict(self._known)
        trial._layouts, trial._used_whole, trial.drawn = dict(self._layouts), set(self._used_whole), {}
        for node in self.graph.nodes[self._at : self._at + LOOK_AHEAD]:
            trial._rewrite(node)
        return trial.gathered_elements

    def users(self, value: int) -> list[Node]:
        """The nodes after this one that read a value."""
        return [
            node for node in self.graph.nodes[self._at + 1 : self._at + LOOK_AHEAD] if value in tuple(node.values())
        ]

    # -- what rules do ------------------------------------------------------------------------------------------------

    def emit(self, node: Node, args: tuple[Arg, ...], layout: Layout, op: str = "") -> bool:
        """The node with these arguments, its result in this layout; always True, for a rule to end with."""
        self._nodes.append(replace(node, args=args, op=op or node.op))
        self._layouts[node.id] = layout
        return True

    def add(self, op: str, args: tuple[Arg, ...], near: Node) -> Value:
        """A further node, with the modes of `near`."""
        made = Value(self._next_id)
        self._next_id += 1
        self._nodes.append(Node(op, args, (), made.id, near.grad, near.autocast if op.startswith("aten") else ""))
        return made

    def assign(self, arg: Arg, split: Split) -> None:
        """A parameter is split so, as `can_split` allowed."""
        if isinstance(arg, Parameter):
            self.weights[arg.name] = split

    def used_whole(self, parameter: Parameter) -> None:
        """A parameter is used as a whole: it cannot be split from here on."""
        if parameter.name not in self.weights:
            self._used_whole.add(parameter.name)

    def draw(self, node: Node, split: Split, order: tuple[int, ...]) -> None:
        """The node's random mask is drawn for the whole tensor."""
        self.drawn[node.id] = Drawn(split, order)

    def entered(self, arg: Arg) -> Arg:
        """A whole argument where it meets split ones: its gradient is to be added over the ranks."""
        seen = self.seen(arg)
        if seen is None or not seen.needs_grad:
            return arg
        if isinstance(arg, Parameter):
            self.used_whole(arg)
        return self._once("tp.enter", arg, ())

    def taken(self, arg: Arg, split: Split) -> Arg:
        """A rank's part of a whole argument."""
        return self._once("tp.take", arg, (split.dim, split.blocks))

    def whole(self, arg: Arg) -> Arg:
        """An argument, or what is in it, gathered where it is split."""
        if isinstance(arg, tuple):
            return tuple(self.whole(item) for item in arg)
        split = self.split(arg)
        if split is None:
            return arg
        seen = self.seen(arg)
        if ("tp.gather", arg) not in self._known and seen is not None:
            self.gathered_elements += math.prod(seen.shape)
        return self._once("tp.gather", arg, (split.dim, split.blocks))

    def _whole_id(self, value: int) -> int:
        found = self.whole(Value(value))
        return found.id if isinstance(found, Value) else value

    def _once(self, op: str, arg: Arg, more: tuple[Arg, ...]) -> Value:
        key = (op, (arg, *more) if op == "tp.take" else arg)
        if key not in self._known:
            node = Node(op, (arg, *more), (), self._next_id)
            self._next_id += 1
            self._nodes.append(node)
            self._known[key] = Value(node.id)
        return self._known[key]
