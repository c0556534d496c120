"""The optimizer of one stage: torch's own classes from an allowlist, options as they travel, state as named tensors.

Options come with every step from the user, who keeps the groups and the schedulers. `foreach` and `fused` are off: an
auditor recomputes the update and wants one order of operations. What state an optimizer keeps is asked of torch: one
step on a tiny parameter shows it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tensorlink.errors import OptimizerError
from tensorlink.lasting import lasting
from tensorlink.program.values import DTYPE_NAMES

ALLOWED: dict[str, type[torch.optim.Optimizer]] = {
    "ASGD": torch.optim.ASGD,
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "Muon": torch.optim.Muon,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "SGD": torch.optim.SGD,
}

#: Why the others of torch are not among them.
NOT_RUN = {
    "LBFGS": "it evaluates the loss again and again within one step, over the parameters of all stages at once",
    "SparseAdam": "it takes sparse gradients, and stages compute dense ones",
}
#: Where and how the update is computed is the worker's matter, not the user's; `differentiable` has no meaning here.
_OURS = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
#: Options that torch takes for all groups at once: Adagrad makes its state when it is made itself.
WHOLE = ("initial_accumulator_value",)
#: Options that are one of a few words.
_WORDS: dict[str, tuple[str, ...]] = {"adjust_lr_fn": ("original", "match_rms_adamw")}
#: With these options an optimizer keeps all the state that it ever keeps.
_EVERYTHING: dict[str, Any] = {"amsgrad": True, "centered": True, "momentum": 0.5}
#: Keys that schedulers of torch keep in a group; workers have no use for them.
SCHEDULER_KEYS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}


def why_not(name: str) -> str:
    """What an error says of an optimizer that is not allowed."""
    allowed = f"needed one of torch.optim's {', '.join(sorted(ALLOWED))}"
    reason = f": {NOT_RUN[name]}" if name in NOT_RUN else ": workers run no others"
    return f"found optimizer {name[:64]!r}, {allowed}{reason}"


def encode_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as they travel: floats as `float.hex()`, tuples as lists (None in them as ""); what is ours
    to decide is left out."""
    return {
        name: _encode(name, value)
        for name, value in options.items()
        if name not in _OURS and name not in SCHEDULER_KEYS
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
            raise OptimizerError(why_not(str(name)))
        self.name = name
        self.parameters = {key: value for key, value in parameters.items() if value.requires_grad}
        self._names: dict[int, str] = {id(value): key for key, value in self.parameters.items()}
        self._groups: dict[int, int] = {}
        self._members = [self._names_of(group) for group in groups]
        made: list[dict[str, Any]] = []
        for index, group in enumerate(groups):
            names = self._members[index]
            taken = [key for key in names if any(self.parameters[key] is p for g in made for p in g["params"])]
            if taken:
                raise OptimizerError(f"parameter {taken[0]!r} stands in two groups")
            if names:
                self._groups[index] = len(made)
                made.append({"params": [self.parameters[key] for key in names], **self._options(group)})
        self._torch: torch.optim.Optimizer | None = None
        self._settled: set[str] = set()  # parameters whose state lies in lasting memory
        if made:
            try:
                for group in made:  # torch checks values only where they are given as defaults
                    _make(name, torch.zeros(1, 1), {key: value for key, value in group.items() if key != "params"})
                accepted: dict[str, Any] = {key: value for key, value in _OURS.items() if key in _defaults(name)}
                accepted |= {key: made[0][key] for key in WHOLE if key in made[0]}
                self._torch = ALLOWED[name](made, **accepted)
            except (TypeError, ValueError) as error:
                raise OptimizerError(f"{name}: {error}") from None

    def step(self, gradients: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Updates the parameters in place with `gradients`; parameters without one stay as they are.

        `groups` are this step's options, the groups given at the start with the same parameters in them (None: as they
        were last): an auditor has nothing else to go by. Raises OptimizerError before anything is changed.
        """
        if groups is not None and [self._names_of(group) for group in groups] != self._members:
            raise OptimizerError("the step's parameter groups are not those that the optimizer was made with")
        if self._torch is None:
            return
        changes = [(self._groups[i], self._options(groups[i])) for i in self._groups] if groups is not None else []
        for index, options in changes:
            self._torch.param_groups[index].update(options)
        known = [name for name in self.parameters if name in gradients and name in self._settled]
        fresh = [[name] for name in self.parameters if name in gradients and name not in self._settled]
        for names in [*([known] if known else []), *fresh]:
            self._step(self._torch, names, gradients)

    def _step(self, optimizer: torch.optim.Optimizer, names: Sequence[str], gradients: Mapping[str, Tensor]) -> None:
        """Updates these parameters. State that this makes moves to where it can stay: for one parameter at a time, so
        that it is never held twice."""
        for name in names:
            self.parameters[name].grad = gradients[name]
        try:
            optimizer.step()
        finally:
            for name in names:
                self.parameters[name].grad = None
        for name in names:
            if name not in self._settled:
                state: dict[str, Any] = optimizer.state.get(self.parameters[name], {})
                made = {
                    key: value
                    for key, value in state.items()
                    if isinstance(value, Tensor) and value.dim() and value.device.type == "cpu"
                }
                state.update({key: memory.copy_(made[key]) for key, memory in lasting(made).items()})
                self._settled.add(name)

    def state_tensors(self) -> Mapping[str, Tensor]:
        """The state under `parameter/state name`; the tensors are the live ones."""
        found = {}
        if self._torch is not None:
            for parameter, state in self._torch.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        found[f"{self._names[id(parameter)]}/{key}"] = value
        return dict(sorted(found.items()))

    def expected_state(self, names: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of state by `parameter/state name`. Raises OptimizerError for what this optimizer does not
        keep."""
        options, kept, found = self._group_of(), dict[str, Any](), {}
        for name in names:
            parameter, _, key = name.rpartition("/")
            if parameter not in kept:
                if parameter not in options:
                    raise OptimizerError(_not_here(parameter))
                spec = self.parameters[parameter]
                kept[parameter], _ = state_specs(self.name, options[parameter], tuple(spec.shape), spec.dtype)
            if key not in kept[parameter]:
                raise OptimizerError(f"{self.name} keeps no {key[:64]!r} for {parameter[:128]!r}")
            dtype, shape = kept[parameter][key]
            found[name] = DTYPE_NAMES[dtype], shape
        return found

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies of `tensors` become the state of the parameters that they belong to; others keep theirs.

        Raises OptimizerError, before anything is changed, for what this optimizer does not keep.
        """
        for name, state in self.check_state_tensors(tensors).items():
            if self._torch is not None:
                copies = {key: tensor.detach().clone() for key, tensor in state.items()}
                self._torch.state[self.parameters[name]] = copies
                self._settled.discard(name)

    def check_state_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """State by parameter and name. Raises OptimizerError for what this optimizer does not keep."""
        fresh: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            fresh.setdefault(parameter, {})[key] = tensor
        options = self._group_of()
        for name, state in fresh.items():
            if name not in options:
                raise OptimizerError(_not_here(name))
            spec = self.parameters[name]
            check_state(self.name, options[name], name, tuple(spec.shape), spec.dtype, state)
        return fresh

    def _group_of(self) -> dict[str, dict[str, Any]]:
        groups = self._torch.param_groups if self._torch is not None else []
        return {self._names[id(p)]: group for group in groups for p in group["params"]}

    def _names_of(self, group: Mapping[str, Any]) -> list[str]:
        return [key for key in group.get("parameters", ()) if key in self.parameters]

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return decode_options(self.name, {key: value for key, value in group.items() if key != "parameters"})


def _not_here(parameter: str) -> str:
    return f"optimizer state of {parameter[:128]!r}: it is no parameter of this stage's optimizer"


def state_specs(
    name: str, options: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], set[str]]:
    """What optimizer `name` may keep for a parameter, as dtype and shape by name, and which of it it cannot do
    without."""
    plain = tuple(sorted((key, value) for key, value in options.items() if key in _defaults(name) and key not in _OURS))
    small = tuple(min(size, 2) for size in shape)
    kept = {}
    for key, (found, sizes) in _kept_by(name, (*plain, *_EVERYTHING.items()), small, dtype).items():
        # a tiny parameter has two elements where the parameter has more
        kept[key] = found, tuple(shape[i] if size == small[i] else size for i, size in enumerate(sizes))
    return kept, set(_kept_by(name, plain, small, dtype))


def check_state(
    name: str,
    options: Mapping[str, Any],
    parameter: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
) -> None:
    """Raises OptimizerError unless `state` is what optimizer `name` keeps for a parameter of this shape and dtype."""
    kept, needed = state_specs(name, options, shape, dtype)
    if not needed <= state.keys() <= kept.keys():
        raise OptimizerError(
            f"{name} keeps {', '.join(sorted(kept)) or 'no state'} for {parameter[:128]!r}, found "
            f"{', '.join(sorted(key[:64] for key in state))}"
        )
    for key, tensor in state.items():
        if (tensor.dtype, tuple(tensor.shape)) != kept[key]:
            raise OptimizerError(
                f"{key} of {parameter[:128]!r} is {tensor.dtype} {list(tensor.shape)}, {name} keeps {kept[key][0]} "
                f"{list(kept[key][1])}"
            )


@functools.lru_cache(maxsize=256)
def _kept_by(
    name: str, options: tuple[tuple[str, Any], ...], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The state after one step on a parameter of this shape."""
    parameter = torch.zeros(shape, dtype=dtype)
    parameter.grad = torch.zeros_like(parameter)
    optimizer = _make(name, parameter, dict(options))
    optimizer.step()
    state = optimizer.state[parameter]
    return {key: (value.dtype, tuple(value.shape)) for key, value in state.items() if isinstance(value, Tensor)}


def _make(name: str, parameter: Tensor, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    arguments = inspect.signature(ALLOWED[name]).parameters  # AdamW has a default that is none of them
    return ALLOWED[name]([parameter], **{key: value for key, value in options.items() if key in arguments})


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
    return _make(name, torch.zeros(1, 1), {}).defaults


def _encode(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    if value is None or isinstance(value, bool | int) or (name in _WORDS and isinstance(value, str)):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple | list):
        return ["" if item is None else _encode(name, float(item)) for item in value]
    raise OptimizerError(
        f"option {name}={value!r:.60} does not travel: numbers, pairs of numbers, True, False and None do"
    )


def _decode(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool) or value in _WORDS.get(name, ()):
        return value
    if isinstance(value, int) and abs(value) < 1 << 53:
        return value
    try:
        if isinstance(value, list) and len(value) <= 4:
            return tuple(None if item == "" else float.fromhex(item) for item in value)
        return float.fromhex(value)
    except (ValueError, OverflowError, TypeError):
        raise OptimizerError(f"option {name[:64]}: {value!r:.60} is not a number in float.hex() form") from None
