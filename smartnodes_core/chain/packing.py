"""Reputation updates as the contract reads them: `contracts/libraries/ReputationUpdates.sol` is the other half.

Per storage word of 32 members: `u24 word | u32 mask | 32 bytes, highest lane first`, zero outside the mask. Words
ascend, so that one set of changes has one encoding.
"""

from __future__ import annotations

from collections.abc import Mapping

LANES = 32
_UPDATE_BYTES = 7 + LANES
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
        values = bytes(lanes.get(lane, 0) for lane in reversed(range(LANES)))
        parts.append(number.to_bytes(3, "big") + mask.to_bytes(4, "big") + values)
    return b"".join(parts)


def unpack_reputations(data: bytes) -> dict[int, int]:
    """The inverse of `pack_reputations`. Raises ValueError unless `data` is its one canonical encoding."""
    updates: dict[int, int] = {}
    if len(data) % _UPDATE_BYTES:
        raise ValueError(f"reputation updates of {len(data)} bytes: a multiple of {_UPDATE_BYTES} is needed")
    for position in range(0, len(data), _UPDATE_BYTES):
        first = int.from_bytes(data[position : position + 3], "big") * LANES
        mask = int.from_bytes(data[position + 3 : position + 7], "big")
        values = data[position + 7 : position + _UPDATE_BYTES]
        updates.update({first + lane: values[LANES - 1 - lane] for lane in range(LANES) if mask >> lane & 1})
    if pack_reputations(updates) != data:
        raise ValueError("reputation updates must be in ascending order, each word once")
    return updates
