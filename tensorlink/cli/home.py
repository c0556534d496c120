"""`tensorlink home start` and `join`: a private network over the machines of one owner."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from smartnodes_core.transport.base import join_endpoint, split_endpoint
from tensorlink.cli.options import start_logging
from tensorlink.cli.running import EndedEarly, Life, add_life_flags

#: Any address of the internet: which of this machine's addresses leads there is its own.
ELSEWHERE = "192.0.2.1"
FOLDER = Path("~/.tensorlink/home")


def add_commands(commands: Any) -> None:
    """Register the commands."""
    home = commands.add_parser("home", help="a private network over your own machines")
    parts = home.add_subparsers(dest="part", required=True, metavar="part")
    start = parts.add_parser("start", help="on the first machine: chain, validator, worker, and the code for others")
    start.add_argument("--address", help="this machine's address for the others (default: towards the internet)")
    start.add_argument("--port", type=int, default=9000, help="first of four ports (default: %(default)s)")
    start.add_argument("--no-worker", action="store_true", help="this machine computes nothing")
    start.add_argument(
        "--round-interval-s", type=int, default=5, help="a machine is admitted after a round (default: %(default)s)"
    )
    start.set_defaults(run=run_start)
    join = parts.add_parser("join", help="on every other machine: a worker of that network")
    join.add_argument("gate", help="host:port that `start` printed")
    join.add_argument("code", help="the code that `start` printed")
    join.add_argument("--port", type=int, default=9002, help="of this machine's worker (default: %(default)s)")
    join.add_argument("--worker-flags", nargs=argparse.REMAINDER, default=[], help="more flags of tensorlink-worker")
    join.set_defaults(run=run_join)
    for part in (start, join):
        part.add_argument("--folder", type=Path, default=FOLDER, help="keys and journals (default: %(default)s)")
        add_life_flags(part)


def run_start(options: argparse.Namespace) -> int:
    """Run the first machine until it is told to end."""
    from tensorlink.home import Home, HomeSettings, address_towards

    life = Life(options.exit_with_parent)
    start_logging("WARNING")
    address = options.address or address_towards(ELSEWHERE)
    folder = options.folder.expanduser()
    home = Home(HomeSettings(folder, address, options.port, not options.no_worker, options.round_interval_s))
    try:
        code = home.start()
        life.started()
        sys.stdout.write(
            f"ready. On another machine:\n\n  tensorlink home join {home.gate_endpoint} {code}\n\n"
            f"In a script on this machine: tensorlink.connect({str(home.config_path)!r})\n"
        )
        sys.stdout.flush()
        life.wait()
    except EndedEarly:
        return 0
    finally:
        home.stop()
    return 0


def run_join(options: argparse.Namespace) -> int:
    """Run this machine's worker until it is told to end."""
    from tensorlink.cli import worker
    from tensorlink.home import Guest, address_towards

    host, _ = split_endpoint(options.gate)
    endpoint = join_endpoint(address_towards(host), options.port)
    guest = Guest(options.folder.expanduser() / "guest", options.gate, options.code)
    try:
        flags = {**guest.join(), "endpoint": endpoint}
        given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()] + options.worker_flags
        return worker.main([*given, *(["--exit-with-parent"] if options.exit_with_parent else [])])
    finally:
        guest.close()
