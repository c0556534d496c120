"""The optimizer of one stage: torch's own classes from an allowlist, options as they travel, state as named tensors.

Options come with every step from the user, who keeps the groups and the schedulers. `foreach` and `fused` are off: an
auditor recomputes the update and wants one order of operations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorlink.errors import OptimizerError

ALLOWED: dict[str, type[torch.optim.Optimizer]] = {
    "ASGD": torch.optim.ASGD,
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "SGD": torch.optim.SGD,
}

#: Where and how the update is computed is the worker's matter, not the user's; `differentiable` has no meaning here.
_OURS = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
#: Keys that schedulers of torch keep in a group; workers have no use for them.
_SCHEDULER = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}


def encode_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as they travel: floats as `float.hex()`, tuples as lists; what is ours to decide is left
    out."""
    return {
        name: _encode(name, value) for name, value in options.items() if name not in _OURS and name not in _SCHEDULER
    }


def decode_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options out of a message. Raises OptimizerError for a name that optimizer `name` does not have, or a bad
    value."""
    known = _defaults(name)
    decoded = {}
    for key, value in options.items():
        if key not in known or key in _OURS:
            raise OptimizerError(
                f"{name} has no option {str(key)[:64]!r}; it has {', '.join(sorted(set(known) - set(_OURS)))}"
            )
        decoded[key] = _decode(key, value)
    return decoded


class StageOptimizer:
    """One optimizer over the named parameters of a stage.

    `groups` are maps with `parameters` (names, of other stages too: those are skipped) and options as they travel.
    Raises OptimizerError for an optimizer, option or grouping that workers do not run.
    """

    def __init__(self, name: str, groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> None:
        if name not in ALLOWED:
            raise OptimizerError(
                f"optimizer {str(name)[:64]!r} is not run by workers; allowed are {', '.join(ALLOWED)}"
            )
        self.name = name
        self.parameters = {key: value for key, value in parameters.items() if value.requires_grad}
        self._names: dict[int, str] = {id(value): key for key, value in self.parameters.items()}
        self._groups: dict[int, int] = {}
        made: list[dict[str, Any]] = []
        for index, group in enumerate(groups):
            names = [key for key in group.get("parameters", ()) if key in self.parameters]
            taken = [key for key in names if any(self.parameters[key] is p for g in made for p in g["params"])]
            if taken:
                raise OptimizerError(f"parameter {taken[0]!r} stands in two groups")
            if names:
                self._groups[index] = len(made)
                made.append({"params": [self.parameters[key] for key in names], **self._options(group)})
        self._torch: torch.optim.Optimizer | None = None
        if made:
            try:
                for group in made:  # torch checks values only where they are given as defaults
                    arguments = inspect.signature(ALLOWED[name]).parameters  # AdamW has a default that is none of them
                    ALLOWED[name](
                        [torch.zeros(1)],
                        **{key: value for key, value in group.items() if key in arguments and key != "params"},
                    )
                accepted: dict[str, Any] = {key: value for key, value in _OURS.items() if key in _defaults(name)}
                self._torch = ALLOWED[name](made, **accepted)
            except (TypeError, ValueError) as error:
                raise OptimizerError(f"{name}: {error}") from None

    def step(self, gradients: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]] = ()) -> None:
        """Updates the parameters in place with `gradients`; parameters without one stay as they are.

        `groups` are this step's options, one map per group in the order given at the start. Raises OptimizerError
        before anything is changed.
        """
        if self._torch is None:
            return
        changes = [(self._groups[i], self._options(group)) for i, group in enumerate(groups) if i in self._groups]
        for index, options in changes:
            self._torch.param_groups[index].update(options)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        try:
            self._torch.step()
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The state under `parameter/state name`; the tensors are the live ones."""
        found = {}
        if self._torch is not None:
            for parameter, state in self._torch.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        found[f"{self._names[id(parameter)]}/{key}"] = value
        return dict(sorted(found.items()))

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the state by copies of `tensors`. Raises OptimizerError for names of no parameter of this stage."""
        if self._torch is None:
            return
        fresh: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            if parameter not in self.parameters:
                raise OptimizerError(f"optimizer state {name[:128]!r} belongs to no parameter of this stage")
            fresh.setdefault(parameter, {})[key] = tensor.detach().clone()
        self._torch.state.clear()
        for parameter, state in fresh.items():
            self._torch.state[self.parameters[parameter]].update({**_EMPTY_STATE.get(self.name, {}), **state})

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return decode_options(self.name, {key: value for key, value in group.items() if key != "parameters"})


#: State that is None until its first use and is looked up without a default.
_EMPTY_STATE: dict[str, dict[str, Any]] = {"SGD": {"momentum_buffer": None}}


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
    return ALLOWED[name]([torch.zeros(1)]).defaults  # type: ignore[call-arg]


def _encode(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple | list):
        return [_encode(name, float(item)) for item in value]
    raise OptimizerError(
        f"option {name}={value!r:.60} does not travel: numbers, pairs of numbers, True, False and None do"
    )


def _decode(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 53:
        return value
    try:
        if isinstance(value, list) and len(value) <= 4:
            return tuple(float.fromhex(item) for item in value)
        return float.fromhex(value)
    except (ValueError, OverflowError, TypeError):
        raise OptimizerError(f"option {name[:64]}: {value!r:.60} is not a number in float.hex() form") from None
