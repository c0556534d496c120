"""Executes a unit or a step again from its log: what an auditor does with opened data, and a replacement with a
neighbour's log.

Computed as the stage computed it (`pipeline/backward.py`, `pipeline/seeds.py`); a `Variant` computes the same with
other kernels or precision, which is how an auditor learns how much honest results differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensorlink.errors import TensorError
from tensorlink.pipeline.backward import GradientSum, Value, backward, forward
from tensorlink.program.admission import Admission, Bounds
from tensorlink.program.graph import LossProgram, StageProgram
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.loss import constants_of
from tensorlink.steplog.digests import slots


@dataclass(frozen=True)
class Variant:
    """How to compute: `num_threads` 0 leaves them; `exact` computes in float64."""

    name: str
    num_threads: int = 0
    onednn: bool = True
    exact: bool = False


NATIVE = Variant("native")


@dataclass(frozen=True)
class UnitInputs:
    """What a unit starts from. `loss_weight` is None where no loss program ended it; `backward` is False for a
    forward alone."""

    x: Mapping[str, Tensor]
    gy: Mapping[str, Tensor]
    target: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    training: bool
    loss_weight: float | None
    backward: bool
    seeds: Callable[[int], int]


@dataclass
class UnitResult:
    """What a unit gives; groups by slot index as text. `random` where dropout drew masks."""

    y: dict[str, Tensor]
    gx: dict[str, Tensor]
    loss: dict[str, Tensor]
    gradient: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: bool


@dataclass
class Replayer:
    """A stage program over fixed weights. Parameters are copied only where a variant needs another dtype. `bounds` are
    what a unit may cost here; in float64 it may cost twice that."""

    program: StageProgram
    loss: LossProgram | None
    weights: Mapping[str, Tensor]
    bounds: Bounds | None = None
    _cast: dict[bool, dict[str, Tensor]] = field(default_factory=dict)
    _admissions: dict[str, Admission] = field(default_factory=dict)

    def unit(self, inputs: UnitInputs, variant: Variant = NATIVE) -> UnitResult:
        """Forward, and backward where there was one. Raises ProgramError or TensorError for inputs that cannot be
        computed."""
        drawn: list[int] = []

        def seeds(node: int) -> int:
            drawn.append(node)
            return inputs.seeds(node)

        with computing(variant):
            parameters = self._parameters(variant.exact)
            buffers = {name: _as(tensor, variant.exact) for name, tensor in inputs.buffers.items()}
            interpreter = Interpreter(self.program.graph(inputs.training), parameters, buffers)
            if self.bounds is not None and not variant.exact:
                interpreter.admit = self._admissions.setdefault(
                    f"stage {inputs.training}", Admission.of_stage(self.program, inputs.training, self.bounds)
                )
            x = self._values(inputs.x, variant.exact)
            loss = self._loss_of(inputs, variant.exact)
            passed = forward(interpreter, self.program.inputs, x, seeds, grad=True, loss=loss)
            y = {name: tensor.clone() for name, tensor in slots(passed.outputs).items()}
            loss_value = slots([passed.loss]) if passed.loss is not None else {}
            of_inputs: dict[int, Tensor] = {}
            gradient = GradientSum()
            if inputs.backward:
                gy = {int(slot): _as(tensor, variant.exact) for slot, tensor in inputs.gy.items()}
                if passed.loss is not None and inputs.loss_weight is not None:
                    gy = {-1: torch.tensor(inputs.loss_weight, dtype=passed.loss.dtype).expand_as(passed.loss)}
                of_inputs = backward(passed, gy, parameters, retain=False, into=gradient)
        return UnitResult(y, slots(of_inputs), loss_value, gradient.take(), buffers, bool(drawn))

    def gradient(self, units: Sequence[UnitInputs], variant: Variant = NATIVE) -> dict[str, Tensor]:
        """The accumulated gradient of the units' backwards, in their order."""
        total = GradientSum()
        for unit in units:
            if unit.backward:
                total.add(self.unit(unit, variant).gradient)
        return total.take()

    def _parameters(self, exact: bool) -> dict[str, Tensor]:
        if exact not in self._cast:
            self._cast[exact] = {
                name: _as(self.weights[name], exact).detach().requires_grad_(spec.requires_grad)
                for name, spec in self.program.parameters.items()
            }
        return self._cast[exact]

    def _values(self, x: Mapping[str, Tensor], exact: bool) -> list[Value]:
        cut = self.program.inputs.slots
        if sorted(x) != sorted(str(i) for i in range(len(cut))):
            raise TensorError(f"inputs {sorted(x)} were opened, the cut has {len(cut)} slots")
        return [int(x[str(i)]) if slot.type == "symint" else _as(x[str(i)], exact) for i, slot in enumerate(cut)]

    def _loss_of(self, inputs: UnitInputs, exact: bool) -> tuple[Interpreter, list[Value]] | None:
        if inputs.loss_weight is None:
            return None
        if self.loss is None:
            raise TensorError("the unit ended in a loss, and no loss program was opened")
        constants = {name: _as(tensor, exact) for name, tensor in constants_of(self.loss).items()}
        targets: list[Value] = [_as(inputs.target[slot], exact) for slot in sorted(inputs.target, key=int)]
        interpreter = Interpreter(self.loss.graph, {}, constants)
        if self.bounds is not None and not exact:
            interpreter.admit = self._admissions.setdefault("loss", Admission.of_loss(self.loss, self.bounds))
        return interpreter, targets


@contextmanager
def computing(variant: Variant) -> Iterator[None]:
    """Torch set as `variant` says, and set back."""
    threads = torch.get_num_threads()
    if variant.num_threads:
        torch.set_num_threads(variant.num_threads)
    try:
        with torch.backends.mkldnn.flags(enabled=variant.onednn):
            yield
    finally:
        if variant.num_threads:
            torch.set_num_threads(threads)


def _as(tensor: Tensor, exact: bool) -> Tensor:
    return tensor.double() if exact and tensor.is_floating_point() else tensor
