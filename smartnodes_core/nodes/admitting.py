"""Which members a round may admit: those whose node key was proven to be theirs; and workers' classes of capability.

An account registers under the hash of a node key, and anybody could name another's. Both signatures of the binding
prove that they belong together; a validator asks each applicant that is connected for its binding, and shows those
behind its proposal to whoever votes on it. A worker's class is what its node says in its signed announcement
(`offers["capability"]`); where it has changed, a round writes it anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smartnodes_core.chain.base import Chain, Member
from smartnodes_core.dht.rules import MAX_RECORD_BYTES
from smartnodes_core.dht.storage import RecordStore
from smartnodes_core.errors import RecordError, SmartnodesError
from smartnodes_core.identity import check_binding
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.membership import Membership, key_hash
from smartnodes_core.nodes.params import bytes_in
from smartnodes_core.records import Announcement, NodeKey, Signed, SignedBinding
from smartnodes_core.rounds import Admission
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: Members that one round admits at most; the rest waits for the next.
MAX_ADMISSIONS = 64
ASK_TIMEOUT_S = 2.0
MAX_BINDING_BYTES = 4096
MAX_ANNOUNCEMENT_BYTES = MAX_RECORD_BYTES + 256
#: The offer that names a worker's class, from 0 to 2^32 - 1; the network built on this layer gives it its meaning.
CAPABILITY = "capability"


class AdmissionDesk:
    """Collects the bindings of members that no round has verified yet. Thread-safe."""

    def __init__(
        self,
        node: Node,
        chain: Chain,
        network_id: int,
        membership: Membership,
        announced: Callable[[NodeKey], Signed | None] = lambda node_key: None,
    ):
        self._node, self._chain, self._network_id, self._membership = node, chain, network_id, membership
        self._announced = announced
        self._lock = threading.Lock()
        self._bindings: dict[bytes, SignedBinding] = {}
        node.serve(self)

    def propose(self) -> list[Admission]:
        """Members that this validator can vouch for, asking those that are connected, and workers whose class has
        changed. Asks the chain at most once.
        """
        keys = {peer.binding.account: peer.node_key for peer in self._node.peers() if peer.binding is not None}
        members = self._membership.members()
        waiting = {member.account: member for member in members if is_waiting(member)}
        with self._lock:
            self._bindings = {account: each for account, each in self._bindings.items() if account in waiting}
        own = waiting.get(self._chain.account)
        if own is not None and self._node.signed_binding is not None:
            self._keep(own, self._node.signed_binding)
        vouched = [member for member in waiting.values() if self._is_known(member)]
        for account in [account for account in waiting if account in keys and waiting[account] not in vouched]:
            if len(vouched) < MAX_ADMISSIONS and self._ask(waiting[account], keys[account], "binding", {}):
                vouched.append(waiting[account])
        admissions = [Admission(member.index, self._capability_of(member) or 0) for member in vouched]
        for member in members:
            if member.verified and member.live and self._capability_of(member) not in (None, member.capability):
                admissions.append(Admission(member.index, self._capability_of(member) or 0))
        return admissions[:MAX_ADMISSIONS]

    def unproven(self, admissions: Sequence[Admission], sources: Sequence[NodeKey]) -> list[str]:
        """Why this validator cannot vouch for some of them, after asking `sources` for what they know."""
        if len(admissions) > MAX_ADMISSIONS:
            return [f"admissions: {len(admissions)} in one round, at most {MAX_ADMISSIONS}"]
        members: Mapping[int, Member] = {member.index: member for member in self._membership.members()}
        reasons = []
        for admission in admissions:
            member = members.get(admission.index)
            if member is None or (member.verified and admission.capability == member.capability):
                reasons.append(f"admissions: {admission} is not justified")
            elif not member.verified and not self._is_proven(member, sources):
                reasons.append(f"admissions: member {admission.index} is not known to own its node key")
            elif not self._is_capable(member, admission.capability, sources):
                reasons.append(
                    f"admissions: member {admission.index} is not known to be of class {admission.capability}"
                )
        return reasons

    def _is_proven(self, member: Member, sources: Sequence[NodeKey]) -> bool:
        asked = {"account": member.account}
        return self._is_known(member) or any(self._ask(member, source, "binding_of", asked) for source in sources)

    def _is_capable(self, member: Member, capability: int, sources: Sequence[NodeKey]) -> bool:
        """Whether its node says so, to this validator or to one of `sources`. A newcomer may be of no class yet."""
        if (capability == 0 and not member.verified) or self._capability_of(member) == capability:
            return True
        for source in sources:
            try:
                reply = self._node.call(
                    source,
                    "announced",
                    {"account": member.account},
                    timeout_s=ASK_TIMEOUT_S,
                    max_body_bytes=MAX_ANNOUNCEMENT_BYTES,
                )
                if self._class_in(member, Signed.decode(reply.body)) == capability:
                    return True
            except SmartnodesError as error:
                logger.info("no announcement of 0x%s: %s", member.account.hex()[:8], error)
        return False

    def _capability_of(self, member: Member) -> int | None:
        """The class that a worker's node announces; None where nothing is known."""
        node_key = self._membership.node_key_of(member.account)
        signed = self._announced(node_key) if node_key is not None and member.role == "worker" else None
        try:
            return self._class_in(member, signed) if signed is not None else None
        except SmartnodesError as error:
            logger.info("the announcement of 0x%s: %s", member.account.hex()[:8], error)
            return None

    def _class_in(self, member: Member, signed: Signed) -> int | None:
        """Raises RecordError or SignatureError for what is not this worker's live announcement."""
        RecordStore(self._network_id).store(signed)
        announcement = Announcement.decode(signed.record)
        capability = announcement.offers.get(CAPABILITY)
        if (key_hash(announcement.node_key), announcement.role, member.role) != (member.key_hash, "worker", "worker"):
            raise RecordError("an announcement of another node, or of no worker")
        return capability if isinstance(capability, int) and 0 <= capability < 1 << 32 else None

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_announced(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """What the node of an account announced last, as it signed it."""
        node_key = self._membership.node_key_of(bytes_in(params, "account", 20))
        signed = self._announced(node_key) if node_key is not None else None
        if signed is None:
            raise RecordError("no announcement of this account's node is known here")
        return {}, [signed.encode()]

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_binding_of(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """The signed binding of an account that this validator proposes to admit."""
        with self._lock:
            found = self._bindings.get(bytes_in(params, "account", 20))
        if found is None:
            raise RecordError("no binding of this account is kept here")
        return {}, [found.encode()]

    def _is_known(self, member: Member) -> bool:
        with self._lock:
            found = self._bindings.get(member.account)
        return found is not None and self._keep(member, found)

    def _ask(self, member: Member, peer: NodeKey, method: str, params: dict[str, Any]) -> bool:
        """Whether `peer` gave a good binding of `member`, which is kept."""
        if self._is_known(member):
            return True
        try:
            reply = self._node.call(peer, method, params, timeout_s=ASK_TIMEOUT_S, max_body_bytes=MAX_BINDING_BYTES)
            return self._keep(member, SignedBinding.decode(reply.body))
        except SmartnodesError as error:
            logger.info("no binding of 0x%s from %s: %s", member.account.hex()[:8], peer.hex()[:8], error)
            return False

    def _keep(self, member: Member, signed: SignedBinding) -> bool:
        try:
            binding = check_binding(
                signed,
                now_s=int(time.time()),
                chain_id=self._chain.chain_id,
                registry=self._chain.registry_address,
                network_id=self._network_id,
            )
        except SmartnodesError as error:
            logger.info("a bad binding of 0x%s: %s", member.account.hex()[:8], error)
            return False
        found = (binding.account, key_hash(binding.node_key), binding.role)
        if found != (member.account, member.key_hash, member.role):
            return False
        with self._lock:
            self._bindings[member.account] = signed
        return True


def is_waiting(member: Member) -> bool:
    """Whether a round should admit this member: it takes part, and no round has verified its key."""
    return not member.verified and member.exit_at_s == 0 and member.reputation > 0
