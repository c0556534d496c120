"""What was found of members, as a round carries it: verdicts and proofs, counted by account."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from smartnodes_core.audit_proofs import Proof
from smartnodes_core.records import Commitment, NodeKey, Signed, TwoVersions, Verdict
from smartnodes_core.reputation import VerdictCounts

Found = Verdict | Proof


def is_fraud(found: Found) -> bool:
    """Whether it costs a worker all of its reputation by itself."""
    return isinstance(found, TwoVersions) or (isinstance(found, Verdict) and found.finding == "fraudulent")


def tally(
    found: Iterable[Found], account_of: Callable[[NodeKey], bytes | None], strikes: Callable[[Verdict], int]
) -> dict[bytes, VerdictCounts]:
    """By account; `strikes` is asked for verdicts of silence. Members that nobody knows do not count."""
    counts: dict[bytes, VerdictCounts] = {}

    def add(member: NodeKey, kind: str, most: int = 0) -> None:
        account = account_of(member)
        if account is not None:
            before = counts.get(account, VerdictCounts())
            after = {kind: getattr(before, kind) + 1, "strikes": max(before.strikes, most)}
            counts[account] = replace(before, **after)

    for each in found:
        if isinstance(each, Verdict):
            add(each.worker, each.finding, strikes(each) if each.finding == "silent" else 0)
            add(each.auditor, "given")
        elif isinstance(each, TwoVersions):
            add(Commitment.decode(Signed.decode(each.first).record).worker, "fraudulent")
        else:
            add(each.absent, "withheld")
    return counts
