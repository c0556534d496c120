"""Where dropout masks come from: a seed for each node of the uncut program, so that no cut and no worker changes a
mask."""

from __future__ import annotations

from collections.abc import Callable

from smartnodes_core.records import canonical, digest_of


def seed_for(seed: int, replica: int, step: int, call: int, micro_batch: int) -> Callable[[int], int]:
    """Maps a node's id to the 63-bit seed of its mask; `seed` is the one in the job record."""

    def of_node(node: int) -> int:
        place = canonical([seed, replica, step, call, micro_batch, node])
        return int.from_bytes(digest_of("dropout seed", place)[:8], "little") >> 1

    return of_node
