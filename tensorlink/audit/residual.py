"""What is left of an accepted tensor's difference from the auditor's replay, small enough to be kept.

A count sketch (Charikar, Chen and Farach-Colton, 2002): each element is added, with a sign, to one of `NUM_BUCKETS`
numbers, so that lengths and angles stay about what they were. Signs and buckets follow from a key that the auditor
keeps to itself: nobody can drift where it does not look. `drift.py` adds sketches up over audits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smartnodes_core.records import digest_of

NUM_BUCKETS = 32


def sketch(key: bytes, name: str, residual: Tensor) -> Tensor:
    """`NUM_BUCKETS` float64 numbers whose norm is about that of `residual`; linear in it."""
    seed = int.from_bytes(digest_of("residual sketch", key + name.encode())[:8], "little") >> 1
    drawn = torch.randint(2 * NUM_BUCKETS, (residual.numel(),), generator=torch.Generator().manual_seed(seed))
    signs = (drawn & 1).double() * 2 - 1
    found = torch.zeros(NUM_BUCKETS, dtype=torch.float64)
    return found.index_add_(0, drawn >> 1, residual.double().reshape(-1) * signs)


class Residuals:
    """Those of one audit by tensor, the mean where an audit has several of a kind (one for each micro-batch)."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sums: dict[str, tuple[Tensor | None, int]] = {}

    def add(self, name: str, claimed: Tensor, replayed: Tensor, unit: float) -> None:
        """An accepted tensor that differs, in units of `unit` (an L2 norm)."""
        difference = claimed.double() - replayed.double()
        found = sketch(self._key, name, difference / unit) if unit > 0 else None
        self._count(name, found)

    def add_scale(self, name: str, share: float) -> None:
        """How far a tensor is scaled up (or down, negative), as a share of what is allowed."""
        self._count(f"scale of {name}", torch.tensor([share], dtype=torch.float64))

    def equal(self, name: str) -> None:
        """A tensor that is equal to the last bit."""
        self._count(name, None)
        self._count(f"scale of {name}", None)

    def _count(self, name: str, found: Tensor | None) -> None:
        total, count = self._sums.get(name, (None, 0))
        if found is not None:
            total = found if total is None else total + found
        self._sums[name] = total, count + 1

    def means(self) -> dict[str, list[float]]:
        """By tensor; empty where all were equal."""
        return {
            name: [] if total is None else [float(value) for value in total / count]
            for name, (total, count) in self._sums.items()
        }
