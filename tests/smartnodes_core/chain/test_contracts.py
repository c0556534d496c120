"""The compiled contracts in the package are those of `contracts/`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from smartnodes_core.chain.contracts import CONTRACTS, decode_error, load_artifact
from smartnodes_core.chain.proposal import PROPOSAL_ABI

SOURCES = Path(__file__).parents[3] / "contracts"


@pytest.mark.skipif(not SOURCES.is_dir(), reason="an installed package without the contracts' sources")
@pytest.mark.parametrize("contract", CONTRACTS)
def test_artifacts_are_compiled_from_the_sources_here(contract: str) -> None:
    files = [path for path in SOURCES.rglob("*.sol") if "node_modules" not in path.parts]
    here = {path.relative_to(SOURCES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert load_artifact(contract).sources == here, "run `make contracts`"


@pytest.mark.parametrize("contract", CONTRACTS)
def test_contracts_fit_on_any_chain_and_name_their_compiler(contract: str) -> None:
    artifact = load_artifact(contract)
    assert 1000 < len(artifact.bytecode) < 24576
    assert artifact.compiler.startswith("0.8.37+commit")


def test_the_proposal_encoded_here_has_the_contracts_struct() -> None:
    [execute] = [entry for entry in load_artifact("Rounds").abi if entry.get("name") == "execute"]

    def text(entry: dict[str, object]) -> str:
        kind = str(entry["type"])
        if not kind.startswith("tuple"):
            return kind
        inside = ",".join(text(part) for part in entry["components"])  # type: ignore[attr-defined]
        return f"({inside}){kind[5:]}"

    assert text(execute["inputs"][0]) == PROPOSAL_ABI


def test_errors_are_decoded_by_name() -> None:
    assert decode_error(b"") == ("reverted", {})
    assert decode_error(bytes.fromhex("08c379a0") + b"rubbish") == ("Error", {})
    assert decode_error(b"\x4e\x48\x7b\x71" + (17).to_bytes(32, "big")) == ("Panic", {"code": 17})
    assert decode_error(b"abcdefgh")[0] == "reverted"
