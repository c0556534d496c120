from __future__ import annotations

from tensorlink.recovery.journal import Entry, Journal


def journal(*steps):
    made = Journal()
    for step in steps:
        made.add(Entry(step, 0, lambda: None))
    return made


def steps(entries):
    return [entry.step for entry in entries]


def test_what_was_done_since_a_step_comes_in_its_order():
    assert steps(journal(0, 0, 1, 2, 2).since(1)) == [1, 2, 2]


def test_what_nobody_goes_back_to_is_forgotten():
    made = journal(0, 1, 2)
    made.forget_before(2)
    assert steps(made.since(0)) == [2]
    assert made.begin == 2


def test_a_replaced_state_begins_anew():
    made = journal(0, 1)
    made.start_at(1)
    assert len(made) == 0
    assert made.begin == 1
