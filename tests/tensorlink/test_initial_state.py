"""Where the values come from that stages start with, and what is said where there are none."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from tensorlink.audit.commitments import initial_root, initial_root_of
from tensorlink.errors import InputError
from tensorlink.initial_state import digest_of, initial_values, num_bytes_of, read, value_of
from tensorlink.program.trace import trace
from tensorlink.records import LEAF_BYTES, streamed_digest, tensor_digest
from tensorlink.weight_files import FileTensor, open_weights

X = torch.ones(4, 6)


class Model(nn.Module):
    """A tie, a buffer inside and one outside of the state_dict, a constant in the code, a parameter without use."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.register_buffer("shift", torch.arange(6.0), persistent=False)

    def forward(self, x):
        return self.second(self.first(x) * self.scale + self.shift) + torch.tensor([1.0] * 6)


@pytest.fixture
def real():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def meta():
    """As `real` without values, but for the buffer that no file has."""
    with torch.device("meta"):
        module = Model()
    module.shift = torch.arange(6.0)
    return module


@pytest.fixture
def save(tmp_path):
    def save(tensors):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
        return path

    return save


def values(module, weights=None):
    return initial_values(module, trace(module, (X,)), weights)


def test_files_give_what_the_module_with_weights_has(real, meta, save):
    found, own = values(meta, save(real.state_dict())), values(real)
    assert found.keys() == own.keys()
    assert {name for name, value in found.items() if isinstance(value, FileTensor)} == {
        "first.weight", "first.bias", "second.bias", "idle.weight", "idle.bias", "scale",
    }  # fmt: skip
    for name, value in own.items():
        assert torch.equal(value_of(found[name]), value)
        assert digest_of(name, found[name]) == digest_of(name, value)
        assert num_bytes_of(found[name]) == num_bytes_of(value)
    whole = trace(real, (X,)).whole()
    digests = {name: digest_of(name, value) for name, value in found.items()}
    assert initial_root_of(whole, digests) == initial_root(whole, own)


def test_a_tied_tensor_may_have_either_name_and_both_where_they_agree(real, meta, save):
    state = real.state_dict()
    weight = state.pop("first.weight")
    assert torch.equal(value_of(values(meta, save(state))["first.weight"]), weight)
    assert torch.equal(value_of(values(meta, save({**state, "first.weight": weight}))["first.weight"]), weight)
    with pytest.raises(InputError, match=r"are one tensor in the module, and differ in the files"):
        values(meta, save({**state, "first.weight": weight + 1}))


def test_files_come_before_the_modules_own_values_which_stand_for_what_files_lack(real, save):
    found = values(real, save({"first.bias": torch.ones(6)}))
    assert torch.equal(value_of(found["first.bias"]), torch.ones(6))
    assert torch.equal(value_of(found["second.bias"]), real.second.bias)


def test_a_module_without_values_or_files_is_refused_by_name(meta):
    with pytest.raises(InputError, match=r"first\.weight, first\.bias.* on the meta device.*weights="):
        values(meta)


def test_names_that_are_missing_or_unknown_are_listed(real, meta, save):
    state = real.state_dict()
    del state["second.bias"], state["scale"]
    with pytest.raises(InputError, match=r"missing \['second\.bias', 'scale'\] \(2 in all\).*'other'.*\(1 in all\)"):
        values(meta, save({**state, "other": torch.ones(1)}))
    with pytest.raises(InputError, match=r"unexpected \['other'\]"):
        values(real, save({"other": torch.ones(1)}))


def test_a_prefix_that_is_all_that_differs_is_said(real, meta, save):
    longer = {f"model.{name}": tensor for name, tensor in real.state_dict().items()}
    with pytest.raises(InputError, match=r"The files' names begin with 'model\.', the module's do not"):
        values(meta, save(longer))
    with pytest.raises(InputError, match=r"The module's names begin with '0\.', the files' do not"):
        values(nn.Sequential(meta), save(real.state_dict()))


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t[:3], lambda t: t[None]])
def test_another_dtype_or_shape_is_refused_by_name(real, meta, save, change):
    with pytest.raises(InputError, match=r"first\.bias is float\d\d \[.*the module has float32 \[6\].*module\.to"):
        values(meta, save({**real.state_dict(), "first.bias": change(real.first.bias.detach())}))


def test_a_buffer_that_no_file_has_is_refused_by_name_with_the_remedy(real, save):
    with torch.device("meta"):
        module = nn.Sequential(Model())
    path = save({f"0.{name}": tensor for name, tensor in real.state_dict().items()})
    with pytest.raises(InputError, match=r"0\.shift is on the meta device.*module\.get_submodule\('0'\)\.shift = …"):
        values(module, path)
    module.get_submodule("0").shift = torch.arange(6.0)
    assert torch.equal(value_of(values(module, path)["0.shift"]), real.shift)


def test_pieces_are_read_from_memory_without_a_copy_and_from_files_into_scratch(save):
    tensor = torch.arange(12.0).view(3, 4)
    scratch = memoryview(bytearray(64))
    piece = read(tensor, 8, 24, scratch)
    tensor[0, 2] = 99.0
    assert torch.frombuffer(piece, dtype=torch.float32).tolist() == [99.0, 3.0, 4.0, 5.0]
    piece = read(open_weights(save({"w": tensor}))["w"], 8, 24, scratch)
    assert torch.frombuffer(piece, dtype=torch.float32).tolist() == [99.0, 3.0, 4.0, 5.0]
    assert bytes(scratch[:16]) == bytes(piece)


def test_a_digest_is_the_same_in_one_piece_and_in_several():
    data = bytes(range(256)) * (5 * LEAF_BYTES // 256) + b"rest"
    pieces = [data[at : at + 2 * LEAF_BYTES] for at in range(0, len(data), 2 * LEAF_BYTES)]
    whole = tensor_digest("w", "uint8", [len(data)], data)
    assert streamed_digest("w", "uint8", [len(data)], pieces) == whole
    assert streamed_digest("w", "uint8", [len(data)], [data]) == whole
    assert streamed_digest("w", "uint8", [len(data)], [*pieces[:-1], b"tser"]) != whole
    assert streamed_digest("w", "uint8", [0], []) == tensor_digest("w", "uint8", [0], b"")
