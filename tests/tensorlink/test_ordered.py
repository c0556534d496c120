"""Work that may not wait its caller, in order."""

from __future__ import annotations

import threading

from smartnodes_core.errors import JobError
from tensorlink.ordered import Ordered


def test_work_is_done_in_order_on_another_thread():
    ordered, done, threads = Ordered("test"), [], set()
    for index in range(100):
        ordered.put(lambda index=index: (done.append(index), threads.add(threading.current_thread().name)))
    ordered.stop(5.0)
    assert done == list(range(100))
    assert threads == {"test"}


def test_what_one_raises_stops_no_other(caplog):
    ordered, done = Ordered("test"), []

    def bad():
        raise JobError("of one")

    ordered.put(bad)
    ordered.put(lambda: 1 / 0)
    ordered.put(lambda: done.append(1))
    ordered.stop(5.0)
    assert done == [1]
    assert "of one" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_nothing_is_done_after_the_end():
    ordered, done = Ordered("test"), []
    ordered.stop(1.0)
    ordered.put(lambda: done.append(1))
    assert done == []
