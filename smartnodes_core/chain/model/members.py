"""Registry's rules: who may join, who counts, and what rounds change of members."""

from __future__ import annotations

from smartnodes_core.chain.base import Member, RefusedError
from smartnodes_core.chain.model.state import MAX_BURNS, REGISTRY, ModelState, NetworkModel
from smartnodes_core.chain.packing import unpack_reputations
from smartnodes_core.chain.proposal import (
    NO_HASH,
    Admission,
    Equivocation,
    RoundProposal,
)
from smartnodes_core.chain.signing import checksum, recover
from smartnodes_core.errors import SignatureError
from smartnodes_core.records import Role


class MemberRules(ModelState):
    """Registration, admission, reputation, conviction and loss of stake."""

    def stake_wei(self, role: Role) -> int:
        stakes = {
            "user": self.settings.user_stake_wei,
            "worker": self.settings.worker_stake_wei,
            "validator": self.settings.validator_stake_wei,
        }
        return stakes[role]

    def register(self, account: bytes, role: Role, key_hash: bytes, network_id: int) -> int:
        network = self.network("register", network_id)
        known = network.find(account)
        if known is not None and known.index not in network.away:
            raise RefusedError("register", "AlreadyRegistered", {"account": checksum(account)})
        if known is not None and known.reputation == 0:
            raise RefusedError("register", "Blacklisted", {"account": checksum(account)})
        freed = known is not None and network.owners.get(known.key_hash) == known.index
        if not freed or known is None or known.key_hash != key_hash:
            self._check_free("register", network, key_hash)
        stake = self.stake_wei(role)
        self.move("register", account, REGISTRY, stake)
        index = known.index if known else len(network.members)
        member = Member(account, role, key_hash, known.reputation if known else 1, stake, False, index, NO_HASH, 0)
        if known is None:
            network.members.append(member)
        else:
            network.away.discard(index)
            network.members[index] = member
            if freed:
                del network.owners[known.key_hash]
        if self._takes_first(network, index, key_hash) and role == "validator":
            network.epoch.add(account)
        return index

    def rotate_key(self, account: bytes, key_hash: bytes, network_id: int) -> None:
        network = self.peek(network_id)
        member = network.find(account)
        if member is None or member.index in network.away:
            raise RefusedError("rotateKey", "NotRegistered", {"account": checksum(account)})
        unproven = not member.verified and network.owners.get(member.key_hash) == member.index
        if not unproven or member.key_hash != key_hash:
            self._check_free("rotateKey", network, key_hash)
        if unproven:
            del network.owners[member.key_hash]
        self._takes_first(network, member.index, key_hash)
        network.update(member.index, key_hash=key_hash, verified=False)

    def _check_free(self, action: str, network: NetworkModel, key_hash: bytes) -> None:
        """Refuses a key that is verified or revoked; of others several may ask for one."""
        if key_hash == NO_HASH:
            raise RefusedError(action, "ZeroKey")
        holder = network.owners.get(key_hash)
        if holder is not None and (network.members[holder].verified or network.members[holder].key_hash != key_hash):
            owner = checksum(network.members[holder].account)
            raise RefusedError(action, "KeyTaken", {"keyHash": key_hash.hex(), "owner": owner})

    def _takes_first(self, network: NetworkModel, index: int, key_hash: bytes) -> bool:
        if network.number or key_hash in network.owners:
            return False
        network.owners[key_hash] = index
        return True

    def live(self, network: NetworkModel, member: Member) -> bool:
        if member.role == "validator":
            return member.account in network.epoch
        return network.owners.get(member.key_hash) == member.index and self.is_upright(network, member)

    def is_upright(self, network: NetworkModel, member: Member) -> bool:
        enough = member.stake_wei >= self.stake_wei(member.role)
        here = member.exit_at_s == 0 and member.index not in network.away | network.convicted
        return enough and here and member.reputation > 0

    def convict(self, proof: Equivocation) -> None:
        """Takes out of the epoch who signed both contents."""
        action, network_id = "proveEquivocation", proof.place.network_id
        digests = [self.domain.digest_of(proof.place, content) for content in proof.contents]
        try:
            first, second = (recover(d, s) for d, s in zip(digests, proof.signatures, strict=True))
        except SignatureError:
            raise RefusedError(action, "BadSignature") from None
        if digests[0] == digests[1] or first != second:
            raise RefusedError(action, "NoEquivocation")
        network = self.peek(network_id)
        member = network.find(first)
        if member is None:
            raise RefusedError(action, "NotRegistered", {"account": checksum(first)})
        if member.role != "validator" or member.index in network.away:
            raise RefusedError(action, "NotAValidator", {"account": checksum(first)})
        if member.index in network.convicted:
            raise RefusedError(action, "Convicted", {"account": checksum(first)})
        network.convicted.add(member.index)
        network.condemned.append(member.index)
        network.update(member.index, reputation=0)
        network.epoch.discard(first)

    def apply_to_members(self, network: NetworkModel, proposal: RoundProposal) -> None:
        scores = self._check_scores(network, proposal.reputations)
        for index, score in scores.items():
            network.update(index, reputation=score)
            if score == 0:
                network.epoch.discard(network.members[index].account)
        for _ in range(min(MAX_BURNS, len(network.condemned))):
            index = network.condemned.pop()
            self._slash(network, index, network.members[index].stake_wei)
        for slash in proposal.slashes:
            if slash.index < len(network.members):
                self._slash(network, slash.index, slash.amount_wei)
        for admission in proposal.admissions:
            if admission.index < len(network.members):
                self._admit(network, admission)

    def _admit(self, network: NetworkModel, admission: Admission) -> None:
        member = network.members[admission.index]
        holder = network.owners.get(member.key_hash, member.index)
        if not self.is_upright(network, member):
            return
        if holder != member.index:
            if network.members[holder].verified or network.members[holder].key_hash != member.key_hash:
                return
            network.epoch.discard(network.members[holder].account)
        network.owners[member.key_hash] = member.index
        network.update(member.index, verified=True, capability=admission.capability)
        if member.role == "validator":
            network.epoch.add(member.account)

    def _slash(self, network: NetworkModel, index: int, amount_wei: int) -> None:
        member = network.members[index]
        lost = min(amount_wei, member.stake_wei)
        network.update(index, stake_wei=member.stake_wei - lost)
        self.burn(REGISTRY, lost)
        if member.stake_wei - lost < self.stake_wei(member.role):
            network.epoch.discard(member.account)

    def _check_scores(self, network: NetworkModel, packed: bytes) -> dict[int, int]:
        try:
            scores = unpack_reputations(packed)
        except ValueError:
            raise RefusedError("execute", "BadReputationUpdate", {}) from None
        if any(index >= len(network.members) for index in scores):
            raise RefusedError("execute", "BadReputationUpdate", {})
        return scores
