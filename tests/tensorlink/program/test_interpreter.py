"""Dropout masks come from the caller's seeds, whatever the cut, and are torch's own where torch is seeded alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorlink.errors import ProgramError, TensorError
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import trace
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile

LAYERS = {
    "dropout": (nn.Dropout(0.3), torch.randn(4, 6)),
    "dropout2d": (nn.Dropout2d(0.3), torch.randn(4, 6, 3, 3)),
    "alpha_dropout": (nn.AlphaDropout(0.3), torch.randn(4, 6)),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout(0.3), torch.randn(4, 6, 3, 3)),
    "everything": (nn.Dropout(1.0), torch.randn(4, 6)),
    "nothing": (nn.Dropout(0.0), torch.randn(4, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_mask_is_the_one_that_torch_draws_from_the_same_seed(name: str) -> None:
    layer, x = LAYERS[name]
    program = trace(layer, (x,)).whole()
    x = x.clone().requires_grad_()
    [found] = Interpreter(program.train, {}, {}, cut=program.inputs).run([x], seed_for=lambda key: 99)
    torch.manual_seed(99)
    expected = layer.train()(x)
    assert torch.equal(found, expected)
    if found.requires_grad:
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    [found] = Interpreter(program.eval, {}, {}, cut=program.inputs).run([x])
    assert torch.equal(found, x)


class Attends(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inputs, self.outputs, self.dropout = nn.Linear(8, 24), nn.Linear(8, 8), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.inputs(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.outputs(F.dropout(y.squeeze(1), self.dropout, self.training))


def _chain(traced, programs, x: Tensor, seed: int) -> Tensor:
    values = [x]
    for program in programs:
        interpreter = Interpreter(program.train, dict(traced.parameters), dict(traced.buffers), cut=program.inputs)
        values = interpreter.run(values, seed_for=lambda key: seed * 1000 + key)
    return values[0]


def test_masks_depend_on_the_seed_and_not_on_the_cut() -> None:
    module, x = nn.Sequential(Attends(0.2), Attends(0.2), Attends(0.2)), torch.randn(3, 5, 8)
    traced = trace(module, (x,))
    measured = profile(traced, (x,), measured=False)
    results = [_chain(traced, partition(traced, measured, stages), x, seed=1) for stages in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], _chain(traced, [traced.whole()], x, seed=2))


def test_attention_with_dropout_is_attention_when_nothing_is_dropped() -> None:
    from tensorlink.program.dropout import attention

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind(0)
    mask = torch.randn(5, 5)
    for kwargs in ({"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask > 0.5}, {"scale": 0.3}):
        if "attn_mask" in kwargs and kwargs["attn_mask"].dtype == torch.bool:
            kwargs["attn_mask"].fill_diagonal_(True)
        found = attention(lambda key: 1, 0, q, k, v, dropout_p=1e-12, **kwargs)
        assert torch.allclose(found, F.scaled_dot_product_attention(q, k, v, **kwargs), atol=1e-6)


def test_dropout_without_a_seed_is_refused_and_names_the_node() -> None:
    program = trace(nn.Dropout(0.5), (torch.randn(2, 3),)).whole()
    with pytest.raises(ProgramError, match=r"node 1 .*seed_for"):
        Interpreter(program.train, {}, {}).run([torch.randn(2, 3)])


def test_tensors_that_do_not_fit_the_cut_are_refused() -> None:
    program = trace(nn.Linear(3, 2), (torch.randn(2, 3),)).whole()
    interpreter = Interpreter(
        program.train, {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, {}, cut=program.inputs
    )
    for wrong in (torch.randn(2, 4), torch.randn(3), torch.randn(2, 3).double(), 7):
        with pytest.raises(TensorError, match="'input'"):
            interpreter.run([wrong])
    with pytest.raises(TensorError, match="0 inputs"):
        interpreter.run([])


def test_misaligned_and_strided_tensors_give_the_same_bits() -> None:
    module, x = nn.Linear(32, 17), torch.randn(5, 32)
    program = trace(module, (x,)).whole()
    interpreter = Interpreter(program.train, dict(module.named_parameters()), {}, cut=program.inputs)
    [expected] = interpreter.run([x])
    shifted = torch.empty(5 * 32 + 1)[1:].view(5, 32).copy_(x)
    assert torch.equal(interpreter.run([shifted])[0], expected)
    assert torch.equal(interpreter.run([x.t().contiguous().t()])[0], expected)


def test_a_run_replaces_buffers_and_never_writes_into_them() -> None:
    module, x = nn.BatchNorm1d(4), torch.randn(5, 4)
    program = trace(module, (x,)).whole()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    snapshot, copies = dict(buffers), {name: buffer.clone() for name, buffer in buffers.items()}
    Interpreter(program.train, dict(module.named_parameters()), buffers, cut=program.inputs).run([x])
    module(x)
    assert all(torch.equal(snapshot[name], copies[name]) for name in snapshot)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in module.named_buffers())
    assert not torch.equal(buffers["running_mean"], snapshot["running_mean"])
