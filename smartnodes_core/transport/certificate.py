"""The certificate that proves a node in a TLS handshake, in the manner of libp2p's TLS specification.

A self-signed X.509 certificate over an ephemeral P-256 key carries, in one critical extension, the node's signature
over that key and its signed binding. TLS proves the possession of the ephemeral key, the extension that the node
vouches for it.
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from smartnodes_core.errors import AuthorityError, SignatureError
from smartnodes_core.identity import Identity, check_binding, verify_bytes
from smartnodes_core.records import Binding, NodeKey, NodeSignature, Record, SignedBinding
from smartnodes_core.transport.base import Peer

MAX_CERTIFICATE_BYTES = 4096
#: Under 2.25 anybody may name an object by a UUID.
EXTENSION_OID = x509.ObjectIdentifier("2.25.228961346205936713428194753205413862947")
_DOMAIN = "TLS key"
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_LIFETIME = datetime.timedelta(days=3650)  # what expires is the binding


class CertifiedKey(Record, frozen=True, kw_only=True, tag="CertifiedKey/1"):
    """A node's claim that a TLS key is its own. `binding` is an encoded SignedBinding, or empty."""

    node_key: NodeKey
    signature: NodeSignature
    binding: Annotated[bytes, msgspec.Meta(max_length=2048)]


@dataclass(frozen=True)
class Expectations:
    """What a peer's binding must be for: the chain, registry and network of this node.

    None accepts peers without one.
    """

    chain_id: int
    registry: bytes
    network_id: int

    @classmethod
    def of(cls, signed_binding: SignedBinding | None) -> Expectations | None:
        """Those of our own binding."""
        if signed_binding is None:
            return None
        own = Binding.decode(signed_binding.binding)
        return cls(own.chain_id, own.registry, own.network_id)


def make_certificate(
    identity: Identity, signed_binding: SignedBinding | None
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new ephemeral key and its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    certified = CertifiedKey(
        node_key=identity.node_key,
        signature=identity.sign_bytes(_DOMAIN, public),
        binding=b"" if signed_binding is None else signed_binding.encode(),
    )
    name = x509.Name([])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + _LIFETIME)
        .add_extension(x509.UnrecognizedExtension(EXTENSION_OID, certified.encode()), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def read_certificate(der: bytes) -> x509.Certificate:
    """The certificate that a peer showed. Raises SignatureError."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise SignatureError(f"the peer's certificate has {len(der)} bytes: at most {MAX_CERTIFICATE_BYTES} are read")
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion) as error:
        raise SignatureError(f"the peer's certificate cannot be read: {error}") from None


def check_certificate(
    certificate: x509.Certificate, expectations: Expectations | None, endpoint: str, *, bulk: bool = False
) -> Peer:
    """The peer that `certificate` proves. Raises SignatureError, RecordError, AuthorityError."""
    try:
        extensions = certificate.extensions
        value = extensions.get_extension_for_oid(EXTENSION_OID).value
        public = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except _UNREADABLE as error:
        raise SignatureError(f"the peer's certificate proves no node key: {error}") from None
    if len(extensions) != 1 or not isinstance(value, x509.UnrecognizedExtension):
        raise SignatureError("the peer's certificate carries other extensions than a node's")
    certified = CertifiedKey.decode(value.value)
    verify_bytes(certified.node_key, _DOMAIN, public, certified.signature)
    signed = SignedBinding.decode(certified.binding) if certified.binding else None
    return check_peer(certified.node_key, signed, expectations, endpoint, bulk=bulk)


def check_peer(
    node_key: bytes,
    signed_binding: SignedBinding | None,
    expectations: Expectations | None,
    endpoint: str,
    *,
    bulk: bool = False,
) -> Peer:
    """The peer with a proven `node_key` and its binding, which must be that key's own and meet `expectations`."""
    if signed_binding is None or expectations is None:
        return Peer(node_key=node_key, binding=None, role=None, endpoint=endpoint, bulk=bulk)
    binding = check_binding(
        signed_binding,
        now_s=int(time.time()),
        chain_id=expectations.chain_id,
        registry=expectations.registry,
        network_id=expectations.network_id,
    )
    if binding.node_key != node_key:
        raise AuthorityError(f"node {node_key.hex()[:16]} shows the binding of another, {binding.node_key.hex()[:16]}")
    return Peer(node_key=node_key, binding=binding, role=binding.role, endpoint=endpoint, bulk=bulk)


def check_expected(peer: Peer, expected_node_key: bytes | None) -> None:
    """Raises AuthorityError when somebody else answered than was dialled."""
    if expected_node_key is not None and peer.node_key != expected_node_key:
        raise AuthorityError(
            f"{peer.endpoint} is node {peer.node_key.hex()[:16]}, expected was {expected_node_key.hex()[:16]}: "
            "its address may be out of date, or somebody stands in for it"
        )
