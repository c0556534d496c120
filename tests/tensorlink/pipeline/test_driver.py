"""The user's end believes no stage, waits for none for ever, and says what ended a job."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from smartnodes_core.errors import (
    ConnectionLostError,
    DeadlineError,
    JobError,
    PeerUnreachableError,
    ProtocolError,
    WorkerLostError,
)
from smartnodes_core.rpc import PendingCall, Reply
from tensorlink.pipeline.driver import Call, Driver
from tensorlink.pipeline.frames import tensor_bytes
from tensorlink.records import Cut, Slot

INPUTS = Cut(slots=[Slot(name="x", type="tensor", dtype="float32", shape=[-1, 3], requires_grad=True)])
OUTPUTS = Cut(slots=[Slot(name="y", type="tensor", dtype="float32", shape=[-1, 2], requires_grad=True)])
LAST = 1


class User:
    """A user node whose peers do as the test says."""

    def __init__(self):
        self.error, self.calls, self.told = None, [], []
        self.pending, self.answers = [], True
        self.all_called = threading.Event()

    def begin_call(self, stage, method, params, body, *, timeout_s, max_body_bytes):
        self.calls.append((stage.stage, method, timeout_s))
        if self.error is not None:
            raise self.error
        connection = SimpleNamespace(peer=f"stage {stage.stage}")
        self.pending.append(PendingCall(connection, method, max_body_bytes, timeout_s))
        if len(self.pending) > LAST:
            self.all_called.set()
        if self.answers:
            self.pending[-1].settle(Reply(params, memoryview(b"")), None)
        return self.pending[-1]

    def notify(self, stage, method, params):
        if self.error is not None:
            raise self.error
        self.told.append((stage.stage, method))

    def stream(self, stage, header, data, on_sent):
        if self.error is not None:
            raise self.error
        on_sent()


@pytest.fixture
def user():
    return User()


@pytest.fixture
def driver(user):
    made = Driver(user, INPUTS, OUTPUTS, timeout_s=0.2)
    record = SimpleNamespace(num_stages=LAST + 1)
    made.attach(SimpleNamespace(record=record, worker_of=lambda stage: b"w" * 32))
    return made


@pytest.fixture
def call(driver):
    made = Call(step=3, index=1, samples=[2, 1], num_backwards=1)
    driver.begin(made, {"type": "forward"})
    return made


def header(**changes):
    return {
        "step": 3, "call": 1, "micro_batch": 0, "slot": 0, "type": "output", "dtype": "float32", "shape": [2, 2],
        "backward_pass": 0, **changes,
    }  # fmt: skip


def deliver(driver, tensor, stage=LAST, **changes):
    sent = header(shape=list(tensor.shape), **changes)
    body = driver.allocate(stage, sent, tensor.numel() * 4)
    body[:] = tensor_bytes(tensor)
    driver.on_frame(stage, sent, body)


def test_outputs_and_input_gradients_arrive_where_they_belong(driver, call):
    y, gx = torch.randn(2, 2), torch.randn(2, 3)
    deliver(driver, y)
    deliver(driver, gx, stage=0, type="activation_gradient")
    assert torch.equal(call.outputs[(0, 0)], y)
    assert torch.equal(call.input_gradients[(0, 0, 0)], gx)


def test_what_comes_twice_counts_once(driver, call):
    first = torch.zeros(2, 2)
    deliver(driver, first)
    deliver(driver, torch.ones(2, 2))
    assert torch.equal(call.outputs[(0, 0)], first)


def test_a_gradient_of_a_backward_nobody_asked_for_is_dropped(driver, call):
    deliver(driver, torch.ones(2, 3), stage=0, type="activation_gradient", backward_pass=7)
    assert call.input_gradients == {}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {}),
        (LAST, {"slot": 1}),
        (LAST, {"slot": -1}),
        (LAST, {"slot": None}),
        (LAST, {"type": "activation"}),
        (LAST, {"type": "activation_gradient"}),
        (LAST, {"dtype": "float64"}),
        (LAST, {"shape": [2, 3]}),
        (LAST, {"micro_batch": "0"}),
        (LAST, {"step": [3]}),
    ],
)
def test_frames_that_nobody_asked_for_are_refused(driver, call, stage, changes):
    with pytest.raises(ProtocolError):
        driver.allocate(stage, header(**changes), 16)


@pytest.mark.parametrize("changes", [{"call": 2}, {"step": 2}, {"micro_batch": 2}])
def test_frames_of_a_call_that_was_given_up_are_skipped_without_blame(driver, call, changes):
    with pytest.raises(JobError, match="not under way"):
        driver.allocate(LAST, header(**changes), 16)
    driver.forget(call)
    with pytest.raises(JobError, match="not under way"):
        driver.allocate(LAST, header(), 16)


@pytest.mark.parametrize(
    ("event", "params"),
    [
        ("loss", {}),
        ("loss", {"step": 3, "call": 1, "micro_batch": 0, "value": 1.5}),
        ("loss", {"step": 3, "call": 1, "micro_batch": 0, "value": "x"}),
        ("done", {"step": 3, "call": 1, "type": "forward"}),
        ("done", {"step": "3", "call": 1}),
        ("done", {"step": 3, "call": 1, "type": "forward", "backward_pass": 0, "busy_s": (0.5).hex()}),
        *(
            ("done", {"step": 3, "call": 1, "backward_pass": 0, "busy_s": (0.5).hex(), "timeline": timeline})
            for timeline in ([["X", 0, 1, 2]], [["F", 0, 1]], [["F", 0, 1, -2]], [["F", 0, 1, 2.0]], ["F012"], "F")
        ),
    ],
)
def test_malformed_events_are_the_senders_fault(driver, call, event, params):
    with pytest.raises(ProtocolError):
        driver.on_event(LAST, event, params)


def test_losses_come_from_the_last_stage_alone(driver, call):
    params = {"step": 3, "call": 1, "micro_batch": 0, "value": (1.5).hex()}
    driver.on_event(0, "loss", params)
    assert call.losses == {}
    driver.on_event(LAST, "loss", params)
    assert call.losses == {0: 1.5}


def test_a_wait_ends_with_what_it_waits_for(driver, call):
    def events():
        for stage in range(LAST + 1):
            params = {
                "step": 3,
                "call": 1,
                "type": "forward",
                "backward_pass": 0,
                "busy_s": (0.5).hex(),
                "timeline": [["F", 0, 10**9, 2 * 10**9]],
            }
            driver.on_event(stage, "done", params)

    timer = threading.Timer(0.05, events)
    timer.start()
    driver.wait_for(lambda: call.is_done("forward", 0, LAST + 1), "a forward")
    assert call.timelines == {stage: [("F", 0, 10**9, 2 * 10**9)] for stage in range(LAST + 1)}
    assert driver.tally.busy_s(0) == 0.5


def test_silence_ends_a_wait_and_says_what_was_waited_for(driver, call):
    with pytest.raises(DeadlineError, match=r"waited for a forward, and no stage .* raise timeout_s"):
        driver.wait_for(lambda: False, "a forward")


def test_a_failing_stage_ends_waits_with_its_own_error(driver, call):
    failed = {"code": "non-finite", "message": "NaN in the loss"}
    threading.Timer(0.05, driver.on_event, (LAST, "failed", failed)).start()
    with pytest.raises(Exception, match="NaN in the loss") as raised:
        driver.wait_for(lambda: False, "a forward")
    assert raised.value.code == "non-finite"


@pytest.mark.parametrize("error", [ConnectionLostError("reset"), PeerUnreachableError("refused")])
def test_a_lost_connection_is_a_lost_worker(driver, call, user, error):
    user.error = error
    for act in (
        lambda: driver.call(1, "state", {}),
        lambda: driver.send(1, call, 0, 0, torch.zeros(2, 2), type="target"),
        lambda: driver.tell_all("backward", {}),
        lambda: driver.call_all("prepare", lambda stage: {}),
    ):
        with pytest.raises(WorkerLostError, match="stage 1 is gone"):
            act()


def test_the_first_reason_that_ended_a_job_is_the_one_that_is_told(driver, call):
    driver.on_lost(1, WorkerLostError("the worker of stage 1 is gone: power"))
    driver.on_lost(0, WorkerLostError("the worker of stage 0 is gone: later"))
    driver.close()
    with pytest.raises(WorkerLostError, match="power"):
        driver.check()


def test_a_call_has_time_for_the_bytes_it_carries(driver, user):
    driver.call(0, "load", {}, [b"x" * 1_000_000])
    driver.call(0, "prepare", {})
    assert user.calls[0][2] > user.calls[1][2] + 3


def test_all_stages_are_called_before_any_has_answered(driver, user):
    user.answers = False

    def answer_backwards():
        user.all_called.wait(10)
        for stage in reversed(range(LAST + 1)):
            user.pending[stage].settle(Reply({"stage": stage}, memoryview(b"")), None)

    threading.Thread(target=answer_backwards, daemon=True).start()
    replies = driver.call_all("prepare", lambda stage: {}, wait_s=20)
    assert [reply.params["stage"] for reply in replies] == [0, 1]


def test_the_error_that_came_first_is_the_one_that_is_raised(driver, user):
    user.answers = False

    def fail():
        user.all_called.wait(10)
        user.pending[1].settle(None, JobError("the cause"))
        user.pending[0].settle(None, JobError("what follows from it"))

    threading.Thread(target=fail, daemon=True).start()
    with pytest.raises(JobError, match="the cause"):
        driver.call_all("prepare", lambda stage: {}, wait_s=20)


def test_nothing_is_done_for_a_closed_job(driver, user):
    driver.close()
    with pytest.raises(JobError, match="the job is closed"):
        driver.call_all("state", lambda stage: {})
    assert user.calls == []


def test_a_stage_may_tell_its_gradient_s_norm_with_its_end(driver, call):
    done = {"step": 3, "call": 1, "type": "train_step", "backward_pass": 0, "busy_s": (0.5).hex(), "timeline": []}
    driver.on_event(0, "done", done)
    driver.on_event(LAST, "done", {**done, "squared_norm": (2.5).hex(), "non_finite": "w"})
    assert call.prepared == {LAST: (2.5, "w")}
    for wrong in ({"squared_norm": 2.5}, {"squared_norm": "x", "non_finite": ""}, {"squared_norm": (1.0).hex()}):
        with pytest.raises(ProtocolError):
            driver.on_event(0, "done", {**done, **wrong})
    assert call.prepared == {LAST: (2.5, "w")}
