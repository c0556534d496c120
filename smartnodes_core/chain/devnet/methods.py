"""The JSON-RPC methods of the devnet: text in, text out, nothing kept here.

Requests come from this machine only, but any program may send them: every parameter is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smartnodes_core.chain.devnet import CHAIN_ID
from smartnodes_core.chain.devnet import render as show
from smartnodes_core.chain.devnet.evm import BASE_FEE_WEI, BLOCK_GAS_LIMIT, Call, Outcome, RejectedTransaction
from smartnodes_core.chain.devnet.history import Block, Mined
from smartnodes_core.chain.devnet.ledger import Ledger
from smartnodes_core.chain.devnet.logs import find_logs
from smartnodes_core.errors import ChainError

PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS = -32700, -32600, -32601, -32602
SERVER_ERROR, REVERTED = -32000, 3
_NAMED_BLOCKS = ("latest", "pending", "safe", "finalized", None)


class RpcError(Exception):
    """An answer of the kind `error`, with JSON-RPC's code."""

    def __init__(self, code: int, message: str, data: str | None = None):
        super().__init__(message)
        self.answer: dict[str, Any] = {"code": code, "message": message}
        if data is not None:
            self.answer["data"] = data


class Methods:
    """Answers one method call at a time on a ledger."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._table: dict[str, Callable[..., Any]] = {
            "web3_clientVersion": lambda: "smartnodes-devnet/1",
            "net_version": lambda: str(CHAIN_ID),
            "net_listening": lambda: True,
            "eth_syncing": lambda: False,
            "eth_accounts": list,
            "eth_chainId": lambda: hex(CHAIN_ID),
            "eth_blockNumber": lambda: hex(ledger.head.number),
            "eth_gasPrice": lambda: hex(BASE_FEE_WEI),
            "eth_maxPriorityFeePerGas": lambda: hex(0),
            "eth_feeHistory": self._fee_history,
            "eth_getBalance": lambda a, block=None: hex(self._state(block, lambda evm: evm.balance(_address(a)))),
            "eth_getTransactionCount": lambda a, block=None: hex(self._state(block, lambda e: e.nonce(_address(a)))),
            "eth_getCode": lambda a, block=None: show.data(self._state(block, lambda evm: evm.code(_address(a)))),
            "eth_getStorageAt": self._storage,
            "eth_call": self._call,
            "eth_estimateGas": self._estimate,
            "eth_sendRawTransaction": self._send,
            "eth_getTransactionReceipt": self._receipt,
            "eth_getTransactionByHash": self._transaction,
            "eth_getBlockByNumber": lambda number, full=False: self._block(self._at(number), full),
            "eth_getBlockByHash": self._block_by_hash,
            "eth_getLogs": lambda criteria: find_logs(ledger.history, _fields(criteria), self._number),
            "evm_mine": lambda *_: hex(ledger.mine().number),
            "evm_snapshot": lambda: hex(ledger.snapshot()),
            "evm_revert": lambda snapshot: ledger.revert(_quantity(snapshot)),
            "evm_increaseTime": lambda seconds: ledger.shift_time(_quantity(seconds)),
        }

    def call(self, name: object, params: object) -> Any:
        """The result of one method. Raises RpcError."""
        method = self._table.get(name) if isinstance(name, str) else None
        if method is None:
            raise RpcError(NO_METHOD, f"the method {str(name)[:64]} does not exist or is not available")
        if not isinstance(params, list):
            raise RpcError(INVALID_PARAMS, "parameters must be a list")
        try:
            return method(*params)
        except RejectedTransaction as error:
            raise RpcError(SERVER_ERROR, str(error)) from None
        except ChainError as error:
            raise RpcError(SERVER_ERROR, str(error)) from None
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise RpcError(INVALID_PARAMS, f"invalid parameters for {name}: {error}") from None

    # -- reading -----------------------------------------------------------------------------------------------------

    def _state(self, block: Any, function: Callable[[Any], Any]) -> Any:
        self._only_present(block)
        return self._ledger.read(function)

    def _only_present(self, block: Any) -> None:
        # Contract state of the past is not kept; answering from the present would be a lie.
        if block not in _NAMED_BLOCKS and self._number(block) < self._ledger.head.number:
            raise RpcError(SERVER_ERROR, f"missing state: only the latest block can be asked, not {block}")

    def _storage(self, account: Any, slot: Any, block: Any = None) -> str:
        value = self._state(block, lambda evm: evm.storage(_address(account), _quantity(slot)))
        return show.data(value.to_bytes(32, "big"))

    def _number(self, block: Any) -> int:
        if block in _NAMED_BLOCKS:
            return self._ledger.head.number
        return 0 if block == "earliest" else _quantity(block)

    def _at(self, block: Any) -> Block | None:
        number = self._number(block)
        return self._ledger.history.block(number)

    def _block(self, block: Block | None, full: Any) -> dict[str, Any] | None:
        return None if block is None else show.block(block, bool(full))

    def _block_by_hash(self, block_hash: Any, full: Any = False) -> dict[str, Any] | None:
        return self._block(self._ledger.history.block_with_hash(_bytes(block_hash, 32)), full)

    def _receipt(self, transaction_hash: Any) -> dict[str, Any] | None:
        found = self._mined(transaction_hash)
        return None if found is None else show.receipt(*found)

    def _transaction(self, transaction_hash: Any) -> dict[str, Any] | None:
        found = self._mined(transaction_hash)
        return None if found is None else show.transaction(*found)

    def _mined(self, transaction_hash: Any) -> tuple[Mined, Block] | None:
        history = self._ledger.history
        mined = history.mined(_bytes(transaction_hash, 32))
        block = history.block(mined.block_number) if mined else None
        return (mined, block) if mined and block else None

    def _fee_history(self, count: Any, newest: Any = None, percentiles: Any = ()) -> dict[str, Any]:
        count = max(1, min(_quantity(count), 1024, self._number(newest) + 1))
        return {
            "oldestBlock": hex(self._number(newest) - count + 1),
            "baseFeePerGas": [hex(BASE_FEE_WEI)] * (count + 1),
            "gasUsedRatio": [0.5] * count,
            "reward": [[hex(0)] * len(percentiles or ())] * count,
        }

    # -- running -----------------------------------------------------------------------------------------------------

    def _call(self, call: Any, block: Any = None, overrides: Any = None) -> str:
        if overrides:
            raise RpcError(INVALID_PARAMS, "state overrides are not supported")
        self._only_present(block)
        return show.data(_succeeded(self._ledger.simulate(_read_call(call))).output)

    def _estimate(self, call: Any, block: Any = None) -> str:
        self._only_present(block)
        used = _succeeded(self._ledger.simulate(_read_call(call))).gas_used
        # One run instead of a search: a fifth covers refunds, and the 1/64 a caller keeps at each level of calls.
        return hex(min(BLOCK_GAS_LIMIT, used + used // 5 + 2_000))

    def _send(self, raw: Any) -> str:
        return show.data(self._ledger.send(_bytes(raw)).hash)


def _succeeded(outcome: Outcome) -> Outcome:
    if outcome.revert_data is not None:
        raise RpcError(REVERTED, outcome.error, show.data(outcome.revert_data))
    return outcome


def _read_call(call: Any) -> Call:
    fields = _fields(call)
    data = fields.get("input") or fields.get("data") or "0x"
    gas = min(_quantity(fields.get("gas") or hex(BLOCK_GAS_LIMIT)), BLOCK_GAS_LIMIT)
    message = Call(
        sender=_address(fields.get("from") or "0x" + "00" * 20),
        to=_address(fields["to"]) if fields.get("to") else b"",
        data=_bytes(data),
        value=_quantity(fields.get("value") or "0x0"),
        gas=gas,
    )
    if gas < message.intrinsic_gas:
        raise ValueError(f"intrinsic gas too low: {gas} below {message.intrinsic_gas}")
    return message


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object was expected")
    return value


def _quantity(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"not a quantity: {str(value)[:70]}")
    number = value if isinstance(value, int) else int(value, 16)
    if not 0 <= number < 1 << 256:
        raise ValueError("a quantity must lie in 0 .. 2^256 - 1")
    return number


def _bytes(value: Any, length: int | None = None) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x"):
        raise ValueError(f"not hexadecimal data: {str(value)[:70]}")
    data = bytes.fromhex(value[2:])
    if length is not None and len(data) != length:
        raise ValueError(f"{len(data)} bytes where {length} are needed")
    return data


def _address(value: Any) -> bytes:
    return _bytes(value, 20)
