"""Puts the four contracts on a chain. Rounds' address is computed beforehand, so that the others can name it.

With a record on disk a deployment that was interrupted goes on where it ended: what is on the chain is not paid again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smartnodes_core.chain.base import NoFundsError
from smartnodes_core.chain.contracts import CONTRACTS, load_artifact
from smartnodes_core.chain.gateway import RECEIPT_DEADLINE_S, Gateway
from smartnodes_core.chain.settings import Addresses, ChainSettings
from smartnodes_core.chain.signing import checksum, keccak
from smartnodes_core.errors import ChainError, ConfigError

_DEPLOY_GAS, _ALLOCATION_GAS = 14_000_000, 35_000
_LOOK_S = 0.5


@dataclass(frozen=True)
class _Begun:
    """A deployment whose first transaction may have been sent: its contracts lie where `account`'s nonces say."""

    chain_id: int
    account: str
    nonce: int
    from_block: int
    content: str  # hash of the settings and the contracts


class _Deployer(Gateway):
    """A gateway that also tells what is on the chain already, and what gas costs."""

    def has_code(self, address: bytes) -> bool:
        return bool(self._do("look for a contract", lambda: self._web3.eth.get_code(checksum(address))))  # type: ignore[arg-type]

    def gas_price_wei(self) -> int:
        """The most that gas may cost in the next blocks."""
        return int(self._do("read the gas price", self._fees)["maxFeePerGas"])


def deploy(
    url: str, key: bytes, settings: ChainSettings, record: Path | None = None, chain_id: int | None = None
) -> Addresses:
    """Deploys and sets up; five transactions of `key`'s account. Raises as ChainClient does, and NoFundsError before
    the first transaction where the account cannot pay for all.

    `record` is a file that the caller deletes when the addresses are safe: with it, the same call goes on after an
    interruption. Raises ConfigError where it is another deployment's, ChainError where the account sent other
    transactions in between: nothing usable is left then.
    """
    gateway = _Deployer(url, key, chain_id)
    begun = _begin(gateway, settings, record)
    lie = {name: create_address(gateway.account, begun.nonce + place) for place, name in enumerate(CONTRACTS)}
    for place, (name, address) in enumerate(lie.items()):
        if _is_there(gateway, begun.nonce + place, lambda address=address: gateway.has_code(address), record):  # type: ignore[misc]
            continue
        receipt = gateway.deploy(name, constructor_arguments(settings, name, lie))
        if bytes.fromhex(receipt["contractAddress"][2:]) != address:
            raise ChainError(
                _disturbed(f"{name} lies at {receipt['contractAddress']}, not at {checksum(address)}", record)
            )
    functions = gateway.contract("Rounds", lie["Rounds"]).functions
    if not _is_there(gateway, begun.nonce + len(CONTRACTS), lambda: gateway.read(functions.isSetUp()), record):
        gateway.transact(functions.setup(*setup_arguments(settings)))
    return Addresses(gateway.chain_id, begun.from_block, lie["SNO"], lie["Registry"], lie["Escrow"], lie["Rounds"])


def most_gas(settings: ChainSettings) -> int:
    """What the five transactions may take together, with the margin that is left to each."""
    return _DEPLOY_GAS + _ALLOCATION_GAS * len(settings.genesis)


def _begin(gateway: _Deployer, settings: ChainSettings, record: Path | None) -> _Begun:
    content = hashlib.sha256(repr(settings).encode())
    for name in CONTRACTS:
        content.update(load_artifact(name).bytecode)
    who = checksum(gateway.account)
    now = _Begun(gateway.chain_id, who, gateway.next_nonce(), gateway.block_number(), content.hexdigest())
    if record is not None and record.exists():
        begun = _read(record)
        for what in ("chain_id", "account", "content"):
            if getattr(begun, what) != getattr(now, what):
                raise ConfigError(
                    f"{record} is of a deployment that was interrupted, with another {_WORDS[what]}: finish that one "
                    "with what it was begun with, or delete the file to begin anew"
                )
        return begun
    have, need = gateway.coin_wei(gateway.account), most_gas(settings) * gateway.gas_price_wei()
    if have < need:
        raise NoFundsError(
            f"deploy: {who} has {have} wei of chain {gateway.chain_id}'s coin, at most {need} are needed for gas: "
            "nothing was sent"
        )
    if record is not None:
        _write(record, now)
    return now


_WORDS = {"chain_id": "chain", "account": "account", "content": "settings file"}


def _read(record: Path) -> _Begun:
    try:
        return _Begun(**json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{record} cannot be read ({error}): delete it to begin anew") from None


def _write(record: Path, begun: _Begun) -> None:
    """On disk before anything is paid."""
    try:
        with open(record, "x", encoding="utf-8") as file:
            json.dump(asdict(begun), file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{record} cannot be written: {error.strerror}; nothing was sent") from None


def _is_there(gateway: _Deployer, nonce: int, look: Callable[[], bool], record: Path | None) -> bool:
    """Whether an earlier try's transaction `nonce` did its work; waits for one that is on its way."""
    deadline = time.monotonic() + RECEIPT_DEADLINE_S
    while not look():
        if gateway.next_nonce() <= nonce:
            if gateway.next_nonce() < nonce:
                raise ChainError(_disturbed(f"transaction {nonce - 1} of {checksum(gateway.account)} is gone", record))
            return False
        if time.monotonic() > deadline:
            raise ChainError(_disturbed(f"{checksum(gateway.account)} sent other transactions in between", record))
        time.sleep(_LOOK_S)
    return True


def _disturbed(what: str, record: Path | None) -> str:
    return (
        f"{what}: the contracts cannot find each other; " + (f"delete {record} and " if record else "") + "deploy again"
    )


def constructor_arguments(settings: ChainSettings, contract: str, found: Mapping[str, bytes]) -> tuple[Any, ...]:
    """What `contract`'s constructor takes. `found` are the contracts deployed so far, and where Rounds will lie."""
    if contract == "SNO":
        schedule = (
            settings.emission_wei,
            settings.emission_tail_wei,
            settings.emission_period_s,
            settings.emission_decay_s,
            settings.emission_keep_bps,
        )
        genesis = [(checksum(account), wei) for account, wei in settings.genesis.items()]
        return (checksum(found["Rounds"]), schedule, genesis)
    sno = checksum(found["SNO"])
    if contract == "Registry":
        stakes = (settings.user_stake_wei, settings.worker_stake_wei, settings.validator_stake_wei)
        return (sno, (*stakes, settings.exit_delay_s))
    if contract == "Escrow":
        return (sno, settings.dispute_window_s)
    rules = (settings.round_interval_s, settings.claim_delay_s, settings.freeze_bond_wei)
    return (sno, checksum(found["Registry"]), checksum(found["Escrow"]), rules)


def setup_arguments(settings: ChainSettings) -> tuple[Any, ...]:
    """What Rounds' one-time set-up takes."""
    return (list(settings.networks.items()), (settings.fee_bps, settings.kappa_bps))


def create_address(sender: bytes, nonce: int) -> bytes:
    """Where the contract that `sender` creates with transaction `nonce` will lie."""
    number = b"\x80" if nonce == 0 else bytes([nonce]) if nonce < 0x80 else _long(nonce)
    content = b"\x94" + sender + number
    return keccak(bytes([0xC0 + len(content)]) + content)[12:]


def _long(number: int) -> bytes:
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return bytes([0x80 + len(data)]) + data
