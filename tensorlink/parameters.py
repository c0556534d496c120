"""Parameters that live on workers, as the user sees them: shape, dtype, where; never a gradient or a value.

On meta tensors torch's own `step()` and `clip_grad_norm_()` silently do nothing, so whatever would touch a gradient
here raises and names the method of ours that does it where the parameter lives.
"""

from __future__ import annotations

from typing import Any

import torch

from tensorlink.errors import RemoteParameterError

_REMEDY = (
    "this parameter lives on the worker of stage {stage}: use tensorlink.DistributedOptimizer for updates, "
    "model.clip_grad_norm_() for clipping, model.state_dict() for values"
)
#: What looks at a parameter without touching values.
_HARMLESS = {
    "__repr__",
    "numel",
    "size",
    "dim",
    "is_floating_point",
    "is_complex",
    "element_size",
    "stride",
    "__hash__",
}


class RemoteParameter(torch.nn.Parameter):
    """A stand-in on the meta device for a parameter that a worker holds; `stage` says which stage."""

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
    def grad(self) -> torch.Tensor:  # type: ignore[override]
        raise RemoteParameterError(f"{self.remote_name}.grad: " + _REMEDY.format(stage=self.stage))

    @grad.setter
    def grad(self, value: object) -> None:
        raise RemoteParameterError(f"{self.remote_name}.grad: " + _REMEDY.format(stage=self.stage))

    def __repr__(self, *_: object) -> str:  # type: ignore[override]
        return f"RemoteParameter({self.remote_name}: {self.dtype}, {list(self.shape)}, stage {self.stage})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" or name == "__set__" or name in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        found = next((arg for arg in args if isinstance(arg, RemoteParameter)), None)
        label = found.remote_name if found is not None else "a parameter"
        stage = found.stage if found is not None else "?"
        raise RemoteParameterError(f"{name}({label}): " + _REMEDY.format(stage=stage))
