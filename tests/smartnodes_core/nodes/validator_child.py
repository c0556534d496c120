"""One validator as a process, over TLS and a real chain: `validator_child.py CONFIG.json`.

It audits nothing (there are no jobs). `conduct` in the settings says how it behaves in rounds: honest, silent (answers
nobody), lazy (signs whatever it is shown, once for each place) or greedy (proposes all of the emission for itself in
every view, whoever's turn it is, and signs the others' proposals too).
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from smartnodes_core.audit import HashChain
from smartnodes_core.ballots import Motion
from smartnodes_core.chain.merkle import RewardTree
from smartnodes_core.chain.signing import sign_digest
from smartnodes_core.config import ValidatorConfig
from smartnodes_core.errors import SmartnodesError
from smartnodes_core.journal import Journal
from smartnodes_core.nodes import collecting
from smartnodes_core.nodes.round_books import Candidate
from smartnodes_core.nodes.station import Station
from smartnodes_core.nodes.validator import ValidatorNode, ValidatorSettings
from smartnodes_core.nodes.voting import VoteDesk, proposed_in
from smartnodes_core.rounds import RoundProposal, in_view


class NoAuditor:
    def examine(self, case: Any, body: memoryview) -> tuple[Any, str]:
        raise AssertionError("no jobs, no audits")


class CarelessSigner:
    """Signs everything, as often as it is asked."""

    def __init__(self, key: bytes):
        self._key = key

    def sign(self, content: RoundProposal, digest: bytes) -> bytes:
        return sign_digest(self._key, digest)


def be_silent(validator: ValidatorNode) -> None:
    never = threading.Event()
    VoteDesk._vote = lambda *args: never.wait() or (b"", [])  # type: ignore[assignment,method-assign]
    validator.rounds.start = lambda: None  # type: ignore[method-assign]


def be_lazy(validator: ValidatorNode) -> None:
    votes = validator.rounds._votes
    check = votes._check

    def agree(state: Any, motion: Motion, view: int, *rest: Any) -> Any:
        candidate, _ = check(state, motion, view, *rest)
        return (candidate or _blindly(motion, view)), []

    votes._check = agree  # type: ignore[method-assign]


def _blindly(motion: Motion, view: int) -> Any:
    content = in_view(motion.content, view)
    return Candidate(proposed_in(motion.proposal, content), content, {}, {})


def be_greedy(validator: ValidatorNode, key: bytes) -> None:
    collecting.VOTE_TIMEOUT_S = 1.0  # it has no time to lose
    rounds = validator.rounds
    rounds._votes._signer = CarelessSigner(key)  # type: ignore[assignment]
    rounds._signer = CarelessSigner(key)  # type: ignore[assignment]
    take_turn = rounds._take_turn

    def take_two(state: Any, view: Any, order: list[bytes], box: Any) -> None:
        try:
            _grab(rounds, state, view.number, order, box)
        except SmartnodesError as error:
            sys.stderr.write(f"greedy: {error}\n")
        take_turn(state, view, order, box)

    rounds._take_turn = take_two  # type: ignore[method-assign]


def _grab(rounds: Any, state: Any, view: int, order: list[bytes], box: Any) -> None:
    """All that may be emitted goes to this validator, under a root that says so."""
    candidate = rounds._propose(state, view, len(order))
    context = rounds.books.context(state, view, candidate.content.until_s, len(order))
    totals = {rounds._account: context.emission_wei, **context.totals_wei}
    root = RewardTree(context.domain.chain_id, context.domain.contract, context.network_id, totals).root
    content = replace(candidate.content, allotment_wei=context.emission_wei, rewards_root=root)
    with rounds.ballots.lock:
        motion = box.add_motion(proposed_in(candidate.proposal, content), content)
    signature = rounds._signer.sign(content, context.domain.digest(content))
    rounds.ballots.cast(box, motion, view, signature)
    signatures = rounds._collector.collect(motion, view, order, box, len(order))
    if len(signatures) >= 2 * len(order) // 3 + 1:
        rounds._execute(box, motion, content, signatures)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(settings[name]) for name in ("identity", "account", "addresses", "data_dir")}
    config = ValidatorConfig(
        **paths,
        rpc_url=settings["rpc_url"],
        bootstrap=settings["bootstrap"],
        endpoint=settings["endpoint"],
        chain_poll_interval_s=1.0,
    )
    hash_chain = HashChain(bytes.fromhex(settings["secret"]), length=64)
    station = Station.open(config, "validator", hash_chain.tip)
    validator = ValidatorNode(
        station.node,
        station.identity,
        station.account_key,
        station.membership,
        NoAuditor(),
        hash_chain,
        Journal(config.data_dir / "signed.journal"),
        ValidatorSettings(poll_s=0.25, proposer_timeout_s=settings["proposer_timeout_s"]),
        station.learn_validators,
        config.data_dir,
        dht=station.dht_node,
    )
    if settings["conduct"] == "silent":
        be_silent(validator)
    if settings["conduct"] == "lazy":
        be_lazy(validator)
    if settings["conduct"] == "greedy":
        be_greedy(validator, station.account_key)
    station.join()
    station.announce(dict)
    validator.start()
    sys.stdout.write(json.dumps({"endpoint": station.node.endpoint}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # ends with its parent


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    main()
