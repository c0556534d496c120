"""What a job has come to, as plain data: for `DistributedModel.report()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorlink.placement import Placement


def report(placement: Placement, num_steps: int) -> dict[str, Any]:
    """`job`, `num_steps`, `set_up_s`, `predicted_step_s`, `profile_measured` (whether the model was run for it, as one
    on the meta device cannot be), `work_units` (FLOPs committed to), `audits`, `num_spares`,
    and per stage its worker, endpoint, parameters, predicted and busy seconds, work, audits and reputation on chain.
    """
    stages = [_stage(placement, stage) for stage in range(len(placement.programs))]
    return {
        "job": placement.job.id.hex(),
        "num_steps": num_steps,
        "num_stages": len(stages),
        "set_up_s": placement.set_up_s,
        "predicted_step_s": placement.table.step_s,
        "profile_measured": placement.profile_measured,
        "work_units": _total(stages, "work_units"),
        "audits": placement.driver.tally.findings(),
        "stages": stages,
        "num_spares": len(placement.table.spares),
    }


def _stage(placement: Placement, stage: int) -> dict[str, Any]:
    placed, tally = placement.table.stages[stage], placement.driver.tally
    worker = placed.worker.node_key
    return {
        "stage": stage,
        "worker": worker.hex(),
        "endpoint": placed.worker.endpoints[0],
        "parameters": list(placement.programs[stage].parameters),
        "predicted_micro_batch_s": placed.micro_batch_s,
        "memory_bytes": placed.need.memory_bytes,
        "work_units": tally.work_units(stage),
        "busy_s": tally.busy_s(stage),
        **{f"audits_{name}": count for name, count in tally.findings(worker).items()},
        "reputation": placement.network.reputation_of(worker),
    }


def _total(stages: Sequence[dict[str, Any]], name: str) -> int:
    return sum(stage[name] for stage in stages)
