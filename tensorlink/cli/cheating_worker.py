"""A rig that is honest in everything but its arithmetic, or (the cheat "silent") opens nothing that it is asked for.

`python -m tensorlink.cli.cheating_worker CHEAT HONEST_STEPS [flags of tensorlink-worker]`, with the stages of
`demo/cheats.py`.
"""

from __future__ import annotations

import sys
from typing import Any

import tensorlink.cli.worker as command_line
from smartnodes_core.errors import AuditError
from smartnodes_core.jobs import OpenedUnit
from tensorlink.worker import StageHandler


class SilentHandler(StageHandler):
    """Computes as it should, and shows nothing of it."""

    def open(self, *_: Any) -> OpenedUnit:
        raise AuditError("nothing is opened here")


def main() -> int:
    """The real command line, with another computing process."""
    cheat, honest_steps, *flags = sys.argv[1:]

    def handler(memory_bytes: int, num_threads: int, **options: Any) -> StageHandler:
        if cheat == "silent":
            return SilentHandler(memory_bytes, num_threads, **options)
        command = (sys.executable, "-m", "tensorlink.demo.cheats", cheat, honest_steps)
        return StageHandler(memory_bytes, num_threads, command, **options)

    command_line.StageHandler = handler  # type: ignore[assignment, attr-defined]
    return command_line.main(flags)


if __name__ == "__main__":
    sys.exit(main())
