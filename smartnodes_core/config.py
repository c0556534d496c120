"""Settings of a node: defaults, then a TOML file, then the environment, then flags; later ones win.

Each role's settings are a frozen dataclass. A field `round_interval_s` is `round_interval_s = 600` in the file,
`TENSORLINK_ROUND_INTERVAL_S` (or `SMARTNODES_…`) in the environment and `--round-interval-s` among the flags. The
help text of a flag is the field's metadata, made by `setting`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from smartnodes_core.errors import ConfigError
from smartnodes_core.keyfile import read_passphrase

MAX_BULK_CONNECTIONS = 8
PREFIXES = ("SMARTNODES_", "TENSORLINK_")

Settings = TypeVar("Settings", bound="NodeConfig")


@dataclasses.dataclass(frozen=True)
class NodeConfig:
    """What every node has to know. Paths may begin with ~."""

    identity: Annotated[Path, "key file of the node's identity"] = Path("~/.smartnodes/identity.json")
    account: Annotated[Path, "key file of the account on chain"] = Path("~/.smartnodes/account.json")
    passphrase_file: Annotated[Path | None, "file with the passphrase of key files that are sealed by one"] = None
    rpc_url: Annotated[str, "JSON-RPC endpoint of the chain"] = "http://127.0.0.1:8545"
    addresses: Annotated[Path, "file with the addresses of the contracts"] = Path("~/.smartnodes/addresses.json")
    endpoint: Annotated[str, "host:port to listen on; port 0 takes any free one"] = "127.0.0.1:0"
    announce_as: Annotated[list[str], "host:port under which others reach this node, if not the endpoint itself"] = (
        dataclasses.field(default_factory=list)
    )
    bootstrap: Annotated[list[str], "host:port of validators through which the network is joined"] = dataclasses.field(
        default_factory=list
    )
    port_mapping: Annotated[bool, "ask the router for a port when a validator does not reach this node"] = True
    relay: Annotated[str, "host:port on which peers that cannot reach each other are joined; empty: nowhere"] = ""
    relay_mbit: Annotated[int, "Mbit/s that the relay passes on for each peer"] = 200
    network_id: Annotated[int, "number of the network among those that share the contracts"] = 1
    log_level: Annotated[str, "DEBUG, INFO, WARNING or ERROR"] = "INFO"
    log_json: Annotated[bool, "log lines as JSON objects"] = False
    metrics: Annotated[str, "port (on loopback) or host:port where Prometheus reads metrics; empty: nowhere"] = ""
    chain_poll_interval_s: Annotated[float, "seconds between looks at the chain"] = 15.0

    congestion_control: Annotated[str, "TCP's, by its name in the kernel (bbr); empty leaves the system's"] = ""
    num_bulk_connections: Annotated[int, "connections for tensors to each peer; several help on links with losses"] = 1

    def __post_init__(self) -> None:
        """Checks ranges and expands ~; subclasses extend it. Raises ConfigError."""
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f"log_level is {self.log_level!r}: DEBUG, INFO, WARNING or ERROR is needed")
        if not 1 <= self.num_bulk_connections <= MAX_BULK_CONNECTIONS:
            raise ConfigError(
                f"num_bulk_connections is {self.num_bulk_connections}: 1 to {MAX_BULK_CONNECTIONS} are possible"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                object.__setattr__(self, field.name, value.expanduser())
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise ConfigError(f"{field.name} is {value}: it cannot be negative")
        if self.relay and self.relay_mbit < 1:
            raise ConfigError("relay_mbit is 0: at least 1 is needed where a relay is set")

    def need_bootstrap(self) -> None:
        """Raises ConfigError where no validator is named through which a network could be joined."""
        if not self.bootstrap:
            raise ConfigError("no bootstrap validator is named: set `bootstrap` to host:port of one")

    def passphrase(self) -> str | None:
        """What seals the key files, if anything does. Raises IdentityError."""
        return None if self.passphrase_file is None else read_passphrase(self.passphrase_file)


@dataclasses.dataclass(frozen=True)
class ValidatorConfig(NodeConfig):
    """Settings of a validator."""

    round_interval_s: Annotated[float, "seconds between rounds on chain"] = 600.0
    data_dir: Annotated[Path, "directory of journals and evidence"] = Path("~/.smartnodes/validator")
    vote_fee_bps: Annotated[int | None, "1/10000 of payments to be burned, to vote for; with vote_kappa_bps"] = None
    vote_kappa_bps: Annotated[int | None, "1/10000 of what is burned that workers may share, to vote for"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        votes = (self.vote_fee_bps, self.vote_kappa_bps)
        if (votes[0] is None) != (votes[1] is None):
            raise ConfigError(f"vote_fee_bps and vote_kappa_bps are {votes}: a vote names both, or neither is set")
        if (votes[0] or 0) > 10_000 or (votes[1] or 0) >= 1 << 32:
            raise ConfigError(f"vote_fee_bps and vote_kappa_bps are {votes}: at most 10000 and {(1 << 32) - 1}")


@dataclasses.dataclass(frozen=True)
class WorkerConfig(NodeConfig):
    """Settings of a rig."""

    data_dir: Annotated[Path, "directory of journals and step logs"] = Path("~/.smartnodes/worker")
    max_memory_bytes: Annotated[int, "memory offered to jobs; 0 offers what is free at the start"] = 0
    asks_wei: Annotated[int, "least pay for 10^12 units of work, in wei: jobs that pay less are refused"] = 0


@dataclasses.dataclass(frozen=True)
class UserConfig(NodeConfig):
    """Settings of a user."""

    least_reputation: Annotated[int, "workers below get no stage, 1 to 255; all begin with 1"] = 1


def help_of(cls: type[NodeConfig]) -> dict[str, str]:
    """The help text of every setting of `cls`, for flags and documents."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: str(hints[field.name].__metadata__[0]) for field in dataclasses.fields(cls)}


def load(
    cls: type[Settings],
    path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings `cls` from all sources. `env` is `os.environ` if None; flags that are None do not count.

    Raises ConfigError for unknown keys (naming the known ones and the closest), values of the wrong type, an
    unreadable file.
    """
    types = get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    if path is not None:
        values |= _checked(_read_toml(Path(path)), known, types, f"the file {path}")
    environment = os.environ if env is None else env
    for prefix in PREFIXES:
        ours = {k.removeprefix(prefix).lower(): v for k, v in environment.items() if k.startswith(prefix)}
        # variables of the same prefix may belong to other programs: unknown ones are not ours to refuse
        values |= _checked({k: v for k, v in ours.items() if k in known}, known, types, f"the environment ({prefix}…)")
    given = {key.replace("-", "_"): value for key, value in (flags or {}).items() if value is not None}
    values |= _checked(given, known, types, "the flags")
    return cls(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} is not TOML: {error}") from None


def _checked(found: Mapping[str, Any], known: list[str], types: Mapping[str, Any], source: str) -> dict[str, Any]:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{source} has an unknown setting {key!r}: {hint}known are {', '.join(sorted(known))}")
    return {key: _convert(value, types[key], key, source) for key, value in found.items()}


def _convert(value: Any, wanted: Any, key: str, source: str) -> Any:
    if get_origin(wanted) in (Union, UnionType):
        wanted = next(each for each in get_args(wanted) if each is not type(None))
    try:
        if get_origin(wanted) is list:
            items = (
                [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else list(value)
            )
            return [_convert(item, get_args(wanted)[0], key, source) for item in items]
        if wanted is Path:
            return Path(value)
        if wanted is bool:
            return _convert_bool(value)
        if wanted in (int, float):
            return _convert_number(value, wanted)
        if wanted is str and not isinstance(value, str):
            raise ValueError("text is needed")
        return value
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source} sets {key} to {value!r}: {error}") from None


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError("true or false is needed")
    return words[value.lower()]


def _convert_number(value: Any, wanted: type[int] | type[float]) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a number is needed")
    if wanted is int and isinstance(value, float):
        raise ValueError("a whole number is needed")
    number = wanted(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("a finite number is needed")
    return number
