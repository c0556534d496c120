"""Sums of gradients: in which memory they stand, and how many gradients there are at once."""

from __future__ import annotations

import weakref

import torch

from tensorlink.pipeline.backward import GradientSum


def test_what_was_added_is_never_written_to_and_sums_stand_in_lent_memory():
    first, second, memory = torch.ones(4), torch.full((4,), 2.0), torch.empty(4)
    total = GradientSum()
    total.lend({"a": memory})
    for gradient in (first, second):
        total.add({"a": gradient, "b": gradient})
    found = total.take()
    assert found["a"] is memory
    assert torch.equal(found["a"], torch.full((4,), 3.0))
    assert torch.equal(found["b"], torch.full((4,), 3.0))
    assert torch.equal(first, torch.ones(4))
    total.add({"a": first})
    assert total.take()["a"] is first  # lent once, used once


def test_memory_of_another_shape_or_dtype_is_not_used():
    total = GradientSum()
    total.lend({"a": torch.empty(3), "b": torch.empty(4, dtype=torch.float64)})
    gradient = torch.ones(4)
    total.add({"a": gradient, "b": gradient})
    assert all(tensor is gradient for tensor in total.take().values())


def test_dropped_sums_leave_their_memory_for_the_next():
    memory, total = torch.empty(4), GradientSum()
    total.lend({"a": memory})
    total.add({"a": torch.ones(4)})
    total.drop()
    assert not len(total)
    total.add({"a": torch.full((4,), 5.0)})
    assert total.take()["a"] is memory


def test_a_gradient_is_gone_when_the_next_is_computed():
    torch.manual_seed(0)
    weights = {str(at): torch.randn(64, 64, requires_grad=True) for at in range(6)}
    plain = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class Watched(GradientSum):
        def add(self, gradients):
            super().add(gradients)
            alive.append(sum(one() is not None for one in seen))
            seen.extend(weakref.ref(gradient) for gradient in gradients.values())

    total = Watched()
    total.lend({name: torch.empty(64, 64) for name in weights})
    for _ in range(2):
        for of, into in ((weights, total), (plain, None)):
            y = torch.ones(2, 64)
            for weight in of.values():
                y = torch.tanh(y @ weight)
            if into is None:
                y.sum().backward()
            else:
                with into.gathering(of):
                    torch.autograd.grad(y.sum(), list(of.values()))
    assert len(alive) == 2 * len(plain)
    assert not any(alive)
    assert all(torch.equal(sum, plain[name].grad) for name, sum in total.take().items())
