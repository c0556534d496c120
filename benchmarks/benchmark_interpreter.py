"""The interpreter beside eager PyTorch: one training step (forward and backward), interleaved in one process.

Prints medians in microseconds and their ratio for a small MLP, a byte-level GPT and a residual CNN. One thread.
Run: `python benchmarks/benchmark_interpreter.py [--rounds 200]`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import trace


class Block(nn.Module):
    """A pre-norm transformer block, [batch, length, width] in and out."""

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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name to module and input: two tiny ones, where overhead shows, and two of some size."""

    def gpt(width: int, depth: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(256, width), *(Block(width, 4) for _ in range(depth)), nn.Linear(width, 256))

    cnn = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 256, 10)
    )
    return {
        "MLP 64-64-64": (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 64)),
        "GPT width 32, depth 2": (gpt(32, 2), torch.randint(0, 256, (2, 16))),
        "GPT width 256, depth 4": (gpt(256, 4), torch.randint(0, 256, (4, 64))),
        "CNN 3-32, 16x16": (cnn, torch.randn(8, 3, 16, 16)),
    }


def _seconds(runs: nn.Module | Interpreter, x: Tensor, parameters: list[Tensor]) -> float:
    started = time.perf_counter()
    output = runs.run([x])[0] if isinstance(runs, Interpreter) else runs(x)
    torch.autograd.grad(output.sum(), parameters)
    return time.perf_counter() - started


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, {rounds} interleaved rounds, forward and backward"
    )
    print(f"{'model':26}{'nodes':>6}{'eager us':>12}{'ours us':>12}{'ratio':>8}{'quartiles':>16}")
    for name, (module, x) in models().items():
        traced = trace(module, (x,))
        program = traced.whole()
        buffers = {key: buffer.clone() for key, buffer in traced.buffers.items()}
        interpreter = Interpreter(program.train, dict(traced.parameters), buffers, cut=program.inputs)
        parameters: list[Tensor] = list(traced.parameters.values())
        eager, ours = [], []
        for _ in range(rounds):
            eager.append(_seconds(module, x, parameters))
            ours.append(_seconds(interpreter, x, parameters))
        ratios = statistics.quantiles([b / a for a, b in zip(eager, ours, strict=True)], n=4)
        print(
            f"{name:26}{len(program.train.nodes):>6}{statistics.median(eager) * 1e6:>12.1f}"
            f"{statistics.median(ours) * 1e6:>12.1f}{ratios[1]:>8.3f}{ratios[0]:>9.3f}-{ratios[2]:.3f}"
        )


if __name__ == "__main__":
    main()
