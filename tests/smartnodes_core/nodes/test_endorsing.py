"""Whoever signed a round is paid for it, also where its executor sent fewer signatures than there were."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from smartnodes_core import ballots
from smartnodes_core.chain.base import NoFundsError
from smartnodes_core.rounds import draw_proposers

from .conftest import NETWORK
from .test_rounding import Booth


@pytest.fixture
def left_out(make_net: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Seven validators have signed, five signatures were sent: (network, the endorsers of the others as drawn)."""
    monkeypatch.setattr(ballots, "SPARE_SIGNATURES", 0)
    net = make_net(num_validators=7)
    net.start()
    booth = Booth(net, eventually)
    booth.carry()
    net.model.settings = replace(net.model.settings, round_interval_s=60)
    content = booth.proposer.role.rounds.ballots.box(booth.state).motions[0].content
    eventually(lambda: all(len(v.role.rounds.ballots.signatures_of(content)) == 7 for v in net.validators))
    state = net.user.chain.round_state(NETWORK)
    found = {}
    for validator in net.validators:
        validator.role.rounds.books.follow(state)
        if validator.role.rounds._endorser.is_waiting(state):
            found[validator.account] = validator.role.rounds._endorser
    order = draw_proposers(found, 1)
    return net, [found[account] for account in order]


def count_endorsements(net: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many signatures each endorsement had."""
    sent: list[int] = []
    endorse = net.model.endorse

    def counted(network_id: int, signatures: Any) -> None:
        sent.append(len(signatures))
        endorse(network_id, signatures)

    monkeypatch.setattr(net.model, "endorse", counted)
    return sent


def test_those_left_out_are_added_by_one_of_them_in_one_transaction(
    left_out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (first, second) = left_out
    sent, chain = count_endorsements(net, monkeypatch), net.user.chain
    state = chain.round_state(NETWORK)
    assert len(chain.executed_round(NETWORK, 1).signers) == 5
    second.endorse(state)
    assert sent == []  # its turn comes half a minute later at most
    assert 0 < second._from_s - time.monotonic() <= 30
    first.endorse(state)
    assert sent == [2]
    assert set(chain.executed_round(NETWORK, 1).signers) == {validator.account for validator in net.validators}
    second._from_s = time.monotonic()
    for endorser in (first, second):
        endorser.endorse(state)
        assert not endorser.is_waiting(state)
    assert sent == [2]


def test_where_the_first_of_them_has_vanished_the_next_adds_both(left_out: Any) -> None:
    net, (_, second) = left_out
    state = net.user.chain.round_state(NETWORK)
    second.endorse(state)
    second._from_s = time.monotonic()
    second.endorse(state)
    assert len(net.user.chain.executed_round(NETWORK, 1).signers) == 7


def test_an_endorsement_that_cannot_be_paid_for_is_tried_again_until_the_next_round_is_due(
    left_out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (first, _) = left_out
    state = net.user.chain.round_state(NETWORK)
    endorse = first._chain.endorse_round

    def no_funds(*args: Any) -> None:
        raise NoFundsError("nothing left")

    monkeypatch.setattr(first._chain, "endorse_round", no_funds)
    first.endorse(state)
    assert first.is_waiting(state)
    assert not first.is_waiting(replace(state, chain_time_s=state.earliest_at_s))
    monkeypatch.setattr(first._chain, "endorse_round", endorse)
    first.endorse(state)
    assert not first.is_waiting(state)
    assert len(net.user.chain.executed_round(NETWORK, 1).signers) == 7


def test_every_signer_of_every_round_shares_the_next_ones_part(
    make_net: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ballots, "SPARE_SIGNATURES", 0)
    net = make_net()
    net.start(rounds=True)
    chain = net.user.chain
    everybody = {validator.account for validator in net.validators}

    def all_paid() -> bool:
        last = chain.round_state(NETWORK).number
        rounds = [chain.executed_round(NETWORK, number) for number in range(1, last)]
        return len([1 for each in rounds if set(each.signers) == everybody]) >= 2

    eventually(all_paid)
    books = net.validators[0].role.rounds.books
    eventually(lambda: everybody <= books.rewards.totals_wei.keys())
