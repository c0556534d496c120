"""The network as a user's script sees it: `connect` to one that runs, or start a whole one on this machine with
`LocalNetwork`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from smartnodes_core.chain.base import Chain
from smartnodes_core.config import UserConfig, load
from smartnodes_core.errors import NoWorkersError, PeerUnreachableError, SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.evidence import is_confirmed
from smartnodes_core.nodes.paying import Offer
from smartnodes_core.nodes.running import serving_metrics
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.user import UserNode
from smartnodes_core.payments import asked_wei, pays
from smartnodes_core.records import Announcement, AuditTerms, NodeKey, Verdict
from tensorlink.local import LocalProcesses, LocalSettings
from tensorlink.sharding.rigs import free_slots
from tensorlink.validator import ReplayAuditor

logger = logging.getLogger(__name__)

#: The default audit terms of a job: probabilities per micro-batch and per step, and how far back a fraud can be found.
DEFAULT_AUDIT_TERMS = AuditTerms(unit_rate_ppm=2_000, step_rate_ppm=20_000, window_steps=16, window_s=3600, auditors=[])
POLL_S = 0.2
#: How long a worker may take to see on chain that we have registered.
ADMIT_TIMEOUT_S = 5.0


class Network:
    """A user's place in a network. Ends its connections (and its open jobs) when closed; a context manager."""

    #: So often a job's workers are asked whether they are alive.
    heartbeat_s = 1.0

    def __init__(self, station: Station, audit_terms: AuditTerms = DEFAULT_AUDIT_TERMS):
        self.station = station
        self.user = UserNode(station.node, station.identity)
        self.audit_terms = audit_terms
        #: Workers of less reputation get no stage.
        self.least_reputation = station.config.least_reputation if isinstance(station.config, UserConfig) else 1
        #: What jobs opened from now on pay; None: nothing.
        self.offer: Offer | None = None
        self._placements: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False
        self._auditor: ReplayAuditor | None = None
        self._judging = threading.Lock()
        self._serving = contextlib.ExitStack()
        self._serving.enter_context(serving_metrics(station))

    @property
    def identity(self) -> Identity:
        return self.station.identity

    @property
    def network_id(self) -> int:
        return self.station.config.network_id

    @property
    def chain(self) -> Chain:
        return self.station.chain

    def find_workers(self, wanted: int, timeout_s: float) -> list[Announcement]:
        """Workers that have announced themselves and are good on chain; waits until `wanted` of them have a free slot.

        Returns what there is after `timeout_s` if that is any at all. Raises NoWorkersError where there is none.
        """
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            found = self.announced_workers()
            free = [worker for worker in found if free_slots(worker) > 0]
            if len(free) >= wanted:
                return free
            if time.monotonic() >= deadline:
                break
            pause.wait(POLL_S)
        if not free:
            raise NoWorkersError(
                f"found no free worker ({len(found)} announced, of reputation {self.least_reputation} or more, working "
                f"for what the job pays), needed {wanted}: start rigs with tensorlink-worker, or wait until a job ends"
            )
        return free

    def announced_workers(self) -> list[Announcement]:
        """Workers that have announced themselves, are good on chain and work for what jobs pay, with a free slot or
        without; those of best reputation first."""
        terms = self.offer.terms() if self.offer is not None else {}
        found = [(self.reputation_of(each.node_key) or 0, each) for each in self.station.find("worker")]
        suited = [
            (reputation, each)
            for reputation, each in found
            if reputation >= self.least_reputation and pays(terms, asked_wei(each.offers))
        ]
        return [each for _, each in sorted(suited, key=lambda pair: (-pair[0], pair[1].node_key))]

    def drop(self, node_key: NodeKey, reason: str) -> None:
        """End the connection to a peer: every call to it ends with that."""
        self.station.node.drop(node_key, reason)

    def is_fraud(self, verdict: Verdict) -> bool:
        """Whether a verdict of fraud is one: its evidence is fetched and executed again here, in a process of its own.
        Raises SmartnodesError where that cannot be done."""
        with self._judging:
            if self._auditor is None:
                self._auditor = ReplayAuditor()
                self._serving.callback(self._auditor.stop)
            return is_confirmed(self.station.node, self._auditor, verdict)

    def reaches(self, worker: Announcement) -> bool:
        """Whether a worker answers now, at one of the endpoints that it announced; the connection stays open.

        One that answers and does not admit us may not have seen our registration on chain yet: it is asked again.
        """
        for endpoint in worker.endpoints:
            self.station.node.add_address(worker.node_key, endpoint)
        deadline = time.monotonic() + ADMIT_TIMEOUT_S
        pause = threading.Event()
        while True:
            try:
                self.station.node.reach(worker.node_key)
                return True
            except SmartnodesError as error:
                if isinstance(error, PeerUnreachableError) or time.monotonic() >= deadline:
                    logger.info("a worker is announced and cannot be reached: %s", error)
                    return False
            pause.wait(POLL_S)

    def validators(self) -> list[NodeKey]:
        """The node keys of all live validators."""
        return sorted(announcement.node_key for announcement in self.station.find("validator"))

    def reputation_of(self, node_key: NodeKey) -> int | None:
        """A member's reputation on chain, 0 to 255 (0: blacklisted), None where it is not registered."""
        return self.station.membership.reputation_of(node_key)

    def opened(self, placement: Any) -> None:
        """A job was opened through this network: it is closed with it."""
        self._placements.add(placement)

    def close(self) -> None:
        """Close open jobs and every connection. Idempotent."""
        if not self._closed:
            self._closed = True
            try:
                for placement in list(self._placements):
                    placement.close()
            finally:
                self._serving.close()
                self.station.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def connect(config: str | os.PathLike[str] | UserConfig) -> Network:
    """Join a running network as a user, with the settings in a TOML file (see `tensorlink keys` and `tensorlink
    deploy`).

    Raises ConfigError, IdentityError, ChainError, PeerUnreachableError or AuthorityError, each with the remedy.
    """
    settings = config if isinstance(config, UserConfig) else load(UserConfig, config)
    station = Station.open(settings, "user")
    try:
        station.join()
        return Network(station)
    except BaseException:
        station.close()
        raise


class LocalNetwork(Network):
    """A whole network of real processes on this machine: a chain, validators, workers; the caller is its user.

    Rounds and audits are quick, so that something is seen of them. Everything ends with the context or the calling
    process, however that ends. Raises SmartnodesError with what a process said if it does not come up.
    """

    def __init__(self, workers: int = 2, validators: int = 1, **settings: Any):
        self.settings = LocalSettings(workers=workers, validators=validators, **settings)
        self.local = LocalProcesses(self.settings)
        try:
            self.local.start()
            station = Station.open(self.local.user_config(), "user")
            try:
                station.join()
            except BaseException:
                station.close()
                raise
        except BaseException:
            self.local.stop()
            raise
        unit_rate, step_rate = self.settings.audit_rates
        terms = AuditTerms(
            unit_rate_ppm=round(unit_rate * 1e6),
            step_rate_ppm=round(step_rate * 1e6),
            window_steps=self.settings.audit_window_steps,
            window_s=DEFAULT_AUDIT_TERMS.window_s,
            auditors=[],
        )
        super().__init__(station, terms)

    @property
    def log_dir(self) -> Path:
        """Where the processes' logs are, until the network is closed."""
        return self.local.folder

    def processes(self) -> list[dict[str, Any]]:
        """Name, process id and resident memory of every process, this one included."""
        return self.local.processes()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.local.stop()

    def __enter__(self) -> LocalNetwork:
        return self

    def __str__(self) -> str:
        s = self.settings
        rounds = f"a round every {s.round_interval_s} s"
        return f"{s.validators} validators, {s.workers} workers, {rounds} on {self.local.chain_url}"
