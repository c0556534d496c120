"""A module on the meta device gives the program that the same module gives with its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tensorlink.errors import TraceError
from tensorlink.program.trace import trace
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile


class Everything(nn.Module):
    """Running statistics, a recurrent layer (which lists its weights besides), attention, ties, buffers, dropout."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.inner.weight
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.register_buffer("shift", torch.arange(8.0), persistent=False)
        self.register_buffer("scale", torch.ones(8))
        self.inner.bias.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.inner(x)) * self.scale + self.shift + torch.tensor([0.5] * 8)
        x = F.dropout(x, 0.1, self.training)[:, None].expand(-1, 3, -1)
        x, _ = self.recurrent(x)
        return self.tied(F.scaled_dot_product_attention(x, x, x)).mean(1)


def on_meta(make):
    with torch.device("meta"):
        return make()


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config))


class Logits(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("make", "x"), [(Everything, torch.ones(4, 8)), (llama, torch.ones(4, 6, dtype=torch.int64))], ids=["all", "llama"]
)
def test_the_program_is_that_of_the_module_with_weights(make, x):
    torch.manual_seed(0)
    real, meta = make(), on_meta(make)
    ours, theirs = trace(meta, (x,)), trace(real, (x,))
    assert ours.whole().to_json() == theirs.whole().to_json()
    assert ours.constants.keys() == theirs.constants.keys()
    assert (ours.aliases, ours.state_names) == (theirs.aliases, theirs.state_names)
    profiles = [profile(traced, (x,), measured=False) for traced in (ours, theirs)]
    cut = [partition(traced, found, 2) for traced, found in zip((ours, theirs), profiles, strict=True)]
    assert [program.to_json() for program in cut[0]] == [program.to_json() for program in cut[1]]


def test_the_module_is_as_it_was_afterwards():
    module = on_meta(Everything)
    before = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    listed = list(module.recurrent._flat_weights)
    trace(module, (torch.ones(4, 8),))
    after = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())
    assert all(a is b for a, b in zip(module.recurrent._flat_weights, listed, strict=True))
    assert module.tied.weight is module.inner.weight


def test_a_module_partly_on_the_meta_device_and_an_example_there_are_traced_too():
    real, mixed = Everything(), on_meta(Everything)
    mixed.register_buffer("shift", torch.arange(8.0), persistent=False)
    mixed.norm = nn.BatchNorm1d(8)
    assert trace(mixed, (torch.ones(4, 8, device="meta"),)).whole() == trace(real, (torch.ones(4, 8),)).whole()


def test_what_cannot_be_run_is_profiled_by_counting():
    x = torch.ones(4, 8)
    real, meta = trace(Everything(), (x,)), trace(on_meta(Everything), (x,))
    counted = profile(meta, (x,))
    assert not counted.measured
    assert counted == profile(real, (x,), measured=False)
    assert profile(real, (x,)).measured
    assert not profile(real, (x.to("meta"),)).measured


def test_a_meta_tensor_that_is_a_plain_attribute_is_named():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.table = nn.Parameter(torch.ones(3)), torch.arange(3.0)

        def forward(self, x):
            return x * self.weight + self.table

    module = nn.Sequential(on_meta(Holder))
    with pytest.raises(TraceError, match=r"0\.table is a tensor on the meta device.*register_buffer"):
        trace(module, (torch.ones(2, 3),))
    module[0].table = torch.arange(3.0)
    assert next(iter(trace(module, (torch.ones(2, 3),)).constants.values())).tolist() == [0, 1, 2]
