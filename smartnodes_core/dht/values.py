"""The records that a node of the DHT keeps: under each id the newest of each owner, bounded in every direction."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from smartnodes_core.dht.rules import Entry, check_signature, entry_of
from smartnodes_core.errors import BusyError
from smartnodes_core.records import NodeKey, Signed

MAX_BYTES = 64 << 20
MAX_PER_OWNER = 2048
MAX_OWNERS_PER_KEY = 32
#: What a record takes beside its own bytes.
_OVERHEAD_BYTES = 512


@dataclass
class _Kept:
    entry: Entry
    heard_s: float  # when somebody sent it last: it need not be passed on again soon


class ValueStore:
    """Thread-safe. `now_s` gives Unix time, `clock` is monotonic."""

    def __init__(
        self,
        network_id: int,
        *,
        max_bytes: int = MAX_BYTES,
        max_per_owner: int = MAX_PER_OWNER,
        now_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._network_id, self._max_bytes, self._max_per_owner = network_id, max_bytes, max_per_owner
        self._now_s, self._clock = now_s, clock
        self._kept: dict[int, dict[NodeKey, _Kept]] = {}
        self._num_of: Counter[NodeKey] = Counter()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(owners) for owners in self._kept.values())

    def __repr__(self) -> str:
        return f"ValueStore({len(self)} records, {self._num_bytes} of at most {self._max_bytes} bytes)"

    def entry_of(self, signed: Signed, *, late_s: float = 0.0) -> Entry:
        """See `rules.entry_of`; what ended `late_s` ago is let through."""
        return entry_of(signed, self._network_id, self._now_s() - late_s)

    def store(self, entry: Entry) -> bool:
        """Keeps a record; False when it or a newer one of its owner is kept. The signature is checked of what is new.

        Raises SignatureError, or BusyError when this node, this owner or this id has as many as are kept.
        """
        now_s = self._clock()
        with self._lock:
            if self._is_known(entry, now_s):
                return False
        check_signature(entry)
        with self._lock:
            if self._is_known(entry, now_s):
                return False
            if not self._has_room(entry):
                self._expire()
            if not self._has_room(entry):
                raise BusyError(f"{self!r}, {self._num_of[entry.owner]} of this owner: no more are kept here")
            owners = self._kept.setdefault(entry.key, {})
            self._forget(owners, entry.owner)
            owners[entry.owner] = _Kept(entry, now_s)
            self._num_of[entry.owner] += 1
            self._num_bytes += entry.num_bytes + _OVERHEAD_BYTES
            return True

    def entries(self, key: int) -> list[Entry]:
        """The live records under an id, one of each owner."""
        with self._lock:
            found = [kept.entry for kept in self._kept.get(key, {}).values()]
        return [entry for entry in found if self.is_live(entry)]

    def is_live(self, entry: Entry) -> bool:
        return entry.record.expires_at_s > self._now_s()

    def unheard_for(self, age_s: float, most: int | None = None) -> list[Entry]:
        """Live records (at most so many) that nobody has sent for so long; they count as heard of from now on."""
        now_s = self._clock()
        with self._lock:
            self._expire()
            due = [kept for owners in self._kept.values() for kept in owners.values() if now_s - kept.heard_s >= age_s]
            due = due[:most]
            for kept in due:
                kept.heard_s = now_s
            return [kept.entry for kept in due]

    def _is_known(self, entry: Entry, now_s: float) -> bool:
        known = self._kept.get(entry.key, {}).get(entry.owner)
        if known is None or known.entry.record.sequence < entry.record.sequence:
            return False
        if known.entry.signed == entry.signed:
            known.heard_s = now_s
        return True

    def _has_room(self, entry: Entry) -> bool:
        owners = self._kept.get(entry.key, {})
        known = owners.get(entry.owner)
        before_bytes = known.entry.num_bytes + _OVERHEAD_BYTES if known else 0
        return (
            self._num_bytes - before_bytes + entry.num_bytes + _OVERHEAD_BYTES <= self._max_bytes
            and self._num_of[entry.owner] - bool(known) < self._max_per_owner
            and len(owners) - bool(known) < MAX_OWNERS_PER_KEY
        )

    def _expire(self) -> None:
        now_s = self._now_s()
        for key, owners in list(self._kept.items()):
            for owner in [o for o, kept in owners.items() if kept.entry.record.expires_at_s <= now_s]:
                self._forget(owners, owner)
            if not owners:
                del self._kept[key]

    def _forget(self, owners: dict[NodeKey, _Kept], owner: NodeKey) -> None:
        known = owners.pop(owner, None)
        if known is not None:
            self._num_bytes -= known.entry.num_bytes + _OVERHEAD_BYTES
            self._num_of[owner] -= 1
            if not self._num_of[owner]:
                del self._num_of[owner]
