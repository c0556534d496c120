"""Which weights of a stage are split over the devices of a rig, and what each device then runs: a plan, plain data.

A graph is walked once, with the shapes of a run without data. A matrix product whose input is whole is split by its
outputs, each device computing some columns; what follows stays split for as long as `rules.py` knows how, through
activations, heads and attention, to a product that is split by its inputs, after which the devices' results are added
(Shoeybi et al., 2019, arXiv:1909.08053). Where no rule fits, a value is gathered; what cannot be split is replicated.
So a plan is at worst slow, never wrong. Both graphs of a stage share the weights: the one for training decides.
Neighbours: `rules.py` (what each op makes of split arguments), `shard_interpreter.py` (runs the graphs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tensorlink.program.graph import Graph, StageProgram
from tensorlink.tensor_parallel.rewriting import Drawn, Rewriting
from tensorlink.tensor_parallel.shapes import shapes_of
from tensorlink.tensor_parallel.split import Split


@dataclass(frozen=True)
class ShardedGraph:
    """What every rank runs, the same on all: the graph with the names of `shard_interpreter.COLLECTIVES` in it.

    `drawn`: which nodes draw the mask of a whole tensor and use their rank's part of it.
    """

    graph: Graph
    drawn: Mapping[int, Drawn]

    @property
    def collectives(self) -> dict[str, int]:
        """How many collectives of each kind a forward has."""
        counts = Counter(node.op for node in self.graph.nodes)
        return {name: counts[f"tp.{name}"] for name in ("reduce", "gather", "enter", "take")}


@dataclass(frozen=True)
class ShardingPlan:
    """`weights` names the parameters that are split; the others are replicated."""

    num_devices: int
    weights: Mapping[str, Split]
    train: ShardedGraph
    eval: ShardedGraph

    def of(self, training: bool) -> ShardedGraph:
        """The graph of one mode."""
        return self.train if training else self.eval

    def __str__(self) -> str:
        lines = [f"{self.num_devices} devices, {len(self.weights)} parameters split:"]
        lines += [f"  {name}: {split}" for name, split in self.weights.items()]
        counts = ", ".join(f"{count} {name}" for name, count in self.train.collectives.items())
        return "\n".join([*lines, f"  a forward: {counts}"])


def plan(program: StageProgram, num_devices: int, batch: int) -> ShardingPlan:
    """How `program` is split over `num_devices`. Shapes are looked at for `batch` samples, at least two: what is as
    large as the batch must not look like a one. Raises ProgramError where the program does not run."""
    if num_devices == 1:
        return ShardingPlan(1, {}, ShardedGraph(program.train, {}), ShardedGraph(program.eval, {}))
    weights: dict[str, Split] = {}
    decided: set[str] = set()
    sharded = []
    for graph in (program.train, program.eval):
        found = shapes_of(graph, program, max(2, batch))
        rewriting = Rewriting(graph, program, found, num_devices, weights, frozenset(decided))
        sharded.append(ShardedGraph(rewriting.run(), rewriting.drawn))
        decided.update(graph.parameter_names())
    return ShardingPlan(num_devices, dict(sorted(weights.items())), *sharded)
