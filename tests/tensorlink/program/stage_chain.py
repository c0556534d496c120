"""Stages in one process as workers would run them, and eager PyTorch, which they are held against bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorlink.program.alignment import aligned
from tensorlink.program.graph import StageProgram
from tensorlink.program.inputs import flatten_inputs, unflatten_outputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import TracedModel
from tensorlink.program.weights import dump, load

SIZES = (4, 1, 7, 3)


def call(module: nn.Module, example: Any) -> Any:
    return module(**example) if isinstance(example, dict) else module(*example)


def flat(traced: TracedModel, example: Any) -> list[Tensor]:
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    return flatten_inputs(traced, args, kwargs)


def differentiable(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def gradient(output: Tensor) -> Tensor:
    """The gradient that both sides use for an output, different for each element."""
    return torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)


class Chain:
    """Stages in one process as workers would run them: weights through safetensors, boundaries detached, autograd per
    stage."""

    def __init__(
        self, traced: TracedModel, programs: list[StageProgram], training: bool, seed: int | None = None
    ) -> None:
        self.seed_for = (lambda key: 7 + key) if seed is None else (lambda key: seed)
        self.programs = [StageProgram.from_json(program.to_json()) for program in programs]
        self.parameters: list[dict[str, Tensor]] = []
        self.buffers: list[dict[str, Tensor]] = []
        for program in self.programs:
            state = load(dump(traced.state(program)), program.expected_state())
            self.parameters.append({n: state[n].requires_grad_(s.requires_grad) for n, s in program.parameters.items()})
            self.buffers.append({name: state[name] for name in program.buffers})
        self.interpreters = [
            Interpreter(program.graph(training), parameters, buffers, cut=program.inputs)
            for program, parameters, buffers in zip(self.programs, self.parameters, self.buffers, strict=True)
        ]
        self.entered: list[list[Any]] = []
        self.left: list[list[Any]] = []

    def forward(self, inputs: list[Any]) -> list[Any]:
        """The outputs of the last stage."""
        self.entered, self.left = [], []
        for program, interpreter in zip(self.programs, self.interpreters, strict=True):
            entering = [
                aligned(item.detach()).requires_grad_(slot.requires_grad) if isinstance(item, Tensor) else item
                for item, slot in zip(inputs, program.inputs.slots, strict=True)
            ]
            inputs = interpreter.run(entering, self.seed_for)
            self.entered.append(entering)
            self.left.append(inputs)
        return inputs

    def backward(self) -> dict[str, Tensor]:
        """The gradients of all parameters, those of a tied one added over its stages from the last to the first."""
        sums: dict[str, Tensor] = {}
        arriving: list[Tensor | None] = [gradient(x) if isinstance(x, Tensor) else None for x in self.left[-1]]
        for stage in reversed(range(len(self.programs))):
            slots = self.programs[stage].outputs.slots
            ends = [
                (x, aligned(g))
                for x, g, slot in zip(self.left[stage], arriving, slots, strict=True)
                if slot.requires_grad and g is not None
            ]
            wanted = [x for x in self.entered[stage] if isinstance(x, Tensor) and x.requires_grad]
            names = [name for name, tensor in self.parameters[stage].items() if tensor.requires_grad]
            if not wanted and not names:  # everything up to here is frozen
                break
            found = torch.autograd.grad(
                [x for x, _ in ends],
                [*wanted, *(self.parameters[stage][n] for n in names)],
                [g for _, g in ends],
                allow_unused=True,
            )
            for name, found_gradient in zip(names, found[len(wanted) :], strict=True):
                if found_gradient is not None:
                    sums[name] = sums[name] + found_gradient if name in sums else found_gradient
            remaining = iter(found[: len(wanted)])
            arriving = [
                next(remaining) if isinstance(x, Tensor) and x.requires_grad else None for x in self.entered[stage]
            ]
        return sums

    def set_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Gives every stage's parameters their gradients, for an optimizer."""
        for parameters in self.parameters:
            for name, parameter in parameters.items():
                parameter.grad = gradients[name].clone() if name in gradients else None


def assert_equal_to_eager(
    module: nn.Module,
    traced: TracedModel,
    programs: list[StageProgram],
    example: Callable[[int], Any],
    training: bool,
    *,
    sizes: Sequence[int] = SIZES,
    steps: int = 0,
    autocast: torch.dtype | None = None,
    seed: int | None = None,
) -> None:
    """Outputs, gradients and buffers of a chain of stages are those of the module, for batches of these sizes, each
    from the same state; then the same over as many steps of SGD with momentum. `seed` is for every node that draws
    random numbers, and for torch's generator before the module runs."""
    module.train(training)
    initial = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for batch in sizes:
        module.load_state_dict(initial)
        chain = Chain(traced, programs, training, seed)
        _assert_one_batch(module, traced, chain, example(batch), autocast, seed)
    module.load_state_dict(initial)
    if steps:
        chain = Chain(traced, programs, training)
        wanted = [p for p in module.parameters() if p.requires_grad]
        ours = [p for parameters in chain.parameters for p in parameters.values() if p.requires_grad]
        optimizers = [torch.optim.SGD(each, lr=0.05, momentum=0.9) for each in (wanted, ours)]
        for step in range(steps):
            chain.set_gradients(_assert_one_batch(module, traced, chain, example(3 + step), autocast))
            for optimizer in optimizers:
                optimizer.step()
    module.load_state_dict(initial)


def _assert_one_batch(
    module: nn.Module,
    traced: TracedModel,
    chain: Chain,
    example: Any,
    autocast: torch.dtype | None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    found = unflatten_outputs(traced, chain.forward(flat(traced, example)))
    module.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        expected = call(module, example)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert same(one, other) if isinstance(other, Tensor) else one == other
    ends = differentiable(pytree.tree_leaves(expected))
    torch.autograd.backward(ends, [gradient(end) for end in ends])
    gradients = chain.backward()
    wanted = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    assert set(gradients) == set(wanted)
    assert [key for key in wanted if not same(gradients[key], wanted[key])] == []
    held = {key: tensor for buffers in chain.buffers for key, tensor in buffers.items()}
    for key, buffer in module.named_buffers():
        assert same(held[traced.aliases.get(key, key)], buffer), key
    return gradients


def same(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and all numbers are the same, NaN being the same as NaN."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.allclose(one, other, 0, 0, equal_nan=True)
