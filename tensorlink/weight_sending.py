"""Sends stages the state that they start from, or are to have instead: a few parts at a time, from wherever it lies.

Where a connection breaks, sending goes on with the parts that were under way. Parts are pushed, and not fetched as in
`smartnodes_core/nodes/transfer.py`, whose receiver holds the whole: here a part goes from shared memory straight into
the rig's computing process, and the roots in the job record say already what all of them together must be.
The other end is `stage_loading.py`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from smartnodes_core.errors import WorkerLostError
from smartnodes_core.jobs import Buffer
from tensorlink.initial_state import Sources, read
from tensorlink.pipeline.driver import Driver
from tensorlink.program.parts import Parts
from tensorlink.program.values import DTYPE_NAMES
from tensorlink.records import PART_BYTES

logger = logging.getLogger(__name__)

#: Parts under way at once, of all stages together: these are what the user's side holds in memory. Together they must
#: cross the slowest link within one part's deadline (`pipeline/progress.py`).
NUM_SENDERS = 4
#: How long a worker that was lost is tried again: less than it keeps the stages of an author that it lost.
RESUME_S = 5.0
PAUSE_S = 0.2
#: State by stage.
States = Mapping[int, Sources]


def replace_state(
    driver: Driver, method: str, states: States, on_bytes: Callable[[int], object] = lambda num_bytes: None
) -> None:
    """Have stages take these tensors in place of those that they have under the same names.

    `method` is "set_state" for parameters and buffers, "set_optimizer_state" for the optimizer's ("parameter/state
    name").
    """
    for stage, state in states.items():
        driver.call(stage, method, {}, [json.dumps(list(state)).encode()])
    send_parts(driver, states, on_bytes)
    for stage in states:
        driver.call(stage, "load_end", {})


def send_parts(driver: Driver, states: States, on_bytes: Callable[[int], object] = lambda num_bytes: None) -> None:
    """Send stages all parts of their state, after `load` or `set_state` was called and before `load_end`.

    Stages take turns. The first error ends it and is raised when nothing is under way any more.
    """
    _Sending(driver, states, on_bytes).run()


class _Sending:
    def __init__(self, driver: Driver, states: States, on_bytes: Callable[[int], object]):
        self._driver, self._states, self._on_bytes = driver, states, on_bytes
        self._parts = {
            stage: Parts({name: (DTYPE_NAMES[source.dtype], tuple(source.shape)) for name, source in state.items()})
            for stage, state in states.items()
        }
        self._waiting = self._in_turn()
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._send, name=f"weights-{i}", daemon=True) for i in range(NUM_SENDERS)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            with self._lock:  # where the join was interrupted, threads end with the part that they are at
                self._waiting = iter(())
        if self._error is not None:
            raise self._error

    def _in_turn(self) -> Iterator[tuple[int, int]]:
        """(stage, part), one part of each stage after the other."""
        for part in range(max(map(len, self._parts.values()), default=0)):
            yield from ((stage, part) for stage, parts in self._parts.items() if part < len(parts))

    def _send(self) -> None:
        scratch = memoryview(bytearray(PART_BYTES))  # read into again once a call has returned, and not before
        try:
            while (place := self._next()) is not None:
                stage, part = place
                body = self._body(stage, part, scratch)
                self._deliver(stage, part, body)
                with self._lock:
                    self._on_bytes(sum(len(piece) for piece in body))
        except BaseException as error:
            with self._lock:
                self._error = self._error or error

    def _deliver(self, stage: int, part: int, body: list[Buffer]) -> None:
        """Raises WorkerLostError when the worker was not reached again within RESUME_S."""
        deadline_s: float | None = None
        pause = threading.Event()
        while True:
            try:
                self._driver.call(stage, "load_part", {"part": part}, body)
                return
            except WorkerLostError as error:
                deadline_s = deadline_s or time.monotonic() + RESUME_S
                if time.monotonic() + PAUSE_S > deadline_s:
                    raise
                logger.info("part %d of stage %d is sent again: %s", part, stage, error)
            pause.wait(PAUSE_S)
            self._driver.take_up()

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            return None if self._error is not None else next(self._waiting, None)

    def _body(self, stage: int, part: int, scratch: memoryview) -> list[Buffer]:
        body: list[Buffer] = []
        at = 0
        for name, begin, end in self._parts[stage].pieces(part):
            body.append(read(self._states[stage][name], begin, end, scratch[at:]))
            at += end - begin
        return body
