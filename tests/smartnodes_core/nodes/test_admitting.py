"""Members are live when a round has verified that their node key is theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from smartnodes_core.errors import AuthorityError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.membership import key_hash
from smartnodes_core.records import Announcement, Signed
from smartnodes_core.rounds import Admission

from .conftest import NETWORK


def test_who_comes_after_the_first_round_is_admitted_by_a_later_one(
    make_net: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    net = make_net()
    net.start(rounds=True)
    eventually(lambda: net.model.state(NETWORK).number >= 1)
    squatter = net.citizen(16, "worker", register=False)
    late = net.citizen(15, "worker", register=False)
    squatter.membership.join("worker", late.key)  # asks for another's key, and cannot prove that it is its own
    late.membership.join("worker", late.key)
    assert not late.chain.member(NETWORK, late.account).live
    net.meet()
    late.node.reach(net.validators[0].key)  # the others hear of it from whoever proposes
    eventually(lambda: late.chain.member(NETWORK, late.account).live)
    assert late.chain.member(NETWORK, late.account).verified
    assert not squatter.chain.member(NETWORK, squatter.account).verified
    eventually(lambda: late.membership.reputation_of(late.key) == 1)


def test_a_rotated_key_is_verified_by_a_round(make_net: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    net = make_net()
    net.start(rounds=True)
    worker, fresh = net.workers[0], Identity.from_seed(b"f" * 32)
    before = worker.chain.member(NETWORK, worker.account)
    eventually(lambda: net.model.state(NETWORK).number >= 1)
    worker.chain.rotate_key(key_hash(fresh.node_key), NETWORK)
    net.renamed(worker, fresh).reach(net.validators[0].key)
    eventually(lambda: worker.chain.member(NETWORK, worker.account).live)
    after = worker.chain.member(NETWORK, worker.account)
    assert (after.key_hash, after.verified) == (key_hash(fresh.node_key), True)
    assert (after.index, after.stake_wei) == (before.index, before.stake_wei)


def test_a_cheat_that_rotates_its_key_is_blacklisted_for_what_the_old_one_signed(
    make_net: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    net = make_net()
    net.start()
    cheat, fresh = net.workers[0], Identity.from_seed(b"f" * 32)
    net.model.peek(NETWORK).update(cheat.chain.member(NETWORK, cheat.account).index, verified=True)
    job = net.open()
    cheat.handler.wrong = {0}
    net.work(job, range(1))
    eventually(lambda: net.everyone_has(4, job))
    cheat.chain.rotate_key(key_hash(fresh.node_key), NETWORK)
    eventually(lambda: cheat.key not in {peer.node_key for peer in net.validators[0].node.peers()})
    for validator in net.validators:
        validator.role.rounds.start()
    eventually(lambda: cheat.chain.member(NETWORK, cheat.account).reputation == 0)
    again = net.renamed(cheat, fresh)

    def is_refused() -> bool:
        try:
            again.reach(net.validators[0].key)
        except AuthorityError as error:
            return "is blacklisted" in str(error)
        return False

    eventually(is_refused)  # with the validator's next look at the chain


def test_a_validator_vouches_for_nobody_whose_binding_it_has_not_seen(net: Any) -> None:
    first, second = net.validators[:2]
    desk = first.role.rounds.books.admissions
    index = second.chain.member(NETWORK, second.account).index
    assert desk.unproven([Admission(index)], [net.workers[0].key]) == [
        f"admissions: member {index} is not known to own its node key"
    ]
    assert desk.unproven([Admission(99)], [second.key]) == [
        "admissions: Admission(index=99, capability=0) is not justified"
    ]
    assert desk.unproven([Admission(index)] * 65, [second.key])[0].startswith("admissions: 65 in one round")


def announcement(worker: Any, capability: int, expires_at_s: int = 0) -> Signed:
    """As a worker's node signs it."""
    record = Announcement(
        node_key=worker.key,
        role="worker",
        network_id=NETWORK,
        sequence=1,
        expires_at_s=expires_at_s or int(time.time()) + 600,
        endpoints=[],
        offers={"capability": capability},
    )
    return worker.identity.sign(record)


def test_the_class_that_a_worker_announces_is_written_on_chain_and_anew_when_it_changes(
    make_net: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    net = make_net()
    worker, other = net.workers[:2]
    net.start()
    desks = [validator.role.rounds.books.admissions for validator in net.validators]
    heard = {worker.key: announcement(worker, 0x0503)}
    for desk in desks[1:]:  # the first has not heard of it: whoever proposes shows it
        desk._announced = heard.get
    for validator in net.validators:
        for member in net.workers:
            member.node.reach(validator.key)
        validator.role.rounds.start()

    def capability_of(citizen: Any) -> int:
        return int(citizen.chain.member(NETWORK, citizen.account).capability)

    eventually(lambda: capability_of(worker) == 0x0503)
    assert capability_of(other) == 0
    heard[worker.key] = announcement(worker, 0x0603)
    eventually(lambda: capability_of(worker) == 0x0603)


def test_a_class_is_what_the_workers_own_node_signed(net: Any) -> None:
    worker, other = net.workers[:2]
    first, second = (validator.role.rounds.books.admissions for validator in net.validators[:2])
    proposer = net.validators[0].key
    index = worker.chain.member(NETWORK, worker.account).index
    net.model.peek(NETWORK).update(index, verified=True)
    net.validators[1].membership.members(0.0)
    refused = [f"admissions: member {index} is not known to be of class 7"]
    assert second.unproven([Admission(index, 7)], [proposer]) == refused
    for lie in (announcement(other, 7), announcement(worker, 6), announcement(worker, 7, int(time.time()) - 5)):
        first._announced = lambda node_key, lie=lie: lie
        assert second.unproven([Admission(index, 7)], [proposer]) == refused
    first._announced = lambda node_key: announcement(worker, 7)
    assert second.unproven([Admission(index, 7)], [proposer]) == []
    assert "is not justified" in second.unproven([Admission(index, 0)], [proposer])[0]  # nothing changes
    assert second.unproven([Admission(index, 8)], [proposer]) != []
