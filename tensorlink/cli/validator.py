"""`tensorlink-validator`: keeps jobs, audits workers, votes on rounds."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from smartnodes_core.audit import HashChain
from smartnodes_core.chain.proposal import Parameters
from smartnodes_core.config import ValidatorConfig
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.journal import Journal
from smartnodes_core.keyfile import read_key_file, write_key_file
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.validator import ValidatorNode, ValidatorSettings
from tensorlink.cli.options import config_from, fail, parser_for, start_logging
from tensorlink.cli.running import EndedEarly, Life, add_life_flags
from tensorlink.validator import ReplayAuditor

PROGRAM = "tensorlink-validator"
#: A silent proposer is given up after this share of a round's interval.
PROPOSER_SHARE = 0.5


@dataclass(frozen=True)
class AuditorConfig(ValidatorConfig):
    """Settings of a validator that re-executes stages."""

    num_threads: Annotated[int, "threads that re-execute"] = 1
    max_memory_bytes: Annotated[int, "memory for re-executing; 0 sets no bound"] = 0
    list_interval_s: Annotated[float, "seconds over which commitments are gathered before challenges are drawn"] = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a validator until it is told to end."""
    parser = parser_for(AuditorConfig, PROGRAM, "A validator: keeps jobs, audits workers, votes on rounds.")
    add_life_flags(parser)
    options = parser.parse_args(arguments)
    life = Life(options.exit_with_parent)
    try:
        config = config_from(AuditorConfig, options)
        start_logging(config.log_level)
        _run(config, life)
    except SmartnodesError as error:
        return fail(PROGRAM, error)
    except EndedEarly:
        return 0
    return 0


def _run(config: AuditorConfig, life: Life) -> None:
    config.data_dir.mkdir(parents=True, exist_ok=True)
    hash_chain = HashChain(_chain_secret(config.data_dir / "hash_chain.json"))
    station = Station.open(config, "validator", hash_chain.tip)
    auditor = ReplayAuditor(config.max_memory_bytes, config.num_threads)
    try:
        journal = Journal(config.data_dir / "signed.journal")
        validator = ValidatorNode(
            station.node,
            station.identity,
            station.account_key,
            station.membership,
            auditor,
            hash_chain,
            journal,
            ValidatorSettings(
                list_interval_s=config.list_interval_s,
                poll_s=max(0.5, config.round_interval_s / 10),
                proposer_timeout_s=max(2.0, config.round_interval_s * PROPOSER_SHARE),
                parameters=_voted_for(config),
            ),
            station.learn_validators,
            config.data_dir,
            station.announced,
        )
        station.join()
        station.announce(dict)
        validator.start()
        life.say_ready(station.node)
        life.wait()
        validator.stop()
        journal.close()
    finally:
        station.close()
        auditor.stop()


def _voted_for(config: AuditorConfig) -> Parameters | None:
    if config.vote_fee_bps is None or config.vote_kappa_bps is None:
        return None
    return Parameters(config.vote_fee_bps, config.vote_kappa_bps)


def _chain_secret(path: Path) -> bytes:
    """The secret at the far end of the hash chain, made at the first start and kept: its tip is on chain."""
    if not path.exists():
        write_key_file(path, {"secret": secrets.token_hex(32)})
    return bytes.fromhex(str(read_key_file(path)["secret"]))


if __name__ == "__main__":
    sys.exit(main())
