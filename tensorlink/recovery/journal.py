"""What the user asked of the stages since the oldest snapshot, so that it can be asked again: the same calls with the
same tensors give the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Entry:
    """One operation, begun when `step` steps were committed and `num_calls` forwards announced since.

    `again` does it again and raises what it raises. `depends_on_outputs`: it was computed from what stages had put out,
    as the gradients of a loss outside the pipeline are.
    """

    step: int
    num_calls: int
    again: Callable[[], object]
    depends_on_outputs: bool = False


class Journal:
    """Operations in their order, from step `begin` on."""

    def __init__(self) -> None:
        self.begin = 0
        self._entries: deque[Entry] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """It was done."""
        self._entries.append(entry)

    def since(self, step: int) -> list[Entry]:
        """Operations of this step and later ones."""
        return [entry for entry in self._entries if entry.step >= step]

    def forget_before(self, step: int) -> None:
        """Nobody goes back behind this step."""
        self.begin = max(self.begin, step)
        while self._entries and self._entries[0].step < step:
            self._entries.popleft()

    def forget_from(self, step: int) -> None:
        """What was done from this step on is void."""
        while self._entries and self._entries[-1].step >= step:
            self._entries.pop()

    def start_at(self, step: int) -> None:
        """The state was replaced: what came before leads no more to where the stages are."""
        self._entries.clear()
        self.begin = step
