"""The README says what is so: its example runs as it stands, and what its tree names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.timeout(180)
@pytest.mark.starts_network
def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    script = tmp_path / "example.py"
    script.write_text(example[1], encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_the_example_is_about_ten_lines_long() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    assert len([line for line in example[1].splitlines() if line.strip()]) <= 12


def test_every_path_in_the_tree_exists() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    folder, missing = ROOT, []
    for line in tree[1].splitlines():
        indented = line.startswith(" ")
        for name in re.findall(r"\S*(?:/|\.py)(?= |$)", line[:24] if not indented else line[:28]):
            path = (folder if indented else ROOT) / name
            if not path.exists():
                missing.append(str(path.relative_to(ROOT)))
        if not indented:
            folder = ROOT / line.split()[0]
    assert not missing


def test_the_files_to_read_first_exist() -> None:
    named = re.findall(r"`((?:tensorlink|smartnodes_core)/[\w/]+\.py)`", README)
    assert len(named) >= 6
    assert all((ROOT / name).exists() for name in named)
