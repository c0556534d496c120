"""A validator or a worker from its settings to its end: what every network's programs have in common.

A network adds what is its own: an `Auditor`, or a `JobHandler`. Both are context managers: inside, the node is
findable and serves; at the end it withdraws in order, also when the start was interrupted.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smartnodes_core.audit import Auditor, HashChain
from smartnodes_core.config import ValidatorConfig, WorkerConfig
from smartnodes_core.errors import ChainError
from smartnodes_core.jobs import JobHandler
from smartnodes_core.journal import Journal
from smartnodes_core.keyfile import read_key_file, write_key_file
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.validator import ValidatorNode, ValidatorSettings
from smartnodes_core.nodes.worker import WorkerNode
from smartnodes_core.payments import ASKS

logger = logging.getLogger(__name__)

#: In the data directory: what this node has signed. It is locked while the node runs.
JOURNAL = "signed.journal"


@contextmanager
def running_validator(config: ValidatorConfig, auditor: Auditor, settings: ValidatorSettings) -> Iterator[Station]:
    """A validator that audits with `auditor`. Raises what `Station.open` and `Station.join` do."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    hash_chain = HashChain(_chain_secret(config.data_dir / "hash_chain.json"))
    station = Station.open(config, "validator", hash_chain.tip)
    try:
        journal = Journal(config.data_dir / JOURNAL)
        validator = ValidatorNode(
            station.node,
            station.identity,
            station.account_key,
            station.membership,
            auditor,
            hash_chain,
            journal,
            settings,
            station.learn_validators,
            config.data_dir,
            station.announced,
            station.dht_node,
        )
        station.own_copy = validator.keeper.copy_of
        station.join()
        station.announce(dict)
        validator.start()
        with serving_metrics(station):
            yield station
        if _leaves_for_good(station):
            validator.leave()
        validator.stop()
        journal.close()
    finally:
        station.close()


@contextmanager
def running_worker(
    config: WorkerConfig,
    handler: JobHandler,
    num_slots: int = 1,
    offers: Callable[[], dict[str, int | str]] | None = None,
) -> Iterator[Station]:
    """A worker that runs jobs with `handler`, `num_slots` at once; it announces `offers` (None: the handler's) and how
    many slots are free. Raises ConfigError without a bootstrap validator, and what `Station.open` and `join` do.
    """
    config.need_bootstrap()  # before anything is put on chain
    config.data_dir.mkdir(parents=True, exist_ok=True)
    station = Station.open(config, "worker")
    try:
        journal = Journal(config.data_dir / JOURNAL)
        worker = WorkerNode(
            station.node,
            station.identity,
            handler,
            station.membership.tip_of,
            journal,
            num_slots,
            config.asks_wei,
            station.learn_validators,
        )
        worker.on_slots_changed = station.update_announcement
        station.node.on_peer_lost(lambda peer, reason: worker.release_jobs_of(peer, f"the author is gone: {reason}"))
        station.join()
        announced = offers or handler.offers
        asked = {ASKS: str(config.asks_wei)}
        station.announce(lambda: {**announced(), **asked, "free_slots": worker.num_free_slots})
        with serving_metrics(station):
            yield station
        worker.drain("the rig is stopping")
        journal.close()
    finally:
        station.close()


@contextmanager
def serving_metrics(station: Station) -> Iterator[None]:
    """Serves the node's metrics where the settings say so."""
    if not station.config.metrics:
        yield
        return
    from smartnodes_core.nodes.metrics import MetricsServer

    server = MetricsServer(station, station.config.metrics)
    try:
        yield
    finally:
        server.close()


def _leaves_for_good(station: Station) -> bool:
    """Whether this member has asked to exit; one that is only restarted goes on with its jobs."""
    try:
        member = station.chain.member(station.config.network_id, station.chain.account)
    except ChainError as error:
        logger.warning("whether this validator leaves for good is not known: %s", error)
        return False
    return member is not None and member.exit_at_s != 0


def _chain_secret(path: Path) -> bytes:
    """The secret at the far end of the hash chain, made at the first start and kept: its tip is on chain."""
    if not path.exists():
        write_key_file(path, {"secret": secrets.token_hex(32)})
    return bytes.fromhex(str(read_key_file(path)["secret"]))
