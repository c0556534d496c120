"""What draws random numbers besides dropout, from a generator that the caller seeds: noise, RReLU, recurrent layers.

As in `dropout.py`, each function returns what torch's own returns on the CPU after `torch.manual_seed` with the same
seed. A recurrent layer with dropout is run one layer after the other with the masks drawn between them, as torch does
inside. Neighbours: `dropout.py`, `ops.py` (which calls are random), `interpreter.py` (binds `seed_for` and the id).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from tensorlink.program.alignment import has_data
from tensorlink.program.dropout import Seed


def _generator(seed_for: Seed, key: int, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(seed_for(key))
    return generator


def _filled(fill: str) -> Callable[..., Tensor]:
    """A factory: `size` and options as for `torch.empty`, filled in place by the method of this name."""

    def factory(seed_for: Seed, key: int, size: Sequence[int], **options: Any) -> Tensor:
        return _fill(fill, seed_for, key, torch.empty(size, **options))

    return factory


def _filled_like(fill: str) -> Callable[..., Tensor]:
    """The same in the shape and strides of a tensor; other positional arguments are the method's."""

    def factory(seed_for: Seed, key: int, like: Tensor, *args: float, **options: Any) -> Tensor:
        return _fill(fill, seed_for, key, torch.empty_like(like, requires_grad=False, **options), *args)

    return factory


def _fill(fill: str, seed_for: Seed, key: int, empty: Tensor, *args: float) -> Tensor:
    if has_data(empty):
        _FILLS[fill](empty, *args, generator=_generator(seed_for, key, empty.device))
    return empty


_FILLS: dict[str, Callable[..., Tensor]] = {
    "uniform": torch.Tensor.uniform_,
    "normal": torch.Tensor.normal_,
    "exponential": torch.Tensor.exponential_,
}


def randint(seed_for: Seed, key: int, low: int, high: int, size: Sequence[int], **options: Any) -> Tensor:
    """`torch.randint(low, high, size)`."""
    empty = torch.empty(size, **{"dtype": torch.int64, **options})
    if has_data(empty):
        empty.random_(low, high, generator=_generator(seed_for, key, empty.device))
    return empty


def bernoulli(seed_for: Seed, key: int, probabilities: Tensor) -> Tensor:
    """`torch.bernoulli(probabilities)`; has no gradient."""
    if not has_data(probabilities):
        return torch.empty_like(probabilities, requires_grad=False)
    return torch.bernoulli(probabilities.detach(), generator=_generator(seed_for, key, probabilities.device))


def bernoulli_p(seed_for: Seed, key: int, like: Tensor, p: float) -> Tensor:
    """`torch.bernoulli(like, p)`: zeros and ones of the same shape."""
    empty = torch.empty_like(like, requires_grad=False)
    return empty.bernoulli_(p, generator=_generator(seed_for, key, like.device)) if has_data(like) else empty


def rrelu(seed_for: Seed, key: int, input: Tensor, lower: float, upper: float, training: bool) -> Tensor:
    """`torch.rrelu(input, lower, upper, training=True)`: leaky, with a slope drawn for each element."""
    noise = torch.empty_like(input, requires_grad=False)
    if not has_data(input):
        return torch.ops.aten.rrelu_with_noise.default(input, noise, lower, upper, training)
    generator = _generator(seed_for, key, input.device)
    return torch.ops.aten.rrelu_with_noise.default(input, noise, lower, upper, training, generator)


def recurrent(layer: OpOverload) -> Callable[..., tuple[Tensor, ...]]:
    """`layer` (`lstm`, `gru` or an `rnn`) of several layers with dropout between them."""

    def call(
        seed_for: Seed,
        key: int,
        input: Tensor,
        states: Tensor | list[Tensor],
        weights: list[Tensor],
        biases: bool,
        num_layers: int,
        p: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        x = input.transpose(0, 1) if batch_first else input
        generator = _generator(seed_for, key, input.device) if has_data(input) else None
        of_layer = [states] if isinstance(states, Tensor) else states
        split = [state.chunk(num_layers) for state in of_layer]
        each = len(weights) // num_layers
        finals = []
        for index in range(num_layers):
            if index:
                noise = torch.empty_like(x, requires_grad=False)
                x = x * (noise if generator is None else noise.bernoulli_(1 - p, generator=generator).div_(1 - p))
            first = [state[index] for state in split]
            own = weights[index * each : (index + 1) * each]
            start: Any = first[0] if isinstance(states, Tensor) else first
            x, *final = layer(x, start, own, biases, 1, 0.0, train, bidirectional, False)
            finals.append(final)
        ends = [torch.cat(parts) for parts in zip(*finals, strict=True)]
        return (x.transpose(0, 1) if batch_first else x, *ends)

    return call


def normal(seed_for: Seed, key: int, mean: float, std: float, size: Sequence[int], **options: Any) -> Tensor:
    """`torch.normal(mean, std, size)`."""
    empty = torch.empty(size, **options)
    return empty.normal_(mean, std, generator=_generator(seed_for, key, empty.device)) if has_data(empty) else empty


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "aten.rand.default": _filled("uniform"),
    "aten.randn.default": _filled("normal"),
    "aten.rand_like.default": _filled_like("uniform"),
    "aten.randn_like.default": _filled_like("normal"),
    "aten.uniform.default": _filled_like("uniform"),
    "aten.normal_functional.default": _filled_like("normal"),
    "aten.exponential.default": _filled_like("exponential"),
    "aten.randint.low": randint,
    "aten.randint.default": lambda seed_for, key, high, size, **options: randint(
        seed_for, key, 0, high, size, **options
    ),
    "aten.normal.float_float": normal,
    "aten.bernoulli.default": bernoulli,
    "aten.bernoulli.p": bernoulli_p,
    "aten.rrelu.default": rrelu,
    "aten.lstm.input": recurrent(torch.ops.aten.lstm.input),
    "aten.gru.input": recurrent(torch.ops.aten.gru.input),
    "aten.rnn_tanh.input": recurrent(torch.ops.aten.rnn_tanh.input),
    "aten.rnn_relu.input": recurrent(torch.ops.aten.rnn_relu.input),
}
