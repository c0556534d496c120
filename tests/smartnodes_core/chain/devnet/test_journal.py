"""What the journal gives back after a kill, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from smartnodes_core.chain.devnet.journal import DevnetJournal, Entry, Kind
from smartnodes_core.errors import ConfigError

ENTRIES = [
    Entry(Kind.TRANSACTION, 100, b"first" * 20),
    Entry(Kind.SHIFT_TIME, 7),
    Entry(Kind.TRANSACTION, 110, b"last"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.journal"
    write(path, *ENTRIES)
    return path


def write(path: Path, *entries: Entry) -> None:
    journal = DevnetJournal(path)
    list(journal.replay())
    for entry in entries:
        journal.append(entry)
    journal.close()


def read(path: Path) -> list[Entry]:
    journal = DevnetJournal(path)
    try:
        return list(journal.replay())
    finally:
        journal.close()


def test_what_was_appended_is_there_again(path: Path) -> None:
    assert read(path) == ENTRIES
    write(path, Entry(Kind.EMPTY_BLOCK, 111))
    assert read(path) == [*ENTRIES, Entry(Kind.EMPTY_BLOCK, 111)]


def test_cut_at_any_byte_of_its_last_entry_it_has_all_the_others_and_goes_on(path: Path) -> None:
    whole = path.read_bytes()
    last_bytes = 8 + 9 + len(ENTRIES[-1].payload)
    for missing in range(1, last_bytes + 1):
        path.write_bytes(whole[:-missing])
        assert read(path) == ENTRIES[:-1]
        assert path.stat().st_size == len(whole) - last_bytes
        write(path, ENTRIES[-1])
        assert path.read_bytes() == whole


def test_cut_at_any_byte_of_its_head_it_begins_anew(path: Path) -> None:
    whole = path.read_bytes()
    for kept in range(36):
        path.write_bytes(whole[:kept])
        assert read(path) == []


def test_a_tail_that_reached_the_disk_as_zeros_is_cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert read(path) == ENTRIES


def test_each_damaged_byte_before_the_last_entry_is_refused_and_nothing_is_cut_off(path: Path) -> None:
    whole = path.read_bytes()
    end_of_second = len(whole) - 8 - 9 - len(ENTRIES[-1].payload)
    for place in range(36, end_of_second):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=r"is damaged at byte .*backup"):
            read(path)
        assert path.stat().st_size == len(whole)


def test_it_goes_on_only_after_an_entry_that_is_its_own(path: Path) -> None:
    journal = DevnetJournal(path)
    places = [(journal.position, journal.mark())]
    places += [(journal.position, journal.mark()) for _ in journal.replay()]
    assert all(journal.goes_on_after(*place) for place in places)
    assert not journal.goes_on_after(places[1][0], places[2][1])
    journal.skip_to(*places[1])
    assert list(journal.replay()) == ENTRIES[1:]
    journal.close()
    path.write_bytes(path.read_bytes()[:-1])
    journal = DevnetJournal(path)
    assert [journal.goes_on_after(*place) for place in places] == [True, True, True, False]
    journal.close()


def test_every_journal_has_a_name_of_its_own(path: Path, tmp_path: Path) -> None:
    first, second = DevnetJournal(path), DevnetJournal(tmp_path / "b.journal")
    assert first.id != second.id
    first.close()
    second.close()


def test_a_journal_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old.journal"
    old.write_bytes(b"smartnodes devnet 1\n" + bytes(40))
    with pytest.raises(ConfigError, match="earlier version: name a new file"):
        DevnetJournal(old)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        DevnetJournal(tmp_path / "file" / "a.journal")
