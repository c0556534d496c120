"""`tensorlink schedule`: the timetable of a pipeline schedule, printed and drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smartnodes_core.errors import ConfigError
from tensorlink.pipeline.schedule import GENERATORS, UNIT_COSTS, Kind, generate, simulate
from tensorlink.pipeline.schedule.picture import FORMATS, draw

#: A wider grid is no help on a screen.
MAX_PRINTED_COLUMNS = 240


def add_commands(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("schedule", help="the timetable of a pipeline schedule, printed and drawn")
    parser.add_argument("--schedule", default="1f1b", choices=list(GENERATORS), help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--stages", type=int, help="in all; for interleaved a multiple of the workers")
    parser.add_argument("--micro-batches", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--costs",
        default="",
        metavar="F=1,B=2,I=1,W=1",
        help="time of a forward, a whole backward and its two parts on one stage (default: %(metavar)s)",
    )
    parser.add_argument("--transfer", type=float, default=0.0, help="time between two workers (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"draw it here; the name ends in one of {', '.join(FORMATS)}")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print grid, makespan and idle share."""
    schedule = generate(options.schedule, options.workers, options.micro_batches, options.stages)
    if options.transfer < 0:
        raise ConfigError(f"found --transfer {options.transfer}, needed 0 or more")
    timetable = simulate(schedule, _costs(options.costs), options.transfer)
    grid = str(timetable)
    if len(grid.split("\n", 1)[0]) <= MAX_PRINTED_COLUMNS:
        sys.stdout.write(grid + "\n")
    sys.stdout.write(f"makespan {timetable.makespan:g}, {timetable.bubble:.1%} of the workers' time idle\n")
    if options.out is not None:
        if not options.out.parent.is_dir():
            raise ConfigError(f"the folder of --out {options.out} does not exist: make it first")
        draw(timetable, options.out)
        sys.stdout.write(f"drawn: {options.out}\n")
    return 0


def _costs(text: str) -> Mapping[Kind, float]:
    costs = dict(UNIT_COSTS)
    for part in filter(None, text.split(",")):
        kind, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        known = next((one for one in costs if one == kind), None)
        if known is None or not 0 < number < float("inf"):
            raise ConfigError(f"found --costs {part!r}, needed pairs such as F=1,B=2,I=1,W=1 with numbers above 0")
        costs[known] = number
    return costs
