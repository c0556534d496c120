"""Every model, cut into one, two and three stages, computes bit for bit what eager PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tensorlink.program.alignment import aligned
from tensorlink.program.graph import StageProgram
from tensorlink.program.inputs import flatten_inputs, unflatten_outputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import TracedModel, trace
from tensorlink.program.weights import dump, load
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import profile


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, 32), nn.Embedding(12, 32)
        self.blocks = nn.ModuleList([Block(32, 4) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 256, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Rotary(nn.Module):
    """Computes a table under no_grad with autocast off, as Llama does, and masks with a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.inner, self.outputs = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("inverse", 1.0 / torch.arange(1.0, 5.0), persistent=False)

    @torch.no_grad()
    def table(self, length: int) -> Tensor:
        with torch.autocast(device_type="cpu", enabled=False):
            angles = torch.arange(length).float()[:, None] * self.inverse
            return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(x.shape[1])
        y = self.inner(torch.tanh(self.inputs(x) * table))
        scores = (y @ y.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        return self.outputs((scores.softmax(-1) @ y) * table)


class Several(nn.Module):
    """Keyword inputs, an integer input, a mask without batch, and a nested output with a constant in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, kinds: Tensor, *, scale: Tensor, depth: int = 1) -> dict[str, Any]:
        y = x + self.embed(kinds)
        for _ in range(depth):
            y = torch.tanh(self.mix(y)) * scale
        return {"logits": self.out(y), "hidden": (y, [kinds]), "depth": depth}


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.body[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, num_layers=2, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        y, _ = self.gru(y)
        return self.head(y[:, -1])


class Shared(nn.Module):
    """One module used three times, a buffer kept as a moving average, and writes into slices."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        y = self.other(torch.tanh(self.layer(y)))
        y[:, 0] = 0
        y[:, 1:3] *= 2.0
        return self.layer(y) + self.average


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def _tokens(batch: int) -> tuple[Any, ...]:
    return (torch.randint(0, 256, (batch, 12)),)


def _several(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 6), "kinds": torch.randint(0, 10, (batch,)), "scale": torch.randn(6), "depth": 2}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (_mlp, lambda batch: (torch.randn(batch, 6),)),
    "residual_cnn": (ResidualCNN, lambda batch: (torch.randn(batch, 3, 8, 8),)),
    "transformer_encoder": (Encoder, lambda batch: (torch.randn(batch, 5, 16),)),
    "gpt": (lambda: GPT(tied=False), _tokens),
    "tied_gpt": (lambda: GPT(tied=True), _tokens),
    "rotary": (Rotary, lambda batch: (torch.randn(batch, 5, 8),)),
    "several_inputs": (Several, _several),
    "frozen": (Frozen, lambda batch: (torch.randn(batch, 6),)),
    "recurrent": (Recurrent, lambda batch: (torch.randn(batch, 4, 6),)),
    "shared": (Shared, lambda batch: (torch.randn(batch, 6),)),
}


def _call(module: nn.Module, example: Any) -> Any:
    return module(**example) if isinstance(example, dict) else module(*example)


def _flat(traced: TracedModel, example: Any) -> list[Tensor]:
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    return flatten_inputs(traced, args, kwargs)


def _differentiable(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


def _gradient(output: Tensor) -> Tensor:
    """The gradient that both sides use for an output, different for each element."""
    return torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)


class Chain:
    """Stages in one process as workers would run them: weights through safetensors, boundaries detached, autograd per
    stage."""

    def __init__(self, traced: TracedModel, programs: list[StageProgram], training: bool) -> None:
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
        for program, interpreter in zip(self.programs, self.interpreters, strict=True):
            entering = [
                aligned(item.detach()).requires_grad_(slot.requires_grad) if isinstance(item, Tensor) else item
                for item, slot in zip(inputs, program.inputs.slots, strict=True)
            ]
            inputs = interpreter.run(entering, seed_for=lambda key: 7 + key)
            self.entered.append(entering)
            self.left.append(inputs)
        return inputs

    def backward(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        arriving: list[Tensor | None] = [_gradient(x) if isinstance(x, Tensor) else None for x in self.left[-1]]
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
            for name, gradient in zip(names, found[len(wanted) :], strict=True):
                if gradient is not None:
                    sums[name] = sums[name] + gradient if name in sums else gradient
            remaining = iter(found[: len(wanted)])
            arriving = [
                next(remaining) if isinstance(x, Tensor) and x.requires_grad else None for x in self.entered[stage]
            ]
        return sums


@pytest.fixture(scope="module")
def traced_models() -> dict[str, tuple[nn.Module, TracedModel, dict[int, list[StageProgram]]]]:
    cache: dict[str, Any] = {}
    torch.set_num_threads(1)
    for name, (make, inputs) in CASES.items():
        torch.manual_seed(1)
        module = make()
        example = inputs(4)
        traced = trace(module, example)
        measured = profile(traced, example, measured=False)
        cache[name] = (
            module,
            traced,
            {n: partition(traced, measured, n) for n in (1, 2, 3) if (name, n) not in UNCUTTABLE},
        )
    return cache


#: Models whose layers or buffers do not allow as many stages.
UNCUTTABLE = {("shared", 3)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_chain_of_stages_is_bitwise_equal_to_eager(
    traced_models: Any, name: str, num_stages: int, training: bool
) -> None:
    module, traced, programs = traced_models[name]
    if num_stages not in programs:
        pytest.skip("the model has no place for as many cuts")
    module.train(training)
    initial = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for batch in (4, 1, 7, 3):
        module.load_state_dict(initial)
        example = CASES[name][1](batch)
        chain = Chain(traced, programs[num_stages], training)
        found = unflatten_outputs(traced, chain.forward(_flat(traced, example)))
        module.zero_grad(set_to_none=True)
        expected = _call(module, example)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            assert torch.equal(one, other) if isinstance(other, Tensor) else one == other
        ends = _differentiable(pytree.tree_leaves(expected))
        torch.autograd.backward(ends, [_gradient(end) for end in ends])
        gradients = chain.backward()
        wanted = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
        assert set(gradients) == set(wanted)
        different = [key for key in wanted if not torch.equal(gradients[key], wanted[key])]
        assert not different
        held = {key: tensor for buffers in chain.buffers for key, tensor in buffers.items()}
        for key, buffer in module.named_buffers():
            assert torch.equal(held[key], buffer), key
    module.load_state_dict(initial)
