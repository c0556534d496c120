"""What jobs pay: prices, settlements, shares of the emission."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.chain.emission import fee_on
from smartnodes_core.chain.proposal import Parameters, Payment, Settlement
from smartnodes_core.errors import RecordError
from smartnodes_core.payments import ASKED_UNITS, JobWork, Price, asked_wei, pays, settle, share

WORKERS = [bytes([number] * 20) for number in range(1, 4)]
SIGNERS = [bytes([number] * 20) for number in range(10, 13)]
PARAMETERS = Parameters(500, 10_000)
ESCROW = b"e" * 32


def job(units: dict[bytes, int], price: Price, available_wei: int, in_coin: bool = False) -> JobWork:
    return JobWork(b"j" * 32, units, price, ESCROW, in_coin, available_wei)


def test_a_price_is_read_from_a_jobs_terms() -> None:
    assert Price.of({"seed": 3}) is None
    assert Price.of({"price_wei": 7}) == Price(7, 1)
    assert Price.of({"price_wei": "1" + "0" * 30, "price_per_units": 10**12}) == Price(10**30, 10**12)


@pytest.mark.parametrize(
    "terms",
    [
        {"price_wei": -1},
        {"price_wei": "1.5"},
        {"price_wei": "9" * 100},
        {"price_wei": ""},
        {"price_wei": "\u0663"},
        {"price_wei": 1, "price_per_units": 0},
    ],
)
def test_what_is_no_price_is_refused(terms: dict[str, int | str]) -> None:
    with pytest.raises(RecordError, match="price_"):
        Price.of(terms)


def test_work_is_paid_at_its_price_and_the_fee_comes_on_top() -> None:
    work = {WORKERS[0]: 30, WORKERS[1]: 10}
    expected = Settlement(ESCROW, 0, (Payment(WORKERS[0], 7500), Payment(WORKERS[1], 2500)))
    assert settle(job(work, Price(1000, 4), 10_500), SIGNERS, PARAMETERS) == expected
    short = settle(job(work, Price(1000, 4), 10_499), SIGNERS, PARAMETERS)
    assert short is not None
    assert [payment.amount_wei for payment in short.payments] == [7499, 2499]


def test_without_price_or_escrow_nothing_is_paid() -> None:
    for work in (JobWork(b"j" * 32, {WORKERS[0]: 1}), job({WORKERS[0]: 1}, Price(1, 1), 0), job({}, Price(1, 1), 9)):
        assert settle(work, SIGNERS, PARAMETERS) is None


units = st.dictionaries(st.sampled_from([*WORKERS, *SIGNERS]), st.integers(0, 10**18), max_size=5)
amounts = st.integers(0, 10**24)


@given(units, amounts, st.integers(1, 10**9), amounts, st.integers(0, 10_000), st.booleans())
def test_no_more_is_paid_than_the_escrow_holds_and_nobody_gets_more_than_the_price(
    work: dict[bytes, int], wei: int, per_units: int, available_wei: int, fee_bps: int, in_coin: bool
) -> None:
    parameters = Parameters(fee_bps, 10_000)
    paid = settle(job(work, Price(wei, per_units), available_wei, in_coin), SIGNERS, parameters)
    amounts = {} if paid is None else {each.to: each.amount_wei for each in paid.payments}
    total_wei = sum(amounts.values())
    fee_wei = 0 if in_coin else fee_on(total_wei, parameters)
    assert total_wei + fee_wei <= available_wei
    for account in WORKERS:
        assert amounts.get(account, 0) <= wei * work.get(account, 0) // per_units


weights = st.lists(st.tuples(st.integers(0, 10**12), st.none() | st.integers(0, 10**20)), max_size=8)


@given(st.integers(0, 10**21), weights)
def test_shares_stay_within_pool_and_caps_and_waste_nothing_that_anybody_may_have(
    pool_wei: int, weights: list[tuple[int, int | None]]
) -> None:
    shares = share(pool_wei, weights)
    assert sum(shares) <= pool_wei
    for (units, cap), part in zip(weights, shares, strict=True):
        assert part <= (pool_wei if cap is None else cap)
        assert units or not part
    if any(units and (cap is None or part < cap) for (units, cap), part in zip(weights, shares, strict=True)):
        assert pool_wei - sum(shares) < len(weights) or pool_wei < len(weights)


@given(st.integers(0, 10**21), st.integers(1, 10**12), st.integers(1, 10**12), st.integers(0, 10**15))
def test_work_that_pays_nothing_takes_nothing_from_work_that_does(
    pool_wei: int, paid: int, free: int, cap: int
) -> None:
    assert share(pool_wei, [(paid, cap), (free, 0)])[0] == share(pool_wei, [(paid, cap)])[0]


@given(st.integers(0, 10**21), st.integers(1, 10**9), st.lists(st.none() | st.integers(10**30, 10**31), min_size=2))
def test_jobs_below_their_caps_pay_the_same_for_the_same_work(
    pool_wei: int, units: int, caps: list[int | None]
) -> None:
    assert len(set(share(pool_wei, [(units, cap) for cap in caps]))) == 1


def test_a_rig_works_for_what_it_asks_or_more() -> None:
    asked = 3 * ASKED_UNITS
    assert pays({"price_wei": 3}, asked)
    assert pays({"price_wei": 7, "price_per_units": 2}, asked)
    assert not pays({"price_wei": 5, "price_per_units": 2}, asked)
    assert not pays({}, 1)
    assert pays({}, 0)


@pytest.mark.parametrize(("said", "asked"), [({}, 0), ({"asks_wei": "7"}, 7), ({"asks_wei": 7}, 7)])
def test_what_a_worker_asks_is_read_from_its_announcement(said: dict[str, int | str], asked: int) -> None:
    assert asked_wei(said) == asked


@pytest.mark.parametrize("said", ["-1", "much", "9" * 200, -1])
def test_who_asks_for_no_price_asks_for_more_than_anybody_has(said: int | str) -> None:
    assert not pays({"price_wei": "9" * 77}, asked_wei({"asks_wei": said}))
