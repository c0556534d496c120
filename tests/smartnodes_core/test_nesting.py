"""What a stranger nests without end is refused, whatever the interpreter's recursion limit is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.nesting import MAX_JSON_DEPTH, NestingError, bounded_json

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(DOCUMENTS)
def test_what_is_meant_is_read_as_json_reads_it(document: object) -> None:
    data = json.dumps(document).encode()
    assert bounded_json(data) == json.loads(data)


def test_brackets_within_texts_do_not_count() -> None:
    text = '[{"\\' * 100
    assert bounded_json(json.dumps({"a": [text]}).encode()) == {"a": [text]}


def test_one_level_too_many_is_refused() -> None:
    assert bounded_json(b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH) is not None
    with pytest.raises(NestingError, match="deeper than 64"):
        bounded_json(b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1))


@pytest.mark.parametrize(
    "data", [b"", b"[", b"]" * 500, b'"' + b"[" * 10_000, b"\xff\xfe" + b"[" * 10_000, b"{" * 10_000]
)
def test_what_is_not_json_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        bounded_json(data)


def _with_a_raised_limit(code: str) -> str:
    """Runs code as in a process where some library has raised the recursion limit beyond the stack."""
    program = f"import sys, threading\nsys.setrecursionlimit(1_000_000)\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    return done.stdout.strip()


def test_a_nested_frame_header_does_not_overflow_the_stack() -> None:
    code = """
from smartnodes_core.errors import ProtocolError
from smartnodes_core.wire import MAX_HEADER_BYTES, decode_header
for bomb in (b"\\x91" * MAX_HEADER_BYTES, b"\\x81\\xa1a" * (MAX_HEADER_BYTES // 3)):
    try:
        decode_header(bomb)
    except ProtocolError as error:
        print("refused")
"""
    assert _with_a_raised_limit(code).split() == ["refused", "refused"]


def test_nested_json_does_not_overflow_the_stack() -> None:
    code = """
from smartnodes_core.nesting import NestingError, bounded_json
try:
    bounded_json(b"[" * (32 << 20))
except NestingError:
    print("refused")
"""
    assert _with_a_raised_limit(code) == "refused"


def test_connecting_to_a_chain_leaves_the_recursion_limit_as_it_was() -> None:
    code = """
import sys
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.errors import ChainUnreachableError
before = sys.getrecursionlimit()
try:
    Gateway("http://127.0.0.1:9")
except ChainUnreachableError:
    print("web3" in sys.modules, sys.getrecursionlimit() == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr[-500:]
