"""A computing process whose stages cheat as argv[1] says; the product has no such thing. `CHEATS` serves tests in one
process too."""

from __future__ import annotations

import sys

import torch

from tensorlink.pipeline.backward import GradientSum
from tensorlink.pipeline.stage import Stage


class ScaledInputGradient(Stage):
    """Sends back 0.99 of the gradient."""

    def _compute_backward(self, passed, gradients, retain, into):
        of_inputs = super()._compute_backward(passed, gradients, retain, into)
        return {slot: tensor * 0.99 for slot, tensor in of_inputs.items()}


class SkippedWeightGradient(Stage):
    """Right activation gradients, and weight gradients of the first micro-batch only."""

    def _compute_backward(self, passed, gradients, retain, into):
        found = GradientSum()
        of_inputs = super()._compute_backward(passed, gradients, retain, found)
        self._add_first(found, into)
        return of_inputs

    def _compute_weight_gradients(self, deferred, into):
        found = GradientSum()
        super()._compute_weight_gradients(deferred, found)
        self._add_first(found, into)

    def _add_first(self, found, into):
        into.add({name: gradient for name, gradient in found.take().items() if name not in into.sums()})


class Noise(Stage):
    """Weight gradients with one per cent of noise."""

    def _compute_backward(self, passed, gradients, retain, into):
        exact = GradientSum()
        of_inputs = super()._compute_backward(passed, gradients, retain, exact)
        generator = torch.Generator().manual_seed(self.num_units)
        for name, g in exact.take().items():
            noise = torch.randn(g.shape, generator=generator)
            into.add({name: g + 0.01 * g.norm() / g.numel() ** 0.5 * noise})
        return of_inputs


class AlteredLearningRate(Stage):
    """Steps with one per cent more than was ordered."""

    def _update(self, record, options):
        options = [{**group, "lr": (float.fromhex(group["lr"]) * 1.01).hex()} for group in options]
        super()._update(record, options)


class StaleWeights(Stage):
    """Never updates, and commits to what it holds."""

    def _update(self, record, options):
        self.optimizer.step(
            {name: g * 0 for name, g in record.gradient.items()}, [{**o, "lr": "0x0p+0"} for o in options]
        )


class LowPrecision(Stage):
    """Computes forwards with weights rounded to bfloat16."""

    def _compute_forward(self, call, micro_batch, inputs, targets):
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


def _make_stages(channel):
    from tensorlink.compute_stages import Stages

    class CheatingStages(Stages):
        make_stage = CHEATS[sys.argv[1]]

    return CheatingStages(channel)


if __name__ == "__main__":
    from tensorlink.compute import main

    main(_make_stages)
