"""A network with the real rules and no machines: `smartnodes_core.rounds` decides what a round holds, the model of the
contracts (`smartnodes_core.chain.model`, which random calls compare with the contracts) carries it.

Accounts are numbers; account n has the key `key(n)`. Gas is not counted: it would only make attacks dearer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.model import ChainModel
from smartnodes_core.chain.proposal import Admission, RoundProposal
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import address_of, sign_digest
from smartnodes_core.nodes.authority import by_key_hash
from smartnodes_core.payments import JobWork, Price
from smartnodes_core.records import Role
from smartnodes_core.rounds import RoundContext, RoundEvidence, Standing, justify, propose

NETWORK = 1
START_S = 1_800_000_000
GENESIS_WEI = 3_000_000 * SNO
FAR_S = 10**9


def key(number: int) -> bytes:
    return hashlib.sha256(b"account of the economy %d" % number).digest()


def account(number: int) -> bytes:
    return address_of(key(number))


def node_key_hash(number: int) -> bytes:
    return hashlib.sha256(b"node key %d" % number).digest()


@dataclass(frozen=True)
class Job:
    """A job of `payer`, which pays `price_wei` of SNO for each unit of work."""

    payer: int
    id: bytes
    price_wei: int


class Economy:
    """`num_validators` honest validators (accounts 0 ..) and whoever registers. `settings` get everybody's genesis."""

    def __init__(self, settings: ChainSettings, num_validators: int = 4, num_accounts: int = 24):
        genesis = {account(n): GENESIS_WEI for n in range(num_accounts)}
        self.now_s = START_S
        self.model = ChainModel(replace(settings, genesis=genesis), lambda: self.now_s)
        self.chains = [MemoryChain(self.model, key(n)) for n in range(num_accounts)]
        self.chain = self.chains[0]
        self.totals_wei: Mapping[bytes, int] = {}
        for n in range(num_validators):
            self.register(n, "validator")

    def register(self, number: int, role: Role, node: int | None = None) -> None:
        """Under its own node key, or that of another."""
        self.chains[number].register(role, node_key_hash(number if node is None else node), NETWORK)

    def admit(self, *numbers: int) -> None:
        """A round that admits these accounts, as their own validators have verified."""
        indices = sorted(self._index(n) for n in numbers)
        self.round(admissions=tuple(Admission(index) for index in indices))

    def open_job(self, payer: int, name: str, price_wei: int, deposit_wei: int) -> Job:
        job = Job(payer, hashlib.sha256(name.encode()).digest(), price_wei)
        self.chains[payer].deposit(NETWORK, job.id, deposit_wei, self.now_s + FAR_S)
        return job

    def work(self, job: Job, units: Mapping[int, int]) -> JobWork:
        """What these accounts' machines did for a job, credited as validators do: to the member with the node key."""
        members = by_key_hash(self.chain.members(NETWORK))
        by_account: dict[bytes, int] = {}
        for n, count in units.items():
            owner = members[node_key_hash(n)].account
            by_account[owner] = by_account.get(owner, 0) + count
        return self.work_of(job, by_account)

    def work_of(self, job: Job, by_account: Mapping[bytes, int]) -> JobWork:
        escrow_id = self.chain.escrow_id(NETWORK, account(job.payer), job.id)
        escrow = self.model.escrows[escrow_id]
        return JobWork(job.id, by_account, Price(job.price_wei, 1), escrow_id, False, escrow.remaining_wei)

    def prepare(
        self, work: Sequence[JobWork] = (), admissions: tuple[Admission, ...] = (), until_s: int | None = None
    ) -> tuple[RoundProposal, Mapping[bytes, int]]:
        """The next round with this in it, and the rewards under its root."""
        state = self.chain.round_state(NETWORK)
        last = self.chain.executed_round(NETWORK, state.number)
        until_s = self.now_s if until_s is None else until_s
        context = RoundContext(
            domain=self.chain.domain,
            network_id=NETWORK,
            round=state.number + 1,
            view=0,
            previous_hash=state.previous_hash,
            until_s=until_s,
            emission_wei=self.chain.emission_wei(NETWORK, until_s),
            num_validators=len(self.chain.validators(NETWORK)),
            parameters=self.chain.parameters(NETWORK),
            signers=last.signers if last else (),
            standings={m.account: Standing(m.index, m.reputation, m.stake_wei) for m in self.chain.members(NETWORK)},
            totals_wei=self.totals_wei,
            frozen_from=state.frozen_from,
        )
        return propose(context, RoundEvidence(work=work, admissions=admissions))

    def round(
        self,
        work: Sequence[JobWork] = (),
        admissions: tuple[Admission, ...] = (),
        choose: Callable[[], int] | None = None,
    ) -> None:
        """One interval later: all validators propose and sign the same. `choose` is the proposer's `until_s`."""
        self.now_s += self.model.settings.round_interval_s
        proposal, totals_wei = self.prepare(work, admissions, choose() if choose else None)
        own, _ = self.prepare(work, admissions, proposal.until_s)
        assert justify(proposal, own) is None
        digest = self.chain.proposal_digest(proposal)
        numbers = {each.account: n for n, each in enumerate(self.chains)}
        signers = [numbers[each] for each in self.chain.validators(NETWORK)]
        self.chain.execute_round(proposal, [sign_digest(key(n), digest) for n in signers])
        self.totals_wei = totals_wei

    def wealth_wei(self, numbers: Iterable[int]) -> int:
        """All that these accounts have: tokens, credits, stakes, what lies in their escrows, and what they have earned
        and not claimed.
        """
        total = 0
        members = {each.account: each.stake_wei for each in self.chain.members(NETWORK)}
        for n in numbers:
            who = account(n)
            balances = self.chain.balances(who)
            earned_wei = self.totals_wei.get(who, 0) - self.chain.claimed_wei(NETWORK, who)
            total += balances.sno_wei + balances.credit_wei + members.get(who, 0) + earned_wei
            total += sum(each.remaining_wei for each in self.model.escrows.values() if each.payer == who)
        return total

    def _index(self, number: int) -> int:
        member = self.chain.member(NETWORK, account(number))
        assert member is not None
        return member.index
