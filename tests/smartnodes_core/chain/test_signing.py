from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.chain.signing import (
    address_of,
    checksum,
    domain_separator,
    keccak,
    new_key,
    personal_digest,
    recover,
    sign_digest,
    typed_digest,
    word,
)
from smartnodes_core.errors import ConfigError, SignatureError

KEY = bytes(31) + b"\x01"


def test_hashes_and_addresses_are_ethereums() -> None:
    assert keccak(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
    assert checksum(address_of(KEY)) == "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"


def test_eip_712_hashes_are_those_of_the_standards_example() -> None:
    contract = bytes.fromhex("cccccccccccccccccccccccccccccccccccccccc")
    domain = domain_separator("Ether Mail", "1", 1, contract)
    assert domain.hex() == "f2cee375fa42b42143804025fc449deafd50cc031ca257e0b194a650a912090f"
    mail = bytes.fromhex("c52c0ee5d84264471806290a3f2c4cecfc5490626bf912d01f240d7a274b371e")
    assert typed_digest(domain, mail).hex() == "be609aee343fb3c4b28e1df9e632fca64fcfaede20f02e86244efddf30957bd2"


def test_signatures_are_those_of_wallets() -> None:
    from eth_account import Account
    from eth_account.messages import encode_defunct

    signed = Account.sign_message(encode_defunct(b"hello"), KEY)
    assert sign_digest(KEY, personal_digest(b"hello")) == signed.signature


@given(st.binary(min_size=32, max_size=32))
def test_a_signature_gives_its_signer_back(digest: bytes) -> None:
    assert recover(digest, sign_digest(KEY, digest)) == address_of(KEY)


@given(st.binary(max_size=70))
def test_no_bytes_crash_recovery(signature: bytes) -> None:
    with contextlib.suppress(SignatureError):
        assert len(recover(b"d" * 32, signature)) == 20


def test_the_malleable_twin_of_a_signature_is_refused() -> None:
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    good = sign_digest(KEY, b"d" * 32)
    high = (order - int.from_bytes(good[32:64], "big")).to_bytes(32, "big")
    with pytest.raises(SignatureError, match="malleable"):
        recover(b"d" * 32, good[:32] + high + bytes([55 - good[64]]))


def test_words_that_do_not_fit_are_refused() -> None:
    assert word(b"a" * 20) == bytes(12) + b"a" * 20
    for value in (-1, 1 << 256, b"short"):
        with pytest.raises(ValueError):
            word(value)


def test_a_bad_key_is_named() -> None:
    with pytest.raises(ConfigError, match="not a private key"):
        address_of(bytes(32))
    assert address_of(new_key()) != address_of(new_key())


def test_signing_and_rules_load_without_web3() -> None:
    code = (
        "import sys, smartnodes_core.rounds, smartnodes_core.chain.signing, smartnodes_core.chain.client;"
        "sys.exit(any(name in sys.modules for name in ('web3', 'eth', 'eth_abi', 'eth_account', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
