from __future__ import annotations

from smartnodes_core.records import Announcement
from tensorlink.recovery.rigs import replacements


def rig(number, memory=100, speed=1, slots=1):
    return Announcement(
        node_key=bytes([number]) * 32,
        role="worker",
        network_id=1,
        sequence=0,
        expires_at_s=0,
        endpoints=[f"127.0.0.1:{number}"],
        offers={"free_slots": slots, "memory_bytes": memory, "flops_per_s": speed},
    )


NEEDS = {0: 60, 1: 30, 2: 50}


def choose(lost, running, announced, avoid=(), reaches=lambda rig: True):
    found = replacements(lost, running, NEEDS, announced, avoid, reaches)
    return found and {stage: taker.node_key[0] for stage, taker in found.items()}


def test_the_fastest_free_rig_with_the_memory_takes_over():
    announced = [rig(1, speed=5), rig(2, speed=9, memory=20), rig(3, speed=7), rig(4, speed=8, slots=0)]
    assert choose([1], {0: rig(8), 2: rig(9)}, announced) == {1: 3}


def test_rigs_that_are_not_wanted_or_not_reached_are_passed_over():
    announced = [rig(1, speed=5), rig(2, speed=4), rig(3, speed=3)]
    running = {0: rig(8), 2: rig(9)}
    reached = choose([1], running, announced, {rig(1).node_key}, lambda one: one.node_key[0] != 2)
    assert reached == {1: 3}


def test_without_a_free_rig_one_of_the_job_with_room_takes_over():
    assert choose([1], {0: rig(8, memory=100), 2: rig(9, memory=70)}, []) == {1: 8}
    assert choose([1], {0: rig(8, memory=80), 2: rig(9, memory=70)}, []) is None


def test_several_stages_take_several_rigs_and_then_share_them():
    assert choose([0, 1, 2], {}, [rig(1), rig(2)]) == {0: 1, 2: 2, 1: 2}
    assert choose([0, 1, 2], {}, [rig(1, memory=139)]) is None
    assert choose([0, 1, 2], {}, [rig(1, memory=140)]) == {0: 1, 1: 1, 2: 1}


def test_a_rig_of_the_job_is_not_taken_for_a_free_one():
    running = {0: rig(1, memory=200), 2: rig(2, memory=80)}
    assert choose([1], running, [rig(1, memory=200), rig(2, memory=80), rig(3)]) == {1: 3}
