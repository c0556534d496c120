"""A worker that drifts below the tolerance, always the same way: how far it comes before audits see it.

It adds a share of the tolerance where the true gradient is little or nothing, so that Adam makes much of it. Three
validators draw and audit as the job's rates say, each with what it has added up itself; a twin that is honest trains
beside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from audit.models import USED
from audit.rig import Job, Validators
from tensorlink.audit.compare import FLOORS, MAX_ULP, NUM_SIGMA
from tensorlink.demo import cheats
from tensorlink.network import DEFAULT_AUDIT_TERMS
from tensorlink.pipeline.stage import Stage

STAGE = 1
LEARNING_RATE = 1e-2


class _Drift(cheats.BentWeightGradients):
    share: float
    tensor: str

    def bend_one(self, name: str, g: Tensor) -> Tensor:
        return self.moved(g) if name == self.tensor else g

    def moved(self, g: Tensor) -> Tensor:
        raise NotImplementedError


class RowDrift(_Drift):
    """`share` of the tolerance on one row of a matrix, that of a token which no target names, in one direction."""

    def moved(self, g: Tensor) -> Tensor:
        g = g.clone()
        g[USED] += self.share * FLOORS[g.dtype] * g.norm() / g.shape[1] ** 0.5
        return g


class NoiseDrift(_Drift):
    """`share` of the tolerance on a tensor whose gradient is nothing but rounding: its spread is its own size."""

    def moved(self, g: Tensor) -> Tensor:
        return g + self.share * NUM_SIGMA * 0.5 * g.norm() / g.numel() ** 0.5


#: Model, kind and tensor by what it is.
CASES = {
    "quiet row": ("gpt", RowDrift, "2.weight"),
    "bias before BatchNorm": ("mlp", NoiseDrift, "0.bias"),
}


@dataclass(frozen=True)
class Drifted:
    """What a drift came to. Displacements are against the twin's, the mean over what drifts, as shares of learning rate
    times steps."""

    case: str
    share: float
    steps: int
    audits: int
    accused: int  # by single audits
    seen_at_step: int  # 0: never
    seen_after_audits: int
    moved_when_seen: float
    moved_at_end: float
    of_tensor_at_end: float  # of the tensor's norm


def run(case: str, share: float, num_steps: int, seed: int = 0) -> Drifted:
    """One job, audited at the default rates by three honest validators."""
    model, kind, tensor = CASES[case]
    drifting = type("Drifting", (kind,), {"share": share, "tensor": tensor})
    validators = [Validators() for _ in range(3)]
    options = {"lr": LEARNING_RATE, "weight_decay": 0.0}
    cheat, honest = (
        Job(model, seed, validators[0], cheats.classes(one, 2, [STAGE]), options=options, window_steps=1)
        for one in (drifting, Stage)
    )

    def apart() -> Tensor:
        ours, theirs = (job.stages[STAGE].parameters[tensor].detach() for job in (cheat, honest))
        return (ours - theirs)[USED] if kind is RowDrift else ours - theirs

    def moved(steps: int) -> float:
        return float(apart().abs().mean()) / (LEARNING_RATE * steps)

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
                seen_at, seen_after, moved_when_seen = step + 1, audits, moved(step + 1)
    of_tensor = float(apart().norm() / honest.stages[STAGE].parameters[tensor].detach().norm())
    return Drifted(
        case, share, num_steps, audits, accused, seen_at, seen_after, moved_when_seen, moved(num_steps), of_tensor
    )


def shares() -> Iterator[float]:
    """Of the tolerance."""
    yield from (0.9, 0.5, 0.2, 0.1, 0.05, 0.01)


def of_updates(num_steps: int) -> float:
    """What the tolerance of updates (units in the last place of the largest term, each step) can come to, as a share of
    that term: nothing adds these up."""
    return num_steps * MAX_ULP * torch.finfo(torch.float32).eps
