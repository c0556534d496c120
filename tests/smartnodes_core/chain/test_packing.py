from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartnodes_core.chain.packing import pack_reputations, unpack_reputations

updates = st.dictionaries(st.integers(0, 3000), st.integers(0, 255), max_size=200)


@given(updates)
def test_what_is_packed_is_unpacked(update: dict[int, int]) -> None:
    assert unpack_reputations(pack_reputations(update)) == update


@given(st.binary(min_size=39, max_size=39))
def test_only_canonical_bytes_are_read(data: bytes) -> None:
    try:
        update = unpack_reputations(data)
    except ValueError:
        return
    assert pack_reputations(update) == data


def test_the_encoding_is_small_and_fixed() -> None:
    assert pack_reputations({}) == b""
    assert pack_reputations({33: 7}).hex() == "000001" + "00000002" + "00" * 30 + "0700"
    assert pack_reputations({0: 1, 31: 9}).hex() == "000000" + "80000001" + "09" + "00" * 30 + "01"
    assert len(pack_reputations(dict.fromkeys(range(1000), 5))) == 32 * 39


@pytest.mark.parametrize("update", [{-1: 5}, {0: 256}, {0: -1}, {1 << 29: 1}])
def test_values_out_of_range_are_refused(update: dict[int, int]) -> None:
    with pytest.raises(ValueError):
        pack_reputations(update)


def test_a_word_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        unpack_reputations(pack_reputations({1: 5}) * 2)
