"""py-evm reduced to what a chain of one-transaction blocks needs: a state, and functions that run one message on it.

Not py-evm's `Chain`: its blocks demand a new second each, its gas search runs a call dozens of times. Foreign
exceptions are translated here: `RejectedTransaction` leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eth.constants import BLANK_ROOT_HASH, CREATE_CONTRACT_ADDRESS
from eth.db.atomic import AtomicDB
from eth.exceptions import InsufficientFunds, Revert
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.berlin.transactions import calculate_txn_intrinsic_gas_berlin
from eth.vm.forks.cancun import CancunVM
from eth.vm.forks.cancun.state import CancunState
from eth_typing import Address, Hash32
from eth_utils.exceptions import ValidationError

from smartnodes_core.chain.devnet import CHAIN_ID
from smartnodes_core.chain.devnet.nodes import NodeStore

BLOCK_GAS_LIMIT = 30_000_000
BASE_FEE_WEI = 10**9
_NOBODY = bytes(20)


class RejectedTransaction(Exception):
    """The transaction cannot be in any block: malformed, wrong nonce, no funds."""


@dataclass(frozen=True)
class Log:
    address: bytes
    topics: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """What running one message gave. `revert_data` is None unless the code failed; `output` is empty then."""

    gas_used: int
    output: bytes
    revert_data: bytes | None
    error: str
    contract: bytes | None
    logs: tuple[Log, ...]

    @property
    def ok(self) -> bool:
        return self.revert_data is None


@dataclass(frozen=True)
class Call:
    """A message without signature or nonce, as `eth_call` and `eth_estimateGas` take it; gas costs nothing."""

    sender: bytes
    to: bytes
    data: bytes
    value: int = 0
    gas: int = BLOCK_GAS_LIMIT
    nonce: int = 0
    access_list: tuple[Any, ...] = ()
    gas_price: int = 0
    max_fee_per_gas: int = 0
    max_priority_fee_per_gas: int = 0
    type_id: int = 2
    r: int = 0
    s: int = 0
    y_parity: int = 0

    @property
    def intrinsic_gas(self) -> int:
        return int(calculate_txn_intrinsic_gas_berlin(self))  # type: ignore[arg-type]


class Evm:
    """The state after all transactions so far: begun with `funds_wei`, or found under `state_root` in `nodes`.
    Not thread-safe: `Ledger` holds the lock.
    """

    def __init__(self, funds_wei: Mapping[bytes, int], nodes: NodeStore | None = None, state_root: bytes | None = None):
        self.nodes = NodeStore() if nodes is None else nodes
        root = Hash32(state_root or BLANK_ROOT_HASH)
        self._state = CancunState(AtomicDB(self.nodes), block_context(0, 0, BASE_FEE_WEI), root)
        for account, wei in funds_wei.items() if state_root is None else ():
            self._state.set_balance(Address(account), wei)
        self._state.persist()

    @property
    def state_root(self) -> bytes:
        return bytes(self._state.state_root)

    @staticmethod
    def decode(raw: bytes) -> Any:
        """The transaction in `raw` after all checks that need no state. Raises RejectedTransaction."""
        try:
            transaction = CancunVM.get_transaction_builder().decode(raw)
            transaction.validate()
            chain_id = transaction.chain_id
        except RecursionError:
            raise RejectedTransaction("malformed transaction: nested too deeply") from None
        except Exception as error:  # rlp, eth_keys and py-evm raise unrelated classes on malformed bytes
            raise RejectedTransaction(f"malformed transaction: {error}") from None
        if chain_id != CHAIN_ID:
            raise RejectedTransaction(f"invalid chain id: signed for {chain_id}, this is {CHAIN_ID}")
        if transaction.type_id == 3:
            raise RejectedTransaction("transaction type not supported: blobs")
        return transaction

    def check(self, transaction: Any) -> None:
        """Raises RejectedTransaction, in the words that clients know, where the state does not admit `transaction`."""
        nonce = self._state.get_nonce(transaction.sender)
        if transaction.nonce != nonce:
            what = "too low" if transaction.nonce < nonce else "too high"
            raise RejectedTransaction(f"nonce {what}: next nonce {nonce}, tx nonce {transaction.nonce}")
        if transaction.gas > BLOCK_GAS_LIMIT:
            raise RejectedTransaction(f"exceeds block gas limit: {transaction.gas} over {BLOCK_GAS_LIMIT}")
        if transaction.gas < transaction.intrinsic_gas:
            raise RejectedTransaction(f"intrinsic gas too low: {transaction.gas} below {transaction.intrinsic_gas}")
        if transaction.max_fee_per_gas < BASE_FEE_WEI:
            raise RejectedTransaction(f"max fee per gas less than block base fee: {transaction.max_fee_per_gas}")
        have = self._state.get_balance(transaction.sender)
        want = transaction.gas * transaction.max_fee_per_gas + transaction.value
        if have < want:
            raise RejectedTransaction(f"insufficient funds for gas * price + value: have {have} want {want}")

    def execute(self, transaction: Any, number: int, timestamp_s: int) -> Outcome:
        """Runs a decoded transaction as the only one of block `number` and keeps its effects."""
        self.check(transaction)
        state = self._state
        state.execution_context = block_context(number, timestamp_s, BASE_FEE_WEI)
        state.lock_changes()
        try:
            computation = state.apply_transaction(transaction)
        except ValidationError as error:
            raise RejectedTransaction(str(error)) from None
        outcome = outcome_of(transaction, computation)
        state.persist()
        return outcome

    def simulate(self, call: Call, number: int, timestamp_s: int) -> Outcome:
        """Runs `call` at the given time on the present state and leaves no trace."""
        state = self._state
        state.lock_changes()
        state.execution_context = block_context(number, timestamp_s, 0)
        snapshot = state.snapshot()
        try:
            executor = state.get_transaction_executor()
            message = executor.build_evm_message(call)  # type: ignore[arg-type]
            computation = executor.build_computation(message, call)  # type: ignore[arg-type]
            return outcome_of(call, computation)
        except InsufficientFunds:
            return Outcome(0, b"", b"", "insufficient funds for transfer", None, ())
        finally:
            state.revert(snapshot)
            state.clear_transient_storage()

    def balance(self, account: bytes) -> int:
        return int(self._state.get_balance(Address(account)))

    def nonce(self, account: bytes) -> int:
        return int(self._state.get_nonce(Address(account)))

    def code(self, account: bytes) -> bytes:
        return bytes(self._state.get_code(Address(account)))

    def storage(self, account: bytes, slot: int) -> int:
        return int(self._state.get_storage(Address(account), slot))


def block_context(number: int, timestamp_s: int, base_fee_wei: int) -> ExecutionContext:
    return ExecutionContext(
        coinbase=_NOBODY,  # type: ignore[arg-type]
        timestamp=timestamp_s,
        block_number=number,  # type: ignore[arg-type]
        difficulty=0,
        mix_hash=bytes(32),  # type: ignore[arg-type]
        gas_limit=BLOCK_GAS_LIMIT,
        prev_hashes=(),
        chain_id=CHAIN_ID,
        base_fee_per_gas=base_fee_wei,
        excess_blob_gas=0,
    )


def outcome_of(transaction: Any, computation: Any) -> Outcome:
    used = int(CancunVM.finalize_gas_used(transaction, computation))
    created = transaction.to == CREATE_CONTRACT_ADDRESS
    if computation.is_error:
        data = bytes(computation.output) if isinstance(computation.error, Revert) else b""
        name = "execution reverted" if isinstance(computation.error, Revert) else type(computation.error).__name__
        return Outcome(used, b"", data, name, None, ())
    contract = bytes(computation.msg.storage_address) if created else None
    return Outcome(used, bytes(computation.output), None, "", contract, tuple(_logs(computation.get_log_entries())))


def _logs(entries: Iterable[Any]) -> Iterable[Log]:
    for address, topics, data in entries:
        yield Log(bytes(address), tuple(topic.to_bytes(32, "big") for topic in topics), bytes(data))
