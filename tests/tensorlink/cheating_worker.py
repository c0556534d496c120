"""A worker that is honest in everything but its arithmetic, or (the cheat "silent") opens nothing that it is asked for:
`cheating_worker.py CHEAT [worker flags]`.

The real command line, with the computing process of `audit/cheating_compute.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tensorlink.cli.worker as command_line
from smartnodes_core.errors import AuditError
from tensorlink.worker import StageHandler

COMPUTE = Path(__file__).parent / "audit" / "cheating_compute.py"


class SilentHandler(StageHandler):
    def open(self, stage, commitment, tier, unit):
        raise AuditError("nothing is opened here")


def main():
    cheat, flags = sys.argv[1], sys.argv[2:]

    def handler(memory_bytes, num_threads, **options):
        if cheat == "silent":
            return SilentHandler(memory_bytes, num_threads, **options)
        command = (sys.executable, str(COMPUTE), cheat)
        return StageHandler(memory_bytes, num_threads, command, **options)

    command_line.StageHandler = handler
    return command_line.main(flags)


if __name__ == "__main__":
    sys.exit(main())
