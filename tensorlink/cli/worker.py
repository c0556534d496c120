"""`tensorlink-worker`: a rig that takes stages of jobs.

The story of a rig: load the identity, listen, register on chain, join the network, announce what the rig can do,
serve; at the end drain, withdraw, exit 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from smartnodes_core.config import WorkerConfig
from smartnodes_core.errors import ConfigError, SmartnodesError
from smartnodes_core.nodes.running import running_worker
from tensorlink.cli.options import config_from, fail, parser_for, start_logging
from tensorlink.cli.running import EndedEarly, Life, add_life_flags
from tensorlink.worker import StageHandler

PROGRAM = "tensorlink-worker"


@dataclass(frozen=True)
class RigConfig(WorkerConfig):
    """Settings of a rig that computes stages."""

    num_threads: Annotated[int, "threads that compute"] = 1
    devices: Annotated[int, "devices that compute each stage together (tensor-parallel), num_threads threads each"] = 1
    device: Annotated[str, "what computes: cpu or cuda"] = "cpu"
    num_slots: Annotated[int, "jobs that this rig works on at once"] = 1
    up_mbit: Annotated[int, "what the line carries from here, in Mbit/s; 0: an ordinary line of 100"] = 0
    down_mbit: Annotated[int, "what the line carries to here, in Mbit/s; 0: an ordinary line of 100"] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_threads < 1 or self.num_slots < 1:
            raise ConfigError(
                f"num_threads is {self.num_threads}, num_slots {self.num_slots}: at least 1 of each is needed"
            )
        if self.devices < 1 or self.device not in ("cpu", "cuda"):
            raise ConfigError(f"devices is {self.devices}, device {self.device!r:.20}: needed 1 or more of cpu or cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a rig until it is told to end."""
    parser = parser_for(RigConfig, PROGRAM, "A rig that computes stages of other people's models for pay.")
    add_life_flags(parser)
    options = parser.parse_args(arguments)
    life = Life(options.exit_with_parent)
    try:
        config = config_from(RigConfig, options)
        start_logging(config.log_level, config.log_json)
        _run(config, life)
    except SmartnodesError as error:
        return fail(PROGRAM, error)
    except EndedEarly:
        return 0
    return 0


def _run(config: RigConfig, life: Life) -> None:
    config.need_bootstrap()  # before anything is started
    config.data_dir.mkdir(parents=True, exist_ok=True)
    handler = StageHandler(
        config.max_memory_bytes,
        config.num_threads,
        scratch=config.data_dir,
        num_devices=config.devices,
        device=config.device,
    )
    handler.start()
    try:
        line = {"up_mbit": config.up_mbit, "down_mbit": config.down_mbit}
        with running_worker(config, handler, config.num_slots, lambda: {**handler.offers(), **line}) as station:
            life.say_ready(station.node, confinement=handler.confinement, reached=str(station.reachability))
            life.wait()
    finally:
        handler.stop()


if __name__ == "__main__":
    sys.exit(main())
