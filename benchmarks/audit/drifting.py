"""A worker that drifts below the tolerance, always the same way: how far it comes before audits see it.

It adds a share of the tolerance to the gradient of one row of the last matrix: that of a token which no target names,
so that its own gradient soon is next to nothing and Adam makes much of little. Three validators draw and audit as the
job's rates say, each with what it has added up itself; a twin that is honest trains beside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from audit import cheats
from audit.models import USED
from audit.rig import Job, Validators
from tensorlink.audit.compare import FLOORS, MAX_ULP
from tensorlink.network import DEFAULT_AUDIT_TERMS

MODEL, STAGE = "gpt", 1
LEARNING_RATE = 1e-2


class CoherentDrift(cheats.BentWeightGradients):
    """`share` of the tolerance, on one row, in one direction."""

    share: float

    def bend_one(self, name: str, g: Tensor) -> Tensor:
        if name != last_matrix(self):
            return g
        direction = torch.ones(g.shape[1]) / g.shape[1] ** 0.5
        moved = g.clone()
        moved[USED] += self.share * FLOORS[g.dtype] * g.norm() * direction  # no target ever names this token
        return moved


def last_matrix(stage: Any) -> str:
    """Its name."""
    return [name for name, parameter in stage.parameters.items() if parameter.dim() == 2][-1]


@dataclass(frozen=True)
class Drifted:
    """What a drift came to. Displacements are of the row against the twin's, as shares of learning rate times steps."""

    share: float
    steps: int
    audits: int
    accused: int  # by single audits
    seen_at_step: int  # 0: never
    seen_after_audits: int
    moved_when_seen: float
    moved_at_end: float
    of_matrix_at_end: float  # of the matrix's norm


def run(share: float, num_steps: int, seed: int = 0) -> Drifted:
    """One job, audited at the default rates by three honest validators."""
    kind = type("Drift", (CoherentDrift,), {"share": share})
    validators = [Validators() for _ in range(3)]
    options = {"lr": LEARNING_RATE, "weight_decay": 0.0}
    cheat, honest = (
        Job(MODEL, seed, validators[0], cheats.classes(one, 2, [STAGE]), options=options, window_steps=1)
        for one in (kind, cheats.Stage)
    )
    draw = random.Random(seed)
    audits = accused = seen_at = seen_after = 0
    moved_when_seen = 0.0
    for step in range(num_steps):
        cheat.step()
        honest.step()
        if draw.random() < DEFAULT_AUDIT_TERMS.step_rate_ppm / 1e6:
            cheat.validators = draw.choice(validators)
            found = cheat.audit(STAGE, step)
            audits += 1
            accused += found.finding == "fraudulent"
            if found.finding != "honest" and not seen_at:
                seen_at, seen_after, moved_when_seen = step + 1, audits, _moved(cheat, honest, step + 1)
    matrix = honest.stages[STAGE].parameters[last_matrix(honest.stages[STAGE])]
    moved = _moved(cheat, honest, num_steps)
    of_matrix = float(_apart(cheat, honest).norm() / matrix.detach().norm())
    return Drifted(share, num_steps, audits, accused, seen_at, seen_after, moved_when_seen, moved, of_matrix)


def _apart(cheat: Job, honest: Job) -> Tensor:
    ours, theirs = (job.stages[STAGE].parameters[last_matrix(job.stages[STAGE])].detach() for job in (cheat, honest))
    return (ours - theirs)[USED]


def _moved(cheat: Job, honest: Job, steps: int) -> float:
    return float(_apart(cheat, honest).abs().mean()) / (LEARNING_RATE * steps)


def shares() -> Iterator[float]:
    """Of the tolerance."""
    yield from (0.9, 0.5, 0.2, 0.1, 0.05, 0.01)


def of_updates(num_steps: int) -> float:
    """What the tolerance of updates (units in the last place of the largest term, each step) can come to, as a share of
    that term: nothing adds these up."""
    return num_steps * MAX_ULP * torch.finfo(torch.float32).eps
