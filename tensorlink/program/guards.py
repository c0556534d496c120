"""What some kernels of torch trust their arguments with, checked before they are called.

Each guard takes the arguments of its op and raises ValueError. Those over shapes serve the dry run too; those over data
(labels, offsets, divisors) do nothing where there is none. Every one of them stands for a crash, a read out of bounds
or an endless loop that was found in torch 2.13; `tests/tensorlink/program/test_hostile.py` has the programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tensorlink.program.alignment import has_data

MAX_PIECES = 4096
MAX_TIME_STEPS = 1 << 14
#: The multivariate gamma function adds up this many terms for every element.
MAX_GAMMA_TERMS = 64

#: Gates of a recurrent layer: how many times the hidden size its weights have rows.
_GATES = {"aten.lstm.input": 4, "aten.gru.input": 3, "aten.rnn_tanh.input": 1, "aten.rnn_relu.input": 1}
RECURRENT = frozenset(_GATES)


def _few_pieces(count: int) -> None:
    if count > MAX_PIECES:
        raise ValueError(f"{count} pieces: at most {MAX_PIECES}")


def _split(self: Tensor, split_size: int, dim: int = 0) -> None:
    _few_pieces(-(-self.shape[dim] // max(split_size, 1)))


def _chunk(self: Tensor, chunks: int, dim: int = 0) -> None:
    _few_pieces(chunks)


def _tensor_split(self: Tensor, sections: int, dim: int = 0) -> None:
    _few_pieces(sections)


def _unbind(self: Tensor, dim: int = 0) -> None:
    _few_pieces(self.shape[dim])


def _division(self: Any, other: Any, *, rounding_mode: str | None = None) -> None:
    """The least integer by -1 is a number that does not exist, and a SIGFPE."""
    operands = [item for item in (self, other) if isinstance(item, Tensor)]
    if rounding_mode is None or any(item.is_floating_point() or not has_data(item) for item in operands):
        return
    if isinstance(other, float) or isinstance(self, float):
        return
    dtype = torch.result_type(self, other)
    if dtype == torch.bool or not bool((_as_tensor(other) == -1).any()):
        return
    if dtype.is_signed and bool((_as_tensor(self) == torch.iinfo(dtype).min).any()):
        raise ValueError(f"the least {str(dtype)[6:]} is divided by -1")


def _as_tensor(item: Any) -> Tensor:
    return item if isinstance(item, Tensor) else torch.tensor(item)


def _gamma(self: Tensor, p: int) -> None:
    if p > MAX_GAMMA_TERMS:
        raise ValueError(f"a gamma function of {p} terms: at most {MAX_GAMMA_TERMS}")


def _ctc(log_probs: Tensor, targets: Tensor, *_: Any, **__: Any) -> None:
    """Labels index the probabilities unchecked."""
    if log_probs.dim() not in (2, 3):
        raise ValueError(f"log_probs of {log_probs.dim()} dimensions: 2 or 3 are needed")
    if not has_data(targets) or not targets.numel():
        return
    least, most = (int(item) for item in torch.aminmax(targets))
    if least < 0 or most >= log_probs.shape[-1]:
        raise ValueError(f"labels {least} to {most}: there are {log_probs.shape[-1]} classes")


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    *_: Any,
    **__: Any,
) -> None:
    """Offsets cut the indices unchecked."""
    if indices.dim() != 1 or offsets.dim() != 1 or not 0 <= mode <= 2:
        raise ValueError("one dimension of indices, one of offsets and a mode of 0 to 2 are needed")
    if not has_data(offsets) or not offsets.numel():
        return
    if int(offsets[0]) or bool((offsets.diff() < 0).any()) or int(offsets[-1]) > indices.numel():
        raise ValueError(f"offsets rise from 0 to at most the {indices.numel()} indices")


def _recurrent(gates: int) -> Callable[..., None]:
    def guard(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> None:
        """The fused kernels read weights and states by the shapes that these should have."""
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        ways, per_layer = 1 + bidirectional, 2 + 2 * has_biases
        if not 1 <= num_layers <= len(params) or input.dim() != 3 or len(states) != (2 if gates == 4 else 1):
            raise ValueError(f"{num_layers} layers over {input.dim()} dimensions, {len(states)} states do not fit")
        projected = gates == 4 and len(params) == num_layers * ways * (per_layer + 1)
        if len(params) != num_layers * ways * (per_layer + projected) or any(item.dim() != 2 for item in params[:2]):
            raise ValueError(f"{len(params)} weights for {num_layers} layers in {ways} directions")
        steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
        if not 1 <= steps <= MAX_TIME_STEPS:
            raise ValueError(f"a recurrent layer over {steps} time steps: 1 to {MAX_TIME_STEPS}")
        hidden, output = params[1].shape[0] // gates, params[1].shape[1]
        wanted: list[tuple[int, ...]] = [(num_layers * ways, batch, output), (num_layers * ways, batch, hidden)]
        wanted = wanted[: len(states)]
        for layer, _ in product(range(num_layers), range(ways)):
            entering = input.shape[2] if layer == 0 else output * ways
            wanted += [(gates * hidden, entering), (gates * hidden, output), *[(gates * hidden,)] * (2 * has_biases)]
            wanted += [(output, hidden)] * projected
        if not projected and output != hidden:
            raise ValueError(f"a hidden size of {hidden} with states of {output}")
        for found, shape in zip([*states, *params], wanted, strict=True):
            if tuple(found.shape) != shape or found.dtype != input.dtype or not found.is_floating_point():
                raise ValueError(f"{str(found.dtype)[6:]} {list(found.shape)} where {list(shape)} is needed")

    return guard


#: By the name of the op.
GUARDS: dict[str, Callable[..., None]] = {
    "aten.split.Tensor": _split,
    "aten.unsafe_split.Tensor": _split,
    "aten.chunk.default": _chunk,
    "aten.unsafe_chunk.default": _chunk,
    "aten.tensor_split.sections": _tensor_split,
    "aten.unbind.int": _unbind,
    "aten.div.Tensor_mode": _division,
    "aten.div.Scalar_mode": _division,
    "aten.mvlgamma.default": _gamma,
    "aten.ctc_loss.IntList": _ctc,
    "aten.ctc_loss.Tensor": _ctc,
    "aten.embedding_bag.padding_idx": _embedding_bag,
    **{name: _recurrent(gates) for name, gates in _GATES.items()},
}


def guarded(guard: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` after `guard` has seen its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        guard(*args, **kwargs)
        return function(*args, **kwargs)

    return call
