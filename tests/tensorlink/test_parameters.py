"""Stand-ins for parameters tell what they are and refuse everything else."""

from __future__ import annotations

import pytest
import torch

from tensorlink.errors import RemoteParameterError
from tensorlink.parameters import UNUSED, RemoteParameter


@pytest.fixture
def parameter():
    return RemoteParameter.make("layers.0.weight", 2, (3, 4), torch.bfloat16, requires_grad=True)


def test_it_tells_shape_dtype_and_place(parameter):
    assert (tuple(parameter.shape), parameter.dtype, parameter.requires_grad) == ((3, 4), torch.bfloat16, True)
    assert (parameter.numel(), parameter.dim(), parameter.size(), len(parameter)) == (12, 2, torch.Size([3, 4]), 3)
    assert repr(parameter) == "RemoteParameter(layers.0.weight: torch.bfloat16, [3, 4], the worker of stage 2)"
    assert parameter.device.type == "meta"
    assert isinstance(parameter, torch.nn.Parameter)
    assert {parameter: 1}[parameter] == 1
    idle = RemoteParameter.make("idle", UNUSED, (1,), torch.float32, requires_grad=False)
    assert "no stage uses it" in repr(idle)


@pytest.mark.parametrize(
    "act",
    [
        lambda p: p.grad,
        lambda p: setattr(p, "grad", None),
        lambda p: p.data,
        lambda p: p.detach(),
        lambda p: p * 2,
        lambda p: 2 + p,
        lambda p: p.add_(1),
        lambda p: p.to("cpu"),
        lambda p: p.half(),
        lambda p: p.clone(),
        lambda p: p.tolist(),
        lambda p: torch.nn.functional.linear(torch.zeros(1, 4, dtype=torch.bfloat16), p),
        lambda p: torch.nn.init.zeros_(p),
        lambda p: torch.stack([p]),
    ],
)
def test_whatever_touches_a_value_or_gradient_names_our_methods(parameter, act):
    with pytest.raises(RemoteParameterError, match=r"model\.state_dict\(\) for values"):
        act(parameter)
