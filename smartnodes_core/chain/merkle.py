"""Merkle trees as OpenZeppelin builds and checks them: double-hashed leaves, sorted pairs, leaves sorted by hash.

Same roots and proofs as the `StandardMerkleTree` of `@openzeppelin/merkle-tree`; `contracts/Rounds.sol` checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smartnodes_core.chain.signing import keccak, word

NO_ROOT = bytes(32)


def reward_leaf(chain_id: int, contract: bytes, network_id: int, account: bytes, total_wei: int) -> bytes:
    """The leaf of one account's cumulative reward: no other chain, contract or network can take its proof."""
    fields = (chain_id, contract, network_id, account, total_wei)
    return keccak(keccak(b"".join(word(field) for field in fields)))


class MerkleTree:
    """A tree over 32-byte leaves. `root` of no leaves is zero."""

    def __init__(self, leaves: Iterable[bytes]):
        ordered = sorted(leaves)
        self._place = {leaf: 2 * len(ordered) - 2 - i for i, leaf in enumerate(ordered)}
        self._nodes = [NO_ROOT] * max(2 * len(ordered) - 1, 0)
        for leaf, place in self._place.items():
            self._nodes[place] = leaf
        for i in range(len(ordered) - 2, -1, -1):
            self._nodes[i] = _pair(self._nodes[2 * i + 1], self._nodes[2 * i + 2])

    @property
    def root(self) -> bytes:
        return self._nodes[0] if self._nodes else NO_ROOT

    def proof(self, leaf: bytes) -> list[bytes]:
        """The siblings from `leaf` up to the root. Raises KeyError for a leaf that is not in the tree."""
        place = self._place[leaf]
        siblings = []
        while place > 0:
            siblings.append(self._nodes[place + 1 if place % 2 else place - 1])
            place = (place - 1) // 2
        return siblings


class RewardTree:
    """The cumulative rewards of a network, `{account: wei since the beginning}`: what one round's root commits to."""

    def __init__(self, chain_id: int, contract: bytes, network_id: int, totals_wei: Mapping[bytes, int]):
        self.totals_wei = dict(totals_wei)
        self._leaves = {
            account: reward_leaf(chain_id, contract, network_id, account, total)
            for account, total in self.totals_wei.items()
        }
        self._tree = MerkleTree(self._leaves.values())

    @property
    def root(self) -> bytes:
        """What goes into the proposal; zero where nobody earned anything."""
        return self._tree.root

    def proof(self, account: bytes) -> list[bytes]:
        """The proof of `account`'s total. Raises KeyError where the account has earned nothing."""
        return self._tree.proof(self._leaves[account])


def verify(root: bytes, leaf: bytes, proof: Iterable[bytes]) -> bool:
    """Whether `proof` leads from `leaf` to `root`, as the contract checks it."""
    for sibling in proof:
        leaf = _pair(leaf, sibling)
    return leaf == root


def _pair(a: bytes, b: bytes) -> bytes:
    return keccak(a + b if a < b else b + a)
