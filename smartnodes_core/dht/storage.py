"""A validator's list of who is there: the newest announcement of each node, to be searched by role.

What a DHT cannot answer, for it only knows ids; what it keeps is in `values.py`, under the same rules.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from smartnodes_core.dht.rules import check_signature, entry_of
from smartnodes_core.errors import BusyError, RecordError
from smartnodes_core.records import Announcement, Role, Signed

MAX_RECORDS = 20_000


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

        Raises what `rules.entry_of` and `check_signature` raise; BusyError when the store is full.
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
        entry = entry_of(signed, self._network_id, self._now_s())
        if not isinstance(entry.record, Announcement):
            raise RecordError(f"an announcement is needed, found a {type(entry.record).__name__}")
        check_signature(entry)
        return entry.record

    def _expire(self) -> None:
        now_s = self._now_s()
        for key in [key for key, stored in self._records.items() if stored.announcement.expires_at_s <= now_s]:
            del self._records[key]
