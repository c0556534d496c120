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
        "--fault-schedules",
        type=int,
        default=140,
        help="seeded schedules of faults under which calls are made over the memory transport (the long mode: 10000)",
    )
    parser.addoption(
        "--connections",
        type=int,
        default=200,
        help="connections after which nothing may be left of them (the long mode: 10000)",
    )
