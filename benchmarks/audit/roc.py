"""Detection and false alarms against the tolerance: what if it were a half, or twice as much?

An audit's score is the largest of its tensors' distances (and projection errors) as a share of what is allowed; where
bits are equal it is 0. Whoever accuses from a score of c on has c times the tolerance.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensorlink.audit.unit
from audit import attacks, honest
from audit.rig import Validators
from tensorlink.audit.compare import projection, room

#: Times the tolerance.
LIMITS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)


class Scores:
    """The scores of audits within."""

    def __init__(self) -> None:
        self._score = 0.0

    @contextmanager
    def recorded(self) -> Iterator[Scores]:
        """Scores what the validator compares meanwhile; it compares as ever, but goes on after a deviation."""
        unit = tensorlink.audit.unit
        deviation = unit.deviation

        def recording(name: str, claimed: Tensor, replays: Sequence[Tensor], exact: Tensor | None, *more: Any) -> Any:
            self._score = max(self._score, _score(claimed, replays, exact))
            return None

        unit.deviation = recording
        try:
            yield self
        finally:
            unit.deviation = deviation

    def take(self) -> float:
        """That of the last audit."""
        found, self._score = self._score, 0.0
        return found


def _score(claimed: Tensor, replays: Sequence[Tensor], exact: Tensor | None) -> float:
    if not claimed.is_floating_point():
        return 0.0
    honest_room = room(replays, exact)
    distance = float(torch.linalg.vector_norm(claimed.double() - honest_room.centre))
    score = distance / honest_room.allowed if honest_room.allowed else float("inf") if distance else 0.0
    if honest_room.projection:
        scaled = min(abs(projection(claimed, one)) for one in (honest_room.centre, *replays))
        score = max(score, scaled / honest_room.projection)
    return score


def of_attack(name: str, dtype: str, num_trials: int, first_seed: int) -> list[float]:
    """The scores of so many audits of bent units."""
    scores, validators = Scores(), Validators()
    with scores.recorded():
        made = attacks.trials(attacks.ATTACKS[name], validators, first_seed, dtype, 4)
        return [scores.take() for _ in itertools.islice(made, num_trials)]


def of_honest(numeric: honest.NumericClass, model: str, first_seed: int, num_jobs: int) -> list[float]:
    """The scores of honest work of another numeric class."""
    found, scores, validators = [], Scores(), Validators()
    with tempfile.TemporaryDirectory() as folder, scores.recorded():
        path = Path(folder) / "cases"
        honest.train(numeric, model, first_seed, num_jobs, 4, path)
        with path.open("rb") as source:
            for _, case, body in honest.read_cases(source):
                validators.examine(case, body)
                found.append(scores.take())
    return found


def rates(scores: Sequence[float]) -> list[float]:
    """The share of audits that each of `LIMITS` would have accused."""
    return [sum(score > limit for score in scores) / len(scores) for limit in LIMITS]
