"""How sure a count makes a rate."""

from __future__ import annotations

import math


def upper(found: int, trials: int, confidence: float = 0.95) -> float:
    """The Clopper-Pearson upper bound of a rate of which `found` in `trials` were seen, one-sided (with none found
    about 3 / trials)."""
    if found >= trials:
        return 1.0
    low, high = found / trials if trials else 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(found, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(found: int, trials: int, rate: float) -> float:
    """The chance of `found` or fewer in `trials` at this rate."""
    if rate <= 0:
        return 1.0
    if rate >= 1:
        return float(found >= trials)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(rate) + (trials - k) * math.log1p(-rate)
        for k in range(found + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(math.exp(one) for one in logs))


def kolmogorov_smirnov(steps: list[int], chance: float) -> float:
    """The distance between when something was seen and 1 - (1 - chance)^k."""
    ordered, n, worst = sorted(steps), len(steps), 0.0
    at = 0
    while at < n:
        k, end = ordered[at], at
        while end < n and ordered[end] == k:
            end += 1
        worst = max(
            worst,
            abs(end / n - (1 - (1 - chance) ** k)),  # at k
            abs(at / n - (1 - (1 - chance) ** (k - 1))),  # just before
        )
        at = end
    return worst
