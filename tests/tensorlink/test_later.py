"""Work that waits until there is time for it."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from tensorlink.later import MAX_WAITING, NICE, Later


@pytest.fixture
def later():
    made = Later("test")
    yield made
    made.shutdown()


def test_nothing_runs_before_begin_and_then_all_in_order_on_another_thread(later):
    done, threads = [], set()
    futures = [
        later.submit(lambda index=index: (done.append(index), threads.add(threading.current_thread().name)))
        for index in range(10)
    ]
    assert later.waits
    assert done == []
    later.begin()
    assert not later.waits
    futures[-1].result(10)
    assert done == list(range(10))
    assert threads == {"test_0"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a priority is the whole process's")
def test_it_gives_way_to_other_threads(later):
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert later.submit(os.getpriority, os.PRIO_PROCESS, 0).result(10) == min(19, ours + NICE)
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours


def test_asking_for_a_result_begins_what_comes_before_it(later):
    done = []
    later.submit(done.append, 1)
    assert later.submit(sum, [2, 3]).result(10) == 5
    assert done == [1]


def test_work_may_ask_for_results_of_earlier_work(later):
    first = later.submit(lambda: 3)
    assert later.submit(lambda: first.result() + 1).result(10) == 4


def test_what_it_raises_is_raised_where_the_result_is_asked_for(later):
    with pytest.raises(ZeroDivisionError):
        later.submit(lambda: 1 / 0).result(10)


def test_only_so_much_waits(later):
    ran = threading.Event()
    later.submit(ran.set)
    for _ in range(MAX_WAITING):
        later.submit(lambda: None)
    assert ran.wait(10)


def test_the_end_does_what_waits():
    later, done = Later("test"), []
    later.submit(done.append, 1)
    later.shutdown()
    assert done == [1]
