"""A real worker whose computing process is another program than its own. No torch here: it is the node's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorlink.cli.worker as command_line
from tensorlink.worker import StageHandler


def run_worker(compute: Sequence[str], flags: Sequence[str]) -> int:
    """`tensorlink-worker` with `flags`, which starts `compute` where it would start `tensorlink.compute`."""

    class OtherCompute(StageHandler):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, command=compute)

    command_line.StageHandler = OtherCompute  # type: ignore[misc]
    return command_line.main(flags)
