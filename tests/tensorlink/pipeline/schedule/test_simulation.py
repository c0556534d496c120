"""What a schedule costs, and how a wrong one is refused."""

from __future__ import annotations

import pytest

from tensorlink.errors import PartitionError
from tensorlink.pipeline.schedule import Action, Schedule, gpipe, one_forward_one_backward, simulate, zero_bubble_v


def schedule(*workers: str, placement: tuple[int, ...] | None = None) -> Schedule:
    """From lines like "0F0 0B0"."""
    lists = tuple(tuple(Action(int(a[0]), a[1], int(a[2])) for a in line.split()) for line in workers)
    return Schedule("by hand", placement or tuple(range(len(workers))), lists)


def ends(timetable) -> dict[str, float]:
    return {str(run.action): run.end for run in timetable.runs}


def test_transfers_take_time_between_workers_and_none_within():
    assert simulate(gpipe(2, 1), transfer=0.5).makespan == 7.0
    assert simulate(schedule("0F0 1F0 1B0 0B0", placement=(0, 0)), transfer=9.0).makespan == 6.0
    assert simulate(zero_bubble_v(2, 1), transfer=[0.25, 9.0, 0.5]).makespan == 8 + 1 + 2 * (0.25 + 0.5)


def test_a_line_carries_one_tensor_after_the_other():
    times = ends(simulate(gpipe(2, 3), {"F": 1, "B": 1}, transfer=2.0))
    assert [times[name] for name in ("0F0", "0F1", "0F2")] == [1, 2, 3]
    assert [times[name] for name in ("1F0", "1F1", "1F2")] == [4, 6, 8]


def test_every_stage_can_have_costs_of_its_own():
    slow = [{"F": 1, "B": 2}, {"F": 5, "B": 7}]
    assert simulate(gpipe(2, 2), slow).makespan == 1 + 10 + 14 + 2
    with pytest.raises(PartitionError, match="costs of 1 stages and 1 transfers for 2 stages"):
        simulate(gpipe(2, 2), slow[:1])


def test_a_whole_backward_and_one_in_parts_may_stand_beside_each_other():
    times = ends(simulate(schedule("0F0 0I0 0W0", "1F0 1B0")))
    assert times == {"0F0": 1, "1F0": 2, "1B0": 4, "0I0": 5, "0W0": 6}


@pytest.mark.parametrize("lines", [("0B0 0F0", "1F0 1B0"), ("0F0 0W0 0I0", "1F0 1B0")])
def test_a_deadlock_is_named(lines):
    with pytest.raises(PartitionError, match=r"deadlocks: 0[BW]0.* wait"):
        simulate(schedule(*lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0F0", "does 0F0 with micro-batch 0: needed are a forward F and either"),
        ("0F0 0I0", "does 0F0, 0I0 with"),
        ("0F0 0B0 0W0", "does 0B0, 0F0, 0W0 with"),
        ("0F1 0B1", "does nothing with micro-batch 0"),
        ("0F0 0F0 0B0", "0F0 stands twice"),
        ("0F0 1F0 0B0", "1F0 is on worker 0, which does not hold stage 1"),
    ],
)
def test_a_missing_doubled_or_misplaced_action_is_named(line, message):
    with pytest.raises(PartitionError, match=message):
        simulate(schedule(line))


def test_a_stage_on_a_worker_that_is_not_there_is_refused():
    with pytest.raises(PartitionError, match=r"stages lie on workers \[0, 1\] of 1"):
        simulate(schedule("0F0 0B0", placement=(0, 1)))


def test_unequal_stages_are_paced_by_the_slowest():
    costs = [{"F": 1.0, "B": 2.0}] * 3 + [{"F": 2.0, "B": 4.0}]
    assert simulate(one_forward_one_backward(4, 32), costs).makespan == 32 * 6 + 3 * 3
