"""What the demo's workers have to show at the end: audits and work as the user heard of them, the rest as on chain."""

from __future__ import annotations

import threading
import time
from typing import Any

from smartnodes_core.chain.settings import SNO
from smartnodes_core.errors import Unavailable
from smartnodes_core.nodes.rewards import claim, fetch_reward_totals
from smartnodes_core.records import Verdict
from tensorlink.model import DistributedModel
from tensorlink.network import LocalNetwork

SETTLE_TIMEOUT_S = 60.0
POLL_S = 0.5


def settle(network: LocalNetwork) -> None:
    """Wait until the job's last work is paid under a root that can be claimed (the job is closed), at most a minute."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    chain, pause = network.chain, threading.Event()
    closing = chain.round_state(network.network_id).number
    while time.monotonic() < deadline:
        state = chain.round_state(network.network_id)
        # the round after the next has seen everything of the closed job
        if state.final_root_round >= closing + 2:
            return
        pause.wait(POLL_S)


def worker_table(network: LocalNetwork, model: DistributedModel, verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """One row per worker, the spare included; claims what each has earned."""
    chain, network_id = network.chain, network.network_id
    validators = network.validators()
    totals = fetch_reward_totals(
        network.station.node, chain, network_id, validators, chain.round_state(network_id).latest_root
    )
    stages = model.report()["stages"]
    rows = []
    for announcement in network.station.find("worker"):
        key = announcement.node_key
        member = network.station.membership.of(key)
        if member is None:
            continue
        try:
            paid_wei = claim(network.station.node, chain, network_id, validators, member.account)
        except Unavailable:
            paid_wei = 0
        own = [verdict for verdict in verdicts if verdict.worker == key]
        held = [stage for stage in stages if stage["worker"] == key.hex()]
        rows.append(
            {
                "worker": key.hex(),
                "account": "0x" + member.account.hex(),
                "stages": [stage["stage"] for stage in held],
                "work_units": sum(stage["work_units"] for stage in held),
                "audits_passed": sum(verdict.finding == "honest" for verdict in own),
                "audits_failed": sum(verdict.finding == "fraudulent" for verdict in own),
                "audits_inconclusive": sum(verdict.finding in ("inconclusive", "silent") for verdict in own),
                "reputation": member.reputation,
                "sno_earned": totals.get(member.account, 0) / SNO,
                "sno_claimed": paid_wei / SNO,
            }
        )
    return sorted(rows, key=lambda row: (not row["stages"], row["stages"]))
