"""How much memory a computing process takes before it computes anything. No torch here: nodes read this too."""

from __future__ import annotations

#: Private memory of the interpreter, torch and its threads, as the system counts it: mapped, if not all of it used.
RUNTIME_BYTES = 1 << 30


def limit_of(memory_bytes: int) -> int:
    """The limit of a process that is to have `memory_bytes` for its work; 0 for none."""
    return memory_bytes + RUNTIME_BYTES if memory_bytes else 0
