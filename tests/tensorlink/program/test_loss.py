"""Losses as programs: of outputs in another shape than the targets, of several outputs and targets, with options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tensorlink.errors import ProgramError
from tensorlink.program.graph import LossProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.limits import check_loss
from tensorlink.program.loss import constants_of, trace_loss
from tensorlink.program.trace import trace


def _labels(*shape: int) -> Tensor:
    labels = torch.randint(0, 5, shape)
    labels.view(-1)[0] = -100
    return labels


def _flat(batch: int) -> tuple[Any, Any]:
    """Logits flattened to (B * T, C), and targets (B, T)."""
    return torch.randn(batch * 6, 5), _labels(batch, 6)


def _logits(batch: int) -> tuple[Any, Any]:
    return torch.randn(batch, 6, 5), _labels(batch, 6)


def _several(batch: int) -> tuple[Any, Any]:
    outputs = {"logits": torch.randn(batch * 6, 5), "pooled": (torch.randn(batch, 3), torch.randn(batch * 2))}
    return outputs, {"labels": _labels(batch, 6), "values": torch.randn(batch, 3), "scale": torch.tensor(0.5)}


def _several_loss(outputs: Any, target: Any) -> Tensor:
    pooled, pairs = outputs["pooled"]
    loss = F.cross_entropy(outputs["logits"], target["labels"].flatten(), ignore_index=-100)
    loss = loss + F.mse_loss(pooled, target["values"]) * target["scale"]
    return loss + pairs.view(pooled.shape[0], 2).square().mean()


def _shifted(outputs: Any, target: Any) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].reshape(-1, 5), target[:, 1:].reshape(-1), ignore_index=-100)


class Weighted(nn.Module):
    """Class weights in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.linspace(0.5, 1.5, 5))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target.view(-1), weight=self.weights)


CASES: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[int], tuple[Any, Any]]]] = {
    "flattened": (lambda y, t: F.cross_entropy(y, t.reshape(-1)), _flat),
    "flattened, label smoothing": (lambda y, t: F.cross_entropy(y, t.view(-1), label_smoothing=0.1), _flat),
    "flattened, by sample": (lambda y, t: F.cross_entropy(y.view(t.shape[0], 6, 5).mT, t), _flat),
    "ignore index": (lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten(), ignore_index=-100), _logits),
    "shifted": (_shifted, _logits),
    "class weights": (Weighted(), _flat),
    "several outputs and targets": (_several_loss, _several),
}


def _tensors(*structures: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(structures) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("traced_with", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_bitwise_equal_to_eager_at_any_batch_size(name: str, traced_with: int) -> None:
    loss_fn, examples = CASES[name]
    program = trace_loss(loss_fn, *examples(traced_with), num_samples=traced_with)
    program = LossProgram.from_json(program.to_json())
    assert check_loss(program, batch=5, max_bytes=1 << 20, max_flops=1 << 20).flops_forward > 0
    interpreter = Interpreter(program.graph, {}, constants_of(program), cut=program.inputs)
    for batch in (3, 1, 5):
        outputs, target = examples(batch)
        leaves = [leaf.requires_grad_() for leaf in _tensors(outputs)]
        [found] = interpreter.run(_tensors(outputs, target))
        expected = loss_fn(outputs, target)
        assert torch.equal(found, expected)
        ours, theirs = torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class FlatLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).flatten(0, 1)


def test_the_example_of_a_models_outputs_has_their_shapes_for_a_batch() -> None:
    traced = trace(FlatLogits(), (torch.randint(0, 5, (4, 6)),))
    assert [list(output.shape) for output in traced.example_outputs(3)] == [[18, 5]]


def test_a_loss_under_autocast_is_that_of_eager_under_autocast() -> None:
    weight = torch.randn(5, 5)

    def loss_fn(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y @ weight, t.view(-1))

    outputs, target = _flat(3)
    program = trace_loss(loss_fn, outputs, target, num_samples=3, autocast=torch.bfloat16)
    [found] = Interpreter(program.graph, {}, constants_of(program)).run([outputs, target])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, loss_fn(outputs, target))


def test_rows_that_do_not_fit_the_inputs_are_refused() -> None:
    data = trace_loss(lambda y, t: F.cross_entropy(y, t.view(-1)), *_flat(3), num_samples=3).to_json()
    assert b'"rows":[6,1]' in data
    for rows in (b"[6]", b"[0,1]", b"[6,-1]", b'["6",1]', b"6"):
        with pytest.raises(ProgramError, match="rows"):
            LossProgram.from_json(data.replace(b'"rows":[6,1]', b'"rows":' + rows))
    huge = LossProgram.from_json(data.replace(b'"rows":[6,1]', b'"rows":[2147483647,1]'))
    with pytest.raises(ProgramError):
        check_loss(huge, batch=1 << 20, max_bytes=1 << 30, max_flops=1 << 40)
