"""The contracts on an EVM inside this process, for tests and benchmarks: no HTTP, no signatures of transactions,
thousands of calls a minute, and the gas that transactions would cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from smartnodes_core.chain.contracts import CONTRACTS, decode_error, load_artifact
from smartnodes_core.chain.deploy import constructor_arguments, create_address, setup_arguments
from smartnodes_core.chain.devnet.evm import Call, Evm, Outcome, block_context, outcome_of
from smartnodes_core.chain.settings import ChainSettings
from smartnodes_core.chain.signing import checksum, keccak

DEPLOYER = b"\xde" * 20


class Reverted(Exception):
    """A contract said no: `reason` is its error's name."""

    def __init__(self, reason: str, values: dict[str, Any]):
        self.reason, self.values = reason, values
        super().__init__(f"{reason}({values})")


class DirectEvm(Evm):
    """An EVM that also takes unsigned messages and keeps their effects."""

    def apply(self, call: Call, number: int, timestamp_s: int) -> Outcome:
        state = self._state
        state.lock_changes()
        state.execution_context = block_context(number, timestamp_s, 0)
        executor = state.get_transaction_executor()
        message = executor.build_evm_message(call)  # type: ignore[arg-type]
        computation = executor.build_computation(message, call)  # type: ignore[arg-type]
        outcome = outcome_of(call, computation)
        state.persist()
        return outcome


@cache
def _types(contract: str, function: str) -> tuple[bytes, list[str], list[str]]:
    """Selector, argument types and result types."""
    [entry] = [
        entry
        for entry in load_artifact(contract).abi
        if entry.get("name", entry["type"]) == function and entry["type"] in ("function", "constructor")
    ]
    inputs = [abi_type(each) for each in entry["inputs"]]
    outputs = [abi_type(each) for each in entry.get("outputs", ())]
    return keccak(f"{function}({','.join(inputs)})".encode())[:4], inputs, outputs


def abi_type(entry: dict[str, Any]) -> str:
    kind = str(entry["type"])
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(abi_type(part) for part in entry['components'])}){kind[5:]}"


class Direct:
    """One deployment. `now_s` is the chain's clock; accounts are bytes."""

    def __init__(self, settings: ChainSettings, now_s: int, coins_wei: dict[bytes, int] | None = None):
        self.evm = DirectEvm({DEPLOYER: 10**24, **(coins_wei or {})})
        self.now_s = now_s
        self.number = 0
        self.gas_used = 0
        self.addresses: dict[str, bytes] = {}
        rounds = create_address(DEPLOYER, len(CONTRACTS) - 1)
        for nonce, contract in enumerate(CONTRACTS):
            arguments = constructor_arguments(settings, contract, {**self.addresses, "Rounds": rounds})
            self.addresses[contract] = self._create(contract, nonce, arguments)
        assert self.addresses["Rounds"] == rounds
        self.send(DEPLOYER, "Rounds", "setup", *setup_arguments(settings))

    def _create(self, contract: str, nonce: int, arguments: Sequence[Any]) -> bytes:
        from eth_abi.abi import encode

        data = load_artifact(contract).bytecode + encode(_types(contract, "constructor")[1], arguments)
        outcome = self._apply(Call(sender=DEPLOYER, to=b"", data=data, nonce=nonce))
        assert outcome.contract is not None
        return outcome.contract

    def send(self, sender: bytes, contract: str, function: str, *arguments: Any, value_wei: int = 0) -> Outcome:
        """One transaction; its gas is in `gas_used`. Raises Reverted."""
        return self._apply(Call(sender, self.addresses[contract], _data(contract, function, arguments), value_wei))

    def read(self, contract: str, function: str, *arguments: Any) -> Any:
        from eth_abi.abi import decode

        call = Call(bytes(20), self.addresses[contract], _data(contract, function, arguments))
        outcome = self.evm.simulate(call, self.number + 1, self.now_s)
        self._check(outcome)
        values = decode(_types(contract, function)[2], outcome.output)
        return values[0] if len(values) == 1 else values

    def _apply(self, call: Call) -> Outcome:
        self.number += 1
        outcome = self.evm.apply(call, self.number, self.now_s)
        self._check(outcome)
        self.gas_used = outcome.gas_used
        return outcome

    def _check(self, outcome: Outcome) -> None:
        if not outcome.ok:
            reason, values = decode_error(outcome.revert_data or b"")
            raise Reverted(reason if outcome.revert_data else outcome.error, values)


def _data(contract: str, function: str, arguments: Sequence[Any]) -> bytes:
    from eth_abi.abi import encode

    selector, types, _ = _types(contract, function)
    return selector + encode(types, [_plain(each) for each in arguments])


def _plain(value: Any) -> Any:
    return checksum(value) if isinstance(value, bytes) and len(value) == 20 else value
