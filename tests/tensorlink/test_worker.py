"""A rig takes from peers what the job allows, and nothing that they make up."""

from __future__ import annotations

import os
import queue
import signal

import pytest
import torch
from torch import nn

from smartnodes_core.errors import (
    AuthorityError,
    BusyError,
    JobError,
    ProtocolError,
    RecordError,
    WorkerLostError,
)
from smartnodes_core.identity import Identity
from smartnodes_core.jobs import Job, StageOfJob, spec_digest
from smartnodes_core.records import NO_DIGEST, Assignment, AuditTerms, JobRecord, Plan
from tensorlink import stage_compute
from tensorlink.audit.commitments import initial_root
from tensorlink.ordered_data import Place, step_root
from tensorlink.program.trace import trace
from tensorlink.program.weights import tensor_bytes
from tensorlink.records import PART_BYTES, Decide, StepOrder
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile
from tensorlink.worker import JOB_TYPE, StageHandler

AUTHOR, OTHER = Identity.create(), Identity.create()
HERE, NEXT, LAST = Identity.create(), Identity.create(), Identity.create()
X = torch.randn(4, 3)


class Tied(nn.Module):
    """The first of three layers comes last again."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ self.layers[0].weight


class Port:
    """A worker node reduced to what a handler tells it."""

    def __init__(self):
        self.failures, self.told, self.streamed = queue.Queue(), queue.Queue(), queue.Queue()

    def fail(self, stage, error):
        self.failures.put(error)

    def tell_author(self, stage, event, params):
        self.told.put((event, params))

    def stream(self, to, header, body, on_sent):
        self.streamed.put((to, header, bytes(body)))
        on_sent()

    def commit(self, stage, content):
        self.told.put(("commitment", content))


@pytest.fixture(scope="module")
def program():
    traced = trace(nn.Linear(3, 2), (X,))
    whole = traced.whole()
    return whole, traced.state(whole)


def make_job(program, num_stages=1, job_type=JOB_TYPE, terms=None):
    """A job of which this rig runs stage 0 (and another worker the next)."""
    whole, state = program
    data = whole.to_json()
    audit = AuditTerms(unit_rate_ppm=0, step_rate_ppm=0, window_steps=4, window_s=60, auditors=[])
    record = JobRecord(
        network_id=1, job_type=job_type, author=AUTHOR.node_key, nonce=os.urandom(32), created_at_s=1,
        num_stages=num_stages, num_replicas=1, specs=[spec_digest(data)] * num_stages,
        initial_roots=[initial_root(whole, state)] * num_stages, work_units=[1] * num_stages, audit=audit,
        terms={"seed": 0, "samples": 4} if terms is None else terms,
    )  # fmt: skip
    assignments = [
        Assignment(stage=stage, replica=0, worker=worker.node_key, endpoint="127.0.0.1:1")
        for stage, worker in zip(range(num_stages), (HERE, NEXT, LAST), strict=False)
    ]
    plan = Plan(
        job=record.digest(), version=0, assignments=assignments, spares=[], validators=[OTHER.node_key], reason=""
    )
    return Job.open(AUTHOR.sign(record).encode(), AUTHOR.sign(plan).encode())


@pytest.fixture(scope="module")
def handler():
    made = StageHandler()
    made.attach(Port())
    made.start()
    yield made
    made.stop()


@pytest.fixture
def stage(handler, program):
    made = StageOfJob(make_job(program), 0, 0)
    handler.assign(made)
    yield made
    handler.release(made, "the test is over")


@pytest.fixture
def loaded(handler, stage, program):
    load(handler, stage, program)
    return stage


def load(handler, stage, program):
    whole, state = program
    handler.call(stage, "load", {}, memoryview(whole.to_json()))
    handler.call(stage, "load_part", {"part": 0}, memoryview(part_of(state)))
    return handler.call(stage, "load_end", {}, memoryview(b""))


def part_of(state):
    """A state of less than a part: its tensors by name, one after the other."""
    return b"".join(bytes(tensor_bytes(state[name])) for name in sorted(state))


def header(**changes):
    return {
        "step": 0, "call": 0, "micro_batch": 0, "slot": 0, "backward_pass": 0, "type": "activation",
        "dtype": "float32", "shape": [4, 3], **changes,
    }  # fmt: skip


def without(name):
    return {key: value for key, value in header().items() if key != name}


@pytest.mark.parametrize("name", ["step", "call", "micro_batch", "slot", "backward_pass", "dtype", "shape", "type"])
def test_a_header_with_a_field_missing_is_the_peers_fault(handler, loaded, name):
    with pytest.raises(ProtocolError):
        handler.allocate(loaded, AUTHOR.node_key, without(name), 48)


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        ({"step": -1}, 48),
        ({"slot": "0"}, 48),
        ({"call": 1 << 60}, 48),
        ({"shape": [4, -3]}, 48),
        ({}, 47),
        ({}, 1 << 45),
        ({"shape": [1 << 40, 3]}, 12 << 40),
        ({"dtype": "object"}, 48),
        ({"type": "output"}, 48),
        ({"type": "loss"}, 48),
    ],
)
def test_a_header_that_belies_its_body_takes_no_memory(handler, loaded, changes, num_bytes):
    with pytest.raises(ProtocolError):
        handler.allocate(loaded, AUTHOR.node_key, header(**changes), num_bytes)
    assert handler._compute.inflight.of(loaded.key) == 0


def test_tensors_come_from_where_they_have_to_come_from(handler, program):
    first = StageOfJob(make_job(program, num_stages=2), 0, 0)
    handler.assign(first)
    for sender, type in [
        (NEXT, "activation"),
        (AUTHOR, "activation_gradient"),
        (OTHER, "activation"),
        (NEXT, "target"),
    ]:
        with pytest.raises(ProtocolError, match="from this peer"):
            handler.allocate(first, sender.node_key, header(type=type), 48)
    handler.release(first, "done")


def test_sums_of_tied_parameters_come_from_the_stages_that_hold_them(handler, processes):
    x = torch.randn(4, 3)
    traced = trace(Tied(), (x,))
    programs = partition(traced, profile(traced, (x,), measured=False), 3)
    here = StageOfJob(make_job((programs[0], traced.state(programs[0])), num_stages=3), 0, 0)
    frame = {"type": "shared", "step": 0, "call": 0, "num_units": 1, "from_stage": 2, "slot": 0}
    frame |= {"dtype": "float32", "shape": [3, 3]}
    handler.assign(here)
    with pytest.raises(ProtocolError, match="from this peer"):  # before the program says who holds what
        handler.allocate(here, LAST.node_key, dict(frame), 36)
    load(handler, here, (programs[0], traced.state(programs[0])))
    for sender, changes in [
        (NEXT, {"from_stage": 1}),  # runs a stage of the job, which holds nothing of this
        (NEXT, {}),
        (AUTHOR, {}),
        (OTHER, {}),
        (LAST, {"from_stage": 0}),
        (LAST, {"from_stage": 7}),
        (LAST, {"from_stage": "2"}),
        (LAST, {"num_units": -1}),
        (LAST, {"shape": [3]}),
    ]:
        with pytest.raises(ProtocolError):
            handler.allocate(here, sender.node_key, {**frame, **changes}, 36)
    assert handler._compute.inflight.of(here.key) == 0
    handler.allocate(here, LAST.node_key, frame, 36)[:] = bytes(36)
    handler.receive(here, LAST.node_key, frame, memoryview(bytes(36)))
    assert processes.wait_until(lambda: handler._compute.inflight.of(here.key) == 0, 10) is not None
    handler.release(here, "done")


def test_a_stage_that_is_not_loaded_takes_nothing(handler, stage):
    with pytest.raises(JobError, match="not loaded yet"):
        handler.allocate(stage, AUTHOR.node_key, header(), 48)


def test_a_flood_is_refused_and_the_author_told(handler, loaded, monkeypatch):
    monkeypatch.setattr(handler._compute.inflight, "limit_bytes", 100)
    headers = [header(micro_batch=index) for index in range(3)]
    kept = [handler.allocate(loaded, AUTHOR.node_key, each, 48) for each in headers[:2]]
    with pytest.raises(BusyError, match="96 bytes of tensors wait"):
        handler.allocate(loaded, AUTHOR.node_key, headers[2], 48)
    assert "smaller micro-batches" in str(handler.port.failures.get(timeout=5))
    assert len(kept) == 2


def test_a_frame_runs_through_the_stage_and_its_memory_comes_back(handler, loaded):
    params = {
        "step": 0, "call": 0, "num_micro_batches": 1, "samples": [4], "type": "forward", "training": False,
        "grad": False, "weights": [], "schedule": "gpipe",
    }  # fmt: skip
    handler.call(loaded, "begin", params, memoryview(b""))
    frame = header()
    body = handler.allocate(loaded, AUTHOR.node_key, frame, 48)
    body[:] = tensor_bytes(X)
    handler.receive(loaded, AUTHOR.node_key, frame, body)
    to, sent, data = handler.port.streamed.get(timeout=10)
    assert (to, sent["type"], sent["shape"], len(data)) == (AUTHOR.node_key, "output", [4, 2], 32)
    assert handler.port.told.get(timeout=10)[0] == "done"
    handler.call(loaded, "state", {}, memoryview(b""))
    assert handler._compute.inflight.of(loaded.key) == 0


def test_jobs_of_other_types_or_terms_are_refused(handler, program):
    for options, says in [({"job_type": "render/1"}, "render/1"), ({"terms": {"seed": 1}}, "seed, samples")]:
        with pytest.raises(JobError, match=says):
            handler.assign(StageOfJob(make_job(program, **options), 0, 0))


def test_only_the_program_and_weights_of_the_job_record_are_loaded(handler, stage, program):
    whole, state = program
    with pytest.raises(RecordError, match="program is not the one"):
        handler.call(stage, "load", {}, memoryview(whole.to_json()[:-1]))
    with pytest.raises(ProtocolError, match="begin with load"):
        handler.call(stage, "load_part", {"part": 0}, memoryview(part_of(state)))
    with pytest.raises(ProtocolError, match="at most"):
        handler.call(stage, "load_part", {"part": 0}, memoryview(bytes(PART_BYTES + 1)))
    with pytest.raises(ProtocolError, match="part"):
        handler.call(stage, "load_part", {}, memoryview(part_of(state)))
    changed = {name: value + 1 for name, value in state.items()}
    with pytest.raises(RecordError, match="weights are not those"):
        load(handler, stage, (whole, changed))
    with pytest.raises(JobError, match="not loaded yet"):
        handler.allocate(stage, AUTHOR.node_key, header(), 48)
    load(handler, stage, program)  # an author may try again
    handler.allocate(stage, AUTHOR.node_key, header(), 48)


@pytest.mark.parametrize(
    ("method", "params", "body"),
    [
        ("open_door", {}, b""),
        ("prepare", {}, b""),
        ("prepare", {"prepare": 5}, b""),
        ("decide", {"decide": "x"}, b""),
        ("zero_grad", {"step": -1}, b""),
        ("set_optimizer", {}, b"{"),
        ("state", {}, b"{"),
        ("state", {}, b"[3]"),
        ("optimizer_state", {}, b"[" * 100),
        ("optimizer_state", {}, b'["no such parameter"]'),
    ],
)
def test_malformed_calls_are_the_callers_fault(handler, loaded, method, params, body):
    with pytest.raises(ProtocolError):
        handler.call(loaded, method, params, memoryview(body))


def test_a_step_is_decided_by_the_authors_signed_order_alone(handler, loaded):
    order = StepOrder(
        job=loaded.job.id, plan_version=0, step=0, input_root=NO_DIGEST, target_root=NO_DIGEST, loss=NO_DIGEST,
        loss_weights=[], loss_scale="", clip_norm="", optimizer="SGD", options=[], replaced=[],
    )  # fmt: skip
    decide = Decide(
        job=loaded.job.id, plan_version=0, step=0, decision="commit", clip_coefficient=(1.0).hex(), order=order.digest()
    )
    with pytest.raises(AuthorityError, match="author's signed order"):
        handler.call(loaded, "decide", {"decide": decide.encode()}, memoryview(OTHER.sign(order).encode()))


def test_nothing_is_committed_to_under_an_order_that_names_other_inputs_than_came(handler, loaded):
    came, ordered = ({Place(0, 0): bytes([number] * 32)} for number in (1, 2))
    content = {"step": 0, "units": [{"call": 0, "backward_pass": 0, "micro_batch": 0, "roots": {"x": came[0, 0]}}]}
    for roots in (came, ordered):
        order = StepOrder(
            job=loaded.job.id, plan_version=0, step=0, input_root=step_root(roots), target_root=NO_DIGEST,
            loss=NO_DIGEST, loss_weights=[], loss_scale="", clip_norm="", optimizer="SGD", options=[], replaced=[],
        )  # fmt: skip
        handler._papers_of(loaded).add_order(0, AUTHOR.sign(order).encode(), NO_DIGEST)
        handler._compute._commit(loaded, content)
    assert handler.port.told.get(timeout=5)[0] == "commitment"
    assert handler.port.told.empty()
    assert "not those that the author's order names" in str(handler.port.failures.get(timeout=5))


def test_stages_are_lost_with_their_process_and_a_fresh_one_takes_others(handler, program, processes, monkeypatch):
    monkeypatch.setattr(stage_compute, "RESTART_AFTER_S", 0.1)
    stage = StageOfJob(make_job(program), 0, 0)
    handler.assign(stage)
    load(handler, stage, program)
    while not handler.port.failures.empty():
        handler.port.failures.get()
    os.kill(handler._compute._sandbox.pid, signal.SIGKILL)
    error = handler.port.failures.get(timeout=5)
    assert isinstance(error, WorkerLostError)
    assert "stage 0" in str(error)
    assert "SIGKILL" in str(error)
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        handler.call(stage, "state", {}, memoryview(b""))
    handler.release(stage, "lost")
    other = StageOfJob(make_job(program), 0, 0)
    handler.assign(other)

    def loads():
        try:
            load(handler, other, program)
        except Exception:
            return False
        return True

    assert processes.wait_until(loads, 10) is not None
    handler.release(other, "done")
