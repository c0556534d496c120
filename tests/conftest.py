"""What all tests share: hypothesis draws the same examples each time, and no example is judged by how long it took."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("tensorlink", deadline=None, derandomize=True)
settings.load_profile("tensorlink")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chain-calls",
        type=int,
        default=300,
        help="random calls to the contracts and to the model of their rules (the long mode: 100000)",
    )
    parser.addoption(
        "--devnet-kills",
        type=int,
        default=3,
        help="how often the devnet is killed at a random instant (the long mode: 100)",
    )
    parser.addoption(
        "--validator-kills",
        type=int,
        default=0,
        help="how often two of four validators, and then the chain, are killed at a random instant (the long mode: 5)",
    )
    parser.addoption(
        "--chain-reorgs",
        type=int,
        default=0,
        help="how often the chain takes back the last rounds of four validators (the long mode: 10)",
    )
    parser.addoption(
        "--chain-away-s",
        type=float,
        default=0.0,
        help="how many seconds the chain is away from four validators, and from a network that trains (long: 180)",
    )
