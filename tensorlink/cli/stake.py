"""`tensorlink stake`: put an account's stake into a network, ask for it back, withdraw it, and see how long it takes.

Everything is checked before anything is sent, and a command that is given again does not pay again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from smartnodes_core.chain.account import load_account_key
from smartnodes_core.chain.base import ROLES, Member, NoFundsError, RefusedError
from smartnodes_core.chain.client import ChainClient
from smartnodes_core.chain.gateway import Gateway
from smartnodes_core.chain.settings import SNO, Addresses
from smartnodes_core.chain.signing import checksum
from smartnodes_core.config import UserConfig, load
from smartnodes_core.errors import ChainError, ConfigError
from smartnodes_core.identity import Identity
from smartnodes_core.nodes.membership import key_hash
from smartnodes_core.records import Role


def add_commands(commands: Any) -> None:
    """Register the commands."""
    stake = commands.add_parser("stake", help="stake SNO in a network, ask for it back, withdraw it")
    actions = stake.add_subparsers(dest="action", required=True, metavar="action")
    for name, run, text in (
        ("deposit", run_deposit, "register the node's key in a role, with the role's stake"),
        ("exit", run_exit, "stop taking part; the stake can be withdrawn after the exit delay"),
        ("rotate", run_rotate, "revoke the node key and register another; stake and reputation stay"),
        ("withdraw", run_withdraw, "take the stake back, once the exit delay is over"),
        ("status", run_status, "what is staked, and when it can be withdrawn"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "--config",
            type=Path,
            required=True,
            help="TOML file with rpc_url, addresses, network_id, account, identity",
        )
        if name == "deposit":
            action.add_argument("--role", choices=ROLES, required=True)
        if name == "rotate":
            action.add_argument(
                "--to",
                type=Path,
                required=True,
                metavar="FILE",
                help="the new identity's key file; made where there is none",
            )
        action.set_defaults(run=run)


class Staker:
    """One account's stake in one network. Raises as ChainClient does, ConfigError for a network that does not exist."""

    def __init__(self, config: UserConfig):
        self.addresses = Addresses.read(config.addresses)
        self.chain = ChainClient(config.rpc_url, self.addresses, load_account_key(config.account, config.passphrase()))
        self.network_id = config.network_id
        self._gateway = Gateway(config.rpc_url)
        self._registry = self._gateway.contract("Registry", self.addresses.registry).functions
        try:
            self.now_s = self.chain.round_state(self.network_id).chain_time_s
        except RefusedError:
            raise ConfigError(
                f"network {self.network_id} is not open in these contracts: set network_id to one that was deployed"
            ) from None

    @property
    def name(self) -> str:
        return checksum(self.chain.account)

    def member(self) -> Member | None:
        return self.chain.member(self.network_id, self.chain.account)

    def withdrawable_at_s(self, member: Member) -> int:
        """When the exit delay is over; only after an exit was asked for."""
        return member.exit_at_s + self.exit_delay_s()

    def exit_delay_s(self) -> int:
        return int(self._gateway.read(self._registry.exitDelay()))

    def check_key(self, hashed: bytes) -> None:
        """Raises ConfigError where validators have verified that the node key is another account's, and for a revoked
        one."""
        owner = self.chain.account_of_key(self.network_id, hashed)
        member = self.chain.member(self.network_id, owner) if owner is not None else None
        if owner is None or member is None:
            return
        if member.key_hash != hashed:
            raise ConfigError(
                f"this node key was revoked by {checksum(owner)} in network {self.network_id}, for ever: use a new "
                "identity (`tensorlink keys`); nothing was sent"
            )
        if member.verified and owner != self.chain.account:
            raise ConfigError(
                f"this node key belongs to {checksum(owner)} in network {self.network_id}: use that account's key "
                "file, or an identity of your own (`tensorlink keys`); nothing was sent"
            )

    def check_funds(self, stake_wei: int) -> None:
        """Raises NoFundsError."""
        have = self.chain.balances(self.chain.account)
        if have.sno_wei < stake_wei:
            raise NoFundsError(
                f"{self.name} has {have.sno_wei / SNO:.6f} SNO, needed are {stake_wei / SNO:.6f}; nothing was sent"
            )
        if have.coin_wei == 0:
            raise NoFundsError(
                f"{self.name} has no coins of chain {self.chain.chain_id} to pay for gas; nothing was sent"
            )


def run_deposit(options: argparse.Namespace) -> int:
    """Register, unless the account is registered with this key and role already."""
    config = load(UserConfig, options.config)
    staker, role = Staker(config), options.role
    hashed = key_hash(Identity.load(config.identity, config.passphrase()).node_key)
    member = staker.member()
    if member is not None and member.exit_at_s == 0:
        return _say_registered(staker, member, role, hashed)
    if member is not None:
        _leave_first(staker, member)
    stake_wei = staker.chain.stake_wei(role)
    staker.check_key(hashed)
    staker.check_funds(stake_wei)
    index = staker.chain.register(role, hashed, staker.network_id)
    _say(f"{staker.name} staked {stake_wei / SNO:.6f} SNO as {role}, member {index} of network {staker.network_id}")
    return 0


def run_exit(options: argparse.Namespace) -> int:
    """Ask for the stake back, unless that was done."""
    staker, member = _registered(options)
    if member.exit_at_s == 0:
        staker.chain.request_exit(staker.network_id)
        staker, member = _registered(options)
    else:
        _say("the exit was asked for before; nothing was sent")
    _say(f"{member.stake_wei / SNO:.6f} SNO can be withdrawn {_when(staker, member)}")
    return 0


def run_rotate(options: argparse.Namespace) -> int:
    """Revoke the key that is registered and register that of `--to`, unless it is."""
    staker, member = _registered(options)
    identity = _identity_at(options.to, load(UserConfig, options.config).passphrase())
    hashed = key_hash(identity.node_key)
    if member.key_hash == hashed:
        _say(f"{staker.name} was given this node key before; nothing was sent")
        return 0
    staker.check_key(hashed)
    staker.check_funds(0)
    staker.chain.rotate_key(hashed, staker.network_id)
    _say(f"the old node key of {staker.name} is revoked: peers drop it when they next look at the chain")
    _say(f"set identity = {json.dumps(str(options.to))} and start the node again; the next round verifies its key")
    return 0


def _identity_at(path: Path, passphrase: str | None) -> Identity:
    if not path.exists():
        Identity.create().save(path, passphrase)
    return Identity.load(path, passphrase)


def run_withdraw(options: argparse.Namespace) -> int:
    """Take the stake back."""
    staker, member = _registered(options)
    if member.exit_at_s == 0:
        raise ConfigError("no exit was asked for: give `tensorlink stake exit` first; nothing was sent")
    if staker.withdrawable_at_s(member) > staker.now_s:
        raise ChainError(f"the stake is locked: it can be withdrawn {_when(staker, member)}; nothing was sent")
    if _withdraw(staker):
        _say(f"{member.stake_wei / SNO:.6f} SNO were paid back to {staker.name}")
    else:
        _say("the stake was withdrawn before; nothing was sent")
    return 0


def run_status(options: argparse.Namespace) -> int:
    """Print what the account has in the network."""
    staker = Staker(load(UserConfig, options.config))
    member = staker.member()
    free = staker.chain.balances(staker.chain.account).sno_wei
    _say(f"{staker.name} has {free / SNO:.6f} SNO outside network {staker.network_id}")
    if member is None:
        _say("not registered; " + _stakes(staker))
        return 0
    live = "taking part" if member.live else "not taking part"
    _say(f"{member.role}, {live}, reputation {member.reputation}, staked {member.stake_wei / SNO:.6f} SNO")
    if member.exit_at_s:
        _say(f"exit asked for; the stake can be withdrawn {_when(staker, member)}")
    else:
        _say(f"an exit takes {staker.exit_delay_s()} s")
    return 0


def _registered(options: argparse.Namespace) -> tuple[Staker, Member]:
    """The account's place in the network as it is now. Raises ConfigError where it has none."""
    staker = Staker(load(UserConfig, options.config))
    member = staker.member()
    if member is None:
        raise ConfigError(
            f"{staker.name} is not registered in network {staker.network_id}: check `account` and `network_id`, or "
            "give `tensorlink stake deposit`; nothing was sent"
        )
    return staker, member


def _say_registered(staker: Staker, member: Member, role: Role, hashed: bytes) -> int:
    if (member.role, member.key_hash) != (role, hashed):
        what = f"as {member.role}" if member.role != role else "with another node key"
        raise ConfigError(f"{staker.name} is registered {what}; an account has one role and key; nothing was sent")
    _say(f"{staker.name} was registered before, with {member.stake_wei / SNO:.6f} SNO staked; nothing was sent")
    return 0


def _leave_first(staker: Staker, member: Member) -> None:
    """A member comes back after it has withdrawn: so it has, if there is nothing left to withdraw."""
    if member.reputation == 0:
        raise ConfigError(f"{staker.name} is blacklisted in network {staker.network_id}; nothing was sent")
    if member.stake_wei or staker.withdrawable_at_s(member) > staker.now_s:
        raise ConfigError(
            f"{staker.name} is leaving: withdraw its stake first, {_when(staker, member)}, with `tensorlink stake "
            "withdraw`; nothing was sent"
        )
    _withdraw(staker)


def _withdraw(staker: Staker) -> bool:
    """False where it was done before."""
    try:
        staker.chain.withdraw_stake(staker.network_id)
    except RefusedError as error:
        if error.reason != "ExitNotRequested":
            raise
        return False
    return True


def _stakes(staker: Staker) -> str:
    return "stakes are " + ", ".join(f"{staker.chain.stake_wei(role) / SNO:.6f} SNO as {role}" for role in ROLES)


def _when(staker: Staker, member: Member) -> str:
    at_s = staker.withdrawable_at_s(member)
    if at_s <= staker.now_s:
        return "now"
    return f"in {at_s - staker.now_s} s ({datetime.datetime.fromtimestamp(at_s, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC)"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
