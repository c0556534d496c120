"""Signatures of a proposal, in the order in which the contract wants them."""

from __future__ import annotations

from collections.abc import Iterable

from smartnodes_core.chain.signing import recover
from smartnodes_core.errors import SignatureError


def signers_of(digest: bytes, signatures: Iterable[bytes]) -> dict[bytes, bytes]:
    """One signature per account that made one, in ascending order of account; what no account can have made is left
    out.
    """
    found: dict[bytes, bytes] = {}
    for signature in signatures:
        try:
            found[recover(digest, signature)] = signature
        except SignatureError:
            continue
    return dict(sorted(found.items()))


def in_order(digest: bytes, signatures: Iterable[bytes]) -> list[bytes]:
    """The distinct good signatures, by ascending account."""
    return list(signers_of(digest, signatures).values())
