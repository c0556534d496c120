"""Transactions for a devnet: payments, and a contract that stores and logs what it is called with."""

from __future__ import annotations

from typing import Any

from smartnodes_core.chain.devnet import CHAIN_ID
from smartnodes_core.chain.devnet.accounts import devnet_key
from smartnodes_core.chain.signing import checksum, word

RECEIVER = b"\xab" * 20
#: sstore(calldata[0:32], calldata[32:64]); log1("", topic = calldata[0:32]), behind code that returns it
STORING = bytes.fromhex("6b" + "6020355f35555f355f5fa100" + "5f52600c6014f3")


def signed(nonce: int, sender: int = 20, **changes: Any) -> bytes:
    """One wei for RECEIVER, or what `changes` say."""
    from eth_account import Account

    fields = {
        "nonce": nonce,
        "to": checksum(RECEIVER),
        "value": 1,
        "gas": 200_000,
        "maxFeePerGas": 2 * 10**9,
        "maxPriorityFeePerGas": 0,
        "chainId": CHAIN_ID,
    }
    fields = {key: value for key, value in (fields | changes).items() if value is not None}
    return bytes(Account.sign_transaction(fields, devnet_key(sender)).raw_transaction)


def creation(nonce: int) -> bytes:
    return signed(nonce, to=None, value=0, data=STORING)


def storing(nonce: int, contract: bytes, key: int, value: int) -> bytes:
    return signed(nonce, to=checksum(contract), value=0, data=word(key) + word(value))
