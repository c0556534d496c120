"""Proofs that a validator signed two proposals for one place: kept, passed on, brought before the contract.

A proof is on disk before anybody is told, and stays there until the chain has taken it, from this validator or from
another. The contract takes the signer out of the epoch at once; its stake is burned with the next round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smartnodes_core.chain.base import Chain, NoFundsError, RefusedError
from smartnodes_core.chain.proposal import Equivocation
from smartnodes_core.errors import ChainError, LocalError, SmartnodesError
from smartnodes_core.journal import write_durably
from smartnodes_core.nodes.base import Node
from smartnodes_core.nodes.mailing import Mailer
from smartnodes_core.nodes.params import bytes_in
from smartnodes_core.records import NodeKey
from smartnodes_core.rpc import allow
from smartnodes_core.transport.base import Peer

logger = logging.getLogger(__name__)

#: What the contract says of a signer that needs no more proof.
SETTLED = ("Convicted", "NotAValidator", "NotRegistered")
MAX_PROOF_BYTES = 512


class EquivocationDesk:
    """`folder` keeps the proofs (None: in memory only, for tests), `others` are the validators that are told,
    `step_s` how long each waits for those before it (by account) to submit, so that not all pay for it.
    """

    def __init__(
        self,
        node: Node,
        chain: Chain,
        network_id: int,
        account: bytes,
        folder: Path | None,
        others: Callable[[], list[NodeKey]],
        step_s: float,
    ):
        self._node, self._chain, self._network_id, self._account = node, chain, network_id, account
        self._folder, self._others, self._step_s = folder, others, step_s
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[Equivocation, float]] = {}
        self._done: set[bytes] = set()
        self._mailer = Mailer(node, "proofs")
        if folder is not None:
            self._read(folder)
        node.serve(self)

    def stop(self) -> None:
        self._mailer.stop()

    @property
    def accused(self) -> set[bytes]:
        """Accounts that are proven to have signed twice, whether the chain knows or not."""
        with self._lock:
            return self._done | self._open.keys()

    @property
    def is_waiting(self) -> bool:
        """Whether the chain has not taken a proof yet."""
        with self._lock:
            return bool(self._open)

    def report(self, proof: Equivocation) -> None:
        """Keep a proof and tell the others; once for each account. Raises RecordError or SignatureError for what proves
        nothing, LocalError where it cannot be written.
        """
        account = self._chain.domain.equivocator(proof)
        if proof.place.network_id != self._network_id:
            return
        with self._lock:
            if account in self._open or account in self._done:
                return
            if self._folder is not None:
                write_durably(self._path(self._folder, account), proof.encode())
            self._open[account] = (proof, time.monotonic())
        logger.warning("0x%s signed two proposals for round %d: a proof is kept", account.hex(), proof.place.round)
        self._mailer.post(self._others(), "equivocation", {"proof": proof.encode()})

    @allow(roles=("validator",), max_body_bytes=0)
    def rpc_equivocation(self, caller: Peer, params: dict[str, Any], body: memoryview) -> None:
        """Another validator found somebody who signed twice."""
        proof = Equivocation.decode(bytes_in(params, "proof", MAX_PROOF_BYTES))
        account = self._chain.domain.equivocator(proof)
        if self._chain.member(self._network_id, account) is not None:
            self.report(proof)

    def submit(self, validators: list[bytes]) -> None:
        """Bring what is open before the contract; `validators` are those of the epoch. Raises ChainError when the chain
        is away; what it refuses, or what cannot be paid for, is told and tried again.
        """
        with self._lock:
            waiting = dict(self._open)
        for account, (proof, since_s) in waiting.items():
            place = sorted(validators).index(self._account) if self._account in validators else len(validators)
            if account in validators and time.monotonic() - since_s < place * self._step_s:
                continue
            try:
                self._chain.prove_equivocation(proof)
                logger.warning("0x%s was taken out of the epoch: it signed twice", account.hex())
            except NoFundsError as error:
                logger.error("the proof against 0x%s waits: %s", account.hex(), error)
                continue
            except RefusedError as error:
                if error.reason not in SETTLED:
                    logger.error("the proof against 0x%s: %s", account.hex(), error)
                    continue
            self._settle(account)

    def _settle(self, account: bytes) -> None:
        with self._lock:
            self._open.pop(account, None)
            self._done.add(account)
            if self._folder is not None:
                self._path(self._folder, account).unlink(missing_ok=True)

    def _read(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("*.proof"):
                proof = Equivocation.decode(path.read_bytes()[:MAX_PROOF_BYTES])
                self._open[self._chain.domain.equivocator(proof)] = (proof, time.monotonic())
        except OSError as error:
            raise LocalError(f"the proofs in {folder} cannot be read: {error.strerror}") from None
        except ChainError:
            raise
        except SmartnodesError as error:
            raise LocalError(f"{path} is not a proof of two signatures ({error}): remove it") from None

    def _path(self, folder: Path, account: bytes) -> Path:
        return folder / f"{account.hex()}.proof"
