"""Job records kept by several validators, and findable by the job's id.

A validator keeps the records of the jobs in its books, and copies that others gave it. Of each it says so in the DHT,
again and again while it lives. When fewer than NUM_COPIES say so, the nearest of them to the job's id (one, not all of
them) gives copies to the validators that come next; a validator that leaves does that for all that it keeps. A copy
makes nobody an auditor of the job: whom the author's plan names does not change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from smartnodes_core.dht.contacts import job_id as place_of
from smartnodes_core.dht.contacts import node_id
from smartnodes_core.dht.node import DhtNode
from smartnodes_core.errors import AuthorityError, BusyError, JobError, SmartnodesError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.job_copies import MAX_COPY_BYTES, JobCopy, ask_for_copy
from smartnodes_core.nodes.params import digest_in
from smartnodes_core.nodes.placement import MAX_OPEN_PER_AUTHOR, JobDesk
from smartnodes_core.records import JobNotice, NodeKey, Role
from smartnodes_core.rpc import Result, allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

NUM_COPIES = 3
NOTICE_LIFETIME_S = 600
INTERVAL_S = NOTICE_LIFETIME_S / 3
#: A job that ended is kept so long for who asks what became of it; a copy of one of which no validator of its plan says
#: any more that it is open, so long.
KEEP_CLOSED_S, KEEP_UNHEARD_S = 3600, 24 * 3600
#: What could not be said is said again so soon.
RETRY_S = 15.0
CALL_TIMEOUT_S, SAY_TIMEOUT_S = 5.0, 10.0
#: A validator that leaves hands over for so long in all, and so long one job: it ends with the first that nobody takes.
LEAVE_TIMEOUT_S, HAND_OVER_TIMEOUT_S = 30.0, 3.0
STOP_TIMEOUT_S = 1.0
MAX_KEPT, MAX_KEPT_BYTES = 1024, 64 << 20


class JobKeeper:
    """A validator's copies. `dht` gives its place in the DHT (None: not yet joined), `validators` the live validators
    that it knows, `role_of` a member's role on chain.
    """

    def __init__(
        self,
        node: Node,
        identity: Identity,
        network_id: int,
        jobs: JobDesk,
        role_of: Callable[[NodeKey], Role | None],
        validators: Callable[[], Sequence[NodeKey]],
        dht: Callable[[], DhtNode | None],
        interval_s: float = INTERVAL_S,
    ):
        self._node, self._identity, self._network_id, self._jobs = node, identity, network_id, jobs
        self._role_of, self._validators, self._dht, self._interval_s = role_of, validators, dht, interval_s
        self._lock = threading.Lock()
        self._copies: dict[bytes, tuple[JobCopy, float]] = {}  # given by others, and when their jobs were heard of
        self._changed: set[bytes] = set()
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="job keeper", daemon=True)
        node.serve(self)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Hand everything over, and end."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)
            try:
                self.hand_over()
            except SmartnodesError as error:
                logger.info("some jobs' records are not handed over: %s", error)

    def changed(self, job_id: bytes) -> None:
        """A job in the books began, was planned anew, or ended: it is said soon."""
        with self._lock:
            self._changed.add(job_id)
        self._wake.set()

    # -- what is kept -------------------------------------------------------------------------------------------------

    def copy_of(self, job_id: bytes) -> JobCopy | None:
        """What this validator keeps of a job: from its books, or as it was given."""
        entry = self._jobs.snapshot(job_id)
        if entry is not None:
            history = tuple((int(at_s), event) for at_s, event in entry.history)
            return JobCopy(entry.job, entry.state, entry.closing, history)
        with self._lock:
            found = self._copies.get(job_id)
        return found[0] if found is not None else None

    def kept(self) -> list[bytes]:
        """Open jobs, and those that ended lately."""
        now_s = time.time()
        own = self._jobs.ids(now_s - KEEP_CLOSED_S)
        with self._lock:
            for job_id, (copy, heard_s) in list(self._copies.items()):
                if now_s - heard_s > (KEEP_CLOSED_S if copy.state == "closed" else KEEP_UNHEARD_S):
                    del self._copies[job_id]
            return own + [job_id for job_id in self._copies if job_id not in self._jobs.entries]

    @allow(roles=("validator",), max_body_bytes=MAX_COPY_BYTES)
    def rpc_keep_job(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """Another validator gives a copy, since there are too few."""
        copy = JobCopy.decode(params, body)
        if copy.job.record.network_id != self._network_id:
            raise JobError(f"the job is for network {copy.job.record.network_id}, here is {self._network_id}")
        if self._role_of(copy.job.record.author) != "user":
            raise AuthorityError("a job is a user's, and its author is none")
        self._keep(copy)
        self.changed(copy.job.id)
        return {}

    @allow(max_body_bytes=0)
    def rpc_job_copy(self, caller: Peer, params: dict[str, Any], body: memoryview) -> Result:
        """A job's record, for its author, those in its plan, and validators."""
        copy = self.copy_of(digest_in(params, "job"))
        if copy is None:
            raise JobError("a job of which nothing is kept here")
        plan = copy.job.plan
        workers = {item.worker for item in plan.assignments}
        if caller.role != "validator" and caller.node_key not in {copy.job.record.author, *workers}:
            raise AuthorityError("a job's record is shown to its author, its workers, and validators")
        return copy.encode()

    def _keep(self, copy: JobCopy) -> None:
        """Raises BusyError when this validator, or the job's author, has as many copies here as are kept."""
        job_id, author = copy.job.id, copy.job.record.author
        with self._lock:
            known = self._copies.get(job_id)
            if job_id in self._jobs.entries or (known is not None and not copy.is_newer_than(known[0])):
                return
            others = [each for other, (each, _) in self._copies.items() if other != job_id]
            num_of_author = sum(each.job.record.author == author for each in others)
            num_bytes = sum(each.num_bytes for each in others) + copy.num_bytes
            if len(others) >= MAX_KEPT or num_of_author >= MAX_OPEN_PER_AUTHOR or num_bytes > MAX_KEPT_BYTES:
                raise BusyError(
                    f"{len(others)} copies of jobs are kept here, {num_of_author} of this author's: no more"
                )
            self._copies[job_id] = (copy, time.time())

    # -- saying so, and seeing to it that there are enough ------------------------------------------------------------

    def _run(self) -> None:
        next_s = 0.0
        while not self._stopped:
            with self._lock:
                fresh, self._changed = self._changed, set()
            due = set(fresh)
            if time.monotonic() >= next_s:
                due, next_s = due | set(self.kept()), time.monotonic() + self._interval_s
            for job_id in due:
                try:
                    self.look_after(job_id, is_fresh=job_id in fresh)
                except SmartnodesError as error:
                    logger.info("job %s is looked after later: %s", job_id.hex()[:8], error)
                    next_s = min(next_s, time.monotonic() + RETRY_S)
                except Exception:
                    logger.exception("keeping job %s", job_id.hex()[:8])
                if self._stopped:
                    return
            self._wake.wait(max(0.0, next_s - time.monotonic()))
            self._wake.clear()

    def look_after(self, job_id: bytes, *, is_fresh: bool = False) -> None:
        """Say that this validator keeps a job, and give copies to others where too few do. Of a fresh one the plan's
        validators have not said so yet. Raises Unavailable.
        """
        dht, copy = self._dht(), self.copy_of(job_id)
        if dht is None or copy is None:
            return
        self._say(dht, copy)
        notices = self._live(dht.find_job(job_id))
        if job_id not in self._jobs.entries:
            self._renew(copy, notices)
        keepers = {each.keeper for each in notices} | {self._node.node_key}
        if is_fresh:
            keepers |= set(copy.job.plan.validators)
        if min(keepers, key=_distance_from(job_id)) == self._node.node_key:
            self._give(copy, keepers, time.monotonic() + self._interval_s)

    def hand_over(self, timeout_s: float = LEAVE_TIMEOUT_S) -> int:
        """Have others keep what only this validator and too few others do; how many copies were given. Raises
        Unavailable when nobody is reached any more.
        """
        dht, end_s = self._dht(), time.monotonic() + timeout_s
        num_given = 0
        for job_id in self.kept() if dht is not None else []:
            copy, deadline_s = self.copy_of(job_id), min(end_s, time.monotonic() + HAND_OVER_TIMEOUT_S)
            if copy is None or dht is None or time.monotonic() >= end_s:
                break
            notices = self._live(dht.find_job(job_id, deadline_s - time.monotonic()))
            num_given += self._give(copy, {each.keeper for each in notices} - {self._node.node_key}, deadline_s)
            self._say(dht, copy, is_gone=True, timeout_s=max(0.0, deadline_s - time.monotonic()))
        return num_given

    def _say(self, dht: DhtNode, copy: JobCopy, *, is_gone: bool = False, timeout_s: float = SAY_TIMEOUT_S) -> None:
        notice = JobNotice(
            job=copy.job.id,
            keeper=self._node.node_key,
            network_id=self._network_id,
            plan_version=copy.job.plan.version,
            state="gone" if is_gone else "closed" if copy.state == "closed" else "open",
            sequence=int(time.time() * 1000),
            expires_at_s=int(time.time()) + NOTICE_LIFETIME_S,
        )
        dht.put(self._identity.sign(notice), timeout_s)

    def _live(self, notices: Sequence[JobNotice]) -> list[JobNotice]:
        """Those of validators that are there and that the chain knows as such."""
        return [each for each in notices if each.state != "gone" and self._role_of(each.keeper) == "validator"]

    def _renew(self, copy: JobCopy, notices: Sequence[JobNotice]) -> None:
        """A copy does not hear of what happens to its job: those that have newer news are asked."""
        if any(notice.state == "open" and notice.keeper in copy.job.plan.validators for notice in notices):
            with self._lock:
                self._copies[copy.job.id] = (copy, time.time())
        for notice in notices:
            is_news = notice.plan_version > copy.job.plan.version or (notice.state, copy.state) == ("closed", "open")
            if is_news and notice.keeper != self._node.node_key:
                newer = ask_for_copy(self._node, notice.keeper, copy.job.id)
                self._keep(newer)
                return

    def _give(self, copy: JobCopy, keepers: set[NodeKey], deadline_s: float) -> int:
        """Give copies to the validators nearest to the job until NUM_COPIES keep it; how many were given."""
        params, body = copy.encode()
        num_given = 0
        others = sorted(set(self._validators()) - keepers - {self._node.node_key}, key=_distance_from(copy.job.id))
        for validator in others:
            left_s = deadline_s - time.monotonic()
            if len(keepers) + num_given >= NUM_COPIES or left_s <= 0:
                break
            try:
                self._node.call(validator, "keep_job", params, body, timeout_s=min(CALL_TIMEOUT_S, left_s))
                num_given += 1
            except SmartnodesError as error:
                logger.info("validator %s takes no copy of a job: %s", validator.hex()[:8], error)
        return num_given


def _distance_from(job: bytes) -> Callable[[NodeKey], int]:
    place = place_of(job)
    return lambda node_key: node_id(node_key) ^ place
