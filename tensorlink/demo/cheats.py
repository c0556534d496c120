"""Stages that cheat: every attack on the computation that a release is measured against, one class each.

Each bends one thing and commits to what it then holds, so that hashes agree and only executing again shows it. They
serve the demo, benchmarks and tests; `python -m tensorlink.demo.cheats NAME [HONEST_STEPS]` is a computing process
whose stages cheat so, after as many honest steps. No other part of the product knows of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tensorlink.pipeline.backward import GradientSum
from tensorlink.pipeline.stage import Stage

Bend = Callable[[Tensor, torch.Generator], Tensor]


def zero(g: Tensor, draw: torch.Generator) -> Tensor:
    return torch.zeros_like(g)


def random(g: Tensor, draw: torch.Generator) -> Tensor:
    """Of the right size and of no use."""
    noise = torch.randn(g.shape, generator=draw)
    return (noise * g.float().norm() / max(float(noise.norm()), 1e-30)).to(g.dtype)


def flipped(g: Tensor, draw: torch.Generator) -> Tensor:
    return -g


def scaled(factor: float) -> Bend:
    return lambda g, draw: g * factor


def noisy(g: Tensor, draw: torch.Generator) -> Tensor:
    """One per cent of noise."""
    return g + 0.01 * random(g, draw)


class Cheat(Stage):
    """`honest_steps`: how long it does what it should."""

    honest_steps = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draw = torch.Generator().manual_seed(11)

    @property
    def cheats(self) -> bool:
        return self.step >= self.honest_steps


class BentInputGradients(Cheat):
    """Sends back and commits to something else than the gradient of its inputs."""

    bend: Bend

    def _compute_backward(self, passed, gradients, retain, into):  # type: ignore[no-untyped-def]
        found = super()._compute_backward(passed, gradients, retain, into)
        return {slot: self.bend_one(slot, g) for slot, g in found.items()} if self.cheats else found

    def bend_one(self, slot: int, g: Tensor) -> Tensor:
        return type(self).bend(g, self.draw)


class StaleInputGradients(BentInputGradients):
    """Sends back those of the micro-batch before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: dict[int, Tensor] = {}

    def bend_one(self, slot: int, g: Tensor) -> Tensor:
        last, self._last[slot] = self._last.get(slot), g
        return g if last is None or last.shape != g.shape else last


class BentWeightGradients(Cheat):
    """Right activation gradients; something else in the gradient that the update uses. No neighbour can see it."""

    bend: Bend

    def commit(self, step, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.cheats:
            honest = self.gradients.take()
            self.gradients.add({name: self.bend_one(name, g) for name, g in honest.items()})
        return super().commit(step, *args, **kwargs)

    def bend_one(self, name: str, g: Tensor) -> Tensor:
        return type(self).bend(g, self.draw)


class UnusedRow(BentWeightGradients):
    """A millionth of the gradient's norm on a row of the embedding that no token names: to Adam a full step."""

    def bend_one(self, name: str, g: Tensor) -> Tensor:
        if name != next(iter(self.parameters)):
            return g
        moved = g.clone()
        moved[-1, 0] += 1e-6 * g.norm()
        return moved


class StaleWeightGradients(BentWeightGradients):
    """Of the step before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: dict[str, Tensor] = {}

    def bend_one(self, name: str, g: Tensor) -> Tensor:
        last, self._last[name] = self._last.get(name, g), g
        return last


class SkippedWeightGradients(Cheat):
    """Computes weight gradients for the first micro-batch only: a third of the work of the others is saved."""

    def _compute_backward(self, passed, gradients, retain, into):  # type: ignore[no-untyped-def]
        if not self.cheats:
            return super()._compute_backward(passed, gradients, retain, into)
        found = GradientSum()
        of_inputs = super()._compute_backward(passed, gradients, retain, found)
        self._add_first(found, into)
        return of_inputs

    def _compute_weight_gradients(self, deferred, into):  # type: ignore[no-untyped-def]
        found = GradientSum()
        super()._compute_weight_gradients(deferred, found)
        self._add_first(found, into) if self.cheats else into.add(found.take())

    def _add_first(self, found: GradientSum, into: GradientSum) -> None:
        into.add({name: g for name, g in found.take().items() if name not in into.sums()})


class FewerMicroBatches(SkippedWeightGradients):
    """Leaves the last micro-batch out of what it commits to as well."""

    def commit(self, step, *args, **kwargs):  # type: ignore[no-untyped-def]
        record = super().commit(step, *args, **kwargs)
        if self.cheats:
            record.units.pop()
            del record.forwards[max(record.forwards)]
        return record


class OtherInputs(Cheat):
    """Computes with inputs of its own choice and commits to those that came."""

    def other(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _compute_forward(self, call, micro_batch, inputs, targets):  # type: ignore[no-untyped-def]
        if self.cheats:
            inputs = [self.other(x) if isinstance(x, Tensor) else x for x in inputs]
        return super()._compute_forward(call, micro_batch, inputs, targets)


class WrongData(OtherInputs):
    """The samples in another order than they came: other data of the same kind."""

    def other(self, x: Tensor) -> Tensor:
        return x.roll(1, 0)


class DroppedSamples(OtherInputs):
    """Computes the first sample of a micro-batch, and takes it for the last one too."""

    def other(self, x: Tensor) -> Tensor:
        return torch.cat([x[:-1], x[:1]])


class DroppedTokens(BentInputGradients):
    """Leaves the last token (or feature) of each sample out of the backward pass."""

    def _compute_backward(self, passed, gradients, retain, into):  # type: ignore[no-untyped-def]
        if self.cheats:
            gradients = {slot: self._cut(g) for slot, g in gradients.items()}
        return Cheat._compute_backward(self, passed, gradients, retain, into)

    @staticmethod
    def _cut(g: Tensor) -> Tensor:
        if g.dim() < 2:
            return g
        g = g.clone()
        g[:, -1] = 0
        return g


class OtherWeights(Cheat):
    """Computes both passes with other weights than it commits to."""

    def weight(self, name: str, w: Tensor) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def _others(self):  # type: ignore[no-untyped-def]
        kept = {name: parameter.data for name, parameter in self.parameters.items()}
        if self.cheats:
            for name, parameter in self.parameters.items():
                parameter.data = self.weight(name, parameter.data)
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = kept[name]

    def _compute_forward(self, call, micro_batch, inputs, targets):  # type: ignore[no-untyped-def]
        with self._others():
            return super()._compute_forward(call, micro_batch, inputs, targets)

    def _compute_backward(self, passed, gradients, retain, into):  # type: ignore[no-untyped-def]
        with self._others():
            return super()._compute_backward(passed, gradients, retain, into)


class StaleWeights(OtherWeights):
    """Computes with the weights of the step before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last: dict[str, Tensor] = {}

    def weight(self, name: str, w: Tensor) -> Tensor:
        return self._last.get(name, w)

    def _update(self, record, options):  # type: ignore[no-untyped-def]
        self._last = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        super()._update(record, options)


class Float16Weights(OtherWeights):
    def weight(self, name: str, w: Tensor) -> Tensor:
        return w.half().to(w.dtype)


class BFloat16Weights(OtherWeights):
    def weight(self, name: str, w: Tensor) -> Tensor:
        return w.bfloat16().to(w.dtype)


class Int8Weights(OtherWeights):
    """Symmetric, one scale a tensor."""

    def weight(self, name: str, w: Tensor) -> Tensor:
        scale = w.abs().max().clamp(min=1e-12) / 127
        return ((w / scale).round() * scale).to(w.dtype)


class SkippedLayer(OtherWeights):
    """As if the last matrix of the stage were not there: its output is that of its bias."""

    def weight(self, name: str, w: Tensor) -> Tensor:
        return torch.zeros_like(w) if name == self._matrices()[-1] else w

    def _matrices(self) -> list[str]:
        return [name for name, parameter in self.parameters.items() if parameter.dim() >= 2]


class RankOneEdit(SkippedLayer):
    """A back door's size: one matrix is moved by 1e-3 of its norm, in one direction."""

    def weight(self, name: str, w: Tensor) -> Tensor:
        if name != self._matrices()[-1]:
            return w
        rows = torch.randn(w.shape[0], generator=torch.Generator().manual_seed(1))
        columns = torch.randn(w[0].numel(), generator=torch.Generator().manual_seed(2))
        edit = torch.outer(rows, columns).reshape(w.shape)
        return (w + 1e-3 * float(w.float().norm() / edit.norm()) * edit).to(w.dtype)


class OtherUpdate(Cheat):
    """Steps with other options than were ordered."""

    changes: Mapping[str, Any] = {}

    def _update(self, record, options):  # type: ignore[no-untyped-def]
        changed = [{**group, **{n: f(group.get(n)) for n, f in self.changes.items()}} for group in options]
        super()._update(record, changed if self.cheats else options)


class LearningRate(OtherUpdate):
    changes = {"lr": lambda lr: (float.fromhex(lr) * 1.01).hex()}


class WeightDecay(OtherUpdate):
    changes = {"weight_decay": lambda _: (0.0).hex()}


class Betas(OtherUpdate):
    changes = {"betas": lambda _: [(0.9).hex(), (0.99).hex()]}


class NoUpdate(OtherUpdate):
    changes = {"lr": lambda _: (0.0).hex()}


class SkippedClipping(Cheat):
    """Commits to the ordered coefficient and updates with the gradient as it is."""

    def _update(self, record, options):  # type: ignore[no-untyped-def]
        kept, record.clip_coefficient = record.clip_coefficient, 1.0
        super()._update(record, options)
        record.clip_coefficient = kept


class AfterUpdate(Cheat):
    """Changes something of its state with the update, and commits to what it then is."""

    def tamper(self) -> None:
        raise NotImplementedError

    def _update(self, record, options):  # type: ignore[no-untyped-def]
        super()._update(record, options)
        if self.cheats:
            with torch.no_grad():
                self.tamper()


class OptimizerState(AfterUpdate):
    def tamper(self) -> None:
        for name, tensor in self.optimizer.state_tensors().items():  # type: ignore[union-attr]
            if name.endswith("/exp_avg"):
                tensor.mul_(1.01)


class Poison(AfterUpdate):
    """Moves one row of one matrix by a thousandth of its norm in each step, after a long honest past."""

    honest_steps = 12

    def tamper(self) -> None:
        name = SkippedLayer._matrices(self)[-1]  # type: ignore[arg-type]
        row = self.parameters[name][0]
        row.add_(1e-3 * float(row.float().norm()) / max(row.numel(), 1) ** 0.5)


class Buffers(Cheat):
    """Changes its running statistics in a forward."""

    def _compute_forward(self, call, micro_batch, inputs, targets):  # type: ignore[no-untyped-def]
        passed = super()._compute_forward(call, micro_batch, inputs, targets)
        for name, buffer in self.buffers.items():
            if buffer.is_floating_point():
                self.buffers[name] = buffer * 1.001
        return passed


class BetweenSteps(Cheat):
    """Changes its weights between two steps, and commits to them as those with which the next one begins."""

    def commit(self, step, *args, **kwargs):  # type: ignore[no-untyped-def]
        record = super().commit(step, *args, **kwargs)
        self._changes = True
        return record

    def begin(self, params: dict[str, Any]) -> None:
        if getattr(self, "_changes", False) and self.cheats:
            self._keep_state_after()
            with torch.no_grad():
                for parameter in self.parameters.values():
                    parameter.mul_(1.001)
            self._changes = False
            self.roots_before = None
        super().begin(params)


def bent(kind: type[Cheat], how: Bend) -> type[Cheat]:
    """A cheat of one kind with one function."""
    return type(kind.__name__, (kind,), {"bend": staticmethod(how)})


_BENT: dict[str, Bend] = {
    "zero": zero, "random": random, "sign-flipped": flipped, "x0.99": scaled(0.99), "x1.01": scaled(1.01),
    "noisy": noisy,
}  # fmt: skip
#: The cheats that a rig can be started with, by name.
CHEATS: dict[str, type[Cheat]] = {
    **{f"{name}-input-gradient": bent(BentInputGradients, how) for name, how in _BENT.items()},
    **{f"{name}-weight-gradient": bent(BentWeightGradients, how) for name, how in _BENT.items()},
    "stale-input-gradient": StaleInputGradients,
    "stale-weight-gradient": StaleWeightGradients,
    "stale-weights": StaleWeights,
    "no-update": NoUpdate,
    "skipped-weight-gradient": SkippedWeightGradients,
    "fewer-micro-batches": FewerMicroBatches,
    "dropped-samples": DroppedSamples,
    "dropped-tokens": DroppedTokens,
    "skipped-layer": SkippedLayer,
    "float16-weights": Float16Weights,
    "bfloat16-weights": BFloat16Weights,
    "int8-weights": Int8Weights,
    "rank-one-edit": RankOneEdit,
    "wrong-data": WrongData,
    "learning-rate": LearningRate,
    "no-weight-decay": WeightDecay,
    "other-betas": Betas,
    "skipped-clipping": SkippedClipping,
    "optimizer-state": OptimizerState,
    "buffers": Buffers,
    "between-steps": BetweenSteps,
    "poison": Poison,
}


def classes(cheat: type[Stage], num_stages: int, at: Sequence[int]) -> list[type[Stage]]:
    """Cheats in the stages `at`, honest ones elsewhere."""
    return [cheat if index in at else Stage for index in range(num_stages)]


def main() -> None:
    """The computing process."""
    from tensorlink import compute
    from tensorlink.compute_stages import Stages

    name, *honest_steps = sys.argv[1:]
    cheat = CHEATS[name]
    if honest_steps:
        cheat = type(cheat.__name__, (cheat,), {"honest_steps": int(honest_steps[0])})

    class CheatingStages(Stages):
        make_stage = cheat

    compute.main(CheatingStages)


if __name__ == "__main__":
    main()
