"""Members are live when a round has verified that their node key is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
