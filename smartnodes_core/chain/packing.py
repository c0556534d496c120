"""Reputation updates as the contract reads them: `contracts/libraries/ReputationUpdates.sol` is the other half.

Per storage word of 32 members: `u24 word | u32 mask | one byte per set bit, highest lane first`. Words ascend, so that
one set of changes has one encoding.
"""

from __future__ import annotations

from collections.abc import Mapping

LANES = 32
_HEADER_BYTES = 7
_MAX_INDEX = (1 << 24) * LANES


def pack_reputations(updates: Mapping[int, int]) -> bytes:
    """The bytes for `{member index: new reputation}`. Raises ValueError for an index or a reputation out of range."""
    words: dict[int, dict[int, int]] = {}
    for index, value in updates.items():
        if not 0 <= index < _MAX_INDEX or not 0 <= value <= 255:
            raise ValueError(f"reputation {value} of member {index}: 0..255 and 0..{_MAX_INDEX - 1} are needed")
        words.setdefault(index // LANES, {})[index % LANES] = value
    parts = []
    for number, lanes in sorted(words.items()):
        mask = sum(1 << lane for lane in lanes)
        values = bytes(lanes[lane] for lane in sorted(lanes, reverse=True))
        parts.append(number.to_bytes(3, "big") + mask.to_bytes(4, "big") + values)
    return b"".join(parts)


def unpack_reputations(data: bytes) -> dict[int, int]:
    """The inverse of `pack_reputations`. Raises ValueError unless `data` is its one canonical encoding."""
    updates: dict[int, int] = {}
    position = 0
    while position < len(data):
        header = data[position : position + _HEADER_BYTES]
        mask = int.from_bytes(header[3:], "big")
        start, end = position + _HEADER_BYTES, position + _HEADER_BYTES + mask.bit_count()
        if len(header) < _HEADER_BYTES or mask == 0 or end > len(data):
            raise ValueError(f"reputation update at byte {position} is cut off or empty")
        lanes = [lane for lane in range(LANES - 1, -1, -1) if mask >> lane & 1]
        first = int.from_bytes(header[:3], "big") * LANES
        updates.update({first + lane: value for lane, value in zip(lanes, data[start:end], strict=True)})
        position = end
    if pack_reputations(updates) != data:
        raise ValueError("reputation updates must be in ascending order, each word once")
    return updates
