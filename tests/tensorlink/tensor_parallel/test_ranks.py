"""Ranks do the same work at the same time; one that fails alone ends them all."""

from __future__ import annotations

import threading

import pytest
import torch

from tensorlink.tensor_parallel import ranks as module


def test_each_rank_gives_its_own_and_sums_are_the_same_bits(ranks):
    given = [torch.randn(1000), torch.randn(1000)]
    first, second = ranks.each(lambda group: group.all_reduce(given[group.rank].clone()))
    assert torch.equal(first, second)
    assert torch.equal(first, given[0] + given[1])


def test_what_fails_on_all_ranks_fails_and_they_go_on(ranks):
    def fail(group):
        raise ValueError("both")

    with pytest.raises(ValueError, match="both"):
        ranks.each(fail)
    assert ranks.each(lambda group: group.rank) == [0, 1]


def test_the_mode_of_the_caller_is_that_of_the_ranks(ranks):
    with torch.no_grad():
        assert ranks.each(lambda group: torch.is_grad_enabled()) == [False, False]
    assert ranks.each(lambda group: torch.is_grad_enabled()) == [True, True]


def test_a_rank_that_fails_alone_is_the_end(losing_ranks):
    def fail(group):
        if group.rank == 1:
            raise MemoryError("no more")

    with pytest.raises(losing_ranks.Lost, match="a rank was lost: MemoryError: no more"):
        losing_ranks.each(fail)


def test_a_rank_that_others_wait_for_in_vain_is_the_end(losing_ranks, monkeypatch):
    """The others' collective runs into its timeout, and it is given up."""
    monkeypatch.setattr(module, "GRACE_S", 0.1)
    hanging = threading.Event()

    def hang(group):
        if group.rank == 1:
            hanging.wait(30)
        else:
            group.all_reduce(torch.zeros(1))

    with pytest.raises(losing_ranks.Lost, match=r"a rank was lost.*[Tt]imed out"):
        losing_ranks.each(hang)
    hanging.set()
