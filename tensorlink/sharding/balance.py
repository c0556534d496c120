"""Chooses cut positions: the slowest stage as fast as can be, then as few bytes crossing as that allows.

Exact dynamic programming over the candidates (the chains-on-chains problem; Pinar and Aykanat, J. Parallel Distrib.
Comput. 64, 2004), with the stages' speeds in order. Policy only: positions, seconds and bytes in, positions out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: How much slower the slowest stage may become to save bytes.
TOLERANCE = 0.05
#: More candidates than this are thinned to those with the fewest bytes: the search is quadratic in their number.
MAX_CANDIDATES = 400


@dataclass(frozen=True)
class Candidate:
    """A position with the seconds before it, the bytes that cross there, and how many layers come before it."""

    position: int
    seconds_before: float
    num_bytes: int
    layers_before: int


def thinned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """At most MAX_CANDIDATES of them, the cheapest to cross in each stretch of the graph; both ends stay."""
    inner = list(candidates[1:-1])
    if len(inner) <= MAX_CANDIDATES:
        return list(candidates)
    stretch = len(inner) / MAX_CANDIDATES
    kept = []
    for at in range(MAX_CANDIDATES):
        group = inner[round(at * stretch) : round((at + 1) * stretch)]
        if group:
            kept.append(min(group, key=lambda candidate: candidate.num_bytes))
    return [candidates[0], *kept, candidates[-1]]


def most_stages(candidates: Sequence[Candidate]) -> int:
    """Into how many stages with at least one layer each the candidates can cut."""
    stages, layers = 0, candidates[0].layers_before
    for candidate in candidates[1:]:
        if candidate.layers_before > layers and candidate.layers_before < candidates[-1].layers_before:
            stages, layers = stages + 1, candidate.layers_before
    return stages + 1


def choose(candidates: Sequence[Candidate], num_stages: int, speeds: Sequence[float]) -> list[int] | None:
    """Indices of the `num_stages` - 1 chosen candidates in order, None if that many cannot be.

    The first and last candidates are the graph's ends. A stage holds at least one layer. `speeds[k]` divides the
    seconds of stage k.
    """

    def slowest(worst: float, first: int, last: int, stage: int) -> float:
        return max(worst, _seconds(candidates, first, last) / speeds[stage])

    fastest = _search(candidates, num_stages, slowest)
    if fastest is None:
        return None
    bound = fastest[0] * (1 + TOLERANCE)

    def fewest_bytes(total: float, first: int, last: int, stage: int) -> float:
        if _seconds(candidates, first, last) / speeds[stage] > bound:
            return float("inf")
        return total + (candidates[last].num_bytes if last < len(candidates) - 1 else 0)

    cheapest = _search(candidates, num_stages, fewest_bytes)
    return cheapest[1] if cheapest is not None else fastest[1]


def bottleneck(candidates: Sequence[Candidate], chosen: Sequence[int], speeds: Sequence[float]) -> float:
    """Seconds of the slowest stage."""
    ends = [0, *chosen, len(candidates) - 1]
    return max(_seconds(candidates, a, b) / speed for a, b, speed in zip(ends, ends[1:], speeds, strict=False))


def _seconds(candidates: Sequence[Candidate], first: int, last: int) -> float:
    return candidates[last].seconds_before - candidates[first].seconds_before


def _search(
    candidates: Sequence[Candidate], num_stages: int, extend: Callable[[float, int, int, int], float]
) -> tuple[float, list[int]] | None:
    """The way through the candidates with the least cost, which `extend` carries over each stage."""
    last = len(candidates) - 1
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for stage in range(num_stages):
        reached: dict[int, tuple[float, int]] = {}
        ends = [last] if stage == num_stages - 1 else range(1, last)
        for end in ends:
            for begin, (cost, _) in best[-1].items():
                if begin >= end or candidates[end].layers_before <= candidates[begin].layers_before:
                    continue
                total = extend(cost, begin, end, stage)
                if total < reached.get(end, (float("inf"), -1))[0]:
                    reached[end] = (total, begin)
        best.append(reached)
    if last not in best[-1]:
        return None
    path, at = [], last
    for level in range(num_stages, 0, -1):
        at = best[level][at][1]
        path.append(at)
    return best[-1][last][0], path[-2::-1]
