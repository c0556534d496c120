"""A program's bytes: exact, canonical, and the same on every machine."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F

from tensorlink.errors import ProgramError
from tensorlink.program.graph import BufferSpec, Graph, LossProgram, Node, ParameterSpec, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.loss import constants_of
from tensorlink.program.trace import trace_loss
from tensorlink.program.values import Buffer, Device, DType, MemoryFormat, Parameter, Value
from tensorlink.records import Cut, Slot

CUT = Cut(slots=[Slot(name="x", type="tensor", dtype="float32", shape=[-1, 3], requires_grad=False)])


def _program() -> StageProgram:
    """Every kind of argument once."""
    nodes = (
        Node("sym_size", (Value(0), 0), (), 1),
        Node("aten.zeros.default", ((Value(1), 3),), (("device", Device()), ("dtype", DType("float32"))), 2, False),
        Node("aten.linear.default", (Value(0), Parameter("layer.weight"), None), (), 3),
        Node("aten.add.Tensor", (Value(3), Buffer("shift")), (("alpha", 0.1),), 4),
        Node("aten.masked_fill.Scalar", (Value(4), Buffer("mask"), -math.inf), (), 5),
        Node("aten.clone.default", (Value(5),), (("memory_format", MemoryFormat("contiguous_format")),), 6),
        Node("aten.gelu.default", (Value(6),), (("approximate", "tanh"),), 7),
    )
    graph = Graph((0,), nodes, (7,), (("shift", 2),))
    return StageProgram(
        stage_index=1,
        num_stages=3,
        train=graph,
        eval=Graph((0,), nodes, (7,)),
        parameters={"layer.weight": ParameterSpec("float32", (3, 3), True, holders=(0, 1))},
        buffers={"shift": BufferSpec("float32", (3,), True), "mask": BufferSpec("bool", (3,), False)},
        inputs=CUT,
        outputs=CUT,
    )


def test_a_program_comes_back_from_its_bytes() -> None:
    program = _program()
    again = StageProgram.from_json(program.to_json())
    assert again == program
    assert again.to_json() == program.to_json()


def test_the_digest_is_frozen() -> None:
    assert _program().digest.hex() == "512377eeef4152c2b6dc1e67fa786b3b731fc36cff2c3f0a08a46334fc6c37f5"


def test_floats_survive_exactly() -> None:
    values = (0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf)
    nodes = tuple(Node("aten.mul.Scalar", (Value(0), value), (), at + 1) for at, value in enumerate(values))
    graph = Graph((0,), nodes, (1,))
    again = StageProgram.from_json(StageProgram(0, 1, graph, graph, {}, {}, CUT, CUT).to_json())
    assert [repr(node.args[1]) for node in again.train.nodes] == [repr(value) for value in values]


def test_a_loss_is_bitwise_equal_to_the_function_and_carries_its_constants() -> None:
    weight = torch.rand(5)
    outputs, target = torch.randn(4, 5, requires_grad=True), torch.randint(0, 5, (4,))
    program = trace_loss(lambda y, t: F.cross_entropy(y, t, weight=weight, label_smoothing=0.1), outputs, target)
    again = LossProgram.from_json(program.to_json())
    assert again == program
    assert again.digest == program.digest
    for batch in (4, 1, 7):
        y, t = torch.randn(batch, 5, requires_grad=True), torch.randint(0, 5, (batch,))
        [loss] = Interpreter(again.graph, {}, constants_of(again), cut=again.inputs).run([y, t])
        expected = F.cross_entropy(y, t, weight=weight, label_smoothing=0.1)
        assert torch.equal(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, y)[0], torch.autograd.grad(expected, y)[0])


def test_other_constants_make_another_digest() -> None:
    def program(weight: float) -> LossProgram:
        scale = torch.tensor([weight, 1.0])
        return trace_loss(lambda y, t: ((y - t) ** 2 * scale).mean(), torch.randn(3, 2), torch.randn(3, 2))

    assert program(1.0).digest != program(2.0).digest
    assert program(2.0).digest == program(2.0).digest


@pytest.mark.parametrize("holders", [(1,), (0, 2), (1, 0), (0, 1, 1), (1, 3)])
def test_a_parameter_is_held_by_stages_that_there_are_and_by_this_one(holders: tuple[int, ...]) -> None:
    spec = ParameterSpec("float32", (3, 3), True, holders)
    program = dataclasses.replace(_program(), parameters={"layer.weight": spec})
    with pytest.raises(ProgramError, match=r"layer\.weight"):
        StageProgram.from_json(program.to_json())


@pytest.mark.parametrize("item", [True, [-1, 1], [0, "1"], [0, True], 1, None])
def test_holders_are_a_list_of_numbers(item: object) -> None:
    document = json.loads(_program().to_json())
    document["parameters"]["layer.weight"][3] = item
    with pytest.raises(ProgramError):
        StageProgram.from_json(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
