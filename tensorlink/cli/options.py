"""Flags made from settings: each field of a config class is a flag, with its help text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from smartnodes_core.config import NodeConfig, help_of, load
from smartnodes_core.errors import SmartnodesError

Config = TypeVar("Config", bound=NodeConfig)


def parser_for(config_class: type[NodeConfig], program: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--config` and one flag per setting."""
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("--config", type=Path, help="TOML file with any of these settings")
    types = get_type_hints(config_class)
    for name, text in help_of(config_class).items():
        action = "append" if get_origin(types[name]) is list else "store"
        parser.add_argument("--" + name.replace("_", "-"), help=text, action=action, default=None)
    return parser


def config_from(config_class: type[Config], options: argparse.Namespace) -> Config:
    """The settings from file, environment and flags. Raises ConfigError."""
    flags: dict[str, Any] = {field.name: getattr(options, field.name) for field in dataclasses.fields(config_class)}
    return load(config_class, options.config, flags=flags)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (Unix, seconds), level, logger, thread, message; exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def start_logging(level: str, as_json: bool = False) -> None:
    """Log lines to standard error, for people or as JSON objects."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonLines() if as_json else text)
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in ("web3", "urllib3", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def printable(line: str) -> str:
    """What strangers wrote, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in line)


def fail(program: str, error: SmartnodesError) -> int:
    """Say on standard error, in one line, what went wrong; the exit code for it."""
    sys.stderr.write(f"{program}: {error}\n")
    return 2
