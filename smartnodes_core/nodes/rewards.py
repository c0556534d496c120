"""Rewards as a member sees them: fetched from any validator, checked against the chain, claimed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from smartnodes_core.chain.base import Chain
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.errors import RecordError, SmartnodesError, Unavailable
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.polling import ask_all
from smartnodes_core.records import NO_DIGEST, NodeKey

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 20.0
#: A table may be large, and a validator may hang.
ASKED_AT_ONCE = 4


def reward_root(chain: Chain, network_id: int, totals_wei: dict[bytes, int]) -> bytes:
    """The Merkle root over cumulative rewards; zero where nobody has any."""
    return reward_tree(chain, network_id, totals_wei).root if totals_wei else NO_DIGEST


def reward_tree(chain: Chain, network_id: int, totals_wei: dict[bytes, int]) -> RewardTree:
    """The tree behind a root on chain, which gives proofs for claims."""
    return RewardTree(chain.domain.chain_id, chain.domain.contract, network_id, totals_wei)


def fetch_reward_totals(
    node: Node, chain: Chain, network_id: int, validators: Sequence[NodeKey], root: bytes
) -> dict[bytes, int]:
    """Cumulative rewards in wei by account under `root`, from the first validator whose answer leads to it.

    Raises Unavailable when none does: `root` is too old, or those that know it do not answer.
    """
    if not any(root):
        return {}

    def ask(validator: NodeKey) -> dict[bytes, int] | None:
        try:
            reply = node.call(validator, "reward_totals", {"root": root}, timeout_s=CALL_TIMEOUT_S)
            totals = decode_totals(reply.body)
            if reward_root(chain, network_id, totals) == root:
                return totals
            logger.warning("the reward totals of %s do not lead to the root on chain", validator.hex()[:8])
        except SmartnodesError as error:
            logger.info("no reward totals of %s: %s", validator.hex()[:8], error)
        except Exception:
            logger.exception("reward totals of %s", validator.hex()[:8])
        return None

    for at in range(0, len(validators), ASKED_AT_ONCE):
        group = validators[at : at + ASKED_AT_ONCE]
        answers = ask_all(group, ask, lambda found: any(found.values()), CALL_TIMEOUT_S, 0.0)
        for totals in answers.values():
            if totals is not None:
                return totals
    raise Unavailable(f"none of {len(validators)} validators knows the rewards under root {root.hex()[:16]}: try later")


def claim(node: Node, chain: Chain, network_id: int, validators: Sequence[NodeKey], account: bytes) -> int:
    """Claim what `account` has earned under the newest root that may be claimed; returns the wei paid (0: nothing new).

    Anyone may do this for anyone: it is always the owner who is paid. Raises Unavailable or ChainError.
    """
    state = chain.round_state(network_id)
    totals = fetch_reward_totals(node, chain, network_id, validators, state.final_root)
    if account not in totals or not chain.claimable_wei(network_id, account, totals[account]):
        return 0
    proof = reward_tree(chain, network_id, totals).proof(account)
    return chain.claim(network_id, state.final_root_round, account, totals[account], proof)


def decode_totals(body: memoryview | bytes) -> dict[bytes, int]:
    """What `rpc_reward_totals` answers. Raises RecordError."""
    try:
        table = msgspec.msgpack.decode(body, type=dict[str, str])
        totals = {bytes.fromhex(account): int(wei) for account, wei in table.items()}
    except (msgspec.DecodeError, ValueError) as error:
        raise RecordError(f"not a table of reward totals: {error}") from None
    if not all(len(account) == 20 and 0 <= wei < 1 << 256 for account, wei in totals.items()):
        raise RecordError("a table of reward totals has accounts of 20 bytes and amounts of 256 bits")
    return totals
