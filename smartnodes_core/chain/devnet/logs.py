"""Finds logs by address, topics and blocks, as `eth_getLogs` defines it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smartnodes_core.chain.devnet import render
from smartnodes_core.chain.devnet.evm import Log
from smartnodes_core.chain.devnet.ledger import Block

MAX_LOGS = 10_000


def find_logs(
    blocks: Sequence[Block], criteria: dict[str, Any], number_of: Callable[[Any], int]
) -> list[dict[str, Any]]:
    """Matching logs in order. Raises ValueError for criteria that make no sense or match more than MAX_LOGS."""
    chosen = _chosen(blocks, criteria, number_of)
    wanted = criteria.get("address")
    addresses = None if wanted is None else {_lower(a) for a in (wanted if isinstance(wanted, list) else [wanted])}
    topics = [_alternatives(topic) for topic in criteria.get("topics") or []]
    found: list[dict[str, Any]] = []
    for block in chosen:
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


def _chosen(blocks: Sequence[Block], criteria: dict[str, Any], number_of: Callable[[Any], int]) -> Sequence[Block]:
    if criteria.get("blockHash") is not None:
        wanted = _lower(criteria["blockHash"])
        return [block for block in blocks if render.data(block.hash) == wanted]
    first = number_of(criteria.get("fromBlock"))
    return blocks[first : number_of(criteria.get("toBlock")) + 1]


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
