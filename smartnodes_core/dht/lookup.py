"""A lookup as a state machine: whom to ask next, until the nearest have answered. No I/O and no clock.

Kademlia's iterative lookup, over disjoint paths (Baumgart and Mies, S/Kademlia, 2007): what a node says reaches only
the path that asked it, and each path goes on until the `width` nearest that it has heard of have answered, or until it
has found a value. A node that lies, or all nodes that one liar names, can so mislead one path and not the others.

The caller asks everybody in `next()` and says what came of it: `answered`, `failed`, or `overdue`, which lets somebody
else be asked meanwhile.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from smartnodes_core.dht.contacts import Contact
from smartnodes_core.records import NodeKey

#: How many are asked at once, and over how many disjoint paths.
NUM_PARALLEL, NUM_PATHS = 3, 3
#: However many nodes liars name, no more are asked in one lookup, and no more are remembered by a path.
MAX_ASKED, MAX_HEARD = 160, 256

_State = Literal["asked", "overdue", "answered", "failed"]


@dataclass
class _Path:
    """What one path has heard of: distances in order, and who sits there after how many hops."""

    distances: list[int] = field(default_factory=list)
    heard: dict[int, tuple[Contact, int]] = field(default_factory=dict)
    num_asking: int = 0
    found: bool = False

    def hear(self, distance: int, contact: Contact, num_hops: int) -> None:
        if distance not in self.heard:
            bisect.insort(self.distances, distance)
            self.heard[distance] = (contact, num_hops)
            if len(self.distances) > MAX_HEARD:
                del self.heard[self.distances.pop()]


class Lookup:
    """Looks for the `width` nodes nearest to `target`, or, with `for_value`, for one value by each path.

    `start` are the contacts that the searcher has, nearest first; `own_key` is never asked.
    """

    def __init__(
        self,
        target: int,
        own_key: NodeKey,
        start: Sequence[Contact],
        *,
        width: int,
        for_value: bool = False,
        num_parallel: int = NUM_PARALLEL,
        num_paths: int = NUM_PATHS,
    ) -> None:
        self.target, self.for_value = target, for_value
        self._own_key, self._width, self._num_parallel = own_key, width, num_parallel
        self._states: dict[NodeKey, _State] = {}
        self._asked_by: dict[NodeKey, tuple[_Path, int]] = {}
        self.num_hops: int | None = None  # to the first value
        self._paths = [_Path() for _ in range(max(1, min(num_paths, len(start))))]
        for number, contact in enumerate(start):
            if contact.node_key != own_key:
                self._paths[number % len(self._paths)].hear(contact.id ^ target, contact, 1)

    def __repr__(self) -> str:
        states = list(self._states.values())
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return f"Lookup({self.target >> 224:08x}…, {len(self._paths)} paths, {counts or 'nobody asked'})"

    def next(self) -> list[Contact]:
        """Whom to ask now, each once; none while enough are being asked, and when it is finished."""
        chosen: list[Contact] = []
        while True:
            live = [path for path in self._paths if self._candidate(path) is not None]
            room = self._num_parallel - sum(path.num_asking for path in self._paths)
            if not live or room <= 0 or len(self._states) >= MAX_ASKED:
                return chosen
            path = min(live, key=lambda each: each.num_asking)
            found = self._candidate(path)
            assert found is not None  # `live` holds no other
            contact, num_hops = found
            self._states[contact.node_key] = "asked"
            self._asked_by[contact.node_key] = (path, num_hops)
            path.num_asking += 1
            chosen.append(contact)

    def answered(self, contact: Contact, contacts: Sequence[Contact], *, has_value: bool = False) -> None:
        """`contact` named `contacts`, and gave a value or not."""
        path, num_hops = self._settle(contact, "answered")
        if has_value and self.for_value:
            path.found = True
            if self.num_hops is None or num_hops < self.num_hops:
                self.num_hops = num_hops
        for each in contacts:
            if each.node_key != self._own_key:
                path.hear(each.id ^ self.target, each, num_hops + 1)

    def failed(self, contact: Contact) -> None:
        """`contact` did not answer, or not as it should."""
        self._settle(contact, "failed")

    def overdue(self, contact: Contact) -> None:
        """`contact` takes long: it may still answer, and somebody else is asked meanwhile."""
        if self._states.get(contact.node_key) == "asked":
            self._asked_by[contact.node_key][0].num_asking -= 1
            self._states[contact.node_key] = "overdue"

    @property
    def finished(self) -> bool:
        """Whether no path can go on: each has found a value, or its nearest have all answered or failed."""
        return all(path.found or self._is_through(path) for path in self._paths)

    def was_asked(self, contact: Contact) -> bool:
        return contact.node_key in self._states

    @property
    def num_asked(self) -> int:
        return len(self._states)

    def closest(self, count: int) -> list[Contact]:
        """Up to `count` nodes that answered, nearest first, taken from the paths in turn: where a path was led astray,
        the others' nodes are still among them."""
        ranked = [[contact for contact, _ in self._nearest(path) if self._is_answered(contact)] for path in self._paths]
        found: dict[NodeKey, Contact] = {}
        for rank in range(max((len(each) for each in ranked), default=0)):
            for contacts in ranked:
                if rank < len(contacts) and len(found) < count:
                    found.setdefault(contacts[rank].node_key, contacts[rank])
        return sorted(found.values(), key=lambda contact: contact.id ^ self.target)

    def _candidate(self, path: _Path) -> tuple[Contact, int] | None:
        """The nearest of a path's `width` nearest whom nobody has asked."""
        if path.found:
            return None
        return next((found for found in self._nearest(path) if found[0].node_key not in self._states), None)

    def _is_through(self, path: _Path) -> bool:
        waiting = [contact for contact, _ in self._nearest(path) if not self._is_answered(contact)]
        pending = any(self._states.get(contact.node_key) in ("asked", "overdue") for contact in waiting)
        return not waiting or (not pending and len(self._states) >= MAX_ASKED)

    def _nearest(self, path: _Path) -> Iterator[tuple[Contact, int]]:
        """The `width` nearest that a path has heard of and that did not fail."""
        count = 0
        for distance in path.distances:
            contact, num_hops = path.heard[distance]
            if self._states.get(contact.node_key) != "failed":
                yield contact, num_hops
                count += 1
                if count == self._width:
                    return

    def _is_answered(self, contact: Contact) -> bool:
        return self._states.get(contact.node_key) == "answered"

    def _settle(self, contact: Contact, state: _State) -> tuple[_Path, int]:
        """Raises ValueError for somebody who was not asked, or has answered."""
        before = self._states.get(contact.node_key)
        if before not in ("asked", "overdue"):
            raise ValueError(f"{contact} is {before or 'not asked'}: only who is asked answers or fails")
        path, num_hops = self._asked_by[contact.node_key]
        if before == "asked":
            path.num_asking -= 1
        self._states[contact.node_key] = state
        return path, num_hops
