"""The contracts' arithmetic on bits, proven for all inputs with z3.

What is proven is a transcription of `contracts/libraries/`; that the compiled contracts do the same is what the random
calls in `test_contracts_against_model.py` are for.
"""

from __future__ import annotations

from typing import Any

import z3

ONES = int.from_bytes(b"\x01" * 32, "big")
SPREAD_MASKS = (
    (112, 0x0000000000000000000000000000FFFF0000000000000000000000000000FFFF),
    (56, 0x00000000000000FF00000000000000FF00000000000000FF00000000000000FF),
    (28, 0x0000000F0000000F0000000F0000000F0000000F0000000F0000000F0000000F),
    (14, 0x0003000300030003000300030003000300030003000300030003000300030003),
    (7, ONES),
)


def word(value: int) -> Any:
    return z3.BitVecVal(value, 256)


def spread(mask: Any) -> Any:
    """`ReputationUpdates.spread`."""
    for shift, keep in SPREAD_MASKS:
        mask = (mask | (mask << shift)) & word(keep)
    return mask * word(0xFF)


def has_zero_byte(value: Any) -> Any:
    """`ReputationUpdates.hasZeroByte`."""
    return ((value - word(ONES)) & ~value & word(ONES << 7)) != 0


def byte(value: Any, place: int) -> Any:
    return z3.Extract(8 * place + 7, 8 * place, value)


def prove(claim: Any) -> None:
    solver = z3.Solver()
    solver.add(z3.Not(claim))
    assert solver.check() == z3.unsat, solver.model()


def test_the_masks_are_those_of_the_contract() -> None:
    from .test_contracts import SOURCES

    text = (SOURCES / "libraries" / "ReputationUpdates.sol").read_text().lower()
    for shift, keep in SPREAD_MASKS[:-1]:
        assert f"(lanes << {shift})) & 0x{keep:064x}" in text or f"(mask << {shift})) & 0x{keep:064x}" in text


def test_a_lane_is_replaced_if_and_only_if_its_bit_is_set() -> None:
    mask = z3.ZeroExt(224, z3.BitVec("mask", 32))
    current, lanes = z3.BitVec("current", 256), z3.BitVec("lanes", 256)
    kept = ~spread(mask)
    merged = (current & kept) | (lanes & ~kept)
    for place in range(32):
        chosen = z3.Extract(place, place, mask) == 1
        prove(byte(merged, place) == z3.If(chosen, byte(lanes, place), byte(current, place)))


def test_a_zero_is_found_if_and_only_if_there_is_one() -> None:
    value = z3.BitVec("value", 256)
    prove(has_zero_byte(value) == z3.Or([byte(value, place) == 0 for place in range(32)]))


def test_a_quorum_is_more_than_two_thirds_and_two_share_more_than_a_third() -> None:
    live = z3.Int("live")
    needed = 2 * live / 3 + 1  # z3 divides integers as Solidity does
    prove(z3.Implies(live > 0, z3.And(3 * needed > 2 * live, needed <= live, 3 * (2 * needed - live) > live)))
