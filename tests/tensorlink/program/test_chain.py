"""Every model, cut into one, two, three and five stages, computes bit for bit what eager PyTorch computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stage_chain import Chain, assert_equal_to_eager
from torch import Tensor, nn
from torch.nn import functional as F

from tensorlink.program.trace import TracedModel, trace
from tensorlink.sharding.partition import partition
from tensorlink.sharding.profile import Profile, profile


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


class Conditional(nn.Module):
    """Branches on its data, inside a branch once more; a weight is used in one branch and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("shift", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        def left(y: Tensor) -> tuple[Tensor, Tensor]:
            inner = torch.cond(y[0, 0] > 0, lambda z: self.left(z) * z.shape[0], lambda z: self.left(z.cos()), (y,))
            return torch.relu(inner), y.sum(1)

        def right(y: Tensor) -> tuple[Tensor, Tensor]:
            return self.right(y + self.shift), y.mean(1)

        y, scale = torch.cond(x.sum() > 0, left, right, (torch.tanh(self.first(x)),))
        return self.last(self.left(y)) * scale[:, None]


class OneConditional(nn.Module):
    """Branches on its data; no weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cond(x.sum() > 0, self.left, self.right, (torch.tanh(self.first(x)),)))


class WithLoss(nn.Module):
    """A GPT that computes its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(tied=False)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), logits


def _mlp() -> nn.Module:
    hidden = [layer for _ in range(3) for layer in (nn.ReLU(), nn.Linear(16, 16), nn.GELU())]
    return nn.Sequential(nn.Linear(6, 16), *hidden, nn.Linear(16, 3))


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
    "cond": (Conditional, lambda batch: (torch.randn(batch, 6),)),
    "with_loss": (WithLoss, lambda batch: (*_tokens(batch), *_tokens(batch))),
    "bfloat16": (lambda: GPT(tied=False).bfloat16(), _tokens),
    "one_cond": (OneConditional, lambda batch: (torch.randn(batch, 6),)),
}


@functools.cache
def _traced(name: str, autocast: torch.dtype | None = None) -> tuple[nn.Module, TracedModel, Profile]:
    """A model traced once, when it is first asked for."""
    torch.manual_seed(1)
    make, inputs = CASES[name]
    module, example = make(), inputs(4)
    traced = trace(module, example, autocast=autocast)
    return module, traced, profile(traced, example, measured=False)


#: How many stages the layers and buffers of each model allow, 5 or more written as 5.
MOST_STAGES = {
    "mlp": 5,
    "residual_cnn": 5,
    "transformer_encoder": 5,
    "gpt": 5,
    "tied_gpt": 5,
    "rotary": 3,
    "several_inputs": 3,
    "frozen": 3,
    "recurrent": 3,
    "shared": 2,
    "cond": 3,
    "with_loss": 5,
    "bfloat16": 5,
    "one_cond": 3,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_chain_of_stages_is_bitwise_equal_to_eager(name: str, num_stages: int, training: bool) -> None:
    if num_stages > MOST_STAGES[name]:
        pytest.skip("the model has no place for as many cuts")
    module, traced, measured = _traced(name)
    programs = partition(traced, measured, num_stages)
    assert_equal_to_eager(module, traced, programs, CASES[name][1], training, steps=3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("name", ["residual_cnn", "gpt", "rotary", "one_cond", "with_loss"])
def test_a_chain_under_autocast_is_bitwise_equal_to_eager_under_autocast(
    name: str, num_stages: int, training: bool
) -> None:
    module, traced, measured = _traced(name, torch.bfloat16)
    programs = partition(traced, measured, num_stages)
    assert_equal_to_eager(module, traced, programs, CASES[name][1], training, steps=2, autocast=torch.bfloat16)


class Regions(nn.Module):
    """Regions of autocast inside the model, off and on, and a weight used in two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        with torch.autocast("cpu", enabled=False):
            y = self.one(self.norm(y.float()))
            with torch.autocast("cpu", torch.bfloat16):
                y = y + self.two(y)
        return self.three(torch.softmax(y, -1))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["outside", "in_autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_regions_of_autocast_inside_a_model_are_those_of_eager(training: bool, autocast: torch.dtype | None) -> None:
    torch.manual_seed(1)
    module, inputs = Regions(), CASES["rotary"][1]
    traced = trace(module, inputs(4), autocast=autocast)
    assert_equal_to_eager(module, traced, [traced.whole()], inputs, training, steps=2, autocast=autocast)


def test_what_is_traced_without_autocast_runs_without_it_whatever_the_caller_does() -> None:
    module, x = _mlp(), torch.randn(4, 6)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        traced = trace(module, (x,))
        [found] = Chain(traced, [traced.whole()], True).forward([x])
    assert torch.equal(found, expected)
    assert not torch.is_autocast_enabled("cpu")


class RegionsInBranches(nn.Module):
    """Each branch ends inside a region of autocast, which is over behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        def left(y: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.left(y)

        def right(y: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.right(y)

        return self.last(torch.cond(x.sum() > 0, left, right, (x,)).float())


def test_a_region_of_autocast_in_a_branch_ends_with_it() -> None:
    torch.manual_seed(1)
    module, inputs = RegionsInBranches(), CASES["rotary"][1]
    traced = trace(module, inputs(4))
    assert_equal_to_eager(module, traced, [traced.whole()], inputs, True, steps=2)
