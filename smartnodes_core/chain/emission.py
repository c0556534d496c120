"""How many SNO may exist: the arithmetic of `contracts/SNO.sol` and `Rounds.emission`, for the twin and for people."""

from __future__ import annotations

from smartnodes_core.chain.proposal import UNCAPPED, Parameters
from smartnodes_core.chain.settings import ChainSettings

#: Of a round's emission; the rest is the signers'.
WORKERS_PERCENT = 85


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


def fee_on(paid_wei: int, parameters: Parameters) -> int:
    """What is burned when a job pays this much in SNO: rounded up, so that no series of small payments goes without."""
    return -(-paid_wei * parameters.fee_bps // 10_000)


def workers_cap_wei(parameters: Parameters, fees_wei: int) -> int | None:
    """The most that workers may share in a round in which this much was burned; None where they may share all."""
    return None if parameters.kappa_bps == UNCAPPED else fees_wei * parameters.kappa_bps // 10_000


def most_allotted_wei(emission_wei: int, parameters: Parameters, fees_wei: int) -> int:
    """What a round may allot: the signers' part of the emission, and the workers' up to its cap."""
    workers_wei = emission_wei * WORKERS_PERCENT // 100
    cap_wei = workers_cap_wei(parameters, fees_wei)
    return emission_wei - workers_wei + (workers_wei if cap_wei is None else min(workers_wei, cap_wei))
