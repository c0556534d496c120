from __future__ import annotations

import pytest

from smartnodes_core.chain.base import NoFundsError
from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.model import ChainModel
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of
from smartnodes_core.errors import AuthorityError, ChainError, ConfigError
from smartnodes_core.nodes.membership import Membership, key_hash

NETWORK = 1
KEYS = [bytes([number] * 32) for number in range(1, 6)]
NODE_KEYS = [bytes([number + 50] * 32) for number in range(5)]


class Town:
    """A chain whose reads are counted, and can fail."""

    def __init__(self) -> None:
        genesis = {address_of(key): 2_000_000 * SNO for key in KEYS}
        self.model = ChainModel(ChainSettings(networks={NETWORK: 10_000}, genesis=genesis))
        self.num_reads = 0
        self.down = False

    def membership(self, number: int, **options) -> Membership:
        chain = MemoryChain(self.model, KEYS[number])
        real = chain.members

        def members(network_id):
            self.num_reads += 1
            if self.down:
                raise ChainError("the chain is down")
            return real(network_id)

        chain.members = members
        return Membership(chain, NETWORK, **options)


@pytest.fixture
def town() -> Town:
    return Town()


def test_joining_registers_once_and_posts_the_tip(town):
    membership = town.membership(0)
    tip = b"t" * 32
    member = membership.join("validator", NODE_KEYS[0], tip)
    assert member.key_hash == key_hash(NODE_KEYS[0])
    assert membership.tip_of(NODE_KEYS[0]) == tip
    again = town.membership(0)
    again.join("validator", NODE_KEYS[0], b"u" * 32)
    assert again.tip_of(NODE_KEYS[0]) == b"u" * 32
    assert len(town.model.peek(NETWORK).members) == 1


def test_an_account_that_is_somebody_else_cannot_join(town):
    town.membership(0).join("worker", NODE_KEYS[0])
    with pytest.raises(AuthorityError, match="registered as worker with another node key"):
        town.membership(0).join("worker", NODE_KEYS[1])
    with pytest.raises(AuthorityError, match="registered as worker"):
        town.membership(0).join("validator", NODE_KEYS[0])
    town.model.peek(NETWORK).update(0, reputation=0)
    with pytest.raises(AuthorityError, match="blacklisted"):
        town.membership(0).join("worker", NODE_KEYS[0])


def test_what_stands_in_the_way_of_a_registration_is_told_with_its_remedy(town):
    elsewhere = town.membership(0)
    elsewhere.network_id = 9
    with pytest.raises(ConfigError, match="network 9 is not open in these contracts: set network_id"):
        elsewhere.join("worker", NODE_KEYS[0])
    town.membership(0).join("worker", NODE_KEYS[0])
    town.model.peek(NETWORK).update(0, verified=True)
    with pytest.raises(AuthorityError, match="this node's key belongs to account 0x"):
        town.membership(1).join("worker", NODE_KEYS[0])
    poor = MemoryChain(town.model, b"p" * 32)
    with pytest.raises(NoFundsError, match="has 0 wei of SNO, needed are"):
        Membership(poor, NETWORK).join("validator", NODE_KEYS[1])


def test_an_account_that_another_process_registers_at_the_same_time_joins(town):
    first, second = town.membership(0), town.membership(0)
    member, asked = second.chain.member, []

    def late(network_id, account):
        asked.append(account)
        if len(asked) == 1:  # both have looked before one of them registers
            first.join("worker", NODE_KEYS[0])
            return None
        return member(network_id, account)

    second.chain.member = late
    assert second.join("worker", NODE_KEYS[0]).index == 0
    assert len(town.model.peek(NETWORK).members) == 1


def test_members_are_known_by_node_key(town):
    membership = town.membership(0)
    membership.join("worker", NODE_KEYS[0])
    account = address_of(KEYS[0])
    assert membership.node_key_of(account) is None
    assert membership.account_of(NODE_KEYS[0]) == account
    assert membership.node_key_of(account) == NODE_KEYS[0]
    assert membership.reputation_of(NODE_KEYS[0]) == 1
    assert membership.role_of(NODE_KEYS[0]) == "worker"
    assert membership.tip_of(NODE_KEYS[0]) is None
    for unknown in (membership.of, membership.account_of, membership.reputation_of, membership.tip_of):
        assert unknown(NODE_KEYS[4]) is None


def test_what_a_revoked_key_signed_stays_its_accounts_and_the_account_is_met_under_the_new_one(town):
    membership = town.membership(0, max_age_s=0.0)
    membership.join("worker", NODE_KEYS[0])
    town.model.peek(NETWORK).update(0, verified=True)
    account = address_of(KEYS[0])
    assert membership.account_of(NODE_KEYS[0]) == account
    membership.chain.rotate_key(key_hash(NODE_KEYS[1]), NETWORK)
    membership.members(0.0)
    assert membership.node_key_of(account) is None
    assert membership.of(NODE_KEYS[0]) is membership.role_of(NODE_KEYS[0]) is None
    assert membership.account_of(NODE_KEYS[0]) == membership.account_of(NODE_KEYS[1]) == account
    assert membership.node_key_of(account) == NODE_KEYS[1]
    assert membership.join("worker", NODE_KEYS[1]).index == 0
    with pytest.raises(AuthorityError, match="tensorlink stake rotate"):
        membership.join("worker", NODE_KEYS[0])


def test_a_key_is_contested_while_several_ask_for_it_and_no_round_has_said_whose_it_is(town):
    membership = town.membership(0, max_age_s=0.0)
    membership.join("worker", NODE_KEYS[0])
    assert not membership.is_contested(NODE_KEYS[0])
    town.membership(1).join("worker", NODE_KEYS[0])
    membership.members(0.0)
    assert membership.is_contested(NODE_KEYS[0])
    assert not membership.is_contested(NODE_KEYS[4])
    town.model.peek(NETWORK).update(1, verified=True)
    membership.members(0.0)
    assert not membership.is_contested(NODE_KEYS[0])


def test_the_blacklisted_and_those_who_left_have_no_role(town):
    membership = town.membership(0, max_age_s=0.0)
    membership.join("worker", NODE_KEYS[0])
    town.model.peek(NETWORK).update(0, reputation=0)
    assert membership.role_of(NODE_KEYS[0]) is None
    town.model.peek(NETWORK).update(0, reputation=1, exit_at_s=1)
    assert membership.role_of(NODE_KEYS[0]) is None
    assert membership.reputation_of(NODE_KEYS[0]) is None


def test_the_chain_is_not_asked_for_every_question(town):
    membership = town.membership(0)
    membership.join("worker", NODE_KEYS[0])
    before = town.num_reads
    for _ in range(1000):
        membership.account_of(NODE_KEYS[0])
        membership.of(NODE_KEYS[3])  # unknown: not read again at once either
    assert town.num_reads - before <= 3


def test_one_that_has_just_registered_is_found(town):
    membership = town.membership(0)
    membership.join("worker", NODE_KEYS[0])
    membership.members(0.0)
    town.membership(1).join("worker", NODE_KEYS[1])
    assert membership.role_of(NODE_KEYS[1]) == "worker"


def test_while_the_chain_is_down_what_is_known_stays(town):
    membership = town.membership(0, max_age_s=0.0)
    membership.join("worker", NODE_KEYS[0])
    membership.members(0.0)
    town.down = True
    assert membership.role_of(NODE_KEYS[0]) == "worker"
    before = town.num_reads
    for _ in range(100):
        membership.of(NODE_KEYS[0])
    assert town.num_reads - before < 100
    with pytest.raises(ChainError):
        membership.members(0.0)
