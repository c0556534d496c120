"""`tensorlink doctor`: what this machine has and lacks to take part, in words."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smartnodes_core.config import NodeConfig, UserConfig, load
from smartnodes_core.nodes.checkup import Finding, check_up, summary
from smartnodes_core.records import Role
from tensorlink.cli.options import start_logging
from tensorlink.cli.validator import AuditorConfig
from tensorlink.cli.worker import RigConfig

_CONFIGS: dict[str, type[NodeConfig]] = {"user": UserConfig, "validator": AuditorConfig, "worker": RigConfig}


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("doctor", help="what this machine has and lacks to take part, in words")
    parser.add_argument("--config", type=Path, help="TOML file with the settings of its node")
    parser.add_argument("--role", choices=sorted(_CONFIGS), default="worker", help="of the node (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per check")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one line per check; exit code 1 where one failed."""
    start_logging("ERROR")
    findings = []
    for finding in _all(options.config, options.role):
        findings.append(finding)
        sys.stdout.write((json.dumps(asdict(finding)) if options.json else str(finding)) + "\n")
        sys.stdout.flush()
    if not options.json:
        sys.stdout.write(summary(findings) + "\n")
    return int(any(finding.level == "failure" for finding in findings))


def _all(path: Path | None, role: Role) -> Iterator[Finding]:
    config = load(_CONFIGS[role], path)
    if role != "user":
        yield computing()
    yield from check_up(config, role)


def computing() -> Finding:
    """Which torch computes, on what."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("failure", "torch", f"it cannot be loaded: {error}; run pip install torch")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Finding("ok", "torch", f"{torch.__version__} with {names}: `--device cuda`")
    return Finding("ok", "torch", f"{torch.__version__} on {torch.get_num_threads()} CPU threads; it finds no GPU")
