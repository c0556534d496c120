"""What the chain says of a network's members, kept for a moment; and this node's own registration."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from smartnodes_core.chain.base import Chain, Member, RefusedError
from smartnodes_core.errors import AuthorityError, ChainError, ConfigError
from smartnodes_core.nodes.authority import by_key_hash
from smartnodes_core.records import NodeKey, Role

logger = logging.getLogger(__name__)

#: A list this old still answers questions about members that are in it.
MAX_AGE_S = 10.0
#: A list this old is read again for a member that is not in it.
FRESH_S = 0.5


def key_hash(node_key: NodeKey) -> bytes:
    """The hash under which a node key is registered on chain."""
    return hashlib.sha256(node_key).digest()


class Membership:
    """Members of one network by node key.

    The list is read by one thread at a time: again for a member that is in it when it is older than `max_age_s`, while
    others go on with the old one, and soon for somebody unknown. While the chain cannot be read, what is known stays.
    """

    def __init__(self, chain: Chain, network_id: int, max_age_s: float = MAX_AGE_S):
        self.chain, self.network_id, self.max_age_s = chain, network_id, max_age_s
        self._reading = threading.Lock()
        self._read_at_s = self._retry_at_s = float("-inf")
        self._members: list[Member] = []
        self._by_hash: dict[bytes, Member] = {}
        self._contested: set[bytes] = set()
        self._node_keys: dict[bytes, NodeKey] = {}
        self._revoked: dict[bytes, bytes] = {}

    def members(self, max_age_s: float = FRESH_S) -> Sequence[Member]:
        """All members, as `ChainAuthority` takes them. Raises ChainError."""
        with self._reading:
            self._read_if_older(max_age_s)
            return self._members

    def _read_if_older(self, max_age_s: float) -> None:
        if time.monotonic() - self._read_at_s > max_age_s:
            members = self.chain.members(self.network_id)
            self._by_hash = by_key_hash(members)
            claims = Counter(member.key_hash for member in members)
            verified = {member.key_hash for member in members if member.verified}
            self._contested = {key for key, count in claims.items() if count > 1 and key not in verified}
            self._members = members
            hashes = {member.account: member.key_hash for member in members}
            met = list(self._node_keys.items())  # others add to it meanwhile
            self._node_keys = {account: key for account, key in met if hashes.get(account) == key_hash(key)}
            self._read_at_s = time.monotonic()

    def _is_due(self) -> bool:
        now_s = time.monotonic()
        return now_s - self._read_at_s > self.max_age_s and now_s >= self._retry_at_s

    def of(self, node_key: NodeKey) -> Member | None:
        """The member with this node key, or None. Remembers the key, so that `node_key_of` finds it.

        Raises ChainError for somebody unknown while the chain cannot be read.
        """
        hashed = key_hash(node_key)
        if hashed not in self._by_hash:
            self.members(FRESH_S)
        elif self._is_due() and self._reading.acquire(blocking=False):
            try:
                self._read_if_older(self.max_age_s)
            except ChainError as error:
                logger.warning("the chain's list of members is not renewed: %s", error)
                self._retry_at_s = time.monotonic() + FRESH_S
            finally:
                self._reading.release()
        member = self._by_hash.get(hashed)
        if member is not None:
            self._node_keys[member.account] = node_key
        return member

    def node_key_of(self, account: bytes) -> NodeKey | None:
        """The node key behind an account, if this node has met it."""
        return self._node_keys.get(account)

    def account_of(self, node_key: NodeKey) -> bytes | None:
        """Who answers for what a node key signed: its member, or the account that has revoked it since. Raises as `of`,
        also for a revoked key that was not asked for before.
        """
        member = self.of(node_key)
        if member is not None:
            return member.account
        hashed = key_hash(node_key)
        if hashed not in self._revoked:
            account = self.chain.account_of_key(self.network_id, hashed)
            if account is None:
                return None
            self._revoked[hashed] = account
        return self._revoked[hashed]

    def is_contested(self, node_key: NodeKey) -> bool:
        """Whether several accounts ask for this node key and no round has said yet whose it is. Raises as `of`."""
        self.of(node_key)
        return key_hash(node_key) in self._contested

    def reputation_of(self, node_key: NodeKey) -> int | None:
        """None where the key is not registered or has left."""
        member = self.of(node_key)
        return member.reputation if member and member.live else None

    def role_of(self, node_key: NodeKey) -> Role | None:
        """The role of a member that is not blacklisted and has not left; None for everybody else.

        Waits a moment for one that may just have registered.
        """
        member = self.of(node_key)
        if member is None:
            threading.Event().wait(max(0.0, self._read_at_s + FRESH_S - time.monotonic()) + 0.001)
            member = self.of(node_key)
        return member.role if member and member.live and member.reputation else None

    def tip_of(self, node_key: NodeKey) -> bytes | None:
        """A validator's hash-chain tip, None where none was posted."""
        member = self.of(node_key)
        return member.tip if member and any(member.tip) else None

    def join(self, role: Role, node_key: NodeKey, tip: bytes | None = None) -> Member:
        """Register this node (unless it is) and post a validator's tip (unless it stands).

        Raises AuthorityError where the account is registered otherwise or blacklisted, and what the chain raises.
        """
        account = self.chain.account
        member = self.chain.member(self.network_id, account)
        if member is None:
            self._register(role, node_key)
            member = self.chain.member(self.network_id, account)
        if member is None:
            raise ConfigError("the registration is not on chain although the chain accepted it: is it another network?")
        if (member.role, member.key_hash) != (role, key_hash(node_key)):
            raise AuthorityError(
                f"account 0x{account.hex()} is registered as {member.role} with another node key: use another account, "
                "the identity it was registered with, or give it this one with `tensorlink stake rotate`"
            )
        if member.reputation == 0:
            raise AuthorityError(f"account 0x{account.hex()} is blacklisted in network {self.network_id}")
        if tip is not None and member.tip != tip:
            self.chain.post_tip(self.network_id, tip)
        return member

    def _register(self, role: Role, node_key: NodeKey) -> None:
        try:
            self.chain.register(role, key_hash(node_key), self.network_id)
        except RefusedError as error:
            if error.reason == "UnknownNetwork":
                raise ConfigError(
                    f"network {self.network_id} is not open in these contracts: set network_id to one that their "
                    "deploy file opened"
                ) from error
            if error.reason == "KeyTaken":
                raise AuthorityError(
                    f"this node's key belongs to account {error.values.get('owner')}: use that account, or another "
                    "identity"
                ) from error
            if error.reason != "AlreadyRegistered":  # by another process of this account, a moment ago
                raise
