"""A rewards root that a quorum set wrongly is frozen by a validator that recomputed it, and corrected by a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from smartnodes_core.chain.proposal import CORRECT, UPHOLD
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.nodes.rewards import reward_root

from .conftest import NETWORK


@pytest.fixture
def slow(make_net: Any) -> Any:
    """Roots become final half a minute after their round."""
    net = make_net()
    net.model.settings = replace(net.model.settings, claim_delay_s=30)
    net.start()
    return net


def due(net: Any, eventually: Any) -> Any:
    """The state when a round is due, with everybody having looked at it."""
    chain = net.user.chain
    eventually(lambda: chain.round_state(NETWORK).chain_time_s >= chain.round_state(NETWORK).earliest_at_s)
    state = chain.round_state(NETWORK)
    for validator in net.validators:
        desk = validator.role.rounds
        desk.books.follow(state)
        desk._remember(state, desk.books.proposers(state))
    return state


def carry(net: Any, state: Any, content: Any, proposal: Any) -> None:
    """A quorum signs whatever it is; afterwards its validators know nothing of having done so."""
    digest = net.model.domain.digest(content)
    net.validators[0].role.rounds.books._kept[digest] = proposal  # who wants to know what was executed can
    net.user.chain.execute_round(content, [sign_digest(each.account_key, digest) for each in net.validators[:3]])


def start(net: Any) -> None:
    for validator in net.validators:
        validator.role.rounds.start()


def test_an_inflated_root_is_frozen_and_the_next_round_corrects_it(slow: Any, eventually: Any) -> None:
    net, chain = slow, slow.user.chain
    job = net.open()
    net.work(job, range(4))
    eventually(lambda: net.everyone_has(16, job))
    state = due(net, eventually)
    candidate = net.validators[0].role.rounds._propose(state, 0, 4)
    thief = net.workers[2].account
    stolen = {**candidate.totals_wei, thief: 10**12}
    content = replace(
        candidate.content,
        rewards_root=reward_root(chain, NETWORK, stolen),
        allotment_wei=candidate.content.allotment_wei + 10**12,
    )
    assert candidate.content.allotment_wei > 0
    proposal = msgspec.structs.replace(candidate.proposal, content=content.encode())
    carry(net, state, content, proposal)
    with net.model.lock:
        before = [net.model.tokens[validator.account] for validator in net.validators]
    start(net)
    books = [validator.role.rounds.books for validator in net.validators]
    eventually(lambda: any(each.ruling for each in books[0].executed))
    ruled = next(each for each in books[0].executed if each.ruling)
    assert (ruled.ruling, ruled.ruled_round) == (CORRECT, 1)
    eventually(lambda: all(each._number >= ruled.round for each in books))
    assert chain.round_state(NETWORK).frozen_from == 0
    with net.model.lock:
        assert [net.model.tokens[validator.account] for validator in net.validators] == before  # the bond is back
        roots = net.model.peek(NETWORK).roots
        assert 1 not in roots
    eventually(lambda: all(each.rewards.knows(chain.round_state(NETWORK)) for each in books))
    assert all(thief not in each.rewards.totals_wei for each in books)
    earned = [books[0].rewards.totals_wei[worker.account] for worker in net.workers[:2]]
    assert earned[0] == earned[1] >= candidate.totals_wei[net.workers[0].account] > 0
    assert all(each.roots.first_wrong == 0 for each in books)


def test_a_right_root_that_somebody_freezes_is_upheld_by_those_who_did_not_sign_it_too(
    slow: Any, eventually: Any
) -> None:
    net = slow
    state = due(net, eventually)
    candidate = net.validators[0].role.rounds._propose(state, 0, 4)
    carry(net, state, candidate.content, candidate.proposal)
    state = due(net, eventually)
    assert all(validator.role.rounds.books.roots.first_wrong == 0 for validator in net.validators)
    assert all(1 in validator.role.rounds.books.roots._judged for validator in net.validators)
    second = net.validators[0].role.rounds._propose(state, 0, 4)
    carry(net, state, second.content, second.proposal)
    griefer = net.validators[3]
    tokens = net.model.tokens[griefer.account]
    griefer.chain.freeze_root(NETWORK, 2)
    start(net)
    books = net.validators[0].role.rounds.books
    eventually(lambda: any(each.ruling for each in books.executed))
    assert next(each for each in books.executed if each.ruling).ruling == UPHOLD
    assert net.model.tokens[griefer.account] == tokens - net.model.settings.freeze_bond_wei


def test_what_a_validator_cannot_judge_it_does_not_freeze(slow: Any, eventually: Any) -> None:
    net, chain = slow, slow.user.chain
    eventually(lambda: chain.round_state(NETWORK).chain_time_s >= chain.round_state(NETWORK).earliest_at_s)
    state = chain.round_state(NETWORK)
    candidate = net.validators[0].role.rounds._propose(state, 0, 4)  # nobody has looked at the chain before
    carry(net, state, candidate.content, candidate.proposal)
    late = net.validators[1].role.rounds
    late.books.follow(chain.round_state(NETWORK))
    assert late.books.roots.first_wrong == 0
    late.books.roots.freeze(chain.round_state(NETWORK))
    assert chain.round_state(NETWORK).frozen_from == 0
