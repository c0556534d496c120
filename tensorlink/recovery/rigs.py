"""Who takes a lost stage over: a rig that is free, else one of the job's own with memory to spare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from smartnodes_core.records import Announcement, NodeKey
from tensorlink.sharding.rigs import MOST_BYTES, MOST_FLOPS_PER_S, free_slots, offer


def replacements(
    lost: Sequence[int],
    running: Mapping[int, Announcement],
    needs: Mapping[int, int],
    announced: Sequence[Announcement],
    avoid: Collection[NodeKey],
    reaches: Callable[[Announcement], bool],
) -> dict[int, Announcement] | None:
    """A rig for each of the `lost` stages, or None where there are too few.

    `running` are the stages that go on, `needs` the bytes of every stage, `avoid` whom not to take. Free rigs come
    first, the fastest of them that has the memory; then rigs of the job, those just taken among them, by what they have
    left.
    """
    own = {rig.node_key for rig in running.values()}
    free = [rig for rig in announced if free_slots(rig) > 0 and rig.node_key not in own and rig.node_key not in avoid]
    free.sort(key=lambda rig: -_speed(rig))  # among equals as they came: by reputation
    left = {rig.node_key: _memory(rig) for rig in running.values()}
    for stage, rig in running.items():
        left[rig.node_key] -= needs[stage]
    by_key = {rig.node_key: rig for rig in running.values()}
    found: dict[int, Announcement] = {}
    for stage in sorted(lost, key=lambda stage: -needs[stage]):
        fresh = next((rig for rig in free if _memory(rig) >= needs[stage] and reaches(rig)), None)
        if fresh is not None:
            free.remove(fresh)
            by_key[fresh.node_key], left[fresh.node_key] = fresh, _memory(fresh)
        roomy = fresh.node_key if fresh is not None else max(left, key=lambda key: left[key], default=None)
        if roomy is None or left[roomy] < needs[stage]:
            return None
        left[roomy] -= needs[stage]
        found[stage] = by_key[roomy]
    return found


def _memory(rig: Announcement) -> int:
    return offer(rig, "memory_bytes", 0, MOST_BYTES)


def _speed(rig: Announcement) -> int:
    return offer(rig, "flops_per_s", 0, MOST_FLOPS_PER_S)
