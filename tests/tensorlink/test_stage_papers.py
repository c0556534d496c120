"""What a rig keeps for auditors: the loss of each step, however losses alternate."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from smartnodes_core.errors import JobError
from smartnodes_core.records import NO_DIGEST, digest_of
from tensorlink.program.loss import trace_loss
from tensorlink.stage_papers import LOSS_DOMAIN, MAX_LOSSES, SPARE_ORDERS, StagePapers


def test_the_digest_is_the_one_that_orders_name():
    program = trace_loss(F.mse_loss, torch.zeros(4, 2), torch.zeros(4, 2))
    assert digest_of(LOSS_DOMAIN, program.to_json()) == program.digest


def test_each_step_is_opened_with_its_own_loss():
    papers = StagePapers(window_steps=4)
    one, two = digest_of(LOSS_DOMAIN, b"one"), digest_of(LOSS_DOMAIN, b"two")
    papers.add_loss(b"one")
    papers.add_order(0, b"order 0", one)
    papers.add_loss(b"two")
    papers.add_order(1, b"order 1", two)
    papers.add_order(2, b"order 2", NO_DIGEST)
    assert papers.of_step(0) == (b"order 0", b"one")
    assert papers.of_step(1) == (b"order 1", b"two")
    assert papers.of_step(2) == (b"order 2", b"")
    assert papers.of_step(9) == (b"", b"")


def test_papers_are_kept_within_bounds():
    papers = StagePapers(window_steps=4)
    for step in range(100):
        papers.add_loss(str(step).encode())
        papers.add_order(step, b"order", digest_of(LOSS_DOMAIN, str(step).encode()))
    kept = 4 + SPARE_ORDERS
    assert [papers.of_step(step)[0] for step in (99 - kept, 100 - kept)] == [b"", b"order"]
    assert papers.of_step(100 - MAX_LOSSES)[1] == str(100 - MAX_LOSSES).encode()
    assert papers.of_step(99 - MAX_LOSSES)[1] == b""


def test_there_is_no_program_before_the_stage_is_loaded():
    with pytest.raises(JobError, match="not loaded yet"):
        StagePapers(window_steps=4).the_program()
