"""The structure of what a module returns, as plain JSON, and back.

An integer n is the n-th output of the program; `["tuple", […]]`, `["list", […]]` and `["dict", [[key, …], …]]` hold
others; `["constant", value]` is a number, text or None that does not depend on the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from tensorlink.errors import TraceError
from tensorlink.program.capture import Literal

Spec = Any


def describe(tree: pytree.TreeSpec, leaves: list[int | Literal]) -> Spec:
    """The JSON form of a structure with these leaves. Mappings of any class become dicts, named tuples become
    tuples."""
    placed = [["constant", leaf.value] if isinstance(leaf, Literal) else leaf for leaf in leaves]
    plain = pytree.tree_unflatten([_Leaf(item) for item in placed], tree)
    return _describe(plain)


class _Leaf:
    def __init__(self, content: Any) -> None:
        self.content = content


def _describe(item: Any) -> Spec:
    if isinstance(item, _Leaf):
        return item.content
    if isinstance(item, Mapping):
        if not all(isinstance(key, str | int) for key in item):
            raise TraceError(f"the model returns a dict with keys {list(item)[:4]}; use text or integers")
        return ["dict", [[key, _describe(value)] for key, value in item.items()]]
    if isinstance(item, list | tuple):
        return ["list" if isinstance(item, list) else "tuple", [_describe(inner) for inner in item]]
    raise TraceError(f"the model returns a {type(item).__name__}; return tensors, or tuples, lists and dicts of them")


def rebuild(spec: Spec, outputs: Sequence[Any]) -> Any:
    """The structure that `spec` describes around the program's outputs, in plain tuples, lists and dicts."""
    if isinstance(spec, int):
        return outputs[spec]
    kind, content = spec
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: rebuild(inner, outputs) for key, inner in content}
    items = [rebuild(inner, outputs) for inner in content]
    return items if kind == "list" else tuple(items)
