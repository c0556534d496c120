"""A thread for what must be done and can wait: it runs in the time that computing leaves on the cores."""

from __future__ import annotations

import contextlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

#: What such a thread gives way by, as of `nice`: beside a busy thread it gets about a tenth of a core.
NICE = 10


def background_thread(name: str) -> ThreadPoolExecutor:
    """An executor of one thread that gives way to all others."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    if not sys.platform.startswith("linux"):
        return  # elsewhere a priority is the whole process's
    with contextlib.suppress(OSError):  # an owner whose limits allow less loses speed and nothing else
        os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE))
