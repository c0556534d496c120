"""Where a model is cut when its ends stay on the user's own machine, so that no worker sees raw inputs or labels.

A cut at the beginning is refused where anything crosses that follows from the inputs without a parameter that mixes
them, a cut at the end where a gradient crosses that follows from an output's without one: what is asked for is the
least that stays. Neighbours: `partition.py` cuts what is in between, `tensorlink/private.py` computes what stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from tensorlink.errors import PartitionError
from tensorlink.program.graph import Graph, Node, StageProgram
from tensorlink.program.trace import TracedModel
from tensorlink.sharding.assembly import Boundary
from tensorlink.sharding.cuts import CutMap
from tensorlink.sharding.matching import Matching

#: "first", "last" or "both": the outermost layer with parameters there. Or patterns of submodules' names.
Private = str | Sequence[str]

_WORDS = {"first": (True, False), "last": (False, True), "both": (True, True)}
#: What adds or multiplies a parameter element by element lets the other operand show through.
_ELEMENTWISE = ("aten.add.", "aten.sub.", "aten.mul.", "aten.div.")
#: More bytes than cross anywhere: a cut that takes in another layer comes last.
_FAR = 1 << 62


@dataclass(frozen=True)
class PrivateCut:
    """A model as the stages of workers and what the user keeps before and behind them; None where nothing is kept."""

    head: StageProgram | None
    stages: list[StageProgram]
    tail: StageProgram | None


def take_ends(programs: Sequence[StageProgram], num_stages: int, has_head: bool) -> PrivateCut:
    """The programs of `partition`, told apart: the workers' stages are numbered from 0."""
    first = int(has_head)

    def numbered(index: int, program: StageProgram) -> StageProgram:
        parameters = {
            name: replace(spec, holders=tuple(holder - first for holder in spec.holders))
            for name, spec in program.parameters.items()
        }
        return replace(program, stage_index=index, num_stages=num_stages, parameters=parameters)

    stages = [numbered(index, program) for index, program in enumerate(programs[first : first + num_stages])]
    tail = programs[first + num_stages] if len(programs) > first + num_stages else None
    return PrivateCut(programs[0] if has_head else None, stages, tail)


def private_ends(
    traced: TracedModel,
    matching: Matching,
    boundaries: Mapping[int, Boundary],
    num_bytes: Mapping[int, int],
    private: Private,
) -> tuple[int, int]:
    """Between which positions the workers' nodes lie; 0 and the number of nodes where an end is not private.

    Up to the next layer with parameters, the cut is where the fewest of `num_bytes` cross. Raises PartitionError for
    names that are unknown or in the middle, and where no cut keeps an end private.
    """
    graph = matching.train.graph
    first, last = 0, len(graph.nodes)
    least_head, last_tail = _asked_for(traced, matching.train, private)
    between = [at for at in _layers(graph) if least_head <= at < last_tail]
    if between and least_head:
        order = sorted(boundaries, key=lambda p: (num_bytes[p] if p <= between[0] else _FAR, p))
        first = _nearest(traced, matching, [boundaries[p] for p in order if p >= least_head], "head")
    if between and last_tail < last:
        order = sorted(boundaries, key=lambda p: (num_bytes[p] if p > between[-1] else _FAR, -p))
        last = _nearest(traced, matching, [boundaries[p] for p in order if p <= last_tail], "tail")
    if not any(first <= at < last for at in between):
        raise PartitionError(
            f"private={private!r} leaves no layer with parameters to workers: keep fewer layers, or train without a "
            "network"
        )
    return first, last


def refuse_ties(cut: PrivateCut) -> None:
    """Raises PartitionError for a parameter that is used here and on a worker."""
    for end, private in (("first", cut.head), ("last", cut.tail)):
        here = set(private.parameters) if private is not None else set()
        for stage in cut.stages:
            for name in sorted(here & set(stage.parameters)):
                raise PartitionError(
                    f"parameter {name!r} is tied and used in the private {end} layers and in stage "
                    f"{stage.stage_index}: keep every layer that uses it (private='both', or its layers' names), or "
                    "give each use a parameter of its own"
                )


def _layers(graph: Graph) -> list[int]:
    """Indices of nodes that read parameters."""
    return [at for at, node in enumerate(graph.nodes) if any(True for _ in node.parameters())]


def _asked_for(traced: TracedModel, train: CutMap, private: Private) -> tuple[int, int]:
    """How many nodes at the beginning stay at least, and from which on those at the end."""
    nodes, layers = train.graph.nodes, _layers(train.graph)
    if not layers:
        raise PartitionError("the model has no layer with parameters that could stay private")
    if isinstance(private, str):
        if private not in _WORDS:
            raise PartitionError(
                f"found private={private!r}, needed 'first', 'last', 'both', or a list of submodules' names"
            )
        first, last = _WORDS[private]
        return layers[0] + 1 if first else 0, layers[-1] if last else len(nodes)
    named = _named(traced, train, private)
    open_layers = [at for at in layers if at not in named] or [len(nodes)]
    middle = min((at for at in named if open_layers[0] < at < open_layers[-1]), default=None)
    if middle is not None:
        raise PartitionError(
            f"private layer {_name(train, nodes[middle])!r} is in the middle: "
            f"{_name(train, nodes[open_layers[0]])!r} runs before it and {_name(train, nodes[open_layers[-1]])!r} "
            "behind it. Private layers are the model's first or last ones: name those on one side of it too"
        )
    head = [at for at in named if at < open_layers[0]]
    tail = [at for at in named if at > open_layers[-1]]
    return max(head, default=-1) + 1, min(tail, default=len(nodes))


def _named(traced: TracedModel, train: CutMap, patterns: Sequence[str]) -> set[int]:
    """Indices of nodes that lie in a submodule that a pattern matches, or read one of its parameters."""
    names = {name: name for name in traced.parameters} | {
        alias: name for alias, name in traced.aliases.items() if name in traced.parameters
    }
    found: set[int] = set()
    for pattern in patterns:
        own = {name for alias, name in names.items() if _within(alias, pattern)}
        matching = {
            at
            for at, node in enumerate(train.graph.nodes)
            if not train.is_free(node.id) and (_within(_module(train, node), pattern) or own & set(node.parameters()))
        }
        if not matching:
            known = dict.fromkeys(_name(train, train.graph.nodes[at]).split(".")[0] for at in _layers(train.graph))
            raise PartitionError(f"private names {pattern!r}, which is no layer of the model; it has {list(known)}")
        found |= matching
    return found


def _within(path: str, pattern: str) -> bool:
    """Whether the pattern matches the path or a module around it."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def _name(train: CutMap, node: Node) -> str:
    """The submodule that a node belongs to."""
    return _module(train, node) or next((name.rpartition(".")[0] for name in node.parameters()), "") or str(node)


def _module(train: CutMap, node: Node) -> str:
    """The path of the submodule that made a node; the trace saw the user's module as `module`."""
    return train.info(node.id).module.removeprefix("module").removeprefix(".")


def _nearest(traced: TracedModel, matching: Matching, boundaries: Sequence[Boundary], end: str) -> int:
    """The position of the first of `boundaries` at which nothing crosses that no parameter has mixed."""
    train, evaluation = matching.train.graph, matching.evaluation.graph
    if end == "head":
        showing = _plain_from_inputs(train), _plain_from_inputs(evaluation)
    else:
        wanted = [at for at, value in enumerate(train.outputs) if value in traced.gradients]
        showing = _plain_to_outputs(train, wanted), _plain_to_outputs(evaluation, wanted)
    refused: Counter[str] = Counter()
    for boundary in boundaries:
        values = [value for value in boundary.values if end == "head" or value in traced.gradients]
        bad = [v for v in values if v in showing[0] or matching.to_eval[v] in showing[1]]
        if not bad:
            return boundary.train
        refused[matching.train.info(bad[0]).line or f"value {bad[0]}"] += 1
    reason = f" (most often in the way: {refused.most_common(1)[0][0]})" if refused else ""
    if end == "head":
        raise PartitionError(
            "no cut keeps the inputs private: at each place, an input itself or something computed from it without "
            f"parameters is still needed behind it{reason}. Leave that input out of example_inputs, or do without "
            "private first layers"
        )
    raise PartitionError(
        "no cut keeps the labels private: at each place, an output's gradient would reach workers without passing a "
        f"parameter{reason}. Return only what the loss needs, or do without private last layers"
    )


def _mixes(node: Node) -> bool:
    if node.branches:  # a parameter in one of them says nothing of the other
        return False
    return any(True for _ in node.parameters()) and not node.op.startswith(_ELEMENTWISE)


def _plain_from_inputs(graph: Graph) -> set[int]:
    """Values that follow from the inputs without a parameter that mixes them."""
    found = set(graph.inputs)
    for node in graph.nodes:
        if not _mixes(node) and any(value in found for value in node.values()):
            found.add(node.id)
    return found


def _plain_to_outputs(graph: Graph, wanted: Collection[int]) -> set[int]:
    """Values from which one of the wanted outputs follows without a parameter that mixes them."""
    found = {graph.outputs[at] for at in wanted}
    for node in reversed(graph.nodes):
        if node.id in found and not _mixes(node):
            found.update(node.values())
    return found
