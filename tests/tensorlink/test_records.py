"""Digests of tensors and the records that speak of them are frozen, and equal for torch tensors and their plain
bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smartnodes_core.records import Record
from tensorlink import records
from tensorlink.records import (
    LEAF_BYTES,
    Cut,
    Decide,
    Prepare,
    Prepared,
    Slot,
    StepOrder,
    TensorId,
    set_root,
    tensor_digest,
)  # fmt: skip
from tensorlink.steplog.digests import as_tensor, digest, root, slots

GOLDEN = json.loads(Path(__file__).with_name("golden_records.json").read_text())


def d(byte):
    return bytes([byte]) * 32


SLOT = Slot(name="h", type="tensor", dtype="float32", shape=[-1, 16], requires_grad=True)
SAMPLES = [
    SLOT,
    Cut(slots=[SLOT, Slot(name="n", type="symint", dtype="int64", shape=[], requires_grad=False)]),
    TensorId(
        job=d(1), plan_version=0, replica=0, step=5, call=1, micro_batch=2, stage=1, slot=0, type="activation_gradient",
        backward_pass=1,
    ),
    StepOrder(
        job=d(1), plan_version=0, step=5, input_root=d(2), target_root=d(3), loss=d(4), loss_weights=[(0.25).hex()],
        loss_scale="", clip_norm=(1.0).hex(), optimizer="AdamW",
        options=[{"parameters": ["a", "b"], "lr": (3e-4).hex(), "betas": [(0.9).hex(), (0.999).hex()], "amsgrad": False,
                  "maximize": False, "weight_decay": 0, "x": None}],
        replaced=["optimizer", "weights"],
    ),
    Prepare(job=d(1), plan_version=0, step=5, num_units=8),
    Prepared(job=d(1), plan_version=0, step=5, stage=1, squared_norm=(0.5).hex(), non_finite=""),
    Decide(job=d(1), plan_version=0, step=5, decision="commit", clip_coefficient=(1.0).hex(), order=d(2)),
]  # fmt: skip
SIZES = {
    "empty": 0,
    "small": 5,
    "one leaf": LEAF_BYTES,
    "two leaves": LEAF_BYTES + 1,
    "five leaves": 4 * LEAF_BYTES + 7,
}


def content(size):
    return bytes(i % 251 for i in range(size))


def test_there_is_a_golden_sample_of_every_record():
    declared = {v for v in vars(records).values() if isinstance(v, type) and issubclass(v, Record) and v is not Record}
    assert {type(sample) for sample in SAMPLES} == declared


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_bytes_and_digest_are_frozen(sample):
    golden = GOLDEN[type(sample).__name__]
    assert sample.encode().hex() == golden["bytes"]
    assert sample.digest().hex() == golden["digest"]
    assert type(sample).decode(bytes.fromhex(golden["bytes"])) == sample


@pytest.mark.parametrize("name", SIZES)
def test_the_digest_of_a_tensor_is_frozen(name):
    assert tensor_digest("w", "uint8", [SIZES[name]], content(SIZES[name])).hex() == GOLDEN[f"tensor {name}"]


def test_a_digest_binds_name_dtype_and_shape():
    data = bytes(24)
    found = {
        tensor_digest(name, dtype, shape, data)
        for name in ("a", "b")
        for dtype, shapes in (("float32", [[6], [2, 3], [3, 2]]), ("int32", [[6]]))
        for shape in shapes
    }
    assert len(found) == 8


def test_an_inner_node_never_passes_for_a_leaf():
    one, two = content(2 * LEAF_BYTES)[:LEAF_BYTES], content(2 * LEAF_BYTES)[LEAF_BYTES:]
    whole = tensor_digest("w", "uint8", [2 * LEAF_BYTES], one + two)
    assert whole not in (tensor_digest("w", "uint8", [LEAF_BYTES], one), tensor_digest("w", "uint8", [LEAF_BYTES], two))


def test_a_set_root_does_not_depend_on_the_order():
    assert set_root({"a": d(1), "b": d(2)}) == set_root({"b": d(2), "a": d(1)})
    assert set_root({"a": d(1), "b": d(2)}).hex() == GOLDEN["set"]
    assert set_root({}) != set_root({"a": d(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16])
def test_a_torch_tensor_has_the_digest_of_its_contiguous_bytes(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    assert digest("w", tensor) == tensor_digest("w", str(dtype)[6:], [3, 4], data)
    assert digest("w", tensor.t().contiguous().t()) == digest("w", tensor)
    assert digest("w", tensor.requires_grad_(dtype.is_floating_point)) == digest("w", tensor.detach())


def test_scalars_sizes_and_empty_tensors_have_digests():
    assert root(slots([5, torch.ones(0, 3)])) == root(slots({0: torch.tensor(5), 1: torch.ones(0, 3)}))
    assert as_tensor(3).dtype is torch.int64
