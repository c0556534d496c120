"""Who may connect: the chain's members, with the role that they registered and a reputation above zero.

An authority is asked in every handshake, and again about live connections whenever the chain has changed. When the
chain cannot be reached, peers that are known stay, and new ones are refused with that reason.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from smartnodes_core.chain.base import ROLES, Member
from smartnodes_core.errors import AuthorityError, ChainError
from smartnodes_core.records import Role
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 15.0
MIN_REFRESH_INTERVAL_S = 1.0
FIRST_LIST_TIMEOUT_S = 10.0


class Authority(Protocol):
    """Decides who may connect. Called on connections' threads, several at once."""

    def admit(self, peer: Peer) -> None:
        """Raises AuthorityError, with the reason, to refuse `peer`. May wait a little for the chain."""
        ...


@runtime_checkable
class WatchingAuthority(Authority, Protocol):
    """An authority whose answers change: `Node` starts it, and asks again about live peers at every change."""

    def start(self, on_change: Callable[[], None]) -> None:
        """Begins to watch; `on_change` is called after every look at the chain."""
        ...

    def stop(self) -> None:
        """Ends watching. Harmless when repeated."""
        ...

    def check(self, peer: Peer) -> None:
        """As `admit`, from what is known, without waiting."""
        ...


class OpenAuthority:
    """Admits everybody: a node that uses it serves strangers, so what it serves must check its callers itself."""

    def admit(self, peer: Peer) -> None:
        """Never refuses."""


class ChainAuthority:
    """Admits live members of the chain's list, which it reads every `poll_interval_s` and, at most once in
    `min_refresh_interval_s`, when somebody unknown appears. `members` may raise ChainError, and is never called twice
    at once. `stake_wei` is what a role has to stake, which does not change.
    """

    def __init__(
        self,
        members: Callable[[], Sequence[Member]],
        *,
        poll_interval_s: float = POLL_INTERVAL_S,
        min_refresh_interval_s: float = MIN_REFRESH_INTERVAL_S,
        stake_wei: Callable[[Role], int] = lambda role: 0,
    ) -> None:
        self._members, self._stake_wei = members, stake_wei
        self._needed_wei: dict[Role, int] = {}
        self._poll_interval_s, self._min_refresh_interval_s = poll_interval_s, min_refresh_interval_s
        self._known: dict[bytes, Member] = {}
        self._by_account: dict[tuple[bytes, bytes], Member] = {}
        self._failure: str | None = "the chain has not been read yet"
        self._refreshed_s = float("-inf")
        self._refreshing = threading.Lock()
        self._stopping = threading.Event()
        self._on_change: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"ChainAuthority({len(self._known)} members, {self._failure or 'chain reachable'})"

    def start(self, on_change: Callable[[], None]) -> None:
        """See `WatchingAuthority`."""
        self._on_change = on_change
        self._thread = threading.Thread(target=self._watch, name="authority", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """See `WatchingAuthority`. A look at the chain that hangs is not waited for."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2.0)

    def admit(self, peer: Peer) -> None:
        """See `Authority`. Reads the chain again when `peer` would be refused, unless that was done a moment ago."""
        try:
            self.check(peer)
        except AuthorityError:
            if not self._refresh_if_old():
                raise
            self.check(peer)

    def check(self, peer: Peer) -> None:
        """See `WatchingAuthority`."""
        hashed = hashlib.sha256(peer.node_key).digest()
        account = peer.binding.account if peer.binding is not None else b""
        member = self._by_account.get((hashed, account)) or self._known.get(hashed)
        if member is None:
            if self._failure is not None:
                raise AuthorityError(f"{peer} is new here and cannot be checked: {self._failure}; try again later")
            if any(each == account for _, each in self._by_account):
                raise AuthorityError(
                    f"{peer} has a revoked node key: account 0x{account.hex()} is registered with another; start the "
                    "node with that identity"
                )
            raise AuthorityError(
                f"{peer} is not registered on chain: register its key {peer.node_key.hex()[:16]} first"
            )
        if peer.binding is None or peer.binding.account != member.account:
            raise AuthorityError(
                f"{peer} is registered by account 0x{member.account.hex()}, which its binding does not name"
            )
        if peer.binding.expires_at_s <= time.time():
            raise AuthorityError(f"the binding of {peer} has expired: it has to sign a new one")
        if member.role != peer.role:
            raise AuthorityError(f"{peer} is registered as {member.role}, not as {peer.role}")
        if member.reputation <= 0:
            raise AuthorityError(f"{peer} is blacklisted: its reputation on chain is 0")
        if not self._takes_part(member):
            raise AuthorityError(
                f"{peer} takes no part: it has left, or its stake on chain is below what its role needs"
            )

    def _takes_part(self, member: Member) -> bool:
        """Also those on the way in or out: whose key waits for a round, who asked to leave and still answers audits."""
        has_stake = member.stake_wei >= self._needed_wei.get(member.role, 0)
        joining = not member.verified and member.exit_at_s == 0 and has_stake
        leaving = member.exit_at_s != 0 and member.stake_wei > 0
        return member.live or joining or leaving

    def _refresh_if_old(self) -> bool:
        """True when the list was read since the caller looked at it, here or by another thread."""
        asked_s = time.monotonic()
        if not self._refreshing.acquire(timeout=FIRST_LIST_TIMEOUT_S):
            return False
        try:
            if self._refreshed_s >= asked_s:
                return True
            if asked_s - self._refreshed_s < self._min_refresh_interval_s:
                return False
            self._read_chain()
            return True
        finally:
            self._refreshing.release()

    def _read_chain(self) -> None:
        try:
            members = self._members()
            self._needed_wei = self._needed_wei or {role: self._stake_wei(role) for role in ROLES}
        except ChainError as error:
            if self._failure is None:
                logger.warning("the chain cannot be read, known peers stay and new ones wait: %s", error)
            self._failure = f"the chain cannot be read: {error}"
        else:
            self._by_account = {(member.key_hash, member.account): member for member in members}
            self._known = by_key_hash(members)
            self._failure = None
        self._refreshed_s = time.monotonic()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            with self._refreshing:
                self._read_chain()
            if self._on_change is not None and not self._stopping.is_set():
                self._on_change()
            self._stopping.wait(self._poll_interval_s)


def by_key_hash(members: Sequence[Member]) -> dict[bytes, Member]:
    """The members by node key: of several that ask for one key, the one that is live."""
    return {member.key_hash: member for member in sorted(members, key=lambda member: member.live)}
