"""Frames: golden bytes, round trips however the bytes are cut, and every cap."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.errors import ProtocolError
from smartnodes_core.wire import (
    MAX_HEADER_BYTES,
    Frame,
    FrameReader,
    byte_views,
    decode_header,
    encode_prefix_and_header,
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
headers = st.dictionaries(st.text(max_size=8), plain, max_size=5)


def fresh(header: dict[str, Any], num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


def read_all(reader: FrameReader, data: bytes, step: int = 1 << 20) -> list[Frame]:
    frames = []
    view = memoryview(data)
    while view:
        target = reader.target()
        count = min(len(target), step, len(view))
        target[:count] = view[:count]
        view = view[count:]
        frame = reader.advance(count)
        if frame is not None:
            frames.append(frame)
    return frames


def test_the_bytes_of_a_frame_are_frozen() -> None:
    encoded = encode_prefix_and_header(
        {"method": "ping", "id": 7, "kind": "call", "params": {"b": b"\x01", "a": None}}, 5
    )
    assert encoded.hex() == (
        "0000002b000000000000000584a2696407a46b696e64a463616c6ca66d6574686f64a470696e67a6706172616d7382a161c0a162c40101"
    )
    assert encoded[:12] == struct.pack(">IQ", len(encoded) - 12, 5)


@given(st.lists(st.tuples(headers, st.binary(max_size=200)), max_size=4), st.integers(1, 50))
def test_frames_come_back_whole_however_the_bytes_are_cut(
    frames: list[tuple[dict[str, Any], bytes]], step: int
) -> None:
    data = b"".join(encode_prefix_and_header(header, len(body)) + body for header, body in frames)
    reader = FrameReader(fresh)
    got = read_all(reader, data, step)
    assert [(frame.header, bytes(frame.body)) for frame in got] == frames
    assert reader.between_frames


def test_a_body_is_written_straight_into_the_memory_that_was_allocated() -> None:
    memory = memoryview(bytearray(8))
    reader = FrameReader(lambda header, num_bytes: memory)
    (frame,) = read_all(reader, encode_prefix_and_header({}, 8) + b"12345678")
    assert frame.body.obj is memory.obj
    assert bytes(memory) == b"12345678"


@pytest.mark.parametrize("header_bytes", [0, MAX_HEADER_BYTES + 1, 2**32 - 1])
def test_a_header_over_its_cap_is_refused_from_its_length_alone(header_bytes: int) -> None:
    with pytest.raises(ProtocolError, match="header of"):
        read_all(FrameReader(fresh), struct.pack(">IQ", header_bytes, 0))


def test_a_header_over_its_cap_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="in the body"):
        encode_prefix_and_header({"x": bytes(MAX_HEADER_BYTES)}, 0)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 60000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a" + b"\x91" * 17 + b"\xc0",
        b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x81\xa1a\xc7\x03\x05abc",  # an extension
        b"\x81\xa1a\x81\x01\x02",  # a number as key
        b"\x93\x01\x02\x03",  # no map
        b"\x81\xa1a",  # truncated
        b"\x80\x80",  # more behind
        b"\x81\xa1\xff\x01",  # not UTF-8
    ],
)
def test_a_malformed_or_nested_header_is_a_protocol_error(bomb: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(bomb)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        read_all(FrameReader(lambda header, num_bytes: None), data)


def test_a_refused_body_is_skipped_and_the_next_frame_read() -> None:
    reader = FrameReader(lambda header, num_bytes: None if header["n"] == 1 else fresh(header, num_bytes))
    data = encode_prefix_and_header({"n": 1}, 200_000) + bytes(200_000) + encode_prefix_and_header({"n": 2}, 1) + b"x"
    (frame,) = read_all(reader, data)
    assert frame.header == {"n": 2}


def test_a_refused_body_without_end_is_not_skipped() -> None:
    with pytest.raises(ProtocolError, match="refused body"):
        read_all(FrameReader(lambda header, num_bytes: None), encode_prefix_and_header({}, 1 << 60))


@pytest.mark.parametrize("memory", [memoryview(bytearray(3)), memoryview(b"1234"), memoryview(bytearray(8))[::2]])
def test_memory_that_does_not_fit_is_our_own_fault(memory: memoryview) -> None:
    with pytest.raises(ValueError, match="allocate gave"):
        read_all(FrameReader(lambda header, num_bytes: memory), encode_prefix_and_header({}, 4))


def test_the_end_of_the_stream_is_clean_only_between_frames() -> None:
    reader = FrameReader(fresh)
    assert reader.between_frames
    read_all(reader, encode_prefix_and_header({}, 4) + b"12")
    assert not reader.between_frames


def test_views_of_a_body_are_flat_and_uncopied() -> None:
    memory = bytearray(8)
    (view,) = byte_views([memoryview(memory).cast("I"), b""])
    memory[0] = 9
    assert view[0] == 9
    with pytest.raises(ValueError, match="contiguous"):
        byte_views([memoryview(memory)[::2]])


@given(st.lists(st.tuples(headers, st.binary(max_size=200)), max_size=4), st.integers(1, 50))
def test_frames_that_come_together_come_back_one_by_one(frames: list[tuple[dict[str, Any], bytes]], step: int) -> None:
    data = b"".join(encode_prefix_and_header(header, len(body)) + body for header, body in frames)
    reader, found = FrameReader(fresh), []
    for at in range(0, len(data), step):
        found += list(reader.feed(memoryview(data)[at : at + step]))
    assert [(frame.header, bytes(frame.body)) for frame in found] == frames
    assert reader.between_frames


def test_a_malformed_frame_behind_a_good_one_is_refused_after_the_good_one_came() -> None:
    data = encode_prefix_and_header({"a": 1}, 0) + struct.pack(">IQ", MAX_HEADER_BYTES + 1, 0)
    frames = FrameReader(fresh).feed(memoryview(data))
    assert next(frames).header == {"a": 1}
    with pytest.raises(ProtocolError):
        next(frames)
