"""`tensorlink status --job`: a job's record as its keepers show it, found by the job's id."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import requests

from smartnodes_core.chain import client
from smartnodes_core.chain.account import load_account_key
from smartnodes_core.chain.settings import Addresses
from smartnodes_core.chain.signing import checksum
from smartnodes_core.config import UserConfig
from smartnodes_core.errors import ConfigError, JobError, PeerUnreachableError, ProtocolError
from smartnodes_core.jobs import job_named
from smartnodes_core.nodes.metrics import JOBS
from smartnodes_core.nodes.station import Station
from tensorlink.cli.options import printable

#: A look-up through the DHT, and the keepers that it names.
TIMEOUT_S = 60


def from_node(where: str, name: str) -> dict[str, Any]:
    """What a running node finds, whose metrics are at `where`. Raises ConfigError, JobError, PeerUnreachableError."""
    address = where if ":" in where else f"127.0.0.1:{where}"
    try:
        answer = requests.get(f"http://{address}{JOBS}{job_named(name).hex()}", timeout=TIMEOUT_S)
        found = answer.json()
    except requests.JSONDecodeError:
        raise ProtocolError(f"what {address} serves is no node's metrics") from None
    except requests.RequestException:
        raise PeerUnreachableError(f"no node tells its metrics at {address}: start it with --metrics {where}") from None
    if answer.status_code != 200:
        raise JobError(printable(str(found.get("error"))))
    return dict(found)


def as_author(config: UserConfig, name: str) -> dict[str, Any]:
    """What the author of a job finds, whose settings these are, while no program of its runs. Raises ConfigError,
    JobError, and what `Station.open` and `join` do.
    """
    job_id, key = job_named(name), load_account_key(config.account, config.passphrase())
    chain = client.ChainClient(config.rpc_url, Addresses.read(config.addresses), key)
    member = chain.member(config.network_id, chain.account)
    if member is None or member.role != "user":
        found = f"is a {member.role}" if member is not None else "is not registered"
        raise ConfigError(
            f"{checksum(chain.account)} {found} in network {config.network_id}: a job is shown to its author, its "
            "workers and validators; give the author's settings, or ask a worker's or validator's node with --node"
        )
    station = Station.open(config, "user")
    try:
        station.join()
        return station.find_job(job_id).summary()
    finally:
        station.close()


def rows(job: dict[str, Any]) -> Iterator[str]:
    """One line after the other."""
    yield f"job {job['job']}, {job['job_type']}"
    yield f"author {job['author']}, signed {_when(job['created_at_s'])}"
    yield f"{job['state']}, plan {job['plan_version']}"
    yield f"{'replica':>7}  {'stage':>5}  {'worker':64}  endpoint"
    for each in job["stages"]:
        yield f"{each['replica']:7d}  {each['stage']:5d}  {each['worker']}  {each['endpoint']}"
    yield from (f"validator {validator}" for validator in job["validators"])
    yield from (f"{_when(each['at_s'])}  {each['event']}" for each in job["history"])


def _when(at_s: int) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(at_s, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):  # a keeper says what it likes
        return f"at {at_s} s"
