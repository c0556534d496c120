"""`tensorlink audit-math` prints the odds for the settings that it is given."""

from __future__ import annotations

import json

import pytest

from tensorlink.audit.odds import ATTACKS, UNDECIDED
from tensorlink.cli.main import main
from tensorlink.network import DEFAULT_AUDIT_TERMS


def read(capsys, *flags):
    assert main(["audit-math", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_says_of_each_attack_when_it_is_found_and_what_stake_stops_it(capsys):
    assert main(["audit-math"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Audited: 0.2000% of units, 2.0000% of stage-steps")
    assert all(f"\n{attack}: {what}" in out for attack, what in ATTACKS.items())
    assert "0 of 3        23.8%           100.00%          50.0  392.0\n" in out
    assert "never  none is enough" in out
    assert out.count("neither end of the link is paid") == len(UNDECIDED)


def test_json_has_the_same_numbers_and_the_defaults_are_the_network_s(capsys):
    found = read(capsys)
    assert found["settings"]["unit_rate"] * 1e6 == DEFAULT_AUDIT_TERMS.unit_rate_ppm
    assert found["settings"]["step_rate"] * 1e6 == DEFAULT_AUDIT_TERMS.step_rate_ppm
    assert [one["attack"] for one in found["attacks"]] == list(ATTACKS)
    first = found["attacks"][1]["cases"][0]
    assert (first["colluding_assigned"], first["expected_steps"]) == (0, pytest.approx(50))
    assert found["attacks"][1]["cases"][3]["expected_steps"] is None


def test_flags_count_and_one_attack_can_be_asked_for(capsys):
    (one,) = read(capsys, "--attack", "wrong-gradient", "--step-rate", "0.5", "--colluding", "0", "--steps", "2")[
        "attacks"
    ]
    assert one["detection"] == one["cases"][0]["detection"] == pytest.approx(0.75)
    (one,) = read(capsys, "--attack", "wrong-gradient", "--collusion", "withhold")["attacks"]
    assert [case["expected_steps"] for case in one["cases"]] == [pytest.approx(50)] * 4  # drawn without who withholds
    few = ("--validators", "4", "--colluding", "3")
    (one,) = read(capsys, "--attack", "wrong-gradient", "--collusion", "withhold", *few)["attacks"]
    assert [case["expected_steps"] for case in one["cases"]] == [None, None]


def test_two_validators_take_no_stake(capsys):
    (one,) = read(capsys, "--attack", "wrong-output", "--validators", "2", "--colluding", "0")["attacks"]
    assert one["cases"][0]["stake"] is None
    assert main(["audit-math", "--validators", "2", "--colluding", "0"]) == 0
    assert "too few to take a stake" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unit-rate", "2"], "found unit_rate 2.0"),
        (["--colluding", "10"], "10 colluding of 9"),
        (["--steps", "0"], "found --steps 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(flags, message, capsys):
    assert main(["audit-math", *flags]) == 2
    assert message in capsys.readouterr().err
