"""Parameters that live on workers, as the user sees them: shape, dtype, where; never a gradient or a value.

On meta tensors torch's own `step()` and `clip_grad_norm_()` silently do nothing, so whatever would touch a gradient
here raises and names the method of ours that does it where the parameter lives.
"""

from __future__ import annotations

from typing import Any

import torch

from tensorlink.errors import RemoteParameterError

_REMEDY = (
    "use tensorlink.DistributedOptimizer for updates, model.zero_grad() and model.clip_grad_norm_() for gradients, "
    "model.state_dict() for values, model.save_checkpoint() to keep them; freeze parameters before wrapping the module"
)
#: The stage of a parameter that no stage computes with.
UNUSED = -1
#: The stage of a parameter that stays on the user's machine.
PRIVATE = -2
#: What looks at a parameter without touching values.
_HARMLESS = {
    "__repr__",
    "numel",
    "size",
    "dim",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "element_size",
    "stride",
    "__hash__",
    "__len__",
}
#: Attributes that would give another tensor to write to, in vain, or a gradient that never comes.
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag", "grad", "_grad"}


class RemoteParameter(torch.nn.Parameter):
    """A stand-in on the meta device for a parameter that a worker holds; `stage` says which stage (UNUSED: none;
    PRIVATE: a layer that stays here, which is used in the same way)."""

    remote_name: str
    stage: int

    @staticmethod
    def make(name: str, stage: int, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> RemoteParameter:
        """The stand-in for parameter `name` of this shape and dtype."""
        data = torch.empty(shape, dtype=dtype, device="meta")
        parameter = torch.Tensor._make_subclass(RemoteParameter, data, requires_grad)
        parameter.remote_name, parameter.stage = name, stage
        return parameter

    @property
    def grad(self) -> torch.Tensor:
        raise _refusal("grad", self)

    @grad.setter
    def grad(self, value: object) -> None:
        raise _refusal("grad", self)

    def __repr__(self, *_: object) -> str:  # type: ignore[override]
        return f"RemoteParameter({self.remote_name}: {self.dtype}, {list(self.shape)}, {_where(self)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name in ("__get__", "__set__") else ""
        if attribute in _VALUES or name == "__set__":
            name = attribute
        elif attribute or name in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise _refusal(name, next((arg for arg in args if isinstance(arg, RemoteParameter)), None))


def _refusal(what: str, parameter: RemoteParameter | None) -> RemoteParameterError:
    if parameter is None:
        return RemoteParameterError(f"{what} of parameters that live on workers: {_REMEDY}")
    return RemoteParameterError(f"{what} of {parameter.remote_name}, which lives on {_where(parameter)}: {_REMEDY}")


def _where(parameter: RemoteParameter) -> str:
    if parameter.stage == PRIVATE:
        return "this machine, in a private layer"
    return "no worker, for no stage uses it" if parameter.stage == UNUSED else f"the worker of stage {parameter.stage}"
