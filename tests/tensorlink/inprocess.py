"""A network inside this process: stages compute on one thread of their own, and everything sent to them is kept.

No sockets, no audits: for tests of what the user's side does.
"""

from __future__ import annotations

import json
import queue
import threading
from concurrent.futures import Executor, Future
from typing import NamedTuple

import torch

from smartnodes_core.identity import Identity, verify
from smartnodes_core.jobs import Job
from smartnodes_core.nodes.user import UserNode
from smartnodes_core.records import Announcement, AuditTerms, Signed
from smartnodes_core.rpc import PendingCall, Reply
from tensorlink.audit.commitments import initial_root_of
from tensorlink.pipeline.frames import dtype_name, tensor_bytes
from tensorlink.pipeline.inbox import Delivery
from tensorlink.pipeline.stage import Place, Stage
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import dump
from tensorlink.records import Decide, Prepare, StepOrder
from tensorlink.stage_loading import Loading

COUNTS = ("step", "call", "micro_batch", "type", "backward_pass")


class Sent(NamedTuple):
    """One message to a stage: `kind` is "call", "notify" or "stream"; `order` a decoded StepOrder."""

    kind: str
    stage: int
    name: str
    params: dict
    body: bytes
    order: StepOrder | None = None


class InProcess:
    """What `DistributedModel` needs of a network, with `workers` rigs that compute as real ones do."""

    network_id = 1
    offer = None
    heartbeat_s = 3600.0

    def __init__(self, workers=3):
        self.identity = Identity.create()
        self.user = User()
        self.audit_terms = AuditTerms(unit_rate_ppm=0, step_rate_ppm=0, window_steps=2, window_s=60, auditors=[])
        offers = {"free_slots": 1, "memory_bytes": 1 << 40, "flops_per_s": 1 << 30}
        self._workers = [
            Announcement(
                node_key=bytes([index + 1]) * 32,
                role="worker",
                network_id=1,
                sequence=0,
                expires_at_s=0,
                endpoints=[f"127.0.0.1:{index + 1}"],
                offers=offers,
            )
            for index in range(workers)
        ]

    def find_workers(self, wanted, timeout_s):
        return self._workers

    def announced_workers(self):
        return self._workers

    def drop(self, node_key, reason):
        pass

    def is_fraud(self, verdict):
        return True

    def reaches(self, worker):
        return True

    def validators(self):
        return [bytes(32)]

    def reputation_of(self, key):
        return None

    def opened(self, placement):
        pass


class User:
    """The user node: calls go to the stages' thread. `sent` and `events` are for tests to read, in order."""

    nonce = staticmethod(UserNode.nonce)

    def __init__(self):
        self.sent, self.events = [], []
        self._condition = self._reached = None

    def watch(self, condition):
        """Events from here on, and an event that is set when `condition(events)` holds."""
        self.events[:] = []
        self._condition, self._reached = condition, threading.Event()
        return self.events, self._reached

    def stall(self, event):
        """No stage computes before `event` is set."""
        self._stages.post(lambda: event.wait(20))

    def note(self, *event):
        self.events.append(event)
        if self._condition is not None and self._condition(self.events):
            self._reached.set()

    def open_job(self, record, plan, listener):
        job = Job(record.digest(), record, plan, b"", b"")
        self._stages = Stages(job, listener, self.note)
        return job

    def close_job(self, job):
        self._stages.stop()

    def begin_call(self, stage, method, params, body=(), *, timeout_s, max_body_bytes=0):
        parts = [bytes(part) for part in body]
        order = verify(Signed.decode(parts[0]), StepOrder) if method == "decide" else None
        self.sent.append(Sent("call", stage.stage, method, params, b"".join(parts), order))
        pending = PendingCall(None, method, max_body_bytes, 60)
        self._stages.ask(pending, lambda: self._stages.call(stage.stage, method, params, parts, order))
        return pending

    def notify(self, stage, method, params):
        self.sent.append(Sent("notify", stage.stage, method, params, b""))
        self._stages.post(lambda: self._stages.tell(stage.stage, method, params))

    def stream(self, stage, header, body, on_sent):
        data = bytearray(body)
        self.sent.append(Sent("stream", stage.stage, header["type"], header, bytes(data)))
        self.note("sent", header["type"], header["micro_batch"])
        on_sent()
        tensor = torch.empty(header["shape"], dtype=DTYPES[header["dtype"]])
        tensor_bytes(tensor)[:] = data
        delivery = Delivery(*(header[name] for name in COUNTS))
        self._stages.post(lambda: self._stages.stages[stage.stage].receive(delivery, header["slot"], tensor))


class Stages:
    """The stages of a job and the thread that they compute on."""

    def __init__(self, job, listener, note):
        self.stages = [None] * job.record.num_stages
        self._note = note
        self._job, self._listener = job, listener
        self._work = queue.Queue()
        self._loading = Loading()
        threading.Thread(target=self._run, daemon=True).start()

    def post(self, work):
        self._work.put(work)

    def ask(self, pending, work):
        def run():
            try:
                pending.settle(work(), None)
            except Exception as error:
                pending.settle(None, error)

        self.post(run)

    def stop(self):
        self._work.put(None)

    def _run(self):
        while True:
            try:
                work = self._work.get(block=not any([stage is not None and stage.run_next() for stage in self.stages]))
            except queue.Empty:
                continue
            if work is None:
                return
            work()

    def tell(self, index, method, params):
        stage = self.stages[index]
        {"begin": stage.begin, "backward": stage.begin_backward}.get(
            method, lambda params: stage.drop_call(params["step"], params["call"])
        )(params)

    def call(self, index, method, params, body, order):
        stage = self.stages[index]
        if method == "load":
            program = StageProgram.from_json(body[0])

            def begun(state, digests):
                assert initial_root_of(program, digests) == self._job.record.initial_roots[index]
                self.stages[index] = self._loaded(index, program, state)
                return {}

            self._loading.begin(str(index), program.expected_state(), begun)
        elif method == "load_part":
            self._loading.put(str(index), params["part"], memoryview(b"".join(body)))
        elif method == "load_end":
            self._loading.end(str(index))
        elif method == "set_loss":
            stage.set_loss(LossProgram.from_json(body[0]))
        elif method == "set_optimizer":
            stage.set_optimizer(**json.loads(body[0]))
        elif method == "zero_grad":
            stage.zero_grad(params["step"])
        elif method == "prepare":
            assert stage.num_units == Prepare.decode(params["prepare"]).num_units
            step = Prepare.decode(params["prepare"]).step
            assert stage.share(step) == []  # no parameter of these models is tied over workers
            norm, bad = stage.squared_norm(step)
            return Reply({"squared_norm": norm.hex(), "non_finite": bad}, memoryview(b""))
        elif method == "decide":
            decide = Decide.decode(params["decide"])
            if decide.decision == "commit":
                coefficient = float.fromhex(decide.clip_coefficient)
                assert order.optimizer == stage.optimizer.name
                stage.commit(decide.step, coefficient, order.options, decide.order, order.clip_norm)
            else:
                stage.abort(decide.step)
        elif method == "state":
            held = {**stage.parameters, **stage.buffers}
            return Reply({}, memoryview(dump({name: held[name] for name in names(body, held)})))
        elif method == "optimizer_state":
            wanted, state = names(body, stage.parameters), stage.optimizer.state_tensors()
            return Reply({}, memoryview(dump({n: t for n, t in state.items() if n.rpartition("/")[0] in wanted})))
        elif method == "set_state":
            expected = stage.program.expected_state()

            def replaced(state, digests):
                parameters = {name: tensor for name, tensor in state.items() if name in stage.parameters}
                stage.set_state(parameters, {n: tensor for n, tensor in state.items() if n not in parameters})
                return {}

            self._loading.begin(str(index), {name: expected[name] for name in names(body, expected)}, replaced)
        elif method == "set_optimizer_state":

            def restored(state, digests):
                stage.set_optimizer_state(state)
                return {}

            self._loading.begin(str(index), stage.optimizer.expected_state(names(body, ())), restored)
        return Reply({}, memoryview(b""))

    def _loaded(self, index, program, state):
        parameters = {n: state[n].requires_grad_(spec.requires_grad) for n, spec in program.parameters.items()}
        record = self._job.record
        place = Place(self._job.id, 0, 0, index, record.num_stages, record.terms["seed"])
        buffers = {name: state[name] for name in program.buffers}
        return Stage(place, program, parameters, buffers, Port(self, index), Inline(), window_steps=2)

    def to_user(self, index, delivery, slot, tensor):
        self._note("came", delivery.type, delivery.micro_batch)
        body = tensor_bytes(tensor)
        header = {**delivery._asdict(), "slot": slot, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        view = self._listener.allocate(index, header, len(body))
        view[:] = body
        self._listener.on_frame(index, header, view)

    def event(self, index, name, params):
        self._listener.on_event(index, name, params)


def names(body, held):
    """What is asked for: all where the body is empty."""
    return json.loads(body[0]) if body else list(held)


class Port:
    """Where one stage's results go."""

    def __init__(self, stages, index):
        self._stages, self._index = stages, index

    def send(self, to, delivery, slot, tensor):
        kept = tensor.detach().clone(memory_format=torch.contiguous_format)
        if to == "user":
            self._stages.to_user(self._index, delivery, slot, kept)
        else:
            there = self._index + (1 if to == "next" else -1)
            self._stages.post(lambda: self._stages.stages[there].receive(delivery, slot, kept))

    def loss(self, call, micro_batch, value):
        place = {"step": call.step, "call": call.call, "micro_batch": micro_batch}
        self._stages.event(self._index, "loss", {**place, "value": value.hex()})

    def share(self, to, id, slot, tensor):
        self._stages.post(lambda: self._stages.stages[to].receive_sum(id, self._index, slot, tensor.clone()))

    def done(self, call, type, backward_pass, timeline, prepared=None):
        place = {"step": call.step, "call": call.call, "backward_pass": backward_pass}
        busy_s = sum(ended - began for _, _, began, ended in timeline) / 1e9
        norm = {} if prepared is None else {"squared_norm": prepared[0].hex(), "non_finite": prepared[1]}
        told = {**place, "type": type, "busy_s": busy_s.hex(), "timeline": timeline, **norm}
        self._stages.event(self._index, "done", told)


class Inline(Executor):
    """Hashes at once."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future
