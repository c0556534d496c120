"""`torch.cond` in programs: what it costs, what a hostile program makes of it, and of autocast and random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorlink.errors import OverLimitError, ProgramError, TraceError
from tensorlink.program.admission import Admission, Bounds
from tensorlink.program.decode import MAX_BRANCH_DEPTH
from tensorlink.program.graph import Graph, Node, ParameterSpec, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.limits import check
from tensorlink.program.trace import trace
from tensorlink.program.values import Arg, Parameter, Value
from tensorlink.records import Cut, Slot


def _node(op: str, *args: Arg, id: int, **more: Any) -> Node:
    return Node(op, args, (), id, **more)


def _branch(first_id: int, *ops: str) -> Graph:
    """A graph of one operand and unary ops, one after the other."""
    nodes = [_node(op, Value(first_id + at), id=first_id + at + 1) for at, op in enumerate(ops)]
    return Graph((first_id,), tuple(nodes), (first_id + len(ops),))


def _program(*nodes: Node) -> StageProgram:
    graph = Graph((0,), nodes, (nodes[-1].id,))
    slots = [Slot(name="x", type="tensor", dtype="float32", shape=[-1, 4], requires_grad=False)]
    parameters = {"w": ParameterSpec("float32", (4, 4), True)}
    return StageProgram(0, 1, graph, graph, parameters, {}, Cut(slots=slots), Cut(slots=slots))


def _cond(if_true: Graph, if_false: Graph, *, id: int = 3, operands: tuple[Arg, ...] = (Value(0),)) -> Node:
    return _node("cond", Value(2), operands, id=id, branches=(if_true, if_false))


def _with(cond: Node, *after: Node) -> StageProgram:
    return _program(
        _node("aten.sum.default", Value(0), id=1),
        _node("aten.gt.Scalar", Value(1), 0, id=2),
        cond,
        *(after or (_node("getitem", Value(cond.id), 0, id=9),)),
    )


GOOD = _with(_cond(_branch(10, "aten.relu.default"), _branch(20, "aten.neg.default", "aten.exp.default")))


def test_a_program_with_branches_comes_back_from_its_bytes() -> None:
    assert StageProgram.from_json(GOOD.to_json()) == GOOD


def test_a_branch_is_taken_by_the_predicate_and_the_other_gets_zeros_for_gradients() -> None:
    interpreter = Interpreter(GOOD.train, {}, {})
    for x in (torch.ones(2, 4), -torch.ones(2, 4)):
        [found] = interpreter.run([x])
        assert torch.equal(found, x.relu() if x.sum() > 0 else (-x).exp())


def test_a_cond_costs_its_dearer_branch() -> None:
    plain = check(_program(_node("aten.relu.default", Value(0), id=1)), batch=2, max_bytes=1 << 20, max_flops=1000)
    found = check(GOOD, batch=2, max_bytes=1 << 20, max_flops=1000)
    assert plain.flops_forward == 8
    assert found.node_flops[3] == (16, 0)  # neg and exp of 8 elements


def _edited(edit: Callable[[Any], None]) -> bytes:
    document = json.loads(GOOD.to_json())
    for mode in ("train", "eval"):
        edit(document[mode]["nodes"][2])
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _more(**fields: Any) -> Callable[[Any], None]:
    return lambda node: node.__setitem__(5, {**node[5], **fields})


def _in_branch(key: str, value: Any) -> Callable[[Any], None]:
    return lambda node: node[5]["branches"][0].__setitem__(key, value)


MALFORMED: dict[str, tuple[Callable[[Any], None], str]] = {
    "one_branch": (lambda node: node[5]["branches"].pop(), "two branches"),
    "no_branches": (lambda node: node.pop(), "cond, and nothing else"),
    "branches_of_another_op": (lambda node: node.__setitem__(0, "getitem"), "cond, and nothing else"),
    "unknown_field": (_more(code=1), "may follow grad"),
    "empty_fields": (lambda node: node.__setitem__(5, {}), "may follow grad"),
    "unknown_autocast": (_more(autocast="float64"), "autocast to one of"),
    "autocast_off_written_out": (_more(autocast=""), "autocast to one of"),
    "unhashable_autocast": (_more(autocast=["bfloat16"]), "autocast to one of"),
    "value_of_outside": (_in_branch("nodes", [["aten.relu.default", [["v", 0]], {}, 11, True]]), "value 0 before"),
    "parameter_by_name": (_in_branch("nodes", [["aten.relu.default", [["p", "w"]], {}, 11, True]]), "'w'.*declared"),
    "buffer_written": (_in_branch("mutations", [["w", 11]]), "changes no buffer"),
    "id_of_outside": (_in_branch("nodes", [["aten.relu.default", [["v", 10]], {}, 1, True]]), "defined twice"),
    "input_of_outside": (_in_branch("inputs", [0]), "input id occurs twice"),
    "too_many_inputs": (_in_branch("inputs", [10, 12]), "take its operands"),
    "no_output": (_in_branch("outputs", []), "at least one"),
    "another_number_of_outputs": (_in_branch("outputs", [10, 11]), "as many"),
    "branches_of_text": (_more(branches=["a", "b"]), "object is needed"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_branch_is_refused_and_the_place_is_named(name: str) -> None:
    edit, message = MALFORMED[name]
    with pytest.raises(ProgramError, match=message):
        StageProgram.from_json(_edited(edit))


def _nested(depth: int, first_id: int = 100) -> Graph:
    """Two branches at each level, the inner ones in the first."""
    if depth == 0:
        return _branch(first_id, "aten.relu.default")
    inner = _nested(depth - 1, first_id + 10), _branch(first_id + 5, "aten.relu.default")
    cond = _node("cond", True, (Value(first_id),), id=first_id + 1, branches=inner)
    return Graph((first_id,), (cond, _node("getitem", Value(first_id + 1), 0, id=first_id + 2)), (first_id + 2,))


def test_branches_nest_to_a_depth_and_no_deeper() -> None:
    other = _branch(50, "aten.relu.default")
    allowed = _with(_cond(_nested(MAX_BRANCH_DEPTH - 1), other))
    check(StageProgram.from_json(allowed.to_json()), batch=2, max_bytes=1 << 20, max_flops=10_000)
    with pytest.raises(ProgramError, match=f"at most {MAX_BRANCH_DEPTH} deep"):
        StageProgram.from_json(_with(_cond(_nested(MAX_BRANCH_DEPTH), other)).to_json())


def _bomb(first_id: int) -> Graph:
    nodes = (
        _node("aten.expand.default", Value(first_id), (1 << 40, 2, 4), id=first_id + 1),
        _node("aten.exp.default", Value(first_id + 1), id=first_id + 2),
        _node("aten.sum.dim_IntList", Value(first_id + 2), (0,), id=first_id + 3),
    )
    return Graph((first_id,), nodes, (first_id + 3,))


@pytest.mark.parametrize(("max_bytes", "max_flops"), [(1 << 30, 1 << 60), (1 << 60, 1 << 30)])
@pytest.mark.parametrize("in_first", [True, False])
def test_a_bomb_in_a_branch_is_refused_before_anything_is_allocated(
    in_first: bool, max_bytes: int, max_flops: int
) -> None:
    branches = (_bomb(10), _branch(20, "aten.relu.default"))
    program = _with(_cond(*(branches if in_first else branches[::-1])))
    with pytest.raises(ProgramError, match=r"node 3 .* in a branch, node 12 "):
        check(program, batch=2, max_bytes=max_bytes, max_flops=max_flops)


WRONG_CONDS: dict[str, tuple[Node, str]] = {
    "branches_of_other_shapes": (_cond(_branch(10, "aten.sum.default"), _branch(20, "aten.relu.default")), "the same"),
    "a_branch_that_returns_a_number": (
        _cond(
            Graph((10,), (_node("sym_size", Value(10), 0, id=11),), (11,)),
            Graph((20,), (_node("sym_size", Value(20), 0, id=21),), (21,)),
        ),
        "returns tensors",
    ),
    "a_predicate_of_text": (_node("cond", "yes", (Value(0),), id=3, branches=GOOD.train.nodes[2].branches), "fit"),
    "operands_that_are_a_list_of_values": (
        _node("cond", Value(2), (("a",),), id=3, branches=GOOD.train.nodes[2].branches),
        "fit",
    ),
}


@pytest.mark.parametrize("name", WRONG_CONDS)
def test_a_cond_that_cannot_be_is_refused(name: str) -> None:
    cond, message = WRONG_CONDS[name]
    with pytest.raises(ProgramError, match=message):
        check(_with(cond), batch=2, max_bytes=1 << 20, max_flops=10_000)


def test_a_predicate_of_several_values_fails_and_names_the_node() -> None:
    program = _program(
        _node("aten.gt.Scalar", Value(0), 0, id=2), GOOD.train.nodes[2], _node("getitem", Value(3), 0, id=9)
    )
    with pytest.raises(ProgramError, match=r"node 3 .*ambiguous"):
        Interpreter(program.train, {}, {}).run([torch.ones(2, 4)])


AUTOCAST_BOMBS: dict[str, Node] = {
    "zeros": _node("aten.zeros.default", (1 << 40,), id=1, autocast="bfloat16"),
    "overflow": _node("aten.zeros.default", (1 << 40, 1 << 40), id=1, autocast="bfloat16"),
    "repeat": _node("aten.repeat.default", Value(0), (1 << 20, 1 << 20), id=1, autocast="float16"),
    "sizes_of_data": _node("aten.one_hot.default", Value(0), id=1, autocast="bfloat16"),
    "wrong_shape": _node("aten.mv.default", Value(0), Value(0), id=1, autocast="bfloat16"),
    "random_memory": _node("aten.rand.default", (1 << 40,), id=1),
    "random_memory_in_autocast": _node("aten.randn.default", (1 << 40,), id=1, autocast="bfloat16"),
    "random_integers": _node("aten.randint.low", 0, 9, (1 << 40,), id=1),
    "memory_on_no_device": _node("aten.full.default", (1 << 36,), 1, id=1),
}


@pytest.mark.parametrize("name", AUTOCAST_BOMBS)
def test_a_bomb_under_autocast_or_of_random_numbers_is_refused(name: str) -> None:
    with pytest.raises(ProgramError, match="node 1 "):
        check(_program(AUTOCAST_BOMBS[name]), batch=4, max_bytes=1 << 30, max_flops=10**9)


def test_recurrent_dropout_over_too_many_steps_is_refused() -> None:
    traced = trace(nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True), (torch.randn(2, 3, 4),))
    steps = traced.whole()
    slots = [Slot(name="x", type="tensor", dtype="float32", shape=[-1, 1 << 20, 4], requires_grad=False)]
    longer = StageProgram(0, 1, steps.train, steps.eval, steps.parameters, {}, Cut(slots=slots), steps.outputs)
    with pytest.raises(ProgramError, match="time steps"):
        check(longer, batch=2, max_bytes=1 << 40, max_flops=1 << 60)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.one, self.two, (x,))


def test_unused_parameters_of_a_cond_get_zeros_as_in_eager() -> None:
    module, x = Linears(), torch.ones(3, 4)
    program = trace(module, (x,)).whole()
    [found] = Interpreter(program.train, dict(module.named_parameters()), {}).run([x])
    gradients = torch.autograd.grad(found.sum(), [*module.parameters()])
    module(x).sum().backward()
    for found_gradient, parameter in zip(gradients, module.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(found_gradient, parameter.grad)
    assert not gradients[2].any()


def test_a_program_names_no_parameter_inside_a_branch() -> None:
    program = trace(Linears(), (torch.ones(3, 4),)).whole()
    [cond] = [node for node in program.train.nodes if node.op == "cond"]
    assert [name for branch in cond.branches for name in branch.parameter_names()] == []
    assert Parameter("one.weight") in cond.args[1]


def test_branches_of_other_shapes_are_an_error_at_the_trace() -> None:
    class Uneven(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x[:, :2], lambda x: x, (x,))

    with pytest.raises(TraceError):
        trace(Uneven(), (torch.ones(3, 4),))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["branches", "branches_in_autocast"])
def test_sizes_met_at_run_time_are_admitted_or_refused_in_branches_and_under_autocast(
    autocast: torch.dtype | None,
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, self.left, self.right, (x,))

    program = trace(Model(), (torch.randn(4, 8),), autocast=autocast).whole()
    parameters = {name: torch.zeros(spec.shape) for name, spec in program.parameters.items()}
    interpreter = Interpreter(program.train, parameters, {})
    interpreter.admit = Admission.of_stage(program, True, Bounds(max_bytes=1 << 20, max_flops=1 << 30))
    assert interpreter.run([torch.randn(6, 8)])[0].shape == (6, 8)
    with pytest.raises(OverLimitError, match="at most"):
        interpreter.run([torch.randn(20_000, 8)])


def test_divisors_that_a_kernel_would_trust_are_not_looked_at_where_they_have_no_data() -> None:
    divide = Node("aten.div.Tensor_mode", (Value(0), Value(0)), (("rounding_mode", "floor"),), 1, autocast="bfloat16")
    slots = [Slot(name="x", type="tensor", dtype="int64", shape=[-1, 4], requires_grad=False)]
    graph = Graph((0,), (divide,), (1,))
    program = StageProgram(0, 1, graph, graph, {}, {}, Cut(slots=slots), Cut(slots=slots))
    assert check(program, batch=2, max_bytes=1 << 20, max_flops=1 << 20).flops_forward
