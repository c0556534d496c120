"""How a node's process lives: it says when it is ready, waits for its end, and ends in order.

The end is SIGTERM, SIGINT, or (with `--exit-with-parent`) the closing of its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading

from smartnodes_core.nodes.base import Node


def add_life_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input is closed")


WAKE_S = 0.5


class EndedEarly(BaseException):
    """The end was asked for before the node was ready. No error: it unwinds what the start has begun."""


class Life:
    """Begins when made: from then on signals ask for an orderly end instead of killing.

    Until `say_ready`, where the node is still starting, the end is raised in the main thread as EndedEarly, so that
    nobody waits for a start that is no longer wanted.
    """

    def __init__(self, exit_with_parent: bool):
        self._ended = threading.Event()
        self._starting = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        if exit_with_parent:
            threading.Thread(target=self._watch_stdin, daemon=True).start()

    def say_ready(self, node: Node, **more: object) -> None:
        """One line of JSON on standard output: where the node listens, who it is, and `more`. The start is over."""
        self.started()
        sys.stdout.write(json.dumps({"endpoint": node.endpoint, "node_key": node.node_key.hex(), **more}) + "\n")
        sys.stdout.flush()

    def started(self) -> None:
        """The start is over: from now on the end is only asked for."""
        self._starting = False

    def wait(self) -> None:
        """Until the end is asked for."""
        # a signal that the kernel gives to another thread is handled when this one next runs: it must not sleep on
        while not self._ended.wait(WAKE_S):
            pass

    def _end(self, *_: object) -> None:
        self._ended.set()
        if self._starting:
            self._starting = False  # once: what it unwinds must not be interrupted
            raise EndedEarly

    def _watch_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        if self._starting:  # handled where an exception can unwind the start: in the main thread
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        self._ended.set()
