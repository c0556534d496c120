"""What jobs pay, pure: a job's price, what of it a round settles, and how the workers' part of the emission is shared.

A job names its price in its terms and pays from an escrow that its author filled (`contracts/Escrow.sol`). Workers are
paid as their work is settled. On top of that a job paid in SNO burns a fee, and workers share emission up to kappa
times what their own job burned: whoever pays itself loses the fee and gains no more than it. A job paid in coin burns
nothing and earns no emission; its fee goes to the signers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from smartnodes_core.chain.emission import fee_on
from smartnodes_core.chain.proposal import Parameters, Payment, Settlement
from smartnodes_core.errors import RecordError

PRICE, UNITS = "price_wei", "price_per_units"
#: What a worker announces as the least that it works for, in wei for so many units, as text.
ASKS, ASKED_UNITS = "asks_wei", 10**12
ALL_BPS = 10_000
MAX_DIGITS = 78


@dataclass(frozen=True)
class Price:
    """`wei` for every `per_units` units of verified work, in SNO or in the coin of the escrow."""

    wei: int
    per_units: int

    @classmethod
    def of(cls, terms: Mapping[str, int | str]) -> Price | None:
        """The price in a job's terms: `price_wei` (a number, or one in text) for `price_per_units` (default 1); None
        where there is none. Raises RecordError for what is no price.
        """
        if PRICE not in terms:
            return None
        wei, per_units = (_number(name, terms.get(name, 1)) for name in (PRICE, UNITS))
        if per_units == 0:
            raise RecordError(f"{UNITS} is 0: the price is of that many units of work, at least 1 is needed")
        return cls(wei, per_units)


def asked_wei(offers: Mapping[str, int | str]) -> int:
    """What a worker says that it asks for ASKED_UNITS units of work; more than anybody has where that is no price."""
    try:
        return _number(ASKS, offers.get(ASKS, 0))
    except RecordError:
        return 1 << 512


def pays(terms: Mapping[str, int | str], wei: int) -> bool:
    """Whether a job with these terms pays `wei` or more for ASKED_UNITS units. Raises RecordError for bad terms."""
    price = Price.of(terms)
    return not wei or (price is not None and price.wei * ASKED_UNITS >= wei * price.per_units)


def _number(name: str, value: int | str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS:
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < 1 << 256:
        raise RecordError(f"{name} is {str(value)[:90]!r}: a whole number below 2^256 is needed")
    return value


@dataclass(frozen=True)
class JobWork:
    """The work of one job in a round, by account, and the escrow that pays it: `available_wei` are what rounds may take
    from it now (0: nothing, or there is none).
    """

    job: bytes
    units: Mapping[bytes, int]
    price: Price | None = None
    escrow_id: bytes = b""
    in_coin: bool = False
    available_wei: int = 0


def settle(work: JobWork, signers: Sequence[bytes], parameters: Parameters) -> Settlement | None:
    """What a job's escrow pays for this work: its price, or what there is, in proportion; None for nothing.

    Rounded down for each account; what is left stays in the escrow.
    """
    if work.price is None or not work.available_wei:
        return None
    wanted = {account: work.price.wei * units // work.price.per_units for account, units in sorted(work.units.items())}
    total_wei = sum(wanted.values())
    if total_wei + fee_on(total_wei, parameters) > work.available_wei:
        most_wei = work.available_wei * ALL_BPS // (ALL_BPS + parameters.fee_bps)
        wanted = {account: wei * most_wei // total_wei for account, wei in wanted.items()}
    paid_wei = sum(wanted.values())
    if not paid_wei:
        return None
    if work.in_coin:
        fee_wei, distinct = fee_on(paid_wei, parameters), sorted(set(signers))
        for account in distinct:
            wanted[account] = wanted.get(account, 0) + fee_wei // len(distinct)
    payments = tuple(Payment(account, wei) for account, wei in sorted(wanted.items()) if wei)
    return Settlement(work.escrow_id, 0, payments)


def share(pool_wei: int, weights: Sequence[tuple[int, int | None]]) -> list[int]:
    """Splits `pool_wei` in proportion to units among (units, cap in wei; None: no cap), each up to its cap; what the
    capped leave goes to the others in proportion, so that work without pay takes nothing from theirs.

    Rounded down; what remains is not given out.
    """
    shares = [0] * len(weights)
    left = {place: units for place, (units, _) in enumerate(weights) if units}
    free = sum(left.values())
    capped = [
        (Fraction(cap, weights[place][0]), place, cap) for place in left if (cap := weights[place][1]) is not None
    ]
    for _, place, cap in sorted(capped):  # those whose cap is lowest for their units reach it first
        if cap * free > pool_wei * left[place]:
            break
        shares[place] = cap
        pool_wei -= cap
        free -= left.pop(place)
    for place, units in left.items():
        shares[place] = pool_wei * units // free
    return shares
