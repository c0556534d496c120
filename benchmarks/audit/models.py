"""Small models cut into stages, each with something at which a comparison may go wrong.

`mlp` has biases before BatchNorm, `gpt` separate key biases and embedding rows that no token names, `router` a choice
of two experts of four, `conv` convolutions, `dropout` random masks. `wide` is `gpt` large enough for several threads. A
name may end in `-bf16`.

Letters: B batch, T tokens, C width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.loss import trace_loss
from tensorlink.program.trace import trace

VOCABULARY = 64
#: Tokens below this occur: of the rows above no gradient is ever taken.
USED = 32
FEATURES, CLASSES = 8, 5


class Attention(nn.Module):
    """Causal attention of two heads and an MLP, both residual; query, key and value have biases of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        b, t, c = x_BTC.shape
        h = self.norm(x_BTC)
        q, k, v = (f(h).view(b, t, 2, c // 2).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x_BTC = x_BTC + self.out(mixed)
        return x_BTC + self.mlp(x_BTC)


class Router(nn.Module):
    """The two best of four experts by their gates' scores, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BC: Tensor) -> Tensor:
        scores, chosen = self.gate(x_BC).topk(2, dim=-1)
        weights = torch.zeros_like(self.gate(x_BC)).scatter(-1, chosen, scores.softmax(-1))
        each = torch.stack([torch.tanh(expert(x_BC)) for expert in self.experts], dim=-2)
        return x_BC + (weights.unsqueeze(-1) * each).sum(-2)


def _mlp() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, CLASSES)),
    ]


def _gpt(width: int = 16) -> list[nn.Module]:
    return [
        nn.Sequential(nn.Embedding(VOCABULARY, width), Attention(width)),
        nn.Sequential(Attention(width), nn.LayerNorm(width), nn.Linear(width, VOCABULARY)),
    ]


def _router(width: int = 48) -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(FEATURES, width), Router(width)),
        nn.Sequential(Router(width), nn.Linear(width, CLASSES)),
    ]


def _conv() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(64, CLASSES)
        ),
    ]


def _dropout() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.3), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, CLASSES)),
    ]


MAKE: dict[str, Callable[[], list[nn.Module]]] = {
    "mlp": _mlp, "gpt": _gpt, "router": _router, "conv": _conv, "dropout": _dropout, "wide": lambda: _gpt(64),
}  # fmt: skip
TOKENS = {"gpt": 6, "wide": 32}


def modules(name: str, seed: int) -> list[nn.Module]:
    """The stages of a model, with weights that follow from `seed`."""
    plain, _, dtype = name.partition("-")
    torch.manual_seed(seed)
    made = MAKE[plain]()
    return [stage.bfloat16() for stage in made] if dtype else made


def batch(name: str, seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step."""
    plain, _, dtype = name.partition("-")
    draw = torch.Generator().manual_seed(seed)
    if plain in TOKENS:
        tokens = torch.randint(0, USED, (rows, TOKENS[plain] + 1), generator=draw)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    x = torch.randn(rows, FEATURES, generator=draw)
    return x.bfloat16() if dtype else x, torch.randint(0, CLASSES, (rows,), generator=draw)


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


@functools.cache
def traced(name: str) -> tuple[Sequence[StageProgram], LossProgram]:
    """The programs of a model's stages, and of its loss."""
    stages = modules(name, 0)
    value, target = batch(name, 0, 4)
    programs = []
    for index, module in enumerate(stages):
        program = trace(module, (value,)).whole()
        programs.append(dataclasses.replace(program, stage_index=index, num_stages=len(stages)))
        with torch.no_grad():
            value = module.eval()(value)
        module.train()
        value = value.clone().requires_grad_()
    return programs, trace_loss(loss_fn, value.detach(), target)


def state(name: str, seed: int, index: int) -> dict[str, Tensor]:
    """Weights and buffers with which a stage begins."""
    program = traced(name)[0][index]
    module = modules(name, seed)[index]
    held = {**dict(module.named_parameters()), **dict(module.named_buffers()), **_constants(name, index)}
    return {key: held[key].detach().clone() for key in program.expected_state()}


@functools.cache
def _constants(name: str, index: int) -> dict[str, Tensor]:
    module = modules(name, 0)[index]
    value = batch(name, 0, 4)[0]
    for before in modules(name, 0)[:index]:
        with torch.no_grad():
            value = before.eval()(value)
    whole = trace(module, (value.requires_grad_() if index else value,))
    program = whole.whole()
    return {
        key: tensor
        for key, tensor in whole.state(program).items()
        if program.buffers.get(key) is not None and program.buffers[key].constant
    }


@functools.cache
def traced_loss(name: str) -> bytes:
    """The loss program as it travels."""
    return traced(name)[1].to_json()
