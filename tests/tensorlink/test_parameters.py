"""Stand-ins for parameters tell what they are and refuse everything else."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

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
        lambda p: setattr(p, "grad", torch.zeros(3, 4)),
        lambda p: setattr(p, "data", torch.zeros(3, 4)),
        lambda p: setattr(p, "requires_grad", False),
        lambda p: p.requires_grad_(False),
        lambda p: p.backward(),
        lambda p: p.register_hook(print),
        lambda p: p.register_post_accumulate_grad_hook(print),
        lambda p: p.numpy(),
        lambda p: p.item(),
        lambda p: p[0],
        lambda p: p.__setitem__(0, 1.0),
        lambda p: p.copy_(torch.zeros(3, 4)),
        lambda p: p.__iadd__(1),
        lambda p: p == p,
        lambda p: bool(p),
        lambda p: p.cuda(),
        lambda p: p.cpu(),
        lambda p: p.share_memory_(),
        lambda p: p.T,
        lambda p: p.untyped_storage(),
        lambda p: p.data_ptr(),
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda p: torch.save(p, io.BytesIO()),
        lambda p: torch.autograd.grad(torch.zeros((), requires_grad=True) * 1, p),
        lambda p: torch.autograd.backward([p]),
        lambda p: nn.utils.clip_grad_norm_([p], 1.0),
        lambda p: nn.utils.clip_grad_norm_([p], 1.0, foreach=True),
        lambda p: nn.utils.clip_grad_value_([p], 1.0),
        lambda p: nn.utils.get_total_norm([p]),
        lambda p: nn.utils.parameters_to_vector([p]),
        lambda p: nn.utils.vector_to_parameters(torch.zeros(12), [p]),
        lambda p: torch.optim.swa_utils.get_ema_multi_avg_fn()([p], [p], 1),
        lambda p: p.lerp_(torch.zeros(3, 4), 0.1),
    ],
)
def test_whatever_touches_a_value_or_gradient_names_our_methods(parameter, act):
    with pytest.raises(RemoteParameterError, match=r"model\.state_dict\(\) for values"):
        act(parameter)


OPTIMIZERS = ("ASGD", "Adadelta", "Adafactor", "Adam", "AdamW", "Adamax", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
              "Rprop", "SGD", "SparseAdam")  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_s_own_optimizers_and_scaler_are_refused(parameter, name):
    optimizer = getattr(torch.optim, name)([parameter])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    for act in (
        optimizer.step,
        optimizer.zero_grad,
        lambda: scaler.unscale_(optimizer),
        lambda: scaler.step(optimizer),
    ):
        with pytest.raises(RemoteParameterError, match=r"tensorlink\.DistributedOptimizer for updates"):
            act(lambda: torch.zeros(())) if name == "LBFGS" and act == optimizer.step else act()


def test_a_module_that_holds_one_is_neither_averaged_nor_copied_nor_saved(parameter):
    module = nn.Module()
    module.register_parameter("weight", parameter)
    for act in (
        lambda: AveragedModel(module),
        lambda: copy.deepcopy(module),
        lambda: pickle.dumps(module),
        lambda: torch.save(module, io.BytesIO()),
        lambda: torch.save(module.state_dict(), io.BytesIO()),
        lambda: module.to(torch.float32),
        lambda: module.requires_grad_(False),
        module.zero_grad,
    ):
        with pytest.raises(RemoteParameterError, match=r"model\.save_checkpoint\(\) to keep them"):
            act()


def test_adagrad_which_makes_its_state_at_once_is_refused_at_once(parameter):
    with pytest.raises(RemoteParameterError, match=r"tensorlink\.DistributedOptimizer for updates"):
        torch.optim.Adagrad([parameter])
