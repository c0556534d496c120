"""The attacks by name: who cheats in which model, which audit looks, and how many audits find it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from audit.baselines import Pairs, continuous, iota_accepts
from audit.rig import WHOLE_STEP, Audit, Job, Validators
from smartnodes_core.errors import PeerFault
from tensorlink.audit.odds import Attack as Odd
from tensorlink.demo import cheats
from tensorlink.demo.cheats import BentInputGradients, BentWeightGradients, bent
from tensorlink.pipeline.stage import Stage

MODELS = ("mlp", "gpt")
#: Audited steps of one job: then another begins, with other weights.
STEPS = 8


@dataclass(frozen=True)
class Attack:
    """`tier` is the one that sees it alone (1: any unit, 2: the whole step); `odds` its name in `audit-math`. `first`
    is the first step that is audited, `stages` those of which one cheats."""

    cheat: type[Stage]
    tier: int
    odds: Odd
    models: tuple[str, ...] = MODELS
    first: int = 0
    stages: tuple[int, ...] = (0, 1)
    options: Mapping[str, Any] = field(default_factory=dict)
    audit: Callable[[Job, int, int, int], Audit] = Job.audit


def _opened_other(job: Job, index: int, step: int, unit: int) -> Audit:
    """One bit of what is opened is not what it was."""
    commitment, challenge = job.challenge(index, step, unit)
    body, items, earlier = job.opened(index, step, challenge)
    order = job.orders[index][step][1]
    at = (step * 7919 + index * 104729) % items[0].num_bytes
    body[at] ^= 1 << (step % 8)
    signed = job.signed_opening(challenge, items, body, order)
    return job.finding(*job.received(index, commitment, challenge, signed, order, earlier, body))


def _committed_after(job: Job, index: int, step: int, unit: int) -> Audit:
    """Once it sees the challenge, it computes the unit as it should and opens that, under a commitment made now."""
    commitment, challenge = job.challenge(index, step, unit)
    honest = Job(job.name, job.seed, job.validators, num_rows=job.num_rows, whole=unit == WHOLE_STEP)
    for _ in range(step + 1):
        honest.step()
    body, items, _ = honest.opened(index, step, challenge)
    order = job.orders[index][step][1]
    earlier = [job.worker.sign(one).encode() for one in job.committed[index][max(0, step - 1) : step]]
    signed = job.signed_opening(challenge, items, body, order)
    return job.finding(*job.received(index, commitment, challenge, signed, order, earlier, body))


_GX: dict[str, Any] = {"tier": 1, "odds": "wrong-output", "stages": (1,)}
_GW: dict[str, Any] = {"tier": 2, "odds": "wrong-gradient"}
_Y: dict[str, Any] = {"tier": 1, "odds": "wrong-output"}
_UPDATE: dict[str, Any] = {"tier": 2, "odds": "wrong-update"}
_BENT = {
    "zero": cheats.zero, "random": cheats.random, "sign-flipped": cheats.flipped, "x0.99": cheats.scaled(0.99),
    "x1.01": cheats.scaled(1.01), "1 % noise": cheats.noisy,
}  # fmt: skip

ATTACKS: dict[str, Attack] = {
    "none (honest)": Attack(Stage, **_GW),
    **{f"{name} input gradient": Attack(bent(BentInputGradients, how), **_GX) for name, how in _BENT.items()},
    **{f"{name} weight gradient": Attack(bent(BentWeightGradients, how), **_GW) for name, how in _BENT.items()},
    "gradient for an unused row": Attack(cheats.UnusedRow, **_GW, models=("gpt",), stages=(0,)),
    "stale input gradient": Attack(cheats.StaleInputGradients, **_GX, first=1),
    "stale weight gradient": Attack(cheats.StaleWeightGradients, **_GW, first=1),
    "stale weights in both passes": Attack(cheats.StaleWeights, **_Y, first=1),
    "weights never updated": Attack(cheats.NoUpdate, **_UPDATE),
    "skipped weight gradient": Attack(cheats.SkippedWeightGradients, **_GW),
    "fewer micro-batches": Attack(cheats.FewerMicroBatches, **_GW),
    "dropped samples": Attack(cheats.DroppedSamples, **_Y),
    "dropped tokens": Attack(cheats.DroppedTokens, tier=2, odds="wrong-gradient", models=("gpt",), stages=(0,)),
    "skipped layer": Attack(cheats.SkippedLayer, **_Y),
    "float16 weights": Attack(cheats.Float16Weights, **_Y),
    "bfloat16 weights": Attack(cheats.BFloat16Weights, **_Y),
    "int8 weights": Attack(cheats.Int8Weights, **_Y),
    "rank-1 edit of 1e-3": Attack(cheats.RankOneEdit, **_Y),
    "wrong data": Attack(cheats.WrongData, **_Y),
    "learning rate x1.01": Attack(cheats.LearningRate, **_UPDATE),
    "no weight decay": Attack(cheats.WeightDecay, **_UPDATE),
    "other betas": Attack(cheats.Betas, **_UPDATE, first=1),
    "skipped clipping": Attack(cheats.SkippedClipping, **_UPDATE, options={"clip_norm": 0.1}),
    "tampered optimizer state": Attack(cheats.OptimizerState, **_UPDATE),
    "tampered buffers": Attack(cheats.Buffers, tier=2, odds="wrong-gradient", models=("mlp", "conv")),
    "weights tampered between steps": Attack(cheats.BetweenSteps, tier=1, odds="changed-state", first=1),
    "poison after an honest past": Attack(cheats.Poison, **_UPDATE, first=12),
    "opens other data": Attack(Stage, tier=1, odds="wrong-output", audit=_opened_other),
    "commits after the challenge": Attack(
        bent(BentWeightGradients, cheats.scaled(0.99)), tier=2, odds="wrong-gradient", audit=_committed_after
    ),
}  # fmt: skip


@dataclass
class Count:
    """What audits of one attack came to, and how many of them two other rules would have accepted. `examples` holds the
    first reasons of those that were not found, `seen` the words of the last that was."""

    caught: int = 0
    missed: int = 0
    iota_let_through: int = 0
    iota_asked: int = 0
    continuity_let_through: int = 0
    continuity_asked: int = 0
    bytes_opened: int = 0
    cpu_s: float = 0.0
    examples: list[str] = field(default_factory=list)
    seen: str = ""


class Trial(NamedTuple):
    """One bent unit that was audited."""

    job: Job
    index: int
    step: int
    audit: Audit


def trials(
    attack: Attack, validators: Validators, first_seed: int, dtype: str, steps: int, others: Sequence[str] = ()
) -> Iterator[Trial]:
    """Audits of bent units, without end: each of another step or micro-batch; one stage of a job cheats."""
    for seed in itertools.count(first_seed):
        for name, index in itertools.product(others or attack.models, attack.stages):
            job = Job(
                name + dtype, seed, validators, cheats.classes(attack.cheat, 2, [index]), whole=attack.tier == 2,
                **attack.options,
            )  # fmt: skip
            units = range(job.num_micro_batches) if attack.tier == 1 else [WHOLE_STEP]
            for step in range(attack.first + steps):
                job.step()
                if step < attack.first:
                    continue
                for unit in units:
                    try:
                        audit = attack.audit(job, index, step, unit)
                    except PeerFault as fault:
                        audit = Audit("fraudulent", f"not opened: {fault}", 0)
                    yield Trial(job, index, step, audit)


def count(
    name: str,
    num_trials: int,
    validators: Validators,
    first_seed: int = 0,
    dtype: str = "",
    steps: int = STEPS,
    models: Sequence[str] = (),
) -> Count:
    """Audits of one attack."""
    found, began, pairs = Count(), time.process_time(), Pairs()
    with pairs.recorded():
        for trial in itertools.islice(trials(ATTACKS[name], validators, first_seed, dtype, steps, models), num_trials):
            finding, reason, num_bytes = trial.audit
            if finding == "fraudulent":
                found.caught, found.seen = found.caught + 1, reason[:120]
            else:
                found.missed += 1
                found.examples = [*found.examples, f"{trial.job.name}: {reason[:120]}"][:3]
            found.bytes_opened += num_bytes
            compared = pairs.take()
            if compared:
                found.iota_asked += 1
                found.iota_let_through += iota_accepts(compared)
            gradients = [trial.job.gradient(trial.index, step) for step in (trial.step - 1, trial.step)]
            if all(gradients):
                found.continuity_asked += 1
                found.continuity_let_through += continuous(*gradients)
    found.cpu_s = time.process_time() - began
    return found
