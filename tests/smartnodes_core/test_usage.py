"""What is counted is the calling thread's own CPU time, and bytes; waiting costs nothing."""

from __future__ import annotations

import threading

from smartnodes_core.usage import Usage


def busy():
    return sum(i * i for i in range(200_000))


def test_a_timed_context_counts_its_cpu_time_and_the_whole_process_at_least_that():
    usage = Usage()
    with usage.timed("sums"):
        busy()
    found = usage.read()
    assert 0 < found["sums_ns"] <= found["process_ns"]


def test_waiting_and_what_other_threads_do_are_not_counted():
    usage = Usage()
    other = threading.Thread(target=lambda: [busy() for _ in range(10)])
    with usage.timed("waiting"):
        other.start()
        other.join()
    with usage.timed("sums"):
        for _ in range(10):
            busy()
    found = usage.read()
    assert found["waiting_ns"] < found["sums_ns"] / 2


def test_amounts_add_up_over_threads():
    usage = Usage()
    threads = [threading.Thread(target=lambda: [usage.add("sent_bytes", 2) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert usage.read()["sent_bytes"] == 8000


def test_a_failing_context_counts_too():
    usage = Usage()
    try:
        with usage.timed("failing"):
            busy()
            raise ValueError
    except ValueError:
        pass
    assert usage.read()["failing_ns"] > 0
