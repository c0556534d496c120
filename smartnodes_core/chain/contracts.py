"""The compiled contracts, as `contracts/build.js` wrote them, and the errors they can answer with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from smartnodes_core.chain.signing import keccak

CONTRACTS = ("SNO", "Registry", "Escrow", "Rounds")


@dataclass(frozen=True)
class Artifact:
    """One compiled contract. `sources` maps every source file of `contracts/` to its SHA-256."""

    contract: str
    compiler: str
    sources: dict[str, str]
    abi: list[dict[str, Any]]
    bytecode: bytes


@cache
def load_artifact(contract: str) -> Artifact:
    """The artifact of one of `CONTRACTS`."""
    text = (resources.files("smartnodes_core.chain") / "artifacts" / f"{contract}.json").read_text(encoding="utf-8")
    values = json.loads(text)
    bytecode = bytes.fromhex(values["bytecode"][2:])
    return Artifact(values["contract"], values["compiler"], values["sources"], values["abi"], bytecode)


@cache
def _errors() -> dict[bytes, tuple[str, list[str], list[str]]]:
    known = {b"\x08\xc3\x79\xa0": ("Error", ["string"], ["message"]), b"NH{q": ("Panic", ["uint256"], ["code"])}
    for contract in CONTRACTS:
        for entry in load_artifact(contract).abi:
            if entry["type"] == "error":
                types = [item["type"] for item in entry["inputs"]]
                names = [item["name"] for item in entry["inputs"]]
                selector = keccak(f"{entry['name']}({','.join(types)})".encode())[:4]
                known[selector] = (entry["name"], types, names)
    return known


def decode_error(data: bytes) -> tuple[str, dict[str, Any]]:
    """Name and values of the error in a revert's data; `reverted` where it says nothing we know."""
    from eth_abi.abi import decode

    if data[:4] not in _errors():
        return ("reverted", {"data": "0x" + data[:36].hex()} if data else {})
    name, types, names = _errors()[data[:4]]
    try:
        values = decode(types, data[4:])
    except Exception:  # a contract that is not ours may answer with our selector and anything behind it
        return (name, {})
    shown = ["0x" + value.hex() if isinstance(value, bytes) else value for value in values]
    return (name, dict(zip(names, shown, strict=True)))
