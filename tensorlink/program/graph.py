"""The stage program: a piece of a model as plain data, for training and for evaluation.

Role: what the user's side makes of a module and a worker runs without running a stranger's code (`design.md` section
4). A graph is a list of nodes in an order in which each uses only what came before; there are no loops and no
expressions, and the one way to branch is a `cond` node, which holds both its branches as graphs. Neighbours:
`encode.py` and `decode.py` (JSON), `trace.py` (makes them), `interpreter.py` (runs them), `limits.py` (bounds them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from smartnodes_core.records import digest_of
from tensorlink.program.values import Arg, Buffer, Parameter, Value, references, state_names
from tensorlink.records import Cut

VERSION = 1


@dataclass(frozen=True, slots=True)
class Node:
    """One call of an allowlisted op.

    `id` is unique in the uncut program and keeps its value in every cut of it: dropout masks are seeded by it.
    `grad` is False where the module computed under `no_grad`. `kwargs` is sorted by name. `autocast` is the dtype in
    which autocast computes there, "" where it is off. `branches` are the two graphs of a `cond`, for a predicate that
    is true and one that is false: they see nothing but the operands they are given, and no parameter by name.
    """

    op: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...]
    id: int
    grad: bool = True
    autocast: str = ""
    branches: tuple[Graph, ...] = ()

    def __str__(self) -> str:
        return f"node {self.id} ({self.op})"

    def values(self) -> Iterator[int]:
        """Ids of the values it reads, with repetitions."""
        for arg in (*self.args, *(arg for _, arg in self.kwargs)):
            for value in references(arg):
                yield value.id

    def parameters(self) -> Iterator[str]:
        """Names of the parameters it reads."""
        for arg in (*self.args, *(arg for _, arg in self.kwargs)):
            yield from state_names(arg, Parameter)

    def buffers(self) -> Iterator[str]:
        """Names of the buffers and constants it reads."""
        for arg in (*self.args, *(arg for _, arg in self.kwargs)):
            yield from state_names(arg, Buffer)


@dataclass(frozen=True, slots=True)
class Graph:
    """One mode of a program. `inputs` and `outputs` are value ids in the order of the cut's slots.

    `mutations` are pairs of buffer name and the id of the value that the buffer holds after a run. BatchNorm in
    training updates its statistics besides; `ops.MUTABLE_BUFFERS` says which arguments those are.
    """

    inputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    mutations: tuple[tuple[str, int], ...] = ()

    def parameter_names(self) -> list[str]:
        """Parameters in the order of their first use."""
        return list(dict.fromkeys(name for node in self.nodes for name in node.parameters()))

    def buffer_names(self) -> list[str]:
        """Buffers and constants in the order of their first use."""
        used = [name for node in self.nodes for name in node.buffers()]
        return list(dict.fromkeys([*used, *(name for name, _ in self.mutations)]))

    def all_nodes(self) -> Iterator[Node]:
        """Every node, those of branches after the node that holds them."""
        for node in self.nodes:
            yield node
            for branch in node.branches:
                yield from branch.all_nodes()

    def last_uses(self) -> dict[int, int]:
        """For each value id the index of the last node that reads it; outputs and mutations are never freed."""
        last = {value: index for index, node in enumerate(self.nodes) for value in node.values()}
        kept = {*self.outputs, *(value for _, value in self.mutations)}
        return {value: index for value, index in last.items() if value not in kept}


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter as the program declares it.

    `holders`: where it is tied over a cut, all stages that hold it, in order; their gradients are added
    (`pipeline/tied.py`). Empty for a parameter of one stage.
    """

    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    holders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """A buffer: `persistent` ones are in the wrapped module's state_dict; a constant was made by the trace."""

    dtype: str
    shape: tuple[int, ...]
    persistent: bool
    constant: bool = False


@dataclass(frozen=True)
class StageProgram:
    """What one stage computes in both modes; `inputs` and `outputs` are the same cut for both.

    In a slot's shape -1 stands where the size depends on the batch.
    """

    stage_index: int
    num_stages: int
    train: Graph
    eval: Graph
    parameters: Mapping[str, ParameterSpec]
    buffers: Mapping[str, BufferSpec]
    inputs: Cut
    outputs: Cut
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        object.__setattr__(self, "buffers", MappingProxyType(dict(self.buffers)))

    def to_json(self) -> bytes:
        """The canonical bytes: sorted keys, no blanks, floats exact."""
        from tensorlink.program.encode import encode_stage

        return encode_stage(self)

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> StageProgram:
        """The program in `data`. Raises ProgramError naming the node unless it is well-formed in every respect."""
        from tensorlink.program.decode import decode_stage

        return decode_stage(data)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that name the program: BLAKE3 of its canonical bytes, apart from every other kind of record."""
        return digest_of(f"stage program {self.version}", self.to_json())

    def graph(self, training: bool) -> Graph:
        """The graph of one mode."""
        return self.train if training else self.eval

    def expected_state(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name to (dtype, shape) of every parameter, buffer and constant: what `weights.load` is to find."""
        state = {name: (spec.dtype, spec.shape) for name, spec in self.parameters.items()}
        return state | {name: (spec.dtype, spec.shape) for name, spec in self.buffers.items()}


@dataclass(frozen=True)
class Constant:
    """A small tensor that travels inside a loss program. `data` is contiguous and little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class LossProgram:
    """A loss function as data: inputs are the model's outputs and then the targets; the one output is a scalar.

    Its constants (class weights and the like) are inside, so that `digest` binds everything the loss is made of.
    `rows` says of each input how many of its rows are one sample's, 0 for one that has nothing to do with the batch.
    """

    graph: Graph
    inputs: Cut
    outputs: Cut
    constants: Mapping[str, Constant]
    num_outputs: int
    rows: tuple[int, ...]
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))

    def to_json(self) -> bytes:
        """The canonical bytes."""
        from tensorlink.program.encode import encode_loss

        return encode_loss(self)

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> LossProgram:
        """The loss program in `data`. Raises ProgramError as `StageProgram.from_json` does."""
        from tensorlink.program.decode import decode_loss

        return decode_loss(data)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that name the loss; `StepOrder.loss` holds them."""
        return digest_of(f"loss program {self.version}", self.to_json())


def defined_ids(graph: Graph) -> set[int]:
    """Every id the graph defines, inputs and branches included."""
    inner = (defined_ids(branch) for node in graph.nodes for branch in node.branches)
    return {*graph.inputs, *(node.id for node in graph.nodes)}.union(*inner)


__all__ = [
    "VERSION",
    "BufferSpec",
    "Constant",
    "Graph",
    "LossProgram",
    "Node",
    "ParameterSpec",
    "StageProgram",
    "Value",
    "defined_ids",
]
