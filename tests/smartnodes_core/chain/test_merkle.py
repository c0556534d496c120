from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.chain.merkle import MerkleTree, RewardTree, reward_leaf, verify
from smartnodes_core.chain.signing import keccak

CONTRACT = b"c" * 20
accounts = st.binary(min_size=20, max_size=20)
totals = st.dictionaries(accounts, st.integers(1, 10**27), min_size=1, max_size=40)


@given(totals)
def test_every_account_has_a_proof_of_its_total(totals_wei: dict[bytes, int]) -> None:
    tree = RewardTree(1, CONTRACT, 2, totals_wei)
    for account, wei in totals_wei.items():
        assert verify(tree.root, reward_leaf(1, CONTRACT, 2, account, wei), tree.proof(account))


@given(totals, st.integers(0, 4))
def test_no_proof_fits_another_claim(totals_wei: dict[bytes, int], which: int) -> None:
    tree = RewardTree(1, CONTRACT, 2, totals_wei)
    account, wei = next(iter(totals_wei.items()))
    claims = [
        (2, CONTRACT, 2, account, wei),
        (1, b"d" * 20, 2, account, wei),
        (1, CONTRACT, 3, account, wei),
        (1, CONTRACT, 2, bytes(20) if account != bytes(20) else b"x" * 20, wei),
        (1, CONTRACT, 2, account, wei + 1),
    ]
    claim = claims[which]
    if totals_wei.get(claim[3]) == claim[4] and which == 3:
        return
    assert not verify(tree.root, reward_leaf(*claim), tree.proof(account))


@given(totals)
def test_the_order_of_accounts_does_not_matter(totals_wei: dict[bytes, int]) -> None:
    backwards = dict(reversed(totals_wei.items()))
    assert RewardTree(1, CONTRACT, 2, totals_wei).root == RewardTree(1, CONTRACT, 2, backwards).root


def test_the_tree_is_openzeppelins() -> None:
    # @openzeppelin/merkle-tree: leaves sorted ascending and laid out from the end of the array
    leaves = sorted(keccak(bytes([i])) for i in range(3))
    pair = [keccak(b"".join(sorted(two))) for two in ((leaves[0], leaves[1]),)]
    assert MerkleTree(leaves).root == keccak(b"".join(sorted((pair[0], leaves[2]))))
    assert MerkleTree(leaves[:1]).root == leaves[0]
    assert MerkleTree([]).root == bytes(32)
    with pytest.raises(KeyError):
        RewardTree(1, CONTRACT, 2, {}).proof(b"a" * 20)
