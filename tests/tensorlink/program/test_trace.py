"""Tracing leaves the module alone, and says what it cannot trace, where, and what to do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorlink.errors import TensorError, TraceError
from tensorlink.program.inputs import flatten_inputs, rebuild_outputs, split, unflatten_outputs
from tensorlink.program.interpreter import Interpreter
from tensorlink.program.trace import trace, trace_loss


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, -1)


class Chosen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Routed(nn.Module):
    """A mixture of two experts that picks the rows of each."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Stops(nn.Module):
    """Iterates until it has converged."""

    def forward(self, x: Tensor) -> Tensor:
        error = (x - x.cos()).abs().max()
        while error > 1e-3:
            x = x.cos()
            error = (x - x.cos()).abs().max()
        return x


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm()
        if norm.item() > 1:
            x = x / norm
        return x


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return object()


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x


def _line(module: type[nn.Module], text: str) -> str:
    lines, start = inspect.getsourcelines(module)
    offset = next(at for at, line in enumerate(lines) if text in line)
    return f"test_trace.py:{start + offset}"


@pytest.mark.parametrize(
    ("module", "text", "remedy"),
    [
        (Branches, "if x.sum()", "torch.where"),
        (Routed, "nonzero()", "set_experts_implementation|torch.where"),
        (Stops, "while error", r"torch\.cond"),
        (Clipped, "if norm.item()", r"torch\.where"),
        (StraightThrough, "Rounded.apply(x)", r"detach\(\)"),
        (Chosen, "x[x > 0]", "values of its data|allowlist"),
        (Fails, "x @ x", "cannot be traced"),
        (Written, "mul_", "make it a buffer"),
    ],
)
def test_an_untraceable_model_gets_an_error_with_its_line_and_a_remedy(
    module: type[nn.Module], text: str, remedy: str
) -> None:
    with pytest.raises(TraceError, match=remedy) as caught:
        trace(module(), (torch.randn(3, 4),))
    assert _line(module, text) in str(caught.value)


def test_a_batch_size_written_as_a_number_is_explained() -> None:
    with pytest.raises(TraceError, match=r"batch size.*x\.shape\[0\]"):
        trace(FixedBatch(), (torch.randn(3, 4),))


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TraceError, match="returns a object"):
        trace(Opaque(), (torch.randn(3, 4),))


def test_an_error_quotes_the_code_of_its_line() -> None:
    with pytest.raises(TraceError, match=r"if x\.sum\(\) > 0:"):
        trace(Branches(), (torch.randn(3, 4),))


def test_functions_with_a_backward_of_their_own_work_again_after_a_trace() -> None:
    with pytest.raises(TraceError):
        trace(StraightThrough(), (torch.randn(3, 4),))
    x = torch.randn(3, requires_grad=True)
    Rounded.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_autocast_to_a_dtype_that_it_has_not_is_refused() -> None:
    with pytest.raises(TraceError, match=r"torch\.bfloat16 or torch\.float16"):
        trace(nn.Linear(4, 2), (torch.randn(3, 4),), autocast=torch.float64)


def test_an_lstm_under_autocast_is_refused_with_the_remedy() -> None:
    with pytest.raises(TraceError, match="enabled=False"):
        trace(nn.LSTM(4, 4, batch_first=True), (torch.randn(2, 3, 4),), autocast=torch.bfloat16)


@pytest.mark.parametrize("training", [True, False])
def test_the_module_keeps_its_modes_and_state(training: bool) -> None:
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5))
    module.train(training)
    module[1].train(not training)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generator = torch.get_rng_state()
    trace(module, (torch.randn(2, 2, 8),))
    assert [child.training for child in module] == [training, not training, training]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert generator.shape == torch.get_rng_state().shape


def test_an_lstm_runs_eagerly_after_it_was_traced() -> None:
    module, x = nn.LSTM(4, 4, batch_first=True), torch.randn(2, 3, 4)
    expected = module(x)[0]
    trace(module, (x,))
    assert torch.equal(module(x)[0], expected)


def test_an_example_of_one_sample_is_enough() -> None:
    module = nn.Linear(4, 2)
    program = trace(module, (torch.randn(1, 4),)).whole()
    assert program.inputs.slots[0].shape == [-1, 4]


def test_tied_parameters_have_one_name_and_aliases() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    traced = trace(module, (torch.randn(2, 4),))
    assert list(traced.parameters) == ["0.weight"]
    assert traced.aliases == {"1.weight": "0.weight"}
    assert traced.state_names == ("0.weight", "1.weight")


class Nested(nn.Module):
    def forward(self, x: Tensor, *, extra: dict[str, Tensor], flag: bool = True) -> dict[str, Any]:
        return {"sum": x + extra["shift"], "pair": (x, [extra["shift"]]), "flag": flag}


def test_inputs_and_outputs_keep_their_structure() -> None:
    example = {"x": torch.randn(3, 2), "extra": {"shift": torch.randn(3, 2)}, "flag": False}
    traced = trace(Nested(), example)
    assert traced.input_names == ("x", "extra.shift")
    inputs = flatten_inputs(traced, (example["x"],), {"extra": example["extra"], "flag": False})
    program = traced.whole()
    outputs = Interpreter(program.eval, {}, {}, cut=program.inputs).run(inputs)
    assert traced.output_spec == [
        "dict",
        [["sum", 0], ["pair", ["tuple", [1, ["list", [2]]]]], ["flag", ["constant", False]]],
    ]
    found = unflatten_outputs(traced, outputs)
    assert torch.equal(found["pair"][1][0], example["extra"]["shift"])
    assert found["flag"] is False
    assert rebuild_outputs(traced.output_spec, outputs).keys() == found.keys()


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.randn(3, 2),), {}, "missing"),
        ((), {"x": torch.randn(3, 2), "extra": {"shift": torch.randn(3, 2)}, "flag": True}, "fixed"),
        ((), {"x": torch.randn(3, 2), "extra": {"other": torch.randn(3, 2)}, "flag": False}, "structure"),
        ((), {"x": torch.randn(3, 2), "extra": {"shift": torch.randn(4, 2)}, "flag": False}, "batches"),
        ((), {"x": torch.randn(3, 5), "extra": {"shift": torch.randn(3, 2)}, "flag": False}, r"\[3, 5\].*\[-1, 2\]"),
        (
            (),
            {"x": torch.zeros(3, 2, dtype=torch.int64), "extra": {"shift": torch.randn(3, 2)}, "flag": False},
            "int64",
        ),
        ((1, 2, 3), {}, "does not fit"),
    ],
)
def test_a_call_that_does_not_fit_says_what_was_found_and_needed(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    traced = trace(Nested(), {"x": torch.randn(3, 2), "extra": {"shift": torch.randn(3, 2)}, "flag": False})
    with pytest.raises(TensorError, match=message):
        flatten_inputs(traced, args, kwargs)


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


def test_micro_batches_are_uneven_where_they_must_be_and_static_inputs_go_whole() -> None:
    traced = trace(Scaled(), (torch.randn(4, 2), torch.randn(2)))
    inputs = [torch.randn(17, 2), torch.randn(2)]
    pieces = split(traced, inputs, 8)
    assert [len(piece[0]) for piece in pieces] == [3, 2, 2, 2, 2, 2, 2, 2]
    assert all(piece[1] is inputs[1] for piece in pieces)
    assert len(split(traced, [torch.randn(3, 2), inputs[1]], 8)) == 3


def test_an_input_of_the_batch_size_can_be_named_static() -> None:
    traced = trace(Scaled(), (torch.randn(4, 4), torch.randn(4)), static_inputs=["scale"])
    assert [slot.shape for slot in traced.inputs.slots] == [[-1, 4], [4]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y, t: y - t, "scalar"),
        (lambda y, t: {"loss": (y - t).mean(), "other": y}, "scalar"),
        (nn.Bilinear(2, 2, 1), "trainable"),
    ],
)
def test_a_loss_that_cannot_be_one_is_refused(function: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace_loss(function, torch.randn(3, 2), torch.randn(3, 2))
