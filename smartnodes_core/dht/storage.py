"""Announcements that a node keeps for others: signed by those they speak of, sequenced, expiring, bounded in number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from smartnodes_core.errors import BusyError, RecordError, SignatureError
from smartnodes_core.identity import verify
from smartnodes_core.records import Announcement, Role, Signed

MAX_LIFETIME_S = 3600
MAX_RECORDS = 20_000
MAX_RECORD_BYTES = 16 << 10


@dataclass(frozen=True)
class _Stored:
    announcement: Announcement
    signed: Signed


class RecordStore:
    """The newest announcement of each node. `now_s` gives Unix time; safe to use from several threads."""

    def __init__(
        self, network_id: int, *, max_records: int = MAX_RECORDS, now_s: Callable[[], float] = time.time
    ) -> None:
        self._network_id, self._max_records, self._now_s = network_id, max_records, now_s
        self._records: dict[bytes, _Stored] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"RecordStore({len(self)} of at most {self._max_records} records)"

    def store(self, signed: Signed) -> bool:
        """Keeps an announcement; False when this or a newer one is known already.

        Raises SignatureError unless the announced node itself signed it, RecordError when it is for another network,
        over its size, expired, or lives longer than MAX_LIFETIME_S; BusyError when the store is full.
        """
        announcement = self._check(signed)
        with self._lock:
            known = self._records.get(announcement.node_key)
            if known is not None and known.announcement.sequence >= announcement.sequence:
                return False
            if known is None and len(self._records) >= self._max_records:
                self._expire()
                if len(self._records) >= self._max_records:
                    raise BusyError(f"{self._max_records} announcements are kept here, no more: announce elsewhere")
            self._records[announcement.node_key] = _Stored(announcement, signed)
            return True

    def find(self, role: Role | None = None, *, after: bytes = b"", limit: int = 100) -> list[Signed]:
        """Up to `limit` live announcements of `role` (None: all), by node key, beginning behind the key `after`."""
        now_s = self._now_s()
        with self._lock:
            found = sorted(
                key
                for key, stored in self._records.items()
                if key > after
                and stored.announcement.expires_at_s > now_s
                and (role is None or stored.announcement.role == role)
            )
            return [self._records[key].signed for key in found[:limit]]

    def get(self, node_key: bytes) -> Announcement | None:
        """The live announcement of one node."""
        with self._lock:
            stored = self._records.get(node_key)
        return stored.announcement if stored and stored.announcement.expires_at_s > self._now_s() else None

    def signed(self, node_key: bytes) -> Signed | None:
        """The same as its node signed it, to be shown to others."""
        with self._lock:
            stored = self._records.get(node_key)
        return stored.signed if stored and stored.announcement.expires_at_s > self._now_s() else None

    def remove(self, node_key: bytes) -> None:
        """Forgets a node, for example one that the chain has blacklisted."""
        with self._lock:
            self._records.pop(node_key, None)

    def _check(self, signed: Signed) -> Announcement:
        if len(signed.record) > MAX_RECORD_BYTES:
            raise RecordError(f"an announcement of {len(signed.record)} bytes: at most {MAX_RECORD_BYTES} are kept")
        announcement = verify(signed, Announcement)
        if announcement.node_key != signed.signer:
            raise SignatureError(
                f"node {signed.signer.hex()[:16]} signed an announcement of another, {announcement.node_key.hex()[:16]}"
            )
        if announcement.network_id != self._network_id:
            raise RecordError(f"an announcement for network {announcement.network_id}, here is {self._network_id}")
        left_s = announcement.expires_at_s - self._now_s()
        if left_s <= 0:
            raise RecordError(f"an announcement that expired {-left_s:.0f} s ago: check the clocks")
        if left_s > MAX_LIFETIME_S + 60:  # clocks differ a little
            raise RecordError(
                f"an announcement for {left_s:.0f} s: at most {MAX_LIFETIME_S} s are kept, then announce again"
            )
        return announcement

    def _expire(self) -> None:
        now_s = self._now_s()
        for key in [key for key, stored in self._records.items() if stored.announcement.expires_at_s <= now_s]:
            del self._records[key]
