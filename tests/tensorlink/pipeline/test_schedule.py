"""Every action once, in an order that can finish, with no more in flight than the schedule promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorlink.errors import PartitionError
from tensorlink.pipeline.schedule import Action, gpipe, max_in_flight, one_forward_one_backward, simulate

SIZES = (st.integers(1, 8), st.integers(1, 20))


@given(*SIZES)
def test_every_action_stands_once_and_the_schedule_finishes(num_stages, num_micro_batches):
    for generate in (gpipe, one_forward_one_backward):
        schedule = generate(num_stages, num_micro_batches)
        expected = {Action(s, k, m) for s in range(num_stages) for k in "FB" for m in range(num_micro_batches)}
        actions = [action for actions in schedule for action in actions]
        assert len(actions) == len(expected)
        assert set(simulate(schedule).start) == expected


@given(*SIZES)
def test_1f1b_stage_s_holds_at_most_num_stages_minus_s(num_stages, num_micro_batches):
    for stage, actions in enumerate(one_forward_one_backward(num_stages, num_micro_batches)):
        assert max_in_flight(actions) == min(num_stages - stage, num_micro_batches)


@given(*SIZES)
def test_both_take_the_time_of_the_textbook(num_stages, num_micro_batches):
    ideal = 3.0 * (num_micro_batches + num_stages - 1)
    assert simulate(gpipe(num_stages, num_micro_batches)).makespan == ideal
    assert simulate(one_forward_one_backward(num_stages, num_micro_batches)).makespan == ideal


def test_the_timetable_prints_as_a_grid():
    assert str(simulate(one_forward_one_backward(2, 2))).splitlines() == [
        "0F0 0F1 .   0B0 .   0B1",
        ".   1F0 1B0 1F1 1B1 .",
    ]


def test_transfers_take_time():
    assert simulate(gpipe(2, 1), transfer=0.5).makespan == 7.0


def test_a_deadlock_is_named():
    with pytest.raises(PartitionError, match="deadlocks: 0B0, 1F0 wait"):
        simulate([[Action(0, "B", 0), Action(0, "F", 0)], [Action(1, "F", 0), Action(1, "B", 0)]])


def test_a_missing_or_doubled_action_is_named():
    with pytest.raises(PartitionError, match=r"micro-batches \[0\] have a forward without"):
        simulate([[Action(0, "F", 0)]])
    with pytest.raises(PartitionError, match="0F0 stands twice"):
        simulate([[Action(0, "F", 0), Action(0, "F", 0), Action(0, "B", 0)]])
    with pytest.raises(PartitionError, match="at least one of each"):
        gpipe(0, 1)
