"""Calls `torch.export` on a module in one mode, and explains what it could not do.

The module is wrapped so that export sees a flat list of tensors in and out; whatever else the user passes or returns
(numbers, None, nested tuples and dicts) is kept on this side. Neighbours: `lowering.py` reads what comes out,
`trace.py` calls this for both modes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tensorlink.errors import TraceError
from tensorlink.program import autocast as autocasts
from tensorlink.program.positions import known_positions
from tensorlink.program.sources import line_of_caller, line_of_error
from tensorlink.program.stand_ins import stand_ins

PREFIX = "module."
#: What to do about a course that depends on data.
NO_DATA = (
    "use torch.where, a mask or torch.cond, for a mixture of experts of transformers "
    'model.set_experts_implementation("batched_mm"), or take the decision before the model and pass it in'
)


@dataclass
class Captured:
    """An exported graph, and how the structure that the module returned is made of its flat outputs.

    `leaves` has an integer for each tensor (its place among the outputs) and `Literal` for anything else. `autocast`
    names the dtype of the autocast that it was traced under, "" for none.
    """

    exported: ExportedProgram
    tree: pytree.TreeSpec
    leaves: list[int | Literal]
    autocast: str = ""


@dataclass(frozen=True)
class Literal:
    """A number, text or None that the module returned beside its tensors."""

    value: Any


class _Returned:
    """What the last call of the module returned, apart from the tensors themselves."""

    tree: pytree.TreeSpec | None = None
    leaves: list[int | Literal]


class _Flat(nn.Module):
    """`module` as a function from a flat list of tensors to a flat list of tensors."""

    def __init__(
        self, module: nn.Module, rebuild: Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        super().__init__()
        self.module = module
        self.rebuild = rebuild
        self.returned = _Returned()  # an object of its own: export restores assigned attributes

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.rebuild(list(tensors))
        with _as_in_eager(), known_positions():
            flat, tree = pytree.tree_flatten(self.module(*args, **kwargs))
        outputs: list[Any] = []
        leaves: list[int | Literal] = []
        for leaf in flat:
            if isinstance(leaf, Tensor | torch.SymInt):
                leaves.append(len(outputs))
                outputs.append(leaf)
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                leaves.append(Literal(leaf))
            else:
                raise TraceError(
                    f"the model returns a {type(leaf).__name__}; return tensors, or tuples, lists and dicts of them"
                )
        self.returned.tree, self.returned.leaves = tree, leaves
        return outputs


def capture(
    module: nn.Module,
    tensors: list[Tensor],
    rows: Sequence[int],
    rebuild: Callable[[list[Tensor]], tuple[tuple[Any, ...], dict[str, Any]]],
    training: bool,
    autocast: torch.dtype | None = None,
) -> Captured:
    """Exports `module` in training or evaluation mode; its own mode and state are as before afterwards.

    `rows[i]` says how often the batch size goes into dimension 0 of `tensors[i]`, 0 where it has nothing to do with
    it. Raises TraceError with the user's line and a remedy.
    """
    batch = Dim("batch", min=2)
    flat = _Flat(module, rebuild)
    shapes = tuple({0: batch if times == 1 else times * batch} if times else None for times in rows)
    device, name = tensors[0].device, autocasts.name_of(autocast)
    # stand-ins come before attributes are kept, or lists of weights would keep them
    quiet = _quiet(), stand_ins(module), _kept_attributes(module), _no_custom_backward()
    with contextlib.ExitStack() as stack:
        for context in (_mode(module, training), *quiet, autocasts.region(device, name)):
            stack.enter_context(context)
        try:
            exported = torch.export.export(flat, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
        except TraceError:
            raise
        except Exception as error:  # export raises many unrelated classes, user code any at all
            raise _explained(error) from error
    if flat.returned.tree is None:
        raise TraceError("the module was never called by torch.export")
    return Captured(exported, flat.returned.tree, flat.returned.leaves, name)


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Puts the module into one mode and gives each submodule its own mode back."""
    modes = [(child, child.training) for child in module.modules()]
    module.train(training)
    try:
        with torch.enable_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextlib.contextmanager
def _as_in_eager() -> Iterator[None]:
    """Tells a module that asks that nothing is being exported: some (transformers' attention without padding) would
    then choose other operations than in eager, which round differently."""
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags


@contextlib.contextmanager
def _kept_attributes(module: nn.Module) -> Iterator[None]:
    """Undoes assignments to plain attributes: nn.LSTM's list of weights, counters and caches would keep traced
    tensors."""
    before = [(child, dict(child.__dict__)) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in before:
            child.__dict__.clear()
            child.__dict__.update(attributes)


@contextlib.contextmanager
def _no_custom_backward() -> Iterator[None]:
    """Refuses the user's own `torch.autograd.Function`: export keeps its forward and silently drops its backward."""
    apply = torch.autograd.Function.__dict__["apply"]

    def checked(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            raise TraceError(
                f"the model uses its own torch.autograd.Function {cls.__name__} at {line_of_caller()}, whose backward "
                "a program cannot hold; write it as tensor operations with the same gradient, such as "
                "x + (f(x) - x).detach() for a straight-through estimator"
            )
        return apply.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(checked)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export's warnings and logs speak of its own inner names; what matters is in our errors."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                yield
            sys.stderr.write(printed.getvalue())  # after an error it is export's half-made graph: our message says more
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _explained(error: Exception) -> TraceError:
    text = str(error)
    place = line_of_error(error)
    at = f" at {place}" if place else ""
    if "data-dependent" in text or "DataDependent" in type(error).__name__ or "unbacked" in text:
        return TraceError(f"the model branches or sizes a tensor on the values of its data{at}; {NO_DATA}")
    if "Constraints violated" in text or "specialized" in text:
        return TraceError(
            f"the model fixes the batch size{at}: a size that follows the batch is written as a number or "
            "compared with one; "
            "take it from the input, as x.shape[0], or name the inputs that have no batch dimension in `static_inputs`"
        )
    first = text.strip().splitlines()[0] if text.strip() else "no message"
    return TraceError(
        f"the model cannot be traced{at}: {type(error).__name__}: {first[:300]}; the forward must be made of "
        "tensor operations whose "
        "course does not depend on values"
    )
