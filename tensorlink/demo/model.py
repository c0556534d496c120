"""The demo's model and data: a byte-level GPT on the sources of Python's own standard library.

B batch, T bytes of context, C width, V = 256 byte values.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from smartnodes_core.errors import ConfigError

VOCABULARY = 256
MAX_TEXT_BYTES = 8 << 20


class Block(nn.Module):
    """Pre-norm attention and MLP: (B, T, C) to (B, T, C)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """Predicts the next byte: (B, T) of int64 bytes to (B, T, V) logits."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128):
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def next_byte_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of (B, T, V) logits against (B, T) bytes."""
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), y.reshape(-1))


@dataclass(frozen=True)
class Text:
    """Bytes for training and, from other files, for validation."""

    training: torch.Tensor
    validation: torch.Tensor

    @classmethod
    def of_standard_library(cls) -> Text:
        """The sources of the running Python's standard library, every tenth file for validation."""
        folder = Path(sysconfig.get_path("stdlib"))
        files = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
        files = [file for file in files if "site-packages" not in file.parts and "test" not in file.parts]
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for index, file in enumerate(files):
            parts[index % 10 == 9].append(file.read_bytes())
        training, validation = (b"".join(part)[:MAX_TEXT_BYTES] for part in parts)
        if len(validation) < 100_000:
            raise ConfigError(
                f"found {len(training) + len(validation)} bytes of Python sources in the standard library, needed "
                "at least a megabyte: this Python was installed without its sources"
            )
        return cls(*(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, validation)))

    def batch(self, step: int, size: int, context: int, validation: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `step`: inputs and the bytes that follow them, both (size, context) int64; the same for every
        caller.
        """
        source = self.validation if validation else self.training
        generator = torch.Generator().manual_seed(1_000_003 * (1 + validation) + step)
        starts = torch.randint(len(source) - context - 1, (size,), generator=generator)
        windows = torch.stack([source[start : start + context + 1] for start in starts.tolist()]).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
