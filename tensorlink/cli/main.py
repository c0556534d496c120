"""`tensorlink`: the demo, and the commands with which a person sets up and looks at a network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from smartnodes_core.errors import SmartnodesError
from tensorlink.cli import audit_math, chain, demo, doctor, home, keys, schedule, stake, status, verify
from tensorlink.cli.options import fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 (1 as a command says), 2 for an error that was explained, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        "tensorlink", description="Train PyTorch models on strangers' GPUs, where bad work is found out."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (demo, doctor, home, schedule, keys, chain, stake, status, audit_math, verify):
        module.add_commands(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except SmartnodesError as error:
        return fail(f"tensorlink {options.command}", error)
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
