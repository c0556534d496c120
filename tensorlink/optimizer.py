"""`DistributedOptimizer`: a torch optimizer whose work is done where the parameters live.

It is a `torch.optim.Optimizer` with the wrapped class's defaults, so that every learning-rate scheduler of torch
drives it: the groups' options travel with each step. `step()` asks every stage whether it can commit, then commits on
all or on none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tensorlink.errors import OptimizerError
from tensorlink.stage_optimizer import ALLOWED, encode_options

if TYPE_CHECKING:
    from tensorlink.model import DistributedModel


class DistributedOptimizer(torch.optim.Optimizer):
    """Updates the parameters of a `DistributedModel`.

    `optimizer_class` is one of torch's optimizers on the allowlist (`tensorlink.stage_optimizer.ALLOWED`); `options`
    are its own.
    `groups` are maps with `parameters` (name patterns such as `["*.bias", "norm.*"]`) and options that differ; what
    no pattern matches follows `options`. Raises OptimizerError for an optimizer or option that workers do not run.
    """

    def __init__(
        self,
        model: DistributedModel,
        optimizer_class: type[torch.optim.Optimizer],
        groups: Sequence[dict[str, Any]] = (),
        **options: Any,
    ):
        name = getattr(optimizer_class, "__name__", repr(optimizer_class))
        if ALLOWED.get(name) is not optimizer_class:
            raise OptimizerError(
                f"found {name}, needed one of torch.optim's {', '.join(sorted(ALLOWED))}: workers run no others"
            )
        try:
            defaults = optimizer_class([torch.zeros(1)], **options).defaults
        except (TypeError, ValueError) as error:
            raise OptimizerError(f"{name}: {error}") from None
        self.model = model
        self.optimizer_name = name
        _check_options(name, groups, defaults)
        super().__init__(_by_pattern(model, groups), defaults)
        model._steps.set_optimizer(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that were accumulated since the last `step()`; a committed step leaves none."""
        self.model._steps.drop_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Commit the step on every stage or on none.

        Raises NonFiniteError (and leaves every parameter as it was) when a gradient is NaN or infinite,
        WorkerLostError when a worker is gone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.model._steps.step(self)
        return loss

    def wire_options(self) -> list[dict[str, Any]]:
        """Per group the options as they travel (floats as `float.hex()`), with the names of its parameters."""
        return [
            {
                "parameters": [parameter.remote_name for parameter in group["params"]],
                **encode_options({key: value for key, value in group.items() if key != "params"}),
            }
            for group in self.param_groups
        ]


def _check_options(name: str, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """torch lets a group's misspelt option pass and ignores it; nobody wants that."""
    for group in groups:
        unknown = [key for key in group if key not in defaults and key != "parameters"]
        if unknown:
            raise OptimizerError(f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(defaults))}")


def _by_pattern(model: DistributedModel, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """torch's parameter groups; each parameter goes to the first group with a pattern that matches its name."""
    made: list[dict[str, Any]] = [{**group, "params": []} for group in groups]
    rest: list[torch.nn.Parameter] = []
    for group in made:
        patterns = group.pop("parameters", None)
        if not patterns:
            raise OptimizerError(
                "a parameter group needs the key 'parameters': a list of name patterns such as '*.bias'"
            )
        group["patterns"] = tuple([patterns] if isinstance(patterns, str) else patterns)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matching = (g for g in made if any(fnmatch.fnmatchcase(name, pattern) for pattern in g["patterns"]))
            next(matching, {"params": rest})["params"].append(parameter)
    for group in made:
        patterns = group.pop("patterns")
        if not group["params"]:
            raise OptimizerError(f"no trainable parameter matches {list(patterns)}: see model.named_parameters()")
    return [*made, {"params": rest}] if rest else made
