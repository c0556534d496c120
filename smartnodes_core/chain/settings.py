"""What a deployment is made with, from code or from a TOML file, and the addresses file it leaves for the nodes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from smartnodes_core.chain.proposal import UNCAPPED
from smartnodes_core.chain.signing import checksum
from smartnodes_core.errors import ConfigError

SNO = 10**18
YEAR_S = 365 * 24 * 3600


@dataclass(frozen=True)
class ChainSettings:
    """Amounts in wei of SNO, times in seconds. The defaults are the public network's; a demo shortens the times.

    Emission: `emission_wei` every `emission_period_s`, times `emission_keep_bps`/10,000 each `emission_decay_s`, never
    below `emission_tail_wei`. `fee_bps`/10,000 of what jobs pay in SNO is burned, and workers share at most what is
    burned times `kappa_bps`/10,000; 4294967295 pays them the whole emission as a subsidy. `networks` maps network ids
    to their share of it in 1/10,000; `genesis` accounts to what they start with.
    """

    round_interval_s: int = 600
    claim_delay_s: int = 3600
    exit_delay_s: int = 7 * 24 * 3600
    dispute_window_s: int = 24 * 3600
    user_stake_wei: int = 0
    worker_stake_wei: int = 0
    freeze_bond_wei: int = 10_000 * SNO
    fee_bps: int = 500
    kappa_bps: int = 10_000
    validator_stake_wei: int = 1_000_000 * SNO
    emission_wei: int = 9375 * SNO // 10
    emission_tail_wei: int = 70 * SNO
    emission_period_s: int = 600
    emission_decay_s: int = YEAR_S
    emission_keep_bps: int = 6000
    networks: Mapping[int, int] = field(default_factory=lambda: {1: 10_000})
    genesis: Mapping[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.validator_stake_wei == 0:
            raise ConfigError("validator_stake_wei is 0: then anyone could join the quorum; it must be positive")
        if self.claim_delay_s > 32 * self.round_interval_s:
            raise ConfigError(
                f"claim_delay_s is {self.claim_delay_s}: at most 32 round intervals ({32 * self.round_interval_s} s), "
                "because the contract keeps the last 64 roots"
            )
        if self.exit_delay_s <= self.dispute_window_s + self.claim_delay_s:
            raise ConfigError(
                f"exit_delay_s is {self.exit_delay_s}: it must be longer than dispute_window_s and claim_delay_s "
                f"together ({self.dispute_window_s + self.claim_delay_s} s), or a stake is gone before its dispute ends"
            )
        if self.fee_bps > 10_000 or self.kappa_bps > UNCAPPED:
            raise ConfigError(f"fee_bps {self.fee_bps}, kappa_bps {self.kappa_bps}: at most 10000 and {UNCAPPED}")
        if sum(self.networks.values()) > 10_000:
            raise ConfigError(
                f"the networks' shares sum to {sum(self.networks.values())}: at most 10000 are there to share"
            )

    @classmethod
    def from_toml(cls, path: Path) -> ChainSettings:
        """Reads `[chain]`: any field by its name; `networks` and `genesis` as tables with text keys, amounts as
        integers or text.

        Raises ConfigError naming the key that is unknown or malformed.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("chain", {})
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(table) - known):
            raise ConfigError(f"{path}: unknown key {unknown[0]} in [chain]; known are {', '.join(sorted(known))}")
        try:
            values: dict[str, Any] = {k: int(v) for k, v in table.items() if k not in ("networks", "genesis")}
            if "networks" in table:
                values["networks"] = {int(k): int(v) for k, v in table["networks"].items()}
            if "genesis" in table:
                values["genesis"] = {_account(k): int(v) for k, v in table["genesis"].items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        return cls(**values)


@dataclass(frozen=True)
class Addresses:
    """Where the contracts of one deployment lie, and from which block on they have events."""

    chain_id: int
    from_block: int
    sno: bytes
    registry: bytes
    escrow: bytes
    rounds: bytes

    def write(self, path: Path) -> None:
        """As JSON with checksummed text, readable by people and other programs; whole, or not at all."""
        values = {k: v if isinstance(v, int) else checksum(v) for k, v in asdict(self).items()}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Addresses:
        """Raises ConfigError where the file is missing or not such a file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                chain_id=int(values["chain_id"]),
                from_block=int(values["from_block"]),
                sno=_account(values["sno"]),
                registry=_account(values["registry"]),
                escrow=_account(values["escrow"]),
                rounds=_account(values["rounds"]),
            )
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; `tensorlink deploy` writes this file") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not an addresses file: {error!r}; `tensorlink deploy` writes one") from None


def _account(text: str) -> bytes:
    account = bytes.fromhex(text.removeprefix("0x"))
    if len(account) != 20:
        raise ValueError(f"{text!r} is not an account: 20 bytes in hexadecimal are needed")
    return account
