"""What a machine needs to take part, looked at one by one and said in words: keys, chain, clock, validators, reach.

Each check is a function that gives a `Finding` and never raises for what it finds. `tensorlink doctor` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smartnodes_core.chain.account import load_account_key
from smartnodes_core.chain.base import Chain, Member
from smartnodes_core.chain.settings import Addresses
from smartnodes_core.chain.signing import address_of, checksum
from smartnodes_core.config import NodeConfig
from smartnodes_core.errors import PortInUseError, SmartnodesError
from smartnodes_core.identity import Identity, make_binding
from smartnodes_core.journal import is_in_use
from smartnodes_core.nodes.authority import ChainAuthority
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.membership import key_hash
from smartnodes_core.nodes.params import count_in
from smartnodes_core.nodes.reachability import assess
from smartnodes_core.nodes.running import JOURNAL
from smartnodes_core.records import Role
from smartnodes_core.transport.tls import TlsTransport

Level = Literal["ok", "warning", "failure"]
CONGESTION_CONTROLS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
MAX_CLOCK_ERROR_S = 60
_BINDING_S = 600


@dataclass(frozen=True)
class Finding:
    """One check: `words` say what was found and, where it is not well, what to do."""

    level: Level
    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.level:7}  {self.name:20}  {self.words}"


def check_up(config: NodeConfig, role: Role = "worker") -> Iterator[Finding]:
    """All checks for a node with these settings, in an order in which the first failure explains the others."""
    identity = _identity(config)
    yield identity if isinstance(identity, Finding) else Finding("ok", "identity", f"node {identity.node_key.hex()}")
    account = _account(config)
    if isinstance(account, Finding):
        yield account
    else:
        yield Finding("ok", "account", checksum(address_of(account)))
    yield congestion_control()
    chain = _chain(config)
    if isinstance(chain, Finding):
        yield chain
        return
    yield Finding("ok", "chain", f"chain {chain.chain_id} answers at {config.rpc_url}")
    if isinstance(identity, Finding) or isinstance(account, Finding):
        return
    members = list(chain.members(config.network_id))
    member = next((each for each in members if each.account == address_of(account)), None)
    yield _registration(member, identity, config.network_id)
    if member is not None:
        role = member.role
    yield from _network(config, role, identity, account, chain)


def _identity(config: NodeConfig) -> Identity | Finding:
    try:
        return Identity.load(config.identity)
    except SmartnodesError as error:
        return Finding("failure", "identity", str(error))


def _account(config: NodeConfig) -> bytes | Finding:
    try:
        return load_account_key(config.account)
    except SmartnodesError as error:
        return Finding("failure", "account", str(error))


def _chain(config: NodeConfig) -> Chain | Finding:
    from smartnodes_core.chain.client import ChainClient

    try:
        return ChainClient(config.rpc_url, Addresses.read(config.addresses))
    except SmartnodesError as error:
        return Finding("failure", "chain", str(error))


def congestion_control(path: Path = CONGESTION_CONTROLS) -> Finding:
    """Whether the system has one that keeps its speed over lossy lines."""
    name = "congestion control"
    try:
        available = path.read_text().split()
    except OSError:
        return Finding("ok", name, "this system chooses one for every connection")
    if "bbr" in available:
        return Finding("ok", name, f"bbr is there, of {', '.join(available)}")
    return Finding(
        "warning",
        name,
        f"found {', '.join(available)}, and no bbr, which keeps its speed where packets are lost: modprobe tcp_bbr",
    )


def _registration(member: Member | None, identity: Identity, network_id: int) -> Finding:
    name = "registration"
    if member is None:
        return Finding("warning", name, f"not in network {network_id} yet: a node registers itself when it starts")
    if member.key_hash != key_hash(identity.node_key):
        return Finding(
            "failure",
            name,
            "the account has registered another node key: use that identity file, or `tensorlink stake exit` first",
        )
    if member.reputation == 0:
        return Finding("failure", name, f"this {member.role} is blacklisted: nobody admits it")
    if not member.live:
        return Finding("warning", name, f"this {member.role} is not live: a round has to admit it, or it has left")
    return Finding("ok", name, f"a live {member.role} of network {network_id}, reputation {member.reputation}")


def _network(config: NodeConfig, role: Role, identity: Identity, account: bytes, chain: Chain) -> Iterator[Finding]:
    """Listens as the node would, and asks the validators; not while it runs, for it would lose its connections."""
    data_dir = getattr(config, "data_dir", None)
    if data_dir is not None and is_in_use(data_dir / JOURNAL):
        words = "this node is running: `tensorlink status --node` asks it, if it has --metrics, and its log tells"
        yield Finding("warning", "reachability", f"not tried, {words} how others reach it")
        return
    addresses = Addresses.read(config.addresses)
    expires_at_s = int(time.time()) + _BINDING_S
    binding = make_binding(
        identity, account, role, addresses.chain_id, addresses.registry, config.network_id, expires_at_s
    )
    authority = ChainAuthority(lambda: chain.members(config.network_id))
    endpoint = None if role == "user" else config.endpoint
    node = Node(identity, binding, TlsTransport(identity, binding), authority, endpoint)
    try:
        node.start()
    except PortInUseError as error:
        words = f"{error}. If it is this node that runs there, its log tells how others reach it"
        yield Finding("warning", "listening", words)
        return
    except SmartnodesError as error:
        yield Finding("failure", "listening", str(error))
        return
    try:
        if endpoint is not None:
            yield Finding("ok", "listening", node.endpoint)
        yield from _validators(config, node, listens=endpoint is not None)
    finally:
        node.stop()


def _validators(config: NodeConfig, node: Node, *, listens: bool) -> Iterator[Finding]:
    if not config.bootstrap:
        yield Finding("warning", "validators", "none is named: set `bootstrap` to host:port of one")
        return
    reached = []
    for endpoint in config.bootstrap:
        try:
            peer = node.connect(endpoint)
        except SmartnodesError as error:
            yield Finding("failure", f"validator {endpoint}", str(error))
            continue
        reached.append(peer.node_key)
        yield Finding("ok", f"validator {endpoint}", f"admits this node; it is {peer.node_key.hex()[:16]}")
    if not reached:
        return
    yield _clock(node, reached[0])
    if listens:
        found = assess(node, reached, may_map=config.port_mapping)
        found.close()
        level: Level = "ok" if found.kind in ("direct", "mapped") else "warning"
        yield Finding(level, "reachability", str(found))


def _clock(node: Node, validator: bytes) -> Finding:
    began_s = time.time()
    try:
        told_s = count_in(node.call(validator, "observe").params, "now_s", 1 << 40)
    except SmartnodesError as error:
        return Finding("warning", "clock", f"not compared: {error}")
    off_s = told_s + 0.5 - (began_s + time.time()) / 2
    if abs(off_s) > MAX_CLOCK_ERROR_S:
        side = "behind" if off_s > 0 else "ahead of"
        words = f"{abs(off_s):.0f} s {side} a validator's: bindings and announcements expire by it, set it (NTP)"
        return Finding("failure", "clock", words)
    return Finding("ok", "clock", f"within {max(1, round(abs(off_s)))} s of a validator's")


def summary(findings: list[Finding]) -> str:
    """One line."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("failure", "warning")}
    if counts["failure"]:
        return f"{counts['failure']} failures: the first one first"
    return f"well, {counts['warning']} warnings" if counts["warning"] else "well"
