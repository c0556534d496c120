"""JSON from strangers, with a bound on how deep it nests.

Python's decoders descend once per level and lean on the interpreter's recursion limit, which libraries raise: importing
web3 sets it to 100,000 (py_ecc does), and then a few hundred kilobytes of brackets overflow the stack and end the
process.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_JSON_DEPTH = 64

_TEXTS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


class NestingError(ValueError):
    """Nested deeper than anything that is meant."""


def bounded_json(data: bytes | memoryview, max_depth: int = MAX_JSON_DEPTH, **options: Any) -> Any:
    """`json.loads` of `data`. Raises ValueError where it is not JSON, NestingError (one) where it nests too deep."""
    data = bytes(data)
    depth = 0
    for bracket in _BRACKETS.finditer(_TEXTS.sub(b"", data)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > max_depth:
            raise NestingError(f"nested deeper than {max_depth}")
    return json.loads(data, **options)
