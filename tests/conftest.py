"""What all tests share: hypothesis draws the same examples each time, and no example is judged by how long it took.

Under pytest-xdist (`make test`) each file's tests stay together on one worker, in their order, with the fixtures that
they share. Those that start whole networks take turns on one worker, beside the others' computing on the other: two
networks at once would fill a small machine.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("tensorlink", deadline=None, derandomize=True)
settings.load_profile("tensorlink")


#: The group of tests that start whole networks; it is begun first, because it takes longest.
NETWORKS = "networks"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order is that of the workers
    return Scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of xdist's
        groups = {item: group_of(item.nodeid) for item in items}
        sizes = Counter(groups.values())
        items.sort(key=lambda item: (groups[item] != NETWORKS, -sizes[groups[item]]))  # what is long is not begun last


def group_of(nodeid: str) -> str:
    """The group of a test: its file, or NETWORKS where the file says `starts_network`, or the test takes `network`."""
    path, _, name = nodeid.partition("::")
    text = _text(path)
    test = re.escape(name.partition("[")[0])
    starts = "pytest.mark.starts_network" in text or re.search(rf"^def {test}\([^)]*\bnetwork\b", text, re.MULTILINE)
    return NETWORKS if starts else path


@cache
def _text(path: str) -> str:
    return (Path(__file__).parents[1] / path).read_text(encoding="utf-8")


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
        "--dht-nodes",
        type=int,
        default=100,
        help="nodes of the DHT of which three tenths vanish at once (the long mode: 1000)",
    )
