"""Parts go out in turn, a few at a time; a broken connection costs those that were under way, another error ends it."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from smartnodes_core.errors import WorkerLostError
from tensorlink import weight_sending
from tensorlink.errors import TensorError
from tensorlink.program import parts
from tensorlink.program.weights import tensor_bytes
from tensorlink.weight_sending import NUM_SENDERS, send_parts


class Driver:
    """Takes parts; `gate` holds them up."""

    def __init__(self, gate=None, fails_at=None, num_losses=0):
        self.calls, self.under_way, self.most = [], 0, 0
        self.lock, self.gate, self.fails_at = threading.Lock(), gate, fails_at
        self.num_losses, self.num_taken_up = num_losses, 0

    def take_up(self):
        self.num_taken_up += 1

    def call(self, stage, method, params, body):
        assert method == "load_part"
        with self.lock:
            self.calls.append((stage, params["part"], b"".join(body)))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        if self.gate is not None:
            self.gate.wait(10)
        with self.lock:
            self.under_way -= 1
        if params["part"] == self.fails_at:
            raise TensorError("refused")
        if params["part"] == 3 and self.num_losses > 0:
            self.num_losses -= 1
            raise WorkerLostError("gone")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 16)


def stages(*sizes):
    return {
        stage: {"a": torch.arange(size, dtype=torch.float32), "b": torch.ones(3)} for stage, size in enumerate(sizes)
    }


def test_every_part_goes_out_once_with_the_bytes_of_its_tensors(short):
    states = stages(10, 0, 33)
    driver, moved = Driver(), []
    send_parts(driver, states, moved.append)
    for stage, state in states.items():
        sent = [data for at, _, data in sorted(driver.calls) if at == stage]
        assert b"".join(sent) == b"".join(bytes(tensor_bytes(state[name])) for name in "ab")
    assert len({call[:2] for call in driver.calls}) == len(driver.calls)
    assert sum(moved) == sum(4 * len(tensor) for state in states.values() for tensor in state.values())


def test_stages_take_turns_and_a_few_parts_are_under_way_at_once(short):
    states = stages(100, 100)
    gate = threading.Barrier(NUM_SENDERS)  # passes where that many are under way, and breaks where there are fewer
    driver = Driver(gate)
    send_parts(driver, states)
    assert driver.most == NUM_SENDERS
    assert {call[:2] for call in driver.calls[:4]} == {(0, 0), (1, 0), (0, 1), (1, 1)}


def test_the_first_error_ends_it(short):
    states = stages(4000)
    driver = Driver(fails_at=5)
    with pytest.raises(TensorError, match="refused"):
        send_parts(driver, states)
    assert len(driver.calls) < 100
    assert driver.under_way == 0


def test_after_a_broken_connection_the_same_parts_are_sent_again_and_no_others(short, monkeypatch):
    monkeypatch.setattr(weight_sending, "PAUSE_S", 0.001)
    driver, moved = Driver(num_losses=3), []
    send_parts(driver, stages(100), moved.append)
    sent = Counter(part for _, part, _ in driver.calls)
    assert driver.num_taken_up == 3
    assert sent.pop(3) == 4
    assert set(sent.values()) == {1}
    assert sum(moved) == 4 * 103


def test_a_worker_that_stays_away_ends_it(short, monkeypatch):
    monkeypatch.setattr(weight_sending, "PAUSE_S", 0.001)
    monkeypatch.setattr(weight_sending, "RESUME_S", 0.05)
    driver = Driver(num_losses=1 << 30)
    with pytest.raises(WorkerLostError, match="gone"):
        send_parts(driver, stages(4000))
    assert driver.under_way == 0


def test_nothing_to_send_is_no_call():
    driver = Driver()
    send_parts(driver, {0: {}})
    assert driver.calls == []
