"""Who runs which stage."""

from __future__ import annotations

import pytest

from smartnodes_core.errors import NoWorkersError
from smartnodes_core.records import Announcement
from tensorlink.sharding.plan import STATE_COPIES, StageNeed, plan


def rig(index, memory_mb=1000, gflops=10, free_slots=1):
    offers = {"memory_bytes": memory_mb * 10**6, "flops_per_s": gflops * 10**9, "free_slots": free_slots}
    return Announcement(
        node_key=bytes([index]) * 32, role="worker", network_id=1, endpoints=[f"127.0.0.1:{index}"],
        offers=offers, sequence=1, expires_at_s=2**31,
    )  # fmt: skip


def need(mb=10, gflop=1):
    return StageNeed(parameter_bytes=mb * 10**6 // STATE_COPIES, activation_bytes=0, flops=gflop * 10**9)


def test_the_heaviest_stage_goes_to_the_fastest_rig():
    made = plan([need(gflop=1), need(gflop=5)], [rig(1, gflops=10), rig(2, gflops=50)], 4)
    assert [placed.worker.node_key[0] for placed in made.stages] == [1, 2]
    assert [placed.stage for placed in made.stages] == [0, 1]
    assert made.spares == []


def test_a_stage_goes_where_it_fits():
    made = plan([need(mb=500)], [rig(1, memory_mb=100, gflops=50), rig(2, memory_mb=600)], 4)
    assert made.stages[0].worker.node_key[0] == 2
    assert [spare.node_key[0] for spare in made.spares] == [1]


def test_plans_are_the_same_whatever_order_rigs_are_found_in():
    rigs = [rig(index) for index in range(1, 6)]
    needs = [need(gflop=g) for g in (3, 1, 2)]
    assert plan(needs, rigs, 4).table() == plan(needs, rigs[::-1], 4).table()


def test_the_predicted_step_is_paced_by_the_slowest_stage():
    made = plan([need(gflop=1), need(gflop=2)], [rig(1), rig(2)], 8)
    assert made.step_s == pytest.approx(8 * 0.2 + 0.1)


def test_too_few_rigs_are_said_in_numbers():
    with pytest.raises(NoWorkersError, match=r"found 1 free workers \(2 announced\), needed 2.*tensorlink-worker"):
        plan([need(), need()], [rig(1), rig(2, free_slots=0)], 4)
    with pytest.raises(NoWorkersError, match=r"found 0 free workers \(0 announced\), needed 1"):
        plan([need()], [], 4)


def test_a_stage_that_fits_nowhere_is_said_in_numbers():
    with pytest.raises(NoWorkersError, match=r"stage 0 needs 5\d\d\.\d MB, the largest free worker offers 100\.0 MB"):
        plan([need(mb=550)], [rig(1, memory_mb=100)], 4)
