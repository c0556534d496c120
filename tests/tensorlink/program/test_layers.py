"""torch.nn, class by class and function by function: bit for bit eager, or refused for the reason in docs/models.md."""

from __future__ import annotations

import inspect
import warnings

import pytest
import tables
import torch
from layers import FUNCTIONS, MODULES
from stage_chain import assert_equal_to_eager
from torch import nn
from torch.nn import functional as F

from tensorlink.errors import TraceError
from tensorlink.program.trace import trace

#: Bases, containers that other cases hold, and what replicates a module over devices of one process.
NOT_LAYERS = {"Container", "DataParallel", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList"} | {
    "RNNBase",
    "RNNCellBase",
}
#: The in-place and with-indices forms of functions in the table, and products of 8-bit floats for some GPUs.
NOT_FUNCTIONS = {
    "elu_", "hardtanh_", "leaky_relu_", "relu_", "rrelu_", "selu_", "celu_", "threshold_",
    "adaptive_max_pool1d_with_indices", "adaptive_max_pool2d_with_indices", "adaptive_max_pool3d_with_indices",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "grouped_mm", "scaled_grouped_mm", "scaled_mm",
    "assert_int_or_pair", "boolean_dispatch", "handle_torch_function",
}  # fmt: skip
SEED = 99

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", [*MODULES, *(f"F.{name}" for name in FUNCTIONS)])
def test_a_layer_is_bitwise_equal_to_eager_or_refused_for_a_known_reason(name: str) -> None:
    make, inputs = FUNCTIONS[name[2:]] if name.startswith("F.") else MODULES[name]
    torch.manual_seed(0)
    module = make()
    if name in tables.REFUSED_LAYERS:
        with pytest.raises(TraceError, match=tables.REFUSED_LAYERS[name].message):
            trace(module, inputs(3))
        return
    traced = trace(module, inputs(3))
    for training in (True, False):
        assert_equal_to_eager(module, traced, [traced.whole()], inputs, training, sizes=(3, 2), seed=SEED)


def test_every_module_class_of_torch_nn_has_a_case() -> None:
    classes = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    assert classes - NOT_LAYERS == {name.split("(")[0] for name in MODULES} & classes


def test_every_function_of_torch_nn_functional_has_a_case() -> None:
    homes = ("torch.nn.functional", "torch._C._nn", "torch._jit_internal", None)
    functions = {
        name
        for name, function in vars(F).items()
        if callable(function)
        and not inspect.isclass(function)
        and not name.startswith("_")
        and getattr(function, "__module__", "") in homes
    }
    assert functions - NOT_FUNCTIONS == {name.split("(")[0] for name in FUNCTIONS} & functions


def test_the_table_of_layers_in_the_docs_is_that_of_the_tests() -> None:
    assert tables.layer_rows() == tables.rows_of_docs("## Layers that are refused")


def test_a_seeded_layer_draws_other_numbers_from_another_seed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("LSTM(dropout)", "RReLU", "FractionalMaxPool2d", "F.gumbel_softmax"):
            make, inputs = FUNCTIONS[name[2:]] if name.startswith("F.") else MODULES[name]
            module = make()
            traced = trace(module, inputs(3))
            with pytest.raises(AssertionError):
                assert_equal_to_eager(module, traced, [traced.whole()], inputs, True, sizes=(3,))
