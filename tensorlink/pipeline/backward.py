"""One micro-batch forwards and backwards through one stage, and the sum of its gradients. Torch only, no links.

The whole backward is one `torch.autograd.grad` over the inputs that need a gradient and the parameters; together with
the sum in a fixed order this gives bit for bit what `.backward()` accumulates in a plain loop. A parameter's gradient
is added to the sum the moment autograd has it, and freed: never are there two gradients of a whole stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tensorlink.errors import TensorError
from tensorlink.program.deferred import Deferred, program_backward
from tensorlink.program.interpreter import Interpreter
from tensorlink.records import Cut

Value = Tensor | int
#: A squared gradient norm, and the name of a parameter whose gradient is not finite ("" for none).
Norm = tuple[float, str]

#: A norm of half-precision numbers has to be summed in more than half precision.
_NORM_DTYPES = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass
class ForwardPass:
    """The graph of one micro-batch, alive until its last backward. `loss` only where a loss program ended it."""

    inputs: list[Value]
    outputs: list[Value]
    loss: Tensor | None = None
    deferred: Deferred | None = None
    freed: bool = False

    def free(self) -> None:
        """Lets go of every activation, but for what deferred weight gradients need."""
        self.inputs, self.outputs, self.loss, self.freed = [], [], None, True


def forward(
    interpreter: Interpreter,
    cut: Cut,
    inputs: Sequence[Value],
    seed_for: Callable[[int], int],
    grad: bool,
    loss: tuple[Interpreter, Sequence[Value]] | None = None,
    defer: bool = False,
) -> ForwardPass:
    """Runs a stage on `inputs`, in the order of `cut`; those whose slot needs a gradient become leaves.

    With `defer` a backward leaves weight gradients that can wait in `ForwardPass.deferred`. `loss` is a loss program's
    interpreter with its targets: it then runs on the outputs. Raises ProgramError, TensorError.
    """
    leaves: list[Value] = []
    for slot, value in zip(cut.slots, inputs, strict=True):
        if isinstance(value, Tensor):
            value = value.detach()
            if grad and slot.requires_grad:
                value.requires_grad_()
        leaves.append(value)
    with torch.set_grad_enabled(grad):
        deferred = Deferred() if defer and grad else None
        outputs = interpreter.run(leaves, seed_for, deferred=deferred)
        passed = ForwardPass(leaves, outputs, deferred=deferred)
        if loss is not None:
            (passed.loss,) = loss[0].run([*outputs, *loss[1]], seed_for)
    return passed


def backward(
    passed: ForwardPass,
    gradients: Mapping[int, Tensor],
    parameters: Mapping[str, Tensor],
    retain: bool,
    into: GradientSum,
) -> dict[int, Tensor]:
    """Gradients of the inputs by slot, zeros where nothing flows; those of the parameters are added to `into`, but for
    those that were deferred.

    `gradients` are those of the outputs by slot; of the loss under the slot -1. Raises TensorError for a second
    backward through a graph that was not retained, or a gradient of the wrong shape, ProgramError where the program's
    own backward fails: `into` may then hold a part of it.
    """
    if passed.freed:
        raise TensorError(
            "backward through a forward whose graph was freed: keep it with retain_graph=True, or run the forward again"
        )
    roots, root_gradients = _roots(passed, gradients)
    slots = [i for i, v in enumerate(passed.inputs) if isinstance(v, Tensor) and v.requires_grad]
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    wanted = [*(passed.inputs[slot] for slot in slots), *trained.values()]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        with program_backward(), into.gathering(trained):
            found = torch.autograd.grad(roots, wanted, root_gradients, retain_graph=retain, allow_unused=True)  # type: ignore[arg-type]
    of_inputs = {}
    for slot, gradient in zip(slots, found, strict=False):
        of_inputs[slot] = torch.zeros_like(passed.inputs[slot]) if gradient is None else gradient.contiguous()  # type: ignore[arg-type]
    if not retain:
        passed.free()
    return of_inputs


def _roots(passed: ForwardPass, gradients: Mapping[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    roots, root_gradients = [], []
    for slot, gradient in sorted(gradients.items()):
        root = passed.loss if slot < 0 else passed.outputs[slot]
        if not isinstance(root, Tensor) or not root.requires_grad:
            continue  # the cut says a gradient may come; nothing here depends on a parameter
        if root.shape != gradient.shape or root.dtype != gradient.dtype:
            raise TensorError(
                f"slot {slot}: a gradient of {gradient.dtype} {list(gradient.shape)} for an output of {root.dtype} "
                f"{list(root.shape)}"
            )
        roots.append(root)
        root_gradients.append(gradient)
    return roots, root_gradients


def squared_norm(gradients: Mapping[str, Tensor]) -> Norm:
    """Sum of squares over all gradients, and the name of the first that is not finite ("" for none)."""
    total, bad = 0.0, ""
    for name, tensor in sorted(gradients.items()):
        norm = float(torch.linalg.vector_norm(tensor, dtype=_NORM_DTYPES.get(tensor.dtype, tensor.dtype)))
        if not bad and not norm < float("inf"):
            bad = name
        total += norm * norm
    return total, bad


class GradientSum:
    """Gradients of a step, added in the order of `add`. What `add` was given is never written to; sums stand in memory
    of their own, that which was lent where there is some."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._own: set[str] = set()
        self._lent: dict[str, Tensor] = {}
        self._norm: tuple[float, str] | None = None

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Adds gradients of one micro-batch."""
        self._norm = None
        for name, gradient in gradients.items():
            if name not in self._sums:
                self._sums[name] = self._begin(name, gradient)
            elif name in self._own:
                self._sums[name].add_(gradient)
            else:
                self._sums[name] = self._sums[name] + gradient
                self._own.add(name)

    def _begin(self, name: str, gradient: Tensor) -> Tensor:
        lent = self._lent.pop(name, None)
        if lent is None or (lent.shape, lent.dtype) != (gradient.shape, gradient.dtype):
            return gradient
        self._own.add(name)
        return lent.copy_(gradient)

    def lend(self, memory: Mapping[str, Tensor]) -> None:
        """Tensors for the next sums of these names to stand in, which go with `take`. Any thread may lend."""
        self._lent.update(memory)

    @contextmanager
    def gathering(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Adds the gradients that a `torch.autograd.grad` inside finds for these leaves, each as soon as it is whole.
        What the call itself returns for them is of no use."""
        hooks = [leaf.register_hook(partial(self._gather, name)) for name, leaf in parameters.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _gather(self, name: str, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        self.add({name: gradient})
        return gradient.new_zeros(()).expand_as(gradient)  # in its place, so that nobody holds it until the end

    def take(self) -> dict[str, Tensor]:
        """The sums, contiguous; empties this."""
        found = {name: tensor.contiguous() for name, tensor in sorted(self._sums.items())}
        self._sums, self._own, self._norm = {}, set(), None
        return found

    def drop(self) -> None:
        """Empties this; the sums' memory is there for the next."""
        self._lent.update({name: self._sums[name] for name in self._own})
        self._sums, self._own, self._norm = {}, set(), None

    def squared_norm(self) -> tuple[float, str]:
        """As the function of this name, over all sums."""
        if self._norm is None:
            self._norm = squared_norm(self._sums)
        return self._norm

    def sums(self) -> Mapping[str, Tensor]:
        """The sums as they are now, not to be written to."""
        return self._sums

    def __len__(self) -> int:
        return len(self._sums)
