"""Lookups over calls that answer late, or never."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from smartnodes_core.dht.asking import MAX_TIMEOUT_S, MIN_PATIENCE_S, Patience, run_lookup
from smartnodes_core.dht.contacts import Contact
from smartnodes_core.dht.lookup import NUM_PARALLEL, Lookup
from smartnodes_core.errors import DeadlineError
from smartnodes_core.records import digest_of
from smartnodes_core.rpc.pool import WorkerPool

OWN = digest_of("test", b"own")
EVERYBODY = sorted(
    (Contact(digest_of("test", bytes([number])), ("10.0.0.1:1",)) for number in range(12)), key=lambda each: each.id
)


def test_patience_follows_what_was_measured() -> None:
    patience = Patience()
    for _ in range(100):
        patience.measured(0.001)
    assert patience.overdue_s == MIN_PATIENCE_S
    for _ in range(100):
        patience.measured(0.4)
    assert 0.4 < patience.overdue_s < 0.6
    for _ in range(100):
        patience.measured(60.0)
    assert patience.timeout_s == patience.overdue_s == MAX_TIMEOUT_S


def test_silent_nodes_do_not_hold_a_lookup_up() -> None:
    pool, silent, release = WorkerPool("test", 12), set(EVERYBODY[:NUM_PARALLEL]), threading.Event()
    asked_while_silent: list[Contact] = []

    def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
        if contact in silent:
            release.wait(20)
            raise DeadlineError("nobody answers")
        asked_while_silent.append(contact)
        if len(asked_while_silent) == len(EVERYBODY) - NUM_PARALLEL:
            release.set()  # all others were asked although the silent ones filled every place
        return (), False

    lookup = Lookup(0, OWN, EVERYBODY, width=len(EVERYBODY))
    patience = Patience()
    for _ in range(50):
        patience.measured(0.001)
    run_lookup(lookup, ask, pool.run, patience, time.monotonic() + 20)
    assert lookup.finished
    assert set(lookup.closest(20)) == set(EVERYBODY) - silent
    pool.stop(1.0)


def test_a_lookup_ends_at_its_deadline_with_what_it_has() -> None:
    pool, release = WorkerPool("test", 12), threading.Event()

    def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
        if contact == EVERYBODY[-1]:
            return (), False
        release.wait(20)
        raise DeadlineError("nobody answers")

    lookup = Lookup(0, OWN, EVERYBODY[-2:], width=2)
    began_s = time.monotonic()
    run_lookup(lookup, ask, pool.run, Patience(), began_s + 0.2)
    assert 0.2 <= time.monotonic() - began_s < 10
    assert not lookup.finished
    assert lookup.closest(2) == EVERYBODY[-1:]
    release.set()
    pool.stop(1.0)


def test_what_goes_wrong_inside_a_call_is_a_failure_of_that_node_alone() -> None:
    def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
        if contact == EVERYBODY[0]:
            raise DeadlineError("nobody answers")
        return (), False

    lookup = Lookup(0, OWN, EVERYBODY[:3], width=3)
    run_lookup(lookup, ask, lambda job: job(), Patience(), time.monotonic() + 20)
    assert lookup.closest(3) == EVERYBODY[1:3]
