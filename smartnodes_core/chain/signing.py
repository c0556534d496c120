"""Accounts of the chain: secp256k1 keys, keccak, EIP-712 and EIP-191 hashes, signatures of 65 bytes (r, s, v).

Light on purpose: nodes import it at once, while `client.py` loads web3 only after the node listens. Everything here is
bytes; `checksum` makes the text that people and web3 read. Neighbours: `rounds.py` says what is signed, `identity.py`
binds accounts.
"""

from __future__ import annotations

import secrets

import coincurve
from Crypto.Hash import keccak as _keccak

from smartnodes_core.errors import ConfigError, SignatureError

SIGNATURE_BYTES = 65
_CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


def keccak(data: bytes) -> bytes:
    """Keccak-256 as the EVM computes it (not SHA3-256)."""
    return _keccak.new(digest_bits=256, data=data).digest()


def word(value: int | bytes) -> bytes:
    """One 32-byte ABI word: integers and addresses padded on the left, bytes32 as they are. Raises ValueError if too
    large.
    """
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value}: the contracts know no negative numbers")
        try:
            return value.to_bytes(32, "big")
        except OverflowError:
            raise ValueError(f"{value} does not fit into 256 bits") from None
    if len(value) not in (20, 32):
        raise ValueError(f"{len(value)} bytes are neither an address (20) nor a bytes32 (32)")
    return value.rjust(32, b"\0")


def new_key() -> bytes:
    """A random 32-byte private key."""
    while True:
        key = secrets.token_bytes(32)
        if 0 < int.from_bytes(key, "big") < _CURVE_ORDER:
            return key


def address_of(key: bytes) -> bytes:
    """The 20-byte account of a private key. Raises ConfigError if `key` is none."""
    try:
        public = coincurve.PrivateKey(key).public_key
    except ValueError as error:
        raise ConfigError(
            f"not a private key of the chain: {error}; 32 bytes below the curve's order are needed"
        ) from None
    return _address(public)


def checksum(address: bytes) -> str:
    """The EIP-55 text of a 20-byte address."""
    text = address.hex()
    digest = keccak(text.encode()).hex()
    return "0x" + "".join(c.upper() if int(d, 16) >= 8 else c for c, d in zip(text, digest, strict=False))


def domain_separator(name: str, version: str, chain_id: int, contract: bytes) -> bytes:
    """EIP-712 domain of one contract on one chain."""
    kind = b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
    fields = [keccak(kind), keccak(name.encode()), keccak(version.encode()), word(chain_id), word(contract)]
    return keccak(b"".join(fields))


def typed_digest(domain: bytes, struct_hash: bytes) -> bytes:
    """The EIP-712 hash that is signed."""
    return keccak(b"\x19\x01" + domain + struct_hash)


def personal_digest(message: bytes) -> bytes:
    """The EIP-191 hash of a message, as wallets sign it (`personal_sign`)."""
    return keccak(b"\x19Ethereum Signed Message:\n" + str(len(message)).encode() + message)


def sign_digest(key: bytes, digest: bytes) -> bytes:
    """r ‖ s ‖ v over a 32-byte digest, v 27 or 28, s in the lower half of the order as the contracts demand."""
    signature = coincurve.PrivateKey(key).sign_recoverable(digest, hasher=None)
    return signature[:64] + bytes([27 + signature[64]])


def recover(digest: bytes, signature: bytes) -> bytes:
    """The 20-byte account that signed `digest`. Raises SignatureError unless the contracts accept `signature`."""
    if len(signature) != SIGNATURE_BYTES or signature[64] not in (27, 28):
        raise SignatureError(f"a signature of {len(signature)} bytes: 65 are needed, the last 27 or 28")
    if int.from_bytes(signature[32:64], "big") > _CURVE_ORDER // 2:
        raise SignatureError("a malleable signature: s must lie in the lower half of the curve's order")
    try:
        recoverable = signature[:64] + bytes([signature[64] - 27])
        return _address(coincurve.PublicKey.from_signature_and_message(recoverable, digest, hasher=None))
    except Exception as error:  # coincurve raises plain Exception for values off the curve
        raise SignatureError(f"no account can have made this signature: {error}") from None


def _address(public: coincurve.PublicKey) -> bytes:
    return keccak(public.format(compressed=False)[1:])[12:]
