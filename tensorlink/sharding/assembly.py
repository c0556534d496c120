"""Builds the stage programs between chosen boundaries.

A stage's graph is its stretch of the nodes, preceded by what it computes for itself (sizes, tables from constants).
Ids are those of the uncut program, so dropout masks do not depend on the cut. A tensor that crosses in another memory
order than its dimensions' is sent in plain order and put back by three nodes with fresh ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tensorlink.errors import PartitionError
from tensorlink.program.graph import BufferSpec, Graph, Node, ParameterSpec, StageProgram, defined_ids
from tensorlink.program.trace import TracedModel
from tensorlink.program.values import Arg, Value
from tensorlink.records import Cut, Slot
from tensorlink.sharding.cuts import CutMap
from tensorlink.sharding.matching import Matching


class Boundary(NamedTuple):
    """A cut: its position in both graphs, and the training ids of the values that cross."""

    train: int
    evaluation: int
    values: tuple[int, ...]


class _Stretch(NamedTuple):
    """One stage's part of one graph: node indices, entering values, leaving values."""

    first: int
    last: int
    entering: tuple[int, ...]
    leaving: tuple[int, ...]


def assemble(traced: TracedModel, matching: Matching, boundaries: Sequence[Boundary]) -> list[StageProgram]:
    """The programs of the stages that `boundaries` separate."""
    train, evaluation = matching.train, matching.evaluation
    values = [boundary.values for boundary in boundaries]
    eval_values = [tuple(matching.to_eval[value] for value in boundary.values) for boundary in boundaries]
    train_graphs = [_graph(train, stretch) for stretch in _stretches(train, [b.train for b in boundaries], values)]
    eval_positions = [boundary.evaluation for boundary in boundaries]
    eval_graphs = [_graph(evaluation, stretch) for stretch in _stretches(evaluation, eval_positions, eval_values)]
    cuts = [traced.inputs, *(_cut(traced, train, boundary.values) for boundary in boundaries), traced.outputs]
    parameters = _parameters(traced, train_graphs, eval_graphs)
    buffers = _buffers(traced, train, train_graphs, eval_graphs)
    num_stages = len(boundaries) + 1
    return [
        StageProgram(
            stage_index=stage,
            num_stages=num_stages,
            train=train_graphs[stage],
            eval=eval_graphs[stage],
            parameters=parameters[stage],
            buffers=buffers[stage],
            inputs=cuts[stage],
            outputs=cuts[stage + 1],
        )
        for stage in range(num_stages)
    ]


def _stretches(cuts: CutMap, positions: Sequence[int], values: Sequence[tuple[int, ...]]) -> list[_Stretch]:
    graph = cuts.graph
    ends = [0, *positions, len(graph.nodes)]
    crossing = [graph.inputs, *values, graph.outputs]
    return [_Stretch(ends[k], ends[k + 1], crossing[k], crossing[k + 1]) for k in range(len(ends) - 1)]


def _graph(cuts: CutMap, stretch: _Stretch) -> Graph:
    graph = cuts.graph
    own = [node for node in graph.nodes[stretch.first : stretch.last] if not cuts.is_free(node.id)]
    mutations = tuple(pair for pair in graph.mutations if stretch.first <= _home(cuts, pair) < stretch.last)
    wanted = (
        {value for node in own for value in node.values()} | set(stretch.leaving) | {value for _, value in mutations}
    )
    free: list[Node] = []
    for node in reversed(graph.nodes):
        if node.id in wanted and cuts.is_free(node.id):
            free.append(node)
            wanted.update(() if _is_batch_size(node, cuts) else node.values())
    source = next((value for value in stretch.entering if cuts.info(value).batch_dims), None)
    if source is None and any(_is_batch_size(node, cuts) for node in free):
        raise PartitionError(
            "a stage needs the batch size and no tensor with a batch dimension enters it; cut elsewhere"
        )
    fresh = max(defined_ids(graph), default=0) + 1
    inputs, restored = [], []
    for slot, value in enumerate(stretch.entering):
        order = cuts.info(value).permutation if stretch.first else None
        if order is None or order == tuple(range(len(order))):
            inputs.append(value)
        else:
            inputs.append(fresh + 3 * slot)
            restored += _restored(fresh + 3 * slot, order, value)
    sizes = [
        _resized(node, source, cuts) if source is not None and _is_batch_size(node, cuts) else node
        for node in free[::-1]
    ]
    return Graph(tuple(inputs), tuple([*restored, *sizes, *own]), stretch.leaving, mutations)


def _home(cuts: CutMap, mutation: tuple[str, int]) -> int:
    """Index of the node after which a buffer's new value is known; values that every stage can compute belong to the
    first."""
    name, value = mutation
    indices = [index for index, node in enumerate(cuts.graph.nodes) if node.id == value or name in node.buffers()]
    return indices[-1] if indices else 0


def _is_batch_size(node: Node, cuts: CutMap) -> bool:
    return node.op == "sym_size" and node.id in cuts.sizes


def _resized(node: Node, source: int, cuts: CutMap) -> Node:
    """The batch size, read from a tensor that enters the stage."""
    return Node(node.op, (Value(source), cuts.info(source).batch_dims[0]), (), node.id, node.grad)


def _restored(entering: int, order: tuple[int, ...], value: int) -> list[Node]:
    """Nodes that give `value` the memory order it had before it was sent."""
    back: tuple[Arg, ...] = tuple(order.index(dim) for dim in range(len(order)))
    return [
        Node("aten.permute.default", (Value(entering), order), (), entering + 1),
        Node("aten.contiguous.default", (Value(entering + 1),), (), entering + 2),
        Node("aten.permute.default", (Value(entering + 2), back), (), value),
    ]


def _cut(traced: TracedModel, train: CutMap, values: Sequence[int]) -> Cut:
    slots = []
    for value in values:
        info = train.info(value)
        slots.append(
            Slot(
                name=f"value.{value}",
                type="tensor",
                dtype=info.dtype,
                shape=list(info.shape),
                requires_grad=value in traced.gradients,
            )
        )
    return Cut(slots=slots)


def _parameters(
    traced: TracedModel, train: Sequence[Graph], evaluation: Sequence[Graph]
) -> list[dict[str, ParameterSpec]]:
    """Each stage's parameters; one that is never used stays with the first stage, so that the state_dict is whole.

    One that is used on both sides of a cut is in every stage that uses it, and names them all.
    """
    used = [set(a.parameter_names()) | set(b.parameter_names()) for a, b in zip(train, evaluation, strict=True)]
    specs: list[dict[str, ParameterSpec]] = [{} for _ in train]
    for name, spec in traced.parameter_specs.items():
        holders = [stage for stage, names in enumerate(used) if name in names] or [0]
        for stage in holders:
            tied = tuple(holders) if len(holders) > 1 else ()
            specs[stage][name] = ParameterSpec(spec.dtype, spec.shape, spec.requires_grad, tied)
    return specs


def _buffers(
    traced: TracedModel, cuts: CutMap, train: Sequence[Graph], evaluation: Sequence[Graph]
) -> list[dict[str, BufferSpec]]:
    """Each stage's buffers and constants. One that changes has one home; unchanging ones are wherever they are read."""
    used = [set(a.buffer_names()) | set(b.buffer_names()) for a, b in zip(train, evaluation, strict=True)]
    specs: list[dict[str, BufferSpec]] = [{} for _ in train]
    for name, spec in traced.buffer_specs.items():
        holders = [stage for stage, names in enumerate(used) if name in names] or [0]
        if len(holders) > 1 and name in cuts.written:
            raise PartitionError(
                f"buffer {name!r} changes and would be in stages {holders}; use fewer stages, or one module for each "
                "place it is used"
            )
        for stage in holders:
            specs[stage][name] = spec
    return specs
