"""Frames: how a header and a body lie on a connection. No I/O here; `transport/` moves the bytes.

    u32 header length | u64 body length | header: msgpack map of plain data | body: raw bytes        (big-endian)

Every length is checked before anything is allocated for it. The receiver, not the sender, decides where a body goes and
how large it may be: `FrameReader` asks `allocate` with the decoded header, then has the bytes written straight into the
memory that it returned. The layout is frozen by golden bytes in `tests/smartnodes_core/test_wire.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import msgspec

from smartnodes_core.errors import ProtocolError

Header = dict[str, Any]
Buffer = bytes | bytearray | memoryview

MAX_HEADER_BYTES = 64 << 10
MAX_HEADER_DEPTH = 16
MAX_DISCARDED_BODY_BYTES = 1 << 30

_PREFIX = struct.Struct(">IQ")
PREFIX_BYTES = _PREFIX.size
_DISCARD_BYTES = 64 << 10
_PLAIN = (str, int, bytes, bool, float, type(None))

_encoder = msgspec.msgpack.Encoder(order="sorted")


class Frame(NamedTuple):
    """A whole frame; `body` is the memory that `allocate` returned."""

    header: Header
    body: memoryview


def encode_prefix_and_header(header: Mapping[str, Any], num_body_bytes: int) -> bytes:
    """The bytes that go before a body of `num_body_bytes`. Raises ProtocolError when the header is over its cap."""
    try:
        encoded = _encoder.encode(header)
    except (TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a header holds only plain data: {error}") from None
    if len(encoded) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a header of {len(encoded)} bytes is over the cap of {MAX_HEADER_BYTES}: send large values in the body"
        )
    return _PREFIX.pack(len(encoded), num_body_bytes) + encoded


def decode_header(data: Buffer) -> Header:
    """The header in `data`.

    Raises ProtocolError unless it is a map with text keys of plain data, nested within the cap.
    """
    try:
        # msgpack bounds nesting by itself; msgspec leans on the interpreter's recursion limit, which web3 raises to
        # where a header of brackets alone overflows the stack
        header = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a frame's header is not a msgpack map: {error}") from None
    if not isinstance(header, dict):
        raise ProtocolError(f"a frame's header is not a msgpack map: found {type(header).__name__}")
    _check_plain(header, MAX_HEADER_DEPTH)
    return header


def _check_plain(value: object, depth: int) -> None:
    if isinstance(value, _PLAIN):
        return
    if depth == 0:
        raise ProtocolError(f"a frame's header nests deeper than {MAX_HEADER_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ProtocolError(f"a frame's header has a key of type {type(key).__name__}, only text is allowed")
            _check_plain(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, depth - 1)
    else:
        raise ProtocolError(f"a frame's header holds a {type(value).__name__}, only plain data is allowed")


def byte_views(body: Sequence[Buffer]) -> list[memoryview]:
    """The non-empty parts of `body` as flat views of bytes, uncopied.

    Raises ValueError for memory that is not contiguous.
    """
    views = [memoryview(part) for part in body]
    for view in views:
        if not view.c_contiguous:
            raise ValueError("a body must be contiguous memory")
    return [view.cast("B") for view in views if view.nbytes]


Allocate = Callable[[Header, int], memoryview | None]


class FrameReader:
    """Decodes a stream of frames, telling its owner where the next bytes belong.

    Loop: `view = reader.target()`, write some bytes to the start of `view`, `frame = reader.advance(count)`.
    `allocate(header, num_body_bytes)` returns writable memory of exactly that size, or None to have the body read and
    dropped (it then must not exceed MAX_DISCARDED_BODY_BYTES, and no frame comes out); what it raises passes through.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._header: Header | None = None
        self._body: memoryview | None = None
        self._body_bytes = 0
        self._left = 0  # of a body that is dropped
        self._filled = 0
        self._scratch = memoryview(b"")
        self._prefix = memoryview(bytearray(PREFIX_BYTES))
        self._current = self._prefix
        self._step: Callable[[], Frame | None] = self._on_prefix

    def __repr__(self) -> str:
        return f"FrameReader({self._step.__name__[4:]}, {self._filled} of {len(self._current)} bytes)"

    @property
    def between_frames(self) -> bool:
        """True when no frame has been begun: an end of the stream here loses nothing."""
        return self._current is self._prefix and self._filled == 0

    def target(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._current[self._filled :] if self._filled else self._current

    def advance(self, num_bytes: int) -> Frame | None:
        """Takes note that `num_bytes` were written to `target()`; returns the frame that they completed, if any.

        Raises ProtocolError for a length over its cap or a malformed header, and whatever `allocate` raises.
        """
        self._filled += num_bytes
        if self._filled < len(self._current):
            return None
        return self._step()

    def feed(self, data: memoryview) -> Iterator[Frame]:
        """Takes bytes that were read elsewhere: the frames that they complete. Raises as `advance`."""
        while data:
            target = self.target()
            count = min(len(target), len(data))
            target[:count] = data[:count]
            data = data[count:]
            frame = self.advance(count)
            if frame is not None:
                yield frame

    def _expect(self, memory: memoryview, step: Callable[[], Frame | None]) -> None:
        self._current, self._filled, self._step = memory, 0, step

    def _on_prefix(self) -> Frame | None:
        header_bytes, self._body_bytes = _PREFIX.unpack(self._prefix)
        if not 0 < header_bytes <= MAX_HEADER_BYTES:
            raise ProtocolError(f"a frame announces a header of {header_bytes} bytes: 1 to {MAX_HEADER_BYTES} are read")
        self._expect(memoryview(bytearray(header_bytes)), self._on_header)
        return None

    def _on_header(self) -> Frame | None:
        self._header = decode_header(self._current)
        body = self._allocate(self._header, self._body_bytes)
        if body is None:
            return self._begin_discarding()
        if body.nbytes != self._body_bytes or body.readonly or not body.c_contiguous:
            raise ValueError(
                f"allocate gave {body!r} of {body.nbytes} bytes, needed are {self._body_bytes} writable ones"
            )
        self._body = body.cast("B") if body.nbytes else body
        if not self._body_bytes:
            return self._on_body()
        self._expect(self._body, self._on_body)
        return None

    def _begin_discarding(self) -> Frame | None:
        if self._body_bytes > MAX_DISCARDED_BODY_BYTES:
            raise ProtocolError(
                f"a refused body of {self._body_bytes} bytes: at most {MAX_DISCARDED_BODY_BYTES} are skipped"
            )
        self._left = self._body_bytes
        if self._left:
            self._scratch = memoryview(bytearray(min(_DISCARD_BYTES, self._left)))
        return self._discard_more()

    def _discard_more(self) -> Frame | None:
        if self._left:
            part = self._scratch[: min(self._left, len(self._scratch))]
            self._left -= len(part)
            self._expect(part, self._discard_more)
        else:
            self._scratch = memoryview(b"")
            self._expect(self._prefix, self._on_prefix)
        return None

    def _on_body(self) -> Frame | None:
        header, body = self._header, self._body
        assert header is not None  # ours, not the peer's
        assert body is not None
        self._header = self._body = None
        self._expect(self._prefix, self._on_prefix)
        return Frame(header, body)
