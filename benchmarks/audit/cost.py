"""What audits cost on the yardstick's stages: CPU time of auditors beside workers', bytes opened, memory kept."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from yardstick.model import Sizes, cut, make_model

from audit import models
from audit.rig import WHOLE_STEP, Job, Validators
from tensorlink.network import DEFAULT_AUDIT_TERMS
from tensorlink.stage_papers import STATE_INTERVAL_STEPS
from tensorlink.steplog.log import StepRecord

NUM_MICRO_BATCHES = 8
STAGE = 0


@dataclass(frozen=True)
class Cost:
    """Of one stage. Seconds of CPU, bytes; audits where all bits are equal, and where none are and noise is measured.
    Means over the steps of an interval."""

    worker_step_s: float
    unit_equal_s: float
    step_equal_s: float
    unit_unequal_s: float
    step_unequal_s: float
    unit_bytes: int
    step_bytes: int
    kept_per_step: int
    kept_per_interval: int

    def share(self, equal: bool) -> float:
        """Auditors' compute as a share of the workers', at the default rates."""
        unit_rate, step_rate = (DEFAULT_AUDIT_TERMS.unit_rate_ppm / 1e6, DEFAULT_AUDIT_TERMS.step_rate_ppm / 1e6)
        unit, step = (self.unit_equal_s, self.step_equal_s) if equal else (self.unit_unequal_s, self.step_unequal_s)
        return (step_rate * step + (1 - step_rate) * unit_rate * NUM_MICRO_BATCHES * unit) / self.worker_step_s

    def bytes_per_step(self) -> float:
        """Opened per stage and step in the mean, at the default rates."""
        unit_rate, step_rate = (DEFAULT_AUDIT_TERMS.unit_rate_ppm / 1e6, DEFAULT_AUDIT_TERMS.step_rate_ppm / 1e6)
        return step_rate * self.step_bytes + (1 - step_rate) * unit_rate * NUM_MICRO_BATCHES * self.unit_bytes

    def kept(self) -> int:
        """What a window of steps takes, in memory or, where that is short, on disk."""
        steps = DEFAULT_AUDIT_TERMS.window_steps
        return steps * self.kept_per_step + (steps // STATE_INTERVAL_STEPS + 1) * self.kept_per_interval


def measure(sizes: Sizes) -> Cost:
    """One interval of steps, each audited as a whole and in one unit, with equal bits and without."""
    models.MAKE["yardstick"] = lambda: list(cut(make_model(sizes), 2))
    models.TOKENS["yardstick"] = sizes.context
    validators = Validators()
    equal, worker_s, kept = _audited(validators, sizes, onednn=True)
    unequal, _, _ = _audited(validators, sizes, onednn=False)
    return Cost(
        worker_s, equal[0], equal[1], unequal[0], unequal[1], int(equal[2]), int(equal[3]), *kept
    )  # fmt: skip


def _audited(
    validators: Validators, sizes: Sizes, onednn: bool
) -> tuple[tuple[float, float, float, float], float, tuple[int, int]]:
    """Seconds of a unit and of a step, bytes of both; seconds of a worker's step; bytes kept per step and interval."""
    found = []
    kept = (0, 0)
    for whole in (False, True):
        job = Job(
            "yardstick", 0, validators, whole=whole, num_micro_batches=NUM_MICRO_BATCHES, num_rows=sizes.batch,
            interval_steps=STATE_INTERVAL_STEPS, window_steps=2 * STATE_INTERVAL_STEPS,
        )  # fmt: skip
        seconds, num_bytes, worker_s = [], [], []
        for step in range(STATE_INTERVAL_STEPS):
            began = time.process_time()
            with torch.backends.mkldnn.flags(enabled=onednn):
                job.step()
            worker_s.append((time.process_time() - began) / len(job.stages))
            if 0 < step < STATE_INTERVAL_STEPS - 1:
                continue  # what an audit costs rises evenly from the first to the last
            case, body = job.case(STAGE, step, WHOLE_STEP if whole else step)
            began = time.process_time()
            audit = job.finding(case, body)
            seconds.append(time.process_time() - began)
            num_bytes.append(audit.num_bytes)
            if audit.finding != "honest":
                raise RuntimeError(f"found {audit.finding}: {audit.reason}, needed an honest audit")
        found.append((_mean(seconds), _mean(num_bytes)))
        kept = _kept(job.stages[STAGE].log.interval(STATE_INTERVAL_STEPS - 1))
    (unit_s, unit_bytes), (step_s, step_bytes) = found
    return (unit_s, step_s, unit_bytes, step_bytes), min(worker_s), kept


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _kept(interval: list[StepRecord]) -> tuple[int, int]:
    """Bytes of a step (what crossed links, outputs, the gradient), and of the state that an interval begins with."""
    last = interval[-1]
    tensors: list[Tensor] = list(last.gradient.values())
    for unit in last.units:
        forward = unit.forward
        for group in (forward.x, forward.y, forward.target, unit.gy, unit.gx):
            tensors += group.values()
    before = interval[0].before
    return _num_bytes(tensors), 0 if before is None else before.num_bytes


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
