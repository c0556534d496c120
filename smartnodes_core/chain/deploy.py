"""Puts the four contracts on a chain. Rounds' address is computed beforehand, so that the others can name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smartnodes_core.chain.contracts import CONTRACTS
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.settings import Addresses, ChainSettings
from smartnodes_core.chain.signing import checksum, keccak
from smartnodes_core.errors import ChainError


def deploy(url: str, key: bytes, settings: ChainSettings) -> Addresses:
    """Deploys and sets up; five transactions of `key`'s account. Raises as ChainClient does.

    If another process sends with the same key in between, the last constructor refuses and nothing usable is left:
    deploy again.
    """
    gateway = Gateway(url, key)
    from_block = gateway.block_number()
    nonce = gateway.next_nonce()
    rounds = create_address(gateway.account, nonce + 3)
    found: dict[str, bytes] = {"Rounds": rounds}
    for name in CONTRACTS:
        found[name] = _deploy(gateway, name, *constructor_arguments(settings, name, found))
    if found["Rounds"] != rounds:
        raise ChainError(
            f"Rounds lies at {checksum(found['Rounds'])}, not at {checksum(rounds)} as computed: deploy again"
        )
    functions = gateway.contract("Rounds", rounds).functions
    gateway.transact(functions.setup(*setup_arguments(settings)))
    return Addresses(gateway.chain_id, from_block, found["SNO"], found["Registry"], found["Escrow"], found["Rounds"])


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


def _deploy(gateway: Gateway, name: str, *arguments: object) -> bytes:
    receipt = gateway.deploy(name, arguments)
    return bytes.fromhex(receipt["contractAddress"][2:])


def create_address(sender: bytes, nonce: int) -> bytes:
    """Where the contract that `sender` creates with transaction `nonce` will lie."""
    number = b"\x80" if nonce == 0 else bytes([nonce]) if nonce < 0x80 else _long(nonce)
    content = b"\x94" + sender + number
    return keccak(bytes([0xC0 + len(content)]) + content)[12:]


def _long(number: int) -> bytes:
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return bytes([0x80 + len(data)]) + data
