"""The computing process as a node sees it: real processes, real pipes, shared memory."""

from __future__ import annotations

import dataclasses
import os
import queue
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from smartnodes_core.errors import AuditError, DeadlineError, ProtocolError, SandboxError
from smartnodes_core.records import Challenge, Commitment, Opening, OpeningItem, Unit
from smartnodes_core.sandbox import Limits, Sandbox
from tensorlink.errors import OptimizerError, ProgramError, TensorError
from tensorlink.footprint import RUNTIME_BYTES
from tensorlink.measure import numeric_class
from tensorlink.program import graph
from tensorlink.program.loss import trace_loss
from tensorlink.program.parts import Parts
from tensorlink.program.trace import trace
from tensorlink.program.values import DTYPE_NAMES, DTYPES, Value
from tensorlink.program.weights import load, tensor_bytes
from tensorlink.records import StepOrder
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile
from tensorlink.stage_optimizer import encode_options

COMMAND = [sys.executable, "-m", "tensorlink.compute"]
ARENA = 64 << 20
TIMEOUT_S = 60.0


def parts_of(expected, state):
    """The bytes of each part of a state."""
    for part in range(len(parts := Parts(expected))):
        yield b"".join(bytes(tensor_bytes(state[name])[begin:end]) for name, begin, end in parts.pieces(part))


class Node:
    """A rig's node reduced to what moves messages; links are function calls."""

    def __init__(self, limits=None, command=None):
        self.exits = queue.Queue()
        self.begin()
        self.sandbox = Sandbox(
            command or COMMAND,
            limits=limits or Limits(),
            inbound_bytes=ARENA,
            outbound_bytes=ARENA,
            on_event=self.on_event,
            on_exit=self.exits.put,
        )
        self.sandbox.start()

    def begin(self, index=0, num_stages=1):
        """Nothing is loaded, and nothing has happened."""
        self.index, self.num_stages, self.peers, self.keys = index, num_stages, [], set()
        self.events, self.released = queue.Queue(), threading.Semaphore(0)
        self.tensors, self.losses = {}, {}

    def is_idle(self):
        """Whether the process lives; its stages are unloaded, and it has said what it had to say of them."""
        try:
            for key in self.keys:
                self.call("unload", key=key)
        except SandboxError:
            return False
        return self.exits.empty()

    def call(self, method, **params):
        return self.sandbox.call(method, {"key": "k", **params}, TIMEOUT_S)

    def post(self, method, **params):
        self.sandbox.post(method, {"key": "k", **params})

    def put(self, data):
        piece = self.sandbox.inbound.allocate(max(1, len(data)), 5.0)
        piece.view[: len(data)] = data
        return {"offset": piece.offset, "num_bytes": len(data)}

    def load(self, program, state, job, /, **changes):
        params = {
            "job": job, "plan_version": 0, "replica": 0, "stage": self.index, "num_stages": self.num_stages,
            "program": program.to_json(), "loss_program": b"", "optimizer": {}, "seed": 7, "window_steps": 4,
            "state_interval_steps": 1,
            "limits": {},
        }  # fmt: skip
        self.keys.add(changes.get("key", "k"))
        begun = self.call("load", **{**params, **changes})
        place = {"key": changes["key"]} if "key" in changes else {}
        return {**begun, **self.send(program, state, **place)}

    def send(self, program, state, **place):
        return self.send_parts(parts_of(program.expected_state(), state), **place)

    def send_parts(self, parts, **place):
        for part, data in enumerate(parts):
            self.call("load_part", part=part, **self.put(data), **place)
        return self.call("load_end", **place)

    def replace(self, method, state):
        self.call(method, names=list(state))
        expected = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()}
        return self.send_parts(parts_of(expected, state))

    def tensor(self, tensor, step=0, call=0, micro_batch=0, slot=0, type="activation", backward_pass=0, **changes):
        params = {
            "step": step, "call": call, "micro_batch": micro_batch, "slot": slot, "type": type,
            "backward_pass": backward_pass, "dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape),
            **self.put(bytes(tensor_bytes(tensor))),
        }  # fmt: skip
        self.post("tensor", **{**params, **changes})

    def state(self, method="state", **params):
        return load(self.data(self.call(method, **params)))

    def data(self, reply):
        data = bytes(self.sandbox.outbound.view(reply["offset"], reply["num_bytes"]))
        self.sandbox.post("sent", {"offset": reply["offset"]})
        return data

    def on_event(self, name, params):
        if name == "released":
            self.sandbox.inbound.free(params["offset"])
            self.released.release()
        elif name == "send":
            self._move(params)
        elif name == "loss":
            self.losses[(params["step"], params["micro_batch"])] = float.fromhex(params["value"])
        else:
            self.events.put((name, params))

    def _move(self, params):
        view = self.sandbox.outbound.view(params["offset"], params["num_bytes"])
        tensor = torch.frombuffer(bytearray(view), dtype=torch.uint8)
        tensor = tensor.view(DTYPES[params["dtype"]]).reshape(params["shape"])
        self.sandbox.post("sent", {"offset": params["offset"]})
        if params["type"] == "shared":
            self.sends.put((params["to"], tensor))
            return
        place = [params[n] for n in ("step", "call", "micro_batch", "slot", "type", "backward_pass")]
        if params["to"] == "user" or not self.peers:
            self.tensors[tuple(place)] = tensor
        else:
            peer = self.peers[self.index + (1 if params["to"] == "next" else -1)]
            peer.tensor(tensor, *place)

    def wait(self, wanted):
        """The next event of this name; `failed` raises."""
        while True:
            name, params = self.events.get(timeout=TIMEOUT_S)
            if name == wanted:
                return params
            assert name != "failed" or wanted == "failed", params


@pytest.fixture(scope="module")
def idle():
    """What tests have left idle, with the usual limits: starting one takes seconds."""
    waiting = []
    yield waiting
    for node in waiting:
        node.sandbox.stop()


@pytest.fixture
def nodes(idle):
    """Makes nodes, each with a process; one of the usual kind is a fresh one or an idle one."""
    usual, others = [], []

    def make(index=0, num_stages=1, limits=None, command=None):
        if limits is None and command is None:
            node = idle.pop() if idle else Node()
            usual.append(node)
        else:
            node = Node(limits, command)
            others.append(node)
        node.begin(index, num_stages)
        return node

    yield make
    for node in usual:
        (idle if node.is_idle() else others).append(node)
    for node in others:
        node.sandbox.stop()


def begin(step=0, call=0, n=4, type="train_step", training=True, grad=True, schedule="1f1b"):
    weights = [(1 / n).hex()] * n if type == "train_step" else []
    return {
        "step": step, "call": call, "num_micro_batches": n, "samples": [], "training": training, "grad": grad,
        "type": type, "weights": weights, "schedule": schedule,
    }  # fmt: skip


def group(program, **options):
    return [{"parameters": list(program.parameters), **encode_options(options or {"lr": 1e-2})}]


def test_three_processes_train_bitwise_like_the_plain_loop(rig, nodes):
    modules = rig.MODELS["gpt"]()
    x, y = rig.batch("gpt")
    programs, states = rig.stage_programs(modules, x[:2])
    ring = [nodes(index, 3) for index in range(3)]
    example = nn.Sequential(*modules)(x[:2]).detach()
    for node, program, state in zip(ring, programs, states, strict=True):
        node.peers = ring
        loaded = node.load(program, state, rig.JOB)
        assert len(loaded["initial_root"]) == 32
        assert loaded["work_units"] > 0
        node.call("set_optimizer", optimizer={"name": "AdamW", "groups": group(program)})
    ring[2].call("set_loss", loss_program=trace_loss(rig.loss_fn, example, y[:2]).to_json())
    module = nn.Sequential(*modules)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False, lr=1e-2)
    for step in range(3):
        x, y = rig.batch("gpt", seed=step)
        for node in ring:
            node.post("begin", **begin(step))
        pieces = list(zip(torch.tensor_split(x, 4), torch.tensor_split(y, 4), strict=True))
        for m, (xm, ym) in enumerate(pieces):
            ring[0].tensor(xm, step, 0, m)
            ring[2].tensor(ym, step, 0, m, type="target")
        for node, program in zip(ring, programs, strict=True):
            prepared = node.call("prepare", step=step, num_units=4)
            assert prepared["non_finite"] == ""
            assert node.wait("done")["type"] == "train_step"
            node.call(
                "decide",
                step=step,
                decision="commit",
                clip_coefficient=(1.0).hex(),
                optimizer="AdamW",
                options=group(program),
                order=b"o" * 32,
            )
        optimizer.zero_grad()
        losses = []
        for xm, ym in pieces:
            loss = rig.loss_fn(module(xm), ym)
            (loss * 0.25).backward()
            losses.append(loss.item())
        optimizer.step()
        assert [ring[2].losses[(step, m)] for m in range(4)] == losses
        for node in ring:
            commitment = node.wait("commitment")
            assert commitment["step"] == step
            assert len(commitment["units"]) == 4
    for node, part in zip(ring, modules, strict=True):
        state = node.state()
        for name, parameter in part.named_parameters():
            assert torch.equal(state[name], parameter), name


@pytest.fixture
def gpt(rig):
    """The first stage of the GPT: program and state."""
    modules = rig.MODELS["gpt"]()
    x, _ = rig.batch("gpt")
    programs, states = rig.stage_programs(modules, x[:2])
    return programs, states, x


def only(program):
    return dataclasses.replace(program, stage_index=0, num_stages=1)


def test_a_rig_measures_itself_in_no_time(nodes):
    measured = nodes(limits=Limits(memory_bytes=4 << 30)).call("measure")
    assert measured["flops_per_s"] > 1e8
    assert measured["memory_bytes"] == (4 << 30) - RUNTIME_BYTES
    assert measured["num_threads"] == 1
    assert "threads 1" in measured["numeric_class"]


def test_shared_memory_comes_back_when_its_last_reader_is_done(nodes, gpt, rig):
    programs, states, x = gpt
    node = nodes(limits=Limits())  # one that has nothing to give back yet
    node.load(only(programs[0]), states[0], rig.JOB)
    assert node.released.acquire(timeout=10)  # the weights
    node.post("begin", **begin(n=2, type="forward", schedule="gpipe", training=False, grad=False))
    for m in range(2):
        node.tensor(x[:3], micro_batch=m)
    for _ in range(2):
        assert node.released.acquire(timeout=10)
    assert node.wait("done")["type"] == "forward"
    assert len(node.tensors) == 2
    assert node.sandbox.inbound._pieces.free_bytes == node.sandbox.inbound.num_bytes


def test_state_goes_out_and_in(nodes, gpt, rig):
    programs, states, _ = gpt
    node = nodes()
    node.load(only(programs[0]), states[0], rig.JOB)
    found = node.state()
    assert all(torch.equal(found[name], tensor) for name, tensor in states[0].items())
    changed = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in states[0].items()}
    node.call("set_state")
    node.send(only(programs[0]), changed)
    found = node.state()
    assert all(torch.equal(found[name], tensor) for name, tensor in changed.items())


def test_state_goes_out_and_in_by_name(nodes, gpt, rig):
    programs, states, _ = gpt
    node, program = nodes(), only(programs[0])
    node.load(program, states[0], rig.JOB)
    some = list(program.parameters)[:2]
    found = node.state(names=some)
    assert sorted(found) == sorted(some)
    node.replace("set_state", {some[0]: found[some[0]] + 1})
    after = node.state()
    assert torch.equal(after.pop(some[0]), states[0][some[0]] + 1)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in after.items())
    for names in (["other"], [some], 3, {"a": 1}):
        with pytest.raises(ProtocolError):
            node.call("state", names=names)
        with pytest.raises(ProtocolError):
            node.call("set_state", names=names)
    for wrong in ({some[0]: torch.ones(1)}, {some[0]: found[some[0]].double()}):
        with pytest.raises(TensorError, match="bytes, needed"):
            node.replace("set_state", wrong)


def test_optimizer_state_goes_in_and_out_by_parameter(nodes, gpt, rig):
    programs, states, _ = gpt
    node, program = nodes(), only(programs[0])
    node.load(program, states[0], rig.JOB)
    name, other = list(program.parameters)[:2]
    shape = program.parameters[name].shape
    state = {f"{name}/momentum_buffer": torch.randn(shape)}
    with pytest.raises(ProtocolError, match="no optimizer is set"):
        node.replace("set_optimizer_state", state)
    node.call("set_optimizer", optimizer={"name": "SGD", "groups": group(program, lr=0.1, momentum=0.9)})
    assert node.state("optimizer_state") == {}
    node.replace("set_optimizer_state", state)
    for names in (None, [name], [other, name]):
        found = node.state("optimizer_state", names=names)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert node.state("optimizer_state", names=[other]) == {}
    for wrong in ({f"{name}/other": torch.ones(1)}, {"x/momentum_buffer": torch.ones(1)}, {name: torch.ones(1)},
                  {"/": torch.ones(1)}):  # fmt: skip
        with pytest.raises(OptimizerError):
            node.replace("set_optimizer_state", wrong)
    with pytest.raises(TensorError, match="bytes, needed"):
        node.replace("set_optimizer_state", {f"{name}/momentum_buffer": torch.ones(1)})
    for names in (None, 3, {"a": 1}, [3]):
        with pytest.raises(ProtocolError, match="names are a list of texts"):
            node.call("set_optimizer_state", names=names)
    assert node.state("optimizer_state").keys() == state.keys()


def test_hostile_messages_are_answered_with_errors_and_nothing_breaks(nodes, gpt, rig):
    programs, states, _ = gpt
    node = nodes()
    program = only(programs[0])
    with pytest.raises(ProgramError):
        node.load(program, states[0], rig.JOB, program=b'{"kind": "stage"}')
    with pytest.raises(ProgramError):
        node.load(program, states[0], rig.JOB, limits={"max_bytes": 1000})
    with pytest.raises(ProtocolError, match="it was sent for"):
        node.load(program, states[0], rig.JOB, num_stages=2)
    with pytest.raises(ProtocolError, match="no method '__class__'"):
        node.call("__class__")
    with pytest.raises(ProtocolError, match="malformed message: KeyError"):
        node.call("load")
    with pytest.raises(ProtocolError, match="no stage 'k' is loaded"):
        node.call("state")
    with pytest.raises(ProtocolError, match="no state is on its way"):
        node.call("load_part", part=0, **node.put(b"x" * 8))
    with pytest.raises(ProtocolError, match="do not lie aligned"):
        node.call("load_part", part=0, offset=1 << 40, num_bytes=8)
    node.load(program, states[0], rig.JOB)
    node.call("set_state")
    with pytest.raises(TensorError, match=r"part 0 .* has 8 bytes, needed"):
        node.call("load_part", part=0, **node.put(b"x" * 8))
    with pytest.raises(TensorError, match="are not complete"):
        node.call("load_end")
    assert all(torch.equal(node.state()[name], tensor) for name, tensor in states[0].items())
    with pytest.raises(ProtocolError, match="loaded already"):
        node.load(program, states[0], rig.JOB)
    with pytest.raises(OptimizerError, match="found optimizer 'LBFGS'"):
        node.call("set_optimizer", optimizer={"name": "LBFGS", "groups": []})
    wrong = [{"parameters": list(program.parameters), "foreach": True}]
    with pytest.raises(OptimizerError, match="no option 'foreach'"):
        node.call("set_optimizer", optimizer={"name": "AdamW", "groups": wrong})
    with pytest.raises(AuditError, match="not held"):
        node.call("open", step=5, unit=0, tier=1)
    with pytest.raises(AuditError, match="was given up"):
        node.call("open_part", opening=1, at=0, num_bytes=8)
    node.call("set_optimizer", optimizer={"name": "AdamW", "groups": group(program)})
    decide = {"step": 0, "decision": "commit", "clip_coefficient": (1.0).hex(), "options": group(program)}
    with pytest.raises(ProtocolError, match="ordered was 'SGD', this stage has AdamW"):
        node.call("decide", **decide, optimizer="SGD")
    with pytest.raises(OptimizerError, match="groups are not those"):
        node.call("decide", **{**decide, "options": []}, optimizer="AdamW")
    with pytest.raises(ProtocolError, match="clip coefficient"):
        node.call("decide", **{**decide, "clip_coefficient": (0.5).hex()}, optimizer="AdamW")
    with pytest.raises(ProtocolError):
        node.call("decide", step=0, decision="perhaps", clip_coefficient="0x1p+0", options=[])
    assert node.state().keys() == states[0].keys()


HOSTILE = [
    {"dtype": "object"}, {"shape": [3, 7]}, {"shape": [-3, -6]}, {"shape": "ab"}, {"slot": 5}, {"micro_batch": -1},
    {"type": "output"}, {"step": "x"}, {"offset": 8}, {"offset": -64}, {"shape": [1] * 40},
]  # fmt: skip


def test_a_hostile_tensor_fails_its_stage_and_not_the_process(nodes, gpt, rig):
    programs, states, x = gpt
    node = nodes()
    for change in HOSTILE:
        node.load(only(programs[0]), states[0], rig.JOB)
        node.tensor(x[:3], **change)
        failed = node.wait("failed")
        assert failed["key"] == "k"
        assert failed["code"] in ("tensor", "protocol"), change
        node.call("unload")
    assert node.call("measure")["num_threads"] == 1


def test_a_gradient_that_is_not_finite_is_named(nodes, gpt, rig):
    programs, states, x = gpt
    node = nodes()
    program = only(programs[0])
    node.load(program, states[0], rig.JOB)
    node.post("begin", **begin(n=1, type="forward", schedule="gpipe"))
    node.tensor(x[:3])
    node.wait("done")
    node.post("backward", step=0, call=0, backward_pass=0, num_micro_batches=1, retain=False)
    node.tensor(torch.full((3, 6, 16), float("nan")), type="activation_gradient")
    assert node.call("prepare", step=0, num_units=1)["non_finite"] in program.parameters
    node.call("set_optimizer", optimizer={"name": "SGD", "groups": group(program)})
    node.call("decide", step=0, decision="abort", clip_coefficient=(1.0).hex(), options=[])
    found = node.state()
    assert all(torch.equal(found[name], tensor) for name, tensor in states[0].items())


def test_a_killed_computing_process_fails_waiting_calls_at_once(nodes, gpt, rig):
    programs, states, _ = gpt
    node = nodes()
    node.load(only(programs[0]), states[0], rig.JOB)
    errors = queue.Queue()

    def prepare():
        try:
            node.call("prepare", step=0, num_units=4)  # waits for micro-batches that never come
        except SandboxError as error:
            errors.put(str(error))

    threading.Thread(target=prepare, daemon=True).start()
    node.call("zero_grad", step=0)
    os.kill(node.sandbox.pid, signal.SIGKILL)
    assert "SIGKILL" in errors.get(timeout=5)
    assert "SIGKILL" in node.exits.get(timeout=5)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds mapped memory on Linux only")
def test_out_of_memory_names_the_setting_and_leaves_the_process_alive(nodes, gpt, rig):
    programs, states, x = gpt
    node = nodes(limits=Limits(memory_bytes=700 << 20))
    node.load(only(programs[0]), states[0], rig.JOB, limits={"max_bytes": 1 << 40})  # as if the estimate were wrong
    node.post("begin", **begin(n=1, type="forward", schedule="gpipe"))
    node.tensor(x[:1].expand(400_000, -1).contiguous())
    failed = node.wait("failed")
    assert failed["code"] == "sandbox"
    assert "raise memory_bytes" in failed["message"]
    assert node.call("measure")["num_threads"] == 1


class Tied(nn.Module):
    """The first layer's weight comes last again: in two stages, both hold it."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.middle(torch.tanh(self.first(x)))) @ self.first.weight


@pytest.fixture
def holder(nodes, rig):
    """The first of two stages that share a weight, with one backward done: (node, its own sum)."""
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    traced = trace(Tied(), (x,))
    program, _ = partition(traced, profile(traced, (x,), measured=False), 2)
    state = traced.state(program)
    node = nodes(0, 2)
    node.sends = queue.Queue()
    assert node.load(program, state, rig.JOB)["tied_with"] == [1]
    node.call("set_optimizer", optimizer={"name": "SGD", "groups": group(program, lr=1.0)})
    node.post("begin", **begin(n=1, type="forward", schedule="gpipe"))
    node.post("backward", step=0, call=0, backward_pass=0, num_micro_batches=1, retain=False)
    node.tensor(x)
    node.tensor(torch.ones(3, 6), type="activation_gradient")
    return node, program, state["first.weight"].clone()


def sum_from(node, tensor, /, **changes):
    """The other holder's sum arrives."""
    params = {
        "step": 0, "call": 0, "num_units": 1, "from_stage": 1, "slot": 0, "type": "shared",
        "dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape), **node.put(bytes(tensor_bytes(tensor))),
    }  # fmt: skip
    node.post("shared", **{**params, **changes})


def test_a_prepare_names_the_holder_whose_sum_has_not_come_and_goes_through_when_it_has(holder):
    node, program, before = holder
    with pytest.raises(DeadlineError, match="the sums of tied parameters have not come from stage 1"):
        node.call("prepare", step=0, num_units=1, wait_s=1)
    with pytest.raises(DeadlineError, match="1 of 5 backwards"):
        node.call("prepare", step=0, num_units=5, wait_s=0)
    to, own = node.sends.get(timeout=5)
    assert to == 1
    sum_from(node, torch.full((6, 6), 2.0))
    prepared = node.call("prepare", step=0, num_units=1, wait_s=60)
    assert prepared["non_finite"] == ""
    node.call(
        "decide",
        step=0,
        decision="commit",
        optimizer="SGD",
        clip_coefficient=(1.0).hex(),
        options=group(program, lr=1.0),
        order=b"",
    )
    assert torch.equal(node.state()["first.weight"], before - (own + 2.0))
    assert sorted(node.wait("commitment")["shared_roots"]) == ["from/1", "to/1"]
    assert node.sends.empty()


def test_two_holders_in_one_process_share_without_the_node(nodes, rig):
    torch.manual_seed(0)
    module, x = Tied(), torch.randn(3, 6)
    traced = trace(module, (x,))
    programs = partition(traced, profile(traced, (x,), measured=False), 2)
    node = nodes(0, 2)
    node.sends = queue.Queue()
    keys = [{"key": "a"}, {"key": "b"}]
    for stage, (program, key) in enumerate(zip(programs, keys, strict=True)):
        node.load(program, traced.state(program), rig.JOB, stage=stage, **key)
        node.call("set_optimizer", optimizer={"name": "SGD", "groups": group(program, lr=1.0)}, **key)
        node.post("begin", **begin(n=1, type="forward", schedule="gpipe"), **key)
        node.post("backward", step=0, call=0, backward_pass=0, num_micro_batches=1, retain=False, **key)
    node.tensor(x, **keys[0])
    node.tensor(torch.ones(3, 6), type="activation_gradient", **keys[1])
    with ThreadPoolExecutor(2) as pool:
        prepared = pool.map(lambda key: node.call("prepare", step=0, num_units=1, wait_s=30, **key), keys)
        squared = sum(float.fromhex(answer["squared_norm"]) for answer in prepared)
    module(x).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert squared**0.5 == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-6)
    decide = {"step": 0, "decision": "commit", "optimizer": "SGD", "clip_coefficient": (1.0).hex(), "order": b""}
    for program, key in zip(programs, keys, strict=True):
        node.call("decide", options=group(program, lr=1.0), **decide, **key)
    one, other = (node.state(**key)["first.weight"] for key in keys)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, (module.first.weight - module.first.weight.grad).detach())
    assert node.sends.empty()


@pytest.mark.parametrize(
    "changes", [{"from_stage": 0}, {"from_stage": 5}, {"slot": 1}, {"step": -1}, {"num_units": "x"}, {"shape": [36]}]
)
def test_a_sum_that_was_not_to_come_fails_the_stage_and_what_waits_for_it(holder, changes):
    node, _, _ = holder
    failed = queue.Queue()

    def prepare():
        with pytest.raises((TensorError, ProtocolError)) as raised:
            node.call("prepare", step=0, num_units=1, wait_s=60)
        failed.put(raised.value)

    waiting = threading.Thread(target=prepare, daemon=True)
    waiting.start()
    node.sends.get(timeout=10)  # the stage has sent its own sum: it waits
    sum_from(node, torch.ones(6, 6), **changes)
    assert node.wait("failed")["code"] in ("tensor", "protocol")
    assert failed.get(timeout=5)


def test_a_micro_batch_larger_than_announced_is_refused_before_it_is_computed(nodes, gpt, rig):
    programs, states, x = gpt
    node = nodes()
    node.load(only(programs[0]), states[0], rig.JOB, limits={"batch": 3, "max_bytes": 8 << 20})
    node.post("begin", **begin(n=1, type="forward", schedule="gpipe"))
    node.tensor(x[:1].expand(40_000, -1).contiguous())
    failed = node.wait("failed")
    assert failed["code"] == "over-limit"
    assert re.search(r"train node \d+ .* bytes are needed at once, at most", failed["message"])


def test_an_endless_program_ends_with_its_process_and_the_node_is_told_why(nodes, gpt, rig):
    programs, _, _ = gpt
    slow = tuple(graph.Node("aten.neg.default", (Value(at),), (), at + 1) for at in range(40_000))
    endless = graph.Graph((0,), slow, (40_000,))
    program = dataclasses.replace(only(programs[0]), train=endless, eval=endless, parameters={}, buffers={})
    node = nodes(limits=Limits(action_s=0.5))
    with pytest.raises(SandboxError, match=r"took longer than 0\.5 s for one action and was ended"):
        node.load(program, {}, rig.JOB)
    assert "took longer" in node.exits.get(timeout=10)


def test_the_process_says_how_it_is_confined(nodes):
    found = nodes().call("measure")
    if sys.platform == "linux":
        assert "no new privileges" in found["confinement"]
    assert found["confinement"]
    assert all(": " in what for what in found["unconfined"])


CHEATING = str(Path(__file__).with_name("audit") / "cheating_compute.py")


@pytest.mark.parametrize("cheat", ["", "noise", "altered-learning-rate"])
def test_an_auditor_in_a_process_of_its_own_finds_a_cheat_in_another(nodes, gpt, rig, cheat):
    programs, states, x = gpt
    program = only(programs[0])
    worker, auditor = nodes(command=[sys.executable, CHEATING, cheat] if cheat else None), nodes()
    worker.load(program, states[0], rig.JOB)
    worker.call("set_optimizer", optimizer={"name": "AdamW", "groups": group(program)})
    order = StepOrder(
        job=rig.JOB, plan_version=0, step=0, input_root=bytes(32), target_root=bytes(32), loss=bytes(32),
        loss_weights=[],
        loss_scale="", clip_norm="", optimizer="AdamW", options=group(program), replaced=["weights"],
    )  # fmt: skip
    worker.post("begin", **begin(n=2, type="forward", schedule="gpipe"))
    worker.post("backward", step=0, call=0, backward_pass=0, num_micro_batches=2, retain=False)
    for m in range(2):
        worker.tensor(x[3 * m : 3 * m + 3], micro_batch=m)
        worker.tensor(torch.randn(3, 6, 16), micro_batch=m, type="activation_gradient")
    worker.call("prepare", step=0, num_units=2)
    decide = {"step": 0, "decision": "commit", "clip_coefficient": (1.0).hex(), "optimizer": "AdamW"}
    worker.call("decide", **decide, options=order.options, order=order.digest())
    content = worker.wait("commitment")
    del content["key"]
    units = [Unit(**unit) for unit in content.pop("units")]
    commitment = Commitment(
        job=rig.JOB, plan_version=0, replica=0, stage=0, worker=bytes(32), numeric_class=numeric_class(),
        previous=rig.JOB, units=units, **content,
    )  # fmt: skip
    challenge = Challenge(
        job=rig.JOB,
        commitment=commitment.digest(),
        tier=2,
        unit=-1,
        seed=bytes(32),
        reveals=[],
        auditor=bytes(32),
    )
    opened = worker.call("open", step=0, unit=-1, tier=2)
    asked = [(at, min(1000, opened["num_bytes"] - at)) for at in range(0, opened["num_bytes"], 1000)]
    body = b"".join(
        worker.data(worker.call("open_part", opening=opened["opening"], at=at, num_bytes=size)) for at, size in asked
    )
    items = [OpeningItem(**item) for item in opened["items"]]
    opening = Opening(challenge=challenge.digest(), commitment=commitment.digest(), items=items)
    found = auditor.call(
        "examine", program=program.to_json(), loss_program=b"", seed=7, commitment=commitment.encode(),
        challenge=challenge.encode(), order=order.encode(), opening=opening.encode(), numeric_class=numeric_class(),
        earlier=[], earlier_orders=[], initial_root=bytes(32), state_interval_steps=1, **auditor.put(body),
    )  # fmt: skip
    assert found["finding"] == ("fraudulent" if cheat else "honest"), found
