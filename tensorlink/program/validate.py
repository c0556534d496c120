"""What must hold across a program: order, names, arity of the cut. Policy only; nothing is resolved or run here.

Neighbours: `decode.py` calls it on what came over the wire, `ops.py` says which names exist, `limits.py` bounds the
cost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod

from tensorlink.errors import ProgramError
from tensorlink.program.graph import Constant, Graph, LossProgram, Node, StageProgram
from tensorlink.program.ops import ALLOWED, COND, MUTABLE_BUFFERS, PSEUDO
from tensorlink.program.values import DTYPES, Buffer
from tensorlink.records import Cut

MAX_NODES = 1 << 17
MAX_STAGES = 4096
MAX_CONSTANT_BYTES = 1 << 20


def stage(program: StageProgram) -> None:
    """Raises ProgramError unless both graphs are in order and fit the program's declarations."""
    if not 0 <= program.stage_index < program.num_stages <= MAX_STAGES:
        raise ProgramError(
            f"stage {program.stage_index} of {program.num_stages}: at most {MAX_STAGES} stages, counted from 0"
        )
    for name, spec in program.parameters.items():
        _holders(name, spec.holders, program)
    both = set(program.parameters) & set(program.buffers)
    if both:
        raise ProgramError(f"{sorted(both)!r:.120} are parameters and buffers at once")
    for mode, graph in (("train", program.train), ("eval", program.eval)):
        _graph(graph, mode, program.parameters, program.buffers)
        _arity(graph, mode, program.inputs, program.outputs)
    constants = {name for name, spec in program.buffers.items() if spec.constant}
    written = {name for graph in (program.train, program.eval) for name in written_buffers(graph)}
    if constants & written:
        raise ProgramError(f"constants {sorted(constants & written)!r:.120} are written to; only buffers change")


def loss(program: LossProgram) -> None:
    """Raises ProgramError unless the loss is in order, has one output and small constants of the declared size."""
    _graph(program.graph, "loss", {}, program.constants)
    _arity(program.graph, "loss", program.inputs, program.outputs)
    if program.graph.mutations or written_buffers(program.graph):
        raise ProgramError("a loss keeps no state, found buffer mutations")
    fixed = [not slot.shape or slot.shape[0] != -1 for slot in program.inputs.slots]
    if [count == 0 for count in program.rows] != fixed:
        raise ProgramError(f"a loss says of each input how many rows are a sample's, found {program.rows!r:.80}")
    if len(program.graph.outputs) != 1:
        raise ProgramError(f"a loss has one output, found {len(program.graph.outputs)}")
    if not 0 <= program.num_outputs <= len(program.graph.inputs):
        raise ProgramError(
            f"a loss of {len(program.graph.inputs)} inputs cannot take {program.num_outputs} model outputs"
        )
    if sum(len(constant.data) for constant in program.constants.values()) > MAX_CONSTANT_BYTES:
        raise ProgramError(f"constants of a loss hold at most {MAX_CONSTANT_BYTES} bytes together")
    for name, constant in program.constants.items():
        _constant(name, constant)


def written_buffers(graph: Graph) -> set[str]:
    """Names of the buffers that a run of the graph changes: listed mutations and BatchNorm's statistics."""
    names = {name for name, _ in graph.mutations}
    for node in graph.nodes:
        write = MUTABLE_BUFFERS.get(node.op)
        if write is not None and len(node.args) > write.flag and node.args[write.flag] is True:
            names.update(arg.name for arg in (node.args[at] for at in write.buffers) if isinstance(arg, Buffer))
    return names


def _holders(name: str, holders: tuple[int, ...], program: StageProgram) -> None:
    if not holders:
        return
    in_order = list(holders) == sorted(set(holders)) and holders[-1] < program.num_stages
    if not in_order or len(holders) < 2 or program.stage_index not in holders:
        raise ProgramError(
            f"parameter {name!r:.60} is held by stages {list(holders)!r:.80}: needed are two or more of "
            f"{program.num_stages}, in order, with {program.stage_index} among them"
        )


def _constant(name: str, constant: Constant) -> None:
    needed = prod(constant.shape) * DTYPES[constant.dtype].itemsize
    if len(constant.data) != needed:
        raise ProgramError(f"constant {name!r:.60} has {len(constant.data)} bytes, {needed} are needed")


def _arity(graph: Graph, mode: str, inputs: Cut, outputs: Cut) -> None:
    for what, ids, cut in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        if len(ids) != len(cut.slots):
            raise ProgramError(f"{mode} graph has {len(ids)} {what}, its cut has {len(cut.slots)} slots")


def _graph(graph: Graph, mode: str, parameters: Mapping[str, object], buffers: Mapping[str, object]) -> None:
    num_nodes = sum(1 for _ in graph.all_nodes())
    if num_nodes > MAX_NODES:
        raise ProgramError(f"{mode} graph of {num_nodes} nodes: at most {MAX_NODES} are run")
    _ordered(graph, mode, parameters, buffers, set())
    _declared((name for name, _ in graph.mutations), buffers, "buffer", f"{mode} mutations")


def _ordered(
    graph: Graph, mode: str, parameters: Mapping[str, object], buffers: Mapping[str, object], ids: set[int]
) -> None:
    """A graph and its branches; `ids` are those that were defined anywhere, which are given once in a program."""
    defined = set(graph.inputs)
    if len(defined) != len(graph.inputs) or defined & ids:
        raise ProgramError(f"{mode} graph: an input id occurs twice")
    ids |= defined
    for node in graph.nodes:
        where = f"{mode} {node}"
        if node.op not in ALLOWED and node.op not in PSEUDO:
            raise ProgramError(f"{where}: the op is not on the allowlist")
        for value in node.values():
            if value not in defined:
                raise ProgramError(f"{where}: uses value {value} before it is defined")
        if node.id in ids:
            raise ProgramError(f"{where}: id {node.id} is defined twice")
        if (node.op == COND) != (len(node.branches) == 2):
            raise ProgramError(f"{where}: a cond, and nothing else, has two branches, found {len(node.branches)}")
        _declared(node.parameters(), parameters, "parameter", where)
        _declared(node.buffers(), buffers, "buffer", where)
        ids.add(node.id)
        for branch in node.branches:
            _branch(node, branch, where, ids)
        defined.add(node.id)
    for value in (*graph.outputs, *(value for _, value in graph.mutations)):
        if value not in defined:
            raise ProgramError(f"{mode} graph: output {value} is never defined")
    if len({name for name, _ in graph.mutations}) != len(graph.mutations):
        raise ProgramError(f"{mode} graph: a buffer is written twice")


def _branch(node: Node, branch: Graph, where: str, ids: set[int]) -> None:
    """A branch takes the operands of its cond, returns something, and has no other way in or out."""
    operands = node.args[1] if len(node.args) == 2 else None
    if not isinstance(operands, tuple) or len(branch.inputs) != len(operands) or not branch.outputs:
        raise ProgramError(f"{where}: its branches take its operands and return at least one value")
    if len(branch.outputs) != len(node.branches[0].outputs):
        raise ProgramError(f"{where}: both branches return as many values")
    if branch.mutations:
        raise ProgramError(f"{where}: a branch changes no buffer")
    _ordered(branch, f"{where} branch:", {}, {}, ids)


def _declared(names: Iterable[str], known: Collection[str], kind: str, where: str) -> None:
    for name in names:
        if name not in known:
            raise ProgramError(f"{where}: {kind} {name!r:.60} is not declared by the program")
