from __future__ import annotations

import threading
import time

import msgspec
import pytest

from smartnodes_core.errors import ProtocolError, RecordError, Unavailable
from smartnodes_core.nodes.rewards import claim, decode_totals, fetch_reward_totals, reward_root

NETWORK = 1
ACCOUNTS = [bytes([number] * 20) for number in range(3)]


def test_totals_are_taken_from_the_first_validator_whose_answer_leads_to_the_root(net):
    chain = net.user.chain
    totals = {ACCOUNTS[0]: 5, ACCOUNTS[1]: 7}
    root = reward_root(chain, NETWORK, totals)
    net.validators[0].role.rounds.books.rewards._published[root] = {ACCOUNTS[2]: 10**30}  # a lie
    net.validators[2].role.rounds.books.rewards._published[root] = totals
    keys = [validator.key for validator in net.validators]
    assert fetch_reward_totals(net.user.node, chain, NETWORK, keys, root) == totals
    with pytest.raises(Unavailable, match="none of 2 validators"):
        fetch_reward_totals(net.user.node, chain, NETWORK, keys[:2], root)


def test_validators_that_hang_hold_nobody_up(net, monkeypatch):
    chain, node, keys = net.user.chain, net.user.node, [validator.key for validator in net.validators]
    totals = {ACCOUNTS[0]: 5}
    root = reward_root(chain, NETWORK, totals)
    net.validators[3].role.rounds.books.rewards._published[root] = totals
    over, call = threading.Event(), node.call

    def slow(validator, *args, **options):
        if validator != keys[3]:
            over.wait(60)
        return call(validator, *args, **options)

    monkeypatch.setattr(node, "call", slow)
    began_s = time.monotonic()
    assert fetch_reward_totals(node, chain, NETWORK, keys, root) == totals
    assert time.monotonic() - began_s < 40
    over.set()


def test_no_root_means_no_rewards(net):
    assert fetch_reward_totals(net.user.node, net.user.chain, NETWORK, [], bytes(32)) == {}
    assert reward_root(net.user.chain, NETWORK, {}) == bytes(32)
    assert claim(net.user.node, net.user.chain, NETWORK, [], net.user.account) == 0


@pytest.mark.parametrize("root", [None, 1 << 40, b"short", "text"])
def test_a_root_of_the_wrong_type_is_a_protocol_error(net, root):
    with pytest.raises(ProtocolError):
        net.user.node.call(net.validators[0].key, "reward_totals", {"root": root})


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"zz": "1"},
        {"00" * 19: "1"},
        {"00" * 20: "-1"},
        {"00" * 20: "1.5"},
        {"00" * 20: str(1 << 256)},
        {"00" * 20: "9" * 10_000},
        {"00" * 20: 7},
        None,
    ],
)
def test_a_table_out_of_shape_is_a_record_error(table):
    with pytest.raises(RecordError):
        decode_totals(msgspec.msgpack.encode(table))


def test_bytes_that_are_no_table_are_a_record_error():
    for data in (b"", b"\xc1", b"\x81"):
        with pytest.raises(RecordError):
            decode_totals(data)
