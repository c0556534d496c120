"""A rewards root that a quorum set wrongly is frozen by a validator that recomputed it, and corrected by a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from smartnodes_core.ballots import Motion
from smartnodes_core.chain.proposal import CORRECT, NO_RULING, UPHOLD
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.nodes import root_checks
from smartnodes_core.nodes.rewards import reward_root
from smartnodes_core.nodes.validator import ValidatorSettings
from smartnodes_core.rounds import COMPLETE_VIEWS, in_view

from .conftest import NETWORK
from .test_resuming import restart


@pytest.fixture
def slow(make_net: Any) -> Any:
    """Roots become final half a minute after their round."""
    net = make_net(settings=ValidatorSettings(list_interval_s=0.01, poll_s=0.05, proposer_timeout_s=0.5))
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


def steal(net: Any, eventually: Any) -> Any:
    """Round 1 is right; round 2, of whose work all hold the records, gives a thief what a worker earned. The job."""
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    state = due(net, eventually)
    first = net.validators[0].role.rounds._propose(state, 0, 4)
    carry(net, state, first.content, first.proposal)
    net.work(job, range(3, 6))
    eventually(lambda: net.everyone_has(24, job))
    state = due(net, eventually)
    second = net.validators[0].role.rounds._propose(state, 0, 4)
    assert second.proposal.settled
    victim, thief = net.workers[0].account, net.workers[2].account
    stolen = {**second.totals_wei, victim: second.totals_wei[victim] - 10**12, thief: 10**12}
    content = replace(second.content, rewards_root=reward_root(net.user.chain, NETWORK, stolen))
    carry(net, state, content, msgspec.structs.replace(second.proposal, content=content.encode()))
    net.validators[0].role.rounds.books.rewards._published[content.rewards_root] = stolen  # the thief shows the leaves
    return job


def test_validators_that_restart_before_a_root_is_frozen_judge_it_before_they_rule(slow: Any, eventually: Any) -> None:
    net, chain = slow, slow.user.chain
    steal(net, eventually)
    for index in (1, 2):
        restart(net, index).role.resume()
    start(net)
    books = [validator.role.rounds.books for validator in net.validators]
    eventually(lambda: any(each.ruling for each in books[0].executed))
    ruled = next(each for each in books[0].executed if each.ruling)
    assert (ruled.ruling, ruled.ruled_round) == (CORRECT, 2)  # two alone are no quorum
    eventually(lambda: all(each.rewards.knows(chain.round_state(NETWORK)) for each in books))
    eventually(lambda: all(net.workers[2].account not in each.rewards.totals_wei for each in books))


def lose(net: Any, eventually: Any) -> Any:
    """Two have judged the root and two have restarted, when all records are lost; it is frozen. The state then."""
    job = steal(net, eventually)
    due(net, eventually)
    for index in (1, 2):
        restart(net, index)
    for validator in net.validators:
        validator.role.audits.jobs.pop(job.id, None)
    net.validators[0].role.rounds.books.roots.freeze(net.user.chain.round_state(NETWORK))
    return due(net, eventually)


def judge(net: Any, voter: Any, state: Any, candidate: Any, view: int = 0) -> list[str]:
    """What a validator has against a proposal in a view."""
    content = in_view(candidate.content, view)
    motion = Motion.of(candidate.proposal, content)
    return voter.role.rounds._votes._check(state, motion, view, 4, [net.validators[0].key])[1]


def test_who_cannot_judge_a_frozen_root_says_so_and_rounds_go_on_without_a_ruling(slow: Any, eventually: Any) -> None:
    net, chain = slow, slow.user.chain
    state = lose(net, eventually)
    judges, others = (net.validators[0], net.validators[3]), net.validators[1:3]
    for validator in others:
        validator.role.rounds.books.roots.look_again(state)
    ruled = judges[0].role.rounds._propose(state, 0, 4)
    undecided = others[0].role.rounds._propose(state, 0, 4)
    assert (ruled.content.ruling, undecided.content.ruling) == (CORRECT, NO_RULING)
    assert judge(net, judges[1], state, ruled) == []
    assert "not judged here: round 2 (" in judge(net, others[1], state, ruled)[0]
    assert judge(net, others[1], state, undecided) == []
    assert any("ruling" in reason for reason in judge(net, judges[1], state, undecided))
    assert judge(net, judges[1], state, undecided, COMPLETE_VIEWS) == []
    start(net)
    eventually(lambda: chain.round_state(NETWORK).number > state.number)
    assert chain.round_state(NETWORK).frozen_from == 2


def test_what_nobody_can_judge_is_upheld_in_the_end(
    slow: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(root_checks, "MAX_FROZEN_ROUNDS", 2)
    net, chain = slow, slow.user.chain
    lose(net, eventually)
    for index in (0, 3):
        net.validators[index].role.rounds.books.roots.undo_from(2)  # as if they had restarted as well
    start(net)
    books = net.validators[0].role.rounds.books
    eventually(lambda: any(each.ruling for each in books.executed))
    ruled = next(each for each in books.executed if each.ruling)
    assert (ruled.ruling, ruled.ruled_round) == (UPHOLD, 2)
    assert ruled.round > 3
    eventually(lambda: chain.round_state(NETWORK).frozen_from == 0)


def test_what_is_earned_on_top_of_a_wrong_root_is_no_more_than_the_round_gave(slow: Any, eventually: Any) -> None:
    net = slow
    steal(net, eventually)
    state = due(net, eventually)
    roots = net.validators[0].role.rounds.books.roots
    assert roots.first_wrong == 2
    wrong = net.validators[0].role.rounds.books.rewards
    wrong.knows(state)
    candidate = net.validators[1].role.rounds._propose(state, 0, 4)  # it signs what comes next: nobody could freeze
    roots.accept(replace(candidate.content, ruling=NO_RULING, ruled_round=0), {net.workers[2].account: 10**12 + 5}, {})
    assert net.workers[2].account not in roots._judged[3].earned_wei
    assert not roots._judged[3].is_right


def test_a_root_that_pays_twice_for_the_same_records_is_found_wrong(slow: Any, eventually: Any) -> None:
    net = slow
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    state = due(net, eventually)
    first = net.validators[0].role.rounds._propose(state, 0, 4)
    carry(net, state, first.content, first.proposal)
    state = due(net, eventually)
    books = net.validators[0].role.rounds.books
    settled, books._settled = books._settled, {}
    again = net.validators[0].role.rounds._propose(state, 0, 4)
    books._settled = settled
    assert again.proposal.settled == first.proposal.settled
    carry(net, state, again.content, again.proposal)
    due(net, eventually)
    assert all(validator.role.rounds.books.roots.first_wrong == 2 for validator in net.validators)
