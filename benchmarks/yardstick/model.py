"""The yardstick: a GPT of 8 layers and width 512 on 16 sequences of 256 tokens, 8 micro-batches: 26M parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Sizes:
    """What is trained. `batch` sequences of `context` tokens make a step."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    vocabulary: int = 1024
    context: int = 256
    batch: int = 16
    micro_batches: int = 8
    learning_rate: float = 3e-4


class Embedding(nn.Module):
    """Tokens and their positions, [batch, context] to [batch, context, width]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.token = nn.Embedding(sizes.vocabulary, sizes.width)
        self.position = nn.Embedding(sizes.context, sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalised residual stream."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, context, width))
        return x + self.narrow(functional.gelu(self.widen(self.before_mlp(x))))


def make_model(sizes: Sizes) -> nn.Sequential:
    """The same weights in every process."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary, bias=False))
    return nn.Sequential(Embedding(sizes), *(Block(sizes) for _ in range(sizes.layers)), head)


def cut(model: nn.Sequential, num_stages: int) -> list[nn.Sequential]:
    """Stages of as many blocks each as can be; the embedding goes with the first, the head with the last."""
    first, *blocks, last = model
    stages, at = [], 0
    for stage in range(num_stages):
        count = len(blocks) // num_stages + (stage < len(blocks) % num_stages)
        stages.append(blocks[at : at + count])
        at += count
    stages[0].insert(0, first)
    stages[-1].append(last)
    return [nn.Sequential(*stage) for stage in stages]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def batch(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """Random tokens and those that follow them: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.context + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
