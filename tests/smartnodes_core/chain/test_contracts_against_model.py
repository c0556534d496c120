"""The contracts and the Python model of their rules, given the same calls at random, must do the same.

Short in the suite; `--chain-calls 100000` is the long mode. The answers are compared after every call, and what
must hold of all money; the whole state now and then, and at the end of every run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from smartnodes_core.chain.base import NoFundsError, RefusedError
from smartnodes_core.chain.devnet.direct import Direct, Reverted
from smartnodes_core.chain.emission import mintable_wei
from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.model import COINS_WEI, ChainModel
from smartnodes_core.chain.packing import pack_reputations
from smartnodes_core.chain.proposal import (
    Admission,
    Equivocation,
    Parameters,
    Payment,
    Place,
    RoundProposal,
    Settlement,
    Slash,
)
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of, keccak, sign_digest
from smartnodes_core.chain.votes import in_order

NETWORKS = (1, 2)
KEYS = [hashlib.sha256(b"account %d" % i).digest() for i in range(8)]
ACCOUNTS = [address_of(key) for key in KEYS]
KEY_HASHES = [hashlib.sha256(b"node %d" % i).digest() for i in range(6)]
JOBS = [bytes([i]) * 32 for i in range(1, 4)]
LOOKS = 0.05  # the part of calls after which the whole state is compared: that takes as long as twenty calls
START_S = 1_700_000_000
DAY_S = 24 * 3600
SETTINGS = ChainSettings(
    round_interval_s=600,
    claim_delay_s=900,
    exit_delay_s=3 * DAY_S,
    dispute_window_s=DAY_S,
    worker_stake_wei=100,
    validator_stake_wei=1000,
    freeze_bond_wei=50,
    kappa_bps=10_000,
    emission_decay_s=2 * DAY_S,
    networks={1: 6000, 2: 4000},
    genesis=dict.fromkeys(ACCOUNTS, 1_000_000 * SNO),
)

accounts = st.integers(0, len(KEYS) - 1)
networks = st.sampled_from(NETWORKS)
amounts = st.one_of(st.integers(0, 3), st.integers(0, 10**22), st.integers(0, 2**200))


class Twins(RuleBasedStateMachine):
    """The same calls to both. `calls` counts those of all runs."""

    calls = 0
    executed = 0

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = START_S
        self.model = ChainModel(SETTINGS, clock=lambda: self.now_s)
        self.chains = [MemoryChain(self.model, key) for key in KEYS]
        self.direct = Direct(SETTINGS, START_S, dict.fromkeys(ACCOUNTS, COINS_WEI))
        self.model.domain = self.domain = type(self.model.domain)(31337, self.direct.addresses["Rounds"])
        for account in ACCOUNTS:
            for contract in ("Registry", "Escrow", "Rounds"):
                self.direct.send(account, "SNO", "approve", self.direct.addresses[contract], 2**256 - 1)
        for network in NETWORKS:
            for i in range(4):
                self.register(i, "validator", i, network)
        self.totals: dict[int, dict[bytes, int]] = {network: {} for network in NETWORKS}
        self.trees: dict[tuple[int, int], RewardTree] = {}
        self.signed: list[tuple[RoundProposal, bytes, dict[int, bytes]]] = []

    def both(self, on_model: Callable[[], Any], on_contracts: Callable[[], Any]) -> bool:
        """Whether both did it; a refusal of one alone, or for another reason, is the failure looked for."""
        Twins.calls += 1
        reasons = []
        for act in (on_model, on_contracts):
            try:
                act()
                reasons.append("")
            except NoFundsError:
                reasons.append("no funds")
            except RefusedError as error:
                reasons.append(error.reason)
            except Reverted as error:
                short = error.reason in ("ERC20InsufficientBalance", "insufficient funds for transfer")
                reasons.append("no funds" if short else error.reason)
        assert reasons[0] == reasons[1], (
            f"the model says {reasons[0] or 'yes'!r}, the contracts {reasons[1] or 'yes'!r}"
        )
        return not reasons[0]

    # -- members -----------------------------------------------------------------------------------------------------

    @rule(i=accounts, role=st.sampled_from(["user", "worker", "validator"]), key=st.integers(0, 5), network=networks)
    def register(self, i: int, role: Any, key: int, network: int) -> None:
        number = ("user", "worker", "validator").index(role) + 1
        self.both(
            lambda: self.chains[i].register(role, KEY_HASHES[key], network),
            lambda: self.direct.send(ACCOUNTS[i], "Registry", "register", number, KEY_HASHES[key], network),
        )

    @rule(i=accounts, key=st.integers(-1, 5), network=networks)
    def rotate_key(self, i: int, key: int, network: int) -> None:
        key_hash = KEY_HASHES[key] if key >= 0 else bytes(32)
        self.both(
            lambda: self.chains[i].rotate_key(key_hash, network),
            lambda: self.direct.send(ACCOUNTS[i], "Registry", "rotateKey", key_hash, network),
        )

    @rule(i=accounts, network=networks, what=st.sampled_from(["request_exit", "withdraw_stake", "post_tip"]))
    def as_member(self, i: int, network: int, what: str) -> None:
        function = {"request_exit": "requestExit", "withdraw_stake": "withdraw", "post_tip": "postTip"}[what]
        tip = (b"t" * 32,) if what == "post_tip" else ()
        self.both(
            lambda: getattr(self.chains[i], what)(network, *tip),
            lambda: self.direct.send(ACCOUNTS[i], "Registry", function, network, *tip),
        )

    # -- money -------------------------------------------------------------------------------------------------------

    @rule(i=accounts, network=networks, job=st.sampled_from(JOBS), amount=amounts, in_coin=st.booleans())
    def deposit(self, i: int, network: int, job: bytes, amount: int, in_coin: bool) -> None:
        deadline = self.now_s + self.random.choice([-1, 0, 1, 3600, 20 * DAY_S])
        chain, sender = self.chains[i], ACCOUNTS[i]
        if in_coin:
            amount = min(amount, chain.balances(sender).coin_wei)  # or there would be no transaction at all
            self.both(
                lambda: chain.deposit_coin(network, job, amount, deadline),
                lambda: self.direct.send(sender, "Escrow", "depositCoin", network, job, deadline, value_wei=amount),
            )
        else:
            self.both(
                lambda: chain.deposit(network, job, amount, deadline),
                lambda: self.direct.send(sender, "Escrow", "deposit", network, job, amount, deadline),
            )

    @rule(payer=accounts, network=networks, job=st.sampled_from(JOBS))
    def refund(self, payer: int, network: int, job: bytes) -> None:
        self.refund_any(self.chains[0].escrow_id(network, ACCOUNTS[payer], job))

    def refund_any(self, escrow_id: bytes) -> None:
        self.both(
            lambda: self.chains[0].refund(escrow_id),
            lambda: self.direct.send(ACCOUNTS[0], "Escrow", "refund", escrow_id),
        )

    @rule(i=accounts, other=accounts, in_coin=st.booleans())
    def withdraw(self, i: int, other: int, in_coin: bool) -> None:
        if in_coin:
            self.both(
                lambda: self.chains[i].withdraw_coin_credit(ACCOUNTS[other]),
                lambda: self.direct.send(ACCOUNTS[i], "Escrow", "withdrawCoin", ACCOUNTS[other]),
            )
        else:
            self.both(
                lambda: self.chains[i].withdraw_credit(ACCOUNTS[other]),
                lambda: self.direct.send(ACCOUNTS[i], "Escrow", "withdraw", ACCOUNTS[other]),
            )

    @rule(seconds=st.sampled_from([1, 599, 600, 601, 1800, DAY_S, 8 * DAY_S]))
    def pass_time(self, seconds: int) -> None:
        self.now_s += seconds
        self.direct.now_s = self.now_s

    # -- rounds ------------------------------------------------------------------------------------------------------

    @rule(network=networks, mischief=st.integers(0, 9))
    def execute(self, network: int, mischief: int) -> None:
        if mischief > 1:
            self.pass_time(600)
        proposal = self.proposal(network, sound=mischief > 3)
        signatures = self.signatures(proposal, everybody=mischief > 2)
        tree = self.planned
        packed = b"".join(in_order(self.domain.digest(proposal), signatures))
        done = self.both(
            lambda: self.chains[0].execute_round(proposal, signatures),
            lambda: self.direct.send(ACCOUNTS[7], "Rounds", "execute", proposal.as_abi(), packed),
        )
        if done:
            Twins.executed += 1
            if any(proposal.rewards_root):
                self.totals[network] = dict(tree.totals_wei)
                self.trees[network, proposal.round] = tree

    @rule(network=networks)
    def hold_a_round(self, network: int) -> None:
        self.execute(network, mischief=9)

    @rule(network=networks)
    def hold_and_claim(self, network: int) -> None:
        self.execute(network, mischief=9)
        self.pass_time(1800)
        self.claim(0, network, wrong=1)

    def proposal(self, network: int, sound: bool) -> RoundProposal:
        draw, state = self.random, self.model.state(network)
        number_of_members = len(self.chains[0].members(network))
        emission = self.chains[0].emission_wei(network, self.now_s)
        allotment = draw.choice([0, 1, emission * 15 // 100, emission, emission + 1] if not sound else [0, 1, 2])
        totals = dict(self.totals[network])
        for account in draw.sample(ACCOUNTS, 2):
            totals[account] = totals.get(account, 0) + allotment // 2
        self.planned = RewardTree(31337, self.domain.contract, network, totals)
        indices = range(number_of_members + (0 if sound else 1))
        scores = {
            i: draw.choice([0, 1, 9, 255]) for i in draw.sample(indices, draw.randint(0, 2)) if i > 2 or not sound
        }
        settlements = [
            Settlement(
                self.chains[0].escrow_id(draw.choice(NETWORKS), draw.choice(ACCOUNTS), draw.choice(JOBS)),
                draw.choice([0, 0, 7, 10**21]),
                tuple(Payment(draw.choice(ACCOUNTS), draw.choice([0, 1, 10**20])) for _ in range(draw.randint(0, 2))),
            )
            for _ in range(draw.randint(0, 3))
        ]
        return RoundProposal(
            network_id=network,
            round=state.number + (1 if sound else draw.choice([0, 1, 1, 2])),
            view=draw.choice([0, 0, 1]),
            previous_hash=state.previous_hash if sound or draw.random() < 0.8 else b"p" * 32,
            until_s=self.now_s - draw.choice([0, 0, 100]) + (0 if sound else draw.choice([0, 1])),
            reputations=pack_reputations(scores),
            rewards_root=self.planned.root if allotment or draw.random() < 0.3 else bytes(32),
            allotment_wei=allotment,
            admissions=tuple(Admission(draw.choice(range(9)), draw.choice([0, 5])) for _ in range(draw.randint(0, 3))),
            slashes=tuple(
                Slash(draw.choice([3, 4, 5, 99]), draw.choice([1, 10**30])) for _ in range(draw.randint(0, 1))
            ),
            settlements=tuple(settlements),
            ruling=draw.choice([0, 1, 2]),
            ruled_round=state.frozen_from or draw.choice([0, 1]),
            parameters=(Parameters(draw.choice([0, 500, 10_000]), draw.choice([0, 10_000, 2**32 - 1])),)
            if draw.random() < 0.1
            else (),
        )

    def signatures(self, proposal: RoundProposal, everybody: bool) -> list[bytes]:
        digest = self.domain.digest(proposal)
        keys = KEYS if everybody else self.random.sample(KEYS, self.random.randint(0, len(KEYS)))
        signed = [sign_digest(key, digest) for key in keys]
        self.signed.append((proposal, digest, dict(enumerate(signed))))
        return signed

    @rule(network=networks, signers=st.sets(accounts, max_size=3))
    def endorse(self, network: int, signers: set[int]) -> None:
        digest = self.model.state(network).previous_hash
        signatures = [sign_digest(KEYS[i], digest) for i in signers]
        self.both(
            lambda: self.chains[0].endorse_round(network, signatures),
            lambda: self.direct.send(ACCOUNTS[7], "Rounds", "endorse", network, b"".join(in_order(digest, signatures))),
        )

    @rule(i=accounts, network=networks, forged=st.integers(0, 5))
    def prove_equivocation(self, i: int, network: int, forged: int) -> None:
        if i < 3:  # or too few would be left to hold rounds
            return
        place = Place(network, self.random.randint(1, 9), 0, b"p" * 32)
        contents = (keccak(b"a"), keccak(b"b" if forged else b"a"))
        other = KEYS[0] if forged == 1 else KEYS[i]
        signatures = [
            sign_digest(key, self.domain.digest_of(place, content))
            for key, content in zip((KEYS[i], other), contents, strict=True)
        ]
        proof = Equivocation(place, contents, (signatures[0], signatures[1]))
        fields = (place.network_id, place.round, place.view, place.previous_hash)
        self.both(
            lambda: self.chains[0].prove_equivocation(proof),
            lambda: self.direct.send(
                ACCOUNTS[7], "Rounds", "proveEquivocation", fields, list(contents), b"".join(signatures)
            ),
        )

    @rule(i=accounts, network=networks)
    def freeze(self, i: int, network: int) -> None:
        number = self.model.state(network).latest_root_round - self.random.choice([0, 0, 1])
        if number < 0:
            return
        self.both(
            lambda: self.chains[i].freeze_root(network, number),
            lambda: self.direct.send(ACCOUNTS[i], "Rounds", "freeze", network, number),
        )

    @rule(i=accounts, network=networks, wrong=st.integers(0, 4))
    def claim(self, i: int, network: int, wrong: int) -> None:
        rounds = [number for of, number in self.trees if of == network]
        if not rounds:
            return
        number = self.random.choice(rounds[-3:])
        tree = self.trees[network, number]
        account = self.random.choice(list(tree.totals_wei))
        total = tree.totals_wei[account] + (1 if wrong == 0 else 0)
        proof = tree.proof(account)
        self.both(
            lambda: self.chains[i].claim(network, number, account, total, proof),
            lambda: self.direct.send(ACCOUNTS[i], "Rounds", "claim", network, number, account, total, list(proof)),
        )

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def both_know_the_same(self) -> None:
        if hasattr(self, "signed") and self.random.random() < LOOKS:
            for network in NETWORKS:
                self.compare(network)

    def compare(self, network: int) -> None:
        for account in ACCOUNTS:
            seen = self.chains[0].balances(account)
            assert self.direct.read("SNO", "balanceOf", account) == seen.sno_wei
            assert self.direct.read("Escrow", "credits", account) == seen.credit_wei
        found = [tuple(member) for member in self.direct.read("Registry", "members", network, 0, 100)[0]]
        wanted = [
            (
                "0x" + member.account.hex(),
                ("user", "worker", "validator").index(member.role) + 1,
                member.live,
                member.reputation,
                member.index,
                member.exit_at_s,
                member.stake_wei,
                member.key_hash,
                member.tip,
                member.verified,
                member.capability,
            )
            for member in self.chains[0].members(network)
        ]
        assert found == wanted
        for key_hash in KEY_HASHES:
            owner = self.chains[0].account_of_key(network, key_hash) or bytes(20)
            assert self.direct.read("Registry", "accountOf", network, key_hash) == "0x" + owner.hex()
        state = self.model.state(network)
        assert self.direct.read("Rounds", "state", network) == tuple(vars(state).values())

    @invariant()
    def money_adds_up(self) -> None:
        if not hasattr(self, "signed"):
            return
        supply = self.direct.read("SNO", "totalSupply")
        genesis = sum(SETTINGS.genesis.values())
        assert supply == genesis + self.model.minted_wei - self.model.burned_wei
        assert self.model.minted_wei <= mintable_wei(SETTINGS, self.now_s - START_S)
        escrows = self.model.escrows.values()
        for in_coin, credits in ((False, self.model.credits), (True, self.model.coin_credits)):
            owed = sum(e.remaining_wei for e in escrows if e.in_coin == in_coin) + sum(credits.values())
            address = self.direct.addresses["Escrow"]
            held = self.direct.evm.balance(address) if in_coin else self.direct.read("SNO", "balanceOf", address)
            assert held == owed, f"the escrow holds {held} and owes {owed}"
        stakes = sum(m.stake_wei for network in NETWORKS for m in self.chains[0].members(network))
        assert self.direct.read("SNO", "balanceOf", self.direct.addresses["Registry"]) == stakes

    def teardown(self) -> None:
        """Every honest staker can withdraw in the end, and every escrow is refunded without a round."""
        if not hasattr(self, "signed"):
            return
        for network in NETWORKS:
            for i in range(len(KEYS)):
                self.as_member(i, network, "request_exit")
        self.pass_time(8 * DAY_S)
        for network in NETWORKS:
            for i in range(len(KEYS)):
                self.as_member(i, network, "withdraw_stake")
            held = [m for m in self.chains[0].members(network) if m.stake_wei]
            assert all(m.index in self.model.peek(network).convicted for m in held)
        for escrow_id in list(self.model.escrows):
            self.refund_any(escrow_id)
        for network in NETWORKS:
            self.compare(network)
        self.money_adds_up()
        assert all(escrow.remaining_wei == 0 for escrow in self.model.escrows.values())


@pytest.mark.timeout(0)  # the long mode takes most of an hour; each call is a few milliseconds of this process
def test_contracts_and_model_do_the_same_whatever_is_called(request: pytest.FixtureRequest) -> None:
    wanted = request.config.getoption("--chain-calls")
    steps = 60
    Twins.calls = Twins.executed = 0
    while Twins.calls < wanted:
        examples = max(1, min(500, (wanted - Twins.calls) // steps))
        run_state_machine_as_test(
            Twins,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                phases=(Phase.generate, Phase.shrink),  # to explain a failure every line would be traced
                derandomize=wanted < 1000,
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert Twins.executed > Twins.calls // 100, "too few rounds were executed for the test to say much"
