"""Programs as a hostile peer would write them: built from the schemas of the allowlist, or mutated from valid ones.

Everything is drawn from a `random.Random`, so that a seed names a program.
"""

from __future__ import annotations

import contextlib
import copy
import json
from random import Random
from typing import Any

import torch
from torch import Tensor

from tensorlink.program.encode import NAMED
from tensorlink.program.ops import ALLOWED, PSEUDO
from tensorlink.program.values import DTYPES

OPS = sorted(ALLOWED)
NAMES = sorted([*ALLOWED, *PSEUDO])
DTYPE_POOL = sorted(DTYPES)
BATCH = 3

#: What a generated program declares: parameters, buffers and inputs of the shapes that ops like to take.
PARAMETERS = {
    "w": ["float32", [4, 4], True, []],
    "v": ["float32", [4], True, []],
    "k": ["float32", [4, 4, 3, 3], True, []],
    "g": ["float32", [16, 4], True, []],
}
BUFFERS = {
    "i": ["int64", [4], True, False],
    "j": ["int64", [3, 4], True, False],
    "b": ["bool", [4, 4], True, False],
    "c": ["complex64", [4, 4], True, False],
    "u": ["uint8", [4, 4], True, False],
    "s": ["float32", [], True, False],
    "o": ["int64", [3], True, False],
    "e": ["float32", [0, 4], True, False],
    "h": ["bfloat16", [4, 4], True, False],
    "y": ["float32", [2, 4, 6, 6], True, False],
    "z": ["float32", [6, 2, 4], True, False],
    "q": ["float32", [1, 2, 4], True, False],
}
INPUTS = [["x", "tensor", "float32", [-1, 4], True], ["t", "tensor", "int64", [-1], False]]
INTS = [-1, 0, 1, 2, 3, 4, -2, 5, 7, 1, 2, 0, -1, 1 << 20, 1 << 31, 1 << 40, -(1 << 63), (1 << 63) - 1]
FLOATS = [0.5, 0.0, 1.0, -1.0, 2.0, 0.1, 1e-5, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300]
TEXTS = [
    "sum", "mean", "prod", "amax", "amin", "ij", "xy", "same", "valid", "reflect", "circular", "constant", "replicate",
    "none", "floor", "trunc", "tanh", "left", "right", "ij,jk->ik", "ij->ji", "i,j->ij", "ii->i", "...ij,...jk",
    "a" * 60, "ij,kl,mn,op->ijklmnop", "", "->", "max",
]  # fmt: skip


def encoded(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _float(value: float) -> list[str]:
    return ["f", value.hex() if value == value and abs(value) != float("inf") else repr(value)]


def _reference(random: Random, values: list[int]) -> list[Any]:
    kind = random.random()
    if kind < 0.5:
        return ["v", random.choice(values)]
    return ["p", random.choice(list(PARAMETERS))] if kind < 0.75 else ["b", random.choice(list(BUFFERS))]


def argument(random: Random, kind: str, values: list[int]) -> Any:
    """An argument, in JSON, for the schema type `kind`; now and then one of another type."""
    if random.random() < 0.01:
        kind = random.choice(["Tensor", "int", "float", "str", "bool", "List[int]", "ScalarType"])
    if kind.startswith("Optional["):
        return None if random.random() < 0.5 else argument(random, kind[len("Optional[") : -1], values)
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        return ["l", *(argument(random, inner, values) for _ in range(random.choice([0, 1, 1, 2, 2, 2, 3, 4])))]
    if kind == "Tensor":
        return _reference(random, values)
    if kind in ("int", "SymInt"):
        return random.choice(INTS)
    if kind == "float":
        return _float(random.choice(FLOATS))
    if kind == "number":
        return random.choice([random.choice(INTS), _float(random.choice(FLOATS)), True])
    if kind == "bool":
        return random.random() < 0.5
    if kind == "str":
        return random.choice(TEXTS)
    if kind == "Device":
        return ["c"]
    tag = next(
        (tag for tag, (named, _) in NAMED.items() if named.__name__ == {"ScalarType": "DType"}.get(kind, kind)), "d"
    )
    return [tag, random.choice(sorted(NAMED[tag][1]))]


def node(random: Random, values: list[int], id: int, op: str | None = None) -> list[Any]:
    """A call that mostly fits the schema of its op."""
    op = op or random.choice(OPS)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    omitted = False
    for item in ALLOWED[op]._schema.arguments:
        if item.has_default_value() and random.random() < 0.4:
            omitted = True
            continue
        value = argument(random, str(item.real_type), values)
        if item.kwarg_only or omitted:
            kwargs[item.name] = value
        else:
            args.append(value)
    return [op, args, kwargs, id, random.random() < 0.95]


def generated(random: Random) -> dict[str, Any]:
    """A well-formed stage program of one to four random calls."""
    values, nodes = [0, 1], []
    for id in range(2, 2 + random.choice([1, 1, 2, 3, 4])):
        if values[-1] > 1 and random.random() < 0.2:
            nodes.append(["getitem", [["v", values[-1]], random.choice([0, 0, 1, -1])], {}, id, True])
        elif random.random() < 0.1:
            name = random.choice(sorted(PSEUDO))
            operands = [random.choice([["v", random.choice(values)], random.choice(INTS)]) for _ in range(PSEUDO[name])]
            if name == "sym_size":
                operands = [["v", random.choice(values)], random.choice([0, 1, -1, 5])]
            nodes.append([name, operands, {}, id, True])
        else:
            nodes.append(node(random, values, id))
        values.append(id)
    if random.random() < 0.1:
        nodes = [[*each, {"autocast": random.choice(["bfloat16", "float16"])}] for each in nodes]
    graph = {"inputs": [0, 1], "mutations": [], "nodes": nodes, "outputs": [values[-1]]}
    return {
        "kind": "stage", "version": 1, "stage_index": 0, "num_stages": 1, "train": graph, "eval": graph,
        "parameters": PARAMETERS, "buffers": BUFFERS, "inputs": INPUTS,
        "outputs": [["y", "tensor", "float32", [-1, 4], True]],
    }  # fmt: skip


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in the document."""
    found = []
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found.append((document, key))
        found += _places(value)
    return found


def mutated(random: Random, valid: dict[str, Any]) -> dict[str, Any]:
    """`valid` with one to three changes, most of which keep it well-formed."""
    document = copy.deepcopy(valid)
    for _ in range(random.choice([1, 1, 2, 3])):
        with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
            _change(random, document)  # an earlier change may have taken away what this one would change
    return document


def _change(random: Random, document: dict[str, Any]) -> None:
    graph = document.get("graph") or document.get(random.choice(["train", "train", "eval"]))
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    kind = random.randrange(12)
    if (
        kind == 0
        or not isinstance(nodes, list)
        or not nodes
        or not all(isinstance(n, list) and len(n) in (5, 6) for n in nodes)
    ):
        container, key = random.choice(_places(document))
        container[key] = random.choice([None, True, -1, 1 << 40, 1 << 70, "", "x", [], {}, [["v", 0]], 0])
        return
    at = random.randrange(len(nodes))
    target = nodes[at]
    ids = [n[3] for n in nodes[:at]] + list(graph["inputs"])
    if kind == 1:
        target[0] = random.choice(NAMES)
    elif kind == 2 and isinstance(target[1], list) and target[1]:
        target[1][random.randrange(len(target[1]))] = argument(
            random, random.choice(["Tensor", "int", "float", "List[int]", "bool", "number"]), ids or [0]
        )
    elif kind == 3:
        nodes.insert(random.randrange(len(nodes) + 1), copy.deepcopy(target))
    elif kind == 4:
        del nodes[at]
    elif kind == 5:
        other = random.randrange(len(nodes))
        nodes[at], nodes[other] = nodes[other], nodes[at]
    elif kind == 6:
        target[3] = random.choice([*ids, 0, 1 << 30, -1, 5])
    elif kind == 7:
        nodes[at] = node(random, ids or [0], target[3])
    elif kind == 8:
        _change_numbers(random, target)
    elif kind == 9:
        for holder in ("parameters", "buffers", "constants"):
            for spec in (document.get(holder) or {}).values():
                if random.random() < 0.3 and isinstance(spec, list) and len(spec) > 1:
                    spec[random.randrange(2)] = random.choice([random.choice(DTYPE_POOL), [4], [], [1 << 20, 1 << 20]])
    elif kind == 10:
        slot = random.choice(document.get("inputs") or [[None] * 5])
        slot[random.randrange(len(slot) or 1)] = random.choice(
            [[-1], [4, 4], "symint", "int64", "float16", True, [-1] * 4]
        )
    else:
        graph["outputs"] = [random.choice([*ids, target[3], 99])]


def _change_numbers(random: Random, item: Any) -> None:
    """Replaces numbers inside a node by other numbers."""
    for container, key in _places(item):
        if type(container[key]) is int and container is not item and random.random() < 0.5:
            container[key] = random.choice(INTS)


def tensor(random: Random, dtype: str, shape: list[int]) -> Tensor:
    """Data as a peer may send it: indices far out of range and numbers that are none among the usual."""
    shape = [BATCH if size == -1 else size for size in shape]
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    kind = DTYPES[dtype]
    if kind == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if kind.is_floating_point or kind.is_complex:
        data = torch.randn(shape, generator=generator).to(kind)
        if random.random() < 0.1:
            data = data * random.choice([float("nan"), float("inf"), 1e30, 0.0])
        return data
    high = random.choice([2, 4, 10])
    data = torch.randint(0, high, shape, generator=generator, dtype=torch.int64)
    if random.random() < 0.4 and data.numel():
        data.view(-1)[random.randrange(data.numel())] = random.choice(INTS)
    return data.to(kind)
