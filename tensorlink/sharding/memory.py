"""What a stage takes of a rig's memory, item by item, from the traced graph and the terms of the job.

The largest item is what is kept for audits: a worker holds, for every step of the audit window, the weights and the
optimizer's state before it, its gradient, and what crossed at both ends (`steplog/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from tensorlink.stage_optimizer import ALLOWED


@dataclass(frozen=True)
class Memory:
    """Bytes by use."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept_for_audits: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __str__(self) -> str:
        parts = [f"{field.name.replace('_', ' ')} {getattr(self, field.name) / 1e6:.1f}" for field in fields(self)]
        return f"{self.total / 1e6:.1f} MB ({' + '.join(parts)})"


@dataclass(frozen=True)
class Training:
    """What memory depends on besides the stage. `optimizer_copies` is the optimizer's state per byte of parameters."""

    num_micro_batches: int
    window_steps: int
    optimizer_copies: float = 2.0


@dataclass(frozen=True)
class StageNeed:
    """What one stage costs. Seconds of a micro-batch are those of the machine that profiled the model.

    `weight_bytes` are parameters, buffers and constants, `parameter_bytes` the parameters alone. `saved_bytes` are
    held per micro-batch between forward and backward, `workspace_bytes` once. `crossing_bytes` go to the next stage
    per micro-batch, `logged_bytes` are all that crosses at both ends and both ways.
    """

    forward_s: float
    backward_s: float
    flops: int
    weight_bytes: int
    parameter_bytes: int
    trainable_bytes: int
    saved_bytes: int
    workspace_bytes: int
    crossing_bytes: int
    logged_bytes: int

    def memory(self, held: int, training: Training) -> Memory:
        """The memory of this stage where `held` micro-batches are between their forward and backward at most."""
        state = round(training.optimizer_copies * self.trainable_bytes)
        logged = self.logged_bytes * training.num_micro_batches
        step = self.parameter_bytes + state + self.trainable_bytes + logged
        return Memory(
            weights=self.weight_bytes,
            gradients=self.trainable_bytes,  # their sum: what is added to it is added parameter by parameter
            optimizer=state,
            kept_for_audits=training.window_steps * step + logged,  # those of the window, and what the open one logs
            activations=self.saved_bytes * held + self.workspace_bytes,
        )


def optimizer_copies(name: str, options: Mapping[str, Any]) -> float:
    """How many bytes of state an optimizer of `stage_optimizer.ALLOWED` keeps per byte of parameters, found by
    trying."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))  # a matrix: some take nothing else, some keep less for it
    parameter.grad = torch.zeros_like(parameter)
    optimizer = ALLOWED[name]([parameter])  # type: ignore[call-arg]
    optimizer.param_groups[0].update({**options, "foreach": False, "fused": False, "capturable": False})
    optimizer.step()
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() for tensor in tensors if tensor.numel() > 1) / parameter.numel()
