"""Where a split dimension goes when a tensor is viewed in another shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tensorlink.tensor_parallel.split import Split


def carried(before: Sequence[int], after: Sequence[int], split: Split, num_parts: int) -> Split | None:
    """The split of the view, or None where the parts of one are not the parts of the other.

    A view keeps the order of elements: before the split axis lie as many as the dimensions to its left and the blocks
    have together, and the same must hold of the dimension that is split afterwards.
    """
    for into, out in _groups(before, after):
        if split.dim not in into:
            continue
        outer = math.prod(before[dim] for dim in into if dim < split.dim) * split.blocks
        for dim in out:
            left = math.prod(after[other] for other in out if other < dim)
            blocks = outer // left
            # more blocks than before would be a matter of the sizes to the left, the batch among them
            if outer % left == 0 and 1 <= blocks <= split.blocks and after[dim] % (blocks * num_parts) == 0:
                return Split(dim, blocks)
    return None


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Runs of dimensions that hold the same elements before and after."""
    if 0 in before or 0 in after:
        return
    at, to = 0, 0
    while at < len(before) and to < len(after):
        first, last, left, right = at, to, before[at], after[to]
        while left != right:
            if left < right:
                at += 1
                left *= before[at]
            else:
                to += 1
                right *= after[to]
        at, to = at + 1, to + 1
        yield range(first, at), range(last, to)
