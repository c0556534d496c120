"""Large data from whoever has it: in pieces that are counted and hashed one by one, gone on with where it broke off.

Data is named by the digest of its manifest, which lists the digest of every piece. Who fetches it needs to trust that
name alone: a manifest or a piece that does not match is the sender's fault, and costs one request, not the transfer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec

from smartnodes_core.errors import DeadlineError, JobError, ProtocolError, RecordError, SmartnodesError
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.params import count_in, digest_in
from smartnodes_core.records import Count, Digest, NodeKey, Record, digest_of
from smartnodes_core.rpc import PendingCall, Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
MAX_PIECES = 100_000
MAX_MANIFEST_BYTES = 4 << 20
PIECES_UNDER_WAY = 8
REQUEST_TIMEOUT_S = 30.0
PAUSES_S = (0.05, 2.0)  # after a source failed: doubled each time, up to the second


class Manifest(Record, frozen=True, kw_only=True, tag="Manifest/1"):
    """What data consists of: pieces of PIECE_BYTES, the last one shorter, by their digests."""

    num_bytes: Count
    pieces: Annotated[list[Digest], msgspec.Meta(max_length=MAX_PIECES)]


def manifest_of(data: memoryview) -> Manifest:
    """The manifest of `data`. Raises ProtocolError where it is too large for one."""
    if len(data) > MAX_PIECES * PIECE_BYTES:
        raise ProtocolError(f"{len(data)} bytes are too many for one transfer: at most {MAX_PIECES * PIECE_BYTES}")
    pieces = [_digest(data[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES)]
    return Manifest(num_bytes=len(data), pieces=pieces)


def _digest(piece: memoryview) -> bytes:
    return digest_of("piece of a transfer", bytes(piece))


class Shelf:
    """What a node lets others fetch; to be served. `may_fetch(peer, digest)` raises AuthorityError to refuse."""

    def __init__(self, may_fetch: Callable[[Peer, bytes], None]) -> None:
        self._may_fetch = may_fetch
        self._lock = threading.Lock()
        self._held: dict[bytes, tuple[Manifest, memoryview]] = {}

    def put(self, data: memoryview) -> bytes:
        """Offers `data`, which must not change until `remove`; the name to fetch it by."""
        manifest = manifest_of(data)
        with self._lock:
            self._held[manifest.digest()] = (manifest, data)
        return manifest.digest()

    def remove(self, digest: bytes) -> None:
        """Offers it no longer."""
        with self._lock:
            self._held.pop(digest, None)

    @allow(max_body_bytes=0)
    def rpc_manifest(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The manifest whose `digest` is asked for."""
        manifest, _ = self._find(caller, params)
        return {}, [manifest.encode()]

    @allow(max_body_bytes=0)
    def rpc_piece(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Piece number `index` of the data named by `digest`."""
        manifest, data = self._find(caller, params)
        index = count_in(params, "index", len(manifest.pieces) - 1)
        return {}, [data[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]]

    def _find(self, caller: Peer, params: dict[str, Any]) -> tuple[Manifest, memoryview]:
        digest = digest_in(params, "digest")
        self._may_fetch(caller, digest)
        with self._lock:
            found = self._held.get(digest)
        if found is None:
            raise JobError(f"data {digest.hex()[:16]} is not held here")
        return found


class Fetch:
    """One transfer to this node: `run` until it returns; what has arrived stays between runs."""

    def __init__(self, node: Node, digest: bytes, max_bytes: int) -> None:
        self._node, self._digest, self._max_bytes = node, digest, max_bytes
        self._manifest: Manifest | None = None
        self._memory = memoryview(bytearray())
        self._missing: deque[int] = deque()
        self.num_refetched = 0

    def __repr__(self) -> str:
        return f"Fetch({self._digest.hex()[:8]}, {self.num_arrived} pieces, {len(self._missing)} missing)"

    @property
    def num_arrived(self) -> int:
        """Pieces that are here, each checked."""
        return 0 if self._manifest is None else len(self._manifest.pieces) - len(self._missing)

    def run(self, sources: Sequence[NodeKey], timeout_s: float) -> memoryview:
        """The whole, from any of `sources`, the next one where one fails.

        Raises DeadlineError, which says how far it came and why the last source failed, and ProtocolError for more
        than `max_bytes`.
        """
        deadline_s, pause_s, turn = time.monotonic() + timeout_s, PAUSES_S[0], 0
        waiting = threading.Event()
        while True:
            source = sources[turn % len(sources)]
            before = self.num_arrived
            try:
                self._run_from(source, deadline_s)
                return self._memory
            except SmartnodesError as error:
                if isinstance(error, _TooLargeError):
                    raise
                logger.info("%r: %s", self, error)
                left_s = deadline_s - time.monotonic()
                if left_s <= pause_s:
                    raise DeadlineError(f"{self!r} was not complete in {timeout_s:g} s: {error}") from error
            turn += 1
            pause_s = PAUSES_S[0] if self.num_arrived > before else min(PAUSES_S[1], 2 * pause_s)
            waiting.wait(pause_s)

    def _run_from(self, source: NodeKey, deadline_s: float) -> None:
        if self._manifest is None:
            self._begin(source, deadline_s)
        under_way: deque[tuple[int, PendingCall]] = deque()
        try:
            while self._missing or under_way:
                while self._missing and len(under_way) < PIECES_UNDER_WAY:
                    under_way.append((self._missing[0], self._ask(source, "piece", deadline_s, self._missing[0])))
                    self._missing.popleft()
                index, call = under_way[0]
                self._keep(index, call.result().body)
                under_way.popleft()
        finally:
            for index, call in under_way:
                call.cancel()
                self._missing.append(index)
                self.num_refetched += 1

    def _begin(self, source: NodeKey, deadline_s: float) -> None:
        manifest = Manifest.decode(self._ask(source, "manifest", deadline_s).result().body)
        if manifest.digest() != self._digest:
            raise RecordError(f"{source.hex()[:8]} sent the manifest of other data")
        if len(manifest.pieces) != -(-manifest.num_bytes // PIECE_BYTES):
            raise RecordError(f"a manifest of {manifest.num_bytes} bytes in {len(manifest.pieces)} pieces")
        if manifest.num_bytes > self._max_bytes:
            raise _TooLargeError(f"{manifest.num_bytes} bytes are more than the {self._max_bytes} that are taken")
        self._memory = memoryview(bytearray(manifest.num_bytes))
        self._missing.extend(range(len(manifest.pieces)))
        self._manifest = manifest

    def _ask(self, source: NodeKey, method: str, deadline_s: float, index: int | None = None) -> PendingCall:
        params = {"digest": self._digest} if index is None else {"digest": self._digest, "index": index}
        timeout_s = min(REQUEST_TIMEOUT_S, max(0.001, deadline_s - time.monotonic()))
        max_bytes = MAX_MANIFEST_BYTES if index is None else PIECE_BYTES
        return self._node.begin_call(source, method, params, bulk=True, timeout_s=timeout_s, max_body_bytes=max_bytes)

    def _keep(self, index: int, piece: memoryview) -> None:
        assert self._manifest is not None  # ours, not the peer's
        place = self._memory[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]
        if len(piece) != len(place) or _digest(piece) != self._manifest.pieces[index]:
            raise RecordError(f"piece {index} is not what the manifest lists")
        place[:] = piece


class _TooLargeError(ProtocolError):
    """No other source has less of it."""
