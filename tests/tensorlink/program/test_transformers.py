"""Models of the transformers library from tiny configs; skipped where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tensorlink.program.inputs import flatten_inputs, unflatten_outputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import trace

transformers = pytest.importorskip("transformers")


def _llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [_llama, _gpt2])
@pytest.mark.parametrize("training", [True, False])
def test_a_language_model_is_bitwise_equal_to_eager(make: Any, training: bool) -> None:
    model = make().train(training)
    traced = trace(model, {"input_ids": torch.randint(0, 64, (3, 12))})
    program = traced.whole()
    interpreter = Interpreter(
        program.graph(training),
        dict(traced.parameters),
        {**traced.buffers, **traced.constants},
        cut=program.inputs,
    )
    for batch in (3, 1, 5):
        ids = torch.randint(0, 64, (batch, 12))
        inputs = flatten_inputs(traced, (), {"input_ids": ids})
        found = unflatten_outputs(traced, interpreter.run(inputs, seed_for=lambda key: key))
        assert torch.equal(found["logits"], model(input_ids=ids)["logits"])
