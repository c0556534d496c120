"""A node's Ed25519 identity: its key file, what it signs, and the two-way binding to an account on chain.

Signatures are over a domain and a digest, so that a signature made for one purpose is void for any other. The binding
is signed by both keys: the node vouches for the account, and the account (EIP-191, as any wallet signs) for the node.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import nacl.exceptions
import nacl.signing

from smartnodes_core.chain import signing
from smartnodes_core.errors import AuthorityError, IdentityError, SignatureError
from smartnodes_core.keyfile import read_key_file, secret_fields, secret_in, write_key_file
from smartnodes_core.records import Binding, Record, Role, Signed, SignedBinding, digest_of
from smartnodes_core.usage import USAGE

_RECORD_DOMAIN = "signed record"
_BINDING_DOMAIN = "binding by node"

RecordType = TypeVar("RecordType", bound=Record)


@dataclass(frozen=True, repr=False)
class Identity:
    """A node's key pair. Never printed, never sent: only `node_key` leaves this machine."""

    _key: nacl.signing.SigningKey

    def __repr__(self) -> str:
        return f"Identity({self.node_key.hex()[:16]})"

    @classmethod
    def create(cls) -> Identity:
        """A new random identity."""
        return cls(nacl.signing.SigningKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte secret seed."""
        return cls(nacl.signing.SigningKey(seed))

    @property
    def node_key(self) -> bytes:
        """The public key, 32 bytes: the node's name."""
        return bytes(self._key.verify_key)

    def sign_bytes(self, domain: str, data: bytes) -> bytes:
        """A 64-byte signature of `data`, valid only under `domain`."""
        with USAGE.timed("signing"):
            return self._key.sign(_message(domain, data)).signature

    def sign(self, record: Record) -> Signed:
        """`record` with this node's signature."""
        encoded = record.encode()
        return Signed(record=encoded, signer=self.node_key, signature=self.sign_bytes(_RECORD_DOMAIN, encoded))

    def save(self, path: str | os.PathLike[str], passphrase: str | None = None) -> None:
        """Writes the key file, readable by its owner alone, sealed by `passphrase` if given.

        Never overwrites: IdentityError.
        """
        fields = {"node_key": self.node_key.hex(), **secret_fields("seed", bytes(self._key), passphrase)}
        write_key_file(path, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str | None = None) -> Identity:
        """The identity in the key file at `path`. Raises IdentityError, also when others than its owner may read it."""
        fields = read_key_file(path)
        try:
            identity = cls.from_seed(secret_in(fields, "seed", passphrase, path))
        except (KeyError, ValueError, TypeError, nacl.exceptions.ValueError) as error:
            raise IdentityError(f"{path} is not a key file: {error}") from None
        if fields.get("node_key") != identity.node_key.hex():
            raise IdentityError(f"{path} names another node key than its seed gives: the file is damaged")
        return identity


def _message(domain: str, data: bytes) -> bytes:
    return b"smartnodes 1 signature\x00" + digest_of(f"signature: {domain}", data)


def verify_bytes(node_key: bytes, domain: str, data: bytes, signature: bytes) -> None:
    """Checks a signature made by `Identity.sign_bytes`. Raises SignatureError."""
    try:
        with USAGE.timed("signing"):
            nacl.signing.VerifyKey(node_key).verify(_message(domain, data), signature)
    except (nacl.exceptions.CryptoError, ValueError, TypeError):
        raise SignatureError(
            f"a signature over a {domain} does not verify under node key {node_key.hex()[:16]}"
        ) from None


def verify(signed: Signed, expected_type: type[RecordType]) -> RecordType:
    """The record that `signed.signer` signed. Raises SignatureError, or RecordError when it is not an `expected_type`.

    Who may sign what is the caller's rule: compare `signed.signer` with the key that the record names.
    """
    verify_bytes(signed.signer, _RECORD_DOMAIN, signed.record, signed.signature)
    return expected_type.decode(signed.record)


def make_binding(
    identity: Identity,
    account_key: bytes,
    role: Role,
    chain_id: int,
    registry: bytes,
    network_id: int,
    expires_at_s: int,
) -> SignedBinding:
    """Binds `identity` to the account of the 32-byte secret `account_key`, in `role`, until `expires_at_s` (Unix
    time).
    """
    binding = Binding(
        node_key=identity.node_key,
        account=signing.address_of(account_key),
        role=role,
        chain_id=chain_id,
        registry=registry,
        network_id=network_id,
        expires_at_s=expires_at_s,
    )
    return SignedBinding(
        binding=binding.encode(),
        node_signature=identity.sign_bytes(_BINDING_DOMAIN, binding.encode()),
        account_signature=signing.sign_digest(account_key, signing.personal_digest(binding.digest())),
    )


def check_binding(
    signed_binding: SignedBinding, *, now_s: int, chain_id: int, registry: bytes, network_id: int
) -> Binding:
    """The binding, if both its signatures hold and it is for this chain, registry and network and not expired.

    Raises RecordError, SignatureError, AuthorityError. Takes the Ed25519 signature first: it is cheap, recovery is not.
    """
    binding = Binding.decode(signed_binding.binding)
    here = {"chain": (binding.chain_id, chain_id), "network": (binding.network_id, network_id)}
    for what, (found, needed) in here.items():
        if found != needed:
            raise AuthorityError(f"the peer's binding is for {what} {found}, here is {what} {needed}")
    if binding.registry != registry:
        raise AuthorityError(
            f"the peer's binding is for the registry 0x{binding.registry.hex()}, here is 0x{registry.hex()}"
        )
    if binding.expires_at_s <= now_s:
        raise AuthorityError(
            f"the peer's binding expired {now_s - binding.expires_at_s} s ago: it has to sign a new one"
        )
    verify_bytes(binding.node_key, _BINDING_DOMAIN, signed_binding.binding, signed_binding.node_signature)
    account = signing.recover(signing.personal_digest(binding.digest()), signed_binding.account_signature)
    if account != binding.account:
        raise SignatureError(f"a binding names account 0x{binding.account.hex()} but 0x{account.hex()} signed it")
    return binding
