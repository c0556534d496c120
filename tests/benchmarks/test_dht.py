"""The benchmark of the DHT runs, from its arguments to its report, as small as it can be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "benchmark_dht.py"


def test_it_finds_everything_and_says_so(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARK), "--nodes", "20", "--sockets", "8", "--processes", "4"]
    done = subprocess.run([*command, "--report", str(report)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    for part, count in (("memory", 20), ("tls", 8)):
        assert figures[part]["get"]["found"] == count
        assert figures[part]["get"]["max_hops"] <= figures[part]["hops_limit"]
    assert "found 20 of 20" in done.stdout
