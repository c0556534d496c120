"""The log is bounded, leaves shared memory when it holds too much of it, and a snapshot's memory is used again."""

from __future__ import annotations

import torch

from tensorlink.steplog import snapshots
from tensorlink.steplog.log import ForwardRecord, StepLog, UnitRecord


def unit(micro_batch=0, call=0):
    x = {"0": torch.ones(100)}
    return UnitRecord(ForwardRecord(call, micro_batch, True, "forward", x, {}, {}), 0, {"0": torch.ones(100)})


def test_only_the_window_is_kept():
    log = StepLog(2, 1 << 30)
    for step in range(5):
        log.open.step = step
        log.make_room(begins_interval=True)
        log.open.before = snapshots.take({}, {}, {})
        log.commit(step + 1)
    assert log.steps() == [3, 4]
    assert log.committed(2) is None
    assert log.committed(4) is log.last()


def test_beyond_its_share_the_log_copies():
    log = StepLog(2, 1000)
    first, second = unit(0), unit(1)
    kept = [first.forward.x["0"], second.forward.x["0"]]
    log.settle(first)
    log.settle(second)
    assert first.forward.x["0"] is kept[0]
    assert second.forward.x["0"] is not kept[1]
    assert torch.equal(second.forward.x["0"], kept[1])


def test_units_come_in_the_order_of_addition_and_then_forwards_alone():
    log = StepLog(2, 1 << 30)
    for m in range(3):
        one = unit(m)
        log.open.forwards[(0, m)] = one.forward
        if m != 1:
            log.open.units.insert(0, one)
    found = [(u.forward.micro_batch, u.backward_pass) for u in log.open.all_units()]
    assert found == [(2, 0), (0, 0), (1, -1)]


def test_a_snapshot_is_a_copy_and_takes_a_spares_memory():
    weights, buffers = {"w": torch.ones(4)}, {"b": torch.zeros(2)}
    first = snapshots.take(weights, buffers, {"w/m": torch.ones(4)})
    weights["w"].add_(1)
    assert torch.equal(first.weights["w"], torch.ones(4))
    assert first.buffers["b"] is buffers["b"]
    assert first.num_bytes == 32
    memory = first.weights["w"].data_ptr()
    second = snapshots.take(weights, buffers, {}, spare=first)
    assert second.weights["w"].data_ptr() == memory
    assert torch.equal(second.weights["w"], weights["w"])
