"""Whoever signs two proposals for one place is taken out of the epoch, by whichever validator saw it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smartnodes_core.chain.memory import MemoryChain
from smartnodes_core.chain.proposal import Equivocation, Place
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.errors import ChainUnreachableError, LocalError, ProtocolError, RecordError
from smartnodes_core.nodes.equivocations import EquivocationDesk

from .conftest import NETWORK


def proof_against(net: Any, validator: Any, network_id: int = NETWORK) -> Equivocation:
    """Two signatures of a validator for round 1."""
    place = Place(network_id, 1, 0, bytes(32))
    contents = (b"1" * 32, b"2" * 32)
    domain = net.model.domain
    first, second = (sign_digest(validator.account_key, domain.digest_of(place, content)) for content in contents)
    return Equivocation(place, contents, (first, second))


def desk_of(net: Any, validator: Any, folder: Path | None, chain: Any = None) -> EquivocationDesk:
    return EquivocationDesk(
        validator.node, chain or validator.chain, NETWORK, validator.account, folder, list, step_s=0.0
    )


class Away:
    """A chain that can be away."""

    def __init__(self, chain: MemoryChain) -> None:
        self.chain, self.is_away, self.domain = chain, True, chain.domain

    def prove_equivocation(self, proof: Equivocation) -> None:
        if self.is_away:
            raise ChainUnreachableError("away")
        self.chain.prove_equivocation(proof)


def test_a_proof_one_validator_holds_ends_the_signers_place_in_the_epoch(make_net: Any, eventually: Any) -> None:
    net = make_net()
    net.start(rounds=True)
    culprit, witness = net.validators[0], net.validators[1]
    stake_wei = net.user.chain.member(NETWORK, culprit.account).stake_wei
    assert stake_wei > 0
    witness.role.rounds.proofs.report(proof_against(net, culprit))
    eventually(lambda: culprit.account not in net.user.chain.validators(NETWORK))
    assert len(net.user.chain.validators(NETWORK)) == 3
    number = net.user.chain.round_state(NETWORK).number
    eventually(lambda: net.user.chain.member(NETWORK, culprit.account).stake_wei == 0)
    eventually(lambda: net.user.chain.round_state(NETWORK).number >= number + 2)
    everybody = [validator.role.rounds.proofs for validator in net.validators[1:]]
    eventually(lambda: all(culprit.account in proofs.accused and not proofs.is_waiting for proofs in everybody))


def test_a_proof_survives_a_restart_and_a_chain_that_is_away(bare: Any, tmp_path: Path) -> None:
    culprit, witness, restarted = bare.validators[:3]
    away = Away(witness.chain)
    first = desk_of(bare, witness, tmp_path, away)
    first.report(proof_against(bare, culprit))
    validators = bare.user.chain.validators(NETWORK)
    with pytest.raises(ChainUnreachableError):
        first.submit(validators)
    assert first.is_waiting
    (kept,) = tmp_path.glob("*.proof")
    away.is_away = False
    again = desk_of(bare, restarted, tmp_path, away)  # nothing of `first` is left but the file
    assert again.accused == {culprit.account}
    again.submit(validators)
    assert culprit.account not in bare.user.chain.validators(NETWORK)
    assert not kept.exists()
    assert not again.is_waiting


def test_a_proof_that_another_brought_before_the_chain_is_done(bare: Any, tmp_path: Path) -> None:
    culprit, witness, other = bare.validators[:3]
    desk = desk_of(bare, witness, tmp_path)
    desk.report(proof_against(bare, culprit))
    other.chain.prove_equivocation(proof_against(bare, culprit))
    desk.submit(bare.user.chain.validators(NETWORK))
    assert not desk.is_waiting


def test_what_proves_nothing_is_refused(net: Any) -> None:
    first, second = net.validators[:2]
    good = proof_against(net, first)
    other = proof_against(net, second)
    mixed = Equivocation(good.place, good.contents, (good.signatures[0], other.signatures[1])).encode()
    for bad, kind in ((b"", RecordError), (bytes(242), Exception), (mixed, RecordError), (7, ProtocolError)):
        with pytest.raises(kind):
            second.node.call(first.key, "equivocation", {"proof": bad})
    assert first.role.rounds.proofs.accused == set()
    first.role.rounds.proofs.report(proof_against(net, second, network_id=9))  # another network's epoch
    assert first.role.rounds.proofs.accused == set()


def test_a_damaged_proof_is_told_with_its_file(bare: Any, tmp_path: Path) -> None:
    (tmp_path / "00.proof").write_bytes(b"x" * 242)
    with pytest.raises(LocalError, match=r"00\.proof is not a proof"):
        desk_of(bare, bare.validators[0], tmp_path)
