"""Gas of rounds and claims on the embedded chain, beside the figures of the original Smartnodes contracts (v2).

`python benchmarks/benchmark_gas.py [--workers 1000] [--validators 3]`. The round changes every worker's reputation,
sets a new rewards root and mints; it is measured in the steady state, when the storage it writes has been written
before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import urllib.request
from collections.abc import Sequence

from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.deploy import deploy
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.devnet.launcher import DevnetProcess
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.packing import pack_reputations
from smartnodes_core.chain.settings import SNO, Addresses, ChainSettings
from smartnodes_core.chain.signing import address_of, checksum, sign_digest
from smartnodes_core.chain.votes import in_order
from smartnodes_core.rounds import RoundProposal

NETWORK = 1
ORIGINAL = {("round", 3): 599_000, ("round", 50): 3_147_000, ("claim", 3): 123_000}


class Measured:
    """A network with `num_validators`, and `num_workers` whose keys nobody needs."""

    def __init__(self, url: str, num_validators: int, num_workers: int):
        self.keys = [devnet_key(i) for i in range(num_validators)]
        genesis = {address_of(key): 1_000_000 * SNO for key in self.keys}
        self.settings = ChainSettings(round_interval_s=600, claim_delay_s=600, genesis=genesis)
        self.url = url
        self.addresses: Addresses = deploy(url, devnet_key(63), self.settings)
        self.chain = ChainClient(url, self.addresses, self.keys[0])
        for i, key in enumerate(self.keys):
            ChainClient(url, self.addresses, key).register("validator", hashlib.sha256(b"%d" % i).digest(), NETWORK)
        self.num_workers = num_workers
        self.workers = [hashlib.sha256(b"worker %d" % i).digest()[:20] for i in range(num_workers)]
        self.gateway = Gateway(url, self.keys[0])
        self.rounds = self.gateway.contract("Rounds", self.addresses.rounds).functions
        self._register_workers()

    def _register_workers(self) -> None:
        """Each from a throw-away account that gets just enough coins for its gas."""
        for i in range(self.num_workers):
            key = hashlib.sha256(b"worker key %d" % i).digest()
            self.gateway.send("fund", checksum(address_of(key)), "0x", value=10**16)
            gateway = Gateway(self.url, key)
            registry = gateway.contract("Registry", self.addresses.registry).functions
            gateway.transact(registry.register(2, hashlib.sha256(key).digest(), NETWORK))

    def pass_time(self, seconds: int) -> None:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "evm_increaseTime", "params": [seconds]}).encode()
        urllib.request.urlopen(self.url, body, timeout=10).close()

    def round(self, number: int) -> tuple[int, RewardTree]:
        """Executes a round that changes everything; its gas and its rewards."""
        self.pass_time(self.settings.round_interval_s)
        state = self.chain.round_state(NETWORK)
        wei = self.chain.emission_wei(NETWORK, state.chain_time_s) // max(1, self.num_workers)
        tree = RewardTree(
            self.chain.chain_id, self.addresses.rounds, NETWORK, dict.fromkeys(self.workers, wei * number)
        )
        first = len(self.keys)
        scores = {first + i: 1 + (number * 7 + i) % 250 for i in range(self.num_workers)}
        proposal = RoundProposal(
            NETWORK,
            state.number + 1,
            0,
            state.previous_hash,
            state.chain_time_s,
            pack_reputations(scores),
            tree.root,
            wei * self.num_workers,
            evidence_root=b"e" * 32,
        )
        digest = self.chain.proposal_digest(proposal)
        signatures = in_order(digest, [sign_digest(key, digest) for key in self.keys])
        receipt = self.gateway.transact(self.rounds.execute(proposal.as_abi(), b"".join(signatures)))
        return int(receipt["gasUsed"]), tree

    def claim(self, number: int, tree: RewardTree) -> int:
        account = self.workers[0]
        function = self.rounds.claim(
            NETWORK, number, checksum(account), tree.totals_wei[account], list(tree.proof(account))
        )
        return int(self.gateway.transact(function)["gasUsed"])


def measure(num_validators: int, num_workers: int) -> dict[str, int]:
    with DevnetProcess() as devnet:
        network = Measured(devnet.url, num_validators, num_workers)
        first, tree = network.round(1)
        network.pass_time(600)
        first_claim = network.claim(1, tree)
        gas = {"first round": first, "first claim": first_claim}
        for number in range(2, 67):  # the ring of roots is full from round 65 on
            used, tree = network.round(number)
        network.pass_time(600)
        return gas | {"round": used, "claim": network.claim(66, tree)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--validators", type=int, default=3)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    gas = measure(options.validators, options.workers)
    print(f"{options.validators} validators, {options.workers} workers, every reputation changed:")
    for name, used in gas.items():
        original = ORIGINAL.get((name, options.validators))
        print(f"  {name:12} {used:9,} gas" + (f"   (original {original:,})" if original else ""))
    print(f"  measured in {time.monotonic() - began:.0f} s on the embedded chain (py-evm, cancun)")


if __name__ == "__main__":
    main()
