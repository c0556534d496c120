"""What a job has come to, as plain data: for `DistributedModel.report()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorlink.placement import Placement


def report(placement: Placement, num_steps: int) -> dict[str, Any]:
    """`job`, `num_steps`, `set_up_s`, `plan` (a table in text), `schedule`, `predicted_step_s` beside `step_s` (the
    median of `train_step`, with what the user's side adds; None before the first), `work_units` (FLOPs committed to),
    `audits`, `num_spares`, `private_parameters` (those that stay with the user), `profile_measured` (whether the
    model was run for the plan, as one on the meta device cannot be), and per stage its worker, endpoint, parameters,
    predicted and real busy seconds, bytes of memory by use, work, audits and reputation on chain.
    """
    stages = [_stage(placement, stage, num_steps) for stage in range(len(placement.programs))]
    return {
        "job": placement.job.id.hex(),
        "num_steps": num_steps,
        "num_stages": len(stages),
        "set_up_s": placement.set_up_s,
        "plan": placement.table.table(),
        "schedule": placement.table.schedule.name,
        "predicted_step_s": placement.table.step_s,
        "step_s": placement.driver.tally.step_s,
        "profile_measured": placement.profile_measured,
        "work_units": _total(stages, "work_units"),
        "audits": placement.driver.tally.findings(),
        "contradictions": placement.driver.contradictions.found(),
        "private_parameters": list(placement.private.parameters),
        "stages": stages,
        "num_spares": len(placement.table.spares),
    }


def _stage(placement: Placement, stage: int, num_steps: int) -> dict[str, Any]:
    placed, tally = placement.table.stages[stage], placement.driver.tally
    worker, training = placed.worker.node_key, placement.training
    memory = placed.need.memory(placed.held, training)  # with the optimizer that there is by now
    return {
        "stage": stage,
        "worker": worker.hex(),
        "endpoint": placed.worker.endpoints[0],
        "parameters": list(placement.programs[stage].parameters),
        "predicted_micro_batch_s": placed.micro_batch_s,
        "predicted_busy_s": placed.micro_batch_s * training.num_micro_batches * num_steps,
        "memory_bytes": memory.total,
        "memory": asdict(memory),
        "work_units": tally.work_units(stage),
        "busy_s": tally.busy_s(stage),
        **{f"audits_{name}": count for name, count in tally.findings(worker).items()},
        "reputation": placement.network.reputation_of(worker),
    }


def _total(stages: Sequence[dict[str, Any]], name: str) -> int:
    return sum(stage[name] for stage in stages)
