"""Five attackers. Each plays `rounds` rounds and returns what it has gained, in wei of SNO; `defended` False takes the
defence away, to show that the attacker would know how to use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from attacks.economy import NETWORK, Economy, account
from smartnodes_core.chain.settings import SNO, ChainSettings
from smartnodes_core.chain.signing import keccak, word
from smartnodes_core.payments import JobWork
from smartnodes_core.rounds import draw_proposers

Draw = Callable[[Iterable[bytes], bytes, int], list[bytes]]
USER, WORKER, HONEST_USER, HONEST_WORKER, VALIDATOR = 10, 11, 12, 13, 3
PRICE_WEI = SNO // 100
UNITS = 10_000
#: What a job of the honest user pays a round.
PAY_WEI = PRICE_WEI * UNITS


def wash_trader(rounds: int, defended: bool = True, kappa_bps: int | None = None) -> int:
    """Hires itself, at ten times the price of others, and computes for nothing. Without the cap of kappa times what a
    job burned, work alone would be paid.
    """
    settings = ChainSettings() if defended else ChainSettings(kappa_bps=(1 << 32) - 1)
    if kappa_bps is not None:
        settings = replace(settings, kappa_bps=kappa_bps)
    economy = _economy(settings, WORKER, HONEST_WORKER)
    own = economy.open_job(USER, "wash", 10 * PRICE_WEI, 1_000_000 * SNO)
    honest = economy.open_job(HONEST_USER, "honest", PRICE_WEI, 1_000_000 * SNO)
    before = economy.wealth_wei([USER, WORKER])
    for _ in range(rounds):
        economy.round([economy.work(own, {WORKER: UNITS // 10}), economy.work(honest, {HONEST_WORKER: UNITS})])
    return economy.wealth_wei([USER, WORKER]) - before


def key_squatter(rounds: int, defended: bool = True, early: bool = False) -> int:
    """Registers the node key of a worker before the worker does, `early` also before the network's first round. Without
    verification the first to come would be paid for the worker's work.
    """
    economy = Economy(ChainSettings())
    if not early:
        economy.admit(0, 1, 2, 3)
    before = economy.wealth_wei([WORKER])
    economy.register(WORKER, "worker", node=HONEST_WORKER)
    economy.register(HONEST_WORKER, "worker")
    economy.admit(HONEST_WORKER if defended else WORKER)
    honest = economy.open_job(HONEST_USER, "honest", PRICE_WEI, 1_000_000 * SNO)
    for _ in range(rounds):
        economy.round([economy.work(honest, {HONEST_WORKER: UNITS})])
    return economy.wealth_wei([WORKER]) - before


def identity_splitter(rounds: int, defended: bool = True, identities: int = 7) -> int:
    """Does the same work under many accounts, against doing it under one. Paid by the head it would gain."""

    def play(split: bool) -> int:
        own = list(range(14, 14 + identities))
        economy = _economy(ChainSettings(), HONEST_WORKER, *own)
        honest = economy.open_job(HONEST_USER, "honest", PRICE_WEI, 1_000_000 * SNO)
        before = economy.wealth_wei(own)
        shares = (
            {n: UNITS // identities + (i < UNITS % identities) for i, n in enumerate(own)} if split else {own[0]: UNITS}
        )
        for _ in range(rounds):
            work = economy.work(honest, {HONEST_WORKER: UNITS, **shares})
            economy.round([work if defended else _by_the_head(work)])
        return economy.wealth_wei(own) - before

    return play(True) - play(False)


def _by_the_head(work: JobWork) -> JobWork:
    each = sum(work.units.values()) // len(work.units)
    return replace(work, units=dict.fromkeys(work.units, each))


def as_drawn(validators: Iterable[bytes], previous_hash: bytes, round_number: int) -> list[bytes]:
    """The order of proposers as validators draw it: no proposal changes it."""
    return draw_proposers(validators, round_number)


def by_the_last_digest(validators: Iterable[bytes], previous_hash: bytes, round_number: int) -> list[bytes]:
    """An order of proposers that whoever proposes can choose: each variant of a proposal gives another."""
    return sorted(validators, key=lambda each: keccak(previous_hash + word(round_number) + each))


class SeedGrinder:
    """A validator that has hired an honest worker and leaves its work out of every round that it proposes, which voters
    let it do; what is never settled it would be paid back. Whenever it proposes, it tries `tries` more values of
    `until_s` until one makes it propose the next round too.
    """

    def __init__(self, rounds: int, draw: Draw, tries: int = 600):
        self.tries, self.proposed = tries, 0
        self._rounds, self._draw = rounds, draw
        self._economy = _economy(ChainSettings(), HONEST_WORKER)

    def play(self) -> int:
        economy = self._economy
        job = economy.open_job(VALIDATOR, "own", PRICE_WEI, 1_000_000 * SNO)
        before, unpaid = economy.wealth_wei([VALIDATOR]), 0
        for _ in range(self._rounds):
            unpaid += UNITS
            state = economy.chain.round_state(NETWORK)
            if self._is_mine(state.previous_hash, state.number + 1):
                self.proposed += 1
                economy.round(choose=self._grind)
            else:
                economy.round([economy.work(job, {HONEST_WORKER: unpaid})])
                unpaid = 0
        received_wei = self._rounds * PAY_WEI  # in work, at the price that it promised
        return economy.wealth_wei([VALIDATOR]) - before - signers_part_wei(self._rounds) + received_wei

    def _grind(self) -> int:
        economy = self._economy
        state, now_s = economy.chain.round_state(NETWORK), economy.now_s
        for until_s in range(now_s, max(state.emitted_until_s, now_s - self.tries) - 1, -1):
            digest = economy.chain.proposal_digest(economy.prepare(until_s=until_s)[0])
            if self._is_mine(digest, state.number + 2):
                return until_s
        return now_s

    def _is_mine(self, previous_hash: bytes, round_number: int) -> bool:
        return self._draw(self._economy.chain.validators(NETWORK), previous_hash, round_number)[0] == account(VALIDATOR)


def seed_grinder(rounds: int, defended: bool = True) -> int:
    return SeedGrinder(rounds, as_drawn if defended else by_the_last_digest).play()


def signers_part_wei(rounds: int) -> int:
    """What a validator earns by signing, whoever proposes."""
    economy = _economy(ChainSettings(), HONEST_WORKER)
    before = economy.wealth_wei([VALIDATOR])
    for _ in range(rounds):
        economy.round()
    return economy.wealth_wei([VALIDATOR]) - before


def bond_griefer(rounds: int, defended: bool = True) -> int:
    """Freezes every rewards root while its funds last, and is paid by somebody as much as it stops, which nobody would.
    Without a bond that would be a business.
    """
    economy = _economy(ChainSettings() if defended else ChainSettings(freeze_bond_wei=0), HONEST_WORKER)
    honest = economy.open_job(HONEST_USER, "honest", PRICE_WEI, 1_000_000 * SNO)
    before, stopped_wei = economy.wealth_wei([VALIDATOR]), 0
    for _ in range(rounds):
        economy.round([economy.work(honest, {HONEST_WORKER: UNITS})])
        state = economy.chain.round_state(NETWORK)
        can_pay = economy.chain.balances(account(VALIDATOR)).sno_wei >= economy.model.settings.freeze_bond_wei
        if can_pay and not state.frozen_from:
            economy.chains[VALIDATOR].freeze_root(NETWORK, state.number)
            stopped_wei += economy.model.peek(NETWORK).roots[state.number].allotment_wei
    return economy.wealth_wei([VALIDATOR]) - before - signers_part_wei(rounds) + stopped_wei


def _economy(settings: ChainSettings, *workers: int) -> Economy:
    """With four validators and these workers, all admitted."""
    economy = Economy(settings)
    for n in workers:
        economy.register(n, "worker")
    economy.admit(0, 1, 2, 3, *workers)
    return economy
