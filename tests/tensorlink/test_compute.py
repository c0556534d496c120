"""The computing process as a node sees it: real processes, real pipes, shared memory."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from smartnodes_core.errors import AuditError, ProtocolError, SandboxError
from smartnodes_core.records import Challenge, Commitment, Opening, OpeningItem, Unit
from smartnodes_core.sandbox import Limits, Sandbox
from tensorlink.errors import OptimizerError, ProgramError, TensorError
from tensorlink.measure import numeric_class
from tensorlink.program.loss import trace_loss
from tensorlink.program.parts import Parts
from tensorlink.program.values import DTYPES
from tensorlink.program.weights import load, tensor_bytes
from tensorlink.records import StepOrder
from tensorlink.stage_optimizer import encode_options

COMMAND = [sys.executable, "-m", "tensorlink.compute"]
ARENA = 64 << 20
TIMEOUT_S = 60.0


def parts_of(program, state):
    """The bytes of each part of a state."""
    for part in range(len(parts := Parts(program.expected_state()))):
        yield b"".join(bytes(tensor_bytes(state[name])[begin:end]) for name, begin, end in parts.pieces(part))


class Node:
    """A rig's node reduced to what moves messages; links are function calls."""

    def __init__(self, index=0, num_stages=1, limits=None, command=None):
        self.index, self.num_stages, self.peers = index, num_stages, []
        self.events, self.exits = queue.Queue(), queue.Queue()
        self.tensors, self.losses, self.released = {}, {}, threading.Semaphore(0)
        self.sandbox = Sandbox(
            command or COMMAND,
            limits=limits or Limits(),
            inbound_bytes=ARENA,
            outbound_bytes=ARENA,
            on_event=self.on_event,
            on_exit=self.exits.put,
        )
        self.sandbox.start()

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
            "limits": {},
        }  # fmt: skip
        begun = self.call("load", **{**params, **changes})
        return {**begun, **self.send(program, state)}

    def send(self, program, state):
        for part, data in enumerate(parts_of(program, state)):
            self.call("load_part", part=part, **self.put(data))
        return self.call("load_end")

    def tensor(self, tensor, step=0, call=0, micro_batch=0, slot=0, type="activation", backward_pass=0, **changes):
        params = {
            "step": step, "call": call, "micro_batch": micro_batch, "slot": slot, "type": type,
            "backward_pass": backward_pass, "dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape),
            **self.put(bytes(tensor_bytes(tensor))),
        }  # fmt: skip
        self.post("tensor", **{**params, **changes})

    def state(self):
        reply = self.call("state")
        data = bytes(self.sandbox.outbound.view(reply["offset"], reply["num_bytes"]))
        self.sandbox.post("sent", {"offset": reply["offset"]})
        return load(data)

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
        place = [params[n] for n in ("step", "call", "micro_batch", "slot", "type", "backward_pass")]
        if params["to"] == "user":
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


@pytest.fixture
def nodes(rig):
    made = []

    def make(*args, **kwargs):
        made.append(Node(*args, **kwargs))
        return made[-1]

    yield make
    for node in made:
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
    assert measured["memory_bytes"] == 4 << 30
    assert measured["num_threads"] == 1
    assert "threads 1" in measured["numeric_class"]


def test_shared_memory_comes_back_when_its_last_reader_is_done(nodes, gpt, rig):
    programs, states, x = gpt
    node = nodes()
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
    with pytest.raises(OptimizerError, match="allowed are"):
        node.call("set_optimizer", optimizer={"name": "LBFGS", "groups": []})
    wrong = [{"parameters": list(program.parameters), "foreach": True}]
    with pytest.raises(OptimizerError, match="no option 'foreach'"):
        node.call("set_optimizer", optimizer={"name": "AdamW", "groups": wrong})
    with pytest.raises(AuditError, match="not held"):
        node.call("open", step=5, unit=0, tier=1)
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
    node.load(only(programs[0]), states[0], rig.JOB)
    node.post("begin", **begin(n=1, type="forward", schedule="gpipe"))
    node.tensor(x[:1].expand(400_000, -1).contiguous())
    failed = node.wait("failed")
    assert failed["code"] == "sandbox"
    assert "raise memory_bytes" in failed["message"]
    assert node.call("measure")["memory_bytes"] == 700 << 20


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
        loss_scale="", clip_norm="", optimizer="AdamW", options=group(program),
    )  # fmt: skip
    worker.post("begin", **begin(n=2, type="forward", schedule="gpipe"))
    worker.post("backward", step=0, call=0, backward_pass=0, num_micro_batches=2, retain=False)
    for m in range(2):
        worker.tensor(x[3 * m : 3 * m + 3], micro_batch=m)
        worker.tensor(torch.randn(3, 6, 16), micro_batch=m, type="activation_gradient")
    worker.call("prepare", step=0, num_units=2)
    decide = {"step": 0, "decision": "commit", "clip_coefficient": (1.0).hex(), "options": order.options}
    worker.call("decide", **decide, order=order.digest())
    content = worker.wait("commitment")
    del content["key"]
    units = [Unit(**unit) for unit in content.pop("units")]
    commitment = Commitment(
        job=rig.JOB, plan_version=0, replica=0, stage=0, worker=bytes(32), numeric_class=numeric_class(),
        previous=bytes(32), units=units, **content,
    )  # fmt: skip
    challenge = Challenge(
        job=rig.JOB,
        commitment=commitment.digest(),
        tier=2,
        unit=-1,
        seed=bytes(32),
        reveals=[],
        auditor=bytes(32),
        deadline_s=0,
    )
    opened = worker.call("open", step=0, unit=-1, tier=2)
    body = bytes(worker.sandbox.outbound.view(opened["offset"], opened["num_bytes"]))
    items = [OpeningItem(**item) for item in opened["items"]]
    opening = Opening(challenge=challenge.digest(), commitment=commitment.digest(), items=items)
    found = auditor.call(
        "examine", program=program.to_json(), loss_program=b"", optimizer={}, seed=7, commitment=commitment.encode(),
        challenge=challenge.encode(), order=order.encode(), opening=opening.encode(), numeric_class=numeric_class(),
        **auditor.put(body),
    )  # fmt: skip
    assert found["finding"] == ("fraudulent" if cheat else "honest"), found
