"""The chain takes rounds back: what they settled is settled again, once, and nobody who was honest can be accused."""

from __future__ import annotations

import copy
from typing import Any

from smartnodes_core.chain.signing import sign_digest

from .conftest import NETWORK

TABLES = ("tokens", "credits", "coin_credits", "escrows", "burned_wei", "minted_wei")


class Snapshot:
    """What the chain was; `restore` makes it so again, as a reorganisation does."""

    def __init__(self, net: Any) -> None:
        self._model = net.model
        self._network = net.model.peek(NETWORK)
        with self._model.lock:
            self._kept = {name: copy.copy(getattr(self._model, name)) for name in TABLES}
            self._kept_of_network = {name: copy.copy(value) for name, value in vars(self._network).items()}

    def restore(self) -> None:
        with self._model.lock:
            vars(self._model).update(self._kept)
            vars(self._network).update(self._kept_of_network)


def test_a_round_that_was_undone_is_executed_again_and_pays_once(make_net: Any, eventually: Any) -> None:
    net = make_net()
    net.start()
    job = net.open()
    net.work(job, range(4))
    eventually(lambda: net.everyone_has(16, job))
    before = Snapshot(net)
    for validator in net.validators:
        validator.role.rounds.start()
    chain = net.user.chain
    eventually(lambda: chain.round_state(NETWORK).number >= 1)
    first = chain.executed_round(NETWORK, 1)
    books = [validator.role.rounds.books for validator in net.validators]
    eventually(lambda: all(each._number >= 1 for each in books))
    assert all(each.records.unsettled()[0] == {} for each in books)
    before.restore()
    eventually(lambda: chain.round_state(NETWORK).number >= 1)
    eventually(
        lambda: all(
            each._number >= 1 and each._rounds.get(1) == net.model.peek(NETWORK).executed[1].digest for each in books
        )
    )
    again = chain.executed_round(NETWORK, 1)
    assert again.evidence_root == first.evidence_root
    eventually(lambda: chain.round_state(NETWORK).number >= 3)
    assert all(validator.role.rounds.proofs.accused == set() for validator in net.validators)
    members = [chain.member(NETWORK, worker.account).reputation for worker in net.workers[:2]]
    assert members[0] == members[1] == 13  # four honest verdicts count once
    eventually(lambda: len({tuple(sorted(each.rewards.totals_wei.items())) for each in books}) == 1)
    earned = [books[0].rewards.totals_wei.get(worker.account, 0) for worker in net.workers[:2]]
    most_wei = sum(root.allotment_wei for root in net.model.peek(NETWORK).roots.values())
    assert 0 < earned[0] == earned[1] < most_wei / 2


def test_what_an_undone_round_settled_is_open_again(net: Any, eventually: Any) -> None:
    job = net.open()
    net.work(job, range(3))
    eventually(lambda: net.everyone_has(12, job))
    books = net.validators[0].role.rounds.books
    chain = net.user.chain
    state = chain.round_state(NETWORK)
    before = Snapshot(net)
    verdicts, commitments = books.records.unsettled()
    assert len(verdicts) == 12
    desk = net.validators[0].role.rounds
    eventually(lambda: chain.round_state(NETWORK).chain_time_s >= state.earliest_at_s)
    state = chain.round_state(NETWORK)
    candidate = desk._propose(state, 0, 4)
    digest = net.model.domain.digest(candidate.content)
    books.remember(digest, candidate)
    chain.execute_round(candidate.content, [sign_digest(each.account_key, digest) for each in net.validators])
    books.follow(chain.round_state(NETWORK))
    assert books.records.unsettled() == ({}, {})
    assert books.is_settled(verdicts) == list(verdicts)
    before.restore()
    books.follow(chain.round_state(NETWORK))
    assert books.records.unsettled() == (verdicts, commitments)
    assert list(books.executed) == []
    assert books.rewards.knows(chain.round_state(NETWORK))
