"""Who runs which part of a model, and what is said when nobody can."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.errors import NoWorkersError
from smartnodes_core.records import Announcement
from tensorlink.errors import PartitionError
from tensorlink.sharding import plan as planning
from tensorlink.sharding.balance import TOLERANCE, Candidate, choose
from tensorlink.sharding.memory import StageNeed, Training
from tensorlink.sharding.plan import PlacementPlan, check_schedule, plan

#: The speed of the machine that profiled the models here.
HERE = 10 * 10**9
TRAINING = Training(num_micro_batches=8, window_steps=1)
MB = 10**6


def rig(index: int, memory_mb: int = 1000, gflops: int = 10, free_slots: int = 1, **offers: int | str) -> Announcement:
    figures = {"memory_bytes": memory_mb * MB, "flops_per_s": gflops * 10**9, "free_slots": free_slots, **offers}
    return Announcement(
        node_key=bytes([index]) * 32, role="worker", network_id=1, endpoints=[f"127.0.0.1:{index}"],
        offers=figures, sequence=1, expires_at_s=2**31,
    )  # fmt: skip


class Layers:
    """A model of layers that each take `seconds` (a third of it forward) and `mb` of weights, cut like a real one."""

    def __init__(self, seconds: Sequence[float], mb: float = 1.0, crossing_mb: float = 0.0):
        self.seconds, self.mb, self.crossing_mb = seconds, mb, crossing_mb
        ends = [sum(seconds[:at]) for at in range(len(seconds) + 1)]
        self.candidates = [Candidate(at, end, 1, at) for at, end in enumerate(ends)]

    def __call__(self, shares: Sequence[float]) -> list[StageNeed]:
        chosen = choose(self.candidates, len(shares), shares)
        if chosen is None:
            raise PartitionError(f"{len(shares)} stages were asked for; the model has {len(self.seconds)} layers")
        ends = [0, *chosen, len(self.seconds)]
        return [self._need(first, last) for first, last in itertools.pairwise(ends)]

    def _need(self, first: int, last: int) -> StageNeed:
        seconds, num_bytes = sum(self.seconds[first:last]), round((last - first) * self.mb * MB)
        return StageNeed(
            forward_s=seconds / 3,
            backward_s=2 * seconds / 3,
            flops=round(seconds * HERE),
            weight_bytes=num_bytes,
            parameter_bytes=num_bytes,
            trainable_bytes=num_bytes,
            saved_bytes=num_bytes // 10,
            workspace_bytes=0,
            crossing_bytes=round(self.crossing_mb * MB),
            logged_bytes=0,
        )


def made(model: Layers, *rigs: Announcement, training: Training = TRAINING, **options: object) -> PlacementPlan:
    return plan(model, rigs, training, flops_per_s=HERE, **options)  # type: ignore[arg-type]


def layers_of(found: PlacementPlan, index: int) -> int:
    """How many layers of 1 MB the rig with this index got."""
    return sum(p.need.weight_bytes // MB for p in found.stages if p.worker.node_key[0] == index)


# -- speed -------------------------------------------------------------------------------------------------------------


def test_a_rig_that_is_three_times_as_fast_gets_three_times_as_much():
    found = made(Layers([1.0] * 8), rig(1, gflops=10), rig(2, gflops=30))
    assert [layers_of(found, index) for index in (1, 2)] == [2, 6]
    assert found.spares == []


def test_the_prediction_is_the_simulators_on_the_rigs_own_speed():
    found = made(Layers([0.3] * 4), rig(1, gflops=10), rig(2, gflops=20), schedule="gpipe")
    by_rig = {placed.worker.node_key[0]: placed for placed in found.stages}
    assert by_rig[1].micro_batch_s == pytest.approx(0.3)
    assert by_rig[2].micro_batch_s == pytest.approx(0.45)
    assert found.step_s == pytest.approx(8 * 0.45 + 0.3)


def test_a_rig_that_would_slow_the_others_down_is_left_out_unless_it_is_asked_for():
    model, rigs = Layers([1.0] * 4), (rig(1, gflops=100), rig(2, gflops=100), rig(3, gflops=1))
    assert [spare.node_key[0] for spare in made(model, *rigs).spares] == [3]
    assert made(model, *rigs, num_workers=3).spares == []


def test_of_schedules_that_are_as_fast_the_one_that_holds_less_is_taken():
    assert made(Layers([1.0] * 4), rig(1)).schedule.name == "1f1b"


def test_auto_takes_the_quickest_schedule():
    found = made(Layers([1.0] * 8), rig(1), rig(2), num_workers=2, training=Training(64, 1))
    names = ("gpipe", "1f1b", "interleaved", "zb", "zbv")
    each = {
        name: made(Layers([1.0] * 8), rig(1), rig(2), num_workers=2, training=Training(64, 1), schedule=name)
        for name in names
    }
    assert found.step_s <= min(one.step_s for one in each.values()) * (1 + planning.SLACK)
    assert [placed.worker.node_key[0] for placed in each["zbv"].stages] in ([1, 2, 2, 1], [2, 1, 1, 2])


def test_a_slow_line_is_counted_where_its_owner_told_of_it():
    model = Layers([0.01] * 4, crossing_mb=1.0)
    line = {"up_mbit": 10_000, "down_mbit": 10_000}
    quick = made(model, rig(1, **line), rig(2, **line), num_workers=2)
    slow = made(model, rig(1, up_mbit=80), rig(2, down_mbit=8), num_workers=2)
    assert quick.step_s < 0.5
    assert slow.step_s >= 8 * 1.0  # eight megabytes over eight megabits a second


# -- memory ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_on_the_fastest_goes_to_the_others():
    # a layer takes 1 MB of weights, 1 of gradients, 2 of the optimizer's, 4 of audits and up to 0.8 of activations
    found = made(Layers([1.0] * 8), rig(1, memory_mb=25, gflops=100), rig(2, memory_mb=1000, gflops=10))
    assert layers_of(found, 1) == 3
    assert layers_of(found, 2) == 5


def test_what_fits_nowhere_is_said_in_numbers():
    message = (
        r"no plan fits.*1f1b on 2 workers, needs 32\.8 MB \(weights 4\.0 \+ gradients 4\.0 \+ optimizer 8\.0 \+ "
        r"kept for audits 16\.0 \+ activations 0\.8\) for stage 0 on worker 01010101, which offers 20\.0 MB: use more w"
    )
    with pytest.raises(NoWorkersError, match=message):
        made(Layers([1.0] * 8), rig(1, memory_mb=20), rig(2, memory_mb=20))


def test_too_few_rigs_are_said_in_numbers():
    with pytest.raises(NoWorkersError, match=r"found 1 free workers \(2 announced\), needed 2.*tensorlink-worker"):
        made(Layers([1.0] * 2), rig(1), rig(2, free_slots=0), num_workers=2)
    with pytest.raises(NoWorkersError, match=r"found 0 free workers \(0 announced\), needed 1"):
        made(Layers([1.0]))


def test_a_model_that_cannot_be_cut_so_often_says_so():
    with pytest.raises(PartitionError, match="3 stages were asked for; the model has 2 layers"):
        made(Layers([1.0] * 2), rig(1), rig(2), rig(3), num_workers=3)


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(PartitionError, match="found schedule='zigzag', needed 'auto' or one of"):
        check_schedule("zigzag")


# -- strangers' words --------------------------------------------------------------------------------------------------


def test_an_announcement_that_makes_no_sense_hurts_nobody():
    odd = rig(2, flops_per_s="fast", memory_bytes=-1, up_mbit="x", free_slots="many")  # type: ignore[arg-type]
    assert [p.worker.node_key[0] for p in made(Layers([1.0] * 4), rig(1), odd).stages] == [1]
    boaster = rig(3, flops_per_s=1 << 62, memory_bytes=1 << 62)  # type: ignore[arg-type]
    assert made(Layers([1.0] * 4), rig(1), boaster).step_s > 0


def test_the_table_tells_all_of_it():
    lines = made(Layers([0.3] * 4), rig(1), rig(2), num_workers=2, schedule="1f1b").table().splitlines()
    assert lines[1].split() == ["0", "01010101", "16.4", "1000", "200.0", "+", "400.0"]
    assert lines[-1] == "schedule 1f1b, 8 micro-batches, predicted step 5400 ms, 11% idle, spares: 0"


# -- whatever rigs there are -------------------------------------------------------------------------------------------

MODELS = st.lists(st.integers(1, 9), min_size=4, max_size=12).map(lambda seconds: Layers([s / 10 for s in seconds]))
RIGS = st.lists(st.tuples(st.integers(20, 200), st.integers(1, 50)), min_size=1, max_size=4)


def announced(figures: Sequence[tuple[int, int]]) -> list[Announcement]:
    return [rig(index + 1, memory_mb, gflops) for index, (memory_mb, gflops) in enumerate(figures)]


@given(MODELS, RIGS, st.integers(1, 16))
def test_no_rig_is_given_more_than_its_memory_holds(model, figures, num_micro_batches):
    try:
        found = made(model, *announced(figures), training=Training(num_micro_batches, 1))
    except NoWorkersError:
        return
    for memory, used in zip(found.memory, found.rigs, strict=True):
        assert memory.total <= used.memory_bytes
    assert sum(layers_of(found, index + 1) for index in range(len(figures))) == len(model.seconds)


@given(MODELS, RIGS)
def test_the_order_in_which_rigs_are_found_changes_nothing(model, figures):
    rigs = announced([(1000, gflops) for _, gflops in figures])
    assert made(model, *rigs).table() == made(model, *rigs[::-1]).table()


@given(MODELS, RIGS, st.data())
def test_a_faster_rig_makes_no_plan_slower_but_for_what_a_cut_gives_away_to_save_bytes(model, figures, data):
    figures = [(1000, gflops) for _, gflops in figures]
    at, faster = data.draw(st.integers(0, len(figures) - 1)), data.draw(st.integers(1, 50))
    before = made(model, *announced(figures)).step_s
    figures[at] = (1000, figures[at][1] + faster)
    assert made(model, *announced(figures)).step_s <= before * (1 + 2 * TOLERANCE)
