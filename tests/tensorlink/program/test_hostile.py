"""What a hostile peer may send as a program: refused, naming the node, before anything is allocated."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorlink.program
from tensorlink.errors import OverLimitError, ProgramError
from tensorlink.program.admission import Admission, Bounds
from tensorlink.program.graph import Graph, Node, ParameterSpec, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.limits import check
from tensorlink.program.ops import ALLOWED, PSEUDO
from tensorlink.program.values import Arg, Buffer, DType, Parameter, Value
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
    "empty_and_overflowing_shape": (
        lambda document: document["parameters"].update(w=["float32", [1 << 47, 1 << 47, 0], True, []]),
        "no tensor can have",
    ),
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
    "sparse_gradients_of_gather": _node("aten.gather.default", Value(0), 0, Value(0), sparse_grad=True),
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
    "repeat_interleave": (_node("aten.repeat_interleave.self_int", Value(0), 1 << 40),),
    "one_hot": (
        _node("aten.zeros.default", (4,), dtype=DType("int64")),
        _node("aten.one_hot.default", Value(1), 1 << 40, id=2),
    ),
    "convolution_padding": (
        _node("aten.zeros.default", (1, 1, 4)),
        _node("aten.conv1d.default", Value(1), Value(1), None, (1,), (1 << 36,), (1,), 1, id=2),
    ),
    "power_of_sizes": (
        _node("sym_size", Value(0), 0),
        *(_node("sym.mul", Value(at), Value(at), id=at + 1) for at in range(1, 5)),
        _node("aten.zeros.default", (Value(5), 4), id=6),
    ),
    "doubling": tuple(_node("aten.cat.default", (Value(at), Value(at)), id=at + 1) for at in range(40)),
    "ones_where_no_device_is_named": (_node("aten.ones.default", (1 << 26, 8)),),
    "ones_where_the_device_is_none": (_node("aten.ones.default", (1 << 26, 8), device=None),),
    "eye": (_node("aten.eye.default", 1 << 16),),
    "expanded_output": (_node("aten.expand.default", Parameter("w"), (1 << 34, 4, 4)),),
    "inside_a_product": (
        _node("aten.expand.default", Parameter("w"), (1 << 28, 4, 4)),
        _node("aten.conv1d.default", Value(1), Parameter("w"), None, (1,), id=2),
    ),
    "inside_a_reduction": (
        _node("aten.expand.default", Parameter("w"), (1 << 28, 4, 4)),
        _node("aten.flip.default", Value(1), (0,), id=2),
    ),
    "gamma_terms": (_node("aten.mvlgamma.default", Value(0), 1 << 30),),
    "recurrent_layers": (
        _node("aten.zeros.default", (3, 4, 4)),
        _node("aten.zeros.default", (1, 4, 4), id=2),
        _node(
            "aten.gru.input", Value(1), Value(2), (Parameter("w"),) * 4, True, 1 << 40, 0.0, False, False, False, id=3
        ),
    ),
    "negative_size": (_node("aten.view.default", Value(0), (-5, 4)),),
    "overflowing_view": (_node("aten.view.default", Value(0), (1 << 62, 1 << 62)),),
    "select_far_out": (_node("aten.select.int", Value(0), 0, 1 << 62),),
    "slice_with_a_huge_step": (_node("aten.narrow.default", Value(0), 0, (1 << 63) - 1, (1 << 63) - 1),),
    "uncounted_arguments": (
        _node("aten.matmul.default", Value(0), id=1, other=Parameter("w")),
        _node("aten.expand.default", Value(1), (1 << 30, 4, 4), id=2),
        _node("aten.matmul.default", other=Parameter("w"), self=Value(2), id=3),
    ),
}


#: Private memory that refusing all bombs may take beyond what the process has: less than any single one needs.
BOMB_BYTES = 256 << 20


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    """What each bomb was refused with, in a process that could not have allocated it."""
    code = (
        "import importlib.util, json, resource, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('hostile', {str(Path(__file__))!r})\n"
        "hostile = importlib.util.module_from_spec(spec); spec.loader.exec_module(hostile)\n"
        "hostile.refuse_all()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


def refuse_all() -> None:
    """Runs in a process of its own: prints what came of each bomb."""
    _checked(_node("aten.layer_norm.default", Value(0), (4,)))  # what torch imports late, it imports now
    if sys.platform == "linux":
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
        limit = int(held.split()[1]) * 1024 + BOMB_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = {}
    for name, nodes in BOMBS.items():
        try:
            _checked(*nodes)
            found[name] = "let through"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(found))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_anything_large_is_allocated(name: str, refusals: dict[str, str]) -> None:
    assert re.match(r"(ProgramError|OverLimitError): .*node [0-9]+ ", refusals[name], re.DOTALL), refusals[name]
    assert "allocate memory" not in refusals[name]


def test_parameters_larger_than_the_limit_are_refused() -> None:
    with pytest.raises(ProgramError, match="parameters and buffers take"):
        _checked(_node(LINEAR, Value(0), Parameter("w")), shape=(1 << 30, 4))


def test_a_program_with_more_operations_than_allowed_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"node 1 .*operations"):
        check(GOOD, batch=4, max_bytes=GIGABYTE, max_flops=10)


FAR = 1 << 40
HOSTILE_DATA: dict[str, tuple[Node, dict[str, torch.Tensor]]] = {
    "gather": (_node("aten.gather.default", Value(0), 0, Buffer("i")), {"i": torch.full((4, 4), FAR)}),
    "gather_along_one_index": (
        _node("aten.gather.default", Value(0), 0, Buffer("i")),
        {"i": torch.full((4, 1), -FAR).expand(4, 4)},
    ),
    "index_select": (_node("aten.index_select.default", Value(0), 0, Buffer("i")), {"i": torch.tensor([FAR])}),
    "index": (_node("aten.index.Tensor", Value(0), (Buffer("i"),)), {"i": torch.tensor([-FAR])}),
    "index_put": (
        _node("aten.index_put.default", Value(0), (Buffer("i"),), Buffer("v"), True),
        {"i": torch.tensor([FAR]), "v": torch.ones(4)},
    ),
    "index_add": (
        _node("aten.index_add.default", Value(0), 0, Buffer("i"), Buffer("v")),
        {"i": torch.tensor([FAR]), "v": torch.ones(1, 4)},
    ),
    "embedding": (_node("aten.embedding.default", Value(0), Buffer("i")), {"i": torch.tensor([FAR])}),
    "embedding_bag": (
        _node("aten.embedding_bag.padding_idx", Value(0), Buffer("i"), Buffer("o"), False, 0, False, None, False, None),
        {"i": torch.tensor([FAR, 1]), "o": torch.tensor([0])},
    ),
    "embedding_bag_offsets": (
        _node("aten.embedding_bag.padding_idx", Value(0), Buffer("i"), Buffer("o"), False, 0, False, None, False, None),
        {"i": torch.tensor([1, 2]), "o": torch.tensor([0, -FAR, 1])},
    ),
    "scatter": (
        _node("aten.scatter.src", Value(0), 0, Buffer("i"), Value(0)),
        {"i": torch.full((4, 4), FAR)},
    ),
    "scatter_add": (
        _node("aten.scatter_add.default", Value(0), 0, Buffer("i"), Value(0)),
        {"i": torch.tensor([[-FAR]]).expand(4, 4)},
    ),
    "take": (_node("aten.take.default", Value(0), Buffer("i")), {"i": torch.tensor([FAR])}),
    "nll_loss": (_node("aten.nll_loss.default", Value(0), Buffer("i")), {"i": torch.full((4,), FAR)}),
    "ctc_loss": (
        _node("aten.ctc_loss.IntList", Buffer("p"), Buffer("i"), (9, 9), (4, 4)),
        {"p": torch.zeros(9, 2, 5), "i": torch.full((2, 4), FAR)},
    ),
    "ctc_loss_negative": (
        _node("aten.ctc_loss.Tensor", Buffer("p"), Buffer("i"), Buffer("n"), Buffer("m")),
        {"p": torch.zeros(9, 2, 5), "i": torch.full((8,), -FAR), "n": torch.tensor([9, 9]), "m": torch.tensor([4, 4])},
    ),
    "max_unpool": (
        _node("aten.max_unpool2d.default", Buffer("p"), Buffer("i"), (4, 4)),
        {"p": torch.ones(1, 1, 2, 2), "i": torch.full((1, 1, 2, 2), FAR)},
    ),
    "least_integer_by_minus_one": (
        _node("aten.div.Tensor_mode", Buffer("i"), Buffer("o"), rounding_mode="trunc"),
        {"i": torch.tensor([-(1 << 63)]), "o": torch.tensor([-1])},
    ),
    "least_integer_by_a_number": (
        _node("aten.div.Scalar_mode", Buffer("i"), -1, rounding_mode="trunc"),
        {"i": torch.tensor([-(1 << 63)])},
    ),
    "division_of_integers_by_zero": (
        _node("aten.remainder.Tensor", Buffer("i"), Buffer("o")),
        {"i": torch.tensor([1]), "o": torch.tensor([0])},
    ),
    "sorter": (
        _node("aten.searchsorted.Tensor", Buffer("p"), Buffer("p"), sorter=Buffer("i")),
        {"p": torch.ones(4), "i": torch.full((4,), FAR)},
    ),
    "weights_of_other_shapes": (
        _node(
            "aten.lstm.input", Buffer("x"), (Buffer("h"), Buffer("h")),
            (Buffer("v"), Buffer("w"), Buffer("b"), Buffer("b")), True, 1, 0.0, False, False, True,
        ),
        {
            "x": torch.ones(3, 5, 4), "h": torch.ones(1, 3, 4), "v": torch.ones(4), "w": torch.ones(16, 4),
            "b": torch.ones(16),
        },
    ),
    "states_of_other_dtypes": (
        _node(
            "aten.gru.input", Buffer("x"), Buffer("h"), (Buffer("w"), Buffer("w"), Buffer("b"), Buffer("b")),
            True, 1, 0.0, False, False, True,
        ),
        {
            "x": torch.ones(3, 5, 4), "h": torch.ones(1, 3, 4, dtype=torch.bool), "w": torch.ones(12, 4),
            "b": torch.ones(12),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_data_that_a_kernel_would_trust_is_refused_and_the_node_is_named(name: str) -> None:
    node, buffers = HOSTILE_DATA[name]
    interpreter = Interpreter(Graph((0,), (node,), (1,)), {}, dict(buffers))
    with pytest.raises(ProgramError, match="node 1 "):
        interpreter.run([torch.ones(4, 4)])
    assert all(torch.equal(tensor, HOSTILE_DATA[name][1][key]) for key, tensor in buffers.items())


def test_no_op_of_the_allowlist_writes_or_reaches_out_of_its_storage() -> None:
    """Running statistics are the reviewed exception; strides and storages are nobody's to name."""
    written = {
        name
        for name, op in ALLOWED.items()
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments)
    }
    assert written == set()
    assert not [name for name in ALLOWED if any(word in name for word in ("as_strided", "set_", "resize", "from_file"))]
    assert not [name for name in ALLOWED if re.search(r"[a-z0-9]_\.", name)]  # the in-place forms


def test_a_buffer_that_would_grow_from_run_to_run_is_refused() -> None:
    buffers = {"b": torch.ones(2, 4)}
    graph = Graph((0,), (_node("aten.cat.default", (Buffer("b"), Buffer("b"))),), (1,), (("b", 1),))
    with pytest.raises(ProgramError, match=r"buffer 'b' is float32 \[2, 4\], a run leaves float32 \[4, 4\] in it"):
        Interpreter(graph, {}, buffers).run([torch.ones(4, 4)])
    assert buffers["b"].shape == (2, 4)


def test_a_buffer_does_not_keep_the_large_tensor_alive_that_it_is_a_piece_of() -> None:
    buffers = {"b": torch.ones(4)}
    nodes = (_node("aten.ones.default", (1000, 4)), _node("aten.select.int", Value(1), 0, 5, id=2))
    Interpreter(Graph((0,), nodes, (2,), (("b", 2),)), {}, buffers).run([torch.ones(4, 4)])
    assert buffers["b"].untyped_storage().nbytes() == 16


def test_a_program_that_costs_more_for_smaller_batches_is_refused_when_one_comes() -> None:
    """`zeros(2**20 // batch**k)`: harmless for the batch that the job announces, a bomb for a single sample."""
    nodes = (
        _node("sym_size", Value(0), 0),
        _node("sym.floordiv", 1 << 40, Value(1), id=2),
        _node("sym.floordiv", Value(2), Value(1), id=3),
        _node("aten.zeros.default", (Value(3),), id=4),
        _node(LINEAR, Value(0), Parameter("w"), id=5),
    )
    program, bounds = _program(*nodes), Bounds(max_bytes=GIGABYTE, max_flops=10**15)
    check(program, batch=1 << 14, max_bytes=GIGABYTE, max_flops=10**12)
    interpreter = Interpreter(program.train, {"w": torch.ones(4, 4)}, {})
    interpreter.admit = Admission.of_stage(program, True, bounds)
    assert interpreter.run([torch.ones(1 << 14, 4)])[0].shape == (1 << 14, 4)
    with pytest.raises(OverLimitError, match=r"train node 4 .* bytes are needed at once"):
        interpreter.run([torch.ones(1, 4)])


def test_dropout_that_hides_in_a_keyword_is_refused() -> None:
    """It would draw from torch's own generator, and make an honest worker look fraudulent."""
    node = _node("aten.scaled_dot_product_attention.default", Value(0), Value(0), Value(0), dropout_p=0.5)
    with pytest.raises(ProgramError, match=r"node 1 .*random"):
        Interpreter(Graph((0,), (node,), (1,)), {}, {})


def test_noise_that_hides_in_a_keyword_is_refused() -> None:
    hiding = Node("aten.rrelu.default", (Value(0), 0.1, 0.3), (("training", True),), 1)
    with pytest.raises(ProgramError, match="draws random numbers"):
        Interpreter(_program(hiding).train, {}, {})


def test_a_slot_of_integers_cannot_ask_for_a_gradient() -> None:
    data = _edited(lambda document: document["inputs"].__setitem__(0, ["x", "tensor", "int64", [-1, 4], True]))
    with pytest.raises(ProgramError, match="int64' cannot have a gradient"):
        StageProgram.from_json(data)


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
