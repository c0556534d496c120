"""Buffers outside of every state_dict: what transformers computes for them is what their constructors do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensorlink.program.initialiser import initialised

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gemma": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES)),
}


def outside_of_the_state_dict(module):
    return [name for name, _ in module.named_buffers() if name not in module.state_dict()]


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("model", MODELS)
def test_the_initialiser_computes_what_the_constructor_does(model):
    real, meta = nn.Sequential(MODELS[model]()), nn.Sequential(on_meta(MODELS[model]))
    names = outside_of_the_state_dict(meta)
    assert names
    before = torch.get_rng_state()
    found = initialised(meta, names)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.keys() == set(names)
    assert all(torch.equal(found[name], real.get_buffer(name)) for name in names)
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))


def test_a_cast_module_has_cast_buffers():
    real, meta = MODELS["llama"]().to(torch.bfloat16), on_meta(MODELS["llama"]).to(torch.bfloat16)
    found = initialised(meta, outside_of_the_state_dict(meta))
    assert all(torch.equal(tensor, real.get_buffer(name)) for name, tensor in found.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


class Extra(nn.Module):
    """Buffers of the user's own inside a model of the library."""

    def __init__(self):
        super().__init__()
        for name in ("random", "left", "partly", "sure"):
            self.register_buffer(name, torch.ones(4), persistent=False)


class Own(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.extra = Extra()

    def _init_weights(self, module):
        if isinstance(module, Extra):
            module.random.normal_()
            module.partly[:2] = 3.0
            module.sure.fill_(5.0)


def test_what_is_random_or_left_alone_is_no_result():
    meta = on_meta(lambda: Own(transformers.LlamaConfig(**SIZES)))
    found = initialised(meta, [f"extra.{name}" for name in ("random", "left", "partly", "sure")])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"extra.sure": [5.0] * 4}


def test_real_parameters_beside_it_are_not_touched():
    meta = on_meta(MODELS["llama"])
    rotary = meta.model.rotary_emb
    rotary.extra = nn.Linear(2, 2)
    before = rotary.extra.weight.clone()
    assert initialised(meta, ["model.rotary_emb.inv_freq"])
    assert torch.equal(rotary.extra.weight, before)


def test_the_initialiser_of_another_library_is_not_believed_and_one_that_raises_gives_nothing():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("b", torch.ones(2), persistent=False)

        def _init_weights(self, module):
            module.b.fill_(1.0)

    class Raises(Own):
        def _init_weights(self, module):
            raise RuntimeError("not here")

    assert initialised(on_meta(Plain), ["b"]) == {}
    assert initialised(on_meta(lambda: Raises(transformers.LlamaConfig(**SIZES))), ["extra.sure"]) == {}
