"""Key files, signatures and bindings, and what is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from smartnodes_core.chain import signing
from smartnodes_core.errors import AuthorityError, IdentityError, PeerFault, RecordError, SignatureError
from smartnodes_core.identity import Identity, check_binding, make_binding, verify, verify_bytes
from smartnodes_core.records import Announcement, Binding, Receipt, SignedBinding

ACCOUNT_KEY = b"\x05" * 32
HERE: dict[str, Any] = {"chain_id": 5, "registry": b"\x22" * 20, "network_id": 3}


def announcement(identity: Identity) -> Announcement:
    return Announcement(
        node_key=identity.node_key, role="worker", network_id=1, sequence=1, expires_at_s=9, endpoints=[], offers={}
    )


def test_a_saved_identity_loads_as_the_same_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    identity = Identity.create()
    identity.save(tmp_path / "key")
    assert Identity.load(tmp_path / "key").node_key == identity.node_key
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_key_file_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    Identity.create().save(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        Identity.load(tmp_path / "key")


def test_a_passphrase_seals_the_key_file(tmp_path: Path) -> None:
    identity = Identity.from_seed(b"\x07" * 32)
    identity.save(tmp_path / "key", "correct horse")
    assert b"\x07".hex() * 32 not in (tmp_path / "key").read_text()
    assert Identity.load(tmp_path / "key", "correct horse").node_key == identity.node_key
    with pytest.raises(IdentityError, match="does not open"):
        Identity.load(tmp_path / "key", "battery staple")
    with pytest.raises(IdentityError, match="sealed by a passphrase"):
        Identity.load(tmp_path / "key")


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    Identity.create().save(tmp_path / "key")
    with pytest.raises(IdentityError, match="never overwritten"):
        Identity.create().save(tmp_path / "key")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "seed": "zz"}', "x" * 5000])
def test_what_is_no_key_file_is_an_identity_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(IdentityError):
        Identity.load(tmp_path / "key")


def test_a_missing_key_file_is_an_identity_error(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot be read"):
        Identity.load(tmp_path / "none")


def test_an_identity_never_prints_its_secret() -> None:
    assert "07" * 8 not in repr(Identity.from_seed(b"\x07" * 32))


def test_a_signed_record_verifies_as_what_was_signed() -> None:
    identity = Identity.create()
    record = announcement(identity)
    assert verify(identity.sign(record), Announcement) == record


def test_a_changed_record_or_another_signer_does_not_verify() -> None:
    identity = Identity.create()
    signed = identity.sign(announcement(identity))
    with pytest.raises(SignatureError):
        verify(msgspec.structs.replace(signed, record=signed.record[:-1] + b"\x02"), Announcement)
    with pytest.raises(SignatureError):
        verify(msgspec.structs.replace(signed, signer=Identity.create().node_key), Announcement)


def test_a_record_of_another_kind_is_refused_though_signed() -> None:
    identity = Identity.create()
    with pytest.raises(RecordError):
        verify(identity.sign(announcement(identity)), Receipt)


def test_a_signature_is_void_in_another_domain() -> None:
    identity = Identity.create()
    signature = identity.sign_bytes("one", b"data")
    verify_bytes(identity.node_key, "one", b"data", signature)
    with pytest.raises(SignatureError):
        verify_bytes(identity.node_key, "two", b"data", signature)


def signed_binding(identity: Identity) -> SignedBinding:
    return make_binding(identity, ACCOUNT_KEY, "worker", expires_at_s=1000, **HERE)


def test_a_binding_ties_node_key_account_and_role() -> None:
    identity = Identity.create()
    binding = check_binding(signed_binding(identity), now_s=999, **HERE)
    assert binding.node_key == identity.node_key
    assert binding.account == signing.address_of(ACCOUNT_KEY)
    assert binding.role == "worker"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"now_s": 1000}, "expired"),
        ({"chain_id": 6}, "chain 5, here is chain 6"),
        ({"registry": b"\x23" * 20}, "registry"),
        ({"network_id": 4}, "network 3, here is network 4"),
    ],
)
def test_a_binding_for_elsewhere_or_expired_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(AuthorityError, match=complaint):
        check_binding(signed_binding(Identity.create()), **{"now_s": 1, **HERE, **change})


def test_a_binding_needs_both_signatures() -> None:
    identity, thief = Identity.create(), Identity.create()
    honest = signed_binding(identity)
    stolen = signed_binding(thief)  # the thief's own account vouches for the thief, not for the honest node
    for forged in (
        msgspec.structs.replace(honest, node_signature=stolen.node_signature),
        msgspec.structs.replace(honest, account_signature=stolen.account_signature),
        msgspec.structs.replace(honest, account_signature=bytes(65)),
        msgspec.structs.replace(honest, binding=stolen.binding),
    ):
        with pytest.raises(SignatureError):
            check_binding(forged, now_s=1, **HERE)


def test_a_node_cannot_claim_the_account_of_another() -> None:
    identity = Identity.create()
    honest = signed_binding(identity)
    claimed = msgspec.structs.replace(Binding.decode(honest.binding), account=b"\x09" * 20)
    forged = SignedBinding(
        binding=claimed.encode(),
        node_signature=identity.sign_bytes("binding by node", claimed.encode()),
        account_signature=signing.sign_digest(ACCOUNT_KEY, signing.personal_digest(claimed.digest())),
    )
    with pytest.raises(SignatureError, match="signed it"):
        check_binding(forged, now_s=1, **HERE)


def test_bytes_that_are_no_binding_are_the_peers_fault() -> None:
    honest = signed_binding(Identity.create())
    with pytest.raises(PeerFault):
        check_binding(msgspec.structs.replace(honest, binding=b"\xff" * 50), now_s=1, **HERE)
