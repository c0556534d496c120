"""Ranks inside this process, joined over Gloo, and models whose shardings are looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tensorlink.program.trace import trace
from tensorlink.tensor_parallel.ranks import Ranks


class Lost(Exception):
    """What ends the computing process elsewhere."""


def _lost(reason):
    raise Lost(reason)


@pytest.fixture(scope="session")
def ranks():
    torch.set_num_threads(1)
    made = Ranks(2, "cpu", _lost)
    yield made
    made.stop()


@pytest.fixture
def losing_ranks():
    """Ranks of a test's own, which it may ruin; and what they end with."""
    made = Ranks(2, "cpu", _lost, timeout_s=2.0)
    made.Lost = Lost
    yield made
    made.stop()


class Gpt(nn.Module):
    """Four heads, a fused matrix for query, key and value that is taken apart by `chunk`; dropout where asked for."""

    def __init__(self, tied=False, dropout=0.0, vocabulary=32):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, 16), nn.Embedding(8, 16)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 64),
            nn.Linear(64, 16),
        )
        self.drop, self.rate = nn.Dropout(dropout), dropout
        self.head = nn.Linear(16, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        b, t = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(t, device=ids.device))
        q, k, v = (part.view(b, t, 4, 4).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, 16))
        x = x + self.down(self.drop(F.gelu(self.up(self.norm2(x)))))
        return self.head(self.norm3(x))


class Llama(nn.Module):
    """Rotary positions, fewer heads of keys than of queries, a gated perceptron, attention written out."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(31, 16), nn.RMSNorm(16)
        self.q, self.k, self.v = (
            nn.Linear(16, 16, bias=False),
            nn.Linear(16, 8, bias=False),
            nn.Linear(16, 8, bias=False),
        )
        self.o, self.gate_up, self.down = (
            nn.Linear(16, 16, bias=False),
            nn.Linear(16, 48, bias=False),
            nn.Linear(24, 16, bias=False),
        )
        self.head = nn.Linear(16, 31, bias=False)
        angles = torch.arange(8.0)[:, None] / 10 ** torch.arange(2.0)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def turned(self, x):
        first, second = x[..., :2], x[..., 2:]
        return x * self.cos[: x.shape[2]] + torch.cat([-second, first], dim=-1) * self.sin[: x.shape[2]]

    def forward(self, ids):
        b, t = ids.shape
        x = self.embed(ids)
        y = self.norm(x)
        q = self.turned(self.q(y).view(b, t, 4, 4).transpose(1, 2))
        k = self.turned(self.k(y).view(b, t, 2, 4).transpose(1, 2))
        v = self.v(y).view(b, t, 2, 4).transpose(1, 2)
        k, v = (part[:, :, None].expand(b, 2, 2, t, 4).reshape(b, 4, t, 4) for part in (k, v))
        scores = q @ k.transpose(2, 3) / 2 + torch.full((t, t), float("-inf"), device=ids.device).triu(1)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * up))


class Branching(nn.Module):
    """What no rule knows: a sum over what is split, a matrix used twice, a product of two halves."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.scale = nn.Linear(8, 12), nn.Linear(12, 12), nn.Parameter(torch.rand(12))
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        y = torch.tanh(self.first(x) * self.scale)
        y = self.again(self.again(y)) + y.cumsum(-1)
        return self.last(y * torch.sigmoid(y.mean(-1, keepdim=True)))


class Convolved(nn.Module):
    """Convolutions are replicated."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


TOKENS = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(1))
MODELS = {
    "gpt": (Gpt, TOKENS),
    "tied gpt": (lambda: Gpt(tied=True), TOKENS),
    "gpt with an odd vocabulary": (lambda: Gpt(vocabulary=33), TOKENS),
    "dropping gpt": (lambda: Gpt(dropout=0.3), TOKENS),
    "llama": (Llama, TOKENS),
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 5)), torch.randn(4, 8)),
    "branching": (Branching, torch.randn(4, 8)),
    "convolved": (Convolved, torch.randn(4, 3, 8, 8)),
}


@pytest.fixture
def traced():
    """A model's program, its state and an input, by name."""

    def make(name):
        make_model, x = MODELS[name]
        torch.manual_seed(0)
        found = trace(make_model(), (x,))
        program = found.whole()
        return program, {key: tensor.detach().clone() for key, tensor in found.state(program).items()}, x

    return make
