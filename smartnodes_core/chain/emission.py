"""How many SNO may exist: the arithmetic of `contracts/SNO.sol` and `Rounds.emission`, for the twin and for people."""

from __future__ import annotations

from smartnodes_core.chain.settings import ChainSettings


def mintable_wei(settings: ChainSettings, elapsed_s: int) -> int:
    """The most that may have been minted `elapsed_s` after genesis."""
    left, rate, scaled = max(0, elapsed_s), settings.emission_wei, 0
    while left > settings.emission_decay_s and rate > settings.emission_tail_wei:
        scaled += rate * settings.emission_decay_s
        left -= settings.emission_decay_s
        rate = max(rate * settings.emission_keep_bps // 10_000, settings.emission_tail_wei)
    return (scaled + rate * left) // settings.emission_period_s


def round_emission_wei(settings: ChainSettings, share_bps: int, from_s: int, until_s: int) -> int:
    """What one round may allot, times in seconds since genesis: what is older than two intervals lapses."""
    start = max(from_s, until_s - 2 * settings.round_interval_s)
    if until_s <= start:
        return 0
    return (mintable_wei(settings, until_s) - mintable_wei(settings, start)) * share_bps // 10_000
