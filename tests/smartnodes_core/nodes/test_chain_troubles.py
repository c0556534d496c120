"""Validators as processes on a real chain that takes rounds back, or is away for minutes. Long, so behind options."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest

from smartnodes_core.chain.devnet.anvil import AnvilProcess
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.settings import SNO

from ..chain.conftest import rpc
from .test_validator_processes import INTERVAL_S, NETWORK, Town, town

__all__ = ["town"]


def nobody_was_harmed(town_: Town, *ended: int) -> None:
    """All four count, and have all of their stakes: nobody was proven to have signed twice, and none has failed but
    those that `ended` when they were started without a chain."""
    assert town_.live() == {0, 1, 2, 3}
    assert all(town_.stake_wei(number) == 1_000_000 * SNO for number in range(4))
    assert all(process.poll() is None for process in town_.processes.values())
    logs = [(town_.folder / str(number) / "log").read_text() for number in range(4)]
    assert not any("signed twice" in log for log in logs)
    assert not any("Traceback" in log for number, log in enumerate(logs) if number not in ended)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["embedded", "anvil"])
def test_rounds_go_on_when_the_chain_takes_the_last_ones_back(
    kind: str, town: Callable[..., Town], pytestconfig: pytest.Config
) -> None:
    num_reorgs = pytestconfig.getoption("--chain-reorgs")
    program = shutil.which("anvil")
    if not num_reorgs or (kind == "anvil" and program is None):
        pytest.skip("takes 20 s: --chain-reorgs=1, for anvil where that is on the PATH")
    chain = DevnetProcess if kind == "embedded" else lambda: AnvilProcess(str(program))
    town_ = town("honest", "honest", "honest", "honest", chain=chain)
    town_.until(lambda: town_.round >= 2)
    draw = random.Random(11)
    for _ in range(num_reorgs):
        threading.Event().wait(draw.uniform(0.0, INTERVAL_S))  # somewhere in the middle of a round
        snapshot, kept = rpc(town_.devnet.url, "evm_snapshot"), town_.round
        undone = kept + draw.randint(1, 3)
        town_.until(lambda undone=undone: town_.round >= undone)
        digests = {each: digest_of(town_, each) for each in range(1, undone + 1)}
        assert rpc(town_.devnet.url, "evm_revert", snapshot)
        town_.until(lambda undone=undone: town_.round >= undone + 2)
        assert all(digest_of(town_, each) == digests[each] for each in range(1, kept + 1))
        nobody_was_harmed(town_)
    last = town_.round
    town_.until(lambda: town_.signers_since(last + 1) == {0, 1, 2, 3})
    allotted = town_.allotments_wei()
    assert len(allotted) == town_.round
    state = town_.chain.round_state(NETWORK)
    assert state.unclaimed_wei >= sum(allotted[:last])  # what undone rounds had minted is gone with them


def digest_of(town_: Town, number: int) -> bytes:
    executed = town_.chain.executed_round(NETWORK, number)
    assert executed is not None
    return executed.digest


@pytest.mark.timeout(1800)
def test_validators_outlast_a_chain_that_is_away_for_minutes(
    town: Callable[..., Town], pytestconfig: pytest.Config
) -> None:
    away_s = pytestconfig.getoption("--chain-away-s")
    if not away_s:
        pytest.skip("takes minutes: --chain-away-s=180")
    town_ = town("honest", "honest", "honest", "honest")
    town_.until(lambda: town_.round >= 2)
    before, port = town_.round, int(town_.devnet.url.rsplit(":", 1)[1])
    town_.devnet.process.kill()
    town_.devnet.process.wait()
    threading.Event().wait(away_s / 2)
    town_.kill(3)  # one dies meanwhile, and starts while there is no chain
    town_._launch(3)
    threading.Event().wait(away_s / 2)
    town_.devnet = DevnetProcess(port, town_.folder / "chain.journal")
    assert town_.round >= before
    last: Any = town_.round
    town_.until(lambda: town_.round >= last + 3)
    has_ended = town_.processes[3].poll() is not None
    if has_ended:  # without a chain a start is an error that says so
        assert "no answer from the chain" in (town_.folder / "3" / "log").read_text()
        town_.kill(3)
        town_.restart(3)
    else:
        town_._wait(3)
    again = town_.round
    town_.until(lambda: town_.signers_since(again + 1) == {0, 1, 2, 3})
    nobody_was_harmed(town_, *([3] if has_ended else []))
    # of what lapsed while it was away no round has taken more than two intervals' worth
    assert max(town_.allotments_wei()) <= 9375 * SNO // 10 * 2 * INTERVAL_S // 600 * 15 // 100
