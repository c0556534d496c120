"""`tensorlink demo`: a whole network on this machine trains a small GPT, and a plain process checks it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tensorlink.cli.options import start_logging


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("demo", help="a whole network on this machine trains a small GPT and is checked")
    parser.add_argument("--steps", type=int, default=240, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--report", type=Path, help="write all figures here as JSON, and a picture of the losses beside it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--cheat", metavar="NAME", default="", help="one worker cheats so, and is found and replaced")
    parser.add_argument("--log-level", default="ERROR", help="of this process (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; exit code 1 where its losses are not those of the plain process, or a cheat was not found."""
    from smartnodes_core.errors import ConfigError

    if options.steps < 1:
        raise ConfigError(f"found --steps {options.steps}, needed at least 1")
    if options.report is not None and not options.report.parent.is_dir():
        raise ConfigError(f"the folder of --report {options.report} does not exist: make it first")
    start_logging(options.log_level)
    from tensorlink.demo import report
    from tensorlink.demo.cheats import CHEATS
    from tensorlink.demo.run import DemoOptions, run_demo

    if options.cheat and options.cheat not in CHEATS:
        raise ConfigError(f"found --cheat {options.cheat!r:.40}, needed one of: {', '.join(sorted(CHEATS))}")
    result = run_demo(DemoOptions(steps=options.steps, seed=options.seed, cheat=options.cheat), _say)
    for line in report.lines(result):
        _say(line)
    if options.report is not None:
        picture = report.write(result, options.report)
        _say(f"report: {options.report}, picture: {picture}")
    return 0 if report.is_good(result) else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
