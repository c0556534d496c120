"""`DistributedOptimizer`: a torch optimizer whose work is done where the parameters live.

It is a `torch.optim.Optimizer` with the wrapped class's defaults, so that every learning-rate scheduler of torch
drives it: the groups' options travel with each step. `step()` asks every stage whether it can commit, then commits on
all or on none. Its state is fetched and sent by `remote_optimizer.py`, in torch's own format.
"""

from __future__ import annotations

import copy
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from tensorlink.errors import OptimizerError
from tensorlink.remote_optimizer import RemoteOptimizer
from tensorlink.stage_optimizer import ALLOWED, WHOLE, encode_options, why_not

if TYPE_CHECKING:
    from tensorlink.model import DistributedModel


class DistributedOptimizer(torch.optim.Optimizer):
    """Updates the parameters of a `DistributedModel`.

    `optimizer_class` is one of torch's optimizers on the allowlist (`tensorlink.stage_optimizer.ALLOWED`); `options`
    are its own. `foreach` and `fused` are taken and mean nothing: a rig computes the update as auditors do.
    `groups` are maps with `parameters` (name patterns such as `["*.bias", "norm.*"]`) and options that differ; what
    no pattern matches follows `options`. Groups list frozen parameters too, so that parameters have the numbers which
    a plain optimizer over `module.parameters()` gives them. Raises OptimizerError for an optimizer or option that
    workers do not run.
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
            raise OptimizerError(why_not(name))
        try:
            defaults = optimizer_class([torch.zeros(1, 1)], **options).defaults
        except (TypeError, ValueError) as error:
            raise OptimizerError(f"{name}: {error}") from None
        self.model = model
        self.optimizer_name = name
        _check_options(name, groups, defaults)
        self._complete = False
        super().__init__(_by_pattern(model, groups), defaults)
        self._complete = True
        self.state = _Elsewhere()
        _check_shapes(name, self.param_groups)
        model._steps.set_optimizer(self)
        placement = model._placement
        self.remote = RemoteOptimizer(placement.driver, placement.programs, placement.private, name, self._options_of)

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises OptimizerError: all parameters are in groups from the start."""
        if self._complete:
            raise OptimizerError(
                "every parameter of the model is in a group already: pass groups=[{'parameters': ['head.*'], ...}] to "
                "DistributedOptimizer, and change a group's options through param_groups (lr=0.0 holds it still)"
            )
        super().add_param_group(param_group)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's own format, moments included, fetched from the workers: a plain optimizer over the wrapped module's
        parameters (in the same groups) takes it and goes on exactly as this one would."""
        self.model._steps.check(self)
        found = self.model._recovery.run(self.remote.fetch_all)
        self.state = defaultdict(
            dict, {p: found[p.remote_name] for group in self.param_groups for p in group["params"] if _has(found, p)}
        )
        try:
            return super().state_dict()
        finally:
            self.state = _Elsewhere()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over options and moments that this or a plain torch optimizer's `state_dict()` gave; gradients since
        the last step are dropped.

        Raises OptimizerError, before anything is changed, for groups of other sizes and for state that this optimizer
        does not keep.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved = copy.deepcopy(state_dict["param_groups"])
        sizes, own = [[len(group["params"]) for group in each] for each in (saved, self.param_groups)]
        if sizes != own:
            raise OptimizerError(f"found a state_dict with groups of {sizes} parameters, needed {own}")
        numbers = [number for group in saved for number in group.pop("params")]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        names = {number: p.remote_name for number, p in zip(numbers, parameters, strict=True)}
        unknown = [number for number in state_dict["state"] if number not in names]
        if unknown:
            raise OptimizerError(f"found state for parameter {unknown[0]!r}, which is in none of the groups")
        self.restore(saved, {names[number]: state for number, state in state_dict["state"].items()})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def restore(self, groups: Sequence[Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the options of each group, and `state` by parameter name; what is not in it starts afresh."""
        self.model._recovery.replace(lambda: self._restore(groups, state))

    def _restore(self, groups: Sequence[Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> None:
        self.model._steps.check(self)
        before = [dict(group) for group in self.param_groups]
        try:
            for group, options in zip(self.param_groups, groups, strict=True):
                group.update(options)
            checked = self.remote.checked(state)
            self.model._steps.set_optimizer(self)
        except BaseException:
            for group, options in zip(self.param_groups, before, strict=True):
                group.clear()
                group.update(options)
            raise
        self.remote.send(checked)

    def __getstate__(self) -> NoReturn:
        raise OptimizerError("the optimizer's state lives on workers: copy or save optimizer.state_dict()")

    # -- what travels -------------------------------------------------------------------------------------------------

    def wire_options(self) -> list[dict[str, Any]]:
        """Per group the options as they travel (floats as `float.hex()`), with the names of its parameters."""
        return [
            {
                "parameters": [parameter.remote_name for parameter in group["params"]],
                **encode_options({key: value for key, value in group.items() if key != "params"}),
            }
            for group in self.param_groups
        ]

    def _options_of(self) -> dict[str, dict[str, Any]]:
        """The group of every parameter, by name."""
        return {parameter.remote_name: group for group in self.param_groups for parameter in group["params"]}


class _Elsewhere(defaultdict[Any, Any]):
    """Stands where torch's optimizers have their state: whoever looks into it is told where the state is."""

    def _refuse(self, *_: object) -> NoReturn:
        raise OptimizerError(
            "the optimizer's state lives on workers: optimizer.state_dict() fetches it, load_state_dict() replaces it"
        )

    __getitem__ = __setitem__ = __delitem__ = __iter__ = __len__ = __contains__ = _refuse
    keys = values = items = get = clear = update = pop = setdefault = _refuse  # type: ignore[assignment]


def _has(found: Mapping[str, Any], parameter: Any) -> bool:
    return parameter.remote_name in found


def _check_options(name: str, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """torch lets a group's misspelt option pass and ignores it; nobody wants that."""
    for group in groups:
        unknown = [key for key in group if key not in defaults and key != "parameters"]
        if unknown:
            raise OptimizerError(f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(defaults))}")
        if any(key in group for key in WHOLE):
            raise OptimizerError(f"{name} takes {', '.join(WHOLE)} for all groups at once: pass it to the optimizer")
    for options in (defaults, *groups):
        wanted = [key for key in ("capturable", "differentiable") if options.get(key)]
        if wanted:
            raise OptimizerError(f"{wanted[0]}=True: updates run on workers and are part of no graph; leave it out")


def _check_shapes(name: str, groups: Sequence[dict[str, Any]]) -> None:
    if name == "Muon":
        for parameter in (p for group in groups for p in group["params"] if p.requires_grad):
            if parameter.dim() != 2:
                raise OptimizerError(
                    f"Muon updates matrices, and {parameter.remote_name} has shape {list(parameter.shape)}: freeze it "
                    "before wrapping the module (requires_grad_(False)) or use another optimizer"
                )


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
        matching = (g for g in made if any(fnmatch.fnmatchcase(name, pattern) for pattern in g["patterns"]))
        next(matching, {"params": rest})["params"].append(parameter)
    for group in made:
        patterns = group.pop("patterns")
        if not any(parameter.requires_grad for parameter in group["params"]):
            raise OptimizerError(f"no trainable parameter matches {list(patterns)}: see model.named_parameters()")
    return [*made, {"params": rest}] if rest else made
