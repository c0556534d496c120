"""The devnet's funded accounts. Their keys are public knowledge: `ChainClient` refuses them on any other chain."""

from __future__ import annotations

import hashlib
from functools import cache

from smartnodes_core.chain.signing import address_of

NUM_ACCOUNTS = 64
FUNDS_WEI = 1_000_000 * 10**18
_SEED = b"smartnodes devnet account "


def devnet_key(index: int) -> bytes:
    """The private key of devnet account `index`. Raises IndexError beyond the funded ones."""
    if not 0 <= index < NUM_ACCOUNTS:
        raise IndexError(f"devnet account {index}: there are {NUM_ACCOUNTS}")
    return hashlib.sha256(_SEED + str(index).encode()).digest()


@cache
def devnet_accounts() -> tuple[bytes, ...]:
    """The addresses of all funded accounts, in order."""
    return tuple(address_of(devnet_key(index)) for index in range(NUM_ACCOUNTS))


def is_devnet_key(key: bytes) -> bool:
    """Whether everybody knows this key."""
    return address_of(key) in devnet_accounts()
