"""What is reckoned is what a stage then holds, byte for byte where it can be counted."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorlink.pipeline.backward import forward
from tensorlink.pipeline.inbox import Delivery
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import trace
from tensorlink.sharding.memory import Memory, Training, optimizer_copies
from tensorlink.sharding.needs import needs_of
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile

WINDOW, NUM_MICRO_BATCHES, SAMPLES = 3, 2, 4


def _pipes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pipes", Path(__file__).parent.parent / "conftest.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif is_dataclass(item):
        for field in fields(item):
            yield from _tensors(getattr(item, field.name))
    elif isinstance(item, Iterable) and not isinstance(item, str | bytes):
        for value in item:
            yield from _tensors(value)


def _held_bytes(*items: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for item in items for t in _tensors(item)}
    return sum(storages.values())


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {})])
def test_a_trained_stage_holds_what_was_reckoned(name: str, options: dict[str, float]) -> None:
    pipes = _pipes()
    module = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(NUM_MICRO_BATCHES * SAMPLES, 32)
    traced = trace(module, (x,))
    costs = profile(traced, (x,), measured=False)
    programs = partition(traced, costs, 2)
    pipe = pipes.Pipe(programs, [traced.state(program) for program in programs], window_steps=WINDOW)
    defaults = getattr(torch.optim, name)([torch.zeros(1)], lr=0.1, **options).defaults
    groups = [{"parameters": list(dict(module.named_parameters())), **{k: v.hex() for k, v in options.items()}}]
    for stage in pipe.stages:
        stage.set_optimizer(name, groups)
    for step in range(WINDOW + 2):
        call = {
            "step": step, "call": 0, "num_micro_batches": NUM_MICRO_BATCHES, "type": "forward", "training": True,
            "grad": True, "weights": [], "schedule": "gpipe",
        }  # fmt: skip
        pipe.tell("begin", call)
        for m, piece in enumerate(x.split(SAMPLES)):
            pipe.stages[0].receive(Delivery(step, 0, m, "activation", 0), 0, piece.clone())
        pipe.run()
        pipe.tell("begin_backward", {"step": step, "call": 0, "backward_pass": 0})
        for m in range(NUM_MICRO_BATCHES):
            pipe.stages[-1].receive(Delivery(step, 0, m, "activation_gradient", 0), 0, torch.ones(SAMPLES, 8))
        pipe.run()
        for stage in pipe.stages:
            stage.commit(step, 1.0, groups, b"")
    training = Training(NUM_MICRO_BATCHES, WINDOW, optimizer_copies(name, defaults))
    for stage, need in zip(pipe.stages, needs_of(programs, costs, SAMPLES), strict=True):
        reckoned = need.memory(NUM_MICRO_BATCHES, training)
        assert stage.optimizer is not None
        state = stage.optimizer.state_tensors()
        counters = sum(t.numel() * t.element_size() for key, t in state.items() if key.endswith("/step"))
        assert _held_bytes(stage.parameters, stage.buffers) == reckoned.weights
        assert _held_bytes(state) == reckoned.optimizer + counters
        open_step = need.logged_bytes * NUM_MICRO_BATCHES
        assert (
            _held_bytes([stage.log.committed(step) for step in stage.log.steps()])
            == reckoned.kept_for_audits - open_step + WINDOW * counters
        )


@pytest.mark.parametrize(
    ("name", "options", "copies"),
    [
        ("SGD", {}, 0.0),
        ("SGD", {"momentum": 0.9}, 1.0),
        ("AdamW", {}, 2.0),
        ("Adam", {"amsgrad": True}, 3.0),
        ("RMSprop", {"centered": True}, 2.0),
        ("Adagrad", {}, 1.0),
    ],
)
def test_the_state_of_an_optimizer_is_found_by_trying(name: str, options: dict[str, Any], copies: float) -> None:
    defaults = getattr(torch.optim, name)([torch.zeros(1)], **options).defaults
    assert optimizer_copies(name, defaults) == copies


def test_memory_adds_up_and_says_what_for() -> None:
    memory = Memory(10**6, 2 * 10**6, 0, 4 * 10**6, 0) + Memory(activations=500_000)
    assert memory.total == 7_500_000
    assert str(memory) == "7.5 MB (weights 1.0 + gradients 2.0 + optimizer 0.0 + kept for audits 4.0 + activations 0.5)"


class _Block(nn.Module):
    """What transformers are made of: normalised, attention, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.widen, self.narrow = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.narrow(nn.functional.gelu(self.widen(x)))


@pytest.mark.parametrize("defer", [False, True])
def test_what_autograd_keeps_of_a_micro_batch_is_what_was_reckoned(defer: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(_Block(), _Block(), nn.Linear(32, 8)), torch.randn(SAMPLES, 16, 32)
    traced = trace(module, (x,))
    costs = profile(traced, (x,), measured=False)
    programs = partition(traced, costs, 2)
    entering = [x]
    for program, need in zip(programs, needs_of(programs, costs, SAMPLES), strict=True):
        state = traced.state(program)
        parameters = {n: state[n].requires_grad_(spec.requires_grad) for n, spec in program.parameters.items()}
        interpreter = Interpreter(program.train, parameters, {name: state[name] for name in program.buffers})
        own = {parameter.untyped_storage().data_ptr() for parameter in parameters.values()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, own: set[int] = own, kept: dict[int, Tensor] = kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            passed = forward(interpreter, program.inputs, entering, lambda node: 0, grad=True, defer=defer)
        assert _held_bytes(kept) == need.saved_bytes
        entering = [output.detach() for output in passed.outputs if isinstance(output, Tensor)]
