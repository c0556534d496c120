"""Finds logs by address, topics and blocks, as `eth_getLogs` defines it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from smartnodes_core.chain.devnet import render
from smartnodes_core.chain.devnet.evm import Log
from smartnodes_core.chain.devnet.history import Block, History

MAX_LOGS = 10_000


def find_logs(history: History, criteria: dict[str, Any], number_of: Callable[[Any], int]) -> list[dict[str, Any]]:
    """Matching logs in order. Raises ValueError for criteria that make no sense or match more than MAX_LOGS."""
    wanted = criteria.get("address")
    addresses = None if wanted is None else {_lower(a) for a in (wanted if isinstance(wanted, list) else [wanted])}
    topics = [_alternatives(topic) for topic in criteria.get("topics") or []]
    found: list[dict[str, Any]] = []
    for block in _chosen(history, criteria, number_of, addresses, topics[0] if topics else None):
        if block.mined is None:
            continue
        for index, entry in enumerate(block.mined.outcome.logs):
            if addresses is not None and render.data(entry.address) not in addresses:
                continue
            if _matches(entry, topics):
                found.append(render.log(entry, index, block.mined, block))
        if len(found) > MAX_LOGS:
            raise ValueError(f"more than {MAX_LOGS} logs: ask for fewer blocks")
    return found


def _chosen(
    history: History,
    criteria: dict[str, Any],
    number_of: Callable[[Any], int],
    addresses: set[str] | None,
    topics: set[str] | None,
) -> Iterable[Block]:
    if criteria.get("blockHash") is not None:
        found = history.block_with_hash(_hex(criteria["blockHash"]))
        return [found] if found else []
    first, last = number_of(criteria.get("fromBlock")), number_of(criteria.get("toBlock"))
    last = min(last, len(history) - 1)
    return history.may_hold(first, last, _all_hex(addresses), _all_hex(topics)) if first <= last else []


def _all_hex(texts: set[str] | None) -> list[bytes] | None:
    return None if texts is None else [_hex(text) for text in texts]


def _alternatives(topic: Any) -> set[str] | None:
    if topic is None:
        return None
    return {_lower(item) for item in (topic if isinstance(topic, list) else [topic])}


def _matches(entry: Log, topics: list[set[str] | None]) -> bool:
    if len(topics) > len(entry.topics):
        return False
    return all(
        allowed is None or render.data(topic) in allowed for allowed, topic in zip(topics, entry.topics, strict=False)
    )


def _lower(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not hexadecimal data: {str(value)[:70]}")
    return value.lower()


def _hex(value: Any) -> bytes:
    text = _lower(value)
    if not text.startswith("0x"):
        raise ValueError(f"not hexadecimal data: {text[:70]}")
    return bytes.fromhex(text[2:])
