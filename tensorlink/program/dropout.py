"""Dropout from a generator that the caller seeds, so that a step can be computed again bit for bit.

Each function does what torch's CPU kernel of that name does, with the mask drawn from a fresh generator: seeded
alike, torch's own `dropout` returns the same bits. Attention with dropout is written out as the softmax formula, for
the fused kernels draw their masks from the global generator; it therefore costs the memory of the whole attention
matrix. Neighbours: `interpreter.py` binds `seed_for` and the node's id; `ops.RANDOM` lists the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tensorlink.program.alignment import has_data

Seed = Callable[[int], int]

#: Constants of alpha dropout: the saturation value of SELU (Klambauer et al., 2017, arXiv:1706.02515).
_ALPHA = 1.7580993408473766


def noise(like: Tensor, p: float, seed: int) -> Tensor:
    """A tensor of zeros and ones in the shape, strides and dtype of `like`; ones with probability 1 - p."""
    drawn = torch.empty_like(like, requires_grad=False)
    if not has_data(like):
        return drawn
    generator = torch.Generator(device=like.device)
    generator.manual_seed(seed)
    return drawn.bernoulli_(1 - p, generator=generator)


def _channels(input: Tensor) -> Tensor:
    """Something of shape [batch, channel, 1, …]: feature dropout drops whole channels."""
    return input.new_empty([*input.shape[:2], *([1] * (input.dim() - 2))])


def dropout(seed_for: Seed, key: int, input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.dropout(input, p, train)` with the mask of node `key`."""
    return _dropout(seed_for, key, input, input, p, train)


def feature_dropout(seed_for: Seed, key: int, input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.feature_dropout(input, p, train)`: zeroes whole channels."""
    return _dropout(seed_for, key, input, _channels(input), p, train)


def alpha_dropout(seed_for: Seed, key: int, input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.alpha_dropout(input, p, train)`: keeps mean and variance of SELU's output."""
    return _alpha_dropout(seed_for, key, input, input, p, train)


def feature_alpha_dropout(seed_for: Seed, key: int, input: Tensor, p: float, train: bool) -> Tensor:
    """`torch.feature_alpha_dropout(input, p, train)`."""
    return _alpha_dropout(seed_for, key, input, _channels(input), p, train)


def _dropout(seed_for: Seed, key: int, input: Tensor, like: Tensor, p: float, train: bool) -> Tensor:
    _check_probability(p)
    if p == 0 or not train or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    return input * noise(like, p, seed_for(key)).div_(1 - p)


def _alpha_dropout(seed_for: Seed, key: int, input: Tensor, like: Tensor, p: float, train: bool) -> Tensor:
    _check_probability(p)
    if p == 0 or not train or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype, device=input.device)
    kept = noise(like, p, seed_for(key))
    a = 1.0 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
    shift = kept.add(-1).mul_(_ALPHA * a).add_(_ALPHA * a * p)
    return input * kept.mul_(a) + shift


def attention(
    seed_for: Seed,
    key_id: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    drop: Callable[[Seed, int, Tensor, float, bool], Tensor] = dropout,
) -> Tensor:
    """`scaled_dot_product_attention` with `dropout_p` > 0, by the formula in torch's documentation.

    Shapes as there: query [..., heads, L, E], key and value [..., heads, S, E]. Scales query and key by the root of
    the scale each, as torch's own mathematical form does. `drop` drops from the weights.
    """
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    root = math.sqrt(scale if scale is not None else 1.0 / math.sqrt(query.size(-1)))
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attention takes a mask or is_causal, found both")
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = drop(seed_for, key_id, torch.softmax(scores, dim=-1), dropout_p, True)
    return weights @ value


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability is to be between 0 and 1, found {p}")


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "aten.dropout.default": dropout,
    "aten.feature_dropout.default": feature_dropout,
    "aten.alpha_dropout.default": alpha_dropout,
    "aten.feature_alpha_dropout.default": feature_alpha_dropout,
}
