"""Every schedule has every action once, can finish, keeps within its memory, and takes the time it promises.

p is the number of workers, m of micro-batches, v of stages on each worker.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from tensorlink.errors import PartitionError
from tensorlink.pipeline.schedule import (
    GENERATORS,
    Action,
    Schedule,
    generate,
    gpipe,
    interleaved,
    max_held,
    max_in_flight,
    one_forward_one_backward,
    simulate,
    zero_bubble,
    zero_bubble_v,
)

SIZES = (st.integers(1, 8), st.integers(1, 40))
SPLIT = ("zb", "zbv")


@given(st.sampled_from(sorted(GENERATORS)), *SIZES)
def test_every_action_stands_once_and_the_schedule_finishes(name, p, m):
    schedule = generate(name, p, m)
    kinds = "FIW" if name in SPLIT else "FB"
    expected = {Action(s, k, i) for s in range(schedule.num_stages) for k in kinds for i in range(m)}
    assert {run.action for run in simulate(schedule).runs} == expected
    assert sum(map(len, schedule.workers)) == len(expected)
    assert (schedule.name, schedule.num_workers, schedule.num_micro_batches) == (name, p, m)


@given(st.sampled_from(sorted(GENERATORS)), *SIZES, st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_no_order_depends_on_what_actions_cost(name, p, m, costs):
    schedule = generate(name, p, m)
    forward, split, weight, transfer = costs
    timetable = simulate(schedule, {"F": forward, "B": split + weight, "I": split, "W": weight}, transfer)
    work = schedule.num_stages * m * (forward + split + weight)
    assert timetable.makespan >= work / p * (1 - 1e-9)
    assert timetable.bubble == pytest.approx(1 - work / (p * timetable.makespan))


@given(st.sampled_from(sorted(GENERATORS)), *SIZES)
def test_each_stage_takes_its_micro_batches_in_order(name, p, m):
    schedule = generate(name, p, m)
    for stage in range(schedule.num_stages):
        for kind in "FBIW":
            order = [action.micro_batch for action in schedule.of_stage(stage) if action.kind == kind]
            assert order in ([], list(range(m)))


@given(*SIZES)
def test_gpipe_and_1f1b_take_the_time_of_the_textbook(p, m):
    assert simulate(gpipe(p, m)).makespan == simulate(one_forward_one_backward(p, m)).makespan == 3 * (m + p - 1)


@given(*SIZES)
def test_zero_bubble_takes_a_third_of_the_bubble_and_never_more_than_must_be(p, m):
    assert simulate(zero_bubble(p, m)).makespan == max(3 * m + p - 1, 2 * m + 2 * p - 1)


@given(*SIZES)
def test_on_a_v_half_of_that_bubble_is_left(p, m):
    assert simulate(zero_bubble_v(p, m)).makespan == 6 * m + p - 1 + (3 * (p - m) - 1 if m < p else 0)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4))
def test_interleaving_divides_the_bubble_by_the_stages_on_a_worker(p, groups, v):
    assert simulate(interleaved(p, groups * p, v)).makespan == 3 * (v * groups * p + p - 1)


@given(*SIZES, st.integers(1, 4))
def test_a_group_that_is_not_full_costs_no_more_than_a_full_one(p, m, v):
    assert simulate(interleaved(p, m, v)).makespan <= 3 * (v * -(-m // p) * p + p - 1)


@given(*SIZES)
def test_1f1b_stage_s_holds_at_most_p_minus_s(p, m):
    for stage, actions in enumerate(one_forward_one_backward(p, m).workers):
        assert max_in_flight(actions) == max_held(actions) == min(p - stage, m)


@given(*SIZES)
def test_what_zero_bubble_holds_is_bounded_by_the_workers_and_not_by_the_micro_batches(p, m):
    for stage, actions in enumerate(zero_bubble(p, m).workers):
        assert max_in_flight(actions) == min(p - stage, m)
        assert max_held(actions) == min(p, m)
    assert all(max_held(actions) <= 2 * p for actions in zero_bubble_v(p, m).workers)


@given(*SIZES, st.integers(2, 4))
def test_what_interleaving_holds_is_what_its_docstring_says(p, m, v):
    for worker, actions in enumerate(interleaved(p, m, v).workers):
        assert max_held(actions) <= (v - 1) * p + 2 * (p - worker) - 1


def test_where_the_stages_lie():
    assert zero_bubble(3, 4).placement == (0, 1, 2)
    assert zero_bubble_v(3, 4).placement == (0, 1, 2, 2, 1, 0)
    assert interleaved(3, 4, 2).placement == (0, 1, 2, 0, 1, 2)
    assert zero_bubble_v(3, 4).stages_of(1) == (1, 4)


def test_schedules_are_found_by_name_and_number_of_stages():
    assert generate("interleaved", 2, 4, num_stages=6) == interleaved(2, 4, 3)
    assert generate("zbv", 2, 4, num_stages=4) == zero_bubble_v(2, 4)
    with pytest.raises(PartitionError, match=r"found schedule 'no', needed one of gpipe, 1f1b, interleaved, zb, zbv"):
        generate("no", 2, 4)
    with pytest.raises(PartitionError, match="zbv on 2 workers: found 3 stages, needed 4"):
        generate("zbv", 2, 4, num_stages=3)
    with pytest.raises(PartitionError, match="interleaved on 2 workers: found 3 stages, needed a multiple of 2"):
        generate("interleaved", 2, 4, num_stages=3)
    with pytest.raises(PartitionError, match="at least one of each"):
        generate("zbv", 0, 1)


# -- torch's own generators as oracle; of those, `Schedule1F1B` is known to be wrong --------------------------------


def from_torch(kind: type, p: int, m: int, v: int, placement: tuple[int, ...], **sizes: int) -> Schedule:
    """What torch's schedule of that kind lets each rank do. It makes its lists without a process group."""
    like = SimpleNamespace(pp_group_size=p, _n_microbatches=m, num_stages=v * p, n_local_stages=v, **sizes)
    letters = {"FORWARD": "F", "INPUT_GRAD": "I", "WEIGHT_GRAD": "W", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}

    def letter(action):
        return letters.get(action.computation_type.name, "B")

    ranks = [[a for a in kind._calculate_single_rank_operations(like, rank) if a is not None] for rank in range(p)]
    known = [[a for a in actions if a.microbatch_index is not None] for actions in ranks]
    lists = tuple(tuple(Action(a.stage_index, letter(a), a.microbatch_index) for a in actions) for actions in known)
    return Schedule("torch", placement, lists)


@pytest.mark.parametrize(("p", "m"), [(2, 3), (2, 8), (3, 5), (4, 4), (4, 16), (6, 11)])
def test_torchs_zbv_is_never_faster_and_as_fast_once_it_has_enough_micro_batches(p, m):
    ours = zero_bubble_v(p, m)
    theirs = from_torch(torch_schedules.ScheduleZBVZeroBubble, p, m, 2, ours.placement)
    assert simulate(ours).makespan <= simulate(theirs).makespan
    if m >= 2 * p - 1:
        assert simulate(ours).makespan == simulate(theirs).makespan
    assert max(map(max_held, ours.workers)) <= max(map(max_held, theirs.workers))


@pytest.mark.parametrize(("p", "groups", "v"), [(2, 1, 2), (2, 4, 2), (3, 2, 3), (4, 2, 2), (4, 4, 4)])
def test_interleaved_is_torchs_own(p, groups, v):
    ours = interleaved(p, groups * p, v)
    kind = torch_schedules.ScheduleInterleaved1F1B
    theirs = from_torch(kind, p, groups * p, v, ours.placement, number_of_rounds=groups, microbatches_per_round=p)
    assert ours.workers == theirs.workers
