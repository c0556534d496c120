"""Log lines are for people, or one JSON object each."""

from __future__ import annotations

import json
import logging
import sys

from tensorlink.cli.options import JsonLines


def test_a_log_line_is_one_object_whatever_it_says():
    try:
        raise ValueError('a "quoted"\nreason')
    except ValueError:
        record = logging.LogRecord(
            "smartnodes_core.x", logging.WARNING, "f", 1, "%s went\nwrong", ("it",), sys.exc_info()
        )
    line = JsonLines().format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["logger"], fields["message"]) == ("WARNING", "smartnodes_core.x", "it went\nwrong")
    assert "quoted" in fields["exception"]
    assert abs(fields["time"] - record.created) < 0.01
