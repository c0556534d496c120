"""What every role stands on: an identity with its account, a node that listens, the chain, and a place in the
directory.

`Station.open` is the first half of the story of a rig: load the keys, listen, register on chain, join the network,
announce.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from io import FileIO

from smartnodes_core.chain.account import load_account_key
from smartnodes_core.chain.base import Chain
from smartnodes_core.chain.settings import Addresses
from smartnodes_core.config import NodeConfig
from smartnodes_core.dht.announcer import Announcer
from smartnodes_core.dht.contacts import MAX_ENDPOINTS, Contact
from smartnodes_core.dht.directory import Directory, find
from smartnodes_core.dht.node import DhtNode
from smartnodes_core.dht.running import RunningDht
from smartnodes_core.dht.storage import RecordStore
from smartnodes_core.errors import AuthorityError, ChainError, JobError, SmartnodesError, Unavailable
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.keyfile import hold_key_file
from smartnodes_core.nodes.authority import ChainAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.introducing import IntroductionDesk
from smartnodes_core.nodes.job_copies import JobCopy, fetch_job
from smartnodes_core.nodes.meeting import MeetingDesk
from smartnodes_core.nodes.membership import Membership
from smartnodes_core.nodes.reachability import Reachability, assess
from smartnodes_core.nodes.renewing import Renewer
from smartnodes_core.records import Announcement, NodeKey, Role, Signed, SignedBinding
from smartnodes_core.transport.relay import Relay
from smartnodes_core.transport.relay_quotas import RelayQuotas
from smartnodes_core.transport.tls import TlsTransport

logger = logging.getLogger(__name__)

BINDING_LIFETIME_S = 30 * 24 * 3600
CONNECT_TIMEOUT_S = 15.0
JOIN_TIMEOUT_S = 10.0
JOIN_PAUSE_S = 0.3
LEARN_PAUSE_S = 2.0


@dataclass
class Station:
    """A listening, registered node. Roles are served on `node` before `announce` makes it findable."""

    config: NodeConfig
    role: Role
    identity: Identity
    account_key: bytes
    chain: Chain
    membership: Membership
    node: Node
    renewer: Renewer
    meetings: MeetingDesk
    relay: Relay | None = None
    bootstrap_keys: list[NodeKey] = field(default_factory=list)
    directory: Directory | None = None
    dht: RunningDht | None = None
    #: How others reach this node, once a worker or a validator has joined.
    reachability: Reachability | None = None
    #: What this node itself keeps of a job's record; validators set it.
    own_copy: Callable[[bytes], JobCopy | None] = lambda job_id: None
    _announcer: Announcer | None = None
    _held: FileIO | None = None
    _learn_at_s: float = 0.0
    _num_learnt: int = 0

    @classmethod
    def open(cls, config: NodeConfig, role: Role, tip: bytes | None = None) -> Station:
        """Load the keys, listen, connect to the chain, register. Raises IdentityError, ConfigError, PortInUseError,
        ChainError,
        AuthorityError, each with the remedy."""
        passphrase = config.passphrase()
        identity = Identity.load(config.identity, passphrase)
        account_key = load_account_key(config.account, passphrase)
        addresses = Addresses.read(config.addresses)
        held = hold_key_file(config.identity)
        try:
            opened = cls._open(config, role, tip, identity, account_key, addresses)
        except BaseException:
            held.close()
            raise
        opened._held = held
        return opened

    @classmethod
    def _open(
        cls,
        config: NodeConfig,
        role: Role,
        tip: bytes | None,
        identity: Identity,
        account_key: bytes,
        addresses: Addresses,
    ) -> Station:
        place = (role, addresses.chain_id, addresses.registry, config.network_id)

        def bind() -> SignedBinding:
            return make_binding(identity, account_key, *place, int(time.time()) + BINDING_LIFETIME_S)

        binding = bind()
        connecting: Future[Membership] = Future()
        authority = ChainAuthority(
            lambda: _joined(connecting).members(max_age_s=0.0),
            poll_interval_s=config.chain_poll_interval_s,
            min_refresh_interval_s=0.5,
            stake_wei=lambda role: _joined(connecting).chain.stake_wei(role),
        )
        endpoint = None if role == "user" else config.endpoint
        transport = TlsTransport(identity, binding, congestion_control=config.congestion_control)
        node = Node(identity, binding, transport, authority, endpoint, config.num_bulk_connections)
        quotas = RelayQuotas(peer_bytes_per_s=config.relay_mbit * 125_000)
        relay = Relay(config.relay, quotas) if config.relay else None
        IntroductionDesk(node, relay)
        meetings = MeetingDesk(node)
        try:
            if relay is not None:
                relay.start()
            node.start()  # before web3 is imported: a node listens at once
            from smartnodes_core.chain.client import ChainClient

            chain = ChainClient(config.rpc_url, addresses, account_key)
            membership = Membership(chain, config.network_id)
            membership.join(role, identity.node_key, tip)
            connecting.set_result(membership)
        except BaseException:
            connecting.cancel()
            node.stop()
            if relay is not None:
                relay.stop()
            raise
        renewer = Renewer(node, bind, BINDING_LIFETIME_S / 2)
        renewer.start()
        return cls(config, role, identity, account_key, chain, membership, node, renewer, meetings, relay)

    def join(self) -> None:
        """Reach the bootstrap validators; a validator also serves the directory. Raises the last error when none is
        reached.
        """
        if self.role == "validator":
            self.directory = Directory(self.node, RecordStore(self.config.network_id))
        if self.role != "validator":
            self.config.need_bootstrap()
        contacts: list[Contact] = []
        failure: SmartnodesError | None = None
        for endpoint in self.config.bootstrap:
            try:
                self.bootstrap_keys.append(self._reach(endpoint))
                contacts.append(Contact(self.bootstrap_keys[-1], (endpoint,)))
            except SmartnodesError as error:
                failure = error
                logger.warning("bootstrap %s: %s", endpoint, error)
        if failure is not None and not self.bootstrap_keys and self.role != "validator":
            raise failure
        for key in self.bootstrap_keys:
            if self.directory is not None:
                self.directory.sync_from(key)
        self.dht = RunningDht(self.node, self.config.network_id, self._registered_role, lambda: contacts)
        self.dht.start()

    def _registered_role(self, node_key: NodeKey) -> Role | None:
        """A member's role, also before a round has admitted it; None for who is blacklisted or not registered."""
        try:
            member = self.membership.of(node_key)
        except ChainError as error:
            logger.info("the role of node %s is not known: %s", node_key.hex()[:8], error)
            return None
        return member.role if member is not None and member.reputation else None

    def _reach(self, endpoint: str) -> NodeKey:
        """The node key at `endpoint`. A validator that has not yet seen our registration on chain is asked again."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        pause = threading.Event()
        while True:
            try:
                return self.node.connect(endpoint).node_key
            except (AuthorityError, Unavailable):
                if time.monotonic() > deadline:
                    raise
            pause.wait(JOIN_PAUSE_S)

    def announce(self, offers: Callable[[], dict[str, int | str]]) -> None:
        """Make this node findable, and keep it so."""
        announcer = Announcer(
            self.node,
            self.bootstrap_keys,
            self.role,
            self.config.network_id,
            offers,
            endpoints=self.config.announce_as or self._endpoints(),
            directory=self.directory,
            publish=self._publish,
        )
        announcer.start()
        self._announcer = announcer

    def _publish(self, signed: Signed) -> None:
        """Take part in the DHT where this node is announced to be reached, and be found there."""
        introduced = self.reachability is not None and self.reachability.kind == "introduced"
        if self.dht is not None and not introduced:
            self.dht.take_part(Announcement.decode(signed.record).endpoints[:MAX_ENDPOINTS])
            self.dht.dht.put(signed)

    def _endpoints(self) -> list[str]:
        """Where this node is to be dialled, as found out now."""
        if self.reachability is None:
            asked = [key for key in self.bootstrap_keys if key != self.node.node_key]
            self.reachability = assess(self.node, asked, may_map=self.config.port_mapping)
            logger.info("how others reach this node: %s", self.reachability)
            if self.reachability.mapping is not None:
                self.reachability.mapping.keep()
        return list(self.reachability.endpoints)

    def update_announcement(self) -> None:
        """Something in what this node offers has changed."""
        if self._announcer is not None:
            self._announcer.update()

    def find(self, role: Role) -> list[Announcement]:
        """Live members of a role that have announced themselves, and are good on chain. Raises Unavailable."""
        if self.directory is not None:
            found = self.directory.find(role)
        else:
            found = find(self.node, self.bootstrap_keys, role, self.config.network_id)
        return [each for each in found if self.membership.reputation_of(each.node_key)]

    def dht_node(self) -> DhtNode | None:
        """This node's place in the DHT, once it has joined."""
        return self.dht.dht if self.dht is not None else None

    def find_job(self, job_id: bytes) -> JobCopy:
        """A job's record as its keepers show it, found by its id. Raises JobError where there is none."""
        own = self.own_copy(job_id)
        if own is not None:
            return own
        if self.dht is None:
            raise JobError("jobs are looked up by nodes that have joined: call `join` first")
        self.dht.wait_joined(JOIN_TIMEOUT_S)
        return fetch_job(self.node, self.dht.dht.find_job, job_id)

    def announced(self, node_key: NodeKey) -> Signed | None:
        """What a node announced last, as it signed it; only validators keep that."""
        return self.directory.signed(node_key) if self.directory is not None else None

    def learn_validators(self) -> None:
        """Remember the node keys of all validators, so that those of their accounts can be looked up. A validator's own
        directory may lack some: it is compared with another's, each time with the next, at most every LEARN_PAUSE_S.
        """
        try:
            found = self.find("validator")
            others = sorted(({each.node_key for each in found} | set(self.bootstrap_keys)) - {self.node.node_key})
            if self.directory is not None and others and time.monotonic() >= self._learn_at_s:
                self._learn_at_s = time.monotonic() + LEARN_PAUSE_S
                self._num_learnt += 1
                self.directory.sync_from(others[self._num_learnt % len(others)])
                found = self.find("validator")
            for announcement in found:
                self.membership.of(announcement.node_key)
        except SmartnodesError as error:
            logger.info("validators could not be looked up: %s", error)

    def close(self) -> None:
        """Withdraw from the directory and end every connection."""
        if self._announcer is not None:
            self._announcer.stop()
        if self.dht is not None:
            self.dht.close()
        if self.directory is not None:
            self.directory.stop()
        if self.reachability is not None:
            self.reachability.close()
        self.renewer.stop()
        self.node.stop()
        if self.relay is not None:
            self.relay.stop()
        if self._held is not None:
            self._held.close()


def _joined(connecting: Future[Membership]) -> Membership:
    """What the chain says, as soon as this node has connected to it and registered."""
    try:
        return connecting.result(CONNECT_TIMEOUT_S)
    except (FutureTimeout, CancelledError):
        raise ChainError("this node is still connecting to the chain") from None
