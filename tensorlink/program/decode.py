"""Programs out of JSON, with every byte distrusted.

What is refused: too many bytes, unknown keys, types, tags, names and dtypes, deep or long lists, and anything that
would not encode to the same bytes again. Each refusal is a ProgramError that names the node. Neighbours: `encode.py`
(the format), `validate.py` (what must hold across a program's nodes).
"""

from __future__ import annotations

import base64
import binascii
from math import prod
from typing import Any, TypeVar

from smartnodes_core.errors import RecordError
from smartnodes_core.nesting import bounded_json
from tensorlink.errors import ProgramError
from tensorlink.program import validate
from tensorlink.program.encode import NAMED
from tensorlink.program.graph import (
    VERSION,
    BufferSpec,
    Constant,
    Graph,
    LossProgram,
    Node,
    ParameterSpec,
    StageProgram,
)
from tensorlink.program.values import AUTOCAST_DTYPES, DTYPES, Arg, Buffer, Device, Parameter, Value
from tensorlink.records import Cut, Slot

MAX_PROGRAM_BYTES = 64 << 20
MAX_ARGUMENT_DEPTH = 4
MAX_LIST_ITEMS = 4096
MAX_NAME_LENGTH = 256
MAX_BRANCH_DEPTH = 4

_INT64 = range(-(1 << 63), 1 << 63)

P = TypeVar("P", StageProgram, LossProgram)


def decode_stage(data: bytes | memoryview) -> StageProgram:
    """The stage program in `data`; raises ProgramError unless well-formed and canonical."""
    document = _parse(data, "stage")
    keys = {"stage_index", "num_stages", "train", "eval", "parameters", "buffers", "inputs", "outputs"}
    _keys(document, keys, "stage program")
    program = StageProgram(
        stage_index=_count(document["stage_index"], "stage_index"),
        num_stages=_count(document["num_stages"], "num_stages"),
        train=_graph_in(document["train"], "train"),
        eval=_graph_in(document["eval"], "eval"),
        parameters={name: _parameter_in(item, name) for name, item in _names(document["parameters"], "parameters")},
        buffers={name: BufferSpec(*_spec_in(item, name)) for name, item in _names(document["buffers"], "buffers")},
        inputs=_cut_in(document["inputs"], "inputs"),
        outputs=_cut_in(document["outputs"], "outputs"),
    )
    validate.stage(program)
    return _canonical(program, data)


def decode_loss(data: bytes | memoryview) -> LossProgram:
    """The loss program in `data`; raises ProgramError unless well-formed and canonical."""
    document = _parse(data, "loss")
    _keys(document, {"graph", "constants", "inputs", "outputs", "num_outputs", "rows"}, "loss program")
    program = LossProgram(
        graph=_graph_in(document["graph"], "loss"),
        constants={name: _constant_in(item, name) for name, item in _names(document["constants"], "constants")},
        inputs=_cut_in(document["inputs"], "inputs"),
        outputs=_cut_in(document["outputs"], "outputs"),
        num_outputs=_count(document["num_outputs"], "num_outputs"),
        rows=tuple(_count(item, "rows") for item in _list(document["rows"], "rows")),
    )
    validate.loss(program)
    return _canonical(program, data)


def _canonical(program: P, data: bytes | memoryview) -> P:
    if program.to_json() != bytes(data):
        raise ProgramError(
            "the program is not in canonical form: keys must be sorted, without blanks, floats by float.hex()"
        )
    return program


def _parse(data: bytes | memoryview, kind: str) -> dict[str, Any]:
    if len(data) > MAX_PROGRAM_BYTES:
        raise ProgramError(f"a program of {len(data)} bytes: at most {MAX_PROGRAM_BYTES} are read")
    try:
        document = bounded_json(data, parse_float=_no_float, parse_constant=_no_float)
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"a program that is not JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise ProgramError(f"a program is a JSON object, found {type(document).__name__}")
    found, version = document.pop("kind", None), document.pop("version", None)
    if found != kind or version != VERSION or isinstance(version, bool):
        raise ProgramError(f"a {kind} program of version {VERSION} is needed, found {found!r:.40} {version!r:.40}")
    return document


def _no_float(text: str) -> float:
    raise ValueError(f'bare number {text[:40]}: floats are written as ["f", float.hex()]')


def _keys(document: dict[str, Any], keys: set[str], what: str) -> None:
    if set(document) != keys:
        odd = sorted(set(document) ^ keys)
        raise ProgramError(f"{what}: keys {odd!r:.200} are unknown or missing; needed are {sorted(keys)}")


def _count(item: Any, what: str) -> int:
    if type(item) is not int or not 0 <= item < 1 << 31:
        raise ProgramError(f"{what}: a count below 2**31 is needed, found {item!r:.60}")
    return item


def _list(item: Any, what: str) -> list[Any]:
    if not isinstance(item, list):
        raise ProgramError(f"{what}: a list is needed, found {type(item).__name__}")
    return item


def _name(item: Any, what: str) -> str:
    if not isinstance(item, str) or not 0 < len(item) <= MAX_NAME_LENGTH or not item.isprintable():
        raise ProgramError(
            f"{what}: a printable name of 1 to {MAX_NAME_LENGTH} characters is needed, found {item!r:.60}"
        )
    return item


def _names(item: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(item, dict):
        raise ProgramError(f"{what}: an object is needed, found {type(item).__name__}")
    return [(_name(name, what), value) for name, value in item.items()]


def _shape_in(item: Any, what: str) -> tuple[int, ...]:
    dims = _list(item, what)
    if len(dims) > 32 or not all(type(dim) is int and 0 <= dim < 1 << 48 for dim in dims):
        raise ProgramError(f"{what}: a shape of at most 32 sizes below 2**48 is needed, found {dims!r:.80}")
    if prod(max(dim, 1) for dim in dims) >= 1 << 60:  # strides overflow even where nothing is in it
        raise ProgramError(f"{what}: a shape {dims!r:.80} that no tensor can have")
    return tuple(dims)


def _dtype_in(item: Any, what: str) -> str:
    if not isinstance(item, str) or item not in DTYPES:
        raise ProgramError(f"{what}: unknown dtype {item!r:.40}; known are {sorted(DTYPES)}")
    return item


def _spec_in(item: Any, name: str) -> tuple[str, tuple[int, ...], bool, bool]:
    fields = _list(item, name)
    if len(fields) != 4 or type(fields[2]) is not bool or type(fields[3]) is not bool:
        raise ProgramError(f"{name!r:.60}: [dtype, shape, flag, flag] is needed, found {fields!r:.80}")
    return _dtype_in(fields[0], name), _shape_in(fields[1], name), fields[2], fields[3]


def _parameter_in(item: Any, name: str) -> ParameterSpec:
    fields = _list(item, name)
    if len(fields) != 4 or type(fields[2]) is not bool:
        raise ProgramError(f"{name!r:.60}: [dtype, shape, flag, stages] is needed, found {fields!r:.80}")
    holders = tuple(_count(stage, name) for stage in _list(fields[3], name))
    return ParameterSpec(_dtype_in(fields[0], name), _shape_in(fields[1], name), fields[2], holders)


def _constant_in(item: Any, name: str) -> Constant:
    fields = _list(item, name)
    if len(fields) != 3 or not isinstance(fields[2], str):
        raise ProgramError(f"{name!r:.60}: [dtype, shape, base64] is needed")
    try:
        data = base64.b64decode(fields[2], validate=True)
    except (binascii.Error, ValueError):
        raise ProgramError(f"{name!r:.60}: not base64") from None
    return Constant(_dtype_in(fields[0], name), _shape_in(fields[1], name), data)


def _cut_in(item: Any, what: str) -> Cut:
    slots = []
    for fields in _list(item, what):
        if not isinstance(fields, list) or len(fields) != 5 or type(fields[4]) is not bool:
            raise ProgramError(f"{what}: a slot is [name, type, dtype, shape, requires_grad], found {fields!r:.80}")
        name, kind, dtype, shape, requires_grad = fields
        dims = _list(shape, what)
        if kind not in ("tensor", "symint") or len(dims) > 32:
            raise ProgramError(f"{what}: slot {name!r:.60} is neither tensor nor symint of at most 32 dims")
        if not all(type(dim) is int and -1 <= dim < 1 << 48 for dim in dims):
            raise ProgramError(f"{what}: slot {name!r:.60} has shape {dims!r:.80}; sizes are -1 to 2**48")
        if requires_grad and not (DTYPES[_dtype_in(dtype, what)].is_floating_point or dtype.startswith("complex")):
            raise ProgramError(f"{what}: slot {name!r:.60} of {dtype!r:.20} cannot have a gradient")
        slots.append(
            Slot(
                name=_name(name, what), type=kind, dtype=_dtype_in(dtype, what), shape=dims, requires_grad=requires_grad
            )
        )
    try:
        cut = Cut(slots=slots)
        return Cut.decode(cut.encode())
    except RecordError as error:
        raise ProgramError(f"{what}: {error}") from None


def _graph_in(item: Any, what: str, depth: int = 0) -> Graph:
    if depth > MAX_BRANCH_DEPTH:
        raise ProgramError(f"{what}: branches nest at most {MAX_BRANCH_DEPTH} deep")
    if not isinstance(item, dict):
        raise ProgramError(f"{what}: an object is needed, found {type(item).__name__}")
    _keys(item, {"inputs", "nodes", "outputs", "mutations"}, f"{what} graph")
    mutations = []
    for pair in _list(item["mutations"], f"{what} mutations"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ProgramError(f"{what} mutations: [buffer, id] is needed, found {pair!r:.60}")
        mutations.append((_name(pair[0], f"{what} mutations"), _count(pair[1], f"{what} mutations")))
    return Graph(
        inputs=tuple(_count(value, f"{what} inputs") for value in _list(item["inputs"], f"{what} inputs")),
        nodes=tuple(
            _node_in(node, index, what, depth) for index, node in enumerate(_list(item["nodes"], f"{what} nodes"))
        ),
        outputs=tuple(_count(value, f"{what} outputs") for value in _list(item["outputs"], f"{what} outputs")),
        mutations=tuple(mutations),
    )


def _node_in(item: Any, index: int, what: str, depth: int) -> Node:
    where = f"{what} node at position {index}"
    if not isinstance(item, list) or len(item) not in (5, 6):
        raise ProgramError(f"{where}: [op, args, kwargs, id, grad] is needed, found {item!r:.80}")
    op, args, kwargs, node_id, grad = item[:5]
    where = f"{what} node {node_id!r:.20} ({op!r:.60})"
    if type(grad) is not bool:
        raise ProgramError(f"{where}: grad is true or false, found {grad!r:.40}")
    autocast, branches = _more_in(item[5], where, depth) if len(item) == 6 else ("", ())
    return Node(
        op=_name(op, where),
        args=tuple(_arg_in(arg, where, 0) for arg in _list(args, where)),
        kwargs=tuple(sorted((name, _arg_in(arg, where, 0)) for name, arg in _names(kwargs, where))),
        id=_count(node_id, where),
        grad=grad,
        autocast=autocast,
        branches=branches,
    )


def _more_in(item: Any, where: str, depth: int) -> tuple[str, tuple[Graph, ...]]:
    """The dtype of autocast and the branches, of a node that has either."""
    if not isinstance(item, dict) or not item or not item.keys() <= {"autocast", "branches"}:
        raise ProgramError(f"{where}: autocast and branches may follow grad, found {item!r:.80}")
    autocast = item.get("autocast", "")
    if "autocast" in item and (not isinstance(autocast, str) or autocast not in AUTOCAST_DTYPES):
        raise ProgramError(f"{where}: autocast to one of {list(AUTOCAST_DTYPES)} is needed, found {autocast!r:.40}")
    branches = _list(item.get("branches", []), f"{where} branches")
    if "branches" in item and len(branches) != 2:
        raise ProgramError(f"{where}: a cond has two branches, found {len(branches)}")
    return autocast, tuple(_graph_in(branch, f"{where} branch", depth + 1) for branch in branches)


def _arg_in(item: Any, where: str, depth: int) -> Arg:
    if item is None or isinstance(item, bool):
        return item
    if isinstance(item, int):
        if item not in _INT64:
            raise ProgramError(f"{where}: integers have 64 bits, found one of {item.bit_length()}")
        return item
    if isinstance(item, str):
        if len(item) > MAX_NAME_LENGTH:
            raise ProgramError(f"{where}: a text argument of {len(item)} characters: at most {MAX_NAME_LENGTH}")
        return item
    if not isinstance(item, list) or not item or not isinstance(item[0], str):
        raise ProgramError(f"{where}: an argument is plain or a tagged list, found {item!r:.60}")
    tag, rest = item[0], item[1:]
    if tag == "l":
        if depth >= MAX_ARGUMENT_DEPTH or len(rest) > MAX_LIST_ITEMS:
            raise ProgramError(
                f"{where}: lists nest at most {MAX_ARGUMENT_DEPTH} deep and hold at most {MAX_LIST_ITEMS} items"
            )
        return tuple(_arg_in(inner, where, depth + 1) for inner in rest)
    if tag == "c" and not rest:
        return Device()
    if len(rest) != 1:
        raise ProgramError(f"{where}: malformed argument {item!r:.60}")
    return _tagged_in(tag, rest[0], where)


def _tagged_in(tag: str, item: Any, where: str) -> Arg:
    if tag == "v":
        return Value(_count(item, where))
    if tag in ("p", "b"):
        return Parameter(_name(item, where)) if tag == "p" else Buffer(_name(item, where))
    if tag == "f" and isinstance(item, str):
        try:
            return float(item) if item in ("inf", "-inf", "nan") else float.fromhex(item[:64])
        except (ValueError, OverflowError):
            raise ProgramError(f"{where}: {item!r:.60} is not a float in hexadecimal") from None
    if tag in NAMED:
        kind, table = NAMED[tag]
        if isinstance(item, str) and item in table:
            named: Arg = kind(item)
            return named
        raise ProgramError(f"{where}: {item!r:.40} is not a {kind.__name__}; known are {sorted(table)}")
    raise ProgramError(f"{where}: unknown argument tag {tag!r:.20}")
