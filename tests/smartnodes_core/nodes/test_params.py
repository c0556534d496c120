from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.errors import ProtocolError
from smartnodes_core.nodes.params import bytes_in, bytes_list_in, count_in, digest_in, map_in, text_in

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=300) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(value=PLAIN)
def test_whatever_a_peer_sends_is_taken_as_its_type_or_refused(value):
    readers = [
        (bytes_in, bytes),
        (digest_in, bytes),
        (text_in, str),
        (map_in, dict),
        (lambda params, name: count_in(params, name, 10), int),
        (lambda params, name: bytes_list_in(params, name, 3), list),
    ]
    for read, kind in readers:
        with contextlib.suppress(ProtocolError):
            assert type(read({"name": value}, "name")) is kind
        with pytest.raises(ProtocolError, match="nothing"):
            read({}, "name")


def test_caps_are_kept():
    assert bytes_in({"a": b"12"}, "a", 2) == b"12"
    assert text_in({}, "a", "default") == "default"
    assert text_in({"a": "x"}, "a", "default") == "x"
    assert count_in({"a": 3}, "a", 3) == 3
    for read in (
        lambda: bytes_in({"a": b"123"}, "a", 2),
        lambda: digest_in({"a": bytes(31)}, "a"),
        lambda: text_in({"a": "x" * 257}, "a"),
        lambda: count_in({"a": 4}, "a", 3),
        lambda: count_in({"a": -1}, "a", 3),
        lambda: count_in({"a": True}, "a", 3),
        lambda: bytes_list_in({"a": [b""] * 3}, "a", 2),
        lambda: bytes_list_in({"a": [b"", 1]}, "a", 2),
    ):
        with pytest.raises(ProtocolError):
            read()
