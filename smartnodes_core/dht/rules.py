"""Which records are kept for others, under which id, and who may write them: the same for directory and DHT.

An announcement belongs to the node that it speaks of, and lies where that node sits. Who keeps a job's record is said
by each keeper for itself, under the job's id.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from smartnodes_core.dht.contacts import job_id, node_id
from smartnodes_core.errors import RecordError, SignatureError
from smartnodes_core.identity import verify
from smartnodes_core.records import Announcement, JobNotice, NodeKey, Role, Signed

MAX_LIFETIME_S = 3600
MAX_RECORD_BYTES = 16 << 10
CLOCKS_DIFFER_S = 60

Kept = Announcement | JobNotice

_either = msgspec.msgpack.Decoder(Kept)


@dataclass(frozen=True)
class Entry:
    """A signed record with what it takes to keep it: under which id, whose it is, and what its owner has to be."""

    key: int
    owner: NodeKey
    role: Role
    record: Kept
    signed: Signed

    @property
    def num_bytes(self) -> int:
        return len(self.signed.record)


def entry_of(signed: Signed, network_id: int, now_s: float) -> Entry:
    """What a signed record is, its signature not yet checked: `check_signature` does that, and costs 20 times as much.

    Raises RecordError when it is of no kind that is kept, for another network, over its size, expired, or lives longer
    than MAX_LIFETIME_S; SignatureError when another than its owner signed it.
    """
    if len(signed.record) > MAX_RECORD_BYTES:
        raise RecordError(f"a record of {len(signed.record)} bytes: at most {MAX_RECORD_BYTES} are kept")
    try:
        kind = type(_either.decode(signed.record))
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise RecordError(f"neither an announcement nor a job's notice: {error}") from None
    record = kind.decode(signed.record)
    if isinstance(record, Announcement):
        entry = Entry(node_id(record.node_key), record.node_key, record.role, record, signed)
    else:
        entry = Entry(job_id(record.job), record.keeper, "validator", record, signed)
    what = kind.__name__
    if entry.owner != signed.signer:
        raise SignatureError(f"node {signed.signer.hex()[:16]} signed the {what} of another, {entry.owner.hex()[:16]}")
    if record.network_id != network_id:
        raise RecordError(f"{what} for network {record.network_id}, here is {network_id}")
    left_s = record.expires_at_s - now_s
    if left_s <= 0:
        raise RecordError(f"{what} that expired {-left_s:.0f} s ago: check the clocks")
    if left_s > MAX_LIFETIME_S + CLOCKS_DIFFER_S:
        raise RecordError(f"{what} for {left_s:.0f} s: at most {MAX_LIFETIME_S} s are kept, then send it again")
    return entry


def check_signature(entry: Entry) -> None:
    """Raises SignatureError unless its owner signed it."""
    verify(entry.signed, type(entry.record))
