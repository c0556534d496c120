"""Puts the four contracts on a chain. Rounds' address is computed beforehand, so that the others can name it."""

from __future__ import annotations

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
    schedule = (
        settings.emission_wei,
        settings.emission_tail_wei,
        settings.emission_period_s,
        settings.emission_decay_s,
        settings.emission_keep_bps,
    )
    genesis = [(checksum(account), wei) for account, wei in settings.genesis.items()]
    sno = _deploy(gateway, "SNO", checksum(rounds), schedule, genesis)
    stakes = (settings.user_stake_wei, settings.worker_stake_wei, settings.validator_stake_wei, settings.exit_delay_s)
    registry = _deploy(gateway, "Registry", checksum(sno), stakes)
    escrow = _deploy(gateway, "Escrow", checksum(sno), settings.dispute_window_s)
    times = (settings.round_interval_s, settings.claim_delay_s)
    found = _deploy(gateway, "Rounds", checksum(sno), checksum(registry), checksum(escrow), times)
    if found != rounds:
        raise ChainError(f"Rounds lies at {checksum(found)}, not at {checksum(rounds)} as computed: deploy again")
    functions = gateway.contract("Rounds", rounds).functions
    gateway.transact(functions.setup(list(settings.networks.items())))
    return Addresses(gateway.chain_id, from_block, sno, registry, escrow, rounds)


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
