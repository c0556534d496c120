"""What a hostile peer may send as a program: refused, naming the node, before anything is allocated."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorlink.program
from tensorlink.errors import ProgramError
from tensorlink.program.graph import Graph, Node, ParameterSpec, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.limits import check
from tensorlink.program.ops import ALLOWED, PSEUDO
from tensorlink.program.values import Arg, Parameter, Value
from tensorlink.records import Cut, Slot

LINEAR = "aten.linear.default"
GIGABYTE = 1 << 30


def _program(*nodes: Node, output: int | None = None, shape: tuple[int, ...] = (4, 4)) -> StageProgram:
    """A stage of these nodes over one input of shape [batch, 4] and one parameter "w"."""
    graph = Graph((0,), nodes, (nodes[-1].id if output is None else output,))
    slots = [Slot(name="x", type="tensor", dtype="float32", shape=[-1, 4], requires_grad=False)]
    return StageProgram(
        0, 1, graph, graph, {"w": ParameterSpec("float32", shape, True)}, {}, Cut(slots=slots), Cut(slots=slots)
    )


def _node(op: str, *args: Arg, id: int = 1, **kwargs: Arg) -> Node:
    return Node(op, args, tuple(sorted(kwargs.items(), key=lambda item: item[0])), id)


GOOD = _program(_node(LINEAR, Value(0), Parameter("w")))


def _edited(edit: Any) -> bytes:
    document = json.loads(GOOD.to_json())
    edit(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _set_node(node: Any) -> Any:
    def edit(document: Any) -> None:
        document["train"]["nodes"][0] = node

    return edit


MALFORMED: dict[str, tuple[Any, str]] = {
    "unknown_op": (_set_node(["aten.from_file.default", [["v", 0]], {}, 1, True]), "node 1 .*from_file.*allowlist"),
    "dunder_op": (_set_node(["__import__", [], {}, 1, True]), "node 1 .*allowlist"),
    "undefined_value": (_set_node([LINEAR, [["v", 7], ["p", "w"]], {}, 1, True]), "node 1 .*value 7 before"),
    "its_own_result": (_set_node([LINEAR, [["v", 1], ["p", "w"]], {}, 1, True]), "node 1 .*value 1 before"),
    "undeclared_parameter": (_set_node([LINEAR, [["v", 0], ["p", "other"]], {}, 1, True]), "node 1 .*'other'"),
    "id_of_an_input": (_set_node([LINEAR, [["v", 0], ["p", "w"]], {}, 0, True]), "node 0 .*defined twice"),
    "deep_argument": (_set_node([LINEAR, [["l", ["l", ["l", ["l", ["l", 1]]]]]], {}, 1, True]), "node 1 .*deep"),
    "long_list": (_set_node([LINEAR, [["l", *range(5000)]], {}, 1, True]), "node 1 .*4096"),
    "bare_float": (_set_node([LINEAR, [0.5], {}, 1, True]), "bare number"),
    "infinite_float": (_set_node([LINEAR, [["f", "1e999x"]], {}, 1, True]), "node 1 .*hexadecimal"),
    "huge_integer": (_set_node([LINEAR, [1 << 80], {}, 1, True]), "node 1 .*64 bits"),
    "unknown_dtype": (_set_node([LINEAR, [["d", "float128"]], {}, 1, True]), "node 1 .*float128"),
    "unknown_tag": (_set_node([LINEAR, [["x", "os"]], {}, 1, True]), "node 1 .*tag"),
    "negative_id": (_set_node([LINEAR, [["v", 0], ["p", "w"]], {}, -1, True]), "node -1 "),
    "unknown_key": (lambda document: document.update(code="1"), "unknown"),
    "other_version": (lambda document: document.update(version=2), "version"),
    "absurd_shape": (lambda document: document["parameters"].update(w=["float32", [1 << 60], True, []]), "shape"),
    "missing_output": (lambda document: document["eval"].update(outputs=[9]), "output 9"),
    "wrong_arity": (lambda document: document["eval"].update(outputs=[1, 1]), "slots"),
    "stage_out_of_range": (lambda document: document.update(stage_index=1), "stage 1 of 1"),
    "unwritable_buffer": (lambda document: document["train"].update(mutations=[["b", 1]]), "'b'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_program_is_refused_and_the_place_is_named(name: str) -> None:
    edit, message = MALFORMED[name]
    with pytest.raises(ProgramError, match=message):
        StageProgram.from_json(_edited(edit))


def test_arguments_nested_beyond_any_reason_are_refused() -> None:
    deep = b'["l",' * 100_000 + b"0" + b"]" * 100_000
    with pytest.raises(ProgramError, match=r"JSON|deep"):
        StageProgram.from_json(GOOD.to_json().replace(b'["v",0]', deep, 1))


def test_a_program_that_is_not_canonical_is_refused() -> None:
    data = GOOD.to_json()
    assert StageProgram.from_json(data) == GOOD
    with pytest.raises(ProgramError, match="canonical"):
        StageProgram.from_json(data.replace(b",", b", ", 1))


def test_a_program_of_too_many_bytes_is_refused_unread() -> None:
    with pytest.raises(ProgramError, match="at most"):
        StageProgram.from_json(memoryview(bytes(1 + (64 << 20))))


WRONG_CALLS: dict[str, Node] = {
    "missing_argument": _node(LINEAR, Value(0)),
    "text_for_a_tensor": _node(LINEAR, Value(0), "w"),
    "number_for_a_list": _node("aten.permute.default", Value(0), "01"),
    "none_for_an_integer": _node("aten.select.int", Value(0), None, 0),
    "unknown_keyword": _node(LINEAR, Value(0), Parameter("w"), weights=Parameter("w")),
    "too_many_arguments": _node(LINEAR, Value(0), Parameter("w"), None, None),
    "given_twice": _node(LINEAR, Value(0), Parameter("w"), weight=Parameter("w")),
    "sparse_gradients": _node("aten.embedding.default", Parameter("w"), Value(0), -1, False, True),
    "pinned_memory": _node("aten.zeros.default", (4,), pin_memory=True),
    "rank_of_a_hundred": _node("aten.zeros.default", (1,) * 100),
    "symbolic_text": _node("sym.add", "a", 1),
    "getitem_by_text": _node("getitem", Value(0), "__class__"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_call_that_does_not_fit_the_schema_is_refused_before_it_is_made(name: str) -> None:
    with pytest.raises(ProgramError, match="node 1 "):
        Interpreter(Graph((0,), (WRONG_CALLS[name],), (1,)), {"w": torch.ones(4, 4)}, {})


def _checked(*nodes: Node, shape: tuple[int, ...] = (4, 4)) -> None:
    check(_program(*nodes, shape=shape), batch=4, max_bytes=GIGABYTE, max_flops=10**12)


BOMBS: dict[str, tuple[Node, ...]] = {
    "zeros": (_node("aten.zeros.default", (1 << 40,)),),
    "overflowing_zeros": (_node("aten.zeros.default", (1 << 40, 1 << 40)),),
    "negative_zeros": (_node("aten.zeros.default", (-1,)),),
    "arange": (_node("aten.arange.default", 1 << 45),),
    "expand_then_add": (
        _node("aten.expand.default", Parameter("w"), (1 << 34, 4, 4)),
        _node("aten.add.Tensor", Value(1), 1, id=2),
    ),
    "expand_then_sum": (
        _node("aten.expand.default", Parameter("w"), (1 << 44, 4, 4)),
        _node("aten.sum.default", Value(1), id=2),
    ),
    "repeat": (_node("aten.repeat.default", Value(0), (1 << 20, 1 << 20)),),
    "pad": (_node("aten.constant_pad_nd.default", Value(0), (1 << 40, 1 << 40)),),
    "million_pieces": (
        _node("aten.expand.default", Parameter("w"), (1 << 24, 4, 4)),
        _node("aten.split.Tensor", Value(1), 1, id=2),
    ),
    "outer_product": (
        _node("aten.arange.default", 1 << 20),
        _node("aten.outer.default", Value(1), Value(1), id=2),
    ),
    "growing_size": (
        _node("sym_size", Value(0), 0),
        *(_node("sym.mul", Value(at), Value(at), id=at + 1) for at in range(1, 70)),
        _node("aten.zeros.default", (Value(70),), id=71),
    ),
    "division_by_zero": (_node("sym_size", Value(0), 0), _node("sym.floordiv", Value(1), 0, id=2)),
    "index_out_of_range": (_node("aten.select.int", Value(0), 1, 99),),
    "wrong_shape": (_node("aten.arange.default", 3), _node("aten.mv.default", Value(0), Value(1), id=2)),
    "tensor_for_a_size": (_node("aten.zeros.default", (Value(0),)),),
    "data_dependent_size": (_node("aten.one_hot.default", Value(0)),),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_anything_large_is_allocated(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ProgramError, match=r"node [0-9]+ "):
            _checked(*BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_parameters_larger_than_the_limit_are_refused() -> None:
    with pytest.raises(ProgramError, match="parameters and buffers take"):
        _checked(_node(LINEAR, Value(0), Parameter("w")), shape=(1 << 30, 4))


def test_a_program_with_more_operations_than_allowed_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"node 1 .*operations"):
        check(GOOD, batch=4, max_bytes=GIGABYTE, max_flops=10)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_mutated_bytes_never_raise_anything_but_a_program_error(data: st.DataObject) -> None:
    mutated = bytearray(GOOD.to_json())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.integers(0, 2))
        if kind == 0:
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == 1:
            del mutated[at : at + data.draw(st.integers(1, 8))]
        else:
            mutated[at:at] = data.draw(
                st.sampled_from([b"[", b"]", b"{", b"null", b'"', b"-", b"9" * 30, b"1e9", b"\\ud800"])
            )
    _attempt(bytes(mutated))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["v", "p", "l", LINEAR, "w"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(["train", "eval", "parameters", "buffers", "inputs", "outputs", "num_stages"]), _JSON)
def test_any_json_in_place_of_a_field_never_raises_anything_but_a_program_error(key: str, value: Any) -> None:
    _attempt(_edited(lambda document: document.update({key: value})))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted([*ALLOWED, *PSEUDO])),
    st.lists(
        st.sampled_from([["v", 0], ["p", "w"], 0, 1, -1, 3, None, True, ["f", "0x1p-1"], ["l", 1, 1], ["l", ["v", 0]]])
    ),
)
def test_any_allowed_op_on_any_arguments_never_raises_anything_but_a_program_error(op: str, args: list[Any]) -> None:
    _attempt(
        _edited(
            lambda document: [
                document[mode]["nodes"].__setitem__(0, [op, args, {}, 1, True]) for mode in ("train", "eval")
            ]
        )
    )


def _attempt(data: bytes) -> None:
    try:
        program = StageProgram.from_json(data)
        check(program, batch=3, max_bytes=GIGABYTE, max_flops=10**9)
    except ProgramError:
        pass


def test_nothing_in_the_package_unpickles_evaluates_or_looks_up_names_from_the_wire() -> None:
    forbidden = re.compile(r"\b(pickle|eval\(|exec\(|__import__|importlib|getattr\(|torch\.load|(?<!re\.)compile\()")
    for path in Path(tensorlink.program.__path__[0]).glob("*.py"):
        assert not forbidden.findall(path.read_text()), path.name
