"""What a rig hands out as its state is distrusted: sizes, names and hashes, before anything is used."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smartnodes_core.errors import ProtocolError
from smartnodes_core.records import canonical
from smartnodes_core.rpc import Reply
from tensorlink.program.trace import trace
from tensorlink.recovery.snapshots import Snapshot, StageState, committed_root, fetch
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile
from tensorlink.steplog.digests import root, tensor_view


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    return program_of(module, torch.randn(4, 4))


def program_of(module, x):
    traced = trace(module, (x,))
    return partition(traced, profile(traced, (x,), samples=len(x)), 1)[0], traced


class Rig:
    """Answers as a rig does, with the state of the module and whatever a test changes in it."""

    def __init__(self, program, traced):
        values = {**traced.parameters, **traced.buffers}
        self.parts = {
            "weights": {name: values[name].detach() for name in program.parameters},
            "buffers": {name: values[name] for name in program.buffers},
            "optimizer": {f"{name}/exp_avg": torch.ones(values[name].shape) for name in program.parameters},
        }
        self.change = lambda items, body: (items, body)

    def call(self, stage, method, params, max_body_bytes):
        items, body = [], b""
        for part, tensors in self.parts.items():
            for name, tensor in tensors.items():
                data = bytes(tensor_view(tensor.contiguous()))
                meta = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                items.append({"label": f"{part}/{name}", "meta": canonical(meta), "num_bytes": len(data)})
                body += data
        items, body = self.change(items, body)
        if method == "snapshot":
            return Reply({"opening": 1, "num_bytes": len(body)}, memoryview(msgspec.msgpack.encode(items)))
        return Reply({}, memoryview(body[params["at"] : params["at"] + params["num_bytes"]]))

    def roots(self):
        return committed_root({f"{part}_before": root(tensors) for part, tensors in self.parts.items()})


@pytest.fixture
def rig(program):
    return Rig(*program)


def snapshot(state, root_of_it):
    return Snapshot(4, 0, [b"w" * 32], [state], [root_of_it], ({}, {}))


def test_a_state_is_fetched_into_a_file_and_is_what_was_committed_to(rig, program, tmp_path):
    state = fetch(rig, program[0], 4, tmp_path / "stage-0")
    for part, tensors in rig.parts.items():
        found = {name: one.read() for name, one in getattr(state, part).items()}
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert snapshot(state, rig.roots()).is_sound()
    assert [path.name for path in tmp_path.iterdir()] == ["stage-0"]


def test_another_state_than_was_committed_to_is_not_sound(rig, program, tmp_path):
    committed = rig.roots()
    rig.parts["optimizer"]["0.weight/exp_avg"] = torch.zeros(3, 4)
    state = fetch(rig, program[0], 4, tmp_path / "stage-0")
    assert not snapshot(state, committed).is_sound()


def test_a_file_that_has_gone_or_become_shorter_is_not_sound(rig, program, tmp_path):
    path = tmp_path / "stage-0"
    state = fetch(rig, program[0], 4, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert not snapshot(state, rig.roots()).is_sound()
    path.unlink()
    assert not snapshot(state, rig.roots()).is_sound()


def test_the_state_that_a_job_begins_with_is_one_of_tensors_in_memory(rig):
    state = StageState(rig.parts["weights"], rig.parts["buffers"], {})
    rig.parts["optimizer"] = {}
    assert snapshot(state, rig.roots()).is_sound()


def bad(label=None, meta=None, num_bytes=None, drop=False, twice=False):
    def change(items, body):
        items = [dict(item) for item in items]
        if drop:
            return items[1:], body
        if twice:
            return [*items, items[0]], body
        changes = {"label": label, "meta": meta, "num_bytes": num_bytes}
        items[0].update({name: value for name, value in changes.items() if value is not None})
        return items, body

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (bad(label="weights/none"), "other ones than its program has"),
        (bad(label="secrets/x"), "no part of a stage's state"),
        (bad(label="optimizer/none/exp_avg"), "no optimizer state of this stage"),
        (bad(drop=True), "other ones than its program has"),
        (bad(twice=True), "comes twice"),
        (bad(num_bytes=1 << 50), "is said to have"),
        (bad(meta=canonical({"dtype": "float32", "shape": [1 << 40, 1 << 40]})), "is said to have"),
        (bad(meta=canonical({"dtype": "object", "shape": [1]})), "of dtype 'object'"),
        (bad(meta=canonical({"dtype": "float32", "shape": [12]})), "another dtype or shape"),
        (bad(meta=canonical({"same_as": 5}), num_bytes=0), "has not been named"),
        (bad(meta=b"\xc1"), "in another form"),
        (lambda items, body: (items, body[:-1]), "bytes of its state"),
    ],
)
def test_what_no_stage_of_the_program_can_have_is_refused(rig, program, tmp_path, change, complaint):
    rig.change = change
    with pytest.raises(ProtocolError, match=complaint):
        fetch(rig, program[0], 4, tmp_path / "stage-0")
    assert not (tmp_path / "stage-0").exists()


def test_an_optimizer_state_as_large_as_a_disk_is_refused_before_anything_is_fetched(rig, program, tmp_path):
    asked = []
    huge = {"label": "optimizer/0.weight/exp_avg", "num_bytes": 4 << 40}
    huge["meta"] = canonical({"dtype": "float32", "shape": [1 << 40]})
    rig.change = lambda items, body: ([huge], body)
    call = rig.call
    rig.call = lambda stage, method, *args, **kwargs: asked.append(method) or call(stage, method, *args, **kwargs)
    with pytest.raises(ProtocolError, match="no optimizer state of this stage"):
        fetch(rig, program[0], 4, tmp_path / "stage-0")
    assert asked == ["snapshot"]


@settings(max_examples=25)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_state_or_refused(data):
    torch.manual_seed(0)
    one, _ = program_of(nn.Linear(2, 2), torch.randn(2, 2))

    class Hostile:
        def call(self, stage, method, params, max_body_bytes):
            return Reply({}, memoryview(data))

    with tempfile.TemporaryDirectory() as folder, pytest.raises(ProtocolError):
        fetch(Hostile(), one, 0, Path(folder) / "x")
