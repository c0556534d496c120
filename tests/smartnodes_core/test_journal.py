from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartnodes_core.errors import LocalError
from smartnodes_core.journal import EquivocationError, Journal

ONE, OTHER = b"1" * 32, b"2" * 32


def test_the_same_digest_again_is_fine_and_another_is_refused():
    journal = Journal(None)
    journal.once("a", ONE)
    journal.once("a", ONE)
    with pytest.raises(EquivocationError, match="signed before"):
        journal.once("a", OTHER)
    assert journal.signed("a") == ONE
    assert journal.signed("b") is None


def test_a_restart_never_signs_a_second_version(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.once("commitment/x/1", ONE)
    journal.close()
    again = Journal(tmp_path / "journal")
    again.once("commitment/x/1", ONE)
    with pytest.raises(EquivocationError):
        again.once("commitment/x/1", OTHER)
    again.once("commitment/x/2", OTHER)
    again.close()
    assert Journal(tmp_path / "journal").count("commitment/x/") == 2


def test_it_counts_how_far_a_numbering_came():
    journal = Journal(None)
    for number in range(1, 4):
        journal.once(f"list/a/{number}", ONE)
    journal.once("list/b/1", ONE)
    assert journal.count("list/a/") == 3


@settings(max_examples=60, deadline=None)
@given(
    scopes=st.lists(st.text(min_size=0, max_size=30).filter(lambda text: "\0" not in text), min_size=1, unique=True),
    cut=st.integers(1, 10_000),
    noise=st.binary(max_size=40),
)
def test_whatever_a_dying_machine_leaves_of_the_last_entry_all_others_are_remembered(scopes, cut, noise):
    try:
        for scope in scopes:
            scope.encode()
    except UnicodeEncodeError:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        journal = Journal(path)
        for scope in scopes[:-1]:
            journal.once(scope, ONE)
        whole = path.stat().st_size
        journal.once(scopes[-1], ONE)
        journal.close()
        data = path.read_bytes()
        torn = data[: whole + cut % (len(data) - whole)]
        path.write_bytes(torn + bytes(len(noise)) if cut % 2 else torn)
        again = Journal(path)
        for scope in scopes[:-1]:
            with pytest.raises(EquivocationError):
                again.once(scope, OTHER)
        again.once(scopes[-1], OTHER)  # it was never sent
        again.close()
        last = Journal(path)
        assert last.signed(scopes[-1]) == OTHER
        last.close()


def test_damage_before_whole_entries_is_refused_and_not_forgotten(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    for number in range(3):
        journal.once(f"scope {number}", ONE)
    journal.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(LocalError, match="damaged at byte"):
        Journal(path)
    assert path.read_bytes() == data


def test_two_processes_cannot_share_one(tmp_path):
    journal = Journal(tmp_path / "journal")
    with pytest.raises(LocalError, match="another node"):
        Journal(tmp_path / "journal")
    journal.close()
    Journal(tmp_path / "journal").close()


def test_an_entry_that_cannot_be_written_is_not_signed_and_hides_nothing(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.once("a", ONE)
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LocalError, match="No space left"):
        journal.once("b", ONE)
    monkeypatch.setattr(os, "fsync", real)
    assert journal.signed("b") is None
    journal.once("c", ONE)
    journal.close()
    again = Journal(path)
    assert [again.signed(scope) for scope in "abc"] == [ONE, None, ONE]


@pytest.mark.parametrize(("scope", "digest"), [("a", b"short"), ("a", b""), ("x" * 5000, ONE)])
def test_what_could_not_be_read_back_is_not_written(tmp_path, scope, digest):
    journal = Journal(tmp_path / "journal")
    with pytest.raises(LocalError):
        journal.once(scope, digest)
    assert (tmp_path / "journal").stat().st_size == 0


def test_a_directory_that_is_not_there_is_a_local_error(tmp_path):
    with pytest.raises(LocalError, match="cannot be used"):
        Journal(tmp_path / "nowhere" / "journal")


def test_a_closed_journal_lets_nothing_more_be_signed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.once("a", b"1" * 32)
    journal.close()
    with pytest.raises(LocalError, match="is closed"):
        journal.once("b", b"2" * 32)
