"""Stages that cheat, for the demo and for tests: `python -m tensorlink.demo.cheats NAME` is a computing process whose
stages do as the name in `CHEATS` says. No other part of the product knows of it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tensorlink.pipeline.backward import ForwardPass, GradientSum
from tensorlink.pipeline.stage import Stage
from tensorlink.steplog.log import StepRecord


class ScaledInputGradient(Stage):
    """Sends back 0.99 of the gradient."""

    def _compute_backward(self, passed: Any, gradients: Any, retain: bool, into: GradientSum) -> dict[int, Tensor]:
        of_inputs = super()._compute_backward(passed, gradients, retain, into)
        return {slot: tensor * 0.99 for slot, tensor in of_inputs.items()}


class SkippedWeightGradient(Stage):
    """Right activation gradients, and weight gradients of the first micro-batch only."""

    def _compute_backward(self, passed: Any, gradients: Any, retain: bool, into: GradientSum) -> dict[int, Tensor]:
        found = GradientSum()
        of_inputs = super()._compute_backward(passed, gradients, retain, found)
        self._add_first(found, into)
        return of_inputs

    def _compute_weight_gradients(self, deferred: Any, into: GradientSum) -> None:
        found = GradientSum()
        super()._compute_weight_gradients(deferred, found)
        self._add_first(found, into)

    def _add_first(self, found: GradientSum, into: GradientSum) -> None:
        into.add({name: gradient for name, gradient in found.take().items() if name not in into.sums()})


class Noise(Stage):
    """Weight gradients with one per cent of noise."""

    def _compute_backward(self, passed: Any, gradients: Any, retain: bool, into: GradientSum) -> dict[int, Tensor]:
        exact = GradientSum()
        of_inputs = super()._compute_backward(passed, gradients, retain, exact)
        generator = torch.Generator().manual_seed(self.num_units)
        for name, g in exact.take().items():
            noise = torch.randn(g.shape, generator=generator)
            into.add({name: g + 0.01 * g.norm() / g.numel() ** 0.5 * noise})
        return of_inputs


class AlteredLearningRate(Stage):
    """Steps with one per cent more than was ordered."""

    def _update(self, record: StepRecord, options: Any) -> None:
        options = [{**group, "lr": (float.fromhex(group["lr"]) * 1.01).hex()} for group in options]
        super()._update(record, options)


class StaleWeights(Stage):
    """Never updates, and commits to what it holds."""

    def _update(self, record: StepRecord, options: Any) -> None:
        assert self.optimizer is not None
        self.optimizer.step(
            {name: g * 0 for name, g in record.gradient.items()}, [{**o, "lr": "0x0p+0"} for o in options]
        )


class LowPrecision(Stage):
    """Computes forwards with weights rounded to bfloat16."""

    def _compute_forward(self, call: Any, micro_batch: int, inputs: Any, targets: Any) -> ForwardPass:
        kept = {name: parameter.data for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.bfloat16().float()
        try:
            return super()._compute_forward(call, micro_batch, inputs, targets)
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = kept[name]


CHEATS = {
    "scaled-gx": ScaledInputGradient,
    "skipped-weight-gradient": SkippedWeightGradient,
    "noise": Noise,
    "altered-learning-rate": AlteredLearningRate,
    "stale-weights": StaleWeights,
    "low-precision": LowPrecision,
}


def main() -> None:
    """The computing process; its first argument names the cheat."""
    from tensorlink import compute
    from tensorlink.compute_stages import Stages

    class CheatingStages(Stages):
        make_stage = CHEATS[sys.argv[1]]

    compute.main(CheatingStages)


if __name__ == "__main__":
    main()
