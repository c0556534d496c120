"""What is read out of a stranger's announcement."""

from __future__ import annotations

import pytest

from smartnodes_core.records import Announcement
from tensorlink.sharding.rigs import MOST_FLOPS_PER_S, UNKNOWN_MBIT, Rig, free_slots


def announcement(**offers: int | str) -> Announcement:
    return Announcement(
        node_key=bytes(32), role="worker", network_id=1, endpoints=["127.0.0.1:1"], offers=offers, sequence=1,
        expires_at_s=2**31,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["many", -1])
def test_what_is_no_count_is_as_if_it_had_not_been_said(value: int | str) -> None:
    odd = announcement(free_slots=value, flops_per_s=value, memory_bytes=value, up_mbit=value)
    assert free_slots(odd) == 0
    assert Rig.of(odd, unknown_flops_per_s=5).figures == (0, 5, UNKNOWN_MBIT, UNKNOWN_MBIT)


def test_a_claim_beyond_reason_counts_as_the_most_that_there_is() -> None:
    assert Rig.of(announcement(flops_per_s=1 << 62), 1).flops_per_s == MOST_FLOPS_PER_S


def test_a_transfer_takes_as_long_as_the_slowest_line() -> None:
    one = Rig.of(announcement(up_mbit=100, down_mbit=50), 1)
    other = Rig.of(announcement(up_mbit=10), 1)
    assert one.seconds_to(other, 1_250_000) == other.seconds_to(one, 1_250_000) == 1.0
    silent = Rig.of(announcement(), 2)
    assert silent.seconds_to(silent, 1 << 40) == 0.0
    assert Rig.of(announcement(memory_bytes=1), 1).seconds_to(silent, UNKNOWN_MBIT * 125_000) == 1.0
