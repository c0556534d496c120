"""Timetables, simulated or recorded: figures, the grid, the picture."""

from __future__ import annotations

import pytest

from smartnodes_core.errors import ConfigError
from tensorlink.pipeline.schedule import Timetable, one_forward_one_backward, simulate, zero_bubble_v
from tensorlink.pipeline.schedule.picture import draw

RECORDED = [(0, "F", 0, 100.0, 101.0), (1, "F", 0, 101.5, 102.0), (1, "B", 0, 102.0, 103.0), (0, "B", 0, 103.0, 104.0)]


def test_it_prints_as_a_grid():
    assert str(simulate(one_forward_one_backward(2, 2))).splitlines() == [
        "0F0 0F1 .   0B0 .   0B1",
        ".   1F0 1B0 1F1 1B1 .",
    ]


def test_who_was_busy():
    timetable = simulate(one_forward_one_backward(2, 2))
    assert timetable.makespan == 9.0
    assert timetable.busy == [pytest.approx(6 / 9)] * 2
    assert timetable.bubble == pytest.approx(1 / 3)


def test_what_was_recorded_counts_from_its_first_start():
    timetable = Timetable.recorded(RECORDED)
    assert timetable.makespan == 4.0
    assert timetable.busy == [0.5, 0.375]
    assert str(timetable).splitlines() == ["0F0 .   .   0B0", ".   1F0 1B0 ."]
    assert Timetable.recorded(RECORDED, placement=(0, 0)).busy == [0.875]


def test_nothing_recorded_is_an_empty_timetable():
    timetable = Timetable.recorded([])
    assert (timetable.makespan, timetable.busy, timetable.bubble, str(timetable)) == (0.0, [], 0.0, "")


@pytest.mark.parametrize("timetable", [simulate(zero_bubble_v(3, 4)), Timetable.recorded(RECORDED)])
def test_both_are_drawn_with_a_box_for_each_action(timetable, tmp_path):
    draw(timetable, tmp_path / "picture.svg", unit="seconds")
    text = (tmp_path / "picture.svg").read_text()
    assert text.count("PolyCollection_") == len(timetable.runs)


def test_a_picture_in_another_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must end in one of pdf, png, svg"):
        draw(Timetable.recorded(RECORDED), tmp_path / "picture.exe")
