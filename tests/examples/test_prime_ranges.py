"""The second network: it runs on the core alone, and tells who searched from who did not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from smartnodes_core.records import NO_DIGEST, Opening, OpeningItem
from smartnodes_core.reputation import VerdictCounts

FOLDER = Path(__file__).parents[2] / "examples" / "prime_ranges"


@pytest.fixture
def primes(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import primes

    return primes


def examine(primes, found, opened=None, unit=1, num_items=1):
    """The finding about a worker that committed to `found` for each unit of block 3 and opens `opened`."""
    pieces = [found(3, unit) if opened is None else opened] * num_items
    items = [OpeningItem(label="primes", meta=b"", num_bytes=len(piece)) for piece in pieces]
    units = [SimpleNamespace(micro_batch=n, roots={"primes": primes.root_of(found(3, n))}) for n in range(primes.UNITS)]
    case = SimpleNamespace(
        challenge=SimpleNamespace(unit=unit),
        commitment=SimpleNamespace(step=3, units=units),
        opening=Opening(challenge=NO_DIGEST, commitment=NO_DIGEST, items=items).encode(),
    )
    return primes.PrimeAuditor().examine(case, memoryview(b"".join(pieces)))


@pytest.mark.timeout(180)
def test_the_network_counts_the_primes_and_takes_the_name_of_a_lazy_worker():
    flags = ["--below", "400000", "--lazy", "1", "--audited-percent", "100"]
    command = [sys.executable, str(FOLDER / "run.py"), "demo", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"primes": 33860, "reputations": {"worker-0": 128, "worker-1": 0}}


def test_it_stands_on_the_core_and_on_nothing_that_trains():
    imported = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - sys.stdlib_module_names == {"smartnodes_core", "blake3", "primes", "searching"}


def test_a_unit_holds_its_primes_and_no_others(primes):
    first = primes.primes_of(0, 0)
    assert [int.from_bytes(first[at : at + 8], "big") for at in range(0, 40, 8)] == [2, 3, 5, 7, 11]
    assert sum(len(primes.primes_of(0, unit)) // 8 for unit in range(primes.UNITS)) == 9592  # below 100,000


def test_an_audit_finds_honest_work_honest(primes):
    assert examine(primes, primes.primes_of)[0] == "honest"


def test_an_audit_finds_a_prime_that_is_missing(primes):
    finding, reason = examine(primes, lambda block, unit: primes.primes_of(block, unit)[8:])
    assert finding == "fraudulent"
    assert "not all and only" in reason


@pytest.mark.parametrize(("opened", "num_items"), [(b"", 1), (b"\0" * 7, 1), (None, 2)])
def test_an_audit_finds_an_opening_that_was_not_committed_to(primes, opened, num_items):
    assert examine(primes, primes.primes_of, opened, num_items=num_items)[0] == "fraudulent"


def test_a_name_is_made_in_few_rounds_and_lost_in_one(primes):
    assert primes.confidence(1, VerdictCounts(honest=3)) == 128
    assert primes.confidence(255, VerdictCounts(honest=1)) == 255
    assert primes.confidence(128, VerdictCounts(silent=1)) == 64
    assert primes.confidence(1, VerdictCounts(silent=1)) == 1
    assert primes.confidence(200, VerdictCounts(honest=9, fraudulent=1)) == 0
    assert primes.confidence(0, VerdictCounts(honest=9)) == 0
