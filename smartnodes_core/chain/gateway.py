"""One account at one RPC endpoint: reads, transactions with their nonces, and the one place where web3's errors become
ours.

web3 is imported when a `Gateway` is made (about a second), never when this module is. A transaction is sent until its
receipt is there or the deadline passes: the same signed bytes again where the answer was lost, newly signed where
another process took the nonce. So nothing is paid twice.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from smartnodes_core.chain.base import NoFundsError, RefusedError
from smartnodes_core.chain.contracts import decode_error, load_artifact
from smartnodes_core.chain.devnet import CHAIN_ID as DEVNET_CHAIN_ID
from smartnodes_core.chain.devnet.accounts import is_devnet_key
from smartnodes_core.chain.signing import address_of, checksum
from smartnodes_core.errors import ChainError, ChainUnreachableError, ConfigError, WrongChainError

T = TypeVar("T")

REQUEST_TIMEOUT_S = 10.0
RECEIPT_DEADLINE_S = 60.0
_POLL_S = (0.02, 0.5)  # the devnet answers at once, a public chain after its block
_GAS_MARGIN_PERCENT = 25  # others' transactions may come first and change what ours costs
_NONCE_WORDS = ("nonce too low", "nonce too high", "replacement transaction underpriced", "nonce has already been used")
_LOST_LOOKS = 3  # as many times in a row a transaction must be unknown before it is signed anew
_KNOWN_WORDS = ("already known", "already imported", "known transaction")


class Gateway:
    """Connects at once. `key` None can only read; `chain_id` None accepts whatever chain answers.

    Raises ChainUnreachableError, WrongChainError, or ConfigError for a devnet key on a chain that is no devnet.
    """

    def __init__(self, url: str, key: bytes | None = None, chain_id: int | None = None):
        limit = sys.getrecursionlimit()
        from web3 import HTTPProvider, Web3

        sys.setrecursionlimit(
            limit
        )  # one of its imports raises it to where a peer's nested message overflows the stack

        self.url = url
        self._key = key
        self._lock = threading.Lock()
        provider = HTTPProvider(url, request_kwargs={"timeout": REQUEST_TIMEOUT_S}, exception_retry_configuration=None)
        self._web3 = Web3(provider)
        self.chain_id: int = self._do("reach the chain", lambda: int(self._web3.eth.chain_id))
        if chain_id is not None and self.chain_id != chain_id:
            raise WrongChainError(
                f"{url} is chain {self.chain_id}, needed is {chain_id}: set the URL of the right chain"
            )
        if key is not None and self.chain_id != DEVNET_CHAIN_ID and is_devnet_key(key):
            raise ConfigError(
                f"this account's key is a devnet key, known to everybody, and {url} is chain {self.chain_id}: "
                "make a key of your own"
            )

    def __repr__(self) -> str:
        who = checksum(address_of(self._key)) if self._key else "read-only"
        return f"<Gateway {self.url} chain {self.chain_id} {who}>"

    @property
    def account(self) -> bytes:
        """The account that signs. Raises ConfigError where there is no key."""
        if self._key is None:
            raise ConfigError("this needs an account's key: the chain was opened for reading only")
        return address_of(self._key)

    def contract(self, name: str, address: bytes) -> Any:
        """web3's view of one of our contracts. Raises WrongChainError where no code lies at `address`."""
        code = self._do(f"find {name}", lambda: self._web3.eth.get_code(checksum(address)))  # type: ignore[arg-type]
        if not code:
            raise WrongChainError(
                f"no contract at {checksum(address)} ({name}) on chain {self.chain_id} at {self.url}: "
                "the addresses file is of another deployment, or the chain was begun anew"
            )
        return self._web3.eth.contract(address=checksum(address), abi=load_artifact(name).abi)  # type: ignore[call-overload]

    def read(self, function: Any) -> Any:
        """The result of a view, in the present."""
        return self._do(f"read {function.abi['name']}", lambda: function.call())

    def events(self, event: Any, from_block: int, **topics: Any) -> list[Any]:
        """All events of a kind since `from_block`, with the indexed values given."""

        def find() -> list[Any]:
            return list(event.get_logs(argument_filters=topics, from_block=from_block))

        return self._do(f"find {event.event_name}", find)

    def coin_wei(self, account: bytes) -> int:
        return self._do("read a balance", lambda: int(self._web3.eth.get_balance(checksum(account))))  # type: ignore[arg-type]

    def block_number(self) -> int:
        return self._do("read the block number", lambda: int(self._web3.eth.block_number))

    def block_hash(self) -> bytes:
        """Of the newest block: while it is the same, so is what views of the contracts' storage give."""
        return self._do("read the newest block", lambda: bytes(self._web3.eth.get_block("latest")["hash"]))

    def next_nonce(self) -> int:
        return self._do("read the nonce", lambda: self._nonce())

    def transact(self, function: Any, value_wei: int = 0) -> Any:
        """Sends a contract call, with coins if any, and returns its receipt.
        Raises RefusedError before anything is spent, where it can be foreseen.
        """
        data = function._encode_transaction_data()
        return self.send(function.abi["name"], to=function.address, data=data, value=value_wei)

    def deploy(self, name: str, arguments: Sequence[Any]) -> Any:
        """Deploys one of our contracts and returns the receipt."""
        artifact = load_artifact(name)
        factory = self._web3.eth.contract(abi=artifact.abi, bytecode=artifact.bytecode)
        return self.send(f"deploy {name}", to=None, data=factory.constructor(*arguments).data_in_transaction)

    def send(self, action: str, to: str | None, data: str, value: int = 0) -> Any:
        """Signs and sends one transaction with `value` wei of the chain's coin, and waits until it is in a block."""
        sender = checksum(self.account)
        call: Any = {"from": sender, "data": data, "value": value} | ({"to": to} if to else {})
        with self._lock:
            deadline = time.monotonic() + RECEIPT_DEADLINE_S
            while True:
                gas = self._do(action, lambda: self._web3.eth.estimate_gas(call))
                fields = call | {"gas": gas + gas * _GAS_MARGIN_PERCENT // 100, "chainId": self.chain_id}
                fields |= self._do(action, self._fees) | {"nonce": self._do(action, self._nonce)}
                receipt = self._send_until_mined(action, fields, deadline)
                if receipt is not None:
                    break
                # Another process sent with this key: let it pass, then sign anew.
                time.sleep(random.uniform(0.01, 0.1))
        if receipt["status"] != 1:
            self._do(action, lambda: self._web3.eth.call(call))  # says why, if it still fails
            raise RefusedError(
                action, "failed in the block, not before it", {"transaction": receipt["transactionHash"].hex()}
            )
        return receipt

    # -- inside ------------------------------------------------------------------------------------------------------

    def _send_until_mined(self, action: str, fields: dict[str, Any], deadline: float) -> Any:
        """The receipt, or None if another transaction took the nonce."""
        signed = self._web3.eth.account.sign_transaction(fields, self._key)
        wait_s = _POLL_S[0]
        sent = refused = False
        looks = 0
        while True:
            try:
                if not sent:
                    sent, refused = True, not self._submit(signed.raw_transaction)
                receipt = self._receipt(signed.hash)
                if receipt is not None:
                    return receipt
                looks = looks + 1 if self._is_lost(fields["nonce"], signed.hash, refused) else 0
                if looks == _LOST_LOOKS:
                    return None
            except ChainUnreachableError:
                # The request may have arrived although its answer did not: the same bytes again cannot pay twice.
                sent = False
                if time.monotonic() >= deadline:
                    raise
            except _web3_errors() as error:
                raise self._translated(action, error) from error
            if time.monotonic() >= deadline:
                raise ChainError(
                    f"{action}: transaction {signed.hash.hex()} is in no block after {RECEIPT_DEADLINE_S:g} s; "
                    "it may still come, look before sending it again"
                )
            time.sleep(wait_s)
            wait_s = min(wait_s * 1.5, _POLL_S[1])

    def _submit(self, raw: bytes) -> bool:
        """False where another transaction has the nonce, perhaps these same bytes, sent before."""
        try:
            with self._reaching():
                self._web3.eth.send_raw_transaction(raw)
        except _web3_errors() as error:
            text = str(error).lower()
            if any(words in text for words in _KNOWN_WORDS):
                return True
            if any(words in text for words in _NONCE_WORDS):
                return False
            raise
        return True

    def _receipt(self, transaction: bytes) -> Any:
        from web3.exceptions import TransactionNotFound

        try:
            with self._reaching():
                return self._web3.eth.get_transaction_receipt(transaction)  # type: ignore[arg-type]
        except TransactionNotFound:
            return None

    def _is_lost(self, nonce: int, transaction: bytes, refused: bool) -> bool:
        """Whether the transaction, of which there is no receipt, is not even known any more. On some chains a receipt
        comes after the nonce has moved on: to sign anew then would pay twice.
        """
        from web3.exceptions import TransactionNotFound

        with self._reaching():
            mined = self._web3.eth.get_transaction_count(checksum(self.account), "latest")  # type: ignore[arg-type]
            if mined <= nonce and not refused:
                return False
            try:
                self._web3.eth.get_transaction(transaction)  # type: ignore[arg-type]
            except TransactionNotFound:
                return True
            return False

    def _nonce(self) -> int:
        return int(self._web3.eth.get_transaction_count(checksum(self.account), "pending"))  # type: ignore[arg-type]

    def _fees(self) -> dict[str, int]:
        tip = int(self._web3.eth.max_priority_fee)
        base = int(self._web3.eth.get_block("latest").get("baseFeePerGas", self._web3.eth.gas_price))
        # Two processes that send the same call with the same nonce would sign the same bytes, and each take the other's
        # transaction for its own. A few random wei in the cap, which nobody pays, keep every transaction unique.
        return {"maxFeePerGas": 2 * base + tip + secrets.randbits(28), "maxPriorityFeePerGas": tip}

    def _do(self, action: str, function: Callable[[], T]) -> T:
        try:
            with self._reaching():
                return function()
        except _web3_errors() as error:
            raise self._translated(action, error) from error

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        import requests

        try:
            yield
        except requests.JSONDecodeError as error:
            raise WrongChainError(
                f"{self.url} answers, but not in JSON-RPC ({error}): set the URL of a chain"
            ) from error
        except requests.RequestException as error:
            raise ChainUnreachableError(
                f"no answer from the chain at {self.url} ({type(error).__name__}): is it running, is the URL right? "
                "`tensorlink devnet` starts one on this machine"
            ) from error

    def _translated(self, action: str, error: Exception) -> ChainError:
        from web3.exceptions import ContractLogicError

        text = str(error)
        if isinstance(error, ContractLogicError):
            data = error.data if isinstance(error.data, str) and error.data.startswith("0x") else "0x"
            reason, values = decode_error(bytes.fromhex(data[2:]))
            if reason == "ERC20InsufficientBalance":
                have, need = values.get("balance"), values.get("needed")
                return NoFundsError(f"{action}: {values.get('sender')} has {have} wei of SNO, needed are {need}")
            return RefusedError(action, reason, values)
        if "insufficient funds" in text.lower():
            return NoFundsError(f"{action}: {checksum(self.account)} cannot pay for the transaction's gas: {text}")
        if isinstance(error, ValueError | KeyError | TypeError) and not _is_web3(error):
            return WrongChainError(f"{self.url} answers, but not as a chain does ({text}): set the URL of a chain")
        return ChainError(f"{action}: {text}")


def _web3_errors() -> tuple[type[Exception], ...]:
    from web3.exceptions import Web3Exception

    return (Web3Exception, ValueError, KeyError, TypeError)


def _is_web3(error: Exception) -> bool:
    from web3.exceptions import Web3Exception

    return isinstance(error, Web3Exception)
