"""The database under py-evm's state: trie nodes and contract code, each by its hash.

What was written since the last checkpoint is held in memory; older nodes come from the archive when they are asked for.
A checkpoint keeps what the newest state still needs and drops the rest: the states between are asked for by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import rlp
from eth.db.backends.base import BaseDB

_CACHED_NODES = 1 << 15
_HASH_BYTES = 32
_BRANCH_ITEMS = 17


class NodeStore(BaseDB):
    """`older` finds a node of the last checkpoint, or None. Nothing is ever deleted here."""

    def __init__(self, older: Callable[[bytes], bytes | None] = lambda key: None):
        self.fresh: dict[bytes, bytes] = {}
        self._older = lru_cache(_CACHED_NODES)(older)

    def __getitem__(self, key: bytes) -> bytes:
        found = self.fresh.get(key)
        if found is None:
            found = self._older(key)
        if found is None:
            raise KeyError(key)
        return found

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.fresh[key] = value

    def __delitem__(self, key: bytes) -> None:
        raise NotImplementedError("py-evm keeps the nodes of every state")

    def _exists(self, key: bytes) -> bool:
        return key in self.fresh or self._older(key) is not None

    def needed(self, state_root: bytes) -> dict[bytes, bytes]:
        """The fresh nodes and code that belong to the state under `state_root`."""
        return _needed(state_root, self.fresh)

    def settle(self) -> None:
        """The nodes that are needed lie in the archive now: memory is given back."""
        self.fresh.clear()
        self._older.cache_clear()  # it may have kept that a node was missing


def _needed(state_root: bytes, fresh: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    # Below a node that is not fresh nothing is: a node contains its children's hashes.
    found: dict[bytes, bytes] = {}
    waiting = [(state_root, True)]
    while waiting:
        key, of_accounts = waiting.pop()
        if key in found or key not in fresh:
            continue
        found[key] = fresh[key]
        for child, value in _contents(rlp.decode(fresh[key])):
            if child:
                waiting.append((child, of_accounts))
            elif of_accounts:
                _, _, storage_root, code_hash = rlp.decode(value)
                waiting.append((storage_root, False))
                if code_hash in fresh:
                    found[code_hash] = fresh[code_hash]
    return found


def _contents(node: Any) -> Iterator[tuple[bytes, bytes]]:
    """(child's hash, b"") or (b"", value) for everything in a node, and in the small nodes inside it."""
    if len(node) == _BRANCH_ITEMS:
        for child in node[:-1]:
            yield from _child(child)
        return
    path, content = node
    if path[0] >> 4 >= 2:  # a leaf; else an extension
        yield b"", content
    else:
        yield from _child(content)


def _child(child: Any) -> Iterator[tuple[bytes, bytes]]:
    if isinstance(child, list):
        yield from _contents(child)
    elif len(child) == _HASH_BYTES:
        yield child, b""
