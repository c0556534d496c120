"""Two rules that others use, on the very tensors that an audit compares: what would each have let through?

IOTA (Bittensor's subnet 9) accepts what has a cosine above 0.9 to, and a norm within 0.8 of, what the validator
computes. The original Tensorlink meant to compare a worker's gradients with those of the step before (mean distance of
the cosines from 1 at most 0.1); it re-executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import tensorlink.audit.step
import tensorlink.audit.unit

COSINE, NORM_RATIO, CONTINUITY = 0.9, 0.8, 0.1


class Pairs:
    """The pairs (claimed, computed) of the audits within."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def recorded(self) -> Iterator[Pairs]:
        """Keeps what the validator compares meanwhile; it compares as ever."""
        step, unit = tensorlink.audit.step, tensorlink.audit.unit
        compare, update = unit.compare, step.update_deviation

        def recording(case: Any, prefix: str, claimed: Any, native: Any, *rest: Any) -> Any:
            self.pairs += [(claimed[name], native[name]) for name in claimed]
            return compare(case, prefix, claimed, native, *rest)

        def recording_update(name: str, before: Any, claimed: Tensor, replayed: Tensor, *rest: Any) -> Any:
            self.pairs.append((claimed, replayed))
            return update(name, before, claimed, replayed, *rest)

        unit.compare = step.compare = recording
        step.update_deviation = recording_update
        try:
            yield self
        finally:
            unit.compare = step.compare = compare
            step.update_deviation = update

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """Those since the last call."""
        found, self.pairs = self.pairs, []
        return found


def iota_accepts(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether every tensor passes; asked of each alone, which is stricter than of all at once."""
    return all(_alike(claimed.double(), computed.double()) for claimed, computed in pairs)


def _alike(claimed: Tensor, computed: Tensor) -> bool:
    ours, theirs = float(claimed.norm()), float(computed.norm())
    if not max(ours, theirs) > 0:
        return True
    cosine = float(torch.dot(claimed.reshape(-1), computed.reshape(-1))) / max(ours * theirs, 1e-300)
    return cosine > COSINE and min(ours, theirs) / max(ours, theirs) > NORM_RATIO


def continuous(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Whether the gradients of two successive steps are alike."""
    apart = []
    for name in before.keys() & now.keys():
        a, b = before[name].double().reshape(-1), now[name].double().reshape(-1)
        apart.append(abs(1 - float(torch.dot(a, b)) / max(float(a.norm() * b.norm()), 1e-300)))
    return not apart or sum(apart) / len(apart) <= CONTINUITY
