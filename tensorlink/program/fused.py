"""Attention without data, as a CPU runs it: what it keeps for the backward is then what the estimate says.

Left to itself torch takes the unfused path on the meta device, which keeps every attention weight; the kernel that
CPUs have keeps its inputs, its output and a number per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of meta tensors; fused where a CPU would fuse it (`sdp_utils_cpp.cpp` of torch),
    and where there is no mask, the common case."""
    same = all(
        t.dim() == 4 and t.numel() and t.dtype == query.dtype and t.shape[-1] == query.shape[-1] and t.stride(-1) == 1
        for t in (query, key, value)
    )
    alike = query.shape[:2] == key.shape[:2] == value.shape[:2] and key.shape[2] == value.shape[2]
    if same and alike and query.dtype in _DTYPES and attn_mask is None and not dropout_p:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found: Tensor = fused(query, key, value, 0.0, is_causal, scale=scale)[0]
        return found
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
