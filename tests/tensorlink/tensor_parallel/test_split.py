"""Parts of tensors and the whole that they are parts of, and where a split goes in a view."""

from __future__ import annotations

import pytest
import torch

from tensorlink.tensor_parallel.reshapes import carried
from tensorlink.tensor_parallel.split import Split


@pytest.mark.parametrize("split", [Split(0), Split(1), Split(0, 3), Split(2, 2)], ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_make_the_whole_again(split, num_parts):
    whole = torch.arange(18 * 6 * 12.0).view(18, 6, 12)
    assert split.fits(whole.shape, num_parts)
    parts = [split.part(whole, index, num_parts) for index in range(num_parts)]
    assert torch.equal(split.whole(parts), whole)
    assert {part.numel() for part in parts} == {whole.numel() // num_parts}
    assert all(part.untyped_storage().nbytes() == part.numel() * 4 for part in parts)


def test_a_part_of_three_blocks_is_a_part_of_each():
    assert Split(0, 3).part(torch.arange(12), 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize(
    ("before", "after", "split", "goes"),
    [
        ((5, 7, 48), (5, 7, 3, 4, 4), Split(2, 3), Split(3)),  # query, key and value, by heads
        ((5, 7, 48), (5, 7, 3, 4, 4), Split(2), None),  # half of everything is not half of each
        ((5, 7, 16), (5, 7, 4, 4), Split(2), Split(2)),
        ((5, 7, 16), (35, 16), Split(2), Split(1)),
        ((5, 4, 7, 4), (20, 7, 4), Split(1), None),  # would be as many blocks as the batch has samples
        ((5, 7, 4, 4), (5, 7, 16), Split(2), Split(2)),
        ((5, 7, 4, 4), (5, 7, 16), Split(3), None),
        ((1, 6, 1), (6,), Split(1), Split(0)),
        ((0, 6), (6, 0), Split(1), None),
    ],
)
def test_a_view_carries_a_split_on_where_parts_stay_parts(before, after, split, goes):
    assert carried(before, after, split, 2) == goes
    if goes is not None:
        whole = torch.arange(torch.Size(before).numel()).view(before)
        for index in range(2):
            expected = goes.part(whole.view(after), index, 2)
            assert torch.equal(split.part(whole, index, 2).reshape(expected.shape), expected)
