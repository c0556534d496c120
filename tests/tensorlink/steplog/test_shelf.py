"""What lies on the shelf comes back bit for bit, takes no memory meanwhile, and a full shelf loses nothing."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorlink.audit.opening import opening
from tensorlink.errors import TensorError
from tensorlink.steplog import snapshots
from tensorlink.steplog.log import ForwardRecord, StepLog, UnitRecord
from tensorlink.steplog.shelf import Shelf, Shelved, from_shelf


@pytest.fixture
def file():
    with tempfile.TemporaryFile() as opened:
        yield opened


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), DTYPES), max_size=8))
def test_every_tensor_comes_back_bit_for_bit(kinds):
    with tempfile.TemporaryFile() as opened:
        shelf = Shelf(opened.fileno(), 1 << 20)
        tensors = [(torch.randn(shape) * 100).to(dtype) for shape, dtype in kinds]
        put = [shelf.put(tensor) for tensor in tensors]
        for shelved, tensor in zip(put, tensors, strict=True):
            found = shelf.read(shelved)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        for shelved in put:
            shelf.give_back(shelved)
        assert shelf.free_bytes == 1 << 20


def test_a_strided_tensor_is_written_as_its_values(file):
    shelf = Shelf(file.fileno(), 1 << 20)
    tensor = torch.arange(12).reshape(3, 4).t()
    assert torch.equal(shelf.read(shelf.put(tensor)), tensor)


def test_a_full_shelf_takes_nothing_and_says_so(file, caplog):
    shelf = Shelf(file.fileno(), 1024)
    assert shelf.put(torch.zeros(1000)) is None
    assert "full" in caplog.text
    assert shelf.put(torch.zeros(100)) is not None


def test_a_file_that_cannot_be_written_takes_nothing(tmp_path, caplog):
    path = tmp_path / "shelf"
    path.touch()
    with path.open("rb") as opened:
        shelf = Shelf(opened.fileno(), 1024)
        assert shelf.put(torch.zeros(10)) is None
    assert "cannot be written" in caplog.text
    assert shelf.free_bytes == 1024


def test_a_file_that_was_cut_short_is_an_error(file):
    shelf = Shelf(file.fileno(), 1024)
    shelved = shelf.put(torch.zeros(10))
    file.truncate(8)
    with pytest.raises(TensorError, match="the shelf ends at 8"):
        shelf.read(shelved)


def committed(log, step):
    """A step of one unit whose tensors hold the step's number; its input is an output, too."""
    x = torch.full((64,), float(step))
    forward = ForwardRecord(0, 0, True, "forward", {"0": x}, {"0": x}, {"b": torch.ones(1)})
    log.open.forwards[(0, 0)] = forward
    log.open.units.append(UnitRecord(forward, 0, {"0": x + 1}, {"0": x + 2}))
    log.open.step = step
    weights, optimizer = {"w": torch.full((32,), float(step))}, {"w/m": torch.full((32,), -float(step))}
    log.open.before = snapshots.take(weights, {"b": torch.ones(1)}, optimizer, log.make_room(True))
    log.open.gradient = {"w": torch.full((32,), 10.0 + step)}
    return log.commit(step + 1)


def test_older_steps_are_on_the_shelf_and_come_back_whole(file):
    shelf = Shelf(file.fileno(), 1 << 20)
    log = StepLog(3, 1 << 30, shelf)
    records = [committed(log, step) for step in range(5)]
    assert log.steps() == [2, 3, 4]
    assert log.committed(4).before.weights["w"] is records[4].before.weights["w"]
    found = log.committed(2).mapped(from_shelf)
    assert torch.equal(found.before.weights["w"], torch.full((32,), 2.0))
    assert torch.equal(found.before.optimizer["w/m"], torch.full((32,), -2.0))
    assert torch.equal(found.gradient["w"], torch.full((32,), 12.0))
    (one,) = found.all_units()
    assert torch.equal(one.forward.x["0"], torch.full((64,), 2.0))
    assert torch.equal(one.gx["0"], torch.full((64,), 4.0))
    assert torch.equal(log.state_after(2).mapped(from_shelf).weights["w"], torch.full((32,), 3.0))
    assert torch.equal(log.state_after(3).weights["w"], torch.full((32,), 4.0))
    assert log.state_after(4) is None


def test_a_step_that_leaves_the_window_leaves_the_shelf(file):
    shelf = Shelf(file.fileno(), 1 << 20)
    log = StepLog(2, 1 << 30, shelf)
    free = []
    for step in range(6):
        committed(log, step)
        free.append(shelf.free_bytes)
    assert len(set(free[2:])) == 1


def test_where_the_shelf_is_full_nothing_is_lost_and_no_memory_is_lent(file):
    log = StepLog(3, 1 << 30, Shelf(file.fileno(), 256))
    for step in range(4):
        committed(log, step)
    for step in (1, 2, 3):
        found = log.committed(step).mapped(from_shelf)
        assert torch.equal(found.before.weights["w"], torch.full((32,), float(step)))
        assert torch.equal(found.before.optimizer["w/m"], torch.full((32,), -float(step)))
    assert not isinstance(log.committed(3).gradient["w"], Shelved)


def test_a_shelved_step_lends_its_gradient_but_for_sums_that_others_were_sent(file):
    log = StepLog(3, 1 << 30, Shelf(file.fileno(), 1 << 20))
    record = committed(log, 0)
    record.gradient["tied"] = torch.ones(8)
    record.sent_sums = {1: {"tied": record.gradient["tied"]}}
    gradient = record.gradient["w"]
    lent = log.put_gradient_away(record)
    assert list(lent) == ["w"]
    assert lent["w"] is gradient
    lent["w"].zero_()
    assert torch.equal(log.committed(0).mapped(from_shelf).gradient["w"], torch.full((32,), 10.0))
    assert log.put_gradient_away(record) == {}


def test_a_copy_of_a_state_takes_room_until_it_is_given_up_or_its_step_is_dropped(file):
    shelf = Shelf(file.fileno(), 1 << 20)
    log = StepLog(3, 1 << 30, shelf)
    free = shelf.free_bytes
    copy = log.copy({"w": torch.ones(32)}, {"w/m": torch.zeros(32)})
    assert copy.is_all(Shelved)
    assert shelf.free_bytes < free
    log.give_up(copy)
    assert shelf.free_bytes == free
    log.open.before = log.copy({"w": torch.ones(32)}, {})
    log.commit(1)
    assert torch.equal(log.committed(0).mapped(from_shelf).before.weights["w"], torch.ones(32))
    log.close()
    assert shelf.free_bytes == free


def test_where_a_copy_does_not_fit_none_is_made_and_no_room_is_lost(file):
    shelf = Shelf(file.fileno(), 256)
    assert StepLog(3, 1 << 30, shelf).copy({"a": torch.ones(32), "b": torch.ones(64)}, {}) is None
    assert shelf.free_bytes == 256


def test_hashed_tensors_of_the_open_step_leave_memory_and_are_opened_from_the_shelf(file):
    log = StepLog(2, 1 << 30, Shelf(file.fileno(), 1 << 20))
    forward = ForwardRecord(0, 0, True, "forward", {"0": torch.arange(8.0)}, {"0": torch.arange(4.0)}, {})
    log.open.forwards[(0, 0)] = forward
    log.put_away(log.open, [forward.x, forward.y])
    assert isinstance(forward.x["0"], Shelved)
    log.open.before = snapshots.take({"w": torch.ones(3)}, {}, {})
    opened = opening([log.commit(1)], 1, 0, {}, {})
    body = bytearray(opened.num_bytes)
    opened.write(memoryview(body))
    found = torch.frombuffer(body, dtype=torch.float32, count=15)
    assert found.tolist() == [1.0] * 3 + list(map(float, range(8))) + list(map(float, range(4)))


def test_a_step_dropped_before_its_tensors_are_hashed_takes_no_room(file):
    shelf = Shelf(file.fileno(), 1 << 20)
    log, free = StepLog(2, 1 << 30, shelf), shelf.free_bytes
    record, early, late = log.open, {"0": torch.ones(64)}, {"0": torch.ones(64)}
    record.forwards[(0, 0)] = ForwardRecord(0, 0, True, "forward", early, late, {})
    log.put_away(record, [early])
    assert shelf.free_bytes < free
    log.begin(0)
    log.put_away(record, [late])
    assert shelf.free_bytes == free
    assert torch.equal(late["0"], torch.ones(64))
