"""The index of who is there, kept by validators: each has all announcements, and passes fresh ones on to the others.

Whoever looks for workers of some capability asks here; a DHT (`node.py`) finds only what somebody knows the key of. A
validator serves a `Directory`; every node uses `announce` and `find`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from smartnodes_core.dht.rules import MAX_RECORD_BYTES
from smartnodes_core.dht.storage import RecordStore
from smartnodes_core.errors import AuthorityError, PeerUnreachableError, ProtocolError, RecordError, SmartnodesError
from smartnodes_core.identity import verify
from smartnodes_core.nodes.base import Node
from smartnodes_core.records import Announcement, Role, Signed
from smartnodes_core.rpc import allow
from smartnodes_core.rpc.pool import WorkerPool
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

PAGE_RECORDS = 100
MAX_PAGE_BYTES = PAGE_RECORDS * (MAX_RECORD_BYTES + 256)
FORWARD_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 10.0

_pages = msgspec.msgpack.Decoder(list[bytes])


class Directory:
    """Served by validators: takes announcements from those they speak of and from other validators, and finds them."""

    def __init__(self, node: Node, store: RecordStore) -> None:
        self._node, self._store = node, store
        self._forwarding = WorkerPool("directory", 2)
        node.serve(self)

    def stop(self) -> None:
        """Ends passing on announcements."""
        self._forwarding.stop(1.0)

    def store(self, signed: Signed) -> bool:
        """Keeps an announcement and passes it on if it is fresh; see `RecordStore.store`."""
        fresh = self._keep(signed)
        if fresh:
            encoded = signed.encode()
            for record in self._store.find("validator", limit=PAGE_RECORDS):
                if record.signer not in (self._node.node_key, signed.signer):
                    self._forwarding.run(lambda key=record.signer: self._forward(key, encoded))  # type: ignore[misc]
        return fresh

    def find(self, role: Role | None = None, *, after: bytes = b"", limit: int = PAGE_RECORDS) -> list[Announcement]:
        """Live announcements known here; see `RecordStore.find`."""
        return [Announcement.decode(signed.record) for signed in self._store.find(role, after=after, limit=limit)]

    def sync_from(self, node_key: bytes, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Takes over everything that another validator keeps, as a validator that joins does; how many were new."""
        num_new = 0
        for signed in _find_signed(self._node, node_key, None, timeout_s):
            try:
                num_new += self._keep(signed)
            except SmartnodesError as error:
                logger.info("an announcement of %s was not taken over: %s", signed.signer.hex()[:8], error)
        return num_new

    def signed(self, node_key: bytes) -> Signed | None:
        """What a node announced last, as it signed it; None where nothing live is known."""
        return self._store.signed(node_key)

    @allow(max_body_bytes=0)
    def rpc_announce(self, caller: Peer, params: dict[str, Any], body: memoryview) -> dict[str, Any]:
        """`announcement`: an encoded Signed, by the caller itself."""
        signed = _signed_in(params)
        if signed.signer != caller.node_key:
            raise AuthorityError("a node announces itself, not others")
        if caller.role is not None and verify(signed, Announcement).role != caller.role:
            raise AuthorityError(f"{caller} announces another role than its binding gives it")
        return {"fresh": self.store(signed)}

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_forward_announcement(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """`announcement`: an encoded Signed that another validator has just received. Not passed on again."""
        self._keep(_signed_in(params))

    @allow(max_body_bytes=0)
    def rpc_find(self, caller: Peer, params: dict[str, Any], body: memoryview) -> tuple[dict[str, Any], list[bytes]]:
        """`role` (or none), `after` (the last key of the page before), `limit`; the body lists encoded Signed
        records.
        """
        role, after, limit = params.get("role"), params.get("after", b""), params.get("limit", PAGE_RECORDS)
        if role is not None and role not in get_args(Role):
            raise ProtocolError(f"there is no role {role!r}")
        if not isinstance(after, bytes) or not isinstance(limit, int) or limit < 1:
            raise ProtocolError("find takes after: bytes and limit: a positive number")
        page = self._store.find(role, after=after, limit=min(limit, PAGE_RECORDS))
        return {"num_records": len(page)}, [msgspec.msgpack.encode([signed.encode() for signed in page])]

    def _keep(self, signed: Signed) -> bool:
        fresh = self._store.store(signed)
        if fresh and signed.signer != self._node.node_key:
            _remember(self._node, Announcement.decode(signed.record))
        return fresh

    def _forward(self, node_key: bytes, encoded: bytes) -> None:
        try:
            self._node.notify(node_key, "forward_announcement", {"announcement": encoded}, timeout_s=FORWARD_TIMEOUT_S)
        except SmartnodesError as error:
            logger.info("an announcement could not be passed on to %s: %s", node_key.hex()[:8], error)


def announce(
    node: Node, bootstrap_keys: Sequence[bytes], announcement: Announcement, timeout_s: float = CALL_TIMEOUT_S
) -> int:
    """Tells the directories who and where `node` is; how many took it. Raises the last error when none did."""
    params = {"announcement": node.identity.sign(announcement).encode()}
    failure: SmartnodesError = PeerUnreachableError(
        "no bootstrap validator is known: name at least one in the settings"
    )
    num_taken = 0
    for key in bootstrap_keys:
        try:
            node.call(key, "announce", params, timeout_s=timeout_s)
            num_taken += 1
        except SmartnodesError as error:
            failure = error
            logger.info("announcing at %s: %s", key.hex()[:8], error)
    if not num_taken:
        raise failure
    return num_taken


def find(
    node: Node,
    bootstrap_keys: Sequence[bytes],
    role: Role | None,
    network_id: int,
    timeout_s: float = CALL_TIMEOUT_S,
) -> list[Announcement]:
    """All live announcements of `role` that the first directory to answer knows, checked; their addresses are
    remembered.

    Raises the last error when no directory answers.
    """
    failure: SmartnodesError = PeerUnreachableError(
        "no bootstrap validator is known: name at least one in the settings"
    )
    for key in bootstrap_keys:
        try:
            found = RecordStore(network_id)  # checks what the directory says as the directory itself does
            for signed in _find_signed(node, key, role, timeout_s):
                try:
                    found.store(signed)
                except SmartnodesError as error:
                    logger.info("%s gave a bad announcement: %s", key.hex()[:8], error)
            announcements = [Announcement.decode(signed.record) for signed in found.find(role, limit=len(found))]
            for announcement in announcements:
                _remember(node, announcement)
            return announcements
        except SmartnodesError as error:
            failure = error
            logger.info("finding at %s: %s", key.hex()[:8], error)
    raise failure


def _find_signed(node: Node, directory: bytes, role: Role | None, timeout_s: float) -> list[Signed]:
    found: list[Signed] = []
    after = b""
    while True:
        params = {"role": role, "after": after, "limit": PAGE_RECORDS}
        reply = node.call(directory, "find", params, timeout_s=timeout_s, max_body_bytes=MAX_PAGE_BYTES)
        try:
            page = [Signed.decode(data) for data in _pages.decode(reply.body)]
        except msgspec.DecodeError as error:
            raise RecordError(f"not a page of announcements: {error}") from None
        if not page:
            return found
        if page[-1].signer <= after:
            raise ProtocolError(f"directory {directory.hex()[:8]} repeats its pages")
        found += page
        after = page[-1].signer


def _signed_in(params: dict[str, Any]) -> Signed:
    data = params.get("announcement")
    if not isinstance(data, bytes):
        raise ProtocolError("announcement is missing")
    return Signed.decode(data)


def _remember(node: Node, announcement: Announcement) -> None:
    if announcement.node_key == node.node_key:
        return
    for endpoint in reversed(announcement.endpoints):
        try:
            node.add_address(announcement.node_key, endpoint)
        except SmartnodesError as error:
            logger.info("node %s announced a bad endpoint: %s", announcement.node_key.hex()[:8], error)
