"""Tracing a module that has no storage: for the time of a trace, meta tensors are fake tensors on the CPU.

A module built under `torch.device("meta")` has shapes and no values, and its operations do not mix with inputs that
have. Fake tensors have shapes and a device: what is traced is what the module would be with its weights on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tensorlink.errors import TraceError


@contextlib.contextmanager
def stand_ins(module: nn.Module) -> Iterator[None]:
    """Replaces meta parameters and buffers, each by one stand-in however often it is tied, and puts them back.

    Raises TraceError for a meta tensor that is a plain attribute: its values would be part of the program.
    """
    held = [
        (owner, name, tensor)
        for owner in module.modules()
        for tensors in (owner._parameters, owner._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_meta
    ]
    _refuse_attributes(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) if held else None
    made: dict[int, Tensor] = {}
    try:
        for owner, name, tensor in held:
            if id(tensor) not in made:
                made[id(tensor)] = _fake(tensor, mode)
            setattr(owner, name, made[id(tensor)])  # not into the dict: nn.LSTM keeps a list of its weights besides
        yield
    finally:
        for owner, name, tensor in held:
            setattr(owner, name, tensor)


def _fake(tensor: Tensor, mode: FakeTensorMode | None) -> Tensor:
    assert mode is not None
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _refuse_attributes(module: nn.Module) -> None:
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise TraceError(
                    f"{f'{prefix}.' if prefix else ''}{name} is a tensor on the meta device and a plain attribute, so "
                    "no weights file has its values: assign it again outside of torch.device('meta'), or make it a "
                    "buffer with register_buffer"
                )
