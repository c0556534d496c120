"""Gas of rounds and claims, beside the figures of the original Smartnodes contracts (v2).

`python benchmarks/benchmark_gas.py [--most-workers 10000]`. A round changes every worker's reputation, sets a new
rewards root and mints; it carries as many signatures as validators send where all have signed, and is measured in the
steady state, when the storage it writes has been written before. The contracts run in this process (py-evm, cancun):
any chain of that fork charges the same.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from smartnodes_core.ballots import SPARE_SIGNATURES
from smartnodes_core.chain.devnet.direct import Direct
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.packing import pack_reputations
from smartnodes_core.chain.proposal import NO_HASH, UNCAPPED, Domain, Payment, Settlement
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of, sign_digest
from smartnodes_core.chain.votes import in_order
from smartnodes_core.rounds import RoundProposal, quorum

NETWORK = 1
START_S = 1_700_000_000
KEPT_ROOTS = 64
WORKER, VALIDATOR = 2, 3
ORIGINAL_ROUND = {3: 599_000, 50: 3_147_000}
ORIGINAL_CLAIM = 123_000
LIMITS = {3: 320_000, 50: 520_000}
CLAIM_LIMIT = 60_000


class Measured:
    """A network whose storage is warm: every kept root was set once."""

    def __init__(self, num_validators: int, num_workers: int):
        self.keys = [hashlib.sha256(b"validator %d" % i).digest() for i in range(num_validators)]
        self.accounts = [address_of(key) for key in self.keys]
        self.workers = [hashlib.sha256(b"worker %d" % i).digest()[:20] for i in range(num_workers)]
        genesis = {account: 2_000_000 * SNO for account in self.accounts}
        self.direct = Direct(ChainSettings(claim_delay_s=600, kappa_bps=UNCAPPED, genesis=genesis), START_S)
        self.domain = Domain(31337, self.direct.addresses["Rounds"])
        self.number, self.previous, self.earned_wei = 0, NO_HASH, 0
        for account in self.accounts:
            for contract in ("Registry", "Escrow"):
                self.direct.send(account, "SNO", "approve", self.direct.addresses[contract], 2**255)
            self.register(account, VALIDATOR)
        for worker in self.workers:
            self.register(worker, WORKER)
        self.registration_gas = self.direct.gas_used
        for number in range(KEPT_ROOTS):
            self.round(num_validators, rewards_root=hashlib.sha256(b"%d" % number).digest())

    def register(self, account: bytes, role: int) -> None:
        self.direct.send(account, "Registry", "register", role, hashlib.sha256(account).digest(), NETWORK)

    def round(self, num_signers: int, **content: Any) -> int:
        """The gas of a round with this content."""
        self.direct.now_s += 600
        self.number += 1
        proposal = RoundProposal(NETWORK, self.number, 0, self.previous, self.direct.now_s, **content)
        self.previous = self.domain.digest(proposal)
        signatures = [sign_digest(key, self.previous) for key in self.keys[:num_signers]]
        packed = b"".join(in_order(self.previous, signatures))
        self.direct.send(self.accounts[0], "Rounds", "execute", proposal.as_abi(), packed)
        return self.direct.gas_used

    def full_round(self, num_signers: int, settlements: Sequence[Settlement] = ()) -> tuple[int, RewardTree]:
        """A round that changes everything; its gas and its rewards."""
        wei = self.direct.read("Rounds", "emission", NETWORK, self.direct.now_s + 600) // len(self.workers)
        self.earned_wei += wei
        totals = dict.fromkeys(self.workers, self.earned_wei)
        tree = RewardTree(self.domain.chain_id, self.domain.contract, NETWORK, totals)
        scores = {len(self.keys) + i: 1 + (self.number * 7 + i) % 250 for i in range(len(self.workers))}
        used = self.round(
            num_signers,
            reputations=pack_reputations(scores),
            rewards_root=tree.root,
            allotment_wei=wei * len(self.workers),
            settlements=tuple(settlements),
            evidence_root=b"e" * 32,
        )
        return used, tree

    def endorse(self, first: int, until: int) -> int:
        """The gas of adding the signatures of validators `first` .. `until - 1` to the last round."""
        packed = b"".join(in_order(self.previous, [sign_digest(key, self.previous) for key in self.keys[first:until]]))
        self.direct.send(self.accounts[0], "Rounds", "endorse", NETWORK, packed)
        return self.direct.gas_used

    def claim(self, tree: RewardTree) -> int:
        account = self.workers[0]
        total, proof = tree.totals_wei[account], list(tree.proof(account))
        self.direct.now_s += 600
        self.direct.send(account, "Rounds", "claim", NETWORK, self.number, account, total, proof)
        return self.direct.gas_used

    def jobs(self, count: int) -> list[Settlement]:
        """Payments of `count` jobs of one user to one worker each."""
        payer, jobs = self.accounts[0], [hashlib.sha256(b"job %d" % i).digest() for i in range(count)]
        for job in jobs:
            self.direct.send(payer, "Escrow", "deposit", NETWORK, job, SNO, self.direct.now_s + 10**7)
        escrows = sorted(self.direct.read("Escrow", "escrowIdOf", NETWORK, payer, job) for job in jobs)
        return [
            Settlement(escrow, 0, (Payment(self.workers[i % len(self.workers)], SNO // 10),))
            for i, escrow in enumerate(escrows)
        ]


def num_sent(num_validators: int) -> int:
    """The signatures that validators send where all have signed (`smartnodes_core.ballots.carrying`)."""
    return min(num_validators, quorum(num_validators) + SPARE_SIGNATURES)


def show(what: str, used: int, limit: int = 0, original: int = 0) -> None:
    beside = f"   at most {limit:9,}" if limit else ""
    print(f"  {what:52} {used:10,}{beside}" + (f"   original {original:9,}" if original else ""), flush=True)


def measure_workers(num_validators: int, num_workers: int) -> Measured:
    network = Measured(num_validators, num_workers)
    sent = num_sent(num_validators)
    _, tree = network.full_round(sent)
    first_claim = network.claim(tree)
    used, tree = network.full_round(sent)
    whole = num_workers == 1000
    what = f"round, {num_validators} validators ({sent} signatures), {num_workers:,} workers"
    show(what, used, LIMITS.get(num_validators, 0) * whole, ORIGINAL_ROUND.get(num_validators, 0) * whole)
    show("  claim, first", first_claim)
    show("  claim, repeated", network.claim(tree), CLAIM_LIMIT, ORIGINAL_CLAIM)
    return network


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-workers", type=int, default=10_000)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    print("Gas, every worker's reputation changed:")
    network = measure_workers(50, min(1000, options.most_workers))
    sent = num_sent(50)
    network.full_round(sent)
    show(f"    the other {50 - sent} endorse it, in one transaction", network.endorse(sent, 50))
    show("    one of them endorses it alone", network.endorse(sent, sent + 1))
    show(f"  the same carried by the {quorum(50)} of a quorum", network.full_round(quorum(50))[0])
    show("  the same carried by all 50, which no node sends", network.full_round(50)[0])
    show("registration of a worker", network.registration_gas)
    for num_workers in [count for count in (1, 10, 100, 1000, 10_000) if count <= options.most_workers]:
        network = measure_workers(3, num_workers)
        if num_workers == 1000:
            show("  the same with as many jobs settled: 1", network.full_round(3, network.jobs(1))[0])
            show("  10", network.full_round(3, network.jobs(10))[0])
            show("  100", network.full_round(3, network.jobs(100))[0])
    print(f"measured in {time.monotonic() - began:.0f} s (py-evm in process, cancun)")


if __name__ == "__main__":
    main()
