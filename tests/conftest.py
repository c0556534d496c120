"""What all tests share: hypothesis draws the same examples each time, and no example is judged by how long it took.

Under pytest-xdist (`make test`) each file's tests stay together on one worker, in their order, with the fixtures that
they share. Those that start whole networks take turns on one worker, beside the others' computing on the other: two
networks at once would fill a small machine.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
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
    parser.addoption(
        "--across-routers",
        action="store_true",
        help="have rigs at two homes, in network namespaces, train a model together (root; a minute)",
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


def _namespaces_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("namespaces", Path(__file__).with_name("namespaces.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def namespaces() -> Iterator[Any]:
    """Network namespaces to be machines; skips with the reason where there can be none."""
    module = _namespaces_module()
    if reason := module.why_not():
        pytest.skip(reason)
    made = module.Namespaces()
    yield made
    made.close()


@pytest.fixture
def homes(namespaces: Any) -> Callable[..., Any]:
    """`homes(symmetric=…)` makes two homes behind routers that translate, and public machines; see namespaces.py."""
    module = _namespaces_module()
    if reason := module.why_not(translating=True):
        pytest.skip(reason)

    def make(**options: Any) -> Any:
        module.two_homes(namespaces, **options)
        return namespaces

    return make
