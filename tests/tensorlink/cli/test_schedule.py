"""`tensorlink schedule` prints what the simulator finds."""

from __future__ import annotations

import pytest

from tensorlink.cli.main import main


def test_it_prints_the_grid_and_draws_the_picture(capsys, tmp_path):
    picture = tmp_path / "zbv.png"
    assert main(["schedule", "--schedule", "zbv", "--workers", "2", "--micro-batches", "4", "--out", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("0F0 0F1 0F2 3F0 3I0")
    assert lines[2] == "makespan 25, 4.0% of the workers' time idle"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_costs_and_transfers_count(capsys):
    assert (
        main(["schedule", "--schedule=gpipe", "--workers=2", "--micro-batches=1", "--costs=B=3", "--transfer=1"]) == 0
    )
    assert "makespan 10," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--costs", "F=no"], "found --costs 'F=no'"),
        (["--costs", "X=1"], "found --costs 'X=1'"),
        (["--transfer", "-1"], "found --transfer -1.0"),
        (["--workers", "0"], "at least one of each"),
        (["--out", "/no/such/folder/a.png"], "does not exist: make it first"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(flags, message, capsys):
    assert main(["schedule", *flags]) == 2
    assert message in capsys.readouterr().err
