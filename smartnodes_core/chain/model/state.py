"""What one deployment keeps: tokens, coins, escrows, and each network's members, epoch, rounds and rewards."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from smartnodes_core.chain.base import EscrowAccount, ExecutedRound, Member, NoFundsError, RefusedError
from smartnodes_core.chain.proposal import (
    NO_HASH,
    Domain,
    Parameters,
)
from smartnodes_core.chain.settings import ChainSettings
from smartnodes_core.chain.signing import checksum
from smartnodes_core.errors import ChainError

CHAIN_ID = 31337
REGISTRY, ESCROW, ROUNDS, VAULTS = (bytes([number] * 20) for number in range(1, 5))
KEPT_ROOTS = 64
MAX_BURNS = 16
SILENCE_S = 7 * 24 * 3600
COINS_WEI = 10**24  # what every account has at first: nothing costs gas here


@dataclass(frozen=True)
class Root:
    """A rewards root, when it was set, and what its round allotted."""

    root: bytes
    set_at_s: int
    allotment_wei: int


@dataclass
class NetworkModel:
    """One network's members, epoch, rounds and rewards. `owners` are the members' indices by node key hash."""

    share_bps: int
    executed_at_s: int
    emitted_until_s: int
    number: int = 0
    previous_hash: bytes = NO_HASH
    members: list[Member] = field(default_factory=list)
    away: set[int] = field(default_factory=set)
    convicted: set[int] = field(default_factory=set)
    condemned: list[int] = field(default_factory=list)
    owners: dict[bytes, int] = field(default_factory=dict)
    epoch: set[bytes] = field(default_factory=set)
    parameters: Parameters = field(default=Parameters(0, 0))
    next_parameters: Parameters | None = None
    roots: dict[int, Root] = field(default_factory=dict)
    frozen_from: int = 0
    freezer: bytes = b""
    claimed: dict[bytes, int] = field(default_factory=dict)
    unclaimed_wei: int = 0
    executed: dict[int, ExecutedRound] = field(default_factory=dict)

    def find(self, account: bytes) -> Member | None:
        return next((member for member in self.members if member.account == account), None)

    def update(self, index: int, **changes: object) -> None:
        self.members[index] = replace(self.members[index], **changes)  # type: ignore[arg-type]


class ModelState:
    """`clock` gives seconds; `shift_s` moves time on."""

    def __init__(self, settings: ChainSettings, clock: Callable[[], float] = time.time):
        self.settings = settings
        self.lock = threading.RLock()
        self.domain = Domain(CHAIN_ID, ROUNDS)
        self.shift_s = 0
        self._clock = clock
        self.genesis_s = self.now_s()
        self.tokens: dict[bytes, int] = dict(settings.genesis)
        self.burned_wei = 0
        self.minted_wei = 0
        self.coins: dict[bytes, int] = {}
        self.credits: dict[bytes, int] = {}
        self.coin_credits: dict[bytes, int] = {}
        self.escrows: dict[bytes, EscrowAccount] = {}
        self._networks = {
            number: NetworkModel(
                share, self.genesis_s, self.genesis_s, parameters=Parameters(settings.fee_bps, settings.kappa_bps)
            )
            for number, share in settings.networks.items()
        }

    def now_s(self) -> int:
        return int(self._clock()) + self.shift_s

    def network(self, action: str, network_id: int) -> NetworkModel:
        if network_id not in self._networks:
            raise RefusedError(action, "UnknownNetwork", {"networkId": network_id})
        return self._networks[network_id]

    def peek(self, network_id: int) -> NetworkModel:
        """The network, or an empty one for views."""
        return self._networks.get(network_id) or NetworkModel(0, 0, 0)

    def move(self, action: str, source: bytes, target: bytes, amount_wei: int) -> None:
        have = self.tokens.get(source, 0)
        if have < amount_wei:
            raise NoFundsError(f"{action}: {checksum(source)} has {have} wei of SNO, needed are {amount_wei}")
        self.tokens[source] = have - amount_wei
        self.tokens[target] = self.tokens.get(target, 0) + amount_wei

    def move_coins(self, action: str, source: bytes, target: bytes, amount_wei: int) -> None:
        have = self.coins.get(source, COINS_WEI)
        if have < amount_wei:
            raise NoFundsError(f"{action}: {checksum(source)} has {have} wei of coins, needed are {amount_wei}")
        self.coins[source] = have - amount_wei
        self.coins[target] = self.coins.get(target, COINS_WEI) + amount_wei

    def burn(self, source: bytes, amount_wei: int) -> None:
        self.tokens[source] = self.tokens.get(source, 0) - amount_wei
        self.burned_wei += amount_wei

    def credit(self, account: bytes, amount_wei: int, in_coin: bool) -> None:
        credits = self.coin_credits if in_coin else self.credits
        credits[account] = credits.get(account, 0) + amount_wei

    @contextlib.contextmanager
    def all_or_nothing(self, network: NetworkModel) -> Iterator[None]:
        """As a transaction: what is refused on the way leaves no trace. Everything kept is a value or a flat table."""
        tables = ("tokens", "credits", "coin_credits", "escrows", "burned_wei", "minted_wei")
        kept = {name: copy.copy(getattr(self, name)) for name in tables}
        kept_of_network = {name: copy.copy(value) for name, value in vars(network).items()}
        try:
            yield
        except ChainError:
            vars(self).update(kept)
            vars(network).update(kept_of_network)
            raise
