"""The contract follows the proofs that `merkle.py` gives, and no others."""

from __future__ import annotations

import hashlib

import pytest

from smartnodes_core.chain.devnet.direct import Direct, Reverted
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.proposal import NO_HASH, UNCAPPED, Domain
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of, sign_digest
from smartnodes_core.rounds import RoundProposal

NETWORK, VALIDATOR = 1, 3
KEY = hashlib.sha256(b"validator").digest()


class Claims:
    """A network of one validator, whose rounds set whatever root they are to."""

    def __init__(self) -> None:
        self.account = address_of(KEY)
        settings = ChainSettings(claim_delay_s=0, kappa_bps=UNCAPPED, genesis={self.account: 2_000_000 * SNO})
        self.direct = Direct(settings, 1_700_000_000)
        self.direct.send(self.account, "SNO", "approve", self.direct.addresses["Registry"], 2**255)
        self.direct.send(self.account, "Registry", "register", VALIDATOR, hashlib.sha256(KEY).digest(), NETWORK)
        self.domain = Domain(31337, self.direct.addresses["Rounds"])
        self.number, self.previous = 0, NO_HASH

    def tree(self, totals_wei: dict[bytes, int]) -> RewardTree:
        return RewardTree(self.domain.chain_id, self.domain.contract, NETWORK, totals_wei)

    def set_root(self, root: bytes, allotment_wei: int) -> None:
        self.direct.now_s += 600
        self.number += 1
        proposal = RoundProposal(
            NETWORK, self.number, 0, self.previous, self.direct.now_s, rewards_root=root, allotment_wei=allotment_wei
        )
        self.previous = self.domain.digest(proposal)
        self.direct.send(self.account, "Rounds", "execute", proposal.as_abi(), sign_digest(KEY, self.previous))

    def claim(self, account: bytes, total_wei: int, proof: list[bytes]) -> None:
        self.direct.send(self.account, "Rounds", "claim", NETWORK, self.number, account, total_wei, proof)


def test_every_leaf_of_a_tree_of_any_size_can_be_claimed_with_its_proof_and_with_no_other() -> None:
    claims, paid_wei = Claims(), 0
    for size in (1, 2, 3, 4, 5, 8, 13, 33):
        totals = {hashlib.sha256(bytes([size, i])).digest()[:20]: 1 + i for i in range(size)}
        tree = claims.tree(totals)
        claims.set_root(tree.root, sum(totals.values()))
        for account, wei in totals.items():
            proof = list(tree.proof(account))
            wrong = [[*proof[:place], bytes(32), *proof[place + 1 :]] for place in range(len(proof))]
            wrong += [proof[:-1], proof[1:]] if proof else []
            wrong += [[*proof, tree.root], [*proof, bytes(32)], list(reversed(proof))]
            for other in wrong:
                if other == proof:
                    continue
                with pytest.raises(Reverted, match="BadProof"):
                    claims.claim(account, wei, other)
            with pytest.raises(Reverted, match="BadProof"):
                claims.claim(account, wei + 1, proof)
            claims.claim(account, wei, proof)
            paid_wei += wei
            assert claims.direct.read("SNO", "balanceOf", account) == wei
    assert claims.direct.read("Rounds", "claimedBy", NETWORK, account) == wei
    assert paid_wei == sum(sum(range(1, size + 1)) for size in (1, 2, 3, 4, 5, 8, 13, 33))
