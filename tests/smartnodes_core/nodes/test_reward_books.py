"""A validator that starts again knows the rewards under the last root, with nobody to ask."""

from __future__ import annotations

from types import SimpleNamespace

from smartnodes_core.chain.model import CHAIN_ID
from smartnodes_core.nodes.reward_books import NUM_KEPT, RewardBooks
from smartnodes_core.nodes.rewards import reward_root

CHAIN = SimpleNamespace(chain_id=CHAIN_ID, domain=SimpleNamespace(chain_id=CHAIN_ID, contract=b"r" * 20))
NODE = SimpleNamespace(serve=lambda obj: None)


def books(path):
    return RewardBooks(NODE, CHAIN, 1, list, lambda root: None, path)


def totals(number):
    return {b"a" * 20: 10**24 + number, b"b" * 20: number}


def state_under(totals_wei):
    return SimpleNamespace(latest_root=reward_root(CHAIN, 1, totals_wei))


def test_what_was_published_is_known_again(tmp_path):
    books(tmp_path / "rewards.json").publish(totals(1))
    again = books(tmp_path / "rewards.json")
    assert again.knows(state_under(totals(1)))
    assert again.totals_wei == totals(1)
    assert not again.knows(state_under(totals(2)))


def test_what_was_about_to_be_signed_is_known_when_it_was_executed_meanwhile(tmp_path):
    first = books(tmp_path / "rewards.json")
    first.publish(totals(1))
    for number in range(2, 1 + NUM_KEPT):
        first.keep(totals(number))
    again = books(tmp_path / "rewards.json")
    assert all(again.knows(state_under(totals(number))) for number in range(1, 1 + NUM_KEPT))


def test_a_damaged_file_is_no_rewards(tmp_path, caplog):
    (tmp_path / "rewards.json").write_text('[{"zz": 1}]')
    assert not books(tmp_path / "rewards.json").knows(state_under(totals(1)))
    assert "cannot be read" in caplog.text


def test_without_a_file_nothing_is_kept():
    kept = books(None)
    kept.publish(totals(1))
    assert kept.knows(state_under(totals(1)))
