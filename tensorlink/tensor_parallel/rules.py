"""What an op makes of split arguments: per op a rule that rewrites its node, or says that it cannot.

A rule returns True when it has emitted the node, False when the values are to be gathered first. Products of matrices
start and end what is split; everything else carries it on. Neighbours: `rewriting.py` (calls them), `products.py`,
`carrying.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tensorlink.program.graph import Node
from tensorlink.program.ops import ATTENTION
from tensorlink.tensor_parallel import carrying, products

if TYPE_CHECKING:
    from tensorlink.tensor_parallel.rewriting import Rewriting

Rule = Callable[["Rewriting", Node], bool]

#: Ops at which a split can begin: they are looked at even where nothing is split yet.
STARTING = {
    "aten.linear.default": products.linear,
    "aten.addmm.default": products.addmm,
    "aten.matmul.default": products.matmul,
    "aten.mm.default": products.matmul,
    "aten.embedding.default": products.embedding,
}
RULES: dict[str, Rule] = {
    **STARTING,
    **dict.fromkeys(carrying.POINTWISE, carrying.pointwise),
    **dict.fromkeys(carrying.VIEWS, carrying.view),
    **dict.fromkeys(("aten.transpose.int", "aten.t.default", "aten.swapaxes.default"), carrying.transpose),
    **dict.fromkeys(("aten.layer_norm.default", "aten.rms_norm.default"), carrying.norm),
    **{f"aten.{name}": carrying.along_another for name in ("softmax.int", "slice.Tensor", "select.int", "unbind.int")},
    **{f"aten.{name}": carrying.pieces for name in ("split.Tensor", "split.sizes", "unsafe_split.Tensor")},
    **{
        f"aten.{name}": carrying.pieces
        for name in ("split_with_sizes.default", "chunk.default", "unsafe_chunk.default")
    },
    "aten.bmm.default": products.matmul,
    "aten.permute.default": carrying.permute,
    "aten.unsqueeze.default": carrying.unsqueeze,
    "aten.expand.default": carrying.expand,
    "aten.cat.default": carrying.cat,
    ATTENTION: carrying.attention,
    "getitem": carrying.item,
    "sym_size": carrying.size,
}
